"""Folds from the user's own file (study.folds_csv)."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.config import did_you_mean
from extract.tables import TableError, read_texts
from extract.wording import count, name_some
from mil.study.roles import (
    ROLES,
    TEST,
    TRAIN,
    VAL,
    PlanError,
    Round,
    fixed_roles,
    free_slides,
    official_test,
    patients_with_two_roles,
    plan_of_rounds,
    raise_if,
)
from mil.study.units import COLUMN, slides_of_bags


def given_rounds(
    path: Path, cohort: Cohort, dropped: Collection[str], val_fraction: float
) -> tuple[list[Round], list[str]]:
    """The rounds of the user's file and everything that is wrong with it."""
    table, problems = _read_folds(path)
    row_of = {slide: row for row, own in enumerate(slides_of_bags(cohort.table)) for slide in own}
    problems += _unknown_slides(path, table, row_of, dropped)
    table = table[table["slide"].isin(list(row_of))]
    table = table.assign(row=table["slide"].map(row_of).astype("int64"))
    problems += _misplaced_slides(path, table, cohort)
    table = table[table["fold"] >= 0]
    problems += _split_patients(path, table, cohort)
    rounds, more = (_rounds_from_roles if "role" in table else _rounds_from_folds)(path, table, cohort)
    problems += more
    if val_fraction > 0 and any((r.roles_S == VAL).any() for r in rounds if "role" in table):
        problems.append(f"{path} has role val already: expected study.val_fraction=0, got {val_fraction:g}")
    if not rounds:
        return rounds, [*problems, f"{path}: no usable fold in it"]
    draft = plan_of_rounds(rounds, [0], 1.0, 0.0)
    leaks = [
        f"{path}: {rounds[member].name}: patient {patient!r} is in {' and '.join(roles)}"
        for member, patient, roles in patients_with_two_roles(draft, cohort)
    ]
    return rounds, problems + leaks


def _unknown_slides(path: Path, table: pd.DataFrame, row_of: dict[str, int], dropped: Collection[str]) -> list[str]:
    unknown = [s for s in dict.fromkeys(table["slide"]) if s not in row_of and s not in dropped]
    if not unknown:
        return []
    hint = did_you_mean(unknown[0], list(row_of))
    return [f"{path}: {count(len(unknown), 'slide')} not in the cohort: {name_some(unknown)}{hint}"]


def _split_patients(path: Path, table: pd.DataFrame, cohort: Cohort) -> list[str]:
    """Patients that are one bag, whose slides the file puts into different folds or roles."""
    if COLUMN not in cohort.table:
        return []
    keys, said = (["row", "repeat", "fold"], "role") if "role" in table else (["row", "repeat"], "fold")
    n_R = table.groupby(keys)[said].nunique()
    rows = n_R.index.get_level_values("row")[n_R > 1].unique()
    if not len(rows):
        return []
    names = cohort.table["slide"].iloc[rows].tolist()
    return [f"{path}: {count(len(names), 'patient')} whose slides are in different {said}s: {name_some(names)}"]


def _misplaced_slides(path: Path, table: pd.DataFrame, cohort: Cohort) -> list[str]:
    """Slides of the official test split that the file wants elsewhere. A blank fold is right for them."""
    elsewhere = ~table["role"].isin(["test", ""]) if "role" in table else table["fold"] >= 0
    wrong = table["slide"][official_test(cohort)[table["row"]] & elsewhere].unique()
    if not len(wrong):
        return []
    return [
        f"{path}: slides of the cohort's test split are test for every fold, the file cannot place them: "
        f"{name_some(wrong)}. Take them out of the file, or empty their split in the cohort"
    ]


def _read_folds(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Columns slide, repeat, fold (-1 = blank) and, if the file has it, role; and what could not be read."""
    try:
        raw = read_texts(path)
    except TableError as error:
        raise PlanError("the folds cannot be read", error.problems) from None
    known = ["slide", "fold", "repeat", "role"]
    absent = [name for name in known if name not in raw.columns]
    unread = [c for c in raw.columns if c not in known and difflib.get_close_matches(c.lower(), absent, cutoff=0.75)]
    problems = [f"{path}: column {c!r} is not read{did_you_mean(c.lower(), absent)}" for c in unread]
    problems += [
        f"{path}: no column {name!r}; it has {', '.join(raw.columns)}" for name in absent if name in ("slide", "fold")
    ]
    raise_if("the folds cannot be read", problems)
    table = pd.DataFrame({"slide": raw["slide"].str.strip()})
    for name in ("repeat", "fold"):
        text = raw[name].str.strip().str.removesuffix(".0") if name in raw else pd.Series("0", index=raw.index)
        blank = (text == "") & (name == "fold")
        bad = ~text.str.fullmatch(r"[0-9]{1,9}") & ~blank
        problems += _bad_cells(path, text[bad], f"{name} {{}}, expected a whole number from 0")
        table[name] = pd.to_numeric(text.mask(bad | blank, "-1")).astype("int64")
    if "role" in raw:
        table["role"] = raw["role"].str.strip().str.lower()
        bad = ~table["role"].isin(ROLES) & (table["fold"] >= 0)
        problems += _bad_cells(path, table["role"][bad], f"role {{}}, expected one of {', '.join(ROLES)}")
        table = table[~bad]
    return table[table["repeat"] >= 0], problems


def _bad_cells(path: Path, cells: pd.Series, what: str) -> list[str]:
    pairs = zip(cells.index.tolist(), cells.tolist(), strict=True)
    return [f"{path}: row {row + 2}: {what.format(repr(cell))}" for row, cell in pairs]


def _rounds_from_folds(path: Path, table: pd.DataFrame, cohort: Cohort) -> tuple[list[Round], list[str]]:
    """Each slide is test in its fold and train in the repeat's others."""
    free_S, rounds, problems = free_slides(cohort), [], []
    for repeat in sorted(table["repeat"].unique().tolist()):
        rows = table[table["repeat"] == repeat]
        problems += _row_problems(f"{path}: repeat {repeat}", rows, cohort)
        fold_S = np.full(len(cohort), -1)
        fold_S[rows["row"]] = rows["fold"]
        names = np.unique(fold_S[free_S & (fold_S >= 0)])
        if len(names) < 2:
            problems.append(f"{path}: repeat {repeat}: expected at least two folds, got {len(names)}")
        for fold in names:
            roles_S = fixed_roles(cohort)
            listed_S = free_S & (fold_S >= 0)
            roles_S[listed_S] = np.where(fold_S[listed_S] == fold, TEST, TRAIN)
            rounds.append(Round(repeat, int(fold), roles_S))
    return rounds, problems


def _rounds_from_roles(path: Path, table: pd.DataFrame, cohort: Cohort) -> tuple[list[Round], list[str]]:
    """Each row gives a slide's role in one fold."""
    official_S, labels_S, rounds, problems = official_test(cohort), cohort.labels_S, [], []
    for repeat, fold in sorted(set(zip(table["repeat"].tolist(), table["fold"].tolist(), strict=True))):
        rows = table[(table["repeat"] == repeat) & (table["fold"] == fold)]
        part = Round(repeat, fold, fixed_roles(cohort))
        problems += _row_problems(f"{path}: {part.name}", rows, cohort)
        mine = rows[~official_S[rows["row"]]]
        role_R = mine["role"].map(ROLES.index).to_numpy(dtype=np.int8)
        unlabelled = mine["slide"][(labels_S[mine["row"]] < 0) & np.isin(role_R, [TRAIN, VAL])]
        if len(unlabelled):
            problems.append(f"{path}: {part.name}: unlabelled slides cannot be train or val: {name_some(unlabelled)}")
        part.roles_S[mine["row"]] = role_R
        rounds.append(part)
    return rounds, problems


def _row_problems(where: str, rows: pd.DataFrame, cohort: Cohort) -> list[str]:
    """Slides that are listed twice, or not at all though they have a label and no official role."""
    problems = []
    twice = rows["slide"][rows["slide"].duplicated()].unique()
    if len(twice):
        problems.append(f"{where}: listed more than once: {name_some(twice)}")
    listed_S = np.zeros(len(cohort), dtype=bool)
    listed_S[rows["row"]] = True
    absent = cohort.table["slide"][free_slides(cohort) & ~listed_S]
    if len(absent):
        problems.append(f"{where}: {count(len(absent), 'slide')} of the cohort not listed: {name_some(absent)}")
    return problems
