"""Finished runs side by side: the same task, slides, targets and folds, or a refusal; paired differences in AUC.

What `python -m mil.compare` and `model.name=[a,b,...]` share. Axes: S slides, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.config import ProblemsError, first_line
from extract.owners import PREDICT, maker_of
from extract.wording import count, name_some
from mil.config import Task as TaskConfig
from mil.report.page import write_overview
from mil.results.intervals import delong
from mil.results.readback import METRICS as METRICS_FILE
from mil.results.readback import PREDICTIONS, read_metrics, read_predictions, read_task_predictions
from mil.results.tables import (
    OUT_OF_FOLD,
    TEST_ENSEMBLE,
    held_out_ensemble,
    member_thresholds,
    p_columns,
    pooled_out_of_fold,
)
from mil.results.task_differences import task_differences, unlike_tasks
from mil.results.trainings import (
    FEWEST,
    Trainings,
    auc_difference,
    auc_estimate,
    difference_with_training,
    trainings_of,
)
from mil.study.saved import PLAN_FILE, ROLES_FILE, read_members, read_roles
from mil.study.units import COLUMN
from mil.tasks.contract import Task
from mil.tasks.table import task_of
from mil.training.hashes import all_written, refuse_changed

SETS = {OUT_OF_FOLD: pooled_out_of_fold, TEST_ENSEMBLE: held_out_ensemble}


class ComparisonError(ProblemsError):
    """The runs cannot be compared."""


@dataclass(frozen=True)
class Run:
    """A finished run: its name in the tables, its folder, predictions.csv and metrics.json."""

    name: str
    folder: Path
    predictions: pd.DataFrame
    metrics: dict[str, Any]
    task: Task = field(default_factory=lambda: task_of(TaskConfig()))


def compare_runs(folders: Sequence[Path], out: Path, *, resamples: int = 1000, seed: int = 0) -> str:
    """Write comparison.csv, differences.csv, comparison.md, report.html and figures/ into `out`; the terminal's table.

    Args:
        resamples: of patients, for differences of tasks other than classification; 0: no intervals, of any task.
        seed: of these.

    Raises:
        ComparisonError: a folder is no finished run, or the runs differ in task, slides, targets or folds.
    """
    runs = load_runs(folders)
    refuse_unlike(runs)
    if runs[0].task.name == "classification":
        table = differences(runs, intervals=resamples > 0)
    else:
        table = task_differences([(run.name, run.task, run.predictions) for run in runs], resamples, seed)
    links = {run.name: Path(os.path.relpath(run.folder / "report.html", out)).as_posix() for run in runs}
    return write_overview(out, {run.name: run.metrics for run in runs}, differences=table, links=links)


# --- reading -------------------------------------------------------------------------------------------------------


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders; a folder of several aggregators stands for all of them."""
    found, problems = [], []
    for folder in folders:
        within = sorted(path.parent for path in folder.glob("*/metrics.json"))
        inside = [path for path in within if maker_of(path) != PREDICT]  # which may lie in a run folder, and is none
        own = [one for one in ([folder] if (folder / "metrics.json").exists() else inside) if all_written(one)]
        if not own:
            problems.append(f"{folder}: expected a finished run folder, found no metrics.json; train it or resume it")
        found += own
    if len({path.resolve() for path in found}) < len(found):
        problems.append("a run is named twice: " + name_some(p for p in found if found.count(p) > 1))
    if not problems and len(found) < 2:
        problems.append(f"expected at least two runs, got {count(len(found), 'run')}")
    if problems:
        raise ComparisonError("nothing to compare", problems)
    names = unique_names(found)
    runs: list[Run] = []
    for name, folder in zip(names, found, strict=True):
        try:
            runs.append(read_run(name, folder))
        except ProblemsError as error:
            problems += error.problems
    if problems:
        raise ComparisonError("runs that cannot be read back", problems)
    return runs


def read_run(name: str, folder: Path) -> Run:
    """One run, its files checked each by itself and against the others.

    Raises:
        ProblemsError: a file is missing, was changed, is damaged, or does not fit the others.
    """
    refuse_changed(folder, (METRICS_FILE, PREDICTIONS))
    metrics, plan, roles = read_metrics(folder), None, None
    if (folder / PLAN_FILE).exists() and (folder / ROLES_FILE).exists():
        refuse_changed(folder, (PLAN_FILE, ROLES_FILE))
        plan = read_members(folder)
        roles = read_roles(folder, plan)
    if "metric_titles" in metrics:
        task = task_in(folder, metrics)
        return Run(name, folder, read_task_predictions(folder, task, None, plan, roles), metrics, task)
    return Run(name, folder, read_predictions(folder, metrics["classes"], plan, roles), metrics)


def task_in(folder: Path, metrics: dict[str, Any]) -> Task:
    """The task as metrics.json says it.

    Raises:
        ComparisonError: it does not say its options, as an earlier version did not.
    """
    said = metrics["task"]
    try:
        return task_of(TaskConfig.model_validate(said["options"]), said["classes"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{folder}: metrics.json does not say the options of task={said['name']} ({first_line(error)})"
        raise ComparisonError("not comparable", [f"{problem}; train again with this version"]) from None


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts: as many as it takes to tell them apart."""
    parts = [folder.resolve().parts[1:] for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


# --- what must be the same -----------------------------------------------------------------------------------------


def refuse_unlike(runs: Sequence[Run]) -> None:
    """Every run against the first: classes, slides, patients, labels, split, and which slides each fold holds out.

    Train and val are one here: how a run selects within its training part is part of what is compared.
    """
    first = runs[0]
    problems = [problem for run in runs[1:] for problem in unlike(first, run)]
    if problems:
        raise ComparisonError(f"not comparable with {first.name}", problems)


def unlike(a: Run, b: Run) -> list[str]:
    """How run `b` differs from run `a`."""
    problems = unlike_tasks(a.name, a.task, b.name, b.task)
    if problems:
        return problems
    if a.task.name == "classification" and a.metrics["classes"] != b.metrics["classes"]:
        return [f"{b.name}: classes {b.metrics['classes']}, but {a.name} has {a.metrics['classes']}"]
    slides = {run.name: run.predictions.drop_duplicates("slide").set_index("slide") for run in (a, b)}
    of_patients = [run.name for run in (a, b) if COLUMN in slides[run.name]]
    if len(of_patients) == 1:
        other = b.name if of_patients == [a.name] else a.name
        return [f"{of_patients[0]}: its bags are patients, those of {other} are slides (study.unit)"]
    index_a, index_b = set(slides[a.name].index), set(slides[b.name].index)
    problems = []
    for here, there, only in ((a, b, index_a - index_b), (b, a, index_b - index_a)):
        if only:
            names = name_some(sorted(only))
            problems.append(f"{count(len(only), 'slide')} only in {here.name}, not in {there.name}: {names}")
    both = sorted(index_a & index_b)
    for column in ("patient", *a.task.targets, "split"):
        values = [slides[run.name].loc[both, column].astype(object).fillna("") for run in (a, b)]
        wrong = [s for s, x, y in zip(both, *values, strict=True) if x != y]
        if wrong:
            x, y = (value.loc[wrong[0]] for value in values)
            problems.append(
                f"{b.name}: {count(len(wrong), 'slide')} with another {column} than in {a.name}, such as {wrong[0]!r}: "
                f"{x!r} there, {y!r} here"
            )
    return problems or unlike_folds(a, b)


def unlike_folds(a: Run, b: Run) -> list[str]:
    """Folds that one run lacks, and slides with another part in them."""
    folds_a, folds_b = parts_of(a), parts_of(b)
    problems = []
    for here, there, only in ((a, b, set(folds_a) - set(folds_b)), (b, a, set(folds_b) - set(folds_a))):
        if only:
            names = [f"repeat {r} fold {f}" for r, f in sorted(only)]
            problems.append(f"only in {here.name}, not in {there.name}: {name_some(names)}")
    for repeat, fold in sorted(set(folds_a) & set(folds_b)):
        x, y = folds_a[repeat, fold].align(folds_b[repeat, fold])
        wrong = x.index[x != y]
        if len(wrong):
            problems.append(
                f"{b.name}: repeat {repeat} fold {fold}: {count(len(wrong), 'slide')} in another part than in "
                f"{a.name}, such as {wrong[0]!r}: {x[wrong[0]]} there, {y[wrong[0]]} here"
            )
    return problems


def parts_of(run: Run) -> dict[tuple[int, int], pd.Series]:
    """(repeat, fold) -> the part of every slide: test, training (train or val) or unused."""
    table = run.predictions.assign(part=run.predictions["role"].replace({"train": "training", "val": "training"}))
    table = table.drop_duplicates(["repeat", "fold", "slide"])
    rounds = table[["repeat", "fold"]].drop_duplicates().to_numpy(dtype=np.int64).tolist()
    found = {}
    for repeat, fold in rounds:
        own = table[(table["repeat"] == repeat) & (table["fold"] == fold)]
        found[repeat, fold] = own.set_index("slide")["part"].sort_index()
    return found


# --- differences ---------------------------------------------------------------------------------------------------


def differences(runs: Sequence[Run], *, intervals: bool = True) -> pd.DataFrame:
    """One row a pair of runs and set (out-of-fold, test ensemble): the difference in AUC, its interval, DeLong's p.

    Columns: set, a, b, auc_a, auc_b, difference (a - b), low, high (95 %, paired; none without `intervals`), method (a
    key of `mil.tasks.estimates.METHODS`), trainings (the fewer of both runs'; from 3 on their variance is in the
    interval, see `mil.results.trainings`), delong_z, delong_p (two classes only, patients as clusters), slides,
    patients.
    """
    classes = runs[0].metrics["classes"]
    rows = []
    for name, table_of in SETS.items():
        tables = [table_of(r.predictions, classes, member_thresholds(r.predictions, classes)) for r in runs]
        tables = [table[table["label"] >= 0].set_index("slide").sort_index() for table in tables]
        if any(table.empty for table in tables):
            continue
        held = [r.predictions[r.predictions["role"] == "test"] for r in runs]
        trained = [trainings_of(h, t.index.tolist(), classes) for h, t in zip(held, tables, strict=True)]
        for i, j in combinations(range(len(runs)), 2):
            numbers = difference(tables[i], tables[j], trained[i], trained[j], len(classes), intervals=intervals)
            rows.append({"set": name, "a": runs[i].name, "b": runs[j].name, **numbers})
    return pd.DataFrame(rows)


def difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    trained_a: Trainings,
    trained_b: Trainings,
    n_classes: int,
    *,
    intervals: bool,
) -> dict[str, Any]:
    """Two tables of the same slides -> the numbers of one row of `differences`; None where undefined."""
    labels_S, patients = a["label"].to_numpy(dtype=np.int64), a["patient"].tolist()
    names = p_columns([str(c) for c in range(n_classes)])
    p_a_SC, p_b_SC = (table[names].to_numpy(dtype=np.float64) for table in (a, b))
    trainings = min(len(trained_a), len(trained_b))
    size = {"trainings": trainings, "slides": len(a), "patients": len(set(patients))}
    if not (np.isfinite(p_a_SC).all() and np.isfinite(p_b_SC).all()):
        keys = ("auc_a", "auc_b", "difference", "low", "high", "method", "delong_z", "delong_p")
        return dict.fromkeys(keys) | size

    auc_a, auc_b = (auc_estimate(labels_S, p_SC, patients) for p_SC in (p_a_SC, p_b_SC))
    if trainings >= FEWEST:
        gap = difference_with_training(labels_S, trained_a, trained_b, patients)
    else:
        gap = auc_difference(labels_S, p_a_SC, p_b_SC, patients)
    test = delong(labels_S, p_a_SC[:, 1], p_b_SC[:, 1], patients) if n_classes == 2 else None
    return {
        "auc_a": auc_a.value,
        "auc_b": auc_b.value,
        "difference": gap.value,
        "low": gap.low if intervals else None,
        "high": gap.high if intervals else None,
        "method": gap.method if intervals else None,
        "delong_z": None if test is None else test.z,
        "delong_p": None if test is None else test.p_value,
        **size,
    }
