"""`plan=true`: what a study would train, and what it would take, without training or writing anything.

Time is measured: a few slides' worth of made features of the study's own sizes go through the first pass of members.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from extract.cohort import Cohort, read_cohort
from extract.config import ConfigError, ProblemsError
from extract.extraction.todo import named_as_files
from extract.features.cache import Header
from extract.features.joined import open_features
from extract.wording import count, name_some
from mil.config import StudyConfig
from mil.pipeline.chosen import with_choices, with_shared_choices, with_values
from mil.pipeline.cluster import seconds_on_ray
from mil.pipeline.data import (
    Study,
    extracts_here,
    in_units,
    inner_plan_of,
    new_plan,
    permuted_of,
    problems_of_target,
    refuse_unbuildable,
    refuse_unharmonizable,
    told_by,
    usable_covariates,
    wanted_of,
)
from mil.pipeline.inputs import cohort_file
from mil.pipeline.kinds import fits_one_pass
from mil.pipeline.targets import joined_studies, kinds_of, told_together
from mil.pipeline.training import bytes_of_a_member, new_module, pass_bytes, passes_of, with_permuted_inner
from mil.study.learning_curve import curve_plan, joined
from mil.study.roles import ROLES, UNUSED, Plan
from mil.study.units import slides_of_bags, unit_of
from mil.tasks.table import task_of
from mil.training.bags import Bags
from mil.training.checks import Checked, check_features
from mil.training.module import fit

NOTHING = "Nothing was trained or written (plan=true)."
PROBED = 32
"""Slides that the probe trains on, evenly drawn by their number of tiles."""


def preview(config: StudyConfig) -> str:
    """What `python -m mil.train` would do with this config, as lines.

    Raises:
        ProblemsError: what is wrong with config, cohort, features or plan, as for training.
    """
    config = config.with_learning_rates()
    if config.targets:
        return preview_targets(config)
    lines: list[str] = []
    study, plan = planned(config, lines)
    lines += [*data_lines(study), *fold_lines(plan, study.cohort)]
    for name in config.model.names:
        lines += member_lines(study.of(name), name)
    return "\n".join([*lines, NOTHING])


def preview_targets(config: StudyConfig) -> str:
    """The same of many targets, which train together."""
    found: dict[str, tuple[Study, Plan]] = {}
    problems: dict[str, list[str]] = {}
    told: dict[str, list[str]] = {target: [] for target in config.targets}
    for target, own_lines in told.items():
        try:
            own = config.for_target(target).model_copy(update={"auto": []})
            found[target] = planned(own, own_lines)
        except ProblemsError as error:
            problems[target] = list(error.problems)
    if problems:
        raise ConfigError("targets that cannot be studied", told_together(problems, len(config.targets)))
    first = next(iter(found.values()))[0]
    cohorts = {target: study.cohort for target, (study, _) in found.items()}
    config, chosen = with_shared_choices(config, cohorts, first.headers)
    values = {choice.key: choice.value for choice in chosen}
    studies = {target: replace(study, config=with_values(study.config, values)) for target, (study, _) in found.items()}
    lines = [*dict.fromkeys(line for own in told.values() for line in own), *data_lines(first)]
    for target, (study, plan) in found.items():
        lines += [
            f"target {target}: {line}" if i == 0 else line for i, line in enumerate(fold_lines(plan, study.cohort))
        ]
    for name in config.model.names:
        lines += panel_lines({target: study.of(name) for target, study in studies.items()}, name)
    return "\n".join([*lines, NOTHING])


def panel_lines(studies: dict[str, Study], name: str) -> list[str]:
    """Members of all targets, memory and time of one aggregator."""
    kinds = [joined_studies(list(kind.values()), None) for kind in kinds_of(studies)]
    config, n_members = kinds[0].config, sum(len(kind.plan) for kind in kinds)
    n_inner = (
        sum(len(inner_plan_of(s.config, s.plan, s.cohort)) for s in studies.values()) if config.study.nested else 0
    )
    gb = sum(pass_bytes(kind, name) for kind in kinds) / 1e9
    each = sum(seconds_an_epoch(kind, name, np.arange(len(kind.plan))) for kind in kinds) / n_members
    seconds = each * (sum(epochs_of(kind).sum() for kind in kinds) + n_inner * config.train.epochs)
    inner = f" and {count(n_inner, 'inner member')}" if n_inner else ""
    together = len(kinds) == 1 or fits_one_pass(kinds, name)
    kinds_said = (
        "" if len(kinds) == 1 else f", of {len(kinds)} kinds of outputs" + ("" if together else ", a pass each")
    )
    return [
        f"{name}: {count(n_members, 'member')}{inner} of {count(len(studies), 'target')}{kinds_said}, "
        f"{config.train.epochs} epochs",
        f"  memory: {gb:.2f} GB for a step of all members, in one pass over the features where that fits",
        f"  time: about {in_words(seconds)} of training on this machine as it is now (measured on made features of "
        "these sizes); reading and reports come on top",
    ]


def epochs_of(study: Study) -> np.ndarray:
    """Of every member."""
    return np.full(len(study.plan), study.config.train.epochs) if study.length_M is None else study.length_M


def planned(config: StudyConfig, lines: list[str]) -> tuple[Study, Plan]:
    """The study on made features, and the plan of its folds; `lines` gets what was noticed on the way."""
    checked = checked_data(config, lines)
    usable_covariates(config, checked.cohort)
    task = task_of(config.task, checked.cohort.classes).for_cohort(checked.cohort)
    told = told_by(config, task, checked.cohort.classes)
    checked = replace(checked, cohort=task.strata(checked.cohort, max(config.study.folds, config.study.nested)))
    config, _ = with_choices(config, checked.cohort, checked.headers)
    plan = new_plan(config, checked, checked.cohort)
    first = next(iter(checked.headers.values()))
    refuse_unbuildable(config, first.dim, task)
    curve = curve_plan(plan, checked.cohort, config.study.train_sizes, config.seed)
    everyone = joined(plan, curve)
    refuse_unharmonizable(config, checked.cohort, [everyone])
    bags = made_bags(checked.cohort, checked.headers)
    permuted = permuted_of(config, checked, plan, len(everyone), told)
    study = Study(
        config, checked.cohort, checked.headers, bags, everyone, (), {}, curve=curve, permuted=permuted, task=task
    )
    lines += map(str, checked.notes)
    return study, plan


def data_lines(study: Study) -> list[str]:
    """What the features are."""
    headers, patients = study.headers, study.cohort.table["patient"].nunique()
    stored = sum(h.n_tiles * h.dim * np.dtype(h.dtype).itemsize for h in headers.values())
    return [
        f"task {study.task.name}: {count(len(headers), 'slide')} of {count(patients, 'patient')}, "
        f"{int(study.bags.lengths_S.sum()):,} tiles x {study.bags.dim}: {stored / 1e9:.2f} GB of features",
    ]


def checked_data(config: StudyConfig, lines: list[str]) -> Checked:
    """Cohort and features as they lie there: nothing is extracted, imported or made."""
    tables, folder = cohort_file(config), config.features.folder
    if config.data.source != "cohort":
        if not (isinstance(tables, Path) and tables.exists()):
            problem = f"data.source={config.data.source}: {tables} is not there yet; the study makes or imports it"
            raise ConfigError("nothing to plan", [problem])
        cohort = read_cohort(tables, classes=config.class_names or config.data.label_names or None, **wanted_of(config))
        folder, layout = tables.parent, "cache"
    else:
        early = partial(problems_of_target, config)
        fixed = (tables, config.columns, config.class_names)
        cohort = read_cohort(*fixed, target=config.task.target, also=early, **wanted_of(config))
        cohort, layout = named_as_files(config, cohort), config.features.layout
    if folder is None:
        raise ConfigError("no features", ["features.folder: set it to the folder of feature files"])
    features = open_features(config.features, layout, folder=folder, verify=config.checks.verify)
    cohort = cohort.named_as(features.slides)
    lines += cohort.notes
    missing = [slide for slide in cohort.table["slide"] if slide not in features.slides]
    if missing and config.data.source == "cohort" and extracts_here(config, cohort):
        lines.append(
            f"{count(len(missing), 'slide')} without features would be extracted first and are not in this plan: "
            + name_some(missing)
        )
        cohort = cohort.subset(~cohort.table["slide"].isin(missing).to_numpy())
    unit = unit_of(config.study.unit, config.task.name)
    return in_units(check_features(cohort, features, missing=config.checks.missing, unit=unit), unit)


def fold_lines(plan: Plan, cohort: Cohort) -> list[str]:
    """Each fold with its slides of every class (event, quantile, grade) in each role."""
    labels_S, lines = cohort.labels_S, [f"{count(len(plan), 'member')}; slides in each fold:"]
    keys = plan.members[["repeat", "fold"]].drop_duplicates()
    for row, (repeat, fold) in zip(keys.index, keys.itertuples(index=False), strict=True):
        parts = []
        for role, name in enumerate(ROLES):
            of_role_S = plan.roles_MS[row] == role
            if role != UNUSED and of_role_S.any():
                found = [
                    f"{int((of_role_S & (labels_S == c)).sum())} {label}" for c, label in enumerate(cohort.classes)
                ]
                parts.append(f"{name} {int(of_role_S.sum())} ({', '.join(found)})")
        lines.append(f"  repeat {repeat} fold {fold}: {'; '.join(parts)}")
    return lines


def member_lines(study: Study, name: str) -> list[str]:
    """Members, passes, memory and time of one aggregator."""
    config, whole = study.config, study.with_permuted()
    parts = passes_of(whole, name)
    own_inner = inner_plan_of(config, study.plan, study.cohort) if config.study.nested else None
    inner_study = None if own_inner is None else with_permuted_inner(study, own_inner)
    inner = None if inner_study is None else inner_study.plan
    inner_parts = passes_of(inner_study, name) if inner_study is not None else []
    largest = max(len(part) for part in [*parts, *inner_parts])
    lengths = [config.train.epochs if whole.length_M is None else int(whole.length_M[part[0]]) for part in parts]
    seconds = seconds_an_epoch(whole, name, parts[0]) / len(parts[0])
    epochs_in_all = sum(len(part) * n for part, n in zip(parts, lengths, strict=True))
    epochs_in_all += sum(len(part) for part in inner_parts) * config.train.epochs
    what = f"{name}: {count(len(whole.plan), 'member')}"
    if inner is not None:
        what += f" and {count(len(inner), 'inner member')} (whose refits train at most as long as here)"
    n_passes = len(parts) + len(inner_parts)
    lines = [
        f"{what}, {config.train.epochs} epochs, {n_passes} {'pass' if n_passes == 1 else 'passes'} over the features",
        f"  memory: {largest * bytes_of_a_member(study, name) / 1e9:.2f} GB for a step of {count(largest, 'member')}, "
        f"beside {study.bags.nbytes / 1e9:.2f} GB of features in float32 or as stored",
        f"  time: about {in_words(seconds * epochs_in_all)} of training on this machine as it is now (measured: one "
        f"pass of {count(len(parts[0]), 'member')} on made features of these sizes); reading and report come on top",
    ]
    if config.run.on == "ray":
        stages = [[seconds * config.train.epochs * len(part) for part in inner_parts]]
        stages += [[seconds * len(part) * n for part, n in zip(parts, lengths, strict=True)]]
        in_all, pool = seconds_on_ray(config, stages)
        lines.append(
            f"  on ray: {count(n_passes, 'task')} of at most {count(largest, 'member')} on {pool}: about "
            f"{in_words(in_all)}, if they are as fast"
        )
    return lines


def made_bags(cohort: Cohort, headers: dict[str, Header]) -> Bags:
    """Features of the slides' sizes that all lie in the same place: numbers of no meaning."""
    slides = cohort.table["slide"].tolist()
    tiles = [sum(headers[slide].n_tiles for slide in own) for own in slides_of_bags(cohort.table)]
    lengths_S = np.array(tiles, dtype=np.int64)
    dim, dtypes = next(iter(headers.values())).dim, {header.dtype for header in headers.values()}
    dtype = torch.float32 if "float32" in dtypes else torch.float16
    all_TD = torch.randn(int(lengths_S.max()), dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Bags(tuple(slides), lengths_S, dim, "ram", [all_TD[:n] for n in lengths_S.tolist()])


def seconds_an_epoch(study: Study, name: str, members: np.ndarray) -> float:
    """Of these members on all their slides: what two epochs more take on a few slides, scaled by the slides."""
    order_S = np.argsort(study.bags.lengths_S, kind="stable")
    step = max(1, len(order_S) // PROBED)
    probed_S = np.zeros(len(order_S), dtype=bool)
    probed_S[order_S[::step]] = True
    roles_MS = np.where(probed_S, study.plan.roles_MS, UNUSED).astype(np.int8)
    roles_MS = np.where(roles_MS == ROLES.index("test"), UNUSED, roles_MS).astype(np.int8)
    few = replace(study, plan=Plan(study.plan.members, roles_MS), epochs_M=None, length_M=None)
    used = roles_MS[members] != UNUSED
    wanted = np.isin(study.plan.roles_MS[members], [ROLES.index("train"), ROLES.index("val")])
    took = [timed(few, name, members, epochs) for epochs in (1, 3)]
    return max(took[1] - took[0], 1e-6) / 2 * float(wanted.sum()) / max(1, int(used.sum()))


def timed(study: Study, name: str, members: np.ndarray, epochs: int) -> float:
    """Seconds of `fit`, which is told to write nothing."""
    train = study.config.train.model_copy(update={"epochs": epochs, "select": "last", "patience": None})
    module = new_module(replace(study, config=study.config.model_copy(update={"train": train})), name, members)
    with quiet():
        began = time.perf_counter()
        fit(module, progress=False)
        return time.perf_counter() - began


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a training on numbers of no meaning would say is of no interest."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
