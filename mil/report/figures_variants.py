"""A study beside what it would be otherwise: a row each, with intervals, on the slides held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from mil.report.figures import BLUE, INK, MUTED, VERMILLION, as_label, new_figure, shortened

LONGEST = 30
"""Characters of a name beside the plot: what a telephone can show."""
LOOKS = {"out_of_fold": (BLUE, "out-of-fold"), "test": (VERMILLION, "test split")}


def variants_figure(name: str) -> Callable[[Mapping[str, Any]], Figure | None]:
    """What draws block `name` of metrics.json."""

    def draw(metrics: Mapping[str, Any]) -> Figure | None:
        block = metrics[name]
        return variants(block) if block["sets"] else None

    return draw


def variants(block: Mapping[str, Any]) -> Figure:
    """Dots: the metric of every variant and set. Bars: 95 % intervals. Dashed: the study's own."""
    rows, sets = block["rows"], block["sets"]
    figure, axes = new_figure(1.3 + 0.42 * len(rows))
    for i, where in enumerate(sets):
        colour, text = LOOKS[where]
        shift = 0.0 if len(sets) == 1 else (-0.14, 0.14)[i]
        known = [
            (y + shift, row[where]["metric"]) for y, row in enumerate(rows) if row[where]["metric"]["value"] is not None
        ]
        for y, found in known:
            if found["low"] is not None:
                axes.hlines(y, found["low"], found["high"], color=colour, lw=1.8)
        points = [found["value"] for _, found in known]
        axes.plot(points, [y for y, _ in known], ls="none", marker="o", ms=5.5, color=colour, label=text)
        if known and known[0][0] == shift:
            axes.vlines(points[0], -0.5, len(rows) - 0.5, color=colour, lw=0.9, ls=(0, (4, 3)), alpha=0.7)
    names = [shortened(row["title"], LONGEST) for row in rows]
    axes.set(ylim=(len(rows) - 0.5, -0.5 if len(sets) == 1 else -1.0), xlabel=block["metric_title"])
    axes.set_yticks(range(len(rows)), [as_label(text) for text in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    if len(sets) > 1:
        axes.legend(loc="upper left", ncols=2, frameon=False, labelcolor=MUTED, borderaxespad=0.2)
    return figure
