"""Heatmaps against a painted truth: where the maximum lies, px by px; areas in GeoJSON; probabilities; bad input.

A slide is painted with tissue and one lesion, its tiles' features are plain colour statistics, and a small study learns
from bags of such features. Frames: level-0 px of the slide, px of the picture.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from PIL import Image
from scipy.stats import percentileofscore

from extract.config import Tiles
from extract.features.cache import CacheError, Provenance, read_header, write_features
from extract.features.folder import FeatureFolder, open_feature_folder
from extract.slides.slide import Slide, open_slide
from extract.slides.tiles import plan_tiles, read_tile
from extract.slides.tissue import TissueMask
from mil import lesions
from mil.heatmap import main
from mil.look import drawing
from mil.look.geojson import merged_regions
from mil.look.scenes import Theatre, convenient_mpp, for_report, gallery_png, open_theatre, picture, tiles_table
from mil.look.scenes import read_tile as read_scene_tile
from mil.look.tilescores import HeatmapError, log_odds, percentiles, places_of
from mil.results.trained import open_run

ROOT = Path(__file__).resolve().parents[2]
TILE_PX, MPP = 64, 0.5
LESION_RGB = (70, 40, 120)


def slide_tools():
    spec = importlib.util.spec_from_file_location("painted_slides", ROOT / "tests" / "extract" / "slides.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOLS = slide_tools()


@dataclass(frozen=True)
class Painted:
    """A slide file with its lesion (bool, level-0 px, True inside), tiles and their features."""

    path: Path
    lesion_HW: np.ndarray
    coords_N2: np.ndarray
    features_ND: np.ndarray
    fingerprint: str


def paint_slide(
    path: Path, size: tuple[int, int], lesion: tuple[float, float] | None, overlap_px: int, seed: int
) -> Painted:
    """Two pieces of tissue; the lesion is an ellipse about `lesion` (fractions of the sides)."""
    width, height = size
    image, tissue = TOOLS.paint_tissue(width, height, seed=seed)
    inside = np.zeros((height, width), dtype=bool)
    if lesion:
        inside = TOOLS.ellipse(width, height, lesion, (170 / width, 140 / height)) & tissue
        grain = np.random.default_rng(seed).normal(0, 6, (int(inside.sum()), 3))
        image[inside] = np.clip(np.array(LESION_RGB) + grain, 0, 255).astype(np.uint8)
    sizes = [(width // 2 - 1, height // 2), (width // 5, height // 5 + 1)]
    TOOLS.write_tiff(path, TOOLS.shrink(image, sizes), mpp=MPP, tile=(128, 128))
    with open_slide(path) as slide:
        plan = plan_tiles(
            slide.geometry,
            TissueMask(tissue, MPP, "", 0.0, np.zeros_like(tissue)),
            tile_px=TILE_PX,
            mpp=MPP,
            section=Tiles(overlap_px=overlap_px),
        )
        tiles = np.stack([read_tile(slide, plan, i) for i in range(len(plan))]).astype(np.float32) / 255
        fingerprint = slide.fingerprint
    noise = np.random.default_rng([seed, 1]).normal(0, 0.1, (len(plan), 2))
    features_ND = np.concatenate([tiles.mean(axis=(1, 2)) * 8, tiles.std(axis=(1, 2)) * 8, noise], axis=1)
    return Painted(path, inside, plan.coords_N2, features_ND.astype(np.float32), fingerprint)


@dataclass(frozen=True)
class StudyOfPaint:
    run: Path
    features: Path
    slides: dict[str, Painted]


def make_study(folder: Path, run_study, overlap_px: int, name: str, *options: str) -> StudyOfPaint:
    """Test slides: `wide` with a lesion, `tall` without; training bags are made of other slides' tiles."""
    folder.mkdir(parents=True, exist_ok=True)
    source = paint_slide(folder / "source.tif", (1500, 1100), (0.75, 0.55), overlap_px, seed=3)
    centres = source.coords_N2 + TILE_PX // 2
    diseased = source.lesion_HW[centres[:, 1], centres[:, 0]]
    rng = np.random.default_rng(5)
    rows, features = [], folder / "features"
    for i in range(16):
        bag = rng.choice(np.flatnonzero(~diseased), 25)
        if i % 2:
            bag = np.concatenate([bag, rng.choice(np.flatnonzero(diseased), 5)])
        provenance = Provenance("colour", "none", TILE_PX, MPP, overlap_px, TILE_PX, f"t{i:02d}")
        write_features(
            features / f"t{i:02d}.h5", source.features_ND[bag], source.coords_N2[bag], provenance, dtype="float32"
        )
        rows.append((f"t{i:02d}", f"p{i}", ["normal", "tumor"][i % 2], "train", ""))
    slides = {
        "wide": paint_slide(folder / "wide.tif", (1500, 1100), (0.33, 0.42), overlap_px, seed=7),
        "tall": paint_slide(folder / "tall.tif", (900, 1300), None, overlap_px, seed=8),
    }
    for slide, painted in slides.items():
        provenance = Provenance("colour", "none", TILE_PX, MPP, overlap_px, TILE_PX, slide, painted.fingerprint)
        write_features(features / f"{slide}.h5", painted.features_ND, painted.coords_N2, provenance, dtype="float32")
        rows.append((slide, slide, "tumor" if slide == "wide" else "normal", "test", painted.path.name))
    table = pd.DataFrame(rows, columns=["slide", "patient", "label", "split", "path"])
    table.to_csv(folder / "cohort.csv", index=False)
    study = [f"cohort={folder / 'cohort.csv'}", f"features.folder={features}", "study.folds=2", f"model.name={name}"]
    train = ["train.epochs=12", "train.lr=0.02", "train.standardize=true", "classes=[normal,tumor]"]
    run_study([*study, *train, *options, f"out={folder / 'run'}"])
    return StudyOfPaint(folder / "run", features, slides)


ABMIL = ("model.hidden=8", "model.attention=6", "model.head=[]")


@pytest.fixture(scope="module")
def study(tmp_path_factory, run_study) -> StudyOfPaint:
    return make_study(tmp_path_factory.mktemp("paint"), partial(run_study, figures=True), 0, "abmil", *ABMIL)


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory, run_study) -> StudyOfPaint:
    return make_study(tmp_path_factory.mktemp("overlap"), run_study, 32, "abmil", *ABMIL)


@pytest.fixture(params=["study", "overlapping"])
def either(request) -> StudyOfPaint:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def chowder(tmp_path_factory, run_study) -> StudyOfPaint:
    options = ("model.n_top=4", "model.n_bottom=3", "model.tile_hidden=[]", "model.head=[4]")
    return make_study(tmp_path_factory.mktemp("chowder"), partial(run_study, figures=True), 0, "chowder", *options)


@pytest.fixture(scope="module")
def theatre(study) -> Theatre:
    return theatre_of(study)


def theatre_of(study: StudyOfPaint) -> Theatre:
    return open_theatre(open_run(study.run, device="cpu"))


def decoded(png: bytes | Path) -> np.ndarray:
    source = io.BytesIO(png) if isinstance(png, bytes) else png
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB"))


def slow_raster(view: drawing.View, coords_N2, side, scores_N) -> np.ndarray:
    """Px by px: the mean of the tiles that hold the px's centre."""
    out = np.full((view.height, view.width), np.nan)
    for j in range(view.height):
        for i in range(view.width):
            x, y = view.origin[0] + (i + 0.5) * view.step, view.origin[1] + (j + 0.5) * view.step
            inside = (coords_N2 <= (x, y)).all(axis=1) & ((x, y) < coords_N2 + side).all(axis=1)
            if inside.any():
                out[j, i] = scores_N[inside].mean()
    return out


# --- the lesion ------------------------------------------------------------------------------------------------------


def colour_index(map_HW3: np.ndarray, under_HW3: np.ndarray | None = None) -> np.ndarray:
    """Place of every px on viridis, 0..255, -1 where it is no colour of the map: read back from the picture alone."""
    colour_HW3 = map_HW3.astype(float)
    if under_HW3 is not None:
        colour_HW3 = (colour_HW3 - (1 - drawing.OPACITY) * under_HW3) / drawing.OPACITY
    table = matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255
    distance_HWC = ((colour_HW3[:, :, None] - table) ** 2).sum(axis=3)
    return np.where(distance_HWC.min(axis=2) < 20, distance_HWC.argmin(axis=2), -1)


def highest_px(index_HW: np.ndarray) -> np.ndarray:
    """(x, y) of the px with the highest colour; there must be many, as a tile covers many."""
    assert 0.1 < (index_HW >= 0).mean() < 0.9
    rows, columns = np.nonzero(index_HW >= index_HW.max() - 1)
    assert len(rows) > 10
    return np.stack([columns, rows], axis=1)


@pytest.mark.parametrize("kind", ["attention", "evidence"])
def test_the_maximum_of_the_picture_lies_inside_the_lesion(either, kind):
    mpp, lesion_HW = 3.7, either.slides["wide"].lesion_HW
    with theatre_of(either).scene("wide", kind=kind) as scene:
        assert scene.slide is not None
        drawn = picture(scene, mpp=mpp, n_top=0)
        thumbnail_HW3 = drawing.faded(scene.slide.thumbnail(mpp).image_HW3)
    (x, y), (height, width) = drawn.map_at, thumbnail_HW3.shape[:2]
    assert width > height
    index_HW = colour_index(decoded(drawn.png)[y : y + height, x : x + width], thumbnail_HW3)
    level0 = ((highest_px(index_HW) + 0.5) * mpp / MPP).astype(int)
    assert lesion_HW[level0[:, 1], level0[:, 0]].all()


def test_without_the_slide_file_a_map_of_the_tiles_has_its_maximum_inside_too(either):
    theatre, mpp = theatre_of(either), 4.0
    scene = Theatre(theatre.verdicts, theatre.features, files={}).scene("wide")
    drawn = picture(scene, mpp=mpp, n_top=0)
    (x, y), low = drawn.map_at, scene.places.coords_N2.min(axis=0) - TILE_PX
    index_HW = colour_index(decoded(drawn.png)[y : -drawing.FOOT_PX, x:])
    level0 = ((highest_px(index_HW) + 0.5) * mpp / MPP + low).astype(int)
    lesion_HW = either.slides["wide"].lesion_HW
    assert lesion_HW[level0[:, 1], level0[:, 0]].all()


def test_every_px_is_the_mean_of_the_tiles_over_it(either):
    theatre = theatre_of(either)
    scene = Theatre(theatre.verdicts, theatre.features, files={}).scene("tall")
    places = scene.places
    for step in (9.0, 37.3):
        view = drawing.View((-13.0, 20.0), step, int(1000 / step), int(1300 / step), None)
        fast = drawing.raster(view, places.coords_N2, places.tile_side, scene.scores_N)
        np.testing.assert_allclose(
            fast, slow_raster(view, places.coords_N2, places.tile_side, scene.scores_N), rtol=1e-9
        )


def test_a_tile_smaller_than_a_px_is_still_seen():
    view = drawing.View((0.0, 0.0), 10.0, 20, 12, None)
    coords_N2 = np.array([[31, 55], [168, 2]])
    raster_HW = drawing.raster(view, coords_N2, 3.0, np.array([1.0, 2.0]))
    assert (raster_HW[5, 3], raster_HW[0, 16]) == (1, 2)
    assert np.isfinite(raster_HW).sum() == 2


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_and_probability_equal_a_loop_over_the_members(study, theatre):
    trained = theatre.trained
    features_ND = torch.from_numpy(theatre.features.features("wide"))
    attention, evidence = (theatre.scene("wide", kind=kind, scale="raw") for kind in ("attention", "evidence"))
    p = dict(trained.aggregator.named_parameters())
    looked, says = [], []
    for m in range(trained.n_members):
        x = (features_ND - trained.aggregator.input_mean_MD[m]) * trained.aggregator.input_scale_MD[m]
        h = x @ p["embed_weight"][m] + p["embed_bias"][m]
        gate = torch.sigmoid(h @ p["gate_weight"][m] + p["gate_bias"][m])
        a = torch.tanh(h @ p["attend_weight"][m] + p["attend_bias"][m]) * gate
        weights = torch.softmax((a @ p["score_weight"][m] + p["score_bias"][m])[:, 0], dim=0)
        looked.append(weights * len(x))
        says.append((h @ p["head0_weight"][m] + p["head0_bias"][m])[:, 0] * looked[-1])
    np.testing.assert_allclose(attention.scores_N, torch.stack(looked).mean(dim=0).detach(), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(evidence.scores_N, torch.stack(says).mean(dim=0).detach(), rtol=2e-3, atol=1e-3)
    p_tumor = attention.scores.verdict.p_C[1]
    assert 1 / (1 + np.exp(-evidence.scores_N.mean())) == pytest.approx(p_tumor, abs=1e-4), "a linear head: exact parts"
    table = pd.read_csv(study.run / "slides.csv").set_index("slide")
    assert p_tumor == pytest.approx(table.loc["wide", "p_1"], abs=1e-7)
    attention.slide.close()
    evidence.slide.close()


def test_percentiles_equal_scipys_and_the_ensemble_is_their_mean(theatre):
    scores_MN = np.array([[3.0, 1.0, 1.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    found = percentiles(scores_MN)
    for row, own in zip(found, scores_MN, strict=True):  # scipy counts the tile itself
        n = len(own)
        expected = [(percentileofscore(own, value, "mean") * n / 100 - 0.5) / (n - 1) * 100 for value in own]
        np.testing.assert_allclose(row, expected)
    assert percentiles(np.array([[4.0]])).tolist() == [[50.0]]
    with theatre.scene("wide") as scene:
        np.testing.assert_allclose(scene.scores_N, percentiles(scene.scores.scores_MN).mean(axis=0))


def test_a_slide_is_scored_by_those_that_held_it_out_or_by_the_member_asked_for(study, theatre):
    predictions = pd.read_csv(study.run / "predictions.csv", dtype={"slide": str})
    own = predictions[predictions["slide"] == "t03"].set_index("member")
    honest = own.index[own["role"] == "test"].tolist()
    assert len(honest) == 1
    assert theatre.verdicts.on("t03").members == tuple(honest)
    for member in own.index:
        verdict = theatre.verdicts.on("t03", member)
        assert verdict.p_C[1] == pytest.approx(own.loc[member, "p_1"], abs=1e-7)
        assert ("held it out" in verdict.kind) == (member in honest)
    assert theatre.verdicts.on("wide").members == (0, 1)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_mean_is_drawn_by_its_evidence_and_max_by_the_maxima_it_holds(studies, name):
    study = studies(name)
    trained = open_run(study.folder, device="cpu")
    theatre = open_theatre(trained)
    slide = study.slides[-1]
    scene = theatre.scene(slide, scale="raw")
    tiles_ND = study.tiles[-1].float().numpy()
    if name == "max":
        expected = (tiles_ND == tiles_ND.max(axis=0)).mean(axis=1)
        assert "maxima" in scene.scores.name
    else:
        assert scene.scores.name.startswith("evidence for tumor")
        expected = np.log(scene.scores.verdict.p_C[1] / scene.scores.verdict.p_C[0])
        assert scene.scores_N.mean() == pytest.approx(expected, abs=1e-4)
        return
    np.testing.assert_allclose(scene.scores_N, expected, atol=1e-6)


def test_chowder_marks_the_tiles_that_its_members_keep(chowder):
    theatre = open_theatre(open_run(chowder.run, device="cpu"))
    with theatre.scene("wide", scale="raw") as scene:
        table = tiles_table(scene)
        scores_MN = scene.scores.scores_MN
        for m in range(len(scores_MN)):
            ranks = np.argsort(-scores_MN[m])
            assert set(np.flatnonzero(scene.scores.top_MN[m])) == set(ranks[:4])
            assert set(np.flatnonzero(scene.scores.bottom_MN[m])) == set(ranks[-3:])
        assert table["top_of_members"].sum() == 4 * len(scores_MN)
        image = decoded(picture(scene, mpp=2.0).png)
        assert (image == (20, 20, 20)).all(axis=2).sum() > 200
    with theatre.scene("wide", kind="evidence") as scene:
        assert "log-odds of the tile alone" in scene.scores.name


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_command_writes_picture_geojson_table_and_gallery(either, tmp_path, capsys):
    arguments = [f"run={either.run}", "slide=[wide,tall]", f"out={tmp_path}", "threshold=70", "mpp=2.5", "device=cpu"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    names = [
        f"{s}_attention{end}"
        for s in ("wide", "tall")
        for end in (".png", "_tiles.csv", ".geojson", "_regions.geojson", "_gallery.png")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all(name in said for name in names)
    for slide, painted in either.slides.items():
        tiles = json.loads((tmp_path / f"{slide}_attention.geojson").read_text())
        assert tiles["type"] == "FeatureCollection"
        assert len(tiles["features"]) == len(painted.coords_N2)
        table = pd.read_csv(tmp_path / f"{slide}_attention_tiles.csv")
        for one, (x, y), row in zip(tiles["features"], painted.coords_N2.tolist(), table.itertuples(), strict=True):
            shape = shapely.from_geojson(json.dumps(one["geometry"]))
            assert shape.is_valid
            assert shape.area == TILE_PX**2
            assert shape.bounds == (x, y, x + TILE_PX, y + TILE_PX)
            properties = one["properties"]
            assert properties["objectType"] == "detection"
            assert properties["measurements"]["percentile within the slide"] == pytest.approx(row.percentile)
            colour = np.array(properties["classification"]["color"])
            assert colour.shape == (3,)
            assert ((colour >= 0) & (colour <= 255)).all()
        regions = json.loads((tmp_path / f"{slide}_attention_regions.geojson").read_text())["features"]
        above = painted.coords_N2[table["percentile"] >= 70]
        assert len(above)
        union = shapely.union_all([shapely.box(x, y, x + TILE_PX, y + TILE_PX) for x, y in above.tolist()])
        shapes = [shapely.from_geojson(json.dumps(one["geometry"])) for one in regions]
        assert sum(shape.area for shape in shapes) == pytest.approx(union.area, rel=1e-3)
        assert shapely.union_all(shapes).symmetric_difference(union).area < 1e-3 * union.area


def test_regions_bridge_the_rounding_of_the_grid_and_keep_holes():
    ring = [(x, y) for x in range(3) for y in range(3) if (x, y) != (1, 1)]
    coords_N2 = np.array([(round(x * 447.6), round(y * 447.6)) for x, y in ring])
    (region,) = merged_regions(coords_N2, 447)
    assert len(region.interiors) == 1
    assert region.area == pytest.approx(8 * 447**2, rel=0.01)
    far = np.concatenate([coords_N2, [[5000, 0]]])
    assert [len(part.interiors) for part in merged_regions(far, 447)] == [1, 0]


def test_the_gallery_shows_tiles_as_they_are_in_the_slide(study, theatre):
    painted = study.slides["wide"]
    with theatre.scene("wide") as scene:
        first = int(scene.order_N[0])
        x, y = painted.coords_N2[first].tolist()
        with open_slide(painted.path) as slide:
            expected = slide.read_region_rgb(0, x, y, TILE_PX, TILE_PX)
        np.testing.assert_array_equal(read_scene_tile(scene, first), expected)
        image = decoded(gallery_png(scene, 4))
    found = cv2.matchTemplate(image, expected, cv2.TM_SQDIFF)
    row, column = divmod(int(found.argmin()), found.shape[1])
    np.testing.assert_array_equal(image[row : row + TILE_PX, column : column + TILE_PX], expected)


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_shows_slides_and_fetches_nothing(study):
    page = (study.run / "report.html").read_text(encoding="utf-8")
    begin = page.index(">Heatmaps</h2>")
    section = page[begin : page.index("<h2", begin)]
    assert "wide" in section
    assert "tall" in section
    sources = re.findall(r'<img src="([^"]{0,30})', section)
    assert len(sources) == 2 + 2 * 5
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)|url\((?!#)|@import|https?:|<script src|<link""", page)
    table = pd.read_csv(study.run / "slides.csv").set_index("slide")
    assert f"P(tumor) = {table.loc['wide', 'p_1']:.4f}" in section


def requests_of_page(browser: str, page: Path, folder: Path) -> tuple[set[str], np.ndarray]:
    """What the page itself asks for in headless Chromium (not what the browser asks for itself), and its picture."""
    log, shot = folder / "net.json", folder / "page.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=900,2500",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    lines = [line.rstrip(",") for line in log.read_text(encoding="utf-8").splitlines() if '"initiator"' in line]
    asked = [json.loads(line)["params"] for line in lines]
    return {one["url"] for one in asked if "url" in one and one["initiator"] != "not an origin"}, decoded(shot)


def test_a_browser_loads_the_page_without_asking_for_anything(chowder, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    asked, image = requests_of_page(browser, chowder.run / "report.html", tmp_path)
    assert not asked
    assert image.std() > 10
    control = tmp_path / "control.html"
    control.write_text('<img src="http://example.invalid/x.png">')
    assert requests_of_page(browser, control, tmp_path)[0] == {"http://example.invalid/x.png"}, "it would be seen"


def test_what_cannot_be_drawn_becomes_a_note_and_stops_no_report(study, tmp_path):
    trained = open_run(study.run, device="cpu")
    environment = trained.environment | {
        "features": trained.environment["features"] | {"folder": str(tmp_path / "gone")}
    }
    shown, notes = for_report(replace(trained, environment=environment), 2)
    assert shown == []
    assert "gone" in notes[0]
    assert for_report(trained, 0) == ([], [])


# --- bad input -------------------------------------------------------------------------------------------------------


def fails(arguments: list[str], capsys) -> str:
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    return capsys.readouterr().err


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(study, tmp_path, capsys):
    out = tmp_path / "out"
    said = fails([f"run={study.run}", "slide=[wyde,wide]", "target=tumour", "member=9", f"out={out}"], capsys)
    assert "target=tumour: expected one of normal, tumor; did you mean 'tumor'?" in said
    assert "slide=wyde: not one of the 18 slides" in said
    assert "did you mean 'wide'?" in said
    assert "member=9: expected one of 0..1" in said
    said = fails([f"run={study.run}", "slide=wide", "threshold=101", f"out={out}"], capsys)
    assert "threshold=101: expected a percentile of 0..100" in said
    said = fails([f"run={tmp_path / 'no'}", "slide=wide", f"out={out}"], capsys)
    assert "no such folder" in said
    said = fails([f"run={study.run}", "slide=wide", "mpp=0.0001", f"out={out}"], capsys)
    assert not out.exists()


def test_features_of_another_kind_changed_features_and_missing_coordinates_are_refused(study, tmp_path, capsys):
    header = read_header(study.features / "wide.h5")
    painted = study.slides["wide"]

    def heatmap_of(features_ND, **changes) -> str:
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        fields = {
            key: getattr(header.provenance, key)
            for key in ("encoder", "weights_sha256", "tile_px", "mpp", "overlap_px", "tile_level0_px", "slide")
        }
        write_features(
            folder / "wide.h5",
            features_ND,
            painted.coords_N2[: len(features_ND)],
            Provenance(**(fields | changes)),
            dtype="float32",
        )
        return fails([f"run={study.run}", "slide=wide", f"features.folder={folder}", f"out={tmp_path / 'out'}"], capsys)

    assert "encoder is 'uni', the run was trained on 'colour'" in heatmap_of(painted.features_ND, encoder="uni")
    assert "predictions.csv says" in heatmap_of(painted.features_ND[::-1].copy() * 1.5)
    assert "expected features (tiles, 8)" in heatmap_of(painted.features_ND[:, :5])
    assert "no coordinates" in heatmap_of(painted.features_ND, extra={"coords_known": False})
    assert not (tmp_path / "out").exists()


def test_another_slide_file_is_refused(study, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(study.slides["tall"].path, folder / "wide.tif")
    said = fails([f"run={study.run}", "slide=wide", f"slides.folder={folder}", f"out={tmp_path / 'out'}"], capsys)
    assert "not the file that the features" in said or "tiles lie between" in said
    said = fails([f"run={study.run}", "slide=t03", f"slides.folder={folder}", f"out={tmp_path / 'out'}"], capsys)
    assert "no file of slide 't03'" in said


def test_a_new_slide_is_asked_of_all_members(study, tmp_path):
    painted = study.slides["wide"]
    folder = tmp_path / "new"
    provenance = read_header(study.features / "wide.h5").provenance
    write_features(folder / "fresh.h5", painted.features_ND, painted.coords_N2, provenance, dtype="float32")
    theatre = open_theatre(open_run(study.run, device="cpu"), features=folder)
    scene = theatre.scene("fresh", scale="raw")
    known = open_theatre(open_run(study.run, device="cpu")).scene("wide", scale="raw")
    np.testing.assert_allclose(scene.scores_N, known.scores_N, rtol=1e-5)
    assert scene.scores.verdict.members == (0, 1)
    np.testing.assert_allclose(scene.scores.verdict.p_C, known.scores.verdict.p_C, atol=1e-5)
    known.slide.close()


# --- speed, frames, classes ------------------------------------------------------------------------------------------


def test_the_picture_never_reads_the_slide_at_full_resolution(study, theatre, monkeypatch):
    levels = []
    read = Slide.read_region_rgb

    def noted(self, level, *place):
        levels.append(level)
        return read(self, level, *place)

    monkeypatch.setattr(Slide, "read_region_rgb", noted)
    with theatre.scene("wide") as scene:
        picture(scene, mpp=3.7)
    assert set(levels) == {2}


def test_coordinates_that_are_not_those_of_the_run_are_refused(study, tmp_path):
    """The same features with other coordinates give the same probabilities, and a map that is wrong."""
    features = shutil.copytree(study.features, tmp_path / "features")
    other = open_theatre(open_run(study.run, device="cpu"), features=features)
    with other.scene("wide") as scene:
        assert len(scene.scores_N), "copied"
    wide = study.slides["wide"]
    provenance = Provenance("colour", "none", TILE_PX, MPP, 0, TILE_PX, "wide", wide.fingerprint)
    write_features(features / "wide.h5", wide.features_ND, wide.coords_N2[::-1], provenance, dtype="float32")
    with pytest.raises(HeatmapError, match="features changed") as caught:
        other.scene("wide")
    assert "wide.h5: slide 'wide': its features are others now: were xxh3 " in caught.value.problems[0]


def test_features_replaced_while_a_slide_is_looked_at_are_refused(study, theatre, monkeypatch, tmp_path):
    path = theatre.features.path("wide")
    kept = shutil.copy(path, tmp_path / "kept.h5")
    wide, read = study.slides["wide"], FeatureFolder.coords
    provenance = Provenance("colour", "none", TILE_PX, MPP, 0, TILE_PX, "wide", wide.fingerprint)

    def then_replaced(self, *arguments, **options):
        found = read(self, *arguments, **options)
        write_features(path, wide.features_ND[::-1], wide.coords_N2[::-1], provenance, dtype="float32")
        return found

    monkeypatch.setattr(FeatureFolder, "coords", then_replaced)
    try:
        with pytest.raises(CacheError, match="was replaced by another one after it was checked"):
            theatre.scene("wide")
    finally:
        shutil.copy(kept, path)


def test_imported_deepzoom_addresses_make_a_map_in_deepzoom_px(tmp_path):
    address_N2 = np.array([[3, 5], [4, 5], [4, 9]])
    extra = {"coords_frame": "deepzoom", "deepzoom_level": 15, "deepzoom_frame_level": 15}
    provenance = Provenance("phikon", "x", 224, 0.5, slide="s", extra=extra)
    write_features(tmp_path / "s.h5", np.ones((3, 4), np.float32), address_N2 * 224, provenance)
    features = open_feature_folder(tmp_path)
    places = places_of(features, "s", features.header("s"))
    assert places.frame == "DeepZoom"
    assert places.coords_N2.tolist() == (address_N2 * 224).tolist()
    assert (places.tile_side, places.mpp) == (224, 0.5)
    wide = (97_792, 221_184)  # 18 doublings and a bit: DeepZoom levels 0..18, level 15 is 8 times coarser
    known = places_of(features, "s", features.header("s"), slide_mpp=0.0625, width_height=wide)
    assert known.frame == "level-0"
    assert known.coords_N2.tolist() == (address_N2 * 224 * 8).tolist()
    assert known.tile_side == 224 * 0.5 / 0.0625 == 224 * 8
    write_features(
        tmp_path / "s.h5", np.ones((3, 4), np.float32), address_N2, Provenance("phikon", extra={"coords_known": False})
    )
    with pytest.raises(HeatmapError, match="have no coordinates"):
        places_of(features, "s", features.header("s"))


def test_evidence_of_several_classes_is_the_log_odds_against_the_rest():
    logits_MNC = np.random.default_rng(2).normal(size=(2, 5, 3))
    p = np.exp(logits_MNC) / np.exp(logits_MNC).sum(axis=2, keepdims=True)
    for c in range(3):
        np.testing.assert_allclose(log_odds(logits_MNC, c), np.log(p[:, :, c] / (1 - p[:, :, c])))
    one = logits_MNC[:, :, :1]
    np.testing.assert_array_equal(log_odds(one, 0), -log_odds(one, 1))


def test_a_run_of_a_newer_version_or_unfinished_is_refused(study, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(study.run, run)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"slide-mil": "99.1"}))
    said = fails([f"run={run}", "slide=wide", f"out={tmp_path / 'out'}"], capsys)
    assert "99.1, which is newer" in said
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "predictions.csv").unlink()
    said = fails([f"run={run}", "slide=wide", f"out={tmp_path / 'out'}"], capsys)
    assert "training has not finished (no predictions.csv)" in said


# --- the lesion check on painted slides ------------------------------------------------------------------------------


def test_the_lesion_check_finds_the_painted_lesion(study, tmp_path, capsys):
    lesion_HW = study.slides["wide"].lesion_HW
    (contour,), _ = cv2.findContours(lesion_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    ring = [*contour[:, 0].tolist(), contour[0, 0].tolist()]
    outline = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "wide.geojson").write_text(json.dumps(outline))
    arguments = [f"run={study.run}", f"annotations={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "device=cpu"]
    assert lesions.main(arguments) == 0
    table = pd.read_csv(tmp_path / "out" / "lesions.csv").set_index("slide")
    assert table.loc["wide", "tile_auc"] > 0.99
    assert table.loc["wide", "top10_inside"] == 1
    assert table.loc["wide", "lesion_mm2"] == pytest.approx(lesion_HW.sum() * (MPP / 1000) ** 2, rel=0.02)
    assert table.loc["tall", "lesions"] == 0
    summary = json.loads((tmp_path / "out" / "lesions.json").read_text())
    assert [row["sensitivity"] for row in summary["froc"]] == [1.0] * 6
    outline["geometry"]["coordinates"] = [[[x + 2000, y] for x, y in ring]]
    (tmp_path / "a" / "wide.geojson").write_text(json.dumps(outline))
    assert lesions.main([*arguments[:2], f"out={tmp_path / 'never'}", "device=cpu"]) == 2
    assert "the slide has 1500 x 1100 px" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_without_an_mpp_a_level_of_the_slide_is_shown_as_it_is(theatre):
    with theatre.scene("wide") as scene:
        assert convenient_mpp(scene.slide, 1600) == MPP
        assert convenient_mpp(scene.slide, 600) == pytest.approx(scene.slide.geometry.level_mpps[1])
        assert convenient_mpp(scene.slide, 150) == pytest.approx(1500 * MPP / 150), "the coarsest level has 300 px"
