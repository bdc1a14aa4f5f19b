"""The linear probe on tile features, and scores with intervals over groups. No torch.

Letters: N tiles, D feature width, C classes, G groups (patients or slides), R resamples.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier

from extract.shares import Ends, gap_interval, share_interval

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse regularisation strengths that val chooses from."""
N_NEIGHBOURS = 20
"""As DINO's authors chose for ImageNet (Caron et al. 2021, section 4.1)."""
RESAMPLES_AT_ONCE = 100
SCORES = ("accuracy", "balanced_accuracy", "macro_f1")


@dataclass(frozen=True)
class Probe:
    """A linear classifier on raw features: logits_NC = features_ND @ weight_CD.T + bias_C."""

    weight_CD: np.ndarray
    bias_C: np.ndarray
    strength: float
    val_loss: float
    converged: bool

    def logits(self, features_ND: np.ndarray) -> np.ndarray:
        logits_NC: np.ndarray = features_ND @ self.weight_CD.T + self.bias_C
        return logits_NC


def fit_probe(
    train_ND: np.ndarray,
    labels_N: np.ndarray,
    val_ND: np.ndarray,
    val_labels_N: np.ndarray,
    n_classes: int,
    *,
    balanced: bool,
) -> Probe:
    """Logistic regression on standardised features; the regularisation with the lowest log loss on val is kept."""
    mean_D, std_D = train_ND.mean(axis=0, dtype=np.float64), train_ND.std(axis=0, dtype=np.float64)
    std_D = np.where(std_D > 1e-12 * np.abs(mean_D).max(initial=1e-12), std_D, np.inf)  # what never varies says nothing
    train_ND, val_ND = (train_ND - mean_D) / std_D, (val_ND - mean_D) / std_D
    weights_N = class_weights(val_labels_N, n_classes)[val_labels_N] if balanced else None
    best: tuple[float, float, LogisticRegression] | None = None
    converged = True
    for strength in GRID:
        model = LogisticRegression(C=strength, max_iter=1000, class_weight="balanced" if balanced else None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(train_ND, labels_N)
        loss = log_loss(val_labels_N, model.predict_proba(val_ND), labels=np.arange(n_classes), sample_weight=weights_N)
        if best is None or loss < best[0]:
            best = (float(loss), strength, model)
            converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    assert best is not None
    weight_CD, bias_C = best[2].coef_, best[2].intercept_
    if n_classes == 2:  # one row: the log odds of the second class
        weight_CD, bias_C = np.concatenate([0 * weight_CD, weight_CD]), np.concatenate([0 * bias_C, bias_C])
    weight_CD = weight_CD / std_D
    return Probe(weight_CD, bias_C - weight_CD @ mean_D, best[1], best[0], converged)


def knn_logits(train_ND: np.ndarray, labels_N: np.ndarray, test_ND: np.ndarray, n_classes: int) -> np.ndarray:
    """Logarithms of the shares of the classes among the nearest training tiles by cosine, (N, C); see N_NEIGHBOURS.

    A class that none of them has gets a tenth of a neighbour, so that the logarithm exists; ties fall to the earlier
    class.
    """
    n = min(N_NEIGHBOURS, len(train_ND))
    model = KNeighborsClassifier(n_neighbors=n, metric="cosine", algorithm="brute").fit(train_ND, labels_N)
    shares_NC = np.zeros((len(test_ND), n_classes))
    shares_NC[:, model.classes_] = model.predict_proba(test_ND)
    logits_NC: np.ndarray = np.log(np.maximum(shares_NC, 0.1 / n))
    return logits_NC


def class_weights(labels_N: np.ndarray, n_classes: int) -> np.ndarray:
    """(C,): N / (C * N_c), so that every class weighs the same."""
    return len(labels_N) / (n_classes * np.maximum(np.bincount(labels_N, minlength=n_classes), 1))


# --- scores --------------------------------------------------------------------------------------------------------


def confusion(labels_N: np.ndarray, predicted_N: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) counts; row = true class, column = predicted class."""
    counts_CC = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(counts_CC, (labels_N, predicted_N), 1)
    return counts_CC


def scores_of(confusion_RCC: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy (mean recall) and macro F1 of every confusion matrix, (R,); NaN without a class."""
    right_RC = np.diagonal(confusion_RCC, axis1=1, axis2=2)
    true_RC, called_RC = confusion_RCC.sum(axis=2), confusion_RCC.sum(axis=1)
    all_there_R = (true_RC > 0).all(axis=1)
    total_R = true_RC.sum(axis=1)
    recall_RC = right_RC / np.maximum(true_RC, 1)
    f1_RC = 2 * right_RC / np.maximum(true_RC + called_RC, 1)
    values = {
        "accuracy": right_RC.sum(axis=1) / np.maximum(total_R, 1),
        "balanced_accuracy": recall_RC.mean(axis=1),
        "macro_f1": f1_RC.mean(axis=1),
    }
    return {name: np.where(all_there_R, value_R, np.nan) for name, value_R in values.items()}


def score_table(
    labels_N: np.ndarray,
    predicted: dict[str, np.ndarray],
    groups_N: np.ndarray,
    n_classes: int,
    resamples: int,
    seed: int,
    baseline: str,
) -> dict[str, dict[str, Any]]:
    """Scores of every model with 95 % intervals, and of each its difference to `baseline`.

    Groups are drawn with replacement, all their tiles together; every model sees the same draws, so that the
    difference is a paired one. The draws give the variance (`extract.shares`): Wilson's interval of a score, a t
    interval of a difference. A draw that lacks a class is left out and counted in `undefined`. With fewer than two
    groups there is no interval.

    Returns:
        {model: {"scores": {score: {value, low, high}}, "difference": {score: {value, low, high}}, "undefined": n,
        "confusion": [[...]]}}; the baseline has no difference.
    """
    groups, group_N = np.unique(groups_N, return_inverse=True)
    counts = {}
    for name, predicted_N in predicted.items():
        counts_GCC = np.zeros((len(groups), n_classes, n_classes))  # float: tensordot through BLAS
        np.add.at(counts_GCC, (group_N, labels_N, predicted_N), 1)
        counts[name] = counts_GCC
    value = {name: scores_of(c.sum(axis=0, keepdims=True)) for name, c in counts.items()}
    drawn = _resampled(counts, resamples if len(groups) > 1 else 0, seed)
    having_C = (next(iter(counts.values())).sum(axis=2) > 0).sum(axis=0)  # groups that have a class
    worth = {s: len(groups) if s == "accuracy" else min(len(groups), n_classes * int(having_C.min())) for s in SCORES}
    table = {}
    for name, counts_GCC in counts.items():
        own, drawn_R = value[name], drawn[name]
        entry: dict[str, Any] = {
            "scores": {s: _entry(own[s][0], share_interval(own[s][0], drawn_R[s], worth[s])) for s in SCORES}
        }
        if name != baseline:
            base, base_R = value[baseline], drawn[baseline]
            gaps = {s: (own[s][0] - base[s][0], drawn_R[s] - base_R[s]) for s in SCORES}
            entry["difference"] = {
                s: _entry(gap, gap_interval(gap, gap_R, worth[s])) for s, (gap, gap_R) in gaps.items()
            }
        entry["undefined"] = int(np.isnan(drawn[name][SCORES[0]]).sum())
        entry["confusion"] = counts_GCC.sum(axis=0).astype(int).tolist()
        table[name] = entry
    return table


def _resampled(counts: dict[str, np.ndarray], resamples: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """{model: {score: (R,)}} over draws of groups."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in counts}
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        n_groups = len(next(iter(counts.values())))
        n_now = min(RESAMPLES_AT_ONCE, resamples - start)
        drawn_RG = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_now)
        for name, counts_GCC in counts.items():
            parts[name].append(scores_of(np.tensordot(drawn_RG, counts_GCC, axes=1)))
    return {
        name: {s: np.concatenate([np.empty(0), *(part[s] for part in found)]) for s in SCORES}
        for name, found in parts.items()
    }


def _entry(value: float, interval: Ends) -> dict[str, float | None]:
    low, high = (None if end is None else float(end) for end in interval)
    return {"value": None if np.isnan(value) else float(value), "low": low, "high": high}
