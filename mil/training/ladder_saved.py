"""baselines.safetensors: the ladder of baselines as a study fitted it, to be asked about slides that come later.

Logistic regression and nearest neighbours on means are fitted again from the means of the study's slides (a second at
most, and a neighbour cannot be had without them); the logistic regression on tiles is kept as its weights.

Axes: S slides of the study, N new slides, T tiles of one slide, D features, M members, R rounds, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from extract.tensors import write_tensors
from mil.training.ladder import Classifier, Cohort, fitted, new_logistic, new_neighbours, of_tiles

FILE = "baselines.safetensors"
SHAPES = {
    "means_SD": "SD", "labels_S": "S", "train_RS": "RS", "weights_RCD": "RCD", "bias_RC": "RC", "round_M": "M",
    "tiles_per_slide": "",
}  # fmt: skip
"""Name of a tensor -> its axes."""


@dataclass(frozen=True)
class Ladder:
    """What baselines.safetensors holds. round_M: the round of every member of the study."""

    means_SD: np.ndarray
    labels_S: np.ndarray
    train_RS: np.ndarray
    weights_RCD: np.ndarray
    bias_RC: np.ndarray
    round_M: np.ndarray
    tiles_per_slide: int

    def of_tiles(self, tiles_TD: np.ndarray) -> np.ndarray:
        """What `tile_logistic` of every round says of one slide, (R, C)."""
        return of_tiles(tiles_TD, self.weights_RCD, self.bias_RC, np.arange(len(self.bias_RC)))

    def of_means(self, means_ND: np.ndarray) -> dict[str, np.ndarray]:
        """The other rungs: name -> (R, N, C) probabilities."""
        return {
            name: np.stack([self._on_means(classifier, train_S, means_ND) for train_S in self.train_RS])
            for name, classifier in (("mean_logistic", new_logistic), ("mean_knn", new_neighbours))
        }

    def _on_means(self, classifier: Classifier, train_S: np.ndarray, means_ND: np.ndarray) -> np.ndarray:
        own = np.flatnonzero(train_S & (self.labels_S >= 0))
        return fitted(classifier, self.means_SD[own], self.labels_S[own], self.bias_RC.shape[1])(means_ND)


def save_ladder(folder: Path, cohort: Cohort, round_M: np.ndarray) -> None:
    """Write `folder`/baselines.safetensors: the rounds of `cohort`, and the one of every member."""
    weights_RCD, bias_RC = cohort.tile_weights
    tensors: dict[str, np.ndarray] = {
        "means_SD": cohort.bags.means_SD.astype(np.float32),
        "labels_S": cohort.labels_S.astype(np.int64),
        "train_RS": cohort.train_RS,
        "weights_RCD": weights_RCD.astype(np.float32),
        "bias_RC": bias_RC,
        "round_M": round_M.astype(np.int64),
        "tiles_per_slide": np.array(cohort.tiles_per_slide),
    }
    write_tensors(folder / FILE, {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, {})


def load_ladder(folder: Path, n_members: int, dim: int, n_classes: int) -> Ladder:
    """The ladder that `save_ladder` wrote.

    Raises:
        ValueError: not of this study. SafetensorError, OSError: the file is damaged.
    """
    tensors = read_ladder(folder, SHAPES, {"M": n_members, "D": dim, "C": n_classes})
    means_SD, labels_S, train_RS, weights_RCD, bias_RC, round_M, tiles_per_slide = (tensors[name] for name in SHAPES)
    return Ladder(means_SD, labels_S, train_RS, weights_RCD, bias_RC, round_M, int(tiles_per_slide))


def read_ladder(folder: Path, shapes: Mapping[str, str], known: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The tensors of `folder`/baselines.safetensors.

    Args:
        shapes: name of each tensor -> its axes. known: lengths of axes that are said beforehand.

    Raises:
        ValueError: other tensors, or shapes that do not fit each other. SafetensorError, OSError: the file is damaged.
    """
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / FILE).items()}
    if set(tensors) != set(shapes):
        raise ValueError(f"expected the tensors {', '.join(shapes)}, got {', '.join(tensors) or 'none'}")
    found = dict(known)
    for name, axes in shapes.items():
        shape = tensors[name].shape
        if len(shape) != len(axes) or any(found.setdefault(axis, n) != n for axis, n in zip(axes, shape, strict=True)):
            wanted = ", ".join(f"{axis} = {found[axis]}" if axis in found else axis for axis in axes)
            raise ValueError(f"{name}: expected shape ({wanted}), got {shape}")
    return tensors
