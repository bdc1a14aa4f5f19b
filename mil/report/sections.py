"""SECTIONS: what a report shows of the blocks that stand in metrics.json beside the metrics themselves.

To add one: a block (`mil.pipeline.blocks`), a template with its name in `templates/`, a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from mil.report.figures_confounding import confounding_figure


@dataclass(frozen=True)
class Drawing:
    """A figure of a section: `draw` gets all that metrics.json holds; None where there is nothing to draw."""

    name: str
    heading: str
    caption: str
    draw: Callable[[Mapping[str, Any]], Figure | None]


@dataclass(frozen=True)
class Section:
    """A heading, the template `templates/NAME.html`, which writes the numbers of block NAME, and figures below it."""

    heading: str
    figures: tuple[Drawing, ...] = ()


SECTIONS: dict[str, Section] = {
    "confounding": Section(
        "Sites",
        (
            Drawing(
                "confounding",
                "The site, with and without its help",
                "Left: how well a linear model on mean tiles tells the site of held-out slides, features as they are "
                "and harmonised; dotted: chance. Right: AUC for the label; bars are 95 % intervals over patients.",
                confounding_figure,
            ),
        ),
    ),
}
"""Name of a block in metrics.json -> its section, in the order of the page; without the block there is no section."""
