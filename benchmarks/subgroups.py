"""How often the tests of sub-groups say that a group differs, where none does, and how often Holm's correction does.

    python benchmarks/subgroups.py [--draws 2000] [--out FILE.md]

A cohort of 1 to 3 slides a patient, intraclass correlation 0.5, AUC 0.92; groups are drawn apart from the scores.
`exchangeable`: nothing but chance. `shifted`: all scores of the group are higher by one standard deviation, its AUC is
that of the rest. `unequal`: the group's patients have one slide, the others three. `shared`: half of the patients have
slides in the group and in the rest. Beside the studentised permutation test is Wald's with the same standard error. The
last row tests four groups at once: how often the smallest p value is below 0.05, and how often Holm's is. Nominal: 5 %.
Below, the tests of the other tasks' main metrics, of cohorts of 60 patients with 1 or 2 slides in two folds and groups
drawn apart from all (`mil.results.task_subgroups`), a tenth as many draws.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from machine import machine, publish
from scipy.stats import kstest, norm
from statsmodels.stats.multitest import multipletests

from mil.config import Task as TaskConfig
from mil.results.subgroups import arrangements, share_as_far, studentised
from mil.results.task_subgroups import p_values, units_of
from mil.tasks.contract import Part, Task
from mil.tasks.table import task_of

LEVEL, PERMUTATIONS, CORRELATION, DISTANCE = 0.05, 199, 0.5, 2.0
CASES = (
    ("exchangeable", 60, 0.5),
    ("exchangeable", 60, 0.25),
    ("exchangeable", 130, 0.2),
    ("shifted", 130, 0.3),
    ("unequal", 130, 0.3),
    ("shared", 100, 0.4),
)
"""Kind, patients (half of them positive), share of them in the group."""

Draw = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def one_cohort(kind: str, patients: int, share: float, rng: np.random.Generator) -> Draw:
    """label_S, p_SC, patient_S, and a group 0, 1, ... of every slide; group 0 is the one that is tested."""
    group_P = (rng.permutation(patients // 2) >= round(share * patients / 2)).astype(int).repeat(2)
    slides_P = np.where(group_P == 0, 1, 3) if kind == "unequal" else rng.integers(1, 4, patients)
    patient_S = np.repeat(np.arange(patients), slides_P)
    label_S, group_S = patient_S % 2, group_P[patient_S]
    if kind == "shared":
        group_S = np.where((patient_S // 2) % 2 == 0, rng.random(len(patient_S)) > share, group_S).astype(int)
    if kind == "four":
        group_S = rng.integers(0, 4, patients // 2).repeat(2)[patient_S]
    noise_S = np.sqrt(CORRELATION) * rng.normal(size=patients)[patient_S]
    noise_S = noise_S + np.sqrt(1 - CORRELATION) * rng.normal(size=len(patient_S))
    score_S = DISTANCE * label_S + noise_S + (kind == "shifted") * (group_S == 0)
    p_S = 1 / (1 + np.exp(1 - score_S))
    return label_S, np.stack([1 - p_S, p_S], axis=1), patient_S, group_S


def p_of(draw: Draw, group: int, rng: np.random.Generator) -> tuple[float, float]:
    """By permutation, and Wald's."""
    label_S, p_SC, patient_S, group_S = draw
    inside_RS = arrangements(group_S == group, label_S, patient_S, PERMUTATIONS, rng)
    statistic_R = studentised(label_S, p_SC, patient_S, inside_RS)
    return share_as_far(statistic_R), float(2 * norm.sf(abs(statistic_R[0])))


def family(patients: int, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether any of four groups is said to differ: by its own p value, by Holm's."""
    draw = one_cohort("four", patients, 0.0, rng)
    p = [p_of(draw, group, rng)[0] for group in range(4)]
    return min(p) < LEVEL, bool(multipletests(p, LEVEL, method="holm")[0].any())


def rows_of(draws: int) -> list[str]:
    lines = [
        "| kind | patients | share in the group | permutation: p < 0.05 | uniform (Kolmogorov-Smirnov p) | Wald |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, (kind, patients, share) in enumerate(CASES):
        rng = np.random.default_rng([1, number])
        p_D2 = np.array([p_of(one_cohort(kind, patients, share, rng), 0, rng) for _ in range(draws)])
        jittered_D = p_D2[:, 0] - rng.random(draws) / (PERMUTATIONS + 1)  # p values come in steps
        rates = [f"{100 * np.mean(p_D2[:, k] <= LEVEL):.1f} %" for k in (0, 1)]
        uniform = kstest(jittered_D, "uniform").pvalue
        lines.append(f"| {kind} | {patients} | {share} | {rates[0]} | {uniform:.2f} | {rates[1]} |")
    rng = np.random.default_rng([1, 99])
    any_D2 = np.array([family(160, rng) for _ in range(draws)])
    plain, holm = 100 * any_D2.mean(axis=0)
    return [*lines, "", f"Four groups of 160 patients: some p < 0.05 in {plain:.1f} %, some of Holm's in {holm:.1f} %."]


GRADES = ("low", "mid", "high")
TASKS = {
    "survival": TaskConfig(name="survival", horizons=[1.0]),
    "regression": TaskConfig(name="regression"),
    "ordinal": TaskConfig(name="ordinal"),
}


def task_parts(task: Task, patients: int, rng: np.random.Generator) -> list[Part]:
    """Held-out predictions of two folds that know some of the target."""
    patient_S = np.repeat(np.arange(patients), rng.integers(1, 3, patients))
    hidden_S, noise_S = (rng.normal(size=patients)[patient_S] for _ in range(2))
    said_S, time_S = hidden_S + noise_S, rng.exponential(np.ones(patients))[patient_S] * np.exp(-hidden_S)
    until_S, above = 2 * rng.exponential(size=patients)[patient_S], said_S[:, None] - [-0.5, 0.5]
    p_SC = 1 / (1 + np.exp(-4 * above))
    slides = pd.DataFrame({"slide": [f"s{i}" for i in range(len(patient_S))], "patient": patient_S.astype(str)})
    slides = slides.assign(split="train", members=1, value=hidden_S, prediction=said_S, risk=said_S, standing=said_S)
    slides["label"] = np.array(GRADES)[np.digitize(hidden_S, [-0.5, 0.5])]
    slides[["p_0", "p_1", "p_2"]] = np.stack([1 - p_SC[:, 0], p_SC[:, 0] - p_SC[:, 1], p_SC[:, 1]], axis=1)
    slides["time"], slides["event"] = np.minimum(time_S, until_S), (time_S <= until_S).astype(float)
    return [Part(task.units(own), own) for own in (slides[patient_S % 2 == fold] for fold in (0, 1))]


def task_rows(draws: int, patients: int = 60) -> list[str]:
    """One row a task: how often its main metric is said to differ."""
    lines = ["", "| task | metric | p < 0.05 |", "| --- | --- | --- |"]
    for number, (name, config) in enumerate(TASKS.items()):
        task, rng, found = task_of(config, GRADES), np.random.default_rng([2, number]), []
        for seed in range(draws):
            parts = task_parts(task, patients, rng)
            table = pd.concat([part.table for part in parts], ignore_index=True)
            units, inside_P = units_of(table), rng.random(patients) < 0.4
            inside_U = inside_P[table["patient"].astype(int)][units.first_U]
            found.append(p_values(task, parts, units, inside_U, [task.main], PERMUTATIONS, seed)[task.main][1])
        rate = 100 * np.mean(np.array(found) <= LEVEL)
        lines.append(f"| {name} | {task.metrics[task.main].title} | {rate:.1f} % |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    error = 100 * np.sqrt(LEVEL * (1 - LEVEL) / options.draws)
    text = "\n".join(
        [
            "# Tests of sub-groups under a true null hypothesis",
            "",
            *rows_of(options.draws),
            *task_rows(options.draws // 10),
            "",
            f"- {options.draws} draws a row, {PERMUTATIONS} arrangements; standard error of a true 5 %: {error:.1f}",
            f"- Command: `{' '.join(['python benchmarks/subgroups.py', *sys.argv[1:]])}`",
            f"- Machine: {machine('numpy', 'scipy', 'statsmodels')}",
        ]
    )
    publish(text, options.out)


if __name__ == "__main__":
    main()
