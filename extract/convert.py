"""python -m extract.convert from=FOLDER to=TOOL out=FOLDER

Writes features, ours or of any tool that is read, as another tool writes them.

    python -m extract.convert from=cache/phikon to=trident out=for_trident
    python -m extract.convert from=runs_of_stamp/features mpp=0.25 to=clam out=for_clam

Who wrote the folder is detected (layout=... says it). Values stay as they are, coordinates become the other tool's:
some store microns or tile centres, and mpp=... says what a pixel is where their files do not. What the other tool's
files have and nobody knows is refused with the whole list before anything is written; coordinates that it can do
without are told.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model

from extract.config import LayoutName, ProblemsError, Section, config_from_command_line
from extract.ending import ended
from extract.lock import only_command_in
from extract.places import shown
from extract.stores.sessions import stores_of

if TYPE_CHECKING:
    from extract.features.export import SlideFeatures
    from extract.features.folder import FeatureFolder

TOOLS = ("clam", "trident", "stamp", "torchmil", "slideflow", "slide2vec", "atlaspatch")


class _Wanted(Section):
    layout: LayoutName = Field("auto", description="who wrote the folder that is read; auto detects it")
    to: Literal[TOOLS] = Field(description="whose files are written")  # type: ignore[valid-type]  # the table is the type
    out: Path = Field(description="folder to write to; there must be nothing in it")
    mpp: float | None = Field(
        None, gt=0, description="level-0 microns per pixel of slides whose features do not say (of STAMP, slideflow)"
    )


ConvertConfig = create_model(
    "ConvertConfig",
    __base__=_Wanted,
    **{"from": (Path, Field(description="folder of features"))},  # type: ignore[call-overload]  # a keyword of Python
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the config or the features are wrong, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(ConvertConfig, arguments, __doc__ or "", also=out_problems)

    def convert() -> int:
        with only_command_in(config.out, "extract.convert"), stores_of(config, out=config.out):
            n_slides = run(getattr(config, "from"), config)
        print(f"{n_slides} slides written to {shown(config.out)} as {config.to} writes them")
        return 0

    return ended(
        convert,
        interrupted=lambda: f"Interrupted; what is in {config.out} is whole, but not all of it.",
        after=lambda: f"What is in {config.out} is whole, but not all of it.",
        known=errors,
    )


def errors() -> tuple[type[Exception], ...]:
    """What reading features raises besides ProblemsError."""
    from extract.features.errors import CacheError

    return (CacheError,)


def out_problems(tree: Any) -> list[str]:
    """A folder with something in it is refused: files of two conversions must not be mixed."""
    out = tree.get("out") if isinstance(tree, dict) else None
    if not isinstance(out, str) or not Path(out).exists():
        return []
    return (
        [f"out: {out} exists and is not an empty folder"] if not Path(out).is_dir() or any(Path(out).iterdir()) else []
    )


def run(source: Path, config: Any) -> int:
    """Write every slide; how many there are. All slides are checked before the first is written."""
    from extract.features.export import EXPORTS, lacks  # h5py: only for a valid config
    from extract.features.folder import open_feature_folder

    folder, export = open_feature_folder(source, config.layout), EXPORTS[config.to]
    problems = [
        f"slide {slide!r}: {' and '.join(missing)} unknown, which {config.to}'s files have"
        for slide in folder.slides
        if (missing := lacks(tiles_of(folder, slide, config.mpp), export.needs))
    ]
    if problems:
        if not config.mpp and folder.layout in IN_MICRONS:
            problems.append(f"{folder.layout} does not say what a pixel is: set mpp=NUMBER")
        raise ProblemsError(f"cannot be written as {config.to} writes", problems)
    without = []
    for slide in folder.slides:
        tiles = tiles_of(folder, slide, config.mpp)
        export.write(config.out, replace(tiles, features_ND=folder.mapped(slide)))
        without += [slide] if tiles.coords_N2 is None else []
    tell_of_absent(without, folder.layout, config.mpp)
    return len(folder.slides)


def tell_of_absent(slides: Sequence[str], layout: str, mpp: float | None) -> None:
    """Say which slides were written without coordinates."""
    if not slides:
        return
    how = "" if mpp or layout not in IN_MICRONS else f"; {layout} does not say what a pixel is: set mpp=NUMBER"
    listed = ", ".join(slides[:5]) + (", ..." if len(slides) > 5 else "")
    print(f"note: coordinates of {len(slides)} slides are not known and not written ({listed}){how}", file=sys.stderr)


IN_MICRONS = ("stamp", "slideflow")
"""Layouts from whose places level-0 px follow only where the slide's microns per pixel are known."""


def tiles_of(folder: FeatureFolder, slide: str, mpp: float | None = None) -> SlideFeatures:
    """What is known of a slide's tiles, with their coordinates where these are known; no features are read.

    mpp: of the slide's level 0, where the file does not say.
    """
    from extract.features.export import NOT_READ, SlideFeatures

    provenance = folder.header(slide).provenance
    known = SlideFeatures(slide, NOT_READ, None, provenance)
    if mpp and not known.slide_mpp:
        side_px = provenance.tile_level0_px or provenance.mpp * provenance.tile_px / mpp
        provenance = replace(provenance, extra={**provenance.extra, "slide_mpp": mpp}, tile_level0_px=side_px)
        known = replace(known, provenance=provenance)
    coords_N2 = folder.coords(slide, mpp=known.slide_mpp or None, tile_level0_px=provenance.tile_level0_px or None)
    return replace(known, coords_N2=coords_N2)


if __name__ == "__main__":
    sys.exit(main())
