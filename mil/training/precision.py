"""train.precision on a device: what `auto` is there, and whether products may be TF32.

| train.precision | products of a GPU | elsewhere |
| --- | --- | --- |
| 32-true | float32 | float32 |
| tf32 | TF32: float32 with 10 bits of mantissa, sums in float32 (Ampere and later) | float32 |
| bf16-mixed | bfloat16 by torch's autocast, sums in float32; what is left is float32 | the same |
| auto | bf16-mixed where the GPU has it, else 32-true | 32-true |

What is evaluated and written is float32 in all of them, without TF32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["32-true", "bf16-mixed"]


def precision_on(wanted: str, device: torch.device) -> Precision:
    """What Lightning is told."""
    if wanted == "auto":
        return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "32-true"
    return "bf16-mixed" if wanted == "bf16-mixed" else "32-true"


def autocast_of(wanted: str, device: torch.device) -> AbstractContextManager[Any]:
    """As Lightning does around a step."""
    if precision_on(wanted, device) == "32-true":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, products and convolutions of CUDA GPUs are TF32, or are not, whatever torch's default is."""
    settings: Any = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = allowed
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value
