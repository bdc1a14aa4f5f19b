"""The figures of a study and of a comparison, as matplotlib draws them and as SVG within a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from extract.pages import colours
from extract.pages.svg import inline_svg
from extract.shares import wilson
from mil.report.wording import auc_name, headline, main_metric, mean_sd, shown, value_interval
from mil.results.tables import (
    OUT_OF_FOLD,
    TEST_ENSEMBLE,
    held_out,
    held_out_ensemble,
    mean_of_logits,
    p_columns,
    pooled_out_of_fold,
)
from mil.tasks.estimates import effective_size
from mil.tasks.metrics import ECE_BINS, calibration_bin

LINE_FROM = 5
"""Slides in a bin from which its dot in the calibration figure is large and joined to others: few make a zigzag."""
# safe for colour-blind readers, and others in dark mode
BLUE, VERMILLION, GREEN = colours.BLUE, colours.VERMILLION, colours.GREEN
ORANGE, SKY, PURPLE = colours.ORANGE, colours.SKY, colours.PURPLE
INK, MUTED, LINE = colours.INK, colours.MUTED, colours.LINE
CLASS_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
SET_COLOURS = {OUT_OF_FOLD: BLUE, TEST_ENSEMBLE: VERMILLION}
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#bcd9ec", BLUE])


@dataclass(frozen=True)
class Sets:
    """What the figures draw, tables of labelled slides: `folds` one a member, `held_out` by name if there are any.

    rounds: (repeat, fold) of each of `folds`, which its seeds share.
    """

    classes: Sequence[str]
    folds: list[pd.DataFrame]
    rounds: list[tuple[int, int]]
    held_out: dict[str, pd.DataFrame]
    metrics: dict[str, Any]
    plan: pd.DataFrame
    history: pd.DataFrame

    def block(self, name: str) -> dict[str, Any]:
        """The metrics of one of `held_out`."""
        metrics = self.metrics["pooled_out_of_fold"] if name == OUT_OF_FOLD else self.metrics["test"]["ensemble"]
        return dict(metrics)


def make_sets(
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    history: pd.DataFrame,
    classes: Sequence[str],
    metrics: dict[str, Any],
    thresholds: pd.DataFrame,
) -> Sets:
    """Tables for the figures, without unlabelled slides and without predictions that are not numbers."""

    def drawable(table: pd.DataFrame) -> pd.DataFrame:
        finite = np.isfinite(table[p_columns(classes)].to_numpy(dtype=np.float64)).all(axis=1)
        kept: pd.DataFrame = table[finite & (table["label"] >= 0).to_numpy()]
        return kept

    rows = predictions[held_out(predictions)]
    by_member = [own for _, own in rows.groupby("member", sort=True)]
    folds = [drawable(mean_of_logits(own, classes, thresholds)) for own in by_member]
    rounds = [(int(own["repeat"].iloc[0]), int(own["fold"].iloc[0])) for own in by_member]
    both = {
        OUT_OF_FOLD: drawable(pooled_out_of_fold(predictions, classes, thresholds)),
        TEST_ENSEMBLE: drawable(held_out_ensemble(predictions, classes, thresholds)),
    }
    there = {name: table for name, table in both.items() if len(table)}
    return Sets(classes, folds, rounds, there, metrics, plan, history)


def roc_figure(sets: Sets) -> Figure | None:
    """ROC: two classes with every fold, their mean and spread; several classes one against the rest."""
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    if len(sets.classes) > 2:
        drawn = draw_per_class(axes, sets, roc_points, "auc", "AUC")
    else:
        drawn = draw_fold_rocs(axes, sets)
        for name, table in two_class_sets(sets):
            fpr, tpr = roc_points(table["label"] == 1, table["p_1"])
            text = f"{name}, AUC {value_interval(sets.block(name)['metrics']['auc'])}"
            style = "--" if name == OUT_OF_FOLD and len(sets.folds) > 1 else "-"
            axes.plot(fpr, tpr, color=INK if style == "--" else SET_COLOURS[name], lw=1.6, ls=style, label=text)
            drawn = True
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return with_legend(figure, axes, "lower right") if drawn else None


def draw_fold_rocs(axes: Axes, sets: Sets) -> bool:
    """Every member's curve thin; thick the vertical mean of the folds, one SD of them as a band."""
    both = [i for i, table in enumerate(sets.folds) if table["label"].nunique() == 2]
    curves = [roc_points(sets.folds[i]["label"] == 1, sets.folds[i]["p_1"]) for i in both]
    if len(curves) < 2:
        return False
    for fpr, tpr in curves:
        axes.plot(fpr, tpr, color=SKY, lw=0.7, alpha=max(0.25, 0.8 - 0.02 * len(curves)))
    grid = np.linspace(0, 1, 201)
    sampled = pd.DataFrame([np.interp(grid, fpr, tpr) for fpr, tpr in curves])
    sampled[0] = 0.0
    of_folds = sampled.groupby(np.array([str(sets.rounds[i]) for i in both])).mean().to_numpy()  # seeds are no folds
    mean = of_folds.mean(axis=0)
    sd = of_folds.std(axis=0, ddof=1) if len(of_folds) > 1 else np.zeros(len(grid))
    axes.fill_between(grid, np.clip(mean - sd, 0, 1), np.clip(mean + sd, 0, 1), color=BLUE, alpha=0.13, lw=0)
    summary = sets.metrics["cross_validation"]["metrics"]["auc"]
    seeds = len({fold["seed"] for fold in sets.metrics["folds"]})
    text = f"mean of {len(of_folds)} folds{f' x {seeds} seeds' if seeds > 1 else ''}, AUC {mean_sd(summary)}"
    axes.plot(grid, mean, color=BLUE, lw=2.2, label=text)
    return True


def precision_recall_figure(sets: Sets) -> Figure | None:
    """Precision against recall, with each set's prevalence: what a coin would reach."""
    figure, axes = new_figure()
    drawn = False
    if len(sets.classes) > 2:
        drawn = draw_per_class(axes, sets, precision_recall_points, "average_precision", "AP", where="post")
    else:
        curves = [precision_recall_points(t["label"] == 1, t["p_1"]) for t in sets.folds if t["label"].nunique() == 2]
        for x, y in curves if len(curves) > 1 else []:
            axes.plot(x, y, color=SKY, lw=0.7, alpha=max(0.25, 0.8 - 0.02 * len(curves)), drawstyle="steps-post")
        for name, table in two_class_sets(sets):
            colour = SET_COLOURS[name]
            x, y = precision_recall_points(table["label"] == 1, table["p_1"])
            text = f"{name}, AP {shown(sets.block(name)['metrics']['average_precision']['value'])}"
            axes.plot(x, y, color=colour, lw=2, drawstyle="steps-post", label=text)
            prevalence = float((table["label"] == 1).mean())
            axes.axhline(prevalence, color=colour, lw=0.9, ls=":", label=f"prevalence {prevalence:.2f}")
            drawn = True
    axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return with_legend(figure, axes, "lower left") if drawn else None


def draw_per_class(
    axes: Axes,
    sets: Sets,
    points: Callable[[pd.Series, pd.Series], tuple[np.ndarray, np.ndarray]],
    metric: str,
    short: str,
    where: str | None = None,
) -> bool:
    """One curve a class and set, each class against the rest: out-of-fold solid, test dashed."""
    drawn = False
    for name, table in sets.held_out.items():
        dashed = name == TEST_ENSEMBLE and OUT_OF_FOLD in sets.held_out
        for c, label in enumerate(sets.classes):
            truth = table["label"] == c
            if not truth.any() or truth.all():
                continue
            x, y = points(truth, table[f"p_{c}"])
            value = sets.block(name)["per_class"][label][metric]["value"]
            colour = CLASS_COLOURS[c % len(CLASS_COLOURS)]
            text = f"{as_label(label)}, {'test' if name == TEST_ENSEMBLE else name}, {short} {shown(value)}"
            steps = f"steps-{where}" if where else "default"
            axes.plot(x, y, color=colour, lw=1.6, ls="--" if dashed else "-", label=text, drawstyle=steps)
            if where:
                axes.axhline(float(truth.mean()), color=colour, lw=0.7, ls=":")
            drawn = True
    return drawn


def calibration_figure(sets: Sets) -> Figure | None:
    """Reliability diagram in the bins of the ECE, with Wilson 95 % intervals, and how many slides are in each bin.

    The slides of a patient are a cluster: an interval is that of as many slides as they are worth
    (`mil.tasks.estimates.effective_size`; Dean and Pagano 2015).
    """
    curves: list[tuple[str, str, np.ndarray, np.ndarray, np.ndarray]] = []
    if len(sets.classes) == 2:
        for name, table in sets.held_out.items():
            truth = (table["label"] == 1).to_numpy()
            curves.append((name, SET_COLOURS[name], truth, table["p_1"].to_numpy(), table["patient"].to_numpy()))
    elif sets.held_out:
        name, table = next(iter(sets.held_out.items()))
        for c, label in enumerate(sets.classes):
            truth = (table["label"] == c).to_numpy()
            colour, p_S = CLASS_COLOURS[c % len(CLASS_COLOURS)], table[f"p_{c}"].to_numpy()
            curves.append((f"{as_label(label)}, {name}", colour, truth, p_S, table["patient"].to_numpy()))
    if not curves:
        return None
    figure = Figure(figsize=(5.2, 4.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    style(upper)
    style(lower)
    upper.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    width = 0.8 / len(curves) / ECE_BINS
    for i, (text, colour, truth, p, patients) in enumerate(curves):
        bins = calibration_bin(p)
        n = np.bincount(bins, minlength=ECE_BINS)
        filled = n > 0
        mean_p = np.bincount(bins, weights=p, minlength=ECE_BINS)[filled] / n[filled]
        hits = np.bincount(bins, weights=truth, minlength=ECE_BINS)[filled]
        rate = hits / n[filled]
        worth = np.array([effective_size(truth[bins == b], patients[bins == b]) for b in np.flatnonzero(filled)])
        low, high = np.transpose([wilson(*one) for one in zip(rate.tolist(), worth.tolist(), strict=True)])
        bars = np.clip([rate - low, high - rate], 0, None)
        many = n[filled] >= LINE_FROM
        upper.plot(mean_p[many], rate[many], color=colour, lw=1.4)
        upper.errorbar(mean_p, rate, yerr=bars, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2)
        upper.scatter(mean_p, rate, s=np.where(many, 26, 10), color=colour, zorder=3, label=text)
        centres = (np.arange(ECE_BINS) + 0.1) / ECE_BINS + width * (i + 0.5)
        lower.bar(centres, n, width=width, color=colour)
    lower.set(xlabel="predicted probability", ylabel="slides", xlim=(-0.02, 1.02))
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    upper.set(ylabel="observed fraction", ylim=(-0.02, 1.02))
    return with_legend(figure, upper, "upper left")


def confusion_figure(sets: Sets) -> Figure | None:
    """Confusion matrices: counts, and the share of the true class as shade; slides, below them patients."""
    blocks = {f"{name}, slides": sets.block(name) for name in sets.held_out}
    by_patient = [(f"{name}, patients", sets.block(name).get("patient_level")) for name in sets.held_out]
    blocks |= {title: block for title, block in by_patient if block}
    matrices = {title: np.array(b["confusion"]["matrix"]) for title, b in blocks.items() if b["confusion"]["matrix"]}
    if not matrices:
        return None
    n_columns = min(len(matrices), 2)
    n_rows = -(-len(matrices) // n_columns)
    figure = Figure(figsize=(5.2, 4.9 if n_columns == 1 else 0.4 + 3.0 * n_rows), layout="constrained")
    many = len(sets.classes) > 4
    names = [as_label(shortened(name, 14 if n_columns == 1 else 9)) for name in sets.classes]
    grid = np.ravel(figure.subplots(n_rows, n_columns, squeeze=False))
    for axes in grid[len(matrices) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid, matrices.items(), strict=False):
        draw_counts(axes, matrix, shares=not many, fontsize=7 if many else 10)
        ticks = range(len(names))
        axes.set_xticks(ticks, names, fontsize=8, rotation=40 if many else 0, ha="right" if many else "center")
        axes.set_yticks(ticks, names, fontsize=8, rotation=0 if many else 90, va="center")
        axes.set_xlabel("predicted", color=MUTED, fontsize=9)
        axes.set_title(title, fontsize=9.5, color=INK)
    figure.axes[0].set_ylabel("true", color=MUTED, fontsize=9)
    return figure


def draw_counts(axes: Axes, matrix: np.ndarray, *, shares: bool, fontsize: float) -> None:
    """A square of counts, row by row: the share of the row as shade and, with `shares`, in words."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    edges = np.arange(len(matrix) + 1) - 0.5
    axes.pcolormesh(edges, edges, share, cmap=BLUES, vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.set(aspect="equal", ylim=(len(matrix) - 0.5, -0.5))
    for row, column in np.ndindex(matrix.shape):
        text = f"{matrix[row, column]}\n{share[row, column]:.0%}" if shares else f"{matrix[row, column]}"
        colour = colours.on_cell(BLUES(share[row, column])[:3])
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=fontsize)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)


def loss_figure(sets: Sets) -> Figure | None:
    return training_figure(sets, "loss", "loss")


def auc_figure(sets: Sets) -> Figure | None:
    return training_figure(sets, "auc", "AUC")


def training_figure(sets: Sets, quantity: str, label: str) -> Figure | None:
    """Train and val curves: members thin, their mean while all train thick, the kept epoch marked if selected."""
    history = sets.history
    parts = [("train", BLUE), ("val", VERMILLION)]
    parts = [
        (part, c)
        for part, c in parts
        if f"{part}_{quantity}" in history and history[f"{part}_{quantity}"].notna().any()
    ]
    if not parts:
        return None
    figure, axes = new_figure(height=3.9)
    kept = sets.plan.set_index("member")["best_epoch"]
    selected = bool((sets.plan["best_epoch"] < sets.plan["epochs"]).any())
    for part, colour in parts:
        wide = history.pivot_table(index="epoch", columns="member", values=f"{part}_{quantity}")
        axes.plot(wide.index, wide, color=colour, lw=0.7, alpha=max(0.15, 0.5 - 0.01 * wide.shape[1]))
        if wide.shape[1] > 1:
            running = wide.dropna()  # a mean over changing members would jump
            until = "" if len(running) == len(wide) else " until the first stops"
            label_of_mean = f"{part}, mean of {wide.shape[1]}{until}"
            marker = "o" if len(running) == 1 else ""  # a line of one epoch would not show
            axes.plot(running.index, running.mean(axis=1), color=colour, lw=2.2, marker=marker, label=label_of_mean)
        else:
            axes.lines[-1].set(lw=2, alpha=1, label=part)
        if selected and part == parts[-1][0]:
            points = [(kept[m], wide[m].get(kept[m], np.nan)) for m in wide.columns if m in kept.index]
            axes.plot(
                *zip(*points, strict=True), ls="", marker="o", ms=4.5, mfc="white", mec=INK, label="epoch that was kept"
            )
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if quantity == "auc":
        axes.set_ylim(top=1.005)
    return with_legend(figure, axes, "lower right" if quantity == "auc" else "upper right")


def learning_curve_figure(sets: Sets) -> Figure | None:
    """AUC against the number of training patients: every member a dot, mean and one SD over them."""
    curve = sets.metrics.get("learning_curve")
    return draw_learning_curve(curve, "auc", auc_label(sets.classes)) if curve else None


def draw_learning_curve(curve: Mapping[str, Any], main: str, label: str) -> Figure | None:
    """The same by any metric `main`, whose highest value is 1; None where it is nowhere defined."""
    figure, axes = new_figure(height=3.9)
    points = curve["points"]
    parts = (("cross_validation", "held-out folds", BLUE), ("test", "test split", VERMILLION))
    for k, (name, text, colour) in enumerate(parts):
        found = [(p["patients"] * (1 + 0.03 * k), p[name]) for p in points if p[name]]
        known = [(x, block) for x, block in found if block["metrics"][main]["mean"] is not None]
        if not known:
            continue
        for x, block in known:
            dots = [value for value in block[main] if value is not None]
            beside = [x * (0.97 + 0.06 * k)] * len(dots)
            axes.plot(beside, dots, ls="", marker="o", ms=3, color=colour, alpha=0.45, mec="none")
        x = [x for x, _ in known]
        mean = [block["metrics"][main]["mean"] for _, block in known]
        sd = np.array([block["metrics"][main]["sd"] or 0 for _, block in known])
        bars = [sd, np.minimum(sd, 1 - np.array(mean))]  # which ends at 1
        look: dict[str, Any] = {"color": colour, "lw": 2, "elinewidth": 1.4, "capsize": 3, "marker": "o", "ms": 5}
        axes.errorbar(x, mean, bars, label=f"{text}, mean ± SD", **look)
    if not axes.lines:
        return None
    axes.set_xscale("log")
    ticks = [p["patients"] for p in points]
    axes.set_xticks(ticks, [f"{p['patients']:.0f}\n{p['slides']:.0f}" for p in points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="patients (below: slides) trained on, logarithmic", ylabel=label)
    axes.set_ylim(top=1.01)
    return with_legend(figure, axes, "lower right")


def auc_label(classes: Sequence[str]) -> str:
    return "AUC" if len(classes) == 2 else "macro AUC"


FIGURES: dict[str, tuple[str, Callable[[Sets], Figure | None]]] = {
    "roc": ("ROC", roc_figure),
    "precision_recall": ("Precision and recall", precision_recall_figure),
    "calibration": ("Calibration", calibration_figure),
    "confusion": ("Confusion", confusion_figure),
    "loss": ("Loss", loss_figure),
    "auc": ("AUC while training", auc_figure),
    "learning_curve": ("AUC against training patients", learning_curve_figure),
}
CAPTIONS = {
    "roc": "Thin: each member on the slides it held out. Band: mean ± one SD of the folds. Dotted: chance.",
    "precision_recall": "Thin: each member. Dotted: prevalence, the precision of calling slides at random.",
    "calibration": "On the dotted line, probabilities mean what they say. Bars: 95 % Wilson interval of the fraction, "
    "patients as clusters. "
    f"Large dots, joined: bins of at least {LINE_FROM} slides.",
    "confusion": "Shade and percentage: share of the true class.",
    "loss": "Thin: one member. Thick: mean over members.",
    "auc": "Thin: one member. Thick: mean over members. Training AUC says nothing about new slides.",
    "learning_curve": "Dots: one member each. A curve that still rises at its right end: more patients would help.",
}
CAPTIONS_MANY = {
    "roc": "Each class against the rest. Dotted: chance.",
    "precision_recall": "Each class against the rest. Dotted: its prevalence.",
    "calibration": "Each class against the rest. On the dotted line, probabilities mean what they say.",
}


def comparison_figure(studies: Mapping[str, dict[str, Any]]) -> Figure:
    """AUC (the task's main metric) of every aggregator: folds' mean ± SD, pooled and test ensemble with intervals."""
    kinds = (
        ("folds, mean ± SD", GREEN, "s"),
        ("out-of-fold, pooled", BLUE, "o"),
        ("test ensemble", VERMILLION, "D"),
    )
    figure = Figure(figsize=(5.6, 1.0 + 0.6 * len(studies)), layout="constrained")
    axes = figure.subplots()
    style(axes)
    for k, (text, colour, marker) in enumerate(kinds):
        found = np.array([headline(metrics)[k] for metrics in studies.values()], dtype=np.float64)
        y = np.arange(len(studies)) + 0.22 * (k - 1)
        if np.isfinite(found[:, 0]).any():
            axes.hlines(y, found[:, 1], np.minimum(found[:, 2], 1), color=colour, lw=1.6)
            axes.plot(found[:, 0], y, ls="", marker=marker, ms=6, color=colour, label=text)
    left, least = min(axes.get_xlim()[0], 0.95), -0.01 if main_metric(next(iter(studies.values()))) == "auc" else -1.01
    axes.set(xlim=(max(left, least), 1.005), xlabel=as_label(auc_name(next(iter(studies.values())))))
    axes.set_yticks(range(len(studies)), [as_label(name) for name in studies], fontsize=9.5)
    axes.set_ylim(len(studies) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK, handletextpad=0.3)
    return figure


def shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def as_label(name: str) -> str:
    """A name as matplotlib shows it unchanged: a dollar would start a formula, a leading underscore hides a label."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def new_figure(height: float = 4.9) -> tuple[Figure, Axes]:
    """A figure as wide as all others, with one pair of axes."""
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Grid, muted axes and small letters, as all figures of the report have them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5)
    axes.xaxis.label.set(color=INK, size=9.5)
    axes.yaxis.label.set(color=INK, size=9.5)
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)


def with_legend(
    figure: Figure, axes: Axes, place: Literal["lower right", "lower left", "upper left", "upper right"]
) -> Figure:
    """The figure with a legend that does not hide the curves: below the axes where it is long."""
    handles, labels = axes.get_legend_handles_labels()
    size = 8.5 if len(labels) <= 6 else 7
    if len(labels) > 10:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=size, labelcolor=INK)
    elif handles:
        axes.legend(loc=place, frameon=True, framealpha=0.85, edgecolor="none", fontsize=size, labelcolor=INK)
    return figure


def two_class_sets(sets: Sets) -> Iterable[tuple[str, pd.DataFrame]]:
    return [(name, table) for name, table in sets.held_out.items() if table["label"].nunique() == 2]


def roc_points(truth: pd.Series, p: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    fpr, tpr, _ = roc_curve(truth, p)
    return fpr, tpr


def precision_recall_points(truth: pd.Series, p: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    precision, recall, _ = precision_recall_curve(truth, p)
    return recall, precision


def to_svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an inline SVG element in the colours of the page: no outside reference, ids of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return inline_svg(buffer.getvalue(), name, title)
