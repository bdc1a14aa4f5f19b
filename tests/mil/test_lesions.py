"""Outlines and the lesion check, against shapely read directly, a shoelace, counted pixels and sums done by hand."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import shapely
import shapely.affinity
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from extract.outlines.shapes import OutlineError
from mil.lesions import main
from mil.look.froc import Finds, apart, collected, found_lesions, froc, sensitivities
from mil.look.outlines import (
    Outlines,
    isolated_cells,
    major_axis,
    read_outlines,
    refuse_outlines_off,
    separate_lesions,
    tile_truth,
)

ROOT = Path(__file__).resolve().parents[2]
ANNOTATIONS = Path(os.environ.get("SLIDE_MIL_SHARED", ROOT.parent / "shared")) / "data" / "annotations"
needs_data = pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="no shared data here")

TILE = 100


def asap(outlines: list[tuple[str, list[tuple[float, float]]]], kind: str = "Polygon") -> str:
    """ASAP XML; the points are written out of order, as `Order` allows."""
    parts = []
    for i, (group, xy) in enumerate(outlines):
        points = [f'<Coordinate Order="{k}" X="{x}" Y="{y}" />' for k, (x, y) in enumerate(xy)]
        body = "".join(points[1:] + points[:1])
        parts.append(
            f'<Annotation Name="A{i}" Type="{kind}" PartOfGroup="{group}">'
            f"<Coordinates>{body}</Coordinates></Annotation>"
        )
    return f"<ASAP_Annotations><Annotations>{''.join(parts)}</Annotations><AnnotationGroups /></ASAP_Annotations>"


def rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def shoelace(xy: np.ndarray) -> float:
    x, y = xy.T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def points_of(path: Path) -> list[np.ndarray]:
    """Every annotation's points, read without this project."""
    root = ElementTree.parse(path).getroot()
    return [
        np.array([[float(c.get("X")), float(c.get("Y"))] for c in a.iter("Coordinate")])
        for a in root.iter("Annotation")
    ]


# --- outlines --------------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("name", ["tumor_001", "tumor_006"])
def test_camelyon16_outlines_have_the_areas_that_a_shoelace_and_shapely_find(name):
    path = ANNOTATIONS / f"{name}.xml"
    outlines, raw = read_outlines(path), points_of(path)
    assert len(outlines.lesions) == len(raw) > 1
    assert not outlines.exclusions
    for found, xy in zip(outlines.lesions, raw, strict=True):
        shape = shapely.Polygon(xy)
        assert found.area == pytest.approx(shapely.make_valid(shape).area, rel=1e-9)
        if shape.is_valid:
            assert found.area == pytest.approx(shoelace(xy), rel=1e-9)
    union = shapely.union_all([shapely.make_valid(shapely.Polygon(xy)) for xy in raw])
    assert outlines.area.area == pytest.approx(union.area, rel=1e-9)


@needs_data
def test_camelyon16_tiles_inside_equal_counted_pixels():
    outlines = read_outlines(ANNOTATIONS / "tumor_006.xml")
    left, top, right, bottom = (int(v) for v in shapely.total_bounds(outlines.lesions))
    side, step = 512, 16
    coords_N2 = np.array(
        [(x, y) for y in range(top - 600, bottom + 600, 700) for x in range(left - 600, right + 600, 700)]
    )
    truth = tile_truth(coords_N2, side, list(outlines.lesions))
    shift = np.array([left - 1000, top - 1000])
    size = ((bottom - top + 3000) // step, (right - left + 3000) // step)
    mask_HW = np.zeros(size, np.uint8)
    for xy in points_of(outlines.path):
        cv2.fillPoly(mask_HW, [np.rint((xy - shift) / step).astype(np.int32)], 1)
    for (x, y), share in zip(((coords_N2 - shift) // step).tolist(), truth.covered_N, strict=True):
        counted = mask_HW[y : y + side // step, x : x + side // step].mean()
        assert share == pytest.approx(counted, abs=0.12)  # the mask is coarse, its outline drawn
    assert truth.covered_N.sum() > 1


@needs_data
def test_asap_samples_areas_and_what_has_none():
    polygon = read_outlines(ANNOTATIONS / "asap_xml_samples" / "asap-polygon.xml")
    (xy,) = points_of(polygon.path)
    assert polygon.lesions[0].area == pytest.approx(shoelace(xy))
    for name in ("asap-dot", "asap-pointset"):
        found = read_outlines(ANNOTATIONS / "asap_xml_samples" / f"{name}.xml")
        assert not found.lesions
        assert "has no area" in found.skipped[0]


def test_exclusions_are_cut_out_and_neighbours_are_one_lesion(tmp_path):
    path = tmp_path / "s.xml"
    outer, hole, near, far = (
        rectangle(0, 0, 1000, 600),
        rectangle(200, 100, 400, 300),
        rectangle(1050, 0, 1200, 300),
        rectangle(3000, 0, 3100, 70),
    )
    path.write_text(asap([("_0", outer), ("_2", hole), ("_1", near), ("Tumor", far)]))
    outlines = read_outlines(path)
    assert outlines.area.area == 1000 * 600 - 200 * 200 + 150 * 300 + 100 * 70
    assert sorted(lesion.area for lesion in separate_lesions(outlines, 60)) == [
        7000,
        1000 * 600 - 200 * 200 + 150 * 300,
    ]
    assert len(separate_lesions(outlines, 40)) == 3
    path.write_text(asap([("_0", outer), ("exclusion", hole)]))
    assert read_outlines(path).area.area == 1000 * 600 - 200 * 200, "capitals do not matter"
    assert read_outlines(path, exclusion_groups=["other"]).area.area == 1000 * 600


def test_geojson_outlines_equal_the_same_in_asap(tmp_path):
    ring, hole = rectangle(10, 20, 310, 220), rectangle(50, 60, 90, 100)
    closed = [[*ring, ring[0]], [*hole, hole[0]]]
    cut = rectangle(200, 20, 310, 120)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": closed},
            "properties": {"classification": {"name": "Tumor"}},
        },
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*cut, cut[0]]]},
            "properties": {"classification": {"name": "Exclusion"}},
        },
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}},
    ]
    (tmp_path / "s.xml").write_text(asap([("Tumor", ring), ("Exclusion", hole), ("Exclusion", cut)]))
    for name, content in (
        ("a", {"type": "FeatureCollection", "features": features}),
        ("b", features),
        ("c", features[0]),
    ):
        (tmp_path / f"{name}.geojson").write_text(json.dumps(content))
    a, b, c = (read_outlines(tmp_path / f"{name}.geojson") for name in "abc")
    assert a.area.equals(read_outlines(tmp_path / "s.xml").area)
    assert b.area.equals(a.area)
    assert c.area.area == 300 * 200 - 40 * 40
    assert a.skipped == ("no name: a Point has no area",)


def test_an_outline_that_crosses_itself_keeps_its_area(tmp_path):
    (tmp_path / "s.xml").write_text(asap([("Tumor", [(0, 0), (100, 100), (100, 0), (0, 100)])]))
    assert read_outlines(tmp_path / "s.xml").area.area == 2 * 100 * 50 / 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<ASAP_Annotations>", "no element found"),
        ("<Other></Other>", "expected the root element ASAP_Annotations, got Other"),
        (asap([("Tumor", [(0, 0), (1, 1)])]), "A0: expected at least three points, got 2"),
    ],
)
def test_outlines_that_cannot_be_read_are_refused(tmp_path, text, said):
    (tmp_path / "s.xml").write_text(text)
    with pytest.raises(OutlineError, match=said):
        read_outlines(tmp_path / "s.xml")
    (tmp_path / "s.geojson").write_text('{"some": "json"}')
    with pytest.raises(OutlineError, match="expected GeoJSON objects"):
        read_outlines(tmp_path / "s.geojson")


def test_outlines_off_the_slide_are_refused(tmp_path):
    (tmp_path / "s.xml").write_text(asap([("Tumor", rectangle(5000, 100, 5400, 300))]))
    outlines, coords_N2 = read_outlines(tmp_path / "s.xml"), np.array([[0, 0], [100, 0]])
    refuse_outlines_off(outlines, coords_N2, TILE, (6000, 400))
    with pytest.raises(OutlineError, match="x 5000 to 5400, y 100 to 300; the slide has 4000 x 400 px"):
        refuse_outlines_off(outlines, coords_N2, TILE, (4000, 400))
    with pytest.raises(OutlineError, match="no tile is touched"):
        refuse_outlines_off(outlines, coords_N2, TILE, None)


# --- tiles and lesions -----------------------------------------------------------------------------------------------


def test_shares_of_tiles_are_exact_and_a_small_lesion_has_its_tile():
    coords_N2 = np.array([(x * TILE, y * TILE) for y in range(3) for x in range(5)])
    lesions = [shapely.box(100, 0, 260, 130), shapely.box(430, 210, 440, 220)]
    truth = tile_truth(coords_N2, TILE, lesions)
    expected = np.zeros((3, 5))
    expected[0, 1], expected[0, 2], expected[1, 1], expected[1, 2] = 1, 0.6, 0.3, 0.18
    expected[2, 4] = 0.01
    np.testing.assert_allclose(truth.covered_N.reshape(3, 5), expected, atol=1e-12)
    assert np.flatnonzero(truth.inside_N(0.5)).tolist() == [1, 2, 14]
    scores_N = np.arange(15.0)
    assert truth.best_score_L(scores_N).tolist() == [7, 14]
    assert tile_truth(coords_N2, TILE, [shapely.box(9000, 0, 9100, 50)]).best_score_L(scores_N).tolist() == [-np.inf]


def test_false_positives_that_lie_together_count_once():
    centres_K2 = np.array([[0, 0], [30, 0], [0, 90], [300, 10], [310, 0]])
    assert apart(centres_K2, np.array([1.0, 5.0, 2.0, 3.0, 4.0]), 100.0).tolist() == [1, 4]
    assert sorted(apart(centres_K2, np.array([1.0, 5.0, 2.0, 3.0, 4.0]), 0.0).tolist()) == [0, 1, 2, 3, 4]


def made_up_finds(rng: np.random.Generator) -> tuple[Finds, list[str]]:
    """12 slides, two of which count no false positives, with ties."""
    slides = [
        (rng.normal(1, 1, rng.integers(0, 4)).round(1), None if s in (3, 8) else rng.normal(0, 1, 6).round(1))
        for s in range(12)
    ]
    slides[0] = (np.array([0.4, -np.inf]), slides[0][1])
    return collected(slides), [f"p{s // 2}" for s in range(12)]


def slow_found(lesions: np.ndarray, false: np.ndarray, allowed: float) -> int:
    """The most lesions found by any threshold with at most so many false positives."""
    best = 0
    for threshold in np.unique(np.concatenate([lesions[np.isfinite(lesions)], false])):
        if (false >= threshold).sum() <= allowed:
            best = max(best, int((lesions >= threshold).sum()))
    return best


def test_froc_equals_trying_every_threshold():
    finds, patients = made_up_finds(np.random.default_rng(4))
    allowed = [0.25, 0.5, 1, 2, 4, 8]
    rows, _ = froc(finds, allowed, patients, resamples=0, seed=0)
    for row in rows:
        assert row["found"] == slow_found(finds.lesions_L, finds.false_F, row["false_positives_per_slide"] * 10)
        assert row["sensitivity"] == row["found"] / len(finds.lesions_L)
        assert row["low"] is None
    nothing = collected([(np.empty(0), np.array([1.0]))])
    assert froc(nothing, [1], ["p"], resamples=9, seed=0)[0][0]["sensitivity"] is None


def test_a_slide_drawn_twice_is_two_slides_and_the_interval_is_that_of_a_slow_bootstrap():
    finds, patients = made_up_finds(np.random.default_rng(7))
    allowed, rng, values = [0.5, 2.0], np.random.default_rng(11), []
    for draw in range(1500):
        chosen = [s for p in rng.integers(0, 6, 6) for s in (2 * p, 2 * p + 1)]
        lesions = np.concatenate([finds.lesions_L[finds.lesion_slide_L == s] for s in chosen])
        false = np.concatenate([finds.false_F[finds.false_slide_F == s] for s in chosen])
        counting = sum(finds.counting_S[s] for s in chosen)
        if not len(lesions):
            continue
        values.append([slow_found(lesions, false, a * counting + 1e-9) / len(lesions) for a in allowed])
        if draw < 40:
            weights_RS = np.bincount(chosen, minlength=12)[None].astype(float)
            np.testing.assert_allclose(sensitivities(finds, allowed, weights_RS)[0], values[-1])
            np.testing.assert_allclose(found_lesions(finds, allowed, weights_RS)[0] / len(lesions), values[-1])
    rows, of_mean = froc(finds, allowed, patients, resamples=3000, seed=0)
    n = len({patients[s] for s in finds.lesion_slide_L})
    found = [*((row["sensitivity"], row["low"], row["high"]) for row in rows)]
    found.append((np.mean([row["sensitivity"] for row in rows]), *of_mean))
    for (value, low, high), column in zip(found, [*np.array(values).T, np.mean(values, axis=1)], strict=True):
        spread = value * (1 - value)
        worth = spread / ((n * column.var() * n / (n - 1) + spread / n) / (n + 1))
        truth = proportion_confint(value * worth, worth, method="wilson")
        np.testing.assert_allclose([low, high], truth, atol=0.03)


def test_a_sensitivity_of_one_has_a_lower_limit_below_one():
    """All lesions of three patients found: Wilson's of 3 of 3, whatever is drawn."""
    finds = collected([(np.ones(5), np.empty(0)), (np.ones(1), np.empty(0)), (np.ones(2), np.zeros(1))])
    rows, of_mean = froc(finds, [1], ["a", "b", "c"], resamples=50, seed=0)
    truth = proportion_confint(3, 3, method="wilson")
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx(truth)
    assert of_mean == pytest.approx(truth)
    assert froc(finds, [1], ["a", "a", "a"], resamples=50, seed=0)[1] == (None, None)


# --- isolated tumour cells -------------------------------------------------------------------------------------------


def test_the_major_axis_is_that_of_pixels_and_of_an_ellipse():
    circle = shapely.Point(7, -300).buffer(1, quad_segs=64)
    turned = shapely.affinity.rotate(shapely.affinity.scale(circle, 90, 25), 33)
    assert major_axis(turned) == pytest.approx(180, rel=2e-3)
    bent = shapely.Polygon([(40, 30), (340, 60), (300, 140), (120, 110), (90, 260), (30, 250)])
    both = shapely.union_all([bent.difference(shapely.box(150, 70, 200, 100)), shapely.box(250, 180, 330, 290)])
    mask_HW = np.zeros((320, 400), np.uint8)
    for part, value in [(bent.exterior, 1), (shapely.box(150, 70, 200, 100).exterior, 0)]:
        cv2.fillPoly(mask_HW, [np.rint(part.coords).astype(np.int32)], value)
    cv2.fillPoly(mask_HW, [np.rint(shapely.box(250, 180, 330, 290).exterior.coords).astype(np.int32)], 1)
    values = np.linalg.eigvalsh(np.cov(np.argwhere(mask_HW).T, ddof=0))
    assert major_axis(both) == pytest.approx(4 * np.sqrt(values[-1]), rel=0.01)
    assert major_axis(shapely.affinity.translate(both, 1e5, -3e4)) == pytest.approx(major_axis(both))
    assert isolated_cells([], 275, 0.25).shape == (0,)


def official_froc(mask_HW: np.ndarray, mpp: float, detections: list[tuple[int, int, float]], allowed: list[float]):
    """Sensitivities by Camelyon16's published rules, on a mask in pixels, one slide; also how many lesions count."""
    grown_HW = ndimage.distance_transform_edt(mask_HW == 0) < 75 / mpp / 2
    label_HW, n = ndimage.label(ndimage.binary_fill_holes(grown_HW), structure=np.ones((3, 3)))
    isolated = set()
    for region in range(1, n + 1):
        values = np.linalg.eigvalsh(np.cov(np.argwhere(label_HW == region).T, ddof=0))
        if 4 * np.sqrt(values[-1]) < 275 / mpp:
            isolated.add(region)
    best, false = {region: -np.inf for region in range(1, n + 1) if region not in isolated}, []
    for x, y, score in detections:
        region = int(label_HW[y, x])
        if region == 0:
            false.append(score)
        elif region in best:
            best[region] = max(best[region], score)
    lesions = np.array(list(best.values()))
    return [slow_found(lesions, np.array(false), a) / len(lesions) for a in allowed], len(lesions), n


def test_isolated_tumour_cells_are_neither_found_nor_missed():
    """Half the lesions are isolated cells, and tiles look past them; truth: the published evaluation on pixels."""
    mpp, side, rng = 2.0, 10, np.random.default_rng(2)  # a tile of 20 microns
    large = [shapely.box(x, 40, x + 130, 90) for x in (40, 340, 640)] + [shapely.Point(120, 330).buffer(70)]
    small = [shapely.box(x, 200, x + 20, 220) for x in (300, 420, 540)] + [shapely.Point(600, 330).buffer(45)]
    mask_HW = np.zeros((440, 860), np.uint8)
    for shape in [*large, *small]:
        cv2.fillPoly(mask_HW, [np.rint(shape.exterior.coords).astype(np.int32)], 1)
    coords_N2 = np.array([(x, y) for y in range(0, 440, side) for x in range(0, 860, side)])
    lesions = separate_lesions(read_shapes_as_outlines([*large, *small]), 75 / mpp)
    isolated_L = isolated_cells(lesions, 275, mpp)
    assert (len(lesions), isolated_L.sum()) == (8, 4)
    truth = tile_truth(coords_N2, side, lesions)
    near_N = shapely.distance(shapely.points(coords_N2 + side / 2), shapely.union_all(lesions)) < 60 / mpp
    of_large = tile_truth(coords_N2, side, large).covered_N > 0
    scores_N = rng.normal(size=len(coords_N2)) + 4 * of_large
    used_N = (truth.covered_N > 0) | ~near_N  # the rims, where the two ways of hitting a lesion differ, have no tiles
    best_L = tile_truth(coords_N2[used_N], side, lesions).best_score_L(scores_N[used_N])
    false_F = scores_N[used_N & (truth.covered_N == 0)]
    allowed = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    centres = (coords_N2 + side // 2)[used_N].tolist()
    detections = [(x, y, score) for (x, y), score in zip(centres, scores_N[used_N].tolist(), strict=True)]
    official, n_counted, n_regions = official_froc(mask_HW, mpp, detections, allowed)
    assert (n_counted, n_regions) == (4, 8)

    def found(chosen_L: np.ndarray) -> list[float]:
        rows, _ = froc(collected([(best_L[chosen_L], false_F)]), allowed, ["p"], resamples=0, seed=0)
        return [row["sensitivity"] for row in rows]

    assert found(~isolated_L) == official
    assert official[0] == 1
    assert np.mean(found(np.ones(8, dtype=bool))) < 0.7, "which counting isolated cells hides"


def read_shapes_as_outlines(shapes):
    return Outlines(Path("made.xml"), tuple(shapes), ())


def test_what_lies_within_a_ring_is_one_lesion_with_it():
    ring = shapely.Point(0, 0).buffer(400).difference(shapely.Point(0, 0).buffer(300))
    island = shapely.Point(0, 0).buffer(40)
    assert len(separate_lesions(read_shapes_as_outlines([ring, island]), 150)) == 1
    assert len(separate_lesions(read_shapes_as_outlines([island, shapely.affinity.translate(island, 300)]), 150)) == 2


@pytest.mark.parametrize(
    ("name", "groups", "expected"),
    [
        ("s.xml", ("Tumor", "Exclusion"), True),
        ("s.xml", ("_0", "_2"), True),
        ("s.xml", ("Tumor", "DCIS"), False),
        ("s.geojson", ("Tumor", "Exclusion"), False),
    ],
)
def test_camelyon16s_outlines_are_known_by_their_groups(tmp_path, name, groups, expected):
    path = tmp_path / name
    rings = [rectangle(0, 0, 90, 50), rectangle(10, 10, 20, 30)]
    if path.suffix == ".xml":
        path.write_text(asap(list(zip(groups, rings, strict=True))))
    else:
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
                "properties": {"classification": {"name": group}},
            }
            for group, ring in zip(groups, rings, strict=True)
        ]
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert read_outlines(path).camelyon16 is expected


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outlined(studies, tmp_path_factory) -> tuple[Path, Path]:
    """(run, annotations): test slides of label tumor have the first two tiles outlined, with an exclusion."""
    study = studies("mean")
    folder = tmp_path_factory.mktemp("annotations")
    for slide, label, split in zip(study.slides, study.labels_S, study.split, strict=True):
        if split == "test" and label:
            lesion, hole = rectangle(0, 0, 896, 448), rectangle(500, 100, 600, 200)
            (folder / f"{slide}.xml").write_text(asap([("_0", lesion), ("_2", hole)]))
    return study.folder, folder


def test_the_command_writes_what_a_loop_over_the_tiles_finds(outlined, studies, tmp_path, capsys):
    run, annotations = outlined
    study = studies("mean")
    assert main([f"run={run}", f"annotations={annotations}", f"out={tmp_path}", "device=cpu"]) == 0
    table = pd.read_csv(tmp_path / "lesions.csv").set_index("slide")
    summary = json.loads((tmp_path / "lesions.json").read_text())
    test = [i for i in range(30) if study.split[i] == "test"]
    assert sorted(table.index) == sorted(study.slides[i] for i in test)
    from mil.results.trained import open_run

    aggregator = open_run(run, device="cpu").aggregator
    for i in test:
        row = table.loc[study.slides[i]]
        x = (study.tiles[i].float() - aggregator.input_mean_MD[:, None]) * aggregator.input_scale_MD[:, None]
        scores_N = (x @ aggregator.head0_weight + aggregator.head0_bias[:, None])[:, :, 0].mean(dim=0).detach().numpy()
        inside_N = np.arange(len(scores_N)) < (2 if study.labels_S[i] else 0)
        assert row["tiles_inside"] == inside_N.sum()
        assert row["tiles_border"] == 0
        if study.labels_S[i]:
            assert row["tile_auc"] == pytest.approx(roc_auc_score(inside_N, scores_N))
            first = np.argsort(-scores_N, kind="stable")[:10]
            assert row["top10_inside"] == pytest.approx(inside_N[first].mean())
            assert row["lesion_mm2"] == pytest.approx((896 * 448 - 100 * 100) * 0.25e-3**2)
        else:
            assert np.isnan(row["tile_auc"])
            assert row["lesions"] == 0
    assert summary["lesions"] == int(study.labels_S[test].sum())
    assert summary["slides_counting_false_positives"] == len(test)
    said = capsys.readouterr().out
    assert "tile AUC" in said
    assert f"{summary['froc_mean_sensitivity']:.3f}" in said


def test_the_command_leaves_isolated_cells_out_and_shows_how_many(outlined, tmp_path, capsys):
    run, annotations = outlined
    with_cells = tmp_path / "annotations"
    with_cells.mkdir()
    for path in annotations.iterdir():
        text = path.read_text().replace("<AnnotationGroups />", "")
        cell = asap(
            [("_0", rectangle(1400, 1000, 1700, 1200))]
        )  # 75 x 50 microns: far from the other, no tile of its own
        inner = cell[cell.index("<Annotation ") : cell.index("</Annotations>")]
        (with_cells / path.name).write_text(text.replace("</Annotations>", inner + "</Annotations>"))

    def run_it(*more: str) -> dict[str, object]:
        out = tmp_path / f"out{len(more)}"
        assert (
            main([f"run={run}", f"annotations={with_cells}", f"out={out}", "device=cpu", "bootstrap=200", *more]) == 0
        )
        return json.loads((out / "lesions.json").read_text())

    summary, said = run_it(), capsys.readouterr().out
    n = len(list(annotations.iterdir()))
    assert (summary["lesions"], summary["isolated_cells"], summary["lesions_counted"]) == (2 * n, n, n)
    assert f"{n} of them isolated tumour cells" in said
    assert f"of {n}" in said
    for row in summary["froc"]:
        assert 0 <= row["low"] <= row["sensitivity"] <= row["high"] <= 1
    assert f"[{summary['froc_mean_low']:.3f}, {summary['froc_mean_high']:.3f}]" in said
    all_of_them = run_it("itc_um=0")
    assert (all_of_them["isolated_cells"], all_of_them["lesions_counted"]) == (0, 2 * n)


def test_a_slide_that_is_not_exhaustive_counts_for_sensitivity_alone(outlined, tmp_path):
    run, annotations = outlined
    slide = min(path.stem for path in annotations.iterdir())
    assert (
        main([f"run={run}", f"annotations={annotations}", f"out={tmp_path}", f"not_exhaustive=[{slide}]", "device=cpu"])
        == 0
    )
    row = pd.read_csv(tmp_path / "lesions.csv").set_index("slide").loc[slide]
    assert np.isnan(row["tile_auc"])
    assert np.isnan(row["top10_inside"])
    summary = json.loads((tmp_path / "lesions.json").read_text())
    assert summary["slides_counting_false_positives"] == summary["slides"] - 1
    assert summary["lesions"] == len(list(annotations.iterdir()))


def test_what_is_wrong_is_said_at_once_and_nothing_is_written(outlined, tmp_path, capsys):
    run, annotations = outlined
    out = tmp_path / "out"

    def fails(*arguments: str) -> str:
        assert main([f"run={run}", f"out={out}", "device=cpu", *arguments]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    said = fails(f"annotations={annotations}", "target=tumour", "not_exhaustive=[slide_99]")
    assert "target=tumour: expected one of normal, tumor; did you mean 'tumor'?" in said
    assert "not_exhaustive: no slide 'slide_99'" in said
    assert "no such folder" in fails(f"annotations={tmp_path / 'none'}")
    other = tmp_path / "other"
    other.mkdir()
    assert "no file ends in .xml, .geojson, .json" in fails(f"annotations={other}")
    (other / "Slide-24.xml").write_text(asap([("Tumor", rectangle(0, 0, 1, 1))]))
    assert "no outlines of the 6 slides" in fails(f"annotations={other}")
    slides = sorted(path.stem for path in annotations.iterdir())[:2]
    for slide in slides:
        (other / f"{slide}.xml").write_text(asap([("Tumor", rectangle(90_000, 0, 91_000, 500))]))
    said = fails(f"annotations={other}")
    assert all(f"{slide}.xml: outlines lie within x 90000 to 91000" in said for slide in slides), "all of them"
