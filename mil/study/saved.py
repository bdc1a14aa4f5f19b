"""plan.csv and roles.csv: the plan on disk, and back; every column checked, and each against the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.tables import Column, TableError, read_table, write_csv
from extract.wording import name_some
from mil.study.plan import refuse_leaks
from mil.study.roles import MEMBER_TYPES, ROLES, Plan, PlanError, raise_if
from mil.study.units import COLUMN

PLAN_FILE, ROLES_FILE = "plan.csv", "roles.csv"
SLIDE_COLUMNS = ["slide", "patient", "label", "split"]
COUNT = Column("whole", least=0)
OF_MEMBER = {
    "member": COUNT,
    "repeat": COUNT,
    "fold": COUNT,
    "seed": Column("whole", least=0, most=2**32 - 1),
    "init_seed": COUNT,
    "lr": Column("number", least=0),
    "weight_decay": Column("number", least=0),
}
AFTER_TRAINING = dict.fromkeys(("epochs", "best_epoch", "n_train", "n_val", "n_test"), COUNT) | {
    "diverged": Column("whole", least=1, blank=True)  # the epoch
}
OF_SLIDE = {
    "slide": Column("text"),
    "patient": Column("text"),
    "label": Column("text", blank=True),
    "split": Column("text", blank=True, among=("train", "test")),
}


def save_plan(plan: Plan, cohort: Cohort, folder: Path) -> None:
    """Write plan.csv (the members) and roles.csv (a row a slide, a column m0, m1, ... a member, roles by name).

    Where bags are patients a row is one, and a column lists its slides (`mil.study.units`).
    """
    names = np.array(ROLES)[plan.roles_MS]
    columns = {f"m{member}": names[i] for i, member in enumerate(plan.members["member"])}
    also = [name for name in (COLUMN, "site") if name in cohort.table]
    roles = pd.concat([cohort.table[SLIDE_COLUMNS + also], pd.DataFrame(columns, index=cohort.table.index)], axis=1)
    for name, table in (("roles.csv", roles), ("plan.csv", plan.members)):  # where there is a plan there are its roles
        write_csv(table, folder / name)


def load_plan(folder: Path, cohort: Cohort) -> Plan:
    """The plan that `save_plan` wrote, for the same slides in the cohort's order, whatever the order in the file.

    Raises:
        PlanError: files missing or damaged; a slide, patient, label or split differs from the cohort; a leak.
    """
    try:
        members = read_members(folder)
        roles = read_roles(folder, members)
    except TableError as error:
        raise PlanError("the saved plan cannot be read", error.problems) from None
    members = members[list(MEMBER_TYPES)].astype(MEMBER_TYPES)
    columns = [f"m{member}" for member in members["member"]]
    raise_if(f"the plan saved in {folder} is not for this cohort", mismatches(roles, cohort))
    roles = roles.set_index("slide").loc[cohort.table["slide"].tolist(), columns]
    roles_MS = np.stack([roles[c].map(ROLES.index).to_numpy(dtype=np.int8) for c in columns])
    plan = Plan(members, roles_MS)
    refuse_leaks(plan, cohort)
    return plan


def read_members(folder: Path) -> pd.DataFrame:
    """plan.csv: one row a member, as `Plan.members`, after training also epochs, best_epoch, diverged, n_train,
    n_val, n_test.

    Raises:
        TableError: it is missing or damaged.
    """
    path = folder / PLAN_FILE
    members = read_table(path, OF_MEMBER, also=AFTER_TRAINING)
    twice = members["member"][members["member"].duplicated()]
    if len(twice):
        raise TableError("a table was damaged or changed", [f"{path}: member listed twice: {name_some(twice)}"])
    return members


def read_roles(folder: Path, members: pd.DataFrame) -> pd.DataFrame:
    """roles.csv: slide, patient, label, split (text, "" where missing), and a column m0, m1, ... a member.

    Args:
        members: what `read_members` gave; where it counts slides by role, roles.csv must have as many.

    Raises:
        TableError: it is missing, damaged, or not of these members.
    """
    path = folder / ROLES_FILE
    names = [f"m{member}" for member in members["member"]]
    roles = read_table(path, OF_SLIDE | {name: Column("text", among=ROLES) for name in names})
    twice = roles["slide"][roles["slide"].duplicated()]
    problems = [f"{path}: slides listed twice: {name_some(twice)}"] if len(twice) else []
    for role in ("train", "val", "test"):
        if f"n_{role}" in members:
            n_M = (roles[names] == role).sum(axis=0).to_numpy()
            wrong = np.flatnonzero(n_M != members[f"n_{role}"].to_numpy())
            problems += [
                f"{path}: {names[m]} is {role} for {n_M[m]} slides, but {PLAN_FILE} says {members[f'n_{role}'].iloc[m]}"
                for m in wrong[:1]
            ]
    if problems:
        raise TableError("tables of a run do not fit each other", problems)
    return roles


def mismatches(roles: pd.DataFrame, cohort: Cohort) -> list[str]:
    """How the slides of roles.csv differ from the cohort's."""
    saved, now = set(roles["slide"]), set(cohort.table["slide"])
    problems = []
    if len(saved) < len(roles):
        problems.append(f"slides listed twice: {name_some(roles['slide'][roles['slide'].duplicated()])}")
    if saved - now:
        problems.append(f"in the plan but not in the cohort: {name_some(sorted(saved - now))}")
    if now - saved:
        problems.append(f"in the cohort but not in the plan: {name_some(sorted(now - saved))}")
    if problems:
        return problems
    before = roles.set_index("slide").loc[cohort.table["slide"].tolist()]
    of_patients = [COLUMN] if COLUMN in roles and COLUMN in cohort.table else []
    for name in [*SLIDE_COLUMNS[1:], *of_patients]:
        is_now = ["" if value is None else str(value) for value in cohort.table[name]]
        pairs = zip(before.index, before[name], is_now, strict=True)
        problems += [f"slide {s!r}: {name} was {old!r} and is {new!r}" for s, old, new in pairs if old != new]
    return problems
