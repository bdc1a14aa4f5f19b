"""Folders that belong to another command: what is refused, and which sub-folders are not."""

import json
import os
from pathlib import Path

import pytest

from extract.config import ProblemsError
from extract.features.cache import Provenance, write_features
from extract.features.parquet import import_parquet
from extract.lock import LockError, only_command_in
from extract.owners import OwnerError, maker_of, refuse_anothers, refuse_removing
from extract.quickstart import make_quickstart

COMMANDS = ("mil.train", "extract.finetune", "mil.predict", "mil.heatmap", "mil.lesions", "mil.compare", "extract.run")


def files(folder: Path, *names: str, text: str = "x\n") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def study(folder: Path, *, finished: bool = True) -> Path:
    """As mil.train leaves one, and a learning curve in it."""
    files(folder, "config.yaml", "plan.csv", "learning_curve/plan.csv", "nested_x/choices.csv", "logs/pass0.csv")
    if finished:
        listed = {"files": {"plan.csv": "0" * 64, "nested_x/choices.csv": "0" * 64}, "without_times": {}}
        files(folder, "hashes.json", text=json.dumps(listed))
    return folder


def made(folder: Path, command: str) -> Path:
    if command == "mil.predict":
        return files(folder, "predict.yaml", "environment.json", "predictions.csv")
    if command == "extract.finetune":
        return files(folder, "config.yaml", "head.safetensors", "split.csv")
    return study(folder)


@pytest.mark.parametrize("maker", ["mil.train", "extract.finetune", "mil.predict"])
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_written_over_what_another_command_made(tmp_path, maker, command):
    folder = made(tmp_path / "a", maker)
    assert maker_of(folder) == maker
    if command == maker:
        assert refuse_anothers(folder, command) is None, "which is its own affair"
        return
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link", tmp_path / "a" / ".." / "a"):
        with (
            pytest.raises(OwnerError, match=f"is a folder of {maker}, whose files must stay as they are"),
            only_command_in(out, command),
        ):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"], "no lock either"


@pytest.mark.parametrize("maker", ["mil.train", "extract.finetune", "mil.predict"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_sub_folder_of_its_own_is_allowed_to_all_but_studies(tmp_path, maker, command):
    folder = made(tmp_path / "a", maker)
    for out in (folder / "mine", folder / "mine" / "deeper"):
        if command in ("mil.train", "extract.finetune"):
            with pytest.raises(OwnerError, match=f"lies in {folder}, a folder of {maker}; a study has a folder"):
                refuse_anothers(out, command)
        else:
            assert refuse_anothers(out, command) == folder
    assert refuse_anothers(tmp_path / "beside", command) is None


@pytest.mark.parametrize("inside", ["figures", "logs/x", "learning_curve", "nested_x/mine", "inner", "plan.csv"])
def test_sub_folders_that_a_run_uses_are_its_own(tmp_path, inside):
    folder = study(tmp_path / "a")
    with pytest.raises(OwnerError, match=r"belongs to .*, a folder of mil.train, and must stay as it is") as caught:
        refuse_anothers(folder / inside, "mil.heatmap")
    assert f"or a sub-folder that is new: {folder / 'heatmaps'}" in caught.value.problems[0]


def test_nothing_is_put_into_a_run_that_is_still_to_be_sealed(tmp_path):
    """What is there when hashes.json is written is listed as the run's."""
    folder = study(tmp_path / "a", finished=False)
    with pytest.raises(OwnerError, match=r"training has not finished; wait for it. Set out=OTHER, which is in no such"):
        refuse_anothers(folder / "heatmaps", "mil.heatmap")
    files(folder, "metrics.json")  # of a version without hashes.json
    assert refuse_anothers(folder / "heatmaps", "mil.heatmap") == folder
    files(folder, "checkpoints/last.ckpt")
    with pytest.raises(OwnerError, match="has not finished"):
        refuse_anothers(folder / "heatmaps", "mil.heatmap")


def test_a_study_of_several_aggregators_is_one_with_its_parts(tmp_path):
    folder = tmp_path / "several"
    parts = [study(folder / name) for name in ("mean", "abmil")]
    assert maker_of(folder) == "", "two runs in a folder are no study"
    files(folder, "config.yaml")
    assert maker_of(folder) == "mil.train"
    assert refuse_anothers(folder, "mil.train") is None
    assert refuse_anothers(folder / "comparison", "mil.compare") == folder, "where it writes by default"
    assert refuse_anothers(parts[0] / "heatmaps", "mil.heatmap") == parts[0]
    with pytest.raises(OwnerError, match="is one aggregator's or target's part of a study"):
        refuse_anothers(parts[0], "mil.train")
    with pytest.raises(OwnerError, match="a study has a folder that is no other's"):
        refuse_anothers(folder / "third", "mil.train")
    (parts[1] / "hashes.json").unlink()
    with pytest.raises(OwnerError, match="training has not finished"):
        refuse_anothers(folder / "comparison", "mil.compare")


def test_a_config_of_ones_own_makes_no_run_folder(tmp_path):
    """`python -m mil.train config=config.yaml` in a project's folder, whose runs are below it."""
    files(tmp_path, "config.yaml", "predict.yaml", "plan/notes.txt", text="model:\n  name: mean\n")
    study(tmp_path / "runs" / "one")
    for command in COMMANDS:
        assert refuse_anothers(tmp_path / "runs" / "two", command) is None


def test_a_file_in_a_run_folder_is_none_of_the_selftests(tmp_path):
    folder = study(tmp_path / "a")
    for out in (folder / "selftest.md", folder / "plan.csv"):
        with pytest.raises(OwnerError, match=r"is a folder of mil\.train"):
            refuse_anothers(out, "mil.selftest")
    assert refuse_anothers(tmp_path / "selftest.md", "mil.selftest") is None


def test_a_run_is_held_while_something_is_written_into_a_sub_folder(tmp_path):
    """It could be replaced, or what is half written in it be tidied away; two others do not disturb each other."""
    folder = study(tmp_path / "a")
    with only_command_in(folder / "heatmaps", "mil.heatmap"):
        with only_command_in(folder / "more", "mil.heatmap"), only_command_in(folder / "lesions", "mil.lesions"):
            pass
        with pytest.raises(LockError, match="is writing there"), only_command_in(folder, "mil.train"):
            pass
    with only_command_in(folder, "mil.train"), pytest.raises(LockError, match=r"mil\.train"):
        only_command_in(folder / "heatmaps", "mil.heatmap").__enter__()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".lock")]


def test_overwrite_removes_nothing_that_others_made(tmp_path):
    folder = tmp_path / "several"
    for name in ("mean", "abmil"):
        files(study(folder / name), "heatmaps/s1_attention.png")
    files(folder, "config.yaml")
    refuse_removing(folder)
    made(folder / "mean" / "predictions", "mil.predict")
    made(folder / "other", "extract.finetune")
    write_features(folder / "features" / "s.h5", [[1.0]], [[0, 0]], Provenance("x"))
    with pytest.raises(OwnerError) as caught:
        refuse_removing(folder)
    assert [os.path.relpath(problem.partition(":")[0], folder) for problem in caught.value.problems] == [
        "features",
        "mean/predictions",
        "other",
    ]
    assert "made by mil.predict; move it elsewhere, or set out=OTHER" in caught.value.problems[1]


def test_features_are_not_put_into_a_run_either(tmp_path):
    """Of the quickstart and of imports, whose folder is no `out`."""
    folder = study(tmp_path / "a")
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(OwnerError, match=r"is a folder of mil\.train"):
        make_quickstart(folder)
    with pytest.raises(OwnerError, match=r"is a folder of mil\.train"):
        import_parquet(folder, root=tmp_path)
    assert sorted(path for path in folder.rglob("*")) == before


@pytest.mark.parametrize("text", ["slide,label\nmine,tumor\n", "slide\n\xff\n"])
def test_a_cohort_that_somebody_wrote_is_not_written_over(tmp_path, text):
    (tmp_path / "cohort.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ProblemsError, match=r"cohort\.csv: (is of other slides, such as 'mine'|cannot be read)"):
        make_quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cohort.csv"]
