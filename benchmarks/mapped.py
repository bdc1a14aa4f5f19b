"""Memory-mapped features (data.memory=mmap): a pass over all slides, against one np.memmap kept open a slide.

    python benchmarks/mapped.py [slides=400] [tiles=300] [rounds=7]

np.memmap keeps a file descriptor a slide, so beside it stand as many slides as `ulimit -n` allows; then 20,000 slides
(the same files again and again, a map each) with 1,024 open files, which np.memmap cannot. Features are random float16
of 768 columns, in the page cache. First use: opening (and checking) every file. Prints Markdown.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import torch
from machine import machine
from torch import Tensor

from extract.features.cache import Provenance, write_features
from extract.features.folder import open_feature_folder
from mil.training.bags import as_tensor, load_bags

DIM, MANY, OPEN_FILES = 768, 20_000, 1024


def main() -> None:
    arguments = dict(a.split("=") for a in sys.argv[1:])
    n_slides, n_tiles = int(arguments.get("slides", 400)), int(arguments.get("tiles", 300))
    rounds = int(arguments.get("rounds", 7))
    print(f"Command: `python benchmarks/mapped.py {' '.join(sys.argv[1:])}`\n")
    print(machine("torch", "numpy", "h5py") + "\n")
    print(f"## Memory-mapped: {n_slides:,} slides x {n_tiles:,} tiles x {DIM} float16; microseconds a slide, medians\n")
    print("| maps | slides | open files | first use | sum of a slide | all | product with (768, 128) | all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        paths = make_slides(Path(name), n_slides, n_tiles)
        views: dict[str, Sequence[Tensor]] = {}
        first: dict[str, float] = {}
        started = time.perf_counter()
        views["np.memmap"] = [numpy_map(path) for path in paths]
        first["np.memmap"] = (time.perf_counter() - started) / n_slides
        started = time.perf_counter()
        views["ours"] = mapped(Path(name), 1, n_tiles)
        first["ours"] = sum(len(view) > 0 for view in views["ours"]) and (time.perf_counter() - started) / n_slides
        compare(views, first, rounds, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        del views
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
        started = time.perf_counter()
        many = mapped(Path(name), MANY // n_slides, n_tiles)
        opening = sum(len(view) > 0 for view in many) and (time.perf_counter() - started) / MANY
        compare({"ours": many}, {"ours": opening}, 1, OPEN_FILES)


def make_slides(folder: Path, n_slides: int, n_tiles: int) -> list[Path]:
    tiles_TD = np.random.default_rng(0).standard_normal((n_tiles, DIM), dtype=np.float32)
    paths = [folder / f"s{i:05d}.h5" for i in range(n_slides)]
    for path in paths:
        write_features(path, tiles_TD, np.zeros((n_tiles, 2)), Provenance("phikon", slide=path.stem))
    return paths


def numpy_map(path: Path) -> Tensor:
    """As it was done before: copy-on-write."""
    with h5py.File(path, "r") as file:
        features = file["features"]
        offset, dtype, shape = features.id.get_offset(), features.dtype, features.shape
    return as_tensor(np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape))


def mapped(folder: Path, times: int, n_tiles: int) -> Sequence[Tensor]:
    features = open_feature_folder(folder)
    slides = [slide for _ in range(times) for slide in features.slides]
    return load_bags(features, slides, [n_tiles] * len(slides), ["float16"] * len(slides), DIM, "mmap").views


def compare(views: dict[str, Sequence[Tensor]], first: dict[str, float], rounds: int, open_files: int) -> None:
    """A line each; the rounds of all alternate, so that a busy machine is busy for all."""
    weights_DH = torch.randn(DIM, 128)
    uses: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda tiles_TD: tiles_TD.view(torch.int16).sum(),
        lambda tiles_TD: tiles_TD.float() @ weights_DH,
    )
    times: dict[str, list[list[float]]] = {name: [[], []] for name in views}
    for _ in range(rounds):
        for name, slides in views.items():
            for use, kept in zip(uses, times[name], strict=True):
                kept.append(seconds_a_slide(slides, use))
    for name, (sums, products) in times.items():
        cells = [f"{median(t) * 1e6:.0f} | {', '.join(f'{x * 1e6:.0f}' for x in t)}" for t in (sums, products)]
        print(f"| {name} | {len(views[name]):,} | {open_files:,} | {first[name] * 1e6:.0f} | {' | '.join(cells)} |")


def seconds_a_slide(views: Sequence[Tensor], use: Callable[[Tensor], Tensor]) -> float:
    started = time.perf_counter()
    for index in range(len(views)):
        use(views[index])
    return (time.perf_counter() - started) / len(views)


if __name__ == "__main__":
    main()
