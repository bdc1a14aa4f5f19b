"""Labelled tiles whose class only a network that learns can see. Tests get this module through the fixture `textures`.

Both classes are gratings of any direction and phase under the same colours and noise; they differ in wavelength alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

WAVELENGTH_PX = {"coarse": 12.0, "fine": 7.0}


def grating(label: str, side_px: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB (side_px, side_px, 3)."""
    y, x = np.mgrid[:side_px, :side_px]
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi / WAVELENGTH_PX[label] * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    colour = np.array([190, 140, 180]) + rng.normal(0, 15, 3)
    noise = rng.normal(0, 8, (side_px, side_px, 3))
    return np.clip(colour + wave[..., None] * np.array([21, 30, 18]) + noise, 0, 255).astype(np.uint8)


def write_tiles(folder: Path, n_tiles: int, side_px: int, n_patients: int = 20, seed: int = 0) -> Path:
    """Images and tiles.csv (image, label, patient); every patient has both classes. The CSV."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n_tiles):
        label = list(WAVELENGTH_PX)[i % 2]
        Image.fromarray(grating(label, side_px, rng)).save(folder / f"tile{i:03d}.png", compress_level=1)
        rows.append((f"tile{i:03d}.png", label, f"P{i // 2 % n_patients:02d}"))
    pd.DataFrame(rows, columns=["image", "label", "patient"]).to_csv(folder / "tiles.csv", index=False)
    return folder / "tiles.csv"
