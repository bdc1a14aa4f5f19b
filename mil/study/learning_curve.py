"""How much would more patients help: the same folds once more, trained on nested parts of their training patients.

The added members stand beside the study's, never among them: they have a folder of their own, and cross-validation,
test ensemble and saved members are those of the full training sets, with or without a learning curve.

Letters: M members, S slides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.wording import name_some
from mil.study.folds import stratified_order
from mil.study.roles import TRAIN, UNUSED, Plan, PlanError
from mil.study.targets import part_problems

FOLDER = "learning_curve"

FOR_SIZES = 7  # leading word of a random stream, see mil.study

ALL = 0
"""`train_size` of the study's own members: all training patients."""


def curve_plan(plan: Plan, cohort: Cohort, sizes: Sequence[int], split_seed: int) -> Plan | None:
    """For every member of `plan` and every size a further member, trained on so many of its training patients.

    The patients of a size are among those of every larger one, in proportion to their classes, and the same for all
    seeds of a fold. Test and val slides and the starting parameters are those of the full member; training slides that
    are left out become `unused`. Column `train_size` holds the size. None without sizes.

    Raises:
        PlanError: a size that is no part of the training patients, or too small to hold every class.
    """
    if not sizes:
        return None
    _raise_if([f"study.train_sizes={list(sizes)}: a size occurs twice"] if len(set(sizes)) < len(sizes) else [])
    parts, roles, problems = [], [], []
    patient_S = cohort.table["patient"].to_numpy(dtype=str)
    for m, roles_S in enumerate(plan.roles_MS):
        member = plan.members.iloc[[m]]
        train_S = np.flatnonzero(roles_S == TRAIN)
        rng = np.random.default_rng([FOR_SIZES, split_seed, int(member["repeat"].iloc[0]), int(member["fold"].iloc[0])])
        place_S = stratified_order(patient_S[train_S], cohort.labels_S[train_S], rng)
        for size in sorted(sizes):
            part_S = roles_S.copy()
            part_S[train_S[place_S >= size]] = UNUSED
            problems += _size_problems(size, place_S.max() + 1, part_S, roles_S, cohort)
            parts.append(member.assign(train_size=size))
            roles.append(part_S)
    _raise_if(list(dict.fromkeys(problems)))
    members = pd.concat(parts, ignore_index=True)
    members["member"] = len(plan) + np.arange(len(members))
    return Plan(members, np.stack(roles))


def joined(plan: Plan, curve: Plan | None) -> Plan:
    """Both as one plan, the study's own members first, to be trained together."""
    if curve is None:
        return plan
    members = pd.concat([plan.members, curve.members[plan.members.columns]], ignore_index=True)
    return Plan(members, np.concatenate([plan.roles_MS, curve.roles_MS]))


def epochs_of_equal_steps(plan: Plan, curve: Plan, epochs: int, batch_size: int) -> np.ndarray:
    """For every member of `joined(plan, curve)` the epochs in which it takes as many steps as its full member.

    An epoch of fewer slides has fewer steps: with equal epochs a small size is also trained less, and the curve shows
    the sum of both. Full members, in the plan's order, keep `epochs`.
    """
    steps_M, steps_of_curve = (-(-p.uses("train").sum(axis=1) // batch_size) for p in (plan, curve))
    full = np.repeat(steps_M, len(curve) // len(plan))  # every member's sizes follow each other
    return np.concatenate([np.full(len(plan), epochs), np.rint(epochs * full / steps_of_curve).astype(np.int64)])


def _size_problems(size: int, n_patients: int, part_S: np.ndarray, roles_S: np.ndarray, cohort: Cohort) -> list[str]:
    if not 1 <= size < n_patients:
        return [
            f"study.train_sizes: expected 1 to {n_patients - 1} patients, fewer than the {n_patients} that a fold "
            f"trains on (the full size is always there), got {size}"
        ]
    if cohort.target != "class":
        wrong = part_problems(cohort, part_S == TRAIN)
        return [f"study.train_sizes: {size} patients are too few: a member would train on {wrong}"] if wrong else []
    labels_S = cohort.labels_S
    absent = np.setdiff1d(labels_S[roles_S == TRAIN], labels_S[part_S == TRAIN])
    if len(absent):
        names = name_some(cohort.classes[c] for c in absent)
        return [f"study.train_sizes: {size} patients are too few to hold every class; without: {names}"]
    return []


def _raise_if(problems: Sequence[str]) -> None:
    if problems:
        raise PlanError("the learning curve cannot be trained", problems)
