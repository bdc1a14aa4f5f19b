"""hashes.json: the sha256 of every file that a finished run can be asked about, so that a changed one is noticed.

`sha256sum FILE` gives the same, but for environment.json, whose dates and durations differ in every run of a command:
they are left out, so that hashes.json is the same whenever the run is. The file is no signature: who can change a run
can write new hashes. It is for what happens by accident, such as a bad disk, a broken copy, or an edit that was
forgotten.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from extract.config import ProblemsError
from extract.digest import sha256_of_file
from extract.whole import write_whole

FILE = "hashes.json"
KINDS = (".csv", ".json", ".md", ".yaml", ".safetensors")
NOT_LISTED = {"logs", "checkpoints", "figures"}
WITH_TIMES = "environment.json"
"""The only file of a run in which there are dates and durations."""
TIMES = frozenset({"started", "training_seconds", "seconds"})
"""What they are called there."""


_Listed = tuple[dict[str, str], dict[str, str]]
"""sha256 by name: of the files as they are, and of those in which times are left out."""


class ChangedError(ProblemsError):
    """A file is not the one that was written."""


def write_hashes(folder: Path) -> None:
    """List all tables, numbers and members in `folder` and below it with their sha256; to be called last."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_listed(path, folder))
    files = {name: sha256_of_file(folder / name) for name in names if Path(name).name != WITH_TIMES}
    timeless = {name: _sha256_without_times(folder / name) for name in names if Path(name).name == WITH_TIMES}
    both = {"files": files, "without_times": timeless}
    content = {"algorithm": "sha256", **both, "of_this_list": _of_list(both)}
    write_whole(folder / FILE, json.dumps(content, indent=1) + "\n")


def without_times(value: Any) -> Any:
    """What environment.json holds, all dates and durations left out."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


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
        listed = _read(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ChangedError("cannot use the run folder", [f"{path}: damaged ({error}). {WHAT_TO_DO}"]) from None
    problems = [f"{folder / name}: {why}. {WHAT_TO_DO}" for name in names if (why := _changed(folder, name, listed))]
    if problems:
        raise ChangedError("files of the run were changed after it finished", problems)


def listed(folder: Path, name: str) -> bool:
    """Whether hashes.json names the file, which then must be there; a list that cannot be read names nothing."""
    try:
        return any(name in part for part in _read(folder / FILE))
    except (OSError, ValueError, RecursionError):
        return False  # which `refuse_changed` says


WHAT_TO_DO = f"Restore the folder from a copy or train again; to use it all the same, delete {FILE}"


def _changed(folder: Path, name: str, listed: _Listed) -> str:
    """Why the file is not the one that was written, "" if it is."""
    files, timeless = listed
    if name not in files | timeless:
        return f"is not listed in {FILE}"
    digest, expected = (sha256_of_file, files[name]) if name in files else (_sha256_without_times, timeless[name])
    try:
        found = digest(folder / name)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"is no JSON any more ({error}): it was changed or damaged"
    if found == expected:
        return ""
    return f"sha256 {found[:12]}..., but {FILE} says {expected[:12]}...: it was changed or damaged"


def _read(path: Path) -> _Listed:
    content = json.loads(path.read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("algorithm") != "sha256":
        raise ValueError("expected a list of sha256 hashes")
    timeless = content.get("without_times", {})  # earlier versions list environment.json with the others
    if not isinstance(timeless, dict):
        raise ValueError("expected a list of sha256 hashes without times")
    said = {"files": files, "without_times": timeless} if "without_times" in content else files
    if content.get("of_this_list") != _of_list(said):
        raise ValueError("the list itself was changed")
    digests = [*files.values(), *timeless.values()]
    if not all(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) for value in digests):
        raise ValueError("expected 64 hexadecimal digits a file")
    return files, timeless


def _sha256_without_times(path: Path) -> str:
    return _of_list(without_times(json.loads(path.read_text(encoding="utf-8"))))


def _of_list(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_listed(path: Path, folder: Path) -> bool:
    parts: Sequence[str] = path.relative_to(folder).parts
    hidden = any(part.startswith(".") or part in NOT_LISTED for part in parts)
    return path.is_file() and path.suffix in KINDS and path.name != FILE and not hidden


@cache
def _say_once(folder: Path) -> None:
    what = f"{folder}: no {FILE} (trained by an older version), so it cannot be told whether a file was changed"
    print(f"note: {what}", file=sys.stderr)
