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

    one_member_at_a_time = True

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
        one_bag_of_one_member = len(lengths_b) == 1 and len(p["score_bias"]) == 1
        if one_bag_of_one_member and not tiles_TD.requires_grad:
            with torch.autocast(tiles_TD.device.type, enabled=False):
                pooled_H, weights_T = AttendedMean.apply(
                    tiles_TD, self.embed_relu, *[None if x is None else x.squeeze(0) for x in layers]
                )
            return pooled_H.view(1, 1, -1), weights_T.unsqueeze(0)
        return self.pool_by_autograd(tiles_TD, lengths_b, *layers)

    def prepare(self, tiles_TD: Tensor) -> Tensor:
        """In mixed precision on a CPU: converted here, once for all members, as the first product would do for each."""
        tiles_TD, device = super().prepare(tiles_TD), tiles_TD.device.type
        if device == "cpu" and torch.is_autocast_enabled(device):
            return tiles_TD.to(torch.get_autocast_dtype(device))
        return tiles_TD

    def layers(self, p: Parameters) -> list[Tensor | None]:
        """Weight (m, I, O) and bias (m, O) of embed, attend, gate, score; None for a layer that is not there."""
        first = "embed" if self.embedded else "attend"
        found: list[Tensor | None] = []
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


class AttendedMean(torch.autograd.Function):
    """What `ABMIL.pool` does to one bag of one member, with the gradient written by hand.

    On a CPU this is the training: five matrix products a bag, and what autograd adds between them (a copy, a zero fill,
    an addition at every step). tanh(x) is 2 s(2x) - 1 with s the sigmoid, so attention and gate are one sigmoid over
    both layers' columns X side by side, [p, q] = [s(2(hV + c)), s(hU + d)], and with the score's weights w

        gated:    scores = ((2p - 1) q) w = 2 (p q) w - q w          not gated:    scores = (2p - 1) w

    Products of matrices, and what is kept for backward, are in the tiles' type (bfloat16 in mixed precision: in the
    places that torch's autocast would choose); scores, weights and means are float32.

    Axes as in `mil.aggregators.layers`, without members: T tiles, D features, H hidden, A attention, X = A or 2A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tiles_TD: Tensor,
        relu: bool,
        embed_DH: Tensor | None,
        embed_bias_H: Tensor | None,
        attend_HA: Tensor,
        attend_bias_A: Tensor,
        gate_HA: Tensor | None,
        gate_bias_A: Tensor | None,
        score_A1: Tensor,
        score_bias_1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.relu, ctx.embedded, ctx.gated = relu, embed_DH is not None, gate_HA is not None
        h_TH, lower = tiles_TD, tiles_TD.dtype
        if embed_DH is not None and embed_bias_H is not None:
            h_TH = torch.addmm(embed_bias_H.to(lower), tiles_TD, embed_DH.to(lower))
            if relu:
                h_TH.relu_()
        both_HX, both_bias_X = 2 * attend_HA, 2 * attend_bias_A
        if gate_HA is not None and gate_bias_A is not None:
            both_HX, both_bias_X = torch.cat([both_HX, gate_HA], dim=1), torch.cat([both_bias_X, gate_bias_A])
        s_TX = torch.addmm(both_bias_X.to(lower), h_TH, both_HX.to(lower)).sigmoid_()
        w_A = score_A1.squeeze(1)
        product_TA = s_TX
        if ctx.gated:
            p_TA, q_TA = s_TX.chunk(2, dim=1)
            product_TA = p_TA * q_TA
            scores_T = torch.mv(product_TA.float(), 2 * w_A).sub_(torch.mv(q_TA.float(), w_A)).add_(score_bias_1)
        else:
            scores_T = torch.mv(s_TX.float(), 2 * w_A) + (score_bias_1 - w_A.sum())
        weights_T = torch.softmax(scores_T, dim=0)
        ctx.save_for_backward(tiles_TD, h_TH, both_HX, s_TX, product_TA, w_A, weights_T)
        ctx.mark_non_differentiable(weights_T)
        return torch.mv(h_TH.float().t(), weights_T), weights_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tiles_TD, h_TH, both_HX, s_TX, product_TA, w_A, weights_T = ctx.saved_tensors
        dpooled_H, n, lower = gradients[0], len(w_A), h_TH.dtype
        share_T = torch.mv(h_TH.float(), dpooled_H)
        ds_T = weights_T * (share_T - torch.dot(weights_T, share_T))  # softmax
        dw_A = 2 * torch.mv(product_TA.float().t(), ds_T)
        # dx_TX: gradient of the sigmoids' input, but for a factor a column, which `factor_X` puts right below
        factor_X = both_HX.new_ones(both_HX.shape[1])
        if ctx.gated:
            p_TA, q_TA = s_TX.chunk(2, dim=1)
            dw_A -= torch.mv(q_TA.float().t(), ds_T)
            dx_TX, minus_TA = torch.empty_like(s_TX), torch.outer(ds_T, -w_A).to(lower)
            torch.mul(minus_TA, q_TA, out=dx_TX[:, :n])
            torch.addcmul(minus_TA, minus_TA, p_TA, value=-2, out=dx_TX[:, n:])
            factor_X[:n] = -2
        else:
            dx_TX = torch.outer(ds_T, w_A).to(lower)
            dw_A -= ds_T.sum()
            factor_X[:n] = 2
        torch.ops.aten.sigmoid_backward.grad_input(dx_TX, s_TX, grad_input=dx_TX)

        dembed_DH, dembed_bias_H = None, None
        if ctx.embedded:
            of_mean_TH = torch.outer(weights_T, dpooled_H).to(lower)
            dh_TH = of_mean_TH.addmm_(dx_TX, (both_HX * factor_X).to(lower).t())
            if ctx.relu:
                dh_TH.mul_(h_TH > 0)
            dembed_DH = torch.mm(tiles_TD.t(), dh_TH).float()
            dembed_bias_H = dh_TH.sum(dim=0).float()
        factor_X[:n] *= 2  # the attention's sigmoid got twice its layer's output
        dboth_HX = torch.mm(h_TH.t(), dx_TX).float().mul_(factor_X)
        dboth_bias_X = dx_TX.sum(dim=0).float().mul_(factor_X)
        dgate = (dboth_HX[:, n:], dboth_bias_X[n:]) if ctx.gated else (None, None)
        dattend = (dboth_HX[:, :n], dboth_bias_X[:n])
        dscore = (dw_A.unsqueeze(1), ds_T.sum().view(1))
        return None, None, dembed_DH, dembed_bias_H, *dattend, *dgate, *dscore
