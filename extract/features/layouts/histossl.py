"""histossl: `<id>.<ext>/features.npy`: DeepZoom level, column, row, then features."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.deepzoom import DEEPZOOM_TILE_PX, deepzoom_to_level0, split_deepzoom
from extract.features.errors import check_shape
from extract.features.files import as_stored, header_of, load_json, load_npy, number_in
from extract.features.layouts.layout import SLIDE_EXTENSIONS, Known, Layout, subfolders


class HistoSslLayout(Layout):
    """HistoSSLscaling (Owkin). Some of its folders have metadata.json beside the features, which is used when there."""

    looks_for = "<id>.<slide extension>/features.npy with columns DeepZoom level, column, row, features"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        found = (folder / "features.npy" for folder in subfolders(place))
        return [(self._slide_id(path.parent.name), path) for path in found if path.is_file()]

    def wrote(self, place: Path) -> bool:
        return bool(self.files(place))

    def header(self, slide: str, path: Path) -> Header:
        rows_N3D, metadata = self._rows(path), load_json(path.with_name("metadata.json"))
        provenance = Provenance(
            encoder=str(metadata.get("features_extractor", "")),
            tile_px=int(metadata.get("tile_size", DEEPZOOM_TILE_PX)),
            mpp=number_in(metadata.get("tile_mpp")),
            tile_level0_px=number_in(metadata.get("absolute_tile_size")),
            slide=slide,
        )
        return header_of(path, rows_N3D[:, 3:], provenance)

    def features(self, path: Path) -> np.ndarray:
        return np.ascontiguousarray(self.mapped(path))

    def mapped(self, path: Path) -> np.ndarray:
        return as_stored(self._rows(path)[:, 3:])

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        metadata = load_json(path.with_name("metadata.json"))
        levels = known.deepzoom_levels or len(metadata.get("level_dimensions", ()))
        if not levels:
            return None
        tile_px = int(metadata.get("tile_size", DEEPZOOM_TILE_PX))
        return deepzoom_to_level0(path, self.deepzoom(path), levels, tile_px)

    def deepzoom(self, path: Path) -> np.ndarray:
        return split_deepzoom(self._rows(path), str(path))

    def _rows(self, path: Path) -> np.ndarray:
        rows_N3D = load_npy(path)
        check_shape(path, "DeepZoom address and features", rows_N3D, least_columns=4)
        return rows_N3D

    def _slide_id(self, name: str) -> str:
        stem, dot, extension = name.rpartition(".")
        return stem if f"{dot}{extension}".lower() in SLIDE_EXTENSIONS and stem else name
