"""Several devices of one machine: a process each, which share the slides out by their claims.

As if the command had been started once a device by hand; one of them is watched over, though: what a process that died
had in hand is given to another, and all end when the command does. The readers' cores are shared out evenly.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from extract.config import ExtractConfig, ProblemsError
from extract.encoders.frozen import load_encoder
from extract.encoders.table import EncoderError
from extract.ending import sigterm_is_ctrl_c
from extract.extraction.claims import Claims
from extract.extraction.readers import ReaderError, SlideFile, without_main_module
from extract.extraction.summary import Summary, record_failures, tidy_up_after_the_dead
from extract.extraction.work import Asked, OutputError, extract_share, n_workers, output_error
from extract.features.cache import SUFFIX
from extract.wording import count

LOOK_S = 0.5


def devices_of(config: ExtractConfig) -> list[str]:
    """The devices that `run.devices` names; auto: all GPUs, or the one that encoder.device names."""
    if config.run.devices != "auto":
        return list(config.run.devices)
    if config.encoder.device != "auto":
        return [config.encoder.device]
    import torch

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{i}" for i in range(n)] if n > 1 else ["auto"]


def on_device(config: ExtractConfig, device: str) -> ExtractConfig:
    """The config with its encoder there."""
    return config.model_copy(update={"encoder": config.encoder.model_copy(update={"device": device})})


@dataclass
class Process:
    """One device's process, and what it says when it ends: a summary, or the error that it met."""

    device: str
    process: Any
    connection: Connection
    said: Any = None

    def listen(self) -> None:
        with suppress(EOFError, OSError):
            if self.said is None and self.connection.poll():
                self.said = self.connection.recv()


def extract_on_devices(
    config: ExtractConfig, asked: Asked, devices: Sequence[str], *, progress: bool, wait_for_others: bool
) -> Summary:
    """`extract_cohort` by a process a device; `asked`: what is to do.

    Raises:
        OutputError, EncoderError, ReaderError: what a process met; the others are stopped.
    """
    summary, began = asked.summary(), time.monotonic()
    with Claims(asked.folder) as claims:
        tidy_up_after_the_dead(asked.folder, claims, asked.there)
    left, turns = list(asked.todo), 0
    while left and turns <= len(devices):
        ended = one_turn(config, asked, devices, left, progress, wait_for_others)
        merge(summary, [process.said for process in ended if process.said is not None])
        settled = {*summary.done, *summary.already_there, *summary.empty, *(f.slide for f in summary.failed)}
        left, turns = [file for file in left if file.slide not in settled], turns + 1
        if all(process.said is not None for process in ended):
            break  # nobody died: what is left is in the hands of other commands
    summary.elsewhere = [file.slide for file in left]
    summary.seconds = time.monotonic() - began
    try:
        with Claims(asked.folder) as claims:
            record_failures(asked.folder, claims, summary)
    except OSError as error:
        raise output_error(asked.folder, error) from error
    return summary


def one_turn(
    config: ExtractConfig,
    asked: Asked,
    devices: Sequence[str],
    todo: Sequence[SlideFile],
    progress: bool,
    wait_for_others: bool,
) -> list[Process]:
    """A process a device, each beginning at another place of the list, until all have ended."""
    print(f"{count(len(devices), 'device')}: {', '.join(devices)}")
    readers = max(1, n_workers(config) // len(devices)) if n_workers(config) else 0
    config = config.model_copy(update={"extract": config.extract.model_copy(update={"workers": readers})})
    running = []
    for i, device in enumerate(devices):
        first = i * len(todo) // len(devices)
        share = [*todo[first:], *todo[:first]]
        running.append(start(device, (on_device(config, device), asked.wanted, share, wait_for_others)))
    try:
        watch(running, asked, todo, progress)
    finally:
        for one in running:
            one.connection.close()  # which ends it
        for one in running:
            one.process.join()
    for one in running:
        if isinstance(one.said, Exception):
            raise one.said
    return running


def start(device: str, given: tuple[Any, ...]) -> Process:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, *given), name=f"extraction on {device}")
    with without_main_module():
        process.start()
    theirs.close()
    return Process(device, process, ours)


def watch(running: Sequence[Process], asked: Asked, todo: Sequence[SlideFile], progress: bool) -> None:
    """Until all have ended, or one has met an error that ends them all; the bar counts files."""
    names, before = {f"{file.slide}{SUFFIX}" for file in todo}, len(asked.there)
    there = {name for name in names if (asked.folder / name).exists()}
    with tqdm(total=len(todo) + before, initial=before, disable=not progress, unit="slide") as bar:
        while any(one.process.is_alive() for one in running):
            time.sleep(LOOK_S)
            for one in running:
                one.listen()
            if any(isinstance(one.said, Exception) for one in running):
                return
            found = names & set(os.listdir(asked.folder)) if asked.folder.exists() else set()
            if found - there:
                bar.update(len(found - there))
            there |= found
        for one in running:
            one.listen()


def merge(into: Summary, parts: Sequence[Summary]) -> None:
    """What several processes did; each slide is that of who did it, whoever else found it there."""
    for part in parts:
        into.done += part.done
        into.empty |= part.empty
        into.failed += [f for f in part.failed if f.slide not in {known.slide for known in into.failed}]
        into.tiles += part.tiles
    made = {*into.done, *into.empty, *into.already_there}
    for part in parts:
        into.already_there += [slide for slide in dict.fromkeys(part.already_there) if slide not in made]
        made |= set(part.already_there)
    into.encoder_busy = sum(part.encoder_busy for part in parts) / max(1, len(parts))


def _serve(
    connection: Connection, config: ExtractConfig, wanted: dict[str, Any], todo: list[SlideFile], wait_for_others: bool
) -> None:
    """The life of a device's process."""
    said: Any = None
    try:
        with sigterm_is_ctrl_c():
            threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
            encoder = load_encoder(config.encoder)
            said = extract_share(config, encoder, wanted, todo, wait_for_others=wait_for_others)
    except (EncoderError, ReaderError, ProblemsError, OutputError) as error:
        said = error
    except KeyboardInterrupt:
        return
    with suppress(BrokenPipeError, OSError):
        connection.send(said)


def _end_with(connection: Connection) -> None:
    """Ctrl-C in this process when the command that started it is gone, or closes its end."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
