"""The table of slides: which slide, whose, what label, which split. Read from a CSV and checked as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from extract.config import Columns, ProblemsError, did_you_mean

SPLITS = ("train", "test")
NOTHING = ("", "na", "nan", "none")


class CohortError(ProblemsError):
    """The cohort table is wrong."""


@dataclass(frozen=True)
class Cohort:
    """One row a slide.

    `table` columns: slide, patient (text), label (class name, or None when unlabelled), split ("train" or "test"),
    path (text or None), mpp (float, NaN when unknown). Index is 0..S-1. `classes` are the label names in the order
    of the probability columns; with two classes the last one is the positive class.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels_S(self) -> np.ndarray:
        """Class index of every slide, int64, -1 where there is no label."""
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index.get(label, -1) for label in self.table["label"]], dtype=np.int64)

    def subset(self, keep_S: np.ndarray) -> Cohort:
        """The slides where `keep_S` is true, classes unchanged."""
        return Cohort(self.table[keep_S].reset_index(drop=True), self.classes)


def read_cohort(
    path: Path, columns: Columns | None = None, classes: Sequence[str] | None = None, *, labelled: bool = True
) -> Cohort:
    """Read and check a cohort CSV.

    Args:
        path: CSV file with one row a slide.
        columns: names of the columns in this file.
        classes: label names in the wanted order; default: all that occur, numbers by value, names by alphabet.
        labelled: False when labels and patients are not needed (extraction only).

    Raises:
        CohortError: all problems of the table together, with the rows concerned.
    """
    columns = columns or Columns()
    try:
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CohortError("cohort cannot be read", [f"{path}: {error}"]) from None
    raw.columns = [str(c).strip() for c in raw.columns]
    needed = {"slide": columns.slide} | ({"patient": columns.patient, "label": columns.label} if labelled else {})
    missing = [
        f"{path}: no column {name!r} (columns.{role}){did_you_mean(name, list(raw.columns))}. "
        f"It has: {', '.join(raw.columns)}"
        + (". Use columns.patient=" + columns.slide + " if each slide is its own patient" if role == "patient" else "")
        for role, name in needed.items()
        if name not in raw.columns
    ]
    if missing:
        raise CohortError("problems in the cohort", missing)
    unread = _unread_mpp(path, raw, columns.mpp)
    try:
        cohort = check_cohort(_standard_columns(raw, columns), classes, where=str(path), labelled=labelled)
    except CohortError as error:
        raise CohortError(error.title, [*error.problems, *unread]) from None
    if unread:
        raise CohortError("problems in the cohort", unread)
    return cohort


def check_cohort(
    table: pd.DataFrame, classes: Sequence[str] | None = None, *, where: str = "cohort", labelled: bool = True
) -> Cohort:
    """Check a table that already has the standard columns (see `Cohort`) and give it its classes."""
    table = table.reset_index(drop=True)
    for column in ("label", "path"):  # pandas turns None into NaN in text columns
        table[column] = pd.Series([None if pd.isna(v) else str(v) for v in table[column]], dtype=object)
    problems = []
    for row, slide in enumerate(table["slide"]):
        if not slide:
            problems.append(f"{where}: row {row + 2} has no slide name")
        elif "/" in slide or "\\" in slide:
            problems.append(
                f"{where}: row {row + 2}: slide {slide!r} has a slash; name its file in column path instead"
            )
    for slide, count in table["slide"].value_counts().items():
        if count > 1 and slide:
            problems.append(f"{where}: slide {slide!r} is listed {count} times")
    for row, split in enumerate(table["split"]):
        if split not in SPLITS:
            problems.append(f"{where}: row {row + 2}: split {split!r}, expected train, test or empty")
    if labelled:
        for slide, patient in zip(table["slide"], table["patient"], strict=True):
            if not patient:
                problems.append(f"{where}: slide {slide!r} has no patient")
    found = sorted({label for label in table["label"] if label is not None}, key=_by_value)
    names = tuple(str(c) for c in classes) if classes else tuple(found)
    unknown = [label for label in found if label not in names]
    if unknown:
        problems.append(
            f"{where}: labels {unknown} are not among classes {list(names)}{did_you_mean(unknown[0], list(names))}"
        )
    if problems:
        raise CohortError("problems in the cohort", problems)
    return Cohort(table, names)


def write_cohort(path: Path, cohort: Cohort) -> None:
    """Write the table so that `read_cohort` gives it back."""
    cohort.table.to_csv(path, index=False)


def _standard_columns(raw: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    def text(name: str) -> list[str]:
        return [v.strip() for v in raw[name]] if name in raw.columns else [""] * len(raw)

    slides = text(columns.slide)
    mpp = pd.to_numeric(pd.Series(text(columns.mpp), dtype=object), errors="coerce").astype(float)
    return pd.DataFrame(
        {
            "slide": slides,
            "patient": text(columns.patient),
            "label": pd.Series(_plain_labels(text(columns.label)), dtype=object),
            "split": [s.lower() or "train" for s in text(columns.split)],
            "path": pd.Series([p or None for p in text(columns.path)], dtype=object),
            "mpp": mpp,
        }
    )


def _unread_mpp(path: Path, raw: pd.DataFrame, column: str) -> list[str]:
    """What is no number must not pass for an empty cell: the file's own mpp would be used."""
    cells = [str(cell).strip() for cell in raw[column]] if column in raw.columns else []
    return [
        f"{path}: row {row + 2}: {column} {cell!r}, expected microns per pixel at level 0 such as 0.25, or nothing"
        for row, cell in enumerate(cells)
        if cell.lower() not in NOTHING and not _positive(cell)
    ]


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _plain_labels(labels: list[str]) -> list[str | None]:
    """`1.0` back to `1` (pandas writes it so when a label is missing); empty, NA and nan mean no label."""
    kept = [None if label.lower() in NOTHING else label for label in labels]
    if all(label is None or label.removesuffix(".0").lstrip("-").isdigit() for label in kept):
        return [label if label is None else label.removesuffix(".0") for label in kept]
    return kept


def _by_value(label: str) -> tuple[int, float, str]:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
