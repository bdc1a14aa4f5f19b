"""reviews.csv: what somebody who looked at a slide says of it, and which slides are left out for it.

Columns: slide, mark, note, when. One row a slide, the last mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from extract.tables import Column, TableError, read_table, write_csv

FILE = "reviews.csv"
MARKS = ("wrong label", "bad quality", "look again")
LEFT_OUT = ("wrong label", "bad quality")
"""Marks for which a slide is left out unless the config says otherwise."""
COLUMNS = {
    "slide": Column("text"),
    "mark": Column("text", among=MARKS),
    "note": Column("text", blank=True),
    "when": Column("text", blank=True),
}
REASON = "marked {mark!r} in a review"


def read_reviews(path: Path) -> pd.DataFrame:
    """slide, mark, note, when; of a file that is not there no rows.

    Raises:
        TableError: it cannot be read, or has other marks.
    """
    if not path.exists() or path.read_text(encoding="utf-8-sig").count("\n") <= 1:
        return pd.DataFrame(columns=list(COLUMNS), dtype=object)
    return read_table(path, COLUMNS)[list(COLUMNS)]


def with_review(table: pd.DataFrame, slide: str, mark: str, note: str, when: str) -> pd.DataFrame:
    """The table with this slide's mark; "" takes its mark away.

    Raises:
        TableError: there is no such mark.
    """
    if mark and mark not in MARKS:
        raise TableError("no such mark", [f"{mark!r:.40}: expected one of {', '.join(MARKS)}"])
    rest = table[table["slide"] != slide]
    if not mark:
        return rest.reset_index(drop=True)
    row = pd.DataFrame([{"slide": slide, "mark": mark, "note": note, "when": when}])
    return pd.concat([rest, row], ignore_index=True).sort_values("slide", ignore_index=True)


def write_reviews(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    write_csv(table[list(COLUMNS)], path)


def left_out(path: Path, marks: Sequence[str] = LEFT_OUT) -> dict[str, str]:
    """Slides that are marked with one of `marks`, and the reason in words.

    Raises:
        TableError: no such file, or it cannot be read.
    """
    if not path.is_file():
        raise TableError("no reviews", [f"reviews={path}: no such file; python -m mil.view run=RUN writes it"])
    table = read_reviews(path)
    chosen = table[table["mark"].isin(marks)]
    return {str(slide): REASON.format(mark=mark) for slide, mark in zip(chosen["slide"], chosen["mark"], strict=True)}
