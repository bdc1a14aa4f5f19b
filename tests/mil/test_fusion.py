"""Encoders fused by logits: members as if alone, weights against a search, and no slide that weighs its own member."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators.contract import Aggregator
from mil.aggregators.fused import Fused
from mil.config import Train
from mil.report.figures_variants import variants_figure
from mil.training.bags import make_batch
from mil.training.fusion import FOLDS, NOTHING, VAL, fit_weights, fused_logits, held_out_logits, table_of
from mil.training.module import Members, MembersModule, fit


def module_of(aggregator, bags, labels_S, train_MS, n_classes=2, **train) -> MembersModule:
    n = len(train_MS)
    members = Members(np.full(n, 0.01), np.zeros(n), train_MS, np.zeros_like(train_MS))
    settings = Train(**({"epochs": 2, "batch_size": 5, "accelerator": "cpu"} | train))
    return MembersModule(aggregator, bags, labels_S, n_classes, members, settings)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_encoders_members_are_as_if_trained_alone(name, small_options, bags_of):
    rng = np.random.default_rng(0)
    whole = [rng.normal(size=(n, 10)).astype(np.float32) for n in rng.integers(6, 14, 12)]
    labels_S, train_MS = np.arange(12) % 3, rng.random((2, 12)) < 0.8
    make = aggregator_class(name)

    def made(width: int) -> Aggregator:
        return make(width, 3, [4, 9], **small_options[name])

    fused = module_of(Fused(made, [4, 6]), bags_of(whole), labels_S, train_MS, 3, standardize=True)
    fit(fused, progress=False)
    both = make_batch(fused.bags, list(range(12)), labels_S, np.ones((2, 12), dtype=bool))
    fused.aggregator.eval()
    with torch.inference_mode():
        found = fused.aggregator(both, with_scores=True)
        fused.aggregator.apart = True
        apart_MBEC = fused.aggregator(both).logits_MBC.unflatten(2, (2, 3))
    for e, columns in enumerate((slice(0, 4), slice(4, 10))):
        alone = module_of(
            made((4, 6)[e]), bags_of([x[:, columns] for x in whole]), labels_S, train_MS, 3, standardize=True
        )
        fit(alone, progress=False)
        batch = make_batch(alone.bags, list(range(12)), labels_S, np.ones((2, 12), dtype=bool))
        with torch.inference_mode():
            logits_MBC = alone.aggregator.eval()(batch).logits_MBC
        assert torch.allclose(apart_MBEC[:, :, e], logits_MBC, atol=2e-5)
    assert torch.allclose(found.logits_MBC, apart_MBEC.mean(dim=2), atol=1e-6)
    assert found.scores_MT.shape == (2, sum(map(len, whole)))
    assert not found.scores_MT.isnan().any()


@pytest.fixture
def held_out():
    """Two repeats of three folds: encoder 0 knows the class, encoder 1 less, encoder 2 nothing; S slides."""
    rng = np.random.default_rng(2)
    labels_S = rng.integers(0, 2, 90)
    members = pd.DataFrame({"member": range(6), "repeat": np.repeat([0, 1], 3), "fold": [0, 1, 2] * 2, "seed": 0})
    fold_RS = [rng.permutation(np.arange(90) % 3) for _ in range(2)]
    test_MS = np.stack([fold_RS[m // 3] == m % 3 for m in range(6)])
    signal = (2 * labels_S - 1)[None, :, None] * np.array([1.0, 0.7, 0.0])
    logits_MSEC = (signal + rng.normal(size=(6, 90, 3)))[..., None].astype(np.float32)
    return members, labels_S, test_MS, logits_MSEC


def weighing(labels_S: np.ndarray, bags) -> MembersModule:
    none = np.zeros((6, len(labels_S)), dtype=bool)
    return module_of(Aggregator(6, 1, list(range(6))), bags, labels_S, none)


@pytest.fixture
def some_bags(bags_of):
    return bags_of([np.zeros((2, 6), dtype=np.float32)] * 90)


def test_weights_are_the_best_of_the_simplex_on_what_the_other_folds_held_out(held_out, some_bags):
    members, labels_S, test_MS, logits_MSEC = held_out
    held = held_out_logits(members, logits_MSEC, test_MS, np.zeros_like(test_MS), np.ones(90, dtype=bool))
    assert held.origin_M == [FOLDS] * 6
    weights_ME = fit_weights(weighing(labels_S, some_bags), held)
    assert np.allclose(weights_ME.sum(axis=1), 1)
    steps = np.arange(0, 51) / 50
    simplex = [(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1]
    for m in range(6):
        own = [o for o in range(6) if o // 3 == m // 3 and o != m]
        x_NE = np.concatenate([logits_MSEC[o, test_MS[o], :, 0] for o in own])
        y_N = np.concatenate([labels_S[test_MS[o]] for o in own])
        losses = [-np.log(expit(np.where(y_N, 1, -1) * (x_NE @ w))).mean() for w in simplex]
        assert np.allclose(weights_ME[m], simplex[int(np.argmin(losses))], atol=0.03)
    table = table_of(members, ["a", "b", "c"], weights_ME, held.origin_M)
    assert table.columns.tolist() == ["member", "repeat", "fold", "seed", "encoder", "weight", "fitted_on"]
    assert len(table) == 18


def test_a_members_own_slides_do_not_weigh_its_encoders(held_out, some_bags):
    members, labels_S, test_MS, logits_MSEC = held_out
    found = []
    for labels in (labels_S, np.where(test_MS[1], 1 - labels_S, labels_S)):
        held = held_out_logits(members, logits_MSEC, test_MS, np.zeros_like(test_MS), np.ones(90, dtype=bool))
        found.append(fit_weights(weighing(labels, some_bags), held))
    assert np.array_equal(found[0][1], found[1][1])
    assert not np.allclose(found[0][0], found[1][0], atol=0.02)


def test_without_other_folds_val_slides_weigh_and_without_those_all_count_alike(held_out, some_bags):
    members, labels_S, test_MS, logits_MSEC = held_out
    val_MS = np.zeros_like(test_MS)
    val_MS[0, :60] = True
    one_each = members.assign(repeat=range(6))
    held = held_out_logits(one_each, logits_MSEC, test_MS, val_MS, np.ones(90, dtype=bool))
    assert held.origin_M == [VAL] + [NOTHING] * 5
    weights_ME = fit_weights(weighing(labels_S, some_bags), held)
    assert weights_ME[0, 0] > 0.5
    assert np.allclose(weights_ME[1:], 1 / 3)
    by_hand = sum(weights_ME[0, e] * logits_MSEC[0, :, e] for e in range(3))
    assert np.allclose(fused_logits(weights_ME, logits_MSEC)[0], by_hand, atol=1e-6)


@pytest.mark.parametrize("sets", [["out_of_fold"], ["out_of_fold", "test"]])
def test_variants_are_drawn_with_what_is_known_of_them(sets):
    known, unknown = {"value": 0.8, "low": 0.7, "high": 0.9}, {"value": None, "low": None, "high": None}
    shown = {"own": known, "without an interval": known | {"low": None, "high": None}, "undefined": unknown}
    rows = [{"title": title, **{where: {"metric": found} for where in sets}} for title, found in shown.items()]
    figure = variants_figure("fusion")({"fusion": {"sets": sets, "rows": rows, "metric_title": "AUC"}})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["own", "without an interval", "undefined"]
    points = [line.get_xdata() for line in axes.lines]
    assert [list(x) for x in points] == [[0.8, 0.8]] * len(sets)
    assert variants_figure("fusion")({"fusion": {"sets": []}}) is None
