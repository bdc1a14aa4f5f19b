"""Layers that hold M members, and their losses.

Axes: M members of the study, m members selected for one group, T tiles laid end to end, B bags of the batch,
D input features, H hidden, C outputs (1 for two classes), I and O inputs and outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mil.aggregators.batch import Parameters


def labels_of_members(labels: Tensor, like_MBX: Tensor) -> Tensor:
    """(B,) for all members, or (M, B): their class indices, (M, B).

    -1 counts as class 0: only a bag that the member does not use may have it, and that loss has no weight.
    """
    return labels.clamp_min(0).expand(like_MBX.shape[:2])


def cross_entropy(logits_MBC: Tensor, labels: Tensor) -> Tensor:
    """Of every member on every bag, (M, B); one logit = binary cross-entropy. labels: (B,), or (M, B)."""
    labels_MB = labels_of_members(labels, logits_MBC)
    if logits_MBC.shape[2] == 1:
        targets_MB = labels_MB.to(logits_MBC)
        return functional.binary_cross_entropy_with_logits(logits_MBC.squeeze(2), targets_MB, reduction="none")
    return functional.cross_entropy(logits_MBC.movedim(2, 1), labels_MB, reduction="none")


def cross_entropy_by_label(logits_C: Tensor) -> Tensor:
    """Cross-entropy for each label that a bag could have: (..., C) -> (..., labels); two labels for one logit."""
    if logits_C.shape[-1] == 1:
        return functional.softplus(torch.cat([logits_C, -logits_C], dim=-1))
    return -torch.log_softmax(logits_C, dim=-1)


def of_label(values_MBL: Tensor, labels: Tensor) -> Tensor:
    """The column of each bag's label: (M, B, labels) -> (M, B). labels: (B,), or (M, B)."""
    return values_MBL.gather(2, labels_of_members(labels, values_MBL).unsqueeze(2)).squeeze(2)


def shared_linear(x_TD: Tensor, weight_mDH: Tensor, bias_mH: Tensor) -> Tensor:
    """The same tiles through m members' layers as ONE matrix product: (T, D) -> (m, T, H), a view where m > 1."""
    m, d, h = weight_mDH.shape
    weight_DX = weight_mDH.squeeze(0) if m == 1 else weight_mDH.permute(1, 0, 2).reshape(d, m * h)
    return torch.addmm(bias_mH.reshape(-1), x_TD, weight_DX).view(len(x_TD), m, h).transpose(0, 1)


def cpu_linear(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor, activation: str = "none") -> Tensor:
    """(T, I), (I, O) -> (T, O) without autograd, by oneDNN: a tenth quicker than torch's default product on a CPU.

    activation: "none", "relu", "sigmoid" or "tanh" of the result, applied while it is in the cache.
    """
    if torch.backends.mkldnn.is_available():
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_IO.t(), bias_O, activation, [], "")
        return y_TO
    y_TO = torch.addmm(bias_O, x_TI, weight_IO)
    return y_TO if activation == "none" else getattr(y_TO, f"{activation}_")()


def member_linear(x_mTI: Tensor, weight_mIO: Tensor, bias_mO: Tensor) -> Tensor:
    """Each member's layer on its own input: (m, T, I) -> (m, T, O)."""
    if len(x_mTI) == 1:  # addmm is quicker than a batched product of one
        return torch.addmm(bias_mO.squeeze(0), x_mTI.squeeze(0), weight_mIO.squeeze(0)).unsqueeze(0)
    return torch.baddbmm(bias_mO.unsqueeze(1), x_mTI, weight_mIO)


def member_norm(x_mTH: Tensor, scale_mH: Tensor, shift_mH: Tensor) -> Tensor:
    """LayerNorm with each member's own scale and shift: (m, T, H) -> (m, T, H)."""
    if len(x_mTH) == 1:
        return functional.layer_norm(x_mTH, x_mTH.shape[2:], scale_mH[0], shift_mH[0])
    return torch.addcmul(shift_mH.unsqueeze(1), functional.layer_norm(x_mTH, x_mTH.shape[2:]), scale_mH.unsqueeze(1))


def layer(name: str, x_mTI: Tensor, p: Parameters) -> Tensor:
    """Layer NAME of each member on its own input: (m, T, I) -> (m, T, O)."""
    return member_linear(x_mTI, p[f"{name}_weight"], p[f"{name}_bias"])


def norm(name: str, x_mTH: Tensor, p: Parameters) -> Tensor:
    """LayerNorm NAME of each member: (m, T, H) -> (m, T, H)."""
    return member_norm(x_mTH, p[f"{name}_scale"], p[f"{name}_shift"])


def numbered(prefix: str, n: int) -> list[str]:
    """PREFIX0, PREFIX1, ...: names of layers that come one after the other."""
    return [f"{prefix}{i}" for i in range(n)]


def deeper(names: Sequence[str], x_mTI: Tensor, p: Parameters, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Layers NAMES with `activation` in front of each: (m, T, I) -> (m, T, O)."""
    for name in names:
        x_mTI = layer(name, activation(x_mTI), p)
    return x_mTI


def kept_whole(x_mTH: Tensor, what: str) -> Tensor:
    """No dropout."""
    return x_mTH


def attention_scores(
    prefix: str, x_mTH: Tensor, p: Parameters, gated: bool = True, drop: Callable[[Tensor, str], Tensor] = kept_whole
) -> Tensor:
    """Ilse et al. 2018, equations 8 and 9, before the softmax: PREFIXattend, PREFIXgate, PREFIXscore -> (m, T).

    drop: dropout of both branches, told which ("attend", "gate").
    """
    a_mTA = drop(tanh(layer(f"{prefix}attend", x_mTH, p)), "attend")
    if gated:
        a_mTA = a_mTA * drop(torch.sigmoid(layer(f"{prefix}gate", x_mTH, p)), "gate")
    return layer(f"{prefix}score", a_mTA, p).squeeze(2)


def split_heads(x_mTH: Tensor, heads: int) -> Tensor:
    """(m, T, H) -> (m, heads, T, H / heads), a view."""
    heads_mhTE: Tensor = x_mTH.unflatten(2, (heads, -1)).transpose(1, 2)
    return heads_mhTE


def heads_of_bags(qkv_mTX: Tensor, heads: int, lengths_b: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each bag, (m, heads, L, E): three equal blocks of columns X."""
    parts = [split_heads(part_mTH, heads).split(list(lengths_b), dim=2) for part_mTH in qkv_mTX.chunk(3, dim=2)]
    return zip(*parts, strict=True)


def join_heads(x_maTE: Tensor) -> Tensor:
    """(m, heads, T, H / heads) -> (m, T, H)."""
    return x_maTE.transpose(1, 2).flatten(2)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent by way of the sigmoid, which is several times quicker on a CPU; equal to about 1e-7."""
    return torch.tanh(x) if x.is_cuda else 2 * torch.sigmoid(2 * x) - 1
