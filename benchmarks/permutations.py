"""The permutation test of a study on noise, where its p value must be uniform, and on planted signals.

    python benchmarks/permutations.py [--studies 200] [--out FILE.md]

Small cohorts (16 patients with 1 or 2 slides, which are alike within a patient; 4 tiles of 4 features), mean pooling,
two folds; every study trains in one pass with its 19 permutations, as `report.permutations` does.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kstest

from extract.cohort import check_cohort
from mil.aggregators import aggregator_class
from mil.config import Train
from mil.results.permutations import held_out_aucs, null_distributions
from mil.results.tables import predictions_table
from mil.study.permutations import permute
from mil.study.plan import make_plan
from mil.study.roles import ROLES
from mil.training.bags import Bags
from mil.training.module import Members, MembersModule, fit, predict_logits

PATIENTS, CLASSES = 16, ["a", "b"]


def one_study(seed: int, *, planted: float, permutations: int, epochs: int) -> float:
    """The p value of a cohort whose positives are shifted by `planted` standard deviations of a patient's effect."""
    rng = np.random.default_rng([3, seed])
    patient_S = np.repeat(np.arange(PATIENTS), rng.integers(1, 3, PATIENTS))
    labels_S = (patient_S % 2).astype(np.int64)
    means_SD = rng.normal(size=(PATIENTS, 4))[patient_S] + planted * labels_S[:, None]
    tiles = [torch.from_numpy(rng.normal(mean, 1, size=(4, 4)).astype(np.float32)) for mean in means_SD]
    names = tuple(f"s{i}" for i in range(len(tiles)))
    bags = Bags(names, np.full(len(tiles), 4), 4, "ram", tiles)
    table = pd.DataFrame({"slide": names, "patient": [f"p{p}" for p in patient_S], "split": "train"})
    cohort = check_cohort(table.assign(label=[CLASSES[c] for c in labels_S], path=None, mpp=np.nan), CLASSES)
    plan_of = partial(make_plan, folds=2, lr=0.1, weight_decay=0.0, split_seed=seed)
    plan = plan_of(cohort)
    size, permuted = len(plan), permute(cohort, plan_of, permutations, seed, first=len(plan))
    roles_MS = np.concatenate([plan.roles_MS, permuted.plan.roles_MS])
    labels_MS = np.concatenate([np.tile(labels_S, (size, 1)), permuted.labels_MS])
    seeds = [*plan.members["init_seed"], *permuted.plan.members["init_seed"]]
    train_MS = roles_MS == ROLES.index("train")
    rates, nothing_M = np.full(len(seeds), 0.1), np.zeros(len(seeds))
    members = Members(rates, nothing_M, train_MS, np.zeros_like(train_MS), labels_MS=labels_MS)
    settings = Train(epochs=epochs, batch_size=5, accelerator="cpu")
    module = MembersModule(aggregator_class("mean")(4, 1, seeds), bags, labels_S, 2, members, settings)
    fit(module, progress=False)
    logits_MSC = predict_logits(module, list(range(len(tiles))))
    aucs = []
    for start in range(0, len(seeds), size):
        rows = slice(start, start + size)
        slides = cohort.table.assign(label=[CLASSES[c] for c in labels_MS[start]])
        said = predictions_table(plan.members, slides, np.array(ROLES)[roles_MS[rows]], logits_MSC[rows])
        aucs.append(held_out_aucs(said, CLASSES))
    block = null_distributions(aucs[0], aucs[1:], members=len(seeds) - size)
    return float(block["sets"]["cross_validated"]["p_value"])


def main() -> None:
    from machine import machine, publish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = ["| planted | p <= 0.05 | p <= 0.5 | uniform (Kolmogorov-Smirnov p) |", "| --- | --- | --- | --- |"]
    for planted in (0.0, 0.5, 1.0):
        studies = range(options.studies if planted == 0 else options.studies // 4)
        p = np.array([one_study(seed, planted=planted, permutations=19, epochs=2) for seed in studies])
        steps = np.random.default_rng(0).random(len(p)) / 20  # p values come in twentieths
        shares = [f"{100 * np.mean(p <= level + 1e-9):.1f} %" for level in (0.05, 0.5)]
        lines.append(f"| {planted} | {shares[0]} | {shares[1]} | {kstest(p - steps, 'uniform').pvalue:.2g} |")
    text = "\n".join(
        [
            "# The permutation test of a study: noise, and planted signals",
            "",
            *lines,
            "",
            f"- {options.studies} studies of noise, a quarter as many of each planted kind; 19 permutations each",
            f"- Command: `{' '.join(['python benchmarks/permutations.py', *sys.argv[1:]])}`",
            f"- Machine: {machine('numpy', 'torch', 'lightning')}",
        ]
    )
    publish(text, options.out)


if __name__ == "__main__":
    main()
