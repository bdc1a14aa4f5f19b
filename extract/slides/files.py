"""Slide files: finding them in a folder, their companions, and a fingerprint of their content."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path

import openslide

from extract.places import url_of
from extract.slides.errors import SlideFolderError
from extract.stores import looking

SLIDE_SUFFIXES = frozenset(
    (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi")
)
"""What OpenSlide 4 opens."""

SEVERAL_FILES = frozenset((".mrxs", ".vms", ".vmu", ".dcm"))
"""A slide of these has others, or may have."""

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg"))

OTHER_IMAGE_SUFFIXES = frozenset((".bmp", ".webp", ".jp2", ".j2k", ".jpe", ".jfif"))
"""Images that are read when a path names them. A folder is not searched for them: there they mostly are previews."""

FOREIGN_SUFFIXES = frozenset(
    (".vsi", ".ets", ".qptiff", ".isyntax", ".i2syntax", ".lif", ".nd2", ".zvi", ".oib", ".oif", ".kfb", ".sdpc")
)
"""Slides of formats that OpenSlide does not open."""

TIFF_SUFFIXES = frozenset((".tif", ".tiff"))

LARGEST_LIST = 2**20
"""Bytes of a VMS or VMU file, which names the others of its slide."""


def find_slides(folder: Path | str, leave_out: Path | None = None) -> dict[str, Path]:
    """All slides under `folder`, recursively, by extension: slide id -> file, sorted by id.

    The folder `leave_out` is passed over: features, with pictures for quality control, may be written beside slides.

    The id is the file's name without its last extension. A DICOM series is one slide: it goes by its folder's name if
    that folder holds nothing but this series, else by the name of its first file. Data files that belong to an MRXS,
    VMS or VMU slide are not slides. Hidden files and folders (a leading dot) are passed over. Links are followed.
    Images and slides of kinds that are not looked for are counted on standard error, once a folder.

    Raises:
        SlideFolderError: no such folder, no slides in it, names with control characters, or several files with one id
            (all are listed).
    """
    root = looking.listed(Path(folder))
    if not looking.is_dir(root):
        raise SlideFolderError("no slides", [f"slides.folder={root}: no such folder"])
    found: dict[str, list[Path]] = {}
    others_seen: Counter[str] = Counter()
    for directory, files in _walk(root, leave_out, others_seen):
        dicom = [file for file in files if file.suffix.lower() == ".dcm"]
        others = [file for file in files if file.suffix.lower() != ".dcm"]
        for file in _without_companions(others):
            found.setdefault(file.stem, []).append(file)
        series = _dicom_series(dicom)
        alone = len(series) == 1 and not others and len(dicom) > 1 and directory != root
        for members in series:
            found.setdefault(directory.name if alone else members[0].stem, []).append(_first_readable(members))
    if not found:
        known = " ".join(sorted(SLIDE_SUFFIXES | IMAGE_SUFFIXES))
        problems = [f"slides.folder={root}: no file ends in one of {known}", *passed_over(others_seen)]
        raise SlideFolderError("no slides", problems)
    for line in passed_over(others_seen):
        _say_once(f"note: slides.folder={root}: {line}")
    unprintable = [
        f"{str(path)!r}: the name has a line break or another control character; rename the file"
        for slide, paths in sorted(found.items())
        for path in paths
        if not slide.isprintable()
    ]
    if unprintable:
        raise SlideFolderError("files whose names cannot be slide ids", unprintable)
    doubles = [
        f"slide {slide!r}: {len(paths)} files: {', '.join(map(str, paths))}. Move all but one away, or name the files "
        "in the path column of the cohort CSV"
        for slide, paths in sorted(found.items())
        if len(paths) > 1
    ]
    if doubles:
        raise SlideFolderError("several files with one slide id", doubles)
    return {slide: paths[0] for slide, paths in sorted(found.items())}


def passed_over(seen: Mapping[str, int]) -> list[str]:
    """How many files of which kinds were no slides to `find_slides`, and what to type for them."""
    lines = []
    for kinds, what in (
        (OTHER_IMAGE_SUFFIXES, "name them in the column path of a CSV (cohort=FILE.csv) if they are slides"),
        (FOREIGN_SUFFIXES, "OpenSlide does not read them; convert them, for instance to a pyramidal TIFF"),
    ):
        listed = [f"{seen[suffix]} {suffix}" for suffix in sorted(kinds) if seen.get(suffix)]
        if listed:
            lines.append(f"passed over {', '.join(listed)}: {what}")
    return lines


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _walk(root: Path, leave_out: Path | None, others: Counter[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder with its slide and image files, sorted; each real folder once, data folders of MRXS left out.

    `others` counts files of other kinds by their extension.
    """
    seen = {os.path.realpath(leave_out)} if leave_out is not None else set()
    for name, folders, files in looking.walk(root):
        real = os.path.realpath(name)
        stems = {Path(file).stem for file in files if file.lower().endswith(".mrxs")}
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in stems) if real not in seen else []
        if real in seen:
            continue
        seen.add(real)
        directory = Path(name)
        wanted = [directory / file for file in sorted(files) if not file.startswith(".")]
        others.update(file.suffix.lower() for file in wanted)
        yield directory, [file for file in wanted if file.suffix.lower() in SLIDE_SUFFIXES | IMAGE_SUFFIXES]


def _without_companions(files: Sequence[Path]) -> list[Path]:
    """Without the JPEG files that a Hamamatsu VMS or VMU slide in the same folder lists as its parts."""
    lists = [
        looking.head(file, LARGEST_LIST).decode("utf-8", "replace")
        for file in files
        if file.suffix.lower() in (".vms", ".vmu")
    ]
    listed = {line.partition("=")[2].strip() for text in lists for line in text.splitlines()}
    return [file for file in files if file.name not in listed]


def _dicom_series(files: Sequence[Path]) -> list[list[Path]]:
    """DICOM files grouped by SeriesInstanceUID; a file without one is its own group."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_series_uid(file) or str(file), []).append(file)
    return list(groups.values())


@lru_cache(maxsize=100_000)  # a flat folder of many series is otherwise read once a slide
def _series_uid(file: Path) -> str:
    """SeriesInstanceUID (0020,000E) from the head of an explicit-VR little-endian file, as whole-slide DICOM is.

    Opening every instance with OpenSlide instead would read all headers of the folder once per file.
    """
    head = looking.head(file, 65_536)
    # directly after StudyInstanceUID: references to other series, which also hold this tag, do not follow that
    match = re.search(rb"\x20\x00\x0d\x00UI..[0-9. \x00]{0,64}\x20\x00\x0e\x00UI(..)", head, re.DOTALL)
    if not match:
        return ""
    length = int.from_bytes(match[1], "little")
    return head[match.end() : match.end() + length].rstrip(b"\x00 ").decode("ascii", "replace")


def _first_readable(files: Sequence[Path]) -> Path:
    """The first file that OpenSlide recognises, or the first: it then fails when opened, with a reason.

    Of a series in a store the first; which file is opened is found out when they are here (`first_of_series`).
    """
    if url_of(files[0]):
        return files[0]
    return next((file for file in files if openslide.OpenSlide.detect_format(file)), files[0])


def fingerprint_of(path: Path, quickhash: str = "") -> str:
    """sha256 (hex) over sizes, samples of the bytes and OpenSlide's quickhash: same content, same fingerprint.

    A single file is sampled at its head, middle and end (64 kB each). For a slide of several files (MRXS, VMS, DICOM
    series) the sizes of all its files go in as well. File names and dates do not.
    """
    parts = parts_of(path)
    digest = hashlib.sha256(quickhash.encode())
    digest.update(repr(sorted(part.stat().st_size for part in parts)).encode())
    for chunk in sorted(_samples(part) for part in ([path] if path.suffix.lower() != ".dcm" else parts)):
        digest.update(chunk)
    return digest.hexdigest()


def parts_of(path: Path) -> list[Path]:
    """All files that make up the slide, `path` among them."""
    suffix = path.suffix.lower()
    if suffix not in SEVERAL_FILES:
        return [path]
    if suffix == ".mrxs":
        return [path, *looking.files_in(path.with_suffix(""), deep=True)]
    if suffix in (".vms", ".vmu"):
        kept = set(_without_companions(siblings := looking.files_in(path.parent)))
        return [path, *(file for file in siblings if file not in kept)]
    if suffix == ".dcm" and (uid := _series_uid(path)):
        return [f for f in looking.files_in(path.parent) if f.suffix.lower() == ".dcm" and _series_uid(f) == uid]
    return [path]


def first_of_series(path: Path) -> Path:
    """The file by which a slide is opened: of a DICOM series the first that OpenSlide recognises."""
    return _first_readable(sorted(parts_of(path))) if path.suffix.lower() == ".dcm" else path


def _samples(path: Path, chunk_bytes: int = 65_536) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for offset in (0, size // 2, max(0, size - chunk_bytes)):
            handle.seek(offset)
            digest.update(handle.read(chunk_bytes))
    return digest.digest()
