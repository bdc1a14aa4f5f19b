"""What checksums cost: a pass over cached feature files, with and without comparing, from a warm page cache.

    python benchmarks/verify.py [slides=100] [tiles=1000] [rounds=9]

Features are random float16 of 768 columns, as Phikon's. `in memory` is what data.memory=ram does with a file: map, copy
into the block of all slides; `header` is what is done with every file before training. Not compared: through HDF5, as
all reading was before there were checksums. Rounds of both alternate. Then the candidates on one slide's bytes. Prints
Markdown.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import xxhash
from machine import machine

from extract.features.cache import Provenance, map_features, read_features, read_header, write_features
from mil.training.bags import as_tensor

DIM = 768


def main() -> None:
    arguments = dict(a.split("=") for a in sys.argv[1:])
    n_slides, n_tiles = int(arguments.get("slides", 100)), int(arguments.get("tiles", 1000))
    rounds = int(arguments.get("rounds", 9))
    print(f"Command: `python benchmarks/verify.py {' '.join(sys.argv[1:])}`\n")
    print(machine("torch", "numpy", "h5py", "xxhash") + "\n")
    tiles_TD = np.random.default_rng(0).standard_normal((n_tiles, DIM), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"s{i:04d}.h5" for i in range(n_slides)]
        for path in paths:
            extra = {f"tissue.{i}": i for i in range(12)}
            write_features(path, tiles_TD, np.zeros((n_tiles, 2)), Provenance("phikon", slide=path.stem, extra=extra))
        block_SD = torch.empty(n_slides * n_tiles, DIM, dtype=torch.float16).zero_()  # its pages are there
        views = dict(zip(paths, block_SD.split(n_tiles), strict=True))
        uses: dict[str, Callable[..., object]] = {
            "in memory": lambda path, verify: views[path].copy_(as_tensor(map_features(path, verify=verify))),
            "read": lambda path, verify: read_features(path, verify=verify),
            "header": lambda path, verify: read_header(path, verify=verify),
        }
        print(f"## Checksums: {n_slides} files of {n_tiles:,} tiles x {DIM} float16; ms a file, medians of {rounds}\n")
        print("| | not compared | compared | more | not compared, all | compared, all |\n" + "| --- " * 6 + "|")
        for what, use in uses.items():
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for verify, kept in times.items():
                    kept.append(milliseconds(partial(use, verify=verify), paths))
            without, compared = median(times[False]), median(times[True])
            lists = " | ".join(", ".join(f"{t:.2f}" for t in times[verify]) for verify in (False, True))
            print(f"| {what} | {without:.2f} | {compared:.2f} | {compared / without - 1:.1%} | {lists} |")
    print("\n| checksum of one slide | GB/s, median | ms |\n| --- | --- | --- |")
    candidates: dict[str, Callable[[memoryview], object]] = {
        "xxh3-128": xxhash.xxh3_128_digest,
        "blake2b": lambda values: hashlib.blake2b(values).digest(),
        "sha256": lambda values: hashlib.sha256(values).digest(),
    }
    values = memoryview(tiles_TD.reshape(-1).view(np.uint8))
    for name, digest in candidates.items():
        ms = median(milliseconds(digest, [values]) for _ in range(5 * rounds))
        print(f"| {name} | {len(values) / ms / 1e6:.2f} | {ms:.3f} |")


def milliseconds(use: Callable[..., object], things: list[Path] | list[memoryview]) -> float:
    """Of one of them. CPU time of the process: what other programs do meanwhile does not count."""
    started = time.process_time()
    for thing in things:
        use(thing)
    return (time.process_time() - started) / len(things) * 1e3


if __name__ == "__main__":
    main()
