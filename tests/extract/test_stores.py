"""Slides and features in object stores: an S3 server on loopback, and the same files as from local folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from extract.config import ConfigError, ExtractConfig, ProblemsError, Slides, load_config, to_yaml
from extract.encoders.frozen import FrozenEncoder
from extract.encoders.table import EncoderSpec
from extract.encoders.weights import sha256_of_tensors
from extract.extraction import work as extraction
from extract.features.folder import open_feature_folder
from extract.places import in_words, place_of, shown, url_of
from extract.run import main
from extract.slides import scratch
from extract.slides.files import find_slides, parts_of
from extract.stores import client, looking
from extract.stores.client import Missing, StoreError
from extract.stores.mirror import Mirror
from extract.stores.sessions import stores_of
from extract.whole import write_whole

pytestmark = pytest.mark.stores
TILE_PX = 64


class Means(torch.nn.Module):
    """The mean colour of a tile: no batch changes it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x_N3HW: torch.Tensor) -> torch.Tensor:
        return x_N3HW.mean((2, 3)) * self.scale


@pytest.fixture
def means(monkeypatch):
    spec = EncoderSpec("means", "none", "", dim=3, licence="none", tile_px=TILE_PX, mean=(0, 0, 0), std=(1, 1, 1))
    network = Means()
    made = FrozenEncoder(spec, network, "here", sha256_of_tensors(network.state_dict()), device=torch.device("cpu"))
    monkeypatch.setattr(extraction, "load_encoder", lambda section: made)


@pytest.fixture(scope="module")
def painted(slides, tmp_path_factory) -> Path:
    """Three small slides, one in a sub-folder."""
    folder = tmp_path_factory.mktemp("painted")
    (folder / "deeper").mkdir()
    for number, name in enumerate(("a", "b", "deeper/c")):
        slides.painted_slide(folder / f"{name}.tiff", 501 + 64 * number, 403, seed=number)
    return folder


def put_folder(s3, folder: Path, url: str) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        s3.put_file(str(path), f"{url}/{path.relative_to(folder).as_posix()}")


def names(s3, url: str) -> list[str]:
    return sorted(name.removeprefix(f"{url}/") for name in s3.find(url))


def impatient(options: dict[str, Any]) -> dict[str, Any]:
    """Two tries of the store's library, where there are four, with pauses that grow."""
    return options | {"config_kwargs": options["config_kwargs"] | {"retries": {"max_attempts": 2, "mode": "standard"}}}


def extract(*arguments: str) -> int:
    looking.forget()
    return main([*arguments, "workers=0", "batch_size=16"])


# --- addresses -------------------------------------------------------------------------------------------------------


def test_an_address_has_a_place_and_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDE_MIL_CACHE", str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for url in ("s3://lab/phikon", "gs://lab/a/b c.csv", "az://box"):
        place = place_of(url)
        assert place.is_relative_to(tmp_path)
        assert (url_of(place), shown(place)) == (url, url)
        assert in_words(f"no file {place}, or {tmp_path}/x") == f"no file {url}, or {tmp_path}/x"
    assert place_of("s3:/lab/phikon") == place_of("s3://lab/phikon/"), "what pathlib makes of an address"
    assert url_of(tmp_path / "elsewhere") is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert place_of("s3://lab/a") != place_of("gs://lab/a")
    assert url_of(place_of("s3://lab/a")) == "s3://lab/a"


def test_a_config_holds_places_and_is_written_with_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDE_MIL_CACHE", str(tmp_path))
    config = load_config(
        ExtractConfig, ["slides.folder=s3://lab/slides", "cohort=gs://lab/c.csv", "out=s3://lab/phikon"]
    )
    assert config.slides.folder == place_of("s3://lab/slides")
    assert config.cohort == place_of("gs://lab/c.csv")
    text = to_yaml(config)
    assert "folder: s3://lab/slides" in text
    assert str(tmp_path) not in text
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(ExtractConfig, [f"config={tmp_path / 'again.yaml'}"]) == config


@pytest.mark.parametrize(
    "url", ["s3://AKIA:hidden-word@lab/x", "az://box/x?sig=hidden-word", "s3://lab/../hidden-word"]
)
def test_an_address_with_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(ConfigError) as refused:
        load_config(ExtractConfig, [f"out={url}"])
    assert ("hidden-word" not in str(refused.value)) == (".." not in url)
    with pytest.raises(ConfigError, match="unknown key") as refused:
        load_config(ExtractConfig, ["slides.storage_options.secret=hidden-word"])
    assert "hidden-word" not in str(refused.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    client.forget()
    with pytest.raises(StoreError, match=r"pip install 'slide-mil\[gcs\]'"):
        client.listing("gs://lab/x")
    client.forget()


# --- a mirror --------------------------------------------------------------------------------------------------------


def test_a_mirror_follows_the_store_and_the_store_what_is_written(s3, tmp_path):
    s3.pipe({"lab/run/a.txt": b"one", "lab/run/deep/b.txt": b"two", "lab/other": b"-"})
    place = place_of("s3://lab/run")
    with stores_of(out=place):
        assert (place / "deep" / "b.txt").read_bytes() == b"two"
        write_whole(place / "c.txt", "three")
        assert s3.cat("lab/run/c.txt") == b"three", "at once, not at the end"
        (place / "a.txt").unlink()
        write_whole(place / "d.txt", "four")
        assert not s3.exists("lab/run/a.txt"), "before what is written next"
        (place / "log.txt").write_text("not through the door")
        write_whole(place / ".hidden", "of this machine")
        write_whole(tmp_path / "elsewhere", "no store's")
    assert names(s3, "lab/run") == ["c.txt", "d.txt", "deep/b.txt", "log.txt"]

    s3.pipe("lab/run/c.txt", b"changed elsewhere")
    s3.rm_file("lab/run/d.txt")
    fetched = []
    mirror = Mirror(place)
    mirror.fetch, original = lambda name: (fetched.append(name), original(name)), mirror.fetch
    mirror.open()
    assert fetched == ["c.txt"], "what has not changed is not fetched again"
    assert (place / "c.txt").read_bytes() == b"changed elsewhere"
    assert not (place / "d.txt").exists()


def test_what_was_cut_off_before_it_was_in_the_store_goes_there_when_the_mirror_is_opened_to_write(s3):
    place = place_of("s3://lab/run")
    write_whole(place / "done.txt", "finished by a process that was killed")
    Mirror(place).open()
    assert names(s3, "lab/run") == [], "whoever only reads writes nothing"
    assert (place / "done.txt").exists()
    with stores_of(out=place):
        assert s3.cat("lab/run/done.txt") == b"finished by a process that was killed"


def test_a_single_object_is_fetched_too(s3):
    s3.pipe("lab/c.csv", b"slide\n")
    place = place_of("s3://lab/c.csv")
    with stores_of(also=(place,)):
        assert place.read_bytes() == b"slide\n"


# --- extraction ------------------------------------------------------------------------------------------------------


def test_from_store_to_store_the_files_are_those_of_local_folders(s3, painted, tmp_path, means, capsys):
    put_folder(s3, painted, "lab/slides")
    assert extract(f"slides.folder={painted}", f"out={tmp_path / 'local'}") == 0
    assert extract("slides.folder=s3://lab/slides", "out=s3://lab/means") == 0
    said = capsys.readouterr().out
    assert "s3://lab/means: slides: 3 done" in said
    assert names(s3, "lab/means") == ["a.h5", "b.h5", "c.h5"]
    for name in names(s3, "lab/means"):
        assert s3.cat(f"lab/means/{name}") == (tmp_path / "local" / name).read_bytes()
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()], "staged slides are gone"

    shutil.rmtree(tmp_path / "mirrors")  # another machine
    s3.rm_file("lab/means/b.h5")
    assert extract("slides.folder=s3://lab/slides", "out=s3://lab/means") == 0
    assert "1 done, 2 already there" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "mirrors")
    assert extract("slides.folder=s3://lab/slides", "out=s3://lab/means", "tiles.min_tissue=0.7") == 2
    said = capsys.readouterr().err
    assert "made otherwise" in said
    assert "s3://lab/means/" in said
    assert str(tmp_path / "mirrors") not in said


def test_a_cohort_in_a_store_names_slides_beside_it_and_by_address(s3, painted, tmp_path, means, capsys):
    put_folder(s3, painted, "lab/slides")
    s3.pipe("lab/slides/cohort.csv", b"slide,patient,label,path\na,p,0,a.tiff\nc,q,1,s3://lab/slides/deeper/c.tiff\n")
    assert extract("cohort=s3://lab/slides/cohort.csv", f"out={tmp_path / 'out'}") == 0
    assert "2 done" in capsys.readouterr().out
    s3.pipe("lab/slides/cohort.csv", b"slide,patient,label,path\na,p,0,absent.tiff\n")
    assert extract("cohort=s3://lab/slides/cohort.csv", f"out={tmp_path / 'out'}") == 2
    assert "no file s3://lab/slides/absent.tiff" in capsys.readouterr().err


def test_a_damaged_slide_is_told_by_its_address(s3, painted, tmp_path, means, capsys):
    put_folder(s3, painted, "lab/slides")
    s3.pipe("lab/slides/broken.svs", b"no slide")
    assert extract("slides.folder=s3://lab/slides", "out=s3://lab/means") == 1
    failed = s3.cat("lab/means/failed.csv").decode()
    assert "s3://lab/slides/broken.svs" in failed
    assert str(tmp_path) not in failed
    s3.rm_file("lab/slides/broken.svs")
    s3.put_file(str(painted / "a.tiff"), "lab/slides/broken.tiff")
    assert extract("slides.folder=s3://lab/slides", "out=s3://lab/means") == 0
    assert names(s3, "lab/means") == ["a.h5", "b.h5", "broken.h5", "c.h5"], "and failed.csv has gone"


def dicom(series: bytes, rest: bytes) -> bytes:
    """A stand-in: of a DICOM file as much as tells its series."""
    study = b"\x20\x00\x0d\x00UI\x04\x001.2\x00"
    return bytes(128) + b"DICM" + study + b"\x20\x00\x0e\x00UI" + len(series).to_bytes(2, "little") + series + rest


def test_formats_of_several_files_are_found_and_staged_whole(s3, tmp_path):
    content = {"m.mrxs": b"head", "m/Slidedat.ini": b"x", "m/Data0.dat": b"yy", "other.svs": b"-"}
    vms = b"[Virtual Microscope Specimen]\nImageFile=v-1.jpg\nMapFile=v-map.jpg\n"
    content |= {"v/v.vms": vms, "v/v-1.jpg": b"1", "v/v-map.jpg": b"2", "v/own.jpg": b"3"}
    content |= {f"series/{i}.dcm": dicom(b"1.2.7 ", bytes(i)) for i in range(3)}
    content |= {f"mixed/{i}.dcm": dicom(b"1.2.8 " if i < 2 else b"1.2.9 ", b"-") for i in range(4)}
    s3.pipe({f"lab/slides/{name}": bytes_ for name, bytes_ in content.items()})
    for name, bytes_ in content.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(bytes_)
    found, local = find_slides(place_of("s3://lab/slides")), find_slides(tmp_path / "local")
    relative = {slide: path.relative_to(tmp_path / "local") for slide, path in local.items()}
    assert {slide: path.relative_to(place_of("s3://lab/slides")) for slide, path in found.items()} == relative
    area = scratch.Scratch(Slides())
    assert list(found) == ["0", "2", "m", "other", "own", "series", "v"]
    for slide, n_files in (("m", 3), ("v", 3), ("other", 1), ("series", 3), ("0", 2), ("2", 2)):
        size = scratch.size_of_slide(found[slide])
        assert size == sum(part.stat().st_size for part in parts_of(local[slide]))
        assert area.reserve(size, found[slide])
        copy = area.copy(found[slide], size)
        assert len(parts_of(copy)) == n_files == len(parts_of(local[slide]))
        assert sorted(p.read_bytes() for p in parts_of(copy)) == sorted(p.read_bytes() for p in parts_of(local[slide]))
    area.close()


# --- staging ---------------------------------------------------------------------------------------------------------

MOUNTS = r"""overlay / overlay rw 0 0
server:/export /data nfs4 rw 0 0
/dev/sda1 /data/local ext4 rw 0 0
//share/x /my\040share cifs rw 0 0
sshfs#host: /ssh fuse.sshfs rw 0 0
overlay /over fuse.fuse-overlayfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "slow"),
    [
        *(("/data/a.svs", True), ("/data/local/a.svs", False), ("/my share/a.svs", True), ("/ssh/a.svs", True)),
        *(("/database/a.svs", False), ("/over/a.svs", False), ("/home/a.svs", False)),
    ],
)
def test_network_shares_are_known_by_their_file_system(path, slow):
    assert scratch.is_staged(Path(path), "auto", MOUNTS) == slow
    assert scratch.is_staged(Path(path), "true", MOUNTS)
    assert not scratch.is_staged(Path(path), "false", MOUNTS)


def test_staged_slides_give_the_same_files_within_the_room_that_there_is(painted, tmp_path, means, monkeypatch, capsys):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path / "unused"))
    assert extract(f"slides.folder={painted}", f"out={tmp_path / 'local'}") == 0
    largest = max(path.stat().st_size for path in painted.rglob("*.tiff"))
    most, here = [], [f"slides.folder={painted}", "slides.stage=true", f"slides.scratch={tmp_path / 'scratch'}"]
    original = scratch.copy_file

    def copy_file(source, target, going_on):
        original(source, target, going_on)
        most.append(sum(path.stat().st_size for path in (tmp_path / "scratch").rglob("*.tiff")))

    monkeypatch.setattr(scratch, "copy_file", copy_file)
    assert extract(*here, f"out={tmp_path / 'staged'}", f"slides.scratch_gb={1.5 * largest / 1e9:.9f}") == 0
    assert len(most) == 3
    assert max(most) <= 1.5 * largest
    assert list((tmp_path / "scratch").iterdir()) == []
    for path in (tmp_path / "local").glob("*.h5"):
        assert path.read_bytes() == (tmp_path / "staged" / path.name).read_bytes()
    capsys.readouterr()
    assert extract(*here, f"out={tmp_path / 'none'}", f"slides.scratch_gb={0.5 * largest / 1e9:.9f}") == 1
    assert "more than slides.scratch_gb=" in capsys.readouterr().err


def test_what_a_killed_process_left_in_scratch_goes_with_the_next_run(painted, tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from extract.config import Slides\n"
        "from extract.slides.scratch import Scratch\n"
        "area = Scratch(Slides(scratch=sys.argv[1])); area.copy(Path(sys.argv[2]), 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(painted / "a.tiff")], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.rglob("a.tiff"))) == 1
    living = scratch.Scratch(Slides(scratch=tmp_path))
    assert list(tmp_path.rglob("*.tiff")) == []
    copy = living.copy(painted / "b.tiff", 1)
    scratch.remove_left_behind(living.base)
    assert copy.exists(), "what a process has that lives stays"
    living.close()
    assert list(tmp_path.iterdir()) == []


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(s3, painted, tmp_path, means, capsys):
    assert extract("slides.folder=s3://nowhere/slides", f"out={tmp_path / 'out'}") == 2
    assert "there is no bucket s3://nowhere" in capsys.readouterr().err
    assert extract(f"slides.folder={painted}", "out=s3://nowhere/means") == 2
    assert capsys.readouterr().err.count("there is no bucket s3://nowhere") == 1


def test_no_credentials(s3, painted, means, monkeypatch, capsys):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    client.forget()
    assert extract(f"slides.folder={painted}", "out=s3://lab/means") == 2
    assert "no credentials (NoCredentialsError); set AWS_ACCESS_KEY_ID" in capsys.readouterr().err


def test_a_store_that_does_not_answer(s3, painted, means, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(client.OPTIONS, "s3", impatient(client.OPTIONS["s3"]))
    client.forget()
    began = time.monotonic()
    assert extract(f"slides.folder={painted}", "out=s3://lab/means") == 2
    assert "the store at http://127.0.0.1:9 (AWS_ENDPOINT_URL) does not answer" in capsys.readouterr().err
    assert time.monotonic() - began < 60


def test_reading_what_is_not_there(s3):
    with pytest.raises(Missing, match="no such object"):
        client.head("s3://lab/absent", 4)
    with pytest.raises(ProblemsError, match="no such folder"):
        open_feature_folder(place_of("s3://lab/absent"))


def test_a_store_that_may_only_be_read(s3, breaking, painted, means, capsys):
    breaking.refused = True
    assert extract(f"slides.folder={painted}", "out=s3://lab/means") == 2
    said = capsys.readouterr().err
    assert "cannot be written: no permission (AccessDenied" in said
    assert said.count("s3://") == 1
    assert names(s3, "lab") == []


def test_a_connection_that_breaks_while_features_are_written(s3, breaking, painted, means, tmp_path, capsys):
    assert extract(f"slides.folder={painted}", f"out={tmp_path / 'local'}") == 0
    breaking.cuts, breaking.of = 1000, "b.h5"
    assert extract(f"slides.folder={painted}", "out=s3://lab/means") == 2
    assert capsys.readouterr().err.count("s3://lab/means/b.h5: the connection broke while it was written") == 1
    assert "b.h5" not in names(s3, "lab/means"), "whole or not there"
    breaking.cuts = 1
    breaking.n_cut = 0
    assert extract(f"slides.folder={painted}", "out=s3://lab/means") == 0
    assert breaking.n_cut == 1
    assert "already there" in capsys.readouterr().out
    for name in names(s3, "lab/means"):
        assert s3.cat(f"lab/means/{name}") == (tmp_path / "local" / name).read_bytes()
    assert names(s3, "lab/means") == ["a.h5", "b.h5", "c.h5"]


def test_ctrl_c_leaves_no_staged_slide(s3, painted, means, tmp_path, monkeypatch):
    put_folder(s3, painted, "lab/slides")
    staged = []

    def interrupt(*_: object) -> None:
        staged.extend((tmp_path / "scratch").rglob("*.tiff"))
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction.Extraction, "take_tiles", interrupt)
    assert extract("slides.folder=s3://lab/slides", "out=s3://lab/means") == 130
    assert staged
    assert not list((tmp_path / "scratch").rglob("*.tiff"))


def test_a_slide_in_a_store_is_opened_from_one_copy(s3, painted, tmp_path, monkeypatch):
    put_folder(s3, painted, "lab/slides")
    own: list[scratch.Scratch] = []
    monkeypatch.setattr(scratch, "_own", own)
    monkeypatch.setattr(scratch, "_copies", {})
    place = place_of("s3://lab/slides/deeper/c.tiff")
    copy = scratch.local_copy(place)
    assert copy.read_bytes() == (painted / "deeper" / "c.tiff").read_bytes()
    assert scratch.local_copy(place) == copy
    assert scratch.local_copy(painted / "a.tiff") == painted / "a.tiff"
    own[0].close()
