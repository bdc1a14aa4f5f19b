"""Which files of a folder are slides: what is passed over is said with what to type, what a name may not hold."""

import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image, features

from extract.cohort import CohortError, check_cohort
from extract.slides.errors import SlideFolderError, SlideOpenError
from extract.slides.files import OTHER_IMAGE_SUFFIXES, find_slides
from extract.slides.slide import open_slide

RGB = np.random.default_rng(0).integers(0, 255, (37, 53, 3), dtype=np.uint8)


def test_images_that_are_not_looked_for_are_counted_by_kind(tmp_path, capsys):
    for name in ("a.png", "b.webp", "c.webp", "d.BMP", "e.vsi", "f.txt", ".hidden.webp"):
        Image.fromarray(RGB).save(tmp_path / name, format="PNG")
    assert list(find_slides(tmp_path)) == ["a"]
    find_slides(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, "once a folder"
    assert "passed over 1 .bmp, 2 .webp: name them in the column path of a CSV" in said[0]
    assert "passed over 1 .vsi: OpenSlide does not read them; convert them" in said[1]


def test_a_folder_with_nothing_else_says_what_is_in_it(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "only.webp")
    with pytest.raises(SlideFolderError, match=r"passed over 1 \.webp: name them"):
        find_slides(tmp_path)


@pytest.mark.parametrize("suffix", sorted(OTHER_IMAGE_SUFFIXES - {".j2k"}))
def test_they_are_read_when_a_path_names_them(tmp_path, suffix):
    if suffix == ".jp2" and not features.check("jpg_2000"):
        pytest.skip("Pillow without JPEG 2000")
    path = tmp_path / f"x{suffix}"
    options = {".webp": {"lossless": True}, ".jpe": {"format": "JPEG"}, ".jfif": {"format": "JPEG"}}.get(suffix, {})
    Image.fromarray(RGB).save(path, **options)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.width, slide.height) == (53, 37)
        found = slide.read_region_rgb(0, 0, 0, 53, 37)
    np.testing.assert_array_equal(found, np.asarray(Image.open(path).convert("RGB")))


def test_a_file_name_with_a_line_break_is_refused(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a\nb.png")
    with pytest.raises(SlideFolderError, match="control character; rename the file"):
        find_slides(tmp_path)


@pytest.mark.parametrize(
    ("column", "value"), [("slide", "a\x00"), ("slide", "a\nb"), ("patient", "p\x1b[2J"), ("label", "x\u202ey")]
)
def test_names_with_control_characters_are_refused(column, value):
    row = {"slide": "s", "patient": "p", "label": "l", "split": "train", "path": None, "mpp": np.nan} | {column: value}
    with pytest.raises(CohortError, match=f"row 2: {column} .* has a control character"):
        check_cohort(pd.DataFrame([row]))


@pytest.mark.parametrize("slide", ["..", ".", "x" * 300, "ü" * 130])
def test_names_that_are_no_file_names_are_refused(slide):
    row = {"slide": slide, "patient": "p", "label": "l", "split": "train", "path": None, "mpp": np.nan}
    with pytest.raises(CohortError, match="cannot be a file's name"):
        check_cohort(pd.DataFrame([row]))


# --- pictures that unpack to far more than they are ------------------------------------------------------------------


def bomb_png(side_px: int) -> bytes:
    """A PNG that says it has side x side pixels; a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side_px", [30_000, 200_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_size(tmp_path, side_px):
    (tmp_path / "bomb.png").write_bytes(bomb_png(side_px))
    with pytest.raises(SlideOpenError, match=r"bomb\.png: .*(more than the 500,000,000 px|not an image)"):
        open_slide(tmp_path / "bomb.png", mpp=0.5)


def test_a_small_picture_that_unpacks_to_too_little_is_a_message(tmp_path):
    (tmp_path / "short.png").write_bytes(bomb_png(4_000))
    with open_slide(tmp_path / "short.png", mpp=0.5) as slide, pytest.raises(SlideOpenError, match=r"short\.png"):
        slide.read_region_rgb(0, 0, 0, 10, 10)


def test_a_png_with_a_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
    packed = zlib.compress(b"A" * 80_000_000, 9)
    text = b"Comment\0\0" + packed
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    whole = bomb_png(20)
    (tmp_path / "text.png").write_bytes(whole[:33] + chunk + whole[33:])
    with pytest.raises(SlideOpenError, match=r"text\.png: not an image that Pillow can read"):
        open_slide(tmp_path / "text.png", mpp=0.5).read_region_rgb(0, 0, 0, 5, 5)


def tiff_that_claims(width: int, height: int) -> bytes:
    """A striped 8-bit grey TIFF of a few bytes with these sizes in its directory."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, height), (279, 4, 4)]
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHI", tag, kind, 1) + (
            struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value)
        )
    return b"II*\0" + struct.pack("<I", 12) + b"\0" * 4 + directory + b"\0" * 4


@pytest.mark.parametrize(("width", "height"), [(60_000, 50_000), (2**31, 2), (0, 0)])
def test_a_tiff_that_claims_to_be_huge_is_refused(tmp_path, width, height):
    (tmp_path / "huge.tiff").write_bytes(tiff_that_claims(width, height))
    with pytest.raises(SlideOpenError, match=r"huge\.tiff"):
        open_slide(tmp_path / "huge.tiff", mpp=0.5).read_region_rgb(0, 0, 0, 10, 10)
