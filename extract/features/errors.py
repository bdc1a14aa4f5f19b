"""What may be wrong with a feature file, whoever wrote it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import psutil

from extract.room import free_bytes

DAMAGED = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError, struct.error),
)
"""What reading a damaged torch file raises; Python's documentation of UnpicklingError says that it may be much else."""

LIMITS_FROM = 2**24
"""Bytes from which limits of process and control group are asked too, which takes a third of a millisecond."""


class CacheError(Exception):
    """A feature file is missing, truncated, damaged, foreign or not what was asked for. The message names the file."""


def check_shape(path: Path, name: str, array: Any, least_columns: int = 1) -> None:
    """Raise CacheError unless `array` (anything with shape and dtype) is (N, D) and floating point."""
    if len(array.shape) != 2 or array.shape[1] < least_columns:
        wanted = "(tiles, features)" if least_columns == 1 else f"(tiles, at least {least_columns})"
        raise CacheError(f"{path}: expected {name} of shape {wanted}, got {tuple(array.shape)}")
    if array.dtype.kind != "f":
        raise CacheError(f"{path}: expected {name} in floating point, got {array.dtype}")


def check_coords(path: Path, shape: tuple[int, ...], n_tiles: int) -> None:
    """Raise CacheError unless coordinates of this shape fit `n_tiles` tiles."""
    if tuple(shape) != (n_tiles, 2):
        raise CacheError(
            f"{path}: expected coords of shape ({n_tiles}, 2), one row for each row of features, got {tuple(shape)}"
        )


def check_memory(path: Path, what: str, n_bytes: int) -> None:
    """Before it is allocated: raise CacheError if `what`, which the file declares, is more than there is memory."""
    free = free_bytes() if n_bytes > LIMITS_FROM else psutil.virtual_memory().available
    if n_bytes > free:
        raise CacheError(
            f"{path}: {what} would take {n_bytes / 1e9:,.1f} GB, more than the {free / 1e9:,.1f} GB of free memory; "
            "the file is damaged or made to do harm, or this machine is too small for it"
        )
