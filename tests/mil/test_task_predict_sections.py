"""Every section of a report on new slides of survival, regression and ordinal studies: one number of each, computed
apart from predictions.csv, the cohort's table and the study's files alone."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import cohen_kappa_score
from sklearn.preprocessing import StandardScaler
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.metrics import concordance_index_censored
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

import mil
import mil.predict
import mil.report.page
import mil.report.task_page
import mil.train

N, FIRST_NEW, DIM = 130, 60, 6
GRADES = ["low", "mid", "high"]
TASKS = {
    "survival": ["task=survival", "task.loss=discrete", "task.intervals=3", "task.horizons=[1]", "study.unit=slide"],
    "regression": ["task=regression", "columns.label=value"],
    "ordinal": ["task=ordinal", "columns.label=grade", f"classes=[{','.join(GRADES)}]"],
}
QUICK = ["study.folds=2", "train.epochs=12", "train.lr=0.05", "train.accelerator=cpu", "model.name=mean"]
QUICK += ["report.heatmaps=0", "report.bootstrap=20", "report.subgroups=[site,age>=65]", "report.coverage=0.8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_study):
    """60 slides to train on and 70 new ones, of which the last two have no target; a fifth of the patients have two."""
    folder, rng = tmp_path_factory.mktemp("sections"), np.random.default_rng(5)
    patients = [f"{'p' if i < FIRST_NEW else 'q'}{i if i % 5 else i + 1}" for i in range(N)]
    hidden = pd.Series(rng.normal(size=N)).groupby(patients).transform("first").to_numpy()
    noise = pd.Series(rng.normal(size=N)).groupby(patients).transform("first").to_numpy()
    site = pd.Series(rng.integers(0, 2, N)).groupby(patients).transform("first").to_numpy()
    hidden = hidden + site  # so that the site tells the target
    arrays = []
    for number, k in zip(hidden, site, strict=True):
        bag_TD = rng.normal(size=(rng.integers(4, 9), DIM)).astype(np.float32)
        bag_TD[:, 0] += number
        bag_TD[:, 1] += 3 * k
        arrays.append(bag_TD)
    arguments = write_study(folder, arrays, ["x"] * N, patients=patients)
    target = hidden + 0.5 * noise
    table = pd.read_csv(folder / "cohort.csv").drop(columns="label")
    table["value"], table["grade"] = (10 + 4 * target).round(3), np.array(GRADES)[np.digitize(target, [0, 1])]
    table["time"] = (2 * np.exp(-target)).clip(0.01).round(3)
    table["event"] = pd.Series((rng.random(N) < 0.7).astype(float)).groupby(patients).transform("first")
    table["site"], table["age"] = np.array(["north", "south"])[site], 40 + np.arange(N) % 50
    table[:FIRST_NEW].to_csv(folder / "cohort.csv", index=False)
    new = table[FIRST_NEW:].drop(columns="split").astype({"value": object, "grade": object})
    new.loc[new.index[-2:], ["value", "grade", "time", "event"]] = np.nan
    new.to_csv(folder / "new.csv", index=False)
    means = {f"slide_{i:02d}": array.mean(axis=0, dtype=np.float64) for i, array in enumerate(arrays)}
    return folder, arguments, new, pd.DataFrame(means).T


@pytest.fixture(scope="module", params=TASKS)
def predicted(request, data, tmp_path_factory):
    """Task, run, predicted folder, metrics.json, page, and predictions.csv with the cohort's columns, known ones."""
    folder, arguments, new, _ = data
    out = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for module in (mil.report.page, mil.report.task_page):
            patch.setattr(module, "shown_figures", lambda *fixed, **named: [])
        assert mil.train.main([*arguments, *QUICK, *TASKS[request.param], f"out={out / 'run'}"]) == 0
        asked = [f"run={out / 'run'}", f"cohort={folder / 'new.csv'}", f"features.folder={folder}", "device=cpu"]
        assert mil.predict.main([*asked, "report.bootstrap=20", f"out={out / 'p'}"]) == 0
    table = pd.read_csv(out / "p" / "predictions.csv").set_index("slide")
    known = table.assign(site=new.set_index("slide")["site"], age=new.set_index("slide")["age"]).iloc[:-2]
    metrics = json.loads((out / "p" / "metrics.json").read_text())
    return request.param, out / "run", metrics, (out / "p" / "report.html").read_text(), known.reset_index()


def main_metric(task: str, table: pd.DataFrame) -> float:
    """The task's main metric of rows of predictions.csv."""
    if task == "regression":
        return float(np.corrcoef(table["value"], table["prediction"])[0, 1])
    if task == "ordinal":
        truth, said = (table[name].map(GRADES.index) for name in ("label", "predicted"))
        return float(cohen_kappa_score(truth, said, weights="quadratic", labels=[0, 1, 2]))
    one = of_patients(table)
    return float(concordance_index_censored(one["event"] == 1, one["time"], one["standing"])[0])


def of_patients(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby("patient").mean(numeric_only=True)


def test_the_sections_of_the_studys_own_report_are_there(predicted):
    task, run, metrics, page, _ = predicted
    own = json.loads((run / "metrics.json").read_text())
    wanted = {"flow", "encoder_seen", "baselines", "task_calibration", "confounding", "subgroups"}
    wanted |= {"regression": {"conformal_intervals"}, "ordinal": {"conformal"}, "survival": set()}[task]
    assert wanted <= set(own)
    assert wanted <= set(metrics)
    for name in wanted:
        assert f'<section id="{name}">' in page, name
    assert metrics["flow"]["unlabelled"]["slides"] == 2
    assert metrics["flow"]["new"]["slides"] == N - FIRST_NEW - 2


def test_metrics_and_sub_groups_are_of_their_rows(predicted):
    task, _, metrics, _, known = predicted
    main = metrics["task"]["main"]
    assert metrics["test"]["ensemble"]["metrics"][main]["value"] == pytest.approx(main_metric(task, known))
    site, age = metrics["subgroups"]["sets"]["new"]
    assert (site["name"], age["name"]) == ("site", "age>=65")
    north = next(group for group in site["groups"] if group["name"] == "north")
    own = known[known["site"] == "north"]
    assert north["counts"]["slides"] == len(own)
    assert north["metrics"][main]["value"] == pytest.approx(main_metric(task, own))
    old = next(group for group in age["groups"] if group["name"] == "age >= 65")
    assert old["counts"]["slides"] - old["counts"]["unlabelled"] == (known["age"] >= 65).sum()


def test_predicted_against_observed_is_of_the_new_slides(predicted):
    task, _, metrics, _, known = predicted
    (name, found), *others = metrics["task_calibration"]["sets"].items()
    assert (name, others) == ("test", [])
    if task == "regression":
        assert found["slope"]["value"] == pytest.approx(np.polyfit(known["prediction"], known["value"], 1)[0])
    elif task == "ordinal":
        p, over = known["p_high"].to_numpy(), (known["label"] == "high").to_numpy()
        bin_of = np.minimum((p * 10).astype(int), 9)
        ece = sum(abs((over[bin_of == b] - p[bin_of == b]).sum()) for b in range(10)) / len(known)
        assert found["cuts"]["high"]["ece"] == pytest.approx(ece, abs=1e-6)
    else:
        one, (horizon,) = of_patients(known), found["horizons"]
        times, share = kaplan_meier_estimator(one["event"] == 1, one["time"])
        assert horizon["time"] == 1
        assert horizon["all"]["value"] == pytest.approx(share[np.searchsorted(times, 1.0, side="right") - 1])
        assert horizon["all"]["predicted"] == pytest.approx(one["survival_at_1"].mean())
        assert sum(group["patients"] for group in horizon["groups"]) == len(one)


def test_coverage_is_of_the_new_slides(predicted):
    task, run, metrics, _, known = predicted
    if task == "survival":
        assert "conformal" not in metrics
        return
    scores = json.loads((run / "conformal.json").read_text())
    if task == "regression":
        block, n = metrics["conformal_intervals"], len(scores["residuals"])
        half = scores["residuals"][int(np.ceil(0.8 * (n + 1) - 1e-9)) - 1]
        inside = (known["prediction"] - known["value"]).abs() <= half
        assert known["high"].to_numpy() - known["low"].to_numpy() == pytest.approx(2 * half)
        covered = block["sets"]["test"]["covered"]
    else:
        block = metrics["conformal"]
        inside = [
            label in said.strip("{}").split(", ")
            for label, said in zip(known["label"], known["conformal_set"], strict=True)
        ]
        covered = block["sets"]["test"]["covered"]
    assert covered["value"] == pytest.approx(np.mean(inside))
    assert block["coverage"] == 0.8
    assert list(block["sets"]) == ["test"]


def test_sites_are_those_of_the_new_slides(predicted):
    task, _, metrics, _, known = predicted
    block = metrics["confounding"]
    tied = block["target_by_site"]
    assert block["left_out"] is None
    assert block["ways"][0]["metric"] is None
    assert tied["flagged"]
    assert tied["patients"] == known["patient"].nunique()
    assert block["ways"][0]["site"]["value"] > 0.9
    assert {row["site"]: row["slides"] for row in block["table"]} == known["site"].value_counts().to_dict()
    if task == "regression":  # squared correlation ratio less what chance adds
        one = known.groupby("patient").agg({"value": "mean", "site": "first"})
        between = sum(len(own) * (own.mean() - one["value"].mean()) ** 2 for _, own in one.groupby("site")["value"])
        whole, n = ((one["value"] - one["value"].mean()) ** 2).sum(), len(one)
        assert tied["epsilon_squared"] == pytest.approx(1 - (1 - between / whole) * (n - 1) / (n - 2))
    parts = [own for _, own in known.groupby("site")]
    if task == "survival":
        pairs = [
            concordance_index_censored((o := of_patients(p))["event"] == 1, o["time"], o["standing"]) for p in parts
        ]
        within = sum(c[1] + c[3] / 2 for c in pairs) / sum(sum(c[1:4]) for c in pairs)
    else:
        within = np.average([main_metric(task, own) for own in parts], weights=[len(own) for own in parts])
    assert block["within"]["within"]["value"] == pytest.approx(within)


def test_baselines_are_the_studys_asked_about_the_new_slides(predicted, data):
    """The first rung fitted again to the means of each fold's training slides; folds averaged."""
    task, run, metrics, _, known = predicted
    roles, means = pd.read_csv(run / "roles.csv").set_index("slide"), data[3]
    cohort = pd.read_csv(data[0] / "cohort.csv").set_index("slide")
    said = []
    for member in ("m0", "m1"):
        own = cohort.loc[roles.index[roles[member] == "train"]]
        scaler = StandardScaler().fit(means.loc[own.index])
        said.append(
            linear(task, scaler.transform(means.loc[own.index]), own, scaler.transform(means.loc[known["slide"]]))
        )
    mean = np.mean(said, axis=0)
    if task == "ordinal":
        above = 1 - np.cumsum(mean, axis=1)[:, :-1]
        table = known.assign(predicted=np.array(GRADES)[(above > 0.5).sum(axis=1)])
    else:
        table = known.assign(**{"prediction" if task == "regression" else "standing": mean})
    main, block = metrics["task"]["main"], metrics["baselines"]
    rung = block["rungs"][0]
    assert (block["new"], rung["name"], "out_of_fold" in rung) == (True, "mean_linear", False)
    assert rung["test"]["metrics"][main]["value"] == pytest.approx(main_metric(task, table), abs=1e-6)
    assert rung["test"]["difference"]["value_a"] == pytest.approx(main_metric(task, known))


def linear(task: str, x_ND: np.ndarray, own: pd.DataFrame, asked_ND: np.ndarray) -> np.ndarray:
    if task == "regression":
        return Ridge(alpha=100).fit(x_ND, own["value"]).predict(asked_ND)
    if task == "ordinal":
        return LogisticRegression(C=0.01).fit(x_ND, own["grade"].map(GRADES.index)).predict_proba(asked_ND)
    truth = Surv.from_arrays(own["event"] == 1, own["time"])
    model = CoxPHSurvivalAnalysis(alpha=100, ties="efron").fit(x_ND, truth)
    risk, before = model.predict(asked_ND), model.predict(x_ND)
    return (risk - np.median(before)) / before.std()
