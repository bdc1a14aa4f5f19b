"""A finished run folder read back: its config, plan, members, thresholds and predictions; and what it says of a slide.

Axes: S slides, T tiles, D features, M members, B bags of a batch, C outputs (1 for two classes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor

from extract.config import ConfigError, ProblemsError, did_you_mean, load_config
from extract.features.cache import toolkit_version
from mil.aggregators import AGGREGATORS
from mil.aggregators.batch import Prediction
from mil.aggregators.contract import Aggregator
from mil.aggregators.threads import a_thread_a_bag
from mil.config import StudyConfig, of_earlier_versions
from mil.training.bags import Bags, EvaluationSteps, as_tensor, make_batch
from mil.training.members import FILE as MEMBERS
from mil.training.members import Description, load_members

CONFIG, PLAN, ROLES, PREDICTIONS, METRICS = "config.yaml", "plan.csv", "roles.csv", "predictions.csv", "metrics.json"
ENVIRONMENT = "environment.json"
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
    environment: what the .json files hold. `aggregator` holds all members, in evaluation mode, on `device`.
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

    @property
    def name(self) -> str:
        """The folder's name; with the folder around it where that holds several aggregators."""
        folder = self.folder.resolve()
        return folder.name if isinstance(self.config.model.name, str) else f"{folder.parent.name}/{folder.name}"

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the probability columns; of two, the last is the positive one."""
        return tuple(self.description.classes)

    @property
    def n_members(self) -> int:
        return len(self.description.seeds)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """predictions.csv: one row a member and slide; labels None where missing."""
        path = self.folder / PREDICTIONS
        text = ("slide", "patient", "label", "split", "role")
        header = pd.read_csv(path, nrows=0).columns
        numbers = {name: [""] for name in header if name not in text}
        table = pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=numbers)
        labels = [label or None for label in table["label"]]
        return table.assign(label=pd.Series(labels, index=table.index, dtype=object))


# --- opening ---------------------------------------------------------------------------------------------------------


def open_run(folder: Path, *, device: str = "auto") -> TrainedStudy:
    """Read a run folder that `python -m mil.train` finished.

    Args:
        device: where the members go: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.

    Raises:
        RunError: not a run folder, of several aggregators, incomplete, damaged, or of a newer version.
    """
    refuse_unless_finished(folder)
    environment, metrics = _read_json(folder / ENVIRONMENT), _read_json(folder / METRICS)
    config = _read_config(folder)
    aggregator, description = _read_members(folder)
    plan, roles = _read_plan(folder, len(description.seeds))
    where = _device(device)
    return TrainedStudy(
        folder,
        config,
        aggregator.to(where),
        description,
        plan,
        roles,
        _thresholds(folder, metrics, plan),
        metrics,
        environment,
        where,
    )


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
    made_by = _read_json(path).get("slide-mil", "") if path.exists() else ""
    if _release(made_by) > _release(toolkit_version()) and _release(toolkit_version()):
        raise _refused(
            f"{folder}: made by slide-mil {made_by}, which is newer than this {toolkit_version()}; update slide-mil"
        )


def _release(version: object) -> tuple[int, ...]:
    """`0.2.1.dev3` -> (0, 2, 1); () for what is no version."""
    found = re.match(r"\d+(\.\d+)*", str(version))
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(f"{path}: cannot be read ({error}); train again") from None
    if not isinstance(content, dict):
        raise _refused(f"{path}: expected a dictionary, got a {type(content).__name__}; train again")
    return content


def _read_config(folder: Path) -> StudyConfig:
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
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise _refused(f"{path}: damaged, or written by another version of slide-mil ({what[0]})") from None


def _read_plan(folder: Path, n_members: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    try:
        plan = pd.read_csv(folder / PLAN)
        roles = pd.read_csv(folder / ROLES, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise _refused(f"{folder}: {PLAN} or {ROLES} cannot be read ({error})") from None
    needed = ["slide", "patient", *(f"m{member}" for member in range(n_members))]
    absent = [name for name in needed if name not in roles.columns]
    problems = [f"{folder / ROLES}: no column {name!r}" for name in absent]
    if "member" not in plan.columns or plan["member"].tolist() != list(range(n_members)):
        problems.append(f"{folder / PLAN}: expected members 0 to {n_members - 1}, as {MEMBERS} holds")
    if problems:
        raise _refused(*problems)
    return plan, roles


def _thresholds(folder: Path, metrics: dict[str, Any], plan: pd.DataFrame) -> pd.DataFrame:
    try:
        rows = {int(row["member"]): (row["threshold"], row["origin"]) for row in metrics["thresholds"]}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["threshold", "origin"])
        table = table.loc[plan["member"].tolist()].rename_axis("member")
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(f"{folder / METRICS}: expected a threshold of every member ({error!r})") from None
    return table.astype({"threshold": float})


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
    labels_S = np.full(len(bags), -1, dtype=np.int64)
    on_accelerator = trained.device.type != "cpu"
    steps = EvaluationSteps(bags, labels_S, range(len(bags)), trained.n_members, one_group=on_accelerator)
    parts = []
    with torch.inference_mode(), a_thread_a_bag(trained.aggregator):
        for batch in steps:
            parts.append(trained.aggregator(batch.to(trained.device)).logits_MBC.float().cpu())
            done(parts[-1].shape[1])
    return torch.cat(parts, dim=1).numpy()


def score_slide(trained: TrainedStudy, features_TD: np.ndarray | Tensor, *, with_scores: bool = False) -> Prediction:
    """What every member says of one slide: logits_MBC with B = 1 and, if asked for, scores_MT; on the CPU.

    Args:
        features_TD: of all its tiles, float16 or float32, as `FeatureFolder.features` gives them; at least one tile.

    Raises:
        ValueError: another width than the study's, or no tile.
    """
    bag_TD = as_tensor(features_TD) if isinstance(features_TD, np.ndarray) else features_TD
    if bag_TD.ndim != 2 or bag_TD.shape[1] != trained.description.in_dim or not len(bag_TD):
        wanted = f"(tiles, {trained.description.in_dim})"
        raise ValueError(f"expected features {wanted} of at least one tile, got {tuple(bag_TD.shape)}")
    bags = bags_of(["slide"], [bag_TD])
    uses_MB = np.ones((trained.n_members, 1), dtype=bool)
    on_accelerator = trained.device.type != "cpu"
    batch = make_batch(bags, [0], np.array([-1]), uses_MB, one_group=on_accelerator).to(trained.device)
    with torch.inference_mode(), a_thread_a_bag(trained.aggregator):
        found = trained.aggregator(batch, with_scores=with_scores)
    scores_MT = None if found.scores_MT is None else found.scores_MT.float().cpu()
    return Prediction(found.logits_MBC.float().cpu(), scores_MT)


def bags_of(slides: Sequence[str], features: Sequence[Tensor]) -> Bags:
    """Bags that use `features` (T_i, D) where they lie."""
    lengths_S = np.array([len(bag_TD) for bag_TD in features], dtype=np.int64)
    return Bags(tuple(slides), lengths_S, features[0].shape[1], "ram", tuple(features))
