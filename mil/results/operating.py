"""Operating points: thresholds that a sensitivity, a specificity or Youden's index asks for, and what they give.

A threshold is chosen on slides with labels and reported on others, see `mil.results.crossfit`: with val slides each
member chooses on its own, and a slide's threshold is the mean of its members' in log-odds, as everywhere in this
toolkit; else on the out-of-fold predictions of the other folds, and for the test split and new slides on all of them.
With several classes each has its own threshold against the rest. Thresholds are of the plain probabilities.

Axes: S slides, T thresholds, K points and classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.special import expit, logit

from mil.results.calibration import Saved
from mil.results.crossfit import (
    Source,
    fit_table,
    fit_without_own,
    out_of_fold,
    source_of,
    val_slides,
)
from mil.results.rates import rate_block
from mil.results.tables import held_out, mean_of_logits
from mil.tasks.metrics import against_the_rest, choose_threshold

Point = str | dict[str, float]
"""`youden`, {"sensitivity": 0.95} or {"specificity": 0.9}, as `report.operating_points` has them."""
SAFE = 1e-12
"""How near to 0 and 1 a threshold counts when log-odds are averaged."""


class Threshold(Saved):
    """An operating point of one class against the rest, for slides that had no part in choosing it. None: not reached.

    slides: how many it was chosen on; with val slides the mean number a member, rounded.
    """

    point: str
    of_class: str
    threshold: float | None = Field(None, ge=0, le=1)
    slides: int = Field(0, ge=0)


class Operating(Saved):
    """The operating points of a study, for new slides."""

    fitted_on: Source
    thresholds: list[Threshold]


# --- choosing --------------------------------------------------------------------------------------------------------


def name_of(point: Point) -> str:
    """`youden`, `sensitivity_0.95`: in files and columns."""
    return point if isinstance(point, str) else "_".join(f"{kind}_{value:g}" for kind, value in point.items())


def choose(point: Point, truth_S: np.ndarray, p_S: np.ndarray) -> float | None:
    """The threshold on these slides; None where a class is absent, or where none gives what is asked for.

    Of those that reach a sensitivity the highest, which loses the least specificity; of those that reach a specificity
    the lowest. They lie midway between neighbouring probabilities, or on the outermost one.
    """
    if not 0 < truth_S.sum() < len(truth_S):
        return None
    if isinstance(point, str):
        return choose_threshold(truth_S, p_S)
    (kind, wanted), values = *point.items(), np.unique(p_S)
    own = np.sort(p_S[truth_S] if kind == "sensitivity" else p_S[~truth_S])
    needed = max(1, int(np.ceil(wanted * len(own) - SAFE)))
    if kind == "sensitivity":  # just below the lowest positive that is still called
        upper = float(own[-needed])
        lower = values[values < upper]
        return between(float(lower[-1]), upper) if len(lower) else upper
    lowest = float(own[needed - 1])  # just above the highest negative that is not called
    higher = values[values > lowest]
    threshold = between(lowest, float(higher[0])) if len(higher) else float(np.nextafter(lowest, 2))
    return threshold if threshold <= 1 else None


def between(lower: float, upper: float) -> float:
    """The middle; the upper one of neighbouring floats, which have none."""
    middle = (lower + upper) / 2
    return middle if middle > lower else upper


def choose_on(table: pd.DataFrame, point: Point, target: int) -> float | None:
    """`choose` on a table of labelled slides."""
    return choose(point, (table["label"] == target).to_numpy(), table[f"p_{target}"].to_numpy(dtype=np.float64))


def mean_threshold(thresholds: Sequence[float | None]) -> float | None:
    """The mean in log-odds of those that were reached."""
    known = np.array([value for value in thresholds if value is not None], dtype=np.float64)
    return float(expit(logit(np.clip(known, SAFE, 1 - SAFE)).mean())) if len(known) else None


def fit_operating(points: Sequence[Point], predictions: pd.DataFrame, classes: Sequence[str]) -> Operating:
    """The thresholds for slides that are not among those chosen on."""
    source = source_of(predictions)
    if source == "nothing" or not points:
        return Operating(fitted_on="nothing", thresholds=[])
    if source == "val":
        members = sorted(predictions["member"].unique().tolist())
        tables = [val_slides(predictions, member, classes) for member in members]
    else:
        tables = [fit_table(out_of_fold(predictions, classes), classes)]
    n_slides = round(float(np.mean([len(table) for table in tables])))
    thresholds = [
        Threshold(
            point=name_of(point),
            of_class=classes[target],
            threshold=mean_threshold([choose_on(table, point, target) for table in tables]),
            slides=n_slides,
        )
        for point in points
        for target in against_the_rest(len(classes))
    ]
    return Operating(fitted_on=source, thresholds=thresholds)


def out_of_fold_thresholds(
    points: Sequence[Point], predictions: pd.DataFrame, classes: Sequence[str]
) -> dict[tuple[str, str], np.ndarray]:
    """(point, class) -> the threshold of every slide of `out_of_fold`, NaN where none was reached."""
    chosen = [(point, target) for point in points for target in against_the_rest(len(classes))]
    if source_of(predictions) == "val":
        threshold_KS = _by_member(chosen, predictions, classes)
    else:
        table, threshold_KS = out_of_fold(predictions, classes), []
        for point, target in chosen:
            threshold_S = np.full(len(table), np.nan)
            for own_S, one in fit_without_own(table, classes, partial(choose_on, point=point, target=target)):
                threshold_S[own_S] = np.nan if one is None else one
            threshold_KS.append(threshold_S)
    names = [(name_of(point), classes[target]) for point, target in chosen]
    return dict(zip(names, threshold_KS, strict=True))


def _by_member(
    chosen: Sequence[tuple[Point, int]], predictions: pd.DataFrame, classes: Sequence[str]
) -> list[np.ndarray]:
    """The mean over a slide's members of the thresholds that they chose on their own val slides."""
    members = sorted(predictions["member"].unique().tolist())
    tables = {member: val_slides(predictions, member, classes) for member in members}
    rows, found = predictions[held_out(predictions)], []
    for point, target in chosen:
        own = {member: choose_on(table, point, target) for member, table in tables.items()}
        column = pd.Series(own, dtype=np.float64).to_frame("threshold")
        found.append(mean_of_logits(rows, classes, column)["threshold"].to_numpy(dtype=np.float64))
    return found


# --- reporting -------------------------------------------------------------------------------------------------------


def point_block(
    truth_S: np.ndarray,
    p_S: np.ndarray,
    threshold_S: np.ndarray,
    patients_S: np.ndarray,
    prevalences: Sequence[float],
) -> dict[str, Any] | None:
    """What a threshold gives on labelled slides: counts, rates and likelihood ratios with intervals, PPV and NPV.

    Slides without a threshold or with a probability that is not a number are left out and counted (`not_called`).
    `as_here`: PPV and NPV at the share of positives among these slides; `at_prevalence`: at others, by Bayes' theorem
    from the likelihood ratios. None where no slide is called.
    """
    called_S = np.isfinite(p_S) & np.isfinite(threshold_S)
    if not called_S.any():
        return None
    truth_S, patients_S, not_called = truth_S[called_S], patients_S[called_S], int((~called_S).sum())
    threshold_S = threshold_S[called_S]
    positive_S = p_S[called_S] >= threshold_S
    sensitivity = rate_block(positive_S[truth_S], patients_S[truth_S])
    specificity = rate_block(~positive_S[~truth_S], patients_S[~truth_S])
    ratios = {
        "lr_positive": ratio_of(sensitivity, complement(specificity)),
        "lr_negative": ratio_of(complement(sensitivity), specificity),
    }
    return {
        "threshold": [float(threshold_S.min()), float(threshold_S.max())],
        "not_called": not_called,
        "tp": int((truth_S & positive_S).sum()),
        "fn": int((truth_S & ~positive_S).sum()),
        "fp": int((~truth_S & positive_S).sum()),
        "tn": int((~truth_S & ~positive_S).sum()),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "as_here": {
            "prevalence": float(truth_S.mean()),
            "ppv": rate_block(truth_S[positive_S], patients_S[positive_S]),
            "npv": rate_block(~truth_S[~positive_S], patients_S[~positive_S]),
        },
        **ratios,
        "at_prevalence": [predictive_values(ratios, prevalence) for prevalence in prevalences],
    }


def complement(rate: Mapping[str, Any]) -> dict[str, float | None]:
    """1 - the rate, with its interval."""
    ends = {"value": "value", "low": "high", "high": "low"}
    return {key: None if rate[other] is None else 1 - rate[other] for key, other in ends.items()}


def ratio_of(above: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, float | None]:
    """A likelihood ratio: of two shares of different slides, its interval from theirs (MOVER-R, Donner and Zou 2012).

    Of n/0 there is no value and no upper end; of 0/0, or without slides of a class, there is nothing.
    """
    if above["value"] is None or below["value"] is None or above["value"] == below["value"] == 0:
        return {"value": None, "low": None, "high": None}
    (a, low_a, high_a), (b, low_b, high_b) = ([one[key] for key in ("value", "low", "high")] for one in (above, below))

    def root(of_a: float, of_b: float) -> tuple[float, float, float]:
        """Of x^2 of_b (2b - of_b) - 2abx + of_a (2a - of_a) = 0: both outer coefficients, and ab + the root."""
        first, last = of_b * (2 * b - of_b), of_a * (2 * a - of_a)
        return first, last, a * b + max(0.0, (a * b) ** 2 - first * last) ** 0.5

    _, last, middle = root(low_a, high_b)
    low = last / middle if middle > 0 else 0.0
    first, _, middle = root(high_a, low_b)
    return {"value": a / b if b else None, "low": max(0.0, low), "high": middle / first if first > 0 else None}


def predictive_values(ratios: Mapping[str, Mapping[str, Any]], prevalence: float) -> dict[str, Any]:
    """PPV and NPV at a prevalence: the odds after the test are those before it times the likelihood ratio."""
    odds = prevalence / (1 - prevalence)

    def after(ratio: Mapping[str, Any]) -> dict[str, float | None]:
        """The probability of the class; an endless ratio makes it 1."""
        if ratio["low"] is None:
            return dict.fromkeys(("value", "low", "high"))
        return {key: 1.0 if r is None else r * odds / (1 + r * odds) for key, r in ratio.items()}

    return {
        "prevalence": prevalence,
        "ppv": after(ratios["lr_positive"]),
        "npv": complement(after(ratios["lr_negative"])),
    }


CURVE = tuple(round(0.02 * i, 2) for i in range(1, 50))
"""Threshold probabilities of the decision curve."""


def decision_curve(truth_S: np.ndarray, p_S: np.ndarray) -> dict[str, list[float]]:
    """Net benefit of treating whom the model calls positive, and all; treating none is 0 (Vickers and Elkin 2006).

    At threshold probability t: TP / n - FP / n * t / (1 - t), and prevalence - (1 - prevalence) * t / (1 - t).
    """
    threshold_T = np.array(CURVE)
    odds_T = threshold_T / (1 - threshold_T)
    called_TS = p_S >= threshold_T[:, None]
    model_T = (called_TS & truth_S).mean(axis=1) - (called_TS & ~truth_S).mean(axis=1) * odds_T
    all_T = truth_S.mean() - (1 - truth_S.mean()) * odds_T
    return {"threshold": list(CURVE), "model": model_T.tolist(), "all": all_T.tolist()}
