"""What the page asks for, made once and kept: everything about one slide by its number, for many threads."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import cached_property
from typing import Any, cast

from extract.config import ProblemsError
from extract.features.cache import CacheError
from extract.outlines.shapes import SUFFIXES
from extract.slides.errors import SlideError
from mil.look.scenes import cut_out
from mil.look.tilescores import HeatmapError, Kind, Places, Scale, places_of
from mil.viewer import areas, exclusions, pyramid
from mil.viewer.catalogue import catalogue
from mil.viewer.exports import collection, scene_of
from mil.viewer.layers import about, layer, packed, placed
from mil.viewer.shelf import Kept, Shelf
from mil.viewer.shown import Exhibit, Shown, number_or_none
from mil.viewer.small_map import small_map

THUMB_PX = 120
KEPT_PLACES = 16
MB = 2**20


class AbsentError(Exception):
    """There is no such slide, study or tile."""


class Pages:
    """Slides and studies by their number.

    memory_mb: for everything that is kept: tiles a half, scores the other.
    """

    def __init__(self, shown: Shown, memory_mb: int = 512):
        self.shown = shown
        self.shelf = Shelf(shown.files, shown.default_mpp)
        self.tiles = Kept(memory_mb * MB // 2)
        self.layers = Kept(memory_mb * MB // 2)
        self._scoring = threading.Lock()
        self._places: dict[tuple[int, str], Places] = {}

    # --- what is meant -----------------------------------------------------------------------------------------------

    def slide(self, number: int) -> str:
        """The slide with this number; AbsentError where there is none."""
        if not 0 <= number < len(self.shown.slides):
            raise AbsentError(f"slide {number}: there are {len(self.shown.slides)}")
        return self.shown.slides[number]

    def exhibit(self, study: int, slide: str) -> Exhibit:
        """The study with this number, which must have the slide."""
        if not 0 <= study < len(self.shown.exhibits):
            raise AbsentError(f"study {study}: there are {len(self.shown.exhibits)}")
        exhibit = self.shown.exhibits[study]
        if slide not in exhibit.trained.bag_of:
            raise AbsentError(f"slide {slide!r} is not one of {exhibit.name}")
        return exhibit

    def target(self, exhibit: Exhibit, number: int | None) -> str | None:
        """What evidence shall speak for, by its number; None for the default."""
        if number is None:
            return None
        if not 0 <= number < len(exhibit.targets):
            raise AbsentError(f"target {number}: there are {len(exhibit.targets)}")
        return exhibit.targets[number]

    # --- the list ----------------------------------------------------------------------------------------------------

    @cached_property
    def catalogue(self) -> bytes:
        """The list of slides, JSON."""
        return catalogue(self.shown)

    def thumb(self, number: int) -> bytes:
        """A small picture of a slide, or of where its tiles are."""
        slide = self.slide(number)

        def make() -> bytes:
            if slide in self.shown.files:
                with self.shelf.slide(slide) as opened:
                    return pyramid.jpeg(pyramid.overview(opened), THUMB_PX)
            return pyramid.jpeg(small_map(self.places(0, slide), THUMB_PX))

        return self.tiles.get(("thumb", number), make)

    # --- the slide ---------------------------------------------------------------------------------------------------

    def described(self, number: int) -> dict[str, Any]:
        """Sizes and levels; of a slide without a file the frame of its tiles, without levels."""
        slide = self.slide(number)
        if slide in self.shown.files:
            with self.shelf.slide(slide) as opened:
                return pyramid.described(opened) | {"frame": "level-0"}
        places = self.places(0, slide)
        low, high = places.coords_N2.min(axis=0), places.coords_N2.max(axis=0) + places.tile_side
        width, height = (float(end + max(0, start)) for start, end in zip(low, high, strict=True))
        return {"width": width, "height": height, "mpp": places.mpp, "levels": [], "frame": places.frame}

    def tile(self, number: int, level: int, column: int, row: int) -> bytes:
        """A square of the pyramid as JPEG."""
        slide = self.slide(number)
        path = self.shelf.path(slide)

        def make() -> bytes:
            with self.shelf.slide(slide) as opened:
                image_HW3 = pyramid.tile(opened, level, column, row)
            return pyramid.jpeg(image_HW3)

        if not path.exists():  # also what is kept is not shown of a slide that is gone
            return make()
        return self.tiles.get((number, level, column, row), make)

    def outlines(self, number: int) -> list[dict[str, Any]]:
        """What a pathologist drew on it; nothing where there is no file."""
        slide = self.slide(number)
        return areas.outlines(self.shown.outlines[slide]) if slide in self.shown.outlines else []

    def tissue(self, number: int) -> dict[str, Any]:
        """Rings of the tissue, its share, and why there is none; and the regions of its file in tissue.regions."""
        slide = self.slide(number)
        path = areas.regions_file(self.shown, slide)
        with self.shelf.slide(slide) as opened:
            found, mpp = areas.tissue_of(self.shown, slide, opened), opened.mpp
        drawn = areas.outlines(path) if path is not None and path.suffix.lower() in SUFFIXES else []
        about_it = {"fraction": found.fraction, "area_mm2": found.area_mm2, "empty": found.empty_reason}
        return about_it | {"rings": areas.tissue_rings(found, mpp), "regions": drawn}

    def grid(self, number: int) -> bytes:
        """The tiles without scores: of the features, or where they would be laid."""
        slide = self.slide(number)
        features = self.shown.features
        if features is not None and slide in features.slides:
            places, origin = self.places(-1, slide), "features"
        else:
            with self.shelf.slide(slide) as opened:
                places = areas.planned(self.shown, opened, areas.tissue_of(self.shown, slide, opened))
            origin = "planned"
        return packed(about(places) | {"origin": origin}, places.coords_N2)

    # --- what a study says of it -------------------------------------------------------------------------------------

    def details(self, study: int, number: int) -> dict[str, Any]:
        """The slide as the study sees it: verdict and every member."""
        slide = self.slide(number)
        exhibit = self.exhibit(study, slide)
        verdict = exhibit.verdicts.on(slide)
        row = exhibit.verdicts.slides.loc[slide]
        said_C = verdict.p_C if exhibit.trained.of_classes else [row["number"]]
        p_C = [] if said_C is None else [number_or_none(p) for p in said_C]
        return {
            "kind": verdict.kind,
            "members": exhibit.members_of(slide),
            "honest": list(verdict.members),
            "p": p_C,
            "label": verdict.label,
            "predicted": verdict.predicted,
            "said": verdict.said,
            "threshold": number_or_none(row["threshold"]) if exhibit.trained.of_classes else None,
            "has_features": exhibit.features is not None and slide in exhibit.features.slides,
        }

    def places(self, study: int, slide: str) -> Places:
        """Where its tiles are; study -1: of the features of slides without a run."""
        key = (study, slide)
        if key not in self._places:
            if study >= 0 and self.shown.exhibits:
                found = placed(self._with_features(slide, study), slide, self.shelf)
            else:
                found = self._places_alone(slide)
            while len(self._places) >= KEPT_PLACES:
                self._places.pop(next(iter(self._places)), None)
            self._places[key] = found
        return self._places[key]

    def _with_features(self, slide: str, study: int) -> Exhibit:
        """The study, or where that does not have the slide any that does."""
        exhibits = [self.shown.exhibits[study], *self.shown.exhibits]
        return next((one for one in exhibits if one.features is not None and slide in one.features.slides), exhibits[0])

    def _places_alone(self, slide: str) -> Places:
        features = self.shown.features
        if features is None or slide not in features.slides:
            raise HeatmapError("no tiles", [f"slide {slide!r}: no file and no features"])
        header = features.header(slide)
        if slide not in self.shown.files:
            return places_of(features, slide, header)
        with self.shelf.slide(slide) as opened:
            size = opened.width, opened.height
            return places_of(features, slide, header, slide_mpp=opened.mpp, width_height=size)

    def scores(self, study: int, number: int, kind: str, target: int | None, only_honest: bool = False) -> bytes:
        """The slide's layer, see `mil.viewer.layers`; only_honest: without the members that did not hold it out."""
        slide = self.slide(number)
        exhibit = self.exhibit(study, slide)
        name = self.target(exhibit, target)

        def make() -> bytes:
            with self._scoring:  # one slide after the other: each takes all processors
                return layer(exhibit, slide, kind_of(kind), name, self.shelf, only_honest)

        return self.layers.get((study, number, kind, target, only_honest), make)

    def warm_up(self) -> None:
        """Make what the first visitor sees, so that it is there: the slide that stands first, with its scores; and with
        it what every later slide needs of libraries. What goes wrong is said to who asks for it.
        """
        exhibit = next(iter(self.shown.exhibits), None)
        features = None if exhibit is None else exhibit.features
        if exhibit is None or features is None:
            return
        first = next((slide for slide in map(str, exhibit.verdicts.slides.index) if slide in features.slides), None)
        if first is None:
            return
        number = self.shown.slides.index(first)
        with suppress(ProblemsError, *KNOWN, OSError):
            self.described(number)
            self.scores(0, number, "attention", None, only_honest=True)

    def picture(self, study: int, number: int, tile: int) -> bytes:
        """A tile, by its place in the features, as JPEG."""
        slide = self.slide(number)
        places = self.places(study, slide)
        if not 0 <= tile < len(places.coords_N2):
            raise AbsentError(f"tile {tile}: there are {len(places.coords_N2)}")

        def make() -> bytes:
            with self.shelf.slide(slide) as opened:
                return pyramid.jpeg(cut_out(opened, places, tile))

        return self.tiles.get(("cut", study, number, tile), make)

    def geojson(
        self,
        study: int,
        number: int,
        what: str,
        kind: str,
        scale: str,
        member: int | None,
        target: int | None,
        threshold: float | None,
    ) -> str:
        """Tiles or regions for QuPath."""
        if scale not in ("percentile", "raw") or what not in ("tiles", "regions"):
            raise AbsentError("expected tiles or regions, on the scale percentile or raw")
        slide = self.slide(number)
        exhibit = self.exhibit(study, slide)
        with self._scoring:
            name = self.target(exhibit, target)
            scene = scene_of(exhibit, slide, self.shelf, kind_of(kind), cast(Scale, scale), member, name)
        return collection(scene, what, threshold)

    # --- what is written ---------------------------------------------------------------------------------------------

    def exclude(self, number: int, wish: dict[str, Any]) -> dict[str, Any]:
        """Leave out a slide ({"whole": true}), a region ({"corners": [[x, y], ...]}), or take back ({"undo": true})."""
        slide = self.slide(number)
        if self.shown.regions is None:
            raise exclusions.ExclusionError("not offered", ["set tissue.regions=FOLDER to write regions there"])
        path = areas.regions_file(self.shown, slide) or self.shown.regions / f"{slide}.geojson"
        if wish.get("undo") is True:
            return {"file": str(path), "regions": exclusions.take_back(path)}
        with self.shelf.slide(slide) as opened:
            geometry = opened.geometry
        whole = wish.get("whole") is True
        region = exclusions.whole_slide(geometry) if whole else exclusions.region_of(wish.get("corners"), geometry)
        return {"file": str(path), "regions": exclusions.leave_out(path, region)}


def kind_of(name: str) -> Kind:
    if name not in ("attention", "evidence"):
        raise AbsentError(f"score {name!r:.40}: expected attention or evidence")
    return cast(Kind, name)


KNOWN = (SlideError, CacheError)
"""What slides and features raise besides ProblemsError; their text says what is wrong."""
