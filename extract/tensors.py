"""Tensors on disk as safetensors: whole files, and the same bytes for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from extract.whole import replace_on_success

LENGTH_BYTES = 8
"""The file begins with the header's length, an unsigned little-endian number (safetensors' format)."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `path`; the file depends on tensors and metadata only.

    The library sorts the tensors, but writes the metadata in an order that changes from call to call.
    """
    with replace_on_success(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of their names, in place: the header keeps its length."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"{path}: expected a header of at most {length} bytes, got {len(text)}")
        file.seek(LENGTH_BYTES)
        file.write(text.ljust(length))
