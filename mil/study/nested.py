"""Nested cross-validation: inner folds choose learning rate, weight decay and epochs, the outer test fold only reports.

For every member of the outer plan its training slides are dealt into inner folds; each inner fold is `val` once for
each cell of the grid, and the outer test fold is `unused`, so nothing that chooses can see it. All inner members are
ordinary members of one plan and train together. The cell AND the number of epochs with the highest mean inner AUC are
chosen together (Varma and Simon 2006 on why the inner score itself must not be reported).

Letters: M members of the outer plan, S slides, G cells, E epochs, F inner folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.config import ProblemsError
from extract.wording import count
from mil.study import targets
from mil.study.folds import deal_slides
from mil.study.roles import MEMBER_TYPES, TRAIN, UNUSED, VAL, Plan, PlanError

FOR_INNER, FOR_SEARCH = 3, 4  # leading word of a random stream, as in mil.study
AS_GOOD = 1e-9
"""Mean AUCs that differ by less are equal: what is left is the rounding of a mean."""

INNER_TYPES = MEMBER_TYPES | {"outer_member": "int64", "inner_fold": "int64", "cell": "int64"}
CHOICES = ["member", "repeat", "fold", "seed", "cell", "lr", "weight_decay", "epochs", "inner_auc", "inner_auc_sd",
           "chosen", "epochs_tried"]  # fmt: skip


class ChoiceError(ProblemsError):
    """Nothing can be chosen: the inner AUC is undefined everywhere."""


class Cell(NamedTuple):
    """One setting of the search."""

    lr: float
    weight_decay: float


def grid_cells(lr: Sequence[float], weight_decay: Sequence[float]) -> list[Cell]:
    """Every combination, learning rates outermost."""
    return [Cell(*pair) for pair in product(lr, weight_decay)]


def random_cells(lr: tuple[float, float], weight_decay: tuple[float, float], budget: int, seed: int) -> list[Cell]:
    """`budget` settings, each value log-uniform in its range (Bergstra and Bengio 2012); both ends equal = fixed."""
    rng = np.random.default_rng([FOR_SEARCH, seed])
    u_G2 = rng.random((budget, 2))  # a larger budget begins with the same cells
    return [Cell(_log_uniform(lr, u), _log_uniform(weight_decay, v)) for u, v in u_G2.tolist()]


def _log_uniform(ends: tuple[float, float], u: float) -> float:
    low, high = ends
    return low if low == high else float(np.exp(np.log(low) + u * (np.log(high) - np.log(low))))


# --- the inner members ---------------------------------------------------------------------------------------------


def inner_plan(
    plan: Plan,
    cohort: Cohort,
    inner_folds: int,
    cells: Sequence[Cell],
    split_seed: int,
    *,
    site_preserving: bool = False,
) -> Plan:
    """Outer members x inner folds x cells, in this order, as members of one plan.

    Columns besides a plan's own: outer_member (row of the outer plan), inner_fold, cell. The inner folds are grouped by
    patient, or by site, and stratified by label (`mil.study.folds.deal_slides`); all cells and seeds of an outer fold
    share them, and all cells share the inner members' initialisation, so that cells are compared on equal terms.

    Raises:
        PlanError: an outer training part that has a class with fewer patients than inner folds.
    """
    _, patient_S = np.unique(np.array(cohort.table["patient"].tolist(), dtype=str), return_inverse=True)
    rows: list[tuple[float, ...]] = []
    roles: list[np.ndarray] = []
    problems: list[str] = []
    dealt: dict[tuple[int, int], np.ndarray] = {}
    rounds = plan.members[["repeat", "fold", "seed"]].to_numpy(dtype=np.int64).tolist()
    for outer, (repeat, fold, seed) in enumerate(rounds):
        outer_roles_S = plan.roles_MS[outer]
        if (repeat, fold) not in dealt:
            found = inner_problems(f"repeat {repeat} fold {fold}", outer_roles_S, patient_S, cohort, inner_folds)
            problems += found
            rng = np.random.default_rng([FOR_INNER, split_seed, repeat, fold])
            dealt[repeat, fold] = inner_roles(outer_roles_S, cohort, inner_folds, rng, site_preserving=site_preserving)
            check = one_class_problems if cohort.target == "class" else targets.inner_problems
            problems += [] if found else check(f"repeat {repeat} fold {fold}", dealt[repeat, fold], cohort)
        for inner_fold, roles_S in enumerate(dealt[repeat, fold]):
            init = inner_seed(seed, repeat, fold, inner_fold)
            for cell, setting in enumerate(cells):
                rows.append((len(rows), repeat, fold, seed, init, *setting, outer, inner_fold, cell))
                roles.append(roles_S)
    if problems:
        raise PlanError("the inner folds cannot be made", problems)
    members = pd.DataFrame(rows, columns=list(INNER_TYPES)).astype(INNER_TYPES)
    return Plan(members, np.stack(roles))


def inner_roles(
    outer_roles_S: np.ndarray, cohort: Cohort, inner_folds: int, rng: np.random.Generator, *, site_preserving: bool
) -> np.ndarray:
    """(F, S) roles: within the outer training part each inner fold is `val` once; everything else is `unused`."""
    part = np.flatnonzero(outer_roles_S == TRAIN)
    fold_N = deal_slides(cohort, part, inner_folds, rng, site_preserving=site_preserving)
    roles_FS = np.full((inner_folds, len(outer_roles_S)), UNUSED, dtype=np.int8)
    for inner_fold in range(inner_folds):
        roles_FS[inner_fold, part] = np.where(fold_N == inner_fold, VAL, TRAIN)
    return roles_FS


def inner_seed(seed: int, repeat: int, fold: int, inner_fold: int) -> int:
    """63-bit seed of an inner member's parameters; never that of an outer member (`mil.study.roles.init_seed`)."""
    words = np.random.SeedSequence([seed, repeat, fold, FOR_INNER, inner_fold + 1]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def inner_problems(
    name: str, outer_roles_S: np.ndarray, patient_S: np.ndarray, cohort: Cohort, inner_folds: int
) -> list[str]:
    """Classes of an outer training part that cannot be in every inner fold, and slides that already are `val`."""
    problems = []
    if (outer_roles_S == VAL).any():
        problems.append(f"{name}: has role val, but study.nested={inner_folds} makes its own: use role train instead")
    for c, label in enumerate(cohort.classes if cohort.target == "class" else ()):
        n = len(np.unique(patient_S[(outer_roles_S == TRAIN) & (cohort.labels_S == c)]))
        if n < inner_folds:
            what_to_do = f"use study.nested={n} or fewer" if n > 1 else "use fewer study.folds"
            problems.append(
                f"{name}: class {label!r} has {count(n, 'patient')} in the training part, but study.nested="
                f"{inner_folds} needs {inner_folds}, one in every inner fold: {what_to_do}, or add patients"
            )
    return problems


def one_class_problems(name: str, roles_FS: np.ndarray, cohort: Cohort) -> list[str]:
    """Inner folds without one of the classes: possible where patients have slides of several labels."""
    return [
        f"{name} inner fold {f}: no {role} slide of class {cohort.classes[c]!r}: use a smaller study.nested"
        for f, roles_S in enumerate(roles_FS)
        for role, index in (("train", TRAIN), ("val", VAL))
        for c in range(len(cohort.classes))
        if not ((roles_S == index) & (cohort.labels_S == c)).any()
    ]


# --- the choice ----------------------------------------------------------------------------------------------------


def choose(inner: Plan, history: pd.DataFrame, metric: str = "auc") -> pd.DataFrame:
    """For every outer member the cell and the number of epochs with the highest mean inner AUC (or other `metric`).

    The mean is over the inner folds at the same epoch. Of equally good ones (`AS_GOOD`) the fewest epochs win, then the
    first cell. An epoch at which any inner fold's AUC is undefined cannot be chosen.

    Args:
        inner: as `inner_plan` made it.
        history: one row an inner member and epoch (from 1): member, epoch, val_auc.

    Returns:
        One row an outer member and cell: member, repeat, fold, seed, cell, lr, weight_decay, epochs (the cell's best),
        inner_auc (mean at that epoch), inner_auc_sd (over inner folds, n - 1), chosen (one True an outer member),
        epochs_tried (how many there were to choose from).

    Raises:
        ChoiceError: an outer member has no defined mean inner AUC at all.
    """
    auc_of = history.set_index(["member", "epoch"])[f"val_{metric}"].unstack().sort_index(axis=1)  # noqa: PD010 - keeps NaN
    rows, problems = [], []
    for outer, own in inner.members.groupby("outer_member", sort=True):
        cells = [(cell, part) for cell, part in own.groupby("cell", sort=True)]
        auc_GFE = np.stack([auc_of.loc[part["member"]].to_numpy(dtype=float) for _, part in cells])
        mean_GE = auc_GFE.mean(axis=1)
        first = own.iloc[0]
        if np.isnan(mean_GE).all():
            problems.append(
                f"repeat {first['repeat']:.0f} fold {first['fold']:.0f}: the inner AUC is undefined in every cell and "
                "epoch (training diverged?): use smaller learning rates"
            )
            continue
        chosen, _ = best_of(mean_GE)
        for g, (cell, part) in enumerate(cells):
            defined = not np.isnan(mean_GE[g]).all()
            e = best_of(mean_GE[g : g + 1])[1] if defined else 0
            spread = float(auc_GFE[g, :, e].std(ddof=1)) if auc_GFE.shape[1] > 1 else np.nan
            setting = part.iloc[0]
            rows.append(
                (
                    outer, *(int(first[k]) for k in ("repeat", "fold", "seed")), cell, setting["lr"],
                    setting["weight_decay"], int(auc_of.columns[e]) if defined else 0,
                    float(mean_GE[g, e]), spread, g == chosen, int(auc_of.columns[-1]),
                )
            )  # fmt: skip
    if problems:
        raise ChoiceError("nothing can be chosen", problems)
    return pd.DataFrame(rows, columns=CHOICES)


def best_of(mean_GE: np.ndarray) -> tuple[int, int]:
    """(cell, epoch index) of the highest value; of equal ones the earliest epoch, then the first cell."""
    good_EG = (mean_GE >= np.nanmax(mean_GE) - AS_GOOD).T
    epoch, cell = np.argwhere(good_EG)[0]
    return int(cell), int(epoch)


def refit_plan(plan: Plan, choices: pd.DataFrame) -> tuple[Plan, np.ndarray]:
    """The outer plan with the chosen learning rates and weight decays, and after how many epochs each member stops."""
    chosen = choices[choices["chosen"]].sort_values("member")
    settings = {name: chosen[name].to_numpy(dtype=float) for name in ("lr", "weight_decay")}
    return Plan(plan.members.assign(**settings), plan.roles_MS), chosen["epochs"].to_numpy(dtype=np.int64)
