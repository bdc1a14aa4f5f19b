"""MeanPool and MaxPool: the baselines that any attention has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mil.aggregators.batch import Parameters
from mil.aggregators.contract import Aggregator
from mil.aggregators.places import Segments
from mil.aggregators.segments import segment_reduce


class MeanPool(Aggregator):
    """Mean of the tiles' features, then a linear classifier, or a ReLU network with layers `head`.

    | | as published (Phikon paper) | ours | why |
    | --- | --- | --- | --- |
    | classifier | linear | the same | |
    | parameters, 768 features, one logit | 769 | 769 | |
    """

    how = "mean"
    score_name = "all alike"

    def __init__(
        self, in_dim: int, n_outputs: int, seeds: Sequence[int], *, head: tuple[Annotated[int, Ge(1)], ...] = ()
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.add_head(in_dim, head)

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, None]:
        m = len(p["head0_weight"])
        if self.how == "max" and self.harmonized == "project":  # the maximum of a projection is not that of a maximum
            return segment_reduce(self.features(tiles_TD, p), lengths_b, self.how), None
        pooled_1bD = segment_reduce(tiles_TD.unsqueeze(0), lengths_b, self.how)
        return self.seen(pooled_1bD, p).expand(m, -1, -1), None

    def tile_scores(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """scores_mT: every tile counts the same, 1 / bag size."""
        if isinstance(lengths_b, Segments):
            return (1 / lengths_b.lengths_b)[lengths_b.bag_of_T].expand(len(p["head0_weight"]), -1)
        lengths = torch.tensor(lengths_b, device=tiles_TD.device)
        return (1 / lengths).repeat_interleave(lengths).expand(len(p["head0_weight"]), -1)

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        return self.with_cuts(self.head(self.features(tiles_TD, self.stacks()).expand(self.n_members, -1, -1)))

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.run_head(pooled_MBP, torch.relu)


class MaxPool(MeanPool):
    """Largest value of each feature over the tiles, then as MeanPool.

    | | as published | ours | why |
    | --- | --- | --- | --- |
    | pooling | of features, or of tile scores | of features | the mean's counterpart |
    | parameters, 768 features, one logit | - | 769 | |
    """

    how = "max"
    score_name = "share of the maxima"

    def __init__(
        self, in_dim: int, n_outputs: int, seeds: Sequence[int], *, head: tuple[Annotated[int, Ge(1)], ...] = ()
    ):
        super().__init__(in_dim, n_outputs, seeds, head=head)

    def tile_scores(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """scores_mT: the share of features for which the tile holds its bag's maximum."""
        x_mTD = self.features(tiles_TD, p) if self.harmonized == "project" else tiles_TD.unsqueeze(0)
        bags = x_mTD.split(list(lengths_b), dim=1)
        shares_mT = torch.cat([(bag == bag.amax(dim=1, keepdim=True)).float().mean(dim=2) for bag in bags], dim=1)
        return shares_mT.expand(len(p["head0_weight"]), -1)
