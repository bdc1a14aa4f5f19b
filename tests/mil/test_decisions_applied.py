"""Decisions from training to prediction: what a study saves is what its report said and what mil.predict applies."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

import mil.report.page
from extract.config import ConfigError, ProblemsError, load_config
from mil.api.study import Run
from mil.config import StudyConfig
from mil.config_problems import study_problems
from mil.predict import main as predict
from mil.prediction.config import PredictConfig
from mil.results.decisions import FILE
from mil.results.trained import open_run

KEYS = ["report.calibrate=temperature", "report.operating_points=[sensitivity:0.8,youden]", "report.coverage=0.8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_study, witness_arrays, run_study):
    """Folder of a study without val slides: 2 folds, 12 test slides, 2 without label, patients of two slides."""
    folder = tmp_path_factory.mktemp("decided")
    arrays, labels_S = witness_arrays(44, seed=3, strength=1.5)
    names = np.array(["normal", "tumor"], dtype=object)[labels_S]
    names[:2] = None
    split = ["test" if i >= 32 else "train" for i in range(44)]
    data = write_study(folder / "f", arrays, names, split=split, patients=[f"p{i // 2:02d}" for i in range(44)])
    study = ["study.folds=2", "train.epochs=2", "train.lr=0.05", "model.name=mean", "report.heatmaps=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mil.report.page, "FIGURES", {})
        run_study([*data, *study, *KEYS, "report.prevalences=[0.1]", f"out={folder / 'run'}"], figures=True)
    return folder / "run"


def test_the_file_is_listed_and_the_tables_have_the_columns(run):
    assert FILE in json.loads((run / "hashes.json").read_text())["files"]
    slides = Run(run, "").slides
    assert {"calibrated_0", "calibrated_1", "conformal_set"} <= set(slides.columns)
    known = slides[slides["kind"] != "never held out"]
    np.testing.assert_allclose(known["calibrated_0"] + known["calibrated_1"], 1)
    assert set(known["conformal_set"]) <= {"{normal}", "{tumor}", "{normal, tumor}", "{}"}
    temperature = open_run(run).decisions.calibration.maps[0].temperature
    test = slides[slides["split"] == "test"]
    np.testing.assert_allclose(
        np.log(test["calibrated_1"] / test["calibrated_0"]), np.log(test["p_1"] / test["p_0"]) / temperature
    )


def test_the_page_shows_the_blocks_and_other_figures_stay_plain(run):
    metrics, page = json.loads((run / "metrics.json").read_text()), (run / "report.html").read_text()
    for name in ("calibration", "operating_points", "conformal"):
        assert f'<section id="{name}">' in page
        assert metrics[name]["sets" if name != "operating_points" else "points"]
    for name in ("reliability", "decision_curve", "answered"):
        assert (run / "figures" / f"{name}.png").exists()
    slides = Run(run, "").slides
    test = slides[slides["split"] == "test"]
    p_S = np.where(test["label"] == "tumor", test["p_1"], test["p_0"])
    loss = -np.log(p_S).mean()
    assert metrics["test"]["ensemble"]["metrics"]["log_loss"]["value"] == pytest.approx(loss)
    assert metrics["calibration"]["sets"]["test"]["before"]["log_loss"] == pytest.approx(loss)
    calibrated_S = np.where(test["label"] == "tumor", test["calibrated_1"], test["calibrated_0"])
    after = metrics["calibration"]["sets"]["test"]["after"]["log_loss"]
    assert after == pytest.approx(-np.log(calibrated_S).mean())
    held = [label in inside for label, inside in zip(test["label"], test["conformal_set"], strict=True)]
    assert metrics["conformal"]["sets"]["test"]["covered"]["value"] == pytest.approx(np.mean(held))


def test_prediction_says_of_the_test_split_what_the_study_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mil.report.page, "FIGURES", {})
    cohort = pd.read_csv(run.parent / "f" / "cohort.csv")
    cohort[cohort["split"] == "test"].to_csv(tmp_path / "new.csv", index=False)
    keys = [f"cohort={tmp_path / 'new.csv'}", f"features.folder={run.parent / 'f'}", "report.bootstrap=0"]
    assert predict([f"run={run}", *keys, f"out={tmp_path / 'out'}"]) == 0
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("slide")
    wanted = Run(run, "").slides.set_index("slide").loc[table.index]
    np.testing.assert_allclose(table["calibrated_tumor"], wanted["calibrated_1"], atol=1e-6)
    assert table["conformal_set"].tolist() == wanted["conformal_set"].tolist()
    one = open_run(run).decisions.operating.thresholds[0]
    assert (
        table["at_sensitivity_0.8"].tolist() == np.where(table["p_tumor"] >= one.threshold, "tumor", "normal").tolist()
    )
    theirs, ours = (json.loads((f / "metrics.json").read_text()) for f in (run, tmp_path / "out"))
    block, sets = ours["conformal"]["sets"]["test"], theirs["conformal"]["sets"]["test"]
    assert block == sets
    assert (
        ours["operating_points"]["points"][1]["sets"]["test"]["tp"]
        == theirs["operating_points"]["points"][1]["sets"]["test"]["tp"]
    )
    assert predict([f"config={tmp_path / 'out' / 'predict.yaml'}", f"out={tmp_path / 'again'}"]) == 0
    again = pd.read_csv(tmp_path / "again" / "predictions.csv")
    assert again["conformal_set"].tolist() == table["conformal_set"].tolist()


def test_slides_without_labels_get_a_set_at_the_coverage_that_is_asked_for(run):
    features = {"folder": run.parent / "f"}
    with pytest.warns(UserWarning, match="that the study trained on"):
        plain, sure = (Run(run, "").predict(features, report=r) for r in ({}, {"coverage": 0.999}))
    assert set(sure["conformal_set"]) == {"{normal, tumor}"}, "15 patients a class cannot rule one out at this"
    assert len(set(plain["conformal_set"])) > 1
    assert any("always hold 'normal', 'tumor'" in note for note in sure.attrs["notes"])


def test_a_run_without_its_decisions(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / FILE).unlink()
    with pytest.raises(ProblemsError, match=FILE):
        open_run(copy)
    (copy / "hashes.json").unlink()
    assert open_run(copy).decisions is None
    with pytest.warns(UserWarning, match="that the study trained on"):
        table = Run(copy, "").predict({"folder": run.parent / "f"})
    assert "conformal_set" not in table
    assert any(FILE in note for note in table.attrs["notes"])


@pytest.mark.parametrize(
    ("schema", "key", "said"),
    [
        (StudyConfig, "report.operating_points=[accuracy:0.9]", "expected {sensitivity: 0.95}"),
        (StudyConfig, "report.operating_points=[youden,youden]", "got youden twice"),
        (StudyConfig, "report.operating_points=[{sensitivity: 1.2}]", "above 0, at most 1"),
        (StudyConfig, "report.prevalences=[0.1,1]", "expected shares above 0 and below 1"),
        (StudyConfig, "report.coverage=1", "report.coverage"),
        (StudyConfig, "study.folds=1 report.calibrate=isotonic", "with study.folds=1 it needs val slides"),
        (PredictConfig, "report.calibrate=isotonic", "report.calibrate"),
    ],
)
def test_what_cannot_be_is_refused_in_words(schema, key, said):
    with pytest.raises(ConfigError) as caught:
        load_config(schema, ["cohort=x.csv", *key.split(" ", 1 if "folds" in key else 0)], also=study_problems)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[{sensitivity: 0.9},youden]", "[{sensitivity:0.9},youden]", "[sensitivity=0.9,youden]"]
)
def test_points_are_read_as_they_are_typed(text):
    config = load_config(StudyConfig, ["cohort=x.csv", f"report.operating_points={text}"], also=study_problems)
    assert config.report.operating_points == [{"sensitivity": 0.9}, "youden"]
