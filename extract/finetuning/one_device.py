"""Lightning on one device and in one process, whatever the environment's variables say.

Left to itself Lightning takes all GPUs (and starts this command once more for each), and believes SLURM, torchelastic,
LSF, MPI and Kubernetes where it finds their variables. Here the device, the strategy and the environment are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]  # documented there

from extract.config import ConfigError


class OneProcess(LightningEnvironment):
    """This process, which nobody but the user started: RANK, LOCAL_RANK, NODE_RANK, WORLD_SIZE are not read."""

    @property
    def creates_processes_externally(self) -> bool:
        return False

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        """Leaves the environment's variables as they are."""


def on_one_device(device: torch.device) -> dict[str, Any]:
    """What `lightning.Trainer` must be told to use `device` and nothing else."""
    return {
        "accelerator": device.type,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "num_nodes": 1,
        "strategy": SingleDeviceStrategy(device),
        "plugins": [OneProcess()],
    }


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process is the first of its kind: Lightning writes in no other, and takes the rank from SLURM."""
    lightnings: Any = rank_zero_only  # a function with an attribute
    before = lightnings.rank
    lightnings.rank = 0
    try:
        yield
    finally:
        lightnings.rank = before


@contextmanager
def ctrl_c(trainer: lightning.Trainer) -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt; Lightning makes a SystemExit of it."""
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def device_of(accelerator: str) -> torch.device:
    """The device of train.accelerator; auto: the first CUDA GPU, else Apple's, else the CPU; gpu: one of the first two.

    Raises:
        ConfigError: there is none of that kind in this machine.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = {"auto": ["cuda", "mps", "cpu"], "gpu": ["cuda", "mps"]}.get(accelerator, [accelerator])
    found = next((kind for kind in wanted if here[kind]), None)
    if found is None:
        listed = ", ".join(kind for kind, is_here in here.items() if is_here)
        raise ConfigError(
            "no such device",
            [f"train.accelerator={accelerator}: not in this machine, which has {listed}; use train.accelerator=auto"],
        )
    return torch.device(found, 0) if found == "cuda" else torch.device(found)
