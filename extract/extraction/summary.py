"""What became of the slides: the summary, failed.csv, and what processes that were killed left behind."""

from __future__ import annotations

import csv
import glob
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from extract.cells import plain_cell, safe_cell
from extract.extraction.claims import Holding
from extract.extraction.readers import Failure, SlideFile
from extract.features.cache import SUFFIX
from extract.whole import replace_on_success

FAILED = "failed.csv"

LOCK_WAIT_S = 30.0


class Progress:
    """Slides and parts of slides on a bar, never past its end.

    Slides are counted whole and their tiles as whole numbers: shares of a slide added one by one end a rounding error
    beyond the number of slides, which tqdm warns about in the middle of its line.
    """

    def __init__(self, bar: tqdm[Any]):
        self.bar, self.before, self.total = bar, int(bar.n), int(bar.total or 0)
        self.settled: set[str] = set()
        self.tiles: dict[str, tuple[int, int]] = {}  # of slides in work: done, of how many

    def add_tiles(self, slide: str, n_tiles: int, n_planned: int) -> None:
        """`n_tiles` more tiles of a slide are settled; with its last one the slide is."""
        done = self.tiles.pop(slide, (0, n_planned))[0] + n_tiles
        if slide in self.settled or done >= n_planned:
            self.settled.add(slide)
        else:
            self.tiles[slide] = (done, n_planned)
        self.show()

    def add_slide(self, slide: str) -> None:
        """A slide is settled, whatever became of its tiles."""
        self.tiles.pop(slide, None)
        self.settled.add(slide)
        self.show()

    def show(self) -> None:
        if self.bar.disable:
            return
        now = self.before + len(self.settled) + sum(done / planned for done, planned in self.tiles.values())
        self.bar.n = min(now, self.total)
        self.bar.last_print_n = min(self.bar.last_print_n, self.bar.n)
        self.bar.update(0)


@dataclass
class Summary:
    """What became of the slides, by id. `elsewhere`: in the hands of other processes when this one ended.

    `tiles` were encoded in `seconds`; `encoder_busy` is the fraction of the time between the first batch and the last
    in which the encoder worked, `readers_busy` that of the whole in which a reader did; `device` is the encoder's.
    """

    done: list[str] = field(default_factory=list)
    already_there: list[str] = field(default_factory=list)
    empty: dict[str, str] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    tiles: int = 0
    seconds: float = 0.0
    encoder_busy: float = 0.0
    readers_busy: float = 0.0
    device: str = "cpu"


def tidy_up_after_the_dead(folder: Path, claims: Holding, there: Sequence[SlideFile]) -> None:
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
    slide = glob.escape(claimed)
    for pattern in (f".{glob.escape(file)}.*.partial", f".{slide}.claim.*.stale", f"qc/.{slide}.png.*.partial"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def record_failures(folder: Path, claims: Holding, summary: Summary) -> None:
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
        tried = {failure.slide.partition("/")[0] for failure in summary.failed} | {*summary.done, *summary.empty}
        rows = {row["slide"]: row for row in read_failed(path) if row["slide"] not in settled}
        rows = {name: row for name, row in rows.items() if name.partition("/")[0] not in tried}  # of tile images
        rows |= {f.slide: {"slide": f.slide, "stage": f.stage, "reason": f.reason} for f in summary.failed}
        if not rows:
            path.unlink(missing_ok=True)
            return
        with replace_on_success(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["slide", "stage", "reason"])
            writer.writeheader()
            writer.writerows({key: safe_cell(cell) for key, cell in rows[s].items()} for s in sorted(rows))
    finally:
        if locked:
            claims.release(FAILED)


def read_failed(path: Path) -> list[dict[str, str]]:
    """The rows of failed.csv; a tile image is SLIDE/IMAGE in column slide."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if {"slide", "stage", "reason"} <= row.keys()]
    return [{key: plain_cell(row[key] or "") for key in ("slide", "stage", "reason")} for row in rows]
