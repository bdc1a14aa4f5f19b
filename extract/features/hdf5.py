"""The one door to HDF5 files that are read: damage becomes CacheError, nothing outside the file is touched.

HDF5 follows what a file says: into other files (external links, external storage, virtual datasets), and into
allocations as large as a dataset claims to be. Here a dataset is its own, and as large as what is stored of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from extract.features.errors import CacheError, check_coords, check_memory, check_shape

DAMAGE = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, SystemError)
"""What h5py and HDF5 were seen to raise on damaged files (benchmarks/reliability.py), with their base classes."""


@contextmanager
def open_h5(path: Path, *needed: str) -> Iterator[h5py.File]:
    """An open HDF5 file that has the `needed` datasets, the first 2-D and all of the same length.

    Raises:
        CacheError: absent, truncated, damaged (also where that is noticed in the body of the `with`), not HDF5;
            datasets missing, of the wrong shape, outside the file, or larger than what is stored.
    """
    if not path.is_file():
        raise CacheError(f"{path}: no such feature file")
    with _damage_is_named(path):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            what = "truncated (its writer was interrupted)" if "truncated" in str(error) else "not an HDF5 file"
            raise CacheError(f"{path}: {what}. Delete it and extract again. ({error})") from None
        with file:
            if not all(is_dataset(file, name) for name in needed):
                raise CacheError(f"{path}: expected datasets {', '.join(needed)}, got {', '.join(file) or 'none'}")
            for name in needed:
                check_dataset(path, file, name)
            if needed:
                check_shape(path, needed[0], file[needed[0]])
            for name in needed[1:]:
                check_coords(path, file[name].shape, len(file[needed[0]]))
            yield file


@contextmanager
def _damage_is_named(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise CacheError(f"{path}: not enough memory to read it, or damaged") from None
    except DAMAGE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CacheError(f"{path}: damaged: it cannot be read. Delete it and extract again. ({reason})") from None


def is_dataset(file: h5py.File, name: str) -> bool:
    """Whether there is one, or a link that claims to be; the link is not followed."""
    if not file.id.links.exists(name.encode()):
        return False
    return not _is_own(file, name) or isinstance(file[name], h5py.Dataset)


def _is_own(file: h5py.File, name: str) -> bool:
    return bool(file.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD)


def check_dataset(path: Path, file: h5py.File, name: str) -> None:
    """Raise CacheError unless the dataset lies in this file, and all that it declares is stored there."""
    if not _is_own(file, name):
        raise CacheError(f"{path}: {name} is a link to something else; expected the dataset itself, links are refused")
    dataset = file[name]
    if dataset.is_virtual or dataset.external:
        raise CacheError(f"{path}: {name} lies in other files (virtual or external dataset), which is refused")
    n_bytes, stored = math.prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    claim = f"{name} declares {tuple(dataset.shape)} values of {dataset.dtype} ({n_bytes:,} bytes)"
    if dataset.chunks is None:
        last_byte = (dataset.id.get_offset() or 0) + n_bytes
        if stored < n_bytes or last_byte > path.stat().st_size:
            raise CacheError(f"{path}: {claim}, but {min(stored, path.stat().st_size):,} are stored. Extract it again")
        return
    pairs = zip(dataset.shape, dataset.chunks, strict=True)
    n_chunks = math.prod(-(-rows // rows_of_chunk) for rows, rows_of_chunk in pairs)
    if stored > path.stat().st_size or dataset.id.get_num_chunks() < n_chunks:
        raise CacheError(
            f"{path}: {claim}, but {dataset.id.get_num_chunks():,} of {n_chunks:,} chunks are stored. Extract it again"
        )
    check_memory(path, claim, max(n_bytes, math.prod(dataset.chunks) * dataset.dtype.itemsize))
