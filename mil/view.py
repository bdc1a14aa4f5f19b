"""python -m mil.view run=RUN [run=RUN2] [key=value ...]

Shows a study in the browser: its slides with predictions, tile scores over each slide, reviews. Two runs are compared
side by side. Without a run (slides.folder=... features.folder=...): slides, tissue masks and grids before training,
with regions to leave out written into tissue.regions. Prints the address, which holds a random token, and opens it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from extract.config import config_from_command_line
from extract.ending import ended
from extract.stores.sessions import stores_of
from mil.viewer.config import ViewConfig, refuse_without_extra, runs_as_list, view_problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 2 something is wrong, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(ViewConfig, runs_as_list(arguments), __doc__ or "", also=view_problems)

    def view() -> int:
        refuse_without_extra()
        from mil.api.study import parts_of  # torch, starlette: only for a valid config
        from mil.viewer.serving import serve

        with stores_of(config):
            serve(config, parts_of(config.run))
        return 0

    return ended(view, interrupted=lambda: "Stopped.", known=viewing_errors)


def viewing_errors() -> tuple[type[Exception], ...]:
    """What slides and features raise besides ProblemsError."""
    from extract.features.cache import CacheError
    from extract.slides.errors import SlideError

    return CacheError, SlideError


if __name__ == "__main__":
    sys.exit(main())
