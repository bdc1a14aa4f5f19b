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
