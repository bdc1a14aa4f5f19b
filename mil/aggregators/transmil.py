"""TransMIL: Nystrom attention between tiles and a pyramid of convolutions (Shao et al., NeurIPS 2021, algorithm 2).

Nystrom attention: Xiong et al., AAAI 2021, equations 13 to 15. Widths, the ReLU embedding, dropout and the convolution
of the values are those of the authors' published code (torchmil 1.0.2 leaves out the last, and the output layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional

from mil.aggregators.batch import Parameters
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import join_heads, layer, member_norm, norm, shared_linear, split_heads
from mil.aggregators.places import Segments, sent
from mil.aggregators.ranges import MultipleOf, ZeroOrOdd
from mil.aggregators.repeatable import attend
from mil.aggregators.squares import Mask, Squares, side_of, squares_of

# Axes as in `mil.aggregators.layers`, and: a heads, E width of a head, N tokens of a bag (class token first),
# L landmarks, g members x bags in this order, R the tokens of several bags.

KERNELS = (7, 5, 3)
"""Widths of the three convolutions of the pyramid (PPEG)."""


class TransMIL(Aggregator):
    """Two layers of approximate self-attention with position encoding between them; the class token is classified.

    The tiles, in the order they are stored in (row by row), fill a square; the first ones once more where the square is
    not full. Nystrom attention costs time and memory in proportion to the tiles: bags of any size go through whole,
    and 100,000 tiles of width 512 train within 12 GB (benchmarks/huge_bags.py), because no matrix of tiles by
    landmarks is ever kept. The tokens are cut into segments of nearly equal length for the landmarks. (The published
    code puts zeros in front until the length divides, and attends to them; where it divides, both are the same.)

    Two forms are published, the authors' (the default) and the Phikon paper's (configs/camelyon16-paper.yaml):

    | | as published | as the Phikon paper | ours | why |
    | --- | --- | --- | --- | --- |
    | tokens | ReLU 512 | the features | both: `hidden` | |
    | attention | Nystrom, 256 landmarks, 8 heads | ordinary, 8 heads | both: `landmarks` | |
    | bags that landmarks do not divide | zeros in front | - | segments nearly equal | zeros are no tiles |
    | values | convolved too, 33 | not | both: `conv` | |
    | pyramid | a convolution a channel | channels mixed | both: `dense` | |
    | dropout | 0.1 | none | both: `dropout` | |
    | starting values | torch's | normal, 0.02 | both: `start` | |
    | two classes | two logits | one | one | one logit says the same |
    | parameters, 768 features, one logit | 2,541,074 | 53,683,969 | 2,540,561 | one logit fewer |

    Args:
        hidden: width of the tokens, a multiple of heads, after a linear layer and a ReLU; 0: the features themselves.
        heads: of the attention.
        landmarks: segments whose means stand for all queries and keys; at most as many as tokens. 0: ordinary
            attention, every token looks at every other; its time grows with the square of the tiles.
        pinv_steps: iterations for the pseudo-inverse of the landmarks' attention.
        conv: width of the convolution of the values along the tokens, odd; 0 = none.
        dropout: of what each attention adds, in training only.
        dense: each convolution of the pyramid mixes all channels, instead of one for each channel.
        start: starting values of the linear layers and the class token: torch's and a normal one, or ("normal") normal
            with deviation 0.02 and zeros for biases and class token.
    """

    members_at_a_time = 1
    draws = True
    order_matters = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: Annotated[int, Ge(0), MultipleOf("heads")] = 512,
        heads: Annotated[int, Ge(1)] = 8,
        landmarks: Annotated[int, Ge(0)] = 256,
        pinv_steps: Annotated[int, Ge(1)] = 6,
        conv: Annotated[int, ZeroOrOdd()] = 33,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.1,
        dense: bool = False,
        start: Literal["torch", "normal"] = "torch",
    ):
        super().__init__(in_dim, n_outputs, seeds)
        width = hidden or in_dim
        if width % heads:
            raise ValueError(
                f"model.heads: expected a divisor of {in_dim}, the features' width (model.hidden is 0), got {heads}"
            )
        self.heads, self.landmarks, self.pinv_steps = heads, landmarks, pinv_steps
        self.conv, self.dropout, self.dense, self.embeds = conv, dropout, dense, hidden > 0
        if self.embeds:
            self.add_linear("embed", in_dim, width, init=start)
        spread = 1.0 if start == "torch" else 0.0
        self.add_stack("class_token", (width,), lambda token, g: token.normal_(generator=g).mul_(spread))
        for name in ("layer0", "layer1"):
            self.add_norm(f"{name}_norm", width)
            self.add_linear(f"{name}_qkv", width, 3 * width, init=start, bias=False)
            self.add_linear(f"{name}_out", width, width, init=start)
            if conv:
                self.add_stack(f"{name}_conv_weight", (heads, conv), as_convolution(conv))
        for kernel in KERNELS:
            channels = (width, width) if dense else (width,)
            fill = as_convolution(kernel * kernel * (width if dense else 1))
            self.add_stack(f"place{kernel}_weight", (*channels, kernel, kernel), fill)
            self.add_stack(f"place{kernel}_bias", (width,), fill)
        self.add_norm("norm", width)
        self.add_linear("head0", width, n_outputs, init=start)
        self.floats_per_tile = 15 * width
        self.floats_per_bag = 2 * heads * landmarks**2 * (6 * pinv_steps + 3) + 20 * width * min(landmarks, 16)
        self.floats_per_bag += 0 if landmarks else 15 * width

    def pool(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None = None
    ) -> tuple[Tensor, None]:
        tokens: list[Tensor] = []
        order: list[int] = []
        for bags, x_mbNH, squares in self.embedded(tiles_TD, lengths_b, p):
            of_bags = chance.of_bags(bags) if chance else None
            mask = squares.mask(len(x_mbNH), self.landmarks) if squares else None
            x_mbNH = self.first_half(x_mbNH, p, of_bags, squares, mask)
            tokens.append(self.attend("layer1", x_mbNH, p, of_bags, mask, only_first=True).squeeze(2))
            order += bags
        place_b = sorted(range(len(order)), key=order.__getitem__)
        if len(tokens) == 1:
            return tokens[0], None
        return torch.cat(tokens, dim=1).index_select(1, sent(place_b, tiles_TD.device)), None

    def tile_scores(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """scores_mT: the class token's attention in the last layer, mean of the heads; a tile that stands twice, both.

        An approximation of weights: they may be slightly negative and do not sum to 1.
        """
        scores: dict[int, Tensor] = {}
        scores_mT = tiles_TD.new_zeros(len(p["class_token"]), len(tiles_TD))
        for bags, x_mbNH, squares in self.embedded(tiles_TD, lengths_b, p):
            mask = squares.mask(len(x_mbNH), self.landmarks) if squares else None
            x_mbNH = self.first_half(x_mbNH, p, None, squares, mask)
            q_gaNE, k_gaNE, _ = self.queries_keys_values("layer1", x_mbNH, p)
            weights_gN = class_attention(q_gaNE, k_gaNE, self.landmarks, self.pinv_steps, mask).mean(dim=1)
            weights_mbN = weights_gN[:, 1:].unflatten(0, (-1, len(bags)))
            if squares:
                scores_mT = squares.of_tiles(weights_mbN, scores_mT)
                continue
            for b, weights_mN in zip(bags, weights_mbN.unbind(1), strict=True):
                once_mT, again_mR = weights_mN.tensor_split([lengths_b[b]], dim=1)
                scores[b] = once_mT + functional.pad(again_mR, (0, lengths_b[b] - again_mR.shape[1]))
        return torch.cat([scores[b] for b in range(len(lengths_b))], dim=1) if scores else scores_mT

    def embedded(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters
    ) -> Iterator[tuple[Sequence[int], Tensor, Squares | None]]:
        """Tokens (m, bags, 1 + side * side, H): class token, tiles, the first tiles again; same sides go together.

        On a device bags of like length do, with what says where there are tokens.
        """
        if self.embeds:
            h_mTH = torch.relu(shared_linear(tiles_TD, *self.first_layer("embed", p)))
        else:
            h_mTH = self.features(tiles_TD, p).expand(len(p["class_token"]), -1, -1)
        token_m1H = p["class_token"].unsqueeze(1)
        if isinstance(lengths_b, Segments):
            for squares in squares_of(lengths_b):
                yield squares.bags, squares.fill(h_mTH, p["class_token"]), squares
            return
        sides: dict[int, list[int]] = {}
        for b, n in enumerate(lengths_b):
            sides.setdefault(side_of(n), []).append(b)
        parts = h_mTH.split(list(lengths_b), dim=1)
        for side, bags in sides.items():
            filled = [[token_m1H, parts[b], parts[b][:, : side**2 - lengths_b[b]]] for b in bags]
            x_mRH = torch.cat([x for bag in filled for x in bag], dim=1)
            yield bags, x_mRH.unflatten(1, (len(bags), 1 + side**2)), None

    def first_half(
        self, x_mbNH: Tensor, p: Parameters, chance: Chance | None, squares: Squares | None, mask: Mask | None
    ) -> Tensor:
        """The first attention and the position encoding."""
        return self.encode_places(self.attend("layer0", x_mbNH, p, chance, mask), p, squares)

    def attend(
        self,
        name: str,
        x_mbNH: Tensor,
        p: Parameters,
        chance: Chance | None,
        mask: Mask | None,
        only_first: bool = False,
    ) -> Tensor:
        """x + attention(norm(x)), for all tokens or only for the class token."""
        n_bags, n_out = x_mbNH.shape[1], 1 if only_first else x_mbNH.shape[2]
        q_gaNE, k_gaNE, v_gaNE = self.queries_keys_values(name, x_mbNH, p)
        if self.landmarks:
            mixed_gaNE = nystrom_attention(q_gaNE, k_gaNE, v_gaNE, self.landmarks, self.pinv_steps, n_out, mask)
        else:
            there_g11N = mask.tokens_g11N if mask else None
            mixed_gaNE = attend(q_gaNE[:, :, :n_out], k_gaNE, v_gaNE, there_g11N)
        if self.conv:
            if mask:  # nothing lies outside of a bag
                v_gaNE = v_gaNE * mask.tokens_g11N.transpose(2, 3)
            mixed_gaNE = mixed_gaNE + convolve(v_gaNE, p[f"{name}_conv_weight"], n_out)
        mixed_mRH = join_heads(mixed_gaNE).reshape(len(x_mbNH), n_bags * n_out, -1)
        added_mRH = layer(f"{name}_out", mixed_mRH, p)
        added_mRH = self.drop(added_mRH, [n_out] * n_bags, chance, name)
        attended_mbNH: Tensor = x_mbNH[:, :, :n_out] + added_mRH.unflatten(1, (n_bags, n_out))
        return attended_mbNH

    def queries_keys_values(self, name: str, x_mbNH: Tensor, p: Parameters) -> list[Tensor]:
        """(g, heads, N, E) each; g = members x bags."""
        normed_mRH = norm(f"{name}_norm", x_mbNH.flatten(1, 2), p)
        qkv_gNX = (normed_mRH @ p[f"{name}_qkv_weight"]).view(-1, x_mbNH.shape[2], 3 * x_mbNH.shape[3])
        return [split_heads(part_gNH, self.heads) for part_gNH in qkv_gNX.chunk(3, dim=2)]

    def encode_places(self, x_mbNH: Tensor, p: Parameters, squares: Squares | None) -> Tensor:
        """PPEG: tiles on their square plus three convolutions of it, made as one with the summed kernel."""
        m, n_bags, n, h = x_mbNH.shape
        side = math.isqrt(n - 1)
        x_mbPH = squares.on_grid(x_mbNH[:, :, 1:]) if squares else x_mbNH[:, :, 1:]
        grid_bCSS = x_mbPH.permute(1, 0, 3, 2).reshape(n_bags, m * h, side, side)
        kernels = [functional.pad(p[f"place{k}_weight"], [(KERNELS[0] - k) // 2] * 4) for k in KERNELS]
        weight_CIKK = torch.stack(kernels).sum(dim=0).reshape(m * h, h if self.dense else 1, KERNELS[0], KERNELS[0])
        bias_C = torch.stack([p[f"place{k}_bias"] for k in KERNELS]).sum(dim=0).reshape(-1)
        groups = m if self.dense else m * h
        placed_bCSS = functional.conv2d(grid_bCSS, weight_CIKK, bias_C, padding=KERNELS[0] // 2, groups=groups)
        placed_mbPH = (grid_bCSS + placed_bCSS).view(n_bags, m, h, side * side).permute(1, 0, 3, 2)
        return torch.cat([x_mbNH[:, :, :1], squares.in_sequence(placed_mbPH) if squares else placed_mbPH], dim=2)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        scale_MH, shift_MH = self.get_parameter("norm_scale"), self.get_parameter("norm_shift")
        return self.linear("head0", member_norm(pooled_MBP, scale_MH, shift_MH))


def as_convolution(fan_in: int) -> Callable[[Tensor, torch.Generator], object]:
    """Fills a member's kernel or bias as torch.nn.Conv2d does."""
    bound = 1 / math.sqrt(fan_in)
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def segment_means(x_gaNE: Tensor, n_segments: int) -> Tensor:
    """Means of consecutive tokens, the first N % n segments one longer: (g, heads, N, E) -> (g, heads, n, E)."""
    length, longer = divmod(x_gaNE.shape[2], n_segments)
    cut = longer * (length + 1)
    long_gaNE, short_gaNE = x_gaNE[:, :, :cut], x_gaNE[:, :, cut:]
    means = [short_gaNE.unflatten(2, (n_segments - longer, length)).mean(dim=3)]
    if longer:
        means.insert(0, long_gaNE.unflatten(2, (longer, length + 1)).mean(dim=3))
    return torch.cat(means, dim=2)


def landmarks_of(q_gaNE: Tensor, k_gaNE: Tensor, landmarks: int, mask: Mask | None) -> list[Tensor]:
    """Of queries and of keys, (g, heads, L, E); zeros where a bag has fewer."""
    if mask:
        return [split_heads(mask.means(join_heads(x_gaNE)), x_gaNE.shape[1]) for x_gaNE in (q_gaNE, k_gaNE)]
    n = min(landmarks, k_gaNE.shape[2])
    return [segment_means(q_gaNE, n), segment_means(k_gaNE, n)]


def softmax_of(scores: Tensor, there: Tensor | None) -> Tensor:
    """Over the last axis, where there is something; None: everywhere."""
    return torch.softmax(scores if there is None else scores.masked_fill(~there, -torch.inf), dim=-1)


def landmark_inverse(q_gaLE: Tensor, k_gaLE: Tensor, steps: int, mask: Mask | None = None) -> Tensor:
    """Pseudo-inverse of the landmarks' attention by iteration (Xiong et al., equation 14): (g, heads, L, L).

    Rows and columns of landmarks that a bag does not have are zeros, and stay so in every step.
    """
    scores_gaLL = q_gaLE @ k_gaLE.transpose(2, 3) / math.sqrt(q_gaLE.shape[3])
    a_gaLL = softmax_of(scores_gaLL, mask.landmarks_g11L if mask else None)
    if mask:
        a_gaLL = a_gaLL * mask.landmarks_g11L.transpose(2, 3)
    largest_g = a_gaLL.sum(dim=2).amax(dim=(1, 2))  # of the columns; the rows sum to 1
    z_gaLL = a_gaLL.transpose(2, 3) / largest_g.view(-1, 1, 1, 1)
    eye_LL = torch.eye(a_gaLL.shape[3], dtype=a_gaLL.dtype, device=a_gaLL.device)
    for _ in range(steps):
        az_gaLL = a_gaLL @ z_gaLL
        z_gaLL = 0.25 * z_gaLL @ (13 * eye_LL - az_gaLL @ (15 * eye_LL - az_gaLL @ (7 * eye_LL - az_gaLL)))
    return z_gaLL


def nystrom_attention(
    q_gaNE: Tensor, k_gaNE: Tensor, v_gaNE: Tensor, landmarks: int, steps: int, n_out: int, mask: Mask | None = None
) -> Tensor:
    """Approximate attention of the first n_out tokens to all: softmax(q kL') pinv(softmax(qL kL')) softmax(qL k') v.

    Read from the right it is two ordinary attentions: the landmarks attend to the tokens, then the tokens to the
    landmarks. So torch's fused kernel does both, and a matrix of tokens by landmarks is never stored.
    """
    there_g11N, there_g11L = (mask.tokens_g11N, mask.landmarks_g11L) if mask else (None, None)
    q_gaLE, k_gaLE = landmarks_of(q_gaNE, k_gaNE, landmarks, mask)
    seen_gaLE = attend(q_gaLE, k_gaNE, v_gaNE, there_g11N)
    seen_gaLE = landmark_inverse(q_gaLE, k_gaLE, steps, mask) @ seen_gaLE
    return attend(q_gaNE[:, :, :n_out], k_gaLE, seen_gaLE, there_g11L)


def class_attention(q_gaNE: Tensor, k_gaNE: Tensor, landmarks: int, steps: int, mask: Mask | None = None) -> Tensor:
    """The first token's row of the attention, that of `nystrom_attention` if there are landmarks: (g, heads, N)."""
    there_g11N, there_g11L = (mask.tokens_g11N, mask.landmarks_g11L) if mask else (None, None)
    scale = 1 / math.sqrt(q_gaNE.shape[3])
    if landmarks == 0:
        return softmax_of(scale * q_gaNE[:, :, :1] @ k_gaNE.transpose(2, 3), there_g11N).squeeze(2)
    q_gaLE, k_gaLE = landmarks_of(q_gaNE, k_gaNE, landmarks, mask)
    to_landmarks_ga1L = softmax_of(scale * q_gaNE[:, :, :1] @ k_gaLE.transpose(2, 3), there_g11L)
    row_ga1L = to_landmarks_ga1L @ landmark_inverse(q_gaLE, k_gaLE, steps, mask)
    there_g1N = None if there_g11N is None else there_g11N.squeeze(1)
    heads = [  # one at a time: landmarks by tokens is large
        row_g1L @ softmax_of(scale * q_gLE @ k_gNE.transpose(1, 2), there_g1N)
        for row_g1L, q_gLE, k_gNE in zip(row_ga1L.unbind(1), q_gaLE.unbind(1), k_gaNE.unbind(1), strict=True)
    ]
    return torch.cat(heads, dim=1)


def convolve(v_gaNE: Tensor, weight_maK: Tensor, n_out: int) -> Tensor:
    """Each head's values convolved along the tokens, zeros outside, for the first n_out tokens."""
    m, heads, kernel = weight_maK.shape
    seen_mbaNE = v_gaNE[:, :, : n_out + kernel // 2].unflatten(0, (m, -1))
    grid_bXNE = seen_mbaNE.transpose(0, 1).flatten(1, 2)
    weight_X1K1 = weight_maK.reshape(m * heads, 1, kernel, 1)
    mixed_bXNE = functional.conv2d(grid_bXNE, weight_X1K1, padding=(kernel // 2, 0), groups=m * heads)
    convolved_NE: Tensor = mixed_bXNE[:, :, :n_out].unflatten(1, (m, heads)).transpose(0, 1).flatten(0, 1)
    return convolved_NE
