"""Extraction as a service: slides are handed in one by one, from any thread, and each gives one outcome.

What a worker of a cluster does for as long as it lives. It is the loop of `extract.extraction.work` with its readers
and its encoder; tiles of all slides that are in hand fill batches together. Nothing is claimed, and `failed.csv` is
not written: who hands out the slides knows about all of them.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from extract.config import ExtractConfig
from extract.encoders.frozen import load_encoder
from extract.encoders.table import EncoderError
from extract.extraction.batches import Batches, Work
from extract.extraction.claims import Nobodys
from extract.extraction.readers import Failure, SlideFile, start_readers
from extract.extraction.summary import Summary
from extract.extraction.todo import settings_of
from extract.extraction.work import Extraction, OutputError, n_workers, output_error, reader_settings
from extract.features.cache import SUFFIX, read_header
from extract.stores.sessions import write_here

DONE, EMPTY, FAILED, STOPPED = "done", "empty", "failed", "stopped"


@dataclass(frozen=True)
class Order:
    """A slide to extract. `before`: the file that was there then (`identity`), which is to be replaced."""

    file: SlideFile
    before: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a slide: done, empty or failed; stopped: nothing can be extracted here, and `reason` says why.

    `said` goes to the terminal; `busy` is the fraction of its time in which this worker's encoder has worked so far.
    """

    slide: str
    what: str
    tiles: int = 0
    stage: str = ""
    reason: str = ""
    said: str = ""
    busy: float = 0.0


@dataclass
class InHand(Nobodys):
    """The slides that were handed in; what is given back is settled."""

    service: Service
    waiting: dict[str, Future[Outcome]] = field(default_factory=dict)

    def release(self, slide: str) -> None:
        waiting = self.waiting.pop(slide, None)
        if waiting is not None:
            waiting.set_result(self.service.outcome(slide))


class Service(Extraction):
    """The loop over slides as they come, in a thread of its own.

    Raises (constructor):
        EncoderError, ReaderError: encoder or readers cannot be had.
    """

    def __init__(self, config: ExtractConfig, wanted: dict[str, Any]):
        write_here(folder_of(config))
        encoder = load_encoder(config.encoder)
        refuse_other_settings(settings_of(config, encoder), wanted)
        readers = start_readers(reader_settings(config, encoder), n_workers(config), config.extract.prefetch)
        batches = Batches(encoder, config.extract.batch_size, padded=config.encoder.compile)
        self.inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self.hand = InHand(self)
        self.lines: list[str] = []
        self.tiles_of: dict[str, int] = {}
        self.failures: dict[str, Failure] = {}
        self.ends, self.stopped = False, ("", "")
        super().__init__(config, encoder, wanted, [], self.hand, readers, batches, Summary(), tqdm(disable=True))
        self.thread = threading.Thread(target=self.serve, name="extraction", daemon=True)
        self.thread.start()

    # --- for other threads

    def hand_in(self, order: Order) -> Future[Outcome]:
        """A slide; what is given back becomes what becomes of it."""
        waiting: Future[Outcome] = Future()
        self.hand.waiting[order.file.slide] = waiting
        self.inbox.put(order)
        if self.stopped[0]:
            self.give_back(*self.stopped)
        return waiting

    def close(self) -> None:
        """End the loop after the slides in hand, then readers and encoder."""
        self.inbox.put(None)
        self.thread.join()

    # --- the loop's own

    def serve(self) -> None:
        try:
            while not self.ends:
                self.accept(self.inbox.get())
                self.work_through()
        except OSError as error:
            self.give_back(OutputError.__name__, "; ".join(output_error(self.folder, error).problems))
        except Exception as error:  # noqa: BLE001 - it is said to everyone who waits, who would wait for ever
            self.give_back(type(error).__name__, f"{type(error).__name__}: {error}")
        finally:
            self.readers.close()
            self.staging.close()
            self.batches.close()
            self.writer.shutdown()

    def accept(self, order: Order | None) -> None:
        if order is None:
            self.ends = True
            return
        self.before[order.file.slide] = order.before
        self.todo.append(order.file)

    def next_slide(self) -> SlideFile | None:
        while not self.inbox.empty():
            self.accept(self.inbox.get())
        return super().next_slide()

    def write(self, work: Work) -> bool:
        self.tiles_of[work.file.slide] = int(work.good_N.sum())
        return super().write(work)

    def fail(self, failure: Failure) -> None:
        self.failures[failure.slide] = failure
        self.say(failure.said)

    def progress(self, work: Work, n_tiles: int) -> None:
        """Is shown where all workers are known."""

    def say(self, text: str) -> None:
        self.lines.append(text)

    def outcome(self, slide: str) -> Outcome:
        """What the loop has just noted of the slide that it gives back; nothing is kept of it here."""
        noted, said, self.lines = self.summary, "\n".join(self.lines), []
        self.counted.settled.discard(slide)
        found: dict[str, Any] = {"said": said, "busy": self.batches.busy_fraction}
        if failure := self.failures.pop(slide, None):
            return Outcome(slide, FAILED, stage=failure.stage, reason=failure.reason, **found)
        tiles, reason = self.tiles_of.pop(slide, 0), noted.empty.pop(slide, "")
        if noted.already_there:  # written by a worker that died before it could say so
            header = read_header(self.folder / f"{slide}{SUFFIX}")
            tiles, reason = header.n_tiles, header.provenance.empty_reason
        noted.done.clear()
        noted.already_there.clear()
        return Outcome(slide, EMPTY if reason else DONE, tiles, reason=reason, **found)

    def give_back(self, kind: str, why: str) -> None:
        """Nothing more can be extracted here: so it is said to everyone who waits. kind: of error, by its name."""
        self.stopped = (kind, why)
        for slide in list(self.hand.waiting):
            if waiting := self.hand.waiting.pop(slide, None):
                waiting.set_result(Outcome(slide, STOPPED, stage=kind, reason=why))


def folder_of(config: ExtractConfig) -> Path:
    assert config.features.folder is not None
    return config.features.folder


def refuse_other_settings(own: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise EncoderError where this worker would make other features than was asked for: other weights, mostly."""
    different = [f"{key} is {own.get(key)} here, {value} where the work is handed out" for key, value in wanted.items()]
    different = [text for text, (key, value) in zip(different, wanted.items(), strict=True) if own.get(key) != value]
    if different:
        raise EncoderError(f"this worker's encoder is another one: {'; '.join(different)}")
