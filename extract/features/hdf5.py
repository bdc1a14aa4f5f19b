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
            datasets = [own_dataset(path, file, name) for name in needed]
            if datasets:
                check_shape(path, needed[0], datasets[0])
            for dataset in datasets[1:]:
                check_coords(path, dataset.shape, datasets[0].shape[0])
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
    return not _is_own(file, name) or h5py.h5o.get_info(file.id, name.encode()).type == h5py.h5o.TYPE_DATASET


def _is_own(file: h5py.File, name: str) -> bool:
    return bool(file.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD)


def own_dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset; CacheError unless it lies in this file, and all that it declares is stored there."""
    if not _is_own(file, name):
        raise CacheError(f"{path}: {name} is a link to something else; expected the dataset itself, links are refused")
    dataset = file[name]
    made = dataset.id.get_create_plist()
    if made.get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
        raise CacheError(f"{path}: {name} lies in other files (virtual or external dataset), which is refused")
    size, stored = path.stat().st_size, dataset.id.get_storage_size()
    shape, value_bytes = dataset.shape, dataset.dtype.itemsize
    n_bytes = math.prod(shape) * value_bytes
    claim = f"{name} declares {tuple(shape)} values of {value_bytes} bytes ({n_bytes:,} bytes)"
    if made.get_layout() != h5py.h5d.CHUNKED:
        if stored < n_bytes or (dataset.id.get_offset() or 0) + n_bytes > size:
            raise CacheError(f"{path}: {claim}, but {min(stored, size):,} are stored. Extract it again")
        return dataset
    chunk = made.get_chunk()
    n_chunks = math.prod(-(-rows // rows_of_chunk) for rows, rows_of_chunk in zip(shape, chunk, strict=True))
    if stored > size or dataset.id.get_num_chunks() < n_chunks:
        found = dataset.id.get_num_chunks()
        raise CacheError(f"{path}: {claim}, but {found:,} of {n_chunks:,} chunks are stored. Extract it again")
    check_memory(path, claim, max(n_bytes, math.prod(chunk) * value_bytes))
    return dataset
