"""Reader processes: the same results as reading in place, in shared memory; what dies takes down one slide only."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from extract.config import Tiles, Tissue
from extract.extraction import readers
from extract.extraction.readers import (
    Failure,
    OwnReader,
    Planned,
    PlanTask,
    Reader,
    ReaderError,
    ReaderPool,
    Settings,
    SlideFile,
    TilesRead,
    read_task,
    start_readers,
)
from extract.slides.slide import open_slide
from extract.slides.tiles import read_tile, tiles_per_region

TILE_PX = 64
SETTINGS = Settings(TILE_PX, 0.5, Tissue(), Tiles())


@pytest.fixture
def files(slides, tmp_path: Path) -> list[SlideFile]:
    for number in range(3):
        slides.painted_slide(tmp_path / f"s{number}.tiff", 901 + 64 * number, 703, seed=number)
    return [SlideFile(f"s{number}", tmp_path / f"s{number}.tiff") for number in range(3)]


@pytest.fixture
def pool() -> Iterator[Callable[..., ReaderPool]]:
    made = []

    def make(settings: Settings = SETTINGS, n_workers: int = 2, prefetch: int = 2) -> ReaderPool:
        made.append(ReaderPool(settings, n_workers, prefetch))
        return made[-1]

    yield make
    for each in made:
        each.close()


def read_all(reader: ReaderPool | OwnReader, files: list[SlideFile]) -> dict[str, dict[int, np.ndarray]]:
    """Tiles by slide and index; at most `capacity` tasks are ever in flight."""
    tasks: deque = deque(PlanTask(file) for file in files)
    tiles: dict[str, dict[int, np.ndarray]] = {file.slide: {} for file in files}
    while tasks or reader.busy:
        while tasks and reader.room:
            reader.submit(tasks.popleft())
        assert 0 <= reader.room < reader.capacity
        for task, result in reader.results():
            if isinstance(result, Planned):
                tasks.extend(read_task(task.file, result.plan, region) for region in result.regions)
            else:
                assert isinstance(result, TilesRead)
                new = dict(zip(result.indices_K.tolist(), result.tiles_KHW3.copy(), strict=True))
                assert not new.keys() & tiles[task.file.slide].keys()
                tiles[task.file.slide] |= new
    return tiles


def test_a_pool_reads_what_reading_tile_by_tile_gives(files, pool):
    found = read_all(pool(), files)
    for file in files:
        with open_slide(file.path) as slide:
            planned = Reader(SETTINGS).do(PlanTask(file))
            assert isinstance(planned, Planned)
            assert sorted(found[file.slide]) == list(range(len(planned.plan)))
            assert len(planned.plan) > 20
            for index, tile_HW3 in found[file.slide].items():
                np.testing.assert_array_equal(tile_HW3, read_tile(slide, planned.plan, index))


def test_reading_in_this_process_is_the_same(files):
    own = start_readers(SETTINGS, 0, 4)
    assert isinstance(own, OwnReader)
    found = read_all(own, files[:1])
    with open_slide(files[0].path) as slide:
        planned = Reader(SETTINGS).do(PlanTask(files[0]))
        assert isinstance(planned, Planned)
        assert len(found["s0"]) == len(planned.plan)
        np.testing.assert_array_equal(found["s0"][7], read_tile(slide, planned.plan, 7))


def test_shared_memory_holds_a_region_whatever_the_overlap(files):
    crowded = Settings(TILE_PX, 0.5, Tissue(), Tiles(overlap_px=60))
    planned = Reader(crowded).do(PlanTask(files[0]))
    assert isinstance(planned, Planned)
    assert max(len(region.indices_K) for region in planned.regions) <= tiles_per_region(TILE_PX)
    assert sum(len(region.indices_K) for region in planned.regions) == len(planned.plan)


def test_a_plan_states_the_slide_and_its_geometry(files):
    planned = Reader(SETTINGS).do(PlanTask(files[1]))
    assert isinstance(planned, Planned)
    with open_slide(files[1].path) as slide:
        assert planned.fingerprint == slide.fingerprint
    assert planned.empty_reason == ""
    facts = planned.facts
    assert (facts["level0_width"], facts["level0_height"], facts["level"], facts["read_px"]) == (965, 703, 0, 64)
    assert (facts["slide_mpp"], facts["mpp_source"], facts["true_mpp"]) == (0.5, "file", 0.5)
    assert (facts["level0_magnification"], facts["target_magnification"]) == (20, 20)


def test_mpp_comes_from_the_csv_before_the_file(files):
    planned = Reader(SETTINGS).do(PlanTask(SlideFile("s", files[0].path, mpp=0.25)))
    assert isinstance(planned, Planned)
    assert (planned.facts["slide_mpp"], planned.facts["mpp_source"]) == (0.25, "csv")
    assert planned.plan.tile_level0_px == pytest.approx(128, rel=0.01)


# --- slides that fail ------------------------------------------------------------------------------------------------


def failure(file: SlideFile, settings: Settings = SETTINGS) -> Failure:
    result = Reader(settings).do(PlanTask(file))
    assert isinstance(result, Failure)
    assert result.slide == file.slide
    return result


def test_failures_say_at_which_stage_and_why(slides, tmp_path: Path, files):
    (tmp_path / "text.svs").write_text("no slide")
    slides.write_tiff(tmp_path / "no_mpp.tiff", [slides.noise(300, 200)])
    slides.write_tiff(tmp_path / "coarse.tiff", [slides.paint_tissue(300, 200)[0]], mpp=2.0)
    found = {name: failure(SlideFile(name, tmp_path / name)) for name in ("absent.svs", "text.svs", "no_mpp.tiff")}
    assert {f.stage for f in found.values()} == {"open"}
    assert "no such file" in found["absent.svs"].reason
    assert "not a slide format" in found["text.svs"].reason
    for way in ("properties", "mpp column", "slides.mpp"):
        assert way in found["no_mpp.tiff"].reason
    coarse = failure(SlideFile("coarse", tmp_path / "coarse.tiff"))
    assert coarse.stage == "tiles"
    assert "tiles.max_upsample=4" in coarse.reason


def test_what_a_codec_may_raise_is_a_failure_too(files, monkeypatch):
    def raise_memory_error(*_: object):
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(readers, "find_tissue", raise_memory_error)
    found = failure(files[0])
    assert (found.stage, found.errno) == ("tissue", 0)
    assert found.reason.startswith("MemoryError: cannot allocate (test_readers.py:")


def test_a_slide_that_is_largely_unreadable_fails_with_the_share(slides, tmp_path: Path):
    path = tmp_path / "a.tiff"
    slides.write_tiff(path, [slides.paint_tissue(896, 640)[0]], mpp=0.5, tile=(128, 128), compression="jpeg")
    for column in range(7):
        slides.break_tile(path, 0, column, 2)
    found = failure(SlideFile("a", path))
    assert found.stage == "tissue"
    share = re.search(r"a\.tiff: ([\d.]+)% of its area cannot be decoded, extract.max_bad_tiles=0.1", found.reason)
    assert share is not None
    assert 20 <= float(share[1]) <= 40  # a fifth, and what shares a block of the thumbnail with it
    lenient = Settings(TILE_PX, 0.5, Tissue(), Tiles(), max_bad=0.5)
    assert isinstance(Reader(lenient).do(PlanTask(SlideFile("a", path))), Planned)


def test_no_tiles_has_a_reason_whichever_step_left_none(slides, tmp_path: Path):
    slides.write_tiff(tmp_path / "glass.tiff", [slides.glass(700, 500)], mpp=0.5)
    slides.write_tiff(tmp_path / "tissue.tiff", [slides.paint_tissue(700, 500)[0]], mpp=0.5)
    planned = Reader(SETTINGS).do(PlanTask(SlideFile("glass", tmp_path / "glass.tiff")))
    assert isinstance(planned, Planned)
    assert (len(planned.plan), planned.regions) == (0, [])
    assert "looks like empty glass" in planned.empty_reason
    strict = Settings(448, 0.5, Tissue(), Tiles(min_tissue=1.0))
    planned = Reader(strict).do(PlanTask(SlideFile("tissue", tmp_path / "tissue.tiff")))
    assert isinstance(planned, Planned)
    assert planned.empty_reason.startswith("no tile of 448 px at 0.5 microns per pixel has tiles.min_tissue=1")


# --- processes that die ----------------------------------------------------------------------------------------------


def test_a_reader_that_dies_fails_its_slide_and_the_others_go_on(files, pool, tmp_path: Path):
    """The slide that is read without end is a named pipe: opening it waits for a writer."""
    os.mkfifo(tmp_path / "stuck.tiff")
    stuck = SlideFile("stuck", tmp_path / "stuck.tiff")
    reader = pool(n_workers=1, prefetch=3)
    victim = psutil.Process(reader._workers[0].process.pid)
    for file in (stuck, files[0], stuck):
        reader.submit(PlanTask(file))
    time.sleep(1.0)  # its start; killed before that, there is nothing to blame a slide for
    while not reader._workers[0].connection.poll(0.1):
        time.sleep(0.05)
    victim.send_signal(signal.SIGSEGV)
    results = []
    while reader.busy:
        results += list(reader.results())
    (task, failed), (other, planned) = results
    assert isinstance(failed, Failure)
    assert (task.file, failed.slide, failed.stage) == (stuck, "stuck", "plan")
    assert "its reader process died (SIGSEGV) while finding its tissue" in failed.reason
    assert other.file == files[0]
    assert isinstance(planned, Planned)
    assert reader.room == 3


def test_a_reader_that_never_starts_is_an_error(pool, files, monkeypatch):
    reader = pool(n_workers=1)
    os.kill(reader._workers[0].process.pid, signal.SIGKILL)
    reader.submit(PlanTask(files[0]))
    with pytest.raises(ReaderError, match=r"died \(SIGKILL\) before it was ready.*workers=0"):
        list(reader.results())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_readers_end_when_the_main_process_is_killed(files):
    read_end, write_end = os.pipe()
    main = os.fork()
    if main == 0:
        reader = ReaderPool(SETTINGS, 2, 2)
        os.write(write_end, " ".join(str(w.process.pid) for w in reader._workers).encode())
        time.sleep(60)
        os._exit(0)
    pids = [int(pid) for pid in os.read(read_end, 100).split()]
    time.sleep(0.8)
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert alive == []


def test_closing_ends_the_processes_at_once(pool):
    reader = pool(n_workers=2)
    processes = [psutil.Process(worker.process.pid) for worker in reader._workers]
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 10
    assert not any(process.is_running() for process in processes)


def test_readers_do_not_run_the_main_file_again(files, pool, tmp_path, monkeypatch):
    """A user's script that has no `if __name__ == "__main__":` must not start anew in every reader."""
    script, ran = tmp_path / "script.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w').close()")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", str(script), raising=False)
    monkeypatch.setattr(main, "__spec__", None)
    reader = pool(n_workers=1)
    reader.submit(PlanTask(files[0]))
    assert isinstance(next(iter(reader.results()))[1], Planned)
    assert not ran.exists()
    assert main.__file__ == str(script)


def test_a_reader_imports_no_torch(python):
    heavy = {"torch", "timm", "h5py", "pandas", "matplotlib"}
    code = f"import sys, extract.extraction.readers; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
