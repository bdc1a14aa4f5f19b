"""Two sets of predictions of one study's slides, by the task's own metric: both values and their paired difference.

For tasks other than classification, whose differences in AUC are those of `mil.report.comparison`.

Axes: R resamples, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mil.results.intervals import bootstrap
from mil.results.task_summary import ensemble_parts, fold_parts, with_interval
from mil.tasks.contract import FEW, Part, Task
from mil.tasks.metrics import none_if_nan

SETS = {"out_of_fold": fold_parts, "test": ensemble_parts}
"""Key in metrics.json -> what gives its parts."""


def paired(task: Task, a: pd.DataFrame, b: pd.DataFrame, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Of every set that has slides: `a`, `b` and `difference` (a - b), each value, low, high, resamples, undefined.

    Intervals are 95 % percentile intervals over patients, who are drawn once for both. Both hold out the same slides.
    """
    found = {}
    for name, parts_of in SETS.items():
        parts_a, parts_b = parts_of(task, a), parts_of(task, b)
        if parts_a:
            found[name] = _paired(task, parts_a, parts_b, resamples, seed)
    return found


def _paired(task: Task, parts_a: Sequence[Part], parts_b: Sequence[Part], resamples: int, seed: int) -> dict[str, Any]:
    tables = [(one.table, other.table) for one, other in zip(parts_a, parts_b, strict=True)]
    assert all(x["patient"].tolist() == y["patient"].tolist() for x, y in tables)
    ends, main = np.cumsum([len(x) for x, _ in tables])[:-1], task.main
    sign = 1 if task.metrics[main].higher_is_better else -1

    def metrics_of(weights_RN: np.ndarray) -> dict[str, np.ndarray]:
        weights = np.split(weights_RN, ends, axis=1)
        a_R, b_R = (task.score(parts, weights, [main])[main] for parts in (parts_a, parts_b))
        return {"a": a_R, "b": b_R, "difference": a_R - b_R}

    patients = [str(patient) for x, _ in tables for patient in x["patient"]]
    values = metrics_of(np.ones((1, len(patients))))
    n = min(resamples, FEW) if main in task.slow else resamples
    intervals = bootstrap(metrics_of, patients, n, seed, names=("a", "b", "difference"))
    both = {name: with_interval(none_if_nan(values[name][0]), intervals[name]) for name in intervals}
    return both | {"higher_is_better": sign > 0, "units": len(patients), "patients": len(set(patients))}
