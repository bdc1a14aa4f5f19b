"""python -m extract.run config=NAME [key=value ...]

Turns slides into tile features with a frozen encoder: one .h5 file a slide in out=FOLDER. Running again continues.

    python -m extract.run slides.folder=FOLDER_OF_SLIDES out=cache/phikon encoder.name=phikon
    python -m extract.run slides.folder=SLIDES out=cache/tumour tissue.regions=DRAWN tissue.include=[tumour]
    python -m extract.run slides.folder=SLIDES out=cache/mine tissue.regions=EDITED tissue.method=regions
    python -m extract.run slides.folder=SLIDES out=cache/clam tiles.coords=CLAM/patches
    python -m extract.run slides.folder=SLIDES out=cache/two tiles.mpp=[0.5,1.0]
    python -m extract.run tiles.folder=FOLDER_OF_TILE_IMAGES tiles.mpp=0.5 out=cache/tiles encoder.name=phikon
    python -m extract.run config=nct-crc.yaml tiles.root=/data/nct-crc-he

Which tiles: all on tissue; only where SLIDE.geojson (QuPath, TRIDENT), SLIDE.xml (ASAP) or a mask image SLIDE.png has a
class of tissue.include, and never in one of tissue.exclude; what is drawn instead of a threshold (tissue.save=geojson
writes our mask for QuPath, to be edited and handed back so); exactly those of CLAM's, TRIDENT's or AtlasPatch's
coordinate files. tiles.max=500 takes that many, evenly drawn; tiles.save=jpeg keeps them as images. Several
magnifications are a folder each, OUT/mpp0.5 and OUT/mpp1, for mil.train features.folder=[A,B] features.join=nearest.

Tile images are a feature row each, with its name, in one file a subfolder (tiles.files=one: one for all); the last
command reads a dataset of the Hugging Face hub, here from its Parquet files on disk.

Encoders: the table of extract/encoders/table.py, timm:NAME, hf:OWNER/NAME (any ViT or DINOv2 of transformers), or
module:function of one's own (extract/encoders/own.py says what it returns); encoder.weights=FILE where there is no
network.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from extract.config import STUDY_KEYS, Encoder, ExtractConfig, config_from_command_line
from extract.ending import ended
from extract.lock import only_command_in
from extract.places import in_words
from extract.stores.sessions import stores_of

if TYPE_CHECKING:
    from extract.extraction.summary import Summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 some slides failed, 2 config or folder is wrong or cannot be written, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(
        ExtractConfig,
        arguments,
        __doc__ or "",
        ignored=(*STUDY_KEYS, "out"),  # in a file, `out` is the run folder of training
        bare_section="extract",
        also=lambda tree: [*two_folders(arguments), *extraction_problems(tree)],
    )
    if config.out is not None:
        config = config.model_copy(update={"features": config.features.model_copy(update={"folder": config.out})})
    kept = "Finished slides are kept; the same command continues."
    return ended(
        lambda: run(config),
        interrupted=lambda: f"Interrupted. {kept}",
        after=lambda: kept,
        known=extraction_errors,
    )


def extraction_errors() -> tuple[type[Exception], ...]:
    """What extraction raises besides ProblemsError."""
    from extract.encoders.table import EncoderError
    from extract.extraction.readers import ReaderError

    return EncoderError, ReaderError


def run(config: ExtractConfig) -> int:
    """Extract what the config names, say what became of it; the exit code."""
    assert config.features.folder is not None
    folder = config.features.folder
    listed_only = config.tiles.folder is None and config.tiles.hub is None
    with (
        only_command_in(folder, "extract.run", shared=config.run.on == "local"),  # else claims
        stores_of(config, out=folder, wanted=is_small if listed_only else lambda name: True, shared=True),
    ):
        from extract.extraction.anywhere import extract_anywhere
        from extract.extraction.tile_images import extract_tile_images
        from extract.extraction.todo import cohort_slides  # torch, OpenSlide, h5py: only for a valid config

        if config.tiles.folder is not None or config.tiles.hub is not None:
            return told(extract_tile_images(config), config)
        slides = cohort_slides(config)
        return max(told(extract_anywhere(part, slides), part) for part in by_magnification(config))


def is_small(name: str) -> bool:
    """What of features in a store is fetched before extraction; feature files are only listed."""
    return name.endswith((".csv", ".json", ".yaml"))


def by_magnification(config: ExtractConfig) -> list[ExtractConfig]:
    """A config for each value of a list in tiles.mpp, with a features folder of its own."""
    assert config.features.folder is not None
    if not isinstance(config.tiles.mpp, list):
        return [config]
    parts = []
    for mpp in config.tiles.mpp:
        features = config.features.model_copy(update={"folder": config.features.folder / f"mpp{mpp:g}"})
        parts.append(
            config.model_copy(update={"features": features, "tiles": config.tiles.model_copy(update={"mpp": mpp})})
        )
    return parts


def told(summary: Summary, config: ExtractConfig) -> int:
    """Say what became of the slides; the exit code."""
    assert config.features.folder is not None
    print(in_words(summary_text(summary, config.features.folder)))
    return 1 if summary.failed else 0


def extraction_problems(tree: dict[str, Any]) -> list[str]:
    """What the sections cannot see by themselves: where from, where to, which encoder, which shard."""
    from extract.encoders.table import encoder_problems

    def value(section: str, key: str) -> Any:
        found = tree.get(section)
        return found.get(key) if isinstance(found, dict) else None

    problems = []
    if not tree.get("out") and not value("features", "folder"):
        problems.append("out: not set; expected out=FOLDER, where one feature file a slide is written")
    slides = [
        key for key, given in (("cohort", tree.get("cohort")), ("slides.folder", value("slides", "folder"))) if given
    ]
    images = [f"tiles.{key}" for key in ("folder", "hub") if value("tiles", key)]
    if len(images) > 1:
        problems.append("tiles.folder and tiles.hub: both say where tile images are; give one of them")
    if images:
        problems += [f"{key}: slides, but {images[0]} asks for tile images; give one of them" for key in slides]
    elif not slides:
        problems.append(
            "slides: none given; set slides.folder=FOLDER, or cohort=FILE.csv with a path column; "
            "or tiles.folder=FOLDER or tiles.hub=NAME for tile images"
        )
    if not images:
        given = [key for key in ("files",) if value("tiles", key)]
        problems += [f"tiles.{key}: only with tiles.folder; a slide has a file of its own" for key in given]
    else:
        given = [key for key in ("coords", "max", "save") if value("tiles", key) not in (None, 0, "none")]
        problems += [f"tiles.{key}: chooses tiles of slides; {images[0]} holds tiles already" for key in given]
        if isinstance(value("tiles", "mpp"), list):
            problems.append(f"tiles.mpp: several; the images of {images[0]} have one")
    if value("tiles", "coords") and value("tissue", "regions"):
        problems.append("tiles.coords: tiles are exactly these, so tissue.regions cannot limit them; give one of them")
    layout = value("features", "layout")
    if layout not in (None, "auto", "cache"):
        problems.append(f"features.layout={layout}: extraction writes this toolkit's own layout; use auto or cache")
    with suppress(ValidationError):  # which the section itself reports
        problems += encoder_problems(Encoder.model_validate(tree.get("encoder") or {}))
    return problems + _shard_problems(value("extract", "shard"))


def two_folders(arguments: Sequence[str]) -> list[str]:
    """`out=` goes before the features.folder of a config file; both on one command line are a mistake."""
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    out, folder = given.get("out"), given.get("features.folder")
    if not out or not folder or Path(out) == Path(folder):
        return []
    return [f"out={out} and features.folder={folder}: both say where features go; give one of them"]


def _shard_problems(shard: Any) -> list[str]:
    part, _, n_parts = str(shard or "").partition("/")
    if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", str(shard or "")) or 1 <= int(part) <= int(n_parts):
        return []  # what is no i/n at all, the section reports
    return [f"extract.shard={shard}: expected i/n with i from 1 to n"]


def summary_text(summary: Summary, folder: Path) -> str:
    """How many slides are done, already there, empty, failed, and the speed."""
    parts = [f"{len(summary.done)} done", f"{len(summary.already_there)} already there"]
    parts += [f"{len(summary.empty)} empty", f"{len(summary.failed)} failed"]
    lines = [f"{folder}: slides: {', '.join(parts)}"]
    if summary.tiles:
        rate = summary.tiles / max(1e-9, summary.seconds)
        lines.append(f"{summary.tiles:,} tiles in {summary.seconds:.0f} s, {rate:.0f} tiles/s")
        if summary.encoder_busy:
            lines.append(busy_line(summary))
    if summary.failed:
        lines.append(f"see {folder / 'failed.csv'}: slide, stage, reason")
    if summary.elsewhere:
        lines.append(f"{len(summary.elsewhere)} in the hands of other processes: {', '.join(summary.elsewhere)}")
    return "\n".join(lines)


def busy_line(summary: Summary) -> str:
    """What limited a run: the readers, or the encoder."""
    who = "the encoder" if summary.device == "cpu" else "the GPU"
    waited, reading = 1 - summary.encoder_busy, f"readers were busy {summary.readers_busy:.0%} of the time"
    if waited < 0.1:
        return f"{who} was busy {summary.encoder_busy:.0%} of the time and limits; {reading}"
    more = (
        "more workers, or faster reading"
        if summary.readers_busy > 0.7
        else "the main process was behind, or too little was read ahead (extract.prefetch)"
    )
    return f"{who} waited {waited:.0%} for readers: {more}; {reading}"


if __name__ == "__main__":
    sys.exit(main())
