"""Numbers with 95 % intervals that hold the truth about as often as they say, near 1 and with several slides a patient.

`benchmarks/coverage.py` simulates how often, beside the usual methods. Patients are clusters everywhere: slides of one
patient are worth fewer than as many slides of several. An interval has a width; where nothing is known of the spread
there is none.

Axes: S slides, P patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv
from scipy.stats import rankdata
from scipy.stats import skew as skewness
from scipy.stats import t as student

from extract.shares import wilson
from mil.tasks.binormal import (
    Binormal,
    binormal,
    covariance,
    independent,
    intraclass_correlation,
    normal_scores,
    score_limits,
    spread_of_positives,
)
from mil.tasks.binormal_precision import Precision

LEVEL = 0.95
"""Coverage of every interval here."""

Patients = Sequence[str] | np.ndarray | None
"""Patient of every slide; None: each slide is a patient of its own."""

METHODS = {
    "score": "score interval with the variance of the binormal model, its spreads fitted and half its excess over the "
    "sample's variance kept, patients as clusters (Newcombe 2006, method 5; Obuchowski 1997; Donner 1986)",
    "wilson": "Wilson's interval for as many slides as the patients' are worth (Wilson 1927; Donner 1986)",
    "mover": "limits of the parts combined with their correlation, patients as clusters (MOVER, Zou and Donner 2008); "
    "sensitivity and specificity come in with Jeffreys' limits (Brown, Cai and DasGupta 2001)",
    "paired": "score interval with the variance of the binormal model of both scores, their correlation within "
    "classes (Kendall's) and patients fitted and half its excess over the sample's variance kept (Tango 1998; "
    "Obuchowski 1997)",
    "difference": "least and largest difference within Student's distance of both numbers on the metric's scale, their "
    "covariance from resampled patients",
    "nested": "difference with the standard errors of both intervals and their correlation between patients, half way "
    "to the sample's own (one takes up most of the other)",
    "trainings": "as without training again, wider by the variance between trainings (jackknife; mean of the "
    "quantiles of Satterthwaite 1946 and Cochran 1964)",
    "log": "t interval of the logarithm, patients as clusters",
    "fisher": "t interval of the inverse hyperbolic tangent, its error from resampled patients (Fisher 1921)",
    "logit": "t interval of the log-odds, its error from resampled patients",
    "rest": "t interval of the logarithm of 1 - the number, its error from resampled patients",
    "root": "the root of the mean square's limits, by Hall's correction, patients as clusters (Hall 1992)",
    "hall": "t interval with Hall's correction for skewness, patients as clusters (Hall 1992)",
    "inversion": "true errors at which samples with gaps shaped as a logistic recalibration has them show as much, "
    "slides of a patient together (Cox 1958; Broecker and Smith 2007)",
}
"""Short name of a method, as metrics.json has it for every number -> what it is."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval: value None where undefined, low and high None where there is no interval.

    method: a key of METHODS. influence_S: how much the number changes with the weight of each slide, from which numbers
    of the same slides get their correlation. patients: how many it rests on, of the rarer class where there are two.
    """

    value: float | None
    low: float | None
    high: float | None
    method: str | None
    influence_S: np.ndarray
    patients: int = 0


def student_quantile(degrees: float) -> float:
    """Of Student's t, how many standard errors an interval of LEVEL reaches to either side."""
    return float(student.ppf((1 + LEVEL) / 2, degrees))


def undefined(n_slides: int) -> Estimate:
    return Estimate(None, None, None, None, np.zeros(n_slides))


# --- ranks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """Slides of two classes, ranked: for each the share of the other class that it is on the right side of."""

    truth_S: np.ndarray
    patient_S: np.ndarray
    of_positives: np.ndarray
    of_negatives: np.ndarray

    @property
    def auc(self) -> float:
        return float(self.of_positives.mean())

    @property
    def influence_S(self) -> np.ndarray:
        """Of every slide on the AUC."""
        influence_S = np.empty(len(self.truth_S))
        influence_S[self.truth_S] = (self.of_positives - self.auc) / len(self.of_positives)
        influence_S[~self.truth_S] = (self.of_negatives - self.auc) / len(self.of_negatives)
        return influence_S

    @property
    def n_patients(self) -> int:
        """With slides of the class that fewer patients have."""
        return min(len(np.unique(self.patient_S[own])) for own in (self.truth_S, ~self.truth_S))

    def inside(self, auc: float) -> np.ndarray:
        """The AUC, or where it is 0 or 1 half a comparison away from there. (1,)"""
        half = 0.5 / (len(self.of_positives) * len(self.of_negatives))
        return np.array([min(max(auc, half), 1 - half)])


def auc_interval(labels: ArrayLike, scores: ArrayLike, patients: Patients = None) -> Estimate:
    """AUC with its score interval: the true AUCs at which this one would not be surprising.

    The variance at a true AUC is that of the binormal model (`mil.tasks.binormal`), whose ratio of spreads and
    correlation within patients are fitted to the ranks, times the root of the clustered DeLong variance over the
    model's. A perfect sample has a lower limit below 1.

    Args:
        labels: (S,) 0 or 1.
        scores: (S,) higher = more positive; only their order counts.
        patients: (S,) of every slide.

    Returns:
        No value with one class; no interval with fewer than two patients that have slides of either class.
    """
    found = ranked_slides(labels, scores, patients)
    if found is None:
        return undefined(len(np.asarray(labels)))
    ranked, score_S = found
    truth_S, patient_S, auc = ranked.truth_S, ranked.patient_S, ranked.auc
    if ranked.n_patients < 2:
        return Estimate(auc, None, None, None, ranked.influence_S)
    model, _ = fitted(ranked, score_S)
    seen = clustered_variance(ranked.of_positives, ranked.of_negatives, patient_S[truth_S], patient_S[~truth_S])
    ratio = shrunken_ratio(seen, float(model.variance(ranked.inside(auc))[0]))
    low, high = score_limits(auc, lambda true: ratio * model.variance(true))
    return Estimate(auc, low, high, "score", ranked.influence_S, ranked.n_patients)


def ranked_slides(labels: ArrayLike, scores: ArrayLike, patients: Patients) -> tuple[Ranked, np.ndarray] | None:
    """Slides ranked by their scores, and these as numbers; None with one class."""
    truth_S, score_S, patient_S = _checked(labels, scores, patients)
    if truth_S.all() or not truth_S.any():
        return None
    return Ranked(truth_S, patient_S, *structural_components(truth_S, score_S)), score_S


def fitted(ranked: Ranked, score_S: np.ndarray) -> tuple[Binormal, float]:
    """The binormal model of these slides, and the positives' share of its spread."""
    spread, within = shape(ranked, score_S)
    return binormal(*slides_by_patient(ranked), spread, within), spread


def shape(ranked: Ranked, score_S: np.ndarray) -> tuple[float, float]:
    """The positives' share of the spread, and the intraclass correlation of the slides of a patient."""
    slides, within = slides_by_patient(ranked), 1.0
    if len(score_S) > len(slides[0]):
        within = intraclass_correlation(normal_scores(score_S, ranked.truth_S), ranked.patient_S)
    worth = [own.sum() / (1 + ((own**2).sum() / own.sum() - 1) * within) for own in slides]
    variances = [
        values.var() * size / max(size - 1, 0.5)
        for values, size in zip((ranked.of_positives, ranked.of_negatives), worth, strict=True)
    ]
    spread = spread_of_positives(ranked.auc, (variances[0], variances[1]), (worth[0], worth[1]))
    return spread, within


def slides_by_patient(ranked: Ranked) -> tuple[np.ndarray, np.ndarray]:
    """Of every patient: how many slides are positive, and how many negative."""
    n_patients = int(ranked.patient_S.max()) + 1
    of_positives, of_negatives = (ranked.patient_S[own] for own in (ranked.truth_S, ~ranked.truth_S))
    return np.bincount(of_positives, minlength=n_patients), np.bincount(of_negatives, minlength=n_patients)


def shrunken_ratio(seen: float, usual: float) -> float:
    """By what to multiply a model's variance: half way, in logarithms, to the one that the sample shows.

    At most 2 and at least 1/2; 1 where the sample shows none, as a perfect one does.
    """
    return float(np.clip((seen / usual) ** 0.5, 0.5, 2)) if min(seen, usual) > 1e-15 else 1.0


EVEN = 2 / 3
"""Power by which counts of rare things are about as often far above their mean as far below."""


def average_precision_interval(labels: ArrayLike, scores: ArrayLike, patients: Patients = None) -> Estimate:
    """Average precision with its score interval, at the sample's share of positives.

    As `auc_interval`, with mean and variance of a sample's average precision under the fitted binormal model; the
    variance of the sample is that of the influence of its patients. What is missing to 1 is made of few negatives among
    the positives, which lean to one side as counts do: it is compared by its power 2/3, which makes those even
    (Anscombe, in the discussion of Hotelling, Journal of the Royal Statistical Society B 1953).
    """
    truth_S, score_S, patient_S = _checked(labels, scores, patients)
    if truth_S.all() or not truth_S.any():
        return undefined(len(truth_S))
    value, influence_S = average_precision_influence(truth_S, score_S)
    ranked = Ranked(truth_S, patient_S, *structural_components(truth_S, score_S))
    if ranked.n_patients < 2:
        return Estimate(value, None, None, None, influence_S)
    model, spread = fitted(ranked, score_S)
    n_positives = int(truth_S.sum())
    precision = Precision(n_positives, len(truth_S) - n_positives, spread)
    alone = independent(n_positives, len(truth_S) - n_positives, spread)

    def variance(true: np.ndarray) -> np.ndarray:
        without = alone.variance(true)
        clusters = np.divide(model.variance(true), without, out=np.ones(len(without)), where=without > 0)
        total: np.ndarray = precision.variance(true) * clusters
        return total

    seen = variance_of(influence_S, patient_S)
    ratio = shrunken_ratio(seen, float(variance(ranked.inside(ranked.auc))[0]))
    limits = score_limits(value, lambda true: ratio * variance(true), precision.expected, power=EVEN)
    low, high = precision.of(np.array(limits)).tolist()
    high = max(high, value) if limits[1] < 1 - 1e-8 else 1.0
    return Estimate(value, min(low, value), high, "score", influence_S, ranked.n_patients)


def average_precision_influence(truth_S: np.ndarray, score_S: np.ndarray) -> tuple[float, np.ndarray]:
    """Average precision without interpolation, and its derivative by the weight of every slide."""
    values, group_S = np.unique(-score_S, return_inverse=True)
    positive_G = np.bincount(group_S, weights=truth_S, minlength=len(values))
    found_G, called_G = np.cumsum(positive_G), np.cumsum(np.bincount(group_S, minlength=len(values)))
    precision_G, n_positives = found_G / called_G, truth_S.sum()
    value = float((positive_G * precision_G).sum() / n_positives)
    gain_G = np.cumsum((positive_G / called_G)[::-1])[::-1]  # over the groups at and below one's own
    loss_G = np.cumsum((positive_G * found_G / called_G**2)[::-1])[::-1]
    of_positive_G = precision_G + gain_G - loss_G - value
    influence_S: np.ndarray = np.where(truth_S, of_positive_G[group_S], -loss_G[group_S]) / n_positives
    return value, influence_S


def c_index_interval(
    risks: ArrayLike,
    times: ArrayLike,
    events: ArrayLike,
    patients: Patients = None,
    *,
    strata: ArrayLike | None = None,
) -> Estimate:
    """Harrell's C-index with its score interval.

    The share of comparable pairs (the one with the shorter time has the event) in which the higher risk comes first,
    ties of risks counted half; of equal times an event comes before a censored one (Harrell et al., Statistics in
    Medicine 1996). The interval is that of `auc_interval`: each patient's share of the pairs takes the place of the
    class, the slides of a patient count as one, and the spreads are equal.

    Args:
        risks: (S,) higher = earlier event.
        times: (S,) until the event, or until it was last known not to have happened.
        events: (S,) whether the event was seen.
        strata: (S,) such as folds, if slides of different ones are not to be compared.

    Returns:
        No value without a comparable pair; no interval with fewer than two patients in comparable pairs.
    """
    risk_S, time_S, event_S = (np.asarray(values, dtype=np.float64) for values in (risks, times, events))
    patient_S = patient_index(patients, len(risk_S))
    if not (risk_S.shape == time_S.shape == event_S.shape and risk_S.ndim == 1):
        raise ValueError(
            f"expected as many times and events as risks, got {time_S.shape}, {event_S.shape}, {risk_S.shape}"
        )
    stratum_S = np.zeros(len(risk_S)) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    won_S, pairs_S = _concordance(risk_S, time_S, event_S > 0, stratum_S)
    total = pairs_S.sum() / 2
    if not total:
        return undefined(len(risk_S))
    value = float(won_S.sum() / 2 / total)
    influence_S = (won_S - value * pairs_S) / total
    share_P = np.bincount(patient_S, weights=pairs_S) / total
    if (share_P > 0).sum() < 2:
        return Estimate(value, None, None, None, influence_S)
    of_pairs = (len(risk_S) / len(share_P)) ** 2 / total

    def variance(true: np.ndarray) -> np.ndarray:
        shared = covariance(true, 0.5)
        both = shared * (share_P**2).sum() + (true * (1 - true) - 2 * shared) * of_pairs
        kept: np.ndarray = np.maximum(both, 0)
        return kept

    inside = np.array([min(max(value, 0.5 / total), 1 - 0.5 / total)])
    seen, usual = variance_of(influence_S, patient_S), float(variance(inside)[0])
    ratio = seen / usual if seen > 1e-15 else 1.0  # of pairs of a whole order the model's variance is too large
    low, high = score_limits(value, lambda true: ratio * variance(true))
    return Estimate(value, low, high, "score", influence_S, int((share_P > 0).sum()))


PAIRS_AT_ONCE = 4_000_000


def _concordance(
    risk_S: np.ndarray, time_S: np.ndarray, event_S: np.ndarray, stratum_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of every slide: pairs won (a tie is half), and comparable pairs, in whichever role."""
    won_S, pairs_S = np.zeros(len(risk_S)), np.zeros(len(risk_S))
    first = np.flatnonzero(event_S)
    step = max(1, PAIRS_AT_ONCE // max(len(risk_S), 1))
    for own in np.split(first, range(step, len(first), step)):
        later = (time_S > time_S[own, None]) | ((time_S == time_S[own, None]) & ~event_S)
        later &= stratum_S == stratum_S[own, None]
        right = later * ((risk_S[own, None] > risk_S) + 0.5 * (risk_S[own, None] == risk_S))
        for total_S, pairs in ((won_S, right), (pairs_S, later)):
            total_S[own] += pairs.sum(axis=1)
            total_S += pairs.sum(axis=0)
    return won_S, pairs_S


# --- shares and means ----------------------------------------------------------------------------------------------


def jeffreys(rate: float, n: float) -> tuple[float, float]:
    """The middle 95 % of the Beta(x + 1/2, n - x + 1/2) distribution, with ends as Wilson's have them."""
    low, high = (float(betaincinv(rate * n + 0.5, (1 - rate) * n + 0.5, p)) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return (low if rate > 0 else 0.0), (high if rate < 1 else 1.0)


def proportion_interval(
    hits: ArrayLike,
    patients: Patients = None,
    *,
    among: np.ndarray | None = None,
    limits: Callable[[float, float], tuple[float, float]] = wilson,
) -> Estimate:
    """A share, such as sensitivity: the mean of `hits` over the slides that count, with Wilson's interval.

    Few slides give few values, so the coverage jumps up and down with the true share. On average over shares near 0.8,
    0.9 and 0.95 (as Brown, Cai and DasGupta, Statistical Science 2001, judge it) it is 0.952 to 0.962 of 10 to 50
    slides, where Jeffreys' has 0.946 to 0.971 and mid-p 0.952 to 0.981; of 10 to 50 patients with 2 to 4 slides each it
    is 0.937 to 0.964, where those have 0.928 to 0.983 (`benchmarks/coverage.py`).

    Args:
        hits: (S,) 0 or 1.
        patients: (S,) of every slide.
        among: (S,) bool: the slides that count (for sensitivity: the positives); default: all.
        limits: of a share of so many slides.
    """
    hit_S = np.asarray(hits, dtype=np.float64)
    counts_S = np.ones(len(hit_S), dtype=bool) if among is None else np.asarray(among, dtype=bool)
    if not counts_S.any():
        return undefined(len(hit_S))
    patient_S = patient_index(patients, len(hit_S))[counts_S]
    rate = float(hit_S[counts_S].mean())
    low, high = limits(rate, effective_size(hit_S[counts_S], patient_S))
    influence_S = np.where(counts_S, hit_S - rate, 0.0) / counts_S.sum()
    return Estimate(rate, low, high, "wilson", influence_S, len(np.unique(patient_S)))


def effective_size(hit_S: ArrayLike, patients: Patients) -> float:
    """How many independent slides tell as much of a share as these, whose patients are clusters.

    The smaller of two numbers that are estimated from few patients: slides divided by the design effect
    1 + (slides of a slide's patient, on average, - 1) x intraclass correlation (Donner and Klar, American Journal of
    Epidemiology 1994), and how many would have the variance between patients (Rao and Scott, Biometrics 1992). Where
    all slides are alike, a patient's count as one.
    """
    values_S = np.asarray(hit_S, dtype=np.float64)
    patient_S = patient_index(patients, len(values_S))
    sizes_P, rate = np.bincount(patient_S), float(values_S.mean())
    more = float((sizes_P**2).sum() / len(values_S)) - 1
    by_correlation = len(values_S) / (1 + more * intraclass_correlation(values_S, patient_S))
    variance = float((np.bincount(patient_S, weights=values_S - rate) ** 2).sum()) / len(values_S) ** 2
    return min(by_correlation, rate * (1 - rate) / variance) if variance > 1e-15 else by_correlation


def both_shares(truth: ArrayLike, called: ArrayLike, patients: Patients = None) -> list[Estimate]:
    """Sensitivity and specificity with Jeffreys' limits, as parts of a number that both decide.

    Combined, Wilson's limits hold a little too seldom where both are near 1: his near one is too near.
    """
    truth_S = np.asarray(truth, dtype=bool)
    right_S = truth_S == np.asarray(called, dtype=bool)
    return [proportion_interval(right_S, patients, among=own_S, limits=jeffreys) for own_S in (truth_S, ~truth_S)]


def balanced_accuracy_interval(truth: ArrayLike, called: ArrayLike, patients: Patients = None) -> Estimate:
    """Mean of sensitivity and specificity, by MOVER."""
    return mean_of(both_shares(truth, called, patients), patients)


def f1_interval(truth: ArrayLike, called: ArrayLike, patients: Patients = None) -> Estimate:
    """F1 at the sample's share of positives, from sensitivity and specificity by MOVER for a function of two shares.

    How far F1 goes when one of them goes to its limit is what is known of its spread on that side (Newcombe, Statistics
    in Medicine 2001; Zou and Donner 2008).
    """
    truth_S = np.asarray(truth, dtype=bool)
    parts, m, n = both_shares(truth, called, patients), int(truth_S.sum()), int((~truth_S).sum())
    found, rejected = parts
    if found.value is None or rejected.value is None or found.low is None or rejected.low is None:
        return undefined(len(truth_S))
    called_so = m * (1 + found.value) + n * (1 - rejected.value)  # positives, and slides called positive

    def f1(sensitivity: float, specificity: float) -> float:
        return 2 * m * sensitivity / (m * (1 + sensitivity) + n * (1 - specificity))

    value = f1(found.value, rejected.value)
    away = [
        [f1(float(end or 0), rejected.value) - value, f1(found.value, float(other or 0)) - value]
        for end, other in ((found.low, rejected.low), (found.high, rejected.high))
    ]
    correlation = correlations(parts, patients)
    low, high = (max(0.0, float(np.array(gone) @ correlation @ np.array(gone))) ** 0.5 for gone in away)
    hit_S = truth_S & np.asarray(called, dtype=bool)
    influence_S = (2 * hit_S - value * (1.0 * truth_S + np.asarray(called, dtype=bool))) / called_so
    n_patients = min(found.patients, rejected.patients)
    return Estimate(value, max(value - low, 0.0), min(value + high, 1.0), "mover", influence_S, n_patients)


def mean_interval(values: ArrayLike, patients: Patients = None, *, most: float = np.inf) -> Estimate:
    """A mean of losses of at least 0, such as Brier score (`most` = 1) or log loss (no most).

    With a largest loss: the t interval of the mean's logarithm. Without: Hall's, which corrects for the long tail
    (Hall, Journal of the Royal Statistical Society B 1992). Slides of a patient are added up first.

    Returns:
        No interval with one patient, nor where no slide differs, but for a largest loss, which bounds the spread.
    """
    value_S = np.asarray(values, dtype=np.float64)
    if not len(value_S):
        return undefined(0)
    patient_S, mean = patient_index(patients, len(value_S)), float(value_S.mean())
    influence_S = (value_S - mean) / len(value_S)
    n = int(patient_S.max()) + 1
    deviation_P = n * np.bincount(patient_S, weights=influence_S)
    spread = float(deviation_P.std(ddof=1)) if n > 1 else 0.0
    if spread < 1e-12 or (most < np.inf and mean < 1e-12):
        bounded = n > 1 and most < np.inf
        if not bounded:
            return Estimate(mean, None, None, None, influence_S, n)
        low, high = (most * limit for limit in wilson(mean / most, n))
        return Estimate(mean, low, high, "wilson", influence_S, n)
    quantile = student_quantile(n - 1)
    if most < np.inf:
        away = float(np.exp(quantile * spread / n**0.5 / mean))
        return Estimate(mean, mean / away, min(mean * away, most), "log", influence_S, n)
    low, high = (mean - spread * _hall(sign * quantile / n**0.5, float(skewness(deviation_P)), n) for sign in (1, -1))
    return Estimate(mean, max(low, 0.0), high, "hall", influence_S, n)


def _hall(x: float, skew: float, n: int) -> float:
    """Standardised deviation of the mean whose transformed value is x; the inverse of Hall's cubic."""
    if abs(skew) < 1e-6:
        return x
    return float(3 / skew * (np.cbrt(1 + skew * (x - skew / (6 * n))) - 1))


# --- numbers of the same slides together ---------------------------------------------------------------------------


def mean_of(parts: Sequence[Estimate], patients: Patients = None) -> Estimate:
    """Mean of numbers of the same slides, such as that over the classes, with its MOVER interval.

    The distance from each number to its limits is what is known of its spread on that side; the squares add up as
    variances do, with the correlations of the numbers between patients (Zou and Donner, Statistics in Medicine 2008;
    Newcombe, Statistics in Medicine 1998).

    Args:
        parts: with `influence_S` of the same slides.
    """
    values = [part.value for part in parts if part.value is not None]
    if len(values) < len(parts):
        return undefined(len(parts[0].influence_S))
    value, n = float(np.mean(values)), min(part.patients for part in parts)
    influence_S = np.mean([part.influence_S for part in parts], axis=0)
    limits = [(part.low, part.high) for part in parts if part.low is not None and part.high is not None]
    if len(limits) < len(parts):
        return Estimate(value, None, None, None, influence_S, n)
    correlation = correlations(parts, patients)
    below, above = np.abs(np.array(limits) - np.array(values)[:, None]).T / len(parts)
    low, high = (max(0.0, float(away @ correlation @ away)) ** 0.5 for away in (below, above))
    return Estimate(value, value - low, value + high, "mover", influence_S, n)


def correlations(parts: Sequence[Estimate], patients: Patients) -> np.ndarray:
    """Of the numbers of the same slides between patients; 0 beside a number that no slide changes."""
    patient_S = patient_index(patients, len(parts[0].influence_S))
    influence = np.stack([np.bincount(patient_S, weights=part.influence_S) for part in parts])
    products = influence @ influence.T
    scale = np.sqrt(np.outer(np.diag(products), np.diag(products)))
    found: np.ndarray = np.divide(products, scale, out=np.zeros_like(products), where=scale > 1e-20)
    np.fill_diagonal(found, 1.0)
    return found


# --- shared --------------------------------------------------------------------------------------------------------


def variance_of(influence_S: np.ndarray, patient_S: np.ndarray) -> float:
    """Of a number, from the influence of its slides, patients as clusters."""
    influence_P = np.bincount(patient_S, weights=influence_S)
    n = len(influence_P)
    return float((influence_P**2).sum() * n / (n - 1)) if n > 1 else 0.0


def clustered_variance(
    positives: np.ndarray, negatives: np.ndarray, patient_of_positive: np.ndarray, patient_of_negative: np.ndarray
) -> float:
    """Variance of an AUC, or of the difference of two, from its structural components (Obuchowski 1997, section 2).

    The components of the positives and those of the negatives have the same mean, the AUC.
    """
    n_patients = int(max(patient_of_positive.max(), patient_of_negative.max())) + 1
    of_positives_P, of_negatives_P = (
        np.bincount(patient, weights=values - values.mean(), minlength=n_patients) / len(values)
        for values, patient in ((positives, patient_of_positive), (negatives, patient_of_negative))
    )

    def unbiased(n: int) -> float:
        return n / (n - 1)

    with_positives, with_negatives = len(np.unique(patient_of_positive)), len(np.unique(patient_of_negative))
    variance = (
        unbiased(with_positives) * (of_positives_P**2).sum()
        + unbiased(with_negatives) * (of_negatives_P**2).sum()
        + unbiased(n_patients) * 2 * (of_positives_P * of_negatives_P).sum()
    )
    return max(0.0, float(variance))  # never below 0 but by rounding


def structural_components(truth_S: np.ndarray, score_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative the share of positives above; ties half."""
    positive, negative = score_S[truth_S], score_S[~truth_S]
    rank_S = rankdata(score_S)  # midranks of all, less those within the own class: how many of the other are below
    below = rank_S[truth_S] - rankdata(positive)
    above = len(positive) - (rank_S[~truth_S] - rankdata(negative))
    return below / len(negative), above / len(positive)


def _checked(labels: ArrayLike, scores: ArrayLike, patients: Patients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels as bool, scores as float64, patients as numbers from 0; ValueError where they do not fit."""
    label_S, score_S = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if label_S.shape != score_S.shape or score_S.ndim != 1:
        raise ValueError(f"expected one label and one score a slide, got {label_S.shape} and {score_S.shape}")
    if not np.isin(label_S, (0, 1)).all() or not np.isfinite(score_S).all():
        raise ValueError("expected labels 0 and 1 and scores that are numbers; leave the other slides out")
    return label_S.astype(bool), score_S, patient_index(patients, len(score_S))


def patient_index(patients: Patients, n_slides: int) -> np.ndarray:
    """Patients as numbers from 0, one a slide."""
    if patients is None:
        return np.arange(n_slides)
    _, patient_S = np.unique(np.asarray(patients), return_inverse=True)
    if len(patient_S) != n_slides:
        raise ValueError(f"expected one patient a slide, got {len(patient_S)} for {n_slides}")
    return patient_S.astype(np.int64)
