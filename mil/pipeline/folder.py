"""The run folder: continued, replaced or refused, and what is written into it before training."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from extract.cohort import Cohort
from extract.config import ConfigError, ProblemsError, Run, read_yaml, to_yaml
from extract.features.cache import Header
from extract.leftovers import is_unused, remove_aside, remove_folder, remove_partials
from extract.owners import refuse_removing
from extract.whole import write_whole
from mil.config import StudyConfig
from mil.config_reading import of_earlier_versions
from mil.results.readback import METRICS, read_metrics
from mil.study.reviews import FILE as REVIEWS
from mil.study.roles import Plan
from mil.study.saved import save_plan
from mil.training.hashes import all_written, refuse_changed
from mil.training.inputs import save_inputs


class RunFolderError(ProblemsError):
    """The run folder is no longer the one that this command began."""


NOT_FOR_PUBLICATION = (
    "# With resume=true this continues the run. It names folders of this machine: not for publication.\n"
)

OF_A_MACHINE = ("slides.stage", "slides.scratch", "slides.scratch_gb")
"""Keys that change nothing of a study: it may be continued on another machine, with other ones."""


@dataclass(frozen=True)
class Place:
    """Run folders as this command began them: for each, which folder and which config.yaml on the disk."""

    identities: dict[Path, tuple[tuple[int, int], ...]]

    @classmethod
    def of(cls, config: StudyConfig) -> Place:
        """Of the run folder, and those of its aggregators, which `write_run_folder` has made."""
        assert config.out is not None
        folders = {config.out, *(run_folder(config, name) for name in config.model.names)}
        return cls({folder: identity(folder) for folder in folders})

    def check(self) -> None:
        """Before something is written: raise RunFolderError if a folder was removed or replaced meanwhile."""
        for folder, before in self.identities.items():
            try:
                same, what = identity(folder) == before, "replaced by another one"
            except OSError:
                same, what = False, "removed, or emptied"
            if not same:
                problem = f"{folder}: was {what} while this study was training; nothing more is written there"
                raise RunFolderError("stopped", [f"{problem}. Start again, or set out=OTHER"])


def identity(folder: Path) -> tuple[tuple[int, int], ...]:
    """Device and inode of a run folder and of its config.yaml."""
    return tuple((stat.st_dev, stat.st_ino) for stat in (folder.stat(), (folder / "config.yaml").stat()))


def run_folder(config: StudyConfig, name: str) -> Path:
    """The run folder itself for one aggregator, a sub-folder each for several."""
    assert config.out is not None
    return config.out if isinstance(config.model.name, str) else config.out / name.replace(":", "-")


def finished_metrics(config: StudyConfig, name: str) -> dict[str, Any] | None:
    """What an aggregator of a resumed run had already reported; it is not trained again."""
    folder = run_folder(config, name)
    return finished(folder) if config.resume and is_finished(folder) else None


def is_finished(folder: Path) -> bool:
    """Whether everything was written; a run that was killed while it reported goes on from its last checkpoint."""
    return (folder / METRICS).exists() and all_written(folder)


def finished(folder: Path) -> dict[str, Any]:
    """metrics.json of a finished run; ProblemsError where it was changed or damaged."""
    refuse_changed(folder, [METRICS])
    remove_checkpoints(folder)
    return read_metrics(folder)


def remove_checkpoints(folder: Path) -> None:
    """They are only needed to resume."""
    for part in (folder, folder / "inner", folder / "without_covariates", folder / "concatenated"):
        shutil.rmtree(part / "checkpoints", ignore_errors=True)


def refuse_or_reuse(config: StudyConfig) -> dict[str, dict[str, Any]] | None:
    """A run folder that exists is continued, replaced or refused, as the config says; metrics of a finished study."""
    assert config.out is not None
    init = config.model.init
    if init and init.resolve().is_relative_to(config.out.resolve()):
        raise ConfigError("model.init cannot be used", [f"{init} is in this study's own run folder; set another out"])
    remove_aside(config.out)
    if is_unused(config.out):
        return None
    if config.overwrite:
        if not (config.out / "config.yaml").exists():
            raise ConfigError("overwrite", [f"{config.out}: not a run folder (no config.yaml); it will not be deleted"])
        refuse_removing(config.out)
        refuse_losing_reviews(config.out)
        return None  # `write_run_folder` removes it, when all that is to replace it is there
    if not config.resume:
        raise ConfigError(
            "run folder exists",
            [f"{config.out}: set out=OTHER, or resume=true to continue it, or overwrite=true to replace it"],
        )
    refuse_other_config(config)
    remove_partials([config.out, *(path for path in config.out.rglob("*") if path.is_dir())])
    found = {name: run_folder(config, name) for name in config.model.names}
    if all(is_finished(folder) for folder in found.values()):
        return {name: finished(folder) for name, folder in found.items()}
    return None


def refuse_losing_reviews(folder: Path) -> None:
    """Raise ConfigError where the run folder holds what somebody said of its slides, which nothing can make again."""
    reviews = [path for path in (folder / REVIEWS, *sorted(folder.glob(f"*/{REVIEWS}"))) if path.is_file()]
    problems = [
        f"{path} would be deleted with the run folder. Move it elsewhere (reviews=FILE uses it there), or set out=OTHER"
        for path in reviews
        if path.read_text(encoding="utf-8-sig", errors="replace").count("\n") > 1  # more than the columns' names
    ]
    if problems:
        raise ConfigError("overwrite: slides were reviewed", problems)


def refuse_other_config(config: StudyConfig) -> None:
    """Resuming with other settings would mix two studies."""
    assert config.out is not None
    before = config.out / "config.yaml"
    if not before.exists():
        raise ConfigError("resume", [f"{config.out}: not a run folder (no config.yaml)"])
    try:
        read_yaml(before)  # refuses what is damaged; compared is what YAML itself says, as of the other
    except ConfigError as error:
        raise ConfigError(
            "resume: the run's config was damaged; restore it, or set out=OTHER", error.problems
        ) from None
    texts = (before.read_text(encoding="utf-8"), resolved_yaml(config))
    old, new = (flat(of_earlier_versions(yaml.safe_load(text) or {})) for text in texts)
    old = flat(yaml.safe_load(resolved_yaml(StudyConfig()))) | old  # keys that are newer than the run
    keys = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in OF_A_MACHINE]
    different = [f"{key}: was {old.get(key, '-')}, now {new.get(key, '-')}" for key in keys]
    if different:
        raise ConfigError("resume with another config", different)


def resolved_yaml(config: StudyConfig) -> str:
    """The config that makes this study again; where it runs is said anew each time, and does not change it."""
    return to_yaml(config.model_copy(update={"resume": False, "overwrite": False, "plan": False, "run": Run()}))


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": value}} as {"a.b": value}."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        below = {f"{key}.{name}": inner for name, inner in flat(value).items()} if isinstance(value, dict) else {}
        plain |= below if isinstance(value, dict) else {str(key): value}
    return plain


def write_run_folder(
    config: StudyConfig, plans: Mapping[str, Plan], cohort: Cohort, headers: Mapping[str, Header]
) -> None:
    """The resolved config; features.csv and the plan of every aggregator (`plans`: by name) that is still to train.

    A run that is to be replaced goes first, and what processes that were killed left in one that is continued.
    """
    assert config.out is not None
    if config.overwrite and config.out.exists():
        remove_folder(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    remove_partials([config.out])
    for folder in dict.fromkeys([config.out, *(run_folder(config, name) for name in config.model.names)]):
        folder.mkdir(exist_ok=True)
        write_whole(folder / "config.yaml", NOT_FOR_PUBLICATION + resolved_yaml(config))
    for name in config.model.names:
        if finished_metrics(config, name) is None:
            save_inputs(run_folder(config, name), headers)
            save_plan(plans[name], cohort, run_folder(config, name))
