"""Tile features as a mapping from slide to arrays, whatever tool wrote them.

Axes: N tiles, D features, 2 = (x, y).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np

from extract.config import did_you_mean
from extract.features.cache import Provenance
from extract.features.folder import FeatureFolder, open_feature_folder, refuse_replaced
from extract.features.parquet import ParquetFeatures, open_parquet_features


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """The tiles of one slide.

    features: (N, D), float16 or float32 as stored. coords: (N, 2) int32, level-0 px, (x, y) of each tile's top-left
    corner; None where the files do not say them. names: of the tile images, where the features are of those.
    provenance: encoder, tile_px, mpp, ... as far as the files say it ("" and 0 = unknown).
    """

    slide: str
    features: np.ndarray = field(repr=False)
    coords: np.ndarray | None = field(repr=False)
    names: tuple[str, ...] | None = field(repr=False)
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.features)


class FeatureMapping(Mapping[str, SlideFeatures]):
    """Slide id -> `SlideFeatures`, read when it is asked for; a file that is broken then raises CacheError.

    `layout` says who wrote the files.
    """

    def __init__(
        self,
        source: FeatureFolder | ParquetFeatures,
        *,
        mpp: float | Mapping[str, float] | None = None,
        tile_level0_px: float | None = None,
        deepzoom_levels: int | Mapping[str, int] | None = None,
    ):
        self._source, self._mpp, self._side, self._levels = source, mpp, tile_level0_px, deepzoom_levels

    @property
    def layout(self) -> str:
        return self._source.layout

    def __getitem__(self, slide: str) -> SlideFeatures:
        if slide not in self._source.slides:
            raise KeyError(f"{slide!r}: no features in {self._source.folder}{did_you_mean(slide, list(self))}")
        mpp = self._mpp.get(slide) if isinstance(self._mpp, Mapping) else self._mpp
        levels = self._levels.get(slide) if isinstance(self._levels, Mapping) else self._levels
        header = self._source.header(slide)
        coords_N2 = self._source.coords(slide, mpp=mpp, tile_level0_px=self._side, deepzoom_levels=levels)
        features_ND, names = self._source.features(slide), self._source.names(slide)
        refuse_replaced(self._source, slide, header.identity)  # all of one file
        return SlideFeatures(slide, features_ND, coords_N2, names, header.provenance)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.slides)

    def __len__(self) -> int:
        return len(self._source.slides)

    def __repr__(self) -> str:
        return f"<features of {len(self)} slides in {self._source.folder} (layout {self.layout})>"


def read_features(
    folder: str | PathLike[str],
    *,
    layout: str = "auto",
    mpp: float | Mapping[str, float] | None = None,
    tile_level0_px: float | None = None,
    deepzoom_levels: int | Mapping[str, int] | None = None,
    dim: int = 768,
) -> FeatureMapping:
    """The tile features in a folder: ours, or of CLAM, TRIDENT, STAMP, HistoSSLscaling, torchmil, slideflow.

    >>> import mil, numpy, pathlib
    >>> pathlib.Path("features").mkdir()
    >>> numpy.save("features/slide_1.npy", numpy.ones((5, 768), dtype="float16"))  # as torchmil keeps them
    >>> features = mil.read_features("features")
    >>> features
    <features of 1 slides in features (layout torchmil)>
    >>> features["slide_1"].features.shape
    (5, 768)
    >>> features["slide_1"].coords is None  # this folder has none
    True
    >>> bags = [slide.features for slide in features.values()]

    Args:
        folder: the tool's folder; or a Parquet file in the schema of owkin/camelyon16-features, or a folder of such.
        layout: who wrote it, as `features.layout`; "auto" detects it.
        mpp: microns per pixel of the slides at level 0, one for all or by slide: for coordinates of STAMP, slideflow.
        tile_level0_px: a tile's side in level-0 px: for slideflow, where `mpp` is not known.
        deepzoom_levels: `level_count` of OpenSlide's DeepZoomGenerator: for HistoSSLscaling and Parquet files.
        dim: Parquet files only: features of a tile (three numbers more are its DeepZoom address).

    Raises:
        ProblemsError (extract.config): no such folder, no features in it, or features of several kinds.
    """
    path = Path(folder).expanduser()
    inside = sorted(path.glob("*.parquet")) if path.is_dir() and layout == "auto" else []
    source: FeatureFolder | ParquetFeatures
    if inside or path.suffix == ".parquet":
        source = open_parquet_features(inside or [path], dim)
    else:
        source = open_feature_folder(path, layout)
    return FeatureMapping(source, mpp=mpp, tile_level0_px=tile_level0_px, deepzoom_levels=deepzoom_levels)
