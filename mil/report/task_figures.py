"""Figures of tasks other than classification, from what metrics.json and the held-out tables hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from extract.wording import p_value
from mil.report.figures import (
    BLUE,
    INK,
    MUTED,
    SET_COLOURS,
    VERMILLION,
    as_label,
    draw_counts,
    draw_learning_curve,
    new_figure,
    style,
    with_legend,
)
from mil.results.tables import TEST_ENSEMBLE


@dataclass(frozen=True)
class Shown:
    """What figures draw: the metrics, the held-out rows of each set, and the history."""

    metrics: Mapping[str, Any]
    held_out: Mapping[str, pd.DataFrame]
    history: pd.DataFrame

    def block(self, name: str) -> dict[str, Any]:
        block = self.metrics["test"]["ensemble"] if name == TEST_ENSEMBLE else self.metrics["pooled_out_of_fold"]
        return dict(block)

    @property
    def unit(self) -> str:
        unit = self.metrics["task"].get("unit")
        return f" ({as_label(unit)})" if unit else ""


def scatter_figure(shown: Shown) -> Figure | None:
    """Prediction against target, with the line on which both are equal."""
    figure, axes = new_figure()
    ends: list[float] = []
    for name, table in shown.held_out.items():
        axes.plot(table["value"], table["prediction"], ls="", marker="o", ms=4, alpha=0.6, color=SET_COLOURS[name],
                  mec="none", label=name)  # fmt: skip
        ends += [*table["value"], *table["prediction"]]
    if not np.isfinite(ends).all() or not ends:
        return None
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=MUTED, lw=0.9, ls=":", label="equal")
    axes.set(xlabel=f"target{shown.unit}", ylabel=f"prediction{shown.unit}")
    return with_legend(figure, axes, "upper left")


def residual_figure(shown: Shown) -> Figure | None:
    """Prediction less target against the target: a slope says that extremes are drawn towards the mean."""
    figure, axes = new_figure(height=3.9)
    for name, table in shown.held_out.items():
        axes.plot(table["value"], table["prediction"] - table["value"], ls="", marker="o", ms=4, alpha=0.6,
                  color=SET_COLOURS[name], mec="none", label=name)  # fmt: skip
    axes.axhline(0, color=MUTED, lw=0.9, ls=":")
    axes.set(xlabel=f"target{shown.unit}", ylabel=f"prediction - target{shown.unit}")
    return with_legend(figure, axes, "upper right") if shown.held_out else None


def kaplan_meier_figure(shown: Shown) -> Figure | None:
    """Kaplan-Meier curves of the two risk groups, a panel a set."""
    found = {name: shown.block(name).get("kaplan_meier") for name in shown.held_out}
    sets = {name: block for name, block in found.items() if block}
    if not sets:
        return None
    figure = Figure(figsize=(5.2, 3.9 * len(sets)), layout="constrained")
    for axes, (title, block) in zip(np.ravel(figure.subplots(len(sets), 1, squeeze=False)), sets.items(), strict=True):
        style(axes)
        for (name, group), colour in zip(block["groups"].items(), (BLUE, VERMILLION), strict=True):
            if not group.get("time"):
                continue
            time, survival = np.r_[0.0, group["time"]], np.r_[1.0, group["survival"]]
            low, high = (np.array([1.0, *group[k]], dtype=float) for k in ("low", "high"))
            axes.fill_between(time, low, high, step="post", color=colour, alpha=0.13, lw=0)
            text = f"{name}: {group['patients']} patients, {group['events']} events"
            axes.step(time, survival, where="post", color=colour, lw=1.8, label=text)
        p = block["log_rank_p"]
        said = "" if p is None else f", log-rank p {p_value(p, said=True)}"
        axes.set_title(f"{title}{said}", fontsize=9.5, color=INK)
        axes.set(xlabel=f"time{shown.unit}", ylabel="share without an event", ylim=(-0.02, 1.02))
        axes.set_xlim(left=0)
        axes.legend(loc="lower left", frameon=True, framealpha=0.85, edgecolor="none", fontsize=8.5, labelcolor=INK)
    return figure


def grades_figure(shown: Shown) -> Figure | None:
    """Grades that are predicted, by true grade: counts, and the share of the true grade as shade."""
    matrices = {name: np.array(shown.block(name)["confusion"]["matrix"]) for name in shown.held_out}
    grades = [as_label(grade) for grade in shown.metrics["task"]["grades"]]
    if not matrices:
        return None
    figure = Figure(figsize=(5.2, 4.4 if len(matrices) == 1 else 2.9), layout="constrained")
    for axes, (title, matrix) in zip(
        np.ravel(figure.subplots(1, len(matrices), squeeze=False)), matrices.items(), strict=True
    ):
        draw_counts(axes, matrix, shares=False, fontsize=8)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_xticks(range(len(grades)), grades, fontsize=8)
        axes.set_yticks(range(len(grades)), grades, fontsize=8)
        axes.set_title(title, fontsize=9.5, color=INK)
    return figure


def curve_figure(shown: Shown, quantity: str, label: str) -> Figure | None:
    """Training curves: members thin, their mean thick."""
    history, (figure, axes) = shown.history, new_figure(height=3.9)
    drawn = False
    for part, colour in (("train", BLUE), ("val", VERMILLION)):
        name = f"{part}_{quantity}"
        if name not in history or not history[name].notna().any():
            continue
        wide = history.pivot_table(index="epoch", columns="member", values=name)
        axes.plot(wide.index, wide, color=colour, lw=0.7, alpha=max(0.15, 0.5 - 0.01 * wide.shape[1]))
        running = wide.dropna()
        marker = "o" if len(running) == 1 else ""
        axes.plot(running.index, running.mean(axis=1), color=colour, lw=2.2, marker=marker, label=f"{part}, mean")
        drawn = True
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    return with_legend(figure, axes, "upper right") if drawn else None


OF_TASK = {
    "regression": {
        "scatter": ("Prediction and target", scatter_figure, "Every slide that was held out. Dotted: both are equal."),
        "residuals": ("Residuals", residual_figure, "A slope that falls: extremes are drawn towards the mean."),
    },
    "survival": {
        "kaplan_meier": ("Kaplan-Meier", kaplan_meier_figure, "Risk groups: above and below the median risk of each "
        "member's own training patients, which the patients shown here did not choose. Bands: 95 % (log-log)."),
    },
    "ordinal": {"grades": ("Grades", grades_figure, "Counts. Shade: share of the true grade.")},
}  # fmt: skip
"""Task -> name -> heading, drawing, caption."""


def drawn_figures(task: str, shown: Shown) -> dict[str, Any]:
    """Figures as `mil.report.page.shown_figures` takes them."""
    main = shown.metrics["task"]["main"]
    found = {name: (heading, caption, draw(shown)) for name, (heading, draw, caption) in OF_TASK[task].items()}
    found["loss"] = ("Loss", "Thin: one member. Thick: their mean.", curve_figure(shown, "loss", "loss"))
    title = shown.metrics["metric_titles"][main]
    caption = "Thin: one member. Thick: their mean. What is reached in training says nothing about new slides."
    found["metric"] = (f"{title} while training", caption, curve_figure(shown, main, title))
    curve = shown.metrics.get("learning_curve")
    if curve:
        told = "Dots: one member each. A curve that still rises at its right end: more patients would help."
        found["learning_curve"] = (f"{title} against training patients", told, draw_learning_curve(curve, main, title))
    return found
