"""How often a report warns that site alone predicts the label, and what taking the site out of the features does.

    python benchmarks/confounding.py [--task survival] [--studies 1000] [--repairs 100] [--out FILE.md]

First table: small studies of 50 to 150 patients (a fifth of them with two slides) from 2 to 5 sites of unequal size.
Where the label follows the site, half of the sites have the class in the first share of their patients and the others
in the second; where it does not, all have it in the same share. Only `mil.results.confounding.association`, which
decides about the warning, is asked; a study with one class is drawn again.

Second table: cohorts whose sites shift and stretch every feature and whose label does not depend on the site. A slide
is a mean tile: 64 features, the label's effect spread over 8 of them. Mean over the cohorts of what the report shows,
five folds: the linear probe for the site and the linear model's AUC for the label, features as they are and harmonised.
Last column: the probe of a judge who has 1,000 further slides that were mapped as those of the first fold's member are.

`--task`: both tables for survival, regression or ordinal studies (`benchmarks/planted.py`), with the main metric of the
linear model of `mil.training.task_ladder` in place of the AUC. What is printed is to be appended to the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from machine import machine, publish
from planted import PLANTS, Plant, made, small_study, with_features

from mil.results import task_confounding
from mil.results.confounding import association, one_a_patient
from mil.results.site_models import Slides, harmonized, label_auc, linear_model, probe_sites

SHARES = ((0.9, 0.1), (0.8, 0.2), (0.75, 0.25), (0.7, 0.3), (0.5, 0.5), (0.2, 0.2))
"""Share of the class at one half of the sites and at the other; equal ones are clean."""
DIM, LABEL_FEATURES = 64, 8
COHORTS = ((2, 200, 2.0), (2, 100, 2.0), (2, 200, 0.6), (4, 200, 2.0))
"""Sites, slides, and the deviation of a site's shifts, in those of the slides."""


def study(shares: tuple[float, float], rng: np.random.Generator) -> Slides:
    """Who is from where and has what; without features."""
    n_patients, n_sites = rng.integers(50, 151), rng.integers(2, 6)
    while True:
        site_P = 1 + rng.choice(n_sites, n_patients, p=rng.dirichlet(np.full(n_sites, 5.0)))
        label_P = (rng.random(n_patients) < np.array(shares)[site_P % 2]).astype(np.int64)
        if len(np.unique(label_P)) == 2 and len(np.unique(site_P % 2)) == 2:
            break
    patient_S = np.concatenate([np.arange(n_patients), rng.choice(n_patients, n_patients // 5, replace=False)])
    names = [f"site {k}" for k in range(1, n_sites + 1)]
    return Slides(np.zeros((len(patient_S), 0)), site_P[patient_S], label_P[patient_S], patient_S.astype(str), names)


def warned(shares: tuple[float, float], rng: np.random.Generator) -> bool:
    """Whether the report of such a study would warn."""
    slides = study(shares, rng)
    everyone = np.ones(len(slides.site_S), dtype=bool)
    return association(*one_a_patient(slides, everyone), seed=int(rng.integers(2**31))).flagged


def warned_of(task: str, plant: Plant, rng: np.random.Generator) -> bool:
    """Whether the report of a study of another task would warn."""
    slides, targets = small_study(task, plant, rng)
    everyone = np.ones(len(slides.site_S), dtype=bool)
    told = task_confounding.one_a_patient(slides, everyone, task, targets)
    return task_confounding.association(*told, seed=int(rng.integers(2**31))).flagged


def cohort(
    n_sites: int, n: int, strength: float, rng: np.random.Generator, fresh: int = 0, task: str = "classification"
) -> tuple[Slides, Mapping[str, np.ndarray], np.ndarray]:
    """`n` slides and `fresh` further ones of the same sites; their targets, but for classes; which are the first."""
    site_S = rng.integers(1, n_sites + 1, n + fresh)
    label_S, targets = rng.integers(0, 2, n + fresh), {}
    shift_KD = strength * rng.normal(size=(n_sites + 1, DIM))
    stretch_KD = rng.uniform(0.7, 1.4, (n_sites + 1, DIM))
    x_SD = rng.normal(size=(n + fresh, DIM))
    if task == "classification":
        x_SD[:, :LABEL_FEATURES] += 0.8 * label_S[:, None]
    else:
        x_SD, targets, label_S = with_features(task, x_SD, LABEL_FEATURES, rng)
    means_SD = x_SD * stretch_KD[site_S] + shift_KD[site_S]
    names = [f"site {k}" for k in range(1, n_sites + 1)]
    patient_S = np.arange(n + fresh).astype(str)
    return Slides(means_SD, site_S, label_S, patient_S, names), targets, np.arange(n + fresh) < n


def repaired(
    n_sites: int,
    n: int,
    strength: float,
    rng: np.random.Generator,
    fresh: int = 1000,
    task: str = "classification",
) -> np.ndarray:
    """(3 ways, 3): balanced accuracy for the site, the metric of the target, and what the judge finds."""
    slides, targets, first_S = cohort(n_sites, n, strength, rng, fresh, task)
    fold_S = np.where(first_S, rng.permutation(len(first_S)) % 5, -1)
    rounds = [(first_S & (fold_S != k), fold_S == k) for k in range(5)]
    sites = np.arange(1, n_sites + 1)
    rows = []
    for how in ("none", "combat", "project"):
        probe = probe_sites(slides, rounds, sites, how, intervals=False)
        if task == "classification":
            metric = label_auc(slides, rounds, how)
        else:
            metric = task_confounding.linear_metric(made(task), slides, targets, rounds, how)
        rows.append((probe.balanced_accuracy, metric, judged(slides, rounds[0][0], first_S, how)))
    return np.array(rows, dtype=np.float64)


def judged(slides: Slides, train_S: np.ndarray, first_S: np.ndarray, how: str) -> float:
    """Balanced accuracy of a probe that was trained on half of the further slides, on the other half."""
    x_SD, further = harmonized(slides, train_S, how), np.flatnonzero(~first_S)
    if not len(further):
        return float("nan")
    one, other = further[::2], further[1::2]
    called = linear_model().fit(x_SD[one], slides.site_S[one]).predict(x_SD[other])
    return float(np.mean([np.mean(called[slides.site_S[other] == k] == k) for k in np.unique(slides.site_S[other])]))


def warned_table(studies: int) -> list[str]:
    lines = ["| class at half of the sites | at the others | studies that are warned of |", "| --- | --- | --- |"]
    for number, shares in enumerate(SHARES):
        rng = np.random.default_rng([1, number])
        share = 100 * np.mean([warned(shares, rng) for _ in range(studies)])
        lines.append(f"| {100 * shares[0]:.0f} % | {100 * shares[1]:.0f} % | {share:.1f} % |")
    return lines


def warned_of_table(task: str, studies: int) -> list[str]:
    lines = ["| half of the sites, against the others | studies that are warned of |", "| --- | --- |"]
    for number, plant in enumerate(PLANTS[task]):
        rng = np.random.default_rng([3, number, *task.encode()])
        share = 100 * np.mean([warned_of(task, plant, rng) for _ in range(studies)])
        lines.append(f"| {plant.said} | {share:.1f} % |")
    return lines


def repairs_table(task: str, repairs: int) -> list[str]:
    metric = "AUC for the label"
    if task != "classification":
        metric = f"{made(task).metrics[made(task).main].title}, linear model"
    lines = [
        f"| sites | slides | shift of a site | features | site probe (chance) | {metric} | judge's probe |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, (n_sites, n, strength) in enumerate(COHORTS):
        rng = np.random.default_rng([2, number])
        mean_33 = np.mean([repaired(n_sites, n, strength, rng, task=task) for _ in range(repairs)], axis=0)
        for how, (site, found, judge) in zip(("as they are", "ComBat", "projection"), mean_33, strict=True):
            where = f"{n_sites} | {n} | {strength:g} | {how}"
            lines.append(f"| {where} | {site:.3f} ({1 / n_sites:.2f}) | {found:.3f} | {judge:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="classification", choices=["classification", *PLANTS])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--repairs", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    classes = options.task == "classification"
    title = "# Sites: how often a study is warned of, and what harmonising does"
    text = "\n".join(
        [
            title if classes else f"## {options.task.capitalize()}",
            "",
            *(warned_table(options.studies) if classes else warned_of_table(options.task, options.studies)),
            "",
            *repairs_table(options.task, options.repairs),
            "",
            f"- {options.studies} studies a row of the first table, {options.repairs} cohorts a row of the second",
            f"- Command: `{' '.join(['python benchmarks/confounding.py', *sys.argv[1:]])}`",
            f"- Machine: {machine('numpy', 'scipy', 'scikit-learn')}",
        ]
    )
    publish(text, options.out)


if __name__ == "__main__":
    main()
