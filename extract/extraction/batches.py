"""Tiles of whatever slides arrive fill batches; a thread encodes one while the next is filled.

Axes: N tiles of a slide, K tiles that arrive together, B tiles of a batch, D features, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from extract.encoders.frozen import FrozenEncoder
from extract.encoders.table import EncoderError
from extract.extraction.readers import Planned, SlideFile
from extract.slides.tiles import Region

CPU_BATCH = 16
"""Largest batch on a CPU: larger ones are no faster there, and Ctrl-C waits for the one that is being encoded."""

BATCHES = 3
"""One is filled, one encoded, one waits."""


@dataclass(eq=False)
class Work:
    """A slide between its plan and its file.

    `regions` are still to be read; `left` tiles are still to be encoded; `good_N` are those that have been.
    `features_ND` is in the type that is stored.
    """

    file: SlideFile
    planned: Planned
    regions: deque[Region]
    features_ND: np.ndarray
    good_N: np.ndarray
    left: int
    n_bad: int = 0
    not_finite: int = 0
    given_up: bool = False

    @property
    def empty_reason(self) -> str:
        """ "" if there are features."""
        if self.good_N.any() or not len(self.good_N):
            return self.planned.empty_reason
        return f"none of its {len(self.good_N)} tiles could be decoded"


@dataclass(eq=False)
class Batch:
    """`n` tiles, and whose they are: (work, places in its plan) in the order of the tiles."""

    tiles_BHW3: torch.Tensor
    n: int = 0
    owners: list[tuple[Work, np.ndarray]] = field(default_factory=list)


Deliver = Callable[[Work, np.ndarray, np.ndarray], None]


class Batches:
    """Fills batches with the tiles of whatever slides arrive; a thread encodes one while the next is filled.

    Args:
        padded: always encode whole batches (a compiled network would be compiled anew for every other length).
        batch_size: "auto": what `probed_size` finds; on a CPU CPU_BATCH.
        ahead: begin a batch while the one before is computed; None: on a CUDA GPU.
    """

    def __init__(
        self, encoder: FrozenEncoder, batch_size: int | str, *, padded: bool = False, ahead: bool | None = None
    ):
        self.ahead = encoder.device.type == "cuda" if ahead is None else ahead
        self.size = chosen_size(encoder, batch_size)
        self.encoder, self.padded = encoder, padded
        side_px = encoder.spec.tile_px
        shape = (self.size, side_px, side_px, 3)
        pinned = encoder.device.type == "cuda"
        self._spare = [Batch(torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)) for _ in range(BATCHES)]
        self._filling: Batch | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._encoding: deque[tuple[Batch, Future[np.ndarray]]] = deque()
        self._busy_s, self._first_s, self._last_s = 0.0, 0.0, 0.0

    def add(self, work: Work, tiles_KHW3: np.ndarray, indices_K: np.ndarray, deliver: Deliver) -> None:
        """Copy tiles into batches; encode those that are full. Waits when the encoder is behind."""
        while len(tiles_KHW3):
            if self._filling is None:
                self.collect(deliver, at_least=0 if self._spare else 1)
                self._filling = self._spare.pop()
            batch = self._filling
            count = min(self.size - batch.n, len(tiles_KHW3))
            batch.tiles_BHW3.numpy()[batch.n : batch.n + count] = tiles_KHW3[:count]
            batch.owners.append((work, indices_K[:count]))
            batch.n += count
            tiles_KHW3, indices_K = tiles_KHW3[count:], indices_K[count:]
            if batch.n == self.size:
                self.flush()

    def flush(self) -> None:
        """Encode the batch that is being filled, full or not."""
        if self._filling is not None:
            begun = self._thread.submit(self._begin, self._filling)
            self._encoding.append((self._filling, self._waiting.submit(self._end, self._filling, begun)))
            self._filling = None

    def collect(self, deliver: Deliver, at_least: int = 0, everything: bool = False) -> None:
        """Deliver the features of batches that are done; wait for `at_least` so many, or for everything."""
        while self._encoding and (everything or at_least > 0 or self._encoding[0][1].done()):
            at_least -= 1
            batch, future = self._encoding.popleft()
            features_BD = future.result()
            start = 0
            for work, indices_K in batch.owners:
                deliver(work, indices_K, features_BD[start : start + len(indices_K)])
                start += len(indices_K)
            batch.n, batch.owners = 0, []
            self._spare.append(batch)

    def close(self) -> None:
        """Wait for the batch in work; the others are given up."""
        self._waiting.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)

    @property
    def busy_fraction(self) -> float:
        """Time spent encoding / time from the first batch's start to the last one's end."""
        return self._busy_s / max(1e-9, self._last_s - self._first_s)

    def _begin(self, batch: Batch) -> tuple[float, Callable[[], torch.Tensor]]:
        """Since when, and what waits for its features; on a CPU they are there then."""
        began = time.monotonic()
        self._first_s = self._first_s or began
        tiles_BHW3 = batch.tiles_BHW3[: self.size if self.padded else batch.n]
        try:
            if self.ahead:
                return began, self.encoder.begin(tiles_BHW3)
            features_BD = self.encoder.encode(tiles_BHW3)
        except torch.OutOfMemoryError as error:
            raise EncoderError(
                f"the GPU's memory does not hold a batch of {self.size} tiles; set extract.batch_size lower ({error})"
            ) from None
        return began, lambda: features_BD

    def _end(self, batch: Batch, begun: Future[tuple[float, Callable[[], torch.Tensor]]]) -> np.ndarray:
        """The features, while the next batch may be computed already."""
        began, wait = begun.result()
        features_BD = wait()[: batch.n].numpy()
        now = time.monotonic()
        self._busy_s += now - max(began, self._last_s)
        self._last_s = now
        return features_BD


def chosen_size(encoder: FrozenEncoder, wanted: int | str) -> int:
    """Tiles of a batch: as many as is said, on a CPU at most CPU_BATCH; auto: probed on a GPU."""
    if encoder.device.type == "cpu":
        return CPU_BATCH if isinstance(wanted, str) else min(wanted, CPU_BATCH)
    return probed_size(encoder) if isinstance(wanted, str) else wanted


PROBED = (16, 32, 64, 128, 256, 512, 1024)
PROBE_S = 0.3
ENOUGH = 1.03
"""A batch twice as large must be quicker by this factor, or the smaller one will do."""


def probed_size(encoder: FrozenEncoder, clock: Callable[[], float] = time.perf_counter) -> int:
    """The batch size from which on a larger one is no quicker, or does not fit. Before anything is compiled.

    Raises:
        EncoderError: not even the smallest fits.
    """
    best, rate = 0, 0.0
    for size in PROBED:
        tiles_BHW3 = torch.zeros((size, encoder.spec.tile_px, encoder.spec.tile_px, 3), dtype=torch.uint8)
        if encoder.device.type == "cuda":
            tiles_BHW3 = tiles_BHW3.pin_memory()
        try:
            encoder.begin(tiles_BHW3, compiled=False)()
            began, rounds = clock(), 0
            while clock() - began < PROBE_S:
                encoder.begin(tiles_BHW3, compiled=False)()
                rounds += 1
            own = size * rounds / (clock() - began)
        except torch.OutOfMemoryError as error:
            if not best:
                raise EncoderError(f"the GPU's memory does not hold a batch of {size} tiles ({error})") from None
            break
        if own < ENOUGH * rate:
            break
        best, rate = size, own
    return best
