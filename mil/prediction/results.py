"""What a prediction leaves: tables, report, environment, and the lines for the terminal."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from extract.cohort import Cohort
from extract.config import main_table, to_yaml
from extract.features.cache import toolkit_version
from extract.tables import write_csv
from extract.whole import write_whole
from extract.wording import count, name_some
from mil.prediction.blocks import Predicted, blocks_of
from mil.prediction.decisions import (
    decided_columns,
    tell_what_is_decided,
    with_decisions,
    with_task_decisions,
)
from mil.prediction.folder import CONFIG, ENVIRONMENT, FAILED, MEMBERS, PREDICTIONS, remove_written
from mil.prediction.job import Job, Outcome, Scored
from mil.prediction.slides import HELD_OUT, TRAINED_ON, patients_in_study
from mil.prediction.task_blocks import task_blocks_of
from mil.prediction.task_results import (
    has_targets,
    task_counts,
    task_member_rows,
    task_report,
    task_slide_lines,
    task_slide_rows,
)
from mil.report.page import write_report
from mil.report.sections import warnings_in
from mil.report.wording import terminal_table
from mil.results.published import write_environment
from mil.results.tables import mean_of_logits, p_columns, predictions_table
from mil.results.trained import TrainedStudy
from mil.study.units import COLUMN
from mil.tasks.metrics import decide

SHOWN = 12
"""Slides that the terminal lists one by one."""


def write(job: Job, cohort: Cohort, scored: Scored, asked: Cohort) -> Outcome:
    """All files of OUT. asked: the table of slides, of which those of a patient may be one row of `cohort`."""
    trained, out = job.trained, job.out
    in_study = dict(zip(cohort.table["slide"], patients_in_study(trained, cohort), strict=True))
    members = member_rows(job, cohort, scored, in_study)
    n_tiles = dict(zip(scored.slides, scored.n_tiles, strict=True))
    if trained.of_classes:
        table = with_decisions(job, slide_rows(trained, cohort, members, n_tiles, in_study), members)
    else:
        table = with_task_decisions(job, task_slide_rows(trained, cohort, members, n_tiles, in_study), members)
    tell_what_is_known(job, table)
    if trained.of_classes:
        tell_what_is_decided(job)
    out.mkdir(parents=True, exist_ok=True)
    remove_written(out)
    try:
        metrics = write_files(Predicted(job, cohort, scored, members, asked), table, in_study)
    except BaseException:
        remove_written(out)  # all of a prediction or nothing: the same command may follow
        raise
    return Outcome(out, trained.task, table, job.failed, job.warnings, job.notes, metrics)


def write_files(done: Predicted, table: pd.DataFrame, in_study: dict[str, str]) -> dict[str, Any] | None:
    """All files of OUT; the metrics where there are labels. predictions.csv is last: without it nothing is finished."""
    job, members, out = done.job, done.members, done.job.out
    config_yaml = to_yaml(job.config.model_copy(update={"overwrite": False, "out": out}))
    write_whole(out / CONFIG, config_yaml)
    environment = describe_environment(job)
    write_environment(out, environment, ENVIRONMENT, full=job.config.report.paths)
    write_csv(members, out / MEMBERS)
    if job.failed:
        write_csv(pd.DataFrame([vars(failure) for failure in job.failed]), out / FAILED)
    labelled = job.config.cohort is not None and has_targets(job.trained.task, members)
    metrics = report(done, in_study, config_yaml, environment) if labelled else None
    write_csv(table, out / PREDICTIONS)
    return metrics


def report(done: Predicted, in_study: dict[str, str], config_yaml: str, environment: dict[str, Any]) -> dict[str, Any]:
    """Metrics and the page that shows them."""
    job, members, trained = done.job, done.members, done.job.trained
    assert job.config.cohort is not None
    never_trained_on = job.config.known_patients == "leave_out" or TRAINED_ON not in in_study.values()
    if not trained.of_classes:
        also = task_blocks_of(done)
        return task_report(job, members, config_yaml, environment, never_trained_on, also)
    also = blocks_of(done)
    return write_report(
        job.out,
        title=f"{trained.name} on {main_table(job.config.cohort).stem}",
        predictions=members,
        plan=trained.plan,
        history=pd.DataFrame(),
        classes=trained.classes,
        config_yaml=config_yaml,
        environment=environment,
        notes=[*warnings_in(also), *job.warnings, *job.notes],
        bootstrap=job.config.report.bootstrap,
        seed=trained.config.seed,
        thresholds=trained.thresholds,
        members_file=MEMBERS,
        paths=job.config.report.paths,
        drawn_by=(f"run={trained.folder}", f"features.folder={job.said_folders}"),
        never_trained_on=never_trained_on,
        also=also,
        slide_columns=decided_columns(job, members, [str(c) for c in range(len(trained.classes))]),
    )


def member_rows(job: Job, cohort: Cohort, scored: Scored, in_study: dict[str, str]) -> pd.DataFrame:
    """members.csv: one row a member and slide, as in a run's predictions.csv.

    Role "test" is what metrics count. A slide of a patient that the study trained on has "train" instead, unless
    known_patients=score.
    """
    left_out = (TRAINED_ON,) if job.config.known_patients == "leave_out" else ()
    rows = cohort.table.set_index("slide", drop=False).loc[scored.slides].reset_index(drop=True)
    roles_S = np.array(["train" if in_study[slide] in left_out else "test" for slide in scored.slides], dtype=object)
    roles_MS = np.broadcast_to(roles_S, (job.trained.n_members, len(rows)))
    if not job.trained.of_classes:
        return task_member_rows(job.trained, rows, roles_MS, scored)
    return predictions_table(job.trained.plan, rows, roles_MS, scored.logits_MSC)


def slide_rows(
    trained: TrainedStudy, cohort: Cohort, members: pd.DataFrame, n_tiles: dict[str, int], in_study: dict[str, str]
) -> pd.DataFrame:
    """predictions.csv: slide, patient, label, p_NAME of every class, sd (over members, of the last of two classes or
    of the predicted one), threshold, predicted, members, n_tiles, in_study; in the order of the cohort."""
    names = p_columns(trained.classes)
    table = mean_of_logits(members, trained.classes, trained.thresholds).set_index("slide")
    order = [slide for slide in cohort.table["slide"] if slide in n_tiles]
    table = table.loc[order].reset_index()
    p_SC = table[names].to_numpy(dtype=np.float64)
    finite_S = np.isfinite(p_SC).all(axis=1)
    chosen = decide(p_SC, table["threshold"].to_numpy())
    listed = cohort.table.set_index("slide").loc[order]
    columns: dict[str, Any] = {
        "slide": table["slide"],
        "patient": table["patient"],
        **({COLUMN: listed[COLUMN].to_numpy()} if COLUMN in listed else {}),
        "label": pd.Series([trained.classes[c] if c >= 0 else None for c in table["label"]], dtype=object),
        **{f"p_{name}": p_SC[:, c] for c, name in enumerate(trained.classes)},
        "sd": table["sd"],
        "threshold": table["threshold"],
        "predicted": pd.Series(
            [trained.classes[c] if ok else None for c, ok in zip(chosen, finite_S, strict=True)], dtype=object
        ),
        "members": table["members"],
        "n_tiles": [n_tiles[slide] for slide in order],
        "in_study": [in_study[slide] for slide in order],
    }
    return pd.DataFrame(columns)


def tell_what_is_known(job: Job, table: pd.DataFrame) -> None:
    """Slides of patients that the study knows, and slides that failed."""
    counted = {"leave_out": ", so no metric counts them (see known_patients)", "score": ", and the metrics count them"}
    scored = counted[job.config.known_patients] if has_targets(job.trained.task, table) else ""
    for what, said, where in (
        (TRAINED_ON, f"the study trained on or selected with{scored}", job.warnings),
        (HELD_OUT, "the study held out as its test split", job.notes),
    ):
        rows = table[table["in_study"] == what]
        patients = rows["patient"].unique()
        if len(rows):
            slides = f"{count(len(rows), 'slide')} of {count(len(patients), 'patient')}"
            where.append(f"{slides} that {said}: {name_some(patients)}. Column in_study of {PREDICTIONS} marks them")
    if job.failed:
        failed = name_some(failure.slide for failure in job.failed)
        job.warnings.append(f"{count(len(job.failed), 'slide')} without a prediction, see {FAILED}: {failed}")


def describe_environment(job: Job) -> dict[str, Any]:
    """Where the numbers come from: this prediction, and the study behind it."""
    study = job.trained.environment
    return {
        "slide-mil": toolkit_version(),
        "command": " ".join(job.command),
        "started": job.began,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "device": str(job.trained.device),
        "study": {
            "folder": str(job.trained.folder),
            "aggregator": job.trained.description.aggregator,
            "members": job.trained.n_members,
            **{key: study[key] for key in ("slide-mil", "command", "started") if key in study},
        },
        "features": {"folder": job.said_folders, **job.trained.description.features},
    }


def outcome_text(outcome: Outcome) -> str:
    """The slides (a few, or how many of each class), metrics where there are labels, notes, and where the files are."""
    table, task = outcome.table, outcome.task
    lines = [f"warning: {text}" for text in outcome.warnings] + [f"note: {text}" for text in outcome.notes]
    of_classes = task.name == "classification"
    if len(table) <= SHOWN:
        lines += slide_lines(table, task.classes) if of_classes else task_slide_lines(task, table)
    elif of_classes:
        n = table["predicted"].value_counts()
        shown = ", ".join(f"{n.get(name, 0)} {name}" for name in task.classes)
        lines.append(f"{len(table)} slides, predicted: {shown}")
    else:
        lines.append(f"{len(table)} slides, predicted: {task_counts(task, table)}")
    if outcome.metrics is not None:
        lines += ["", terminal_table(outcome.metrics)]
    lines += ["", f"Predictions: {outcome.folder / PREDICTIONS}"]
    if outcome.metrics is not None:
        lines.append(f"Report: {outcome.folder / 'report.html'}")
    if outcome.failed:
        lines.append(f"Failed: {outcome.folder / FAILED}")
    return "\n".join(lines)


def slide_lines(table: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """`test_001  tumor 0.873 ± 0.041 over 5 members, threshold 0.431: tumor`, aligned."""
    width = max((len(slide) for slide in table["slide"]), default=0)
    shown = classes[-1:] if len(classes) == 2 else classes
    lines = []
    for row in table.to_dict("records"):
        text = ", ".join(f"{name} {row[f'p_{name}']:.3f}" for name in shown)
        spread = f" ± {row['sd']:.3f} over {row['members']} members" if row["members"] > 1 else ""
        threshold = f", threshold {row['threshold']:.3f}" if len(classes) == 2 else ""
        lines.append(f"{row['slide']:<{width}}  {text}{spread}{threshold}: {row['predicted']}")
    return lines
