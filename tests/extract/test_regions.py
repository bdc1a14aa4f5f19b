"""Drawn regions: where tiles may lie and where never, from outlines and mask images; our mask as outlines."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import shapely.affinity
from PIL import Image
from shapely.geometry.base import BaseGeometry

from extract.config import ExtractConfig, ProblemsError, Tissue
from extract.extraction.summary import Summary
from extract.extraction.todo import cohort_slides
from extract.extraction.work import extract_cohort
from extract.features.cache import read_coords
from extract.outlines.geojson import read_shapes
from extract.slides.regions import RegionsError, outlines_of, rasterised, read_regions, regions_files, unmatched_classes
from extract.slides.slide import Geometry
from extract.slides.tissue import TissueMask

WIDTH, HEIGHT, MPP, MASK_MPP = 6400, 4000, 0.5, 8.0
GEOMETRY = Geometry("made.svs", MPP, ((WIDTH, HEIGHT),), (1.0,), ((256, 256),))
SHAPE_HW = (HEIGHT // 16, WIDTH // 16)
LEFT, RING = shapely.box(320, 480, 2400, 3200), shapely.box(3200, 800, 6000, 3600) - shapely.box(4000, 1600, 4800, 2400)


def write_geojson(path: Path, shapes: list[tuple[str, BaseGeometry]]) -> Path:
    """As QuPath writes it."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(shape)),
            "properties": {"objectType": "annotation", "classification": {"name": name}} if name else {},
        }
        for name, shape in shapes
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def write_asap(path: Path, shapes: list[tuple[str, BaseGeometry]]) -> Path:
    rows = []
    for name, shape in shapes:
        points = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(shape.exterior.coords))
        rows.append(
            f'<Annotation Name="a" Type="Polygon" PartOfGroup="{name}"><Coordinates>{points}</Coordinates></Annotation>'
        )
    path.write_text(f"<ASAP_Annotations><Annotations>{''.join(rows)}</Annotations></ASAP_Annotations>")
    return path


def truth(shape: BaseGeometry) -> np.ndarray:
    """Bool (H, W): mask pixels whose centre is inside, asked one by one."""
    y, x = (np.indices(SHAPE_HW) + 0.5) * MASK_MPP / MPP
    return shapely.contains_xy(shape, x, y)


def read(path: Path, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles may lie, and where never."""
    section = Tissue(regions=path.parent, **options)
    found = read_regions(path, GEOMETRY, SHAPE_HW, MASK_MPP, section)
    return np.ones(SHAPE_HW, bool) if found.include_HW is None else found.include_HW, found.exclude_HW


@pytest.mark.parametrize(
    "shape",
    [LEFT, RING, shapely.Point(3000, 2000).buffer(777), shapely.affinity.rotate(LEFT, 31), LEFT | RING],
    ids=["box", "ring", "circle", "turned", "several"],
)
def test_a_region_covers_the_pixels_whose_centres_are_inside(shape):
    expected = truth(shape)
    found = rasterised(shape, MPP / MASK_MPP, SHAPE_HW)
    assert np.array_equal(found, expected)
    assert expected.any()


@pytest.mark.parametrize("write", [write_geojson, write_asap])
def test_classes_say_where_tiles_may_lie_and_where_never(tmp_path, write):
    hole = shapely.box(480, 640, 960, 1120)
    file = "s.xml" if write is write_asap else "s.geojson"
    path = write(tmp_path / file, [("Tumour", LEFT), ("Stroma", shapely.box(3200, 800, 6000, 3600)), ("Exclude", hole)])
    include, exclude = read(path)
    assert np.array_equal(include, truth(LEFT) | truth(shapely.box(3200, 800, 6000, 3600)))
    assert np.array_equal(exclude, truth(hole))
    include, _ = read(path, include=["tumour"])  # capitals do not matter
    assert np.array_equal(include, truth(LEFT))
    include, exclude = read(path, include=["tum*"], exclude=["stroma"])
    assert np.array_equal(include, truth(LEFT))
    assert np.array_equal(exclude, truth(shapely.box(3200, 800, 6000, 3600)))


def test_a_file_that_only_excludes_leaves_the_rest_free(tmp_path):
    include, exclude = read(write_geojson(tmp_path / "s.geojson", [("Ignore*", LEFT)]))
    assert include.all()
    assert np.array_equal(exclude, truth(LEFT))


def test_outlines_without_a_name_include(tmp_path):
    include, exclude = read(write_geojson(tmp_path / "s.json", [("", LEFT)]))
    assert np.array_equal(include, truth(LEFT))
    assert not exclude.any()


@pytest.mark.parametrize("scale", [1, 3, 0.4])
def test_a_mask_image_of_any_scale(tmp_path, scale):
    height, width = round(SHAPE_HW[0] * scale), round(SHAPE_HW[1] * scale)
    image = np.zeros((height, width), np.uint8)
    image[height // 4 : height // 2, width // 8 : width // 2] = 2
    image[height // 2 :, width // 2 :] = 7
    Image.fromarray(image).save(tmp_path / "s.png")
    expected = cv2.resize(image, SHAPE_HW[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    include, exclude = read(tmp_path / "s.png", exclude=["7"])
    slack = (SHAPE_HW[0] + SHAPE_HW[1]) * (2 if scale < 1 else 0)
    assert (include ^ (expected == 2)).sum() <= slack
    assert (exclude ^ (expected == 7)).sum() <= slack
    assert include.any()


def refused(path: Path, **options: object) -> str:
    with pytest.raises(RegionsError) as error:
        read(path, **options)
    return str(error.value)


def test_what_cannot_be_regions_of_this_slide(tmp_path):
    Image.fromarray(np.ones((100, 100), np.uint8)).save(tmp_path / "square.png")
    assert "100 x 100 px is not the shape of the slide, 6400 x 4000 px" in refused(tmp_path / "square.png")
    Image.fromarray(np.ones((40, 64, 3), np.uint8)).save(tmp_path / "colour.png")
    assert "one channel whose values are classes" in refused(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "not a mask image that can be read" in refused(tmp_path / "text.png")
    path = write_geojson(tmp_path / "off.geojson", [("a", shapely.box(0, 0, 9000, 100))])
    assert "x 0 to 9000, y 0 to 100; the slide has 6400 x 4000 px" in refused(path)
    path = write_geojson(tmp_path / "other.geojson", [("stroma", LEFT)])
    assert "its classes are 'stroma'" in refused(path, include=["tumour"])
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert "no outline with an area" in refused(tmp_path / "empty.geojson")
    (tmp_path / "bare.geojson").write_text('{"features": [{"type": "Feature", "properties": {}}]}')
    assert "expected GeoJSON objects with a geometry, got" in refused(tmp_path / "bare.geojson")
    (tmp_path / "broken.xml").write_text("<ASAP")
    assert "neither ASAP XML nor GeoJSON" in refused(tmp_path / "broken.xml")


def test_method_regions_needs_them():
    with pytest.raises(ValueError, match=r"tissue[.]method=regions takes what is drawn"):
        Tissue(method="regions")


def test_files_of_slides(tmp_path):
    for name in ("a.geojson", "b.xml", "c.geojson", "c.png", ".hidden.geojson", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert regions_files(tmp_path, ["a", "b"], needed=True) == {"a": tmp_path / "a.geojson", "b": tmp_path / "b.xml"}
    with pytest.raises(RegionsError) as error:
        regions_files(tmp_path, ["a", "c", "ab"], needed=True)
    assert [problem[:9] for problem in error.value.problems] == ["slide 'c'", "slide 'ab"]
    assert "without_regions=whole" in error.value.title
    with pytest.raises(RegionsError) as error:
        regions_files(tmp_path, ["a", "c"], needed=True)
    assert error.value.title == "regions cannot be used"  # a second file is not one that is missing
    assert regions_files(tmp_path, ["a", "ab"], needed=False) == {"a": tmp_path / "a.geojson"}
    with pytest.raises(RegionsError, match="no file of regions"):
        regions_files(tmp_path, ["x", "y"], needed=False)  # the folder is of other slides
    with pytest.raises(RegionsError, match="no such folder"):
        regions_files(tmp_path / "absent", ["a"], needed=True)


def test_our_mask_as_outlines_and_back(tmp_path):
    mask_HW = truth(RING) | truth(shapely.Point(1000, 1500).buffer(700))
    tissue = TissueMask(mask_HW, MASK_MPP, "", 0.05, np.zeros_like(mask_HW))
    pieces = outlines_of(tissue, MPP)
    assert len(pieces) == 2
    assert sum(piece.area for piece in pieces) == pytest.approx(mask_HW.sum() * (MASK_MPP / MPP) ** 2, rel=0.01)
    include, _ = read(write_geojson(tmp_path / "s.geojson", [("tissue", piece) for piece in pieces]))
    assert (include ^ mask_HW).sum() < 0.01 * mask_HW.sum()
    assert outlines_of(TissueMask(mask_HW & False, MASK_MPP, "", 0.05, mask_HW), MPP) == []


# --- extraction ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(slides, tmp_path) -> Path:
    """Two slides of 1500 x 1100 px."""
    (tmp_path / "slides").mkdir()
    for name in ("s0", "s1"):
        slides.painted_slide(tmp_path / "slides" / f"{name}.tiff", seed=ord(name[1]))
    (tmp_path / "regions").mkdir()
    return tmp_path


def run(folder: Path, out: str = "out", **tissue: object) -> tuple[Summary, dict[str, np.ndarray]]:
    """What `extract.run` does; the coordinates of every slide."""
    config = ExtractConfig.model_validate(
        {
            "slides": {"folder": folder / "slides"},
            "features": {"folder": folder / out},
            "encoder": {"name": "timm:test_vit", "random_weights": True, "device": "cpu"},
            "tissue": tissue,
            "extract": {"workers": 0},
        }
    )
    summary = extract_cohort(config, cohort_slides(config), progress=False)
    return summary, {path.stem: read_coords(path) for path in sorted((folder / out).glob("*.h5"))}


def test_tiles_lie_where_the_regions_allow(folder):
    left = shapely.box(0, 0, 750, 1100)
    write_geojson(folder / "regions" / "s0.geojson", [("tumour", left), ("exclude", shapely.box(0, 0, 750, 400))])
    _, everywhere = run(folder, "all")
    summary, limited = run(folder, regions=folder / "regions", without_regions="whole")
    assert (summary.failed, sorted(summary.done)) == ([], ["s0", "s1"])
    assert np.array_equal(limited["s1"], everywhere["s1"])
    centres_N2 = everywhere["s0"] + 80
    inside_N = (centres_N2[:, 0] < 750) & (centres_N2[:, 1] > 400)
    assert 0 < len(limited["s0"]) < len(everywhere["s0"])
    kept = {tuple(xy) for xy in limited["s0"].tolist()}
    assert {tuple(xy) for xy in everywhere["s0"][inside_N].tolist()} & kept
    assert all(x < 750 and y + 160 > 400 for x, y in kept)
    again, _ = run(folder, regions=folder / "regions", without_regions="whole")
    assert len(again.already_there) == 2


def test_another_drawing_is_another_slide(folder):
    path = write_geojson(folder / "regions" / "s0.geojson", [("tumour", shapely.box(0, 0, 750, 1100))])
    options = {"regions": folder / "regions", "without_regions": "whole"}
    run(folder, **options)
    write_geojson(path, [("tumour", shapely.box(0, 0, 800, 1100))])
    with pytest.raises(ProblemsError, match="regions_sha256 is"):
        run(folder, **options)
    with pytest.raises(ProblemsError, match="regions_sha256 is"):
        run(folder)
    with pytest.raises(RegionsError, match="slide 's1': no file of regions"):
        run(folder, "other", regions=folder / "regions")
    assert not (folder / "other").exists() or not list((folder / "other").glob("*.h5"))


def test_a_file_that_cannot_be_used_costs_its_slide(folder):
    (folder / "regions" / "s0.geojson").write_text("{")
    write_geojson(folder / "regions" / "s1.geojson", [("tumour", shapely.box(0, 0, 10, 10))])
    summary, _ = run(folder, regions=folder / "regions")
    assert [(failed.slide, failed.stage) for failed in summary.failed] == [("s0", "regions")]
    assert summary.empty == {"s1": "no tissue inside the regions of s1.geojson"}


def test_names_of_qupaths_classes():
    def named(properties: dict) -> str:
        feature = {"type": "Feature", "geometry": shapely.geometry.mapping(LEFT), "properties": properties}
        ((name, _),) = read_shapes(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        return name

    assert named({"classification": {"name": "Tumor", "color": [200, 0, 0]}}) == "Tumor"
    assert named({"classification": {"names": ["Tumor", "Positive"]}}) == "Tumor: Positive"
    assert named({"classification": "Tumor", "name": "x"}) == "Tumor"
    assert named({"name": "x"}) == "x"
    assert named({}) == ""
    assert read_shapes('{"type": "FeatureCollection", "features": []}') == []


def test_classes_that_nobody_drew_are_told(tmp_path, capsys):
    """A misspelt class to leave out would be where tiles lie, so it is said before anything is extracted."""
    drawn = write_geojson(tmp_path / "a.geojson", [("Tumor", LEFT), ("stroma", LEFT)])
    Image.fromarray(np.full((40, 64), 3, np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "c.xml").write_text("<ASAP")
    files = [drawn, tmp_path / "b.png", tmp_path / "c.xml"]
    said = unmatched_classes(files, Tissue(include=["STROMA", "fat"], exclude=["tumour", "3", "ignore*"]))
    assert len(said) == 2
    assert said[0].startswith(
        "tissue.exclude=tumour is the class of no region in 3 files; did you mean 'Tumor'? (there "
    )
    assert said[1].startswith("tissue.include=fat is the class of no region in 3 files (there are")
    assert unmatched_classes(files, Tissue(include=["tum*"], exclude=["Stroma"])) == []
    assert unmatched_classes(files, Tissue()) == []


def test_an_empty_drawing_is_an_empty_slide_where_regions_are_the_tissue(folder, capsys):
    """What `tissue.save` leaves of a slide without tissue comes back as that, and not as the whole slide."""
    for slide in ("s0", "s1"):
        write_geojson(
            folder / "regions" / f"{slide}.geojson", [("tissue", shapely.box(0, 0, 750, 1100))] if slide == "s1" else []
        )
    summary, found = run(folder, method="regions", regions=folder / "regions", exclude=["tisue"])
    assert summary.empty == {"s0": "the regions of s0.geojson are empty"}
    assert len(found["s1"])
    assert (
        "note: tissue.exclude=tisue is the class of no region in 2 files; did you mean 'tissue'?"
        in capsys.readouterr().err
    )
    again, _ = run(folder, method="regions", regions=folder / "regions", exclude=["tisue"], save="geojson")
    assert len(again.already_there) == 2
    assert "tissue.save: 2 slides have features already, and no masks are saved" in capsys.readouterr().err


def test_masks_are_saved_edited_and_handed_back(folder):
    _, found = run(folder, "first", save="geojson")
    saved = folder / "first" / "tissue"
    assert sorted(path.name for path in saved.iterdir()) == ["s0.geojson", "s1.geojson"]
    one = json.loads((saved / "s0.geojson").read_text())["features"][0]
    assert (one["properties"]["classification"]["name"], one["properties"]["isLocked"]) == ("tissue", False)
    _, same = run(folder, "second", method="regions", regions=saved)
    for slide, coords_N2 in found.items():
        both = {tuple(xy) for xy in coords_N2.tolist()} ^ {tuple(xy) for xy in same[slide].tolist()}
        assert len(both) <= 2, "tiles whose share of tissue is on the limit"
