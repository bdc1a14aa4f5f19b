"""The one door to slide files: OpenSlide for slides, Pillow for plain images.

Frames used here and in `extract.tiles`:
    level-0 px    pixels of the finest level; what coordinates are stored in
    level px      pixels of one pyramid level; level px = level-0 px / downsample of that level
Array axes: H height, W width, 3 = RGB, uint8. Positions and sizes are written (x, y) and (width, height).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
from openslide import lowlevel
from PIL import Image

from extract.config import ProblemsError

SLIDE_SUFFIXES = frozenset(
    (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi")
)
"""What OpenSlide 4 opens."""
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg"))
TIFF_SUFFIXES = frozenset((".tif", ".tiff"))

MPP_RANGE = (0.005, 1000.0)
"""Microns per pixel that a slide format's own field may state. Overview images of real slides reach 30."""
TIFF_MPP_RANGE = (0.02, 10.0)
"""The same for TIFF resolution tags, which many programs fill with a printer's 72 or 300 dpi (353 or 85 microns)."""
SQUARE_PIXEL_TOLERANCE = 0.01

MAX_IMAGE_PIXELS = 500_000_000
"""Largest plain image that is decoded: it is held in memory whole, 1.5 GB of RGB at this limit."""
IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")

MAX_THUMBNAIL_PX = 30_000  # OpenCV's warpAffine goes to 32,767
THUMBNAIL_BLOCK_PX = 2048
SMALLEST_BLOCK_PX = 128
"""An unreadable block of a thumbnail is split in four down to this side (level px); only the smallest stay white."""


class SlideError(Exception):
    """A slide cannot be used. The message names the file."""


class SlideOpenError(SlideError):
    """The file is missing, of no known format, or damaged in its header."""


class SlideReadError(SlideError):
    """A region's pixels cannot be decoded. The slide stays usable: its handle has been reopened."""


class MppError(SlideError):
    """Microns per pixel are not stated, or cannot be right."""


class SlideFolderError(ProblemsError):
    """A folder holds no slides, or two files for one slide id."""


@dataclass(frozen=True)
class Geometry:
    """A slide's sizes, without its pixels.

    Attributes:
        name: for messages.
        mpp: microns per level-0 pixel.
        level_sizes: (width, height) of every level in its own pixels; level 0 is the finest.
        level_downsamples: level-0 pixels per level pixel, exact ratios, one a level. Where the ratios of the widths
            and of the heights differ by rounding this is their mean, as in OpenSlide, so that a stored coordinate
            means the same to `openslide.read_region`.
        level_block_px: (width, height) of the compressed tiles of every level, (0, 0) where unknown.
    """

    name: str
    mpp: float
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    level_block_px: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """Level-0 px."""
        return self.level_sizes[0][0]

    @property
    def height(self) -> int:
        """Level-0 px."""
        return self.level_sizes[0][1]

    @property
    def level_mpps(self) -> tuple[float, ...]:
        return tuple(self.mpp * downsample for downsample in self.level_downsamples)


@dataclass(frozen=True)
class Thumbnail:
    """A whole slide, small. Pixel (x, y) covers level-0 px `[x * s, (x + 1) * s)` with `s = mpp / slide.mpp`, exactly;
    the last column and row may reach past the slide and are white there.

    `unreadable` is the fraction of the slide's area that could not be decoded; it is white in `image_HW3`.
    """

    image_HW3: np.ndarray
    mpp: float
    unreadable: float


# --- one open slide ------------------------------------------------------------------------------------------------


class Slide:
    """An open slide. Made by `open_slide`; can be pickled and forked (each process opens the file for itself).

    Attributes:
        path: the file.
        mpp: microns per level-0 pixel, true, not rounded to a magnification.
        mpp_source: "csv", "file" or "slides.mpp".
        geometry: sizes of all levels.
        properties: what the file says about itself (OpenSlide's names).
    """

    def __init__(self, path: Path, reader: _OpenSlideReader | _ImageReader, mpp: float, mpp_source: str):
        self.path = path
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.properties = reader.properties
        self.geometry = Geometry(
            path.name, mpp, reader.level_sizes, reader.level_downsamples, reader.level_block_px
        )
        self._reader: _OpenSlideReader | _ImageReader | None = reader
        self._reader_class = type(reader)
        self._process = os.getpid()

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r}, {self.width} x {self.height} px, mpp={self.mpp:g})"

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    @property
    def width(self) -> int:
        """Level-0 px."""
        return self.geometry.width

    @property
    def height(self) -> int:
        """Level-0 px."""
        return self.geometry.height

    @property
    def level_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every level in its own pixels."""
        return self.geometry.level_sizes

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 pixels per level pixel; see `Geometry`."""
        return self.geometry.level_downsamples

    @property
    def fingerprint(self) -> str:
        """Identifies the slide's content whatever its name, from samples of its bytes. See `fingerprint_of`."""
        return fingerprint_of(self.path, self.properties.get("openslide.quickhash-1", ""))

    def close(self) -> None:
        """Release the file and its memory. Reading again reopens it."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def read_region_rgb(self, level: int, x_level0: int, y_level0: int, width_px: int, height_px: int) -> np.ndarray:
        """Pixels of one level.

        Args:
            level: pyramid level, 0 = finest.
            x_level0, y_level0: top-left corner in level-0 px; may lie outside the slide.
            width_px, height_px: size in px of `level`.

        Returns:
            uint8 (height_px, width_px, 3), RGB; white where the slide is transparent and outside of it.

        Raises:
            SlideReadError: the region cannot be decoded. The handle, which OpenSlide makes useless after an error,
                has been dropped and the next read opens a new one.
            SlideOpenError: the file has gone or changed since it was opened.
        """
        if not 0 <= level < len(self.level_sizes) or width_px < 1 or height_px < 1:
            raise ValueError(
                f"{self.path}: expected a level of 0..{len(self.level_sizes) - 1} and a size of at least 1 x 1 px, "
                f"got level {level} and {width_px} x {height_px}"
            )
        try:
            return self._open_reader().read(level, int(x_level0), int(y_level0), int(width_px), int(height_px))
        except openslide.OpenSlideError as error:
            self.close()
            raise SlideReadError(
                f"{self.path}: level {level}, {width_px} x {height_px} px at level-0 ({x_level0}, {y_level0}) "
                f"cannot be read: {error}"
            ) from None

    def thumbnail(self, mpp: float) -> Thumbnail:
        """The whole slide at `mpp` microns per pixel, or at the slide's own mpp if that is coarser.

        Reads the coarsest level that is fine enough, in blocks, so that memory does not grow with the slide, and
        averages areas. Transparent pixels are white.

        Raises:
            SlideReadError: nothing of the slide can be read. (Unreadable parts are left white and counted.)
            ValueError: `mpp` is so fine that the thumbnail would be larger than `MAX_THUMBNAIL_PX`.
        """
        mpp = max(mpp, self.mpp)
        finest_mpp = max(self.width, self.height) * self.mpp / MAX_THUMBNAIL_PX
        if mpp < finest_mpp * (1 - 1e-9):
            raise ValueError(
                f"{self.path}: {mpp:g} microns per pixel would make a thumbnail of more than {MAX_THUMBNAIL_PX:,} px "
                f"a side; expected at least {finest_mpp:.3g} (tissue.mpp)"
            )
        level = max(i for i, level_mpp in enumerate(self.geometry.level_mpps) if level_mpp <= mpp * (1 + 1e-9))
        shrink = mpp / self.geometry.level_mpps[level]  # level px per thumbnail px, >= 1
        whole = max(1, math.floor(shrink + 1e-9))
        level_width, level_height = self.level_sizes[level]
        # Two steps: exact averages of `whole` x `whole` px, then less than a factor 2 by interpolation.
        averaged_HW3 = np.full((-(-level_height // whole), -(-level_width // whole), 3), 255, np.uint8)
        unreadable_px = 0
        block_px = max(1, THUMBNAIL_BLOCK_PX // whole) * whole
        for y in range(0, level_height, block_px):
            for x in range(0, level_width, block_px):
                width, height = min(block_px, level_width - x), min(block_px, level_height - y)
                unreadable_px += self._average_block(averaged_HW3, level, whole, x, y, width, height)
        if unreadable_px == level_width * level_height:
            raise SlideReadError(f"{self.path}: no part of level {level} can be read; the file is damaged")
        covered = [side * self.mpp / mpp for side in (self.width, self.height)]
        image_HW3 = _shrink_below_two(averaged_HW3, shrink / whole, *covered)
        return Thumbnail(image_HW3, mpp, unreadable_px / (level_width * level_height))

    def _average_block(
        self, into_HW3: np.ndarray, level: int, whole: int, x: int, y: int, width: int, height: int
    ) -> int:
        """Average a block of level px, whose corner is a multiple of `whole`, into its place. Unreadable level px."""
        columns, rows = -(-width // whole), -(-height // whole)
        downsample = self.level_downsamples[level]
        try:
            block_HW3 = self.read_region_rgb(
                level, round(x * downsample), round(y * downsample), columns * whole, rows * whole
            )
        except SlideReadError:
            half = max(1, max(columns, rows) // 2)
            if max(width, height) <= SMALLEST_BLOCK_PX or max(columns, rows) == 1:
                return width * height
            step = half * whole
            return sum(
                self._average_block(into_HW3, level, whole, x + i, y + j, min(step, width - i), min(step, height - j))
                for j in range(0, height, step)
                for i in range(0, width, step)
            )
        if whole > 1:
            block_HW3 = cv2.resize(block_HW3, (columns, rows), interpolation=cv2.INTER_AREA)
        into_HW3[y // whole : y // whole + rows, x // whole : x // whole + columns] = block_HW3
        return 0

    def _open_reader(self) -> _OpenSlideReader | _ImageReader:
        if self._reader is None or self._process != os.getpid():  # a handle must not cross a fork: it shares offsets
            self._reader = self._reader_class(self.path)
            self._process = os.getpid()
            if self._reader.level_sizes != self.level_sizes:
                raise SlideOpenError(
                    f"{self.path}: the file changed: levels were {self.level_sizes}, now {self._reader.level_sizes}"
                )
        return self._reader


def open_slide(path: Path | str, mpp: float | None = None, *, default_mpp: float | None = None) -> Slide:
    """Open a slide or a plain image.

    Args:
        path: anything OpenSlide reads (for MRXS and VMS the main file, for DICOM any file of the series), or a
            PNG, JPEG or untiled TIFF.
        mpp: microns per level-0 pixel from the cohort CSV; overrides what the file says.
        default_mpp: `slides.mpp` of the config; used only if neither `mpp` nor the file says.

    Raises:
        SlideOpenError: no such file, unknown format, damaged.
        MppError: nobody states the microns per pixel, or the pixels are not square.
    """
    path = Path(path)
    reader = _open_reader(path)
    try:
        found, source = _choose_mpp(path, mpp, reader.properties, default_mpp)
    except MppError:
        reader.close()
        raise
    return Slide(path, reader, found, source)


def _open_reader(path: Path) -> _OpenSlideReader | _ImageReader:
    if not path.exists():
        raise SlideOpenError(f"{path}: no such file")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _ImageReader(path)
    try:
        return _OpenSlideReader(path)
    except SlideOpenError as refused:
        if path.suffix.lower() not in TIFF_SUFFIXES:
            raise
        try:
            return _ImageReader(path)
        except SlideOpenError as unreadable:
            raise SlideOpenError(f"{refused}; as a plain image: {str(unreadable).removeprefix(f'{path}: ')}") from None


# --- readers -------------------------------------------------------------------------------------------------------


class _OpenSlideReader:
    """Pixels through OpenSlide. Raises `openslide.OpenSlideError` from `read`; the object is useless afterwards."""

    def __init__(self, path: Path):
        try:
            self.handle = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideOpenError(f"{path}: not a slide format that OpenSlide knows, or a truncated file") from None
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideOpenError(f"{path}: cannot be opened: {error}") from None
        self.properties = dict(self.handle.properties)
        self.level_sizes = tuple(self.handle.level_dimensions)
        self.level_downsamples = tuple(self.handle.level_downsamples)
        self.level_block_px = tuple(
            (
                int(self.properties.get(f"openslide.level[{level}].tile-width", 0)),
                int(self.properties.get(f"openslide.level[{level}].tile-height", 0)),
            )
            for level in range(self.handle.level_count)
        )
        self._scratch = np.empty(0, np.uint32)

    def close(self) -> None:
        self.handle.close()

    def read(self, level: int, x_level0: int, y_level0: int, width_px: int, height_px: int) -> np.ndarray:
        argb_HW = self._read_argb(level, x_level0, y_level0, width_px, height_px)
        bgra_HW4 = argb_HW.view(np.uint8).reshape(height_px, width_px, 4)
        rgb_HW3 = cv2.cvtColor(bgra_HW4, cv2.COLOR_BGRA2RGB)
        if int(np.bitwise_and.reduce(argb_HW, axis=None)) >> 24 != 255:
            rgb_HW3 += 255 - bgra_HW4[:, :, 3:]  # colours are premultiplied: over white means adding what is missing
        return rgb_HW3

    def _read_argb(self, level: int, x_level0: int, y_level0: int, width_px: int, height_px: int) -> np.ndarray:
        """Premultiplied ARGB, uint32 (height_px, width_px). Valid until the next read.

        openslide-python's own read_region makes three copies more (un-premultiply, PIL, NumPy): a fifth of the time.
        """
        n_px = width_px * height_px
        if self._scratch.size < n_px:
            self._scratch = np.empty(n_px, np.uint32)
        argb_HW = self._scratch[:n_px].reshape(height_px, width_px)
        pointer = argb_HW.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
        lowlevel._read_region(self.handle._osr, pointer, x_level0, y_level0, level, width_px, height_px)
        return argb_HW


class _ImageReader:
    """Pixels of a plain image, decoded once and held in memory."""

    level_downsamples = (1.0,)
    level_block_px = ((0, 0),)

    def __init__(self, path: Path):
        self.path = path
        self._image_HW3: np.ndarray | None = None
        with _plain_image(path) as image:
            self.level_sizes = (image.size,)
            self.properties = _resolution_properties(image)

    def close(self) -> None:
        self._image_HW3 = None

    def read(self, level: int, x_level0: int, y_level0: int, width_px: int, height_px: int) -> np.ndarray:
        if self._image_HW3 is None:
            with _plain_image(self.path) as image:
                self._image_HW3 = _over_white(image)
        (width, height), *_ = self.level_sizes
        region_HW3 = np.full((height_px, width_px, 3), 255, np.uint8)
        x_from, x_to = max(x_level0, 0), min(x_level0 + width_px, width)
        y_from, y_to = max(y_level0, 0), min(y_level0 + height_px, height)
        if x_from < x_to and y_from < y_to:
            inside = self._image_HW3[y_from:y_to, x_from:x_to]
            region_HW3[y_from - y_level0 : y_to - y_level0, x_from - x_level0 : x_to - x_level0] = inside
        return region_HW3


@contextmanager
def _plain_image(path: Path) -> Iterator[Image.Image]:
    """An image opened by Pillow, its size checked before anything is decoded.

    Pillow's own limit (a warning at 89 megapixels, an error at 179) is made for pictures from strangers; it is
    replaced by ours while this image is in use.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise SlideOpenError(
                    f"{path}: {width} x {height} px is more than the {MAX_IMAGE_PIXELS:,} px that a plain image may "
                    "have, because it is held in memory whole. Convert it to a tiled pyramid, for instance with "
                    "`vips tiffsave in.png out.tiff --tile --pyramid --compression jpeg`"
                )
            if image.mode not in IMAGE_MODES:
                raise SlideOpenError(f"{path}: expected 8 bits a channel, got Pillow mode {image.mode!r}")
            yield image
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        raise SlideOpenError(f"{path}: not an image that Pillow can read: {error}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _over_white(image: Image.Image) -> np.ndarray:
    """uint8 RGB (H, W, 3); transparent pixels become white."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return np.asarray(white.convert("RGB"))


def _resolution_properties(image: Image.Image) -> dict[str, str]:
    """A plain TIFF's resolution tags under OpenSlide's names. PNG and JPEG only know print resolutions: not used."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 0), "")
    found = {"tiff.XResolution": tags.get(282), "tiff.YResolution": tags.get(283), "tiff.ResolutionUnit": unit}
    return {name: str(value if isinstance(value, str) else float(value)) for name, value in found.items() if value}


# --- microns per pixel ---------------------------------------------------------------------------------------------


def _choose_mpp(
    path: Path, mpp: float | None, properties: Mapping[str, str], default_mpp: float | None
) -> tuple[float, str]:
    if mpp is not None and not math.isnan(mpp):  # an empty cell of the CSV is NaN
        if not (math.isfinite(mpp) and mpp > 0):
            raise MppError(f"{path}: expected a positive number of microns per pixel in the CSV, got {mpp}")
        return float(mpp), "csv"
    stated, remark = _mpp_of_file(properties)
    if stated:
        x, y = stated
        if abs(x - y) > SQUARE_PIXEL_TOLERANCE * min(x, y):
            raise MppError(
                f"{path}: pixels are not square ({x:g} microns wide, {y:g} high). Resample the slide, or give one "
                "number in the mpp column of the cohort CSV to treat them as square"
            )
        return (x + y) / 2, "file"
    if default_mpp is not None:
        return float(default_mpp), "slides.mpp"
    raise MppError(
        f"{path}: microns per pixel unknown{remark}. Three ways to say it: a file whose properties state it "
        "(openslide.mpp-x or TIFF resolution tags), an mpp column in the cohort CSV, or slides.mpp=... for all slides "
        "whose files do not say. An objective power such as 20x or 40x alone is not enough: scanners differ"
    )


def _mpp_of_file(properties: Mapping[str, str]) -> tuple[tuple[float, float] | None, str]:
    """(x, y) microns per level-0 pixel as the file states them, and a remark about what was not believed."""
    by_tags = properties.get("openslide.vendor", "generic-tiff") == "generic-tiff"  # OpenSlide then used the tags
    x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if not (x and y):
        by_tags = True
        microns = {"inch": 25_400.0, "centimeter": 10_000.0}.get(properties.get("tiff.ResolutionUnit", ""), 0.0)
        per_unit = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
        x, y = (microns / value if value else 0.0 for value in per_unit)
    if not (x and y):
        return None, ""
    low, high = TIFF_MPP_RANGE if by_tags else MPP_RANGE
    if low <= x <= high and low <= y <= high:
        return (x, y), ""
    where = "its TIFF resolution tags say" if by_tags else "its properties say"
    return None, f" ({where} {x:g} x {y:g}, which no microscope makes, so they are not believed)"


def _number(text: str | None) -> float:
    """0.0 for what is absent, no number, or not finite."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0


# --- files ---------------------------------------------------------------------------------------------------------


def find_slides(folder: Path | str, leave_out: Path | None = None) -> dict[str, Path]:
    """All slides under `folder`, recursively, by extension: slide id -> file, sorted by id.

    The folder `leave_out` is passed over: features, with pictures for quality control, may be written beside slides.

    The id is the file's name without its last extension. A DICOM series is one slide: it goes by its folder's name if
    that folder holds nothing but this series, else by the name of its first file. Data files that belong to an MRXS,
    VMS or VMU slide are not slides. Hidden files and folders (a leading dot) are passed over. Links are followed.

    Raises:
        SlideFolderError: no such folder, no slides in it, or several files with one id (all are listed).
    """
    root = Path(folder)
    if not root.is_dir():
        raise SlideFolderError("no slides", [f"slides.folder={root}: no such folder"])
    found: dict[str, list[Path]] = {}
    for directory, files in _walk(root, leave_out):
        dicom = [file for file in files if file.suffix.lower() == ".dcm"]
        others = [file for file in files if file.suffix.lower() != ".dcm"]
        for file in _without_companions(others):
            found.setdefault(file.stem, []).append(file)
        series = _dicom_series(dicom)
        alone = len(series) == 1 and not others and len(dicom) > 1 and directory != root
        for members in series:
            found.setdefault(directory.name if alone else members[0].stem, []).append(_first_readable(members))
    if not found:
        known = " ".join(sorted(SLIDE_SUFFIXES | IMAGE_SUFFIXES))
        raise SlideFolderError("no slides", [f"slides.folder={root}: no file ends in one of {known}"])
    doubles = [
        f"slide {slide!r}: {len(paths)} files: {', '.join(map(str, paths))}. Move all but one away, or name the files "
        "in the path column of the cohort CSV"
        for slide, paths in sorted(found.items())
        if len(paths) > 1
    ]
    if doubles:
        raise SlideFolderError("several files with one slide id", doubles)
    return {slide: paths[0] for slide, paths in sorted(found.items())}


def _walk(root: Path, leave_out: Path | None) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder with its slide and image files, sorted; each real folder once, data folders of MRXS left out."""
    seen = {os.path.realpath(leave_out)} if leave_out is not None else set()
    for name, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(name)
        stems = {Path(file).stem for file in files if file.lower().endswith(".mrxs")}
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in stems) if real not in seen else []
        if real in seen:
            continue
        seen.add(real)
        directory = Path(name)
        wanted = [directory / file for file in sorted(files) if not file.startswith(".")]
        yield directory, [file for file in wanted if file.suffix.lower() in SLIDE_SUFFIXES | IMAGE_SUFFIXES]


def _without_companions(files: Sequence[Path]) -> list[Path]:
    """Without the JPEG files that a Hamamatsu VMS or VMU slide in the same folder lists as its parts."""
    lists = [file.read_text("utf-8", "replace") for file in files if file.suffix.lower() in (".vms", ".vmu")]
    listed = {line.partition("=")[2].strip() for text in lists for line in text.splitlines()}
    return [file for file in files if file.name not in listed]


def _dicom_series(files: Sequence[Path]) -> list[list[Path]]:
    """DICOM files grouped by SeriesInstanceUID; a file without one is its own group."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_series_uid(file) or str(file), []).append(file)
    return list(groups.values())


@lru_cache(maxsize=100_000)  # a flat folder of many series is otherwise read once a slide
def _series_uid(file: Path) -> str:
    """SeriesInstanceUID (0020,000E) from the head of an explicit-VR little-endian file, as whole-slide DICOM is.

    Opening every instance with OpenSlide instead would read all headers of the folder once per file.
    """
    with open(file, "rb") as handle:
        head = handle.read(65_536)
    # directly after StudyInstanceUID: references to other series, which also hold this tag, do not follow that
    match = re.search(rb"\x20\x00\x0d\x00UI..[0-9. \x00]{0,64}\x20\x00\x0e\x00UI(..)", head, re.DOTALL)
    if not match:
        return ""
    length = int.from_bytes(match[1], "little")
    return head[match.end() : match.end() + length].rstrip(b"\x00 ").decode("ascii", "replace")


def _first_readable(files: Sequence[Path]) -> Path:
    """The first file that OpenSlide recognises, or the first: it then fails when opened, with a reason."""
    return next((file for file in files if openslide.OpenSlide.detect_format(file)), files[0])


def fingerprint_of(path: Path, quickhash: str = "") -> str:
    """sha256 (hex) over sizes, samples of the bytes and OpenSlide's quickhash: same content, same fingerprint.

    A single file is sampled at its head, middle and end (64 kB each). For a slide of several files (MRXS, VMS, DICOM
    series) the sizes of all its files go in as well. File names and dates do not.
    """
    parts = _companions(path)
    digest = hashlib.sha256(quickhash.encode())
    digest.update(repr(sorted(part.stat().st_size for part in parts)).encode())
    for chunk in sorted(_samples(part) for part in ([path] if path.suffix.lower() != ".dcm" else parts)):
        digest.update(chunk)
    return digest.hexdigest()


def _companions(path: Path) -> list[Path]:
    """All files that make up the slide, `path` among them."""
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        data = path.with_suffix("")
        return [path, *(file for file in data.rglob("*") if file.is_file())]
    if suffix in (".vms", ".vmu"):
        kept = set(_without_companions(siblings := [file for file in path.parent.iterdir() if file.is_file()]))
        return [path, *(file for file in siblings if file not in kept)]
    if suffix == ".dcm" and (uid := _series_uid(path)):
        return [f for f in path.parent.iterdir() if f.suffix.lower() == ".dcm" and _series_uid(f) == uid]
    return [path]


def _samples(path: Path, chunk_bytes: int = 65_536) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for offset in (0, size // 2, max(0, size - chunk_bytes)):
            handle.seek(offset)
            digest.update(handle.read(chunk_bytes))
    return digest.digest()


def _shrink_below_two(image_HW3: np.ndarray, factor: float, width: float, height: float) -> np.ndarray:
    """Shrink by exactly `factor` in [1, 2), to a size that covers (width, height); white beyond the image."""
    size = (max(1, math.ceil(width - 1e-6)), max(1, math.ceil(height - 1e-6)))
    offset = (factor - 1) / 2  # pixel centres: (x + 0.5) * factor - 0.5
    back = np.array([[factor, 0, offset], [0, factor, offset]], np.float64)
    return cv2.warpAffine(
        image_HW3,
        back,
        size,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(255, 255, 255),
    )
