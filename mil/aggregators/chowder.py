"""Chowder: tile scores, their extremes, a small network on those (Courtiol et al. 2018, section 3; Durand et al. 2016).

Defaults are the Phikon paper's (Filiot et al. 2023): tile network 768-128-1 with a sigmoid, 10 + 10 extremes, head
20-128-64-1 with sigmoids. Owkin's Camelyon16 tutorial is `tile_hidden=[] n_top=5 n_bottom=5 head=[200,100]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mil.aggregators.batch import Parameters
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import deeper, numbered, shared_linear
from mil.aggregators.places import without_autocast
from mil.aggregators.ranges import NotBothZero
from mil.aggregators.segments import segment_extremes


class Chowder(Aggregator):
    """Scores every tile, keeps the n_top highest and n_bottom lowest scores of the bag, classifies those.

    With several classes each class has its own tile score and all classes share one head. All layers start from Xavier
    uniform weights and zero biases. A bag smaller than n_top or n_bottom repeats its last tile (`segment_extremes`).
    Products are float32 in mixed precision too: scores of three digits choose other tiles, and then another member is
    learned (by `benchmarks/precision.py` probabilities were 0.3 apart on average).

    | | as published (Phikon paper) | ours | why |
    | --- | --- | --- | --- |
    | tile network | 128, sigmoid | the same | |
    | extremes | 10 + 10 | the same | |
    | head | sigmoid 128-64 | the same | |
    | fewer tiles than extremes | not foreseen (1,000 tiles) | the last tile again | no value is made up |
    | several classes | a tile score each, one head | the same | |
    | parameters, 768 features, one logit | 109,570 | 109,570 | |

    Args:
        n_top, n_bottom: how many extreme scores are kept; one of them may be 0.
        tile_hidden: widths of the sigmoid layers of the tile network; empty = a linear score.
        head: widths of the sigmoid layers of the head.
    """

    score_name = "tile score"

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        n_top: Annotated[int, Ge(0)] = 10,
        n_bottom: Annotated[int, Ge(0), NotBothZero("n_top")] = 10,
        tile_hidden: tuple[Annotated[int, Ge(1)], ...] = (128,),
        head: tuple[Annotated[int, Ge(1)], ...] = (128, 64),
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.n_top, self.n_bottom = n_top, n_bottom
        self.members_at_a_time = 1 if tile_hidden else None
        self.floats_per_tile = n_outputs * 2
        self.floats_per_bag = (n_top + n_bottom) * n_outputs * (in_dim + 2 * sum(tile_hidden))
        self.tile_layers = numbered("tile", len(tile_hidden) + 1)
        self.add_layers(self.tile_layers, [in_dim, *tile_hidden, n_outputs], init="xavier")
        self.add_head(n_top + n_bottom, head, n_outputs=1, init="xavier")

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor]:
        # Only the extreme tiles have a gradient, so all tiles are scored without one and the few extremes once more.
        with without_autocast(tiles_TD.device):
            with torch.no_grad():
                scores_mTC = self.score_tiles(tiles_TD, p)
                scores_XT = scores_mTC.transpose(1, 2).flatten(0, 1)
                rows_XbK = segment_extremes(scores_XT, lengths_b, self.n_top, self.n_bottom)
            m, n_classes = len(scores_mTC), self.n_outputs
            rows_mCbK = rows_XbK.unflatten(0, (m, n_classes))
            extremes_mCbK = self.score_rows(tiles_TD, rows_mCbK, p)
        scores_mT = scores_mTC.squeeze(2) if n_classes == 1 else scores_mTC.amax(dim=2)
        return extremes_mCbK.transpose(1, 2).flatten(2), scores_mT

    def score_tiles(self, tiles_TD: Tensor, p: Parameters) -> Tensor:
        """Scores of all tiles, (T, D) -> (m, T, C)."""
        x_mTH = shared_linear(tiles_TD, *self.first_layer("tile0", p))
        return deeper(self.tile_layers[1:], x_mTH, p, torch.sigmoid)

    def score_rows(self, tiles_TD: Tensor, rows_mCbK: Tensor, p: Parameters) -> Tensor:
        """Score of class c only for the tiles that class c selected: -> (m, C, b, K)."""
        m, n_classes, b, k = rows_mCbK.shape
        x_mRH = tiles_TD[rows_mCbK.reshape(m, -1)]
        weight_mDH, bias_mH = self.first_layer("tile0", p)
        x_mRH = torch.baddbmm(bias_mH.unsqueeze(1), x_mRH, weight_mDH)
        x_mRC = deeper(self.tile_layers[1:], x_mRH, p, torch.sigmoid)
        x_mCbKC = x_mRC.view(m, n_classes, b, k, n_classes)
        return torch.diagonal(x_mCbKC, dim1=1, dim2=4).movedim(-1, 1)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        k = self.n_top + self.n_bottom
        x_MXK = pooled_MBP.unflatten(2, (self.n_outputs, k)).flatten(1, 2)
        with without_autocast(pooled_MBP.device):
            logits_MXC: Tensor = self.run_head(x_MXK, torch.sigmoid).unflatten(1, (-1, self.n_outputs)).squeeze(3)
        return logits_MXC

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        scores_MTC = self.score_tiles(tiles_TD, self.stacks())
        return self.with_cuts(self.head(scores_MTC.repeat_interleave(self.n_top + self.n_bottom, dim=2)))
