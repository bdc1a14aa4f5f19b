"""A folder of a store and the local folder that mirrors it.

The store is the truth: opening a mirror fetches what has changed there and removes what has gone. Every file that is
made whole below an open mirror (`extract.whole`) is put into the store at once, so that the store always holds what the
local folder would hold after a kill. What a process that was cut off had finished and not yet put there goes first,
when the next command opens the mirror to write.

Which object a local file is a copy of is written beside the mirrors, in `.etags`: a file each, no lock needed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from extract.config import ProblemsError
from extract.places import ETAGS, root, url_of
from extract.stores.client import Entry, StoreError, delete, fetch, listing, put
from extract.whole import write_whole

THREADS = 8


@dataclass(eq=False)
class Mirror:
    """`known`: what the store holds, by name below the folder; "" where `place` is a single object.

    Args:
        place: the local place.
        written: a command writes it: what is finished here and not there is put there when it is opened, and what the
            command removes is removed there.
        wanted: which objects are fetched, by name; all others are only listed.
    """

    place: Path
    written: bool = False
    wanted: Callable[[str], bool] = lambda name: True
    known: dict[str, Entry] = field(default_factory=dict)
    tracked: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def url(self) -> str:
        url = url_of(self.place)
        assert url is not None
        return url

    def open(self) -> Mirror:
        """Bring the local folder up to date.

        Raises:
            StoreError: the store cannot be read.
            ProblemsError: files that cannot be fetched, all of them.
        """
        found = listing(self.url)
        self.known = {name: entry for name, entry in found.items() if not is_hidden(name)}
        here = self._local_names()
        waiting = [name for name in here if self._is_unsent(name)] if self.written else []
        for name in here - self.known.keys() - set(waiting):
            if read_tag(self._path(name)) is not None:  # it was there, and was deleted in the store
                self._path(name).unlink(missing_ok=True)
                write_tag(self._path(name), None)
        changed = [name for name in self.known if name not in waiting and not self._is_same(name)]
        for name in here.intersection(changed):  # a copy of what is no longer there
            self._path(name).unlink(missing_ok=True)
        all_of(self.fetch, [name for name in changed if self.wanted(name)])
        self.tracked = self._local_names()
        all_of(lambda name: self.publish(self._path(name)), sorted(waiting))
        return self

    def publish(self, path: Path) -> None:
        """Put a file that is whole into the store; before it, delete there what has been removed here."""
        name = self._name(path)
        if is_hidden(name):
            return
        with self.lock:
            self.forget_removed()
            entry = put(path, self._url(name))
            write_tag(path, entry)
            self.known[name] = entry
            self.tracked.add(name)

    def forget_removed(self) -> None:
        """Delete in the store what was here and is no longer."""
        if not self.written:
            return
        with self.lock:
            for name in [name for name in self.tracked if not os.path.lexists(self._path(name))]:
                delete(self._url(name))
                write_tag(self._path(name), None)
                self.tracked.discard(name)
                self.known.pop(name, None)

    def take_over(self, found: Mapping[str, Entry]) -> None:
        """Fetch objects that other processes put there meanwhile, and follow them."""
        found = {name: entry for name, entry in found.items() if not is_hidden(name)}
        with self.lock:
            self.known |= found
            all_of(self.fetch, sorted(name for name in found if not self._is_same(name)))
            self.tracked |= found.keys()

    def send(self, path: Path) -> None:
        """Put a file into the store that is not there as it is here."""
        name = self._name(path)
        if not is_hidden(name) and self._is_unsent(name):
            self.publish(path)

    def finish(self) -> None:
        """What has not gone through `publish`: files that others than `extract.whole` wrote, and removed ones."""
        if not self.written:
            return
        self.forget_removed()
        unsent = sorted(name for name in self._local_names() if self._is_unsent(name))
        all_of(lambda name: self.publish(self._path(name)), unsent)

    def fetch(self, name: str) -> None:
        """Bring one object that is only listed."""
        fetch(self._url(name), self._path(name), self.known[name])
        write_tag(self._path(name), self.known[name])

    def _path(self, name: str) -> Path:
        return self.place / name if name else self.place

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _name(self, path: Path) -> str:
        return "" if path == self.place else path.relative_to(self.place).as_posix()

    def _local_names(self) -> set[str]:
        if self.place.is_file():
            return {""}
        files = (path for path in self.place.rglob("*") if path.is_file() and not path.is_symlink())
        return {name for path in files if not is_hidden(name := self._name(path))}

    def _is_same(self, name: str) -> bool:
        """Whether the local file is the store's object, unchanged."""
        tag = read_tag(self._path(name))
        return tag is not None and tag.entry == self.known[name] and tag.local == local_of(self._path(name))

    def _is_unsent(self, name: str) -> bool:
        """Whether the local file was never in the store, or was changed after that while the store's was not."""
        tag, entry = read_tag(self._path(name)), self.known.get(name)
        if tag is None or entry is None:
            return tag is None and entry is None
        return tag.entry == entry and tag.local != local_of(self._path(name))


@dataclass(frozen=True)
class Tag:
    """Which object a local file is a copy of, and size and time that the file had then."""

    entry: Entry
    local: tuple[int, int]


def is_hidden(name: str) -> bool:
    """Half files, claims and locks: what only this machine is told."""
    return any(part.startswith(".") for part in name.split("/"))


def local_of(path: Path) -> tuple[int, int] | None:
    """Bytes and time of a file; None where there is none."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_size, stat.st_mtime_ns


def read_tag(path: Path) -> Tag | None:
    """What is known of a local file; None where nothing is."""
    try:
        size, etag, *local = json.loads(_tag_file(path).read_text(encoding="utf-8"))
        return Tag(Entry(int(size), str(etag)), (int(local[0]), int(local[1])))
    except (OSError, ValueError, TypeError, IndexError):
        return None


def write_tag(path: Path, entry: Entry | None) -> None:
    """Note that the file is a copy of that object; None forgets it."""
    file, local = _tag_file(path), local_of(path)
    if entry is None or local is None:
        file.unlink(missing_ok=True)
        return
    write_whole(file, json.dumps([entry.size, entry.etag, *local]))


def _tag_file(path: Path) -> Path:
    return root() / ETAGS / path.relative_to(root()).with_name(f"{path.name}.json")


def all_of(work: Callable[[str], None], names: list[str]) -> None:
    """Do it for all, in threads; what went wrong is told of all together.

    Raises:
        ProblemsError: of the first kind, with the problems of all.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="store") as threads:
        futures = [threads.submit(work, name) for name in names]
        errors = [error for future in futures if (error := future.exception()) is not None]
    others = [error for error in errors if not isinstance(error, ProblemsError)]
    if others:
        raise others[0]
    if errors:
        raise StoreError("object store", [problem for e in errors for problem in e.problems])  # type: ignore[attr-defined]  # all are ProblemsError
