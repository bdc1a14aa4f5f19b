"""The study beside what it would be otherwise: other members on the same folds, the same slides held out, in pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mil.pipeline.data import Study
from mil.report.comparison import Run, differences
from mil.report.ladder import SETS, plain, scores_of
from mil.results.paired import paired
from mil.tasks.metrics import METRICS


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
    resamples, rows = study.config.report.bootstrap, []
    for one in [own, *others]:
        pairs = paired(study.task, own.predictions, one.predictions, resamples, study.config.seed)
        found: dict[str, Any] = {}
        for where, pair in pairs.items():
            gap = {"difference": pair["difference"]["value"], "low": pair["difference"]["low"]}
            gap |= {"high": pair["difference"]["high"], "patients": pair["patients"]}
            found[where] = {"metric": pair["b"], "difference": None if one is own else gap}
        rows.append({"name": one.key, "title": one.title, **found})
    return rows
