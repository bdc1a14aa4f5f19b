"""Nested cross-validation: `python benchmarks/nested.py [chowder] [abmil] [gpu] [key=value ...]`, all by default.

The Phikon paper's protocol, 5 x 5 folds x 4 cells = 100 inner members and 5 refits, on random features shaped like
owkin/camelyon16-features: 269 slides x 1,000 tiles x 768, float16, in memory. Prints Markdown. Options: slides=269
tiles=1000 epochs=50 sequential=10 rounds=3.

- chowder: everything that `mil.train` does after start-up and with the features loaded: plan, 105 fits, predictions of
  all slides, report with 1,000 resamples.
- abmil: one epoch of the 100 inner members with validation, in one pass, against `sequential` of them one after the
  other, alone, on the same module; the sum of those is scaled to 100.
- gpu: ABMIL's whole protocol and the measured fraction of peak; says "none" where there is no GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from machine import machine
from training import DIM, TUTORIAL, make_bags, seconds

from extract.cohort import Cohort
from extract.features.cache import Header, Provenance
from mil.aggregators import aggregator_class
from mil.config import StudyConfig
from mil.pipeline.data import Study, inner_plan_of
from mil.pipeline.study import train_and_report
from mil.study.plan import make_plan
from mil.study.roles import Plan
from mil.training.module import Members, MembersModule, fit

GRID = {"lr": [1e-3, 1e-4], "weight_decay": [0.0, 1e-4]}
POSITIVE = 0.41
"""Share of tumour slides in Camelyon16's training split."""
PEAK_TFLOPS = {"H100": 494.7, "H200": 494.7, "A100": 156.0}
"""Dense TF32, per the vendor's data sheets; float32 training here may use it (torch's own setting decides)."""


@dataclass(frozen=True)
class Options:
    """Sizes, so that the script can also be tried in seconds."""

    slides: int = 269
    tiles: int = 1000
    epochs: int = 50
    sequential: int = 10
    rounds: int = 3


def main() -> None:
    arguments = sys.argv[1:]
    pairs = (a.split("=") for a in arguments if "=" in a)
    options = Options(**{key: int(value) for key, value in pairs})
    parts = {"chowder": chowder, "abmil": abmil, "gpu": gpu}
    print(f"Command: `{' '.join(['python benchmarks/nested.py', *arguments])}`\n")
    print(machine("torch", "lightning", "numpy") + "\n")
    for name in [a for a in arguments if a in parts] or parts:
        parts[name](options)


def make_study(name: str, options: Options, model: dict) -> Study:
    """What `mil.pipeline.data.prepare` gives, without files: every slide a patient, labels by chance."""
    rng = np.random.default_rng(0)
    labels_S = rng.random(options.slides) < POSITIVE
    slides = [f"slide_{i}" for i in range(options.slides)]
    table = pd.DataFrame(
        {"slide": slides, "patient": slides, "label": np.array(["normal", "tumor"])[labels_S.astype(int)]}
    )
    cohort = Cohort(table.assign(split="train", path=None, mpp=np.nan), ("normal", "tumor"))
    config = StudyConfig.model_validate(
        {
            "cohort": "none.csv",
            "study": {"nested": 5, "grid": GRID},
            "model": {"name": name, **model},
            "train": {"epochs": options.epochs, "lr": 1e-3},
            "report": {"heatmaps": 0},  # they would read feature files, and there are none
        }
    )
    provenance = Provenance("random", "none", 224, 0.5, tile_level0_px=448, slide="all")
    headers = {"all": Header(Path("none"), options.tiles, DIM, "float16", provenance)}
    bags = make_bags(np.full(options.slides, options.tiles))
    plan = make_plan(cohort, folds=5, lr=1e-3, weight_decay=0.0)
    return Study(config, cohort, headers, bags, plan, (), {})


def whole_protocol(study: Study, name: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: train_and_report(study, name, Path(folder)))


def size(options: Options) -> str:
    return f"{options.slides} x {options.tiles:,} x {DIM} float16"


def chowder(options: Options) -> None:
    study = make_study("chowder", options, TUTORIAL)
    before = time.process_time()
    wall = [whole_protocol(study, "chowder") for _ in range(options.rounds)]
    cpu = (time.process_time() - before) / options.rounds
    print(f"\n## Chowder, linear tile score, nested 5 x 5 x 4: 105 fits, {options.epochs} epochs, {size(options)}\n")
    print("| median wall s | all | mean CPU s |\n| --- | --- | --- |")
    print(f"| {median(wall):.1f} | {', '.join(f'{s:.1f}' for s in wall)} | {cpu:.1f} |\n")


def module_of(study: Study, plan: Plan, name: str) -> MembersModule:
    m = plan.members
    members = Members(m["lr"].to_numpy(), m["weight_decay"].to_numpy(), plan.uses("train"), plan.uses("val"))
    aggregator = aggregator_class(name)(DIM, 1, m["init_seed"].tolist())
    return MembersModule(aggregator, study.bags, study.cohort.labels_S, 2, members, study.config.train)


def abmil(options: Options) -> None:
    study = make_study("abmil", replace(options, epochs=1), {})
    inner = inner_plan_of(study.config, study.plan, study.cohort)
    together = seconds(lambda: fit(module_of(study, inner, "abmil"), progress=False))
    rows = np.linspace(0, len(inner) - 1, min(options.sequential, len(inner))).astype(int)
    alone = [seconds(lambda r=r: fit(module_of(study, inner.subset([r]), "abmil"), progress=False)) for r in rows]  # type: ignore[misc]
    scaled = sum(alone) / len(alone) * len(inner)
    print(f"## ABMIL: one epoch of {len(inner)} inner members with validation, {size(options)}\n")
    print("| in one pass, s | sequential, s | ratio |\n| --- | --- | --- |")
    print(f"| {together:.1f} | {scaled:.1f} | {scaled / together:.2f} |\n")
    print(
        f"Sequential: {len(alone)} of the {len(inner)} members alone ({', '.join(f'{a:.2f}' for a in alone)} s), "
        "scaled.\n"
    )


def gpu(options: Options) -> None:
    print(f"## ABMIL on a GPU, nested 5 x 5 x 4: 105 fits, {options.epochs} epochs, {size(options)}\n")
    print("| GPU | wall s | of peak |\n| --- | --- | --- |")
    if not torch.cuda.is_available():
        print("| none | - | - |\n")
        return
    study = make_study("abmil", options, {})
    took = whole_protocol(study, "abmil")
    name = torch.cuda.get_device_name()
    peak = next((p for key, p in PEAK_TFLOPS.items() if key in name), None)
    share = "-" if peak is None else f"{abmil_flops(study, options) / took / (peak * 1e12):.1%} of {peak:g} TFLOP/s"
    print(f"| {name} | {took:.1f} | {share} |\n")


def abmil_flops(study: Study, options: Options) -> float:
    """Of the inner members: 2 a weight and tile forward, twice that backward (none for the tiles), val forward."""
    inner = inner_plan_of(study.config, study.plan, study.cohort)
    embed, rest = DIM * 128, 2 * 128 * 128
    train, val = (inner.uses(role).sum() * options.tiles * options.epochs for role in ("train", "val"))
    return float(train * 2 * (2 * embed + 3 * rest) + val * 2 * (embed + rest))


if __name__ == "__main__":
    main()
