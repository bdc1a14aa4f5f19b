"""slideflow: `<id>.pt`, `<id>.index.npz`: coordinates of tile centres, level-0 px."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import check_coords, check_shape
from extract.features.files import as_stored, header_of, load_json, load_npz, load_pt, number_in, to_px
from extract.features.layouts.layout import Known, Layout, by_stem, with_suffix


class SlideflowLayout(Layout):
    """slideflow feature bags. bags_config.json, when there, names the extractor and the tile size."""

    looks_for = "<id>.pt with <id>.index.npz"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return by_stem(with_suffix(place, ".pt"))

    def wrote(self, place: Path) -> bool:
        return bool(with_suffix(place, ".index.npz")) or (place / "bags_config.json").is_file()

    def header(self, slide: str, path: Path) -> Header:
        features_ND, config = self.mapped(path), load_json(path.with_name("bags_config.json"))
        extractor = config.get("extractor")
        tile_px, tile_um = int(number_in(config.get("tile_px"))), number_in(config.get("tile_um"))
        provenance = Provenance(
            encoder=str(extractor.get("class", "")).rpartition(".")[2] if isinstance(extractor, dict) else "",
            tile_px=tile_px,
            mpp=tile_um / tile_px if tile_px else 0.0,
            slide=slide,
            extra={"tile_um": config["tile_um"]} if "tile_um" in config else {},
        )
        return header_of(path, features_ND, provenance)

    def mapped(self, path: Path) -> np.ndarray:
        features_ND = load_pt(path)
        check_shape(path, "features", features_ND)
        return as_stored(features_ND)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        index = path.with_name(f"{path.stem}.index.npz")
        if not index.is_file():
            return None
        centres_N2 = self._centres(index, len(self.mapped(path)))
        tile_um = number_in(load_json(path.with_name("bags_config.json")).get("tile_um"))
        tile_level0_px = known.tile_level0_px
        if tile_level0_px is None and known.mpp and tile_um:
            tile_level0_px = int(tile_um / known.mpp)  # slideflow extracts whole pixels
        if tile_level0_px is None:
            return None
        return to_px(index, centres_N2) - int(np.round(tile_level0_px / 2))  # as slideflow rounds half a tile

    def _centres(self, index: Path, n_tiles: int) -> np.ndarray:
        return load_npz(index, "arr_0", lambda shape: check_coords(index, shape, n_tiles))
