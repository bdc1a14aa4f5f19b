"""The viewer in a real browser (Debian's chromium): what is seen, clicked and typed; and that it asks nobody else."""

from __future__ import annotations

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import cv2
import matplotlib
import numpy as np
import pandas as pd
import pytest
import shapely
from PIL import Image

from extract.config import load_config
from extract.features.cache import Provenance, write_features
from mil.api.study import parts_of
from mil.look.scenes import open_theatre, tiles_table
from mil.look.tilescores import Verdicts
from mil.results.trained import open_run
from mil.study.reviews import read_reviews
from mil.viewer.config import ViewConfig, runs_as_list, view_problems
from mil.viewer.serving import make_server, what_to_show

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser")) if path), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt install chromium)")

ROOT = Path(__file__).resolve().parents[2]
BLOBS_WH = (2507, 1603)
MARKUP = "<img src=x onerror=document.title='run'>"


def serve(*arguments: str):
    config = load_config(ViewConfig, runs_as_list([*arguments, "device=cpu"]), also=view_problems)
    serving = make_server(what_to_show(config, parts_of(config.run)), config)
    return serving, serving.in_background()


@pytest.fixture(scope="module")
def study(viewed_study):
    return viewed_study


@pytest.fixture(scope="module")
def url(study):
    serving, thread = serve(f"run={study.run}")
    yield serving.url
    serving.stop()
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Seen:
    """A page, with everything that it asked for and complained of."""

    def __init__(self, browser, width: int = 1300, height: int = 800):
        self.page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        self.page.set_default_timeout(15_000)

    def open(self, url: str, **state) -> None:
        fragment = "&".join(f"{key}={value}" for key, value in state.items())
        self.page.goto("about:blank")
        self.page.goto(f"{url}#{fragment}")
        self.page.wait_for_selector(f"body[data-slide='{state['slide']}']" if "slide" in state else "body[data-slide]")

    def settle(self) -> None:
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_timeout(150)

    def until(self, script: str) -> None:
        """Wait until it is true. (The page's policy forbids what playwright does for that.)"""
        for _ in range(300):
            if self.page.evaluate(script):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"not within 15 s: {script}")

    def state(self) -> dict[str, str]:
        self.page.evaluate("new Promise((done) => setTimeout(done, 200))")  # the page's own clock: it may be slow
        return {key: values[0] for key, values in parse_qs(urlsplit(self.page.url).fragment).items()}

    def names(self) -> list[str]:
        """Of the rows in sight, from top to bottom."""
        rows = self.page.eval_on_selector_all(
            ".row", "rows => rows.map(row => [parseFloat(row.style.top), row.querySelector('.name').textContent])"
        )
        return [name for _, name in sorted(rows)]

    def stage(self) -> np.ndarray:
        """What is seen of the slide, (H, W, 3)."""
        with Image.open(io.BytesIO(self.page.locator(".stage").first.screenshot())) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    def said(self) -> str:
        return self.page.locator("#said").text_content()


@pytest.fixture
def seen(browser, url):
    one = Seen(browser)
    yield one
    one.page.close()
    outside = [asked for asked in one.requests if not asked.startswith((url, "about:", "data:", "blob:"))]
    assert not outside, "no request leaves this machine, nor its own address"
    assert not one.complaints


# --- the list --------------------------------------------------------------------------------------------------------


def test_open_sort_filter_click_and_come_back_by_a_link(seen, url, study):
    table = Verdicts(open_run(study.run, device="cpu")).slides
    seen.open(url)
    page = seen.page
    shown = seen.names()
    assert shown == table["slide"].tolist()[: len(shown)], "most wrong first"
    assert page.locator("#right h2").text_content() == shown[0], "the first is opened"
    page.select_option("select[name=sort]", "name")
    assert seen.names() == sorted(table["slide"])[: len(shown)]
    page.select_option("select[name=sort]", "doubt")
    doubt = (table["p_1"] - table["threshold"]).abs().sort_values(kind="stable")
    assert seen.names()[0] == doubt.index[0]
    page.select_option("select[name=label]", "tumor")
    page.select_option("select[name=role]", "test")
    assert seen.names() == ["wide"]
    assert page.locator("#count").text_content() == "1 of 18 slides"
    page.locator(".row").click()
    page.wait_for_selector("body[data-slide=wide]")
    assert f"P(tumor) = {table.loc['wide', 'p_1']:.3f}" in page.locator("#right").text_content()
    page.select_option("select[name=kind]", "evidence")
    page.keyboard.press("t")
    state = seen.state()
    assert (state["slide"], state["kind"], state["tissue"], state["label"]) == ("wide", "evidence", "1", "tumor")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#right h2").text_content() == "wide"
    assert page.locator("select[name=kind]").input_value() == "evidence"
    assert seen.names() == ["wide"]
    assert seen.state() == state
    page.fill("input[type=search]", "no such slide")
    assert page.locator("#count").text_content() == "0 of 18 slides"


def test_with_the_keyboard_alone(seen, url, study):
    seen.open(url, sort="name", slide="tall")
    page = seen.page
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "list":
            break
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("ArrowDown")
    assert seen.state()["slide"] == "wide"
    page.keyboard.press("ArrowDown")
    assert seen.state()["slide"] == "wide", "it was the last"
    page.keyboard.press("Home")
    assert seen.state()["slide"] == "t00"
    chosen = page.locator(".row[aria-selected=true]")
    assert page.locator("#list").get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    assert chosen.locator(".name").text_content() == "t00"
    page.keyboard.press("End")
    seen.settle()
    page.keyboard.press("2")
    seen.until("document.querySelector('[data-mark=\"bad quality\"]').ariaPressed === 'true'")
    assert read_reviews(study.run / "reviews.csv")[["slide", "mark"]].to_numpy().tolist() == [["wide", "bad quality"]]
    page.keyboard.press("2")
    seen.until("document.querySelector('[data-mark=\"bad quality\"]').ariaPressed === 'false'")
    assert read_reviews(study.run / "reviews.csv").empty
    page.keyboard.press("]")
    page.wait_for_timeout(700)
    tile = int(page.locator("#right [data-tile]").first.get_attribute("data-tile"))
    x, y = study.slides["wide"].coords_N2[tile] + 32
    state = seen.state()
    assert (float(state["x"]), float(state["y"])) == pytest.approx((x, y), abs=3)
    zoom = float(state["zoom"])
    page.locator(".openseadragon-canvas").first.focus()
    page.keyboard.press("-")
    page.wait_for_timeout(700)
    assert float(seen.state()["zoom"]) < zoom


# --- the slide -------------------------------------------------------------------------------------------------------


def test_the_painted_lesion_is_brightest_on_the_screen_where_it_was_painted(seen, url, study):
    """Non-square slide, overlapping tiles: px of the screenshot back to level-0 px by the view of the link alone."""
    x, y, zoom = 700.0, 520.0, 0.45
    seen.open(url, slide="wide", x=x, y=y, zoom=zoom, opacity=1, scale="percentile")
    seen.settle()
    image = seen.stage()
    height, width = image.shape[:2]
    table = matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255
    codes_U, places = np.unique(image @ np.array([65536, 256, 1]), return_inverse=True)
    colours_U3 = np.stack([codes_U >> 16, codes_U >> 8 & 255, codes_U & 255], axis=1)
    distance_UC = ((colours_U3[:, None] - table) ** 2).sum(axis=2)
    index_HW = np.where(distance_UC.min(axis=1) < 12, distance_UC.argmin(axis=1), -1)[places].reshape(height, width)
    index_HW[:70, :260] = -1  # the colour bar
    index_HW[:180, -200:] = -1  # the minimap
    assert 0.03 < (index_HW >= 0).mean() < 0.9
    rows, columns = np.nonzero(index_HW >= index_HW.max() - 2)
    assert len(rows) > 50
    level0 = np.stack([(columns + 0.5 - width / 2) / zoom + x, (rows + 0.5 - height / 2) / zoom + y], axis=1).astype(
        int
    )
    lesion_HW = study.slides["wide"].lesion_HW
    assert lesion_HW[level0[:, 1], level0[:, 0]].mean() > 0.98


@pytest.fixture(scope="module")
def blobs(tmp_path_factory, script):
    """A slide whose levels are no whole fraction of it, and whose axes are not shrunk alike; with tiles of 60 px."""
    tools = script(ROOT / "tests" / "extract" / "slides.py")
    folder, (width, height) = tmp_path_factory.mktemp("blobs"), BLOBS_WH
    noise_HW3 = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    image_HW3 = cv2.normalize(cv2.GaussianBlur(noise_HW3, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    tools.write_tiff(folder / "a.tif", tools.shrink(image_HW3, [(1253, 800), (501, 319)]), mpp=0.5, tile=(256, 256))
    coords_N2 = np.array([(x, y) for x in range(931, 1600, 97) for y in range(617, 1100, 97)])
    provenance = Provenance("synthetic", "none", 60, 0.5, tile_level0_px=60, slide="a")
    write_features(folder / "features" / "a.h5", np.ones((len(coords_N2), 2), np.float32), coords_N2, provenance)
    serving, thread = serve(f"slides.folder={folder}", f"features.folder={folder / 'features'}", "tiles.mpp=0.5")
    yield serving.url, image_HW3, coords_N2
    serving.stop()
    thread.join(10)


@pytest.mark.parametrize(
    ("x", "y", "zoom"), [(1024.37, 900.6, 1), (1253, 800, 0.5), (1300.3, 801, 0.45), (1253, 800, 0.2)]
)
def test_slide_and_tiles_lie_where_they_are_at_every_level(browser, blobs, x, y, zoom):
    """The pixels of the file and of the screen, where tiles of the pyramid meet: no quarter of a px between them. Then
    the lines of the grid, which heatmap and outlines share their frame with.
    """
    url, image_HW3, coords_N2 = blobs
    one = Seen(browser)
    one.open(url, slide="a", x=x, y=y, zoom=zoom, tissue=0, grid=0)
    one.settle()
    seen = one.stage()
    height, width = seen.shape[:2]
    column_W, row_H = (np.arange(width) + 0.5 - width / 2) / zoom + x, (np.arange(height) + 0.5 - height / 2) / zoom + y
    source = image_HW3 if zoom == 1 else cv2.GaussianBlur(image_HW3, (0, 0), 0.5 / zoom)
    at = np.meshgrid((column_W - 0.5).astype(np.float32), (row_H - 0.5).astype(np.float32))
    truth = cv2.remap(source, *at, cv2.INTER_LINEAR)
    inner = tuple(
        slice(max(low, int(np.argmax(place > 4))), min(high, int(np.argmax(np.append(place, np.inf) > end - 4))))
        for place, low, high, end in ((row_H, 70, height - 80, BLOBS_WH[1]), (column_W, 150, width - 250, BLOBS_WH[0]))
    )
    grey, wanted = (part[inner].mean(axis=2).astype(np.float32) for part in (seen, truth))
    window = cv2.createHanningWindow(grey.shape[::-1], cv2.CV_32F)
    shift, _ = cv2.phaseCorrelate(wanted - wanted.mean(), grey - grey.mean(), window)
    assert np.hypot(*shift) < 0.25
    if zoom > 0.4:
        one.page.keyboard.press("g")
        one.settle()
        drawn_W = np.abs(one.stage() - seen).sum(axis=2)[inner[0]].mean(axis=0)
        drawn_W[drawn_W < 0.2 * drawn_W.max()] = 0
        edges = np.unique(np.concatenate([coords_N2[:, 0], coords_N2[:, 0] + 60]))
        expected = [(edge - x) * zoom + width / 2 for edge in edges]
        looked = [value for value in expected if inner[1].start + 5 < value < inner[1].stop - 5]
        assert len(looked) >= 4
        for value in looked:
            near = np.arange(round(value) - 4, round(value) + 4)
            assert np.average(near + 0.5, weights=drawn_W[near]) == pytest.approx(value, abs=0.3)
    assert not one.complaints
    one.page.close()


def test_hovering_tells_a_tiles_scores_as_the_table_has_them(seen, url, study):
    x, y, zoom = 700.0, 520.0, 0.45
    seen.open(url, slide="wide", x=x, y=y, zoom=zoom)
    with open_theatre(open_run(study.run, device="cpu")).scene("wide") as scene:
        table = tiles_table(scene)
    best = table.loc[table["percentile"].idxmax()]
    box = seen.page.locator(".stage").bounding_box()
    left = box["x"] + box["width"] / 2 + (best["x"] + 32 - x) * zoom
    top = box["y"] + box["height"] / 2 + (best["y"] + 32 - y) * zoom
    seen.page.mouse.move(left - 3, top)
    seen.page.mouse.move(left, top)
    tip = seen.page.locator(".tip").text_content().split()
    assert tip[:2] == ["tile", str(int(best["tile"]))]
    assert float(tip[tip.index("attention") + 1]) == pytest.approx(best["score"], rel=0.006)
    assert float(tip[tip.index("±") + 1]) == pytest.approx(best["sd"], rel=0.02, abs=0.01)
    assert float(tip[tip.index("percentile") + 1]) == pytest.approx(best["percentile"], abs=0.3)


def test_layers_scales_and_members_change_without_asking_again(seen, url):
    seen.open(url, slide="wide", x=700, y=520, zoom=0.45, opacity=1)
    page = seen.page
    seen.settle()
    before, number = seen.stage(), page.locator(".row[aria-selected=true]").get_attribute("id").removeprefix("slide-")
    asked = lambda: len([one for one in seen.requests if f"slide/{number}/scores.bin" in one])  # noqa: E731
    assert asked() == 1
    pictures = [before]
    page.select_option("select[name=scale]", "raw")
    pictures.append(seen.stage())
    page.select_option("select[name=member]", "1")
    pictures.append(seen.stage())
    page.select_option("select[name=scale]", "percentile")
    page.locator("input[type=range][name=threshold]").fill("90")
    pictures.append(seen.stage())
    page.keyboard.press("h")
    pictures.append(seen.stage())
    for one, other in pairwise(pictures):
        rows = slice(0, min(len(one), len(other)))  # the tools may take another line
        assert (np.abs(one[rows] - other[rows]).sum(axis=2) > 20).mean() > 0.002
    assert asked() == 1
    page.keyboard.press("h")
    page.select_option("select[name=kind]", "evidence")
    seen.until("document.querySelector('.colourbar').textContent.includes('evidence for tumor')")
    assert asked() == 2


def test_side_by_side_moves_in_step(seen, url):
    seen.open(url, slide="wide")
    page = seen.page
    page.keyboard.press("s")
    page.wait_for_selector("select[name=kind2]")
    seen.settle()
    assert page.locator("select[name=kind2]").input_value() == "evidence"
    second = page.locator(".stage").nth(1).bounding_box()
    page.mouse.move(second["x"] + 100, second["y"] + 200)
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(900)
    scales = [page.locator(".scale").nth(i).text_content() for i in (0, 1)]
    assert scales[0] == scales[1]
    assert "zoom" in seen.state()
    page.keyboard.press("s")
    assert page.locator(".stage").count() == 1


def test_two_runs_stand_side_by_side_and_move_in_step(browser, study, tmp_path):
    """The second run has other members: both are asked for scores, and the list is the first one's."""
    shutil.copytree(study.run, tmp_path / "other")
    serving, thread = serve(f"run={study.run}", f"run={tmp_path / 'other'}")
    one = Seen(browser)
    one.open(serving.url, slide="wide", study2=1, opacity=1)
    page = one.page
    one.settle()
    assert page.locator(".stage").count() == 2
    names = [
        page.locator(f"select[name=study{which}]").evaluate("s => s.selectedOptions[0].text") for which in ("", "2")
    ]
    assert len(set(names)) == 2
    assert {
        path for asked in one.requests for path in [asked.partition("/study/")[2][:1]] if "scores.bin" in asked
    } == {
        "0",
        "1",
    }
    boxes = [page.locator(".stage").nth(i).bounding_box() for i in (0, 1)]
    page.mouse.move(boxes[1]["x"] + 150, boxes[1]["y"] + 300)
    page.mouse.wheel(0, -500)
    page.wait_for_timeout(900)
    page.mouse.move(5, 5)
    page.mouse.move(boxes[0]["x"] + 300, boxes[0]["y"] + 300)
    page.mouse.down()
    page.mouse.move(boxes[0]["x"] + 240, boxes[0]["y"] + 350, steps=4)
    page.mouse.up()
    page.mouse.move(5, 5)
    page.wait_for_timeout(900)
    one.settle()
    pictures = []
    for i in (0, 1):
        with Image.open(io.BytesIO(page.locator(".stage").nth(i).screenshot())) as image:
            pictures.append(np.asarray(image.convert("RGB")).astype(int))
    rows, columns = (min(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    same = np.abs(np.subtract(*(picture[90 : rows - 60, 20 : columns - 200] for picture in pictures))).sum(axis=2)
    assert (same > 60).mean() < 0.02, "the same scores of the same slide at the same place"
    state = one.state()
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator(".stage").count() == 2
    page.wait_for_timeout(500)
    assert one.state() == state
    bars = [page.locator(".scale").nth(i).text_content() for i in (0, 1)]
    page.set_viewport_size({"width": 1100, "height": 700})
    page.wait_for_timeout(500)
    assert [page.locator(".scale").nth(i).text_content() for i in (0, 1)] == bars
    assert not one.complaints
    page.close()
    serving.stop()
    thread.join(10)


@pytest.mark.parametrize("suffix", [".xml", ".geojson"])
def test_outlines_are_drawn_where_they_were_drawn_and_can_be_put_away(browser, study, tmp_path, script, suffix):
    tools, lesion = script(ROOT / "tests" / "extract" / "test_regions.py"), shapely.box(421, 300, 777, 600)
    write = tools.write_asap if suffix == ".xml" else tools.write_geojson
    write(tmp_path / f"wide{suffix}", [("tumour", lesion)])
    serving, thread = serve(f"run={study.run}", f"annotations={tmp_path}")
    one = Seen(browser)
    x, y, zoom = 700.0, 500.0, 0.6
    one.open(serving.url, slide="wide", x=x, y=y, zoom=zoom, heat=0)
    one.settle()
    drawn = one.stage()
    height, width = drawn.shape[:2]
    one.page.keyboard.press("o")
    one.settle()
    assert one.state()["outlines"] == "0"
    assert not one.page.locator("input[name=outlines]").is_checked()
    rows, columns = np.nonzero(np.abs(drawn - one.stage()).sum(axis=2) > 60)
    shown = [(columns + 0.5 - width / 2) / zoom + x, (rows + 0.5 - height / 2) / zoom + y]
    found, line = shapely.points(np.stack(shown, axis=1)), lesion.exterior
    wanted = shapely.points(line.segmentize(1).coords)
    off = shapely.distance(found, line).max(), shapely.distance(wanted, shapely.MultiPoint(found)).max()
    assert max(off) < 3 / zoom, "a line of 4 px, and its own px"
    one.page.locator("input[name=outlines]").check()
    one.settle()
    assert (np.abs(drawn - one.stage()).sum(axis=2) > 60).mean() < 1e-3
    assert not one.complaints
    one.page.close()
    serving.stop()
    thread.join(10)


def test_top_tiles_fly_to_their_place_and_pictures_are_saved(seen, url, study):
    seen.open(url, slide="wide")
    page = seen.page
    button = page.locator("#right [data-tile]").nth(2)
    tile = int(button.get_attribute("data-tile"))
    seen.settle()
    assert page.evaluate("image => image.complete && image.naturalWidth", button.locator("img").element_handle()) == 64
    button.click()
    page.wait_for_timeout(700)
    state, (x, y) = seen.state(), study.slides["wide"].coords_N2[tile] + 32
    assert (float(state["x"]), float(state["y"])) == pytest.approx((x, y), abs=3)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    with Image.open(download.value.path()) as image:
        box = page.locator(".stage").bounding_box()
        assert image.size == (round(box["width"]), round(box["height"]))
        assert len(image.convert("RGB").getcolors(1 << 22)) > 500
    with page.expect_download() as download:
        page.get_by_role("button", name="Save regions").click()
    assert download.value.suggested_filename == "wide_regions.geojson"
    assert json.loads(Path(download.value.path()).read_text())["features"]


def test_without_the_slide_file_a_map_is_drawn(seen, url):
    seen.open(url, slide="t03", opacity=1)
    seen.settle()
    assert "no slide file" in seen.page.locator("#right").text_content()
    weights = np.array([65536, 256, 1])
    viridis = set((matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3].astype(int) @ weights).tolist())
    assert len(viridis & set(np.unique(seen.stage() @ weights).tolist())) > 8


# --- work ------------------------------------------------------------------------------------------------------------


def test_a_review_with_a_note_is_written_and_seen_in_the_list(seen, url, study):
    seen.open(url, slide="wide")
    page = seen.page
    page.fill("textarea", "ink <b>on</b> it")
    page.get_by_role("button", name="look again").click()
    page.wait_for_selector(".row .mark")
    row = read_reviews(study.run / "reviews.csv").iloc[0]
    assert (row["slide"], row["mark"], row["note"]) == ("wide", "look again", "ink <b>on</b> it")
    page.reload()
    page.wait_for_selector("[data-mark='look again'][aria-pressed=true]")
    assert page.locator("textarea").input_value() == "ink <b>on</b> it"
    page.select_option("select[name=mark]", "look again")
    assert seen.names() == ["wide"]
    page.get_by_role("button", name="look again").click()
    seen.until("document.querySelector('#count').textContent.startsWith('0 of')")
    assert read_reviews(study.run / "reviews.csv").empty


def test_on_a_telephone(browser, url):
    one = Seen(browser, 420, 800)
    one.open(url, slide="wide")
    page = one.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert page.locator(".stage").bounding_box()["height"] > 300
    page.get_by_role("button", name="Slides").click()
    assert page.locator("#list").is_visible()
    assert not page.locator(".stage").is_visible()
    page.locator(".row", has_text="tall").click()
    page.get_by_role("button", name="Details").click()
    one.until("document.querySelector('#right h2').textContent === 'tall'")
    page.locator("#right [data-tile]").first.click()
    assert page.locator(".stage").is_visible(), "it flies there"
    assert not one.complaints
    page.close()


# --- before training -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(study, tmp_path):
    shutil.copy(study.slides["wide"].path, tmp_path / "b.tif")
    shutil.copy(study.slides["tall"].path, tmp_path / f"{MARKUP}.tif")
    return tmp_path


def test_quality_control_before_training_and_names_with_markup(browser, folder):
    regions = folder / "regions"
    serving, thread = serve(f"slides.folder={folder}", f"tissue.regions={regions}", "tiles.mpp=0.5")
    one = Seen(browser)
    one.open(serving.url, slide="b", heat=0)
    page = one.page
    assert page.title() == "b · slide-mil"
    assert sorted(one.names()) == [MARKUP, "b"]
    assert page.locator("#left img[src=x]").count() == 0
    assert "tiles would be laid" in one.said() or "tissue" in one.said()
    box = page.locator(".stage").bounding_box()
    page.get_by_role("button", name="Draw a rectangle").click()
    page.wait_for_selector(".drawing .a9s-annotationlayer", state="attached")
    page.mouse.move(box["x"] + 150, box["y"] + 250)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 300)
    page.mouse.move(box["x"] + 250, box["y"] + 330)
    page.mouse.up()
    one.until("document.querySelector('#said').textContent.includes('1 region')")
    ring = json.loads((regions / "b.geojson").read_text())["features"][0]["geometry"]["coordinates"][0]
    width, height = np.ptp(np.array(ring), axis=0)
    assert width / height == pytest.approx(100 / 80, rel=0.05)
    page.locator(".row", has_text="onerror").click()
    one.until("document.title.startsWith('<img')")
    one.until("document.querySelector('#right h2').textContent.startsWith('<img')")
    assert page.locator("#right h2").text_content() == MARKUP
    page.get_by_role("button", name="Exclude this slide").click()
    one.until("document.querySelector('#said').textContent.includes('1 region')")
    assert (regions / f"{MARKUP}.geojson").exists()
    assert not one.complaints
    page.close()
    serving.stop()
    thread.join(10)


def test_a_slide_deleted_while_it_is_open_is_said(browser, folder):
    serving, thread = serve(f"slides.folder={folder}", "tiles.mpp=0.5")
    one = Seen(browser)
    one.open(serving.url, slide="b", tissue=0, grid=0)
    (folder / "b.tif").unlink()
    box = one.page.locator(".stage").bounding_box()
    one.page.mouse.move(box["x"] + 300, box["y"] + 300)
    for _ in range(4):
        one.page.mouse.wheel(0, -300)
    one.until("document.querySelector('.stage .said').textContent.includes('no such file')")
    one.page.close()
    serving.stop()
    thread.join(10)


def test_thousands_of_slides_are_a_few_rows(browser, study, tmp_path):
    n = 20_000
    table = pd.DataFrame({"slide": [f"s{i:05d}" for i in range(n)], "patient": [f"p{i // 2}" for i in range(n)]})
    sites = np.where(np.arange(n) % 4 == 3, "Utrecht & co", "Nijmegen")
    table = table.assign(label="x", path=str(study.slides["wide"].path), site=sites)
    table.to_csv(tmp_path / "cohort.csv", index=False)
    serving, thread = serve(f"cohort={tmp_path / 'cohort.csv'}", "tiles.mpp=0.5")
    one = Seen(browser)
    one.open(serving.url, tissue=0, grid=0)
    assert one.page.locator("#count").text_content() == "20,000 slides"
    assert one.page.locator(".row").count() < 40
    one.page.locator("#list").focus()
    one.page.keyboard.press("End")
    assert one.state()["slide"] == "s19999"
    assert one.names()[-1] == "s19999"
    assert one.page.locator(".row").count() < 40
    one.until("document.querySelector('#right .others')?.textContent.includes('s19998')")
    one.page.select_option("select[name=site]", "Utrecht & co")
    assert one.page.locator("#count").text_content() == "5,000 of 20,000 slides"
    one.page.locator("#list").focus()
    one.page.keyboard.press("Home")
    assert one.state()["slide"] == "s00003"
    assert one.names()[:3] == ["s00003", "s00007", "s00011"]
    assert one.state()["site"] == "Utrecht & co", "part of the link"
    one.page.close()
    serving.stop()
    thread.join(10)
