"""Random numbers of training that depend on nothing but member, epoch and slide.

So a member draws the same alone, among others, on any thread, in any batch and on any device, and afresh every epoch.
The numbers are counted, not kept in a state: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 1), whose n-th
number is a hash of seed + n * GOLDEN. A whole group of members and bags is one tensor operation.

Axes: m members, b bags, T tiles laid end to end, H values a tile, W random numbers a tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mil.aggregators.places import Padded, Segments, segments, sent
from mil.aggregators.segments import order_in_bags

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
IN_CACHE = 2**14
"""Numbers that a CPU makes at a time; the result does not depend on it."""


@dataclass(frozen=True)
class Chance:
    """Where one group's random numbers come from. seeds_m: of the members; slides_b: rows of its bags in the cohort.

    members_m: the members' rows in the stack, which no number depends on.
    """

    seeds_m: tuple[int, ...]
    epoch: int
    slides_b: tuple[int, ...]
    members_m: tuple[int, ...] = ()

    def of_bags(self, bags: Sequence[int]) -> Chance:
        """For these of the group's bags."""
        return replace(self, slides_b=tuple(self.slides_b[b] for b in bags))

    def dropout(self, x_mTH: Tensor, lengths_b: Sequence[int], probability: float, what: str) -> Tensor:
        """Sets every value to 0 with `probability`, divides what is left by 1 - probability. (m, T, H) -> (m, T, H)."""
        return x_mTH * self.factors(x_mTH, lengths_b, probability, what) if probability else x_mTH

    def factors(self, like_mTH: Tensor, lengths_b: Sequence[int], probability: float, what: str) -> Tensor:
        """0 with `probability` (to 1 in 65,536), else 1 / (1 - probability): shape and type of `like_mTH`.

        Four values of 16 bits come from one random number.
        """
        h = like_mTH.shape[2]
        width = -(-h // 4)
        factors_RH = torch.empty_like(like_mTH, memory_format=torch.contiguous_format).view(-1, h)
        starts_R = self.starts(lengths_b, width, what, like_mTH.device).view(-1)
        rows = max(1, IN_CACHE // width) if like_mTH.device.type == "cpu" else len(starts_R)
        for start_R, part_RH in zip(starts_R.split(rows), factors_RH.split(rows), strict=True):
            part_RH.copy_(kept(start_R, h, probability))
        return factors_RH.view(like_mTH.shape)

    def factors_of_pairs(
        self, like_mbaQL: Tensor, some: Padded, first: int, most: int, probability: float, what: str
    ) -> Tensor:
        """`factors` of rows of matrices of tiles by tiles, for all bags of a set on a device, by one operation each.

        Every bag draws as alone, with as many numbers a row as it has tiles, for `most` rows a head, or those that it
        has left. Axes: a heads, Q rows, L tiles of the longest bag.

        Args:
            like_mbaQL: rows `first` and later of each bag's matrix; what a bag does not have is arbitrary.
        """
        heads, rows, longest = like_mbaQL.shape[2:]
        own_b11 = (some.lengths_b - first).clamp(0, most).view(-1, 1, 1)
        width_b11 = ((some.lengths_b + 3) // 4).view(-1, 1, 1)
        head_a1, row_Q = (torch.arange(n, device=like_mbaQL.device) for n in (heads, rows))
        ahead_baQ = (head_a1.unsqueeze(1) * own_b11 + row_Q) * width_b11 * GOLDEN
        streams_mb = self.streams(what, like_mbaQL.device).index_select(1, some.bags_b)
        starts_mbaQ = streams_mb[:, :, None, None] + ahead_baQ
        return kept(starts_mbaQ.view(-1), longest, probability).view(like_mbaQL.shape)

    def shuffled(self, length: int, what: str, device: torch.device) -> Tensor:
        """An order of 0 to length - 1 for each member, (m, length); for a group of one bag."""
        return counted(self.starts([length], 1, what, device).view(-1), 1).view(-1, length).argsort(dim=1)

    def shuffled_in_bags(self, lengths_b: Segments, what: str, device: torch.device) -> Tensor:
        """`shuffled` of every bag of a group on a device, (m, T)."""
        keys_mT = counted(self.starts(lengths_b, 1, what, device).view(-1), 1).view(-1, lengths_b.n_tiles)
        return order_in_bags(keys_mT, lengths_b) - lengths_b.starts_b[lengths_b.bag_of_T]

    def starts(self, lengths_b: Sequence[int], width: int, what: str, device: torch.device) -> Tensor:
        """Where each tile's `width` numbers begin, (m, T). what: the use, so that two layers draw differently."""
        streams_mb = self.streams(what, device)
        if device.type != "cpu" or isinstance(lengths_b, Segments):
            bags = segments(lengths_b, device)
            return streams_mb[:, bags.bag_of_T] + bags.place_T * width * GOLDEN
        places = torch.cat([torch.arange(length) for length in lengths_b]).to(device)
        lengths = torch.tensor(lengths_b, device=device)
        streams_mT = streams_mb.repeat_interleave(lengths, dim=1, output_size=len(places))
        return streams_mT + places * width * GOLDEN

    def streams(self, what: str, device: torch.device) -> Tensor:
        """Each member's and bag's seed for this use, (m, b)."""
        if device not in self._there:
            both = sent([*self.seeds_m, *self.slides_b], device)
            seeds_m, slides_b = both.split([len(self.seeds_m), len(self.slides_b)])
            self._there[device] = mixed(mixed(seeds_m).unsqueeze(1) ^ slides_b)
        return mixed(self._there[device] ^ seed_of(self.epoch, what))

    @cached_property
    def _there(self) -> dict[torch.device, Tensor]:
        """What all uses have in common, on each device that it was sent to."""
        return {}


def kept(starts_R: Tensor, n: int, probability: float) -> Tensor:
    """0 with `probability`, else 1 / (1 - probability), n values from each start: (R,) -> (R, n), float32."""
    below = round(probability * 2**16)
    bits_RH = counted(starts_R, -(-n // 4)).view(torch.int16)[:, :n]
    return bits_RH.float().ge_(below - 2**15).mul_(2**16 / (2**16 - below))


def counted(starts_R: Tensor, width: int) -> Tensor:
    """The next `width` numbers of SplitMix64 from each seed, (R,) -> (R, width), int64 that stand for 64 bits."""
    counts_W = torch.arange(1, width + 1, device=starts_R.device) * GOLDEN
    return mixed(starts_R.unsqueeze(1) + counts_W)


def mixed(z: Tensor) -> Tensor:
    """SplitMix64's hash of int64 values, one to one, in place. Products wrap; shifts bring in zeros."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        z ^= (z >> shift).bitwise_and_((1 << 64 - shift) - 1)
        z *= factor
    return z


def seed_of(*what: int | str) -> int:
    """A seed of 63 bits that any change of `what` changes altogether."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little") >> 1
