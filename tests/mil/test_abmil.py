"""The gradient written by hand in `AttendedMean` against torch's autograd, in float32 and in mixed precision."""

import pytest
import torch
from torch import Tensor

from mil.aggregators.abmil import ABMIL

VARIANTS = {
    "gated": {},
    "ungated": {"gated": False},
    "relu": {"embed_relu": True},
    "no-embedding": {"hidden": 0},
    "no-embedding-ungated": {"hidden": 0, "gated": False},
}


def outcome(aggregator: ABMIL, tiles_TD: Tensor, by_hand: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Pooled features, weights, and the gradients of a loss that sees every pooled feature differently."""
    p = {name: stack.detach().requires_grad_() for name, stack in aggregator.named_parameters()}
    pool = aggregator.pool if by_hand else lambda *a: aggregator.pool_by_autograd(*a[:2], *aggregator.layers(a[2]))
    pooled_m1P, weights_mT = pool(tiles_TD, [len(tiles_TD)], p)
    (pooled_m1P.float() * torch.linspace(-1, 2, pooled_m1P.shape[2])).sum().backward()
    return (
        pooled_m1P.detach().float(),
        weights_mT.detach().float(),
        {n: q.grad for n, q in p.items() if q.grad is not None},
    )


def setting(variant: str) -> tuple[ABMIL, Tensor]:
    generator = torch.Generator().manual_seed(3)
    options = {"hidden": 24, "attention": 16} | VARIANTS[variant]
    return ABMIL(40, 1, [5, 6, 7], **options), torch.randn(130, 40, generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_by_hand_is_autograds(variant):
    aggregator, tiles_TD = setting(variant)
    pooled, weights, gradients = outcome(aggregator, tiles_TD, by_hand=True)
    expected_pooled, expected_weights, expected = outcome(aggregator, tiles_TD, by_hand=False)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights, expected_weights, atol=1e-7, rtol=1e-5)
    assert set(gradients) == set(expected) >= {"attend_weight", "score_weight"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-4)


def test_a_processor_without_onednn_gets_the_same(monkeypatch):
    aggregator, tiles_TD = setting("gated")
    pooled, _, gradients = outcome(aggregator, tiles_TD, by_hand=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    others_pooled, _, others = outcome(aggregator, tiles_TD, by_hand=True)
    torch.testing.assert_close(others_pooled, pooled, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision_is_near_float32_and_no_further_from_it_than_autocast(variant):
    aggregator, tiles_TD = setting(variant)
    exact_pooled, _, exact = outcome(aggregator, tiles_TD, by_hand=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert aggregator.prepare(tiles_TD.half()).dtype == torch.bfloat16
        pooled, weights, gradients = outcome(aggregator, aggregator.prepare(tiles_TD), by_hand=True)
        rough_pooled, _, rough = outcome(aggregator, tiles_TD, by_hand=False)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    assert not torch.equal(pooled, exact_pooled), "bfloat16 was not used"
    assert (pooled - exact_pooled).norm() < 1.5 * (rough_pooled - exact_pooled).norm() + 1e-3
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        if name == "score_bias":  # a softmax cannot see it: noise around zero
            continue
        size = exact[name].norm()
        off, autocast_off = (gradient - exact[name]).norm() / size, (rough[name] - exact[name]).norm() / size
        assert off < max(0.02, 1.5 * autocast_off), name
