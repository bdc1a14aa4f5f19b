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
from sklearn.metrics import roc_auc_score

from mil.lesions import apart, froc, main
from mil.look.outlines import OutlineError, read_outlines, refuse_outlines_off, separate_lesions, tile_truth

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


def test_froc_equals_trying_every_threshold():
    rng = np.random.default_rng(4)
    lesions_L, false_F = np.append(rng.normal(1, 1, 23), -np.inf).round(1), rng.normal(0, 1, 60).round(1)
    n_slides, allowed = 12, [0.25, 0.5, 1, 2, 4, 8]
    for row in froc(lesions_L, false_F, n_slides, allowed):
        best = 0
        for threshold in np.unique(np.concatenate([lesions_L[np.isfinite(lesions_L)], false_F])):
            if (false_F >= threshold).sum() <= row["false_positives_per_slide"] * n_slides:
                best = max(best, int((lesions_L >= threshold).sum()))
        assert row["found"] == best
        assert row["sensitivity"] == best / 24
    assert froc(lesions_L[:0], false_F, 3, [1])[0]["sensitivity"] is None


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
