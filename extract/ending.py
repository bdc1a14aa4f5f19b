"""How a command ends: a message and an exit code for what is wrong, for Ctrl-C and SIGTERM, and for a full disk."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from extract.config import ProblemsError, tell
from extract.room import left_by_limits
from extract.sudden import sudden_end_is_told

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
BROKEN = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)


def ended(
    work: Callable[[], int],
    *,
    interrupted: Callable[[], str],
    after: Callable[[], str] = lambda: "",
    known: Callable[[], tuple[type[Exception], ...]] = tuple,
) -> int:
    """The exit code of `work`: its own, 2 after a message for what is wrong, 130 after Ctrl-C or SIGTERM.

    Args:
        interrupted: what is said after Ctrl-C: what was kept, and how to go on.
        after: what is said when something could not be written: the same.
        known: gives errors besides ProblemsError whose text says what is wrong; their modules may be slow to import.
    """
    try:
        with sudden_end_is_told(), sigterm_is_ctrl_c():
            return work()
    except ProblemsError as error:
        tell(error)
    except KeyboardInterrupt:
        print(f"\n{interrupted()}", file=sys.stderr)
        return 130
    except Exception as error:  # raised again unless it is known, or a sentence says what it is
        said = not_written(error) if isinstance(error, OSError) else out_of_memory(error)
        if not said and isinstance(error, known()):
            tell(error)
            return 2
        said = said or nearly_out_of_memory(error)
        if not said:
            raise
        tell(ProblemsError("stopped", [f"{said}. No half file was left. {after()}".rstrip()]))
    return 2


NO_MEMORY = "there is not enough memory for this; use a larger machine, a higher limit (ulimit -v), or less at once"
NO_THREAD = (
    "the system allows no further process or thread: its memory or their number is limited; use a higher limit "
    "(ulimit -v, ulimit -u), or fewer workers"
)

NEARLY_NOTHING = 50 * 2**20
"""Bytes; a picture of a report takes a tenth of it."""


def out_of_memory(error: Exception) -> str:
    """A sentence, or "". Python, numpy and the GPU's allocator raise errors of their own kind; torch, and Python of
    threads, say it in words."""
    said = str(error)
    if isinstance(error, RuntimeError) and "start new thread" in said:
        return NO_THREAD
    words = ("t allocate memory", "out of memory", "bad_alloc")
    by_torch = isinstance(error, RuntimeError) and any(word in said for word in words)
    return NO_MEMORY if isinstance(error, MemoryError) or by_torch else ""


def nearly_out_of_memory(error: Exception) -> str:
    """A sentence where a limit leaves next to nothing, and a library calls what came of that by another name; or ""."""
    left = min(left_by_limits().values(), default=NEARLY_NOTHING)
    what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return f"{NO_MEMORY} ({left / 1e6:.0f} MB are left; {what})" if left < NEARLY_NOTHING else ""


def not_written(error: OSError) -> str | None:
    """A sentence for a disk that is full, read-only or gone; None for an error that says nothing about a disk."""
    if "temporary directory" in str(error):  # so say Python's tempfile, and matplotlib where there is no home either
        return f"no folder for temporary files can be written to; set TMPDIR=FOLDER ({str(error).splitlines()[0]})"
    if error.errno is None:
        return None
    if error.errno == errno.ENOMEM:
        return NO_MEMORY if error.filename is None else f"{os.fsdecode(error.filename)}: {NO_MEMORY}"
    if error.errno == errno.EAGAIN:  # of a process that could not be started
        return NO_THREAD
    where, why = Path(os.fsdecode(error.filename or "the disk")), os.strerror(error.errno)
    if error.errno in OUT_OF_SPACE:
        return f"{where}: no space left ({why})"
    if error.errno in REFUSED:
        return f"{where}: cannot be written to ({why})"
    if error.errno in BROKEN:
        return f"{where}: the disk does not answer as it should ({why})"
    return None


@contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """SIGTERM, which job schedulers send, raises KeyboardInterrupt within. (Only the main thread can set that up.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
