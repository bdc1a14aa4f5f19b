"""python -m mil.train config=NAME [key=value ...]

Trains, cross-validates and reports one study. NAME is a path or a config that ships with the toolkit.
plan=true prints what would be trained, and what it would take, and stops.
With slides.folder=FOLDER (or paths in the cohort CSV) slides without features are extracted first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from extract.config import config_from_command_line
from extract.ending import ended
from extract.lock import only_command_in
from extract.places import in_words, shown
from mil.config import StudyConfig
from mil.config_problems import study_problems
from mil.config_reading import for_today, options_help

if TYPE_CHECKING:
    from mil.api.study import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 every member of an aggregator diverged, 2 config or data are wrong or the disk refused what
    was to be written, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(
        StudyConfig, arguments, __doc__ or "", options_help(), also=study_problems, adapt=for_today
    )
    config = config.model_copy(update={"out": config.out or default_out(arguments)})
    if config.plan:
        return ended(
            lambda: print_plan(config), interrupted=lambda: "Interrupted.", after=lambda: "Nothing was written."
        )

    def train() -> int:
        from mil.pipeline.fetching import stores_of_study

        assert config.out is not None
        with only_command_in(config.out, "mil.train"), stores_of_study(config, config.out):
            from mil.api.study import run_study  # torch and lightning: only for a valid config, and a free run folder

            run = run_study(config, command=["python", "-m", "mil.train", *arguments])
        print_outcome(run)
        return 1 if run.lost else 0

    return ended(
        train,
        interrupted=lambda: f"Interrupted. {how_to_continue(config)}",
        after=lambda: how_to_continue(config),
    )


def print_plan(config: StudyConfig) -> int:
    """What would be trained, and what it would take; nothing is written."""
    from mil.pipeline.fetching import stores_of_study
    from mil.pipeline.preview import preview  # torch: only for a valid config

    with stores_of_study(config):
        print(in_words(preview(config)))
    return 0


def default_out(arguments: Sequence[str]) -> Path:
    """runs/NAME for config=NAME.yaml, runs/study without a config."""
    names = [a.partition("=")[2] for a in arguments if a.startswith("config=")]
    return Path("runs") / (Path(names[-1]).stem if names else "study")


def how_to_continue(config: StudyConfig) -> str:
    assert config.out is not None
    if os.path.exists(config.out / "config.yaml"):  # False, where Path.exists raises, for a name that is too long
        return f"resume=true continues from the last finished epoch in {shown(config.out)}."
    return "Nothing was trained yet; features that are finished are kept, and the same command continues."


def print_outcome(run: Run) -> None:
    """The table and where the report is; on standard error what to try where every member diverged."""
    print()
    print(run.summary)
    print(f"\nReport: {shown(str(run.report))}")
    for name, epoch in run.lost.items():
        print(
            f"{name}: every member diverged, the first in epoch {epoch}: there is nothing to report. "
            "Set train.lr smaller, a tenth for instance, or train.standardize=true",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
