"""Intervals that hold: a short form of benchmarks/coverage.py, invariances, limits, and influences by difference."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import multivariate_normal, norm, ttest_rel
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, roc_auc_score
from sksurv.metrics import concordance_index_censored

from extract.shares import wilson
from mil.results.calibration_interval import calibration_error, logistic
from mil.results.intervals import AS_IT_IS, SCALES, difference_interval, resampled, scaled_interval
from mil.results.metric_intervals import of_all
from mil.results.trainings import Trainings, auc_with_training, between_trainings, widened
from mil.tasks.binormal import binormal, covariance, independent, intraclass_correlation, shared
from mil.tasks.binormal_precision import Precision
from mil.tasks.estimates import (
    Estimate,
    auc_interval,
    average_precision_interval,
    c_index_interval,
    f1_interval,
    mean_interval,
    mean_of,
    proportion_interval,
    ranked_slides,
)
from mil.tasks.metrics import METRICS
from mil.tasks.paired import auc_difference_interval, latent_correlation, quantile_of, spread_of_both
from mil.tasks.regression import correlation, error_intervals, regression_metrics

SCALED = {"pearson": "fisher", "r2": "rest"}


def sample(rng, positives, negatives, auc):
    labels_S = np.arange(positives + negatives) < positives
    return labels_S, norm.ppf(auc) * 2**0.5 * labels_S + rng.normal(size=len(labels_S))


# --- coverage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positives", "negatives", "auc"), [(20, 30, 0.97), (49, 81, 0.99), (30, 30, 0.8)])
def test_the_auc_interval_holds_the_truth_about_as_often_as_it_says(positives, negatives, auc):
    """250 draws: 0.95 has a standard error of 0.014. The percentile bootstrap held 0.87 and 0.88 of the first two."""
    rng, held = np.random.default_rng(3), []
    for _ in range(250):
        found = auc_interval(*sample(rng, positives, negatives, auc))
        held.append(found.low <= auc <= found.high)
    assert 0.92 <= np.mean(held) <= 0.99


def test_the_auc_interval_of_clustered_slides_holds_the_truth():
    rng, held, naive = np.random.default_rng(5), [], []
    patient_S = np.repeat(np.arange(40), rng.integers(2, 5, 40))
    labels_S = patient_S < 16
    for _ in range(200):
        scores_S = norm.ppf(0.9) * 2**0.5 * labels_S + 0.7**0.5 * rng.normal(size=40)[patient_S]
        scores_S += 0.3**0.5 * rng.normal(size=len(patient_S))
        for patients, into in ((patient_S, held), (None, naive)):
            found = auc_interval(labels_S, scores_S, patients)
            into.append(found.low <= 0.9 <= found.high)
    assert 0.90 <= np.mean(held) <= 0.99
    assert np.mean(naive) < 0.87


PAIRED = {"alike": (0.9, 0.9, 0.9), "apart": (0.97, 0.9, 0.9), "independent": (0.95, 0.93, 0.0)}


@pytest.mark.parametrize(("auc_a", "auc_b", "together"), PAIRED.values(), ids=PAIRED)
@pytest.mark.parametrize("within", [0.0, 0.7])
def test_the_paired_difference_holds_the_truth(auc_a, auc_b, together, within):
    """120 draws: 0.95 has a standard error of 0.02. Errors of both intervals and DeLong's correlation held 0.99 of the
    first, 0.91 of the second."""
    rng, held = np.random.default_rng(6), []
    patient_S = np.arange(50) if not within else np.repeat(np.arange(40), rng.integers(2, 5, 40))
    labels_S, n = patient_S < 0.4 * (patient_S.max() + 1), patient_S.max() + 1

    def both(size):
        common, own = rng.normal(size=size), rng.normal(size=(2, size))
        return together**0.5 * common + (1 - together) ** 0.5 * own

    for _ in range(120):
        of_patient, of_slide = both(n)[:, patient_S], both(len(patient_S))
        a_S, b_S = (
            norm.ppf(auc) * 2**0.5 * labels_S + within**0.5 * effect_S + (1 - within) ** 0.5 * own_S
            for auc, effect_S, own_S in zip((auc_a, auc_b), of_patient, of_slide, strict=True)
        )
        found = auc_difference_interval(labels_S, a_S, b_S, patient_S)
        held.append(found.low <= auc_a - auc_b <= found.high)
    assert 0.9 <= np.mean(held) <= 0.995


def test_the_interval_with_training_again_holds_the_expected_auc():
    """Each training has learned more or less; what is held is the AUC that ensembles of four have on average."""
    rng, held = np.random.default_rng(11), {"trainings": [], "patients": []}

    def trained(n_slides, labels_S):
        learned = 1.3 + 0.6 * rng.normal(size=(4, 1))
        shared = rng.normal(size=n_slides)
        return learned * labels_S + shared + 0.2 * rng.normal(size=(4, n_slides))

    truth_S = np.arange(2000) % 2 == 0
    expected = np.mean([roc_auc_score(truth_S, trained(2000, truth_S).mean(axis=0)) for _ in range(150)])
    labels_S = np.arange(160) % 2
    for _ in range(120):
        logits_US = trained(160, labels_S)
        run = Trainings(tuple((0, u) for u in range(4)), logits_US[:, :, None], np.ones((4, 160)))
        patients = np.arange(160).astype(str)
        for name, found in (
            ("trainings", auc_with_training(labels_S, run, patients)),
            ("patients", auc_interval(labels_S, logits_US.mean(axis=0))),
        ):
            held[name].append(found.low <= expected <= found.high)
    assert 0.88 <= np.mean(held["trainings"]) <= 1.0  # standard error 0.02; 300 draws held 0.95
    assert np.mean(held["patients"]) < 0.8


# --- metrics of other tasks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.4, 0.9])
def test_intervals_of_correlations_and_errors_hold_the_truth(correlation):
    """150 draws of 30 patients: 0.95 has a standard error of 0.018. Percentiles held 0.85 (root mean square error)."""
    rng, held, kept = np.random.default_rng(5), {"pearson": 0, "r2": 0, "rmse": 0}, 0
    away = (1 - correlation**2) ** 0.5
    truth = {"pearson": correlation, "r2": 1 - away**2 - (1 - correlation) ** 2, "rmse": 0.0}
    truth["rmse"] = (1 - truth["r2"]) ** 0.5
    for seed in range(150):
        wanted = rng.normal(size=30)
        said = correlation * wanted + away * rng.normal(size=30)
        values = regression_metrics(wanted, said, np.ones((1, 30)), None)
        drawn = resampled(partial(regression_metrics, wanted, said, cut=None), np.arange(30).astype(str), 150, seed)
        found = {name: scaled_interval(values[name][0], drawn[name], SCALES[s], 30) for name, s in SCALED.items()}
        found["rmse"] = error_intervals(said - wanted, np.arange(30))["rmse"]
        for name in held:
            held[name] += found[name].low <= truth[name] <= found[name].high
        kept += found["pearson"].high < 1
    assert all(0.9 * 150 <= n <= 0.99 * 150 for n in (held["pearson"], held["r2"]))
    assert held["rmse"] >= 0.87 * 150
    assert kept == 150, "no correlation beyond 1"


def test_an_interval_on_a_scale_has_a_width_or_is_none():
    same = scaled_interval(0.5, np.full(50, 0.5), SCALES["fisher"], 9)
    perfect = scaled_interval(1.0, np.full(50, 1.0), SCALES["fisher"], 9)
    assert (same.low, perfect.low) == (None, None)
    assert scaled_interval(None, np.full(50, np.nan), SCALES["log"], 9).undefined == 50
    values_R = np.array([0.2, 0.4] * 20 + [np.nan])
    found = scaled_interval(0.3, values_R, SCALES["log"], 9)
    half = student.ppf(0.975, 8) * np.log(values_R[:40]).std(ddof=1)
    assert (found.low, found.high) == pytest.approx((0.3 * np.exp(-half), 0.3 * np.exp(half)))
    assert (found.resamples, found.undefined) == (41, 1)


def test_the_c_index_of_folds_counts_pairs_within_each():
    rng = np.random.default_rng(3)
    risk_S, time_S, event_S, fold_S = rng.normal(size=40), rng.random(40), rng.random(40) < 0.6, np.arange(40) % 3
    found = c_index_interval(risk_S + 5.0 * fold_S, time_S, event_S, strata=fold_S)
    won = pairs = 0.0
    for f in range(3):
        own = fold_S == f
        _, right, wrong, tied, _ = concordance_index_censored(event_S[own], time_S[own], risk_S[own])
        won, pairs = won + right + tied / 2, pairs + right + wrong + tied
    assert found.value == pytest.approx(won / pairs)
    assert found.low < found.value < found.high
    pooled = c_index_interval(risk_S, time_S, event_S)
    assert found.high - found.low > pooled.high - pooled.low, "fewer pairs"


# --- limits --------------------------------------------------------------------------------------------------------


def every_estimate(labels_S, scores_S, patients=None):
    p_S = expit(scores_S)
    called_S = p_S >= 0.5
    yield auc_interval(labels_S, scores_S, patients)
    yield average_precision_interval(labels_S, scores_S, patients)
    yield proportion_interval(called_S, patients, among=labels_S)
    yield f1_interval(labels_S, called_S, patients)
    yield mean_interval((p_S - labels_S) ** 2, patients, most=1.0)
    yield c_index_interval(scores_S, -scores_S, labels_S, patients)


@pytest.mark.parametrize("apart", [-50.0, 0.0, 50.0])
def test_no_interval_is_without_width_or_beyond_the_metrics_range(apart):
    rng = np.random.default_rng(0)
    labels_S, scores_S = sample(rng, 9, 14, 0.5)
    patients = np.arange(23) // 2
    for found in every_estimate(labels_S, scores_S + apart * labels_S, patients):
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0.01
    shifted_S = scores_S + apart * labels_S
    gap = auc_difference_interval(labels_S, shifted_S, shifted_S, patients)
    assert gap.value == 0
    assert -1 <= gap.low < 0 < gap.high <= 1
    classes = of_all(labels_S.astype(int), np.eye(2)[labels_S.astype(int)], labels_S.astype(int), patients)
    assert all(one.high > one.low for name, one in classes.items() if name != "log_loss")


def test_a_perfect_sample_has_a_lower_limit_that_rises_with_its_size():
    lows = [auc_interval(np.arange(n) < n // 2, -np.arange(float(n))).low for n in (10, 20, 50, 200)]
    assert lows == sorted(lows)
    assert 0.6 < lows[0] < 0.9
    assert 0.97 < lows[-1] < 1


def test_undefined_numbers_and_too_few_patients_have_no_interval():
    assert auc_interval([1, 1], [0.2, 0.3]).value is None
    one = auc_interval([1, 1, 0, 0], [0.9, 0.8, 0.1, 0.2], ["a", "a", "b", "c"])
    assert (one.value, one.low, one.high) == (1.0, None, None)
    assert proportion_interval([1, 0], among=np.zeros(2, dtype=bool)).value is None
    assert c_index_interval([1, 2], [1, 2], [0, 0]).value is None
    assert mean_interval([0.7, 0.7, 0.7]).low is None, "log loss without a spread has no bound"
    assert mean_of([one, one]).low is None
    assert widened(one, []).low is None
    with pytest.raises(ValueError, match="labels 0 and 1"):
        auc_interval([0, 2], [0.1, 0.2])
    with pytest.raises(ValueError, match="one patient a slide"):
        auc_interval([0, 1], [0.1, 0.2], ["a"])


# --- invariances ---------------------------------------------------------------------------------------------------


def ends(found: Estimate):
    return pytest.approx((found.low, found.high), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_labels_mirror_the_interval(seed):
    rng = np.random.default_rng(seed)
    labels_S, scores_S = sample(rng, 11, 19, 0.8)
    patients = rng.integers(15, size=30)
    found, turned = auc_interval(labels_S, scores_S, patients), auc_interval(~labels_S, scores_S, patients)
    assert (1 - turned.high, 1 - turned.low) == ends(found)


def test_rising_transformations_and_the_order_of_slides_change_nothing():
    rng = np.random.default_rng(4)
    labels_S, scores_S = sample(rng, 12, 17, 0.85)
    patients, order = np.arange(29) // 2, rng.permutation(29)
    for interval in (auc_interval, average_precision_interval):
        found = interval(labels_S, scores_S, patients)
        bent = interval(labels_S, np.exp(scores_S / 3), patients)
        mixed = interval(labels_S[order], scores_S[order], patients[order])
        assert (bent.low, bent.high) == ends(found)
        assert (mixed.low, mixed.high) == ends(found)


def test_copies_of_a_patients_slides_do_not_narrow_an_interval():
    rng = np.random.default_rng(8)
    labels_S, scores_S = sample(rng, 14, 21, 0.85)
    patients = np.arange(35)
    once = list(every_estimate(labels_S, scores_S, patients))
    copied = list(every_estimate(*(np.repeat(x, 3) for x in (labels_S, scores_S, patients))))
    for a, b in zip(once, copied, strict=True):
        assert b.high - b.low >= (a.high - a.low) * 0.97, "the average precision's mean moves a little"
    assert (copied[0].low, copied[0].high) == ends(once[0])
    independent_copies = auc_interval(np.repeat(labels_S, 3), np.repeat(scores_S, 3))
    assert independent_copies.high - independent_copies.low < 0.75 * (once[0].high - once[0].low)


def test_a_difference_turns_round_with_its_scores_and_no_rising_transformation_changes_it():
    rng = np.random.default_rng(14)
    labels_S, a_S = sample(rng, 12, 17, 0.85)
    b_S, patients = a_S + rng.normal(size=29), np.arange(29) // 2
    found = auc_difference_interval(labels_S, a_S, b_S, patients)
    turned = auc_difference_interval(labels_S, b_S, np.exp(a_S / 3), patients)
    assert (-turned.high, -turned.low) == ends(found)
    mirrored = auc_difference_interval(~labels_S, a_S, b_S, patients)
    assert (-mirrored.high, -mirrored.low) == ends(found)
    assert found.value == pytest.approx(roc_auc_score(labels_S, a_S) - roc_auc_score(labels_S, b_S))


def test_the_interval_of_a_difference_of_means_is_students_of_pairs():
    rng = np.random.default_rng(3)
    both_2P = rng.normal(size=40) + rng.normal([[0.5], [0.0]], 0.7, size=(2, 40))
    patients = [f"p{i}" for i in range(40)]
    drawn_R2 = resampled(lambda w: {"": w @ both_2P.T / w.sum(axis=1, keepdims=True)}, patients, 4000, 0)[""]
    found = difference_interval(both_2P.mean(axis=1), drawn_R2, AS_IT_IS, 40)
    wanted = ttest_rel(*both_2P).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.03 * (wanted.high - wanted.low))
    assert (found.resamples, found.undefined) == (4000, 0)
    gap_R = drawn_R2[:, 0] - drawn_R2[:, 1]
    half = student.ppf(0.975, 39) * (40 / 39) ** 0.5 * gap_R.std(ddof=1)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-5)


def test_a_difference_that_no_resample_changes_has_no_width_and_an_undefined_one_no_interval():
    drawn_R2 = np.random.default_rng(0).uniform(0.4, 0.6, size=(50, 2))
    alike = difference_interval((0.5, 0.3), drawn_R2[:, :1] - [0.0, 0.2], SCALES["fisher"], 40)
    assert (alike.low, alike.high) == (0.2, 0.2)
    for both, drawn in (((None, 0.3), drawn_R2), ((0.5, 0.3), None), ((0.5, 0.3), drawn_R2[:4])):
        assert difference_interval(both, drawn, SCALES["fisher"], 40).low is None
    drawn_R2[3, 1] = np.nan
    assert difference_interval((0.5, 0.3), drawn_R2, SCALES["fisher"], 40).undefined == 1


def test_a_difference_at_the_end_of_its_scale_is_taken_as_it_is():
    drawn_R2 = np.minimum(np.random.default_rng(0).normal([1.0, 0.9], 0.05, size=(200, 2)), 1.0)
    found, plain = (difference_interval((1.0, 0.9), drawn_R2, scale, 30) for scale in (SCALES["fisher"], AS_IT_IS))
    assert (found.low, found.high) == (plain.low, plain.high)


def test_a_difference_turns_round_with_its_numbers():
    drawn_R2 = np.random.default_rng(0).normal([0.8, 0.6], 0.05, size=(200, 2))
    found = difference_interval((0.8, 0.6), drawn_R2, SCALES["fisher"], 30)
    turned = difference_interval((0.6, 0.8), drawn_R2[:, ::-1], SCALES["fisher"], 30)
    assert (-turned.high, -turned.low) == pytest.approx((found.low, found.high), abs=1e-6)
    assert 0.2 - found.low > found.high - 0.2, "the higher number may be lower by more than higher"


def test_intervals_of_differences_of_correlations_hold_the_truth_on_both_sides():
    """400 draws of 30 patients: 0.95 has a standard error of 0.011. A t interval of the difference held 0.93; in 0.063
    the truth was above it, in 0.006 below."""
    rng, missed = np.random.default_rng(8), {"above": 0, "below": 0}
    for seed in range(400):
        wanted, common, own = rng.normal(size=30), rng.normal(size=30), rng.normal(size=(2, 30))
        noises = zip((0.9, 0.8), common + own, strict=True)
        said = [r * wanted + ((1 - r**2) / 2) ** 0.5 * noise for r, noise in noises]

        def both(w, wanted=wanted, said=said):
            return {"": np.stack([correlation(wanted, one, w) for one in said], axis=1)}

        drawn = resampled(both, np.arange(30).astype(str), 150, seed)[""]
        found = difference_interval(both(np.ones((1, 30)))[""][0], drawn, SCALES["fisher"], 30)
        missed["above"] += found.high < 0.1
        missed["below"] += found.low > 0.1
    assert missed["above"] <= 0.055 * 400
    assert 0.003 * 400 <= missed["below"] <= 0.045 * 400


def test_the_correlation_of_two_scores_is_that_before_any_rising_transformation():
    """Of few slides as well: the mean of 300 samples has a standard error of 0.002; normal scores gave 0.87."""
    rng, found = np.random.default_rng(5), []
    labels_S = np.arange(50) < 20
    for _ in range(300):
        common, own = rng.normal(size=50), rng.normal(size=(2, 50))
        a_S, b_S = 0.9**0.5 * common + 0.1**0.5 * own + [[0.0], [1.0]] * labels_S
        found.append(latent_correlation((np.exp(a_S), b_S**3), labels_S))
    assert np.mean(found) == pytest.approx(0.9, abs=0.008)
    assert latent_correlation((np.ones(50), np.arange(50.0)), labels_S) == 0, "one score is the same of all"
    assert latent_correlation((-a_S, a_S), labels_S) == pytest.approx(-1)


@pytest.mark.parametrize(("positives", "negatives"), [(1, 1), (1, 4), (2, 1), (2, 2), (2, 3), (3, 2), (3, 40)])
def test_the_correlation_of_few_slides_ties_too_and_an_interval_of_their_difference(positives, negatives):
    """Of two slides of a class, as small folds and sites have, SciPy's asymptotic p value divides by 0."""
    labels_S = np.arange(positives + negatives) < positives
    rng = np.random.default_rng(positives * 50 + negatives)
    for _ in range(20):
        scores = tuple(rng.integers(0, 4, (2, len(labels_S))).astype(float))
        total = pairs = 0.0
        for own in (labels_S, ~labels_S):
            i, j = np.triu_indices(own.sum(), 1)
            a, b = (np.sign(score_S[own][i] - score_S[own][j]) for score_S in scores)
            if a.any() and b.any():
                total += len(i) * (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
                pairs += len(i)
        wanted = np.sin(np.pi / 2 * total / pairs) if pairs else 0.0
        assert latent_correlation(scores, labels_S) == pytest.approx(wanted, abs=1e-12)
        found = auc_difference_interval(labels_S, *scores)
        assert found.low is None or -1 <= found.low <= found.value <= found.high <= 1
        assert (found.low is None) == (min(positives, negatives) < 2)


def test_the_spread_of_both_scores_is_told_by_the_one_that_errs():
    labels_S = np.arange(40) < 15
    perfect, other = (ranked_slides(labels_S, scores, None)[0] for scores in (50.0 * labels_S, np.arange(40) % 7))
    assert (perfect.auc, other.auc < 0.9) == (1.0, True)
    assert spread_of_both((perfect, other), (0.5, 0.8)) == pytest.approx(0.8, abs=0.01)
    assert spread_of_both((other, other), (0.5, 0.8)) == pytest.approx(0.65)


def test_students_quantile_comes_in_with_the_second_slides():
    assert quantile_of(16, np.arange(40)) == pytest.approx(1.96, abs=1e-4)
    assert quantile_of(16, np.repeat(np.arange(40), 2)) == pytest.approx(student.ppf(0.975, 15))
    assert quantile_of(16, np.repeat(np.arange(40), 4)) == pytest.approx(student.ppf(0.975, 15))
    between = quantile_of(16, np.r_[np.arange(40), np.arange(10)])
    assert between == pytest.approx(1.96 + 0.25 * (student.ppf(0.975, 15) - 1.96), abs=1e-4)


# --- against other ways --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [-0.3, 0.2, 0.5, 0.9])
def test_the_models_covariance_is_the_bivariate_normals(correlation):
    both = multivariate_normal(mean=[0, 0], cov=[[1, correlation], [correlation, 1]])
    for auc in (0.6, 0.95):
        h = norm.ppf(auc)
        assert covariance(np.array(auc), correlation) == pytest.approx(both.cdf([h, h]) - auc**2, abs=1e-6)


def test_the_models_variance_is_that_of_simulated_aucs():
    rng = np.random.default_rng(0)
    patient_P = np.array([2, 1, 3, 0, 0, 1]), np.array([0, 1, 0, 4, 2, 2])
    labels_S = np.repeat([True, False], [part.sum() for part in patient_P])
    patient_S = np.concatenate([np.repeat(np.arange(6), part) for part in patient_P])
    values = []
    for _ in range(4000):
        scores_S = 0.8 * labels_S + 0.5**0.5 * (rng.normal(size=6)[patient_S] + rng.normal(size=len(patient_S)))
        values.append((scores_S[labels_S][:, None] > scores_S[~labels_S]).mean())
    model = binormal(*patient_P, 0.5, 0.5).variance(norm.cdf(np.array([0.8 / 2**0.5])))[0]
    assert model == pytest.approx(np.var(values), rel=0.12)
    assert independent(7, 9, 0.5).variance(np.array([0.7]))[0] < model


def test_the_models_covariance_of_two_aucs_is_that_of_simulated_ones():
    rng = np.random.default_rng(1)
    of_patient = np.array([2, 1, 3, 0, 0, 1]), np.array([0, 1, 0, 4, 2, 2])
    labels_S = np.repeat([True, False], [part.sum() for part in of_patient])
    patient_S = np.concatenate([np.repeat(np.arange(6), part) for part in of_patient])
    values = []
    for _ in range(6000):
        effect_P = rng.multivariate_normal([0, 0], [[0.5, 0.4], [0.4, 0.5]], size=6)
        a_S, b_S = (effect_P[patient_S] + rng.multivariate_normal([0, 0], [[0.5, 0.3], [0.3, 0.5]], size=16)).T
        won = [(s[labels_S][:, None] > s[~labels_S]).mean() for s in (a_S + 0.8 * labels_S, b_S + 1.6 * labels_S)]
        values.append(won)
    aucs = (norm.cdf(np.array([shift / 2**0.5])) for shift in (0.8, 1.6))
    model = shared(*of_patient, 0.5, 0.7, 0.4).covariance(*aucs)[0]
    assert model == pytest.approx(np.cov(np.array(values).T)[0, 1], rel=0.1)


def test_average_precision_under_the_model_is_that_of_simulated_samples():
    rng, m, n, auc = np.random.default_rng(1), 20, 30, 0.85
    values = [average_precision_score(*sample(rng, m, n, auc)) for _ in range(1500)]
    model, at = Precision(m, n, 0.5), np.array([auc])
    assert model.expected(at)[0] == pytest.approx(np.mean(values), abs=0.006)
    assert model.variance(at)[0] == pytest.approx(np.var(values), rel=0.2)
    large = average_precision_score(*sample(rng, 40_000, 60_000, auc))
    assert model.of(at)[0] == pytest.approx(large, abs=0.006)


def weighted_c_index(weights_S, risk_S, time_S, event_S):
    """By the definition, pair by pair."""
    won = pairs = 0.0
    for i in np.flatnonzero(event_S):
        for j in range(len(risk_S)):
            if time_S[i] < time_S[j] or (time_S[i] == time_S[j] and not event_S[j]):
                both = weights_S[i] * weights_S[j]
                pairs += both
                won += both * ((risk_S[i] > risk_S[j]) + 0.5 * (risk_S[i] == risk_S[j]))
    return won / pairs


def test_influences_are_the_derivatives_by_weight():
    rng = np.random.default_rng(2)
    labels_S = rng.random(17) < 0.5
    scores_S = np.round(rng.random(17), 1)
    called_S = scores_S >= 0.5
    time_S, event_S = np.round(rng.random(17), 1), rng.random(17) < 0.6
    found = {
        "auc": auc_interval(labels_S, scores_S),
        "average_precision": average_precision_interval(labels_S, scores_S),
        "sensitivity": proportion_interval(called_S, among=labels_S),
        "f1": f1_interval(labels_S, called_S),
        "brier": mean_interval((scores_S - labels_S) ** 2, most=1.0),
    }
    step = 1e-6
    weights_RS = np.ones((17, 17)) + step * np.eye(17)
    for name, estimate in found.items():
        one = METRICS[name].weighted(labels_S, scores_S, called_S, np.ones((1, 17)))[0]
        values_R = METRICS[name].weighted(labels_S, scores_S, called_S, weights_RS)
        assert estimate.value == pytest.approx(one)
        np.testing.assert_allclose(estimate.influence_S, (values_R - one) / step, atol=1e-4)
    survival = c_index_interval(scores_S, time_S, event_S)
    one = weighted_c_index(np.ones(17), scores_S, time_S, event_S)
    assert survival.value == pytest.approx(one)
    moved = [weighted_c_index(w, scores_S, time_S, event_S) for w in weights_RS]
    np.testing.assert_allclose(survival.influence_S, (np.array(moved) - one) / step, atol=1e-4)


def test_wilson_is_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for hits, n in ((0, 9), (7, 9), (9, 9), (31, 80)):
        assert wilson(hits / n, n) == pytest.approx(proportion.proportion_confint(hits, n, method="wilson"))


def test_the_mean_of_numbers_adds_their_variances_with_correlation():
    """Two shares of other patients: half the root of the sum of squares; the same share twice: its own interval."""
    right_S = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 0])
    first_S = np.arange(10) < 5
    a, b = (proportion_interval(right_S, among=own) for own in (first_S, ~first_S))
    found = mean_of([a, b])
    assert found.value - found.low == pytest.approx(np.hypot(a.value - a.low, b.value - b.low) / 2)
    twice = mean_of([a, a])
    assert (twice.low, twice.high) == ends(a)


def test_intraclass_correlation_of_a_known_mixture():
    rng = np.random.default_rng(3)
    patient_S = np.repeat(np.arange(4000), 3)
    values_S = 0.6**0.5 * rng.normal(size=4000)[patient_S] + 0.4**0.5 * rng.normal(size=12_000)
    assert intraclass_correlation(values_S, patient_S) == pytest.approx(0.6, abs=0.02)
    assert intraclass_correlation(np.zeros(6), np.array([0, 0, 1, 1, 2, 2])) == 1.0


def test_the_variance_between_trainings_is_that_of_a_mean():
    """Of a value that is linear in the logits the jackknife gives the variance of the mean of independent trainings."""
    logits_US = np.random.default_rng(0).normal(size=(5, 8))
    run = Trainings(tuple((0, u) for u in range(5)), logits_US[:, :, None], np.ones((5, 8)))
    variance, degrees = between_trainings(run, lambda p_SC: float(np.log(p_SC[:, 1] / p_SC[:, 0]).mean()))
    assert variance == pytest.approx(logits_US.mean(axis=1).var(ddof=1) / 5)
    assert degrees == 4


@pytest.mark.parametrize(("slope", "least"), [(1.0, 0.92), (0.6, 0.85), (2.0, 0.87)])
def test_the_calibration_error_of_a_calibrated_study_may_be_none(slope, least):
    """Coverage over 80 studies of 100 slides; the truth is that of 400,000 slides. A bootstrap held 0.80 to 0.92."""
    rng = np.random.default_rng(3)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        z_S = rng.normal(-0.2, 1.5, n)
        return expit(z_S), rng.random(n) < expit(slope * z_S)

    p_N, y_N = draw(400_000)
    truth = 0.0 if slope == 1 else METRICS["ece"](y_N, p_N)
    held = 0
    for study in range(80):
        p_S, y_S = draw(100)
        patients_S = np.arange(100).astype(str)
        found = calibration_error([1], y_S.astype(int), np.stack([1 - p_S, p_S], axis=1), patients_S, 150, study)
        held += found["low"] <= truth <= found["high"]
    assert held >= least * 80


def test_the_recalibration_of_a_known_slope():
    rng = np.random.default_rng(0)
    z_S = rng.normal(size=20_000)
    found_S = logistic(rng.random(20_000) < expit(0.4 + 0.5 * z_S), expit(z_S))
    np.testing.assert_allclose(found_S, expit(0.4 + 0.5 * z_S), atol=0.02)
    assert logistic(np.array([True, True]), np.array([1.0, 1.0])).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)


def test_the_calibration_error_of_clustered_slides_and_of_several_classes():
    rng = np.random.default_rng(6)
    z_S = rng.normal(size=40)
    label_S = (rng.random(40) < expit(z_S)).astype(int)
    p_SC = np.stack([expit(-z_S), expit(z_S)], axis=1)
    once = calibration_error([1], label_S, p_SC, np.arange(40), 400, 0)
    thrice = (np.repeat(x, 3, axis=0) for x in (label_S, p_SC, np.arange(40)))
    copied = calibration_error([1], *thrice, 400, 0)
    assert copied["high"] == pytest.approx(once["high"], abs=0.03), "copies tell nothing more"
    three_SC = np.stack([p_SC[:, 0], p_SC[:, 1] / 2, p_SC[:, 1] / 2], axis=1)
    three_S = np.where(label_S, rng.integers(1, 3, 40), 0)
    found = calibration_error([0, 1, 2], three_S, three_SC, np.arange(40), 400, 0)
    value = np.mean([METRICS["ece"]((three_S == c).astype(int), three_SC[:, c]) for c in range(3)])
    assert 0 <= found["low"] <= value <= found["high"] < 0.4
    assert calibration_error([1], label_S, p_SC, np.zeros(40), 400, 0)["low"] is None
