"""Features written as other tools write theirs, so that their loaders read them.

Axes: N tiles, D features, 2 = (x, y) of a tile's top-left corner.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from extract.features.cache import Provenance
from extract.whole import replace_on_success, write_whole

NOT_READ = np.empty((0, 0), np.float32)
"""In place of features that nobody has asked for yet."""


@dataclass(frozen=True)
class SlideFeatures:
    """A slide's features as stored, with what is known of its tiles. `coords_N2`: level-0 px, None if unknown."""

    slide: str
    features_ND: np.ndarray
    coords_N2: np.ndarray | None
    provenance: Provenance

    @property
    def slide_mpp(self) -> float:
        """Microns per level-0 pixel; 0 = unknown."""
        said = self.provenance.extra.get("slide_mpp", 0.0)
        tile_um = self.provenance.mpp * self.provenance.tile_px
        level0_px = self.provenance.tile_level0_px
        return float(said) or (tile_um / level0_px if level0_px else 0.0)

    @property
    def encoder_folder(self) -> str:
        """The encoder as the name of one folder: `hf:OWNER/NAME` would be two, and Windows takes no colon."""
        return re.sub(r"[^\w.+-]", "-", self.provenance.encoder) or "unknown"

    @property
    def corners_N2(self) -> np.ndarray:
        assert self.coords_N2 is not None
        return self.coords_N2


def to_clam(root: Path, one: SlideFeatures) -> None:
    """`h5_files/<id>.h5` and `pt_files/<id>.pt`; the latter alone where coordinates are unknown."""
    if one.coords_N2 is not None:
        _write_h5(root / "h5_files" / f"{one.slide}.h5", {"features": one.features_ND, "coords": one.coords_N2})
    _write_pt(root / "pt_files" / f"{one.slide}.pt", one.features_ND)


def to_trident(root: Path, one: SlideFeatures) -> None:
    """`features_<encoder>/<id>.h5`, the tiles' geometry on coords."""
    made = one.provenance
    about = {
        "patch_size": made.tile_px,
        "patch_size_level0": round(made.tile_level0_px),
        "overlap": made.overlap_px,
        **{key: made.extra[key] for key in TRIDENTS if key in made.extra},
    }
    _write_h5(
        root / f"features_{one.encoder_folder}" / f"{one.slide}.h5",
        {"features": one.features_ND, "coords": one.corners_N2.astype(np.int64)},
        on={"features": {"encoder": made.encoder, "name": one.slide}, "coords": about},
    )


TRIDENTS = ("target_magnification", "level0_magnification", "level0_width", "level0_height")


def to_stamp(root: Path, one: SlideFeatures) -> None:
    """`<encoder>-ours/<id>.h5`: feats in float16, coords in microns."""
    made = one.provenance
    about = {
        "extractor": made.encoder,
        "feat_type": "tile",
        "unit": "um",
        "tile_size_um": made.mpp * made.tile_px,
        "tile_size_px": made.tile_px,
    }
    microns_N2 = (one.corners_N2 * one.slide_mpp).astype(np.float64)
    datasets: dict[str, np.ndarray] = {"feats": one.features_ND.astype(np.float16), "coords": microns_N2}
    _write_h5(root / f"{one.encoder_folder}-slide-mil" / f"{one.slide}.h5", datasets, on={"": about})


def to_torchmil(root: Path, one: SlideFeatures) -> None:
    """`features/<id>.npy`, `coords/<id>.npy`."""
    _write_npy(root / "features" / f"{one.slide}.npy", one.features_ND)
    if one.coords_N2 is not None:
        _write_npy(root / "coords" / f"{one.slide}.npy", one.coords_N2)


def to_slideflow(root: Path, one: SlideFeatures) -> None:
    """`<id>.pt`, `<id>.index.npz` with tile centres, `bags_config.json`."""
    made = one.provenance
    _write_pt(root / f"{one.slide}.pt", one.features_ND)
    centres_N2 = one.corners_N2 + int(np.round(made.tile_level0_px / 2))
    with replace_on_success(root / f"{one.slide}.index.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, centres_N2)
    config = {"extractor": {"class": made.encoder}, "tile_px": made.tile_px, "tile_um": made.mpp * made.tile_px}
    _write_json(root / "bags_config.json", config)


def to_slide2vec(root: Path, one: SlideFeatures) -> None:
    """`tile_embeddings/<id>.pt` with `<id>.meta.json`; `tiles/<id>.coordinates.npz` with its JSON."""
    made = one.provenance
    _write_pt(root / "tile_embeddings" / f"{one.slide}.pt", one.features_ND)
    tiling = {
        "requested_tile_size_px": made.tile_px,
        "requested_spacing_um": made.mpp,
        "tile_size_lv0": round(made.tile_level0_px),
        "overlap": made.overlap_px / made.tile_px if made.tile_px else 0.0,
        "n_tiles": len(one.features_ND),
    }
    about = {
        "sample_id": one.slide,
        "artifact_type": "tile_embeddings",
        "format": "pt",
        "feature_dim": one.features_ND.shape[1],
        "num_tiles": len(one.features_ND),
        "encoder_name": made.encoder,
        "tile_size_lv0": tiling["tile_size_lv0"],
    }
    _write_json(root / "tile_embeddings" / f"{one.slide}.meta.json", about)
    if one.coords_N2 is None:
        return
    x_N, y_N = one.coords_N2.astype(np.int64).T
    with (
        replace_on_success(root / "tiles" / f"{one.slide}.coordinates.npz") as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez_compressed(file, tile_index=np.arange(len(x_N), dtype=np.int32), x=x_N, y=y_N)
    _write_json(root / "tiles" / f"{one.slide}.coordinates.meta.json", {"tiling": tiling})


def to_atlaspatch(root: Path, one: SlideFeatures) -> None:
    """`patches/<id>.h5`: group features/<encoder>, coords (N, 5)."""
    made = one.provenance
    level = int(made.extra.get("level", 0))
    side_px = int(made.extra.get("read_px", made.tile_px))
    geometry_N3 = np.tile([side_px, side_px, level], (len(one.features_ND), 1))
    datasets = {
        f"features/{one.encoder_folder}": one.features_ND.astype(np.float32),
        "coords": np.hstack([one.corners_N2, geometry_N3]).astype(np.int32),
    }
    about = {
        "patch_size": made.tile_px,
        "patch_size_level0": round(made.tile_level0_px),
        "target_magnification": round(float(made.extra.get("target_magnification", 0))),
        "num_patches": len(one.features_ND),
    }
    _write_h5(root / "patches" / f"{one.slide}.h5", datasets, on={"": about})


@dataclass(frozen=True)
class Export:
    """How a tool's files are written, and what has to be known for it: coords, geometry (the tile's side), mpp."""

    write: Callable[[Path, SlideFeatures], None]
    needs: tuple[str, ...] = ()


EXPORTS = {
    "clam": Export(to_clam),
    "trident": Export(to_trident, ("coords", "geometry")),
    "stamp": Export(to_stamp, ("coords", "mpp")),
    "torchmil": Export(to_torchmil),
    "slideflow": Export(to_slideflow, ("coords", "geometry")),
    "slide2vec": Export(to_slide2vec),
    "atlaspatch": Export(to_atlaspatch, ("coords", "geometry")),
}
"""Keys are those of `extract.layouts.LAYOUTS`, and of `extract.convert.TOOLS`."""


def lacks(one: SlideFeatures, needs: tuple[str, ...]) -> list[str]:
    """What is unknown of a slide and needed."""
    known = {
        "coords": one.coords_N2 is not None,
        "geometry": bool(one.provenance.tile_level0_px and one.provenance.tile_px),
        "mpp": bool(one.slide_mpp),
    }
    words = {"coords": "coordinates", "geometry": "the tiles' side in level-0 px", "mpp": "microns per pixel"}
    return [words[need] for need in needs if not known[need]]


def _write_h5(path: Path, datasets: dict[str, np.ndarray], on: dict[str, dict[str, Any]] | None = None) -> None:
    with replace_on_success(path) as temporary, h5py.File(temporary, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values)
        for name, attributes in (on or {}).items():
            (file[name] if name else file).attrs.update(attributes)


def _write_pt(path: Path, features_ND: np.ndarray) -> None:
    import torch  # here, because this module must stay light

    with replace_on_success(path) as temporary:
        torch.save(torch.from_numpy(np.ascontiguousarray(features_ND)), temporary)


def _write_npy(path: Path, values: np.ndarray) -> None:
    with replace_on_success(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
