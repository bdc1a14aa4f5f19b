"""python -m mil.view run=RUN [run=RUN2] [key=value ...]

Shows a study in the browser: its slides with predictions, tile scores over each slide, reviews. Two runs are compared
side by side. Without a run (slides.folder=... features.folder=...): slides, tissue masks and grids before training,
with regions to leave out written into tissue.regions. Prints the address, which holds a random token, and opens it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from extract.config import ConfigError, config_from_command_line
from extract.ending import ended
from mil.viewer.config import ViewConfig, runs_as_list, view_problems

EXTRA = "python -m mil.view needs two more packages: pip install 'slide-mil[view]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 2 something is wrong, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(ViewConfig, runs_as_list(arguments), __doc__ or "", also=view_problems)

    def view() -> int:
        try:
            from mil.viewer.serving import serve  # torch, starlette: only for a valid config
        except ModuleNotFoundError as error:
            if error.name not in ("starlette", "uvicorn"):
                raise
            raise ConfigError("not installed", [EXTRA]) from None
        serve(config, parts_of(config.run))
        return 0

    return ended(view, interrupted=lambda: "Stopped.", known=viewing_errors)


def parts_of(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name and run folder of every aggregator of the runs."""
    from mil.api.study import aggregators_in, part_of

    parts = []
    for folder in folders:
        names = aggregators_in(folder)
        for name in names:
            own = folder.resolve().name
            parts.append((f"{own}/{name}" if len(names) > 1 else own, part_of(folder, name)))
    return parts


def viewing_errors() -> tuple[type[Exception], ...]:
    """What slides and features raise besides ProblemsError."""
    from extract.features.cache import CacheError
    from extract.slides.errors import SlideError

    return CacheError, SlideError


if __name__ == "__main__":
    sys.exit(main())
