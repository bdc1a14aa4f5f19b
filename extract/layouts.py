"""Feature folders of this cache and of other tools behind one interface.

    cache      <id>.h5                            this toolkit, see extract.cache
    clam       h5_files/<id>.h5, pt_files/<id>.pt  CLAM: features, coords (level-0 px)
    trident    features_<encoder>/<id>.h5          TRIDENT: features, coords (level-0 px), geometry on coords
    stamp      <extractor>-<hash>/<id>.h5          STAMP: feats, coords in microns
    histossl   <id>.<ext>/features.npy             HistoSSLscaling: DeepZoom level, column, row, then features
    torchmil   features/<id>.npy, coords/<id>.npy  torchmil
    slideflow  <id>.pt, <id>.index.npz             slideflow: coordinates of tile centres, level-0 px

Axes: N tiles, D features, 2 = (x, y), 3 = DeepZoom (level, column, row).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from extract import cache
from extract.cache import CacheError, Header, Provenance, check_coords, check_shape
from extract.config import ProblemsError, did_you_mean

DEEPZOOM_TILE_PX = 224
"""Tile side of the DeepZoom grid in Owkin's features."""

SLIDE_EXTENSIONS = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".dcm", ".vms", ".bif", ".vsi", ".czi", ".png", ".jpg",
)  # fmt: skip
UNFINISHED = (".partial", ".tmp")


class LayoutError(ProblemsError):
    """It cannot be told who wrote a feature folder, or it holds no features."""


# --- DeepZoom addresses --------------------------------------------------------------------------------------------


def deepzoom_to_px(address_N3: np.ndarray, frame_level: int, tile_px: int = DEEPZOOM_TILE_PX) -> np.ndarray:
    """`coords_N2` (x, y) of each tile's top-left in pixels of DeepZoom level `frame_level`.

    Args:
        address_N3: DeepZoom level, column, row; no level is above `frame_level`.
        frame_level: the level whose pixels are wanted. Level 0 of the slide is DeepZoom level `levels - 1`, with
            `levels` the `level_count` of OpenSlide's DeepZoomGenerator: each DeepZoom level has twice the pixels a
            side of the one before.
        tile_px: side of a tile at its own level.
    """
    side_N1 = tile_px * 2 ** (frame_level - address_N3[:, :1].astype(np.int64))
    return (address_N3[:, 1:] * side_N1).astype(np.int32)


def px_to_deepzoom(
    coords_N2: np.ndarray, level_N: np.ndarray, frame_level: int, tile_px: int = DEEPZOOM_TILE_PX
) -> np.ndarray:
    """The inverse of `deepzoom_to_px`: `address_N3`, int32."""
    side_N1 = tile_px * 2 ** (frame_level - level_N.astype(np.int64))[:, None]
    return np.column_stack([level_N, coords_N2 // side_N1]).astype(np.int32)


def split_deepzoom(rows_N3D: np.ndarray, where: str) -> np.ndarray:
    """The DeepZoom address (N, 3), int32, in the first three columns of `rows_N3D`.

    Raises:
        CacheError: they are not whole numbers >= 0, so these columns are no address.
    """
    address_N3 = np.asarray(rows_N3D[:, :3], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        whole_N = ((address_N3 == np.rint(address_N3)) & (address_N3 >= 0)).all(axis=1)
    if not whole_N.all():
        bad = int(np.argmin(whole_N))
        raise CacheError(
            f"{where}: expected DeepZoom level, column, row (whole numbers) in the first three columns, "
            f"got {address_N3[bad].tolist()} for tile {bad}"
        )
    return address_N3.astype(np.int32)


# --- the interface -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureFolder:
    """Features of a cohort, one file a slide, whoever wrote them.

    `folder` is where the files lie (the tool's own sub-folder, if it makes one), `layout` a key of LAYOUTS, `slides`
    maps slide id to its file, sorted by id. All methods raise CacheError, naming the file, when it is absent,
    truncated, or not what its layout says.
    """

    folder: Path
    layout: str
    slides: dict[str, Path]

    def header(self, slide: str) -> Header:
        """Shape, dtype and what the format says of the origin ("" or 0 where it does not); reads no features."""
        return self._layout.header(slide, self.path(slide))

    def features(self, slide: str) -> np.ndarray:
        """`features_ND` as stored; what is neither float16 nor float32 (float64, bfloat16) becomes float32."""
        return self._layout.features(self.path(slide))

    def mapped(self, slide: str) -> np.ndarray:
        """`features_ND` as a memory map where the file allows it, else the array (chunked or compressed HDF5)."""
        return self._layout.mapped(self.path(slide))

    def coords(
        self,
        slide: str,
        *,
        mpp: float | None = None,
        tile_level0_px: float | None = None,
        deepzoom_levels: int | None = None,
    ) -> np.ndarray | None:
        """`coords_N2`, int32, level-0 px, (x, y) of each tile's top-left corner; None when they cannot be known.

        Args:
            slide: slide id.
            mpp: the slide's level-0 microns per pixel; STAMP needs it, slideflow can use it.
            tile_level0_px: a tile's side in level-0 pixels; slideflow, which stores centres, needs this or `mpp`.
            deepzoom_levels: `level_count` of OpenSlide's DeepZoomGenerator for the slide; HistoSSLscaling and
                features imported from owkin/camelyon16-features need it.

        torchmil does not define a frame: its coordinates are returned as stored.
        """
        return self._layout.coords(self.path(slide), Known(mpp, tile_level0_px, deepzoom_levels))

    def deepzoom(self, slide: str) -> np.ndarray | None:
        """`address_N3`, int32: DeepZoom level, column, row of each tile; None when the format has no such address."""
        return self._layout.deepzoom(self.path(slide))

    def path(self, slide: str) -> Path:
        """The file of one slide."""
        if slide not in self.slides:
            raise CacheError(f"{self.folder}: no features of slide {slide!r}{did_you_mean(slide, list(self.slides))}")
        return self.slides[slide]

    @property
    def _layout(self) -> Layout:
        return LAYOUTS[self.layout]


def open_feature_folder(folder: Path, layout: str = "auto") -> FeatureFolder:
    """Find the feature files in `folder` or in the sub-folder the tool makes.

    Args:
        folder: what the user calls the feature folder: the folder of the files, or the tool's output folder around it.
        layout: a key of LAYOUTS, or "auto" to tell it from the folder's structure and from one file's content.

    Raises:
        LayoutError: no such folder, no features in it, several candidates, or two files for one slide.
    """
    folder = Path(folder)
    if layout != "auto" and layout not in LAYOUTS:
        hint = did_you_mean(layout, list(LAYOUTS))
        raise _cannot_open(f"layout {layout!r} is not one of auto, {', '.join(LAYOUTS)}{hint}")
    if not folder.is_dir():
        what = "is a file, expected a folder of feature files" if folder.exists() else "no such folder"
        raise _cannot_open(f"{folder}: {what} (features.folder)")
    tried = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    places = [(name, place) for name, one in tried.items() for place in one.places(folder)]
    found = [(name, place) for name, place in places if LAYOUTS[name].wrote(place)]
    if layout != "auto" and len(places) == 1:
        found = places  # the user said so: what is wrong with a file is said when that file is read
    if len(found) > 1:
        listed = "".join(f"\n      features.folder={place} features.layout={name}" for name, place in found)
        raise _cannot_open(f"{folder}: features of several kinds; give one of{listed}")
    if not found:
        looked_for = "".join(f"\n      {name}: {one.looks_for}" for name, one in tried.items())
        raise _cannot_open(f"{folder}: no features found. It holds {_contents(folder)}. Looked for{looked_for}")
    name, place = found[0]
    files = LAYOUTS[name].files(place)
    _refuse_doubles(files)
    return FeatureFolder(place, name, dict(sorted(files)))


def _refuse_doubles(files: Sequence[tuple[str, Path]]) -> None:
    paths: dict[str, list[Path]] = {}
    for slide, path in files:
        paths.setdefault(slide, []).append(path)
    problems = [
        f"{', '.join(map(str, several))}: {len(several)} files for slide {slide!r}; keep one"
        for slide, several in paths.items()
        if len(several) > 1
    ]
    if problems:
        raise LayoutError("problems in the feature folder", problems)


def _cannot_open(problem: str) -> LayoutError:
    return LayoutError("cannot open the feature folder", [problem])


def _contents(folder: Path) -> str:
    """What there is, for the message that nothing was found: `2 .csv files, a.h5 with datasets x, sub-folders b, c`."""
    entries = sorted(entry for entry in folder.iterdir() if _visible(entry.name))
    kinds = Counter(entry.suffix or "suffixless" for entry in entries if not entry.is_dir())
    parts = [f"{count} {kind} file{'s' if count > 1 else ''}" for kind, count in kinds.items()]
    parts += [_h5_contents(path) for path in _with_suffix(folder, ".h5")[:1]]
    inside = [entry.name for entry in entries if entry.is_dir()]
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        parts.append(f"sub-folders {', '.join(inside[:5])}{more}")
    return ", ".join(parts) or "nothing"


def _h5_contents(path: Path) -> str:
    try:
        with h5py.File(path, "r") as file:
            return f"{path.name} with datasets {', '.join(file) or 'none'}"
    except OSError as error:
        return f"{path.name}, which cannot be read ({error})"


# --- finding files -------------------------------------------------------------------------------------------------


def _visible(name: str) -> bool:
    """False for hidden and half-written files."""
    return not name.startswith(".") and not name.endswith(UNFINISHED)


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    """Files of `folder` with this suffix, sorted, without hidden and half-written ones."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.glob(f"*{suffix}") if _visible(path.name) and _visible(path.stem))
    return sorted(path for path in named if path.is_file())


def _by_stem(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    return [(path.stem, path) for path in paths]


def _subfolders(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_dir() and _visible(path.name))


def _h5_writer(path: Path) -> str:
    """The layout whose content this HDF5 file has, "" for none of ours.

    Raises:
        OSError: it cannot be read as HDF5.
    """
    with h5py.File(path, "r") as file:
        if "schema" in file.attrs:
            return "cache"
        if "feats" in file:
            return "stamp"
        if "features" not in file or "coords" not in file:
            return ""
        if path.parent.name == "h5_files":
            return "clam"
        if path.parent.name.startswith("features_") or "patch_size_level0" in file["coords"].attrs:
            return "trident"
        return "clam"


def _first_h5_writer(paths: Sequence[Path]) -> str:
    """`_h5_writer` of the first file that can be read: one truncated file must not hide who wrote the folder."""
    for path in paths:
        try:
            return _h5_writer(path)
        except OSError:
            continue
    return ""


# --- reading files -------------------------------------------------------------------------------------------------


@contextmanager
def _open_h5(path: Path, *needed: str) -> Iterator[h5py.File]:
    """An open HDF5 file that has the `needed` datasets, the first 2-D and all of the same length."""
    if not path.is_file():
        raise CacheError(f"{path}: no such feature file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        what = "truncated (its writer was interrupted)" if "truncated" in str(error) else "not an HDF5 file"
        raise CacheError(f"{path}: {what}. Delete it and extract again. ({error})") from None
    with file:
        missing = [name for name in needed if not isinstance(file.get(name), h5py.Dataset)]
        if missing:
            raise CacheError(f"{path}: expected datasets {', '.join(needed)}, got {', '.join(file) or 'none'}")
        check_shape(path, needed[0], file[needed[0]])
        for name in needed[1:]:
            check_coords(path, file[name].shape, len(file[needed[0]]))
        yield file


def _kept(dtype: np.dtype) -> np.dtype:
    """The dtype handed out for a stored one: native float16 and float32 as they are, all else float32."""
    return dtype if dtype in (np.dtype("float16"), np.dtype("float32")) else np.dtype("float32")


def _header(path: Path, features: Any, provenance: Provenance) -> Header:
    """The header of a file whose checked `features` are an array or an HDF5 dataset."""
    n_tiles, dim = features.shape
    return Header(path, n_tiles, dim, _kept(features.dtype).name, provenance)


def _as_stored(array_ND: np.ndarray) -> np.ndarray:
    return array_ND.astype(_kept(array_ND.dtype), copy=False)


def _to_px(coords_N2: np.ndarray) -> np.ndarray:
    return np.rint(coords_N2).astype(np.int32)


def _map_h5(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    offset = dataset.id.get_offset()  # None when chunked, compressed or empty
    if offset is None or _kept(dataset.dtype) != dataset.dtype:
        return _as_stored(dataset[:])
    return np.memmap(path, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)


def _load_npy(path: Path, *, mapped: bool = True) -> np.ndarray:
    """A .npy file; memory-mapped, which reads the header only and notices a truncated file."""
    if not path.is_file():
        raise CacheError(f"{path}: no such feature file")
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CacheError(f"{path}: not a whole .npy file of numbers. Delete it and extract again. ({error})") from None


def _load_pt(path: Path) -> np.ndarray:
    """A .pt file that holds one tensor, memory-mapped when it is of the zip format (PyTorch >= 1.6)."""
    import torch  # here, because this module must stay light

    if not path.is_file():
        raise CacheError(f"{path}: no such feature file")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CacheError(f"{path}: not a whole .pt file of a tensor. Delete it and extract again. ({reason})") from None
    if not isinstance(tensor, torch.Tensor):
        raise CacheError(f"{path}: expected one tensor, got {type(tensor).__name__}")
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _load_json(path: Path) -> dict[str, Any]:
    """The JSON object beside the features, {} when there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CacheError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CacheError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _number(value: Any) -> float:
    """`value` when it is a number, else 0 (= unknown), e.g. for slideflow's tile_um="20x"."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --- the layouts ---------------------------------------------------------------------------------------------------


class Known(NamedTuple):
    """What the caller knows of a slide and its file may not, see FeatureFolder.coords."""

    mpp: float | None = None
    tile_level0_px: float | None = None
    deepzoom_levels: int | None = None


class Layout:
    """One tool's way to store features. `looks_for` says in a message what its folder looks like."""

    looks_for: str

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

    def features(self, path: Path) -> np.ndarray:
        return self.mapped(path)

    def mapped(self, path: Path) -> np.ndarray:
        raise NotImplementedError

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        raise NotImplementedError

    def deepzoom(self, path: Path) -> np.ndarray | None:
        return None


class CacheLayout(Layout):
    """This toolkit's own files. Imported features may have coordinates in another frame, see extract.parquet."""

    looks_for = "<id>.h5 with datasets features, coords and attribute schema"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return _by_stem(_with_suffix(place, ".h5"))

    def wrote(self, place: Path) -> bool:
        return _first_h5_writer(_with_suffix(place, ".h5")) == "cache"

    def header(self, slide: str, path: Path) -> Header:
        return cache.read_header(path)

    def features(self, path: Path) -> np.ndarray:
        return cache.read_features(path)

    def mapped(self, path: Path) -> np.ndarray:
        return cache.map_features(path)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        provenance = cache.read_header(path).provenance
        extra = provenance.extra
        if not extra.get("coords_known", True):
            return None
        if extra.get("coords_frame", "level-0") == "level-0":
            return cache.read_coords(path)
        address_N3 = self.deepzoom(path)
        if known.deepzoom_levels is None or address_N3 is None:
            return None
        return _deepzoom_to_level0(path, address_N3, known.deepzoom_levels, provenance.tile_px)

    def deepzoom(self, path: Path) -> np.ndarray | None:
        provenance = cache.read_header(path).provenance
        if "deepzoom_level" not in provenance.extra:
            return None
        coords_N2 = cache.read_coords(path)
        level_N = np.broadcast_to(provenance.extra["deepzoom_level"], len(coords_N2))
        return px_to_deepzoom(coords_N2, level_N, provenance.extra["deepzoom_frame_level"], provenance.tile_px)



class H5Layout(Layout):
    """What CLAM, TRIDENT and STAMP have in common: an HDF5 file a slide with a features and a coords dataset."""

    dataset = "features"
    writer: str

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return _by_stem(_with_suffix(place, ".h5"))

    def wrote(self, place: Path) -> bool:
        return _first_h5_writer(_with_suffix(place, ".h5")) == self.writer

    def header(self, slide: str, path: Path) -> Header:
        with _open_h5(path, self.dataset, "coords") as file:
            features = file[self.dataset]
            return _header(path, features, self.provenance(slide, path, file))

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        raise NotImplementedError

    def features(self, path: Path) -> np.ndarray:
        with _open_h5(path, self.dataset, "coords") as file:
            return _as_stored(file[self.dataset][:])

    def mapped(self, path: Path) -> np.ndarray:
        with _open_h5(path, self.dataset, "coords") as file:
            return _map_h5(path, file[self.dataset])

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        with _open_h5(path, self.dataset, "coords") as file:
            return _to_px(file["coords"][:])


class ClamLayout(H5Layout):
    """CLAM: an .h5 and usually a .pt with the same features; a slide that has only a .pt has no coordinates."""

    looks_for = "h5_files/<id>.h5 with datasets features, coords, or pt_files/<id>.pt"
    writer = "clam"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        h5 = _with_suffix(place / "h5_files", ".h5") or _with_suffix(place, ".h5")
        pt = _with_suffix(place / "pt_files", ".pt") or _with_suffix(place, ".pt")
        with_h5 = {path.stem for path in h5}
        return _by_stem(h5) + _by_stem([path for path in pt if path.stem not in with_h5])

    def wrote(self, place: Path) -> bool:
        h5 = [path for _, path in self.files(place) if path.suffix == ".h5"]
        return _first_h5_writer(h5) == "clam" if h5 else not LAYOUTS["slideflow"].wrote(place)

    def header(self, slide: str, path: Path) -> Header:
        if path.suffix == ".h5":
            return super().header(slide, path)
        features_ND = self._from_pt(path)
        return _header(path, features_ND, Provenance(encoder="", slide=slide))

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        return Provenance(encoder="", slide=slide)

    def features(self, path: Path) -> np.ndarray:
        return super().features(path) if path.suffix == ".h5" else self._from_pt(path)

    def mapped(self, path: Path) -> np.ndarray:
        if path.suffix == ".pt":
            return self._from_pt(path)
        pt = path.parent.parent / "pt_files" / f"{path.stem}.pt"
        with _open_h5(path, "features", "coords") as file:
            features = file["features"]
            if features.chunks is None or path.parent.name != "h5_files" or not pt.is_file():
                return _map_h5(path, features)
            mapped_ND = self._from_pt(pt)  # CLAM's .h5 are chunked, its .pt can be mapped
            if mapped_ND.shape != features.shape:
                raise CacheError(f"{pt}: features of shape {mapped_ND.shape}, but {path} has {features.shape}")
            return mapped_ND

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        return super().coords(path, known) if path.suffix == ".h5" else None

    def _from_pt(self, path: Path) -> np.ndarray:
        features_ND = _load_pt(path)
        check_shape(path, "features", features_ND)
        return _as_stored(features_ND)


class TridentLayout(H5Layout):
    """TRIDENT. Its magnifications are nominal (20x), so microns per pixel stay unknown; they are kept in `extra`."""

    looks_for = "features_<encoder>/<id>.h5 with datasets features, coords and attribute patch_size_level0 on coords"
    writer = "trident"
    kept = ("level0_magnification", "target_magnification", "level0_width", "level0_height")

    def places(self, folder: Path) -> list[Path]:
        candidates = [folder, *_subfolders(folder, "features_*"), *_subfolders(folder, "*/features_*")]
        return [place for place in candidates if self.files(place)]

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        attributes = {key: _plain(value) for key, value in file["coords"].attrs.items()}
        folder_says = path.parent.name.removeprefix("features_") if path.parent.name.startswith("features_") else ""
        return Provenance(
            encoder=_text(file["features"].attrs.get("encoder", folder_says)),
            tile_px=int(attributes.get("patch_size", 0)),
            overlap_px=int(attributes.get("overlap", 0)),
            tile_level0_px=float(attributes.get("patch_size_level0", 0)),
            slide=slide,
            extra={key: attributes[key] for key in self.kept if key in attributes},
        )


class StampLayout(H5Layout):
    """STAMP. Coordinates are microns from the slide's top-left corner."""

    looks_for = "<extractor>-<hash>/<id>.h5 with datasets feats, coords"
    dataset = "feats"
    writer = "stamp"

    def places(self, folder: Path) -> list[Path]:
        return [place for place in [folder, *_subfolders(folder)] if self.files(place)]

    def provenance(self, slide: str, path: Path, file: h5py.File) -> Provenance:
        attributes = {key: _plain(value) for key, value in file.attrs.items()}
        kind = _text(attributes.get("feat_type", "tile"))
        if kind != "tile":
            raise CacheError(f"{path}: expected features of tiles (feat_type tile), got feat_type {kind}")
        tile_px = int(attributes.get("tile_size_px", 0))
        tile_um = self._tile_um(file)
        return Provenance(
            encoder=_text(attributes.get("extractor", "")),
            tile_px=tile_px,
            mpp=tile_um / tile_px if tile_px else 0.0,
            slide=slide,
            extra={"tile_um": tile_um, "unit": _text(attributes.get("unit", ""))},
        )

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        with _open_h5(path, self.dataset, "coords") as file:
            if known.mpp is None:
                return None
            if not self._tile_um(file):
                unit = _text(file.attrs.get("unit", ""))
                raise CacheError(f"{path}: expected coords in microns (attribute unit um), got unit {unit!r}")
            return _to_px(file["coords"][:].astype(np.float64) / known.mpp)

    def _tile_um(self, file: h5py.File) -> float:
        """Side of a tile in microns, 0 when the file's unit is not microns. STAMP 2.0 called it tile_size."""
        if "tile_size_um" in file.attrs:
            return float(file.attrs["tile_size_um"])
        return float(file.attrs.get("tile_size", 0)) if _text(file.attrs.get("unit", "")) == "um" else 0.0


class HistoSslLayout(Layout):
    """HistoSSLscaling (Owkin). Some of its folders have metadata.json beside the features, which is used when there."""

    looks_for = "<id>.<slide extension>/features.npy with columns DeepZoom level, column, row, features"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        found = (folder / "features.npy" for folder in _subfolders(place))
        return [(self._slide_id(path.parent.name), path) for path in found if path.is_file()]

    def wrote(self, place: Path) -> bool:
        return bool(self.files(place))

    def header(self, slide: str, path: Path) -> Header:
        rows_N3D, metadata = self._rows(path), _load_json(path.with_name("metadata.json"))
        provenance = Provenance(
            encoder=str(metadata.get("features_extractor", "")),
            tile_px=int(metadata.get("tile_size", DEEPZOOM_TILE_PX)),
            mpp=_number(metadata.get("tile_mpp")),
            tile_level0_px=_number(metadata.get("absolute_tile_size")),
            slide=slide,
        )
        return _header(path, rows_N3D[:, 3:], provenance)

    def features(self, path: Path) -> np.ndarray:
        return np.ascontiguousarray(self.mapped(path))

    def mapped(self, path: Path) -> np.ndarray:
        return _as_stored(self._rows(path)[:, 3:])

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        metadata = _load_json(path.with_name("metadata.json"))
        levels = known.deepzoom_levels or len(metadata.get("level_dimensions", ()))
        if not levels:
            return None
        tile_px = int(metadata.get("tile_size", DEEPZOOM_TILE_PX))
        return _deepzoom_to_level0(path, self.deepzoom(path), levels, tile_px)

    def deepzoom(self, path: Path) -> np.ndarray:
        return split_deepzoom(self._rows(path), str(path))

    def _rows(self, path: Path) -> np.ndarray:
        rows_N3D = _load_npy(path)
        check_shape(path, "DeepZoom address and features", rows_N3D, least_columns=4)
        return rows_N3D

    def _slide_id(self, name: str) -> str:
        stem, dot, extension = name.rpartition(".")
        return stem if f"{dot}{extension}".lower() in SLIDE_EXTENSIONS and stem else name


class TorchmilLayout(Layout):
    """torchmil: arrays of a bag under one name in the sibling folders features, labels and coords."""

    looks_for = "features/<id>.npy (and coords/<id>.npy)"

    def places(self, folder: Path) -> list[Path]:
        return [place for place in (folder / "features", folder) if self.files(place)]

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return _by_stem(_with_suffix(place, ".npy"))

    def wrote(self, place: Path) -> bool:
        return bool(self.files(place))

    def header(self, slide: str, path: Path) -> Header:
        features_ND = self._array(path)
        self._coords(path, len(features_ND))
        return _header(path, features_ND, Provenance(encoder="", slide=slide))

    def features(self, path: Path) -> np.ndarray:
        return np.array(self.mapped(path))

    def mapped(self, path: Path) -> np.ndarray:
        return _as_stored(self._array(path))

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        coords_N2 = self._coords(path, len(self._array(path)))
        return None if coords_N2 is None else _to_px(coords_N2)

    def _array(self, path: Path) -> np.ndarray:
        features_ND = _load_npy(path)
        check_shape(path, "features", features_ND)
        return features_ND

    def _coords(self, path: Path, n_tiles: int) -> np.ndarray | None:
        beside = path.parent.parent / "coords" / path.name
        if path.parent.name != "features" or not beside.is_file():
            return None
        coords_N2 = _load_npy(beside)
        check_coords(beside, coords_N2.shape, n_tiles)
        return coords_N2


class SlideflowLayout(Layout):
    """slideflow feature bags. bags_config.json, when there, names the extractor and the tile size."""

    looks_for = "<id>.pt with <id>.index.npz"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return _by_stem(_with_suffix(place, ".pt"))

    def wrote(self, place: Path) -> bool:
        return bool(_with_suffix(place, ".index.npz")) or (place / "bags_config.json").is_file()

    def header(self, slide: str, path: Path) -> Header:
        features_ND, config = self.mapped(path), _load_json(path.with_name("bags_config.json"))
        extractor = config.get("extractor")
        tile_px, tile_um = int(_number(config.get("tile_px"))), _number(config.get("tile_um"))
        provenance = Provenance(
            encoder=str(extractor.get("class", "")).rpartition(".")[2] if isinstance(extractor, dict) else "",
            tile_px=tile_px,
            mpp=tile_um / tile_px if tile_px else 0.0,
            slide=slide,
            extra={"tile_um": config["tile_um"]} if "tile_um" in config else {},
        )
        return _header(path, features_ND, provenance)

    def mapped(self, path: Path) -> np.ndarray:
        features_ND = _load_pt(path)
        check_shape(path, "features", features_ND)
        return _as_stored(features_ND)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        index = path.with_name(f"{path.stem}.index.npz")
        if not index.is_file():
            return None
        centres_N2 = self._centres(index, len(self.mapped(path)))
        tile_um = _number(_load_json(path.with_name("bags_config.json")).get("tile_um"))
        tile_level0_px = known.tile_level0_px
        if tile_level0_px is None and known.mpp and tile_um:
            tile_level0_px = int(tile_um / known.mpp)  # slideflow extracts whole pixels
        if tile_level0_px is None:
            return None
        return _to_px(centres_N2) - int(np.round(tile_level0_px / 2))  # as slideflow rounds half a tile

    def _centres(self, index: Path, n_tiles: int) -> np.ndarray:
        try:
            with np.load(index, allow_pickle=False) as file:
                if "arr_0" not in file:
                    raise CacheError(f"{index}: expected array arr_0, got {', '.join(file) or 'none'}")
                centres_N2 = file["arr_0"]
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise CacheError(f"{index}: not a whole .npz file. ({error})") from None
        check_coords(index, centres_N2.shape, n_tiles)
        return centres_N2


def _deepzoom_to_level0(path: Path, address_N3: np.ndarray, levels: int, tile_px: int = DEEPZOOM_TILE_PX) -> np.ndarray:
    finest = int(address_N3[:, 0].max(initial=0))
    if finest > levels - 1:
        raise CacheError(
            f"{path}: tiles of DeepZoom level {finest}, but a slide of {levels} DeepZoom levels ends at {levels - 1}; "
            "these features belong to another slide"
        )
    return deepzoom_to_px(address_N3, levels - 1, tile_px)


LAYOUTS: dict[str, Layout] = {
    "cache": CacheLayout(),
    "clam": ClamLayout(),
    "trident": TridentLayout(),
    "stamp": StampLayout(),
    "histossl": HistoSslLayout(),
    "torchmil": TorchmilLayout(),
    "slideflow": SlideflowLayout(),
}
