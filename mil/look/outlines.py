"""Lesion outlines of a pathologist and what they say of tiles. Outlines: ASAP XML (as in Camelyon16) or GeoJSON, in
level-0 px.

Axes: N tiles, L lesions, P pairs of a tile and a lesion that it touches, 2 = (x, y).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from extract.outlines.shapes import OutlineError, read_outline_file
from mil.look.geojson import tile_boxes

EXCLUSION_GROUPS = ("Exclusion", "_2")
"""Camelyon16's names for outlines of healthy tissue inside a lesion."""


CAMELYON16_GROUPS = {"tumor", "exclusion", "_0", "_1", "_2", "none"}
"""All groups of Camelyon16's outlines, the newer and the older names."""
CAMELYON16_ITC_UM, GROWN_UM = 275.0, 37.5
"""Camelyon16's evaluation takes a region whose major axis is below 275 microns, after 37.5 were added all around, for
isolated tumour cells: what is shorter than 200 microns."""


@dataclass(frozen=True)
class Outlines:
    """The outlines of one slide, valid polygons in level-0 px.

    lesions, exclusions: as drawn, one geometry an outline. skipped: what has no area, in words. camelyon16: whether
    this is ASAP XML with no other groups than Camelyon16's.
    """

    path: Path
    lesions: tuple[BaseGeometry, ...]
    exclusions: tuple[BaseGeometry, ...]
    skipped: tuple[str, ...] = ()
    camelyon16: bool = False

    @property
    def area(self) -> BaseGeometry:
        """Everything that is lesion: the outlines' union without what the exclusions cut out."""
        return shapely.union_all(self.lesions).difference(shapely.union_all(self.exclusions))


def read_outlines(path: Path, exclusion_groups: Sequence[str] = EXCLUSION_GROUPS) -> Outlines:
    """Read one slide's outlines.

    Args:
        exclusion_groups: names (ASAP's group, QuPath's classification) whose outlines are cut out of the lesions;
            capitals do not matter.

    Raises:
        OutlineError: not readable, neither ASAP XML nor GeoJSON, or an outline of fewer than three points.
    """
    shapes, skipped = read_outline_file(path)
    excluded = {name.casefold() for name in exclusion_groups}
    lesions = tuple(shape for name, shape in shapes if name.casefold() not in excluded)
    exclusions = tuple(shape for name, shape in shapes if name.casefold() in excluded)
    known = {name.casefold() for name, _ in shapes} <= CAMELYON16_GROUPS
    return Outlines(path, lesions, exclusions, tuple(skipped), known and path.suffix.lower() == ".xml")


def separate_lesions(outlines: Outlines, merge_px: float) -> list[BaseGeometry]:
    """The lesions, exclusions cut out; what lies within `merge_px` (level-0 px) of one another is one lesion.

    Camelyon16's evaluation merges what is less than 75 microns apart, and what lies in a hole of what it merged.
    """
    parts = [part for part in shapely.get_parts(outlines.area).tolist() if part.area > 0]
    if not parts:
        return []
    grown = shapely.get_parts(filled(shapely.union_all(shapely.buffer(parts, merge_px / 2)))).tolist()
    owner = [next(i for i, whole in enumerate(grown) if whole.intersects(part)) for part in parts]
    groups = [[part for part, i in zip(parts, owner, strict=True) if i == own] for own in range(len(grown))]
    return [shapely.union_all(group) for group in groups if group]


def filled(shape: BaseGeometry) -> BaseGeometry:
    """The polygons without their holes."""
    return shapely.union_all([shapely.Polygon(part.exterior) for part in shapely.get_parts(shape).tolist()])


def isolated_cells(lesions: Sequence[BaseGeometry], limit_um: float, mpp: float) -> np.ndarray:
    """Bool (L,): lesions so small that Camelyon16's evaluation calls them isolated tumour cells.

    Args:
        lesions: as `separate_lesions` gives them, level-0 px.
        limit_um: the major axis of the grown region, in microns, below which a lesion is one.
        mpp: microns per level-0 px.
    """
    grown = [filled(shapely.buffer(lesion, GROWN_UM / mpp)) for lesion in lesions]
    return np.array([major_axis(region) * mpp < limit_um for region in grown], dtype=bool)


def major_axis(region: BaseGeometry) -> float:
    """Longer axis of the ellipse that has the region's second moments, as image libraries define it, in its units.

    Exact for polygons: sums over the edges (Steger 1996, "On the calculation of arbitrary moments of polygons").
    """
    centre = np.array(region.centroid.coords[0])
    moments, area = np.zeros(3), 0.0  # xx, yy, xy
    for part in shapely.get_parts(region).tolist():
        for i, ring in enumerate((part.exterior, *part.interiors)):
            x, y = (np.array(ring.coords) - centre).T
            cross = x[:-1] * y[1:] - x[1:] * y[:-1]
            turn = np.sign(cross.sum()) * (-1 if i else 1)
            area += turn * cross.sum() / 2
            moments += turn * np.array(
                [
                    (cross * (x[:-1] ** 2 + x[:-1] * x[1:] + x[1:] ** 2)).sum() / 12,
                    (cross * (y[:-1] ** 2 + y[:-1] * y[1:] + y[1:] ** 2)).sum() / 12,
                    (cross * (2 * (x[:-1] * y[:-1] + x[1:] * y[1:]) + x[:-1] * y[1:] + x[1:] * y[:-1])).sum() / 24,
                ]
            )
    xx, yy, xy = moments / area
    return float(4 * np.sqrt((xx + yy) / 2 + np.hypot((xx - yy) / 2, xy)))


@dataclass(frozen=True)
class TileTruth:
    """How much of every tile is lesion.

    tile_P, lesion_P, share_P: tiles, the lesion that each touches, and the share of the tile that it covers.
    """

    n_tiles: int
    n_lesions: int
    tile_P: np.ndarray
    lesion_P: np.ndarray
    share_P: np.ndarray

    @property
    def covered_N(self) -> np.ndarray:
        """Share of the tile that is lesion, 0..1."""
        return np.bincount(self.tile_P, weights=self.share_P, minlength=self.n_tiles).clip(0, 1)

    def inside_N(self, least: float) -> np.ndarray:
        """Tiles covered to at least `least`, and of every lesion the tile that it covers most, however small it is."""
        inside_N = self.covered_N >= least
        for lesion in range(self.n_lesions):
            own = np.flatnonzero(self.lesion_P == lesion)
            if len(own):
                inside_N[self.tile_P[own[self.share_P[own].argmax()]]] = True
        return inside_N

    def best_score_L(self, scores_N: np.ndarray) -> np.ndarray:
        """The highest score of the tiles that touch each lesion, -inf where none does."""
        best_L = np.full(self.n_lesions, -np.inf)
        np.maximum.at(best_L, self.lesion_P, scores_N[self.tile_P])
        return best_L


def tile_truth(coords_N2: np.ndarray, side: float, lesions: Sequence[BaseGeometry]) -> TileTruth:
    """Exact areas of tiles and lesions in common."""
    boxes_N = tile_boxes(coords_N2, side)
    if not lesions:
        none = np.empty(0, dtype=np.int64)
        return TileTruth(len(boxes_N), 0, none, none, np.empty(0))
    lesion_P, tile_P = shapely.STRtree(boxes_N).query(np.array(lesions, dtype=object), predicate="intersects")
    pieces_P = shapely.intersection(boxes_N[tile_P], np.array(lesions, dtype=object)[lesion_P])
    share_P = shapely.area(pieces_P) / side**2
    kept = share_P > 0
    return TileTruth(len(boxes_N), len(lesions), tile_P[kept], lesion_P[kept], share_P[kept])


def refuse_outlines_off(
    outlines: Outlines, coords_N2: np.ndarray, side: float, width_height: tuple[int, int] | None
) -> None:
    """Raise OutlineError for outlines that cannot be of this slide.

    Args:
        width_height: of the slide in level-0 px; None = unknown, then at least one outline must touch a tile.
    """
    bounds = shapely.total_bounds([*outlines.lesions, *outlines.exclusions])
    if np.isnan(bounds).any():
        return
    left, top, right, bottom = (f"{value:.0f}" for value in bounds)
    where = f"{outlines.path}: outlines lie within x {left} to {right}, y {top} to {bottom}"
    if width_height is not None:
        slack = side  # hand-drawn lines run over the edge
        width, height = width_height
        if (bounds[:2] < -slack).any() or bounds[2] > width + slack or bounds[3] > height + slack:
            problem = f"{where}; the slide has {width} x {height} px. Expected level-0 px of this slide"
            raise OutlineError("outlines off the slide", [problem])
        return
    if not tile_truth(coords_N2, side, list(outlines.lesions)).tile_P.size:
        low, high = coords_N2.min(axis=0).tolist(), (coords_N2.max(axis=0) + side).tolist()
        tiles = f"x {low[0]} to {high[0]:.0f}, y {low[1]} to {high[1]:.0f}"
        problem = f"{where}; the tiles within {tiles}, and no tile is touched. Expected level-0 px of this slide"
        raise OutlineError("outlines off the slide", [problem])
