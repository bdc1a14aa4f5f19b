"""The folder of predictions: refused, emptied, and what lies in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from extract.config import ConfigError
from extract.leftovers import PARTIAL, remove_partials
from mil.prediction.job import FEATURES

PREDICTIONS, MEMBERS, FAILED = "predictions.csv", "members.csv", "failed.csv"

CONFIG, ENVIRONMENT, PATHS = "predict.yaml", "environment.json", "paths.json"

OF_REPORT = {"metrics.json", "slides.csv", "patients.csv", "subgroups.csv", "figures", "report.html"}
OF_REPORT |= {"model-card.md", "checklists.md"}

WRITTEN = {PREDICTIONS, MEMBERS, FAILED, CONFIG, ENVIRONMENT, PATHS} | OF_REPORT
"""What a prediction leaves in its folder; FEATURES besides, which overwrite=true keeps."""


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise ConfigError unless OUT is new, holds extracted features only, or predictions that may be replaced: those
    that a process which was killed did not finish, or all with `overwrite`."""
    names = os.listdir(out) if out.is_dir() else []
    found = {name for name in names if name != FEATURES and not PARTIAL.fullmatch(name)}
    if out.exists() and not out.is_dir():
        raise ConfigError("predictions exist", [f"{out}: is a file, expected a folder; set out=OTHER"])
    if not found:
        return
    if CONFIG not in found:
        raise ConfigError(
            "predictions exist", [f"{out}: not a folder of predictions (no {CONFIG}), but not empty; set out=OTHER"]
        )
    if not overwrite and PREDICTIONS in found:
        raise ConfigError("predictions exist", [f"{out}: set out=OTHER, or overwrite=true to replace them"])


def remove_written(out: Path) -> None:
    """What an earlier prediction left, finished or not, and nothing else; what says whose folder it is, last."""
    remove_partials([out, out / "figures"])
    for name in [PREDICTIONS, *sorted(WRITTEN - {PREDICTIONS, CONFIG}), CONFIG]:
        if (out / name).is_dir() and not (out / name).is_symlink():  # what a link points to is not ours
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
