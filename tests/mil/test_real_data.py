"""Musk1, Tiger and Elephant with their published folds, through cohort CSV, cache files and `python -m mil.train`.

The full comparison (three data sets, five repeats, four aggregators) is `benchmarks/classic_mil.py`; its own functions
are run here on one repeat of Musk1. Skipped where the data are absent.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from extract.features.cache import read_features, read_header

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", ROOT.parent / "shared")) / "data"
NPZ = {name: SHARED / "mil" / f"midatasets_{name}.npz" for name in ("musk1", "tiger", "elephant")}

pytestmark = pytest.mark.skipif(not all(path.exists() for path in NPZ.values()), reason=f"no data in {SHARED}")


@pytest.fixture(scope="module")
def classic_mil() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classic_mil", ROOT / "benchmarks" / "classic_mil.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NPZ)
def test_the_study_on_disk_is_the_published_data_set(classic_mil, tmp_path, name):
    """Every bag's instances, its label, and folds in which every bag is test once in each repeat."""
    classic_mil.write_study(NPZ[name], tmp_path, repeats=5)
    with np.load(NPZ[name]) as data:
        x_ND, bag_N, y_S, train_RFS = (data[key] for key in ("X", "bag_id", "y", "cv_train_mask"))
    cohort, folds = pd.read_csv(tmp_path / "cohort.csv"), pd.read_csv(tmp_path / "folds.csv")
    assert cohort["label"].tolist() == y_S.tolist()
    headers = [read_header(tmp_path / f"{slide}.h5") for slide in cohort["slide"]]
    assert [header.n_tiles for header in headers] == np.bincount(bag_N).tolist()
    for i in (0, len(y_S) // 2, len(y_S) - 1):
        assert np.array_equal(read_features(headers[i].path), x_ND[bag_N == i])
    assert len(folds) == 5 * len(y_S)
    assert not folds.duplicated(["slide", "repeat"]).any()
    for repeat, fold in ((0, 0), (4, 9)):
        listed = folds[(folds["repeat"] == repeat) & (folds["fold"] == fold)]["slide"]
        assert sorted(listed) == sorted(cohort["slide"][~train_RFS[repeat, fold]])


def test_musk1_is_learned(classic_mil, tmp_path, capsys):
    """One repeat of ten folds. The five repeats of the benchmark are at 0.90 to 0.93; chance is 0.5."""
    found = classic_mil.run(NPZ["musk1"], tmp_path, repeats=1, aggregators=("abmil", "mean"))
    assert set(found) == {"abmil", "mean"}
    for aucs in found.values():
        assert len(aucs) == 1
        assert 0.85 < aucs[0] < 0.99, found
    assert "abmil" in capsys.readouterr().out
    predictions = pd.read_csv(tmp_path / "run" / "abmil" / "predictions.csv")
    test = predictions[predictions["role"] == "test"]
    assert len(test) == 92
    assert not test["slide"].duplicated().any()


@pytest.mark.parametrize(("name", "elsewhere"), [("musk1", 0.969), ("tiger", 0.853), ("elephant", 0.882)])
def test_the_support_vector_machine_agrees_with_the_figure_that_others_found(classic_mil, name, elsewhere):
    """Same folds and features, their kernel width unknown."""
    assert sum(classic_mil.svm_aucs(NPZ[name])) / 5 == pytest.approx(elsewhere, abs=0.02)
