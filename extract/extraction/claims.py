"""Claim files: several processes, on one machine or many, share a cohort without doing a slide twice.

A claim is a hidden file `.SLIDE.claim` beside the features, created exclusively. It says who its owner is; its
modification time is the owner's heartbeat. A claim without heartbeat, or of a process of this machine that is no more,
is stale: whoever renames it away first may claim anew. Only exclusive creation and renaming are relied upon, which
network file systems do atomically.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil

HEARTBEAT_S = 15.0
STALE_AFTER_S = 120.0
SETTLE_S = 0.25
"""After a takeover the new claim is looked at again: another process may have been between judging the old claim stale
and renaming it, and then have renamed the new one."""
UNWRITTEN_AFTER_S = 5.0
"""A claim without content was left by a process that was killed between creating and writing it."""


@dataclass(frozen=True)
class Owner:
    """Who made a claim. `token` is unique to the claim; `machine` tells apart hosts and containers."""

    token: str
    host: str = ""
    machine: str = ""
    pid: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process"


class Holding(Protocol):
    """What extraction asks of claims."""

    def take(self, slide: str) -> bool: ...
    def holds(self, slide: str) -> bool: ...
    def release(self, slide: str) -> None: ...


class Nobodys:
    """No claims: where somebody hands every slide to one worker (Ray), nothing has to be shared out."""

    def take(self, slide: str) -> bool:
        return True

    def holds(self, slide: str) -> bool:
        return True

    def release(self, slide: str) -> None:
        """Nothing was taken."""


class Claims:
    """The claims that this process holds in one folder. Use it as a context: leaving it releases all of them.

    Args:
        folder: where the claim files are; made if it does not exist.
        heartbeat_s: how often a thread refreshes the modification time of the claims held.
        stale_after_s: a claim not refreshed for so long, by the file system's own clock, may be taken over.
    """

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S, stale_after_s: float = STALE_AFTER_S):
        self.folder = folder
        self.heartbeat_s, self.stale_after_s = heartbeat_s, stale_after_s
        self._tokens: dict[str, str] = {}  # by slide
        self._lock = threading.RLock()  # held while a claim file is written, refreshed or removed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        for slide in list(self._tokens):
            self.release(slide)

    def path(self, slide: str) -> Path:
        return self.folder / f".{slide}.claim"

    def take(self, slide: str) -> bool:
        """Claim a slide. False if another process holds it, or is just taking it over."""
        path = self.path(slide)
        if self._create(slide):
            return True
        owner = read_owner(path)
        if owner is None:  # released in between
            return self._create(slide)
        if not self.is_stale(path, owner):
            return False
        return self._take_over(slide, owner)

    def holds(self, slide: str) -> bool:
        """Whether the claim is still this process's: a process that was suspended for long may have lost it."""
        owner = read_owner(self.path(slide))
        return owner is not None and owner.token == self._tokens.get(slide)

    def release(self, slide: str) -> None:
        """Give a claim back. Does nothing to one that was lost."""
        with self._lock:
            if self.holds(slide):
                self.path(slide).unlink(missing_ok=True)
            self._tokens.pop(slide, None)

    def is_stale(self, path: Path, owner: Owner) -> bool:
        """Whether the owner is gone: a dead process of this machine, or no heartbeat for `stale_after_s`."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        if owner.machine == this_machine() and stat.st_uid == os.getuid() and not _is_running(owner.pid):
            return True  # (processes of other users may be hidden)
        age_s = abs(filesystem_now(self.folder) - stat.st_mtime)  # far in the future: the clock was set back
        return age_s > (self.stale_after_s if owner.token else min(UNWRITTEN_AFTER_S, self.stale_after_s))

    def _take_over(self, slide: str, stale: Owner) -> bool:
        path = self.path(slide)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.stale")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False  # another process was faster
        renamed = read_owner(aside)
        if renamed is not None and renamed.token != stale.token:  # a new claim: this process was late
            with suppress(OSError):  # somebody claims anew already; or no hard links here: its owner claims it again
                os.link(aside, path)
        aside.unlink(missing_ok=True)  # whoever claimed the slide meanwhile may have tidied up
        if renamed is None or renamed.token != stale.token:
            return False
        if not self._create(slide):
            return False
        time.sleep(SETTLE_S)
        if self.holds(slide):
            return True
        self.release(slide)
        return False

    def _create(self, slide: str, token: str = "") -> bool:
        path = self.path(slide)
        owner = Owner(token or uuid.uuid4().hex, socket.gethostname(), this_machine(), os.getpid())
        with self._lock:
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(asdict(owner), file)
            except OSError:  # disk full
                path.unlink(missing_ok=True)
                raise
            self._tokens[slide] = owner.token
        return True

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            for slide in list(self._tokens):
                try:
                    self._refresh(slide)
                except OSError:
                    continue  # the file system is away for a moment; at worst the claim goes stale, see `holds`

    def _refresh(self, slide: str) -> None:
        path = self.path(slide)
        with self._lock:
            token = self._tokens.get(slide)
            owner = read_owner(path)
            if token is not None and owner is None:
                self._create(slide, token)
            elif token is not None and owner is not None and owner.token == token:
                os.utime(path)


def read_owner(path: Path) -> Owner | None:
    """The owner that a claim file states; without token if it is not written yet; None if there is no such file."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Owner("")


def filesystem_now(folder: Path) -> float:
    """The time by the clock that stamps files of this folder: a file server's differs from this machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: nothing is left if this process is killed here
        return os.fstat(file.fileno()).st_mtime


def this_machine() -> str:
    """Host, boot and process-id space: elsewhere (hosts may share a name, containers a kernel) a pid is another's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:  # not Linux
        boot = space = ""
    return f"{socket.gethostname()}:{boot}:{space}"


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
