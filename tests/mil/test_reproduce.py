"""The ledger: what is measured beside what is known, what is not here, and the files that it leaves."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import mil.api.study
import mil.report.page
from extract.config import ProblemsError
from mil.ledger import entries, lines, members
from mil.ledger.config import ReproduceConfig
from mil.ledger.datasets import made_up, read_bags
from mil.ledger.entries import ENTRIES, MADE_UP, ladder_aucs, svm_aucs
from mil.ledger.lines import Line, as_text
from mil.reproduce import main

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data" / "mil"


def write_npz(path: Path, n_bags: int = 24, **changes: object) -> dict[str, np.ndarray]:
    """Bags of 2 to 6 instances, their ids in no order; positive ones lie higher."""
    rng = np.random.default_rng(7)
    y = np.arange(n_bags) % 2
    bag_id = rng.permutation(np.repeat(np.arange(n_bags), rng.integers(2, 7, n_bags)))
    x = rng.normal(size=(len(bag_id), 5)) + 0.8 * y[bag_id][:, None]
    mask = np.stack([[np.arange(n_bags) % 4 != (f + r) % 4 for f in range(4)] for r in range(2)])
    arrays = {"X": x, "bag_id": bag_id, "y": y, "cv_train_mask": mask} | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def test_quick_reaches_what_the_planted_distributions_allow(tmp_path, capsys):
    assert main(["quick=true", "strict=true", f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "0.921" in printed, "Phi(2 / sqrt(2))"
    assert "reproduced" in printed
    written = json.loads((tmp_path / "out" / "ledger.json").read_text())
    (entry,) = written["entries"]
    assert entry["measured"] == pytest.approx(np.mean(entry["values"]))
    assert abs(entry["measured"] - 0.9214) < 0.03
    table = pd.read_csv(tmp_path / "out" / "ledger.csv")
    assert table["measured"].tolist() == [pytest.approx(entry["measured"])]
    assert "| made_up |" in (tmp_path / "out" / "ledger.md").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(["quick=true", "strict=true", f"out={tmp_path / 'out'}"]) == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_the_made_up_bags_are_as_their_reference_says():
    """Truth: the first feature's mean alone, which is the best that any rule can do."""
    data = made_up(4000, 3, 2.0, 5)
    first_S = np.array([bag[:, 0].mean() for bag in data.bags])
    assert roc_auc_score(data.labels_S, first_S) == pytest.approx(MADE_UP["made_up"].low, abs=0.012)


@pytest.mark.parametrize("extremes", [True, False])
def test_the_support_vector_machine_on_given_folds(tmp_path, extremes):
    arrays = write_npz(tmp_path / "a.npz")
    data = read_bags(tmp_path / "a.npz")
    x_ND, bag_N, y = arrays["X"].astype(np.float32), arrays["bag_id"], arrays["y"]
    rows = []
    for i in range(24):
        own = x_ND[bag_N == i]
        rows.append(np.concatenate([own.mean(0), own.min(0), own.max(0)] if extremes else [own.mean(0)]))
    for r, found in enumerate(svm_aucs(data, extremes=extremes)):
        score = np.zeros(24)
        for train in arrays["cv_train_mask"][r]:
            model = make_pipeline(StandardScaler(), SVC()).fit(np.array(rows)[train], y[train])
            score[~train] = model.decision_function(np.array(rows)[~train])
        assert found == pytest.approx(roc_auc_score(y, score))


def test_logistic_regression_with_folds_of_seeds(tmp_path):
    write_npz(tmp_path / "a.npz", cv_train_mask=None)
    data = read_bags(tmp_path / "a.npz", (0, 1))
    means = np.array([bag.astype(float).mean(0) for bag in data.bags])
    for train_FS, found in zip(data.train_RFS, ladder_aucs(data), strict=True):
        assert (~train_FS).sum(axis=0).tolist() == [1] * 24
        p = np.zeros(24)
        for train in train_FS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01)).fit(means[train], data.labels_S[train])
            p[~train] = model.predict_proba(means[~train])[:, 1]
        assert found == pytest.approx(roc_auc_score(data.labels_S, p))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.87, 0.88), "reproduced"),
        ((0.84,), "differs"),
        ((0.93,), "differs"),
        ((), "not here"),
        ((float("nan"),), "differs"),
    ],
)
def test_verdicts(values, verdict):
    """Reference 0.86 to 0.90, tolerance 0.01."""
    entry = replace(ENTRIES["musk1"], low=0.86, high=0.90, tolerance=0.01)
    line = Line("x", entry, values)
    assert line.verdict == verdict
    assert ("not here. the mi-datasets" in as_text([line])) == (verdict == "not here")


def test_what_is_there_is_run_and_what_is_absent_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "midatasets_tiger.npz")  # AUC 0.958, and 0.853 is expected of tigers
    assert main([f"data.root={tmp_path}", "out=o", "entries=[tiger,musk1,camelyon16_nested]", "strict=true"]) == 1
    text = (tmp_path / "o" / "ledger.md").read_text()
    assert "| 0.020 | differs |" in text
    assert "musk1: not here. the mi-datasets" in text
    assert "camelyon16_nested: not here. python -m mil.train config=camelyon16-paper.yaml" in capsys.readouterr().out


@pytest.mark.skipif(not (SHARED / "midatasets_musk1.npz").exists(), reason="no shared data here")
def test_musks_are_reproduced(tmp_path):
    assert main([f"data.root={SHARED}", "entries=[musk1,ucsb_logistic]", "strict=true", f"out={tmp_path / 'o'}"]) == 0
    assert (tmp_path / "o" / "ledger.md").read_text().count("| reproduced |") == 2


def test_problems_are_messages(tmp_path, refused):
    assert "data.root: no such folder: /nowhere/at/all" in refused(main, "data.root=/nowhere/at/all")
    said = refused(main, "quick=true", "entries=[made]", f"out={tmp_path / 'o'}")
    assert "entries: no entry 'made'" in said
    for name, changes in (("musk1", {"cv_train_mask": None}), ("tiger", {"y": np.zeros(24)})):
        write_npz(tmp_path / f"midatasets_{name}.npz", **changes)
        said = refused(main, f"data.root={tmp_path}", f"entries=[{name}]", f"out={tmp_path / 'o'}")
        assert f"midatasets_{name}.npz: expected" in said
    (tmp_path / "midatasets_elephant.npz").write_bytes(b"no zip")
    assert "Get it again" in refused(main, f"data.root={tmp_path}", "entries=[elephant]", f"out={tmp_path / 'o'}")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "midatasets_tiger.npz").read_bytes()[:-300])
    with pytest.raises(ProblemsError, match=r"cut\.npz"):
        read_bags(tmp_path / "cut.npz")


@pytest.mark.parametrize("name", ["camelyon16_nested", "camelyon16_test"])
@pytest.mark.parametrize("imported", [True, False])
def test_camelyon16_is_a_study_with_a_shipped_config(tmp_path, monkeypatch, name, imported):
    """Valid as it is; features that were imported before are not downloaded or read from Parquet again."""
    entry, root = ENTRIES[name], tmp_path / "copy"
    (root / "data").mkdir(parents=True)
    config = ReproduceConfig.model_validate(
        {"data": {"root": root}, "features": {"folder": tmp_path / "cache"}, "out": tmp_path / "o"}
    )
    assert entry.present(config) is None
    if imported:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "cohort.csv").touch()
    else:
        (root / "data" / "Phikon_train-0.parquet").touch()
    where = entry.present(config)
    assert where == (tmp_path / "cache" if imported else root)
    asked = []

    class AskedError(Exception):
        """Instead of training."""

    def ask(study, command):
        asked.append(study)
        raise AskedError

    monkeypatch.setattr(mil.api.study, "train_and_report", ask)
    with pytest.raises(AskedError):
        entry.measure(config, where)
    (study,) = asked
    assert (study.model.name, study.data.root, study.resume) == ("abmil", None if imported else root, True)
    assert study.features.folder == tmp_path / "cache"
    nested = name == "camelyon16_nested"
    assert (study.study.folds, study.study.nested, len(study.study.seeds)) == ((5, 5, 1) if nested else (1, 0, 20))


def test_camelyon16_is_measured_by_its_folds_and_its_test_members(tmp_path, monkeypatch):
    metrics = {
        "folds": [{"metrics": {"auc": 0.9}}, {"metrics": {"auc": 1.0}}],
        "test": {"members": [{"metrics": {"balanced_accuracy": 0.8}}, {"metrics": {"balanced_accuracy": 0.7}}]},
    }
    monkeypatch.setattr(entries, "run_study", lambda *_, **__: SimpleNamespace(metrics=metrics))
    (tmp_path / "cohort.csv").touch()
    config = ReproduceConfig.model_validate({"features": {"folder": tmp_path}})
    found = [lines.run_entry(n, ENTRIES[n], config) for n in ("camelyon16_nested", "camelyon16_test")]
    assert [line.measured for line in found] == [pytest.approx(0.95), pytest.approx(0.75)]
    assert [line.verdict for line in found] == ["reproduced", "differs"]


def test_members_train_on_the_folds_of_the_file(tmp_path, monkeypatch):
    """Truth: who is held out, from the mask, and the AUC of predictions.csv."""
    pair_S = np.arange(24) // 2  # of both classes
    mask = np.stack([[pair_S % 4 != (f + r) % 4 for f in range(4)] for r in range(2)])
    arrays = write_npz(tmp_path / "toy.npz", cv_train_mask=mask)
    monkeypatch.setattr(members, "TRAIN", members.TRAIN | {"epochs": 2, "accelerator": "cpu"})
    monkeypatch.setattr(mil.report.page, "FIGURES", {})
    found = members.member_aucs(read_bags(tmp_path / "toy.npz"), tmp_path / "out", "toy", "mean")
    table = pd.read_csv(tmp_path / "out" / "mean" / "predictions.csv")
    for repeat, auc in enumerate(found):
        own = table[(table["repeat"] == repeat) & (table["role"] == "test")].sort_values("slide")
        assert own["slide"].tolist() == [f"toy_{i:03d}" for i in range(24)]
        assert auc == pytest.approx(roc_auc_score(arrays["y"], own["p_1"]))
        for fold, rows in own.groupby("fold"):
            held_out = [f"toy_{i:03d}" for i in np.flatnonzero(~arrays["cv_train_mask"][repeat, fold])]
            assert rows["slide"].tolist() == held_out
    assert len(found) == 2
