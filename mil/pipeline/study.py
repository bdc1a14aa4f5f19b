"""One study from config to report, in the order things happen: data, checks, plan, training, predictions, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from extract.config import ConfigError
from extract.finetuning.one_device import device_of
from extract.lock import only_command_in
from extract.tables import write_csv
from mil.config import StudyConfig
from mil.pipeline.baselines import save_baselines
from mil.pipeline.blocks import Done, blocks_of
from mil.pipeline.chosen import as_chosen_before
from mil.pipeline.cluster import shared_features, where_it_runs
from mil.pipeline.data import Study, prepare
from mil.pipeline.folder import finished_metrics, refuse_or_reuse, remove_checkpoints, resolved_yaml, run_folder
from mil.pipeline.fusion import fuse, save_fusion
from mil.pipeline.inputs import refuse_other_inputs
from mil.pipeline.results import (
    describe,
    facts_of,
    heatmaps_of,
    permutation_test,
    predictions_of,
    report_curve,
    report_left_out,
)
from mil.pipeline.targets import run_targets
from mil.pipeline.task_results import write_task
from mil.pipeline.training import Trained, as_chosen, choose_on_inner_folds, train_members
from mil.report.comparison import compare_runs
from mil.report.page import write_overview, write_report
from mil.report.sections import warnings_in
from mil.report.wording import terminal_table
from mil.results.decisions import write_decisions
from mil.results.published import write_environment
from mil.study.covariates import save_covariates
from mil.training.hashes import write_hashes
from mil.training.members import save_members


@dataclass(frozen=True)
class Outcome:
    """What a study leaves: its run folder, its metrics by aggregator, and the table for the terminal."""

    folder: Path
    metrics: dict[str, dict[str, Any]]
    table: str


def run_study(config: StudyConfig, command: Sequence[str] = ()) -> Outcome:
    """Train every aggregator that the config names on one plan, and report.

    Raises:
        ProblemsError: what is wrong with config, cohort, features or plan; nothing was trained.
    """
    assert config.out is not None
    device_of(config.train.accelerator)  # refused before anything is read, or deleted
    with only_command_in(config.out, "mil.train"):
        return _run_study(config, command)


def _run_study(config: StudyConfig, command: Sequence[str]) -> Outcome:
    if config.plan:
        raise ConfigError("plan=true", ["prints a plan and trains nothing: python -m mil.train ... plan=true"])
    config = config.with_learning_rates()
    assert config.out is not None
    if config.targets:
        with where_it_runs(config):
            metrics, text = run_targets(config, command, report_trained)
        return Outcome(config.out, dict(metrics), text)
    config = as_chosen_before(config)
    finished = refuse_or_reuse(config)
    if finished is not None:
        refuse_other_inputs(config)
        print(f"{config.out}: already finished, nothing to do")
        return finish(config, finished)
    if config.overwrite:
        config = config.model_copy(update={"resume": False})  # there will be nothing to continue
    with where_it_runs(config):
        study = prepare(config, command)
        there = {name: finished_metrics(config, name) for name in config.model.names}
        left = [name for name, found in there.items() if found is None]
        for name, trained in each_trained(study, left):
            there[name] = report_one(study, name, run_folder(config, name), *trained)
    return finish(config, {name: found for name, found in there.items() if found is not None})


def finish(config: StudyConfig, metrics: dict[str, dict[str, Any]]) -> Outcome:
    """The tables for the terminal; of several aggregators also their comparison, written into the run folder."""
    assert config.out is not None
    if isinstance(config.model.name, str):
        return Outcome(config.out, metrics, terminal_table(metrics[config.model.name]))
    folders = [run_folder(config, name) for name in config.model.names]
    if len(folders) == 1:
        return Outcome(config.out, metrics, write_overview(config.out, metrics))
    text = compare_runs(folders, config.out, resamples=config.report.bootstrap, seed=config.seed)
    return Outcome(config.out, metrics, text)


OneTrained = tuple[Study, Trained, pd.DataFrame | None, float]
"""An aggregator's study as it was trained, its members, what inner folds chose, and seconds."""


def each_trained(study: Study, names: Sequence[str]) -> Iterator[tuple[str, OneTrained]]:
    """The aggregators one after the other; on a cluster all are trained side by side, and come in the same order."""
    if study.config.run.on == "local":
        yield from ((name, train_one(study, name, run_folder(study.config, name))) for name in names)
        return
    shared_features(study)
    with ThreadPoolExecutor(max(1, len(names))) as threads:
        folders = [run_folder(study.config, name) for name in names]
        yield from zip(names, threads.map(partial(train_one, study), names, folders), strict=True)


def train_and_report(study: Study, name: str, folder: Path) -> dict[str, Any]:
    """One aggregator on the whole plan, and everything it leaves in its run folder."""
    return report_one(study, name, folder, *train_one(study, name, folder))


def train_one(study: Study, name: str, folder: Path) -> OneTrained:
    """One aggregator on the whole plan, its settings chosen first where the study is nested."""
    study, began, choices = study.of(name), time.perf_counter(), None
    config = study.config
    if config.study.nested:
        choices = choose_on_inner_folds(study, name, folder)
        study = as_chosen(study, choices)
    print(f"{name}: {len(study.plan)} members, {config.train.epochs if choices is None else 'chosen'} epochs")
    return study, train_members(study.with_permuted(), name, folder), choices, time.perf_counter() - began


def report_one(
    whole: Study,
    name: str,
    folder: Path,
    study: Study,
    everyone: Trained,
    choices: pd.DataFrame | None,
    seconds: float,
) -> dict[str, Any]:
    """Everything that one aggregator leaves in its run folder."""
    return report_trained(study, name, folder, everyone, choices, whole.config, seconds)


def report_trained(
    study: Study,
    name: str,
    folder: Path,
    everyone: Trained,
    choices: pd.DataFrame | None,
    whole: StudyConfig,
    seconds: float,
    **told: Any,
) -> dict[str, Any]:
    """What trained members leave in the run folder; `told` goes into environment.json. Gives the metrics."""
    config = study.config
    n_out = len(study.sites_out or ())
    n_curve = len(study.curve or ())
    n_full = len(study.plan) - n_curve - n_out
    trained = everyone.part(slice(n_full))
    also: dict[str, Any] = {"chosen": study.environment["chosen"]} if "chosen" in study.environment else {}
    if study.curve:
        also["learning_curve"] = report_curve(study, trained, everyone.part(slice(n_full, n_full + n_curve)), folder)
    if n_out:
        without = everyone.part(slice(n_full + n_curve, len(study.plan)))
        also["left_out_sites"] = report_left_out(study, trained, without)
    if choices is not None:
        choices = choices[choices["member"] < n_full]
    if study.permuted:
        also["permutations"] = permutation_test(study, trained, everyone.logits_MSC[len(study.plan) :])
    study, fusion = replace(study, plan=trained.plan), None
    if study.widths:
        trained, fusion = fuse(study, trained)
        save_fusion(folder, fusion)

    study.check_place()
    facts = facts_of(study, trained)
    save_members(folder, describe(study, name, facts), trained.state)
    if study.covariates and study.cohort.further is not None:
        save_covariates(folder, study.cohort.table, study.cohort.further, study.covariates)
    plan_table, predictions = trained.plan_table(), predictions_of(study, trained, facts)
    for file, table in (("plan.csv", plan_table), ("history.csv", trained.history), ("predictions.csv", predictions)):
        write_csv(table, folder / file)
    environment = study.environment | {"aggregator": name, "training_seconds": round(seconds, 1)} | told
    write_environment(folder, environment, "environment.json", full=config.report.paths)
    done = Done(study, trained, plan_table, predictions, name, folder, fusion)
    if study.task.name == "classification":
        metrics = report_classes(done, name, whole, folder, environment, choices, also)
    else:
        metrics = write_task(done, name, whole, folder, environment, choices, also)
    write_hashes(folder)
    remove_checkpoints(folder)
    return metrics


def report_classes(
    done: Done,
    name: str,
    whole: StudyConfig,
    folder: Path,
    environment: dict[str, Any],
    choices: pd.DataFrame | None,
    also: dict[str, Any],
) -> dict[str, Any]:
    """Everything that is said of a trained study of classes; gives the metrics."""
    study, config = done.study, done.study.config
    write_decisions(folder, done.decisions)
    save_baselines(study, done.trained.plan, folder)
    also = also | blocks_of(done)
    study.check_place()
    heatmaps, about_heatmaps = heatmaps_of(study, folder, done.plan, done.predictions, environment)
    return write_report(
        folder,
        title=f"{config.out.name if config.out else 'study'}: {name}",
        predictions=done.predictions,
        plan=done.plan,
        history=done.trained.history,
        classes=study.cohort.classes,
        config_yaml=resolved_yaml(whole),
        environment=environment,
        choices=choices,
        notes=[*warnings_in(also), *study.notes, *about_heatmaps],
        heatmaps=heatmaps,
        bootstrap=config.report.bootstrap,
        seed=config.seed,
        also=also,
        paths=config.report.paths,
        slide_columns=done.slide_columns(),
    )
