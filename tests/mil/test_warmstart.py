"""Warm starts: the source's own predictions before the first step, frozen parameters to the bit, no patient leaks."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from extract.cohort import read_cohort
from extract.config import ConfigError, load_config
from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators.batch import pack
from mil.config import StudyConfig
from mil.config_problems import study_problems
from mil.study.saved import load_plan
from mil.train import main
from mil.training.members import load_members, save_members
from mil.training.module import Members, MembersModule, fit, predict_logits
from mil.training.warmstart import _kind_problems, about_classes, open_start, tile_layers

OPTIONS = {
    "abmil": {"hidden": 6, "attention": 5, "head": (4,)},
    "chowder": {"n_top": 3, "n_bottom": 2, "tile_hidden": (4,), "head": (5,)},
    "dsmil": {"attention": 4},
    "clam_sb": {"hidden": 6, "attention": 5, "n_instances": 2},
}
FEATURES = {"encoder": "synthetic", "weights_sha256": "none", "tile_px": 224, "mpp": 0.5}


pytestmark = pytest.mark.usefixtures("no_figures")


def told(name: str) -> list[str]:
    """The aggregator and its small options as arguments."""
    pairs = [(k, list(v) if isinstance(v, tuple) else v) for k, v in OPTIONS.get(name, {}).items()]
    return [f"model.name={name}", *(f"model.{key}={value}".replace(" ", "") for key, value in pairs)]


SETTINGS = [
    "study.folds=3",
    "train.epochs=1",
    "train.batch_size=5",
    "train.lr=0.02",
    "train.standardize=true",
    "train.accelerator=cpu",
    "report.baselines=false",
    "report.bootstrap=0",
]


@pytest.fixture(scope="module")
def data(write_study, witness_arrays, tmp_path_factory) -> list[str]:
    arrays, labels_S = witness_arrays(24, seed=3, strength=5.0)
    return write_study(tmp_path_factory.mktemp("data"), arrays, np.array(["normal", "tumor"])[labels_S])


@pytest.fixture(scope="module")
def sources(data, tmp_path_factory):
    """`sources(name)`: the run folder of a finished study with that aggregator, and its arguments."""
    done: dict[str, tuple[Path, list[str]]] = {}

    def get(name: str) -> tuple[Path, list[str]]:
        if name not in done:
            out = tmp_path_factory.mktemp("source") / name
            arguments = [*data, *SETTINGS, *told(name)]
            assert main([*arguments, f"out={out}"]) == 0
            done[name] = (out, arguments)
        return done[name]

    return get


def logits(folder: Path) -> np.ndarray:
    table = pd.read_csv(folder / "predictions.csv").sort_values(["member", "slide"])
    return table.filter(like="logit_").to_numpy()


# --- which parameters are tile layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATORS)
def test_tile_layers_are_what_the_pooled_bag_depends_on(name):
    """Changed one at a time: a tile layer changes what pooling gives, the others do not."""
    options = OPTIONS.get(name, {})
    tile = tile_layers(name, 6, 3, options)
    bag_TD = torch.randn(13, 6, generator=torch.Generator().manual_seed(1))
    aggregator = aggregator_class(name)(6, 3, [0], **options).eval()
    with torch.no_grad():
        before = aggregator(pack([bag_TD], 1)).pooled_MBP
        for parameter, stack in aggregator.named_parameters():
            kept = stack.clone()
            stack += torch.randn(stack.shape, generator=torch.Generator().manual_seed(2))
            changed = not torch.equal(aggregator(pack([bag_TD], 1)).pooled_MBP, before)
            stack.copy_(kept)
            if not parameter.endswith("score_bias"):  # a constant to a softmax
                assert changed == (parameter in tile), parameter
    assert not any(parameter.startswith("head") for parameter in tile)


def test_parameters_about_the_classes():
    assert about_classes("abmil", 6, OPTIONS["abmil"]) == {"head1_weight", "head1_bias"}
    assert about_classes("chowder", 6, OPTIONS["chowder"]) == {"tile1_weight", "tile1_bias"}
    assert about_classes("dsmil", 6, {}) == {"instance_weight", "instance_bias", "bag_weight", "bag_bias"}
    assert "typical_weight" in about_classes("clam_sb", 6, OPTIONS["clam_sb"])
    assert tile_layers("mean", 6, 1, {}) == frozenset()


# --- the start -----------------------------------------------------------------------------------------------------


def started(arguments: list[str], folder: Path, bags, *more: str) -> tuple[MembersModule, np.ndarray]:
    """An untrained module whose members start from `folder`, and its logits for all bags."""
    config = load_config(StudyConfig, [*arguments, f"model.init={folder}", *more], also=study_problems)
    cohort = read_cohort(config.cohort)
    plan = load_plan(folder, cohort)
    start = open_start(config, cohort, plan, bags.dim, FEATURES)
    name = config.model.names[0]
    aggregator = aggregator_class(name)(bags.dim, 1, plan.members["init_seed"].tolist(), **OPTIONS.get(name, {}))
    start.put_into(aggregator, np.arange(len(plan)))
    lr_M = np.full(len(plan), 0.02)
    members = Members(lr_M, np.full(len(plan), 0.1), plan.uses("train"), plan.uses("val"))
    module = MembersModule(aggregator, bags, cohort.labels_S, 2, members, config.train, seed=config.seed)
    return module, predict_logits(module, list(range(len(bags))))


@pytest.fixture(scope="module")
def bags(bags_of, witness_arrays):
    return bags_of(witness_arrays(24, seed=3, strength=5.0)[0])


@pytest.mark.parametrize("name", ["abmil", "chowder", "dsmil", "clam_sb", "mean"])
def test_without_a_further_epoch_the_predictions_are_the_sources(sources, bags, name):
    folder, arguments = sources(name)
    _, found_MSC = started(arguments, folder, bags)
    np.testing.assert_allclose(found_MSC.reshape(-1, 1), logits(folder), rtol=1e-5, atol=1e-6)


def test_one_more_epoch_equals_continuing_the_sources_members_by_hand(sources, bags, tmp_path):
    """The command line against the source's own aggregator, loaded from its file and trained with a new optimiser."""
    folder, arguments = sources("abmil")
    out = tmp_path / "run"
    assert main([*arguments, f"model.init={folder}", f"out={out}"]) == 0
    by_hand, _ = load_members(folder)
    config = load_config(StudyConfig, arguments, also=study_problems)
    cohort, settings = read_cohort(config.cohort), config.train
    plan = load_plan(folder, cohort)
    members = Members(np.full(3, 0.02), np.zeros(3), plan.uses("train"), plan.uses("val"))
    module = MembersModule(by_hand.train(), bags, cohort.labels_S, 2, members, settings)
    fit(module, progress=False)
    expected_MSC = predict_logits(module, list(range(24)))
    np.testing.assert_allclose(logits(out), expected_MSC.reshape(-1, 1), rtol=1e-5, atol=1e-6)
    assert np.abs(logits(out) - logits(folder)).max() > 1e-3, "an epoch changes something"


def test_average_is_the_mean_of_the_members_parameters(sources, bags):
    folder, arguments = sources("abmil")
    module, _ = started(arguments, folder, bags, "model.init_from=average", "checks.init_overlap=note")
    source, _ = load_members(folder)
    for (name, ours), theirs in zip(module.aggregator.named_parameters(), source.parameters(), strict=True):
        for m in range(3):
            torch.testing.assert_close(ours[m], sum(theirs[i] for i in range(3)) / 3, msg=name)
    torch.testing.assert_close(module.aggregator.input_mean_MD[0], source.input_mean_MD.mean(dim=0))


def test_members_find_their_own_fold_and_more_members_start_over(sources, data, tmp_path):
    """The source has 3 folds; this study 3 folds x 2 seeds, so members 0, 2, 4 and 1, 3, 5 cannot all find theirs."""
    folder, arguments = sources("abmil")
    config = load_config(
        StudyConfig, [*arguments, f"model.init={folder}", "checks.init_overlap=note"], also=study_problems
    )
    cohort = read_cohort(config.cohort)
    plan = load_plan(folder, cohort)
    back = plan.subset([2, 0, 1])
    assert open_start(config, cohort, back, 6, FEATURES).source_of_M.tolist() == [2, 0, 1]
    seeds = pd.concat([plan.members.assign(seed=s) for s in (0, 1)], ignore_index=True)
    more = type(plan)(seeds, np.concatenate([plan.roles_MS, plan.roles_MS]))
    assert open_start(config, cohort, more, 6, FEATURES).source_of_M.tolist() == [0, 1, 2, 0, 1, 2]


# --- freezing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["abmil", "chowder", "dsmil", "clam_sb"])
def test_frozen_tile_layers_do_not_change_by_a_bit(sources, tmp_path, name):
    folder, arguments = sources(name)
    out = tmp_path / "run"
    frozen = [f"model.init={folder}", "train.freeze=tile_layers", "train.weight_decay=0.1"]
    assert main([*arguments, *frozen, f"out={out}"]) == 0
    (before, _), (after, _) = load_members(folder), load_members(out)
    tile = tile_layers(name, 6, 1, OPTIONS[name])
    for parameter, stack in after.state_dict().items():
        same = torch.equal(stack, before.state_dict()[parameter])
        assert same == (parameter in tile or parameter.startswith("input_")), parameter
    notes = (out / "report.html").read_text()
    seen_from_here = os.path.relpath(folder, out)  # a report names no path of the machine
    assert f"members start from {seen_from_here}: its members, one each; frozen: {', '.join(sorted(tile))}" in notes


def test_without_freezing_everything_learns(sources, tmp_path):
    folder, arguments = sources("abmil")
    assert main([*arguments, f"model.init={folder}", "train.epochs=1", f"out={tmp_path / 'run'}"]) == 0
    (before, _), (after, _) = load_members(folder), load_members(tmp_path / "run")
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(one, other) or name == "score_bias", name


def test_an_interrupted_warm_start_resumes_to_the_same(sources, tmp_path, monkeypatch):
    folder, arguments = sources("abmil")
    arguments = [*arguments, f"model.init={folder}", "train.freeze=tile_layers", "train.epochs=2"]
    begin = MembersModule.on_train_epoch_start

    def stop(module):
        if module.current_epoch == 1:
            raise KeyboardInterrupt
        begin(module)

    with monkeypatch.context() as patch:
        patch.setattr(MembersModule, "on_train_epoch_start", stop)
        assert main([*arguments, f"out={tmp_path / 'run'}"]) == 130
    assert main([*arguments, f"out={tmp_path / 'run'}", "resume=true"]) == 0
    assert main([*arguments, f"out={tmp_path / 'whole'}"]) == 0
    np.testing.assert_array_equal(logits(tmp_path / "run"), logits(tmp_path / "whole"))


# --- other classes -------------------------------------------------------------------------------------------------


def relabelled(data: list[str], folder: Path, labels: list[str]) -> list[str]:
    table = pd.read_csv(data[0].partition("=")[2], dtype=str)
    table["label"] = [labels[i % len(labels)] for i in range(len(table))]
    table.to_csv(folder / "other.csv", index=False)
    return [f"cohort={folder / 'other.csv'}", data[1]]


@pytest.mark.parametrize(
    ("name", "labels"),
    [("abmil", ["KIRC", "KIRP", "KICH"]), ("chowder", ["LUAD", "LUSC"]), ("clam_sb", ["KIRC", "KIRP", "KICH"])],
)
def test_other_classes_get_a_new_head(sources, data, tmp_path, name, labels):
    folder, _ = sources(name)
    arguments = [*relabelled(data, tmp_path, labels), *SETTINGS, *told(name), "study.folds=2", "study.seeds=[5]"]
    out = tmp_path / "run"
    warm = [f"model.init={folder}", "train.freeze=tile_layers", "checks.init_overlap=note", f"out={out}"]
    assert main([*arguments, *warm]) == 0
    (before, _), (after, description) = load_members(folder), load_members(out)
    kept = tile_layers(name, 6, 1, OPTIONS[name]) - about_classes(name, 6, OPTIONS[name])
    assert kept
    for parameter, stack in after.named_parameters():
        same = stack.shape[1:] == before.state_dict()[parameter].shape[1:] and torch.equal(
            stack, before.state_dict()[parameter][:2]
        )
        assert same == (parameter in kept), parameter
    assert description.classes == sorted(labels)
    assert "the head is new, as it told normal, tumor apart" in (out / "report.html").read_text()


def test_the_head_may_have_other_widths_where_it_is_new(sources, data, tmp_path):
    folder, _ = sources("abmil")
    arguments = [*relabelled(data, tmp_path, ["a", "b"]), *SETTINGS, *told("abmil"), "model.head=[7,3]"]
    warm = [f"model.init={folder}", "checks.init_overlap=note", "train.epochs=1", f"out={tmp_path / 'run'}"]
    assert main([*arguments, *warm]) == 0


def test_nothing_can_be_taken_over(sources, data, tmp_path, refused):
    folder, _ = sources("mean")
    arguments = [*relabelled(data, tmp_path, ["a", "b"]), *SETTINGS, *told("mean"), f"model.init={folder}"]
    assert "nothing of mean" in refused(main, *arguments, f"out={tmp_path / 'run'}")
    _, arguments = sources("mean")
    said = refused(main, *arguments, f"model.init={folder}", "train.freeze=tile_layers", f"out={tmp_path / 'run'}")
    assert "mean has no layers on tiles" in said
    assert not (tmp_path / "run").exists()


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_all_that_is_of_another_kind_is_told_at_once(sources, data, tmp_path, refused):
    folder, _ = sources("abmil")
    other = [
        "model.name=abmil",
        "model.hidden=8",
        "model.attention=5",
        "model.head=[4]",
        "train.standardize=false",
        "classes=[tumor,normal]",
    ]
    said = refused(main, *data, "study.folds=3", *other, f"model.init={folder}", f"out={tmp_path / 'run'}")
    assert f"model.hidden: 8 here, 6 in {folder}: set model.hidden=6" in said
    assert "trained with train.standardize=true" in said
    assert "set classes=[normal,tumor]" in said
    assert not (tmp_path / "run").exists()
    said = refused(main, *data, *told("chowder"), f"model.init={folder}", f"out={tmp_path / 'run'}")
    assert f"{folder} is abmil, this study chowder: set model.name=abmil" in said


def test_a_run_from_before_an_option_existed_has_its_default(sources, tmp_path):
    folder, arguments = sources("dsmil")
    aggregator, description = load_members(folder)
    older = replace(description, options={k: v for k, v in description.options.items() if k == "attention"})
    shutil.copytree(folder, tmp_path / "older", ignore=shutil.ignore_patterns("hashes.json"))  # younger than that, too
    save_members(tmp_path / "older", older, aggregator.state_dict())
    assert main([*arguments, f"model.init={tmp_path / 'older'}", f"out={tmp_path / 'run'}"]) == 0


def test_features_of_another_encoder_are_refused(sources):
    folder, arguments = sources("abmil")
    config = load_config(StudyConfig, [*arguments, f"model.init={folder}"], also=study_problems)
    cohort = read_cohort(config.cohort)
    plan = load_plan(folder, cohort)
    with pytest.raises(ConfigError) as caught:
        open_start(config, cohort, plan, 8, {"encoder": "uni", "weights_sha256": "f" * 64, "tile_px": 256, "mpp": 0.25})
    text = "\n".join(caught.value.problems)
    assert "features with 6 columns (encoder synthetic), this study's have 8" in text
    assert "encoder 'synthetic', this study's have 'uni'" in text
    assert "weights_sha256 'none', this study's have 'ffffffffffff'" in text
    assert "tile_px 224, this study's have 256" in text
    assert "mpp 0.5, this study's have 0.25" in text
    resampled = replace(load_members(folder)[1], features=FEATURES | {"resample": "area"})
    assert _kind_problems(
        folder, resampled, "abmil", 6, FEATURES | {"resample": "lanczos"}, resampled.standardized
    ) == [f"{folder} was trained on features with resample 'area', this study's have 'lanczos'"]
    unknown = {"encoder": "", "weights_sha256": "", "tile_px": 0, "mpp": 0.505}
    assert open_start(config, cohort, plan, 6, unknown), "unknown is not compared, and 1 % is no other mpp"


def test_what_is_no_run_folder_is_refused(sources, data, tmp_path, refused):
    folder, arguments = sources("abmil")
    assert "no such run folder" in refused(main, *arguments, f"model.init={tmp_path / 'x'}", f"out={tmp_path / 'o'}")
    (tmp_path / "two" / "abmil").mkdir(parents=True)
    shutil.copy(folder / "members.safetensors", tmp_path / "two" / "abmil")
    said = refused(main, *arguments, f"model.init={tmp_path / 'two'}", f"out={tmp_path / 'o'}")
    assert f"several aggregators, choose model.init={tmp_path / 'two' / 'abmil'}" in said
    (tmp_path / "two" / "members.safetensors").write_bytes(b"damaged")
    assert "cannot be read" in refused(main, *arguments, f"model.init={tmp_path / 'two'}", f"out={tmp_path / 'o'}")


def test_a_run_never_starts_from_itself(sources, tmp_path, refused):
    folder, arguments = sources("abmil")
    shutil.copytree(folder, tmp_path / "run")
    run = tmp_path / "run"
    said = refused(main, *arguments, f"model.init={run}", f"out={run}", "overwrite=true")
    assert "own run folder" in said
    assert (run / "members.safetensors").exists(), "nothing was deleted"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["train.freeze=tile_layers"], "train.freeze: would freeze random parameters"),
        (["model.init_from=average"], "model.init_from: only with model.init"),
        (["model.init=x", "model.name=[abmil,mean]"], "expected one model.name, got ['abmil', 'mean']"),
        (["model.int=x"], "did you mean 'model.init'?"),
    ],
)
def test_keys_that_say_nothing_without_the_others(given, said):
    with pytest.raises(ConfigError) as caught:
        load_config(StudyConfig, ["cohort=x.csv", *given], also=study_problems)
    assert said in str(caught.value)


# --- patients ------------------------------------------------------------------------------------------------------


def test_patients_that_the_start_was_trained_on_must_not_be_test(sources, tmp_path, refused):
    """Other folds of the same cohort: found by hand from both studies' roles.csv."""
    folder, arguments = sources("abmil")
    other = [*arguments, f"model.init={folder}", "seed=1", "train.epochs=1"]
    said = refused(main, *other, f"out={tmp_path / 'run'}")
    assert "checks.init_overlap=note goes on" in said
    assert not (tmp_path / "run").exists()
    assert main([*other, "checks.init_overlap=note", f"out={tmp_path / 'run'}"]) == 0
    before, now = (pd.read_csv(f / "roles.csv").set_index("patient") for f in (folder, tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    for m in ("m0", "m1", "m2"):
        test, known = set(now.index[now[m] == "test"]), set(before.index[before[m] == "train"])
        assert test & known
        assert f"member {m[1:]}: {len(test & known)} of its {len(test)} test patients were train or val" in said
        assert f"member {m[1:]} {len(test & known)} of {len(test)}" in page
    assert "the figures below are too good" in page


def test_the_average_has_seen_everybody(sources, tmp_path, refused):
    folder, arguments = sources("abmil")
    said = refused(main, *arguments, f"model.init={folder}", "model.init_from=average", f"out={tmp_path / 'run'}")
    assert "member 0: 8 of its 8 test patients were train or val" in said


def test_a_chain_of_warm_starts_is_remembered(sources, tmp_path, refused):
    """A -> B -> C, where C tests what A trained on and B did not."""
    _, arguments = sources("abmil")
    table = pd.read_csv(arguments[0].partition("=")[2], dtype=str)
    rest = {}
    for part in (0, 1):
        table[table.index % 2 == part].to_csv(tmp_path / f"{part}.csv", index=False)
        rest[part] = [f"cohort={tmp_path / f'{part}.csv'}", *arguments[1:], "study.folds=2", "train.epochs=1"]
    assert main([*rest[0], "study.seeds=[0]", f"out={tmp_path / 'a'}"]) == 0
    assert main([*rest[1], f"model.init={tmp_path / 'a'}", f"out={tmp_path / 'b'}"]) == 0
    assert "0 of this study&#39;s 12 patients were train or val there" in (tmp_path / "b" / "report.html").read_text()
    said = refused(main, *rest[0], f"model.init={tmp_path / 'b'}", "seed=9", f"out={tmp_path / 'c'}")
    assert "test patients were train or val for what it starts from" in said
    assert main([*rest[0], f"model.init={tmp_path / 'b'}", f"out={tmp_path / 'c'}"]) == 0, (
        "the folds of a: nobody leaks"
    )
    seen = pd.read_csv(tmp_path / "c" / "seen_before.csv")
    assert len(seen) == 24, "what b was trained on, and a before it"
    origin = json.loads((tmp_path / "c" / "environment.json").read_text())["init"]
    assert origin["run"] == "../b"
    assert len(origin["members_sha256"]) == 64


def test_a_source_that_does_not_say_its_patients(sources, tmp_path, refused):
    folder, arguments = sources("abmil")
    shutil.copytree(folder, tmp_path / "source")
    (tmp_path / "source" / "roles.csv").unlink()
    arguments = [*arguments, f"model.init={tmp_path / 'source'}", "train.epochs=1", f"out={tmp_path / 'run'}"]
    assert "it cannot be checked which patients" in refused(main, *arguments)
    assert main([*arguments, "checks.init_overlap=note"]) == 0
    assert "it cannot be checked which patients" in (tmp_path / "run" / "report.html").read_text()
    (before, _), (after, _) = load_members(folder), load_members(tmp_path / "run")
    assert not torch.equal(before.embed_weight[0], before.embed_weight[1])
    assert (after.embed_weight - before.embed_weight).abs().max() < (
        before.embed_weight[0] - before.embed_weight[1]
    ).abs().max()
