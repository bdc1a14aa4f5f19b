"""What a fine-tuning leaves to read: metrics.json, environment.json, report.html, and the table for the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from extract.finetuning.probe import SCORES
from extract.pages import colours
from extract.pages.page import finished, head, script
from extract.pages.svg import inline_svg
from extract.whole import write_whole

TEMPLATE = Path(__file__).with_name("page.html")
TITLES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
MOST_POINTS = 1000
"""Test tiles in the embedding plot, drawn at random where there are more."""

# Okabe and Ito's palette, safe for colour-blind readers, then shades for further classes
PALETTE = (colours.BLUE, colours.VERMILLION, colours.GREEN, colours.PURPLE, colours.ORANGE, colours.SKY)
COLOURS = (*PALETTE, "#8c6d31", "#777777", "#b5cf6b", "#F0E442")
INK, MUTED, LINE = colours.INK, colours.MUTED, colours.LINE
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#bcd9ec", COLOURS[0]])


def terminal_table(metrics: dict[str, Any]) -> str:
    """One row a model: each score with its interval, and the accuracy's difference to the frozen encoder."""
    rows = [["test, " + _counted(metrics), *(TITLES[s] for s in SCORES), "accuracy - frozen"]]
    for name, entry in metrics["test"].items():
        difference = entry["difference"]["accuracy"] if "difference" in entry else None
        cells = [shown(entry["scores"][s]) for s in SCORES]
        rows.append([name, *cells, shown(difference, sign=True) if difference else "-"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def shown(score: dict[str, float | None], sign: bool = False) -> str:
    """`0.912 [0.874, 0.951]`, without the interval where there is none."""
    form = "+.3f" if sign else ".3f"
    if score["value"] is None:
        return "undefined"
    interval = "" if score["low"] is None else f" [{score['low']:{form}}, {score['high']:{form}}]"
    return f"{score['value']:{form}}{interval}"


def _counted(metrics: dict[str, Any]) -> str:
    counts = metrics["counts"]["test"]
    return f"{counts['tiles']} tiles" + (f" of {counts['groups']} patients or slides" if metrics["grouped"] else "")


def write_report(
    folder: Path,
    *,
    metrics: dict[str, Any],
    before_ND: np.ndarray,
    after_ND: np.ndarray | None,
    labels_N: np.ndarray,
    history: Sequence[dict[str, Any]],
    environment: dict[str, Any],
    config_yaml: str,
    notes: Sequence[str],
    seed: int,
) -> None:
    """Write metrics.json, environment.json and the self-contained report.html.

    Args:
        metrics: as `tuning.score` makes them.
        before_ND, after_ND: features of the test tiles from the frozen and the fine-tuned encoder.
        labels_N: their class indices.
    """
    for name, content in (("metrics.json", metrics), ("environment.json", environment)):
        write_whole(folder / name, json.dumps(content, indent=2) + "\n")
    figures = [
        ("Confusion on the test tiles", confusion_figure(metrics), "Counts; shade: share of the true class (row)."),
        (
            "Features of the test tiles in two dimensions",
            embedding_figure(before_ND, after_ND, labels_N, metrics["classes"], seed),
            "t-SNE of the features, each panel by itself. Neighbourhoods can be read, distances between groups cannot.",
        ),
    ]
    if len(history) > 1:
        caption = "Epoch 0: the frozen encoder's linear probe, where training starts. The lowest val loss is kept."
        figures.append(("Training", history_figure(history, metrics["best_epoch"]), caption))
    environment_ = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment_.filters["shown"] = shown
    title = f"{folder.name}: {metrics['encoder']}, mode={metrics['mode']}"
    page = environment_.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        head=head(title),
        script=script(),
        m=metrics,
        counted=_counted(metrics),
        titles=TITLES,
        figures=[
            {"title": t, "image": as_svg(f, f"figure-{i}", t), "caption": c} for i, (t, f, c) in enumerate(figures, 1)
        ],
        environment=environment,
        config_yaml=config_yaml,
        notes=notes,
    )
    write_whole(folder / "report.html", finished(page))


def as_svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an inline SVG element in the colours of the page: nothing is fetched, ids of its own."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # ids that are the same in every run
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return inline_svg(buffer.getvalue(), name, title)


def confusion_figure(metrics: dict[str, Any]) -> Figure:
    """One matrix a model, the frozen encoder's first."""
    tables = {name: np.array(entry["confusion"]) for name, entry in metrics["test"].items()}
    names = [as_label(name) for name in metrics["classes"]]
    many = len(names) > 4
    figure = Figure(figsize=(4.6 * len(tables), 5.0), layout="constrained")
    for axes, (title, counts_CC) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        share_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
        edges = np.arange(len(names) + 1) - 0.5
        axes.pcolormesh(edges, edges, share_CC, cmap=BLUES, vmin=0, vmax=1, edgecolors="white", linewidth=1)
        for row, column in np.ndindex(counts_CC.shape):
            colour = colours.on_cell(BLUES(share_CC[row, column])[:3])
            text = str(counts_CC[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7 if many else 10)
        axes.set(aspect="equal", ylim=(len(names) - 0.5, -0.5))
        axes.set_xticks(range(len(names)), names, rotation=40 if many else 0, ha="right" if many else "center")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted", color=MUTED)
        axes.set_ylabel("true", color=MUTED)
        axes.set_title(title, fontsize=9.5, color=INK)
        _plain(axes)
    return figure


def embedding_figure(
    before_ND: np.ndarray, after_ND: np.ndarray | None, labels_N: np.ndarray, classes: Sequence[str], seed: int
) -> Figure:
    """The same test tiles before and, if the encoder was changed, after."""
    rows = np.random.default_rng(seed).permutation(len(labels_N))[:MOST_POINTS]
    panels = [("frozen", before_ND)] + ([] if after_ND is None else [("fine-tuned", after_ND)])
    figure = Figure(figsize=(4.9 * len(panels), 4.9), layout="constrained")
    for axes, (title, features_ND) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        places_N2 = in_two_dimensions(features_ND[rows], seed)
        for c, name in enumerate(classes):
            here = labels_N[rows] == c
            colour, mark = COLOURS[c % len(COLOURS)], "os^D"[c // len(COLOURS) % 4]
            axes.scatter(*places_N2[here].T, s=14, color=colour, marker=mark, alpha=0.8, lw=0, label=as_label(name))
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        _plain(axes)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 9), fontsize=8, frameon=False)
    return figure


def in_two_dimensions(features_ND: np.ndarray, seed: int) -> np.ndarray:
    """(N, 2): t-SNE; the principal plane where there are too few tiles for it."""
    features_ND = features_ND - features_ND.mean(axis=0)
    n, width = features_ND.shape
    if n < 10:
        plane = PCA(min(2, n, width), random_state=seed).fit_transform(features_ND)
        return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    reduced = PCA(min(50, n, width), random_state=seed).fit_transform(features_ND)
    xy_N2: np.ndarray = TSNE(2, perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=seed).fit_transform(reduced)
    return xy_N2


def history_figure(history: Sequence[dict[str, Any]], best_epoch: int) -> Figure:
    """Loss of train and val, and val accuracy, over the epochs; the kept epoch is marked."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    trained = [row for row in history if row["train_loss"] is not None]
    loss.plot([r["epoch"] for r in trained], [r["train_loss"] for r in trained], color=COLOURS[0], label="train")
    loss.plot(epochs, [row["val_loss"] for row in history], color=COLOURS[1], label="val")
    accuracy.plot(epochs, [row["val_accuracy"] for row in history], color=COLOURS[1], label="val")
    for axes, title in ((loss, "loss"), (accuracy, "accuracy on val")):
        axes.axvline(best_epoch, color=MUTED, lw=0.8, ls=":")
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xlabel("epoch", color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(fontsize=8, frameon=False)
    return figure


def as_label(name: str) -> str:
    """A name as matplotlib shows it unchanged: a dollar would start a formula, a leading underscore hides a label."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0, colors=INK, labelsize=8)
    axes.spines[:].set(visible=True, color=LINE)
