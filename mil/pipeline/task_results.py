"""The third chapter for tasks other than classification: predictions become tables, metrics and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from mil.config import StudyConfig
from mil.pipeline.blocks import Done, blocks_of
from mil.pipeline.folder import resolved_yaml
from mil.pipeline.results import heatmaps_of
from mil.pipeline.task_baselines import save_task_baselines
from mil.report.sections import warnings_in
from mil.report.task_page import write_task_report
from mil.results.task_conformal import write_task_scores
from mil.training.objectives import notes_on_batches


def write_task(
    done: Done,
    name: str,
    whole: StudyConfig,
    folder: Path,
    environment: dict[str, Any],
    choices: pd.DataFrame | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write the tables, figures, page and metrics.json of one aggregator; give the metrics."""
    study, trained = done.study, done.trained
    config, task = study.config, study.task
    save_task_baselines(study, trained.plan, folder)
    write_task_scores(folder, done.scores)
    also = more | blocks_of(done)
    study.check_place()
    notes = [*warnings_in(also), *study.notes]
    if task.name == "survival" and task.config.loss != "discrete":
        train_MS = trained.plan.uses("train")
        notes += notes_on_batches(
            study.cohort, train_MS, config.train.batch_size, config.seed, int(done.plan["epochs"].max())
        )  # fmt: skip
    heatmaps, about_heatmaps = heatmaps_of(study, folder, done.plan, done.predictions, environment)
    return write_task_report(
        folder,
        task,
        title=f"{config.out.name if config.out else 'study'}: {name}",
        predictions=done.predictions,
        plan=done.plan,
        history=trained.history,
        about=task.about(study.cohort),
        config_yaml=resolved_yaml(whole),
        environment=environment,
        choices=choices,
        notes=[*notes, *about_heatmaps],
        heatmaps=heatmaps,
        also=also,
        resamples=config.report.bootstrap,
        seed=config.seed,
        paths=config.report.paths,
        slide_columns=done.task_slide_columns(),
    )
