"""AUC on the classic multiple-instance data sets Musk1, Tiger and Elephant, with their published folds.

    python benchmarks/classic_mil.py --data DIR [--out FILE.md] [--work DIR] [--datasets musk1 ...]
        [--aggregators abmil ...]

DIR holds `midatasets_NAME.npz`: X (instances, features), bag_id (instances,), y (bags,), cv_train_mask (5 repeats,
10 folds, bags). Every data set goes the way of a user's own slides: a cohort CSV, one cache file a bag, the folds as
a CSV, `python -m mil.train`. One setting for all data sets and aggregators, chosen beforehand for bags of about six
instances. The AUC of a repeat is that of its pooled out-of-fold predictions; the table shows mean and SD over repeats.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from sklearn.metrics import roc_auc_score

from extract.features.cache import Provenance, write_features
from mil.aggregators import AGGREGATORS
from mil.ledger.datasets import read_bags
from mil.ledger.entries import svm_aucs as ledger_svm_aucs
from mil.train import main as train

DATASETS = ("musk1", "tiger", "elephant")
SETTINGS = (
    "train.epochs=60",
    "train.lr=1e-3",
    "train.weight_decay=1e-3",
    "train.batch_size=16",
    "train.standardize=true",
)
OPTIONS = {
    "chowder": ("model.n_top=2", "model.n_bottom=2"),
    "clam_sb": ("model.hidden=128", "model.attention=128", "model.n_instances=1"),
    "dtfd": ("model.hidden=128", "model.attention=64", "model.pseudo_bags=2"),
    "transmil": ("model.hidden=64", "model.heads=4", "model.landmarks=8"),
    "hipt_mil": ("model.hidden=48", "model.mlp=96", "model.attention=48"),
    "transformer": ("model.hidden=64", "model.heads=4", "model.induced=8", "model.mlp=128", "model.attention=64"),
}
"""Of aggregators whose defaults do not fit bags of six instances."""


def read(npz: Path) -> tuple[np.ndarray, ...]:
    """Instances (N, D), the bag of each (N,), labels (S,), and who trains by repeat and fold (R, F, S)."""
    with np.load(npz) as data:
        return tuple(data[key] for key in ("X", "bag_id", "y", "cv_train_mask"))


def write_study(npz: Path, folder: Path, repeats: int) -> list[str]:
    """Cache files, cohort.csv and folds.csv of a data set in `folder`; returns the arguments that name them."""
    x_ND, bag_N, y_S, train_RFS = read(npz)
    name = npz.stem.removeprefix("midatasets_")
    slides = [f"{name}_{i:03d}" for i in range(len(y_S))]
    for i, slide in enumerate(slides):
        bag_TD = x_ND[bag_N == i]
        coords_N2 = np.zeros((len(bag_TD), 2), dtype=np.int32)  # the instances have no place
        write_features(folder / f"{slide}.h5", bag_TD, coords_N2, Provenance(name, slide=slide), dtype="float32")
    cohort = pd.DataFrame({"slide": slides, "patient": slides, "label": y_S})
    cohort.to_csv(folder / "cohort.csv", index=False)
    rows = [
        {"slide": slides[i], "repeat": repeat, "fold": fold}
        for repeat in range(repeats)
        for fold, train_S in enumerate(train_RFS[repeat])
        for i in np.flatnonzero(~train_S)
    ]
    pd.DataFrame(rows).to_csv(folder / "folds.csv", index=False)
    return [f"cohort={folder / 'cohort.csv'}", f"features.folder={folder}", f"study.folds_csv={folder / 'folds.csv'}"]


def auc_by_repeat(predictions_csv: Path) -> list[float]:
    """AUC of the pooled out-of-fold predictions of each repeat."""
    table = pd.read_csv(predictions_csv)
    test = table[table["role"] == "test"]
    return [float(roc_auc_score(part["label"], part["p_1"])) for _, part in test.groupby("repeat")]


def svm_aucs(npz: Path, repeats: int = 5) -> list[float]:
    """The same AUCs of scikit-learn's RBF support vector machine on each bag's mean, minimum, maximum, same folds."""
    return ledger_svm_aucs(read_bags(npz), extremes=True)[:repeats]


def run(
    npz: Path, folder: Path, repeats: int = 5, aggregators: Sequence[str] = tuple(AGGREGATORS)
) -> dict[str, list[float]]:
    """AUCs of the repeats by aggregator."""
    study = write_study(npz, folder / "features", repeats)
    quick = ("train.accelerator=cpu", "report.bootstrap=0", "report.heatmaps=0")
    for name in aggregators:
        own = [*OPTIONS.get(name, ()), f"model.name={name}", f"out={folder / 'run' / name}"]
        if train([*study, *SETTINGS, *quick, *own]):
            raise RuntimeError(f"{npz}: training {name} failed, see the messages above")
    return {name: auc_by_repeat(folder / "run" / name / "predictions.csv") for name in aggregators}


def table(found: dict[str, dict[str, list[float]]]) -> str:
    rows = ["| aggregator | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in next(iter(found.values())):
        cells = [f"{np.mean(of[name]):.3f} ± {np.std(of[name], ddof=1):.3f}" for of in found.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def provenance(seconds: dict[str, float]) -> str:
    packages = ("slide-mil", "torch", "lightning", "scikit-learn", "numpy")
    took = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    return "\n".join(
        [
            f"- Command: `python {shlex.join(sys.argv)}`",
            f"- Settings, the same for all: `{' '.join(SETTINGS)}`; all else is the toolkit's default, but for "
            + "; ".join(f"{name}: `{' '.join(options)}`" for name, options in OPTIONS.items()),
            "- AUC of the pooled out-of-fold predictions of a repeat (10 folds); mean ± SD over 5 repeats",
            "- SVM: scikit-learn's RBF support vector machine on each bag's mean, minimum and maximum, standardised, "
            "same folds",
            f"- Machine: {platform.machine()}, {psutil.cpu_count(logical=False)} cores, {platform.system()}, CPU only, "
            f"{torch.get_num_threads()} threads",
            f"- Versions: Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages),
            f"- Date: {time.strftime('%Y-%m-%d')}. Time with reports: {took}",
        ]
    )


def main() -> None:
    shared = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "data" / "mil")
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    parser.add_argument(
        "--work", type=Path, help="keep feature files and run folders here (default: a temporary folder)"
    )
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--aggregators", nargs="+", choices=list(AGGREGATORS), default=list(AGGREGATORS))
    options = parser.parse_args()
    found, seconds = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.datasets:
            began = time.perf_counter()
            folder = (options.work or Path(temporary)) / name
            npz = options.data / f"midatasets_{name}.npz"
            found[name] = run(npz, folder, aggregators=options.aggregators) | {"reference (SVM)": svm_aucs(npz)}
            seconds[name] = time.perf_counter() - began
    text = f"{table(found)}\n\n{provenance(seconds)}\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
