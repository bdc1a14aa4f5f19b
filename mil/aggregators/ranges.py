"""What an option of an aggregator may be, stated where the option is: in its annotation.

    hidden: Annotated[int, Ge(1), MultipleOf("heads")] = 512

`Ge`, `Gt`, `Le` and `Lt` are those of annotated_types, which pydantic reads too; the classes here are for what no
single number can say. An aggregator refuses options out of their ranges when it is built, the config before torch is
imported, and `--help` shows them: all three read the annotation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, runtime_checkable

from annotated_types import Ge, Gt, Le, Lt

LIMITS: dict[type, tuple[str, Callable[[Any, Any], bool], str, str]] = {
    Ge: ("ge", operator.ge, ">=", "greater than or equal to"),
    Gt: ("gt", operator.gt, ">", "greater than"),
    Le: ("le", operator.le, "<=", "less than or equal to"),
    Lt: ("lt", operator.lt, "<", "less than"),
}
"""Attribute, check, sign and words of each; the words are pydantic's: a config and a constructor say the same."""


@runtime_checkable
class Rule(Protocol):
    """A range that a limit cannot state, often because it depends on another option. `str(rule)` is for `--help`."""

    def broken(self, value: Any, options: Mapping[str, Any]) -> str | None:
        """What was expected, where `value` breaks the rule among all `options` of the aggregator."""


@dataclass(frozen=True)
class MultipleOf:
    """Of another option, such as a width that is split into heads."""

    other: str

    def broken(self, value: Any, options: Mapping[str, Any]) -> str | None:
        whole = options[self.other] > 0 and value % options[self.other] == 0
        return None if whole else f"a multiple of model.{self.other}={options[self.other]}"

    def __str__(self) -> str:
        return f"a multiple of {self.other}"


@dataclass(frozen=True)
class NotBothZero:
    """This option and another."""

    other: str

    def broken(self, value: Any, options: Mapping[str, Any]) -> str | None:
        return None if value or options[self.other] else f"at least 1, because model.{self.other} is 0"

    def __str__(self) -> str:
        return f"not 0 where {self.other} is"


@dataclass(frozen=True)
class ZeroOrOdd:
    """A width with a middle, or none at all."""

    def broken(self, value: Any, options: Mapping[str, Any]) -> str | None:
        return None if value == 0 or (value > 0 and value % 2) else "0 or an odd number above it"

    def __str__(self) -> str:
        return "0 or odd"


def evaluated(annotation: str) -> Any:
    """The type that an annotation in the source of an aggregator names."""
    kinds = (*LIMITS, MultipleOf, NotBothZero, ZeroOrOdd, int, float, bool, str, tuple)
    known = {"Annotated": Annotated, "Literal": Literal, **{kind.__name__: kind for kind in kinds}}
    return eval(annotation, {"__builtins__": {}, **known})


def problems(annotations: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Every option out of its range, one line each: limits first, rules only where all limits hold.

    annotations: of the options. options: all of them, by name; of the right types.
    """
    limits = (beyond_limits(f"model.{name}", annotations[name], value) for name, value in options.items())
    found = [line for lines in limits for line in lines]
    return found or broken_rules(annotations, options)


def beyond_limits(where: str, annotation: Any, value: Any) -> Iterator[str]:
    """The limits that a value, or an element of a tuple, is beyond."""
    if get_origin(annotation) is tuple:
        for i, element in enumerate(value):
            yield from beyond_limits(f"{where}.{i}", get_args(annotation)[0], element)
    for limit in getattr(annotation, "__metadata__", ()):
        if type(limit) in LIMITS:
            attribute, within, _, words = LIMITS[type(limit)]
            bound = getattr(limit, attribute)
            if not within(value, bound):
                yield f"{where}: input should be {words} {bound}, got {value!r}"


def broken_rules(annotations: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """The rules that options break which are within their limits."""
    rules = [(name, rule) for name in options for rule in getattr(annotations[name], "__metadata__", ())]
    said = [(name, rule.broken(options[name], options)) for name, rule in rules if isinstance(rule, Rule)]
    return [f"model.{name}: expected {expected}, got {options[name]!r}" for name, expected in said if expected]


def shown(annotation: Any) -> str:
    """A range in a few signs for `--help`, such as `>= 0, < 1`; empty where there is none."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        each = shown(get_args(annotation)[0])
        return f"each {each}" if each else ""
    parts = []
    for part in getattr(annotation, "__metadata__", ()):
        attribute, _, sign, _ = LIMITS.get(type(part), ("", operator.eq, "", ""))
        parts.append(f"{sign} {getattr(part, attribute)}" if sign else str(part))
    return ", ".join(parts)
