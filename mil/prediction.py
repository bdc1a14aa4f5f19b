"""A trained study applied to new slides, in the order things happen: run, slides, features, scores, tables, report.

Axes: S slides, T tiles of one slide, D features, M members, C outputs (1 for two classes).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from extract.cache import CacheError, Header, replace_on_success, toolkit_version
from extract.cohort import BARCODE, TCGA, Cohort, CohortError, check_cohort, read_cohort
from extract.config import Columns, ConfigError, ExtractConfig, Features, ProblemsError, did_you_mean, to_yaml
from extract.extraction import cohort_slides, extract_cohort
from extract.layouts import FeatureFolder, open_feature_folder
from mil.bags import EVALUATION_TILES, as_tensor
from mil.checks import FEW_TILES, check_finite, near_names, read_headers
from mil.likeness import extraction_config, other_kind
from mil.metrics import decide
from mil.report import write_report
from mil.study import count, name_some
from mil.tables import mean_of_logits, p_columns, predictions_table
from mil.trained import TrainedStudy, bags_of, logits_of, open_run
from mil.wording import terminal_table

if TYPE_CHECKING:
    from mil.predict import PredictConfig

PREDICTIONS, MEMBERS, FAILED = "predictions.csv", "members.csv", "failed.csv"
CONFIG, ENVIRONMENT = "predict.yaml", "environment.json"
FEATURES = "features"
OF_REPORT = {"metrics.json", "slides.csv", "patients.csv", "figures", "report.html"}
WRITTEN = {PREDICTIONS, MEMBERS, FAILED, CONFIG, ENVIRONMENT} | OF_REPORT
"""What a prediction leaves in its folder; FEATURES besides, which overwrite=true keeps."""

READ_AHEAD = 3
"""Slides read while others are scored: memory holds these and one batch."""
SHOWN = 12
"""Slides that the terminal lists one by one."""
TRAINED_ON, HELD_OUT, UNUSED = "train", "test", "unused"
"""What the study did with a slide's patient: trained or selected on it, held it out, had it and left it aside."""


@dataclass(frozen=True)
class Failure:
    """Why there is no prediction of a slide."""

    slide: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Job:
    """What is to be done. `failed` (slides without a prediction), `warnings` and `notes` grow on the way."""

    config: PredictConfig
    trained: TrainedStudy
    out: Path
    command: Sequence[str]
    began: str
    failed: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def features_folder(self) -> Path:
        """Where features are, or go to."""
        return self.config.features.folder or self.out / FEATURES


@dataclass(frozen=True)
class Scored:
    """What all members say: logits_MSC, in the order of `slides`."""

    slides: list[str]
    n_tiles: list[int]
    logits_MSC: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """`table`: a row a slide, as in predictions.csv. `metrics`: None without labels."""

    folder: Path
    classes: tuple[str, ...]
    table: pd.DataFrame
    failed: list[Failure]
    warnings: list[str]
    notes: list[str]
    metrics: dict[str, Any] | None


def predict_study(config: PredictConfig, command: Sequence[str] = ()) -> Outcome:
    """Predict what the config names, write OUT and say what became of it.

    Raises:
        ProblemsError: run folder, slides, features or OUT are not what they must be; nothing was predicted.
        EncoderError, ReaderError: slides cannot be extracted.
    """
    assert config.run is not None
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    trained = open_run(config.run, device=config.device)
    job = Job(config, trained, config.out or Path("predictions") / trained.name, command, began)
    refuse_existing(job.out, config.overwrite)
    cohort = slides_to_predict(job)
    if files_are_given(job, cohort):
        extract(job, cohort)
        features, headers = find_features(job, cohort, "cache")
    else:
        features, headers = find_features(job, cohort, config.features.layout)
    scored = score(job, features, headers)
    return write(job, cohort, scored)


# --- the folder of predictions ---------------------------------------------------------------------------------------


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise ConfigError unless OUT is new, holds extracted features only, or predictions that may be replaced."""
    found = set(os.listdir(out)) - {FEATURES} if out.is_dir() else set()
    if out.exists() and not out.is_dir():
        raise ConfigError("predictions exist", [f"{out}: is a file, expected a folder; set out=OTHER"])
    if not found:
        return
    if CONFIG not in found:
        raise ConfigError(
            "predictions exist", [f"{out}: not a folder of predictions (no {CONFIG}), but not empty; set out=OTHER"]
        )
    if not overwrite:
        raise ConfigError("predictions exist", [f"{out}: set out=OTHER, or overwrite=true to replace them"])


def remove_written(out: Path) -> None:
    """What an earlier prediction left, and nothing else."""
    for name in WRITTEN:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


# --- which slides ----------------------------------------------------------------------------------------------------


def slides_to_predict(job: Job) -> Cohort:
    """The table of new slides; its split is "test" for all.

    Raises:
        ProblemsError: the CSV or a folder is wrong.
    """
    config = job.config
    if config.cohort is not None:
        return read_new_cohort(job, config.cohort)
    if config.slide is not None:
        return _table(job, [one_slide(job, config.slide)])
    if config.slides.folder is not None:
        found = cohort_slides(ExtractConfig(slides=config.slides, features=Features(folder=job.features_folder)))
        return _table(job, [(file.slide, str(file.path)) for file in found])
    there = open_feature_folder(job.features_folder, config.features.layout).slides
    return _table(job, [(slide, None) for slide in there])


def one_slide(job: Job, name: str) -> tuple[str, str | None]:
    """Slide id and file; no file where `name` is the id of a slide whose features are there."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.stem, str(path)
    if path.is_dir():
        raise ConfigError("no such slide", [f"slide={name}: is a folder; use slides.folder={name}"])
    if job.config.features.folder is None:
        raise ConfigError("no such slide", [f"slide={name}: no such file"])
    features = open_feature_folder(job.features_folder, job.config.features.layout)
    if name not in features.slides:
        hint = did_you_mean(name, list(features.slides))
        raise ConfigError(
            "no such slide", [f"slide={name}: no such file, and no features of it in {features.folder}{hint}"]
        )
    return name, None


def _table(job: Job, rows: Iterable[tuple[str, str | None]]) -> Cohort:
    table = pd.DataFrame(rows, columns=["slide", "path"])
    table = table.assign(patient="", label=None, split="test", mpp=np.nan)
    return check_cohort(with_patients(job, table, "no table of slides"), job.trained.classes)


def with_patients(job: Job, table: pd.DataFrame, why: str) -> pd.DataFrame:
    """The table with a patient in every row: where it says none, that of the slide's TCGA barcode, else the slide."""
    patients, n_unknown = [], 0
    for patient, slide in zip(table["patient"], table["slide"], strict=True):
        patients.append(patient or barcode(slide) or slide)
        n_unknown += not (patient or barcode(slide))
    if n_unknown:
        job.notes.append(
            f"{count(n_unknown, 'slide')} without a patient ({why}): each counts as its own, so intervals may be too "
            "narrow and what the study knows is only found by slide name"
        )
    return table.assign(patient=pd.Series(patients, index=table.index, dtype=object))


def barcode(slide: str) -> str:
    """The patient in the slide's TCGA barcode, "" if its name is none."""
    found = BARCODE.match(slide)
    return found[0].upper() if found else ""


def read_new_cohort(job: Job, path: Path) -> Cohort:
    """The CSV's slides. Patient and label may be missing; its splits are of no concern: all are predicted."""
    columns = columns_of(job.config.columns, job.trained.config.columns, path)
    cohort = read_cohort(path, columns.model_copy(update={"split": ""}), job.trained.classes, labelled=False)
    if not len(cohort):
        raise CohortError("problems in the cohort", [f"{path}: no rows"])
    table = with_patients(job, cohort.table.assign(split="test"), f"columns.patient={columns.patient}")
    return Cohort(table, cohort.classes)


def columns_of(given: Columns, study: Columns, path: Path) -> Columns:
    """Names of the CSV's columns: as given, else the study's where the CSV has them, else the standard ones.

    Raises:
        CohortError: a column that was asked for is not there.
    """
    try:
        header = [str(name).strip() for name in pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns]
    except (OSError, ValueError) as error:
        raise CohortError("cohort cannot be read", [f"{path}: {error}"]) from None
    own = {role: name for role, name in given if name != getattr(Columns(), role)}
    absent = [
        f"{path}: no column {name!r} (columns.{role}){did_you_mean(name, header)}. It has: {', '.join(header)}"
        for role, name in own.items()
        if name not in header and not (name == TCGA and role in ("patient", "site"))
    ]
    if absent:
        raise CohortError("problems in the cohort", absent)
    of_study = {role: name for role, name in study if name in header and role not in own}
    return given.model_copy(update=of_study)


def patients_in_study(trained: TrainedStudy, cohort: Cohort) -> list[str]:
    """For every slide what the study did with its patient, or with a slide of that name; "" = knows neither."""
    roles = trained.roles[[f"m{member}" for member in trained.plan["member"]]]
    used = roles.isin(["train", "val"]).any(axis=1)
    held_out = (roles == "test").any(axis=1)
    role_S = np.where(used, TRAINED_ON, np.where(held_out, HELD_OUT, UNUSED))
    rank = ("", UNUSED, HELD_OUT, TRAINED_ON).index
    known: dict[tuple[str, str], str] = {}
    for column in ("patient", "slide"):
        for name, role in zip(trained.roles[column], role_S, strict=True):
            known[column, name] = max(known.get((column, name), ""), role, key=rank)
    found = []
    for patient, slide in zip(cohort.table["patient"], cohort.table["slide"], strict=True):
        names = (("patient", patient), ("patient", barcode(slide)), ("slide", slide))
        found.append(max((known.get(name, "") for name in names), key=rank))
    return found


# --- extraction ------------------------------------------------------------------------------------------------------


def files_are_given(job: Job, cohort: Cohort) -> bool:
    """Whether there are slide files to extract: a single one, a folder, or paths in a CSV without features.folder."""
    config = job.config
    if config.slide is not None:
        return bool(cohort.table["path"].notna().all())
    if config.slides.folder is None and config.features.folder is None and cohort.table["path"].isna().all():
        raise ConfigError(
            "no features",
            [
                f"{config.cohort}: names no slide files (columns.path); set features.folder=FOLDER of features, "
                "or slides.folder=FOLDER of slides"
            ],
        )
    return config.slides.folder is not None or config.features.folder is None


def extract(job: Job, cohort: Cohort) -> None:
    """Extract what is not there yet, the way the study's features were; slides that fail go to `job.failed`.

    Raises:
        ProblemsError: the study does not say how, its weights are not at hand, or other features are in the way.
        EncoderError, ReaderError: the encoder cannot be had, readers cannot be started.
    """
    settings = extraction_config(job.config, job.trained, job.features_folder, job.notes)
    files = cohort_slides(settings, cohort)
    print(f"extracting {count(len(files), 'slide')} with {settings.encoder.name} into {settings.features.folder}")
    try:
        summary = extract_cohort(settings, files, wait_for_others=True)
    except ProblemsError as error:
        what, made_otherwise, _ = error.title.partition(" that were made otherwise")
        if not made_otherwise:
            raise
        advice = "; set features.folder=OTHER, or extract.overwrite=true to make them anew"  # overwrite= means OUT here
        raise ProblemsError(what + made_otherwise + advice, error.problems) from None
    job.failed.extend(Failure(failed.slide, failed.stage, failed.reason) for failed in summary.failed)


# --- features --------------------------------------------------------------------------------------------------------


def find_features(job: Job, cohort: Cohort, layout: str) -> tuple[FeatureFolder | None, dict[str, Header]]:
    """The headers of usable feature files; slides that have none go to `job.failed`.

    Raises:
        ProblemsError: features of another kind than the study's, or of none of the slides.
    """
    gone = {failure.slide for failure in job.failed}
    wanted = [slide for slide in cohort.table["slide"] if slide not in gone]
    if not wanted:
        return None, {}
    features = open_feature_folder(job.features_folder, layout)
    headers, reasons = read_headers(wanted, features)
    if not set(wanted) & set(features.slides):
        none_of = f"none of {count(len(wanted), 'slide')} has features in {features.folder} (layout {features.layout})"
        raise ConfigError("no features", [f"{none_of}: {name_some(wanted)}. There are: {name_some(features.slides)}"])
    problems, unknown = other_kind(job.trained, headers, features.layout)
    if problems:
        raise ProblemsError("features of another kind than the study was trained on; give others, or slides", problems)
    job.notes.extend(unknown)
    tiny = [f"{slide} ({header.n_tiles})" for slide, header in headers.items() if header.n_tiles < FEW_TILES]
    if tiny:
        job.notes.append(f"{count(len(tiny), 'slide')} with fewer than {FEW_TILES} tiles: {name_some(tiny)}")
    near = near_names([slide for slide in reasons if slide not in features.slides], list(features.slides))
    for slide, reason in reasons.items():
        hint = f"; seems to be there as {near[slide]!r}" if slide in near else ""
        where = "" if slide in features.slides else f" in {features.folder}"
        job.failed.append(Failure(slide, "features", f"{reason}{where}{hint}"))
    return features, headers


# --- scores ----------------------------------------------------------------------------------------------------------


def score(job: Job, features: FeatureFolder | None, headers: dict[str, Header]) -> Scored:
    """Logits of every member. Slides are read while others are scored; one that cannot be used goes to `job.failed`."""
    slides: list[str] = []
    lengths: list[int] = []
    parts: list[np.ndarray] = []
    batch: list[tuple[str, Tensor]] = []

    def flush() -> None:
        if batch:
            names, tiles = zip(*batch, strict=True)
            parts.append(logits_of(job.trained, bags_of(names, tiles), done=bar.update))
            slides.extend(names)
            lengths.extend(len(bag_TD) for bag_TD in tiles)
            batch.clear()

    with tqdm(total=len(headers), desc="scoring", unit="slide", disable=None, leave=False) as bar:
        for slide, found in read_ahead(list(headers), lambda slide: read_bag(features, slide)):
            if isinstance(found, str):
                job.failed.append(Failure(slide, "read", found))
                bar.update(1)
                continue
            if sum(len(bag_TD) for _, bag_TD in batch) + len(found) > EVALUATION_TILES:
                flush()
            batch.append((slide, found))
        flush()
    nothing = np.zeros((job.trained.n_members, 0, job.trained.aggregator.n_outputs), dtype=np.float32)
    logits_MSC = np.concatenate([nothing, *parts], axis=1)
    for s in np.flatnonzero(~np.isfinite(logits_MSC).all(axis=(0, 2))):
        diverged = "a member's output is not a finite number; did its training diverge?"
        job.failed.append(Failure(slides[s], "score", diverged))
    return Scored(slides, lengths, logits_MSC)


def read_bag(features: FeatureFolder | None, slide: str) -> Tensor | str:
    """features_TD, or why they cannot be used."""
    assert features is not None
    try:
        bag_TD = as_tensor(features.features(slide))
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


# --- results ---------------------------------------------------------------------------------------------------------


def write(job: Job, cohort: Cohort, scored: Scored) -> Outcome:
    """All files of OUT."""
    trained, out = job.trained, job.out
    in_study = dict(zip(cohort.table["slide"], patients_in_study(trained, cohort), strict=True))
    members = member_rows(job, cohort, scored, in_study)
    table = slide_rows(trained, cohort, members, dict(zip(scored.slides, scored.n_tiles, strict=True)), in_study)
    tell_what_is_known(job, table)
    out.mkdir(parents=True, exist_ok=True)
    remove_written(out)
    config_yaml = to_yaml(job.config.model_copy(update={"overwrite": False, "out": out}))
    (out / CONFIG).write_text(config_yaml, encoding="utf-8")
    environment = describe_environment(job)
    (out / ENVIRONMENT).write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    tables = {MEMBERS: members, PREDICTIONS: table}
    if job.failed:
        tables[FAILED] = pd.DataFrame([vars(failure) for failure in job.failed])
    for name, content in tables.items():
        with replace_on_success(out / name) as temporary:
            content.to_csv(temporary, index=False)
    metrics = None
    if job.config.cohort is not None and members["label"].notna().any():
        metrics = write_report(
            out,
            title=f"{trained.name} on {job.config.cohort.stem}",
            predictions=members,
            plan=trained.plan,
            history=pd.DataFrame(),
            classes=trained.classes,
            config_yaml=config_yaml,
            environment=environment,
            notes=[*job.warnings, *job.notes],
            bootstrap=job.config.report.bootstrap,
            seed=trained.config.seed,
            thresholds=trained.thresholds,
            members_file=MEMBERS,
            never_trained_on=job.config.known_patients == "leave_out" or TRAINED_ON not in in_study.values(),
        )
    return Outcome(out, trained.classes, table, job.failed, job.warnings, job.notes, metrics)


def member_rows(job: Job, cohort: Cohort, scored: Scored, in_study: dict[str, str]) -> pd.DataFrame:
    """members.csv: one row a member and slide, as in a run's predictions.csv.

    Role "test" is what metrics count. A slide of a patient that the study trained on has "train" instead, unless
    known_patients=score.
    """
    left_out = (TRAINED_ON,) if job.config.known_patients == "leave_out" else ()
    rows = cohort.table.set_index("slide", drop=False).loc[scored.slides].reset_index(drop=True)
    roles_S = np.array(["train" if in_study[slide] in left_out else "test" for slide in scored.slides], dtype=object)
    roles_MS = np.broadcast_to(roles_S, (job.trained.n_members, len(rows)))
    return predictions_table(job.trained.plan, rows, roles_MS, scored.logits_MSC)


def slide_rows(
    trained: TrainedStudy, cohort: Cohort, members: pd.DataFrame, n_tiles: dict[str, int], in_study: dict[str, str]
) -> pd.DataFrame:
    """predictions.csv: slide, patient, label, p_NAME of every class, sd (over members, of the last of two classes or
    of the predicted one), threshold, predicted, members, n_tiles, in_study; in the order of the cohort."""
    names = p_columns(trained.classes)
    table = mean_of_logits(members, trained.classes, trained.thresholds).set_index("slide")
    order = [slide for slide in cohort.table["slide"] if slide in n_tiles]
    table = table.loc[order].reset_index()
    p_SC = table[names].to_numpy(dtype=np.float64)
    finite_S = np.isfinite(p_SC).all(axis=1)
    chosen = decide(p_SC, table["threshold"].to_numpy())
    columns: dict[str, Any] = {
        "slide": table["slide"],
        "patient": table["patient"],
        "label": pd.Series([trained.classes[c] if c >= 0 else None for c in table["label"]], dtype=object),
        **{f"p_{name}": p_SC[:, c] for c, name in enumerate(trained.classes)},
        "sd": table["sd"],
        "threshold": table["threshold"],
        "predicted": pd.Series(
            [trained.classes[c] if ok else None for c, ok in zip(chosen, finite_S, strict=True)], dtype=object
        ),
        "members": table["members"],
        "n_tiles": [n_tiles[slide] for slide in order],
        "in_study": [in_study[slide] for slide in order],
    }
    return pd.DataFrame(columns)


def tell_what_is_known(job: Job, table: pd.DataFrame) -> None:
    """Slides of patients that the study knows, and slides that failed."""
    counted = {"leave_out": ", so no metric counts them (see known_patients)", "score": ", and the metrics count them"}
    scored = counted[job.config.known_patients] if table["label"].notna().any() else ""
    for what, said, where in (
        (TRAINED_ON, f"the study trained on or selected with{scored}", job.warnings),
        (HELD_OUT, "the study held out as its test split", job.notes),
    ):
        rows = table[table["in_study"] == what]
        patients = rows["patient"].unique()
        if len(rows):
            slides = f"{count(len(rows), 'slide')} of {count(len(patients), 'patient')}"
            where.append(f"{slides} that {said}: {name_some(patients)}. Column in_study of {PREDICTIONS} marks them")
    if job.failed:
        failed = name_some(failure.slide for failure in job.failed)
        job.warnings.append(f"{count(len(job.failed), 'slide')} without a prediction, see {FAILED}: {failed}")


def describe_environment(job: Job) -> dict[str, Any]:
    """Where the numbers come from: this prediction, and the study behind it."""
    study = job.trained.environment
    return {
        "slide-mil": toolkit_version(),
        "command": " ".join(job.command),
        "started": job.began,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "device": str(job.trained.device),
        "study": {
            "folder": str(job.trained.folder),
            "aggregator": job.trained.description.aggregator,
            "members": job.trained.n_members,
            **{key: study[key] for key in ("slide-mil", "command", "started") if key in study},
        },
        "features": {"folder": str(job.features_folder), **job.trained.description.features},
    }


# --- the terminal ----------------------------------------------------------------------------------------------------


def outcome_text(outcome: Outcome) -> str:
    """The slides (a few, or how many of each class), metrics where there are labels, notes, and where the files are."""
    table = outcome.table
    lines = [f"warning: {text}" for text in outcome.warnings] + [f"note: {text}" for text in outcome.notes]
    if len(table) <= SHOWN:
        lines += slide_lines(table, outcome.classes)
    else:
        n = table["predicted"].value_counts()
        shown = ", ".join(f"{n.get(name, 0)} {name}" for name in outcome.classes)
        lines.append(f"{len(table)} slides, predicted: {shown}")
    if outcome.metrics is not None:
        lines += ["", terminal_table(outcome.metrics)]
    lines += ["", f"Predictions: {outcome.folder / PREDICTIONS}"]
    if outcome.metrics is not None:
        lines.append(f"Report: {outcome.folder / 'report.html'}")
    if outcome.failed:
        lines.append(f"Failed: {outcome.folder / FAILED}")
    return "\n".join(lines)


def slide_lines(table: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """`test_001  tumor 0.873 ± 0.041 over 5 members, threshold 0.431: tumor`, aligned."""
    width = max((len(slide) for slide in table["slide"]), default=0)
    shown = classes[-1:] if len(classes) == 2 else classes
    lines = []
    for row in table.to_dict("records"):
        text = ", ".join(f"{name} {row[f'p_{name}']:.3f}" for name in shown)
        spread = f" ± {row['sd']:.3f} over {row['members']} members" if row["members"] > 1 else ""
        threshold = f", threshold {row['threshold']:.3f}" if len(classes) == 2 else ""
        lines.append(f"{row['slide']:<{width}}  {text}{spread}{threshold}: {row['predicted']}")
    return lines
