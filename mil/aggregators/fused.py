"""Several encoders, a member each: aggregators of one kind on the columns of theirs, whose logits are put together.

    logits = sum over encoders of weight * logits of that encoder's member          weights >= 0, sum 1, a member's own

Training minimises every encoder's own loss, each from the same seed as if it were alone: nothing couples them, so the
encoder is one more member, side by side in one pass over the features. The weights come afterwards, of slides that were
held out (`mil.training.fusion`).

Axes: M members, E encoders, B bags, T tiles, D columns of all encoders, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from mil.aggregators.batch import Batch, Prediction
from mil.aggregators.contract import Aggregator


class Fused(Aggregator):
    """Aggregators `encoders` side by side, on `widths[e]` columns each, in their order.

    Buffer fusion_ME: the weights, alike until they are fitted. `apart`: `forward` gives the logits of every encoder
    side by side, (M, B, E * C), and no scores.
    """

    fusion_ME: Tensor

    def __init__(self, make: Callable[[int], Aggregator], widths: Sequence[int]):
        encoders = [make(width) for width in widths]
        first = encoders[0]
        super().__init__(sum(widths), first.n_outputs, first.seeds)
        self.widths, self.apart, self.score_name = tuple(widths), False, first.score_name
        self.encoders = nn.ModuleList(encoders)
        self.register_buffer("fusion_ME", torch.full((self.n_members, len(widths)), 1 / len(widths)))
        self.members_at_a_time = first.members_at_a_time
        self.floats_per_tile = sum(one.floats_per_tile for one in encoders)
        self.floats_per_bag = sum(one.floats_per_bag for one in encoders)

    def each(self) -> list[Aggregator]:
        return [one for one in self.encoders if isinstance(one, Aggregator)]

    def forward(self, batch: Batch, with_scores: bool = False) -> Prediction:
        self._pass_on()
        parts = [one(own, with_scores) for one, own in zip(self.each(), self._split(batch), strict=True)]
        if self.apart:
            return Prediction(torch.cat([part.logits_MBC for part in parts], dim=2))
        logits_MBC = self._weighted([part.logits_MBC for part in parts])
        scores = [part.scores_MT.unsqueeze(2) for part in parts if part.scores_MT is not None]
        scores_MT = self._weighted(scores).squeeze(2) if scores else None
        return Prediction(logits_MBC, scores_MT, parts=tuple(parts))

    def losses(self, prediction: Prediction, labels: Tensor) -> Tensor:
        """The sum of every encoder's own."""
        each = zip(self.each(), prediction.parts, strict=True)
        return torch.stack([one.losses(part, labels) for one, part in each]).sum(dim=0)

    def readings(self, prediction: Prediction) -> list[tuple[float, Tensor]]:
        """Those of every encoder."""
        each = zip(self.each(), prediction.parts, strict=True)
        return [reading for one, part in each for reading in one.readings(part)]

    def left_out(self) -> str:
        return self.each()[0].left_out()

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        self._pass_on()
        each = zip(self.each(), tiles_TD.split(self.widths, dim=1), strict=True)
        return self._weighted([one.tile_logits(part_TD) for one, part_TD in each])

    def standardize(self, mean_MD: Tensor, std_MD: Tensor) -> None:
        moments = zip(mean_MD.split(self.widths, dim=1), std_MD.split(self.widths, dim=1), strict=True)
        for one, (mean, std) in zip(self.each(), moments, strict=True):
            one.standardize(mean, std)
        self.standardized = True

    def add_cuts(self, n_cuts: int) -> None:
        """Of every encoder: the weighted mean of rising cuts is rising."""
        self.n_cuts = n_cuts
        for one in self.each():
            one.add_cuts(n_cuts)

    def place_cuts(self, cuts_MK: Tensor) -> None:
        for one in self.each():
            one.place_cuts(cuts_MK)

    def add_covariates(self, categories: Sequence[int]) -> None:
        """Every encoder's member has a term of its own."""
        for one in self.each():
            one.add_covariates(categories)

    def _pass_on(self) -> None:
        """What whoever trains sets on the whole."""
        for one in self.each():
            one.threads, one.epoch, one.standardized = self.threads, self.epoch, self.standardized

    def _split(self, batch: Batch) -> list[Batch]:
        """The batch as every encoder sees it: its columns, where they lie."""
        ends = [0, *accumulate(self.widths)]
        own = [[group.columns(slice(*two)) for group in batch.groups] for two in pairwise(ends)]
        return [replace(batch, groups=tuple(groups)) for groups in own]

    def _weighted(self, parts: Sequence[Tensor]) -> Tensor:
        """The weighted sum of (M, X, C) of every encoder."""
        weights_ME11 = self.fusion_ME[:, :, None, None]
        return (torch.stack(list(parts), dim=1) * weights_ME11).sum(dim=1)
