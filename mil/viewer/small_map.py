"""A small map of the tiles, for the list of slides where there is no slide file.

Axes: N tiles, H height, W width, 2 = (x, y), 3 = RGB.
"""

from __future__ import annotations

import numpy as np

from mil.look.drawing import EMPTY, raster, view_of_tiles
from mil.look.tilescores import Places

TISSUE = (176, 160, 190)


def small_map(places: Places, longest: int) -> np.ndarray:
    """Where the tiles are, (H, W, 3)."""
    view = view_of_tiles(places.coords_N2, places.tile_side, places.mpp, mpp=None, longest=longest)
    covered_HW = np.isfinite(raster(view, places.coords_N2, places.tile_side, np.ones(len(places.coords_N2))))
    return np.where(covered_HW[:, :, None], np.array(TISSUE, np.uint8), np.array(EMPTY, np.uint8))
