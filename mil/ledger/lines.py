"""The lines of the ledger: measured beside reference, with a verdict; as text, CSV, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from extract.tables import write_csv
from extract.whole import write_whole
from mil.ledger.config import ReproduceConfig
from mil.ledger.entries import Entry

REPRODUCED, DIFFERS, NOT_HERE = "reproduced", "differs", "not here"
HEAD = ("entry", "what", "measured", "reference", "tolerance", "verdict")


@dataclass(frozen=True)
class Line:
    """One entry that was run, or whose data are not here. values: of every repeat, seed or fold."""

    name: str
    entry: Entry
    values: tuple[float, ...]

    @property
    def measured(self) -> float | None:
        return float(np.mean(self.values)) if self.values else None

    @property
    def verdict(self) -> str:
        """Whether the mean lies within the reference, or beside it by no more than the tolerance."""
        if self.measured is None:
            return NOT_HERE
        low, high = self.entry.low - self.entry.tolerance, self.entry.high + self.entry.tolerance
        return REPRODUCED if low <= self.measured <= high else DIFFERS

    def cells(self) -> tuple[str, ...]:
        """As HEAD names them."""
        entry, sd = self.entry, np.std(self.values, ddof=1) if len(self.values) > 1 else None
        measured = "-" if self.measured is None else f"{self.measured:.3f}" + ("" if sd is None else f" ± {sd:.3f}")
        reference = f"{entry.low:.3f}" + ("" if entry.low == entry.high else f" to {entry.high:.3f}")
        what = f"{entry.what} ({entry.metric})"
        return self.name, what, measured, reference, f"{entry.tolerance:.3f}", self.verdict


def run_entry(name: str, entry: Entry, config: ReproduceConfig) -> Line:
    """Measure it where the data are here."""
    where = entry.present(config)
    return Line(name, entry, () if where is None else tuple(entry.measure(config, where)))


def as_text(lines: Sequence[Line]) -> str:
    """For the terminal: aligned, and how to get what is not here."""
    rows = [HEAD, *(line.cells() for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*table, *(f"{one}: {text}" for one, text in absent(lines))])


def absent(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """(name, how to get the data) of what is not here."""
    return [(line.name, f"not here. {line.entry.get}") for line in lines if line.verdict == NOT_HERE]


def as_markdown(lines: Sequence[Line], about: Sequence[str]) -> str:
    """The table, what each entry is, and what is not here."""
    rows = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    rows += ["| " + " | ".join(line.cells()) + " |" for line in lines]
    notes = [f"- {line.name}: {line.entry.protocol}. Reference: {line.entry.source}." for line in lines]
    missing = [f"- {name}: {text}." for name, text in absent(lines)]
    return "\n".join(["# Measured against reference", "", *about, "", *rows, "", *notes, *missing, ""])


def write_ledger(folder: Path, lines: Sequence[Line], about: Sequence[str]) -> None:
    """ledger.csv, ledger.md and ledger.json; the same bytes whenever the numbers are the same."""
    rows = [
        {
            "entry": line.name,
            "what": line.entry.what,
            "protocol": line.entry.protocol,
            "metric": line.entry.metric,
            "measured": line.measured,
            "values": list(line.values),
            "reference_low": line.entry.low,
            "reference_high": line.entry.high,
            "tolerance": line.entry.tolerance,
            "source": line.entry.source,
            "verdict": line.verdict,
            "get": line.entry.get,
        }
        for line in lines
    ]
    flat = [
        row | {"values": " ".join(f"{value:.6f}" for value in line.values)}
        for row, line in zip(rows, lines, strict=True)
    ]
    write_csv(pd.DataFrame(flat), folder / "ledger.csv")
    write_whole(folder / "ledger.md", as_markdown(lines, about))
    write_whole(folder / "ledger.json", json.dumps({"about": list(about), "entries": rows}, indent=2) + "\n")
