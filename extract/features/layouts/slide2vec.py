"""slide2vec: `tile_embeddings/<id>.pt` or `.npz`, `<id>.meta.json`; `tiles/<id>.coordinates.npz`: x, y (level-0 px)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import CacheError, check_coords, check_shape
from extract.features.files import as_stored, header_of, load_json, load_npz, load_pt, number_in, to_px
from extract.features.layouts.layout import Known, Layout, by_stem, subfolders, with_suffix

TILES = "tile_embeddings"


class Slide2VecLayout(Layout):
    """slide2vec 7: an array a slide and a JSON that names the encoder; coordinates lie in a folder of hs2p's.

    Rows are tiles in the order of the coordinates; an .npz that holds only some of them says which (tile_index).
    """

    looks_for = f"{TILES}/<id>.pt or <id>.npz with <id>.meta.json"

    def places(self, folder: Path) -> list[Path]:
        found = folder / TILES
        candidates = [folder, found, *(subfolders(found) if found.is_dir() else [])]  # a folder a class of annotation
        return [place for place in candidates if self.files(place)]

    def files(self, place: Path) -> list[tuple[str, Path]]:
        named = with_suffix(place, ".pt") + with_suffix(place, ".npz")
        return by_stem([path for path in named if not path.stem.endswith(".coordinates")])

    def wrote(self, place: Path) -> bool:
        kinds = {_json(path).get("artifact_type") for path in with_suffix(place, ".meta.json")[:3]}
        return TILES in kinds

    def header(self, slide: str, path: Path) -> Header:
        features_ND = self.mapped(path)
        said = load_json(path.with_name(f"{path.stem}.meta.json"))
        tiling = load_json(_coordinates(path, ".meta.json")).get("tiling", {})
        tiling = tiling if isinstance(tiling, dict) else {}
        tile_px = int(number_in(tiling.get("requested_tile_size_px", said.get("requested_tile_size_px"))))
        provenance = Provenance(
            encoder=str(said.get("encoder_name", "")),
            tile_px=tile_px,
            mpp=number_in(tiling.get("requested_spacing_um", said.get("requested_spacing_um"))),
            overlap_px=round(number_in(tiling.get("overlap")) * tile_px),  # a share of the tile
            tile_level0_px=number_in(said.get("tile_size_lv0", tiling.get("tile_size_lv0"))),
            slide=slide,
        )
        return header_of(path, features_ND, provenance)

    def mapped(self, path: Path) -> np.ndarray:
        if path.suffix == ".npz":
            features_ND = load_npz(path, "features", lambda shape: None)
        else:
            features_ND = load_pt(path)
        check_shape(path, "features", features_ND)
        return as_stored(features_ND)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        file = _coordinates(path, ".npz")
        if not file.is_file():
            return None
        n_tiles = len(self.mapped(path))
        columns = [load_npz(file, axis, lambda shape: _check_line(file, shape)) for axis in ("x", "y")]
        coords_N2 = np.stack(columns, axis=1)
        if path.suffix == ".npz" and "tile_index" in _names(path):
            rows_N = load_npz(path, "tile_index", lambda shape: _check_line(path, shape))
            if rows_N.dtype.kind not in "iu" or (rows_N < 0).any() or (rows_N >= len(coords_N2)).any():
                raise CacheError(f"{path}: expected tile_index of rows of {file}, 0 to {len(coords_N2) - 1}")
            coords_N2 = coords_N2[rows_N]
        check_coords(file, coords_N2.shape, n_tiles)
        return to_px(file, coords_N2)


def _coordinates(path: Path, ending: str) -> Path:
    """hs2p's file for the features in `path`, whose folder may be that of a class of annotation."""
    parents = [folder for folder in path.parents if folder.name == TILES]
    root = parents[-1].parent if parents else path.parent.parent
    named = f"{path.stem}.coordinates{ending}"
    inside = path.parent.relative_to(root / TILES) if parents else Path()
    return root / "tiles" / inside / named


def _check_line(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise CacheError(f"{path}: expected one number a tile, got shape {shape}")


def _names(path: Path) -> list[str]:
    import zipfile

    with zipfile.ZipFile(path) as archive:  # the caller has read features from it
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _json(path: Path) -> dict[str, object]:
    """A file that cannot be read must not hide who wrote the folder."""
    try:
        return load_json(path)
    except CacheError:
        return {}
