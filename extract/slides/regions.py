"""Regions that somebody drew on a slide: where tiles may lie, and where never.

One file a slide in `tissue.regions`, named after the slide: outlines (GeoJSON of QuPath or TRIDENT, ASAP XML; level-0
px), or a mask image of the whole slide at any scale, whose pixel values are classes and 0 is none.

Array axes: H height, W width of the tissue mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import shapely
from PIL import Image
from shapely.geometry.base import BaseGeometry

from extract.config import ProblemsError, Tissue, did_you_mean
from extract.outlines.shapes import SUFFIXES, OutlineError, read_outline_file
from extract.slides.images import MAX_IMAGE_PIXELS
from extract.slides.slide import Geometry
from extract.slides.tissue import TissueMask
from extract.wording import count

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
WHOLE_CLASS = ""
"""Class of an outline that has no name."""
MASK_MODES = ("1", "L", "P", "I;16", "I")
LOOKED_THROUGH = 50
"""Files that are read for the names of their classes before anything is extracted: those of a slide may be 100 MB."""
ASPECT_SLACK_PX = 2.0
"""A mask image and the slide have the same shape to this many pixels of the mask image: scales are rounded."""


class RegionsError(ProblemsError):
    """Drawn regions cannot be read, are missing, or cannot be of this slide."""


@dataclass(frozen=True)
class Regions:
    """What was drawn on one slide, as masks of the shape of its tissue mask.

    path: the file. include_HW: where tiles may lie; None = anywhere. exclude_HW: where they never lie.
    """

    path: Path
    include_HW: np.ndarray | None
    exclude_HW: np.ndarray

    def limit(self, tissue: TissueMask) -> TissueMask:
        """The tissue that is inside."""
        mask_HW = tissue.mask_HW & ~self.exclude_HW
        if self.include_HW is not None:
            mask_HW &= self.include_HW
        reason = tissue.empty_reason
        if not mask_HW.any():
            reason = reason or f"no tissue inside the regions of {self.path.name}"
        return replace(tissue, mask_HW=mask_HW, empty_reason=reason)

    def alone(self, mpp: float) -> TissueMask:
        """`tissue.method=regions`: all that is inside counts as tissue, whatever it looks like."""
        inside_HW = np.ones_like(self.exclude_HW) if self.include_HW is None else self.include_HW
        mask_HW = inside_HW & ~self.exclude_HW
        reason = "" if mask_HW.any() else f"the regions of {self.path.name} are empty"
        return TissueMask(mask_HW, mpp, reason, 0.0, np.zeros_like(mask_HW), "regions drawn, not saturation,")


# --- which file ------------------------------------------------------------------------------------------------------


def regions_files(folder: Path, slides: Sequence[str], *, needed: bool) -> dict[str, Path]:
    """The slides' region files; a slide may have none unless `needed`.

    Raises:
        RegionsError: no such folder, slides without a file, slides with several, no file of any slide: all listed.
    """
    if not folder.is_dir():
        raise RegionsError("no regions", [f"tissue.regions={folder}: no such folder"])
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (*SUFFIXES, *MASK_SUFFIXES) and not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    files = {slide: found[slide] for slide in slides if slide in found}
    problems = [
        f"slide {slide!r}: {len(paths)} files of regions: {', '.join(path.name for path in paths)}; keep one"
        for slide, paths in files.items()
        if len(paths) > 1
    ]
    if needed or not files:
        problems += [
            f"slide {slide!r}: no file of regions in {folder}{did_you_mean(slide, list(found))}"
            for slide in slides
            if slide not in files
        ]
    if problems:
        takes_all = "; tissue.without_regions=whole takes all tissue of slides without a file"
        advice = takes_all if needed and len(files) < len(slides) else ""
        raise RegionsError(f"regions cannot be used{advice}", problems)
    return {slide: paths[0] for slide, paths in files.items()}


def unmatched_classes(files: Iterable[Path], section: Tissue) -> list[str]:
    """What is said of classes in `tissue.include` and `tissue.exclude` that no file has: likely another spelling.

    A class that is meant to be excluded and is misspelt would be where tiles lie. The classes that are excluded where
    nothing is set need not be drawn. Files are read until every class was found, at most LOOKED_THROUGH; what cannot be
    read is told elsewhere.
    """
    usual = Tissue.model_fields["exclude"].get_default()
    waiting = {("include", name) for name in section.include}
    waiting |= {("exclude", name) for name in section.exclude if name not in usual}
    seen: set[str] = set()
    looked = list(files)[:LOOKED_THROUGH]
    for path in looked:
        if not waiting:
            return []
        seen |= _classes_in(path)
        waiting = {(key, name) for key, name in waiting if not any(matches(one, [name]) for one in seen)}
    classes = sorted(seen - {WHOLE_CLASS})
    return [
        f"tissue.{key}={name} is the class of no region in {count(len(looked), 'file')}{did_you_mean(name, classes)} "
        f"(there are {', '.join(map(repr, classes[:10])) or 'none with a name'})"
        for key, name in sorted(waiting)
    ]


def _classes_in(path: Path) -> set[str]:
    """Names of the classes that are drawn in a file; none where it cannot be read."""
    try:
        if path.suffix.lower() not in MASK_SUFFIXES:
            return {name for name, _ in read_outline_file(path)[0]}
        with Image.open(path) as image:
            if image.mode not in MASK_MODES or image.width * image.height > MAX_IMAGE_PIXELS:
                return set()
            return {str(value) for value in np.unique(np.asarray(image).astype(np.int64)).tolist() if value != 0}
    except (OutlineError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return set()


def digest_of(path: Path | None, section: Tissue) -> str:
    """sha256 of a region file and the classes chosen of it: what features were limited by; "" for none."""
    if path is None:
        return ""
    return hashlib.sha256(path.read_bytes() + repr((section.include, section.exclude)).encode()).hexdigest()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_regions(path: Path, geometry: Geometry, shape_HW: tuple[int, int], mpp: float, section: Tissue) -> Regions:
    """A slide's regions in the frame of its tissue mask.

    Classes are matched without capitals; `*` stands for any ending. What matches `tissue.exclude` is left out. Of the
    rest what matches `tissue.include` is where tiles may lie, all of it where `tissue.include` is empty. A file that
    only excludes leaves the rest of the slide free. With `tissue.method=regions` a GeoJSON in which nothing is drawn
    (as `tissue.save` writes one of a slide without tissue) is a slide without tissue.

    Args:
        geometry: of the slide.
        shape_HW, mpp: of the tissue mask; pixel (x, y) covers level-0 px from x * mpp / geometry.mpp on.
        section: the config section.

    Raises:
        RegionsError: not readable, no class matches `tissue.include`, or off the slide.
    """
    try:
        if path.suffix.lower() in MASK_SUFFIXES:
            named = _of_mask_image(path, geometry, shape_HW, mpp)
        else:
            named = _of_outlines(path, geometry, shape_HW, mpp, section.method)
    except OutlineError as error:
        raise RegionsError(error.title, error.problems) from None
    exclude_HW, include_HW = np.zeros(shape_HW, bool), np.zeros(shape_HW, bool)
    if not named:
        return Regions(path, include_HW, exclude_HW)
    included = False
    for name, mask_HW in named.items():
        if matches(name, section.exclude):
            exclude_HW |= mask_HW
        elif not section.include or matches(name, section.include):
            include_HW |= mask_HW
            included = True
    if section.include and not included:
        classes = ", ".join(repr(name) for name in named) or "none"
        problem = f"{path}: no region of tissue.include={list(section.include)}; its classes are {classes}"
        raise RegionsError("regions cannot be used", [problem])
    return Regions(path, include_HW if included else None, exclude_HW)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a class is named by one of the patterns."""
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)


def _of_outlines(
    path: Path, geometry: Geometry, shape_HW: tuple[int, int], mpp: float, method: str
) -> dict[str, np.ndarray]:
    shapes, skipped = read_outline_file(path)
    if not shapes and not skipped and method == "regions":
        return {}
    if not shapes:
        problem = f"{path}: no outline with an area{'; ' + '; '.join(skipped[:3]) if skipped else ''}"
        raise RegionsError("regions cannot be used", [problem])
    _refuse_off_the_slide(path, [shape for _, shape in shapes], geometry)
    masks: dict[str, np.ndarray] = {}
    for name, shape in shapes:
        mask_HW = masks.setdefault(name, np.zeros(shape_HW, bool))
        mask_HW |= rasterised(shape, geometry.mpp / mpp, shape_HW)
    return masks


def _refuse_off_the_slide(path: Path, shapes: Sequence[BaseGeometry], geometry: Geometry) -> None:
    left, top, right, bottom = shapely.total_bounds(list(shapes))
    slack = 0.02 * max(geometry.width, geometry.height)  # hand-drawn lines run over the edge
    if left < -slack or top < -slack or right > geometry.width + slack or bottom > geometry.height + slack:
        problem = (
            f"{path}: outlines lie within x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}; the slide has "
            f"{geometry.width} x {geometry.height} px. Expected level-0 px of this slide"
        )
        raise RegionsError("regions off the slide", [problem])


def rasterised(shape: BaseGeometry, scale: float, shape_HW: tuple[int, int]) -> np.ndarray:
    """Bool (H, W): the pixels whose centre is inside, holes left out, exactly.

    A row's pixel is inside where the outline was crossed an odd number of times to its left. (OpenCV also fills what
    the outline touches, so regions would grow by half a pixel.)

    Args:
        shape: a valid polygon, or several. scale: mask px per level-0 px.
    """
    height, width = shape_HW
    crossed_HW = np.zeros((height, width + 1), np.uint8)
    for part in shapely.get_parts(shape).tolist():
        for ring in (part.exterior, *part.interiors):
            corners_P2 = np.array(ring.coords)[:, :2] * scale - 0.5  # the frame of pixel centres
            rows_X, x_X = _crossings(corners_P2[:-1], corners_P2[1:], height)
            columns_X = np.clip(np.ceil(x_X), 0, width).astype(np.int64)
            np.add.at(crossed_HW, (rows_X, columns_X), 1)  # only odd or even counts: uint8 may wrap
    inside_HW: np.ndarray = np.cumsum(crossed_HW[:, :width], axis=1, dtype=np.uint8) % 2 == 1
    return inside_HW


def _crossings(from_E2: np.ndarray, to_E2: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Where E edges cross the rows below `height`: row and x of every crossing. An edge has its upper end only."""
    upper_E2 = np.where(from_E2[:, 1:] < to_E2[:, 1:], from_E2, to_E2)
    lower_E2 = np.where(from_E2[:, 1:] < to_E2[:, 1:], to_E2, from_E2)
    first_E = np.clip(np.ceil(upper_E2[:, 1]), 0, height).astype(np.int64)
    end_E = np.clip(np.ceil(lower_E2[:, 1]), 0, height).astype(np.int64)
    n_E = np.maximum(end_E - first_E, 0)
    edge_X = np.repeat(np.arange(len(n_E)), n_E)
    rows_X = np.arange(n_E.sum()) - np.repeat(np.cumsum(n_E) - n_E, n_E) + first_E[edge_X]
    (x_X, y_X), (x_to_X, y_to_X) = upper_E2[edge_X].T, lower_E2[edge_X].T
    return rows_X, x_X + (rows_X - y_X) * (x_to_X - x_X) / (y_to_X - y_X)


def _of_mask_image(path: Path, geometry: Geometry, shape_HW: tuple[int, int], mpp: float) -> dict[str, np.ndarray]:
    try:
        with Image.open(path) as image:
            _refuse_other_image(path, image, geometry)
            values_HW = np.asarray(image).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        said = (str(error).splitlines() or [""])[0][:120]
        raise RegionsError("regions cannot be used", [f"{path}: not a mask image that can be read: {said}"]) from None
    height, width = values_HW.shape
    x_level0 = (np.arange(shape_HW[1]) + 0.5) * mpp / geometry.mpp
    y_level0 = (np.arange(shape_HW[0]) + 0.5) * mpp / geometry.mpp
    columns_W = np.minimum((x_level0 * width / geometry.width).astype(int), width - 1)
    rows_H = np.minimum((y_level0 * height / geometry.height).astype(int), height - 1)
    seen_HW = values_HW[np.ix_(rows_H, columns_W)]
    return {str(value): seen_HW == value for value in np.unique(values_HW).tolist() if value != 0}


def _refuse_other_image(path: Path, image: Image.Image, geometry: Geometry) -> None:
    """ValueError for what is no mask, or none of this slide, before anything is decoded."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} px, expected at most {MAX_IMAGE_PIXELS:,}")
    if image.mode not in MASK_MODES:
        raise ValueError(f"expected one channel whose values are classes, got mode {image.mode}")
    if abs(width - height * geometry.width / geometry.height) > ASPECT_SLACK_PX * max(1.0, width / height):
        raise ValueError(
            f"{width} x {height} px is not the shape of the slide, {geometry.width} x {geometry.height} px; expected a "
            "mask of the whole slide"
        )


# --- our own mask, for others to edit --------------------------------------------------------------------------------


def outlines_of(tissue: TissueMask, slide_mpp: float) -> list[shapely.Polygon]:
    """The mask's pieces as polygons with holes in level-0 px, the largest first; corners are those of mask pixels."""
    boxes = []
    for y, row_W in enumerate(tissue.mask_HW):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row_W.astype(np.int8), [0]])))
        boxes += [shapely.box(x0, y, x1, y + 1) for x0, x1 in edges.reshape(-1, 2).tolist()]
    if not boxes:
        return []
    scale = tissue.mpp / slide_mpp
    whole = shapely.transform(shapely.union_all(boxes).simplify(0.5), lambda xy_P2: xy_P2 * scale)
    return sorted(shapely.get_parts(whole).tolist(), key=lambda part: -part.area)
