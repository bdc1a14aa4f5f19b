"""What a permutation test says: the study's AUC beside that of the same study on permuted labels.

Axes: S slides, N permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mil.results.crossfit import no_thresholds
from mil.results.tables import held_out_ensemble, p_columns, pooled_out_of_fold
from mil.results.task_summary import ensemble_parts, fold_parts, plain_metrics
from mil.tasks.contract import Task
from mil.tasks.metrics import decide, none_if_nan, weighted_metrics

METHOD = (
    "the whole study on permuted {word}, with folds dealt anew: {word} of patients change places within the official "
    "split, among patients with as many slides; p = (1 + permutations at least as good) / (1 + permutations). It asks "
    "whether features and {word} have anything to do with each other, not whether the site or the scanner explains it"
)


def held_out_aucs(predictions: pd.DataFrame, classes: Sequence[str]) -> dict[str, float]:
    """AUC (macro over several classes) of the cross-validated and of the test slides, of the sets that there are.

    NaN where predictions are not numbers, or a class is missing.
    """
    thresholds, found = no_thresholds(predictions), {}
    for name, make in (("cross_validated", pooled_out_of_fold), ("test", held_out_ensemble)):
        table = make(predictions, classes, thresholds)
        table = table[table["label"] >= 0]
        if len(table):
            found[name] = auc_of(table, classes)
    return found


def held_out_metrics(task: Task, predictions: pd.DataFrame) -> dict[str, float]:
    """The task's main metric of the cross-validated and of the test slides; NaN where it is undefined."""
    found = {}
    for name, parts_of in (("cross_validated", fold_parts), ("test", ensemble_parts)):
        parts = parts_of(task, predictions)
        if parts:
            value = plain_metrics(task, parts, [task.main])[task.main]
            found[name] = float("nan") if value is None else value
    return found


def auc_of(table: pd.DataFrame, classes: Sequence[str]) -> float:
    p_SC = table[p_columns(classes)].to_numpy(dtype=np.float64)
    if not np.isfinite(p_SC).all():
        return float("nan")
    label_S = table["label"].to_numpy(dtype=np.int64)
    return float(weighted_metrics(label_S, p_SC, decide(p_SC), np.ones((1, len(table))))["auc"][0])


def null_distributions(
    observed: dict[str, float], null: Sequence[dict[str, float]], *, members: int, word: str = "labels"
) -> dict[str, Any]:
    """The block for metrics.json. members: how many were trained on permuted labels. word: what these are called."""
    sets = {name: one_set(value, [each[name] for each in null]) for name, value in observed.items()}
    return {"permutations": len(null), "members": members, "sets": sets, "method": METHOD.format(word=word)}


def one_set(observed: float, null: Sequence[float]) -> dict[str, Any]:
    """p = (1 + #{null >= observed}) / (1 + N) (Phipson and Smyth 2010); an undefined permutation counts as better."""
    null_N = np.asarray(null, dtype=np.float64)
    known_N = null_N[np.isfinite(null_N)]
    better = int((~(null_N < observed - 1e-12)).sum())
    return {
        "observed": none_if_nan(observed),
        "p_value": None if np.isnan(observed) else (1 + better) / (1 + len(null_N)),
        "at_least_as_good": better,
        "mean": float(known_N.mean()) if len(known_N) else None,
        "highest_of_20": float(np.quantile(known_N, 0.95)) if len(known_N) else None,
        "undefined": len(null_N) - len(known_N),
        "null": [none_if_nan(value) for value in null_N.tolist()],
    }
