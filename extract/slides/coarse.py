"""A coarse look at a slide that says which of its tiles are worth encoding: colour and texture at 4 microns per pixel.

A selector is a small network (one hidden layer) on cheap numbers of a tile, of its neighbourhood, and of how it stands
among the slide's tiles. `mil.predict fast=true` fits it on a study's own slides; here it is read and applied. No torch.

Axes: N tiles, H and W rows and columns, 3 RGB, F cheap numbers, 2 = (x, y).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from extract.config import Tiles
from extract.slides.errors import SlideError
from extract.slides.given import plan_given
from extract.slides.slide import Slide
from extract.slides.tiles import TilePlan, group_into_regions, read_tiles

COARSE_MPP = 4.0
LEAST_TILES = 8
"""So many are kept of every slide that has them."""
AT_ONCE = 1024
NEIGHBOURS = 9
"""The tile itself and those around it."""
ARRAYS = ("mean_F", "std_F", "hidden_FK", "hidden_bias_K", "out_K", "out_bias")


class SelectorError(SlideError):
    """The file of a selector cannot be used."""


@dataclass(frozen=True)
class Selector:
    """Scores tiles by their cheap numbers: higher is worth more. K hidden units with ReLU."""

    mean_F: np.ndarray
    std_F: np.ndarray
    hidden_FK: np.ndarray
    hidden_bias_K: np.ndarray
    out_K: np.ndarray
    out_bias: np.ndarray
    digest: str = field(default="", compare=False)

    def scores(self, cheap_NF: np.ndarray) -> np.ndarray:
        """scores_N, float64."""
        hidden_NK = np.maximum((cheap_NF - self.mean_F) / self.std_F @ self.hidden_FK + self.hidden_bias_K, 0)
        scores_N: np.ndarray = hidden_NK @ self.out_K + self.out_bias
        return scores_N

    def save(self, buffer: BinaryIO) -> None:
        """As `load_selector` reads it, into a file that is open."""
        np.savez(buffer, **{name: getattr(self, name) for name in ARRAYS})


def load_selector(path: Path) -> Selector:
    """SelectorError where the file is no selector."""
    try:
        content = path.read_bytes()
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: np.asarray(stored[name], np.float64) for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise SelectorError(f"{path}: not a selector of tiles ({error}); mil.predict fast=true makes one") from None
    return Selector(**arrays, digest=hashlib.sha256(content).hexdigest())


def chosen_by(tiles: Tiles) -> str:
    """What a feature file says of how its tiles were chosen; "" where all are taken."""
    if tiles.select is None:
        return ""
    return f"{load_selector(tiles.select).digest} keep {tiles.select_keep:g} random {tiles.select_random:g}"


def choose(scores_N: np.ndarray, keep: float, random: float, slide: str) -> np.ndarray:
    """Rows of the tiles to encode, sorted: a share `keep` of them, of which `random` is drawn among those not on top.

    Drawn by the slide's name: the same whatever else there is.
    """
    n = min(len(scores_N), max(LEAST_TILES, math.ceil(keep * len(scores_N) - 1e-9)))
    n_drawn = int(random * n)
    order_N = np.argsort(-scores_N, kind="stable")
    top, rest = order_N[: n - n_drawn], order_N[n - n_drawn :]
    drawn = np.random.default_rng(zlib.crc32(slide.encode())).choice(rest, size=n_drawn, replace=False)
    return np.sort(np.concatenate([top, drawn]))


def selected(slide: Slide, plan: TilePlan, tiles: Tiles, name: str) -> TilePlan:
    """The plan's tiles that `tiles.select` chooses."""
    if tiles.select is None or not len(plan):
        return plan
    scores_N = load_selector(tiles.select).scores(look(slide, plan.coords_N2, plan.tile_level0_px))
    kept = choose(scores_N, tiles.select_keep, tiles.select_random, name)
    arrays = {key: getattr(plan, key)[kept] for key in ("coords_N2", "level_coords_N2", "tissue_N")}
    return replace(plan, **arrays)


# --- what a tile looks like ------------------------------------------------------------------------------------------


def look(slide: Slide, coords_N2: np.ndarray, side_level0_px: float) -> np.ndarray:
    """cheap_NF of tiles at these level-0 corners."""
    own_NF = np.concatenate([cheap_numbers(tiles_NHW3) for tiles_NHW3 in _pixels(slide, coords_N2, side_level0_px)])
    spread_F = np.subtract(*np.percentile(own_NF, [75, 25], axis=0)) + 1e-3
    among_NF = np.clip((own_NF - np.median(own_NF, axis=0)) / spread_F, -10, 10)
    return np.concatenate([own_NF, around(own_NF, coords_N2, side_level0_px), among_NF], axis=1)


def cheap_numbers(tiles_NHW3: np.ndarray) -> np.ndarray:
    """Of each tile: optical density a channel (mean, SD, 10th and 90th percentile), edges at two scales, saturation."""
    density_NHW3 = -np.log((tiles_NHW3.astype(np.float32) + 1) / 256)
    flat_NP3 = density_NHW3.reshape(len(tiles_NHW3), -1, 3)
    colours = [flat_NP3.mean(1), flat_NP3.std(1), *np.percentile(flat_NP3, [10, 90], axis=1).astype(np.float32)]
    grey_NHW = density_NHW3.mean(axis=3)
    edges = [number for scale in (1, 2) for number in _edges(grey_NHW[:, ::scale, ::scale])]
    saturation_NP = flat_NP3.max(2) - flat_NP3.min(2)
    return np.concatenate([*colours, np.stack([*edges, saturation_NP.mean(1), saturation_NP.std(1)], 1)], axis=1)


def _edges(grey_NHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and SD of the steps between neighbours."""
    steps = [np.abs(np.diff(grey_NHW, axis=axis)).reshape(len(grey_NHW), -1) for axis in (1, 2)]
    steps_NP = np.concatenate(steps, axis=1)
    return steps_NP.mean(1), steps_NP.std(1)


def around(own_NF: np.ndarray, coords_N2: np.ndarray, side_level0_px: float) -> np.ndarray:
    """The mean of a tile and its neighbours of the grid."""
    from scipy.spatial import cKDTree

    k = min(NEIGHBOURS, len(coords_N2))
    reach = 1.6 * side_level0_px
    far_NK, row_NK = cKDTree(coords_N2).query(coords_N2, k=k, distance_upper_bound=reach)
    far_NK, row_NK = far_NK.reshape(len(coords_N2), k), row_NK.reshape(len(coords_N2), k)
    near_NK1 = np.isfinite(far_NK)[:, :, None]
    values_NKF = own_NF[np.minimum(row_NK, len(own_NF) - 1)]
    mean_NF: np.ndarray = (values_NKF * near_NK1).sum(1) / near_NK1.sum(1)
    return mean_NF


def _pixels(slide: Slide, coords_N2: np.ndarray, side_level0_px: float) -> Iterator[np.ndarray]:
    """tiles_NHW3 at 4 microns per pixel, in order and in parts; what cannot be read is white."""
    side_um = side_level0_px * slide.mpp
    side_px = max(4, round(side_um / COARSE_MPP))
    for first in range(0, len(coords_N2), AT_ONCE):
        part_N2 = coords_N2[first : first + AT_ONCE]
        plan = plan_given(
            slide.geometry, part_N2, side_level0_px, tile_px=side_px, mpp=side_um / side_px, section=Tiles()
        )
        tiles_NHW3 = np.full((len(part_N2), side_px, side_px, 3), 255, np.uint8)
        for region in group_into_regions(plan):
            found_KHW3, good, _ = read_tiles(slide, plan, region)
            tiles_NHW3[good] = found_KHW3
        yield tiles_NHW3
