"""The page over many targets: report.html, targets.csv, targets.md and figures/targets.png."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from extract.tables import write_csv
from extract.whole import write_whole
from extract.wording import count
from mil.report.figures import BLUE, INK, MUTED, VERMILLION, as_label, shortened, style, to_svg
from mil.report.page import render, save_png
from mil.report.wording import aligned, markdown_table, value_interval
from mil.results.targets import CHANCE, P_VALUES, comparisons, main_of, targets_table
from mil.tasks.metrics import METRICS

HEAD = ("target", "slides", "out-of-fold, pooled", "test ensemble", "p", "p (Holm)")


def write_targets(
    folder: Path, metrics: Mapping[str, Mapping[str, dict[str, Any]]], folders: Mapping[str, Mapping[str, Path]]
) -> str:
    """Write the overview into `folder`; give the table for the terminal.

    Args:
        metrics: by aggregator, then by target, as metrics.json holds them. folders: likewise the run folders.
    """
    table = targets_table(metrics)
    first = next(iter(next(iter(metrics.values())).values()))
    title, chance = title_of(first), CHANCE.get(main_of(first), 0.0)
    figure = targets_figure(table, title, chance)
    save_png(folder / "figures" / "targets.png", figure)
    links = [Path(os.path.relpath(folders[a][t], folder)).as_posix() for a, t in own_keys(table)]
    page = render(
        "targets",
        {name: dict(own) for name, own in metrics.items()},
        title=f"{count(len(next(iter(metrics.values()))), 'target')} trained together",
        what=title,
        main=main_of(first),
        several=len(metrics) > 1,
        rows=rows_of(table, [f"{quote(link)}/report.html" for link in links]),
        comparisons=comparisons(table["p"].tolist()),
        about_p=P_VALUES,
        svg=to_svg(figure, "targets", f"{title} of every target"),
    )
    write_csv(table, folder / "targets.csv")
    write_whole(folder / "report.html", page)
    write_whole(folder / "targets.md", markdown_of(table, title))  # last: it says that all is there
    return text_of(table, title)


def title_of(metrics: Mapping[str, Any]) -> str:
    """What the main metric is called."""
    main = main_of(metrics)
    return str(metrics["metric_titles"][main]) if "metric_titles" in metrics else METRICS[main].title


def own_keys(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(table["aggregator"].tolist(), table["target"].tolist(), strict=True))


def rows_of(table: pd.DataFrame, links: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row, link in zip(table.astype(object).to_dict("records"), links, strict=True):
        p = {key: p_text(row[key]) for key in ("p", "p_holm")}
        rows.append({str(key): value for key, value in row.items()} | p | {"href": link})
    return rows


def p_text(p: float | None) -> str:
    """`0.012`, `1.2e-05`, `-` where there is none."""
    if p is None or not np.isfinite(p):
        return "-"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def cells(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """The table as text, a row a target and aggregator."""
    several = len(set(table["aggregator"])) > 1
    found = []
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        name = f"{row['target']}, {row['aggregator']}" if several else str(row["target"])
        test = {"value": row["test"], "low": row["test_low"], "high": row["test_high"]}
        sets = [value_interval({k: row[k] for k in ("value", "low", "high")}) if row["set"] == "out-of-fold" else "-"]
        sets.append("-" if row["test"] is None else value_interval(test))
        found.append((name, f"{row['slides']:,}", *sets, p_text(row["p"]), p_text(row["p_holm"])))
    return found


def text_of(table: pd.DataFrame, title: str) -> str:
    """The table for the terminal, and how many comparisons it makes."""
    return "\n".join([f"{title}; [95 % interval over patients]", *aligned([HEAD, *cells(table)]), f"  {about(table)}"])


def markdown_of(table: pd.DataFrame, title: str) -> str:
    lines = [f"{title}, [95 % interval over patients].", "", *markdown_table(HEAD, cells(table)), "", f"{about(table)}"]
    return "\n".join(lines) + "\n"


def about(table: pd.DataFrame) -> str:
    n = comparisons(table["p"].tolist())
    return f"Holm's correction for {count(n, 'comparison')}" if n else "no p values: there are no intervals"


def targets_figure(table: pd.DataFrame, title: str, chance: float) -> Figure:
    """The main metric of every target with its interval, the highest on top; filled where Holm's p is below 0.05."""
    table = table.sort_values("value", ascending=True, na_position="first", kind="stable").reset_index(drop=True)
    several = len(set(table["aggregator"])) > 1
    figure = Figure(figsize=(5.6, 1.1 + 0.27 * max(len(table), 3)), layout="constrained")
    axes = figure.subplots()
    style(axes)
    axes.axvline(chance, color=MUTED, lw=1, ls="--")
    numbers = table[["value", "low", "high"]].to_numpy(dtype=float)
    sure = (table["p_holm"].to_numpy(dtype=float) < 0.05).tolist()
    for y, ((value, low, high), found) in enumerate(zip(numbers.tolist(), sure, strict=True)):
        colour = BLUE if table.loc[y, "set"] == "out-of-fold" else VERMILLION
        axes.hlines(y, low, high, color=colour, lw=1.6)
        axes.plot(value, y, ls="", marker="o", ms=5.5, color=colour, mfc=colour if found else "none")
    names = [f"{t}, {a}" if several else str(t) for t, a in zip(table["target"], table["aggregator"], strict=True)]
    axes.set_yticks(range(len(table)), [as_label(shortened(name, 28)) for name in names], fontsize=8.5, color=INK)
    axes.set(xlabel=as_label(title), ylim=(-0.6, len(table) - 0.4))
    axes.grid(axis="y", visible=False)
    return figure
