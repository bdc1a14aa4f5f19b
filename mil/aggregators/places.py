"""What a batch on a device says of itself: places and lengths, sent along with it, so that nobody asks the device.

Asking a device for a number (`.item()`, `.cpu()`, a boolean index) waits until all that was given to it is done, and so
does a copy to it from ordinary memory. What is small and known on the host is therefore sent once a batch from pinned
memory, which does not wait, and what the host needs itself stays here as ordinary numbers.

Axes: M members, m members of one group, T tiles laid end to end, B bags of the batch, b bags of one group, R rows
(member, bag) of pooled features, U most bags that one member uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from mil.aggregators.batch import Parameters
from mil.aggregators.threads import Selected

KEPT_LENGTHS = 32
"""Lists of lengths whose tensors are kept: bags of one size are the same list in every batch."""


def sent(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Whole numbers on `device`, int64, without waiting for it."""
    there = torch.as_tensor(values, dtype=torch.int64)
    if device.type == "cuda":
        return there.pin_memory().to(device, non_blocking=True)
    return there.to(device)


class Segments(tuple[int, ...]):
    """Lengths of bags laid end to end on a device. A tuple of them, and what operations on segments need, made once.

    Evaluation may make it and training use it: so never as tensors of inference, which know no gradients.
    """

    device: torch.device

    @property
    def n_tiles(self) -> int:
        return sum(self)

    @cached_property
    def equal(self) -> int | None:
        """The length of all bags, None where they differ."""
        return self[0] if len(set(self)) == 1 else None

    @cached_property
    @torch.inference_mode(False)
    def lengths_b(self) -> Tensor:
        return sent(self, self.device)

    @cached_property
    @torch.inference_mode(False)
    def starts_b(self) -> Tensor:
        return self.lengths_b.cumsum(0) - self.lengths_b

    @cached_property
    @torch.inference_mode(False)
    def bag_of_T(self) -> Tensor:
        """Which bag each tile is of."""
        bags_b = torch.arange(len(self), device=self.device)
        return bags_b.repeat_interleave(self.lengths_b, output_size=self.n_tiles)

    @cached_property
    @torch.inference_mode(False)
    def place_T(self) -> Tensor:
        """Each tile's place in its bag."""
        return torch.arange(self.n_tiles, device=self.device) - self.starts_b[self.bag_of_T]

    @cached_property
    @torch.inference_mode(False)
    def inside_bT(self) -> Tensor:
        """Whether a tile is of a bag."""
        return torch.arange(len(self), device=self.device).unsqueeze(1) == self.bag_of_T

    @cached_property
    @torch.inference_mode(False)
    def padded(self) -> tuple[Padded, ...]:
        """Bags of like length together, each set filled up to its longest bag."""
        return tuple(self._padded(bags) for bags in self.alike)

    @property
    def alike(self) -> list[list[int]]:
        """Bags of like length: the longest of a set is at most twice its shortest."""
        sets: dict[int, list[int]] = {}
        for bag, length in enumerate(self):
            sets.setdefault((length - 1).bit_length(), []).append(bag)
        return list(sets.values())

    def _padded(self, bags: list[int]) -> Padded:
        starts, lengths = [0, *itertools.accumulate(self)], [self[bag] for bag in bags]
        longest, n_tiles = max(lengths), sum(lengths)
        rows = torch.cat([torch.arange(starts[bag], starts[bag + 1]) for bag in bags])
        places = torch.cat([torch.arange(length) + i * longest for i, length in enumerate(lengths)])
        all_of_it = torch.cat([rows, places, torch.tensor([*lengths, *bags])])
        parts = sent(all_of_it, self.device).split([n_tiles, n_tiles, len(bags), len(bags)])
        rows_R, places_R, lengths_b, bags_b = parts
        there_b1L = (torch.arange(longest, device=self.device) < lengths_b.unsqueeze(1)).unsqueeze(1)
        full = n_tiles == longest * len(bags)
        return Padded(bags_b, lengths_b, longest, rows_R, places_R, None if full else there_b1L)


@dataclass(frozen=True, eq=False)
class Padded:
    """Some bags of a group in the shape (bags, longest).

    bags_b, lengths_b: which they are, and how many tiles they have. rows_R: of their tiles, in the group. places_R:
    where those go, bag * longest + place in the bag.
    there_b1L: whether there is a tile; None: everywhere.
    """

    bags_b: Tensor
    lengths_b: Tensor
    longest: int
    rows_R: Tensor
    places_R: Tensor
    there_b1L: Tensor | None

    def mask(self, m: int) -> Tensor | None:
        """For attention of m members: which keys there are, (m x bags, 1, 1, L); None: all."""
        return None if self.there_b1L is None else self.there_b1L.repeat(m, 1, 1).unsqueeze(1)

    def spread(self, x_mTX: Tensor) -> Tensor:
        """(m, T, X) -> (m, bags, longest, X), zeros where there is no tile."""
        own_mRX = x_mTX.index_select(1, self.rows_R)
        shape = len(self.bags_b), self.longest
        filled_mNX = own_mRX
        if self.there_b1L is not None:
            blank_mNX = own_mRX.new_zeros(len(own_mRX), len(self.bags_b) * self.longest, own_mRX.shape[2])
            filled_mNX = blank_mNX.index_copy(1, self.places_R, own_mRX)
        spread_mbLX: Tensor = filled_mNX.unflatten(1, shape)
        return spread_mbLX


@lru_cache(KEPT_LENGTHS)
def _segments(lengths_b: tuple[int, ...], device: torch.device) -> Segments:
    made = Segments(lengths_b)
    made.device = device
    return made


def segments(lengths_b: Sequence[int], device: torch.device) -> Segments:
    """The lengths as `Segments` of a device."""
    return lengths_b if isinstance(lengths_b, Segments) else _segments(tuple(int(n) for n in lengths_b), device)


@dataclass(frozen=True)
class Places:
    """Of one batch on a device, whose groups have `Segments` for lengths.

    slides: rows of the cohort, on the host. active_M: who has a bag in this batch, on the host.
    bags_MU: the bags that each member uses, then others up to U; None: the head runs on all bags.
    rows_R: member * B + bag of each row of the pooled features; None: they are in this order already.
    members: of each group that not all members use, who they are, as numbers and on the device.
    arrive: called before the tiles are used; waits, on the device, for their copy.
    """

    slides: tuple[int, ...]
    active_M: Tensor
    bags_MU: Tensor | None
    rows_R: Tensor | None
    members: Mapping[tuple[int, ...], Tensor]
    arrive: Callable[[], None] = lambda: None


class PlacedSelector:
    """Parameters of some members as (m, ...) stacks, by indices that are on the device already."""

    def __init__(self, stacks: Mapping[str, Tensor], places: Places):
        self.stacks, self.members = stacks, places.members
        self.n_members = len(next(iter(stacks.values())))

    def select(self, members: tuple[int, ...]) -> Parameters:
        if len(members) == self.n_members:
            return self.stacks
        first, n = members[0], len(members)
        if members[-1] - first == n - 1:
            return Selected(self.stacks, lambda name: self.stacks[name].narrow(0, first, n))
        rows_m = self.members[members] if members in self.members else sent(members, self._device())
        return Selected(self.stacks, lambda name: self.stacks[name].index_select(0, rows_m))

    def _device(self) -> torch.device:
        return next(iter(self.stacks.values())).device


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Full precision inside, on any device, the meta device included."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
