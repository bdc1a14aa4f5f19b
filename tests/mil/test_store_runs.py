"""Studies with features, cohort and run folder in an object store: as those of local folders, and resumed elsewhere."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest

import mil.heatmap
from extract.lock import LockError
from extract.stores import lease, looking
from mil.compare import main as compare
from mil.pipeline.fetching import features_of
from mil.predict import main as predict
from mil.train import main
from mil.training.module import MembersModule

pytestmark = pytest.mark.stores
SETTINGS = ["study.folds=2", "train.epochs=3", "train.batch_size=5", "train.lr=0.02", "train.accelerator=cpu"]
SETTINGS += ["model.name=mean", "report.bootstrap=0", "report.heatmaps=0", "train.members_per_pass=1"]
SETTINGS += ["report.baselines=false"]
ALIKE = ("predictions.csv", "members.safetensors", "plan.csv", "history.csv", "slides.csv", "metrics.json")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch, draw_only):
    draw_only(monkeypatch)


@pytest.fixture(scope="module")
def study(write_study, witness_arrays, draw_only, tmp_path_factory) -> tuple[Path, list[str], Path]:
    """The data, the arguments of a study of local folders, and its run folder."""
    folder = tmp_path_factory.mktemp("stores")
    arrays, labels_S = witness_arrays(16, seed=5)
    arguments = [*write_study(folder / "data", arrays, np.array(["a", "b"])[labels_S]), *SETTINGS]
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch)
        assert main([*arguments, f"out={folder / 'run'}"]) == 0
    return folder / "data", arguments, folder / "run"


@pytest.fixture
def in_store(s3, study) -> list[str]:
    """The data in s3://lab/data, and the arguments that name it."""
    data, arguments, _ = study
    for path in (path for path in data.rglob("*") if path.is_file()):
        s3.put_file(str(path), f"lab/data/{path.relative_to(data).as_posix()}")
    return [argument.replace(str(data), "s3://lab/data") for argument in arguments]


def another_machine(tmp_path: Path) -> None:
    """One that has no mirror yet."""
    shutil.rmtree(tmp_path / "mirrors")
    looking.forget()


def contents(s3, url: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{url}/"): s3.cat(name) for name in s3.find(url)}


def test_a_study_from_store_to_store_is_that_of_local_folders(s3, study, in_store, tmp_path, capfd):
    one = next(name for name in s3.find("lab/data") if "slide_00" in name)
    s3.copy(one, one.replace("slide_00", "stranger"))
    assert main([*in_store, "out=s3://lab/run"]) == 0
    said = "".join(capfd.readouterr())
    assert not list((tmp_path / "mirrors").rglob("stranger.*")), "features of no slide of the cohort are not fetched"
    found, local = contents(s3, "lab/run"), study[2]
    assert set(found) == {p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()} - {"paths.json"}
    for name in ALIKE:
        assert found[name] == (local / name).read_bytes(), name
    assert b"folder: s3://lab/data" in found["config.yaml"]
    assert "Report: s3://lab/run/report.html" in said
    for name, content in {**found, "terminal": said.encode()}.items():
        assert s3.never_written.encode() not in content, name
        assert str(tmp_path / "mirrors").encode() not in content, name
    assert s3.never_written not in "".join(p.read_text("latin-1") for p in tmp_path.rglob("*") if p.is_file())

    another_machine(tmp_path)
    assert main([*in_store, "out=s3://lab/run", "resume=true"]) == 0
    assert "already finished" in capfd.readouterr().out
    assert main([*in_store, "out=s3://lab/run"]) == 2
    assert "s3://lab/run: set out=OTHER, or resume=true" in capfd.readouterr().err
    assert contents(s3, "lab/run") == found


def test_features_are_told_by_names_as_people_write_them():
    wanted = features_of(["TCGA-05-4244-01Z-00-DX1.d4ff32cd", "s 007.svs"])
    for name in ("TCGA-05-4244-01Z-00-DX1.h5", "h5_files/s_7.h5", "S-07.pt", "s007/features.npy", "settings.json"):
        assert wanted(name), name
    assert not wanted("s008.h5")
    assert not wanted("deep/TCGA-05-4244-01Z-00-DX2.d4ff32cd.pt")


def test_a_killed_study_goes_on_from_its_checkpoint_on_another_machine(s3, study, in_store, tmp_path, monkeypatch):
    begin, begun = MembersModule.on_train_epoch_start, []

    def stop_in_the_second_pass(module: MembersModule) -> None:
        begun.append(module.current_epoch)
        if len(begun) == 6:
            raise KeyboardInterrupt
        begin(module)

    with monkeypatch.context() as patch:
        patch.setattr(MembersModule, "on_train_epoch_start", stop_in_the_second_pass)
        assert main([*in_store, "out=s3://lab/run"]) == 130
    assert {"checkpoints/pass0.pt", "config.yaml"} <= set(contents(s3, "lab/run"))
    another_machine(tmp_path)
    epochs = []
    monkeypatch.setattr(
        MembersModule, "on_train_epoch_start", lambda module: (epochs.append(module.current_epoch), begin(module))[1]
    )
    assert main([*in_store, "out=s3://lab/run", "resume=true"]) == 0
    assert epochs == [2]
    found = contents(s3, "lab/run")
    assert not [name for name in found if name.startswith("checkpoints")]
    for name in ALIKE:
        assert found[name] == (study[2] / name).read_bytes(), name


def test_a_run_in_a_store_predicts_is_compared_and_drawn(s3, study, in_store, tmp_path, capfd):
    _, arguments, run = study
    for path in (path for path in run.rglob("*") if path.is_file()):
        s3.put_file(str(path), f"lab/run/{path.relative_to(run).as_posix()}")
    features = next(argument for argument in in_store if argument.startswith("features.folder="))
    local = next(argument for argument in arguments if argument.startswith("features.folder="))
    assert predict([f"run={run}", local, f"out={tmp_path / 'local'}", "device=cpu"]) == 0
    assert predict(["run=s3://lab/run", features, "out=s3://lab/new", "device=cpu"]) == 0
    assert s3.cat("lab/new/predictions.csv") == (tmp_path / "local" / "predictions.csv").read_bytes()
    assert compare(["s3://lab/run", str(run), "out=s3://lab/compared"]) == 0
    assert s3.exists("lab/compared/comparison.csv")
    assert mil.heatmap.main(["run=s3://lab/run", "slide=slide_00", features, "out=s3://lab/maps", "device=cpu"]) == 0
    assert "s3://lab/maps/slide_00_attention.png" in capfd.readouterr().out
    assert s3.exists("lab/maps/slide_00_attention.png")


def test_of_two_machines_with_one_out_the_second_is_refused(s3, tmp_path, monkeypatch):
    with lease.leased("s3://lab/run"):
        assert s3.exists("lab/.run.lock")
        said = r"s3://lab/run: process \d+ on .* is writing there"
        with pytest.raises(LockError, match=said), lease.leased("s3://lab/run"):
            pass
        with lease.leased("s3://lab/other"):
            pass
    assert not s3.exists("lab/.run.lock")
    for holder in ({"host": "another", "beat": time.time() - 700}, {"host": socket.gethostname(), "pid": 2**22 + 1}):
        s3.pipe("lab/.run.lock", json.dumps(holder).encode())
        with lease.leased("s3://lab/run"):  # left by processes that are no more
            pass
    beats = []
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    with lease.leased("s3://lab/run"):
        for _ in range(2):
            beats.append(json.loads(s3.cat("lab/.run.lock"))["beat"])
            time.sleep(0.5)
    assert beats[0] < beats[1]


def test_a_store_that_may_only_be_read_says_so_before_anything_is_trained(s3, breaking, in_store, capfd):
    breaking.refused = True
    assert main([*in_store, "out=s3://lab/run"]) == 2
    said = capfd.readouterr().err
    assert "s3://lab/.run.lock: cannot be written: no permission (AccessDenied" in said
    assert said.count("s3://") == 1
    assert s3.find("lab/run") == []


def test_a_connection_that_breaks_while_a_run_is_written(s3, breaking, study, in_store, tmp_path, capfd):
    breaking.cuts, breaking.of = 1000, "predictions.csv"
    assert main([*in_store, "out=s3://lab/run"]) == 2
    assert capfd.readouterr().err.count("predictions.csv: the connection broke while it was written") == 1
    assert not s3.exists("lab/run/predictions.csv"), "whole or not there"
    breaking.cuts = 0
    another_machine(tmp_path)
    assert main([*in_store, "out=s3://lab/run", "resume=true"]) == 0
    for name in ALIKE:
        assert s3.cat(f"lab/run/{name}") == (study[2] / name).read_bytes(), name
