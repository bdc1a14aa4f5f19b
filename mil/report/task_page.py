"""What a task other than classification shows: metrics.json, slides.csv, patients.csv, subgroups.csv (where there are
sub-groups), figures/*.png, report.html, model-card.md, checklists.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.tables import write_csv
from extract.whole import write_whole
from mil.report.page import MOST_WRONG, Documents, environment_rows, render, shown_figures, shown_sections
from mil.report.task_figures import Shown, drawn_figures
from mil.results.published import published
from mil.results.subgroups import subgroups_table
from mil.results.tables import NEVER_HELD_OUT, OUT_OF_FOLD, TEST_ENSEMBLE
from mil.results.task_summary import ensemble_parts, fold_parts, summarise_task, task_patients, task_slides
from mil.study.units import by_slide
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
    drawn_by: Sequence[str] = ("run=.",),
    slide_columns: pd.DataFrame | None = None,
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
    shown_notes = [shown_text(note) for note in notes]
    documents = Documents.of(title, metrics, config_yaml, environment, shown_notes, shown_text)
    page = render(
        "task",
        metrics,
        title=title,
        titles=metrics["metric_titles"],
        sections=shown_sections(folder, metrics),
        figures=shown_figures(folder, drawn_figures(task.name, Shown(metrics, held_out, history))),
        notes=shown_notes,
        model_card=documents.card,
        checklists=documents.lists,
        slides=listed_slides(task, slides),
        drawn_by=[shown_text(part) for part in drawn_by],
        config_yaml=shown_text(config_yaml),
        environment=environment_rows(environment, shown_text),
        heatmaps=list(heatmaps),
        members_file=members_file,
        never_trained_on=never_trained_on,
    )
    all_columns = slides if slide_columns is None else slides.join(slide_columns, on="slide")
    if "subgroups" in metrics:
        write_csv(subgroups_table(metrics["subgroups"], tuple(task.metrics)), folder / "subgroups.csv")
    for file, table in (
        ("slides.csv", by_slide(all_columns, predictions.drop_duplicates("slide"))),
        ("patients.csv", task_patients(task, slides)),
    ):
        write_csv(table, folder / file)
    write_whole(folder / "report.html", page)
    documents.write(folder)
    # last: without it a run is not finished
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return metrics


def listed_slides(task: Task, slides: pd.DataFrame) -> list[dict[str, Any]]:
    """The slides that the page lists: the most wrong, or, where no slide alone is wrong, the highest and the lowest."""
    rows = slides[slides["kind"] != NEVER_HELD_OUT].reset_index(drop=True)
    if rows.empty:
        return []
    said = task.for_reader(rows)
    own = pd.concat([rows.drop(columns=[name for name in said if name in rows]), said], axis=1)
    known = [{str(k): v for k, v in row.items()} for row in own.to_dict("records")]
    errors, number = task.error(rows), task.one_number(rows)
    wrong = np.isfinite(errors).any()
    order = np.argsort(np.nan_to_num(-errors, nan=np.inf), kind="stable") if wrong else ends_of(number)
    return [
        {
            **{name: known[i][name] for name in ("slide", "patient", "kind", "members")},
            "truth": task.truth(known[i]),
            "said": task.said(known[i]),
            "error": float(errors[i]) if wrong else None,
        }
        for i in order[:MOST_WRONG].tolist()
        if np.isfinite(errors[i] if wrong else number[i])
    ]


def ends_of(number_N: np.ndarray) -> np.ndarray:
    """Rows with the highest numbers first, the lowest behind them, half of `MOST_WRONG` each."""
    order = np.argsort(np.nan_to_num(-number_N, nan=np.inf), kind="stable")[: int(np.isfinite(number_N).sum())]
    half = MOST_WRONG // 2
    return order if len(order) <= MOST_WRONG else np.concatenate([order[:half], order[-half:]])
