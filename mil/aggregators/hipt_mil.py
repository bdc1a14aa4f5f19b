"""HIPT-MIL: the slide level of the Hierarchical Image Pyramid Transformer, over tiles, as the Phikon paper compares it.

Chen et al., CVPR 2022, section 3 (the last of three levels: 2 layers, 3 heads, width 192, no positions); encoder layers
as in Vaswani et al. 2017, normalised after each part; gated attention by Ilse et al. 2018, equation 9. Layers and
dropout are those of HIPT's published code, which the Phikon paper (Filiot et al. 2023) runs on single tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional

from mil.aggregators.batch import Parameters
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import attention_scores, heads_of_bags, join_heads, layer, norm, shared_linear
from mil.aggregators.places import without_autocast
from mil.aggregators.ranges import MultipleOf
from mil.aggregators.segments import segment_softmax, segment_sum

QUERIES = 128
"""Tiles that look at their bag at a time while training; part of what chance depends on."""


class HIPTMIL(Aggregator):
    """A ReLU embedding, a transformer encoder over the tiles without their places, gated attention, a ReLU layer.

    Every tile looks at every other. The memory grows in proportion to the tiles (no matrix of tiles by tiles is kept),
    the time with their square: in training 10,000 tiles cost a hundred times 1,000. The paper draws 1,000 tiles a
    slide; data.max_tiles does so.

    | | as published (Phikon paper) | ours | why |
    | --- | --- | --- | --- |
    | embedding, encoder, attention, last layer | 192 each, 2 layers of 3 heads | the same | |
    | dropout | 0.25 in all of them | the same | |
    | dropped attention weights | the whole matrix | 128 rows at a time, made again | memory |
    | batch | one slide | any | |
    | starting values | torch's | the same | |
    | parameters, 768 features, one logit | 705,410 | 705,410 | |

    Args:
        hidden: width of the tokens, a multiple of heads.
        heads: of the attention. layers: of the encoder.
        mlp: width of each encoder layer's ReLU layer.
        attention: width of the gated attention.
        dropout: of the embedding, the encoder (attention weights, ReLU layer, what each part adds), both branches of
            the gated attention and the last layer, in training only.
    """

    members_at_a_time = 1
    draws = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: Annotated[int, Ge(1), MultipleOf("heads")] = 192,
        heads: Annotated[int, Ge(1)] = 3,
        layers: Annotated[int, Ge(1)] = 2,
        mlp: Annotated[int, Ge(1)] = 192,
        attention: Annotated[int, Ge(1)] = 192,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.25,
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.heads, self.layers, self.dropout = heads, layers, dropout
        self.add_linear("embed", in_dim, hidden)
        for i in range(layers):
            self.add_linear(f"layer{i}_qkv", hidden, 3 * hidden, init="xavier")
            self.add_linear(f"layer{i}_out", hidden, hidden)
            nn.init.zeros_(self.get_parameter(f"layer{i}_out_bias"))  # as in torch.nn.MultiheadAttention
            self.add_norm(f"layer{i}_norm", hidden)
            self.add_linear(f"layer{i}_mlp0", hidden, mlp)
            self.add_linear(f"layer{i}_mlp1", mlp, hidden)
            self.add_norm(f"layer{i}_mlp_norm", hidden)
        self.add_attention("pool_", hidden, attention)
        self.add_linear("rho", hidden, hidden)
        self.add_linear("head0", hidden, n_outputs)
        self.floats_per_tile = 3 * hidden + layers * (16 * hidden + 3 * mlp) + 9 * attention
        self.floats_per_bag = 4 * hidden

    def pool(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None = None
    ) -> tuple[Tensor, Tensor]:
        drop = self.dropping(lengths_b, chance)
        x_mTH = drop(torch.relu(shared_linear(tiles_TD, *self.first_layer("embed", p))), "embed")
        for i in range(self.layers):
            looked_mTH = self.look(f"layer{i}", x_mTH, lengths_b, p, chance)
            x_mTH = norm(f"layer{i}_norm", x_mTH + drop(looked_mTH, f"layer{i}"), p)
            wide_mTX = drop(torch.relu(layer(f"layer{i}_mlp0", x_mTH, p)), f"layer{i}_mlp0")
            x_mTH = norm(f"layer{i}_mlp_norm", x_mTH + drop(layer(f"layer{i}_mlp1", wide_mTX, p), f"layer{i}_mlp1"), p)
        weights_mT = segment_softmax(attention_scores("pool_", x_mTH, p, drop=drop), lengths_b)
        rho_mbH = torch.relu(layer("rho", segment_sum(weights_mT, x_mTH, lengths_b), p))
        return self.drop(rho_mbH, [1] * len(lengths_b), chance, "rho"), weights_mT

    def look(self, name: str, x_mTH: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None) -> Tensor:
        """Self-attention between the tiles of each bag, (m, T, H)."""
        looked = []
        for b, qkv_maLE in enumerate(heads_of_bags(layer(f"{name}_qkv", x_mTH, p), self.heads, lengths_b)):
            if chance and self.dropout:
                looked_maLE = AttentionWithDropout.apply(*qkv_maLE, chance.of_bags([b]), self.dropout, name)
            else:
                looked_maLE = functional.scaled_dot_product_attention(*qkv_maLE)
            looked.append(join_heads(looked_maLE))
        return layer(f"{name}_out", torch.cat(looked, dim=1), p)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.linear("head0", pooled_MBP)


class AttentionWithDropout(torch.autograd.Function):
    """Attention of one bag with dropout of its weights, QUERIES rows of the matrix at a time, made again in backward.

    torch's fused attention has no dropout on a CPU, and its draws know nothing of members and slides.

        attention = (softmax(Q K' / sqrt(E)) * factors) V

    Axes: m members, a heads, L tiles, E features of a head, Q rows. Products are in Q's type, the softmax in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, q_maLE: Tensor, k_maLE: Tensor, v_maLE: Tensor, chance: Chance, dropout: float, what: str
    ) -> Tensor:
        ctx.save_for_backward(q_maLE, k_maLE, v_maLE)
        ctx.draws = chance, dropout, what
        attended_maLE = torch.empty_like(q_maLE)
        with without_autocast(q_maLE.device):
            for part, q_maQE in enumerate(q_maLE.split(QUERIES, dim=2)):
                weights_maQL, factors_maQL = rows_of_weights(q_maQE, k_maLE, part, *ctx.draws)
                dropped_maQL = weights_maQL.mul_(factors_maQL).to(v_maLE.dtype)
                attended_maLE[:, :, part * QUERIES : (part + 1) * QUERIES] = dropped_maQL @ v_maLE
        return attended_maLE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_maLE, k_maLE, v_maLE = ctx.saved_tensors
        scale = q_maLE.shape[3] ** -0.5
        dq_maLE, dk_maLE, dv_maLE = torch.empty_like(q_maLE), torch.zeros_like(k_maLE), torch.zeros_like(v_maLE)
        with without_autocast(q_maLE.device):
            parts = zip(q_maLE.split(QUERIES, dim=2), gradients[0].split(QUERIES, dim=2), strict=True)
            for part, (q_maQE, up_maQE) in enumerate(parts):
                weights_maQL, factors_maQL = rows_of_weights(q_maQE, k_maLE, part, *ctx.draws)
                dropped_maQL = (weights_maQL * factors_maQL).to(v_maLE.dtype)
                dv_maLE += dropped_maQL.transpose(2, 3) @ up_maQE
                dweights_maQL = (up_maQE @ v_maLE.transpose(2, 3)).float().mul_(factors_maQL)
                inside_maQ1 = (dweights_maQL * weights_maQL).sum(dim=3, keepdim=True)
                dscores_maQL = dweights_maQL.sub_(inside_maQ1).mul_(weights_maQL).mul_(scale).to(q_maLE.dtype)
                dq_maLE[:, :, part * QUERIES : (part + 1) * QUERIES] = dscores_maQL @ k_maLE
                dk_maLE += dscores_maQL.transpose(2, 3) @ q_maQE
        return dq_maLE, dk_maLE, dv_maLE, None, None, None


def rows_of_weights(
    q_maQE: Tensor, k_maLE: Tensor, part: int, chance: Chance, dropout: float, what: str
) -> tuple[Tensor, Tensor]:
    """Attention weights of some tiles, float32, and what dropout multiplies them with: (m, a, Q, L) each."""
    scores_maQL = (q_maQE @ k_maLE.transpose(2, 3)).float().mul_(q_maQE.shape[3] ** -0.5)
    weights_maQL = torch.softmax(scores_maQL, dim=3)
    rows_mRL = weights_maQL.flatten(1, 2)
    factors_mRL = chance.factors(rows_mRL, rows_mRL.shape[1:2], dropout, f"{what}_weights{part}")
    return weights_maQL, factors_mRL.view_as(weights_maQL)
