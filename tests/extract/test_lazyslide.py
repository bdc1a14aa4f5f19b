"""LazySlide's Zarr folders, of the documented form and of the real writer (each skipped without its package)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shapely import box, to_wkb

from extract.features.errors import CacheError
from extract.features.folder import open_feature_folder

N, DIM, SIDE_PX = 5, 3, 448
SPEC = {"height": 224, "width": 224, "stride_height": 200, "stride_width": 200, "mpp": 0.5, "base_downsample": 2.0}


def truth(slide: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(slide))
    return rng.normal(size=(N, DIM)).astype(np.float32), rng.integers(0, 9000, (N, 2))


def write(folder: Path, slide: str, *, corners: bool = True, tables: tuple[str, ...] = ("uni_tiles",)) -> Path:
    """What the writer leaves: attributes, the table's matrix and tile numbers, shapes as GeoParquet; rows shuffled."""
    zarr: Any = pytest.importorskip("zarr")
    features_ND, coords_N2 = truth(slide)
    root = zarr.open_group(str(folder / f"{slide}.zarr"), mode="w")
    root.attrs["tile_spec"] = {"tiles": SPEC}
    for name in tables:
        table = root.create_group(f"tables/{name}")
        table.attrs.update({"region": "tiles", "region_key": "library_id", "instance_key": "tile_id"})
        table.create_array("X", data=features_ND)
        table.create_group("obs").create_array("tile_id", data=np.arange(N) + 10)
    root.create_group("tables/cells").attrs["region"] = "cells"
    order = np.random.default_rng(0).permutation(N)
    columns: dict[str, Any] = {"tile_id": order + 10}
    if corners:
        columns |= {"x": coords_N2[order, 0], "y": coords_N2[order, 1]}
    columns["geometry"] = [to_wkb(box(x, y, x + SIDE_PX, y + SIDE_PX)) for x, y in coords_N2[order]]
    root.create_group("shapes/tiles")
    pq.write_table(pa.table(columns), folder / f"{slide}.zarr" / "shapes" / "tiles" / "shapes.parquet")
    return folder


@pytest.mark.parametrize("corners", [True, False])
def test_features_coordinates_and_geometry_come_back(tmp_path: Path, corners: bool):
    write(tmp_path, "a.1", corners=corners)
    folder = open_feature_folder(write(tmp_path, "b", corners=corners))
    assert (folder.layout, list(folder.slides)) == ("lazyslide", ["a.1", "b"])
    for slide in folder.slides:
        features_ND, coords_N2 = truth(slide)
        np.testing.assert_array_equal(folder.features(slide), features_ND)
        np.testing.assert_array_equal(folder.coords(slide), coords_N2)
    said = folder.header("b")
    assert (said.n_tiles, said.dim, said.dtype) == (N, DIM, "float32")
    made = said.provenance
    assert (made.encoder, made.tile_px, made.mpp, made.overlap_px, made.tile_level0_px) == ("uni", 224, 0.5, 24, 448)


def test_what_is_wrong_is_told_with_the_folder(tmp_path: Path):
    folder = open_feature_folder(write(tmp_path, "b", tables=("uni_tiles", "phikon_tiles")))
    with pytest.raises(
        CacheError, match=r"b\.zarr: 2 tables of tile features \(phikon_tiles, uni_tiles\), expected one"
    ):
        folder.features("b")
    write(tmp_path, "b")
    before = folder.identity("b")
    parts = [path for path in (tmp_path / "b.zarr" / "tables" / "uni_tiles" / "X").rglob("*") if path.is_file()]
    chunk = next(path for path in parts if path.name != "zarr.json")
    chunk.write_bytes(b"half")
    assert folder.identity("b") != before
    with pytest.raises(CacheError, match=r"b\.zarr: tables/uni_tiles/X is not a whole array of numbers"):
        folder.features("b")
    write(tmp_path, "b")
    (tmp_path / "b.zarr" / "shapes" / "tiles" / "shapes.parquet").write_bytes(b"half")
    with pytest.raises(CacheError, match=r"shapes\.parquet: cannot be read as LazySlide's tiles"):
        folder.coords("b")


def test_without_zarr_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Attributes are JSON: who wrote the folder is known without the package."""
    table = tmp_path / "b.zarr" / "tables" / "uni_tiles"
    table.mkdir(parents=True)
    (tmp_path / "b.zarr" / "zarr.json").write_text(json.dumps({"attributes": {"tile_spec": {"tiles": SPEC}}}))
    (table / "zarr.json").write_text(json.dumps({"attributes": {"region": "tiles"}}))
    monkeypatch.setitem(sys.modules, "zarr", None)
    folder = open_feature_folder(tmp_path)
    assert folder.layout == "lazyslide"
    with pytest.raises(CacheError, match=r"pip install 'slide-mil\[lazyslide\]'"):
        folder.features("b")


WRITER = """
import sys
import numpy as np
from shapely import Polygon
from wsidata import TileSpec, open_wsi
from wsidata.io import add_features, add_tiles, add_tissues

folder = sys.argv[1]
wsi = open_wsi(folder + "/b.tiff", store=None)
spec = TileSpec.from_wsidata(wsi, tile_px=128, mpp=0.5)
xys = np.array([(x, y) for y in range(0, 300, 128) for x in range(0, 500, 128)])
add_tissues(wsi, "tissues", [Polygon([(0, 0), (600, 0), (600, 400), (0, 400)])])
add_tiles(wsi, "tiles", xys, spec, np.zeros(len(xys), int))
features = np.random.default_rng(0).normal(size=(len(xys), 4)).astype(np.float32)
add_features(wsi, "resnet50_tiles", "tiles", features)
wsi.write(folder + "/b.zarr")
np.savez(folder + "/truth.npz", features=features, xys=xys)
"""


def test_what_the_real_writer_leaves(slides: Any, tmp_path: Path):
    pytest.importorskip("zarr")
    pytest.importorskip("wsidata")
    slides.painted_slide(tmp_path / "b.tiff", 700, 500)
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "truth.npz") as truth:
        folder = open_feature_folder(tmp_path)
        np.testing.assert_array_equal(folder.features("b"), truth["features"])
        np.testing.assert_array_equal(folder.coords("b"), truth["xys"])
    assert folder.header("b").provenance.tile_px == 128
