"""Reading a file's own JPEG blocks: the pixels are OpenSlide's, whatever the file, or OpenSlide reads them."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile

from extract.config import Tiles
from extract.slides.errors import SlideReadError
from extract.slides.slide import BLOCKS, open_slide
from extract.slides.tiles import (
    GeometryError,
    group_into_regions,
    plan_tiles,
    read_tile,
    read_tiles,
    shrunk_by_decoder,
)
from extract.slides.tissue import TissueMask

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
CMU_1 = SHARED / "wsi" / "CMU-1-Small-Region.svs"
KINDS = {
    "420": {"subsampling": (2, 2)},
    "422": {"subsampling": (2, 1)},
    "444": {"subsampling": (1, 1)},
    "big-endian": {"byteorder": ">", "bigtiff": True},  # classic ones OpenSlide 4.0 does not open
    "bigtiff": {"bigtiff": True},
    "grey": {"photometric": "minisblack"},
    "blocks of 48 x 80 px": {"tile": (80, 48)},
}


def write_jpeg(path: Path, levels: list[np.ndarray], **how) -> Path:
    """A tiled JPEG pyramid, as its kind says."""
    made = {"photometric": "rgb", "tile": (128, 96), "subsampling": (2, 2)} | how
    file_options = {key: made.pop(key) for key in ("byteorder", "bigtiff") if key in made}
    with tifffile.TiffWriter(path, **file_options) as file:
        for number, level_HW3 in enumerate(levels):
            pixels = level_HW3[:, :, 1] if made["photometric"] == "minisblack" else level_HW3
            file.write(
                pixels,
                compression="jpeg",
                subfiletype=1 if number else 0,
                resolution=(40_000, 40_000),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
                **(made if made["photometric"] == "rgb" else made | {"subsampling": None}),
            )
    return path


def write_rgb_jpeg(path: Path, image_HW3: np.ndarray, side: int = 64) -> Path:
    """JPEG blocks that hold RGB itself, as Aperio's scanners write them: nothing in a block says so but its tags."""
    with tifffile.TiffWriter(path) as file:
        file.write(
            image_HW3,
            tile=(side, side),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"outcolorspace": "rgb", "level": 90},
            description="Aperio Image Library v11.2.1 \r\ntest|MPP = 0.25|AppMag = 40",
            metadata=None,
        )
    return path


def picture(slides, width: int = 611, height: int = 437) -> np.ndarray:
    image_HW3, _ = slides.paint_tissue(width, height)
    image_HW3[50:90, 100:180] = slides.noise(80, 40)
    return image_HW3


def differences(path: Path, seed: int = 0, n: int = 25) -> int:
    """The largest difference between both ways over regions anywhere, over the edges too."""
    rng = np.random.default_rng(seed)
    worst = 0
    with open_slide(path, 0.25) as ours, open_slide(path, 0.25, how="openslide") as truth:
        for _ in range(n):
            level = int(rng.integers(len(ours.level_sizes)))
            downsample = ours.level_downsamples[level]
            x, y = (int(rng.integers(-40, side) * downsample) for side in ours.level_sizes[level])
            width_px, height_px = rng.integers(1, 300, 2).tolist()
            pair = [slide.read_region_rgb(level, x, y, width_px, height_px) for slide in (ours, truth)]
            worst = max(worst, int(np.abs(pair[0].astype(int) - pair[1]).max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_openslide(slides, tmp_path, kind):
    image_HW3 = picture(slides)
    path = write_jpeg(tmp_path / "a.tiff", slides.shrink(image_HW3, [(305, 218)]), **KINDS[kind])
    with open_slide(path, how="auto") as slide:
        assert slide.has_blocks(0)
    assert differences(path) == 0


def test_pixels_of_blocks_that_hold_rgb_itself(slides, tmp_path):
    image_HW3 = picture(slides)
    path = write_rgb_jpeg(tmp_path / "a.svs", image_HW3)
    with open_slide(path) as slide:
        assert slide.has_blocks(0)
        near_HW3 = slide.read_region_rgb(0, 0, 0, 611, 437)
    assert differences(path) == 0
    assert np.abs(near_HW3.astype(int) - image_HW3).mean() < 8  # not only OpenSlide's, but the picture's


def test_a_level_whose_pixels_lie_between_those_of_level_0_is_left_to_openslide(slides, tmp_path):
    path = write_jpeg(tmp_path / "a.tiff", slides.shrink(picture(slides), [(204, 147)]))
    with open_slide(path) as slide:
        assert slide.level_downsamples[1] != round(slide.level_downsamples[1])
    assert differences(path) == 0


@pytest.mark.parametrize("compression", ["deflate", "lzw", "none"])
def test_other_compressions_are_openslides(slides, tmp_path, compression):
    path = slides.write_tiff(tmp_path / "a.tiff", [picture(slides)], mpp=0.25, compression=compression)
    with open_slide(path) as slide:
        assert slide.decoder(0).startswith("OpenSlide ")
    assert differences(path, n=10) == 0
    with open_slide(path, how="fast") as slide, pytest.raises(SlideReadError, match=r"slides\.reader=auto reads it"):
        slide.decoder(0)


def change_tag(path: Path, tag: str, index: int, value: int) -> None:
    with tifffile.TiffFile(path, mode="r+b") as file:
        entry = file.pages[0].aspage().tags[tag]
        values = list(entry.value)
        values[index] = value
        entry.overwrite(values)


def test_a_missing_block_is_drawn_as_openslide_draws_it(slides, tmp_path):
    path = write_jpeg(tmp_path / "a.tiff", [picture(slides)])
    change_tag(path, "TileByteCounts", 8, 0)
    with open_slide(path) as slide:
        assert slide.has_blocks(0)
    assert differences(path) == 0


@pytest.mark.parametrize("damage", ["flipped bit", "zeros", "cut", "noise"])
def test_what_openslide_refuses_is_refused(slides, tmp_path, damage):
    """libjpeg reads on after many faults and only warns; OpenSlide takes a warning for an error. 30 files each."""
    path = write_jpeg(tmp_path / "a.tiff", [picture(slides)])
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        offset, length = page.dataoffsets[9], page.databytecounts[9]
    rng = np.random.default_rng(0)
    answers = set()
    for _ in range(30):
        broken = bytearray(whole)
        at = offset + int(rng.integers(length))
        end = min(at + {"cut": length, "zeros": 64}.get(damage, 16), offset + length)
        if damage == "flipped bit":
            broken[at] ^= 1 << int(rng.integers(8))
        else:
            broken[at:end] = rng.bytes(end - at) if damage == "noise" else bytes(end - at)
        path.write_bytes(broken)
        results = []
        for how in ("auto", "openslide"):
            with open_slide(path, how=how) as slide:
                try:
                    results.append(slide.read_region_rgb(0, 0, 0, 611, 437).tobytes())
                except SlideReadError:
                    results.append(b"refused")
        assert results[0] == results[1]
        answers.add(results[0] == b"refused")
    assert True in answers


def test_a_block_that_declares_more_than_its_size_is_not_decoded(slides, tmp_path):
    path = write_jpeg(tmp_path / "a.tiff", [picture(slides)])
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].aspage().dataoffsets[9]
    frame = data.index(b"\xff\xc0", offset)
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500 px: 12.9 GB
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(SlideReadError):
        slide.read_region_rgb(0, 0, 0, 611, 437)


def test_another_decoder_than_openslides_is_noticed(slides, tmp_path, monkeypatch):
    """A decoder with other pixels (another build, a kind of file not thought of) is not used."""
    path = write_jpeg(tmp_path / "a.tiff", [picture(slides)])
    decode = simplejpeg.decode_jpeg

    def brighter(*arguments, **options):
        pixels_HW3 = decode(*arguments, **options)
        pixels_HW3[0, 0, 0] ^= 1
        return pixels_HW3

    monkeypatch.setattr("extract.slides.blocks.simplejpeg.decode_jpeg", brighter)
    with open_slide(path) as slide:
        assert not slide.has_blocks(0)
    assert differences(path, n=5) == 0


def planned(slide, tile_px: int, mpp: float, resample: str):
    height, width = (-(-side // 16) for side in (slide.height, slide.width))
    everywhere_HW = np.ones((height, width), bool)
    mask = TissueMask(everywhere_HW, 4.0, "", 0.0, ~everywhere_HW)
    return plan_tiles(slide.geometry, mask, tile_px=tile_px, mpp=mpp, section=Tiles(resample=resample))


def test_shrinking_in_the_decoder(slides, tmp_path):
    """Near an area average on smooth pictures; a tile is the same alone and among neighbours."""
    smooth_HW3 = cv2.GaussianBlur(picture(slides, 1111, 807), (0, 0), 4)
    path = write_jpeg(tmp_path / "a.tiff", [smooth_HW3], tile=(256, 256), subsampling=(1, 1))
    with open_slide(path, 0.25) as slide:
        plan = shrunk_by_decoder(planned(slide, 64, 0.5, "decoder"), slide)
        assert (plan.shrink, plan.read_px) == (2, 128)
        area = shrunk_by_decoder(planned(slide, 64, 0.5, "area"), slide)
        assert area.shrink == 1
        np.testing.assert_array_equal(plan.coords_N2, area.coords_N2)
        for region in group_into_regions(plan, 512):
            tiles_KHW3, good, _ = read_tiles(slide, plan, region)
            averages_KHW3, _, _ = read_tiles(slide, area, region)
            assert np.abs(tiles_KHW3.astype(int) - averages_KHW3).mean() < 1
            np.testing.assert_array_equal(tiles_KHW3[-1], read_tile(slide, plan, int(good[-1])))


@pytest.mark.parametrize(("tile_px", "mpp", "shrink"), [(64, 0.75, 2), (64, 1.0, 4), (32, 2.0, 8), (64, 0.25, 1)])
def test_how_much_the_decoder_shrinks(slides, tmp_path, tile_px, mpp, shrink):
    path = write_jpeg(tmp_path / "a.tiff", [picture(slides)], tile=(256, 256))
    with open_slide(path, 0.25) as slide:
        plan = shrunk_by_decoder(planned(slide, tile_px, mpp, "decoder"), slide)
        assert plan.shrink == shrink
        region = group_into_regions(plan)[0]
        tiles_KHW3, *_ = read_tiles(slide, plan, region)
        assert tiles_KHW3.shape == (len(region.indices_K), tile_px, tile_px, 3)


def test_what_cannot_be_shrunk_in_the_decoder_is_refused_and_damage_counted(slides, tmp_path):
    lossless = slides.write_tiff(tmp_path / "a.tiff", [picture(slides)], mpp=0.25)
    with open_slide(lossless, 0.25) as slide, pytest.raises(GeometryError, match=r"tiles\.resample=area does it after"):
        shrunk_by_decoder(planned(slide, 64, 0.5, "decoder"), slide)
    path = write_jpeg(tmp_path / "b.tiff", [picture(slides)], tile=(64, 64))
    slides.break_tile(path, 0, 1, 1)
    with open_slide(path, 0.25) as slide:
        plan = shrunk_by_decoder(planned(slide, 64, 0.5, "decoder"), slide)
        parts = [read_tiles(slide, plan, region)[2] for region in group_into_regions(plan)]
        bad = np.concatenate(parts)
    assert plan.level_coords_N2[bad].tolist() == [[0, 0]]


@pytest.mark.skipif(not CMU_1.is_file(), reason="no shared data")
def test_cmu_1():
    with open_slide(CMU_1) as slide:
        assert slide.decoder(0).startswith(BLOCKS)
    assert differences(CMU_1) == 0
