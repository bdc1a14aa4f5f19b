"""Estimators of numbers, grades and survival times: they learn, score as scikit-learn does, and say what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import cohen_kappa_score, r2_score
from sklearn.model_selection import cross_val_score
from sksurv.metrics import concordance_index_censored
from sksurv.util import Surv

import mil
from extract.config import ConfigError

HOW = {"epochs": 12, "lr": 0.03, "batch_size": 8, "standardize": True, "accelerator": "cpu", "n_members": 2}


@pytest.fixture(scope="module")
def data():
    """36 bags whose mean tile carries a number."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=36)
    bags = [(rng.normal(size=(rng.integers(4, 9), 5)) * 0.3 + h).astype(np.float32) for h in hidden]
    return bags, hidden


def test_a_number(data):
    bags, hidden = data
    value = 40 + 10 * hidden
    estimator = mil.SlideRegressor("mean", **HOW)
    assert cross_val_score(estimator, bags, value, cv=2).min() > 0.7
    fitted = clone(estimator).fit(bags, value)
    assert fitted.score(bags, value) == pytest.approx(r2_score(value, fitted.predict(bags)))
    assert fitted.history_["member"].nunique() == 2
    assert (
        clone(estimator).set_params(loss="l1", val_fraction=0.3, select="best").fit(bags, value).score(bags, value)
        > 0.5
    )
    with pytest.raises(ConfigError, match=r"task.loss=cox"):
        clone(estimator).set_params(loss="cox").fit(bags, value)
    with pytest.raises(ValueError, match="differ"):
        estimator.fit(bags, np.ones(36))


@pytest.mark.parametrize("loss", ["cox", "discrete"])
def test_survival(data, loss):
    bags, hidden = data
    time, event = 30 * np.exp(-hidden), np.arange(36) % 4 > 0
    y = Surv.from_arrays(event, time)
    estimator = mil.SlideSurvival("mean", loss=loss, **HOW)
    assert cross_val_score(estimator, bags, y, cv=2).min() > 0.8
    fitted = clone(estimator).fit(bags, y)
    wanted = concordance_index_censored(event, time, fitted.predict(bags))[0]
    assert fitted.score(bags, y) == pytest.approx(wanted)
    plain = clone(estimator).fit(bags, np.stack([event, time], axis=1))
    assert np.array_equal(plain.predict(bags), fitted.predict(bags))
    with pytest.raises(ValueError, match="negative times"):
        estimator.fit(bags, np.stack([event, -time], axis=1))
    with pytest.raises(ValueError, match="at least one event"):
        estimator.fit(bags, np.stack([event * 0, time], axis=1))


def test_grades(data):
    bags, hidden = data
    grade = np.array(["low", "mid", "high"])[np.digitize(hidden, [-0.5, 0.5])]
    estimator = mil.SlideGrader("mean", grades=["low", "mid", "high"], **HOW)
    assert cross_val_score(estimator, bags, grade, cv=2).min() > 0.6
    fitted = clone(estimator).fit(bags, grade)
    said, order = fitted.predict(bags), {"low": 0, "mid": 1, "high": 2}
    pairs = [[order[one] for one in part] for part in (grade, said)]
    assert fitted.score(bags, grade) == pytest.approx(cohen_kappa_score(*pairs, weights="quadratic"))
    assert fitted.predict_proba(bags).sum(axis=1) == pytest.approx(np.ones(36))
    assert fitted.tile_scores(bags[0]).shape == (len(bags[0]),)
    with pytest.raises(ValueError, match="not among"):
        mil.SlideGrader("mean", grades=["low", "mid"], **HOW).fit(bags, grade)
