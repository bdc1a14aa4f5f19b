"""Data sets of bags in .npz files, read and checked.

Axes: N instances, D features, S bags, R repeats, F folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

from extract.config import ProblemsError
from mil.training.bags import Bags


@dataclass(frozen=True)
class BagSet:
    """Bags (each (T, D) float32), their labels 0 or 1, and which of them train in every repeat and fold."""

    bags: tuple[np.ndarray, ...]
    labels_S: np.ndarray
    train_RFS: np.ndarray

    def packed(self) -> Bags:
        """The bags as members and baselines take them."""
        names = tuple(f"bag_{i:03d}" for i in range(len(self.bags)))
        lengths_S = np.array([len(bag_TD) for bag_TD in self.bags], dtype=np.int64)
        return Bags(names, lengths_S, self.bags[0].shape[1], "ram", [torch.from_numpy(bag) for bag in self.bags])


def read_bags(npz: Path, seeds: tuple[int, ...] = ()) -> BagSet:
    """Read X (N, D), bag_id (N,) and y (S,); the folds are in the file, or with `seeds` five stratified ones each.

    Labels are in the order of the bags' ids.

    Raises:
        ProblemsError: the file cannot be read, or is not of this kind.
    """
    needed = {"X", "bag_id", "y"} | (set() if seeds else {"cv_train_mask"})
    try:
        with open(npz, "rb") as handle, np.load(handle) as file:  # np.load leaves a damaged file open
            missing = sorted(needed - set(file.files))
            found = {key: file[key] for key in needed & set(file.files)}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ProblemsError("data set cannot be read", [f"{npz}: {error}. Get it again"]) from None
    if missing:
        raise ProblemsError(
            "data set cannot be read", [f"{npz}: expected arrays {sorted(needed)}, not there: {missing}"]
        )
    x_ND, bag_N, labels_S = found["X"].astype(np.float32), found["bag_id"], found["y"].astype(np.int64)
    ids = np.unique(bag_N)
    if len(x_ND) != len(bag_N) or len(ids) != len(labels_S) or set(labels_S.tolist()) != {0, 1}:
        said = f"{len(x_ND)} instances, {len(bag_N)} bag ids of {len(ids)} bags, {len(labels_S)} labels"
        raise ProblemsError(
            "data set cannot be read", [f"{npz}: expected a bag id an instance, a label 0 or 1 a bag, got {said}"]
        )
    bags = tuple(x_ND[bag_N == i] for i in ids)
    train_RFS = stratified(labels_S, seeds) if seeds else found["cv_train_mask"].astype(bool)
    return BagSet(bags, labels_S, train_RFS)


def stratified(labels_S: np.ndarray, seeds: tuple[int, ...], folds: int = 5) -> np.ndarray:
    """(R, F, S) who trains: scikit-learn's stratified folds, shuffled by each seed."""
    train_RFS = np.zeros((len(seeds), folds, len(labels_S)), dtype=bool)
    for r, seed in enumerate(seeds):
        split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels_S, labels_S)
        for f, (train, _) in enumerate(split):
            train_RFS[r, f, train] = True
    return train_RFS


def made_up(n_bags: int, dim: int, shift: float, seed: int) -> BagSet:
    """Bags of 5 to 30 tiles around a centre of their own; positive centres lie `shift` higher in the first feature.

    Centres have variance 1 and tiles none in the first feature, so the best AUC of the mean is known: of two normal
    distributions `shift` apart, Phi(shift / sqrt(2)).
    """
    rng = np.random.default_rng(seed)
    labels_S = rng.permutation(np.arange(n_bags) % 2)
    bags = []
    for label in labels_S:
        centre_D = rng.normal(size=dim)
        centre_D[0] += shift * label
        tiles_TD = np.tile(centre_D, (int(rng.integers(5, 31)), 1))
        tiles_TD[:, 1:] += rng.normal(size=(len(tiles_TD), dim - 1))
        bags.append(tiles_TD.astype(np.float32))
    return BagSet(tuple(bags), labels_S, stratified(labels_S, (0, 1, 2)))
