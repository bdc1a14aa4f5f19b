"""From slides to cache files: whole, equal however they came about, each by one process only."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

import extract.features.cache
from extract.cohort import check_cohort
from extract.config import ConfigError, ExtractConfig, ProblemsError
from extract.encoders.frozen import FrozenEncoder
from extract.encoders.table import EncoderError, EncoderSpec
from extract.encoders.weights import sha256_of_tensors
from extract.extraction import work as extraction
from extract.extraction.batches import Batches, chosen_size, probed_size
from extract.extraction.claims import Claims, this_machine
from extract.extraction.readers import SlideFile
from extract.extraction.summary import FAILED, Summary
from extract.extraction.todo import cohort_slides, shard_of
from extract.extraction.work import OutputError, extract_cohort, n_workers
from extract.features.cache import read_coords, read_features, read_header, write_features
from extract.run import busy_line, main
from extract.slides.errors import SlideFolderError
from extract.slides.slide import open_slide

TILE_PX = 64
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Corners(torch.nn.Module):
    """Mean colours of the tile's quarters: features that a test can compute by itself, and that no batch changes."""

    def __init__(self, slow_s: float = 0.0):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.slow_s = slow_s

    def forward(self, x_N3HW: torch.Tensor) -> torch.Tensor:
        time.sleep(self.slow_s)
        half = x_N3HW.shape[-1] // 2
        quarters = [x_N3HW[..., i : i + half, j : j + half].mean((2, 3)) for i in (0, half) for j in (0, half)]
        return torch.cat(quarters, 1) * self.scale


def make_encoder(network: torch.nn.Module | None = None, dim: int = 12) -> FrozenEncoder:
    spec = EncoderSpec("corners", "none", "", dim=dim, licence="none", tile_px=TILE_PX, mean=(0, 0, 0), std=(1, 1, 1))
    network = network or Corners()
    digest = sha256_of_tensors(network.state_dict())
    return FrozenEncoder(spec, network, "made here", digest, device=torch.device("cpu"))


@pytest.fixture
def encoder(monkeypatch) -> Callable[..., None]:
    """The encoder that `extract_cohort` gets, whatever the config says: `Corners` unless set otherwise."""

    def use(network: torch.nn.Module | None = None, dim: int = 12) -> None:
        monkeypatch.setattr(extraction, "load_encoder", lambda section: make_encoder(network, dim))

    use()
    return use


@pytest.fixture(scope="module")
def painted(slides, tmp_path_factory) -> Path:
    """Five small slides of different sizes, one of them glass."""
    folder = tmp_path_factory.mktemp("painted")
    (folder / "deeper").mkdir()
    for number in range(4):
        where = folder / "deeper" if number == 3 else folder
        slides.painted_slide(where / f"s{number}.tiff", 901 + 64 * number, 703, seed=number)
    slides.write_tiff(folder / "glass.tiff", [slides.glass(500, 400)], mpp=0.5)
    return folder


@pytest.fixture
def slide_folder(painted, tmp_path: Path) -> Path:
    """A copy of `painted` to add to and change."""
    return shutil.copytree(painted, tmp_path / "slides")


def config_for(folder: Path, out: Path, **sections: dict[str, Any]) -> ExtractConfig:
    """In this process, small batches, unless `sections` say otherwise."""
    tree: dict[str, Any] = {"slides": {"folder": folder}, "features": {"folder": out}, "extract": {}}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    tree["extract"] = {"workers": 0, "batch_size": 16} | tree["extract"]
    return ExtractConfig.model_validate(tree)


def run(config: ExtractConfig) -> Summary:
    return extract_cohort(config, cohort_slides(config), progress=False)


def files(folder: Path) -> set[str]:
    """All files, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, tuple]:
    """Everything in the feature files, comparable."""
    return {
        path.stem: (
            dataclasses.asdict(read_header(path).provenance),
            read_coords(path).tolist(),
            read_features(path).tolist(),
        )
        for path in sorted(folder.glob("*.h5"))
    }


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_every_slide_has_a_file_with_the_features_of_its_tiles_in_order(encoder, slide_folder, tmp_path, workers):
    """Truth: means of the pixels that OpenSlide gives at the stored coordinates."""
    config = config_for(slide_folder, tmp_path / "out", extract={"workers": workers, "batch_size": 7})
    summary = run(config)
    assert sorted(summary.done) == ["s0", "s1", "s2", "s3"]
    assert list(summary.empty) == ["glass"]
    assert (summary.failed, summary.already_there, summary.elsewhere) == ([], [], [])
    assert files(tmp_path / "out") == {"s0.h5", "s1.h5", "s2.h5", "s3.h5", "glass.h5"}
    n_tiles = 0
    for name, path in (("s1", slide_folder / "s1.tiff"), ("s3", slide_folder / "deeper" / "s3.tiff")):
        features_ND, coords_N2 = (
            read_features(tmp_path / "out" / f"{name}.h5"),
            read_coords(tmp_path / "out" / f"{name}.h5"),
        )
        assert features_ND.dtype == np.float16
        assert len(coords_N2) > 20
        assert coords_N2[:, ::-1].tolist() == sorted(coords_N2[:, ::-1].tolist()), "row by row"
        with open_slide(path) as slide:
            for features_D, (x, y) in zip(features_ND, coords_N2.tolist(), strict=True):
                tile_HW3 = slide.read_region_rgb(0, x, y, TILE_PX, TILE_PX) / 255
                expected = [tile_HW3[i : i + 32, j : j + 32].mean((0, 1)) for i in (0, 32) for j in (0, 32)]
                np.testing.assert_allclose(features_D, np.concatenate(expected), atol=1e-3)
    n_tiles = sum(read_header(path).n_tiles for path in (tmp_path / "out").glob("*.h5"))
    assert summary.tiles == n_tiles
    assert 0 < summary.encoder_busy <= 1


def test_features_do_not_depend_on_how_the_batches_fell(slide_folder, tmp_path):
    """A real network, whose sums depend on the batch in the last bits: well below what float16 keeps (0.1 %)."""
    network = {"name": "timm:test_vit", "random_weights": True, "device": "cpu"}
    made = []
    for name, options in (("a", {"batch_size": 16}), ("b", {"batch_size": 5}), ("c", {"workers": 2, "prefetch": 1})):
        config = config_for(slide_folder, tmp_path / name, encoder=network, extract=options)
        config = config.model_copy(update={"features": config.features.model_copy(update={"dtype": "float32"})})
        run(config)
        made.append({path.stem: read_features(path) for path in (tmp_path / name).glob("*.h5")})
    for slide, features_ND in made[0].items():
        for other in made[1:]:
            np.testing.assert_allclose(other[slide], features_ND, atol=1e-5)
    assert made[0]["s1"].std() > 0.1


def test_a_file_says_what_made_it(encoder, slide_folder, tmp_path):
    run(config_for(slide_folder, tmp_path / "out", tiles={"overlap_px": 8}, tissue={"mpp": 4.0}))
    provenance = read_header(tmp_path / "out" / "s2.h5").provenance
    assert (provenance.encoder, provenance.weights_sha256) == ("corners", make_encoder().weights_sha256)
    assert (provenance.tile_px, provenance.mpp, provenance.overlap_px, provenance.tile_level0_px) == (64, 0.5, 8, 64)
    assert (provenance.slide, provenance.empty_reason) == ("s2", "")
    with open_slide(slide_folder / "s2.tiff") as slide:
        assert provenance.slide_fingerprint == slide.fingerprint
    said = provenance.extra
    assert (said["slide_mpp"], said["mpp_source"], said["true_mpp"], said["level"], said["read_px"]) == (
        0.5,
        "file",
        0.5,
        0,
        64,
    )
    assert (said["level0_width"], said["level0_height"]) == (1029, 703)
    assert (said["tissue.mpp"], said["tiles.min_tissue"], said["tissue.method"]) == (4.0, 0.25, "otsu")
    assert (said["encoder_source"], said["encoder_precision"]) == ("made here", "float32")
    assert said["tiles_planned"] == read_header(tmp_path / "out" / "s2.h5").n_tiles
    assert said["tiles_unreadable"] == 0


def test_an_empty_slide_is_recorded_and_not_tried_again(encoder, slide_folder, tmp_path, capsys):
    config = config_for(slide_folder, tmp_path / "out")
    run(config)
    header = read_header(tmp_path / "out" / "glass.h5")
    assert (header.n_tiles, header.dim) == (0, 12)
    assert "looks like empty glass" in header.provenance.empty_reason
    assert "warning: glass: empty: nothing is stained" in capsys.readouterr().err
    again = run(config)
    assert "glass" in again.already_there
    assert len(again.already_there) == 5
    assert (again.done, again.empty, again.tiles) == ([], {}, 0)


def test_the_same_command_leaves_the_same_bytes(encoder, slide_folder, tmp_path):
    """Whichever of two readers came first."""
    for name in "ab":
        run(config_for(slide_folder, tmp_path / name, extract={"workers": 2, "qc": True}))
    written = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "ab"
    ]
    assert len(written[0]) == 10, "five feature files and five pictures"
    assert written[0] == written[1]


def test_pictures_for_quality_control(encoder, slide_folder, tmp_path):
    run(config_for(slide_folder, slide_folder / "out", extract={"qc": True}))
    assert {path.name for path in (slide_folder / "out" / "qc").iterdir()} == {
        f"{s}.png" for s in ("s0", "s1", "s2", "s3", "glass")
    }
    picture = np.asarray(Image.open(slide_folder / "out" / "qc" / "s1.png").convert("RGB")).astype(int)
    green = (abs(picture - (0, 160, 60)) < 20).all(axis=2)
    blue = (abs(picture - (40, 80, 220)) < 20).all(axis=2)
    assert green.sum() > 100  # outline of the tissue
    assert blue.sum() > 500  # grid of tiles
    assert run(config_for(slide_folder, slide_folder / "out", extract={"qc": True})).failed == [], (
        "not slides themselves"
    )


def test_unreadable_tiles_are_left_out_counted_and_recorded(encoder, slides, tmp_path, capsys):
    image = slides.paint_tissue(896, 640)[0]
    for name in ("whole", "broken"):
        slides.write_tiff(
            tmp_path / f"{name}.tiff", [image, image[::8, ::8]], mpp=0.5, tile=(128, 128), compression="jpeg"
        )
    slides.break_tile(tmp_path / "broken.tiff", 0, column=2, row=1)
    out = tmp_path / "out"
    lost = {(x, y) for x in (256, 320) for y in (128, 192)}
    run(config_for(tmp_path, out, extract={"max_bad_tiles": 0.5}, tissue={"mpp": 4.0}))
    whole, broken = (
        {
            tuple(c): f
            for c, f in zip(read_coords(out / f"{n}.h5").tolist(), read_features(out / f"{n}.h5").tolist(), strict=True)
        }
        for n in ("whole", "broken")
    )
    assert lost <= whole.keys()
    assert broken == {c: f for c, f in whole.items() if c not in lost}
    assert read_header(out / "broken.h5").provenance.extra["tiles_unreadable"] == 4
    assert f"warning: broken: 4 of {len(whole)} tiles could not be decoded" in capsys.readouterr().err
    summary = run(config_for(tmp_path, tmp_path / "strict", extract={"max_bad_tiles": 0.02}, tissue={"mpp": 4.0}))
    (failed,) = summary.failed
    assert (failed.slide, failed.stage) == ("broken", "read")
    assert "tiles cannot be decoded, extract.max_bad_tiles=0.02 allows less" in failed.reason
    assert files(tmp_path / "strict") == {"whole.h5", FAILED}


def test_features_that_do_not_fit_fail_the_slide(encoder, slide_folder, tmp_path):
    class Huge(Corners):
        def forward(self, x_N3HW: torch.Tensor) -> torch.Tensor:
            return super().forward(x_N3HW) * 1e6

    encoder(Huge())
    summary = run(config_for(slide_folder, tmp_path / "out"))
    assert {failure.stage for failure in summary.failed} == {"encode"}
    assert "no finite numbers in float16; try features.dtype=float32" in summary.failed[0].reason
    assert list(summary.empty) == ["glass"]
    assert (
        run(
            config_for(slide_folder, tmp_path / "other", features={"folder": tmp_path / "f32", "dtype": "float32"})
        ).failed
        == []
    )


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True], ids=["one", "two in flight"])
@pytest.mark.parametrize("padded", [False, True])
def test_batches_fill_across_slides(padded, ahead):
    sizes = []

    class Spy(Corners):
        def forward(self, x_N3HW: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x_N3HW))
            return super().forward(x_N3HW)

    rng = np.random.default_rng(0)
    works: list[Any] = ["a", "b", "c"]
    tiles = {
        work: rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8) for work, n in zip(works, (5, 11, 4), strict=True)
    }
    got: dict[Any, dict[int, np.ndarray]] = {work: {} for work in works}
    batches = Batches(make_encoder(Spy()), 6, padded=padded, ahead=ahead)

    def deliver(work, indices_K, features_KD):
        got[work] |= dict(zip(indices_K.tolist(), features_KD, strict=True))

    for work in works:
        batches.add(work, tiles[work], np.arange(len(tiles[work]))[::-1], deliver)
    batches.flush()
    batches.collect(deliver, everything=True)
    batches.close()
    assert 0 < batches.busy_fraction <= 1
    assert sizes == [6, 6, 6, 6 if padded else 2]
    for work in works:
        expected_KD = make_encoder().encode(tiles[work]).numpy()
        for place, index in enumerate(range(len(tiles[work]) - 1, -1, -1)):
            np.testing.assert_array_equal(got[work][index], expected_KD[place])


class Timed:
    """An encoder on which a tile takes a millisecond, a batch four more, and whose memory holds so many tiles."""

    def __init__(self, holds: int):
        self.spec, self.device = SimpleNamespace(tile_px=1), torch.device("meta")
        self.holds, self.now = holds, 0.0

    def begin(self, tiles: torch.Tensor, *, compiled: bool) -> Callable[[], None]:
        assert not compiled, "every size would be compiled"
        if len(tiles) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def wait() -> None:
            self.now += 0.004 + 0.001 * len(tiles)

        return wait


def test_the_batch_size_is_where_larger_ones_are_no_quicker_or_do_not_fit():
    """16 tiles: 800 a second, 32: 889, 64: 941, 128: 970, 256: 985, which is not 3 % more."""
    for holds, expected in ((1000, 128), (100, 64)):
        timed: Any = Timed(holds)
        assert probed_size(timed, clock=lambda timed=timed: timed.now) == expected
    with pytest.raises(EncoderError, match="does not hold a batch of 16"):
        probed_size(Timed(3), clock=lambda: 0.0)  # type: ignore[arg-type]  # what it has is enough
    assert (chosen_size(make_encoder(), "auto"), chosen_size(make_encoder(), 5)) == (16, 5)


def test_a_run_says_who_waited_for_whom():
    said = Summary(tiles=1, encoder_busy=0.38, readers_busy=0.95, device="cuda")
    assert busy_line(said) == (
        "the GPU waited 62% for readers: more workers, or faster reading; readers were busy 95% of the time"
    )
    assert busy_line(Summary(encoder_busy=0.97, readers_busy=0.2)).startswith("the encoder was busy 97% of the time")
    assert "extract.prefetch" in busy_line(Summary(encoder_busy=0.5, readers_busy=0.2))


# --- which slides ----------------------------------------------------------------------------------------------------


def cohort_of(rows: list[dict[str, Any]]):
    blank = {"patient": "p", "label": None, "split": "train", "path": None, "mpp": np.nan}
    return check_cohort(pd.DataFrame([blank | row for row in rows]), labelled=False)


def test_a_folder_is_searched_recursively(slide_folder, tmp_path):
    found = cohort_slides(config_for(slide_folder, tmp_path / "out"))
    assert [file.slide for file in found] == ["glass", "s0", "s1", "s2", "s3"]
    assert found[4].path == slide_folder / "deeper" / "s3.tiff"
    with pytest.raises(SlideFolderError, match="no such folder"):
        cohort_slides(config_for(tmp_path / "absent", tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"slides\.folder=FOLDER, or cohort=FILE"):
        cohort_slides(ExtractConfig())


def test_a_cohort_names_files_by_path_or_by_id(slide_folder, tmp_path):
    rows = [
        {"slide": "one", "path": "s1.tiff", "mpp": 0.25},
        {"slide": "three", "path": "deeper/s3.tiff"},
        {"slide": "s0"},
        {"slide": "s2.tiff"},
        {"slide": "absolute", "path": str(slide_folder / "glass.tiff")},
    ]
    found = cohort_slides(config_for(slide_folder, tmp_path / "out"), cohort_of(rows))
    assert [(file.slide, file.path.name, file.mpp) for file in found] == [
        ("one", "s1.tiff", 0.25),
        ("three", "s3.tiff", None),
        ("s0", "s0.tiff", None),
        ("s2.tiff", "s2.tiff", None),
        ("absolute", "glass.tiff", None),
    ]


def test_paths_may_be_relative_to_the_csv(slide_folder, tmp_path):
    (slide_folder / "c.csv").write_text("slide,path,mpp\na,s1.tiff,\nb,deeper/s3.tiff,0.3\n")
    config = config_for(slide_folder, tmp_path / "out", slides={"folder": None})
    config = config.model_copy(update={"cohort": slide_folder / "c.csv"})
    assert [file.path for file in cohort_slides(config)] == [
        slide_folder / "s1.tiff",
        slide_folder / "deeper" / "s3.tiff",
    ]
    assert [file.mpp for file in cohort_slides(config)] == [None, 0.3]


def test_slides_without_a_file_are_reported_together(slide_folder, tmp_path):
    rows = [{"slide": "s0"}, {"slide": "s_1"}, {"slide": "x", "path": "gone.svs"}]
    with pytest.raises(ConfigError) as caught:
        cohort_slides(config_for(slide_folder, tmp_path / "out"), cohort_of(rows))
    first, second = caught.value.problems
    assert "'s_1': no path in the CSV and no such file in slides.folder; did you mean 's1'?" in first
    assert f"'x': no file {slide_folder / 'gone.svs'} or gone.svs" in second
    with pytest.raises(ConfigError, match=r"set slides\.folder=FOLDER"):
        cohort_slides(config_for(slide_folder, tmp_path / "out", slides={"folder": None}), cohort_of(rows[:1]))


def test_shards_are_disjoint_and_together_all():
    slides = [SlideFile(str(i), Path(f"{i}.svs")) for i in range(11)]
    parts = [shard_of(slides, f"{i}/3") for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [4, 4, 3]
    assert sorted((file for part in parts for file in part), key=slides.index) == slides
    assert shard_of(slides, None) == slides


def test_a_shard_is_extracted_and_the_rest_left(encoder, slide_folder, tmp_path):
    first = run(config_for(slide_folder, tmp_path / "out", extract={"shard": "1/2"}))
    second = run(config_for(slide_folder, tmp_path / "out", extract={"shard": "2/2"}))
    assert {*first.done, *first.empty} == {"glass", "s1", "s3"}
    assert set(second.done) == {"s0", "s2"}
    assert second.already_there == []


def test_default_workers_leave_a_core_for_the_encoder(monkeypatch, tmp_path):
    config = ExtractConfig()
    for cores, expected in ((1, 1), (2, 1), (5, 4), (64, 8)):
        monkeypatch.setattr(extraction.os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        assert n_workers(config) == expected
    assert n_workers(config_for(tmp_path, tmp_path, extract={"workers": 3})) == 3


# --- what is there already -------------------------------------------------------------------------------------------


def test_files_made_otherwise_are_refused_all_at_once_and_say_how(encoder, slide_folder, tmp_path, slides):
    out = tmp_path / "out"
    run(config_for(slide_folder, out))
    before = contents(out)
    changed = {"tiles": {"min_tissue": 0.5, "overlap_px": 4}, "tissue": {"method": "fixed"}}
    with pytest.raises(ProblemsError) as caught:
        run(config_for(slide_folder, out, **changed))
    assert len(caught.value.problems) == 5
    problem = next(p for p in caught.value.problems if "s1.h5" in p)
    for part in (
        "tiles.min_tissue is 0.25, expected 0.5",
        "tissue.method is otsu, expected fixed",
        "tiles.overlap_px is 0, expected 4",
    ):
        assert part in problem
    assert "overwrite=true" in caught.value.title
    slides.painted_slide(slide_folder / "s1.tiff", 901, 703, seed=77)  # another slide under the same name
    with pytest.raises(
        ProblemsError, match=r"s1\.h5: slide_fingerprint is \w{12}\.\.\., expected \w{12}\.\.\."
    ) as caught:
        run(config_for(slide_folder, out))
    assert len(caught.value.problems) == 1
    assert contents(out) == before
    assert files(out) == {f"{name}.h5" for name in before}


def test_other_weights_another_type_and_foreign_files_are_refused(encoder, slide_folder, tmp_path):
    out = tmp_path / "out"
    run(config_for(slide_folder, out))
    other = Corners()
    other.scale *= 2
    encoder(other)
    with pytest.raises(ProblemsError, match=r"s0\.h5: weights_sha256 is"):
        run(config_for(slide_folder, out))
    encoder()
    with pytest.raises(ProblemsError, match=r"features\.dtype is float16, expected float32"):
        run(config_for(slide_folder, out, features={"folder": out, "dtype": "float32"}))
    with pytest.raises(ProblemsError, match=r"slide_mpp is 0\.5, expected 0\.25"):
        extract_cohort(
            config_for(slide_folder, out), [SlideFile("s0", slide_folder / "s0.tiff", mpp=0.25)], progress=False
        )
    (out / "s0.h5").write_bytes((out / "s0.h5").read_bytes()[:5000])
    with pytest.raises(ProblemsError, match=r"s0\.h5: truncated"):
        run(config_for(slide_folder, out))


def test_overwrite_makes_them_anew(encoder, slide_folder, tmp_path):
    out = tmp_path / "out"
    run(config_for(slide_folder, out))
    summary = run(config_for(slide_folder, out, extract={"overwrite": True}, tiles={"min_tissue": 0.9}))
    assert len(summary.done) + len(summary.empty) == 5
    assert {read_header(path).provenance.extra["tiles.min_tissue"] for path in out.glob("*.h5")} == {0.9}


def test_what_an_older_file_does_not_state_has_the_default(encoder, slide_folder, tmp_path):
    out = tmp_path / "out"
    run(config_for(slide_folder, out))
    header = read_header(out / "s0.h5")
    extra = {key: value for key, value in header.provenance.extra.items() if key != "tiles.tolerance"}
    older = dataclasses.replace(header.provenance, extra=extra)
    write_features(out / "s0.h5", read_features(out / "s0.h5"), read_coords(out / "s0.h5"), older)
    assert len(run(config_for(slide_folder, out)).already_there) == 5
    with pytest.raises(ProblemsError, match=r"s0\.h5: tiles\.tolerance is 0\.05, expected 0\.1"):
        run(config_for(slide_folder, out, tiles={"tolerance": 0.1}))


def test_an_overlap_as_large_as_the_tile_is_an_error_before_anything(encoder, slide_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"tiles\.overlap_px=64: expected less than the tile, 64 px"):
        run(config_for(slide_folder, tmp_path / "out", tiles={"overlap_px": 64}))
    assert not (tmp_path / "out").exists()


# --- failures --------------------------------------------------------------------------------------------------------


def failed_rows(folder: Path) -> dict[str, str]:
    with open(folder / FAILED, newline="") as file:
        return {row["slide"]: f"{row['stage']}: {row['reason']}" for row in csv.DictReader(file)}


def test_failures_are_listed_and_the_others_go_on(encoder, slide_folder, tmp_path, slides, capsys):
    (slide_folder / "text.svs").write_text("no slide")
    slides.write_tiff(slide_folder / "no_mpp.tiff", [slides.paint_tissue(500, 400)[0]])
    out = tmp_path / "out"
    summary = run(config_for(slide_folder, out))
    assert len(summary.done) == 4
    assert {f.slide for f in summary.failed} == set(failed_rows(out)) == {"text", "no_mpp"}
    assert failed_rows(out)["text"].startswith("open: ")
    for way in ("properties", "mpp column", "slides.mpp"):
        assert way in failed_rows(out)["no_mpp"]
    assert "failed: text (open): " in capsys.readouterr().err
    again = run(config_for(slide_folder, out, slides={"folder": slide_folder, "mpp": 0.5}))
    assert again.done == ["no_mpp"], "tried again, and done with slides.mpp"
    assert set(failed_rows(out)) == {"text"}
    (slide_folder / "text.svs").unlink()
    slides.painted_slide(slide_folder / "text.tiff", 700, 500)
    assert run(config_for(slide_folder, out, slides={"folder": slide_folder, "mpp": 0.5})).failed == []
    assert FAILED not in files(out), "nothing is left in it"


def test_failures_of_other_processes_stay_in_the_list(encoder, slide_folder, tmp_path):
    for name in ("a", "b"):
        (slide_folder / f"bad_{name}.svs").write_text("no slide")
    for part in ("1/2", "2/2"):
        assert len(run(config_for(slide_folder, tmp_path / "out", extract={"shard": part})).failed) == 1
    assert set(failed_rows(tmp_path / "out")) == {"bad_a", "bad_b"}


def test_a_slide_that_kills_its_reader_is_named_and_the_others_go_on(encoder, slide_folder, tmp_path):
    """A named pipe that gives no data stands for a slide on whose pixels the decoder crashes."""
    pipe = slide_folder / "deadly.tiff"
    os.mkfifo(pipe)

    def crash_the_reader_that_has_it_open() -> None:
        while (write_end := open_if_read(pipe)) is None:
            time.sleep(0.02)
        while not (victims := [child for child in psutil.Process().children() if has_open(child, pipe)]):
            time.sleep(0.02)
        for child in victims:
            child.send_signal(signal.SIGSEGV)
        os.close(write_end)

    thread = threading.Thread(target=crash_the_reader_that_has_it_open)
    thread.start()
    summary = run(config_for(slide_folder, tmp_path / "out", extract={"workers": 2}))
    thread.join()
    assert len(summary.done) == 4
    (failed,) = summary.failed
    assert failed.slide == "deadly"
    assert "its reader process died (SIGSEGV) while finding its tissue" in failed_rows(tmp_path / "out")["deadly"]


def open_if_read(pipe: Path) -> int | None:
    """The end to write to, once another process has the pipe open for reading."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def has_open(process: psutil.Process, path: Path) -> bool:
    return any(os.path.realpath(handle) == str(path) for handle in Path(f"/proc/{process.pid}/fd").iterdir())


# --- interruptions ---------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Process id of a fork that does `work`, as from a terminal: a job in the background inherits no Ctrl-C."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(0)
    return pid


def quietly(config: ExtractConfig) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    run(config)


@FORKS
def test_killed_at_random_moments_20_times_every_file_is_whole_and_as_undisturbed(
    encoder, slide_folder, tmp_path, slides
):
    for number in range(4, 12):
        slides.painted_slide(slide_folder / f"s{number}.tiff", 701 + 32 * number, 603, seed=number)
    encoder(Corners(slow_s=0.002))
    run(config_for(slide_folder, tmp_path / "undisturbed"))
    expected = contents(tmp_path / "undisturbed")
    out = tmp_path / "out"
    rng = random.Random(0)
    kills, interrupted, seen = 0, 0, 0
    while kills < 20:
        workers = int(kills % 5 == 4)  # readers take a while to start: every fifth time
        pid = in_child(
            lambda w=workers: quietly(config_for(slide_folder, out, extract={"workers": w, "batch_size": 4}))
        )
        time.sleep(rng.uniform(0.8, 1.6) if workers else rng.uniform(0.02, 0.25))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += 1
        interrupted += os.WIFSIGNALED(status)
        found = contents(out) if out.exists() else {}
        assert found == {name: expected[name] for name in found}, "what is there is whole and right"
        assert len(found) >= seen, "and stays"
        seen = len(found)
        if seen == len(expected):
            for path in rng.sample(sorted(out.glob("*.h5")), 8):
                path.unlink()
            seen -= 8
    assert interrupted >= 10
    run(config_for(slide_folder, out))
    assert contents(out) == expected
    assert files(out) == {f"{name}.h5" for name in expected}, "no leftovers"


@FORKS
def test_what_killed_processes_left_beside_whole_files_goes(encoder, slide_folder, tmp_path):
    out = tmp_path / "out"
    run(config_for(slide_folder, out))
    whole = files(out)
    os.waitpid(dead := in_child(lambda: None), 0)
    owner = {"token": "t", "host": "h", "machine": this_machine(), "pid": dead}
    (out / ".s1.claim").write_text(json.dumps(owner))
    (out / ".s2.claim").write_text(json.dumps(owner | {"machine": "another"}))
    for name in (".s3.h5.h.1.partial", ".s0.claim.1f.stale", ".failed.csv.h.1.partial", ".failed.csv.claim"):
        (out / name).write_text(json.dumps(owner))
    (out / ".s33.h5.h.1.partial").touch()
    assert len(run(config_for(slide_folder, out)).already_there) == 5
    assert files(out) == whole | {".s2.claim", ".s33.h5.h.1.partial"}, "what may belong to living processes stays"


@FORKS
@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_cleanly_and_the_same_command_continues(encoder, slide_folder, tmp_path, slides, what):
    """To the whole process group, as a terminal sends it: the reader process gets it too."""
    for number in range(4, 9):
        slides.painted_slide(slide_folder / f"s{number}.tiff", 701, 503, seed=number)
    encoder(Corners(slow_s=0.05))
    out, said = tmp_path / "out", tmp_path / "stderr.txt"
    command = [f"slides.folder={slide_folder}", f"out={out}", "workers=1", "batch_size=4"]

    def work() -> None:
        with open(said, "w", buffering=1) as file, contextlib.redirect_stderr(file):
            code = main(command)
        os._exit(code)

    pid = in_child(work)
    until = time.monotonic() + 60
    while not (out / "s0.h5").exists() and time.monotonic() < until:
        time.sleep(0.01)
    began = time.monotonic()
    os.killpg(pid, what)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert time.monotonic() - began < 10
    assert said.read_text().endswith("\nInterrupted. Finished slides are kept; the same command continues.\n")
    assert "Traceback" not in said.read_text()
    there = files(out)
    assert {"s0.h5"} <= there < {f"s{i}.h5" for i in range(9)} | {"glass.h5"}, "no claims, no partial files"
    kept = (out / "s0.h5").stat().st_mtime_ns
    encoder()
    assert main(command) == 0
    assert len(files(out)) == 10
    assert (out / "s0.h5").stat().st_mtime_ns == kept


@FORKS
def test_two_processes_at_once_do_every_slide_exactly_once(encoder, slide_folder, tmp_path, slides):
    for number in range(4, 14):
        slides.painted_slide(slide_folder / f"s{number}.tiff", 701, 503 + 32 * number, seed=number)
    encoder(Corners(slow_s=0.01))
    run(config_for(slide_folder, tmp_path / "alone"))
    context = multiprocessing.get_context("fork")
    start, reports = context.Barrier(2), context.Queue()

    def work() -> None:
        torch.set_num_threads(1)
        start.wait()
        summary = run(config_for(slide_folder, tmp_path / "out"))
        reports.put((summary.done + list(summary.empty), summary.failed))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    done = [reports.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [failed for _, failed in done] == [[], []]
    first, second = (slides for slides, _ in done)
    assert sorted(first + second) == sorted(path.stem for path in (tmp_path / "alone").glob("*.h5"))
    assert min(len(first), len(second)) >= 2, "they share the work"
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_slides_of_other_processes_are_left_to_them_or_waited_for(encoder, slide_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "POLL_S", 0.05)
    out = tmp_path / "out"
    config = config_for(slide_folder, out)
    with Claims(out) as theirs:
        assert theirs.take("s1")
        summary = run(config)
        assert summary.elsewhere == ["s1"]
        assert len(summary.done) == 3
        threading.Timer(0.5, lambda: theirs.release("s1")).start()  # given up by its owner
        waited = extract_cohort(config, cohort_slides(config), progress=False, wait_for_others=True)
    assert (waited.done, waited.elsewhere) == (["s1"], [])


def test_a_slide_whose_claim_was_lost_is_not_written(encoder, slide_folder, tmp_path, monkeypatch):
    """As after a long suspension: another process took the slide over and must not be disturbed."""
    monkeypatch.setattr(Claims, "holds", lambda self, slide: slide != "s1")
    summary = run(config_for(slide_folder, tmp_path / "out"))
    assert summary.elsewhere == ["s1"]
    assert "s1.h5" not in files(tmp_path / "out")


# --- full disks ------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_with_a_clear_error_and_no_half_file(encoder, slide_folder, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []
    create = extract.features.cache.h5py.Group.create_dataset

    def full_after_two(self, name, *arguments, **options):
        written.append(name)
        if len(written) > 4:  # features and coords of two slides
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(self, name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(extract.features.cache.h5py.Group, "create_dataset", full_after_two)
        with pytest.raises(OutputError, match=r"out: no space left \(No space left on device\).*run again to continue"):
            run(config_for(slide_folder, out))
    assert len(files(out)) == 2, "two whole files, no claims, no partial files"
    assert len(contents(out)) == 2
    assert len(run(config_for(slide_folder, out)).already_there) == 2


@FORKS
def test_a_quota_stops_too(slide_folder, tmp_path, encoder):
    """A real one: no file may grow beyond 10 kB. h5py notices it when it closes the file."""
    out = tmp_path / "out"

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            quietly(config_for(slide_folder, out))
        except OutputError as error:
            os._exit(7 if "no space left (File too large)" in str(error) else 8)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 7
    assert not {name for name in files(out) if name.startswith(".")}
    for path in out.glob("*.h5"):
        read_header(path)


def test_a_full_disk_for_pictures_stops_as_well(encoder, slide_folder, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="no space left"):
        run(config_for(slide_folder, tmp_path / "out", extract={"qc": True}))
    assert files(tmp_path / "out") == set()
