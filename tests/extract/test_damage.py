"""Damaged, lying and hostile feature files: noticed before harm is done, by an error that names the file."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch
import xxhash

from extract import room
from extract.encoders.table import EncoderError
from extract.encoders.weights import read_state_dict
from extract.features import errors
from extract.features.cache import (
    CacheError,
    Provenance,
    map_features,
    read_coords,
    read_features,
    read_header,
    write_features,
)
from extract.features.checksums import TRAILER_BYTES
from extract.features.folder import open_feature_folder

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "reliability.py"
READERS = (read_header, read_features, read_coords, map_features)
MUTATIONS_EACH = 25


@pytest.fixture
def path(tmp_path) -> Path:
    rng = np.random.default_rng(3)
    provenance = Provenance("phikon", tile_px=224, mpp=0.5, slide="s", extra={"note": "häufig"})
    write_features(tmp_path / "s.h5", rng.standard_normal((37, 5)), rng.integers(0, 9999, (37, 2)), provenance)
    return tmp_path / "s.h5"


# --- checksums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "larger"])
def test_every_random_damage_is_noticed(tmp_path, size, script):
    """Seeded; benchmarks/reliability.py is the same for as many as wanted."""
    reliability = script(SCRIPT)
    for kind in reliability.MUTATIONS:
        found = reliability.mutate(tmp_path, size, kind, 1, 0, MUTATIONS_EACH)
        assert found == {reliability.NOTICED: MUTATIONS_EACH}, kind


def test_every_single_bit_matters(path):
    """One bit in every 13th byte, and all of the trailer."""
    whole = path.read_bytes()
    for position in (*range(0, len(whole), 13), *range(len(whole) - TRAILER_BYTES, len(whole))):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        noticed = []
        for read in READERS:
            try:
                read(path)
            except CacheError as error:
                noticed.append(str(error))
        assert noticed, position
        assert all(text.startswith(str(path)) for text in noticed)


def test_the_trailer_is_what_its_description_says(path):
    """Read here with struct and h5py alone."""
    whole = path.read_bytes()
    body, trailer = whole[:-TRAILER_BYTES], whole[-TRAILER_BYTES:]
    magic, f, n_f, c, n_c, dim, value_bytes = struct.unpack_from("<16s6Q", trailer)
    digests = [trailer[64 + 16 * i :][:16] for i in range(4)]
    with h5py.File(path, "r") as file:
        features_ND, coords_N2 = file["features"][:], file["coords"][:]
        assert file.attrs["checksums"].startswith("xxh3_128")
    rest = b"".join(body[a:b] for a, b in ((0, f), (f + n_f, c), (c + n_c, len(body))))
    wanted = (features_ND.tobytes(), coords_N2.tobytes(), rest, trailer[:-16])
    assert magic == b"slide-mil xxh3 1"
    assert digests == [xxhash.xxh3_128_digest(part) for part in wanted]
    assert (dim, value_bytes) == (5, 2)
    assert f < c, "as the slices above assume"


def test_a_file_without_checksums_is_read_and_says_so(path):
    truth_ND = read_features(path)
    assert read_header(path).has_checksum
    with h5py.File(path, "r+") as file:
        del file.attrs["checksums"]
    assert not read_header(path).has_checksum
    for read in (read_features, map_features):
        np.testing.assert_array_equal(read(path), truth_ND)


def test_checksums_are_compared_only_where_asked(path):
    with h5py.File(path, "r") as file:
        position = file["features"].id.get_offset()
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(damaged)
    assert read_header(path).n_tiles == 37, "the header does not read features"
    folder = open_feature_folder(path.parent)
    for read in (folder.features, folder.mapped):
        with pytest.raises(CacheError, match=r"s\.h5: damaged: its features are .*checksum"):
            read("s")
    unverified = open_feature_folder(path.parent, verify=False)
    assert np.isfinite(unverified.features("s")).all()
    assert unverified.mapped("s").tobytes() == unverified.features("s").tobytes()


def test_a_file_that_another_program_changed_says_so(path):
    with h5py.File(path, "r+") as file:
        file.attrs["mpp"] = 0.25
    for read in READERS:
        with pytest.raises(CacheError, match=r"s\.h5: .*changed by another program"):
            read(path)
    assert read_header(path, verify=False).provenance.mpp == 0.25


@pytest.mark.parametrize("n_tiles", [0, 1])
def test_files_with_few_values_have_checksums_too(tmp_path, n_tiles):
    write_features(tmp_path / "s.h5", np.ones((n_tiles, 3)), np.zeros((n_tiles, 2)), Provenance("phikon"))
    assert read_header(tmp_path / "s.h5").has_checksum
    assert read_features(tmp_path / "s.h5").shape == map_features(tmp_path / "s.h5").shape == (n_tiles, 3)


# --- sizes that are only declared ----------------------------------------------------------------------------------

ROWS = 10**12


def clam(folder: Path) -> Path:
    """Where a file goes that is read as CLAM's."""
    (folder / "h5_files").mkdir(parents=True, exist_ok=True)
    return folder / "h5_files" / "s.h5"


def refused(folder: Path, layout: str, said: str) -> None:
    opened = open_feature_folder(folder, layout)
    for read in (opened.header, opened.features, opened.mapped):
        with pytest.raises(CacheError, match=said) as caught:
            read("s")
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("rows", [10**9, ROWS])
@pytest.mark.parametrize("chunks", [(1000, 16), None])
def test_hdf5_that_declares_rows_which_are_not_there(tmp_path, rows, chunks):
    with h5py.File(clam(tmp_path), "w") as file:
        file.create_dataset("features", (rows, 16), "f4", chunks=chunks)
        file.create_dataset("coords", (rows, 2), "i4", chunks=(1000, 2) if chunks else None)
    refused(tmp_path, "clam", r"s\.h5: features declares .* stored")


def test_hdf5_that_decompresses_to_more_than_the_memory(tmp_path, monkeypatch):
    with h5py.File(clam(tmp_path), "w") as file:
        file.create_dataset("features", data=np.zeros((5000, 64), np.float32), chunks=(500, 64), compression="gzip")
        file["coords"] = np.zeros((5000, 2), np.int32)
    assert clam(tmp_path).stat().st_size * 10 < 5000 * 64 * 4
    folder = open_feature_folder(tmp_path)
    assert folder.features("s").shape == folder.mapped("s").shape == (5000, 64)
    with monkeypatch.context() as patched:
        memory = psutil.virtual_memory()._replace(available=1_000_000)
        patched.setattr(errors.psutil, "virtual_memory", lambda: memory)
        refused(tmp_path, "clam", r"s\.h5: .*would take 0\.0 GB, more than the 0\.0 GB of free memory")
    monkeypatch.setattr(errors, "LIMITS_FROM", 1000)
    monkeypatch.setattr(room, "left_by_limits", lambda: {"the control group's memory limit": 1_000_000})
    refused(tmp_path, "clam", r"s\.h5: .*would take 0\.0 GB, more than the 0\.0 GB of free memory")


@pytest.mark.parametrize("shape", [(10**9, 16), (ROWS, 16), (2**62, 2**62)])
def test_npy_that_declares_rows_which_are_not_there(tmp_path, shape):
    (tmp_path / "s.npy").write_bytes(npy_header(shape) + bytes(640))
    refused(tmp_path, "torchmil", r"s\.npy: not a whole \.npy file.*declares .* values")


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": dtype, "fortran_order": False, "shape": shape})
    return written.getvalue()


@pytest.mark.parametrize("header", [b"\x09\x00", b"\x01\x00\x40\x00{'descr': 1"])
def test_npy_with_a_broken_header(tmp_path, header):
    (tmp_path / "s.npy").write_bytes(b"\x93NUMPY" + header + bytes(80))
    refused(tmp_path, "torchmil", r"s\.npy: not a whole \.npy file")


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_in_both_orders(tmp_path, order):
    features_ND = np.asarray(np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32), order=order)
    np.save(tmp_path / "s.npy", features_ND)
    folder = open_feature_folder(tmp_path)
    for read_ND in (folder.features("s"), folder.mapped("s")):
        np.testing.assert_array_equal(read_ND, features_ND)


def slideflow(folder: Path) -> Path:
    torch.save(torch.ones(3, 4), folder / "s.pt")
    return folder / "s.index.npz"


def coords_refused(folder: Path, said: str) -> None:
    with pytest.raises(CacheError, match=said):
        open_feature_folder(folder, "slideflow").coords("s", tile_level0_px=448)


def test_npz_that_declares_rows_which_are_not_there(tmp_path):
    with zipfile.ZipFile(slideflow(tmp_path), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", npy_header((ROWS, 2), "<i4") + bytes(24))
    coords_refused(tmp_path, r"s\.index\.npz: expected coords of shape \(3, 2\).*got \(1000000000000, 2\)")


def test_npz_bomb_is_not_decompressed(tmp_path):
    """A short array whose member goes on for 200 MB of zeros, packed into 200 kB."""
    with zipfile.ZipFile(slideflow(tmp_path), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", npy_header((3, 2), "<i4") + bytes(200_000_000))
    before = peak_bytes()
    coords_N2 = open_feature_folder(tmp_path, "slideflow").coords("s", tile_level0_px=448)
    assert coords_N2.tolist() == [[-224, -224]] * 3
    assert peak_bytes() - before < 50_000_000


def peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_npz_that_is_cut_off(tmp_path):
    index = slideflow(tmp_path)
    np.savez(index, np.zeros((3, 2), np.int32))
    index.write_bytes(index.read_bytes()[:-30])
    coords_refused(tmp_path, r"s\.index\.npz: not a whole \.npz file")


def test_pt_that_declares_rows_which_are_not_there(tmp_path):
    """torch saves an expanded tensor as one row and a stride of 0."""
    torch.save(torch.zeros(1, 16).expand(10**9, 16), tmp_path / "s.pt")
    assert (tmp_path / "s.pt").stat().st_size < 10_000
    refused(tmp_path, "clam", r"s\.pt: declares .* values")


@pytest.mark.parametrize("rows", [10**9, ROWS])
def test_safetensors_that_declare_rows_which_are_not_there(tmp_path, rows):
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(EncoderError, match=r"w\.safetensors: cannot be read as weights"):
        read_state_dict(tmp_path / "w.safetensors")


# --- out of the file -----------------------------------------------------------------------------------------------


def linked(folder: Path, kind: str) -> None:
    with h5py.File(folder / "secret.h5", "w") as file:
        file["features"] = np.ones((3, 4), np.float32)
    (folder / "secret.bin").write_bytes(bytes(48))
    with h5py.File(clam(folder), "w") as file:
        file["coords"] = np.zeros((3, 2), np.int32)
        if kind == "external link":
            file["features"] = h5py.ExternalLink("../secret.h5", "features")
        elif kind == "soft link through an external one":
            file["other"] = h5py.ExternalLink("../secret.h5", "/")
            file["features"] = h5py.SoftLink("/other/features")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3, 4), "f4")
            layout[:] = h5py.VirtualSource("../secret.h5", "features", (3, 4))
            file.create_virtual_dataset("features", layout)
        else:
            file.create_dataset("features", (3, 4), "f4", external=[("../secret.bin", 0, 48)])


@pytest.mark.parametrize("kind", ["external link", "soft link through an external one", "virtual", "external storage"])
def test_hdf5_that_leads_out_of_the_file_is_refused(tmp_path, kind):
    linked(tmp_path, kind)
    refused(tmp_path, "clam", r"s\.h5: features (is a link|lies in other files).* refused")
