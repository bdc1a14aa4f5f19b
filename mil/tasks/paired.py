"""The difference of two AUCs of the same slides: score limits under the binormal model of both scores.

Both scores are normal within classes after a rising transformation each (`mil.tasks.binormal`), and correlate: those of
one slide, and those of two slides of a patient. That says how the two estimates vary together at any pair of true AUCs.
A true difference is refused where the seen one lies more than 1.96 of *its* standard errors away (as Tango, Statistics
in Medicine 1998, does for shares); the pair of AUCs that has this difference is the one nearest to what was seen.
Where patients have several slides, how alike these are is known from few patients, and it is Student's quantile.
Simulated coverage (`benchmarks/coverage.py`): 0.93 to 0.97 with one slide a patient, 0.94 to 0.98 with 2 to 4.

Axes: S slides, P patients, L true differences looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mil.tasks.binormal import Binormal, Z, components, normal_scores, score_limits, shared
from mil.tasks.estimates import (
    Estimate,
    Patients,
    Ranked,
    clustered_variance,
    fitted,
    ranked_slides,
    shrunken_ratio,
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

    def variance(self, difference: np.ndarray) -> np.ndarray:
        """Of the estimated difference where the true one is this, (L,): at the nearest pair of AUCs, which move by
        their share of its variance."""
        of_a, of_b, of_both = self.parts(np.array([self.auc_a]), np.array([self.auc_b]))
        total = float((of_a + of_b - 2 * of_both)[0])
        share = float(np.clip((of_a - of_both)[0] / max(total, 1e-12), 0, 1))
        move = difference - (self.auc_a - self.auc_b)
        auc_a, auc_b = self.auc_a + share * move, self.auc_b - (1 - share) * move
        of_a, of_b, of_both = self.parts(*(np.clip(auc, 1e-6, 1 - 1e-6) for auc in (auc_a, auc_b)))
        found: np.ndarray = np.maximum(of_a + of_b - 2 * of_both, 1e-12)
        return found

    def parts(self, auc_a: np.ndarray, auc_b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Variance of either AUC, and their covariance."""
        return self.a.variance(auc_a), self.b.variance(auc_b), self.shared.covariance(auc_a, auc_b)


def pair_of(ranked: tuple[Ranked, Ranked], scores: tuple[np.ndarray, np.ndarray]) -> Pair:
    """The model of two scores of the same slides."""
    truth_S, patient_S = ranked[0].truth_S, ranked[0].patient_S
    (a, spread_a), (b, spread_b) = (fitted(own, score_S) for own, score_S in zip(ranked, scores, strict=True))
    same, within = score_correlations(normal_scores(scores[0], truth_S), normal_scores(scores[1], truth_S), patient_S)
    n_patients = int(patient_S.max()) + 1
    slides = [np.bincount(patient_S[own], minlength=n_patients) for own in (truth_S, ~truth_S)]
    together = shared(slides[0], slides[1], (spread_a, spread_b), same, within)
    return Pair(inside(ranked[0].auc, a), inside(ranked[1].auc, b), a, b, together)


def score_correlations(a_S: np.ndarray, b_S: np.ndarray, patient_S: np.ndarray) -> tuple[float, float]:
    """Of two scores of a slide, and of two slides of a patient. Two scores that rank all slides alike may differ
    elsewhere: the correlation is less than 1 by one in as many patients as there are."""
    scale = float(np.sqrt((a_S**2).mean() * (b_S**2).mean()))
    if scale < 1e-12:
        return 0.0, 0.0
    same = min(float((a_S * b_S).mean()) / scale, 1 - 1 / (int(patient_S.max()) + 1))
    found = components(a_S, b_S, patient_S)
    return same, 0.0 if found is None else float(np.clip(found[0] / scale, -1, max(same, 0.0)))


def inside(auc: float, model: Binormal) -> float:
    """The AUC with `ADDED` comparisons won and lost more, of as many independent ones as its variance is worth."""
    at = np.array([np.clip(max(auc, 1 - auc), 0.5, NEAR_EDGE)])
    worth = float((at * (1 - at) / model.variance(at))[0])
    return (auc * worth + ADDED) / (worth + 2 * ADDED)
