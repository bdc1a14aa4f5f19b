"""Evidence: the most convincing tile for each of several concepts, added up. It cannot learn from what is absent.

Built to respect the assumption of multiple-instance learning that Raff and Holt (NeurIPS 2023) test for: a tile may
make a slide positive, but no tile may make it negative (`python -m mil.selftest`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mil.aggregators.batch import Parameters
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import deeper, numbered, shared_linear, tanh
from mil.aggregators.segments import segment_extremes


class Evidence(Aggregator):
    """A max of non-negative evidence and a monotone head.

    Every tile has an evidence between 0 and 1 for each concept; a bag has the highest of its tiles; the logit is their
    sum with non-negative weights, and a bias. So one more tile never lowers a logit, whatever it shows, and a tile that
    is there many times counts once. Several concepts let the head ask for more than one kind of tile ("both A and C").
    Only the highest tiles have a gradient, so a bag of any size needs no more memory than its scores.

    | | as published | ours | why |
    | --- | --- | --- | --- |
    | assumption | no tile speaks against (Raff and Holt) | the same, by construction | |
    | network | - | tanh 128, 16 concepts, non-negative head | asks for several kinds of tiles |
    | parameters, 768 features, one logit | - | 100,513 | |

    Args:
        concepts: how many kinds of evidence.
        tile_hidden: widths of the tanh layers of the tile network.
    """

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        concepts: Annotated[int, Ge(1)] = 16,
        tile_hidden: tuple[Annotated[int, Ge(1)], ...] = (128,),
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.concepts, self.members_at_a_time = concepts, 1 if tile_hidden else None
        self.floats_per_tile = 2 * concepts
        self.floats_per_bag = concepts * (in_dim + 2 * sum(tile_hidden) + 3 * concepts)
        widths = [in_dim, *tile_hidden, concepts]
        self.tile_layers = numbered("tile", len(widths) - 1)
        self.add_linear("tile0", *widths[:2], bias=False)
        self.add_layers(self.tile_layers[1:], widths[1:])
        # Steps at many places, and evidence neither certain nor absent, or a concept between two others (A below C)
        # has no gradient to be found by: with torch's own starting values the second self-test is never learnt.
        self.add_stack("tile0_bias", (widths[1],), lambda bias, g: bias.uniform_(-3, 3, generator=g))
        self.add_stack("head0_weight", (concepts, n_outputs), lambda weight, g: weight.uniform_(0, 1, generator=g))
        self.add_stack("head0_bias", (n_outputs,), lambda bias, g: bias.fill_(-0.35 * concepts))

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # as in Chowder: all tiles are scored without a gradient and the chosen ones once more
            scores_mTK = self.deeper(shared_linear(tiles_TD, *self.first_layer("tile0", p)), p)
            rows_Xb1 = segment_extremes(scores_mTK.transpose(1, 2).flatten(0, 1), lengths_b, 1, 0)
        m = len(scores_mTK)
        weight_mDH, bias_mH = self.first_layer("tile0", p)
        chosen_mRD = tiles_TD[rows_Xb1.reshape(m, -1)]
        scores_mRK = self.deeper(torch.baddbmm(bias_mH.unsqueeze(1), chosen_mRD, weight_mDH), p)
        scores_mKbK = scores_mRK.unflatten(1, (self.concepts, len(lengths_b)))
        highest_mbK = torch.diagonal(scores_mKbK, dim1=1, dim2=3)
        weight_mK = p["head0_weight"].detach().abs().mean(dim=2)
        return torch.sigmoid(highest_mbK), (torch.sigmoid(scores_mTK) @ weight_mK.unsqueeze(2)).squeeze(2)

    def deeper(self, x_mTH: Tensor, p: Parameters) -> Tensor:
        """The tile network after its first layer: scores (m, T, K)."""
        return deeper(self.tile_layers[1:], x_mTH, p, tanh)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        weight_MKC, bias_MC = self.get_parameter("head0_weight").abs(), self.get_parameter("head0_bias")
        return torch.baddbmm(bias_MC.unsqueeze(1), pooled_MBP, weight_MKC)
