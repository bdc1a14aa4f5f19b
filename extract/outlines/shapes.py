"""Outline files of other programs, which may hold anything: ASAP XML and GeoJSON, one slide a file, level-0 px."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from extract.config import ProblemsError
from extract.outlines.geojson import read_shapes

SUFFIXES = (".xml", ".geojson", ".json")
LARGEST_FILE = 2**29
"""Bytes. Ten thousand outlines of a thousand points are a twentieth of it."""
FARTHEST_PX = 1e8
"""From level-0 (0, 0); the largest slides have 5e5 px a side."""
AREAS = ("Polygon", "Rectangle", "Spline")
"""ASAP's annotation types that enclose an area; Dot, PointSet and Measurement do not."""


class OutlineError(ProblemsError):
    """Outlines cannot be read, or cannot be of this slide."""


def read_outline_file(path: Path) -> tuple[list[tuple[str, BaseGeometry]], list[str]]:
    """Name (ASAP's group, QuPath's classification) and valid polygon of every outline; in words what has no area.

    Raises:
        OutlineError: not readable, neither ASAP XML nor GeoJSON, or an outline of fewer than three points.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"expected at most {LARGEST_FILE:,} bytes, got {path.stat().st_size:,}")
        text = path.read_text(encoding="utf-8-sig")
        shapes, skipped = asap_shapes(text) if path.suffix.lower() == ".xml" else geojson_shapes(text)
        for name, shape in shapes:
            refuse_wild(name, shape)
    except UNREADABLE as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise OutlineError("outlines", [f"{path}: neither ASAP XML nor GeoJSON that can be read: {said}"]) from None
    return shapes, skipped


UNREADABLE = (OSError, ValueError, RecursionError, ElementTree.ParseError, shapely.errors.ShapelyError)
"""What reading foreign outlines may raise; RecursionError is nesting without end."""


def refuse_wild(name: str, shape: BaseGeometry) -> None:
    """Raise ValueError for coordinates that are no numbers or lie beyond any slide."""
    xy = shapely.get_coordinates(shape)
    if not np.isfinite(xy).all() or (np.abs(xy) > FARTHEST_PX).any():
        raise ValueError(f"{name!r:.60}: expected level-0 px within {FARTHEST_PX:,.0f} of 0, got {np.abs(xy).max():g}")


def asap_shapes(text: str) -> tuple[list[tuple[str, BaseGeometry]], list[str]]:
    """Group name and polygon of every annotation with an area; in words what has none.

    Raises:
        ValueError: not ASAP's, with a document type (which can make entities that unpack to gigabytes or name other
            files; ASAP writes none), or coordinates that are no numbers.
        ParseError: no XML.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("has a document type declaration, which ASAP never writes; entities are not expanded")
    root = ElementTree.fromstring(text)
    if root.tag != "ASAP_Annotations":
        raise ValueError(f"expected the root element ASAP_Annotations, got {root.tag}")
    shapes, skipped = [], []
    for one in root.iter("Annotation"):
        name, kind = one.get("Name", "?"), one.get("Type", "")
        if kind not in AREAS:
            skipped.append(f"{name!r:.60}: a {kind!r:.30} has no area".replace("'", ""))
            continue
        points = sorted(one.iter("Coordinate"), key=lambda point: number(point, "Order"))
        xy = [(number(point, "X"), number(point, "Y")) for point in points if point.get("X")]
        if len(xy) < 3:
            raise ValueError(f"{name}: expected at least three points, got {len(xy)}")
        shapes.append((one.get("PartOfGroup", ""), valid(shapely.Polygon(xy))))
    return shapes, skipped


def number(point: ElementTree.Element, key: str) -> float:
    """An attribute of a Coordinate, 0 where it is missing; ValueError for what is no finite number."""
    value = float(point.get(key, 0))
    if not np.isfinite(value):
        raise ValueError(f"a Coordinate's {key} is {value}")
    return value


def geojson_shapes(text: str) -> tuple[list[tuple[str, BaseGeometry]], list[str]]:
    """As `asap_shapes`, for GeoJSON."""
    found = read_shapes(text)
    shapes = [(name, valid(shape)) for name, shape in found if shape.geom_type in ("Polygon", "MultiPolygon")]
    rest = [f"{name or 'no name'}: a {shape.geom_type} has no area" for name, shape in found]
    return shapes, [line for line, (_, shape) in zip(rest, found, strict=True) if "Polygon" not in shape.geom_type]


def valid(shape: BaseGeometry) -> BaseGeometry:
    """An outline that crosses itself, as polygons that do not; lines and points that are left over are dropped."""
    if shape.is_valid:
        return shape
    parts = [part for part in shapely.get_parts(shapely.make_valid(shape)).tolist() if "Polygon" in part.geom_type]
    return shapely.union_all(parts)
