"""The last word of a command that cannot say it itself, in processes that end as a library or the system ends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from extract import sudden

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import os, signal, sys, time
sys.modules["__main__"].__spec__ = type("Spec", (), {"name": "mil.train"})()
from extract.ending import ended

def work():
    WORK
    return 3

sys.exit(ended(work, interrupted=lambda: "Interrupted.", after=lambda: ""))
"""


def ran(work: str, before: str = "") -> tuple[int, str]:
    """Exit code, and what it and the shell beside it said on stderr."""
    code = before + COMMAND.replace("WORK", work)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("work", "exit_code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),  # as the system does when memory is used up
        ("os.abort()", -6),  # as C++ and Rust do where an allocation fails
        ("os._exit(1)", 1),  # as OpenBLAS does
    ],
)
def test_a_sudden_end_is_told_once(work, exit_code):
    code, said = ran(work)
    assert code == exit_code
    assert said.count("Ended suddenly, by a signal or within a library: most often memory was used up") == 1
    assert "resume=true" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("work", "exit_code", "words"),
    [
        ("pass", 3, ""),
        ("raise MemoryError", 2, "there is not enough memory for this"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 130, "Interrupted."),
        # a terminal's Ctrl-C, which goes to the shell as well
        ("os.kill(0, signal.SIGINT); time.sleep(60)", 130, "Interrupted."),
    ],
)
def test_nothing_is_added_where_the_command_has_the_last_word(work, exit_code, words):
    heard = "import os, signal; os.setsid(); signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    before = heard if "kill(0" in work else ""  # a suite in the background ignores Ctrl-C, and its processes with it
    code, said = ran(work, before)
    assert (code, words in said) == (exit_code, True)
    assert "Ended suddenly" not in said


def test_limits_and_the_systems_own_count_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sudden, "left_by_limits", lambda: {"ulimit -v": 812_000_000})
    assert "memory was used up (ulimit -v left 812 MB at the start)" in sudden.sentence()
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 4\noom_kill 4\n")
    monkeypatch.setattr(sudden, "kills_of_group", lambda: events)
    assert sudden.kills() == ("4", str(events))
    for before, told in (("4", False), ("3", True)):
        arguments = ["sh", "-c", sudden.SCRIPT, "sh", "SENTENCE", before, str(events)]
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        assert done.stderr.endswith("SENTENCE\n")
        assert ("this control group because its memory was used up" in done.stderr) == told


def test_without_a_shell_and_in_others_processes_the_command_runs_as_ever(monkeypatch):
    assert not sudden.is_own_process(), "pytest's process is pytest's"
    monkeypatch.setattr(sudden, "is_own_process", lambda: True)
    monkeypatch.setenv("PATH", "/nowhere")
    with sudden.sudden_end_is_told():
        pass
