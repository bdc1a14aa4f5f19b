"""Runs of a task other than classification beside each other: paired differences of every metric that they share.

Patients are drawn with replacement, all their slides and folds together, and every run is scored on the same draws; how
both scores vary there, on the metric's scale, says the interval (`mil.results.intervals.difference_interval`).

Axes: R resamples, N rows (slides, or patients where the task counts these).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from mil.results.intervals import SCALES, difference_interval, resampled
from mil.results.tables import OUT_OF_FOLD, TEST_ENSEMBLE
from mil.results.task_summary import ensemble_parts, fold_parts, plain_metrics, with_interval
from mil.tasks.contract import FEW, Part, Task

SAME: dict[str, tuple[str, ...]] = {
    "survival": ("unit", "horizons"),
    "regression": ("unit", "cut"),
}
"""Options without which the numbers of two runs are not the same quantity."""


def unlike_tasks(name_a: str, a: Task, name_b: str, b: Task) -> list[str]:
    """Why these tasks cannot be compared, one sentence each; losses may differ, they are what is compared."""
    if a.name != b.name:
        return [f"{name_b}: task={b.name}, but {name_a} has task={a.name}"]
    problems = []
    for key in SAME.get(a.name, ()):
        of_a, of_b = getattr(a.config, key), getattr(b.config, key)
        if of_a != of_b:
            problems.append(f"{name_b}: task.{key}={of_b}, but {name_a} has {of_a}")
    if a.name == "ordinal" and a.classes != b.classes:
        problems.append(f"{name_b}: grades {', '.join(b.classes)}, but {name_a} has {', '.join(a.classes)}")
    return problems


def task_differences(runs: Sequence[tuple[str, Task, pd.DataFrame]], resamples: int, seed: int) -> pd.DataFrame:
    """One row a set (out-of-fold, test ensemble), pair of runs and metric that both have, the main one first.

    Columns: set, a, b, metric, title, value_a, value_b, difference (a - b), low, high (95 %), resamples, undefined (of
    these, left out), rows, patients.

    Args:
        runs: name, task and predictions, on the same slides, targets and folds.
    """
    rows = []
    for name, parts_of in ((OUT_OF_FOLD, fold_parts), (TEST_ENSEMBLE, partial(ensemble_parts, training=None))):
        parts = [parts_of(task, predictions) for _, task, predictions in runs]
        if not all(parts):
            continue
        for i, j in combinations(range(len(runs)), 2):
            both = [(runs[k][1], parts[k]) for k in (i, j)]
            found = paired(both, resamples, seed)
            rows += [{"set": name, "a": runs[i][0], "b": runs[j][0], **row} for row in found]
    return pd.DataFrame(rows)


def paired(
    both: Sequence[tuple[Task, Sequence[Part]]], resamples: int, seed: int, wanted: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of one set and pair; of the metrics `wanted` (default: all)."""
    (task, parts), (other, other_parts) = both
    names = [name for name in sorted(task.metrics, key=lambda name: name != task.main) if name in other.metrics]
    names = [name for name in names if wanted is None or name in wanted]
    values = [plain_metrics(own, of_run, names) for own, of_run in both]
    tables = [pd.concat([part.table for part in of_run], ignore_index=True) for of_run in (parts, other_parts)]
    patients = tables[0]["patient"].astype(str).tolist()
    if tables[1]["patient"].astype(str).tolist() != patients:
        raise ValueError("expected the same rows in both runs")
    ends = np.cumsum([len(part.table) for part in parts])[:-1]

    def scores(weights_RN: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        weights = np.split(weights_RN, ends, axis=1)
        a, b = (own.score(of_run, weights, names) for own, of_run in both)
        return {name: np.stack([a[name], b[name]], axis=1) for name in names}

    drawn: dict[str, np.ndarray] = {}
    for some, n in (
        ([name for name in names if name not in task.slow], resamples),
        ([name for name in names if name in task.slow], min(resamples, FEW)),
    ):
        if some:
            drawn |= resampled(partial(scores, names=some), patients, n, seed) or {}
    rows = []
    for name in names:
        a, b = (value[name] for value in values)
        apart = None if a is None or b is None else a - b
        scale = SCALES[task.metrics[name].scale]
        found = difference_interval((a, b), drawn.get(name), scale, len(set(patients)))
        gap = with_interval(apart, found, "difference")
        row = {"metric": name, "title": task.metrics[name].title, "value_a": a, "value_b": b}
        row |= {"difference": gap.pop("value"), **gap, "rows": len(patients), "patients": len(set(patients))}
        rows.append(row)
    return rows
