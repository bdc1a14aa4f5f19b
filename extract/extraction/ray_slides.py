"""Extraction on a cluster: Ray Data over the table of slides, with a pool of actors that each run `Service`.

A row of the table is a slide, and a block of Ray's is one row: so Ray's retries cost the slides that a dead actor had
in hand and no other. (Where slides are so small that handing them out would take longer than reading them, a block has
several.) An actor takes several blocks at a time, on threads that hand them to its one loop, which fills batches across
them; a call that worked through a batch of slides by itself would run dry at the end of each.

Ray's own checkpoints by row id (`ray.data.checkpoint`, beta in 2.60) are not used: they are only for pipelines from a
`read_*` to a `write_*` of Ray's, and an id in them says nothing of the file itself. What is missing is computed from
the cache, where each file says what it was made of; so weights, a tile size or a slide that have changed are noticed.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tqdm import tqdm

from extract.config import ExtractConfig, to_yaml
from extract.encoders.table import EncoderError
from extract.extraction.claims import Nobodys
from extract.extraction.cluster import ClusterError, Pool, connected, quiet_ray, refuse_unlike, stand_in, usable_pool
from extract.extraction.readers import Failure, ReaderError, SlideFile
from extract.extraction.served import EMPTY, FAILED, STOPPED, Order, Outcome, Service
from extract.extraction.summary import Summary, record_failures, remove_leftovers
from extract.extraction.tile_pictures import forget
from extract.extraction.work import MAX_WORKERS, OutputError, identity
from extract.features.cache import SUFFIX
from extract.places import shown as address
from extract.places import with_places
from extract.slides.files import SEVERAL_FILES
from extract.stores.sessions import bring

AT_ONCE = 6
"""Slides that an actor has in hand: one or two that are read, one that is planned, some that wait for their last
batch or for their file. More would only be lost with it."""
TRIES = 5
"""So often is a slide begun by actors that die with it in hand; then it is taken for the reason."""
SHOWN_NODES = 6
SMALL_BYTES = 2**24
"""Slides that have no more than this together may go out in one block, at most MOST_SMALL of them. Ray takes some 20 ms
of processors for a block."""
MOST_SMALL = 32


class Tries:
    """How often each slide was begun: an actor on the node of the command, which outlives those that extract."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()

    def begin(self, slides: Sequence[str]) -> list[int]:
        self.begun.update(slides)
        return [self.begun[slide] for slide in slides]


class Worker:
    """What an actor of Ray Data calls with its rows, several at a time."""

    def __init__(self, config_yaml: str, wanted: dict[str, Any], place: str, tries: Any):
        import ray

        stand_in(place)
        config = ExtractConfig.model_validate(yaml.safe_load(config_yaml))  # with this node's places of stores
        self.node = f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:6]})"
        self.tries, self.again = tries, threading.Lock()
        self.service: Service | None = None
        self.stopped = ("", "")
        try:
            self.service = Service(config, wanted)
        except Exception as error:  # noqa: BLE001 - the driver says it, as one message; Ray would try for ever
            self.stopped = (type(error).__name__, str(error))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Columns of a block's rows, of `row_of` in, of `told` out."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        said = [told(outcome, self.node) for outcome in self.extract([order_of(row) for row in rows])]
        return {name: [one[name] for one in said] for name in said[0]}

    def extract(self, orders: Sequence[Order]) -> list[Outcome]:
        """All of a block together, but for those that an actor has died with."""
        import ray

        slides = [order.file.slide for order in orders]
        if self.service is None:
            return [Outcome(slide, STOPPED, stage=self.stopped[0], reason=self.stopped[1]) for slide in slides]
        new = [times == 1 for times in ray.get(self.tries.begin.remote(slides))]
        waiting = {order.file.slide: self.service.hand_in(order) for order in compress(orders, new)}
        return [
            waiting[order.file.slide].result() if first else self.once_more(self.service, order)
            for order, first in zip(orders, new, strict=True)
        ]

    def once_more(self, service: Service, order: Order) -> Outcome:
        """A slide that an actor died with is done after others of its kind, alone: so it is known which is why."""
        import ray

        slide = order.file.slide
        with self.again:
            (times,) = ray.get(self.tries.begin.remote([slide]))
            if times <= 2 * TRIES:  # (counted twice a time: here, and above)
                return service.hand_in(order).result()
        reason = f"{address(order.file.path)}: its worker died {TRIES} times: memory ran out, or a library crashed"
        failure = Failure(slide, "worker", reason)
        return Outcome(slide, FAILED, stage=failure.stage, reason=reason, said=failure.said)


def row_of(order: Order) -> dict[str, Any]:
    """An order as a row of plain columns; "" and NaN for what there is not. What lies in a store has its address: other
    nodes have other places for it."""
    file, before = order.file, order.before or (-1, -1)
    paths = {name: address(getattr(file, name) or "") for name in ("path", "regions", "coords")}
    mpp = math.nan if file.mpp is None else file.mpp
    return {"slide": file.slide, **paths, "mpp": mpp, "inode": before[0], "mtime_ns": before[1]}


def order_of(row: dict[str, Any]) -> Order:
    """The inverse of `row_of`."""
    paths = {name: bring(Path(with_places(row[name]))) if row[name] else None for name in ("regions", "coords")}
    mpp = None if math.isnan(row["mpp"]) else float(row["mpp"])
    before = (int(row["inode"]), int(row["mtime_ns"]))
    return Order(
        SlideFile(str(row["slide"]), Path(with_places(row["path"])), mpp, **paths), None if before[1] < 0 else before
    )


def told(outcome: Outcome, node: str) -> dict[str, Any]:
    """An outcome as a row of plain columns."""
    return {**vars(outcome), "node": node, "worker": f"{node} {os.getpid()}"}


def extract_on_ray(
    config: ExtractConfig, wanted: dict[str, Any], todo: Sequence[SlideFile], summary: Summary, progress: bool
) -> None:
    """Have the slides extracted by the cluster that `config.run` names; `summary` says what became of them.

    Raises:
        ClusterError: there is no such cluster, or its nodes are not alike.
        OutputError: the folder cannot be written to. EncoderError: a worker cannot have its encoder.
    """
    folder = config.features.folder
    assert folder is not None
    began = time.monotonic()
    try:
        with connected(config.run) as every:
            nodes = refuse_unlike(every, folder, [file.path for file in (todo[0], todo[-1])])
            pool = usable_pool(nodes, config.run.cpus, gpu=config.encoder.device != "cpu")
            print(f"ray: {len(nodes)} nodes, {pool}")
            with shown(summary, folder, len(todo), progress) as news:
                for row in rows_done(config, wanted, todo, pool):
                    news.take(row)
    finally:
        for file in todo:  # of workers that were stopped while they wrote
            remove_leftovers(folder, file.slide, f"{file.slide}{SUFFIX}")
        for failure in summary.failed if config.tiles.save != "none" else ():
            forget(folder, failure.slide)
        summary.seconds = time.monotonic() - began


def rows_done(
    config: ExtractConfig, wanted: dict[str, Any], todo: Sequence[SlideFile], pool: Pool
) -> Iterator[dict[str, Any]]:
    """One row a slide, as they are done. Ray Data runs in the process that asks it, which must be of the cluster: with
    an address of ray:// this one is not, and an actor there does."""
    import ray
    from ray.util.client import ray as client

    folder = config.features.folder
    assert folder is not None
    blocks = [
        [row_of(Order(file, identity(folder / f"{file.slide}{SUFFIX}"))) for file in block]
        for block in in_blocks(todo, pool.workers)
    ]
    given = (to_yaml(for_worker(config, pool)), wanted, blocks, pool, os.getcwd())
    if not client.is_connected():
        yield from rows_here(*given)
        return
    there: Any = ray.remote(Elsewhere).options(num_cpus=0).remote(*given)
    while (row := ray.get(there.next.remote())) is not None:
        yield row


class Elsewhere:
    """`rows_here`, in an actor."""

    def __init__(self, *given: Any):
        self.rows = rows_here(*given)

    def next(self) -> dict[str, Any] | None:
        return next(self.rows, None)


def in_blocks(todo: Sequence[SlideFile], workers: int) -> list[list[SlideFile]]:
    """The slides, cut where a block is full. Small blocks leave every worker several times as many as it takes."""
    most, room = min(MOST_SMALL, len(todo) // (2 * AT_ONCE * workers)), 0
    blocks: list[list[SlideFile]] = []
    for file in todo:
        size = bytes_of(file)
        if not blocks or size > room or len(blocks[-1]) >= most:
            blocks.append([])
            room = SMALL_BYTES
        blocks[-1].append(file)
        room -= size
    return blocks


def bytes_of(file: SlideFile) -> int:
    """Of a slide that is one file, to be had here; of others more than goes with any other."""
    path = file.path
    if path.suffix.lower() in SEVERAL_FILES or not path.is_file():
        return SMALL_BYTES + 1
    return path.stat().st_size


def rows_here(
    config_yaml: str, wanted: dict[str, Any], blocks: list[list[dict[str, Any]]], pool: Pool, place: str
) -> Iterator[dict[str, Any]]:
    """Ray Data over blocks of rows of `row_of`, in a process of the cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    be_quiet()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    tries = (
        ray.remote(Tries).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here).remote()
    )
    with quiet_ray():
        slides = ray.data.from_pandas([pd.DataFrame(rows) for rows in blocks])
        done = slides.map_batches(
            Worker,
            fn_constructor_args=(config_yaml, wanted, place, tries),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=pool.workers,
                initial_size=min(pool.workers, len(blocks)),
                max_tasks_in_flight_per_actor=AT_ONCE,
                max_concurrent_calls_per_actor=AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
        for batch in done.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            columns = {str(name): column.tolist() for name, column in batch.items()}
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


def be_quiet() -> None:
    """Ray Data's bars and logs: the command has its own."""
    import ray

    with quiet_ray():
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def for_worker(config: ExtractConfig, pool: Pool) -> ExtractConfig:
    """The config as an actor reads it: its readers fill its CPUs, its GPU is the only one that it sees."""
    readers = min(MAX_WORKERS, max(1, pool.cpus - 1)) if config.extract.workers is None else config.extract.workers
    device = "cuda" if config.encoder.device.startswith("cuda:") else config.encoder.device
    update = {"extract": config.extract.model_copy(update={"workers": readers})}
    return config.model_copy(
        update=update | {"encoder": config.encoder.model_copy(update={"device": device if pool.gpus else "cpu"})}
    )


class News:
    """What workers say of slides, for the summary and for the bar, by node."""

    def __init__(self, summary: Summary, folder: Path, bar: tqdm[Any]):
        self.summary, self.folder, self.bar, self.began = summary, folder, bar, time.monotonic()
        self.settled: set[str] = set()
        self.tiles: dict[str, int] = {}  # by node
        self.slides: dict[str, int] = {}
        self.busy: dict[str, float] = {}  # by worker

    def take(self, row: dict[str, Any]) -> None:
        """One slide is settled.

        Raises:
            OutputError, ClusterError: it says that nothing more can be extracted.
        """
        slide, what = row["slide"], row["what"]
        if what == STOPPED:
            raise stopped(row["stage"], row["reason"], row["node"])
        if slide in self.settled:
            return
        self.settled.add(slide)
        self.busy[row["worker"]] = row["busy"]
        self.tiles[row["node"]] = self.tiles.get(row["node"], 0) + row["tiles"]
        self.slides[row["node"]] = self.slides.get(row["node"], 0) + 1
        self.summary.tiles += row["tiles"]
        if row["said"]:
            self.bar.write(row["said"], file=sys.stderr)
        if what == FAILED:
            self.note(Failure(slide, row["stage"], row["reason"]))
        elif what == EMPTY:
            self.summary.empty[slide] = row["reason"]
        else:
            self.summary.done.append(slide)
        self.show()

    def note(self, failure: Failure) -> None:
        self.summary.failed.append(failure)
        record_failures(self.folder, Nobodys(), self.summary)

    def show(self) -> None:
        seconds = max(1e-9, time.monotonic() - self.began)
        rates = [f"{node.partition(' ')[0]} {n / seconds:.0f}" for node, n in list(self.tiles.items())[:SHOWN_NODES]]
        each = f" ({', '.join(rates)})" if len(self.tiles) > 1 else ""
        self.bar.set_postfix_str(f"{self.summary.tiles / seconds:.0f} tiles/s{each}", refresh=False)
        self.bar.update(1)

    def by_node(self) -> list[str]:
        """A line a node: slides, tiles, tiles per second."""
        seconds = max(1e-9, time.monotonic() - self.began)
        return [
            f"  node {node}: {self.slides[node]:,} slides, {n:,} tiles, {n / seconds:.0f} tiles/s"
            for node, n in sorted(self.tiles.items())
        ]


@contextmanager
def shown(summary: Summary, folder: Path, total: int, progress: bool) -> Iterator[News]:
    """A bar of slides for what workers say; after it a line a node."""
    before = len(summary.already_there)
    with tqdm(
        total=total + before,
        initial=before,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        bar_format="{percentage:3.0f}%|{bar}| {n}/{total} slides, {elapsed}<{remaining}{postfix}",
    ) as bar:
        news = News(summary, folder, bar)
        try:
            yield news
        finally:
            if news.busy:
                summary.encoder_busy = sum(news.busy.values()) / len(news.busy)
    for line in news.by_node():
        print(line)


def stopped(kind: str, reason: str, node: str) -> Exception:
    """The error that a worker met, as it is called on one machine."""
    if kind == OutputError.__name__:
        return OutputError("stopped", [f"{reason} (said by node {node})"])
    if kind in (EncoderError.__name__, ReaderError.__name__):
        return EncoderError(f"{reason} (said by node {node})")
    return ClusterError("run.on=ray: a worker stopped", [f"node {node}: {reason}"])
