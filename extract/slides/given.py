"""Tiles at coordinates that are given, and an even part of a plan's tiles.

Axes: N tiles, 2 = (x, y).
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from extract.config import Tiles
from extract.slides.slide import Geometry
from extract.slides.tiles import GeometryError, TilePlan, choose_level

MORTON_BITS = 16


def plan_given(
    geometry: Geometry, coords_N2: np.ndarray, side_level0_px: float, *, tile_px: int, mpp: float, section: Tiles
) -> TilePlan:
    """The plan of tiles that are given, in their order; their coordinates stay as they are.

    They are read from the level that is best for their true resolution, where corners are whole pixels: a cut-out lies
    within half a pixel of that level of where it was asked for (on level 0 exactly there).

    Args:
        coords_N2: level-0 px, (x, y) of the top-left corners.
        side_level0_px: of a tile.
        tile_px, mpp: side in pixels and microns per pixel of the tiles that the encoder gets.

    Raises:
        GeometryError: the tiles cover another area than the encoder's, or lie outside the slide.
    """
    true_mpp = side_level0_px * geometry.mpp / tile_px
    if abs(true_mpp / mpp - 1) > section.tolerance + 1e-9:
        off = abs(true_mpp / mpp - 1)
        raise GeometryError(
            f"{geometry.name}: the given tiles are {side_level0_px:g} level-0 px = "
            f"{side_level0_px * geometry.mpp:.1f} microns a side, the encoder's {tile_px} px at {mpp:g} microns per "
            f"pixel = {tile_px * mpp:.1f}; {off:.0%} off, tiles.tolerance={section.tolerance:g} allows less. Choose "
            f"the coordinates anew, or allow it with tiles.tolerance={off + 0.005:.2f}"
        )
    _refuse_outside(geometry, coords_N2, side_level0_px)
    level, _ = choose_level(geometry, tile_px=tile_px, mpp=true_mpp, section=section)
    downsample = geometry.level_downsamples[level]
    read_px = max(1, round(side_level0_px / downsample))
    return TilePlan(
        coords_N2=coords_N2.astype(np.int32),
        level_coords_N2=np.rint(coords_N2 / downsample).astype(np.int32),
        tissue_N=np.full(len(coords_N2), np.nan, np.float32),
        tile_px=tile_px,
        mpp=mpp,
        overlap_px=0,
        level=level,
        level_mpp=geometry.level_mpps[level],
        read_px=read_px,
        stride_px=read_px,
        tile_level0_px=side_level0_px,
        block_px=geometry.level_block_px[level],
        resample=section.resample,
    )


def _refuse_outside(geometry: Geometry, coords_N2: np.ndarray, side: float) -> None:
    """Tools let a last tile reach past the slide; one that begins there is another slide's."""
    outside_N = (coords_N2 >= (geometry.width, geometry.height)).any(axis=1)
    if outside_N.any():
        x, y = coords_N2[outside_N][0].tolist()
        raise GeometryError(
            f"{geometry.name}: {outside_N.sum()} of {len(coords_N2)} given tiles begin outside the slide, such as "
            f"({x}, {y}); it has {geometry.width} x {geometry.height} px. Expected level-0 px of this slide"
        )


def thinned(plan: TilePlan, most: int, seed: int, slide: str) -> TilePlan:
    """At most `most` tiles, spread evenly over the tissue, the same for a slide whatever else there is.

    Systematic sampling (Cochran 1977, chapter 8) along the Z-order curve of the grid: neighbours on the curve are
    neighbours on the slide, so every part of the tissue gives its share. The start is drawn from seed and slide name.
    """
    if len(plan) <= most:
        return plan
    order_N = np.argsort(morton(plan.level_coords_N2 // plan.stride_px), kind="stable")
    rng = np.random.default_rng([seed, zlib.crc32(slide.encode())])
    places = np.floor((np.arange(most) + rng.random()) * len(plan) / most).astype(np.int64)
    kept = np.sort(order_N[places])
    return replace(
        plan,
        coords_N2=plan.coords_N2[kept],
        level_coords_N2=plan.level_coords_N2[kept],
        tissue_N=plan.tissue_N[kept],
    )


def morton(cells_N2: np.ndarray) -> np.ndarray:
    """int64 (N,): place on the Z-order curve: the bits of column and row in turn (Morton 1966)."""
    code_N = np.zeros(len(cells_N2), np.int64)
    columns_N, rows_N = cells_N2.astype(np.int64).T
    for bit in range(MORTON_BITS):
        code_N |= ((columns_N >> bit) & 1) << (2 * bit)
        code_N |= ((rows_N >> bit) & 1) << (2 * bit + 1)
    return code_N
