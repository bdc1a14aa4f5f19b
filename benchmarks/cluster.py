"""Ray: what it costs on one machine, whether it survives nodes that are killed, and a simulation of a large cohort.

    python benchmarks/cluster.py overhead [--slides=2000]   the same tiny slides, by the local loop and by Ray
    python benchmarks/cluster.py nested [--rounds=3]        a nested study, by the local loop and by tasks of Ray
    python benchmarks/cluster.py kills [--runs=5]           kill -9 of a node of three, at drawn moments
    python benchmarks/cluster.py slide [--rounds=3]         what a slide costs besides its tiles
    python benchmarks/cluster.py simulate                   100,000 slides on 1, 8 and 64 GPUs, and a node lost an hour

`simulate` is a model, not a measurement: a discrete-event simulation of workers as `extract.extraction.ray_slides` runs
them. A worker has readers and a GPU, takes slides while it has fewer than AT_ONCE in hand, reads them one after the
other and encodes what is read; one command hands slides out, one after the other; all read from one file server.
Slides have a lognormal number of tiles. A lost node loses what its workers had in hand, which is begun again elsewhere
after it was noticed; a new node comes in its place. Sizes and rates are stated with the table, and where they are from.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import heapq
import importlib.util
import io
import itertools
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from machine import machine

import extract.run
from extract.config import Tiles, Tissue
from extract.extraction.ray_slides import AT_ONCE
from extract.extraction.readers import Planned, PlanTask, Reader, Settings, SlideFile
from extract.features.cache import Provenance, write_features
from mil.train import main as train

ROOT = Path(__file__).resolve().parents[1]
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
NETWORK = '''
import time

import torch


class Corners(torch.nn.Module):
    """Mean colours of a tile's quarters."""

    def __init__(self, slow_s):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.slow_s = slow_s

    def forward(self, x):
        time.sleep(self.slow_s)
        half = x.shape[-1] // 2
        return torch.cat([x[..., i : i + half, j : j + half].mean((2, 3)) for i in (0, half) for j in (0, half)], 1)


def quick(weights):
    return Corners(0.0), {"dim": 12, "tile_px": 64, "mean": (0, 0, 0), "std": (1, 1, 1)}


def slow(weights):
    return Corners(0.15), {"dim": 12, "tile_px": 64, "mean": (0, 0, 0), "std": (1, 1, 1)}
'''


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def lab(folder: Path, n: int, width_px: int) -> Any:
    """Slides of a few tiles, of which 20 differ, and the encoder where Python finds it."""
    slides = load(ROOT / "tests" / "extract" / "slides.py")
    (folder / "slides").mkdir(parents=True)
    (folder / "cluster_network.py").write_text(NETWORK)
    for i in range(n):
        path = folder / "slides" / f"s{i:05}.tiff"
        if i < 20:
            slides.painted_slide(path, width_px + 16 * i, width_px - 100, seed=i)
        else:
            os.link(folder / "slides" / f"s{i % 20:05}.tiff", path)
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), before])
    yield
    os.environ["PYTHONPATH"] = before


def quietly(run: Any, arguments: list[str]) -> tuple[int, str, float]:
    """Exit code, what was said, and seconds of a command in this process."""
    began, said = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        code = run(arguments)
    return code, said.getvalue(), time.perf_counter() - began


# --- overhead ---------------------------------------------------------------------------------------------------------


def between_files(folder: Path) -> tuple[int, float]:
    """Files, and seconds between the first and the last of them: what is left without start and end."""
    times = sorted(path.stat().st_mtime for path in folder.glob("*.h5"))
    return len(times), times[-1] - times[0]


def overhead(n: int, folder: Path) -> list[str]:
    """Half of the slides locally, all of them by Ray, the other half locally: so a change of load meets both sides."""
    import ray

    lines = [
        "| way | slides | whole command, s | first file to last, s | slides a second |",
        "| --- | --- | --- | --- | --- |",
    ]
    with lab(folder, n, 300):
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=150 * 2**20)
        given = [f"slides.folder={folder / 'slides'}", "encoder.name=cluster_network:quick", "extract.workers=1"]
        took = {"local": [0, 0.0, 0.0], "ray": [0, 0.0, 0.0]}
        for way, more in (("local", "extract.shard=1/2"), ("ray", "run.on=ray"), ("local", "extract.shard=2/2")):
            out = folder / f"{way}{more[-3]}"
            code, _, whole = quietly(extract.run.main, [*given, f"out={out}", more])
            assert code == 0
            files, seconds = between_files(out)
            took[way] = [a + b for a, b in zip(took[way], (files, whole, seconds), strict=True)]
        ray.shutdown()
    for way, (files, whole, seconds) in took.items():
        lines.append(f"| {way} | {files:,} | {whole:.1f} | {seconds:.1f} | {files / seconds:.1f} |")
    more = took["ray"][2] / took["local"][2] - 1
    lines += [
        "",
        f"Ray, first file to last: {100 * more:+.1f} %. Its start, {took['ray'][1] - took['ray'][2]:.0f} s, comes",
    ]
    lines += ["once: the actor imports torch and Ray Data and starts its readers. `ray start` itself is not in it."]
    return lines


def nested(rounds: int, folder: Path) -> list[str]:
    """The same nested study, its passes one after the other here and as tasks on one worker."""
    import ray

    study = ["config=quickstart", "model.name=abmil", f"features.folder={folder / 'cache'}", "study.nested=3"]
    study += ["train.epochs=8", "report.bootstrap=0", "report.heatmaps=0", "report.baselines=false"]
    study += ["train.members_per_pass=5", "study.grid.lr=[1e-3,1e-4]"]
    took: dict[str, list[float]] = {"local": [], "ray": []}
    with contextlib.redirect_stdout(io.StringIO()):
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300 * 2**20)
    for i in range(rounds):
        for way in ("local", "ray"):
            out = folder / f"{way}{i}"
            code, _, seconds = quietly(train, [*study, f"out={out}", f"run.on={way}"])
            assert code == 0
            took[way].append(seconds)
        same = filecmp.cmp(folder / f"local{i}/predictions.csv", folder / f"ray{i}/predictions.csv", shallow=False)
        assert same, "predictions differ"
    ray.shutdown()
    lines = ["| way | median, s | all |", "| --- | --- | --- |"]
    lines += [f"| {w} | {statistics.median(t):.1f} | {', '.join(f'{x:.1f}' for x in t)} |" for w, t in took.items()]
    more = statistics.median(took["ray"]) / statistics.median(took["local"]) - 1
    return [*lines, "", f"Ray: {100 * more:+.1f} %; the first round starts the worker. Predictions are the same bytes."]


# --- kills ------------------------------------------------------------------------------------------------------------


def later(seconds: float, ready: Any, act: Any) -> threading.Thread:
    def wait() -> None:
        while not ready():
            time.sleep(0.02)
        time.sleep(seconds)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kills(runs: int, folder: Path, seed: int) -> list[str]:
    """A node of three is killed at a moment drawn from the time after the first file, or checkpoint, was there."""
    nodes_module = load(ROOT / "tests" / "mil" / "ray_nodes.py")
    lines = ["| what | killed after, s | node | outcome |", "| --- | --- | --- | --- |"]
    with lab(folder, 12, 500):
        given = [f"slides.folder={folder / 'slides'}", "encoder.name=cluster_network:slow", "extract.workers=1"]
        study = ["config=quickstart", "model.name=abmil", f"features.folder={folder / 'cache'}", "train.epochs=8"]
        study += ["report.bootstrap=0", "report.heatmaps=0", "report.baselines=false", "train.members_per_pass=1"]
        assert quietly(extract.run.main, [*given, f"out={folder / 'local'}"])[0] == 0
        assert quietly(train, [*study, f"out={folder / 'run'}"])[0] == 0
        with nodes_module.three_nodes() as nodes:
            for what, i in itertools.product(("extract", "train"), range(runs)):
                rng, late = random.Random(f"{seed} {what} {i}"), True
                while late:  # until the node went before the command had ended
                    nodes.refill()
                    far, number, after = folder / f"{what}{i}", rng.randrange(2), rng.uniform(0, 3)
                    shutil.rmtree(far, ignore_errors=True)
                    seen = "*.h5" if what == "extract" else "checkpoints/*/last.ckpt"
                    killer = later(
                        after, lambda far=far, seen=seen: any(far.glob(seen)), lambda n=number: nodes.kill(n)
                    )
                    command, args = (extract.run.main, given) if what == "extract" else (train, study)
                    code, _, _ = quietly(command, [*args, f"out={far}", "run.on=ray"])
                    late = killer.is_alive()
                    killer.join()
                lines.append(f"| {what} | {after:.1f} | {number} | {outcome(what, code, folder, far)} |")
    return lines


def outcome(what: str, code: int, folder: Path, far: Path) -> str:
    """Whether what is there is what the local run left, byte by byte."""
    local = folder / ("local" if what == "extract" else "run")
    hidden = [path.name for path in far.rglob(".*")]
    if what == "extract":
        names = sorted(path.name for path in local.iterdir())
        same = names == sorted(p.name for p in far.iterdir()) and filecmp.cmpfiles(local, far, names, False)[0] == names
    else:
        names = ["predictions.csv", "plan.csv", "history.csv"]
        same = filecmp.cmpfiles(local, far, names, False)[0] == names
    return "as the local run, byte by byte" if same and code == 0 and not hidden else f"WRONG ({code}, {hidden})"


# --- what a slide costs besides its tiles ----------------------------------------------------------------------------


def of_a_slide(rounds: int, folder: Path) -> list[str]:
    """Seconds of a processor: a slide of 41,216 x 40,960 px at 0.25 microns per pixel, a file of 10,000 tiles x 768."""
    from extraction import make_slide

    path = make_slide(folder / "slide.tiff", 40_960, 0.25)
    settings = Settings(224, 0.5, Tissue(), Tiles())
    took: dict[str, list[float]] = {"opening, tissue, tiles": [], "writing": []}
    features_ND = np.random.default_rng(0).normal(size=(10_000, 768)).astype(np.float16)
    coords_N2 = np.stack([np.arange(10_000), np.arange(10_000)], axis=1).astype(np.int32)
    for _ in range(rounds + 1):  # the first warms up
        began, reader = time.process_time(), Reader(settings)
        found = reader.do(PlanTask(SlideFile("slide", path)))
        assert isinstance(found, Planned), found
        reader.close()
        took["opening, tissue, tiles"].append(time.process_time() - began)
        began = time.process_time()
        write_features(folder / "slide.h5", features_ND, coords_N2, Provenance("random"))
        took["writing"].append(time.process_time() - began)
    lines = [
        f"| what a slide of {len(found.plan):,} tiles costs besides them | median s | all |",
        "| --- | --- | --- |",
    ]
    return lines + [
        f"| {what} | {statistics.median(t[1:]):.2f} | {', '.join(f'{x:.2f}' for x in t[1:])} |"
        for what, t in took.items()
    ]


# --- simulation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Rates and sizes of the simulation. Times in seconds."""

    slides: int = 100_000
    median_tiles: float = 10_000
    sigma: float = 0.7
    read_cpu_s: float = 0.00211
    """CPU time of a reader for a tile at 0.5 microns per pixel from a slide at 0.25."""
    readers: int = 15
    encode_per_s: float = 3000.0
    fixed_s: float = 0.76
    """Opening, tissue, writing: the readers' time for each slide besides its tiles."""
    hand_out_s: float = 0.013
    tile_bytes: float = 100e3
    """Of the compressed slide behind a tile."""
    server_bytes_per_s: float = 2.5e9
    gpus_a_node: int = 8
    lost_every_s: float = 0.0
    noticed_s: float = 30.0
    replaced_s: float = 600.0


@dataclass
class Worker:
    """One GPU: when its readers and its GPU are free again; `epoch` counts the times that it was lost."""

    read_free: float = 0.0
    encode_free: float = 0.0
    busy: float = 0.0
    back: float = 0.0
    epoch: int = 0


def simulate(model: Model, n_gpus: int, seed: int = 0) -> dict[str, float]:
    """Seconds until the last slide is done, the GPUs' share of it at work, and slides that were begun again."""
    rng = np.random.default_rng(seed)
    tiles_S = np.maximum(1, rng.lognormal(np.log(model.median_tiles), model.sigma, model.slides))
    per_tile = max(model.read_cpu_s / model.readers, n_gpus * model.tile_bytes / model.server_bytes_per_s)
    workers = [Worker() for _ in range(n_gpus)]
    todo, order = list(range(model.slides))[::-1], 0
    events: list[tuple[float, int, str, int, int, int]] = []  # time, order, what, worker, its epoch, slide
    hand_free, in_hand, again, now, done = 0.0, [set[int]() for _ in workers], 0, 0.0, 0
    useful = 0.0

    def give(w: int, at: float) -> None:
        nonlocal hand_free, order
        worker = workers[w]
        while todo and len(in_hand[w]) < AT_ONCE:
            slide = todo.pop()
            hand_free = max(hand_free, at) + model.hand_out_s
            in_hand[w].add(slide)
            worker.read_free = (
                max(worker.read_free, hand_free) + model.fixed_s / model.readers + tiles_S[slide] * per_tile
            )
            encode = tiles_S[slide] / model.encode_per_s
            worker.encode_free = max(worker.encode_free + encode, worker.read_free)
            order += 1
            heapq.heappush(events, (worker.encode_free, order, "done", w, worker.epoch, slide))

    def push(at: float, what: str, w: int) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (at, order, what, w, 0, 0))

    for w in range(n_gpus):
        give(w, 0.0)
    if model.lost_every_s:
        push(float(rng.exponential(model.lost_every_s)), "lost", int(rng.integers(n_gpus)))
    while done < model.slides:
        now, _, what, w, epoch, slide = heapq.heappop(events)
        if what == "done" and epoch == workers[w].epoch:
            in_hand[w].discard(slide)
            useful += tiles_S[slide] / model.encode_per_s
            done += 1
            give(w, now)
        elif what == "lost":
            first = w - w % model.gpus_a_node
            for one in range(first, min(first + model.gpus_a_node, n_gpus)):
                again += len(in_hand[one])
                workers[one].epoch += 1
                push(now + model.noticed_s, "noticed", one)
                push(now + model.replaced_s, "back", one)
            push(now + float(rng.exponential(model.lost_every_s)), "lost", int(rng.integers(n_gpus)))
        elif what == "noticed":
            todo.extend(in_hand[w])
            in_hand[w].clear()
            workers[w].read_free = workers[w].encode_free = np.inf  # nothing is given to it
            for other in range(n_gpus):
                if np.isfinite(workers[other].read_free):
                    give(other, now)
        elif what == "back":
            workers[w].read_free = workers[w].encode_free = now
            give(w, now)
    return {"seconds": now, "used": useful / (now * n_gpus), "again": float(again)}


def limit(model: Model, n_gpus: int) -> str:
    """What is slowest, by tiles a second."""
    rates = {
        "reading (CPUs)": n_gpus * model.readers / model.read_cpu_s,
        "the GPUs": n_gpus * model.encode_per_s,
        "the file server": model.server_bytes_per_s / model.tile_bytes,
        "handing out": model.median_tiles * np.exp(model.sigma**2 / 2) / model.hand_out_s,
    }
    name = min(rates, key=lambda key: rates[key])
    return f"{name}: {rates[name]:,.0f} tiles/s"


def simulation(slides: int) -> list[str]:
    """The tables."""
    plain = Model(slides=slides)
    lines = [
        f"{plain.slides:,} slides, lognormal: median {plain.median_tiles:,.0f} tiles, sigma {plain.sigma}; "
        f"{plain.fixed_s} s a slide besides its tiles; {plain.hand_out_s * 1000:.0f} ms of the command a slide; "
        f"{plain.tile_bytes / 1000:.0f} kB of slide a tile; {plain.gpus_a_node} GPUs a node. Reading: "
        f"{plain.read_cpu_s * 1000:.2f} ms of a CPU a tile at 0.25 microns per pixel "
        "(`extraction_2-core-xeon_2026-11.md`). The times a slide: `cluster_2-core-xeon_2026-11.md`; handing out is "
        "what a slide took longer by Ray than locally where a block was one slide, on two cores that all of Ray "
        "shared. Encoding: 3,000 tiles/s, timm's published figure of ViT-B/16 on an RTX 4090. Sizes, server and what "
        "is lost are assumptions.",
        "",
        "| readers a GPU | file server, GB/s | node lost | GPUs | time, h | GPU used | limit | begun again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for readers, server in ((3, 2.5e9), (7, 2.5e9), (15, 20e9)):
        for lost in (0.0, 3600.0):
            for n in (1, 8, 64):
                model = Model(slides, readers=readers, server_bytes_per_s=server, lost_every_s=lost)
                found = simulate(model, n)
                lines.append(
                    f"| {readers} | {server / 1e9:g} | {'every hour' if lost else 'never'} | {n} | "
                    f"{found['seconds'] / 3600:.1f} | {found['used']:.0%} | {limit(model, n)} | {found['again']:,.0f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "nested", "kills", "slide", "simulate"])
    for name, default in (("slides", 0), ("rounds", 3), ("runs", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cluster"))
    try:
        lines = {
            "overhead": lambda: overhead(given.slides or 2000, folder),
            "nested": lambda: nested(given.rounds, folder),
            "kills": lambda: kills(given.runs, folder, given.seed),
            "slide": lambda: of_a_slide(given.rounds, folder),
            "simulate": lambda: simulation(given.slides or 100_000),
        }[given.what]()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"Command: `python benchmarks/cluster.py {' '.join(sys.argv[1:])}`\n")
    print(f"{machine('ray', 'torch', 'numpy')}; load {os.getloadavg()[0]:.1f}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
