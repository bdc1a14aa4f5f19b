"""The difference of two AUCs of the same slides: score limits under the binormal model of both scores.

Both scores are normal within classes after a rising transformation each (`mil.tasks.binormal`), with one ratio of the
classes' spreads, and correlate: those of one slide, and those of two slides of a patient. That says how the two
estimates vary together at any pair of true AUCs. A true difference is refused where the seen one lies more than 1.96 of
*its* standard errors away (as Tango, Statistics in Medicine 1998, does for shares); the pair of AUCs that has this
difference is the one nearest to what was seen. Where patients have several slides, how alike these are is known from
few patients, and it is Student's quantile. Simulated coverage (`benchmarks/coverage.py`): 0.94 to 0.963; where only
one score's positives spread twice as far 0.93 to 0.94.

Axes: S slides, P patients, L true differences looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau

from extract.shares import Z
from mil.tasks.binormal import (
    Binormal,
    binormal,
    components,
    normal_scores,
    score_limits,
    shared,
)
from mil.tasks.estimates import (
    Estimate,
    Patients,
    Ranked,
    clustered_variance,
    ranked_slides,
    shape,
    shrunken_ratio,
    slides_by_patient,
    student_quantile,
    undefined,
)

ADDED = 2.5
"""Comparisons won, and as many lost, that are added to either AUC before its variance is taken (by simulation)."""
NEAR_EDGE = 0.98
"""An AUC beyond it says too little about its own variance to say how many comparisons it is worth."""


def auc_difference_interval(labels: ArrayLike, a: ArrayLike, b: ArrayLike, patients: Patients = None) -> Estimate:
    """AUC of the scores a less that of b, of the same slides, with its score interval.

    Args:
        labels: (S,) 0 or 1.
        a, b: (S,) higher = more positive; only the order within each counts.
        patients: (S,) of every slide.

    Returns:
        No value with one class; no interval with fewer than two patients that have slides of either class.
    """
    both = [ranked_slides(labels, scores, patients) for scores in (a, b)]
    if both[0] is None or both[1] is None:
        return undefined(len(np.asarray(a)))
    (ranked_a, a_S), (ranked_b, b_S) = both[0], both[1]
    value, influence_S = ranked_a.auc - ranked_b.auc, ranked_a.influence_S - ranked_b.influence_S
    n_patients = ranked_a.n_patients
    if n_patients < 2:
        return Estimate(value, None, None, None, influence_S)
    pair = pair_of((ranked_a, ranked_b), (a_S, b_S))
    middle = pair.auc_a - pair.auc_b
    ratio = shrunken_ratio(seen_variance(ranked_a, ranked_b), float(pair.variance(np.array([middle]))[0]))
    quantile = quantile_of(n_patients, ranked_a.patient_S)
    low, high = score_limits(value, lambda true: ratio * pair.variance(true), bounds=(-1.0, 1.0), quantile=quantile)
    return Estimate(value, low, high, "paired", influence_S, n_patients)


def quantile_of(n_patients: int, patient_S: np.ndarray) -> float:
    """1.96 with one slide a patient; of two and more Student's, with a degree of freedom a patient of the rarer class
    but one; between them in between. By simulation of 40 patients with 2 to 4 slides each, 1.96 holds the truth in
    0.94, this in 0.955.
    """
    second_slides = min(1.0, len(patient_S) / len(np.unique(patient_S)) - 1)
    return Z + second_slides * (student_quantile(n_patients - 1) - Z)


def seen_variance(a: Ranked, b: Ranked) -> float:
    """Of the difference, as the sample shows it (DeLong 1988; Obuchowski 1997)."""
    own_S = a.truth_S
    more = (a.of_positives - b.of_positives, a.of_negatives - b.of_negatives)
    return clustered_variance(*more, a.patient_S[own_S], a.patient_S[~own_S])


@dataclass(frozen=True)
class Pair:
    """The models of two scores and of what they share, and two AUCs from which others with a difference are sought."""

    auc_a: float
    auc_b: float
    a: Binormal
    b: Binormal
    shared: Binormal

    @cached_property
    def share_of_a(self) -> float:
        """Of a difference: how much of it is a's, by its share of the variance."""
        of_a, of_b, of_both = self.parts(np.array([self.auc_a]), np.array([self.auc_b]))
        return float(np.clip((of_a - of_both) / np.maximum(of_a + of_b - 2 * of_both, 1e-12), 0, 1)[0])

    def variance(self, difference: np.ndarray) -> np.ndarray:
        """Of the estimated difference where the true one is this, (L,): at the nearest pair of AUCs."""
        move = difference - (self.auc_a - self.auc_b)
        auc_a, auc_b = self.auc_a + self.share_of_a * move, self.auc_b - (1 - self.share_of_a) * move
        of_a, of_b, of_both = self.parts(*(np.clip(auc, 1e-6, 1 - 1e-6) for auc in (auc_a, auc_b)))
        found: np.ndarray = np.maximum(of_a + of_b - 2 * of_both, 1e-12)
        return found

    def parts(self, auc_a: np.ndarray, auc_b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Variance of either AUC, and their covariance."""
        return self.a.variance(auc_a), self.b.variance(auc_b), self.shared.covariance(auc_a, auc_b)


def pair_of(ranked: tuple[Ranked, Ranked], scores: tuple[np.ndarray, np.ndarray]) -> Pair:
    """The model of two scores of the same slides."""
    truth_S, patient_S = ranked[0].truth_S, ranked[0].patient_S
    shapes = [shape(own, score_S) for own, score_S in zip(ranked, scores, strict=True)]
    spread = spread_of_both(ranked, [own for own, _ in shapes])
    slides = slides_by_patient(ranked[0])
    a, b = (binormal(*slides, spread, within) for _, within in shapes)
    same = min(latent_correlation(scores, truth_S), 1 - 1 / (len(slides[0]) + 1))
    within = 0.0
    if len(truth_S) > len(slides[0]):
        a_S, b_S = (normal_scores(score_S, truth_S) for score_S in scores)
        between = components(a_S, b_S, patient_S)
        within = 0.0 if between is None else float(np.clip(between[0], -1, max(same, 0.0)))
    together = shared(*slides, spread, same, within)
    return Pair(inside(ranked[0].auc, a), inside(ranked[1].auc, b), a, b, together)


def spread_of_both(ranked: tuple[Ranked, Ranked], spreads: Sequence[float]) -> float:
    """The positives' share of the spread, one for both scores: the mean of theirs, weighted by how many comparisons
    each has lost (or won, if these are fewer), which is what tells of it.

    Each with its own, the interval holds the truth in 0.92 to 0.93 where positives spread twice as far; so in 0.94.
    """
    told = [float(own.inside(min(own.auc, 1 - own.auc))[0]) for own in ranked]
    return float(np.average(spreads, weights=told))


def latent_correlation(scores: tuple[np.ndarray, np.ndarray], truth_S: np.ndarray) -> float:
    """Of the two scores of a slide within its class, once both are normal: sin(pi tau / 2) of Kendall's tau (Greiner
    1909), over the pairs of slides of either class.

    Scores that rank slides alike have few slides that tell them apart: of 20 and 30 slides whose scores correlate by
    0.9, ranks taken as normal quantiles give 0.87 on average, this 0.90; the variance of the difference goes with how
    much is missing to 1.
    """
    total = pairs = 0.0
    for own in (truth_S, ~truth_S):
        n, (a, b) = int(own.sum()), (score_S[own] for score_S in scores)
        tau = kendalltau(a, b).statistic if n > 1 else np.nan
        if np.isfinite(tau):  # not where a score is the same of all
            total, pairs = total + n * (n - 1) * float(tau), pairs + n * (n - 1)
    return float(np.sin(np.pi / 2 * total / pairs)) if pairs else 0.0


def inside(auc: float, model: Binormal) -> float:
    """The AUC with `ADDED` comparisons won and lost more, of as many independent ones as its variance is worth."""
    at = np.array([np.clip(max(auc, 1 - auc), 0.5, NEAR_EDGE)])
    worth = float((at * (1 - at) / model.variance(at))[0])
    return (auc * worth + ADDED) / (worth + 2 * ADDED)
