"""Cohort -> cache: one process's share of the work, from the list of slides to one feature file each.

Readers (see `extract.extraction.readers`) deliver tiles of whatever slides they are at; tiles fill batches across
slides; a thread encodes one batch while the next is filled; another writes a slide's file when its last feature is
there. Memory holds the tiles in flight and the features of the slides in work, no pixels beyond that.

Axes: N tiles of a slide, K tiles that arrive together, B tiles of a batch, D features, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from extract.config import ConfigError, ExtractConfig, ProblemsError
from extract.encoders.frozen import FrozenEncoder, load_encoder
from extract.ending import OUT_OF_SPACE
from extract.extraction.batches import Batches, Work
from extract.extraction.claims import Claims, Holding
from extract.extraction.readers import (
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
from extract.extraction.staging import Staging
from extract.extraction.summary import Progress, Summary, record_failures, remove_leftovers, tidy_up_after_the_dead
from extract.extraction.tile_pictures import forget, masks_of, without_masks, without_pictures
from extract.extraction.todo import (
    file_differences,
    rules_to_state,
    settings_of,
    shard_of,
    sort_out,
    tile_mpp,
    with_coords,
    with_regions,
)
from extract.features.cache import SUFFIX, Provenance, write_features
from extract.owners import refuse_anothers
from extract.slides.errors import SlideError
from extract.stores.looking import is_written_now
from extract.stores.sessions import bring_one
from extract.wording import at_most

MAX_WORKERS = 8

MAX_WRITING = 2

POLL_S = 2.0


class OutputError(ProblemsError):
    """The features folder cannot be written to; going on would only fail again. Nothing half-written is left."""


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
    asked = asked_for(config, slides)
    folder, summary = asked.folder, asked.summary()
    try:
        with Claims(folder) as claims:
            tidy_up_after_the_dead(folder, claims, asked.there)
            if asked.todo:
                _extract(config, asked.encoder, asked.wanted, asked.todo, claims, summary, progress, wait_for_others)
            record_failures(folder, claims, summary)
    except OSError as error:
        raise output_error(folder, error) from error
    return summary


def extract_share(
    config: ExtractConfig,
    encoder: FrozenEncoder,
    wanted: dict[str, Any],
    todo: Sequence[SlideFile],
    *,
    wait_for_others: bool = False,
) -> Summary:
    """What `extract_cohort` does after it has looked round, without a bar: one process of several.

    Raises:
        OutputError: the folder cannot be written to.
    """
    assert config.features.folder is not None
    summary = Summary()
    try:
        with Claims(config.features.folder) as claims:
            _extract(config, encoder, wanted, todo, claims, summary, False, wait_for_others)
    except OSError as error:
        raise output_error(config.features.folder, error) from error
    return summary


@dataclass(frozen=True)
class Asked:
    """What a config asks for: slides to do, those whose files are there, and what a file must state (`settings_of`)."""

    folder: Path
    encoder: FrozenEncoder
    wanted: dict[str, Any]
    todo: list[SlideFile]
    there: list[SlideFile]

    def summary(self) -> Summary:
        """Before any slide was done."""
        return Summary(already_there=[file.slide for file in self.there])


def asked_for(config: ExtractConfig, slides: Iterable[SlideFile]) -> Asked:
    """What is to do; nothing was extracted or written.

    Raises:
        ProblemsError, EncoderError: as `extract_cohort` says.
    """
    if config.features.folder is None:
        raise ConfigError("no features folder", ["set features.folder=FOLDER (or out=FOLDER); features go there"])
    if config.features.more:
        raise ConfigError("several feature folders", ["features.folder: extraction writes into one; give one folder"])
    refuse_anothers(config.features.folder, "extract.run")  # also where another command has it extracted
    encoder = load_encoder(config.encoder)
    if config.tiles.overlap_px >= encoder.spec.tile_px:
        raise ConfigError(
            "problems in the config",
            [f"tiles.overlap_px={config.tiles.overlap_px}: expected less than the tile, {encoder.spec.tile_px} px"],
        )
    wanted = settings_of(config, encoder)
    if isinstance(config.tiles.mpp, list):
        raise ConfigError("several magnifications", ["tiles.mpp: give one; extract.run makes folders of several"])
    files = with_coords(config, with_regions(config, shard_of(list(slides), config.extract.shard)))
    todo, there = sort_out(config, files, wanted)
    names = [file.slide for file in there]
    if config.tiles.save != "none":
        _tell_of_absent("tiles.save", "tiles are", without_pictures(config.features.folder, names))
    if config.tissue.save != "none":
        _tell_of_absent("tissue.save", "masks are", without_masks(config.features.folder, names))
    return Asked(config.features.folder, encoder, wanted, todo, there)


def _tell_of_absent(key: str, what: str, slides: Sequence[str]) -> None:
    if slides:
        print(
            f"note: {key}: {len(slides)} slides have features already, and no {what} saved of them "
            f"({', '.join(at_most(slides, 5))}); overwrite=true makes both",
            file=sys.stderr,
        )


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
            extraction.staging.close()
            batches.close()
            extraction.forget_pictures()
            extraction.writer.shutdown()  # slides whose features are all there are still written
            extraction.collect_written()
            summary.encoder_busy, summary.device = batches.busy_fraction, encoder.device.type
            summary.seconds = time.monotonic() - extraction.clock
            summary.readers_busy = min(1.0, readers.busy_s / max(1e-9, readers.n_workers * summary.seconds))


def reader_settings(config: ExtractConfig, encoder: FrozenEncoder) -> Settings:
    """What the readers must know of the config and the encoder."""
    folder = config.features.folder
    return Settings(
        tile_px=encoder.spec.tile_px,
        mpp=tile_mpp(config, encoder),
        tissue=config.tissue,
        tiles=config.tiles,
        default_mpp=config.slides.mpp,
        how=config.slides.reader,
        max_bad=config.extract.max_bad_tiles,
        qc_folder=folder / "qc" if folder is not None and config.extract.qc else None,
        features_folder=folder if config.tiles.save != "none" else None,
        mask_folder=masks_of(folder) if folder is not None and config.tissue.save == "geojson" else None,
    )


def encoder_facts(encoder: FrozenEncoder) -> dict[str, Any]:
    """What a feature file says of the encoder besides its id and the weights' hash."""
    precision = "float32" if encoder.dtype is None else str(encoder.dtype).removeprefix("torch.")
    return {
        "encoder_source": encoder.source,
        "encoder_revision": encoder.revision,
        "encoder_licence": encoder.spec.licence,
        "encoder_precision": precision,
    }


def n_workers(config: ExtractConfig) -> int:
    """`extract.workers`, by default one less than the cores that this process may use, at least 1 and at most 8."""
    if config.extract.workers is not None:
        return config.extract.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(1, cores - 1))


class Extraction:
    """The main loop: hands out tasks, passes tiles on to the batches, has finished slides written."""

    def __init__(
        self,
        config: ExtractConfig,
        encoder: FrozenEncoder,
        wanted: dict[str, Any],
        todo: Sequence[SlideFile],
        claims: Holding,
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
        self.counted = Progress(bar)
        self.before = {file.slide: identity(self.path_of(file)) for file in todo}  # (clocks may be set back)
        self.clock = time.monotonic()
        self.begun: set[str] = set()  # slides whose tiles are saved
        self.staging = Staging(config.slides, self.next_slide, self.give_up)

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
        while self.readers.busy or self.works or self.staging.busy:
            for task, result in self.readers.results():
                self.receive(task, result)
                self.feed()
            if not self.readers.busy:  # no more tiles will come to fill the last batch
                self.batches.flush()
            self.batches.collect(self.deliver, everything=not self.readers.busy)
            self.collect_written(everything=not self.readers.busy)
            self.feed()
            if not self.readers.busy:
                self.staging.wait()

    # --- handing out

    def feed(self) -> None:
        """Give the readers as much as they can take: regions of the first slides, and always a next slide to plan."""
        while self.readers.room > 0:
            if self.wants_plan() and (file := self.staging.next()):
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
        if not is_written_now(path) or (
            self.config.extract.overwrite and identity(path) == self.before.get(file.slide)
        ):
            return False
        bring_one(path)
        try:
            different = file_differences(path, file, self.wanted, self.config)
        except SlideError:
            return False  # planning it will say why
        if different:
            reason = f"{path}: another process wrote it otherwise: {'; '.join(different)}"
            self.fail(Failure(file.slide, "cache", reason))
        else:
            self.summary.already_there.append(file.slide)
            self.counted.add_slide(file.slide)
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
        if self.config.tiles.save != "none":
            forget(self.folder, file.slide)
            self.begun.add(file.slide)
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
        extra = planned.facts | rules_to_state(self.config) | encoder_facts(self.encoder)
        extra |= {"tiles_planned": len(good_N), "tiles_unreadable": work.n_bad}
        spec, plan = self.encoder.spec, planned.plan
        provenance = Provenance(
            encoder=self.encoder.id,
            weights_sha256=self.encoder.weights_sha256,
            tile_px=spec.tile_px,
            mpp=plan.mpp,
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

    def collect_written(self, everything: bool = True, at_least: int = 0) -> None:
        """Count the slides that have been written; wait for `at_least` so many, or for everything."""
        while self.writing and (everything or at_least > 0 or self.writing[0][1].done()):
            at_least -= 1
            work, future = self.writing.popleft()
            slide = work.file.slide
            original = self.staging.original(work.file)
            self.staging.release(slide)
            if not future.result():
                self.elsewhere.append(original)
            elif work.empty_reason:
                self.summary.empty[slide] = work.empty_reason
                self.say(f"warning: {slide}: empty: {work.empty_reason}")
            else:
                self.summary.done.append(slide)
            if not len(work.good_N):
                self.counted.add_slide(slide)
            if work.n_bad:
                self.say(f"warning: {slide}: {work.n_bad} of {len(work.good_N)} tiles could not be decoded: left out")
            self.claims.release(slide)

    def give_up(self, slide: str, failure: Failure) -> None:
        """A slide has failed: drop what is left of it and go on."""
        work = self.works.pop(slide, None)
        if work is not None:
            work.given_up = True
        self.fail(dataclasses.replace(failure, reason=self.staging.in_words(slide, failure.reason)))
        self.staging.release(slide, read=False)
        self.claims.release(slide)

    def forget_pictures(self) -> None:
        """Saved tiles of slides that failed, when no reader saves any more."""
        for failure in self.summary.failed:
            if failure.slide in self.begun:
                forget(self.folder, failure.slide)

    def fail(self, failure: Failure) -> None:
        self.summary.failed.append(failure)
        self.say(failure.said)
        record_failures(self.folder, self.claims, self.summary)
        self.counted.add_slide(failure.slide)

    # --- telling

    def progress(self, work: Work, n_tiles: int) -> None:
        rate = self.summary.tiles / max(1e-9, time.monotonic() - self.clock)
        self.bar.set_postfix_str(f"{rate:.0f} tiles/s", refresh=False)
        self.counted.add_tiles(work.file.slide, n_tiles, len(work.good_N))

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)


def identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, None if there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def output_error(folder: Path, error: OSError) -> OutputError:
    """What a disk that refuses to be written to is called here."""
    what = "no space left" if error.errno in OUT_OF_SPACE else "cannot be written to"
    why = os.strerror(error.errno) if error.errno else str(error)
    rest = "No half file was left and finished slides are kept; run again to continue"
    return OutputError("stopped", [f"{folder}: {what} ({why}). {rest}"])
