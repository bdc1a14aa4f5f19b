"""The viewer without a browser: who is answered, what is answered, and what is written; against files read another way.

A painted study of overlapping tiles on slides that are not square, as in test_heatmap.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from urllib.parse import urlsplit

import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
import shapely
from PIL import Image

from extract.config import ConfigError, Tissue, load_config
from extract.slides.errors import SlideOpenError
from extract.slides.regions import read_regions
from extract.slides.slide import Geometry, open_slide
from mil.api.study import open_run, parts_of
from mil.look.scenes import open_theatre, tiles_geojson
from mil.results.trained import open_run as open_trained
from mil.study.reviews import read_reviews
from mil.viewer import exclusions, pyramid
from mil.viewer.config import ViewConfig, runs_as_list, view_problems
from mil.viewer.guard import LARGEST_BODY, Door
from mil.viewer.pages import Pages
from mil.viewer.serving import listen, make_server, what_to_show
from mil.viewer.shelf import COPIES, OPEN_SLIDES, Kept, Shelf
from mil.viewer.vendored import LICENCES, VENDOR, VENDORED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study(viewed_study):
    return viewed_study


def config_of(*arguments: str) -> ViewConfig:
    return load_config(ViewConfig, runs_as_list([*arguments, "device=cpu", "browser=false"]), also=view_problems)


class Client:
    """Raw requests: what a browser would never send can be sent."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.host, self.port, self.root = parts.hostname, parts.port, parts.path

    def ask(self, path: str, *, root=None, method="GET", body=None, **headers):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, (self.root if root is None else root) + path, skip_host="Host" in names)
        for name, value in names.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def json(self, path: str):
        status, _, content = self.ask(path)
        assert status == 200, content
        return json.loads(content)

    def post(self, path: str, value, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        status, _, content = self.ask(
            path, method="POST", body=body, **({"Content_Type": "application/json"} | headers)
        )
        return status, json.loads(content) if content[:1] in b"[{" else content


@pytest.fixture(scope="module")
def served(study, tmp_path_factory):
    regions = tmp_path_factory.mktemp("regions") / "drawn"
    config = config_of(f"run={study.run}", f"tissue.regions={regions}")
    serving = make_server(what_to_show(config, parts_of(config.run)), config)
    thread = serving.in_background()
    yield Client(serving.url)
    serving.stop()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def numbers(served) -> dict[str, int]:
    return {name: i for i, name in enumerate(served.json("catalogue.json")["slides"]["name"])}


# --- who is answered -------------------------------------------------------------------------------------------------


def test_the_page_is_answered_with_the_token_and_may_do_nothing_else(served):
    status, headers, content = served.ask("")
    assert status == 200
    assert b"main.js" in content
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert not re.search(rb"<script(?![^>]*src=)|\son\w+=|https?://", content)


@pytest.mark.parametrize(
    ("root", "headers"),
    [
        ("/", {}),
        ("", {}),
        ("/wrong-token-wrong-token/", {}),
        ("/%C3%A9%C3%A9/", {}),
        (None, {"Host": "evil.example"}),
        (None, {"Host": "evil.example:80"}),
        (None, {"Host": "127.0.0.1.evil.example"}),
        (None, {"Host": "192.168.0.1"}),
        (None, {"Host": "127.0.0.1:x"}),
        (None, {"Origin": "http://evil.example"}),
        (None, {"Origin": "null"}),
        (None, {"Origin": "http://127.0.0.1:1"}),
    ],
)
def test_others_are_refused(served, root, headers):
    for path, method, body in (("", "GET", None), ("catalogue.json", "GET", None), ("reviews", "POST", b"{}")):
        status, given, content = served.ask(path, root=root, method=method, body=body, **headers)
        assert (status, b"Refused" in content or status == 400) in ((403, True), (400, True))
        assert "content-security-policy" in given or status == 400


def test_a_tunnel_may_have_another_port_and_other_machines_only_where_it_is_allowed():
    here, remote = Door("t"), Door("t", remote=True)
    assert all(here.is_ours(host) for host in ("localhost:9000", "127.0.0.1", "[::1]:8000", "[::1]", "LOCALHOST:1"))
    assert not any(here.is_ours(host) for host in ("10.0.0.2:80", "evil.example", "", "localhost:", "::1:80x"))
    assert remote.is_ours("10.0.0.2:80")
    assert not remote.is_ours("evil.example"), "a name can be bound to any address (DNS rebinding)"


@pytest.mark.parametrize(
    "path",
    [
        "static/../../shown.py",
        "static/%2e%2e/%2e%2e/shown.py",
        "static/..%2f..%2fshown.py",
        "static//etc/passwd",
        "static/%2Fetc%2Fpasswd",
        "../../etc/passwd",
        "slide/../../config.yaml",
        "slide/wide/thumb.jpg",
        "slide/%2e%2e/thumb.jpg",
        "slide/-1/thumb.jpg",
        "slide/99999/thumb.jpg",
        "slide/99999999999999999999/thumb.jpg",
        "slide/%C2%B2/thumb.jpg",
        "slide/WIDE/level/0/999999999_999999999.jpg",
        "slide/WIDE/level/0/-1_0.jpg",
        "slide/WIDE/level/0/2_0.jpg",
        "slide/WIDE/level/77/0_0.jpg",
        "slide/WIDE/level/0/1e9_0.jpg",
        "study/7/slide/WIDE.json",
        "study/0/slide/WIDE/tile/123456789.jpg",
        "study/0/slide/WIDE/scores.bin?kind=../..",
        "study/0/slide/WIDE/scores.bin?target=9",
        "study/0/slide/WIDE/secrets.geojson",
        "study/0/slide/WIDE/regions.geojson?threshold=nan",
        "study/0/slide/WIDE/tiles.geojson?scale=other",
    ],
)
def test_no_path_and_no_number_reaches_more_than_a_slide(served, numbers, path):
    status, _, content = served.ask(path.replace("WIDE", str(numbers["wide"])))
    assert status in (404, 403), content
    assert len(content) < 500


def test_paths_that_are_too_long_and_other_methods_are_refused(served):
    assert served.ask("x" * 600)[0] == 403
    assert served.ask("x" * 40_000)[0] in (400, 403, 431)
    assert served.ask("catalogue.json", method="DELETE")[0] == 405
    assert served.ask("reviews", method="PUT", body=b"{}")[0] == 405


# --- what is answered ------------------------------------------------------------------------------------------------


def decoded(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_tiles_are_the_files_own_levels_and_cover_them(served, study, numbers):
    number = numbers["wide"]
    about = served.json(f"slide/{number}.json")
    with open_slide(study.slides["wide"].path) as slide:
        assert [(one["width"], one["height"]) for one in about["levels"][:3]] == list(slide.level_sizes)
        for level, ((width, height), downsample) in enumerate(
            zip(slide.level_sizes, slide.level_downsamples, strict=True)
        ):
            seen = np.zeros((height, width, 3), int)
            for column in range(-(-width // 1024)):
                for row in range(-(-height // 1024)):
                    status, headers, content = served.ask(f"slide/{number}/level/{level}/{column}_{row}.jpg")
                    assert (status, headers["content-type"]) == (200, "image/jpeg")
                    part = decoded(content)
                    x, y = column * 1024, row * 1024
                    seen[y : y + part.shape[0], x : x + part.shape[1]] = part
            truth = slide.read_region_rgb(level, 0, 0, width, height).astype(int)
            assert np.abs(cv2.blur(seen.astype(float), (9, 9)) - cv2.blur(truth.astype(float), (9, 9))).max() < 25
            assert downsample == about["levels"][level]["downsample"]


def test_a_slide_with_one_large_level_has_an_overview_as_its_coarsest(tmp_path, script):
    tools = script(ROOT / "tests" / "extract" / "slides.py")
    image, _ = tools.paint_tissue(1600, 1170, seed=1)
    path = tools.write_tiff(tmp_path / "one.tif", [image], mpp=0.5, tile=(256, 256))
    with open_slide(path) as slide:
        about = pyramid.described(slide)
        assert [(one["width"], one["height"]) for one in about["levels"]] == [(1600, 1170), (1024, 749)]
        assert about["levels"][1]["downsample"] == pytest.approx(1600 / 1024)
        assert pyramid.tile(slide, 1, 0, 0).shape == (749, 1024, 3)
        with pytest.raises(pyramid.NoSuchTileError):
            pyramid.tile(slide, 1, 1, 0)


def unpacked(content: bytes):
    """Header, coords_N2 and scores_MN, read as the docstring of mil.viewer.layers says."""
    (length,) = struct.unpack("<I", content[:4])
    header = json.loads(content[4 : 4 + length])
    start, n = 4 + length, header["n"]
    coords_N2 = np.frombuffer(content, "<i4", 2 * n, start).reshape(n, 2)
    scores = np.frombuffer(content, "<f2", -1, start + 8 * n).astype(float) * header.get("unit", 1)
    return header, coords_N2, scores.reshape(-1, n) if n else scores


@pytest.mark.parametrize("kind", ["attention", "evidence"])
@pytest.mark.parametrize("slide", ["wide", "t03"])
def test_scores_are_those_of_the_heatmap_for_every_member(served, study, numbers, kind, slide):
    status, _, content = served.ask(f"study/0/slide/{numbers[slide]}/scores.bin?kind={kind}")
    assert status == 200
    header, coords_N2, scores_MN = unpacked(content)
    theatre = open_theatre(open_trained(study.run, device="cpu"))
    with theatre.scene(slide, kind=kind, scale="raw") as scene:
        np.testing.assert_array_equal(coords_N2, scene.places.coords_N2)
        assert header["side"] == scene.places.tile_side
        assert header["honest"] == list(scene.scores.verdict.members)
        shown_MN = scores_MN[[header["members"].index(m) for m in header["honest"]]]
        np.testing.assert_allclose(shown_MN, scene.scores.scores_MN, rtol=6e-4, atol=1e-4)
        assert (header["name"], header["signed"]) == (scene.scores.name, scene.scores.signed)
    for member in header["members"]:
        with theatre.scene(slide, kind=kind, scale="raw", member=member) as scene:
            np.testing.assert_allclose(scores_MN[member], scene.scores_N, rtol=6e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "evidence"])
def test_the_members_that_held_a_slide_out_come_first_and_are_the_same(served, numbers, kind):
    """In cross-validation one of many: the page asks for the others while somebody looks."""
    for slide, more in (("t03", True), ("wide", False)):
        path = f"study/0/slide/{numbers[slide]}/scores.bin?kind={kind}"
        (header, coords_N2, quick_MN), (whole, same_N2, scores_MN) = (
            unpacked(served.ask(path + only)[2]) for only in ("&only=honest", "")
        )
        assert (header["more"], whole["more"]) == (more, False)
        assert header["members"] == header["honest"] == whole["honest"]
        assert len(whole["members"]) == 2
        np.testing.assert_array_equal(coords_N2, same_N2)
        rows = [whole["members"].index(member) for member in header["honest"]]
        np.testing.assert_allclose(quick_MN, scores_MN[rows], rtol=2e-3, atol=1e-4)


def test_what_is_seen_first_is_there_before_it_is_asked_for(study, monkeypatch):
    config = config_of(f"run={study.run}")
    pages = Pages(what_to_show(config, parts_of(config.run)))
    pages.warm_up()
    first = pages.shown.exhibits[0].verdicts.slides.index[0]
    monkeypatch.setattr("mil.viewer.pages.layer", lambda *_: pytest.fail("it is kept"))
    kept = pages.scores(0, pages.shown.slides.index(first), "attention", None, only_honest=True)
    assert unpacked(kept)[0]["n"] > 0


def test_the_list_says_what_slides_csv_says(served, study):
    content = served.json("catalogue.json")
    table = pd.read_csv(study.run / "slides.csv", keep_default_na=False).set_index("slide")
    columns, said = content["slides"], content["studies"][0]
    assert set(columns["name"]) == set(table.index)
    for i, slide in enumerate(columns["name"]):
        row = table.loc[slide]
        assert said["p"][i] == pytest.approx(row["p_1"], abs=1e-5)
        assert said["error"][i] == pytest.approx(float(row["error"]), abs=1e-5)
        assert said["predicted"]["names"][said["predicted"]["codes"][i]] == row["predicted"]
        assert columns["label"]["names"][columns["label"]["codes"][i]] == row["label"]
        role = said["role"]["names"][said["role"]["codes"][i]]
        assert (role == "test") == (row["kind"] == "test ensemble")
        assert columns["file"][i] == int(slide in study.slides)


def test_details_have_every_member(served, study, numbers):
    said = served.json(f"study/0/slide/{numbers['tall']}.json")
    table = pd.read_csv(study.run / "predictions.csv")
    own = table[table["slide"] == "tall"].sort_values("member")
    assert [one["p"][1] for one in said["members"]] == pytest.approx(own["p_1"].tolist())
    assert said["honest"] == own["member"].tolist()
    assert (said["label"], said["has_features"]) == ("normal", True)


def test_a_tiles_picture_is_cut_out_of_the_slide(served, study, numbers):
    painted = study.slides["wide"]
    tile = int(np.flatnonzero(painted.lesion_HW[tuple((painted.coords_N2 + 32).T[::-1])])[0])
    image = decoded(served.ask(f"study/0/slide/{numbers['wide']}/tile/{tile}.jpg")[2])
    assert image.shape == (64, 64, 3)
    x, y = painted.coords_N2[tile].tolist()
    with open_slide(painted.path) as slide:
        truth = slide.read_region_rgb(0, x, y, 64, 64)
    assert np.abs(image.mean(axis=(0, 1)) - truth.mean(axis=(0, 1))).max() < 3


def test_exports_are_what_the_command_writes(served, study, numbers):
    got = served.json(f"study/0/slide/{numbers['wide']}/tiles.geojson?kind=attention&scale=percentile")
    with open_theatre(open_trained(study.run, device="cpu")).scene("wide") as scene:
        assert got["features"] == [json.loads(feature) for feature in tiles_geojson(scene)]
    regions = served.json(f"study/0/slide/{numbers['wide']}/regions.geojson?scale=percentile&threshold=95&member=1")
    assert regions["features"]
    shapes = shapely.union_all([shapely.from_geojson(json.dumps(one["geometry"])) for one in regions["features"]])
    x, y = (int(part) for part in shapes.centroid.coords[0])
    assert study.slides["wide"].lesion_HW[y, x]


def test_tissue_is_what_extraction_finds(served, study, numbers):
    said = served.json(f"slide/{numbers['tall']}/tissue.json")
    assert 0.1 < said["fraction"] < 0.5
    area = sum(shapely.Polygon(one["rings"][0], one["rings"][1:]).area for one in said["rings"])
    with open_slide(study.slides["tall"].path) as slide:
        assert area / (slide.width * slide.height) == pytest.approx(said["fraction"], abs=0.03)


def test_answers_do_not_wait_for_the_one_who_asks():
    """asyncio turns Nagle's algorithm off only for sockets that say that they are TCP; accepted ones say the same."""
    listening = listen("127.0.0.1", 0)
    assert listening.proto == socket.IPPROTO_TCP
    listening.close()


def test_ten_people_at_once_get_the_same(served, numbers):
    paths = [f"slide/{numbers[slide]}/level/{level}/0_0.jpg" for slide in ("wide", "tall") for level in (0, 1, 2)]
    alone = [served.ask(path)[2] for path in paths]
    with ThreadPoolExecutor(10) as people:
        for found in people.map(lambda _: [served.ask(path)[2] for path in paths], range(10)):
            assert found == alone


# --- what is written -------------------------------------------------------------------------------------------------


def test_reviews_are_written_whole_and_by_several_at_once(served, study, numbers):
    slides = [f"t{i:02d}" for i in range(10)]
    with ThreadPoolExecutor(10) as people:
        marks = list(people.map(lambda s: served.post("reviews", {"slide": numbers[s], "mark": "look again"}), slides))
    assert {status for status, _ in marks} == {200}
    table = read_reviews(study.run / "reviews.csv")
    assert table["slide"].tolist() == slides
    note = "=cmd|' /C calc'!A0\nsecond <b>line</b>"
    assert served.post("reviews", {"slide": numbers["t03"], "mark": "wrong label", "note": note})[0] == 200
    row = read_reviews(study.run / "reviews.csv").set_index("slide").loc["t03"]
    assert row["mark"] == "wrong label"
    assert "<b>line</b>" in row["note"]
    for slide in slides:
        served.post("reviews", {"slide": numbers[slide], "mark": ""})
    assert served.json("reviews.json")["reviews"] == []
    assert open_trained(study.run, device="cpu").n_members == 2, "the run is as it was"


@pytest.mark.parametrize(
    "wish",
    [
        {"slide": 0, "mark": "lovely"},
        {"slide": 12345, "mark": "wrong label"},
        {"slide": "0", "mark": "wrong label"},
        {"slide": 0, "mark": "wrong label", "note": "x" * 3000},
        {"slide": 0, "mark": 3},
        [],
        b"no json",
        b"[" * 100_000,
        b"x" * (LARGEST_BODY + 1),
    ],
)
def test_other_wishes_write_nothing(served, study, wish):
    before = (study.run / "reviews.csv").read_bytes() if (study.run / "reviews.csv").exists() else None
    status, _ = served.post("reviews", wish)
    assert status in (400, 404, 413, 422)
    assert served.post("reviews", {"slide": 0, "mark": "wrong label"}, Content_Type="text/plain")[0] == 404
    after = (study.run / "reviews.csv").read_bytes() if (study.run / "reviews.csv").exists() else None
    assert before == after


def test_what_is_excluded_is_what_tissue_regions_reads(served, study, numbers, tmp_path):
    number, said = numbers["tall"], served.json("catalogue.json")
    path = Path(said["regions"]) / "tall.geojson"
    corners = [[100, 200], [400, 220], [380, 700], [90, 650]]
    status, answer = served.post("exclude", {"slide": number, "corners": corners})
    assert (status, answer) == (200, {"file": str(path), "regions": 1})
    with open_slide(study.slides["tall"].path) as slide:
        geometry = slide.geometry
    shape_HW = (geometry.height // 10, geometry.width // 10)
    found = read_regions(path, geometry, shape_HW, geometry.mpp * 10, Tissue())
    assert found.include_HW is None
    area = shapely.Polygon(corners).area / 100
    assert found.exclude_HW.sum() == pytest.approx(area, rel=0.02)
    assert served.post("exclude", {"slide": number, "whole": True})[1]["regions"] == 2
    assert served.json(f"slide/{number}/tissue.json")["empty"] == "no tissue inside the regions of tall.geojson"
    assert served.post("exclude", {"slide": number, "undo": True})[1]["regions"] == 1
    assert served.json(f"slide/{number}/tissue.json")["empty"] == ""
    assert served.post("exclude", {"slide": number, "undo": True})[1]["regions"] == 0
    assert not path.exists()
    assert served.post("exclude", {"slide": number, "undo": True})[0] == 422


@pytest.mark.parametrize(
    "corners",
    [
        None,
        [],
        [[0, 0], [1, 1]],
        [[0, 0], [1, "a"], [2, 2]],
        [[0, 0], [1, 1e300], [2, 2]],
        [[-9, -9], [-5, -9], [-5, -5]],
        [[0, 0]] * 20_000,
    ],
)
def test_what_is_no_region_is_refused(served, numbers, corners):
    status, answer = served.post("exclude", {"slide": numbers["wide"], "corners": corners})
    assert status in (422, 413), answer


def test_regions_that_somebody_else_drew_stay_and_other_kinds_are_refused(tmp_path):
    path = tmp_path / "a.geojson"
    theirs = {
        "type": "Feature",
        "id": "x",
        "geometry": {"type": "Point", "coordinates": [1, 2]},
        "properties": {"k": 1},
    }
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [theirs]}))
    box = exclusions.whole_slide(Geometry("a", 0.5, ((50, 30),), (1.0,), ((0, 0),)))
    assert exclusions.leave_out(path, box) == 2
    assert json.loads(path.read_text())["features"][0] == theirs
    assert exclusions.take_back(path) == 1
    with pytest.raises(exclusions.ExclusionError, match="no region of the class"):
        exclusions.take_back(path)
    (tmp_path / "a.xml").write_text("<x/>")
    for bad in (tmp_path / "a.xml", tmp_path / "b.geojson"):
        bad.write_text("no json")
        with pytest.raises(exclusions.ExclusionError):
            exclusions.leave_out(bad, box)


# --- slides that go, memory ------------------------------------------------------------------------------------------


def test_a_slide_that_was_deleted_is_said_to_be_gone(study, tmp_path):
    shutil.copy(study.slides["wide"].path, tmp_path / "wide.tif")
    config = config_of(f"slides.folder={tmp_path}")
    serving = make_server(what_to_show(config, []), config)
    thread = serving.in_background()
    client = Client(serving.url)
    assert client.ask("slide/0/level/0/0_0.jpg")[0] == 200
    (tmp_path / "wide.tif").unlink()
    for path in ("slide/0/level/0/0_0.jpg", "slide/0/level/1/0_0.jpg", "slide/0.json"):
        status, _, content = client.ask(path)
        assert status == 410
        assert b"no such file" in content
    serving.stop()
    thread.join(10)


def test_few_slides_stay_open_and_memory_is_bounded(study, tmp_path):
    files = {}
    for i in range(5):
        shutil.copy(study.slides["tall"].path, tmp_path / f"s{i}.tif")
        files[f"s{i}"] = (tmp_path / f"s{i}.tif", None)
    shelf = Shelf(files, None, most=2)
    for name in files:
        with shelf.slide(name) as slide:
            assert slide.width == 900
        assert shelf.n_open <= 2
    with shelf.slide("s0"), shelf.slide("s1"), shelf.slide("s2"):
        assert shelf.n_open == 3, "what is read is not closed"
    assert shelf.n_open == 2
    assert len(shelf._copies) <= 2
    shelf.close()
    assert shelf.n_open == 0
    with pytest.raises(SlideOpenError, match="not known"), shelf.slide("other"):
        pass
    kept, made = Kept(100), []
    for key in (1, 2, 3, 1, 4, 1):
        kept.get(key, lambda key=key: made.append(key) or bytes(40))
        assert kept.nbytes <= 100
    assert made == [1, 2, 3, 1, 4], "the least used goes first"


def open_files_below(folder: Path) -> int:
    """Of this process, as the system counts them."""
    return sum(Path(one.path).is_relative_to(folder) for one in psutil.Process().open_files())


def test_memory_does_not_grow_with_the_slides_that_were_looked_at(study, tmp_path):
    """300 slides, a tile of each: few handles, and no more memory than after the first 30."""
    for i in range(300):
        os.link(study.slides["wide"].path, tmp_path / f"s{i:03d}.tif")
    config = config_of(f"slides.folder={tmp_path}", "memory_mb=64")
    pages, process, after_30 = Pages(what_to_show(config, []), config.memory_mb), psutil.Process(), 0
    for number in range(300):
        assert pages.tile(number, 1, 0, 0)[:2] == b"\xff\xd8"
        assert pages.shelf.n_open <= OPEN_SLIDES
        if number == 30:
            after_30 = process.memory_info().rss
    assert open_files_below(tmp_path) <= 2 * OPEN_SLIDES
    assert pages.tiles.nbytes <= 32 * 2**20
    assert len(pages.shelf._copies) <= OPEN_SLIDES
    assert process.memory_info().rss - after_30 < 100e6, "300 slides kept open would take 30 MB each"
    pages.shelf.close()
    assert open_files_below(tmp_path) == 0


def test_ten_viewers_look_at_different_slides_at_once(served, numbers):
    """Each with a connection of its own, list, slide, scores, tiles and a review: all are answered, the slowest too."""
    slides = ["wide", "tall", *(f"t{i:02d}" for i in range(8))]
    expected = {slide: served.json(f"study/0/slide/{numbers[slide]}.json")["p"] for slide in slides}

    def viewer(slide: str) -> bool:
        client, number = Client(f"http://{served.host}:{served.port}{served.root}"), numbers[slide]
        ways = [f"study/0/slide/{number}/scores.bin?kind=attention&only=honest", f"slide/{number}.json"]
        ways += [f"slide/{number}/level/1/0_0.jpg"] * (slide in ("wide", "tall"))
        answered = [client.ask(path)[0] for path in ["", "catalogue.json", *ways, *ways]]
        marked = client.post("reviews", {"slide": number, "mark": "look again", "note": slide})[0]
        said = client.json(f"study/0/slide/{number}.json")["p"]
        return {*answered, marked} == {200} and said == expected[slide]

    with ThreadPoolExecutor(10) as people:
        assert all(people.map(viewer, slides))
    reviews = {row["slide"]: row["note"] for row in served.json("reviews.json")["reviews"]}
    assert reviews == {slide: slide for slide in slides}
    for slide in slides:
        served.post("reviews", {"slide": numbers[slide], "mark": ""})


def test_several_read_one_slide_at_once_with_as_many_handles_as_are_allowed(study):
    shelf, together, most = Shelf({"tall": (study.slides["tall"].path, None)}, None), Barrier(COPIES, timeout=20), []

    def read(_) -> np.ndarray:
        with shelf.slide("tall") as slide:
            together.wait()  # so many are inside at the same time
            most.append(shelf.n_open)
            return slide.read_region_rgb(0, 10, 20, 300, 200)

    with ThreadPoolExecutor(4 * COPIES) as people:
        images = list(people.map(read, range(4 * COPIES)))
    assert max(most) == COPIES
    assert all((image == images[0]).all() for image in images)
    shelf.close()


def test_what_is_being_made_is_not_made_twice_and_a_failure_is_everybodys():
    kept, made, begun, go_on = Kept(100), [], Event(), Event()

    def slow() -> bytes:
        begun.set()
        assert go_on.wait(20)
        made.append(1)
        if len(made) == 1:
            raise SlideOpenError("gone")
        return b"x"

    def ask(_) -> bytes | str:
        try:
            return kept.get("key", slow)
        except SlideOpenError as error:
            return str(error)

    with ThreadPoolExecutor(5) as people:
        first = people.submit(ask, 0)
        assert begun.wait(20)
        rest = [people.submit(ask, i) for i in range(1, 5)]
        while people._work_queue.qsize():
            pass
        go_on.set()
        said = {one.result() for one in [first, *rest]}
    assert said <= {"gone", b"x"}
    assert len(made) <= 2
    assert kept.get("key", lambda: b"x") == b"x"
    assert kept.nbytes == 1


# --- config, notebook, files of others -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["port=1"], "nothing to show"),
        (["run=x", "host=0.0.0.0"], "allow_remote=true"),
        (["run=x", "token=short"], "at least 16"),
        (["run=x", "token=../../../../../../etc"], "letters and digits"),
        (["run=x", "port=99999"], "port"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        config_of(*arguments)


def test_two_runs_are_two_and_remote_needs_a_word():
    assert [str(run) for run in config_of("run=a", "run=b").run] == ["a", "b"]
    assert [str(run) for run in config_of("run=it's, here").run] == ["it's, here"]
    assert [str(run) for run in config_of("run=[a,b]").run] == ["a", "b"]
    assert config_of("run=a", "host=0.0.0.0", "allow_remote=true").host == "0.0.0.0"


def test_a_notebook_shows_it_in_a_frame(study):
    viewer = open_run(study.run).view(device="cpu", browser=False)
    assert f'<iframe src="{viewer.url}"' in viewer._repr_html_()
    status, headers, _ = Client(viewer.url).ask("")
    assert status == 200
    assert "frame-ancestors http://localhost:*" in headers["content-security-policy"]
    viewer.stop()


def test_two_runs_stand_side_by_side(study):
    config = config_of(f"run={study.run}", f"run={study.run.parent / 'run'}/../run")
    parts = parts_of(config.run)
    assert len({name for name, _ in parts}) == 2, "names differ"
    shown = what_to_show(config, parts)
    assert (len(shown.exhibits), len(shown.slides)) == (2, 18)


def test_files_of_others_are_as_they_were_published_and_have_their_licence():
    beside = {path.name for path in VENDOR.iterdir()}
    assert beside == {*VENDORED, *LICENCES.values()}
    for name, one in VENDORED.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == one.sha256, name
        assert one.licence == "BSD-3-Clause"
        text = " ".join((VENDOR / LICENCES[one.package]).read_text().split())
        assert "Redistribution and use in source and binary forms" in text
    assert (
        f"openseadragon {VENDORED['openseadragon.min.js'].version}"
        in (VENDOR / "openseadragon.min.js").read_text()[:80]
    )
