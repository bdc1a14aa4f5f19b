"""Adam for a stack of members: each with its own learning rate, weight decay and step count.

Axes: M members, ... the rest of a parameter's shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MemberAdam(Optimizer):
    """Adam or AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) on parameters of shape (M, ...).

    Equals M separate `torch.optim.Adam`/`AdamW` optimisers. Before a step set `active_M`: members that had no bag in
    the batch, or have stopped, keep their parameters, moments and step count untouched. A scheduler's `lr` (starts at
    1.0) multiplies every member's own learning rate.

    Args:
        parameters: tensors whose first axis is M.
        lr_M, weight_decay_M: one value a member.
        decoupled: True = AdamW, False = Adam with L2.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr_M: Tensor,
        weight_decay_M: Tensor,
        *,
        decoupled: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        super().__init__(parameters, {"lr": 1.0, "betas": betas, "eps": eps})
        self.lr_M, self.weight_decay_M, self.decoupled = lr_M, weight_decay_M, decoupled
        self.active_M = torch.ones(len(lr_M), dtype=torch.bool)
        self.mask_M: Tensor | None = None
        self.decays = bool((weight_decay_M != 0).any())
        self.where: Callable[..., None] = adam_where  # or compiled

    def step_only(self, active_M: Tensor, mask_M: Tensor) -> None:
        """Who takes the next step, on the host and the same on the parameters' device, which is then asked nothing."""
        self.active_M, self.mask_M = active_M, mask_M
        self.lr_M, self.weight_decay_M = self.lr_M.to(mask_M.device), self.weight_decay_M.to(mask_M.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = None if bool(self.active_M.all()) else self.active_M.nonzero().squeeze(1)
        if active is None or len(active):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group, active)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], active: Tensor | None) -> None:
        state = self.state[parameter]
        if not state:
            state["steps_M"] = torch.zeros(len(parameter), device=parameter.device)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        if self.mask_M is not None:
            moments = (state["steps_M"], state["mean"], state["square"])
            lr_M, decay_M = self.lr_M * group["lr"], self.weight_decay_M if self.decays else None
            mask_M = None if active is None else self.mask_M
            said = (lr_M, decay_M, mask_M, group["betas"], group["eps"], self.decoupled)
            self.where(parameter, parameter.grad, moments, *said)
            return
        if active is None:
            self._adam(parameter, parameter.grad, state, group, slice(None))
            return
        active = active.to(parameter.device)
        part, part_state = parameter[active], {name: tensor[active] for name, tensor in state.items()}
        self._adam(part, parameter.grad[active], part_state, group, active)
        parameter[active] = part
        for name, tensor in state.items():
            tensor[active] = part_state[name]

    def _adam(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        members: Tensor | slice,
    ) -> None:
        (beta1, beta2), column = group["betas"], (-1, *[1] * (parameter.dim() - 1))
        lr = (self.lr_M.to(parameter.device)[members] * group["lr"]).view(column)
        decay = self.weight_decay_M.to(parameter.device)[members].view(column)
        steps_M, mean, square = state["steps_M"], state["mean"], state["square"]
        steps_M += 1
        if self.decoupled:
            parameter.mul_(1 - lr * decay)
        elif bool(decay.any()):
            gradient = gradient + decay * parameter
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # 1 - beta ** steps without the cancellation that costs float32 four digits in the first steps
        first, second = (-torch.expm1(steps_M * math.log(beta)).view(column) for beta in (beta1, beta2))
        # in place: at these sizes fresh memory costs more than the arithmetic
        update = torch.div(square, second).sqrt_().add_(group["eps"])
        parameter.sub_(torch.div(mean, update, out=update).mul_(lr / first))


def adam_where(
    parameter: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor, Tensor],
    lr_M: Tensor,
    decay_M: Tensor | None,
    mask_M: Tensor | None,
    betas: tuple[float, float],
    eps: float,
    decoupled: bool,
) -> None:
    """`MemberAdam` on all members at once, in operations whose shapes are always the same.

    moments: steps (M,), mean and square, changed in place like the parameter. mask_M: those outside stay as they are,
    whatever their gradient is; None = everyone steps. decay_M: None = no weight decay.
    """
    (beta1, beta2), column = betas, (-1, *[1] * (parameter.dim() - 1))
    lr, mask = lr_M.view(column), None if mask_M is None else mask_M.view(column)
    steps_M, mean, square = moments
    if mask is not None:
        gradient = torch.where(mask, gradient, 0.0)
    steps_M += 1 if mask_M is None else mask_M
    if decay_M is not None and decoupled:
        shrink = lr * decay_M.view(column)
        parameter.mul_(1 - (shrink if mask is None else shrink * mask))
    elif decay_M is not None:
        gradient = gradient + decay_M.view(column) * parameter
    keep1, keep2 = (1 - beta1, 1 - beta2) if mask is None else (mask * (1 - beta1), mask * (1 - beta2))
    mean.lerp_(gradient, keep1)
    square.mul_(1 - keep2).add_(gradient.square().mul_(keep2))
    first, second = (-torch.expm1(steps_M * math.log(beta)).view(column) for beta in (beta1, beta2))
    change = mean / (square / second).sqrt_().add_(eps) * (lr / first)
    parameter.sub_(change if mask is None else torch.where(mask, change, 0.0))
