"""An AUC within strata (sites) with its score interval, and how far it lies from that of all slides.

Positives are compared with negatives of their own stratum only. The weighted mean of the strata's AUCs has, at a true
value that they share, the variance of the binormal model (`mil.tasks.binormal`) of each, weights squared.

Axes: S slides, P patients, K strata, L true values looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from extract.shares import Z
from mil.tasks.binormal import Binormal, binormal, intraclass_correlation, normal_scores, score_limits
from mil.tasks.estimates import (
    Estimate,
    Patients,
    correlations,
    patient_index,
    ranked_slides,
    shrunken_ratio,
    undefined,
    variance_of,
)


def stratified_auc_interval(
    labels: ArrayLike, scores: ArrayLike, strata: ArrayLike, patients: Patients = None
) -> Estimate:
    """Mean of the strata's AUCs, each weighing n+ n- / (n+ + n-), with its score interval.

    These weights make the mean as certain as it can be (van Elteren 1960); a stratum of one class has none. Both
    classes are taken to spread alike, and slides of a patient to correlate as the scores within stratum and class do.

    Args:
        labels: (S,) 0 or 1. scores: (S,) only their order within a stratum counts. strata, patients: (S,).

    Returns:
        No value where no stratum has both classes; no interval with fewer than two patients of either class in those.
    """
    truth_S, score_S = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    stratum_S, patient_S = np.unique(np.asarray(strata), return_inverse=True)[1], patient_index(patients, len(truth_S))
    slides_KS = [np.flatnonzero(stratum_S == k) for k in np.unique(stratum_S)]
    mixed_KS = [own for own in slides_KS if 0 < truth_S[own].sum() < len(own)]
    if not mixed_KS:
        return undefined(len(truth_S))
    weights_K = np.array([truth_S[own].sum() * (~truth_S[own]).sum() / len(own) for own in mixed_KS])
    weights_K /= weights_K.sum()
    value, influence_S = 0.0, np.zeros(len(truth_S))
    for weight, own in zip(weights_K, mixed_KS, strict=True):
        found = ranked_slides(truth_S[own], score_S[own], patient_S[own])
        if found is not None:
            value += float(weight * found[0].auc)
            influence_S[own] = weight * found[0].influence_S
    used = np.concatenate(mixed_KS)
    n_patients = min(len(np.unique(patient_S[used[truth_S[used] == one]])) for one in (True, False))
    if n_patients < 2:
        return Estimate(value, None, None, None, influence_S, n_patients)
    within = stratum_correlation(truth_S[used], score_S[used], stratum_S[used], patient_S[used])
    models = [model_of(truth_S[own], patient_S[own], within) for own in mixed_KS]

    def variance(true: np.ndarray) -> np.ndarray:
        total: np.ndarray = np.sum([w**2 * m.variance(true) for w, m in zip(weights_K, models, strict=True)], axis=0)
        return total

    half = 0.5 / sum(truth_S[own].sum() * (~truth_S[own]).sum() for own in mixed_KS)
    usual = float(variance(np.array([min(max(value, half), 1 - half)]))[0])
    ratio = shrunken_ratio(variance_of(influence_S[used], np.unique(patient_S[used], return_inverse=True)[1]), usual)
    low, high = score_limits(value, lambda true: ratio * variance(true))
    return Estimate(value, low, high, "score", influence_S, n_patients)


def model_of(truth_S: np.ndarray, patient_S: np.ndarray, within: float) -> Binormal:
    n = int(patient_S.max()) + 1
    positives_P, negatives_P = (np.bincount(patient_S[own], minlength=n) for own in (truth_S, ~truth_S))
    return binormal(positives_P, negatives_P, 0.5, within)


def stratum_correlation(
    truth_S: np.ndarray, score_S: np.ndarray, stratum_S: np.ndarray, patient_S: np.ndarray
) -> float:
    """Intraclass correlation of the scores of a patient, less the mean of their stratum and class."""
    scores_S, cell_S = normal_scores(score_S, truth_S), stratum_S * 2 + truth_S
    counts = np.bincount(cell_S)
    sums = np.bincount(cell_S, weights=scores_S)
    several_S = counts[cell_S] > 1
    left_S = (scores_S - sums[cell_S] / counts[cell_S])[several_S]
    index_S = np.unique(patient_S[several_S], return_inverse=True)[1]
    return intraclass_correlation(left_S, index_S) if len(left_S) else 1.0


def nested_difference(a: Estimate, b: Estimate, patients: Patients = None) -> Estimate:
    """a - b, two numbers within 0..1 of which one takes up most of the other, as all comparisons do those within sites.

    The standard error of each is half the width of its interval over 1.96, and their correlation that of their
    influences between patients; half of the excess over the sample's own variance is kept.
    """
    if a.value is None or b.value is None:
        return undefined(len(a.influence_S))
    value, influence_S, n = a.value - b.value, a.influence_S - b.influence_S, min(a.patients, b.patients)
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value, None, None, None, influence_S, n)
    halves = np.array([(a.high - a.low) / 2, -(b.high - b.low) / 2])
    usual = float(halves @ correlations([a, b], patients) @ halves) / Z**2
    seen = variance_of(influence_S, patient_index(patients, len(influence_S)))
    half = Z * (max(usual, 0.0) * shrunken_ratio(seen, usual)) ** 0.5
    return Estimate(value, max(value - half, -1.0), min(value + half, 1.0), "nested", influence_S, n)
