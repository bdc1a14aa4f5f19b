"""Slides kept open while they are looked at, and bytes kept while they fit: both of bounded size, for many threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from extract.slides.errors import SlideOpenError
from extract.slides.scratch import local_copy
from extract.slides.slide import Slide, open_slide

OPEN_SLIDES, COPIES = 8, 4
"""Handles that stay open in all (one keeps some 30 MB of decoded pixels), and those of one slide."""


@dataclass
class Copies:
    """The handles of one slide: each reads for one thread at a time, as it has one scratch buffer."""

    idle: list[Slide] = field(default_factory=list)
    busy: int = 0
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(COPIES))


class Shelf:
    """The slides that were used last, open; several handles of one that several people look at.

    Args:
        files: slide id -> path and microns per level-0 pixel of the cohort. default_mpp: for files that do not say.
        most: handles that stay open; more are open only while they are read.
    """

    def __init__(self, files: dict[str, tuple[Path, float | None]], default_mpp: float | None, most: int = OPEN_SLIDES):
        self.files, self.default_mpp, self.most = files, default_mpp, most
        self._copies: OrderedDict[str, Copies] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def slide(self, name: str) -> Iterator[Slide]:
        """The slide, for this thread alone; waits while all its handles are in use.

        Raises:
            SlideError: it cannot be opened, or its file has gone since.
        """
        path = self.path(name)
        if not path.exists():
            self._forget(name)
            raise SlideOpenError(f"{path}: no such file (any more)")
        with self._lock:
            copies = self._copies.setdefault(name, Copies())
            self._copies.move_to_end(name)
        with copies.turn:
            opened = self._take(copies, name)
            try:
                yield opened
            finally:
                self._give_back(copies, name, opened)

    def path(self, name: str) -> Path:
        """Where the slide's file is; SlideOpenError where nobody knows."""
        if name not in self.files:
            raise SlideOpenError(f"slide {name!r}: its file is not known; set slides.folder=FOLDER")
        return self.files[name][0]

    @property
    def n_open(self) -> int:
        """Handles, read or idle."""
        with self._lock:
            return sum(len(copies.idle) + copies.busy for copies in self._copies.values())

    def _take(self, copies: Copies, name: str) -> Slide:
        with self._lock:
            copies.busy += 1
            if copies.idle:
                return copies.idle.pop()
            closing = self._too_many()
        try:
            for one in closing:
                one.close()
            path, mpp = self.files[name]
            return open_slide(local_copy(path), mpp, default_mpp=self.default_mpp)
        except BaseException:
            with self._lock:
                copies.busy -= 1
            raise

    def _give_back(self, copies: Copies, name: str, opened: Slide) -> None:
        with self._lock:
            copies.busy -= 1
            if self._copies.get(name) is copies:
                copies.idle.append(opened)
                closing = self._too_many()
            else:
                closing = [opened]  # its file had gone meanwhile
        for one in closing:
            one.close()

    def _too_many(self) -> list[Slide]:
        """Idle handles beyond `most`, of the slides that were used longest ago; under the lock."""
        surplus = sum(len(copies.idle) + copies.busy for copies in self._copies.values()) - self.most
        closing: list[Slide] = []
        for copies in self._copies.values():
            while copies.idle and len(closing) < surplus:
                closing.append(copies.idle.pop())
        for name in [name for name, copies in self._copies.items() if not copies.idle and not copies.busy]:
            if len(self._copies) > self.most:
                del self._copies[name]
        return closing

    def _forget(self, name: str) -> None:
        with self._lock:
            copies = self._copies.pop(name, None)
            closing = [] if copies is None else copies.idle
        for one in closing:
            one.close()

    def close(self) -> None:
        """Close what nobody reads."""
        for name in list(self._copies):
            self._forget(name)


class Kept:
    """Bytes by key, the least used first to go when they are more than `most_bytes`."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.nbytes = most_bytes, 0
        self._held: OrderedDict[Hashable, bytes] = OrderedDict()
        self._made: dict[Hashable, Future[bytes]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """What is kept, else what `make` gives; who asks while it is made waits for it."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            others = self._made.get(key)
            ours: Future[bytes] = self._made.setdefault(key, Future())
        if others is not None:
            return others.result()
        try:
            made = make()
        except BaseException as error:
            ours.set_exception(error)
            with self._lock:
                del self._made[key]
            raise
        with self._lock:
            del self._made[key]
            self._keep(key, made)
        ours.set_result(made)
        return made

    def _keep(self, key: Hashable, made: bytes) -> None:
        self._held[key] = made
        self.nbytes += len(made)
        while self.nbytes > self.most_bytes:
            self.nbytes -= len(self._held.popitem(last=False)[1])
