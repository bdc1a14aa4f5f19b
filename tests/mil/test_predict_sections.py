"""The sections of a report on new slides: the study's own test slides, asked once more, say what the study said."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import mil.predict
import mil.report.page
import mil.train
from mil.results.trained import RunError, open_run
from mil.training.ladder_saved import FILE

N, FIRST_TEST = 110, 40
SITES = ("north", "south")


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_study, witness_arrays):
    """A study of 40 slides and 70 test slides; its folder and the arguments of its data."""
    folder = tmp_path_factory.mktemp("sections")
    arrays, labels_S = witness_arrays(N, seed=3, strength=2.5)
    split = ["test" if i >= FIRST_TEST else "train" for i in range(N)]
    site = [SITES[i % 2] for i in range(N)]
    data = write_study(folder / "f", arrays, np.array(["normal", "tumor"], dtype=object)[labels_S], split=split)
    path = folder / "f" / "cohort.csv"
    csv = next(argument.removeprefix("cohort=") for argument in data if argument.startswith("cohort="))
    table = pd.read_csv(csv, dtype=str).assign(site=site, age=[str(40 + i % 50) for i in range(N)])
    table.to_csv(csv, index=False)
    study = ["study.folds=2", "study.seeds=[0,1]", "train.epochs=2", "train.lr=0.05", "model.name=mean"]
    report = ["report.heatmaps=0", "report.subgroups=[site,age>=65,scanner]"]
    pd.read_csv(csv, dtype=str).assign(scanner="one").to_csv(csv, index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mil.report.page, "FIGURES", {})
        common = ["report.bootstrap=50", "train.accelerator=cpu"]
        assert mil.train.main([*data, *study, *report, *common, f"out={folder / 'run'}"]) == 0
    features = next(argument for argument in data if argument.startswith("features.folder="))
    return folder / "run", features, table, path


def predict(made, out, table, *arguments):
    """metrics.json and report.html of predicting these rows; no column scanner in them."""
    run, features, _, _ = made
    out.mkdir()
    table.to_csv(out / "new.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mil.report.page, "FIGURES", {})
        code = mil.predict.main(
            [f"run={run}", f"cohort={out / 'new.csv'}", features, f"out={out / 'p'}", "device=cpu", *arguments]
        )
    return code, json.loads((out / "p" / "metrics.json").read_text()), (out / "p" / "report.html").read_text()


@pytest.fixture(scope="module")
def predicted(made, tmp_path_factory):
    """The study's test slides and 10 that it trained on, one without features, two of the test slides unlabelled."""
    table = made[2].iloc[FIRST_TEST - 10 :].copy()
    table.loc[table.index[-2:], "label"] = ""
    lost = table.iloc[[0]].assign(slide="lost", patient="lost")
    return predict(made, tmp_path_factory.mktemp("out") / "new", pd.concat([table, lost]), "report.bootstrap=50")


def test_slides_go_where_they_were_counted_by_hand(predicted):
    code, metrics, page = predicted
    flow = metrics["flow"]
    assert code == 1  # one failed
    assert flow["table"]["slides"] == 81
    assert flow["left_out"] == [{"why": "no feature file", "slides": 1, "patients": 1}]
    assert (flow["bags"]["slides"], flow["unlabelled"]["slides"], flow["known"]["slides"]) == (80, 2, 10)
    assert flow["new"]["slides"] == 68  # of the 70 test slides two have no label
    assert flow["cross_validated"]["slides"] == flow["test"]["slides"] == 0
    for name in ("flow", "encoder_seen", "baselines", "confounding", "subgroups", "calibration"):
        assert f'<section id="{name}">' in page
    for figure in ("flow", "confounding", "subgroups_new"):
        assert f'id="{figure}' in page or f"figure-{figure}" in page or figure in page


def test_baselines_say_of_test_slides_what_they_said_in_training(made, tmp_path):
    study = json.loads((made[0] / "metrics.json").read_text())["baselines"]
    _, metrics, page = predict(made, tmp_path / "b", made[2].iloc[FIRST_TEST:])
    found = metrics["baselines"]
    assert [rung["name"] for rung in found["rungs"]] == [rung["name"] for rung in study["rungs"]]
    for rung, before in zip(found["rungs"], study["rungs"], strict=True):
        assert rung["test"]["metrics"]["auc"]["value"] == pytest.approx(before["test"]["metrics"]["auc"]["value"], 1e-9)
        assert rung["test"]["difference"]["difference"] == pytest.approx(before["test"]["difference"]["difference"])
        assert "out_of_fold" not in rung
    assert found["verdict"]["test"]["best"] == study["verdict"]["test"]["best"]
    assert "official test" not in page.partition('<section id="baselines">')[2].partition("</section>")[0]


def test_sub_groups_are_the_studys_where_the_table_has_them(predicted, made):
    _, metrics, page = predicted
    (site, age) = metrics["subgroups"]["sets"]["new"]
    assert (site["name"], age["name"]) == ("site", "age>=65")
    assert [group["counts"]["slides"] for group in site["groups"]] == [35, 35]
    assert "the study&#39;s sub-groups by scanner are left out" in page
    slides = pd.read_csv(made[0] / "slides.csv", dtype={"label": str}).set_index("slide")
    scored = made[2].iloc[FIRST_TEST:-2]
    north = slides.loc[scored["slide"][scored["site"] == "north"]]
    truth = roc_auc_score(north["label"] == "tumor", north["p_1"])
    assert site["groups"][0]["metrics"]["auc"]["value"] == pytest.approx(truth)


def test_a_site_that_tells_the_label_is_warned_of(made, tmp_path):
    table = made[2].iloc[FIRST_TEST:].copy()
    table["site"] = np.where((table["label"] == "tumor") ^ (np.arange(len(table)) % 9 == 0), "east", "west")
    _, metrics, page = predict(made, tmp_path / "s", table, "report.subgroups=[]", "report.baselines=false")
    block = metrics["confounding"]
    assert block["label_by_site"]["flagged"]
    assert block["label_by_site"]["patients"] == 70
    assert block["left_out"] is None
    assert block["ways"][0]["label_auc"] is None
    assert "on folds of these slides" in block["warnings"][0]
    assert "site alone predicts the label" in page
    assert "subgroups" not in metrics
    assert "baselines" not in metrics
    slides = pd.read_csv(made[0] / "slides.csv", dtype={"label": str}).set_index("slide").loc[table["slide"]]
    parts = [slides[(table["site"] == name).to_numpy()] for name in ("east", "west")]
    n = [(part["label"] == "tumor").sum() * (part["label"] != "tumor").sum() / len(part) for part in parts]
    aucs = [roc_auc_score(part["label"] == "tumor", part["p_1"]) for part in parts]
    assert block["within"]["within"]["value"] == pytest.approx(np.average(aucs, weights=n))


def test_a_ladder_of_another_study_is_refused(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "run")
    (copy / "hashes.json").unlink()
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-8])
    with pytest.raises(RunError, match=r"baselines\.safetensors: damaged"):
        _ = open_run(copy).ladder
