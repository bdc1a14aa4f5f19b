"""Nested cross-validation: who is in which inner fold, what is chosen, and that the outer test fold chooses nothing."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits

from extract.cohort import read_cohort
from extract.features.cache import read_features
from mil.aggregators import aggregator_class
from mil.aggregators.batch import pack
from mil.config import StudyConfig
from mil.pipeline.data import cells_of
from mil.results.summary import edge_notes
from mil.study.nested import ChoiceError, best_of, choose, grid_cells, inner_plan, random_cells, refit_plan
from mil.study.plan import make_plan
from mil.study.roles import TEST, TRAIN, UNUSED, VAL, PlanError
from mil.train import main

EPOCHS, BATCH, FOLDS, INNER = 4, 5, 3, 2
LRS, DECAYS = [0.05, 0.005], [0.0, 0.3]
SETTINGS = [
    f"study.folds={FOLDS}",
    f"study.nested={INNER}",
    f"study.grid.lr={LRS}",
    f"study.grid.weight_decay={DECAYS}",
    f"train.epochs={EPOCHS}",
    f"train.batch_size={BATCH}",
    "train.accelerator=cpu",
    "report.baselines=false",
    "report.bootstrap=0",
    "model.name=chowder",
    "model.n_top=2",
    "model.n_bottom=1",
    "model.tile_hidden=[]",
    "model.head=[4]",
]
OPTIONS = {"n_top": 2, "n_bottom": 1, "tile_hidden": (), "head": (4,)}
N_SLIDES, TEST_FROM = 34, 30


@dataclass(frozen=True)
class Run:
    """A finished nested study."""

    arguments: list[str]
    data: Path
    out: Path

    def csv(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.out / name)


@pytest.fixture(scope="module", autouse=True)
def one_figure_only(draw_only):
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch, "roc")
        yield


@pytest.fixture(scope="module")
def data(write_study, witness_arrays, tmp_path_factory):
    """`data(name, change)`: 34 slides, two a patient but for the first, four of the official test split."""
    folder = tmp_path_factory.mktemp("nested")

    def make(name, change=lambda i, label, array: array):
        arrays, labels_S = witness_arrays(N_SLIDES, seed=3, strength=2.5)
        arrays = [change(i, label, array) for i, (label, array) in enumerate(zip(labels_S, arrays, strict=True))]
        split = ["test" if i >= TEST_FROM else "train" for i in range(N_SLIDES)]
        labels = np.array(["normal", "tumor"])[labels_S]
        return write_study(folder / name, arrays, labels, split=split), folder / name

    return make


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Run:
    arguments, folder = data("plain")
    out = tmp_path_factory.mktemp("run") / "run"
    assert main([*arguments, *SETTINGS, f"out={out}"]) == 0
    return Run([*arguments, *SETTINGS], folder, out)


# --- inner folds ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cohort(tmp_path):
    """41 slides of 25 patients, two classes, some of the official test split, one unlabelled."""
    rng = np.random.default_rng(5)
    patient_S = np.sort(rng.integers(0, 25, 41))
    rows = [f"s{i},p{p},{'ab'[p % 2] if i else ''},{'test' if p > 21 else 'train'}" for i, p in enumerate(patient_S)]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide,patient,label,split", *rows]))
    return read_cohort(tmp_path / "cohort.csv")


def test_inner_members_never_touch_the_outer_test_fold(cohort):
    plan = make_plan(cohort, folds=3, repeats=2, seeds=(0, 4), lr=1.0, weight_decay=0.0)
    cells = grid_cells([0.1, 0.2], [0.0, 0.5, 1.0])
    inner = inner_plan(plan, cohort, 4, cells, split_seed=0)
    assert len(inner) == len(plan) * 4 * 6
    patient_S = cohort.table["patient"].to_numpy()
    for outer, own in inner.members.groupby("outer_member"):
        part_S = plan.roles_MS[outer] == TRAIN
        roles_IS = inner.roles_MS[own.index]
        assert (roles_IS[:, ~part_S] == UNUSED).all(), "outer test fold, official test split, unlabelled"
        assert np.isin(roles_IS[:, part_S], (TRAIN, VAL)).all()
        for _, of_cell in own.groupby("cell"):
            assert ((inner.roles_MS[of_cell.index] == VAL).sum(axis=0)[part_S] == 1).all(), "val once"
        for roles_S in roles_IS:
            assert not set(patient_S[roles_S == TRAIN]) & set(patient_S[roles_S == VAL])
            assert len(set(cohort.labels_S[roles_S == VAL])) == 2
        assert own.groupby("inner_fold")["init_seed"].nunique().eq(1).all(), "cells start from the same weights"
        assert own["init_seed"].nunique() == 4
    seen = inner.members[["lr", "weight_decay"]].drop_duplicates().to_numpy().tolist()
    assert seen == [[a, b] for a in (0.1, 0.2) for b in (0.0, 0.5, 1.0)]
    assert not set(inner.members["init_seed"]) & set(plan.members["init_seed"])
    assert not (inner.roles_MS == TEST).any()


def test_inner_folds_depend_on_nothing_but_seed_repeat_and_fold(cohort):
    few = make_plan(cohort, folds=3, lr=1.0, weight_decay=0.0)
    many = make_plan(cohort, folds=3, repeats=2, seeds=(0, 1), lr=1.0, weight_decay=0.0)
    small, large = (inner_plan(p, cohort, 3, grid_cells([0.1], d), 0) for p, d in ((few, [0.0]), (many, [0.0, 1.0])))
    for row, member in small.members.iterrows():
        same = large.members[
            (
                large.members[["repeat", "fold", "seed", "inner_fold", "cell"]]
                == member[["repeat", "fold", "seed", "inner_fold", "cell"]]
            ).all(axis=1)
        ]
        np.testing.assert_array_equal(large.roles_MS[same.index[0]], small.roles_MS[row])
        assert same["init_seed"].iloc[0] == member["init_seed"]
    other = inner_plan(few, cohort, 3, grid_cells([0.1], [0.0]), 1)
    assert not np.array_equal(other.roles_MS, small.roles_MS)


def test_too_few_patients_for_the_inner_folds_are_refused_all_at_once(cohort):
    plan = make_plan(cohort, folds=3, lr=1.0, weight_decay=0.0)
    with pytest.raises(
        PlanError, match=r"class 'a' has \d patients in the training part, but study.nested=9"
    ) as caught:
        inner_plan(plan, cohort, 9, grid_cells([0.1], [0.0]), 0)
    assert len(caught.value.problems) == 6, "three folds, two classes"


# --- the choice ----------------------------------------------------------------------------------------------------


def test_of_equal_ones_the_fewest_epochs_win_then_the_first_cell():
    assert best_of(np.array([[0.5, 0.7, 0.9], [0.6, 0.9, 0.8], [0.6, 0.9, 0.9]])) == (1, 1)
    assert best_of(np.array([[0.5, np.nan], [0.1 + 0.2, 0.3]])) == (0, 0)
    assert best_of(np.array([[0.3], [0.1 + 0.2]])) == (0, 0), "equal but for the last bit"


def test_an_epoch_that_is_undefined_in_one_fold_is_not_chosen(cohort):
    plan = make_plan(cohort, folds=3, lr=1.0, weight_decay=0.0)
    inner = inner_plan(plan, cohort, 2, grid_cells([0.1], [0.0]), 0)
    rows = [(m, e, 0.5 + 0.1 * e) for m in range(len(inner)) for e in (1, 2, 3)]
    history = pd.DataFrame(rows, columns=["member", "epoch", "val_auc"])
    history.loc[(history["member"] == 0) & (history["epoch"] == 3), "val_auc"] = np.nan
    assert choose(inner, history)["epochs"].tolist() == [2, 3, 3]
    history.loc[history["member"] == 0, "val_auc"] = np.nan
    with pytest.raises(ChoiceError, match="repeat 0 fold 0: the inner AUC is undefined"):
        choose(inner, history)


def slow_fit(arrays, labels_S, member, roles_S, epochs, after_epoch):
    """One member alone: torch's own Adam, a Python loop over the same shuffled batches."""
    net = aggregator_class("chowder")(arrays[0].shape[1], 1, [int(member["init_seed"])], **OPTIONS)
    optimizer = torch.optim.Adam(net.parameters(), lr=float(member["lr"]), weight_decay=float(member["weight_decay"]))
    for epoch in range(epochs):
        order = np.random.default_rng([0, epoch]).permutation(len(arrays))
        order = [i for i in order if roles_S[i] == "train"]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            logits_B = net(pack([arrays[i] for i in chosen], 1)).logits_MBC[0, :, 0]
            loss = binary_cross_entropy_with_logits(logits_B, torch.tensor([float(labels_S[i]) for i in chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after_epoch(epoch, net)
    return net


@torch.no_grad()
def predict(net, arrays):
    return np.array([net(pack([array], 1)).logits_MBC.item() for array in arrays])


def test_the_study_equals_a_slow_loop_over_sequential_fits(finished):
    """Same cell, same epochs, same predictions: nothing is shared but the folds and the starting weights."""
    cohort = pd.read_csv(finished.data / "cohort.csv")
    arrays = [torch.from_numpy(read_features(finished.data / f"{s}.h5")).float() for s in cohort["slide"]]
    labels_S = (cohort["label"] == "tumor").to_numpy().astype(int)
    inner, inner_roles = finished.csv("inner/plan.csv"), finished.csv("inner/roles.csv").set_index("slide")
    assert len(inner) == FOLDS * INNER * len(LRS) * len(DECAYS)
    auc = {}
    for member in inner.to_dict("records"):  # not iterrows: 63-bit seeds are no floats
        roles_S = inner_roles.loc[cohort["slide"], f"m{member['member']}"].to_numpy()

        def remember(epoch, net, member=member, roles_S=roles_S):
            val = np.flatnonzero(roles_S == "val")
            scores = predict(net, [arrays[i] for i in val])
            key = (int(member["outer_member"]), int(member["cell"]), epoch + 1)
            auc.setdefault(key, []).append(roc_auc_score(labels_S[val], scores))

        slow_fit(arrays, labels_S, member, roles_S, EPOCHS, remember)
    plan, roles = finished.csv("plan.csv"), finished.csv("roles.csv").set_index("slide")
    predictions = finished.csv("predictions.csv")
    for m, member in enumerate(plan.to_dict("records")):
        best = None  # epochs outside, cells inside, strictly better only: fewest epochs, then the first cell
        for epoch in range(1, EPOCHS + 1):
            for cell in range(len(LRS) * len(DECAYS)):
                assert len(auc[m, cell, epoch]) == INNER
                mean = np.mean(auc[m, cell, epoch])
                if best is None or mean > best[0] + 1e-9:
                    best = (mean, cell, epoch)
        mean, cell, epochs = best
        assert (member["lr"], member["weight_decay"]) == (LRS[cell // 2], DECAYS[cell % 2])
        assert member["epochs"] == member["best_epoch"] == epochs
        row = finished.csv("choices.csv").query("chosen").iloc[m]
        assert (row["cell"], row["epochs"]) == (cell, epochs)
        assert row["inner_auc"] == pytest.approx(mean, abs=1e-12)
        roles_S = roles.loc[cohort["slide"], f"m{m}"].to_numpy()
        net = slow_fit(arrays, labels_S, member, roles_S, epochs, lambda epoch, net: None)
        own = predictions[predictions["member"] == m].set_index("slide").loc[cohort["slide"], "logit_0"]
        np.testing.assert_allclose(own.to_numpy(), predict(net, arrays), atol=1e-5)
    assert len(set(plan["epochs"])) > 1, "members stop at different epochs"


def test_the_refit_uses_the_whole_outer_training_part(finished):
    roles = finished.csv("roles.csv")
    plan = finished.csv("plan.csv")
    for m in range(FOLDS):
        assert set(roles[f"m{m}"]) == {"train", "test"}
        assert plan.loc[m, "n_train"] == (roles[f"m{m}"] == "train").sum()
    assert (roles.filter(like="m")[roles["split"] == "test"] == "test").all(axis=None)
    inner_roles = finished.csv("inner/roles.csv")
    assert (inner_roles.filter(regex=r"m\d")[inner_roles["split"] == "test"] == "unused").all(axis=None)


# --- what is reported ----------------------------------------------------------------------------------------------


def test_choice_stability_and_optimism_are_reported(finished, capsys):
    metrics = json.loads((finished.out / "metrics.json").read_text())
    nested, choices = metrics["nested"], finished.csv("choices.csv")
    predictions = finished.csv("predictions.csv")
    outer = predictions[(predictions["role"] == "test") & (predictions["split"] == "train")]
    optimism = []
    for m, own in outer.groupby("member"):
        auc = roc_auc_score(own["label"] == "tumor", own["logit_0"])
        inner = choices[choices["chosen"] & (choices["member"] == m)]["inner_auc"].item()
        assert nested["choices"][m]["outer_auc"] == pytest.approx(auc)
        optimism.append(inner - auc)
    assert nested["optimism"]["mean"] == pytest.approx(np.mean(optimism))
    assert nested["optimism"]["sd"] == pytest.approx(np.std(optimism, ddof=1))
    counted = choices[choices["chosen"]]["cell"].value_counts()
    assert [cell["chosen"] for cell in nested["cells"]] == [int(counted.get(c, 0)) for c in range(4)]
    assert nested["stability"]["share"] == pytest.approx(counted.max() / FOLDS)
    assert not metrics["warnings"], "members differ in lr on purpose"
    page = (finished.out / "report.html").read_text()
    assert "Nested cross-validation" in page
    assert f"{nested['choices'][0]['inner_auc']:.3f}" in page
    assert main([*finished.arguments, f"out={finished.out}", "resume=true"]) == 0
    said = capsys.readouterr().out
    assert f"{nested['optimism']['mean']:+.3f}" in said
    assert nested["notes"] == edge_notes(choices)
    assert nested["notes"], "of two values each is an end"
    assert all(text in said and text in page for text in nested["notes"])


def test_choices_at_an_end_of_what_was_tried_are_noted():
    """Counted by eye: learning rates 1, 2, 3 and no weight decay or some; four outer members, five epochs."""
    rows = [
        {"member": m, "cell": 2 * (lr - 1) + (decay > 0), "lr": float(lr), "weight_decay": decay}
        | {"epochs": 5 if (m, lr, decay) == (1, 3, 0.1) else 2, "chosen": (lr, decay) == won, "epochs_tried": 5}
        for m, won in enumerate([(2, 0.0), (3, 0.1), (1, 0.0), (3, 0.0)])
        for lr in (1, 2, 3)
        for decay in (0.0, 0.1)
    ]
    assert edge_notes(pd.DataFrame(rows)) == [
        "1 of 4 chose the learning rate 1, an end of what was tried: smaller ones may be better",
        "2 of 4 chose the learning rate 3, an end of what was tried: larger ones may be better",
        "1 of 4 chose the weight decay 0.1, an end of what was tried: larger ones may be better",
        "1 of 4 chose the last of 5 epochs: more (train.epochs) may be better",
    ]
    inside = pd.DataFrame(rows).assign(chosen=lambda t: (t["lr"] == 2) & (t["weight_decay"] == 0))
    assert edge_notes(inside) == []


def test_an_interrupted_nested_run_resumes_to_the_same_predictions(finished, tmp_path, monkeypatch):
    from mil.training.module import MembersModule

    begin, epochs = MembersModule.on_train_epoch_start, []

    def stop(module):
        if module.members.epochs_M is not None and module.current_epoch == 1:
            raise KeyboardInterrupt
        begin(module)

    arguments = [*finished.arguments, f"out={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(MembersModule, "on_train_epoch_start", stop)
        assert main(arguments) == 130
    assert (tmp_path / "run" / "choices.csv").exists()

    def count(module):
        epochs.append((len(module.members), module.current_epoch))
        begin(module)

    monkeypatch.setattr(MembersModule, "on_train_epoch_start", count)
    assert main([*arguments, "resume=true"]) == 0
    last = int(finished.csv("plan.csv")["epochs"].max())
    assert epochs == [(FOLDS, e) for e in range(1, last)], "the inner members are not trained again"
    for name in ("predictions.csv", "choices.csv", "history.csv", "inner/history.csv", "plan.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (finished.out / name).read_bytes()
    assert not (tmp_path / "run" / "inner" / "checkpoints").exists()


# --- leaks ---------------------------------------------------------------------------------------------------------


def test_labels_planted_in_the_official_test_slides_choose_nothing(finished, data, tmp_path):
    """A feature that gives the label away in the test split alone: every choice and out-of-fold prediction stays."""

    def plant(i, label, array):
        if i >= TEST_FROM:
            array[:, 0] = 100.0 * (2 * label - 1)
        return array

    arguments, _ = data("planted", plant)
    standardized = ["train.standardize=true", "train.class_weights=balanced"]
    assert main([*finished.arguments, *standardized, f"out={tmp_path / 'plain'}"]) == 0
    assert main([*arguments, *SETTINGS, *standardized, f"out={tmp_path / 'planted'}"]) == 0
    for name in ("choices.csv", "inner/history.csv", "history.csv", "plan.csv"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "planted" / name).read_bytes()
    plain, planted = (pd.read_csv(tmp_path / n / "predictions.csv") for n in ("plain", "planted"))
    rest = plain["split"] == "train"
    pd.testing.assert_frame_equal(plain[rest], planted[rest])
    assert (plain[~rest]["logit_0"] != planted[~rest]["logit_0"]).all(), "the plant was there"


def test_labels_planted_in_an_outer_test_fold_choose_nothing_for_its_member(finished, data, tmp_path):
    roles = finished.csv("roles.csv")
    fold_0 = set(np.flatnonzero((roles["m0"] == "test") & (roles["split"] == "train")))

    def plant(i, label, array):
        if i in fold_0:
            array[:, 0] = 100.0 * (2 * label - 1)
        return array

    arguments, _ = data("fold0", plant)
    assert main([*arguments, *SETTINGS, f"out={tmp_path / 'run'}"]) == 0
    planted = Run(arguments, tmp_path, tmp_path / "run")
    for name in ("choices.csv", "history.csv", "plan.csv"):
        before, after = (run.csv(name).query("member == 0").reset_index(drop=True) for run in (finished, planted))
        pd.testing.assert_frame_equal(before, after)
    before, after = (run.csv("inner/history.csv") for run in (finished, planted))
    own = before["member"] < INNER * len(LRS) * len(DECAYS)
    pd.testing.assert_frame_equal(before[own], after[own])
    assert not before[~own].equals(after[~own]), "the others train on the plant"


# --- settings ------------------------------------------------------------------------------------------------------


def test_random_search_is_log_uniform_and_grows_by_its_budget():
    cells = random_cells((1e-5, 1e-1), (1e-6, 1e-2), 2000, seed=0)
    assert cells[:5] == random_cells((1e-5, 1e-1), (1e-6, 1e-2), 5, seed=0)
    lr, decay = np.log10(cells).T
    for values, low, high in ((lr, -5, -1), (decay, -6, -2)):
        assert low <= values.min() < low + 0.1
        assert high - 0.1 < values.max() <= high
        np.testing.assert_allclose(np.histogram(values, bins=4, range=(low, high))[0] / 2000, 0.25, atol=0.04)
    assert abs(np.corrcoef(lr, decay)[0, 1]) < 0.1
    assert random_cells((1e-5, 1e-1), (0.5, 0.5), 3, seed=0)[0].weight_decay == 0.5
    assert random_cells((1e-5, 1e-1), (0.5, 0.5), 3, seed=1) != random_cells((1e-5, 1e-1), (0.5, 0.5), 3, seed=0)


def test_a_random_search_runs(data, tmp_path):
    arguments, _ = data("random")
    search = [a for a in SETTINGS if "grid" not in a]
    search += ["study.search=random", "study.ranges.lr=[1e-3,1e-1]", "study.budget=3", "train.epochs=2"]
    assert main([*arguments, *search, f"out={tmp_path / 'run'}"]) == 0
    choices = pd.read_csv(tmp_path / "run" / "choices.csv")
    assert len(choices) == FOLDS * 3
    assert choices["lr"].between(1e-3, 1e-1).all()
    assert choices["lr"].nunique() == 3
    assert (choices["weight_decay"] == 0).all()


def test_what_the_grid_does_not_name_is_as_in_train():
    def config(study):
        return StudyConfig.model_validate(
            {"cohort": "x.csv", "study": study, "train": {"lr": 0.3, "weight_decay": 0.7}}
        )

    assert cells_of(config({"nested": 2})) == [(0.3, 0.7)]
    assert cells_of(config({"nested": 2, "grid": {"lr": [1, 2]}})) == [(1, 0.7), (2, 0.7)]


def test_each_aggregator_of_a_list_has_its_own_cells():
    """Its own grid, else that of all, else its own learning rate, given or published."""
    tree: dict[str, Any] = {"model": {"name": ["abmil", "chowder", "dsmil"]}, "train": {"chowder": {"lr": 0.3}}}
    grid = {"lr": [5], "weight_decay": [0.1], "chowder": {"lr": [1, 2]}, "dsmil": {"weight_decay": [7]}}
    studies: tuple[dict[str, Any], ...] = ({"nested": 2}, {"nested": 2, "grid": grid})
    no_grid, own = (StudyConfig.model_validate(tree | {"study": study}) for study in studies)
    cells = [{name: cells_of(c.for_aggregator(name)) for name in c.model.names} for c in (no_grid, own)]
    assert cells[0] == {"abmil": [(1e-3, 0)], "chowder": [(0.3, 0)], "dsmil": [(1e-4, 0)]}
    assert cells[1] == {"abmil": [(5, 0.1)], "chowder": [(1, 0.1), (2, 0.1)], "dsmil": [(5, 7)]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["study.grid.lr=[0.1]"], "study.grid.lr: needs nested"),
        (["study.search=random"], "study.search=random: needs nested"),
        (["study.nested=1"], "study.nested=1: expected 0"),
        (["study.nested=2", "study.val_fraction=0.2"], "study.val_fraction: study.nested has its own"),
        (["study.nested=2", "train.select=best", "study.val_fraction=0.2"], "train.select=best: study.nested"),
        (["study.nested=2", "study.grid.lr=[0.1,0.1]"], "study.grid.lr: a value occurs twice"),
        (["study.nested=2", "study.grid.lr=[0.1,0]"], r"study.grid.lr: expected numbers above 0, got \[0\]"),
        (["study.nested=2", "study.grid.weight_decay=[-1]"], "study.grid.weight_decay: expected numbers of at least 0"),
        (["study.nested=2", "study.ranges.lr=[0.1,1]"], "study.ranges.lr: not used, set study.search=random"),
        (["study.nested=2", "study.search=random"], "study.search=random: no range"),
        (["study.nested=2", "study.search=random", "study.ranges.lr=[1,0.1]"], r"expected \[lowest, highest\]"),
        (
            ["study.nested=2", "study.search=random", "study.ranges.lr=[1,2]", "study.grid.lr=[1]"],
            "study.grid.lr: not used",
        ),
        (["study.nested=2", "study.gird.lr=[1]"], "study.gird: unknown key"),
    ],
)
def test_contradictions_are_refused(settings, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["cohort=x.csv", *settings])
    assert re.search(message, capsys.readouterr().err)


def test_a_cohort_too_small_for_inner_folds_leaves_nothing_behind(finished, tmp_path, capsys):
    arguments = [a for a in finished.arguments if not a.startswith("study.nested")]
    assert main([*arguments, "study.nested=12", f"out={tmp_path / 'run'}"]) == 2
    assert "study.nested=12 needs 12" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_refit_plan_takes_the_chosen_rows(cohort):
    plan = make_plan(cohort, folds=3, lr=1.0, weight_decay=0.0)
    inner = inner_plan(plan, cohort, 2, grid_cells([0.1, 0.2], [0.0]), 0)
    best = {0: (1, 3), 1: (0, 2), 2: (1, 1)}
    rows = [
        (m, e, 0.9 if (cell, e) == best[outer] else 0.6)
        for m, (outer, cell) in enumerate(inner.members[["outer_member", "cell"]].itertuples(index=False))
        for e in (1, 2, 3)
    ]
    choices = choose(inner, pd.DataFrame(rows, columns=["member", "epoch", "val_auc"]))
    refit, epochs_M = refit_plan(plan, choices)
    assert refit.members["lr"].tolist() == [0.2, 0.1, 0.2]
    assert epochs_M.tolist() == [3, 2, 1]
    np.testing.assert_array_equal(refit.roles_MS, plan.roles_MS)
    assert len(choices) == 6
