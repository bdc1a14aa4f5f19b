"""DSMIL: the critical tile and attention to what resembles it (Li, Li, Eliceiri, CVPR 2021, section 3.2, eq. 2-7).

Widths and the query's ReLU and tanh are those of the authors' published code, as is the scale 1/sqrt(A) in the softmax,
which equation 4 does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mil.aggregators.batch import Parameters, Prediction
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import cross_entropy, member_linear, shared_linear, tanh


class DSMIL(Aggregator):
    """Two streams: the bag's best tile by a linear score, and a mean of all tiles weighted by their likeness to it.

    The logit is the mean of both streams' (equation 7); training minimises the mean of both streams' cross-entropies.
    With several classes each has its own critical tile and weights, and all see all classes' means.

    Args:
        attention: width of the queries that are compared.
        nonlinear: queries from two layers with ReLU and tanh (published code) instead of one linear layer (equation 3).
        values: average a ReLU layer of the tiles (W_v of equation 3, width of the features) instead of the tiles.
    """

    members_at_a_time = 1

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        attention: Annotated[int, Ge(1)] = 128,
        nonlinear: bool = True,
        values: bool = False,
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.nonlinear, self.values = nonlinear, values
        self.add_linear("instance", in_dim, n_outputs)
        self.add_linear("query0", in_dim, attention)
        if nonlinear:
            self.add_linear("query1", attention, attention)
        if values:
            self.add_linear("value", in_dim, in_dim)
        self.add_linear("bag", n_outputs * in_dim, n_outputs)
        self.floats_per_tile = 4 * attention + 5 * n_outputs + 2 * in_dim * values
        self.floats_per_bag = n_outputs * (in_dim + 2 * attention)

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor]:
        """Columns: each class's weighted mean (C x D), then each class's highest tile score (C)."""
        scores_mTC = shared_linear(tiles_TD, *self.first_layer("instance", p))
        queries_mTA = self.queries(tiles_TD, p)
        values_mTD = torch.relu(shared_linear(tiles_TD, *self.first_layer("value", p))) if self.values else None
        means, tops, weights, start = [], [], [], 0
        for length in lengths_b:
            bag = slice(start, start + length)
            top_mC, weights_mLC = compare(scores_mTC[:, bag], queries_mTA[:, bag])
            weights_mCL = weights_mLC.transpose(1, 2)
            if values_mTD is None:
                means.append((weights_mCL.flatten(0, 1) @ tiles_TD[bag]).unflatten(0, weights_mCL.shape[:2]))
            else:
                means.append(weights_mCL @ values_mTD[:, bag])
            tops.append(top_mC)
            weights.append(weights_mLC.mean(dim=2))
            start += length
        means_mbCD = torch.stack(means, dim=1)
        if self.standardized and not self.values:  # weights sum to 1, so the mean may be standardised after all
            centred_mbCD = means_mbCD - p["input_mean_MD"][:, None, None]
            means_mbCD = centred_mbCD * p["input_scale_MD"][:, None, None]
        return torch.cat([means_mbCD.flatten(2), torch.stack(tops, dim=1)], dim=2), torch.cat(weights, dim=1)

    def queries(self, tiles_TD: Tensor, p: Parameters) -> Tensor:
        queries_mTA = shared_linear(tiles_TD, *self.first_layer("query0", p))
        if not self.nonlinear:
            return queries_mTA
        return tanh(member_linear(torch.relu(queries_mTA), p["query1_weight"], p["query1_bias"]))

    def streams(self, pooled_MBP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, B, C) of the bag stream and of the critical tiles."""
        means_MBX, tops_MBC = pooled_MBP.split([self.n_outputs * self.in_dim, self.n_outputs], dim=2)
        return self.linear("bag", means_MBX), tops_MBC

    def head(self, pooled_MBP: Tensor) -> Tensor:
        bag_MBC, top_MBC = self.streams(pooled_MBP)
        return (bag_MBC + top_MBC) / 2

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        p = self.stacks()
        tops_MTC = shared_linear(tiles_TD, *self.first_layer("instance", p))
        if self.values:
            means_MTD = torch.relu(shared_linear(tiles_TD, *self.first_layer("value", p)))
        else:
            means_MTD = (tiles_TD - self.input_mean_MD.unsqueeze(1)) * self.input_scale_MD.unsqueeze(1)
        return self.head(torch.cat([means_MTD.repeat(1, 1, self.n_outputs), tops_MTC], dim=2))

    def losses(self, prediction: Prediction, labels_B: Tensor) -> Tensor:
        assert prediction.pooled_MBP is not None
        bag_MB, top_MB = (cross_entropy(x.float(), labels_B) for x in self.streams(prediction.pooled_MBP))
        return (bag_MB + top_MB) / 2


def compare(scores_mLC: Tensor, queries_mLA: Tensor) -> tuple[Tensor, Tensor]:
    """Of one bag: the highest score of each class (m, C), and every tile's likeness to that tile (m, L, C), sum 1."""
    top_mC, rows_mC = scores_mLC.max(dim=1)
    width = queries_mLA.shape[2]
    critical_mCA = queries_mLA.gather(1, rows_mC.unsqueeze(2).expand(-1, -1, width))
    likeness_mLC = queries_mLA @ critical_mCA.transpose(1, 2) / math.sqrt(width)
    return top_mC, torch.softmax(likeness_mLC, dim=1)
