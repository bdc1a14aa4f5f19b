"""What all pages share: contrast, colour-blind readers, tables for screen readers, contents, policy, figures."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from extract.pages import colours
from extract.pages.page import CONTENTS, SCRIPT, STYLE, as_data, finished, head, policy, script
from extract.pages.svg import inline_svg

LIGHT, DARK = (
    dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", STYLE)
)
"""The variables of a light page, and of a dark one."""
TEXT = {"page": "ink muted link warn", "soft": "ink muted link", "note": "ink link"}
"""Background -> what is written on it."""


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def ratio(a: str, b: str) -> float:
    light, dark = sorted((linear(rgb(c)) @ [0.2126, 0.7152, 0.0722] for c in (a, b)), reverse=True)
    return float((light + 0.05) / (dark + 0.05))


# --- colours ---------------------------------------------------------------------------------------------------------


def test_the_contrast_that_is_checked_is_that_of_the_guidelines():
    assert ratio("#000000", "#ffffff") == pytest.approx(21)
    assert ratio("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01), "the grey that just fails (WebAIM)"
    assert colours.contrast(rgb("#0072b2"), rgb("#11161c")) == pytest.approx(ratio("#0072b2", "#11161c"))


@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_in_both_modes(mode):
    pairs = [(text, background) for background, texts in TEXT.items() for text in texts.split()]
    assert {pair: round(ratio(mode[pair[0]], mode[pair[1]]), 2) for pair in pairs} == {
        pair: pytest.approx(12.75, abs=8.25) for pair in pairs
    }, "4.5 to 21"


def test_curves_stand_out_from_a_dark_page():
    assert set(LIGHT) == set(DARK)
    drawn = set(colours.VARIABLES.values()) - {"page", "line"}
    assert {name for name in drawn if ratio(DARK[name], DARK["page"]) < 4.5} == set()
    assert {name for name in ("blue", "vermillion", "green") if ratio(LIGHT[name], LIGHT["page"]) < 3} == set()


def test_figures_and_style_name_the_same_colours():
    known = {name: colour.lower() for colour, name in colours.VARIABLES.items() if colour != "#000000"}
    assert {name: LIGHT[name] for name in known} == known


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0; of linear RGB
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, matrix: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a colour as someone with this blindness sees it."""
    x, y, z = np.cbrt(TO_XYZ @ np.clip(matrix @ linear(rgb(colour)), 0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_dark_palette_is_as_safe_for_colour_blind_readers_as_okabe_and_itos(kind):
    matrix = np.array(BLINDNESS[kind])
    palette = ("blue", "vermillion", "green", "orange", "purple", "sky")

    def closest(mode: dict[str, str]) -> float:
        pairs = combinations([lab(mode[name], matrix) for name in palette], 2)
        return min(float(np.linalg.norm(a - b)) for a, b in pairs)

    assert closest(DARK) > min(10.0, 0.9 * closest(LIGHT))


@pytest.mark.parametrize("share", np.linspace(0, 1, 11))
def test_text_on_cells_has_the_better_contrast(share):
    cell = rgb("#ffffff") * (1 - share) + rgb(colours.BLUE) * share
    as_hex = "#" + "".join(f"{round(255 * c):02x}" for c in cell)
    chosen = colours.on_cell(cell)
    assert ratio(chosen, as_hex) == max(ratio(text, as_hex) for text in (colours.ON_PALE, colours.ON_DEEP))
    assert ratio(chosen, as_hex) >= 4.5


# --- figures ---------------------------------------------------------------------------------------------------------


def drawn(title: str = "A <figure>") -> str:
    figure = Figure(figsize=(3, 2))
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color=colours.VERMILLION, label="x")
    left.legend()
    right.pcolormesh([0, 1, 2], [0, 1], [[0, 1]], cmap=ListedColormap([colours.PAGE, colours.BLUE]), edgecolors="white")
    right.text(0.5, 0.5, "1", color=colours.ON_PALE)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return str(inline_svg(buffer.getvalue(), "one", title))


def test_a_figure_takes_the_colours_of_the_page_but_its_cells_keep_theirs():
    svg = drawn()
    assert "stroke: var(--vermillion)" in svg
    assert colours.VERMILLION.lower() not in svg
    assert colours.ON_PALE in svg
    cells = re.findall(r"fill: (#[0-9a-f]{6}); stroke: #ffffff", svg)
    assert cells == [colours.PAGE, colours.BLUE.lower()], "their shade is the number"
    assert svg.count(f"fill: {colours.PAGE}") == 1, "no white paper behind the figure or its legend"


def test_a_figure_says_what_it_is_and_has_ids_of_its_own():
    svg = drawn()
    assert svg.startswith('<svg viewBox="')
    assert 'role="img" aria-labelledby="one-title"' in svg
    assert '<title id="one-title">A &lt;figure&gt;</title>' in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("one-") for name in ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)) <= set(ids)
    assert svg == drawn(), "the same in every run, though matplotlib's ids are random"


def test_a_figure_without_a_box_is_refused():
    with pytest.raises(RuntimeError, match="figure x: expected matplotlib's SVG to have a viewBox"):
        inline_svg("<?xml?><svg width='3'></svg>", "x", "x")


# --- tables and contents ---------------------------------------------------------------------------------------------

TABLES = """<h1>Page</h1>
<!-- contents -->
<h2>First <small>&amp; best</small></h2>
<div><table class="dense"><thead><tr><th class="left">a</th><th>b</th></tr></thead>
<tbody>
<tr class="x"><td class="left">1 <b>x</b></td><td>2</td></tr>
<tr class="sum"><td colspan="1">3</td><td>4</td></tr></tbody></table></div>
<section id="own">
<h2>Second</h2></section>
<h2>First &amp; best</h2>
<table><tbody><tr><td>key</td><td>value</td></tr></tbody></table>
<h3>Below</h3><table><caption>Its own</caption><tr><th scope="row">k</th><td>v</td></tr></table>
<h2>Fourth</h2>
"""


def test_tables_say_what_their_cells_head():
    page = finished(TABLES)
    assert '<table class="dense"><caption class="unseen">First &amp; best</caption><thead>' in page
    assert '<tr><th scope="col" class="left">a</th><th scope="col">b</th></tr></thead>' in page
    assert '<tr class="x"><th scope="row" class="left">1 <b>x</b></th><td>2</td></tr>' in page
    assert '<tr class="sum"><th scope="row" colspan="1">3</th><td>4</td></tr>' in page
    assert '<tr><th scope="row">key</th><td>value</td></tr>' in page
    assert "<h3>Below</h3><table><caption>Its own</caption><tr>" in page
    assert page.count("<caption") == 3


def test_contents_lead_to_every_section():
    page = finished(TABLES)
    assert CONTENTS not in page
    links = re.findall(r'<li><a href="#([^"]+)">([^<]+)</a></li>', page)
    assert links == [
        ("to-first-amp-best", "First &amp; best"),
        ("own", "Second"),
        ("to-first-amp-best-2", "First &amp; best"),
        ("to-fourth", "Fourth"),
    ]
    assert all(page.count(f'id="{name}"') == 1 for name, _ in links)
    few = "<!-- contents --><h2>a</h2><h2>b</h2>"
    assert "<nav" not in finished(few), "what is seen at once needs none"


# --- what a page may do ----------------------------------------------------------------------------------------------


def test_the_policy_lets_the_pages_own_script_run_and_nothing_else():
    class Reader(HTMLParser):
        policy, script, inside = "", "", False

        def handle_starttag(self, tag, attrs):
            given = dict(attrs)
            self.inside = tag == "script"
            if given.get("http-equiv") == "Content-Security-Policy":
                self.policy = given["content"]

        def handle_data(self, data):
            self.script += data if self.inside else ""

    reader = Reader()
    reader.feed(f"<head>{head('<b>', 'i {}')}</head><body>{script()}</body>")
    said = dict(part.strip().split(" ", 1) for part in reader.policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(reader.script.encode()).digest()).decode()
    assert said["default-src"] == "'none'"
    assert said["script-src"] == f"'sha256-{digest}'"
    assert said["img-src"] == "data:"
    assert set(said) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert policy("other") != policy()
    assert "</script" not in SCRIPT
    assert "<title>&lt;b&gt;</title>" in str(head("<b>"))


def test_numbers_within_the_page_cannot_end_their_element():
    hostile = ["</script><script>alert(1)</script>", "<!--", "&", 0.5]
    written = str(as_data(hostile))
    assert not set("<>&") & set(written)
    assert json.loads(written) == hostile
    with pytest.raises(ValueError, match="JSON"):
        as_data([float("inf")])
