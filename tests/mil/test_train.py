"""The command line end to end: a small study on disk in, a run folder out; wrong input is refused before training."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from extract.features.cache import read_features
from mil.pipeline.folder import refuse_losing_reviews
from mil.results.trained import bags_of, logits_of, open_run
from mil.train import default_out, main
from mil.training.module import MembersModule

EPOCHS = 3
SETTINGS = [
    "study.folds=3",
    f"train.epochs={EPOCHS}",
    "train.batch_size=5",
    "train.lr=0.02",
    "train.accelerator=cpu",
    "model.hidden=6",
    "model.attention=5",
    "model.head=[4]",
    "report.bootstrap=20",
]
RUN_FOLDER = {
    "config.yaml",
    "environment.json",
    "features.csv",
    "hashes.json",
    "model-card.md",
    "checklists.md",
    "decisions.json",
    "baselines.safetensors",
    "paths.json",
    "plan.csv",
    "roles.csv",
    "predictions.csv",
    "metrics.json",
    "report.html",
    "members.safetensors",
    "slides.csv",
    "patients.csv",
    "history.csv",
    "figures",
    "logs",
}
N_SLIDES = 22
TEST_FROM = 16


@dataclass(frozen=True)
class Finished:
    """A study on disk, the arguments that trained it, and its run folder."""

    arguments: list[str]
    data: Path
    out: Path

    @property
    def quick(self) -> list[str]:
        """The arguments, without heatmaps and baselines: the same predictions in half of the time."""
        return [*self.arguments, "report.heatmaps=0", "report.baselines=false"]

    def predictions(self) -> pd.DataFrame:
        return read_predictions(self.out)


def read_predictions(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "predictions.csv", dtype={"label": str})


def same_predictions(folder: Path, other: Path) -> bool:
    return (folder / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def change_csv(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


@pytest.fixture(autouse=True)
def one_figure_only(monkeypatch, draw_only):
    """Drawing takes most of the time of a small study. `finished` below has them all."""
    draw_only(monkeypatch, "roc")


@pytest.fixture(scope="module")
def make_study(write_study, witness_arrays) -> Callable[..., list[str]]:
    """`make_study(folder)`: 22 slides of 11 patients, the last three patients are the test split; the arguments."""

    def make(folder: Path, names=("normal", "tumor"), dtype: str = "float16") -> list[str]:
        arrays, _ = witness_arrays(N_SLIDES, seed=1, n_classes=len(names), strength=5.0)
        patient_S = np.arange(N_SLIDES) // 2
        rng = np.random.default_rng(4)
        labels = patient_S % len(names)
        for array, label in zip(arrays, labels, strict=True):
            array[:] = rng.normal(size=array.shape)
            array[0, label] += 6
        split = ["test" if i >= TEST_FROM else "train" for i in range(N_SLIDES)]
        patients = [f"p{p:02d}" for p in patient_S]
        return write_study(folder, arrays, [names[i] for i in labels], dtype=dtype, split=split, patients=patients)

    return make


@pytest.fixture(scope="module")
def finished(make_study, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    arguments = [*make_study(folder / "data"), *SETTINGS, "classes=[normal,tumor]"]
    assert main([*arguments, f"out={folder / 'run'}"]) == 0
    return Finished(arguments, folder / "data", folder / "run")


@pytest.fixture
def copied(finished, tmp_path) -> Finished:
    """A copy of the data that a test may spoil, nothing trained."""
    shutil.copytree(finished.data, tmp_path / "data")
    own = [f"cohort={tmp_path / 'data' / 'cohort.csv'}", f"features.folder={tmp_path / 'data'}"]
    return Finished([*own, *finished.arguments[2:]], tmp_path / "data", tmp_path / "run")


# --- the run folder ------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_everything(finished):
    assert set(os.listdir(finished.out)) == RUN_FOLDER, "nothing is missing and nothing is left over"
    assert {p.stem for p in (finished.out / "figures").iterdir()} >= {"roc", "precision_recall", "calibration", "loss"}
    assert (finished.out / "logs" / "pass0" / "metrics.csv").stat().st_size
    assert all(p.stat().st_size for p in finished.out.rglob("*") if p.is_file())


def test_predictions_list_every_slide_for_every_member(finished):
    table = finished.predictions()
    assert len(table) == 3 * N_SLIDES
    assert not table.duplicated(["member", "slide"]).any()
    np.testing.assert_allclose(table["p_0"] + table["p_1"], 1)
    np.testing.assert_allclose(table["p_1"], 1 / (1 + np.exp(-table["logit_0"])), rtol=1e-6)
    assert set(table["label"]) == {"normal", "tumor"}
    held_out = table[(table["role"] == "test") & (table["split"] == "train")]
    assert sorted(held_out["slide"]) == [f"slide_{i:02d}" for i in range(TEST_FROM)], "each in one fold"
    assert (table["role"][table["split"] == "test"] == "test").all(), "the official test split is never trained on"


def test_roles_and_plan_tell_the_same_story(finished):
    roles = pd.read_csv(finished.out / "roles.csv").set_index("slide")
    plan = pd.read_csv(finished.out / "plan.csv")
    table = finished.predictions().pivot_table(index="slide", columns="member", values="role", aggfunc="first")
    for member in plan["member"]:
        assert roles[f"m{member}"].to_dict() == table[member].to_dict()
        assert plan.loc[member, "n_train"] == (table[member] == "train").sum()
    by_patient = roles.groupby("patient")[[f"m{m}" for m in plan["member"]]].nunique()
    assert (by_patient == 1).all(axis=None), "trap 2: a patient on both sides"
    assert (plan["epochs"] == EPOCHS).all()
    assert (plan["best_epoch"] == EPOCHS).all(), "trap 5: the last epoch, not one short"


def test_auc_equals_scikit_learn_on_the_saved_predictions(finished):
    metrics = json.loads((finished.out / "metrics.json").read_text())
    table = finished.predictions().assign(truth=lambda t: t["label"] == "tumor")
    fold_aucs = []
    for member, own in table[(table["role"] == "test") & (table["split"] == "train")].groupby("member"):
        fold_aucs.append(roc_auc_score(own["truth"], own["logit_0"]))
        assert metrics["folds"][member]["metrics"]["auc"] == pytest.approx(fold_aucs[-1])
    summary = metrics["cross_validation"]["metrics"]["auc"]
    assert summary["mean"] == pytest.approx(np.mean(fold_aucs))
    assert summary["sd"] == pytest.approx(np.std(fold_aucs, ddof=1))
    pooled = table[(table["role"] == "test") & (table["split"] == "train")]
    auc = metrics["pooled_out_of_fold"]["metrics"]["auc"]
    assert auc["value"] == pytest.approx(roc_auc_score(pooled["truth"], pooled["logit_0"]))
    test = table[table["split"] == "test"].groupby("slide").agg(truth=("truth", "first"), logit=("logit_0", "mean"))
    auc = metrics["test"]["ensemble"]["metrics"]["auc"]
    assert auc["value"] == pytest.approx(roc_auc_score(test["truth"], test["logit"]))


def test_the_environment_says_where_the_numbers_come_from(finished):
    environment = json.loads((finished.out / "environment.json").read_text())
    assert environment["command"].startswith("python -m mil.train cohort=")
    assert environment["features"]["encoder"] == "synthetic"
    assert environment["features"]["dim"] == 6
    assert environment["features"]["layout"] == "cache"
    assert environment["versions"]["torch"]
    assert environment["seed"] == 0
    assert environment["aggregator"] == "abmil"


def test_members_are_saved_as_stacks(finished):
    with safe_open(finished.out / "members.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        assert json.loads(file.metadata()["classes"]) == ["normal", "tumor"]
    assert shapes["embed_weight"] == [3, 6, 6]
    assert {shape[0] for shape in shapes.values()} == {3}


def test_the_report_is_one_self_contained_page(finished):
    page = (finished.out / "report.html").read_text()
    metrics = json.loads((finished.out / "metrics.json").read_text())
    assert f"{metrics['pooled_out_of_fold']['metrics']['auc']['value']:.3f}" in page
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_the_terminal_ends_with_the_table_and_the_path(finished, capsys):
    assert main([*finished.arguments, f"out={finished.out}", "resume=true"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == f"Report: {finished.out / 'report.html'}"
    text = "\n".join(lines)
    assert "AUC of 'tumor' against 'normal'" in text
    assert "out-of-fold, pooled" in text
    assert "test, ensemble" in text


# --- again ---------------------------------------------------------------------------------------------------------


def test_the_saved_config_makes_the_same_predictions_again(finished, tmp_path):
    assert main([f"config={finished.out / 'config.yaml'}", f"out={tmp_path / 'again'}"]) == 0
    assert same_predictions(finished.out, tmp_path / "again")
    first, second = ((f / "config.yaml").read_text().splitlines() for f in (finished.out, tmp_path / "again"))
    assert [a for a, b in zip(first, second, strict=True) if a != b] == [f"out: {finished.out}"]


def test_another_seed_makes_other_predictions(finished, tmp_path):
    """Trap 5: the seed is used."""
    arguments = [*finished.quick, "study.seeds=[7]", f"out={tmp_path / 'seed'}", "train.epochs=1"]
    assert main(arguments) == 0
    assert main([*finished.quick, f"out={tmp_path / 'zero'}", "train.epochs=1"]) == 0
    assert not same_predictions(tmp_path / "seed", tmp_path / "zero")


def test_a_run_folder_that_exists_is_refused_and_untouched(finished, refused):
    before = contents(finished.out)
    said = refused(main, *finished.arguments, f"out={finished.out}", "train.lr=0.5")
    assert str(finished.out) in said
    assert "overwrite=true" in said
    assert "resume=true" in said
    assert contents(finished.out) == before


def test_overwrite_replaces_a_run_folder(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "run")
    (tmp_path / "run" / "old.txt").write_text("from the last run")
    arguments = [*finished.arguments, f"out={tmp_path / 'run'}", "overwrite=true", "train.epochs=1"]
    assert main(arguments) == 0
    assert set(os.listdir(tmp_path / "run")) == RUN_FOLDER
    assert not same_predictions(finished.out, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "overwrite: false" in config, "the saved config must not overwrite by itself"


def test_overwrite_does_not_take_reviews_with_it(finished, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    (run / "reviews.csv").write_text("slide,mark,note,when\nslide_00,wrong label,,\n")
    before = contents(run)
    said = refused(main, *finished.arguments, f"out={run}", "overwrite=true")
    assert f"{run / 'reviews.csv'} would be deleted" in said
    assert contents(run) == before
    (run / "reviews.csv").write_text("slide,mark,note,when\n")
    refuse_losing_reviews(run)


def test_overwrite_leaves_other_folders_alone(finished, tmp_path, refused):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    said = refused(main, *finished.arguments, f"out={tmp_path / 'precious'}", "overwrite=true")
    assert "not a run folder" in said
    assert os.listdir(tmp_path / "precious") == ["thesis.txt"]
    said = refused(main, *finished.arguments, f"out={tmp_path / 'precious'}", "resume=true")
    assert "not a run folder" in said
    assert os.listdir(tmp_path / "precious") == ["thesis.txt"]


def test_an_empty_folder_may_be_the_run_folder(finished, tmp_path):
    (tmp_path / "run").mkdir()
    assert main([*finished.quick, f"out={tmp_path / 'run'}", "train.epochs=1"]) == 0


def test_the_run_folder_is_named_after_the_config():
    assert default_out(["config=/a/camelyon16.yaml", "seed=1"]) == Path("runs/camelyon16")
    assert default_out(["cohort=x.csv"]) == Path("runs/study")


# --- interrupted ---------------------------------------------------------------------------------------------------


def interrupt(monkeypatch, at_epoch: int, at_fit: int = 0) -> None:
    """Ctrl+C at the start of this epoch (from 0) of the `at_fit`-th training."""
    begin = MembersModule.on_train_epoch_start
    fits = []

    def stop(module: MembersModule) -> None:
        if module not in fits:
            fits.append(module)
        if module.current_epoch == at_epoch and len(fits) - 1 == at_fit:
            raise KeyboardInterrupt
        begin(module)

    monkeypatch.setattr(MembersModule, "on_train_epoch_start", stop)


def test_an_interrupted_run_resumes_to_the_same_predictions(finished, tmp_path, monkeypatch, capsys):
    arguments = [*finished.arguments, f"out={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        interrupt(patch, at_epoch=2)
        assert main(arguments) == 130
    assert "resume=true" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.json").exists()
    epochs = []
    begin = MembersModule.on_train_epoch_start
    monkeypatch.setattr(
        MembersModule, "on_train_epoch_start", lambda module: (epochs.append(module.current_epoch), begin(module))[1]
    )
    assert main([*arguments, "resume=true"]) == 0
    assert epochs == [2], "the finished epochs are not trained again"
    assert same_predictions(finished.out, tmp_path / "run")
    assert set(os.listdir(tmp_path / "run")) == RUN_FOLDER
    assert (tmp_path / "run" / "history.csv").read_bytes() == (finished.out / "history.csv").read_bytes()


def test_an_interrupted_comparison_resumes_where_it_was(finished, tmp_path, monkeypatch):
    names = ["model.name=[mean,abmil]", "train.members_per_pass=2"]
    arguments = [*finished.quick, *names, f"out={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        interrupt(patch, at_epoch=1, at_fit=3)  # mean: passes 0 and 1; abmil: passes 2 and 3
        assert main(arguments) == 130
    assert (tmp_path / "run" / "mean" / "metrics.json").exists()
    assert main([*arguments, "resume=true"]) == 0
    assert main([*finished.quick, *names, f"out={tmp_path / 'whole'}"]) == 0
    for name in ("mean", "abmil"):
        assert same_predictions(tmp_path / "whole" / name, tmp_path / "run" / name)
        assert (tmp_path / "run" / name / "plan.csv").read_text() == (
            tmp_path / "whole" / name / "plan.csv"
        ).read_text()
    assert (tmp_path / "run" / "comparison.csv").read_text() == (tmp_path / "whole" / "comparison.csv").read_text()


def test_a_finished_run_is_not_trained_again(finished, tmp_path, capsys):
    before = contents(finished.out)
    assert main([*finished.arguments, f"out={finished.out}", "resume=true"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert contents(finished.out) == before


def test_resuming_with_another_config_is_refused(finished, refused):
    before = contents(finished.out)
    said = refused(main, *finished.arguments, f"out={finished.out}", "resume=true", "train.lr=0.5", "seed=3")
    assert "train.lr: was 0.02, now 0.5" in said
    assert "seed: was 0, now 3" in said
    assert contents(finished.out) == before


# --- the same features, otherwise held -----------------------------------------------------------------------------


def test_memory_mapped_equals_in_memory(finished, tmp_path):
    assert main([*finished.quick, f"out={tmp_path / 'run'}", "data.memory=mmap"]) == 0
    assert same_predictions(finished.out, tmp_path / "run")


def test_a_clam_folder_gives_the_same_predictions_as_the_cache(finished, tmp_path):
    """Straight from `h5_files/`, without attributes and in float32, as CLAM writes them."""
    (tmp_path / "clam" / "h5_files").mkdir(parents=True)
    for path in finished.data.glob("*.h5"):
        with h5py.File(tmp_path / "clam" / "h5_files" / path.name, "w") as file:
            file["features"] = read_features(path).astype(np.float32)
            file["coords"] = np.zeros((len(file["features"]), 2), np.int32)
    arguments = [a for a in finished.quick if not a.startswith("features.folder")]
    assert main([*arguments, f"features.folder={tmp_path / 'clam'}", f"out={tmp_path / 'run'}"]) == 0
    assert same_predictions(finished.out, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["features"]["layout"] == "clam"


def test_max_tiles_limits_training_and_not_evaluation(finished, tmp_path):
    few = [*finished.quick, "data.max_tiles=2"]
    assert main([*few, f"out={tmp_path / 'one'}"]) == 0
    assert main([*few, f"out={tmp_path / 'two'}"]) == 0
    assert same_predictions(tmp_path / "one", tmp_path / "two"), "the subset is drawn from the seed"
    assert not same_predictions(tmp_path / "one", finished.out)
    plenty = [*finished.quick, "data.max_tiles=1000", f"out={tmp_path / 'plenty'}"]
    assert main(plenty) == 0
    assert same_predictions(tmp_path / "plenty", finished.out)


# --- other studies -------------------------------------------------------------------------------------------------


def test_several_aggregators_share_one_plan(finished, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*finished.arguments, "model.name=[mean,abmil]", f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert f"One setting each (lr 0.02, {EPOCHS} epochs); a difference may be one of settings." in said
    tables = {"comparison.csv", "comparison.md", "differences.csv"}
    assert set(os.listdir(out)) == {"config.yaml", "report.html", "figures", "mean", "abmil"} | tables
    assert same_predictions(out / "abmil", finished.out), "an aggregator among others equals the same one alone"
    assert (out / "mean" / "roles.csv").read_text() == (out / "abmil" / "roles.csv").read_text()
    comparison = pd.read_csv(out / "comparison.csv").set_index("name")
    for name in ("mean", "abmil"):
        assert set(os.listdir(out / name)) == RUN_FOLDER
        auc = json.loads((out / name / "metrics.json").read_text())["pooled_out_of_fold"]["metrics"]["auc"]["value"]
        assert comparison.loc[name, "oof_auc"] == pytest.approx(auc)
        assert f"{auc:.3f}" in said


OWN = {
    "mean": ["train.lr=0.3", "train.weight_decay=0.01", "train.optimizer=adamw", "train.batch_size=3"],
    "chowder": ["model.head=[3]", "model.n_top=2", "train.epochs=5", "train.standardize=true", "train.lr=0.1"],
}


def own_settings(name: str) -> list[str]:
    return [setting.replace(".", f".{name}.", 1) for setting in OWN[name]]


def test_settings_of_one_aggregator_of_a_list_make_it_the_same_as_alone(finished, tmp_path, monkeypatch):
    """To the last digit, also after an interruption; the one without a block trains as if there were no blocks."""
    out, names = tmp_path / "run", ["mean", "abmil", "chowder"]
    listed = [*finished.quick, f"model.name=[{','.join(names)}]", *own_settings("mean"), *own_settings("chowder")]
    with monkeypatch.context() as patch:
        interrupt(patch, at_epoch=3, at_fit=2)  # Chowder's fourth epoch, of which the others have no more than three
        assert main([*listed, f"out={out}"]) == 130
    assert main([*listed, f"out={out}", "resume=true"]) == 0
    assert same_predictions(out / "abmil", finished.out)
    for name, settings in OWN.items():
        shared = [a for a in finished.quick if not a.startswith(("model.hidden", "model.attention"))]  # ABMIL's
        assert main([*shared, f"model.name={name}", *settings, f"out={tmp_path / name}"]) == 0
        assert same_predictions(out / name, tmp_path / name)
        for file in ("history.csv", "plan.csv", "roles.csv"):
            assert (out / name / file).read_bytes() == (tmp_path / name / file).read_bytes(), file
        listed_one, lone = (open_run(folder / name) for folder in (out, tmp_path))
        assert listed_one.description == lone.description
        for key, stack in lone.aggregator.state_dict().items():
            assert torch.equal(stack, listed_one.aggregator.state_dict()[key]), key
    plans = {name: pd.read_csv(out / name / "plan.csv") for name in names}
    assert {n: (set(p["lr"]), set(p["weight_decay"]), set(p["epochs"])) for n, p in plans.items()} == {
        "mean": ({0.3}, {0.01}, {EPOCHS}),
        "abmil": ({0.02}, {0.0}, {EPOCHS}),
        "chowder": ({0.1}, {0.0}, {5}),
    }
    standardized = {name: open_run(out / name).aggregator.standardized for name in names}
    assert standardized == {"mean": False, "abmil": False, "chowder": True}
    trained = open_run(out / "chowder")
    written = read_predictions(out / "chowder").pivot_table(index="member", columns="slide", values="logit_0")
    slides = written.columns.tolist()
    tiles = [torch.from_numpy(read_features(finished.data / f"{slide}.h5")) for slide in slides]
    now_MSC = logits_of(trained, bags_of(slides, tiles))
    np.testing.assert_allclose(now_MSC[:, :, 0], written.to_numpy(), rtol=1e-5, atol=1e-6)


def test_resuming_with_another_block_is_refused(finished, tmp_path, refused):
    without = [a for a in finished.quick if not a.startswith("train.lr")]
    listed = [*without, "model.name=[mean,abmil]", "train.epochs=1", f"out={tmp_path / 'run'}"]
    assert main([*listed, "train.mean.lr=0.1"]) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]
    assert (written["lr"], written["mean"], written["abmil"]) == (None, {"lr": 0.1}, {"lr": 1e-3})
    plans = [pd.read_csv(tmp_path / "run" / name / "plan.csv") for name in ("mean", "abmil")]
    assert [set(plan["lr"]) for plan in plans] == [{0.1}, {1e-3}], "its own, and the published one"
    assert "train.mean.lr: was 0.1, now 0.2" in refused(main, *listed, "train.mean.lr=0.2", "resume=true")
    assert "train.mean.lr: was 0.1, now 0.001" in refused(main, *listed, "resume=true")
    assert main([f"config={tmp_path / 'run' / 'config.yaml'}", f"out={tmp_path / 'again'}"]) == 0
    for name in ("mean", "abmil"):
        assert same_predictions(tmp_path / "run" / name, tmp_path / "again" / name)


def test_three_classes_with_named_labels(make_study, tmp_path):
    names = ("healthy", "low", "high")
    arguments = [*make_study(tmp_path / "data", names=names), *SETTINGS, "study.folds=2", "classes=[healthy,low,high]"]
    arguments += ["report.heatmaps=0", "report.baselines=false"]
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 0
    table = read_predictions(tmp_path / "run")
    probabilities = table[["p_0", "p_1", "p_2"]].to_numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["classes"] == list(names), "in the order asked for, not by alphabet"
    pooled = table[(table["role"] == "test") & (table["split"] == "train")]
    logits = pooled[["logit_0", "logit_1", "logit_2"]].to_numpy()
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    macro = np.mean([roc_auc_score(pooled["label"] == name, softmax[:, c]) for c, name in enumerate(names)])
    assert metrics["pooled_out_of_fold"]["metrics"]["auc"]["value"] == pytest.approx(macro)


def test_the_order_of_classes_decides_which_is_positive(finished, tmp_path):
    swapped = [a for a in finished.quick if not a.startswith("classes")]
    assert main([*swapped, "classes=[tumor,normal]", f"out={tmp_path / 'run'}", "train.epochs=1"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["positive_class"] == "normal"
    table = read_predictions(tmp_path / "run")
    pooled = table[(table["role"] == "test") & (table["split"] == "train")]
    auc = roc_auc_score(pooled["label"] == "normal", pooled["p_1"])
    assert metrics["pooled_out_of_fold"]["metrics"]["auc"]["value"] == pytest.approx(auc)


def test_folds_of_ones_own(finished, tmp_path):
    fold_S = np.arange(TEST_FROM) // 2 % 2 * 1 ^ (np.arange(TEST_FROM) // 4 % 2)
    folds = pd.DataFrame({"slide": [f"slide_{i:02d}" for i in range(TEST_FROM)], "fold": fold_S})
    folds.to_csv(tmp_path / "folds.csv", index=False)
    arguments = [*finished.quick, f"study.folds_csv={tmp_path / 'folds.csv'}", f"out={tmp_path / 'run'}"]
    assert main([*arguments, "train.epochs=1"]) == 0
    roles = pd.read_csv(tmp_path / "run" / "roles.csv").set_index("slide")
    for slide, fold in folds.itertuples(index=False):
        assert roles.loc[slide, f"m{fold}"] == "test"
        assert roles.loc[slide, f"m{1 - fold}"] == "train"


def test_a_validation_split_selects_the_epoch_and_the_threshold(finished, tmp_path):
    arguments = [*finished.quick, "study.val_fraction=0.4", "train.select=best", "study.folds=2"]
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 0
    plan = pd.read_csv(tmp_path / "run" / "plan.csv")
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    for member, own in history.groupby("member"):
        first_best = own.loc[own["val_auc"].idxmax(), "epoch"]
        assert plan.loc[member, "best_epoch"] == first_best
    assert (plan["n_val"] > 0).all()
    assert set(plan["n_train"] + plan["n_val"] + plan["n_test"]) == {N_SLIDES}


def test_unlabelled_slides_are_predicted_and_not_trained_on(copied):
    def take_two_labels(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(label=table["label"].mask(table["slide"].isin(["slide_00", "slide_20"])))

    change_csv(copied.data / "cohort.csv", take_two_labels)
    assert main([*copied.quick, f"out={copied.out}", "train.epochs=1"]) == 0
    table = read_predictions(copied.out).set_index(["slide", "member"])
    assert (table.loc["slide_00", "role"] == "unused").all()
    assert table.loc["slide_20", "p_1"].notna().all()
    metrics = json.loads((copied.out / "metrics.json").read_text())
    assert metrics["pooled_out_of_fold"]["counts"]["slides"] == TEST_FROM - 1
    assert metrics["test"]["ensemble"]["counts"]["unlabelled"] == 1


# --- wrong on purpose ----------------------------------------------------------------------------------------------


def test_trap_3_slides_without_features_stop_the_study(copied, refused):
    (copied.data / "slide_03.h5").unlink()
    said = refused(main, *copied.arguments, f"out={copied.out}")
    assert "1 of 22 slides have no features" in said
    assert "'slide_03'" in said
    assert "checks.missing=drop" in said
    (copied.data / "slide_17.h5").rename(copied.data / "Slide-17.h5")
    said = refused(main, *copied.arguments, f"out={copied.out}")
    assert "2 of 22 slides have no features" in said
    assert "'slide_17' seems to be there as 'Slide-17'" in said
    assert not copied.out.exists()


def test_trap_3_dropped_slides_are_listed_in_the_report(copied):
    (copied.data / "slide_03.h5").unlink()
    broken = copied.data / "slide_18.h5"
    broken.write_bytes(broken.read_bytes()[:-50])
    assert main([*copied.quick, f"out={copied.out}", "checks.missing=drop", "train.epochs=1"]) == 0
    slides = set(read_predictions(copied.out)["slide"])
    assert slides == {f"slide_{i:02d}" for i in range(N_SLIDES)} - {"slide_03", "slide_18"}
    page = (copied.out / "report.html").read_text()
    assert "2 slides dropped" in page
    assert "slide_03" in page
    assert "slide_18" in page


def test_one_class_only(copied, refused):
    change_csv(copied.data / "cohort.csv", lambda t: t.assign(label="tumor"))
    said = refused(main, *copied.arguments, f"out={copied.out}")
    assert "'normal'" in said
    assert not copied.out.exists()


def test_too_many_folds(copied, refused):
    said = refused(main, *copied.arguments, f"out={copied.out}", "study.folds=9")
    assert "class 'normal' has 4 patients outside the test split, but study.folds=9" in said
    assert "class 'tumor' has 4 patients outside the test split, but study.folds=9" in said
    assert not copied.out.exists()


def test_trap_2_a_patient_in_both_splits_is_reported_with_all_else(copied, refused):
    def same_patient(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(patient=table["patient"].mask(table["slide"].isin(["slide_02", "slide_20"]), "px"))

    change_csv(copied.data / "cohort.csv", same_patient)
    (copied.data / "slide_05.h5").unlink()
    said = refused(main, *copied.arguments, f"out={copied.out}")
    assert "1 patient with slides in the train and in the test split: 'px'" in said
    assert "'slide_05'" in said
    assert not copied.out.exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_numbers(copied, refused, bad):
    for slide in ("slide_04", "slide_19"):
        with h5py.File(copied.data / f"{slide}.h5", "r+") as file:
            file["features"][1, 2] = bad
            del file.attrs["checksums"]
    said = refused(main, *copied.arguments, f"out={copied.out}")
    assert "'slide_04'" in said
    assert "'slide_19'" in said
    assert "the first is tile 1" in said
    assert not copied.out.exists()


def test_features_of_two_encoders(copied, refused):
    with h5py.File(copied.data / "slide_04.h5", "r+") as file:
        file.attrs["encoder"] = "uni"
        del file.attrs["checksums"]
    said = refused(main, *copied.arguments, f"out={copied.out}")
    assert "encoder is 'synthetic' in 21 files" in said
    assert "'uni' in 1 file" in said
    assert not copied.out.exists()


def test_labels_that_are_not_declared(copied, refused):
    change_csv(copied.data / "cohort.csv", lambda t: t.assign(label=t["label"].replace("tumor", "tumour")))
    said = refused(main, *copied.arguments, f"out={copied.out}")
    assert "labels ['tumour'] are not among classes ['normal', 'tumor']; did you mean 'tumor'?" in said
    assert not copied.out.exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("features.folder=/nowhere/at/all", "no such folder (features.folder)"),
        ("cohort=/nowhere/at/all.csv", "/nowhere/at/all.csv"),
        ("study.folds_csv=/nowhere/folds.csv", "/nowhere/folds.csv"),
        ("columns.label=diagnosis", "no column 'diagnosis' (columns.label)"),
        ("features.layout=stamp", "feats"),
        ("train.lr=fast", "train.lr: "),
    ],
)
def test_what_points_nowhere(finished, tmp_path, refused, spoil, said):
    assert said in refused(main, *finished.arguments, spoil, f"out={tmp_path / 'run'}")
    assert os.listdir(tmp_path) == []


def test_no_network_and_no_copy_says_both_ways_out(tmp_path, refused, monkeypatch):
    import huggingface_hub

    def offline(*arguments, **options):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    said = refused(main, "config=camelyon16.yaml")
    assert "cannot reach the hub" in said
    assert "data.root=DIR" in said
    assert not (tmp_path / "runs").exists()


# --- real processes ------------------------------------------------------------------------------------------------


def camelyon_like(path: Path, n_slides: int, seed: int) -> list[int]:
    """A Parquet file in the exact schema of owkin/camelyon16-features, 771 numbers a tile; the labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    labels = [i % 2 for i in range(n_slides)]
    slides = []
    for label in labels:
        n = int(rng.integers(4, 12))
        features_ND = rng.normal(size=(n, 768)).astype(np.float32)
        features_ND[: 1 + n // 4, :32] += 4 * label
        address_N3 = np.column_stack([np.full(n, 15), rng.integers(0, 90, n), rng.integers(0, 200, n)])
        slides.append(np.hstack([address_N3.astype(np.float32), features_ND]).tolist())
    schema = pa.schema([("features", pa.list_(pa.list_(pa.float32()))), ("label", pa.int64())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"features": slides, "label": labels}, schema=schema), path)
    return labels


def test_a_parquet_file_goes_through_the_camelyon_config(python, tmp_path):
    data = tmp_path / "copy" / "data"
    n_train, n_test = 12, 6
    camelyon_like(data / "Phikon_train-00000-of-00001.parquet", n_train, seed=0)
    test_labels = camelyon_like(data / "Phikon_test-00000-of-00001.parquet", n_test, seed=1)
    command = [*python, "-m", "mil.train", "config=camelyon16.yaml", f"data.root={tmp_path / 'copy'}"]
    command += [f"features.folder={tmp_path / 'cache'}", "study.folds=3", "train.epochs=8", "report.bootstrap=20"]
    command += ["report.heatmaps=0", "report.baselines=false", "train.accelerator=cpu", "out=run"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "test, ensemble of members" in ended.stdout
    assert ended.stdout.rstrip().endswith("Report: run/report.html")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["classes"] == ["normal", "tumor"]
    assert metrics["counts"]["cross_validated"]["slides"] == n_train
    table = read_predictions(tmp_path / "run")
    test = table[table["split"] == "test"].groupby("slide", sort=True)["logit_0"].mean()
    assert test.index.tolist() == [f"Phikon_test_{i:03d}" for i in range(n_test)]
    auc = metrics["test"]["ensemble"]["metrics"]["auc"]["value"]
    assert auc == pytest.approx(roc_auc_score(test_labels, test))
    assert auc > 0.9, "the witnesses are plain to see"
    source = json.loads((tmp_path / "run" / "environment.json").read_text())["features"]["source"]
    assert source["root"] == "../copy", "as seen from the run folder"
    assert [len(file["sha256"]) for file in source["files"]] == [64, 64]


def readme_command() -> list[str]:
    """The arguments after `python` in README's line that trains the quickstart."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"python -m mil\.train config=quickstart\.yaml[^\n#&`]*", readme)
    if not found:
        pytest.skip("README.md has no line with `python -m mil.train config=quickstart.yaml`")
    return shlex.split(found[0])[1:]


def test_the_first_command_of_the_readme(python, tmp_path):
    """The real thing, about a minute. One thread each: two wait for one another on a busy machine, far longer."""
    arguments = readme_command()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*python, *arguments]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=550
    )
    assert ended.returncode == 0, ended.stderr
    report = tmp_path / "runs" / "quickstart" / "report.html"
    assert report.stat().st_size > 10_000
    assert ended.stdout.rstrip().endswith("Report: runs/quickstart/report.html")
    table = pd.read_csv(report.parent / "comparison.csv").set_index("name")
    assert table.loc["abmil", "oof_auc"] > 0.9
    assert table.loc["chowder", "oof_auc"] > 0.9, "with settings of its own"
    assert table.loc["mean", "oof_auc"] < 0.65, "single tiles decide, their mean does not"
