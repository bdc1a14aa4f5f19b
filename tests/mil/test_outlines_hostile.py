"""Outlines from anywhere: damaged, hostile, absurd; a message that names the file, or what is drawn in them."""

import json

import numpy as np
import pytest
import shapely

from extract.outlines.shapes import FARTHEST_PX, OutlineError
from mil.look.outlines import read_outlines

SQUARE = [[10, 20], [410, 20], [410, 330], [10, 330]]
ASAP = (
    '<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>'
    '<Annotation Name="A" Type="Polygon" PartOfGroup="Tumor" Color="#F4FA58"><Coordinates>'
    + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(SQUARE))
    + '</Coordinates></Annotation><Annotation Name="dot" Type="Dot" PartOfGroup="None"><Coordinates>'
    '<Coordinate Order="0" X="5" Y="6" /></Coordinates></Annotation></Annotations></ASAP_Annotations>'
)
GEOJSON = json.dumps(
    {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[*SQUARE, SQUARE[0]]]},
                "properties": {"classification": {"name": "Tumor", "color": [1, 2, 3]}},
            }
        ],
    }
)
KINDS = {"xml": ASAP, "geojson": GEOJSON}


def read(tmp_path, suffix: str, content: str | bytes):
    path = tmp_path / f"s.{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_outlines(path)


def refused(tmp_path, suffix: str, content: str | bytes) -> str:
    with pytest.raises(OutlineError) as error:
        read(tmp_path, suffix, content)
    assert str(tmp_path / f"s.{suffix}") in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", KINDS)
def test_what_is_whole_is_read(tmp_path, suffix):
    assert read(tmp_path, suffix, KINDS[suffix]).area.area == 400 * 310


@pytest.mark.parametrize("suffix", KINDS)
def test_whatever_happens_to_a_file_it_is_read_or_refused_by_name(tmp_path, suffix, mutations):
    said: list[str] = []
    for number, damaged in enumerate(mutations.mutations(KINDS[suffix].encode(), mutations.budget(600), seed=9)):
        try:
            found = read(tmp_path, suffix, damaged)
            assert np.isfinite(found.area.area)
        except OutlineError as error:
            said.append(str(error))
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed 9: {damaged[:400]!r}") from error
    assert all(f"s.{suffix}" in text and len(text) < 1_000 for text in said)
    assert len(said) > mutations.budget(600) * 0.3


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))


@pytest.mark.parametrize(
    "document",
    [
        f'<!DOCTYPE x [<!ENTITY l0 "lol">{LAUGHS}]><ASAP_Annotations>&l11;</ASAP_Annotations>',
        '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]><ASAP_Annotations>&e;</ASAP_Annotations>',
        f'<!DOCTYPE x [<!ENTITY a "{"a" * 50_000}">]><ASAP_Annotations>{"&a;" * 50_000}</ASAP_Annotations>',
    ],
    ids=["billion laughs", "another file", "quadratic"],
)
def test_entities_are_refused(tmp_path, document):
    assert "document type declaration" in refused(tmp_path, "xml", document)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "1e999", "x", ""])
def test_coordinates_of_no_slide_are_refused(tmp_path, value):
    changed = ASAP.replace('X="410" Y="330"', f'X="410" Y="{value}"')
    assert changed != ASAP
    assert refused(tmp_path, "xml", changed)
    number = value if value in ("1e300", "1e999") else "NaN"
    assert refused(tmp_path, "geojson", GEOJSON.replace("330", number))
    assert f"{FARTHEST_PX:,.0f}" in refused(tmp_path, "geojson", GEOJSON.replace("330", "1e300"))


def test_nesting_without_end_is_refused(tmp_path):
    deep = "[" * 100_000
    refused(tmp_path, "geojson", deep)
    refused(tmp_path, "geojson", GEOJSON.replace("[[10, 20]", "[" * 900 + "[10, 20]" + "]" * 900, 1))
    nested = {"type": "Point", "coordinates": [1, 2]}
    for _ in range(400):
        nested = {"type": "GeometryCollection", "geometries": [nested]}
    found = read(tmp_path, "geojson", json.dumps({"type": "Feature", "geometry": nested, "properties": None}))
    assert found.lesions == ()


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "3", "null", '"x"', '{"features": 7}', '{"features": [7]}', "", "\x00", "{}"),
        *('{"features": [{"geometry": {"type": []}}]}', '{"type": "Polygon", "coordinates": 3}'),
        '{"features": [{"geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": [1]}]}',
    ],
)
def test_other_json_is_refused_or_holds_nothing(tmp_path, content):
    if content == "[]":
        assert read(tmp_path, "geojson", content).lesions == ()
    else:
        refused(tmp_path, "geojson", content)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "s.xml"
    with open(path, "wb") as file:
        file.truncate(2**31)  # a hole: no disk is used
    with pytest.raises(OutlineError, match="expected at most"):
        read_outlines(path)


def test_a_bow_tie_becomes_its_two_halves(tmp_path):
    tie = ASAP.replace('X="410" Y="20"', 'X="410" Y="330" ').replace('X="410" Y="330" /', 'X="410" Y="20" /', 1)
    assert tie != ASAP
    assert shapely.is_valid(read(tmp_path, "xml", tie).area)
