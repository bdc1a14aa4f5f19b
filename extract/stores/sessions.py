"""Which mirrors a command has open: those of all places that its config names, and those that are asked for later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from extract import whole
from extract.config import Section
from extract.places import root, url_of
from extract.stores.client import StoreError, entry_of, listing
from extract.stores.lease import leased
from extract.stores.mirror import Mirror

NOT_BROUGHT = ("slides.folder", "slide", "out")
"""Keys whose places are not fetched as a whole: slides come one by one, `out` is opened to be written."""

_open: dict[Path, Mirror] = {}
_lock = threading.RLock()


@contextmanager
def stores_of(
    config: Section | None = None,
    *,
    out: Path | None = None,
    also: tuple[Path, ...] = (),
    wanted: Callable[[str], bool] = lambda name: True,
    shared: bool = False,
) -> Iterator[None]:
    """Have everything that the config names in object stores here, and put what is written into `out` there.

    Within another one of the same process it changes nothing that is open already.

    Args:
        out: the folder that the command writes; it need not be in a store.
        also: further places that are read.
        wanted: which objects of `out` are fetched, by name; the others are only listed.
        shared: several machines may write into `out` at once.

    Raises:
        StoreError: a store cannot be reached, or refuses.
        LockError: another machine writes into `out`.
    """
    url = url_of(out) if out is not None and mirror_of(out) is None else None
    with leased(url, shared=shared) if url else nullcontext(), _mirrored(config, out, also, wanted):
        yield


@contextmanager
def _mirrored(
    config: Section | None, out: Path | None, also: tuple[Path, ...], wanted: Callable[[str], bool]
) -> Iterator[None]:
    mine: list[Mirror] = []
    before = set(_open)
    try:
        if out is not None and url_of(out) and mirror_of(out) is None:
            mine.append(_opened(Mirror(out, written=True, wanted=wanted)))
        for place in [*places_in(config), *also]:
            bring(place)
        try:
            yield
        except StoreError:
            raise
        except BaseException:
            for mirror in mine:
                _finish_quietly(mirror)
            raise
        for mirror in mine:
            mirror.finish()
    finally:
        with _lock:  # the next command of this process looks anew
            for place in _open.keys() - before:
                del _open[place]


def _finish_quietly(mirror: Mirror) -> None:
    """After an error or Ctrl-C, whose message matters more."""
    try:
        mirror.finish()
    except StoreError:
        return


def _opened(mirror: Mirror) -> Mirror:
    return _watched(mirror.open())


def _watched(mirror: Mirror) -> Mirror:
    with _lock:
        if _put_there not in whole.FOLLOWERS:
            whole.FOLLOWERS.append(_put_there)
        return _open.setdefault(mirror.place, mirror)


def mirror_of(path: Path) -> Mirror | None:
    """The innermost open mirror that a path lies in."""
    with _lock:
        return next((_open[place] for place in (path, *path.parents) if place in _open), None)


def bring(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The path, its content fetched where it is a place in a store that is not here yet. Absent ones stay absent.

    wanted: which files below it are fetched, by name.
    """
    if url_of(path) and mirror_of(path) is None:
        _opened(Mirror(path, wanted=wanted))
    return path


def write_here(folder: Path) -> Path:
    """Put what is written below the folder into its store, if it is in one; nothing is fetched, or listed.

    For a process that has a share of another one's work.
    """
    if url_of(folder) and mirror_of(folder) is None:
        _watched(Mirror(folder))
    return folder


@contextmanager
def share_of(out: Path) -> Iterator[None]:
    """For a process that has a share of another one's work in `out`, for as long: what it writes there is put into the
    store, and what it takes over or writes and then removes is removed there; nothing else is fetched, or listed."""
    if url_of(out) is None or mirror_of(out) is not None:
        yield
        return
    mirror = _watched(Mirror(out, written=True))
    try:
        yield
        mirror.forget_removed()
    finally:
        with _lock:
            _open.pop(out, None)


def take_over(folder: Path) -> None:
    """Have here what other processes put below a folder of an open mirror; what of it is removed here from now on is
    removed in the store."""
    mirror, url = mirror_of(folder), url_of(folder)
    if mirror is not None and url is not None:
        below = folder.relative_to(mirror.place).as_posix()
        mirror.take_over({f"{below}/{name}": entry for name, entry in listing(url).items() if name})


def send(folder: Path) -> None:
    """Put files below a folder of an open mirror that others than `extract.whole` wrote into the store."""
    mirror = mirror_of(folder) if url_of(folder) else None
    if mirror is not None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            mirror.send(path)


def bring_one(path: Path) -> None:
    """Fetch one file of an open mirror that was not there, or not known to be, when the mirror was opened."""
    mirror, url = mirror_of(path), url_of(path)
    entry = entry_of(url) if url else None
    if mirror is not None and entry is not None and not path.exists():
        name = path.relative_to(mirror.place).as_posix()
        mirror.known[name] = entry
        mirror.fetch(name)


def bring_some(paths: Sequence[Path], n: int) -> None:
    """Fetch at most `n` of the files that an open mirror only lists, evenly chosen."""
    absent = [path for path in paths if url_of(path) and not path.exists()]
    chosen = {absent[i * len(absent) // n]: None for i in range(n)} if absent else {}
    for path in chosen:
        mirror = mirror_of(path)
        if mirror is not None:
            mirror.fetch(path.relative_to(mirror.place).as_posix())


def _put_there(path: Path) -> None:
    """Called with every file that has been written whole."""
    if path.is_absolute() and path.is_relative_to(root()) and (mirror := mirror_of(path)) is not None:
        mirror.publish(path)


def places_in(config: Section | None) -> list[Path]:
    """The places in stores that a config names, those of NOT_BROUGHT left out."""
    return [] if config is None else list(dict.fromkeys(_places(config, "")))


def _places(value: Any, key: str) -> Iterator[Path]:
    if isinstance(value, Section):
        for name, inner in value:
            yield from _places(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _places(inner, key)
    elif isinstance(value, str | Path) and url_of(value) and key not in NOT_BROUGHT:
        yield Path(value)
