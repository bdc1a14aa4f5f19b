"""What a task other than classification shows: metrics.json, slides.csv, patients.csv, figures/*.png, report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from extract.tables import write_csv
from extract.whole import write_whole
from mil.report.page import environment_rows, render, shown_figures, shown_sections
from mil.report.task_figures import Shown, drawn_figures
from mil.results.published import published
from mil.results.tables import OUT_OF_FOLD, TEST_ENSEMBLE
from mil.results.task_summary import ensemble_parts, fold_parts, summarise_task, task_patients, task_slides
from mil.tasks.contract import Task


def write_task_report(
    folder: Path,
    task: Task,
    *,
    title: str,
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    history: pd.DataFrame,
    about: dict[str, Any],
    config_yaml: str,
    environment: dict[str, Any],
    notes: Sequence[str] = (),
    heatmaps: Sequence[dict[str, Any]] = (),
    choices: pd.DataFrame | None = None,
    resamples: int = 1000,
    seed: int = 0,
    paths: bool = False,
    training: pd.DataFrame | None = None,
    members_file: str = "predictions.csv",
    never_trained_on: bool = True,
    also: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what a study of this task shows into `folder`; give the metrics.

    Arguments: as `mil.report.page.write_report` has them, and
        training: the slides that the members were trained on, where `predictions` are of new ones.
    """
    shown_text: Callable[[str], str] = str if paths else partial(published, folder=folder)
    metrics = summarise_task(
        task, predictions, plan, about, resamples=resamples, seed=seed, choices=choices, training=training
    )
    metrics |= dict(also or {})
    sets = {
        OUT_OF_FOLD: fold_parts(task, predictions, training),
        TEST_ENSEMBLE: ensemble_parts(task, predictions, training),
    }
    held_out = {name: pd.concat([part.table for part in parts]) for name, parts in sets.items() if parts}
    slides = task_slides(task, predictions)
    page = render(
        "task",
        metrics,
        title=title,
        titles=metrics["metric_titles"],
        sections=shown_sections(folder, metrics),
        figures=shown_figures(folder, drawn_figures(task.name, Shown(metrics, held_out, history))),
        notes=[shown_text(note) for note in notes],
        config_yaml=shown_text(config_yaml),
        environment=environment_rows(environment, shown_text),
        heatmaps=list(heatmaps),
        members_file=members_file,
        never_trained_on=never_trained_on,
    )
    for file, table in (("slides.csv", slides), ("patients.csv", task_patients(task, slides))):
        write_csv(table, folder / file)
    write_whole(folder / "report.html", page)
    # last: without it a run is not finished
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return metrics
