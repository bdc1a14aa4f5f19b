"""Thumbnail -> tissue mask: stained tissue is coloured; glass, pen marks, black borders and fluorescence are not it.

Array axes: H height, W width, 3 = RGB, uint8. Lengths in microns become pixels by the thumbnail's mpp.
Colours are OpenCV's full-range HSV: hue, saturation and value from 0 to 255; `_hue` turns degrees into that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from extract.config import Tissue

OTSU_RANGE = (0.04, 0.08)
"""Otsu's threshold is kept between these saturations. Below is noise of empty glass (JPEG colour blocks reach 0.03
after white balance), which Otsu would split in two all the same; above, strong stain would hide the faintest."""

DARKNESS_RANGE = (0.05, 0.12)
"""The same for a grey picture, of darkness below the glass: uneven light stays below, faint stain lies above."""
GLASS_MIN_GREY = 195
"""What is darker all over is a picture full of tissue."""
GREY_MAX_CHROMA = 2
"""Largest difference of a pixel's channels in a picture without colour; a scanner's white glass has more."""
UNIFORM_MAX_RANGE = 4
"""A grey picture that varies less, of 255, shows nothing, whatever its grey."""

GLASS_MIN_VALUE, GLASS_MAX_SATURATION = 180, 31  # what may be glass, of 255
DARK_VALUE = 50  # darker than any stain at thumbnail resolution: black borders, fluorescence background
BLACK_INK_VALUE, BLACK_INK_CHROMA = 92, 52
MIN_PEN_UM2 = 50_000.0
"""A pen's stroke is at least this large; smaller spots of its colour (inked margins, blood cells) stay tissue."""
SMEAR_UM = 260.0
"""Where there is a red pen, what has its hue, however pale, is a smear of it if it is nowhere narrower than this,
wherever it lies, and smooth. Stained tissue has hues up to about 340 degrees at thumbnail resolution; blood, which may
be redder, is mixed with what is not, or rough."""
FAINT_CHROMA = 25
INK_MAX_GRAIN = 3
"""How far green, of 255, lies from the median of its 3 x 3 pixels: of a smear's pixels within SMEAR_UM half by no more.
Histolab's two red pens have 0 to 3, also over tissue, and the bleeding beside one of them 4 to 14."""
PEN_FADE_UM = 250.0
"""So far from its core a pen mark may fade out."""


@dataclass(frozen=True)
class TissueMask:
    """Where the tissue is.

    Attributes:
        mask_HW: bool; pixel (x, y) covers level-0 px from `x * mpp / slide.mpp` to `(x + 1) * mpp / slide.mpp`.
        mpp: microns per pixel of the mask.
        empty_reason: why there is no tissue, "" if there is some.
        threshold: saturation (0..1) above which a pixel counts as stained; of a grey picture, darkness.
        marks_HW: bool, what was left out as pen mark or black.
        measure: what `threshold` is of, "saturation" or "darkness".
    """

    mask_HW: np.ndarray
    mpp: float
    empty_reason: str
    threshold: float
    marks_HW: np.ndarray
    measure: str = "saturation"

    @property
    def fraction(self) -> float:
        """Tissue area / area of the picture."""
        return float(self.mask_HW.mean())

    @property
    def area_mm2(self) -> float:
        return float(self.mask_HW.sum()) * self.mpp**2 / 1e6


def find_tissue(thumbnail_HW3: np.ndarray, mpp: float, section: Tissue | None = None) -> TissueMask:
    """Find stained tissue on a brightfield slide.

    Smooth; put pen marks and black aside; balance the glass to white; threshold the saturation; close gaps; fill small
    holes; drop small pieces. Lengths and areas are those of the config section `tissue`. On a picture so small that
    `min_speck_um2` is more than a twentieth of it, a twentieth is used.

    A picture without colour is thresholded by darkness below its glass instead, always by Otsu, and no pen is looked
    for: ink and stain look alike in it.

    Args:
        thumbnail_HW3: uint8 RGB, transparent areas white.
        mpp: microns per pixel of the thumbnail.
        section: the config section; default: its defaults.
    """
    section = section or Tissue()
    if thumbnail_HW3.dtype != np.uint8 or thumbnail_HW3.ndim != 3 or thumbnail_HW3.shape[2] != 3:
        raise ValueError(f"expected a uint8 (H, W, 3) thumbnail, got {thumbnail_HW3.dtype} {thumbnail_HW3.shape}")
    smooth_HW3 = cv2.medianBlur(np.ascontiguousarray(thumbnail_HW3), _odd(section.smooth_um / mpp))
    value_HW = smooth_HW3.max(axis=2)
    dark_HW = value_HW < DARK_VALUE
    nothing_HW = np.zeros(value_HW.shape, bool)
    if _is_fluorescence(smooth_HW3, dark_HW):
        reason = f"{dark_HW.mean():.0%} of the slide is dark and there is no bright glass: looks like fluorescence"
        return TissueMask(nothing_HW, mpp, reason, 0.0, nothing_HW)
    grey = _is_grey(thumbnail_HW3)
    marks_HW = dark_HW
    if section.pen_marks and not grey:
        marks_HW = dark_HW | find_pen_marks(thumbnail_HW3, smooth_HW3, mpp)
    if dark_HW.any():
        marks_HW = _dilate(marks_HW, 1)  # the smoothed rim of black is coloured
    if grey:
        strength_HW = _darkness(smooth_HW3, ~marks_HW)
        threshold = _otsu(strength_HW[~marks_HW], DARKNESS_RANGE)
    else:
        strength_HW = _saturation(_balance_white(smooth_HW3, ~marks_HW))
        threshold = section.threshold if section.method == "fixed" else _otsu(strength_HW[~marks_HW], OTSU_RANGE)
    stained_HW = (strength_HW > threshold * 255) & ~marks_HW
    mask_HW = _close(stained_HW, section.closing_um / mpp)
    mask_HW = _fill_holes(mask_HW, section.min_hole_um2 / mpp**2) & ~marks_HW
    min_speck_px = min(section.min_speck_um2 / mpp**2, mask_HW.size / 20)
    mask_HW = _drop_small(mask_HW, min_speck_px)
    measure = "darkness" if grey else "saturation"
    reason = "" if mask_HW.any() else _why_empty(stained_HW, marks_HW, threshold, min_speck_px * mpp**2, measure)
    return TissueMask(mask_HW, mpp, reason, float(threshold), marks_HW, measure)


def find_pen_marks(thumbnail_HW3: np.ndarray, smooth_HW3: np.ndarray, mpp: float) -> np.ndarray:
    """Bool (H, W): red, green, blue and black pen, with its faded rim.

    Haematoxylin and eosin span the hues from violet to pink (240 to 345 degrees). A pen mark has a core of a colour
    outside that range, or so strong that no stain reaches it at thumbnail resolution, and a paler rim.
    Thresholds were set on the pen-marked thumbnails of histolab and TCGA.

    smooth_HW3: the thumbnail, smoothed. A faint smear is only where the thumbnail itself has no grain.
    """
    hue, saturation, value = cv2.split(cv2.cvtColor(smooth_HW3, cv2.COLOR_RGB2HSV_FULL))
    chroma = value - smooth_HW3.min(axis=2)
    red_hue = (hue >= _hue(343)) | (hue <= _hue(12))
    green_hue = (hue >= _hue(70)) & (hue <= _hue(200))
    blue_hue = (hue > _hue(200)) & (hue <= _hue(232))
    cold_rim = (green_hue | blue_hue) & (saturation > 30)
    dense_nuclei = (hue >= _hue(245)) & (hue <= _hue(303)) & (saturation > 76)  # as dark as ink, but violet
    black = (value < BLACK_INK_VALUE) & (chroma < BLACK_INK_CHROMA) & ~dense_nuclei
    fade_px = PEN_FADE_UM / mpp
    red_core_HW = red_hue & (chroma > 120)
    everywhere = np.inf  # green and blue are no colours of H&E: follow them as far as they are connected
    ink = [  # core, what may be its rim, how far from the core
        (red_core_HW, (red_hue & (chroma > FAINT_CHROMA)) | ((hue >= _hue(338)) & (chroma > 75)), fade_px),
        (green_hue & (saturation > 64) & (chroma > 20), cold_rim, everywhere),
        (blue_hue & (saturation > 115) & (chroma > 60), cold_rim, everywhere),
        (black, (value < 115) & (chroma < 60), fade_px),
    ]
    marks_HW = np.zeros(hue.shape, bool)
    for core_HW, rim_HW, reach_px in ink:
        core_HW = _drop_small(core_HW, MIN_PEN_UM2 / mpp**2)
        if core_HW.any():
            marks_HW |= core_HW | _connected_to(core_HW, rim_HW & _dilate(core_HW, reach_px))
    if (marks_HW & red_core_HW).any():
        even_HW = _grain(thumbnail_HW3, mpp) <= INK_MAX_GRAIN
        marks_HW |= _open(red_hue & (chroma > FAINT_CHROMA) & even_HW, SMEAR_UM / mpp)
    return _dilate(marks_HW, 1) if marks_HW.any() else marks_HW


def overview_picture(
    thumbnail_HW3: np.ndarray,
    tissue: TissueMask,
    coords_N2: np.ndarray | None = None,
    tile_level0_px: float = 0.0,
    slide_mpp: float = 0.0,
    lines: Sequence[str] = (),
    longest_px: int = 1600,
) -> Image.Image:
    """A picture for quality control: tissue outlined in green, left-out marks in red, tiles as a blue grid.

    Args:
        thumbnail_HW3: the picture that `tissue` was found on.
        tissue: from `find_tissue`.
        coords_N2: level-0 px, (x, y) of the tiles' top-left corners; None or empty: no grid.
        tile_level0_px: side of a tile in level-0 px.
        slide_mpp: microns per level-0 px.
        lines: text for the legend, for instance the slide's name.
        longest_px: the picture is enlarged or reduced so that its longer side is about this (at most 4 times).
    """
    height, width = thumbnail_HW3.shape[:2]
    scale = min(4.0, longest_px / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    picture_HW3 = cv2.resize(thumbnail_HW3, size, interpolation=shrink)
    if coords_N2 is not None and len(coords_N2):
        factor = slide_mpp / tissue.mpp * scale
        corners_N4 = np.hstack([coords_N2, coords_N2 + tile_level0_px]) * factor
        for left, top, right, bottom in np.rint(corners_N4).astype(int).tolist():
            cv2.rectangle(picture_HW3, (left, top), (right, bottom), (40, 80, 220), 1)
    for region_HW, colour in ((tissue.marks_HW, (220, 30, 30)), (tissue.mask_HW, (0, 160, 60))):
        large_HW = cv2.resize(region_HW.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(large_HW, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(picture_HW3, outlines, -1, colour, 2)
    n_tiles = 0 if coords_N2 is None else len(coords_N2)
    text = [
        *lines,
        f"tissue (green) {tissue.fraction:.1%}, {tissue.area_mm2:.2f} mm2, "
        f"{tissue.measure} above {tissue.threshold:.3f}",
        f"left out (red) {tissue.marks_HW.mean():.1%}; tiles (blue) {n_tiles}",
        *([f"no tissue: {tissue.empty_reason}"] if tissue.empty_reason else []),
    ]
    return _with_legend(picture_HW3, text)


# --- steps ---------------------------------------------------------------------------------------------------------


def _is_fluorescence(smooth_HW3: np.ndarray, dark_HW: np.ndarray) -> bool:
    """Mostly dark and without bright colourless glass."""
    return bool(dark_HW.mean() > 0.5 and _maybe_glass(smooth_HW3).mean() < 0.01)


def _maybe_glass(smooth_HW3: np.ndarray) -> np.ndarray:
    maybe_HW: np.ndarray = (smooth_HW3.max(axis=2) >= GLASS_MIN_VALUE) & (
        _saturation(smooth_HW3) <= GLASS_MAX_SATURATION
    )
    return maybe_HW


def _grain(thumbnail_HW3: np.ndarray, mpp: float) -> np.ndarray:
    """uint8: the median within SMEAR_UM of how far green, in which stain and blood are darkest, is from its neighbours'
    median. Ink lies evenly over what it covers; a gradient has none."""
    green_HW = np.ascontiguousarray(thumbnail_HW3[:, :, 1])
    return cv2.medianBlur(cv2.absdiff(green_HW, cv2.medianBlur(green_HW, 3)), max(3, _odd(SMEAR_UM / mpp)))


def _saturation(rgb_HW3: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2HSV_FULL)[:, :, 1]


def _balance_white(smooth_HW3: np.ndarray, wanted_HW: np.ndarray) -> np.ndarray:
    """Scale the channels so that this slide's glass, its brightest colourless part, becomes white.

    Pure white is left out of the estimate where there is other glass: it is filled in where nothing was scanned.
    """
    glass_HW = _maybe_glass(smooth_HW3) & wanted_HW
    scanned_HW = glass_HW & (smooth_HW3.min(axis=2) < 254)
    if scanned_HW.sum() > 0.01 * glass_HW.size:
        glass_HW = scanned_HW
    if not glass_HW.any():
        return smooth_HW3
    colours_N3 = smooth_HW3[glass_HW]
    brightness_N = colours_N3.min(axis=1)
    brightest_N3 = colours_N3[brightness_N >= np.percentile(brightness_N, 95) - 5]
    glass_3 = np.median(brightest_N3, axis=0)
    table_3 = np.minimum(255, np.arange(256)[:, None] * (glass_3.max() / glass_3)).round().astype(np.uint8)
    return cv2.LUT(smooth_HW3, table_3.reshape(1, 256, 3))


def _is_grey(thumbnail_HW3: np.ndarray) -> bool:
    """Whether the picture has no colour at all: a grey image, or a scan of nothing but white."""
    chroma_HW = thumbnail_HW3.max(axis=2) - thumbnail_HW3.min(axis=2)
    return bool((chroma_HW <= GREY_MAX_CHROMA).mean() > 0.999)


def _darkness(smooth_HW3: np.ndarray, wanted_HW: np.ndarray) -> np.ndarray:
    """uint8: how much darker than the glass, its brightest twentieth; pure white is left out as in `_balance_white`."""
    value_HW = smooth_HW3.max(axis=2)
    scanned_HW = wanted_HW & (value_HW < 254)
    counted_HW = scanned_HW if scanned_HW.sum() > 0.01 * value_HW.size else wanted_HW
    if not counted_HW.any():
        return np.zeros_like(value_HW)
    darkest, glass = np.percentile(value_HW[counted_HW], (1, 95))
    if glass - darkest <= UNIFORM_MAX_RANGE:
        return np.zeros_like(value_HW)
    glass = max(glass, GLASS_MIN_GREY)  # there need not be any
    darker_HW: np.ndarray = np.clip(glass - value_HW.astype(np.float64), 0, 255).astype(np.uint8)
    return darker_HW


def _otsu(strength_N: np.ndarray, within: tuple[float, float]) -> float:
    """Otsu's threshold (0..1), kept within a range."""
    if not strength_N.size:
        return within[1]
    found, _ = cv2.threshold(strength_N.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(np.clip(found / 255, *within))


def _close(mask_HW: np.ndarray, diameter_px: float) -> np.ndarray:
    size = _odd(diameter_px)
    if size == 1:
        return mask_HW
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_CLOSE, disk).astype(bool)


def _open(mask_HW: np.ndarray, diameter_px: float) -> np.ndarray:
    """Without what is narrower than a disk."""
    size = max(3, _odd(diameter_px))
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_OPEN, disk).astype(bool)


def _dilate(mask_HW: np.ndarray, radius_px: float) -> np.ndarray:
    """All pixels within `radius_px` (at least one pixel) of the mask, by distance: cheap for any radius."""
    if not mask_HW.any():
        return mask_HW
    distance_HW = cv2.distanceTransform((~mask_HW).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance_HW <= max(1.0, radius_px)


def _fill_holes(mask_HW: np.ndarray, max_px: float) -> np.ndarray:
    """Fill enclosed gaps of less than `max_px`; a gap at the picture's edge is not enclosed."""
    n, labels_HW, stats_N5, _ = cv2.connectedComponentsWithStats((~mask_HW).astype(np.uint8), connectivity=4)
    left, top, width, height, area = stats_N5.T
    inside = (left > 0) & (top > 0) & (left + width < mask_HW.shape[1]) & (top + height < mask_HW.shape[0])
    fill_N = inside & (area < max_px)
    fill_N[0] = False  # label 0 is the mask itself
    return mask_HW | fill_N[labels_HW] if n > 1 else mask_HW


def _drop_small(mask_HW: np.ndarray, min_px: float) -> np.ndarray:
    """Without pieces of less than `min_px`."""
    _, labels_HW, stats_N5, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    keep_N = stats_N5[:, cv2.CC_STAT_AREA] >= min_px
    keep_N[0] = False
    kept_HW: np.ndarray = keep_N[labels_HW]
    return kept_HW


def _connected_to(seeds_HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Those pieces of the mask that touch a seed."""
    n, labels_HW = cv2.connectedComponents((mask_HW | seeds_HW).astype(np.uint8), connectivity=8)
    touched_N = np.zeros(n, bool)
    touched_N[labels_HW[seeds_HW]] = True
    return touched_N[labels_HW]


def _why_empty(
    stained_HW: np.ndarray, marks_HW: np.ndarray, threshold: float, min_speck_um2: float, measure: str
) -> str:
    if marks_HW.mean() > 0.9:
        return f"{marks_HW.mean():.0%} of the slide is black or pen mark"
    left_out = f"; {marks_HW.mean():.0%} is black or pen mark" if marks_HW.any() else ""
    if stained_HW.any():
        kind = "dark" if measure == "darkness" else "coloured"
        return f"only {kind} specks smaller than {min_speck_um2:,.0f} square microns on glass{left_out}"
    without = "a grey picture; " if measure == "darkness" else ""
    return f"{without}nothing is stained (no {measure} above {threshold:.3f}): looks like empty glass{left_out}"


def _with_legend(picture_HW3: np.ndarray, lines: Sequence[str]) -> Image.Image:
    font = ImageFont.load_default(16)
    line_px = 22
    width = max(picture_HW3.shape[1], 20 + max(int(font.getlength(line)) for line in lines))
    picture = Image.new("RGB", (width, picture_HW3.shape[0] + line_px * len(lines) + 10), "white")
    picture.paste(Image.fromarray(picture_HW3), (0, 0))
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        draw.text((8, picture_HW3.shape[0] + 5 + row * line_px), line, fill="black", font=font)
    return picture


def _odd(pixels: float) -> int:
    """The odd whole number nearest to `pixels`, at least 1."""
    return max(1, 2 * round((pixels - 1) / 2) + 1)


def _hue(degrees: float) -> int:
    return round(degrees / 360 * 255)
