from __future__ import annotations

import os
import pickle
import shutil
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from extract.slides import images as images_module
from extract.slides import slide as slide_module
from extract.slides.errors import MppError, SlideFolderError, SlideOpenError, SlideReadError
from extract.slides.files import find_slides
from extract.slides.slide import open_slide

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WSI = SHARED / "wsi"
FIXTURES = WSI / "openslide-python-fixtures"
needs_wsi = pytest.mark.skipif(not WSI.is_dir(), reason="no shared data")


# --- microns per pixel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mpp_in", ["tags", "inch", "aperio"])
def test_mpp_of_file(slides, tmp_path, mpp_in):
    path = slides.write_tiff(tmp_path / "a.tiff", [slides.noise(210, 150)], mpp=0.2503, mpp_in=mpp_in)
    slide = open_slide(path)
    assert slide.mpp == pytest.approx(0.2503, rel=1e-5)
    assert slide.mpp_source == "file"


def test_mpp_order_csv_then_file_then_config(slides, tmp_path):
    stated = slides.write_tiff(tmp_path / "a.tiff", [slides.noise(210, 150)], mpp=0.25)
    silent = slides.write_tiff(tmp_path / "b.tiff", [slides.noise(210, 150)])
    sources = [
        (slide.mpp, slide.mpp_source)
        for slide in (
            open_slide(stated, 0.3, default_mpp=0.9),
            open_slide(stated, float("nan"), default_mpp=0.9),
            open_slide(silent, None, default_mpp=0.9),
            open_slide(silent, 0.3, default_mpp=0.9),
        )
    ]
    assert sources == [
        (0.3, "csv"),
        (pytest.approx(0.25), "file"),
        (0.9, "slides.mpp"),
        (0.3, "csv"),
    ]


def test_missing_mpp_names_all_three_ways_and_objective_power_is_no_mpp(slides, tmp_path):
    path = slides.write_tiff(tmp_path / "a.svs", [slides.noise(210, 150)], mpp_in="aperio", objective=40)
    with openslide.OpenSlide(path) as raw:
        assert raw.properties["openslide.objective-power"] == "40"
    with pytest.raises(MppError) as caught:
        open_slide(path)
    for way in ("openslide.mpp-x", "mpp column", "slides.mpp="):
        assert way in str(caught.value)


def test_printer_resolution_is_not_believed(slides, tmp_path):
    path = slides.write_tiff(tmp_path / "a.tiff", [slides.noise(210, 150)], mpp=25_400 / 72, mpp_in="inch")
    with pytest.raises(MppError, match=r"352\.778.*not believed"):
        open_slide(path)
    assert open_slide(path, default_mpp=0.5).mpp == 0.5


def test_nearly_square_pixels_are_averaged_others_refused(slides, tmp_path):
    near = slides.write_tiff(tmp_path / "near.tiff", [slides.noise(210, 150)], mpp=(0.2500, 0.2510))
    far = slides.write_tiff(tmp_path / "far.tiff", [slides.noise(210, 150)], mpp=(0.25, 0.5))
    assert open_slide(near).mpp == pytest.approx(0.2505, rel=1e-5)
    with pytest.raises(MppError, match="not square"):
        open_slide(far)
    assert open_slide(far, 0.25).mpp == 0.25


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("inf")])
def test_impossible_mpp_in_the_csv(slides, tmp_path, mpp):
    path = slides.write_tiff(tmp_path / "a.tiff", [slides.noise(210, 150)], mpp=0.25)
    with pytest.raises(MppError, match="positive"):
        open_slide(path, mpp)


# --- pixels --------------------------------------------------------------------------------------------------------


def test_levels_and_pixels_are_those_written(slides, tmp_path):
    levels = [slides.noise(*size, seed=i) for i, size in enumerate([(1001, 803), (333, 267), (100, 81)])]
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", levels, mpp=0.25))
    assert (slide.width, slide.height) == (1001, 803)
    assert slide.level_sizes == ((1001, 803), (333, 267), (100, 81))
    assert slide.level_downsamples == pytest.approx([1, (1001 / 333 + 803 / 267) / 2, (1001 / 100 + 803 / 81) / 2])
    assert slide.geometry.level_block_px[0] == (48, 64)
    np.testing.assert_array_equal(slide.read_region_rgb(0, 17, 401, 300, 211), levels[0][401:612, 17:317])
    np.testing.assert_array_equal(slide.read_region_rgb(2, 0, 0, 100, 81), levels[2])


def test_whole_downsamples_are_read_exactly_anywhere(slides, tmp_path):
    levels = [slides.noise(1200, 900), slides.noise(400, 300, seed=1)]
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", levels, mpp=0.25))
    np.testing.assert_array_equal(slide.read_region_rgb(1, 3 * 37, 3 * 111, 91, 67), levels[1][111:178, 37:128])


def test_outside_is_white(slides, tmp_path):
    image = slides.noise(210, 150)
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.25))
    region = slide.read_region_rgb(0, -20, 100, 300, 90)
    expected = np.full((90, 300, 3), 255, np.uint8)
    expected[:50, 20:230] = image[100:]
    np.testing.assert_array_equal(region, expected)
    assert (slide.read_region_rgb(0, 5000, 5000, 7, 9) == 255).all()


def test_partly_transparent_pixels_as_composited_by_pillow(slides, tmp_path):
    levels = [slides.noise(1001, 803), slides.noise(333, 267, seed=1)]
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", levels, mpp=0.25))
    with openslide.OpenSlide(slide.path) as raw:  # the slide ends within a level px of this region
        rgba = raw.read_region((980, 782), 1, (50, 40))
    alpha_HW = np.asarray(rgba)[:, :, 3]
    assert ((alpha_HW > 0) & (alpha_HW < 255)).any()
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    difference = np.asarray(white.convert("RGB")).astype(int) - slide.read_region_rgb(1, 980, 782, 50, 40)
    assert abs(difference).max() <= 3  # un-premultiplying in 8 bits, which ours does not do, rounds


def test_premultiplied_colours_over_white(slides, tmp_path, monkeypatch):
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [slides.noise(210, 150)], mpp=0.25))
    argb_HW = np.array([[0x00000000, 0x80402010, 0xFF0A0B0C]], np.uint32)
    monkeypatch.setattr(slide_module._OpenSlideReader, "_read_argb", lambda *_: argb_HW)
    expected = [[[255, 255, 255], [0x40 + 127, 0x20 + 127, 0x10 + 127], [10, 11, 12]]]
    np.testing.assert_array_equal(slide.read_region_rgb(0, 0, 0, 3, 1), expected)


def test_unreadable_region_is_an_error_and_the_next_read_works(slides, tmp_path):
    image = slides.paint_tissue(640, 384)[0]
    path = slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.25, tile=(128, 128), compression="jpeg")
    whole = open_slide(path).read_region_rgb(0, 0, 0, 640, 384)
    slides.break_tile(path, 0, column=2, row=1)
    slide = open_slide(path)
    with pytest.raises(SlideReadError, match=r"a\.tiff: level 0, 10 x 12 px at level-0 \(300, 200\)"):
        slide.read_region_rgb(0, 300, 200, 10, 12)
    np.testing.assert_array_equal(slide.read_region_rgb(0, 384, 0, 256, 384), whole[:, 384:])


def test_bad_arguments_are_named(slides, tmp_path):
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [slides.noise(210, 150)], mpp=0.25))
    with pytest.raises(ValueError, match=r"level 1 and 5 x 5"):
        slide.read_region_rgb(1, 0, 0, 5, 5)
    with pytest.raises(ValueError, match=r"0 x 5"):
        slide.read_region_rgb(0, 0, 0, 0, 5)


def test_pickled_and_forked_slides_open_the_file_for_themselves(slides, tmp_path):
    image = slides.noise(210, 150)
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.25))
    other = pickle.loads(pickle.dumps(slide))  # noqa: S301 - our own bytes
    assert other._reader is None
    np.testing.assert_array_equal(other.read_region_rgb(0, 0, 0, 210, 150), image)
    before = slide._reader
    slide._process = -1  # as after a fork
    np.testing.assert_array_equal(slide.read_region_rgb(0, 0, 0, 210, 150), image)
    assert slide._reader is not before


def test_a_file_that_changed_meanwhile_is_refused(slides, tmp_path):
    path = slides.write_tiff(tmp_path / "a.tiff", [slides.noise(210, 150)], mpp=0.25)
    with open_slide(path) as slide:
        slide.close()
        slides.write_tiff(path, [slides.noise(310, 150)], mpp=0.25)
        with pytest.raises(SlideOpenError, match="changed"):
            slide.read_region_rgb(0, 0, 0, 5, 5)


# --- thumbnails ----------------------------------------------------------------------------------------------------


def test_thumbnail_is_an_exact_area_average(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "THUMBNAIL_BLOCK_PX", 100)  # several blocks
    image = slides.noise(615, 430)
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.5))
    thumbnail = slide.thumbnail(3.5)  # 7 px in one; 430 = 61 * 7 + 3
    padded = np.full((62 * 7, 88 * 7, 3), 255.0)
    padded[:430, :615] = image
    expected = padded.reshape(62, 7, 88, 7, 3).mean(axis=(1, 3))
    assert thumbnail.mpp == 3.5
    assert thumbnail.unreadable == 0
    assert thumbnail.image_HW3.shape == expected.shape
    assert abs(thumbnail.image_HW3 - expected).max() <= 1


def test_thumbnail_scale_is_exact_for_odd_ratios(slides, tmp_path):
    x = np.arange(1370)
    ramp = np.zeros((990, 1370, 3), np.uint8)
    ramp[:, :, 0] = x * 255 // 1369
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", slides.shrink(ramp, [(685, 495)]), mpp=0.3))
    thumbnail = slide.thumbnail(2.0)
    scale = 2.0 / 0.3
    assert thumbnail.image_HW3.shape == (np.ceil(990 / scale), np.ceil(1370 / scale), 3)
    centres = (np.arange(205) + 0.5) * scale - 0.5
    assert abs(thumbnail.image_HW3[70, :205, 0] - centres * 255 / 1369).max() < 1.5


def test_thumbnail_is_never_enlarged(slides, tmp_path):
    image = slides.noise(60, 41)
    thumbnail = open_slide(slides.write_tiff(tmp_path / "a.tiff", [image], mpp=9.0)).thumbnail(8.0)
    assert thumbnail.mpp == pytest.approx(9.0, rel=1e-6)  # older tifffile rounds the tag
    np.testing.assert_array_equal(thumbnail.image_HW3, image)


def test_too_fine_a_thumbnail_is_refused(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "MAX_THUMBNAIL_PX", 100)
    slide = open_slide(slides.write_tiff(tmp_path / "a.tiff", [slides.noise(410, 330)], mpp=0.5))
    assert slide.thumbnail(2.05).image_HW3.shape[1] == 100
    with pytest.raises(ValueError, match=r"expected at least 2\.05 \(tissue\.mpp\)"):
        slide.thumbnail(2.0)


def test_unreadable_part_of_a_thumbnail_is_white_and_counted(slides, tmp_path):
    image = slides.paint_tissue(896, 640)[0]
    path = slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.5, tile=(128, 128), compression="jpeg")
    whole = open_slide(path).thumbnail(4.0).image_HW3
    slides.break_tile(path, 0, column=2, row=2)
    thumbnail = open_slide(path).thumbnail(4.0)
    assert 128**2 <= thumbnail.unreadable * 896 * 640 <= 4 * 128**2
    bad_HW = (thumbnail.image_HW3 != whole).any(axis=2)
    assert (thumbnail.image_HW3[bad_HW] == 255).all()
    assert bad_HW[33:47, 33:47].mean() > 0.9
    assert bad_HW.sum() <= thumbnail.unreadable * bad_HW.size + 1


# --- plain images --------------------------------------------------------------------------------------------------


def test_plain_images_need_an_mpp_and_transparent_is_white(slides, tmp_path):
    rgba = np.dstack([slides.noise(91, 64), np.full((64, 91), 255, np.uint8)])
    rgba[:20, :30] = (10, 20, 30, 0)
    Image.fromarray(rgba).save(tmp_path / "a.png", dpi=(72, 72))
    with pytest.raises(MppError):
        open_slide(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png", 0.5)
    assert slide.level_sizes == ((91, 64),)
    expected = rgba[:, :, :3].copy()
    expected[:20, :30] = 255
    np.testing.assert_array_equal(slide.read_region_rgb(0, 0, 0, 91, 64), expected)
    outside = slide.read_region_rgb(0, 80, -4, 20, 10)
    np.testing.assert_array_equal(outside[4:, :11], expected[:6, 80:])
    assert (outside[:4] == 255).all()
    assert (outside[:, 11:] == 255).all()


def test_untiled_tiff_with_resolution_tags(slides, tmp_path):
    image = slides.noise(91, 64)
    Image.fromarray(image).save(tmp_path / "a.tif", resolution_unit=3, x_resolution=20_000, y_resolution=20_000)
    assert openslide.OpenSlide.detect_format(tmp_path / "a.tif") is None
    slide = open_slide(tmp_path / "a.tif")
    assert slide.mpp == pytest.approx(0.5)
    np.testing.assert_array_equal(slide.read_region_rgb(0, 0, 0, 91, 64), image)


@pytest.mark.parametrize(("mode", "suffix"), [("L", ".png"), ("P", ".png"), ("RGB", ".jpg"), ("CMYK", ".jpg")])
def test_other_colour_modes_become_rgb(slides, tmp_path, mode, suffix):
    Image.fromarray(slides.paint_tissue(91, 64)[0]).convert(mode).save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(open_slide(tmp_path / f"a{suffix}", 0.5).read_region_rgb(0, 0, 0, 91, 64), expected)


def test_sixteen_bit_and_broken_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(SlideOpenError, match="8 bits"):
        open_slide(tmp_path / "deep.png", 0.5)
    with pytest.raises(SlideOpenError, match=r"broken\.png: not an image"):
        open_slide(tmp_path / "broken.png", 0.5)


def test_large_images_use_our_limit_not_pillows(slides, tmp_path, monkeypatch):
    Image.fromarray(slides.noise(91, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_slide(tmp_path / "a.png", 0.5).read_region_rgb(0, 0, 0, 2, 2).shape == (2, 2, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(images_module, "MAX_IMAGE_PIXELS", 91 * 64 - 1)
    with pytest.raises(SlideOpenError, match="tiled pyramid"):
        open_slide(tmp_path / "a.png", 0.5)


# --- files ---------------------------------------------------------------------------------------------------------


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(SlideOpenError, match="no such file"):
        open_slide(tmp_path / "a.svs")
    (tmp_path / "b.svs").write_bytes(b"hello")
    with pytest.raises(SlideOpenError, match=r"b\.svs: not a slide format"):
        open_slide(tmp_path / "b.svs")


def test_fingerprint_follows_the_content_not_the_name(slides, tmp_path):
    image = slides.noise(910, 640)
    path = slides.write_tiff(tmp_path / "a.tiff", [image], mpp=0.5, compression="none")
    first = open_slide(path).fingerprint
    shutil.copy(path, tmp_path / "renamed.tiff")
    assert open_slide(tmp_path / "renamed.tiff").fingerprint == first
    image[320, 455] ^= 1
    slides.write_tiff(path, [image], mpp=0.5, compression="none")
    assert open_slide(path).fingerprint != first
    assert len(first) == 64


def test_find_slides(tmp_path):
    for name in (
        "x/b.SVS",
        "x/y/a.tiff",
        "c.png",
        "notes.txt",
        ".hidden.svs",
        "._b.svs",
        ".trash/z.svs",
        "m.mrxs",
        "m/Data0000.dat",
        "m/preview.png",
        "v/v.vms",
        "v/v_(0,0).jpg",
        "v/w.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[Virtual Microscope Specimen]\nImageFile=v_(0,0).jpg\n" if name.endswith("vms") else "")
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    found = find_slides(tmp_path)
    assert {slide: path.relative_to(tmp_path).as_posix() for slide, path in found.items()} == {
        "a": "x/y/a.tiff",
        "b": "x/b.SVS",
        "c": "c.png",
        "m": "m.mrxs",
        "v": "v/v.vms",
        "w": "v/w.jpg",
    }


def test_find_slides_reports_all_doubles(tmp_path):
    for name in ("a.svs", "x/a.tiff", "b.svs", "x/b.svs", "c.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(SlideFolderError) as caught:
        find_slides(tmp_path)
    assert len(caught.value.problems) == 2
    assert "a.svs" in caught.value.problems[0]
    assert "x/a.tiff" in caught.value.problems[0]


def test_find_slides_says_when_there_are_none(tmp_path):
    with pytest.raises(SlideFolderError, match="no file ends in"):
        find_slides(tmp_path)
    with pytest.raises(SlideFolderError, match="no such folder"):
        find_slides(tmp_path / "absent")


# --- real files ----------------------------------------------------------------------------------------------------


@needs_wsi
@pytest.mark.parametrize(
    ("name", "size", "mpp"),
    [
        ("CMU-1-Small-Region.svs", (2220, 2967), 0.499),
        ("dapi.ndpi", (3968, 4864), 0.2281750559),
        ("multi_frame_jpeg_camelyon_challenge_image.dcm", (1152, 700), 28.9685),
    ],
)
def test_real_slides(name, size, mpp):
    slide = open_slide(WSI / name)
    assert (slide.width, slide.height) == size
    assert slide.mpp == pytest.approx(mpp, rel=1e-9)
    with openslide.OpenSlide(WSI / name) as raw:
        expected = np.asarray(raw.read_region((150, 210), 0, (333, 222)).convert("RGB"))
    np.testing.assert_array_equal(slide.read_region_rgb(0, 150, 210, 333, 222), expected)


@needs_wsi
def test_real_broken_files():
    for path in (WSI / "broken.svs", FIXTURES / "unopenable.tiff"):
        with pytest.raises(SlideOpenError, match=path.name):
            open_slide(path, 0.5)
    slide = open_slide(FIXTURES / "unreadable.svs")
    for _ in range(2):  # the handle is reopened, so the reason stays the true one
        with pytest.raises(SlideReadError, match="Bogus marker length"):
            slide.read_region_rgb(0, 0, 0, 16, 16)
    with pytest.raises(SlideReadError, match="no part"):
        slide.thumbnail(8.0)
    with pytest.raises(MppError, match="not believed"):
        open_slide(FIXTURES / "boxes.tiff")


@needs_wsi
def test_a_dicom_series_is_one_slide(tmp_path):
    assert sorted(find_slides(FIXTURES)) == ["boxes", "boxes_0", "small", "unopenable", "unreadable"]
    (tmp_path / "study" / "series").mkdir(parents=True)
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        shutil.copyfile(FIXTURES / name, tmp_path / "study" / "series" / name)
    shutil.copyfile(WSI / "multi_frame_jpeg_camelyon_challenge_image.dcm", tmp_path / "study" / "other.dcm")
    found = find_slides(tmp_path)
    assert sorted(found) == ["other", "series"]
    assert open_slide(found["series"]).level_sizes == ((16, 16),)
    first, second = (open_slide(tmp_path / "study" / "series" / f"boxes_{i}.dcm").fingerprint for i in range(2))
    assert first == second


def test_a_machines_own_openslide_is_named_with_the_libraries_in_it(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f1-7f2 r-xp 0 fe:00 1 /usr/lib/x86_64-linux-gnu/libpixman-1.so.0.42.2\n"
        "7f2-7f3 r--p 0 fe:00 1 /usr/lib/x86_64-linux-gnu/libpixman-1.so.0.42.2\n"
        "7f3-7f4 r-xp 0 fe:00 2 /usr/lib/x86_64-linux-gnu/libtiff.so.6.0.0\n"
        "7f4-7f5 r-xp 0 fe:00 3 /venv/pillow.libs/libtiff-295fd75c.so.6.1.0\n"
        "7f5-7f6 rw-p 0 00:00 0 [heap]\n"
    )
    assert slide_module.loaded_libraries(maps) == ["pixman-1 0.42.2", "tiff 6.0.0"]
    assert slide_module.loaded_libraries(tmp_path / "none") == []

    def without_wheel(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(slide_module, "version", without_wheel)
    assert "(of this machine: " in slide_module._openslide_build()
