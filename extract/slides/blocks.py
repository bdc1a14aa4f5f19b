"""A tiled TIFF's own JPEG blocks, decoded by libjpeg-turbo without OpenSlide between: several times as fast.

OpenSlide is the truth: a block is decoded with the same settings (exact DCT, smooth chroma upsampling), whatever the
decoder complains about is left to OpenSlide, and so is what is not whole blocks of JPEG: other compressions, missing
blocks, positions between two pixels, areas whose levels OpenSlide composes itself (overlaps, several scans).

Axes: H height, W width, 3 = RGB, uint8. Positions and sizes are px of one level, (x, y) and (width, height).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile

VENDORS = ("aperio", "generic-tiff")
"""Formats whose levels are single tiled TIFF images, shown by OpenSlide as they lie."""

JPEG, MINISBLACK, RGB, YCBCR = 7, 1, 2, 6
"""Values of the tags Compression and PhotometricInterpretation (TIFF 6.0; Technical Note 2)."""

MAX_BLOCK_PX = 4096


@dataclass(frozen=True)
class Level:
    """Where the blocks of one level lie, row by row: bytes of the file; a length of 0 is a missing block.

    `head` is what stands before a block's own data to make it a whole JPEG: start, colour space, shared tables.
    """

    size: tuple[int, int]
    block_px: tuple[int, int]
    offsets: Sequence[int]
    lengths: Sequence[int]
    head: bytes

    @property
    def blocks_across(self) -> int:
        return -(-self.size[0] // self.block_px[0])

    def fullest(self) -> tuple[int, int]:
        """(column, row) of the block with the most bytes: the one in which a wrong decoder would show most."""
        index = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        return index % self.blocks_across, index // self.blocks_across


def find_levels(path: Path, vendor: str, level_sizes: Sequence[tuple[int, int]]) -> list[Level | None]:
    """The levels of OpenSlide (same order) that can be read from their blocks; None where they cannot."""
    if vendor not in VENDORS:
        return [None] * len(level_sizes)
    try:
        with tifffile.TiffFile(path) as file:
            found = [level for page in file.pages if (level := _level_of(page.aspage())) is not None]
    except Exception:  # noqa: BLE001 - damaged files make it raise anything; OpenSlide opened this one and reads it
        return [None] * len(level_sizes)
    by_size = {size: [level for level in found if level.size == size] for size in level_sizes}
    return [by_size[size][0] if len(by_size[size]) == 1 else None for size in level_sizes]


def _level_of(page: Any) -> Level | None:
    """The page as a level, if it is 8-bit JPEG in tiles."""
    colour = page.photometric in (RGB, YCBCR) and page.samplesperpixel == 3
    grey = page.photometric == MINISBLACK and page.samplesperpixel == 1
    if not (page.is_tiled and page.compression == JPEG and page.bitspersample == 8 and (colour or grey)):
        return None
    size, block_px = (page.imagewidth, page.imagelength), (page.tilewidth, page.tilelength)
    n_blocks = -(-size[0] // block_px[0]) * -(-size[1] // block_px[1])
    one_plane = page.planarconfig == 1 and page.imagedepth == 1
    whole = len(page.dataoffsets) == len(page.databytecounts) == n_blocks
    if not (one_plane and whole and max(block_px) <= MAX_BLOCK_PX):
        return None
    return Level(size, block_px, page.dataoffsets, page.databytecounts, _head(page.jpegtables, page.photometric))


def _head(tables: bytes | None, photometric: int) -> bytes:
    """Start of image, Adobe's marker (APP14), which tells the decoder whether colours are RGB or YCbCr, and the shared
    tables. Without it a decoder guesses, and takes the RGB of Aperio's scanners for YCbCr."""
    transform = b"\x01" if photometric == YCBCR else b"\x00"
    adobe = b"" if photometric == MINISBLACK else b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + transform
    return b"\xff\xd8" + adobe + (tables[2:-2] if tables else b"")


class BlockFile:
    """The open file. Not to be used across a fork: its user opens one a process."""

    def __init__(self, path: Path, levels: Sequence[Level | None]):
        self.levels = list(levels)
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        most = max((block_w * block_h for level in levels if level for block_w, block_h in [level.block_px]), default=0)
        self._scratch = np.empty(most * 3, np.uint8)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def read(
        self, level: int, x_px: int, y_px: int, width_px: int, height_px: int, shrink: int = 1
    ) -> np.ndarray | None:
        """uint8 RGB (height_px, width_px, 3), white outside of the level; None: OpenSlide has to read it.

        With `shrink` (1, 2, 4 or 8) all lengths, `x_px` to `height_px`, are of the level made smaller by that: fewer
        frequencies of each 8 x 8 px are transformed back, which is not an area average. Blocks must be divisible by it.
        """
        blocks = self.levels[level]
        if blocks is None:
            return None
        width, height = (-(-side // shrink) for side in blocks.size)
        block_w, block_h = (side // shrink for side in blocks.block_px)
        left, right = max(x_px, 0), min(x_px + width_px, width)
        top, bottom = max(y_px, 0), min(y_px + height_px, height)
        inside = right - left == width_px and bottom - top == height_px
        region_HW3 = (np.empty if inside else _white)((height_px, width_px, 3), np.uint8)
        for row in range(top // block_h, -(-bottom // block_h) if left < right else 0):
            for column in range(left // block_w, -(-right // block_w)):
                block_HW3 = self._block(blocks, column, row, shrink)
                if block_HW3 is None:
                    return None
                x, y = column * block_w, row * block_h
                x_from, x_to, y_from, y_to = (
                    max(x, left),
                    min(x + block_w, right),
                    max(y, top),
                    min(y + block_h, bottom),
                )
                part_HW3 = block_HW3[y_from - y : y_to - y, x_from - x : x_to - x]
                region_HW3[y_from - y_px : y_to - y_px, x_from - x_px : x_to - x_px] = part_HW3
        return region_HW3

    def _block(self, level: Level, column: int, row: int, shrink: int) -> np.ndarray | None:
        index = row * level.blocks_across + column
        offset, length = level.offsets[index], level.lengths[index]
        if length < 4:  # a missing block, which OpenSlide may draw from the next level
            return None
        data = _read_at(self._descriptor, length, offset)
        if len(data) < length or data[:2] != b"\xff\xd8":
            return None
        whole, (block_w, block_h) = level.head + data[2:], (side // shrink for side in level.block_px)
        room = self._scratch[: block_w * block_h * 3]  # a block that declares to be larger does not fit: ValueError
        smaller = {"min_width": block_w, "min_height": block_h} if shrink > 1 else {}
        try:
            if shrink > 1 and simplejpeg.decode_jpeg_header(whole)[:2] != level.block_px[::-1]:
                return None
            # strict: what libjpeg only warns of is an error to OpenSlide as well
            block_HW3: np.ndarray = simplejpeg.decode_jpeg(whole, "RGB", buffer=room, strict=True, **smaller)
        except ValueError:
            return None
        return block_HW3 if block_HW3.shape == (block_h, block_w, 3) else None


def _white(shape: tuple[int, ...], dtype: type[np.uint8]) -> np.ndarray:
    return np.full(shape, 255, dtype)


def _read_at(descriptor: int, length: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows
    return os.read(descriptor, length)
