"""Predicted against observed for tasks other than classification: bins, cuts, or groups of patients at each horizon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mil.report.figures import BLUE, CLASS_COLOURS, MUTED, VERMILLION, as_label, new_figure, with_legend

SETS = {"pooled_out_of_fold": ("out-of-fold", BLUE, "o"), "test": ("test", VERMILLION, "s")}
Point = tuple[float, Mapping[str, Any]]


def task_calibration_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """A curve a set (of cuts and horizons one each) with 95 % intervals; dotted: both are equal."""
    block = metrics["task_calibration"]
    curves = [
        (f"{text}{label}", colour, marker, points)
        for name, (text, own, marker) in SETS.items()
        if name in block["sets"]
        for label, colour, points in curves_of(block["kind"], block["sets"][name], own)
    ]
    curves = [(text, colour, marker, known(points)) for text, colour, marker, points in curves]
    if not any(points for *_, points in curves):
        return None
    figure, axes = new_figure()
    for text, colour, marker, points in curves:
        draw(axes, text, colour, marker, points)
    low, high = ends_of(curves) if block["kind"] == "regression" else (0.0, 1.0)
    axes.plot([low, high], [low, high], color=MUTED, lw=0.8, ls=":")
    unit = metrics["task"].get("unit")
    said = f" ({as_label(unit)})" if unit and block["kind"] == "regression" else ""
    what = {"regression": "target", "ordinal": "probability", "survival": "share without an event"}[block["kind"]]
    axes.set(xlabel=f"predicted {what}{said}", ylabel=f"observed {what}{said}")
    return with_legend(figure, axes, "upper left")


def curves_of(kind: str, one: Mapping[str, Any], colour: str) -> list[tuple[str, str, list[Point]]]:
    """Label, colour and points (predicted, observed with its interval)."""
    if kind == "regression":
        return [("", colour, [(b["prediction"], b) for b in one["bins"]])]
    if kind == "ordinal":
        cuts = one["cuts"].items()
        return [
            (f", at least {as_label(name)}", CLASS_COLOURS[i % len(CLASS_COLOURS)], [(b["p"], b) for b in cut["bins"]])
            for i, (name, cut) in enumerate(cuts)
        ]
    return [
        (f", at {h['time']:g}", CLASS_COLOURS[i % len(CLASS_COLOURS)], [(g["predicted"], g) for g in h["groups"]])
        for i, h in enumerate(one["horizons"])
    ]


def known(points: list[Point]) -> list[Point]:
    return [(x, found) for x, found in points if found["value"] is not None]


def ends_of(curves: list[tuple[str, str, str, list[Point]]]) -> tuple[float, float]:
    values = [v for *_, points in curves for x, found in points for v in (x, found["value"])]
    return min(values), max(values)


def draw(axes: Axes, text: str, colour: str, marker: str, points: list[Point]) -> None:
    for x, found in points:
        if found["low"] is not None:
            axes.vlines(x, found["low"], found["high"], color=colour, lw=1.2, alpha=0.6)
    axes.plot(
        [x for x, _ in points], [f["value"] for _, f in points], marker=marker, ms=5, lw=1, color=colour, label=text
    )
