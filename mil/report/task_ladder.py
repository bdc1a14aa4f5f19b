"""The block `baselines` of metrics.json for tasks other than classification: the rungs, and the aggregator beside each.

Differences are of the task's main metric on the same held-out rows, paired (`mil.results.task_differences`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mil.report.ladder import verdict
from mil.results.task_differences import paired
from mil.results.task_summary import OF_SLIDE, ensemble_parts, fold_parts, metrics_with_intervals
from mil.study.roles import ROLES, TEST
from mil.tasks.contract import Task
from mil.training.task_ladder import Said, titles_of

SETS = {"out_of_fold": fold_parts, "test": ensemble_parts}
"""Key in metrics.json -> what gives the held-out rows."""


def task_ladder_block(
    task: Task,
    name: str,
    predictions: pd.DataFrame,
    ladder: Mapping[str, pd.DataFrame],
    *,
    resamples: int,
    seed: int,
    tiles_per_slide: int,
) -> dict[str, Any]:
    """What metrics.json holds as `baselines`, in the shape of `mil.report.ladder.ladder_block`.

    Args:
        name: of the aggregator. predictions: its rows, as predictions.csv has them.
        ladder: rung -> its rows, of test slides.
        resamples: for the intervals; 0 = none.
    """
    own = {where: parts_of(task, predictions[predictions["role"] == "test"]) for where, parts_of in SETS.items()}
    titles, rungs = titles_of(task.name), []
    for key, table in ladder.items():
        rung: dict[str, Any] = {"name": key, "title": titles[key]}
        for where, parts_of in SETS.items():
            parts = parts_of(task, table)
            if parts and own[where]:
                both = [(task, own[where]), (task, parts)]
                gap = paired(both, resamples, seed, [task.main])[0]
                rung[where] = {
                    "counts": {"rows": gap["rows"], "patients": gap["patients"]},
                    "metrics": metrics_with_intervals(task, parts, resamples, seed, names=[task.main]),
                    "difference": gap,
                }
        rungs.append(rung)
    return {
        "aggregator": name,
        "rungs": rungs,
        "verdict": {where: verdict(rungs, where, task.main) for where in SETS if any(where in rung for rung in rungs)},
        "tiles_per_slide": tiles_per_slide,
        "method": "fitted on the train slides of every fold (val slides are used for nothing), settings fixed, see "
        f"mil/training/task_ladder.py; difference: {task.metrics[task.main].title} of {name} - that of the baseline on "
        "the same rows, paired",
    }


def task_table_of(
    task: Task, members: pd.DataFrame, slides: pd.DataFrame, roles_MS: np.ndarray, said: Sequence[Said]
) -> pd.DataFrame:
    """A rung's rows as predictions.csv has them, of test slides; a column that a rung does not know is empty.

    Args:
        said: of every member, of all slides.
    """
    own = [name for name in task.targets if name not in OF_SLIDE]
    table = members.loc[:, ["member", "repeat", "fold", "seed"]].merge(slides[OF_SLIDE + own], how="cross")
    unknown = np.full(len(slides), np.nan)
    found = {name: np.concatenate([one.get(name, unknown) for one in said]) for name in task.columns()}
    table = table.assign(role=roles_MS.astype(object).reshape(-1), **found)
    kept: pd.DataFrame = table[table["role"] == ROLES[TEST]].reset_index(drop=True)
    return kept
