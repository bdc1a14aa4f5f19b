"""Whose folder it is: no command writes into what another one made, nor over it.

A run folder is sealed by its hashes.json, and `overwrite=true` removes it whole; so what other commands leave goes
beside it, or into a sub-folder of its own of a run that has finished, such as RUN/heatmaps. No study and no fine-tuning
lies within another one's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract.config import ConfigError, ProblemsError, read_yaml

TRAIN, FINETUNE, PREDICT = "mil.train", "extract.finetune", "mil.predict"
MARKS = {
    FINETUNE: ("config.yaml", "head.safetensors"),
    PREDICT: ("predict.yaml", "environment.json"),
    TRAIN: ("config.yaml", "plan.csv"),
}
"""Files by which a command's folder is known: several, because anybody may call a config `config.yaml`."""
WHOLE = (TRAIN, FINETUNE)
"""Commands whose folder is one study: it lies within no other, and holds none."""
INTO_A_FILE = ("mil.selftest",)
"""Commands whose `out` is a file."""
SEAL, UNFINISHED = "hashes.json", "checkpoints"
NEW = {"extract.run": "features", "mil.predict": "predictions", "mil.heatmap": "heatmaps", "mil.compare": "comparison"}
"""What a message proposes to call a sub-folder."""
TARGETS, OF_A_TARGET = ("label", "time", "event"), {"columns", "classes", "out"}
"""Columns of which a study of many targets lists one a target; in what else the config of one target is its own."""
OWN = {"logs", "checkpoints", "figures", "inner", "learning_curve"}
"""Sub-folders of studies and predictions, some of them without a file that hashes.json lists."""


class OwnerError(ProblemsError):
    """The folder belongs to another command. Nothing was written."""


def refuse_anothers(out: Path, command: str) -> Path | None:
    """Raise OwnerError where `command` must not write, or make, `out`: in the folder of another command.

    A folder that the command itself made is its own affair: continued, replaced or refused.

    Returns the folder of another command in which `out` may be a sub-folder; None where it lies in no such folder.
    """
    out = Path(os.path.realpath(out))
    if command in INTO_A_FILE:
        out = out.parent
    owner = next((folder for folder in (out, *out.parents) if maker_of(folder)), None)
    if owner is None or (owner == out and maker_of(out) == command and not _is_part(out)):
        return None
    if why := _why_not(owner, out, command):
        raise OwnerError("out belongs to another command", [f"{out}: {why}. {_instead(owner, command)}"])
    return owner


def maker_of(folder: Path) -> str:
    """The command that made the folder, "" if it is nobody's: not made by one of MARKS, or not there."""
    for command, names in MARKS.items():
        if _exist(folder, *names):
            return command
    return TRAIN if any(_parts(folder)) else ""


def refuse_removing(folder: Path) -> None:
    """Raise OwnerError if a folder that is to be replaced holds what another command, or another study, made."""
    parts = set(_parts(folder))
    marks = {names[0] for names in MARKS.values()}
    made = {path.parent: maker_of(path.parent) for mark in marks for path in folder.rglob(mark)}
    others = {path: maker for path, maker in made.items() if maker and path not in (folder, *parts)}
    others |= {path.parent: "extract.run" for path in folder.rglob("*.h5")}
    if others:
        listed = [f"{path}: made by {maker}; move it elsewhere, or set out=OTHER" for path, maker in others.items()]
        raise OwnerError(f"{folder} would be removed with what is not its own", sorted(listed))


def _parts(folder: Path) -> Iterator[Path]:
    """The folders of a study's several aggregators, each with the config of all, and of its targets, with their own."""
    config = _bytes(folder / "config.yaml")
    if config:
        for path in folder.glob("*/plan.csv"):
            if _bytes(path.with_name("config.yaml")) == config:
                yield path.parent
        for target in _targets(folder):
            yield target
            yield from _parts(target)


def _targets(folder: Path) -> Iterator[Path]:
    """Sub-folders whose config is this folder's for one of its targets."""
    whole = _tree(folder)
    if any(isinstance(_column(whole, role), list) for role in TARGETS):
        for path in folder.glob("*/config.yaml"):
            own = _tree(path.parent)
            alike = all(whole.get(key) == own.get(key) for key in (whole.keys() | own.keys()) - OF_A_TARGET)
            if alike and all(_column(own, role) in _listed(_column(whole, role)) for role in TARGETS):
                yield path.parent


def _tree(folder: Path) -> dict[str, Any]:
    """The config of a run folder; {} where it cannot be read."""
    try:
        return read_yaml(folder / "config.yaml")
    except (ConfigError, OSError):
        return {}


def _column(tree: dict[str, Any], role: str) -> Any:
    columns = tree.get("columns")
    return columns.get(role) if isinstance(columns, dict) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_part(folder: Path) -> bool:
    return folder in set(_parts(folder.parent))


def _why_not(owner: Path, out: Path, command: str) -> str:
    """Why the command may not write into `out`, which is `owner` or below it; "" if it may."""
    maker = maker_of(owner)
    if out == owner:
        what = "one aggregator's or target's part of a study" if maker == command else f"a folder of {maker}"
        return f"is {what}, whose files must stay as they are"
    if command in WHOLE:
        return f"lies in {owner}, a folder of {maker}; a study has a folder that is no other's"
    inside = out.relative_to(owner).parts[0]
    if inside in OWN or inside in _sealed(owner) or (owner / inside).is_file():
        return f"{owner / inside} belongs to {owner}, a folder of {maker}, and must stay as it is"
    if maker == TRAIN and not _is_finished(owner):
        return f"lies in {owner}, where training has not finished; wait for it"
    return ""


def _is_finished(folder: Path) -> bool:
    runs = list(_parts(folder)) or [folder]
    return all((run / SEAL).exists() or (_exist(run, "metrics.json") and not _exist(run, UNFINISHED)) for run in runs)


def _exist(folder: Path, *names: str) -> bool:
    return all(os.path.lexists(folder / name) for name in names)


def _sealed(folder: Path) -> set[str]:
    """Files and sub-folders that hashes.json lists; none where there is no list, or none that can be read."""
    try:
        content = json.loads(_bytes(folder / SEAL) or b"{}")
        return {name.partition("/")[0] for part in ("files", "without_times") for name in content.get(part, {})}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return set()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError):  # a name that no file may have
        return b""


def _instead(owner: Path, command: str) -> str:
    if command in WHOLE or command in INTO_A_FILE or not _is_finished(owner):
        return "Set out=OTHER, which is in no such folder"
    return f"Set out=OTHER, beside it, or a sub-folder that is new: {owner / NEW.get(command, command.split('.')[1])}"
