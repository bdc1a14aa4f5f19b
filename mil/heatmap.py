"""python -m mil.heatmap run=RUN slide=SLIDE [key=value ...]

Lays tile scores on the slide: a PNG, GeoJSON for QuPath, a table of the tiles, a gallery of the most and least
important. RUN is a run folder of mil.train. Scores are those of the members that held the slide out, or of member=N.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from extract.config import Device, Features, Section, Slides, config_from_command_line
from extract.ending import ended
from extract.lock import only_command_in
from extract.places import shown
from extract.stores.sessions import stores_of


class HeatmapConfig(Section):
    """Everything `python -m mil.heatmap` can be told."""

    run: Path | None = Field(None, description="run folder of mil.train")
    slide: str | list[str] | None = Field(None, description="slide id, or a list of them")
    out: Path = Field(Path("heatmaps"), description="folder for the pictures and files")
    score: Literal["attention", "evidence"] = Field(
        "attention", description="what was looked at (attention, or Chowder's tile score); or that times what it says"
    )
    scale: Literal["percentile", "raw"] = Field("percentile", description="within the slide, or the score itself")
    target: str | None = Field(
        None, description="class that evidence speaks for, or least grade; default: the positive or predicted one"
    )
    member: int | None = Field(None, ge=0, description="this member alone; default: all that held the slide out")
    mpp: float | None = Field(None, gt=0, description="microns per pixel of the picture; default: about 1,600 px wide")
    threshold: float | None = Field(None, description="also merge tiles that score at least this into regions")
    tiles: int = Field(6, ge=0, description="tiles of each kind in the gallery; 0 = no gallery")
    features: Features = Features()
    slides: Slides = Slides()
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, mps")

    @property
    def slide_ids(self) -> list[str]:
        return [self.slide] if isinstance(self.slide, str) else list(self.slide or [])


def heatmap_problems(tree: dict[str, Any]) -> list[str]:
    """What the fields cannot see by themselves: what is needed, and thresholds that no percentile reaches."""
    problems = []
    if not tree.get("run"):
        problems.append("run: no run folder given; set run=runs/NAME")
    if not tree.get("slide"):
        problems.append("slide: no slide given; set slide=ID or slide=[ID,ID]")
    if not isinstance(tree.get("threshold", 0), int | float):
        return problems
    if tree.get("scale", "percentile") == "percentile" and not 0 <= tree.get("threshold", 0) <= 100:
        problems.append(f"threshold={tree['threshold']}: expected a percentile of 0..100; or set scale=raw")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 something is wrong (nothing written), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(HeatmapConfig, arguments, __doc__ or "", also=heatmap_problems)

    def draw() -> int:
        with only_command_in(config.out, "mil.heatmap"), stores_of(config, out=config.out):
            written = draw_slides(config)
        for path in written:
            print(shown(path))
        return 0

    return ended(draw, interrupted=lambda: "Interrupted.", known=drawing_errors)


def drawing_errors() -> tuple[type[Exception], ...]:
    """What tile scores raise besides ProblemsError."""
    from extract.features.cache import CacheError
    from extract.slides.errors import SlideError

    return CacheError, SlideError


def draw_slides(config: HeatmapConfig) -> list[Path]:
    """The files of every slide. What can be looked at before drawing is looked at before anything is written."""
    from mil.look.scenes import open_theatre, refuse_wrong_wishes, write_scene
    from mil.results.trained import open_run

    assert config.run is not None
    trained = open_run(config.run, device=config.device)
    theatre = open_theatre(
        trained, features=config.features.folders, layout=config.features.layout, slides=config.slides
    )
    refuse_wrong_wishes(
        theatre,
        config.slide_ids,
        member=config.member,
        target=config.target,
        files_given=config.slides.folder is not None,
    )
    written = []
    for slide in config.slide_ids:
        scene = theatre.scene(slide, kind=config.score, scale=config.scale, member=config.member, target=config.target)
        name = f"{slide}_{config.score}" + ("" if config.member is None else f"_member{config.member}")
        with scene:
            written += write_scene(
                scene, config.out, name=name, mpp=config.mpp, threshold=config.threshold, n_tiles=config.tiles
            )
    return written


if __name__ == "__main__":
    sys.exit(main())
