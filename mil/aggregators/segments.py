"""Operations on bags laid end to end: softmax, sums, means, extremes.

Axes: m members, T tiles laid end to end, H hidden, K extreme tiles, b bags of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_softmax(scores_mT: Tensor, lengths_b: Sequence[int]) -> Tensor:
    """Softmax over the tiles of each bag: (m, T) -> (m, T), every bag's weights sum to 1."""
    if len(lengths_b) == 1:
        return torch.softmax(scores_mT, dim=1)
    bag_of_T = bag_of_tile(lengths_b, scores_mT.device)
    top_mT = segment_reduce(scores_mT.detach().unsqueeze(2), lengths_b, "max").squeeze(2)[:, bag_of_T]
    weights_mT = torch.exp(scores_mT - top_mT)
    sums_mb = segment_reduce(weights_mT.unsqueeze(2), lengths_b, "sum").squeeze(2)
    return weights_mT / sums_mb[:, bag_of_T]


def segment_sum(weights_mT: Tensor, x_mTH: Tensor, lengths_b: Sequence[int]) -> Tensor:
    """Weighted sum of each bag's tiles: (m, T), (m, T, H) -> (m, b, H)."""
    if len(lengths_b) == 1:
        return torch.bmm(weights_mT.unsqueeze(1), x_mTH)
    return segment_reduce(weights_mT.unsqueeze(2) * x_mTH, lengths_b, "sum")


def segment_reduce(x_mTH: Tensor, lengths_b: Sequence[int], how: str) -> Tensor:
    """sum, mean or max over the tiles of each bag: (m, T, H) -> (m, b, H)."""
    lengths = torch.tensor(lengths_b, device=x_mTH.device)
    x_TmH = x_mTH.transpose(0, 1).contiguous()
    return torch.segment_reduce(x_TmH, how, lengths=lengths, axis=0).transpose(0, 1)


def bag_of_tile(lengths_b: Sequence[int], device: torch.device | str) -> Tensor:
    """Which bag of the group each tile belongs to, (T,)."""
    return torch.repeat_interleave(torch.arange(len(lengths_b)), torch.tensor(lengths_b)).to(device)


def segment_extremes(scores_XT: Tensor, lengths_b: Sequence[int], n_top: int, n_bottom: int) -> Tensor:
    """Rows of the n_top highest (highest first) and n_bottom lowest (lowest first) tiles of each bag.

    (X, T) -> (X, b, n_top + n_bottom) indices into T. A bag with fewer tiles than asked repeats its last one: with 3
    tiles and n_top = 5 the top list is 1st, 2nd, 3rd, 3rd, 3rd. So no bag is too small, and no value is made up.
    """
    starts = torch.tensor([0, *lengths_b[:-1]]).cumsum(0)
    found = []
    for start, scores_XL in zip(starts.tolist(), scores_XT.split(list(lengths_b), dim=1), strict=True):
        length = scores_XL.shape[1]
        sides = [(n, largest) for n, largest in ((n_top, True), (n_bottom, False)) if n]
        for n, largest in sides:
            rows_XN = scores_XL.topk(min(n, length), dim=1, largest=largest).indices
            if length < n:
                rows_XN = torch.cat([rows_XN, rows_XN[:, -1:].expand(-1, n - length)], dim=1)
            found.append(rows_XN + start)
    extremes_MBK: Tensor = torch.cat(found, dim=1).unflatten(1, (len(lengths_b), n_top + n_bottom))
    return extremes_MBK
