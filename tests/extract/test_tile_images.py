"""`python -m extract.run tiles.folder=...`: rows against the encoder asked directly, failures, scales, second runs."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import extract
import mil
from extract.config import ProblemsError
from extract.features.cache import read_coords, read_header
from extract.features.folder import open_feature_folder
from extract.run import main

ENCODER = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu", "extract.workers=1"]
SIDE = 160
"""Pixels of timm's test_vit, at 0.5 microns per pixel: 80 microns."""


def image(seed: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """Smooth enough that resizing it changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images in `a` (one of them deeper), two in `b`, one beside them, and what is none."""
    names = ["a/2.png", "a/10.png", "a/deep/1.bmp", "b/x.png", "b/y.tif", "alone.png"]
    for seed, name in enumerate(names):
        save(tmp_path / "tiles" / name, image(seed))
    (tmp_path / "tiles" / "b" / "notes.txt").write_text("none")
    save(tmp_path / "tiles" / ".hidden" / "z.png", image(0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of_failed(path: str = "made/failed.csv") -> list[tuple[str, str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


@pytest.fixture(scope="module")
def encoder():
    return extract.encoder("timm:test_vit", random_weights=True, device="cpu")


def test_one_row_an_image_in_one_file_a_subfolder(folder, encoder, capsys):
    assert main([*ENCODER, "tiles.folder=tiles", "out=made", "features.dtype=float32", "batch_size=2"]) == 0
    said = capsys.readouterr()
    assert "passed over in tiles, as they are no images: 1 *.txt" in said.err
    assert "3 done, 0 already there, 0 empty, 0 failed" in said.out
    features = mil.read_features("made")
    assert {name: features[name].names for name in features} == {
        "a": ("10.png", "2.png", "deep/1.bmp"),
        "b": ("x.png", "y.tif"),
        "tiles": ("alone.png",),
    }
    wanted_ND = encoder.encode(np.stack([image(1), image(0), image(2)]))
    np.testing.assert_allclose(features["a"].features, wanted_ND, atol=1e-5)
    assert features["a"].coords is None, "images have no place"
    assert not read_coords(folder / "made" / "a.h5").any()
    made = features["b"].provenance
    assert (made.encoder, made.weights_sha256) == ("timm:test_vit", encoder.frozen.weights_sha256)
    assert (made.tile_px, made.mpp, made.slide) == (SIDE, 0.0, "b"), "nobody said the microns per pixel"


def test_one_file_for_all(folder, encoder):
    assert main([*ENCODER, "tiles.folder=tiles", "out=made", "tiles.files=one", "tiles.mpp=0.5"]) == 0
    features = mil.read_features("made")
    assert list(features) == ["tiles"]
    names = ("alone.png", "a/10.png", "a/2.png", "a/deep/1.bmp", "b/x.png", "b/y.tif")
    assert features["tiles"].names == names
    wanted_ND = encoder.encode(np.stack([image(i) for i in (5, 1, 0, 2, 3, 4)]))
    np.testing.assert_allclose(features["tiles"].features, wanted_ND, atol=2e-3, rtol=2e-3)
    assert features["tiles"].features.dtype == np.float16
    assert features["tiles"].provenance.mpp == 0.5


def test_what_is_unreadable_is_said_listed_and_said_again(folder, encoder, capsys):
    whole = (folder / "tiles" / "a" / "2.png").read_bytes()
    for i in range(3, 12):
        save(folder / "tiles" / "a" / f"{i}.png", image(i))
    (folder / "tiles" / "a" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "tiles" / "b" / "broken.png").write_text("no image")
    command = [*ENCODER, "tiles.folder=tiles", "out=made"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "failed: a/broken.png (image): tiles/a/broken.png: cannot be read as an image" in said.err
    assert "2 done, 0 already there, 0 empty, 3 failed" in said.out
    listed = rows_of_failed()
    assert [row[:2] for row in listed] == [("a/broken.png", "image"), ("b", "read"), ("b/broken.png", "image")]
    assert (
        "1 of 3 images cannot be used, extract.max_bad_tiles=0.1 allows less; first: tiles/b/broken.png" in listed[1][2]
    )
    assert not (folder / "made" / "b.h5").exists()
    kept = mil.read_features("made")["a"]
    assert "broken.png" not in kept.names
    assert len(kept) == len(kept.names) == 11
    assert kept.provenance.extra["images_unreadable"] == 1
    np.testing.assert_allclose(
        kept.features[kept.names.index("7.png")], encoder.encode(image(7)[None])[0], atol=2e-3, rtol=2e-3
    )
    assert main(command) == 1, "the missing row of a is told as long as it is missing"
    assert "0 done, 2 already there, 0 empty, 3 failed" in capsys.readouterr().out
    assert [row[0] for row in rows_of_failed()] == ["a/broken.png", "b", "b/broken.png"]
    (folder / "tiles" / "b" / "broken.png").unlink()
    assert main(command) == 1
    assert [row[0] for row in rows_of_failed()] == ["a/broken.png"]
    (folder / "tiles" / "a" / "broken.png").unlink()
    assert main(command) == 2, "other images than those of the file"
    assert "slide_fingerprint is" in capsys.readouterr().err
    assert main([*command, "overwrite=true"]) == 0
    assert not (folder / "made" / "failed.csv").exists()


def test_running_again_and_other_settings(folder, capsys):
    command = [*ENCODER, "tiles.folder=tiles", "out=made"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert "0 done, 3 already there" in capsys.readouterr().out
    assert main([*command, "features.dtype=float32"]) == 2
    assert main([*command, "tiles.mpp=0.5"]) == 2
    assert "images_mpp is 0, expected 0.5" in capsys.readouterr().err
    parts = [main([*ENCODER, "tiles.folder=tiles", f"out=part{i}", f"shard={i}/2"]) for i in (1, 2)]
    assert parts == [0, 0]
    shared = [set(open_feature_folder(folder / f"part{i}").slides) for i in (1, 2)]
    assert shared[0] | shared[1] == {"a", "b", "tiles"}
    assert not shared[0] & shared[1]


@pytest.mark.parametrize(
    ("size", "settings", "reason"),
    [
        ((320, 320), ["tiles.mpp=0.25"], ""),
        ((320, 320), ["tiles.mpp=0.26"], ""),
        (
            (320, 320),
            ["tiles.mpp=0.5"],
            "is 320 x 320 px at 0.5 microns per pixel, 160 microns wide; the encoder sees 80",
        ),
        ((80, 80), ["tiles.mpp=1.0"], "would be enlarged 2.00 times; tiles.max_upsample=1 allows less"),
        ((80, 80), ["tiles.mpp=1.0", "tiles.max_upsample=2"], ""),
        ((320, 320), [], "is 320 x 320 px, the encoder sees 160 x 160; tiles.mpp=... would say its scale"),
        ((160, 150), [], "is 160 x 150 px, expected a square tile"),
    ],
)
def test_other_sizes_are_resized_where_they_show_the_same_square(folder, encoder, size, settings, reason):
    save(folder / "other" / "s" / "1.png", image(3, *size))
    code = main([*ENCODER, "tiles.folder=other", "out=made", *settings])
    if reason:
        assert code == 1
        assert reason in rows_of_failed()[0][2]
        return
    assert code == 0
    found = mil.read_features("made")["s"]
    np.testing.assert_allclose(found.features[0], encoder.encode(image(3)[None])[0], atol=0.05)
    assert found.provenance.mpp == 0.5


def test_what_cannot_be_is_refused(folder, capsys):
    wrong = [*ENCODER, "tiles.folder=tiles", "out=made", "slides.folder=slides", "shard=3/2"]
    for arguments, reasons in (
        (wrong, ["slides.folder: slides, but tiles.folder asks for tile images", "expected i/n"]),
        ([*ENCODER, "tiles.files=one", "out=made", "slides.folder=x"], ["tiles.files: only with tiles.folder"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert [reason for reason in reasons if reason not in said] == []
    assert main([*ENCODER, "tiles.folder=nothing", "out=made"]) == 2
    assert "tiles.folder=nothing: no such folder" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert main([*ENCODER, "tiles.folder=empty", "out=made"]) == 2
    assert "no file ends in one of .png" in capsys.readouterr().err
    save(folder / "tiles" / "tiles" / "1.png", image(1))
    assert main([*ENCODER, "tiles.folder=tiles", "out=made"]) == 2
    assert "a subfolder 'tiles' would both be tiles.h5" in capsys.readouterr().err


def test_slides_do_not_say_anything_about_tile_images(slides, folder):
    """Keys for images are no part of how slides are made."""
    (folder / "slides").mkdir()
    slides.painted_slide(folder / "slides" / "s.tiff", 901, 703)
    assert main([*ENCODER, "slides.folder=slides", "out=made"]) == 0
    said = read_header(folder / "made" / "s.h5").provenance.extra
    assert {key for key in said if key.startswith("tiles.")} == {
        "tiles.min_tissue",
        "tiles.overlap_px",
        "tiles.tolerance",
        "tiles.max_upsample",
        "tiles.resample",
    }


def test_a_study_of_tile_images(folder):
    """One bag a subfolder: trained on, and refused where it is not extracted first."""
    for bag in range(8):
        for i in range(3):
            save(folder / "bags" / f"bag{bag}" / f"{i}.png", image(10 * bag + i))
    assert main([*ENCODER, "tiles.folder=bags", "out=made", "tiles.mpp=0.5"]) == 0
    rows = [f"bag{bag},p{bag},{'ab'[bag % 2]}" for bag in range(8)]
    Path("cohort.csv").write_text("\n".join(["slide,patient,label", *rows]))
    settings = {"study": {"folds": 2}, "train": {"epochs": 1, "accelerator": "cpu"}, "model": {"name": "mean"}}
    report = {"bootstrap": 0, "heatmaps": 0}
    run = mil.run_study(settings, cohort="cohort.csv", features={"folder": "made"}, report=report, out="run")
    assert len(run.slides) == 8
    with pytest.raises(ProblemsError, match=r"python -m extract\.run tiles\.folder=FOLDER"):
        mil.run_study(settings, cohort="cohort.csv", features={"folder": "made"}, tiles={"folder": "bags"})


# --- extract.encoder -----------------------------------------------------------------------------------------------


def test_an_encoder_gives_the_same_features_in_whatever_batch(encoder):
    tiles_NHW3 = np.stack([image(i) for i in range(5)])
    features_ND = encoder.encode(tiles_NHW3)
    assert features_ND.shape == (5, encoder.dim)
    assert features_ND.dtype == np.float32
    np.testing.assert_allclose(encoder.encode(tiles_NHW3, batch_size=2), features_ND, atol=1e-5)
    assert encoder.encode(tiles_NHW3[:0]).shape == (0, encoder.dim)
    assert (encoder.tile_px, encoder.mpp) == (SIDE, 0.5)
    assert "timm:test_vit: tiles of 160 px at 0.5 microns per pixel -> 64 features" in repr(encoder)
    with pytest.raises(ValueError, match="expected uint8 tiles"):
        encoder.encode(np.zeros((0, 224, 224, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="expected uint8 tiles"):
        encoder.encode(tiles_NHW3.astype(np.float32))


def test_an_encoder_from_a_file_of_its_own(encoder, tmp_path):
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in encoder.frozen.network.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    own = extract.encoder("timm:test_vit", weights=tmp_path / "weights.safetensors", device="cpu")
    tiles_NHW3 = image(1)[None]
    np.testing.assert_array_equal(own.encode(tiles_NHW3), encoder.encode(tiles_NHW3))
    assert own.frozen.source == str(tmp_path / "weights.safetensors")


def test_what_is_wrong_with_an_encoder_is_said_together(tmp_path):
    with pytest.raises(ProblemsError) as refused:
        extract.encoder("phicon", weights=tmp_path / "none.bin", random_weights=True)
    text = str(refused.value)
    for part in ("did you mean 'phikon'", "no such file", "random_weights=true: only for timm:NAME"):
        assert part in text
    with pytest.raises(ProblemsError, match="precision"):
        extract.encoder("phikon", precision="int3", device="cpu")
    with pytest.raises(ProblemsError, match="revison: unknown key; did you mean 'revision'"):
        extract.encoder("phikon", revison="x")
    (tmp_path / "w.bin").write_text("nothing")
    with pytest.raises(ProblemsError, match=r"w\.bin: cannot be read as weights"):
        extract.encoder("phikon", weights=tmp_path / "w.bin", device="cpu")
