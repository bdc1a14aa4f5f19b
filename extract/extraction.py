"""Cohort -> cache: one process's share of the work, from the list of slides to one feature file each.

Readers (see `extract.readers`) deliver tiles of whatever slides they are at; tiles fill batches across slides; a
thread encodes one batch while the next is filled; another writes a slide's file when its last feature is there.
Memory holds the tiles in flight and the features of the slides in work, no pixels beyond that.

Axes: N tiles of a slide, K tiles that arrive together, B tiles of a batch, D features, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import glob
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from extract.cache import SUFFIX, CacheError, Header, Provenance, read_header, replace_on_success, write_features
from extract.claims import Claims, filesystem_now
from extract.cohort import Cohort, read_cohort
from extract.config import ConfigError, ExtractConfig, ProblemsError, Section, Tiles, Tissue, did_you_mean
from extract.encoders import EncoderError, FrozenEncoder, load_encoder
from extract.readers import (
    Failure,
    OwnReader,
    Planned,
    PlanTask,
    ReaderPool,
    Result,
    Settings,
    SlideFile,
    Task,
    TilesRead,
    read_task,
    start_readers,
)
from extract.slide import IMAGE_SUFFIXES, SLIDE_SUFFIXES, SlideError, find_slides, open_slide
from extract.tiles import Region

FAILED = "failed.csv"
MAX_WORKERS = 8
CPU_BATCH = 16
"""Largest batch on a CPU: larger ones are no faster there, and Ctrl-C waits for the one that is being encoded."""
BATCHES = 3
"""One is filled, one encoded, one waits."""
MAX_WRITING = 2
CHECKING_THREADS = 8
LOCK_WAIT_S = 30.0
POLL_S = 2.0


class OutputError(ProblemsError):
    """The features folder cannot be written to; going on would only fail again. Nothing half-written is left."""


@dataclass
class Summary:
    """What became of the slides, by id. `elsewhere`: in the hands of other processes when this one ended.

    `tiles` were encoded in `seconds`; `encoder_busy` is the fraction of the time between the first batch and the last
    in which the encoder worked.
    """

    done: list[str] = field(default_factory=list)
    already_there: list[str] = field(default_factory=list)
    empty: dict[str, str] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    tiles: int = 0
    seconds: float = 0.0
    encoder_busy: float = 0.0


# --- which slides ----------------------------------------------------------------------------------------------------


def cohort_slides(config: ExtractConfig, cohort: Cohort | None = None) -> list[SlideFile]:
    """The slides to extract: of the cohort (given, or read from the config's CSV), else all of `slides.folder`.

    A path in the CSV may be relative to `slides.folder`, to the CSV's folder or to the working directory. A slide
    without a path is looked for in `slides.folder` by its id, which may carry the file's extension.

    Raises:
        CohortError, SlideFolderError: the CSV or the folder is wrong.
        ConfigError: slides without a file, all listed; or nothing says which slides.
    """
    if cohort is None and config.cohort is not None:
        cohort = read_cohort(config.cohort, config.columns, labelled=False)
    if cohort is None:
        if config.slides.folder is None:
            raise ConfigError("no slides", ["set slides.folder=FOLDER, or cohort=FILE.csv with a path column"])
        found = find_slides(config.slides.folder, leave_out=config.features.folder)
        return [SlideFile(slide, path) for slide, path in found.items()]
    rows = cohort.table[["slide", "path", "mpp"]].itertuples(index=False, name=None)
    slides, problems = [], []
    in_folder: dict[str, Path] = {}
    if config.slides.folder is not None and cohort.table["path"].isna().any():
        in_folder = find_slides(config.slides.folder, leave_out=config.features.folder)
    for slide, path, mpp in rows:
        file = _by_path(config, str(path)) if path else _by_id(str(slide), in_folder)
        if isinstance(file, Path):
            slides.append(SlideFile(str(slide), file, None if np.isnan(mpp) else float(mpp)))
        else:
            problems.append(f"slide {slide!r}: {file}")
    if problems and config.slides.folder is None and cohort.table["path"].isna().any():
        problems.append("name the files in column path of the CSV (columns.path), or set slides.folder=FOLDER")
    if problems:
        raise ConfigError("slides without a file", problems)
    return slides


def _by_path(config: ExtractConfig, path: str) -> Path | str:
    """The file, or why there is none."""
    bases = [config.slides.folder, config.cohort.parent if config.cohort else None, Path()]
    tried = list(dict.fromkeys(base / Path(path).expanduser() for base in bases if base is not None))
    found = next((file for file in tried if file.exists()), None)
    return found or "no file " + " or ".join(str(file) for file in tried)


def _by_id(slide: str, in_folder: dict[str, Path]) -> Path | str:
    stem, dot, suffix = slide.rpartition(".")
    if slide not in in_folder and dot + suffix.lower() in SLIDE_SUFFIXES | IMAGE_SUFFIXES:
        slide = stem
    hint = did_you_mean(slide, list(in_folder))
    return in_folder.get(slide) or f"no path in the CSV and no such file in slides.folder{hint}"


def shard_of(slides: Sequence[SlideFile], shard: str | None) -> list[SlideFile]:
    """Part i of n for `shard="i/n"`: every n-th slide. The parts are disjoint and together all."""
    if shard is None:
        return list(slides)
    part, n_parts = (int(number) for number in shard.split("/"))
    return list(slides[part - 1 :: n_parts])


# --- what a file must agree with -------------------------------------------------------------------------------------


def settings_of(config: ExtractConfig, encoder: FrozenEncoder) -> dict[str, Any]:
    """What two files must have in common to be made alike, by the names under which a file states it."""
    return {
        "encoder": encoder.id,
        "weights_sha256": encoder.weights_sha256,
        "tile_px": encoder.spec.tile_px,
        "mpp": encoder.spec.mpp,
        "features.dtype": config.features.dtype,
    } | _flat(config)


def _flat(config: ExtractConfig) -> dict[str, Any]:
    sections: dict[str, Section] = {"tissue": config.tissue, "tiles": config.tiles}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section}


def differences(header: Header, wanted: dict[str, Any]) -> list[str]:
    """In what a cache file differs from `wanted`, one sentence each. What a file of an older version does not state
    has the default of today's config."""
    stated = dataclasses.asdict(header.provenance) | header.provenance.extra | {"features.dtype": header.dtype}
    defaults = {f"tissue.{k}": v for k, v in Tissue()} | {f"tiles.{k}": v for k, v in Tiles()}
    return [
        f"{key} is {_shown(stated.get(key, defaults.get(key)))}, expected {_shown(value)}"
        for key, value in wanted.items()
        if not _same(stated.get(key, defaults.get(key)), value)
    ]


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float):
        return bool(np.isclose(found, wanted, rtol=1e-6, atol=0))
    return bool(found == wanted)


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}..." if len(text) == 64 else (text or "not stated")


def file_differences(path: Path, file: SlideFile, wanted: dict[str, Any], default_mpp: float | None) -> list[str]:
    """In what an existing cache file differs from what would be made of this slide now; [] if in nothing.

    Raises:
        SlideError: the slide cannot be opened, so its content cannot be compared.
    """
    with open_slide(file.path, file.mpp, default_mpp=default_mpp) as slide:
        wanted = wanted | {"slide_fingerprint": slide.fingerprint, "slide_mpp": slide.mpp}
    try:
        return differences(read_header(path), wanted)
    except CacheError as error:
        return [str(error).removeprefix(f"{path}: ")]


# --- the work --------------------------------------------------------------------------------------------------------


def extract_cohort(
    config: ExtractConfig, slides: Iterable[SlideFile], *, progress: bool = True, wait_for_others: bool = False
) -> Summary:
    """Write the feature files of `slides` that are not there yet into `config.features.folder`.

    Args:
        progress: show a bar on standard error. (Warnings are printed there in any case.)
        wait_for_others: if other processes work on some of the slides, wait until these are done, and do those
            that are given up. Otherwise they are listed in `Summary.elsewhere`.

    Raises:
        ProblemsError: files are there that were made otherwise (all listed; nothing was extracted), or the folder
            cannot be written to.
        EncoderError: the encoder cannot be had.
    """
    if config.features.folder is None:
        raise ConfigError("no features folder", ["set features.folder=FOLDER (or out=FOLDER); features go there"])
    encoder = load_encoder(config.encoder)
    if config.tiles.overlap_px >= encoder.spec.tile_px:
        raise ConfigError(
            "problems in the config",
            [f"tiles.overlap_px={config.tiles.overlap_px}: expected less than the tile, {encoder.spec.tile_px} px"],
        )
    wanted = settings_of(config, encoder)
    todo, there = sort_out(config, shard_of(list(slides), config.extract.shard), wanted)
    summary = Summary(already_there=[file.slide for file in there])
    try:
        with Claims(config.features.folder) as claims:
            tidy_up_after_the_dead(config.features.folder, claims, there)
            if todo:
                _extract(config, encoder, wanted, todo, claims, summary, progress, wait_for_others)
            record_failures(config.features.folder, claims, summary)
    except OSError as error:
        raise _output_error(config.features.folder, error) from error
    return summary


def sort_out(
    config: ExtractConfig, slides: Sequence[SlideFile], wanted: dict[str, Any]
) -> tuple[list[SlideFile], list[SlideFile]]:
    """Slides to do, and slides whose files are there and made alike.

    Raises:
        ProblemsError: files are there that were made otherwise.
    """
    assert config.features.folder is not None
    paths = {file: config.features.folder / f"{file.slide}{SUFFIX}" for file in slides}
    existing = [] if config.extract.overwrite else [file for file in slides if paths[file].exists()]

    def check(file: SlideFile) -> list[str] | None:
        try:
            return file_differences(paths[file], file, wanted, config.slides.mpp)
        except SlideError:
            return None  # to do: it fails then, with its reason

    with ThreadPoolExecutor(CHECKING_THREADS) as threads:
        found = dict(zip(existing, threads.map(check, existing), strict=True))
    problems = [f"{paths[file]}: {'; '.join(different)}" for file, different in found.items() if different]
    if problems:
        advice = "overwrite=true makes them anew, out=FOLDER puts the new ones elsewhere"
        raise ProblemsError(f"features are there that were made otherwise; {advice}", problems)
    there = [file for file, different in found.items() if different == []]
    return [file for file in slides if file not in set(there)], there


def tidy_up_after_the_dead(folder: Path, claims: Claims, there: Sequence[SlideFile]) -> None:
    """Remove what processes that were killed left beside whole files. (What they left of slides that are still to be
    done goes when these are claimed.)"""
    hidden = [path.name for path in folder.glob(".*")]
    files = {file.slide: f"{file.slide}{SUFFIX}" for file in there} | {FAILED: FAILED}  # by the name of their claim
    for claimed, file in files.items() if hidden else ():
        left = any(name.startswith((f".{claimed}.claim", f".{file}.")) for name in hidden)
        if left and claims.take(claimed):
            remove_leftovers(folder, claimed, file)
            claims.release(claimed)


def remove_leftovers(folder: Path, claimed: str, file: str) -> None:
    """Of processes killed while they wrote a file or took its claim over. Only for who holds the claim: nobody else
    writes the file then."""
    for pattern in (f".{glob.escape(file)}.*.partial", f".{glob.escape(claimed)}.claim.*.stale"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _extract(
    config: ExtractConfig,
    encoder: FrozenEncoder,
    wanted: dict[str, Any],
    todo: Sequence[SlideFile],
    claims: Claims,
    summary: Summary,
    progress: bool,
    wait_for_others: bool,
) -> None:
    readers = start_readers(reader_settings(config, encoder), n_workers(config), config.extract.prefetch)
    batches = Batches(encoder, config.extract.batch_size, padded=config.encoder.compile)
    with tqdm(
        total=len(todo) + len(summary.already_there),
        initial=len(summary.already_there),
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total} slides, {elapsed}<{remaining}{postfix}",
    ) as bar:
        extraction = Extraction(config, encoder, wanted, todo, claims, readers, batches, summary, bar)
        try:
            extraction.run(wait_for_others)
        finally:
            readers.close()
            batches.close()
            extraction.writer.shutdown()  # slides whose features are all there are still written
            extraction.collect_written()
            summary.encoder_busy = batches.busy_fraction
            summary.seconds = time.monotonic() - extraction.clock


def reader_settings(config: ExtractConfig, encoder: FrozenEncoder) -> Settings:
    """What the readers must know of the config and the encoder."""
    folder = config.features.folder
    return Settings(
        tile_px=encoder.spec.tile_px,
        mpp=encoder.spec.mpp,
        tissue=config.tissue,
        tiles=config.tiles,
        default_mpp=config.slides.mpp,
        max_bad=config.extract.max_bad_tiles,
        qc_folder=folder / "qc" if folder is not None and config.extract.qc else None,
    )


def n_workers(config: ExtractConfig) -> int:
    """`extract.workers`, by default one less than the cores that this process may use, at least 1 and at most 8."""
    if config.extract.workers is not None:
        return config.extract.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(1, cores - 1))


@dataclass(eq=False)
class Work:
    """A slide between its plan and its file.

    `regions` are still to be read; `left` tiles are still to be encoded; `good_N` are those that have been.
    `features_ND` is in the type that is stored.
    """

    file: SlideFile
    planned: Planned
    regions: deque[Region]
    features_ND: np.ndarray
    good_N: np.ndarray
    left: int
    n_bad: int = 0
    not_finite: int = 0
    given_up: bool = False

    @property
    def empty_reason(self) -> str:
        """ "" if there are features."""
        if self.good_N.any() or not len(self.good_N):
            return self.planned.empty_reason
        return f"none of its {len(self.good_N)} tiles could be decoded"


class Extraction:
    """The main loop: hands out tasks, passes tiles on to the batches, has finished slides written."""

    def __init__(
        self,
        config: ExtractConfig,
        encoder: FrozenEncoder,
        wanted: dict[str, Any],
        todo: Sequence[SlideFile],
        claims: Claims,
        readers: ReaderPool | OwnReader,
        batches: Batches,
        summary: Summary,
        bar: tqdm[Any],
    ):
        assert config.features.folder is not None
        self.config, self.encoder, self.wanted = config, encoder, wanted
        self.folder = config.features.folder
        self.claims, self.readers, self.batches, self.summary, self.bar = claims, readers, batches, summary, bar
        self.todo = deque(todo)
        self.elsewhere: list[SlideFile] = []  # claimed by other processes when it was their turn
        self.planning: set[str] = set()
        self.works: dict[str, Work] = {}  # planned and not finished, in this order
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.writing: deque[tuple[Work, Future[bool]]] = deque()
        self.began = filesystem_now(self.folder)
        self.clock = time.monotonic()

    def run(self, wait_for_others: bool) -> None:
        """All slides that this process can get."""
        self.work_through()
        while self.elsewhere:  # some are done by now, or were given up
            before = len(self.elsewhere)
            self.todo, self.elsewhere = deque(self.elsewhere), []
            self.work_through()
            if len(self.elsewhere) == before:
                if not wait_for_others:
                    break
                time.sleep(POLL_S)
        self.summary.elsewhere = [file.slide for file in self.elsewhere]

    def work_through(self) -> None:
        """Everything in `todo`."""
        self.feed()
        while self.readers.busy or self.works:
            for task, result in self.readers.results():
                self.receive(task, result)
                self.feed()
            if not self.readers.busy:  # no more tiles will come to fill the last batch
                self.batches.flush()
            self.batches.collect(self.deliver, everything=not self.readers.busy)
            self.collect_written(everything=not self.readers.busy)
            self.feed()

    # --- handing out

    def feed(self) -> None:
        """Give the readers as much as they can take: regions of the first slides, and always a next slide to plan."""
        while self.readers.room > 0:
            if self.wants_plan() and (file := self.next_slide()):
                self.planning.add(file.slide)
                self.readers.submit(PlanTask(file))
            elif work := next((work for work in self.works.values() if work.regions), None):
                self.readers.submit(read_task(work.file, work.planned.plan, work.regions.popleft()))
            else:
                return

    def wants_plan(self) -> bool:
        """One slide is planned ahead; more while the regions at hand would not keep the readers busy."""
        untouched = sum(len(work.regions) == len(work.planned.regions) for work in self.works.values())
        if untouched + len(self.planning) == 0:
            return True
        at_hand = sum(len(work.regions) for work in self.works.values())
        return len(self.planning) < self.readers.n_workers and at_hand < self.readers.capacity

    def next_slide(self) -> SlideFile | None:
        """The next slide that is nobody else's, claimed."""
        while self.todo:
            file = self.todo.popleft()
            if not self.claims.take(file.slide):
                self.elsewhere.append(file)
            elif self.made_meanwhile(file):
                self.claims.release(file.slide)
            else:
                remove_leftovers(self.folder, file.slide, f"{file.slide}{SUFFIX}")
                return file
        return None

    def made_meanwhile(self, file: SlideFile) -> bool:
        """Whether another process has done, or spoilt, this slide since this process looked."""
        path = self.path_of(file)
        if not path.exists() or (self.config.extract.overwrite and path.stat().st_mtime < self.began):
            return False
        try:
            different = file_differences(path, file, self.wanted, self.config.slides.mpp)
        except SlideError:
            return False  # planning it will say why
        if different:
            reason = f"{path}: another process wrote it otherwise: {'; '.join(different)}"
            self.fail(Failure(file.slide, "cache", reason))
        else:
            self.summary.already_there.append(file.slide)
            self.bar.update(1)
        return True

    def path_of(self, file: SlideFile) -> Path:
        return self.folder / f"{file.slide}{SUFFIX}"

    # --- taking in

    def receive(self, task: Task, result: Result) -> None:
        """A plan, a region's tiles, or the failure of a slide."""
        slide = task.file.slide
        if isinstance(task, PlanTask):
            self.planning.discard(slide)
        if isinstance(result, Failure):
            if result.errno in OUT_OF_SPACE:  # of a picture for quality control
                raise OSError(result.errno, result.reason)
            if isinstance(task, PlanTask) or slide in self.works:
                self.give_up(slide, result)
        elif isinstance(result, Planned):
            self.begin(task.file, result)
        elif slide in self.works:
            self.take_tiles(self.works[slide], result)

    def begin(self, file: SlideFile, planned: Planned) -> None:
        n_tiles = len(planned.plan)
        features_ND = np.empty((n_tiles, self.encoder.spec.dim), self.config.features.dtype)
        work = Work(file, planned, deque(planned.regions), features_ND, np.zeros(n_tiles, bool), n_tiles)
        self.works[file.slide] = work
        if not n_tiles:
            self.finish(work)

    def take_tiles(self, work: Work, read: TilesRead) -> None:
        work.n_bad += len(read.bad_indices)
        work.left -= len(read.bad_indices)
        allowed = self.config.extract.max_bad_tiles
        if work.n_bad > allowed * len(work.good_N):
            reason = (
                f"{work.file.path}: {work.n_bad} or more of {len(work.good_N)} tiles cannot be decoded, "
                f"extract.max_bad_tiles={allowed:g} allows less"
            )
            self.give_up(work.file.slide, Failure(work.file.slide, "read", reason))
            return
        self.progress(work, len(read.bad_indices))
        self.batches.add(work, read.tiles_KHW3, read.indices_K, self.deliver)
        if not work.left and not work.given_up:
            self.finish(work)

    def deliver(self, work: Work, indices_K: np.ndarray, features_KD: np.ndarray) -> None:
        """Encoded tiles of one slide."""
        if work.given_up:
            return
        with np.errstate(over="ignore"):  # looked for on the next line
            stored_KD = features_KD.astype(work.features_ND.dtype)
        work.not_finite += int((~np.isfinite(stored_KD)).any(axis=1).sum())
        work.features_ND[indices_K] = stored_KD
        work.good_N[indices_K] = True
        work.left -= len(indices_K)
        self.summary.tiles += len(indices_K)
        self.progress(work, len(indices_K))
        if not work.left:
            self.finish(work)

    # --- finishing

    def finish(self, work: Work) -> None:
        """All features of a slide are there: have them written."""
        slide = work.file.slide
        if work.not_finite:
            reason = (
                f"{work.not_finite} tiles have features that are no finite numbers in {work.features_ND.dtype}; "
                "try features.dtype=float32, and encoder.precision=float32 on a GPU"
            )
            self.give_up(slide, Failure(slide, "encode", reason))
            return
        if work.given_up or slide not in self.works:
            return
        del self.works[slide]
        while len(self.writing) >= MAX_WRITING:
            self.collect_written(at_least=1)
        self.writing.append((work, self.writer.submit(self.write, work)))

    def write(self, work: Work) -> bool:
        """In the writer's thread. False if the claim was lost: another process thought this one dead."""
        if not self.claims.holds(work.file.slide):
            return False
        planned, good_N = work.planned, work.good_N
        all_good = bool(good_N.all())
        extra = planned.facts | _flat(self.config) | self.encoder_facts()
        extra |= {"tiles_planned": len(good_N), "tiles_unreadable": work.n_bad}
        spec, plan = self.encoder.spec, planned.plan
        provenance = Provenance(
            encoder=self.encoder.id,
            weights_sha256=self.encoder.weights_sha256,
            tile_px=spec.tile_px,
            mpp=spec.mpp,
            overlap_px=plan.overlap_px,
            tile_level0_px=plan.tile_level0_px,
            slide=work.file.slide,
            slide_fingerprint=planned.fingerprint,
            empty_reason=work.empty_reason,
            extra=extra,
        )
        features_ND = work.features_ND if all_good else work.features_ND[good_N]
        coords_N2 = plan.coords_N2 if all_good else plan.coords_N2[good_N]
        write_features(self.path_of(work.file), features_ND, coords_N2, provenance, dtype=self.config.features.dtype)
        return True

    def encoder_facts(self) -> dict[str, Any]:
        encoder = self.encoder
        precision = "float32" if encoder.dtype is None else str(encoder.dtype).removeprefix("torch.")
        return {
            "encoder_source": encoder.source,
            "encoder_revision": encoder.revision,
            "encoder_licence": encoder.spec.licence,
            "encoder_precision": precision,
        }

    def collect_written(self, everything: bool = True, at_least: int = 0) -> None:
        """Count the slides that have been written; wait for `at_least` so many, or for everything."""
        while self.writing and (everything or at_least > 0 or self.writing[0][1].done()):
            at_least -= 1
            work, future = self.writing.popleft()
            slide = work.file.slide
            if not future.result():
                self.elsewhere.append(work.file)
            elif work.empty_reason:
                self.summary.empty[slide] = work.empty_reason
                self.say(f"warning: {slide}: empty: {work.empty_reason}")
            else:
                self.summary.done.append(slide)
            if not len(work.good_N):
                self.bar.update(1)
            if work.n_bad:
                self.say(f"warning: {slide}: {work.n_bad} of {len(work.good_N)} tiles could not be decoded: left out")
            self.claims.release(slide)

    def give_up(self, slide: str, failure: Failure) -> None:
        """A slide has failed: drop what is left of it and go on."""
        work = self.works.pop(slide, None)
        if work is not None:
            work.given_up = True
            self.bar.update(-(len(work.good_N) - work.left) / max(1, len(work.good_N)))
        self.fail(failure)
        self.claims.release(slide)

    def fail(self, failure: Failure) -> None:
        self.summary.failed.append(failure)
        self.say(f"failed: {failure.slide} ({failure.stage}): {failure.reason}")
        record_failures(self.folder, self.claims, self.summary)
        self.bar.update(1)

    # --- telling

    def progress(self, work: Work, n_tiles: int) -> None:
        rate = self.summary.tiles / max(1e-9, time.monotonic() - self.clock)
        self.bar.set_postfix_str(f"{rate:.0f} tiles/s", refresh=False)
        self.bar.update(n_tiles / max(1, len(work.good_N)))

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)


OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _output_error(folder: Path, error: OSError) -> OutputError:
    what = "no space left" if error.errno in OUT_OF_SPACE else "cannot be written to"
    why = os.strerror(error.errno) if error.errno else str(error)
    rest = "No half file was left and finished slides are kept; run again to continue"
    return OutputError("stopped", [f"{folder}: {what} ({why}). {rest}"])


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Batch:
    """`n` tiles, and whose they are: (work, places in its plan) in the order of the tiles."""

    tiles_BHW3: torch.Tensor
    n: int = 0
    owners: list[tuple[Work, np.ndarray]] = field(default_factory=list)


Deliver = Callable[[Work, np.ndarray, np.ndarray], None]


class Batches:
    """Fills batches with the tiles of whatever slides arrive; a thread encodes one while the next is filled.

    Args:
        padded: always encode whole batches (a compiled network would be compiled anew for every other length).
    """

    def __init__(self, encoder: FrozenEncoder, batch_size: int, *, padded: bool = False):
        on_cpu = encoder.device.type == "cpu"
        self.size = min(batch_size, CPU_BATCH) if on_cpu else batch_size
        self.encoder, self.padded = encoder, padded
        side_px = encoder.spec.tile_px
        shape = (self.size, side_px, side_px, 3)
        pinned = encoder.device.type == "cuda"
        self._spare = [Batch(torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)) for _ in range(BATCHES)]
        self._filling: Batch | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._encoding: deque[tuple[Batch, Future[np.ndarray]]] = deque()
        self._busy_s, self._first_s, self._last_s = 0.0, 0.0, 0.0

    def add(self, work: Work, tiles_KHW3: np.ndarray, indices_K: np.ndarray, deliver: Deliver) -> None:
        """Copy tiles into batches; encode those that are full. Waits when the encoder is behind."""
        while len(tiles_KHW3):
            if self._filling is None:
                self.collect(deliver, at_least=0 if self._spare else 1)
                self._filling = self._spare.pop()
            batch = self._filling
            count = min(self.size - batch.n, len(tiles_KHW3))
            batch.tiles_BHW3.numpy()[batch.n : batch.n + count] = tiles_KHW3[:count]
            batch.owners.append((work, indices_K[:count]))
            batch.n += count
            tiles_KHW3, indices_K = tiles_KHW3[count:], indices_K[count:]
            if batch.n == self.size:
                self.flush()

    def flush(self) -> None:
        """Encode the batch that is being filled, full or not."""
        if self._filling is not None:
            self._encoding.append((self._filling, self._thread.submit(self._encode, self._filling)))
            self._filling = None

    def collect(self, deliver: Deliver, at_least: int = 0, everything: bool = False) -> None:
        """Deliver the features of batches that are done; wait for `at_least` so many, or for everything."""
        while self._encoding and (everything or at_least > 0 or self._encoding[0][1].done()):
            at_least -= 1
            batch, future = self._encoding.popleft()
            features_BD = future.result()
            start = 0
            for work, indices_K in batch.owners:
                deliver(work, indices_K, features_BD[start : start + len(indices_K)])
                start += len(indices_K)
            batch.n, batch.owners = 0, []
            self._spare.append(batch)

    def close(self) -> None:
        """Wait for the batch in work; the others are given up."""
        self._thread.shutdown(cancel_futures=True)

    @property
    def busy_fraction(self) -> float:
        """Time spent encoding / time from the first batch's start to the last one's end."""
        return self._busy_s / max(1e-9, self._last_s - self._first_s)

    def _encode(self, batch: Batch) -> np.ndarray:
        began = time.monotonic()
        self._first_s = self._first_s or began
        n = self.size if self.padded else batch.n
        try:
            features_BD = self.encoder.encode(batch.tiles_BHW3[:n])[: batch.n].numpy()
        except torch.OutOfMemoryError as error:
            raise EncoderError(
                f"the GPU's memory does not hold a batch of {self.size} tiles; set extract.batch_size lower ({error})"
            ) from None
        self._last_s = time.monotonic()
        self._busy_s += self._last_s - began
        return features_BD


# --- failures --------------------------------------------------------------------------------------------------------


def record_failures(folder: Path, claims: Claims, summary: Summary) -> None:
    """Bring `failed.csv` (slide, stage, reason) up to date: one row a slide that failed when it was last tried.

    Processes that share the folder take turns. The file goes when nothing is left in it.
    """
    path = folder / FAILED
    if not summary.failed and not path.exists():
        return
    until = time.monotonic() + LOCK_WAIT_S
    while not (locked := claims.take(FAILED)) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        settled = {*summary.done, *summary.already_there, *summary.empty}
        rows = {row["slide"]: row for row in _read_rows(path) if row["slide"] not in settled}
        rows |= {f.slide: {"slide": f.slide, "stage": f.stage, "reason": f.reason} for f in summary.failed}
        if not rows:
            path.unlink(missing_ok=True)
            return
        with replace_on_success(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["slide", "stage", "reason"])
            writer.writeheader()
            writer.writerows(rows[slide] for slide in sorted(rows))
    finally:
        if locked:
            claims.release(FAILED)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if {"slide", "stage", "reason"} <= row.keys()]
