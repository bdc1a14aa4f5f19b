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

from extract.config import ConfigError
from extract.features.folder import FeatureFolder, open_feature_folder
from extract.features.joined import join_folders
from mil.prediction.config import PredictConfig
from mil.results.trained import TrainedStudy, wrong_number
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

    @property
    def feature_folders(self) -> list[Path]:
        """The folder, or all of a study of several: those given, else one for each below that of the features.

        Raises:
            ConfigError: not as many as the study has.
        """
        n, given = len(self.trained.feature_parts), self.config.features.folders
        if given and len(given) != n:
            raise ConfigError("other feature folders than the study's", [wrong_number(self.trained, len(given))])
        names = [f"{i}-{self.trained.feature_parts[i]['encoder'] or 'unknown'}".replace(":", "-") for i in range(n)]
        return given or (
            [self.out / FEATURES / name.replace("/", "-") for name in names] if n > 1 else [self.out / FEATURES]
        )

    @property
    def said_folders(self) -> str:
        """As a command line has them."""
        folders = [str(folder) for folder in self.feature_folders]
        return folders[0] if len(folders) == 1 else f"[{','.join(folders)}]"

    def open_features(self, layout: str) -> FeatureFolder:
        """Joined as the study's are. LayoutError: one of them cannot be opened."""
        return join_folders([open_feature_folder(one, layout) for one in self.feature_folders], self.trained.join)


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
