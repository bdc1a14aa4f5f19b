"""Arrays that lie in a file and are read when they are used, without a file descriptor each.

Python's mmap module, and so np.memmap, keeps a duplicate of the file's descriptor for every map: a study of more slides
than `ulimit -n` allows could not be mapped. torch closes the descriptor once the file is mapped. Python 3.13 has
`mmap.mmap(trackfd=False)`.

Axes: N tiles, D features.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from extract.features.errors import CacheError


class MappedArray(np.ndarray):
    """An array that lies in a file. Slices of it do, too; what is converted or copied does not and is a plain array."""


def map_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> MappedArray:
    """`shape` values of `dtype` from byte `offset` of the file; writing to them never reaches the file.

    Raises:
        CacheError: the file is shorter, or the system allows no more maps.
    """
    import torch  # here, because this module must stay light

    end = offset + math.prod(shape) * dtype.itemsize
    try:
        size = path.stat().st_size
        if end > size:
            raise CacheError(f"{path}: truncated: expected at least {end:,} bytes, got {size:,}. Extract it again")
        bytes_ = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise CacheError(f"{path}: cannot be memory-mapped; use data.memory=ram ({_first_line(error)})") from None
    return bytes_[offset:end].view(dtype).reshape(shape).view(MappedArray)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
