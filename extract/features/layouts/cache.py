"""cache: `<id>.h5`, this toolkit's own files, see extract.features.cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extract.features import cache, checksums
from extract.features.cache import Header
from extract.features.deepzoom import deepzoom_to_level0, px_to_deepzoom
from extract.features.layouts.layout import Known, Layout, by_stem, first_readable, with_suffix


class CacheLayout(Layout):
    """This toolkit's own files. Imported features may have coordinates in another frame, see extract.parquet."""

    looks_for = "<id>.h5 with datasets features, coords and attribute schema"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return by_stem(with_suffix(place, ".h5"))

    def wrote(self, place: Path) -> bool:
        return first_readable(with_suffix(place, ".h5"), lambda path, file: "schema" in file.attrs)

    def header(self, slide: str, path: Path) -> Header:
        return cache.read_header(path, verify=self.verify)

    def identity(self, path: Path) -> str:
        return checksums.identity(path) or super().identity(path)

    def features(self, path: Path) -> np.ndarray:
        return cache.read_features(path, verify=self.verify)

    def mapped(self, path: Path) -> np.ndarray:
        return cache.map_features(path, verify=self.verify)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        provenance = cache.read_header(path, verify=self.verify).provenance
        extra = provenance.extra
        if not extra.get("coords_known", True):
            return None
        if extra.get("coords_frame", "level-0") == "level-0":
            return cache.read_coords(path, verify=self.verify)
        address_N3 = self.deepzoom(path)
        if known.deepzoom_levels is None or address_N3 is None:
            return None
        return deepzoom_to_level0(path, address_N3, known.deepzoom_levels, provenance.tile_px)

    def deepzoom(self, path: Path) -> np.ndarray | None:
        provenance = cache.read_header(path, verify=self.verify).provenance
        if "deepzoom_level" not in provenance.extra:
            return None
        coords_N2 = cache.read_coords(path, verify=self.verify)
        level_N = np.broadcast_to(provenance.extra["deepzoom_level"], len(coords_N2))
        return px_to_deepzoom(coords_N2, level_N, provenance.extra["deepzoom_frame_level"], provenance.tile_px)

    def names(self, path: Path) -> tuple[str, ...] | None:
        return cache.read_names(path)
