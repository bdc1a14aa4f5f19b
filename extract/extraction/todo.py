"""What is to do: which slides, and which of their files are there and made alike."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from extract.cohort import Cohort, read_cohort
from extract.config import (
    GRID_RULES,
    NO_TILE_RULES,
    NO_TISSUE_RULES,
    ConfigError,
    ExtractConfig,
    ProblemsError,
    Tiles,
    Tissue,
    did_you_mean,
    magnifications,
    main_table,
)
from extract.digest import sha256_of_file
from extract.encoders.frozen import FrozenEncoder
from extract.extraction.readers import SlideFile
from extract.features.cache import SUFFIX, CacheError, Header, read_header
from extract.features.given import coords_files
from extract.places import is_url, place_of, shown, url_of
from extract.slides.coarse import chosen_by
from extract.slides.errors import SlideError
from extract.slides.files import IMAGE_SUFFIXES, SLIDE_SUFFIXES, find_slides
from extract.slides.regions import digest_of, regions_files, unmatched_classes
from extract.slides.slide import open_slide
from extract.stores.looking import exists, is_written
from extract.stores.sessions import bring_some

CHECKING_THREADS = 8
COMPARED_OF_A_STORE = 8
"""Of the features that an earlier command put into a store, so many are looked into; all would be fetched otherwise."""
FileT = TypeVar("FileT")


def cohort_slides(config: ExtractConfig, cohort: Cohort | None = None) -> list[SlideFile]:
    """The slides to extract: of the cohort (given, or read from the config's CSV), else all of `slides.folder`.

    A path in the CSV may be relative to `slides.folder`, to the CSV's folder or to the working directory. A slide
    without a path is looked for in `slides.folder` by its id, which may carry the file's extension.

    Raises:
        CohortError, SlideFolderError: the CSV or the folder is wrong.
        ConfigError: slides without a file, all listed; or nothing says which slides.
    """
    if cohort is None and config.cohort is not None:
        cohort = read_cohort(config.cohort, config.columns, labelled=False)
        cohort = named_as_files(config, cohort)
        for note in cohort.notes:
            print(f"note: {note}")
    if cohort is None:
        if config.slides.folder is None:
            raise ConfigError("no slides", ["set slides.folder=FOLDER, or cohort=FILE.csv with a path column"])
        found = find_slides(config.slides.folder, leave_out=config.features.folder)
        return [SlideFile(slide, path) for slide, path in found.items()]
    rows = cohort.table[["slide", "path", "mpp"]].itertuples(index=False, name=None)
    slides, problems = [], []
    in_folder: dict[str, Path] = {}
    if config.slides.folder is not None and cohort.table["path"].isna().any():
        in_folder = find_slides(config.slides.folder, leave_out=config.features.folder)
    for slide, path, mpp in rows:
        file = _by_path(config, str(path)) if path else _by_id(str(slide), in_folder)
        if isinstance(file, Path):
            slides.append(SlideFile(str(slide), file, None if np.isnan(mpp) else float(mpp)))
        else:
            problems.append(f"slide {slide!r}: {file}")
    if problems and config.slides.folder is None and cohort.table["path"].isna().any():
        problems.append("name the files in column path of the CSV (columns.path), or set slides.folder=FOLDER")
    if problems:
        raise ConfigError("slides without a file", problems)
    return slides


def named_as_files(config: ExtractConfig, cohort: Cohort) -> Cohort:
    """The cohort with its slides called as those of `slides.folder`, where the table names files (`s001.svs`)."""
    if config.slides.folder is None or cohort.table["path"].notna().any():
        return cohort
    return cohort.named_as(set(find_slides(config.slides.folder, leave_out=config.features.folder)))


def _by_path(config: ExtractConfig, path: str) -> Path | str:
    """The file, or why there is none."""
    bases = [config.slides.folder, main_table(config.cohort).parent if config.cohort else None, Path()]
    try:
        given = place_of(path) if is_url(path) else Path(path).expanduser()
    except ValueError as error:
        return str(error)
    tried = list(dict.fromkeys(base / given for base in bases if base is not None))
    found = next((file for file in tried if exists(file)), None)
    return found or "no file " + " or ".join(shown(file) for file in tried)


def _by_id(slide: str, in_folder: dict[str, Path]) -> Path | str:
    stem, dot, suffix = slide.rpartition(".")
    if slide not in in_folder and dot + suffix.lower() in SLIDE_SUFFIXES | IMAGE_SUFFIXES:
        slide = stem
    hint = did_you_mean(slide, list(in_folder))
    return in_folder.get(slide) or f"no path in the CSV and no such file in slides.folder{hint}"


def shard_of(files: Sequence[FileT], shard: str | None) -> list[FileT]:
    """Part i of n for `shard="i/n"`: every n-th file. The parts are disjoint and together all."""
    if shard is None:
        return list(files)
    part, n_parts = (int(number) for number in shard.split("/"))
    return list(files[part - 1 :: n_parts])


def with_regions(config: ExtractConfig, slides: Sequence[SlideFile]) -> list[SlideFile]:
    """The slides with their files of drawn regions, where `tissue.regions` asks for them.

    Raises:
        RegionsError: files are missing.
    """
    if config.tissue.regions is None:
        return list(slides)
    names, needed = [file.slide for file in slides], config.tissue.without_regions == "error"
    files = regions_files(config.tissue.regions, names, needed=needed)
    for said in unmatched_classes(files.values(), config.tissue):
        print(f"note: {said}", file=sys.stderr)
    return [dataclasses.replace(file, regions=files.get(file.slide)) for file in slides]


def with_coords(config: ExtractConfig, slides: Sequence[SlideFile]) -> list[SlideFile]:
    """The slides with the files of their tiles' coordinates, where `tiles.coords` asks for them.

    Raises:
        ProblemsError: files are missing.
    """
    if config.tiles.coords is None:
        return list(slides)
    files = coords_files(config.tiles.coords, [file.slide for file in slides])
    return [dataclasses.replace(file, coords=files[file.slide]) for file in slides]


def tile_mpp(config: ExtractConfig, encoder: FrozenEncoder) -> float:
    """Microns per pixel of the tiles."""
    return next(iter(magnifications(config.tiles)), encoder.spec.mpp)


def settings_of(config: ExtractConfig, encoder: FrozenEncoder) -> dict[str, Any]:
    """What two files must have in common to be made alike, by the names under which a file states it."""
    return {
        "encoder": encoder.id,
        "weights_sha256": encoder.weights_sha256,
        "tile_px": encoder.spec.tile_px,
        "mpp": tile_mpp(config, encoder),
        "features.dtype": config.features.dtype,
        "tiles_chosen_by": chosen_by(config.tiles),
    } | flat(config)


def flat(config: ExtractConfig) -> dict[str, Any]:
    """The rules by which tiles are chosen, by the names under which a file states them."""
    given = config.tiles.coords is not None
    tissue = {f"tissue.{key}": value for key, value in config.tissue if key not in NO_TISSUE_RULES and not given}
    left_out = (*NO_TILE_RULES, *GRID_RULES) if given else NO_TILE_RULES
    return tissue | {f"tiles.{key}": value for key, value in config.tiles if key not in left_out}


def rules_to_state(config: ExtractConfig) -> dict[str, Any]:
    """`flat` as a file states it: a limit that was not set is none."""
    unlimited = () if config.tiles.max else ("tiles.max", "tiles.seed")
    return {key: value for key, value in flat(config).items() if key not in unlimited}


def differences(header: Header, wanted: dict[str, Any]) -> list[str]:
    """In what a cache file differs from `wanted`, one sentence each. What a file of an older version does not state
    has the default of today's config."""
    stated = dataclasses.asdict(header.provenance) | header.provenance.extra | {"features.dtype": header.dtype}
    defaults = {f"tissue.{k}": v for k, v in Tissue()} | {f"tiles.{k}": v for k, v in Tiles()}
    defaults |= {"regions_sha256": "", "coords_sha256": "", "tiles_chosen_by": ""}
    return [
        f"{key} is {_shown(stated.get(key, defaults.get(key)))}, expected {_shown(value)}"
        for key, value in wanted.items()
        if not _same(stated.get(key, defaults.get(key)), value)
    ]


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float):
        return bool(np.isclose(found, wanted, rtol=1e-6, atol=0))
    return bool(found == wanted)


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}..." if len(text) == 64 else (text or "not stated")


def file_differences(path: Path, file: SlideFile, wanted: dict[str, Any], config: ExtractConfig) -> list[str]:
    """In what an existing cache file differs from what would be made of this slide now; [] if in nothing.

    A slide in a store is not fetched for it: its content is not compared. Nor is a feature file that is only listed
    there (see `sort_out`).

    Raises:
        SlideError: the slide cannot be opened, so its content cannot be compared.
    """
    if not path.exists():
        return []
    if url_of(file.path) is not None:
        return _differing(path, file, wanted, config)
    with open_slide(file.path, file.mpp, default_mpp=config.slides.mpp) as slide:
        wanted = wanted | {"slide_fingerprint": slide.fingerprint, "slide_mpp": slide.mpp}
    return _differing(path, file, wanted, config)


def _differing(path: Path, file: SlideFile, wanted: dict[str, Any], config: ExtractConfig) -> list[str]:
    wanted = wanted | {"regions_sha256": digest_of(file.regions, config.tissue)}
    wanted |= {"coords_sha256": sha256_of_file(file.coords) if file.coords else ""}
    try:
        return differences(read_header(path), wanted)
    except CacheError as error:
        return [str(error).removeprefix(f"{path}: ")]


def sort_out(
    config: ExtractConfig, slides: Sequence[SlideFile], wanted: dict[str, Any]
) -> tuple[list[SlideFile], list[SlideFile]]:
    """Slides to do, and slides whose files are there and made alike.

    In a store what its listing has is there; a few of these files, evenly chosen, are fetched and compared.

    Raises:
        ProblemsError: files are there that were made otherwise.
    """
    assert config.features.folder is not None
    paths = {file: config.features.folder / f"{file.slide}{SUFFIX}" for file in slides}
    existing = [] if config.extract.overwrite else [file for file in slides if is_written(paths[file])]
    bring_some([paths[file] for file in existing], COMPARED_OF_A_STORE)

    def check(file: SlideFile) -> list[str] | None:
        try:
            return file_differences(paths[file], file, wanted, config)
        except SlideError:
            return None  # to do: it fails then, with its reason

    with ThreadPoolExecutor(CHECKING_THREADS) as threads:
        found = dict(zip(existing, threads.map(check, existing), strict=True))
    problems = [f"{paths[file]}: {'; '.join(different)}" for file, different in found.items() if different]
    if problems:
        advice = "overwrite=true makes them anew, out=FOLDER puts the new ones elsewhere"
        raise ProblemsError(f"features are there that were made otherwise; {advice}", problems)
    there = [file for file, different in found.items() if different == []]
    return [file for file in slides if file not in set(there)], there
