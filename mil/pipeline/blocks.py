"""BLOCKS: what a study says of itself beside its metrics, a block in metrics.json each and a section of the report.

To add one: a function of what is `Done`, a line in BLOCKS, and the section (`mil.report.sections`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from mil.pipeline.baselines import baselines_block
from mil.pipeline.confounding import confounding_of
from mil.pipeline.covariates import covariates_block
from mil.pipeline.data import Study
from mil.pipeline.fusion import Fusion, fusion_block
from mil.pipeline.task_baselines import task_baselines
from mil.pipeline.training import Trained
from mil.results.decision_blocks import calibration_block, conformal_block, operating_block
from mil.results.decisions import Decisions, Judged, fit_decisions, judge_study, slide_columns
from mil.results.flow import flow_of, seen_before
from mil.results.subgroups import subgroups_block
from mil.results.tables import held_out_ensemble, member_thresholds, pooled_out_of_fold
from mil.results.task_calibration import task_calibration
from mil.results.task_conformal import TaskScores, fit_task_scores, task_conformal_blocks
from mil.results.task_conformal import slide_columns as task_slide_columns
from mil.results.task_subgroups import scored_sets, task_subgroups
from mil.study.subgroups import named_groups
from mil.study.units import by_slide


@dataclass(frozen=True)
class Done:
    """A trained study: what blocks may look at. `plan` and `predictions` are plan.csv and predictions.csv.

    name: of the aggregator. folder: its run folder. fusion: of several encoders' members.
    """

    study: Study
    trained: Trained
    plan: pd.DataFrame
    predictions: pd.DataFrame
    name: str = ""
    folder: Path | None = None
    fusion: Fusion | None = None

    @cached_property
    def decisions(self) -> Decisions:
        """Calibration, operating points and conformal scores, as decisions.json holds them."""
        config = self.study.config
        return fit_decisions(self.predictions, self.study.cohort.classes, config.report, config.seed)

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """The slides that the study says something honest of, with what those decisions say."""
        config = self.study.config
        return judge_study(self.decisions, self.predictions, config.report.operating_points, config.seed)

    @cached_property
    def scores(self) -> TaskScores | None:
        """What conformal.json holds of a task other than classification."""
        config = self.study.config
        return fit_task_scores(self.study.task, self.predictions, config.report.coverage, config.seed)

    @cached_property
    def conformal(self) -> dict[str, dict[str, Any]]:
        """The blocks that follow from it, by their names."""
        return task_conformal_blocks(self.study.task, self.scores, self.predictions, self.study.config.seed)

    def task_slide_columns(self) -> pd.DataFrame | None:
        """What slides.csv holds of them: `low` and `high`, or `conformal_set`."""
        if self.scores is None:
            return None
        return task_slide_columns(self.study.task, self.scores, self.predictions, self.study.config.seed)

    def slide_columns(self) -> pd.DataFrame | None:
        """What slides.csv holds of them: `calibrated_0`, ... and `conformal_set`; None without any such slide."""
        coverage, names = self.study.config.report.coverage, [str(c) for c in range(len(self.decisions.classes))]
        parts = [slide_columns(self.decisions, one, coverage, names) for one in self.judged.values()]
        return pd.concat(parts) if parts else None


def subgroups(done: Done) -> dict[str, Any] | None:
    """`report.subgroups` on the cross-validated slides and on the test split."""
    config, cohort = done.study.config, done.study.cohort
    if not config.report.subgroups or cohort.further is None:
        return None
    groups = named_groups(config.report.subgroups, cohort.table["slide"].tolist(), cohort.further)
    if done.study.task.name != "classification":
        scored = scored_sets(done.study.task, done.predictions)
        return task_subgroups(done.study.task, groups, scored, config.report.bootstrap, config.seed)
    thresholds = member_thresholds(done.predictions, cohort.classes)
    makers = {"cross_validated": pooled_out_of_fold, "test": held_out_ensemble}
    tables = {name: make(done.predictions, cohort.classes, thresholds) for name, make in makers.items()}
    return subgroups_block(groups, tables, cohort.classes, config.report.bootstrap, config.seed)


def baselines(done: Done) -> dict[str, Any] | None:
    """The ladder of baselines on the same folds."""
    name, resamples = done.study.config.model.names[0], done.study.config.report.bootstrap
    if done.study.task.name != "classification":
        return task_baselines(done.study, done.trained.plan, done.predictions, done.name or name)
    return baselines_block(done.study, done.trained.plan, done.predictions, name, resamples)


def encoder_seen(done: Done) -> dict[str, Any]:
    """What the encoder of the features was pre-trained on, beside the barcodes of the cohort."""
    return seen_before(by_slide(done.study.cohort.table), str(done.study.environment["features"].get("encoder") or ""))


def flow(done: Done) -> dict[str, Any]:
    """From the table of slides to what trained and what was scored."""
    study = done.study
    return flow_of(study.cohort, study.dropped, done.trained.plan, study.bags.lengths_S)


def covariates(done: Done) -> dict[str, Any] | None:
    """The study with covariates, without, and they alone."""
    return covariates_block(done.study, done.trained, done.predictions, done.name, done.folder)


def fusion(done: Done) -> dict[str, Any] | None:
    """Each encoder alone, all columns, and fused."""
    if done.fusion is None or done.folder is None:
        return None
    return fusion_block(done.study, done.trained, done.predictions, done.name, done.folder, done.fusion)


BLOCKS: dict[str, Callable[[Done], dict[str, Any] | None]] = {
    "flow": flow,
    "encoder_seen": encoder_seen,
    "baselines": baselines,
    "calibration": lambda done: calibration_block(done.decisions, done.judged),
    "operating_points": lambda done: operating_block(done.decisions, done.judged, done.study.config.report.prevalences),
    "conformal": lambda done: conformal_block(done.decisions, done.judged, done.study.config.report.coverage),
    "confounding": lambda done: confounding_of(done.study, done.trained.plan, done.predictions),
    "subgroups": subgroups,
    "covariates": covariates,
    "fusion": fusion,
}
"""Name of the block in metrics.json -> what makes it; None where there is nothing to say."""
OF_TASKS: dict[str, Callable[[Done], dict[str, Any] | None]] = {
    **{name: BLOCKS[name] for name in ("flow", "encoder_seen", "baselines")},
    "task_calibration": lambda done: task_calibration(done.study.task, done.predictions),
    "conformal": lambda done: done.conformal.get("conformal"),
    "conformal_intervals": lambda done: done.conformal.get("conformal_intervals"),
    **{name: BLOCKS[name] for name in ("confounding", "subgroups", "covariates", "fusion")},
}
"""The same for tasks other than classification."""


def blocks_of(done: Done) -> dict[str, dict[str, Any]]:
    """The blocks that have something to say."""
    blocks = BLOCKS if done.study.task.name == "classification" else OF_TASKS
    made = {name: make(done) for name, make in blocks.items()}
    return {name: block for name, block in made.items() if block is not None}
