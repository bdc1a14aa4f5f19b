"""torch's fused attention, with the same bits every time.

Training asks torch for deterministic algorithms, and only to warn where there are none. Told to warn, torch's attention
on a GPU takes a quicker backward that adds up in any order, though it has one that does not, for the strict only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BETWEEN = 4
"""Operations that torch may put behind its kernel (a slice, a transpose)."""


def attend(q_gaLE: Tensor, k_gaNE: Tensor, v_gaNE: Tensor, there: Tensor | None = None) -> Tensor:
    """softmax(Q K' / sqrt(E)) V, (g, a, L, E). there: which keys there are, broadcast to (g, a, L, N); None: all."""
    if q_gaLE.device.type != "cuda":
        return functional.scaled_dot_product_attention(q_gaLE, k_gaNE, v_gaNE, attn_mask=there)
    with strictly():  # which kernel it is, is chosen here
        attended_gaLE = functional.scaled_dot_product_attention(q_gaLE, k_gaNE, v_gaNE, attn_mask=there)
    return strict_in_backward(attended_gaLE)


@contextmanager
def strictly() -> Iterator[None]:
    """Inside, deterministic algorithms that are wished for must be; where they are not, nothing changes."""
    wished = torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    if wished:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wished:
            torch.use_deterministic_algorithms(True, warn_only=True)


def strict_in_backward(attended: Tensor) -> Tensor:
    """The same; the backward of the attention that made it runs `strictly`, and nothing else does."""
    node: Any = attended.grad_fn
    for _ in range(BETWEEN):
        if node is None or node.name().startswith("ScaledDotProduct"):
            break
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None:
        scope = ExitStack()

        def before(gradients: Any) -> None:
            scope.enter_context(strictly())

        def behind(found: Any, gradients: Any) -> None:
            scope.close()

        node.register_prehook(before)
        node.register_hook(behind)
    return attended
