"""Figures of calibration, decision curves and conformal sets, drawn from metrics.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mil.report.figures import (
    BLUE,
    CLASS_COLOURS,
    INK,
    MUTED,
    VERMILLION,
    as_label,
    new_figure,
    style,
    with_legend,
)

SETS = {"pooled_out_of_fold": ("out-of-fold", BLUE), "test": ("test", VERMILLION)}


def reliability_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Before and after calibration, in bins with equally many slides; None without a calibration."""
    sets = metrics["calibration"]["sets"]
    if not any(one["after"] for one in sets.values()):
        return None
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, stage, title in ((left, "before", "plain"), (right, "after", "calibrated")):
        style(axes)
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
        for label, colour, bins in curves_of(metrics, stage):
            draw_bins(axes, label, colour, bins)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="predicted probability")
        axes.set_title(title, fontsize=9.5, color=INK)
    left.set_ylabel("observed fraction")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
    )  # the curves are the same in both
    return figure


def curves_of(metrics: Mapping[str, Any], stage: str) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Label, colour and bins: of two classes a curve a set, of several a curve a class, of the last set."""
    sets = metrics["calibration"]["sets"]
    known = {name: one[stage] or one["before"] for name, one in sets.items()}
    if len(metrics["classes"]) == 2:
        return [(*SETS[name], next(iter(one["per_class"].values()))["bins"]) for name, one in known.items()]
    name = list(known)[-1]
    return [
        (f"{as_label(label)}, {SETS[name][0]}", CLASS_COLOURS[c % len(CLASS_COLOURS)], one["bins"])
        for c, (label, one) in enumerate(known[name]["per_class"].items())
    ]


def draw_bins(axes: Axes, label: str, colour: str, bins: list[dict[str, Any]]) -> None:
    """Dots at mean probability and fraction of positives, with the fraction's interval."""
    p, rate, low, high = (np.array([one[key] for one in bins]) for key in ("p", "value", "low", "high"))
    axes.errorbar(
        p, rate, yerr=np.clip([rate - low, high - rate], 0, None), fmt="o-", ms=4, lw=1.2, color=colour,
        elinewidth=0.8, capsize=2, label=label,
    )  # fmt: skip


def decision_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Net benefit against the threshold probability: of the model, of treating all, of treating none."""
    curves = metrics["operating_points"]["decision_curves"]
    two = len(metrics["classes"]) == 2
    chosen = [(name, label) for name in (curves if two else list(curves)[-1:]) for label in curves[name]]
    if not chosen:
        return None
    figure, axes = new_figure(height=3.9)
    axes.axhline(0, color=INK, lw=1.2, label="treat none")
    top = 0.0
    for k, (name, label) in enumerate(chosen):
        text, colour = SETS[name] if two else (as_label(label), CLASS_COLOURS[k % len(CLASS_COLOURS)])
        curve = curves[name][label]
        axes.plot(curve["threshold"], curve["model"], color=colour, lw=1.8, label=f"model, {text}")
        axes.plot(curve["threshold"], curve["all"], color=colour, lw=1, ls="--", label=f"treat all, {text}")
        top = max(top, max(curve["model"]), curve["all"][0])
    axes.set(xlim=(0, 1), ylim=(-0.3 * top, 1.08 * top), xlabel="threshold probability", ylabel="net benefit")
    return with_legend(figure, axes, "lower left")


def answered_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Accuracy of the answered slides against their share, over coverages; the report's own with its intervals."""
    figure, axes = new_figure(height=3.9)
    drawn, lowest = False, 0.9
    for name, one in metrics["conformal"]["sets"].items():
        text, colour = SETS[name]
        known = [at for at in one["curve"] if at["accuracy"]["value"] is not None]
        if known:
            x, y = ([at[key]["value"] for at in known] for key in ("share", "accuracy"))
            axes.plot(x, y, color=colour, lw=1, marker="o", ms=3, alpha=0.7)
            for at in (at for at in known if at["coverage"] in (0.8, 0.95, 0.99)):
                place = (at["share"]["value"], at["accuracy"]["value"])
                axes.annotate(f"{at['coverage']:g}", place, (4, -9), textcoords="offset points", size=7, color=MUTED)
            lowest = min(lowest, *y)
        own = one["answered"]
        if own["accuracy"]["value"] is not None:
            bars = [np.clip([[at["value"] - at["low"]], [at["high"] - at["value"]]], 0, None) for at in own.values()]
            place = own["share"]["value"], own["accuracy"]["value"]
            axes.errorbar(*place, xerr=bars[0], yerr=bars[1], fmt="D", ms=7, color=colour, capsize=2, label=text)
            lowest = min(lowest, own["accuracy"]["low"])
            drawn = True
    axes.set(
        xlim=(-0.02, 1.02), ylim=(lowest - 0.03, 1.01), xlabel="share of slides answered", ylabel="right among them"
    )
    return with_legend(figure, axes, "lower left") if drawn else None
