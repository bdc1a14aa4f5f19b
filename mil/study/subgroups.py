"""`report.subgroups`: which group each slide is in, by a column of the cohort or an expression on one.

Axes: S slides.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from extract.cells import NUMBER
from extract.cohort import NOTHING
from extract.wording import at_most, name_some

KEY = "report.subgroups"
UNKNOWN = "unknown"
"""The group of slides whose cell is empty (or NA, nan, none)."""
MOST_GROUPS = 20
"""Values of a text column; more are a name or a number, not a group, and leave few slides for each."""
COMPARE: dict[str, tuple[Callable[[float, float], bool], str]] = {
    ">=": (operator.ge, "<"),
    "<=": (operator.le, ">"),
    "==": (operator.eq, "!="),
    "!=": (operator.ne, "=="),
    ">": (operator.gt, "<="),
    "<": (operator.lt, ">="),
}
"""Sign of an expression -> what it asks, and the sign of all other numbers. Two characters before one."""
SIGN = re.compile("|".join(map(re.escape, COMPARE)))


@dataclass(frozen=True)
class Grouping:
    """`said` as the config has it; `sign` is empty where each value of the column is a group."""

    said: str
    column: str
    sign: str = ""
    number: float = 0.0


def parse(said: str) -> Grouping:
    """`scanner`, or `age>=65`; ValueError for an expression without a column or a number."""
    column, sign, number = (part.strip() for part in _cut(said))
    if not column or (sign and not NUMBER.fullmatch(number)):
        raise ValueError(f"{KEY}: {said!r}: expected a column of the cohort, or column>=number ({', '.join(COMPARE)})")
    return Grouping(said, column, sign, float(number) if sign else 0.0)


def _cut(said: str) -> tuple[str, str, str]:
    found = SIGN.search(said)
    return (said[: found.start()], found[0], said[found.end() :]) if found else (said, "", "")


def spelling_problems(given: Sequence[object]) -> list[str]:
    """What is wrong with the list itself, before there is a cohort."""
    problems = []
    for said in (str(name) for name in given):
        try:
            parse(said)
        except ValueError as error:
            problems.append(str(error))
    twice = sorted({str(name) for name in given if [str(n) for n in given].count(str(name)) > 1})
    return problems + [f"{KEY}: {name!r} occurs twice" for name in twice]


def wanted_columns(given: Sequence[str]) -> dict[str, str]:
    """The columns that these groupings need, each with the key that asks for it."""
    return {parse(said).column: KEY for said in given}


def group_problems(given: Sequence[str], further: pd.DataFrame) -> list[str]:
    """Expressions on text, and columns of too many values; columns that are missing are the cohort's to tell."""
    problems = []
    for grouping in map(parse, given):
        if grouping.column not in further:
            continue
        cells = further[grouping.column].tolist()
        if grouping.sign:
            wrong = [
                f"{KEY}: {grouping.said}: row {row + 2}: {cell[:60]!r}, expected a number or nothing"
                for row, cell in enumerate(cells)
                if not is_missing(cell) and not NUMBER.fullmatch(cell)
            ]
            problems += at_most(wrong, 5)
            continue
        names = sorted({cell for cell in cells if not is_missing(cell)})
        if len(names) > MOST_GROUPS:
            shown = name_some((name[:40] for name in names), 3)
            problems.append(
                f"{KEY}: column {grouping.column!r} has {len(names)} values ({shown}), expected at most {MOST_GROUPS} "
                f"groups; of numbers make two groups, such as {grouping.column}>=VALUE"
            )
    return problems


def named_groups(given: Sequence[str], slides: Sequence[str], further: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Grouping -> slide -> name of its group."""
    return {
        grouping.said: dict(zip(slides, groups_of(grouping, further[grouping.column].tolist()), strict=True))
        for grouping in map(parse, given)
    }


def groups_of(grouping: Grouping, cells: Sequence[str]) -> list[str]:
    """The name of each slide's group, (S,)."""
    if not grouping.sign:
        return [UNKNOWN if is_missing(cell) else cell for cell in cells]
    holds, other = COMPARE[grouping.sign]
    names = {True: f"{grouping.column} {grouping.sign} {grouping.number:g}"}
    names[False] = f"{grouping.column} {other} {grouping.number:g}"
    return [UNKNOWN if is_missing(cell) else names[holds(float(cell), grouping.number)] for cell in cells]


def is_missing(cell: str) -> bool:
    return cell.lower() in NOTHING
