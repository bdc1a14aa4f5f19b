"""Config: one YAML file and `key=value` overrides in, a typed config or all problems at once out."""

import os
import time
from pathlib import Path

import pytest

from extract.config import (
    SHIPPED_CONFIGS,
    STUDY_KEYS,
    ConfigError,
    ExtractConfig,
    Tiles,
    config_from_command_line,
    did_you_mean,
    find_config,
    help_text,
    key_names,
    load_config,
    to_yaml,
)
from extract.convert import ConvertConfig
from extract.finetuning.config import FinetuneConfig, finetune_problems


def load(*arguments: str, **options) -> ExtractConfig:
    return load_config(ExtractConfig, arguments, **options)


def problems_of(*arguments: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **options)
    return caught.value.problems


@pytest.fixture
def yaml(tmp_path):
    """Writes a config file; gives the `config=FILE` argument."""

    def write(text: str, name: str = "my.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return f"config={tmp_path / name}"

    return write


# --- finding the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cohort.yaml", "cohort"])
def test_a_shipped_config_is_found_from_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).samefile(SHIPPED_CONFIGS / "cohort.yaml")


def test_a_path_comes_before_a_shipped_config_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cohort.yaml").write_text("cohort: mine.csv\n")
    assert load("config=cohort.yaml").cohort == Path("mine.csv")


def test_an_absent_config_lists_the_shipped_ones_and_the_nearest():
    with pytest.raises(ConfigError) as caught:
        find_config("camelyon61.yaml")
    message = str(caught.value)
    assert "camelyon61.yaml: no such file" in message
    for shipped in SHIPPED_CONFIGS.glob("*.yaml"):
        assert shipped.name in message
    assert "did you mean 'camelyon16.yaml'?" in message


# --- what a file may say -------------------------------------------------------------------------------------------


def test_an_empty_file_gives_the_defaults(yaml):
    assert load(yaml("")) == ExtractConfig()


def test_command_line_wins_over_file_and_file_over_default(yaml):
    file = yaml("tiles:\n  min_tissue: 0.5\n  overlap_px: 8\n")
    assert load(file, "tiles.min_tissue=0.75").tiles == Tiles(min_tissue=0.75, overlap_px=8)
    assert load("tiles.min_tissue=0.75", file).tiles.min_tissue == 0.75, "wherever config= stands"


def test_the_last_of_two_equal_overrides_wins():
    assert load("tiles.overlap_px=3", "tiles.overlap_px=5").tiles.overlap_px == 5


def test_trap_16_an_exponent_without_a_point_is_a_number(yaml):
    """PyYAML reads 1e-3 as text (YAML 1.1); here it is a number in a file and on the command line."""
    assert load(yaml("tiles:\n  min_tissue: 1e-3\n")).tiles.min_tissue == 0.001
    assert load("tiles.min_tissue=1e-3").tiles.min_tissue == 0.001
    assert load(yaml("tiles: {min_tissue: 2E-3}\n")).tiles.min_tissue == 0.002


@pytest.mark.parametrize("text", ["tiles:\n", "tiles: null\n", "tiles:\n  # overlap_px: 3\n", "tiles: ~\n"])
def test_a_section_with_nothing_under_it_has_its_defaults(text, yaml):
    assert load(yaml(text)).tiles == Tiles()
    assert load(yaml(text), "tiles.overlap_px=4").tiles.overlap_px == 4


@pytest.mark.parametrize("name", ["slides #2.csv", "#2", "a's #2", "a#2", 'say "#2" #3'])
def test_a_hash_in_a_value_begins_no_comment(name):
    config = load_config(ExtractConfig, [f"cohort={name}", "tiles.overlap_px=3"])
    assert (str(config.cohort), config.tiles.overlap_px) == (name, 3)


def test_values_may_hold_equals_signs_blanks_and_colons():
    config = load("cohort=a folder/x=y.csv", "encoder.device=cuda:1", "extract.shard=2/3")
    assert (config.cohort, config.encoder.device) == (Path("a folder/x=y.csv"), "cuda:1")
    assert config.extract.shard == "2/3"


def test_interpolation_within_the_file(yaml):
    config = load(yaml("out: cache/x\nfeatures:\n  folder: ${out}\n"))
    assert config.features.folder == Path("cache/x")


def test_a_number_is_accepted_where_text_is_expected(yaml):
    """`revision: 1234567` is a commit, not a mistake."""
    assert load(yaml("encoder:\n  revision: 1234567\n")).encoder.revision == "1234567"


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load().tiles.overlap_px = 3


# --- what is wrong -------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together_each_with_the_nearest_name(yaml):
    file = yaml("tils:\n  overlap_px: 3\ntiles:\n  min_tisue: 0.5\n  overlap_px: many\nencoder:\n  precision: bf61\n")
    problems = problems_of(file, "slides.mpp=-1", "qcc", "extract.workrs=2", "tissue.threshold=2", "slides.mpp=-2")
    text = "\n".join(problems)
    expected = [
        "tils: unknown key; did you mean 'tiles'?",
        "tiles.min_tisue: unknown key; did you mean 'tiles.min_tissue'?",
        "tiles.overlap_px: input should be a valid integer",
        "got 'many'",
        "encoder.precision: input should be 'auto', 'float32', 'bf16' or 'fp16', got 'bf61'; did you mean 'bf16'?",
        "slides.mpp: input should be greater than 0, got -2",
        "'qcc': expected key=value",
        "extract.workrs: unknown key; did you mean 'extract.workers'?",
        "tissue.threshold: input should be less than 1, got 2",
    ]
    for part in expected:
        assert part in text
    assert len(problems) == 8
    assert text.count("slides.mpp") == 1


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("overlap_px=3", "tiles.overlap_px"),
        ("--tiles.overlap_px=3", "tiles"),
        ("encoder.nme=phikon", "encoder.name"),
        ("tile.min_tissue=0.3", "tiles"),
        ("batchsize=3", "extract.batch_size"),
    ],
)
def test_nearest_name(argument, nearest):
    [problem] = problems_of(argument)
    assert f"did you mean '{nearest}'?" in problem


def test_no_hint_where_nothing_is_near():
    assert did_you_mean("zzzzzz", ["tiles.overlap_px"]) == ""


@pytest.mark.parametrize("argument", ["tiles", "--help-me", "=3", "", "[=3", "[].=x"])
def test_what_is_not_key_value(argument):
    [problem] = problems_of(argument)
    assert "expected key=value" in problem


@pytest.mark.parametrize("argument", ["slides.mpp=nan", "slides.mpp=inf", "slides.mpp=.inf", "slides.mpp=abc"])
def test_numbers_must_be_numbers(argument):
    [problem] = problems_of(argument)
    assert problem.startswith("slides.mpp: ")


def test_an_override_that_is_no_yaml_is_named():
    problems = problems_of("tiles.overlap_px=[1", "encoder.nme=x")
    assert any(p.startswith("'tiles.overlap_px=[1'") for p in problems)
    assert len(problems) == 2


def test_what_yaml_makes_of_a_colon_without_a_space():
    splits = "data.hub_splits={a:train}"
    with pytest.raises(ConfigError, match=r"got None; YAML wants a space behind a colon: \{NAME: value\}"):
        load_config(FinetuneConfig, [splits])
    assert problems_of("encoder.name=mine:")[0].endswith("YAML takes a colon at the end for a mapping")


def test_what_has_to_be_given_is_said_with_its_meaning():
    with pytest.raises(ConfigError) as caught:
        load_config(ConvertConfig, ["from=x", "to=clam"])
    assert caught.value.problems == ["out: not set; expected folder to write to; there must be nothing in it"]


def test_a_value_where_a_section_is_expected_and_the_other_way_round():
    assert "tiles: " in problems_of("tiles=5")[0]
    assert "tiles.overlap_px: " in problems_of("tiles.overlap_px.x=5")[0]
    assert "tiles.overlap_px: " in problems_of("tiles.overlap_px=null")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tiles:\n  overlap_px: 1\ntiles:\n  overlap_px: 2\n", "line 3: found duplicate key tiles"),
        ("tiles:\n  overlap_px: 1\n  overlap_px: 2\n", "line 3: found duplicate key overlap_px"),
        ("tiles: [1\n", "line 2"),
        ("tiles:\n\toverlap_px: 1\n", "line 2"),
        ("- tiles\n- extract\n", "got a list"),
        ("out: ${nowhere}\n", "nowhere"),
    ],
)
def test_yaml_errors_name_the_file_and_the_line(text, said, yaml):
    file = yaml(text)
    [problem] = problems_of(file)
    assert problem.startswith(f"{file.removeprefix('config=')}: ")
    assert said in problem


def test_a_file_that_cannot_be_decoded_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("out: möglich\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        load(f"config={path}")


def test_unknown_keys_are_found_even_if_they_are_empty(yaml):
    assert "nonsense: unknown key" in problems_of(yaml("nonsense:\n"))[0]


# --- one file for two programs -------------------------------------------------------------------------------------


def test_sections_of_the_other_program_are_passed_over_in_the_file_only(yaml):
    file = yaml("train:\n  lr: 1e-3\nclasses: [a, b]\ntiles:\n  overlap_px: 3\n")
    assert load(file, ignored=STUDY_KEYS).tiles.overlap_px == 3
    assert len(problems_of(file)) == 2, "not ignored unless asked for"
    [problem] = problems_of(file, "train.lr=1e-3", ignored=STUDY_KEYS)
    assert problem.startswith("train: unknown key")


def test_keys_of_the_main_section_may_stand_without_their_prefix(yaml):
    options = {"bare_section": "extract"}
    assert load("qc=true", **options).extract.qc
    assert load("extract.qc=true", **options).extract.qc
    assert load(yaml("qc: true\n"), **options).extract.qc
    assert load(yaml("qc: true\nextract:\n"), **options).extract.qc
    both = load(yaml("qc: true\nextract:\n  batch_size: 3\n"), "workers=0", **options).extract
    assert (both.qc, both.batch_size, both.workers) == (True, 3, 0)
    assert not load(yaml("qc: true\n"), "qc=false", **options).extract.qc
    assert "did you mean 'extract.qc'?" in problems_of("qc=true")[0], "only where a program asks for it"


def test_problems_that_only_the_program_sees_join_the_others():
    problems = problems_of("tiles.min_tisue=1", also=lambda tree: [f"seen: {sorted(tree)}"])
    assert problems == ["tiles.min_tisue: unknown key; did you mean 'tiles.min_tissue'?", "seen: ['tiles']"]


# --- round trip and help -------------------------------------------------------------------------------------------


def test_what_to_yaml_writes_is_read_back_equal(yaml):
    config = load(
        "cohort=a b/c.csv",
        "columns.label='yes or: no'",
        "tissue.threshold=1e-7",
        "encoder.revision='0123'",
        "features.folder=x",
        "extract.qc=true",
        "extract.workers=0",
        "encoder.weights=null",
        "encoder.adapter='1e3'",
    )
    assert config.encoder.revision == "0123"
    assert config.encoder.adapter == Path("1e3")
    assert load(yaml(to_yaml(config))) == config
    assert to_yaml(load(yaml(to_yaml(config)))) == to_yaml(config)


def test_help_lists_every_key_with_its_default_and_meaning():
    lines = {line.split()[0]: line for line in help_text(ExtractConfig).splitlines()[1:]}
    assert set(key_names(ExtractConfig)) | {"config"} == set(lines)
    assert lines["tiles.min_tissue"].endswith("[0.25]")
    assert lines["extract.qc"].endswith("[false]")
    assert lines["slides.mpp"].endswith("[-]")
    assert "otsu|fixed" in lines["tissue.method"]
    for name, line in lines.items():
        meaning = line.split("  ")[-1].rpartition("[")[0] if name != "config" else line
        assert len(meaning.strip()) > 3, f"{name} is not described"


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_is_printed_and_ends_well(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        config_from_command_line(ExtractConfig, ["tiles.nonsense=1", flag], "usage line", "more lines")
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.startswith("usage line")
    assert "tiles.overlap_px" in out
    assert out.rstrip().endswith("more lines")


def test_without_arguments_help_is_printed_and_the_exit_code_is_2(capsys):
    with pytest.raises(SystemExit) as ended:
        config_from_command_line(ExtractConfig, [], "usage line")
    assert ended.value.code == 2
    assert "usage line" in capsys.readouterr().out


def test_problems_are_printed_to_stderr_with_exit_code_2_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        config_from_command_line(ExtractConfig, ["tiles.nonsense=1", "out=x"], "usage line")
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert "tiles.nonsense" in captured.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["data.folder", "data.csv", "config"])
def test_a_name_that_no_file_may_have_is_a_problem_like_others(key):
    """Asking whether such a file is there raises OSError (found by benchmarks/damage.py)."""
    with pytest.raises(ConfigError, match=r"a{50}.*(File name too long|no such file)"):
        load_config(FinetuneConfig, [f"{key}={'a' * 5_000}"], also=finetune_problems)


@pytest.mark.parametrize("opening", ["[", "{", "- ", "{a: ", "? "])
def test_nesting_without_end_is_refused_at_once(yaml, opening):
    """PyYAML needs minutes for 20,000 lists within each other (found by benchmarks/damage.py with 2,000)."""
    began = time.process_time()
    said = problems_of(yaml(f"out: x\ncohort: {opening * 20_000}" if opening not in ("- ", "? ") else opening * 20_000))
    assert "more than 100 deep" in said[0]
    if opening in ("[", "{"):
        assert "more than 100 deep" in problems_of(f"cohort={opening * 20_000}")[0]
    assert time.process_time() - began < 5
