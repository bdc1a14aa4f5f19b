"""python -m mil.compare RUN RUN ... [out=FOLDER] [bootstrap=1000] [seed=0]

Compares finished runs of one task on the same slides, targets and folds: mean and SD of the folds, the difference in
AUC with its paired interval, DeLong's test; patients are clusters. Of survival, regression and ordinal it is the
difference in every metric (C-index, Pearson's r, kappa, ...), with intervals from paired resamples of patients. A
folder that holds several aggregators (model.name=[...]) stands
for all of them. Writes comparison.csv, differences.csv, comparison.md, report.html and figures/ into FOLDER (default: a
folder `comparison` beside the first run). Between runs of several seeds (or repeats) the intervals hold the variance of
training again; of a single training they leave it out, and say so.

bootstrap=0 leaves the intervals of differences out. Any other number, and seed, are of the resamples; intervals of
differences in AUC are computed, not drawn, and do not change with them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from extract.config import ConfigError, did_you_mean
from extract.ending import ended
from extract.lock import only_command_in
from extract.places import shown, with_places
from extract.stores.looking import is_dir
from extract.stores.sessions import stores_of

NUMBERS = {"bootstrap": 1000, "seed": 0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the runs cannot be compared (nothing written), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or any(a in ("-h", "--help", "help") for a in arguments):
        print((__doc__ or "").strip())
        return 0 if arguments else 2

    def compare() -> int:
        folders, out, numbers = parse(arguments)
        with only_command_in(out, "mil.compare"), stores_of(out=out, also=tuple(folders)):
            from mil.report.comparison import compare_runs  # matplotlib: only now that the arguments are valid

            text = compare_runs(folders, out, resamples=numbers["bootstrap"], seed=numbers["seed"])
        print(f"{text}\n\nReport: {shown(out / 'report.html')}")
        return 0

    return ended(compare, interrupted=lambda: "Interrupted.")


def parse(arguments: Sequence[str]) -> tuple[list[Path], Path, dict[str, int]]:
    """Run folders, the folder to write to, and the numbers.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    folders, problems, given = [], [], dict[str, str]()
    try:
        arguments = [
            f"{key}{equals}{with_places(value)}" if equals else with_places(key)
            for key, equals, value in (argument.partition("=") for argument in arguments)
        ]
    except ValueError as error:
        raise ConfigError("cannot compare", [str(error)]) from None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            folders.append(Path(argument))
        elif key in ("out", *NUMBERS):
            given[key] = value
        else:
            problems.append(f"{key}: unknown key{did_you_mean(key, ['out', *NUMBERS])}")
    problems += [f"{folder}: no such folder" for folder in folders if not is_dir(folder)]
    bad = [k for k in NUMBERS if k in given and not (given[k].isascii() and given[k].isdigit())]
    problems += [f"{key}: expected a whole number from 0, got {given[key]!r}" for key in bad]
    if not folders:
        problems.append("no run folder given; for instance: python -m mil.compare runs/a runs/b")
    out = Path(given["out"]) if given.get("out") else (folders[0].parent if folders else Path()) / "comparison"
    if (out / "predictions.csv").exists():
        problems.append(f"out={out}: is a run folder, its report would be lost; name another one")
    if problems:
        raise ConfigError("cannot compare", problems)
    return folders, out, {key: int(given.get(key, default)) for key, default in NUMBERS.items()}


if __name__ == "__main__":
    sys.exit(main())
