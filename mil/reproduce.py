"""python -m mil.reproduce data.root=FOLDER [key=value ...]

The ledger: runs what has a published or independent reference, with its own folds and seeds, and prints measured
against reference, the tolerance and a verdict. Musk1, Tiger, Elephant and UCSB breast are .npz files in data.root;
Camelyon16's Phikon features are its Parquet files there, or what config=camelyon16-paper.yaml imported. What is not
here is said, with how to get it. quick=true takes a few seconds and needs no data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.config import ConfigError, config_from_command_line, did_you_mean
from extract.ending import ended
from extract.lock import only_command_in
from extract.stores.sessions import stores_of
from mil.ledger.config import ReproduceConfig


def problems(tree: dict[str, Any]) -> list[str]:
    """A folder that does not exist."""
    data = tree.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return [f"data.root: no such folder: {root}"] if root and not Path(str(root)).is_dir() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 something differs and strict=true, 2 the arguments or data are wrong, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(ReproduceConfig, arguments, __doc__ or "", also=problems)

    def run() -> int:
        with only_command_in(config.out, "mil.reproduce"), stores_of(config, out=config.out):
            return reproduce(config, " ".join(["python -m mil.reproduce", *arguments]))

    return ended(run, interrupted=lambda: "Interrupted; the same command begins again, Camelyon16 where it stopped.")


def reproduce(config: ReproduceConfig, command: str) -> int:
    """Run the entries, print the table and write it; the exit code."""
    from importlib.metadata import version  # and what imports torch: only now that the config is valid

    from mil.ledger.entries import ENTRIES, MADE_UP
    from mil.ledger.lines import DIFFERS, as_text, run_entry, write_ledger

    table = MADE_UP if config.quick else ENTRIES
    unknown = [
        f"entries: no entry {name!r}{did_you_mean(name, list(table))}" for name in config.entries if name not in table
    ]
    if unknown:
        raise ConfigError("problems in the config", unknown)
    lines = []
    for name in config.entries or table:
        print(f"{name}: {table[name].what}", file=sys.stderr, flush=True)
        lines.append(run_entry(name, table[name], config))
    print(as_text(lines))
    packages = ("slide-mil", "torch", "scikit-learn", "numpy")
    versions = f"Versions: {', '.join(f'{package} {version(package)}' for package in packages)}"
    write_ledger(config.out, lines, [f"Command: `{command}`", "", versions])
    print(f"\nTable: {config.out / 'ledger.md'}")
    return 1 if config.strict and any(line.verdict == DIFFERS for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
