"""Regions as GeoJSON in level-0 px, as QuPath takes and gives them.

QuPath takes a FeatureCollection whose properties hold objectType, classification {name, color} and measurements
{name: number} (drag the file onto the slide, or File > Import objects). Coordinates are level-0 px, x to the right and
y down, as QuPath counts them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import shapely
from shapely.geometry.base import BaseGeometry

from extract.whole import write_whole


def region_feature(
    region: shapely.Polygon,
    name: str,
    colour: Sequence[int],
    measurements: dict[str, float],
    *,
    locked: bool = True,
) -> str:
    """An annotation with its holes, as JSON text. locked: QuPath does not let it be moved by accident."""
    rings = [region.exterior, *region.interiors]
    feature = {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[plain(x), plain(y)] for x, y in ring.coords] for ring in rings],
        },
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(colour)},
            "isLocked": locked,
            "measurements": measurements,
        },
    }
    return json.dumps(feature, separators=(",", ":"), allow_nan=False)


def plain(number: float) -> float | int:
    """Whole numbers without a point, others with two decimals."""
    rounded = round(float(number), 2)
    return int(rounded) if rounded.is_integer() else rounded


def write_collection(path: Path, features: Sequence[str]) -> None:
    """A FeatureCollection of features that are JSON text, one a line; whole or not at all."""
    body = ",\n".join(features)
    write_whole(path, f'{{"type":"FeatureCollection","features":[\n{body}\n]}}\n')


def read_shapes(text: str) -> list[tuple[str, BaseGeometry]]:
    """Name and geometry of every object of a GeoJSON file: a FeatureCollection, a Feature, a list, or bare geometries.

    The name is QuPath's classification (of several names "Tumor: Positive", as QuPath shows it), else `name`, else "".
    Nothing drawn is no object. Raises ValueError for what is no GeoJSON.
    """
    content = json.loads(text)
    objects = content
    if isinstance(content, dict):
        objects = content.get("features", content.get("geometries", [content]))
    if not isinstance(objects, list):
        raise ValueError(f"expected a list of GeoJSON objects, got {str(objects)[:60]!r}")
    return [named_shape(one) for one in objects]


def named_shape(one: object) -> tuple[str, BaseGeometry]:
    """Name and geometry of a GeoJSON object; ValueError for what is none."""
    geometry = one.get("geometry") if isinstance(one, dict) and "geometry" in one else one
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if not isinstance(one, dict) or not isinstance(kind, str) or kind in ("Feature", "FeatureCollection"):
        raise ValueError(f"expected GeoJSON objects with a geometry, got {str(one)[:60]!r}")
    properties = one.get("properties") or {}
    if not isinstance(properties, dict):
        raise ValueError(f"expected properties as an object, got {str(properties)[:60]!r}")
    given = properties.get("classification") or {}
    name = given.get("name") or ": ".join(map(str, given.get("names") or [])) if isinstance(given, dict) else given
    shape: BaseGeometry = shapely.from_geojson(json.dumps(geometry))
    return str(name or properties.get("name") or ""), shape
