"""Slides in, tile features out, from Python: `extract.encoder`. What it needs is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extract.lazy import lazily

if TYPE_CHECKING:
    from extract.encoders.direct import encoder

__all__ = ["encoder"]

HOMES = {"encoder": "extract.encoders.direct"}

__getattr__, __dir__ = lazily(__name__, HOMES)
