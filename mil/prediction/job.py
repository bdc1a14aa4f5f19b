"""What a prediction carries along: the job, its failures, scores and outcome.

Axes: S slides, M members, C outputs (1 for two classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mil.prediction.config import PredictConfig
from mil.results.trained import TrainedStudy
from mil.tasks.contract import Task

FEATURES = "features"


@dataclass(frozen=True)
class Failure:
    """Why there is no prediction of a slide."""

    slide: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Job:
    """What is to be done. `failed` (slides without a prediction), `warnings` and `notes` grow on the way, and
    `groupings`: those of report.subgroups that the table has columns for."""

    config: PredictConfig
    trained: TrainedStudy
    out: Path
    command: Sequence[str]
    began: str
    failed: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    groupings: list[str] = field(default_factory=list)

    @property
    def features_folder(self) -> Path:
        """Where features are, or go to."""
        return self.config.features.folder or self.out / FEATURES


@dataclass(frozen=True)
class Scored:
    """What all members say: logits_MSC, in the order of `slides`; and what their report's other sections look at.

    means_SD: the mean tile of every slide. of_tiles_SRC: what the study's baseline on tiles says of it; None where the
    study kept none.
    """

    slides: list[str]
    n_tiles: list[int]
    logits_MSC: np.ndarray
    means_SD: np.ndarray
    of_tiles_SRC: np.ndarray | None = None


@dataclass(frozen=True)
class Outcome:
    """`table`: a row a slide, as in predictions.csv. `metrics`: None without labels."""

    folder: Path
    task: Task
    table: pd.DataFrame
    failed: list[Failure]
    warnings: list[str]
    notes: list[str]
    metrics: dict[str, Any] | None
