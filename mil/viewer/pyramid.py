"""A slide's own pyramid as JPEG tiles: the levels as they lie in the file, cut into squares, and one small overview.

Array axes: H height, W width, 3 = RGB. Level px, level-0 px: see extract.slides.slide.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from extract.slides.errors import SlideError
from extract.slides.slide import Slide

TILE_PX = 1024
OVERVIEW_PX = 1024
QUALITY = 85


class NoSuchTileError(SlideError):
    """The slide has no such level, column or row."""


def described(slide: Slide) -> dict[str, Any]:
    """Sizes in px, microns per px, and every level with its downsample, the finest first; last the overview."""
    levels = [
        {"width": width, "height": height, "downsample": downsample}
        for (width, height), downsample in zip(slide.level_sizes, slide.level_downsamples, strict=True)
    ]
    shrink = overview_shrink(slide)
    if shrink > slide.level_downsamples[-1] * 1.5:
        width, height = (int(np.ceil(side / shrink - 1e-6)) for side in (slide.width, slide.height))
        levels.append({"width": width, "height": height, "downsample": shrink})
    return {"width": slide.width, "height": slide.height, "mpp": slide.mpp, "tile_px": TILE_PX, "levels": levels}


def overview_shrink(slide: Slide) -> float:
    """Level-0 px per px of the overview."""
    return max(1.0, max(slide.width, slide.height) / OVERVIEW_PX)


def overview(slide: Slide) -> np.ndarray:
    """The whole slide in at most OVERVIEW_PX px a side, (H, W, 3)."""
    return slide.thumbnail(overview_shrink(slide) * slide.mpp).image_HW3


def tile(slide: Slide, level: int, column: int, row: int) -> np.ndarray:
    """One square of a level, smaller at its right and lower edge, (H, W, 3).

    Raises:
        NoSuchTileError: level, column or row are beyond the slide's.
        SlideError: it cannot be read.
    """
    if level == len(slide.level_sizes) and (column, row) == (0, 0):
        return overview(slide)
    if not 0 <= level < len(slide.level_sizes):
        raise NoSuchTileError(f"level {level}: expected one of 0..{len(slide.level_sizes)}")
    (width, height), downsample = slide.level_sizes[level], slide.level_downsamples[level]
    x, y = column * TILE_PX, row * TILE_PX
    if not (0 <= x < width and 0 <= y < height):
        raise NoSuchTileError(f"column {column}, row {row}: level {level} has {width} x {height} px")
    size = min(TILE_PX, width - x), min(TILE_PX, height - y)
    return slide.read_region_rgb(level, round(x * downsample), round(y * downsample), *size)


def jpeg(image_HW3: np.ndarray, longest: int | None = None) -> bytes:
    """As JPEG, shrunk to `longest` px on the longer side where it is larger."""
    height, width = image_HW3.shape[:2]
    if longest and max(height, width) > longest:
        shrink = longest / max(height, width)
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        image_HW3 = cv2.resize(image_HW3, size, interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image_HW3, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    if not done:
        raise RuntimeError("expected OpenCV to encode a JPEG")
    return encoded.tobytes()
