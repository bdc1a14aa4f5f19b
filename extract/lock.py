"""A lock on what a command writes: of two commands with the same `out`, the second says so before it has done any work.
Nothing is locked that belongs to another command (`extract.owners`).

The lock is the operating system's (`flock`) on a hidden file beside `out`, `.NAME.lock`: it is released however a
process ends. The file also says who holds it; it is removed when its holder is done.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from extract.config import ProblemsError
from extract.owners import refuse_anothers

CANNOT = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What `flock` says where a file system has no locks."""
NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
"""No file can be made beside `out`; `out` itself may be writable, or on another disk."""

_held: set[tuple[Path, str, int]] = set()
"""What this process holds, which command, and which of its threads."""


class LockError(ProblemsError):
    """Another command is writing there. Nothing was done."""


@contextmanager
def only_command_in(out: Path, command: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock on `out`, a folder or file that need not exist yet.

    A thread that holds it for this command just goes on: a command takes it before anything slow is imported, and the
    work that it calls takes it too. In a sub-folder of a finished run, the run is held as well, `shared`: it is neither
    replaced nor continued meanwhile.

    Args:
        command: what holds it, for the message of another one.
        shared: commands that hold it `shared` tolerate each other, and no other.

    Raises:
        LockError: another command holds it.
        OwnerError: it is, or lies in, a folder that another command made.
    """
    out = Path(os.path.realpath(out))
    if (out, command, threading.get_ident()) in _held:
        yield
        return
    around = refuse_anothers(out, command)
    with _held_for(around, command, shared=True) if around else nullcontext(), _held_for(out, command, shared=shared):
        yield


@contextmanager
def _held_for(out: Path, command: str, *, shared: bool) -> Iterator[None]:
    mine = (out, command, threading.get_ident())
    made = _make_folders(out.parent)
    try:
        handle = _locked(out, command, shared)
        _held.add(mine)
        try:
            yield
        finally:
            _held.discard(mine)
            _give_back(_lock_file(out), handle)
    finally:
        for folder in made:
            with suppress(OSError):  # it is in use now
                folder.rmdir()


def _lock_file(out: Path) -> Path:
    return out.parent / f".{out.name}.lock"


def _make_folders(folder: Path) -> list[Path]:
    """Those that did not exist, the innermost first. Where they cannot be made, the command itself says why."""
    absent = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return absent


def _locked(out: Path, command: str, shared: bool) -> int | None:
    """An open, locked file; None where there can be no lock, which is said."""
    path = _lock_file(out)
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            _say_without(out, error)
            return None
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 4096, 0)
            os.close(handle)
            problem = f"{out}: {_who(holder)} is writing there; wait for it, or set another out"
            raise LockError("in use", [problem]) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in CANNOT:
                raise
            _say_without(out, error)
            return None
        if _is_still(path, handle):
            _sign(handle, command)
            return handle
        os.close(handle)  # its holder removed it in between


def _say_without(out: Path, error: OSError) -> None:
    why = f"no lock beside {out} ({error.strerror})"
    print(f"note: {why}: that another command writes there would not be noticed", file=sys.stderr)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sign(handle: int, command: str) -> None:
    said = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    with suppress(OSError):  # the disk is full: the lock holds all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(said) + "\n").encode(), 0)


def _who(content: bytes) -> str:
    """The holder, as far as its file tells."""
    try:
        said = json.loads(content)
        return f"{said['command']} (process {said['pid']} on {said['host']}, since {said['since']})"
    except (ValueError, KeyError, TypeError):
        return "another command"


def _give_back(path: Path, handle: int | None) -> None:
    """Remove the file, unless others share it, and release it."""
    if handle is None:
        return
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(path, handle):
            path.unlink()
    os.close(handle)
