"""Features on the device that trains, or on their way to it; batches of them are lists of bags.

Where all features fit beside the activations they are put there once, as they are stored, and a batch says which rows
it looks at. Where they do not, each batch is gathered in pinned memory and copied on a stream of its own while the step
before it runs. Either way bags that the same members use are one group, so that no member pays for another's bags, and
what a step must know is sent along with it (`mil.aggregators.places`): nothing in a step waits for the device.

The same code runs on a CPU (`data.memory=device`), where it is tested against `mil.training.bags`.

Axes: M members, B bags of a batch, S slides, T tiles, D features, C outputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.config import ConfigError
from mil.aggregators.batch import Batch, Group
from mil.aggregators.places import Places, segments, sent
from mil.training.bags import Bags, members_of

FEATURES_SHARE = 0.6
"""Features live on a GPU when they need at most this share of its free memory; activations need the rest."""
AHEAD = 2
"""Batches that are gathered and copied before they are used."""

Rows = Callable[[int], Tensor | None]


@dataclass(eq=False)
class DeviceFeatures:
    """The features of all slides where training looks for them.

    block_TD: all tiles, slide after slide, on the device; None: they stay where they are and are copied batch by batch.
    """

    bags: Bags
    device: torch.device
    block_TD: Tensor | None
    starts_S: np.ndarray = field(init=False)
    stream: Any = None

    def __post_init__(self) -> None:
        lengths_S = np.asarray(self.bags.lengths_S, dtype=np.int64)
        self.starts_S = np.cumsum(lengths_S) - lengths_S
        if self.block_TD is None and self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)

    @property
    def resident(self) -> bool:
        return self.block_TD is not None

    def batch(
        self,
        slides: Sequence[int],
        labels_S: np.ndarray,
        uses_MB: np.ndarray,
        rows: Rows = lambda slide: None,
        labels_MS: np.ndarray | None = None,
    ) -> Batch:
        """As `mil.training.bags.make_batch`, on the device."""
        slides_B, bags = np.asarray(slides, dtype=np.int64), self.bags
        alike = bags_by_members(uses_MB, None if bags.site_S is None else bags.site_S[slides_B])
        members = [np.flatnonzero(uses_MB[:, bags_b[0]]) for bags_b in alike]
        kept = [rows(int(slide)) for slide in slides_B]
        everyone, n_bags = len(uses_MB), len(slides_B)
        arrays = {"labels": labels_S[slides_B], "slides": slides_B, "uses": uses_MB}
        optional = {
            "labels_MB": None if labels_MS is None else labels_MS[:, slides_B],
            "bags_MU": used_bags(uses_MB),
            "rows_R": row_places(list(zip(members, alike, strict=True)), everyone, n_bags),
        }
        arrays |= {name: array for name, array in optional.items() if array is not None}
        arrays |= {f"members{g}": m for g, m in enumerate(members) if len(m) < everyone}
        if self.block_TD is not None:
            for g, bags_b in enumerate(alike):
                if any(kept[b] is not None for b in bags_b):
                    arrays[f"tiles{g}"] = np.concatenate([self._rows_of(int(slides_B[b]), kept[b]) for b in bags_b])
        with self._copying():
            there = sent_together(arrays, self.device)
            groups = [
                self._group(slides_B, bags_b, kept, members_of(uses_MB[:, bags_b[0]], everyone), there.get(f"tiles{g}"))
                for g, bags_b in enumerate(alike)
            ]
            covariates_BV = self._covariates(slides_B)
        active_M = torch.from_numpy(uses_MB.any(axis=1))
        said = {tuple(m.tolist()): there[f"members{g}"] for g, m in enumerate(members) if f"members{g}" in there}
        tensors = [group.tiles_TD for group in groups] + [x for x in (covariates_BV, *there.values()) if x is not None]
        places = Places(
            tuple(slides_B.tolist()), active_M, there.get("bags_MU"), there.get("rows_R"), said, self._arrival(tensors)
        )
        return Batch(
            tuple(groups),
            there["labels"],
            there["slides"],
            there["uses"].bool(),
            there.get("labels_MB"),
            covariates_BV,
            places,
        )

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; those that must be gathered first are, by a thread, while the ones before are used."""
        return batches if self.resident else in_background(batches, AHEAD)

    def _rows_of(self, slide: int, kept: Tensor | None) -> np.ndarray:
        """Rows of the block."""
        own = np.arange(self.bags.lengths_S[slide]) if kept is None else kept.numpy()
        return np.asarray(self.starts_S[slide] + own)

    def _group(
        self,
        slides_B: np.ndarray,
        bags_b: Sequence[int],
        kept: Sequence[Tensor | None],
        members: tuple[int, ...] | None,
        rows_T: Tensor | None,
    ) -> Group:
        slides = [int(slides_B[b]) for b in bags_b]
        lengths = [self._length(s, kept[b]) for s, b in zip(slides, bags_b, strict=True)]
        site = None if self.bags.site_S is None else int(self.bags.site_S[slides[0]])
        if self.block_TD is None:
            tiles_TD = self._copied([self._kept(s, kept[b]) for s, b in zip(slides, bags_b, strict=True)])
        elif rows_T is not None:
            tiles_TD = self.block_TD.index_select(0, rows_T)
        else:
            parts = [self.block_TD.narrow(0, int(self.starts_S[s]), int(self.bags.lengths_S[s])) for s in slides]
            tiles_TD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Group(tiles_TD, segments(lengths, self.device), tuple(bags_b), members, site)

    def _length(self, slide: int, kept: Tensor | None) -> int:
        return int(self.bags.lengths_S[slide]) if kept is None else len(kept)

    def _kept(self, slide: int, kept: Tensor | None) -> Tensor:
        tiles_TD = self.bags.features(slide)
        return tiles_TD if kept is None else tiles_TD[kept]

    def _copied(self, parts: list[Tensor]) -> Tensor:
        """End to end through pinned memory, which the device reads while others compute."""
        pinned = self.device.type == "cuda"
        dtype = torch.float32 if any(part.dtype == torch.float32 for part in parts) else parts[0].dtype
        gathered_TD = torch.empty(sum(map(len, parts)), self.bags.dim, dtype=dtype, pin_memory=pinned)
        for part, into in zip(parts, gathered_TD.split([len(part) for part in parts]), strict=True):
            into.copy_(part)
        return gathered_TD.to(self.device, non_blocking=pinned)

    def _covariates(self, slides_B: np.ndarray) -> Tensor | None:
        if self.bags.covariates_SV is None:
            return None
        values_BV = torch.from_numpy(self.bags.covariates_SV[slides_B]).float()
        if self.device.type == "cuda":
            return values_BV.pin_memory().to(self.device, non_blocking=True)
        return values_BV.to(self.device)

    def _copying(self) -> Any:
        """Copies inside go over the stream of their own, if there is one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _arrival(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """What lets the device, not the host, wait until these are there."""
        if self.stream is None:
            return lambda: None
        there = self.stream.record_event()

        def arrive() -> None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(there)
            for tensor in tensors:
                tensor.record_stream(now)  # their memory is not used anew before this stream is done with them

        return arrive


def sent_together(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays of whole numbers in one copy: views of it by name."""
    flat = sent(torch.from_numpy(np.concatenate([a.ravel().astype(np.int64) for a in arrays.values()])), device)
    parts = flat.split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def used_bags(uses_MB: np.ndarray) -> np.ndarray | None:
    """(M, U): each member's bags, then others. None where members use more than three quarters of them."""
    n_used, n_bags = int(uses_MB.sum(axis=1).max(initial=0)), uses_MB.shape[1]
    if n_used == 0 or 4 * n_used > 3 * n_bags:
        return None
    return np.argsort(~uses_MB, axis=1, kind="stable")[:, :n_used]


def row_places(groups: Sequence[tuple[Any, Any]], n_members: int, n_bags: int) -> np.ndarray | None:
    """Where the rows of pooled features go, member * B + bag; None where they lie in this order already.

    groups: the members and the bags of each, in the order in which they are computed.
    """
    rows_R = np.concatenate([np.add.outer(np.asarray(m) * n_bags, np.asarray(b)).ravel() for m, b in groups])
    in_order = len(rows_R) == n_members * n_bags and bool((np.diff(rows_R) == 1).all())
    return None if in_order else rows_R


def bags_by_members(uses_MB: np.ndarray, site_B: np.ndarray | None = None) -> list[list[int]]:
    """The bags that exactly the same members use (and of one site), together; bags that nobody uses are in none."""
    alike: dict[tuple[bytes, int], list[int]] = {}
    for b in range(uses_MB.shape[1]):
        if uses_MB[:, b].any():
            site = -1 if site_B is None else int(site_B[b])
            alike.setdefault((uses_MB[:, b].tobytes(), site), []).append(b)
    return list(alike.values())


def in_background(batches: Iterator[Batch], ahead: int) -> Iterator[Batch]:
    """The same batches, made by a thread, so many of them before they are asked for."""
    nothing = object()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        waiting: deque[Future[Any]] = deque(thread.submit(next, batches, nothing) for _ in range(ahead))
        try:
            while (batch := waiting.popleft().result()) is not nothing:
                waiting.append(thread.submit(next, batches, nothing))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


def device_features(bags: Bags, device: torch.device) -> DeviceFeatures | None:
    """The bags' features for training on `device`; None: on a CPU, that reads them where they lie.

    They are put there once, for all passes.

    Raises:
        ConfigError: data.memory=device, and they do not fit.
        CacheError: a file is not what its header said.
    """
    if device.type == "cpu" and bags.on_device != "yes":
        return None
    key = str(device)
    if key not in bags.elsewhere:
        resident = bags.on_device == "yes" or (bags.on_device == "auto" and fits(bags, device))
        if resident and not fits(bags, device, share=1.0):
            free = free_bytes(device) or 0
            raise ConfigError(
                "features do not fit",
                [
                    f"data.memory=device: {bags.nbytes / 1e9:.1f} GB of features, {device} has {free / 1e9:.1f} GB "
                    "free; use data.memory=auto, which copies them batch by batch then"
                ],
            )
        bags.elsewhere[key] = DeviceFeatures(bags, device, block_of(bags, device) if resident else None)
    found: DeviceFeatures = bags.elsewhere[key]
    return found


def features_for_scoring(bags: Bags, device: torch.device) -> DeviceFeatures | None:
    """`device_features` for a look at every slide once: not there yet, they are copied batch by batch."""
    if device.type == "cpu" and bags.on_device != "yes":
        return None
    found: DeviceFeatures = bags.elsewhere.get(str(device)) or DeviceFeatures(bags, device, None)
    return found


def fits(bags: Bags, device: torch.device, share: float = FEATURES_SHARE) -> bool:
    """Whether all features need at most this share of the device's free memory; where it does not tell, yes."""
    free = free_bytes(device)
    return free is None or bags.nbytes <= share * free


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None of a CPU, whose features are in its memory anyway."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def block_of(bags: Bags, device: torch.device) -> Tensor:
    """All features, slide after slide, on the device, in the widest type that is stored."""
    n_values = int(np.sum(bags.lengths_S)) * bags.dim
    dtype = torch.float16 if bags.nbytes <= 2 * n_values else torch.float32
    block_TD = torch.empty(int(np.sum(bags.lengths_S)), bags.dim, dtype=dtype, device=device)
    for slide, part_TD in enumerate(block_TD.split([int(n) for n in bags.lengths_S])):
        part_TD.copy_(bags.features(slide))
    return block_TD


class Gathered:
    """What the members said of every slide, kept on the device and read once an epoch."""

    def __init__(self, logits_MSC: Tensor, losses_MS: Tensor, device: torch.device):
        self.logits_MSC, self.losses_MS = logits_MSC.to(device), losses_MS.to(device)

    def forget(self) -> None:
        """A new epoch: no slide has a loss."""
        self.losses_MS.fill_(torch.nan)

    def put(self, batch: Batch, logits_MBC: Tensor, losses_MB: Tensor) -> None:
        """A slide's entry is only overwritten by members that use it."""
        slides_B, uses_MB = batch.slides_B, batch.uses_MB
        for kept, said, uses in (
            (self.logits_MSC, logits_MBC, uses_MB.unsqueeze(2)),
            (self.losses_MS, losses_MB, uses_MB),
        ):
            kept.index_copy_(1, slides_B, torch.where(uses, said, kept.index_select(1, slides_B)))

    def read(self) -> tuple[Tensor, Tensor]:
        """Logits and losses on the host: the one place that waits."""
        return self.logits_MSC.cpu(), self.losses_MS.cpu()
