"""What a setting that is `auto` becomes: chosen from the cohort's fingerprint, with the reason in words. No torch.

The fingerprint is tiles a slide, training slides of each class (event, quantile or grade), and the features' width.
Every rule is stated in its function; none looks at a result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

STEPS = 700
"""Optimiser steps of the Phikon paper's recipe on Camelyon16 (Filiot et al. 2023): 50 epochs of 215 slides by 16."""
STEPS_AN_EPOCH = 10
"""A member takes at least so many, where its slides allow it."""
FEW, USUAL, MANY = 4, 16, 32
"""Slides in a batch."""
BATCH_VALUES = 16 * 4_000 * 768
"""Feature values of a batch that a tile cap keeps to: 16 slides of 4,000 tiles, 0.2 GB in float32."""
LEAST_TILES = 1_000


class Choice(NamedTuple):
    """A setting (dotted key), what it became, and why."""

    key: str
    value: int | None
    why: str

    def __str__(self) -> str:
        return f"{self.key}={'none' if self.value is None else self.value} (auto): {self.why}"


@dataclass(frozen=True)
class Fingerprint:
    """What choices are made from.

    tiles_S: of every slide. slides_C: a member's training slides of each class or stratum, about. dim: the features'
    width. rare: what the smallest class is called.
    """

    tiles_S: np.ndarray
    slides_C: Sequence[int]
    dim: int
    rare: str = ""

    @property
    def n_train(self) -> int:
        return max(1, sum(self.slides_C))

    def __str__(self) -> str:
        low, middle, high = (int(np.quantile(self.tiles_S, q, method="nearest")) for q in (0, 0.5, 1))
        classes = ", ".join(map(str, self.slides_C))
        tiles = f"{low:,} to {high:,} tiles a slide (median {middle:,})"
        return f"{tiles}, {classes} training slides a class, width {self.dim}"


def choose(asked: Sequence[str], given: Mapping[str, int | None], cohort: Fingerprint) -> list[Choice]:
    """A choice for each key of `asked`; what is not asked for is as `given` has it."""
    chosen: dict[str, Choice] = {}
    if "train.batch_size" in asked:
        chosen["train.batch_size"] = batch_size(cohort)
    size = chosen["train.batch_size"].value if "train.batch_size" in chosen else given["train.batch_size"]
    assert size is not None
    if "train.epochs" in asked:
        chosen["train.epochs"] = epochs(cohort, size)
    if "data.max_tiles" in asked:
        chosen["data.max_tiles"] = max_tiles(cohort, size)
    return [chosen[key] for key in asked]


def batch_size(cohort: Fingerprint) -> Choice:
    """16; fewer (8, 4) where that leaves a member under 10 steps an epoch; 32 where the rarest class has less than one
    slide in 16."""
    size, n = USUAL, cohort.n_train
    while size > FEW and n / size < STEPS_AN_EPOCH:
        size //= 2
    if size < USUAL:
        why = f"{n} training slides a member by {USUAL} would be {math.ceil(n / USUAL)} steps an epoch"
        return Choice("train.batch_size", size, f"{why}, by {size} they are {math.ceil(n / size)}")
    least = min((count for count in cohort.slides_C if count), default=n)
    if least / n * USUAL < 1 and n / MANY >= STEPS_AN_EPOCH:
        of = f" of {cohort.rare!r}" if cohort.rare else ""
        why = f"{least} of {n} training slides{of}: a batch of {USUAL} would hold less than one"
        return Choice("train.batch_size", MANY, why)
    return Choice(
        "train.batch_size", USUAL, f"the usual one: {math.ceil(n / USUAL)} steps an epoch, every class in a batch"
    )


def epochs(cohort: Fingerprint, size: int) -> Choice:
    """So many that a member takes about 700 steps, from 10 to 200."""
    steps = math.ceil(cohort.n_train / size)
    value = int(np.clip(round(STEPS / steps), 10, 200))
    why = f"{cohort.n_train} training slides by {size} are {steps} steps an epoch; {value * steps} steps in all"
    return Choice(
        "train.epochs", value, f"{why}, about {STEPS} as in the Phikon paper's recipe (within 10 to 200 epochs)"
    )


def max_tiles(cohort: Fingerprint, size: int) -> Choice:
    """None where 95 of 100 slides have at most what a batch may hold; else that, at least 1,000."""
    cap = max(LEAST_TILES, BATCH_VALUES // (size * cohort.dim) // 100 * 100)
    most = int(np.quantile(cohort.tiles_S, 0.95, method="nearest"))
    if most <= cap:
        return Choice("data.max_tiles", None, f"95 of 100 slides have at most {most:,} tiles, under the cap of {cap:,}")
    why = f"95 of 100 slides have up to {most:,} tiles; {size} slides of {cap:,} by {cohort.dim} are "
    return Choice("data.max_tiles", cap, f"{why}{size * cap * cohort.dim * 4 / 1e9:.2f} GB a batch")
