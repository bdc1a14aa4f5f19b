"""The one door to slide files: OpenSlide for slides, Pillow for plain images.

Frames used here and in `extract.tiles`:
    level-0 px    pixels of the finest level; what coordinates are stored in
    level px      pixels of one pyramid level; level px = level-0 px / downsample of that level
Array axes: H height, W width, 3 = RGB, uint8. Positions and sizes are written (x, y) and (width, height).
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import openslide
from openslide import lowlevel

from extract.slides.blocks import BlockFile, find_levels
from extract.slides.errors import MppError, SlideOpenError, SlideReadError
from extract.slides.files import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, TIFF_SUFFIXES, fingerprint_of
from extract.slides.images import ImageReader
from extract.slides.mpp import choose_mpp

MAX_THUMBNAIL_PX = 30_000  # OpenCV's warpAffine goes to 32,767

THUMBNAIL_BLOCK_PX = 2048


def _openslide_build() -> str:
    """OpenSlide and the build of it: openslide-bin carries libtiff, libjpeg-turbo, pixman and others inside, and its
    version names them all. (Tiles differed between builds with pixman 0.3x and 0.4x.)"""
    try:
        return f"OpenSlide {openslide.__library_version__} (openslide-bin {version('openslide-bin')})"
    except PackageNotFoundError:
        inside = ", ".join(loaded_libraries(Path("/proc/self/maps"))) or "its libraries are not known"
        return f"OpenSlide {openslide.__library_version__} (of this machine: {inside})"


def loaded_libraries(maps: Path) -> list[str]:
    """What decodes and draws for a machine's own OpenSlide, with versions: of the shared files in use (proc(5), maps).

    Copies that other packages bring along have a hash in their names, and are left out.
    """
    try:
        text = maps.read_text()
    except OSError:
        return []
    return sorted({" ".join(found) for found in re.findall(LIBRARY, text, re.MULTILINE)})


LIBRARY = r"/lib(pixman-1|cairo|tiff|jpeg|openjp2|png16)\.so\.([\d.]+)$"


BLOCKS = "JPEG blocks"
OPENSLIDE = _openslide_build()

How = Literal["auto", "openslide", "fast"]
"""Who decodes (slides.reader). auto: a file's own JPEG blocks where they are OpenSlide's pixels, else OpenSlide."""

SMALLEST_BLOCK_PX = 128
"""An unreadable block of a thumbnail is split in four down to this side (level px); only the smallest stay white."""


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


class Slide:
    """An open slide. Made by `open_slide`; can be pickled and forked (each process opens the file for itself).

    Attributes:
        path: the file.
        mpp: microns per level-0 pixel, true, not rounded to a magnification.
        mpp_source: "csv", "file" or "slides.mpp".
        geometry: sizes of all levels.
        properties: what the file says about itself (OpenSlide's names).
    """

    def __init__(
        self, path: Path, reader: _OpenSlideReader | ImageReader, mpp: float, mpp_source: str, how: How = "auto"
    ):
        self.path = path
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.properties = reader.properties
        self.geometry = Geometry(path.name, mpp, reader.level_sizes, reader.level_downsamples, reader.level_block_px)
        self._reader: _OpenSlideReader | ImageReader | None = reader
        self._by_openslide, self._how = isinstance(reader, _OpenSlideReader), how
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

    def decoder(self, level: int) -> str:
        """Who decodes a level, with versions, as it stands in a cache's provenance.

        Raises:
            SlideReadError: `slides.reader=fast` and the level has no JPEG blocks that are OpenSlide's pixels.
        """
        try:
            return self._open_reader().decoder(level)
        except openslide.OpenSlideError as error:
            self.close()
            raise SlideReadError(f"{self.path}: level {level} cannot be read: {error}") from None

    def has_blocks(self, level: int) -> bool:
        """Whether a level is decoded from its own JPEG blocks."""
        return self.decoder(level).startswith(BLOCKS)

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

    def read_shrunk_rgb(
        self, level: int, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int
    ) -> np.ndarray:
        """Pixels of a level made smaller by its decoder; all lengths in px of the level divided by `shrink`.

        Raises:
            SlideReadError: as `read_region_rgb`; also where the blocks cannot be read without OpenSlide.
        """
        pixels_HW3 = self._open_reader().read_shrunk(level, x_px, y_px, width_px, height_px, shrink)
        if pixels_HW3 is None:
            raise SlideReadError(
                f"{self.path}: level {level}: a block at ({x_px}, {y_px}) / {shrink} cannot be decoded"
            )
        return pixels_HW3

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

    def _open_reader(self) -> _OpenSlideReader | ImageReader:
        if self._reader is None or self._process != os.getpid():  # a handle must not cross a fork: it shares offsets
            self._reader = _OpenSlideReader(self.path, self._how) if self._by_openslide else ImageReader(self.path)
            self._process = os.getpid()
            if self._reader.level_sizes != self.level_sizes:
                raise SlideOpenError(
                    f"{self.path}: the file changed: levels were {self.level_sizes}, now {self._reader.level_sizes}"
                )
        return self._reader


def open_slide(
    path: Path | str, mpp: float | None = None, *, default_mpp: float | None = None, how: How = "auto"
) -> Slide:
    """Open a slide or a plain image.

    Args:
        path: anything OpenSlide reads (for MRXS and VMS the main file, for DICOM any file of the series), or a
            PNG, JPEG, WebP, JPEG 2000, BMP or untiled TIFF.
        mpp: microns per level-0 pixel from the cohort CSV; overrides what the file says.
        default_mpp: `slides.mpp` of the config; used only if neither `mpp` nor the file says.
        how: who decodes; the pixels are the same.

    Raises:
        SlideOpenError: no such file, unknown format, damaged.
        MppError: nobody states the microns per pixel, or the pixels are not square.
    """
    path = Path(path)
    reader = _open_reader(path, how)
    try:
        found, source = choose_mpp(path, mpp, reader.properties, default_mpp)
    except MppError:
        reader.close()
        raise
    return Slide(path, reader, found, source, how)


def _open_reader(path: Path, how: How) -> _OpenSlideReader | ImageReader:
    if not path.exists():
        raise SlideOpenError(f"{path}: no such file")
    if path.suffix.lower() in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES:
        return ImageReader(path)
    try:
        return _OpenSlideReader(path, how)
    except SlideOpenError as refused:
        if path.suffix.lower() not in TIFF_SUFFIXES:
            raise
        try:
            return ImageReader(path)
        except SlideOpenError as unreadable:
            raise SlideOpenError(f"{refused}; as a plain image: {str(unreadable).removeprefix(f'{path}: ')}") from None


class _OpenSlideReader:
    """Pixels through OpenSlide, or from the file's own blocks where those are the same pixels.

    Raises `openslide.OpenSlideError` from `read`; the object is useless afterwards.
    """

    def __init__(self, path: Path, how: How):
        try:
            self.handle = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideOpenError(f"{path}: not a slide format that OpenSlide knows, or a truncated file") from None
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideOpenError(f"{path}: cannot be opened: {error}") from None
        self.path, self.how = path, how
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
        self._blocks: BlockFile | None = None
        self._same_pixels: dict[int, bool] = {}

    def close(self) -> None:
        self.handle.close()
        if self._blocks is not None:
            self._blocks.close()

    def decoder(self, level: int) -> str:
        if self._by_blocks(level):
            return f"{BLOCKS}, simplejpeg {version('simplejpeg')}"
        if self.how == "fast":
            raise SlideReadError(
                f"{self.path}: slides.reader=fast: level {level} has no JPEG blocks whose pixels are OpenSlide's. "
                "slides.reader=auto reads it through OpenSlide"
            )
        return OPENSLIDE

    def read(self, level: int, x_level0: int, y_level0: int, width_px: int, height_px: int) -> np.ndarray:
        x, y = (start / self.level_downsamples[level] for start in (x_level0, y_level0))
        if x.is_integer() and y.is_integer():
            pixels_HW3 = self.read_shrunk(level, int(x), int(y), width_px, height_px, 1)
            if pixels_HW3 is not None:
                return pixels_HW3
        return self._read_rgb(level, x_level0, y_level0, width_px, height_px)

    def read_shrunk(
        self, level: int, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int
    ) -> np.ndarray | None:
        if not self._by_blocks(level) or self._blocks is None:
            return None
        return self._blocks.read(level, x_px, y_px, width_px, height_px, shrink)

    def _by_blocks(self, level: int) -> bool:
        """Whether blocks are read; asked first, the level's fullest block is compared with OpenSlide's pixels."""
        if self.how == "openslide":
            return False
        if self._blocks is None:
            vendor = self.properties.get("openslide.vendor", "")
            self._blocks = BlockFile(self.path, find_levels(self.path, vendor, self.level_sizes))
        if level not in self._same_pixels:
            self._same_pixels[level] = self._compare(self._blocks, level)
        return self._same_pixels[level]

    def _compare(self, file: BlockFile, level: int) -> bool:
        blocks = file.levels[level]
        if blocks is None:
            return False
        width, height = blocks.block_px
        x, y = (place * side for place, side in zip(blocks.fullest(), blocks.block_px, strict=True))
        downsample = self.level_downsamples[level]
        decoded_HW3 = file.read(level, x, y, width, height)
        if decoded_HW3 is None or not ((x * downsample).is_integer() and (y * downsample).is_integer()):
            return False
        return np.array_equal(
            decoded_HW3, self._read_rgb(level, int(x * downsample), int(y * downsample), width, height)
        )

    def _read_rgb(self, level: int, x_level0: int, y_level0: int, width_px: int, height_px: int) -> np.ndarray:
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
