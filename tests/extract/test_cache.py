"""The feature cache: what is written comes back, a file that exists is whole, a broken one is named."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import extract.features.cache
import extract.whole
from extract.features.cache import (
    SCHEMA,
    CacheError,
    Provenance,
    map_features,
    open_cache_file,
    read_coords,
    read_features,
    read_header,
    write_features,
)
from extract.features.folder import open_feature_folder
from extract.whole import replace_on_success

FULL = Provenance(
    encoder="phikon",
    weights_sha256="f" * 64,
    tile_px=224,
    mpp=0.5,
    overlap_px=16,
    tile_level0_px=460.7,
    slide="slide é 1",
    slide_fingerprint="abc",
    extra={"level0_width": 4001, "note": "häufig", "ratio": 0.25, "known": True},
)
READERS = (read_header, read_features, read_coords, map_features)


def example(n: int = 37, dim: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """features_ND, exact in float16, and coords_N2."""
    rng = np.random.default_rng(n)
    return rng.integers(-800, 800, (n, dim)).astype(np.float32) / 16, rng.integers(0, 200_000, (n, 2))


@pytest.fixture
def path(tmp_path) -> Path:
    features_ND, coords_N2 = example()
    write_features(tmp_path / "cache" / "s.h5", features_ND, coords_N2, FULL)
    return tmp_path / "cache" / "s.h5"


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.rglob("*") if entry.is_file())


# --- round trip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("n", [0, 1, 37])
def test_what_is_written_comes_back(tmp_path, dtype, n):
    features_ND, coords_N2 = example(n)
    write_features(tmp_path / "s.h5", features_ND, coords_N2, FULL, dtype=dtype)
    header = read_header(tmp_path / "s.h5")
    assert (header.n_tiles, header.dim, header.dtype) == (n, 5, dtype)
    assert header.provenance == FULL
    assert type(header.provenance.tile_px) is int
    for read in (read_features, map_features):
        back_ND = read(tmp_path / "s.h5")
        assert back_ND.dtype == dtype
        np.testing.assert_array_equal(back_ND, features_ND)
    assert read_coords(tmp_path / "s.h5").dtype == np.int32
    np.testing.assert_array_equal(read_coords(tmp_path / "s.h5"), coords_N2)


def test_float16_rounds_to_nearest_as_numpy_does(tmp_path):
    features_ND = np.random.default_rng(0).normal(size=(9, 4))
    write_features(tmp_path / "s.h5", features_ND, np.zeros((9, 2)), FULL)
    np.testing.assert_array_equal(read_features(tmp_path / "s.h5"), features_ND.astype(np.float16))


def test_an_empty_slide_keeps_its_reason(tmp_path):
    why = Provenance("phikon", slide="glass", empty_reason="no tissue found")
    write_features(tmp_path / "s.h5", np.empty((0, 768)), np.empty((0, 2)), why)
    header = read_header(tmp_path / "s.h5")
    assert (header.n_tiles, header.dim) == (0, 768)
    assert header.provenance.empty_reason == "no tissue found"


def test_a_map_can_be_written_to_without_changing_the_file(path):
    before = path.read_bytes()
    mapped_ND = map_features(path)
    mapped_ND[:] = 7
    del mapped_ND
    assert path.read_bytes() == before


def test_writing_again_replaces_the_file_and_leaves_old_maps_alone(path):
    mapped_ND, (features_ND, _) = map_features(path), example()
    write_features(path, features_ND[:3] + 1, np.zeros((3, 2)), FULL)
    np.testing.assert_array_equal(mapped_ND, features_ND)
    np.testing.assert_array_equal(read_features(path), features_ND[:3] + 1)


def test_same_kind_ignores_what_differs_between_slides():
    same = Provenance("phikon", "f" * 64, 224, 0.5, 16, tile_level0_px=1.0, slide="other")
    assert same.same_kind() == FULL.same_kind()
    assert same.resample == "", "unknown"
    assert Provenance("uni", extra={"tiles.tolerance": 0.05}).resample == "area", "from before there was a choice"
    assert Provenance("uni", extra={"tiles.resample": "lanczos"}).same_kind() != Provenance("uni").same_kind()
    assert Provenance("uni", "f" * 64, 224, 0.5, 16).same_kind() != FULL.same_kind()


# --- refused on writing --------------------------------------------------------------------------------------------


def test_values_too_large_for_float16_are_refused(tmp_path):
    features_ND = np.array([[1.0, -70_000.0]])
    with pytest.raises(ValueError, match=r"s\.h5: values up to 70000 do not fit float16; use features\.dtype=float32"):
        write_features(tmp_path / "s.h5", features_ND, np.zeros((1, 2)), FULL)
    assert files(tmp_path) == []
    write_features(tmp_path / "s.h5", features_ND, np.zeros((1, 2)), FULL, dtype="float32")
    np.testing.assert_array_equal(read_features(tmp_path / "s.h5"), features_ND)


@pytest.mark.parametrize(("features", "coords"), [((3, 4), (2, 2)), ((3, 4), (3, 3)), ((12,), (12, 2)), ((3, 4), (6,))])
def test_shapes_that_do_not_match_are_refused(tmp_path, features, coords):
    with pytest.raises(ValueError, match=r"s\.h5: expected features \(N, D\) and coords \(N, 2\)"):
        write_features(tmp_path / "s.h5", np.zeros(features), np.zeros(coords), FULL)
    assert files(tmp_path) == []


# --- a file that exists is whole -----------------------------------------------------------------------------------


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), replace_on_success(tmp_path / "sub" / "x.csv") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert files(tmp_path) == []


def test_an_exception_while_writing_leaves_the_former_file(tmp_path):
    (tmp_path / "x.csv").write_text("former")
    with pytest.raises(KeyboardInterrupt), replace_on_success(tmp_path / "x.csv") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert files(tmp_path) == ["x.csv"]
    assert (tmp_path / "x.csv").read_text() == "former"


def test_the_final_name_appears_only_when_all_is_written(tmp_path):
    with replace_on_success(tmp_path / "x.csv") as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path, "a rename across file systems would not be atomic"
        assert not (tmp_path / "x.csv").exists()
    assert (tmp_path / "x.csv").read_text() == "whole"
    assert files(tmp_path) == ["x.csv"]


@pytest.mark.parametrize("where", ["create_dataset", "fsync", "replace"])
def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, where):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = h5py.Group if where == "create_dataset" else extract.whole.os
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, full)
        with pytest.raises(OSError, match="No space left"):
            write_features(tmp_path / "s.h5", *example(), FULL)
    assert files(tmp_path) == []
    write_features(tmp_path / "s.h5", *example(), FULL)
    assert read_header(tmp_path / "s.h5").n_tiles == 37


KILLED = """
import os, signal, sys
from pathlib import Path
import h5py, numpy as np
import extract.features.cache
import extract.whole
from extract.features.cache import Provenance, write_features

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

extract.whole.os.fsync = die
write_features(Path(sys.argv[1]), np.ones((50, 8)), np.zeros((50, 2)), Provenance("phikon"))
"""


def test_trap_14_a_killed_writer_leaves_nothing_under_the_final_name(path):
    """TRIDENT, STAMP and CLAM take a half-written file for a finished one."""
    victim = path.with_name("victim.h5")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(victim)], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not victim.exists()
    partial = [name for name in os.listdir(path.parent) if name != path.name]
    assert len(partial) == 1, "killed while it wrote aside"
    assert list(open_feature_folder(path.parent).slides) == ["s"], "what is left is not taken for a slide"
    with pytest.raises(CacheError, match=r"victim\.h5: no such feature file"):
        read_header(victim)
    write_features(victim, *example(), FULL)
    assert sorted(open_feature_folder(path.parent).slides) == ["s", "victim"]


# --- a broken file is named ----------------------------------------------------------------------------------------


def test_trap_14_a_truncated_file_is_noticed_at_every_length(path):
    whole = path.read_bytes()
    lengths = sorted({0, 1, 8, 100, len(whole) - 1, *range(0, len(whole), 97)})
    for length in lengths:
        path.write_bytes(whole[:length])
        for read in READERS:
            with pytest.raises(CacheError, match=r"s\.h5: (truncated|not an HDF5 file)"):
                read(path)
    path.write_bytes(whole)
    assert read_header(path).n_tiles == 37


@pytest.mark.parametrize("content", [b"", b"slide,label\n", b"\x89HDF\r\n\x1a\n"])
def test_a_file_that_is_no_hdf5(tmp_path, content):
    (tmp_path / "s.h5").write_bytes(content)
    for read in READERS:
        with pytest.raises(CacheError, match=r"s\.h5: .*Delete it and extract again"):
            read(tmp_path / "s.h5")


def test_an_absent_file(tmp_path):
    for read in READERS:
        with pytest.raises(CacheError, match=r"s\.h5: no such feature file"):
            read(tmp_path / "s.h5")


def test_another_tools_file_says_so(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int64)
    for read in READERS:
        with pytest.raises(CacheError, match=r"s\.h5: not a file of this cache .*coords, features.*features\.layout"):
            read(tmp_path / "s.h5")


def test_a_newer_schema_asks_for_an_update(path):
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = SCHEMA + 1
    with pytest.raises(CacheError, match=r"s\.h5: schema 2 is newer than this toolkit's 1; update slide-mil"):
        read_header(path)


@pytest.mark.parametrize(
    ("features", "coords"),
    [
        (np.zeros((3, 2), np.float32), np.zeros((2, 2), np.int32)),
        (np.zeros((3,), np.float32), np.zeros((3, 2), np.int32)),
        (np.zeros((3, 2), np.int32), np.zeros((3, 2), np.int32)),
    ],
)
def test_shapes_that_no_writer_of_ours_makes(path, features, coords):
    with h5py.File(path, "r+") as file:
        del file["features"], file["coords"], file.attrs["checksums"]
        file["features"], file["coords"] = features, coords
    for read in READERS:
        with pytest.raises(CacheError, match=r"s\.h5: expected (features|coords) "):
            read(path)


def test_chunked_features_cannot_be_mapped_but_read(path):
    with h5py.File(path, "r+") as file:
        stored_ND = file["features"][:]
        del file["features"], file.attrs["checksums"]
        file.create_dataset("features", data=stored_ND, chunks=(10, 5), compression="gzip")
    np.testing.assert_array_equal(read_features(path), stored_ND)
    with pytest.raises(CacheError, match=r"s\.h5: features are chunked.*data\.memory=ram"):
        map_features(path)


def test_a_file_is_closed_again(path):
    with open_cache_file(path) as (file, _):
        inner = file
    assert not inner.id.valid


# --- for other tools -----------------------------------------------------------------------------------------------


def test_code_written_for_clam_reads_our_files(path):
    """CLAM: `features` and `coords` of the file, nothing else."""
    features_ND, coords_N2 = example()
    with h5py.File(path, "r") as file:
        features, coords = file["features"][:], file["coords"][:]
    np.testing.assert_array_equal(features, features_ND)
    np.testing.assert_array_equal(coords, coords_N2)
    assert coords.dtype == np.int32


def test_code_written_for_trident_reads_our_files(path):
    """TRIDENT: the geometry is in attributes of `coords`, who made them in those of `features`."""
    with h5py.File(path, "r") as file:
        geometry, made_by = dict(file["coords"].attrs), dict(file["features"].attrs)
    assert geometry["patch_size"] == 224
    assert geometry["patch_size_level0"] == 461
    assert geometry["overlap"] == 16
    assert geometry["level0_width"] == 4001
    assert geometry["name"] == made_by["name"] == "slide é 1"
    assert made_by["encoder"] == "phikon"
