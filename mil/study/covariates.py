"""`columns.covariates`: what the table says of a patient beside the slides, as columns that every member can scale.

A column of numbers stays one column; a column of text becomes one column a category. What is missing is NaN, and so is
a category that the study does not know: both become 0 once a member has scaled them, which is the average patient of
its training slides (`mil.aggregators.covariates`).

Axes: S slides, V columns, M members, P patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.cells import NUMBER
from extract.tables import read_texts, write_csv
from extract.wording import at_most, count, name_some
from mil.study.subgroups import is_missing

KEY = "columns.covariates"
FILE = "covariates.csv"
MOST_CATEGORIES = 20
"""Of a column of text; more are a name, not a group, and leave few patients for each."""
AS_AVERAGE = "scored as of an average training patient"
LEAST_FOR_AN_IDENTIFIER = 10
"""Patients from which on whole numbers, a different one for each, are taken for an identifier."""


@dataclass(frozen=True)
class Covariate:
    """A column of the cohort. categories: of text, in alphabetical order; none of numbers."""

    name: str
    categories: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """What the columns of the design are called."""
        return [f"{self.name}={category}" for category in self.categories] or [self.name]

    def raw(self, cells: Sequence[str]) -> np.ndarray:
        """(S, columns) float32: the number, or 1 in the category's column and 0 in the others; NaN where unknown."""
        if not self.categories:
            value_S = np.array([np.nan if is_missing(cell) else float(cell) for cell in cells], dtype=np.float32)
            return np.where(np.isfinite(value_S), value_S, np.float32(np.nan))[:, None]
        one_hot = np.eye(len(self.categories), dtype=np.float32)
        nothing = np.full(len(self.categories), np.nan, dtype=np.float32)
        row_of = dict(zip(self.categories, one_hot, strict=True))
        return np.array([row_of.get(cell, nothing) for cell in cells], dtype=np.float32).reshape(len(cells), -1)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "categories": list(self.categories)}


def covariates_of(described: Sequence[Mapping[str, Any]]) -> list[Covariate]:
    """Covariates from what `Covariate.describe` gave."""
    return [Covariate(str(one["name"]), tuple(map(str, one["categories"]))) for one in described]


def found_in(further: pd.DataFrame, names: Sequence[str]) -> list[Covariate]:
    """What kind each column is: numbers where every cell that says something is one."""
    found = []
    for name in names:
        said = sorted({cell for cell in further[name] if not is_missing(cell)})
        found.append(Covariate(name, () if all(map(NUMBER.fullmatch, said)) else tuple(said)))
    return found


def raw_columns(covariates: Sequence[Covariate], further: pd.DataFrame) -> np.ndarray:
    """(S, V) float32 of all covariates side by side."""
    return np.concatenate([one.raw(further[one.name].tolist()) for one in covariates], axis=1)


# --- what is wrong, and what is to be known ------------------------------------------------------------------------


def spelling_problems(names: Sequence[object]) -> list[str]:
    """What is wrong with the list itself, before there is a cohort."""
    texts = [str(name) for name in names]
    return [f"{KEY}: {name!r} occurs twice" for name in sorted({text for text in texts if texts.count(text) > 1})]


def problems_of(covariates: Sequence[Covariate], table: pd.DataFrame, further: pd.DataFrame) -> list[str]:
    """Covariates that say nothing (constant, empty), or name the patient, on the slides that members can train on."""
    train_S = (table["split"] == "train").to_numpy()
    patients = table["patient"]
    problems = []
    for one in covariates:
        cells = further[one.name]
        said = sorted({cell for cell in cells[train_S] if not is_missing(cell)})
        n_patients = patients[~cells.map(is_missing)].nunique()
        if len(said) < 2:
            what = f"{said[0]!r} for every slide" if said else "empty for every slide"
            problems.append(
                f"{KEY}: column {one.name!r} is {what} of the train split: it can tell nothing; leave it out"
            )
        elif len(one.categories) > MOST_CATEGORIES or (one.categories and len(one.categories) == n_patients > 2):
            problems.append(_too_many(one, n_patients))
    return problems


def _too_many(one: Covariate, n_patients: int) -> str:
    numbers = [name for name in one.categories if NUMBER.fullmatch(name)]
    others = [name[:40] for name in one.categories if not NUMBER.fullmatch(name)]
    shown, column = name_some((name[:40] for name in one.categories), 3), f"{KEY}: column {one.name!r}"
    if len(numbers) > len(others):
        wanted = "Expected numbers, or nothing where a value is unknown"
        return f"{column} holds numbers and text: {name_some(others, 3)}. {wanted}"
    if len(one.categories) == n_patients:
        return f"{column} has a value of its own for every patient ({shown}): an identifier, not a covariate"
    return f"{column} has {len(one.categories)} categories ({shown}), expected at most {MOST_CATEGORIES}"


def notes_on(covariates: Sequence[Covariate], table: pd.DataFrame, further: pd.DataFrame) -> list[str]:
    """What is missing, what looks like an identifier, and patients whose slides differ."""
    notes = []
    for one in covariates:
        cells = further[one.name]
        empty = int(cells.map(is_missing).sum())
        if empty:
            how = "the average of each member's training patients stands in"
            notes.append(f"covariate {one.name}: {count(empty, 'slide')} of {len(cells)} without a value; {how}")
        of_patient = cells[~cells.map(is_missing)].groupby(table["patient"])
        differ = of_patient.nunique()
        who = differ.index[differ > 1].tolist()
        if who:
            notes.append(
                f"covariate {one.name}: differs between slides of {count(len(who), 'patient')}: {name_some(who)}"
            )
        if not one.categories and looks_like_identifier(of_patient.first().tolist()):
            notes.append(
                f"covariate {one.name}: whole numbers, another one for each of {len(differ)} patients: is it an "
                "identifier? Such a column only tells patients apart"
            )
    return notes


def looks_like_identifier(cells: Sequence[str]) -> bool:
    """Whole numbers, a different one for every patient."""
    values = {float(cell) for cell in cells}
    whole = all(value.is_integer() for value in values)
    return whole and len(values) == len(cells) >= LEAST_FOR_AN_IDENTIFIER


def cell_problems(covariates: Sequence[Covariate], further: pd.DataFrame, where: str) -> list[str]:
    """Text where a trained study has numbers, in a table of new slides."""
    problems = []
    for one in (c for c in covariates if not c.categories):
        wrong = [
            f"{where}: row {row + 2}: {one.name} {cell[:40]!r}, expected a number or nothing ({KEY})"
            for row, cell in enumerate(further[one.name])
            if not is_missing(cell) and not NUMBER.fullmatch(cell)
        ]
        problems += at_most(wrong, 5)
    return problems


def notes_on_new(covariates: Sequence[Covariate], further: pd.DataFrame) -> list[str]:
    """Of new slides: how many say nothing of a covariate, and how many say what the study has never seen."""
    notes = []
    for one in covariates:
        cells = further[one.name].tolist()
        empty = sum(map(is_missing, cells))
        new = [cell for cell in cells if one.categories and not is_missing(cell) and cell not in one.categories]
        if empty:
            notes.append(f"covariate {one.name}: {count(empty, 'slide')} without a value, {AS_AVERAGE}")
        if new:
            kinds = name_some(sorted({cell[:40] for cell in new}))
            known = ", ".join(one.categories)
            notes.append(
                f"covariate {one.name}: {count(len(new), 'slide')} of a category that the study does not know: {kinds} "
                f"(it knows {known}), {AS_AVERAGE}"
            )
    return notes


# --- in a run folder ------------------------------------------------------------------------------------------------


def save_covariates(folder: Path, table: pd.DataFrame, further: pd.DataFrame, covariates: Sequence[Covariate]) -> None:
    """Write covariates.csv: slide and the cells of its covariates, which drawing a slide needs again."""
    names = [one.name for one in covariates]
    write_csv(pd.concat([table[["slide"]], further[names]], axis=1), folder / FILE)


def read_covariates(folder: Path) -> pd.DataFrame:
    """What `save_covariates` wrote, as text.

    Raises:
        TableError: it is not there, or damaged.
    """
    return read_texts(folder / FILE)


# --- scales ----------------------------------------------------------------------------------------------------------


def moments(
    covariates: Sequence[Covariate], raw_SV: np.ndarray, train_MS: np.ndarray, patients: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of every column over each member's training patients, (M, V) float32 each.

    A patient counts once, with the mean of what the slides say. Scale: 1 / deviation of numbers (0 where they are all
    alike), 1 of categories, whose mean is the share of patients; 0 for a category that the member has not seen.
    """
    _, patient_S = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    text_V = np.concatenate([[bool(one.categories)] * len(one.columns) for one in covariates])
    same_M = np.unique(train_MS, axis=0, return_inverse=True)
    found = [_moments_of(raw_SV[train_S], patient_S[train_S], text_V) for train_S in same_M[0].astype(bool)]
    mean_UV, scale_UV = (np.stack(part).astype(np.float32) for part in zip(*found, strict=True))
    rows_M = same_M[1].reshape(-1)
    return mean_UV[rows_M], scale_UV[rows_M]


def _moments_of(raw_NV: np.ndarray, patient_N: np.ndarray, text_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n_columns = raw_NV.shape[1]
    mean_V, scale_V = np.zeros(n_columns), np.ones(n_columns)
    for v in range(n_columns):
        there = ~np.isnan(raw_NV[:, v])
        if not there.any():
            scale_V[v] = 0.0
            continue
        slides_P = np.bincount(patient_N[there])
        sums_P = np.bincount(patient_N[there], weights=raw_NV[there, v].astype(np.float64))
        value_P = sums_P[slides_P > 0] / slides_P[slides_P > 0]
        mean_V[v], sd = value_P.mean(), value_P.std()
        if not text_V[v]:
            scale_V[v] = 1 / sd if sd > 1e-6 * max(1.0, abs(mean_V[v])) else 0.0
    return mean_V, scale_V
