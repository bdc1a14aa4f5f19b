"""Several devices of one machine share the slides out, and outlive one of them."""

from __future__ import annotations

import filecmp
import os
import threading
import time
from pathlib import Path

import psutil
import torch

from extract.config import ExtractConfig
from extract.extraction.anywhere import extract_anywhere
from extract.extraction.devices import devices_of, merge
from extract.extraction.readers import Failure
from extract.extraction.summary import Summary
from extract.extraction.todo import cohort_slides

NETWORK = """
import time

import torch


class Mean(torch.nn.Module):
    def forward(self, x_N3HW):
        time.sleep(0.05)
        return x_N3HW.mean((2, 3))


def mean(weights):
    return Mean(), {"dim": 3, "tile_px": 64, "mean": (0, 0, 0), "std": (1, 1, 1)}
"""


def test_two_devices_make_what_one_makes_and_outlive_one_of_them(slides, tmp_path, monkeypatch):
    (tmp_path / "slides").mkdir()
    for number in range(6):
        slides.painted_slide(tmp_path / "slides" / f"s{number}.tiff", 501 + 64 * number, 403, seed=number)
    (tmp_path / "devices_test_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)

    def extracted(out: str, **run: object) -> Summary:
        tree = {"slides": {"folder": tmp_path / "slides"}, "features": {"folder": tmp_path / out}, "run": run}
        tree |= {"encoder": {"name": "devices_test_network:mean"}, "extract": {"workers": 0, "batch_size": 16}}
        config = ExtractConfig.model_validate(tree)
        return extract_anywhere(config, cohort_slides(config), progress=False)

    one = extracted("one")
    killer = threading.Thread(target=kill_a_child_when, args=(tmp_path / "two",))
    killer.start()
    two = extracted("two", devices=["cpu", "cpu"])
    killer.join()
    assert sorted(two.done + two.already_there) == sorted(one.done) == [f"s{i}" for i in range(6)]
    assert not two.failed
    assert not two.elsewhere
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()), "nothing half is left, and no claim"
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names


def kill_a_child_when(folder: Path) -> None:
    """kill -9, as soon as a feature file is there."""
    until = time.monotonic() + 60
    while not any(folder.glob("*.h5")) and time.monotonic() < until:
        time.sleep(0.01)
    devices = [child for child in psutil.Process(os.getpid()).children() if "spawn_main" in " ".join(child.cmdline())]
    devices[0].kill()


def test_which_devices(monkeypatch):
    def of(**tree: dict[str, object]) -> list[str]:
        return devices_of(ExtractConfig.model_validate(tree))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert of() == ["cuda:0", "cuda:1"]
    assert of(encoder={"device": "cuda:1"}) == ["cuda:1"], "who names one has one"
    assert of(run={"devices": ["cuda:1", "cpu"]}) == ["cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert of() == ["auto"]


def test_what_several_did_is_counted_once():
    both = Summary(already_there=["a"])
    bad = Failure("x", "open", "why")
    merge(both, [Summary(["b"], ["c"], {}, [bad], tiles=3), Summary(["c"], ["b"], {"d": "glass"}, [bad], tiles=4)])
    assert (both.done, both.already_there, both.empty, both.failed, both.tiles) == (
        ["b", "c"],
        ["a"],
        {"d": "glass"},
        [bad],
        7,
    )
