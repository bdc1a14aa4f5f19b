"""Bags on a device as squares of tiles behind a class token, bags of like length in one shape, for TransMIL.

Axes: m members, b bags of one set, g = m x b, T tiles of the group, P = side x side places, N = 1 + P tokens (the class
token first), R tiles, F filled places, L landmarks, a heads, H hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mil.aggregators.places import KEPT_LENGTHS, Segments, sent


@dataclass(frozen=True, eq=False)
class Mask:
    """What there is of tokens and landmarks. landmarks: of the bag that has most of them."""

    landmarks: int
    tokens_g11N: Tensor
    landmarks_g11L: Tensor
    cuts_bLN: Tensor

    def means(self, x_gNH: Tensor) -> Tensor:
        """Means of each bag's segments of tokens, zeros where it has no such segment: (g, N, H) -> (g, L, H).

        By a product with zeros and ones, which is exact in any type; no running sum, whose order a device may choose.
        """
        x_mbNH = x_gNH.unflatten(0, (-1, len(self.cuts_bLN)))
        sums_mbLH = self.cuts_bLN.to(x_gNH.dtype) @ x_mbNH
        means_gLH: Tensor = (sums_mbLH / self.cuts_bLN.sum(dim=2, keepdim=True).clamp_min(1)).flatten(0, 1)
        return means_gLH.to(x_gNH.dtype)


@dataclass(frozen=True, eq=False)
class Squares:
    """Some bags of a group, each its tiles and the first of them again up to a full square, then nothing up to side².

    rows_R, places_R: tiles, in the group, and where they go (bag * side² + place). again_R, more_R: the same of those
    that stand there once more; no tile does so twice. sequence_F, grid_F: filled places, end to end as they are, and
    row by row on the largest square; None where all squares are of one size.
    """

    bags: tuple[int, ...]
    side: int
    rows_R: Tensor
    places_R: Tensor
    again_R: Tensor
    more_R: Tensor
    tokens_b: Tensor
    sequence_F: Tensor | None
    grid_F: Tensor | None

    def fill(self, x_mTH: Tensor, token_mH: Tensor) -> Tensor:
        """Tiles and class tokens, zeros where there is none: (m, b, N, H)."""
        own_mRH = torch.cat([x_mTH.index_select(1, self.rows_R), x_mTH.index_select(1, self.again_R)], dim=1)
        filled_mbPH = self._put(torch.cat([self.places_R, self.more_R]), own_mRH)
        tokens_mb1H = token_mH[:, None, None].expand(-1, len(self.bags), -1, -1).to(filled_mbPH.dtype)
        return torch.cat([tokens_mb1H, filled_mbPH], dim=2)

    def on_grid(self, x_mbPH: Tensor) -> Tensor:
        """Places end to end -> places row by row on the largest square, zeros around each bag's own."""
        return x_mbPH if self.sequence_F is None else self._moved(x_mbPH, self.sequence_F, self.grid_F)

    def in_sequence(self, x_mbPH: Tensor) -> Tensor:
        """The way back."""
        return x_mbPH if self.grid_F is None else self._moved(x_mbPH, self.grid_F, self.sequence_F)

    def of_tiles(self, x_mbP: Tensor, scores_mT: Tensor) -> Tensor:
        """Adds what is said of places to what is said of their tiles, (m, T)."""
        x_mP = x_mbP.flatten(1)
        for rows_R, places_R in ((self.rows_R, self.places_R), (self.again_R, self.more_R)):
            own_mR = x_mP.index_select(1, places_R)
            scores_mT = scores_mT + torch.zeros_like(scores_mT).index_copy(1, rows_R, own_mR)
        return scores_mT

    def mask(self, m: int, landmarks: int) -> Mask | None:
        """For m members; None where every token is there. landmarks: of a bag, at most as many as it has tokens."""
        if self.sequence_F is None:
            return None
        most = min(landmarks, 1 + self.side**2)
        tokens_b1 = self.tokens_b.unsqueeze(1)
        token_N, landmark_L = (torch.arange(n, device=tokens_b1.device) for n in (1 + self.side**2, most))
        own_b1 = tokens_b1.clamp_max(landmarks)
        there_bN, landmarks_bL = token_N < tokens_b1, landmark_L < own_b1
        # the first tokens % landmarks segments are one longer
        length_b1 = tokens_b1 // own_b1.clamp_min(1)
        longer_b1 = tokens_b1 - length_b1 * own_b1
        begin_bL = landmark_L * length_b1 + landmark_L.minimum(longer_b1)
        end_bL = begin_bL + length_b1 + (landmark_L < longer_b1)
        cuts_bLN = (begin_bL.unsqueeze(2) <= token_N) & (token_N < end_bL.unsqueeze(2)) & landmarks_bL.unsqueeze(2)
        return Mask(most, for_attention(there_bN, m), for_attention(landmarks_bL, m), cuts_bLN)

    def _moved(self, x_mbPH: Tensor, of_F: Tensor, to_F: Tensor | None) -> Tensor:
        assert to_F is not None
        return self._put(to_F, x_mbPH.flatten(1, 2).index_select(1, of_F))

    def _put(self, places_R: Tensor, x_mRH: Tensor) -> Tensor:
        """(m, R, H) -> (m, b, P, H), zeros elsewhere."""
        blank_mXH = x_mRH.new_zeros(len(x_mRH), len(self.bags) * self.side**2, x_mRH.shape[2])
        put_mbPH: Tensor = blank_mXH.index_copy(1, places_R, x_mRH).unflatten(1, (len(self.bags), -1))
        return put_mbPH


def for_attention(there_bN: Tensor, m: int) -> Tensor:
    """(b, N) -> (g, 1, 1, N)."""
    return there_bN.repeat(m, 1)[:, None, None]


def squares_of(lengths_b: Segments) -> tuple[Squares, ...]:
    """The bags of a group, those of like length together."""
    return _squares(lengths_b, lengths_b.device)


@lru_cache(KEPT_LENGTHS)
@torch.inference_mode(False)
def _squares(lengths_b: Segments, device: torch.device) -> tuple[Squares, ...]:
    return tuple(_some(lengths_b, bags, device) for bags in lengths_b.alike)


def _some(lengths_b: Segments, bags: Sequence[int], device: torch.device) -> Squares:
    starts, lengths = [0, *itertools.accumulate(lengths_b)], [lengths_b[bag] for bag in bags]
    sides = [side_of(length) for length in lengths]
    side = max(sides)
    first = [i * side**2 for i in range(len(bags))]
    own = list(zip(bags, first, lengths, sides, strict=True))
    parts = [
        torch.cat([torch.arange(n) + starts[b] for b, _, n, _ in own]),
        torch.cat([torch.arange(n) + at for _, at, n, _ in own]),
        torch.cat([torch.arange(s**2 - n) + starts[b] for b, _, n, s in own]),
        torch.cat([torch.arange(n, s**2) + at for _, at, n, s in own]),
        torch.tensor([1 + s**2 for s in sides]),
    ]
    if min(sides) < side:
        parts.append(torch.cat([torch.arange(s**2) + at for _, at, _, s in own]))
        parts.append(torch.cat([at + torch.arange(s**2) // s * side + torch.arange(s**2) % s for _, at, _, s in own]))
    there = sent(torch.cat(parts), device).split([len(part) for part in parts])
    sequence_F, grid_F = there[5:] or (None, None)
    return Squares(tuple(bags), side, there[0], there[1], there[2], there[3], there[4], sequence_F, grid_F)


def side_of(n_tiles: int) -> int:
    """Of the smallest square that holds the tiles."""
    return math.isqrt(n_tiles - 1) + 1
