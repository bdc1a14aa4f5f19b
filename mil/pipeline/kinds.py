"""Targets with different numbers of outputs: a joint study of each kind, all trained in one pass over the features."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.finetuning.one_device import device_of
from extract.whole import write_whole
from mil.pipeline.data import Study
from mil.pipeline.training import (
    Trained,
    as_trained,
    inner_history,
    memory_for_activations,
    new_module,
    outcome_of,
    pass_bytes,
    tell_diverged,
    train_members,
)
from mil.training.module import CHECKPOINT, fit, read_back, saved
from mil.training.panel import Panel

PANEL = "panel"


def train_kinds(kinds: Sequence[Study], name: str, folder: Path) -> list[Trained]:
    """All members of every kind's plan; in one pass where that fits, else each kind in passes of its own."""
    if not fits_one_pass(kinds, name):
        return [train_members(kind, name, place) for kind, place in zip(kinds, places(kinds, folder), strict=True)]
    found = panel_pass(kinds, name, folder)
    return [as_trained(kind, [everyone(kind)], [one]) for kind, one in zip(kinds, found, strict=True)]


def inner_kinds(kinds: Sequence[Study], name: str, folder: Path) -> list[pd.DataFrame]:
    """The curves of inner members, which are the plans here."""
    if not fits_one_pass(kinds, name):
        return [inner_history(kind, name, place) for kind, place in zip(kinds, places(kinds, folder), strict=True)]
    return [pd.DataFrame(one["history"]) for one in panel_pass(kinds, name, folder, inner=True)]


def everyone(kind: Study) -> np.ndarray:
    return np.arange(len(kind.plan))


def places(kinds: Sequence[Study], folder: Path) -> list[Path]:
    """A folder for the passes of each kind; the folder itself where there is one."""
    found = [folder] if len(kinds) == 1 else [folder / f"kind{i}" for i in range(len(kinds))]
    for place in found:
        place.mkdir(parents=True, exist_ok=True)
    return found


def fits_one_pass(kinds: Sequence[Study], name: str) -> bool:
    """Whether several kinds train together; said where they do not."""
    if len(kinds) == 1:
        return False
    n, wanted = sum(len(kind.plan) for kind in kinds), kinds[0].config.train.members_per_pass
    why = ""
    config = kinds[0].config
    if device_of(config.train.accelerator).type != "cpu" or config.data.memory == "device":
        why = "on a device each needs its own copies of the batches"
    elif any(kind.length_M is not None for kind in kinds):
        why = "members train for different numbers of epochs (study.train_sizes)"
    elif wanted != "auto" and wanted < n:
        why = f"train.members_per_pass={wanted}"
    elif wanted == "auto" and sum(pass_bytes(kind, name) for kind in kinds) > memory_for_activations():
        why = "together their activations would take too much memory"
    if why:
        print(f"{name}: each kind of outputs in passes of its own: {why}")
    return not why


def panel_pass(kinds: Sequence[Study], name: str, folder: Path, *, inner: bool = False) -> list[dict[str, Any]]:
    """What the members of every kind came to, as `mil.pipeline.training.outcome_of` has it; read back if resumed."""
    first, checkpoints = kinds[0], folder / "checkpoints" / PANEL
    done = checkpoints.with_suffix(".pt")
    if first.config.resume and done.exists():
        before = read_back(done)
        if before is not None:
            found: list[dict[str, Any]] = before
            return found
    if not first.config.resume:
        shutil.rmtree(checkpoints.parent, ignore_errors=True)
    modules = [new_module(kind, name, everyone(kind)) for kind in kinds]
    how: dict[str, Any] = {"resume": first.config.resume, "progress": sys.stderr.isatty()}
    logs = None if inner else folder / "logs" / PANEL
    fit(Panel(modules), checkpoints, logs, before_writing=first.check_place, **how)
    found = []
    for kind, module in zip(kinds, modules, strict=True):
        tell_diverged(kind.plan, module.diverged_M)
        found.append(outcome_of(kind, module, everyone(kind), inner=inner))
    first.check_place()
    write_whole(done, saved(found))
    (checkpoints / CHECKPOINT).unlink(missing_ok=True)
    return found
