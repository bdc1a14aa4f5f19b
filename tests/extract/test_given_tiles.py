"""Tiles at coordinates that another tool chose, an even part of the tiles, tiles as images, several magnifications."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from extract.config import ExtractConfig, ProblemsError, Tiles
from extract.extraction.summary import Summary
from extract.extraction.todo import cohort_slides
from extract.extraction.work import extract_cohort
from extract.features.cache import read_coords, read_features, read_header
from extract.features.errors import CacheError
from extract.features.given import coords_files, read_given
from extract.run import main
from extract.slides.given import morton, plan_given, thinned
from extract.slides.slide import Geometry, open_slide
from extract.slides.tiles import TilePlan, group_into_regions, plan_tiles, read_tile, read_tiles, tiles_per_region
from extract.slides.tissue import TissueMask

TILE_PX = 160  # of timm:test_vit
GEOMETRY = Geometry("made.svs", 0.25, ((40000, 30010), (10000, 7502)), (1.0, 4.0), ((256, 256), (256, 256)))


def clam(path: Path, coords_N2: np.ndarray, side_px: int = TILE_PX, level: int = 0) -> Path:
    """As CLAM writes patches/<id>.h5: chunked, growing; level_dim and save_path are there too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        made = file.create_dataset("coords", data=coords_N2, maxshape=(None, 2), chunks=(1, 2))
        made.attrs.update({"patch_size": side_px, "patch_level": level, "downsample": (1.0, 1.0), "name": path.stem})
    return path


def trident(path: Path, coords_N2: np.ndarray, side: float = TILE_PX) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path.with_name(f"{path.stem}_patches.h5"), "w") as file:
        made = file.create_dataset("coords", data=coords_N2.astype(np.int64))
        made.attrs.update({"patch_size": 160, "patch_size_level0": side, "overlap": 0, "level0_magnification": 20})
    return path


def atlas_patch(path: Path, coords_N2: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = np.tile([TILE_PX, TILE_PX, 0], (len(coords_N2), 1))
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=np.hstack([coords_N2, rest]).astype(np.int32))
        file.attrs.update({"patch_size": TILE_PX, "patch_size_level0": TILE_PX})
    return path


@pytest.fixture
def folder(slides, tmp_path) -> Path:
    (tmp_path / "slides").mkdir()
    slides.painted_slide(tmp_path / "slides" / "s0.tiff")
    return tmp_path


def run(folder: Path, out: str, **tiles: object) -> tuple[Summary, Path]:
    config = ExtractConfig.model_validate(
        {
            "slides": {"folder": folder / "slides"},
            "features": {"folder": folder / out, "dtype": "float32"},
            "encoder": {"name": "timm:test_vit", "random_weights": True, "device": "cpu"},
            "tiles": tiles,
            "extract": {"workers": 0},
        }
    )
    return extract_cohort(config, cohort_slides(config), progress=False), folder / out / "s0.h5"


# --- coordinates that are given --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [clam, trident, atlas_patch])
def test_features_at_exactly_the_given_coordinates_in_their_order(folder, write):
    _, grid = run(folder, "grid")
    chosen = np.random.default_rng(0).permutation(read_header(grid).n_tiles)[:7]
    coords_N2 = read_coords(grid)[chosen]
    write(folder / "given" / "s0.h5", coords_N2)
    summary, made = run(folder, "made", coords=folder / "given")
    assert (summary.done, summary.failed) == (["s0"], [])
    assert np.array_equal(read_coords(made), coords_N2)
    np.testing.assert_allclose(read_features(made), read_features(grid)[chosen], atol=1e-5)
    assert "tissue.method" not in read_header(made).provenance.extra
    again, _ = run(folder, "made", coords=folder / "given")
    assert again.already_there == ["s0"]
    write(folder / "given" / "s0.h5", coords_N2[:5])
    with pytest.raises(ProblemsError, match="coords_sha256 is"):
        run(folder, "made", coords=folder / "given")


def test_what_cannot_be_tiles_of_this_slide_costs_the_slide(folder):
    some_N2 = np.array([[0, 0], [160, 0]])

    def reason(coords_N2: np.ndarray, side_px: int = TILE_PX, level: int = 0) -> str:
        clam(folder / "given" / "s0.h5", coords_N2, side_px, level)
        summary, _ = run(folder, "made", coords=folder / "given")
        ((slide, text),) = [(failed.slide, failed.reason) for failed in summary.failed]
        return f"{slide}: {text}"

    said = reason(some_N2, side_px=256)
    assert (
        "256 level-0 px = 128.0 microns a side, the encoder's 160 px at 0.5 microns per pixel = 80.0; 60% off" in said
    )
    assert "begin outside the slide, such as (1500, 0); it has 1500 x 1100 px" in reason(np.array([[1500, 0]]))
    assert "tiles of level 9, which s0.tiff does not have" in reason(some_N2, level=9)
    assert "are no whole level-0 px" in reason(some_N2 + 0.25)
    with pytest.raises(ProblemsError, match=r"slide 's0': no s0[.]h5 or s0_patches[.]h5"):
        (folder / "given" / "s0.h5").rename(folder / "given" / "other.h5")
        run(folder, "made", coords=folder / "given")


def test_clams_patches_of_a_coarser_level(folder):
    clam(folder / "given" / "s0.h5", np.array([[40, 60], [400, 380]]), side_px=80, level=1)  # about half the size
    summary, made = run(folder, "made", coords=folder / "given")
    assert summary.done == ["s0"]
    assert read_header(made).provenance.tile_level0_px == pytest.approx(160, rel=1e-3)


def test_an_empty_list_is_an_empty_slide(folder):
    clam(folder / "given" / "s0.h5", np.zeros((0, 2), np.int32))
    summary, _ = run(folder, "made", coords=folder / "given")
    assert summary.empty == {"s0": "no coordinates in s0.h5"}


def test_a_file_that_does_not_say_its_tiles_size(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["coords"] = np.zeros((3, 2), np.int32)
    with pytest.raises(CacheError, match="does not say how large its tiles are"):
        read_given(tmp_path / "s.h5")


@pytest.mark.parametrize("spread", [900, 60, 0], ids=["loose", "dense", "one place"])
def test_tiles_off_the_grid_are_read_as_if_alone(folder, spread):
    """More tiles than a region has room for may lie in a cell."""
    rng = np.random.default_rng(spread)
    coords_N2 = np.array([100, 80]) + rng.integers(0, spread + 1, (301, 2))
    with open_slide(folder / "slides" / "s0.tiff") as slide:
        plan = plan_given(slide.geometry, coords_N2, 64, tile_px=64, mpp=0.5, section=Tiles())
        regions = group_into_regions(plan, max_region_px=600)
        assert sorted(np.concatenate([region.indices_K for region in regions]).tolist()) == list(range(301))
        room = tiles_per_region(64, 600)
        assert all(len(r.indices_K) <= room and max(r.width_px, r.height_px) <= 600 for r in regions)
        for region in regions[:4]:
            tiles_KHW3, good, _ = read_tiles(slide, plan, region)
            for tile_HW3, index in zip(tiles_KHW3[:3], good[:3].tolist(), strict=True):
                assert np.array_equal(tile_HW3, read_tile(slide, plan, index))


# --- an even part ----------------------------------------------------------------------------------------------------


def whole_plan(tile_px: int = 224) -> TilePlan:
    tissue = TissueMask(np.ones((938, 1250), bool), 8.0, "", 0.05, np.zeros((938, 1250), bool))
    return plan_tiles(GEOMETRY, tissue, tile_px=tile_px, mpp=0.5, section=Tiles())


def test_at_most_so_many_tiles_evenly_drawn():
    plan = whole_plan()
    few = thinned(plan, 400, 0, "a")
    assert len(few) == 400
    assert len({tuple(xy) for xy in few.coords_N2.tolist()} & {tuple(xy) for xy in plan.coords_N2.tolist()}) == 400

    def unevenness(coords_N2: np.ndarray) -> float:
        counts, everything = (
            np.histogram2d(*xy_N2.T, bins=(8, 6), range=((0, 40000), (0, 30010)))[0]
            for xy_N2 in (coords_N2, plan.coords_N2)
        )
        return float((counts - 400 * everything / len(plan)).std())

    drawn = [np.random.default_rng(i).permutation(len(plan))[:400] for i in range(20)]
    at_random = [unevenness(plan.coords_N2[chosen]) for chosen in drawn]
    assert unevenness(few.coords_N2) < 0.7 * np.mean(at_random)
    assert unevenness(few.coords_N2) < min(at_random)


def test_the_part_depends_on_seed_and_slide_alone():
    plan = whole_plan()
    same = thinned(plan, 50, 3, "a").coords_N2
    assert np.array_equal(same, thinned(plan, 50, 3, "a").coords_N2)
    assert not np.array_equal(same, thinned(plan, 50, 4, "a").coords_N2)
    assert not np.array_equal(same, thinned(plan, 50, 3, "b").coords_N2)
    assert thinned(plan, len(plan), 3, "a") is plan


def test_every_tile_is_as_likely():
    plan = whole_plan(896)
    counts_N = np.zeros(len(plan))
    index = {tuple(xy): i for i, xy in enumerate(plan.coords_N2.tolist())}
    for seed in range(600):
        for xy in thinned(plan, len(plan) // 4, seed, "a").coords_N2.tolist():
            counts_N[index[tuple(xy)]] += 1
    share = counts_N / 600
    assert np.abs(share - share.mean()).max() < 5 * np.sqrt(0.25 * 0.75 / 600)


def test_z_order_by_hand():
    assert morton(np.array([[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [3, 5]])).tolist() == [0, 1, 2, 3, 4, 0b100111]


def test_a_run_with_a_limit_says_so_and_is_another_run(folder):
    summary, made = run(folder, "made", max=5, seed=2)
    assert (summary.done, read_header(made).n_tiles) == (["s0"], 5)
    assert read_header(made).provenance.extra["tiles.max"] == 5
    with pytest.raises(ProblemsError, match=r"tiles[.]max is 5, expected 0"):
        run(folder, "made")


# --- tiles as images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_tiles_are_saved_as_the_encoder_sees_them(folder, kind):
    summary, made = run(folder, "made", save=kind)
    assert summary.done == ["s0"]
    pictures = {path.stem: path for path in (folder / "made" / "tiles" / "s0").iterdir()}
    coords_N2 = read_coords(made)
    assert set(pictures) == {f"{x}_{y}" for x, y in coords_N2.tolist()}
    x, y = coords_N2[3].tolist()
    with open_slide(folder / "slides" / "s0.tiff") as slide:
        expected = slide.read_region_rgb(0, x, y, TILE_PX, TILE_PX)
    found = np.asarray(Image.open(pictures[f"{x}_{y}"]))
    difference = np.abs(found.astype(int) - expected)
    assert (difference.max() == 0) if kind == "png" else (0 < difference.mean() < 12), "the painted nuclei are noise"


def test_features_that_are_there_already_are_said_to_have_no_images(folder, capsys):
    run(folder, "made")
    run(folder, "made", save="png")
    assert "tiles.save: 1 slides have features already, and no tiles are saved of them (s0)" in capsys.readouterr().err


def test_a_slide_that_fails_leaves_no_images(slides, folder):
    with open(folder / "slides" / "s0.tiff", "r+b") as file:
        file.seek(3000)
        file.write(b"\0" * 120_000)
    summary, _ = run(folder, "made", save="png", min_tissue=0.0)
    assert [failed.slide for failed in summary.failed] == ["s0"]
    assert not (folder / "made" / "tiles" / "s0").exists()


# --- magnifications --------------------------------------------------------------------------------------------------


def command(folder: Path, *more: str) -> int:
    arguments = [f"slides.folder={folder / 'slides'}", f"out={folder / 'made'}", "encoder.name=timm:test_vit"]
    return main([*arguments, "encoder.random_weights=true", "workers=0", *more])


def test_a_folder_for_every_magnification(folder):
    assert command(folder, "tiles.mpp=[0.5,1.0]") == 0
    fine, coarse = (folder / "made" / name / "s0.h5" for name in ("mpp0.5", "mpp1"))
    headers = [read_header(path) for path in (fine, coarse)]
    assert [(h.provenance.mpp, h.provenance.tile_level0_px) for h in headers] == [(0.5, 160), (1.0, 320)]
    assert headers[0].n_tiles > 2 * headers[1].n_tiles > 0
    assert command(folder, "tiles.mpp=[0.5,1.0]") == 0  # both are there


def test_one_magnification_other_than_the_encoders(folder, capsys):
    assert command(folder, "tiles.mpp=1.0") == 0
    assert read_header(folder / "made" / "s0.h5").provenance.mpp == 1.0
    assert command(folder) == 2
    assert "mpp is 1, expected 0.5" in capsys.readouterr().err


def test_a_folder_above_the_coordinates_is_told_where_they_are(tmp_path):
    for name in ("h5_files/a.h5", "other/x.h5"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(ProblemsError) as caught:
        coords_files(tmp_path, ["a"])
    assert caught.value.title == f"coordinates are missing; there are some in {tmp_path / 'h5_files'}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tiles.mpp=[]"], "(1):\n  - tiles.mpp: list should have at least 1 item"),
        (["tiles.mpp=[0.5,-1]"], "(1):\n  - tiles.mpp.1: input should be greater than 0, got -1"),
        (["tiles.mpp=half"], "(1):\n  - tiles.mpp: input should be a valid number"),
        (["tiles.folder=x", "tiles.max=3"], "tiles.max: chooses tiles of slides"),
        (["tiles.folder=x", "tiles.mpp=[1,2]"], "tiles.mpp: several"),
        (["tiles.coords=x", "tissue.regions=y"], "tiles.coords: tiles are exactly these"),
        (["tiles.files=one"], "tiles.files: only with tiles.folder"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, capsys, given, said):
    sources = [] if any(text.startswith("tiles.folder") for text in given) else [f"slides.folder={tmp_path}"]
    with pytest.raises(SystemExit, match="2"):
        main([*sources, f"out={tmp_path / 'made'}", *given])
    assert said in capsys.readouterr().err
