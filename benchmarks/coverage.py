"""How often 95 % intervals hold the truth: today's beside the percentile bootstrap and DeLong's, and how wide they are.

    python benchmarks/coverage.py [--draws 2000] [--only auc,clusters,...] [--rows TEXT] [--methods ours]
        [--out FILE.md]

Samples come from populations whose true value is known: scores are normal in either class, as many slides positive as
stated. Slides of a patient share part of the variance (the intraclass correlation). 94 to 96 % is what is wanted.
Every line is a few hundred or thousand samples, each of which gets an interval by every method.

Few slides give few values of a share, so its coverage jumps with the true one. Those lines (`shares`, `combined`) take
the mean over truths of a neighbourhood (Brown, Cai and DasGupta, Statistical Science 2001); with one slide a patient it
is no simulation but the sum over all samples that there are, with their chances.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import machine, publish
from planted import made
from scipy.optimize import brentq
from scipy.special import betainc, expit, logit, softmax
from scipy.stats import binom, norm

from extract.finetuning.probe import score_table
from extract.shares import wilson
from mil.config import Task as TaskConfig
from mil.look.froc import Finds, collected, froc, sensitivities
from mil.results.calibration_interval import calibration_error
from mil.results.intervals import (
    AS_IT_IS,
    SCALES,
    Scale,
    difference_interval,
    resampled,
    scaled_interval,
)
from mil.results.task_summary import metrics_with_intervals, plain_metrics
from mil.results.trainings import Trainings, auc_estimate, auc_value, auc_with_training
from mil.tasks.contract import Part
from mil.tasks.estimates import (
    Estimate,
    auc_interval,
    average_precision_interval,
    balanced_accuracy_interval,
    c_index_interval,
    clustered_variance,
    f1_interval,
    jeffreys,
    mean_interval,
    mean_of,
    proportion_interval,
    structural_components,
)
from mil.tasks.metrics import METRICS
from mil.tasks.ordinal import ordinal_metrics
from mil.tasks.paired import auc_difference_interval
from mil.tasks.regression import error_intervals, regression_metrics
from mil.tasks.stratified import stratified_auc_interval
from mil.tasks.table import task_of

Z = float(norm.ppf(0.975))
RESAMPLES = 300
Ends = tuple[float, float]
Sample = dict[str, Any]
Every = Callable[[], Iterator[tuple[Sample, np.ndarray, np.ndarray]]]
"""Every sample that there is, and of each truth looked at the sample's chance and the truth."""


@dataclass(frozen=True)
class Case:
    """A population: its name, the true value (None: each sample brings its own), how to draw a sample, the methods.

    every: instead of drawing.
    """

    name: str
    truth: float | None
    draw: Callable[[np.random.Generator], Sample] | None
    methods: dict[str, Callable[[Sample], Ends]]
    every: Every | None = None


def ends(estimate: Estimate) -> Ends:
    if estimate.low is None or estimate.high is None:
        return np.nan, np.nan
    return estimate.low, estimate.high


# --- samples -------------------------------------------------------------------------------------------------------


def scores(labels_S: np.ndarray, auc: float, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Normal scores of one slide a patient; the positives' standard deviation is `spread`."""
    shift = norm.ppf(auc) * (1 + spread**2) ** 0.5
    return np.where(labels_S, shift + spread * rng.normal(size=len(labels_S)), rng.normal(size=len(labels_S)))


def one_a_patient(
    positives: int, negatives: int, auc: float, spread: float = 1.0, missed: float = 0.0
) -> Callable[..., Sample]:
    """Slides of as many patients; `missed`: this share of the positives looks like negatives."""
    labels_S = np.arange(positives + negatives) < positives
    of_others = (auc - missed / 2) / (1 - missed)

    def draw(rng: np.random.Generator) -> Sample:
        score_S = scores(labels_S, of_others, spread, rng)
        lost_S = labels_S & (rng.random(len(labels_S)) < missed)
        score_S[lost_S] = rng.normal(size=lost_S.sum())
        return {"labels": labels_S, "scores": score_S, "patients": None}

    return draw


def of_patients(patients: int, share: float, auc: float, within: float) -> Callable[..., Sample]:
    """2 to 4 slides a patient, all of the patient's label."""
    rng = np.random.default_rng(patients)
    patient_S = np.repeat(np.arange(patients), rng.integers(2, 5, patients))
    labels_S = patient_S < round(share * patients)
    shift = norm.ppf(auc) * 2**0.5

    def draw(rng: np.random.Generator) -> Sample:
        effect_S = rng.normal(size=patients)[patient_S] * within**0.5
        noise_S = rng.normal(size=len(patient_S)) * (1 - within) ** 0.5
        return {"labels": labels_S, "scores": shift * labels_S + effect_S + noise_S, "patients": patient_S}

    return draw


def two_classifiers(
    positives: int, negatives: int, auc_a: float, auc_b: float, alike: float, spread: float = 1.0
) -> Callable[..., Sample]:
    """Two scores of the same slides, correlated within a class; the positives' standard deviation is `spread`."""
    labels_S = np.arange(positives + negatives) < positives
    return two_scores(labels_S, np.arange(len(labels_S)), (auc_a, auc_b), alike, 0.0, spread)


def two_classifiers_of_patients(
    patients: int, share: float, auc_a: float, auc_b: float, alike: float, within: float
) -> Callable[..., Sample]:
    """The same with 2 to 4 slides a patient; what slides of a patient share is as alike as what is a slide's own."""
    patient_S = np.repeat(np.arange(patients), np.random.default_rng(patients).integers(2, 5, patients))
    return two_scores(patient_S < round(share * patients), patient_S, (auc_a, auc_b), alike, within)


def two_scores(
    labels_S: np.ndarray,
    patient_S: np.ndarray,
    aucs: tuple[float, float],
    alike: float,
    within: float,
    spread: float = 1.0,
) -> Callable[..., Sample]:
    def both(rng: np.random.Generator, n: int) -> np.ndarray:
        return alike**0.5 * rng.normal(size=n) + (1 - alike) ** 0.5 * rng.normal(size=(2, n))

    def draw(rng: np.random.Generator) -> Sample:
        of_patient = both(rng, patient_S.max() + 1)[:, patient_S]
        noise = within**0.5 * of_patient + (1 - within) ** 0.5 * both(rng, len(labels_S))
        shifts, noise = norm.ppf(aucs) * (1 + spread**2) ** 0.5, np.where(labels_S, spread, 1.0) * noise
        a, b = (shift * labels_S + own_S for shift, own_S in zip(shifts, noise, strict=True))
        return {"labels": labels_S, "scores": a, "other": b, "patients": patient_S}

    return draw


def called(positives: int, negatives: int, share: float, near: float, within: float) -> Callable[..., Sample]:
    """2 to 4 slides of each patient, called right with a chance near `share`, the same for both classes."""
    label_P = np.arange(positives + negatives) < positives

    def draw(rng: np.random.Generator) -> Sample:
        p, n = rng.uniform(share - near, share + near), len(label_P)
        patient_S = np.repeat(np.arange(n), rng.integers(2, 5, n))
        labels_S = label_P[patient_S]
        z_S = within**0.5 * rng.normal(size=n)[patient_S] + (1 - within) ** 0.5 * rng.normal(size=len(patient_S))
        f1 = true_f1(labels_S.sum(), (~labels_S).sum(), p)
        right_S = z_S < norm.ppf(p)
        return {"labels": labels_S, "right": right_S, "patients": patient_S, "truth": p, "f1": f1}

    return draw


def every_called(
    positives: int, negatives: int, share: float, near: float
) -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
    """The same with one slide a patient, as `Every`: so many of either class right; 41 true shares."""
    labels_S, true_T = np.arange(positives + negatives) < positives, np.linspace(share - near, share + near, 41)
    for m in range(positives + 1):
        for n in range(negatives + 1):
            right_S = np.r_[np.arange(positives) < m, np.arange(negatives) < n]
            chance_T = binom.pmf(m, positives, true_T) * binom.pmf(n, negatives, true_T)
            yield {"labels": labels_S, "right": right_S, "patients": None}, chance_T / 41, true_T


def true_f1(positives: int, negatives: int, share_T: Any) -> Any:
    """Where this share of either class is called right."""
    found_T, wrong_T = positives * share_T, negatives * (1 - share_T)
    return 2 * found_T / (positives + found_T + wrong_T)


def probabilities(slides: int, spread: float, intercept: float, slope: float) -> Callable[..., Sample]:
    """Probabilities whose log-odds are normal, and labels whose log-odds are intercept + slope times theirs."""

    def draw(rng: np.random.Generator, n: int = slides) -> Sample:
        z_S = rng.normal(-0.2, spread, n)
        return {"p": expit(z_S), "labels": rng.random(n) < expit(intercept + slope * z_S)}

    return draw


def of_sites(patients: int, sites: int, auc: float, shift: float, more: float, within: float) -> Callable[..., Sample]:
    """2 to 4 slides a patient, or one (`within` 0); scores of the first site are higher by `shift`, and its positives
    more by this share."""

    def draw(rng: np.random.Generator) -> Sample:
        site_P = rng.integers(0, sites, patients)
        label_P = rng.random(patients) < 0.4 + more * (site_P == 0)
        patient_S = np.repeat(np.arange(patients), rng.integers(2, 5, patients) if within else 1)
        noise_S = within**0.5 * rng.normal(size=patients)[patient_S]
        noise_S += (1 - within) ** 0.5 * rng.normal(size=len(patient_S))
        score_S = norm.ppf(auc) * 2**0.5 * label_P[patient_S] + shift * (site_P == 0)[patient_S] + noise_S
        return {"labels": label_P[patient_S], "scores": score_S, "sites": site_P[patient_S], "patients": patient_S}

    return draw


def survival(slides: int, strength: float, follow_up: float) -> Callable[..., Sample]:
    """Risks, and exponential times with exponential censoring."""

    def draw(rng: np.random.Generator, n: int = slides) -> Sample:
        risk_S = rng.normal(size=n)
        time_S, end_S = rng.exponential(size=n) * np.exp(-strength * risk_S), rng.exponential(size=n) * follow_up
        return {"risks": risk_S, "times": np.minimum(time_S, end_S), "events": time_S <= end_S}

    return draw


# --- methods -------------------------------------------------------------------------------------------------------


def index_of(sample: Sample) -> np.ndarray:
    patients = sample["patients"]
    return np.arange(len(sample["labels"])) if patients is None else patients


def percentile(metric: str) -> Callable[[Sample], Ends]:
    """Patients drawn with replacement; 2.5 and 97.5 % of the metric (what reports had until 2026-11)."""

    def of(sample: Sample) -> Ends:
        p_S = expit(sample["scores"] - sample.get("threshold", 0.0))

        def values(weights_RS: np.ndarray) -> dict[str, np.ndarray]:
            found = METRICS[metric].weighted(sample["labels"], p_S, p_S >= 0.5, weights_RS)
            return {metric: found}

        return percentiles(resampled(values, index_of(sample).astype(str).tolist(), RESAMPLES, 0)[metric])

    return of


def percentiles(values_R: np.ndarray) -> Ends:
    low, high = np.nanquantile(values_R, [0.025, 0.975])
    return float(low), float(high)


@lru_cache
def drawn(n_patients: int) -> np.ndarray:
    """How often each patient is drawn, a row a resample; the same for every sample, as the same seed gives."""
    return np.random.default_rng(0).multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=RESAMPLES)


def percentile_auc(sample: Sample) -> Ends:
    """As `percentile`, of the AUC or of the difference of two; by all pairs, which is quicker for small samples."""
    labels_S, patient_S = sample["labels"], index_of(sample)
    won = sum(
        sign * (sample[key][labels_S][:, None] > sample[key][~labels_S])
        for key, sign in (("scores", 1.0), ("other", -1.0))
        if key in sample
    )
    weights_RS = drawn(int(patient_S.max()) + 1)[:, patient_S].astype(np.float64)
    positive, negative = weights_RS[:, labels_S], weights_RS[:, ~labels_S]
    pairs_R = positive.sum(axis=1) * negative.sum(axis=1)
    values_R = ((positive @ won) * negative).sum(axis=1)[pairs_R > 0] / pairs_R[pairs_R > 0]
    return percentiles(values_R)


def delong_error(sample: Sample) -> tuple[float, float]:
    """AUC (or difference) and its standard error, patients as clusters."""
    labels_S, patient_S = sample["labels"], index_of(sample)
    of_positives, of_negatives = structural_components(labels_S, sample["scores"])
    if "other" in sample:
        more = structural_components(labels_S, sample["other"])
        of_positives, of_negatives = of_positives - more[0], of_negatives - more[1]
    variance = clustered_variance(of_positives, of_negatives, patient_S[labels_S], patient_S[~labels_S])
    return float(of_positives.mean()), variance**0.5


def delong_wald(sample: Sample) -> Ends:
    auc, error = delong_error(sample)
    return auc - Z * error, auc + Z * error


def delong_logit(sample: Sample) -> Ends:
    auc, error = delong_error(sample)
    if not 0 < auc < 1:
        return auc, auc
    away = Z * error / (auc * (1 - auc))
    return float(expit(logit(auc) - away)), float(expit(logit(auc) + away))


AUC_METHODS: dict[str, Callable[[Sample], Ends]] = {
    "percentile bootstrap": percentile_auc,
    "DeLong": delong_wald,
    "DeLong, logit": delong_logit,
    "ours": lambda s: ends(auc_interval(s["labels"], s["scores"], s["patients"])),
}


# --- tables --------------------------------------------------------------------------------------------------------


def auc_cases() -> Iterator[Case]:
    rows = ((20, 30, 0.9), (20, 30, 0.97), (49, 81, 0.95), (49, 81, 0.99), (30, 30, 0.8))
    for m, n, auc in (*rows, (20, 30, 0.5), (49, 81, 0.995)):
        yield Case(f"{m + n} ({m}), AUC {auc}", auc, one_a_patient(m, n, auc), AUC_METHODS)
    for m, n, auc in ((20, 30, 0.97), (49, 81, 0.95)):
        draw = one_a_patient(m, n, auc, spread=2.0)
        yield Case(f"{m + n} ({m}), AUC {auc}, positives spread twice as far", auc, draw, AUC_METHODS)
        draw = one_a_patient(m, n, auc, missed=1.5 * (1 - auc))
        yield Case(
            f"{m + n} ({m}), AUC {auc}, {150 * (1 - auc):.1f} % of positives look negative", auc, draw, AUC_METHODS
        )


def cluster_cases() -> Iterator[Case]:
    for patients, share, auc in ((40, 0.4, 0.9), (40, 0.4, 0.97), (60, 0.4, 0.95), (100, 0.4, 0.99), (60, 0.5, 0.8)):
        for within in (0.3, 0.7):
            name = f"{patients} patients ({round(share * patients)}), AUC {auc}, correlation {within}"
            yield Case(name, auc, of_patients(patients, share, auc, within), AUC_METHODS)


def difference_cases() -> Iterator[Case]:
    methods = {
        "percentile bootstrap": percentile_auc,
        "DeLong": delong_wald,
        "ours": lambda s: ends(auc_difference_interval(s["labels"], s["scores"], s["other"], s["patients"])),
    }
    for m, n, a, b in (
        (20, 30, 0.9, 0.9),
        (20, 30, 0.95, 0.93),
        (20, 30, 0.97, 0.9),
        (49, 81, 0.95, 0.95),
        (49, 81, 0.99, 0.97),
        (30, 30, 0.8, 0.7),
    ):
        for alike in (0.0, 0.5, 0.9):
            name = f"{m + n} ({m}), AUC {a} and {b}, scores correlate {alike}"
            yield Case(name, a - b, two_classifiers(m, n, a, b, alike), methods)
    for a, b in ((0.9, 0.9), (0.95, 0.93), (0.97, 0.9)):
        for within in (0.3, 0.7):
            for alike in (0.0, 0.5, 0.9):
                name = f"40 patients (16), {within} within, AUC {a} and {b}, scores correlate {alike}"
                yield Case(name, a - b, two_classifiers_of_patients(40, 0.4, a, b, alike, within), methods)

    for m, n, a, b, alike, spread in OTHERS:
        name = f"{m + n} ({m}), AUC {a} and {b}, scores correlate {alike}"
        name += "" if spread == 1 else f", positives spread {spread:g} times as far"
        yield Case(f"other: {name}", a - b, two_classifiers(m, n, a, b, alike, spread), methods)
    for patients, share, a, b, alike in ((60, 0.5, 0.85, 0.8, 0.7), (50, 0.3, 0.92, 0.9, 0.8)):
        name = f"{patients} patients ({round(patients * share)}), 0.5 within, AUC {a} and {b}, scores correlate {alike}"
        yield Case(f"other: {name}", a - b, two_classifiers_of_patients(patients, share, a, b, alike, 0.5), methods)


OTHERS = (
    (25, 55, 0.92, 0.88, 0.7, 1.0),
    (30, 70, 0.85, 0.82, 0.6, 1.0),
    (35, 35, 0.96, 0.92, 0.5, 1.5),
    (24, 36, 0.95, 0.9, 0.7, 2.0),
)
"""Slides of either class, AUCs, correlation, spread of the positives: populations that no constant was chosen on."""

NEAR = {0.8: 0.05, 0.9: 0.04, 0.95: 0.025}


def share_cases() -> Iterator[Case]:
    """Sensitivity by three methods, each for as many slides as the patients' are worth."""

    def by(limits: Callable[[float, float], Ends]) -> Callable[[Sample], Ends]:
        return lambda s: ends(proportion_interval(s["right"], s["patients"], among=s["labels"], limits=limits))

    methods = {"Wilson (ours)": by(wilson), "Jeffreys": by(jeffreys), "mid-p": by(mid_p)}
    for n in (10, 20, 50):
        for share, near in NEAR.items():
            for within in (None, 0.3, 0.7):
                of = "" if within is None else f" patients, {within} within"
                name = f"sensitivity {share} +- {near}, {n} positive{of or ' slides'}"
                if within is None:
                    yield Case(name, None, None, methods, partial(every_called, n, 0, share, near))
                else:
                    yield Case(name, None, called(n, 1, share, near, within), methods)


def combined_cases() -> Iterator[Case]:
    """Balanced accuracy and F1, sensitivity and specificity the same."""

    def right(s: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return s["labels"], s["right"] == s["labels"], s["patients"]

    def jaccard(s: Sample) -> Ends:
        truth_S, called_S, patient_S = right(s)
        found = proportion_interval(truth_S & called_S, patient_S, among=truth_S | called_S)
        low, high = ends(found)
        return 2 * low / (1 + low), 2 * high / (1 + high)

    for m, n in ((10, 15), (20, 30), (49, 81)):
        for share, near in NEAR.items():
            for within in (None, 0.3, 0.7) if m == 20 else (None,):
                draw = called(m, n, share, near, within) if within else None
                of = "slides" if within is None else f"patients, {within} within"
                name = f"{share} +- {near}, {m + n} ({m}) {of}"
                every = None if within else partial(every_called, m, n, share, near)
                yield Case(
                    f"balanced accuracy, {name}",
                    None,
                    draw,
                    {
                        "Wilson": lambda s: ends(
                            mean_of(
                                [proportion_interval(s["right"], s["patients"], among=own) for own in classes(s)],
                                s["patients"],
                            )
                        ),
                        "ours": lambda s: ends(balanced_accuracy_interval(*right(s))),
                    },
                    every,
                )
                yield Case(
                    f"F1, {name}",
                    None,
                    lambda rng, draw=draw: {**(s := draw(rng)), "truth": s["f1"]},
                    {"Wilson": jaccard, "ours": lambda s: ends(f1_interval(*right(s)))},
                    every and partial(f1_of_every, every, m, n),
                )


def f1_of_every(every: Every, positives: int, negatives: int) -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
    for sample, chance_T, true_T in every():
        yield sample, chance_T, true_f1(positives, negatives, true_T)


def classes(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return sample["labels"], ~sample["labels"]


def mid_p(rate: float, n: float) -> Ends:
    """The shares of which as much, half of the very count, has a chance of 2.5 % (Lancaster 1961)."""
    hits = rate * n

    def tail(p: float, above: bool) -> float:
        at_least, more = (binomial_tail(count, n, p) for count in (hits, hits + 1))
        upper = (at_least + more) / 2
        return (upper if above else 1 - upper) - 0.025

    ends = 1e-9, 1 - 1e-9
    low = 0.0 if tail(ends[0], True) >= 0 else float(brentq(tail, *ends, args=(True,)))
    return low, 1.0 if tail(ends[1], False) >= 0 else float(brentq(tail, *ends, args=(False,)))


def binomial_tail(hits: float, n: float, p: float) -> float:
    """The chance of at least so many of n, by the beta distribution, which has one for broken numbers as well."""
    if hits <= 0 or hits > n:
        return float(hits <= 0)
    return float(betainc(hits, n - hits + 1, p))


def calibration_cases() -> Iterator[Case]:
    def ours(s: Sample) -> Ends:
        p_SC = np.stack([1 - s["p"], s["p"]], axis=1)
        found = calibration_error([1], s["labels"].astype(int), p_SC, np.arange(len(s["p"])), RESAMPLES, 0)
        return (np.nan, np.nan) if found["low"] is None else (found["low"], found["high"])

    def percentile(s: Sample) -> Ends:
        def values(weights_RS: np.ndarray) -> dict[str, np.ndarray]:
            return {"ece": METRICS["ece"].weighted(s["labels"], s["p"], s["labels"], weights_RS)}

        return percentiles(resampled(values, np.arange(len(s["p"])).astype(str).tolist(), RESAMPLES, 0)["ece"])

    for slides in (60, 130):
        for spread, intercept, slope in (
            (1.5, 0, 1),
            (4, 0, 1),
            (1.5, 0, 0.6),
            (3, 0, 0.4),
            (1.5, 0, 2),
            (1.5, -1.5, 1),
        ):
            draw = probabilities(slides, spread, intercept, slope)
            large = draw(np.random.default_rng(0), 400_000)
            truth = 0.0 if (intercept, slope) == (0, 1) else METRICS["ece"](large["labels"].astype(int), large["p"])
            name = f"{slides} slides, log-odds spread {spread}, intercept {intercept}, slope {slope}: ECE {truth:.3f}"
            yield Case(name, float(truth or 0), draw, {"percentile bootstrap": percentile, "ours": ours})


def site_cases() -> Iterator[Case]:
    def ours(s: Sample) -> Ends:
        return ends(stratified_auc_interval(s["labels"], s["scores"], s["sites"], s["patients"]))

    for patients, sites, auc, shift, more, within in (
        (60, 2, 0.8, 0.0, 0.0, 0.0),
        (60, 3, 0.95, 0.0, 0.0, 0.0),
        (130, 12, 0.9, 0.0, 0.0, 0.0),
        (130, 2, 0.97, 1.0, 0.3, 0.0),
        (40, 2, 0.9, 0.0, 0.2, 0.5),
        (60, 3, 0.95, 1.0, 0.2, 0.5),
    ):
        name = f"{patients} patients, {sites} sites, AUC {auc}, a site {shift} SD higher, {within} within patients"
        yield Case(name, auc, of_sites(patients, sites, auc, shift, more, within), {"ours": ours})


def other_cases() -> Iterator[Case]:
    """Metrics at a threshold: the one that calls as many negatives positive as positives negative."""
    ours: dict[str, Callable[[Sample], Estimate]] = {
        "average_precision": lambda s: average_precision_interval(s["labels"], s["scores"], s["patients"]),
        "sensitivity": lambda s: share(s, positive=True),
        "balanced_accuracy": lambda s: balanced_accuracy_interval(
            s["labels"], s["scores"] >= s["threshold"], s["patients"]
        ),
        "f1": lambda s: f1_interval(s["labels"], s["scores"] >= s["threshold"], s["patients"]),
        "brier": lambda s: mean_interval(loss(s, "brier"), s["patients"], most=1.0),
        "log_loss": lambda s: mean_interval(loss(s, "log_loss"), s["patients"]),
    }
    for m, n, auc in ((20, 30, 0.9), (49, 81, 0.95), (49, 81, 0.99)):
        draw = with_threshold(one_a_patient(m, n, auc), auc)
        population = with_threshold(one_a_patient(4000 * m, 4000 * n, auc), auc)(np.random.default_rng(0))
        p_S = expit(population["scores"] - population["threshold"])
        for metric, method in ours.items():
            truth = METRICS[metric](population["labels"].astype(int), p_S, 0.5)
            methods = {"percentile bootstrap": percentile(metric), "ours": lambda s, f=method: ends(f(s))}
            yield Case(f"{METRICS[metric].title}, {m + n} ({m}), AUC {auc}", float(truth or 0), draw, methods)


def with_threshold(draw: Callable[..., Sample], auc: float) -> Callable[..., Sample]:
    return lambda rng: draw(rng) | {"threshold": norm.ppf(auc) / 2**0.5}


def share(sample: Sample, *, positive: bool) -> Estimate:
    right_S = (sample["scores"] >= sample["threshold"]) == sample["labels"]
    return proportion_interval(right_S, sample["patients"], among=sample["labels"] == positive)


def loss(sample: Sample, metric: str) -> np.ndarray:
    p_S = expit(sample["scores"] - sample["threshold"])
    if metric == "brier":
        return (p_S - sample["labels"]) ** 2
    return -np.log(np.where(sample["labels"], p_S, 1 - p_S))


def c_index_cases() -> Iterator[Case]:
    def ours(sample: Sample) -> Ends:
        return ends(c_index_interval(sample["risks"], sample["times"], sample["events"]))

    def jackknife(sample: Sample) -> Ends:
        found = c_index_interval(sample["risks"], sample["times"], sample["events"])
        error = float((found.influence_S**2).sum()) ** 0.5
        value = float(found.value or 0)
        return value - Z * error, value + Z * error

    for slides, strength, follow_up in ((60, 1.0, 1.0), (60, 2.5, 3.0), (150, 0.7, 1.0), (150, 6.0, 1.0)):
        draw = survival(slides, strength, follow_up)
        large = draw(np.random.default_rng(0), 12000)
        truth = float(c_index_interval(large["risks"], large["times"], large["events"]).value or 0)
        name = f"{slides} slides, {large['events'].mean():.0%} with event, C {truth:.3f}"
        yield Case(name, truth, draw, {"jackknife": jackknife, "ours": ours})


def training_cases() -> Iterator[Case]:
    """What trainings learn differs; the truth is the AUC that ensembles of as many trainings have on average."""

    def trainings(count: int, spread: float, slides: int) -> Callable[..., Sample]:
        labels_S = np.arange(slides) % 2 == 0

        def draw(rng: np.random.Generator) -> Sample:
            learned_U1 = 1.3 + spread * rng.normal(size=(count, 1))
            logits_US = learned_U1 * labels_S + rng.normal(size=slides) + 0.2 * rng.normal(size=(count, slides))
            keys = tuple((0, u) for u in range(count))
            run = Trainings(keys, logits_US[:, :, None], np.ones((count, slides)))
            return {"labels": labels_S, "scores": logits_US.mean(axis=0), "patients": None, "trainings": run}

        return draw

    methods = {
        "these members": AUC_METHODS["ours"],
        "training again": lambda s: ends(
            auc_with_training(s["labels"].astype(int), s["trainings"], np.arange(len(s["labels"])))
        ),
    }
    for count, spread in ((3, 0.6), (3, 0.3), (4, 0.6), (4, 0.3), (10, 0.5)):
        rng, large = np.random.default_rng(0), trainings(count, spread, 2000)
        truth = float(np.mean([auc_interval(s["labels"], s["scores"]).value for s in (large(rng) for _ in range(400))]))
        name = f"{count} trainings, what they learn differs by {spread} SD, AUC {truth:.3f}"
        yield Case(name, truth, trainings(count, spread, 160), methods)


def average_precision_cases() -> Iterator[Case]:
    """Of slides whose patients are clusters, and of patients (the mean of their slides' scores)."""

    def by_patient(s: Sample) -> Sample:
        slides_P = np.bincount(s["patients"])
        mean_P = np.bincount(s["patients"], weights=s["scores"]) / slides_P
        label_P = np.bincount(s["patients"], weights=s["labels"]) / slides_P
        return {"labels": label_P > 0.5, "scores": mean_P, "patients": None}

    def ours(s: Sample) -> Ends:
        return ends(average_precision_interval(s["labels"], s["scores"], s["patients"]))

    for patients, auc in ((40, 0.9), (60, 0.95), (100, 0.97)):
        for within in (0.3, 0.7):
            draw, rng = of_patients(patients, 0.4, auc, within), np.random.default_rng(0)
            samples = [draw(rng) for _ in range(100_000 // patients)]  # these very patients
            for unit, change in (("slides of", lambda s: s), ("", by_patient)):
                changed = [change(s) for s in samples]
                labels_S, scores_S = (np.concatenate([s[key] for s in changed]) for key in ("labels", "scores"))
                truth = METRICS["average_precision"](labels_S.astype(int), expit(scores_S))
                name = f"{unit} {patients} patients, AUC {auc}, {within} within: {truth:.3f}".strip()
                methods = {"percentile bootstrap": percentile("average_precision"), "ours": ours}
                yield Case(name, float(truth or 0), lambda rng, d=draw, change=change: change(d(rng)), methods)


def tile_cases() -> Iterator[Case]:
    """Accuracy of tiles whose slide makes them right or wrong together, as `extract.finetune` reports it."""

    def of(slides: int, right: float, within: float) -> Callable[[np.random.Generator], Sample]:
        labels_N, slide_N = np.arange(25 * slides) % 2, np.repeat(np.arange(slides), 25)

        def draw(rng: np.random.Generator) -> Sample:
            z_N = within**0.5 * rng.normal(size=slides)[slide_N] + (1 - within) ** 0.5 * rng.normal(size=len(slide_N))
            return {"labels": labels_N, "said": np.where(z_N < norm.ppf(right), labels_N, 1 - labels_N), "of": slide_N}

        return draw

    def ours(s: Sample) -> Ends:
        found = score_table(s["labels"], {"": s["said"]}, s["of"], 2, RESAMPLES, 0, "")[""]["scores"]["accuracy"]
        return found["low"], found["high"]

    def by_percentiles(s: Sample) -> Ends:
        right_G = np.bincount(s["of"], weights=s["said"] == s["labels"]) / 25
        return percentiles(drawn(len(right_G)) @ right_G / len(right_G))

    for slides in (12, 40):
        for right, within in ((0.8, 0.3), (0.9, 0.5), (0.97, 0.5), (0.99, 0.3)):
            name = f"{slides} slides of 25 tiles, accuracy {right}, {within} within"
            yield Case(name, right, of(slides, right, within), {"percentile bootstrap": by_percentiles, "ours": ours})


FALSE_POSITIVES = (0.25, 0.5, 1, 2, 4, 8)
"""Of Camelyon16."""


def froc_cases() -> Iterator[Case]:
    """Sensitivity for lesions at some false positives a slide (`mil.lesions`); those of a slide are alike."""

    def study(rng: np.random.Generator, slides: int, positives: int, strength: float, within: float) -> Finds:
        def slide(positive: bool) -> tuple[np.ndarray, np.ndarray]:
            shared, lesions = rng.normal(), (1 + rng.geometric(0.4)) * positive
            own_L = strength + within**0.5 * shared + (1 - within) ** 0.5 * rng.normal(size=lesions)
            return own_L, 0.5 * within**0.5 * shared + rng.normal(size=rng.poisson(8))

        return collected([slide(s < positives) for s in range(slides)])

    for slides, positives, strength, within in ((40, 16, 1.5, 0.3), (40, 16, 2.8, 0.5), (130, 49, 2.2, 0.3)):
        rng, whole = np.random.default_rng(0), np.ones((1, 100 * slides))
        large = [study(rng, 100 * slides, 100 * positives, strength, within) for _ in range(8)]
        truth_A = np.mean([sensitivities(s, FALSE_POSITIVES, whole)[0] for s in large], axis=0)
        names = [str(n) for n in range(slides)]

        def draw(rng: np.random.Generator, of: Any = (slides, positives, strength, within)) -> Sample:
            return {"finds": study(rng, *of)}

        for a, allowed in enumerate(FALSE_POSITIVES):

            def ours(s: Sample, allowed: float = allowed, names: list[str] = names) -> Ends:
                row = froc(s["finds"], [allowed], names, resamples=RESAMPLES // 2, seed=0)[0][0]
                return row["low"], row["high"]

            def by_percentiles(s: Sample, allowed: float = allowed, names: list[str] = names) -> Ends:
                drawn = resampled(lambda w: {"": sensitivities(s["finds"], [allowed], w)}, names, RESAMPLES // 2, 0)
                return percentiles((drawn or {})[""])

            name = f"{slides} slides ({positives}), {allowed} false positives a slide: {truth_A[a]:.3f}"
            yield Case(name, float(truth_A[a]), draw, {"percentile bootstrap": by_percentiles, "ours": ours})


def macro_cases() -> Iterator[Case]:
    """Mean AUC of three classes, each against the rest; a class's own score is higher by `apart` SD."""

    def drawn_of(counts: tuple[int, int, int], apart: float) -> Callable[..., Sample]:
        labels_S = np.repeat(np.arange(3), counts)

        def draw(rng: np.random.Generator) -> Sample:
            logits_SC = rng.normal(size=(len(labels_S), 3)) + apart * np.eye(3)[labels_S]
            return {"labels": labels_S, "p": softmax(logits_SC, axis=1)}

        return draw

    def ours(s: Sample) -> Ends:
        return ends(auc_estimate(s["labels"], s["p"], np.arange(len(s["labels"]))))

    for counts, apart in (((12, 20, 28), 1.5), ((12, 20, 28), 3.0), ((40, 40, 50), 2.0)):
        rng, large = np.random.default_rng(0), drawn_of(tuple(500 * n for n in counts), apart)
        truth = float(np.mean([auc_value((s := large(rng))["labels"], s["p"]) for _ in range(20)]))
        yield Case(f"{counts} slides, AUC {truth:.3f}", truth, drawn_of(counts, apart), {"ours": ours})


def task_cases() -> Iterator[Case]:
    """Correlations and errors of regression, kappa of grades: percentiles beside t intervals on a scale."""

    def methods(name: str, scale: str, values: Callable[[Sample, np.ndarray], dict[str, np.ndarray]]) -> Any:
        def drawn_values(s: Sample) -> tuple[float, np.ndarray, int]:
            n = len(s["truths"])
            found = resampled(lambda w: values(s, w), np.arange(n).astype(str).tolist(), RESAMPLES // 2, 0)
            return float(values(s, np.ones((1, n)))[name][0]), (found or {})[name], n

        def by_percentiles(s: Sample) -> Ends:
            return percentiles(drawn_values(s)[1])

        def ours(s: Sample) -> Ends:
            value, values_R, n = drawn_values(s)
            found = scaled_interval(value, values_R, SCALES[scale], n)
            return (np.nan, np.nan) if found.low is None else (found.low, found.high)

        def errors(s: Sample) -> Ends:
            found = error_intervals(s["said"] - s["truths"], np.arange(len(s["truths"])))[name]
            return ends(found)

        return {"percentile bootstrap": by_percentiles, "ours": errors if name in ("mae", "rmse") else ours}

    def regression(n: int, r: float) -> Callable[..., Sample]:
        def draw(rng: np.random.Generator, n: int = n) -> Sample:
            wanted = rng.normal(size=n)
            return {"truths": wanted, "said": r * wanted + (1 - r**2) ** 0.5 * rng.normal(size=n)}

        return draw

    def grades(n: int, apart: float) -> Callable[..., Sample]:
        cuts = np.array([-0.7, 0.0, 0.7])

        def draw(rng: np.random.Generator, n: int = n) -> Sample:
            z = rng.normal(size=n)
            above = expit(2 * (apart * z + rng.normal(size=n))[:, None] - 2 * apart * cuts)
            edges = np.concatenate([np.ones((n, 1)), above, np.zeros((n, 1))], axis=1)
            return {"truths": np.digitize(z, cuts), "said": edges[:, :-1] - edges[:, 1:]}

        return draw

    def of_regression(s: Sample, weights_RS: np.ndarray) -> dict[str, np.ndarray]:
        return regression_metrics(s["truths"], s["said"], weights_RS, None)

    def of_grades(s: Sample, weights_RS: np.ndarray) -> dict[str, np.ndarray]:
        return ordinal_metrics(s["truths"], s["said"], weights_RS)

    def truth_of(draw: Callable[..., Sample], values: Any, name: str) -> float:
        large = draw(np.random.default_rng(0), 50_000)
        return float(values(large, np.ones((1, 50_000)))[name][0])

    scales = {"pearson": "fisher", "spearman": "fisher", "r2": "rest", "mae": "log", "rmse": "log"}
    for n in (30, 100):
        for r in (0.4, 0.9):
            for name, scale in scales.items():
                draw = regression(n, r)
                truth = truth_of(draw, of_regression, name)
                yield Case(f"{name}, {n} patients: {truth:.2f}", truth, draw, methods(name, scale, of_regression))
    for n in (40, 100):
        for apart in (1.0, 3.0):
            draw = grades(n, apart)
            truth = truth_of(draw, of_grades, "kappa")
            yield Case(f"kappa, {n} patients: {truth:.2f}", truth, draw, methods("kappa", "fisher", of_grades))


def task_difference_cases() -> Iterator[Case]:
    """Differences of two predictions of the same patients, whose errors share a half of their variance."""

    def errors(n: int, rng: np.random.Generator) -> np.ndarray:
        return 0.5**0.5 * rng.normal(size=n) + 0.5**0.5 * rng.normal(size=(2, n))

    def numbers(n: int, of: tuple[float, float], rng: np.random.Generator) -> list[pd.DataFrame]:
        wanted, both = rng.normal(size=n), errors(n, rng)
        said = [r * wanted + (1 - r**2) ** 0.5 * own for r, own in zip(of, both, strict=True)]
        return [pd.DataFrame({"patient": range(n), "value": wanted, "prediction": own}) for own in said]

    def grades(n: int, of: tuple[float, float], rng: np.random.Generator) -> list[pd.DataFrame]:
        cuts, wanted, both = np.array([-0.7, 0.0, 0.7]), rng.normal(size=n), errors(n, rng)
        tables = []
        for apart, own in zip(of, both, strict=True):
            above = expit(2 * (apart * wanted + own)[:, None] - 2 * apart * cuts)
            edges = np.concatenate([np.ones((n, 1)), above, np.zeros((n, 1))], axis=1)
            said = pd.DataFrame(edges[:, :-1] - edges[:, 1:], columns=[f"p_{k}" for k in range(4)])
            tables.append(said.assign(patient=range(n), label=np.digitize(wanted, cuts).astype(str)))
        return tables

    def times(n: int, of: tuple[float, float], rng: np.random.Generator) -> list[pd.DataFrame]:
        risk, both = rng.normal(size=n), errors(n, rng)
        time, end = rng.exponential(size=n) * np.exp(-1.5 * risk), rng.exponential(size=n) * 1.5
        told = pd.DataFrame({"patient": range(n), "time": np.minimum(time, end), "event": (time <= end) * 1.0})
        return [told.assign(standing=r * risk + (1 - r**2) ** 0.5 * own) for r, own in zip(of, both, strict=True)]

    kinds = {"regression": numbers, "ordinal": grades, "survival": times}
    for kind, metric, n, of in (
        ("regression", "pearson", 30, (0.6, 0.4)),
        ("regression", "pearson", 30, (0.9, 0.8)),
        ("regression", "r2", 30, (0.6, 0.4)),
        ("regression", "mae", 30, (0.9, 0.8)),
        ("regression", "pearson", 60, (0.9, 0.9)),
        ("regression", "rmse", 60, (0.9, 0.9)),
        ("ordinal", "kappa", 40, (1.0, 1.0)),
        ("ordinal", "kappa", 40, (3.0, 1.5)),
        ("ordinal", "kappa", 100, (2.0, 1.5)),
        ("survival", "c_harrell", 50, (0.9, 0.6)),
        ("survival", "c_harrell", 100, (0.8, 0.8)),
        ("regression", "spearman", 40, (0.7, 0.5)),
        ("regression", "r2", 60, (0.8, 0.8)),
        ("ordinal", "kappa", 60, (2.5, 2.0)),
        ("survival", "c_harrell", 70, (0.9, 0.4)),
    ):
        task = made(kind)

        def both(
            tables: list[pd.DataFrame], weights_RN: np.ndarray, task: Any = task, name: str = metric
        ) -> np.ndarray:
            return np.stack([task.score([Part(own, own)], [weights_RN], [name])[name] for own in tables], axis=1)

        def draw(
            rng: np.random.Generator, n: int = n, make: Any = kinds[kind], of: Any = of, both: Any = both,
            scale: str = task.metrics[metric].scale,
        ) -> Sample:  # fmt: skip
            tables = make(n, of, rng)
            drawn = resampled(lambda w: {"": both(tables, w)}, np.arange(n).astype(str).tolist(), RESAMPLES // 2, 0)
            return {"both": both(tables, np.ones((1, n)))[0], "drawn": (drawn or {})[""], "n": n, "scale": scale}

        rng = np.random.default_rng(0)
        large = [np.subtract(*both(kinds[kind](3000, of, rng), np.ones((1, 3000)))[0]) for _ in range(8)]
        truth, title = float(np.mean(large)) if of[0] != of[1] else 0.0, task.metrics[metric].title
        yield Case(f"{title}, {n} patients: {truth:.3f}", truth, draw, GAP_METHODS)


def percentile_gap(s: Sample) -> Ends:
    return percentiles(s["drawn"][:, 0] - s["drawn"][:, 1])


def gap_by(scale: Scale | None) -> Callable[[Sample], Ends]:
    """`scale`: None: the metric's own."""

    def of(s: Sample) -> Ends:
        found = difference_interval(s["both"].tolist(), s["drawn"], scale or SCALES[s["scale"]], s["n"])
        return (np.nan, np.nan) if found.low is None else (found.low, float(found.high))

    return of


GAP_METHODS: dict[str, Callable[[Sample], Ends]] = {
    "percentile bootstrap": percentile_gap,
    "t interval": gap_by(AS_IT_IS),
    "ours": gap_by(None),
}


def survival_cases() -> Iterator[Case]:
    """What weights by the censoring of the training patients; intervals less their true values: the truth is 0."""
    task = task_of(TaskConfig(name="survival", loss="discrete", horizons=[0.3, 0.6, 1.0]))
    names = {"Uno's C": "c_uno", "AUC at the middle horizon": "auc_1", "integrated Brier score": "brier"}

    def patients(rng: np.random.Generator, n: int, strength: float, follow_up: float) -> pd.DataFrame:
        risk_P = rng.normal(size=n)
        time_P, end_P = rng.exponential(size=n) * np.exp(-strength * risk_P), rng.exponential(size=n) * follow_up
        table = pd.DataFrame({"patient": [f"p{i}" for i in range(n)], "standing": risk_P})
        table["time"], table["event"] = np.minimum(time_P, end_P), (time_P <= end_P) * 1.0
        said = {f"survival_{g}": np.exp(-time * np.exp(strength * risk_P)) for g, time in enumerate(task.grid())}
        return table.assign(**said)

    for n, strength, follow_up in ((60, 0.7, 1.0), (60, 1.5, 3.0), (150, 0.7, 1.0), (150, 1.5, 3.0)):
        rng = np.random.default_rng(0)
        large = [
            plain_metrics(task, [Part(*(patients(rng, 4000, strength, follow_up) for _ in range(2)))]) for _ in range(8)
        ]
        truths = {name: float(np.nanmean(np.array([one[name] for one in large], float))) for name in names.values()}

        def draw(rng: np.random.Generator, n: int = n, of: tuple[float, float] = (strength, follow_up)) -> Sample:
            while True:  # where a patient is followed longer than all training patients, two of them are undefined
                part = Part(patients(rng, n, *of), patients(rng, 2 * n, *of))
                if None not in plain_metrics(task, [part]).values():
                    return metrics_with_intervals(task, [part], 60, 0)

        def less(name: str, truths: dict[str, float] = truths) -> Callable[[Sample], Ends]:
            def of(s: Sample) -> Ends:
                found = s[name]
                return (
                    (np.nan, np.nan)
                    if found["low"] is None
                    else (found["low"] - truths[name], found["high"] - truths[name])
                )

            return of

        said = ", ".join(f"{value:.3f}" for value in truths.values())
        yield Case(
            f"{n} patients, hazard ratio e^{strength}, follow-up {follow_up:g}: {said}", 0.0, draw,
            {title: less(name) for title, name in names.items()},
        )  # fmt: skip


TABLES: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    "auc": ("AUC, one slide a patient: slides (positive)", auc_cases),
    "clusters": ("AUC, 2 to 4 slides a patient", cluster_cases),
    "differences": ("Paired difference of two AUCs", difference_cases),
    "shares": ("Sensitivity, on average over true values near by", share_cases),
    "combined": ("Balanced accuracy and F1, on average over true values near by", combined_cases),
    "calibration": ("Calibration error (ECE)", calibration_cases),
    "sites": ("AUC within sites", site_cases),
    "average_precision": ("Average precision with 2 to 4 slides a patient", average_precision_cases),
    "tiles": ("Accuracy of tiles that come from slides", tile_cases),
    "froc": ("Sensitivity for lesions at some false positives a slide", froc_cases),
    "macro": ("Macro AUC of three classes", macro_cases),
    "tasks": ("Metrics of other tasks, one slide a patient", task_cases),
    "task_differences": ("Paired differences of other tasks, one slide a patient", task_difference_cases),
    "survival": ("Uno's C, AUC at a time, integrated Brier score; one slide a patient, 60 resamples", survival_cases),
    "others": ("Other metrics, one slide a patient", other_cases),
    "training": ("AUC of several trainings, 160 slides: its expectation over trainings", training_cases),
    "c_index": ("C-index", c_index_cases),
}


def held(case: Case, draws: int) -> dict[str, tuple[float, float]]:
    """Of every method: the share of intervals that hold the truth, and their mean width; none counts as a miss."""
    if case.every is not None:
        return held_of_every(case.methods, case.every())
    rng = np.random.default_rng([draws, *case.name.encode()])
    found, truths = {name: np.empty((draws, 2)) for name in case.methods}, np.empty(draws)
    for i in range(draws):
        sample = case.draw(rng)
        truths[i] = sample["truth"] if case.truth is None else case.truth
        for name, method in case.methods.items():
            found[name][i] = method(sample)
    return {
        name: (
            float(np.mean(holds(low_high[:, 0], low_high[:, 1], truths))),
            float(np.nanmean(low_high[:, 1] - low_high[:, 0])),
        )
        for name, low_high in found.items()
    }


def holds(low: Any, high: Any, truths: np.ndarray) -> np.ndarray:
    return (low <= truths + 1e-12) & (truths - 1e-12 <= high)


def held_of_every(
    methods: dict[str, Callable[[Sample], Ends]], every: Iterator[tuple[Sample, np.ndarray, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    total = {name: np.zeros(2) for name in methods}
    for sample, chance_T, true_T in every:
        for name, method in methods.items():
            low, high = method(sample)
            total[name] += (chance_T * holds(low, high, true_T)).sum(), chance_T.sum() * (high - low)
    return {name: (float(share), float(width)) for name, (share, width) in total.items()}


def table(title: str, cases: Iterator[Case], draws: int, rows: str = "", methods: str = "") -> list[str]:
    lines: list[str] = []
    for case in cases:
        if rows not in case.name:
            continue
        case = replace(case, methods={name: of for name, of in case.methods.items() if methods in name})
        found = held(case, draws)
        if not lines:
            lines = [f"## {title}", "", "| | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
        lines.append(
            f"| {case.name} | " + " | ".join(f"{share:.3f} ({width:.3f})" for share, width in found.values()) + " |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--rows", default="", help="only lines whose name holds this")
    parser.add_argument("--methods", default="", help="only those whose name holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = [TABLES[name] for name in options.only.split(",")]
    lines = [
        line for title, cases in chosen for line in table(title, cases(), options.draws, options.rows, options.methods)
    ]
    error = (0.95 * 0.05 / options.draws) ** 0.5
    text = "\n".join(
        [
            "# Share of 95 % intervals that hold the truth (mean width)",
            "",
            *lines,
            f"- {options.draws} samples a line; standard error of a true 0.950: {error:.4f}",
            f"- Bootstrap: {RESAMPLES} resamples",
            f"- Command: `{' '.join(['python benchmarks/coverage.py', *sys.argv[1:]])}`",
            f"- Machine: {machine('numpy', 'scipy')}",
        ]
    )
    publish(text, options.out)


if __name__ == "__main__":
    main()
