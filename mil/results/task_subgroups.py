"""Sub-groups of tasks other than classification: every metric by group, and whether a group differs from the rest.

As `mil.results.subgroups` has it for classes: the test permutes who is in the group, patients as units, within strata
of the target (whether the event was seen, fifths of the number, the grade), so that the mix of targets, on which a
correlation or kappa depends, stays as it is. If predictions do not depend on the group, given target and patient,
every arrangement was as likely as the one seen (Good 2005, chapter 3). The statistic is the difference of the metric,
less its mean over the arrangements; it is not studentised, so the p value is of that null hypothesis, not of equal
metrics alone.

Where the task counts patients, one whose slides are in several groups is in none of them but in the group `several`.

Axes: N rows (slides, or patients) of all parts, U slides or patients (each once), R arrangements, P patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from extract.wording import count
from mil.results.subgroups import LEAST_PATIENTS, NUMBERS_AT_ONCE, PERMUTATIONS, arrangements, share_as_far, tested_by
from mil.results.tables import held_out, of_test_split
from mil.results.task_summary import counts, ensemble_parts, fold_parts, metrics_with_intervals
from mil.tasks.contract import Part, Task

SEVERAL = "several"
"""The group of patients whose slides are in different ones."""
FIFTHS = 5
FEW_IN_GROUPS = 0
"""Resamples of a group's slow metrics (`Task.slow`): they have no interval in a group, and are not tested."""


@dataclass(frozen=True)
class Scored:
    """A set of held-out predictions: its slides, each once, and the parts of which metrics are taken."""

    slides: pd.DataFrame
    parts: Sequence[Part]

    @property
    def table(self) -> pd.DataFrame:
        """The rows of all parts."""
        return pd.concat([part.table for part in self.parts], ignore_index=True)


def scored_sets(task: Task, predictions: pd.DataFrame) -> dict[str, Scored]:
    """The cross-validated slides and the test split of predictions.csv, of those that there are."""
    found = {}
    for name, which, parts_of in (
        ("cross_validated", held_out(predictions), fold_parts),
        ("test", of_test_split(predictions), ensemble_parts),
    ):
        parts = parts_of(task, predictions)
        if parts:
            found[name] = Scored(predictions[which].drop_duplicates("slide").reset_index(drop=True), parts)
    return found


def task_subgroups(
    task: Task,
    groups: Mapping[str, Mapping[str, str]],
    sets: Mapping[str, Scored],
    resamples: int,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> dict[str, Any]:
    """What metrics.json holds as `subgroups`, in the shape of `mil.results.subgroups.subgroups_block`.

    Args:
        groups: grouping -> slide -> name of its group.
        sets: name of the set -> its predictions.
        resamples: of the intervals; without them there are no tests either.
    """
    permutations = permutations if resamples else 0
    return {
        "least_patients": LEAST_PATIENTS,
        "permutations": permutations,
        "sets": {
            name: groups_of_set(task, groups, scored, resamples, seed, permutations)
            for name, scored in sets.items()
            if scored.parts
        },
        "method": method_of(task),
    }


NEEDED = {
    "survival": "patients with an event",
    "regression": "patients with a value",
    "ordinal": "patients with a grade, or one grade only,",
}
STRATA = {"survival": "whether the event was seen", "regression": "fifths of the target", "ordinal": "grades"}


def method_of(task: Task) -> str:
    """How groups are shown and tested, in a sentence or three."""
    slow = [task.metrics[name].title for name in task.slow]
    also = f". Without interval and test, as they are slow to compute: {', '.join(slow)}" if slow else ""
    return (
        f"groups with fewer than {LEAST_PATIENTS} {NEEDED[task.name]} are too small: counted, not scored. p: "
        f"permutation test ({PERMUTATIONS:,} arrangements) of who is in the group, patients as units, within "
        f"{STRATA[task.name]}. Holm: over all groups, for each metric{also}"
    )


def groups_of_set(
    task: Task, groups: Mapping[str, Mapping[str, str]], scored: Scored, resamples: int, seed: int, permutations: int
) -> list[dict[str, Any]]:
    """Every grouping's groups with counts, metrics and tests."""
    found: list[dict[str, Any]] = []
    tests: dict[tuple[int, int], np.ndarray] = {}
    table = scored.table
    units = units_of(table)
    for place, (said, group_of) in enumerate(groups.items()):
        name_S = scored.slides["slide"].map(group_of).to_numpy(dtype=object)
        name_N = names_of_rows(table, scored.slides, name_S)
        own: list[dict[str, Any]] = []
        for name in sorted({*map(str, name_S), *map(str, name_N)}):
            inside_N = np.asarray(name_N == name)
            own.append(one_group(task, name, scored, np.asarray(name_S == name), inside_N, resamples, seed))
            if own[-1]["no_test"] is None and permutations:
                tests[place, len(own) - 1] = inside_N[units.first_U]
        found.append({"name": said, "groups": own})
    quick = [name for name in task.metrics if name not in task.slow]

    def test(inside_U: np.ndarray) -> dict[str, tuple[float, float]]:
        return p_values(task, scored.parts, units, inside_U, quick, permutations, seed)

    for (place, row), against_rest in tested_by(tests, quick, test).items():
        found[place]["groups"][row]["against_rest"] = against_rest
    return found


def names_of_rows(table: pd.DataFrame, slides: pd.DataFrame, name_S: np.ndarray) -> np.ndarray:
    """The group of every row: of its slide, or, of a patient, of all its slides."""
    if "slide" in table:
        of_slide = dict(zip(slides["slide"], name_S, strict=True))
        return table["slide"].map(of_slide).to_numpy(dtype=object)
    names = pd.Series(name_S).groupby(slides["patient"].to_numpy()).agg(lambda own: sorted(set(own)))
    of_patient = {patient: own[0] if len(own) == 1 else SEVERAL for patient, own in names.items()}
    return table["patient"].map(of_patient).to_numpy(dtype=object)


def one_group(
    task: Task, name: str, scored: Scored, inside_S: np.ndarray, inside_N: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """Counts of a group; its metrics if it is large enough; why it is not compared with the rest, or None."""
    own, rest, table = parts_in(scored.parts, inside_N), parts_in(scored.parts, ~inside_N), scored.table
    small, rest_small = too_small(task, own), too_small(task, rest)
    finite = bool(np.isfinite(task.one_number(table)).all())
    why = (small and f"too small: {small}") or (rest_small and f"the rest is too small: {rest_small}")
    told = scored.slides[inside_S]
    if "slide" not in table and name == SEVERAL:
        told = scored.slides[scored.slides["patient"].isin(table["patient"][inside_N])]
    return {
        "name": name,
        "counts": counts(task, told),
        "too_small": small,
        "metrics": None if small else metrics_with_intervals(task, own, resamples, seed, few=FEW_IN_GROUPS),
        "no_test": why or (None if finite else "predictions are not numbers"),
        "against_rest": None,
    }


def parts_in(parts: Sequence[Part], inside_N: np.ndarray) -> list[Part]:
    """The parts with these rows only; without those that are left with none."""
    ends = np.cumsum([len(part.table) for part in parts])[:-1]
    kept = [
        Part(part.table[own_N].reset_index(drop=True), part.training)
        for part, own_N in zip(parts, np.split(inside_N, ends), strict=True)
    ]
    return [part for part in kept if len(part.table)]


def too_small(task: Task, parts: Sequence[Part]) -> str | None:
    """Of what there is too little, in words; None: enough."""
    rows = pd.concat([part.table for part in parts]) if parts else pd.DataFrame({"patient": [], "event": []})
    telling = rows[rows["event"] == 1] if task.name == "survival" else rows
    n = int(telling["patient"].nunique())
    what = " with an event" if task.name == "survival" else ""
    if n < LEAST_PATIENTS:
        return f"{count(n, 'patient')}{what}"
    if task.name == "ordinal" and rows["label"].nunique() < 2:
        return "one grade only"
    return None


# --- the test --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Slides, or patients, each once though several repeats held it out: its first row, and the unit of every row."""

    first_U: np.ndarray
    unit_N: np.ndarray


def units_of(table: pd.DataFrame) -> Units:
    key = "slide" if "slide" in table else "patient"
    _, first_U, unit_N = np.unique(table[key].to_numpy(dtype=str), return_index=True, return_inverse=True)
    return Units(first_U, unit_N.reshape(-1))


def strata_of(task: Task, table: pd.DataFrame) -> np.ndarray:
    """What has to be alike of patients that change places: event, fifth of the value, grade; int64."""
    if task.name == "survival":
        return (table["event"] == 1).to_numpy(dtype=np.int64)
    if task.name == "ordinal":
        return np.unique(table["label"].to_numpy(dtype=str), return_inverse=True)[1].astype(np.int64)
    mean_U = table.groupby("patient")["value"].transform("mean").to_numpy(dtype=float)
    edges = np.quantile(mean_U, np.arange(1, FIFTHS) / FIFTHS)
    return np.searchsorted(edges, mean_U, side="left").astype(np.int64)


def p_values(
    task: Task,
    parts: Sequence[Part],
    units: Units,
    inside_U: np.ndarray,
    names: Sequence[str],
    permutations: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """For every metric of `names`: group minus rest, and the two-sided p value.

    An arrangement in which a metric is undefined, such as one without a comparable pair, counts as far.
    """
    once = pd.concat([part.table for part in parts], ignore_index=True).iloc[units.first_U]
    patient_U = np.unique(once["patient"].to_numpy(dtype=str), return_inverse=True)[1]
    rng = np.random.default_rng([seed, len(once)])
    inside_RU = arrangements(inside_U, strata_of(task, once), patient_U, permutations, rng)
    inside_RN, ends = inside_RU[:, units.unit_N], np.cumsum([len(part.table) for part in parts])[:-1]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for rows in np.array_split(np.arange(len(inside_RN)), -(-inside_RN.size // NUMBERS_AT_ONCE)):
        inside, outside = (
            task.score(parts, np.split(side_RN.astype(np.float64), ends, axis=1), names)
            for side_RN in (inside_RN[rows], ~inside_RN[rows])
        )
        for name in names:
            found[name].append(inside[name] - outside[name])
    differences = {name: np.concatenate(values) for name, values in found.items()}
    return {name: (float(own_R[0]), share_as_far(centred(own_R))) for name, own_R in differences.items()}


def centred(difference_R: np.ndarray) -> np.ndarray:
    """Less the mean of those that are numbers."""
    known_R = np.isfinite(difference_R)
    middle = float(difference_R[known_R].mean()) if known_R.any() else 0.0
    less_R: np.ndarray = difference_R - middle
    return less_R
