"""Calibration, operating points and conformal sets against planted truth, brute force and scikit-learn."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import sklearn
from packaging.version import Version
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import confusion_matrix, log_loss

from mil.config import Report
from mil.results.calibration import Map, calibrate, fit_isotonic, fit_map, fit_temperature
from mil.results.conformal import coverage_block, one_a_patient, p_values, scores_of, set_names, sets_of
from mil.results.crossfit import out_of_fold, source_of
from mil.results.decision_blocks import calibration_block, conformal_block, operating_block
from mil.results.decisions import (
    FILE,
    OUT_OF_FOLD,
    TEST,
    called_columns,
    fit_decisions,
    judge_study,
    read_decisions,
    slide_columns,
    write_decisions,
)
from mil.results.operating import CURVE, choose, decision_curve, point_block, ratio_of
from mil.results.readback import ReadbackError
from mil.results.reliability import quantile_bins, slope_and_intercept, squared_error
from mil.results.tables import predictions_table

POINTS = Report().operating_points


def study(
    *,
    n_classes: int = 2,
    n_slides: int = 90,
    folds: int = 3,
    repeats: int = 1,
    seeds: int = 1,
    val: bool = False,
    test: int = 30,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[pd.DataFrame, list[str]]:
    """predictions.csv of a made-up study: patients of one to three slides, calibrated logits times `temperature`.

    Every third patient that is in no split of test has a slide without label; unlabelled ones are `unused`.
    """
    rng = np.random.default_rng(seed)
    n_all = n_slides + test
    patient_S = np.repeat(np.arange(n_all), rng.integers(1, 4, n_all))[:n_all]
    patient_S[n_slides:] += 1000
    label_S = rng.integers(0, n_classes, n_all)
    unlabelled_S = np.arange(n_all) % 17 == 5
    classes = [f"class {c}" for c in range(n_classes)]
    table = pd.DataFrame(
        {
            "slide": [f"s{i:03d}" for i in range(n_all)],
            "patient": [f"p{p}" for p in patient_S],
            "label": [None if no else classes[c] for c, no in zip(label_S, unlabelled_S, strict=True)],
            "split": np.where(np.arange(n_all) < n_slides, "train", "test"),
        }
    )
    own_SC = softmax_logits(rng, label_S, n_classes)
    rows, roles, logits = [], [], []
    for repeat in range(repeats):
        fold_P = rng.permutation(2000) % folds
        for fold in range(folds):
            held_S = fold_P[patient_S] == fold
            role_S = np.where(held_S | (folds == 1), "test", "train").astype(object)
            if folds == 1:
                role_S[:] = "train"
            if val:
                role_S[(role_S == "train") & (rng.permutation(2000)[patient_S] % 3 == 0)] = "val"
            role_S[unlabelled_S] = "unused"
            role_S[n_slides:] = "test"
            for member_seed in range(seeds):
                rows.append((len(rows), repeat, fold, member_seed))
                roles.append(role_S)
                noisy_SC = (own_SC + rng.normal(0, 0.2, own_SC.shape)) * temperature
                logits.append(noisy_SC[:, 1:] - noisy_SC[:, :1] if n_classes == 2 else noisy_SC)
    members = pd.DataFrame(rows, columns=["member", "repeat", "fold", "seed"])
    return predictions_table(members, table, np.array(roles), np.array(logits)), classes


def softmax_logits(rng: np.random.Generator, label_S: np.ndarray, n_classes: int) -> np.ndarray:
    """Logits whose softmax is the true probability of the label: unit normals with the true class 2 higher."""
    logits_SC = rng.normal(size=(len(label_S), n_classes))
    logits_SC[np.arange(len(label_S)), label_S] += 1.0
    return logits_SC


KINDS = {
    "plain": {},
    "val": {"val": True},
    "three classes": {"n_classes": 3},
    "three classes, val": {"n_classes": 3, "val": True, "n_slides": 150},
    "repeats and seeds": {"repeats": 2, "seeds": 2},
    "no test split": {"test": 0},
    "only val and test": {"folds": 1, "val": True},
}


# --- nothing of its own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("plain", "isotonic"),
        ("val", "temperature"),
        ("three classes", "temperature"),
        ("repeats and seeds", "isotonic"),
    ],
)
def test_what_is_said_of_a_slide_does_not_depend_on_its_patients_labels(kind, method):
    """Every label of a patient changed: the other slides' results may move, the patient's own do not."""
    predictions, classes = study(**KINDS[kind])
    report, moved = Report(calibrate=method), Counter()
    before = judge_study(fit_decisions(predictions, classes, report, 3), predictions, POINTS, 3)
    patients = predictions["patient"][predictions["label"].notna()].drop_duplicates().tolist()
    for patient in patients[::13][:3]:
        rows = predictions["patient"] == patient
        named = dict(zip(classes, classes[1:] + classes[:1], strict=True))
        flipped = predictions.assign(label=predictions["label"].where(~rows, predictions["label"].map(named)))
        after = judge_study(fit_decisions(flipped, classes, report, 3), flipped, POINTS, 3)
        for name in (OUT_OF_FOLD, TEST):
            a, b = before[name], after[name]
            own = (a.table["patient"] == patient).to_numpy()
            np.testing.assert_array_equal(a.calibrated_SC[own], b.calibrated_SC[own])
            np.testing.assert_array_equal(a.p_values_SC[own], b.p_values_SC[own])
            for key in a.thresholds:
                np.testing.assert_array_equal(a.thresholds[key][own], b.thresholds[key][own])
                moved["threshold"] += not np.array_equal(a.thresholds[key], b.thresholds[key], equal_nan=True)
            moved["calibrated"] += not np.array_equal(a.calibrated_SC, b.calibrated_SC)
            moved["p"] += not np.array_equal(a.p_values_SC, b.p_values_SC)
    assert min(moved[what] for what in ("threshold", "calibrated", "p")) > 0, "labels do count, those of others"


@pytest.mark.parametrize("kind", ["plain", "val", "only val and test"])
def test_labels_of_the_test_split_are_used_by_nothing(kind):
    predictions, classes = study(**KINDS[kind])
    report = Report(calibrate="temperature")
    hidden = predictions.assign(label=predictions["label"].where(predictions["split"] != "test", None))
    assert fit_decisions(hidden, classes, report, 0) == fit_decisions(predictions, classes, report, 0)


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("planted", [0.5, 1.0, 3.0])
def test_temperature_recovers_the_planted_one(n_classes, planted):
    rng = np.random.default_rng(1)
    logits_SC = rng.normal(0, 1.5, (4000, n_classes))
    label_S = np.array([rng.choice(n_classes, p=p) for p in softmax(logits_SC, axis=1)])
    assert fit_temperature(label_S, softmax(planted * logits_SC, axis=1)) == pytest.approx(planted, rel=0.06)


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose decision function is its input."""

    def __init__(self, n_classes: int = 2):
        self.n_classes = n_classes

    def fit(self, X, y):
        self.classes_ = np.arange(self.n_classes)
        self.n_features_in_ = X.shape[1]
        return self

    def decision_function(self, X):
        return X[:, 0] if self.n_classes == 2 else X

    def predict(self, X):
        return (X[:, 0] > 0).astype(int) if self.n_classes == 2 else X.argmax(axis=1)


@pytest.mark.skipif(Version(sklearn.__version__) < Version("1.8"), reason="scikit-learn has no temperature before 1.8")
@pytest.mark.parametrize("n_classes", [2, 3])
def test_temperature_is_that_of_scikit_learn_where_slides_are_many(n_classes):
    """Which has no smoothed targets: those matter where slides are few."""
    rng = np.random.default_rng(2)
    logits_SC = rng.normal(0, 1.5, (4000, n_classes))
    label_S = np.array([rng.choice(n_classes, p=p) for p in softmax(logits_SC, axis=1)])
    p_SC = softmax(2 * logits_SC, axis=1)
    given = 2 * (logits_SC[:, 1:] - logits_SC[:, :1] if n_classes == 2 else logits_SC)
    theirs = CalibratedClassifierCV(FrozenEstimator(Given(n_classes).fit(given, label_S)), method="temperature")
    wanted_SC = theirs.fit(given, label_S).predict_proba(given)
    ours_SC = Map(temperature=fit_temperature(label_S, p_SC))(p_SC)
    np.testing.assert_allclose(ours_SC, wanted_SC, atol=2e-3)


def test_temperature_has_the_lowest_loss_of_a_fine_grid_and_is_finite_without_an_error():
    label_S, log_odds_S = np.array([0, 0, 0, 1, 1]), np.array([-5.0, -4.0, -3.0, 2.0, 6.0])
    p_SC = np.stack([expit(-log_odds_S), expit(log_odds_S)], axis=1)
    target_S = np.where(label_S == 1, 3 / 4, 1 / 5)  # (2 + 1) / (2 + 2), 1 - (3 + 1) / (3 + 2)
    grid = np.linspace(0.5, 20, 40_000)
    p_TS = expit(log_odds_S / grid[:, None])
    losses = -(target_S * np.log(p_TS) + (1 - target_S) * np.log(1 - p_TS)).mean(axis=1)
    assert fit_temperature(label_S, p_SC) == pytest.approx(grid[losses.argmin()], abs=1e-3)


def test_isotonic_is_scikit_learns_and_never_sure():
    rng = np.random.default_rng(3)
    p_S = rng.uniform(size=60).round(2)
    truth_S = rng.uniform(size=60) < p_S**2
    theirs = IsotonicRegression(y_min=1 / 62, y_max=61 / 62, out_of_bounds="clip").fit(p_S, truth_S.astype(float))
    new_S = np.linspace(0, 1, 501)
    ours = Map(knots=[fit_isotonic(truth_S, p_S)])(np.stack([1 - new_S, new_S], axis=1))
    np.testing.assert_allclose(ours[:, 1], theirs.predict(new_S), atol=1e-12)
    np.testing.assert_allclose(ours.sum(axis=1), 1)
    assert (ours > 0).all()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("plain", "temperature"),
        ("val", "isotonic"),
        ("three classes", "isotonic"),
        ("only val and test", "temperature"),
    ],
)
def test_three_times_too_sure_is_mended_where_it_is_reported(kind, method):
    predictions, classes = study(**KINDS[kind] | {"n_slides": 400, "test": 200, "temperature": 3.0})
    decisions = fit_decisions(predictions, classes, Report(calibrate=method), 0)
    assert (
        decisions.calibration.fitted_on
        == ("val" if KINDS[kind].get("val") else "out-of-fold")
        == source_of(predictions)
    )
    block = calibration_block(decisions, judge_study(decisions, predictions, POINTS, 0))
    assert block is not None
    for one in block["sets"].values():
        assert one["after"]["log_loss"] < one["before"]["log_loss"]
        assert one["before"]["per_class"]["class 1"]["slope"]["high"] < 1
        for label in one["after"]["per_class"].values():
            assert abs(label["intercept"]["value"]) < 1
    json.dumps(block, allow_nan=False)


def test_calibration_of_members_is_the_mean_of_their_calibrated_log_odds():
    predictions, classes = study(val=True, seeds=2)
    decisions = fit_decisions(predictions, classes, Report(calibrate="temperature"), 0)
    rows = predictions[(predictions["split"] == "test")]
    temperature = {one.member: one.temperature for one in decisions.calibration.maps}
    wanted = expit(
        (rows["logit_0"] / rows["member"].map(temperature)).groupby(rows["slide"].to_numpy()).mean().to_numpy()
    )
    np.testing.assert_allclose(calibrate(rows, classes, decisions.calibration)["p_1"], wanted)


def test_too_few_classes_leave_probabilities_as_they_are_and_say_why():
    predictions, classes = study()
    table = out_of_fold(predictions, classes)
    one = fit_map("temperature", table[table["label"] == 1], classes)
    assert one.why == "slides of 1 of 2 classes to fit on"
    p_SC = np.array([[0.2, 0.8], [np.nan, np.nan]])
    np.testing.assert_array_equal(one(p_SC), p_SC)
    assert fit_map("isotonic", table[:0], classes).why == "no slides to fit on"


# --- reliability -----------------------------------------------------------------------------------------------------


def clustered(rng: np.random.Generator, n_patients: int, slope: float = 1.0) -> tuple[np.ndarray, ...]:
    """Truth, probability, patient: patients of one to four slides that share a part of their log-odds."""
    patient_S = np.repeat(np.arange(n_patients), rng.integers(1, 5, n_patients))
    log_odds_S = rng.normal(0, 1.5, n_patients)[patient_S] + rng.normal(0, 0.5, len(patient_S))
    return rng.uniform(size=len(patient_S)) < expit(log_odds_S * slope), expit(log_odds_S), patient_S


def test_debiased_error_is_0_on_average_where_the_plain_one_is_not():
    rng = np.random.default_rng(4)
    errors = np.array([squared_error(*clustered(rng, 40)) for _ in range(400)])
    mean, standard_error = errors.mean(axis=0), errors.std(axis=0) / 20
    assert abs(mean[1]) < 3 * standard_error[1]
    assert mean[0] > 20 * standard_error[0]


def test_debiased_error_is_the_true_one_on_average_where_probabilities_are_wrong():
    rng = np.random.default_rng(5)
    truth_S, p_S, patient_S = clustered(rng, 60_000, slope=0.4)
    large = squared_error(truth_S, p_S, patient_S)
    assert large[0] == pytest.approx(large[1], rel=0.02)
    errors = np.array([squared_error(*clustered(rng, 60, slope=0.4)) for _ in range(400)])
    mean, standard_error = errors.mean(axis=0), errors.std(axis=0) / 20
    assert abs(mean[1] - large[1]) < 4 * standard_error[1]
    assert mean[0] - large[1] > 8 * standard_error[0], "the plain one is too large"


def test_bins_have_equally_many_slides_and_share_equal_probabilities():
    p_S = np.random.default_rng(6).permutation(np.repeat(np.linspace(0.1, 0.9, 53), 2))
    bin_S = quantile_bins(p_S)
    assert np.bincount(bin_S).min() >= 9
    assert len(np.unique(bin_S)) == 10
    assert all(len(set(bin_S[p_S == p])) == 1 for p in p_S)
    assert (np.diff(bin_S[np.argsort(p_S)]) >= 0).all()
    assert len(np.unique(quantile_bins(np.full(40, 0.5)))) == 1


def test_slope_and_intercept_hold_the_truth_about_as_often_as_they_say():
    """Labels drawn with log-odds of 0.5 x what is claimed: slope 0.5; patients as clusters."""
    rng = np.random.default_rng(7)
    held = np.zeros(2)
    for _ in range(150):
        found = slope_and_intercept(*clustered(rng, 80, slope=0.5))
        truths = {"slope": 0.5, "intercept": 0.0}
        held += [found[name]["low"] <= truth <= found[name]["high"] for name, truth in truths.items()]
    assert (held / 150 >= 0.89).all()


def test_slope_is_undefined_where_it_has_no_end():
    apart = slope_and_intercept(np.array([False, False, True, True]), np.array([0.1, 0.2, 0.8, 0.9]), np.arange(4))
    assert apart["slope"]["value"] is None
    assert "without an error" in apart["slope"]["why"]
    one = slope_and_intercept(np.ones(4, dtype=bool), np.full(4, 0.5), np.arange(4))
    assert one["slope"]["value"] is None is one["intercept"]["value"]
    level = slope_and_intercept(np.array([False, True, True, True]), np.full(4, 0.5), np.arange(4))
    assert level["slope"]["why"] == "all probabilities are equal"
    assert level["intercept"]["value"] == pytest.approx(np.log(3), abs=1e-6)


# --- operating points ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_point_is_the_best_of_all_thresholds_that_reach_it(seed):
    rng = np.random.default_rng(seed)
    truth_S = rng.permutation(np.arange(40) < rng.integers(3, 37))
    p_S = (rng.uniform(size=40) / 2 + truth_S / 4).round(2)
    tried = np.unique(np.concatenate([p_S, p_S + 1e-9]))
    sensitivity_T, specificity_T = (
        np.array([np.mean((p_S >= t)[truth_S]) for t in tried]),
        np.array([np.mean((p_S < t)[~truth_S]) for t in tried]),
    )
    chosen = choose({"sensitivity": 0.9}, truth_S, p_S)
    assert np.mean(p_S[truth_S] >= chosen) >= 0.9
    assert np.mean(p_S[~truth_S] < chosen) == specificity_T[sensitivity_T >= 0.9].max()
    chosen = choose({"specificity": 0.8}, truth_S, p_S)
    assert np.mean(p_S[~truth_S] < chosen) >= 0.8
    assert np.mean(p_S[truth_S] >= chosen) == sensitivity_T[specificity_T >= 0.8].max()


def test_points_that_cannot_be_reached():
    assert choose("youden", np.array([True, True]), np.array([0.2, 0.7])) is None
    assert choose({"sensitivity": 0.9}, np.array([False, False]), np.array([0.2, 0.7])) is None
    truth_S, p_S = np.array([False, True]), np.array([1.0, 1.0])
    assert choose({"specificity": 0.9}, truth_S, p_S) is None
    assert choose({"sensitivity": 0.9}, truth_S, p_S) == 1.0


def test_a_points_numbers_are_those_of_the_confusion_matrix():
    rng = np.random.default_rng(8)
    truth_S, p_S = rng.uniform(size=70) < 0.4, rng.uniform(size=70)
    threshold_S = np.where(np.arange(70) < 30, 0.4, 0.6)
    block = point_block(truth_S, p_S, threshold_S, np.arange(70), [0.05, float(truth_S.mean())])
    (tn, fp), (fn, tp) = confusion_matrix(truth_S, p_S >= threshold_S)
    assert (block["tp"], block["fp"], block["fn"], block["tn"]) == (tp, fp, fn, tn)
    assert block["as_here"]["ppv"]["value"] == tp / (tp + fp)
    assert block["lr_positive"]["value"] == pytest.approx(tp / (tp + fn) / (fp / (fp + tn)))
    here = block["at_prevalence"][1]
    assert here["ppv"]["value"] == pytest.approx(tp / (tp + fp))
    assert here["npv"]["value"] == pytest.approx(tn / (tn + fn))
    rare = block["at_prevalence"][0]
    sensitivity, specificity = block["sensitivity"]["value"], block["specificity"]["value"]
    wanted = sensitivity * 0.05 / (sensitivity * 0.05 + (1 - specificity) * 0.95)
    assert rare["ppv"]["value"] == pytest.approx(wanted)
    for number in (rare["ppv"], rare["npv"], block["lr_positive"], block["lr_negative"]):
        assert number["low"] < number["value"] < number["high"]


def test_ratios_without_an_error_have_an_end_on_one_side():
    truth_S, p_S = np.arange(20) < 8, np.where(np.arange(20) < 8, 0.9, 0.1)
    block = point_block(truth_S, p_S, np.full(20, 0.5), np.arange(20), [0.1])
    assert block["lr_positive"]["value"] is None is block["lr_positive"]["high"]
    assert block["lr_positive"]["low"] > 1
    assert block["lr_negative"]["value"] == 0 == block["lr_negative"]["low"]
    assert block["at_prevalence"][0]["ppv"]["high"] == 1 == block["at_prevalence"][0]["npv"]["value"]
    none = point_block(truth_S, p_S, np.full(20, 0.95), np.arange(20), [0.1])
    assert none["lr_positive"] == {"value": None, "low": None, "high": None} == none["at_prevalence"][0]["ppv"] | {}
    assert none["as_here"]["ppv"]["value"] is None
    assert point_block(truth_S, p_S, np.full(20, np.nan), np.arange(20), []) is None


def test_likelihood_ratios_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(9), np.zeros(2)
    truth_S = np.arange(90) < 40
    for _ in range(300):
        positive_S = rng.uniform(size=90) < np.where(truth_S, 0.9, 0.15)
        block = point_block(truth_S, positive_S.astype(float), np.full(90, 0.5), np.arange(90), [])
        truths = {"lr_positive": 0.9 / 0.15, "lr_negative": 0.1 / 0.85}
        held += [block[name]["low"] <= truth <= block[name]["high"] for name, truth in truths.items()]
    assert (held / 300 > 0.92).all()


def test_a_ratio_lies_within_its_interval():
    rate = {"value": 0.5, "low": 0.4, "high": 0.6}
    found = ratio_of(rate, {"value": 0.25, "low": 0.2, "high": 0.3})
    assert found["low"] < found["value"] == 2.0 < found["high"]
    assert found["low"] > 0.4 / 0.3 - 0.05, "not wider than the two ends"
    assert ratio_of(rate, {"value": None, "low": None, "high": None})["low"] is None


def test_decision_curve_is_a_loop_over_slides():
    rng = np.random.default_rng(10)
    truth_S, p_S = rng.uniform(size=30) < 0.3, rng.uniform(size=30)
    curve = decision_curve(truth_S, p_S)
    for t, model, everyone in zip(CURVE, curve["model"], curve["all"], strict=True):
        odds = t / (1 - t)
        gains = [(1 if truth else -odds) if p >= t else 0 for truth, p in zip(truth_S, p_S, strict=True)]
        assert model == pytest.approx(np.mean(gains))
        assert everyone == pytest.approx(np.mean([1 if truth else -odds for truth in truth_S]))


# --- conformal sets --------------------------------------------------------------------------------------------------


def test_p_values_are_a_count():
    scores, p_SC = {"a": [0.1, 0.2, 0.2, 0.9], "b": []}, np.array([[0.8, 0.2], [0.05, 0.95], [np.nan, np.nan]])
    values_SC = p_values(scores, p_SC)
    np.testing.assert_allclose(values_SC[:2, 0], [(3 + 1) / 5, (0 + 1) / 5])
    np.testing.assert_array_equal(values_SC[:2, 1], 1.0)  # nothing to rule it out by
    assert np.isnan(values_SC[2]).all()
    assert set_names(values_SC, 0.7, ["a", "b"]) == ["{a, b}", "{b}", None]


@pytest.mark.parametrize("n_classes", [2, 3])
def test_coverage_is_what_is_stated_class_by_class_over_many_studies(n_classes):
    """One slide each of new patients; calibrated on patients of one to three slides that are alike."""
    rng, covered, counted = np.random.default_rng(11), np.zeros(n_classes), np.zeros(n_classes)
    shares = np.array([0.6, 0.3, 0.1])[:n_classes] / np.array([0.6, 0.3, 0.1])[:n_classes].sum()

    def draw(n_patients: int) -> pd.DataFrame:
        patient_S = np.repeat(np.arange(n_patients), rng.integers(1, 4, n_patients))
        label_S = rng.choice(n_classes, p=shares, size=n_patients)[patient_S]
        logits_SC = rng.normal(size=(n_patients, n_classes))[patient_S] + rng.normal(
            0, 0.5, (len(patient_S), n_classes)
        )
        logits_SC[np.arange(len(label_S)), label_S] += 1.5
        table = pd.DataFrame(softmax(logits_SC, axis=1), columns=[f"p_{c}" for c in range(n_classes)])
        return table.assign(label=label_S, patient=patient_S, slide=[f"s{i}" for i in range(len(label_S))])

    for number in range(150):
        scores = scores_of(draw(120), [f"c{c}" for c in range(n_classes)], number)
        new = draw(60).drop_duplicates("patient")
        inside_SC = sets_of(p_values(scores, new[[f"p_{c}" for c in range(n_classes)]].to_numpy()), 0.9)
        label_S = new["label"].to_numpy()
        hit_S = inside_SC[np.arange(len(new)), label_S]
        covered += np.bincount(label_S, weights=hit_S, minlength=n_classes)
        counted += np.bincount(label_S, minlength=n_classes)
    rate = covered / counted
    # between studies the coverage varies by its calibration scores: SD about sqrt(0.09 / patients of the class)
    error = np.sqrt(0.09 / counted + 0.09 / (120 * shares) / 150)
    assert (rate > 0.9 - 3 * error).all()
    assert (rate < 0.9 + 1 / (120 * shares) + 3 * error).all()


def test_one_slide_a_patient_and_label_whatever_the_order_of_rows():
    table = pd.DataFrame({"slide": list("abcdef"), "patient": list("ppqqqr"), "label": [0, 0, 1, 1, 0, 1]})
    kept = one_a_patient(table, 5)
    assert sorted(zip(kept["patient"], kept["label"], strict=True)) == [("p", 0), ("q", 0), ("q", 1), ("r", 1)]
    assert set(one_a_patient(table[::-1], 5)["slide"]) == set(kept["slide"])
    assert len({frozenset(one_a_patient(table, seed)["slide"]) for seed in range(20)}) > 1


def test_the_report_of_sets_is_a_loop_over_slides():
    rng = np.random.default_rng(12)
    values_SC, label_S = rng.uniform(0, 0.4, (50, 3)), rng.integers(-1, 3, 50)
    values_SC[7] = np.nan
    block = coverage_block(label_S, values_SC, np.arange(50), ["a", "b", "c"], 0.8)
    sets = [
        (y, {c for c in range(3) if v[c] > 0.2}) for y, v in zip(label_S, values_SC, strict=True) if y >= 0
        and np.isfinite(v).all()
    ]  # fmt: skip
    assert block["covered"]["value"] == pytest.approx(np.mean([y in inside for y, inside in sets]))
    assert block["per_class"]["b"]["value"] == pytest.approx(np.mean([1 in inside for y, inside in sets if y == 1]))
    assert block["sizes"] == {str(n): sum(len(inside) == n for _, inside in sets) for n in range(4)}
    answered = [(y, inside) for y, inside in sets if len(inside) == 1]
    assert block["answered"]["share"]["value"] == pytest.approx(len(answered) / len(sets))
    assert block["answered"]["accuracy"]["value"] == pytest.approx(np.mean([y in inside for y, inside in answered]))
    assert next(at for at in block["curve"] if at["coverage"] == 0.8)["share"] == block["answered"]["share"]


# --- studies as they come --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_said_is_plain_json(kind):
    predictions, classes = study(**KINDS[kind])
    report = Report(calibrate="isotonic", prevalences=[0.1])
    decisions = fit_decisions(predictions, classes, report, 0)
    sets = judge_study(decisions, predictions, POINTS, 0)
    assert set(sets) >= ({TEST} if KINDS[kind].get("test", 30) else set()) | {"unused"}
    assert (OUT_OF_FOLD in sets) == (KINDS[kind].get("folds", 3) > 1)
    blocks = [
        calibration_block(decisions, sets),
        operating_block(decisions, sets, report.prevalences),
        conformal_block(decisions, sets, 0.9),
    ]
    assert None not in blocks
    json.dumps(blocks, allow_nan=False)
    for one in sets.values():
        columns = slide_columns(decisions, one, 0.9, classes).join(called_columns(one, classes))
        assert columns.notna().all().all()
        np.testing.assert_allclose(columns[[f"calibrated_{name}" for name in classes]].sum(axis=1), 1)
        assert set(columns["at_youden"]) <= set(classes) or len(classes) > 2


def test_a_fold_without_a_class_and_a_diverged_member_leave_the_others_as_they_are():
    predictions, classes = study()
    only = predictions["patient"].isin(
        predictions["patient"][(predictions["role"] == "test") & (predictions["fold"] == 0)]
    )
    one_class = predictions.assign(label=predictions["label"].where(~(only & predictions["label"].notna()), "class 0"))
    lost = predictions["member"] == 1
    numbers = ["logit_0", "p_0", "p_1"]
    diverged = predictions.assign(**{name: predictions[name].where(~lost) for name in numbers})
    for table in (one_class, diverged):
        decisions = fit_decisions(table, classes, Report(calibrate="temperature"), 0)
        sets = judge_study(decisions, table, POINTS, 0)
        blocks = [
            calibration_block(decisions, sets),
            operating_block(decisions, sets, []),
            conformal_block(decisions, sets, 0.9),
        ]
        json.dumps(blocks, allow_nan=False)
    own = sets[OUT_OF_FOLD]
    gone_S = own.table["p_1"].isna().to_numpy()
    assert 0 < gone_S.sum() < len(gone_S)
    assert np.isnan(own.calibrated_SC[gone_S]).all()
    assert np.isfinite(own.calibrated_SC[~gone_S]).all()
    assert slide_columns(decisions, own, 0.9, classes)["conformal_set"].isna().tolist() == gone_S.tolist()
    assert called_columns(own, classes)["at_youden"].isna().tolist() == gone_S.tolist()
    assert sets[TEST].table["p_1"].isna().all(), "the ensemble has a member that is no number"
    assert set(blocks[0]["sets"]) == {OUT_OF_FOLD}
    everything = predictions.assign(**dict.fromkeys(numbers, np.nan))
    decisions = fit_decisions(everything, classes, Report(calibrate="temperature"), 0)
    sets = judge_study(decisions, everything, POINTS, 0)
    assert calibration_block(decisions, sets) is None is conformal_block(decisions, sets, 0.9)
    assert operating_block(decisions, sets, [])["points"][0]["sets"][OUT_OF_FOLD] is None


def test_with_nothing_to_fit_on_nothing_is_changed():
    predictions, classes = study(folds=1)
    decisions = fit_decisions(predictions, classes, Report(calibrate="temperature"), 0)
    assert decisions.calibration.fitted_on == "nothing" == decisions.conformal.fitted_on
    sets = judge_study(decisions, predictions, POINTS, 0)
    assert sets[TEST].calibrated_SC is None
    assert conformal_block(decisions, sets, 0.9) is None
    assert "conformal_set" not in slide_columns(decisions, sets[TEST], 0.9, classes)
    block = calibration_block(decisions, sets)
    assert block["sets"][TEST]["after"] is None
    assert log_loss(*labelled(sets[TEST].table)) == pytest.approx(block["sets"][TEST]["before"]["log_loss"])


def labelled(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    known = table[table["label"] >= 0]
    return known["label"].to_numpy(), known["p_1"].to_numpy()


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "temperature", "isotonic"])
@pytest.mark.parametrize("kind", ["plain", "three classes, val"])
def test_decisions_are_read_back_as_they_were(kind, method, tmp_path):
    predictions, classes = study(**KINDS[kind])
    decisions = fit_decisions(predictions, classes, Report(calibrate=method), 0)
    write_decisions(tmp_path, decisions)
    members = sorted(predictions["member"].unique().tolist())
    assert read_decisions(tmp_path, classes, members) == decisions


def test_decisions_that_do_not_fit_the_study_are_refused_by_name(tmp_path):
    predictions, classes = study(val=True)
    decisions = fit_decisions(predictions, classes, Report(calibrate="isotonic"), 0)
    text = decisions.model_dump_json()

    def said(change) -> str:
        content = json.loads(text)
        change(content)
        (tmp_path / FILE).write_text(json.dumps(content))
        with pytest.raises(ReadbackError) as caught:
            read_decisions(tmp_path, classes, [0, 1, 2])
        return str(caught.value)

    assert f"{tmp_path / FILE}: classes" in said(lambda c: c.update(classes=["x", "y"]))
    assert "expected maps fitted on val of members [0, 1, 2]" in said(lambda c: c["calibration"]["maps"].pop())
    assert "rising functions" in said(lambda c: c["calibration"]["maps"][0]["knots"][0]["y"].reverse())
    assert "rising scores" in said(lambda c: c["conformal"]["of_class"]["class 0"].append(-1))
    assert "does not have" in said(lambda c: c["operating"]["thresholds"][0].update(of_class="z"))
    assert "threshold: input should be less than or equal to 1" in said(
        lambda c: c["operating"]["thresholds"][0].update(threshold=2.0)
    )
