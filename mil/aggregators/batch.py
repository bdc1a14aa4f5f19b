"""Packed batches: bags end to end with their lengths, grouped by the members that use them.

Axes: M members, T tiles laid end to end, B bags of the batch, b bags of one group, D features, C outputs,
V columns of covariates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """Part of a batch that is computed in one go: whole bags, end to end, for the same members.

    tiles_TD: as stored (float16 or float32); converted when used. lengths_b: tiles of each bag, all >= 1.
    bags_b: the bags' positions in the batch. members: who uses these bags, ascending; None = all members.
    site: of all its bags, a row of `Aggregator.site_mean_MKD`; None = not said, as if no site were known.
    more: of a group that is a single bag, its further tiles where they lie: the other slides of a patient.
    """

    tiles_TD: Tensor
    lengths_b: tuple[int, ...]
    bags_b: tuple[int, ...]
    members: tuple[int, ...] | None = None
    site: int | None = None
    more: tuple[Tensor, ...] = ()

    @property
    def views(self) -> tuple[Tensor, ...]:
        """All tiles, where they lie."""
        return (self.tiles_TD, *self.more)

    @property
    def n_tiles(self) -> int:
        return sum(len(view) for view in self.views)

    def together(self) -> Tensor:
        """All tiles as one tensor: as stored where they are one, else float32, which is what they are converted to."""
        if not self.more:
            return self.tiles_TD
        tiles_TD = self.tiles_TD.new_empty(self.n_tiles, self.tiles_TD.shape[1], dtype=torch.float32)
        for part, view in zip(tiles_TD.split([len(view) for view in self.views]), self.views, strict=True):
            part.copy_(view)
        return tiles_TD

    def columns(self, which: slice) -> Group:
        """The same bags with these columns of their features, where they lie."""
        first, *more = (view[:, which] for view in self.views)
        return replace(self, tiles_TD=first, more=tuple(more))

    def to(self, device: torch.device | str, **options: Any) -> Group:
        first, *more = (view.to(device, **options) for view in self.views)
        return replace(self, tiles_TD=first, more=tuple(more))


@dataclass(frozen=True)
class Batch:
    """B packed bags. No padding anywhere: a bag is `lengths_b` rows of its group's tiles.

    labels_B: class index, int64, -1 unlabelled. slides_B: row of each bag in the cohort. uses_MB: which member trains
    on which bag; logits of the others are meaningless. labels_MB: each member's own labels where members differ in
    them; None = labels_B for all. covariates_BV: as the table says them, NaN where it does not; None: there are none.
    places: what is known of a batch that was put on a device (`mil.aggregators.places.Places`); None: it was not.
    """

    groups: tuple[Group, ...]
    labels_B: Tensor
    slides_B: Tensor
    uses_MB: Tensor
    labels_MB: Tensor | None = None
    covariates_BV: Tensor | None = None
    places: Any = None

    @property
    def labels(self) -> Tensor:
        """What losses are told: (B,), or (M, B) where members have labels of their own."""
        return self.labels_B if self.labels_MB is None else self.labels_MB

    def to(self, device: torch.device | str, **options: Any) -> Batch:
        there = [name for name in ("labels_MB", "covariates_BV") if getattr(self, name) is not None]
        names = ["labels_B", "slides_B", "uses_MB", *there]
        moved = {name: getattr(self, name).to(device, **options) for name in names}
        return Batch(tuple(group.to(device, **options) for group in self.groups), **moved, places=self.places)


def pack(bags: Sequence[Tensor], n_members: int, labels: Sequence[int] | None = None) -> Batch:
    """A batch of one group with every bag used by every member. bags: (T_i, D) each."""
    lengths_b = tuple(len(bag) for bag in bags)
    group = Group(torch.cat(list(bags)), lengths_b, tuple(range(len(bags))))
    labels_B = torch.full((len(bags),), -1) if labels is None else torch.as_tensor(labels)
    uses_MB = torch.ones(n_members, len(bags), dtype=torch.bool)
    return Batch((group,), labels_B, torch.arange(len(bags)), uses_MB)


@dataclass(frozen=True)
class Prediction:
    """logits_MBC: C = 1 (log-odds of the positive class) for two classes, else one per class.

    scores_MT: what the members looked at, tiles in the order of the groups; None unless asked for.
    pooled_MBP: what `pool` made of every bag, for `Aggregator.losses`. covariates_MBC: what the covariates add to
    logits_MBC, where there are any. parts: of every encoder, where they are fused (`mil.aggregators.fused`).
    """

    logits_MBC: Tensor
    scores_MT: Tensor | None = None
    pooled_MBP: Tensor | None = None
    covariates_MBC: Tensor | None = None
    parts: tuple[Prediction, ...] = ()

    def with_covariates(self, logits_MBC: Tensor) -> Tensor:
        """One stream's logits, of an aggregator with several, with what the covariates add."""
        return logits_MBC if self.covariates_MBC is None else logits_MBC + self.covariates_MBC


Task = tuple[Group, tuple[int, ...]]
"""A group and the members that run on it."""
