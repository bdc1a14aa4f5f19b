"""Calibrated probabilities: temperature scaling (Guo et al. 2017) or isotonic regression (Zadrozny and Elkan 2002).

What a map is fitted on stands in `mil.results.crossfit`: with val slides each member has a map of its own, and its
calibrated logits are averaged as the plain ones are; else one map calibrates the mean. Calibrated probabilities stand
beside the plain ones (`calibrated_0`, ... in slides.csv), which keep every figure that they had: AUC, thresholds,
predicted classes. Val slides may have selected the epoch, which makes their predictions a little too good.

Axes: S slides, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.isotonic import IsotonicRegression

from mil.results.crossfit import (
    Source,
    fit_table,
    fit_without_own,
    no_thresholds,
    out_of_fold,
    probabilities_of,
    source_of,
    val_slides,
    with_probabilities,
)
from mil.results.tables import held_out, mean_of_logits
from mil.tasks.metrics import against_the_rest

Method = Literal["none", "temperature", "isotonic"]
LOG_BOUND = 10.0
"""Temperatures from e^-10 to e^10, as scikit-learn searches."""


class Saved(BaseModel):
    """What is written as JSON and read back: nothing else in it, and no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Knots(Saved):
    """A rising step-and-line function: straight between the points, level beyond them."""

    x: list[float] = Field(min_length=1)
    y: list[float] = Field(min_length=1)


class Map(Saved):
    """From probabilities to calibrated ones. `why`: the reason where nothing could be fitted, and nothing is changed.

    member: whose it is; None: of the mean of all. slides: how many it was fitted on. temperature, knots (a class each,
    for two classes of the last one alone): as the method has it.
    """

    member: int | None = None
    slides: int = Field(0, ge=0)
    temperature: float | None = Field(None, gt=0)
    knots: list[Knots] | None = None
    why: str = ""

    def __call__(self, p_SC: np.ndarray) -> np.ndarray:
        """(S, C); rows that are not numbers stay so."""
        if self.temperature is not None:
            return scaled(p_SC, self.temperature)
        return through(self.knots, p_SC) if self.knots else p_SC


class Calibration(Saved):
    """What a study does to the probabilities of new slides: one map of the mean, or one a member before the mean."""

    method: Method
    fitted_on: Source
    maps: list[Map]


# --- maps ------------------------------------------------------------------------------------------------------------


def scaled(p_SC: np.ndarray, temperature: float) -> np.ndarray:
    """The softmax of the logits divided by the temperature."""
    log_SC = np.log(np.clip(p_SC, np.finfo(np.float64).tiny, None))
    p_scaled_SC: np.ndarray = softmax(log_SC / temperature, axis=1) if len(p_SC) else p_SC
    return p_scaled_SC


def through(knots: Sequence[Knots], p_SC: np.ndarray) -> np.ndarray:
    """Each class through its own function; of several classes the values are divided by their sum."""
    if len(knots) == 1:
        p_S = np.interp(p_SC[:, 1], knots[0].x, knots[0].y)
        return np.stack([1 - p_S, p_S], axis=1)
    each_SC: np.ndarray = np.stack([np.interp(p_SC[:, c], own.x, own.y) for c, own in enumerate(knots)], axis=1)
    calibrated_SC: np.ndarray = each_SC / each_SC.sum(axis=1, keepdims=True)
    return calibrated_SC


def fit_map(method: Method, table: pd.DataFrame, classes: Sequence[str], member: int | None = None) -> Map:
    """The map of one method, fitted on a table of labelled slides."""
    label_S, p_SC = table["label"].to_numpy(dtype=np.int64), probabilities_of(table, classes)
    n_S, present = len(label_S), len(np.unique(label_S))
    if present < (2 if method == "temperature" else len(classes)):
        what = f"slides of {present} of {len(classes)} classes to fit on" if n_S else "no slides to fit on"
        return Map(member=member, slides=n_S, why=what)
    if method == "temperature":
        return Map(member=member, slides=n_S, temperature=fit_temperature(label_S, p_SC))
    targets = against_the_rest(len(classes))
    return Map(member=member, slides=n_S, knots=[fit_isotonic(label_S == c, p_SC[:, c]) for c in targets])


def fit_temperature(label_S: np.ndarray, p_SC: np.ndarray) -> float:
    """The temperature with the lowest log loss.

    The targets are Platt's (1999): (n + 1) / (n + C) for the true class with n slides, the rest shared by the others.
    On slides that are told apart without an error the log loss alone is lowest at temperature 0, which makes every
    probability 0 or 1.
    """
    n_classes = p_SC.shape[1]
    log_SC = np.log(np.clip(p_SC, np.finfo(np.float64).tiny, None))
    n_S1 = np.bincount(label_S, minlength=n_classes)[label_S][:, None]
    true_SC = label_S[:, None] == np.arange(n_classes)
    target_SC = np.where(true_SC, n_S1 + 1, 1) / (n_S1 + n_classes)

    def loss(log_temperature: float) -> float:
        return -float((target_SC * log_softmax(log_SC / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    found = minimize_scalar(loss, bounds=(-LOG_BOUND, LOG_BOUND), method="bounded", options={"xatol": 1e-9})
    return float(np.exp(found.x))


def fit_isotonic(truth_S: np.ndarray, p_S: np.ndarray) -> Knots:
    """Isotonic regression, within 1 / (n + 2) of 0 and 1: n slides say no more than that (Laplace)."""
    least = 1 / (len(p_S) + 2)
    fitted = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(p_S, truth_S.astype(float))
    return Knots(x=fitted.X_thresholds_.tolist(), y=fitted.y_thresholds_.tolist())


# --- studies ---------------------------------------------------------------------------------------------------------


def fit_calibration(method: Method, predictions: pd.DataFrame, classes: Sequence[str]) -> Calibration:
    """What calibrates slides that are not among those it is fitted on: the test split, and new slides."""
    source = source_of(predictions)
    if method == "none" or source == "nothing":
        return Calibration(method=method, fitted_on="nothing", maps=[])
    if source == "val":
        members = sorted(predictions["member"].unique().tolist())
        maps = [fit_map(method, val_slides(predictions, member, classes), classes, member) for member in members]
    else:
        maps = [fit_map(method, fit_table(out_of_fold(predictions, classes), classes), classes)]
    return Calibration(method=method, fitted_on=source, maps=maps)


def calibrate(rows: pd.DataFrame, classes: Sequence[str], calibration: Calibration) -> pd.DataFrame:
    """Table of slides: the calibrated ensemble of all members in these rows of predictions."""
    thresholds = no_thresholds(rows)
    if calibration.fitted_on == "val":
        by_member = {own.member: own for own in calibration.maps}
        parts = [
            with_probabilities(own, by_member[int(own["member"].iloc[0])](probabilities_of(own, classes)), classes)
            for _, own in rows.groupby("member", sort=True)
        ]
        return mean_of_logits(pd.concat(parts), classes, thresholds)
    table = mean_of_logits(rows, classes, thresholds)
    p_SC = probabilities_of(table, classes)
    for one in calibration.maps:
        p_SC = one(p_SC)
    return with_probabilities(table, p_SC, classes)


def calibrate_out_of_fold(predictions: pd.DataFrame, classes: Sequence[str], calibration: Calibration) -> pd.DataFrame:
    """Table of the out-of-fold slides, calibrated without the labels of their own patients."""
    if calibration.fitted_on == "val":
        return calibrate(predictions[held_out(predictions)], classes, calibration)
    table = out_of_fold(predictions, classes)
    p_SC = probabilities_of(table, classes)
    if calibration.fitted_on == "out-of-fold":
        method = calibration.method
        for own_S, one in fit_without_own(table, classes, lambda others: fit_map(method, others, classes)):
            p_SC[own_S] = one(p_SC[own_S])
    return with_probabilities(table, p_SC, classes)
