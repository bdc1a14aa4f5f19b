"""Slides in, tile features out, from Python: `extract.encoder`. What it needs is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extract.encoders.direct import encoder

__all__ = ["encoder"]

HOMES = {"encoder": "extract.encoders.direct"}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = found = getattr(import_module(HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return list(__all__)
