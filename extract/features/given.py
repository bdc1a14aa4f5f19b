"""Coordinates of tiles that another tool chose, without their features: CLAM's, TRIDENT's and AtlasPatch's files.

    CLAM        patches/<id>.h5            coords (N, 2) level-0 px; on coords: patch_size, patch_level, downsample
    TRIDENT     patches/<id>_patches.h5    coords (N, 2) level-0 px; on coords: patch_size, patch_size_level0, overlap
    AtlasPatch  patches/<id>.h5            coords (N, 5) [x, y, width, height, level]; of the file: patch_size_level0

Files with features as well (ours, TRIDENT's) do too, where they say the tile's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from extract.config import ProblemsError, did_you_mean
from extract.features.errors import CacheError
from extract.features.files import plain_value
from extract.features.hdf5 import open_h5, own_dataset

TRIDENTS = "_patches"


@dataclass(frozen=True)
class GivenTiles:
    """Tiles of one slide as a file has them.

    coords_N2: int32, level-0 px, (x, y) of the corners, in the file's order. side_level0_px: of a tile; 0 = the
    file gives it only in px of `level`. side_px, level: as CLAM says it; -1 = no level.
    """

    path: Path
    coords_N2: np.ndarray
    side_level0_px: float
    side_px: int = 0
    level: int = -1


def coords_files(folder: Path, slides: Sequence[str]) -> dict[str, Path]:
    """The slides' files: SLIDE.h5 or SLIDE_patches.h5, in the folder or in its subfolder `patches`.

    Raises:
        ProblemsError: no such folder, slides without a file: all listed.
    """
    if not folder.is_dir():
        raise ProblemsError("no coordinates", [f"tiles.coords={folder}: no such folder"])
    found = {path.stem.removesuffix(TRIDENTS): path for path in sorted(folder.glob("*.h5"))}
    if not found:
        found = {path.stem.removesuffix(TRIDENTS): path for path in sorted(folder.glob("patches/*.h5"))}
    problems = [
        f"slide {slide!r}: no {slide}.h5 or {slide}{TRIDENTS}.h5 in {folder}{did_you_mean(slide, list(found))}"
        for slide in slides
        if slide not in found
    ]
    if problems:
        below = sorted({path.parent for slide in slides for path in folder.glob(f"*/{escape(slide)}*.h5")})
        advice = f"; there are some in {', '.join(map(str, below[:3]))}" if below else ""
        raise ProblemsError(f"coordinates are missing{advice}", problems)
    return {slide: found[slide] for slide in slides}


def read_given(path: Path) -> GivenTiles:
    """The tiles of one slide.

    Raises:
        CacheError: damaged, no coordinates, no side of the tile, coordinates that are no whole level-0 px >= 0.
    """
    with open_h5(path) as file:
        if "coords" not in file:
            raise CacheError(f"{path}: no dataset coords; expected a file of CLAM's or TRIDENT's patches")
        dataset = own_dataset(path, file, "coords")
        said = {key: plain_value(value) for key, value in (*file.attrs.items(), *dataset.attrs.items())}
        values_NK = np.asarray(dataset[:])
        if values_NK.ndim != 2 or values_NK.shape[1] not in (2, 5) or values_NK.dtype.kind not in "iuf":
            raise CacheError(f"{path}: expected coords (N, 2) in level-0 px, got {values_NK.dtype} {values_NK.shape}")
        coords_N2 = values_NK[:, :2]
        if not np.isfinite(coords_N2).all() or (coords_N2 < 0).any() or (coords_N2 != np.rint(coords_N2)).any():
            raise CacheError(f"{path}: coordinates are no whole level-0 px >= 0; STAMP's are in microns, for instance")
        if len(coords_N2) and coords_N2.max() >= 2**31:
            raise CacheError(f"{path}: coordinates up to {coords_N2.max()}, which no slide has")
        return GivenTiles(path, coords_N2.astype(np.int32), *_side(path, said))


def _side(path: Path, said: dict[str, Any]) -> tuple[float, int, int]:
    """Side in level-0 px, or 0 with the side in px of a level, and the level."""
    side = said.get("patch_size_level0") or said.get("tile_level0_px")
    if side:
        return float(side), 0, -1
    side_px, level = said.get("patch_size"), said.get("patch_level")
    if not side_px or level is None:
        names = ", ".join(sorted(said)) or "none"
        raise CacheError(
            f"{path}: does not say how large its tiles are: expected patch_size_level0, or patch_size and patch_level, "
            f"got {names}"
        )
    return 0.0, int(side_px), int(level)
