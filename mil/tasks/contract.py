"""The contract of every task: what a study with it needs, predicts and reports. No torch.

A task is spread over five places, each of which knows it by its name only:

| what | where |
| --- | --- |
| the columns of the cohort it needs (`Cohort.target`) | `extract.cohort` |
| what folds and members must have of it | `mil.study.targets`, `Task.strata` |
| outputs of a member, facts of its training slides, what an output means, metrics | here, one file a task |
| the loss on packed logits, and the metric that selects | `mil.training.objectives` |
| sections and figures of the report | `mil.report.task_page`, `mil.report.task_figures` |

Facts of a member are numbers that its training slides alone decide: the mean and deviation of a target, the ends of
time intervals. They are written into members.safetensors, so that a prediction can be made of an output anywhere.

Letters: M members, S slides, N rows (slides or patients), C outputs, R weightings, G parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from mil.config import Task as TaskConfig
from mil.tasks.estimates import Estimate

Facts = dict[str, np.ndarray]
"""Name -> (M, ...)."""


@dataclass(frozen=True)
class Measure:
    """How a metric is called, which end of it is good, and its interval's scale (`mil.results.intervals.SCALES`)."""

    title: str
    higher_is_better: bool = True
    scale: str = "logit"


@dataclass(frozen=True)
class Part:
    """Predictions on one scale: those of one fold (its seeds averaged), or of an ensemble.

    table: one row a slide or patient, as `Task.units` gives it. training: the slides' targets that the members of this
    part were trained on, one row a slide.
    """

    table: pd.DataFrame
    training: pd.DataFrame


class Task:
    """One task with its options. A subclass is an entry of `mil.tasks.table.TASKS`.

    Classification has `n_outputs` only of what raises NotImplementedError here: its tables are those of `mil.results`.
    """

    name: ClassVar[str]
    metrics: Mapping[str, Measure]
    main: ClassVar[str]
    """The metric that selects epochs and settings, and stands first."""
    slow: tuple[str, ...] = ()
    """Metrics of which at most `FEW` resamples are drawn."""
    noun: ClassVar[str] = "prediction"
    """What `one_number` is, in a word."""
    targets: ClassVar[tuple[str, ...]] = ("label",)
    """Columns of the cohort that say what is to be predicted."""

    def __init__(self, config: TaskConfig, classes: Sequence[str] = ()):
        self.config, self.classes = config, tuple(classes)

    def for_cohort(self, cohort: Cohort) -> Task:
        """The task with what its options leave to the cohort."""
        return type(self)(self.config, cohort.classes)

    def n_outputs(self) -> int:
        """Outputs of an aggregator's head."""
        raise NotImplementedError

    def strata(self, cohort: Cohort, folds: int) -> Cohort:
        """The cohort with what its folds are stratified by; unchanged where that is the label."""
        return cohort

    def facts(self, cohort: Cohort, train_MS: np.ndarray) -> Facts:
        """What each member's training slides say, before it is trained."""
        return {}

    def facts_after(self, cohort: Cohort, train_MS: np.ndarray, logits_MSC: np.ndarray, facts: Facts) -> Facts:
        """The facts with what members say of their own training slides, where a prediction needs it."""
        return facts

    def predicted(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What one member's outputs mean: columns of predictions.csv, (N,) each. facts: of this member, without M."""
        raise NotImplementedError

    def columns(self) -> list[str]:
        """The columns that `predicted` gives."""
        raise NotImplementedError

    def for_reader(self, table: pd.DataFrame) -> pd.DataFrame:
        """What a table of new slides says of each: columns made of those of `columns`, members averaged."""
        raise NotImplementedError

    def one_number(self, table: pd.DataFrame) -> np.ndarray:
        """(N,): what slides are ordered by, and in which members differ; of the columns of `columns`."""
        raise NotImplementedError

    def error(self, table: pd.DataFrame) -> np.ndarray:
        """(N,): how far each row's prediction is from its target; NaN where a row alone cannot say."""
        return np.full(len(table), np.nan)

    def said(self, row: Mapping[str, Any]) -> str:
        """A row of `for_reader` in words."""
        raise NotImplementedError

    def truth(self, row: Mapping[str, Any]) -> str:
        """A row's target in words; "" where it is not known."""
        raise NotImplementedError

    def evidence(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray], target: str | None = None) -> np.ndarray:
        """How far outputs of one member speak for what `speaks_for` says, (N,); below 0: against it."""
        raise NotImplementedError

    def speaks_for(self, target: str | None = None) -> str:
        """What evidence is for, in words: `a higher risk`. target: one of `thresholds`."""
        raise NotImplementedError

    def thresholds(self) -> tuple[str, ...]:
        """What evidence can be asked for by name."""
        return ()

    def units(self, table: pd.DataFrame) -> pd.DataFrame:
        """What is counted once, of a table with one row a slide: the slides, or patients."""
        return table

    def labelled(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows whose target is known."""
        return table[table[self.targets[0]].notna()]

    def score(
        self, parts: Sequence[Part], weights: Sequence[np.ndarray], names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Every metric (or those of `names`) under every weighting, (R,) each, NaN where it is undefined.

        Args:
            parts: labelled rows; those of different parts are only compared where the task says that they can be.
            weights: (R, N) of each part: how often each row counts.
        """
        raise NotImplementedError

    def estimates(self, parts: Sequence[Part]) -> dict[str, Estimate]:
        """Metrics whose intervals need no resamples; of the others they are the t interval on the metric's scale."""
        return {}

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        """What a table of slides holds of the target, such as events."""
        return {}

    def extra(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Further numbers of a set for metrics.json: curves, tables."""
        return {}

    def about(self, cohort: Cohort) -> dict[str, Any]:
        """What the study's report says of the task."""
        return {}


FEW = 200
"""Resamples of the metrics that are slow to compute."""


def joined(parts: Sequence[Part], weights: Sequence[np.ndarray]) -> tuple[pd.DataFrame, np.ndarray]:
    """All parts as one, for tasks whose predictions of different folds are on one scale."""
    return pd.concat([part.table for part in parts], ignore_index=True), np.concatenate(list(weights), axis=1)
