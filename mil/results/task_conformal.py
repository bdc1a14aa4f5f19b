"""Where a number or a grade should not be trusted: conformal intervals and sets at a stated coverage.

Regression: split-conformal intervals, the prediction +- a quantile of the absolute out-of-fold residuals (Vovk et al.
2005; Lei et al., JASA 2018), by crepes. Their width is the same for all slides. Ordinal: the class-conditional sets of
`mil.results.conformal`, with the grades as classes. Of both: one slide a patient gives a score, what is said of the
slides of a fold comes from the scores of the other folds, and other slides are scored by the ensemble of all members,
so that there the coverage is near what is stated, not guaranteed. Survival has none: how far a risk is from a censored
time is not known.

Axes: S slides, K grades.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from crepes import ConformalRegressor
from pydantic import Field, ValidationError

from extract.whole import write_whole
from mil.results.calibration import Saved
from mil.results.conformal import coverage_block, fewest_patients, one_a_patient, p_values, scores_of, set_names
from mil.results.rates import rate_block
from mil.results.tables import held_out, of_test_split
from mil.results.task_summary import ensemble
from mil.tasks.contract import Task

FILE = "conformal.json"
TASKS = ("regression", "ordinal")
LOW, HIGH, SET = "low", "high", "conformal_set"
SETS = {"pooled_out_of_fold": "out-of-fold", "test": "test"}


class TaskScores(Saved):
    """What new slides are compared with, rising: absolute residuals, or each grade's nonconformity scores."""

    coverage: float = Field(gt=0, lt=1)
    fitted_on: Literal["out-of-fold", "nothing"]
    residuals: list[float] = Field(default_factory=list)
    of_grade: dict[str, list[float]] = Field(default_factory=dict)


def fit_task_scores(task: Task, predictions: pd.DataFrame, coverage: float, seed: int) -> TaskScores | None:
    """For slides that are not among those calibrated on; None for a task that has none."""
    if task.name not in TASKS:
        return None
    table = out_of_fold(task, predictions)
    if table.empty:
        return TaskScores(coverage=coverage, fitted_on="nothing")
    found = TaskScores(coverage=coverage, fitted_on="out-of-fold")
    return found.model_copy(update=scored(task, table, seed))


def scored(task: Task, table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """The scores of a table of labelled slides, one a patient (of a grade)."""
    if task.name == "ordinal":
        return {"of_grade": scores_of(table, task.classes, seed)}
    kept = one_a_patient(table.assign(label=0), seed)
    return {"residuals": sorted((kept["prediction"] - kept["value"]).abs().tolist())}


def out_of_fold(task: Task, predictions: pd.DataFrame) -> pd.DataFrame:
    """The labelled slides that were held out, members averaged, with `group`: the fold of the first of its repeats.

    Of grades `label` is their index. Slides whose prediction is not a number are left out.
    """
    rows = predictions[held_out(predictions)]
    table = known_slides(task, rows)
    if table.empty:
        return table.assign(group=0)
    first = rows.sort_values(["repeat", "fold"], kind="stable").drop_duplicates("slide").set_index("slide")
    pairs = first.loc[table["slide"], ["repeat", "fold"]]
    return table.assign(group=pairs.groupby(["repeat", "fold"], sort=True).ngroup().to_numpy(dtype=np.int64))


def known_slides(task: Task, rows: pd.DataFrame) -> pd.DataFrame:
    """One row a labelled slide, of those whose prediction is a number; a grade as its index."""
    table: pd.DataFrame = task.labelled(ensemble(task, rows)) if len(rows) else rows
    table = table[np.isfinite(table[task.columns()].to_numpy(dtype=np.float64)).all(axis=1)]
    if task.name == "ordinal":
        index = {name: k for k, name in enumerate(task.classes)}
        table = table.assign(label=table["label"].map(index).astype(np.int64))
    known: pd.DataFrame = table.reset_index(drop=True)
    return known


# --- saved -----------------------------------------------------------------------------------------------------------


def write_task_scores(folder: Path, scores: TaskScores | None) -> None:
    """conformal.json; nothing for a task that has none."""
    if scores is not None:
        write_whole(folder / FILE, json.dumps(scores.model_dump(), indent=2, allow_nan=False) + "\n")


def read_task_scores(folder: Path) -> TaskScores | None:
    """What `write_task_scores` wrote; None where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return TaskScores.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError, OSError) as error:
        raise ValueError(f"{path}: damaged, or of another version: {str(error).splitlines()[0]}") from None


# --- what is said of slides ------------------------------------------------------------------------------------------


def half_width(residuals: list[float], coverage: float) -> float:
    """Half of the interval's width; infinite where too few residuals can bound it."""
    if len(residuals) < fewest_patients(coverage):
        return float("inf")
    regressor = ConformalRegressor().fit(np.asarray(residuals, dtype=np.float64))
    # 1 - 0.9 is a little below 0.1, which would ask for the next larger residual
    return float(regressor.predict_int(np.zeros(1), confidence=coverage - 1e-9)[0, 1])


def said_columns(task: Task, scores: TaskScores, table: pd.DataFrame, coverage: float) -> pd.DataFrame:
    """Columns low and high, or conformal_set, index as the table's; of rows with `Task.columns`."""
    if task.name == "regression":
        half = half_width(scores.residuals, coverage)
        return pd.DataFrame({LOW: table["prediction"] - half, HIGH: table["prediction"] + half}, index=table.index)
    p_SK = table[task.columns()].to_numpy(dtype=np.float64)
    values_SK = p_values(scores.of_grade, p_SK)
    return pd.DataFrame({SET: set_names(values_SK, coverage, task.classes)}, index=table.index)


def slide_columns(task: Task, scores: TaskScores, predictions: pd.DataFrame, seed: int) -> pd.DataFrame | None:
    """For slides.csv, index slide: of held-out slides from the other folds' scores, of test ones from all."""
    coverage, found = scores.coverage, []
    for one, own in judged(task, scores, predictions, seed).values():
        parts = [said_columns(task, fitted, one[rows], coverage) for rows, fitted in own]
        found.append(pd.concat(parts).set_axis(np.concatenate([one["slide"][rows] for rows, _ in own])))
    return pd.concat(found) if found else None


Judged = dict[str, tuple[pd.DataFrame, list[tuple[np.ndarray, TaskScores]]]]
"""Set -> its labelled slides, and which of them (bool) are judged by which scores."""


def judged(task: Task, scores: TaskScores, predictions: pd.DataFrame, seed: int) -> Judged:
    """The sets that have slides."""
    found: Judged = {}
    if scores.fitted_on == "nothing":
        return found
    table = out_of_fold(task, predictions)
    if len(table) and len(np.unique(table["group"])) > 1:
        own = []
        for group in np.unique(table["group"]):
            rows = (table["group"] == group).to_numpy()
            others = table[~table["patient"].isin(table["patient"][rows])]
            own.append((rows, scores.model_copy(update=scored(task, others, seed))))
        found["pooled_out_of_fold"] = (table, own)
    test = known_slides(task, predictions[of_test_split(predictions)])
    if len(test):
        found["test"] = (test, [(np.ones(len(test), dtype=bool), scores)])
    return found


# --- what is reported ------------------------------------------------------------------------------------------------


def task_conformal_blocks(
    task: Task, scores: TaskScores | None, predictions: pd.DataFrame, seed: int, coverage: float | None = None
) -> dict[str, dict[str, Any]]:
    """`conformal_intervals` of numbers, `conformal` of grades as classes have it; {} where there is nothing to say.

    coverage: instead of the scores' own.
    """
    if scores is None:
        return {}
    scores = scores.model_copy(update={"coverage": coverage or scores.coverage})
    sets = judged(task, scores, predictions, seed)
    if not sets:
        return {}
    if task.name == "regression":
        return {"conformal_intervals": intervals_block(scores, sets)}
    return {"conformal": sets_block(task, scores, sets)}


def intervals_block(scores: TaskScores, sets: Judged) -> dict[str, Any]:
    """Coverage and width of every set."""
    blocks = {}
    for name, (table, own) in sets.items():
        half_S = np.full(len(table), np.nan)
        for rows, fitted in own:
            half_S[rows] = half_width(fitted.residuals, scores.coverage)
        inside_S = (table["prediction"] - table["value"]).abs().to_numpy() <= half_S
        finite = np.isfinite(half_S).all()
        blocks[name] = {
            "covered": rate_block(inside_S, table["patient"].to_numpy()),
            "width": float(2 * half_S.mean()) if finite else None,
            "spread": float(table["value"].std(ddof=1)) if len(table) > 1 else None,
        }
    return {
        "coverage": scores.coverage,
        "patients": len(scores.residuals),
        "needed": fewest_patients(scores.coverage),
        "sets": blocks,
    }


def sets_block(task: Task, scores: TaskScores, sets: Judged) -> dict[str, Any]:
    """As `mil.results.decision_blocks.conformal_block` has it."""
    blocks: dict[str, Any] = {}
    for name, (table, own) in sets.items():
        p_SK = table[task.columns()].to_numpy(dtype=np.float64)
        values_SK = np.full(p_SK.shape, np.nan)
        for rows, fitted in own:
            values_SK[rows] = p_values(fitted.of_grade, p_SK[rows])
        label_S, patient_S = table["label"].to_numpy(dtype=np.int64), table["patient"].to_numpy()
        block = coverage_block(label_S, values_SK, patient_S, task.classes, scores.coverage)
        blocks |= {} if block is None else {name: block}
    patients: Mapping[str, int] = {name: len(own) for name, own in scores.of_grade.items()}
    needed = fewest_patients(scores.coverage)
    return {
        "coverage": scores.coverage,
        "fitted_on": scores.fitted_on,
        "patients_per_class": dict(patients),
        "too_few": [name for name, n in patients.items() if n < needed],
        "needed": needed,
        "sets": blocks,
    }
