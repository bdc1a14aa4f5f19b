"""The interval of every metric in METRICS: which method each has.

Two classes: of the positive class. Several: each against the rest, and their mean with the correlations between them.
Axes: S slides, C classes, R resamples (weightings).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mil.tasks.estimates import (
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
