"""Covariates: their scales, the linear term of every aggregator, what they are worth alone, and new slides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

import mil.predict
from extract.features.folder import open_feature_folder
from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators.batch import pack
from mil.aggregators.covariates import CovariateTerm
from mil.config import Task as TaskConfig
from mil.config import Train
from mil.look.tilescores import Verdicts, score_tiles
from mil.results.trained import open_run
from mil.study.covariates import (
    Covariate,
    covariates_of,
    found_in,
    moments,
    notes_on,
    notes_on_new,
    problems_of,
    raw_columns,
    spelling_problems,
)
from mil.tasks.table import task_of
from mil.train import main
from mil.training import objectives
from mil.training.bags import Bags, make_batch
from mil.training.covariates import CovariatesAlone, fit_alone
from mil.training.module import Members, MembersModule, fit

AGE, STAGE = Covariate("age"), Covariate("stage", ("I", "II", "III"))


@pytest.fixture
def table() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seven slides of four patients: what the cohort says, and two covariates."""
    slides = pd.DataFrame({"slide": [f"s{i}" for i in range(7)], "patient": list("aabbccd"), "split": ["train"] * 7})
    further = pd.DataFrame(
        {"age": ["50", "52", "60", "", "70", "70", "90"], "stage": ["I", "I", "II", "II", "", "", "III"]}
    )
    return slides, further.astype(object)


# --- columns and scales ----------------------------------------------------------------------------------------------


def test_numbers_stay_one_column_and_text_becomes_one_a_category(table):
    _, further = table
    assert found_in(further, ["age", "stage"]) == [AGE, STAGE]
    raw_SV = raw_columns([AGE, STAGE], further)
    assert raw_SV[0].tolist() == [50, 1, 0, 0]
    assert np.isnan(raw_SV[3, 0])
    assert np.isnan(raw_SV[4, 1:]).all()
    assert covariates_of([one.describe() for one in (AGE, STAGE)]) == [AGE, STAGE]


def test_scales_count_a_patient_once_and_know_the_training_patients_only(table):
    slides, further = table
    train_MS = np.array([[1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]], dtype=bool)
    mean_MV, scale_MV = moments([AGE, STAGE], raw_columns([AGE, STAGE], further), train_MS, slides["patient"].tolist())
    ages = np.array([51, 60, 70])  # a: mean of its slides; b: of those that say something
    assert mean_MV[0, 0] == pytest.approx(ages.mean())
    assert scale_MV[0, 0] == pytest.approx(1 / ages.std())
    assert mean_MV[0, 1:].tolist() == [0.5, 0.5, 0]  # of the two patients with a stage
    assert scale_MV[1, 0] == 0  # one patient: nothing varies


def test_missing_values_and_categories_that_a_member_has_not_seen_are_the_average_patient():
    term = CovariateTerm(2, [0, 3], 1)
    term.scale_by(
        torch.tensor([[60.0, 0.5, 0.5, 0], [50, 0.2, 0.3, 0.5]]), torch.tensor([[0.1, 1, 1, 1], [0.0, 1, 1, 1]])
    )
    nothing = [float("nan")] * 3
    scaled_MBV = term.scaled(torch.tensor([[70.0, 0, 0, 1], [float("nan"), 1, 0, 0], [40, *nothing]]))
    expected = [
        [[1, 0, 0, 0], [0, 0.5, -0.5, 0], [-2, 0, 0, 0]],  # member 0 has never seen III
        [[0, -0.2, -0.3, 0.5], [0, 0.8, -0.3, -0.5], [0, 0, 0, 0]],
    ]
    assert torch.allclose(scaled_MBV, torch.tensor(expected))


def test_a_column_that_tells_nothing_or_names_the_patient_is_refused(table):
    slides, further = table
    further = further.assign(
        same="x", empty="", name=["n1", "n1", "n2", "n2", "n3", "n3", "n4"], mixed=["1", "2", "3", "4", "5", "6", "old"]
    )
    names = ["same", "empty", "name"]
    said = problems_of(found_in(further, names), slides, further)
    assert ["'same' is 'x' for every slide" in said[0], "'empty' is empty" in said[1]] == [True, True]
    assert "a value of its own for every patient" in said[2]
    one_each = slides.assign(patient=slides["slide"])
    assert "numbers and text: 'old'" in problems_of(found_in(further, ["mixed"]), one_each, further)[0]
    many = pd.DataFrame({"word": [f"w{i % 30}" for i in range(60)]}, dtype=object)
    cohort = pd.DataFrame({"patient": [f"p{i}" for i in range(60)], "split": "train"})
    assert "30 categories" in problems_of(found_in(many, ["word"]), cohort, many)[0]
    assert spelling_problems(["age", "age"]) == ["columns.covariates: 'age' occurs twice"]


def test_what_is_missing_looks_like_an_identifier_or_differs_in_a_patient_is_noted(table):
    slides, further = table
    said = notes_on([AGE, STAGE], slides, further)
    assert "age: 1 slide of 7 without a value" in said[0]
    assert "differs between slides of 1 patient: 'a'" in said[1]
    numbers = pd.DataFrame({"id": [str(100 + i) for i in range(12)]}, dtype=object)
    cohort = pd.DataFrame({"patient": [f"p{i}" for i in range(12)]})
    assert "is it an identifier" in notes_on([Covariate("id")], cohort, numbers)[0]
    new = pd.DataFrame({"age": ["", "5"], "stage": ["IV", "I"]}, dtype=object)
    said = notes_on_new([AGE, STAGE], new)
    assert "age: 1 slide without a value" in said[0]
    assert "1 slide of a category that the study does not know: 'IV'" in said[1]


# --- members ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_term_is_added_to_the_outputs_of_every_aggregator_and_to_all_its_streams(name, small_options, bags_of):
    rng = np.random.default_rng(3)
    bags = bags_of([rng.normal(size=(n, 6)).astype(np.float32) for n in (9, 14, 11)])
    raw_SV = np.array([[60, 1, 0], [np.nan, 0, 1], [70, np.nan, np.nan]], dtype=np.float32)
    aggregator = aggregator_class(name)(6, 3, [0, 1], **small_options[name]).eval()
    uses_MB = np.ones((2, 3), dtype=bool)
    plain = aggregator(make_batch(bags, [0, 1, 2], np.array([0, 1, 2]), uses_MB))
    aggregator.add_covariates([0, 2])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        aggregator.covariates.weight.normal_(generator=generator)
    aggregator.covariates.scale_by(torch.tensor([[65.0, 0.5, 0.5]] * 2), torch.tensor([[0.2, 1, 1]] * 2))
    with_them = Bags(**{**vars(bags), "covariates_SV": raw_SV})
    batch = make_batch(with_them, [0, 1, 2], np.array([0, 1, 2]), uses_MB)
    found = aggregator(batch)
    z_BV = torch.tensor([[-1.0, 0.5, -0.5], [0, -0.5, 0.5], [1, 0, 0]])
    by_hand = plain.logits_MBC + torch.einsum("bv,mvc->mbc", z_BV, aggregator.covariates.weight)
    assert torch.allclose(found.logits_MBC, by_hand, atol=1e-5)
    readings = sum(weight * logits_MBC for weight, logits_MBC in aggregator.readings(found)[:2])
    if name == "dsmil":
        assert torch.allclose(readings, found.logits_MBC, atol=1e-5)
    aggregator.train().losses(aggregator(batch), batch.labels).sum().backward()
    assert (aggregator.covariates.weight.grad.abs().sum(dim=(1, 2)) > 0).all()
    unknown = aggregator.eval()(pack([bags.features(0)], 2)).logits_MBC  # nothing is known: the average patient
    assert torch.allclose(unknown[:, 0], plain.logits_MBC[:, 0], atol=1e-5)


@pytest.fixture
def noise(bags_of) -> Callable[..., tuple[Bags, np.ndarray, np.ndarray]]:
    """`noise(n, seed)`: bags of pure noise, classes that depend on two numbers, and these."""

    def make(n: int, seed: int) -> tuple[Bags, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        z_SV = rng.normal(size=(n, 2)).astype(np.float32)
        labels_S = (z_SV @ [1.5, -0.8] + rng.logistic(size=n) > 0).astype(np.int64)
        bags = bags_of([rng.normal(size=(rng.integers(5, 12), 6)).astype(np.float32) for _ in range(n)])
        return Bags(**{**vars(bags), "covariates_SV": z_SV * [12, 3] + [60, 5]}), labels_S, z_SV

    return make


def module_of(aggregator, bags, labels_S, train_MS, **train) -> MembersModule:
    n = len(train_MS)
    patients = [str(s) for s in range(len(bags))]
    aggregator.add_covariates([0, 0])
    covariates = [Covariate("a"), Covariate("b")]
    scales = moments(covariates, bags.covariates_SV, train_MS, patients)
    aggregator.covariates.scale_by(*map(torch.from_numpy, scales))
    members = Members(np.full(n, 0.01), np.zeros(n), train_MS, np.zeros_like(train_MS))
    settings = Train(**({"epochs": 3, "batch_size": 16, "accelerator": "cpu"} | train))
    return MembersModule(aggregator, bags, labels_S, 2, members, settings)


def test_covariates_alone_are_scikit_learns_logistic_regression_whoever_else_is_fitted(noise):
    bags, labels_S, _ = noise(150, 4)
    train_MS = np.random.default_rng(0).random((3, 150)) < 0.7
    module = module_of(CovariatesAlone(6, 1, [0, 1, 2]), bags, labels_S, train_MS)
    logits_MSC = fit_alone(module)
    for m, train_S in enumerate(train_MS):
        x_SV = (bags.covariates_SV - bags.covariates_SV[train_S].mean(axis=0)) / bags.covariates_SV[train_S].std(axis=0)
        reference = LogisticRegression(C=1.0, tol=1e-8).fit(x_SV[train_S], labels_S[train_S])
        assert np.allclose(logits_MSC[m, :, 0], reference.decision_function(x_SV), atol=5e-3)
    one = module_of(CovariatesAlone(6, 1, [1]), bags, labels_S, train_MS[1:2])
    assert np.allclose(fit_alone(one)[0], logits_MSC[1], atol=1e-5)


def test_covariates_alone_of_a_regression_are_ridge(noise):
    bags, _, z_SV = noise(80, 5)
    value_S = z_SV @ [2.0, 1.0] + np.random.default_rng(1).normal(size=80)
    slides = [f"s{i}" for i in range(80)]
    table = pd.DataFrame({"slide": slides, "patient": slides, "value": value_S})
    task = task_of(TaskConfig(name="regression"))
    cohort = type("Cohort", (), {"table": table, "classes": ("all",), "labels_S": np.zeros(80, dtype=np.int64)})
    train_MS = np.arange(80)[None] < 60
    aggregator = CovariatesAlone(6, 1, [0])
    aggregator.add_covariates([0, 0])
    scales = moments([Covariate("a"), Covariate("b")], bags.covariates_SV, train_MS, slides)
    aggregator.covariates.scale_by(*map(torch.from_numpy, scales))
    members = Members(np.ones(1), np.zeros(1), train_MS, np.zeros_like(train_MS))
    facts = task.facts(cohort, train_MS)
    module = objectives.module_of(task)(aggregator, bags, cohort, task, members, Train(accelerator="cpu"), facts)
    found_S = fit_alone(module)[0, :, 0]
    x_SV = (bags.covariates_SV - bags.covariates_SV[:60].mean(axis=0)) / bags.covariates_SV[:60].std(axis=0)
    y_S = (value_S - facts["mean"][0]) / facts["sd"][0]
    # the loss is (y - f)^2 or half of it, the ridge 1 / (2 n): alpha is 1/2 or 1
    errors = [np.abs(Ridge(a).fit(x_SV[:60], y_S[:60]).predict(x_SV) - found_S).max() for a in (0.5, 1.0)]
    assert min(errors) < 5e-3


def test_of_noise_a_member_reaches_what_logistic_regression_reaches(noise):
    bags, labels_S, z_SV = noise(300, 6)
    train_MS = np.arange(300)[None] < 200
    alone = module_of(CovariatesAlone(6, 1, [0]), bags, labels_S, train_MS)
    fit_alone(alone)
    module = module_of(aggregator_class("abmil")(6, 1, [0], hidden=6, attention=5), bags, labels_S, train_MS)
    module.aggregator.covariates.weight.data.copy_(alone.aggregator.covariates.weight.data)
    fit(module, progress=False)
    batch = make_batch(bags, list(range(200, 300)), labels_S, np.ones((1, 100), dtype=bool))
    with torch.inference_mode():
        found = roc_auc_score(labels_S[200:], module.aggregator.eval()(batch).logits_MBC[0, :, 0])
    reference = LogisticRegression().fit(z_SV[:200], labels_S[:200]).decision_function(z_SV[200:])
    assert found == pytest.approx(roc_auc_score(labels_S[200:], reference), abs=0.03)


@pytest.mark.parametrize("name", ["abmil", "dsmil", "chowder"])
def test_members_trained_together_equal_members_alone(noise, small_options, name):
    bags, labels_S, _ = noise(40, 7)
    train_MS = np.random.default_rng(2).random((3, 40)) < 0.7
    make = aggregator_class(name)
    together = module_of(make(6, 1, [5, 6, 7], **small_options[name]), bags, labels_S, train_MS)
    single = module_of(make(6, 1, [6], **small_options[name]), bags, labels_S, train_MS[1:2])
    for module in (together, single):
        fit(module, progress=False)
    batches = [make_batch(bags, list(range(40)), labels_S, np.ones((n, 40), dtype=bool)) for n in (3, 1)]
    with torch.inference_mode():
        found, reference = (m.aggregator.eval()(b).logits_MBC for m, b in zip((together, single), batches, strict=True))
    assert torch.allclose(found[1], reference[0], atol=1e-5)
    weights = [module.aggregator.covariates.weight for module in (together, single)]
    assert torch.allclose(weights[0][1], weights[1][0], atol=1e-5)


# --- whole studies ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick(no_figures):
    """Small studies, many of them: see conftest.py."""


@pytest.fixture(scope="module")
def study(tmp_path_factory, write_study) -> tuple[Path, list[str]]:
    """48 slides of noise, of which the class depends on age and stage."""
    folder = tmp_path_factory.mktemp("covariates")
    rng = np.random.default_rng(8)
    arrays = [rng.normal(size=(rng.integers(12, 20), 6)).astype(np.float16) for _ in range(48)]
    age_S, stage_S = rng.integers(40, 80, 48), rng.choice(["I", "II", "III"], 48)
    labels_S = (age_S - 60) / 8 + 2 * (stage_S == "III") + rng.logistic(size=48) * 0.4 > 0.5
    split = ["test" if i >= 40 else "train" for i in range(48)]
    arguments = write_study(
        folder, arrays, np.array(["normal", "tumor"])[labels_S.astype(int)], dtype="float16", split=split
    )
    table = pd.read_csv(folder / "cohort.csv").assign(age=age_S, stage=stage_S)
    months = np.where(labels_S, 5, 15) + rng.integers(0, 8, 48)
    table["time"], table["event"] = months, rng.random(48) < 0.8
    table["event"] = table["event"].astype(int)
    table.loc[3, "age"] = np.nan
    table.to_csv(folder / "cohort.csv", index=False)
    return folder, [
        *arguments, "columns.covariates=[age,stage]", "study.folds=2", "train.epochs=2", "train.accelerator=cpu",
        "report.bootstrap=40", "report.baselines=false", "report.heatmaps=1", "model.hidden=6", "model.attention=5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(study) -> Path:
    folder, arguments = study
    assert main([*arguments, f"out={folder / 'run'}"]) == 0
    return folder / "run"


def test_the_report_compares_with_without_and_alone_on_the_same_slides(run):
    block = json.loads((run / "metrics.json").read_text())["covariates"]
    assert [row["name"] for row in block["rows"]] == ["with", "without", "alone"]
    with_them, without, alone = (row["out_of_fold"] for row in block["rows"])
    gap = without["difference"]["difference"]
    assert gap == pytest.approx(with_them["metric"]["value"] - without["metric"]["value"])
    assert alone["metric"]["value"] > 0.85  # the class depends on them
    assert with_them["metric"]["value"] > 0.8 > without["metric"]["value"]
    assert "Covariates" in (run / "report.html").read_text()
    assert not (run / "without_covariates" / "checkpoints").exists()


def test_predicting_the_studys_own_test_slides_gives_the_same_and_new_ones_are_told_what_is_missing(
    study, run, tmp_path, capsys, refused
):
    folder, _ = study
    table = pd.read_csv(folder / "cohort.csv", dtype=str, keep_default_na=False)
    table.iloc[40:].assign(split="").to_csv(tmp_path / "new.csv", index=False)
    given = [f"run={run}", f"features.folder={folder}", "report.bootstrap=0"]
    assert mil.predict.main([*given, f"cohort={tmp_path / 'new.csv'}", f"out={tmp_path / 'new'}"]) == 0
    found = pd.read_csv(tmp_path / "new" / "members.csv").set_index(["member", "slide"])["logit_0"]
    own = pd.read_csv(run / "predictions.csv").set_index(["member", "slide"])["logit_0"].loc[found.index]
    assert np.allclose(found, own, atol=1e-5)
    table.iloc[40:].assign(stage="IV", age="").to_csv(tmp_path / "odd.csv", index=False)
    assert mil.predict.main([*given, f"cohort={tmp_path / 'odd.csv'}", f"out={tmp_path / 'odd'}"]) == 0
    said = capsys.readouterr().out
    assert "8 slides of a category that the study does not know: 'IV'" in said
    assert "age: 8 slides without a value" in said
    table.drop(columns="stage").to_csv(tmp_path / "less.csv", index=False)
    said = refused(mil.predict.main, *given, f"cohort={tmp_path / 'less.csv'}", f"out={tmp_path / 'less'}")
    assert "no column 'stage' (columns.covariates of the study)" in said
    table.assign(age="old").to_csv(tmp_path / "text.csv", index=False)
    said = refused(mil.predict.main, *given, f"cohort={tmp_path / 'text.csv'}", f"out={tmp_path / 'text'}")
    assert "age 'old', expected a number" in said
    said = refused(mil.predict.main, *given, f"out={tmp_path / 'none'}")
    assert "give cohort=FILE.csv with columns slide, age, stage" in said


def test_a_heatmap_of_the_studys_slide_has_the_probability_of_predictions_csv(study, run):
    trained = open_run(run)
    verdict = Verdicts(trained).on("slide_03")  # whose age is missing
    tiles_ND = open_feature_folder(study[0]).features("slide_03")
    scores = score_tiles(trained, "slide_03", tiles_ND, verdict)
    assert scores.verdict.p_C is not None
    new = score_tiles(trained, "elsewhere", tiles_ND, Verdicts(trained).on("elsewhere", elsewhere=True))
    assert "covariates as of an average patient" in new.verdict.kind


@pytest.mark.parametrize("task", ["survival", "ordinal"])  # of regression: covariates alone above, and fused encoders
def test_every_task_takes_covariates(study, tmp_path, task):
    _, arguments = study
    more = ["classes=[normal,tumor]"] if task == "ordinal" else []
    out = tmp_path / task
    assert main([*arguments, f"task={task}", *more, "report.bootstrap=3", "study.folds=2", f"out={out}"]) == 0
    block = json.loads((out / "metrics.json").read_text())["covariates"]
    assert [row["name"] for row in block["rows"]] == ["with", "without", "alone"]
    without = block["rows"][1]["out_of_fold"]
    gap = block["rows"][0]["out_of_fold"]["metric"]["value"] - without["metric"]["value"]
    assert without["difference"]["difference"] == pytest.approx(gap)
    assert "Covariates" in (out / "report.html").read_text()


def test_an_unknown_covariate_and_a_constant_one_stop_the_study(study, tmp_path, refused):
    folder, arguments = study
    said = refused(main, *arguments, "columns.covariates=[agee]", f"out={tmp_path / 'a'}")
    assert "no column 'agee' (columns.covariates); did you mean 'age'" in said
    table = pd.read_csv(folder / "cohort.csv").assign(age=50)
    table.to_csv(tmp_path / "same.csv", index=False)
    said = refused(main, *arguments, f"cohort={tmp_path / 'same.csv'}", f"out={tmp_path / 'b'}")
    assert "'age' is '50' for every slide" in said
