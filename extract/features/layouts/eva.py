"""eva: `<name>.pt` and `manifest.csv` (origin, embeddings, target, split); no coordinates."""

from __future__ import annotations

import csv
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np

from extract.features.cache import Header, Provenance
from extract.features.errors import DAMAGED, CacheError, check_shape
from extract.features.files import as_stored, header_of
from extract.features.layouts.layout import Known, Layout, by_stem, visible

MANIFEST = "manifest.csv"
COLUMNS = {"origin", "embeddings"}


class EvaLayout(Layout):
    """kaiko-eva's writer of embeddings: a tensor (N, D), or the list of a slide's tiles one by one.

    A list is joined in memory, so `data.memory=mmap` saves none. Files are found by the manifest; they may lie in
    subfolders.
    """

    looks_for = f"{MANIFEST} with columns origin, embeddings, and the .pt files that it names"

    def files(self, place: Path) -> list[tuple[str, Path]]:
        return by_stem([place / name for name in _named(place / MANIFEST) if visible(Path(name).name)])

    def wrote(self, place: Path) -> bool:
        return bool(self.files(place))

    def header(self, slide: str, path: Path) -> Header:
        return header_of(path, self.mapped(path), Provenance(encoder="", slide=slide))

    def mapped(self, path: Path) -> np.ndarray:
        features_ND = _load(path)
        check_shape(path, "features", features_ND)
        return as_stored(features_ND)

    def coords(self, path: Path, known: Known) -> np.ndarray | None:
        return None


def _named(manifest: Path) -> list[str]:
    """Names of embeddings, each once, that lie under the manifest's folder; none if it is not eva's."""
    if not manifest.is_file():
        return []
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not COLUMNS.issubset(rows.fieldnames or []):
                return []
            names = [str(row["embeddings"] or "") for row in rows]
    except (OSError, ValueError, csv.Error):
        return []
    inside = [name for name in names if name.endswith(".pt") and not Path(name).is_absolute()]
    return sorted({name for name in inside if ".." not in Path(name).parts})


def _load(path: Path) -> np.ndarray:
    import torch  # here, because this module must stay light

    if not path.is_file():
        raise CacheError(f"{path}: no such feature file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        tiles = [stored] if isinstance(stored, torch.Tensor) else list(stored)
        rows = [tile if tile.ndim > 1 else tile[None] for tile in tiles]
        if isinstance(stored, torch.Tensor) and stored.ndim != 2:
            rows = [stored]
        joined_ND = torch.cat(rows) if rows else torch.empty(0)
        return (joined_ND.float() if joined_ND.dtype == torch.bfloat16 else joined_ND).detach().numpy()
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, *DAMAGED) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CacheError(f"{path}: not a whole .pt file of tensors. Delete it and extract again. ({reason})") from None
