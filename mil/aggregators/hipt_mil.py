"""HIPT-MIL: the slide level of the Hierarchical Image Pyramid Transformer, over tiles, as the Phikon paper compares it.

Chen et al., CVPR 2022, section 3 (the last of three levels: 2 layers, 3 heads, width 192, no positions); encoder layers
as in Vaswani et al. 2017, normalised after each part; gated attention by Ilse et al. 2018, equation 9. Layers and
dropout are those of HIPT's published code, which the Phikon paper (Filiot et al. 2023) runs on single tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from mil.aggregators.batch import Parameters
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import attention_scores, heads_of_bags, join_heads, layer, norm, shared_linear, split_heads
from mil.aggregators.places import Padded, Segments, without_autocast
from mil.aggregators.ranges import MultipleOf
from mil.aggregators.repeatable import attend
from mil.aggregators.segments import device_attention, segment_softmax, segment_sum

Draw = Callable[[Tensor, int], Tensor]
"""What dropout multiplies the weights (g, a, Q, L) of one part of the rows with; the part's number from 0."""

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
        qkv_mTX, drawn = layer(f"{name}_qkv", x_mTH, p), chance if self.dropout else None
        if isinstance(lengths_b, Segments):
            look = partial(self.look_in_bags, name, chance=drawn)
            return layer(f"{name}_out", device_attention(qkv_mTX, lengths_b, look), p)
        looked = []
        for b, qkv_maLE in enumerate(heads_of_bags(qkv_mTX, self.heads, lengths_b)):
            draw = partial(draw_alone, drawn.of_bags([b]), self.dropout, name) if drawn else None
            looked.append(join_heads(attention(*qkv_maLE, draw)))
        return layer(f"{name}_out", torch.cat(looked, dim=1), p)

    def look_in_bags(self, name: str, qkv_mbLX: Tensor, some: Padded, chance: Chance | None) -> Tensor:
        """Of bags on a device, filled up to one length: (m, b, L, X) -> (m, b, L, H)."""
        m, b = qkv_mbLX.shape[:2]
        q_gaLE, k_gaLE, v_gaLE = (split_heads(x, self.heads) for x in qkv_mbLX.flatten(0, 1).chunk(3, dim=2))
        draw = partial(draw_together, chance, some, self.dropout, name) if chance else None
        looked_gaLE = attention(q_gaLE, k_gaLE, v_gaLE, draw, some.mask(m))
        looked_mbLH: Tensor = join_heads(looked_gaLE).unflatten(0, (m, b))
        return looked_mbLH

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.linear("head0", pooled_MBP)


def attention(
    q_gaLE: Tensor, k_gaLE: Tensor, v_gaLE: Tensor, draw: Draw | None, there_g11L: Tensor | None = None
) -> Tensor:
    """Of tiles to tiles, (g, a, L, E), with dropout where something draws. there_g11L: which keys there are."""
    if draw is None:
        return attend(q_gaLE, k_gaLE, v_gaLE, there_g11L)
    attended_gaLE: Tensor = AttentionWithDropout.apply(q_gaLE, k_gaLE, v_gaLE, draw, there_g11L)
    return attended_gaLE


def draw_alone(chance: Chance, dropout: float, what: str, weights_maQL: Tensor, part: int) -> Tensor:
    """For the one bag of `chance`."""
    rows_mRL = weights_maQL.flatten(1, 2)
    factors_mRL = chance.factors(rows_mRL, rows_mRL.shape[1:2], dropout, f"{what}_weights{part}")
    return factors_mRL.view_as(weights_maQL)


def draw_together(chance: Chance, some: Padded, dropout: float, what: str, weights_gaQL: Tensor, part: int) -> Tensor:
    """`draw_alone` of every bag of a set."""
    like_mbaQL = weights_gaQL.unflatten(0, (-1, len(some.bags_b)))
    first = part * QUERIES
    return chance.factors_of_pairs(like_mbaQL, some, first, QUERIES, dropout, f"{what}_weights{part}").flatten(0, 1)


class AttentionWithDropout(torch.autograd.Function):
    """Attention with dropout of its weights, QUERIES rows of the matrix at a time, made again in backward.

    torch's fused attention has no dropout on a CPU, and its draws know nothing of members and slides.

        attention = (softmax(Q K' / sqrt(E)) * factors) V

    Axes: g members, or members x bags of like length filled up to L, a heads, L tiles, E features of a head, Q rows.
    Products are in Q's type, the softmax in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, q_gaLE: Tensor, k_gaLE: Tensor, v_gaLE: Tensor, draw: Draw, there_g11L: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q_gaLE, k_gaLE, v_gaLE)
        ctx.draws = draw, there_g11L
        attended_gaLE = torch.empty_like(q_gaLE)
        with without_autocast(q_gaLE.device):
            for part, q_gaQE in enumerate(q_gaLE.split(QUERIES, dim=2)):
                weights_gaQL, factors_gaQL = rows_of_weights(q_gaQE, k_gaLE, part, *ctx.draws)
                dropped_gaQL = weights_gaQL.mul_(factors_gaQL).to(v_gaLE.dtype)
                attended_gaLE[:, :, part * QUERIES : (part + 1) * QUERIES] = dropped_gaQL @ v_gaLE
        return attended_gaLE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_gaLE, k_gaLE, v_gaLE = ctx.saved_tensors
        scale = q_gaLE.shape[3] ** -0.5
        dq_gaLE, dk_gaLE, dv_gaLE = torch.empty_like(q_gaLE), torch.zeros_like(k_gaLE), torch.zeros_like(v_gaLE)
        with without_autocast(q_gaLE.device):
            parts = zip(q_gaLE.split(QUERIES, dim=2), gradients[0].split(QUERIES, dim=2), strict=True)
            for part, (q_gaQE, up_gaQE) in enumerate(parts):
                weights_gaQL, factors_gaQL = rows_of_weights(q_gaQE, k_gaLE, part, *ctx.draws)
                dropped_gaQL = (weights_gaQL * factors_gaQL).to(v_gaLE.dtype)
                dv_gaLE += dropped_gaQL.transpose(2, 3) @ up_gaQE
                dweights_gaQL = (up_gaQE @ v_gaLE.transpose(2, 3)).float().mul_(factors_gaQL)
                inside_gaQ1 = (dweights_gaQL * weights_gaQL).sum(dim=3, keepdim=True)
                dscores_gaQL = dweights_gaQL.sub_(inside_gaQ1).mul_(weights_gaQL).mul_(scale).to(q_gaLE.dtype)
                dq_gaLE[:, :, part * QUERIES : (part + 1) * QUERIES] = dscores_gaQL @ k_gaLE
                dk_gaLE += dscores_gaQL.transpose(2, 3) @ q_gaQE
        return dq_gaLE, dk_gaLE, dv_gaLE, None, None


def rows_of_weights(
    q_gaQE: Tensor, k_gaLE: Tensor, part: int, draw: Draw, there_g11L: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention weights of some tiles, float32, and what dropout multiplies them with: (g, a, Q, L) each."""
    scores_gaQL = (q_gaQE @ k_gaLE.transpose(2, 3)).float().mul_(q_gaQE.shape[3] ** -0.5)
    if there_g11L is not None:
        scores_gaQL = scores_gaQL.masked_fill_(~there_g11L, -torch.inf)
    weights_gaQL = torch.softmax(scores_gaQL, dim=3)
    return weights_gaQL, draw(weights_gaQL, part)
