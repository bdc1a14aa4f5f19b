"""Features of labelled tiles that `extract.run` has written, in the order of the tiles.

Axes: N tiles, D feature width.
"""

from __future__ import annotations

from pathlib import Path, PurePath

import numpy as np

from extract.encoders.frozen import FrozenEncoder
from extract.features.cache import SUFFIX, CacheError, read_features, read_header, read_names
from extract.finetuning.config import TileData
from extract.finetuning.tilesets import TilesError, Tileset


def cached_features(data: TileData, tiles: Tileset, encoder: FrozenEncoder) -> np.ndarray:
    """features_ND, float32: an image A/B/x.png of the tiles is the row B/x.png of A.h5.

    Raises:
        TilesError: files or rows are missing, damaged, or of another encoder (all of it).
    """
    assert data.features is not None
    keys = [_key(image, data) for image in tiles.table["image"]]
    features_ND = np.empty((len(keys), encoder.spec.dim), np.float32)
    problems: list[str] = []
    for bag in sorted({bag for bag, _ in keys}):
        rows = [i for i, (of, _) in enumerate(keys) if of == bag]
        try:
            features_ND[rows] = _rows(data.features / f"{bag}{SUFFIX}", [keys[i][1] for i in rows], encoder)
        except CacheError as error:
            problems.append(str(error))
    if problems:
        raise TilesError("features of the tiles cannot be read", problems)
    return features_ND


def _key(image: str, data: TileData) -> tuple[str, str]:
    root = data.folder or (data.csv.parent if data.csv else None)
    path = PurePath(image)
    name = path.relative_to(root).as_posix() if root else image
    bag, slash, rest = name.partition("/")
    return (bag, rest) if slash else (root.resolve().name if root else "", bag)


def _rows(path: Path, names: list[str], encoder: FrozenEncoder) -> np.ndarray:
    """Rows of these names; CacheError where the file or one of them is not there, or another encoder made it."""
    if not path.is_file():
        raise CacheError(f"{path}: no such file. Write it with python -m extract.run on the same tiles")
    header = read_header(path)
    made = (header.provenance.encoder, header.provenance.weights_sha256)
    if made != (encoder.id, encoder.weights_sha256):
        raise CacheError(
            f"{path}: made by {made[0]} ({made[1][:12]}), expected {encoder.id} ({encoder.weights_sha256[:12]})"
        )
    row_of = {name: row for row, name in enumerate(read_names(path) or ())}
    absent = [name for name in names if name not in row_of]
    if absent:
        raise CacheError(f"{path}: no features of {len(absent)} of {len(names)} tiles, the first is {absent[0]}")
    wanted_ND: np.ndarray = read_features(path).astype(np.float32)[[row_of[name] for name in names]]
    return wanted_ND
