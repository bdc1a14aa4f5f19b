"""hashes.json: the sha256 of every file that a finished run can be asked about, so that a changed one is noticed.

`sha256sum FILE` gives the same. The file is no signature: who can change a run can write new hashes. It is for what
happens by accident, such as a bad disk, a broken copy, or an edit that was forgotten.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from extract.config import ProblemsError
from extract.digest import sha256_of_file
from extract.whole import write_whole

FILE = "hashes.json"
KINDS = (".csv", ".json", ".yaml", ".safetensors")
NOT_LISTED = {"logs", "checkpoints", "figures"}


class ChangedError(ProblemsError):
    """A file is not the one that was written."""


def write_hashes(folder: Path) -> None:
    """List all tables, numbers and members in `folder` and below it with their sha256; to be called last."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_listed(path, folder))
    files = {name: sha256_of_file(folder / name) for name in names}
    content = {"algorithm": "sha256", "files": files, "of_this_list": _of_list(files)}
    write_whole(folder / FILE, json.dumps(content, indent=1) + "\n")


def all_written(folder: Path) -> bool:
    """Whether training has ended here: the list, which is written last, is there, or nothing to resume from is."""
    return (folder / FILE).exists() or not (folder / "checkpoints").exists()


def refuse_changed(folder: Path, names: Iterable[str]) -> None:
    """Raise ChangedError for files of a finished run, all together, that are not those that training wrote.

    A run without hashes.json (of an older version) is accepted, which is said once on standard error.

    Args:
        names: the files that will be read.
    """
    path = folder / FILE
    if not path.exists():
        _say_once(folder)
        return
    try:
        files = _read(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ChangedError("cannot use the run folder", [f"{path}: damaged ({error}). {WHAT_TO_DO}"]) from None
    problems = [f"{folder / name}: {why}. {WHAT_TO_DO}" for name in names if (why := _changed(folder, name, files))]
    if problems:
        raise ChangedError("files of the run were changed after it finished", problems)


WHAT_TO_DO = f"Restore the folder from a copy or train again; to use it all the same, delete {FILE}"


def _changed(folder: Path, name: str, files: dict[str, str]) -> str:
    """Why the file is not the one that was written, "" if it is."""
    if name not in files:
        return f"is not listed in {FILE}"
    try:
        found = sha256_of_file(folder / name)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found == files[name]:
        return ""
    return f"sha256 {found[:12]}..., but {FILE} says {files[name][:12]}...: it was changed or damaged"


def _read(path: Path) -> dict[str, str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("algorithm") != "sha256":
        raise ValueError("expected a list of sha256 hashes")
    if content.get("of_this_list") != _of_list(files):
        raise ValueError("the list itself was changed")
    if not all(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) for value in files.values()):
        raise ValueError("expected 64 hexadecimal digits a file")
    return files


def _of_list(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _is_listed(path: Path, folder: Path) -> bool:
    parts: Sequence[str] = path.relative_to(folder).parts
    hidden = any(part.startswith(".") or part in NOT_LISTED for part in parts)
    return path.is_file() and path.suffix in KINDS and path.name != FILE and not hidden


@cache
def _say_once(folder: Path) -> None:
    what = f"{folder}: no {FILE} (trained by an older version), so it cannot be told whether a file was changed"
    print(f"note: {what}", file=sys.stderr)
