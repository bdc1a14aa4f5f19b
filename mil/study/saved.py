"""plan.csv and roles.csv: the plan on disk, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.features.cache import replace_on_success
from extract.wording import at_most, name_some
from mil.study.plan import refuse_leaks
from mil.study.roles import MEMBER_TYPES, ROLES, Plan, PlanError, raise_if

SLIDE_COLUMNS = ["slide", "patient", "label", "split"]


def save_plan(plan: Plan, cohort: Cohort, folder: Path) -> None:
    """Write plan.csv (the members) and roles.csv (a row a slide, a column m0, m1, ... a member, roles by name)."""
    names = np.array(ROLES)[plan.roles_MS]
    columns = {f"m{member}": names[i] for i, member in enumerate(plan.members["member"])}
    site = ["site"] if "site" in cohort.table else []
    roles = pd.concat([cohort.table[SLIDE_COLUMNS + site], pd.DataFrame(columns, index=cohort.table.index)], axis=1)
    for name, table in (("plan.csv", plan.members), ("roles.csv", roles)):
        with replace_on_success(folder / name) as temporary:
            table.to_csv(temporary, index=False)


def load_plan(folder: Path, cohort: Cohort) -> Plan:
    """The plan that `save_plan` wrote, for the same slides in the cohort's order, whatever the order in the file.

    Raises:
        PlanError: files missing or damaged; a slide, patient, label or split differs from the cohort; a leak.
    """
    members = _read_table(folder / "plan.csv", list(MEMBER_TYPES))
    try:
        members = members.astype(MEMBER_TYPES)
    except ValueError as error:
        raise PlanError("the saved plan cannot be read", [f"{folder / 'plan.csv'}: {error}"]) from None
    columns = [f"m{member}" for member in members["member"]]
    roles = _read_table(folder / "roles.csv", [*SLIDE_COLUMNS, *columns])
    raise_if(f"the plan saved in {folder} is not for this cohort", _mismatches(roles, cohort))
    roles = roles.set_index("slide").loc[cohort.table["slide"].tolist(), columns]
    unknown = sorted(set(roles.to_numpy().ravel()) - set(ROLES))
    raise_if("the saved plan cannot be read", [f"{folder / 'roles.csv'}: {r!r} is not a role" for r in unknown])
    roles_MS = np.stack([roles[c].map(ROLES.index).to_numpy(dtype=np.int8) for c in columns])
    plan = Plan(members, roles_MS)
    refuse_leaks(plan, cohort)
    return plan


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The file's columns as text: numbers are converted from it without a loss."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise PlanError("the saved plan cannot be read", [f"{path}: {error}"]) from None
    absent = [c for c in columns if c not in table.columns]
    raise_if("the saved plan cannot be read", [f"{path}: no column {name_some(absent)}"] if absent else [])
    if table.empty:
        raise PlanError("the saved plan cannot be read", [f"{path}: no rows"])
    return table


def _mismatches(roles: pd.DataFrame, cohort: Cohort) -> list[str]:
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
    for name in SLIDE_COLUMNS[1:]:
        is_now = ["" if value is None else str(value) for value in cohort.table[name]]
        pairs = zip(before.index, before[name], is_now, strict=True)
        problems += at_most([f"slide {s!r}: {name} was {old!r} and is {new!r}" for s, old, new in pairs if old != new])
    return problems
