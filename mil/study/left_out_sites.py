"""Leave-one-site-out beside the chosen folds: one more member a site and seed, trained on all other sites.

Such members are rows of the same plan and train in the same pass. A patient with slides at the site that is left out
trains for nobody there, as in every fold: its slides elsewhere are unused. Neither is the official test split used,
which these members are not asked about.

Letters: M members, S slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from mil.study.plan import refuse_leaks, with_val
from mil.study.roles import (
    TEST,
    TRAIN,
    UNUSED,
    Plan,
    PlanError,
    Round,
    free_slides,
    official_test,
    patient_index,
    plan_of_rounds,
)
from mil.study.sites import site_names
from mil.study.targets import part_problems

FEWEST_PATIENTS = 5
"""Of a site that is left out by itself. Slides of smaller ones, and of no known site, train for all."""


@dataclass(frozen=True, eq=False)
class LeftOut:
    """The members, and the site of each; `not_left_out`: site -> why it has no member."""

    plan: Plan
    site_M: tuple[str, ...]
    not_left_out: dict[str, str]

    def __len__(self) -> int:
        return len(self.plan)


def left_out_plan(
    plan: Plan, cohort: Cohort, *, first: int, val_fraction: float, split_seed: int, site_preserving: bool
) -> LeftOut:
    """A member for every site and seed of `plan`, as its next repeat, fold by fold in the order of the sites' names.

    Args:
        first: number of the first member.

    Raises:
        PlanError: fewer than two sites can be left out.
    """
    repeat = int(plan.members["repeat"].max()) + 1
    site_S = np.array(cohort.table["site"].tolist() if "site" in cohort.table else [""] * len(cohort), dtype=str)
    rounds: list[Round] = []
    sites: list[str] = []
    why: dict[str, str] = {}
    for site in site_names(site_S):
        roles_S = roles_without(site, site_S, cohort)
        reason = cannot(roles_S, cohort)
        if reason:
            why[site] = reason
        else:
            rounds.append(Round(repeat, len(rounds), roles_S))
            sites.append(site)
    if len(sites) < 2:
        said = [f"site {site!r}: {reason}" for site, reason in why.items()] or ["the cohort names no sites"]
        advice = f"study.leave_one_site_out=true needs two sites (columns.site), found {len(sites)} to leave out"
        raise PlanError("leave-one-site-out is impossible", [advice, *said])
    if val_fraction > 0:
        rounds, problems = with_val(rounds, cohort, val_fraction, split_seed, site_preserving)
        if problems:
            raise PlanError("leave-one-site-out is impossible", problems)
    seeds = list(dict.fromkeys(plan.members["seed"].tolist()))
    own = plan_of_rounds(rounds, seeds, *plan.members[["lr", "weight_decay"]].iloc[0])
    refuse_leaks(own, cohort)
    members = own.members.assign(member=first + np.arange(len(own)))
    return LeftOut(Plan(members, own.roles_MS), tuple(site for site in sites for _ in seeds), why)


def roles_without(site: str, site_S: np.ndarray, cohort: Cohort) -> np.ndarray:
    """Test: labelled slides of the site. Train: those of patients that have none there."""
    free_S, patient_S, here_S = free_slides(cohort), patient_index(cohort)[1], site_S == site
    of_patients_here_S = np.isin(patient_S, patient_S[here_S & ~official_test(cohort)])
    roles_S = np.full(len(cohort), UNUSED, dtype=np.int8)
    roles_S[free_S & ~of_patients_here_S] = TRAIN
    roles_S[free_S & here_S] = TEST
    return roles_S


def cannot(roles_S: np.ndarray, cohort: Cohort) -> str:
    """Why a site has no member of its own; "" where it has."""
    patients = len(np.unique(patient_index(cohort)[1][roles_S == TEST]))
    if patients < FEWEST_PATIENTS:
        return f"fewer than {FEWEST_PATIENTS} labelled patients"
    if cohort.target != "class":
        wrong = [part_problems(cohort, roles_S == role) for role in (TRAIN, TEST)]
        where = ("all other sites together have", "the site has")
        return next((f"{text} {why}" for text, why in zip(where, wrong, strict=True) if why), "")
    absent = np.setdiff1d(np.arange(len(cohort.classes)), cohort.labels_S[roles_S == TRAIN])
    return f"no other site has class {cohort.classes[absent[0]]!r}" if len(absent) else ""


def joined_all(parts: Sequence[Plan]) -> Plan:
    """Plans one after the other, with the columns of the first."""
    columns = parts[0].members.columns
    members = pd.concat([part.members[columns] for part in parts], ignore_index=True)
    return Plan(members, np.concatenate([part.roles_MS for part in parts]))
