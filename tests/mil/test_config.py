"""The study's config: what the sections cannot see alone, the aggregators' options, and how fast help answers."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from extract.config import SHIPPED_CONFIGS, STUDY_KEYS, ConfigError, ExtractConfig, load_config, to_yaml
from mil.aggregators import AGGREGATORS, aggregator_class, options
from mil.config import Model, StudyConfig, Train, model_options
from mil.config_problems import study_problems
from mil.config_reading import for_named_aggregators, options_help

COHORT = "cohort=x.csv"


def load(*arguments: str) -> StudyConfig:
    return load_config(StudyConfig, arguments, also=study_problems)


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return caught.value.problems


# --- the aggregators' options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATORS)
def test_defaults_of_an_aggregator_are_those_of_its_signature(name):
    """`options` reads the source without importing torch; here the class itself is asked."""
    found = model_options(load(COHORT, f"model.name={name}").model, name)
    assert found == aggregator_class(name).__init__.__kwdefaults__


def test_options_are_typed():
    model = load(COHORT, "model.name=abmil", "model.head=[32,16]", "model.gated=false", "model.hidden=64").model
    found = model_options(model, "abmil")
    assert found["head"] == (32, 16)
    assert found["gated"] is False
    assert found["hidden"] == 64
    assert model_options(load(COHORT, "model.head=[]").model, "abmil")["head"] == ()


def test_an_option_goes_to_those_of_several_aggregators_that_have_it():
    model = load(COHORT, "model.name=[chowder,mean,abmil]", "model.n_top=3", "model.head=[8]").model
    assert model.names == ["chowder", "mean", "abmil"]
    assert model_options(model, "chowder")["n_top"] == 3
    assert "n_top" not in model_options(model, "mean")
    assert {name: model_options(model, name)["head"] for name in model.names} == dict.fromkeys(model.names, (8,))


def test_unknown_aggregators_and_options_have_the_nearest_name():
    assert "no aggregator 'chowda'" in problems_of(COHORT, "model.name=chowda")[0]
    assert "did you mean 'chowder'?" in problems_of(COHORT, "model.name=chowda")[0]
    [problem] = problems_of(COHORT, "model.name=[abmil,meen]")
    assert "did you mean 'mean'?" in problem
    [problem] = problems_of(COHORT, "model.hiden=5")
    assert "model.hiden: unknown option of abmil; did you mean 'model.hidden'?" in problem
    assert "model.n_top" in problems_of(COHORT, "model.n_top=5")[0], "an option of another aggregator"


# --- settings of one aggregator of a list --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "alone"),
    [
        (["model.chowder.n_top=3"], ["model.n_top=3"]),
        (["model.head=[7]", "model.chowder.head=[8,9]"], ["model.head=[8,9]"]),
        (["model.head=[7]", "model.abmil.head=[8]"], ["model.head=[7]"]),
        (["train.chowder.lr=0.1", "train.chowder.standardize=true"], ["train.lr=0.1", "train.standardize=true"]),
        (["train.epochs=3", "train.chowder.epochs=50", "train.abmil.lr=0.3"], ["train.epochs=50"]),
        (["train.chowder.optimizer=adamw", "train.batch_size=3"], ["train.optimizer=adamw", "train.batch_size=3"]),
        (["study.nested=2", "study.grid.chowder.lr=[1,2]"], ["study.nested=2", "study.grid.lr=[1,2]"]),
        (
            ["study.nested=2", "study.search=random", "study.ranges.lr=[1,2]", "study.ranges.chowder.lr=[3,4]"],
            ["study.nested=2", "study.search=random", "study.ranges.lr=[3,4]"],
        ),
    ],
)
def test_an_aggregator_of_a_list_has_the_config_of_the_same_one_alone(own, alone):
    """And its block changes nothing for the others."""
    in_list = load(COHORT, "model.name=[abmil,chowder]", "model.attention=7", "train.lr=0.02", *own)
    assert in_list.for_aggregator("chowder") == load(COHORT, "model.name=chowder", "train.lr=0.02", *alone)
    assert model_options(in_list.model, "chowder") == model_options(in_list.for_aggregator("chowder").model, "chowder")
    others = [key for key in own if ".chowder." not in key]
    without = load(COHORT, "model.name=[abmil,chowder]", "model.attention=7", "train.lr=0.02", *others)
    assert in_list.for_aggregator("abmil") == without.for_aggregator("abmil")
    assert model_options(in_list.model, "abmil")["attention"] == 7


def test_a_block_for_a_torchmil_model_is_for_that_model_alone(monkeypatch):
    monkeypatch.setattr("mil.config_problems.find_spec", lambda name: True)
    names = ["model.name=[torchmil:ABMIL,torchmil:DSMIL,abmil]", "model.attention=7", "model.feat_ext=9"]
    model = load(COHORT, *names, "model.torchmil:ABMIL.att_dim=5").model
    assert model_options(model, "torchmil:ABMIL") == {"feat_ext": 9, "att_dim": 5}
    assert model_options(model, "torchmil:DSMIL") == {"feat_ext": 9}
    assert model_options(model, "abmil")["attention"] == 7


def test_wrong_blocks_are_reported_together():
    problems = problems_of(
        COHORT,
        "model.name=[abmil,chowder]",
        "model.chowder.n_topp=5",
        "model.chowder.n_bottom=few",
        "model.chowder.hidden=5",
        "model.chowdr.n_top=5",
        "model.dsmil.hidden=5",
        "train.chowder.lrr=1",
        "train.chowder.epochs=0",
        "train.chowder.select=best",
        "train.chwder.lr=1",
        "train.dsmil.lr=1",
        "study.nested=2",
        "study.grid.chowder.lr=[0.1,0.1]",
        "study.grid.abmil.lrr=[0.1]",
        "study.grid.mean.lr=[0.1]",
    )
    said = {problem.partition(": ")[0]: problem for problem in problems}
    assert len(said) == len(problems) == 13
    assert said["model.chowder.n_topp"].endswith("unknown option of chowder; did you mean 'model.chowder.n_top'?")
    assert "valid integer" in said["model.chowder.n_bottom"]
    assert "unknown option of chowder" in said["model.chowder.hidden"], "ABMIL has it, Chowder does not"
    assert "did you mean 'model.chowder'?" in said["model.chowdr"]
    for key in ("model.dsmil", "train.dsmil", "study.grid.mean"):
        assert "a block for one of model.name, which is abmil, chowder" in said[key]
    assert said["train.chowder.lrr"].endswith("unknown key; did you mean 'train.chowder.lr'?")
    assert "greater than or equal to 1" in said["train.chowder.epochs"]
    assert "unknown key" in said["train.chowder.select"], "how epochs are selected is the same for all"
    assert said["train.chwder"].endswith("did you mean 'train.chowder'?")
    assert "a value occurs twice" in said["study.grid.chowder.lr"]
    assert said["study.grid.abmil.lrr"].endswith("did you mean 'study.grid.abmil.lr'?")


@pytest.mark.parametrize("wrong", ["model.chowder=5", "train.chowder=5", "train.chowder=[]", "study.grid.chowder=[1]"])
def test_a_block_is_no_value(wrong):
    problems = problems_of(COHORT, "model.name=[abmil,chowder]", "study.nested=2", wrong)
    assert any("expected a block, such as" in problem for problem in problems)


def test_an_empty_block_says_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "cohort: x.csv\nmodel:\n  name: [abmil, chowder]\n  chowder:\ntrain:\n  chowder:\n"
    )
    config = load(f"config={tmp_path / 'c.yaml'}")
    assert config.for_aggregator("chowder") == load(COHORT, "model.name=chowder").for_aggregator("chowder")


def test_no_option_is_called_like_an_aggregator():
    assert not {option for name in AGGREGATORS for option in options(name)} & set(AGGREGATORS)
    assert not set(Train.model_fields) & set(AGGREGATORS)


def test_blocks_survive_the_written_config(tmp_path):
    """Only what a block says is written: its other settings stay those of all."""
    config = load(
        COHORT,
        "model.name=[abmil,chowder]",
        "model.chowder.tile_hidden=[]",
        "train.epochs=7",
        "train.chowder.lr=1e-2",
        "study.nested=2",
        "study.grid.chowder.lr=[1,2]",
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = load(f"config={tmp_path / 'c.yaml'}")
    assert again == config
    assert again.for_aggregator("chowder") == config.for_aggregator("chowder")
    assert again.for_aggregator("chowder").train.epochs == 7
    assert to_yaml(again) == to_yaml(config)


BLOCKS = """
cohort: x.csv
model: {name: [abmil, chowder], hidden: 64, chowder: {n_top: 3}}
train: {epochs: 5, chowder: {epochs: 9}, abmil: {lr: 0.1}}
"""


def adapted(tmp_path: Path, *arguments: str) -> StudyConfig:
    (tmp_path / "b.yaml").write_text(BLOCKS, encoding="utf-8")
    given = (f"config={tmp_path / 'b.yaml'}", *arguments)
    return load_config(StudyConfig, given, also=study_problems, adapt=for_named_aggregators)


def test_blocks_of_aggregators_that_the_command_line_replaces_are_left_out_and_said(tmp_path, capsys):
    config = adapted(tmp_path, "model.name=chowder")
    assert capsys.readouterr().err.rstrip().endswith("for another aggregator: model.hidden, train.abmil")
    alone = load(COHORT, "model.name=chowder", "model.n_top=3", "train.epochs=9")
    assert config.for_aggregator("chowder") == alone.for_aggregator("chowder")
    assert adapted(tmp_path, "model.name=mean") == load(COHORT, "model.name=mean", "train.epochs=5")
    with pytest.raises(ConfigError, match=r"train.abmil: a block for one of model.name, which is chowder"):
        adapted(tmp_path, "model.name=chowder", "train.abmil.epochs=3")


def test_a_key_that_a_block_outranks_is_said(tmp_path, capsys):
    config = adapted(tmp_path, "train.epochs=2", "train.lr=0.3", "train.abmil.lr=0.2")
    said = capsys.readouterr().err.splitlines()
    assert said == ["train.epochs: not for chowder, which has its own: train.chowder.epochs=9"]
    own = {name: config.for_aggregator(name).train for name in config.model.names}
    assert {name: (train.epochs, train.lr) for name, train in own.items()} == {"abmil": (2, 0.2), "chowder": (9, 0.3)}


def rates(*arguments: str) -> dict[str, float | None]:
    """The learning rate of every aggregator by the config that a run folder would hold, and none but those."""
    config = load(COHORT, *arguments)
    written = config.with_learning_rates()
    assert written.with_learning_rates() == written
    for name in config.model.names:
        assert written.for_aggregator(name) == config.for_aggregator(name)
    return {name: written.train.of(name).lr for name in config.model.names}


def test_a_learning_rate_that_is_not_given_is_the_published_one():
    """Figures from the papers, by hand: Chowder's tutorial, Shao et al. 2021, Li et al. 2021; none for evidence."""
    names = "model.name=[chowder,transmil,dsmil,evidence]"
    published = {"chowder": 1e-3, "transmil": 2e-4, "dsmil": 1e-4, "evidence": 1e-3}
    assert rates(names) == published
    assert rates(names, "train.lr=0.3") == dict.fromkeys(published, 0.3), "a rate that is given is for all"
    assert rates(names, "train.dsmil.lr=0.2", "train.transmil.epochs=3") == published | {"dsmil": 0.2}
    assert rates("model.name=transmil") == {"transmil": 2e-4}
    assert rates("model.name=transmil", "train.lr=0.3") == {"transmil": 0.3}
    assert rates("model.name=transmil", "train.transmil.epochs=3") == {"transmil": 2e-4}
    assert rates("model.name=transmil", "train.transmil.lr=null", "train.lr=0.3") == {"transmil": 2e-4}
    assert load(COHORT, "model.name=transmil").with_learning_rates().train.lr == 2e-4, "written where it is looked for"
    assert [
        line for line in options_help().splitlines() if line.startswith("train.lr where it is not set: abmil 0.001")
    ]


def test_a_shipped_config_that_states_its_learning_rate_keeps_it():
    stated = {"camelyon16": 1e-3, "camelyon16-chowder": 1e-3, "tcga-nsclc": 1e-4, "tcga-rcc": 1e-4}
    for name, lr in stated.items():
        config = load(f"config={name}.yaml", COHORT)
        assert config == config.with_learning_rates()
        assert config.train.lr == lr


# --- options of a file's aggregators that the command line replaces --------------------------------------------------


def options_of(tmp_path: Path, model: str, *arguments: str) -> dict[str, Any]:
    """The aggregators' options by a config file with this `model` and these arguments."""
    (tmp_path / "c.yaml").write_text(f"model: {model}\n", encoding="utf-8")
    given = (f"config={tmp_path / 'c.yaml'}", COHORT, *arguments)
    found = load_config(StudyConfig, given, also=study_problems, adapt=for_named_aggregators).model
    return dict(found.model_extra or {})


ABMIL = "{name: abmil, hidden: 64, gated: true, head: [64]}"


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        (ABMIL, ["model.name=chowder"], {}),  # chowder has a head too, but the file meant ABMIL's
        (ABMIL, ["model.name=chowder", "model.head=[5]"], {"head": [5]}),
        (ABMIL, ["model.name=[abmil,chowder]"], {"hidden": 64, "gated": True, "head": [64]}),
        (ABMIL, ["model.name=abmil", "model.hidden=32"], {"hidden": 32, "gated": True, "head": [64]}),
        ("{hidden: 64, head: [64]}", ["model.name=mean"], {}),  # a file that does not say is about ABMIL
        ("{name: [abmil, chowder, mean], hidden: 64, n_top: 3}", ["model.name=[mean,chowder]"], {"n_top": 3}),
        (ABMIL, ["train.lr=1e-3"], {"hidden": 64, "gated": True, "head": [64]}),
    ],
)
def test_options_of_an_aggregator_that_the_command_line_replaces_are_left_out_and_said(
    model, arguments, expected, tmp_path, capsys
):
    found = options_of(tmp_path, model, *arguments)
    assert found == expected
    said = capsys.readouterr().err
    lost = {key for key in ("hidden", "gated", "head", "n_top") if f"{key}:" in model} - set(expected)
    assert all(f"model.{key}" in said for key in lost if not any(f"model.{key}=" in a for a in arguments))
    assert bool(said) == bool(lost)


@pytest.mark.parametrize("wrong", ["model.hidden=64", "model.hiden=64"])
def test_a_wrong_option_on_the_command_line_or_a_wrong_name_in_the_file_stays_a_problem(wrong, tmp_path):
    option = wrong.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        options_of(tmp_path, ABMIL, "model.name=mean", wrong)
    assert any(option in problem for problem in caught.value.problems)
    with pytest.raises(ConfigError):
        options_of(tmp_path, "{name: abmil, hiden: 64}", "model.name=mean")


@pytest.mark.parametrize("wrong", ["model.hidden=wide", "model.head=3", "model.gated=maybe", "model.head=[a]"])
def test_wrong_option_values(wrong):
    [problem] = problems_of(COHORT, wrong)
    assert problem.startswith(wrong.partition("=")[0])


@pytest.mark.parametrize("wrong", ["model.name=[]", "model.name=[abmil,abmil]", "model.name=null", "model=abmil"])
def test_wrong_aggregator_lists(wrong):
    assert any(problem.startswith("model") for problem in problems_of(COHORT, wrong))


def test_help_lists_every_option_of_every_aggregator():
    text = options_help()
    assert "train.chowder.lr=" in text, "and how one aggregator of a list is told something alone"
    for name in AGGREGATORS:
        [line] = [line for line in text.splitlines() if line.split()[0] == name]
        for option in options(name):
            assert f"{option} [" in line


# --- settings that contradict each other ---------------------------------------------------------------------------


def test_selecting_the_best_epoch_needs_validation_slides():
    """Trap 1: without slides of its own, selection would look at the fold that is reported."""
    assert "study.val_fraction" in problems_of(COHORT, "train.select=best")[0]
    assert load(COHORT, "train.select=best", "study.val_fraction=0.2").train.select == "best"
    assert load(COHORT, "train.select=best", "study.folds_csv=f.csv").train.select == "best"


def test_patience_needs_selection():
    assert "train.patience" in problems_of(COHORT, "train.patience=3")[0]
    assert load(COHORT, "train.patience=3", "train.select=best", "study.val_fraction=0.2").train.patience == 3


def test_a_cohort_is_needed_unless_the_source_makes_one():
    assert "cohort=FILE.csv" in problems_of("seed=1")[0]
    assert load("data.source=quickstart").cohort is None
    assert load("data.source=parquet").cohort is None


def test_problems_of_all_kinds_are_reported_together():
    problems = problems_of(
        "trian.lr=1",
        "train.lrr=1",
        "train.epochs=0",
        "train.select=bst",
        "study.seeds=[]",
        "model.name=abmill",
        "train.batch_size=2.5",
        "study.val_fraction=1",
        "data.max_tiles=0",
    )
    text = "\n".join(problems)
    for key in (
        "trian",
        "train.lrr",
        "train.epochs",
        "train.select",
        "study.seeds",
        "model.name",
        "train.batch_size",
        "study.val_fraction",
        "data.max_tiles",
        "cohort",
    ):
        assert re.search(rf"^{re.escape(key)}\b", text, re.MULTILINE), key
    assert len(problems) == 10


def test_zero_is_a_seed():
    """Trap 5: seed 0 is not the absence of a seed."""
    assert load(COHORT, "seed=0", "study.seeds=[0,3]").study.seeds == [0, 3]
    assert "seed" in problems_of(COHORT, "seed=-1")[0]


def test_class_names_may_be_written_as_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("cohort: x.csv\nclasses: [0, 1]\n")
    assert load(f"config={tmp_path / 'c.yaml'}").classes == ["0", "1"]


def test_round_trip_with_model_options(tmp_path):
    config = load(
        COHORT,
        "model.name=[abmil,chowder]",
        "model.head=[3]",
        "model.tile_hidden=[]",
        "train.lr=3e-4",
        "train.precision=bf16-mixed",
        "train.members_per_pass=3",
        "classes=[a,b]",
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load(f"config={tmp_path / 'c.yaml'}") == config


def test_every_study_key_is_known_to_the_extraction_as_one_to_pass_over():
    of_training = set(StudyConfig.model_fields) - set(ExtractConfig.model_fields)
    assert of_training == set(STUDY_KEYS)


# --- shipped configs -----------------------------------------------------------------------------------------------


def test_the_camelyon_configs_are_the_published_settings():
    """Figures from the papers and the tutorial, and the parameter counts that follow from them."""
    abmil, chowder = load("config=camelyon16.yaml"), load("config=camelyon16-chowder.yaml")
    assert model_options(abmil.model, "abmil") == {
        "hidden": 128,
        "attention": 128,
        "gated": True,
        "embed_relu": False,
        "head": (128, 64),
    }
    assert model_options(chowder.model, "chowder") == {
        "n_top": 5,
        "n_bottom": 5,
        "tile_hidden": (),
        "head": (200, 100),
    }
    train = chowder.train
    settings = (train.optimizer, train.lr, train.weight_decay, train.batch_size, train.epochs, train.select)
    assert settings == ("adam", 1e-3, 0.0, 16, 15, "last")
    assert (abmil.train.optimizer, abmil.train.batch_size, abmil.train.epochs) == ("adam", 16, 50)
    for config in (abmil, chowder):
        assert (config.study.folds, config.study.repeats, config.study.seeds) == (5, 1, [0])
        assert config.data.label_names == ["normal", "tumor"]
    for config, name, n_parameters in ((chowder, "chowder", 23_170), (abmil, "abmil", 156_418)):
        model = aggregator_class(name)(768, 1, [0], **model_options(config.model, name))
        assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_a_shipped_config_serves_extraction_too():
    config = load_config(
        ExtractConfig, ["config=cohort.yaml", "slides.folder=/d", "out=c"], ignored=STUDY_KEYS, bare_section="extract"
    )
    assert config.slides.folder == Path("/d")
    assert {p.stem for p in SHIPPED_CONFIGS.glob("*.yaml")} >= {"cohort"}


# --- how fast it answers -------------------------------------------------------------------------------------------

ANSWER = """
import json, resource, sys
from mil.train import main
codes = []
for arguments in (["--help"], ["config=cohort.yaml", "train.lrr=1"], ["config=absent.yaml"]):
    try:
        main(arguments)
    except SystemExit as ended:
        codes.append(ended.code)
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1].split(",")))
print(json.dumps({"codes": codes, "heavy": heavy, "seconds": used.ru_utime + used.ru_stime}))
"""
HEAVY = "torch,pandas,h5py,lightning,numpy,scipy,sklearn,matplotlib,timm,pyarrow,huggingface_hub,cv2,openslide"


def test_help_and_config_errors_answer_at_once_and_write_nothing(python, tmp_path):
    """One process; processor seconds, so that a busy machine does not count. It takes about 0.3 s."""
    command = [*python, "-c", ANSWER, HEAVY]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["codes"] == [0, 2, 2]
    assert said["heavy"] == [], "imported before the config was known to be valid"
    assert said["seconds"] < 1
    assert "train.lrr: unknown key; did you mean 'train.lr'?" in ended.stderr
    assert "model.OPTION by aggregator" in ended.stdout
    assert os.listdir(tmp_path) == []


def test_a_model_section_keeps_unknown_options_for_the_check():
    assert Model(name="abmil", hidden=3).model_extra == {"hidden": 3}
