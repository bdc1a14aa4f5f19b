"""Reader processes: slides in, tile plans and uint8 tiles out. One pool serves the whole cohort.

The main process hands out tasks, "plan this slide" and "read this region", and gets results in whatever order they are
done, so several readers work on one slide and the next slide is planned while the current one is read. Tiles travel
through shared memory that is set aside once: memory does not grow with the slides. A reader that dies takes down
the slide it was busy with and nothing else.

Readers are started afresh (not forked), import no torch, and end by themselves when the main process is gone.
Axes: N tiles of a slide, K tiles of a region, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import signal
import sys
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from extract.config import Tiles, Tissue
from extract.digest import sha256_of_file
from extract.extraction.tile_pictures import folder_of, mask_file, save
from extract.features.errors import CacheError
from extract.outlines.geojson import region_feature, write_collection
from extract.slides.coarse import chosen_by, selected
from extract.slides.errors import SlideError
from extract.slides.given import plan_given, thinned
from extract.slides.regions import RegionsError, digest_of, outlines_of, read_regions
from extract.slides.slide import OPENSLIDE, How, Slide, Thumbnail, open_slide
from extract.slides.tiles import (
    GeometryError,
    Region,
    TilePlan,
    group_into_regions,
    plan_tiles,
    read_tiles,
    shrunk_by_decoder,
    tiles_per_region,
)
from extract.slides.tissue import TissueMask, find_tissue, overview_picture

OPEN_SLIDES = 2
"""A reader keeps the slide that is read and the next one open."""
READY = "ready"
STOPPING = (signal.SIGINT, signal.SIGTERM)
MAGNIFICATION_MICRONS = 10.0
MASK_COLOUR = (0, 160, 60)
"""A 10x objective conventionally means 1 micron per pixel; other tools' caches state magnifications."""


# --- what goes to a reader and what comes back -----------------------------------------------------------------------


@dataclass(frozen=True)
class SlideFile:
    """A slide to extract: its id, its file, and microns per level-0 pixel if the cohort CSV states them."""

    slide: str
    path: Path
    mpp: float | None = None
    regions: Path | None = None
    coords: Path | None = None


@dataclass(frozen=True)
class Settings:
    """What all slides of a run have in common. `tile_px` and `mpp` are the encoder's; `max_bad` is a fraction."""

    tile_px: int
    mpp: float
    tissue: Tissue
    tiles: Tiles
    default_mpp: float | None = None
    how: How = "auto"
    max_bad: float = 0.1
    qc_folder: Path | None = None
    mask_folder: Path | None = None
    features_folder: Path | None = None


@dataclass(frozen=True)
class PlanTask:
    """Find the tissue of a slide and lay its tiles."""

    file: SlideFile


@dataclass(frozen=True)
class ReadTask:
    """Read a region. `plan` and `region` hold only its K tiles; `indices_K` are their places in the slide's plan."""

    file: SlideFile
    plan: TilePlan
    region: Region
    indices_K: np.ndarray


Task = PlanTask | ReadTask


@dataclass(frozen=True)
class Planned:
    """A slide's tiles and regions. `facts` go into the cache file; `empty_reason` says why there is no tile."""

    plan: TilePlan
    regions: list[Region]
    fingerprint: str
    facts: dict[str, Any]
    empty_reason: str


@dataclass(frozen=True)
class TilesRead:
    """The readable tiles of a region, valid until the next result is asked for, and the places of all in the plan."""

    tiles_KHW3: np.ndarray
    indices_K: np.ndarray
    bad_indices: np.ndarray


@dataclass(frozen=True)
class Failure:
    """Why a slide cannot be extracted. `errno` is that of an operating system error, else 0."""

    slide: str
    stage: str
    reason: str
    errno: int = 0

    @property
    def said(self) -> str:
        """What is printed of it."""
        return f"failed: {self.slide} ({self.stage}): {self.reason}"


Result = Planned | TilesRead | Failure


class ReaderError(Exception):
    """Reader processes cannot be started at all."""


def read_task(file: SlideFile, plan: TilePlan, region: Region) -> ReadTask:
    """The task of reading one region, without the rest of the plan."""
    indices_K = region.indices_K
    part = replace(
        plan,
        coords_N2=plan.coords_N2[indices_K],
        level_coords_N2=plan.level_coords_N2[indices_K],
        tissue_N=plan.tissue_N[indices_K],
    )
    return ReadTask(file, part, replace(region, indices_K=np.arange(len(indices_K))), indices_K)


# --- the work itself -------------------------------------------------------------------------------------------------


class Reader:
    """Does tasks, in whichever process it is made. Keeps the last slides open."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.stage = ""
        self._slides: OrderedDict[SlideFile, Slide] = OrderedDict()

    def do(self, task: Task, into_KHW3: np.ndarray | None = None) -> Result:
        """The task's result. Whatever a slide provokes is a `Failure` of that slide, so that the others go on."""
        try:
            self.stage = "open"
            slide = self._open(task.file)
            return self._plan(slide, task) if isinstance(task, PlanTask) else self._read(slide, task, into_KHW3)
        except (SlideError, GeometryError) as error:
            return Failure(task.file.slide, self.stage, str(error))
        except RegionsError as error:
            return Failure(task.file.slide, "regions", "; ".join(error.problems))
        except CacheError as error:
            return Failure(task.file.slide, self.stage, str(error))
        except Exception as error:  # noqa: BLE001 - damaged files make codecs raise anything; it is reported, see above
            return Failure(task.file.slide, self.stage, _unexpected(error), getattr(error, "errno", 0) or 0)

    def close(self) -> None:
        for slide in self._slides.values():
            slide.close()
        self._slides.clear()

    def _open(self, file: SlideFile) -> Slide:
        if file not in self._slides:
            self._slides[file] = open_slide(
                file.path, file.mpp, default_mpp=self.settings.default_mpp, how=self.settings.how
            )
        self._slides.move_to_end(file)
        while len(self._slides) > OPEN_SLIDES:
            self._slides.popitem(last=False)[1].close()
        return self._slides[file]

    def _plan(self, slide: Slide, task: PlanTask) -> Result:
        settings = self.settings
        self.stage = "tissue"
        if task.file.coords is not None:
            return self._plan_given(slide, task.file, task.file.coords)
        thumbnail = slide.thumbnail(settings.tissue.mpp)
        if thumbnail.unreadable > settings.max_bad:
            reason = (
                f"{slide.path}: {thumbnail.unreadable:.1%} of its area cannot be decoded, "
                f"extract.max_bad_tiles={settings.max_bad:g} allows less"
            )
            return Failure(task.file.slide, self.stage, reason)
        tissue = _tissue_of(slide, task.file, thumbnail, settings.tissue)
        if settings.mask_folder is not None:
            _save_mask(mask_file(settings.mask_folder, task.file.slide), tissue, slide.mpp)
        self.stage = "tiles"
        plan = plan_tiles(slide.geometry, tissue, tile_px=settings.tile_px, mpp=settings.mpp, section=settings.tiles)
        n_before = len(plan)
        if settings.tiles.select is not None:
            self.stage = "select"
            plan = selected(slide, plan, settings.tiles, task.file.slide)
        plan = shrunk_by_decoder(self._at_most(plan, task.file.slide), slide)
        if settings.qc_folder is not None:
            self.stage = "qc"
            _save_overview(settings.qc_folder, task.file.slide, slide, thumbnail, tissue, plan)
        facts = facts_of(slide, plan) | {"unreadable_area": thumbnail.unreadable}
        facts |= {"regions_sha256": digest_of(task.file.regions, settings.tissue), "tissue_fraction": tissue.fraction}
        facts |= {"tissue_saturation": tissue.threshold}
        if settings.tiles.select is not None:
            facts |= {"tiles_chosen_by": chosen_by(settings.tiles), "tiles_before_choice": n_before}
        return Planned(
            plan, group_into_regions(plan), slide.fingerprint, facts, why_empty(plan, tissue, settings.tiles)
        )

    def _plan_given(self, slide: Slide, file: SlideFile, coords: Path) -> Planned:
        """Tiles where a file says, whatever is there; no tissue is looked for."""
        from extract.features.given import read_given  # with h5py, which other readers do without

        self.stage = "coordinates"
        given = read_given(coords)
        side = given.side_level0_px
        if given.level >= len(slide.level_downsamples):
            raise GeometryError(f"{coords}: tiles of level {given.level}, which {slide.path.name} does not have")
        if given.level >= 0:
            side = given.side_px * slide.level_downsamples[given.level]
        settings = self.settings
        plan = plan_given(
            slide.geometry, given.coords_N2, side, tile_px=settings.tile_px, mpp=settings.mpp, section=settings.tiles
        )
        plan = shrunk_by_decoder(self._at_most(plan, file.slide), slide)
        facts = facts_of(slide, plan) | {"coords_sha256": sha256_of_file(coords)}
        reason = "" if len(plan) else f"no coordinates in {coords.name}"
        return Planned(plan, group_into_regions(plan), slide.fingerprint, facts, reason)

    def _at_most(self, plan: TilePlan, slide: str) -> TilePlan:
        section = self.settings.tiles
        return thinned(plan, section.max, section.seed, slide) if section.max else plan

    def _read(self, slide: Slide, task: ReadTask, into_KHW3: np.ndarray | None) -> TilesRead:
        self.stage = "read"
        tiles_KHW3, good, bad = read_tiles(slide, task.plan, task.region, into_KHW3)
        if self.settings.features_folder is not None:
            self.stage = "save"
            folder = folder_of(self.settings.features_folder, task.file.slide)
            save(folder, self.settings.tiles.save, tiles_KHW3, task.plan.coords_N2[good])
        return TilesRead(tiles_KHW3, task.indices_K[good], task.indices_K[bad])


def _tissue_of(slide: Slide, file: SlideFile, thumbnail: Thumbnail, section: Tissue) -> TissueMask:
    """The tissue inside the slide's regions, where it has a file of them."""
    if file.regions is None:
        return find_tissue(thumbnail.image_HW3, thumbnail.mpp, section)
    shape_HW = thumbnail.image_HW3.shape[:2]
    regions = read_regions(file.regions, slide.geometry, (shape_HW[0], shape_HW[1]), thumbnail.mpp, section)
    if section.method == "regions":
        return regions.alone(thumbnail.mpp)
    return regions.limit(find_tissue(thumbnail.image_HW3, thumbnail.mpp, section))


def _save_mask(path: Path, tissue: TissueMask, slide_mpp: float) -> None:
    """The tissue as annotations of class "tissue", which `tissue.regions` reads back."""
    pieces = outlines_of(tissue, slide_mpp)
    write_collection(path, [region_feature(piece, "tissue", MASK_COLOUR, {}, locked=False) for piece in pieces])


def facts_of(slide: Slide, plan: TilePlan) -> dict[str, Any]:
    """What a cache file says about the slide and its tiles besides what `Provenance` names."""
    return {
        "slide_file": slide.path.name,
        "slide_mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "level0_width": slide.width,
        "level0_height": slide.height,
        "level0_magnification": round(MAGNIFICATION_MICRONS / slide.mpp, 2),
        "target_magnification": round(MAGNIFICATION_MICRONS / plan.mpp, 2),
        "level": plan.level,
        "read_px": plan.read_px,
        "true_mpp": plan.true_mpp,
        "decoder": slide.decoder(plan.level),
        "openslide": OPENSLIDE,
    }


def why_empty(plan: TilePlan, tissue: TissueMask, section: Tiles) -> str:
    """ "" if there are tiles."""
    if len(plan) or tissue.empty_reason:
        return tissue.empty_reason if not len(plan) else ""
    return (
        f"no tile of {plan.tile_px} px at {plan.mpp:g} microns per pixel has tiles.min_tissue="
        f"{section.min_tissue:g} of tissue; the slide has {tissue.area_mm2:.3f} mm2 of it"
    )


def _save_overview(
    folder: Path, name: str, slide: Slide, thumbnail: Thumbnail, tissue: TissueMask, plan: TilePlan
) -> None:
    from extract.whole import write_whole

    said = f"{name}: {slide.width} x {slide.height} px, {slide.mpp:g} microns per pixel ({slide.mpp_source})"
    picture = overview_picture(
        thumbnail.image_HW3, tissue, plan.coords_N2, plan.tile_level0_px, slide.mpp, lines=[said]
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_whole(folder / f"{name}.png", buffer.getvalue())


def _unexpected(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


# --- in this process -------------------------------------------------------------------------------------------------


class OwnReader:
    """`workers=0`: the tasks are done in the main process when their results are asked for."""

    def __init__(self, settings: Settings):
        self.reader = Reader(settings)
        self._tasks: deque[Task] = deque()
        self.busy_s = 0.0

    @property
    def room(self) -> int:
        return 1 - len(self._tasks)

    @property
    def capacity(self) -> int:
        return 1

    @property
    def n_workers(self) -> int:
        return 1

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def results(self) -> Iterator[tuple[Task, Result]]:
        """See `ReaderPool.results`."""
        while self._tasks:
            task, began = self._tasks.popleft(), time.monotonic()
            result = self.reader.do(task)
            self.busy_s += time.monotonic() - began
            yield task, result

    def close(self) -> None:
        self.reader.close()


# --- in other processes ----------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    """One reader process and what it has been given, in order: it answers in that order."""

    process: Any
    connection: Connection
    given: deque[tuple[Task, int]]
    ready: bool = False


class ReaderPool:
    """`n_workers` reader processes with up to `prefetch` tasks each.

    Shared memory holds one region's tiles for every task in flight.
    """

    def __init__(self, settings: Settings, n_workers: int, prefetch: int):
        self.settings, self.n_workers, self.prefetch = settings, n_workers, prefetch
        self._context = multiprocessing.get_context("spawn")
        shape = slots_shape(settings, n_workers * prefetch)
        self._memory = self._context.RawArray(ctypes.c_uint8, int(np.prod(shape)))
        self._slots_SKHW3 = np.frombuffer(memoryview(self._memory), np.uint8).reshape(shape)
        self._free = list(range(len(self._slots_SKHW3)))
        self.busy_s = 0.0  # of all readers together
        self._workers = [self._start() for _ in range(n_workers)]

    @property
    def capacity(self) -> int:
        """How many tasks can be in flight."""
        return self.n_workers * self.prefetch

    @property
    def room(self) -> int:
        """How many tasks can be submitted now."""
        return min(len(self._free), sum(self.prefetch - len(worker.given) for worker in self._workers))

    @property
    def busy(self) -> bool:
        """Whether results are to come."""
        return any(worker.given for worker in self._workers)

    def submit(self, task: Task) -> None:
        """Give a task to the reader with the fewest. Only if there is `room`."""
        worker = min(self._workers, key=lambda w: len(w.given))
        self._give(worker, task, self._free.pop())

    def results(self) -> Iterator[tuple[Task, Result]]:
        """Wait for at least one result, then give all that are there; none if no task is in flight.

        Raises:
            ReaderError: a reader ended before it was ready.
        """
        while self.busy:
            ready = wait([worker.connection for worker in self._workers])
            arrived = False
            for worker in [w for w in self._workers if w.connection in ready]:
                for task, slot, result in self._receive(worker):
                    arrived = True
                    yield task, result
                    self._free.append(slot)
            if arrived:
                return

    def close(self) -> None:
        """End the readers; what they are doing is given up."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(2)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers = []

    def _receive(self, worker: _Worker) -> Iterator[tuple[Task, int, Result]]:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # it died, perhaps in the middle of a message
            yield from self._replace(worker)
            return
        if message == READY:
            worker.ready = True
            return
        seconds, message = message
        self.busy_s += seconds
        task, slot = worker.given.popleft()
        if isinstance(message, TilesRead):  # the tiles are in the shared memory
            message = replace(message, tiles_KHW3=self._slots_SKHW3[slot, : len(message.indices_K)])
        yield task, slot, message

    def _replace(self, worker: _Worker) -> Iterator[tuple[Task, int, Result]]:
        """Blame the task that the dead reader was doing; give its other tasks to a new one."""
        worker.process.join()
        how = _how_it_ended(worker.process.exitcode)
        if not worker.ready:
            raise ReaderError(
                f"a reader process {how} before it was ready; its message is above. workers=0 reads in the main process"
            )
        worker.connection.close()
        given = list(worker.given)
        place = self._workers.index(worker)
        self._workers[place] = self._start()
        if not given:
            return
        culprit, slot = given[0]
        for task, its_slot in given[1:]:
            if task.file == culprit.file:
                self._free.append(its_slot)  # the slide has failed: nobody waits for this
            else:
                self._give(self._workers[place], task, its_slot)
        yield culprit, slot, _died(culprit, how)

    def _give(self, worker: _Worker, task: Task, slot: int) -> None:
        worker.given.append((task, slot))
        try:
            worker.connection.send((task, slot))
        except (BrokenPipeError, ConnectionResetError):
            return  # it is dead, which the next `results` finds out

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve,
            args=(theirs, self._memory, self.settings, len(self._slots_SKHW3)),
            name="slide reader",
            daemon=True,
        )
        # Ctrl-C reaches all processes of a terminal, a scheduler's SIGTERM all of a job. Readers must not react, not
        # even while they start: signals that are blocked stay so in a new process. They end with the main process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING) if hasattr(signal, "pthread_sigmask") else ()
        try:
            with without_main_module():
                process.start()
        finally:
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return _Worker(process, ours, deque())


def start_readers(settings: Settings, n_workers: int, prefetch: int) -> ReaderPool | OwnReader:
    """A pool, or for 0 workers a reader in this process."""
    return ReaderPool(settings, n_workers, prefetch) if n_workers else OwnReader(settings)


def slots_shape(settings: Settings, n_slots: int) -> tuple[int, int, int, int, int]:
    """(slots, K, H, W, 3) of the shared memory: room for one region's tiles a slot."""
    return (n_slots, tiles_per_region(settings.tile_px), settings.tile_px, settings.tile_px, 3)


@contextmanager
def without_main_module() -> Iterator[None]:
    """For starting a process: spawn would import the program's main file again in it. Readers need nothing of that; it
    may import torch, 700 MB a reader, or be a script that starts an extraction without asking for its `__name__`."""
    main = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _serve(connection: Connection, memory: Any, settings: Settings, n_slots: int) -> None:
    """The life of a reader process."""
    for stopping in STOPPING:
        signal.signal(stopping, signal.SIG_IGN)
    cv2.setNumThreads(1)  # there is one reader a core already
    slots_SKHW3 = np.frombuffer(memory, np.uint8).reshape(slots_shape(settings, n_slots))
    reader = Reader(settings)
    nothing_KHW3 = np.empty((0, settings.tile_px, settings.tile_px, 3), np.uint8)
    try:
        connection.send(READY)
        while True:
            task, slot = connection.recv()
            began = time.monotonic()
            result = reader.do(task, slots_SKHW3[slot])
            if isinstance(result, TilesRead):
                result = replace(result, tiles_KHW3=nothing_KHW3)
            connection.send((time.monotonic() - began, result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        reader.close()  # the main process has no more work, or is gone


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            return f"died ({signal.Signals(-exitcode).name})"
        except ValueError:
            return f"died (signal {-exitcode})"
    return f"ended (exit code {exitcode})"


def _died(task: Task, how: str) -> Failure:
    if isinstance(task, PlanTask):
        stage, doing = "plan", "finding its tissue"
    else:
        region = task.region
        place = f"{region.width_px} x {region.height_px} px at ({region.x_px}, {region.y_px})"
        stage, doing = "read", f"reading level {task.plan.level}, {place}"
    reason = f"{task.file.path}: its reader process {how} while {doing}: its decoder crashed, or memory ran out"
    return Failure(task.file.slide, stage, reason)
