"""The ladder of baselines beside the members of a task other than classification: same folds, same slides held out.

Axes: M members, S slides, R rounds (a repeat's fold), C outputs on tiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mil.pipeline.baselines import rounds_of
from mil.pipeline.data import Study
from mil.report.task_ladder import task_ladder_block, task_table_of
from mil.study.roles import ROLES, TEST, TRAIN, Plan
from mil.training.task_ladder import TaskLadder, fit_task_ladder, said_of_tiles
from mil.training.task_ladder_saved import save_task_ladder


def task_baselines(study: Study, plan: Plan, predictions: pd.DataFrame, name: str) -> dict[str, Any] | None:
    """What metrics.json holds as `baselines`; None where the config has them off, or no slide was held out."""
    if not study.config.report.baselines or not (plan.roles_MS == TEST).any():
        return None
    ladder = ladder_of(study, plan)
    return task_ladder_block(
        study.task,
        name,
        predictions,
        ladder_predictions(study, plan, ladder),
        resamples=study.config.report.bootstrap,
        seed=study.config.seed,
        tiles_per_slide=ladder.tiles_per_slide,
    )


def save_task_baselines(study: Study, plan: Plan, folder: Path) -> None:
    """What the ladder fitted, for `mil.predict`; nothing where the config has it off."""
    if study.config.report.baselines:
        save_task_ladder(folder, ladder_of(study, plan))


def ladder_of(study: Study, plan: Plan) -> TaskLadder:
    """Made once a plan, for all aggregators of the study."""
    made, key = study.once.setdefault("task_ladder", {}), plan.roles_MS.tobytes()
    if key not in made:
        first_R, round_M = rounds_of(plan)
        fixed = (study.task.name, study.bags, targets_of(study), len(study.task.classes))
        made[key] = fit_task_ladder(*fixed, plan.roles_MS[first_R] == TRAIN, round_M, study.config.seed)
    found: TaskLadder = made[key]
    return found


def targets_of(study: Study) -> dict[str, np.ndarray]:
    """What the task predicts, (S,) each; a grade as its index."""
    if study.task.name == "ordinal":
        return {"label": study.cohort.labels_S}
    return {name: study.cohort.table[name].to_numpy(dtype=np.float64) for name in study.task.targets}


def ladder_predictions(study: Study, plan: Plan, ladder: TaskLadder) -> dict[str, pd.DataFrame]:
    """Rung -> its rows as predictions.csv has them, of test slides only; a member's are those of its round."""
    first_R, round_M = rounds_of(plan)
    test_RS = plan.roles_MS[first_R] == TEST
    tiles_SRC = np.full((len(study.bags), *ladder.bias_RC.shape), np.nan)
    for s in np.flatnonzero(test_RS.any(axis=0)) if ladder.bias_RC.shape[1] else ():
        asked_R = np.flatnonzero(test_RS[:, s])
        fixed = (ladder.weights_RCD, ladder.bias_RC, asked_R)
        tiles_SRC[s, asked_R] = said_of_tiles(ladder.task, study.bags.features(int(s)).numpy(), *fixed)
    said = ladder.said(study.bags.means_SD, tiles_SRC)
    roles_MS = np.array(ROLES, dtype=object)[plan.roles_MS]
    return {
        name: task_table_of(study.task, plan.members, study.cohort.table, roles_MS, [rounds[r] for r in round_M])
        for name, rounds in said.items()
    }
