"""Tiles or regions of one slide as GeoJSON for QuPath, with the scores that the page shows."""

from __future__ import annotations

from mil.look.drawing import colours_for
from mil.look.scenes import Scene, regions_geojson, tiles_geojson
from mil.look.tilescores import HeatmapError, Kind, Scale, score_slide_tiles
from mil.viewer.layers import placed
from mil.viewer.shelf import Shelf
from mil.viewer.shown import Exhibit


def scene_of(
    exhibit: Exhibit, slide: str, shelf: Shelf, kind: Kind, scale: Scale, member: int | None, target: str | None
) -> Scene:
    """The slide with its scores, as `mil.heatmap` writes it.

    Raises:
        HeatmapError, CacheError, SlideError: there are no scores, or tiles have no level-0 coordinates.
    """
    places = placed(exhibit, slide, shelf)
    if places.frame != "level-0":
        raise HeatmapError("no coordinates", ["GeoJSON needs level-0 coordinates, so the slide file"])
    assert exhibit.features is not None
    verdict = exhibit.verdicts.on(slide, member)
    scores = score_slide_tiles(exhibit.trained, slide, exhibit.features, verdict, kind, target)
    scores_N = scores.scaled(scale)
    colours = colours_for(scores_N, scores.name, percentile=scale == "percentile", signed=scores.signed)
    return Scene(scores, places, scores_N, scale, colours, None)


def collection(scene: Scene, what: str, threshold: float | None) -> str:
    """All tiles, or the regions of those that score at least `threshold` (on the scene's scale)."""
    least = threshold if threshold is not None else float("-inf")
    features = tiles_geojson(scene) if what == "tiles" else regions_geojson(scene, least)
    return '{"type":"FeatureCollection","features":[\n' + ",\n".join(features) + "\n]}\n"
