"""The block `baselines` of metrics.json: what the rungs of the ladder reach, and the aggregator beside each, paired.

Axes: S slides, R rounds (a repeat's fold), C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logit

from mil.report.comparison import Run, differences
from mil.results.summary import evaluate
from mil.results.tables import (
    OUT_OF_FOLD,
    TEST_ENSEMBLE,
    held_out_ensemble,
    member_thresholds,
    pooled_out_of_fold,
)
from mil.training.ladder import RUNGS

SETS = {"out_of_fold": (OUT_OF_FOLD, pooled_out_of_fold), "test": (TEST_ENSEMBLE, held_out_ensemble)}
"""Key in metrics.json -> what `differences` calls these slides, and what gives their table."""
SHOWN = ("auc", "average_precision", "balanced_accuracy")
LEAST_P = 1e-6
"""Probabilities become logits, of which an ensemble takes the mean: 0 and 1 have none."""


def ladder_block(
    name: str,
    classes: Sequence[str],
    predictions: pd.DataFrame,
    ladder: Mapping[str, pd.DataFrame],
    *,
    resamples: int,
    seed: int,
    tiles_per_slide: int,
) -> dict[str, Any]:
    """What metrics.json holds as `baselines`.

    Args:
        name: of the aggregator. predictions: its rows, as predictions.csv has them.
        ladder: rung -> its rows, of test slides.
        resamples: for the intervals; 0 = none.
    """
    own = Run(name, Path(), predictions, {"classes": classes})
    rungs = []
    for key, table in ladder.items():
        rung = Run(key, Path(), table, {"classes": classes})
        rows = {
            str(row["set"]): plain(row) for row in differences([own, rung], intervals=resamples > 0).to_dict("records")
        }
        scored = scores_of(table, classes, resamples, seed)
        for where in scored:
            scored[where]["difference"] = rows.get(SETS[where][0])
        rungs.append({"name": key, "title": RUNGS[key][0], **scored})
    return {
        "aggregator": name,
        "rungs": rungs,
        "verdict": {where: verdict(rungs, where) for where in SETS if any(where in rung for rung in rungs)},
        "tiles_per_slide": tiles_per_slide,
        "method": "fitted on the train slides of every fold (val slides are used for nothing), settings fixed, see "
        f"mil/training/ladder.py; difference: AUC of {name} - AUC of the baseline on the same slides, paired",
    }


def scores_of(table: pd.DataFrame, classes: Sequence[str], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Counts and metrics of a rung's predictions, of the sets that have slides."""
    thresholds, scored = member_thresholds(table, classes), {}
    for where, (_, table_of) in SETS.items():
        slides = table_of(table, classes, thresholds)
        if len(slides):
            found = evaluate(slides, classes, resamples, seed)
            scored[where] = {"counts": found["counts"], "metrics": {name: found["metrics"][name] for name in SHOWN}}
    return scored


def plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row of `differences` as JSON has it: names left out, what is not a number None."""
    numbers = {str(key): value for key, value in row.items() if key not in ("set", "a", "b")}
    return {key: None if pd.isna(value) else value for key, value in numbers.items()}


def verdict(rungs: list[dict[str, Any]], where: str, main: str = "auc") -> dict[str, Any]:
    """Of which baselines the aggregator is better, worse, or neither, by the paired interval; and the best of them.

    `unknown`: there is no interval (no resamples, or a prediction is not a number).
    """
    found: dict[str, Any] = {"better_than": [], "not_better_than": [], "worse_than": [], "unknown": []}
    aucs = {}
    for rung in rungs:
        found[beside(rung[where]["difference"])].append(rung["name"])
        aucs[rung["name"]] = rung[where]["metrics"][main]["value"]
    known = {name: value for name, value in aucs.items() if value is not None}
    return found | {"best": max(known, key=lambda name: known[name]) if known else None}


def beside(difference: dict[str, Any] | None) -> str:
    """What the interval of aggregator - baseline says."""
    if difference is None or difference["low"] is None or difference["high"] is None:
        return "unknown"
    if difference["low"] > 0:
        return "better_than"
    return "worse_than" if difference["high"] < 0 else "not_better_than"


def as_logits(p_RSC: np.ndarray) -> np.ndarray:
    """Log-odds of the last of two classes (R, S, 1), logarithms of several (R, S, C)."""
    safe_RSC = np.clip(p_RSC, LEAST_P, 1 - LEAST_P)
    return np.asarray(logit(safe_RSC[..., 1:]) if p_RSC.shape[-1] == 2 else np.log(safe_RSC))
