"""The interval of a proportion of slides whose patients are clusters: one place, which everything that counts uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mil.tasks.estimates import proportion_interval


def rate_block(hit_S: np.ndarray, patients_S: Sequence[str] | np.ndarray) -> dict[str, Any]:
    """Share of True with Wilson's 95 % interval, of as many slides as these are worth (Dean and Pagano 2015).

    Returns:
        value, low, high (None without slides), hits and slides.
    """
    n, hits = len(hit_S), int(np.sum(hit_S))
    block: dict[str, Any] = {"value": None, "low": None, "high": None, "hits": hits, "slides": n}
    if n:
        low, high = wilson_of_clusters(hit_S, patients_S)
        block |= {"value": hits / n, "low": low, "high": high}
    return block


def wilson_of_clusters(hit_S: np.ndarray, patients_S: Sequence[str] | np.ndarray) -> tuple[float, float]:
    """Both ends, of at least one slide."""
    found = proportion_interval(hit_S, patients_S)
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high
