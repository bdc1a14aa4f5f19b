"""The checksums of a cache file, behind its HDF5: a flipped bit is noticed, and HDF5 is shown no damaged structure.

    whole HDF5 file | trailer, TRAILER_BYTES: MAGIC; first byte and length of features and of coords; columns of
                    | features and bytes of one value; XXH3 of features, of coords, of all other bytes before the
                    | trailer, and of the trailer up to here

With it features are read without HDF5, which takes longer to open a file than to read a slide.

HDF5 does not look behind its own end, so every program reads such a file. HDF5 keeps no checksums of attributes, and
damaged ones can make it run for ever: so the trailer is outside, and compared first. XXH3 with 128 bits is made to
notice accidents at the speed of memory; it is no protection against someone who wants to deceive.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from extract.features.errors import CacheError

ANNOUNCED, HOW = "checksums", "xxh3_128, in a trailer behind the HDF5"
"""The file's attribute that says that there must be a trailer, which may have been cut off."""
BY_CHECKSUMS = "xxh3 "
"""How an identity begins that is of the checksums."""
MAGIC = b"slide-mil xxh3 1"
FIXED = struct.Struct("<16s4Q2Q16s16s16s")
DIGEST_BYTES = 16
TRAILER_BYTES = FIXED.size + DIGEST_BYTES

Range = tuple[int, int]


@dataclass(frozen=True)
class Checksums:
    """What the values of a file must be, and where features (N, D) begin."""

    features: bytes
    coords: bytes
    offset: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def check_features(self, path: Path, features_ND: np.ndarray[Any, Any]) -> None:
        """Raises CacheError if they are not what was written."""
        _compare(path, "features", self.features, features_ND)

    def check_coords(self, path: Path, coords_N2: np.ndarray[Any, Any]) -> None:
        """Raises CacheError if they are not what was written."""
        _compare(path, "coords", self.coords, coords_N2)


def _compare(path: Path, name: str, expected: bytes, array: np.ndarray[Any, Any]) -> None:
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if xxhash.xxh3_128_digest(values.data) != expected:
        raise CacheError(
            f"{path}: damaged: its {name} are not what was written (checksum). Delete it and extract again"
        )


def with_checksums(file: h5py.File, image: bytes | memoryview) -> bytes:
    """The bytes of a whole HDF5 file, as they are in `file`, with the trailer behind them."""
    ranges = [_range_of(file[name]) for name in ("features", "coords")]
    values = [xxhash.xxh3_128_digest(image[start : start + length]) for start, length in ranges]
    around = _digest(image[start:end] for start, end in _around(ranges, len(image)))
    features = file["features"]
    fixed = FIXED.pack(MAGIC, *ranges[0], *ranges[1], features.shape[1], features.dtype.itemsize, *values, around)
    return b"".join([image, fixed, xxhash.xxh3_128_digest(fixed)])


def _range_of(dataset: h5py.Dataset) -> Range:
    """First byte and length of a contiguous dataset's values; (0, 0) if there are none."""
    offset = dataset.id.get_offset()
    return (0, 0) if offset is None else (int(offset), int(dataset.id.get_storage_size()))


def _around(ranges: Iterable[Range], end: int) -> Iterator[Range]:
    """First byte and end of what lies before, between and behind the ranges."""
    position = 0
    for start, length in sorted(ranges):
        if length:
            yield position, start
            position = start + length
    yield position, end


def _digest(parts: Iterable[bytes | memoryview]) -> bytes:
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    digest: bytes = hasher.digest()
    return digest


def checked(path: Path) -> Checksums | None:
    """The checksums of the file's values, None if it has no trailer; the values themselves are not read.

    Raises:
        CacheError: anything else in the file is not what was written.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return _checked(path, file)
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({error})") from None


def identity(path: Path) -> str | None:
    """A short name of the file's features and coordinates, by their checksums; None if it has none, or damaged ones.

    Nothing else is read: that they are what the checksums say is seen when they are.
    """
    try:
        with path.open("rb", buffering=0) as file:
            end = file.seek(0, SEEK_END) - TRAILER_BYTES
            trailer = _read(file, end, end + TRAILER_BYTES) if end >= 0 else b""
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({error})") from None
    if trailer[: len(MAGIC)] != MAGIC or xxhash.xxh3_128_digest(trailer[: FIXED.size]) != trailer[FIXED.size :]:
        return None
    *_, dim, value_bytes, features, coords, _ = FIXED.unpack(trailer[: FIXED.size])
    return f"{BY_CHECKSUMS}{xxhash.xxh3_128_hexdigest(b'%d %d ' % (dim, value_bytes) + features + coords)}"


def _checked(path: Path, file: FileIO) -> Checksums | None:
    end = file.seek(0, SEEK_END) - TRAILER_BYTES
    if end < 0:
        return None
    trailer = _read(file, end, end + TRAILER_BYTES)
    fixed, own = trailer[: FIXED.size], trailer[FIXED.size :]
    magic, start_f, length_f, start_c, length_c, dim, value_bytes, features, coords, rest = FIXED.unpack(fixed)
    if magic != MAGIC:
        return None
    gaps = list(_around([(start_f, length_f), (start_c, length_c)], end))
    if (
        xxhash.xxh3_128_digest(fixed) != own
        or any(stop < start for start, stop in gaps)
        or not dim
        or value_bytes not in (2, 4)
    ):
        raise CacheError(f"{path}: damaged: its checksums are not what was written. Delete it and extract again")
    if _digest(_read(file, start, stop) for start, stop in gaps) != rest:
        raise CacheError(
            f"{path}: damaged, or changed by another program: it is not what was written (checksum). Delete it and "
            "extract again"
        )
    shape = (length_f // (dim * value_bytes) if length_f else 0, dim)
    return Checksums(features, coords, start_f, shape, np.dtype(f"<f{value_bytes}"))


def _read(file: FileIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start) if stop > start else b""


def check_announced(path: Path, file: h5py.File, checksums: Checksums | None) -> None:
    """Raise CacheError if the file says that it has checksums, and they are gone."""
    if checksums is None and ANNOUNCED in file.attrs:
        raise CacheError(
            f"{path}: truncated, damaged, or changed by another program: its checksums are gone. Delete it and extract "
            f"again, or delete its attribute {ANNOUNCED!r} to use it without"
        )
