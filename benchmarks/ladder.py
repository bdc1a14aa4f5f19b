"""How long each rung of the ladder of baselines takes on features like Camelyon16's; what it reaches on UCSB breast.

    python benchmarks/ladder.py [task=survival] [slides=269] [tiles=1000] [dim=768] [folds=5] [rounds=3] [data=FOLDER]
        [out=FILE.md]

`task`: survival, regression or ordinal (four grades) instead of classes: the ladder of that task.

Times are of all folds of one rung with reading the features, which are random float16 in memory. Processor seconds are
those of all threads together: on two cores that nobody else uses, a rung takes between half of them and all.
AUC: the breast set's slides in five folds, scikit-learn's StratifiedKFold, three seeds; left out without `data`.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import machine
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from mil.training.bags import Bags
from mil.training.ladder import RUNGS, Cohort
from mil.training.task_ladder import ON_MEANS, TILE_RUNG, fit_task_ladder, said_of_tiles, titles_of

BREAST = "ucsb_breast.npz"
GRADES = 4


def cohort_of(arrays: list[torch.Tensor], labels_S: np.ndarray, folds: int, seed: int) -> Cohort:
    """All slides once held out."""
    lengths_S = np.array([len(array) for array in arrays])
    bags = Bags(tuple(map(str, range(len(arrays)))), lengths_S, arrays[0].shape[1], "ram", arrays)
    test_RS = np.zeros((folds, len(arrays)), dtype=bool)
    for r, (_, test) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels_S, labels_S)):
        test_RS[r, test] = True
    return Cohort(bags, labels_S, 2, ~test_RS, test_RS, seed)


def made_up(slides: int, tiles: int, dim: int, folds: int) -> Cohort:
    generator = torch.Generator().manual_seed(0)
    labels_S = np.random.default_rng(0).permutation(np.arange(slides) % 2)
    return cohort_of([torch.randn(tiles, dim, generator=generator).half() for _ in range(slides)], labels_S, folds, 0)


def breast(npz: Path, seed: int) -> Cohort:
    with np.load(npz) as file:
        x_ND, bag_N, labels_S = file["X"].astype(np.float32), file["bag_id"], file["y"].astype(np.int64)
    arrays = [torch.from_numpy(x_ND[bag_N == bag]) for bag in dict.fromkeys(bag_N.tolist())]
    return cohort_of(arrays, labels_S, 5, seed)


def pooled_auc(cohort: Cohort, p_RSC: np.ndarray) -> float:
    rows_R, rows_S = np.nonzero(cohort.test_RS)
    return float(roc_auc_score(cohort.labels_S[rows_S], p_RSC[rows_R, rows_S, 1]))


def timed(cohort: Cohort, name: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of one rung from the start: nothing is kept from another."""
    fresh = Cohort(replace(cohort.bags), cohort.labels_S, 2, cohort.train_RS, cohort.test_RS, cohort.seed)
    began, used = time.perf_counter(), time.process_time()
    RUNGS[name][1](fresh)
    return time.perf_counter() - began, time.process_time() - used


def targets_of(task: str, slides: int) -> dict[str, np.ndarray]:
    """Of random numbers, as the features are."""
    rng = np.random.default_rng(1)
    if task == "survival":
        return {"time": rng.exponential(size=slides), "event": (rng.random(slides) < 0.6).astype(np.float64)}
    return {"value": rng.normal(size=slides)} if task == "regression" else {"label": rng.integers(0, GRADES, slides)}


def timed_task(cohort: Cohort, task: str, name: str) -> tuple[float, float]:
    """As `timed`, of a rung of another task: fitted on every round's training slides, asked about its test slides."""
    targets, bags, train_RS = targets_of(task, len(cohort.bags)), replace(cohort.bags), cohort.train_RS
    began, used = time.perf_counter(), time.process_time()
    if name == TILE_RUNG:
        ladder = fit_task_ladder(task, bags, targets, GRADES, train_RS, np.arange(len(train_RS)), cohort.seed)
        for s in np.flatnonzero(cohort.test_RS.any(axis=0)):
            asked_R = np.flatnonzero(cohort.test_RS[:, s])
            said_of_tiles(task, bags.features(int(s)).numpy(), ladder.weights_RCD, ladder.bias_RC, asked_R)
    else:
        for train_S, test_S in zip(train_RS, cohort.test_RS, strict=True):
            own = {key: values[train_S] for key, values in targets.items()}
            ON_MEANS[task][name][1](bags.means_SD[train_S], own, GRADES)(bags.means_SD[test_S])
    return time.perf_counter() - began, time.process_time() - used


def times_table(cohort: Cohort, rounds: int, task: str = "classification") -> list[str]:
    lines = ["| rung | seconds, median | processor seconds, median | all seconds | all processor seconds |"]
    lines.append("| --- | --- | --- | --- | --- |")
    classes = task == "classification"
    titles = {name: title for name, (title, _) in RUNGS.items()} if classes else titles_of(task)
    for name, title in titles.items():
        both = np.array([timed(cohort, name) if classes else timed_task(cohort, task, name) for _ in range(rounds)])
        each = [", ".join(f"{value:.2f}" for value in column) for column in both.T]
        middle = np.median(both, axis=0)
        lines.append(f"| {title} | {middle[0]:.2f} | {middle[1]:.2f} | {each[0]} | {each[1]} |")
    return lines


def breast_table(npz: Path) -> list[str]:
    lines = ["| rung | AUC of seeds 0, 1, 2 | mean |", "| --- | --- | --- |"]
    cohorts = [breast(npz, seed) for seed in range(3)]
    for title, probabilities in RUNGS.values():
        aucs = [pooled_auc(cohort, probabilities(cohort)) for cohort in cohorts]
        lines.append(f"| {title} | {', '.join(f'{auc:.3f}' for auc in aucs)} | {np.mean(aucs):.3f} |")
    return lines


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    slides, tiles, dim, folds, rounds = (
        int(given.get(key, default))
        for key, default in (("slides", 269), ("tiles", 1000), ("dim", 768), ("folds", 5), ("rounds", 3))
    )
    lines = ["# The ladder of baselines", "", f"Command: `python benchmarks/ladder.py {shlex.join(arguments)}`".strip()]
    lines += ["", machine("torch", "numpy", "scikit-learn"), ""]
    task = given.get("task", "classification")
    of = "" if task == "classification" else f"{task}, "
    lines += [f"## {of}{folds} folds of {slides} x {tiles:,} x {dim} float16, medians of {rounds}", ""]
    lines += times_table(made_up(slides, tiles, dim, folds), rounds, task)
    npz = Path(given["data"]) / BREAST if "data" in given else None
    if npz and npz.exists():
        lines += ["", "## UCSB breast: 58 bags, 26 malignant", "", *breast_table(npz)]
    text = "\n".join(lines) + "\n"
    print(text)
    if "out" in given:
        Path(given["out"]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
