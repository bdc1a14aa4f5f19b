"""Speed of a heatmap: one slide of 40,000 tiles x 768, five members of ABMIL, from features to files.

    python benchmarks/heatmap.py [tiles=40000] [members=5] [aggregator=abmil] [rounds=3]

Makes a slide file with three levels (a tile is 56 level-0 px wide, so that the file stays small; what is read is a
level of the size that a real slide's thumbnail has) and untrained members. Prints Markdown, with the levels that were
read for the picture.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import pandas as pd
import tifffile
import torch
from machine import machine

from extract.features.cache import Provenance, write_features
from extract.features.folder import open_feature_folder
from extract.outlines.geojson import write_collection
from extract.slides.slide import Slide
from mil.aggregators import aggregator_class
from mil.config import StudyConfig
from mil.look.scenes import Scene, Theatre, picture, regions_geojson, tiles_geojson, tiles_table
from mil.look.tilescores import Verdicts
from mil.results.tables import member_thresholds, to_probabilities
from mil.results.trained import TrainedStudy, score_slide
from mil.training.members import Description

DIM, TILE_LEVEL0_PX, MPP = 768, 56, 2.0
CLASSES = ["normal", "tumor"]


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    n_tiles, n_members = int(given.get("tiles", 40_000)), int(given.get("members", 5))
    name, rounds = given.get("aggregator", "abmil"), int(given.get("rounds", 3))
    print(f"Command: `python benchmarks/heatmap.py {' '.join(sys.argv[1:])}`\n")
    print(machine("torch", "numpy", "matplotlib") + "\n")
    with tempfile.TemporaryDirectory() as folder:
        theatre = make_theatre(Path(folder), n_tiles, n_members, name)
        levels: list[tuple[int, int]] = []
        watch_reads(levels)
        measured: dict[str, list[float]] = {}
        for round_number in range(rounds + 1):  # the first warms up
            for what, seconds in one_heatmap(theatre, Path(folder)).items():
                if round_number:
                    measured.setdefault(what, []).append(seconds)
        whole_px = theatre_px(theatre)
    print(f"{n_tiles:,} tiles x {DIM}, {name}, {n_members} members\n")
    print("| step | median s | all |\n|---|---|---|")
    for what, values in measured.items():
        print(f"| {what} | {median(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |")
    read = sorted({level for level, _ in levels})
    share = sum(px for _, px in levels) / (rounds + 1) / whole_px
    print(f"\nLevels read for the picture: {read} of 0..2; {share:.2%} as many px as level 0 has.")


def one_heatmap(theatre: Theatre, folder: Path) -> dict[str, float]:
    """Seconds of every step; `whole` is what the command does for one slide: attention, picture, table, GeoJSON."""
    seconds = {}
    began = time.perf_counter()
    with theatre.scene("slide") as scene:
        seconds["attention of every tile"] = time.perf_counter() - began
        steps = {
            "picture": lambda: (folder / "h.png").write_bytes(picture(scene).png),
            "table of tiles": lambda: tiles_table(scene).to_csv(folder / "h.csv", index=False),
            "GeoJSON of all tiles": lambda: write_collection(folder / "h.geojson", tiles_geojson(scene)),
        }
        for what, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[what] = time.perf_counter() - start
    seconds["**whole heatmap**"] = time.perf_counter() - began
    seconds |= beyond(theatre, scene)
    return seconds


def beyond(theatre: Theatre, scene: Scene) -> dict[str, float]:
    """What is only done when asked for."""
    began = time.perf_counter()
    regions_geojson(scene, 90.0)
    merged = time.perf_counter()
    with theatre.scene("slide", kind="evidence"):
        return {"merged regions above 90": merged - began, "evidence of every tile": time.perf_counter() - merged}


def watch_reads(levels: list[tuple[int, int]]) -> None:
    """Note level and px of every read of the slide."""
    read = Slide.read_region_rgb

    def noted(self: Slide, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        levels.append((level, width * height))
        return read(self, level, x, y, width, height)

    Slide.read_region_rgb = noted  # type: ignore[method-assign]


def theatre_px(theatre: Theatre) -> int:
    with tifffile.TiffFile(theatre.files["slide"][0]) as file:
        page = file.pages[0]
        return int(page.imagewidth * page.imagelength)  # type: ignore[union-attr]


# --- what is measured on ---------------------------------------------------------------------------------------------


def make_theatre(folder: Path, n_tiles: int, n_members: int, name: str) -> Theatre:
    columns = int((1.5 * n_tiles) ** 0.5)
    rows = -(-n_tiles // columns)
    write_slide(folder / "slide.tif", (columns + 4) * TILE_LEVEL0_PX, (rows + 4) * TILE_LEVEL0_PX)
    index = np.arange(n_tiles)
    coords_N2 = (np.stack([index % columns, index // columns], axis=1) + 2) * TILE_LEVEL0_PX
    features_ND = np.random.default_rng(0).normal(size=(n_tiles, DIM)).astype(np.float16)
    provenance = Provenance("random", "none", 224, 0.5, 0, TILE_LEVEL0_PX, "slide")
    write_features(folder / "features" / "slide.h5", features_ND, coords_N2, provenance)
    trained = untrained(folder, name, n_members, features_ND)
    features = open_feature_folder(folder / "features")
    return Theatre(Verdicts(trained), features, {"slide": (folder / "slide.tif", None)})


def write_slide(path: Path, width: int, height: int) -> None:
    small = np.random.default_rng(1).integers(150, 255, (height // 40, width // 40, 3), dtype=np.uint8)
    with tifffile.TiffWriter(path) as file:
        for level in range(3):
            size = (width // 4**level, height // 4**level)
            image = cv2.resize(small, size, interpolation=cv2.INTER_LINEAR)
            resolution = (10_000 / MPP / 4**level,) * 2
            file.write(image, tile=(256, 256), photometric="rgb", compression="jpeg", subfiletype=int(level > 0),
                       resolution=resolution, resolutionunit="CENTIMETER", metadata=None)  # fmt: skip


def untrained(folder: Path, name: str, n_members: int, features_ND: np.ndarray) -> TrainedStudy:
    """A run as `mil.results.trained.open_run` would give it, with random members and their own predictions."""
    seeds = list(range(n_members))
    aggregator = aggregator_class(name)(DIM, 1, seeds).eval()
    description = Description(name, {}, DIM, CLASSES, seeds, False, {})
    plan = pd.DataFrame({"member": seeds, "repeat": 0, "fold": seeds, "seed": 0})
    cpu = torch.device("cpu")
    thresholds = pd.DataFrame({"threshold": 0.5, "origin": "default"}, index=pd.Index(seeds, name="member"))
    roles = pd.DataFrame({"slide": ["slide"], "patient": "p", "label": "tumor", "split": "test"})
    trained = TrainedStudy(folder, StudyConfig(), aggregator, description, plan, roles, thresholds, {}, {}, cpu)
    logits_M1 = score_slide(trained, features_ND).logits_MBC[:, 0].double().numpy()
    p_M2 = to_probabilities(logits_M1)
    fixed = {"slide": "slide", "patient": "p", "label": "tumor", "split": "test", "role": "test"}
    numbers = {"logit_0": logits_M1[:, 0], "p_0": p_M2[:, 0], "p_1": p_M2[:, 1]}
    table = pd.DataFrame({**plan, **fixed, **numbers})
    assert member_thresholds(table, CLASSES)["threshold"].eq(0.5).all()
    table.to_csv(folder / "predictions.csv", index=False)
    return trained


if __name__ == "__main__":
    main()
