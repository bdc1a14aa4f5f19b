"""A small set transformer: self-attention between the tiles, then attention pooling.

Set Transformer (Lee et al., ICML 2019, section 3.1: induced set attention, equations 9 and 10), with the normalisation
before each part as in today's transformers (Xiong et al., ICML 2020); pooling by Ilse et al. 2018, equation 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional

from mil.aggregators.batch import Parameters
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import (
    attention_scores,
    heads_of_bags,
    join_heads,
    layer,
    norm,
    shared_linear,
    split_heads,
)
from mil.aggregators.places import Padded, Segments
from mil.aggregators.ranges import MultipleOf
from mil.aggregators.repeatable import attend
from mil.aggregators.segments import device_attention, segment_softmax, segment_sum


class Transformer(Aggregator):
    """Tiles look at each other, without places, so that their order does not matter.

    Huge bags go through whole: with `induced` learned points that first look at all tiles and are then looked at by
    all tiles, time and memory grow in proportion to the tiles. With induced=0 every tile looks at every other: torch's
    fused (flash) attention keeps the memory in proportion, but the time grows with the square; use data.max_tiles then.

    | | as published (Set Transformer) | ours | why |
    | --- | --- | --- | --- |
    | induced attention | points look at tiles, tiles at points | the same | |
    | between points and tiles | residual, norm, ReLU layer | a linear layer | half the layers |
    | normalisation | after each part, or none | before each part | trains without warm-up |
    | pooling | attention by learned seeds | attention of ABMIL | weights of tiles that sum to 1 |
    | parameters, 768 features, one logit | - | 461,570 | |

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
        hidden: Annotated[int, Ge(1), MultipleOf("heads")] = 128,
        heads: Annotated[int, Ge(1)] = 4,
        layers: Annotated[int, Ge(1)] = 2,
        induced: Annotated[int, Ge(0)] = 64,
        mlp: Annotated[int, Ge(1)] = 256,
        attention: Annotated[int, Ge(1)] = 128,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.1,
    ):
        super().__init__(in_dim, n_outputs, seeds)
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
        self.add_attention("pool_", hidden, attention, gated=False)
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
        x_mTH = norm("norm", x_mTH, p)
        weights_mT = segment_softmax(attention_scores("pool_", x_mTH, p, gated=False), lengths_b)
        return segment_sum(weights_mT, x_mTH, lengths_b), weights_mT

    def look(self, name: str, x_mTH: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """What attention between the tiles of each bag adds, (m, T, H)."""
        normed_mTH = norm(f"{name}_norm", x_mTH, p)
        qkv_mTX = normed_mTH @ p[f"{name}_qkv_weight"]
        if isinstance(lengths_b, Segments):
            look = partial(self.look_in_bags, name, p=p)
            return layer(f"{name}_out", device_attention(qkv_mTX, lengths_b, look), p)
        bags = heads_of_bags(qkv_mTX, self.heads, lengths_b)
        looked = [self.look_in_bag(name, q_maLE, k_maLE, v_maLE, p) for q_maLE, k_maLE, v_maLE in bags]
        return layer(f"{name}_out", torch.cat(looked, dim=1), p)

    def look_in_bag(self, name: str, q_maLE: Tensor, k_maLE: Tensor, v_maLE: Tensor, p: Parameters) -> Tensor:
        if self.induced:
            points_maIE = split_heads(p[f"{name}_points"], self.heads)
            seen_mIH = join_heads(attend(points_maIE, k_maLE, v_maLE))
            summary = (seen_mIH @ p[f"{name}_summary_weight"]).chunk(2, dim=2)
            k_maLE, v_maLE = (split_heads(x_mIH, self.heads) for x_mIH in summary)
        return join_heads(attend(q_maLE, k_maLE, v_maLE))

    def look_in_bags(self, name: str, qkv_mbLX: Tensor, some: Padded, p: Parameters) -> Tensor:
        """`look_in_bag` of bags on a device, filled up to one length: (m, b, L, X) -> (m, b, L, H)."""
        (m, b), mask = qkv_mbLX.shape[:2], some.mask(len(qkv_mbLX))
        q_gaLE, k_gaLE, v_gaLE = (split_heads(x, self.heads) for x in qkv_mbLX.flatten(0, 1).chunk(3, dim=2))
        if self.induced:
            points_maIE = split_heads(p[f"{name}_points"], self.heads)
            points_gaIE = points_maIE.unsqueeze(1).expand(-1, b, -1, -1, -1).flatten(0, 1)
            seen_gaIE = attend(points_gaIE, k_gaLE, v_gaLE, mask)
            seen_mRH = join_heads(seen_gaIE).unflatten(0, (m, b)).flatten(1, 2)
            summary_gIX = (seen_mRH @ p[f"{name}_summary_weight"]).view(m * b, self.induced, -1)
            k_gaLE, v_gaLE = (split_heads(x, self.heads) for x in summary_gIX.chunk(2, dim=2))
            mask = None
        looked_gaLE = attend(q_gaLE, k_gaLE, v_gaLE, mask)
        looked_mbLH: Tensor = join_heads(looked_gaLE).unflatten(0, (m, b))
        return looked_mbLH

    def network(self, name: str, x_mTH: Tensor, p: Parameters) -> Tensor:
        normed_mTH = norm(f"{name}_mlp_norm", x_mTH, p)
        return layer(f"{name}_mlp1", functional.gelu(layer(f"{name}_mlp0", normed_mTH, p)), p)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.linear("head0", pooled_MBP)
