"""What is written as another tool writes it comes back through that tool's layout, which has tests of its own."""

from pathlib import Path

import numpy as np
import pytest

from extract.convert import TOOLS, main
from extract.features.cache import Provenance, write_features
from extract.features.export import EXPORTS
from extract.features.folder import open_feature_folder
from extract.layouts import LAYOUTS

TILES = {"a.1": 7, "TCGA-AA-0001-01Z-00-DX1.F3": 3, "empty": 0}
KNOWS_ENCODER = {"trident", "stamp", "slideflow", "slide2vec", "atlaspatch"}


def arrays(slide: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(slide))
    features_ND = (rng.integers(-50, 50, (TILES[slide], 6)) / 4).astype(np.float16)
    return features_ND, (rng.integers(0, 90, (TILES[slide], 2)) * 448).astype(np.int32)


def write_ours(folder: Path, **but) -> Path:
    for slide in TILES:
        geometry = {"tile_px": 224, "mpp": 0.5, "tile_level0_px": 448.0, "extra": {"slide_mpp": 0.25}} | but
        write_features(folder / f"{slide}.h5", *arrays(slide), Provenance("phikon", slide=slide, **geometry))
    return folder


def test_the_tables_name_the_same_tools():
    assert tuple(EXPORTS) == TOOLS
    assert set(TOOLS) < set(LAYOUTS)


@pytest.mark.parametrize("tool", TOOLS)
def test_written_as_a_tool_writes_it(tool, tmp_path, capsys):
    ours = write_ours(tmp_path / "ours")
    assert main([f"from={ours}", f"to={tool}", f"out={tmp_path / 'theirs'}"]) == 0
    assert f"3 slides written to {tmp_path / 'theirs'} as {tool} writes them" in capsys.readouterr().out
    folder = open_feature_folder(tmp_path / "theirs")
    assert folder.layout == tool
    assert set(folder.slides) == set(TILES)
    for slide in TILES:
        features_ND, coords_N2 = arrays(slide)
        np.testing.assert_array_equal(folder.features(slide), features_ND)
        np.testing.assert_array_equal(folder.coords(slide, mpp=0.25, tile_level0_px=448), coords_N2)
        provenance = folder.header(slide).provenance
        assert provenance.encoder == ("phikon" if tool in KNOWS_ENCODER else "")


def test_from_one_tool_to_another(tmp_path):
    ours = write_ours(tmp_path / "ours")
    assert main([f"from={ours}", "to=slide2vec", f"out={tmp_path / 'between'}"]) == 0
    assert main([f"from={tmp_path / 'between'}", "to=stamp", f"out={tmp_path / 'theirs'}"]) == 0
    folder = open_feature_folder(tmp_path / "theirs")
    for slide in TILES:
        np.testing.assert_array_equal(folder.coords(slide, mpp=0.25), arrays(slide)[1])


@pytest.mark.parametrize("tool", ["stamp", "slideflow"])
def test_places_in_microns_become_pixels_or_are_missed_aloud(tool, tmp_path, capsys):
    ours = write_ours(tmp_path / "ours")
    assert main([f"from={ours}", f"to={tool}", f"out={tmp_path / 'between'}"]) == 0
    assert main([f"from={tmp_path / 'between'}", "to=clam", f"out={tmp_path / 'blind'}"]) == 0
    said = capsys.readouterr().err
    assert "note: coordinates of 3 slides are not known and not written" in said
    assert f"{tool} does not say what a pixel is: set mpp=NUMBER" in said
    assert main([f"from={tmp_path / 'between'}", "to=trident", f"out={tmp_path / 'refused'}"]) == 2
    assert "what a pixel is: set mpp=NUMBER" in capsys.readouterr().err
    assert main([f"from={tmp_path / 'between'}", "to=trident", "mpp=0.25", f"out={tmp_path / 'theirs'}"]) == 0
    assert capsys.readouterr().err == ""
    folder = open_feature_folder(tmp_path / "theirs")
    for slide in TILES:
        np.testing.assert_array_equal(folder.coords(slide), arrays(slide)[1])
        assert folder.header(slide).provenance.tile_level0_px == 448


@pytest.mark.parametrize("tool", ["trident", "stamp", "atlaspatch"])
def test_an_encoder_is_one_folder_whatever_its_name(tool, tmp_path):
    ours = tmp_path / "ours"
    geometry = {"tile_px": 224, "mpp": 0.5, "tile_level0_px": 448.0, "extra": {"slide_mpp": 0.25}}
    write_features(ours / "a.1.h5", *arrays("a.1"), Provenance("hf:owner/tiny", slide="a.1", **geometry))
    assert main([f"from={ours}", f"to={tool}", f"out={tmp_path / 'theirs'}"]) == 0
    (made,) = (tmp_path / "theirs").rglob("*.h5")
    assert made.relative_to(tmp_path / "theirs").parts[:-1] in {
        ("features_hf-owner-tiny",),
        ("hf-owner-tiny-slide-mil",),
        ("patches",),
    }
    folder = open_feature_folder(tmp_path / "theirs")
    np.testing.assert_array_equal(folder.features("a.1"), arrays("a.1")[0])


def test_what_is_not_known_cannot_be_written(tmp_path, capsys):
    ours = write_ours(tmp_path / "ours", tile_level0_px=0.0, extra={})
    assert main([f"from={ours}", "to=trident", f"out={tmp_path / 'theirs'}"]) == 2
    said = capsys.readouterr().err
    assert "cannot be written as trident writes (3)" in said
    assert "slide 'a.1': the tiles' side in level-0 px unknown" in said
    assert not list(tmp_path.glob("theirs/**/*.h5"))
    assert main([f"from={ours}", "to=stamp", f"out={tmp_path / 'theirs'}"]) == 2
    assert "microns per pixel unknown" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_refused(tmp_path, capsys):
    ours = write_ours(tmp_path / "ours")
    with pytest.raises(SystemExit) as stopped:
        main([f"from={ours}", "to=clam", f"out={ours}"])
    assert stopped.value.code == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_a_damaged_file_is_named(tmp_path, capsys):
    ours = write_ours(tmp_path / "ours")
    path = ours / "a.1.h5"
    path.write_bytes(path.read_bytes()[:-30])
    assert main([f"from={ours}", "to=clam", f"out={tmp_path / 'theirs'}"]) == 2
    assert "a.1.h5" in capsys.readouterr().err
