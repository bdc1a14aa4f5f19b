"""TransMIL: Nystrom attention between tiles and a pyramid of convolutions (Shao et al., NeurIPS 2021, algorithm 2).

Nystrom attention: Xiong et al., AAAI 2021, equations 13 to 15. Widths, the ReLU embedding, dropout and the convolution
of the values are those of the authors' published code (torchmil 1.0.2 leaves out the last, and the output layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mil.aggregators.layers import (
    Aggregator,
    Chance,
    Parameters,
    join_heads,
    member_linear,
    member_norm,
    shared_linear,
    split_heads,
)

KERNELS = (7, 5, 3)
"""Widths of the three convolutions of the pyramid (PPEG)."""


class TransMIL(Aggregator):
    """Two layers of approximate self-attention with position encoding between them; the class token is classified.

    The tiles, in the order they are stored in (row by row), fill a square; the first ones once more where the square is
    not full. Nystrom attention costs time and memory in proportion to the tiles: bags of any size go through whole,
    and 100,000 tiles of width 512 train within 12 GB (benchmarks/huge_bags.py), because no matrix of tiles by
    landmarks is ever kept. The tokens are cut into segments of nearly equal length for the landmarks. (The published
    code puts zeros in front until the length divides, and attends to them; where it divides, both are the same.)

    Args:
        hidden: width of the tokens, a multiple of heads.
        heads: of the attention.
        landmarks: segments whose means stand for all queries and keys; at most as many as tokens.
        pinv_steps: iterations for the pseudo-inverse of the landmarks' attention.
        conv: width of the convolution of the values along the tokens, odd; 0 = none.
        dropout: of what each attention adds, in training only.
    """

    one_member_at_a_time = True
    draws = True
    order_matters = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        pinv_steps: int = 6,
        conv: int = 33,
        dropout: float = 0.1,
    ):
        super().__init__(in_dim, n_outputs, seeds)
        if min(hidden, heads, landmarks, pinv_steps) < 1 or hidden % heads:
            raise ValueError(
                f"model.hidden={hidden} model.heads={heads} model.landmarks={landmarks} model.pinv_steps={pinv_steps}: "
                "expected at least 1 each, and hidden a multiple of heads"
            )
        if conv < 0 or (conv and conv % 2 == 0) or not 0 <= dropout < 1:
            raise ValueError(f"model.conv={conv} model.dropout={dropout}: expected 0 or odd, and 0 to below 1")
        self.heads, self.landmarks, self.pinv_steps = heads, landmarks, pinv_steps
        self.conv, self.dropout = conv, dropout
        self.add_linear("embed", in_dim, hidden)
        self.add_stack("class_token", (hidden,), lambda token, generator: token.normal_(generator=generator))
        for layer in ("layer0", "layer1"):
            self.add_norm(f"{layer}_norm", hidden)
            self.add_linear(f"{layer}_qkv", hidden, 3 * hidden, bias=False)
            self.add_linear(f"{layer}_out", hidden, hidden)
            if conv:
                self.add_stack(f"{layer}_conv_weight", (heads, conv), as_convolution(conv))
        for kernel in KERNELS:
            fill = as_convolution(kernel * kernel)
            self.add_stack(f"place{kernel}_weight", (hidden, kernel, kernel), fill)
            self.add_stack(f"place{kernel}_bias", (hidden,), fill)
        self.add_norm("norm", hidden)
        self.add_linear("head0", hidden, n_outputs)
        self.floats_per_tile = 15 * hidden
        self.floats_per_bag = 2 * heads * landmarks**2 * (6 * pinv_steps + 3) + 20 * hidden * min(landmarks, 16)

    def pool(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None = None
    ) -> tuple[Tensor, None]:
        tokens = []
        for b, x_mNH in enumerate(self.embedded(tiles_TD, lengths_b, p)):
            of_bag = chance.of_bag(b) if chance else None
            x_mNH = self.first_half(x_mNH, p, of_bag)
            tokens.append(self.attend("layer1", x_mNH, p, of_bag, only_first=True))
        return torch.cat(tokens, dim=1), None

    def tile_scores(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """scores_mT: the class token's attention in the last layer, mean of the heads; a tile that stands twice, both.

        An approximation of weights: they may be slightly negative and do not sum to 1.
        """
        scores = []
        for x_mNH, length in zip(self.embedded(tiles_TD, lengths_b, p), lengths_b, strict=True):
            q_maNE, k_maNE, _ = self.queries_keys_values("layer1", self.first_half(x_mNH, p, None), p)
            weights_mN = class_attention(q_maNE, k_maNE, self.landmarks, self.pinv_steps).mean(dim=1)
            once_mT, again_mR = weights_mN[:, 1:].split([length, weights_mN.shape[1] - 1 - length], dim=1)
            scores.append(once_mT + functional.pad(again_mR, (0, length - again_mR.shape[1])))
        return torch.cat(scores, dim=1)

    def embedded(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> list[Tensor]:
        """Tokens (m, 1 + side * side, H) of each bag: class token, tiles, the first tiles again."""
        h_mTH = torch.relu(shared_linear(tiles_TD, *self.first_layer("embed", p)))
        token_m1H = p["class_token"].unsqueeze(1)
        bags = zip(h_mTH.split(list(lengths_b), dim=1), lengths_b, strict=True)
        return [torch.cat([token_m1H, h_mLH, h_mLH[:, : square(n) - n]], dim=1) for h_mLH, n in bags]

    def first_half(self, x_mNH: Tensor, p: Parameters, chance: Chance | None) -> Tensor:
        """The first attention and the position encoding."""
        return self.encode_places(self.attend("layer0", x_mNH, p, chance), p)

    def attend(
        self, layer: str, x_mNH: Tensor, p: Parameters, chance: Chance | None, only_first: bool = False
    ) -> Tensor:
        """x + attention(norm(x)), for all tokens or only for the class token."""
        q_maNE, k_maNE, v_maNE = self.queries_keys_values(layer, x_mNH, p)
        n_out = 1 if only_first else x_mNH.shape[1]
        mixed_maNE = nystrom_attention(q_maNE, k_maNE, v_maNE, self.landmarks, self.pinv_steps, n_out)
        if self.conv:
            mixed_maNE = mixed_maNE + convolve(v_maNE, p[f"{layer}_conv_weight"], n_out)
        added_mNH = member_linear(join_heads(mixed_maNE), p[f"{layer}_out_weight"], p[f"{layer}_out_bias"])
        if chance:
            added_mNH = chance.dropout(added_mNH, (n_out,), self.dropout, layer)
        return x_mNH[:, :n_out] + added_mNH

    def queries_keys_values(self, layer: str, x_mNH: Tensor, p: Parameters) -> list[Tensor]:
        normed_mNH = member_norm(x_mNH, p[f"{layer}_norm_scale"], p[f"{layer}_norm_shift"])
        qkv_mNX = normed_mNH @ p[f"{layer}_qkv_weight"]
        return [split_heads(part_mNH, self.heads) for part_mNH in qkv_mNX.chunk(3, dim=2)]

    def encode_places(self, x_mNH: Tensor, p: Parameters) -> Tensor:
        """PPEG: tiles on their square plus three convolutions of it, made as one with the summed kernel."""
        m, n, h = x_mNH.shape
        side = math.isqrt(n - 1)
        grid_1CSS = x_mNH[:, 1:].transpose(1, 2).reshape(1, m * h, side, side)
        kernels = [functional.pad(p[f"place{k}_weight"], [(KERNELS[0] - k) // 2] * 4) for k in KERNELS]
        weight_C1KK = torch.stack(kernels).sum(dim=0).reshape(m * h, 1, KERNELS[0], KERNELS[0])
        bias_C = torch.stack([p[f"place{k}_bias"] for k in KERNELS]).sum(dim=0).reshape(-1)
        placed_1CSS = functional.conv2d(grid_1CSS, weight_C1KK, bias_C, padding=KERNELS[0] // 2, groups=m * h)
        placed_mSH = (grid_1CSS + placed_1CSS).view(m, h, side * side).transpose(1, 2)
        return torch.cat([x_mNH[:, :1], placed_mSH], dim=1)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        scale_MH, shift_MH = self.get_parameter("norm_scale"), self.get_parameter("norm_shift")
        return self.linear("head0", member_norm(pooled_MBP, scale_MH, shift_MH))


def as_convolution(fan_in: int) -> Callable[[Tensor, torch.Generator], object]:
    """Fills a member's kernel or bias as torch.nn.Conv2d does."""
    bound = 1 / math.sqrt(fan_in)
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def square(n_tiles: int) -> int:
    """Places of the smallest square that holds the tiles."""
    return (math.isqrt(n_tiles - 1) + 1) ** 2


def segment_means(x_maNE: Tensor, n_segments: int) -> Tensor:
    """Means of consecutive tokens, the first N % n segments one longer: (m, heads, N, E) -> (m, heads, n, E)."""
    length, longer = divmod(x_maNE.shape[2], n_segments)
    cut = longer * (length + 1)
    long_maNE, short_maNE = x_maNE[:, :, :cut], x_maNE[:, :, cut:]
    means = [short_maNE.unflatten(2, (n_segments - longer, length)).mean(dim=3)]
    if longer:
        means.insert(0, long_maNE.unflatten(2, (longer, length + 1)).mean(dim=3))
    return torch.cat(means, dim=2)


def landmark_inverse(q_maLE: Tensor, k_maLE: Tensor, steps: int) -> Tensor:
    """Pseudo-inverse of the landmarks' attention by iteration (Xiong et al., equation 14): (m, heads, L, L)."""
    a_maLL = torch.softmax(q_maLE @ k_maLE.transpose(2, 3) / math.sqrt(q_maLE.shape[3]), dim=3)
    largest_m = a_maLL.sum(dim=2).amax(dim=(1, 2))  # of the columns; the rows sum to 1
    z_maLL = a_maLL.transpose(2, 3) / largest_m.view(-1, 1, 1, 1)
    eye_LL = torch.eye(a_maLL.shape[3], dtype=a_maLL.dtype, device=a_maLL.device)
    for _ in range(steps):
        az_maLL = a_maLL @ z_maLL
        z_maLL = 0.25 * z_maLL @ (13 * eye_LL - az_maLL @ (15 * eye_LL - az_maLL @ (7 * eye_LL - az_maLL)))
    return z_maLL


def nystrom_attention(
    q_maNE: Tensor, k_maNE: Tensor, v_maNE: Tensor, landmarks: int, steps: int, n_out: int
) -> Tensor:
    """Approximate attention of the first n_out tokens to all: softmax(q kL') pinv(softmax(qL kL')) softmax(qL k') v.

    Read from the right it is two ordinary attentions: the landmarks attend to the tokens, then the tokens to the
    landmarks. So torch's fused kernel does both, and a matrix of tokens by landmarks is never stored.
    """
    n = min(landmarks, k_maNE.shape[2])
    q_maLE, k_maLE = segment_means(q_maNE, n), segment_means(k_maNE, n)
    seen_maLE = functional.scaled_dot_product_attention(q_maLE, k_maNE, v_maNE)
    seen_maLE = landmark_inverse(q_maLE, k_maLE, steps) @ seen_maLE
    return functional.scaled_dot_product_attention(q_maNE[:, :, :n_out], k_maLE, seen_maLE)


def class_attention(q_maNE: Tensor, k_maNE: Tensor, landmarks: int, steps: int) -> Tensor:
    """The first token's row of the matrix that `nystrom_attention` approximates: (m, heads, N)."""
    n, scale = min(landmarks, k_maNE.shape[2]), 1 / math.sqrt(q_maNE.shape[3])
    q_maLE, k_maLE = segment_means(q_maNE, n), segment_means(k_maNE, n)
    to_landmarks_ma1L = torch.softmax(scale * q_maNE[:, :, :1] @ k_maLE.transpose(2, 3), dim=3)
    row_ma1L = to_landmarks_ma1L @ landmark_inverse(q_maLE, k_maLE, steps)
    heads = [  # one at a time: landmarks by tokens is large
        row_m1L @ torch.softmax(scale * q_mLE @ k_mNE.transpose(1, 2), dim=2)
        for row_m1L, q_mLE, k_mNE in zip(row_ma1L.unbind(1), q_maLE.unbind(1), k_maNE.unbind(1), strict=True)
    ]
    return torch.cat(heads, dim=1)


def convolve(v_maNE: Tensor, weight_maK: Tensor, n_out: int) -> Tensor:
    """Each head's values convolved along the tokens, zeros outside, for the first n_out tokens."""
    m, heads, kernel = weight_maK.shape
    seen_maNE = v_maNE[:, :, : n_out + kernel // 2]
    grid_1XNE = seen_maNE.reshape(1, m * heads, *seen_maNE.shape[2:])
    weight_X1K1 = weight_maK.reshape(m * heads, 1, kernel, 1)
    mixed_1XNE = functional.conv2d(grid_1XNE, weight_X1K1, padding=(kernel // 2, 0), groups=m * heads)
    return mixed_1XNE[:, :, :n_out].view(m, heads, n_out, -1)
