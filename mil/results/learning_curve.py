"""The learning curve's numbers and files, from the members on fewer patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from extract.tables import write_csv
from mil.results.summary import one_member, over_folds
from mil.results.tables import member_thresholds
from mil.results.task_summary import one_member as one_member_of_task
from mil.results.task_summary import over_folds as over_folds_of_task
from mil.study.learning_curve import ALL, FOLDER
from mil.study.roles import ROLES, TRAIN
from mil.tasks.contract import Task


def summarise_curve(
    plan: pd.DataFrame, predictions: pd.DataFrame, classes: Sequence[str], *, equal: str = "steps"
) -> dict[str, Any]:
    """What `metrics.json` holds as `learning_curve`.

    Args:
        plan: as for `mil.results.summary.summarise`, the added members and the study's own, with column
            `train_size` (ALL for the latter).
        predictions: of all of them.
        equal: what all sizes train equally long in, steps or epochs.
    """
    thresholds = member_thresholds(predictions, classes)

    def one(member: pd.Series, split: str) -> dict[str, Any]:
        return one_member(member, predictions, classes, thresholds, split)

    return _curve(plan, predictions, one, over_folds, "auc", equal)


def summarise_task_curve(
    task: Task, plan: pd.DataFrame, predictions: pd.DataFrame, *, equal: str = "steps"
) -> dict[str, Any]:
    """The same of a task other than classification, by its main metric."""

    def one(member: pd.Series, split: str) -> dict[str, Any]:
        return one_member_of_task(task, member, predictions, split)

    def over(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
        metrics: dict[str, Any] = over_folds_of_task(task, members)["metrics"]
        return metrics

    return _curve(plan, predictions, one, over, task.main, equal)


def _curve(
    plan: pd.DataFrame,
    predictions: pd.DataFrame,
    one: Callable[[pd.Series, str], dict[str, Any]],
    over: Callable[[list[dict[str, Any]]], dict[str, Any]],
    main: str,
    equal: str,
) -> dict[str, Any]:
    trained = predictions[predictions["role"] == ROLES[TRAIN]].groupby("member")
    points = []
    sizes = sorted(set(plan["train_size"].tolist()), key=lambda size: (size == ALL, size))
    for size in sizes:
        own, blocks = plan[plan["train_size"] == size], {}
        for name, split in (("cross_validation", "train"), ("test", "test")):
            members = [one(row, split) for _, row in own.iterrows()]
            members = [member for member in members if member["counts"]["slides"]]
            blocks[name] = {
                "metrics": over(members),
                main: [member["metrics"][main] for member in members],
            } if members else None  # fmt: skip
        points.append(
            {
                "train_size": None if size == ALL else int(size),
                "members": len(own),
                "epochs": float(own["epochs"].mean()),
                "patients": float(trained["patient"].nunique().reindex(own["member"]).mean()),
                "slides": float(trained["slide"].nunique().reindex(own["member"]).mean()),
                **blocks,
            }
        )
    return {
        "points": points,
        "equal": equal,
        "method": "the same folds and starting parameters, trained on nested parts of their training patients, "
        "stratified by class; mean and standard deviation (n - 1) over the folds (each the mean of its seeds); "
        "train_size null: all training patients. patients, slides and epochs: mean over the members. "
        f"Sizes train for equal {equal}",
    }


def write_curve(folder: Path, plan: pd.DataFrame, predictions: pd.DataFrame, history: pd.DataFrame) -> None:
    """The added members' tables, in a folder of their own."""
    for name, table in (("plan.csv", plan), ("predictions.csv", predictions), ("history.csv", history)):
        write_csv(table, folder / FOLDER / name)
