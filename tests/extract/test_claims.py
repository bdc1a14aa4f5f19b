from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from extract.extraction.claims import Claims, Owner, filesystem_now, read_owner, this_machine


def leave_claim(folder: Path, slide: str, *, pid: int, machine: str | None = None, age_s: float = 0.0) -> Path:
    """A claim as another process would have left it."""
    path = folder / f".{slide}.claim"
    path.write_text(
        json.dumps({"token": "left", "host": "elsewhere", "machine": machine or this_machine(), "pid": pid})
    )
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_exclusive_and_says_who_holds_it(tmp_path: Path):
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        assert ours.take("slide.a")
        assert not theirs.take("slide.a")
        assert theirs.take("slide.b")
        owner = read_owner(tmp_path / ".slide.a.claim")
        assert owner is not None
        assert (owner.host, owner.pid) == (socket.gethostname(), os.getpid())
        assert str(owner) == f"process {os.getpid()} on {socket.gethostname()}"
        ours.release("slide.a")
        assert theirs.take("slide.a")
    assert list(tmp_path.iterdir()) == []  # leaving releases, and no clock or takeover files stay behind


def test_claims_of_dead_processes_of_this_machine_are_taken_over_at_once(tmp_path: Path):
    leave_claim(tmp_path, "dead", pid=dead_pid())
    leave_claim(tmp_path, "alive", pid=os.getpid())
    leave_claim(tmp_path, "far", pid=dead_pid(), machine="another:1")
    with Claims(tmp_path) as claims:
        assert claims.take("dead")
        assert claims.holds("dead")
        assert not claims.take("alive")
        assert not claims.take("far")  # a pid says nothing about another machine


def test_claims_without_heartbeat_are_taken_over(tmp_path: Path):
    leave_claim(tmp_path, "fresh", pid=1, machine="another:1", age_s=50)
    leave_claim(tmp_path, "old", pid=1, machine="another:1", age_s=70)
    with Claims(tmp_path, stale_after_s=60) as claims:
        assert not claims.take("fresh")
        assert claims.take("old")


def test_claims_from_the_future_are_taken_over(tmp_path: Path):
    """The clock was set back; who is alive refreshes its claim."""
    leave_claim(tmp_path, "soon", pid=1, machine="another:1", age_s=-50)
    leave_claim(tmp_path, "future", pid=1, machine="another:1", age_s=-10_000)
    with Claims(tmp_path) as claims:
        assert not claims.take("soon")
        assert claims.take("future")


def test_a_claim_that_was_never_written_goes_stale(tmp_path: Path):
    path = tmp_path / ".slide.claim"
    path.touch()
    with Claims(tmp_path) as claims:
        assert not claims.take("slide")
        os.utime(path, (time.time() - 6,) * 2)
        assert claims.take("slide")


def test_the_heartbeat_refreshes_and_restores(tmp_path: Path):
    with Claims(tmp_path, heartbeat_s=0.02) as claims:
        claims.take("slide")
        path = claims.path("slide")
        os.utime(path, (0, 0))
        wait_until(lambda: path.exists() and path.stat().st_mtime > 0)
        path.unlink()  # renamed away by a process that misjudged it
        wait_until(lambda: claims.holds("slide"))


def test_a_lost_claim_is_noticed_and_left_alone(tmp_path: Path):
    with Claims(tmp_path, heartbeat_s=0.01) as claims:
        claims.take("slide")
        path = leave_claim(tmp_path, "slide", pid=1, machine="another:1", age_s=30)
        before = path.stat().st_mtime
        assert not claims.holds("slide")
        time.sleep(0.1)
        assert path.stat().st_mtime == before
    assert read_owner(path) == Owner("left", "elsewhere", "another:1", 1)


@pytest.mark.parametrize("links", [True, False])
def test_a_renamed_fresh_claim_is_never_held_by_two(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch):
    """The worst moment: B judges a claim stale; A takes it over; only then B renames - A's claim. B puts it back; where
    the file system has no hard links, nobody believes to hold it until the next try."""

    def no_links(*given: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    stale = leave_claim(tmp_path, "slide", pid=1, machine="another:1", age_s=999)
    with Claims(tmp_path) as a, Claims(tmp_path) as b:
        judged = read_owner(stale)
        assert judged is not None
        results: dict[str, bool] = {}
        thread = threading.Thread(target=lambda: results.update(a=a.take("slide")))
        thread.start()
        wait_until(lambda: (owner := read_owner(stale)) is not None and owner.token != "left")
        results["b"] = b._take_over("slide", judged)
        thread.join()
        assert results == {"a": links, "b": False}
        assert (links or a.take("slide")) != b.take("slide")
        assert a.holds("slide") == (not b.holds("slide"))


@pytest.mark.parametrize("stale", [False, True])
def test_exactly_one_of_many_processes_gets_each_slide(tmp_path: Path, stale: bool):
    slides = [f"s{i}" for i in range(10)]
    if stale:
        for slide in slides:
            leave_claim(tmp_path, slide, pid=1, machine="another:1", age_s=999)
    context = multiprocessing.get_context("fork")
    start, done, won = context.Barrier(4), context.Barrier(4), context.Queue()

    def compete() -> None:
        with Claims(tmp_path) as claims:
            start.wait()
            for _ in range(3):  # a slide that two snatched from each other is nobody's until the next try
                for slide in slides:
                    if not claims.holds(slide) and claims.take(slide):
                        won.put(slide)
            done.wait()  # nobody releases before all have tried

    processes = [context.Process(target=compete) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    taken = []
    while not won.empty():
        taken.append(won.get())
    assert sorted(taken) == slides


def test_the_clock_is_that_of_the_folder(tmp_path: Path):
    assert abs(filesystem_now(tmp_path) - time.time()) < 5


def wait_until(condition, timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
