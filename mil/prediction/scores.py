"""The features of new slides, read ahead, and what all members say of them.

Axes: S slides, T tiles of one slide, D features, M members, C outputs (1 for two classes).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from extract.cohort import Cohort, site_of_barcode
from extract.config import ConfigError, ProblemsError
from extract.features.cache import CacheError, Header
from extract.features.folder import FeatureFolder, refuse_replaced
from extract.features.joined import parts_of
from extract.wording import count, name_some
from mil.prediction.job import Failure, Job, Scored
from mil.prediction.likeness import other_kind
from mil.results.trained import bags_of, logits_of
from mil.study.covariates import raw_columns
from mil.study.units import slides_of_bags
from mil.training.bags import EVALUATION_TILES, as_tensor
from mil.training.checks import FEW_TILES, check_finite, near_names, notes_on_checksums, read_headers

READ_AHEAD = 3
"""Slides read while others are scored: memory holds these and one batch."""


def find_features(job: Job, cohort: Cohort, layout: str) -> tuple[FeatureFolder | None, dict[str, Header]]:
    """The headers of usable feature files; slides that have none go to `job.failed`.

    Raises:
        ProblemsError: features of another kind than the study's, or of none of the slides.
    """
    gone = {failure.slide for failure in job.failed}
    wanted = [slide for slide in cohort.table["slide"] if slide not in gone]
    if not wanted:
        return None, {}
    features = job.open_features(layout)
    refuse_other_order(job, features, wanted)
    headers, reasons = read_headers(wanted, features)
    if not set(wanted) & set(features.slides):
        none_of = f"none of {count(len(wanted), 'slide')} has features in {features.folder} (layout {features.layout})"
        raise ConfigError("no features", [f"{none_of}: {name_some(wanted)}. There are: {name_some(features.slides)}"])
    problems, unknown = list[str](), list[str]()
    for i, part in enumerate(parts_of(features)):
        own = {slide: part.header(slide) for slide in headers}
        found = other_kind(job.trained.of_part(i), own, part.layout)
        problems, unknown = problems + found[0], unknown + found[1]
    if problems:
        raise ProblemsError("features of another kind than the study was trained on; give others, or slides", problems)
    job.notes.extend([*unknown, *notes_on_checksums(features, headers)])
    tiny = [f"{slide} ({header.n_tiles})" for slide, header in headers.items() if header.n_tiles < FEW_TILES]
    if tiny:
        job.notes.append(f"{count(len(tiny), 'slide')} with fewer than {FEW_TILES} tiles: {name_some(tiny)}")
    near = near_names([slide for slide in reasons if slide not in features.slides], list(features.slides))
    for slide, reason in reasons.items():
        hint = f"; seems to be there as {near[slide]!r}" if slide in near else ""
        where = "" if slide in features.slides else f" in {features.folder}"
        job.failed.append(Failure(slide, "features", f"{reason}{where}{hint}"))
    return features, headers


def refuse_other_order(job: Job, features: FeatureFolder, slides: Sequence[str]) -> None:
    """Raise ProblemsError where several folders are of other encoders than the study's, or in another order.

    Before the tiles are joined: whoever gives the wrong folders is to be told which, and not about their coordinates.
    """
    parts, study = parts_of(features), [part["encoder"] for part in job.trained.feature_parts]
    if len(parts) == 1:
        return
    found = []
    for part in parts:
        headers = read_headers([slide for slide in slides if slide in part.slides][:1], part)[0]
        found.append(next((header.provenance.encoder for header in headers.values()), ""))
    wrong = [i for i, (one, other) in enumerate(zip(found, study, strict=True)) if one and other and one != other]
    if wrong:
        problems = [
            f"features.folder: number {i + 1}, {parts[i].folder}, is of {found[i]!r}; the study's is of {study[i]!r}"
            for i in wrong
        ]
        same = ["they are the study's encoders in another order"] if sorted(found) == sorted(study) else []
        raise ProblemsError("feature folders of other encoders than the study's, or in another order", problems + same)


def score(job: Job, features: FeatureFolder | None, headers: dict[str, Header], cohort: Cohort) -> Scored:
    """Logits of every member. Slides are read while others are scored; one that cannot be used goes to `job.failed`.

    Where a bag is a patient, `cohort` has a row for each; without some of its slides it is made of the others.
    """
    slides_of = dict(zip(cohort.table["slide"], slides_of_bags(cohort.table), strict=True))
    site_of = sites_of_slides(job, list(slides_of), cohort)
    slides: list[str] = []
    lengths: list[int] = []
    parts: list[np.ndarray] = []
    means: list[np.ndarray] = []
    of_tiles: list[np.ndarray] = []
    ladder = job.trained.ladder
    batch: list[tuple[str, Tensor]] = []
    bag_of = {slide: bag for bag, own in slides_of.items() for slide in own if slide in headers}

    def flush() -> None:
        if batch:
            names, tiles = zip(*batch, strict=True)
            site_S = job.trained.site_rows([site_of[name] for name in names])
            bags = replace(bags_of(names, tiles, site_S), covariates_SV=covariates_of(job, cohort, names))
            parts.append(logits_of(job.trained, bags))
            slides.extend(names)
            lengths.extend(len(bag_TD) for bag_TD in tiles)
            batch.clear()

    with tqdm(total=len(bag_of), desc="scoring", unit="slide", disable=None, leave=False) as bar:
        reader = read_ahead(list(bag_of), lambda slide: read_bag(features, headers[slide], slide))
        for slide, own in groupby(reader, key=lambda read: bag_of[read[0]]):
            views = []
            for name, read in own:
                if isinstance(read, str):
                    job.failed.append(Failure(name, "read", read))
                else:
                    views.append(read)
                bar.update(1)
            if not views:
                continue
            found = views[0] if len(views) == 1 else torch.cat(views)
            if sum(len(bag_TD) for _, bag_TD in batch) + len(found) > EVALUATION_TILES:
                flush()
            batch.append((slide, found))
            means.append(found.numpy().mean(axis=0, dtype=np.float64))
            if ladder is not None:
                of_tiles.append(ladder.of_tiles(found.numpy()))
        flush()
    nothing = np.zeros((job.trained.n_members, 0, job.trained.aggregator.n_logits), dtype=np.float32)
    logits_MSC = np.concatenate([nothing, *parts], axis=1)
    for s in np.flatnonzero(~np.isfinite(logits_MSC).all(axis=(0, 2))):
        diverged = "a member's output is not a finite number; did its training diverge?"
        job.failed.append(Failure(slides[s], "score", diverged))
    means_SD = np.stack(means) if means else np.zeros((0, job.trained.description.in_dim))
    return Scored(slides, lengths, logits_MSC, means_SD, np.stack(of_tiles) if of_tiles else None)


def covariates_of(job: Job, cohort: Cohort, slides: Sequence[str]) -> np.ndarray | None:
    """What the table says of these slides' patients, (S, V); None for a study without covariates."""
    if cohort.further is None or not job.trained.covariates:
        return None
    rows = cohort.further.set_axis(cohort.table["slide"]).loc[list(slides)]
    return raw_columns(job.trained.covariates, rows)


def sites_of_slides(job: Job, slides: Sequence[str], cohort: Cohort) -> dict[str, str]:
    """Site of every slide, as the CSV or its TCGA barcode says it, "" if neither does; notes on those without a map."""
    said = dict(zip(cohort.table["slide"], cohort.table["site"], strict=True)) if "site" in cohort.table else {}
    found = {slide: said.get(slide) or site_of_barcode(slide) for slide in slides}
    row_S = job.trained.site_rows(found.values())
    if row_S is not None and (row_S == 0).any():
        without = [slide for slide, row in zip(slides, row_S, strict=True) if row == 0]
        job.notes.append(
            f"train.harmonize=combat: {count(len(without), 'slide')} of no site that the study trained on, which are "
            f"scored as they are, as from an average site: {name_some(without)}"
        )
    return found


def read_bag(features: FeatureFolder | None, header: Header, slide: str) -> Tensor | str:
    """features_TD, or why they cannot be used: `header` is what was checked, and they must be of that very file."""
    assert features is not None
    try:
        bag_TD = as_tensor(features.features(slide))
        refuse_replaced(features, slide, header.identity)
    except (CacheError, OSError) as error:
        return str(error)
    problems = check_finite([slide], bags_of([slide], [bag_TD]))
    return problems[0] if problems else bag_TD


def read_ahead(slides: Sequence[str], read: Callable[[str], Tensor | str]) -> Iterator[tuple[str, Tensor | str]]:
    """Every slide with what `read` gives for it, in order, the next ones being read meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as thread:
        waiting: deque[tuple[str, Future[Tensor | str]]] = deque()
        for slide in slides:
            waiting.append((slide, thread.submit(read, slide)))
            if len(waiting) > READ_AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for slide, future in waiting:
            yield slide, future.result()
