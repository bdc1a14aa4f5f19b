"""What a report on new slides says of a task other than classification beside its metrics (`mil.prediction.blocks`).

Axes: S slides, R rounds of the study, M members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mil.prediction.blocks import Predicted, encoder_seen, flow, slides_of
from mil.prediction.decisions import task_coverage
from mil.report.task_ladder import task_ladder_block, task_table_of
from mil.results.task_calibration import task_calibration
from mil.results.task_conformal import task_conformal_blocks
from mil.results.task_confounding import task_confounding
from mil.results.task_subgroups import Scored, task_subgroups
from mil.results.task_summary import ensemble_parts
from mil.study.subgroups import named_groups
from mil.tasks.contract import Part
from mil.training.task_ladder import TaskLadder


def counted(done: Predicted) -> pd.DataFrame:
    """The rows of members.csv that metrics count."""
    return done.members[done.members["role"] == "test"]


def parts_of(done: Predicted) -> list[Part]:
    return ensemble_parts(done.job.trained.task, counted(done), study_rows(done))


def study_rows(done: Predicted) -> pd.DataFrame:
    """The slides that the study trained on."""
    rows = done.job.trained.predictions
    return rows[rows["role"] == "train"].drop_duplicates("slide")


def baselines(done: Predicted) -> dict[str, Any] | None:
    """The study's baselines asked about the same slides; None where it kept none, or `report.baselines=false`."""
    trained, ladder = done.job.trained, done.job.trained.ladder
    of_tiles = done.scored.of_tiles_SRC
    if not isinstance(ladder, TaskLadder) or of_tiles is None or not done.job.config.report.baselines:
        return None
    known_S = done.rows["slide"].isin(done.held_out["slide"])
    roles_MS = np.tile(np.where(known_S, "test", "train").astype(object), (trained.n_members, 1))
    task = trained.task
    tables = {
        name: task_table_of(task, trained.plan, done.rows, roles_MS, [rounds[r] for r in ladder.round_M])
        for name, rounds in ladder.said(done.scored.means_SD, of_tiles).items()
    }
    own = counted(done)
    return task_ladder_block(
        task,
        trained.description.aggregator,
        own[own["slide"].isin(done.held_out["slide"])],
        tables,
        resamples=done.resamples,
        seed=trained.config.seed,
        tiles_per_slide=ladder.tiles_per_slide,
    ) | {"new": True}


def confounding(done: Predicted) -> dict[str, Any] | None:
    """None with fewer than two sites among the slides that count, or `report.confounding=false`."""
    trained, rows = done.job.trained, done.rows
    known_S = rows["slide"].isin(done.held_out["slide"]).to_numpy()
    slides = slides_of(done, np.where(known_S, 0, -1).astype(np.int64))
    there = slides.site_S[known_S]
    if done.job.config.report.confounding is False or len(np.unique(there[there > 0])) < 2:
        return None
    task = trained.task
    targets = {name: rows[name].to_numpy() for name in task.targets}
    if task.name == "ordinal":
        index = {name: k for k, name in enumerate(task.classes)}
        targets = {"label": rows["label"].map(index).fillna(-1).to_numpy(dtype=np.int64)}
    fixed = (task, slides, targets, [(np.zeros_like(known_S), known_S)], parts_of(done))
    how, seed = trained.config.train.harmonize, trained.config.seed
    return task_confounding(*fixed, harmonize=how, resamples=done.resamples, seed=seed, new=True)


def subgroups(done: Predicted) -> dict[str, Any] | None:
    """Of the groupings asked for, else the study's, where the table has their columns."""
    further = done.cohort.further
    if further is None or not done.job.groupings:
        return None
    groups = named_groups(done.job.groupings, done.cohort.table["slide"].tolist(), further)
    scored = Scored(counted(done).drop_duplicates("slide").reset_index(drop=True), parts_of(done))
    return task_subgroups(done.job.trained.task, groups, {"new": scored}, done.resamples, done.job.trained.config.seed)


def conformal(done: Predicted) -> dict[str, dict[str, Any]]:
    """Coverage of the study's intervals or sets on these slides."""
    trained = done.job.trained
    rows = counted(done).assign(split="test")
    fixed = (trained.task, trained.conformal, rows, trained.config.seed)
    blocks = task_conformal_blocks(*fixed, coverage=task_coverage(done.job))
    return {name: block | {"new": True} for name, block in blocks.items()}


BLOCKS: dict[str, Callable[[Predicted], dict[str, Any] | None]] = {
    "flow": flow,
    "encoder_seen": encoder_seen,
    "baselines": baselines,
    "task_calibration": lambda done: task_calibration(done.job.trained.task, counted(done), study_rows(done)),
    "conformal": lambda done: conformal(done).get("conformal"),
    "conformal_intervals": lambda done: conformal(done).get("conformal_intervals"),
    "confounding": confounding,
    "subgroups": subgroups,
}
"""As `mil.pipeline.blocks.OF_TASKS` has them."""


def task_blocks_of(done: Predicted) -> dict[str, Any]:
    """The blocks that have something to say; of no slide that counts only where the slides went."""
    wanted = BLOCKS if len(done.held_out) else {"flow": flow, "encoder_seen": encoder_seen}
    made = {name: make(done) for name, make in wanted.items()}
    return {name: block for name, block in made.items() if block is not None}
