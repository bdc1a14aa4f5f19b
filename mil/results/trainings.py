"""The chance in training: whole trainings (one repeat with one seed) drawn again, as patients are.

Two runs of one aggregator that differ in the seed alone differ in AUC, and drawing patients anew does not show by how
much. With several trainings a run they are drawn as well.

Axes: U trainings, S slides, C outputs (1 for two classes) or classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mil.results.intervals import Interval, interval_of
from mil.results.tables import logit_columns, to_probabilities


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


def difference_with_training(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    a: Trainings,
    b: Trainings,
    patients_S: Sequence[str],
    resamples: int,
    seed: int,
) -> Interval:
    """95 % percentile interval of score(a) - score(b); patients are drawn with replacement, and trainings.

    Of K trainings K - 1 are drawn, which makes the variance between them unbiased (Rao and Wu, JASA 1988). Runs with
    the same repeats and seeds share their draws, as they share their patients: what a seed does to both cancels.

    Args:
        score: (p_SC, weights_RS) -> values_R.
    """
    _, patient_S = np.unique(np.asarray(patients_S, dtype=str), return_inverse=True)
    n_patients, rng = int(patient_S.max()) + 1, np.random.default_rng(seed)
    if n_patients < 2 or resamples == 0:
        return Interval(None, None, 0, 0)
    values_R = np.empty(resamples)
    for r in range(resamples):
        weights_1S = rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients))[None, patient_S].astype(float)
        of_a_U = drawn(len(a), rng)
        of_b_U = of_a_U if a.keys == b.keys else drawn(len(b), rng)
        p_a_SC, p_b_SC = a.probabilities(of_a_U), b.probabilities(of_b_U)
        complete = np.isfinite(p_a_SC).all() and np.isfinite(p_b_SC).all()
        values_R[r] = (score(p_a_SC, weights_1S) - score(p_b_SC, weights_1S))[0] if complete else np.nan
    return interval_of(values_R)


def drawn(n: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `n` trainings is drawn, in n - 1 draws; a single one always."""
    return rng.multinomial(max(n - 1, 1), np.full(n, 1 / n)).astype(np.float64)
