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
    found = proportion_interval(hit_S, patients_S)
    counted = {"hits": int(np.sum(hit_S)), "slides": len(hit_S)}
    return {"value": found.value, "low": found.low, "high": found.high, **counted}
