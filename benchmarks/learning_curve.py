"""What a learning curve shows when all sizes train for equal epochs, and when they take equal steps.

    python benchmarks/learning_curve.py [--epochs 15] [--out FILE.md]

320 made-up patients with a slide each; in positive slides six of 60 tiles are shifted in half of the features. ABMIL,
5 folds, trained on 20, 40 and 80 of the 256 training patients and on all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from machine import machine, publish

from extract.features.cache import Provenance, write_features
from mil.train import main as train

PATIENTS, TILES, DIM, SIZES = 320, 60, 48, (20, 40, 80)
SETTINGS = ("study.folds=5", "train.lr=1e-3", "train.batch_size=16", "report.heatmaps=0", "report.bootstrap=0")


def make_cohort(folder: Path) -> list[str]:
    """Features and CSV; what `mil.train` is told of them."""
    rng, rows = np.random.default_rng(0), []
    coords_N2 = np.stack([np.arange(TILES) * 224, np.zeros(TILES)], axis=1).astype(np.int32)
    shift_D = np.where(np.arange(DIM) % 2, 0.55, 0.0)
    for i in range(PATIENTS):
        tiles_TD = rng.normal(size=(TILES, DIM))
        if i % 2:
            tiles_TD[:6] += shift_D
        write_features(
            folder / "features" / f"s{i:03d}.h5", tiles_TD.astype(np.float16), coords_N2, Provenance(encoder="made up")
        )
        rows.append({"slide": f"s{i:03d}", "patient": f"p{i:03d}", "label": ("normal", "tumor")[i % 2]})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return [f"cohort={folder / 'cohort.csv'}", f"features.folder={folder / 'features'}"]


def curve(data: list[str], folder: Path, equal: str, epochs: int) -> list[tuple[str, str, str]]:
    """Patients, epochs and AUC of each size."""
    sizes = ",".join(map(str, SIZES))
    more = [f"study.train_sizes=[{sizes}]", f"study.train_sizes_equal={equal}", f"train.epochs={epochs}"]
    if train([*data, *SETTINGS, *more, f"out={folder}"]):
        raise SystemExit("training failed")
    points = json.loads((folder / "metrics.json").read_text())["learning_curve"]["points"]
    found = [(p["patients"], p["epochs"], p["cross_validation"]["metrics"]["auc"]) for p in points]
    return [(f"{n:.0f}", f"{e:.0f}", f"{auc['mean']:.3f} ± {auc['sd']:.3f}") for n, e, auc in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="of the members on all patients")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = ["| patients | equal epochs | epochs | equal steps | epochs |", "| --- | --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as work:
        data = make_cohort(Path(work))
        both = [curve(data, Path(work) / equal, equal, options.epochs) for equal in ("epochs", "steps")]
    lines += [f"| {n} | {auc} | {e} | {auc_2} | {e_2} |" for (n, e, auc), (_, e_2, auc_2) in zip(*both, strict=True)]
    text = "\n".join(
        [
            "# A learning curve with equal epochs and with equal steps",
            "",
            *lines,
            "",
            "- AUC on the held-out folds, mean ± SD of 5 folds; in the last row both are the same members",
            f"- Settings: `{' '.join(SETTINGS)} train.epochs={options.epochs}`",
            f"- Command: `{' '.join(['python benchmarks/learning_curve.py', *sys.argv[1:]])}`",
            f"- Machine: {machine('torch', 'lightning', 'numpy')}",
        ]
    )
    publish(text, options.out)


if __name__ == "__main__":
    main()
