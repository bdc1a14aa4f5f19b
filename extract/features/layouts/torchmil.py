"""torchmil: `features/<id>.npy`, `coords/<id>.npy`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import check_coords, check_shape
from extract.features.files import as_stored, header_of, load_npy, to_px
from extract.features.layouts.layout import Known, Layout, by_stem, with_suffix


class TorchmilLayout(Layout):
    """torchmil: arrays of a bag under one name in the sibling folders features, labels and coords."""

    looks_for = "features/<id>.npy (and coords/<id>.npy)"

    def places(self, folder: Path) -> list[Path]:
        return [place for place in (folder / "features", folder) if self.files(place)]

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return by_stem(with_suffix(place, ".npy"))

    def wrote(self, place: Path) -> bool:
        return bool(self.files(place))

    def header(self, slide: str, path: Path) -> Header:
        features_ND = self._array(path)
        self._coords(path, len(features_ND))
        return header_of(path, features_ND, Provenance(encoder="", slide=slide))

    def features(self, path: Path) -> np.ndarray:
        return np.array(self.mapped(path))

    def mapped(self, path: Path) -> np.ndarray:
        return as_stored(self._array(path))

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        coords_N2 = self._coords(path, len(self._array(path)))
        return None if coords_N2 is None else to_px(path, coords_N2)

    def _array(self, path: Path) -> np.ndarray:
        features_ND = load_npy(path)
        check_shape(path, "features", features_ND)
        return features_ND

    def _coords(self, path: Path, n_tiles: int) -> np.ndarray | None:
        beside = path.parent.parent / "coords" / path.name
        if path.parent.name != "features" or not beside.is_file():
            return None
        coords_N2 = load_npy(beside)
        check_coords(beside, coords_N2.shape, n_tiles)
        return coords_N2
