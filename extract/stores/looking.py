"""Files and folders that may lie in a store, looked at without fetching them. Other paths are the file system's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from extract.places import url_of
from extract.stores import client
from extract.stores.client import Entry
from extract.stores.mirror import is_hidden
from extract.stores.sessions import mirror_of


@lru_cache(maxsize=4096)
def _objects(url: str) -> dict[str, Entry]:
    return {name: entry for name, entry in client.listing(url).items() if not is_hidden(name)}


def forget() -> None:
    """Ask the stores again."""
    _objects.cache_clear()
    _head.cache_clear()
    _listed.clear()


def objects_below(folder: Path) -> dict[str, Entry]:
    """What lies below a folder of a store: name -> entry. Asked once a process and folder."""
    url = url_of(folder)
    return _objects(url) if url else {}


def is_dir(path: Path) -> bool:
    if not url_of(path) or path.is_dir():
        return path.is_dir()
    return any(objects_below(path)) and "" not in objects_below(path)


def is_file(path: Path) -> bool:
    """Of a place in a store: whether its folder's listing has it."""
    if not url_of(path) or path.is_file():
        return path.is_file()
    folder = _listed_above(path)
    return path.relative_to(folder).as_posix() in objects_below(folder)


def exists(path: Path) -> bool:
    return path.exists() or is_file(path) or (bool(url_of(path)) and is_dir(path))


def is_written(path: Path) -> bool:
    """Whether a file is here, or was in the store when the mirror that it belongs to was opened, or is there now."""
    if path.exists():
        return True
    mirror = mirror_of(path) if url_of(path) else None
    return mirror is not None and path.relative_to(mirror.place).as_posix() in mirror.known


def is_written_now(path: Path) -> bool:
    """The same, with the store asked anew: another machine may have put it there meanwhile."""
    url = url_of(path)
    return is_written(path) or (url is not None and mirror_of(path) is not None and client.entry_of(url) is not None)


def head(path: Path, n_bytes: int) -> bytes:
    """The first bytes of a file or an object."""
    url = url_of(path)
    if url and not path.exists():
        return _head(url, n_bytes)
    with open(path, "rb") as handle:
        return handle.read(n_bytes)


@lru_cache(maxsize=1000)
def _head(url: str, n_bytes: int) -> bytes:
    return client.head(url, n_bytes)


def size_of(path: Path) -> int:
    """Bytes of a file or an object; 0 for an object that is not there."""
    if path.exists() or not url_of(path):
        return path.stat().st_size
    folder = _listed_above(path)
    found = objects_below(folder).get(path.relative_to(folder).as_posix())
    return found.size if found else 0


def files_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """The files of a folder, with `deep` those of its sub-folders too."""
    if not url_of(folder):
        return [path for path in (folder.rglob("*") if deep else folder.iterdir()) if path.is_file()]
    above = _listed_above(folder / "x")
    inside = (above / name for name in objects_below(above))
    return [path for path in inside if path.parent == folder or (deep and path.is_relative_to(folder))]


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, which follows links; of a store its listing."""
    if not url_of(folder):
        yield from os.walk(folder, followlinks=True)
        return
    tree: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}
    for name in sorted(objects_below(folder)):
        *parents, file = name.split("/")
        for i, parent in enumerate(parents):
            tree.setdefault("/".join(parents[:i]), (set(), []))[0].add(parent)
        tree.setdefault("/".join(parents), (set(), []))[1].append(file)
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        folders, files = sorted(tree[inner][0]), tree[inner][1]
        yield str(folder / inner), folders, files
        waiting += [f"{inner}/{one}" if inner else one for one in reversed(folders)]


_listed: set[Path] = set()


def listed(folder: Path) -> Path:
    """Say that a folder of a store is looked at as a whole, so that single files in it need no listing of their own."""
    if url_of(folder):
        _listed.add(folder)
    return folder


def _listed_above(path: Path) -> Path:
    return next((one for one in path.parents if one in _listed), path.parent)
