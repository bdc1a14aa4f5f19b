"""tiles.save: the tiles themselves as images beside the features, OUT/tiles/SLIDE/X_Y.jpg (level-0 px).

A slide's folder is made anew when the slide is planned, and taken away when it fails: where there is a feature file,
there are all its tiles.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

FOLDER = "tiles"
SUFFIXES = {"jpeg": ".jpg", "png": ".png"}
OPTIONS = {"jpeg": [cv2.IMWRITE_JPEG_QUALITY, 90], "png": [cv2.IMWRITE_PNG_COMPRESSION, 3]}


def folder_of(features: Path, slide: str) -> Path:
    return features / FOLDER / slide


def forget(features: Path, slide: str) -> None:
    """Take the slide's tiles away; of another extraction, or of one that failed."""
    folder = folder_of(features, slide)
    if folder.exists():
        shutil.rmtree(folder)


def save(folder: Path, kind: str, tiles_KHW3: np.ndarray, coords_K2: np.ndarray) -> None:
    """Write K tiles.

    Args:
        kind: jpeg (quality 90) or png (without loss). tiles_KHW3: uint8 RGB. coords_K2: level-0 px, (x, y).

    Raises:
        OSError: the disk is full, the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for tile_HW3, (x, y) in zip(tiles_KHW3, coords_K2.tolist(), strict=True):
        bgr_HW3 = cv2.cvtColor(tile_HW3, cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(SUFFIXES[kind], bgr_HW3, OPTIONS[kind])
        (folder / f"{x}_{y}{SUFFIXES[kind]}").write_bytes(encoded.tobytes())


def without_pictures(features: Path, slides: Sequence[str]) -> list[str]:
    """Slides of which there are features and no tiles: they were extracted without tiles.save."""
    return [slide for slide in slides if not folder_of(features, slide).is_dir()]


def masks_of(features: Path) -> Path:
    """Where `tissue.save` leaves masks."""
    return features / "tissue"


def mask_file(masks: Path, slide: str) -> Path:
    return masks / f"{slide}.geojson"


def without_masks(features: Path, slides: Sequence[str]) -> list[str]:
    """Slides of which there are features and no mask: they were extracted without tissue.save."""
    return [slide for slide in slides if not mask_file(masks_of(features), slide).is_file()]
