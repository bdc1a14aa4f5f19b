"""Damaged feature files: every change is noticed, or harmless; none ends in a traceback or a crash.

    python benchmarks/reliability.py [--mutations=2000] [--seed=0]

Each mutation damages a whole file and reads everything of it (header, features, features mapped, coordinates): one bit
flipped, the file cut off, 512 bytes zeroed, 64 bytes random, 16 bytes copied elsewhere, drawn again where that changes
nothing. `--mutations=1000000` is for releases.
Outcomes: `noticed` = CacheError that names the file; `harmless` = everything that is read is as it was written (a bit
that no value depends on, such as padding); the other three are failures and make the exit code 1. Workers are
processes, so that a crash of HDF5 itself is counted too. Prints Markdown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from extract.features.cache import CacheError, Header, Provenance, write_features
from extract.features.folder import FeatureFolder

NOTICED, HARMLESS, WRONG, TRACEBACK, CRASH = "noticed", "harmless", "wrong result", "traceback", "crash"
FAILURES = (WRONG, TRACEBACK, CRASH)
SIZES = {"small": (37, 5), "larger": (400, 48)}
"""Tiles and features; in the small file most bytes are HDF5's own."""
PER_WORKER, SECONDS_A_WORKER = 5_000, 1_200

Everything = tuple[Header, bytes, bytes, bytes]


def flip(whole: bytearray, rng: np.random.Generator) -> bytearray:
    whole[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
    return whole


def cut(whole: bytearray, rng: np.random.Generator) -> bytearray:
    return whole[: rng.integers(len(whole))]


def zero(whole: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(whole)))
    whole[start : start + 512] = bytes(len(whole[start : start + 512]))
    return whole


def scramble(whole: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(whole)))
    whole[start : start + 64] = rng.bytes(len(whole[start : start + 64]))
    return whole


def move(whole: bytearray, rng: np.random.Generator) -> bytearray:
    source, target = rng.integers(len(whole) - 16, size=2)
    whole[target : target + 16] = whole[source : source + 16]
    return whole


MUTATIONS: dict[str, Callable[[bytearray, np.random.Generator], bytearray]] = {
    "a bit flipped": flip,
    "cut off": cut,
    "512 bytes zeroed": zero,
    "64 bytes random": scramble,
    "16 bytes copied elsewhere": move,
}


def write_example(path: Path, n_tiles: int, dim: int) -> None:
    rng = np.random.default_rng([n_tiles, dim])
    extra = {"level0_width": 4001, "note": "häufig", "ratio": 0.25, "known": True, "levels": np.arange(3)}
    provenance = Provenance("phikon", "f" * 64, 224, 0.5, 16, 460.7, "slide é 1", "abc", extra=extra)
    write_features(path, rng.standard_normal((n_tiles, dim)), rng.integers(0, 9999, (n_tiles, 2)), provenance)


def read_everything(path: Path) -> Everything:
    folder = FeatureFolder(path.parent, "cache", {"s": path})
    header, coords_N2 = folder.header("s"), folder.coords("s")
    assert coords_N2 is not None
    return header, folder.features("s").tobytes(), folder.mapped("s").tobytes(), coords_N2.tobytes()


def same(one: Everything, other: Everything) -> bool:
    return repr(one) == repr(other)


def outcome(path: Path, damaged: bytes, truth: Everything) -> str:
    """What reading these bytes under this name comes to."""
    path.write_bytes(damaged)
    try:
        return HARMLESS if same(read_everything(path), truth) else WRONG
    except CacheError as error:
        return NOTICED if str(path) in str(error) else TRACEBACK
    except Exception as error:  # noqa: BLE001 - what escapes is what is counted
        print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
        return TRACEBACK


def mutate(folder: Path, size: str, kind: str, seed: int, first: int, count: int) -> Counter[str]:
    """Outcomes of mutations `first` to `first + count`; each is drawn from (seed, its number) alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "s.h5"
    write_example(path, *SIZES[size])
    whole, truth = path.read_bytes(), read_everything(path)
    found: Counter[str] = Counter()
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number, list(SIZES).index(size), list(MUTATIONS).index(kind)])
        damaged = whole
        while damaged == whole:
            damaged = bytes(MUTATIONS[kind](bytearray(whole), rng))
        found[outcome(path, damaged, truth)] += 1
    return found


def in_a_worker(script: str, what: Sequence[str], first: int, count: int, seconds: float) -> Counter[str]:
    """Outcomes of cases `first` to `first + count`, as `script --worker WHAT... FIRST COUNT` prints them in JSON.

    Where that process dies or takes longer than `seconds`: in halves, down to the case that did it, which is a CRASH.
    """
    call = [sys.executable, script, "--worker", *what, str(first), str(count)]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        sys.stderr.write("".join(line + "\n" for line in done.stderr.splitlines() if line))
        return Counter({name: int(n) for name, n in json.loads(done.stdout.splitlines()[-1]).items()})
    if count == 1:
        print(f"crash: {call} {'' if done is None else done.stderr[-2000:]}", file=sys.stderr)
        return Counter({CRASH: 1})
    half = count // 2
    parts = ((first, half), (first + half, count - half))
    return sum((in_a_worker(script, what, *part, seconds) for part in parts), Counter[str]())


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        size, kind, *numbers = sys.argv[2:]
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(mutate(Path(folder), size, kind, *map(int, numbers))))
        return 0
    from machine import machine

    arguments = dict(a.removeprefix("--").split("=") for a in sys.argv[1:])
    n_mutations, seed = int(arguments.get("mutations", 2000)), int(arguments.get("seed", 0))
    print(f"Command: `python benchmarks/reliability.py {' '.join(sys.argv[1:])}`\n")
    print(machine("numpy", "h5py", "xxhash") + "\n")
    print(f"## {n_mutations:,} damaged feature files, seed {seed}\n")
    columns = (NOTICED, HARMLESS, *FAILURES)
    print(f"| file (tiles x features) | damage | files | {' | '.join(columns)} | s |\n{'| --- ' * (len(columns) + 4)}|")
    each, total = -(-n_mutations // (len(SIZES) * len(MUTATIONS))), Counter[str]()
    for size, (n_tiles, dim) in SIZES.items():
        for kind in MUTATIONS:
            began, found = time.perf_counter(), Counter[str]()
            for first in range(0, each, PER_WORKER):
                part = (first, min(PER_WORKER, each - first))
                found += in_a_worker(__file__, [size, kind, str(seed)], *part, SECONDS_A_WORKER)
            total += found
            cells = " | ".join(f"{n:,}" for n in (each, *(found[name] for name in columns)))
            print(f"| {n_tiles} x {dim} | {kind} | {cells} | {time.perf_counter() - began:.0f} |", flush=True)
    print(f"\n{sum(total[name] for name in FAILURES)} failures of {sum(total.values()):,}.")
    return int(any(total[name] for name in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
