"""Slides copied to local scratch: a folder of this process's own, bounded, and removed however the process ends.

A folder goes with its process: at the end, after an error and after Ctrl-C by itself; what a killed process left is
removed by the next that stages slides, which sees by a lock of the operating system that its owner is gone.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from extract.config import Slides
from extract.places import shown, url_of
from extract.slides.errors import SlideError
from extract.slides.files import first_of_series, parts_of
from extract.stores import client, looking
from extract.stores.client import Stopped

GB = 1e9
CHUNK = 2**22
SLOW = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afs", "ceph", "lustre", "beegfs", "beegfs_nodev"),
        *("gpfs", "glusterfs", "9p", "virtiofs", "panfs", "orangefs", "davfs", "ncpfs", "fhgfs"),
    )
)
"""Types of file systems in /proc/mounts that are another machine's."""
FUSE = "fuse."
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.lxcfs", "fuse.portal", "fuse.gvfsd-fuse", "fuse.bindfs", "fuse.mergerfs")


class StageError(SlideError):
    """A slide cannot be copied to local scratch."""


def is_staged(path: Path, stage: str, mounts: str | None = None) -> bool:
    """Whether a slide is read from a copy: all in stores; others as `slides.stage` says.

    Args:
        mounts: the text of /proc/mounts, for tests.
    """
    if url_of(path) is not None:
        return True
    return stage == "true" or (stage == "auto" and is_on_network(path, mounts))


def is_on_network(path: Path, mounts: str | None = None) -> bool:
    """Whether the file lies on a network share, by the type of its file system; False where the system does not say."""
    kind = filesystem_type(os.path.realpath(path), mounts if mounts is not None else _mounts())
    return kind in SLOW or (kind.startswith(FUSE) and kind not in LOCAL_FUSE)


def filesystem_type(real_path: str, mounts: str) -> str:
    """The type of the file system with the longest mount point above the path; of two at one point the later."""
    found, longest = "", -1
    for line in mounts.splitlines():
        _, point, kind, *_ = [*line.split(" "), "", "", ""]
        point = point.encode().decode("unicode_escape", "replace") if "\\" in point else point  # \040 is a space
        inside = real_path == point or real_path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:
            found, longest = kind, len(point)
    return found


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text("utf-8", "surrogateescape")
    except OSError:  # no Linux
        return ""


class Scratch:
    """This process's folder of staged slides.

    Args:
        section: `slides` of the config: where, and how much.
    """

    def __init__(self, section: Slides):
        self.budget = int(section.scratch_gb * GB)
        self.used = 0
        self.base = (section.scratch or Path(tempfile.gettempdir())) / f"slide-mil-scratch-{os.getuid()}"
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        remove_left_behind(self.base)
        name = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self.folder, self._handle = self.base / name, -1

    def reserve(self, size: int, path: Path) -> bool:
        """Whether there is room for so many bytes now; they are then set aside.

        Raises:
            StageError: there never will be.
        """
        if size > self.budget:
            raise StageError(
                f"{shown(path)}: has {size / GB:.3g} GB, more than slides.scratch_gb={self.budget / GB:g} allows to be "
                "staged; set it larger, and slides.scratch=FOLDER to a disk that has the room"
            )
        with self._lock:
            if self.used + size > self.budget:
                return False
            self.used += size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self.used -= size

    def copy(self, path: Path, size: int) -> Path:
        """Bring all files of a slide here, for which `size` bytes were set aside; the copy by which it is opened.

        Raises:
            StageError: it cannot be read, or not be written here. The bytes are given back.
        """
        folder = self._own() / uuid.uuid4().hex
        try:
            for part in parts_of(path):
                self._copy_one(part, folder / part.relative_to(path.parent))
            opened = first_of_series(folder / path.name)
        except (OSError, client.StoreError) as error:
            self._drop(folder, size)
            said = "; ".join(error.problems) if isinstance(error, client.StoreError) else str(error)
            raise StageError(f"{shown(path)}: cannot be staged to {self.base}: {said}") from None
        except BaseException:
            self._drop(folder, size)
            raise
        self._sizes[folder] = size
        return opened

    def release(self, opened: Path, *, read: bool = True) -> None:
        """Remove a copy. Readers may still have its files open, which keeps their room: what was `read` is emptied."""
        folder = next((one for one in opened.parents if one in self._sizes), None)
        if folder is None:
            return
        if read:
            for file in (file for file in folder.rglob("*") if file.is_file()):
                with suppress(OSError):
                    os.truncate(file, 0)
        self._drop(folder, self._sizes.pop(folder))

    def stop(self) -> None:
        """Copies that are being made end with Stopped."""
        self._closed.set()

    def close(self) -> None:
        """Stop, and remove everything."""
        self.stop()
        if self._handle < 0:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        _lock_of(self.folder).unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = -1
        with suppress(OSError):  # others use it
            self.base.rmdir()

    def _own(self) -> Path:
        """The folder, made when the first slide comes; its lock first."""
        with self._lock:
            if self._closed.is_set():
                raise Stopped
            if self._handle < 0:
                self.base.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(_lock_of(self.folder), os.O_RDWR | os.O_CREAT, 0o600)
                with suppress(OSError):  # a file system without locks: nobody removes it then
                    fcntl.flock(self._handle, fcntl.LOCK_EX)
                self.folder.mkdir(mode=0o700)
        return self.folder

    def _copy_one(self, part: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        url = url_of(part)
        if url is not None:
            entry = client.entry_of(url)
            if entry is None:
                raise client.Missing("object store", [f"{url}: no such object"])
            client.fetch(url, target, entry, going_on=self._goes_on)
            return
        copy_file(part, target, self._goes_on)

    def _goes_on(self) -> bool:
        return not self._closed.is_set()

    def _drop(self, folder: Path, size: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.give_back(size)


_own: list[Scratch] = []
_copies: dict[Path, Path] = {}
_copying = threading.Lock()


def local_copy(path: Path, section: Slides | None = None) -> Path:
    """A file that can be read at once: of a slide in a store a copy, which stays while this process lives.

    Raises:
        StageError: it cannot be fetched, or all copies together would be larger than `slides.scratch_gb`.
    """
    if url_of(path) is None:
        return path
    with _copying:
        if path not in _copies:
            if not _own:
                _own.append(Scratch(section or Slides()))
                atexit.register(_own[0].close)
            size = size_of_slide(path)
            if not _own[0].reserve(size, path):
                raise StageError(f"{shown(path)}: no room left for it; set slides.scratch_gb larger")
            _copies[path] = _own[0].copy(path, size)
        return _copies[path]


def copy_file(source: Path, target: Path, going_on: Callable[[], bool]) -> None:
    """Copy a file's bytes; StageError if it has another size afterwards, Stopped if that is asked for."""
    with open(source, "rb") as reading, open(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as out:
        while chunk := reading.read(CHUNK):
            if not going_on():
                raise Stopped
            out.write(chunk)
    if target.stat().st_size != source.stat().st_size:
        raise StageError(f"{source}: was written while it was staged")


def size_of_slide(path: Path) -> int:
    """Bytes of all its files."""
    return sum(looking.size_of(part) for part in parts_of(path))


def remove_left_behind(base: Path) -> None:
    """Remove the folders of processes that are no more: nobody holds their locks."""
    for folder in base.glob("*.*.*") if base.is_dir() else ():
        if not folder.is_dir():
            continue
        try:
            handle = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        os.close(handle)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
