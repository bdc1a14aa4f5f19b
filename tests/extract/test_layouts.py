"""Folders written here in each tool's format must give back what was written; the truth is the arrays themselves."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import torch
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

import extract.layouts
from extract.config import Features
from extract.features.cache import CacheError, Provenance, write_features
from extract.features.deepzoom import deepzoom_to_px, px_to_deepzoom, split_deepzoom
from extract.features.folder import FeatureFolder, layout_of, open_feature_folder
from extract.features.layouts.layout import Layout, LayoutError
from extract.features.mapping import MappedArray
from extract.layouts import LAYOUTS

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"

DIM = 5
TILE_PX = 224
LEVEL, LEVELS = 12, 14  # a tile is 224 * 2**(13 - 12) = 448 level-0 px wide
TILE_LEVEL0_PX = 448
MPP = 0.25  # of the slide, so a tile is 112 microns wide at 0.5 mpp
SLIDES = {"TCGA-2F-A9KO-01Z-00-DX1.195576CF-B739": 7, "b": 1, "a.1": 12}
"""Slide ids (with dots, not sorted) and their numbers of tiles."""


def truth(slide: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) float32, exact in float16, and coords (N, 2) on a grid of non-square extent."""
    rng = np.random.default_rng([len(slide), SLIDES[slide]])
    features_ND = rng.integers(-100, 100, (SLIDES[slide], DIM)).astype(np.float32) / 8
    columns_rows_N2 = np.column_stack([rng.permutation(90)[: SLIDES[slide]], rng.permutation(40)[: SLIDES[slide]]])
    return features_ND, (columns_rows_N2 * TILE_LEVEL0_PX).astype(np.int32)


def write_cache(root: Path) -> Path:
    for slide in SLIDES:
        write_features(root / f"{slide}.h5", *truth(slide), Provenance("phikon", tile_px=TILE_PX, mpp=0.5, slide=slide))
    return root


def write_h5(
    path: Path, name: str, features_ND: np.ndarray, coords_N2: np.ndarray, *, chunked: bool = False
) -> h5py.File:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = h5py.File(path, "w")
    options = {"maxshape": (None, features_ND.shape[1]), "chunks": (1, features_ND.shape[1])} if chunked else {}
    file.create_dataset(name, data=features_ND, **options)
    file.create_dataset("coords", data=coords_N2)
    return file


def write_clam(root: Path) -> Path:
    (root / "pt_files").mkdir(parents=True)
    for slide in SLIDES:
        write_h5(root / "h5_files" / f"{slide}.h5", "features", *truth(slide), chunked=True).close()
        torch.save(torch.from_numpy(truth(slide)[0]), root / "pt_files" / f"{slide}.pt")
    return root


def write_trident(root: Path) -> Path:
    job = root / "20x_224px_0px_overlap"
    write_h5(job / "patches" / "b_patches.h5", "other", *truth("b")).close()
    geometry = {"patch_size": 224, "patch_size_level0": 448, "overlap": 0, "target_magnification": 20}
    for slide in SLIDES:
        path = job / "features_uni_v1" / f"{slide}.h5"
        features_ND, coords_N2 = truth(slide)
        with write_h5(path, "features", features_ND, coords_N2.astype(np.int64)) as file:
            file["features"].attrs.update({"name": slide, "encoder": "uni_v1"})
            file["coords"].attrs.update(geometry)
    return root


def write_stamp(root: Path) -> Path:
    geometry = {"unit": "um", "tile_size_um": 112.0, "tile_size_px": 224}
    for slide in SLIDES:
        path = root / "ctranspath-7c998680" / f"{slide}.h5"
        features_ND, coords_N2 = truth(slide)
        with write_h5(path, "feats", features_ND.astype(np.float16), (coords_N2 * MPP).astype(np.float32)) as file:
            file.attrs.update({"extractor": "ctranspath", "feat_type": "tile"} | geometry)
    return root


def write_histossl(root: Path) -> Path:
    for slide, extension in zip(SLIDES, (".svs", ".TIFF", ""), strict=True):
        features_ND, coords_N2 = truth(slide)
        address_N3 = np.column_stack([np.full(len(coords_N2), LEVEL), coords_N2 // TILE_LEVEL0_PX])
        (root / f"{slide}{extension}").mkdir(parents=True)
        rows_N3D = np.hstack([address_N3, features_ND]).astype(np.float32)
        np.save(root / f"{slide}{extension}" / "features.npy", rows_N3D)
    return root


def write_torchmil(root: Path) -> Path:
    for name in ("features", "coords", "labels"):
        (root / name).mkdir(parents=True)
    for slide in SLIDES:
        features_ND, coords_N2 = truth(slide)
        np.save(root / "features" / f"{slide}.npy", features_ND)
        np.save(root / "coords" / f"{slide}.npy", coords_N2)
        np.save(root / "labels" / f"{slide}.npy", np.array([1]))
    return root


def write_slideflow(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    for slide in SLIDES:
        features_ND, coords_N2 = truth(slide)
        torch.save(torch.from_numpy(features_ND), root / f"{slide}.pt")
        np.savez(root / f"{slide}.index.npz", coords_N2 + TILE_LEVEL0_PX // 2)
    extractor = {"class": "slideflow.model.extractors.retccl.RetCCLFeatures"}
    config = {"extractor": extractor, "tile_px": 224, "tile_um": 112}
    (root / "bags_config.json").write_text(json.dumps(config))
    return root


def write_slide2vec(root: Path) -> Path:
    (root / "tile_embeddings").mkdir(parents=True)
    (root / "tiles").mkdir()
    for slide in SLIDES:
        features_ND, coords_N2 = truth(slide)
        torch.save(torch.from_numpy(features_ND), root / "tile_embeddings" / f"{slide}.pt")
        said = {"sample_id": slide, "artifact_type": "tile_embeddings", "encoder_name": "phikon", "tile_size_lv0": 448}
        (root / "tile_embeddings" / f"{slide}.meta.json").write_text(json.dumps(said))
        columns = {"tile_index": np.arange(len(coords_N2), dtype=np.int32), "x": coords_N2[:, 0], "y": coords_N2[:, 1]}
        np.savez_compressed(root / "tiles" / f"{slide}.coordinates.npz", **columns)
        tiling = {"requested_tile_size_px": 224, "requested_spacing_um": 0.5, "tile_size_lv0": 448, "overlap": 0.0}
        (root / "tiles" / f"{slide}.coordinates.meta.json").write_text(json.dumps({"tiling": tiling}))
    return root


def write_atlaspatch(root: Path) -> Path:
    (root / "patches").mkdir(parents=True)
    for slide in SLIDES:
        features_ND, coords_N2 = truth(slide)
        geometry_N3 = np.tile([TILE_PX, TILE_PX, 1], (len(coords_N2), 1))
        with h5py.File(root / "patches" / f"{slide}.h5", "w") as file:
            file["features/uni_v1"] = features_ND
            file["coords"] = np.hstack([coords_N2, geometry_N3]).astype(np.int32)
            file.attrs.update({"patch_size": 224, "patch_size_level0": 448, "target_magnification": 20})
    return root


def write_eva(root: Path) -> Path:
    """As its writer for whole slides does: tile by tile in a list."""
    root.mkdir(exist_ok=True)
    rows = ["origin,embeddings,target,split"]
    for slide in SLIDES:
        torch.save([torch.from_numpy(row_D) for row_D in truth(slide)[0]], root / f"{slide}.pt")
        rows.append(f"{slide}.tif,{slide}.pt,1,train")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "cache": write_cache,
    "clam": write_clam,
    "trident": write_trident,
    "stamp": write_stamp,
    "histossl": write_histossl,
    "torchmil": write_torchmil,
    "slideflow": write_slideflow,
    "slide2vec": write_slide2vec,
    "atlaspatch": write_atlaspatch,
    "eva": write_eva,
}
NO_COORDS = {"eva"}
IN_MEMORY = {"eva"}
"""Layouts whose files cannot be memory-mapped."""
DATASETS = {"stamp": "feats", "atlaspatch": "features/uni_v1"}
KNOWN: dict[str, dict[str, typing.Any]] = {
    "stamp": {"mpp": MPP},
    "histossl": {"deepzoom_levels": LEVELS},
    "slideflow": {"tile_level0_px": TILE_LEVEL0_PX},
}
HEADERS = {  # encoder, tile_px, mpp, tile_level0_px
    "cache": ("phikon", 224, 0.5, 0),
    "clam": ("", 0, 0, 0),
    "trident": ("uni_v1", 224, 0, 448),
    "stamp": ("ctranspath", 224, 0.5, 0),
    "histossl": ("", 224, 0, 0),
    "torchmil": ("", 0, 0, 0),
    "slideflow": ("RetCCLFeatures", 224, 0.5, 0),
    "slide2vec": ("phikon", 224, 0.5, 448),
    "atlaspatch": ("uni_v1", 224, 0, 448),
    "eva": ("", 0, 0, 0),
}
every_layout = pytest.mark.parametrize("layout", list(WRITERS))


def one_file(folder: FeatureFolder) -> Path:
    return folder.path("b")


def known_coords(folder: FeatureFolder, slide: str) -> np.ndarray:
    """Coordinates, with what the layout cannot know by itself given."""
    coords_N2 = folder.coords(slide, **KNOWN.get(folder.layout, {}))
    assert coords_N2 is not None
    return coords_N2


def known_coords_of(folder: FeatureFolder) -> Callable[[str], object]:
    return lambda slide: folder.coords(slide, **KNOWN.get(folder.layout, {}))


# --- the battery: every layout -------------------------------------------------------------------------------------


def test_the_table_is_what_the_config_accepts():
    accepted = typing.get_args(Features.model_fields["layout"].annotation)
    assert set(accepted) == {"auto", *LAYOUTS} == {"auto", *WRITERS, "lazyslide"}  # test_lazyslide.py


FAKE_FILE = """
import h5py
import numpy as np

from extract.features.cache import Provenance
from extract.features.layouts.layout import H5Layout


class FakeLayout(H5Layout):
    looks_for = "<id>.h5 with datasets features, coords and attribute made_by_fake"

    def wrote_file(self, path, file):
        return super().wrote_file(path, file) and "made_by_fake" in file.attrs

    def provenance(self, slide, path, file):
        return Provenance(encoder="fake", slide=slide)
"""
FAKE_LINE = '    "fake": "extract.features.layouts.fake:FakeLayout",\n'
USES_FAKE = """
import json, sys
from pathlib import Path
import extract.layouts
from extract.config import ConfigError, ExtractConfig, help_text, load_config
from extract.features.folder import open_feature_folder

assert extract.layouts.__file__.startswith(str(Path.cwd())), "the copy, not the installed one"
config = load_config(ExtractConfig, [f"features.folder={sys.argv[1]}", "features.layout=fake"])
try:
    load_config(ExtractConfig, ["features.layout=fakd"])
except ConfigError as error:
    print(json.dumps(str(error)))
print(json.dumps([line for line in help_text(ExtractConfig).splitlines() if "features.layout" in line]))
for layout in ("auto", config.features.layout):
    folder = open_feature_folder(Path(sys.argv[1]), layout)
    print(json.dumps([folder.layout, folder.header("b").provenance.encoder, folder.mapped("b").tolist()]))
"""


def test_a_tool_is_one_file_and_one_line(tmp_path):
    """In a copy of the package. The files look like CLAM's, which steps back for a tool that knows its own mark."""
    root = Path(extract.layouts.__file__).parent
    shutil.copytree(root, tmp_path / "extract", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "extract" / "features" / "layouts" / "fake.py").write_text(FAKE_FILE, encoding="utf-8")
    table = tmp_path / "extract" / "layouts.py"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text("".join([*lines[:-1], FAKE_LINE, lines[-1]]), encoding="utf-8")
    features_ND, coords_N2 = truth("b")
    with write_h5(tmp_path / "data" / "b.h5", "features", features_ND, coords_N2) as file:
        file.attrs["made_by_fake"] = True
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", USES_FAKE, str(tmp_path / "data")]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    problem, shown, detected, asked = map(json.loads, done.stdout.splitlines())
    assert "features.layout" in problem
    assert "did you mean 'fake'" in problem
    assert (
        "auto|cache|clam|trident|stamp|histossl|torchmil|slideflow|slide2vec|atlaspatch|eva|lazyslide|fake" in shown[0]
    )
    assert detected == asked == ["fake", "fake", features_ND.tolist()]
    assert open_feature_folder(tmp_path / "data").layout == "clam", "without the line"


def test_each_line_of_the_table_is_a_file_of_its_own():
    modules = [where.partition(":")[0] for where in LAYOUTS.values()]
    assert len(set(modules)) == len(modules)
    assert all(isinstance(layout_of(name), Layout) for name in LAYOUTS)


@every_layout
@pytest.mark.parametrize("asked", ["auto", "by name"])
def test_features_and_coords_come_back(layout, asked, tmp_path):
    folder = open_feature_folder(WRITERS[layout](tmp_path / "f"), "auto" if asked == "auto" else layout)
    assert folder.layout == layout
    assert list(folder.slides) == sorted(SLIDES)
    for slide in SLIDES:
        features_ND, coords_N2 = truth(slide)
        assert folder.path(slide).is_file()
        for read_ND in (folder.features(slide), folder.mapped(slide)):
            np.testing.assert_array_equal(read_ND, features_ND)
            assert read_ND.dtype == (np.float16 if layout in ("cache", "stamp") else np.float32)
        if layout in NO_COORDS:
            assert folder.coords(slide) is None
            continue
        read_N2 = known_coords(folder, slide)
        assert read_N2.dtype == np.int32
        np.testing.assert_array_equal(read_N2, coords_N2)


@every_layout
def test_header_says_what_the_format_knows_and_agrees_with_the_features(layout, tmp_path):
    folder = open_feature_folder(WRITERS[layout](tmp_path / "f"))
    for slide, n_tiles in SLIDES.items():
        header = folder.header(slide)
        assert (header.path, header.n_tiles, header.dim) == (folder.slides[slide], n_tiles, DIM)
        assert header.dtype == folder.features(slide).dtype.name
        provenance = header.provenance
        assert provenance.slide == slide
        assert (provenance.encoder, provenance.tile_px, provenance.mpp, provenance.tile_level0_px) == HEADERS[layout]


@pytest.mark.parametrize("layout", [layout for layout in WRITERS if layout not in IN_MEMORY])
def test_mapped_is_a_memory_map(layout, tmp_path):
    folder = open_feature_folder(WRITERS[layout](tmp_path / "f"))
    mapped_ND = folder.mapped("b")
    assert isinstance(mapped_ND, MappedArray)
    if sys.platform.startswith("linux"):
        assert str(tmp_path / "f") in Path("/proc/self/maps").read_text()
        assert not [fd for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(fd)]
    del mapped_ND


@every_layout
def test_hidden_and_half_written_files_are_not_slides(layout, tmp_path):
    root = WRITERS[layout](tmp_path / "f")
    folder = open_feature_folder(root)
    if layout == "histossl":
        for name in (".b.svs", "b.svs.partial", "c.tmp"):
            (root / name).mkdir()
            (root / name / "features.npy").write_bytes(b"half")
    else:
        path = one_file(folder)
        names = (f".{path.name}", f"{path.name}.partial", f"{path.name}.tmp", f"c.partial{path.suffix}")
        for name in (*names, ".c.h5.host.1.partial"):
            path.with_name(name).write_bytes(b"half")
    assert open_feature_folder(root).slides == folder.slides
    assert open_feature_folder(root, layout).slides == folder.slides


@every_layout
def test_truncated_file_is_named_and_does_not_hide_the_layout(layout, tmp_path):
    root = WRITERS[layout](tmp_path / "f")
    first = open_feature_folder(root)
    slide = sorted(SLIDES)[0]
    path = first.path(slide)
    path.write_bytes(path.read_bytes()[:-20])
    folder = open_feature_folder(root)
    assert (folder.layout, folder.slides) == (layout, first.slides)
    for read in (folder.header, folder.features, folder.mapped):
        with pytest.raises(CacheError, match=rf"{path.name}.*(truncated|not a whole)"):
            read(slide)


@every_layout
def test_random_damage_is_read_or_named(layout, tmp_path):
    """Seeded: bits flipped anywhere, also in the end of a zip. Other tools' files have no checksums."""
    folder, rng = open_feature_folder(WRITERS[layout](tmp_path / "f")), np.random.default_rng(5)
    path = folder.path("a.1")
    whole, ends = path.read_bytes(), Counter[str]()
    for number in range(60):
        damaged = bytearray(whole)
        damaged[-1 - rng.integers(len(whole) if number % 2 else 60)] ^= 1 << rng.integers(8)
        path.unlink()  # a map of the former bytes may be alive
        path.write_bytes(damaged)
        for read in (folder.header, folder.features, folder.mapped, known_coords_of(folder)):
            try:
                read("a.1")
                ends["read"] += 1
            except CacheError as error:
                ends["named" if str(tmp_path) in str(error) else "without a name"] += 1
    assert ends["named"] > 0
    assert not ends["without a name"]


@every_layout
def test_wrong_shape_says_expected_and_got(layout, tmp_path):
    folder = open_feature_folder(WRITERS[layout](tmp_path / "f"))
    path = one_file(folder)
    flat_N = np.arange(6, dtype=np.float32)
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            name = DATASETS.get(layout, "features")
            del file[name]
            file[name] = flat_N
            file.attrs.pop("checksums", None)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(flat_N), path)
    else:
        np.save(path, flat_N)
    for read in (folder.header, folder.features, folder.mapped, *([] if layout in NO_COORDS else [folder.coords])):
        with pytest.raises(CacheError, match=rf"{path.name}: expected .*shape .*got \(6,\)"):
            read("b", **(KNOWN.get(layout, {}) if read == folder.coords else {}))


@pytest.mark.parametrize(
    "layout", ["cache", "clam", "trident", "stamp", "torchmil", "slideflow", "slide2vec", "atlaspatch"]
)
def test_coords_of_another_length_are_refused(layout, tmp_path):
    folder = open_feature_folder(WRITERS[layout](tmp_path / "f"))
    path = one_file(folder)
    short_N2 = np.zeros((3, 2), np.float32)
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            del file["coords"]
            file["coords"] = short_N2
            file.attrs.pop("checksums", None)
    elif layout == "torchmil":
        np.save(path.parent.parent / "coords" / path.name, short_N2)
    elif layout == "slide2vec":
        np.savez(path.parent.parent / "tiles" / "b.coordinates.npz", x=short_N2[:, 0], y=short_N2[:, 1])
    else:
        np.savez(path.with_name("b.index.npz"), short_N2)
    with pytest.raises(CacheError, match=r"b\..*expected coords of shape \(1, [25]\).*got \(3, 2\)"):
        folder.coords("b", **KNOWN.get(layout, {}))


@every_layout
def test_unknown_slide_names_the_nearest(layout, tmp_path):
    folder = open_feature_folder(WRITERS[layout](tmp_path / "f"))
    with pytest.raises(CacheError, match=r"no features of slide 'TCGA-2F-A9KO-01Z-00-DX1'; did you mean 'TCGA-2F-A9KO"):
        folder.features("TCGA-2F-A9KO-01Z-00-DX1")


@every_layout
def test_a_slide_without_tiles_is_read(layout, tmp_path):
    folder = open_feature_folder(WRITERS[layout](tmp_path / "f"))
    path = one_file(folder)
    none_ND, none_N2 = np.empty((0, DIM), np.float32), np.empty((0, 2), np.int32)
    if layout == "cache":
        write_features(path, none_ND, none_N2, Provenance("phikon", slide="b"))
    elif path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            for name, value in ((DATASETS.get(layout, "features"), none_ND), ("coords", none_N2)):
                del file[name]
                file[name] = value
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(none_ND), path)
        np.savez(path.with_name("b.index.npz"), none_N2)
        if layout == "slide2vec":
            np.savez(path.parent.parent / "tiles" / "b.coordinates.npz", x=none_N2[:, 0], y=none_N2[:, 1])
    else:
        np.save(path, np.empty((0, 3 + DIM), np.float32) if layout == "histossl" else none_ND)
        if layout == "torchmil":
            np.save(path.parent.parent / "coords" / path.name, none_N2)
    assert folder.header("b").n_tiles == 0
    assert folder.features("b").shape == folder.mapped("b").shape == (0, DIM)
    assert layout in NO_COORDS or known_coords(folder, "b").shape == (0, 2)


# --- frames of coordinates -----------------------------------------------------------------------------------------


def test_deepzoom_addresses_agree_with_openslide():
    generator = DeepZoomGenerator(openslide.ImageSlide(Image.new("RGB", (3001, 1807))), tile_size=224, overlap=0)
    level = generator.level_count - 3
    columns, rows = generator.level_tiles[level]
    address_N3 = np.array([(level, column, row) for row in range(rows) for column in range(columns)], np.int32)
    expected_N2 = [generator.get_tile_coordinates(level, (column, row))[0] for _, column, row in address_N3.tolist()]
    coords_N2 = deepzoom_to_px(address_N3, generator.level_count - 1)
    assert len(address_N3) > 6
    np.testing.assert_array_equal(coords_N2, expected_N2)
    np.testing.assert_array_equal(px_to_deepzoom(coords_N2, address_N3[:, 0], generator.level_count - 1), address_N3)


def test_split_deepzoom_refuses_columns_that_are_features():
    rows_N3D = np.array([[16, 3, 4, 0.1], [16, 3.5, 4, 0.1]], np.float32)
    np.testing.assert_array_equal(split_deepzoom(rows_N3D[:1], "x"), [[16, 3, 4]])
    with pytest.raises(CacheError, match=r"x: expected DeepZoom.*\[16.0, 3.5, 4.0\] for tile 1"):
        split_deepzoom(rows_N3D, "x")
    with pytest.raises(CacheError, match="whole numbers"):
        split_deepzoom(np.full((1, 4), np.nan, np.float32), "x")


@pytest.mark.parametrize("layout", ["stamp", "histossl", "slideflow"])
def test_coords_are_none_rather_than_guessed(layout, tmp_path):
    assert open_feature_folder(WRITERS[layout](tmp_path / "f")).coords("b") is None


def test_slideflow_coords_from_the_slides_mpp(tmp_path):
    folder = open_feature_folder(write_slideflow(tmp_path / "f"))
    np.testing.assert_array_equal(folder.coords("a.1", mpp=MPP), truth("a.1")[1])


def test_stamp_coords_not_in_microns_are_refused(tmp_path):
    folder = open_feature_folder(write_stamp(tmp_path / "f"))
    with h5py.File(one_file(folder), "r+") as file:
        del file.attrs["tile_size_um"]
        file.attrs["unit"] = "px"
    with pytest.raises(CacheError, match=r"b\.h5: expected coords in microns.*got unit 'px'"):
        folder.coords("b", mpp=MPP)


def test_stamp_2_0_tile_size_is_in_microns(tmp_path):
    folder = open_feature_folder(write_stamp(tmp_path / "f"))
    with h5py.File(one_file(folder), "r+") as file:
        file.attrs["tile_size"] = file.attrs["tile_size_um"]
        del file.attrs["tile_size_um"]
    assert folder.header("b").provenance.mpp == 0.5
    np.testing.assert_array_equal(folder.coords("b", mpp=MPP), truth("b")[1])


def test_stamp_features_of_whole_slides_are_refused(tmp_path):
    folder = open_feature_folder(write_stamp(tmp_path / "f"))
    with h5py.File(one_file(folder), "r+") as file:
        file.attrs["feat_type"] = "slide"
    with pytest.raises(CacheError, match=r"b\.h5: expected features of tiles.*got feat_type slide"):
        folder.header("b")


def test_histossl_keeps_addresses_and_reads_metadata_beside_them(tmp_path):
    folder = open_feature_folder(write_histossl(tmp_path / "f"))
    coords_N2 = truth("a.1")[1]
    address_N3 = folder.deepzoom("a.1")
    assert address_N3 is not None
    np.testing.assert_array_equal(address_N3[:, 0], LEVEL)
    np.testing.assert_array_equal(address_N3[:, 1:] * TILE_LEVEL0_PX, coords_N2)
    metadata = {
        "features_extractor": "WideResNetCOAD",
        "level": LEVEL,
        "tile_size": 224,
        "tile_mpp": 0.4552,
        "absolute_tile_size": 448,
        "level_dimensions": {str(i): [2**i, 2**i] for i in range(LEVELS)},
    }
    folder.path("a.1").with_name("metadata.json").write_text(json.dumps(metadata))
    np.testing.assert_array_equal(folder.coords("a.1"), coords_N2)
    provenance = folder.header("a.1").provenance
    assert (provenance.encoder, provenance.mpp, provenance.tile_level0_px) == ("WideResNetCOAD", 0.4552, 448)


def test_deepzoom_levels_of_another_slide_are_refused(tmp_path):
    folder = open_feature_folder(write_histossl(tmp_path / "f"))
    with pytest.raises(CacheError, match=r"DeepZoom level 12, but a slide of 12 DeepZoom levels ends at 11"):
        folder.coords("b", deepzoom_levels=12)


def test_clam_with_pt_files_only_has_features_without_coords(tmp_path):
    root = write_clam(tmp_path / "f")
    for path in (root / "h5_files").glob("*.h5"):
        path.unlink()
    for opened in (root, root / "pt_files"):
        folder = open_feature_folder(opened)
        assert (folder.layout, list(folder.slides)) == ("clam", sorted(SLIDES))
        np.testing.assert_array_equal(folder.features("a.1"), truth("a.1")[0])
        assert folder.coords("a.1") is None


def test_clam_pt_that_disagrees_with_its_h5_is_refused(tmp_path):
    root = write_clam(tmp_path / "f")
    torch.save(torch.zeros(3, DIM), root / "pt_files" / "b.pt")
    with pytest.raises(CacheError, match=r"b\.pt: features of shape \(3, 5\), but .*b\.h5 has \(1, 5\)"):
        open_feature_folder(root).mapped("b")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(np.dtype(">f4"), np.float32), (np.dtype("float64"), np.float32), (np.dtype("float16"), np.float16)],
)
def test_other_float_types_are_converted(stored, expected, tmp_path):
    features_ND, coords_N2 = truth("a.1")
    write_h5(tmp_path / "a.1.h5", "features", features_ND.astype(stored), coords_N2).close()
    folder = open_feature_folder(tmp_path, "clam")
    for read_ND in (folder.features("a.1"), folder.mapped("a.1")):
        assert read_ND.dtype == expected
        np.testing.assert_array_equal(read_ND, features_ND)
    assert folder.header("a.1").dtype == np.dtype(expected).name


def test_bfloat16_tensors_become_float32(tmp_path):
    torch.save(torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16), tmp_path / "a.pt")
    np.testing.assert_array_equal(open_feature_folder(tmp_path).features("a"), np.array([[0.5, 2.0]], np.float32))


def test_integers_are_not_features(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 3), np.int64))
    with pytest.raises(CacheError, match=r"a\.npy: expected features in floating point, got int64"):
        open_feature_folder(tmp_path).features("a")


def test_pt_files_that_could_run_code_are_refused(tmp_path):
    torch.save({"features": Path("x")}, tmp_path / "a.pt")
    torch.save([torch.zeros(2, 3)], tmp_path / "b.pt")
    folder = open_feature_folder(tmp_path)
    with pytest.raises(CacheError, match=r"a\.pt: not a whole \.pt file of a tensor"):
        folder.features("a")
    with pytest.raises(CacheError, match=r"b\.pt: expected one tensor, got list"):
        folder.features("b")


def test_npy_of_objects_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CacheError, match=r"a\.npy: not a whole \.npy file of numbers"):
        open_feature_folder(tmp_path).header("a")


# --- detection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "inside"),
    [
        ("clam", "h5_files"),
        ("trident", "20x_224px_0px_overlap"),
        ("trident", "20x_224px_0px_overlap/features_uni_v1"),
        ("stamp", "ctranspath-7c998680"),
        ("torchmil", "features"),
    ],
)
def test_the_inner_folder_may_be_given_too(layout, inside, tmp_path):
    root = WRITERS[layout](tmp_path / "f")
    outer, inner = open_feature_folder(root), open_feature_folder(root / inside)
    assert (inner.layout, inner.slides) == (layout, outer.slides)


def test_several_encoders_are_listed_not_chosen(tmp_path):
    root = write_trident(tmp_path / "f")
    job = root / "20x_224px_0px_overlap"
    (job / "features_uni_v1").rename(job / "features_a")
    write_trident(root)
    for layout in ("auto", "trident"):
        with pytest.raises(LayoutError, match="several kinds") as caught:
            open_feature_folder(root, layout)
        assert f"features.folder={job / 'features_a'} features.layout=trident" in str(caught.value)
        assert str(job / "features_uni_v1") in str(caught.value)


@pytest.mark.parametrize("layout", ["auto", *WRITERS])
def test_missing_empty_and_foreign_folders_say_what_is_there(layout, tmp_path):
    with pytest.raises(LayoutError, match=r"nowhere: no such folder"):
        open_feature_folder(tmp_path / "nowhere", layout)
    (tmp_path / "file.csv").write_text("x")
    with pytest.raises(LayoutError, match=r"file\.csv: is a file, expected a folder"):
        open_feature_folder(tmp_path / "file.csv", layout)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayoutError, match=r"empty: no features found. It holds nothing. Looked for"):
        open_feature_folder(tmp_path / "empty", layout)
    (tmp_path / "inner").mkdir()
    with pytest.raises(LayoutError, match=r"It holds 1 \.csv file, sub-folders empty, inner"):
        open_feature_folder(tmp_path, layout)


def test_folder_of_broken_files_shows_why(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"not hdf5")
    with pytest.raises(LayoutError, match=r"1 \.h5 file, a\.h5, which cannot be read \(.*signature"):
        open_feature_folder(tmp_path)


def test_unknown_layout_names_the_nearest(tmp_path):
    with pytest.raises(LayoutError, match=r"'trydent' is not one of auto, cache, .*did you mean 'trident'"):
        open_feature_folder(tmp_path, "trydent")


def test_two_files_for_one_slide_are_refused(tmp_path):
    root = write_histossl(tmp_path / "f")
    (root / "b.svs").mkdir()
    np.save(root / "b.svs" / "features.npy", np.zeros((1, 3 + DIM), np.float32))
    with pytest.raises(LayoutError, match=r"b.*2 files for slide 'b'; keep one"):
        open_feature_folder(root)


def test_torch_is_not_needed_to_open_a_folder(python):
    heavy = "('torch', 'pandas', 'pyarrow', 'huggingface_hub')"
    code = (
        "import sys, extract.features.folder, extract.features.parquet; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- real data -----------------------------------------------------------------------------------------------------


def test_real_features_file_without_coords_is_explained():
    """MoPaDi's file looks like CLAM's but has no coords: it fits no layout, and the message shows its datasets."""
    folder = SHARED / "slide_features" / "TCGA-3X-AAVA-01Z-00-DX1"
    if not folder.is_dir():
        pytest.skip("real data are not here")
    with pytest.raises(LayoutError, match=r"6 \.jpg files.*features\.h5 with datasets features, metadata"):
        open_feature_folder(folder)
    opened = open_feature_folder(folder, "clam")
    with pytest.raises(CacheError, match=r"features\.h5: expected datasets features, coords, got features, metadata"):
        opened.features("features")


# --- what only some tools have ---------------------------------------------------------------------------------------


def test_slide2vec_npz_with_some_of_the_tiles(tmp_path):
    root = write_slide2vec(tmp_path)
    features_ND, coords_N2 = truth("a.1")
    (root / "tile_embeddings" / "a.1.pt").unlink()
    rows_N = np.array([4, 0, 9])
    np.savez_compressed(root / "tile_embeddings" / "a.1.npz", features=features_ND[rows_N], tile_index=rows_N)
    folder = open_feature_folder(root)
    np.testing.assert_array_equal(folder.features("a.1"), features_ND[rows_N])
    np.testing.assert_array_equal(folder.coords("a.1"), coords_N2[rows_N])
    assert folder.header("a.1").n_tiles == 3
    np.savez_compressed(root / "tile_embeddings" / "a.1.npz", features=features_ND[rows_N], tile_index=[0, 1, 12])
    with pytest.raises(CacheError, match=r"tile_index of rows of .*a\.1\.coordinates\.npz, 0 to 11"):
        folder.coords("a.1")


def test_slide2vec_features_of_a_class_of_annotation(tmp_path):
    root = write_slide2vec(tmp_path)
    for kind in ("tile_embeddings", "tiles"):
        (root / kind / "tumour").mkdir()
        for path in [path for path in (root / kind).iterdir() if path.is_file()]:
            path.rename(root / kind / "tumour" / path.name)
    folder = open_feature_folder(root)
    assert folder.folder == root / "tile_embeddings" / "tumour"
    np.testing.assert_array_equal(folder.coords("b"), truth("b")[1])


def test_atlaspatch_with_two_encoders_is_refused_by_name(tmp_path):
    root = write_atlaspatch(tmp_path)
    with h5py.File(root / "patches" / "b.h5", "r+") as file:
        file["features/phikon"] = truth("b")[0]
    with pytest.raises(CacheError, match=r"features of 2 encoders \(phikon, uni_v1\), expected one"):
        open_feature_folder(root).features("b")


def test_eva_with_whole_tensors_and_names_that_leave_the_folder(tmp_path):
    root = write_eva(tmp_path / "f")
    torch.save(torch.from_numpy(truth("a.1")[0]), root / "a.1.pt")
    torch.save(torch.from_numpy(truth("b")[0]), tmp_path / "outside.pt")
    with (root / "manifest.csv").open("a") as file:
        file.write("x.tif,../outside.pt,0,train\n/etc/y.tif,/etc/y.pt,0,train\n")
    folder = open_feature_folder(root)
    assert list(folder.slides) == sorted(SLIDES)
    np.testing.assert_array_equal(folder.features("a.1"), truth("a.1")[0])


# --- files of the tools' own writers, where they are installed -----------------------------------------------------


@pytest.mark.parametrize("output_format", ["pt", "npz"])
def test_slide2vecs_own_writer(output_format, tmp_path):
    artifacts = pytest.importorskip("slide2vec.artifacts", reason="slide2vec is not installed")
    for slide in SLIDES:
        said = {"encoder_name": "phikon", "tile_size_lv0": 448, "requested_tile_size_px": 224}
        artifacts.write_tile_embeddings(
            slide, truth(slide)[0], output_dir=tmp_path, output_format=output_format, metadata=said
        )
    folder = open_feature_folder(tmp_path)
    assert folder.layout == "slide2vec"
    for slide in SLIDES:
        np.testing.assert_array_equal(folder.features(slide), truth(slide)[0])
        provenance = folder.header(slide).provenance
        assert (provenance.encoder, provenance.tile_px, provenance.tile_level0_px) == ("phikon", 224, 448)


def test_evas_own_writer(tmp_path):
    writer = pytest.importorskip(
        "eva.core.callbacks.writers.embeddings.classification", reason="kaiko-eva is not installed"
    )
    manifests = pytest.importorskip("eva.core.callbacks.writers.embeddings._manifest")
    manifest = manifests.ManifestManager(str(tmp_path))
    for slide in SLIDES:
        buffers = []
        for row_D in torch.from_numpy(truth(slide)[0]):
            torch.save(row_D.clone(), buffer := io.BytesIO())
            buffers.append(buffer)
        writer._save_predictions(buffers[:3], str(tmp_path / f"{slide}.pt"), True)
        if buffers[3:]:
            writer._save_predictions(buffers[3:], str(tmp_path / f"{slide}.pt"), False)
        manifest.update(f"{slide}.tif", f"{slide}.pt", 1, "train")
    manifest.close()
    folder = open_feature_folder(tmp_path)
    for slide in SLIDES:
        np.testing.assert_array_equal(folder.features(slide), truth(slide)[0])
