"""Labelled tiles as Parquet files of the Hugging Face hub, in the form in which `datasets` writes an image set.

Columns: `image`, a struct of `bytes` (a PNG or TIFF file) and `path`, and `label`, an integer. The classes' names stand
in the schema's metadata under `huggingface`; without them nine classes are taken for NCT-CRC-HE's. A tile's name is
SPLIT/CLASS/NUMBER, the number its row in the split. Pixels are read a group of rows at a time: memory does not grow
with the files.

Axes: N tiles, H and W rows and columns, 3 RGB.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.features.parquet import ImportProblem, SourceFile, hub_source, local_source
from extract.slides.images import decoded_tile

if TYPE_CHECKING:
    import pyarrow.parquet as pq

NCT_CRC = "owkin/nct-crc-he"
NCT_CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
GROUPS_KEPT = 2
"""Groups of rows in memory: the one that is read, and the next while threads still decode the first."""


class HubTilesError(Exception):
    """The Parquet files cannot be had or are not of this form; every argument is a problem."""


@dataclass(frozen=True)
class Row:
    """Where a tile's bytes are."""

    file: int
    group: int
    row: int


@dataclass
class HubTiles:
    """Tiles of several splits. names, labels, splits and paths (of the image, "" where unknown) go together."""

    files: tuple[SourceFile, ...]
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commit: str = ""

    def __post_init__(self) -> None:
        self._where: dict[str, Row] = {}
        self._groups: OrderedDict[tuple[int, int], list[Any]] = OrderedDict()
        self._lock = Lock()

    def add(self, name: str, label: str, split: str, path: str, where: Row) -> None:
        self.names.append(name)
        self.labels.append(label)
        self.splits.append(split)
        self.paths.append(path)
        self._where[name] = where

    def decoded(self, name: str) -> np.ndarray | str:
        """uint8 RGB (H, W, 3), or what is wrong with the tile. Several threads may ask."""
        where = self._where[name]
        try:
            with self._lock:  # pyarrow's files are not for several threads
                content = self._group(where.file, where.group)[where.row]
        except (OSError, ValueError) as error:  # pyarrow's errors are these
            return f"{self.files[where.file].path}: cannot be read ({str(error).splitlines()[0][:200]})"
        if not content:
            return "no bytes in the file; data sets with paths only hold no images"
        return decoded_tile(io.BytesIO(content))

    def _group(self, file: int, group: int) -> list[Any]:
        key = (file, group)
        if key not in self._groups:
            table = _opened(self.files[file].path).read_row_group(group, columns=["image.bytes"])
            self._groups[key] = table.column(0).combine_chunks().field("bytes").to_pylist()
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def open_hub_tiles(
    hub: str, revision: str | None, root: Path | None, splits: Sequence[str], key: str = "data.root"
) -> HubTiles:
    """The tiles of these splits, `data/SPLIT-*.parquet`, of the hub (downloaded once) or of the folder `root`.

    key: as which the user gives `root`.

    Raises:
        HubTilesError: files are missing or cannot be had, are not of this form, or hold no tile (all of it).
    """
    patterns = {split: f"data/{split}-*.parquet" for split in splits}
    try:
        source = local_source(root, patterns, key) if root else hub_source(hub, revision, patterns, print, key)
    except ImportProblem as error:
        raise HubTilesError(*error.problems) from None
    tiles = HubTiles(source.files, commit=source.revision)
    problems: list[str] = []
    counted: dict[str, int] = {}
    for index, file in enumerate(source.files):
        try:
            counted[file.split] = _add_file(tiles, index, file, counted.get(file.split, 0))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are OSError or ValueError
            problems.append(f"{file.path}: {(str(error).splitlines() or [type(error).__name__])[0][:300]}")
    problems = problems or [f"split {split}: its files hold no tile" for split in splits if not counted.get(split)]
    if problems:
        raise HubTilesError(*problems)
    tiles.notes = list(dict.fromkeys(tiles.notes))
    return tiles


def _opened(path: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def _add_file(tiles: HubTiles, index: int, file: SourceFile, first: int) -> int:
    """Names and labels of one file; the number of tiles of its split so far."""
    import pyarrow as pa

    parquet = _opened(file.path)
    schema = parquet.schema_arrow
    expected = "expected the columns image (a struct with bytes) and label (an integer)"
    kind = schema.field("image").type if "image" in schema.names else None
    if kind is None or "label" not in schema.names or not pa.types.is_struct(kind):
        raise ValueError(f"{expected}, got {', '.join(f'{f.name}: {f.type}' for f in schema)}")
    fields = [kind.field(i).name for i in range(kind.num_fields)]
    if "bytes" not in fields or not pa.types.is_integer(schema.field("label").type):
        raise ValueError(f"{expected}, got image with {', '.join(fields)} and label {schema.field('label').type}")
    classes = _class_names(schema.metadata or {})
    if classes is None:
        classes = NCT_CRC_CLASSES
        tiles.notes.append(f"the files do not name their classes: taken for {', '.join(classes)}, in this order")
    number = first
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=["label", *(["image.path"] if "path" in fields else [])])
        labels = table.column("label").to_pylist()
        paths = [row["path"] or "" for row in table.column("image").to_pylist()] if "path" in fields else []
        for row, label in enumerate(labels):
            if label is None or not 0 <= label < len(classes):
                raise ValueError(f"row {number - first + 1}: label {label}, expected 0 to {len(classes) - 1}")
            name = f"{file.split}/{classes[label]}/{number:06d}"
            path = Path(paths[row]).name if paths else ""
            tiles.add(name, classes[label], file.split, path, Row(index, group, row))
            number += 1
    return number


def _class_names(metadata: Mapping[bytes, bytes]) -> tuple[str, ...] | None:
    """As `datasets` leaves them in the schema; None where it has not."""
    try:
        about = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]
        names = about["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None
