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
from mil.aggregators.layers import cross_entropy, deeper, layer, numbered, shared_linear, tanh
from mil.aggregators.places import Segments
from mil.aggregators.segments import chosen_rows, segment_extremes, segment_softmax


class DSMIL(Aggregator):
    """Two streams: the bag's best tile by a linear score, and a mean of all tiles weighted by their likeness to it.

    The logit is the mean of both streams' (equation 7); training minimises the mean of both streams' cross-entropies.
    With several classes each has its own critical tile and weights, and all see all classes' means.

    Two forms are published, the authors' (the default) and the Phikon paper's (configs/camelyon16-paper.yaml):

    | | as published | as the Phikon paper | ours | why |
    | --- | --- | --- | --- | --- |
    | tile score | linear | sigmoid 200-100 | both: `tile_hidden` | |
    | queries | ReLU and tanh, 128 | sigmoid 200-100, then 32 | both: `query_hidden`, `attention` | |
    | likeness | divided by sqrt(width) | as it is | both: `scaled` | |
    | averaged | the tiles, or a linear layer of them | the tiles | the tiles, or a ReLU layer: `values` | equation 3 |
    | bag's logit | linear | sigmoid 200-100 | both: `head` | |
    | several classes | all see all means | a shared head, each its own mean | all see all means | as the authors |
    | logit | the bag's; the paper: the mean of both | the mean of both | the mean | equation 7 |
    | loss | mean of two | one, of the mean logit | both: `one_loss` | |
    | parameters, 768 features, one logit | 116,482 | 549,742 | 116,482 | |

    Of the 549,742 nothing reads 24,608 (`idle_values`).

    Args:
        attention: width of the queries that are compared.
        nonlinear: queries from two layers with ReLU and tanh (published code) instead of one linear layer (equation 3).
        values: average a ReLU layer of the tiles (W_v of equation 3, width of the features) instead of the tiles.
        tile_hidden: widths of sigmoid layers before the tile score; empty = a linear score.
        query_hidden: widths of sigmoid layers before the queries, which then are linear; empty: see `nonlinear`.
        head: widths of sigmoid layers between the weighted mean and its logit; empty = a linear one.
        scaled: divide the likeness by sqrt(attention) before the softmax.
        one_loss: minimise the cross-entropy of the mean logit instead of the mean of two.
        idle_values: width of a linear layer of the tiles that nothing reads and nothing trains. The Phikon paper's code
            has one of 32 by oversight; it is here so that the number of parameters is the published one.
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
        tile_hidden: tuple[Annotated[int, Ge(1)], ...] = (),
        query_hidden: tuple[Annotated[int, Ge(1)], ...] = (),
        head: tuple[Annotated[int, Ge(1)], ...] = (),
        scaled: bool = True,
        one_loss: bool = False,
        idle_values: Annotated[int, Ge(0)] = 0,
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.nonlinear, self.values = nonlinear and not query_hidden, values
        self.divisor, self.one_loss = math.sqrt(attention) if scaled else 1.0, one_loss
        self.tile_layers = [*numbered("instance_hidden", len(tile_hidden)), "instance"]
        self.query_layers = numbered("query", len(query_hidden) + 1)
        self.bag_layers = [*numbered("bag_hidden", len(head)), "bag"]
        self.add_layers(self.tile_layers, [in_dim, *tile_hidden, n_outputs])
        self.add_layers(self.query_layers, [in_dim, *query_hidden, attention])
        if self.nonlinear:
            self.add_linear("query1", attention, attention)
        if values:
            self.add_linear("value", in_dim, in_dim)
        if idle_values:
            self.add_linear("idle_value", in_dim, idle_values)
        self.add_layers(self.bag_layers, [n_outputs * in_dim, *head, n_outputs])
        self.floats_per_tile = 4 * attention + 5 * n_outputs + 2 * in_dim * values
        self.floats_per_tile += 2 * (sum(tile_hidden) + sum(query_hidden))
        self.floats_per_bag = n_outputs * (in_dim + 2 * attention) + 2 * sum(head)

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor]:
        """Columns: each class's weighted mean (C x D), then each class's highest tile score (C)."""
        scores_mTC = self.perceptron(self.tile_layers, tiles_TD, p)
        queries_mTA = self.queries(tiles_TD, p)
        values_mTD = torch.relu(shared_linear(tiles_TD, *self.first_layer("value", p))) if self.values else None
        given = scores_mTC, queries_mTA, tiles_TD if values_mTD is None else values_mTD
        if isinstance(lengths_b, Segments):
            means_mbCD, tops_mbC, weights_mT = on_device(*given, lengths_b, self.divisor)
        else:
            means_mbCD, tops_mbC, weights_mT = bag_by_bag(*given, lengths_b, self.divisor)
        if self.mapped and not self.values:  # weights sum to 1, so the mean may be mapped after all
            means_mbCD = self.seen(means_mbCD.flatten(1, 2), p).view_as(means_mbCD)
        return torch.cat([means_mbCD.flatten(2), tops_mbC], dim=2), weights_mT

    def queries(self, tiles_TD: Tensor, p: Parameters) -> Tensor:
        queries_mTA = self.perceptron(self.query_layers, tiles_TD, p)
        return tanh(layer("query1", torch.relu(queries_mTA), p)) if self.nonlinear else queries_mTA

    def perceptron(self, names: Sequence[str], tiles_TD: Tensor, p: Parameters) -> Tensor:
        """Layers NAMES with sigmoids between them: (T, D) -> (m, T, O)."""
        return deeper(names[1:], shared_linear(tiles_TD, *self.first_layer(names[0], p)), p, torch.sigmoid)

    def streams(self, pooled_MBP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M, B, C) of the bag stream and of the critical tiles."""
        means_MBX, tops_MBC = pooled_MBP.split([self.n_outputs * self.in_dim, self.n_outputs], dim=2)
        return self.run_layers(self.bag_layers, means_MBX, torch.sigmoid), tops_MBC

    def head(self, pooled_MBP: Tensor) -> Tensor:
        bag_MBC, top_MBC = self.streams(pooled_MBP)
        return (bag_MBC + top_MBC) / 2

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        p = self.stacks()
        tops_MTC = self.perceptron(self.tile_layers, tiles_TD, p)
        if self.values:
            means_MTD = torch.relu(shared_linear(tiles_TD, *self.first_layer("value", p)))
        else:
            means_MTD = self.features(tiles_TD, p).expand(self.n_members, -1, -1)
        return self.with_cuts(self.head(torch.cat([means_MTD.repeat(1, 1, self.n_outputs), tops_MTC], dim=2)))

    def losses(self, prediction: Prediction, labels: Tensor) -> Tensor:
        if self.one_loss:
            return super().losses(prediction, labels)
        assert prediction.pooled_MBP is not None
        streams = map(prediction.with_covariates, self.streams(prediction.pooled_MBP))
        bag_MB, top_MB = (cross_entropy(x.float(), labels) for x in streams)
        return (bag_MB + top_MB) / 2

    def readings(self, prediction: Prediction) -> list[tuple[float, Tensor]]:
        if self.one_loss:
            return super().readings(prediction)
        assert prediction.pooled_MBP is not None
        streams = map(prediction.with_covariates, self.streams(prediction.pooled_MBP))
        return [(0.5, self.with_cuts(x)) for x in streams]


def bag_by_bag(
    scores_mTC: Tensor, queries_mTA: Tensor, values: Tensor, lengths_b: Sequence[int], divisor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Means (m, b, C, D), highest scores (m, b, C) and weights (m, T), the mean of the classes'.

    values: what is averaged, (T, D), or (m, T, D) where each member has its own.
    """
    means, tops, weights, start = [], [], [], 0
    for length in lengths_b:
        bag = slice(start, start + length)
        top_mC, weights_mLC = compare(scores_mTC[:, bag], queries_mTA[:, bag], divisor)
        weights_mCL = weights_mLC.transpose(1, 2)
        if values.dim() == 2:
            means.append((weights_mCL.flatten(0, 1) @ values[bag]).unflatten(0, weights_mCL.shape[:2]))
        else:
            means.append(weights_mCL @ values[:, bag])
        tops.append(top_mC)
        weights.append(weights_mLC.mean(dim=2))
        start += length
    return torch.stack(means, dim=1), torch.stack(tops, dim=1), torch.cat(weights, dim=1)


def on_device(
    scores_mTC: Tensor, queries_mTA: Tensor, values: Tensor, lengths_b: Segments, divisor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`bag_by_bag` in operations over all bags.

    Every tile is compared with the critical tiles of all bags, which are few, and keeps what its own bag's say.
    """
    m, _, n_classes = scores_mTC.shape
    n_bags = len(lengths_b)
    scores_XT = scores_mTC.detach().transpose(1, 2).flatten(0, 1)
    rows_mR = segment_extremes(scores_XT, lengths_b, 1, 0).view(m, n_classes, n_bags).transpose(1, 2).flatten(1)
    own_CC = torch.eye(n_classes, device=scores_mTC.device)
    tops_mbC = (chosen_rows(scores_mTC, rows_mR).view(m, n_bags, n_classes, n_classes) * own_CC).sum(dim=3)
    critical_mRA = chosen_rows(queries_mTA, rows_mR)
    likeness_mTbC = (queries_mTA @ critical_mRA.transpose(1, 2) / divisor).unflatten(2, (n_bags, n_classes))
    inside_TbC = lengths_b.inside_bT.t().unsqueeze(2)
    likeness_mTC = (likeness_mTbC * inside_TbC).sum(dim=2)
    weights_XT = segment_softmax(likeness_mTC.transpose(1, 2).flatten(0, 1), lengths_b)
    weights_mCT = weights_XT.view(m, n_classes, -1)
    spread_mCbT = weights_mCT.unsqueeze(2) * lengths_b.inside_bT
    if values.dim() == 2:
        means_mCbD = (spread_mCbT.flatten(0, 2) @ values).view(m, n_classes, n_bags, -1)
    else:
        means_mCbD = (spread_mCbT.flatten(1, 2) @ values).view(m, n_classes, n_bags, -1)
    return means_mCbD.transpose(1, 2), tops_mbC, weights_mCT.mean(dim=1)


def compare(scores_mLC: Tensor, queries_mLA: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    """Of one bag: the highest score of each class (m, C), and every tile's likeness to that tile (m, L, C), sum 1."""
    top_mC, rows_mC = scores_mLC.max(dim=1)
    width = queries_mLA.shape[2]
    critical_mCA = queries_mLA.gather(1, rows_mC.unsqueeze(2).expand(-1, -1, width))
    likeness_mLC = queries_mLA @ critical_mCA.transpose(1, 2) / divisor
    return top_mC, torch.softmax(likeness_mLC, dim=1)
