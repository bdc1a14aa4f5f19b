"""The colours of figures, and the variables of style.css by which they change in dark mode.

Okabe and Ito's palette (Color Universal Design, 2008): safe for colour-blind readers, distinct in grey. A figure that
draws with these constants is legible on a light and on a dark page; PNG files have the light ones.
"""

from __future__ import annotations

from collections.abc import Sequence

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INK, MUTED, LINE, PAGE = "#1b2733", "#5f6f7e", "#dde3e8", "#ffffff"
ON_PALE, ON_DEEP = "#000001", "#fffffe"
"""Text on the cells of a heat table, which keep their colours in dark mode: black and white that keep theirs, too."""

VARIABLES = {
    **dict.fromkeys((INK, "#000000"), "ink"),
    **{MUTED: "muted", LINE: "line", PAGE: "page"},
    **{BLUE: "blue", VERMILLION: "vermillion", GREEN: "green", ORANGE: "orange", SKY: "sky", PURPLE: "purple"},
}
"""Colour of a figure -> the variable of style.css that has this value on a light page."""


def on_cell(rgb: Sequence[float]) -> str:
    """Which of the two is read better on a cell of this colour. rgb: red, green, blue, 0..1."""
    return max((ON_PALE, ON_DEEP), key=lambda text: contrast(_rgb(text), rgb))


def contrast(a: Sequence[float], b: Sequence[float]) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2.1, "contrast ratio"). a, b: red, green, blue, 0..1."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(rgb: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
