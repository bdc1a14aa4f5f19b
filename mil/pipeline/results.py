"""The third chapter: what training leaves becomes tables, pictures and metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mil.config import model_options
from mil.look.scenes import for_report
from mil.pipeline.data import Study, cells_of
from mil.pipeline.training import Trained
from mil.report.left_out_sites import left_out_block
from mil.report.task_left_out_sites import task_left_out_block
from mil.results.learning_curve import summarise_curve, summarise_task_curve, write_curve
from mil.results.permutations import held_out_aucs, held_out_metrics, null_distributions
from mil.results.tables import member_thresholds, predictions_table
from mil.results.task_summary import task_predictions
from mil.results.trained import TrainedStudy
from mil.study.learning_curve import ALL
from mil.study.roles import ROLES
from mil.study.units import COLUMN
from mil.tasks.contract import Facts
from mil.training.members import Description, load_members


def report_curve(study: Study, full: Trained, smaller: Trained, folder: Path) -> dict[str, Any]:
    """Write what the members on fewer patients leave; their block for metrics.json, beside the full members."""
    assert study.curve is not None
    smaller = replace(smaller, plan=study.curve)  # which knows the sizes
    plans, parts = [full.plan_table().assign(train_size=ALL), smaller.plan_table()], (full, smaller)
    predicted = [predictions_of(study, part, facts_of(study, part)) for part in parts]
    write_curve(folder, plans[1], predicted[1], smaller.history)
    both = pd.concat(plans, ignore_index=True)
    table, equal = pd.concat(predicted, ignore_index=True), study.config.study.train_sizes_equal
    if study.task.name != "classification":
        return summarise_task_curve(study.task, both, table, equal=equal)
    return summarise_curve(both, table, study.cohort.classes, equal=equal)


def report_left_out(study: Study, full: Trained, without: Trained) -> dict[str, Any]:
    """The block of the members that left a site out, beside the study's own."""
    assert study.sites_out is not None
    site_of = dict(zip(without.plan.members["member"].tolist(), study.sites_out.site_M, strict=True))
    if study.task.name != "classification":
        left_out, chosen = (predictions_of(study, part, facts_of(study, part)) for part in (without, full))
        why, report = study.sites_out.not_left_out, study.config.report
        how: dict[str, Any] = {"not_left_out": why, "resamples": report.bootstrap, "seed": study.config.seed}
        return task_left_out_block(study.task, left_out, chosen, site_of, **how)
    return left_out_block(
        predictions_of(study, without),
        predictions_of(study, full),
        site_of,
        study.cohort.classes,
        not_left_out=study.sites_out.not_left_out,
        resamples=study.config.report.bootstrap,
        seed=study.config.seed,
    )


def permutation_test(study: Study, trained: Trained, logits_MSC: np.ndarray) -> dict[str, Any]:
    """The study's AUC (of other tasks their main metric) beside those of its permutations, whose members' logits these
    are."""
    permuted, cohort = study.permuted, study.cohort
    assert permuted is not None
    null = []
    for k in range(permuted.n):
        rows = permuted.rows(k)
        part = replace(trained, plan=permuted.plan.subset(rows), logits_MSC=logits_MSC[rows])
        null.append(reached(replace(study, cohort=permuted.cohort(cohort, k)), part))
    inner = study.config.study.nested * len(cells_of(study.config))
    word = "labels" if study.task.name == "classification" else "targets"
    return null_distributions(reached(study, trained), null, members=len(permuted.plan) * (1 + inner), word=word)


def reached(study: Study, trained: Trained) -> dict[str, float]:
    """The number that the permutation test compares, of every set of held-out slides."""
    predictions = predictions_of(study, trained, facts_of(study, trained))
    if study.task.name == "classification":
        return held_out_aucs(predictions, study.cohort.classes)
    return held_out_metrics(study.task, predictions)


def describe(study: Study, name: str, facts: Facts) -> Description:
    """What `members.safetensors` needs to rebuild the aggregator, and to make predictions of its outputs."""
    first = next(iter(study.headers.values()))
    return Description(
        aggregator=name,
        options=model_options(study.config.model, name),
        in_dim=study.bags.dim,
        classes=list(study.cohort.classes),
        seeds=study.plan.members["init_seed"].tolist(),
        standardized=study.config.train.standardize,
        features=first.provenance.same_kind(),
        harmonized=study.config.train.harmonize,
        sites=study.sites if study.config.train.harmonize != "none" else [],
        task=study.task.config.model_dump(mode="json"),
        facts={name: values.tolist() for name, values in facts.items()},
        covariates=[one.describe() for one in study.covariates],
        fused=study.widths,
    )


def facts_of(study: Study, trained: Trained) -> Facts:
    """What the members' training slides say; {} for classes."""
    if study.task.name == "classification":
        return {}
    train_MS = trained.plan.uses("train")
    before = study.task.facts(study.cohort, train_MS)
    return study.task.facts_after(study.cohort, train_MS, trained.logits_MSC, before)


def predictions_of(study: Study, trained: Trained, facts: Facts | None = None) -> pd.DataFrame:
    """One row a member and slide."""
    roles_MS = np.array(ROLES, dtype=object)[trained.plan.roles_MS]
    if study.task.name != "classification":
        of_task = (study.task, trained.plan.members, study.cohort.table, roles_MS, trained.logits_MSC, facts or {})
        return task_predictions(*of_task)
    return predictions_table(trained.plan.members, study.cohort.table, roles_MS, trained.logits_MSC)


def heatmaps_of(
    study: Study, folder: Path, plan: pd.DataFrame, predictions: pd.DataFrame, environment: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The report's slides with their tile scores, by the members just saved, and notes on what could not be shown."""
    aggregator, description = load_members(folder)
    classes = study.task.name == "classification"
    thresholds = member_thresholds(predictions, description.classes) if classes else pd.DataFrame()
    kept = [name for name in ("slide", "patient", COLUMN, "site") if name in study.cohort.table]
    roles = study.cohort.table.loc[:, kept]  # the report's heatmaps ask for no roles
    cpu = torch.device("cpu")
    trained = TrainedStudy(folder, study.config, aggregator, description, plan, roles, thresholds, {}, environment, cpu)
    return for_report(trained, study.config.report.heatmaps)
