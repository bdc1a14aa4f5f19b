"""95 % intervals of shares: of so many independent ones, and of tiles or lesions whose patients are drawn together.

Letters: R resamples.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import t as student

Z = 1.959963984540054
"""Of a two-sided 95 % interval."""

Ends = tuple[float | None, float | None]
"""Of an interval; None: there is none."""


def wilson(rate: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share of `n`, which need not be a whole number (Wilson, JASA 1927)."""
    centre, half = rate + Z**2 / (2 * n), Z * (rate * (1 - rate) / n + Z**2 / (4 * n**2)) ** 0.5
    low, high = (centre - half) / (1 + Z**2 / n), (centre + half) / (1 + Z**2 / n)
    return (max(0.0, low) if rate > 0 else 0.0), (min(1.0, high) if rate < 1 else 1.0)


def share_interval(value: float, values_R: np.ndarray, n_groups: int) -> Ends:
    """Wilson's interval of a share, or a mean of shares, for as many as its variance between resamples is worth.

    The percentiles of the resamples are too near where the share is near 0 or 1, and have no width at its ends. Few
    groups say little of how much they vary (Rao and Scott, Biometrics 1992, estimate the worth of clusters so): one
    more is taken to vary as a group whose members are all alike, and at the ends every group counts as one.

    Args:
        value: NaN where it is undefined.
        values_R: of resamples of the groups; NaN where it is undefined, which is left out.
        n_groups: how many groups have what the share is of.

    Returns:
        No interval where the share or every resample is undefined, nor of fewer than two groups.
    """
    seen = variance_between(value, values_R, n_groups)
    if seen is None:
        return None, None
    spread = value * (1 - value)
    variance = (n_groups * seen + spread / n_groups) / (n_groups + 1)
    return wilson(value, spread / variance if spread > 1e-12 else n_groups)


def gap_interval(value: float, values_R: np.ndarray, n_groups: int) -> Ends:
    """t interval of the difference of two shares of the same tiles, its error from the resamples.

    Where no resample changes it, as of two models that say the same, the models differ in none of the groups: it lies
    within the largest share (Wilson's) of groups in which they could differ all the same.

    Args and returns are as of `share_interval`.
    """
    seen = variance_between(value, values_R, n_groups)
    if seen is None:
        return None, None
    error = seen**0.5
    away = float(student.ppf(0.975, n_groups - 1)) * error if error > 1e-12 else wilson(0.0, n_groups)[1]
    return max(value - away, -1.0), min(value + away, 1.0)


def variance_between(value: float, values_R: np.ndarray, n_groups: int) -> float | None:
    """Of a number between samples of the groups; None where `share_interval` has no interval."""
    defined_R = values_R[~np.isnan(values_R)]
    if np.isnan(value) or not len(defined_R) or n_groups < 2:
        return None
    return float(defined_R.var()) * n_groups / (n_groups - 1)
