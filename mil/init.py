"""python -m mil.init features.folder=FOLDER cohort=FILE [key=value ...]

Looks at a folder of features and at the cohort's table (or two: cohort.clinical=FILE cohort.slides=FILE), prints what
is there, and writes a commented config for mil.train to out=FILE, never over another file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from extract.config import ConfigError, config_from_command_line
from extract.ending import ended
from extract.places import shown
from extract.stores.sessions import stores_of
from extract.whole import write_whole
from mil.beginning.config import InitConfig, init_problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 2 config, table or folder are wrong, or the file is there, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(InitConfig, arguments, __doc__ or "", also=init_problems)

    def write() -> int:
        with stores_of(config, out=config.out):
            return look(config)

    return ended(write, interrupted=lambda: "Interrupted.", after=lambda: "Nothing was written.")


def look(config: InitConfig) -> int:
    """Print and write."""
    refuse_existing(config.out)
    from extract.features.folder import open_feature_folder  # pandas, h5py: only for a valid config
    from mil.beginning.findings import find, told_of_features
    from mil.beginning.text import config_text, told

    assert config.cohort is not None
    assert config.features.folder is not None
    features = open_feature_folder(config.features.folder, config.features.layout)
    found = find(config.cohort, config.columns, features)
    print("\n".join([*told_of_features(features), *told(found)]))
    if "slide" not in found.columns:
        raise ConfigError("no config", ["no column of the table names slides with features; set columns.slide=NAME"])
    refuse_existing(config.out)  # again: looking takes a while
    write_whole(config.out, config_text(found, config.features.folder, config.features.layout, config.out))
    print(f"Written: {shown(config.out)}. Next: python -m mil.train config={shown(config.out)} plan=true")
    return 0


def refuse_existing(path: Path) -> None:
    """Raise ConfigError for what is there, be it a link that leads nowhere."""
    if os.path.lexists(path):
        raise ConfigError("file exists", [f"{path}: is there, and is not overwritten; set out=OTHER.yaml"])


if __name__ == "__main__":
    sys.exit(main())
