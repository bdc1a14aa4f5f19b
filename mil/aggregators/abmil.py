"""ABMIL: attention-based MIL (Ilse, Tomczak, Welling, ICML 2018, sections 2.4 and equations 8 and 9).

Layer sizes are the Phikon paper's (Filiot et al. 2023): linear 768 -> 128, gated attention 128, ReLU head
128-128-64-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from mil.aggregators.batch import Parameters
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import cpu_linear, member_linear, shared_linear, tanh
from mil.aggregators.places import Segments
from mil.aggregators.segments import segment_softmax, segment_sum


class ABMIL(Aggregator):
    """Attention over tiles, then a small network on the attended mean.

    | | as published (Phikon paper) | ours | why |
    | --- | --- | --- | --- |
    | embedding | linear, 128 | the same | |
    | attention | gated, 128, with biases | the same | |
    | head | ReLU 128-64 | the same | |
    | several classes | one logit each | the same, with cross-entropy | |
    | starting values | torch.nn.Linear's | the same | |
    | parameters, 768 features, one logit | 156,418 | 156,418 | |

    Ilse et al. publish the attention and a linear classifier (`head=[]`), behind a convolutional network.

    Args:
        hidden: width of the tile embedding (a linear layer; `embed_relu` adds a ReLU, as CLAM's users expect); 0: none,
            attention over the features themselves, as in torchmil's default.
        attention: width of the attention layers.
        gated: tanh(Vh) * sigmoid(Uh) (equation 9) instead of tanh(Vh) (equation 8).
        head: widths of the ReLU layers between the attended mean and the logits.
    """

    members_at_a_time = 8

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        seeds: Sequence[int],
        *,
        hidden: Annotated[int, Ge(0)] = 128,
        attention: Annotated[int, Ge(1)] = 128,
        gated: bool = True,
        embed_relu: bool = False,
        head: tuple[Annotated[int, Ge(1)], ...] = (128, 64),
    ):
        super().__init__(in_dim, n_outputs, seeds)
        self.gated, self.embed_relu, self.embedded = gated, embed_relu, hidden > 0
        self.floats_per_tile = 2 * hidden + 6 * attention
        if self.embedded:
            self.add_linear("embed", in_dim, hidden)
        self.add_attention("", hidden or in_dim, attention, gated)
        self.add_head(hidden or in_dim, head)

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor]:
        layers = self.layers(p)
        by_hand = tiles_TD.device.type == "cpu" and not isinstance(lengths_b, Segments)
        if len(lengths_b) == 1 and by_hand and not tiles_TD.requires_grad:
            with torch.autocast("cpu", enabled=False):
                pooled_mH, weights_mT = AttendedMean.apply(tiles_TD, self.embed_relu, *layers)
            pooled_mbH = pooled_mH.unsqueeze(1)
        else:
            pooled_mbH, weights_mT = self.pool_by_autograd(tiles_TD, lengths_b, *layers)
        if self.mapped and not self.embedded:  # weights sum to 1, so the mean may be mapped after all
            pooled_mbH = self.seen(pooled_mbH, p)
        return pooled_mbH, weights_mT

    def prepare(self, tiles_TD: Tensor) -> Tensor:
        """In mixed precision on a CPU: converted here, once for all members, as the first product would do for each."""
        tiles_TD, device = super().prepare(tiles_TD), tiles_TD.device.type
        if device == "cpu" and torch.is_autocast_enabled(device):
            return tiles_TD.to(torch.get_autocast_dtype(device))
        return tiles_TD

    def layers(self, p: Parameters) -> list[Any]:
        """Weight (m, I, O) and bias (m, O) of embed, attend, gate, score; None for a layer that is not there."""
        first = "embed" if self.embedded else "attend"
        found: list[Any] = []
        for name, exists in (("embed", self.embedded), ("attend", True), ("gate", self.gated), ("score", True)):
            if not exists:
                found += [None, None]
            elif name == first or (name == "gate" and not self.embedded):
                found += self.first_layer(name, p)
            else:
                found += [p[f"{name}_weight"], p[f"{name}_bias"]]
        return found

    def pool_by_autograd(self, tiles_TD: Tensor, lengths_b: Sequence[int], *layers: Any) -> tuple[Tensor, Tensor]:
        """`pool` for any number of members and bags; `layers` as `self.layers` gives them."""
        embed_mDH, embed_bias_mH, attend_mHA, attend_bias_mA, gate_mHA, gate_bias_mA, score_mA1, score_bias_m1 = layers
        m = len(score_bias_m1)
        h_mTH = tiles_TD.expand(m, -1, -1)
        if embed_mDH is not None:
            h_mTH = shared_linear(tiles_TD, embed_mDH, embed_bias_mH)
            h_mTH = torch.relu(h_mTH) if self.embed_relu else h_mTH
        a_mTA = tanh(member_linear(h_mTH, attend_mHA, attend_bias_mA))
        if gate_mHA is not None:
            a_mTA = a_mTA * torch.sigmoid(member_linear(h_mTH, gate_mHA, gate_bias_mA))
        scores_mT = member_linear(a_mTA, score_mA1, score_bias_m1).squeeze(2)
        weights_mT = segment_softmax(scores_mT, lengths_b)
        return segment_sum(weights_mT, h_mTH, lengths_b), weights_mT

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return self.run_head(pooled_MBP, torch.relu)

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        embed_mDH, embed_bias_mH = self.layers(self.stacks())[:2]
        if embed_mDH is None or embed_bias_mH is None:
            return super().tile_logits(tiles_TD)
        h_MTH = shared_linear(tiles_TD, embed_mDH, embed_bias_mH)
        return self.with_cuts(self.head(torch.relu(h_MTH) if self.embed_relu else h_MTH))


class AttendedMean(torch.autograd.Function):
    """What `ABMIL.pool` does to one bag of m members, with the gradient written by hand.

    On a CPU this is the training: matrix products, and what autograd adds between them (a copy, a zero fill, an
    addition at every step). With the score's weights w

        gated:    scores = (tanh(hV + c) * sigmoid(hU + d)) w          not gated:    scores = tanh(hV + c) w

    where oneDNN's products apply tanh and sigmoid while the result is in the cache. Members go one by one for the same
    reason. Products of matrices, and what is kept for backward, are in the tiles' type (bfloat16 in mixed precision: in
    the places that torch's autocast would choose); scores, weights and means are float32.

    Axes as in `mil.aggregators.layers`: m members, T tiles, D features, H hidden (D where nothing is embedded), A
    attention.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]  # torch does not annotate it
    def forward(
        ctx: Any,
        tiles_TD: Tensor,
        relu: bool,
        embed_mDH: Tensor | None,
        embed_bias_mH: Tensor | None,
        attend_mHA: Tensor,
        attend_bias_mA: Tensor,
        gate_mHA: Tensor | None,
        gate_bias_mA: Tensor | None,
        score_mA1: Tensor,
        score_bias_m1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.relu, m, lower = relu, len(attend_mHA), tiles_TD.dtype
        given = (embed_mDH, embed_bias_mH, attend_mHA, attend_bias_mA, gate_mHA, gate_bias_mA)
        lowered: list[Any] = [None if x is None else x.to(lower) for x in given]
        embed, embed_bias, attend, attend_bias, gate, gate_bias = lowered
        w_mA = score_mA1.squeeze(2)
        pooled_mH, weights_mT = w_mA.new_empty(m, attend_mHA.shape[1]), w_mA.new_empty(m, len(tiles_TD))
        kept: list[Tensor | None] = []
        for i in range(m):
            h_TH, g_TA = tiles_TD, None
            if embed is not None:
                h_TH = cpu_linear(tiles_TD, embed[i], embed_bias[i], "relu" if relu else "none")
            a_TA = cpu_linear(h_TH, attend[i], attend_bias[i], "tanh")
            if gate is not None:
                g_TA = cpu_linear(h_TH, gate[i], gate_bias[i], "sigmoid")
            scores_T = torch.mv(times(a_TA, g_TA).float(), w_mA[i]).add_(score_bias_m1[i])
            torch.softmax(scores_T, dim=0, out=weights_mT[i])
            if embed is not None:
                torch.mv(h_TH.float().t(), weights_mT[i], out=pooled_mH[i])
            kept += [None if embed is None else h_TH, a_TA, g_TA]
        if embed is None:
            torch.mm(weights_mT, tiles_TD.float(), out=pooled_mH)
        ctx.save_for_backward(tiles_TD, embed, attend, gate, w_mA, weights_mT, *kept)
        ctx.mark_non_differentiable(weights_mT)
        return pooled_mH, weights_mT

    @staticmethod
    # autocast as in forward, where `pool` puts it off
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]  # torch does not annotate it
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tiles_TD, embed, attend, gate, w_mA, weights_mT, *kept = ctx.saved_tensors
        dpooled_mH, m = gradients[0], len(attend)
        shares_mT = torch.mm(dpooled_mH, tiles_TD.float().t()) if embed is None else None
        dembed, dembed_bias = empty_gradients(embed)
        dattend, dattend_bias = empty_gradients(attend)
        dgate, dgate_bias = empty_gradients(gate)
        dscore_mA, dscore_bias_m = torch.empty_like(w_mA), w_mA.new_empty(m)
        for i, (kept_TH, a_TA, g_TA) in enumerate(zip(kept[::3], kept[1::3], kept[2::3], strict=True)):
            h_TH = tiles_TD if kept_TH is None else kept_TH
            share_T = torch.mv(h_TH.float(), dpooled_mH[i]) if shares_mT is None else shares_mT[i]
            ds_T = weights_mT[i] * (share_T - torch.dot(weights_mT[i], share_T))  # softmax
            dscore_mA[i], dscore_bias_m[i] = torch.mv(times(a_TA, g_TA).float().t(), ds_T), ds_T.sum()
            dproduct_TA = torch.outer(ds_T, w_mA[i]).to(a_TA.dtype)
            da_TA = times(dproduct_TA, g_TA)
            if g_TA is not None:
                dg_TA = dproduct_TA.mul_(a_TA)
                torch.ops.aten.sigmoid_backward.grad_input(dg_TA, g_TA, grad_input=dg_TA)
                dgate[i], dgate_bias[i] = torch.mm(h_TH.t(), dg_TA), dg_TA.sum(dim=0)
            torch.ops.aten.tanh_backward.grad_input(da_TA, a_TA, grad_input=da_TA)
            dattend[i], dattend_bias[i] = torch.mm(h_TH.t(), da_TA), da_TA.sum(dim=0)
            if embed is not None:
                dh_TH = torch.outer(weights_mT[i], dpooled_mH[i]).to(a_TA.dtype)  # of the mean
                dh_TH.addmm_(da_TA, attend[i].t())
                if g_TA is not None:
                    dh_TH.addmm_(dg_TA, gate[i].t())
                if ctx.relu:
                    dh_TH.mul_(h_TH > 0)
                dembed[i], dembed_bias[i] = torch.mm(tiles_TD.t(), dh_TH), dh_TH.sum(dim=0)
        dscore = dscore_mA.unsqueeze(2), dscore_bias_m.unsqueeze(1)
        return None, None, dembed, dembed_bias, dattend, dattend_bias, dgate, dgate_bias, *dscore


def times(a_TA: Tensor, g_TA: Tensor | None) -> Tensor:
    """Attention with its gate, where there is one."""
    return a_TA if g_TA is None else a_TA * g_TA


def empty_gradients(weight_mIO: Tensor | None) -> Any:
    """Of a layer's weight and bias, float32 Tensors; None, None for a layer that is not there."""
    if weight_mIO is None:
        return None, None
    dweight_mIO = torch.empty_like(weight_mIO, dtype=torch.float32)
    return dweight_mIO, dweight_mIO.new_empty(len(weight_mIO), weight_mIO.shape[2])
