"""Tiles per second from a slow mount, with and without staging (slides.stage).

    python benchmarks/staging.py [slides=6] [side=4096] [latency_ms=2] [mb_s=100] [rounds=3]

The mount is simulated, and this is how: the process's own counters (/proc/self/io) say how many reads, of how many
bytes, finding the tissue or reading a region took; for each read `latency_ms` is slept, and for the bytes what they
take at `mb_s`. Copying to scratch pays the same by parts of 4 MiB, and all copies share one line of `mb_s`. One reader
(workers=0) in every row, OpenSlide's own reading, no encoder: what is measured is how slides are fetched. On a real
share several readers wait at the same time. Prints Markdown. Needs tifffile (pip install -e '.[test]').
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil
from extraction import make_slide, no_encoder
from machine import machine

from extract.config import ExtractConfig
from extract.extraction import readers
from extract.extraction import work as extraction
from extract.extraction.readers import SlideFile
from extract.extraction.work import extract_cohort
from extract.slides import scratch


class Mount:
    """Makes reading as slow as from a share: `reads`, `read_bytes` and `copied_bytes` are counted."""

    def __init__(self, latency_s: float, bytes_per_s: float):
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.line = threading.Lock()
        self.reads = self.read_bytes = self.copied_bytes = 0
        self._do, self._copy = readers.Reader.do, scratch.copy_file

    def slow_reading(self) -> None:
        process, do = psutil.Process(), self._do

        def slowly(reader, task, into_KHW3=None):
            before = process.io_counters()
            result = do(reader, task, into_KHW3)
            after = process.io_counters()
            n, n_bytes = after.read_count - before.read_count, after.read_chars - before.read_chars
            self.reads, self.read_bytes = self.reads + n, self.read_bytes + n_bytes
            time.sleep(n * self.latency_s + n_bytes / self.bytes_per_s)
            return result

        readers.Reader.do = slowly

    def slow_copying(self) -> None:
        def slowly(source, target, going_on):
            self._copy(source, target, going_on)
            size = source.stat().st_size
            time.sleep(self.latency_s * (1 + size // scratch.CHUNK))
            with self.line:
                time.sleep(size / self.bytes_per_s)
            self.copied_bytes += size

        scratch.copy_file = slowly

    def gone(self) -> None:
        readers.Reader.do, scratch.copy_file = self._do, self._copy


def main() -> None:
    """Measure and print."""
    given = {"slides": 6, "side": 4096, "latency_ms": 2, "mb_s": 100, "rounds": 3}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        given[key] = float(value) if key == "latency_ms" else int(value)
    extraction.load_encoder = lambda section: no_encoder()
    with tempfile.TemporaryDirectory() as folder:
        names = [f"s{number}" for number in range(int(given["slides"]))]
        slides = [SlideFile(name, make_slide(Path(folder) / f"{name}.tiff", int(given["side"]))) for name in names]
        size_mb = sum(file.path.stat().st_size for file in slides) / 1e6
        print(f"Command: `python benchmarks/staging.py {' '.join(sys.argv[1:])}`\n")
        print(f"{machine('openslide-python')}\n")
        print(f"{len(slides)} slides, {size_mb:.0f} MB; {given['latency_ms']} ms a read, {given['mb_s']} MB/s\n")
        print("| slides on | tiles/s, median | all | reads | MB read or copied |\n| --- | --- | --- | --- | --- |")
        for what, slow in (("a local disk", False), ("the mount, read there", True), ("the mount, staged", True)):
            runs = range(int(given["rounds"]))
            rates = [one_run(slides, Path(folder), what.endswith("staged"), slow, given) for _ in runs]
            mount = rates[0][1]
            shown = ", ".join(f"{rate:.0f}" for rate, _ in rates)
            moved = (mount.copied_bytes or mount.read_bytes) / 1e6
            print(f"| {what} | {median(rate for rate, _ in rates):.0f} | {shown} | {mount.reads:,} | {moved:.0f} |")


def one_run(slides: list[SlideFile], folder: Path, staged: bool, slow: bool, given: dict) -> tuple[float, Mount]:
    """Tiles per second of one extraction, from its start to the last file."""
    mount = Mount(given["latency_ms"] / 1000, given["mb_s"] * 1e6)
    if staged:
        mount.slow_copying()
    elif slow:
        mount.slow_reading()
    try:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            tree = {"features": {"folder": out}, "extract": {"workers": 0}}
            tree["slides"] = {"reader": "openslide", "stage": "true" if staged else "false", "scratch": folder}
            began = time.perf_counter()
            summary = extract_cohort(ExtractConfig.model_validate(tree), slides, progress=False)
            assert not summary.failed, summary.failed
            return summary.tiles / (time.perf_counter() - began), mount
    finally:
        mount.gone()


if __name__ == "__main__":
    main()
