"""Pictures of tile scores: on a slide's thumbnail or as a map of the tiles alone, with colour and scale bar; galleries.

A picture is made of whole pixels: `paint` decides the colour of every pixel of the map, and the finished PNG holds
those pixels unchanged (`Drawn.map_at`), so what is tested is what is seen.

Axes: N tiles, K tiles of a gallery, H height, W width, 2 = (x, y), 3 = RGB.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"
"""Both can be told apart with every kind of colour blindness; the second for scores with a sign."""
DPI = 100
OPACITY = 0.62
INK, MUTED, PAPER, EMPTY = "#1b2733", "#5f6f7e", (255, 255, 255), (240, 242, 244)
MARGIN, TITLE_PX, LINE_PX, FOOT_PX, CAPTION_PX = 18, 26, 19, 64, 20
CHARACTER_PX = 6.5
"""Mean width of a character of 9 points, on the safe side."""
LEAST_WIDTH = 560
LARGEST_TILE_PX = 32
"""Of a map without a slide: few tiles do not fill a page."""
SEVERAL_COLUMNS = 6


@dataclass(frozen=True)
class View:
    """Which part of the slide a picture shows: px i of a row covers frame px origin + [i, i + 1) * step, and so down.

    origin: (x, y) in px of the frame of the coordinates (level-0 px). step: frame px per picture px. width, height: of
    the picture. mpp: microns per picture px, None when unknown.
    """

    origin: tuple[float, float]
    step: float
    width: int
    height: int
    mpp: float | None

    def boxes(self, coords_N2: np.ndarray, side: float) -> np.ndarray:
        """Tiles as picture px (left, top, right, bottom), right and bottom excluded: the px with their centre inside.

        A tile that holds no centre (smaller than a px) gets the px that its own centre lies in. Clipped to the picture.
        """
        corners_N4 = np.concatenate([coords_N2, coords_N2 + side], axis=1) - np.tile(self.origin, 2)
        boxes_N4 = np.ceil(corners_N4 / self.step - 0.5 - 1e-9).astype(np.int64)
        centres_N2 = np.floor((corners_N4[:, :2] + side / 2) / self.step).astype(np.int64)
        for axis in (0, 1):
            none_N = boxes_N4[:, axis + 2] <= boxes_N4[:, axis]
            boxes_N4[none_N, axis] = centres_N2[none_N, axis]
            boxes_N4[none_N, axis + 2] = centres_N2[none_N, axis] + 1
        return np.clip(boxes_N4, 0, np.tile([self.width, self.height], 2))


def view_of_tiles(
    coords_N2: np.ndarray, side: float, frame_mpp: float | None, *, mpp: float | None, longest: int
) -> View:
    """A view of all tiles with a margin of one tile, at `mpp`, or `longest` px on the longer side."""
    low, high = coords_N2.min(axis=0) - side, coords_N2.max(axis=0) + 2 * side
    width, height = (high - low).tolist()
    step = mpp / frame_mpp if mpp and frame_mpp else max(max(width, height) / longest, side / LARGEST_TILE_PX)
    size = (max(1, math.ceil(width / step)), max(1, math.ceil(height / step)))
    return View((float(low[0]), float(low[1])), step, *size, None if frame_mpp is None else step * frame_mpp)


# --- the map ---------------------------------------------------------------------------------------------------------


def raster(view: View, coords_N2: np.ndarray, side: float, scores_N: np.ndarray) -> np.ndarray:
    """Score of every picture px, (H, W) float64: the mean of the tiles that cover it, NaN where there is none."""
    sums_HW, counts_HW = np.zeros((view.height, view.width)), np.zeros((view.height, view.width), dtype=np.int32)
    for (left, top, right, bottom), score in zip(view.boxes(coords_N2, side).tolist(), scores_N.tolist(), strict=True):
        sums_HW[top:bottom, left:right] += score
        counts_HW[top:bottom, left:right] += 1
    with np.errstate(invalid="ignore"):
        return np.where(counts_HW > 0, sums_HW / counts_HW, np.nan)


@dataclass(frozen=True)
class Colours:
    """A colour map and the scores at its ends; `label` says what they are and on which scale."""

    name: str
    low: float
    high: float
    label: str

    def of(self, scores: np.ndarray) -> np.ndarray:
        """uint8 RGB (..., 3); NaN becomes the colour of the low end."""
        share = (np.nan_to_num(scores, nan=self.low) - self.low) / max(self.high - self.low, 1e-12)
        table = (matplotlib.colormaps[self.name](np.arange(256), bytes=True))[:, :3]
        return table[np.clip(np.rint(share * 255), 0, 255).astype(np.uint8)]


def colours_for(scores_N: np.ndarray, label: str, *, percentile: bool, signed: bool) -> Colours:
    """0 to 100 for percentiles; scores with a sign symmetric around 0; else from the lowest to the highest."""
    if percentile:
        return Colours(SEQUENTIAL, 0.0, 100.0, label)
    if signed:
        end = float(np.abs(scores_N).max()) or 1.0
        return Colours(DIVERGING, -end, end, label)
    return Colours(SEQUENTIAL, float(scores_N.min()), float(scores_N.max()), label)


def paint(raster_HW: np.ndarray, colours: Colours, under_HW3: np.ndarray | None = None) -> np.ndarray:
    """The map, uint8 RGB: colours where there are tiles, laid half transparent on `under_HW3` where that is given."""
    covered_HW1 = np.isfinite(raster_HW)[:, :, None]
    colour_HW3 = colours.of(raster_HW)
    if under_HW3 is None:
        return np.where(covered_HW1, colour_HW3, np.array(EMPTY, np.uint8))
    mixed_HW3 = cv2.addWeighted(colour_HW3, OPACITY, under_HW3, 1 - OPACITY, 0)
    return np.where(covered_HW1, mixed_HW3, under_HW3)


def frame_tiles(image_HW3: np.ndarray, boxes_K4: np.ndarray, colour: tuple[int, int, int], thickness: int = 2) -> None:
    """Draw frames just outside the boxes, so that the colour of the tiles stays."""
    for left, top, right, bottom in boxes_K4.tolist():
        corner = (left - thickness, top - thickness), (right + thickness - 1, bottom + thickness - 1)
        for inset in range(thickness):
            first = (corner[0][0] + inset, corner[0][1] + inset)
            last = (corner[1][0] - inset, corner[1][1] - inset)
            cv2.rectangle(image_HW3, first, last, colour, 1)


# --- the picture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A finished picture. png: the file's bytes. map_at: (x, y) of the map's top-left px in it."""

    png: bytes
    map_at: tuple[int, int]

    def data_uri(self) -> str:
        """For the `src` of an image in a page that fetches nothing."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Label:
    """A short text beside a tile: px of the map."""

    text: str
    x: float
    y: float


def compose(
    map_HW3: np.ndarray,
    view: View,
    colours: Colours,
    *,
    title: str = "",
    lines: Sequence[str] = (),
    beside_HW3: np.ndarray | None = None,
    labels: Sequence[Label] = (),
    outside: bool = True,
) -> Drawn:
    """The map with heading, colour bar and scale bar; the plain thumbnail before it where that is given.

    Args:
        beside_HW3: as large as the map; left of it, or above it where the slide is wide.
        outside: False leaves out the heading, for a page that has its own.
    """
    height, width = map_HW3.shape[:2]
    stacked = width > 1.3 * height
    columns, rows = (1, 1) if beside_HW3 is None else (1, 2) if stacked else (2, 1)
    total_width = max(columns * width + (columns - 1) * MARGIN, LEAST_WIDTH if outside else 260) + 2 * MARGIN
    wrapped = wrapped_lines(lines, total_width - 2 * MARGIN)
    titles = textwrap.wrap(title, max(16, int((total_width - 2 * MARGIN) / 10))) if title else []
    head_px = MARGIN + (TITLE_PX * len(titles) + LINE_PX * len(wrapped) + 8 if outside else 0)
    total_height = head_px + rows * height + (rows - 1) * MARGIN + FOOT_PX
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")

    def place(image_HW3: np.ndarray, x: int, y: int) -> None:
        figure.figimage(image_HW3, x, total_height - y - image_HW3.shape[0], origin="upper")

    def write(text: str, x: float, y: float, **style: Any) -> None:
        options: dict[str, Any] = {"size": 9, "color": INK, "va": "top", "parse_math": False} | style
        figure.text(x / total_width, 1 - y / total_height, text, **options)

    y = MARGIN
    for text in titles:
        write(text, MARGIN, y, size=12, weight="bold")
        y += TITLE_PX
    for text in wrapped:
        write(text, MARGIN, y, color=MUTED)
        y += LINE_PX
    x_map, y_map = MARGIN, head_px
    if beside_HW3 is not None:
        place(beside_HW3, MARGIN, head_px)
        x_map, y_map = (MARGIN, head_px + height + MARGIN) if stacked else (MARGIN + width + MARGIN, head_px)
    place(map_HW3, x_map, y_map)
    for label in labels:
        box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.85}
        write(label.text, x_map + label.x, y_map + label.y, size=7.5, weight="bold", va="center", ha="left", bbox=box)
    foot = total_height - FOOT_PX
    bar_px = draw_scale_bar(figure, view, MARGIN, foot + 16, (total_width, total_height), write)
    draw_colour_bar(figure, colours, MARGIN + bar_px + 28, foot + 12, (total_width, total_height))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 4})
    return Drawn(buffer.getvalue(), (x_map, y_map))


def draw_scale_bar(
    figure: Figure, view: View, x: int, y: int, size: tuple[int, int], write: Callable[..., None]
) -> int:
    """A bar of a round length in microns or millimetres, about a sixth of the map; its width in px, 0 without mpp."""
    if view.mpp is None:
        write("scale unknown", x, y + 2, color=MUTED, size=8)
        return 80
    microns = round_length(max(view.width / 6, 60) * view.mpp)
    length = microns / view.mpp
    axes = figure.add_axes((x / size[0], 1 - (y + 5) / size[1], length / size[0], 5 / size[1]))
    axes.set_facecolor(INK)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    write(f"{microns / 1000:g} mm" if microns >= 1000 else f"{microns:g} µm", x, y + 9, size=8.5)
    return max(round(length), 60)


def round_length(microns: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not longer."""
    power = 10.0 ** math.floor(math.log10(microns))
    return max(step * power for step in (1, 2, 5) if step * power <= microns * (1 + 1e-9))


def draw_colour_bar(figure: Figure, colours: Colours, x: int, y: int, size: tuple[int, int]) -> None:
    width = max(120, min(300, size[0] - x - MARGIN - 8))
    axes = figure.add_axes((x / size[0], 1 - (y + 10) / size[1], width / size[0], 10 / size[1]))
    axes.imshow(np.arange(256)[None], aspect="auto", cmap=colours.name, extent=(colours.low, colours.high, 0, 1))
    axes.set(yticks=[], xticks=ticks(colours))
    axes.tick_params(length=2, labelsize=7.5, colors=MUTED, pad=1.5)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(fitting(colours.label, width), size=8, color=INK, labelpad=2, loc="left", parse_math=False)


def wrapped_lines(lines: Sequence[str], width_px: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, max(24, int(width_px / CHARACTER_PX)))]


def fitting(text: str, width_px: int) -> str:
    """The text in as many lines as the width needs, at most two."""
    return "\n".join(textwrap.wrap(text, max(18, int(width_px / 5.4)))[:2])


def ticks(colours: Colours) -> list[float]:
    if (colours.low, colours.high) == (0.0, 100.0):
        return [0, 25, 50, 75, 100]
    if colours.high <= colours.low:
        return [colours.low]
    return [colours.low, (colours.low + colours.high) / 2, colours.high]


# --- the gallery -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shelf:
    """A row of the gallery: tiles uint8 RGB (K, side, side, 3) and the lines under each."""

    heading: str
    tiles: Sequence[np.ndarray]
    captions: Sequence[str]


def gallery(shelves: Sequence[Shelf], title: str, lines: Sequence[str]) -> bytes:
    """PNG of tiles at the resolution they come in, several in a row, with their captions."""
    side = max(tile.shape[0] for shelf in shelves for tile in shelf.tiles)
    columns = min(SEVERAL_COLUMNS, max(len(shelf.tiles) for shelf in shelves))
    cell = max(side, 150)
    width = max(columns * (cell + 10) - 10, LEAST_WIDTH) + 2 * MARGIN
    wrapped = wrapped_lines(lines, width - 2 * MARGIN)
    n_lines = max(len(caption.splitlines()) for shelf in shelves for caption in shelf.captions)
    caption_px = 10 + 15 * n_lines
    rows = [-(-len(shelf.tiles) // columns) for shelf in shelves]
    head = MARGIN + TITLE_PX + LINE_PX * len(wrapped) + 6
    height = head + sum(LINE_PX + 10 + n * (side + caption_px) for n in rows) + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def write(text: str, x: float, y: float, **style: Any) -> None:
        options: dict[str, Any] = {"size": 9, "color": INK, "va": "top", "parse_math": False} | style
        figure.text(x / width, 1 - y / height, text, **options)

    write(title, MARGIN, MARGIN, size=12, weight="bold")
    for i, text in enumerate(wrapped):
        write(text, MARGIN, MARGIN + TITLE_PX + i * LINE_PX, color=MUTED)
    y = head
    for shelf, n in zip(shelves, rows, strict=True):
        write(shelf.heading, MARGIN, y + 4, size=10, weight="bold")
        y += LINE_PX + 10
        for i, (tile_HW3, caption) in enumerate(zip(shelf.tiles, shelf.captions, strict=True)):
            left, top = MARGIN + (i % columns) * (cell + 10), y + i // columns * (side + caption_px)
            figure.figimage(tile_HW3, left, height - top - tile_HW3.shape[0], origin="upper")
            write(caption, left, top + tile_HW3.shape[0] + 4, size=8)
        y += n * (side + caption_px)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 4})
    return buffer.getvalue()


def jpeg_uri(tile_HW3: np.ndarray, side_px: int) -> str:
    """A tile shrunk to `side_px` as a data URI."""
    small_HW3 = cv2.resize(tile_HW3, (side_px, side_px), interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(small_HW3, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not done:
        raise RuntimeError("expected OpenCV to encode a JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")
