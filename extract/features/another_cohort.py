"""A cohort.csv is only written over where it is of the same slides: what somebody wrote by hand is not lost."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from extract.cells import plain_cell
from extract.config import ProblemsError


def refuse_another_cohort(path: Path, slides: Iterable[str]) -> None:
    """Raise ProblemsError if the CSV is there and names other slides than these, or cannot be read."""
    if not path.exists():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            there = [plain_cell(row.get("slide") or "") for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise _refused(path, f"cannot be read ({error})") from None
    others = sorted(set(there) - set(slides))
    if others:
        raise _refused(path, f"is of other slides, such as {others[0]!r}")


def _refused(path: Path, why: str) -> ProblemsError:
    return ProblemsError(
        "would be written over", [f"{path}: {why}. Set features.folder=OTHER for these features, or move it away"]
    )
