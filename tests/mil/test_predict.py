"""A trained study on new slides: numbers against a slow loop, refusals, what fails alone, image to probability."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import brier_score_loss, roc_auc_score

import extract.run
import mil.predict
import mil.prediction.study
from extract.features.cache import Provenance, write_features
from mil.results.trained import open_run, score_slide
from mil.training.hashes import FILE as HASHES

LABELS = ("normal", "tumor")
MADE = Provenance("synthetic", "none", 224, 0.5, tile_level0_px=448)
"""How the features of the studies of conftest.py were made."""


@pytest.fixture(autouse=True)
def no_figures(monkeypatch, draw_only):
    """Drawing takes most of the time of a small report."""
    draw_only(monkeypatch)


@dataclass(frozen=True)
class NewSlides:
    """Feature files of slides ext_0, ext_1, ... and their table; `arguments` name both."""

    folder: Path
    slides: list[str]
    tiles: list[np.ndarray]
    labels_S: np.ndarray

    @property
    def arguments(self) -> list[str]:
        return [f"cohort={self.folder / 'external.csv'}", f"features.folder={self.folder}", "report.bootstrap=0"]

    def write_table(self, **columns) -> None:
        """external.csv: a patient has two slides."""
        table = pd.DataFrame({"slide": self.slides, "patient": [f"q{i // 2}" for i in range(len(self.slides))]})
        table.assign(label=[LABELS[c] for c in self.labels_S]).assign(**columns).to_csv(
            self.folder / "external.csv", index=False
        )

    def write_features(self, index: int, tiles_TD: np.ndarray, **made) -> None:
        slide = self.slides[index]
        provenance = replace(MADE, slide=slide, **made)
        coords_N2 = np.stack([np.arange(len(tiles_TD)), np.zeros(len(tiles_TD), int)], axis=1) * 448
        write_features(self.folder / f"{slide}.h5", tiles_TD, coords_N2, provenance, dtype=tiles_TD.dtype.name)


@pytest.fixture
def new(witness_arrays, tmp_path) -> NewSlides:
    """Eleven slides that no study has seen, weaker witnesses than in training."""
    arrays, labels_S = witness_arrays(11, seed=77, strength=2.5, lengths=(12, 40))
    tiles = [array.astype(np.float16) for array in arrays]
    made = NewSlides(tmp_path / "new", [f"ext_{i}" for i in range(11)], tiles, labels_S)
    made.folder.mkdir()
    for index, tiles_TD in enumerate(tiles):
        made.write_features(index, tiles_TD)
    made.write_table()
    return made


@pytest.fixture
def predict(tmp_path) -> Callable[..., tuple[int, Path]]:
    """`predict(run, *arguments)`: the exit code of the command line and the folder it wrote."""

    def run(folder: Path, *arguments: str, out: str = "out") -> tuple[int, Path]:
        where = tmp_path / out
        try:
            return mil.predict.main([f"run={folder}", f"out={where}", "device=cpu", *arguments]), where
        except SystemExit as ended:
            return int(ended.code or 0), where

    return run


def table_of(out: Path, name: str = "predictions.csv") -> pd.DataFrame:
    return pd.read_csv(
        out / name,
        dtype={"slide": str, "patient": str, "label": str},
        keep_default_na=False,
        na_values={column: [""] for column in ("label", "p_normal", "p_tumor", "predicted", "sd", "threshold")},
    )


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def log_odds(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log(1 - p)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chowder", "abmil"])
def test_members_and_ensemble_equal_a_loop_over_slides(name, studies, new, predict):
    trained = open_run(studies(name).folder)
    code, out = predict(trained.folder, *new.arguments)
    assert code == 0
    table, members = table_of(out), table_of(out, "members.csv")
    assert table["slide"].tolist() == new.slides, "in the order of the CSV"
    assert table["n_tiles"].tolist() == [len(t) for t in new.tiles]
    assert set(table["members"]) == {6}
    thresholds_M = trained.thresholds["threshold"].to_numpy()
    assert len(set(thresholds_M)) > 1, "chosen on val, so that the default would be seen"
    threshold = sigmoid(log_odds(thresholds_M).mean())
    for row, slide, tiles_TD in zip(table.to_dict("records"), new.slides, new.tiles, strict=True):
        logits_M = score_slide(trained, tiles_TD).logits_MBC[:, 0, 0].double().numpy()
        own = members[members["slide"] == slide].sort_values("member")
        np.testing.assert_allclose(own["logit_0"], logits_M, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(own["p_1"], sigmoid(logits_M), rtol=1e-5, atol=1e-6)
        assert row["p_tumor"] == pytest.approx(sigmoid(logits_M.mean()), rel=1e-5)
        assert row["p_normal"] == pytest.approx(1 - row["p_tumor"])
        assert row["sd"] == pytest.approx(np.std(sigmoid(logits_M), ddof=1), rel=1e-4)
        assert row["threshold"] == pytest.approx(threshold)
        assert row["predicted"] == ("tumor" if row["p_tumor"] >= threshold else "normal")
    assert members.columns.tolist() == pd.read_csv(trained.folder / "predictions.csv", nrows=0).columns.tolist()


def test_labels_give_the_metrics_of_the_report(studies, new, predict, capsys):
    code, out = predict(studies("chowder").folder, *new.arguments, "report.bootstrap=50")
    said = capsys.readouterr().out
    assert code == 0
    table, test = table_of(out), metrics_of(out)["test"]
    truth = table["label"] == "tumor"
    assert table["label"].tolist() == [LABELS[c] for c in new.labels_S]
    auc = test["ensemble"]["metrics"]["auc"]
    assert auc["value"] == pytest.approx(roc_auc_score(truth, table["p_tumor"]))
    assert auc["low"] <= auc["value"] <= auc["high"]
    assert test["ensemble"]["metrics"]["brier"]["value"] == pytest.approx(brier_score_loss(truth, table["p_tumor"]))
    assert test["ensemble"]["metrics"]["accuracy"]["value"] == pytest.approx(
        (table["label"] == table["predicted"]).mean()
    )
    assert test["ensemble"]["counts"]["patients"] == 6
    members = table_of(out, "members.csv")
    for found in test["members"]:
        own = members[members["member"] == found["member"]]
        assert found["metrics"]["auc"] == pytest.approx(roc_auc_score(own["label"] == "tumor", own["p_1"]))
    assert f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]" in said
    page = (out / "report.html").read_text()
    assert "chowder on external" in page
    assert "11 slides of 6 patients never trained on" in page
    assert "every member's predictions: <code>members.csv</code>" in page


def test_the_report_has_roc_calibration_and_no_curves_of_training(studies, new, predict, monkeypatch):
    monkeypatch.undo()
    code, out = predict(studies("chowder").folder, *new.arguments)
    assert code == 0
    drawn = {path.stem for path in (out / "figures").iterdir()}
    assert drawn >= {"roc", "precision_recall", "calibration", "confusion", "decision_curve"}
    assert not drawn & {"loss", "auc", "learning_curve"}


def test_the_study_says_of_its_own_slides_what_it_said_then(studies, predict, capsys):
    """Same logits, same metrics on its test split; slides it trained on are pointed out and not counted."""
    study = studies("chowder")
    cohort, features = study.arguments[:2]
    code, out = predict(study.folder, cohort, features, "report.bootstrap=0")
    said = capsys.readouterr().out
    assert code == 0
    before = pd.read_csv(study.folder / "predictions.csv").sort_values(["member", "slide"], ignore_index=True)
    now = pd.read_csv(out / "members.csv").sort_values(["member", "slide"], ignore_index=True)
    for column in ("logit_0", "p_0", "p_1"):
        np.testing.assert_allclose(now[column], before[column], rtol=1e-5, atol=1e-7)
    table = table_of(out)
    assert table["in_study"].tolist() == study.split
    assert (
        "warning: 24 slides of 24 patients that the study trained on or selected with, so no metric counts them" in said
    )
    assert "24 slides of 24 patients that the study trained on" in (out / "report.html").read_text()
    then, again = metrics_of(study.folder)["test"], metrics_of(out)["test"]
    assert again["ensemble"]["counts"]["slides"] == 6
    for name, value in then["ensemble"]["metrics"].items():
        assert again["ensemble"]["metrics"][name]["value"] == pytest.approx(value["value"]), name
    assert again["ensemble"]["confusion"] == then["ensemble"]["confusion"], "at the study's thresholds"
    assert metrics_of(out)["thresholds"] == metrics_of(study.folder)["thresholds"]

    code, out = predict(study.folder, cohort, features, "report.bootstrap=0", "known_patients=score", out="scored")
    assert metrics_of(out)["test"]["ensemble"]["counts"]["slides"] == 30
    assert "and the metrics count them" in capsys.readouterr().out
    assert "never trained on" not in (out / "report.html").read_text()


def test_a_patient_of_the_study_is_recognised_by_patient_or_by_slide(studies, new, predict, capsys):
    patients = [f"q{i}" for i in range(11)]
    patients[2], patients[3] = "p05", "p28"  # trained on, held out
    slides = list(new.slides)
    shutil.move(new.folder / "ext_7.h5", new.folder / "slide_04.h5")  # trained on, another patient's name
    slides[7] = "slide_04"
    new.write_table(slide=slides, patient=patients)
    code, out = predict(studies("chowder").folder, *new.arguments)
    said = capsys.readouterr().out
    assert code == 0
    known = dict(zip(table_of(out)["slide"], table_of(out)["in_study"], strict=True))
    assert {slide: what for slide, what in known.items() if what} == {
        "ext_2": "train",
        "ext_3": "test",
        "slide_04": "train",
    }
    assert "2 slides of 2 patients that the study trained on or selected with" in said
    assert "'p05', 'q7'" in said
    assert metrics_of(out)["test"]["ensemble"]["counts"]["slides"] == 9
    slides_csv = table_of(out, "slides.csv").set_index("slide")
    assert slides_csv.loc["ext_2", "kind"] == "never held out"


def test_patients_of_tcga_slides_are_those_of_their_barcodes(studies, new, predict, tmp_path, capsys):
    """With no table, with no patient column, and where the table names patients otherwise than the study."""
    run = shutil.copytree(studies("chowder").folder, tmp_path / "run")
    (run / HASHES).unlink()  # it is changed on purpose
    roles = pd.read_csv(run / "roles.csv", dtype=str)
    roles.loc[roles["patient"] == "p05", "patient"] = "TCGA-44-2655"
    roles.to_csv(run / "roles.csv", index=False)
    slides = [f"TCGA-44-{2650 + i}-01Z-00-DX1" for i in range(11)]
    for old, now in zip(new.slides, slides, strict=True):
        shutil.move(new.folder / f"{old}.h5", new.folder / f"{now}.h5")
    wanted = ["train" if slide.startswith("TCGA-44-2655") else "" for slide in slides]
    barcodes = [slide[:12] for slide in slides]
    code, out = predict(run, f"features.folder={new.folder}")
    assert code == 0
    assert table_of(out)["in_study"].tolist() == wanted
    assert table_of(out)["patient"].tolist() == barcodes
    assert "without a patient" not in capsys.readouterr().out
    table = pd.DataFrame({"slide": slides})
    for patients, options in ((None, []), (None, ["columns.patient=tcga"]), ([f"q{i}" for i in range(11)], [])):
        more = {} if patients is None else {"patient": patients}
        table.assign(**more).to_csv(new.folder / "external.csv", index=False)
        code, out = predict(run, *new.arguments, *options, "overwrite=true")
        assert code == 0
        assert table_of(out)["in_study"].tolist() == wanted
        assert table_of(out)["patient"].tolist() == (patients or barcodes)


def test_more_than_two_classes(witness_arrays, write_study, run_study, tmp_path, predict):
    arrays, labels_S = witness_arrays(24, seed=5, n_classes=3, strength=5.0)
    names = np.array(["b-cell", "a, b", "rest"])
    split = ["test" if i >= 18 else "train" for i in range(24)]
    data = write_study(tmp_path / "data", arrays, names[labels_S], split=split)
    run_study([*data, "study.folds=2", "train.epochs=3", "model.name=mean", f"out={tmp_path / 'run'}"])
    code, out = predict(tmp_path / "run", *data, "report.bootstrap=0")
    assert code == 0
    table = pd.read_csv(out / "predictions.csv")
    trained = open_run(tmp_path / "run")
    assert trained.classes == ("a, b", "b-cell", "rest")
    p_SC = table[[f"p_{name}" for name in trained.classes]].to_numpy()
    for p_C, tiles_TD, sd in zip(p_SC, arrays, table["sd"], strict=True):
        logits_MC = score_slide(trained, tiles_TD).logits_MBC[:, 0].double().numpy()
        mean_C = logits_MC.mean(axis=0)
        np.testing.assert_allclose(p_C, np.exp(mean_C) / np.exp(mean_C).sum(), rtol=1e-5)
        p_MC = np.exp(logits_MC) / np.exp(logits_MC).sum(axis=1, keepdims=True)
        assert sd == pytest.approx(p_MC[:, p_C.argmax()].std(ddof=1), rel=1e-4)
    assert table["predicted"].tolist() == [trained.classes[c] for c in p_SC.argmax(axis=1)]
    assert table["threshold"].isna().all()
    then, again = metrics_of(tmp_path / "run")["test"]["ensemble"], metrics_of(out)["test"]["ensemble"]
    assert again["metrics"]["auc"]["value"] == pytest.approx(then["metrics"]["auc"]["value"])


# --- which slides --------------------------------------------------------------------------------------------------


def test_without_labels_or_patients_there_are_probabilities_and_no_report(studies, new, predict, capsys):
    run = studies("chowder").folder
    pd.DataFrame({"slide": new.slides[::-1]}).to_csv(new.folder / "external.csv", index=False)
    code, out = predict(run, *new.arguments)
    assert code == 0
    assert set(os.listdir(out)) == {"predictions.csv", "members.csv", "predict.yaml", "environment.json", "paths.json"}
    table = table_of(out)
    assert table["slide"].tolist() == table["patient"].tolist() == new.slides[::-1]
    assert table["label"].isna().all()
    assert "11 slides without a patient" in capsys.readouterr().out

    code, whole = predict(run, f"features.folder={new.folder}", out="whole")
    assert code == 0
    both = table_of(whole).merge(table, on="slide", suffixes=("", "_csv"))
    assert len(both) == 11
    np.testing.assert_allclose(both["p_tumor"], both["p_tumor_csv"], rtol=1e-6)

    code, one = predict(run, f"features.folder={new.folder}", "slide=ext_4", out="one")
    assert code == 0
    assert table_of(one)["p_tumor"].item() == pytest.approx(table.set_index("slide")["p_tumor"]["ext_4"])


def test_labels_of_some_slides_are_enough(studies, new, predict):
    label = [LABELS[c] for c in new.labels_S]
    label[0] = label[5] = ""
    new.write_table(label=label, split="validation")
    code, out = predict(studies("chowder").folder, *new.arguments)
    assert code == 0
    counts = metrics_of(out)["test"]["ensemble"]["counts"]
    assert (counts["slides"], counts["unlabelled"]) == (11, 2)
    assert table_of(out)["predicted"].notna().all()


def test_a_set_of_one_class_has_no_auc(studies, new, predict, capsys):
    new.write_table(label="tumor")
    code, out = predict(studies("chowder").folder, *new.arguments)
    assert code == 0
    assert metrics_of(out)["test"]["ensemble"]["metrics"]["auc"]["value"] is None
    assert "undefined" in capsys.readouterr().out


def test_columns_are_the_given_ones_else_the_studys_else_the_standard_ones(studies, new, predict, tmp_path, capsys):
    run = shutil.copytree(studies("chowder").folder, tmp_path / "run")
    (run / HASHES).unlink()  # it is changed on purpose
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  patient: patient", "  patient: case"))
    table = pd.read_csv(new.folder / "external.csv")
    for columns, options in (
        ({"patient": "case"}, []),
        ({}, []),
        ({"patient": "id", "label": "diagnosis"}, ["columns.patient=id", "columns.label=diagnosis"]),
    ):
        table.rename(columns=columns).to_csv(new.folder / "external.csv", index=False)
        code, out = predict(run, *new.arguments, *options, "overwrite=true")
        assert code == 0
        assert table_of(out)["patient"].tolist() == [f"q{i // 2}" for i in range(11)]
        assert table_of(out)["label"].notna().all()
    capsys.readouterr()
    code, out = predict(run, *new.arguments, "columns.patient=idd", "columns.path=file", out="other")
    said = capsys.readouterr().err
    assert code == 2
    assert "no column 'idd' (columns.patient); did you mean 'id'?" in said
    assert "no column 'file' (columns.path)" in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda new: new.write_table(label="tumour"), "labels ['tumour'] are not among classes ['normal', 'tumor']"),
        (lambda new: new.write_table(slide="ext_1"), "slide 'ext_1' is listed 11 times"),
        (lambda new: (new.folder / "external.csv").write_text("slide,patient\n"), "no rows"),
        (lambda new: (new.folder / "external.csv").write_text("id,patient\na,b\n"), "no column 'slide'"),
        (lambda new: (new.folder / "external.csv").unlink(), "external.csv"),
        (lambda new: new.write_table(slide=[f"EXT-{i:03d}" for i in range(11)]), "none of 11 slides has features"),
    ],
)
def test_a_wrong_table_is_refused(change, expected, studies, new, predict, capsys):
    change(new)
    code, out = predict(studies("chowder").folder, *new.arguments)
    assert code == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()


# --- another kind of features --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"encoder": "uni"}, "encoder is 'uni' in 1 file, such as {path}; the study's is 'synthetic'"),
        ({"weights_sha256": "e" * 64}, "encoder weights (sha256) is 'eeeeeeeeeeee...' in 1 file"),
        ({"tile_px": 256}, "tile_px is 256 in 1 file, such as {path}; the study's is 224"),
        ({"mpp": 0.25}, "tile mpp is 0.25 in 1 file, such as {path}; the study's is 0.5"),
        ({"overlap_px": 56}, "overlap_px is 56 in 1 file, such as {path}; the study's is 0"),
    ],
)
def test_features_of_another_kind_are_refused_by_name(made, expected, studies, new, predict, capsys):
    new.write_features(3, new.tiles[3], **made)
    code, out = predict(studies("chowder").folder, *new.arguments)
    assert code == 2
    assert expected.format(path=new.folder / "ext_3.h5") in capsys.readouterr().err
    assert not out.exists()


def test_another_width_and_several_differences_are_told_together(studies, new, predict, capsys):
    new.write_features(0, np.zeros((20, 9), np.float16))
    new.write_features(1, new.tiles[1], mpp=0.507)  # computed values differ a little: the same
    new.write_features(2, new.tiles[2], mpp=1.0, encoder="phikon")
    code, _ = predict(studies("chowder").folder, *new.arguments)
    said = capsys.readouterr().err
    assert code == 2
    assert "width is 9 in 1 file" in said
    assert "tile mpp is 1 in 1 file" in said
    assert "encoder is 'phikon'" in said
    assert "0.507" not in said


def test_what_a_file_does_not_say_is_noted(studies, new, predict, capsys):
    for index in (1, 2):
        new.write_features(index, new.tiles[index], encoder="", mpp=0.0)
    code, _ = predict(studies("chowder").folder, *new.arguments)
    assert code == 0
    assert "note: 2 files could not be compared with the study's in what one side does not say: encoder, tile mpp" in (
        capsys.readouterr().out
    )


# --- one bad slide -------------------------------------------------------------------------------------------------


def test_bad_slides_do_not_stop_the_rest(studies, new, predict, capsys):
    nan = new.tiles[1].copy()
    nan[4, 2] = np.nan
    new.write_features(1, nan)
    new.write_features(2, np.zeros((0, 6), np.float16), empty_reason="no tissue found")
    path = new.folder / "ext_3.h5"
    path.write_bytes(path.read_bytes()[:900])
    (new.folder / "ext_4.h5").unlink()
    shutil.move(new.folder / "ext_5.h5", new.folder / "EXT_05.h5")
    code, out = predict(studies("chowder").folder, *new.arguments)
    said = capsys.readouterr().out
    assert code == 1
    failed = pd.read_csv(out / "failed.csv").set_index("slide")
    assert failed["stage"].to_dict() == {
        "ext_1": "read",
        **dict.fromkeys(["ext_2", "ext_3", "ext_4", "ext_5"], "features"),
    }
    for slide, reason in (
        ("ext_1", "1 NaN and 0 infinite values in 1 of"),
        ("ext_2", "no tissue found"),
        ("ext_3", "truncated"),
        ("ext_4", f"no features in {new.folder}"),
        ("ext_5", "seems to be there as 'EXT_05'"),
    ):
        assert reason in failed.loc[slide, "reason"]
    good = [slide for slide in new.slides if slide not in failed.index]
    assert table_of(out)["slide"].tolist() == good
    assert metrics_of(out)["test"]["ensemble"]["counts"]["slides"] == 6
    assert "warning: 5 slides without a prediction, see failed.csv: " in said
    assert "5 slides without a prediction" in (out / "report.html").read_text()


@pytest.mark.parametrize("layout", ["cache", "torchmil"])
def test_features_replaced_between_their_check_and_their_use_are_refused_by_name(
    layout, studies, new, predict, monkeypatch, capsys
):
    """By others of the same shape: of this toolkit, with checksums, and of another tool, without."""
    run, wrong = studies("chowder").folder, "ext_3"
    if layout == "torchmil":
        for slide, tiles_TD in zip(new.slides, new.tiles, strict=True):
            (new.folder / f"{slide}.h5").unlink()
            np.save(new.folder / f"{slide}.npy", tiles_TD)
    checked = mil.prediction.study.find_features

    def then_replaced(*arguments):
        found = checked(*arguments)
        if layout == "cache":
            new.write_features(3, new.tiles[3] + np.float16(1))
        else:
            np.save(new.folder / "other.npy", new.tiles[3] + np.float16(1))
            (new.folder / "other.npy").replace(new.folder / f"{wrong}.npy")
        return found

    monkeypatch.setattr(mil.prediction.study, "find_features", then_replaced)
    code, out = predict(run, *new.arguments)
    assert code == 1
    failed = pd.read_csv(out / "failed.csv").set_index("slide")
    assert failed.index.tolist() == [wrong]
    assert "its features file was replaced by another one after it was checked" in failed.loc[wrong, "reason"]
    assert table_of(out)["slide"].tolist() == [slide for slide in new.slides if slide != wrong]


def test_nothing_but_bad_slides_still_says_why(studies, new, predict):
    for index in range(11):
        new.write_features(index, np.zeros((0, 6), np.float16), empty_reason="glass")
    code, out = predict(studies("chowder").folder, *new.arguments)
    assert code == 1
    assert len(pd.read_csv(out / "failed.csv")) == 11
    assert table_of(out).empty
    assert not (out / "report.html").exists()


def test_a_diverged_member_is_no_prediction(studies, new, predict, tmp_path):
    run = shutil.copytree(studies("mean").folder, tmp_path / "run")
    (run / HASHES).unlink()  # it is changed on purpose
    with safe_open(run / "members.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a safetensors file is no dict
    tensors["head0_bias"][2] = torch.nan
    save_file(tensors, run / "members.safetensors", metadata=metadata)
    code, out = predict(run, *new.arguments)
    assert code == 1
    assert set(pd.read_csv(out / "failed.csv")["reason"]) == {
        "a member's output is not a finite number; did its training diverge?"
    }
    assert table_of(out)["predicted"].isna().all()
    assert table_of(out)["p_tumor"].isna().all()
    assert metrics_of(out)["test"]["ensemble"]["metrics"]["auc"]["value"] is None


# --- the folder it writes ------------------------------------------------------------------------------------------


def test_running_twice_is_refused_unless_told_to_replace(studies, new, predict, capsys):
    run = studies("chowder").folder
    code, out = predict(run, *new.arguments)
    assert code == 0
    before = (out / "predictions.csv").read_bytes()
    assert predict(run, *new.arguments)[0] == 2
    assert f"{out}: set out=OTHER, or overwrite=true" in capsys.readouterr().err
    assert (out / "predictions.csv").read_bytes() == before
    (out / "features").mkdir()
    (out / "features" / "kept.h5").write_text("")
    (out / "mine.txt").write_text("")
    new.write_table(label="")
    assert predict(run, *new.arguments, "overwrite=true")[0] == 0
    assert set(os.listdir(out)) == {
        "predictions.csv",
        "members.csv",
        "predict.yaml",
        "environment.json",
        "paths.json",
        "features",
        "mine.txt",
    }, "what was there of the first, report and all, is gone; else nothing"
    assert (out / "features" / "kept.h5").exists()


def test_a_folder_of_something_else_is_never_touched(studies, new, predict, capsys):
    out = new.folder.parent / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    for option in ([], ["overwrite=true"]):
        assert predict(studies("chowder").folder, *new.arguments, *option)[0] == 2
        assert "not a folder of predictions" in capsys.readouterr().err
    assert os.listdir(out) == ["thesis.tex"]


def test_the_written_config_predicts_the_same_again(studies, new, predict, tmp_path):
    code, out = predict(studies("chowder").folder, *new.arguments)
    assert code == 0
    assert mil.predict.main([f"config={out / 'predict.yaml'}", f"out={tmp_path / 'again'}"]) == 0
    for name in ("predictions.csv", "members.csv", "metrics.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    environment = json.loads((out / "environment.json").read_text())
    assert (out / environment["study"]["folder"]).resolve() == studies("chowder").folder.resolve()
    assert "python -m mil.train" in environment["study"]["command"]


# --- the command line ----------------------------------------------------------------------------------------------


def test_problems_of_the_config_are_told_at_once(capsys):
    for arguments, expected in (
        (["out=x"], ["run: not set", "no slides: give slides.folder=FOLDER"]),
        (["run=x", "slide=a.svs", "cohort=b.csv"], ["slide: one slide"]),
        (
            ["run=x", "slide=a.svs", "encoder.name=uni", "tiles.overlap_px=3", "features.dtype=float32"],
            ["tiles, encoder.name, features.dtype: new slides are extracted exactly as the study's were"],
        ),
        (["run=x", "slide=a.svs", "extract.shard=1/2"], ["extract.shard"]),
        (["run=x", "sldie=a.svs"], ["sldie: unknown key; did you mean 'slide'?"]),
    ):
        with pytest.raises(SystemExit) as ended:
            mil.predict.main(arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2
        for text in expected:
            assert text in said


def test_what_is_not_there_is_named(studies, new, predict, tmp_path, capsys):
    run = studies("chowder").folder
    for arguments, expected in (
        ([f"slide={tmp_path / 'none.svs'}"], "none.svs: no such file"),
        ([f"slide={tmp_path}"], f"use slides.folder={tmp_path}"),
        ([f"features.folder={new.folder}", "slide=ext_44"], "no features of it in"),
        ([f"slides.folder={tmp_path / 'none'}"], "no such folder"),
        ([new.arguments[0]], "names no slide files (columns.path)"),
        ([new.arguments[0], f"features.folder={tmp_path / 'none'}"], "no such folder"),
    ):
        code, out = predict(run, *arguments)
        assert code == 2
        assert expected in capsys.readouterr().err
        assert not out.exists()
    assert predict(tmp_path / "no_run", *new.arguments)[0] == 2
    assert "no such folder" in capsys.readouterr().err


def test_features_of_an_unknown_encoder_cannot_be_extracted(studies, slide_files, predict, capsys):
    code, out = predict(studies("chowder").folder, f"slide={slide_files / 's0.tiff'}")
    assert code == 2
    assert "encoder 'synthetic' is not one of this toolkit" in capsys.readouterr().err
    assert not out.exists()


def test_help_needs_no_torch(python):
    code = (
        "import sys; from mil.predict import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'lightning', 'openslide', 'matplotlib', 'pandas', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True)
    assert "known_patients" in done.stdout


# --- from image to probability -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slides():
    """The maker of test slides of tests/extract."""
    import importlib.util

    path = Path(__file__).parents[1] / "extract" / "slides.py"
    spec = importlib.util.spec_from_file_location("predict_test_slides", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def slide_files(slides, tmp_path_factory) -> Path:
    """Eight painted slides s0 ... s7, none square, no two of one size."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(8):
        slides.painted_slide(folder / f"s{number}.tiff", 901 + 32 * number, 703, seed=number)
    return folder


@pytest.fixture(scope="module")
def from_images(slide_files, tmp_path_factory, run_study) -> Path:
    """Slides -> features (a tiny random encoder, tissue rules that are no defaults) -> run folder."""
    root = tmp_path_factory.mktemp("from_images")
    rules = ["tissue.method=fixed", "tissue.threshold=0.06", "tiles.min_tissue=0.4", "tiles.overlap_px=32"]
    encoder = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu", "workers=0"]
    where = [f"slides.folder={slide_files}", f"out={root / 'cache'}", "features.dtype=float32"]
    assert extract.run.main([*where, *encoder, *rules]) == 0
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(8)], "label": list("abababab")})
    table = table.assign(patient=[f"p{i}" for i in range(8)], split=["train"] * 6 + ["test"] * 2)
    table.to_csv(root / "cohort.csv", index=False)
    data = [f"cohort={root / 'cohort.csv'}", f"features.folder={root / 'cache'}"]
    model = ["model.name=abmil", "model.hidden=6", "model.attention=4", "model.head=[5]"]
    run_study([*data, *model, "study.folds=2", "train.epochs=2", "train.standardize=true", f"out={root / 'run'}"])
    return root


def test_image_to_probability_in_one_command(from_images, slide_files, predict, capsys):
    """The probability of a slide of the cohort, from its file, is the one that the study wrote down."""
    run = from_images / "run"
    before = pd.read_csv(run / "predictions.csv").set_index(["slide", "member"])
    code, out = predict(run, f"slide={slide_files / 's7.tiff'}", "extract.workers=0")
    said = capsys.readouterr().out
    assert code == 0
    now = pd.read_csv(out / "members.csv").set_index(["slide", "member"])
    assert now.index.tolist() == [("s7", 0), ("s7", 1)]
    np.testing.assert_allclose(now["logit_0"], before.loc[now.index, "logit_0"], rtol=1e-5, atol=1e-6)
    row = table_of(out).iloc[0]
    ensemble = sigmoid(before.loc[now.index, "logit_0"].mean())
    assert row["p_b"] == pytest.approx(ensemble, rel=1e-6)
    assert f"s7  b {ensemble:.3f} ± {row['sd']:.3f} over 2 members, threshold 0.500: {row['predicted']}" in said
    assert [path.name for path in (out / "features").glob("*.h5")] == ["s7.h5"]


def test_a_folder_of_slides_with_a_broken_one(from_images, slide_files, predict, tmp_path, capsys):
    run = from_images / "run"
    folder = tmp_path / "incoming"
    folder.mkdir()
    for name in ("s1", "s2", "s6"):
        shutil.copy(slide_files / f"{name}.tiff", folder)
    (folder / "broken.svs").write_bytes((slide_files / "s3.tiff").read_bytes()[:5000])
    options = [f"slides.folder={folder}", "extract.workers=0"]
    code, out = predict(run, *options)
    assert code == 1
    failed = pd.read_csv(out / "failed.csv")
    assert failed["slide"].tolist() == ["broken"]
    assert "broken.svs" in failed["reason"].item()
    table = table_of(out)
    assert table["slide"].tolist() == ["s1", "s2", "s6"]
    assert table["in_study"].tolist() == ["train", "train", "test"]
    before = pd.read_csv(run / "predictions.csv").groupby("slide")["logit_0"].mean()
    np.testing.assert_allclose(table["p_b"], sigmoid(before[table["slide"]]), rtol=1e-5)

    (folder / "broken.svs").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (out / "features").glob("*.h5")}
    assert predict(run, *options, "overwrite=true")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "features").glob("*.h5")} == stamps, "not extracted again"
    assert not (out / "failed.csv").exists()


def test_a_csv_with_paths_is_extracted_and_evaluated(from_images, slide_files, predict, tmp_path):
    paths = [str(slide_files / f"s{i}.tiff") for i in (6, 7)]
    pd.DataFrame({"slide": ["x", "y"], "patient": ["q1", "q2"], "label": ["a", "b"], "path": paths}).to_csv(
        tmp_path / "external.csv", index=False
    )
    cohort = f"cohort={tmp_path / 'external.csv'}"
    cache = f"features.folder={tmp_path / 'cache'}"
    code, out = predict(
        from_images / "run", cohort, f"slides.folder={slide_files}", cache, "extract.workers=0", "report.bootstrap=0"
    )
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.h5")) == ["x.h5", "y.h5"]
    then = metrics_of(from_images / "run")["test"]["ensemble"]["metrics"]
    now = metrics_of(out)["test"]["ensemble"]["metrics"]
    assert {name: now[name]["value"] for name in now} == pytest.approx({name: then[name]["value"] for name in then})
    assert set(table_of(out)["in_study"]) == {""}
    code, again = predict(from_images / "run", cohort, cache, "report.bootstrap=0", out="again")
    assert code == 0, "the cache alone will do now"
    pd.testing.assert_frame_equal(table_of(out), table_of(again))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("tissue.threshold=0.08", "tissue.threshold is 0.08 in 1 file"),
        ("tissue.method=otsu", "tissue.method is 'otsu' in 1 file"),
        ("tiles.min_tissue=0.41", "tiles.min_tissue is 0.41 in 1 file"),
        ("tiles.overlap_px=0", "overlap_px is 0 in 1 file"),
    ],
)
def test_other_tissue_rules_are_refused_by_name(rule, said, from_images, slide_files, predict, tmp_path, capsys):
    rules = {"tissue.method": "fixed", "tissue.threshold": "0.06", "tiles.min_tissue": "0.4", "tiles.overlap_px": "32"}
    rules |= dict([rule.split("=")])
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(slide_files / "s0.tiff", folder)
    encoder = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu", "workers=0"]
    where = [f"slides.folder={folder}", f"out={tmp_path / 'cache'}"]
    assert extract.run.main([*where, *encoder, *(f"{key}={value}" for key, value in rules.items())]) == 0
    capsys.readouterr()
    code, out = predict(from_images / "run", f"features.folder={tmp_path / 'cache'}")
    assert code == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
    if rule == "tissue.method=otsu":  # nor are they made anew in silence
        options = [f"slides.folder={folder}", f"features.folder={tmp_path / 'cache'}", "extract.workers=0"]
        assert predict(from_images / "run", *options, "overwrite=true")[0] == 2
        refusal = capsys.readouterr().err
        assert "set features.folder=OTHER, or extract.overwrite=true to make them anew" in refusal
        assert "tissue.method is otsu, expected fixed" in refusal
        assert predict(from_images / "run", *options, "extract.overwrite=true")[0] == 0
