"""python -m mil.train config=NAME [key=value ...]

Trains, cross-validates and reports one study. NAME is a path or a config that ships with the toolkit.
With slides.folder=FOLDER (or paths in the cohort CSV) slides without features are extracted first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.config import config_from_command_line
from extract.ending import ended
from mil.config import StudyConfig, foreign_options, options_help, outranked, study_problems, without

if TYPE_CHECKING:
    from mil.pipeline.study import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 every member of an aggregator diverged, 2 config or data are wrong or the disk refused what
    was to be written, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(
        StudyConfig, arguments, __doc__ or "", options_help(), also=study_problems, adapt=for_today
    )
    config = config.model_copy(update={"out": config.out or default_out(arguments)})

    def train() -> int:
        from mil.pipeline.study import run_study  # imports torch and lightning: only now that the config is valid

        outcome = run_study(config, command=["python", "-m", "mil.train", *arguments])
        print_outcome(outcome)
        return 1 if outcome.lost else 0

    return ended(
        train,
        interrupted=lambda: f"Interrupted. {how_to_continue(config)}",
        after=lambda: how_to_continue(config),
    )


def for_today(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """What the file says for the aggregators that are named now; devices=auto of an earlier version's file is one."""
    train = file.get("train")
    if isinstance(train, dict) and train.get("devices") == "auto" and "train.devices" not in given:
        merged = merged | {"train": merged["train"] | {"devices": 1}}
    return for_named_aggregators(merged, file, given)


def for_named_aggregators(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The config without what the file has for other aggregators than those now named.

    Says which that is, and which keys of the command line an aggregator's own settings outrank.
    """
    foreign = foreign_options(merged, file, given)
    if foreign:
        print(f"Left out, as the config file has them for another aggregator: {', '.join(foreign)}", file=sys.stderr)
    for key in foreign:
        merged = without(merged, key)
    for line in outranked(merged, given):
        print(line, file=sys.stderr)
    return merged


def default_out(arguments: Sequence[str]) -> Path:
    """runs/NAME for config=NAME.yaml, runs/study without a config."""
    names = [a.partition("=")[2] for a in arguments if a.startswith("config=")]
    return Path("runs") / (Path(names[-1]).stem if names else "study")


def how_to_continue(config: StudyConfig) -> str:
    assert config.out is not None
    if (config.out / "config.yaml").exists():
        return f"resume=true continues from the last finished epoch in {config.out}."
    return "Nothing was trained yet; features that are finished are kept, and the same command continues."


def print_outcome(outcome: Outcome) -> None:
    """The table and where the report is; on standard error what to try where every member diverged."""
    print()
    print(outcome.table)
    print(f"\nReport: {outcome.folder / 'report.html'}")
    for name in outcome.lost:
        epochs = [row["epoch"] for row in outcome.metrics[name]["diverged"]]
        print(
            f"{name}: every member diverged, the first in epoch {min(epochs)}: there is nothing to report. "
            "Set train.lr smaller, a tenth for instance, or train.standardize=true",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
