"""MemberAdam equals as many optimisers of torch as there are members."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from mil.training.optim import MemberAdam

SHAPES = ((4, 3), (3,), ())
LR_M = torch.tensor([1e-3, 3e-2, 1e-1])
ACTIVE = [(True, True, True), (True, False, True), (False, False, False), (False, True, True), (True, True, True)]
"""Who takes part in each step."""


def starting_values() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((3, *shape), generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn((3, *shape), generator=generator) for shape in SHAPES]


def member_adam(values: list[Tensor], decay_M: Tensor, decoupled: bool) -> tuple[list[nn.Parameter], MemberAdam]:
    parameters = [nn.Parameter(value.clone()) for value in values]
    return parameters, MemberAdam(parameters, LR_M, decay_M, decoupled=decoupled)


def take_step(parameters: list[nn.Parameter], optimizer: MemberAdam, step: int) -> None:
    for parameter, gradient in zip(parameters, gradients(step), strict=True):
        parameter.grad = gradient
    optimizer.active_M = torch.tensor(ACTIVE[step % len(ACTIVE)])
    optimizer.step()


def by_torch(decay_M: Tensor, decoupled: bool, n_steps: int, factors: list[float] | None = None) -> list[Tensor]:
    """The stacks after M separate optimisers took the steps that their member took part in."""
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    members = []
    for m in range(3):
        parameters = [nn.Parameter(value[m].clone()) for value in starting_values()]
        optimizer = kind(parameters, lr=float(LR_M[m]), weight_decay=float(decay_M[m]))
        for step in range(n_steps):
            if not ACTIVE[step % len(ACTIVE)][m]:
                continue
            optimizer.param_groups[0]["lr"] = float(LR_M[m]) * (factors[step] if factors else 1.0)
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient[m]
            optimizer.step()
        members.append([parameter.detach() for parameter in parameters])
    return [torch.stack(stack) for stack in zip(*members, strict=True)]


DECAYS = [torch.zeros(3), torch.tensor([0.0, 1e-2, 0.5])]


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
@pytest.mark.parametrize("decay_M", DECAYS, ids=["no-decay", "decay"])
def test_equals_one_optimizer_of_torch_for_each_member(decay_M, decoupled):
    parameters, optimizer = member_adam(starting_values(), decay_M, decoupled)
    for step in range(12):
        take_step(parameters, optimizer, step)
    for parameter, expected in zip(parameters, by_torch(decay_M, decoupled, 12), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_a_scheduler_multiplies_every_members_learning_rate(decoupled):
    parameters, optimizer = member_adam(starting_values(), DECAYS[1], decoupled)
    factors = [1.0, 0.5, 0.25, 2.0, 0.1, 1.0]
    assert optimizer.param_groups[0]["lr"] == 1
    for step, factor in enumerate(factors):
        optimizer.param_groups[0]["lr"] = factor
        take_step(parameters, optimizer, step)
    for parameter, expected in zip(parameters, by_torch(DECAYS[1], decoupled, 6, factors), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_members_that_are_not_active_keep_every_bit():
    parameters, optimizer = member_adam(starting_values(), torch.full((3,), 0.1), decoupled=True)
    take_step(parameters, optimizer, 0)
    before = [parameter.detach().clone() for parameter in parameters]
    take_step(parameters, optimizer, 1)
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter[1], old[1])
        assert not torch.equal(parameter[0], old[0])


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_state_dict_round_trip_continues_bit_for_bit(decoupled):
    """Through a file, as a checkpoint goes."""
    parameters, optimizer = member_adam(starting_values(), DECAYS[1], decoupled)
    for step in range(4):
        take_step(parameters, optimizer, step)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies, other = member_adam([parameter.detach() for parameter in parameters], DECAYS[1], decoupled)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 8):
        take_step(parameters, optimizer, step)
        take_step(copies, other, step)
    for parameter, copy in zip(parameters, copies, strict=True):
        assert torch.equal(parameter, copy)


def test_parameters_without_a_gradient_are_left_alone():
    parameters, optimizer = member_adam(starting_values(), DECAYS[0], decoupled=False)
    parameters[0].grad = gradients(0)[0]
    optimizer.step()
    assert not torch.equal(parameters[0].detach(), starting_values()[0])
    for parameter, old in zip(parameters[1:], starting_values()[1:], strict=True):
        assert torch.equal(parameter.detach(), old)


def test_the_closures_loss_is_returned_and_its_gradient_used():
    parameters, optimizer = member_adam(starting_values(), DECAYS[0], decoupled=False)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((parameter.square().sum() for parameter in parameters), torch.zeros(()))
        loss.backward()
        return loss

    first = closure().item()
    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == first
    assert losses[-1] < 0.7 * first
