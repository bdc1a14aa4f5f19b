"""How much of the AUC a tenth of the tiles keeps, where lesions are sparse and weak: mil.predict fast=true.

    python benchmarks/selecting.py [seeds=0,1,2] [slides=60] [new=80] [side=1920] [keep=0.1] [out=FILE]

Slides are painted at 1 micron per pixel: eosin with small nuclei everywhere; in both classes clusters of lymphocytes
and patches of larger, loose nuclei; in every second slide (the positive ones) lesions of large nuclei on about 0.5 to
3 % of the tiles, some hardly denser than the rest. Every slide has a shade of its own. `slides` are the study (ABMIL, 5
folds, an encoder of one's own that measures texture at four scales and takes no download), `new` are others.

Printed for every seed and all together: the AUC of new slides with all tiles, with those that fast=true encodes, and
with as many by chance (the mean of 10 draws), and what the study itself says of the loss, each with the paired interval
(`mil.tasks.paired`). Then (alone with seeds=) a cohort whose lesions differ in stripes of 4 pixels only, which no
coarse look can see: fast=true has to refuse it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import tifffile
import torch
from sklearn.metrics import roc_auc_score

from extract.features.folder import open_feature_folder
from extract.slides.coarse import choose
from mil.predict import main as predict
from mil.results.trained import TrainedStudy, open_run, score_slide
from mil.tasks.paired import auc_difference_interval
from mil.train import main as train

EOSIN, NUCLEUS = np.array([222, 134, 172], np.float32), np.array([96, 60, 140], np.float32)
ENCODER = ["encoder.name=selecting:texture", "encoder.device=cpu", "extract.workers=0"]
TILE_PX, MPP = 96, 1.0
SMALL, MIDDLE, LARGE = 2, 4, 5
"""Radii of nuclei in pixels."""
DRAWS = 10
Interval = tuple[float, float, float]


class Texture(torch.nn.Module):
    """Of darkness averaged over 1, 2, 4, 8 pixels: mean, SD and 95th percentile, as they stand to plain tissue; and the
    mean of steps over one and two pixels."""

    def __init__(self) -> None:
        super().__init__()
        rng, plain = np.random.default_rng(0), []
        for _ in range(16):
            plain.append(stained(nuclei((TILE_PX, TILE_PX), SMALL, 0.12, rng), rng))
        numbers_ND = self.numbers(torch.from_numpy(np.stack(plain).transpose(0, 3, 1, 2)).float() / 255)
        self.register_buffer("mean_D", numbers_ND.mean(0))
        self.register_buffer("std_D", numbers_ND.std(0))

    @staticmethod
    def numbers(tiles_N3HW: torch.Tensor) -> torch.Tensor:
        dark_N1HW, found = 1 - tiles_N3HW.mean(1, keepdim=True), []
        for size in (1, 2, 4, 8):
            flat_NP = torch.nn.functional.avg_pool2d(dark_N1HW, size).flatten(1)
            high_N = flat_NP.kthvalue(round(0.95 * flat_NP.shape[1]), dim=1).values
            found += [flat_NP.mean(1), flat_NP.std(1), high_N]
        found += [dark_N1HW.diff(n, dim=3).abs().flatten(1).mean(1) for n in (1, 2)]
        return torch.stack(found, 1)

    def forward(self, tiles_N3HW: torch.Tensor) -> torch.Tensor:
        return ((self.numbers(tiles_N3HW) - self.mean_D) / self.std_D).clamp(-20, 20) / 4


def texture(weights: Path | None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """extract/encoders/own.py says what this is."""
    return Texture(), {"dim": 14, "tile_px": TILE_PX, "mpp": MPP, "mean": (0, 0, 0), "std": (1, 1, 1)}


# --- painted slides ------------------------------------------------------------------------------------------------


def nuclei(shape_HW: tuple[int, int], radius: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """bool (H, W): discs at random that cover about this share."""
    centres = rng.random(shape_HW, dtype=np.float32) < share / (np.pi * radius**2)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return cv2.dilate(centres.astype(np.uint8), disc) > 0


def stained(dark_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB: grain, and a slide's own shade."""
    shade_3 = rng.normal(0, 5, 3).astype(np.float32)
    image_HW3 = np.where(dark_HW[:, :, None], NUCLEUS + shade_3, EOSIN + shade_3).astype(np.int16)
    image_HW3 += rng.integers(-20, 21, image_HW3.shape, dtype=np.int8)
    return np.clip(image_HW3, 0, 255).astype(np.uint8)


def patch(dark_HW: np.ndarray, radius_px: int, nucleus_px: int, share: float, rng: np.random.Generator) -> None:
    """Other nuclei within a circle somewhere, in place."""
    y, x = (int(rng.integers(0, side - 2 * radius_px)) for side in dark_HW.shape)
    box_HW = dark_HW[y : y + 2 * radius_px, x : x + 2 * radius_px]
    rows, columns = np.ogrid[: box_HW.shape[0], : box_HW.shape[1]]
    inside_HW = (rows - radius_px) ** 2 + (columns - radius_px) ** 2 <= radius_px**2
    box_HW[inside_HW] = nuclei(box_HW.shape, nucleus_px, share, rng)[inside_HW]


def striped(image_HW3: np.ndarray, radius_px: int, rng: np.random.Generator) -> None:
    """Two light and two dark columns in turn within a circle on a grid of 4 px, in place: their mean over 4 px is 0."""
    y, x = (int(rng.integers(0, side - 2 * radius_px)) // 4 * 4 for side in image_HW3.shape[:2])
    size = 2 * radius_px // 4 * 4
    box_HW3 = image_HW3[y : y + size, x : x + size]
    blocks = np.hypot(*(np.mgrid[: size // 4, : size // 4] * 4 + 2 - radius_px)) <= radius_px
    inside_HW = np.kron(blocks, np.ones((4, 4), bool))
    stripe_W1 = np.tile(np.array([1, 1, -1, -1]), size // 4)[:, None] * STRIPE
    box_HW3[inside_HW] = np.clip(box_HW3.astype(int) + stripe_W1, 0, 255)[inside_HW]


STRIPE = 20
"""Grey levels up and down."""


def paint(path: Path, side_px: int, positive: bool, rng: np.random.Generator, fine: bool = False) -> None:
    """A slide at 1 micron per pixel with levels at 1, 4 and 16. fine: lesions that are stripes, not other nuclei."""
    shape = (side_px * 4 // 5, side_px)
    dark = nuclei(shape, SMALL, 0.12, rng)
    scale = side_px / 1920
    for _ in range(rng.integers(0, 5)):
        patch(dark, max(20, round(rng.integers(40, 100) * scale)), SMALL, rng.uniform(0.3, 0.6), rng)
    for _ in range(rng.integers(0, 5)):
        patch(dark, max(20, round(rng.integers(40, 100) * scale)), MIDDLE, rng.uniform(0.05, 0.15), rng)
    lesions = [max(24, round(rng.integers(45, 90) * scale)) for _ in range(rng.integers(1, 4) if positive else 0)]
    strength = rng.uniform(*STRENGTH)
    for radius_px in lesions if not fine else ():
        patch(dark, radius_px, LARGE, strength, rng)
    levels = [stained(dark, rng)]
    for radius_px in lesions if fine else ():
        striped(levels[0], radius_px, rng)
    for _ in range(2):
        height, width = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (width // 4, height // 4), interpolation=cv2.INTER_AREA))
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            more = {"subfiletype": 1 if number else 0, "resolution": (10_000, 10_000), "resolutionunit": "CENTIMETER"}
            how = {"compression": "jpeg", "compressionargs": {"level": 90}}
            file.write(level, tile=(256, 256), photometric="rgb", metadata=None, **how, **more)


STRENGTH = (0.1, 0.36)
"""Share of a lesion that nuclei cover, drawn for each slide."""


def make_cohort(folder: Path, n_slides: int, side_px: int, seed: int, fine: bool = False) -> Path:
    """folder/slides and folder/cohort.csv; every second slide is positive."""
    (folder / "slides").mkdir(parents=True)
    names = [f"{folder.name}{i:03d}" for i in range(n_slides)]
    for i, name in enumerate(names):
        rng = np.random.default_rng([seed, i])
        paint(folder / "slides" / f"{name}.tiff", side_px, bool(i % 2), rng, fine)
    labels = [["benign", "tumour"][i % 2] for i in range(n_slides)]
    pd.DataFrame({"slide": names, "patient": names, "label": labels}).to_csv(folder / "cohort.csv", index=False)
    return folder


# --- a study, and new slides ---------------------------------------------------------------------------------------


def study(folder: Path, epochs: int, folds: int = 5) -> Path:
    """A trained study on the cohort; its run folder."""
    arguments = [f"cohort={folder / 'cohort.csv'}", f"slides.folder={folder / 'slides'}", *ENCODER]
    arguments += [f"features.folder={folder / 'features'}", "model.name=abmil", f"study.folds={folds}"]
    arguments += [f"train.epochs={epochs}", "train.accelerator=cpu", "report.bootstrap=0", f"out={folder / 'run'}"]
    assert train(arguments) == 0
    return folder / "run"


@dataclass(frozen=True)
class Predicted:
    """mil.predict on the new slides: the table of slides, how many tiles were encoded, and seconds."""

    table: pd.DataFrame
    tiles: int
    seconds: float

    @property
    def labels(self) -> np.ndarray:
        return (self.table["label"] == "tumour").to_numpy().astype(int)

    @property
    def p(self) -> np.ndarray:
        return self.table["p_tumour"].to_numpy()

    @property
    def auc(self) -> float:
        return float(roc_auc_score(self.labels, self.p))


def predicted(run: Path, new: Path, name: str, *more: str) -> Predicted:
    """mil.predict on a cohort, into a sub-folder of it."""
    began, out = time.perf_counter(), new / name
    arguments = [f"run={run}", f"cohort={new / 'cohort.csv'}", f"slides.folder={new / 'slides'}", f"out={out}", *more]
    assert predict([*arguments, "extract.workers=0", "report.bootstrap=0"]) == 0
    folder = open_feature_folder(out / "features")
    tiles = sum(folder.header(slide).n_tiles for slide in folder.slides)
    return Predicted(pd.read_csv(out / "predictions.csv"), tiles, time.perf_counter() - began)


def by_chance(trained: TrainedStudy, everything: Predicted, features: Path, keep: float, draw: int) -> np.ndarray:
    """p of the new slides from a share of their tiles that only chance chose; members and mean as in mil.predict."""
    folder, p_S = open_feature_folder(features), []
    for slide in everything.table["slide"]:
        bag_ND = folder.features(slide)
        rows = choose(np.random.default_rng([draw, len(p_S)]).random(len(bag_ND)), keep, 0.0, slide)
        with torch.inference_mode():
            logits_MC = score_slide(trained, bag_ND[rows]).logits_MBC[:, 0]
        p_M = torch.sigmoid(logits_MC[:, 0]) if logits_MC.shape[1] == 1 else logits_MC.softmax(1)[:, 1]
        p_S.append(float(p_M.mean()))
    return np.array(p_S)


# --- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """AUCs of one seed's new slides, and the losses with their intervals."""

    tiles: float
    aucs: tuple[float, float, float]
    selected: Interval
    chance: Interval
    own: Interval
    own_aucs: tuple[float, float]


def loss(labels: np.ndarray, all_S: np.ndarray, less_S: np.ndarray) -> Interval:
    found = auc_difference_interval(labels, all_S, less_S)
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    return found.value, found.low, found.high


def one_seed(folder: Path, seed: int, given: dict[str, str]) -> Row:
    """Study, new slides, three ways to score them."""
    side_px = int(given["side"])
    old = make_cohort(folder / f"old{seed}", int(given["slides"]), side_px, seed)
    new = make_cohort(folder / f"new{seed}", int(given["new"]), side_px, seed + 1000)
    run = study(old, epochs=30)
    everything = predicted(run, new, "all")
    fast = predicted(run, new, "fast", "fast=true", f"select.keep={given['keep']}", "select.loss=0.9")
    labels, trained = everything.labels, open_run(run, device="cpu")
    features = new / "all" / "features"
    drawn = [by_chance(trained, everything, features, float(given["keep"]), draw) for draw in range(DRAWS)]
    chance = np.mean([loss(labels, everything.p, p_S) for p_S in drawn], axis=0)
    chance_auc = float(np.mean([roc_auc_score(labels, p_S) for p_S in drawn]))
    trial = json.loads((run / "fast" / "trial.json").read_text())
    row = Row(
        fast.tiles / everything.tiles,
        (everything.auc, fast.auc, chance_auc),
        loss(labels, everything.p, fast.p),
        tuple(chance.tolist()),
        (trial["loss"], trial["low"], trial["high"]),
        (trial["auc_all"], trial["auc_fast"]),
    )
    print(seed, row, f"{everything.seconds:.0f} s and {fast.seconds:.0f} s", flush=True)
    return row


def together(intervals: list[Interval]) -> Interval:
    """The mean of independent cohorts: half widths add in squares."""
    value_K, low_K, high_K = np.array(intervals).T
    mean, n = float(value_K.mean()), len(intervals)
    below, above = (float(np.sqrt(((end_K - value_K) ** 2).sum())) / n for end_K in (low_K, high_K))
    return mean, mean - below, mean + above


def shown(interval: Interval) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*interval)


def table(rows: dict[str, Row]) -> list[str]:
    """Markdown; the last line is the mean of the seeds."""
    heads = ["seed", "tiles", "AUC, all tiles", "chosen", "by chance", "loss, chosen", "loss, by chance", "AUC kept"]
    heads.append("the study on its own slides: all, chosen, loss")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    many = list(rows.values())
    if not many:
        return []
    means = [np.mean([getattr(row, key) for row in many], axis=0) for key in ("aucs", "own_aucs")]
    intervals = [together([getattr(row, key) for row in many]) for key in ("selected", "chance", "own")]
    mean_tiles = float(np.mean([row.tiles for row in many]))
    mean = Row(mean_tiles, tuple(means[0].tolist()), *intervals, tuple(means[1].tolist()))
    for name, row in (rows | ({"mean": mean} if len(many) > 1 else {})).items():
        cells = [name, f"{row.tiles:.1%}", *(f"{auc:.4f}" for auc in row.aucs), shown(row.selected), shown(row.chance)]
        cells.append(f"{row.aucs[1] / row.aucs[0]:.2%}")
        cells.append(f"{row.own_aucs[0]:.4f}, {row.own_aucs[1]:.4f}, {shown(row.own)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def refused(folder: Path, given: dict[str, str]) -> list[str]:
    """Lesions that cannot be seen coarsely: what fast=true does with them."""
    old = make_cohort(folder / "fine", int(given["slides"]), int(given["side"]), 50, fine=True)
    run = study(old, epochs=30)
    arguments = [f"run={run}", f"cohort={old / 'cohort.csv'}", f"slides.folder={old / 'slides'}", "fast=true"]
    code = predict([*arguments, f"select.keep={given['keep']}", f"out={folder / 'refused'}", "extract.workers=0"])
    trial = json.loads((run / "fast" / "trial.json").read_text())
    own = (trial["loss"], trial["low"], trial["high"])
    aucs = f"AUC of its own held-out slides {trial['auc_all']:.4f} with all tiles, {trial['auc_fast']:.4f} with chosen"
    return [f"Stripes of 4 pixels: exit code {code}; {aucs}, loss {shown(own)}"]


def main() -> None:
    from machine import machine, publish

    given = {"seeds": "0,1,2", "slides": "60", "new": "80", "side": "1920", "keep": "0.1", "out": ""}
    given |= dict(argument.split("=") for argument in sys.argv[1:])
    out, rows, said = Path(given["out"]) if given["out"] else None, {}, []
    command = " ".join(["python benchmarks/selecting.py", *sys.argv[1:]])

    def show() -> None:
        lines = ["# A tenth of the tiles, chosen by a coarse look", "", f"`{command}`", "", *table(rows), ""]
        publish("\n".join([*lines, *said, machine("torch", "scikit-learn", "opencv-python-headless")]), out)

    with tempfile.TemporaryDirectory() as temporary:
        for seed in filter(None, given["seeds"].split(",")):
            rows[seed] = one_seed(Path(temporary), int(seed), given)
            show()
        said += [*refused(Path(temporary), given), ""]
        show()


if __name__ == "__main__":
    main()
