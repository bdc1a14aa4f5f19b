"""Metrics against scikit-learn, brute force and invariances. S slides, C classes, R resamples."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from sklearn import metrics as sk

from extract.shares import wilson
from mil.results import intervals as metrics
from mil.results.intervals import by_patient
from mil.tasks.estimates import effective_size
from mil.tasks.metrics import METRICS, choose_threshold, confusion, decide, weighted_metrics

REFERENCE = {  # (truth, p, called, weights) -> value
    "auc": lambda y, p, c, w: sk.roc_auc_score(y, p, sample_weight=w),
    "average_precision": lambda y, p, c, w: sk.average_precision_score(y, p, sample_weight=w),
    "accuracy": lambda y, p, c, w: sk.accuracy_score(y, c, sample_weight=w),
    "balanced_accuracy": lambda y, p, c, w: sk.balanced_accuracy_score(y, c, sample_weight=w),
    "sensitivity": lambda y, p, c, w: sk.recall_score(y, c, sample_weight=w),
    "specificity": lambda y, p, c, w: sk.recall_score(y, c, pos_label=0, sample_weight=w),
    "f1": lambda y, p, c, w: sk.f1_score(y, c, sample_weight=w),
    "brier": lambda y, p, c, w: sk.brier_score_loss(y, p, sample_weight=w),
    "log_loss": lambda y, p, c, w: sk.log_loss(y, p, sample_weight=w, labels=[0, 1]),
    "ece": lambda y, p, c, w: slow_ece(y, p, w),
}


def slow_ece(truth, p, weights) -> float:
    """The definition, bin by bin, with edges instead of bin numbers."""
    edges = [k / 10 for k in range(11)]
    total = 0.0
    for low, high in pairwise(edges):
        inside = [(t, q, w) for t, q, w in zip(truth, p, weights, strict=True) if low <= q < high or q == high == 1.0]
        weight = sum(w for _, _, w in inside)
        if weight:
            mean_p = sum(q * w for _, q, w in inside) / weight
            share = sum(t * w for t, _, w in inside) / weight
            total += weight * abs(mean_p - share)
    return total / sum(weights)


def make_binary(seed: int, n: int = 61, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities rounded so that some are tied, with 0 and 1 among them."""
    rng = np.random.default_rng(seed)
    labels_S = (rng.random(n) < 0.35).astype(int)
    p_S = np.clip(np.round(0.25 * labels_S + rng.random(n) * 0.8 + rng.normal(0, 0.05, n), digits), 0, 1)
    p_S[:2], labels_S[:2] = [0.0, 1.0], [1, 0]
    return labels_S, p_S


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plain_call_equals_scikit_learn(name, seed):
    labels_S, p_S = make_binary(seed)
    expected = REFERENCE[name](labels_S, p_S, p_S >= 0.4, np.ones(len(p_S)))
    assert METRICS[name](labels_S, p_S, threshold=0.4) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_weightings_equal_scikit_learn_with_sample_weight(name):
    labels_S, p_S = make_binary(3)
    weights_RS = np.random.default_rng(5).integers(0, 4, size=(7, len(p_S))).astype(float)
    got_R = METRICS[name].weighted(labels_S == 1, p_S, p_S >= 0.5, weights_RS)
    expected_R = [REFERENCE[name](labels_S, p_S, p_S >= 0.5, weights_S) for weights_S in weights_RS]
    np.testing.assert_allclose(got_R, expected_R, atol=1e-12)


def test_every_metric_has_a_reference():
    assert set(REFERENCE) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("label", [0, 1])
def test_trap_10_one_class_is_undefined(name, label):
    assert METRICS[name]([label] * 5, [0.1, 0.4, 0.6, 0.9, 1.0]) is None
    assert METRICS[name]([], []) is None


def test_threshold_is_inclusive():
    assert METRICS["sensitivity"]([1, 0], [0.5, 0.2], threshold=0.5) == 1.0
    assert METRICS["sensitivity"]([1, 0], [0.5, 0.2], threshold=np.nextafter(0.5, 1)) == 0.0


def test_f1_is_zero_when_no_positive_is_found():
    assert METRICS["f1"]([1, 1, 0], [0.1, 0.2, 0.3]) == 0.0


@pytest.mark.parametrize(
    ("labels", "p", "message"),
    [
        ([0, 2], [0.1, 0.2], r"got also \[2\]"),
        ([0, 1], [0.1, 1.2], r"within 0..1, got \[1.2\]"),
        ([0, 1], [0.1, np.nan], r"got \[nan\]"),
        ([0, 1, 1], [0.1, 0.2], r"\(3,\) and \(2,\)"),
    ],
)
def test_wrong_input_is_refused(labels, p, message):
    with pytest.raises(ValueError, match=message):
        METRICS["auc"](labels, p)


# --- several classes ------------------------------------------------------------------------------------------------


def make_classes(seed: int, n: int = 83, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels_S = rng.integers(n_classes, size=n)
    return labels_S, softmax(1.3 * np.eye(n_classes)[labels_S] + rng.normal(0, 1, (n, n_classes)), axis=1)


def test_several_classes_equal_scikit_learns_macro():
    labels_S, p_SC = make_classes(0)
    called_S = decide(p_SC)
    got = {k: v[0] for k, v in weighted_metrics(labels_S, p_SC, called_S, np.ones((1, len(labels_S)))).items()}
    one_hot_SC = np.eye(3)[labels_S]
    expected = {
        "auc": sk.roc_auc_score(labels_S, p_SC, multi_class="ovr", average="macro"),
        "average_precision": sk.average_precision_score(one_hot_SC, p_SC, average="macro"),
        "accuracy": sk.accuracy_score(labels_S, p_SC.argmax(axis=1)),
        "balanced_accuracy": sk.balanced_accuracy_score(labels_S, called_S),
        "sensitivity": sk.recall_score(labels_S, called_S, average="macro"),
        "specificity": np.mean([np.mean(called_S[labels_S != c] != c) for c in range(3)]),
        "f1": sk.f1_score(labels_S, called_S, average="macro"),
        "brier": np.mean((p_SC - one_hot_SC) ** 2),
        "ece": np.mean([slow_ece(one_hot_SC[:, c], p_SC[:, c], np.ones(len(p_SC))) for c in range(3)]),
        "log_loss": sk.log_loss(labels_S, p_SC),
    }
    assert got == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(confusion(labels_S, called_S, 3), sk.confusion_matrix(labels_S, called_S))


def test_an_absent_class_makes_macro_undefined_but_not_accuracy():
    labels_S, p_SC = make_classes(1)
    kept = labels_S != 2
    values = weighted_metrics(labels_S[kept], p_SC[kept], decide(p_SC[kept]), np.ones((1, kept.sum())))
    assert np.isnan(values["auc"][0])
    assert np.isnan(values["sensitivity"][0])
    assert values["accuracy"][0] == pytest.approx(np.mean(p_SC[kept].argmax(axis=1) == labels_S[kept]))
    alone = labels_S == 2
    values = weighted_metrics(labels_S[alone], p_SC[alone], decide(p_SC[alone]), np.ones((1, alone.sum())))
    assert all(np.isnan(value[0]) for value in values.values())


def test_two_classes_are_those_of_the_last():
    labels_S, p_S = make_binary(4)
    p_SC = np.stack([1 - p_S, p_S], axis=1)
    values = weighted_metrics(labels_S, p_SC, decide(p_SC, 0.3), np.ones((1, len(p_S))))
    assert {k: v[0] for k, v in values.items()} == pytest.approx({k: m(labels_S, p_S, 0.3) for k, m in METRICS.items()})


# --- resampled patients ---------------------------------------------------------------------------------------------


def drawn(labels_S, p_S, patients_S, resamples=200, seed=0):
    p_SC = np.stack([1 - p_S, p_S], axis=1)
    called_S = decide(p_SC)
    return metrics.resampled(
        lambda weights_RS: weighted_metrics(labels_S, p_SC, called_S, weights_RS), patients_S, resamples, seed
    )


def spread(labels_S, p_S, patients_S, metric, **options):
    low, high = np.nanquantile(drawn(labels_S, p_S, patients_S, **options)[metric], [0.025, 0.975])
    return high - low


def make_patients(n: int, per_patient: int = 3) -> list[str]:
    return [f"patient {i // per_patient}" for i in range(n)]


def test_resamples_equal_a_slow_loop_over_whole_patients():
    """Rows are really repeated and scored by scikit-learn; few patients, so that some resamples hold one class."""
    rng = np.random.default_rng(9)
    patients_S = ["b", "a", "a", "c", "d", "b", "a", "e"]
    labels_S = np.array([1, 0, 0, 1, 0, 1, 0, 0])
    p_S = np.round(rng.random(8) * 0.5 + labels_S * 0.3, 2)
    got = drawn(labels_S, p_S, patients_S, resamples=300, seed=7)
    names = sorted(set(patients_S))
    drawn_RP = np.random.default_rng(7).multinomial(len(names), [1 / len(names)] * len(names), size=300)
    for name in ("auc", "average_precision", "f1", "ece"):
        values = []
        for drawn_P in drawn_RP:
            rows = [i for k, n in enumerate(drawn_P) for _ in range(n) for i in range(8) if patients_S[i] == names[k]]
            one_class = len(set(labels_S[rows])) < 2
            known = labels_S[rows], p_S[rows], p_S[rows] >= 0.5, np.ones(len(rows))
            values.append(np.nan if one_class else REFERENCE[name](*known))
        assert 0 < np.isnan(values).sum() < 300
        np.testing.assert_allclose(got[name], values, atol=1e-12)


def test_resamples_are_those_of_the_seed_in_parts_as_in_one(monkeypatch):
    labels_S, p_S = make_binary(6)
    patients_S = make_patients(len(p_S))
    whole, again = drawn(labels_S, p_S, patients_S), drawn(labels_S, p_S, patients_S)
    assert all(np.array_equal(values_R, again[name], equal_nan=True) for name, values_R in whole.items())
    assert (whole["auc"] != drawn(labels_S, p_S, patients_S, seed=1)["auc"]).any()
    monkeypatch.setattr(metrics, "NUMBERS_AT_ONCE", 17 * len(p_S))
    for name, values_R in drawn(labels_S, p_S, patients_S).items():
        np.testing.assert_allclose(values_R, whole[name], rtol=1e-12, err_msg=name)
        ends = [np.nanquantile(all_R, [0.025, 0.975]) for all_R in (values_R, whole[name])]
        np.testing.assert_array_equal(*ends, err_msg=name)


def test_copies_of_a_patients_slides_do_not_narrow_the_interval():
    labels_S, p_S = make_binary(8)
    patients_S = np.array(make_patients(len(p_S), per_patient=1))
    copies = np.repeat(labels_S, 4), np.repeat(p_S, 4)
    once, copied = spread(labels_S, p_S, patients_S, "auc"), spread(*copies, np.repeat(patients_S, 4), "auc")
    assert copied == pytest.approx(once)
    assert spread(*copies, [str(i) for i in range(4 * len(p_S))], "auc") < 0.7 * once


def test_accuracy_of_resamples_has_the_width_of_the_binomial():
    rng = np.random.default_rng(2)
    labels_S = rng.integers(2, size=400)
    p_S = np.where(rng.random(400) < 0.8, labels_S, 1 - labels_S).astype(float)
    rate = np.mean(labels_S == p_S)
    width = spread(labels_S, p_S, [str(i) for i in range(400)], "accuracy", resamples=4000)
    assert width == pytest.approx(2 * 1.96 * np.sqrt(rate * (1 - rate) / 400), rel=0.1)


def test_one_patient_or_no_resamples_give_none():
    labels_S, p_S = make_binary(1)
    assert drawn(labels_S, p_S, ["only"] * len(p_S)) is None
    assert drawn(labels_S, p_S, make_patients(len(p_S)), resamples=0) is None
    assert drawn(labels_S[:0], p_S[:0], []) is None


def test_resampling_is_fast():
    labels_S, p_S = make_binary(0, n=300, digits=6)
    patients_S = [str(i) for i in range(300)]
    start = time.perf_counter()
    metrics.resampled(
        lambda weights_RS: {"auc": METRICS["auc"].weighted(labels_S == 1, p_S, p_S >= 0.5, weights_RS)},
        patients_S,
        resamples=1000,
        seed=0,
    )
    assert time.perf_counter() - start < 1.0  # about 0.03 s; a loop over scikit-learn takes 1.5 s


# --- thresholds and patients ----------------------------------------------------------------------------------------


def brute_force_youden(labels_S, p_S) -> float:
    candidates = np.concatenate([[-1.0], np.unique(p_S), [2.0]])
    return max(np.mean(p_S[labels_S == 1] >= t) + np.mean(p_S[labels_S == 0] < t) - 1 for t in candidates)


@pytest.mark.parametrize("seed", range(8))
def test_threshold_has_the_best_youden_index(seed):
    labels_S, p_S = make_binary(seed, n=23, digits=1)
    best = brute_force_youden(labels_S, p_S)
    threshold = choose_threshold(labels_S, p_S)
    if threshold is None:
        assert best < 1e-9
    else:
        assert threshold not in p_S
        balanced = METRICS["balanced_accuracy"](labels_S, p_S, threshold)
        assert balanced == pytest.approx((best + 1) / 2)


def test_tied_thresholds_take_the_nearest_to_a_half():
    assert choose_threshold([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.8]) == pytest.approx(0.55)  # 0.15 is as good
    assert choose_threshold([0, 1], [0.1, 0.3]) == pytest.approx(0.2)


def test_threshold_between_neighbouring_floats_still_separates():
    low = 0.7
    high = np.nextafter(low, 1)
    threshold = choose_threshold([0, 1], [low, high])
    assert threshold is not None
    assert low < threshold <= high


@pytest.mark.parametrize(("labels", "p"), [([1, 1], [0.2, 0.8]), ([0, 1], [0.8, 0.2]), ([0, 1], [0.5, 0.5]), ([], [])])
def test_no_threshold_without_two_classes_or_above_chance(labels, p):
    assert choose_threshold(labels, p) is None


def test_by_patient_is_the_mean_of_the_slides_and_leaves_out_mixed_labels():
    slides = pd.DataFrame(
        {
            "patient": ["b", "a", "b", "c", "c", "b"],
            "label": [1, 0, 1, 0, 1, 1],
            "p_0": [0.2, 0.9, 0.4, 0.5, 0.5, 0.9],
            "p_1": [0.8, 0.1, 0.6, 0.5, 0.5, 0.1],
        }
    )
    patients, mixed = by_patient(slides)
    assert mixed == ["c"]
    assert patients["patient"].tolist() == ["a", "b"]
    assert patients["label"].tolist() == [0, 1]
    assert patients["slides"].tolist() == [1, 3]
    assert patients["p_1"].tolist() == pytest.approx([0.1, 0.5])


def test_effective_size_is_that_of_the_slides_where_each_patient_has_one():
    rng = np.random.default_rng(0)
    truth_S = rng.random(50) < 0.3
    assert effective_size(truth_S, [f"p{i}" for i in range(50)]) == pytest.approx(50)
    doubled = effective_size(np.repeat(truth_S, 3), np.repeat([f"p{i}" for i in range(50)], 3))
    assert doubled == pytest.approx(50), "copies of a slide tell nothing new"
    one_a_patient = 6 / (1 + (4 + 9 + 1) / 6 - 1)  # unequal patients: fewer than their number (Kish 1965)
    assert effective_size(np.ones(6, dtype=bool), ["a", "a", "b", "b", "b", "c"]) == pytest.approx(one_a_patient)


def test_calibration_intervals_of_clustered_slides_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(1), {"clusters": 0, "slides": 0}
    for _ in range(400):
        patient_S = np.repeat(np.arange(40), rng.integers(1, 6, 40))
        truth_S = rng.random(len(patient_S)) < rng.beta(0.6, 0.9, 40)[patient_S]  # mean 0.4, strongly clustered
        worth = effective_size(truth_S, patient_S.astype(str))
        for name, n in (("clusters", worth), ("slides", float(len(truth_S)))):
            low, high = wilson(truth_S.mean(), n)
            held[name] += bool(low <= 0.4 <= high)
    assert 0.90 < held["clusters"] / 400 < 0.98
    assert held["slides"] / 400 < 0.87
