"""What a terminal shows of many problems: five of each kind, the number of the rest, and where all of them are."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from extract.config import ConfigError, by_kind, kind_of, tell
from extract.run import main


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def told(capsys, problems) -> str:
    tell(ConfigError("problems", problems))
    return capsys.readouterr().err


def test_few_problems_are_all_shown_and_nothing_is_written(temporary, capsys):
    problems = [f"slide 's{i}': no features" for i in range(5)] + ["train.lr: expected a number, got 'x'"]
    said = told(capsys, problems)
    assert said == "\n".join(["problems (6):", *(f"  - {problem}" for problem in problems), ""])
    assert not list(temporary.iterdir())


def test_many_of_a_kind_are_counted_and_all_are_in_a_file(temporary, capsys):
    problems = [f"/data/x{i}/s{i}.h5: has {i} tiles, expected {i + 3}" for i in range(369)]
    problems.insert(200, "columns.patient: no column 'case'")
    said = told(capsys, problems)
    assert len(said.splitlines()) == 1 + 5 + 1 + 1 + 1
    assert "    ... and 364 more of this kind" in said
    assert "  - columns.patient: no column 'case'" in said, "a kind of its own is not lost among the others"
    path = Path(re.search(r"All 370 are in (.+)$", said, re.MULTILINE)[1])
    assert [line.removeprefix("  - ") for line in path.read_text().splitlines()[1:]] == problems


def test_a_kind_is_a_sentence_without_its_names_and_numbers():
    alike = ["slide 'abc': 3 tiles in /x/y.h5", "slide 'q r': 17 tiles in /z.h5", "slide 'ü': 0.5 tiles in c/d"]
    assert len({kind_of(line) for line in alike}) == 1
    assert len({kind_of(line) for line in ("abc: not finite", "def: not finite")}) == 1
    assert kind_of("a: not finite") != kind_of("a: no such file")


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_whatever_the_mixture(seed):
    """Shown and left out are all, beside a count by hand."""
    rng = np.random.default_rng(seed)
    words = [f"{'abcdefghijklmnopqrstuvwxyz'[k]} is wrong" for k in range(26)]
    problems = [f"slide 's{i}': {words[int(k)]}" for i, k in enumerate(rng.integers(0, 26, size=200))]
    lines, left_out = by_kind(problems)
    assert sum(line.startswith("  - ") for line in lines) + left_out == len(problems)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert "could not be written to a file" in told(capsys, [f"slide 's{i}': bad" for i in range(9)])


def test_other_errors_are_told_as_they_are(capsys):
    tell(ValueError("plain"))
    assert capsys.readouterr().err == "plain\n"


def test_a_command_shows_five_of_forty(tmp_path, capsys):
    pd.DataFrame({"slide": [f"s{i}" for i in range(40)], "path": "none.svs"}).to_csv(tmp_path / "c.csv", index=False)
    arguments = [f"cohort={tmp_path / 'c.csv'}", f"out={tmp_path / 'o'}", "encoder.name=timm:test_vit"]
    assert main([*arguments, "encoder.random_weights=true"]) == 2
    said = capsys.readouterr().err
    assert said.count("no file") == 5
    assert "... and 35 more of this kind" in said
