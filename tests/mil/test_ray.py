"""Beyond one machine: what three nodes make, of which one is killed, is what one machine makes. And what is refused."""

from __future__ import annotations

import filecmp
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import extract.run
import mil.report.page
from mil.train import main

pytestmark = pytest.mark.ray
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
own_warnings = pytest.mark.filterwarnings("ignore::ResourceWarning:ray", "ignore:.*RAY_ACCEL_ENV.*:FutureWarning")

NETWORK = '''
import time

import torch


class Corners(torch.nn.Module):
    """Mean colours of a tile's quarters, which no batch changes."""

    def __init__(self, slow_s):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.slow_s = slow_s

    def forward(self, x_N3HW):
        time.sleep(self.slow_s)
        half = x_N3HW.shape[-1] // 2
        quarters = [x_N3HW[..., i : i + half, j : j + half].mean((2, 3)) for i in (0, half) for j in (0, half)]
        return torch.cat(quarters, 1) * self.scale


def corners(weights):
    return Corners(0.15), {"dim": 12, "tile_px": 64, "mean": (0, 0, 0), "std": (1, 1, 1)}
'''


@pytest.fixture(scope="module")
def ray_nodes(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(Path(__file__).with_name("ray_nodes.py"))


@pytest.fixture(scope="module")
def lab(script, tmp_path_factory) -> Iterator[Path]:
    """A folder with slides, one of them glass and one damaged, and a network of one's own, where Python finds it."""
    folder = tmp_path_factory.mktemp("lab")
    slides = script(Path(__file__).parents[1] / "extract" / "slides.py")
    (folder / "slides").mkdir()
    for number in range(7):
        slides.painted_slide(folder / "slides" / f"s{number}.tiff", 501 + 64 * number, 403, seed=number)
    slides.write_tiff(folder / "slides" / "glass.tiff", [slides.glass(500, 400)], mpp=0.5)
    (folder / "slides" / "bad.tiff").write_bytes(b"no slide")
    (folder / "ray_test_network.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)  # of the nodes that are started
        yield folder


@pytest.fixture(scope="module")
def nodes(ray_nodes: ModuleType, lab: Path) -> Iterator[Any]:
    with ray_nodes.three_nodes() as found:
        yield found


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(mil.report.page, "FIGURES", {})


def when(ready: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """`act` as soon as something is so, while the test goes on."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not ready() and time.monotonic() < until:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# --- extraction -------------------------------------------------------------------------------------------------------


@needs_ray
@own_warnings
def test_a_node_is_killed_in_the_middle_of_extraction(nodes, lab, tmp_path, capsys):
    given = [f"slides.folder={lab / 'slides'}", "encoder.name=ray_test_network:corners", "extract.batch_size=16"]
    local, far = tmp_path / "local", tmp_path / "far"
    assert extract.run.main([*given, f"out={local}", "extract.workers=0"]) == 1
    capsys.readouterr()
    nodes.refill()
    killer = when(lambda: len(list(far.glob("s*.h5"))) >= 2, nodes.kill)
    assert extract.run.main([*given, f"out={far}", "extract.workers=1", "run.on=ray"]) == 1, "as locally: one failed"
    killer.join()

    assert sorted(path.name for path in far.rglob("*")) == sorted(path.name for path in local.rglob("*"))
    names = [path.name for path in local.iterdir()]
    assert filecmp.cmpfiles(local, far, names, shallow=False) == (names, [], [])
    said = capsys.readouterr()
    assert "slides: 7 done, 0 already there, 1 empty, 1 failed" in said.out
    by_node = [line.split() for line in said.out.splitlines() if line.startswith("  node ")]
    assert sum(int(words[words.index("slides,") - 1]) for words in by_node) == 9, "each slide is some node's"
    assert "failed: bad (open)" in said.err
    assert extract.run.main([*given, f"out={far}", "run.on=ray"]) == 1, "the damaged one again, and nothing else"
    assert "0 done, 7 already there, 0 empty" in capsys.readouterr().out.replace("8 already", "7 already")


# --- training ---------------------------------------------------------------------------------------------------------


@needs_ray
@own_warnings
def test_a_node_is_killed_in_the_middle_of_training(nodes, write_study, witness_arrays, tmp_path, capsys):
    arrays, labels_S = witness_arrays(18, seed=5)
    given = [*write_study(tmp_path / "data", arrays, np.array(["a", "b"])[labels_S]), "study.folds=3"]
    given += ["model.name=[mean,abmil]", "train.epochs=40", "train.batch_size=5", "train.accelerator=cpu"]
    given += ["train.members_per_pass=1", "report.bootstrap=0", "report.heatmaps=0", "study.nested=2"]
    local, far = tmp_path / "local", tmp_path / "far"
    assert main([*given, f"out={local}"]) == 0
    nodes.refill()
    begun = [far / "mean" / "inner" / "checkpoints" / f"pass{i}" / "last.ckpt" for i in range(3)]
    killer = when(lambda: any(path.exists() for path in begun) and nodes.busy(0, "one_pass"), nodes.kill)
    assert main([*given, f"out={far}", "run.on=ray"]) == 0
    killer.join()
    for name in ("mean", "abmil"):
        for file in ("predictions.csv", "plan.csv", "history.csv", "choices.csv", "inner/history.csv"):
            assert (far / name / file).read_bytes() == (local / name / file).read_bytes(), (name, file)
        assert (far / name / "members.safetensors").read_bytes() == (local / name / "members.safetensors").read_bytes()
    assert not list(far.rglob("checkpoints"))
    assert not list(far.rglob("*.partial"))
    assert not list(far.rglob("*.probe"))
    assert "ray: 3 nodes, 3 workers (1 CPU each)" in capsys.readouterr().out
    assert main([*given, f"out={far}", "resume=true"]) == 0, "where it ran does not matter to who goes on"
    assert "already finished" in capsys.readouterr().out
    assert main([*given, f"out={tmp_path / 'none'}", "run.on=ray", "run.members_per_task=2", "plan=true"]) == 0
    assert "of at most 2 members on 3 workers" in capsys.readouterr().out
