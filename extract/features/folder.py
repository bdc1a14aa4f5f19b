"""Feature folders of this cache and of other tools behind one interface.

Axes: N tiles, D features, 2 = (x, y), 3 = DeepZoom (level, column, row).
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from extract.config import did_you_mean
from extract.features.cache import Header
from extract.features.errors import CacheError
from extract.features.hdf5 import open_h5
from extract.features.layouts.layout import Known, Layout, LayoutError, visible, with_suffix
from extract.layouts import LAYOUTS
from extract.stores.sessions import bring


@dataclass(frozen=True)
class FeatureFolder:
    """Features of a cohort, one file a slide, whoever wrote them.

    `folder` is where the files lie (the tool's own sub-folder, if it makes one), `layout` a key of LAYOUTS, `slides`
    maps slide id to its file, sorted by id. `verify`: what is read or mapped is compared with its checksum, where the
    file has one. All methods raise CacheError, naming the file, when it is absent, damaged, or not
    what its layout says.
    """

    folder: Path
    layout: str
    slides: dict[str, Path]
    verify: bool = True

    def header(self, slide: str) -> Header:
        """Shape, dtype and what the format says of the origin ("" or 0 where it does not); reads no features."""
        identity = self.identity(slide)  # first: of a file that is replaced meanwhile it is then not the identity
        return replace(self._layout.header(slide, self.path(slide)), identity=identity)

    def identity(self, slide: str) -> str:
        """The same as long as the slide's features are: of their checksums, or else of the file's size and time."""
        return self._layout.identity(self.path(slide))

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

    def names(self, slide: str) -> tuple[str, ...] | None:
        """Names of the tile images that the features are of; None where the tiles are of a slide."""
        return self._layout.names(self.path(slide))

    def path(self, slide: str) -> Path:
        """The file of one slide."""
        if slide not in self.slides:
            raise CacheError(f"{self.folder}: no features of slide {slide!r}{did_you_mean(slide, list(self.slides))}")
        return self.slides[slide]

    @property
    def _layout(self) -> Layout:
        return layout_of(self.layout, verify=self.verify)


class HasIdentity(Protocol):
    """What `refuse_replaced` needs of a FeatureFolder."""

    def identity(self, slide: str) -> str: ...


def refuse_replaced(source: HasIdentity, slide: str, identity: str) -> None:
    """CacheError if the slide's file is not the one of that identity. To be asked after it was opened or read."""
    found = source.identity(slide) if identity else ""
    if found != identity:
        raise CacheError(
            f"its features file was replaced by another one after it was checked (was {identity}, is {found}). Let "
            "nothing write to features that are in use, and start again"
        )


def layout_of(name: str, *, verify: bool = True) -> Layout:
    """What reads the folders of the tool that is called `name` in LAYOUTS."""
    module, _, cls = LAYOUTS[name].partition(":")
    made: Layout = getattr(importlib.import_module(module), cls)(verify=verify)
    return made


def open_feature_folder(folder: Path, layout: str = "auto", *, verify: bool = True) -> FeatureFolder:
    """Find the feature files in `folder` or in the sub-folder the tool makes.

    Args:
        folder: what the user calls the feature folder: the folder of the files, or the tool's output folder around it.
        layout: a key of LAYOUTS, or "auto" to tell it from the folder's structure and from one file's content.
        verify: compare what is read with its checksum.

    Raises:
        LayoutError: no such folder, no features in it, several candidates, or two files for one slide.
    """
    folder = bring(Path(folder))
    if layout != "auto" and layout not in LAYOUTS:
        hint = did_you_mean(layout, list(LAYOUTS))
        raise _cannot_open(f"layout {layout!r} is not one of auto, {', '.join(LAYOUTS)}{hint}")
    if not folder.is_dir():
        what = "is a file, expected a folder of feature files" if folder.exists() else "no such folder"
        raise _cannot_open(f"{folder}: {what} (features.folder)")
    tried = {name: layout_of(name) for name in (LAYOUTS if layout == "auto" else [layout])}
    places = [(name, place) for name, one in tried.items() for place in one.places(folder)]
    found = [(name, place) for name, place in places if tried[name].wrote(place)]
    marked = {place for name, place in found if not tried[name].plain}
    found = [(name, place) for name, place in found if not (tried[name].plain and place in marked)]
    if layout != "auto" and len(places) == 1:
        found = places  # the user said so: what is wrong with a file is said when that file is read
    if len(found) > 1:
        listed = "".join(f"\n      features.folder={place} features.layout={name}" for name, place in found)
        raise _cannot_open(f"{folder}: features of several kinds; give one of{listed}")
    if not found:
        looked_for = "".join(f"\n      {name}: {one.looks_for}" for name, one in tried.items())
        raise _cannot_open(f"{folder}: no features found. It holds {_contents(folder)}. Looked for{looked_for}")
    name, place = found[0]
    files = tried[name].files(place)
    _refuse_doubles(files)
    return FeatureFolder(place, name, dict(sorted(files)), verify)


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
    entries = sorted(entry for entry in folder.iterdir() if visible(entry.name))
    kinds = Counter(entry.suffix or "suffixless" for entry in entries if not entry.is_dir())
    parts = [f"{count} {kind} file{'s' if count > 1 else ''}" for kind, count in kinds.items()]
    parts += [_h5_contents(path) for path in with_suffix(folder, ".h5")[:1]]
    inside = [entry.name for entry in entries if entry.is_dir()]
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        parts.append(f"sub-folders {', '.join(inside[:5])}{more}")
    return ", ".join(parts) or "nothing"


def _h5_contents(path: Path) -> str:
    try:
        with open_h5(path) as file:
            return f"{path.name} with datasets {', '.join(file) or 'none'}"
    except CacheError as error:
        return f"{path.name}, which cannot be read ({error})"
