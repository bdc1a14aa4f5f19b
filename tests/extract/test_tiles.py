from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from openslide import OpenSlide
from openslide.deepzoom import DeepZoomGenerator

from extract.config import Tiles
from extract.slides.errors import SlideReadError
from extract.slides.slide import Geometry, open_slide
from extract.slides.tiles import (
    GeometryError,
    TilePlan,
    choose_level,
    group_into_regions,
    plan_tiles,
    read_tile,
    read_tiles,
    tissue_fractions,
)
from extract.slides.tissue import TissueMask, find_tissue

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WSI = SHARED / "wsi"
needs_wsi = pytest.mark.skipif(not WSI.is_dir(), reason="no shared data")

KEEP_ALL = Tiles(min_tissue=0)


def geometry_of(mpp: float, *sizes: tuple[int, int], block: tuple[int, int] = (0, 0)) -> Geometry:
    """As OpenSlide would describe a file with these levels."""
    (width, height), *_ = sizes
    downsamples = tuple((width / w + height / h) / 2 for w, h in sizes)
    return Geometry("made.tiff", mpp, sizes, downsamples, (block,) * len(sizes))


def mask_of(mask_HW: np.ndarray, mpp: float) -> TissueMask:
    return TissueMask(mask_HW, mpp, "", 0.0, np.zeros_like(mask_HW))


def all_tissue(geometry: Geometry, level0_px: int = 16) -> TissueMask:
    """A mask of tissue everywhere, `level0_px` to a pixel."""
    height, width = -(-geometry.height // level0_px), -(-geometry.width // level0_px)
    return mask_of(np.ones((height, width), bool), level0_px * geometry.mpp)


def random_mask(geometry: Geometry, mpp: float, seed: int = 0) -> TissueMask:
    shape = [int(np.ceil(side * geometry.mpp / mpp)) for side in (geometry.height, geometry.width)]
    return mask_of(np.random.default_rng(seed).random(shape) < 0.5, mpp)


# --- level and sizes -----------------------------------------------------------------------------------------------

PYRAMID = ((40_000, 30_001), (20_000, 15_000), (10_000, 7_500), (2_500, 1_875))


@pytest.mark.parametrize(
    ("mpp0", "mpp", "level", "read_px"),
    [
        (0.25, 0.5, 1, 224),  # exactly there
        (0.25, 0.25, 0, 224),
        (0.2425, 0.5, 1, 224),  # 3 % off: as it is
        (0.2624, 0.5, 1, 224),  # 5 % off: still
        (0.264, 0.5, 0, 424),  # 5.6 % too coarse: level 0, reduced
        (0.2275, 0.5, 1, 246),  # 9 % too fine: level 1, reduced
        (0.25, 1.5, 2, 336),  # between two levels
        (0.5, 0.5, 0, 224),
        (0.499, 0.5, 0, 224),
        (0.25, 40.0, 3, 2240),  # coarser than all levels
    ],
)
def test_level_and_read_size(mpp0, mpp, level, read_px):
    geometry = geometry_of(mpp0, *PYRAMID)
    assert choose_level(geometry, tile_px=224, mpp=mpp, section=Tiles()) == (level, read_px)


def test_three_sizes_are_kept():
    geometry = geometry_of(0.2275, *PYRAMID)
    plan = plan_tiles(geometry, all_tissue(geometry), tile_px=224, mpp=0.5, section=Tiles())
    assert (plan.tile_px, plan.mpp) == (224, 0.5)
    assert (plan.level, plan.read_px) == (1, 246)
    downsample = (2 + 30_001 / 15_000) / 2
    assert plan.level_mpp == pytest.approx(0.2275 * downsample)
    assert plan.tile_level0_px == pytest.approx(246 * downsample)
    assert plan.true_mpp == pytest.approx(246 * 0.2275 * downsample / 224)
    assert plan.true_mpp == pytest.approx(0.5, rel=0.5 / 246)  # off by the rounding to whole pixels only


@pytest.mark.parametrize("mpp0", np.linspace(0.1, 0.52, 40).tolist())
def test_finished_tiles_have_the_wanted_mpp(mpp0):
    geometry = geometry_of(mpp0, *PYRAMID)
    section = Tiles(tolerance=0.05)
    level, read_px = choose_level(geometry, tile_px=224, mpp=0.5, section=section)
    true_mpp = geometry.level_mpps[level] * read_px / 224
    assert true_mpp == pytest.approx(0.5, rel=0.05 + 1e-9 if read_px == 224 else 0.5 / read_px)
    assert read_px >= 224 or mpp0 > 0.5 * 0.95
    finer = [i for i in range(level + 1, 4) if geometry.level_mpps[i] <= 0.5]
    assert not finer  # no coarser level would have done


def test_too_coarse_a_slide_is_refused_with_both_numbers_and_the_way_out():
    geometry = geometry_of(1.0, (5000, 4000))
    with pytest.raises(GeometryError, match=r"made\.tiff.* 1 microns per pixel.*at 0\.5.*2\.00 times.*max_upsample=2$"):
        plan_tiles(geometry, all_tissue(geometry), tile_px=224, mpp=0.5, section=Tiles())
    plan = plan_tiles(geometry, all_tissue(geometry), tile_px=224, mpp=0.5, section=Tiles(max_upsample=2))
    assert (plan.level, plan.read_px, plan.true_mpp) == (0, 112, 0.5)


def test_the_factor_advised_is_enough():
    geometry = geometry_of(1.7 / 3, (5000, 4000))
    with pytest.raises(GeometryError) as caught:
        plan_tiles(geometry, all_tissue(geometry), tile_px=224, mpp=0.5)
    advised = float(str(caught.value).rpartition("=")[2])
    plan_tiles(geometry, all_tissue(geometry), tile_px=224, mpp=0.5, section=Tiles(max_upsample=advised))


def test_overlap_as_large_as_the_tile_is_refused():
    geometry = geometry_of(0.5, (5000, 4000))
    with pytest.raises(GeometryError, match="overlap_px=224"):
        plan_tiles(geometry, all_tissue(geometry), tile_px=224, mpp=0.5, section=Tiles(overlap_px=224))


# --- the grid ------------------------------------------------------------------------------------------------------


def slow_plan(geometry: Geometry, mask: TissueMask, plan: TilePlan, min_tissue: float) -> tuple[list, list]:
    """Coordinates and tissue fractions by walking over the level, every mask pixel's overlap computed by itself."""
    downsample = geometry.level_downsamples[plan.level]
    width, height = geometry.level_sizes[plan.level]
    per_px = geometry.mpp * downsample / mask.mpp
    coords, fractions = [], []
    y = 0
    while y == 0 or y + plan.read_px <= height:
        x = 0
        while x == 0 or x + plan.read_px <= width:
            left, right = x * per_px, min(x + plan.read_px, width) * per_px
            top, bottom = y * per_px, min(y + plan.read_px, height) * per_px
            area = 0.0
            for row, column in np.argwhere(mask.mask_HW):
                across = min(right, column + 1) - max(left, column)
                down = min(bottom, row + 1) - max(top, row)
                area += max(0, across) * max(0, down)
            fraction = area / ((right - left) * (bottom - top))
            if fraction >= min_tissue:
                coords.append((round(x * downsample), round(y * downsample)))
                fractions.append(fraction)
            x += plan.stride_px
        y += plan.stride_px
    return coords, fractions


@pytest.mark.parametrize(
    ("sizes", "mpp0", "overlap_px"),
    [
        (((1501, 1103),), 0.5, 0),  # single level, odd
        (((1501, 1103), (750, 551)), 0.25, 0),  # levels do not halve exactly
        (((1501, 1103), (500, 367)), 0.21, 0),  # neither level fits: reduced
        (((1501, 1103),), 0.45, 13),  # overlap, reduced
        (((1103, 50),), 0.5, 0),  # lower than a tile
        (((50, 40),), 0.5, 0),  # smaller than a tile
        (((64, 64 * 3),), 0.5, 0),  # exactly fits
    ],
)
def test_grid_and_fractions_equal_a_slow_reference(sizes, mpp0, overlap_px):
    geometry = geometry_of(mpp0, *sizes)
    mask = random_mask(geometry, 17.3)
    section = Tiles(min_tissue=0.5, overlap_px=overlap_px)
    plan = plan_tiles(geometry, mask, tile_px=64, mpp=0.5, section=section)
    coords, fractions = slow_plan(geometry, mask, plan, 0.5)
    assert plan.coords_N2.tolist() == [list(c) for c in coords]
    assert plan.coords_N2.dtype == np.int32
    np.testing.assert_allclose(plan.tissue_N, fractions, atol=1e-6)
    whole = plan_tiles(geometry, mask, tile_px=64, mpp=0.5, section=Tiles(min_tissue=0, overlap_px=overlap_px))
    assert len(whole) >= len(plan)
    inside = whole.level_coords_N2 + whole.read_px <= geometry.level_sizes[whole.level]
    assert (inside | (whole.level_coords_N2 == 0)).all()


def test_coordinates_do_not_drift():
    geometry = geometry_of(0.2275, (200_003, 150_001), (50_000, 37_500))
    mask = all_tissue(geometry, 512)
    plan = plan_tiles(geometry, mask, tile_px=224, mpp=0.5, section=KEEP_ALL)
    assert (plan.level, plan.read_px) == (0, 492)
    last = plan.coords_N2[-1]
    assert last.tolist() == [(200_003 // 492 - 1) * 492, (150_001 // 492 - 1) * 492]
    coarse = plan_tiles(geometry, mask, tile_px=224, mpp=0.91, section=KEEP_ALL)
    downsample = (200_003 / 50_000 + 150_001 / 37_500) / 2
    columns = 50_000 // 224
    assert coarse.coords_N2[:columns, 0].tolist() == [round(i * 224 * downsample) for i in range(columns)]


def test_order_is_row_by_row_and_deterministic():
    geometry = geometry_of(0.5, (1501, 1103))
    plans = [plan_tiles(geometry, random_mask(geometry, 16.0), tile_px=64, mpp=0.5) for _ in range(2)]
    np.testing.assert_array_equal(plans[0].coords_N2, plans[1].coords_N2)
    keys = [(y, x) for x, y in plans[0].coords_N2.tolist()]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_min_tissue_is_exact_at_its_boundary():
    geometry = geometry_of(0.5, (640, 448))
    mask_HW = np.zeros((28, 40), bool)
    mask_HW[:2, :8] = True  # 16 of the 64 mask pixels under the first tile: exactly a quarter
    for min_tissue, kept in ((0.25, 1), (0.2501, 0), (0.0, 15)):  # 5 x 3 tiles fit
        section = Tiles(min_tissue=min_tissue)
        assert len(plan_tiles(geometry, mask_of(mask_HW, 8.0), tile_px=128, mpp=0.5, section=section)) == kept


def test_fractions_against_subdivided_pixels():
    mask_HW = np.random.default_rng(1).random((23, 31)) < 0.4
    fine_HW = mask_HW.repeat(10, 0).repeat(10, 1)
    edges_X2 = np.array([[0, 43], [17, 23], [101, 310], [3, 9]])
    edges_Y2 = np.array([[0, 230], [55, 56], [99, 151]])
    expected = [[fine_HW[top:bottom, left:right].mean() for left, right in edges_X2] for top, bottom in edges_Y2]
    np.testing.assert_allclose(tissue_fractions(mask_HW, edges_X2 / 10, edges_Y2 / 10), expected, atol=1e-12)


def test_no_tissue_no_tiles():
    geometry = geometry_of(0.5, (640, 448))
    plan = plan_tiles(geometry, mask_of(np.zeros((28, 40), bool), 8.0), tile_px=64, mpp=0.5)
    assert plan.coords_N2.shape == (0, 2)
    assert group_into_regions(plan) == []


# --- regions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(0, 0), (256, 240), (5000, 8)])
@pytest.mark.parametrize("overlap_px", [0, 20])
@pytest.mark.parametrize("max_region_px", [32, 300, 1024])
def test_every_tile_is_in_exactly_one_region(block, overlap_px, max_region_px):
    geometry = geometry_of(0.5, (5003, 3001), block=block)
    section = Tiles(min_tissue=0.52, overlap_px=overlap_px)
    plan = plan_tiles(geometry, random_mask(geometry, 16.0), tile_px=64, mpp=0.5, section=section)
    regions = group_into_regions(plan, max_region_px)
    indices = np.concatenate([region.indices_K for region in regions])
    assert sorted(indices.tolist()) == list(range(len(plan)))
    for region in regions:
        corners_K2 = plan.level_coords_N2[region.indices_K]
        assert corners_K2.min(axis=0).tolist() == [region.x_px, region.y_px]
        assert (corners_K2.max(axis=0) + 64).tolist() == [region.x_px + region.width_px, region.y_px + region.height_px]
        assert max(region.width_px, region.height_px) <= max(64, max_region_px)


def test_sparse_tiles_do_not_cost_a_large_region():
    geometry = geometry_of(0.5, (2048, 1536))
    mask_HW = np.zeros((96, 128), bool)
    for x, y in ((0, 0), (124, 0), (0, 92), (124, 92)):
        mask_HW[y : y + 4, x : x + 4] = True
    plan = plan_tiles(geometry, mask_of(mask_HW, 8.0), tile_px=64, mpp=0.5)
    regions = group_into_regions(plan, 4096)
    assert [(r.width_px, r.height_px) for r in regions] == [(64, 64)] * 4


def test_regions_fit_the_compressed_tiles():
    geometry = geometry_of(0.5, (20_000, 20_001), block=(256, 256))
    plan = plan_tiles(geometry, all_tissue(geometry), tile_px=224, mpp=0.5)
    first = group_into_regions(plan, 2048)[0]
    assert (first.width_px, first.height_px) == (8 * 224, 7 * 256)


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "mpp0", "level"),
    [
        (((903, 611),), 0.5, 0),  # as it is
        (((903, 611),), 0.33, 0),  # reduced by 1.52
        (((903, 612), (301, 204)), 0.17, 1),  # as it is on a level that is a third
        (((1204, 812), (301, 203)), 0.1, 1),  # reduced from a level that is a quarter
        (((50, 40),), 0.4, 0),  # smaller than a tile
        (((903, 611),), 0.7, 0),  # enlarged
    ],
)
@pytest.mark.parametrize("overlap_px", [0, 17])
def test_tiles_equal_those_cut_from_the_written_arrays(slides, tmp_path, sizes, mpp0, level, overlap_px):
    levels = [slides.noise(*size, seed=i) for i, size in enumerate(sizes)]
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", levels, mpp=mpp0))
    section = Tiles(min_tissue=0, overlap_px=overlap_px, max_upsample=2)
    plan = plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=64, mpp=0.5, section=section)
    assert plan.level == level
    seen = 0
    for region in group_into_regions(plan, 256):
        tiles_KHW3, indices_K, bad = read_tiles(slide, plan, region)
        assert tiles_KHW3.shape == (len(indices_K), 64, 64, 3)
        assert len(bad) == 0
        for tile_HW3, index in zip(tiles_KHW3, indices_K, strict=True):
            x0, y0 = plan.coords_N2[index]
            x, y = round(x0 / slide.level_downsamples[level]), round(y0 / slide.level_downsamples[level])
            side = plan.read_px
            expected_HW3 = np.full((side, side, 3), 255, np.uint8)
            cut_HW3 = levels[level][y : y + side, x : x + side]
            expected_HW3[: cut_HW3.shape[0], : cut_HW3.shape[1]] = cut_HW3
            if side != 64:
                method = cv2.INTER_AREA if side > 64 else cv2.INTER_CUBIC
                expected_HW3 = np.asarray(cv2.resize(expected_HW3, (64, 64), interpolation=method), np.uint8)
            np.testing.assert_array_equal(tile_HW3, expected_HW3)
            np.testing.assert_array_equal(read_tile(slide, plan, index), expected_HW3)
            seen += 1
    assert seen == len(plan) > 0


def test_reducing_averages_areas(slides, tmp_path):
    image = slides.noise(512, 384)
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.125))
    plan = plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=64, mpp=0.5, section=KEEP_ALL)
    expected = image[128:256, :].reshape(32, 4, 128, 4, 3).mean(axis=(1, 3))
    index = plan.coords_N2.tolist().index([0, 0])
    whole = image[:256, :256].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert abs(read_tile(slide, plan, index) - whole).max() <= 0.5 + 1e-9
    assert abs(read_tile(slide, plan, index)[32:] - expected[:, :64]).max() <= 0.5 + 1e-9


def test_lanczos_gives_the_tiles_of_openslides_deepzoom(slides, tmp_path):
    """From which Owkin's published features were made; the area average gives others."""
    path = slides.write_tiff(tmp_path / "s.tif", [slides.noise(600, 470)], mpp=0.25)
    with open_slide(path) as slide:
        both = {
            name: plan_tiles(
                slide.geometry, all_tissue(slide.geometry), tile_px=96, mpp=0.5, section=Tiles(resample=name)
            )
            for name in ("area", "lanczos")
        }
        deepzoom = DeepZoomGenerator(OpenSlide(path), tile_size=96, overlap=0)
        level = deepzoom.level_count - 2
        compared = 0
        for index, (x, y) in enumerate(both["lanczos"].level_coords_N2.tolist()):
            expected = np.asarray(deepzoom.get_tile(level, (x // 192, y // 192)).convert("RGB"))
            if expected.shape[:2] != (96, 96):
                continue  # DeepZoom cuts the last row and column off at the slide's edge
            np.testing.assert_array_equal(read_tile(slide, both["lanczos"], index), expected)
            assert np.abs(read_tile(slide, both["area"], index).astype(int) - expected).mean() > 5
            compared += 1
    assert compared >= 4


def test_levels_that_do_not_divide_are_read_within_half_a_level0_pixel(slides, tmp_path):
    """OpenSlide interpolates between level pixels there; on a smooth picture (a level px differs from its neighbour
    by less than 1) that, with its roundings, is a small difference."""
    y, x = np.mgrid[:1103, :1501]
    image = np.stack([x / 1501, y / 1103, (x + y) / 2604], axis=2) * 255
    levels = slides.shrink(image.astype(np.uint8), [(750, 551)])
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", levels, mpp=0.25))
    plan = plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=64, mpp=0.5, section=KEEP_ALL)
    assert plan.level == 1
    assert slide.level_downsamples[1] != 2
    for region in group_into_regions(plan, 300):
        tiles_KHW3, indices_K, bad = read_tiles(slide, plan, region)
        for tile_HW3, index in zip(tiles_KHW3.astype(int), indices_K, strict=True):
            assert abs(tile_HW3 - read_tile(slide, plan, index)).max() <= 2
            x, y = plan.level_coords_N2[index]
            assert abs(tile_HW3 - levels[1][y : y + 64, x : x + 64]).max() <= 2
        assert len(bad) == 0


def test_only_the_unreadable_tiles_are_lost(slides, tmp_path):
    image = slides.paint_tissue(896, 640)[0]
    path = slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.5, tile=(128, 128), compression="jpeg")
    with open_slide(path) as slide:
        plan = plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=64, mpp=0.5, section=KEEP_ALL)
        (region,) = group_into_regions(plan, 1024)
        whole, order, _ = read_tiles(slide, plan, region)
    slides.break_tile(path, 0, column=3, row=1)
    tiles_KHW3, indices_K, bad = read_tiles(open_slide(path), plan, region)
    assert sorted(plan.coords_N2[bad].tolist()) == [[384, 128], [384, 192], [448, 128], [448, 192]]
    assert sorted([*indices_K.tolist(), *bad.tolist()]) == list(range(len(plan)))
    position = {index: i for i, index in enumerate(order.tolist())}
    np.testing.assert_array_equal(tiles_KHW3, whole[[position[i] for i in indices_K.tolist()]])


def test_a_region_that_fails_as_a_whole_is_read_tile_by_tile(slides, tmp_path, monkeypatch):
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [slides.noise(640, 448)], mpp=0.5))
    plan = plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=64, mpp=0.5, section=KEEP_ALL)
    (region,) = group_into_regions(plan, 1024)
    expected, order, _ = read_tiles(slide, plan, region)
    read = type(slide).read_region_rgb

    def refuse_large(self, level, x, y, width, height):
        if width > 64 or (x, y) == (128, 64):
            raise SlideReadError("made to fail")
        return read(self, level, x, y, width, height)

    monkeypatch.setattr(type(slide), "read_region_rgb", refuse_large)
    tiles_KHW3, indices_K, bad = read_tiles(slide, plan, region)
    assert plan.coords_N2[bad].tolist() == [[128, 64]]
    np.testing.assert_array_equal(tiles_KHW3, expected[~np.isin(order, bad)])
    monkeypatch.setattr(type(slide), "read_region_rgb", lambda *_: (_ for _ in ()).throw(SlideReadError("all")))
    tiles_KHW3, indices_K, bad = read_tiles(slide, plan, region)
    assert tiles_KHW3.shape == (0, 64, 64, 3)
    assert len(indices_K) == 0
    assert sorted(bad.tolist()) == list(range(len(plan)))


# --- from file to tiles --------------------------------------------------------------------------------------------


def test_painted_slide_gives_tiles_where_the_tissue_is(slides, tmp_path):
    truth = slides.painted_slide(tmp_path / "a.tiff", 3001, 2203)
    slide = open_slide(tmp_path / "a.tiff")
    thumbnail = slide.thumbnail(8.0)
    mask = find_tissue(thumbnail.image_HW3, thumbnail.mpp)
    plan = plan_tiles(slide.geometry, mask, tile_px=128, mpp=0.5)
    kept = set(map(tuple, plan.coords_N2.tolist()))
    wrong = 0
    for y in range(0, 2203 - 127, 128):
        for x in range(0, 3001 - 127, 128):
            fraction = truth[y : y + 128, x : x + 128].mean()
            if abs(fraction - 0.25) > 0.1:  # nearer to the limit the mask's smoothing may decide
                wrong += ((x, y) in kept) != (fraction > 0.25)
    assert wrong == 0
    assert len(kept) > 50


@needs_wsi
def test_real_slide_cmu_1():
    slide = open_slide(WSI / "CMU-1-Small-Region.svs")
    thumbnail = slide.thumbnail(8.0)
    mask = find_tissue(thumbnail.image_HW3, thumbnail.mpp)
    plan = plan_tiles(slide.geometry, mask, tile_px=224, mpp=0.5)
    assert (plan.level, plan.read_px, plan.tile_level0_px) == (0, 224, 224)
    assert 50 <= len(plan) <= 65
    regions = group_into_regions(plan)
    assert sum(len(read_tiles(slide, plan, region)[1]) for region in regions) == len(plan)


@needs_wsi
def test_real_camelyon_overview_refuses_half_a_micron():
    slide = open_slide(WSI / "multi_frame_jpeg_camelyon_challenge_image.dcm")
    with pytest.raises(GeometryError, match=r"camelyon_challenge_image\.dcm.*28\.9685 microns per pixel.*at 0\.5"):
        plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=224, mpp=0.5)


@needs_wsi
def test_real_ndpi_level_geometry():
    slide = open_slide(WSI / "dapi.ndpi")
    plan = plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=224, mpp=0.5, section=KEEP_ALL)
    assert (plan.level, plan.read_px, plan.tile_level0_px) == (1, 245, 490)
    region = group_into_regions(plan)[0]
    tiles_KHW3, indices_K, bad = read_tiles(slide, plan, region)
    assert len(bad) == 0
    np.testing.assert_array_equal(tiles_KHW3[-1], read_tile(slide, plan, int(indices_K[-1])))


@needs_wsi
def test_real_unreadable_slide_has_only_bad_tiles():
    slide = open_slide(WSI / "openslide-python-fixtures" / "unreadable.svs")
    plan = plan_tiles(slide.geometry, all_tissue(slide.geometry), tile_px=8, mpp=0.5)
    (region,) = group_into_regions(plan)
    tiles_KHW3, indices_K, bad = read_tiles(slide, plan, region)
    assert (len(tiles_KHW3), len(indices_K), len(bad)) == (0, 0, 4)
