"""The report: every number against scikit-learn or numpy, and the page against metrics.json."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit, logit, softmax
from sklearn.metrics import average_precision_score, confusion_matrix, recall_score, roc_auc_score

from mil.report.page import write_overview, write_report
from mil.report.wording import about_settings, shown, terminal_table
from mil.results.summary import summarise
from mil.results.tables import slides_table
from mil.tasks.metrics import METRICS, choose_threshold

TWO, THREE = ["normal", "tumor"], ["LUAD", "LUSC", "normal"]
VOID = {"meta", "br", "link", "img", "input", "hr"}


def make_study(
    classes=TWO,
    *,
    folds=3,
    repeats=1,
    seeds=(0,),
    n_train=46,
    n_test=19,
    per_patient=2,
    val=True,
    seed=0,
    strength=2.0,
    epochs=4,
):
    """(predictions, plan, history) of a study with one member a repeat, fold and seed; labels go by patient."""
    rng = np.random.default_rng(seed)
    n = n_train + n_test
    split_S = np.array(["train"] * n_train + ["test"] * n_test)
    patient_S = np.array([f"{split}-{i // per_patient}" for i, split in enumerate(split_S)])
    names, index_S = np.unique(patient_S, return_inverse=True)
    label_S = (np.arange(len(names)) % len(classes))[index_S]
    signal_SC = rng.normal(0, 1, (n, len(classes))) + strength * np.eye(len(classes))[label_S]
    predictions, plan, history = [], [], []
    for repeat in range(repeats):
        fold_S = rng.permutation(np.arange(len(names)) % folds)[index_S]
        for fold, of_training in product(range(folds), seeds):
            member = len(plan)
            logits = signal_SC + rng.normal(0, 0.7, signal_SC.shape)
            logits = logits[:, 1:] - logits[:, :1] if len(classes) == 2 else logits
            p_SC = np.hstack([expit(-logits), expit(logits)]) if len(classes) == 2 else softmax(logits, axis=1)
            role_S = np.where((split_S == "test") | (fold_S == fold), "test", "train").astype(object)
            if val:
                role_S[(role_S == "train") & (fold_S == (fold + 1) % folds)] = "val"
            slides = [f"s{i:02}" for i in range(n)]
            table = pd.DataFrame(
                {
                    **{"member": member, "repeat": repeat, "fold": fold, "seed": of_training},
                    **{"slide": slides, "patient": patient_S},
                }
            )
            table = table.assign(label=np.array(classes, dtype=object)[label_S], split=split_S, role=role_S)
            table[[f"logit_{c}" for c in range(logits.shape[1])]] = logits
            table[[f"p_{c}" for c in range(len(classes))]] = p_SC
            predictions.append(table)
            sizes = {f"n_{role}": int((role_S == role).sum()) for role in ("train", "val", "test")}
            row = {"member": member, "repeat": repeat, "fold": fold, "seed": of_training}
            row |= {"lr": 1e-3, "weight_decay": 0.0}
            plan.append(row | {"epochs": epochs, "best_epoch": epochs - 1} | sizes)
            losses = {f"{part}_{q}": rng.random(epochs) for part in ("train", "val") for q in ("loss", "auc")}
            history.append(pd.DataFrame({"member": member, "epoch": np.arange(1, epochs + 1), **losses}))
    return pd.concat(predictions, ignore_index=True), pd.DataFrame(plan), pd.concat(history, ignore_index=True)


def report(folder, study, classes=TWO, **options):
    predictions, plan, history = study
    texts = {"title": "A study", "config_yaml": "train:\n  lr: 0.001\n", "environment": {"python": "3"}}
    options = texts | {"bootstrap": 40} | options
    return write_report(folder, predictions=predictions, plan=plan, history=history, classes=classes, **options)


class Page(HTMLParser):
    """Checks that tags close, and collects numbers by JSON pointer, references, ids and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.numbers: list[tuple[str, str]] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.pointer: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.references += [attributes[k] for k in ("src", "href", "xlink:href", "data", "action") if k in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.pointer = attributes.get("data-key")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.pointer is not None:
            self.numbers.append((self.pointer, data))
            self.pointer = None


def at(tree, pointer: str):
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def check_page(folder: Path, *, links: bool = False) -> Page:
    """Whole, self-contained, and every number on it is the one in metrics.json."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.replace("<meta http-equiv=", "")
    assert "@import" not in text
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert re.findall(r"<script(.*?)>", text) in ([""], [' type="application/json" id="curves"', ""]), "none is fetched"
    assert len(page.ids) == len(set(page.ids))
    inside = [r for r in page.references if r.startswith("#")]
    assert {r[1:] for r in inside} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert links or len(inside) == len(page.references)
    if not links:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for pointer, written in page.numbers:
            value = at(metrics, pointer)
            expected = f"{value:.3f}" if isinstance(value, float) else str(value)
            assert written == ("undefined" if value is None else expected)
    return page


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A written report of two repeats: (folder, metrics, predictions, plan)."""
    folder = tmp_path_factory.mktemp("two")
    study = make_study(repeats=2)
    return folder, report(folder, study, notes=["2 slides <dropped>"]), study[0], study[1]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    study = make_study(THREE, folds=2, strength=1.5)
    return folder, report(folder, study, THREE), study[0], study[1]


def mean_logit(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby("slide")["logit_0"].mean()


def truth_of(rows: pd.DataFrame) -> pd.Series:
    return (rows.drop_duplicates("slide").set_index("slide")["label"] == "tumor").sort_index()


# --- numbers --------------------------------------------------------------------------------------------------------


def test_fold_metrics_and_their_mean_and_sd(two):
    _, metrics, predictions, plan = two
    aucs = []
    for member in plan["member"]:
        own = predictions[(predictions["member"] == member) & (predictions["split"] == "train")]
        held = own[own["role"] == "test"]
        aucs.append(roc_auc_score(held["label"] == "tumor", held["p_1"]))
        val = own[own["role"] == "val"]
        threshold = choose_threshold(val["label"] == "tumor", val["p_1"])
        fold = metrics["folds"][member]
        assert fold["threshold"] == pytest.approx(threshold)
        assert fold["threshold_origin"] == "Youden on val"
        expected = recall_score(held["label"] == "tumor", held["p_1"] >= threshold)
        assert fold["metrics"]["sensitivity"] == pytest.approx(expected)
        assert fold["counts"]["slides"] == len(held)
    assert [fold["metrics"]["auc"] for fold in metrics["folds"]] == pytest.approx(aucs)
    summary = metrics["cross_validation"]["metrics"]["auc"]
    assert (summary["mean"], summary["sd"]) == pytest.approx((np.mean(aucs), np.std(aucs, ddof=1)))
    assert (summary["n"], summary["undefined"]) == (6, 0)
    second = metrics["cross_validation"]["repeats"][1]
    assert second["repeat"] == 1
    assert second["metrics"]["auc"]["mean"] == pytest.approx(np.mean(aucs[3:]))


def test_seeds_of_a_fold_are_no_more_folds():
    predictions, plan, _ = make_study(folds=3, repeats=2, seeds=(0, 4, 7, 9), strength=1.0)
    metrics = summarise(predictions, plan, TWO, bootstrap=0)
    rows = predictions[(predictions["role"] == "test") & (predictions["split"] == "train")]
    auc = rows.groupby(["repeat", "fold", "seed"]).apply(
        lambda own: roc_auc_score(own["label"] == "tumor", own["logit_0"]), include_groups=False
    )
    table = auc.unstack("seed").to_numpy()  # noqa: PD010
    found = metrics["cross_validation"]["metrics"]["auc"]
    assert (found["mean"], found["n"], found["undefined"]) == (pytest.approx(auc.mean()), 6, 0)
    assert found["sd"] == pytest.approx(table.mean(axis=1).std(ddof=1))
    assert found["sd_seeds"] == pytest.approx(np.sqrt(table.var(axis=1, ddof=1).mean()))
    assert (metrics["cross_validation"]["folds"], metrics["cross_validation"]["seeds"]) == (6, 4)
    pooled, alone = metrics["pooled_out_of_fold"], metrics["pooled_out_of_fold"]["single_training"]
    each = [roc_auc_score(truth_of(own), mean_logit(own)) for _, own in rows.groupby(["repeat", "seed"])]
    assert (pooled["models_per_slide"], alone["models_per_slide"], alone["trainings"]) == ([8, 8], [1, 1], 8)
    assert alone["metrics"]["auc"]["mean"] == pytest.approx(np.mean(each))
    assert alone["metrics"]["auc"]["sd"] == pytest.approx(np.std(each, ddof=1))
    assert alone["metrics"]["auc"]["mean"] < pooled["metrics"]["auc"]["value"], "an ensemble of eight is better"
    tested = predictions[predictions["split"] == "test"]
    each = [roc_auc_score(truth_of(own), mean_logit(own)) for _, own in tested.groupby(["repeat", "seed"])]
    assert metrics["test"]["single_training"]["metrics"]["auc"]["mean"] == pytest.approx(np.mean(each))
    assert metrics["test"]["single_training"]["models_per_slide"] == [3, 3]
    assert metrics["test"]["ensemble"]["models_per_slide"] == [24, 24]
    text = terminal_table(metrics)
    assert "6 folds (2 repeats) x 4 seeds; SD of seeds" in text
    assert f"one training alone         {shown(alone['metrics']['auc']['mean'])}" in text
    assert "46 slides, 23 patients; 8 models a slide" in text


def test_the_page_of_several_seeds_says_models_a_slide(tmp_path):
    study = make_study(seeds=(0, 1, 2))
    metrics = report(tmp_path, study)
    page = check_page(tmp_path)
    text = " ".join((tmp_path / "report.html").read_text().split())
    pointers = [pointer for pointer, _ in page.numbers]
    assert "/pooled_out_of_fold/single_training/metrics/auc/mean" in pointers
    assert "/cross_validation/metrics/auc/sd_seeds" in pointers
    assert "models a slide" in text
    assert "mean of 3 folds x 3 seeds" in text
    overview = write_overview(tmp_path / "both", {"a": metrics, "b": metrics})
    assert "a, out-of-fold, one training alone: " in overview
    check_page(tmp_path / "both", links=True)


def test_metrics_of_an_older_version_can_still_be_compared(tmp_path):
    predictions, plan, _ = make_study()
    new = summarise(predictions, plan, TWO, bootstrap=0)
    old = json.loads(json.dumps(new))
    for block in (old["pooled_out_of_fold"], old["test"], old["test"]["ensemble"]):
        for key in ("single_training", "models_per_slide"):
            block.pop(key, None)
    for key in ("folds", "seeds"):
        old["cross_validation"].pop(key)
    for one in old["cross_validation"]["metrics"].values():
        one.pop("sd_seeds")
    assert write_overview(tmp_path, {"old": old, "new": new})
    assert terminal_table(old).splitlines()[1] == terminal_table(new).splitlines()[1]


def test_pooled_out_of_fold_is_the_mean_of_logits_over_repeats(two):
    _, metrics, predictions, _ = two
    rows = predictions[(predictions["split"] == "train") & (predictions["role"] == "test")]
    assert (rows.groupby("slide").size() == 2).all()
    number = metrics["pooled_out_of_fold"]["metrics"]["auc"]
    assert number["value"] == pytest.approx(roc_auc_score(truth_of(rows), mean_logit(rows)))
    assert number["low"] < number["value"] < number["high"]
    assert (number["method"], number["resamples"]) == ("score", 0)
    assert "binormal" in metrics["intervals"]["methods"]["score"]
    again = metrics["pooled_out_of_fold"]["with_training"]
    assert again["trainings"] == 2
    assert again["auc"]["value"] == pytest.approx(number["value"])
    assert (again["auc"]["low"], again["auc"]["method"]) == (None, None), "two trainings do not tell their variance"


def test_test_ensemble_is_the_mean_of_logits_over_members(two):
    _, metrics, predictions, plan = two
    rows = predictions[predictions["split"] == "test"]
    truth, logits = truth_of(rows), mean_logit(rows)
    ensemble = metrics["test"]["ensemble"]
    assert ensemble["metrics"]["auc"]["value"] == pytest.approx(roc_auc_score(truth, logits))
    expected = average_precision_score(truth, expit(logits))
    assert ensemble["metrics"]["average_precision"]["value"] == pytest.approx(expected)
    margin = np.mean([logit(fold["threshold"]) for fold in metrics["folds"]])
    assert ensemble["confusion"]["matrix"] == confusion_matrix(truth, logits >= margin).tolist()
    each = [roc_auc_score(truth_of(own), mean_logit(own)) for _, own in rows.groupby("member")]
    assert [member["metrics"]["auc"] for member in metrics["test"]["members"]] == pytest.approx(each)
    assert metrics["test"]["over_members"]["auc"]["sd"] == pytest.approx(np.std(each, ddof=1))
    assert len(each) == len(plan)


def test_patient_level_is_the_mean_of_the_slides(two):
    _, metrics, predictions, _ = two
    rows = predictions[predictions["split"] == "test"]
    slides = pd.DataFrame({"p": expit(mean_logit(rows)), "truth": truth_of(rows)})
    slides["patient"] = rows.drop_duplicates("slide").set_index("slide")["patient"]
    patients = slides.groupby("patient").agg({"p": "mean", "truth": "first"})
    block = metrics["test"]["ensemble"]["patient_level"]
    assert block["patients"] == len(patients) == 10
    assert block["metrics"]["auc"]["value"] == pytest.approx(roc_auc_score(patients["truth"], patients["p"]))


def test_one_slide_a_patient_has_no_patient_level():
    predictions, plan, _ = make_study(per_patient=1)
    metrics = summarise(predictions, plan, TWO, bootstrap=0)
    assert "patient_level" not in metrics["test"]["ensemble"]


def test_reported_slides_select_nothing():
    """Turning the reported predictions and labels around changes no threshold."""
    predictions, plan, _ = make_study()
    before = summarise(predictions, plan, TWO, bootstrap=0)
    reported = predictions["role"] == "test"
    turned = predictions.copy()
    turned.loc[reported, "logit_0"] *= -1
    turned.loc[reported, ["p_0", "p_1"]] = predictions.loc[reported, ["p_1", "p_0"]].to_numpy()
    after = summarise(turned, plan, TWO, bootstrap=0)
    assert after["thresholds"] == before["thresholds"]
    for name in ("pooled_out_of_fold", "test"):
        blocks = [m[name] if name != "test" else m[name]["ensemble"] for m in (before, after)]
        assert sum(block["metrics"]["auc"]["value"] for block in blocks) == pytest.approx(1.0)


def test_without_val_the_threshold_is_a_half_and_says_so():
    predictions, plan, _ = make_study(val=False)
    metrics = summarise(predictions, plan, TWO, bootstrap=0)
    assert {(t["threshold"], t["origin"]) for t in metrics["thresholds"]} == {(0.5, "default 0.5 (no val slides)")}
    rows = predictions[predictions["split"] == "test"]
    called = mean_logit(rows) >= 0
    expected = recall_score(truth_of(rows), called)
    assert metrics["test"]["ensemble"]["metrics"]["sensitivity"]["value"] == pytest.approx(expected)


def test_val_of_one_class_falls_back_to_a_half():
    predictions, plan, _ = make_study()
    one_class = (predictions["role"] == "val") & (predictions["label"] == "tumor")
    predictions.loc[one_class, "role"] = "train"
    metrics = summarise(predictions, plan, TWO, bootstrap=0)
    assert {t["origin"] for t in metrics["thresholds"]} == {"default 0.5 (val slides of one class)"}


def test_permuted_labels_stay_near_chance_and_a_perfect_study_reaches_one():
    predictions, plan, _ = make_study(n_train=400, n_test=200, strength=6.0, per_patient=1)
    assert summarise(predictions, plan, TWO, bootstrap=0)["test"]["ensemble"]["metrics"]["auc"]["value"] > 0.99
    labels = predictions.drop_duplicates("slide").set_index("slide")["label"]
    shuffled = pd.Series(np.random.default_rng(0).permutation(labels.to_numpy()), index=labels.index)
    predictions["label"] = predictions["slide"].map(shuffled)
    metrics = summarise(predictions, plan, TWO, bootstrap=200)
    number = metrics["pooled_out_of_fold"]["metrics"]["auc"]
    assert number["low"] < 0.5 < number["high"]


def test_several_classes_are_macro_and_one_against_the_rest(three):
    _, metrics, predictions, _ = three
    rows = predictions[predictions["split"] == "test"]
    logits = rows.groupby("slide")[["logit_0", "logit_1", "logit_2"]].mean()
    truth = rows.drop_duplicates("slide").set_index("slide")["label"].sort_index()
    p = softmax(logits.to_numpy(), axis=1)
    ensemble = metrics["test"]["ensemble"]
    expected = roc_auc_score(truth, p, multi_class="ovr", average="macro", labels=THREE)
    assert ensemble["metrics"]["auc"]["value"] == pytest.approx(expected)
    assert ensemble["per_class"]["LUSC"]["auc"]["value"] == pytest.approx(roc_auc_score(truth == "LUSC", p[:, 1]))
    called = np.array(THREE)[p.argmax(axis=1)]
    assert ensemble["confusion"]["matrix"] == confusion_matrix(truth, called, labels=THREE).tolist()
    assert metrics["positive_class"] is None
    assert {t["threshold"] for t in metrics["thresholds"]} == {None}


# --- what is undefined, absent or broken ----------------------------------------------------------------------------


def test_trap_10_a_one_class_fold_is_undefined_never_a_number(tmp_path):
    study = make_study(n_test=0)
    predictions = study[0]
    fold_0 = (predictions["member"] == 0) & (predictions["role"] == "test") & (predictions["label"] == "tumor")
    predictions.loc[fold_0, "role"] = "unused"
    metrics = report(tmp_path, study)
    assert set(metrics["folds"][0]["metrics"].values()) == {None}
    summary = metrics["cross_validation"]["metrics"]["auc"]
    assert (summary["n"], summary["undefined"]) == (2, 1)
    rest = [fold["metrics"]["auc"] for fold in metrics["folds"][1:]]
    assert summary["mean"] == pytest.approx(np.mean(rest))
    page = check_page(tmp_path)
    assert ("/folds/0/metrics/auc", "undefined") in page.numbers
    assert "undefined" in terminal_table(metrics)
    assert metrics["test"] is None
    assert "Test AUC" not in page.text


def test_only_a_test_split(tmp_path):
    """No fold holds anything out: one member, trained on all that is not test."""
    predictions, plan, history = make_study(folds=1, val=False)
    predictions.loc[predictions["split"] == "train", "role"] = "train"
    metrics = report(tmp_path, (predictions, plan, history[:0]))
    assert metrics["cross_validation"] is None
    assert metrics["pooled_out_of_fold"] is None
    assert metrics["folds"] == []
    assert metrics["test"]["over_members"]["auc"]["sd"] is None
    page = check_page(tmp_path)
    assert "Out-of-fold AUC" not in page.text
    assert not (tmp_path / "figures" / "loss.png").exists()
    slides = pd.read_csv(tmp_path / "slides.csv")
    assert set(slides.loc[slides["split"] == "train", "kind"]) == {"never held out"}
    assert slides.loc[slides["split"] == "train", "p_1"].isna().all()
    assert "test, ensemble" in terminal_table(metrics)


def test_unlabelled_slides_are_counted_predicted_and_not_scored(tmp_path):
    study = make_study()
    predictions = study[0]
    unused = predictions["slide"].isin(["s00", "s01"])
    test = predictions["slide"].isin(["s50"])
    predictions.loc[unused | test, "label"] = None
    predictions.loc[unused, "role"] = "unused"
    metrics = report(tmp_path, study)
    assert metrics["counts"]["cross_validated"]["unlabelled"] == 2
    assert metrics["counts"]["all"]["unlabelled"] == 3
    rows = predictions[(predictions["split"] == "test") & ~test]
    expected = roc_auc_score(truth_of(rows), mean_logit(rows))
    assert metrics["test"]["ensemble"]["metrics"]["auc"]["value"] == pytest.approx(expected)
    assert metrics["test"]["ensemble"]["counts"]["unlabelled"] == 1
    slides = pd.read_csv(tmp_path / "slides.csv").set_index("slide")
    assert slides.loc["s00", "kind"] == "unused ensemble"
    assert slides.loc["s00", "p_1"] == pytest.approx(expit(mean_logit(predictions[unused])["s00"]))
    assert slides["error"].isna().loc["s50"]
    check_page(tmp_path)


def test_a_test_split_without_labels_is_undefined(tmp_path):
    study = make_study(repeats=1)
    study[0].loc[study[0]["split"] == "test", "label"] = None
    metrics = report(tmp_path, study)
    assert metrics["test"]["ensemble"]["metrics"]["auc"]["value"] is None
    assert metrics["test"]["over_members"]["auc"] == {"mean": None, "sd": None, "n": 0, "undefined": 3}
    check_page(tmp_path)
    assert "undefined" in terminal_table(metrics)


def test_a_diverged_member_is_not_left_out_of_the_mean(tmp_path):
    study = make_study()
    bad = study[0]["member"] == 1
    study[0].loc[bad, ["logit_0", "p_0", "p_1"]] = np.nan
    metrics = report(tmp_path, study)
    assert "member 1: 65 predictions are not numbers" in metrics["warnings"][0]
    assert metrics["folds"][1]["metrics"]["auc"] is None
    assert metrics["folds"][0]["metrics"]["auc"] is not None
    assert metrics["test"]["ensemble"]["metrics"]["auc"]["value"] is None
    assert "not numbers" in check_page(tmp_path).text


def test_members_of_a_grid_are_announced():
    predictions, plan, _ = make_study()
    plan["lr"] = [1e-3, 1e-4, 1e-3]
    warnings = summarise(predictions, plan, TWO, bootstrap=0)["warnings"]
    assert warnings == ["members differ in lr (0.0001, 0.001); means and ensembles mix them"]


def test_wrong_tables_are_refused_with_all_reasons():
    predictions, plan, _ = make_study()
    with pytest.raises(ValueError, match=r"no column 'role'\n.*no column 'logit_0'\n.*plan: no column 'seed'"):
        summarise(predictions.drop(columns=["role", "logit_0"]), plan.drop(columns="seed"), TWO)
    twice = pd.concat([predictions, predictions.iloc[:1]])
    twice.iloc[5, twice.columns.get_loc("label")] = "tumour"
    with pytest.raises(ValueError, match=r"member 0 has slide 's00' more than once\n.*labels \['tumour'\] are not"):
        summarise(twice, plan, TWO)
    with pytest.raises(ValueError, match=r"members \[2\] are not in the plan"):
        summarise(predictions, plan[:2], TWO)


# --- files ----------------------------------------------------------------------------------------------------------


def test_page_of_two_classes(two):
    folder, metrics, _, _ = two
    page = check_page(folder)
    assert len(page.numbers) > 150
    pointers = {pointer for pointer, _ in page.numbers}
    for name in METRICS:
        assert f"/pooled_out_of_fold/metrics/{name}/low" in pointers
        assert f"/test/ensemble/metrics/{name}/value" in pointers
    assert "2 slides <dropped>" in page.text
    assert page.tags.count("svg") == 6
    assert "lr: 0.001" in page.text
    assert shown(metrics["test"]["ensemble"]["metrics"]["auc"]["value"]) in page.text


def test_page_of_three_classes(three):
    page = check_page(three[0])
    assert "/pooled_out_of_fold/per_class/LUSC/auc/value" in {pointer for pointer, _ in page.numbers}
    assert "macro" in page.text


def test_metrics_json_is_strict_and_equals_what_is_returned(two):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (two[0] / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == two[1]


def test_figures_show_something(two, three):
    for folder in (two[0], three[0]):
        for name in ("roc", "precision_recall", "calibration", "confusion", "loss", "auc"):
            with Image.open(folder / "figures" / f"{name}.png") as picture:
                assert np.asarray(picture.convert("L")).std() > 5


def test_same_input_same_bytes_and_matplotlibs_settings_are_left_alone(tmp_path):
    study = make_study(folds=2, n_train=24, n_test=0)
    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        report(tmp_path / name, study)
    assert dict(mpl.rcParams) == before
    for file in ("report.html", "metrics.json", "slides.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_text_of_the_user_is_escaped(tmp_path):
    classes = ["a<b", "_x/y~z", "$c$"]
    study = make_study(classes, folds=2)
    study[0]["slide"] = "<script>" + study[0]["slide"]
    report(tmp_path, study, classes, title="<b>&", environment={"<i>": {"a": [1, 2]}}, config_yaml="a: <u>")
    page = check_page(tmp_path)
    assert "<b>&" in page.text
    assert "<script>s" in page.text
    assert "u" not in page.tags
    assert page.tags.count("script") == 2, "the page's own"
    assert "/pooled_out_of_fold/per_class/_x~1y~0z/auc/value" in {pointer for pointer, _ in page.numbers}


def test_slides_table_lists_each_slide_once_the_most_wrong_first(two):
    folder, _, predictions, _ = two
    slides = pd.read_csv(folder / "slides.csv")
    assert sorted(slides["slide"]) == sorted(predictions["slide"].unique())
    assert slides["error"].is_monotonic_decreasing
    one = slides[slides["split"] == "test"].iloc[0]
    rows = predictions[predictions["slide"] == one["slide"]]
    p = expit(rows["logit_0"].to_numpy().mean())
    assert one["p_1"] == pytest.approx(p)
    assert one["error"] == pytest.approx(1 - p if one["label"] == "tumor" else p)
    assert one["sd"] == pytest.approx(np.std(rows["p_1"], ddof=1))
    assert (one["kind"], one["members"]) == ("test ensemble", 6)
    assert one["predicted"] == ("tumor" if p >= one["threshold"] else "normal")
    held = slides[slides["split"] == "train"]
    assert set(held["kind"]) == {"out-of-fold"}
    assert set(held["members"]) == {2}


def test_slides_table_takes_a_threshold_for_all():
    predictions, _, _ = make_study()
    assert set(slides_table(predictions, TWO, 0.0)["predicted"]) == {"tumor"}


def test_terminal_table_is_short_and_says_the_numbers(two):
    _, metrics, _, _ = two
    text = terminal_table(metrics)
    lines = text.splitlines()
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 120
    number = metrics["test"]["ensemble"]["metrics"]["auc"]
    assert f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]" in text
    assert "46 slides, 23 patients" in text
    spread = shown(metrics["test"]["over_members"]["auc"]["mean"])
    assert lines[-3].index(shown(number["value"])) == lines[-4].index(spread)  # below: trained again, one alone
    many = metrics | {"folds": [fold | {"repeat": r} for r in range(20) for fold in metrics["folds"]]}
    assert len(terminal_table(many).splitlines()) <= 17


def test_overview_compares_studies(tmp_path):
    studies = {
        name: summarise(predictions, plan, TWO, bootstrap=30)
        for name, (predictions, plan, _) in (
            ("abmil", make_study(strength=2.5)),
            ("mean pool", make_study(strength=0.5)),
        )
    }
    predictions, plan, _ = make_study(n_test=0)
    studies["alone"] = summarise(predictions, plan, TWO, bootstrap=0)
    text = write_overview(tmp_path, studies)
    page = check_page(tmp_path, links=True)
    assert [r for r in page.references if not r.startswith("#")] == [
        "abmil/report.html",
        "mean%20pool/report.html",
        "alone/report.html",
    ]
    for pointer, written in page.numbers:
        assert written == shown(at(studies, pointer))
    table = pd.read_csv(tmp_path / "comparison.csv").set_index("name")
    ensemble = studies["abmil"]["test"]["ensemble"]["metrics"]["auc"]
    for column, key in (("test_auc", "value"), ("test_auc_low", "low"), ("test_auc_high", "high")):
        assert table.loc["abmil", column] == pytest.approx(ensemble[key])
    folds = studies["abmil"]["cross_validation"]["metrics"]["auc"]
    assert table.loc["abmil", "cv_auc_sd"] == pytest.approx(folds["sd"])
    assert table["test_auc"].isna().loc["alone"]
    assert len(text.splitlines()) == 7
    assert (tmp_path / "figures" / "comparison.png").exists()
    for written in (text, (tmp_path / "comparison.md").read_text(), (tmp_path / "report.html").read_text()):
        assert "One setting each (lr 0.001, 4 epochs); a difference may be one of settings." in written
        assert "study.nested=5 study.grid.lr=" in written
    with pytest.raises(ValueError, match="at least one study"):
        write_overview(tmp_path, {})


def test_a_comparison_says_which_settings_it_compares():
    def study(*members: tuple[float, int], **also: Any) -> dict[str, Any]:
        rows = [{"lr": lr, "epochs": epochs} for lr, epochs in members]
        return {"folds": rows, "test": None} | also

    def said(**studies: dict[str, Any]) -> str:
        return " ".join(about_settings(studies)).partition(");")[0]

    assert said(a=study((0.1, 5)), b=study((0.1, 5))) == "One setting each (lr 0.1, 5 epochs"
    a, b, c = study((0.1, 5)), study((1e-5, 1)), study((0.1, 5), (0.1, 5))
    assert said(a=a, b=b, c=c) == "One setting each (lr 0.1, 5 epochs: a, c; lr 1e-05, 1 epoch: b"
    stopped = study((0.1, 5), (0.3, 7))
    assert said(a=stopped) == "One setting each (lr 0.1 to 0.3, 5 to 7 epochs"
    assert said(a=study(test={"members": [{"lr": 2.0, "epochs": 3}]})) == "One setting each (lr 2, 3 epochs"
    chosen = study((0.1, 5), nested={})
    assert about_settings({"a": chosen, "b": chosen}) == [], "inner folds chose"
    assert said(a=chosen, b=b) == "One setting each (lr 1e-05, 1 epoch: b"
    assert about_settings({"a": study()}) == [], "nothing was held out"
