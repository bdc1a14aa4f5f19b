"""What folds must have of a target that is no class: events to compare, and values that differ."""

from __future__ import annotations

import numpy as np

from extract.cohort import Cohort
from extract.wording import count
from mil.study.roles import ROLES, TEST, TRAIN, VAL, Round, free_slides, official_test, patient_index

NEEDED = {"value": 2, "survival": 1}
"""Patients that every fold must hold: with different values, with an event."""


def telling(cohort: Cohort) -> np.ndarray:
    """Bool (S,): slides that a fold must have some of: with an event, or with a value."""
    if cohort.target == "survival":
        return np.asarray(cohort.table["event"] == 1)
    return np.asarray(cohort.table["value"].notna())


def noun(cohort: Cohort) -> str:
    return "patient with an event" if cohort.target == "survival" else "patient with a value"


def patients_in(cohort: Cohort, which_S: np.ndarray) -> int:
    return len(np.unique(patient_index(cohort)[1][which_S & telling(cohort)]))


def size_problems(cohort: Cohort, folds: int, val_fraction: float) -> list[str]:
    """Too few patients for the folds, or nothing to report on."""
    free_S = free_slides(cohort)
    n, needed = patients_in(cohort, free_S), NEEDED[cohort.target] * folds
    what = noun(cohort).replace("patient", "patients")
    problems = []
    if n < needed:
        fewest = n // NEEDED[cohort.target]
        advice = f"use study.folds={fewest} or fewer" if fewest > 1 else "add patients"
        problems.append(f"{n} {what} outside the test split, but study.folds={folds} needs {needed}: {advice}")
    if folds == 1 and not official_test(cohort).any() and val_fraction == 0:
        problems.append(
            "study.folds=1 trains on every slide and the cohort has no test split, so nothing is left to report on: "
            "use study.folds=5, mark test slides in the split column, or set study.val_fraction"
        )
    return problems


def part_problems(cohort: Cohort, which_S: np.ndarray) -> str:
    """Why these slides cannot be learned from or scored; "" where they can."""
    if cohort.target == "survival":
        return "" if (which_S & telling(cohort)).any() else "no event"
    values = np.unique(cohort.table["value"].to_numpy(dtype=float)[which_S & telling(cohort)])
    return "" if len(values) > 1 else "no two different values"


def round_problems(part: Round, cohort: Cohort, what_to_do: str) -> list[str]:
    """Why this round could not be trained or scored."""
    problems = []
    for role in (TRAIN, VAL, TEST):
        here_S = (part.roles_S == role) & ~official_test(cohort)
        wrong = part_problems(cohort, here_S) if here_S.any() or role == TRAIN else ""
        if wrong:
            n = count(int(here_S.sum()), "slide")
            problems.append(f"{part.name}: {ROLES[role]} has {wrong} ({n}), its metric is undefined: {what_to_do}")
    if not np.isin(part.roles_S, [VAL, TEST]).any():
        problems.append(f"{part.name}: no slide is val or test, so nothing is left to report on: {what_to_do}")
    return problems


def inner_problems(name: str, roles_FS: np.ndarray, cohort: Cohort) -> list[str]:
    """Inner folds that cannot be trained or scored."""
    return [
        f"{name} inner fold {f}: {ROLES[role]} has {wrong}: use a smaller study.nested"
        for f, roles_S in enumerate(roles_FS)
        for role in (TRAIN, VAL)
        if (wrong := part_problems(cohort, roles_S == role))
    ]
