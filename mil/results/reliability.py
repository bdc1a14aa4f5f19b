"""How far probabilities mean what they say: reliability bins, calibration error without its bias, slope and intercept.

A calibration error of B bins is above 0 also for perfect probabilities, by chance: the fraction of positives in a bin
is never its expectation. Squared, that part is the variance of the gap, which can be estimated and taken away (Ferro
and Fricker 2012; Kumar et al., NeurIPS 2019); here with patients as clusters. The result may be below 0, and is 0 on
average where probabilities are right.

Axes: S slides, C classes, B bins.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logit
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning, PerfectSeparationWarning

from mil.results.crossfit import fit_table, probabilities_of
from mil.results.rates import rate_block
from mil.tasks.estimates import LEVEL, variance_of
from mil.tasks.metrics import METRICS, against_the_rest, none_if_nan, weighted_metrics

BINS = 10
SLIDES_A_BIN = 10
"""Bins of equal numbers of slides: ten of them, fewer where that would leave fewer slides than this in each."""
LOGIT_BOUND = 36.0
"""A probability nearer to 0 or 1 is as sure as numbers of 64 bits can say."""


def quantile_bins(p_S: np.ndarray) -> np.ndarray:
    """Bin of every slide, 0..B-1, by rising probability; slides of equal probability share a bin."""
    n_bins = int(np.clip(len(p_S) // SLIDES_A_BIN, 1, BINS))
    edges = np.unique(np.quantile(p_S, np.linspace(0, 1, n_bins + 1)[1:-1], method="higher"))
    return np.searchsorted(edges, p_S, side="right")


def squared_error(truth_S: np.ndarray, p_S: np.ndarray, patients_S: Sequence[str] | np.ndarray) -> tuple[float, float]:
    """Mean over slides of the squared gap of their bin: as it is, and without what chance adds to it."""
    bin_S, gap_S = quantile_bins(p_S), p_S - truth_S
    patient_S = np.unique(np.asarray(patients_S, dtype=str), return_inverse=True)[1]
    plain = debiased = 0.0
    for b in np.unique(bin_S):
        here_S = bin_S == b
        square, weight = float(gap_S[here_S].mean()) ** 2, float(here_S.mean())
        plain += weight * square
        debiased += weight * (square - variance_of_mean(gap_S[here_S], patient_S[here_S], square))
    return plain, debiased


def variance_of_mean(values_S: np.ndarray, patient_S: np.ndarray, unknown: float) -> float:
    """Of a mean over slides whose patients are clusters (a ratio of sums); `unknown` where there is one patient."""
    _, cluster_S = np.unique(patient_S, return_inverse=True)
    if not cluster_S.any():
        return unknown
    return variance_of((values_S - values_S.mean()) / len(values_S), cluster_S)


def slope_and_intercept(
    truth_S: np.ndarray, p_S: np.ndarray, patients_S: Sequence[str] | np.ndarray
) -> dict[str, dict[str, Any]]:
    """Cox's (1958) logistic recalibration, intervals from standard errors with patients as clusters.

    slope: of the label on the log-odds; 1 is right, below 1 probabilities are too extreme, above 1 not extreme enough.
    intercept: of the label with the log-odds as offset; 0 is right, below 0 probabilities are too high.

    Returns:
        Of each value, low, high; None, and the reason as `why`, where it is undefined.
    """
    unknown: dict[str, Any] = {"value": None, "low": None, "high": None}
    patient_S = np.unique(np.asarray(patients_S, dtype=str), return_inverse=True)[1]
    if not 0 < truth_S.sum() < len(truth_S) or patient_S.max() < 1:
        what = unknown | {"why": "needs slides of both classes, and two patients"}
        return {"slope": what, "intercept": what}
    log_odds_S = np.clip(logit(p_S), -LOGIT_BOUND, LOGIT_BOUND)
    ones_S1 = np.ones((len(p_S), 1))
    slope_design = np.column_stack([ones_S1, log_odds_S])
    constant = bool(np.ptp(log_odds_S) == 0)
    return {
        "slope": unknown | {"why": "all probabilities are equal"}
        if constant
        else _coefficient(GLM(truth_S.astype(float), slope_design, family=Binomial()), patient_S),
        "intercept": _coefficient(GLM(truth_S.astype(float), ones_S1, family=Binomial(), offset=log_odds_S), patient_S),
    }


def _coefficient(model: GLM, patient_S: np.ndarray) -> dict[str, Any]:
    """The last coefficient with its interval (Student's t, a degree of freedom a patient but one)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted = model.fit(cov_type="cluster", cov_kwds={"groups": patient_S}, use_t=True, maxiter=200)
            low, high = fitted.conf_int(1 - LEVEL)[-1].tolist()
    except (PerfectSeparationWarning, ConvergenceWarning, RuntimeWarning, np.linalg.LinAlgError):
        why = "the fit has no end: the probabilities tell the classes apart without an error, or nearly"
        return {"value": None, "low": None, "high": None, "why": why}
    numbers = {"value": float(fitted.params[-1]), "low": low, "high": high}
    return {name: none_if_nan(number) for name, number in numbers.items()} | {"why": ""}


def bins_block(truth_S: np.ndarray, p_S: np.ndarray, patients_S: np.ndarray) -> list[dict[str, Any]]:
    """The reliability diagram: a bin's mean probability, and its fraction of positives with interval."""
    bin_S = quantile_bins(p_S)
    return [
        {"p": float(p_S[bin_S == b].mean())} | rate_block(truth_S[bin_S == b], patients_S[bin_S == b])
        for b in np.unique(bin_S)
    ]


def reliability_block(table: pd.DataFrame, classes: Sequence[str]) -> dict[str, Any] | None:
    """Of a table of slides: the proper scores, and each class against the rest (of two classes the last alone).

    ece, log_loss, brier: as in the metrics. rms: the root of the mean squared gap of the bins; rms_debiased: of the
    estimate without its bias, 0 where that, `squared_debiased`, is below 0.
    """
    table = fit_table(table, classes)
    if table.empty:
        return None
    labels_S, p_SC = table["label"].to_numpy(dtype=np.int64), probabilities_of(table, classes)
    patients_S = table["patient"].to_numpy()
    scores = weighted_metrics(labels_S, p_SC, p_SC.argmax(axis=1), np.ones((1, len(table))))
    block: dict[str, Any] = {name: none_if_nan(scores[name][0]) for name in ("ece", "log_loss", "brier")}
    block["per_class"] = {}
    for c in against_the_rest(len(classes)):
        truth_S, p_S = labels_S == c, p_SC[:, c]
        plain, debiased = squared_error(truth_S, p_S, patients_S)
        block["per_class"][classes[c]] = {
            **slope_and_intercept(truth_S, p_S, patients_S),
            "ece": METRICS["ece"](truth_S, p_S),
            "rms": plain**0.5,
            "rms_debiased": max(0.0, debiased) ** 0.5,
            "squared_debiased": debiased,
            "bins": bins_block(truth_S, p_S, patients_S),
        }
    return block
