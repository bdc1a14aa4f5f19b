"""MeanPool and MaxPool: the baselines that any attention has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mil.aggregators.batch import Parameters
from mil.aggregators.contract import Aggregator
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
        pooled_1bD = segment_reduce(tiles_TD.unsqueeze(0), lengths_b, self.how)
        return pooled_1bD.expand(m, -1, -1), None

    def tile_scores(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """scores_mT: every tile counts the same, 1 / bag size."""
        lengths = torch.tensor(lengths_b, device=tiles_TD.device)
        return (1 / lengths).repeat_interleave(lengths).expand(len(p["head0_weight"]), -1)

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        return self.head(tiles_TD.expand(self.n_members, -1, -1))

    def head(self, pooled_MBP: Tensor) -> Tensor:
        if self.standardized:
            pooled_MBP = (pooled_MBP - self.input_mean_MD.unsqueeze(1)) * self.input_scale_MD.unsqueeze(1)
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
        shares = [(bag == bag.amax(dim=0)).float().mean(dim=1) for bag in tiles_TD.split(list(lengths_b))]
        return torch.cat(shares).expand(len(p["head0_weight"]), -1)
