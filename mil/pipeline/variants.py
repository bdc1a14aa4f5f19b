"""The study beside what it would be otherwise: other members on the same folds, the same slides held out, in pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mil.pipeline.data import Study
from mil.report.comparison import Run, differences
from mil.report.ladder import SETS, plain, scores_of
from mil.results.task_differences import paired
from mil.results.task_summary import ensemble_parts, fold_parts, metrics_with_intervals
from mil.tasks.metrics import METRICS

SETS_OF_TASKS = {"out_of_fold": fold_parts, "test": ensemble_parts}


@dataclass(frozen=True)
class Variant:
    """What else the study could be. predictions: as predictions.csv has them, of the same members and slides."""

    key: str
    title: str
    predictions: pd.DataFrame


def variants_block(study: Study, own: Variant, others: list[Variant], warnings: list[str]) -> dict[str, Any]:
    """What metrics.json holds: a row a variant, `own` first; of the others the difference own - other.

    Each row: name, title and, of the sets that have slides (out_of_fold, test), `metric` (value, low, high) and
    `difference` (difference, low, high), None where there is none.
    """
    rows = _of_classes(study, own, others) if study.task.name == "classification" else _of_task(study, own, others)
    title = METRICS["auc"].title if study.task.name == "classification" else study.task.metrics[study.task.main].title
    sets = [name for name in SETS if any(name in row for row in rows)]
    return {"metric_title": title, "own": own.title, "sets": sets, "rows": rows, "warnings": warnings}


def _of_classes(study: Study, own: Variant, others: list[Variant]) -> list[dict[str, Any]]:
    classes, resamples, rows = study.cohort.classes, study.config.report.bootstrap, []
    first = Run(own.key, Path(), own.predictions, {"classes": classes})
    for one in [own, *others]:
        scored = scores_of(one.predictions, classes, resamples, study.config.seed)
        found: dict[str, Any] = {
            where: {"metric": part["metrics"]["auc"], "difference": None} for where, part in scored.items()
        }
        if one is not own:
            run = Run(one.key, Path(), one.predictions, {"classes": classes})
            for row in differences([first, run], intervals=resamples > 0).to_dict("records"):
                where = next(name for name, (text, _) in SETS.items() if text == row["set"])
                found[where]["difference"] = plain(row)
        rows.append({"name": one.key, "title": one.title, **found})
    return rows


def _of_task(study: Study, own: Variant, others: list[Variant]) -> list[dict[str, Any]]:
    task, resamples, seed, rows = study.task, study.config.report.bootstrap, study.config.seed, []
    for one in [own, *others]:
        found: dict[str, Any] = {}
        for where, parts_of in SETS_OF_TASKS.items():
            parts, own_parts = parts_of(task, one.predictions), parts_of(task, own.predictions)
            if parts:
                metric = metrics_with_intervals(task, parts, resamples, seed)[task.main]
                gap = None if one is own else paired([(task, own_parts), (task, parts)], resamples, seed)[0]
                found[where] = {"metric": metric, "difference": gap}
        rows.append({"name": one.key, "title": one.title, **found})
    return rows
