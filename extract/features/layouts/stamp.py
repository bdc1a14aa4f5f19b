"""stamp: `<extractor>-<hash>/<id>.h5`: feats, coords in microns."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from extract.features.cache import Provenance
from extract.features.errors import CacheError
from extract.features.files import plain_value, text_of, to_px
from extract.features.hdf5 import is_dataset, open_h5
from extract.features.layouts.layout import H5Layout, Known, subfolders


class StampLayout(H5Layout):
    """STAMP. Coordinates are microns from the slide's top-left corner."""

    looks_for = "<extractor>-<hash>/<id>.h5 with datasets feats, coords"
    dataset = "feats"

    def places(self, folder: Path) -> list[Path]:
        return [place for place in [folder, *subfolders(folder)] if self.files(place)]

    def wrote_file(self, path: Path, file: h5py.File) -> bool:
        return "schema" not in file.attrs and is_dataset(file, "feats")

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        attributes = {key: plain_value(value) for key, value in file.attrs.items()}
        kind = text_of(attributes.get("feat_type", "tile"))
        if kind != "tile":
            raise CacheError(f"{path}: expected features of tiles (feat_type tile), got feat_type {kind}")
        tile_px = int(attributes.get("tile_size_px", 0))
        tile_um = self._tile_um(file)
        return Provenance(
            encoder=text_of(attributes.get("extractor", "")),
            tile_px=tile_px,
            mpp=tile_um / tile_px if tile_px else 0.0,
            slide=slide,
            extra={"tile_um": tile_um, "unit": text_of(attributes.get("unit", ""))},
        )

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        with open_h5(path, self.dataset, "coords") as file:
            if known.mpp is None:
                return None
            if not self._tile_um(file):
                unit = text_of(file.attrs.get("unit", ""))
                raise CacheError(f"{path}: expected coords in microns (attribute unit um), got unit {unit!r}")
            return to_px(path, file["coords"][:].astype(np.float64) / known.mpp)

    def _tile_um(self, file: h5py.File) -> float:
        """Side of a tile in microns, 0 when the file's unit is not microns. STAMP 2.0 called it tile_size."""
        if "tile_size_um" in file.attrs:
            return float(file.attrs["tile_size_um"])
        return float(file.attrs.get("tile_size", 0)) if text_of(file.attrs.get("unit", "")) == "um" else 0.0
