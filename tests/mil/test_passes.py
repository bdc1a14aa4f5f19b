"""Passes of members: halved where memory does not hold them, and shared out over processes, one a device."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mil.pipeline.training as pipeline
from extract.config import ConfigError, ProblemsError
from extract.whole import write_whole
from mil.config import StudyConfig, Train
from mil.pipeline.passes import (
    Hands,
    LostProcessError,
    Most,
    Shared,
    joined_results,
    n_devices,
    run_passes,
    train_in_halves,
)
from mil.train import main
from mil.training.measuring import Meter
from mil.training.module import MembersModule

pytestmark = pytest.mark.usefixtures("no_figures")


@dataclass(frozen=True)
class Toy:
    """What a study must have for its passes to be shared out."""

    config: Any
    bags: dict[str, torch.Tensor]
    once: dict[str, Any] = field(default_factory=dict)

    def check_place(self) -> None:
        """It is there."""


def toy(devices: int) -> Any:
    return Toy(SimpleNamespace(train=Train(devices=devices, accelerator="cpu")), {"x": torch.arange(3.0)})


def doubled(study: Any, name: str, folder: Path, index: int, members: np.ndarray, inner: bool, hands: Hands) -> Any:
    """A pass: writes a file of its own number, with the process that computed it inside."""
    hands.write(folder / f"pass{index}.txt", f"{name} {os.getpid()}".encode())
    hands.write(folder / "gone.txt", b"")
    hands.remove(folder / "gone.txt")
    hands.curves(folder / "logs" if index == 0 else None, {1: {"step": 1.0}}, study.check_place)
    return {"members": (2 * members).tolist(), "sum": study.bags["x"].sum() + index, "inner": inner}


def killed(study: Any, name: str, folder: Path, index: int, members: np.ndarray, inner: bool, hands: Hands) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


PARTS = [np.array([0, 1]), np.array([2]), np.array([3, 4])]


@pytest.mark.parametrize("devices", [1, 2])
def test_passes_come_back_in_their_order_and_one_process_writes(tmp_path, devices):
    found = run_passes(doubled, toy(devices), "abmil", tmp_path, PARTS, inner=True)
    assert [result["members"] for result in found] == [[0, 2], [4], [6, 8]]
    assert [float(result["sum"]) for result in found] == [3, 4, 5]
    assert all(result["inner"] for result in found)
    said = [(tmp_path / f"pass{i}.txt").read_text().split() for i in range(3)]
    assert {name for name, _ in said} == {"abmil"}
    assert (str(os.getpid()) in {process for _, process in said}) == (devices == 1)
    assert not (tmp_path / "gone.txt").exists()
    assert (tmp_path / "logs" / "metrics.csv").read_text().splitlines() == ["step", "1.0"]


def test_a_killed_process_is_told(tmp_path):
    with pytest.raises(LostProcessError, match=r"signal 9, SIGKILL.* while it trained pass [01].*resume=true"):
        run_passes(killed, toy(2), "abmil", tmp_path, PARTS)


def test_an_error_in_a_process_is_raised_where_the_study_runs():
    ours, theirs = multiprocessing.Pipe()
    theirs.send(("failed", ProblemsError("stopped", ["pass 1"]), "where"))
    shared = object.__new__(Shared)
    with pytest.raises(ProblemsError, match="pass 1"):
        shared.receive(0, ours)


QUICK = ["train.accelerator=cpu", "report.bootstrap=0", "report.baselines=false", "train.members_per_pass=3"]
QUICK += ["report.heatmaps=0"]


@pytest.fixture(scope="module")
def on_one(studies, tmp_path_factory) -> tuple[Path, list[str]]:
    """A study of two passes on one device, and its arguments."""
    folder, arguments = tmp_path_factory.mktemp("passes") / "one", [*studies("abmil").arguments, *QUICK]
    assert main([*arguments, f"out={folder}"]) == 0
    return folder, arguments


def same_study(folder: Path, expected: Path) -> None:
    for name in ("predictions.csv", "history.csv", "plan.csv", "members.safetensors"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    logs = [{p.relative_to(f): p.read_bytes() for p in f.rglob("metrics.csv")} for f in (folder, expected)]
    assert logs[0] == logs[1] != {}


def test_a_study_on_two_devices_is_that_on_one_to_the_last_digit_though_a_process_was_killed(
    on_one, tmp_path, monkeypatch, capsys
):
    """Killed after three of eight checkpoints; what the other process sent before it was ended is kept too."""
    written: list[Path] = []

    def write_and_kill(path: Path, content: bytes) -> None:
        write_whole(path, content)
        written.append(path)
        if [one.name for one in written].count("last.ckpt") == 3 and path.name == "last.ckpt":
            os.kill(next(p.pid for p in multiprocessing.active_children() if p.pid), signal.SIGKILL)

    arguments = [*on_one[1], "train.devices=2", f"out={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr("mil.pipeline.passes.write_whole", write_and_kill)
        assert main(arguments) != 0
    said = capsys.readouterr().err
    assert "signal 9, SIGKILL" in said
    assert "resume=true goes on" in said
    assert not (tmp_path / "run" / "predictions.csv").exists()
    assert main([*arguments, "resume=true"]) == 0
    same_study(tmp_path / "run", on_one[0])


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert n_devices(Train(devices="auto")) == 2
    assert n_devices(Train(devices="auto", accelerator="cpu")) == 1
    with pytest.raises(ConfigError, match="not so many devices"):
        n_devices(Train(devices=3))


def holds(most: int, tried: list[int]) -> Callable[[np.ndarray, str], dict[str, Any]]:
    """Trains at most so many members."""

    def train(members: np.ndarray, part: str) -> dict[str, Any]:
        tried.append(len(members))
        if len(members) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        rows = [{"epoch": epoch, "member": m} for epoch in (1, 2) for m in members.tolist()]
        return {"history": rows, "state": {"w": torch.from_numpy(members)}, "diverged": members.tolist()}

    return train


def test_what_memory_does_not_hold_is_halved_and_that_is_said_once(capsys):
    most, tried, members = Most(), [], np.arange(7)
    expected = holds(7, [])(members, "")
    found = train_in_halves(holds(2, tried), members, most)
    assert (found["history"], found["diverged"]) == (expected["history"], expected["diverged"])
    assert torch.equal(found["state"]["w"], expected["state"]["w"])
    assert (most.members, tried[:2]) == (1, [7, 3])
    tried.clear()
    train_in_halves(holds(2, tried), members, most)
    assert max(tried) <= 2, "the next pass does not try again"
    said = capsys.readouterr().err
    assert said.count("memory does not hold 7 members in one pass; going on with 3 at a time") == 1
    assert said.count("note:") == 1
    with pytest.raises(torch.OutOfMemoryError):
        train_in_halves(holds(0, []), members[:1], Most())
    assert joined_results([expected])["diverged"] == expected["diverged"]


def test_a_study_whose_passes_were_halved_is_the_study(studies, run_study, tmp_path, monkeypatch, capsys):
    study, begin = studies("abmil"), MembersModule.on_train_start

    def too_much(module: MembersModule) -> None:
        if len(module.members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        begin(module)

    monkeypatch.setattr(MembersModule, "on_train_start", too_much)
    run_study([*study.arguments, f"out={tmp_path / 'run'}"])
    assert "memory does not hold" in capsys.readouterr().err
    expected, found = (
        np.genfromtxt(f / "predictions.csv", delimiter=",", names=True, dtype=None, encoding=None)
        for f in (study.folder, tmp_path / "run")
    )
    assert list(expected["slide"]) == list(found["slide"])
    for column in (name for name in expected.dtype.names if expected.dtype[name].kind == "f"):
        np.testing.assert_allclose(found[column], expected[column], atol=1e-5)


def test_members_that_fit_are_measured(monkeypatch):
    """A device on which members take 10 bytes each, beside 5 of the batch."""
    config = StudyConfig.model_validate({"cohort": "x.csv"})
    bags = SimpleNamespace(lengths_S=np.array([3, 9, 5]), on_device="no", elsewhere={})
    study: Any = SimpleNamespace(config=config, plan=range(20), bags=bags)
    monkeypatch.setattr(pipeline, "new_module", lambda study, name, members: members)
    monkeypatch.setattr(pipeline, "device_features", lambda bags, device: "there")
    for free, expected in ((100, 8), (10**6, 20), (1, 1)):
        meter = Meter(lambda: None, lambda: 0, lambda free=free: free)
        monkeypatch.setattr(pipeline, "peak_of_a_step", lambda module, *_: 5 + 10 * len(module))
        assert pipeline.measured_members(study, "abmil", torch.device("cpu"), meter) == expected
    monkeypatch.setattr(pipeline, "peak_of_a_step", lambda module, *_: holds(0, [])(np.arange(len(module)), ""))
    assert pipeline.measured_members(study, "abmil", torch.device("cpu"), meter) == 1
