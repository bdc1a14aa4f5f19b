"""Several feature folders of the same slides as one: columns of tiles at the same place, side by side.

    equal     tiles whose coordinates are equal: two encoders on one grid. Rows are in the order of the first folder.
    nearest   each tile of the finest folder with the tile of every other that covers its centre (of several the one
              whose centre is nearest): two magnifications. Rows are those of the finest folder.

Tiles that one of the folders lacks are left out, and counted. Nothing is written: rows are put together when they are
read, so that folders may be memory-mapped each.

Axes: N tiles of a folder, J tiles of the join, D features, 2 = (x, y), 3 = DeepZoom (level, column, row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from extract.config import Features
from extract.features.cache import Header, Provenance
from extract.features.errors import CacheError
from extract.features.folder import FeatureFolder, open_feature_folder

Join = Literal["equal", "nearest"]
SAME_SIDE = 0.02
"""Relative difference up to which two tile sides are one (computed from mpp)."""
MOST_COVERING = 16
"""Tiles looked at to find those that cover a place: more than a grid with three quarters of overlap has."""


class Grid(NamedTuple):
    """Where the tiles of one slide are in one folder.

    places_NK: level-0 px (K = 2), or DeepZoom addresses (K = 3). side: of a tile, level-0 px; 0 = unknown.
    """

    places_NK: np.ndarray
    side: float
    header: Header


@dataclass(frozen=True)
class JoinedFolder(FeatureFolder):
    """Feature folders `parts`, joined as `join` says; `folder` and `layout` are those of the first.

    Its methods are those of FeatureFolder. What they raise names the folder concerned.
    """

    parts: tuple[FeatureFolder, ...] = ()
    join: Join = "equal"
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict, compare=False, repr=False)
    headers: dict[str, list[Header]] = field(default_factory=dict, compare=False, repr=False)

    def header(self, slide: str) -> Header:
        """Of the join: its tiles, the sum of the widths, the encoders side by side."""
        rows, headers = self.rows_of(slide), self.headers_of(slide)
        fine = headers[self.finest(headers)]
        kinds = [header.provenance.same_kind() for header in headers]
        both: dict[str, Any] = {key: together([kind[key] for kind in kinds]) for key in ("encoder", "weights_sha256")}
        return replace(
            fine,
            n_tiles=len(rows[0]),
            dim=sum(header.dim for header in headers),
            dtype="float32" if any(header.dtype == "float32" for header in headers) else "float16",
            provenance=replace(fine.provenance, **both),
            has_checksum=all(header.has_checksum for header in headers),
            identity=self.identity(slide),
        )

    def finest(self, headers: Sequence[Header]) -> int:
        """The part whose tiles are those of the join: the first, or the one with the smallest tiles."""
        if self.join == "equal":
            return 0
        sides = [side_of(header.provenance) or np.inf for header in headers]
        return int(np.argmin(sides))

    def identity(self, slide: str) -> str:
        self.path(slide)
        return " | ".join(part.identity(slide) for part in self.parts)

    def path(self, slide: str) -> Path:
        """The first folder's file; CacheError where one of them has none."""
        first, *_ = [part.path(slide) for part in self.parts]
        return first

    def features(self, slide: str) -> np.ndarray:
        return self._side_by_side(slide, [part.features(slide) for part in self.parts])

    def mapped(self, slide: str) -> np.ndarray:
        """Rows of maps, put together: an array in memory, which whoever asks may give up again."""
        return self._side_by_side(slide, [part.mapped(slide) for part in self.parts])

    def _side_by_side(self, slide: str, parts: Sequence[np.ndarray]) -> np.ndarray:
        rows = self.rows_of(slide)
        dtype = np.float32 if any(part_ND.dtype == np.float32 for part_ND in parts) else np.float16
        joined_JD = np.empty((len(rows[0]), sum(part_ND.shape[1] for part_ND in parts)), dtype=dtype)
        start = 0
        for part_ND, rows_J in zip(parts, rows, strict=True):
            stop = start + part_ND.shape[1]
            joined_JD[:, start:stop] = part_ND[rows_J]
            start = stop
        return joined_JD

    def coords(
        self,
        slide: str,
        *,
        mpp: float | None = None,
        tile_level0_px: float | None = None,
        deepzoom_levels: int | None = None,
    ) -> np.ndarray | None:
        fine = self._finest_of(slide)
        known = {"mpp": mpp, "tile_level0_px": tile_level0_px}
        coords_N2 = self.parts[fine].coords(slide, **known, deepzoom_levels=deepzoom_levels)
        return None if coords_N2 is None else coords_N2[self.rows_of(slide)[fine]]

    def deepzoom(self, slide: str) -> np.ndarray | None:
        fine = self._finest_of(slide)
        address_N3 = self.parts[fine].deepzoom(slide)
        return None if address_N3 is None else address_N3[self.rows_of(slide)[fine]]

    def names(self, slide: str) -> tuple[str, ...] | None:
        return None

    def _finest_of(self, slide: str) -> int:
        return self.finest(self.headers_of(slide))

    def headers_of(self, slide: str) -> list[Header]:
        """Of every part, as it was when the tiles were joined."""
        self.rows_of(slide)
        return self.headers[slide]

    def rows_of(self, slide: str) -> list[np.ndarray]:
        """Of every part, which of its rows are the join's, in its order.

        Raises:
            CacheError: a folder has no such slide or does not say where its tiles are; no place in common.
        """
        if slide not in self.rows:
            self.path(slide)
            grids = [grid_of(part, slide) for part in self.parts]
            refuse_unplaced(self.parts, grids, slide)
            known = [grid for grid in grids if grid is not None]
            rows = equal_rows(known, slide) if self.join == "equal" else nearest_rows(known)
            if not len(rows[0]):
                raise CacheError(nothing_in_common(known, self.join))
            self.rows[slide], self.headers[slide] = rows, [grid.header for grid in known]
        return self.rows[slide]

    def left_out(self, slides: Sequence[str]) -> list[int]:
        """Of every part, how many tiles of these slides are no tiles of the join."""
        return [
            sum(self.headers_of(slide)[p].n_tiles - len(np.unique(self.rows_of(slide)[p])) for slide in slides)
            for p in range(len(self.parts))
        ]

    def notes(self, slides: Sequence[str]) -> list[str]:
        """What the join left out of these slides, in words."""
        joined = sum(len(self.rows_of(slide)[0]) for slide in slides)
        had = [sum(self.headers_of(slide)[p].n_tiles for slide in slides) for p in range(len(self.parts))]
        each = zip(self.parts, self.left_out(slides), had, strict=True)
        names = [f"{part.folder} ({n:,} of {all_of_them:,})" for part, n, all_of_them in each]
        how = "equal coordinates" if self.join == "equal" else "the coarse tile over each fine tile's centre"
        return [
            f"{len(self.parts)} feature folders joined by {how}: {joined:,} tiles; tiles without a counterpart are "
            f"left out: {', '.join(names)}"
        ]


# --- opening ---------------------------------------------------------------------------------------------------------


def open_features(
    features: Features, layout: str | None = None, *, folder: Path | None = None, verify: bool = True
) -> FeatureFolder:
    """What `features.folder` names: one folder, or several joined.

    Args:
        layout: instead of `features.layout`. folder: where `features.folder` is not set.

    Raises:
        LayoutError: one of them cannot be opened.
    """
    first = features.folder or folder
    assert first is not None
    folders, wanted = [first, *features.more], features.layout if layout is None else layout
    return join_folders([open_feature_folder(one, wanted, verify=verify) for one in folders], features.join)


def join_folders(parts: Sequence[FeatureFolder], join: Join) -> FeatureFolder:
    """One folder as it is, several joined; slides are those that any of them has."""
    first = parts[0]
    if len(parts) == 1:
        return first
    slides: dict[str, Path] = {}
    for part in reversed(parts):
        slides |= part.slides
    listed = dict(sorted(slides.items()))
    return JoinedFolder(first.folder, first.layout, listed, first.verify, tuple(parts), join)


def together(texts: Sequence[str]) -> str:
    """What several folders say, as one text; "" where none says anything."""
    return " + ".join(text or "unknown" for text in texts) if any(texts) else ""


def parts_of(features: FeatureFolder) -> tuple[FeatureFolder, ...]:
    """The folders that are joined; one folder alone is its own part."""
    return features.parts if isinstance(features, JoinedFolder) else (features,)


# --- which tile goes with which --------------------------------------------------------------------------------------


def side_of(provenance: Provenance) -> float:
    return float(provenance.tile_level0_px)


def grid_of(part: FeatureFolder, slide: str) -> Grid | None:
    """None where the folder cannot say where its tiles are."""
    header = part.header(slide)
    side = side_of(header.provenance)
    places_NK = part.coords(slide, tile_level0_px=side or None)
    if places_NK is None:
        places_NK = part.deepzoom(slide)
    if places_NK is None or part.names(slide) is not None:
        return None
    return Grid(places_NK.astype(np.int64), side, header)


def refuse_unplaced(parts: Sequence[FeatureFolder], grids: Sequence[Grid | None], slide: str) -> None:
    """CacheError where a folder says nothing of its tiles' places, or in another frame than the others."""
    without = [f"{part.folder} (layout {part.layout})" for part, grid in zip(parts, grids, strict=True) if grid is None]
    if without:
        raise CacheError(
            f"{', '.join(without)}: no coordinates of slide {slide!r} are known, so its tiles cannot be joined with "
            "others. Join folders whose files say where their tiles are, such as those of this toolkit, CLAM or TRIDENT"
        )
    frames = {grid.places_NK.shape[1] for grid in grids if grid is not None}
    if len(frames) > 1:
        listed = ", ".join(f"{part.folder} (layout {part.layout})" for part in parts)
        raise CacheError(f"{listed}: one has level-0 pixels, another DeepZoom addresses; they cannot be joined")


def equal_rows(grids: Sequence[Grid], slide: str) -> list[np.ndarray]:
    """Rows of the tiles whose places all folders have, in the order of the first.

    Raises:
        CacheError: tiles of another size at these places, or two tiles at one place.
    """
    first = grids[0]
    sides = [grid.side for grid in grids if grid.side]
    if sides and max(sides) > (1 + SAME_SIDE) * min(sides):
        raise CacheError(
            f"tiles of {' and '.join(f'{side:g}' for side in sides)} level-0 px a side, so equal "
            f"corners are not equal places; set features.join=nearest.{listed(grids)}"
        )
    kept_J, rows = np.arange(len(first.places_NK)), []
    own = [_places(grid, slide) for grid in grids]
    for place in own[1:]:
        found_J = np.array([place.get(key, -1) for key in own[0]], dtype=np.int64)
        rows.append(found_J)
        kept_J = kept_J[found_J[kept_J] >= 0]
    return [kept_J, *(found_J[kept_J] for found_J in rows)]


def _places(grid: Grid, slide: str) -> dict[tuple[int, ...], int]:
    """Place -> row."""
    found = {tuple(place): row for row, place in enumerate(grid.places_NK.tolist())}
    if len(found) < len(grid.places_NK):
        raise CacheError(f"{grid.header.path}: slide {slide!r} has two tiles at one place, so it cannot be joined")
    return found


def nearest_rows(grids: Sequence[Grid]) -> list[np.ndarray]:
    """Rows of the tiles of the finest folder that a tile of every other covers, and of these.

    Raises:
        CacheError: DeepZoom addresses, or a folder that does not say how large its tiles are.
    """
    unsized = [str(grid.header.path) for grid in grids if not grid.side or grid.places_NK.shape[1] != 2]
    if unsized:
        raise CacheError(
            f"{', '.join(unsized)}: does not say how large its tiles are in level-0 px, which features.join=nearest "
            "needs to know"
        )
    fine = min(range(len(grids)), key=lambda p: grids[p].side)
    centres_N2 = grids[fine].places_NK + grids[fine].side / 2
    rows = [np.arange(len(centres_N2)) if p == fine else covering(grid, centres_N2) for p, grid in enumerate(grids)]
    kept_N = np.all([rows_N >= 0 for rows_N in rows], axis=0)
    return [rows_N[kept_N] for rows_N in rows]


def covering(grid: Grid, points_N2: np.ndarray) -> np.ndarray:
    """For each point the row of the tile over it, left and upper edge included; of several the one whose centre is
    nearest, of these the first; -1 where there is none."""
    if not len(grid.places_NK):
        return np.full(len(points_N2), -1)
    n = min(MOST_COVERING, len(grid.places_NK))
    centres_N2 = grid.places_NK + grid.side / 2
    row_NC = cKDTree(centres_N2).query(points_N2, k=n, p=np.inf)[1].reshape(len(points_N2), n)
    offset_NC2 = points_N2[:, None] - grid.places_NK[row_NC]
    over_NC = ((offset_NC2 >= 0) & (offset_NC2 < grid.side)).all(axis=2)
    distance_NC = np.where(over_NC, ((points_N2[:, None] - centres_N2[row_NC]) ** 2).sum(axis=2), np.inf)
    best_N1 = np.lexsort((row_NC, distance_NC), axis=1)[:, :1]
    found_N: np.ndarray = np.where(np.take_along_axis(over_NC, best_N1, 1), np.take_along_axis(row_NC, best_N1, 1), -1)[
        :, 0
    ]
    return found_N


# --- in words --------------------------------------------------------------------------------------------------------


def nothing_in_common(grids: Sequence[Grid], join: Join) -> str:
    hint = "; of two magnifications, set features.join=nearest" if join == "equal" else ""
    return f"the folders have no tile in common (features.join={join}{hint}).{listed(grids)}"


def listed(grids: Sequence[Grid]) -> str:
    """The grids, one after the other: how large tiles are, how far apart, where they begin."""
    return "".join(f" {grid.header.path.parent}: {described(grid)};" for grid in grids).rstrip(";")


def described(grid: Grid) -> str:
    """Size of the tiles, how many, their step (the smallest), where the first lie, and how far off multiples of it."""
    made, places_NK = grid.header.provenance, grid.places_NK[:, -2:]
    size = f"tiles of {made.tile_px or '?'} px at mpp {made.mpp or '?'} ({grid.side or '?'} level-0 px)"
    if not len(places_NK):
        return f"{size}, none"
    origin = places_NK.min(axis=0).tolist()
    steps = [smallest_step(places_NK[:, axis]) for axis in (0, 1)]
    offset = [corner % (step or max(steps)) if any(steps) else 0 for corner, step in zip(origin, steps, strict=True)]
    return f"{size}, {len(places_NK)} tiles, step {tuple(steps)}, origin {tuple(origin)}, offset {tuple(offset)}"


def smallest_step(values_N: np.ndarray) -> int:
    steps = np.diff(np.unique(values_N))
    return int(steps.min()) if len(steps) else 0


def columns_of(parts: Sequence[Mapping[str, int]]) -> list[slice]:
    """The columns of every part, by the `dim` of each."""
    ends = np.cumsum([part["dim"] for part in parts]).tolist()
    return [slice(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
