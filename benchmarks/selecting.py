"""How much of the AUC a tenth of the tiles keeps, where lesions are sparse: mil.predict fast=true on a made cohort.

    python benchmarks/selecting.py [slides=60] [side=2400] [keep=0.1] [seed=0]

Slides are painted: eosin with small nuclei everywhere, clusters of lymphocytes in both classes, and in positive slides
one to three patches, about a tile wide each, whose nuclei are larger. Half of the slides are the study (ABMIL, 5 folds,
an encoder of one's own that measures texture at five scales and takes no download), the others are new. Printed: tiles
and AUC with all and with the chosen tiles, and the same chosen by chance.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import tifffile
import torch
from sklearn.metrics import roc_auc_score

from extract.features.cache import read_header
from mil.predict import main as predict
from mil.train import main as train

EOSIN, NUCLEUS = np.array([222, 134, 172], np.float32), np.array([96, 60, 140], np.float32)
ENCODER = ["encoder.name=selecting:texture", "encoder.device=cpu", "extract.workers=0"]
TILE_PX = 160


class Texture(torch.nn.Module):
    """Of darkness averaged over 1, 2, 4, 8, 16 pixels: mean, SD and two quantiles, as they stand to plain tissue."""

    def __init__(self) -> None:
        super().__init__()
        rng, plain = np.random.default_rng(0), []
        for _ in range(16):
            plain.append(stained(nuclei((TILE_PX, TILE_PX), 3, 0.12, rng), rng))
        numbers_ND = self.numbers(torch.from_numpy(np.stack(plain).transpose(0, 3, 1, 2)).float() / 255)
        self.register_buffer("mean_D", numbers_ND.mean(0))
        self.register_buffer("std_D", numbers_ND.std(0))

    @staticmethod
    def numbers(tiles_N3HW: torch.Tensor) -> torch.Tensor:
        dark_N1HW, found = 1 - tiles_N3HW.mean(1, keepdim=True), []
        for size in (1, 2, 4, 8, 16):
            flat_NP = torch.nn.functional.avg_pool2d(dark_N1HW, size).flatten(1)
            quantiles_2N = torch.quantile(flat_NP, torch.tensor([0.5, 0.95]), dim=1)
            found += [flat_NP.mean(1), flat_NP.std(1), *quantiles_2N]
        return torch.stack(found, 1)

    def forward(self, tiles_N3HW: torch.Tensor) -> torch.Tensor:
        return ((self.numbers(tiles_N3HW) - self.mean_D) / self.std_D).clamp(-20, 20) / 4


def texture(weights: Path | None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """extract/encoders/own.py says what this is."""
    return Texture(), {"dim": 20, "tile_px": TILE_PX, "mean": (0, 0, 0), "std": (1, 1, 1)}


def nuclei(shape_HW: tuple[int, int], radius: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """bool (H, W): discs at random that cover about this share."""
    centres = rng.random(shape_HW) < share / (np.pi * radius**2)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return cv2.dilate(centres.astype(np.uint8), disc) > 0


def stained(dark_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB: grain, and a slide's own shade."""
    noise_HW3 = rng.standard_normal((*dark_HW.shape, 3), dtype=np.float32) * 12 + rng.normal(0, 3, 3).astype(np.float32)
    return np.clip(np.where(dark_HW[:, :, None], NUCLEUS, EOSIN) + noise_HW3, 0, 255).astype(np.uint8)


def circle(shape_HW: tuple[int, int], radius: int, rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.ogrid[: shape_HW[0], : shape_HW[1]]
    y, x = (int(rng.integers(radius, side - radius)) for side in shape_HW)
    inside: np.ndarray = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return inside


def paint(path: Path, side_px: int, positive: bool, rng: np.random.Generator) -> None:
    """A slide at 0.5 microns per pixel with levels at 0.5, 2 and 8."""
    shape = (side_px * 4 // 5, side_px)
    dark = nuclei(shape, 3, 0.12, rng)
    for _ in range(rng.integers(1, 4)):
        dark = np.where(circle(shape, 60, rng), nuclei(shape, 3, 0.5, rng), dark)
    for _ in range(rng.integers(1, 4) if positive else 0):
        dark = np.where(circle(shape, 80, rng), nuclei(shape, 7, 0.5, rng), dark)
    levels = [stained(dark, rng)]
    for _ in range(2):
        height, width = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (width // 4, height // 4), interpolation=cv2.INTER_AREA))
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            more = {"subfiletype": 1 if number else 0, "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
            file.write(level, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None, **more)


def make_cohort(folder: Path, n_slides: int, side_px: int, seed: int) -> Path:
    """folder/slides and folder/cohort.csv; every second slide is positive."""
    (folder / "slides").mkdir(parents=True)
    rows = []
    for i in range(n_slides):
        rng = np.random.default_rng([seed, i])
        paint(folder / "slides" / f"{folder.name}{i:03d}.tiff", side_px, bool(i % 2), rng)
        rows.append(
            {
                "slide": f"{folder.name}{i:03d}",
                "patient": f"{folder.name}-{i:03d}",
                "label": ["benign", "tumour"][i % 2],
            }
        )
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder


def study(folder: Path, epochs: int, folds: int = 5) -> Path:
    """A trained study on the cohort; its run folder."""
    arguments = [f"cohort={folder / 'cohort.csv'}", f"slides.folder={folder / 'slides'}", *ENCODER]
    arguments += [f"features.folder={folder / 'features'}", "model.name=abmil", f"study.folds={folds}"]
    arguments += [f"train.epochs={epochs}", "train.accelerator=cpu", "report.bootstrap=0", f"out={folder / 'run'}"]
    assert train(arguments) == 0
    return folder / "run"


def predicted(run: Path, new: Path, name: str, *more: str) -> tuple[float, int, float]:
    """AUC, tiles encoded and seconds of mil.predict on the new slides."""
    began, out = time.perf_counter(), new / name
    arguments = [f"run={run}", f"cohort={new / 'cohort.csv'}", f"slides.folder={new / 'slides'}", f"out={out}", *more]
    assert predict([*arguments, "extract.workers=0", "report.bootstrap=0"]) == 0
    table = pd.read_csv(out / "predictions.csv")
    auc = roc_auc_score(table["label"] == "tumour", table["p_tumour"])
    tiles = sum(read_header(path).n_tiles for path in (out / "features").glob("*.h5"))
    seconds = time.perf_counter() - began
    print(f"{name}: {tiles} tiles, AUC {auc:.4f}, {seconds:.1f} s", flush=True)
    return float(auc), tiles, seconds


def main() -> None:
    given = {"slides": "60", "side": "2400", "keep": "0.1", "seed": "0"}
    given |= dict(argument.split("=") for argument in sys.argv[1:])
    n_slides, side_px, keep, seed = int(given["slides"]), int(given["side"]), given["keep"], int(given["seed"])
    with tempfile.TemporaryDirectory() as temporary:
        old = make_cohort(Path(temporary) / "old", n_slides, side_px, seed)
        new = make_cohort(Path(temporary) / "new", n_slides, side_px, seed + 1000)
        run = study(old, epochs=30)
        rows = [("all tiles", *predicted(run, new, "all"))]
        more = ("fast=true", f"select.keep={keep}", "select.loss=0.9")
        rows.append(("coarse look, first time (fits, tries out)", *predicted(run, new, "first", *more)))
        rows.append(("coarse look", *predicted(run, new, "fast", *more)))
        rows.append(("by chance", *predicted(run, new, "chance", *more, "select.random=0.999")))
        trial = (run / "fast" / "trial.json").read_text()
    print("\n| tiles | encoded | AUC of new slides | seconds |\n| --- | --- | --- | --- |")
    for name, auc, tiles, seconds in rows:
        print(f"| {name} | {tiles:,} | {auc:.4f} | {seconds:.1f} |")
    print("last trial on the study's own slides:", trial)


if __name__ == "__main__":
    main()
