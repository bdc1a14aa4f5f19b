"""How much memory a training step takes on a device, by making one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mil.aggregators.batch import Batch
from mil.training.device import DeviceFeatures
from mil.training.module import MembersModule
from mil.training.precision import autocast_of


@dataclass(frozen=True)
class Meter:
    """A device's memory in bytes: `begin` anew, the most that was taken since (`peak`), what is `free` now."""

    begin: Callable[[], object]
    peak: Callable[[], int]
    free: Callable[[], int]


def cuda_meter(device: torch.device) -> Meter:
    """Of a CUDA GPU; what torch keeps for later counts as free."""

    def free() -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])

    before = [0]

    def begin() -> None:
        before[0] = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    return Meter(begin, lambda: int(torch.cuda.max_memory_allocated(device)) - before[0], free)


def peak_of_a_step(module: MembersModule, there: DeviceFeatures, slides: list[int], meter: Meter) -> int:
    """Bytes that a step of these slides takes beyond the features: members, batch, activations, gradients, Adam."""
    meter.begin()
    module.to(there.device)
    step = step_alone(module)
    step(there.batch(slides, module.labels_S, np.ones((len(module.members), len(slides)), dtype=bool)))
    return meter.peak()


def step_alone(module: MembersModule) -> Callable[[Batch], None]:
    """A training step as Lightning makes it, without a trainer around it."""
    configured: Any = module.configure_optimizers()
    optimizer = configured[0][0] if isinstance(configured, tuple) else configured
    module._trainer = SimpleNamespace(optimizers=[optimizer])  # type: ignore[assignment]  # all that a step asks for
    module.on_fit_start()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with autocast_of(module.settings.precision, module.device):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()

    return step
