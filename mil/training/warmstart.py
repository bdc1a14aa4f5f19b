"""Members that start from another study's members (`model.init=runs/other`) instead of from chance.

Taken over is what fits: all parameters where both studies have the same classes, else what comes before the classes.
What the starting weights have seen is part of where a number comes from: a patient that was train or val for them must
not be test here. `seen_before.csv` in the run folder holds it, so a chain of warm starts is checked by its last link.

Letters: M members, S slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError

from extract.cohort import Cohort
from extract.config import ConfigError
from extract.digest import sha256_of_file
from extract.tables import TableError, read_texts, write_csv
from extract.wording import count, name_some
from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators import options as known_options
from mil.aggregators.batch import pack
from mil.aggregators.contract import Aggregator
from mil.config import StudyConfig, model_options
from mil.study.roles import Plan
from mil.study.saved import read_members
from mil.tasks.contract import Task
from mil.tasks.table import task_of
from mil.training.checks import kind_differences
from mil.training.hashes import ChangedError, refuse_changed
from mil.training.members import FILE, Description, load_members

SEEN_BEFORE = "seen_before.csv"
MOMENTS = ("input_mean_MD", "input_scale_MD")
COVARIATES = "covariates."
"""In front of what belongs to covariates: that always starts from this study's own patients."""


@dataclass(frozen=True)
class Start:
    """Where the members of a study start.

    source: the other study's members. source_of_M: the row of `source` that each member of the plan starts from; None
    = the mean of all. kept: parameters that are taken over. frozen: of these, those that are not trained.
    seen: slide, patient and a bool column m0, m1, ... for each member of the plan: what its start has seen. notes: for
    the report. origin: for environment.json.
    """

    source: Aggregator
    source_of_M: np.ndarray | None
    kept: frozenset[str]
    frozen: frozenset[str]
    seen: pd.DataFrame
    notes: tuple[str, ...]
    origin: dict[str, Any]

    def put_into(self, aggregator: Aggregator, members: np.ndarray) -> None:
        """Starting values of these members of the plan (rows of `aggregator`), and what of them is frozen.

        Features stay standardised with the moments that the weights were trained with.
        """
        theirs, ours = self.source.state_dict(), aggregator.state_dict()
        for name in (*self.kept, *MOMENTS):
            ours[name].copy_(self._rows(theirs[name], members))  # state_dict shares memory with the parameters
        aggregator.standardized = self.source.standardized
        aggregator.cuts_given = "cut_first" in self.kept
        for name, stack in aggregator.named_parameters():
            stack.requires_grad_(name not in self.frozen)

    def _rows(self, stack: torch.Tensor, members: np.ndarray) -> torch.Tensor:
        if self.source_of_M is None:
            return stack.mean(dim=0, keepdim=True).expand(len(members), *stack.shape[1:])
        return stack[torch.from_numpy(self.source_of_M[members])]

    def save(self, folder: Path) -> None:
        """Write seen_before.csv."""
        write_csv(self.seen, folder / SEEN_BEFORE)


def open_start(config: StudyConfig, cohort: Cohort, plan: Plan, in_dim: int, features: dict[str, Any]) -> Start | None:
    """The start that `model.init` asks for, checked against this study; None without one.

    Args:
        in_dim: width of this study's features.
        features: `Provenance.same_kind` of this study's features; "" and 0 mean unknown.

    Raises:
        ConfigError: the other run cannot be read, is of another kind, or has seen patients that are test here.
    """
    folder = config.model.init
    if folder is None:
        return None
    source, theirs = _read_source(folder)
    name, classes = config.model.names[0], list(cohort.classes)
    options = model_options(config.model, name)
    problems = _kind_problems(folder, theirs, name, in_dim, features, config.train.standardize)
    task = task_of(config.task, classes)
    problems += _task_problems(folder, theirs.what(), task)
    same = theirs.classes == classes or task.name in ("regression", "survival")  # whose classes are strata of folds
    if theirs.aggregator == name:
        before = {option: default for option, (_, default) in known_options(name).items()} | theirs.options
        problems += _option_problems(folder, before, options, same)
    _raise_if(problems)  # what follows needs a source of the right kind

    freeze, average = config.train.freeze == "tile_layers", config.model.init_from == "average"
    tile = tile_layers(name, in_dim, task.n_outputs(), options)
    everything = frozenset(n for n in source.state_dict() if not n.startswith(COVARIATES)) - set(MOMENTS)
    kept = everything if same else tile - about_classes(name, in_dim, options)
    if not kept:
        problems.append(
            f"{folder} tells {', '.join(theirs.classes)} apart and this study {', '.join(classes)}: nothing of {name} "
            "with these options comes before the classes, so nothing can be taken over"
        )
    elif freeze and not tile & kept:
        problems.append(f"train.freeze=tile_layers: {name} has no layers on tiles that could be frozen; use none")
    source_of_M = None if average else _source_of_members(plan, folder, len(theirs.seeds))
    known, overlap = _seen_in_roles(folder, len(theirs.seeds))
    seen = _seen_by_members(known, source_of_M, len(plan))
    leaks = _leaks(plan, cohort, seen)
    if config.checks.init_overlap == "error":
        problems += overlap + _leak_problems(folder, leaks)
    _raise_if(problems)

    how = f"the average of its {count(len(theirs.seeds), 'member')}" if average else "its members, one each"
    head = "" if kept == everything else f"; the head is new, as it told {', '.join(theirs.classes)} apart"
    frozen = f"; frozen: {', '.join(sorted(tile & kept))}" if freeze else ""
    notes = [f"members start from {folder}: {how}{head}{frozen}. {_known_patients(cohort, seen)}"]
    notes += [f"checks.init_overlap=note: {line}" for line in overlap] + _leak_notes(leaks)
    origin = {"run": str(folder), "from": config.model.init_from, "members_sha256": sha256_of_file(folder / FILE)}
    return Start(source, source_of_M, kept, tile & kept if freeze else frozenset(), seen, tuple(notes), origin)


def _raise_if(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("model.init cannot be used", problems)


# --- which parameters ------------------------------------------------------------------------------------------------


def tile_layers(name: str, in_dim: int, n_logits: int, options: dict[str, Any]) -> frozenset[str]:
    """Names of the parameters that `pool` uses: those that what it makes of a bag has a gradient for."""
    aggregator: Aggregator = aggregator_class(name)(in_dim, n_logits, [0], **options).eval()
    tiles_TD = torch.rand(16, in_dim, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        pooled_MBP = aggregator(pack([tiles_TD], 1)).pooled_MBP
    assert pooled_MBP is not None
    if not pooled_MBP.requires_grad:
        return frozenset()
    names, stacks = zip(*aggregator.named_parameters(), strict=True)
    gradients = torch.autograd.grad(pooled_MBP.sum(), stacks, allow_unused=True)
    return frozenset(n for n, gradient in zip(names, gradients, strict=True) if gradient is not None)


def about_classes(name: str, in_dim: int, options: dict[str, Any]) -> frozenset[str]:
    """Names of the parameters whose shape depends on the number of classes."""
    builds = (aggregator_class(name)(in_dim, n_logits, [0], **options) for n_logits in (1, 3))
    two, three = ({n: stack.shape for n, stack in built.named_parameters()} for built in builds)
    return frozenset(n for n in two | three if two.get(n) != three.get(n))


# --- is it of the same kind ------------------------------------------------------------------------------------------


def _read_source(folder: Path) -> tuple[Aggregator, Description]:
    if not (folder / FILE).exists():
        inside = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
        choose = f"; it holds several aggregators, choose model.init={inside[0]}" if inside else ""
        wrong = f"no {FILE} in it, expected a finished run folder" if folder.is_dir() else "no such run folder"
        raise ConfigError("model.init cannot be used", [f"{folder}: {wrong}{choose}"])
    listed = [name for name in (FILE, "plan.csv", "roles.csv", SEEN_BEFORE) if (folder / name).exists()]
    try:
        refuse_changed(folder, listed)
        return load_members(folder)
    except ChangedError as error:
        raise ConfigError("model.init cannot be used", error.problems) from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            "model.init cannot be used",
            [f"{folder / FILE}: cannot be read ({what[0]}); this version knows {', '.join(AGGREGATORS)}"],
        ) from None


def _kind_problems(
    folder: Path, theirs: Description, name: str, in_dim: int, features: dict[str, Any], standardize: bool
) -> list[str]:
    """Another aggregator, other features: what makes the parameters meaningless here."""
    problems = []
    if theirs.aggregator != name:
        problems.append(f"{folder} is {theirs.aggregator}, this study {name}: set model.name={theirs.aggregator}")
    if theirs.in_dim != in_dim:
        problems.append(
            f"{folder} was trained on features with {theirs.in_dim} columns (encoder "
            f"{theirs.features.get('encoder') or 'unknown'}), this study's have {in_dim}"
        )
    for key, before, now in kind_differences(theirs.features, features):
        problems.append(f"{folder} was trained on features with {key} {before!r}, this study's have {now!r}")
    if theirs.harmonized != "none":
        problems.append(
            f"{folder} was trained with train.harmonize={theirs.harmonized}: its weights know its own sites"
        )
    if theirs.standardized != standardize:
        word = str(theirs.standardized).lower()
        problems.append(f"{folder} was trained with train.standardize={word}: set it here too")
    return problems


def _task_problems(folder: Path, theirs: Task, ours: Task) -> list[str]:
    """Another task, or outputs that mean something else."""
    if theirs.name != ours.name:
        return [
            f"{folder} was trained with task={theirs.name}, this study has task={ours.name}: start from another run"
        ]
    if ours.name == "classification":
        return _class_problems(folder, list(theirs.classes), list(ours.classes))
    if ours.name == "ordinal" and theirs.classes != ours.classes:
        before, now = ", ".join(theirs.classes), ", ".join(ours.classes)
        return [f"{folder} has the grades {before}, this study {now}: cuts between other grades cannot be taken over"]
    if theirs.n_outputs() != ours.n_outputs() or "discrete" in {theirs.config.loss, ours.config.loss}:
        keys = ("loss", "intervals")
        of_both = [[getattr(task.config, key) for key in keys] for task in (theirs, ours)]
        if of_both[0] != of_both[1]:
            said = [f"task.{key}={old}" for key, old in zip(keys, of_both[0], strict=True)]
            return [
                f"{folder} was trained with {' and '.join(said)}, whose outputs mean something else: set it here too"
            ]
    return []


def _class_problems(folder: Path, before: list[str], now: list[str]) -> list[str]:
    if before == now or sorted(before) != sorted(now):
        return []
    return [f"{folder} has the same classes in another order: set classes=[{','.join(before)}] to take its head over"]


def _option_problems(folder: Path, before: dict[str, Any], now: dict[str, Any], same_classes: bool) -> list[str]:
    """Options that differ; those of the head may where the head is new."""
    problems = []
    for key in sorted(before | now):
        old, new = _plain(before.get(key)), _plain(now.get(key))
        if old != new and (same_classes or key != "head"):
            problems.append(f"model.{key}: {new} here, {old} in {folder}: set model.{key}={old}")
    return problems


def _plain(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple | list) else value).replace(" ", "").lower()


# --- who starts where, and what it has seen --------------------------------------------------------------------------


def _source_of_members(plan: Plan, folder: Path, n_source: int) -> np.ndarray:
    """Repeat, fold and seed find each other where both studies have the same ones, else one after the other."""
    ours = [tuple(row) for row in plan.members[["repeat", "fold", "seed"]].to_numpy().tolist()]
    numbered = {triple: i for i, triple in enumerate(dict.fromkeys(ours))}
    if (folder / "plan.csv").exists():
        table = read_members(folder)
        theirs = [tuple(row) for row in table[["repeat", "fold", "seed"]].to_numpy().tolist()][:n_source]
        if set(theirs) == set(ours) and len(theirs) == n_source:
            numbered = {triple: i for i, triple in enumerate(theirs)}
    return np.array([numbered[triple] % n_source for triple in ours], dtype=np.int64)


def _seen_in_roles(folder: Path, n_source: int) -> tuple[pd.DataFrame, list[str]]:
    """Columns slide, patient, 0, 1, ... of the other study: train or val for it, or seen by its own start."""
    columns = list(range(n_source))
    nothing = pd.DataFrame(columns=["slide", "patient", *columns])
    try:
        roles = read_texts(folder / "roles.csv")
        seen = roles[["slide", "patient"]].copy()
        for m in columns:
            seen[m] = roles[f"m{m}"].isin(["train", "val"])
        if (folder / SEEN_BEFORE).exists():
            before = read_texts(folder / SEEN_BEFORE)
            earlier = before[["slide", "patient"]].copy()
            for m in columns:
                earlier[m] = before[f"m{m}"] == "True"
            seen = pd.concat([seen, earlier])
        return seen.groupby(["slide", "patient"], sort=False)[columns].any().reset_index(), []
    except (TableError, KeyError) as error:
        what = f"it cannot be checked which patients {folder} was trained on: roles.csv or {SEEN_BEFORE} ({error})"
        return nothing, [f"{what}. Restore the file, or set checks.init_overlap=note"]


def _seen_by_members(seen: pd.DataFrame, source_of_M: np.ndarray | None, n_members: int) -> pd.DataFrame:
    """The same for the members of this plan, columns m0, m1, ...; without slides that nobody saw."""
    numbers = [c for c in seen.columns if c not in ("slide", "patient")]
    seen_SN = seen[numbers].to_numpy(dtype=bool)
    anyone_S = seen_SN.any(axis=1)
    columns = {f"m{m}": anyone_S if source_of_M is None else seen_SN[:, source_of_M[m]] for m in range(n_members)}
    table = pd.concat([seen[["slide", "patient"]], pd.DataFrame(columns, index=seen.index)], axis=1)
    return table.iloc[np.flatnonzero(anyone_S)].reset_index(drop=True)


class Leak(NamedTuple):
    """A member, how many test patients it has, and which of them its start has seen."""

    member: int
    n_test: int
    patients: list[str]


def _leaks(plan: Plan, cohort: Cohort, seen: pd.DataFrame) -> list[Leak]:
    """Members whose test patients, or test slides under another patient's name, their start has seen."""
    found = []
    for m, test_S in enumerate(plan.uses("test")):
        mine, table = seen[seen[f"m{m}"]], cohort.table[test_S]
        known = table["patient"][table["patient"].isin(mine["patient"]) | table["slide"].isin(mine["slide"])]
        if len(known):
            member = int(plan.members["member"].iloc[m])
            found.append(Leak(member, table["patient"].nunique(), list(dict.fromkeys(known))))
    return found


def _leak_problems(folder: Path, leaks: Sequence[Leak]) -> list[str]:
    if not leaks:
        return []
    lines = [
        f"member {leak.member}: {len(leak.patients)} of its {count(leak.n_test, 'test patient')} were train or val for "
        f"what it starts from in {folder}: {name_some(leak.patients, 3)}"
        for leak in leaks
    ]
    return [
        *lines,
        "use the folds of the other study (study.folds_csv, or the same cohort, seed and folds, with "
        "model.init_from=member) or other patients; checks.init_overlap=note goes on with figures that are too good",
    ]


def _leak_notes(leaks: Sequence[Leak]) -> list[str]:
    if not leaks:
        return []
    each = [f"member {leak.member} {len(leak.patients)} of {leak.n_test}" for leak in leaks]
    more = f" and {count(len(each) - 10, 'more member')}" if len(each) > 10 else ""
    return [
        "the figures below are too good (checks.init_overlap=note): members are tested on patients that were train or "
        f"val for what they start from: {', '.join(each[:10])}{more}"
    ]


def _known_patients(cohort: Cohort, seen: pd.DataFrame) -> str:
    patients = set(cohort.table["patient"])
    known = patients & set(seen["patient"])
    return f"{len(known)} of this study's {count(len(patients), 'patient')} were train or val there"
