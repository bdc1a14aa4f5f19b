"""Settings that are `auto`, and `plan=true`: what is chosen and why, what would be trained, nothing written."""

import json
import math

import numpy as np
import pytest
import yaml

from extract.config import ConfigError, load_config
from mil.api.study import run_study
from mil.config import StudyConfig
from mil.config_problems import study_problems
from mil.config_reading import for_today
from mil.study.fingerprint import BATCH_VALUES, STEPS, Fingerprint, choose
from mil.train import main

pytestmark = pytest.mark.usefixtures("no_figures")

DEFAULTS = {"train.batch_size": 16, "train.epochs": 50}
QUICK = ["train.accelerator=cpu", "report.bootstrap=0", "report.baselines=false", "report.heatmaps=0"]


def config(*arguments) -> StudyConfig:
    return load_config(StudyConfig, ["cohort=c.csv", *arguments], also=study_problems, adapt=for_today)


def of(tiles=1000, slides=(100, 100), dim=768) -> Fingerprint:
    return Fingerprint(np.full(50, tiles), slides, dim)


def value(key: str, cohort: Fingerprint, **given) -> int | None:
    (choice,) = choose([key], DEFAULTS | given, cohort)
    assert choice.why
    return choice.value


# --- choosing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 12, 40, 77, 150, 215, 900, 20_000])
def test_a_member_takes_about_as_many_steps_as_the_recipe(n):
    epochs = value("train.epochs", of(slides=(n, 0)))
    steps = math.ceil(n / 16)
    best = min(range(10, 201), key=lambda e: abs(e * steps - STEPS))
    assert abs(epochs * steps - STEPS) == abs(best * steps - STEPS)


def test_camelyon16_gets_the_recipe_that_the_rule_comes_from():
    assert value("train.epochs", of(slides=(127, 88))) == 50
    assert value("train.batch_size", of(slides=(127, 88))) == 16
    assert value("data.max_tiles", of(tiles=9_000)) == 4_000


def test_batches_are_small_for_few_slides_and_large_for_a_rare_class():
    assert [value("train.batch_size", of(slides=(n, n))) for n in (10, 45, 79, 80)] == [4, 8, 8, 16]
    assert value("train.batch_size", of(slides=(950, 50))) == 32
    assert value("train.batch_size", of(slides=(290, 15))) == 16, "32 would leave under ten steps"


@pytest.mark.parametrize(("size", "dim"), [(16, 768), (4, 1024), (32, 2560)])
def test_the_tile_cap_keeps_a_batch_to_a_size_and_is_none_where_slides_are_small(size, dim):
    cap = value("data.max_tiles", of(tiles=10**6, dim=dim), **{"train.batch_size": size})
    assert cap is not None
    assert cap == 1000 or BATCH_VALUES - 100 * size * dim < cap * size * dim <= BATCH_VALUES
    assert value("data.max_tiles", of(tiles=cap, dim=dim), **{"train.batch_size": size}) is None


def test_epochs_go_by_the_batch_that_is_chosen_with_them():
    batch, epochs = choose(["train.batch_size", "train.epochs"], DEFAULTS, of(slides=(25, 25)))
    assert (batch.value, epochs.value) == (4, round(STEPS / 13))


# --- asking --------------------------------------------------------------------------------------------------------


def test_auto_is_asked_for_key_by_key_and_nothing_changes_without_it(tmp_path):
    assert config().auto == []
    asked = config("train.epochs=auto", "data.max_tiles=auto")
    assert asked.auto == ["train.epochs", "data.max_tiles"]
    assert (asked.train.epochs, asked.data.max_tiles) == (50, None), "until the cohort is known"
    (tmp_path / "run.yaml").write_text("auto: [train.epochs, data.max_tiles]\ntrain: {epochs: 30}\n")
    later = config(f"config={tmp_path / 'run.yaml'}", "train.epochs=7")
    assert (later.auto, later.train.epochs) == (["data.max_tiles"], 7)
    with pytest.raises(ConfigError, match=r"train\.lr"):
        config("train.lr=auto")


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_study):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(5 + i % 7, 6)).astype(np.float32) for i in range(24)]
    return write_study(tmp_path_factory.mktemp("data"), arrays, ["a", "b", "b"] * 8)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_run_keeps_what_was_asked_and_what_was_chosen_and_resumes(data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*data, "study.folds=2", "model.name=mean", "train.batch_size=auto", f"out={out}", *QUICK]
    assert main([*arguments, "train.epochs=2"]) == 0
    said = "train.batch_size=4 (auto): 12 training slides a member by 16 would be 1 steps an epoch, by 4 they are 3"
    assert said in capsys.readouterr().out
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["auto"], saved["train"]["batch_size"]) == (["train.batch_size"], 4)
    chosen = json.loads((out / "metrics.json").read_text())["chosen"]
    assert chosen["train.batch_size"] == {"value": 4, "why": said.partition("(auto): ")[2]}
    assert json.loads((out / "environment.json").read_text())["chosen"] == chosen
    assert said in (out / "report.html").read_text()
    assert main([*arguments, "train.epochs=2", "resume=true"]) == 0
    assert "already finished" in capsys.readouterr().out


# --- plan ----------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_would_be_trained_and_writes_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*data, "study.folds=4", "study.seeds=[0,1]", "model.name=[mean,max]", "train.members_per_pass=3"]
    assert main([*arguments, "plan=true", "train.accelerator=cpu"]) == 0
    said = capsys.readouterr().out
    assert "24 slides of 24 patients, 186 tiles x 6" in said
    assert "repeat 0 fold 3: train 18 (6 a, 12 b); test 6 (2 a, 4 b)" in said
    assert said.count("8 members, 50 epochs, 3 passes over the features") == 2
    assert said.count("memory:") == said.count("time: about") == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="plan=true"):
        run_study(config(*data, "plan=true"))


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        (["task=survival", "columns.time=t", "columns.event=e"], "censored"),
        (["task=regression", "columns.label=t"], "train 12"),
        (["task=ordinal", "columns.label=g", "classes=[0,1,2]"], "2"),
    ],
)
def test_a_plan_of_every_task(data, tmp_path, capsys, monkeypatch, task, wanted):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"slide_{i:02d},p{i},{i + 1},{i % 2},{i % 3}\n" for i in range(24))
    (tmp_path / "c.csv").write_text("slide,patient,t,e,g\n" + rows)
    arguments = [data[1], "cohort=c.csv", *task, "study.folds=2", "model.name=mean"]
    assert main([*arguments, "plan=true", "train.accelerator=cpu", "train.epochs=auto"]) == 0
    said = capsys.readouterr().out
    assert wanted in said
    assert "train.epochs=200 (auto)" in said
    assert "mean: 2 members, 200 epochs" in said


def test_a_plan_refuses_what_training_would(data, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "study.folds=20 needs 20" in refused(main, *data, "study.folds=20", "plan=true")
    assert "is not there yet" in refused(main, "config=quickstart.yaml", "plan=true")
