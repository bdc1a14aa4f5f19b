"""Members of several kinds in one pass: targets with two classes beside targets with four.

Parameters of one stack have one shape, so every kind of outputs is a `MembersModule` of its own. Here they walk the
same shuffled slides together, a step of each at a time: features are read once for all of them, and nothing else is
shared, so each trains as if it were alone, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mil.aggregators.batch import Batch
from mil.training.module import MembersModule, Pass, scheduled
from mil.training.optim import MemberAdam


class Steps(Iterable[Batch], Sized, Protocol):
    """Batches whose number is known."""


class SideBySide(Iterable["tuple[Batch | None, ...]"]):
    """One batch of every kind at a time; None of those that have no more."""

    def __init__(self, loaders: Sequence[Steps]):
        self.loaders = loaders

    def __len__(self) -> int:
        return max(len(loader) for loader in self.loaders)

    def __iter__(self) -> Iterator[tuple[Batch | None, ...]]:
        return zip_longest(*self.loaders)


class Optimizers(torch.optim.Optimizer):
    """The optimiser of every kind as one: Lightning takes steps with one, and a schedule moves the rates of all."""

    def __init__(self, parts: Sequence[MemberAdam]):
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {"lr": 1.0})
        self.parts_of_it = list(parts)
        self.param_groups = [group for part in parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts_of_it:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts_of_it]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts_of_it, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts_of_it for group in part.param_groups]


class Panel(Pass):
    """Several `MembersModule`s, whose members are numbered one kind behind the other."""

    def __init__(self, parts: Sequence[MembersModule]):
        super().__init__()
        self.kinds = nn.ModuleList(parts)
        for part, first in zip(parts, np.cumsum([0, *(len(part.members) for part in parts)]).tolist(), strict=False):
            part.first_member = first
            part.show = lambda name, value: None  # type: ignore[method-assign]  # one bar, and whose number?

    @property
    def parts(self) -> list[MembersModule]:
        return [part for part in self.kinds if isinstance(part, MembersModule)]

    def attach(self) -> None:
        """The trainer is that of all."""
        for part in self.parts:
            part.trainer = self.trainer

    def configure_optimizers(self) -> Any:
        self.attach()
        for part in self.parts:
            part.configure_optimizers()
        return scheduled(Optimizers([part.adam for part in self.parts]), self.parts[0].settings)

    def train_dataloader(self) -> SideBySide:
        self.attach()
        return SideBySide([part.train_dataloader() for part in self.parts])

    def val_dataloader(self) -> SideBySide:
        return SideBySide([part.val_dataloader() for part in self.parts])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return tuple(None if one is None else one.to(device) for one in batch)

    def training_step(self, batch: tuple[Batch | None, ...], step: int) -> Tensor:
        there = [(part, one) for part, one in zip(self.parts, batch, strict=True) if one is not None]
        return torch.stack([part.training_step(one, step) for part, one in there]).sum()

    def validation_step(self, batch: tuple[Batch | None, ...], step: int) -> None:
        for part, one in zip(self.parts, batch, strict=True):
            if one is not None:
                part.validation_step(one, step)

    def on_fit_start(self) -> None:
        for part in self.parts:
            part.on_fit_start()

    def on_train_start(self) -> None:
        for part in self.parts:
            part.on_train_start()

    def on_train_epoch_start(self) -> None:
        for part in self.parts:
            part.on_train_epoch_start()

    def on_validation_epoch_start(self) -> None:
        for part in self.parts:
            part.on_validation_epoch_start()

    def on_train_epoch_end(self) -> None:
        """Training ends with the last member of all kinds."""
        stopped = self.trainer.should_stop
        for part in self.parts:
            part.on_train_epoch_end()
        self.trainer.should_stop = stopped or not any(part.active_M.any() for part in self.parts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        each: list[dict[str, Any]] = [{} for _ in self.parts]
        for part, own in zip(self.parts, each, strict=True):
            part.on_save_checkpoint(own)
        checkpoint["members"] = [own["members"] for own in each]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for part, own in zip(self.parts, checkpoint["members"], strict=True):
            part.on_load_checkpoint({"members": own})
