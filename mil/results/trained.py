"""A finished run folder read back: its config, plan, members, thresholds and predictions; and what it says of a slide.

Axes: S slides, T tiles, D features, M members, B bags of a batch, C outputs (1 for two classes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor

from extract.cohort import site_of_barcode
from extract.config import ConfigError, ProblemsError, did_you_mean, first_line, load_config
from extract.features.cache import toolkit_version
from extract.features.joined import Join
from extract.tables import TableError
from extract.wording import count
from mil.aggregators import AGGREGATORS
from mil.aggregators.batch import Prediction
from mil.aggregators.contract import Aggregator
from mil.aggregators.threads import a_thread_a_bag
from mil.config import StudyConfig
from mil.config_reading import of_earlier_versions
from mil.results.decisions import FILE as DECISIONS
from mil.results.decisions import Decisions, read_decisions
from mil.results.published import FILE as PATHS
from mil.results.readback import (
    ENVIRONMENT,
    METRICS,
    PREDICTIONS,
    ReadbackError,
    read_environment,
    read_json,
    read_metrics,
    read_predictions,
    read_task_predictions,
)
from mil.results.task_conformal import TaskScores, read_task_scores
from mil.study.covariates import Covariate, covariates_of, raw_columns, read_covariates
from mil.study.saved import PLAN_FILE as PLAN
from mil.study.saved import ROLES_FILE as ROLES
from mil.study.saved import read_members, read_roles
from mil.study.sites import site_rows
from mil.study.units import COLUMN, Unit, bag_of_slides, slides_of_bags, unit_of
from mil.tasks.contract import Facts, Task
from mil.training.bags import Bags, EvaluationSteps, as_tensor, make_batch
from mil.training.device import features_for_scoring
from mil.training.hashes import FILE as HASHES
from mil.training.hashes import ChangedError, all_written, listed, refuse_changed
from mil.training.inputs import FILE as INPUTS
from mil.training.ladder_saved import FILE as LADDER
from mil.training.ladder_saved import Ladder, load_ladder
from mil.training.members import FILE as MEMBERS
from mil.training.members import Description, load_members
from mil.training.task_ladder import TaskLadder
from mil.training.task_ladder_saved import load_task_ladder

CONFIG = "config.yaml"
NEEDED = (MEMBERS, PLAN, ROLES, PREDICTIONS, ENVIRONMENT, METRICS)
"""What a run folder must hold besides its config, in the order in which training writes it."""


class RunError(ProblemsError):
    """The run folder cannot be used."""


@dataclass(frozen=True)
class TrainedStudy:
    """One aggregator's run folder.

    plan: plan.csv, one row a member: member, repeat, fold, seed, ... best_epoch. roles: roles.csv, one row a slide:
    slide, patient, label, split (text, "" where missing) and a column m0, m1, ... a member with train, val, test or
    unused. thresholds: index member, columns threshold (NaN for more than two classes) and origin. metrics,
    environment: what the .json files hold; decisions: None of a run of an older version. `aggregator` holds all
    members, in evaluation mode, on `device`.
    """

    folder: Path
    config: StudyConfig
    aggregator: Aggregator
    description: Description
    plan: pd.DataFrame
    roles: pd.DataFrame
    thresholds: pd.DataFrame
    metrics: dict[str, Any]
    environment: dict[str, Any]
    device: torch.device
    decisions: Decisions | None = None

    @property
    def name(self) -> str:
        """The folder's name; with the folder around it where that holds several aggregators."""
        folder = self.folder.resolve()
        return folder.name if isinstance(self.config.model.name, str) else f"{folder.parent.name}/{folder.name}"

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the probability columns; of two, the last is the positive one."""
        return tuple(self.description.classes)

    @cached_property
    def task(self) -> Task:
        """What it predicts, as it was trained."""
        return self.description.what()

    @cached_property
    def facts(self) -> Facts:
        """What the members' training slides say, by name, (M, ...) each; {} of classes."""
        return {name: np.array(values, dtype=float) for name, values in self.description.facts.items()}

    @property
    def of_classes(self) -> bool:
        return self.task.name == "classification"

    @property
    def n_members(self) -> int:
        return len(self.description.seeds)

    def site_rows(self, site_S: Iterable[str]) -> np.ndarray | None:
        """The row of the members' map for slides of these sites, 0 for sites unknown to the study; None: one for all.

        That is where train.harmonize=combat: each member's map of a site that it did not train on is row 0 too.
        """
        return site_rows(site_S, self.description.sites) if self.description.harmonized == "combat" else None

    @cached_property
    def bag_of(self) -> dict[str, str]:
        """Slide of the study -> the row of roles.csv that it is part of: itself, or its patient (study.unit)."""
        return bag_of_slides(self.roles)

    @cached_property
    def slides_of(self) -> dict[str, list[str]]:
        """Row of roles.csv -> its slides, in the order in which their tiles lie in the bag."""
        return dict(zip(self.roles["slide"].astype(str), slides_of_bags(self.roles), strict=True))

    @property
    def unit(self) -> Unit:
        """What a bag is; of a run of an older version, which had none of patients, a slide."""
        if COLUMN in self.roles:
            return "patient"
        asked = unit_of(self.config.study.unit, self.config.task.name)
        return asked if self.roles["patient"].is_unique else "slide"

    def row_of(self, slide: str) -> int:
        """`site_rows` of one slide (or patient, as in roles.csv), the study's own or a new one with a TCGA barcode; 0:
        unknown."""
        known = dict(zip(self.roles["slide"], self.roles["site"], strict=True)) if "site" in self.roles else {}
        row_1 = self.site_rows([known.get(slide) or site_of_barcode(slide)])
        return 0 if row_1 is None else int(row_1[0])

    @property
    def feature_parts(self) -> list[dict[str, Any]]:
        """What environment.json says of each feature folder, in the order of the columns; one, or several joined."""
        features = self.environment["features"]
        parts: list[dict[str, Any]] = features.get("parts") or [features]
        return parts

    @property
    def join(self) -> Join:
        return "nearest" if self.environment["features"].get("join") == "nearest" else "equal"

    def of_part(self, index: int) -> TrainedStudy:
        """The study as far as one of its feature folders goes: how its features were made, and how wide they are."""
        part = self.feature_parts[index]
        if len(self.feature_parts) == 1:
            return self
        made = {key: part[key] for key in self.description.features if key in part}
        description = replace(self.description, features=made, in_dim=part["dim"])
        return replace(self, description=description, environment=self.environment | {"features": part})

    @cached_property
    def covariates(self) -> list[Covariate]:
        """What members must be told of a patient beside the slides, in the order of their columns."""
        return covariates_of(self.description.covariates)

    def covariates_of(self, slide: str) -> np.ndarray | None:
        """(1, V) of a slide of the study, as `covariates.csv` has it; None: of another slide, or without covariates."""
        if not self.covariates:
            return None
        table = read_covariates(self.folder)
        own = table[table["slide"] == slide]
        return raw_columns(self.covariates, own) if len(own) else None

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """predictions.csv: one row a member and slide; labels None where missing.

        Raises:
            RunError: it is damaged, or says something else of a slide than roles.csv.
        """
        roles = self.roles if f"m{self.plan['member'].iloc[0]}" in self.roles else None
        try:
            if not self.of_classes:
                return read_task_predictions(self.folder, self.task, self.facts, self.plan, roles)
            return read_predictions(self.folder, self.classes, self.plan, roles)
        except ReadbackError as error:
            raise _refused(*error.problems) from None

    @cached_property
    def conformal(self) -> TaskScores | None:
        """What a study of numbers or grades says of its own certainty; None of other studies, and of older ones.

        Raises:
            RunError: the file is damaged.
        """
        try:
            return read_task_scores(self.folder)
        except ValueError as error:
            raise _refused(str(error)) from None

    @cached_property
    def ladder(self) -> Ladder | TaskLadder | None:
        """The study's baselines, fitted; None of a study that has none.

        Raises:
            RunError: the file is damaged, or of another study.
        """
        if not (self.folder / LADDER).exists():
            return None
        try:
            fixed = (self.n_members, self.description.in_dim, len(self.classes))
            if not self.of_classes:
                return load_task_ladder(self.folder, self.task.name, *fixed)
            return load_ladder(self.folder, *fixed)
        except UNREADABLE as error:
            raise _refused(f"{self.folder / LADDER}: damaged, or of another study ({first_line(error)})") from None


def wrong_number(trained: TrainedStudy, given: int) -> str:
    """Why so many feature folders are of no use."""
    names = ", ".join(str(part["encoder"] or "unknown") for part in trained.feature_parts)
    n = len(trained.feature_parts)
    return (
        f"features.folder: expected {count(n, 'folder')} ({names}), in the order in which the study was trained, got "
        f"{given}"
    )


# --- opening ---------------------------------------------------------------------------------------------------------


def open_run(folder: Path, *, device: str = "auto") -> TrainedStudy:
    """Read a run folder that `python -m mil.train` finished.

    Args:
        device: where the members go: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises:
        RunError: not a run folder, of several aggregators, incomplete, damaged, or of a newer version.
    """
    refuse_unless_finished(folder)
    try:
        paths = [PATHS] if (folder / PATHS).exists() else []
        decided = [DECISIONS] if (folder / DECISIONS).exists() or listed(folder, DECISIONS) else []
        there = [name for name in (INPUTS, LADDER) if (folder / name).exists() or listed(folder, name)]
        refuse_changed(folder, (CONFIG, *NEEDED, *paths, *decided, *there))
        environment, metrics = read_environment(folder), read_metrics(folder)
        config = read_config(folder)
        plan = read_members(folder)
        roles = read_roles(folder, plan)
    except (ChangedError, ReadbackError, TableError) as error:
        raise RunError("cannot use the run folder", error.problems) from None
    aggregator, description = _read_members(folder)
    problems = unfit(folder, config, description, plan, metrics, environment)
    problems += [f"{folder}/{problem}" for problem in unfit_task(config, description, metrics, aggregator.n_logits)]
    if problems:
        raise _refused(*problems)
    where = _device(device)
    classes = description.task["name"] == "classification"
    thresholds = _thresholds(metrics, plan) if classes else pd.DataFrame(columns=["threshold", "origin"])
    decisions = _decisions(folder, description, plan) if decided else None
    held = aggregator.to(where)
    read = (plan, roles, thresholds, metrics, environment)
    return TrainedStudy(folder, config, held, description, *read, where, decisions)


def unfit(
    folder: Path,
    config: StudyConfig,
    description: Description,
    plan: pd.DataFrame,
    metrics: dict[str, Any],
    environment: dict[str, Any],
) -> list[str]:
    """Where the files of a run contradict each other."""
    problems = []
    if description.aggregator not in config.model.names:
        problems.append(f"{MEMBERS} holds {description.aggregator!r}, {CONFIG} says {', '.join(config.model.names)}")
    n_members = len(description.seeds)
    if plan["member"].tolist() != list(range(n_members)):
        problems.append(f"{PLAN}: expected members 0 to {n_members - 1}, as {MEMBERS} holds")
    elif plan["init_seed"].tolist() != description.seeds:
        problems.append(f"{PLAN}: init_seed differs from that of the members in {MEMBERS}")
    made, features = description.features, environment["features"]
    different = [key for key in made if key in features and features[key] != made[key]]
    if features["dim"] != description.in_dim or different:
        problems.append(f"{ENVIRONMENT}: features of another kind than {MEMBERS} says: {', '.join(different) or 'dim'}")
    return [f"{folder}/{problem}" for problem in problems]  # each begins with its file


def unfit_task(config: StudyConfig, description: Description, metrics: dict[str, Any], n_logits: int) -> list[str]:
    """Where the files of a run say different things of what is predicted."""
    name, n_members = description.task["name"], len(description.seeds)
    names = {CONFIG: config.task.name, METRICS: (metrics.get("task") or {}).get("name", "classification")}
    problems = [f"{file}: task {said}, but {MEMBERS} has {name}" for file, said in names.items() if said != name]
    if problems:
        return problems
    if name != "classification":
        return _unfit_facts(description, n_logits)
    if metrics["classes"] != description.classes:
        problems.append(f"{METRICS}: classes {metrics['classes']}, but {MEMBERS} has {description.classes}")
    if sorted(row["member"] for row in metrics["thresholds"]) != list(range(n_members)):
        problems.append(f"{METRICS}: expected a threshold of every member, 0 to {n_members - 1}")
    elif len(description.classes) == 2 and any(row["threshold"] is None for row in metrics["thresholds"]):
        problems.append(f"{METRICS}: a member has no threshold")
    return problems


def _unfit_facts(description: Description, n_logits: int) -> list[str]:
    """Facts that are not those of as many members, or from which no prediction can be made."""
    task, n_members = description.what(), len(description.seeds)
    wrong = [name for name, values in description.facts.items() if len(values) != n_members]
    if wrong:
        return [f"{MEMBERS}: facts {', '.join(wrong)}: expected those of {n_members} members"]
    nothing = np.zeros((1, n_logits))
    try:
        for m in range(n_members):
            task.predicted(nothing, {k: np.array(values[m], dtype=float) for k, values in description.facts.items()})
    except (LookupError, TypeError, ValueError) as error:
        return [f"{MEMBERS}: the facts of its members say too little for task={task.name} ({first_line(error)})"]
    return []


def refuse_unless_finished(folder: Path) -> None:
    """Raise RunError unless `folder` holds everything that training one aggregator leaves."""
    if not folder.is_dir():
        what = "is a file, expected a run folder" if folder.exists() else "no such folder"
        beside = _runs_in(folder.parent)
        hint = did_you_mean(folder.name, [path.name for path in beside])
        raise _refused(f"{folder}: {what}{hint}")
    inside = _runs_in(folder)
    if not (folder / MEMBERS).exists() and inside:
        listed = ", ".join(f"run={path}" for path in inside)
        kind = "several aggregators" if (folder / CONFIG).exists() else "run folders, and is none itself"
        raise _refused(f"{folder}: holds {kind}; choose one: {listed}")
    if not (folder / CONFIG).exists():
        raise _refused(f"{folder}: not a run folder (no {CONFIG}); expected one that python -m mil.train made")
    _refuse_newer(folder)
    missing = [name for name in NEEDED if not (folder / name).exists()]
    if not missing and not all_written(folder):
        missing = [HASHES]
    if missing:
        top = folder.parent if (folder.parent / CONFIG).exists() else folder
        raise _refused(
            f"{folder}: training has not finished (no {', '.join(missing)}); wait for it, or continue it with "
            f"python -m mil.train config={top / CONFIG} resume=true"
        )


def _refused(*problems: str) -> RunError:
    return RunError("cannot use the run folder", problems)


def _runs_in(folder: Path) -> list[Path]:
    """Sub-folders that look like run folders, finished or not."""
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []


def _refuse_newer(folder: Path) -> None:
    path = folder / ENVIRONMENT
    try:
        made_by = read_json(path).get("slide-mil", "") if path.exists() else ""
    except ReadbackError:
        return  # which reading it will say, with its hash
    if _release(made_by) > _release(toolkit_version()) and _release(toolkit_version()):
        raise _refused(
            f"{folder}: made by slide-mil {made_by}, which is newer than this {toolkit_version()}; update slide-mil"
        )


def _release(version: object) -> tuple[int, ...]:
    """`0.2.1.dev3` -> (0, 2, 1); () for what is no version."""
    found = re.match(r"\d+(\.\d+)*", str(version))
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def read_config(folder: Path) -> StudyConfig:
    """A run folder's config; RunError where this version does not understand it."""
    try:
        path = folder / CONFIG
        return load_config(StudyConfig, [f"config={path}"], adapt=lambda merged, *_: of_earlier_versions(merged))
    except ConfigError as error:
        made_by = f"{folder / CONFIG}: was changed, or written by another version of slide-mil"
        raise RunError("cannot use the run folder", [made_by, *error.problems]) from None


def _read_members(folder: Path) -> tuple[Aggregator, Description]:
    path = folder / MEMBERS
    try:
        return load_members(folder)
    except KeyError as error:
        known = f"this version knows {', '.join(AGGREGATORS)}"
        raise _refused(f"{path}: no aggregator {error}; {known}. Was it trained by a newer version?") from None
    except UNREADABLE as error:
        raise _refused(f"{path}: damaged, or written by another version of slide-mil ({first_line(error)})") from None


UNREADABLE = (
    *(SafetensorError, OSError, TypeError, ValueError, AttributeError, RuntimeError),
    *(ArithmeticError, LookupError, MemoryError),
)
"""What reading members of a damaged or foreign file may raise, from its bytes to the aggregator's own options."""


def _thresholds(metrics: dict[str, Any], plan: pd.DataFrame) -> pd.DataFrame:
    rows = {row["member"]: (row["threshold"], row["origin"]) for row in metrics["thresholds"]}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["threshold", "origin"])
    table = table.loc[plan["member"].tolist()].rename_axis("member")
    return table.assign(threshold=[math.nan if value is None else float(value) for value in table["threshold"]])


def _decisions(folder: Path, description: Description, plan: pd.DataFrame) -> Decisions:
    try:
        return read_decisions(folder, description.classes, plan["member"].tolist())
    except ReadbackError as error:
        raise _refused(*error.problems) from None


def _device(name: str) -> torch.device:
    """Raises RunError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError("no such device", [f"device={name}: {str(error).splitlines()[0]}; use auto or cpu"]) from None
    return device


# --- scoring ---------------------------------------------------------------------------------------------------------


def logits_of(trained: TrainedStudy, bags: Bags, *, done: Callable[[int], object] = lambda n: None) -> np.ndarray:
    """logits_MSC of every member for all slides of `bags`, float32, in the batches in which training evaluates.

    Args:
        done: called with the number of slides of every finished batch.
    """
    return member_logits(trained.aggregator, bags, trained.device, done)


def member_logits(
    aggregator: Aggregator, bags: Bags, device: torch.device, done: Callable[[int], object] = lambda n: None
) -> np.ndarray:
    """`logits_of` without a run folder: of an aggregator in evaluation mode that is on `device`."""
    labels_S, everyone = np.full(len(bags), -1, dtype=np.int64), range(len(bags))
    there = features_for_scoring(bags, device)
    steps = EvaluationSteps(bags, labels_S, everyone, aggregator.n_members, there=there)
    parts = []
    with torch.inference_mode(), nullcontext() if there else a_thread_a_bag(aggregator):
        for batch in steps:
            if batch.places:
                batch.places.arrive()
            parts.append(aggregator(batch).logits_MBC.float().cpu())
            done(parts[-1].shape[1])
    return torch.cat(parts, dim=1).numpy()


def score_slide(
    trained: TrainedStudy,
    features_TD: np.ndarray | Tensor,
    *,
    with_scores: bool = False,
    covariates_1V: np.ndarray | None = None,
    members: Sequence[int] | None = None,
) -> Prediction:
    """What every member says of one slide: logits_MBC with B = 1 and, if asked for, scores_MT; on the CPU.

    Args:
        features_TD: of all its tiles, float16 or float32, as `FeatureFolder.features` gives them; at least one tile.
        covariates_1V: of the patient, as `mil.study.covariates.raw_columns` gives them; None: an average patient.
        members: only these are asked, the rows of all others mean nothing; None: all.

    Raises:
        ValueError: another width than the study's, or no tile.
    """
    bag_TD = as_tensor(features_TD) if isinstance(features_TD, np.ndarray) else features_TD
    if bag_TD.ndim != 2 or bag_TD.shape[1] != trained.description.in_dim or not len(bag_TD):
        wanted = f"(tiles, {trained.description.in_dim})"
        raise ValueError(f"expected features {wanted} of at least one tile, got {tuple(bag_TD.shape)}")
    how: dict[str, Any] = {"with_scores": with_scores, "covariates_1V": covariates_1V, "members": members}
    return score_bag(trained.aggregator, bag_TD, trained.device, **how)


def score_bag(
    aggregator: Aggregator,
    bag_TD: Tensor,
    device: torch.device,
    *,
    with_scores: bool = False,
    covariates_1V: np.ndarray | None = None,
    members: Sequence[int] | None = None,
) -> Prediction:
    """`score_slide` without a run folder: of an aggregator in evaluation mode that is on `device`."""
    bags, uses_MB = bags_of(["slide"], [bag_TD]), np.full((aggregator.n_members, 1), members is None)
    if members is not None:
        uses_MB[list(members)] = True
    bags = replace(bags, covariates_SV=covariates_1V)
    batch = make_batch(bags, [0], np.array([-1]), uses_MB, one_group=device.type != "cpu").to(device)
    with torch.inference_mode(), a_thread_a_bag(aggregator):
        found = aggregator(batch, with_scores=with_scores)
    scores_MT = None if found.scores_MT is None else found.scores_MT.float().cpu()
    return Prediction(found.logits_MBC.float().cpu(), scores_MT)


def bags_of(slides: Sequence[str], features: Sequence[Tensor], site_S: np.ndarray | None = None) -> Bags:
    """Bags that use `features` (T_i, D) where they lie; site_S as `TrainedStudy.site_rows` gives it."""
    lengths_S = np.array([len(bag_TD) for bag_TD in features], dtype=np.int64)
    return Bags(tuple(slides), lengths_S, features[0].shape[1], "ram", tuple(features), site_S)
