"""Areas of a slide as rings of level-0 px: outlines of a pathologist, the tissue that is found, regions left out; and
the grid of tiles that would be laid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from extract.outlines.shapes import SUFFIXES, read_outline_file
from extract.slides.regions import MASK_SUFFIXES, outlines_of, read_regions
from extract.slides.slide import Slide
from extract.slides.tiles import plan_tiles
from extract.slides.tissue import TissueMask, find_tissue
from mil.look.tilescores import Places
from mil.viewer.shown import Shown

MOST_POINTS = 200_000
"""Of one slide's rings; hand-drawn outlines have a few thousand."""


def rings_of(name: str, shape: BaseGeometry) -> list[dict[str, Any]]:
    """The polygons of a shape, each with its rings, the outer one first: whole px."""
    found = []
    for part in shapely.get_parts(shape).tolist():
        rings = [part.exterior, *part.interiors]
        found.append({"name": name, "rings": [np.rint(np.array(r.coords)[:, :2]).astype(int).tolist() for r in rings]})
    return found


def outlines(path: Path) -> list[dict[str, Any]]:
    """What somebody drew, made coarser where it has more points than a page can draw.

    Raises:
        OutlineError: it cannot be read.
    """
    shapes, _ = read_outline_file(path)
    step = 1.0
    while sum(len(shapely.get_coordinates(shape)) for _, shape in shapes) > MOST_POINTS:
        shapes = [(name, shape.simplify(step)) for name, shape in shapes]
        step *= 2
    return [ring for name, shape in shapes for ring in rings_of(name, shape)]


def regions_file(shown: Shown, slide: str) -> Path | None:
    """The slide's file in the folder that tissue.regions names; None where there is none."""
    if shown.regions is None:
        return None
    names = [shown.regions / f"{slide}{suffix}" for suffix in (*SUFFIXES, *MASK_SUFFIXES)]
    return next((path for path in names if path.is_file()), None)


def tissue_of(shown: Shown, name: str, slide: Slide) -> TissueMask:
    """The tissue as extraction would find it, within the slide's regions.

    Raises:
        SlideError, RegionsError: the slide or its regions cannot be read.
    """
    thumbnail = slide.thumbnail(max(shown.tissue.mpp, max(slide.width, slide.height) * slide.mpp / 8000))
    found = find_tissue(thumbnail.image_HW3, thumbnail.mpp, shown.tissue)
    path = regions_file(shown, name)
    if path is None:
        return found
    height, width = found.mask_HW.shape
    drawn = read_regions(path, slide.geometry, (height, width), thumbnail.mpp, shown.tissue)
    return drawn.alone(thumbnail.mpp) if shown.tissue.method == "regions" else drawn.limit(found)


def tissue_rings(tissue: TissueMask, slide_mpp: float) -> list[dict[str, Any]]:
    """The mask's pieces, the largest first."""
    return [ring for piece in outlines_of(tissue, slide_mpp) for ring in rings_of("tissue", piece)]


def planned(shown: Shown, slide: Slide, tissue: TissueMask) -> Places:
    """Where extraction would lay tiles.

    Raises:
        GeometryError: the slide is too coarse for them.
    """
    plan = plan_tiles(slide.geometry, tissue, tile_px=shown.tile_px, mpp=shown.tile_mpp, section=shown.tiles)
    return Places(plan.coords_N2, plan.tile_level0_px, slide.mpp)
