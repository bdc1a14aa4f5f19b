"""Permutation tests of survival, regression and ordinal studies: targets change places as a whole, in one pass."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from extract.cohort import Cohort
from mil.config import StudyConfig
from mil.config import Task as TaskConfig
from mil.pipeline.data import told_by
from mil.study.permutations import permuted_sources
from mil.study.plan import make_plan
from mil.tasks.table import task_of
from mil.train import main

TASKS = {
    "survival": ["task=survival", "task.horizons=[20]"],
    "regression": ["task=regression", "columns.label=value"],
    "ordinal": ["task=ordinal", "columns.label=grade", "classes=[low,mid,high]"],
    "discrete": ["task=survival", "task.horizons=[20]", "task.loss=discrete", "task.intervals=2"],
    "nested discrete": [
        "task=survival", "task.horizons=[20]", "task.loss=discrete", "task.intervals=2", "study.nested=2",
        "study.grid.lr=[1e-6,0.05]",
    ],
}  # fmt: skip


def test_time_and_event_move_together_within_split_and_strata_follow():
    rng = np.random.default_rng(0)
    patient_S = np.repeat(np.arange(40), rng.integers(1, 3, 40))
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(len(patient_S))], "patient": patient_S.astype(str)})
    table["split"] = np.where(patient_S % 4 == 0, "test", "train")
    table["event"] = rng.integers(0, 2, 40)[patient_S].astype(float)
    table["time"] = 1.0 + patient_S
    table["label"] = np.where(table["event"] == 1, "event", "censored")
    cohort = Cohort(table.assign(path=None, mpp=np.nan), ("censored", "event"), target="survival")
    config = StudyConfig(task=TaskConfig(name="survival", horizons=[5.0]))
    task = task_of(config.task, cohort.classes)
    source_S = permuted_sources(cohort, np.random.default_rng(1))
    moved = told_by(config, task, cohort.classes)(cohort, source_S)
    pairs = {(row.time, row.event, row.split) for row in table.itertuples()}
    assert {(row.time, row.event, row.split) for row in moved.table.itertuples()} == pairs
    assert len(moved.table[["patient", "time"]].drop_duplicates()) == moved.table["patient"].nunique(), "one time each"
    assert (moved.table["time"] != table["time"]).mean() > 0.8
    assert (moved.labels_S == moved.table["event"]).all()
    make_plan(moved, folds=3, lr=0.1, weight_decay=0.0)


def test_a_numbers_strata_are_dealt_anew():
    table = pd.DataFrame({"slide": list("abcdefghij"), "patient": list("abcdefghij"), "split": "train", "label": "x"})
    cohort = Cohort(table.assign(value=np.arange(10.0), path=None, mpp=np.nan), (), target="value")
    config = StudyConfig(task=TaskConfig(name="regression"))
    task = task_of(config.task)
    stratified = task.strata(cohort, config.study.folds)
    moved = told_by(config, task, ())(stratified, np.arange(10)[::-1])
    assert moved.table["value"].tolist() == list(range(9, -1, -1))
    assert moved.labels_S.tolist() == stratified.labels_S[::-1].tolist() == [1] * 5 + [0] * 5


@pytest.fixture(scope="module")
def planted(tmp_path_factory, write_study) -> tuple[list[str], pd.DataFrame]:
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(3)
    hidden = rng.normal(size=24)
    arrays = []
    for number in hidden:
        bag_TD = rng.normal(size=(rng.integers(4, 9), 4)).astype(np.float32)
        bag_TD[0, 0] = 6 + 2 * number
        arrays.append(bag_TD)
    arguments = write_study(folder, arrays, ["x"] * 24, split=["test" if i % 4 == 0 else "train" for i in range(24)])
    table = pd.read_csv(folder / "cohort.csv").drop(columns="label").assign(value=hidden.round(3))
    table["time"], table["event"] = (30 * np.exp(-hidden)).round(1), (np.arange(24) % 5 > 0).astype(int)
    table["grade"] = np.array(["low", "mid", "high"])[np.argsort(np.argsort(hidden)) // 8]
    table.to_csv(folder / "cohort.csv", index=False)
    return arguments, table


@pytest.mark.parametrize("name", TASKS)
def test_a_study_with_permutations_is_the_study_beside_its_null(name, planted, tmp_path, no_figures):
    quick = ["study.folds=2", "train.epochs=8", "train.lr=0.05", "train.batch_size=6", "train.accelerator=cpu"]
    quick += ["report.bootstrap=0", "report.heatmaps=0", "report.baselines=false", "model.name=max"]
    found = {}
    for n in (0, 9):
        out = tmp_path / str(n)
        assert main([*planted[0], *TASKS[name], *quick, f"report.permutations={n}", f"out={out}"]) == 0
        found[n] = json.loads((out / "metrics.json").read_text())
    block = found[9].pop("permutations")
    assert found[9]["pooled_out_of_fold"] == found[0]["pooled_out_of_fold"], "the study's own members are as without"
    assert block["members"] == (18 * (1 + 2 * 2) if "nested" in name else 18), "inner members: two folds, two rates"
    for where, own in (("cross_validated", "pooled_out_of_fold"), ("test", "test")):
        metrics = found[0][own] if own != "test" else found[0]["test"]["ensemble"]
        one = block["sets"][where]
        assert one["observed"] == pytest.approx(metrics["metrics"][found[0]["task"]["main"]]["value"])
        assert len(set(one["null"])) > 1, "each permutation has targets of its own"
    if name not in ("ordinal", "nested discrete"):  # which learn too little in so few epochs, of so few slides
        assert block["sets"]["cross_validated"]["p_value"] <= 0.2
    assert "targets of patients change places" in block["method"]
