"""LazySlide (wsidata): a SpatialData Zarr folder a slide, with tiles among its shapes and features among its tables.

    SLIDE.zarr/tables/<model>_<tiles>     AnnData: X (N, D); obs/tile_id; attribute region names the tiles
    SLIDE.zarr/shapes/<tiles>             shapes.parquet: tile_id, x, y (or only geometry), level-0 px
    attribute tile_spec of the folder     {<tiles>: height, width, stride_width, mpp, base_downsample, ...}

Arrays are read with the package `zarr` (an extra), and whole: `data.memory=mmap` saves none.

Axes: N tiles, D features, 2 = (x, y).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import DAMAGED, CacheError, check_memory, check_shape
from extract.features.files import as_stored, header_of, number_in, to_px
from extract.features.layouts.layout import Known, Layout, by_stem, subfolders

SUFFIX = ".zarr"
SPEC = "tile_spec"


class LazySlideLayout(Layout):
    """A folder a slide; of its tables the one that belongs to tiles."""

    looks_for = "<id>.zarr with the attribute tile_spec and a table of features (LazySlide, wsidata)"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return by_stem([path for path in subfolders(place, f"*{SUFFIX}") if _metadata(path)])

    def wrote(self, place: Path) -> bool:
        return any(SPEC in _attributes(path) for _, path in self.files(place))

    def identity(self, path: Path) -> str:
        """Of the files that say what the arrays are and of the arrays' own: their sizes and times."""
        table = path / "tables" / self._table(path)[0]
        found = sorted(file for file in (table / "X").rglob("*") if file.is_file())
        return "; ".join(super(LazySlideLayout, self).identity(file) for file in found[:64])

    def header(self, slide: str, path: Path) -> Header:
        name, tiles = self._table(path)
        said = _attributes(path)[SPEC].get(tiles, {})
        side_px, stride_px = (number_in(said.get(key)) for key in ("width", "stride_width"))
        provenance = Provenance(
            encoder=name.removesuffix(f"_{tiles}"),
            tile_px=int(side_px),
            mpp=number_in(said.get("mpp")),
            overlap_px=round(side_px - stride_px) if stride_px else 0,
            tile_level0_px=side_px * number_in(said.get("base_downsample")),
            slide=slide,
        )
        return header_of(path, self.mapped(path), provenance)

    def mapped(self, path: Path) -> np.ndarray:
        name, _ = self._table(path)
        features_ND = _array(path, f"tables/{name}/X")
        check_shape(path, f"tables/{name}/X", features_ND)
        return as_stored(features_ND)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        name, tiles = self._table(path)
        attributes = _attributes(path / "tables" / name)
        ids_N = _array(path, f"tables/{name}/obs/{attributes.get('instance_key', 'tile_id')}")
        corners = _corners(path / "shapes" / tiles / "shapes.parquet")
        absent = [int(number) for number in ids_N if int(number) not in corners]
        if absent or len(ids_N) != len(self.mapped(path)):
            what = f"no tile {absent[0]}" if absent else f"{len(ids_N)} tiles"
            raise CacheError(f"{path}: expected a tile of shapes/{tiles} for each row of tables/{name}, got {what}")
        coords_N2 = np.array([corners[int(number)] for number in ids_N], np.float64).reshape(-1, 2)
        return to_px(path, coords_N2)

    def _table(self, path: Path) -> tuple[str, str]:
        """Name of the one table of features, and of its tiles."""
        specs = _attributes(path).get(SPEC)
        specs = specs if isinstance(specs, dict) else {}
        tables = {table.name: str(_attributes(table).get("region", "")) for table in subfolders(path / "tables")}
        found = {name: tiles for name, tiles in tables.items() if tiles in specs}
        if len(found) != 1:
            names = ", ".join(found or tables) or "none"
            raise CacheError(
                f"{path}: {len(found)} tables of tile features ({names}), expected one: which one is wanted cannot be "
                "told. Keep one in a copy (del wsi.tables['NAME'])"
            )
        return next(iter(found.items()))


def _metadata(folder: Path) -> Path | None:
    """The file with the attributes of a Zarr group: of version 3, or 2."""
    return next((folder / name for name in ("zarr.json", ".zattrs") if (folder / name).is_file()), None)


def _attributes(folder: Path) -> dict[str, Any]:
    """What cannot be read must not hide who wrote the folder: {}."""
    path = _metadata(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    found = content.get("attributes", {}) if path and path.name == "zarr.json" else content
    return found if isinstance(found, dict) else {}


def _array(path: Path, name: str) -> np.ndarray:
    """An array of the folder, whole."""
    try:
        import zarr
    except ModuleNotFoundError:
        raise CacheError(f"{path}: Zarr is read with the package zarr; pip install 'slide-mil[lazyslide]'") from None
    try:
        array = zarr.open_array(str(path / name), mode="r")
        check_memory(path, name, array.nbytes)
        values_N: np.ndarray = np.asarray(array[:])
    except CacheError:
        raise
    except (KeyError, *DAMAGED) as error:  # whatever a codec raises for damaged bytes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CacheError(f"{path}: {name} is not a whole array of numbers ({reason}). Extract it again") from None
    return values_N


def _corners(path: Path) -> Mapping[int, tuple[float, float]]:
    """Top-left corner (x, y) of every tile by its number."""
    import pyarrow.parquet as pq
    from shapely import from_wkb

    try:
        table = pq.read_table(path)
        names = table.column_names
        ids = table.column("tile_id").to_pylist() if "tile_id" in names else range(table.num_rows)
        if {"x", "y"} <= set(names):
            corners = zip(table.column("x").to_pylist(), table.column("y").to_pylist(), strict=True)
            return {int(number): corner for number, corner in zip(ids, corners, strict=True)}
        boxes = [from_wkb(shape).bounds for shape in table.column("geometry").to_pylist()]
        return {int(number): (box[0], box[1]) for number, box in zip(ids, boxes, strict=True)}
    except (KeyError, *DAMAGED) as error:
        raise CacheError(f"{path}: cannot be read as LazySlide's tiles ({error})") from None
