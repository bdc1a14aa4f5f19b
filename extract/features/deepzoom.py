"""DeepZoom addresses: level, column and row of a tile, and the pixels that they stand for.

Axes: N tiles, D features, 2 = (x, y), 3 = DeepZoom (level, column, row).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extract.features.cache import CacheError

DEEPZOOM_TILE_PX = 224
"""Tile side of the DeepZoom grid in Owkin's features."""


def deepzoom_to_px(address_N3: np.ndarray, frame_level: int, tile_px: int = DEEPZOOM_TILE_PX) -> np.ndarray:
    """`coords_N2` (x, y) of each tile's top-left in pixels of DeepZoom level `frame_level`.

    Args:
        address_N3: DeepZoom level, column, row; no level is above `frame_level`.
        frame_level: the level whose pixels are wanted. Level 0 of the slide is DeepZoom level `levels - 1`, with
            `levels` the `level_count` of OpenSlide's DeepZoomGenerator: each DeepZoom level has twice the pixels a
            side of the one before.
        tile_px: side of a tile at its own level.
    """
    side_N1 = tile_px * 2 ** (frame_level - address_N3[:, :1].astype(np.int64))
    return (address_N3[:, 1:] * side_N1).astype(np.int32)


def px_to_deepzoom(
    coords_N2: np.ndarray, level_N: np.ndarray, frame_level: int, tile_px: int = DEEPZOOM_TILE_PX
) -> np.ndarray:
    """The inverse of `deepzoom_to_px`: `address_N3`, int32."""
    side_N1 = tile_px * 2 ** (frame_level - level_N.astype(np.int64))[:, None]
    return np.column_stack([level_N, coords_N2 // side_N1]).astype(np.int32)


def split_deepzoom(rows_N3D: np.ndarray, where: str) -> np.ndarray:
    """The DeepZoom address (N, 3), int32, in the first three columns of `rows_N3D`.

    Raises:
        CacheError: they are not whole numbers >= 0, so these columns are no address.
    """
    address_N3 = np.asarray(rows_N3D[:, :3], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        whole_N = ((address_N3 == np.rint(address_N3)) & (address_N3 >= 0) & (address_N3 < 2**31)).all(axis=1)
    if not whole_N.all():
        bad = int(np.argmin(whole_N))
        raise CacheError(
            f"{where}: expected DeepZoom level, column, row (whole numbers) in the first three columns, "
            f"got {address_N3[bad].tolist()} for tile {bad}"
        )
    return address_N3.astype(np.int32)


def deepzoom_to_level0(path: Path, address_N3: np.ndarray, levels: int, tile_px: int = DEEPZOOM_TILE_PX) -> np.ndarray:
    """`coords_N2` of addresses from a file of a slide with so many DeepZoom levels; CacheError if they do not fit."""
    finest = int(address_N3[:, 0].max(initial=0))
    if finest > levels - 1:
        raise CacheError(
            f"{path}: tiles of DeepZoom level {finest}, but a slide of {levels} DeepZoom levels ends at {levels - 1}; "
            "these features belong to another slide"
        )
    return deepzoom_to_px(address_N3, levels - 1, tile_px)
