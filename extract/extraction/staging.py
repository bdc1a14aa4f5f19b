"""Slides brought to local scratch ahead of reading: those of object stores and of network shares.

While readers work on one slide, the next ones are copied, whole: a slide is read in many small pieces, each of which
waits for the network otherwise. `slides.scratch_gb` bounds what lies there; a slide is removed when its features are.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from extract.config import Slides
from extract.extraction.readers import Failure, SlideFile
from extract.places import shown
from extract.slides.errors import SlideError
from extract.slides.scratch import Scratch, is_staged, size_of_slide
from extract.stores.client import StoreError

AHEAD = 4
"""Slides that are copied or lie ready; so many copies at once, too: one connection rarely fills a network."""
POLL_S = 1.0


class Staging:
    """Between the slides to do and the readers. Slides that are read where they lie pass through.

    Args:
        section: `slides` of the config.
        next_slide: gives the next slide, claimed; None where there is none.
        failed: told of slides that cannot be brought here.
    """

    def __init__(
        self, section: Slides, next_slide: Callable[[], SlideFile | None], failed: Callable[[str, Failure], None]
    ):
        self.section, self.next_slide, self.failed = section, next_slide, failed
        self.scratch = Scratch(section)
        self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="staging")
        self._copying: dict[Future[Path], SlideFile] = {}
        self._ready: deque[SlideFile] = deque()
        self._held: tuple[SlideFile, int] | None = None  # no room for it yet
        self._copies: dict[str, tuple[SlideFile, Path]] = {}  # by slide: as it was given, and the copy

    @property
    def busy(self) -> bool:
        """Whether slides are on their way."""
        return bool(self._copying or self._ready or self._held)

    def next(self) -> SlideFile | None:
        """The next slide that can be read, from its copy if it has one; None where none is ready."""
        self._collect()
        while len(self._copying) + len(self._ready) < AHEAD and self._begin():
            pass
        return self._ready.popleft() if self._ready else None

    def wait(self) -> None:
        """Until a copy is done, or a second has passed. Returns at once if something can be read."""
        if self._copying and not self._ready:
            wait(self._copying, timeout=POLL_S, return_when=FIRST_COMPLETED)

    def original(self, file: SlideFile) -> SlideFile:
        """The slide as it was given."""
        return self._copies[file.slide][0] if file.slide in self._copies else file

    def in_words(self, slide: str, text: str) -> str:
        """The text with the slide's own path or address in the place of its copy's."""
        if slide not in self._copies:
            return text
        original, copy = self._copies[slide]
        return text.replace(str(copy), shown(original.path)).replace(str(copy.parent), shown(original.path.parent))

    def release(self, slide: str, *, read: bool = True) -> None:
        """The slide is settled: its copy goes. `read`: nobody reads it any more."""
        if slide in self._copies:
            self.scratch.release(self._copies.pop(slide)[1], read=read)

    def close(self) -> None:
        """Stop copying; remove everything."""
        self.scratch.stop()
        self._threads.shutdown(cancel_futures=True)
        self.scratch.close()

    def _begin(self) -> bool:
        """Start with one more slide; False where there is none, or no room for it."""
        file, size = self._held or (self.next_slide(), -1)
        self._held = None
        if file is None:
            return False
        if not is_staged(file.path, self.section.stage):
            self._ready.append(file)
            return True
        try:
            size = size_of_slide(file.path) if size < 0 else size
            if not self.scratch.reserve(size, file.path):
                self._held = (file, size)
                return False
        except (SlideError, StoreError, OSError) as error:
            self._fail(file, error)
            return True
        self._copying[self._threads.submit(self.scratch.copy, file.path, size)] = file
        return True

    def _collect(self) -> None:
        for future in [future for future in self._copying if future.done()]:
            file = self._copying.pop(future)
            error = future.exception()
            if error is None:
                self._copies[file.slide] = (file, future.result())
                self._ready.append(dataclasses.replace(file, path=future.result()))
            elif isinstance(error, Exception):
                self._fail(file, error)
            else:
                raise error

    def _fail(self, file: SlideFile, error: Exception) -> None:
        said = "; ".join(error.problems) if isinstance(error, StoreError) else str(error)
        self.failed(file.slide, Failure(file.slide, "stage", said))
