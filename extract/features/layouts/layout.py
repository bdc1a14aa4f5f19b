"""What the layouts of all tools have in common: the interface, finding files, HDF5 with features and coordinates.

Axes: N tiles, D features, 2 = (x, y), 3 = DeepZoom (level, column, row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from extract.config import ProblemsError
from extract.features.cache import Header, Provenance
from extract.features.errors import CacheError
from extract.features.files import as_stored, header_of, map_h5, to_px
from extract.features.hdf5 import is_dataset, open_h5

SLIDE_EXTENSIONS = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".dcm", ".vms", ".bif", ".vsi", ".czi", ".png", ".jpg",
)  # fmt: skip

UNFINISHED = (".partial", ".tmp")


class LayoutError(ProblemsError):
    """It cannot be told who wrote a feature folder, or it holds no features."""


def visible(name: str) -> bool:
    """False for hidden and half-written files."""
    return not name.startswith(".") and not name.endswith(UNFINISHED)


def with_suffix(folder: Path, suffix: str) -> list[Path]:
    """Files of `folder` with this suffix, sorted, without hidden and half-written ones."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.glob(f"*{suffix}") if visible(path.name) and visible(path.stem))
    return sorted(path for path in named if path.is_file())


def by_stem(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    return [(path.stem, path) for path in paths]


def subfolders(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_dir() and visible(path.name))


def first_readable(paths: Sequence[Path], ask: Callable[[Path, h5py.File], bool]) -> bool:
    """`ask` of the first file that can be read: one truncated file must not hide who wrote the folder."""
    for path in paths:
        try:
            with open_h5(path) as file:
                return ask(path, file)
        except CacheError:
            continue
    return False


class Known(NamedTuple):
    """What the caller knows of a slide and its file may not, see FeatureFolder.coords."""

    mpp: float | None = None
    tile_level0_px: float | None = None
    deepzoom_levels: int | None = None


class Layout:
    """One tool's way to store features.

    `looks_for` says in a message what its folder looks like. `plain`: its files have no mark of their own, so they are
    taken for this tool's only where no other tool knows them.
    """

    looks_for: str
    plain = False

    def __init__(self, *, verify: bool = True):
        """`verify`: what is read is compared with its checksum, where this tool's files have one."""
        self.verify = verify

    def places(self, folder: Path) -> list[Path]:
        """`folder` and those of its sub-folders in which this tool's files may lie, as far as names tell."""
        return [folder] if self.files(folder) else []

    def files(self, place: Path) -> list[tuple[str, Path]]:
        """Slide id and file of every slide in `place`."""
        raise NotImplementedError

    def wrote(self, place: Path) -> bool:
        """Whether the files in `place` have this tool's content."""
        raise NotImplementedError

    def header(self, slide: str, path: Path) -> Header:
        raise NotImplementedError

    def identity(self, path: Path) -> str:
        """What another file for the same slide has otherwise: of files without checksums, bytes and time of writing."""
        try:
            found = path.stat()
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error})") from None
        return f"{found.st_size} bytes of {found.st_mtime_ns} ns"

    def features(self, path: Path) -> np.ndarray:
        return self.mapped(path)

    def mapped(self, path: Path) -> np.ndarray:
        raise NotImplementedError

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        raise NotImplementedError

    def deepzoom(self, path: Path) -> np.ndarray | None:
        return None

    def names(self, path: Path) -> tuple[str, ...] | None:
        return None


class H5Layout(Layout):
    """What CLAM, TRIDENT and STAMP have in common: an HDF5 file a slide with a features and a coords dataset."""

    dataset = "features"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return by_stem(with_suffix(place, ".h5"))

    def wrote(self, place: Path) -> bool:
        return first_readable([path for _, path in self.files(place) if path.suffix == ".h5"], self.wrote_file)

    def wrote_file(self, path: Path, file: h5py.File) -> bool:
        """Whether an HDF5 file has this tool's content."""
        return "schema" not in file.attrs and all(is_dataset(file, name) for name in (self.dataset, "coords"))

    def header(self, slide: str, path: Path) -> Header:
        with open_h5(path, self.dataset, "coords") as file:
            features = file[self.dataset]
            return header_of(path, features, self.provenance(slide, path, file))

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        raise NotImplementedError

    def features(self, path: Path) -> np.ndarray:
        with open_h5(path, self.dataset, "coords") as file:
            return as_stored(file[self.dataset][:])

    def mapped(self, path: Path) -> np.ndarray:
        with open_h5(path, self.dataset, "coords") as file:
            return map_h5(path, file[self.dataset])

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        with open_h5(path, self.dataset, "coords") as file:
            return to_px(path, file["coords"][:])
