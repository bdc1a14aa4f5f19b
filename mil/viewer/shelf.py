"""Slides kept open while they are looked at, and bytes kept while they fit: both of bounded size, for many threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from extract.slides.errors import SlideOpenError
from extract.slides.slide import Slide, open_slide

OPEN_SLIDES = 8
"""A handle of OpenSlide keeps some 30 MB of decoded pixels."""


@dataclass
class Copy:
    """An open slide; `reading` is held by the thread that reads, as a handle has one scratch buffer."""

    slide: Slide
    users: int = 0
    reading: threading.Lock = field(default_factory=threading.Lock)


class Shelf:
    """The slides that were used last, open.

    Args:
        files: slide id -> path and microns per level-0 pixel of the cohort. default_mpp: for files that do not say.
    """

    def __init__(self, files: dict[str, tuple[Path, float | None]], default_mpp: float | None, most: int = OPEN_SLIDES):
        self.files, self.default_mpp, self.most = files, default_mpp, most
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def slide(self, name: str) -> Iterator[Slide]:
        """The slide, for this thread alone.

        Raises:
            SlideError: it cannot be opened, or its file has gone since.
        """
        path = self.path(name)
        if not path.exists():
            self._forget(name)
            raise SlideOpenError(f"{path}: no such file (any more)")
        copy = self._take(name)
        try:
            with copy.reading:
                yield copy.slide
        finally:
            with self._lock:
                copy.users -= 1
                self._make_room()

    def path(self, name: str) -> Path:
        """Where the slide's file is; SlideOpenError where nobody knows."""
        if name not in self.files:
            raise SlideOpenError(f"slide {name!r}: its file is not known; set slides.folder=FOLDER")
        return self.files[name][0]

    def _take(self, name: str) -> Copy:
        with self._lock:
            if name not in self._copies:
                path, mpp = self.files[name]
                self._copies[name] = Copy(open_slide(path, mpp, default_mpp=self.default_mpp))
            self._copies.move_to_end(name)
            copy = self._copies[name]
            copy.users += 1
            self._make_room()
            return copy

    def _forget(self, name: str) -> None:
        with self._lock:
            copy = self._copies.pop(name, None)
        if copy is not None and not copy.users:
            copy.slide.close()

    def _make_room(self) -> None:
        idle = [name for name, copy in self._copies.items() if not copy.users]
        for name in idle[: max(0, len(self._copies) - self.most)]:
            self._copies.pop(name).slide.close()

    def close(self) -> None:
        """Close what nobody reads."""
        for name in list(self._copies):
            self._forget(name)


class Kept:
    """Bytes by key, the least used first to go when they are more than `most_bytes`."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.nbytes = most_bytes, 0
        self._held: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """What is kept, else what `make` gives. Two threads may make the same."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()
        with self._lock:
            self.nbytes += len(made) - len(self._held.pop(key, b""))
            self._held[key] = made
            while self.nbytes > self.most_bytes:
                self.nbytes -= len(self._held.popitem(last=False)[1])
        return made
