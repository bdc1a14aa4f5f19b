"""A ladder of baselines on the study's own folds: what has no attention, fitted with scikit-learn.

Every rung is fitted on the slides that are `train` for a round (a repeat's fold) and scores those that are `test` for
it, as the members of that round do; `val` is used for nothing. The settings are fixed, so there is nothing to choose:

- mean_logistic: the mean of a slide's tiles, standardised; logistic regression (L2, C = 0.01).
- mean_knn: the same mean, standardised; the 15 nearest slides (Euclidean), weighted by 1 / distance.
- tile_logistic: every tile has its slide's label (Ray and Craven 2005 call it the naive multiple-instance learner);
  standardised; logistic regression (L2, C = 0.01) on at most 64 tiles a slide and 100,000 in all, drawn by the study's
  seed. A slide's probability is the mean of its 10 highest tile probabilities, of all its tiles; with several classes
  class by class, divided by their sum.

Standardising is by the training slides of the round; a feature that is constant there stays constant. Features are read
slide by slide, twice, so those that are memory-mapped are streamed.

Axes: S slides, T tiles of one slide, N tiles that are drawn, D features, R rounds, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mil.training.bags import Bags

C, MAX_ITERATIONS = 0.01, 500
NEIGHBOURS = 15
TOP_TILES = 10
TILES_PER_SLIDE, TILES_IN_ALL = 64, 100_000

Classifier = Callable[[int], LogisticRegression | KNeighborsClassifier]
"""How many slides it will be fitted on -> a classifier, not fitted."""


@dataclass(frozen=True)
class Cohort:
    """What every rung gets: features, class indices (-1 = unlabelled), and what each slide is in every round.

    seed: of the tiles that are drawn; 0 is a seed.
    """

    bags: Bags
    labels_S: np.ndarray
    n_classes: int
    train_RS: np.ndarray
    test_RS: np.ndarray
    seed: int = 0

    def rounds(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(round, its labelled training slides, its test slides), as rows of the cohort."""
        for r, (train_S, test_S) in enumerate(zip(self.train_RS, self.test_RS, strict=True)):
            yield r, np.flatnonzero(train_S & (self.labels_S >= 0)), np.flatnonzero(test_S)

    @property
    def tiles_per_slide(self) -> int:
        """How many tiles `tile_logistic` is fitted on, at most, of each slide."""
        return max(1, min(TILES_PER_SLIDE, TILES_IN_ALL // len(self.bags)))

    @cached_property
    def tile_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Of `tile_logistic`, of every round: (R, C, D) and (R, C)."""
        return _tile_weights(self, *drawn_tiles(self))


def mean_logistic(cohort: Cohort) -> np.ndarray:
    """(R, S, C) probabilities, NaN where a slide is not test."""
    return _on_means(cohort, new_logistic)


def mean_knn(cohort: Cohort) -> np.ndarray:
    """(R, S, C) probabilities, NaN where a slide is not test; of fewer than 15 training slides all are neighbours."""
    return _on_means(cohort, new_neighbours)


def tile_logistic(cohort: Cohort) -> np.ndarray:
    """(R, S, C) probabilities, NaN where a slide is not test."""
    p_RSC = _nowhere(cohort)
    for s in np.flatnonzero(cohort.test_RS.any(axis=0)):
        asked_R = np.flatnonzero(cohort.test_RS[:, s])
        p_RSC[asked_R, s] = of_tiles(cohort.bags.features(int(s)).numpy(), *cohort.tile_weights, asked_R)
    return p_RSC


RUNGS: dict[str, tuple[str, Callable[[Cohort], np.ndarray]]] = {
    "mean_logistic": ("mean of the tiles + logistic regression", mean_logistic),
    "mean_knn": (f"mean of the tiles + {NEIGHBOURS} nearest neighbours", mean_knn),
    "tile_logistic": (f"logistic regression on tiles (mean of the top {TOP_TILES})", tile_logistic),
}
"""Name -> title, and what gives its probabilities."""


# --- on means --------------------------------------------------------------------------------------------------------


def _on_means(cohort: Cohort, classifier: Classifier) -> np.ndarray:
    p_RSC = _nowhere(cohort)
    for r, train, test in cohort.rounds():
        if len(test):
            means_SD, labels_S = cohort.bags.means_SD, cohort.labels_S
            predict = fitted(classifier, means_SD[train], labels_S[train], cohort.n_classes)
            p_RSC[r, test] = predict(means_SD[test])
    return p_RSC


def fitted(
    classifier: Classifier, x_ND: np.ndarray, labels_N: np.ndarray, n_classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """The fitted model's probabilities of all classes; those that it was not shown have 0."""
    classes = np.unique(labels_N)
    model = make_pipeline(StandardScaler(), classifier(len(x_ND)))

    def predict(x_ND: np.ndarray) -> np.ndarray:
        p_NC = np.zeros((len(x_ND), n_classes))
        p_NC[:, classes] = 1.0 if len(classes) == 1 else model.predict_proba(x_ND)
        return p_NC

    if len(classes) > 1:
        with _without_convergence():
            model.fit(x_ND, labels_N)
    return predict


def new_logistic(n_train: int = 0) -> LogisticRegression:
    return LogisticRegression(C=C, max_iter=MAX_ITERATIONS)


def new_neighbours(n_train: int) -> KNeighborsClassifier:
    return KNeighborsClassifier(min(NEIGHBOURS, n_train), weights="distance")


# --- on tiles --------------------------------------------------------------------------------------------------------


def drawn_tiles(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (N, D), float32, of the slides that any round trains on, and the slide (row of the cohort) of each."""
    used = np.flatnonzero(cohort.train_RS.any(axis=0) & (cohort.labels_S >= 0))
    rows = [_draw(int(cohort.bags.lengths_S[s]), cohort.tiles_per_slide, [cohort.seed, int(s)]) for s in used]
    tiles_ND = np.empty((sum(map(len, rows)), cohort.bags.dim), dtype=np.float32)
    ends = np.cumsum([len(own) for own in rows])
    for s, own, end in zip(used, rows, ends, strict=True):
        tiles_ND[end - len(own) : end] = cohort.bags.features(int(s))[torch.from_numpy(own)].numpy()
    return tiles_ND, np.repeat(used, [len(own) for own in rows])


def _draw(n_tiles: int, at_most: int, seed: list[int]) -> np.ndarray:
    if n_tiles <= at_most:
        return np.arange(n_tiles)
    return np.sort(np.random.default_rng(seed).choice(n_tiles, at_most, replace=False))


def _tile_weights(cohort: Cohort, tiles_ND: np.ndarray, slide_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every round (R, C, D) and (R, C): logits of raw tiles, standardising taken into the weights.

    Of two classes the first has logit 0; a class that a round was not shown has -inf.
    """
    shape = (len(cohort.train_RS), cohort.n_classes, cohort.bags.dim)
    weights_RCD, bias_RC = np.zeros(shape), np.full(shape[:2], -np.inf)
    label_N = cohort.labels_S[slide_N]
    for r, train, _ in cohort.rounds():
        own_N = np.isin(slide_N, train)
        classes = np.unique(label_N[own_N])
        if len(classes) < 2:
            bias_RC[r, classes] = 0.0
            continue
        scaler, model = StandardScaler(), new_logistic()
        with _without_convergence():
            model.fit(scaler.fit_transform(tiles_ND[own_N]), label_N[own_N])
        two = len(classes) == 2
        coefficients_KD = np.concatenate([np.zeros_like(model.coef_), model.coef_]) if two else model.coef_
        intercept_K = np.concatenate([np.zeros(1), model.intercept_]) if two else model.intercept_
        weights_KD = coefficients_KD / scaler.scale_
        weights_RCD[r, classes] = weights_KD
        bias_RC[r, classes] = intercept_K - weights_KD @ scaler.mean_
    return weights_RCD, bias_RC


def of_tiles(tiles_TD: np.ndarray, weights_RCD: np.ndarray, bias_RC: np.ndarray, asked_R: np.ndarray) -> np.ndarray:
    """What the rounds `asked_R` (rows) say of one slide, (len(asked_R), C)."""
    weights_DK = weights_RCD.reshape(-1, tiles_TD.shape[1]).T.astype(np.float32)
    logits_TRC = (tiles_TD.astype(np.float32, copy=False) @ weights_DK).reshape(len(tiles_TD), *bias_RC.shape)
    return np.stack([_of_top_tiles(_probabilities(logits_TRC[:, r].astype(np.float64) + bias_RC[r])) for r in asked_R])


def _probabilities(logits_TC: np.ndarray) -> np.ndarray:
    if logits_TC.shape[1] == 2 and np.isfinite(logits_TC).all():
        p_T = expit(logits_TC[:, 1] - logits_TC[:, 0])
        return np.stack([1 - p_T, p_T], axis=1)
    return np.asarray(softmax(logits_TC, axis=1))


def _of_top_tiles(p_TC: np.ndarray) -> np.ndarray:
    """(C,) of the slide: of two classes the positive one is looked for, the other is what is left."""
    k = min(TOP_TILES, len(p_TC))
    top_C: np.ndarray = np.partition(p_TC, len(p_TC) - k, axis=0)[-k:].mean(axis=0)
    if len(top_C) == 2:
        return np.array([1 - top_C[1], top_C[1]])
    share_C: np.ndarray = top_C / top_C.sum()
    return share_C


# --- both ------------------------------------------------------------------------------------------------------------


def _nowhere(cohort: Cohort) -> np.ndarray:
    return np.full((*cohort.test_RS.shape, cohort.n_classes), np.nan)


@contextmanager
def _without_convergence() -> Iterator[None]:
    """A baseline that stopped after MAX_ITERATIONS is one all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
