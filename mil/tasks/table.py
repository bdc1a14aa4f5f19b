"""TASKS: name -> what a study with `task=NAME` predicts. One file and one line a task."""

from __future__ import annotations

from collections.abc import Sequence

from mil.config import Task as TaskConfig
from mil.tasks.classification import Classification
from mil.tasks.contract import Task
from mil.tasks.ordinal import Ordinal
from mil.tasks.regression import Regression
from mil.tasks.survival import Survival

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "ordinal": Ordinal,
    "survival": Survival,
}


def task_of(config: TaskConfig, classes: Sequence[str] = ()) -> Task:
    """The task that a config's section `task` names."""
    return TASKS[config.name](config, classes)
