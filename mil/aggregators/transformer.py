"""A small set transformer: self-attention between the tiles, then attention pooling.

Set Transformer (Lee et al., ICML 2019, section 3.1: induced set attention, equations 9 and 10), with the normalisation
before each part as in today's transformers (Xiong et al., ICML 2020); pooling by Ilse et al. 2018, equation 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mil.aggregators.batch import Parameters
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import (
    attention_scores,
    heads_of_bags,
    join_heads,
    member_linear,
    member_norm,
    shared_linear,
    split_heads,
)
from mil.aggregators.segments import segment_softmax, segment_sum


class Transformer(Aggregator):
    """Tiles look at each other, without places, so that their order does not matter.

    Huge bags go through whole: with `induced` learned points that first look at all tiles and are then looked at by
    all tiles, time and memory grow in proportion to the tiles. With induced=0 every tile looks at every other: torch's
    fused (flash) attention keeps the memory in proportion, but the time grows with the square; use data.max_tiles then.

    Args:
        hidden: width of the tokens, a multiple of heads.
        heads: of the attention. layers: attention and network, so many times.
        induced: learned points that stand between the tiles; 0 = full self-attention.
        mlp: width of the GELU layer of each network.
        attention: width of the pooling's attention.
        dropout: of what every attention and network adds, in training only.
    """

    members_at_a_time = 1
    draws = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: int = 128,
        heads: int = 4,
        layers: int = 2,
        induced: int = 64,
        mlp: int = 256,
        attention: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__(in_dim, n_outputs, seeds)
        if min(hidden, heads, layers, mlp, attention) < 1 or induced < 0 or hidden % heads or not 0 <= dropout < 1:
            raise ValueError(
                f"model.hidden={hidden} model.heads={heads} model.layers={layers} model.induced={induced} "
                f"model.mlp={mlp} model.attention={attention} model.dropout={dropout}: expected at least 1 each, "
                "induced at least 0, hidden a multiple of heads, dropout 0 to below 1"
            )
        self.heads, self.layers, self.induced, self.dropout = heads, layers, induced, dropout
        self.add_linear("embed", in_dim, hidden)
        for i in range(layers):
            self.add_norm(f"layer{i}_norm", hidden)
            self.add_linear(f"layer{i}_qkv", hidden, 3 * hidden, bias=False)
            if induced:
                points = lambda tensor, generator: tensor.normal_(generator=generator)  # noqa: E731  # one line, used in the next
                self.add_stack(f"layer{i}_points", (induced, hidden), points)
                self.add_linear(f"layer{i}_summary", hidden, 2 * hidden, bias=False)
            self.add_linear(f"layer{i}_out", hidden, hidden)
            self.add_norm(f"layer{i}_mlp_norm", hidden)
            self.add_linear(f"layer{i}_mlp0", hidden, mlp)
            self.add_linear(f"layer{i}_mlp1", mlp, hidden)
        self.add_norm("norm", hidden)
        self.add_linear("pool_attend", hidden, attention)
        self.add_linear("pool_score", attention, 1)
        self.add_linear("head0", hidden, n_outputs)
        self.floats_per_tile = layers * (12 * hidden + 2 * mlp) + 2 * hidden + 3 * attention
        self.floats_per_bag = layers * induced * 4 * hidden + 2 * hidden

    def pool(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None = None
    ) -> tuple[Tensor, Tensor]:
        x_mTH = shared_linear(tiles_TD, *self.first_layer("embed", p))
        for i in range(self.layers):
            x_mTH = x_mTH + self.drop(self.look(f"layer{i}", x_mTH, lengths_b, p), lengths_b, chance, f"layer{i}")
            x_mTH = x_mTH + self.drop(self.network(f"layer{i}", x_mTH, p), lengths_b, chance, f"layer{i}_mlp")
        x_mTH = member_norm(x_mTH, p["norm_scale"], p["norm_shift"])
        weights_mT = segment_softmax(attention_scores("pool", x_mTH, p, gated=False), lengths_b)
        return segment_sum(weights_mT, x_mTH, lengths_b), weights_mT

    def look(self, layer: str, x_mTH: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """What attention between the tiles of each bag adds, (m, T, H)."""
        normed_mTH = member_norm(x_mTH, p[f"{layer}_norm_scale"], p[f"{layer}_norm_shift"])
        bags = heads_of_bags(normed_mTH @ p[f"{layer}_qkv_weight"], self.heads, lengths_b)
        looked = [self.look_in_bag(layer, q_maLE, k_maLE, v_maLE, p) for q_maLE, k_maLE, v_maLE in bags]
        return member_linear(torch.cat(looked, dim=1), p[f"{layer}_out_weight"], p[f"{layer}_out_bias"])

    def look_in_bag(self, layer: str, q_maLE: Tensor, k_maLE: Tensor, v_maLE: Tensor, p: Parameters) -> Tensor:
        if self.induced:
            points_maIE = split_heads(p[f"{layer}_points"], self.heads)
            seen_mIH = join_heads(functional.scaled_dot_product_attention(points_maIE, k_maLE, v_maLE))
            summary = (seen_mIH @ p[f"{layer}_summary_weight"]).chunk(2, dim=2)
            k_maLE, v_maLE = (split_heads(x_mIH, self.heads) for x_mIH in summary)
        return join_heads(functional.scaled_dot_product_attention(q_maLE, k_maLE, v_maLE))

    def network(self, layer: str, x_mTH: Tensor, p: Parameters) -> Tensor:
        normed_mTH = member_norm(x_mTH, p[f"{layer}_mlp_norm_scale"], p[f"{layer}_mlp_norm_shift"])
        wide_mTX = functional.gelu(member_linear(normed_mTH, p[f"{layer}_mlp0_weight"], p[f"{layer}_mlp0_bias"]))
        return member_linear(wide_mTX, p[f"{layer}_mlp1_weight"], p[f"{layer}_mlp1_bias"])

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.linear("head0", pooled_MBP)
