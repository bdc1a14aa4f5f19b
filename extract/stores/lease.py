"""Of two machines with the same `out` in a store, the second is told before it has done any work.

On one machine the operating system's lock does that (`extract.lock`). A store has no locks; here it is an object beside
`out`, `.NAME.lock`, which only one can create where the store writes conditionally (S3's `If-None-Match: *`). It is
written again every two minutes and deleted at the end; one that is ten minutes old was left by a process that was
killed, and is taken over. So what is promised is no more than that: of commands that begin at different times one is
refused; a machine that sleeps for longer than that may lose the place to another.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from extract.lock import LockError
from extract.stores import client
from extract.stores.client import Exists, StoreError
from extract.whole import write_whole

HEARTBEAT_S = 120.0
STALE_AFTER_S = 600.0


@contextmanager
def leased(url: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the place; a bucket as a whole has none beside it and is not held.

    Args:
        shared: several may write there. It is only seen that something can be written at all, before work begins.

    Raises:
        LockError: another machine writes there.
        StoreError: nothing can be written there.
    """
    above, _, name = url.rpartition("/")
    if above.endswith("/"):  # s3://bucket
        yield
        return
    lock, said = f"{above}/.{name}.lock", describe()
    if shared:
        probe = f"{above}/.{name}.{said['token']}.probe"
        _write(probe, said)
        client.delete(probe)
        yield
        return
    _take(lock, said, url)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, said, stop), name="lease", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        with suppress(StoreError):  # it is stale in ten minutes
            if _read(lock).get("token") == said["token"]:
                client.delete(lock)


def describe() -> dict[str, Any]:
    """Who this is, for the message of another one."""
    said = {"token": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname()}
    return said | {"since": time.strftime("%F %T"), "beat": time.time()}


def _take(lock: str, said: dict[str, Any], url: str) -> None:
    try:
        _write(lock, said, new=True)
    except Exists:
        holder = _read(lock)
        if not is_stale(holder):
            raise _refused(url, holder) from None
        client.delete(lock)
        try:
            _write(lock, said, new=True)
        except Exists:
            raise _refused(url, _read(lock)) from None
    holder = _read(lock)
    if holder.get("token") != said["token"]:  # a store that takes no notice of the condition
        raise _refused(url, holder)


def _refused(url: str, holder: dict[str, Any]) -> LockError:
    who = (
        f"process {holder.get('pid', '?')} on {holder.get('host', 'another machine')}, since {holder.get('since', '?')}"
    )
    return LockError("in use", [f"{url}: {who}, is writing there; wait for it, or set another out"])


def is_stale(holder: dict[str, Any]) -> bool:
    """Whether the holder is gone: a dead process of this machine, or one that has not been heard of for ten minutes."""
    here = holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int)
    if here and not psutil.pid_exists(holder["pid"]):
        return True
    beat = holder.get("beat")
    return not isinstance(beat, int | float) or abs(time.time() - beat) > STALE_AFTER_S


def _beat(lock: str, said: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            _write(lock, said | {"beat": time.time()})
        except StoreError as error:
            print(f"note: {error.problems[0]}: another machine may take this one for dead", file=sys.stderr)


def _write(url: str, said: dict[str, Any], *, new: bool = False) -> None:
    with tempfile.TemporaryDirectory(prefix="slide-mil-") as folder:
        file = Path(folder) / "lock"
        write_whole(file, json.dumps(said))
        client.put(file, url, new=new)


def _read(url: str) -> dict[str, Any]:
    """What the lock says; {} where it is gone, or says nothing that can be read."""
    try:
        content = json.loads(client.head(url, 4096))
    except (ValueError, client.Missing):
        return {}
    return content if isinstance(content, dict) else {}
