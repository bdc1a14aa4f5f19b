"""The chance in training: how much an AUC changes when whole trainings (one repeat with one seed) are done again.

Two runs of one aggregator that differ in the seed alone differ in AUC, and other patients do not show by how much. With
`FEWEST` trainings a run or more their variance is added: two say next to nothing of it.

Axes: U trainings, S slides, C outputs (1 for two classes) or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from extract.shares import Z
from mil.results.tables import logit_columns, to_probabilities
from mil.tasks.estimates import Estimate, auc_interval, mean_of, student_quantile, undefined
from mil.tasks.metrics import METRICS, against_the_rest
from mil.tasks.paired import auc_difference_interval

FEWEST = 3
"""Trainings that an interval needs which holds training again. In simulations (`benchmarks/coverage.py`) those of three
hold the truth in 95 %, of four and more in 96 to 97 %, of two in as little as 91 %."""


@dataclass(frozen=True)
class Trainings:
    """What each training says of every slide: the sum of its members' logits, and how many members that are.

    keys: (repeat, seed) of each.
    """

    keys: tuple[tuple[int, int], ...]
    sums_USC: np.ndarray
    counts_US: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def probabilities(self, weights_U: np.ndarray) -> np.ndarray:
        """(S, C) of the ensemble in which each training counts so often; NaN where none of them has the slide."""
        members_S1 = (weights_U @ self.counts_US)[:, None]
        sums_SC = np.tensordot(weights_U, self.sums_USC, axes=1)
        logits_SC = np.divide(sums_SC, members_S1, out=np.full(sums_SC.shape, np.nan), where=members_S1 > 0)
        return to_probabilities(logits_SC)


def trainings_of(rows: pd.DataFrame, slides: Sequence[str], classes: Sequence[str]) -> Trainings:
    """The trainings in these rows of predictions.csv, for these slides in this order."""
    logits = logit_columns(classes)
    place_of = {slide: i for i, slide in enumerate(slides)}
    rows = rows[rows["slide"].isin(place_of)]
    pairs = rows[["repeat", "seed"]].drop_duplicates().to_numpy(dtype=np.int64).tolist()
    keys = sorted((repeat, seed) for repeat, seed in pairs)
    training_N = rows.groupby(["repeat", "seed"], sort=True).ngroup().to_numpy(dtype=np.int64)
    where = (training_N, rows["slide"].map(place_of).to_numpy(dtype=np.int64))
    sums_USC, counts_US = np.zeros((len(keys), len(slides), len(logits))), np.zeros((len(keys), len(slides)))
    np.add.at(sums_USC, where, rows[logits].to_numpy(dtype=np.float64))
    np.add.at(counts_US, where, 1)
    return Trainings(tuple(keys), sums_USC, counts_US)


def auc_estimate(labels_S: np.ndarray, p_SC: np.ndarray, patients_S: Sequence[str] | np.ndarray) -> Estimate:
    """AUC of the positive class; of several classes the mean of each against the rest."""
    n_classes = p_SC.shape[1]
    parts = [auc_interval(labels_S == c, p_SC[:, c], patients_S) for c in against_the_rest(n_classes)]
    return parts[0] if n_classes == 2 else mean_of(parts, patients_S)


def auc_difference(
    labels_S: np.ndarray, a_SC: np.ndarray, b_SC: np.ndarray, patients_S: Sequence[str] | np.ndarray
) -> Estimate:
    """`auc_estimate` of a less that of b, with its paired interval; of several classes the mean of the differences."""
    n_classes = a_SC.shape[1]
    parts = [
        auc_difference_interval(labels_S == c, a_SC[:, c], b_SC[:, c], patients_S) for c in against_the_rest(n_classes)
    ]
    return parts[0] if n_classes == 2 else mean_of(parts, patients_S)


def auc_with_training(labels_S: np.ndarray, trained: Trainings, patients_S: Sequence[str] | np.ndarray) -> Estimate:
    """AUC of the ensemble of these trainings; its interval holds other patients and training again.

    It is the AUC that such ensembles have on average, over other seeds, initialisations and (with repeats) partitions
    of the same patients. To the variance over patients comes that between trainings, by leaving out each in turn.
    """
    p_SC = trained.probabilities(np.ones(len(trained)))
    if not np.isfinite(p_SC).all() or not len(labels_S):
        return undefined(len(labels_S))
    found = auc_estimate(labels_S, p_SC, patients_S)
    spread = between_trainings(trained, lambda p: auc_value(labels_S, p))
    return widened(found, [spread] if spread is not None else [])


def auc_value(labels_S: np.ndarray, p_SC: np.ndarray) -> float:
    """AUC as `auc_estimate` gives it, without its interval; NaN where undefined."""
    one = np.ones((1, len(labels_S)))
    classes = against_the_rest(p_SC.shape[1])
    each = [METRICS["auc"].weighted(labels_S == c, p_SC[:, c], labels_S == c, one)[0] for c in classes]
    return float(np.mean(each))


def between_trainings(
    trained: Trainings, value: Callable[[np.ndarray], float], other: Trainings | None = None
) -> tuple[float, int] | None:
    """Variance of an ensemble's value over trainings, and its degrees of freedom: the jackknife (Tukey 1958).

    other: of which each training is left out at the same time; `value` then gets both ensembles' probabilities as
    (2, S, C). None with fewer than `FEWEST` trainings, or where a slide has no other.
    """
    n = len(trained)
    if n < FEWEST:
        return None
    values_U = np.empty(n)
    for u in range(n):
        weights_U = (np.arange(n) != u).astype(np.float64)
        p = trained.probabilities(weights_U)
        if other is not None:
            p = np.stack([p, other.probabilities(weights_U)])
        values_U[u] = value(p) if np.isfinite(p).all() else np.nan
    if np.isnan(values_U).any():
        return None
    return float((n - 1) * values_U.var()), n - 1


def widened(
    found: Estimate, spreads: Sequence[tuple[float, int]], bounds: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """The interval with further variances, each with its degrees of freedom; none where none is known.

    Both limits move away by the root of all variance over that of the patients, and by a quantile over the normal one:
    the mean of Satterthwaite's (Biometrics Bulletin 1946), Student's at the degrees of freedom of the sum, which is
    short where these are few, and Cochran's (Biometrics 1964), the quantiles of the parts weighted by their variances,
    which is long.
    """
    if found.value is None or found.low is None or found.high is None or not spreads:
        return Estimate(found.value, None, None, None, found.influence_S, found.patients)
    patients = ((found.high - found.low) / (2 * Z)) ** 2
    total = patients + sum(variance for variance, _ in spreads)
    quantile = (satterthwaite(total, spreads) + cochran(patients, spreads)) / 2
    more = (total / patients) ** 0.5 * quantile / Z
    low, high = (found.value + more * (limit - found.value) for limit in (found.low, found.high))
    return Estimate(
        found.value, max(low, bounds[0]), min(high, bounds[1]), "trainings", found.influence_S, found.patients
    )


def satterthwaite(total: float, spreads: Sequence[tuple[float, int]]) -> float:
    uncertain = sum(variance**2 / degrees for variance, degrees in spreads)
    return Z if uncertain < 1e-12 * total**2 else student_quantile(max(total**2 / uncertain, 1.0))


def cochran(known: float, spreads: Sequence[tuple[float, int]]) -> float:
    weighted = Z * known + sum(variance * student_quantile(degrees) for variance, degrees in spreads)
    return weighted / (known + sum(variance for variance, _ in spreads))


def difference_with_training(
    labels_S: np.ndarray, a: Trainings, b: Trainings, patients_S: Sequence[str] | np.ndarray
) -> Estimate:
    """AUC of ensemble a - that of ensemble b on the same slides, with an interval that holds training again.

    Runs with the same repeats and seeds are left out one training at a time in both: what a seed does to both cancels.
    """
    p_a_SC, p_b_SC = (run.probabilities(np.ones(len(run))) for run in (a, b))
    found = auc_difference(labels_S, p_a_SC, p_b_SC, patients_S)

    def gap(p_2SC: np.ndarray) -> float:
        return auc_value(labels_S, p_2SC[0]) - auc_value(labels_S, p_2SC[1])

    if a.keys == b.keys:
        spreads = [between_trainings(a, gap, b)]
    else:
        spreads = [between_trainings(run, lambda p: auc_value(labels_S, p)) for run in (a, b)]
    known = [spread for spread in spreads if spread is not None]
    return widened(found, known if len(known) == len(spreads) else [], (-1.0, 1.0))
