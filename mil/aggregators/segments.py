"""Operations on bags laid end to end: softmax, sums, means, extremes.

Axes: m members, T tiles laid end to end, H hidden, K extreme tiles, b bags of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mil.aggregators.places import Padded, Segments, without_autocast


def segment_softmax(scores_mT: Tensor, lengths_b: Sequence[int]) -> Tensor:
    """Softmax over the tiles of each bag: (m, T) -> (m, T), every bag's weights sum to 1."""
    if len(lengths_b) == 1:
        return torch.softmax(scores_mT, dim=1)
    if isinstance(lengths_b, Segments):
        return device_softmax(scores_mT, lengths_b)
    bag_of_T = bag_of_tile(lengths_b, scores_mT.device)
    top_mT = segment_reduce(scores_mT.detach().unsqueeze(2), lengths_b, "max").squeeze(2)[:, bag_of_T]
    weights_mT = torch.exp(scores_mT - top_mT)
    sums_mb = segment_reduce(weights_mT.unsqueeze(2), lengths_b, "sum").squeeze(2)
    return weights_mT / sums_mb[:, bag_of_T]


def segment_sum(weights_mT: Tensor, x_mTH: Tensor, lengths_b: Sequence[int]) -> Tensor:
    """Weighted sum of each bag's tiles: (m, T), (m, T, H) -> (m, b, H)."""
    if len(lengths_b) == 1:
        return torch.bmm(weights_mT.unsqueeze(1), x_mTH)
    if isinstance(lengths_b, Segments):
        return device_sum(weights_mT, x_mTH, lengths_b)
    return segment_reduce(weights_mT.unsqueeze(2) * x_mTH, lengths_b, "sum")


def segment_reduce(x_mTH: Tensor, lengths_b: Sequence[int], how: str) -> Tensor:
    """sum, mean or max over the tiles of each bag: (m, T, H) -> (m, b, H)."""
    if isinstance(lengths_b, Segments):
        return device_reduce(x_mTH, lengths_b, how)
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
    if isinstance(lengths_b, Segments):
        return device_extremes(scores_XT, lengths_b, n_top, n_bottom)
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


# --- on a device: a few operations over all bags, none of which waits -------------------------------------------------
# Bags of one length are a tensor with an axis more. Where lengths differ, what is small (a number a tile) is spread out
# over the bags, (m, b, T); features never are. Nothing is added up by atomic operations, so the same bits come out.


def device_softmax(scores_mT: Tensor, lengths_b: Segments) -> Tensor:
    """`segment_softmax`."""
    if lengths_b.equal:
        of_bags_mbL: Tensor = scores_mT.unflatten(1, (len(lengths_b), -1))
        return torch.softmax(of_bags_mbL, dim=2).flatten(1)
    spread_mbT = scores_mT.unsqueeze(1).masked_fill(~lengths_b.inside_bT, -torch.inf)
    return torch.softmax(spread_mbT, dim=2).sum(dim=1)


def device_sum(weights_mT: Tensor, x_mTH: Tensor, lengths_b: Segments) -> Tensor:
    """`segment_sum`: a product with each bag's weights, zeros outside of it."""
    if lengths_b.equal:
        m, b = len(x_mTH), len(lengths_b)
        x_gLH = x_mTH.unflatten(1, (b, -1)).flatten(0, 1)
        return torch.bmm(weights_mT.view(m * b, 1, -1), x_gLH).view(m, b, -1)
    return torch.bmm(weights_mT.unsqueeze(1) * lengths_b.inside_bT, x_mTH)


def device_reduce(x_mTH: Tensor, lengths_b: Segments, how: str) -> Tensor:
    """`segment_reduce`: sum, mean or max."""
    if lengths_b.equal:
        x_mbLH = x_mTH.unflatten(1, (len(lengths_b), -1))
        reduced_mbH: Tensor = getattr(x_mbLH, {"max": "amax"}.get(how, how))(dim=2)
        return reduced_mbH
    if how == "max":
        like_mbH = x_mTH.new_full((len(x_mTH), len(lengths_b), x_mTH.shape[2]), -torch.inf)
        return like_mbH.scatter_reduce(1, lengths_b.bag_of_T.view(1, -1, 1).expand_as(x_mTH), x_mTH, "amax")
    ones_mT = x_mTH.new_ones(x_mTH.shape[:2])
    with without_autocast(x_mTH.device):
        sums_mbH = device_sum(ones_mT, x_mTH, lengths_b)
    return sums_mbH / lengths_b.lengths_b.unsqueeze(1) if how == "mean" else sums_mbH


def device_extremes(scores_XT: Tensor, lengths_b: Segments, n_top: int, n_bottom: int) -> Tensor:
    """`segment_extremes`: by a top list of bags of one length, else by sorting scores within their bags."""
    n_bags, length = len(lengths_b), lengths_b.equal
    if length:
        scores_XbL = scores_XT.unflatten(1, (n_bags, length))
        sides = []
        for n, largest in ((n_top, True), (n_bottom, False)):
            if n:
                rows_XbN = scores_XbL.topk(min(n, length), dim=2, largest=largest).indices
                sides.append(torch.cat([rows_XbN, rows_XbN[..., -1:].expand(-1, -1, max(0, n - length))], dim=2))
        return torch.cat(sides, dim=2) + lengths_b.starts_b.unsqueeze(1)
    order_XT = order_in_bags(scores_XT, lengths_b, descending=True)
    last_b1 = (lengths_b.lengths_b - 1).unsqueeze(1)
    top_bN = torch.arange(n_top, device=scores_XT.device).minimum(last_b1)
    bottom_bN = last_b1 - torch.arange(n_bottom, device=scores_XT.device).minimum(last_b1)
    rows_bK = torch.cat([top_bN, bottom_bN], dim=1) + lengths_b.starts_b.unsqueeze(1)
    extremes_XbK: Tensor = order_XT[:, rows_bK.flatten()].unflatten(1, rows_bK.shape)
    return extremes_XbK


def order_in_bags(keys_XT: Tensor, lengths_b: Segments, descending: bool = False) -> Tensor:
    """Rows of the tiles, bag after bag, within each by rising (or falling) keys: (X, T) -> (X, T)."""
    by_key_XT = keys_XT.argsort(dim=1, descending=descending, stable=True)
    return by_key_XT.gather(1, lengths_b.bag_of_T[by_key_XT].argsort(dim=1, stable=True))


def chosen_rows(x_mTH: Tensor, rows_mR: Tensor) -> Tensor:
    """Each member's own rows: (m, T, H), (m, R) -> (m, R, H). Its gradient is in order where torch is deterministic."""
    m, n, width = x_mTH.shape
    first_m1 = (torch.arange(m, device=x_mTH.device) * n).unsqueeze(1)
    chosen_RH = x_mTH.reshape(m * n, width).index_select(0, (rows_mR + first_m1).flatten())
    return chosen_RH.view(m, -1, width)


def device_attention(qkv_mTX: Tensor, lengths_b: Segments, attend: Callable[[Tensor, Padded], Tensor]) -> Tensor:
    """Attention between the tiles of each bag: (m, T, X) -> (m, T, H).

    Bags of like length go together, filled up to the longest of them: torch's attention of ragged (nested) tensors is
    there on some devices and types only.

    attend: of queries, keys and values (m, bags, L, X), and of what says where there are tiles: the result,
    (m, bags, L, H). No two gradients meet in one place.
    """
    looked, rows = [], []
    for some in lengths_b.padded:
        looked_mNH = attend(some.spread(qkv_mTX), some).flatten(1, 2)
        looked.append(looked_mNH.index_select(1, some.places_R))
        rows.append(some.rows_R)
    if len(rows) == 1:
        return looked[0]
    looked_mTH = torch.cat(looked, dim=1)
    return torch.empty_like(looked_mTH).index_copy(1, torch.cat(rows), looked_mTH)
