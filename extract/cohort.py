"""The table of slides: which slide, whose, what label, which split. Read from a CSV and checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from extract.cells import NUMBER
from extract.config import Columns, ProblemsError, Tables, did_you_mean
from extract.joining import (
    BARCODE,
    TCGA,
    JoinError,
    absent_column,
    decimal_commas,
    names_without_endings,
    read_rows,
    without_ending,
)
from extract.tables import TableError, write_csv
from extract.wording import count, name_some

SPLITS = ("train", "test")
CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, half characters, and the marks that turn the direction of writing around."""
LONGEST_NAME = 240
"""Bytes of a slide's name: file systems take 255 with the extension."""
NOTHING = ("", "na", "nan", "none")
Target = Literal["class", "value", "survival"]
"""What is to be predicted: one of several classes, a number, or the time to an event."""
HAPPENED = ("1", "1.0", "yes", "y", "true", "event", "dead", "deceased", "1:deceased", "1:recurred/progressed")
NOT_YET = ("0", "0.0", "no", "n", "false", "censored", "alive", "living", "0:living", "0:diseasefree", "0:censored")
"""An event as tables write it, in lower case; `1:...` and `0:...` are cBioPortal's."""
CENSORED, EVENT = "censored", "event"


class CohortError(ProblemsError):
    """The cohort table is wrong."""


@dataclass(frozen=True)
class Cohort:
    """One row a slide.

    `table` columns: slide, patient (text), label (class name, or None when unlabelled), split ("train" or "test"),
    path (text or None), mpp (float, NaN when unknown); only where the CSV says it, site (text, "" when unknown). Index
    is 0..S-1. `classes` are the label names in the order of the probability columns; with two classes the last one is
    the positive class. `further`: the other columns of the CSV that were asked for, as text, a row a slide.

    `target` "value": column value (float, NaN when unlabelled), label holds it as the CSV writes it. "survival":
    columns time and event (float, 1 = it happened, NaN when unlabelled), label is "event" or "censored". Of both,
    classes are the strata of folds, in column stratum (their index, -1 when unlabelled) where `stratified` was called.

    `notes`: what was done to the table that its reader should know.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    further: pd.DataFrame | None = None
    target: Target = "class"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels_S(self) -> np.ndarray:
        """Class (stratum) index of every slide, int64, -1 where there is no label."""
        if "stratum" in self.table:
            return self.table["stratum"].to_numpy(dtype=np.int64)
        if self.target == "value":
            return np.where(self.table["value"].isna(), -1, 0).astype(np.int64)
        if self.target == "survival":
            return self.table["event"].fillna(-1).to_numpy(dtype=np.int64)
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index.get(label, -1) for label in self.table["label"]], dtype=np.int64)

    def subset(self, keep_S: np.ndarray) -> Cohort:
        """The slides where `keep_S` is true, classes unchanged."""
        further = None if self.further is None else self.further[keep_S].reset_index(drop=True)
        return replace(self, table=self.table[keep_S].reset_index(drop=True), further=further)

    def named_as(self, there: Collection[str]) -> Cohort:
        """Slides without the endings of their files (`s001.svs`), where that makes all names match those in `there`."""
        slides = self.table["slide"].tolist()
        plain = names_without_endings(slides, there)
        if plain is None:
            return self
        changed = [slide for slide, name in zip(slides, plain, strict=True) if slide != name]
        endings = sorted({slide[len(without_ending(slide)) :] for slide in changed})
        note = f"file endings ({', '.join(endings)}) of {count(len(changed), 'slide name')} in the table were left out"
        return replace(self, table=self.table.assign(slide=plain), notes=(*self.notes, note))

    def stratified(self, stratum_S: np.ndarray, names: Sequence[str]) -> Cohort:
        """The same slides with strata for the folds: index of each, -1 where there is no label."""
        return replace(self, table=self.table.assign(stratum=stratum_S), classes=tuple(names))


def read_cohort(
    path: Path | Tables,
    columns: Columns | None = None,
    classes: Sequence[str] | None = None,
    *,
    labelled: bool = True,
    further: Mapping[str, str] | None = None,
    check: Callable[[pd.DataFrame], list[str]] = lambda further: [],
    target: Target = "class",
    also: Callable[[Cohort], list[str]] = lambda draft: [],
) -> Cohort:
    """Read and check a cohort.

    Args:
        path: CSV, TSV or Excel table with one row a slide; or two tables, which are joined on the patient.
        columns: names of the columns in this file, or "tcga" for patient and site: from the slide's TCGA barcode.
        classes: label names in the wanted order; default: all that occur, numbers by value, names by alphabet.
        labelled: False when labels and patients are not needed (extraction, new slides); those that there are are read.
        further: other columns to keep, each with the key of the config that asks for it; "site" is `columns.site`.
        check: what is wrong with these columns, told those that there are.
        target: what is to be predicted; "survival" reads columns.time and columns.event, not columns.label.
        also: of a table of numbers or times with something wrong, what else would be found later if that were mended.

    Raises:
        CohortError: all problems of the table together, with the rows concerned.
    """
    columns = columns or Columns()
    try:
        raw, notes = read_rows(path, columns)
    except (TableError, JoinError) as error:
        raise CohortError("cohort cannot be read", error.problems) from None
    of_target = ("time", "event") if target == "survival" else ("label",)
    needed = {"slide": columns.slide} | ({"patient": columns.patient} if labelled else {})
    needed |= {role: one(getattr(columns, role)) for role in of_target} if labelled else {}
    if labelled and columns.site != Columns().site:
        needed["site"] = columns.site
    missing = [
        absent_column(path, role, name, list(raw.columns))
        + (". Use columns.patient=" + columns.slide + " if each slide is its own patient" if role == "patient" else "")
        for role, name in needed.items()
        if name not in raw.columns and not (name == TCGA and role in ("patient", "site"))
    ]
    table, of_barcodes = _standard_columns(raw, columns), list[str]()
    if labelled and not missing:
        table, of_barcodes = _from_barcodes(table, raw, columns, str(path))
    kept, unknown = _further_columns(raw, table, further or {}, str(path))
    problems = unknown + _unprintable(kept, str(path), kept.columns) + check(kept)
    if missing:
        raise CohortError("problems in the cohort", missing + problems)
    problems = _unread_mpp(path, raw, columns.mpp) + of_barcodes + problems
    of_numbers = [one(columns.label), *(further or {})] if labelled and target == "class" else list(further or {})
    problems += decimal_commas(raw, of_numbers, str(path), NOTHING)
    if target != "class":
        read = _values if target == "value" else _survival
        table, of_values = read(table, raw, columns, str(path))
        problems += of_values
        problems += also(Cohort(table, ("all",), kept, target)) if problems and labelled else []
    cohort = check_cohort(table, classes, where=str(path), labelled=labelled, also=problems, target=target)
    return replace(cohort, further=kept if further else None, notes=(*notes, *cohort.notes))


def check_cohort(
    table: pd.DataFrame,
    classes: Sequence[str] | None = None,
    *,
    where: str = "cohort",
    labelled: bool = True,
    also: Sequence[str] = (),
    target: Target = "class",
) -> Cohort:
    """Check a table that already has the standard columns (see `Cohort`) and give it its classes.

    `also`: problems that are known already and are reported with those found here.
    """
    table = table.reset_index(drop=True)
    for column in ("label", "path"):  # pandas turns None into NaN in text columns
        table[column] = pd.Series([None if pd.isna(v) else str(v) for v in table[column]], dtype=object)
    problems = [*also, *_name_problems(table, where), *_unprintable(table, where)]
    listed = {str(slide): int(times) for slide, times in table["slide"].value_counts().items() if slide}
    twice = [slide for slide, times in listed.items() if times > 1]
    if len(twice) == 1:
        problems.append(f"{where}: slide {twice[0]!r} is listed {listed[twice[0]]} times")
    elif twice:
        problems.append(f"{where}: {len(twice)} slides are listed more than once: {name_some(twice)}")
    wrong = [(row, f"split {split!r}") for row, split in enumerate(table["split"]) if split not in SPLITS]
    problems += _of_rows(where, wrong, "expected train, test or empty")
    if labelled:
        rows = zip(table["slide"], table["patient"], strict=True)
        without = [slide for slide, patient in rows if not patient]
        if without:
            named = name_some(without)
            one = f"slide {named} has no patient"
            problems.append(
                f"{where}: {one if len(without) == 1 else f'{len(without)} slides have no patient: {named}'}"
            )
    if target != "class":
        if problems:
            raise CohortError("problems in the cohort", problems)
        return Cohort(table, (CENSORED, EVENT) if target == "survival" else ("all",), target=target)
    notes: list[str] = []
    if classes:
        table, notes = _as_classes(table, [str(c) for c in classes])
    found = sorted({label for label in table["label"] if label is not None}, key=_by_value)
    names = tuple(str(c) for c in classes) if classes else tuple(found)
    unknown = [label for label in found if label not in names]
    if unknown:
        problems.append(
            f"{where}: labels {unknown} are not among classes {list(names)}{did_you_mean(unknown[0], list(names))}"
        )
    if not classes and labelled:
        problems += _spelling_problems(table["label"], where)
    if problems:
        raise CohortError("problems in the cohort", problems)
    return Cohort(table, names, notes=tuple(notes))


def _name_problems(table: pd.DataFrame, where: str) -> list[str]:
    """What cannot be a slide's name, a line for each kind."""
    absent, slashes, unusable = [], [], []
    for row, slide in enumerate(table["slide"]):
        if not slide:
            absent.append(row)
        elif "/" in slide or "\\" in slide:
            slashes.append((row, f"slide {slide!r}"))
        elif slide in (".", "..") or len(slide.encode("utf-8", "replace")) > LONGEST_NAME:
            unusable.append((row, f"slide {slide[:60]!r}"))
    problems = []
    if absent:
        one = f"row {absent[0] + 2} has no slide name"
        rows = ", ".join(str(row + 2) for row in absent[:5]) + (" ..." if len(absent) > 5 else "")
        problems.append(f"{where}: {one if len(absent) == 1 else f'{len(absent)} rows have no slide name: {rows}'}")
    problems += _of_rows(where, slashes, "has a slash; name its file in column path instead", ": ", " ")
    longest = f"cannot be a file's name; expected at most {LONGEST_NAME} bytes, and not . or .."
    return problems + _of_rows(where, unusable, longest, ": ", " ")


def _of_rows(
    where: str, wrong: Sequence[tuple[int, str]], why: str, after_row: str = ": ", before_why: str = ", "
) -> list[str]:
    """One line for rows that are wrong in the same way: the first ones, and how many more."""
    if not wrong:
        return []
    shown = "; ".join(f"row {row + 2}{after_row}{what}" for row, what in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return [f"{where}: {shown}{more}{before_why}{why}"]


def _plain(label: str) -> str:
    """The label without what is easily typed otherwise: case, and spaces around and between words."""
    return "".join(label.split()).casefold()


def _as_classes(table: pd.DataFrame, classes: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Labels that differ from one of `classes` only in case or spaces become that class, with a note."""
    by_plain: dict[str, list[str]] = {}
    for name in classes:
        by_plain.setdefault(_plain(name), []).append(name)
    read = {
        label: near[0]
        for label in sorted({label for label in table["label"] if label is not None})
        if label not in classes and len(near := by_plain.get(_plain(label), [])) == 1
    }
    if not read:
        return table, []
    label_S = [read.get(label, label) if label is not None else None for label in table["label"]]
    told = ", ".join(f"{label!r} as {name!r}" for label, name in read.items())
    n = sum(label in read for label in table["label"])
    note = f"{count(n, 'label')} that differ from the classes only in case or spaces: read {told}"
    return table.assign(label=pd.Series(label_S, dtype=object)), [note]


def _spelling_problems(labels: Iterable[str | None], where: str) -> list[str]:
    """Labels that differ only in case or spaces would silently be a class each."""
    given = [label for label in labels if label is not None]
    counts = {label: given.count(label) for label in sorted(set(given), key=_by_value)}
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(_plain(label), []).append(label)
    several = [names for names in alike.values() if len(names) > 1]
    if not several:
        return []
    told = "; ".join(", ".join(f"{name!r} ({count(counts[name], 'slide')})" for name in names) for names in several)
    most = ",".join(max(names, key=lambda name: counts[name]) for names in alike.values())
    return [
        f"{where}: labels that differ only in case or spaces: {told}. Make them equal, or set classes=[{most}], the "
        "positive class last, to read them so (with all spellings in it they stay classes of their own)"
    ]


def _further_columns(
    raw: pd.DataFrame, table: pd.DataFrame, wanted: Mapping[str, str], where: str
) -> tuple[pd.DataFrame, list[str]]:
    """The columns that the config names beside the standard ones, and which of them there are not."""
    there = {name: raw[name] for name in wanted if name in raw.columns}
    if "site" in wanted:
        there = {k: v for k, v in there.items() if k != "site"}
        there |= {"site": table["site"]} if "site" in table.columns else {}
    unknown = [
        f"{where}: no column {name!r} ({key}){did_you_mean(name, list(raw.columns))}. It has: {', '.join(raw.columns)}"
        for name, key in wanted.items()
        if name not in there
    ]
    cells = {name: [str(cell).strip() for cell in column] for name, column in there.items()}
    return pd.DataFrame(cells, index=table.index, dtype=object), unknown


def _unprintable(
    table: pd.DataFrame, where: str, columns: Iterable[str] = ("slide", "patient", "label", "site", "path")
) -> list[str]:
    """Names with a NUL, a line break or another character that hides in a file name, a table or on a terminal."""
    problems = []
    for column in columns:
        wrong = [
            (row, f"{column} {cell[:60]!r}")
            for row, cell in enumerate(table.get(column, []))
            if isinstance(cell, str) and CONTROL.search(cell)
        ]
        problems += _of_rows(where, wrong, "has a control character; take it out", ": ", " ")
    return problems


def write_cohort(path: Path, cohort: Cohort) -> None:
    """Write the table so that `read_cohort` gives it back."""
    write_csv(cohort.table, path)


def _standard_columns(raw: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    def text(name: str) -> list[str]:
        return [v.strip() for v in raw[name]] if name in raw.columns else [""] * len(raw)

    slides = text(columns.slide)
    mpp = pd.to_numeric(pd.Series(text(columns.mpp), dtype=object), errors="coerce").astype(float)
    site = {"site": text(columns.site)} if columns.site in raw.columns else {}
    return pd.DataFrame(
        {
            "slide": slides,
            "patient": text(columns.patient),
            "label": pd.Series(_plain_labels(text(one(columns.label))), dtype=object),
            "split": [s.lower() or "train" for s in text(columns.split)],
            "path": pd.Series([p or None for p in text(columns.path)], dtype=object),
            "mpp": mpp,
            **site,
        }
    )


def one(column: str | list[str]) -> str:
    """The column of the first of several targets, or of the only one."""
    return column if isinstance(column, str) else column[0]


def _values(table: pd.DataFrame, raw: pd.DataFrame, columns: Columns, where: str) -> tuple[pd.DataFrame, list[str]]:
    """Column value from the labels as numbers; and which cells are none."""
    value_S, wrong = _numbers([cell or "" for cell in table["label"]])
    return table.assign(value=value_S), _unread(wrong, one(columns.label), where, "a number (task=regression)")


def _survival(table: pd.DataFrame, raw: pd.DataFrame, columns: Columns, where: str) -> tuple[pd.DataFrame, list[str]]:
    """Columns time and event, the label from the event; and everything that is wrong with them.

    Without both columns nothing is known of any slide, which only a table of new slides may say.
    """
    names = {role: one(getattr(columns, role)) for role in ("time", "event")}
    missing = [f"columns.{role}={name}" for role, name in names.items() if name not in raw.columns]
    if missing:
        half = [f"{where}: no column for {missing[0]}, but one for the other; give both or neither"]
        unknown_S = np.full(len(table), np.nan)
        return table.assign(label=None, time=unknown_S, event=unknown_S), half if len(missing) == 1 else []
    cells = {role: [str(cell).strip() for cell in raw[name]] for role, name in names.items()}
    time_S, wrong = _numbers(cells["time"])
    problems = _unread(wrong, names["time"], where, "a time as a number")
    low = [cell.lower().replace(" ", "") for cell in cells["event"]]
    event_S = np.array([1.0 if cell in HAPPENED else 0.0 if cell in NOT_YET else np.nan for cell in low])
    given_S = np.array([cell not in NOTHING for cell in low])
    unknown = [(row, cells["event"][row]) for row in np.flatnonzero(np.isnan(event_S) & given_S).tolist()]
    problems += _unread(unknown, names["event"], where, "0 or 1, yes or no, 1:DECEASED or 0:LIVING")
    negative = [(row, cells["time"][row]) for row in np.flatnonzero(time_S < 0).tolist()]
    why = "0 or more: whether the event happened is said by columns.event, not by a sign"
    problems += _unread(negative, names["time"], where, why)
    has_time_S = np.array([cell.lower() not in NOTHING for cell in cells["time"]])
    for only_S, there, absent in ((given_S & ~has_time_S, "event", "time"), (has_time_S & ~given_S, "time", "event")):
        slides = table["slide"][only_S].tolist()
        if slides:
            problems.append(
                f"{where}: {count(len(slides), 'slide')} with {there} but no {absent}: {name_some(slides)}. Fill in "
                "both, or leave both empty"
            )
    label = [EVENT if e == 1 else CENSORED if e == 0 else None for e in event_S]
    return table.assign(label=pd.Series(label, dtype=object), time=time_S, event=event_S), problems


def _numbers(cells: Sequence[str]) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Finite numbers, NaN for empty cells; and (row, cell) of those that are none."""
    plain = [cell.strip() for cell in cells]
    value_S = np.array([float(cell) if NUMBER.fullmatch(cell) else np.nan for cell in plain], dtype=np.float64)
    value_S[np.isinf(value_S)] = np.nan
    return value_S, [
        (row, cell) for row, cell in enumerate(plain) if cell.lower() not in NOTHING and np.isnan(value_S[row])
    ]


def _unread(wrong: Sequence[tuple[int, str]], column: str, where: str, expected: str) -> list[str]:
    """One line for all cells of a column that are wrong in the same way."""
    if not wrong:
        return []
    comma = any(re.fullmatch(r"-?\d+,\d+", cell) for _, cell in wrong)
    shown = ", ".join(f"{cell!r:.40} in row {row + 2}" for row, cell in wrong[:5])
    shown += f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    hint = ". Write a decimal point instead of the comma" if comma else ""
    return [f"{where}: {column}: expected {expected}, got {shown}{hint}"]


def _from_barcodes(
    table: pd.DataFrame, raw: pd.DataFrame, columns: Columns, where: str
) -> tuple[pd.DataFrame, list[str]]:
    """Patient and site that the config takes from the slides' TCGA barcodes, in upper case; and which are none."""
    wanted = [role for role in ("patient", "site") if getattr(columns, role) == TCGA and TCGA not in raw.columns]
    if not wanted:
        return table, []
    found = [BARCODE.match(slide) for slide in table["slide"]]
    read = {
        "patient": [match[0].upper() if match else "unknown" for match in found],
        "site": [match[1].upper() if match else "" for match in found],
    }
    wrong = [slide for slide, match in zip(table["slide"], found, strict=True) if slide and not match]
    problems = []
    if wrong:
        keys = " and ".join(f"columns.{role}=tcga" for role in wanted)
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        problems.append(
            f"{where}: {keys}: expected slides that begin with a TCGA barcode, such as TCGA-44-2655-01Z-00-DX1, got "
            f"{', '.join(map(repr, wrong[:5]))}{more}. Name the column that says it instead"
        )
    return table.assign(**{role: read[role] for role in wanted}), problems


def site_of_barcode(slide: str) -> str:
    """The tissue source site in the slide's TCGA barcode, in upper case; "" if its name is none."""
    match = BARCODE.match(slide)
    return match[1].upper() if match else ""


def _unread_mpp(path: Path | Tables, raw: pd.DataFrame, column: str) -> list[str]:
    """What is no number must not pass for an empty cell: the file's own mpp would be used."""
    cells = [str(cell).strip() for cell in raw[column]] if column in raw.columns else []
    wrong = [
        (row, f"{column} {cell!r}")
        for row, cell in enumerate(cells)
        if cell.lower() not in NOTHING and not _positive(cell)
    ]
    comma = any("," in cell for _, cell in wrong)
    hint = ". Write decimal points instead of commas" if comma else ""
    return _of_rows(str(path), wrong, f"expected microns per pixel at level 0 such as 0.25, or nothing{hint}")


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
