"""A forest plot: the AUC on every site by members that did not train on it, beside that of the chosen folds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from mil.report.figures import BLUE, INK, MUTED, VERMILLION, as_label, new_figure, shortened
from mil.report.wording import CORRELATIONS, main_metric, short_name

LONGEST = 26
WAYS = (("left_out", VERMILLION, -0.16, "site left out"), ("chosen_folds", BLUE, 0.16, "chosen folds"))


def left_out_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Two marks a site; None where nothing is defined."""
    block = metrics["left_out_sites"]
    rows = [("all", block["all"]), *((one["site"], one) for one in block["sites"])]
    if not any(row[key]["value"] is not None for _, row in rows for key, *_ in WAYS):
        return None
    figure, axes = new_figure(1.2 + 0.4 * len(rows))
    for key, colour, shift, label in WAYS:
        known = [(y + shift, row[key]) for y, (_, row) in enumerate(rows) if row[key]["value"] is not None]
        for y, found in known:
            if found["low"] is not None:
                axes.hlines(y, found["low"], found["high"], color=colour, lw=1.6)
        xs = [found["value"] for _, found in known]
        axes.plot(xs, [y for y, _ in known], "s" if shift < 0 else "o", ms=5, color=colour, ls="", label=label)
    chance = 0.0 if main_metric(metrics) in CORRELATIONS else 0.5
    ends = [row[key][end] for _, row in rows for key, *_ in WAYS for end in ("value", "low")]
    lowest = min((end for end in ends if end is not None), default=0.0)
    axes.axvline(chance, color=MUTED, lw=0.9, ls=":")
    names = [as_label(shortened(name, LONGEST)) for name, _ in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlim=(min(0.0, lowest), 1.01), ylim=(len(rows) - 0.5, -0.5), xlabel=short_name(metrics))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
    return figure
