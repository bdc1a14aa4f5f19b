"""Members and roles: what every slide is for every member.

Letters: M members, S slides of the cohort, P patients, C classes, K folds, R roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.config import ProblemsError

ROLES = ("train", "val", "test", "unused")

TRAIN, VAL, TEST, UNUSED = range(4)

MEMBER_TYPES = {
    "member": "int64", "repeat": "int64", "fold": "int64", "seed": "int64", "init_seed": "int64",
    "lr": "float64", "weight_decay": "float64",
}  # fmt: skip


class PlanError(ProblemsError):
    """The plan cannot be made, or a saved one does not fit the cohort."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Members and roles.

    `members`: one row a member, index 0..M-1; columns member (its number in the whole study), repeat, fold, seed (as
    the user gave it), init_seed (63 bits, what its parameters are drawn from), lr, weight_decay.
    `roles_MS`: int8, index into `ROLES`; slides in the cohort's order.
    """

    members: pd.DataFrame
    roles_MS: np.ndarray

    def __post_init__(self) -> None:
        if self.roles_MS.ndim != 2 or len(self.roles_MS) != len(self.members):
            raise ValueError(f"expected roles of {len(self.members)} members, got shape {self.roles_MS.shape}")

    def __len__(self) -> int:
        return len(self.members)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.members.equals(other.members) and np.array_equal(self.roles_MS, other.roles_MS)

    __hash__ = None  # type: ignore[assignment]  # holds arrays: not hashable

    def uses(self, role: str) -> np.ndarray:
        """Bool (M, S): where the slide has this role for the member."""
        if role not in ROLES:
            raise ValueError(f"expected one of {', '.join(ROLES)}, got {role!r}")
        used_MS: np.ndarray = self.roles_MS == ROLES.index(role)
        return used_MS

    def subset(self, member_indices: Sequence[int] | np.ndarray) -> Plan:
        """The members in these rows, which keep their number in column `member`."""
        rows = np.asarray(member_indices)
        return Plan(self.members.iloc[rows].reset_index(drop=True), self.roles_MS[rows])

    def trained_with(self, lr: float, weight_decay: float) -> Plan:
        """The same members and roles, all with this learning rate and weight decay."""
        return Plan(self.members.assign(lr=float(lr), weight_decay=float(weight_decay)), self.roles_MS)


@dataclass(frozen=True)
class Round:
    """The roles of one fold of one repeat, shared by its seeds."""

    repeat: int
    fold: int
    roles_S: np.ndarray

    @property
    def name(self) -> str:
        return f"repeat {self.repeat} fold {self.fold}"


def patients_with_two_roles(plan: Plan, cohort: Cohort) -> list[tuple[int, str, tuple[str, ...]]]:
    """(member, patient, its roles) wherever a patient has more than one role besides `unused`. Empty = no leak."""
    return names_with_two_roles(plan, *patient_index(cohort))


def names_with_two_roles(
    plan: Plan, names_P: np.ndarray, index_S: np.ndarray
) -> list[tuple[int, str, tuple[str, ...]]]:
    """(member, name, its roles) wherever the slides of a name have more than one role besides `unused`."""
    found = []
    for member, roles_S in zip(plan.members["member"], plan.roles_MS, strict=True):
        has_PR = np.zeros((len(names_P), len(ROLES)), dtype=bool)
        has_PR[index_S, roles_S] = True
        has_PR[:, UNUSED] = False
        for p in np.flatnonzero(has_PR.sum(axis=1) > 1):
            found.append((int(member), str(names_P[p]), tuple(ROLES[r] for r in np.flatnonzero(has_PR[p]))))
    return found


def patients_in_both_splits(cohort: Cohort) -> list[str]:
    """Patients with slides in the official train and in the official test split."""
    n_splits = cohort.table.groupby("patient")["split"].nunique()
    return [str(patient) for patient in n_splits.index[n_splits > 1]]


def sites_with_two_roles(plan: Plan, cohort: Cohort) -> list[tuple[int, str, tuple[str, ...]]]:
    """(member, site, its roles) wherever a site has more than one role besides `unused`. Empty = site-preserving."""
    return names_with_two_roles(plan, *site_index(cohort))


def raise_if(title: str, problems: Sequence[str]) -> None:
    if problems:
        raise PlanError(title, problems)


def official_test(cohort: Cohort) -> np.ndarray:
    """Bool (S,): slides of the official test split."""
    return (cohort.table["split"] == "test").to_numpy()


def free_slides(cohort: Cohort) -> np.ndarray:
    """Bool (S,): slides whose role the study decides: labelled, not of the official test split."""
    return ~official_test(cohort) & (cohort.labels_S >= 0)


def fixed_roles(cohort: Cohort) -> np.ndarray:
    """int8 (S,): test for the official test split, else unused until something else is decided."""
    return np.where(official_test(cohort), TEST, UNUSED).astype(np.int8)


def patient_index(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """The patients' names in alphabetical order, and the index into them of every slide."""
    return np.unique(np.array(cohort.table["patient"].tolist(), dtype=str), return_inverse=True)


def site_index(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """The sites' names in alphabetical order, and the index into them of every slide."""
    return np.unique(np.array(cohort.table["site"].tolist(), dtype=str), return_inverse=True)


def init_seed(seed: int, repeat: int, fold: int) -> int:
    """63-bit seed of a member's parameters: the same whatever other members there are."""
    return int(np.random.SeedSequence([seed, repeat, fold]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def plan_of_rounds(rounds: Sequence[Round], seeds: Sequence[int], lr: float, weight_decay: float) -> Plan:
    """Every round with every seed, in this order."""
    rows = [
        (r.repeat, r.fold, seed, init_seed(seed, r.repeat, r.fold), lr, weight_decay) for r in rounds for seed in seeds
    ]
    members = pd.DataFrame(rows, columns=list(MEMBER_TYPES)[1:])
    members.insert(0, "member", np.arange(len(rows)))
    return Plan(members.astype(MEMBER_TYPES), np.stack([r.roles_S for r in rounds for _ in seeds]))
