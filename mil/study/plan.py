"""The plan of a study: which members are trained, and which role every slide has for each of them.

Letters: M members, S slides of the cohort, P patients, C classes, K folds.

What selects (early stopping, best epoch, threshold) may look at `val`, what is reported is `test`, and within a
member a patient has one role. `make_plan` and `load_plan` refuse to return a plan for which that is not so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from extract.cohort import Cohort
from extract.wording import count
from mil.study.folds import deal_slides, hold_out
from mil.study.own_folds import given_rounds
from mil.study.problems import (
    argument_problems,
    class_problems,
    folds_without_a_class,
    site_problems,
    size_problems,
    split_problems,
)
from mil.study.roles import (
    TEST,
    TRAIN,
    VAL,
    Plan,
    Round,
    fixed_roles,
    free_slides,
    patient_index,
    patients_with_two_roles,
    plan_of_rounds,
    raise_if,
    site_index,
    sites_with_two_roles,
)
from mil.study.sites import deal_sites

FOR_FOLDS, FOR_VAL = 1, 2  # leading word of a random stream; never 0, which SeedSequence cannot tell from nothing


def make_plan(
    cohort: Cohort,
    *,
    folds: int = 5,
    repeats: int = 1,
    seeds: Sequence[int] = (0,),
    val_fraction: float = 0.0,
    folds_csv: Path | None = None,
    lr: float,
    weight_decay: float,
    split_seed: int = 0,
    dropped: Collection[str] = (),
    site_preserving: bool = False,
) -> Plan:
    """Members = repeats x folds x seeds, in this order, and the role of every slide for each.

    Slides of the official test split are `test` for every member. Unlabelled slides of the train split are `unused`.
    All others are `test` in one fold of a repeat and `train` (or `val`) in its other folds. Folds are grouped by
    patient and stratified by label, see `deal_folds`. They depend on `split_seed` and the repeat only: not on the
    order of the cohort's rows, and all seeds share them.

    A patient may have slides of several labels. They stay together, and the patient is stratified as its rarest label:
    the one that the fewest patients have (one tumour slide among normal ones makes a tumour patient where those are
    rare, which a majority would hide).

    Args:
        cohort: the slides.
        folds: K; 1 trains on the whole train split, once per repeat and seed, and needs a test split or `val_fraction`.
        repeats: how many times the folds are drawn anew.
        seeds: one member each, with its own initialisation; 0 is a seed.
        val_fraction: this part of each member's training patients becomes `val`, grouped and stratified too; at least
            one patient of each class on both sides.
        folds_csv: the user's own folds instead of drawn ones; `folds` and `repeats` are then taken from the file.
            Columns slide, fold and optionally repeat: the fold in which the slide is test. With a column role as well:
            the role (train, val, test, unused) of the slide in this fold, one row for each slide and fold.
        lr, weight_decay: of every member.
        split_seed: decides the folds and the inner split.
        dropped: slides taken out of the cohort on purpose, which `folds_csv` may still list.
        site_preserving: a site (the cohort's column) has one role per member too, see `mil.study.sites`.

    Raises:
        PlanError: all reasons why this cannot be done without a leak or a fold that cannot be trained or scored.
    """
    raise_if("the study is set up wrongly", argument_problems(folds, repeats, seeds, val_fraction, split_seed))
    problems = split_problems(cohort)
    if site_preserving:
        problems += site_problems(cohort, folds if folds_csv is None else 1)
    if folds_csv is None:
        problems += size_problems(cohort, folds, val_fraction)
        raise_if("the folds cannot be made", problems)
        rounds = _drawn_rounds(cohort, folds, repeats, split_seed, site_preserving)
        problems = folds_without_a_class(rounds, cohort) if site_preserving and folds > 1 else []
        raise_if("the folds cannot be made", problems)
    else:
        rounds, in_file = given_rounds(folds_csv, cohort, dropped, val_fraction)
        raise_if("the folds cannot be used", problems + in_file)
    if val_fraction > 0:
        rounds, problems = with_val(rounds, cohort, val_fraction, split_seed, site_preserving)
    for part in rounds:
        problems += class_problems(part, cohort, folds_csv)
    raise_if("the folds cannot be used", problems)
    plan = plan_of_rounds(rounds, seeds, lr, weight_decay)
    refuse_leaks(plan, cohort)
    if site_preserving:
        _refuse_sites_on_two_sides(plan, cohort)
    return plan


def refuse_leaks(plan: Plan, cohort: Cohort) -> None:
    leaks = patients_with_two_roles(plan, cohort)
    lines = [f"member {member}: patient {patient!r} is in {' and '.join(roles)}" for member, patient, roles in leaks]
    raise_if("patients with more than one role", lines)


def _drawn_rounds(
    cohort: Cohort, folds: int, repeats: int, split_seed: int, site_preserving: bool = False
) -> list[Round]:
    free_S, rounds = free_slides(cohort), []
    for repeat in range(repeats):
        rng = np.random.default_rng([FOR_FOLDS, split_seed, repeat])
        fold_S = np.full(len(cohort), -1)  # with one fold nothing is held out
        if folds > 1:
            fold_S[free_S] = deal_slides(cohort, free_S, folds, rng, site_preserving=site_preserving)
        for fold in range(folds):
            roles_S = fixed_roles(cohort)
            roles_S[free_S] = np.where(fold_S[free_S] == fold, TEST, TRAIN)
            rounds.append(Round(repeat, fold, roles_S))
    return rounds


def with_val(
    rounds: Sequence[Round], cohort: Cohort, val_fraction: float, split_seed: int, site_preserving: bool = False
) -> tuple[list[Round], list[str]]:
    """The rounds with part of `train` turned into `val`, and where that is not possible."""
    patient_S, labels_S, problems, done = patient_index(cohort)[1], cohort.labels_S, [], []
    for part in rounds:
        train_S = np.flatnonzero(part.roles_S == TRAIN)
        if not len(train_S):  # reported by class_problems
            done.append(part)
            continue
        rng = np.random.default_rng([FOR_VAL, split_seed, part.repeat, part.fold])
        if site_preserving:
            sides_2 = np.array([val_fraction, 1 - val_fraction])
            group_S, noun = site_index(cohort)[1], "site"
            held_S = deal_sites(patient_S[train_S], group_S[train_S], labels_S[train_S], sides_2, rng) == 0
        else:
            group_S, noun = patient_S, "patient"
            held_S = hold_out(patient_S[train_S], labels_S[train_S], val_fraction, rng)
        roles_S = part.roles_S.copy()
        roles_S[train_S[held_S]] = VAL
        done.append(Round(part.repeat, part.fold, roles_S))
        for c in np.unique(labels_S[train_S]) if cohort.target == "class" else ():  # others: round_problems
            here_S = labels_S[train_S] == c
            if not (here_S & held_S).any() or not (here_S & ~held_S).any():
                n = count(len(np.unique(group_S[train_S][here_S])), noun)
                problems.append(
                    f"{part.name}: class {cohort.classes[c]!r} has {n} to train with, too few for both sides of the "
                    f"inner split: use more {noun}s of this class, or study.val_fraction=0 with train.select=last"
                )
    return done, problems


def _refuse_sites_on_two_sides(plan: Plan, cohort: Cohort) -> None:
    leaks = sites_with_two_roles(plan, cohort)
    found = [f"member {member}: site {site!r} is in {' and '.join(roles)}" for member, site, roles in leaks]
    raise_if("study.site_preserving=true, but sites with more than one role", found)
