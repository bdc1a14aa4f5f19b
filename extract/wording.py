"""Small words for messages: some names of many, so many lines at most, a number with its noun."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def name_some(names: Iterable[object], limit: int = 5) -> str:
    """`'a', 'b', 'c' and 37 more`."""
    listed = [repr(str(n)) for n in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def at_most(lines: Sequence[str], limit: int = 20) -> list[str]:
    """The first lines, and how many more there are."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return [*lines[:limit], *more]


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def p_value(p: float, *, said: bool = False) -> str:
    """Three decimals, `< 0.001` below them; `said`: with the sign that follows a `p`, `= 0.031`."""
    return "< 0.001" if p < 0.001 else f"{'= ' if said else ''}{p:.3f}"
