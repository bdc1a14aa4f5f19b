"""The feature cache: one HDF5 file a slide, one writer, one reader. A file that exists is whole.

    features  (N, D) float16 or float32, contiguous; row i belongs to row i of coords
    coords    (N, 2) int32, level-0 pixels, (x, y) of the tile's top-left corner
    names     (N,) text, only where the tiles are image files: their names; coords are zeros then (coords_known = False)
    attributes of the file: all provenance, see `Provenance`; checksums, see extract.features.checksums

Dataset names are those of CLAM and TRIDENT, and `coords` carries TRIDENT's attributes, so their loaders read our files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from extract.features.checksums import ANNOUNCED, HOW, Checksums, check_announced, checked, with_checksums
from extract.features.errors import CacheError as CacheError
from extract.features.errors import check_coords, check_shape
from extract.features.hdf5 import is_dataset, open_h5, own_dataset
from extract.features.mapping import map_array
from extract.whole import write_whole

SCHEMA = 1
SUFFIX = ".h5"


@dataclass(frozen=True)
class Provenance:
    """Where features come from. Two files may be mixed in one study only if `same_kind` agrees.

    Lengths: `tile_px` pixels at `mpp` microns per pixel (what the encoder saw), `tile_level0_px` the tile's side in
    level-0 pixels (0 = unknown). `weights_sha256` is "" when unknown. `slide_fingerprint` identifies the slide file
    (see extract.slide), "" when unknown. `extra` holds further attributes: text, numbers or booleans.
    """

    encoder: str
    weights_sha256: str = ""
    tile_px: int = 0
    mpp: float = 0.0
    overlap_px: int = 0
    tile_level0_px: float = 0.0
    slide: str = ""
    slide_fingerprint: str = ""
    empty_reason: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def same_kind(self) -> dict[str, Any]:
        """The part that must agree across a study."""
        keys = ("encoder", "weights_sha256", "tile_px", "mpp", "overlap_px", "resample")
        return {key: getattr(self, key) for key in keys}

    @property
    def resample(self) -> str:
        """How larger cut-outs were shrunk to tiles, area or lanczos; "" when unknown.

        Files of this toolkit that state other tile settings but not this one are from before there was a choice.
        """
        before = "area" if any(key.startswith("tiles.") for key in self.extra) else ""
        return str(self.extra.get("tiles.resample", before))


@dataclass(frozen=True)
class Header:
    """What a feature file says without its features being read. `identity`: see FeatureFolder.identity."""

    path: Path
    n_tiles: int
    dim: int
    dtype: str
    provenance: Provenance
    has_checksum: bool = False
    identity: str = ""


def toolkit_version() -> str:
    try:
        return version("slide-mil")
    except PackageNotFoundError:
        return "unknown"


def write_features(
    path: Path,
    features_ND: np.ndarray,
    coords_N2: np.ndarray,
    provenance: Provenance,
    *,
    dtype: str = "float16",
    names: Sequence[str] | None = None,
) -> None:
    """Write one slide's file, whole or not at all. names: of the tile images, where the tiles are those.

    Raises:
        ValueError: shapes do not match, or a value does not fit `dtype` (would become inf).
        OSError: the disk is full, a quota is used up, the folder cannot be written to.
    """
    features_ND, coords_N2 = np.asarray(features_ND), np.asarray(coords_N2)
    if features_ND.ndim != 2 or coords_N2.shape != (len(features_ND), 2):
        raise ValueError(
            f"{path}: expected features (N, D) and coords (N, 2), got {features_ND.shape} and {coords_N2.shape}"
        )
    if names is not None and len(names) != len(features_ND):
        raise ValueError(f"{path}: expected a name for each of {len(features_ND)} tiles, got {len(names)}")
    with np.errstate(over="ignore"):  # looked for on the next line
        stored_ND = features_ND.astype(dtype)
    if np.isinf(stored_ND).any() and not np.isinf(features_ND).any():
        largest = np.abs(features_ND).max()
        raise ValueError(f"{path}: values up to {largest:g} do not fit {dtype}; use features.dtype=float32")
    attributes = asdict(provenance) | provenance.extra
    attributes.pop("extra")
    # in memory, then written in one go: HDF5 crashes when the program ends if a file's last bytes found no room on disk
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        file.attrs["schema"] = SCHEMA
        file.attrs[ANNOUNCED] = HOW
        file.attrs["writer"] = f"slide-mil {toolkit_version()}"
        for key, value in attributes.items():
            file.attrs[key] = value
        features = file.create_dataset("features", data=stored_ND)
        features.attrs["encoder"] = provenance.encoder
        features.attrs["name"] = provenance.slide
        if names is not None:
            file.create_dataset("names", data=np.array(names, dtype=object), dtype=h5py.string_dtype())
        coords = file.create_dataset("coords", data=coords_N2.astype(np.int32))
        coords.attrs["patch_size"] = provenance.tile_px
        coords.attrs["patch_size_level0"] = round(provenance.tile_level0_px)
        coords.attrs["overlap"] = provenance.overlap_px
        coords.attrs["name"] = provenance.slide
        for key in ("level0_magnification", "target_magnification", "level0_width", "level0_height"):
            if key in provenance.extra:
                coords.attrs[key] = provenance.extra[key]
        file.flush()
        image = with_checksums(file, file.id.get_file_image())
    write_whole(path, image)


@contextmanager
def open_cache_file(path: Path, *, verify: bool = True) -> Iterator[tuple[h5py.File, Checksums | None]]:
    """An open file of this cache's schema, and the checksums of its values; None if it has none, or without `verify`.

    `verify`: all but the values is compared with its checksum before HDF5 sees the file; damage there can make HDF5
    run for ever.

    Raises:
        CacheError: absent, truncated, damaged, not HDF5, or written by another program or a newer version.
    """
    checksums = checked(path) if verify and path.is_file() else None
    with open_h5(path) as file:
        schema = file.attrs.get("schema")
        if schema is None or not (is_dataset(file, "features") and is_dataset(file, "coords")):
            raise CacheError(
                f"{path}: not a file of this cache (datasets: {', '.join(file) or 'none'}). "
                "If another tool wrote it, set features.layout"
            )
        if int(schema) > SCHEMA:
            raise CacheError(f"{path}: schema {schema} is newer than this toolkit's {SCHEMA}; update slide-mil")
        if verify:
            check_announced(path, file, checksums)
        features, coords = (own_dataset(path, file, name) for name in ("features", "coords"))
        check_shape(path, "features", features)
        check_coords(path, coords.shape, features.shape[0])
        yield file, checksums


def read_header(path: Path, *, verify: bool = True) -> Header:
    """Shape and provenance of a cache file."""
    with open_cache_file(path, verify=verify) as (file, checksums):
        n_tiles, dim = file["features"].shape
        return Header(path, n_tiles, dim, file["features"].dtype.name, _provenance(file), checksums is not None)


def read_features(path: Path, *, verify: bool = True) -> np.ndarray:
    """`features_ND` as stored. `verify`, here and below: CacheError if they are not what was written."""
    checksums = checked(path) if verify and path.is_file() else None
    if checksums:
        return np.array(_map_checked(path, checksums))
    with open_cache_file(path, verify=verify) as (file, _):
        features_ND: np.ndarray = file["features"][:]
        return features_ND


def read_coords(path: Path, *, verify: bool = True) -> np.ndarray:
    """`coords_N2`, int32, level-0 px, (x, y) of each tile's top-left corner."""
    with open_cache_file(path, verify=verify) as (file, checksums):
        coords_N2: np.ndarray = file["coords"][:]
        if checksums:
            checksums.check_coords(path, coords_N2)
        return coords_N2


def read_names(path: Path, *, verify: bool = True) -> tuple[str, ...] | None:
    """Names of the tile images, in the order of the features; None where the tiles are of a slide."""
    with open_cache_file(path, verify=verify) as (file, _):
        return tuple(file["names"].asstr()[:].tolist()) if "names" in file else None


def map_features(path: Path, *, verify: bool = True) -> np.ndarray:
    """`features_ND` as a map of the file; writes never reach the file.

    `verify` reads all of it once, without HDF5; without it nothing is read until it is used.
    """
    checksums = checked(path) if verify and path.is_file() else None
    if checksums:
        return _map_checked(path, checksums)
    with open_cache_file(path, verify=verify) as (file, _):
        dataset = file["features"]
        offset = dataset.id.get_offset()
        if dataset.size == 0:
            return np.empty(dataset.shape, dataset.dtype)
        if offset is None:
            raise CacheError(f"{path}: features are chunked, cannot be memory-mapped; use data.memory=ram")
        return map_array(path, dataset.dtype, dataset.shape, offset)


def _map_checked(path: Path, checksums: Checksums) -> np.ndarray:
    if not checksums.shape[0]:
        return np.empty(checksums.shape, checksums.dtype)
    features_ND = map_array(path, checksums.dtype, checksums.shape, checksums.offset)
    checksums.check_features(path, features_ND)
    return features_ND


def _provenance(file: h5py.File) -> Provenance:
    attributes = {key: _plain(value) for key, value in file.attrs.items()}
    for key in ("schema", "writer", ANNOUNCED):
        attributes.pop(key, None)
    known = {key: attributes.pop(key) for key in Provenance.__dataclass_fields__ if key in attributes}
    return Provenance(**known, extra=attributes)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
