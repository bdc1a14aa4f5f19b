"""Paths of this machine stay out of the files that people publish: environment.json and report.html.

A path is written as seen from the run folder. What predicting and drawing need in full is in paths.json, which is not
for publication; nor is config.yaml, with which a run is resumed. `report.paths=true` writes all paths in full.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract.places import in_words, with_urls
from extract.whole import write_whole

FILE = "paths.json"
ABOUT = "full paths on the machine that trained; not for publication. The folder works without this file"
PATH = re.compile(r"(?<![\w.~…:/<*])/[^\s'\"=,;:|<>\[\]{}()]+")
"""An absolute path within a text; neither a part of a relative one nor of an address."""


def published(text: str, folder: Path) -> str:
    """The text with absolute paths as seen from `folder`: `../cache/phikon`, `~/slides`, or the last part alone."""
    return PATH.sub(lambda found: _seen_from(folder, found[0]), in_words(text))


def _seen_from(folder: Path, path: str) -> str:
    base, home = os.path.realpath(folder), os.path.realpath(Path.home())
    full = os.path.normpath(path)
    here, common = _common(full, base), _common(full, home)
    if home != os.sep and common == home and _common(base, home) != home:
        return os.path.join("~", os.path.relpath(full, home))
    if here == os.sep:  # nothing in common: all its folders would be told
        return f"…/{os.path.basename(full)}"
    return os.path.relpath(full, base)


def _common(a: str, b: str) -> str:
    return os.path.commonpath([a, b])


def write_environment(folder: Path, environment: dict[str, Any], name: str, *, full: bool = False) -> None:
    """Write environment.json as it may be published, and paths.json with what was shortened.

    Args:
        full: write the paths in full instead, and no paths.json.
    """
    private: dict[str, str] = {}
    shown = with_urls(environment) if full else _shortened(environment, folder, "", private)
    files: list[tuple[str, Any]] = [(name, shown)]
    if private:
        files.append((FILE, {"about": ABOUT, "values": private}))
    for file, content in files:
        write_whole(folder / file, json.dumps(content, indent=2) + "\n")


def _shortened(value: Any, folder: Path, pointer: str, private: dict[str, str]) -> Any:
    """The value with all its texts published; `private` gets the full ones by their place (a JSON pointer)."""
    if isinstance(value, dict):
        return {key: _shortened(inner, folder, f"{pointer}/{key}", private) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner, folder, f"{pointer}/{i}", private) for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    value = in_words(value)  # what lies in an object store has an address, which is the same on every machine
    text = published(value, folder)
    if text != value:
        private[pointer] = value
    return text


def restored(environment: dict[str, Any], said: dict[str, Any]) -> list[str]:
    """Put the full paths of paths.json back into `environment`; what in it is of no use, in words."""
    values = said.get("values")
    if not isinstance(values, dict):
        return ["expected full paths by their place"]
    problems = []
    for pointer, text in values.items():
        place = _place(environment, pointer)
        if place is None or not isinstance(text, str):
            problems.append(f"{pointer!r:.60}: not a text of environment.json")
        else:
            holder, key = place
            holder[key] = text
    return problems


def _place(tree: Any, pointer: str) -> tuple[Any, Any] | None:
    """Where the pointer leads: the dictionary or list, and the key of a text in it; None if nowhere."""
    *parents, last = list(_steps(pointer))
    for step in parents:
        tree = _inside(tree, step)
    found = _inside(tree, last)
    if not isinstance(found, str):
        return None
    return (tree, last) if isinstance(tree, dict) else (tree, int(last))


def _steps(pointer: str) -> Iterator[str]:
    yield from pointer.split("/")[1:] or [""]


def _inside(tree: Any, step: str) -> Any:
    if isinstance(tree, dict):
        return tree.get(step)
    if isinstance(tree, list) and step.isascii() and step.isdigit() and int(step) < len(tree):
        return tree[int(step)]
    return None
