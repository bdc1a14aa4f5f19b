"""Planted cohorts of other tasks for `benchmarks/confounding.py`: sites that tell the target, and sites that do not.

The target of a patient is that of a normal deviate, which at half of the sites has another mean: the number itself; the
grade, of four, that it falls into; or the logarithm of the hazard of an exponential time that is censored by another.
Clean studies differ between sites in what is no target: deviation, tail, follow-up, or shares of the sites.

Letters: P patients, S slides, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from mil.config import Task as TaskConfig
from mil.results.site_models import Slides
from mil.tasks.contract import Task
from mil.tasks.table import task_of

GRADES = ("0", "1", "2", "3")
CUTS = ndtri([0.4, 0.7, 0.9])
STRATA = 5
"""Parts of the number of which `train.harmonize` is told; as `mil.tasks.regression`."""


@dataclass(frozen=True)
class Plant:
    """What half of the sites have that the others have not. apart: of the means, in deviations of the patients.

    wider: the deviation there, of the others'. tail: the exponential of the deviate is the target. follow_up: mean time
    until censoring there, of the others'.
    """

    said: str
    apart: float = 0.0
    wider: float = 1.0
    tail: bool = False
    follow_up: float = 1.0


PLANTS: dict[str, tuple[Plant, ...]] = {
    "regression": (
        Plant("mean higher by 2 SD", 2.0),
        Plant("mean higher by 1.5 SD", 1.5),
        Plant("mean higher by 1 SD", 1.0),
        Plant("nothing"),
        Plant("nothing; the number has a long tail (lognormal)", tail=True),
        Plant("the same mean, twice the deviation", wider=2.0),
    ),
    "ordinal": (
        Plant("deviate behind the grade higher by 2 SD", 2.0),
        Plant("deviate behind the grade higher by 1.5 SD", 1.5),
        Plant("deviate behind the grade higher by 1 SD", 1.0),
        Plant("nothing"),
    ),
    "survival": (
        Plant("hazard times e^2 = 7.4", 2.0),
        Plant("hazard times e^1.5 = 4.5", 1.5),
        Plant("hazard times e = 2.7", 1.0),
        Plant("nothing"),
        Plant("the same hazard, a third of the follow-up", follow_up=1 / 3),
    ),
}


def made(task: str) -> Task:
    """The task as its tables have it."""
    return task_of(TaskConfig(name=task), GRADES if task == "ordinal" else ())


def targets_of(
    task: str, deviate_P: np.ndarray, plant: Plant, follow_up_P: np.ndarray, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The targets of the task, and the strata that stand for labels."""
    n = len(deviate_P)
    if task == "ordinal":
        grade_P = np.searchsorted(CUTS, deviate_P)
        return {"label": grade_P}, grade_P
    if task == "regression":
        value_P = np.exp(deviate_P) if plant.tail else deviate_P
        edges = np.quantile(value_P, np.arange(1, STRATA) / STRATA)
        return {"value": value_P}, np.searchsorted(edges, value_P)
    time_P, end_P = rng.exponential(size=n) * np.exp(-deviate_P), rng.exponential(size=n) * 1.5 * follow_up_P
    event_P = time_P <= end_P
    return {"time": np.minimum(time_P, end_P), "event": event_P.astype(np.float64)}, event_P.astype(np.int64)


def small_study(task: str, plant: Plant, rng: np.random.Generator) -> tuple[Slides, Mapping[str, np.ndarray]]:
    """50 to 150 patients, a fifth of them with two slides, from 2 to 5 sites of unequal size; without features.

    The hazard of a patient of survival has no spread besides the site's: the time has enough.
    """
    n_patients, n_sites = rng.integers(50, 151), rng.integers(2, 6)
    while True:
        site_P = 1 + rng.choice(n_sites, n_patients, p=rng.dirichlet(np.full(n_sites, 5.0)))
        if len(np.unique(site_P % 2)) == 2:
            break
    half_P = site_P % 2 == 1
    spread_P = 0.0 if task == "survival" else np.where(half_P, plant.wider, 1.0)
    deviate_P = plant.apart * (half_P - 0.5) + spread_P * rng.normal(size=n_patients)
    targets_P, label_P = targets_of(task, deviate_P, plant, np.where(half_P, plant.follow_up, 1.0), rng)
    patient_S = np.concatenate([np.arange(n_patients), rng.choice(n_patients, n_patients // 5, replace=False)])
    names = [f"site {k}" for k in range(1, n_sites + 1)]
    slides = Slides(np.zeros((len(patient_S), 0)), site_P[patient_S], label_P[patient_S], patient_S.astype(str), names)
    return slides, {name: values[patient_S] for name, values in targets_P.items()}


def with_features(
    task: str, x_SD: np.ndarray, carriers: int, rng: np.random.Generator
) -> tuple[np.ndarray, Mapping[str, np.ndarray], np.ndarray]:
    """Features of which the first `carriers` carry a deviate, 0.4 of it each; its targets; their strata."""
    deviate_S = rng.normal(size=len(x_SD))
    told_SD = x_SD.copy()
    told_SD[:, :carriers] += 0.4 * deviate_S[:, None]
    targets, label_S = targets_of(task, deviate_S, Plant(""), np.ones(len(x_SD)), rng)
    return told_SD, targets, label_S
