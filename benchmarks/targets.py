"""What many targets cost together, what they cost one by one, and what a target more costs.

    python benchmarks/targets.py [--targets 30] [--slides 269] [--tiles 1000] [--dim 768] [--epochs 5] [--work FOLDER]
        [--singles 30] [--out FILE.md]

Random float16 features of Camelyon16's size, a slide a patient, and as many random labels of two classes as targets.
ABMIL as it is by default, five folds. Three ways: one target; all in one command; a command each, one after the other
(of --singles of them, times as many as there are). Figures of the reports are not drawn, in either way. Seconds are
those of the clock, and of processors, which other work on the machine changes less. With --work what was measured is
kept there, and the same command measures only what is not there yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from machine import machine, publish

import mil.report.page
from extract.features.cache import Provenance, write_features
from mil.train import main as train

SETTINGS = ("study.folds=5", "report.heatmaps=0", "report.bootstrap=0", "report.baselines=false")
KEPT = "measured.json"
KINDS = {"training": "training", "whole": "whole command", "busy": "processors in it"}


def make_cohort(folder: Path, n_slides: int, n_tiles: int, dim: int, names: list[str]) -> list[str]:
    """Features and CSV, unless they are there; what `mil.train` is told of them."""
    rng = np.random.default_rng(0)
    coords_N2 = np.stack([np.arange(n_tiles) * 224, np.zeros(n_tiles)], axis=1).astype(np.int32)
    slides = [f"s{i:03d}" for i in range(n_slides)]
    for slide in slides:
        tiles_TD = rng.standard_normal((n_tiles, dim), dtype=np.float32).astype(np.float16)
        path = folder / "features" / f"{slide}.h5"
        if not path.exists():
            write_features(path, tiles_TD, coords_N2, Provenance(encoder="made up"))
    table = pd.DataFrame({"slide": slides, "patient": slides})
    for name in names:
        table[name] = rng.permutation(np.arange(n_slides) % 2)
    table.to_csv(folder / "cohort.csv", index=False)
    return [f"cohort={folder / 'cohort.csv'}", f"features.folder={folder / 'features'}"]


def measured(folder: Path, key: str, arguments: list[str]) -> dict[str, float]:
    """Seconds of the whole command, of processors in it, and of its training; measured once for every key."""
    kept = folder / KEPT
    known: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    if key not in known:
        began, busy = time.perf_counter(), time.process_time()
        if train([*arguments, f"out={folder / 'runs' / key}", "overwrite=true"]):
            raise SystemExit("training failed")
        whole, busy = time.perf_counter() - began, time.process_time() - busy
        environment = next((folder / "runs" / key).glob("**/environment.json")).read_text()
        known[key] = {"whole": whole, "busy": busy, "training": json.loads(environment)["training_seconds"]}
        kept.write_text(json.dumps(known))
    return known[key]


def rows(folder: Path, data: list[str], names: list[str], epochs: int, n_singles: int) -> list[str]:
    """The table's lines."""
    fixed = [*data, *SETTINGS, f"train.epochs={epochs}"]
    measured(folder, "warm-up", [*fixed, f"columns.label={names[0]}"])
    one = measured(folder, "one", [*fixed, f"columns.label={names[0]}"])
    everyone = measured(folder, "all", [*fixed, f"columns.label=[{','.join(names)}]"])
    singles = [measured(folder, name, [*fixed, f"columns.label={name}"]) for name in names[:n_singles]]
    alone = {key: sum(single[key] for single in singles) * len(names) / len(singles) for key in one}
    more = {key: (everyone[key] - one[key]) / max(1, len(names) - 1) for key in one}
    told = (
        ("one target", one),
        (f"{len(names)} targets, one command", everyone),
        (f"{len(names)} targets, a command each", alone),
        ("a target more in one command", more),
    )
    lines = [f"| {what} | {' | '.join(f'{found[key]:.1f} s' for key in KINDS)} |" for what, found in told]
    ratios = " | ".join(f"{alone[key] / everyone[key]:.1f} x" for key in KINDS)
    return [*lines, f"| a command each against one command | {ratios} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("targets", 30), ("slides", 269), ("tiles", 1000), ("dim", 768), ("epochs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--singles", type=int, default=30, help="how many of the targets are also studied alone")
    parser.add_argument("--work", type=Path, help="where features, runs and what was measured are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = [f"GENE{i:02d}" for i in range(options.targets)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        (folder / "features").mkdir(parents=True, exist_ok=True)
        data = make_cohort(folder, options.slides, options.tiles, options.dim, names)
        mil.report.page.FIGURES = {}
        lines = rows(folder, data, names, options.epochs, options.singles)
    size = f"{options.slides} slides of {options.tiles:,} x {options.dim} float16, {options.epochs} epochs"
    text = [
        f"# {options.targets} targets x 5 folds of ABMIL",
        "",
        f"| what | {' | '.join(KINDS.values())} |",
        "| --- | --- | --- | --- |",
        *lines,
        "",
        f"- {size}; all ways one after the other in one process; training is with the evaluation of all slides, the "
        "whole command, without start-up, with reading, checks, tables and the report of every target; of a command "
        f"each {min(options.singles, options.targets)} were measured",
        f"- Settings: `{' '.join(SETTINGS)}`",
        f"- Command: `{' '.join(['python benchmarks/targets.py', *sys.argv[1:]])}`",
        f"- Machine: {machine('torch', 'lightning', 'numpy')}",
    ]
    publish("\n".join(text), options.out)


if __name__ == "__main__":
    main()
