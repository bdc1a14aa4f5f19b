"""Average precision under the binormal model (`mil.tasks.binormal`): its true value, a sample's mean and variance.

Axes: L true AUCs looked at, B scores that equally many positives lie between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

BINS = 300


@dataclass(frozen=True)
class Precision:
    """Of a sample with so many positives and negatives, as a function of the true AUC.

    of_positives: their share of the variance of a difference, as for `mil.tasks.binormal.binormal`.
    """

    positives: int
    negatives: int
    of_positives: float

    def of(self, auc: np.ndarray) -> np.ndarray:
        """The true average precision, at the sample's share of positives."""
        above, false = self._ranked_above(auc)
        found = self.positives * above
        value: np.ndarray = (found / (found + false)).mean(axis=1)
        return value

    def expected(self, auc: np.ndarray) -> np.ndarray:
        """What a sample shows on average: more than the truth, as each positive counts itself among those found.

        To the second order in how many positives and negatives lie above a score, which are binomial.
        """
        above, false = self._ranked_above(auc)
        found = 1 + (self.positives - 1) * above
        of_found, of_false = (self.positives - 1) * above * (1 - above), false * (1 - false / self.negatives)
        bend = (found * of_false - false * of_found) / (found + false) ** 3
        value: np.ndarray = (found / (found + false) + bend).mean(axis=1)
        return value

    def variance(self, auc: np.ndarray) -> np.ndarray:
        """Of a sample's, from what one slide more changes (its influence), slides taken as independent."""
        above, false = self._ranked_above(auc)
        found = 1 + (self.positives - 1) * above
        precision = found / (found + false)
        gain, loss = (_at_and_below(part / (found + false) ** 2) for part in (false, found))
        of_positive = precision + self.positives * gain
        share = np.diff(self._negatives_above(auc, np.linspace(0, 1, BINS + 1)), axis=1)
        of_negative = (share * loss**2).sum(axis=1) - (share * loss).sum(axis=1) ** 2
        total: np.ndarray = of_positive.var(axis=1) / self.positives + self.negatives * of_negative
        return total

    def _ranked_above(self, auc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Share of the positives, and number of the negatives, above each score. (1, B), (L, B)"""
        above = (np.arange(BINS) + 0.5) / BINS
        return above[None], self.negatives * self._negatives_above(auc, above)

    def _negatives_above(self, auc: np.ndarray, above: np.ndarray) -> np.ndarray:
        """Share of the negatives above the score that this share of the positives is above. (L, B)"""
        h = ndtri(np.clip(np.atleast_1d(auc), 1e-12, 1 - 1e-12))[:, None]
        score = h - self.of_positives**0.5 * ndtri(above)
        share: np.ndarray = ndtr(-score / (1 - self.of_positives) ** 0.5)
        return share


def _at_and_below(part: np.ndarray) -> np.ndarray:
    """For each score, the mean over all positives of `part` where it counts: at scores that are not higher. (L, B)"""
    mean: np.ndarray = np.cumsum(part[:, ::-1], axis=1)[:, ::-1] / part.shape[1]
    return mean
