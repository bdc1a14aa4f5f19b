"""GeoJSON in level-0 pixels: tiles with their scores for QuPath and other viewers, and outlines read back.

QuPath takes a FeatureCollection whose properties hold objectType, classification {name, color} and measurements
{name: number} (drag the file onto the slide, or File > Import objects). Coordinates are level-0 px, x to the right and
y down, as QuPath counts them; a rectangle's area is therefore exact.

Axes: N tiles, 2 = (x, y), 3 = RGB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from extract.whole import write_whole


def tile_boxes(coords_N2: np.ndarray, side: float) -> np.ndarray:
    """One rectangle a tile, shapely geometries (N,)."""
    low_N2, high_N2 = np.asarray(coords_N2, dtype=np.float64), np.asarray(coords_N2) + float(side)
    boxes_N: np.ndarray = shapely.box(low_N2[:, 0], low_N2[:, 1], high_N2[:, 0], high_N2[:, 1])
    return boxes_N


def tile_features(
    coords_N2: np.ndarray,
    side: float,
    measurements: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    colours_K3: np.ndarray,
    class_N: np.ndarray,
) -> list[str]:
    """A detection a tile, as JSON text: a slide has tens of thousands, and dictionaries would take a second.

    Args:
        measurements: one number a tile by name, finite.
        class_names, colours_K3: of K classes. class_N: the class of every tile.
    """
    kinds = [
        json.dumps({"name": name, "color": colour})
        for name, colour in zip(class_names, colours_K3.tolist(), strict=True)
    ]
    keys = [json.dumps(name) for name in measurements]
    columns = [[f"{value:.9g}" for value in values_N.tolist()] for values_N in measurements.values()]
    found = []
    for (x, y), kind, *values in zip(coords_N2.tolist(), class_N.tolist(), *columns, strict=True):
        right, bottom = plain(x + side), plain(y + side)
        ring = f"[[{x},{y}],[{right},{y}],[{right},{bottom}],[{x},{bottom}],[{x},{y}]]"
        measured = ",".join(f"{key}:{value}" for key, value in zip(keys, values, strict=True))
        found.append(
            f'{{"type":"Feature","geometry":{{"type":"Polygon","coordinates":[{ring}]}},"properties":{{"objectType":'
            f'"detection","classification":{kinds[kind]},"measurements":{{{measured}}}}}}}'
        )
    return found


def merged_regions(coords_N2: np.ndarray, side: float, gap: float = 1.5) -> list[shapely.Polygon]:
    """The tiles' union as separate polygons, the largest first.

    Args:
        gap: neighbours this far apart (level-0 px) still touch: coordinates are whole px, the grid's step need not be.
    """
    if not len(coords_N2):
        return []
    half = gap / 2
    union = shapely.union_all(tile_boxes(np.asarray(coords_N2) - half, side + gap))
    union = union.buffer(-half, join_style="mitre")
    parts = [part for part in shapely.get_parts(union).tolist() if part.area > 0]
    return sorted(parts, key=lambda part: -part.area)


def region_feature(region: shapely.Polygon, name: str, colour: Sequence[int], measurements: dict[str, float]) -> str:
    """An annotation with its holes, as JSON text."""
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
            "isLocked": True,
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

    The name is QuPath's classification, else `name`, else "". Raises ValueError for what is no GeoJSON.
    """
    content = json.loads(text)
    objects = content
    if isinstance(content, dict):
        objects = content.get("features") or content.get("geometries") or [content]
    if not isinstance(objects, list):
        raise ValueError(f"expected a list of GeoJSON objects, got {str(objects)[:60]!r}")
    return [named_shape(one) for one in objects]


def named_shape(one: object) -> tuple[str, BaseGeometry]:
    """Name and geometry of a GeoJSON object; ValueError for what is none."""
    geometry = one.get("geometry") if isinstance(one, dict) and "geometry" in one else one
    if not isinstance(one, dict) or not isinstance(geometry, dict) or not isinstance(geometry.get("type"), str):
        raise ValueError(f"expected GeoJSON objects with a geometry, got {str(one)[:60]!r}")
    properties = one.get("properties") or {}
    if not isinstance(properties, dict):
        raise ValueError(f"expected properties as an object, got {str(properties)[:60]!r}")
    kind = properties.get("classification") or {}
    name = kind.get("name") if isinstance(kind, dict) else kind
    shape: BaseGeometry = shapely.from_geojson(json.dumps(geometry))
    return str(name or properties.get("name") or ""), shape
