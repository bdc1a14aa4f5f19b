"""atlaspatch: `patches/<id>.h5`: group features/<encoder>, coords (N, 5) [x, y, width, height, level], level-0 px."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import CacheError, check_shape
from extract.features.files import as_stored, header_of, map_h5, number_in, plain_value, to_px
from extract.features.hdf5 import open_h5, own_dataset
from extract.features.layouts.layout import Known, Layout, by_stem, first_readable, with_suffix


class AtlasPatchLayout(Layout):
    """AtlasPatch: one file a slide for coordinates and the features of any number of encoders."""

    looks_for = "patches/<id>.h5 with a group features/<encoder> and dataset coords (N, 5)"

    def places(self, folder: Path) -> list[Path]:
        return [place for place in (folder, folder / "patches") if self.files(place)]

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return by_stem(with_suffix(place, ".h5"))

    def wrote(self, place: Path) -> bool:
        return first_readable([path for _, path in self.files(place)], lambda _, file: _is_group(file))

    def header(self, slide: str, path: Path) -> Header:
        with self._open(path) as (file, encoder, features):
            sources = (*file.attrs.items(), *file["coords"].attrs.items())
            said = {key: plain_value(value) for key, value in sources}
            provenance = Provenance(
                encoder=encoder,
                tile_px=int(number_in(said.get("patch_size"))),
                tile_level0_px=number_in(said.get("patch_size_level0")),
                slide=slide,
                extra={key: said[key] for key in ("target_magnification", "mpp") if key in said},
            )
            return header_of(path, features, provenance)

    def features(self, path: Path) -> np.ndarray:
        with self._open(path) as (_, _, features):
            return as_stored(features[:])

    def mapped(self, path: Path) -> np.ndarray:
        with self._open(path) as (_, _, features):
            return map_h5(path, features)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        with self._open(path) as (file, _, _):
            return to_px(path, file["coords"][:, :2])

    @contextmanager
    def _open(self, path: Path) -> Iterator[tuple[h5py.File, str, Any]]:
        """The file, the one encoder in it, and its features, which fit the coordinates."""
        with open_h5(path) as file:
            if not _is_group(file):
                raise CacheError(f"{path}: expected a group features of AtlasPatch, got {', '.join(file) or 'none'}")
            group = file["features"]
            if len(group) != 1:
                names = ", ".join(group) or "none"
                raise CacheError(
                    f"{path}: features of {len(group)} encoders ({names}), expected one: which one is wanted cannot be "
                    "told. Keep one in a copy of the folder (h5repack, or h5py: del file['features/NAME'])"
                )
            encoder = next(iter(group))
            features, coords = own_dataset(path, group, encoder), own_dataset(path, file, "coords")
            check_shape(path, "features", features)
            if coords.ndim != 2 or coords.shape[1] < 2 or len(coords) != len(features):
                raise CacheError(
                    f"{path}: expected coords of shape ({len(features)}, 5), one row for each row of features, "
                    f"got {tuple(coords.shape)}"
                )
            yield file, encoder, features


def _is_group(file: h5py.File) -> bool:
    if not file.id.links.exists(b"features") or "schema" in file.attrs:
        return False
    own = file.id.links.get_info(b"features").type == h5py.h5l.TYPE_HARD
    return bool(own and h5py.h5o.get_info(file.id, b"features").type == h5py.h5o.TYPE_GROUP)
