"""METRICS: plain functions of (labels, probabilities[, threshold]), and patient-level bootstrap intervals for them.

Every metric is written once, for many weightings of the slides at the same time. A weight of 1 for every slide gives
the metric itself; the bootstrap is a matrix of weights (how often each slide was drawn), so that 1000 resamples cost
about as much as a few matrix products. On a set that holds one class, every metric is undefined: None, never a number.

Axes: S slides, C classes, R resamples (weightings), G groups of slides with equal probability, B calibration bins.
Labels are class indices; with two classes, index 1 is the positive class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

ECE_BINS = 10
"""Equal-width bins of the positive class's probability: [0, 0.1), [0.1, 0.2), ..., [0.9, 1]."""

Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One metric of two classes. Call it like a function: `METRICS["auc"](labels, probabilities)`.

    `compute(truth_S, p_S, predicted_S, weights_RS) -> values_R` gets bools, floats, bools and weights >= 0. It need
    not care for sets with one class: `weighted` makes those NaN.
    """

    title: str
    compute: Weighted
    higher_is_better: bool = True
    at_threshold: bool = False

    def __call__(self, labels: ArrayLike, probabilities: ArrayLike, threshold: float = 0.5) -> float | None:
        """The metric, or None where it is undefined (one class, or no slides).

        Args:
            labels: (S,) 0 or 1.
            probabilities: (S,) probability of class 1.
            threshold: a slide is called positive when its probability is at least this.

        Raises:
            ValueError: other labels, other lengths, or probabilities that are not within 0..1.
        """
        truth_S, p_S = checked(labels, probabilities)
        return none_if_nan(self.weighted(truth_S, p_S, p_S >= threshold, np.ones((1, len(p_S))))[0])

    def weighted(
        self, truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray
    ) -> np.ndarray:
        """`compute` where both classes have weight, NaN elsewhere."""
        positive_R, negative_R = weights_RS @ truth_S, weights_RS @ ~truth_S
        two_classes_R = (positive_R > 0) & (negative_R > 0)
        if not two_classes_R.any():
            return np.full(len(weights_RS), np.nan)
        return np.where(two_classes_R, self.compute(truth_S, p_S, predicted_S, weights_RS), np.nan)


def auc(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: the chance that a positive ranks above a negative, ties counted half."""
    positive_RG, negative_RG = _by_probability(truth_S, p_S, weights_RS)
    below_RG = np.cumsum(negative_RG, axis=1) - negative_RG
    won_R = (positive_RG * (below_RG + negative_RG / 2)).sum(axis=1)
    return _divide(won_R, positive_RG.sum(axis=1) * negative_RG.sum(axis=1))


def average_precision(
    truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray
) -> np.ndarray:
    """Sum over thresholds of (gain in recall) x (precision), without interpolation, as scikit-learn defines it."""
    positive_RG, negative_RG = _by_probability(truth_S, -p_S, weights_RS)
    tp_RG, fp_RG = np.cumsum(positive_RG, axis=1), np.cumsum(negative_RG, axis=1)
    precision_RG = np.nan_to_num(_divide(tp_RG, tp_RG + fp_RG))  # 0/0 only where nothing was drawn yet: no gain there
    return _divide((positive_RG * precision_RG).sum(axis=1), positive_RG.sum(axis=1))


def accuracy(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Fraction of slides called right."""
    return _mean(truth_S == predicted_S, weights_RS)


def sensitivity(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Fraction of the positives called positive (recall)."""
    return _divide(weights_RS @ (truth_S & predicted_S), weights_RS @ truth_S)


def specificity(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Fraction of the negatives called negative."""
    return _divide(weights_RS @ (~truth_S & ~predicted_S), weights_RS @ ~truth_S)


def balanced_accuracy(
    truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray
) -> np.ndarray:
    """Mean of sensitivity and specificity."""
    found_R = sensitivity(truth_S, p_S, predicted_S, weights_RS)
    balanced_R: np.ndarray = (found_R + specificity(truth_S, p_S, predicted_S, weights_RS)) / 2
    return balanced_R


def f1(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and sensitivity; 0 when no positive is found."""
    return _divide(2 * (weights_RS @ (truth_S & predicted_S)), weights_RS @ truth_S + weights_RS @ predicted_S)


def brier(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Mean squared difference of the positive class's probability and the outcome."""
    return _mean((p_S - truth_S) ** 2, weights_RS)


def ece(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Expected calibration error: |mean probability - fraction of positives| per bin, averaged by the bin's weight.

    `ECE_BINS` equal-width bins of the positive class's probability; empty bins count nothing.
    """
    bin_S = calibration_bin(p_S)
    gap_SB = np.zeros((len(p_S), ECE_BINS))
    gap_SB[np.arange(len(p_S)), bin_S] = p_S - truth_S
    return _divide(np.abs(weights_RS @ gap_SB).sum(axis=1), weights_RS.sum(axis=1))


def log_loss(truth_S: np.ndarray, p_S: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Mean of -ln(probability of the true class), in nats; probabilities of 0 count as the smallest float step."""
    return _mean(surprise(np.where(truth_S, p_S, 1 - p_S)), weights_RS)


METRICS: dict[str, Metric] = {
    "auc": Metric("AUC", auc),
    "average_precision": Metric("average precision", average_precision),
    "accuracy": Metric("accuracy", accuracy, at_threshold=True),
    "balanced_accuracy": Metric("balanced accuracy", balanced_accuracy, at_threshold=True),
    "sensitivity": Metric("sensitivity", sensitivity, at_threshold=True),
    "specificity": Metric("specificity", specificity, at_threshold=True),
    "f1": Metric("F1", f1, at_threshold=True),
    "brier": Metric("Brier score", brier, higher_is_better=False),
    "ece": Metric("calibration error (ECE)", ece, higher_is_better=False),
    "log_loss": Metric("log loss", log_loss, higher_is_better=False),
}


def against_the_rest(n_classes: int) -> list[int]:
    """The classes that are looked at one against the rest: of two the last, of several each."""
    return [1] if n_classes == 2 else list(range(n_classes))


def weighted_metrics(
    labels_S: np.ndarray, p_SC: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric under every weighting, (R,) each, NaN where undefined.

    Two classes: of the positive class (the last). Several: the mean over the classes, each against the rest (macro),
    undefined when a class is absent; except accuracy, which is the fraction called right, and log loss, which is that
    of the true class's probability; both are undefined when only one class is present.
    """
    n_classes = p_SC.shape[1]
    if n_classes == 2:
        return class_metrics(1, labels_S, p_SC, predicted_S, weights_RS)
    each = [class_metrics(c, labels_S, p_SC, predicted_S, weights_RS) for c in range(n_classes)]
    values = {name: np.mean([one[name] for one in each], axis=0) for name in METRICS}
    values["balanced_accuracy"] = values["sensitivity"]  # with several classes: the mean recall
    present_RC = np.stack([weights_RS @ (labels_S == c) > 0 for c in range(n_classes)], axis=1)
    mixed_R = present_RC.sum(axis=1) > 1
    p_true_S = p_SC[np.arange(len(labels_S)), labels_S]
    values["accuracy"] = np.where(mixed_R, _mean(labels_S == predicted_S, weights_RS), np.nan)
    values["log_loss"] = np.where(mixed_R, _mean(surprise(p_true_S), weights_RS), np.nan)
    return values


def class_metrics(
    positive: int, labels_S: np.ndarray, p_SC: np.ndarray, predicted_S: np.ndarray, weights_RS: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric of one class against the rest under every weighting, (R,) each, NaN where undefined."""
    truth_S, called_S = labels_S == positive, predicted_S == positive
    return {name: m.weighted(truth_S, p_SC[:, positive], called_S, weights_RS) for name, m in METRICS.items()}


def decide(p_SC: np.ndarray, threshold_S: ArrayLike = 0.5) -> np.ndarray:
    """Predicted class index of every slide: two classes by threshold on the last one, several by the highest."""
    if p_SC.shape[1] == 2:
        return (p_SC[:, 1] >= np.asarray(threshold_S)).astype(np.int64)
    class_S: np.ndarray = p_SC.argmax(axis=1)
    return class_S


def confusion(labels_S: np.ndarray, predicted_S: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) counts; row = true class, column = predicted class."""
    counts = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(counts, (labels_S, predicted_S), 1)
    return counts


def choose_threshold(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """The threshold with the highest Youden index (sensitivity + specificity - 1).

    Candidates lie midway between neighbouring probabilities, so that no slide sits on the threshold. Of equally good
    ones the nearest to 0.5 wins, of equally near ones the lower. None when one class is absent or when no threshold is
    better than chance.

    Args:
        labels: (S,) 0 or 1; must not be the slides that are reported.
        probabilities: (S,) probability of class 1.
    """
    truth_S, p_S = checked(labels, probabilities)
    if truth_S.all() or not truth_S.any():
        return None
    values, group_S = np.unique(p_S, return_inverse=True)
    positive_G = np.bincount(group_S, weights=truth_S)
    negative_G = np.bincount(group_S, weights=~truth_S)
    # a threshold between group g and g + 1 calls the groups up to g negative
    lost_G, rejected_G = np.cumsum(positive_G)[:-1], np.cumsum(negative_G)[:-1]
    youden_G = rejected_G / negative_G.sum() - lost_G / positive_G.sum()
    if not len(youden_G) or youden_G.max() <= 1e-12:
        return None
    middle = (values[:-1] + values[1:]) / 2
    middle = np.where(middle > values[:-1], middle, values[1:])  # neighbouring floats have no middle
    best = np.flatnonzero(youden_G >= youden_G.max() - 1e-12)
    return float(middle[best[np.argmin(np.abs(middle[best] - 0.5))]])


def calibration_bin(p_S: np.ndarray) -> np.ndarray:
    """Index 0..ECE_BINS-1 of the bin that each probability falls in; 1.0 belongs to the last."""
    return np.clip((p_S * ECE_BINS).astype(np.int64), 0, ECE_BINS - 1)


def none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool and probabilities as float64, one a slide; ValueError if not 0 or 1, or not within 0..1."""
    label_S, p_S = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if label_S.shape != p_S.shape or p_S.ndim != 1:
        raise ValueError(f"expected one label and one probability a slide, got {label_S.shape} and {p_S.shape}")
    wrong = [v for v in np.unique(label_S).tolist() if v not in (0, 1)]
    if wrong:
        raise ValueError(f"expected labels 0 and 1, got also {wrong}; give class indices, and 1 for the positive class")
    if not np.all((p_S >= 0) & (p_S <= 1)):
        raise ValueError(f"expected probabilities within 0..1, got {p_S[~((p_S >= 0) & (p_S <= 1))][:3].tolist()}")
    return label_S.astype(bool), p_S


def _by_probability(truth_S: np.ndarray, p_S: np.ndarray, weights_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives per group of equal probability, groups in rising order: (R, G) each."""
    order_S = np.argsort(p_S, kind="stable")
    sorted_S = p_S[order_S]
    starts_G = np.flatnonzero(np.r_[True, sorted_S[1:] != sorted_S[:-1]])
    positive_RS = weights_RS[:, order_S] * truth_S[order_S]
    negative_RS = weights_RS[:, order_S] * ~truth_S[order_S]
    return np.add.reduceat(positive_RS, starts_G, axis=1), np.add.reduceat(negative_RS, starts_G, axis=1)


def _mean(values_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    return _divide(weights_RS @ values_S, weights_RS.sum(axis=1))


def surprise(p_S: np.ndarray) -> np.ndarray:
    """-ln of the probability of the true class, in nats; of 0 as of the smallest float step."""
    surprise_S: np.ndarray = -np.log(np.clip(p_S, np.finfo(np.float64).eps, 1))
    return surprise_S


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the divisor is 0."""
    ratio: np.ndarray = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return ratio
