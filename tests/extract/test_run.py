"""`python -m extract.run` as a user calls it: a real timm network with random weights, real exit codes and messages."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from pathlib import Path

import cv2
import pytest

from extract.features.cache import read_coords, read_header
from extract.run import main

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WSI = SHARED / "wsi"
ENCODER = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu", "extract.workers=0"]
COMMAND = ["config=cohort.yaml", *ENCODER]
"""The shipped template as it is: its cohort is null, its features.folder is cache/phikon."""


@pytest.fixture
def folder(slides, tmp_path: Path, monkeypatch) -> Path:
    """A working directory with two slides and an image in `slides`."""
    (tmp_path / "slides" / "deeper").mkdir(parents=True)
    slides.painted_slide(tmp_path / "slides" / "a.tiff", 901, 703)
    slides.painted_slide(tmp_path / "slides" / "deeper" / "b.tiff", 703, 901, seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_command_extracts_and_the_second_run_has_nothing_to_do(folder, capsys):
    command = [*COMMAND, "slides.folder=slides", "out=cache/tiny", "qc=true"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "cache/tiny: slides: 2 done, 0 already there, 0 empty, 0 failed\n" in said.out
    n_tiles = sum(len(read_coords(folder / "cache" / "tiny" / f"{name}.h5")) for name in "ab")
    assert re.search(rf"\n{n_tiles} tiles in \d+ s, \d+ tiles/s\nthe encoder was busy \d+% of the time", said.out)
    bar = said.err.split("\r")[-1].strip()
    assert re.search(r"100%\|█+\| 2\.0/2 slides, \d\d:\d\d<\d\d:\d\d, \d+ tiles/s$", bar), "slides, time left, tiles/s"
    assert {path.name for path in (folder / "cache" / "tiny" / "qc").iterdir()} == {"a.png", "b.png"}
    assert read_header(folder / "cache" / "tiny" / "a.h5").provenance.encoder == "timm:test_vit"
    assert main(command) == 0
    assert capsys.readouterr().out == "cache/tiny: slides: 0 done, 2 already there, 0 empty, 0 failed\n"


def test_the_command_raises_no_warning(python, folder):
    """As its own process, where warnings are errors from the first import on: also with readers of their own."""
    arguments = [*COMMAND, "slides.folder=slides", "out=made", "extract.workers=2"]
    done = subprocess.run([*python, "-m", "extract.run", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 done" in done.stdout
    assert "arning" not in done.stderr


def test_what_was_made_otherwise_is_refused_until_overwritten(folder, capsys):
    command = [*COMMAND, "slides.folder=slides", "out=made"]
    assert main(command) == 0
    assert main([*command, "tiles.min_tissue=0.5"]) == 2
    said = capsys.readouterr().err
    assert "made otherwise; overwrite=true makes them anew" in said
    assert said.count("tiles.min_tissue is 0.25, expected 0.5") == 2
    assert main([*command, "tiles.min_tissue=0.5", "overwrite=true"]) == 0


def test_a_csv_with_paths_and_mpp(folder, capsys):
    (folder / "slides" / "c.csv").write_text("slide,path,mpp\none,a.tiff,0.25\ntwo,deeper/b.tiff,\n")
    assert main([*COMMAND, "cohort=slides/c.csv", "out=made"]) == 0
    one, two = (read_header(folder / "made" / f"{name}.h5").provenance for name in ("one", "two"))
    assert (one.extra["slide_mpp"], one.extra["mpp_source"]) == (0.25, "csv")
    assert (two.extra["slide_mpp"], two.extra["mpp_source"]) == (0.5, "file")


def test_a_bad_slide_costs_exit_code_1_and_nothing_else(folder, capsys):
    (folder / "slides" / "bad.svs").write_text("no slide")
    assert main([*COMMAND, "slides.folder=slides", "out=made"]) == 1
    said = capsys.readouterr()
    assert "2 done, 0 already there, 0 empty, 1 failed" in said.out
    assert "see made/failed.csv: slide, stage, reason" in said.out
    assert (
        (folder / "made" / "failed.csv").read_text().startswith('slide,stage,reason\nbad,open,"slides/bad.svs: not a')
    )


def test_wrong_inputs_are_reported_together_and_nothing_is_written(folder, capsys):
    before = sorted(folder.rglob("*"))
    wrong = ["slides.foldr=x", "encoder.name=phicon", "shard=3/2", "min_tissue=2", "features.folder=here", "out=there"]
    with pytest.raises(SystemExit, match="2"):
        main(["config=cohort.yaml", *wrong])
    said = capsys.readouterr().err
    for part in (
        "slides.foldr: unknown key; did you mean 'slides.folder'?",
        "min_tissue: unknown key; did you mean 'tiles.min_tissue'?",
        "did you mean 'phikon'?",
        "extract.shard=3/2: expected i/n",
        "slides: none given",
        "out=there and features.folder=here",
    ):
        assert part in said
    assert main([*COMMAND, "slides.folder=absent", "out=made"]) == 2
    assert "slides.folder=absent: no such folder" in capsys.readouterr().err
    assert main([*COMMAND, "cohort=absent.csv", "out=made"]) == 2
    assert "absent.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*COMMAND, "slides.folder=slides", "out=made", "encoder.weights=gone.bin", "encoder.random_weights=false"])
    assert "encoder.weights=gone.bin: no such file" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to_is_an_error_not_a_traceback(folder, capsys):
    (folder / "made").write_text("a file where a folder should be")
    assert main([*COMMAND, "slides.folder=slides", "out=made"]) == 2
    assert "made: cannot be written to (File exists)" in capsys.readouterr().err


def test_help_and_config_errors_are_light(python, folder):
    """They answer before torch, OpenSlide and pandas are loaded, which takes seconds."""
    code = (
        "import sys; from extract.run import main\n"
        "for arguments in (['--help'], ['config=cohort.yaml', 'encoder.name=phicon']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'timm', 'openslide', 'h5py', 'pandas', 'cv2', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "python -m extract.run config=NAME [key=value ...]"
    assert done.stdout.splitlines()[-2:] == ["2", "[]"]
    assert "\n0\n" in done.stdout


# --- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not WSI.exists(), reason=f"real slides are not in {WSI}")
def test_real_files(tmp_path: Path, capsys):
    """Tissue and fluorescence slides, an overview that is too coarse, and files that are broken in three ways.

    Tiles of 224 px at 0.5 microns per pixel, like Phikon's; the picture with CMU-1's 54 tiles was looked at.
    """
    out = tmp_path / "made"
    network = "encoder.name=timm:mobilenetv3_small_050"
    assert main([f"slides.folder={WSI}", f"out={out}", *ENCODER, network, "qc=true"]) == 1
    assert "1 done, 0 already there, 3 empty, 5 failed" in capsys.readouterr().out
    header = read_header(out / "CMU-1-Small-Region.h5")
    tiles = 54 if cv2.__version__.startswith("5.") else 53  # OpenCV 4 leaves out one at the tissue's edge
    assert (header.n_tiles, header.provenance.tile_px, header.provenance.extra["slide_mpp"]) == (tiles, 224, 0.499)
    assert "looks like fluorescence" in read_header(out / "dapi.h5").provenance.empty_reason
    with open(out / "failed.csv", newline="") as file:
        failed = {row["slide"]: (row["stage"], row["reason"]) for row in csv.DictReader(file)}
    reasons = {  # by slide: stage, and a part of the reason
        "unreadable": ("tissue", "no part of level 0 can be read; the file is damaged"),
        "unopenable": ("open", "cannot be opened: Unsupported TIFF compression: 52479"),
        "broken": ("open", "not a slide format that OpenSlide knows, or a truncated file"),
        "boxes": ("open", "no microscope makes, so they are not believed"),
        "multi_frame_jpeg_camelyon_challenge_image": (
            "tiles",
            "has 28.9685 microns per pixel, tiles are wanted at 0.5",
        ),
    }
    assert failed.keys() == reasons.keys()
    for slide, (stage, reason) in reasons.items():
        assert failed[slide][0] == stage
        assert reason in failed[slide][1]
    pictures = {path.stem for path in (out / "qc").iterdir()}
    assert {"CMU-1-Small-Region", "dapi"} <= pictures
    assert not pictures & failed.keys()
