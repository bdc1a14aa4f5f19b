"""kill -9 in the midst of a command: what it left is whole, and the same command ends as if nothing had happened.

A few of the runs of benchmarks/kills.py, whose processes are forked from this one.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from extract.leftovers import PARTIAL, is_unused, partial_of, remove_aside, remove_partials_of_the_dead

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


@pytest.fixture(scope="module")
def kills(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(SCRIPT)


def test_killed_commands_go_on_and_leave_what_uninterrupted_ones_leave():
    """In a process of its own, which has no threads when it forks."""
    call = [sys.executable, str(SCRIPT), "--runs=1", "--seed=0", "--only=passes,predict,extract,parquet"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.endswith(" 0 |")]
    assert len(rows) == 4
    for _, runs, n_kills, _, equal, half, tracebacks in rows:
        assert int(n_kills) == 2
        assert (runs, equal, half, tracebacks) == ("1", "1", "0", "0 |")


def test_a_half_file_is_told_from_a_whole_one(kills, draw_only, tmp_path, monkeypatch):
    """The check itself: of files cut in the middle none passes."""
    draw_only(monkeypatch, "roc")
    command = kills.two_passes(tmp_path)
    out = tmp_path / "out"
    assert command.main([*command.arguments, f"out={out}"]) == 0
    assert kills.half_files(out) == []
    shutil.copy(tmp_path / "study" / "s00.h5", out)
    for path in [path for path in out.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2].rstrip(b"\n"))
        assert kills.half_files(out) == [path]
        path.write_bytes(whole)


def test_only_what_the_dead_left_is_removed_where_others_may_write(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    mine = partial_of(tmp_path / "a.h5")
    theirs = mine.with_name(mine.name.replace(f".{mine.suffixes[-2][1:]}.", f".{ended.pid}."))
    elsewhere = tmp_path / f".a.h5.another-host.{ended.pid}.partial"
    for path in (mine, theirs, elsewhere):
        path.touch()
    remove_partials_of_the_dead(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, elsewhere.name}


def test_a_folder_with_nothing_but_half_files_is_unused(tmp_path):
    out = tmp_path / "run"
    assert is_unused(out)
    out.mkdir()
    partial_of(out / "config.yaml").touch()
    assert PARTIAL.fullmatch(partial_of(out / "config.yaml").name)
    assert is_unused(out)
    (out / ".hidden").touch()
    assert not is_unused(out)


def test_what_was_put_aside_goes_and_nothing_of_a_similar_name(tmp_path):
    for name in (".run.17.removed", ".run.x.removed", ".run2.17.removed", "run.17.removed"):
        (tmp_path / name).mkdir()
    remove_aside(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.x.removed", ".run2.17.removed", "run.17.removed"]
