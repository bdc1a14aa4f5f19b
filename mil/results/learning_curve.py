"""The learning curve's numbers and files, from the members on fewer patients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from extract.tables import write_csv
from mil.results.summary import one_member, over_folds
from mil.results.tables import member_thresholds
from mil.study.learning_curve import ALL, FOLDER
from mil.study.roles import ROLES, TRAIN


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
    trained = predictions[predictions["role"] == ROLES[TRAIN]].groupby("member")
    points = []
    sizes = sorted(set(plan["train_size"].tolist()), key=lambda size: (size == ALL, size))
    for size in sizes:
        own, blocks = plan[plan["train_size"] == size], {}
        for name, split in (("cross_validation", "train"), ("test", "test")):
            members = [one_member(row, predictions, classes, thresholds, split) for _, row in own.iterrows()]
            members = [member for member in members if member["counts"]["slides"]]
            blocks[name] = {
                "metrics": over_folds(members),
                "auc": [member["metrics"]["auc"] for member in members],
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
