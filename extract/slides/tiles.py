"""Tissue mask + microns per pixel -> a grid of tiles; reading neighbouring tiles together.

Three sizes of one tile, all kept:
    requested  `tile_px` pixels at `mpp` microns per pixel: what the encoder gets
    read       `read_px` pixels of pyramid level `level`, a whole number: what is cut out of the slide
    level-0    `tile_level0_px` = read_px x the level's downsample: the tile's side in the frame of the coordinates
Read equals requested when the level is within the tolerance; else the cut-out is resized to tile_px.

Axes: N tiles of a slide, K tiles of a region, H height, W width, 3 = RGB, 2 = (x, y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from extract.config import Tiles
from extract.slides.errors import SlideReadError
from extract.slides.slide import Geometry, Slide
from extract.slides.tissue import TissueMask

MAX_REGION_PX = 2048
MIN_REGION_FILL = 0.5
"""A region less filled with wanted tiles than this is read in two halves."""


class GeometryError(Exception):
    """The slide has no level from which the wanted tiles can be made."""


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one slide, row by row (y first, then x).

    Attributes:
        coords_N2: int32, level-0 px, (x, y) of each tile's top-left corner.
        level_coords_N2: int32, the same corners in px of `level`; the grid is exact here:
            column * stride_px, row * stride_px.
        tissue_N: float32, fraction of the tile (of its part inside the slide) that is tissue.
        tile_px, mpp, overlap_px: as requested; overlap in pixels of the finished tile.
        level: pyramid level that is read.
        level_mpp: its microns per pixel.
        read_px: side of the cut-out in px of `level`.
        stride_px: step of the grid in px of `level`.
        tile_level0_px: side in level-0 px.
        block_px: (width, height) of the level's compressed tiles, (0, 0) where unknown; only for speed.
        resample: how a larger cut-out is shrunk: area average, lanczos, or in the decoder (`shrink` times there, the
            rest by area average).
        shrink: what the decoder divides sides by, see `shrunk_by_decoder`.
    """

    coords_N2: np.ndarray
    level_coords_N2: np.ndarray
    tissue_N: np.ndarray
    tile_px: int
    mpp: float
    overlap_px: int
    level: int
    level_mpp: float
    read_px: int
    stride_px: int
    tile_level0_px: float
    block_px: tuple[int, int] = (0, 0)
    resample: Literal["area", "lanczos", "decoder"] = "area"
    shrink: int = 1

    def __len__(self) -> int:
        return len(self.coords_N2)

    @property
    def true_mpp(self) -> float:
        """Microns per pixel of the finished tiles: within the tolerance of `mpp`, or its rounding to whole read_px."""
        return self.level_mpp * self.read_px / self.tile_px


@dataclass(frozen=True)
class Region:
    """A rectangle of one level that holds neighbouring tiles: px of that level, and indices into the plan."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int
    indices_K: np.ndarray = field(repr=False)


# --- planning ------------------------------------------------------------------------------------------------------


def plan_tiles(
    geometry: Geometry, mask: TissueMask, *, tile_px: int, mpp: float, section: Tiles | None = None
) -> TilePlan:
    """Lay one grid over the slide, from its top-left corner, and keep the tiles with enough tissue.

    All tiles lie within the slide, except on a slide narrower (or lower) than one tile: there the single column (row)
    starts at 0 and what reaches past the slide is white. Every tile with at least `section.min_tissue` of tissue is
    kept; the fraction is exact (areas of partly covered mask pixels count in part). 0 keeps the whole grid.

    Args:
        geometry: of the slide.
        mask: from `extract.slides.tissue.find_tissue`, covering the whole slide.
        tile_px, mpp: side in pixels and microns per pixel of the tiles that the encoder gets.
        section: the config section; default: its defaults.

    Raises:
        GeometryError: the slide is too coarse, or the overlap is not smaller than the tile.
    """
    section = section or Tiles()
    if not 0 <= section.overlap_px < tile_px:
        raise GeometryError(f"tiles.overlap_px={section.overlap_px}: expected less than the tile, {tile_px} px")
    level, read_px = choose_level(geometry, tile_px=tile_px, mpp=mpp, section=section)
    downsample = geometry.level_downsamples[level]
    stride_px = max(1, round(read_px * (tile_px - section.overlap_px) / tile_px))
    width_px, height_px = geometry.level_sizes[level]
    starts_x, starts_y = _starts(width_px, read_px, stride_px), _starts(height_px, read_px, stride_px)
    mask_per_px = geometry.level_mpps[level] / mask.mpp
    edges_X2 = _edges(starts_x, read_px, width_px) * mask_per_px
    edges_Y2 = _edges(starts_y, read_px, height_px) * mask_per_px
    tissue_YX = tissue_fractions(mask.mask_HW, edges_X2, edges_Y2)
    rows_N, columns_N = np.nonzero(tissue_YX >= section.min_tissue - 1e-9)
    level_coords_N2 = np.stack([starts_x[columns_N], starts_y[rows_N]], axis=1)
    return TilePlan(
        coords_N2=np.rint(level_coords_N2 * downsample).astype(np.int32),
        level_coords_N2=level_coords_N2.astype(np.int32),
        tissue_N=tissue_YX[rows_N, columns_N].astype(np.float32),
        tile_px=tile_px,
        mpp=mpp,
        overlap_px=section.overlap_px,
        level=level,
        level_mpp=geometry.level_mpps[level],
        read_px=read_px,
        stride_px=stride_px,
        tile_level0_px=read_px * downsample,
        block_px=geometry.level_block_px[level],
        resample=section.resample,
    )


def choose_level(geometry: Geometry, *, tile_px: int, mpp: float, section: Tiles) -> tuple[int, int]:
    """The level to read and the side of the cut-out in its pixels.

    The level nearest to `mpp` if it is within `section.tolerance` (then the side is `tile_px`), else the coarsest
    level that is finer, else level 0 if upsampling by no more than `section.max_upsample` does.

    Raises:
        GeometryError: level 0 is too coarse.
    """
    level_mpps = geometry.level_mpps
    nearest = min(range(len(level_mpps)), key=lambda level: abs(level_mpps[level] / mpp - 1))
    if abs(level_mpps[nearest] / mpp - 1) <= section.tolerance + 1e-9:
        return nearest, tile_px
    upsample = level_mpps[0] / mpp
    if upsample > section.max_upsample:
        raise GeometryError(
            f"{geometry.name}: its finest level has {level_mpps[0]:g} microns per pixel, tiles are wanted at {mpp:g}: "
            f"they would have to be enlarged {upsample:.2f} times, tiles.max_upsample={section.max_upsample:g} allows "
            "less. Check the slide's mpp, or use an encoder for coarser tiles, or allow it with "
            f"tiles.max_upsample={_up(upsample)}"
        )
    level = max((i for i, level_mpp in enumerate(level_mpps) if level_mpp <= mpp), default=0)
    return level, max(1, round(tile_px * mpp / level_mpps[level]))


def tissue_fractions(mask_HW: np.ndarray, edges_X2: np.ndarray, edges_Y2: np.ndarray) -> np.ndarray:
    """Exact mean of the mask over every rectangle of a grid; mask pixels cut by an edge count by their area.

    Args:
        mask_HW: bool.
        edges_X2, edges_Y2: (left, right) of the columns and (top, bottom) of the rows, in mask pixels, fractional.
            What lies outside the mask counts as no tissue.

    Returns:
        float64 (Y, X).
    """
    integral_HW = cv2.integral(mask_HW.astype(np.uint8), sdepth=cv2.CV_32S)
    rows_YW = _interpolate(integral_HW, edges_Y2[:, 1]) - _interpolate(integral_HW, edges_Y2[:, 0])
    columns_XY = _interpolate(rows_YW.T, edges_X2[:, 1]) - _interpolate(rows_YW.T, edges_X2[:, 0])
    areas_YX = np.diff(edges_Y2, axis=1) * np.diff(edges_X2, axis=1).T
    fraction_XY: np.ndarray = columns_XY.T / areas_YX
    return fraction_XY


def _interpolate(values_SA: np.ndarray, positions_P: np.ndarray) -> np.ndarray:
    """Rows of `values_SA` at fractional positions, linear between them: the integral of a mask is linear in a pixel."""
    positions_P = np.clip(positions_P, 0, len(values_SA) - 1)
    below_P = np.minimum(positions_P.astype(int), len(values_SA) - 2)
    part_P1 = (positions_P - below_P)[:, None]
    value_PA: np.ndarray = values_SA[below_P] * (1 - part_P1) + values_SA[below_P + 1] * part_P1
    return value_PA


def _starts(length_px: int, read_px: int, stride_px: int) -> np.ndarray:
    """Starts of all tiles that lie within the length; one at 0 if it is shorter than a tile."""
    return np.arange(max(0, length_px - read_px) // stride_px + 1) * stride_px


def _edges(starts_S: np.ndarray, read_px: int, length_px: int) -> np.ndarray:
    """(start, end) of every tile in level px, without what reaches past the slide."""
    return np.stack([starts_S, np.minimum(starts_S + read_px, length_px)], axis=1)


def _up(factor: float) -> str:
    """Two decimals, rounded up, so that the advice in a message works."""
    return f"{math.ceil(factor * 100) / 100:g}"


def shrunk_by_decoder(plan: TilePlan, slide: Slide) -> TilePlan:
    """The plan with the most that the decoder can do of shrinking, if `resample` asks for it and cut-outs are larger.

    Raises:
        GeometryError: nothing, because the level has no JPEG blocks, or tiles or blocks are not divisible by two.
    """
    if plan.resample != "decoder" or plan.read_px < 2 * plan.tile_px:
        return plan
    lengths = [plan.read_px, plan.stride_px, *plan.block_px, *np.unique(plan.level_coords_N2 % 8).tolist()]
    possible = [n for n in (8, 4, 2) if plan.read_px >= n * plan.tile_px and all(side % n == 0 for side in lengths)]
    if not possible or not slide.has_blocks(plan.level):
        raise GeometryError(
            f"{slide.path}: tiles.resample=decoder: level {plan.level} ({slide.decoder(plan.level)}; blocks of "
            f"{plan.block_px} px, tiles of {plan.read_px} px) cannot be shrunk while it is decoded. Expected JPEG "
            "blocks, and sides divisible by two. tiles.resample=area does it after decoding"
        )
    return replace(plan, shrink=possible[0])


# --- reading -------------------------------------------------------------------------------------------------------


def group_into_regions(plan: TilePlan, max_region_px: int = MAX_REGION_PX) -> list[Region]:
    """Split the plan into rectangles of neighbouring tiles, each to be read in one go.

    Every tile is in exactly one region. Regions are cells of a fixed grid (row by row), cut down to the tiles they
    hold, and divided where less than half of them would be used. A region is at most `max_region_px` wide and high
    (px of the level read), and so are its finished tiles laid side by side (see `tiles_per_region`), but it always
    holds at least one tile.
    """
    if not len(plan):
        return []
    per_cell_2 = [_tiles_per_cell(plan, max_region_px, block) for block in plan.block_px]
    cells_N2 = plan.level_coords_N2 // plan.stride_px // per_cell_2
    order_N = np.lexsort((np.arange(len(plan)), cells_N2[:, 0], cells_N2[:, 1]))
    changes = np.flatnonzero(np.any(np.diff(cells_N2[order_N], axis=0) != 0, axis=1)) + 1
    most = tiles_per_region(plan.tile_px, max_region_px)
    return [
        region
        for indices_K in np.split(order_N, changes)
        for region in _regions_of(plan, indices_K, max(max_region_px, plan.read_px), most)
    ]


def tiles_per_region(tile_px: int, max_region_px: int = MAX_REGION_PX) -> int:
    """The most tiles that a region can hold, whatever the overlap: what memory must be kept ready for."""
    return max(1, max_region_px // tile_px) ** 2


def _tiles_per_cell(plan: TilePlan, max_region_px: int, block_px: int) -> int:
    """How many tiles in a row make a region: among the larger numbers that fit, the one that decodes least.

    A compressed block that straddles two regions is decoded for both. 8 tiles of 224 px are exactly 7 blocks of 256.
    """
    most = min((max_region_px - plan.read_px) // plan.stride_px + 1, max_region_px // plan.tile_px)
    most = max(1, most)
    if block_px < 1:
        return most

    def decoded_per_tile(count: int) -> float:
        starts = np.arange(16) * count * plan.stride_px
        ends = starts + (count - 1) * plan.stride_px + plan.read_px
        blocks = -(-ends // block_px) - starts // block_px
        return float(blocks.mean()) * block_px / count

    return min(range(most, most // 2, -1), key=decoded_per_tile)


def _regions_of(plan: TilePlan, indices_K: np.ndarray, max_px: int, most: int) -> list[Region]:
    """Of tiles off the grid (coordinates that are given) more may lie in a cell than a region holds: it is divided."""
    corners_K2 = plan.level_coords_N2[indices_K].astype(np.int64)
    (left, top), (right, bottom) = corners_K2.min(axis=0), corners_K2.max(axis=0) + plan.read_px
    columns, rows = ((size - plan.read_px) // plan.stride_px + 1 for size in (right - left, bottom - top))
    slots = columns * rows
    fits = max(right - left, bottom - top) <= max_px and len(indices_K) <= most
    if fits and len(indices_K) >= MIN_REGION_FILL * slots:
        return [Region(int(left), int(top), int(right - left), int(bottom - top), indices_K)]
    axis = 0 if right - left >= bottom - top else 1
    middle = (corners_K2[:, axis].min() + corners_K2[:, axis].max()) / 2
    first_K = corners_K2[:, axis] <= middle
    if first_K.all():  # many tiles at one place
        first_K = np.arange(len(indices_K)) < len(indices_K) / 2
    return [part for half in (first_K, ~first_K) for part in _regions_of(plan, indices_K[half], max_px, most)]


def read_tiles(
    slide: Slide, plan: TilePlan, region: Region, into_KHW3: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tiles of a region, written to the beginning of `into_KHW3` if that is given.

    A tile is the same whether read with its neighbours or alone: it is cut out of the level at whole pixels and resized
    by itself. (Exactly so on level 0 and wherever a level's downsample is a whole number. At other downsamples
    a region may start between two level pixels, and OpenSlide then interpolates, by at most half a level-0 pixel.)
    If the region cannot be read, its tiles are tried one by one.

    Returns:
        tiles_KHW3: uint8 RGB (K, tile_px, tile_px, 3), the readable ones.
        indices_K: their indices in the plan.
        bad_indices: indices of the unreadable ones.
    """
    try:
        pixels_HW3 = _read_level(slide, plan, region.x_px, region.y_px, region.width_px, region.height_px)
    except SlideReadError:
        return _read_one_by_one(slide, plan, region, into_KHW3)
    tiles_KHW3 = _room_for(plan, region, into_KHW3)
    corners_K2 = (plan.level_coords_N2[region.indices_K] - (region.x_px, region.y_px)) // plan.shrink
    side = plan.read_px // plan.shrink
    for tile_HW3, (x, y) in zip(tiles_KHW3, corners_K2.tolist(), strict=True):
        _finish(pixels_HW3[y : y + side, x : x + side], plan, tile_HW3)
    return tiles_KHW3, region.indices_K, region.indices_K[:0]


def read_tile(slide: Slide, plan: TilePlan, index: int) -> np.ndarray:
    """One tile by itself: uint8 RGB (tile_px, tile_px, 3).

    Raises:
        SlideReadError: it cannot be decoded.
    """
    x, y = plan.level_coords_N2[index].tolist()
    tile_HW3 = np.empty((plan.tile_px, plan.tile_px, 3), np.uint8)
    _finish(_read_level(slide, plan, x, y, plan.read_px, plan.read_px), plan, tile_HW3)
    return tile_HW3


def _room_for(plan: TilePlan, region: Region, into_KHW3: np.ndarray | None) -> np.ndarray:
    n_tiles = len(region.indices_K)
    return np.empty((n_tiles, plan.tile_px, plan.tile_px, 3), np.uint8) if into_KHW3 is None else into_KHW3[:n_tiles]


def _read_one_by_one(
    slide: Slide, plan: TilePlan, region: Region, into_KHW3: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    good: list[int] = []
    bad: list[int] = []
    tiles_KHW3 = _room_for(plan, region, into_KHW3)
    for index in region.indices_K.tolist():
        try:
            tiles_KHW3[len(good)] = read_tile(slide, plan, index)
            good.append(index)
        except SlideReadError:
            bad.append(index)
    return tiles_KHW3[: len(good)], np.array(good, np.int64), np.array(bad, np.int64)


def _read_level(slide: Slide, plan: TilePlan, x_px: int, y_px: int, width_px: int, height_px: int) -> np.ndarray:
    """Pixels of the plan's level, addressed in its own pixels; fewer by `shrink`."""
    if plan.shrink > 1:
        x, y, width, height = (length // plan.shrink for length in (x_px, y_px, width_px, height_px))
        return slide.read_shrunk_rgb(plan.level, x, y, width, height, plan.shrink)
    downsample = slide.level_downsamples[plan.level]
    return slide.read_region_rgb(plan.level, round(x_px * downsample), round(y_px * downsample), width_px, height_px)


def _finish(cut_HW3: np.ndarray, plan: TilePlan, into_HW3: np.ndarray) -> None:
    cut_px = plan.read_px // plan.shrink
    if cut_px == plan.tile_px:
        into_HW3[:] = cut_HW3
        return
    size = (plan.tile_px, plan.tile_px)
    if cut_px > plan.tile_px and plan.resample == "lanczos":
        into_HW3[:] = np.asarray(Image.fromarray(cut_HW3).resize(size, Image.Resampling.LANCZOS))
        return
    # contiguous first: OpenCV shrinks a copy ten times faster than a window of a larger picture
    cut_HW3 = np.ascontiguousarray(cut_HW3)
    smaller = cut_px > plan.tile_px
    cv2.resize(cut_HW3, size, dst=into_HW3, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
