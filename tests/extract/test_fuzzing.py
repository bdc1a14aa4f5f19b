"""Damaged YAML, command lines and tables: the right result or a message that names the place, never a traceback.

Seeded loops; MUTATIONS=100 in the environment makes them a hundred times as long.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from extract.cells import plain_cell, safe_cell
from extract.cohort import read_cohort, write_cohort
from extract.config import (
    SHIPPED_CONFIGS,
    STUDY_KEYS,
    Columns,
    ConfigError,
    ExtractConfig,
    ProblemsError,
    key_names,
    load_config,
)
from extract.features.cache import CacheError
from extract.features.files import load_npy, load_pt
from extract.finetuning.config import FinetuneConfig, TileData, finetune_problems
from extract.finetuning.tilesets import TilesError, _from_csv
from extract.run import extraction_problems
from extract.tables import read_texts, write_csv
from mil.config import StudyConfig
from mil.config_problems import study_problems
from mil.prediction.config import PredictConfig, predict_problems
from mil.study.own_folds import _read_folds

SCHEMAS = {
    "study": (StudyConfig, study_problems, {}),
    "extract": (ExtractConfig, extraction_problems, {"ignored": (*STUDY_KEYS, "out"), "bare_section": "extract"}),
    "finetune": (FinetuneConfig, finetune_problems, {}),
    "predict": (PredictConfig, predict_problems, {}),
}
OF_FILE = {"study": "camelyon16-paper.yaml", "extract": "cohort.yaml", "finetune": "nct-crc-lora.yaml"}


def outcome(action) -> str:
    """ "" or the message of a refusal; everything else is raised."""
    try:
        action()
    except ProblemsError as error:
        return str(error)
    return ""


def checked(action, what: object) -> str:
    try:
        return outcome(action)
    except Exception as error:
        raise AssertionError(f"{what!r:.500}") from error


@pytest.mark.parametrize("name", OF_FILE)
def test_a_damaged_config_file(name, tmp_path, mutations):
    schema, also, options = SCHEMAS[name]
    whole = (SHIPPED_CONFIGS / OF_FILE[name]).read_bytes()
    body = b"\n".join(line for line in whole.splitlines() if not line.startswith(b"#"))
    said = []
    for damaged in mutations.mutations(body, mutations.budget(100), seed=3):
        (tmp_path / "c.yaml").write_bytes(damaged)
        arguments = [f"config={tmp_path / 'c.yaml'}"]
        said.append(checked(lambda: load_config(schema, arguments, also=also, **options), damaged))  # noqa: B023
    assert sum(map(bool, said)) > 0.2 * len(said)
    assert max(map(len, said)) < 20_000


VALUES = ["", "x", "nan", "inf", "-1", "0", "1e999", "9" * 30, "[", "[1", "[[1]]", "{a: 1}", "null", "true", "~"]
VALUES += ["${x}", "${oc.env:HOME}", "${", "*a", "&a 1", "!!python/object:os.system x", "a=b", "\x00", "\n", "ü"]
VALUES += ["%", "@", "`", "[nan]", "[1,1]", "[-1]", "[a,b]", "0x1F", "1_000", "1e-400", ".", "..", "/", "-", "?", "'"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_with_every_odd_value(name):
    """Alone, and two at a time: a section in place of a value, a value in place of a section."""
    schema, also, options = SCHEMAS[name]
    keys = [*key_names(schema), *schema.model_fields, "", ".", "a..b", "nope", "model.hidden", "config"]
    rng = np.random.default_rng(11)
    pairs = [(key, value) for key in keys for value in VALUES]
    order = rng.permutation(len(pairs))[:600]
    for i in order.tolist():
        first, second = pairs[i], pairs[int(rng.integers(len(pairs)))]
        arguments = [f"{first[0]}={first[1]}", f"{second[0]}={second[1]}"]
        checked(lambda arguments=arguments: load_config(schema, arguments, also=also, **options), arguments)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


def test_yaml_that_unpacks_to_gigabytes_is_refused_at_once(tmp_path):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"bomb\.yaml: .*alias"):
        load_config(StudyConfig, [f"config={tmp_path / 'bomb.yaml'}"])
    assert time.monotonic() - began < 5


def test_yaml_anchors_that_a_person_writes_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("study:\n  grid:\n    lr: &values [0.1, 0.2]\n    weight_decay: *values\n")
    config = load_config(StudyConfig, [f"config={tmp_path / 'c.yaml'}"])
    assert config.study.grid.weight_decay == [0.1, 0.2]


COHORT = "slide,patient,label,split,path,mpp,site\n" + "".join(
    f"s{i},p{i // 2},{'ab'[i % 2]},{'test' if i > 7 else ''},,{0.25 if i % 3 else ''},h{i % 3}\n" for i in range(11)
)


def test_a_damaged_cohort_table(tmp_path, mutations):
    path = tmp_path / "cohort.csv"
    said = []
    for damaged in mutations.mutations(COHORT.encode(), mutations.budget(300), seed=5):
        path.write_bytes(damaged)
        said.append(checked(lambda: read_cohort(path, Columns(site="site")), damaged))
        if not said[-1]:
            whole = read_cohort(path, Columns(site="site"))
            write_cohort(tmp_path / "again.csv", whole)
            again = read_cohort(tmp_path / "again.csv", Columns(site="site"), whole.classes)
            assert again.table.drop(columns="mpp").equals(whole.table.drop(columns="mpp")), damaged
    assert sum(map(bool, said)) > 0.3 * len(said)


def test_a_damaged_table_of_folds_and_of_labelled_tiles(tmp_path, mutations):
    folds = "slide,fold,repeat,role\n" + "".join(f"s{i},{i % 3},0,test\n" for i in range(9))
    tiles = "image,label,patient,split\n" + "".join(f"t{i}.png,{'ab'[i % 2]},p{i},train\n" for i in range(12))
    for i in range(12):
        (tmp_path / f"t{i}.png").write_bytes(b"x")
    path = tmp_path / "t.csv"
    for damaged in mutations.mutations(folds.encode(), mutations.budget(300), seed=6):
        path.write_bytes(damaged)
        checked(lambda: _read_folds(path), damaged)
    n_refused = 0
    for damaged in mutations.mutations(tiles.encode(), mutations.budget(200), seed=7):
        path.write_bytes(damaged)
        n_refused += bool(checked(lambda: _from_csv(TileData(csv=path)), damaged))
    assert n_refused > 0
    assert issubclass(TilesError, ProblemsError)


def test_a_damaged_npy_file(tmp_path, mutations):
    """Coverage-guided fuzzing (benchmarks/fuzz.py) found a header that ends within a text: NumPy raises TokenError."""
    np.save(tmp_path / "a.npy", np.ones((5, 3), np.float32))
    whole = (tmp_path / "a.npy").read_bytes()
    cut = whole[:8] + b"\x76\x00" + b"{'descr': '".ljust(0x76 - 1) + b"\n" + whole[128:]
    headers = (damaged + whole[128:] for damaged in mutations.mutations(whole[:128], mutations.budget(400), seed=12))
    n_refused = n_python_2 = 0
    no_bytes = whole.replace(b"'<f4', ", b"'<0f4',")
    assert no_bytes != whole
    for content in (cut, no_bytes, *headers):
        (tmp_path / "a.npy").write_bytes(content)
        try:
            assert load_npy(tmp_path / "a.npy").ndim >= 0
        except CacheError:
            n_refused += 1
        except UserWarning:  # of a header of Python 2; warnings are errors here
            n_python_2 += 1
    assert n_python_2 < 0.2 * mutations.budget(400)
    assert n_refused > 0.5 * mutations.budget(400)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pt_file(tmp_path, mutations):
    """Found the same way: bytes that are no pickle make PyTorch's unpickler pop from an empty stack (IndexError)."""
    torch.save(torch.ones(5, 3), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.pt").read_bytes()
    found = bytes.fromhex("864844ff5dff0a1a0a00000001000000002000000008616c")
    n_refused = 0
    for content in (found, *mutations.mutations(whole, mutations.budget(300), seed=13)):
        (tmp_path / "a.pt").write_bytes(content)
        try:
            assert load_pt(tmp_path / "a.pt").ndim >= 0
        except CacheError:
            n_refused += 1
    assert n_refused > 0.3 * mutations.budget(300)


# --- cells of a table ------------------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "＝1", "'=1", "''@x", '=HYPERLINK("x","y")']
PLAIN = ["tumor", "", "'", "'quoted'", "a=b", "1", "-1", "+1", "-1.5e-3", "007", "é", "x,y", 'q"q', "a\nb", "c\rd"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_written_as_text_and_read_back_as_it_was(text):
    cell = safe_cell(text)
    assert cell[0] == "'"
    assert plain_cell(cell) == text


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_and_numbers_stay_as_they_are(text):
    assert safe_cell(text) == text
    assert plain_cell(text) == text


def test_any_text_comes_back(tmp_path):
    import pandas as pd

    rng = np.random.default_rng(8)
    letters = list("=+-@'\t\"\n, a1é.;＋")
    texts = ["".join(rng.choice(letters, size=rng.integers(0, 6))) for _ in range(3_000)] + FORMULAS + PLAIN
    table = pd.DataFrame({"slide": texts, "n": np.arange(len(texts)) - 7, "p": rng.normal(size=len(texts))})
    write_csv(table, tmp_path / "t.csv")
    back = read_texts(tmp_path / "t.csv")
    assert back["slide"].tolist() == texts
    assert back["n"].astype(int).tolist() == table["n"].tolist(), "negative numbers are numbers"
    assert back["p"].astype(float).tolist() == table["p"].tolist()
    import csv

    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        cells = [row[0] for row in csv.reader(file)][1:]
    risky = [c for c in cells if c[:1] in tuple("=+-@\t\r\n") and c not in ("-1", "+1", "-1.5e-3")]
    assert all(c.lstrip("+-").replace(".", "").isdigit() for c in risky), "what begins so is a number"


def test_the_path_of_a_file_is_named_in_what_cannot_be_read(tmp_path: Path):
    for name, content in {"empty.csv": b"", "ragged.csv": b"a,b\n1,2\n3,4,5\n", "latin.csv": b"a,b\n\xe9,1\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProblemsError, match=name):
            read_texts(tmp_path / name)
