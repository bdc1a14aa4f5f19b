"""Regions to leave out: of the class `exclude`, written where `tissue.regions` reads them, beside what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import shapely

from extract.config import ProblemsError
from extract.outlines.geojson import region_feature
from extract.slides.slide import Geometry
from extract.whole import write_whole

NAME, COLOUR = "exclude", (200, 60, 40)
MOST_CORNERS = 10_000


class ExclusionError(ProblemsError):
    """A region cannot be left out; nothing was written."""


def whole_slide(geometry: Geometry) -> shapely.Polygon:
    """All of it."""
    box: shapely.Polygon = shapely.box(0, 0, geometry.width, geometry.height)
    return box


def region_of(corners: Any, geometry: Geometry) -> shapely.Polygon:
    """The polygon of these corners, level-0 px (x, y), cut off at the slide's edges.

    Raises:
        ExclusionError: they are no polygon on this slide.
    """
    plain = isinstance(corners, list) and 3 <= len(corners) <= MOST_CORNERS
    if not plain or not all(isinstance(xy, list) and len(xy) == 2 and all(map(is_number, xy)) for xy in corners):
        raise ExclusionError("no region", [f"expected 3 to {MOST_CORNERS:,} corners [x, y] in level-0 px"])
    inside = shapely.intersection(shapely.make_valid(shapely.Polygon(corners)), whole_slide(geometry))
    parts = [part for part in shapely.get_parts(inside).tolist() if part.geom_type == "Polygon" and part.area >= 1]
    if not parts:
        raise ExclusionError("no region", ["it does not cover a pixel of the slide"])
    largest: shapely.Polygon = max(parts, key=lambda part: part.area)
    return largest


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def leave_out(path: Path, region: shapely.Polygon) -> int:
    """Add a region to SLIDE.geojson, whole or not at all; how many it has then.

    Raises:
        ExclusionError: the slide's regions are a file of another kind, or no GeoJSON.
    """
    feature = json.loads(region_feature(region, NAME, COLOUR, {}, locked=False))
    features = [*features_in(path), feature]
    write_features(path, features)
    return len(features)


def take_back(path: Path) -> int:
    """Take away the last region that was left out here; how many are left. Without any the file goes.

    Raises:
        ExclusionError: as `leave_out`.
    """
    features = features_in(path)
    ours = [i for i, feature in enumerate(features) if name_of(feature) == NAME]
    if not ours:
        raise ExclusionError("nothing to take back", [f"{path}: no region of the class {NAME}"])
    features.pop(ours[-1])
    if features:
        write_features(path, features)
    else:
        path.unlink()
    return len(features)


def name_of(feature: Any) -> str:
    properties = feature.get("properties") if isinstance(feature, dict) else None
    kind = (properties or {}).get("classification")
    return str(kind.get("name", "")) if isinstance(kind, dict) else str(kind or "")


def features_in(path: Path) -> list[Any]:
    """The features of the file as they are; none of a file that is not there."""
    if path.suffix.lower() not in (".geojson", ".json"):
        problem = (
            f"{path}: the regions of this slide are no GeoJSON; add the region there, in a class of tissue.exclude"
        )
        raise ExclusionError("regions of another kind", [problem])
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ExclusionError("regions cannot be read", [f"{path}: {error}"]) from None
    found = content.get("features") if isinstance(content, dict) else content
    if not isinstance(found, list):
        raise ExclusionError("regions cannot be read", [f"{path}: expected a FeatureCollection"])
    return found


def write_features(path: Path, features: list[Any]) -> None:
    lines = ",\n".join(json.dumps(feature, separators=(",", ":")) for feature in features)
    write_whole(path, f'{{"type":"FeatureCollection","features":[\n{lines}\n]}}\n')
