"""What a folder and tables hold: columns by their role, the task that follows, features, and how they match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from extract.cells import NUMBER
from extract.cohort import NOTHING
from extract.config import Columns, Tables, did_you_mean
from extract.features.errors import CacheError
from extract.features.folder import FeatureFolder
from extract.joining import BARCODE, TCGA, header_of, read_rows, suggested, without_ending
from extract.tables import read_texts

MOST_CLASSES = 12
"""A column with more values than these is no label of classes."""
HEADERS = 20
"""Feature files whose headers are read."""
GRADES = ("grade", "isup", "stage", "score")
"""In the name of a column whose whole numbers are an order."""
TaskName = Literal["classification", "regression", "survival", "ordinal"]


@dataclass(frozen=True)
class Found:
    """`columns`: by role, only those that there are. `matched`: slides of the table with features. `targets`: the
    labels of each column of a list in columns.label, which is of many targets; `task`, `classes` and `labels` are then
    of the first."""

    tables: Path | Tables
    columns: dict[str, str]
    task: TaskName | None
    classes: list[str]
    labels: dict[str, int]
    rows: pd.DataFrame
    matched: list[str]
    without: list[str]
    unlisted: list[str]
    notes: list[str]
    targets: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def n_patients(self) -> int:
        return len(set(patients_of(self.rows, self.columns)))


def find(tables: Path | Tables, given: Columns, features: FeatureFolder) -> Found:
    """Look at all of it.

    Raises:
        TableError, JoinError: a table cannot be read, or two cannot be joined.
    """
    header = header_of(tables)
    several = [name for name in given.label if name in header] if isinstance(given.label, list) else []
    own = {role: name for role, name in given if name != getattr(Columns(), role) and isinstance(name, str)}
    own |= {"label": several[0]} if several else {}
    columns = {role: name for role in Columns.model_fields if (name := own.get(role) or suggested(role, header))}
    if "label" not in own and own.keys() & {"time", "event"} and columns.keys() >= {"time", "event"}:
        columns.pop("label", None)  # whoever names the time wants survival, be there a label beside it
    slides = read_texts(tables.main, sheet=tables.slides_sheet or tables.sheet) if isinstance(tables, Tables) else None
    if "slide" not in columns:
        table = slides if slides is not None else read_texts(Path(str(tables)))
        near = most_alike(table, features.slides)
        columns |= {"slide": near} if near else {}
    tables = with_patient(tables, columns, slides)
    if "slide" not in columns:
        return Found(tables, columns, None, [], {}, pd.DataFrame(), [], [], [], ["no column names the slides"])
    named = Columns.model_validate({role: name for role, name in columns.items() if role in ("slide", "patient")})
    rows, notes = read_rows(tables, named)
    if "patient" not in columns:
        every = all(BARCODE.match(slide.strip()) for slide in rows[columns["slide"]])
        columns["patient"] = TCGA if every else columns["slide"]
        notes.append("patients are read from the slides' TCGA barcodes" if every else "no column names the patient")
    task, classes = task_of(rows, columns)
    labels = counts(rows, columns["event"] if task == "survival" else columns["label"]) if task else {}
    names = [slide.strip() for slide in rows[columns["slide"]]]
    plain = [name if name in features.slides else without_ending(name) for name in names]
    matched = [name for name in plain if name in features.slides]
    without = [name for name, known in zip(names, plain, strict=True) if known not in features.slides]
    unlisted = sorted(set(features.slides) - set(matched))
    absent = [name for name in given.label if name not in header] if isinstance(given.label, list) else []
    notes += [f"no column {name!r} (columns.label){did_you_mean(name, list(header))}" for name in absent]
    kinds = {name: task_of(rows, columns | {"label": name})[0] for name in several}
    notes += [
        f"{name} looks like task={kind}, {several[0]} like task={task}: targets of one study are of one task"
        for name, kind in kinds.items()
        if kind != task
    ]
    targets = {name: counts(rows, name) for name, kind in kinds.items() if kind == task}
    return Found(tables, columns, task, classes, labels, rows, matched, without, unlisted, notes, targets)


def with_patient(tables: Path | Tables, columns: dict[str, str], slides: pd.DataFrame | None) -> Path | Tables:
    """Two tables, of which that of the slides may name the patient otherwise, or only by barcodes."""
    if slides is None or not isinstance(tables, Tables) or tables.slides_patient or "patient" not in columns:
        return tables
    if columns["patient"] in slides:
        return tables
    near = suggested("patient", slides.columns)
    if near is None and "slide" in columns and all(BARCODE.match(name) for name in slides[columns["slide"]]):
        near = TCGA
    return tables.model_copy(update={"slides_patient": near})


def most_alike(table: pd.DataFrame, slides: Collection[str]) -> str | None:
    """The column whose cells are most often names of slides with features; None where no cell is."""
    hits = {str(name): sum(without_ending(cell.strip()) in slides for cell in table[name]) for name in table.columns}
    best = max(hits, key=lambda name: hits[name], default=None)
    return best if best is not None and hits[best] else None


def task_of(rows: pd.DataFrame, columns: dict[str, str]) -> tuple[TaskName | None, list[str]]:
    """Which task the columns are for, and its classes; chooses the label where only one column can be it."""
    if "label" not in columns and "time" in columns and "event" in columns:
        return "survival", []
    if "label" not in columns:
        taken = set(columns.values())
        few = [str(name) for name in rows.columns if name not in taken and 2 <= len(counts(rows, name)) <= MOST_CLASSES]
        if len(few) != 1:
            return None, few
        columns["label"] = few[0]
    labels = counts(rows, columns["label"])
    numeric = bool(labels) and all(NUMBER.fullmatch(label) for label in labels)
    if numeric and (len(labels) > MOST_CLASSES or any(float(label) % 1 for label in labels)):
        return "regression", []
    classes = classes_of(labels)
    graded = numeric and len(classes) > 2 and any(word in columns["label"].lower() for word in GRADES)
    return ("ordinal" if graded else "classification"), classes


def counts(rows: pd.DataFrame, column: str) -> dict[str, int]:
    """How often each value of a column occurs, without empty cells, most frequent first."""
    cells = (cell.strip() for cell in rows[column])
    return dict(Counter(cell for cell in cells if cell.lower() not in NOTHING).most_common())


def classes_of(labels: dict[str, int]) -> list[str]:
    """The labels in order, of those that differ only in case or spaces the most frequent."""
    first: dict[str, str] = {}
    for label in labels:
        first.setdefault("".join(label.split()).casefold(), label)
    numeric = all(NUMBER.fullmatch(label) for label in first.values())
    return sorted(first.values(), key=lambda label: (float(label) if numeric else 0.0, label))


def patients_of(rows: pd.DataFrame, columns: dict[str, str]) -> list[str]:
    """Of every slide."""
    if columns.get("patient") == TCGA and TCGA not in rows:
        found = [BARCODE.match(slide.strip()) for slide in rows[columns["slide"]]]
        return [match[0].upper() if match else "" for match in found]
    return [cell.strip() for cell in rows[columns["patient"]]] if "patient" in columns else []


def told_of_features(features: FeatureFolder) -> list[str]:
    """Tool, encoder, width and tiles, of a few files evenly drawn."""
    names = list(features.slides)
    drawn: Sequence[str] = names[:: max(1, len(names) // HEADERS)][:HEADERS]
    headers, broken = [], []
    for name in drawn:
        try:
            headers.append(features.header(name))
        except CacheError as error:
            broken.append(f"features that cannot be read: {error}")
    lines = [f"features: {len(names)} slides in {features.folder}, written by {features.layout}", *broken]
    if headers:
        encoders = sorted({header.provenance.encoder or "not said" for header in headers})
        widths = sorted({header.dim for header in headers})
        tiles = [header.n_tiles for header in headers]
        lines.append(
            f"  encoder {', '.join(encoders)}; width {', '.join(map(str, widths))}; "
            f"{min(tiles):,} to {max(tiles):,} tiles a slide, median {int(np.median(tiles)):,} ({len(headers)} files)"
        )
    return lines
