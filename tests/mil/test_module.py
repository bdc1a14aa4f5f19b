"""Training many members at once: each as if alone, the right epoch kept, interruptions without a trace.

Axes: M members, S slides, B bags, T tiles, D features, C outputs (1 for two classes).
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from mil.aggregators import aggregator_class
from mil.aggregators.batch import pack
from mil.aggregators.pooling import MeanPool
from mil.config import StudyConfig
from mil.pipeline import training as pipeline
from mil.study.roles import Plan
from mil.tasks.table import task_of
from mil.training.bags import Bags
from mil.training.module import CHECKPOINT, MembersModule, auc_of_logits, fit, predict_logits

N_SLIDES = 26


@pytest.fixture(scope="module")
def witness(bags_of, witness_arrays) -> tuple[Bags, np.ndarray]:
    """Two classes, 26 slides of 3 to 20 tiles, weak witnesses."""
    arrays, labels_S = witness_arrays(N_SLIDES, seed=3, strength=2.0)
    return bags_of(arrays), labels_S


@pytest.fixture(scope="module")
def three_classes(bags_of, witness_arrays) -> tuple[Bags, np.ndarray]:
    arrays, labels_S = witness_arrays(N_SLIDES, seed=4, n_classes=3)
    return bags_of(arrays), labels_S


def folds(n_members: int, n_slides: int = N_SLIDES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """train_MS, val_MS and test_MS: every member's own deal, val and test a fifth of the slides."""
    places_MS = np.stack([np.random.default_rng([9, m]).permutation(n_slides) for m in range(n_members)])
    fifth = n_slides // 5
    return places_MS >= 2 * fifth, (places_MS >= fifth) & (places_MS < 2 * fifth), places_MS < fifth


def all_logits(module: MembersModule) -> np.ndarray:
    return predict_logits(module, list(range(len(module.bags))))


def weights(module: MembersModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.aggregator.state_dict().items()}


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def history(module: MembersModule, member: int | None = None) -> pd.DataFrame:
    table = pd.DataFrame(module.history)
    return table if member is None else table[table["member"] == member].drop(columns="member").reset_index(drop=True)


# --- members together and alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["abmil", "chowder", "mean", "max"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"select": "best", "patience": 2, "epochs": 8, "metric": "loss", "schedule": "cosine"},
        {"standardize": True, "class_weights": "balanced", "optimizer": "adamw"},
    ],
    ids=["plain", "best", "standardized"],
)
def test_a_member_among_others_equals_the_member_alone(witness, trained, name, settings):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(3)
    lr, decay, seeds = [0.05, 0.01, 0.1], [0.0, 0.1, 1e-3], [5, 0, 11]
    together = trained(
        bags, labels_S, train_MS, val_MS, name=name, lr=lr, weight_decay=decay, init_seeds=seeds, **settings
    )
    logits_MSC = all_logits(together)
    for m in range(3):
        mine = {"lr": lr[m], "weight_decay": decay[m], "init_seeds": seeds[m : m + 1]}
        alone = trained(bags, labels_S, train_MS[[m]], val_MS[[m]], name=name, **mine, **settings)
        np.testing.assert_allclose(logits_MSC[m], all_logits(alone)[0], rtol=1e-5, atol=1e-5)
        assert together.best_epoch_M[m] == alone.best_epoch_M[0]
        pd.testing.assert_frame_equal(history(together, m), history(alone, 0), rtol=1e-4, atol=1e-4)


def test_a_member_with_a_subset_of_tiles_equals_the_member_alone(witness, trained):
    bags, labels_S = witness
    train_MS = folds(3)[0]
    together = all_logits(trained(bags, labels_S, train_MS, max_tiles=5))
    alone = all_logits(trained(bags, labels_S, train_MS[[1]], init_seeds=[1], max_tiles=5))
    everything = all_logits(trained(bags, labels_S, train_MS))
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-5)
    assert np.abs(together - everything).max() > 1e-3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_on_two_threads_equals_training_on_one_and_repeats_bit_for_bit(
    witness, trained, monkeypatch, two_threads, precision
):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(3)
    monkeypatch.setattr("mil.training.bags.VIEW_TILES", 8)  # so that there are groups of one bag and packed ones
    options: dict[str, Any] = {"lr": 1e-3, "standardize": True, "precision": precision}
    first, again = (trained(bags, labels_S, train_MS, val_MS, **options) for _ in range(2))
    assert_same_weights(weights(again), weights(first))
    logits_MSC = all_logits(first)
    assert torch.get_num_threads() == 2, "training must hand the threads back"
    torch.set_num_threads(1)
    one = trained(bags, labels_S, train_MS, val_MS, **options)
    tolerance = 1e-5 if precision == "32-true" else 0.05
    np.testing.assert_allclose(logits_MSC, all_logits(one), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["abmil", "chowder", "mean", "max"])
def test_float16_features_train_as_the_same_values_in_float32(witness, trained, name):
    bags, labels_S = witness
    views = [view.half() for view in bags.views]
    half = Bags(bags.slides, bags.lengths_S, bags.dim, "ram", tuple(views))
    full = Bags(bags.slides, bags.lengths_S, bags.dim, "ram", tuple(view.float() for view in views))
    train_MS = folds(2)[0]
    modules = [trained(each, labels_S, train_MS, name=name, standardize=True) for each in (half, full)]
    assert_same_weights(weights(modules[0]), weights(modules[1]))
    assert np.array_equal(all_logits(modules[0]), all_logits(modules[1]))


# --- against a plain loop with torch --------------------------------------------------------------------------------


def plain_mean_pooling(
    start: MeanPool, bags: Bags, labels_S: np.ndarray, train_S: np.ndarray, n_classes: int, **settings: Any
) -> np.ndarray:
    """Full-batch training of torch.nn.Linear on bag means, with torch's losses, optimisers and schedules: (S, C)."""
    means_SD = torch.stack([view.mean(dim=0) for view in bags.views])
    layer = nn.Linear(bags.dim, 1 if n_classes == 2 else n_classes)
    layer.weight.data.copy_(start.get_parameter("head0_weight")[0].detach().T)
    layer.bias.data.copy_(start.get_parameter("head0_bias")[0].detach())
    kind = torch.optim.AdamW if settings["optimizer"] == "adamw" else torch.optim.Adam
    optimizer = kind(layer.parameters(), lr=0.05, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings["epochs"])
    labels_N = torch.from_numpy(labels_S[train_S])
    weight_C = torch.ones(n_classes)
    if settings["class_weights"] == "balanced":
        weight_C = len(labels_N) / (n_classes * torch.bincount(labels_N, minlength=n_classes))
    for _ in range(settings["epochs"]):
        optimizer.zero_grad()
        logits_NC = layer(means_SD[torch.from_numpy(train_S)])
        if n_classes == 2:  # the same loss as two logits of which the first is always 0
            logits_NC = torch.cat([torch.zeros_like(logits_NC), logits_NC], dim=1)
        functional.cross_entropy(logits_NC, labels_N, weight=weight_C).backward()
        optimizer.step()
        if settings["schedule"] == "cosine":
            schedule.step()
    return layer(means_SD).detach().numpy()


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"class_weights": "none", "schedule": "constant", "optimizer": "adam"},
        {"class_weights": "balanced", "schedule": "constant", "optimizer": "adamw"},
        {"class_weights": "balanced", "schedule": "cosine", "optimizer": "adam"},
    ],
    ids=["plain", "balanced-adamw", "balanced-cosine"],
)
def test_training_equals_a_plain_loop_with_torch(witness, three_classes, small_module, trained, n_classes, settings):
    bags, labels_S = witness if n_classes == 2 else three_classes
    settings = {"epochs": 7, **settings}
    n_before_S = [np.sum(labels_S[:i] == label) for i, label in enumerate(labels_S)]
    train_S = n_before_S < 3 + 2 * labels_S  # 3, 5 and 7 slides of the classes
    arguments: dict[str, Any] = {"name": "mean", "n_classes": n_classes, "lr": 0.05, "weight_decay": 0.01}
    start = small_module(bags, labels_S, train_S[None], **arguments).aggregator
    expected = plain_mean_pooling(start, bags, labels_S, train_S, n_classes, **settings)
    module = trained(bags, labels_S, train_S[None], batch_size=N_SLIDES, **arguments, **settings)
    np.testing.assert_allclose(all_logits(module)[0], expected, rtol=1e-4, atol=1e-5)


def test_class_weights_by_hand(three_classes, small_module):
    """n / (C * n_c) over each member's own training slides."""
    bags, _ = three_classes
    labels_S = np.array([0] * 10 + [1] * 6 + [2] * 10)
    train_MS = np.zeros((2, N_SLIDES), dtype=bool)
    train_MS[0, [0, 1, 2, 10, 16, 17]] = True  # 3, 1 and 2 slides
    train_MS[1, [0, 10, 11, 12, 13, 16]] = True  # 1, 4 and 1
    module = small_module(bags, labels_S, train_MS, n_classes=3, class_weights="balanced")
    expected = torch.tensor([[6 / 9, 6 / 3, 6 / 6], [6 / 3, 6 / 12, 6 / 3]])
    torch.testing.assert_close(module.class_weights_MC, expected)
    assert (small_module(bags, labels_S, train_MS, n_classes=3).class_weights_MC == 1).all()


def test_three_classes_learn_and_their_auc_is_the_mean_of_one_against_the_rest(bags_of, witness_arrays, trained):
    arrays, labels_S = witness_arrays(90, seed=4, n_classes=3, strength=6.0)
    train_MS = np.tile(np.arange(90) < 50, (2, 1))
    val_MS = np.tile((np.arange(90) >= 50) & (np.arange(90) < 70), (2, 1))
    options = {"name": "max", "n_classes": 3, "epochs": 20, "lr": 0.05}
    module = trained(bags_of(arrays), labels_S, train_MS, val_MS, **options)
    logits_MSC = all_logits(module)
    assert logits_MSC.shape == (2, 90, 3)
    for m in range(2):
        assert (logits_MSC[m].argmax(axis=1) == labels_S)[70:].mean() > 0.8
        p_NC = softmax(logits_MSC[m, val_MS[m]].astype(float), axis=1)
        last = history(module, m).iloc[-1]
        assert last["val_auc"] == pytest.approx(roc_auc_score(labels_S[val_MS[m]], p_NC, multi_class="ovr"))
        assert last["val_loss"] == pytest.approx(log_loss(labels_S[val_MS[m]], p_NC), rel=1e-4)


def test_standardising_equals_features_standardised_beforehand(witness, bags_of, trained):
    bags, labels_S = witness
    train_MS = folds(1)[0]
    scales_D = np.linspace(0.1, 30, bags.dim).astype(np.float32)
    odd = [view.numpy() * scales_D + 10 * scales_D for view in bags.views]
    tiles_TD = np.concatenate([odd[i] for i in np.flatnonzero(train_MS[0])])
    done = [(array - tiles_TD.mean(axis=0)) / tiles_TD.std(axis=0) for array in odd]
    inside = all_logits(trained(bags_of(odd), labels_S, train_MS, standardize=True))
    beforehand = all_logits(trained(bags_of(done), labels_S, train_MS))
    np.testing.assert_allclose(inside, beforehand, rtol=1e-3, atol=1e-3)


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_history_has_one_row_for_every_member_and_epoch(witness, trained):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(3)
    table = history(trained(bags, labels_S, train_MS, val_MS, epochs=5))
    assert list(table.columns) == ["member", "epoch", "train_loss", "train_auc", "val_loss", "val_auc"]
    assert sorted(zip(table["member"], table["epoch"], strict=True)) == [(m, e) for m in range(3) for e in range(1, 6)]
    assert np.isfinite(table.to_numpy()).all()
    without_val = history(trained(bags, labels_S, train_MS, epochs=2))
    assert without_val[["val_loss", "val_auc"]].isna().all(axis=None)
    assert np.isfinite(without_val[["train_loss", "train_auc"]].to_numpy()).all()


def test_val_history_is_loss_and_auc_of_the_weights_at_the_end_of_the_epoch(witness, trained):
    """After the last epoch the module holds those weights, so scikit-learn can check on them."""
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(3)
    module = trained(bags, labels_S, train_MS, val_MS, epochs=3)
    logits_MS = all_logits(module)[:, :, 0].astype(float)
    for m, val_S in enumerate(val_MS):
        last = history(module, m).iloc[-1]
        assert last["val_auc"] == pytest.approx(roc_auc_score(labels_S[val_S], logits_MS[m, val_S]))
        expected = log_loss(labels_S[val_S], expit(logits_MS[m, val_S]))
        assert last["val_loss"] == pytest.approx(expected, rel=1e-4)


def test_train_history_is_loss_and_auc_of_the_epochs_own_steps(witness, trained, small_module):
    """With one batch an epoch, those of the first epoch are the untrained members'."""
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(3)
    untrained = small_module(bags, labels_S, train_MS).aggregator
    with torch.no_grad():
        logits_MS = untrained(pack(bags.views, 3)).logits_MBC[:, :, 0].double().numpy()
    for vals_MS in (val_MS, None):
        module = trained(bags, labels_S, train_MS, vals_MS, epochs=1, batch_size=N_SLIDES)
        for m, train_S in enumerate(train_MS):
            (row,) = history(module, m).to_dict("records")
            assert row["train_auc"] == pytest.approx(roc_auc_score(labels_S[train_S], logits_MS[m, train_S]))
            expected = log_loss(labels_S[train_S], expit(logits_MS[m, train_S]))
            assert row["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_loss_and_auc_of_every_member_are_logged_to_csv(witness, small_module, tmp_path):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    module = small_module(bags, labels_S, train_MS, val_MS, epochs=3)
    fit(module, logs=tmp_path, progress=False)
    logged = pd.read_csv(tmp_path / "metrics.csv")
    for m in range(2):
        for column in ("train_loss", "train_auc", "val_loss", "val_auc"):
            values = logged[f"{column}/member{m}"].dropna().to_numpy()
            np.testing.assert_allclose(values, history(module, m)[column], rtol=1e-6)


# --- chance ---------------------------------------------------------------------------------------------------------


def test_training_does_not_fill_fresh_memory_and_hands_the_setting_back(witness, trained):
    class Watching(MembersModule):
        def on_train_batch_start(self, *arguments: Any) -> None:
            assert torch.are_deterministic_algorithms_enabled()
            seen.append(torch.utils.deterministic.fill_uninitialized_memory)

    seen: list[bool] = []
    bags, labels_S = witness
    trained(bags, labels_S, folds(3)[0], module_class=Watching)
    assert seen
    assert not any(seen)
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("name", ["abmil", "chowder"])
def test_same_seed_same_predictions(witness, trained, name):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    first, again = (trained(bags, labels_S, train_MS, val_MS, name=name, max_tiles=7) for _ in range(2))
    assert np.array_equal(all_logits(first), all_logits(again))
    pd.testing.assert_frame_equal(history(first), history(again), check_exact=True)


def test_trap_5_another_seed_gives_another_order_and_0_is_a_seed(witness, trained):
    bags, labels_S = witness
    train_MS = folds(1)[0]
    runs = [all_logits(trained(bags, labels_S, train_MS, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 1e-4


def test_torchs_global_seed_has_no_say(witness, trained):
    bags, labels_S = witness
    train_MS = folds(1)[0]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(all_logits(trained(bags, labels_S, train_MS, max_tiles=7)))
    assert np.array_equal(*found)


# --- which epoch is kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["auc", "loss"])
def test_trap_5_best_keeps_exactly_the_weights_after_that_many_epochs(witness, trained, metric):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(4)
    arguments = (bags, labels_S, train_MS, val_MS)
    module = trained(*arguments, epochs=9, lr=0.05, select="best", metric=metric)
    best_M = module.best_epoch_M.tolist()
    assert any(1 < best < 9 for best in best_M), f"the data must have a best epoch in the middle, got {best_M}"
    for m, best in enumerate(best_M):
        curve = history(module, m)["val_auc" if metric == "auc" else "val_loss"]
        assert best == 1 + (curve.argmax() if metric == "auc" else curve.argmin())
        as_long = trained(*arguments, epochs=best, lr=0.05)
        assert as_long.best_epoch_M.tolist() == [best] * 4
        for name, tensor in weights(as_long).items():
            assert torch.equal(weights(module)[name][m], tensor[m]), name


def test_last_keeps_the_last_epoch_whatever_val_says(witness, trained):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    with_val = trained(bags, labels_S, train_MS, val_MS, epochs=6)
    without = trained(bags, labels_S, train_MS, epochs=6)
    assert_same_weights(weights(with_val), weights(without))
    assert with_val.best_epoch_M.tolist() == [6, 6]


def test_patience_stops_one_member_and_the_other_goes_on_as_if_alone(witness, trained):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    settings = {"epochs": 14, "select": "best", "metric": "loss", "patience": 2}
    lr = [0.1, 0.01]
    module = trained(bags, labels_S, train_MS, val_MS, lr=lr, **settings)
    epochs_M = [int(history(module, m)["epoch"].max()) for m in range(2)]
    assert epochs_M[1] + 2 < epochs_M[0] < 14, f"the data must stop member 1 long before the other, got {epochs_M}"
    assert module.active_M.tolist() == [False, False]
    for m in range(2):
        assert history(module, m)["epoch"].tolist() == list(range(1, module.best_epoch_M[m] + 3))
        mine = {"lr": lr[m], "init_seeds": [m]}
        alone = trained(bags, labels_S, train_MS[[m]], val_MS[[m]], **mine, **settings)
        assert alone.best_epoch_M[0] == module.best_epoch_M[m]
        np.testing.assert_allclose(all_logits(alone)[0], all_logits(module)[m], rtol=1e-5, atol=1e-5)
        pd.testing.assert_frame_equal(history(alone, 0), history(module, m), rtol=1e-4, atol=1e-4)


def test_training_ends_when_all_members_have_stopped(witness, trained):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    module = trained(bags, labels_S, train_MS, val_MS, epochs=500, lr=0.5, select="best", patience=3)
    assert not module.active_M.any()
    for m in range(2):
        assert history(module, m)["epoch"].max() == module.best_epoch_M[m] + 3 < 500


@pytest.mark.parametrize("what_is_missing", ["val slides", "a class among the val slides"])
def test_best_without_anything_to_select_on_is_refused(witness, trained, what_is_missing):
    """A metric that is undefined in every epoch would keep the first one in silence."""
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    val_MS[1] &= (labels_S == 0) & (what_is_missing != "val slides")
    with pytest.raises(ValueError, match=r"member 1.*val"):
        trained(bags, labels_S, train_MS, val_MS, epochs=3, select="best", metric="auc")


# --- the reported slides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"standardize": True, "class_weights": "balanced"}], ids=["plain", "weighted"]
)
@pytest.mark.parametrize("select", ["last", "best"])
def test_trap_1_labels_and_features_of_the_reported_slides_change_nothing(witness, bags_of, trained, select, settings):
    bags, labels_S = witness
    train_MS, val_MS, test_MS = folds(1)
    turned_S = np.where(test_MS[0], 1 - labels_S, labels_S)
    garbage = bags_of([view.numpy() + 100 * test_MS[0, i] for i, view in enumerate(bags.views)])
    settings = {"epochs": 6, "select": select, "lr": 0.05, **settings}
    as_they_are = trained(bags, labels_S, train_MS, val_MS, **settings)
    turned = trained(garbage, turned_S, train_MS, val_MS, **settings)
    assert_same_weights(weights(turned), weights(as_they_are))
    assert turned.best_epoch_M.tolist() == as_they_are.best_epoch_M.tolist()
    pd.testing.assert_frame_equal(history(turned), history(as_they_are), check_exact=True)


def test_trap_1_labels_of_val_slides_change_the_epoch_but_no_weights_of_an_epoch(witness, trained):
    """The other half of the trap: val selects and does nothing else."""
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(1)
    turned_S = np.where(val_MS[0], 1 - labels_S, labels_S)
    curves = [history(trained(bags, labels, train_MS, val_MS, epochs=6)) for labels in (labels_S, turned_S)]
    assert curves[0]["train_loss"].equals(curves[1]["train_loss"])
    np.testing.assert_allclose(curves[0]["val_auc"], 1 - curves[1]["val_auc"], atol=1e-6)


# --- evaluation mode ------------------------------------------------------------------------------------------------


class Recorder(MeanPool):
    """Mean pooling with dropout that notes in which mode every forward pass ran, and on how many tiles."""

    modes: list[tuple[bool, bool]]

    def forward(self, batch: Any, with_scores: bool = False) -> Any:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return super().forward(batch, with_scores)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return super().head(functional.dropout(pooled_MBP, 0.5, training=self.training))


def test_trap_4_evaluation_is_in_evaluation_mode(witness, small_module):
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    module = small_module(bags, labels_S, train_MS, val_MS, name="mean", epochs=3)
    recorder = Recorder(bags.dim, 1, [0, 1])
    recorder.modes = []
    module.aggregator = recorder
    fit(module, progress=False)
    steps = -(-train_MS.sum(axis=1).max() // 5)
    assert recorder.modes == ([(True, True)] * steps + [(False, False)]) * 3
    recorder.modes.clear()
    first, again = all_logits(module), all_logits(module)
    assert recorder.modes == [(False, False)] * 2
    assert np.array_equal(first, again), "dropout would make them differ"
    means_SD = np.stack([view.numpy().mean(axis=0) for view in bags.views])
    weight_MDC = recorder.get_parameter("head0_weight").detach().numpy()
    expected = means_SD @ weight_MDC + recorder.get_parameter("head0_bias").detach().numpy()[:, None]
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_uses_all_tiles_when_training_uses_a_subset(witness, trained):
    bags, labels_S = witness
    train_MS = folds(2)[0]
    module = trained(bags, labels_S, train_MS, name="mean", max_tiles=4)
    means_SD = np.stack([view.numpy().mean(axis=0) for view in bags.views])
    weight_MDC = weights(module)["head0_weight"].numpy()
    expected = means_SD @ weight_MDC + weights(module)["head0_bias"].numpy()[:, None]
    np.testing.assert_allclose(all_logits(module), expected, rtol=1e-5, atol=1e-5)


def test_predictions_come_in_the_order_asked_for(witness, trained):
    bags, labels_S = witness
    module = trained(bags, labels_S, folds(2)[0])
    chosen = [17, 3, 0, 25, 8]
    np.testing.assert_allclose(predict_logits(module, chosen), all_logits(module)[:, chosen], rtol=1e-5, atol=1e-6)


# --- interruption and resumption ------------------------------------------------------------------------------------

INTERRUPTED: list[dict[str, Any]] = [
    {"epochs": 7, "schedule": "cosine", "standardize": True},
    {"epochs": 7, "select": "best", "metric": "loss", "patience": 3, "lr": [0.2, 0.01, 0.05], "optimizer": "adamw"},
    {"epochs": 7, "max_tiles": 6, "class_weights": "balanced", "name": "chowder", "weight_decay": 0.01},
]
interrupted = pytest.mark.parametrize("settings", INTERRUPTED, ids=["cosine", "best", "chowder"])


def interrupting(epoch: int, step: int | None) -> type[MembersModule]:
    """A module in which somebody presses Ctrl+C: in the given step of an epoch (from 0), or at its end."""

    class Interrupting(MembersModule):
        def training_step(self, batch: Any, number: int) -> Tensor:
            if (self.current_epoch, number) == (epoch, step):
                raise KeyboardInterrupt
            return super().training_step(batch, number)

        def on_train_epoch_start(self) -> None:
            if step is None and self.current_epoch == epoch + 1:
                raise KeyboardInterrupt
            super().on_train_epoch_start()

    return Interrupting


@contextmanager
def expect_interrupt() -> Iterator[None]:
    """Lightning turns off SIGINT when it is interrupted; other tests must not inherit that."""
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def resumed(
    make: Callable[..., MembersModule], arguments: Sequence[Any], folder: Path, **settings: Any
) -> MembersModule:
    module = make(*arguments, **settings)
    fit(module, folder, resume=True, progress=False)
    return module


def assert_same_run(actual: MembersModule, expected: MembersModule) -> None:
    assert_same_weights(weights(actual), weights(expected))
    pd.testing.assert_frame_equal(history(actual), history(expected), check_exact=True)
    assert actual.best_epoch_M.tolist() == expected.best_epoch_M.tolist()
    assert actual.active_M.tolist() == expected.active_M.tolist()
    assert np.array_equal(all_logits(actual), all_logits(expected))


@interrupted
@pytest.mark.parametrize(("epoch", "step"), [(0, None), (3, None), (0, 1), (4, 2)])
def test_an_interrupted_run_resumes_to_the_same_result(witness, small_module, trained, tmp_path, settings, epoch, step):
    bags, labels_S = witness
    arguments = (bags, labels_S, *folds(3)[:2])
    whole = trained(*arguments, **settings)
    with expect_interrupt():
        fit(small_module(*arguments, module_class=interrupting(epoch, step), **settings), tmp_path, progress=False)
    assert_same_run(resumed(small_module, arguments, tmp_path, **settings), whole)


def test_interrupted_twice(witness, small_module, trained, tmp_path):
    bags, labels_S = witness
    arguments, settings = (bags, labels_S, *folds(3)[:2]), INTERRUPTED[1]
    whole = trained(*arguments, **settings)
    for epoch, step in ((1, None), (3, 1)):
        with expect_interrupt():
            resumed(small_module, arguments, tmp_path, module_class=interrupting(epoch, step), **settings)
    assert_same_run(resumed(small_module, arguments, tmp_path, **settings), whole)


@interrupted
def test_resuming_a_run_whose_training_had_finished_changes_nothing(witness, small_module, tmp_path, settings):
    """As when the process is killed between the last epoch and the report."""
    bags, labels_S = witness
    arguments = (bags, labels_S, *folds(3)[:2])
    finished = small_module(*arguments, **settings)
    fit(finished, tmp_path, progress=False)
    assert_same_run(resumed(small_module, arguments, tmp_path, **settings), finished)


def test_resuming_a_run_in_which_all_members_had_stopped_changes_nothing(witness, small_module, tmp_path):
    bags, labels_S = witness
    arguments = (bags, labels_S, *folds(2)[:2])
    settings = {"epochs": 500, "lr": 0.5, "select": "best", "patience": 2}
    stopped = small_module(*arguments, **settings)
    fit(stopped, tmp_path, progress=False)
    assert not stopped.active_M.any()
    assert_same_run(resumed(small_module, arguments, tmp_path, **settings), stopped)


def test_an_error_that_is_no_interruption_is_passed_on(witness, small_module):
    class Failing(MembersModule):
        def training_step(self, batch: Any, step: int) -> Tensor:
            raise ZeroDivisionError("on purpose")

    bags, labels_S = witness
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        fit(small_module(bags, labels_S, folds(1)[0], module_class=Failing), progress=False)


def test_without_resume_a_checkpoint_is_not_read(witness, small_module, trained, tmp_path):
    bags, labels_S = witness
    arguments = (bags, labels_S, folds(2)[0])
    fit(small_module(*arguments, epochs=2), tmp_path, progress=False)
    assert (tmp_path / CHECKPOINT).exists()
    module = small_module(*arguments, epochs=4)
    fit(module, tmp_path, progress=False)
    assert_same_run(module, trained(*arguments, epochs=4))


def test_resume_without_a_checkpoint_starts_from_the_beginning(witness, small_module, trained, tmp_path):
    bags, labels_S = witness
    arguments = (bags, labels_S, folds(2)[0])
    assert_same_run(resumed(small_module, arguments, tmp_path / "none"), trained(*arguments))


# --- does it learn, and only what is there? -------------------------------------------------------------------------

N_TRAIN, N_TEST, N_RUNS = 60, 200, 3


def held_out_auc(
    arrays: list[np.ndarray], labels_S: np.ndarray, bags_of: Any, trained: Any, name: str, **settings: Any
) -> float:
    """Train on the first slides, AUC on the others."""
    train_1S = (np.arange(len(arrays)) < N_TRAIN)[None]
    module = trained(bags_of(arrays), labels_S, train_1S, name=name, epochs=25, lr=0.01, batch_size=16, **settings)
    logits_1SC = predict_logits(module, list(range(N_TRAIN, len(arrays))))
    return float(roc_auc_score(labels_S[N_TRAIN:], logits_1SC[0, :, 0]))


@pytest.mark.parametrize("name", ["abmil", "chowder"])
def test_witnesses_are_found_and_permuted_labels_or_absent_witnesses_give_an_auc_near_one_half(
    bags_of, witness_arrays, trained, name
):
    """Chance: SD of an AUC of 100 against 100 slides is 0.041, of the mean of 3 runs 0.024; the limit is 4 SD."""
    found: dict[str, list[float]] = {"witnesses": [], "permuted": [], "absent": []}
    for seed in range(N_RUNS):
        arrays, labels_S = witness_arrays(N_TRAIN + N_TEST, seed, lengths=(20, 40), strength=5.0)
        permuted_S = np.random.default_rng(seed).permutation(labels_S)
        absent, _ = witness_arrays(N_TRAIN + N_TEST, seed, lengths=(20, 40), strength=0.0)
        found["witnesses"].append(held_out_auc(arrays, labels_S, bags_of, trained, name))
        found["permuted"].append(held_out_auc(arrays, permuted_S, bags_of, trained, name))
        found["absent"].append(held_out_auc(absent, labels_S, bags_of, trained, name))
    assert min(found["witnesses"]) > 0.9, found
    for chance in ("absent", "permuted"):
        assert np.mean(found[chance]) == pytest.approx(0.5, abs=0.096), found


@pytest.mark.parametrize("name", ["abmil", "chowder", "mean", "max"])
def test_slides_with_their_tiles_in_another_order_train_the_same_members(witness, bags_of, trained, name):
    bags, labels_S = witness
    rng = np.random.default_rng(0)
    shuffled = bags_of([rng.permutation(view.numpy()) for view in bags.views])
    train_MS, val_MS, _ = folds(2)
    expected, found = (all_logits(trained(each, labels_S, train_MS, val_MS, name=name)) for each in (bags, shuffled))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_members_per_pass_changes_nothing(studies, run_study, tmp_path):
    """Six members in passes of 1, 2 or all at once; `auto`, which is all here, is the study itself."""
    study = studies("abmil")
    history = pd.read_csv(study.folder / "history.csv").sort_values(["member", "epoch"], ignore_index=True)
    for size in (1, 2, 6):
        folder = tmp_path / str(size)
        run_study([*study.arguments, f"train.members_per_pass={size}", f"out={folder}"])
        np.testing.assert_allclose(logits_of(folder), logits_of(study.folder), rtol=1e-5, atol=1e-5)
        own = pd.read_csv(folder / "history.csv").sort_values(["member", "epoch"], ignore_index=True)
        pd.testing.assert_frame_equal(own, history, rtol=1e-4, atol=1e-4)


def test_auto_trains_as_many_members_together_as_free_memory_holds(monkeypatch):
    """So much free that the activations of 3.5 members fit into the share for them; of nearly nothing, one member."""
    config = StudyConfig.model_validate({"cohort": "x.csv", "model": {"name": "abmil"}, "train": {"batch_size": 2}})
    study: Any = SimpleNamespace(
        config=config,
        plan=Plan(pd.DataFrame({"init_seed": range(6)}), np.zeros((6, 3), dtype=np.int8)),
        bags=SimpleNamespace(dim=8, lengths_S=np.array([50, 2000, 1000]), covariates_SV=None),
        cohort=SimpleNamespace(classes=("normal", "tumor")),
        task=task_of(config.task, ("normal", "tumor")),
        sites=[],
        start=None,
        length_M=None,
        widths=(),
        covariates=(),
    )
    one = aggregator_class("abmil")(8, 1, [0])
    floats = 3000 * one.floats_per_tile + 2 * one.floats_per_bag + 4 * sum(p.numel() for p in one.parameters())
    for members, expected in ((3.5, 3), (0.1, 1), (100, 6)):
        free = SimpleNamespace(available=4 * floats * members / pipeline.ACTIVATION_SHARE)
        monkeypatch.setattr(pipeline, "free_bytes", lambda free=free: int(free.available))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert pipeline.members_that_fit(study, "abmil") == expected
        assert [len(part) for part in pipeline.passes_of(study, "abmil")] == {3: [3, 3], 1: [1] * 6, 6: [6]}[expected]


def test_coordinates_change_nothing(studies, run_study, write_study, tmp_path):
    """The same features, every tile at (0, 0) and in float16 as before: the same predictions to the last digit."""
    study = studies("abmil")
    arrays = [tiles_TD.numpy() for tiles_TD in study.tiles]
    labels = np.array(["normal", "tumor"])[study.labels_S]
    nowhere = {"coords": lambda n: np.zeros((n, 2), dtype=np.int32), "dtype": "float16", "split": study.split}
    data = write_study(tmp_path / "features", arrays, labels, **nowhere)
    run_study([*data, *study.arguments[2:], f"out={tmp_path / 'run'}"])
    assert np.array_equal(logits_of(tmp_path / "run"), logits_of(study.folder))


def logits_of(folder: Path) -> np.ndarray:
    """(M, S) as written."""
    table = pd.read_csv(folder / "predictions.csv")
    return table.pivot_table(index="member", columns="slide", values="logit_0").to_numpy()


def test_bfloat16_trains(witness, trained):
    """Lightning's precision reaches the module; results stay near those of float32."""
    bags, labels_S = witness
    train_MS, val_MS, _ = folds(2)
    exact = all_logits(trained(bags, labels_S, train_MS, val_MS, epochs=2, lr=1e-3))
    rough = all_logits(trained(bags, labels_S, train_MS, val_MS, epochs=2, lr=1e-3, precision="bf16-mixed"))
    assert 0 < np.abs(rough - exact).max() < 0.05
    exact, rough = (
        all_logits(trained(bags, labels_S, train_MS, val_MS, name="chowder", epochs=2, lr=1e-3, precision=precision))
        for precision in ("32-true", "bf16-mixed")
    )
    assert np.array_equal(rough, exact), "Chowder chooses tiles by their scores, which stay float32"


# --- many members, each with its own end ----------------------------------------------------------------------------


@pytest.fixture
def many(bags_of):
    """24 bags large enough to be used where they lie, and 20 members that each use some of them."""
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=(rng.integers(256, 300), 5)).astype(np.float32) for _ in range(24)]
    role_MS = rng.choice(3, size=(20, 24), p=[0.5, 0.25, 0.25])
    return bags_of(arrays), np.arange(24) % 2, role_MS == 0, role_MS == 1


@pytest.mark.parametrize("name", ["chowder", "mean"])
def test_many_members_in_threads_equal_each_alone(many, trained, name):
    """A thread a bag, the head on a member's own bags alone, val by its own members alone: none changes a result."""
    bags, labels_S, train_MS, val_MS = many
    together = trained(bags, labels_S, train_MS, val_MS, name=name)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_threads = trained(bags, labels_S, train_MS, val_MS, name=name)
    finally:
        torch.set_num_threads(threads)
    for key, value in together.aggregator.state_dict().items():
        torch.testing.assert_close(in_threads.aggregator.state_dict()[key], value, atol=1e-5, rtol=1e-5)
    for m in (0, 7, 19):
        alone = trained(bags, labels_S, train_MS[[m]], val_MS[[m]], name=name, init_seeds=[m])
        for key, value in alone.aggregator.state_dict().items():
            torch.testing.assert_close(together.aggregator.state_dict()[key][m], value[0], atol=1e-5, rtol=1e-5)
        ours = [row for row in together.history if row["member"] == m]
        for row, expected in zip(ours, alone.history, strict=True):
            np.testing.assert_allclose(row["val_loss"], expected["val_loss"], atol=1e-5)
            np.testing.assert_allclose(row["val_auc"], expected["val_auc"])


def test_each_member_stops_at_its_own_epoch(many, small_module, trained):
    bags, labels_S, train_MS, _ = many
    module = small_module(bags, labels_S, train_MS[:3], name="mean", epochs=6)
    module.members = dataclasses.replace(module.members, epochs_M=np.array([2, 4, 1]))
    fit(module, progress=False)
    assert module.best_epoch_M.tolist() == [2, 4, 1]
    assert sorted((row["member"], row["epoch"]) for row in module.history) == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 1),
    ]
    for m, epochs in enumerate((2, 4, 1)):
        alone = trained(bags, labels_S, train_MS[[m]], name="mean", init_seeds=[m], epochs=epochs)
        torch.testing.assert_close(module.aggregator.head0_weight[m], alone.aggregator.head0_weight[0])


def test_val_auc_is_exact_and_undefined_where_a_member_diverged():
    logits = np.array([40.0, 41.0, 39.0, 38.0])  # sigmoid in float32 would make them all 1
    assert auc_of_logits(np.array([True, True, False, False]), logits) == 1.0
    assert np.isnan(auc_of_logits(np.array([True, False]), np.array([np.nan, 0.0])))
