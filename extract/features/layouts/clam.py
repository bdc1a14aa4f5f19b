"""clam: `h5_files/<id>.h5`, `pt_files/<id>.pt`: features, coords (level-0 px)."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import CacheError, check_shape
from extract.features.files import as_stored, header_of, load_pt, map_h5
from extract.features.hdf5 import open_h5
from extract.features.layouts.layout import H5Layout, Known, by_stem, with_suffix


class ClamLayout(H5Layout):
    """CLAM: an .h5 and usually a .pt with the same features; a slide that has only a .pt has no coordinates."""

    looks_for = "h5_files/<id>.h5 with datasets features, coords, or pt_files/<id>.pt"
    plain = True

    def files(self, place: Path) -> list[tuple[str, Path]]:
        h5 = with_suffix(place / "h5_files", ".h5") or with_suffix(place, ".h5")
        pt = with_suffix(place / "pt_files", ".pt") or with_suffix(place, ".pt")
        with_h5 = {path.stem for path in h5}
        return by_stem(h5) + by_stem([path for path in pt if path.stem not in with_h5])

    def wrote(self, place: Path) -> bool:
        return all(path.suffix == ".pt" for _, path in self.files(place)) or super().wrote(place)

    def header(self, slide: str, path: Path) -> Header:
        if path.suffix == ".h5":
            return super().header(slide, path)
        features_ND = self._from_pt(path)
        return header_of(path, features_ND, Provenance(encoder="", slide=slide))

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        return Provenance(encoder="", slide=slide)

    def features(self, path: Path) -> np.ndarray:
        return super().features(path) if path.suffix == ".h5" else self._from_pt(path)

    def mapped(self, path: Path) -> np.ndarray:
        if path.suffix == ".pt":
            return self._from_pt(path)
        pt = path.parent.parent / "pt_files" / f"{path.stem}.pt"
        with open_h5(path, "features", "coords") as file:
            features = file["features"]
            if features.chunks is None or path.parent.name != "h5_files" or not pt.is_file():
                return map_h5(path, features)
            mapped_ND = self._from_pt(pt)  # CLAM's .h5 are chunked, its .pt can be mapped
            if mapped_ND.shape != features.shape:
                raise CacheError(f"{pt}: features of shape {mapped_ND.shape}, but {path} has {features.shape}")
            return mapped_ND

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        return super().coords(path, known) if path.suffix == ".h5" else None

    def _from_pt(self, path: Path) -> np.ndarray:
        features_ND = load_pt(path)
        check_shape(path, "features", features_ND)
        return as_stored(features_ND)
