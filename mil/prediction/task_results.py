"""What a prediction of a task other than classification leaves: its two tables, the report, and lines for the terminal.

Every member's outputs are read with what its own training slides say (mean and deviation of the target, median risk,
time intervals), then members are averaged, as in training.

Axes: S slides, M members.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.config import main_table
from mil.prediction.folder import MEMBERS
from mil.prediction.job import Job, Scored
from mil.report.sections import warnings_in
from mil.report.task_page import write_task_report
from mil.results.task_summary import ensemble, task_predictions
from mil.results.trained import TrainedStudy
from mil.study.units import COLUMN
from mil.tasks.contract import Task

NOT_OF_STUDY = ("name", "main", "noun", "options", "classes")
"""What metrics.json says of a task beside `Task.about`."""


def task_member_rows(trained: TrainedStudy, rows: pd.DataFrame, roles_MS: np.ndarray, scored: Scored) -> pd.DataFrame:
    """members.csv: one row a member and slide, as in a run's predictions.csv."""
    return task_predictions(trained.task, trained.plan, rows, roles_MS, scored.logits_MSC, trained.facts)


def task_slide_rows(
    trained: TrainedStudy, cohort: Cohort, members: pd.DataFrame, n_tiles: dict[str, int], in_study: dict[str, str]
) -> pd.DataFrame:
    """predictions.csv: slide, patient, target, what the task says (`Task.for_reader`), sd over members of
    `Task.one_number`, members, n_tiles, in_study; in the order of the cohort."""
    task = trained.task
    order = [slide for slide in cohort.table["slide"] if slide in n_tiles]
    table = ensemble(task, members).set_index("slide").loc[order].reset_index()
    number = members.assign(number=task.one_number(members)).groupby("slide")["number"]
    listed = cohort.table.set_index("slide").loc[order]
    table = table.assign(**({COLUMN: listed[COLUMN].to_numpy()} if COLUMN in listed else {}))
    first = [name for name in ("slide", "patient", COLUMN, *task.targets) if name in table]
    return pd.concat([table[first], task.for_reader(table)], axis=1).assign(
        sd=number.std(ddof=1).loc[order].to_numpy(),
        members=table["members"],
        n_tiles=[n_tiles[slide] for slide in order],
        in_study=[in_study[slide] for slide in order],
    )


def task_report(
    job: Job,
    members: pd.DataFrame,
    config_yaml: str,
    environment: dict[str, Any],
    never_trained_on: bool,
    also: Mapping[str, Any],
) -> dict[str, Any]:
    """Metrics and the page that shows them. Censoring is weighted as in the study's own training slides."""
    trained, report = job.trained, job.config.report
    assert job.config.cohort is not None
    own = trained.predictions[trained.predictions["role"] == "train"].drop_duplicates("slide")
    return write_task_report(
        job.out,
        trained.task,
        title=f"{trained.name} on {main_table(job.config.cohort).stem}",
        predictions=members,
        plan=trained.plan,
        history=pd.DataFrame(),
        about={key: value for key, value in trained.metrics["task"].items() if key not in NOT_OF_STUDY},
        config_yaml=config_yaml,
        environment=environment,
        notes=[*warnings_in(dict(also)), *job.warnings, *job.notes],
        also=also,
        drawn_by=(f"run={trained.folder}", f"features.folder={job.said_folders}"),
        resamples=report.bootstrap,
        seed=trained.config.seed,
        paths=report.paths,
        training=own,
        members_file=MEMBERS,
        never_trained_on=never_trained_on,
    )


def has_targets(task: Task, table: pd.DataFrame) -> bool:
    """Whether the target of any row is known."""
    return bool(table[list(task.targets)].notna().all(axis=1).any())


def task_slide_lines(task: Task, table: pd.DataFrame) -> list[str]:
    """`slide_1  prediction 41.2; SD 3.1 of 5 members`, aligned."""
    width = max((len(slide) for slide in table["slide"]), default=0)
    rows: list[dict[str, Any]] = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    return [
        f"{row['slide']:<{width}}  {task.said(row)}"
        + (f"; SD {row['sd']:.3g} of {row['members']} members" if row["members"] > 1 else "")
        for row in rows
    ]


def task_counts(task: Task, table: pd.DataFrame) -> str:
    """Many slides in one line: how many of each group or grade, or the span of a number."""
    said = {"survival": "risk_group", "ordinal": "predicted"}.get(task.name)
    if said:
        return ", ".join(f"{n} {name}" for name, n in table[said].value_counts(dropna=True).sort_index().items())
    low, middle, high = table["prediction"].quantile([0, 0.5, 1])
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}"
