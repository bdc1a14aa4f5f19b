"""Files that are whole or not there: written under a hidden name beside their own, flushed to disk, and renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from extract.leftovers import partial_of

FOLLOWERS: list[Callable[[Path], None]] = []
"""Told of every file when it is whole: what mirrors an object store puts it there (`extract.stores`)."""


def mode_of_new_file(path: Path) -> int:
    """What the umask makes of a file there. safetensors makes files that only their owner may read."""
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    path.unlink()
    return mode


@contextmanager
def replace_on_success(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`, else remove it.

    Raises:
        OSError: naming `path`, for whatever a library raises that says which system error it met.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_of(path)
    try:
        with errors_about(path, temporary):
            mode = mode_of_new_file(temporary)
            yield temporary
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode & 0o7777)
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for told in FOLLOWERS:
        told(path)


@contextmanager
def errors_about(path: Path, temporary: Path) -> Iterator[None]:
    """What is raised while `temporary` is written goes on, as an OSError about `path` where the disk is behind it."""
    try:
        yield
    except Exception as error:
        found = system_error(error, path, temporary)
        if found is None:
            raise
        raise found from error


def system_error(error: Exception, path: Path, temporary: Path) -> OSError | None:
    """The OSError about `path` behind an error of writing `temporary`; None if there is none, or it says it all.

    HDF5 and safetensors have the system's error number in their text only.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is not None and getattr(error, "filename", None) not in (None, str(temporary)):
        return None
    told = re.search(r"(?:errno = |os error )(\d+)", str(error)) if number is None else None
    number = int(told[1]) if told else number
    return None if number is None else OSError(number, os.strerror(number), str(path))


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write `path`, text in UTF-8, whole or not at all. For what a library would write with errors of its own."""
    with replace_on_success(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def folder_on_success(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which must not exist; on success its files are flushed to disk, as
    readable as the umask lets new files be, and it is renamed to `folder`. Else it is removed.

    Raises:
        OSError: naming `folder`, as above.
    """
    temporary = partial_of(folder)
    try:
        with errors_about(folder, temporary):
            temporary.mkdir(parents=True)
            mode = mode_of_new_file(temporary / "new") & 0o7777
            yield temporary
            for path in (path for path in temporary.rglob("*") if path.is_file()):
                path.chmod(mode)  # safetensors makes files that only their owner may read
                with open(path, "rb+") as handle:
                    os.fsync(handle.fileno())
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
