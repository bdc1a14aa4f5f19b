"""The ladder of baselines of tasks other than classification, on the study's own folds: what has no attention.

As `mil.training.ladder`: fitted on the slides that are `train` for a round, asked about those that are `test`, with
fixed settings. Means are of a slide's tiles, standardised by the training slides.

- regression: `mean_linear`, ridge (alpha = 100); `mean_knn`, the 15 nearest slides weighted by 1 / distance;
  `tile_linear`, ridge on at most 64 tiles a slide that have its slide's value, a slide is the mean of its 10 highest
  tiles, put on the target's scale by a straight line through the training slides.
- ordinal: the rungs of `mil.training.ladder` with the grades as classes.
- survival: `mean_linear`, Cox's model with a ridge penalty (alpha = 100) on the first 50 principal components;
  `mean_knn`, Kaplan and Meier's curve of the 15 nearest slides: the risk is minus the time without an event that it
  promises up to the last event of the training slides. Of a tile alone no time is known: there is no rung on tiles.

Axes: S slides, T tiles of one slide, N slides of a table, D features, R rounds, C outputs on tiles, K grades.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mil.training.bags import Bags
from mil.training.ladder import NEIGHBOURS, TOP_TILES, drawn_tiles, fitted, new_logistic, new_neighbours, of_tiles
from mil.training.ladder import Cohort as ClassCohort

ALPHA = 100.0
COMPONENTS = 50

Targets = Mapping[str, np.ndarray]
"""`value`; `time` and `event`; or `label` (index of the grade); (S,) each."""
Said = dict[str, np.ndarray]
"""Columns of predictions.csv, as `Task.columns` names them."""
Predict = Callable[[np.ndarray], Said]
"""(N, D) means -> what is said of each."""
Fit = Callable[[np.ndarray, Targets, int], Predict]
"""Means and targets of training slides, and how many grades there are."""


def linear_value(x_ND: np.ndarray, targets: Targets, n_grades: int) -> Predict:
    """Ridge regression."""
    model = make_pipeline(StandardScaler(), Ridge(alpha=ALPHA)).fit(x_ND, targets["value"])
    return lambda asked_ND: {"prediction": model.predict(asked_ND)}


def near_value(x_ND: np.ndarray, targets: Targets, n_grades: int) -> Predict:
    """The mean of the nearest slides."""
    nearest = KNeighborsRegressor(min(NEIGHBOURS, len(x_ND)), weights="distance")
    model = make_pipeline(StandardScaler(), nearest).fit(x_ND, targets["value"])
    return lambda asked_ND: {"prediction": model.predict(asked_ND)}


def linear_grade(x_ND: np.ndarray, targets: Targets, n_grades: int) -> Predict:
    """Multinomial logistic regression."""
    predict = fitted(new_logistic, x_ND, targets["label"], n_grades)
    return lambda asked_ND: of_grades(predict(asked_ND))


def near_grade(x_ND: np.ndarray, targets: Targets, n_grades: int) -> Predict:
    """Shares of the nearest slides."""
    predict = fitted(new_neighbours, x_ND, targets["label"], n_grades)
    return lambda asked_ND: of_grades(predict(asked_ND))


def of_grades(p_NK: np.ndarray) -> Said:
    return {f"p_{k}": p_NK[:, k] for k in range(p_NK.shape[1])}


def linear_risk(x_ND: np.ndarray, targets: Targets, n_grades: int) -> Predict:
    """Cox's model; its partial likelihood counts slides as they are."""
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv

    reduced = make_pipeline(StandardScaler(), PCA(min(COMPONENTS, len(x_ND) - 1, x_ND.shape[1]), svd_solver="full"))
    x_NP, truth = reduced.fit_transform(x_ND), Surv.from_arrays(targets["event"] == 1, targets["time"])
    model = CoxPHSurvivalAnalysis(alpha=ALPHA, ties="efron").fit(x_NP, truth)
    return standing(lambda asked_ND: np.asarray(model.predict(reduced.transform(asked_ND)), dtype=np.float64), x_ND)


def near_risk(x_ND: np.ndarray, targets: Targets, n_grades: int) -> Predict:
    """Minus the area below the curve of the nearest slides."""
    scaler = StandardScaler().fit(x_ND)
    model = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(x_ND))).fit(scaler.transform(x_ND))
    event_N, time_N = targets["event"] == 1, np.asarray(targets["time"], dtype=np.float64)
    last = float(time_N[event_N].max())

    def risk(asked_ND: np.ndarray) -> np.ndarray:
        rows_NK = model.kneighbors(scaler.transform(asked_ND), return_distance=False)
        return np.array([-time_without_event(event_N[rows_K], time_N[rows_K], last) for rows_K in rows_NK])

    return standing(risk, x_ND)


def time_without_event(event_K: np.ndarray, time_K: np.ndarray, last: float) -> float:
    """Area below Kaplan and Meier's curve up to `last`."""
    from sksurv.nonparametric import kaplan_meier_estimator

    if not event_K.any():
        return last
    times, share = kaplan_meier_estimator(event_K, time_K)
    ends = np.clip(np.r_[0.0, times, last], None, last)
    return float((np.diff(ends) * np.r_[1.0, share]).sum())


def standing(risk: Callable[[np.ndarray], np.ndarray], x_ND: np.ndarray) -> Predict:
    """Risk and standing: less the training slides' median, in their standard deviations (`mil.tasks.survival`)."""
    own_N = risk(x_ND)
    middle, spread = float(np.median(own_N)), float(own_N.std())

    def predict(asked_ND: np.ndarray) -> Said:
        risk_N = risk(asked_ND)
        return {"risk": risk_N, "standing": (risk_N - middle) / (spread if spread > 0 else 1.0)}

    return predict


ON_MEANS: dict[str, dict[str, tuple[str, Fit]]] = {
    "regression": {
        "mean_linear": ("mean of the tiles + ridge regression", linear_value),
        "mean_knn": (f"mean of the tiles + {NEIGHBOURS} nearest neighbours", near_value),
    },
    "ordinal": {
        "mean_linear": ("mean of the tiles + multinomial logistic regression", linear_grade),
        "mean_knn": (f"mean of the tiles + {NEIGHBOURS} nearest neighbours", near_grade),
    },
    "survival": {
        "mean_linear": ("mean of the tiles + Cox's model with a ridge penalty", linear_risk),
        "mean_knn": (f"mean of the tiles + Kaplan-Meier of the {NEIGHBOURS} nearest neighbours", near_risk),
    },
}
"""Task -> rung -> title, and what fits it to means."""
ON_TILES = {
    "regression": f"ridge regression on tiles (mean of the top {TOP_TILES})",
    "ordinal": f"logistic regression on tiles (mean of the top {TOP_TILES})",
}
"""Task -> title of its rung on tiles."""
TILE_RUNG = "tile_linear"


def titles_of(task: str) -> dict[str, str]:
    """Rung -> title, from the simplest."""
    titles = {name: title for name, (title, _) in ON_MEANS[task].items()}
    return titles | ({TILE_RUNG: ON_TILES[task]} if task in ON_TILES else {})


@dataclass(frozen=True)
class TaskLadder:
    """The rungs of a study. weights_RCD, bias_RC: of the rung on tiles, C = 0 where the task has none.

    targets: of all slides of the study; those of no label train for nobody. round_M: the round of every member.
    """

    task: str
    n_grades: int
    means_SD: np.ndarray
    targets: Targets
    train_RS: np.ndarray
    weights_RCD: np.ndarray
    bias_RC: np.ndarray
    round_M: np.ndarray
    tiles_per_slide: int

    @cached_property
    def on_means(self) -> dict[str, list[Predict]]:
        """Rung -> what every round predicts."""
        rows = [np.flatnonzero(train_S) for train_S in self.train_RS]
        return {
            name: [fit(self.means_SD[own], {k: v[own] for k, v in self.targets.items()}, self.n_grades) for own in rows]
            for name, (_, fit) in ON_MEANS[self.task].items()
        }

    def of_tiles(self, tiles_TD: np.ndarray) -> np.ndarray:
        """What the rung on tiles says of one slide in every round, (R, C)."""
        return said_of_tiles(self.task, tiles_TD, self.weights_RCD, self.bias_RC, np.arange(len(self.bias_RC)))

    def said(self, means_ND: np.ndarray, of_tiles_NRC: np.ndarray) -> dict[str, list[Said]]:
        """Rung -> what every round says of these slides."""
        found = {name: [predict(means_ND) for predict in rounds] for name, rounds in self.on_means.items()}
        if self.task in ON_TILES:
            found[TILE_RUNG] = [named(self.task, of_tiles_NRC[:, r]) for r in range(len(self.bias_RC))]
        return found


def named(task: str, said_NC: np.ndarray) -> Said:
    """What the rung on tiles says, as columns."""
    return {"prediction": said_NC[:, 0]} if task == "regression" else of_grades(said_NC)


def said_of_tiles(
    task: str, tiles_TD: np.ndarray, weights_RCD: np.ndarray, bias_RC: np.ndarray, asked_R: np.ndarray
) -> np.ndarray:
    """What the rounds `asked_R` (rows) say of one slide, (len(asked_R), C)."""
    if task == "ordinal":
        return of_tiles(tiles_TD, weights_RCD, bias_RC, asked_R)
    if task == "survival":
        return np.zeros((len(asked_R), 0))
    said_TR = tiles_TD.astype(np.float32, copy=False) @ weights_RCD[asked_R, 0].T.astype(np.float32)
    said_RC: np.ndarray = (top_mean(said_TR) + bias_RC[asked_R, 0])[:, None]
    return said_RC


def top_mean(values_TR: np.ndarray) -> np.ndarray:
    """(R,): the mean of the 10 highest of every column, of all where there are fewer."""
    k = min(TOP_TILES, len(values_TR))
    highest_R: np.ndarray = np.partition(values_TR, len(values_TR) - k, axis=0)[-k:].mean(axis=0, dtype=np.float64)
    return highest_R


def fit_task_ladder(
    task: str, bags: Bags, targets: Targets, n_grades: int, train_RS: np.ndarray, round_M: np.ndarray, seed: int
) -> TaskLadder:
    """The ladder of a study.

    Args:
        train_RS: labelled training slides of every round. seed: of the tiles that are drawn.
    """
    labels_S = np.where(train_RS.any(axis=0), targets.get("label", np.zeros(len(bags), dtype=np.int64)), -1)
    cohort = ClassCohort(bags, labels_S, max(n_grades, 2), train_RS, np.zeros_like(train_RS), seed)
    nothing = np.zeros((len(train_RS), 0, bags.dim)), np.zeros((len(train_RS), 0))
    weights: tuple[np.ndarray, np.ndarray] = nothing
    if task == "ordinal":
        weights = cohort.tile_weights
    elif task == "regression":
        weights = value_weights(cohort, targets["value"])
    kept = {name: np.asarray(values) for name, values in targets.items()}
    return TaskLadder(task, n_grades, bags.means_SD, kept, train_RS, *weights, round_M, cohort.tiles_per_slide)


def value_weights(cohort: ClassCohort, value_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the ridge on tiles (R, 1, D) and (R, 1), with the straight line through the training slides taken in.

    Where that line falls, tiles say nothing of the target: the round says the mean of its training slides.
    """
    tiles_ND, slide_N = drawn_tiles(cohort)
    shape = (len(cohort.train_RS), 1, cohort.bags.dim)
    weights_RCD, bias_RC = np.zeros(shape), np.zeros(shape[:2])
    for r, train_S in enumerate(cohort.train_RS):
        own_N = train_S[slide_N]
        scaler, model = StandardScaler(), Ridge(alpha=ALPHA, solver="cholesky")
        model.fit(scaler.fit_transform(tiles_ND[own_N]), (value_S[slide_N[own_N]]).astype(np.float32))
        weights_RCD[r, 0] = model.coef_.ravel() / scaler.scale_
    for r, (slope, intercept) in enumerate(lines_through(cohort, weights_RCD[:, 0], value_S)):
        weights_RCD[r], bias_RC[r, 0] = weights_RCD[r] * slope, intercept
    return weights_RCD, bias_RC


def lines_through(cohort: ClassCohort, weights_RD: np.ndarray, value_S: np.ndarray) -> list[tuple[float, float]]:
    """Slope and intercept of every round: of its training slides' values on the means of their top tiles."""
    top_RS = np.full(cohort.train_RS.shape, np.nan)
    for s in np.flatnonzero(cohort.train_RS.any(axis=0)):
        tiles_TD = cohort.bags.features(int(s)).numpy().astype(np.float32, copy=False)
        top_RS[:, s] = top_mean(tiles_TD @ weights_RD.T.astype(np.float32))
    lines = []
    for top_S, train_S in zip(top_RS, cohort.train_RS, strict=True):
        spread = float(top_S[train_S].var())
        slope = float(np.cov(top_S[train_S], value_S[train_S], ddof=0)[0, 1]) / spread if spread > 0 else 0.0
        slope = max(slope, 0.0)
        lines.append((slope, float(value_S[train_S].mean() - slope * top_S[train_S].mean())))
    return lines
