"""GeoJSON in level-0 pixels: tiles with their scores for QuPath and other viewers.

QuPath takes a FeatureCollection whose properties hold objectType, classification {name, color} and measurements
{name: number} (drag the file onto the slide, or File > Import objects). Coordinates are level-0 px, x to the right and
y down, as QuPath counts them; a rectangle's area is therefore exact.

Axes: N tiles, 2 = (x, y), 3 = RGB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import shapely

from extract.outlines.geojson import plain


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
