"""The figure of the section "Sites": what features tell of the site, and the label's AUC with and without its help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mil.report.figures import BLUE, INK, LINE, MUTED, VERMILLION
from mil.report.wording import CORRELATIONS, main_metric, short_name

NAMES = {"none": "as they are", "combat": "ComBat", "project": "projection"}


def confounding_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Two panels of dots with intervals, one above the other; None without a probe, or without an AUC."""
    block = metrics["confounding"]
    if "ways" not in block:
        return None
    left = [(NAMES[way["how"]], way["site"], way["how"] == block["harmonize"]) for way in block["ways"]]
    left = [row for row in left if row[1]["value"] is not None]
    right = label_rows(block)
    if not left or not right:
        return None
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=[len(left) + 1, len(right) + 1])
    draw_rows(axes[0], left, BLUE, "balanced accuracy for the site")
    axes[0].axvline(block["probe"]["chance"], color=INK, lw=1, ls=":")
    of_task = "target_by_site" in block
    chance = 0.0 if main_metric(metrics) in CORRELATIONS else 0.5
    draw_rows(axes[1], right, VERMILLION, short_name(metrics) if of_task else "AUC for the label")
    axes[1].axvline(chance, color=INK, lw=1, ls=":")
    lowest = min([chance, *(row[1][end] for row in right for end in ("value", "low") if row[1][end] is not None)])
    axes[1].set_xlim(min(-0.02, lowest - 0.02), 1.02)
    return figure


def label_rows(block: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Name, value with ends, whether it is the study's own model; only what is defined."""

    def alone(value: float | None) -> dict[str, float | None]:
        return {"value": value, "low": None, "high": None}

    of_task = "target_by_site" in block
    tied, key = ("target_by_site", "metric") if of_task else ("label_by_site", "auc")
    within, left_out = block["within"], block["left_out"] or {key: None}
    rows = [
        ("site alone", alone(block[tied][key]), False),
        ("all held out" if of_task else "all held-out slides", within["all"] or alone(None), True),
        ("within sites", within["within"] or alone(None), True),
        ("linear, the study's folds", alone(block["ways"][0]["metric" if of_task else "label_auc"]), False),
        ("linear, on sites left out", alone(left_out[key]), False),
    ]
    return [row for row in rows if row[1]["value"] is not None]


def draw_rows(axes: Axes, rows: list[tuple[str, Mapping[str, Any], bool]], colour: str, label: str) -> None:
    """A dot with its interval a row, the first on top; filled where the study itself is meant."""
    for y, (_, number, own) in enumerate(rows):
        if number["low"] is not None:
            axes.plot([number["low"], number["high"]], [y, y], color=colour, lw=1.6, zorder=2)
        face = colour if own else "white"
        axes.plot([number["value"]], [y], "o", ms=7, mfc=face, mec=colour, mew=1.6, zorder=3)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    axes.grid(axis="x", color=LINE, lw=0.8)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
