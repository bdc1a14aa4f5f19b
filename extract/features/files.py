"""Reading feature files whoever wrote them: .h5, .npy, .pt and .json, with errors that name the file.

Axes: N tiles, D features, 2 = (x, y).
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import DAMAGED, CacheError, check_memory
from extract.features.mapping import MappedArray, map_array


def _kept(dtype: np.dtype) -> np.dtype:
    """The dtype handed out for a stored one: native float16 and float32 as they are, all else float32."""
    return dtype if dtype in (np.dtype("float16"), np.dtype("float32")) else np.dtype("float32")


def header_of(path: Path, features: Any, provenance: Provenance) -> Header:
    """The header of a file whose checked `features` are an array or an HDF5 dataset."""
    n_tiles, dim = features.shape
    return Header(path, n_tiles, dim, _kept(features.dtype).name, provenance)


def as_stored(array_ND: np.ndarray) -> np.ndarray:
    kept = _kept(array_ND.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite values are looked for before training
        return array_ND.astype(kept, copy=False, subok=kept == array_ND.dtype)


def to_px(path: Path, coords_N2: np.ndarray) -> np.ndarray:
    """Whole pixels, int32; CacheError if they are none, such as NaN."""
    rounded_N2 = np.rint(coords_N2)
    limits = np.iinfo(np.int32)
    if not ((rounded_N2 >= limits.min) & (rounded_N2 <= limits.max)).all():
        raise CacheError(f"{path}: expected coords in pixels, got numbers that are none. Extract it again")
    px_N2: np.ndarray = rounded_N2.astype(np.int32)
    return px_N2


def map_h5(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    offset = dataset.id.get_offset()  # None when chunked, compressed or empty
    if offset is None or _kept(dataset.dtype) != dataset.dtype:
        return as_stored(dataset[:])
    return map_array(path, dataset.dtype, dataset.shape, offset)


def load_npy(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped: what it declares must be there."""
    if not path.is_file():
        raise CacheError(f"{path}: no such feature file")
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = read_npy_header(file)
            offset = file.tell()
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
            raise ValueError(f"it declares {shape} values of {dtype}, more than its {path.stat().st_size:,} bytes hold")
    except (ValueError, EOFError, OSError) as error:
        raise CacheError(f"{path}: not a whole .npy file of numbers. Delete it and extract again. ({error})") from None
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return map_array(path, dtype, shape[::-1], offset).T if fortran_order else map_array(path, dtype, shape, offset)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype; `file` is then at the first value.

    Raises:
        ValueError: not a header of the .npy format.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format; expected 1.0 or 2.0")
    try:
        shape, fortran_order, dtype = read(file)
    except (SyntaxError, tokenize.TokenError, TypeError, LookupError, RecursionError, struct.error) as error:
        raise ValueError(f"its header cannot be read: {error}") from None
    if any(n < 0 for n in shape):
        raise ValueError(f"it declares the shape {shape}")
    if dtype.subdtype or dtype.fields or not dtype.itemsize:  # "<0f4": values of no bytes
        raise ValueError(f"it declares values of {dtype}, expected numbers")
    return tuple(shape), fortran_order, dtype


BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError, LookupError, struct.error)


def load_npz(path: Path, name: str, check: Callable[[tuple[int, ...]], None]) -> np.ndarray:
    """One array of a .npz file. `check` is given its shape and raises CacheError before anything is decompressed."""
    try:
        with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            there = [member.removesuffix(".npy") for member in archive.namelist()]
            if name not in there:
                raise CacheError(f"{path}: expected array {name}, got {', '.join(there) or 'none'}")
            with archive.open(f"{name}.npy") as member:
                shape, fortran_order, dtype = read_npy_header(member)
                check(shape)
                n_bytes = math.prod(shape) * dtype.itemsize
                check_memory(path, f"{name} of shape {shape}", n_bytes)
                values_N = np.frombuffer(member.read(n_bytes), dtype)
                return values_N.reshape(shape, order="F" if fortran_order else "C")
    except BROKEN_ZIP as error:
        raise CacheError(f"{path}: not a whole .npz file. ({error})") from None


def load_pt(path: Path) -> np.ndarray:
    """A .pt file that holds one tensor, memory-mapped when it is of the zip format (PyTorch >= 1.6)."""
    import torch  # here, because this module must stay light

    if not path.is_file():
        raise CacheError(f"{path}: no such feature file")
    try:
        mapped = zipfile.is_zipfile(path)
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, *DAMAGED) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CacheError(f"{path}: not a whole .pt file of a tensor. Delete it and extract again. ({reason})") from None
    if not isinstance(tensor, torch.Tensor):
        raise CacheError(f"{path}: expected one tensor, got {type(tensor).__name__}")
    size, n_bytes = path.stat().st_size, tensor.numel() * tensor.element_size()
    if n_bytes > size:  # strides of 0 make many rows of one
        raise CacheError(f"{path}: declares {tuple(tensor.shape)} values, {n_bytes:,} bytes, but has {size:,} bytes")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy()
    return tensor.numpy().view(MappedArray) if mapped else tensor.numpy()


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object beside the features, {} when there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CacheError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CacheError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def number_in(value: Any) -> float:
    """`value` when it is a number, else 0 (= unknown), e.g. for slideflow's tile_um="20x"."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def plain_value(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def text_of(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
