"""An encoder for direct use: tiles in, features out.

Axes: N tiles, H and W tile_px rows and columns, 3 RGB, D features.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np
import torch

from extract.config import ConfigError, Encoder, merge_config
from extract.encoders.frozen import FrozenEncoder, load_encoder
from extract.encoders.table import EncoderError, encoder_problems

CPU_BATCH, GPU_BATCH = 16, 64


def encoder(
    name: str = "phikon",
    *,
    weights: str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None,
    **settings: Any,
) -> TileEncoder:
    """A frozen encoder of the table, such as phikon, phikon-v2, uni, or timm:NAME.

    >>> import extract, numpy
    >>> encoder = extract.encoder("timm:test_vit", random_weights=True)  # extract.encoder("phikon") for real features
    >>> tiles_NHW3 = numpy.zeros((3, encoder.tile_px, encoder.tile_px, 3), dtype="uint8")
    >>> encoder.encode(tiles_NHW3).shape
    (3, 64)

    Args:
        name: as `encoder.name`.
        weights: local weights file; default: the hub's, downloaded once.
        adapter: LoRA adapter folder of `python -m extract.finetune`.
        settings: the other keys of `encoder`: revision, device, precision, compile, random_weights.

    Raises:
        ConfigError (extract.config): everything that is wrong with these, or weights that cannot be had or do not fit.
    """
    given = {key: os.fspath(value) for key, value in (("weights", weights), ("adapter", adapter)) if value is not None}
    section = merge_config(Encoder, None, {"name": name, **given, **settings})
    problems = encoder_problems(section)
    if problems:
        raise ConfigError("problems in the encoder", problems)
    try:
        return TileEncoder(load_encoder(section))
    except EncoderError as error:
        raise ConfigError("the encoder cannot be had", [str(error)]) from None


class TileEncoder:
    """Tiles in, features out; the same features for a tile in whatever batch.

    Attributes:
        name, dim: of the encoder; features of a tile.
        tile_px, mpp: what it wants to see: square tiles of so many pixels at so many microns per pixel.
        frozen: the network with its provenance (source and sha256 of the weights, device).
    """

    def __init__(self, frozen: FrozenEncoder):
        self.frozen, spec = frozen, frozen.spec
        self.name, self.dim, self.tile_px, self.mpp = spec.name, spec.dim, spec.tile_px, spec.mpp

    def encode(self, tiles_NHW3: np.ndarray | torch.Tensor, *, batch_size: int | None = None) -> np.ndarray:
        """features_ND, float32.

        Args:
            tiles_NHW3: uint8 RGB, tile_px square, an array or a tensor.
            batch_size: tiles that go through the network together; default: 16 on a CPU, 64 on a GPU.

        Raises:
            ValueError: tiles of another shape or type.
        """
        size = batch_size or (CPU_BATCH if self.frozen.device.type == "cpu" else GPU_BATCH)
        features_ND = np.empty((len(tiles_NHW3), self.dim), dtype=np.float32)
        for rows in batches(len(tiles_NHW3), size):
            features_ND[rows] = self.frozen.encode(tiles_NHW3[rows]).numpy()
        return features_ND

    def __repr__(self) -> str:
        wants = f"{self.tile_px} px at {self.mpp:g} microns per pixel"
        return f"<encoder {self.name}: tiles of {wants} -> {self.dim} features, {self.frozen.source}>"


def batches(n: int, size: int) -> Iterator[slice]:
    """At least one, so that a batch of none is looked at too."""
    for first in range(0, max(n, 1), size):
        yield slice(first, min(first + size, n))
