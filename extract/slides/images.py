"""Plain images (PNG, JPEG, untiled TIFF): as slides of one level, and as tiles that somebody has cut already.

Axes: H height, W width, 3 = RGB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from extract.slides.errors import SlideOpenError

MAX_IMAGE_PIXELS = 500_000_000
"""Largest plain image that is decoded: it is held in memory whole, 1.5 GB of RGB at this limit."""

IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")

TILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for damaged files."""


class ImageReader:
    """Pixels of a plain image, decoded once and held in memory."""

    level_downsamples = (1.0,)
    level_block_px = ((0, 0),)

    def __init__(self, path: Path):
        self.path = path
        self._image_HW3: np.ndarray | None = None
        with _plain_image(path) as image:
            self.level_sizes = (image.size,)
            self.properties = _resolution_properties(image)

    def close(self) -> None:
        self._image_HW3 = None

    def read_shrunk(
        self, level: int, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int
    ) -> np.ndarray | None:
        return None

    def decoder(self, level: int) -> str:
        return f"Pillow {version('pillow')}"

    def read(self, level: int, x_level0: int, y_level0: int, width_px: int, height_px: int) -> np.ndarray:
        if self._image_HW3 is None:
            with _plain_image(self.path) as image:
                self._image_HW3 = _over_white(image)
        (width, height), *_ = self.level_sizes
        region_HW3 = np.full((height_px, width_px, 3), 255, np.uint8)
        x_from, x_to = max(x_level0, 0), min(x_level0 + width_px, width)
        y_from, y_to = max(y_level0, 0), min(y_level0 + height_px, height)
        if x_from < x_to and y_from < y_to:
            inside = self._image_HW3[y_from:y_to, x_from:x_to]
            region_HW3[y_from - y_level0 : y_to - y_level0, x_from - x_level0 : x_to - x_level0] = inside
        return region_HW3


@contextmanager
def _plain_image(path: Path) -> Iterator[Image.Image]:
    """An image opened by Pillow, its size checked before anything is decoded.

    Pillow's own limit (a warning at 89 megapixels, an error at 179) is made for pictures from strangers; it is
    replaced by ours while this image is in use.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise SlideOpenError(
                    f"{path}: {width} x {height} px is more than the {MAX_IMAGE_PIXELS:,} px that a plain image may "
                    "have, because it is held in memory whole. Convert it to a tiled pyramid, for instance with "
                    "`vips tiffsave in.png out.tiff --tile --pyramid --compression jpeg`"
                )
            if image.mode not in IMAGE_MODES:
                raise SlideOpenError(f"{path}: expected 8 bits a channel, got Pillow mode {image.mode!r}")
            yield image
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        raise SlideOpenError(f"{path}: not an image that Pillow can read: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _over_white(image: Image.Image) -> np.ndarray:
    """uint8 RGB (H, W, 3); transparent pixels become white."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return np.asarray(white.convert("RGB"))


def _resolution_properties(image: Image.Image) -> dict[str, str]:
    """A plain TIFF's resolution tags under OpenSlide's names. PNG and JPEG only know print resolutions: not used."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 0), "")
    found = {"tiff.XResolution": tags.get(282), "tiff.YResolution": tags.get(283), "tiff.ResolutionUnit": unit}
    return {name: str(value if isinstance(value, str) else float(value)) for name, value in found.items() if value}


# --- tiles -----------------------------------------------------------------------------------------------------------


def decoded_tile(path: Path | str | BinaryIO) -> np.ndarray | str:
    """uint8 RGB (H, W, 3), or what is wrong with the file (or its bytes). What is transparent is white, like glass."""
    try:
        with Image.open(path) as image:
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                colour = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return np.asarray(Image.alpha_composite(white, colour).convert("RGB"))
            if image.mode not in ("RGB", "L", "P", "1"):
                return f"expected 8-bit RGB, got mode {image.mode}"
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        return "no such file"
    except UnidentifiedImageError:  # whose words are the address of a stream in memory
        return "cannot be read as an image (its first bytes are those of no known format)"
    except UNREADABLE as error:
        said = (str(error).splitlines() or [""])[0][:120]
        return f"cannot be read as an image ({type(error).__name__}: {said})"


def resized_tile(tile_HW3: np.ndarray, side_px: int) -> np.ndarray:
    """The tile `side_px` square, by the filters with which tiles of a slide are resized."""
    if tile_HW3.shape[:2] == (side_px, side_px):
        return tile_HW3
    smaller = max(tile_HW3.shape[:2]) > side_px
    return cv2.resize(tile_HW3, (side_px, side_px), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
