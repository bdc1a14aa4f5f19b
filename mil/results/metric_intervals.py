"""The interval of every metric in METRICS: which method each has.

Two classes: of the positive class. Several: each against the rest, and their mean with the correlations between them.
Axes: S slides, C classes, R resamples (weightings).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mil.results.intervals import bootstrap
from mil.tasks.binormal import intraclass_correlation
from mil.tasks.estimates import (
    LEVEL,
    Estimate,
    auc_interval,
    average_precision_interval,
    balanced_accuracy_interval,
    f1_interval,
    mean_interval,
    mean_of,
    proportion_interval,
    undefined,
)
from mil.tasks.metrics import METRICS, surprise

Measured = Callable[[np.ndarray], dict[str, np.ndarray]]
"""weights_RS -> {metric: values_R}"""

CHANCE_DRAWS = 200
"""Samples of a calibrated study that the calibration error is compared with."""
AVERAGED = ("auc", "average_precision", "sensitivity", "specificity", "f1")
"""What of several classes is the mean of each against the rest, with limits by MOVER."""


def of_class(
    positive: int, labels_S: np.ndarray, p_SC: np.ndarray, predicted_S: np.ndarray, patients_S: np.ndarray
) -> dict[str, Estimate]:
    """Every metric of one class against the rest but the calibration error; all undefined where a class is absent."""
    truth_S, called_S, p_S = labels_S == positive, predicted_S == positive, p_SC[:, positive]
    if truth_S.all() or not truth_S.any():
        return dict.fromkeys(METRICS, undefined(len(labels_S)))
    right_S = truth_S == called_S
    found = proportion_interval(right_S, patients_S, among=truth_S)
    rejected = proportion_interval(right_S, patients_S, among=~truth_S)
    return {
        "auc": auc_interval(truth_S, p_S, patients_S),
        "average_precision": average_precision_interval(truth_S, p_S, patients_S),
        "accuracy": proportion_interval(right_S, patients_S),
        "balanced_accuracy": balanced_accuracy_interval(truth_S, called_S, patients_S),
        "sensitivity": found,
        "specificity": rejected,
        "f1": f1_interval(truth_S, called_S, patients_S),
        "brier": mean_interval((p_S - truth_S) ** 2, patients_S, most=1.0),
        "log_loss": mean_interval(surprise(np.where(truth_S, p_S, 1 - p_S)), patients_S),
    }


def of_all(
    labels_S: np.ndarray, p_SC: np.ndarray, predicted_S: np.ndarray, patients_S: np.ndarray
) -> dict[str, Estimate]:
    """Every metric as `weighted_metrics` averages it, but the calibration error."""
    n_classes = p_SC.shape[1]
    if n_classes == 2:
        return of_class(1, labels_S, p_SC, predicted_S, patients_S)
    each = [of_class(c, labels_S, p_SC, predicted_S, patients_S) for c in range(n_classes)]
    averaged = {name: mean_of([one[name] for one in each], patients_S) for name in AVERAGED}
    wrong_S = ((p_SC - np.eye(n_classes)[labels_S]) ** 2).mean(axis=1)
    return averaged | {
        "balanced_accuracy": averaged["sensitivity"],
        "accuracy": proportion_interval(predicted_S == labels_S, patients_S),
        "brier": mean_interval(wrong_S, patients_S, most=1.0),
        "log_loss": mean_interval(surprise(p_SC[np.arange(len(labels_S)), labels_S]), patients_S),
    }


def ece_of(classes: Sequence[int], labels_S: np.ndarray, p_SC: np.ndarray) -> Measured:
    """The calibration error alone: mean over these classes, each against the rest."""

    def measured(weights_RS: np.ndarray) -> dict[str, np.ndarray]:
        each = [METRICS["ece"].weighted(labels_S == c, p_SC[:, c], labels_S == c, weights_RS) for c in classes]
        return {"ece": np.mean(each, axis=0)}

    return measured


def ece_by_chance(
    classes: Sequence[int], labels_S: np.ndarray, p_SC: np.ndarray, patients_S: np.ndarray, draws: int, seed: int
) -> np.ndarray:
    """The calibration error of samples whose labels are drawn from these very probabilities, (R,): what a calibrated
    study shows by chance (consistency resampling, Broecker and Smith, Weather and Forecasting 2007).

    Slides of a patient go together as often as the residuals of the true labels are correlated within patients.
    """
    rng, n = np.random.default_rng([seed, 1]), len(labels_S)
    _, patient_S = np.unique(patients_S, return_inverse=True)
    together = intraclass_correlation((labels_S == classes[-1]) - p_SC[:, classes[-1]], patient_S)
    cumulative_SC, one_1S, found_R = np.cumsum(p_SC, axis=1), np.ones((1, n)), np.full(draws, np.nan)
    for r in range(draws):
        of_patient_S = rng.random(patient_S.max() + 1)[patient_S]
        drawn_S = np.where(rng.random(n) < together, of_patient_S, rng.random(n))
        label_S = np.minimum((drawn_S[:, None] >= cumulative_SC).sum(axis=1), p_SC.shape[1] - 1)
        found_R[r] = ece_of(classes, label_S, p_SC)(one_1S)["ece"][0]
    defined: np.ndarray = found_R[np.isfinite(found_R)]
    return defined


def calibration_error(
    classes: Sequence[int], labels_S: np.ndarray, p_SC: np.ndarray, patients_S: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """Limits of the ECE by resampling: low, high, resamples, undefined.

    A resample's error is larger than the sample's as the sample's is larger than the truth, by as much: both are taken
    off (Efron and Tibshirani 1993, section 10.6), never below 0. The upper limit is at least the sample's own error;
    the lower one is 0 where a calibrated study would show as much by chance. An approximation: in simulations of 60 and
    130 slides it holds the truth of calibrated studies in 96 to 98 %, of others in 82 to 92 %.
    """
    measured = ece_of(classes, labels_S, p_SC)
    interval = bootstrap(measured, patients_S.tolist(), resamples, seed)["ece"]
    value = float(measured(np.ones((1, len(patients_S))))["ece"][0])
    counted = {"resamples": interval.resamples, "undefined": interval.undefined}
    if interval.low is None or interval.high is None or interval.mean is None or np.isnan(value):
        return {"low": None, "high": None, "method": None, **counted}
    bias = max(interval.mean - value, 0.0)
    low, high = (max(limit - 2 * bias, 0.0) for limit in (interval.low, interval.high))
    by_chance_R = ece_by_chance(classes, labels_S, p_SC, patients_S, CHANCE_DRAWS, seed)
    if not len(by_chance_R) or value <= np.quantile(by_chance_R, (1 + LEVEL) / 2):
        low = 0.0
    return {"low": min(low, value), "high": max(high, value), "method": "bootstrap", **counted}
