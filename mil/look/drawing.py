"""Pictures of tile scores: on a slide's thumbnail or as a map of the tiles alone, with colour and scale bar; galleries.

A picture is made of whole pixels: `paint` decides the colour of every pixel of the map, and the finished PNG holds
those pixels unchanged (`Drawn.map_at`), so what is tested is what is seen.

Axes: N tiles, K tiles of a gallery, H height, W width, 2 = (x, y), 3 = RGB.
"""

from __future__ import annotations

import base64
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"
"""Both can be told apart with every kind of colour blindness; the second for scores with a sign."""
DPI = 100
OPACITY = 0.62
INK, MUTED, EMPTY = "#1b2733", "#5f6f7e", (240, 242, 244)
MARGIN, TITLE_PX, LINE_PX, FOOT_PX = 18, 26, 19, 70
CHARACTER_PX = 6.5
"""Mean width of a character of 9 points, on the safe side."""
LEAST_WIDTH = 560
READABLE_PX = 900
"""Wider pictures get larger text: they are looked at shrunk to a screen."""
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
        inside_N4: np.ndarray = np.clip(boxes_N4, 0, np.tile([self.width, self.height], 2))
        return inside_N4


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
        colours: np.ndarray = table[np.clip(np.rint(share * 255), 0, 255).astype(np.uint8)]
        return colours


def colours_for(scores_N: np.ndarray, label: str, *, percentile: bool, signed: bool) -> Colours:
    """0 to 100 for percentiles; scores with a sign symmetric around 0; else from the lowest to the highest."""
    if percentile:
        return Colours(SEQUENTIAL, 0.0, 100.0, label)
    if signed:
        end = float(np.abs(scores_N).max()) or 1.0
        return Colours(DIVERGING, -end, end, label)
    return Colours(SEQUENTIAL, float(scores_N.min()), float(scores_N.max()), label)


def paint(raster_HW: np.ndarray, colours: Colours, under_HW3: np.ndarray | None = None) -> np.ndarray:
    """The map, uint8 RGB: colours where there are tiles, half transparent on `under_HW3` (see `faded`) if given."""
    covered_HW1 = np.isfinite(raster_HW)[:, :, None]
    colour_HW3 = colours.of(raster_HW)
    if under_HW3 is None:
        return np.where(covered_HW1, colour_HW3, np.array(EMPTY, np.uint8))
    mixed_HW3 = cv2.addWeighted(colour_HW3, OPACITY, under_HW3, 1 - OPACITY, 0)
    return np.where(covered_HW1, mixed_HW3, under_HW3)


def faded(image_HW3: np.ndarray) -> np.ndarray:
    """The slide in light greys, so that a colour on it is one of the map's."""
    grey_HW = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
    return np.repeat((90 + grey_HW.astype(np.float32) * (165 / 255)).astype(np.uint8)[:, :, None], 3, axis=2)


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
    zoom = float(np.clip((columns * width + MARGIN) / READABLE_PX, 1, 2.5))
    margin = round(MARGIN * zoom) if outside else 2
    text_px = max(columns * width + (columns - 1) * margin, LEAST_WIDTH if outside else 260)
    wrapped = wrapped_lines(lines, text_px / zoom)
    titles = textwrap.wrap(title, max(16, int(text_px / zoom / 10))) if title else []
    head = margin + (round((TITLE_PX * len(titles) + LINE_PX * len(wrapped) + 8) * zoom) if outside else 0)
    foot = head + rows * height + (rows - 1) * margin
    sheet = Sheet(text_px + 2 * margin, foot + round(FOOT_PX * zoom), zoom)
    sheet.heading(titles, wrapped)
    x_map, y_map = margin, head
    if beside_HW3 is not None:
        sheet.place(beside_HW3, margin, head)
        x_map, y_map = (margin, head + height + margin) if stacked else (2 * margin + width, head)
    sheet.place(map_HW3, x_map, y_map)
    for label in labels:
        box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.85}
        style = {"size": 7.5, "weight": "bold", "va": "center", "bbox": box}
        sheet.write(label.text, x_map + label.x, y_map + label.y, **style)
    bar_px = draw_scale_bar(sheet, view, margin, foot + 16 * zoom)
    draw_colour_bar(sheet, colours, margin + bar_px + 28 * zoom, foot + 12 * zoom)
    return Drawn(sheet.png(), (x_map, y_map))


class Sheet:
    """An empty picture of width x height px. Positions are px from the top left; text is `zoom` times as large."""

    def __init__(self, width: int, height: int, zoom: float = 1.0):
        self.width, self.height, self.zoom = width, height, zoom
        self.dpi = DPI * zoom
        self.figure = Figure(figsize=(width / self.dpi, height / self.dpi), dpi=self.dpi, facecolor="white")

    def place(self, image_HW3: np.ndarray, x: int, y: int) -> None:
        """The image, px for px."""
        self.figure.figimage(image_HW3, x, self.height - y - image_HW3.shape[0], origin="upper")

    def write(self, text: str, x: float, y: float, **style: Any) -> None:
        options: dict[str, Any] = {"size": 9, "color": INK, "va": "top", "parse_math": False} | style
        self.figure.text(x / self.width, 1 - y / self.height, text, **options)

    def heading(self, titles: Sequence[str], lines: Sequence[str]) -> None:
        y = MARGIN * self.zoom
        for text in titles:
            self.write(text, MARGIN * self.zoom, y, size=12, weight="bold")
            y += TITLE_PX * self.zoom
        for text in lines:
            self.write(text, MARGIN * self.zoom, y, color=MUTED)
            y += LINE_PX * self.zoom

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without ticks and frame."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def png(self) -> bytes:
        """The file's bytes. OpenCV writes a PNG several times faster than Pillow."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        done, encoded = cv2.imencode(".png", cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR))
        if not done:
            raise RuntimeError("expected OpenCV to encode a PNG")
        return encoded.tobytes()


def draw_scale_bar(sheet: Sheet, view: View, x: float, y: float) -> float:
    """A bar of a round length in microns or millimetres, about a sixth of the map; the px that it takes."""
    if view.mpp is None:
        sheet.write("scale unknown", x, y + 2, color=MUTED, size=8)
        return 80 * sheet.zoom
    microns = round_length(max(view.width / 6, 60) * view.mpp)
    length = microns / view.mpp
    sheet.axes(x, y, length, 5 * sheet.zoom).set_facecolor(INK)
    text = f"{microns / 1000:g} mm" if microns >= 1000 else f"{microns:g} µm"
    sheet.write(text, x, y + 9 * sheet.zoom, size=8.5)
    return max(length, 60 * sheet.zoom)


def round_length(microns: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not longer."""
    power = 10.0 ** math.floor(math.log10(microns))
    return max(step * power for step in (1, 2, 5) if step * power <= microns * (1 + 1e-9))


def draw_colour_bar(sheet: Sheet, colours: Colours, x: float, y: float) -> None:
    """The colours with the scores at their ends, and what the scores are."""
    width = max(120 * sheet.zoom, min(300 * sheet.zoom, sheet.width - x - MARGIN - 8))
    axes = sheet.axes(x, y, width, 10 * sheet.zoom)
    ends = (colours.low, max(colours.high, colours.low + 1e-9))
    axes.imshow(np.arange(256)[None], aspect="auto", cmap=colours.name, extent=(*ends, 0, 1))
    places = ticks(colours)
    axes.set_xticks(places, [f"{place:.3g}" for place in places])
    axes.tick_params(length=2, labelsize=7.5, colors=MUTED, pad=1.5)
    label = fitting(colours.label, width / sheet.zoom)
    axes.set_xlabel(label, size=8, color=INK, labelpad=2, loc="left", parse_math=False)


def wrapped_lines(lines: Sequence[str], width_px: float) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, max(24, int(width_px / CHARACTER_PX)))]


def fitting(text: str, width_px: float) -> str:
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
    sheet = Sheet(width, head + sum(LINE_PX + 10 + n * (side + caption_px) for n in rows) + MARGIN)
    sheet.heading([title], wrapped)
    y = head
    for shelf, n in zip(shelves, rows, strict=True):
        sheet.write(shelf.heading, MARGIN, y + 4, size=10, weight="bold")
        y += LINE_PX + 10
        for i, (tile_HW3, caption) in enumerate(zip(shelf.tiles, shelf.captions, strict=True)):
            left, top = MARGIN + (i % columns) * (cell + 10), y + i // columns * (side + caption_px)
            sheet.place(tile_HW3, left, top)
            sheet.write(caption, left, top + tile_HW3.shape[0] + 4, size=8)
        y += n * (side + caption_px)
    return sheet.png()


def jpeg_uri(tile_HW3: np.ndarray, side_px: int) -> str:
    """A tile shrunk to `side_px` as a data URI."""
    small_HW3 = cv2.resize(tile_HW3, (side_px, side_px), interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(small_HW3, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not done:
        raise RuntimeError("expected OpenCV to encode a JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")
