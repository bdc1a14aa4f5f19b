"""Passes of members where they run: one after the other, halved where memory does not hold them, or on several devices.

A pass is the unit of work: it does not know where it runs, and the result is the same. One process writes into the run
folder: passes on other devices run in processes of their own, a device each, and send what is to be written.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import multiprocessing

from extract.config import ConfigError, ProblemsError
from extract.finetuning.one_device import device_of
from extract.whole import write_whole
from extract.wording import count
from mil.config import Train
from mil.pipeline.data import Study
from mil.training.module import write_rows

Rows = dict[int, dict[str, float]]


class LostProcessError(ProblemsError):
    """A process that trained on another device is gone."""


@dataclass
class Hands:
    """How a pass writes: itself, or through another process. `live`: curves and progress bar while it trains."""

    write: Callable[[Path, bytes], object] = write_whole
    remove: Callable[[Path], object] = lambda path: path.unlink(missing_ok=True)
    curves: Callable[[Path | None, Rows, Callable[[], None]], object] = write_rows
    live: bool = True


@dataclass
class Most:
    """How many members a pass may have, as far as this command knows: fewer after memory did not hold them."""

    members: int = sys.maxsize
    told: list[str] = field(default_factory=list)

    def less(self, tried: int, error: Exception) -> None:
        """Half of what was tried, which is said once."""
        self.members = max(1, tried // 2)
        if not self.told:
            what = f"memory does not hold {count(tried, 'member')} in one pass; going on with {self.members} at a time"
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"note: {what} ({said})", file=sys.stderr)
        self.told.append(str(error))


Train1 = Callable[[np.ndarray, str], dict[str, Any]]
"""Trains members together, under a name for its checkpoints ("" for the whole pass)."""


def train_in_halves(train: Train1, members: np.ndarray, most: Most, part: str = "") -> dict[str, Any]:
    """One pass; where a GPU's memory does not hold it, its halves one after the other, joined.

    Raises:
        torch.OutOfMemoryError: it does not hold a single member.
    """
    if len(members) <= most.members:
        try:
            return train(members, part)
        except torch.OutOfMemoryError as error:
            if len(members) == 1:
                raise
            most.less(len(members), error)
        free_memory()  # outside of `except`, whose traceback holds the tensors of the step that failed
    middle = len(members) // 2
    halves = [("a", members[:middle]), ("b", members[middle:])]
    return joined_results([train_in_halves(train, half, most, part + letter) for letter, half in halves])


def free_memory() -> None:
    """What the step that failed still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def joined_results(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result of a pass from those of its parts, whose members follow each other."""
    joined: dict[str, Any] = {}
    for key, first in results[0].items():
        each = [result[key] for result in results]
        if isinstance(first, dict):
            joined[key] = {name: torch.cat([state[name] for state in each]) for name in first}
        else:
            joined[key] = torch.cat(each) if isinstance(first, torch.Tensor) else [x for one in each for x in one]
    joined["history"] = sorted(joined["history"], key=lambda row: row["epoch"])
    return joined


# --- several devices -------------------------------------------------------------------------------------------------

Work = Callable[[Study, str, Path, int, np.ndarray, bool, Hands], dict[str, Any]]
"""One pass: study, aggregator, run folder, number of the pass, members, inner, how it writes."""


def n_devices(settings: Train) -> int:
    """How many devices train, each its own passes.

    Raises:
        ConfigError: more than there are.
    """
    device = device_of(settings.accelerator)
    here = torch.cuda.device_count() if device.type == "cuda" else 1
    if settings.devices == "auto":
        return here
    if settings.devices > here and device.type != "cpu":  # on a CPU so many processes are as many devices
        problem = f"train.devices={settings.devices}: {count(here, 'device')} of kind {device.type} here"
        raise ConfigError("not so many devices", [f"{problem}; use train.devices=auto"])
    return settings.devices


def run_passes(
    work: Work, study: Study, name: str, folder: Path, parts: Sequence[np.ndarray], inner: bool = False
) -> list[dict[str, Any]]:
    """The results of all passes, in their order, on as many devices as the config says."""
    n = min(n_devices(study.config.train), len(parts))
    if n < 2:
        return [work(study, name, folder, i, part, inner, Hands()) for i, part in enumerate(parts)]
    for i in range(len(parts)):  # Lightning makes them where it checkpoints; here one process makes folders
        (folder / "checkpoints" / f"pass{i}").mkdir(parents=True, exist_ok=True)
    return Shared(work, study, name, folder, list(parts), inner, n).run()


class Shared:
    """Passes that several processes take one after the other. This one writes what they send."""

    def __init__(self, work: Work, study: Study, name: str, folder: Path, parts: list[np.ndarray], inner: bool, n: int):
        self.study, self.parts, self.todo = study, parts, deque(range(len(parts)))
        self.results: dict[int, dict[str, Any]] = {}
        self.at: dict[int, int] = {}  # process -> the pass that it is at
        context = multiprocessing.get_context("spawn")
        self.processes, self.connections = [], []
        given = (work, replace(study, once={}), name, folder, parts, inner, torch.get_num_threads())
        for device in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, *given), daemon=True)
            with one_gpu(device):
                process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def run(self) -> list[dict[str, Any]]:
        try:
            while len(self.results) < len(self.parts):
                for connection in wait(self.connections):
                    assert isinstance(connection, Connection)
                    self.receive(self.connections.index(connection), connection)
            return [self.results[i] for i in range(len(self.parts))]
        finally:
            for process in self.processes:
                process.terminate()
            for process in self.processes:
                process.join()

    def receive(self, number: int, connection: Connection) -> None:
        try:
            kind, *said = connection.recv()
        except (EOFError, ConnectionResetError):
            self.lost(number)
        if kind == "next":
            self.at[number] = self.todo.popleft() if self.todo else -1
            connection.send(self.at[number])
        elif kind == "result":
            self.results[said[0]] = said[1]
        elif kind == "write":
            self.study.check_place()
            write_whole(*said)
        elif kind == "remove":
            Path(said[0]).unlink(missing_ok=True)
        elif kind == "curves":
            write_rows(said[0], said[1], self.study.check_place)
        else:
            error, where = said
            print(where, file=sys.stderr) if not isinstance(error, ProblemsError | torch.OutOfMemoryError) else None
            raise error

    def lost(self, number: int) -> None:
        process = self.processes[number]
        process.join()
        what = f"the process of device {number} ended ({exit_words(process.exitcode)})"
        during = f" while it trained pass {self.at[number]}" if self.at.get(number, -1) >= 0 else ""
        kept = "Finished passes and epochs are kept; resume=true goes on"
        raise LostProcessError("stopped", [f"{what}{during}. {kept}"])


def exit_words(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}" + (", as when memory runs out" if code == -9 else "")
    return f"exit code {code}"


@contextmanager
def one_gpu(number: int) -> Iterator[None]:
    """Processes started inside see one of the GPUs that this one sees."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [name.strip() for name in (before or "").split(",") if name.strip()]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[number] if number < len(seen) else str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def serve(
    connection: Connection,
    work: Work,
    study: Study,
    name: str,
    folder: Path,
    parts: list[np.ndarray],
    inner: bool,
    threads: int,
) -> None:
    """A process of one device: takes passes until there are none, and sends what they make."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that writes ends the others
    torch.set_num_threads(threads)  # so that sums are cut as in one process
    hands = Hands(
        lambda path, content: connection.send(("write", path, bytes(content))),
        lambda path: connection.send(("remove", path)),
        lambda logs, rows, before: connection.send(("curves", logs, rows)),
        live=False,
    )
    try:
        while True:
            connection.send(("next",))
            if (index := connection.recv()) < 0:
                connection.recv()  # until the connection ends
            connection.send(("result", index, work(study, name, folder, index, parts[index], inner, hands)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody is there who would write
    except Exception as error:  # noqa: BLE001 - it is raised where the study runs
        connection.send(("failed", error, traceback.format_exc()))
