"""How far an AUC strays from its true value, by the binormal model: its variance at any true AUC, and score limits.

Near 1 the sample itself says little about its own spread: most slides have none of the other class on their wrong side.
The model says it instead: scores of positives and negatives are normal after some rising transformation, which nobody
needs to know (Metz, Seminars in Nuclear Medicine 1978). Two comparisons of a positive with a negative go together when
they share a slide or a patient; their covariance is that of two correlated normal differences both being above 0.
Hanley and McNeil (Radiology 1982) do the same with exponential scores; the limits at which the true AUC would just be
refused by its own variance are Newcombe's (Statistics in Medicine 2006, method 5), with clusters (Obuchowski 1997).

Axes: S slides, P patients, K kinds of pairs of comparisons, L true values looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, owens_t
from scipy.stats import rankdata

from extract.shares import Z

GRID = np.linspace(0, 1, 17)
ROUNDS = 8
"""A limit is sought on a grid of 17 points, then on one between two of these, and so on: to 2e-10 of [0, 1]."""


def both_below(h: np.ndarray, k: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """The chance that two standard normals with this correlation are below h and k (Owen 1956, equation 2.1)."""
    near = 1e-9  # Owen's formula divides by h and k
    h, k = (np.where(np.abs(limit) < near, near, limit) for limit in (h, k))
    r = np.clip(correlation, -1 + 1e-12, 1 - 1e-12)
    root = np.sqrt((1 - r) * (1 + r))
    tails = owens_t(h, (k - r * h) / (h * root)) + owens_t(k, (h - r * k) / (k * root))
    below: np.ndarray = (ndtr(h) + ndtr(k)) / 2 - tails - np.where(h * k < 0, 0.5, 0.0)
    return below


def covariance(auc: np.ndarray, correlation: np.ndarray | float) -> np.ndarray:
    """Of two comparisons (positive above negative: 1 or 0) whose normal differences have this correlation.

    The chance that both are above 0, less the square of one's: Phi2(h, h) = Phi(h) - 2 T(h, sqrt((1 - r) / (1 + r)))
    with Owen's T (Owen, Annals of Mathematical Statistics 1956) and Phi(h) = auc.
    """
    h = ndtri(np.clip(auc, 1e-12, 1 - 1e-12))
    slope = np.sqrt((1 - np.asarray(correlation)) / (1 + np.asarray(correlation)))
    shared: np.ndarray = auc * (1 - auc) - 2 * owens_t(h, slope)
    return shared


@dataclass(frozen=True)
class Binormal:
    """Pairs of comparisons that go together, by what they share: how they correlate, and their share of all pairs."""

    correlation_K: np.ndarray
    weight_K: np.ndarray

    def variance(self, auc: np.ndarray) -> np.ndarray:
        """Of the estimated AUC where the true one is this."""
        each = self.weight_K[:, None] * covariance(np.atleast_1d(auc)[None], self.correlation_K[:, None])
        total: np.ndarray = np.maximum(each.sum(axis=0), 0)
        return total

    def covariance(self, auc_a: np.ndarray, auc_b: np.ndarray) -> np.ndarray:
        """Of the estimated AUCs of two scores, where the true ones are these; of a model that `shared` gives. (L,)"""
        h, k = (ndtri(np.clip(auc, 1e-12, 1 - 1e-12))[None] for auc in (auc_a, auc_b))
        both = both_below(h, k, self.correlation_K[:, None]) - auc_a * auc_b
        total: np.ndarray = (self.weight_K[:, None] * both).sum(axis=0)
        return total


def binormal(positives_P: np.ndarray, negatives_P: np.ndarray, of_positives: float, within: float) -> Binormal:
    """The model of slides of both classes by patient.

    Args:
        positives_P, negatives_P: slides of either class of each patient.
        of_positives: the positives' share of the variance of a difference, between 0 and 1; 0.5 = equal spreads.
        within: intraclass correlation of the slides of a patient.
    """
    return shared(positives_P, negatives_P, of_positives, 1.0, within)


def shared(
    positives_P: np.ndarray, negatives_P: np.ndarray, of_positives: float, same: float, within: float
) -> Binormal:
    """How a comparison by one score goes together with a comparison by another one.

    Args:
        positives_P, negatives_P: slides of either class of each patient.
        of_positives: of both scores, as for `binormal`.
        same: correlation of the two scores of a slide, within its class. within: of those of two slides of a patient.
    """
    m, n = positives_P.sum(), negatives_P.sum()
    same_m, same_n = 1 / m, 1 / n
    near_m, near_n = ((sizes**2).sum() / sizes.sum() ** 2 - 1 / sizes.sum() for sizes in (positives_P, negatives_P))
    shares_m = ((same, same_m), (within, near_m), (0.0, 1 - same_m - near_m))
    shares_n = ((same, same_n), (within, near_n), (0.0, 1 - same_n - near_n))
    by_m, by_n = of_positives, 1 - of_positives
    kinds = [(by_m * r + by_n * s, share * also) for r, share in shares_m for s, also in shares_n]
    crossed = 2 * (positives_P * negatives_P).sum() / (m * n)  # the positive of one, the negative of the other
    kinds.append((-within * (by_m * by_n) ** 0.5, crossed))
    found = [(r, share) for r, share in kinds if r != 0 and share > 0]
    return Binormal(np.array([r for r, _ in found]), np.array([share for _, share in found]))


def independent(positives: int, negatives: int, of_positives: float) -> Binormal:
    """The model of as many slides, each of a patient of its own."""
    is_positive_P = np.arange(positives + negatives) < positives
    return binormal(is_positive_P.astype(np.int64), (~is_positive_P).astype(np.int64), of_positives, 0.0)


def spread_of_positives(
    auc: float, variances: tuple[float, float], sizes: tuple[float, float], *, prior: float = 1.0
) -> float:
    """The positives' share of the variance, from how far the slides of either class differ in whom they rank above.

    Matches the ratio of the two variances (of the shares of the other class that each slide is on the right side of)
    to the model's; a prior worth `prior` slides a class says that both classes spread alike.

    Args:
        variances: of the positives' shares and of the negatives', unbiased.
        sizes: effective numbers of positives and negatives.
    """
    (m, n), half = sizes, np.array(0.5)
    auc_ = np.array(min(max(auc, 1 - auc), 1 - 0.5 / (m * n)))

    def expected(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of_m, of_n = covariance(auc_, share), covariance(auc_, 1 - share)
        chance = auc_ * (1 - auc_) - of_m - of_n  # that of the slides of the other class one is compared with
        return of_m + chance / n, of_n + chance / m

    both = [
        (size * seen + prior * alike) / (size + prior)
        for size, seen, alike in zip(sizes, variances, expected(half), strict=True)
    ]
    wanted = float(both[0] / (both[0] + both[1]))
    low, high = 0.02, 0.98
    for _ in range(ROUNDS // 2):
        shares = low + (high - low) * GRID
        of_m, of_n = expected(shares)
        first = int(np.argmax(np.r_[of_m / (of_m + of_n) >= wanted, True][1:]))
        low, high = shares[min(first, len(GRID) - 2)], shares[min(first + 1, len(GRID) - 1)]
    return float(low + high) / 2


def score_limits(
    value: float,
    variance: Callable[[np.ndarray], np.ndarray],
    expected: Callable[[np.ndarray], np.ndarray] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    quantile: float = Z,
    power: float = 1.0,
) -> tuple[float, float]:
    """The true values at which `value` would lie just `quantile` of *their* standard errors away; within `bounds`.

    `expected`: what the estimate is on average where the true value is this; default: the true value. `power`: how far
    away is taken of this power of 1 - value, whose standard error is that of `value` times the power's slope.
    """
    inside, outside = np.full(2, value), np.array(bounds)
    if expected is not None:
        inside = np.full(2, solve(expected, value))
    for _ in range(ROUNDS):
        true = inside[:, None] + (outside - inside)[:, None] * GRID
        flat = true.ravel()
        missing = np.maximum(1 - (flat if expected is None else expected(flat)), 0)
        away = ((1 - value) ** power - missing**power) * missing ** (1 - power) / power
        held = (away**2 <= quantile**2 * variance(flat)).reshape(true.shape)
        held[:, 0] = True
        last = np.argmin(np.c_[held, [False, False]], axis=1) - 1
        at = np.minimum(last + 1, len(GRID) - 1)
        inside, outside = true[[0, 1], last], true[[0, 1], at]
    low, high = (inside + outside) / 2
    return float(low), float(high)


def solve(rising: Callable[[np.ndarray], np.ndarray], wanted: float) -> float:
    """Where in 0..1 a rising function has the value `wanted`; the nearer end where it has not."""
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        points = low + (high - low) * GRID
        first = int(np.argmax(np.r_[(rising(points) >= wanted)[1:], True]))
        low, high = points[min(first, len(GRID) - 2)], points[min(first + 1, len(GRID) - 1)]
    return float(low + high) / 2


def intraclass_correlation(values_S: np.ndarray, patient_S: np.ndarray) -> float:
    """Of the slides of a patient, by one-way analysis of variance (Donner, International Statistical Review 1986).

    Within 0..1; 1 where nothing varies or no patient has several, which makes the slides of a patient count as one.
    """
    found = components(values_S, values_S, patient_S)
    if found is None:
        return 1.0
    between, within = found
    return 1.0 if between + within <= 1e-15 else float(np.clip(between / (between + within), 0, 1))


def components(a_S: np.ndarray, b_S: np.ndarray, patient_S: np.ndarray) -> tuple[float, float] | None:
    """Covariance of two values of a slide: what lies between patients, and what within; of one value, its variance.

    None with one patient, or where none has several slides.
    """
    size_P, n = np.bincount(patient_S), len(a_S)
    n_patients = len(size_P)
    if n_patients in (1, n):
        return None
    a_S, b_S = a_S - a_S.mean(), b_S - b_S.mean()
    a_P, b_P = (np.bincount(patient_S, weights=values_S) / size_P for values_S in (a_S, b_S))
    between = (size_P * a_P * b_P).sum() / (n_patients - 1)
    within = ((a_S - a_P[patient_S]) * (b_S - b_P[patient_S])).sum() / (n - n_patients)
    typical = (n - (size_P**2).sum() / n) / (n_patients - 1)
    return float((between - within) / typical), float(within)


def normal_scores(values_S: np.ndarray, class_S: np.ndarray) -> np.ndarray:
    """Ranks within the class as quantiles of a standard normal: what no rising transformation changes."""
    scores_S = np.zeros(len(values_S))
    for c in (False, True):
        own = class_S == c
        if own.any():
            scores = ndtri((rankdata(values_S[own]) - 0.5) / own.sum())
            spread = scores.std()
            scores_S[own] = scores / spread if spread > 0 else 0.0
    return scores_S
