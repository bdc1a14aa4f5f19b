"""Intervals from resampled patients, and DeLong's test of two classifiers on the same slides.

Axes: S slides, P patients, C classes, R resamples (weightings).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit, logit, ndtr

from mil.tasks.estimates import clustered_variance, structural_components, student_quantile
from mil.tasks.metrics import checked

NUMBERS_AT_ONCE = 4_000_000
"""Weights held at one time; more resamples are worked through in parts, which bounds memory to about 100 MB."""


@dataclass(frozen=True)
class Interval:
    """Of resamples: None and None when no resample was defined; `undefined` of `resamples` were not."""

    low: float | None
    high: float | None
    resamples: int
    undefined: int


def resampled(
    metrics_of: Callable[[np.ndarray], dict[str, np.ndarray]], patients_S: Sequence[str], resamples: int, seed: int
) -> dict[str, np.ndarray] | None:
    """Every metric of every resample, by resample first; None with fewer than two patients, or no resamples.

    Patients are drawn with replacement, all their slides together, as many patients as there are (Efron and Tibshirani
    1993, chapter 13).

    Args:
        metrics_of: weights_RS -> {name: values_R}, for instance `weighted_metrics` with its first three arguments.
        patients_S: patient of every slide.
        seed: same seed, same resamples.
    """
    _, patient_S = np.unique(np.asarray(patients_S, dtype=str), return_inverse=True)
    n_patients = int(patient_S.max(initial=-1)) + 1
    if n_patients < 2 or resamples == 0:
        return None
    rng = np.random.default_rng(seed)
    at_once = max(1, NUMBERS_AT_ONCE // len(patient_S))
    parts = []
    for start in range(0, resamples, at_once):
        n_now = min(at_once, resamples - start)
        drawn_RP = rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=n_now)
        parts.append(metrics_of(drawn_RP[:, patient_S].astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Scale:
    """A scale on which a metric's estimates are about normal, and the way back. method: as in `METHODS`."""

    method: str
    to: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


SCALES = {
    "fisher": Scale("fisher", np.arctanh, np.tanh),
    "logit": Scale("logit", logit, expit),
    "log": Scale("log", np.log, np.exp),
    "rest": Scale("rest", lambda values: np.log(1 - values), lambda y: 1 - np.exp(y)),
}
AS_IT_IS = Scale("as it is", np.asarray, np.asarray)
FEWEST_DEFINED = 5
"""Resamples that a standard error needs."""
AROUND_2A = np.stack([trig(np.linspace(0, 2 * np.pi, 2000, endpoint=False)) for trig in (np.cos, np.sin)])
"""Directions from the middle of an ellipse; the most of a thing over these is that of all but for one part in 10^6."""


def scaled_interval(value: float | None, values_R: np.ndarray, scale: Scale, n_patients: int) -> Interval:
    """The t interval on a scale, with the standard error of the resamples there; none where it has no width.

    In simulations of 30 to 100 patients (correlations 0.4 and 0.9, kappa 0.6 and 0.9) it holds the truth in 0.92 to
    0.98, where the percentiles of the resamples hold it in 0.85 to 0.96; of 60 patients Uno's C, the AUC at a time and
    the integrated Brier score in 0.93 to 0.99 (`benchmarks/coverage.py`).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        at = scale.to(np.array([np.nan if value is None else value]))
        on_scale_R = scale.to(values_R)
    defined = on_scale_R[np.isfinite(on_scale_R)]
    undefined = len(values_R) - len(defined)
    spread = float(defined.std(ddof=1)) if len(defined) >= FEWEST_DEFINED else 0.0
    if not np.isfinite(at).all() or spread < 1e-12 or n_patients < 2:
        return Interval(None, None, len(values_R), undefined)
    away = student_quantile(n_patients - 1) * spread
    low, high = np.sort(scale.back(at + np.array([-away, away]))).tolist()
    return Interval(low, high, len(values_R), undefined)


def difference_interval(
    both: Sequence[float | None], drawn_R2: np.ndarray | None, scale: Scale, n_patients: int
) -> Interval:
    """Of the first number less the second, of the same patients: the least and the most of it over the pairs that lie
    within Student's distance of these, on their scale, by the covariance of the resamples.

    Near the end of its range a number varies less, and so does the difference: a t interval of the difference itself,
    with the standard error of the resamples, holds the truth in 0.915 to 0.977 in simulations of 30 to 100 patients
    (correlations, errors, kappa, C-index; `benchmarks/coverage.py`), and misses it mostly on one side. This holds it in
    0.936 to 0.956, of Harrell's C and Spearman's rho in 0.96 to 0.97 (resamples vary more than samples there); the
    percentiles of the resamples hold it in 0.90 to 0.96. Limits of both numbers combined (MOVER) hold as much, but have
    a width where two predictions are the same. Where a number or a resample lies at the end of its scale, this is that
    t interval.

    Args:
        both: the numbers; None: undefined.
        drawn_R2: both in every resample, as `resampled` gives them; None: there are none.

    Returns:
        No interval with fewer than two patients or `FEWEST_DEFINED` resamples that have both numbers; one without width
        where no resample changes the difference.
    """
    if drawn_R2 is None:
        return Interval(None, None, 0, 0)
    defined_R2 = drawn_R2[np.isfinite(drawn_R2).all(axis=1)]
    undefined = len(drawn_R2) - len(defined_R2)
    at_2 = np.array([np.nan if value is None else value for value in both])
    same = len(defined_R2) > 0 and float(np.ptp(defined_R2[:, 0] - defined_R2[:, 1])) < 1e-12
    if not np.isfinite(at_2).all() or n_patients < 2 or not (same or len(defined_R2) >= FEWEST_DEFINED):
        return Interval(None, None, len(drawn_R2), undefined)
    if same:
        return Interval(float(at_2[0] - at_2[1]), float(at_2[0] - at_2[1]), len(drawn_R2), undefined)
    with np.errstate(invalid="ignore", divide="ignore"):
        on_scale = scale.to(np.concatenate([at_2[None], defined_R2]))
    if not np.isfinite(on_scale).all():
        scale, on_scale = AS_IT_IS, np.concatenate([at_2[None], defined_R2])
    unbiased = n_patients / (n_patients - 1)  # resamples vary as a sample's variance that is divided by n
    variances_2, axes_22 = np.linalg.eigh(unbiased * np.cov(on_scale[1:].T))
    axes_22 = axes_22 * np.sqrt(np.maximum(variances_2, 0))
    edge_2A = scale.back(on_scale[0][:, None] + student_quantile(n_patients - 1) * axes_22 @ AROUND_2A)
    gap_A = edge_2A[0] - edge_2A[1]
    return Interval(float(gap_A.min()), float(gap_A.max()), len(drawn_R2), undefined)


@dataclass(frozen=True)
class DeLong:
    """DeLong's test of two AUCs of the same slides. z and p_value are None where the variance is 0."""

    auc_a: float
    auc_b: float
    standard_error: float
    z: float | None
    p_value: float | None


def delong(labels: ArrayLike, p_a: ArrayLike, p_b: ArrayLike, patients: Sequence[str] | None = None) -> DeLong | None:
    """Two-sided test that two correlated AUCs are equal (DeLong et al. 1988; by midranks, Sun and Xu 2014).

    The slides of a patient are one cluster (Obuchowski, Biometrics 1997): its deviations are added up before they are
    squared. With one slide a patient this is DeLong's own variance. Taking the slides of a patient as independent
    instead can reject a true null in a quarter of all cases at the nominal 5 % (`benchmarks/delong.py`).

    Args:
        labels: (S,) 0 or 1.
        p_a, p_b: (S,) probabilities of class 1 by the two classifiers.
        patients: (S,) of every slide; None = each slide is a patient of its own.

    Returns:
        None with fewer than two patients that have slides of either class: there is no variance to estimate.
    """
    (truth_S, p_a_S), (_, p_b_S) = checked(labels, p_a), checked(labels, p_b)
    names_S = np.arange(len(truth_S)) if patients is None else np.asarray(patients, dtype=str)
    if names_S.shape != truth_S.shape:
        raise ValueError(f"expected one patient a slide, got {names_S.shape} for {truth_S.shape}")
    _, patient_S = np.unique(names_S, return_inverse=True)
    if min(len(np.unique(patient_S[truth_S])), len(np.unique(patient_S[~truth_S]))) < 2:
        return None
    parts = [structural_components(truth_S, p_S) for p_S in (p_a_S, p_b_S)]
    auc_a, auc_b = (float(of_positives.mean()) for of_positives, _ in parts)
    of_positives, of_negatives = (a - b for a, b in zip(*parts, strict=True))
    error = clustered_variance(of_positives, of_negatives, patient_S[truth_S], patient_S[~truth_S]) ** 0.5
    if error < 1e-12:
        return DeLong(auc_a, auc_b, 0.0, None, None)
    z = (auc_a - auc_b) / error
    return DeLong(auc_a, auc_b, error, z, float(2 * ndtr(-abs(z))))


def by_patient(slides: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Patients instead of slides: the mean of the slides' probabilities.

    Args:
        slides: one row a slide: patient, label and numeric columns (p_0, p_1, ..., threshold), which are averaged.

    Returns:
        One row a patient, the same columns and `slides` (how many); and the patients that are left out because their
        slides have different labels, so that they have none as a patient.
    """
    labels = slides.groupby("patient")["label"].nunique(dropna=False)
    mixed = sorted(str(patient) for patient in labels.index[labels > 1])
    kept = slides[~slides["patient"].astype(str).isin(mixed)]
    numeric = [c for c in kept.columns if c not in ("patient", "label") and pd.api.types.is_float_dtype(kept[c])]
    groups = kept.groupby("patient", sort=True)
    table = groups[numeric].mean()
    table.insert(0, "label", groups["label"].first())
    table.insert(1, "slides", groups.size())
    return table.reset_index(), mixed
