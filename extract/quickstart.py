"""The embedded cohort of `quickstart.yaml`: made on the spot, written as cohort CSV and cache like real data.

Shaped like a small slide study: several slides a patient, bags of very unequal size, a held-out test split. Features
have a slide effect (staining differs) and tissue types. A positive slide hides a few witness tiles, about one in fifty,
that carry one fixed signal; a negative slide holds look-alike tiles with half of it, and as many other oddities, so
that the mean of a slide says little and single tiles say everything.

Axes: N tiles of a slide, D features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from extract.cohort import check_cohort, write_cohort
from extract.features.another_cohort import refuse_another_cohort
from extract.features.cache import CacheError, Provenance, read_header, write_features
from extract.owners import refuse_anothers

ENCODER = "quickstart"
DIM = 64
TILE_PX, MPP = 224, 0.5
N_PATIENTS = 100
TEST_SHARE = 0.3
SIGNAL = 7.5
SEED = 20


def make_quickstart(folder: Path) -> Path:
    """Write the cohort's feature files and `cohort.csv` into `folder`, those that are not there yet.

    Returns the path of the CSV. The same files every time: a slide's content depends on its number alone.
    """
    cohort = check_cohort(quickstart_table(), ["normal", "tumor"])
    refuse_anothers(folder, "extract.run")
    refuse_another_cohort(folder / "cohort.csv", cohort.table["slide"])
    for number, row in cohort.table.iterrows():
        path = folder / f"{row['slide']}.h5"
        if not _is_ours(path):
            features_ND, coords_N2 = quickstart_slide(int(str(number)), row["label"] == "tumor")
            write_features(path, features_ND, coords_N2, quickstart_provenance(row["slide"]))
    write_cohort(folder / "cohort.csv", cohort)
    return folder / "cohort.csv"


def quickstart_table() -> pd.DataFrame:
    """1 to 4 slides a patient; 45 % of patients are positive; the last 30 % of patients are the test split."""
    rng = np.random.default_rng([SEED, 0])
    slides_P = rng.choice([1, 2, 3, 4], size=N_PATIENTS, p=[0.4, 0.3, 0.2, 0.1])
    positive_P = rng.random(N_PATIENTS) < 0.45
    patient_S = np.repeat(np.arange(N_PATIENTS), slides_P)
    is_test_S = patient_S >= round(N_PATIENTS * (1 - TEST_SHARE))
    return pd.DataFrame(
        {
            "slide": [f"quick_{i:03d}" for i in range(len(patient_S))],
            "patient": [f"patient_{p:02d}" for p in patient_S],
            "label": pd.Series(np.where(positive_P[patient_S], "tumor", "normal"), dtype=object),
            "split": np.where(is_test_S, "test", "train"),
            "path": pd.Series([None] * len(patient_S), dtype=object),
            "mpp": np.nan,
        }
    )


def quickstart_slide(number: int, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    """features_ND and coords_N2 of slide `number`: 30 to 2,000 tiles on a grid."""
    common = np.random.default_rng([SEED, 1])
    tissue_KD = common.normal(0, 1.5, (6, DIM))
    signal_D = _unit(common.normal(size=DIM))
    rng = np.random.default_rng([SEED, 2, number])
    n_tiles = int(np.clip(rng.lognormal(np.log(250), 0.8), 30, 2000))
    slide_effect_D = rng.normal(0, 0.5, DIM)
    mixture_K = rng.dirichlet(np.ones(len(tissue_KD)))
    features_ND = tissue_KD[rng.choice(len(tissue_KD), n_tiles, p=mixture_K)] + slide_effect_D
    features_ND += rng.normal(0, 1, (n_tiles, DIM))
    n_special = max(2, round(n_tiles * rng.uniform(0.01, 0.03)))
    special, oddities = np.split(rng.choice(n_tiles, 2 * n_special, replace=False), 2)
    features_ND[special] += signal_D * SIGNAL * (1.0 if positive else 0.3)
    features_ND[oddities] += SIGNAL * _unit(rng.normal(size=(n_special, DIM)))
    return features_ND.astype(np.float32), _grid(n_tiles)


def quickstart_provenance(slide: str) -> Provenance:
    return Provenance(ENCODER, f"seed {SEED}", TILE_PX, MPP, tile_level0_px=2 * TILE_PX, slide=slide)


def _grid(n_tiles: int) -> np.ndarray:
    columns = max(1, round((1.5 * n_tiles) ** 0.5))
    index = np.arange(n_tiles)
    return np.stack([index % columns, index // columns], axis=1) * 2 * TILE_PX


def _unit(x: np.ndarray) -> np.ndarray:
    unit: np.ndarray = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit


def _is_ours(path: Path) -> bool:
    """Whether the file is there, whole and from this very recipe; a broken one is made anew."""
    if not path.exists():
        return False
    try:
        header = read_header(path)
    except CacheError:
        return False
    return header.dim == DIM and header.provenance.weights_sha256 == f"seed {SEED}"
