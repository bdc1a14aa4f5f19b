"""trident: `features_<encoder>/<id>.h5`: features, coords (level-0 px), geometry on coords."""

from __future__ import annotations

from pathlib import Path

import h5py

from extract.features.cache import Provenance
from extract.features.files import plain_value, text_of
from extract.features.layouts.layout import H5Layout, subfolders


class TridentLayout(H5Layout):
    """TRIDENT. Its magnifications are nominal (20x), so microns per pixel stay unknown; they are kept in `extra`."""

    looks_for = "features_<encoder>/<id>.h5 with datasets features, coords and attribute patch_size_level0 on coords"
    kept = ("level0_magnification", "target_magnification", "level0_width", "level0_height")

    def places(self, folder: Path) -> list[Path]:
        candidates = [folder, *subfolders(folder, "features_*"), *subfolders(folder, "*/features_*")]
        return [place for place in candidates if self.files(place)]

    def wrote_file(self, path: Path, file: h5py.File) -> bool:
        if path.parent.name == "h5_files" or not super().wrote_file(path, file):  # CLAM's folder
            return False
        return path.parent.name.startswith("features_") or "patch_size_level0" in file["coords"].attrs

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        attributes = {key: plain_value(value) for key, value in file["coords"].attrs.items()}
        folder_says = path.parent.name.removeprefix("features_") if path.parent.name.startswith("features_") else ""
        return Provenance(
            encoder=text_of(file["features"].attrs.get("encoder", folder_says)),
            tile_px=int(attributes.get("patch_size", 0)),
            overlap_px=int(attributes.get("overlap", 0)),
            tile_level0_px=float(attributes.get("patch_size_level0", 0)),
            slide=slide,
            extra={key: attributes[key] for key in self.kept if key in attributes},
        )
