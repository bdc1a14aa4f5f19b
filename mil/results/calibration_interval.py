"""The interval of the calibration error (ECE), by turning a test round: which true errors would show as much by chance?

A sample's error is above the true one, the more so the fewer slides a bin has and the smaller the truth is, and a
bootstrap of it is higher still. So true errors are tried one by one. Each is spread over the bins as a logistic
recalibration has it (Cox, Biometrika 1958), and what chance adds to it comes from labels that are drawn half way from
the stated to the recalibrated probabilities (Broecker and Smith, Weather and Forecasting 2007), slides of a patient
together as often as their residuals go together. A truth stays within the limits if its samples show as much as was
seen in more than 2.5 % of cases, and as little. Where the stated probabilities would show as much by chance, the lower
limit is 0. Simulated coverage with 60 and 130 slides: 0.91 to 0.98 (`benchmarks/coverage.py`); the bootstrap less its
bias, which was shown before, held 0.80 to 0.99.

Axes: S slides, C classes, R samples drawn, G bins of all classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit

from mil.tasks.binormal import intraclass_correlation
from mil.tasks.estimates import LEVEL
from mil.tasks.metrics import ECE_BINS, calibration_bin

DRAWS = 400
"""Samples of every truth that is tried; fewer where the report asks for fewer resamples."""
STEPS = 201
"""True errors that are tried."""
RIDGE = 0.2
"""Weight of the prior that probabilities are right: intercept 0 and slope 1, each with a variance of 5."""
LOGIT_BOUND = 12.0


def calibration_error(
    classes: Sequence[int], labels_S: np.ndarray, p_SC: np.ndarray, patients_S: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """Limits of the ECE, the mean over these classes of each against the rest: low, high, method, resamples, undefined.

    None and None with one class, or with fewer than two patients.
    """
    patient_S, draws = np.unique(patients_S, return_inverse=True)[1], min(resamples, DRAWS)
    if draws == 0 or len(np.unique(patient_S)) < 2 or len(np.unique(labels_S)) < 2:
        return {"low": None, "high": None, "method": None, "resamples": draws, "undefined": 0}
    fitted_SC = recalibrated(labels_S, p_SC)
    seen_G, shape_G = (gaps(classes, p_SC, other_SC) for other_SC in (np.eye(p_SC.shape[1])[labels_S], fitted_SC))
    rng = np.random.default_rng([seed, 1])
    by_chance_RG = noise(classes, p_SC, p_SC, labels_S, patient_S, draws, rng)
    near_RG = noise(classes, p_SC, (p_SC + fitted_SC) / 2, labels_S, patient_S, draws, rng)
    value = float(np.abs(seen_G).sum())
    low, high = limits(value, shape_G, by_chance_RG, near_RG)
    return {"low": low, "high": high, "method": "inversion", "resamples": draws, "undefined": 0}


def limits(value: float, shape_G: np.ndarray, by_chance_RG: np.ndarray, near_RG: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest true error that `value` does not speak against; the value lies between them."""
    size = np.abs(shape_G).sum()
    shape_G = shape_G / size if size > 1e-9 else np.full(len(shape_G), 1 / len(shape_G))
    truths = np.linspace(0, 1, STEPS)
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    least, most = np.array([np.quantile(np.abs(t * shape_G + near_RG).sum(axis=1), tails) for t in truths]).T
    by_chance = float(np.quantile(np.abs(by_chance_RG).sum(axis=1), tails[1]))
    low = 0.0 if by_chance >= value else float(truths[np.argmax(most >= value)])
    possible = truths[least <= value]
    high = float(possible.max()) if len(possible) else value
    return min(low, value), max(high, value)


def gaps(classes: Sequence[int], p_SC: np.ndarray, other_SC: np.ndarray) -> np.ndarray:
    """Stated less other probability, added up in the bins of the stated one, over slides and classes. (G,)"""
    n = len(p_SC) * len(classes)
    each = [np.bincount(calibration_bin(p_SC[:, c]), p_SC[:, c] - other_SC[:, c], ECE_BINS) / n for c in classes]
    return np.concatenate(each)


def noise(
    classes: Sequence[int],
    p_SC: np.ndarray,
    true_SC: np.ndarray,
    labels_S: np.ndarray,
    patient_S: np.ndarray,
    draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """What chance adds to `gaps` where labels are drawn from `true_SC`. (R, G)"""
    n, together = len(p_SC), residual_correlation(classes[-1], labels_S, true_SC, patient_S)
    of_patient_RS = rng.random((draws, patient_S.max() + 1))[:, patient_S]
    uniform_RS = np.where(rng.random((draws, n)) < together, of_patient_RS, rng.random((draws, n)))
    label_RS = sum((uniform_RS >= edge_S).astype(np.int64) for edge_S in np.cumsum(true_SC, axis=1)[:, :-1].T)
    each = []
    for c in classes:
        bins_SG = np.eye(ECE_BINS)[calibration_bin(p_SC[:, c])]
        each.append((true_SC[:, c] - (label_RS == c)) @ bins_SG / (n * len(classes)))
    return np.concatenate(each, axis=1)


def residual_correlation(c: int, labels_S: np.ndarray, true_SC: np.ndarray, patient_S: np.ndarray) -> float:
    """Of the slides of a patient: how far their labels lie on the same side of the probability."""
    return intraclass_correlation((labels_S == c) - true_SC[:, c], patient_S)


def recalibrated(labels_S: np.ndarray, p_SC: np.ndarray) -> np.ndarray:
    """Each class against the rest by logistic recalibration, divided by their sum. (S, C)"""
    n_classes = p_SC.shape[1]
    if n_classes == 2:
        p_S = logistic(labels_S == 1, p_SC[:, 1])
        return np.stack([1 - p_S, p_S], axis=1)
    each_SC = np.stack([logistic(labels_S == c, p_SC[:, c]) for c in range(n_classes)], axis=1)
    found: np.ndarray = each_SC / each_SC.sum(axis=1, keepdims=True)
    return found


def logistic(truth_S: np.ndarray, p_S: np.ndarray) -> np.ndarray:
    """Probabilities with intercept and slope on the log-odds, by Newton's method with a prior (`RIDGE`). (S,)"""
    log_odds_S = np.clip(logit(p_S), -LOGIT_BOUND, LOGIT_BOUND)
    design_S2 = np.stack([np.ones(len(p_S)), log_odds_S], axis=1)
    prior = np.array([0.0, 1.0])
    at = prior
    for _ in range(25):
        q_S = expit(design_S2 @ at)
        gradient = design_S2.T @ (truth_S - q_S) - RIDGE * (at - prior)
        curvature = (design_S2 * (q_S * (1 - q_S))[:, None]).T @ design_S2 + RIDGE * np.eye(2)
        at = at + np.clip(np.linalg.solve(curvature, gradient), -1, 1)
    found: np.ndarray = expit(design_S2 @ at)
    return found
