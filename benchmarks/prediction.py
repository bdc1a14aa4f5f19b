"""Speed of prediction on two CPU cores: a trained study on new slides whose features are cached.

    python benchmarks/prediction.py [slides=130] [tiles=1000] [folds=5] [rounds=3] [aggregators=abmil,chowder]

Features are made: float16 of 768 columns, as Phikon gives. A study of `folds` members is trained for one epoch on 20
slides; then `mil.predict` runs on `slides` others, without labels (probabilities) and with labels (metrics with
intervals, figures, report). Prints Markdown. Start-up is everything until the config is read and torch is imported.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from machine import machine

from extract.features.cache import Provenance, write_features
from mil.predict import main as predict
from mil.train import main as train

DIM, N_TRAINING = 768, 20
MADE = Provenance("phikon", "made", 224, 0.5, tile_level0_px=448)


def main() -> None:
    arguments = dict(a.split("=") for a in sys.argv[1:])
    n_slides, n_tiles = int(arguments.get("slides", 130)), int(arguments.get("tiles", 1000))
    n_folds, rounds = int(arguments.get("folds", 5)), int(arguments.get("rounds", 3))
    names = arguments.get("aggregators", "abmil,chowder").split(",")
    print(f"Command: `python benchmarks/prediction.py {' '.join(sys.argv[1:])}`\n")
    print(machine("torch", "numpy", "h5py") + "\n")
    print(f"## Prediction from the cache: {n_slides} slides x {n_tiles:,} tiles x {DIM} float16, {n_folds} members\n")
    print("| aggregator | written | median s | all |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_slides(root / "training", "old", N_TRAINING, n_tiles)
        make_slides(root / "new", "new", n_slides, n_tiles)
        data = [f"cohort={root / 'training' / 'cohort.csv'}", f"features.folder={root / 'training'}"]
        study = [f"study.folds={n_folds}", "train.epochs=1", "report.bootstrap=0", "train.accelerator=cpu"]
        for name in names:
            quietly(lambda name=name: train([*data, *study, f"model.name={name}", f"out={root / name}"]))
            options = [f"run={root / name}", f"features.folder={root / 'new'}", f"out={root / 'out'}", "overwrite=true"]
            labels = [*options, f"cohort={root / 'new' / 'cohort.csv'}", "device=cpu"]
            for what, call in (("probabilities", [*options, "device=cpu"]), ("and report with labels", labels)):
                times = [seconds(lambda call=call: predict(call)) for _ in range(rounds)]
                print(f"| {name} | {what} | {median(times):.1f} | {', '.join(f'{t:.1f}' for t in times)} |")


def make_slides(folder: Path, prefix: str, n_slides: int, n_tiles: int) -> None:
    """Feature files and cohort.csv; every other slide is of the positive class and shifted a little."""
    folder.mkdir()
    rng = np.random.default_rng(len(prefix) + n_slides)
    coords_N2 = np.stack([np.arange(n_tiles) % 40, np.arange(n_tiles) // 40], axis=1) * 448
    slides = [f"{prefix}_{i:04d}" for i in range(n_slides)]
    for i, slide in enumerate(slides):
        tiles_TD = rng.standard_normal((n_tiles, DIM), dtype=np.float32) + (i % 2) * 0.02
        write_features(folder / f"{slide}.h5", tiles_TD, coords_N2, MADE)
    table = pd.DataFrame(
        {"slide": slides, "patient": slides, "label": [("normal", "tumor")[i % 2] for i in range(n_slides)]}
    )
    table.to_csv(folder / "cohort.csv", index=False)


def seconds(call: Callable[[], int]) -> float:
    """Of the whole command in a process that has imported torch."""
    began = time.perf_counter()
    quietly(call)
    return time.perf_counter() - began


def quietly(call: Callable[[], int]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = call()
    if code:
        raise RuntimeError(f"exit code {code}:\n{said.getvalue()}")


if __name__ == "__main__":
    main()
