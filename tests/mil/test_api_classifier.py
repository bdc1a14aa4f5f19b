"""`mil.SlideClassifier` against a study's members, a loop over single bags, and scikit-learn's own tools and checks."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

import mil
from extract.config import ProblemsError
from mil.training.members import load_members

SMALL = {"hidden": 6, "attention": 5, "head": (4,)}
QUICK = {"epochs": 4, "batch_size": 5, "lr": 0.02, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def data(witness_arrays):
    """30 bags of 6 features, and their labels by name."""
    arrays, labels_S = witness_arrays(30, seed=8, strength=5.0)
    return arrays, np.array(["normal", "tumor"])[labels_S]


def small(**options):
    return mil.SlideClassifier("abmil", options=SMALL, **(QUICK | options))


# --- the same as a study -------------------------------------------------------------------------------------------


def test_it_is_a_studys_member(data, write_study, tmp_path):
    """Same weights, bit by bit, and same probabilities: initialisation, order, held-out patients, selection."""
    bags, labels = data
    patients = [f"p{i // 2:02d}" for i in range(30)]
    cohort, features = write_study(tmp_path / "data", bags, labels, patients=patients)
    run = mil.run_study(
        {"cohort": cohort.partition("=")[2], "features": {"folder": features.partition("=")[2]}, "seed": 3},
        study={"folds": 1, "val_fraction": 0.3, "seeds": [3, 4]},
        model={"name": "abmil"} | SMALL,
        train=QUICK | {"standardize": True, "select": "best"},
        report={"bootstrap": 0, "heatmaps": 0},
        out=tmp_path / "run",
    )
    estimator = small(val_fraction=0.3, select="best", standardize=True, n_members=2, random_state=3)
    estimator.fit(bags, labels, groups=patients)
    members, _ = load_members(run.folder)
    for name, wanted in members.state_dict().items():
        assert torch.equal(estimator.aggregator_.state_dict()[name], wanted), name
    mean_S = run.predictions.groupby("slide")["logit_0"].mean()  # slide_00, slide_01, ... as the bags
    np.testing.assert_allclose(estimator.decision_function(bags), mean_S, rtol=1e-6)
    assert run.history["val_auc"].tolist() == estimator.history_["val_auc"].tolist()


def test_it_says_what_a_loop_over_single_bags_says(witness_arrays):
    """Three classes; members one by one through `mil.aggregator`, probabilities by hand."""
    bags, labels_S = witness_arrays(18, seed=2, n_classes=3)
    estimator = small(n_members=2).fit(bags, labels_S)
    logits_MSC, scores = [], []
    for m in range(2):
        one = mil.aggregator("abmil", 6, 3, **SMALL)
        one.stack.load_state_dict(
            {name: stack[m : m + 1] for name, stack in estimator.aggregator_.state_dict().items()}
        )
        logits_MSC.append([one(torch.from_numpy(bag)).detach().numpy() for bag in bags])
        scores.append(one.tile_scores(torch.from_numpy(bags[4])).numpy())
    logits_SC = np.mean(logits_MSC, axis=0)
    np.testing.assert_allclose(estimator.decision_function(bags), logits_SC, atol=1e-5)
    p_SC = np.exp(logits_SC) / np.exp(logits_SC).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(estimator.predict_proba(bags), p_SC, atol=1e-5)
    assert estimator.predict(bags).tolist() == p_SC.argmax(axis=1).tolist()
    assert estimator.score(bags, labels_S) == np.mean(p_SC.argmax(axis=1) == labels_S)
    np.testing.assert_allclose(estimator.tile_scores(bags[4]), np.mean(scores, axis=0), atol=1e-6)
    assert estimator.tile_scores(bags[4]).sum() == pytest.approx(1, abs=1e-5)


def test_it_finds_the_tiles_that_make_the_class(witness_arrays):
    bags, labels_S = witness_arrays(60, seed=5, strength=6.0)
    estimator = small(epochs=30).fit(bags[:40], labels_S[:40])
    assert estimator.score(bags[40:], labels_S[40:]) >= 0.85
    positive = [bag for bag, label in zip(bags[40:], labels_S[40:], strict=True) if label]
    found = [bag[estimator.tile_scores(bag).argmax(), 1] > 3 for bag in positive]
    assert np.mean(found) > 0.8


# --- bags, as they come --------------------------------------------------------------------------------------------


def test_lists_tensors_and_object_arrays_are_the_same_bags(data):
    bags, labels = data
    wanted = small().fit(bags, labels).predict_proba(bags)
    objects = np.empty(len(bags), dtype=object)
    objects[:] = bags
    for same in ([torch.from_numpy(bag) for bag in bags], objects, [bag.astype(np.float64) for bag in bags]):
        np.testing.assert_array_equal(small().fit(same, labels).predict_proba(same), wanted)
    halves = [bag.astype(np.float16) for bag in bags]
    as_floats = [half.astype(np.float32) for half in halves]
    np.testing.assert_array_equal(
        small().fit(halves, labels).predict_proba(halves), small().fit(as_floats, labels).predict_proba(as_floats)
    )


def test_what_is_wrong_with_bags_is_said_together(data):
    bags, labels = data
    with pytest.raises(ValueError, match=r"got one array \(17, 6\); for one bag: \[bag\]"):
        small().fit(bags, labels).predict(np.zeros((17, 6)))
    broken = [*bags[:27], np.full((3, 6), np.nan), np.zeros((0, 6)), np.zeros((4, 5))]
    with pytest.raises(ValueError) as refused:
        small().fit(broken, labels)
    text = str(refused.value)
    assert "bag 27: contains NaN or infinity" in text
    assert "bag 28: expected (tiles, features) of at least one tile, got shape (0, 6)" in text
    assert "bags of different widths: [5, 6] features" in text
    with pytest.raises(ValueError, match="at least two classes"):
        small().fit(bags, ["tumor"] * 30)
    with pytest.raises(ValueError, match="a group for each of 30 bags, got 2"):
        small().fit(bags, labels, groups=["a", "b"])
    with pytest.raises(NotFittedError):
        small().tile_scores(bags[0])


def test_what_is_wrong_with_parameters_is_said_together(data):
    wrong = mil.SlideClassifier("abmli", epochs=0, optimizer="sgd", val_fraction=2, n_members=0, max_tiles=0.5)
    with pytest.raises(ProblemsError) as refused:
        wrong.fit(*data)
    problems = refused.value.problems
    for beginning in ("model.name: no aggregator 'abmli'", "epochs:", "optimizer:", "val_fraction:", "n_members:"):
        assert [p for p in problems if p.startswith(beginning)], beginning
    with pytest.raises(ProblemsError, match="unknown option of abmil; did you mean 'model"):
        mil.SlideClassifier(options={"hiden": 3}).fit(*data)
    with pytest.raises(ProblemsError, match="set val_fraction"):
        small(select="best").fit(*data)


# --- chance ----------------------------------------------------------------------------------------------------------


def test_random_state(data):
    bags, labels = data

    def logits(random_state):
        return small(random_state=random_state).fit(bags, labels).decision_function(bags)

    np.testing.assert_array_equal(logits(0), logits(0))
    assert not np.allclose(logits(0), logits(1))
    np.testing.assert_array_equal(logits(np.random.RandomState(5)), logits(np.random.RandomState(5)))
    np.random.seed(7)  # noqa: NPY002 - what scikit-learn draws from for None
    assert not np.allclose(logits(None), logits(None))


def test_training_leaves_torchs_settings_as_they_were(data):
    before, state = torch.are_deterministic_algorithms_enabled(), torch.random.get_rng_state()
    try:
        torch.use_deterministic_algorithms(False)
        small().fit(*data)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_trained_one_can_be_kept(data):
    bags, labels = data
    estimator = small().fit(bags, labels)
    again = pickle.loads(pickle.dumps(estimator))  # noqa: S301 - our own
    np.testing.assert_array_equal(again.predict_proba(bags), estimator.predict_proba(bags))


# --- scikit-learn ----------------------------------------------------------------------------------------------------


def test_parameters_reach_the_aggregators_options():
    estimator = small()
    assert estimator.get_params()["options__hidden"] == 6
    assert "options__hidden" not in estimator.get_params(deep=False)
    other = clone(estimator).set_params(options__hidden=8, lr=0.5)
    assert (other.options, other.lr) == (SMALL | {"hidden": 8}, 0.5)
    assert estimator.options == SMALL, "the one that was cloned is as it was"
    with pytest.raises(ValueError, match="epoch"):
        estimator.set_params(epoch=3)
    assert json.dumps(small().get_params()), "plain values only"


def test_cross_validation_grid_search_and_pipelines(data):
    bags, labels = data
    patients = np.arange(30) // 2
    scores = cross_val_score(small(), bags, labels, groups=patients, cv=GroupKFold(3), scoring="roc_auc")
    by_hand = []
    for train, test in GroupKFold(3).split(bags, labels, patients):
        estimator = small().fit([bags[i] for i in train], labels[train])
        p_S = estimator.predict_proba([bags[i] for i in test])[:, 1]
        positive = labels[test] == "tumor"
        pairs = np.subtract.outer(p_S[positive], p_S[~positive])
        by_hand.append(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
    np.testing.assert_allclose(scores, by_hand)
    grid = {"lr": [1e-6, 0.02], "options__hidden": [4, 6]}
    search = GridSearchCV(small(epochs=12), grid, cv=2, scoring="neg_log_loss").fit(bags, labels)
    assert search.best_params_["lr"] == 0.02
    assert len(search.cv_results_["params"]) == 4
    assert search.predict(bags).shape == (30,)
    halved = FunctionTransformer(lambda bags: [bag / 2 for bag in bags])
    pipeline = make_pipeline(halved, small())
    p_S = cross_val_predict(pipeline, bags, labels, cv=2, method="predict_proba")
    direct = cross_val_predict(small(), [bag / 2 for bag in bags], labels, cv=2, method="predict_proba")
    np.testing.assert_array_equal(p_S, direct)


class RowsAsBags(mil.SlideClassifier):
    """scikit-learn's checks know tables only: each row becomes a bag of one tile."""

    def fit(self, bags, labels=None, groups=None):
        return super().fit(rows_as_bags(bags), labels, groups)

    def _checked(self, bags):
        return super()._checked(rows_as_bags(bags))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def rows_as_bags(table):
    if hasattr(table, "toarray"):
        return table
    rows = np.asarray(table)
    return [row[None] for row in rows] if rows.ndim == 2 else rows


MAKE_NO_SENSE = {
    "check_fit_score_takes_y": "wants the second argument of fit to be called y; here it is labels, beside bags",
    "check_dtype_object": "wants a TypeError for one cell; what is wrong with any bag is said together, a ValueError",
    "check_fit2d_predict1d": "wants the advice to reshape; a vector is no bag, and the message says what one is",
}
"""Checks that do not hold for bags, and why. `check_array_api_input` is skipped by scikit-learn itself."""


def test_scikit_learns_checks_of_estimators():
    quick = RowsAsBags("mean", epochs=10, lr=0.1, accelerator="cpu")
    results = check_estimator(quick, expected_failed_checks=MAKE_NO_SENSE, on_fail=None, on_skip=None)
    table = pd.DataFrame(results)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
    assert set(table["check_name"][table["status"] == "xfail"]) == set(MAKE_NO_SENSE), "no more than these"
    assert set(table["check_name"][table["status"] == "skipped"]) <= {"check_array_api_input"}
    assert len(table) > 50


def test_a_table_is_no_list_of_bags_and_scikit_learn_knows_it():
    assert not mil.SlideClassifier().__sklearn_tags__().input_tags.two_d_array
    assert mil.SlideClassifier().__sklearn_tags__().estimator_type == "classifier"
