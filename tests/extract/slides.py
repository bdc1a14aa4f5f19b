"""Paint and write test slides. Tests get this module through the `slides` fixture (see conftest.py).

Slides are never square, and levels need not halve exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import tifffile

GLASS = (243, 242, 245)
HAEMATOXYLIN, EOSIN = (118, 72, 148), (222, 134, 172)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 RGB (height, width, 3), every pixel at random: any misplaced pixel shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def glass(width: int, height: int, colour: Sequence[int] = GLASS, seed: int = 0) -> np.ndarray:
    """uint8 RGB (height, width, 3): empty glass with a scanner's noise, through JPEG."""
    grain = np.random.default_rng(seed).normal(0, 2.0, (height, width, 3))
    image = np.clip(np.asarray(colour) + grain, 0, 255).astype(np.uint8)
    decoded = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded.astype(np.uint8)


def ellipse(width: int, height: int, centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """bool (height, width). Centre and radii as fractions of the sides, (x, y)."""
    y, x = np.mgrid[:height, :width]
    across = ((x + 0.5) / width - centre[0]) / radii[0]
    down = ((y + 0.5) / height - centre[1]) / radii[1]
    return across**2 + down**2 <= 1


def paint_tissue(
    width: int, height: int, *, strength: float = 1.0, colour: Sequence[int] = GLASS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """H&E-like tissue on glass: two pieces of eosin colour with nuclei.

    Args:
        strength: 1 = well stained, 0.15 = faint.

    Returns:
        image uint8 (height, width, 3) and truth bool (height, width), True where there is tissue.
    """
    rng = np.random.default_rng(seed)
    truth = ellipse(width, height, (0.3, 0.4), (0.2, 0.3)) | ellipse(width, height, (0.75, 0.6), (0.15, 0.3))
    image = glass(width, height, colour, seed).astype(np.float32)
    nuclei = rng.random((height, width)) < 0.15
    stain = np.where(nuclei[:, :, None], HAEMATOXYLIN, EOSIN) + rng.normal(0, 4, (height, width, 3))
    image[truth] += strength * (stain - np.asarray(colour))[truth]
    return np.clip(image, 0, 255).astype(np.uint8), truth


def shrink(image: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The image and its smaller levels, area-averaged to the (width, height) given."""
    return [image, *(cv2.resize(image, size, interpolation=cv2.INTER_AREA) for size in sizes)]


def write_tiff(
    path: Path,
    levels: Sequence[np.ndarray],
    *,
    mpp: float | tuple[float, float] | None = None,
    mpp_in: str = "tags",
    tile: tuple[int, int] = (64, 48),
    compression: str = "deflate",
    objective: float | None = None,
) -> Path:
    """Write levels as a tiled TIFF that OpenSlide opens.

    Args:
        levels: uint8 RGB arrays, finest first; one array makes a single-level file.
        mpp: microns per level-0 pixel, or (x, y); None: not stated.
        mpp_in: "tags" (TIFF resolution, per centimetre), "inch" (the same per inch) or "aperio" (ImageDescription).
        tile: (height, width) of the compressed tiles, multiples of 16.
        compression: "deflate" keeps pixels exactly, "jpeg" is what scanners write.
        objective: Aperio's AppMag.
    """
    description, resolution, unit = None, None, None
    if mpp_in == "aperio":
        parts = ["Aperio Image Library v11.2.1 \r\ntest slide"]
        parts += [] if objective is None else [f"AppMag = {objective:g}"]
        parts += [] if mpp is None else [f"MPP = {mpp}"]
        description = "|".join(parts)
    elif mpp is not None:
        microns, unit = (25_400.0, "INCH") if mpp_in == "inch" else (10_000.0, "CENTIMETER")
        x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        resolution = (microns / x, microns / y)
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(
                level,
                tile=tile,
                photometric="rgb",  # for jpeg, tifffile converts to YCbCr itself
                compression=compression,
                subfiletype=1 if number and mpp_in != "aperio" else 0,
                description=description,
                resolution=resolution,
                resolutionunit=unit,
                metadata=None,
                software=False,
            )
    return path


def break_tile(path: Path, level: int, column: int, row: int) -> None:
    """Overwrite one compressed tile of a TIFF so that it cannot be decoded."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[level].aspage()
        index = row * -(-page.imagewidth // page.tilewidth) + column
        offset, length = page.dataoffsets[index], page.databytecounts[index]
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(b"\x00" * length)


def painted_slide(
    path: Path, width: int = 1500, height: int = 1100, *, mpp: float = 0.5, seed: int = 0, compression: str = "jpeg"
) -> np.ndarray:
    """Write a small slide with two pieces of tissue and three levels (1, about 1/2, about 1/4). Its truth mask."""
    image, truth = paint_tissue(width, height, seed=seed)
    sizes = [(width // 2, height // 2), (width // 4, height // 4)]
    write_tiff(path, shrink(image, sizes), mpp=mpp, tile=(128, 128), compression=compression)
    return truth
