"""Subtypes end to end: barcodes, sites, three classes, several slides a patient; recomputed from predictions.csv."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from mil.results.tables import NEVER_HELD_OUT, OUT_OF_FOLD, TEST_ENSEMBLE, UNUSED_ENSEMBLE, patients_table
from mil.train import main

CLASSES = ["KIRC", "KIRP", "KICH"]
P = ["p_0", "p_1", "p_2"]


@pytest.fixture(scope="module")
def run(write_study, witness_arrays, tmp_path_factory, draw_only) -> Path:
    """84 slides of 45 patients from 9 hospitals, of which one is the test split; two slides have no label."""
    folder = tmp_path_factory.mktemp("subtypes")
    rng = np.random.default_rng(1)
    rows = []
    for p in range(45):
        for i in range(1 + p % 3 % 2 + (p % 5 == 0)):
            rows.append((f"TCGA-{'ABCDEFGHI'[p % 9]}{p // 9 % 2}-{1000 + p}-01Z-00-DX{i + 1}.f00", p))
    labels = [CLASSES[p // 9 % 3] for _, p in rows]
    arrays, _ = witness_arrays(len(rows), seed=2)
    for array, label in zip(arrays, labels, strict=True):
        array[:] = rng.normal(size=array.shape)
        array[0, CLASSES.index(label)] += 3.5
    write_study(folder / "data", arrays, labels)
    for i, (slide, _) in enumerate(rows):
        (folder / "data" / f"slide_{i:02d}.h5").rename(folder / "data" / f"{slide}.h5")
    table = pd.DataFrame({"slide": [slide for slide, _ in rows], "label": labels})
    table["hospital"] = [f"H{p % 9}" for _, p in rows]
    table["split"] = ["test" if p % 9 == 8 else "" for _, p in rows]
    table.loc[[1, 30], "label"] = ""
    table.to_csv(folder / "cohort.csv", index=False)
    arguments = [
        f"cohort={folder / 'cohort.csv'}",
        f"features.folder={folder / 'data'}",
        "config=tcga-rcc.yaml",
        "columns.site=hospital",
        "study.folds=3",
        "train.epochs=6",
        "train.lr=0.02",
        "train.accelerator=cpu",
        "model.hidden=6",
        "model.attention=5",
        "model.head=[4]",
        "report.bootstrap=20",
    ]
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch, "roc", "calibration", "confusion")
        assert main([*arguments, f"out={folder / 'run'}"]) == 0
    return folder / "run"


def ensemble(run: Path, split: str) -> pd.DataFrame:
    """By hand: mean of the logits of the members that held a slide out, as probabilities; labelled slides only."""
    table = pd.read_csv(run / "predictions.csv")
    rows = table[(table["role"] == "test") & (table["split"] == split) & table["label"].notna()]
    mean = rows.groupby("slide")[["logit_0", "logit_1", "logit_2"]].mean()
    p_SC = np.exp(mean.to_numpy()) / np.exp(mean.to_numpy()).sum(axis=1, keepdims=True)
    first = rows.drop_duplicates("slide").set_index("slide").loc[mean.index, ["patient", "label"]]
    return pd.concat([first, pd.DataFrame(p_SC, index=mean.index, columns=P)], axis=1)


def check_block(block: dict, table: pd.DataFrame) -> None:
    """Macro and per-class AUC, accuracy, confusion and calibration of one table of slides or patients."""
    p_SC, truth = table[P].to_numpy(), table["label"].to_numpy()
    aucs = [roc_auc_score(truth == name, p_SC[:, c]) for c, name in enumerate(CLASSES)]
    assert block["metrics"]["auc"]["value"] == pytest.approx(np.mean(aucs))
    assert [block["per_class"][name]["auc"]["value"] for name in CLASSES] == pytest.approx(aucs)
    called = np.array(CLASSES)[p_SC.argmax(axis=1)]
    assert block["confusion"]["matrix"] == confusion_matrix(truth, called, labels=CLASSES).tolist()
    assert block["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(truth == called))
    errors = []
    for c, name in enumerate(CLASSES):
        bins = np.minimum((p_SC[:, c] * 10).astype(int), 9)
        parts = [(np.mean(bins == b), bins == b) for b in np.unique(bins)]
        errors.append(sum(w * abs(p_SC[inside, c].mean() - np.mean(truth[inside] == name)) for w, inside in parts))
    assert [block["per_class"][name]["ece"]["value"] for name in CLASSES] == pytest.approx(errors)
    assert block["metrics"]["ece"]["value"] == pytest.approx(np.mean(errors))


@pytest.mark.parametrize(("split", "keys"), [("train", ["pooled_out_of_fold"]), ("test", ["test", "ensemble"])])
def test_numbers_by_slide_and_by_patient(run, split, keys):
    block = json.loads((run / "metrics.json").read_text())
    for key in keys:
        block = block[key]
    slides = ensemble(run, split)
    assert block["counts"]["slides"] - block["counts"]["unlabelled"] == len(slides)
    check_block(block, slides)
    patients = slides.groupby("patient").agg({"label": "first"} | dict.fromkeys(P, "mean"))
    assert block["patient_level"]["patients"] == len(patients) < len(slides)
    assert block["patient_level"]["patients_per_class"] == {c: int((patients["label"] == c).sum()) for c in CLASSES}
    check_block(block["patient_level"], patients)
    saved = pd.read_csv(run / "patients.csv").set_index("patient").loc[patients.index]
    np.testing.assert_allclose(saved[P], patients[P], rtol=1e-6)
    assert saved["label"].tolist() == patients["label"].tolist()
    assert saved["predicted"].tolist() == np.array(CLASSES)[patients[P].to_numpy().argmax(axis=1)].tolist()
    assert saved["slides"].tolist() == slides.groupby("patient").size().tolist()


def test_patients_and_hospitals_are_apart_in_what_was_trained(run):
    roles = pd.read_csv(run / "roles.csv", dtype=str)
    assert (roles["patient"] == roles["slide"].str[:12]).all()
    for member in ("m0", "m1", "m2"):
        used = roles[roles[member] != "unused"]
        assert used.groupby("patient")[member].nunique().max() == 1
        assert used.groupby("site")[member].nunique().max() == 1
        assert set(used["label"][used[member] == "train"]) == set(CLASSES)


def test_the_page_shows_patients_classes_and_the_split_by_site(run):
    page = (run / "report.html").read_text()
    assert 'data-key="/pooled_out_of_fold/patient_level/per_class/KICH/auc/value"' in page
    assert "site-preserving folds: each of the 8 sites is on one side" in page
    assert "patients.csv" in page
    assert {p.stem for p in (run / "figures").iterdir()} >= {"roc", "calibration", "confusion"}


def test_patients_by_hand():
    """Which slides count for a patient, with every kind of slide."""
    rows = [
        ("a", "x", OUT_OF_FOLD, 0.2),
        ("a", "x", OUT_OF_FOLD, 0.4),
        ("a", None, UNUSED_ENSEMBLE, 0.9),
        ("b", "x", OUT_OF_FOLD, 0.1),
        ("b", "y", OUT_OF_FOLD, 0.5),
        ("c", None, TEST_ENSEMBLE, 0.6),
        ("c", None, TEST_ENSEMBLE, 0.8),
        ("d", "y", NEVER_HELD_OUT, np.nan),
        ("e", "y", OUT_OF_FOLD, np.nan),
        ("e", "y", OUT_OF_FOLD, 0.5),
        ("f", "y", TEST_ENSEMBLE, 0.9),
    ]
    slides = pd.DataFrame(rows, columns=["patient", "label", "kind", "p_1"])
    slides["label"] = pd.Series([row[1] for row in rows], dtype=object)
    slides = slides.assign(p_0=1 - slides["p_1"], threshold=0.5, members=2, split="train", slide=slides.index)
    slides.loc[slides["kind"] == NEVER_HELD_OUT, "members"] = 0
    table = patients_table(slides, ["x", "y"]).set_index("patient")
    assert table.index[:2].tolist() == ["a", "f"], "the most wrong first, those without an error last"
    assert table.loc["a", ["label", "slides", "predicted"]].tolist() == ["x", 2, "x"]
    assert table.loc["a", ["p_1", "error"]].tolist() == pytest.approx([0.3, 0.3])
    assert table.loc["b", ["label", "slides"]].tolist() == [None, 2], "slides of different labels"
    assert np.isnan(table.loc["b", "error"])
    assert table.loc["c", "p_1"] == pytest.approx(0.7)
    assert table.loc["c", ["label", "predicted"]].tolist() == [None, "y"]
    assert table.loc["d", ["kind", "members", "predicted"]].tolist() == [NEVER_HELD_OUT, 0, None]
    assert np.isnan(table.loc["e", "p_1"]), "half a mean would look like a whole one"
