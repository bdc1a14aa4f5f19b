"""The report as a page: what screen readers need, curves that tell their points, rows that open, in a browser too."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix

from extract.config import load_config
from extract.pages.page import finished, head, script
from mil.heatmap import HeatmapConfig
from mil.report.commands import draw_slide
from mil.report.curves import MOST_POINTS, curve_points
from mil.report.page import write_overview
from mil.results.tables import slides_table

FOUR = ["LUAD", "LUSC", "lung", "_other"]
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def heatmap(slide: str) -> dict[str, Any]:
    """As `mil.look.scenes.for_report` gives it."""
    tiles = [{"uri": None, "rank": 1, "score": "99.1", "x": 3, "y": 5}]
    said = {"verdict": "P(tumor) = 0.9", "about": "Frames.", "score": "attention", "frame": "level-0"}
    shown = {"slide": slide, "heading": "most wrong", "uri": PIXEL, "tiles": tiles}
    return {**shown, **said, "n_tiles": 9, "thumbnail": False}


@pytest.fixture(scope="module")
def reports(script):
    """The maker of made-up studies and their reports."""
    return script(Path(__file__).with_name("test_report.py"))


@pytest.fixture(scope="module")
def two(reports, tmp_path_factory):
    """The report of a study of two classes, long names, and a heatmap of the most wrong slide."""
    folder = tmp_path_factory.mktemp("two")
    study = reports.make_study(folds=3, n_test=20, strength=1.0, epochs=2)
    study[0]["slide"] = (
        "a_slide_with_a_name_that_is_longer_than_a_telephone_is_wide_01-02-0003.0004." + study[0]["slide"]
    )
    worst = slides_table(study[0], reports.TWO)["slide"].iloc[0]
    reports.report(folder, study, heatmaps=[heatmap(worst)], notes=["1 slide dropped"], bootstrap=2)
    return folder


@pytest.fixture(scope="module")
def four(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    reports.report(
        folder, reports.make_study(FOUR, folds=2, n_train=40, n_test=21, strength=1.0, epochs=1), FOUR, bootstrap=2
    )
    return folder


class Outline(HTMLParser):
    """Headings, tables, pictures and landmarks of a page."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.without_scope: list[str] = []
        self.feed((folder / "report.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "th" and given.get("scope") not in ("col", "row"):
            self.without_scope.append(self.get_starttag_text())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [given for name, given in self.tags if name == tag]


@pytest.fixture(scope="module", params=["two", "four", "overview"])
def outline(request, two, four, tmp_path_factory) -> Outline:
    if request.param != "overview":
        return Outline({"two": two, "four": four}[request.param])
    folder = tmp_path_factory.mktemp("overview")
    metrics = json.loads((two / "metrics.json").read_text())
    write_overview(folder, {"a": metrics, "b": metrics})
    return Outline(folder)


# --- screen readers --------------------------------------------------------------------------------------------------


def test_headings_go_down_one_step_at_a_time(outline):
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))


def test_tables_figures_and_parts_of_the_page_have_names(outline):
    tables = len(outline.of("table"))
    assert tables > 0
    assert len(outline.of("caption")) == tables
    assert not outline.without_scope
    ids = {given.get("id") for _, given in outline.tags}
    for svg in outline.of("svg"):
        assert svg["role"] == "img"
        assert svg["aria-labelledby"] in ids
    assert all(image.get("alt") for image in outline.of("img"))
    assert [given["lang"] for given in outline.of("html")] == ["en"]
    assert len(outline.of("main")) == len(outline.of("header")) == 1
    assert outline.of("a")[0] == {"class": "skip", "href": "#content"}
    assert "content" in ids


def test_links_within_the_page_lead_somewhere(outline):
    ids = [given["id"] for _, given in outline.tags if "id" in given]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in outline.of("a") if str(a["href"]).startswith("#")} <= set(ids)


# --- curves ----------------------------------------------------------------------------------------------------------


def test_points_of_a_curve_are_what_calling_slides_at_their_threshold_gives():
    rng = np.random.default_rng(3)
    truth = rng.random(61) < 0.4
    p = np.round(np.clip(0.3 * truth + rng.random(61) * 0.7, 0, 1), 2)  # with ties
    thresholds, *rest = curve_points(truth, p)
    assert len(thresholds) > 10
    assert thresholds == sorted(thresholds, reverse=True)
    for threshold, sensitivity, specificity, precision in zip(thresholds, *rest, strict=True):
        (tn, fp), (fn, tp) = confusion_matrix(truth, p >= threshold)
        assert sensitivity == pytest.approx(tp / (tp + fn), abs=1e-4)
        assert specificity == pytest.approx(tn / (tn + fp), abs=1e-4)
        assert precision == pytest.approx(tp / (tp + fp), abs=1e-4)


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    rng = np.random.default_rng(0)
    truth = rng.random(20_000) < 0.5
    points = curve_points(truth, rng.random(20_000))
    assert {len(column) for column in points} == {MOST_POINTS}
    assert (points[1][-1], points[2][-1]) == (1, 0)


def told(folder: Path) -> tuple[list[str], list[list[list[float]]], str]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    names = re.search(r'<ul id="curve-names" hidden>(.*?)</ul>', page)
    data = re.search(r'<script type="application/json" id="curves">(.*?)</script>', page)
    assert names is not None
    assert data is not None
    return re.findall("<li>(.*?)</li>", names[1]), json.loads(data[1]), page


def test_the_page_tells_the_curves_that_it_draws(two, four):
    names, curves, page = told(two)
    assert names == ["out-of-fold", "test ensemble"]
    assert all(len(curve) == 4 and len(set(map(len, curve))) == 1 for curve in curves)
    assert page.count("<figure data-curves=") == 2
    names, curves, page = told(four)
    assert names == [f"{name}, {which}" for which in ("out-of-fold", "test") for name in FOUR]
    assert len(curves) == 8


def test_points_lie_on_the_drawn_curve(two):
    """The box in the page against where matplotlib put the curve's own corners in the SVG."""
    _, curves, page = told(two)
    figure = re.search(r'data-curves="roc" data-box="([^"]*)".*?</svg>', page, re.DOTALL)
    assert figure is not None
    left, bottom, right, top = map(float, figure[1].split())
    drawn = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--vermillion\)', figure[0])
    corners = np.array([[float(x) for x in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", " ".join(drawn))])
    _, sensitivity, specificity, _ = (np.array(column) for column in curves[1])
    points = np.stack([left + (1 - specificity) * (right - left), bottom + sensitivity * (top - bottom)], axis=1)
    distance = np.linalg.norm(points[:, None] - corners[None], axis=2).min(axis=1)
    assert distance.max() < 0.1


# --- slides ----------------------------------------------------------------------------------------------------------


def test_a_slides_row_opens_its_heatmap_or_says_what_draws_it(two):
    page = (two / "report.html").read_text(encoding="utf-8")
    worst = pd.read_csv(two / "slides.csv")["slide"]
    rows = re.findall(r'<tr><th scope="row" class="name" data-value="([^"]*)">(.*?)</th>', page)
    assert [name for name, _ in rows] == worst.head(20).tolist()
    assert rows[0][1] == f'<a href="#heatmap-1">{worst[0]}</a>'
    for name, cell in rows[1:]:
        assert cell.startswith(f"<details><summary>{name}</summary><code>python -m mil.heatmap run=. slide=")
    assert '<figure id="heatmap-1"' in page


NAMES = ["a1", "001", "1e5", "true", "No", "null", "a b", "a,b", "[x]", "a: b", "it's", 'say "x"', "{{7*7}}", "<b>|`x"]


@pytest.mark.parametrize("name", [*NAMES, "$HOME", "a=b", "x #y", "ü", "TCGA-02-0001.svs", "2020-01-01", "a\\b", "~"])
def test_the_command_draws_the_slide_of_this_name(name):
    python, dash, module, *arguments = shlex.split(draw_slide(name, ["run=../a run"]))
    assert (python, dash, module) == ("python", "-m", "mil.heatmap")
    config = load_config(HeatmapConfig, arguments)
    assert (str(config.run), config.slide) == ("../a run", name)


# --- in a browser ----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WATCH = """
onload = () => setTimeout(() => {
  const page = document.getElementById("page").contentDocument, long = document.getElementById("long").contentDocument;
  const said = {};
  said.width = page.documentElement.scrollWidth;
  said.background = getComputedStyle(page.body).backgroundColor;
  const table = [...page.querySelectorAll("table")].find(t => t.querySelector(".name"));
  const button = table.querySelectorAll("button.sort")[4], head = button.closest("th");
  const column = () => [...table.tBodies[0].rows].map(r => parseFloat(r.cells[4].textContent));
  said.first = column();
  button.click(); said.up = [head.getAttribute("aria-sort"), column()];
  button.click(); said.down = [head.getAttribute("aria-sort"), column()];
  button.click(); said.again = [head.getAttribute("aria-sort"), column()];
  said.still = page.querySelectorAll("table.still button").length;
  const fold = table.querySelector("details");
  fold.closest("tr").cells[2].click(); said.opened = fold.open;
  const svg = page.querySelector("figure[data-curves] svg"), at = svg.getBoundingClientRect();
  const over = {clientX: at.left + at.width * 0.4, clientY: at.top + at.height * 0.2, bubbles: true};
  svg.dispatchEvent(new PointerEvent("pointermove", over));
  said.told = page.querySelector("figure[data-curves] output").textContent;
  said.marks = page.querySelectorAll("figure[data-curves] svg > circle.mark").length;
  const slider = page.querySelectorAll("figure[data-curves] input")[1];
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  said.slid = [...page.querySelectorAll("figure[data-curves] output")].map(o => o.textContent);
  const wide = [...page.querySelectorAll(".scroll")].filter(b => b.scrollWidth > b.clientWidth);
  said.reachable = wide.length > 0 && wide.every(b => b.tabIndex === 0);
  const rows = () => [...long.querySelectorAll("table")[1].tBodies[0].rows].map(r => r.cells[0].textContent);
  said.groups = long.querySelector("table").querySelectorAll("button").length;
  const began = performance.now();
  long.querySelectorAll("button.sort")[1].click();
  said.seconds = (performance.now() - began) / 1000;
  said.rows = rows();
  document.getElementById("said").textContent = JSON.stringify(said);
}, 300);
"""


def in_browser(page: str, long: str, folder: Path) -> dict[str, Any]:
    """What WATCH says of the two pages, each 420 px wide, in dark mode."""
    frames = [
        f'<iframe id="{name}" width="420" height="900" style="border: 0" srcdoc="{html.escape(text)}"></iframe>'
        for name, text in (("page", page), ("long", long))
    ]
    outer = folder / "outer.html"
    outer.write_text(f'<meta charset="utf-8">{"".join(frames)}<pre id="said"></pre><script>{WATCH}</script>', "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
    flags += ["--blink-settings=preferredColorScheme=0", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [str(BROWSER), *flags, outer.as_uri()]
    dumped = subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.decode()
    written = re.search(r'<pre id="said">(.*?)</pre>', dumped, re.DOTALL)
    assert written is not None
    found: dict[str, Any] = json.loads(html.unescape(written[1]))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser_on_a_dark_telephone(two, tmp_path):
    rng = np.random.default_rng(0)
    values = [None if i % 50 == 0 else float(f"{value:.3e}") for i, value in enumerate(rng.normal(0, 30, 5000))]
    cells = "".join(f"<tr><td>s{i}</td><td>{'-' if v is None else v}</td></tr>" for i, v in enumerate(values))
    top = "<table><thead><tr><th>slide</th><th>value</th></tr></thead><tbody>"
    tables = f"{top}{'<tr><td></td><td>1</td></tr>' * 4}</tbody></table>{top}{cells}</tbody></table>"
    long = finished(f"<!DOCTYPE html><html><head>{head('x')}</head><body>{tables}{script()}</body></html>")
    said = in_browser((two / "report.html").read_text(encoding="utf-8"), long, tmp_path)
    assert said["width"] == 420, "nothing reaches beyond the page"
    assert said["background"] == "rgb(17, 22, 28)"
    assert said["first"] != sorted(said["first"], reverse=True)
    assert said["up"] == ["ascending", sorted(said["first"])]
    assert said["down"] == ["descending", sorted(said["first"], reverse=True)]
    assert said["again"] == [None, said["first"]]
    assert said["still"] == 0
    assert said["opened"]
    assert re.fullmatch(r"(out-of-fold|test ensemble): threshold 0\.\d+, (\w+ [01]\.\d{3}(, )?){3}", said["told"])
    assert said["marks"] == 2, "one in each figure of these curves"
    names, curves, _ = told(two)
    told_now = said["told"].partition(":")[0]
    first = curves[names.index(told_now)][0][0]
    assert {text.partition(",")[0] for text in said["slid"]} == {f"{told_now}: threshold {first:g}"}
    assert said["reachable"]
    assert said["groups"] == 0, "a row without a name belongs to the one above it"
    known = sorted((value, i) for i, value in enumerate(values) if value is not None)
    assert said["rows"] == [f"s{i}" for _, i in known] + [f"s{i}" for i, v in enumerate(values) if v is None]
    assert said["seconds"] < 2
