"""Extract, kill, resume, delete, add, damage, train, predict in any order, and what must hold after each step.

A seeded state machine of hypothesis: few short histories here; MACHINE_STEPS=100 MACHINE_EXAMPLES=5 in the environment
are five of a hundred steps each, MACHINE_SEED=N other ones. Slides are tiny, the network has random weights, members
are mean pooling.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scipy.special import expit

import extract.run
import mil.predict
import mil.train
from extract.features.cache import read_features
from mil.results.trained import open_run, score_slide

STEPS = int(os.environ.get("MACHINE_STEPS", "15"))
EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "3"))
SEED = int(os.environ.get("MACHINE_SEED", "0"))

LABELS = "abbabaab"
"""Of slides s0, s1, ...: the cohort is the first few of them, two of each class at least."""
FEWEST = 4
ENCODER = ["encoder.name=timm:test_vit3", "encoder.random_weights=true", "encoder.device=cpu"]
EXTRACT = [*ENCODER, "extract.workers=0", "extract.batch_size=1"]
TRAIN = ["study.folds=2", "train.epochs=2", "train.batch_size=2", "train.accelerator=cpu", "model.name=mean"]
TRAIN += ["report.baselines=false"]
QUICK = ["report.bootstrap=0"]
READ_BACK = ("members.safetensors", "predictions.csv", "plan.csv", "roles.csv", "metrics.json", "hashes.json")
COMMANDS: dict[str, ModuleType] = {"extract.run": extract.run, "mil.train": mil.train, "mil.predict": mil.predict}

Snapshot = dict[str, tuple[int, bytes]]

ENDED: Counter[str] = Counter()
"""How the machine's commands ended: "mil.train 0", "killed mil.train -9", ..."""


@cache
def pool() -> Path:
    """All slides, painted once, and their features, extracted undisturbed."""
    folder = Path(tempfile.mkdtemp(prefix="pool"))
    spec = importlib.util.spec_from_file_location("slides", Path(__file__).parents[1] / "extract" / "slides.py")
    assert spec is not None
    assert spec.loader is not None
    painter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(painter)
    (folder / "slides").mkdir()
    for i in range(len(LABELS)):
        painter.painted_slide(folder / "slides" / f"s{i}.tiff", 501 + 40 * i, 423, seed=i)
    code, said = run("extract.run", [*EXTRACT, f"slides.folder={folder / 'slides'}", f"out={folder / 'features'}"])
    assert code == 0, said
    return folder


@cache
def whole(slide: str) -> bytes:
    """What the feature file of a slide holds."""
    return (pool() / "features" / f"{slide}.h5").read_bytes()


@cache
def truth(n_slides: int) -> bytes:
    """predictions.csv of a study that nothing disturbed."""
    folder = pool() / f"truth{n_slides}"
    write_cohort(folder, n_slides)
    features = f"features.folder={pool() / 'features'}"
    code, said = run(
        "mil.train", [f"cohort={folder / 'cohort.csv'}", features, *TRAIN, *QUICK, f"out={folder / 'run'}"]
    )
    assert code == 0, said
    return (folder / "run" / "predictions.csv").read_bytes()


def write_cohort(folder: Path, n_slides: int) -> None:
    folder.mkdir(exist_ok=True)
    rows = [{"slide": f"s{i}", "patient": f"p{i}", "label": LABELS[i]} for i in range(n_slides)]
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)


def run(command: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and everything that a command says, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = COMMANDS[command].main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, said.getvalue()


@cache
def killers() -> multiprocessing.context.ForkServerContext:
    """Processes that have imported everything and run nothing, so that a real SIGKILL costs no start-up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mil.api.study", "mil.prediction.study", "extract.extraction.work"])
    return context


def run_killed(command: str, arguments: list[str], folder: Path, change: int) -> tuple[int, str]:
    """Exit code (-9: it was killed before this change of the disk) and what was said."""
    said = folder / "said.txt"
    names = {"COMMAND": command, "ARGUMENTS": arguments, "FOLDER": f"{folder}/", "CHANGE": change, "SAID": str(said)}
    script = str(Path(__file__).with_name("killed.py"))
    process = killers().Process(target=runpy.run_path, args=(script,), kwargs={"init_globals": names})
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    assert code is not None, f"{command} did not end"
    text = said.read_text()
    said.unlink()
    return code, text


def snapshot(folder: Path) -> Snapshot:
    """Every file by its name: when it was written, and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*") if path.suffix in (".partial", ".claim", ".stale", ".lock")]


class Machine(RuleBasedStateMachine):
    """One folder with slides, features, a run and predictions, and what is known of them.

    `spoilt`: feature files that were damaged, by slide, as they then are. `trained_on`: how many slides the run had.
    `run_spoilt`: the file of the run that was damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine"))
        self.features, self.run, self.out = (self.folder / name for name in ("features", "run", "predicted"))
        (self.folder / "slides").mkdir()
        self.n_slides = 0
        self.spoilt: dict[str, bytes] = {}
        self.run_spoilt = ""
        self.trained_on: set[int] = set()
        for _ in range(FEWEST):
            self.add_slide()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # --- what is there

    @property
    def slides(self) -> list[str]:
        return [f"s{i}" for i in range(self.n_slides)]

    def file_of(self, slide: str) -> Path:
        return self.features / f"{slide}.h5"

    @property
    def unusable(self) -> list[str]:
        """Slides of the cohort whose features are absent or damaged."""
        return [slide for slide in self.slides if slide in self.spoilt or not self.file_of(slide).exists()]

    @property
    def finished(self) -> bool:
        return (self.run / "metrics.json").exists() and (self.run / "hashes.json").exists()

    def forget_replaced(self) -> None:
        """What was damaged and is not there as it was any more."""
        there = {slide: self.file_of(slide) for slide in self.spoilt}
        self.spoilt = {s: self.spoilt[s] for s, path in there.items() if path.exists() and self.is_spoilt(s)}

    def is_spoilt(self, slide: str) -> bool:
        return self.file_of(slide).read_bytes() == self.spoilt[slide]

    # --- commands

    def extract_command(self, overwrite: bool) -> list[str]:
        arguments = [*EXTRACT, f"slides.folder={self.folder / 'slides'}", f"out={self.features}"]
        return [*arguments, "overwrite=true"] if overwrite else arguments

    def train_command(self, how: str) -> list[str]:
        data = [f"cohort={self.folder / 'cohort.csv'}", f"features.folder={self.features}"]
        return [*data, *TRAIN, *QUICK, f"out={self.run}", *([f"{how}=true"] if how else [])]

    def predict_command(self, overwrite: bool) -> list[str]:
        data = [f"run={self.run}", f"cohort={self.folder / 'cohort.csv'}", f"features.folder={self.features}"]
        arguments = [*data, "device=cpu", "known_patients=score", *QUICK, f"out={self.out}"]
        return [*arguments, "overwrite=true"] if overwrite else arguments

    def unchanged(self, before: Snapshot, folder: Path) -> None:
        assert snapshot(folder) == before

    # --- rules: the world

    @initialize(extracted=st.sampled_from([True, False]), trained=st.sampled_from([True, False]))
    def begin(self, extracted: bool, trained: bool) -> None:
        if extracted:
            self.extract(overwrite=True)
            if trained:
                self.train("", again=False)

    @precondition(lambda self: self.n_slides < len(LABELS))
    @rule()
    def add_slide(self) -> None:
        name = f"s{self.n_slides}"
        shutil.copyfile(pool() / "slides" / f"{name}.tiff", self.folder / "slides" / f"{name}.tiff")
        self.n_slides += 1
        write_cohort(self.folder, self.n_slides)

    @rule(number=st.integers(0, len(LABELS) - 1))
    def delete(self, number: int) -> None:
        slide = self.slides[number % self.n_slides]
        self.file_of(slide).unlink(missing_ok=True)
        self.spoilt.pop(slide, None)

    @rule(number=st.integers(0, 7), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
    def damage(self, number: int, where: float, bit: int, cut: bool) -> None:
        path = self.file_of(self.slides[number % self.n_slides])
        if path.exists():
            path.write_bytes(damaged(path.read_bytes(), where, bit, cut))
            self.spoilt[path.stem] = path.read_bytes()
            if path.read_bytes() == whole(path.stem):  # the same bit twice
                del self.spoilt[path.stem]

    @precondition(lambda self: self.finished and not self.run_spoilt)
    @rule(name=st.sampled_from(READ_BACK), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage_the_run(self, name: str, where: float, bit: int) -> None:
        path = self.run / name
        path.write_bytes(damaged(path.read_bytes(), where, bit, cut=False))
        self.run_spoilt = name

    # --- rules: commands

    @rule(overwrite=st.booleans())
    def extract(self, overwrite: bool) -> None:
        before = snapshot(self.folder)
        code, said = self.ended("extract.run", self.extract_command(overwrite))
        if code:
            assert code == 2, said
            assert not overwrite
            assert any(f"{self.file_of(slide)}: " in said for slide in self.spoilt)
            self.unchanged(before, self.folder)
            return
        if overwrite:
            self.spoilt = {}
        assert all(self.file_of(slide).exists() for slide in self.slides)
        assert not leftovers(self.features)
        if not overwrite:
            again, _ = self.twice("extract.run", self.extract_command(False))
            assert again == 0

    @rule(change=st.integers(1, 40), overwrite=st.booleans())
    def kill_extract(self, change: int, overwrite: bool) -> None:
        code, said = self.killed("extract.run", self.extract_command(overwrite), change)
        if code == 2:
            assert any(f"{self.file_of(slide)}: " in said for slide in self.spoilt)
        self.forget_replaced()

    @rule(how=st.sampled_from(["resume", "overwrite", ""]), again=st.booleans())
    def train(self, how: str, again: bool) -> None:
        before, was_finished, unusable = snapshot(self.run), self.finished, self.unusable
        code, said = self.ended("mil.train", self.train_command(how))
        if code:
            assert code == 2, said
            no_folder = f"{self.features}: no " in said and len(unusable) == self.n_slides
            named = no_folder or any(slide in said for slide in unusable)
            in_the_way = "run folder exists" in said and before and not how
            other = how == "resume" and before and ("resume" in said or "roles.csv" in said or self.run_spoilt)
            assert in_the_way or named or other, said
            if how != "overwrite":
                self.unchanged(before, self.run)
            else:
                assert snapshot(self.run) in ({}, before)
            self.forget_lost_run()
            return
        if how == "resume" and was_finished:  # killed after it was finished, only what it resumes from was left
            self.unchanged({name: seen for name, seen in before.items() if "checkpoints" not in name}, self.run)
        else:
            assert not unusable, f"features that are absent or damaged were used: {unusable}"
            self.trained_on, self.run_spoilt = {self.n_slides}, ""
        assert not leftovers(self.run)
        assert self.finished
        assert (self.run / "report.html").exists()
        if again:
            assert self.twice("mil.train", self.train_command(""))[0] == 2
            assert self.twice("mil.train", self.train_command("resume"))[0] == 0 or self.run_spoilt

    @rule(change=st.integers(1, 120), how=st.sampled_from(["resume", "overwrite", ""]))
    def kill_train(self, change: int, how: str) -> None:
        was_finished = self.finished
        code, _ = self.killed("mil.train", self.train_command(how), change)
        if code in (0, -9) and not (was_finished and how == "resume"):
            self.trained_on.add(self.n_slides)
        if how == "overwrite":
            self.run_spoilt = self.run_spoilt if self.finished and self.is_run_spoilt() else ""
        self.forget_lost_run()

    @rule(overwrite=st.sampled_from([True, True, False]), again=st.booleans())
    def predict(self, overwrite: bool, again: bool) -> None:
        before, in_the_way, unusable = snapshot(self.out), self.predictions_exist(), self.unusable
        code, said = self.ended("mil.predict", self.predict_command(overwrite))
        if code == 2:
            why = not self.finished or (in_the_way and not overwrite) or len(unusable) == self.n_slides
            named = self.run_spoilt and f"{self.run / self.run_spoilt}: " in said
            assert why or named, said
            self.unchanged(before, self.out)
            return
        assert not self.run_spoilt, f"{self.run_spoilt} of the run is damaged"
        assert code == bool(unusable), said
        usable = [slide for slide in self.slides if slide not in unusable]
        self.check_predictions(usable)
        failed = self.out / "failed.csv"
        assert (sorted(pd.read_csv(failed)["slide"]) if failed.exists() else []) == sorted(unusable)
        assert not leftovers(self.out)
        if again:
            assert self.twice("mil.predict", self.predict_command(False))[0] == 2

    @rule(change=st.integers(1, 40), overwrite=st.booleans())
    def kill_predict(self, change: int, overwrite: bool) -> None:
        self.killed("mil.predict", self.predict_command(overwrite), change)

    # --- what must hold

    def ended(self, command: str, arguments: list[str]) -> tuple[int, str]:
        code, said = run(command, arguments)
        ENDED[f"{command} {code}"] += 1
        return code, said

    def killed(self, command: str, arguments: list[str], change: int) -> tuple[int, str]:
        code, said = run_killed(command, arguments, self.folder, change)
        ENDED[f"killed {command} {code}"] += 1
        assert code in (0, 1, 2, -signal.SIGKILL), said
        assert "Traceback" not in said, said
        return code, said

    def twice(self, command: str, arguments: list[str]) -> tuple[int, str]:
        """A command that has nothing left to do: it changes nothing."""
        before = snapshot(self.folder)
        code, said = self.ended(command, arguments)
        self.unchanged(before, self.folder)
        return code, said

    def predictions_exist(self) -> bool:
        return self.out.exists() and any(self.out.iterdir())

    def is_run_spoilt(self) -> bool:
        code, _ = run("mil.predict", [*self.predict_command(False)[:-1], f"out={self.folder / 'nowhere'}"])
        shutil.rmtree(self.folder / "nowhere", ignore_errors=True)
        return code == 2

    def forget_lost_run(self) -> None:
        if not self.run.exists():
            self.trained_on, self.run_spoilt = set(), ""

    def check_predictions(self, usable: list[str]) -> None:
        """One row a slide, and its probability that of the members on the features as they were written."""
        trained = open_run(self.run, device="cpu")
        table = pd.read_csv(self.out / "predictions.csv").set_index("slide")
        assert list(table.index) == usable
        for slide in usable:
            features_ND = read_features(pool() / "features" / f"{slide}.h5")
            logits_M = score_slide(trained, features_ND).logits_MBC.numpy().ravel()
            np.testing.assert_allclose(table.loc[slide, "p_b"], expit(logits_M.mean()), rtol=1e-4)

    @invariant()
    def count(self) -> None:
        ENDED["steps"] += 1

    @invariant()
    def feature_files_are_whole_or_known_to_be_damaged(self) -> None:
        for path in self.features.glob("[!.]*.h5"):
            assert path.read_bytes() in (whole(path.stem), self.spoilt.get(path.stem)), path

    @invariant()
    def a_finished_run_opens_and_is_the_undisturbed_one(self) -> None:
        if self.finished and not self.run_spoilt:
            assert len(open_run(self.run, device="cpu").plan) == 2
            assert (self.run / "predictions.csv").read_bytes() in [truth(n) for n in self.trained_on]

    @invariant()
    def a_table_of_predictions_is_whole(self) -> None:
        if (self.out / "metrics.json").exists():
            json.loads((self.out / "metrics.json").read_text())
            assert len(pd.read_csv(self.out / "members.csv")) == 2 * len(pd.read_csv(self.out / "predictions.csv"))


def damaged(content: bytes, where: float, bit: int, cut: bool) -> bytes:
    position = int(where * len(content))
    if cut:
        return content[:position]
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :] if content else content


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch, draw_only: Callable[..., None]) -> None:
    draw_only(monkeypatch)


PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=SEED == 0,
    database=None,
    print_blob=False,
    phases=[Phase.generate],  # to shrink a history of seconds a step would take hours
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(24 * 3600 if STEPS > 20 else 600)
@pytest.mark.usefixtures("no_figures")
def test_any_history_of_commands_kills_and_damage() -> None:
    machine: Callable[[], RuleBasedStateMachine] = seed(SEED)(Machine) if SEED else Machine
    try:
        run_state_machine_as_test(machine, settings=PROFILE)
    finally:
        print("; ".join(f"{name}: {n}" for name, n in sorted(ENDED.items())))
    assert ENDED["mil.train 0"]


# --- one kill, wherever it falls -------------------------------------------------------------------------------------

EVERY = max(1, round(30 / float(os.environ.get("MUTATIONS", "1"))))
"""One in so many changes of the disk; all of them with MUTATIONS=30."""


@pytest.fixture
def machine(no_figures: None) -> Iterator[Machine]:
    made = Machine()
    made.begin(extracted=True, trained=False)
    yield made
    made.teardown()


def test_a_study_that_is_killed_anywhere_continues_to_the_same_end(machine: Machine) -> None:
    change, code = 1, -signal.SIGKILL
    while code:
        code, _ = machine.killed("mil.train", machine.train_command(""), change)
        machine.trained_on = {machine.n_slides}
        if code:
            in_the_way = run("mil.predict", machine.predict_command(False))
            assert in_the_way[0] == 2 or machine.finished, in_the_way[1]
        machine.train("resume", again=False)
        assert (machine.run / "predictions.csv").read_bytes() == truth(machine.n_slides)
        for folder in (machine.run, machine.out):
            shutil.rmtree(folder, ignore_errors=True)
        change += EVERY
    assert change > 80


@pytest.mark.parametrize("command", ["mil.train", "mil.predict"])
def test_what_replaces_is_killed_anywhere_and_the_same_command_ends_well(machine: Machine, command: str) -> None:
    machine.train("", again=False)
    machine.predict(overwrite=False, again=False)
    change, code = 1, -signal.SIGKILL
    arguments = machine.train_command("overwrite") if command == "mil.train" else machine.predict_command(True)
    while code:
        code, _ = machine.killed(command, arguments, change)
        if command == "mil.train":
            machine.train("overwrite", again=False)
        else:
            machine.predict(overwrite=True, again=False)
        assert not leftovers(machine.run)
        assert not list(machine.folder.glob(".*.removed"))
        change += EVERY
    assert change > 40
