"""ABMIL: attention-based MIL (Ilse, Tomczak, Welling, ICML 2018, sections 2.4 and equations 8 and 9).

Layer sizes are the Phikon paper's (Filiot et al. 2023): linear 768 -> 128, gated attention 128, ReLU head 128-64-1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mil.aggregators.layers import (
    Aggregator,
    Parameters,
    member_linear,
    segment_softmax,
    segment_sum,
    shared_linear,
    tanh,
)


class ABMIL(Aggregator):
    """Attention over tiles, then a small network on the attended mean.

    Args:
        hidden: width of the tile embedding (a linear layer; `embed_relu` adds a ReLU, as CLAM's users expect).
        attention: width of the attention layers.
        gated: tanh(Vh) * sigmoid(Uh) (equation 9) instead of tanh(Vh) (equation 8).
        head: widths of the ReLU layers between the attended mean and the logits.
    """

    one_member_at_a_time = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: int = 128,
        attention: int = 128,
        gated: bool = True,
        embed_relu: bool = False,
        head: tuple[int, ...] = (64,),
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.gated, self.embed_relu = gated, embed_relu
        self.floats_per_tile = 2 * hidden + 6 * attention
        self.add_linear("embed", in_dim, hidden)
        self.add_linear("attend", hidden, attention)
        if gated:
            self.add_linear("gate", hidden, attention)
        self.add_linear("score", attention, 1)
        self.add_head(hidden, head)

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor]:
        h_mTH = shared_linear(tiles_TD, *self.first_layer("embed", p))
        if self.embed_relu:
            h_mTH = torch.relu(h_mTH)
        a_mTA = tanh(member_linear(h_mTH, p["attend_weight"], p["attend_bias"]))
        if self.gated:
            a_mTA = a_mTA * torch.sigmoid(member_linear(h_mTH, p["gate_weight"], p["gate_bias"]))
        scores_mT = member_linear(a_mTA, p["score_weight"], p["score_bias"]).squeeze(2)
        weights_mT = segment_softmax(scores_mT, lengths_b)
        return segment_sum(weights_mT, h_mTH, lengths_b), weights_mT

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.run_head(pooled_MBP, torch.relu)
