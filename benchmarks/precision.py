"""What `train.precision` does to results: AUC and probabilities against float32, on data where errors are possible.

    python benchmarks/precision.py [device=cpu] [seeds=5] [small] [aggregators=abmil,chowder] [out=FILE.md]

80 slides of 60 tiles x 64, float16, of two classes that overlap (witness tiles weakly shifted), five folds, 15
epochs (Chowder 30, at five times the rate); out-of-fold predictions, evaluated in float32. A seed draws the cohort and
the starting values. TF32 is there on GPUs only. Prints Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from machine import machine, publish
from sklearn.metrics import roc_auc_score

from mil.aggregators import aggregator_class
from mil.config import Train
from mil.training.bags import Bags
from mil.training.module import Members, MembersModule, fit, predict_logits

AGGREGATORS = ("abmil", "chowder", "transmil", "mean")
SMALL = {"transmil": {"hidden": 16, "heads": 2, "landmarks": 8}}
"""TransMIL at its published width takes hours of a CPU here."""
LONGER = {"chowder": (30, 5e-3)}
"""Epochs and learning rate, where the others' leave it at chance."""
SHIFT = 0.5
"""Of a positive slide's witness tiles, in the tiles' own spread: errors happen, and every aggregator learns."""


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    device = torch.device(given.get("device", "cpu"))
    accelerator = "gpu" if device.type == "cuda" else device.type
    lines = [f"# Precision of training steps\n\nCommand: `python benchmarks/precision.py {' '.join(sys.argv[1:])}`\n"]
    lines += [machine("torch", "lightning", "numpy", device=device) + "\n"]
    names = tuple(given.get("aggregators", ",".join(AGGREGATORS)).split(","))
    lines += rows(device, accelerator, int(given.get("seeds", 5)), "small" in sys.argv, names)
    publish("\n".join(lines), Path(given["out"]) if "out" in given else None)


def table(device: torch.device, accelerator: str, seeds: int, small: bool) -> None:
    """The rows as they come, for benchmarks/gpu.sh."""
    print("## Precision of training steps against float32\n")
    for line in rows(device, accelerator, seeds, small):
        print(line, flush=True)


def rows(
    device: torch.device, accelerator: str, seeds: int, small: bool, names: tuple[str, ...] = AGGREGATORS
) -> list[str]:
    """Of each aggregator and precision, over the seeds."""
    head = "| aggregator | precision | AUC of the seeds, float32 | AUC in this precision | largest change of an AUC "
    lines = [f"{head}| largest change of a probability | mean change |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name in names if not small else names[:1]:
        found = {precision: [] for precision in ("32-true", *others(device))}
        for seed in range(seeds):
            for precision, each in found.items():
                each.append(out_of_fold(name, seed, precision, accelerator, small))
        exact = found.pop("32-true")
        for precision, each in found.items():
            aucs, own = ([auc for auc, _ in side] for side in (exact, each))
            gaps = [np.abs(p - q) for (_, p), (_, q) in zip(exact, each, strict=True)]
            moved = max(abs(a - b) for a, b in zip(aucs, own, strict=True))
            shown = [", ".join(f"{a:.4f}" for a in side) for side in (aucs, own)]
            largest, mean = max(g.max() for g in gaps), float(np.mean([g.mean() for g in gaps]))
            lines.append(f"| {name} | {precision} | {' | '.join(shown)} | {moved:.4f} | {largest:.4f} | {mean:.4f} |")
    return [*lines, ""]


def others(device: torch.device) -> tuple[str, ...]:
    return ("tf32", "bf16-mixed") if device.type == "cuda" else ("bf16-mixed",)


def cohort(seed: int, small: bool) -> tuple[Bags, np.ndarray]:
    """Two classes that overlap: a twentieth of a positive slide's tiles is shifted by `SHIFT` of their spread."""
    n, tiles, dim = (20, 30, 16) if small else (80, 60, 64)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 2)
    x = rng.normal(size=(n, tiles, dim)).astype(np.float32)
    x += 0.1 * rng.normal(size=(n, 1, dim)).astype(np.float32)  # slides differ, whatever their label is
    direction = rng.normal(size=dim).astype(np.float32)
    x[labels == 1, : tiles // 20] += SHIFT * direction
    block = torch.from_numpy(x).half()
    return Bags(tuple(f"s{i}" for i in range(n)), np.full(n, tiles), dim, "ram", tuple(block)), labels.astype(np.int64)


def out_of_fold(name: str, seed: int, precision: str, accelerator: str, small: bool) -> tuple[float, np.ndarray]:
    """AUC, and the probability of every slide by the member that never saw it."""
    bags, labels = cohort(seed, small)
    fold = np.arange(len(bags)) % 5
    train_MS = np.stack([fold != f for f in range(5)])
    epochs, rate = LONGER.get(name, (15, 1e-3))
    members = Members(np.full(5, rate), np.zeros(5), train_MS, np.zeros_like(train_MS))
    seeds = [10 * seed + m for m in range(5)]
    aggregator = aggregator_class(name)(bags.dim, 1, seeds, **SMALL.get(name, {}))
    settings = Train(epochs=3 if small else epochs, accelerator=accelerator, precision=precision)
    module = MembersModule(aggregator, bags, labels, 2, members, settings, seed=seed)
    fit(module, progress=False)
    logits_MS = predict_logits(module, list(range(len(bags))))[:, :, 0]
    p_S = 1 / (1 + np.exp(-logits_MS[fold, np.arange(len(bags))]))
    return float(roc_auc_score(labels, p_S)), p_S


if __name__ == "__main__":
    main()
