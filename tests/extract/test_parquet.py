"""Import of owkin/camelyon16-features: files in its exact schema go in, the arrays they were made of must come out."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import extract.features.errors
import extract.features.parquet
from extract.cohort import read_cohort
from extract.features.cache import read_coords, read_header
from extract.features.folder import open_feature_folder
from extract.features.parquet import HUB, ImportProblem, import_parquet
from extract.features.parquet_pages import values_of

SCHEMA = pa.schema([("features", pa.list_(pa.list_(pa.float32()))), ("label", pa.int64())])
DIM, LEVEL = 6, 15
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAIN, TEST = "Phikon_train-00000-of-00001.parquet", "Phikon_test-00000-of-00001.parquet"


def quiet(_: str) -> None:
    pass


def slide_rows(seed: int, n_tiles: int, *, dim: int = DIM, address: bool = True) -> np.ndarray:
    """Tiles (N, 3 + D) or (N, D) float32, exact in float16."""
    rng = np.random.default_rng(seed)
    features_ND = rng.integers(-800, 800, (n_tiles, dim)).astype(np.float32) / 16
    columns_rows_N2 = rng.integers((0, 0), (300, 170), (n_tiles, 2))
    address_N3 = np.column_stack([np.full(n_tiles, LEVEL), columns_rows_N2]).astype(np.float32)
    return np.hstack([address_N3, features_ND]) if address else features_ND


def write_file(path: Path, slides: list[np.ndarray], labels: list[int | None], *, group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"features": [tiles.tolist() for tiles in slides], "label": labels}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, row_group_size=group)
    return path


TRAIN_SLIDES = [slide_rows(seed, n) for seed, n in enumerate((9, 1, 30, 4, 12))]
TEST_SLIDES = [slide_rows(100 + seed, n) for seed, n in enumerate((3, 8))]
TRAIN_LABELS, TEST_LABELS = [0, 1, 1, 0, 1], [1, 0]


@pytest.fixture
def root(tmp_path):
    write_file(tmp_path / "root" / "data" / TRAIN, TRAIN_SLIDES, list(TRAIN_LABELS))
    write_file(tmp_path / "root" / "data" / TEST, TEST_SLIDES, list(TEST_LABELS))
    return tmp_path / "root"


def run(folder: Path, **options) -> Path:
    arguments: dict[str, Any] = {"dim": DIM, "progress": quiet} | options
    return import_parquet(folder, **arguments)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def count_writes(monkeypatch, *, fail_at: int | None = None) -> list[str]:
    """Names of the slides written from now on; the `fail_at`-th write is interrupted before it begins."""
    written: list[str] = []
    write = extract.features.parquet.write_features

    def counted(path, *arguments, **options):
        if len(written) == fail_at:
            raise KeyboardInterrupt
        write(path, *arguments, **options)
        written.append(path.stem)

    monkeypatch.setattr(extract.features.parquet, "write_features", counted)
    return written


# --- what comes out ------------------------------------------------------------------------------------------------


def test_slides_labels_and_splits(root, tmp_path):
    cohort_csv = run(tmp_path / "out", root=root)
    assert cohort_csv == tmp_path / "out" / "cohort.csv"
    rows = read_csv(cohort_csv)
    assert [r["slide"] for r in rows[:5]] == [f"Phikon_train_{i:03}" for i in range(5)]
    assert [r["slide"] for r in rows[5:]] == ["Phikon_test_000", "Phikon_test_001"]
    assert [r["split"] for r in rows] == ["train"] * 5 + ["test"] * 2
    assert [int(r["label"]) for r in rows] == TRAIN_LABELS + TEST_LABELS
    assert all(r["patient"] == r["slide"] for r in rows)
    cohort = read_cohort(cohort_csv)
    assert cohort.classes == ("0", "1")
    np.testing.assert_array_equal(cohort.labels_S, TRAIN_LABELS + TEST_LABELS)


def test_names_of_files_are_no_formulas_in_a_spreadsheet(root, tmp_path):
    """Slides are called like their file; the folder is known again all the same."""
    for path in (root / "data").iterdir():
        path.rename(path.with_name(path.name.replace("Phikon", "=1+2")))
    patterns = {"train": "data/=1+2_train-*.parquet", "test": "data/=1+2_test-*.parquet"}
    for _ in range(2):
        cohort_csv = run(tmp_path / "out", root=root, files=patterns)
        assert read_csv(cohort_csv)[0]["slide"] == "'=1+2_train_000"
        assert read_cohort(cohort_csv).table["slide"][0] == "=1+2_train_000"
        written = cohort_csv.stat().st_mtime_ns
    (tmp_path / "out" / "source.json").unlink()
    assert run(tmp_path / "out", root=root, files=patterns).stat().st_mtime_ns >= written


def test_features_are_those_of_the_file(root, tmp_path):
    run(tmp_path / "out", root=root)
    folder = open_feature_folder(tmp_path / "out")
    assert (folder.layout, len(folder.slides)) == ("cache", 7)
    for name, slides in (("train", TRAIN_SLIDES), ("test", TEST_SLIDES)):
        for i, tiles in enumerate(slides):
            slide = f"Phikon_{name}_{i:03}"
            header = folder.header(slide)
            assert (header.n_tiles, header.dim, header.dtype) == (len(tiles), DIM, "float16")
            np.testing.assert_array_equal(folder.features(slide), tiles[:, 3:])
            provenance = header.provenance
            assert (provenance.encoder, provenance.weights_sha256, provenance.slide) == ("phikon", "", slide)
            assert (provenance.tile_px, provenance.mpp) == (224, 0.5)
            assert provenance.extra["source_row"] == i


def test_coords_are_level_pixels_until_the_levels_are_known(root, tmp_path):
    run(tmp_path / "out", root=root)
    folder = open_feature_folder(tmp_path / "out")
    address_N3 = TRAIN_SLIDES[2][:, :3].astype(int)
    assert folder.header("Phikon_train_002").provenance.extra["coords_frame"] == f"deepzoom level {LEVEL}"
    np.testing.assert_array_equal(folder.deepzoom("Phikon_train_002"), address_N3)
    np.testing.assert_array_equal(read_coords(folder.path("Phikon_train_002")), address_N3[:, 1:] * 224)
    assert folder.coords("Phikon_train_002") is None
    np.testing.assert_array_equal(
        folder.coords("Phikon_train_002", deepzoom_levels=LEVEL + 3), [(c * 896, r * 896) for _, c, r in address_N3]
    )


def test_coords_are_level_0_when_the_levels_are_given(root, tmp_path):
    run(tmp_path / "out", root=root, deepzoom_levels=LEVEL + 2)
    folder = open_feature_folder(tmp_path / "out")
    address_N3 = TRAIN_SLIDES[2][:, :3].astype(int)
    provenance = folder.header("Phikon_train_002").provenance
    assert (provenance.extra["coords_frame"], provenance.tile_level0_px) == ("level-0", 448)
    assert provenance.resample == "lanczos", "as OpenSlide's DeepZoom shrinks tiles"
    np.testing.assert_array_equal(folder.coords("Phikon_train_002"), [(c * 448, r * 448) for _, c, r in address_N3])
    np.testing.assert_array_equal(folder.deepzoom("Phikon_train_002"), address_N3)
    with pytest.raises(ImportProblem, match=r"row 0: expected DeepZoom levels up to deepzoom_levels - 1 = 14, got 15"):
        run(tmp_path / "other", root=root, deepzoom_levels=LEVEL)


def test_tiles_of_several_deepzoom_levels_keep_their_addresses(root, tmp_path):
    mixed = slide_rows(7, 6)
    mixed[:, 0] = [15, 13, 14, 15, 13, 15]
    write_file(root / "data" / TEST, [mixed], [1])
    run(tmp_path / "out", root=root)
    folder = open_feature_folder(tmp_path / "out")
    np.testing.assert_array_equal(folder.deepzoom("Phikon_test_000"), mixed[:, :3])
    expected = [(c * 224 * 2 ** (16 - level), r * 224 * 2 ** (16 - level)) for level, c, r in mixed[:, :3].astype(int)]
    np.testing.assert_array_equal(folder.coords("Phikon_test_000", deepzoom_levels=17), expected)


def test_rows_without_address_have_no_coords(root, tmp_path):
    plain = slide_rows(3, 5, address=False)
    write_file(root / "data" / TEST, [plain], [0])
    run(tmp_path / "out", root=root)
    folder = open_feature_folder(tmp_path / "out")
    np.testing.assert_array_equal(folder.features("Phikon_test_000"), plain)
    assert folder.coords("Phikon_test_000", deepzoom_levels=18) is None
    assert folder.deepzoom("Phikon_test_000") is None
    assert folder.header("Phikon_test_000").provenance.extra["coords_known"] is False
    assert folder.header("Phikon_test_000").provenance.resample == "", "nothing says that DeepZoom made them"


def test_the_real_widths_771_and_768(tmp_path):
    wide, plain = slide_rows(1, 2, dim=768), slide_rows(2, 3, dim=768, address=False)
    write_file(tmp_path / "root" / TRAIN, [wide], [1])
    write_file(tmp_path / "root" / TEST, [plain], [0])
    assert (wide.shape[1], plain.shape[1]) == (771, 768)
    import_parquet(tmp_path / "out", root=tmp_path / "root", progress=quiet, dtype="float32")
    folder = open_feature_folder(tmp_path / "out")
    np.testing.assert_array_equal(folder.features("Phikon_train_000"), wide[:, 3:])
    np.testing.assert_array_equal(folder.features("Phikon_test_000"), plain)
    assert folder.header("Phikon_test_000").dtype == "float32"


def test_a_slide_without_tiles_is_kept_as_empty(root, tmp_path):
    write_file(root / "data" / TEST, [np.empty((0, 0)), TEST_SLIDES[1]], [0, 1])
    run(tmp_path / "out", root=root)
    header = read_header(tmp_path / "out" / "Phikon_test_000.h5")
    assert (header.n_tiles, header.dim) == (0, DIM)
    assert header.provenance.empty_reason == "no tiles in the source row"


def test_label_names(root, tmp_path):
    rows = read_csv(run(tmp_path / "out", root=root, label_names=("normal", "tumor")))
    assert [r["label"] for r in rows[:3]] == ["normal", "tumor", "tumor"]
    assert [r["label"] for r in read_csv(run(tmp_path / "out", root=root))[:3]] == ["0", "1", "1"]
    with pytest.raises(ImportProblem, match=r"expected labels 0\.\.0 for label_names \['normal'\], got 1"):
        run(tmp_path / "other", root=root, label_names=["normal"])


def test_missing_labels_stay_empty(root, tmp_path):
    write_file(root / "data" / TEST, TEST_SLIDES, [None, 1])
    assert [r["label"] for r in read_csv(run(tmp_path / "out", root=root))[5:]] == ["", "1"]


def test_names_run_on_over_shards_and_grow_with_their_number(root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        extract.features.parquet, "write_features", lambda path, *_, **__: None
    )  # a thousand files take long
    (root / "data" / TRAIN).unlink()
    tiles = slide_rows(1, 1)
    for shard, count in enumerate((600, 401)):
        path = root / "data" / f"Phikon_train-0000{shard}-of-00002.parquet"
        write_file(path, [tiles] * count, [shard] * count, group=500)
    (tmp_path / "out").mkdir()
    rows = read_csv(run(tmp_path / "out", root=root))
    assert [rows[i]["slide"] for i in (0, 599, 600, 1000)] == [f"Phikon_train_{i:04}" for i in (0, 599, 600, 1000)]
    assert [rows[i]["label"] for i in (599, 600)] == ["0", "1"]
    assert rows[1001]["slide"] == "Phikon_test_000"


# --- resuming and reusing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 3, 6])
def test_interrupted_import_continues(root, tmp_path, monkeypatch, k):
    with monkeypatch.context() as patch:
        written = count_writes(patch, fail_at=k)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", root=root)
    assert len(written) == k
    assert not (tmp_path / "out" / "cohort.csv").exists()
    assert not (tmp_path / "out" / "source.json").exists()
    again = count_writes(monkeypatch)
    cohort_csv = run(tmp_path / "out", root=root)
    assert len(again) == 7 - k
    assert not set(again) & set(written)
    undisturbed = run(tmp_path / "undisturbed", root=root)
    assert cohort_csv.read_bytes() == undisturbed.read_bytes()
    for path in sorted((tmp_path / "undisturbed").glob("*.h5")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_second_call_reads_no_parquet_file(root, tmp_path, monkeypatch):
    first = run(tmp_path / "out", root=root)
    monkeypatch.setattr(extract.features.parquet, "_open_parquet", lambda path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(extract.features.parquet, "_source_file", lambda *_: pytest.fail("a file was hashed"))
    assert run(tmp_path / "out", root=root) == first
    shutil.rmtree(root)
    assert run(tmp_path / "out", root=root) == first


def test_lost_and_damaged_slides_are_imported_again(root, tmp_path, monkeypatch):
    run(tmp_path / "out", root=root)
    (tmp_path / "out" / "Phikon_train_003.h5").unlink()
    damaged = tmp_path / "out" / "Phikon_test_001.h5"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    written = count_writes(monkeypatch)
    said: list[str] = []
    run(tmp_path / "out", root=root, progress=said.append)
    assert written == ["Phikon_train_003", "Phikon_test_001"]
    assert any("Phikon_test_001.h5: truncated" in line for line in said)


def test_only_the_row_groups_needed_are_read(root, tmp_path, monkeypatch):
    run(tmp_path / "out", root=root)
    (tmp_path / "out" / "Phikon_train_003.h5").unlink()
    groups: list[list[int]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def spied(self, batch_size, row_groups, **options):
        groups.append(row_groups)
        return iter_batches(self, batch_size, row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spied)
    run(tmp_path / "out", root=root)
    assert groups == [[1]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dtype": "float32"}, "dtype was 'float16', now 'float32'"),
        ({"deepzoom_levels": 18}, "deepzoom_levels was None, now 18"),
        ({"mpp": 0.25}, "mpp was 0.5, now 0.25"),
        ({"encoder": "uni"}, "encoder was 'phikon', now 'uni'"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused(root, tmp_path, changed, said, complete):
    run(tmp_path / "out", root=root)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if not complete:
        del before["source.json"]
        (tmp_path / "out" / "source.json").unlink()
    with pytest.raises(ImportProblem) as caught:
        run(tmp_path / "out", root=root, **changed)
    assert said in str(caught.value)
    assert "Use another folder" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("complete", [True, False])
def test_another_source_is_refused(root, tmp_path, complete):
    run(tmp_path / "out", root=root)
    if not complete:
        (tmp_path / "out" / "cohort.csv").unlink()
    write_file(root / "data" / TRAIN, TRAIN_SLIDES[::-1], list(TRAIN_LABELS))
    with pytest.raises(ImportProblem, match="SHA-256"):
        run(tmp_path / "out", root=root)


def test_same_files_elsewhere_are_the_same_source(root, tmp_path, monkeypatch):
    run(tmp_path / "out", root=root)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (root / "data").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    written = count_writes(monkeypatch)
    run(tmp_path / "out", root=flat)
    assert written == []


def test_source_json_says_what_was_read(root, tmp_path):
    run(tmp_path / "out", root=root)
    record = json.loads((tmp_path / "out" / "source.json").read_text())
    assert (record["hub"], record["root"], record["n_slides"]) == ("", str(root.resolve()), 7)
    for entry in record["files"]:
        path = root / "data" / entry["name"]
        assert entry["size"] == path.stat().st_size
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


# --- wrong input ---------------------------------------------------------------------------------------------------


def test_another_width_is_refused(root, tmp_path):
    bad = np.zeros((4, DIM + 1), np.float32)
    write_file(root / "data" / TEST, [TEST_SLIDES[0], bad], [0, 1])
    with pytest.raises(ImportProblem, match=rf"{TEST}: row 1: expected tiles of 6 or 9 numbers.*got 7"):
        run(tmp_path / "out", root=root)


def test_two_widths_in_one_slide_are_refused(root, tmp_path):
    table = pa.table({"features": [[[0.0] * 9, [0.0] * 6]], "label": [1]}, schema=SCHEMA)
    pq.write_table(table, root / "data" / TEST)
    with pytest.raises(ImportProblem, match=rf"{TEST}: row 0: tiles of different widths in one slide: \[6, 9\]"):
        run(tmp_path / "out", root=root)


@pytest.mark.parametrize("row", [None, [None], [[None] * 9]])
def test_nulls_are_refused(root, tmp_path, row):
    pq.write_table(pa.table({"features": [row], "label": [1]}, schema=SCHEMA), root / "data" / TEST)
    with pytest.raises(ImportProblem, match=rf"{TEST}: row 0: expected numbers, got nulls"):
        run(tmp_path / "out", root=root)


def test_columns_that_are_no_address_are_refused(root, tmp_path):
    bad = slide_rows(1, 3)
    bad[1, 1] = 0.25
    write_file(root / "data" / TEST, [bad], [1])
    with pytest.raises(ImportProblem, match=rf"{TEST}: row 0: expected DeepZoom level, column, row.*tile 1"):
        run(tmp_path / "out", root=root)


def test_values_beyond_float16_are_refused(root, tmp_path):
    bad = slide_rows(1, 3)
    bad[1, 5] = 1e6
    write_file(root / "data" / TEST, [bad], [1])
    with pytest.raises(ImportProblem, match=rf"{TEST}: row 0 .*1e\+06 do not fit float16"):
        run(tmp_path / "out", root=root)
    run(tmp_path / "wide", root=root, dtype="float32")


def test_other_columns_are_refused(root, tmp_path):
    pq.write_table(pa.table({"feats": [1.0], "label": [1]}), root / "data" / TEST)
    with pytest.raises(ImportProblem, match=r"expected columns features: list<list<float>> and label.*got feats: d"):
        run(tmp_path / "out", root=root)


@pytest.mark.parametrize("content", ["truncated", "pointer"])
def test_damaged_files_are_named(root, tmp_path, content):
    path = root / "data" / TEST
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:84f7\nsize 186025828\n"
    path.write_bytes(path.read_bytes()[:-30] if content == "truncated" else pointer)
    reason = "magic bytes" if content == "truncated" else "git lfs pull"
    with pytest.raises(ImportProblem, match=rf"{TEST}: not a whole Parquet file: .*{reason}"):
        run(tmp_path / "out", root=root)


@pytest.mark.parametrize("declared", ["labels", "a number, four million times"])
def test_what_unpacks_to_more_than_the_memory_is_refused_before_it_is_read(root, tmp_path, monkeypatch, declared):
    if declared == "labels":
        table = {"features": [[[1.0, 2.0]]] * 50_000, "label": [1] * 50_000}
    else:
        table = {"features": [[[1.0] * 4_000_000]], "label": [1]}
    packed = {"use_dictionary": False, "compression": "zstd"}
    pq.write_table(pa.table(table, schema=SCHEMA), root / "data" / TEST, **packed)
    assert (root / "data" / TEST).stat().st_size < 300_000
    memory = psutil.virtual_memory()._replace(available=3_000_000)
    monkeypatch.setattr(extract.features.errors.psutil, "virtual_memory", lambda: memory)
    said = "a table of 50,000 rows" if declared == "labels" else "a group of rows of 32,000,000 bytes"
    with pytest.raises(ImportProblem, match=rf"{TEST}: {said}.* would take .* free memory"):
        run(tmp_path / "out", root=root)


def test_a_file_written_to_while_it_is_imported_is_refused(root, tmp_path, monkeypatch):
    """Rows of another file would go under this one's SHA-256; the import is continued once it is itself again."""
    path, write = root / "data" / TRAIN, extract.features.parquet.write_features
    before = path.stat()

    def then_touched(*arguments, **options):
        write(*arguments, **options)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))

    monkeypatch.setattr(extract.features.parquet, "write_features", then_touched)
    with pytest.raises(ImportProblem, match=rf"{TRAIN}: was replaced by another file, or written to"):
        run(tmp_path / "out", root=root)
    assert len(list((tmp_path / "out").glob("*.h5"))) == 1
    monkeypatch.undo()
    run(tmp_path / "out", root=root)
    assert len(list((tmp_path / "out").glob("*.h5"))) == 7


def test_missing_files_and_shards_are_listed_together(root, tmp_path):
    (root / "data" / TEST).unlink()
    (root / "data" / TRAIN).rename(root / "data" / "Phikon_train-00001-of-00003.parquet")
    with pytest.raises(ImportProblem) as caught:
        run(tmp_path / "out", root=root)
    assert "Phikon_train has 3 files, number 0, 2 is not there" in str(caught.value)
    said = "for split test, got data/Phikon_train-00001-of-00003.parquet"
    assert f"expected data/Phikon_test-*.parquet or Phikon_test-*.parquet {said}" in str(caught.value)
    with pytest.raises(ImportProblem, match=r"data\.root=.*nowhere: no such folder"):
        run(tmp_path / "out", root=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_same_slide_name_in_two_splits_is_refused(tmp_path):
    for split in ("train", "test"):
        write_file(tmp_path / "root" / split / "features-0.parquet", TEST_SLIDES, [0, 1])
    with pytest.raises(ImportProblem, match=r"2 slides of different splits get the same name, e\.g\. features_000"):
        run(tmp_path / "out", root=tmp_path / "root", files={"train": "train/*.parquet", "test": "test/*.parquet"})


# --- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    """A hub with one commit; yields the list of its calls."""
    snapshot = tmp_path / "hub" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    root.rename(snapshot)
    calls: list[dict] = []

    def snapshot_download(repo_id, **options):
        calls.append({"repo_id": repo_id} | options)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_commit_is_recorded(hub, tmp_path):
    run(tmp_path / "out")
    patterns = ["data/Phikon_train-*.parquet", "data/Phikon_test-*.parquet"]
    assert hub == [{"repo_id": HUB, "repo_type": "dataset", "revision": None, "allow_patterns": patterns}]
    record = json.loads((tmp_path / "out" / "source.json").read_text())
    assert (record["hub"], record["requested_revision"], record["revision"]) == (HUB, "main", COMMIT)
    for path in (tmp_path / "out").glob("*.h5"):
        extra = read_header(path).provenance.extra
        assert (extra["hub"], extra["revision"]) == (HUB, COMMIT)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_complete_import_needs_no_hub(hub, tmp_path, revision):
    first = run(tmp_path / "out")
    assert run(tmp_path / "out", revision=revision) == first
    assert len(hub) == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"revision": "v2"}, f"revision was '{COMMIT}', now 'v2'"),
        ({"hub": "someone/else"}, f"hub was '{HUB}', now 'someone/else'"),
    ],
)
def test_another_revision_or_dataset_is_refused(hub, tmp_path, changed, said):
    run(tmp_path / "out")
    with pytest.raises(ImportProblem) as caught:
        run(tmp_path / "out", **changed)
    assert said in str(caught.value)


def test_downloaded_files_may_replace_a_local_copy_of_the_same(hub, tmp_path, monkeypatch):
    run(tmp_path / "out", root=tmp_path / "hub" / "snapshots" / COMMIT)
    written = count_writes(monkeypatch)
    run(tmp_path / "out")
    assert (len(hub), written) == (1, [])


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "refused"]
)
def test_no_network_and_no_copy_names_both_ways_out(python, tmp_path, environment):
    code = "import sys; from pathlib import Path; from extract.features.parquet import *\n"
    code += "try: import_parquet(Path(sys.argv[1]))\nexcept ImportProblem as error: print(error)"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    started = time.monotonic()
    done = subprocess.run(
        [*python, "-c", code, tmp_path / "out"],
        env=clean | {"HF_HOME": str(tmp_path / "hf")} | environment,
        cwd=Path(extract.features.parquet.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 60
    assert "owkin/camelyon16-features (revision main):" in done.stdout
    assert "connect to the network once" in done.stdout
    assert "pass data.root=DIR" in done.stdout
    assert not (tmp_path / "out").exists()


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM from /proc")
def test_memory_does_not_grow_with_the_number_of_slides(python, tmp_path):
    """All slides lie in one row group, the worst case: 60 slides are 56 MB of features, 4 slides 4 MB."""
    code = (
        "import sys; from pathlib import Path; from extract.features.parquet import import_parquet\n"
        "import_parquet(Path(sys.argv[2]), root=Path(sys.argv[1]), progress=lambda line: None)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    peaks_kb = []
    for n_slides in (4, 60):
        root = tmp_path / f"root{n_slides}"
        root.mkdir()
        write_big(root / TRAIN, n_slides)
        write_big(root / TEST, 1)
        done = subprocess.run(
            [*python, "-c", code, root, tmp_path / f"out{n_slides}"],
            cwd=Path(extract.features.parquet.__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks_kb.append(int(done.stdout))
    assert peaks_kb[1] - peaks_kb[0] < 15_000


def write_big(path: Path, n_slides: int, n_tiles: int = 300) -> None:
    values_NW = np.random.default_rng(0).standard_normal((n_slides * n_tiles, 771), np.float32)
    values_NW[:, :3] = (16, 40, 7)
    tiles = pa.ListArray.from_arrays(np.arange(len(values_NW) + 1, dtype=np.int32) * 771, values_NW.ravel())
    slides = pa.ListArray.from_arrays(np.arange(n_slides + 1, dtype=np.int32) * n_tiles, tiles)
    table = pa.table({"features": slides, "label": np.arange(n_slides) % 2}, schema=SCHEMA)
    pq.write_table(table, path, row_group_size=n_slides)


# --- what a file unpacks to ------------------------------------------------------------------------------------------


def write_repeats(path: Path, n_slides: int, **options: Any) -> int:
    """Slides of 1,000 tiles of zeros, which take no room; how many numbers they are."""
    zeros = pa.array(np.zeros(1000 * 96, np.float32))
    tiles = pa.ListArray.from_arrays(np.arange(0, 1000 * 96 + 1, 96, dtype=np.int32), zeros)
    slide = pa.ListArray.from_arrays(np.array([0, 1000], np.int32), tiles)
    table = pa.table({"features": pa.chunked_array([slide] * n_slides), "label": pa.array([0] * n_slides)})
    pq.write_table(table, path, row_group_size=n_slides, **options)
    return n_slides * 1000 * 96


@pytest.mark.parametrize(
    "options", [{}, {"data_page_version": "2.0", "compression": "zstd"}, {"use_dictionary": False}]
)
def test_pages_say_how_many_values_they_hold(tmp_path, options):
    """Against what is written, in the pages of both versions, with dictionaries and without."""
    path = tmp_path / "s.parquet"
    n_values = write_repeats(path, 7, **options)
    assert 0 <= values_of(path, "features")[0] - n_values <= 1, "the dictionary's is counted, too"
    schema = pa.schema([("features", pa.list_(pa.list_(pa.float32()))), ("label", pa.int64())])
    lists = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]], [[7.0, 8.0]] * 3]
    pq.write_table(pa.table({"features": lists, "label": [0, 1, 1]}, schema=schema), path, row_group_size=2, **options)
    found = values_of(path, "features")
    assert all(6 <= n <= 12 for n in found)


@pytest.mark.parametrize("lying", [False, True])
def test_repeats_that_unpack_to_more_than_the_memory_are_refused_before(tmp_path, monkeypatch, lying):
    """54 MB in a few kB, where 20 MB are free; also where the footer's sum has been made small."""
    path = tmp_path / "Phikon_train-00000-of-00001.parquet"
    n_values = write_repeats(path, 70, compression="zstd")
    assert path.stat().st_size < 60_000
    if lying:
        whole = path.read_bytes()
        said, less = varint(2 * n_values), varint(2 * 7 + (1 << 7 * (len(varint(2 * n_values)) - 1)))
        assert whole.count(b"\x16" + said) >= 1, "the field that says how many values there are"
        path.write_bytes(whole.replace(b"\x16" + said, b"\x16" + less))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20e6))
    before = pa.total_allocated_bytes()
    with pytest.raises(ImportProblem, match=r"Phikon_train.*: a group of rows of 53,760,0\d\d bytes would"):
        import_parquet(tmp_path / "out", root=tmp_path, files={"train": path.name}, dim=96)
    assert pa.total_allocated_bytes() - before < 1e6
    assert not (tmp_path / "out").exists()


def varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
