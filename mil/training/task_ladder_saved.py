"""baselines.safetensors of tasks other than classification: the ladder as fitted, for slides that come later.

As `mil.training.ladder_saved`: models on means are fitted again from the means and targets of the study's slides, the
rung on tiles is kept as its weights.

Axes: S slides of the study, D features, R rounds, C outputs on tiles, M members.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from extract.tensors import write_tensors
from mil.training.ladder_saved import FILE, read_ladder
from mil.training.task_ladder import TaskLadder

SHAPES = {
    "means_SD": "SD", "train_RS": "RS", "weights_RCD": "RCD", "bias_RC": "RC", "round_M": "M", "tiles_per_slide": "",
}  # fmt: skip
TARGETS = {"regression": ("value",), "ordinal": ("label",), "survival": ("time", "event")}
OUTPUTS = {"regression": 1, "survival": 0}
"""Outputs of the rung on tiles; of grades as many as these, at least two."""


def save_task_ladder(folder: Path, ladder: TaskLadder) -> None:
    """Write `folder`/baselines.safetensors."""
    tensors: dict[str, np.ndarray] = {
        "means_SD": ladder.means_SD.astype(np.float32),
        "train_RS": ladder.train_RS,
        "weights_RCD": ladder.weights_RCD.astype(np.float32),
        "bias_RC": ladder.bias_RC,
        "round_M": ladder.round_M.astype(np.int64),
        "tiles_per_slide": np.array(ladder.tiles_per_slide),
        **{f"{name}_S": np.asarray(values) for name, values in ladder.targets.items()},
    }
    write_tensors(folder / FILE, {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, {})


def load_task_ladder(folder: Path, task: str, n_members: int, dim: int, n_grades: int) -> TaskLadder:
    """The ladder that `save_task_ladder` wrote.

    Raises:
        ValueError: not of this study. SafetensorError, OSError: the file is damaged.
    """
    shapes = SHAPES | {f"{name}_S": "S" for name in TARGETS[task]}
    tensors = read_ladder(folder, shapes, {"M": n_members, "D": dim, "C": OUTPUTS.get(task, max(n_grades, 2))})
    targets = {name: tensors[f"{name}_S"] for name in TARGETS[task]}
    means_SD, train_RS, weights_RCD, bias_RC, round_M, tiles_per_slide = (tensors[name] for name in SHAPES)
    fixed = (means_SD, targets, train_RS, weights_RCD, bias_RC, round_M, int(tiles_per_slide))
    return TaskLadder(task, n_grades, *fixed)
