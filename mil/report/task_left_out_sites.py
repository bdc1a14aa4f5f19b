"""The block `left_out_sites` of metrics.json for tasks other than classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mil.results.intervals import SCALES, difference_interval, resampled
from mil.results.tables import held_out
from mil.results.task_summary import fold_parts, metrics_with_intervals, with_interval
from mil.tasks.contract import Part, Task
from mil.tasks.metrics import none_if_nan

METHOD = (
    "one member a site and seed, trained on the slides of all other sites in the same pass; the chosen folds: "
    "out-of-fold, the same slides. The difference (left out - chosen folds) is paired, patients drawn with replacement"
)


def task_left_out_block(
    task: Task,
    left_out: pd.DataFrame,
    chosen: pd.DataFrame,
    site_of_member: Mapping[int, str],
    *,
    not_left_out: Mapping[str, str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The main metric of every site with its interval, of all together, and of the chosen folds on the same slides.

    Arguments: as for `mil.report.left_out_sites.left_out_block`; `left_out` and `chosen` with their training rows.
    """
    scored = left_out[held_out(left_out)]
    chosen = chosen[(chosen["role"] == "train") | (held_out(chosen) & chosen["slide"].isin(scored["slide"]))]
    site_of = dict(zip(scored["slide"], scored["member"].map(site_of_member), strict=True))

    def of(slides: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, rows in (("left_out", left_out), ("chosen_folds", chosen)):
            parts = fold_parts(task, rows[(rows["role"] == "train") | rows["slide"].isin(slides)])
            if name == "left_out":
                own = scored[scored["slide"].isin(slides)]
                found["counts"] = {"slides": own["slide"].nunique(), "patients": own["patient"].nunique()}
            found[name] = one_metric(task, parts, resamples, seed)
        return found

    sets = [fold_parts(task, rows) for rows in (left_out, chosen)]
    names = sorted(set(site_of.values()))
    return {
        "sites": [{"site": name, **of([s for s, own in site_of.items() if own == name])} for name in names],
        "all": of(list(site_of)),
        "difference": gap(task, sets[0], sets[1], resamples, seed) if all(sets) else None,
        "members": len(site_of_member),
        "not_left_out": [{"site": site, "why": why} for site, why in not_left_out.items()],
        "method": METHOD,
    }


def one_metric(task: Task, parts: Sequence[Part], resamples: int, seed: int) -> dict[str, Any]:
    """Value and interval of the main metric; undefined without rows."""
    if not parts:
        return {"value": None, "low": None, "high": None}
    found: dict[str, Any] = metrics_with_intervals(task, parts, resamples, seed, names=[task.main])[task.main]
    return found


def gap(task: Task, a: Sequence[Part], b: Sequence[Part], resamples: int, seed: int) -> dict[str, Any]:
    """The difference a - b with its interval; the rows of a patient count alike on both sides."""
    both = [*a, *b]
    patients = [str(patient) for part in both for patient in part.table["patient"]]
    ends = np.cumsum([len(part.table) for part in both])[:-1]

    def scores(weights_RN: np.ndarray) -> dict[str, np.ndarray]:
        weights = np.split(weights_RN, ends, axis=1)
        sides = ((a, weights[: len(a)]), (b, weights[len(a) :]))
        return {"both": np.stack([task.score(side, own, [task.main])[task.main] for side, own in sides], axis=1)}

    of_a, of_b = (none_if_nan(value) for value in scores(np.ones((1, len(patients))))["both"][0])
    apart = None if of_a is None or of_b is None else of_a - of_b
    drawn = (resampled(scores, patients, resamples, seed) or {}).get("both")
    limits = difference_interval((of_a, of_b), drawn, SCALES[task.metrics[task.main].scale], len(set(patients)))
    found = with_interval(apart, limits, "difference")
    return {"difference": found.pop("value"), **found}
