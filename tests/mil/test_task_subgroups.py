"""Sub-groups of survival, regression and ordinal studies: false alarms, planted differences, small groups."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mil.config import Task as TaskConfig
from mil.results.task_subgroups import SEVERAL, Scored, p_values, scored_sets, task_subgroups, units_of
from mil.results.task_summary import plain_metrics
from mil.tasks.contract import Part, Task
from mil.tasks.table import task_of

NAMES = ("survival", "regression", "ordinal")
GRADES = ("low", "mid", "high")


def task_named(name: str) -> Task:
    return task_of(TaskConfig(name=name, horizons=[1.0] if name == "survival" else []), GRADES)


def cohort_of(name: str, patients: int, rng: np.random.Generator, noise: np.ndarray | float = 1.0) -> Scored:
    """Held-out predictions of two folds: 1 or 2 slides a patient, a target and a prediction that knows some of it."""
    patient_S = np.repeat(np.arange(patients), rng.integers(1, 3, patients))
    hidden_S, said_S = rng.normal(size=patients)[patient_S], rng.normal(size=patients)[patient_S]
    said_S = hidden_S + np.broadcast_to(noise, patients)[patient_S] * said_S
    slides = pd.DataFrame({"slide": [f"s{i}" for i in range(len(patient_S))], "patient": patient_S.astype(str)})
    slides["split"], slides["members"], slides["label"] = "train", 1, "x"
    if name == "regression":
        slides["value"], slides["prediction"] = hidden_S, said_S
    elif name == "ordinal":
        above = 1 / (1 + np.exp(-4 * (said_S[:, None] - [-0.5, 0.5])))
        slides["label"] = np.array(GRADES)[np.digitize(hidden_S, [-0.5, 0.5])]
        slides[["p_0", "p_1", "p_2"]] = np.stack([1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1]], axis=1)
    else:
        time, until = (rng.exponential(size=patients)[patient_S] for _ in range(2))
        time_S = time * np.exp(-hidden_S)
        slides["time"], slides["event"] = np.minimum(time_S, 2 * until), (time_S <= 2 * until).astype(float)
        slides["risk"], slides["standing"] = said_S, said_S
    task = task_named(name)
    of_fold = [slides[patient_S % 2 == fold].reset_index(drop=True) for fold in (0, 1)]
    return Scored(slides, [Part(task.units(table), table) for table in of_fold])


def groups_of(scored: Scored, group_P: np.ndarray) -> dict[str, dict[str, str]]:
    return {"sex": {row.slide: str(group_P[int(row.patient)]) for row in scored.slides.itertuples()}}


@pytest.mark.parametrize("name", NAMES)
def test_groups_that_have_no_say_are_flagged_as_often_as_the_level_says(name):
    """At 10 %, 60 null cohorts: 6 expected, and 14 or more with a chance of 0.2 % (binomial)."""
    rng, task, alarms = np.random.default_rng(3), task_named(name), 0
    for seed in range(60):
        scored = cohort_of(name, 60, rng)
        table = scored.table
        units, inside_N = units_of(table), rng.integers(0, 2, 60)[table["patient"].astype(int)] == 1
        found = p_values(task, scored.parts, units, inside_N[units.first_U], [task.main], 99, seed)
        alarms += found[task.main][1] <= 0.1
    assert alarms < 14


@pytest.mark.parametrize("name", NAMES)
def test_a_group_in_which_the_model_fails_is_found_and_scored_by_its_own_rows(name):
    rng, task = np.random.default_rng(4), task_named(name)
    group_P = rng.integers(0, 2, 160)
    scored = cohort_of(name, 160, rng, noise=np.where(group_P == 1, 6.0, 0.3))
    block = task_subgroups(task, groups_of(scored, group_P), {"test": scored}, 20, 0, 199)
    of_group = {group["name"]: group for group in block["sets"]["test"][0]["groups"]}
    own = [Part(part.table[group_P[part.table["patient"].astype(int)] == 1], part.training) for part in scored.parts]
    found, wanted = of_group["1"]["metrics"], plain_metrics(task, own, [task.main])
    assert found[task.main]["value"] == pytest.approx(wanted[task.main])
    assert found[task.main]["low"] < found[task.main]["value"] < found[task.main]["high"]
    test = of_group["1"]["against_rest"][task.main]
    assert test["p_holm"] == test["p_value"] == pytest.approx(1 / 200), "two halves are one test"
    rest = of_group["0"]
    assert test["difference"] == pytest.approx(found[task.main]["value"] - rest["metrics"][task.main]["value"])
    assert rest["against_rest"][task.main]["difference"] == -test["difference"]


def test_small_groups_are_counted_and_patients_in_several_groups_are_their_own():
    rng, task = np.random.default_rng(5), task_named("survival")
    scored = cohort_of("survival", 80, rng)
    twice = scored.slides["patient"].duplicated()
    groups = {row.slide: "few" if int(row.patient) < 9 else "many" for row in scored.slides.itertuples()}
    groups |= dict.fromkeys(scored.slides["slide"][twice & (scored.slides["patient"].astype(int) > 60)], "other")
    block = task_subgroups(task, {"x": groups}, {"test": scored}, 0, 0)
    of_group = {group["name"]: group for group in block["sets"]["test"][0]["groups"]}
    assert "with an event" in of_group["few"]["too_small"]
    assert of_group["few"]["metrics"] is None
    mixed = scored.slides["patient"][scored.slides["slide"].map(groups) == "other"].unique()
    assert of_group[SEVERAL]["counts"]["patients"] == len(mixed) > 0
    assert of_group["many"]["metrics"]["c_harrell"]["value"] is not None
    assert of_group["many"]["against_rest"] is None, "without resamples there are no tests"


def test_a_slide_that_several_repeats_held_out_changes_sides_as_one():
    rng, task = np.random.default_rng(6), task_named("regression")
    one = cohort_of("regression", 40, rng)
    twice = Scored(one.slides, [*one.parts, *one.parts])
    groups = groups_of(one, rng.integers(0, 2, 40))
    a, b = (task_subgroups(task, groups, {"test": s}, 2, 0, 99)["sets"]["test"][0]["groups"] for s in (one, twice))
    assert a[0]["against_rest"]["pearson"] == pytest.approx(b[0]["against_rest"]["pearson"])


def test_sets_are_the_held_out_slides_and_the_test_split():
    task = task_named("regression")
    rows = pd.DataFrame({"slide": ["a", "b", "c"], "patient": ["a", "b", "c"], "label": "", "split": "train"})
    rows = rows.assign(value=[1.0, 2.0, np.nan], prediction=0.5, role="test", member=0, repeat=0, fold=0)
    found = scored_sets(task, pd.concat([rows, rows.assign(slide=["d", "e", "f"], split="test")]))
    assert found["cross_validated"].slides["slide"].tolist() == ["a", "b", "c"]
    assert found["test"].table["slide"].tolist() == ["d", "e"], "those with a target"
