"""A forest plot: the AUC (of other tasks their main metric) of every sub-group, beside that of all slides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from mil.report.figures import BLUE, INK, MUTED, VERMILLION, as_label, new_figure, shortened
from mil.report.wording import CORRELATIONS, main_metric, short_name

LONGEST = 26
"""Characters of a name beside the plot: what a telephone can show."""
COLOURS = {"cross_validated": BLUE, "test": VERMILLION, "new": VERMILLION}
WHOLE: dict[str, tuple[str, ...]] = {
    "cross_validated": ("pooled_out_of_fold",),
    "test": ("test", "ensemble"),
    "new": ("test", "ensemble"),  # of a prediction all slides are held out
}
"""Set of slides -> where the figures of all its slides stand in metrics.json."""

Row = tuple[str, str, dict[str, Any] | None]


def forest_figure(which: str) -> Callable[[Mapping[str, Any]], Figure | None]:
    """What draws the groups of one set of slides; nothing where the set has none."""

    def draw(metrics: Mapping[str, Any]) -> Figure | None:
        groupings = metrics["subgroups"]["sets"].get(which)
        if not groupings:
            return None
        whole: Any = metrics
        for key in WHOLE[which]:
            whole = whole[key]
        main, n = main_metric(metrics), whole["counts"].get("slides", whole["counts"].get("rows"))
        rows: list[Row] = [("all", f"n {n}", whole["metrics"][main])]
        for grouping in groupings:
            rows.append((grouping["name"], "", None))
            rows += [(f"    {g['name']}", about(g), (g["metrics"] or {}).get(main)) for g in grouping["groups"]]
        return forest(rows, COLOURS[which], short_name(metrics), 0.0 if main in CORRELATIONS else 0.5)

    return draw


def about(group: dict[str, Any]) -> str:
    return f"n {group['counts']['slides']}" + (", too small" if group["too_small"] else "")


def forest(rows: list[Row], colour: str, label: str, chance: float = 0.5) -> Figure:
    """One line a row: name, slides, value with interval; the dashed line is the first row's value."""
    figure, axes = new_figure(1.1 + 0.27 * len(rows))
    first = rows[0][2]
    if first and first["value"] is not None:
        axes.axvline(first["value"], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    known = [(y, row[2]) for y, row in enumerate(rows) if row[2] and row[2]["value"] is not None]
    for y, found in known:
        if found["low"] is not None:
            axes.hlines(y, found["low"], found["high"], color=colour, lw=1.8)
        axes.plot(found["value"], y, marker="s" if y else "D", ms=5.5, color=colour)
    lowest = min([found["low"] if found["low"] is not None else found["value"] for _, found in known], default=chance)
    axes.set(xlim=(max(2 * chance - 1, min(chance, lowest) - 0.02), 1.01), ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    axes.set_yticks(range(len(rows)), [as_label(shortened(name, LONGEST)) for name, _, _ in rows], ha="left")
    longest = max(len(shortened(name, LONGEST)) for name, _, _ in rows)
    axes.tick_params(axis="y", length=0, pad=6 + 4.9 * longest, labelcolor=INK)
    for y, (_, n, _) in enumerate(rows):
        axes.text(1.02, y, n, transform=axes.get_yaxis_transform(), va="center", size=8, color=MUTED, parse_math=False)
    axes.grid(axis="y", visible=False)
    return figure
