"""ABMIL: attention-based MIL (Ilse, Tomczak, Welling, ICML 2018, sections 2.4 and equations 8 and 9).

Layer sizes are the Phikon paper's (Filiot et al. 2023): linear 768 -> 128, gated attention 128, ReLU head 128-64-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mil.aggregators.layers import (
    Aggregator,
    Parameters,
    cpu_linear,
    member_linear,
    segment_softmax,
    segment_sum,
    shared_linear,
    tanh,
)


class ABMIL(Aggregator):
    """Attention over tiles, then a small network on the attended mean.

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
        hidden: int = 128,
        attention: int = 128,
        gated: bool = True,
        embed_relu: bool = False,
        head: tuple[int, ...] = (64,),
    ):
        super().__init__(in_dim, n_outputs, seeds)
        if hidden < 0 or attention < 1:
            raise ValueError(f"model.hidden={hidden} model.attention={attention}: expected at least 0 and 1")
        self.gated, self.embed_relu, self.embedded = gated, embed_relu, hidden > 0
        self.floats_per_tile = 2 * hidden + 6 * attention
        if self.embedded:
            self.add_linear("embed", in_dim, hidden)
        self.add_linear("attend", hidden or in_dim, attention)
        if gated:
            self.add_linear("gate", hidden or in_dim, attention)
        self.add_linear("score", attention, 1)
        self.add_head(hidden or in_dim, head)

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor]:
        layers = self.layers(p)
        if len(lengths_b) == 1 and tiles_TD.device.type == "cpu" and not tiles_TD.requires_grad:
            with torch.autocast("cpu", enabled=False):
                pooled_mH, weights_mT = AttendedMean.apply(tiles_TD, self.embed_relu, *layers)
            pooled_mbH = pooled_mH.unsqueeze(1)
        else:
            pooled_mbH, weights_mT = self.pool_by_autograd(tiles_TD, lengths_b, *layers)
        if self.standardized and not self.embedded:  # weights sum to 1, so the mean may be standardised after all
            pooled_mbH = (pooled_mbH - p["input_mean_MD"].unsqueeze(1)) * p["input_scale_MD"].unsqueeze(1)
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
        return self.head(torch.relu(h_MTH) if self.embed_relu else h_MTH)


class AttendedMean(torch.autograd.Function):
    """What `ABMIL.pool` does to one bag of m members, with the gradient written by hand.

    On a CPU this is the training: matrix products, and what autograd adds between them (a copy, a zero fill, an
    addition at every step). The embedding of all members is one product, and so is its gradient; attention goes member
    by member. tanh(x) is 2 s(2x) - 1 with s the sigmoid, so attention and gate are one sigmoid over both layers'
    columns X side by side, [p, q] = [s(2(hV + c)), s(hU + d)], and with the score's weights w

        gated:    scores = ((2p - 1) q) w          not gated:    scores = (2p - 1) w

    Products of matrices, and what is kept for backward, are in the tiles' type (bfloat16 in mixed precision: in the
    places that torch's autocast would choose); scores, weights and means are float32.

    Axes as in `mil.aggregators.layers`: m members, T tiles, D features, H hidden, A attention, X = A or 2A.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
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
        ctx.relu, ctx.embedded, ctx.gated = relu, embed_mDH is not None, gate_mHA is not None
        m, lower = len(attend_mHA), tiles_TD.dtype
        both_mHX, both_bias_mX = 2 * attend_mHA, 2 * attend_bias_mA
        if gate_mHA is not None and gate_bias_mA is not None:
            both_mHX, both_bias_mX = torch.cat([both_mHX, gate_mHA], 2), torch.cat([both_bias_mX, gate_bias_mA], 1)
        both_mHX, both_bias_mX = both_mHX.to(lower), both_bias_mX.to(lower)
        if embed_mDH is not None and embed_bias_mH is not None:
            h_mTH = shared_linear(tiles_TD, embed_mDH.to(lower), embed_bias_mH.to(lower), cpu_linear)
            if relu:
                h_mTH.relu_()
            s_mTX = tuple(cpu_linear(h_mTH[i], both_mHX[i], both_bias_mX[i]).sigmoid_() for i in range(m))
        else:
            h_mTH = tiles_TD.expand(m, -1, -1)
            s_mTX = shared_linear(tiles_TD, both_mHX, both_bias_mX, cpu_linear).sigmoid_().unbind()
        w_mA = score_mA1.squeeze(2)
        pooled_mH, weights_mT = w_mA.new_empty(m, h_mTH.shape[2]), w_mA.new_empty(m, len(tiles_TD))
        for i, (h_TH, s_TX) in enumerate(zip(h_mTH, s_mTX, strict=True)):
            scores_T = torch.mv(minus_tanh_times_gate(s_TX, ctx.gated).float(), -w_mA[i]).add_(score_bias_m1[i])
            torch.softmax(scores_T, dim=0, out=weights_mT[i])
            if ctx.embedded:
                torch.mv(h_TH.float().t(), weights_mT[i], out=pooled_mH[i])
        if not ctx.embedded:
            torch.mm(weights_mT, tiles_TD.float(), out=pooled_mH)
        ctx.save_for_backward(tiles_TD, h_mTH, both_mHX, w_mA, weights_mT, *s_mTX)
        ctx.mark_non_differentiable(weights_mT)
        return pooled_mH, weights_mT

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # autocast as in forward, where `pool` puts it off
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tiles_TD, h_mTH, both_mHX, w_mA, weights_mT, *s_mTX = ctx.saved_tensors
        dpooled_mH, (m, n), (_, n_tiles, hidden) = gradients[0], w_mA.shape, h_mTH.shape
        # dx: gradient of the sigmoids' input, but for a factor a column. tanh's sigmoid got twice its layer's output.
        factor_X = w_mA.new_ones(both_mHX.shape[2])
        factor_X[:n] = -2 if ctx.gated else 2
        both_mXH = (both_mHX * factor_X).to(both_mHX.dtype).transpose(1, 2)
        dh_TmH = both_mHX.new_empty(n_tiles, m, hidden) if ctx.embedded else None
        dx_TmX = None if ctx.embedded else both_mHX.new_empty(n_tiles, m, both_mHX.shape[2])
        share_Tm = None if ctx.embedded else torch.mm(tiles_TD.float(), dpooled_mH.t())
        dboth_mHX = both_mHX.new_empty(both_mHX.shape, dtype=torch.float32)
        dboth_bias_mX = w_mA.new_empty(m, both_mHX.shape[2])
        dscore_mA, dscore_bias_m = torch.empty_like(w_mA), w_mA.new_empty(m)
        for i, (h_TH, s_TX, w_A, weights_T) in enumerate(zip(h_mTH, s_mTX, w_mA, weights_mT, strict=True)):
            minus_a_TA = minus_tanh_times_gate(s_TX, ctx.gated)
            share_T = share_Tm[:, i] if share_Tm is not None else torch.mv(h_TH.float(), dpooled_mH[i])
            ds_T = weights_T * (share_T - torch.dot(weights_T, share_T))  # softmax
            dscore_mA[i], dscore_bias_m[i] = torch.mv(minus_a_TA.float().t(), -ds_T), ds_T.sum()
            dx_TX = torch.empty_like(s_TX) if dx_TmX is None else dx_TmX[:, i]
            if ctx.gated:
                (p_TA, q_TA), minus_TA = s_TX.chunk(2, dim=1), torch.outer(ds_T, -w_A).to(s_TX.dtype)
                torch.mul(minus_TA, q_TA, out=dx_TX[:, :n])
                torch.addcmul(minus_TA, minus_TA, p_TA, value=-2, out=dx_TX[:, n:])
            else:
                torch.mul(ds_T.unsqueeze(1), w_A, out=dx_TX)
            torch.ops.aten.sigmoid_backward.grad_input(dx_TX, s_TX, grad_input=dx_TX)
            dboth_bias_mX[i] = dx_TX.sum(dim=0)
            if dh_TmH is not None:
                dh_TH = dh_TmH[:, i]
                torch.mul(weights_T.unsqueeze(1), dpooled_mH[i], out=dh_TH)  # of the mean
                dh_TH.add_(cpu_linear(dx_TX, both_mXH[i]))
                if ctx.relu:
                    dh_TH.mul_(h_TH > 0)
                dboth_mHX[i] = torch.mm(h_TH.t(), dx_TX)

        dembed_mDH, dembed_bias_mH = None, None
        if dx_TmX is not None:
            dboth_mHX = shared_product_gradient(tiles_TD, dx_TmX)
        if dh_TmH is not None:
            dembed_mDH, dembed_bias_mH = shared_product_gradient(tiles_TD, dh_TmH), dh_TmH.sum(dim=0).float()
        factor_X[:n] *= 2
        dboth_mHX, dboth_bias_mX = dboth_mHX * factor_X, dboth_bias_mX * factor_X
        dgate = (dboth_mHX[:, :, n:], dboth_bias_mX[:, n:]) if ctx.gated else (None, None)
        dattend = (dboth_mHX[:, :, :n], dboth_bias_mX[:, :n])
        dscore = (dscore_mA.unsqueeze(2), dscore_bias_m.unsqueeze(1))
        return None, None, dembed_mDH, dembed_bias_mH, *dattend, *dgate, *dscore


def shared_product_gradient(x_TI: Tensor, dy_TmO: Tensor) -> Tensor:
    """Of `shared_linear`'s weight, float32: (m, I, O), a view."""
    dweight_IX = torch.mm(x_TI.t(), dy_TmO.flatten(1)).float()
    return dweight_IX.unflatten(1, dy_TmO.shape[1:]).transpose(0, 1)


def minus_tanh_times_gate(s_TX: Tensor, gated: bool) -> Tensor:
    """-(2p - 1) q of s = [p, q], or -(2p - 1) of s = p: the negative, because it is one pass over memory."""
    if not gated:
        return 1 - 2 * s_TX
    p_TA, q_TA = s_TX.chunk(2, dim=1)
    return torch.addcmul(q_TA, p_TA, q_TA, value=-2)
