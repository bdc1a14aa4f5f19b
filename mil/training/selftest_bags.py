"""Made-up bags that tell what an aggregator takes for evidence (Raff and Holt, NeurIPS 2023, algorithms 1 to 3).

A rule which respects multiple-instance learning ("a tile can make a slide positive, none can make it negative") solves
training and test; a shortcut that only training rewards is wrong in the test. Letters: S bags, T tiles, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import Field

from extract.config import Section
from mil.aggregators import AGGREGATORS


class SelftestConfig(Section):
    """Everything `python -m mil.selftest` can be told."""

    aggregators: list[str] = Field(list(AGGREGATORS), min_length=1, description="which ones; also torchmil:NAME")
    seeds: int = Field(5, ge=1, description="initialisations of each aggregator, trained together")
    seed: int = Field(0, ge=0, description="of the bags and of the initialisations")
    dim: int = Field(16, ge=2, description="features of a tile")
    train_bags: int = Field(300, ge=20, description="bags to train on, half of them positive")
    test_bags: int = Field(200, ge=20, description="bags to test on, half of them positive")
    background: int = Field(10, ge=1, description="one concept: background tiles of a bag")
    epochs: int = Field(20, ge=1, description="epochs")
    lr: float = Field(5e-3, gt=0, description="learning rate")
    batch_size: int = Field(16, ge=1, description="bags in a batch")
    strict: bool = Field(False, description="exit code 1 if an aggregator fails a test")
    out: Path | None = Field(None, description="also write the table to this Markdown file")


class Tiles:
    """Draws tiles (n, D); a new one for each set of bags. poison_at: the mean of a poison tile's features."""

    def __init__(self, rng: np.random.Generator, dim: int, poison_at: float):
        self.rng, self.dim, self.poison_at = rng, dim, poison_at

    def normal(self, n: int, mean: float, deviation: float) -> np.ndarray:
        return self.rng.normal(mean, deviation, (n, self.dim))

    def background(self, n: int) -> np.ndarray:
        return self.normal(n, 0, 1)

    def poison(self, n: int) -> np.ndarray:
        return self.normal(n, self.poison_at, 0.1)

    def a(self, n: int) -> np.ndarray:
        return self.normal(n, 2, 0.1)

    def c(self, n: int) -> np.ndarray:
        return self.normal(n, 3, 0.1)

    def one_of_two(self, n: int) -> np.ndarray:
        return self.a(n) if self.rng.random() < 0.5 else self.c(n)

    def few(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.rng.integers(low, high + 1))


def one_concept(tiles: Tiles, positive: bool, training: bool, background: int) -> list[np.ndarray]:
    """Algorithm 1: concept tiles are N(0, 3) or N(1, 1)."""
    parts = [tiles.background(background)]
    if positive:
        kinds = [(0, 3) if tiles.rng.random() < 0.5 else (1, 1) for _ in range(tiles.few(1, 3))]
        parts += [tiles.normal(1, mean, deviation) for mean, deviation in kinds]
    return [*parts, tiles.poison(int(positive != training))]


def two_concepts(tiles: Tiles, positive: bool, training: bool, background: int) -> list[np.ndarray]:
    """Algorithm 2: 1 to 3 tiles of A and as many of C, or as many of only one of them."""
    k = tiles.few(1, 3)
    concepts = [tiles.a(k), tiles.c(k)] if positive else [tiles.one_of_two(k)]
    return [tiles.background(tiles.few(1, 9)), *concepts, tiles.poison(int(positive != training))]


def frequency(tiles: Tiles, positive: bool, training: bool, background: int) -> list[np.ndarray]:
    """Algorithm 3: how many tiles there are of a concept says nothing."""
    copies = 1 if training else tiles.few(35, 44)
    concepts = [tiles.a(1), tiles.c(1)] if positive else [tiles.one_of_two(copies)]
    return [tiles.background(tiles.few(1, 9)), *concepts]


TESTS: dict[str, Callable[[Tiles, bool, bool, int], list[np.ndarray]]] = {
    "one concept": one_concept,
    "two concepts": two_concepts,
    "frequency": frequency,
}


POISONS = {"one concept": (-10.0, 10.0), "two concepts": (-10.0, 10.0), "frequency": (-10.0,)}
"""Where the poison of each test lies. Below everything else alone, as in the paper, whatever takes the highest value of
a feature cannot see it and passes without respecting anything. Frequency has no poison."""


def make_test(
    name: str, config: SelftestConfig, poison_at: float = -10.0
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Bags (T, D) float32, label of each (0 or 1), and whether it is for training."""
    training_S = np.arange(config.train_bags + config.test_bags) < config.train_bags
    labels_S = np.arange(len(training_S)) % 2
    rng = np.random.default_rng([config.seed, list(TESTS).index(name)])
    tiles = Tiles(rng, config.dim, poison_at)
    bags = []
    for label, training in zip(labels_S, training_S, strict=True):
        bag_TD = np.concatenate(TESTS[name](tiles, bool(label), bool(training), config.background))
        bags.append(rng.permutation(bag_TD).astype(np.float32))
    return bags, labels_S.astype(np.int64), training_S
