"""The viewer beside a notebook: served from a thread, shown in a frame."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mil.viewer.config import ViewConfig
from mil.viewer.serving import Serving, make_server, what_to_show


@dataclass(frozen=True)
class Viewer:
    """A viewer that runs until `stop`, or as long as Python does; shows itself in a notebook."""

    url: str
    height: int
    serving: Serving = field(repr=False)

    def stop(self) -> None:
        """Answer nobody any more."""
        self.serving.stop()

    def _repr_html_(self) -> str:
        url = html.escape(self.url, quote=True)
        link = f'<p><a href="{url}" target="_blank" rel="noopener noreferrer">The viewer in a window of its own</a></p>'
        return f'{link}<iframe src="{url}" width="100%" height="{self.height}"></iframe>'


def view_beside(config: ViewConfig, parts: Sequence[tuple[str, Path]], height: int) -> Viewer:
    """Serve from a thread.

    Raises:
        ProblemsError: a run or a folder cannot be used, or the address cannot be listened on.
    """
    serving = make_server(what_to_show(config, parts), config, framed=True)
    serving.in_background()
    return Viewer(serving.url, height, serving)
