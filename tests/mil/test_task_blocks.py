"""What reports of survival, regression and ordinal studies say beside their metrics, found another way."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.nonparametric import kaplan_meier_estimator

from extract.cohort import Cohort
from mil.config import Task as TaskConfig
from mil.report.task_left_out_sites import gap
from mil.results.site_models import Slides
from mil.results.task_calibration import of_numbers, of_shares
from mil.results.task_conformal import (
    fit_task_scores,
    half_width,
    judged,
    read_task_scores,
    said_columns,
    task_conformal_blocks,
    write_task_scores,
)
from mil.results.task_confounding import association, scores_of, task_confounding, within_of
from mil.study.left_out_sites import left_out_plan
from mil.study.plan import make_plan
from mil.study.roles import PlanError
from mil.tasks.contract import Part
from mil.tasks.survival import Survival
from mil.tasks.table import task_of
from mil.training.task_ladder import ON_MEANS, fit_task_ladder, time_without_event
from mil.training.task_ladder_saved import load_task_ladder, save_task_ladder

GRADES = ("low", "mid", "high")
REGRESSION, ORDINAL = task_of(TaskConfig(name="regression")), task_of(TaskConfig(name="ordinal"), GRADES)
SURVIVAL = task_of(TaskConfig(name="survival", horizons=[2.0, 4.0]))


# --- baselines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(bags_of):
    """60 slides whose first tile tells a number: features, the number, rounds."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=60)
    arrays = [rng.normal(size=(rng.integers(3, 20), 5)).astype(np.float32) for _ in hidden]
    for bag_TD, number in zip(arrays, hidden, strict=True):
        bag_TD[0, 2] = 5 + 2 * number
    train_RS = np.stack([np.arange(60) % 3 != fold for fold in range(2)])
    return bags_of(arrays), hidden, train_RS


def ladder_of(task: str, planted):
    bags, hidden, train_RS = planted
    time = np.exp(-hidden) * 10
    targets = {
        "regression": {"value": hidden},
        "ordinal": {"label": np.digitize(hidden, [-0.5, 0.5])},
        "survival": {"time": time, "event": (np.arange(60) % 4 > 0).astype(float)},
    }[task]
    return fit_task_ladder(
        task, bags, targets, 3 if task == "ordinal" else 0, train_RS, np.array([0, 1, 1]), 0
    ), targets


def said_of(ladder, bags):
    tiles = np.stack([ladder.of_tiles(bags.features(s).numpy()) for s in range(len(bags))])
    return ladder.said(bags.means_SD, tiles)


def test_rungs_on_means_are_what_other_libraries_give(planted):
    bags, hidden, train_RS = planted
    ladder, _ = ladder_of("regression", planted)
    said, train_S = said_of(ladder, bags), train_RS[1]
    scaler = StandardScaler().fit(bags.means_SD[train_S])
    x_ND, x_SD = scaler.transform(bags.means_SD[train_S]), scaler.transform(bags.means_SD)
    wanted = Ridge(alpha=100).fit(x_ND, hidden[train_S]).predict(x_SD)
    assert said["mean_linear"][1]["prediction"] == pytest.approx(wanted)
    wanted = KNeighborsRegressor(15, weights="distance").fit(x_ND, hidden[train_S]).predict(x_SD)
    assert said["mean_knn"][1]["prediction"] == pytest.approx(wanted)


def test_ridge_in_principal_components_is_ridge_of_the_features(planted):
    """All five components are kept, so the penalised Cox model is the one of the standardised features."""
    bags, _, train_RS = planted
    ladder, targets = ladder_of("survival", planted)
    found, train_S = said_of(ladder, bags)["mean_linear"][0]["risk"], train_RS[0]
    scaler = StandardScaler().fit(bags.means_SD[train_S])
    truth = np.array(list(zip(targets["event"] == 1, targets["time"], strict=True)), dtype=[("e", bool), ("t", float)])
    model = CoxPHSurvivalAnalysis(alpha=100, ties="efron").fit(scaler.transform(bags.means_SD[train_S]), truth[train_S])
    assert found == pytest.approx(model.predict(scaler.transform(bags.means_SD)), abs=1e-4)


def test_time_without_an_event_is_the_area_below_the_curve():
    event, time = np.array([True, False, True]), np.array([1.0, 2.0, 3.0])
    assert time_without_event(event, time, 4.0) == pytest.approx(1 + 2 * (2 / 3) + 0)
    assert time_without_event(event, time, 2.0) == pytest.approx(1 + 2 / 3)
    assert time_without_event(np.array([False, False]), time[:2], 4.0) == 4.0


def test_the_rung_on_tiles_finds_the_tile_and_is_on_the_targets_scale(planted):
    bags, hidden, train_RS = planted
    said = said_of(ladder_of("regression", planted)[0], bags)["tile_linear"][0]["prediction"]
    train_S = train_RS[0]
    assert np.corrcoef(said[~train_S], hidden[~train_S])[0, 1] > 0.3
    slope, intercept = np.polyfit(said[train_S], hidden[train_S], 1)
    assert (slope, intercept) == pytest.approx((1, 0), abs=1e-3)


@pytest.mark.parametrize("task", list(ON_MEANS))
def test_a_saved_ladder_says_the_same(task, planted, tmp_path):
    bags = planted[0]
    ladder, _ = ladder_of(task, planted)
    save_task_ladder(tmp_path, ladder)
    again = load_task_ladder(tmp_path, task, 3, 5, 3 if task == "ordinal" else 0)
    for a, b in zip(said_of(ladder, bags).values(), said_of(again, bags).values(), strict=True):
        for one, other in zip(a, b, strict=True):
            assert all(one[name] == pytest.approx(other[name], abs=1e-3) for name in one)
    with pytest.raises(ValueError, match="expected"):
        load_task_ladder(tmp_path, task, 4, 5, 3 if task == "ordinal" else 0)


# --- conformal -------------------------------------------------------------------------------------------------------


def predictions_of(n: int, rng: np.random.Generator, task: str = "regression") -> pd.DataFrame:
    """predictions.csv of two folds and a test split, one slide a patient."""
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(n)], "patient": [f"p{i}" for i in range(n)], "label": "x"})
    table["split"] = np.where(np.arange(n) % 3 == 2, "test", "train")
    table["value"] = rng.normal(size=n)
    table["prediction"] = table["value"] + rng.normal(size=n)
    if task == "ordinal":
        above = 1 / (1 + np.exp(-3 * (table["prediction"].to_numpy()[:, None] - [-0.5, 0.5])))
        table["label"] = np.array(GRADES)[np.digitize(table["value"], [-0.5, 0.5])]
        table[["p_0", "p_1", "p_2"]] = np.stack([1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1]], axis=1)
    rows = []
    for fold in (0, 1):
        held = (np.arange(n) % 3 == fold) | (table["split"] == "test")
        rows.append(table.assign(member=fold, repeat=0, fold=fold, seed=0, role=np.where(held, "test", "train")))
    return pd.concat(rows, ignore_index=True)


def test_intervals_hold_new_targets_as_often_as_they_say():
    """20 studies of 60 out-of-fold residuals: 0.9 on average, between studies with a standard deviation of 0.04."""
    rng, inside = np.random.default_rng(1), []
    for _ in range(20):
        scores = fit_task_scores(REGRESSION, predictions_of(90, rng), 0.9, 0)
        assert len(scores.residuals) == 60
        inside.append(np.mean(np.abs(rng.normal(size=2000)) <= half_width(scores.residuals, 0.9)))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.03)


def test_a_half_width_is_the_residual_of_its_rank():
    """With n residuals the one of rank ceil(0.9 (n + 1)) (Lei et al. 2018); with fewer than 9 there is no end."""
    residuals = np.arange(1.0, 20.0)
    assert half_width(residuals.tolist(), 0.9) == 18.0
    assert half_width([1.0] * 8, 0.9) == np.inf


def test_what_is_said_of_a_fold_comes_from_the_others_and_is_written_for_new_slides(tmp_path):
    predictions = predictions_of(45, np.random.default_rng(2))
    scores = fit_task_scores(REGRESSION, predictions, 0.8, 0)
    table, own = judged(REGRESSION, scores, predictions, 0)["pooled_out_of_fold"]
    for rows, fitted in own:
        others = table[~rows]
        assert fitted.residuals == pytest.approx(sorted((others["prediction"] - others["value"]).abs()))
    write_task_scores(tmp_path, scores)
    assert read_task_scores(tmp_path) == scores
    block = task_conformal_blocks(REGRESSION, scores, predictions, 0)["conformal_intervals"]
    assert block["sets"]["test"]["width"] == pytest.approx(2 * half_width(scores.residuals, 0.8))
    said = said_columns(REGRESSION, scores, predictions.head(3), 0.8)
    assert (said["high"] - said["low"]).tolist() == pytest.approx([block["sets"]["test"]["width"]] * 3)
    (tmp_path / "conformal.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        read_task_scores(tmp_path)


def test_grades_have_sets_and_survival_has_none():
    predictions = predictions_of(150, np.random.default_rng(3), "ordinal")
    scores = fit_task_scores(ORDINAL, predictions, 0.8, 0)
    block = task_conformal_blocks(ORDINAL, scores, predictions, 0)["conformal"]
    assert block["sets"]["test"]["covered"]["value"] == pytest.approx(0.8, abs=0.15)
    assert set(block["patients_per_class"]) == set(GRADES)
    assert fit_task_scores(SURVIVAL, predictions, 0.8, 0) is None


# --- calibration -----------------------------------------------------------------------------------------------------


def test_slope_and_intercept_are_those_of_a_straight_line_and_hold_the_truth():
    rng, held = np.random.default_rng(4), []
    for _ in range(60):
        said = rng.normal(size=80)
        table = pd.DataFrame({"prediction": said, "value": 0.5 * said + 1 + rng.normal(size=80)})
        found = of_numbers(table.assign(patient=[f"p{i}" for i in range(80)]))
        assert found["slope"]["value"] == pytest.approx(np.polyfit(said, table["value"], 1)[0])
        assert found["intercept"]["value"] == pytest.approx((table["value"] - said).mean())
        held.append(found["slope"]["low"] <= 0.5 <= found["slope"]["high"])
    assert 0.85 <= np.mean(held) <= 1.0
    assert sum(one["slides"] for one in found["bins"]) == 80


def test_shares_at_a_horizon_are_kaplan_and_meiers():
    rng = np.random.default_rng(5)
    task = task_of(TaskConfig(name="survival", loss="discrete", horizons=[1.0, 3.0]))
    assert isinstance(task, Survival)
    table = pd.DataFrame({"time": rng.exponential(2, 90), "event": rng.integers(0, 2, 90).astype(float)})
    share = rng.uniform(0.2, 0.9, 90)
    for g in range(len(task.grid())):
        table[f"survival_{g}"] = share - 0.01 * g
    found = of_shares(task, table.assign(patient=[f"p{i}" for i in range(90)]))["horizons"][1]
    time, wanted = kaplan_meier_estimator(table["event"] == 1, table["time"])
    assert found["all"]["value"] == pytest.approx(wanted[time <= 3.0][-1])
    assert found["all"]["low"] < found["all"]["value"] < found["all"]["high"]
    assert found["all"]["predicted"] == pytest.approx(share.mean() - 0.11)
    groups = found["groups"]
    assert [group["patients"] for group in groups] == pytest.approx([22, 23, 22, 23], abs=1)
    assert sorted(group["predicted"] for group in groups) == [group["predicted"] for group in groups]


# --- sites -----------------------------------------------------------------------------------------------------------


def test_martingale_residuals_are_those_of_the_null_model():
    """By hand: hazards 1/4 at 1 and 1/2 at 3; a censored patient has what was summed up until then."""
    targets = {"time": np.array([1.0, 2.0, 3.0, 4.0]), "event": np.array([1.0, 0.0, 1.0, 0.0])}
    assert scores_of("survival", targets) == pytest.approx([0.75, -0.25, 0.25, -0.75])


def test_sites_that_tell_nothing_are_flagged_rarely_and_those_that_tell_always():
    """40 cohorts without: 0.8 expected at p < 0.02, 4 or more with a chance of 1 %; the size is asked for besides."""
    rng = np.random.default_rng(6)
    site = np.repeat([1, 2, 3], 20)
    clean = [association(site, rng.exponential(size=60), seed).flagged for seed in range(40)]
    tied = [association(site, rng.normal(size=60) + 1.2 * site, seed).flagged for seed in range(5)]
    assert sum(clean) <= 3
    assert all(tied)


def test_within_sites_is_free_of_the_sites():
    """Prediction and target follow the site and nothing else: over all they go together, within sites they do not."""
    rng = np.random.default_rng(7)
    site = np.repeat([1, 2], 100)
    table = pd.DataFrame({"patient": [f"p{i}" for i in range(200)], "value": 3 * site + rng.normal(size=200)})
    table["prediction"] = 3.0 * site + rng.normal(size=200)
    part, ones = Part(table, table), np.ones((1, 200))
    own = [np.corrcoef(table["value"][site == k], table["prediction"][site == k])[0, 1] for k in (1, 2)]
    assert within_of(REGRESSION, [part], site, [1, 2], ones)[0] == pytest.approx(np.mean(own))
    assert abs(np.mean(own)) < 0.2 < np.corrcoef(table["value"], table["prediction"])[0, 1]


@pytest.mark.parametrize("name", ["regression", "ordinal", "survival"])
def test_the_block_warns_where_the_site_gives_the_target_away(name):
    rng, n = np.random.default_rng(8), 90
    site_S, task = np.arange(n) % 3 + 1, {"regression": REGRESSION, "ordinal": ORDINAL, "survival": SURVIVAL}[name]
    means_SD = rng.normal(size=(n, 6)) + 2.0 * np.eye(6)[site_S]
    number = 1.5 * site_S + rng.normal(size=n)
    targets = {
        "regression": {"value": number},
        "ordinal": {"label": np.digitize(number, [2.5, 3.5])},
        "survival": {"time": np.exp(-number) * 100, "event": np.ones(n)},
    }[name]
    patients = np.array([f"p{i}" for i in range(n)])
    slides = Slides(means_SD, site_S, np.zeros(n, dtype=np.int64), patients, ["A", "B", "C"])
    rounds = [(np.arange(n) % 2 != fold, np.arange(n) % 2 == fold) for fold in (0, 1)]
    table = pd.DataFrame({"patient": patients, "prediction": number, "standing": number, "risk": number, **targets})
    table[["p_0", "p_1", "p_2"]] = np.eye(3)[np.digitize(number, [2.5, 3.5])]
    if name == "ordinal":
        table["label"] = np.array(GRADES)[targets["label"]]
    block = task_confounding(
        task, slides, targets, rounds, [Part(table, table)], harmonize="none", resamples=20, seed=0
    )
    assert block["target_by_site"]["flagged"]
    assert block["target_by_site"]["metric"] > (0.3 if name != "survival" else 0.65)
    assert "site alone predicts the target" in block["warnings"][0]
    assert block["ways"][0]["site"]["value"] > 0.8
    assert block["within"]["within"]["value"] == pytest.approx(1.0)
    assert sum(row["slides"] for row in block["table"]) == n
    assert len(block["left_out"]["groups"]) == 3


def test_a_site_is_left_out_where_the_others_have_events():
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(24)], "patient": [f"p{i}" for i in range(24)]})
    table = table.assign(
        split="train", path=None, mpp=np.nan, site=np.repeat(["A", "B", "C"], 8), time=1.0 + np.arange(24)
    )
    table["event"] = (table["site"] == "A").astype(float)
    table["label"] = np.where(table["event"] == 1, "event", "censored")
    cohort = Cohort(table, ("censored", "event"), target="survival")
    one = make_plan(cohort, folds=2, lr=0.1, weight_decay=0.0)
    with pytest.raises(PlanError, match="leave-one-site-out is impossible"):
        left_out_plan(one, cohort, first=2, val_fraction=0, split_seed=0, site_preserving=False)
    table.loc[table["site"] == "B", "event"] = np.tile([0.0, 1.0], 4)
    both = Cohort(table, ("censored", "event"), target="survival")
    found = left_out_plan(one, both, first=2, val_fraction=0, split_seed=0, site_preserving=False)
    assert found.site_M == ("A", "B")
    assert found.not_left_out == {"C": "the site has no event"}


def test_a_gap_of_a_study_and_itself_is_nothing():
    rng = np.random.default_rng(9)
    table = pd.DataFrame({"patient": [f"p{i}" for i in range(30)], "value": rng.normal(size=30)})
    table["prediction"] = table["value"] + rng.normal(size=30)
    halves = [Part(table[:15], table), Part(table[15:].reset_index(drop=True), table)]
    found = gap(REGRESSION, [Part(table, table)], halves, 50, 0)
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0, 0, 0), abs=1e-12)
