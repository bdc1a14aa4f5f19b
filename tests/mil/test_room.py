"""Limits of memory, seen before work begins: control groups from files made here, `ulimit -v` in a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from extract import room
from extract.config import ConfigError
from extract.lock import LockError, only_command_in
from mil.prediction import study as prediction
from mil.prediction.config import PredictConfig
from mil.prediction.study import default_out, predict_study

ROOT = Path(__file__).resolve().parents[2]
MB = 2**20


def group(folder: Path, limit: str, used: int, **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


def test_the_tightest_group_around_a_process_counts_without_pages_that_can_be_dropped(tmp_path):
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/job/step\n")
    group(root / "job", "max", 7 * MB)
    group(root / "job" / "step", "max", 7 * MB)
    assert room.left_by_groups(root, groups) == {}
    group(root / "job" / "step", str(900 * MB), 300 * MB)
    group(root / "job", str(1000 * MB), 800 * MB, anon=1, inactive_file=150 * MB)
    group(root / "other", str(1 * MB), 1 * MB)
    (name, left), *rest = room.left_by_groups(root, groups).items()
    assert (left, rest) == (350 * MB, [])
    assert "control group" in name
    assert room.left_by_groups(root, tmp_path / "none") == {}


def test_groups_of_version_1_are_read_too(tmp_path):
    groups, folder = tmp_path / "cgroup", tmp_path / "fs" / "memory" / "a"
    groups.write_text("5:cpu,cpuacct:/b\n4:memory:/a\n1:name=systemd:/c\n")
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    (folder / "memory.usage_in_bytes").write_text(str(30 * MB))
    assert room.left_by_groups(tmp_path / "fs", groups) == {}, "so it says that there is none"
    (folder / "memory.limit_in_bytes").write_text(str(100 * MB))
    assert list(room.left_by_groups(tmp_path / "fs", groups).values()) == [70 * MB]


def test_what_does_not_fit_is_refused_and_what_fits_is_chosen(monkeypatch):
    monkeypatch.setattr(room, "left_by_limits", lambda: {"ulimit -v": room.WORKING_BYTES + 10 * MB})
    room.refuse_without_room(9 * MB, "training", "raise it")
    assert room.free_bytes() <= room.WORKING_BYTES + 10 * MB
    with pytest.raises(ConfigError, match=r"ulimit -v leaves 430 MB, and training needs about 431 MB; raise it"):
        room.refuse_without_room(11 * MB, "training", "raise it")


TRAIN = """
import resource, sys
import psutil
import mil.api.study, mil.train

left = psutil.Process().memory_info().vms + 60_000_000
resource.setrlimit(resource.RLIMIT_AS, (left, left))
sys.exit(mil.train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_AS")
def test_training_under_a_small_ulimit_ends_with_a_message_and_no_folder(tmp_path, write_study):
    """60 MB: OpenBLAS would wait for a minute and then end the process with words of its own."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(5, 4)).astype(np.float32) for _ in range(8)]
    arguments = write_study(tmp_path, arrays, list("abababab"))
    call = [sys.executable, "-c", TRAIN, *arguments, "study.folds=2", "train.epochs=1", f"out={tmp_path / 'run'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "not enough memory" in done.stderr
    assert "ulimit -v leaves" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "expected"), [("mean", "run"), ("[mean,max]", "study/run")])
def test_a_prediction_without_out_takes_its_lock_before_the_run_is_opened(tmp_path, monkeypatch, name, expected):
    run = tmp_path / "study" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"model:\n  name: {name}\n")
    monkeypatch.chdir(tmp_path)
    assert default_out(run) == Path("predictions") / expected
    monkeypatch.setattr(prediction, "open_run", lambda *_, **__: pytest.fail("it was opened"))
    with only_command_in(default_out(run), "another command"), pytest.raises(LockError, match="another command"):
        predict_study(PredictConfig(run=run))
