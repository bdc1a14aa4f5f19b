"""The members of a permutation test: the study once more on permuted labels, folds and all, as often as asked for.

The null hypothesis is that the features say nothing about the labels. What is exchangeable then (Ojala and Garriga,
JMLR 2010, test 1; Good 2005, chapter 3):

* Labels of patients, not of slides: slides of a patient resemble each other, and so do their labels.
* Within the official split: train labels among train patients, test labels among test patients, so that both keep their
  class mix. All labels of a permutation are permuted, also those of held-out slides, against which it is scored: only
  then is the permuted study drawn from the distribution of the study itself.
* Among patients with as many labelled slides, where at least `LEAST_STRATUM` have as many (the others form one group):
  how many slides a patient has may go with its label without the features saying anything. A patient whose slides have
  several labels hands them on, in any order, to one of the kind with as many slides.
* Folds are stratified by label, so they follow from the labels: a permuted study has folds of its own, dealt anew from
  its own labels by the same seed. With the folds of the true labels a permuted study would not be stratified, and the
  pooled out-of-fold AUC of noise would be lower in it than in the study. Folds of the user's own (`study.folds_csv`)
  do not follow from anything here: there labels stay within the patients that have the same roles throughout.

With nested cross-validation the choice is part of the study, so that each permutation chooses learning rate, weight
decay and epochs anew, on inner folds dealt by its own labels.

Of tasks other than classification the target takes the label's place: the number, time and event together, the grade.
The strata of the folds follow from it, so each permutation has its own.

Sites are not held fixed: where the label follows the site, a small p value may be the site's doing.

Axes: M members, S slides, N permutations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from mil.study.roles import Plan, PlanError, official_test, patient_index

LEAST_STRATUM = 10
"""Patients with as many slides that exchange labels among themselves alone."""
Told = Callable[[Cohort, np.ndarray], Cohort]
"""Cohort and whose target each slide gets, (S,) -> the cohort that says so."""
FOR_PERMUTATIONS = 11  # leading word of a random stream


@dataclass(frozen=True, eq=False)
class Permuted:
    """All members of all permutations, one permutation after the other. `labels_MS`: what each is told of the slides.

    n: how many permutations. sources_NS: whose target each slide gets in each of them; `told` makes the cohort of it.
    """

    plan: Plan
    labels_MS: np.ndarray
    n: int
    sources_NS: np.ndarray
    told: Told

    def cohort(self, cohort: Cohort, k: int) -> Cohort:
        """The cohort as permutation k has it."""
        return self.told(cohort, self.sources_NS[k])

    def rows(self, k: int) -> np.ndarray:
        """The members of permutation k, as rows of the plan."""
        size = len(self.plan) // self.n
        return np.arange(k * size, (k + 1) * size)


def with_targets_of(cohort: Cohort, source_S: np.ndarray, columns: Sequence[str] = ("label",)) -> Cohort:
    """The cohort in which every slide has the target of another one; strata of folds are not made anew."""
    moved = {name: cohort.table[name].to_numpy()[source_S] for name in columns}
    return replace(cohort, table=cohort.table.assign(**moved))


def permute(
    cohort: Cohort,
    plan_of: Callable[[Cohort], Plan],
    n: int,
    seed: int,
    *,
    first: int,
    fixed: Plan | None = None,
    told: Told = with_targets_of,
) -> Permuted:
    """`n` permutations of the study that `plan_of` makes of a cohort.

    Args:
        first: number of the first member.
        fixed: the plan where it does not depend on labels.
        told: makes the cohort in which every slide has the target of another.

    Raises:
        PlanError: permuted labels cannot be dealt into folds.
    """
    members, roles, labels, sources = [], [], [], []
    for k in range(n):
        sources.append(permuted_sources(cohort, np.random.default_rng([FOR_PERMUTATIONS, seed, k]), fixed))
        permuted = told(cohort, sources[-1])
        try:
            plan = plan_of(permuted)
        except PlanError as error:
            raise PlanError(f"permutation {k + 1} of {n} cannot be dealt into folds", error.problems) from None
        members.append(plan.members)
        roles.append(plan.roles_MS)
        labels.append(np.tile(permuted.labels_S, (len(plan), 1)))
    table = pd.concat(members, ignore_index=True)
    table["member"] = first + np.arange(len(table))
    return Permuted(Plan(table, np.concatenate(roles)), np.concatenate(labels), n, np.stack(sources), told)


def permuted_labels(cohort: Cohort, rng: np.random.Generator, fixed: Plan | None = None) -> np.ndarray:
    """Labels (S,) handed on among patients that could as well have had them; -1 stays where there is none."""
    labels_S: np.ndarray = cohort.labels_S[permuted_sources(cohort, rng, fixed)]
    return labels_S


def permuted_sources(cohort: Cohort, rng: np.random.Generator, fixed: Plan | None = None) -> np.ndarray:
    """The slide whose target each gets, (S,), among patients that could as well have had it; itself without a label."""
    kind_S, source_S = targets_of(cohort), np.arange(len(cohort))
    for patients in strata(cohort, fixed).values():
        givers = [patients[i] for i in rng.permutation(len(patients))]
        for slides, from_slides in zip(patients, givers, strict=True):
            uniform = len(set(kind_S[from_slides])) == 1
            source_S[slides] = from_slides[0] if uniform else rng.permutation(from_slides)
    return source_S


def targets_of(cohort: Cohort) -> np.ndarray:
    """A number for every target that occurs, (S,); -1 without one."""
    columns = {"class": ["label"], "value": ["value"], "survival": ["time", "event"]}[cohort.target]
    kind_S = cohort.table.groupby(columns, dropna=False, sort=False).ngroup().to_numpy(dtype=np.int64)
    return np.where(cohort.labels_S < 0, -1, kind_S)


def strata(cohort: Cohort, fixed: Plan | None = None) -> dict[tuple[object, ...], list[np.ndarray]]:
    """Patients that exchange labels, as the rows of their labelled slides."""
    labels_S, patient_S, test_S = targets_of(cohort), patient_index(cohort)[1], official_test(cohort)
    uniform: dict[tuple[object, ...], list[np.ndarray]] = {}
    found: dict[tuple[object, ...], list[np.ndarray]] = {}
    rows_of = pd.Series(np.flatnonzero(labels_S >= 0)).groupby(patient_S[labels_S >= 0])
    for rows in (group.to_numpy() for _, group in rows_of):
        place = (bool(test_S[rows[0]]), b"" if fixed is None else fixed.roles_MS[:, rows[0]].tobytes())
        kept = uniform if len(set(labels_S[rows])) == 1 else found
        kept.setdefault((*place, len(rows), "mixed" if kept is found else ""), []).append(rows)
    for key, patients in uniform.items():
        kind = key if len(patients) >= LEAST_STRATUM else (*key[:2], "other")
        found.setdefault(kind, []).extend(patients)
    return found
