"""A slide of a finished run as pictures and files: heatmap, GeoJSON, table of tiles, gallery; and the report's part.

Axes: N tiles, M members, K tiles of a gallery, H height, W width, 2 = (x, y), 3 = RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.cohort import read_cohort
from extract.config import ProblemsError, Slides, did_you_mean, main_table, table_files
from extract.features.cache import CacheError
from extract.features.folder import FeatureFolder, refuse_replaced
from extract.outlines.geojson import region_feature, write_collection
from extract.places import with_places
from extract.slides.errors import SlideError
from extract.slides.files import find_slides
from extract.slides.scratch import local_copy
from extract.slides.slide import Slide, open_slide
from extract.stores.looking import is_dir, is_file
from extract.stores.sessions import bring
from extract.tables import write_csv
from extract.whole import write_whole
from mil.look.drawing import (
    Colours,
    Drawn,
    Label,
    Shelf,
    View,
    colours_for,
    compose,
    faded,
    frame_tiles,
    gallery,
    jpeg_uri,
    paint,
    raster,
    view_of_tiles,
)
from mil.look.geojson import merged_regions, tile_features
from mil.look.tilescores import (
    HeatmapError,
    Kind,
    Places,
    Scale,
    TileScores,
    Verdicts,
    check_same_features,
    check_same_kind,
    features_of,
    places_of,
    score_slide_tiles,
)
from mil.results.tables import OUT_OF_FOLD, TEST_ENSEMBLE
from mil.results.trained import TrainedStudy

LONGEST_PX = 1600
"""Longer side of a map whose mpp is not given."""
FINEST_PX = 12_000
REPORT_PX, REPORT_TILE_PX, REPORT_TILES = 380, 84, 5
BINS = 10
BLACK, WHITE = (20, 20, 20), (255, 255, 255)
MAX_TILE_PX = 512


@dataclass(frozen=True)
class Scene:
    """A slide with its scores and places; `slide` where the slide file is at hand.

    scores_N: on `scale`. colours: of these scores.
    """

    scores: TileScores
    places: Places
    scores_N: np.ndarray
    scale: Scale
    colours: Colours
    slide: Slide | None

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.slide is not None:
            self.slide.close()

    @property
    def order_N(self) -> np.ndarray:
        """Tiles from the most to the least important; ties in the order of the tiles."""
        return np.argsort(-self.scores_N, kind="stable")


# --- slide files -----------------------------------------------------------------------------------------------------


def slide_files(trained: TrainedStudy, slides: Slides | None = None) -> dict[str, tuple[Path, float | None]]:
    """Where the slide files are that can be found: slide id -> path and the cohort's mpp.

    Of the folder given here, then of the study's cohort CSV and slides.folder as far as they are still there.

    Raises:
        ProblemsError: the folder given here is not there or holds no slides.
    """
    config = trained.config
    found: dict[str, tuple[Path, float | None]] = {}
    given = slides.folder if slides is not None else None
    own = config.slides.folder if config.slides.folder and is_dir(config.slides.folder) else None
    folder = given or own
    if folder is not None:
        found = {slide: (path, None) for slide, path in find_slides(folder, leave_out=config.features.folder).items()}
    if config.cohort is None or not all(bring(path).is_file() for path in table_files(config.cohort)):
        return found
    cohort = read_cohort(config.cohort, config.columns, labelled=False)
    table = cohort.named_as(trained.bag_of).table
    for slide, path, mpp in table[["slide", "path", "mpp"]].itertuples(index=False, name=None):
        bases = [base for base in (folder, main_table(config.cohort).parent, Path()) if base is not None]
        there = [base / with_places(path) for base in bases if path and is_file(base / with_places(path))]
        of_folder = found.get(slide, (None, None))[0]
        place = there[0] if there and not (given and of_folder) else of_folder
        if place is not None:
            found[slide] = (place, None if np.isnan(mpp) else float(mpp))
    return found


# --- a scene ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theatre:
    """A finished run with everything that its slides' scenes are made from."""

    verdicts: Verdicts
    features: FeatureFolder
    files: dict[str, tuple[Path, float | None]]
    default_mpp: float | None = None
    elsewhere: bool = False

    @property
    def trained(self) -> TrainedStudy:
        return self.verdicts.trained

    def scene(
        self,
        slide: str,
        *,
        kind: Kind = "attention",
        scale: Scale = "percentile",
        member: int | None = None,
        target: str | None = None,
    ) -> Scene:
        """Raises HeatmapError, CacheError or SlideError: unknown slide, no features or coordinates, another file."""
        verdict = self.verdicts.on(slide, member, elsewhere=self.elsewhere)
        header = self.features.header(slide)
        check_same_kind(self.trained, header)
        opened = self.open(slide, header.provenance.slide_fingerprint)
        size = None if opened is None else (opened.width, opened.height)
        places = places_of(self.features, slide, header, slide_mpp=opened.mpp if opened else None, width_height=size)
        if opened is not None:
            refuse_tiles_off(opened, places, str(header.path))
        scores = score_slide_tiles(self.trained, slide, self.features, verdict, kind, target)
        refuse_replaced(self.features, slide, header.identity)  # places and features are of one file
        check_same_features(self.trained, slide, header)  # coordinates: what other features give was seen
        scores_N = scores.scaled(scale)
        label = f"{scores.short}, percentile within the slide" if scale == "percentile" else scores.name
        colours = colours_for(scores_N, label, percentile=scale == "percentile", signed=scores.signed)
        return Scene(scores, places, scores_N, scale, colours, opened)

    def open(self, slide: str, fingerprint: str = "") -> Slide | None:
        """The slide file, None where it is not known where it is."""
        if slide not in self.files:
            return None
        path, mpp = self.files[slide]
        opened = open_slide(
            local_copy(path, self.trained.config.slides),
            mpp,
            default_mpp=self.default_mpp or self.trained.config.slides.mpp,
        )
        try:
            refuse_another_slide(opened, slide, fingerprint)
        except HeatmapError:
            opened.close()
            raise
        return opened


def refuse_another_slide(opened: Slide, slide: str, fingerprint: str) -> None:
    """Raise HeatmapError unless the file is that of which the features say it is; "" says nothing."""
    if fingerprint and opened.fingerprint != fingerprint:
        problem = f"{opened.path}: not the file that the features of slide {slide!r} were made from (other content)"
        raise HeatmapError("another slide", [problem])


def refuse_wrong_wishes(
    theatre: Theatre, slide_ids: Sequence[str], *, member: int | None, target: str | None, files_given: bool
) -> None:
    """Raise HeatmapError with everything that is wrong about the slides, the member and the class.

    Args:
        files_given: the user named a folder of slides, so each slide must be in it.
    """
    problems = []
    trained = theatre.trained
    classes = trained.classes if trained.of_classes else trained.task.thresholds()
    if target is not None and not classes:
        name = trained.task.name
        problems.append(f"target={target}: evidence of task={name} is for {trained.task.speaks_for()}; leave it out")
    elif target is not None and target not in classes:
        problems.append(f"target={target}: expected one of {', '.join(classes)}{did_you_mean(target, list(classes))}")
    for slide in slide_ids:
        try:
            theatre.verdicts.on(slide, member, elsewhere=theatre.elsewhere)
        except HeatmapError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        try:
            theatre.features.header(slide)
        except CacheError as error:
            problems.append(str(error))
        if files_given and slide not in theatre.files:
            problems.append(f"slides.folder: no file of slide {slide!r}{did_you_mean(slide, list(theatre.files))}")
    if problems:
        raise HeatmapError("cannot draw", problems)


def refuse_tiles_off(slide: Slide, places: Places, where: str) -> None:
    """Tiles may reach past the slide's edge but do not begin behind it."""
    if (places.coords_N2 >= (slide.width, slide.height)).any() or (places.coords_N2 < 0).any():
        low, high = places.coords_N2.min(axis=0).tolist(), places.coords_N2.max(axis=0).tolist()
        problem = (
            f"{where}: tiles lie between {low} and {high}, but {slide.path} has {slide.width} x {slide.height} px; "
            "is it another slide, or one saved at another magnification?"
        )
        raise HeatmapError("tiles off the slide", [problem])


def picture(
    scene: Scene, *, mpp: float | None = None, longest: int = LONGEST_PX, n_top: int = 5, inset: bool = False
) -> Drawn:
    """The heatmap: thumbnail and map side by side, or a map of the tiles alone where there is no slide file.

    Args:
        mpp: microns per px of the map; default: about `longest` px on the longer side (`convenient_mpp`).
        n_top: how many of the most important tiles get a frame and their rank.
        inset: for a page that has its own heading: no heading, no thumbnail beside the map.

    Raises:
        HeatmapError: `mpp` is so fine that the picture would be too large.
    """
    places, thumbnail = scene.places, None
    if scene.slide is None:
        view = view_of_tiles(places.coords_N2, places.tile_side, places.mpp, mpp=mpp, longest=longest)
    else:
        longer = max(scene.slide.width, scene.slide.height)
        wanted = mpp or convenient_mpp(scene.slide, longest)
        refuse_too_fine(longer * scene.slide.mpp, wanted)
        small = scene.slide.thumbnail(wanted)
        thumbnail = small.image_HW3
        height, width = thumbnail.shape[:2]
        view = View((0.0, 0.0), small.mpp / scene.slide.mpp, width, height, small.mpp)
    if view.mpp and scene.slide is None:
        refuse_too_fine(max(view.width, view.height) * view.mpp, view.mpp)
    under = None if thumbnail is None else faded(thumbnail)
    map_HW3 = paint(raster(view, places.coords_N2, places.tile_side, scene.scores_N), scene.colours, under)
    boxes_N4 = view.boxes(places.coords_N2, places.tile_side)
    labels = frames_and_ranks(map_HW3, boxes_N4, scene, n_top)
    beside = None if inset else thumbnail
    if inset:
        return compose(map_HW3, view, scene.colours, labels=labels, outside=False)
    return compose(
        map_HW3,
        view,
        scene.colours,
        title=scene.scores.slide,
        lines=lines_about(scene),
        beside_HW3=beside,
        labels=labels,
    )


def convenient_mpp(slide: Slide, longest: int) -> float:
    """Microns per pixel of the pyramid level whose longer side is nearest to `longest`, if that is within a factor of
    1.6: nothing then needs to be read finer than it is shown. Else what makes the longer side `longest` px."""
    longer_px = [max(size) for size in slide.level_sizes]
    ratios = [max(px / longest, longest / px) for px in longer_px]
    level = int(np.argmin(ratios))
    if ratios[level] <= 1.6:
        return slide.geometry.level_mpps[level]
    return max(slide.mpp, max(slide.width, slide.height) * slide.mpp / longest)


def refuse_too_fine(longer_um: float, mpp: float) -> None:
    if longer_um / mpp > FINEST_PX:
        problem = (
            f"mpp={mpp:g}: the picture would be {longer_um / mpp:,.0f} px on its longer side; expected at least "
            f"{longer_um / FINEST_PX:.3g}"
        )
        raise HeatmapError("picture too large", [problem])


def frames_and_ranks(map_HW3: np.ndarray, boxes_N4: np.ndarray, scene: Scene, n_top: int) -> list[Label]:
    """Frames around the tiles that matter, and the rank of the first of them."""
    thickness = 2 if max(map_HW3.shape[:2]) >= 600 else 1
    top = scene.order_N[:n_top]
    framed = top if scene.scores.top_MN is None else np.flatnonzero(scene.scores.top_MN.mean(axis=0) >= 0.5)
    if scene.scores.bottom_MN is not None:
        lowest = np.flatnonzero(scene.scores.bottom_MN.mean(axis=0) >= 0.5)
        frame_tiles(map_HW3, boxes_N4[lowest], WHITE, thickness)
    frame_tiles(map_HW3, boxes_N4[framed], BLACK, thickness)
    width = map_HW3.shape[1]
    labels: list[Label] = []
    taken: list[tuple[float, float]] = []
    for rank, tile in enumerate(top.tolist(), 1):
        left, above, right, below = boxes_N4[tile].tolist()
        x = right + 5 if right + 22 < width else left - 15
        y = (above + below) / 2
        while any(abs(x - other_x) < 14 and abs(y - other_y) < 13 for other_x, other_y in taken):
            y += 7
        taken.append((x, y))
        labels.append(Label(str(rank), x, y))
    return labels


def lines_about(scene: Scene) -> list[str]:
    """What stands under the title: the slide's probability, whose scores these are, what is framed."""
    n_members = len(scene.scores.verdict.members)
    scale = "percentile within the slide" if scene.scale == "percentile" else "raw"
    parts = "percentiles" if scene.scale == "percentile" else "scores"
    mean = f", mean of {n_members} members' {parts}" if n_members > 1 else ""
    about = f"Shown: {scene.scores.name}; scale: {scale}{mean}. {len(scene.scores_N):,} tiles."
    no_slide = ["No slide file: a map of the tiles where their coordinates put them."] if scene.slide is None else []
    return [verdict_line(scene), about, frames_line(scene), *no_slide]


def verdict_line(scene: Scene) -> str:
    """`P(tumor) = 0.8731, predicted tumor, label tumor; test ensemble of 5 members`."""
    verdict, n_members = scene.scores.verdict, len(scene.scores.verdict.members)
    several = verdict.kind in (OUT_OF_FOLD, TEST_ENSEMBLE) and n_members > 1
    return f"{probability_text(scene)}; {verdict.kind}" + (f" of {n_members} members" if several else "")


def frames_line(scene: Scene) -> str:
    """What the frames and numbers on the map mean."""
    scores = scene.scores
    if scores.top_MN is None or scores.bottom_MN is None:
        return "Frames and numbers: the highest scores, in order."
    n_top, n_bottom = int(scores.top_MN[0].sum()), int(scores.bottom_MN[0].sum())
    whose = "at least half of the members keep" if len(scores.top_MN) > 1 else "the member keeps"
    kept = f"{n_top} highest (black) and {n_bottom} lowest (white)"
    sign = "" if scores.signed else f" A high score need not speak for {scores.target}; score=evidence tells."
    return f"Frames: tiles that {whose} among their {kept}. Numbers: rank.{sign}"


def probability_text(scene: Scene) -> str:
    """`P(tumor) = 0.873, label tumor`: the number that predictions.csv gives, with its decimals; or a task's words."""
    verdict, target = scene.scores.verdict, scene.scores.target
    if verdict.p_C is None:
        return f"{verdict.said}; {verdict.label or 'target unknown'}"
    text = f"P({target}) = {verdict.p_C[scene.scores.classes.index(target)]:.4f}"
    text += f", predicted {verdict.predicted}" if verdict.predicted else ""
    return text + (f", label {verdict.label}" if verdict.label else ", no label")


# --- files -----------------------------------------------------------------------------------------------------------


def tiles_table(scene: Scene) -> pd.DataFrame:
    """One row a tile, in the order of the features: x, y, side (level-0 px), score, percentile, sd over members."""
    scores_MN = scene.scores.scores_MN
    table = pd.DataFrame(scene.places.coords_N2, columns=["x", "y"])
    table.insert(0, "tile", np.arange(len(table)))
    table["side"] = scene.places.tile_side
    table["score"] = scene.scores.scaled("raw")
    table["percentile"] = scene.scores.scaled("percentile")
    table["sd"] = scores_MN.std(axis=0, ddof=1) if len(scores_MN) > 1 else np.nan
    for name, marks_MN in (("top", scene.scores.top_MN), ("bottom", scene.scores.bottom_MN)):
        if marks_MN is not None:
            table[f"{name}_of_members"] = marks_MN.sum(axis=0)
    return table


def tiles_geojson(scene: Scene) -> list[str]:
    """Every tile with its scores as measurements; its class is its tenth of the colour scale, with that colour."""
    low, high = scene.colours.low, scene.colours.high
    share_N = (scene.scores_N - low) / max(high - low, 1e-12)
    class_N = np.clip((share_N * BINS).astype(int), 0, BINS - 1)
    edges = np.linspace(low, high, BINS + 1)
    what = scene.scores.short + (" percentile" if scene.scale == "percentile" else "")
    names = [f"{what} {edges[b]:.3g} to {edges[b + 1]:.3g}" for b in range(BINS)]
    measurements = {
        scene.scores.name: scene.scores.scaled("raw"),
        "percentile within the slide": scene.scores.scaled("percentile"),
    }
    colours_B3 = scene.colours.of((edges[:-1] + edges[1:]) / 2)
    places = scene.places
    return tile_features(places.coords_N2, places.tile_side, measurements, names, colours_B3, class_N)


def regions_geojson(scene: Scene, threshold: float) -> list[str]:
    """The tiles that score at least `threshold` (on the scene's scale), merged."""
    above_N = scene.scores_N >= threshold
    colour = scene.colours.of(np.array([scene.colours.high]))[0].tolist()
    name = f"{scene.scores.short} at least {threshold:g}{' percentile' if scene.scale == 'percentile' else ''}"
    chosen_N2, chosen_scores = scene.places.coords_N2[above_N], scene.scores_N[above_N]
    found = []
    for region in merged_regions(chosen_N2, scene.places.tile_side):
        left, top, right, bottom = region.bounds
        centres = chosen_N2 + scene.places.tile_side / 2
        near = ((centres >= (left, top)) & (centres <= (right, bottom))).all(axis=1)
        found.append(region_feature(region, name, colour, {"highest score": float(chosen_scores[near].max())}))
    return found


def gallery_png(scene: Scene, n_tiles: int) -> bytes:
    """The most and the least important tiles as they are in the slide's finest level."""
    assert scene.slide is not None
    n = min(n_tiles, len(scene.scores_N))
    both = (("Most important", scene.order_N[:n]), ("Least important", scene.order_N[::-1][:n]))
    shelves = []
    for heading, tiles in both:
        pictures = [read_tile(scene, tile) for tile in tiles.tolist()]
        rows = enumerate(zip(scene.scores_N[tiles], scene.places.coords_N2[tiles].tolist(), strict=True), 1)
        captions = [f"{rank}. score {score:.4g}\nx {x}  y {y}" for rank, (score, (x, y)) in rows]
        shelves.append(Shelf(heading, pictures, captions))
    side = f"a tile is {scene.places.tile_side:g} level-0 px wide"
    where = f"Under each tile: rank and score; x, y of its top-left corner in level-0 px; {side}."
    return gallery(shelves, scene.scores.slide, [*lines_about(scene)[:2], where])


def read_tile(scene: Scene, tile: int) -> np.ndarray:
    """One tile from the finest level that makes it no larger than MAX_TILE_PX."""
    assert scene.slide is not None
    return cut_out(scene.slide, scene.places, tile)


def cut_out(slide: Slide, places: Places, tile: int) -> np.ndarray:
    """`read_tile` without scores: uint8 RGB (H, W, 3)."""
    side = places.tile_side
    levels = [i for i, d in enumerate(slide.level_downsamples) if side / d <= MAX_TILE_PX]
    level = levels[0] if levels else len(slide.level_downsamples) - 1
    px = max(1, round(side / slide.level_downsamples[level]))
    x, y = places.coords_N2[tile].tolist()
    return slide.read_region_rgb(level, x, y, px, px)


def write_scene(
    scene: Scene, out: Path, *, name: str, mpp: float | None = None, threshold: float | None = None, n_tiles: int = 6
) -> list[Path]:
    """Everything about one slide: NAME.png, NAME.geojson, NAME_regions.geojson, NAME_tiles.csv, NAME_gallery.png.

    The GeoJSON needs level-0 coordinates, the gallery the slide file.
    """
    drawn = picture(scene, mpp=mpp)
    written = [out / f"{name}.png", out / f"{name}_tiles.csv"]
    write_whole(written[0], drawn.png)
    write_csv(tiles_table(scene), written[1])
    if scene.places.frame == "level-0":
        written.append(out / f"{name}.geojson")
        write_collection(written[-1], tiles_geojson(scene))
        if threshold is not None:
            written.append(out / f"{name}_regions.geojson")
            write_collection(written[-1], regions_geojson(scene, threshold))
    if scene.slide is not None and n_tiles:
        written.append(out / f"{name}_gallery.png")
        write_whole(written[-1], gallery_png(scene, n_tiles))
    return written


# --- the report ------------------------------------------------------------------------------------------------------


def open_theatre(
    trained: TrainedStudy, *, features: Path | Sequence[Path] = (), layout: str = "auto", slides: Slides | None = None
) -> Theatre:
    """The run's own features and slides, or those given.

    Raises:
        ProblemsError: a folder is not there or holds nothing usable.
    """
    folders = [features] if isinstance(features, Path) else features
    return Theatre(
        Verdicts(trained),
        features_of(trained, folders, layout),
        slide_files(trained, slides),
        default_mpp=slides.mpp if slides is not None else None,
        elsewhere=bool(folders),
    )


def chosen_for_report(verdicts: Verdicts, n_slides: int) -> list[tuple[str, str]]:
    """(heading, slide): of the test split, else of the cross-validated slides, the most confident right of every class
    and the most wrong, `n_slides` of each."""
    if not verdicts.trained.of_classes:
        return chosen_of_task(verdicts, n_slides)
    table = a_slide_a_bag(verdicts)
    table = table[table["error"].notna()]
    kinds = table["kind"].unique().tolist()
    kind = TEST_ENSEMBLE if TEST_ENSEMBLE in kinds else OUT_OF_FOLD
    table = table[table["kind"] == kind]
    right = table[table["predicted"] == table["label"]]
    wrong = table[table["predicted"] != table["label"]].sort_values("error", ascending=False, kind="stable")
    chosen = [("most wrong", slide) for slide in wrong["slide"].head(n_slides)]
    for name in reversed(verdicts.trained.classes):
        own = right[right["label"] == name].sort_values("error", kind="stable")
        chosen += [("most confident right", slide) for slide in own["slide"].head(n_slides)]
    return chosen


def a_slide_a_bag(verdicts: Verdicts) -> pd.DataFrame:
    """`Verdicts.slides`; of patients the first slide each, as all say the same."""
    table = verdicts.slides
    return table[~table["slide"].map(verdicts.trained.bag_of).duplicated()]


def chosen_of_task(verdicts: Verdicts, n_slides: int) -> list[tuple[str, str]]:
    """The same where there are no classes: the highest and the lowest (`Task.one_number`), and the most wrong."""
    table, noun = a_slide_a_bag(verdicts), verdicts.trained.task.noun
    kind = TEST_ENSEMBLE if (table["kind"] == TEST_ENSEMBLE).any() else OUT_OF_FOLD
    table = table[(table["kind"] == kind) & table["number"].notna()].sort_index()
    by_number = table.sort_values("number", ascending=False, kind="stable")["slide"].tolist()
    by_error = table[table["error"].notna()].sort_values("error", ascending=False, kind="stable")["slide"].tolist()
    lists = ((f"highest {noun}", by_number), (f"lowest {noun}", by_number[::-1]), ("most wrong", by_error))
    found: dict[str, str] = {}
    for heading, slides in lists:
        for slide in slides[:n_slides]:
            found[slide] = f"{found[slide]}, {heading}" if slide in found else heading
    return [(heading, slide) for slide, heading in found.items()]


def for_report(
    trained: TrainedStudy, n_slides: int, slides: Slides | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `report.html` shows of single slides, and notes on what it cannot show. Nothing here stops a report.

    Args:
        n_slides: of each kind; 0 = none.
    """
    if not n_slides:
        return [], []
    try:
        theatre = open_theatre(trained, slides=slides)
    except (ProblemsError, CacheError, SlideError) as error:
        return [], [f"no heatmaps: {' '.join(str(error).split())}"]
    shown, notes = [], []
    for heading, slide in chosen_for_report(theatre.verdicts, n_slides):
        try:
            with theatre.scene(slide) as scene:
                shown.append(card(scene, heading))
        except (ProblemsError, CacheError, SlideError) as error:
            reason = error.problems[0] if isinstance(error, ProblemsError) else str(error)
            notes.append(f"no heatmap of slide {slide}: {reason}")
    if notes and not shown:
        return [], [f"no heatmaps; {notes[0].removeprefix('no heatmap of ')}"]
    return shown, notes


def card(scene: Scene, heading: str) -> dict[str, Any]:
    """One slide of the report: picture, text, and its top tiles, with pictures where the slide file is at hand."""
    top = scene.order_N[:REPORT_TILES].tolist()
    tiles = [
        {
            "uri": None if scene.slide is None else jpeg_uri(read_tile(scene, tile), REPORT_TILE_PX),
            "rank": rank,
            "score": f"{scene.scores_N[tile]:.1f}",
            "x": int(scene.places.coords_N2[tile, 0]),
            "y": int(scene.places.coords_N2[tile, 1]),
        }
        for rank, tile in enumerate(top, 1)
    ]
    drawn = picture(scene, longest=REPORT_PX, n_top=REPORT_TILES, inset=True)
    return {
        "slide": scene.scores.slide,
        "heading": heading,
        "uri": drawn.data_uri(),
        "verdict": verdict_line(scene),
        "about": frames_line(scene),
        "score": f"{scene.scores.short}, {scene.scale}",
        "n_tiles": len(scene.scores_N),
        "tiles": tiles,
        "frame": scene.places.frame,
        "thumbnail": scene.slide is not None,
    }
