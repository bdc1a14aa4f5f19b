"""A dry run of parts of benchmarks/gpu.py and benchmarks/precision.py on the CPU, at a size where it takes seconds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_script", BENCHMARKS / "gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_script", module)
    spec.loader.exec_module(module)
    return module


def test_parts_print_tables_without_a_gpu(script, capsys, monkeypatch):
    run = script.Run(torch.device("cpu"), small=True)
    monkeypatch.setattr(script, "AGGREGATORS", {"abmil": "", "mean": ""})
    script.PARTS["machine"](run)
    script.PARTS["right"](run)
    script.PARTS["precision"](run)
    said = capsys.readouterr().out
    assert "these numbers mean nothing" in said
    for name in ("abmil", "mean"):
        logits, gradients = re.search(rf"\| {name} \| ([\d.e+-]+) \| ([\d.e+-]+) \| yes \|", said).groups()
        assert float(logits) < 1e-5 > float(gradients)
    assert re.search(r"\| abmil \| bf16-mixed \| [\d.]+, [\d.]+ \| [\d.]+, [\d.]+ \|", said)


def test_every_part_of_the_shell_script_is_one_of_the_python_script(script):
    text = (BENCHMARKS / "gpu.sh").read_text()
    limits = {name: int(seconds) for seconds, name in re.findall(r"^part (\d+) (\w+)$", text, re.M)}
    assert limits.keys() == script.PARTS.keys()
    assert sum(limits.values()) + int(re.search(r"TESTS_S:-(\d+)", text)[1]) <= 8 * 60


def test_what_fails_is_a_row_and_the_others_go_on(script, capsys):
    with script.tried("abmil"):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")
    assert capsys.readouterr().out == "| abmil | **OutOfMemoryError**: CUDA out of memory |\n"


def test_an_epoch_is_timed_and_a_step_counted(script):
    run = script.Run(torch.device("cpu"), small=True)
    bags, labels = script.made(run)
    members = script.members_of(4, len(bags), nested=True)
    assert script.Epochs(run, script.module_of(run, "mean", bags, labels, members, 2, "32-true")).median > 0
    flops, launches, _ = script.first_step(run, script.module_of(run, "mean", bags, labels, members, 1, "32-true"))
    assert flops >= 0
    assert launches > 20
    assert bags.elsewhere, "the path of a GPU was not taken"
