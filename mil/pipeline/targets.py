"""Many targets: their studies are planned one by one, trained together in one pass over the features, reported apart.

A target's members are those of a study of that target alone: the same folds, seeds, order of slides and tiles. What is
shared is the features, and the pass. Members with another number of outputs cannot be one stack of parameters: each
kind is a stack of its own, and all stacks train side by side (`mil.training.panel`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.config import ConfigError, ProblemsError
from extract.features.cache import Header
from extract.features.folder import FeatureFolder
from extract.features.joined import JoinedFolder
from extract.leftovers import remove_folder, remove_partials
from extract.whole import write_whole
from extract.wording import count
from mil.config import StudyConfig
from mil.pipeline.chosen import as_chosen_before, with_shared_choices, with_values
from mil.pipeline.data import (
    Planned,
    Study,
    begin,
    cohort_of,
    features_of,
    inner_plan_of,
    load_usable,
    planned_study,
    ready,
)
from mil.pipeline.folder import (
    NOT_FOR_PUBLICATION,
    Place,
    finished,
    finished_metrics,
    identity,
    is_finished,
    refuse_or_reuse,
    resolved_yaml,
    run_folder,
)
from mil.pipeline.inputs import refuse_other_inputs
from mil.pipeline.kinds import inner_kinds, train_kinds
from mil.pipeline.training import Trained, choose_and_keep
from mil.report.targets_page import write_targets
from mil.study.nested import refit_plan
from mil.study.roles import Plan

TOGETHER = "together"
"""In the run folder: checkpoints and logs of the passes, whose members are those of all targets."""
Report = Callable[..., dict[str, Any]]
"""`mil.pipeline.study.report_trained`, which cannot be imported here."""
Metrics = dict[str, dict[str, dict[str, Any]]]
"""By aggregator, then by target."""


@dataclass(frozen=True)
class ReadOnce(FeatureFolder):
    """A folder of features whose headers are read once, however many targets ask for them."""

    known: dict[str, Header] = field(default_factory=dict)

    def header(self, slide: str) -> Header:
        if slide not in self.known:
            self.known[slide] = super().header(slide)
        return self.known[slide]


def run_targets(config: StudyConfig, command: Sequence[str], report: Report) -> tuple[Metrics, str]:
    """Every target that the config names: its own run folder, and over all of them the overview.

    Returns:
        Metrics, and the table for the terminal.

    Raises:
        ProblemsError: what is wrong with the targets, of all of them together; nothing was trained.
    """
    config, out = as_chosen_before(config), config.out
    assert out is not None
    done = done_before(config)
    if done is not None:
        print(f"{out}: already finished, nothing to do")
        return done, write_targets(out, done, folders_of(config))
    if config.overwrite:
        config = config.model_copy(update={"resume": False})
    config, planned = planned_targets(config)
    begin_all(config, planned)
    first = next(iter(planned.values()))
    bags = load_usable(config, first.checked, first.features)
    studies = {target: ready(one, command, bags) for target, one in planned.items()}
    place = Place({out: identity(out)})
    metrics = {name: train_targets(studies, name, out, place, report) for name in config.model.names}
    text = write_targets(out, metrics, folders_of(config))
    for left in (out / TOGETHER).glob("**/checkpoints"):
        shutil.rmtree(left, ignore_errors=True)
    return metrics, text


def folders_of(config: StudyConfig) -> dict[str, dict[str, Path]]:
    """The run folder of each target, by aggregator."""
    own = {target: config.for_target(target) for target in config.targets}
    return {name: {t: run_folder(one, name) for t, one in own.items()} for name in config.model.names}


def done_before(config: StudyConfig) -> Metrics | None:
    """The metrics of a study of which every target is finished."""
    refuse_or_reuse(config)
    folders = folders_of(config)
    if config.overwrite or not all(is_finished(folder) for own in folders.values() for folder in own.values()):
        return None
    for target in config.targets:
        refuse_other_inputs(config.for_target(target))
    return {name: {target: finished(folder) for target, folder in own.items()} for name, own in folders.items()}


# --- planning ------------------------------------------------------------------------------------------------------


def planned_targets(config: StudyConfig) -> tuple[StudyConfig, dict[str, Planned]]:
    """The config with what was chosen where it says `auto`, and every target's study, before anything is written.

    Raises:
        ConfigError: what is wrong with all of them.
    """
    folder = features_of(config.for_target(config.targets[0]))
    features = folder
    if not isinstance(folder, JoinedFolder):  # which reads headers once by itself
        features = ReadOnce(folder.folder, folder.layout, folder.slides, folder.verify)
    found: dict[str, Planned] = {}
    problems: dict[str, list[str]] = {}
    for target in config.targets:
        own = config.for_target(target).model_copy(update={"overwrite": False, "auto": []})
        try:
            found[target] = planned_study(own, cohort_of(own).named_as(features.slides), features)
        except ProblemsError as error:
            problems[target] = list(error.problems)
    if problems:
        raise ConfigError("targets that cannot be studied", told_together(problems, len(config.targets)))
    cohorts = {target: one.checked.cohort for target, one in found.items()}
    config, chosen = with_shared_choices(config, cohorts, next(iter(found.values())).checked.headers)
    values: dict[str, Any] = {choice.key: choice.value for choice in chosen}
    for target, one in found.items():
        own = with_values(one.config, values).model_copy(update={"auto": config.auto})
        found[target] = replace(one, config=own, chosen=tuple(chosen))
    return config, found


def told_together(problems: dict[str, list[str]], n_targets: int) -> list[str]:
    """What is wrong with every target alike is said once, the rest with the target's name."""
    common = [p for p in next(iter(problems.values())) if len(problems) == n_targets > 1]
    common = [p for p in common if all(p in own for own in problems.values())]
    named = [f"target {target!r}: {p}" for target, own in problems.items() for p in own if p not in common]
    return common + named


def begin_all(config: StudyConfig, planned: dict[str, Planned]) -> None:
    """The run folder, with the config of all, and in it that of every target."""
    assert config.out is not None
    if config.overwrite and config.out.exists():
        remove_folder(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    remove_partials([config.out])
    write_whole(config.out / "config.yaml", NOT_FOR_PUBLICATION + resolved_yaml(config))
    for one in planned.values():
        begin(one)


# --- training ------------------------------------------------------------------------------------------------------


def train_targets(
    studies: dict[str, Study], name: str, out: Path, place: Place, report: Report
) -> dict[str, dict[str, Any]]:
    """One aggregator on all targets, each then reported as a study of its own; metrics in the targets' order."""
    before = {target: finished_metrics(study.config, name) for target, study in studies.items()}
    if all(before.values()):
        return {target: metrics for target, metrics in before.items() if metrics is not None}
    folder = out / TOGETHER / name.replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    kinds, began = kinds_of({target: study.of(name) for target, study in studies.items()}), time.perf_counter()
    choices: dict[str, pd.DataFrame] = {}
    first = next(iter(kinds[0].values())).config
    if first.study.nested:
        own_folders = {target: run_folder(study.config, name) for target, study in studies.items()}
        kinds, choices = chosen_inside(kinds, name, folder, place, own_folders)
    joint = [joined_studies(list(kind.values()), place) for kind in kinds]
    epochs = "chosen" if choices else first.train.epochs
    print(
        f"{name}: {sum(len(one.plan) for one in joint):,} members of {count(len(studies), 'target')}, {epochs} epochs"
    )
    trained, seconds = train_kinds(joint, name, folder), time.perf_counter() - began
    parts: dict[str, tuple[Study, Trained]] = {}
    for kind, everyone in zip(kinds, trained, strict=True):
        parts |= dict(zip(kind, zip(kind.values(), parts_of(everyone, list(kind.values())), strict=True), strict=True))
    found = {}
    for target in studies:
        print(f"{name}: {target}")
        (study, part), config = parts[target], studies[target].config
        told = (study, name, run_folder(config, name), part, choices.get(target), config, seconds)
        found[target] = before[target] or report(*told, trained_together=list(studies))
    return found


def kinds_of(studies: dict[str, Study]) -> list[dict[str, Study]]:
    """Targets whose members have as many outputs, which are one stack."""
    groups: dict[tuple[int, int], dict[str, Study]] = {}
    for target, study in studies.items():
        groups.setdefault(outputs_of(study), {})[target] = study
    return list(groups.values())


def outputs_of(study: Study) -> tuple[int, int]:
    """Outputs of a member, and the classes or grades that they stand for; 0 where there are none."""
    return study.task.n_outputs(), len(study.cohort.classes) if study.cohort.target == "class" else 0


def joined_studies(studies: Sequence[Study], place: Place | None) -> Study:
    """One study of all their members, for training only."""
    first = studies[0]
    labels_MS = None
    if first.task.name == "classification" or first.config.train.harmonize != "none":
        labels_MS = np.concatenate([np.tile(study.cohort.labels_S, (len(study.plan), 1)) for study in studies])
    return replace(
        first,
        plan=joined_plans([study.plan for study in studies]),
        labels_MS=labels_MS,
        epochs_M=stacked([study.epochs_M for study in studies]),
        length_M=stacked([study.length_M for study in studies]),
        curve=None,
        place=place,
        targets=tuple(studies),
    )


def stacked(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """One behind the other; None where it is not said, which is so for all or for none."""
    given = [part for part in parts if part is not None]
    return np.concatenate(given) if given else None


def joined_plans(plans: Sequence[Plan]) -> Plan:
    """All members, numbered anew."""
    members = pd.concat([plan.members for plan in plans], ignore_index=True)
    members = members.assign(member=np.arange(len(members)))
    return Plan(members, np.concatenate([plan.roles_MS for plan in plans]))


def parts_of(everyone: Trained, studies: Sequence[Study]) -> list[Trained]:
    """What each study's own members left, numbered as in its plan."""
    ends = np.cumsum([len(study.plan) for study in studies]).tolist()
    parts = []
    for study, start, end in zip(studies, [0, *ends], ends, strict=False):
        part = everyone.part(slice(start, end))
        history = part.history.assign(member=part.history["member"] - start)
        parts.append(replace(part, plan=study.plan, history=history.reset_index(drop=True)))
    return parts


def chosen_inside(
    kinds: list[dict[str, Study]], name: str, folder: Path, place: Place, places: dict[str, Path]
) -> tuple[list[dict[str, Study]], dict[str, pd.DataFrame]]:
    """Nested cross-validation: all inner members in one pass, then each target's own choice."""
    studies = {target: study for kind in kinds for target, study in kind.items()}
    inner = {target: inner_plan_of(study.config, study.plan, study.cohort) for target, study in studies.items()}
    joint = [joined_studies([replace(s, plan=inner[target]) for target, s in kind.items()], place) for kind in kinds]
    print(f"{name}: {sum(len(one.plan) for one in joint):,} inner members of {count(len(studies), 'target')}")
    (folder / "inner").mkdir(exist_ok=True)
    refitted: list[dict[str, Study]] = []
    choices: dict[str, pd.DataFrame] = {}
    for kind, history in zip(kinds, inner_kinds(joint, name, folder / "inner"), strict=True):
        refitted.append({})
        start = 0
        for target, study in kind.items():
            end = start + len(inner[target])
            own = history[(history["member"] >= start) & (history["member"] < end)]
            own = own.assign(member=own["member"] - start).reset_index(drop=True)
            choices[target] = choose_and_keep(study, inner[target], own, places[target])
            plan, epochs_M = refit_plan(study.plan, choices[target])
            refitted[-1][target], start = replace(study, plan=plan, epochs_M=epochs_M), end
    return refitted, choices
