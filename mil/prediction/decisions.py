"""A study's calibration, operating points and conformal sets on new slides.

Axes: S slides, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from extract.wording import name_some
from mil.config import Report
from mil.prediction.job import Job
from mil.results.conformal import fewest_patients
from mil.results.decision_blocks import calibration_block, conformal_block, operating_block
from mil.results.decisions import FILE, TEST, called_columns, judge, slide_columns
from mil.results.task_conformal import said_columns
from mil.results.task_summary import ensemble


def coverage_of(job: Job) -> float:
    """As asked for, else the study's."""
    asked, decisions = job.config.report.coverage, job.trained.decisions
    return decisions.conformal.coverage if asked is None and decisions is not None else asked or Report().coverage


def task_coverage(job: Job) -> float:
    """The same of a task other than classification."""
    asked, scores = job.config.report.coverage, job.trained.conformal
    return scores.coverage if asked is None and scores is not None else asked or Report().coverage


def with_task_decisions(job: Job, table: pd.DataFrame, members: pd.DataFrame) -> pd.DataFrame:
    """A row a slide, with the study's conformal interval (`low`, `high`) or set at the end, where it has one."""
    scores, task = job.trained.conformal, job.trained.task
    if scores is None or scores.fitted_on == "nothing" or members.empty:
        return table
    one = ensemble(task, members).set_index("slide").loc[table["slide"]]
    said = said_columns(task, scores, one, task_coverage(job))
    return table.assign(**{str(name): said[name].to_numpy() for name in said})


def decided_columns(job: Job, members: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame | None:
    """One row a slide, index slide: `calibrated_NAME` for each of `names`, and `conformal_set`.

    None for a study of an older version, which decided nothing, or without slides.
    """
    decisions = job.trained.decisions
    if decisions is None or members.empty:
        return None
    return slide_columns(decisions, judge(decisions, members), coverage_of(job), names)


def with_decisions(job: Job, table: pd.DataFrame, members: pd.DataFrame) -> pd.DataFrame:
    """A row a slide, with what is decided of it at the end: also `at_POINT`, the class called there."""
    decisions, classes = job.trained.decisions, job.trained.classes
    if decisions is None or members.empty:
        return table
    judged = judge(decisions, members)
    columns = slide_columns(decisions, judged, coverage_of(job), classes)
    return table.join(called_columns(judged, classes), on="slide").join(columns, on="slide")


def blocks_on(job: Job, members: pd.DataFrame) -> dict[str, Any]:
    """The report's blocks on the slides that metrics count."""
    decisions, rows = job.trained.decisions, members[members["role"] == "test"]
    if decisions is None or rows.empty:
        return {}
    sets = {TEST: judge(decisions, rows)}
    blocks = {
        "calibration": calibration_block(decisions, sets),
        "operating_points": operating_block(decisions, sets, job.config.report.prevalences),
        "conformal": conformal_block(decisions, sets, coverage_of(job)),
    }
    return {name: block for name, block in blocks.items() if block is not None}


def tell_what_is_decided(job: Job) -> None:
    """What a study did not decide, and sets that can rule nothing out, as notes."""
    decisions = job.trained.decisions
    if decisions is None:
        job.notes.append(f"the study has no {FILE} (an older version): no calibration, operating points or sets")
        return
    if decisions.conformal.fitted_on == "nothing":
        job.notes.append("no conformal sets: the study has neither out-of-fold nor val predictions to take scores from")
        return
    needed = fewest_patients(coverage_of(job))
    short = [name for name, scores in decisions.conformal.of_class.items() if len(scores) < needed]
    if short:
        job.notes.append(
            f"conformal sets always hold {name_some(short)}: the study has too few patients of it to rule it out"
        )
