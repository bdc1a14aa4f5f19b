"""Owkin's features of Camelyon16 (Hugging Face dataset owkin/camelyon16-features) -> our cache and a cohort CSV.

One row of the Parquet files is one slide: `features`, list<list<float>>, its tiles, and `label`, int64. A tile has D
features, or 3 + D numbers: DeepZoom level, column and row of the tile, then the features. There is no slide id: a
slide's name is its position, `Phikon_train_000`.

The frame of the coordinates. DeepZoom level L has half the pixels a side of level L + 1; the last level, `levels - 1`,
is the slide's level 0. `levels` depends on the slide's size, which the dataset does not tell. So

    deepzoom_levels given    coords are level-0 px, attribute coords_frame = "level-0"
    not given                coords are pixels of the slide's finest DeepZoom level among its tiles (0.5 microns per
                             pixel), coords_frame = "deepzoom level 16" for instance: column * 224, row * 224
    no address in the file   coords are zeros, coords_known = False

In the first two cases the address is kept exactly: `FeatureFolder.deepzoom` gives it back, and `FeatureFolder.coords`
gives level-0 pixels once it is told `deepzoom_levels`, else None.

Axes: N tiles, D features, W numbers a tile in the file (D or 3 + D), 2 = (x, y), 3 = DeepZoom (level, column, row).
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.cells import plain_cell, safe_cell
from extract.config import ProblemsError
from extract.digest import sha256_of_file
from extract.features.another_cohort import refuse_another_cohort
from extract.features.cache import SUFFIX, CacheError, Header, Provenance, read_header, toolkit_version, write_features
from extract.features.deepzoom import deepzoom_to_level0, deepzoom_to_px, split_deepzoom
from extract.features.errors import check_memory
from extract.features.parquet_pages import DamagedError, values_of
from extract.leftovers import remove_partials_of_the_dead
from extract.owners import refuse_anothers
from extract.whole import replace_on_success, write_whole

HUB = "owkin/camelyon16-features"
PHIKON_FILES: Mapping[str, str] = {"train": "data/Phikon_train-*.parquet", "test": "data/Phikon_test-*.parquet"}
DEFAULT_REVISION = "main"
COHORT_FILE, SOURCE_FILE = "cohort.csv", "source.json"
ROWS_PER_READ = 2
"""Slides decoded at a time: 1,000 tiles x 771 float32 are 3 MB each."""
READ_BUFFER_BYTES = 1 << 20
BYTES_A_VALUE = 8
"""A float32 while it is unpacked: with the two numbers of 16 bits that say where lists begin."""
BYTES_A_LABEL = 100
"""Of a label as text in a list, at most about."""
MOST_PACKED = 50
"""How many times larger than the file its rows may be without being looked at: features are hardly larger."""


class ImportProblem(ProblemsError):
    """The features cannot be imported; what was imported before is untouched and is continued next time."""


def _cannot_import(problem: str) -> ImportProblem:
    return ImportProblem("features cannot be imported", [problem])


@dataclass(frozen=True)
class Settings:
    """What must be the same for an import to be continued or reused."""

    encoder: str
    tile_px: int
    mpp: float
    dim: int
    dtype: str
    deepzoom_levels: int | None
    files: dict[str, str]


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file; `sha256` of the whole of it says whether two imports read the same data."""

    split: str
    path: Path
    size: int
    mtime_ns: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Source:
    """Where the Parquet files come from; `hub` and `revision` (a commit) are "" for a local folder."""

    root: str
    hub: str
    requested_revision: str
    revision: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Row:
    """One slide: row `row` of `file`."""

    slide: str
    file: SourceFile
    row: int
    label: str


def import_parquet(
    folder: Path,
    *,
    root: Path | None = None,
    hub: str = HUB,
    revision: str | None = None,
    files: Mapping[str, str] | None = None,
    encoder: str = "phikon",
    tile_px: int = 224,
    mpp: float = 0.5,
    dim: int = 768,
    dtype: str = "float16",
    deepzoom_levels: int | None = None,
    label_names: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> Path:
    """Import the dataset into `folder`, or continue an import, or find that it is complete.

    Streamed: memory does not grow with the number of slides. Slides already imported from the same Parquet file (by
    SHA-256) are skipped. `cohort.csv` and `source.json` are written last: both there means complete, and then nothing
    is read again and no network is needed.

    Args:
        folder: gets one cache file a slide, cohort.csv (slide, patient, label, split) and source.json.
        root: folder that holds the Parquet files, as `root/data/x.parquet` or `root/x.parquet`; None: from the hub.
        hub: Hugging Face dataset, downloaded once through huggingface_hub into its own cache.
        revision: branch, tag or commit of the dataset; the commit it stands for is recorded.
        files: split -> pattern of its Parquet files; default PHIKON_FILES.
        encoder, tile_px, mpp: what made the features, recorded in every cache file (weights unknown).
        dim: features a tile; rows of `dim` and of `3 + dim` numbers are accepted.
        dtype: float16 or float32, how features are stored.
        deepzoom_levels: `level_count` of OpenSlide's DeepZoomGenerator, when it is known and the same for all slides.
        label_names: class names of label 0, 1, ...; None keeps the numbers.
        progress: called with a line of text now and then.

    Returns:
        Path of cohort.csv. The dataset has no patient id, so `patient` repeats the slide's name: slides of one patient,
        should there be any, cannot be kept together.

    Raises:
        ImportProblem: no files and no network; files missing, damaged or not of this schema; rows of other widths;
            `folder` holds an import from another source or with other settings (the message says which differs).
    """
    refuse_anothers(folder, "extract.run")
    settings = Settings(encoder, tile_px, mpp, dim, dtype, deepzoom_levels, dict(files or PHIKON_FILES))
    names = None if label_names is None else [str(name) for name in label_names]
    recorded = _read_record(folder)
    if recorded:
        _refuse_other_settings(folder, recorded, settings)
        if _is_same_request(folder, recorded, root, hub, revision) and recorded["label_names"] == names:
            return folder / COHORT_FILE
    source = local_source(root, settings.files) if root else hub_source(hub, revision, settings.files, progress)
    if recorded:
        _refuse_other_source(folder, recorded, source)
        if recorded["label_names"] == names:
            return folder / COHORT_FILE
    rows = _list_rows(source, names)
    refuse_another_cohort(folder / COHORT_FILE, [row.slide for row in rows])
    remove_partials_of_the_dead(folder)
    missing = _not_yet_imported(folder, rows, source, settings, progress)
    _import_rows(folder, rows, missing, source, settings, progress)
    _write_cohort(folder / COHORT_FILE, rows)
    _write_record(folder / SOURCE_FILE, source, settings, names, len(rows))
    progress(f"{len(rows)} slides in {folder}")
    return folder / COHORT_FILE


# --- source: a local folder or the hub -----------------------------------------------------------------------------


def local_source(root: Path, patterns: Mapping[str, str], key: str = "data.root") -> Source:
    """The files of a folder, which the user gave as `key`; ImportProblem where some are missing."""
    return Source(str(root.resolve()), "", "", "", _find_files(root, patterns, f"{key}={root}"))


def hub_source(
    hub: str,
    revision: str | None,
    patterns: Mapping[str, str],
    progress: Callable[[str], None],
    key: str = "data.root",
) -> Source:
    """Download what is not in huggingface_hub's cache yet, or find it there. key: takes a folder instead."""
    import huggingface_hub  # here: slow to import, and not needed for a local folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    progress(f"{hub}: looking for {', '.join(patterns.values())} on the Hugging Face hub or in its local cache")
    # HfHubHTTPError's bases hold the base class of all errors of the HTTP library that this version of the hub uses.
    # RuntimeError: that is what hf_xet, its download accelerator, raises when the connection breaks.
    failures: tuple[Any, ...] = (OSError, RuntimeError, HFValidationError, *HfHubHTTPError.__bases__)
    try:
        snapshot = huggingface_hub.snapshot_download(
            hub, repo_type="dataset", revision=revision, allow_patterns=list(patterns.values())
        )
    except failures as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportProblem(
            "features cannot be downloaded",
            [
                f"{hub} (revision {revision or DEFAULT_REVISION}): {reason}\n"
                "    Two ways out: connect to the network once (the files are then kept and no network is needed), or\n"
                f"    copy {', '.join(patterns.values())} of https://huggingface.co/datasets/{hub}\n"
                f"    to this machine by other means and pass {key}=DIR"
            ],
        ) from None
    found = _find_files(Path(snapshot), patterns, f"{hub}, downloaded to {snapshot}")
    commit = Path(snapshot).name  # the hub's cache names a snapshot by its commit
    return Source("", hub, revision or DEFAULT_REVISION, commit, found)


def _find_files(root: Path, patterns: Mapping[str, str], where: str) -> tuple[SourceFile, ...]:
    """All shards of every split, in the order of their names."""
    if not root.is_dir():
        raise _cannot_import(f"{where}: no such folder")
    found: list[tuple[str, Path]] = []
    problems = []
    for split, pattern in patterns.items():
        paths = _matching(root, pattern)
        if not paths:
            there = ", ".join(_there(root)[:8]) or "nothing"
            wanted = f"{pattern} or {Path(pattern).name}"
            problems.append(f"{where}: expected {wanted} for split {split}, got {there}")
        problems += _missing_shards(paths)
        found += [(split, path) for path in paths]
    twice = [path for path, count in Counter(path for _, path in found).items() if count > 1]
    problems += [f"{path}: matches the patterns of several splits" for path in twice]
    if problems:
        raise ImportProblem("features cannot be imported", problems)
    return tuple(_source_file(split, path) for split, path in found)


def _there(root: Path) -> list[str]:
    """What lies where Parquet files are looked for."""
    inside = [f"data/{path.name}" for path in root.glob("data/*")]
    return sorted(inside or [path.name for path in root.iterdir()])


def _matching(root: Path, pattern: str) -> list[Path]:
    """Files as the dataset arranges them (data/x.parquet), else all in one folder."""
    return sorted(root.glob(pattern)) or sorted(root.glob(Path(pattern).name))


def _missing_shards(paths: Sequence[Path]) -> list[str]:
    """`x-00000-of-00003.parquet` announces three files; without one of them, later slides would get wrong names."""
    problems = []
    shards: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        match = re.fullmatch(r"(.*)-(\d+)-of-(\d+)(-\w+)?", path.stem)
        if match:
            shards.setdefault((path.parent, match[1], int(match[3])), set()).add(int(match[2]))
    for (parent, prefix, count), present in shards.items():
        absent = [str(i) for i in range(count) if i not in present]
        if absent:
            problems.append(f"{parent}: {prefix} has {count} files, number {', '.join(absent)} is not there")
    return problems


def _source_file(split: str, path: Path) -> SourceFile:
    status = path.stat()  # first: what replaces the file while it is read is then not this one
    return SourceFile(split, path, status.st_size, status.st_mtime_ns, sha256_of_file(path))


def _refuse_replaced(file: SourceFile) -> None:
    """CacheError if the file is no longer the one whose slides were listed. To be asked after it was opened or read."""
    try:
        status = file.path.stat()
    except OSError as error:
        raise CacheError(f"{file.path}: cannot be read any more ({error.strerror})") from None
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise CacheError(
            f"{file.path}: was replaced by another file, or written to, after its slides were listed. Let nothing "
            "write to files that are in use, and start again"
        )


# --- source.json: what a complete import was made from -------------------------------------------------------------


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a complete import, None when there is none or a slide of it is gone."""
    source_json, cohort_csv = folder / SOURCE_FILE, folder / COHORT_FILE
    if not (source_json.is_file() and cohort_csv.is_file()):
        return None
    try:
        record = json.loads(source_json.read_text(encoding="utf-8"))
        slides = [
            plain_cell(row["slide"]) for row in csv.DictReader(cohort_csv.read_text(encoding="utf-8").splitlines())
        ]
        complete = len(slides) == record["n_slides"]
    except (ValueError, KeyError, TypeError) as error:
        raise _cannot_import(
            f"{source_json}, {cohort_csv}: not written by this import ({error!r}). Use another folder or delete them"
        ) from None
    return record if complete and all((folder / f"{slide}{SUFFIX}").is_file() for slide in slides) else None


def _write_record(path: Path, source: Source, settings: Settings, names: list[str] | None, n_slides: int) -> None:
    files = [
        {"split": f.split, "name": f.name, "size": f.size, "mtime_ns": f.mtime_ns, "sha256": f.sha256}
        for f in source.files
    ]
    record = {
        "hub": source.hub,
        "requested_revision": source.requested_revision,
        "revision": source.revision,
        "root": source.root,
        "files": files,
        "settings": asdict(settings),
        "label_names": names,
        "n_slides": n_slides,
        "writer": f"slide-mil {toolkit_version()}",
    }
    write_whole(path, json.dumps(record, indent=2) + "\n")


def _refuse_other_settings(folder: Path, record: dict[str, Any], settings: Settings) -> None:
    wanted = asdict(settings)
    _refuse(folder, {key: (record["settings"].get(key), value) for key, value in wanted.items()})


def _refuse_other_source(folder: Path, record: dict[str, Any], source: Source) -> None:
    """The same files by SHA-256 are the same source, wherever they lie."""
    was = [(f["split"], f["name"], f["sha256"]) for f in record["files"]]
    now = [(f.split, f.name, f.sha256) for f in source.files]
    if was != now:
        _refuse(
            folder,
            {
                "hub": (record["hub"], source.hub),
                "revision": (record["revision"], source.revision),
                "root": (record["root"], source.root),
                "files (split, name, SHA-256)": (was, now),
            },
        )


def _refuse(folder: Path, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    differing = [f"{key} was {was!r}, now {now!r}" for key, (was, now) in pairs.items() if was != now]
    if differing:
        problems = [f"{folder}: {text}" for text in differing]
        problems.append("Use another folder for this import, or delete that one")
        raise ImportProblem("the folder holds features imported otherwise", problems)


def _is_same_request(folder: Path, record: dict[str, Any], root: Path | None, hub: str, revision: str | None) -> bool:
    """Whether the complete import is what is asked for, told without a network and without reading Parquet files."""
    if root is not None:
        unchanged = [(f["name"], f["size"], f["mtime_ns"]) for f in record["files"]]
        if record["root"] != str(root.resolve()):
            return False
        return not root.exists() or unchanged == _stamps(root, record["settings"]["files"])
    if not record["hub"]:
        return False
    _refuse(folder, {"hub": (record["hub"], hub)})
    if (revision or DEFAULT_REVISION) not in (record["requested_revision"], record["revision"]):
        _refuse(folder, {"revision": (record["revision"], revision or DEFAULT_REVISION)})
    return True


def _stamps(root: Path, patterns: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """Name, size and time of the files, without reading them."""
    paths = [path for pattern in patterns.values() for path in _matching(root, pattern)]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


# --- rows ----------------------------------------------------------------------------------------------------------


def _list_rows(source: Source, names: list[str] | None) -> list[Row]:
    """Every slide of the dataset with its name and label; reads the label columns only."""
    labels = {file: _read_labels(file.path, names) for file in source.files}
    in_split = Counter[tuple[str, str]]()
    for file in source.files:
        in_split[file.split, _prefix(file)] += len(labels[file])
    rows = []
    position = Counter[tuple[str, str]]()
    for file in source.files:
        group = (file.split, _prefix(file))
        digits = max(3, len(str(in_split[group] - 1)))
        for row, label in enumerate(labels[file]):
            rows.append(Row(f"{_prefix(file)}_{position[group]:0{digits}d}", file, row, label))
            position[group] += 1
    twice = [slide for slide, count in Counter(row.slide for row in rows).items() if count > 1]
    if twice:
        raise _cannot_import(
            f"{len(twice)} slides of different splits get the same name, e.g. {twice[0]}; rename the Parquet files"
        )
    return rows


def _prefix(file: SourceFile) -> str:
    """`Phikon_train` of Phikon_train-00000-of-00001.parquet."""
    return file.path.stem.partition("-")[0]


def _read_labels(path: Path, names: list[str] | None) -> list[str]:
    import pyarrow as pa

    with _open_parquet(path) as file, _arrow_errors(path):
        schema = file.schema_arrow
        fields: dict[str, Any] = {name: schema.field(name).type for name in schema.names}
        features, label = fields.get("features"), fields.get("label")
        if not (_is_list_of_lists_of_floats(features) and label is not None and pa.types.is_integer(label)):
            got = ", ".join(f"{name}: {kind}" for name, kind in fields.items())
            raise _cannot_import(f"{path}: expected columns features: list<list<float>> and label: int64, got {got}")
        values = file.read(columns=["label"]).column("label").to_pylist()
    out_of_range = [v for v in values if names is not None and v is not None and not 0 <= v < len(names)]
    if out_of_range:
        raise _cannot_import(
            f"{path}: expected labels 0..{len(names or []) - 1} for label_names {names}, got {out_of_range[0]}"
        )
    return ["" if v is None else names[v] if names else str(v) for v in values]


def _is_list_of_lists_of_floats(kind: Any) -> bool:
    from pyarrow import types

    for _ in range(2):
        if kind is None or not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            return False
        kind = kind.value_type
    is_float: bool = types.is_floating(kind)
    return is_float


def _open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile that reads a column through a small buffer instead of whole."""
    import pyarrow.parquet as pq

    with _arrow_errors(path):
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        _check_sizes(path, file.metadata)
        return file


def _check_sizes(path: Path, metadata: Any) -> None:
    """Refuse a file that unpacks to more than the memory before it is read.

    Features of tiles hardly get smaller when they are packed, so what does is looked at as one piece; what does not is
    read a few rows at a time and may be larger than the memory.
    """
    size, n_rows = path.stat().st_size, metadata.num_rows
    unpacked = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    try:
        values = values_of(path, "features")
    except DamagedError as error:
        raise _cannot_import(f"{path}: not a whole Parquet file: {error}") from None
    unpacked = [max(pair) for pair in zip(unpacked, [n * BYTES_A_VALUE for n in values], strict=True)]
    if n_rows < 0 or min(unpacked, default=0) < 0:
        raise _cannot_import(f"{path}: not a whole Parquet file: declares {n_rows:,} rows, {sum(unpacked):,} bytes")
    try:
        check_memory(path, f"a table of {n_rows:,} rows", n_rows * BYTES_A_LABEL)
        for n_bytes in unpacked:
            if n_bytes > MOST_PACKED * size:
                check_memory(path, f"a group of rows of {n_bytes:,} bytes", n_bytes)
    except CacheError as error:
        raise _cannot_import(str(error)) from None


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Arrow's errors about a damaged file as ours, which name the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            is_pointer = file.read(20).startswith(b"version https://git-")
        hint = "a Git LFS pointer, not the file itself; run `git lfs pull`" if is_pointer else str(error)
        raise _cannot_import(f"{path}: not a whole Parquet file: {hint}") from None


def _stream_rows(path: Path, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Row number and tiles (N, W) of the wanted rows, a few in memory at a time; (0, 0) where there are no tiles."""
    with _open_parquet(path) as file, _arrow_errors(path):
        first = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if not wanted.isdisjoint(range(first, first + n_rows)):
                row = first
                for batch in file.iter_batches(ROWS_PER_READ, [group], columns=["features"], use_threads=False):
                    for i in range(batch.num_rows):
                        if row in wanted:
                            yield row, _tiles(batch.column(0).slice(i, 1), f"{path}: row {row}")
                        row += 1
            first += n_rows


def _tiles(row: Any, where: str) -> np.ndarray:
    """One list<list<float>> cell as an array (N, W), a view of Arrow's buffer."""
    import pyarrow.compute as pc

    tiles = row.flatten()
    values = tiles.flatten()
    if row.null_count or tiles.null_count or values.null_count:
        raise _cannot_import(f"{where}: expected numbers, got nulls")
    if not len(tiles):
        return np.empty((0, 0), np.float32)
    widths = np.unique(pc.list_value_length(tiles).to_numpy(zero_copy_only=False))
    if len(widths) > 1:
        raise _cannot_import(f"{where}: tiles of different widths in one slide: {widths.tolist()}")
    tiles_ND: np.ndarray = values.to_numpy(zero_copy_only=False).reshape(len(tiles), int(widths[0]))
    return tiles_ND


# --- writing -------------------------------------------------------------------------------------------------------


def _not_yet_imported(
    folder: Path, rows: Sequence[Row], source: Source, settings: Settings, progress: Callable[[str], None]
) -> set[str]:
    """Slides without a whole cache file. Files of another source or with other settings are refused."""
    missing = set()
    for row in rows:
        path = folder / f"{row.slide}{SUFFIX}"
        if not path.is_file():
            missing.add(row.slide)
            continue
        try:
            header = read_header(path)
        except CacheError as error:
            progress(f"imported again: {error}")
            missing.add(row.slide)
        else:
            _refuse_other_origin(header, row, source, settings)
    return missing


def _refuse_other_origin(header: Header, row: Row, source: Source, settings: Settings) -> None:
    was, extra = header.provenance, header.provenance.extra
    pairs = {
        "encoder": (was.encoder, settings.encoder),
        "tile_px": (was.tile_px, settings.tile_px),
        "mpp": (was.mpp, settings.mpp),
        "dim": (header.dim, settings.dim),
        "dtype": (header.dtype, settings.dtype),
        "deepzoom_levels": (extra.get("deepzoom_levels") or None, settings.deepzoom_levels),
        "row": (extra.get("source_row"), row.row),
    }
    if extra.get("source_sha256") != row.file.sha256:
        pairs |= {
            "hub": (extra.get("hub"), source.hub),
            "revision": (extra.get("revision"), source.revision),
            "Parquet file": (extra.get("source_file"), row.file.name),
            "SHA-256 of the Parquet file": (extra.get("source_sha256"), row.file.sha256),
        }
    _refuse(header.path, pairs)


def _import_rows(
    folder: Path,
    rows: Sequence[Row],
    missing: set[str],
    source: Source,
    settings: Settings,
    progress: Callable[[str], None],
) -> None:
    done = len(rows) - len(missing)
    every = max(1, len(rows) // 10)
    for file in source.files:
        wanted = {row.row: row for row in rows if row.file is file and row.slide in missing}
        if not wanted:
            continue
        progress(f"{file.path}: importing {len(wanted)} slides ({done} of {len(rows)} done)")
        for number, tiles_NW in _stream_rows(file.path, set(wanted)):
            _still_the_same(file)
            _import_row(folder, wanted[number], tiles_NW, source, settings)
            done += 1
            if done % every == 0:
                progress(f"{done} of {len(rows)} slides imported")


def _still_the_same(file: SourceFile) -> None:
    """Rows of another file would be imported under this one's sha256."""
    try:
        _refuse_replaced(file)
    except CacheError as error:
        raise _cannot_import(str(error)) from None


def _import_row(folder: Path, row: Row, tiles_NW: np.ndarray, source: Source, settings: Settings) -> None:
    where = f"{row.file.path}: row {row.row}"
    width, dim = tiles_NW.shape[1], settings.dim
    if len(tiles_NW) and width not in (dim, dim + 3):
        raise _cannot_import(
            f"{where}: expected tiles of {dim} or {dim + 3} numbers (DeepZoom address and features), got {width}"
        )
    extra: dict[str, Any] = {
        "hub": source.hub,
        "revision": source.revision,
        "source_file": row.file.name,
        "source_sha256": row.file.sha256,
        "source_row": row.row,
        "deepzoom_levels": settings.deepzoom_levels or 0,
        "coords_known": width == dim + 3,
    }
    coords_N2 = np.zeros((len(tiles_NW), 2), np.int32)
    tile_level0_px = 0.0
    if width == dim + 3:
        try:
            address_N3 = split_deepzoom(tiles_NW, where)
        except CacheError as error:
            raise _cannot_import(str(error)) from None
        coords_N2, tile_level0_px, frame = _place(address_N3, settings, where)
        extra |= frame | {"tiles.resample": "lanczos"}  # which is how OpenSlide's DeepZoom shrinks
    provenance = Provenance(
        encoder=settings.encoder,
        tile_px=settings.tile_px,
        mpp=settings.mpp,
        tile_level0_px=tile_level0_px,
        slide=row.slide,
        empty_reason="" if len(tiles_NW) else "no tiles in the source row",
        extra=extra,
    )
    features_ND = tiles_NW[:, width - dim :] if len(tiles_NW) else np.empty((0, dim), np.float32)
    try:
        write_features(folder / f"{row.slide}{SUFFIX}", features_ND, coords_N2, provenance, dtype=settings.dtype)
    except (ValueError, OSError) as error:  # values that do not fit dtype; disk full
        raise _cannot_import(f"{where} -> {folder}: {error}") from None


def _place(address_N3: np.ndarray, settings: Settings, where: str) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Coordinates, a tile's level-0 side (0 = unknown or not one) and the attributes that name the frame."""
    level_N = address_N3[:, 0]
    finest = int(level_N.max())
    frame_level = finest if settings.deepzoom_levels is None else settings.deepzoom_levels - 1
    if finest > frame_level:
        raise _cannot_import(
            f"{where}: expected DeepZoom levels up to deepzoom_levels - 1 = {frame_level}, got {finest}"
        )
    one_level = bool((level_N == finest).all())
    frame = {
        "coords_frame": f"deepzoom level {finest}" if settings.deepzoom_levels is None else "level-0",
        "deepzoom_frame_level": frame_level,
        "deepzoom_level": finest if one_level else level_N,
    }
    known_side = one_level and settings.deepzoom_levels is not None
    tile_level0_px = float(settings.tile_px * 2 ** (frame_level - finest)) if known_side else 0.0
    return deepzoom_to_px(address_N3, frame_level, settings.tile_px), tile_level0_px, frame


def _write_cohort(path: Path, rows: Sequence[Row]) -> None:
    with replace_on_success(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "patient", "label", "split"])
        for row in rows:
            writer.writerow([safe_cell(cell) for cell in (row.slide, row.slide, row.label, row.file.split)])


# --- without an import ---------------------------------------------------------------------------------------------


class ParquetFeatures:
    """The slides of Parquet files where they lie; answers as `extract.features.folder.FeatureFolder` does.

    Rows are found one after the other: asking for slides in their order reads each file once. A file that is not the
    one any more whose slides were listed is refused: CacheError.
    """

    layout = "parquet"

    def __init__(self, folder: Path, rows: Sequence[Row], dim: int):
        self.folder, self.dim = folder, dim
        self.slides = {row.slide: row for row in rows}
        self._stream: tuple[Path | None, Iterator[tuple[int, np.ndarray]]] = (None, iter(()))
        self._last: tuple[str, np.ndarray] = ("", np.empty((0, 0), np.float32))

    def features(self, slide: str) -> np.ndarray:
        """`features_ND`, float32."""
        tiles_NW = self._tiles(slide)
        return np.ascontiguousarray(tiles_NW[:, tiles_NW.shape[1] - self.dim :], dtype=np.float32)

    def header(self, slide: str) -> Header:
        """Shape and origin; the files say neither encoder nor microns per pixel."""
        path, known = self.slides[slide].file.path, Provenance(encoder="", slide=slide)
        return Header(path, len(self._tiles(slide)), self.dim, "float32", known, identity=self.identity(slide))

    def identity(self, slide: str) -> str:
        """The same as long as the slide's features are: the file's size and time, and the row."""
        row = self.slides[slide]
        _refuse_replaced(row.file)
        return f"{row.file.size} bytes of {row.file.mtime_ns} ns, row {row.row}"

    def coords(
        self,
        slide: str,
        *,
        mpp: float | None = None,
        tile_level0_px: float | None = None,
        deepzoom_levels: int | None = None,
    ) -> np.ndarray | None:
        """`coords_N2`, level-0 px; None unless the tiles have an address and `deepzoom_levels` is known."""
        tiles_NW = self._tiles(slide)
        if deepzoom_levels is None or tiles_NW.shape[1] == self.dim:
            return None
        path = self.slides[slide].file.path
        return deepzoom_to_level0(path, split_deepzoom(tiles_NW, f"{path}: slide {slide}"), deepzoom_levels)

    def names(self, slide: str) -> None:
        return None

    def _tiles(self, slide: str) -> np.ndarray:
        """tiles_NW of its row, W = dim or 3 + dim; the last one asked for is kept."""
        if self._last[0] == slide:
            return self._last[1]
        row = self.slides[slide]
        path, following = self._stream
        number, tiles_NW = next(following, (-1, self._last[1]))
        if path != row.file.path or number != row.row:
            wanted = {r.row for r in self.slides.values() if r.file is row.file and r.row >= row.row}
            self._stream = (row.file.path, _stream_rows(row.file.path, wanted))
            _, tiles_NW = next(self._stream[1])
        _refuse_replaced(row.file)
        width = tiles_NW.shape[1] if len(tiles_NW) else self.dim
        if width not in (self.dim, self.dim + 3):
            where = f"{row.file.path}: row {row.row}"
            raise _cannot_import(f"{where}: expected tiles of {self.dim} or {self.dim + 3} numbers, got {width}")
        tiles_NW = tiles_NW if len(tiles_NW) else np.empty((0, self.dim), np.float32)
        self._last = (slide, tiles_NW)
        return tiles_NW


def open_parquet_features(paths: Sequence[Path], dim: int) -> ParquetFeatures:
    """The slides of these files, named as `import_parquet` names them.

    Raises:
        ImportProblem: a file is missing, damaged or of another schema.
    """
    problems = [f"{path}: no such file" for path in paths if not path.is_file()] + _missing_shards(paths)
    if problems:
        raise ImportProblem("cannot read the features", problems)
    stamps = [path.stat() for path in paths]
    files = tuple(SourceFile("", p, s.st_size, s.st_mtime_ns, "") for p, s in zip(paths, stamps, strict=True))
    rows = _list_rows(Source("", "", "", "", files), None)
    return ParquetFeatures(paths[0] if len(paths) == 1 else paths[0].parent, rows, dim)
