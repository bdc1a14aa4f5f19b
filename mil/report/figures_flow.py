"""The flow diagram: slides and patients from the table to training, selection and scoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from extract.wording import count
from mil.report.figures import BLUE, INK, LINE, MUTED, ORANGE, VERMILLION

GAP, LINE_HEIGHT = 0.22, 0.19  # inches


def flow_figure(metrics: Mapping[str, Any]) -> Figure:
    """Boxes from top to bottom; what was left out stands at the right of the arrow where it went."""
    flow = metrics["flow"]
    lost = [text for row in flow["left_out"] for text in (f"{row['why']}:", f"    {sizes(row)}")]
    kept = {text: flow[key] for key, text in UNSCORED.items() if has(flow, key)}
    unscored = [line for text, row in kept.items() for line in (f"{text}:", f"    {sizes(row)}")]
    tiles = f"{flow['bags']['tiles']:,} tiles, median {flow['bags']['median_tiles']:,.0f} a slide"
    steps = [
        ("In the table", [sizes(flow["table"])], lost),
        ("Bags of features", [sizes(flow["bags"]), tiles], unscored),
    ]
    ends = [(text, lines(flow, key), colour) for key, (text, colour) in ENDS.items() if has(flow, key)]
    rows = [max(1 + len(inside), len(aside)) for _, inside, aside in steps] + [
        max((1 + len(e[1]) for e in ends), default=0)
    ]
    height = sum(LINE_HEIGHT * n + 0.16 for n in rows) + 2 * GAP * len(rows)
    figure = Figure(figsize=(5.2, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, 5.2), ylim=(height, 0))
    axes.set_axis_off()
    y = GAP / 2
    for number, (title, inside, aside) in enumerate(steps):
        bottom = y + LINE_HEIGHT * rows[number] + 0.16
        box(axes, 0.1, y, 2.35, bottom - y, title, inside, BLUE)
        if aside:
            axes.annotate("", (2.8, (y + bottom) / 2), (2.45, (y + bottom) / 2), arrowprops=ARROW)
            box(axes, 2.8, y, 2.3, bottom - y, "", aside, ORANGE)
        y = bottom + 2 * GAP
        if number + 1 < len(steps):
            axes.annotate("", (1.28, y), (1.28, bottom), arrowprops=ARROW)
    for place, (title, inside, colour) in enumerate(ends):
        left = 0.1 + 2.7 * place
        axes.annotate("", (left + 1.18, y), (1.28, y - 2 * GAP), arrowprops=ARROW)
        box(axes, left, y, 2.35, LINE_HEIGHT * rows[-1] + 0.16, title, inside, colour)
    return figure


UNSCORED = {"unlabelled": "no label", "known": "patients of the study", "unused": "in no fold"}
ENDS = {
    "cross_validated": ("Cross-validated", BLUE),
    "test": ("Test split", VERMILLION),
    "new": ("Scored", VERMILLION),
}
ARROW = {"arrowstyle": "-|>", "color": MUTED, "lw": 1.0, "shrinkA": 0, "shrinkB": 0}


def has(flow: Mapping[str, Any], key: str) -> bool:
    return key in flow and flow[key]["slides"] > 0


def lines(flow: Mapping[str, Any], key: str) -> list[str]:
    """What stands in the last boxes; of cross-validated slides also what one member does with them."""
    if key != "cross_validated":
        return [sizes(flow[key]), f"scored by {count(flow['members'], 'member')}"]
    told = [f"{ROLE[role]} {between(n)}" for role, n in flow["roles"].items() if n["most"]]
    return [sizes(flow[key]), f"a member (of {flow['members']}):", *told]


ROLE = {"train": "trains on", "val": "selects on", "test": "is scored on"}


def between(n: Mapping[str, int]) -> str:
    return f"{n['most']}" if n["fewest"] == n["most"] else f"{n['fewest']} to {n['most']}"


def sizes(row: Mapping[str, Any]) -> str:
    return f"{count(row['slides'], 'slide')}, {count(row['patients'], 'patient')}"


def box(
    axes: Axes, x: float, y: float, width: float, height: float, title: str, inside: list[str], colour: str
) -> None:
    """A frame with a bold title and lines below it, from (x, y), its upper left corner, in inches."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor=LINE, lw=1))
    axes.add_patch(Rectangle((x, y), 0.05, height, facecolor=colour, lw=0))
    for number, text in enumerate([title, *inside] if title else inside):
        weight = "bold" if title and not number else "normal"
        place = (x + 0.13, y + 0.08 + LINE_HEIGHT * (number + 0.5))
        axes.text(*place, text, va="center", size=8.5, color=INK, weight=weight, parse_math=False)
