"""Tile scores for the browser: places and scores of all members as one 16-bit image, which it colours by itself.

Bytes of a layer: the length of the header (uint32), the header (JSON, filled up with blanks to a multiple of four),
coordinates (int32, N rows of x and y), scores (float16, a row a member, N columns). All little-endian. Half floats keep
every score to 0.05 %, however unlike the scores of a slide are; `unit` is what they were divided by.

Axes: M members, N tiles, 2 = (x, y).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mil.look.scenes import refuse_another_slide, refuse_tiles_off
from mil.look.tilescores import (
    HeatmapError,
    Kind,
    Places,
    TileScores,
    Verdict,
    check_same_kind,
    places_of,
    score_slide_tiles,
)
from mil.viewer.shelf import Shelf
from mil.viewer.shown import Exhibit

LARGEST_LAYER = 64 * 2**20
"""Bytes; with more members than fit, only those that held the slide out are sent."""
HALF_MAX = 60_000.0


def placed(exhibit: Exhibit, slide: str, shelf: Shelf) -> Places:
    """Where the tiles of a slide are; with the slide file, if it is there.

    Raises:
        HeatmapError, CacheError, SlideError: no features, no coordinates, or another file.
    """
    features = exhibit.features
    if features is None:
        raise HeatmapError("no tiles", [exhibit.why_no_features or "there are no features"])
    header = features.header(slide)
    if slide not in shelf.files or not shelf.path(slide).exists():
        return places_of(features, slide, header)
    with shelf.slide(slide) as opened:
        refuse_another_slide(opened, slide, header.provenance.slide_fingerprint)
        size = opened.width, opened.height
        places = places_of(features, slide, header, slide_mpp=opened.mpp, width_height=size)
        refuse_tiles_off(opened, places, str(header.path))
    return places


def scored(
    exhibit: Exhibit, slide: str, kind: Kind, target: str | None, only_honest: bool = False
) -> tuple[TileScores, Verdict]:
    """Scores of every member that fits, and what is said of the slide by those that held it out; of these alone where
    that is asked for: in cross-validation it is one of many, and its scores are there so much sooner.

    Raises:
        HeatmapError, CacheError: as `mil.look.tilescores.score_slide_tiles`.
    """
    trained, features = exhibit.trained, exhibit.features
    if features is None:
        raise HeatmapError("no scores", [exhibit.why_no_features or "there are no features"])
    header = features.header(slide)
    check_same_kind(trained, header)
    verdict = exhibit.verdicts.on(slide)
    everyone = not only_honest and has_more(exhibit, verdict, header.n_tiles)
    shown = range(trained.n_members) if everyone else verdict.members
    scores = score_slide_tiles(trained, slide, features, verdict, kind, target, shown)
    return replace(scores, verdict=replace(scores.verdict, members=tuple(shown))), verdict


def packed(header: Mapping[str, Any], coords_N2: np.ndarray, scores_MN: np.ndarray | None = None) -> bytes:
    """A layer's bytes; without scores the places alone."""
    text = json.dumps(header, allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    parts = [np.uint32(len(text)).astype("<u4").tobytes(), text, coords_N2.astype("<i4").tobytes()]
    return b"".join([*parts, b"" if scores_MN is None else scores_MN.astype("<f2").tobytes()])


def layer(
    exhibit: Exhibit, slide: str, kind: Kind, target: str | None, shelf: Shelf, only_honest: bool = False
) -> bytes:
    """Places and scores of one slide, see above."""
    places = placed(exhibit, slide, shelf)
    scores, verdict = scored(exhibit, slide, kind, target, only_honest)
    unit = max(1.0, float(np.abs(scores.scores_MN).max()) / HALF_MAX)
    header = about(places) | {
        "members": list(scores.verdict.members),
        "honest": list(verdict.members),
        "more": only_honest and has_more(exhibit, verdict, len(places.coords_N2)),
        "name": scores.name,
        "signed": scores.signed,
        "target": scores.target,
        "unit": unit,
    }
    return packed(header, places.coords_N2, scores.scores_MN / unit)


def has_more(exhibit: Exhibit, verdict: Verdict, n_tiles: int) -> bool:
    """Whether other members' scores can be asked for besides those that held the slide out."""
    n_members = exhibit.trained.n_members
    return len(verdict.members) < n_members and n_tiles * n_members * 2 <= LARGEST_LAYER


def about(places: Places) -> dict[str, Any]:
    """Number, side, microns per px and frame of the tiles; `mpp` null where nobody knows."""
    return {"n": len(places.coords_N2), "side": places.tile_side, "mpp": places.mpp, "frame": places.frame}
