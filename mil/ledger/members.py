"""Trained members on sets of bags: they go the way of a user's own slides, cache files, cohort, folds and a study.

Axes: S bags, R repeats, F folds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from extract.features.cache import Provenance, write_features
from extract.tables import write_csv
from mil.api.study import run_study
from mil.ledger.datasets import BagSet
from mil.tasks.metrics import METRICS

TRAIN = {"epochs": 60, "lr": 1e-3, "weight_decay": 1e-3, "batch_size": 16, "standardize": True}
"""For every set, chosen beforehand for bags of about six instances (`benchmarks/classic_mil.py`)."""
REPORT = {"bootstrap": 0, "heatmaps": 0, "baselines": False}


def member_aucs(data: BagSet, folder: Path, name: str, aggregator: str = "abmil") -> list[float]:
    """AUC of every repeat, out-of-fold. A study in `folder` that was begun is continued."""
    features = folder / "features"
    write_bags(data, features, name)
    run = run_study(
        cohort=features / "cohort.csv",
        features={"folder": features},
        study={"folds_csv": features / "folds.csv"},
        model={"name": aggregator},
        train=TRAIN,
        report=REPORT,
        resume=True,
        out=folder / aggregator,
    )
    held_out = run.predictions[run.predictions["role"] == "test"]
    aucs = [
        METRICS["auc"]((own["label"] == "1").to_numpy(int), own["p_1"].to_numpy())
        for _, own in held_out.groupby("repeat", sort=True)
    ]
    return [float("nan") if value is None else value for value in aucs]


def write_bags(data: BagSet, folder: Path, name: str) -> None:
    """One cache file a bag, cohort.csv, and folds.csv: every bag is held out once a repeat."""
    bags = [f"{name}_{i:03d}" for i in range(len(data.bags))]
    folder.mkdir(parents=True, exist_ok=True)
    for bag, tiles_TD in zip(bags, data.bags, strict=True):
        coords_N2 = np.zeros((len(tiles_TD), 2), dtype=np.int32)  # instances have no place
        write_features(folder / f"{bag}.h5", tiles_TD, coords_N2, Provenance(name, slide=bag), dtype="float32")
    write_csv(pd.DataFrame({"slide": bags, "patient": bags, "label": data.labels_S}), folder / "cohort.csv")
    rows = [(bags[s], r, f) for r, f, s in np.argwhere(~data.train_RFS).tolist()]
    write_csv(pd.DataFrame(rows, columns=["slide", "repeat", "fold"]), folder / "folds.csv")
