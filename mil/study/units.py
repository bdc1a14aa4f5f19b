"""What one bag is (study.unit): a slide, or all slides of a patient.

A cohort of patients has a row a patient, under whose name in column `slide` all else goes on as for slides; column
`slides` says which slides it is of, in the order in which their tiles lie in the bag.

Axes: S slides, B bags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.wording import count, name_some
from mil.study.subgroups import is_missing

Unit = Literal["slide", "patient"]
KEY, COLUMN = "study.unit", "slides"
BETWEEN = " / "
"""Between the slides of a patient in that column: no slide's name has a slash."""
TARGETS: Mapping[str, tuple[str, ...]] = {"class": ("label",), "value": ("value",), "survival": ("time", "event")}
"""What slides of a patient must say alike, by `Cohort.target`; and the split."""


def unit_of(asked: Literal["auto", "slide", "patient"], task: str) -> Unit:
    """What a bag is: as asked; else a patient for survival, a slide for all other tasks."""
    if asked != "auto":
        return asked
    return "patient" if task == "survival" else "slide"


def slides_of_bags(table: pd.DataFrame) -> list[list[str]]:
    """The slides of every row of a table that has column slide, and of patients column slides."""
    if COLUMN not in table:
        return [[str(slide)] for slide in table["slide"]]
    return [str(cell).split(BETWEEN) for cell in table[COLUMN]]


def bag_of_slides(table: pd.DataFrame) -> dict[str, str]:
    """Slide -> name of the bag that it is part of."""
    pairs = zip(table["slide"], slides_of_bags(table), strict=True)
    return {slide: str(bag) for bag, slides in pairs for slide in slides}


def by_slide(table: pd.DataFrame, bags: pd.DataFrame | None = None) -> pd.DataFrame:
    """A table of bags with a row for each slide of them; as it is where bags are slides.

    Args:
        bags: what says which slides a bag has, where `table` does not.
    """
    own = table if bags is None else bags
    if COLUMN not in own:
        return table
    slides_of = dict(zip(own["slide"], slides_of_bags(own), strict=True))
    listed = table.assign(slide=[slides_of[bag] for bag in table["slide"]])
    return listed.drop(columns=COLUMN, errors="ignore").explode("slide", ignore_index=True)


def of_bags(slides: Sequence[str], table: pd.DataFrame) -> np.ndarray:
    """The row of `table` that each slide is part of, (S,)."""
    row_of = {slide: row for row, own in enumerate(slides_of_bags(table)) for slide in own}
    return np.array([row_of[slide] for slide in slides], dtype=np.int64)


# --- patients out of slides ----------------------------------------------------------------------------------------


def disagreements(cohort: Cohort) -> list[str]:
    """Patients that cannot be one bag: their slides have different targets, or different splits; a line for a kind."""
    problems = []
    known = cohort.table[cohort.labels_S >= 0]
    for columns, table in ((TARGETS[cohort.target], known), (("split",), cohort.table)):
        differ = table.groupby("patient")[list(columns)].nunique().max(axis=1) if len(table) else pd.Series(dtype=int)
        patients = differ.index[differ > 1].tolist()
        if patients:
            problems.append(
                f"{KEY}=patient: {count(len(patients), 'patient')} whose slides have different "
                f"{' or '.join(column + 's' for column in columns)}: {name_some(patients)}. All slides of a patient "
                "are one bag; correct the table, or set study.unit=slide"
            )
    return problems


def as_patients(cohort: Cohort) -> tuple[Cohort, list[str]]:
    """The cohort with a row a patient, in the order of their first slides, and what the report is to say of it.

    A cohort in which every patient has one slide stays as it is. `disagreements` must have found nothing.
    """
    table = cohort.table
    if table["patient"].is_unique:
        return cohort, []
    groups = {str(patient): np.asarray(rows) for patient, rows in table.groupby("patient", sort=False).indices.items()}
    notes = [
        f"{KEY}=patient: all slides of a patient are one bag ({count(len(groups), 'patient')}, "
        f"{count(len(table), 'slide')}). Where this page counts slides it counts such bags; in predictions.csv and "
        "roles.csv column slide is the patient's name, and column slides lists its slides"
    ]
    labelled_S = cohort.labels_S >= 0
    first = [next((row for row in rows if labelled_S[row]), rows[0]) for rows in groups.values()]
    partly = [name for name, rows in groups.items() if labelled_S[rows].any() and not labelled_S[rows].all()]
    if partly:
        notes.append(
            f"{count(len(partly), 'patient')} with slides of which only some have a label, which counts for all: "
            f"{name_some(partly)}"
        )
    joined = table.iloc[first].reset_index(drop=True)
    slides: list[str] = table["slide"].astype(str).tolist()
    own: dict[str, Any] = {"slide": list(groups), "path": None, "mpp": np.nan}
    own[COLUMN] = [BETWEEN.join(slides[row] for row in rows) for rows in groups.values()]
    if "site" in table:
        own["site"], said = one_cell(table["site"].tolist(), groups, "site")
        notes += said
    further = cohort.further
    if further is not None:
        columns = {}
        for name in further:
            columns[name], said = one_cell(further[name].tolist(), groups, str(name))
            notes += said if name != "site" else []
        further = pd.DataFrame(columns, dtype=object)
    return replace(cohort, table=joined.assign(**own), further=further), notes


def one_cell(cells: Sequence[str], groups: Mapping[str, np.ndarray], column: str) -> tuple[list[str], list[str]]:
    """What the slides of each patient say alike; nothing where they do not, with a note."""
    found, differ = [], []
    for patient, rows in groups.items():
        said = list(dict.fromkeys(cells[row] for row in rows if not is_missing(cells[row])))
        found.append(said[0] if len(said) == 1 else "")
        differ += [patient] if len(said) > 1 else []
    notes = [
        f"{KEY}=patient: {count(len(differ), 'patient')} whose slides say different things in column {column}, which "
        f"count as saying nothing: {name_some(differ)}"
    ]
    return found, notes if differ else []
