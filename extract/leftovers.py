"""What processes that were killed left behind, and folders that go whole or not at all.

A file is written under a hidden name, `.NAME.HOST.PID.partial`, and renamed when it is whole (see
`extract.whole.replace_on_success`); a folder that is replaced is renamed to `.NAME.PID.removed` first. A
process that is killed in between leaves these names. They are never taken for what was to be written.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

PARTIAL = re.compile(r"\..+\.(\d+)\.partial")


def partial_of(path: Path) -> Path:
    """Under which name this process writes `path` until it is whole."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def is_unused(folder: Path) -> bool:
    """Whether nothing is in the folder, or no more than what a killed process had begun to write."""
    return not folder.exists() or all(PARTIAL.fullmatch(path.name) for path in folder.iterdir())


def remove_partials(folders: Iterable[Path]) -> None:
    """Remove half files in these folders, of whatever process: only for who alone writes there."""
    for path in (path for folder in folders for path in folder.glob(".*.partial")):
        _remove(path)


def remove_partials_of_the_dead(folder: Path) -> None:
    """Remove half files of processes of this machine that are no more: others may be writing there."""
    for path in folder.glob(f".*.{glob.escape(socket.gethostname())}.*.partial"):
        found = PARTIAL.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder whole, or not at all: what cannot be deleted must not lose a part of itself."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.removed")
    try:
        folder.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise OSError(error.errno, error.strerror, str(aside if aside.exists() else folder)) from error
        shutil.rmtree(folder, ignore_errors=True)  # a disk of its own: only what is in it


def remove_aside(folder: Path) -> None:
    """Remove what a process that was killed in `remove_folder` had put aside."""
    for path in folder.absolute().parent.glob(f".{glob.escape(folder.name)}.*.removed"):
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.\d+\.removed", path.name):
            shutil.rmtree(path, ignore_errors=True)
