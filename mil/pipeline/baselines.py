"""The ladder of baselines beside a study's members: the same folds, the same slides held out, paired differences.

Axes: M members, S slides, R rounds (a repeat's fold), C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logit

from mil.pipeline.data import Study
from mil.report.comparison import Run, differences
from mil.results.summary import evaluate
from mil.results.tables import (
    OUT_OF_FOLD,
    TEST_ENSEMBLE,
    held_out_ensemble,
    member_thresholds,
    pooled_out_of_fold,
    predictions_table,
)
from mil.study.roles import ROLES, TEST, TRAIN, Plan
from mil.training.ladder import RUNGS, Cohort

SETS = {"out_of_fold": (OUT_OF_FOLD, pooled_out_of_fold), "test": (TEST_ENSEMBLE, held_out_ensemble)}
"""Key in metrics.json -> what `differences` calls these slides, and what gives their table."""
SHOWN = ("auc", "average_precision", "balanced_accuracy")
LEAST_P = 1e-6
"""Probabilities become logits, of which an ensemble takes the mean: 0 and 1 have none."""


def baselines_block(
    study: Study, plan: Plan, predictions: pd.DataFrame, name: str, resamples: int
) -> dict[str, Any] | None:
    """What metrics.json holds as `baselines`; None where the config has them off, or no slide was held out.

    Args:
        plan: the members. predictions: predictions.csv. name: of the aggregator.
        resamples: for the intervals.
    """
    if not study.config.report.baselines or not (plan.roles_MS == TEST).any():
        return None
    classes, seed = study.cohort.classes, study.config.seed
    own = Run(name, Path(), predictions, {"classes": classes})
    rungs = []
    for key, table in ladder_predictions(study, plan).items():
        rung = Run(key, Path(), table, {"classes": classes})
        rows = {
            str(row["set"]): plain(row) for row in differences([own, rung], intervals=resamples > 0).to_dict("records")
        }
        scored = scores_of(table, classes, resamples, seed)
        for where in scored:
            scored[where]["difference"] = rows.get(SETS[where][0])
        rungs.append({"name": key, "title": RUNGS[key][0], **scored})
    return {
        "aggregator": name,
        "rungs": rungs,
        "verdict": {where: verdict(rungs, where) for where in SETS if any(where in rung for rung in rungs)},
        "tiles_per_slide": ladder_cohort(study, plan).tiles_per_slide,
        "method": "fitted on the train slides of every fold (val slides are used for nothing), settings fixed, see "
        f"mil/training/ladder.py; difference: AUC of {name} - AUC of the baseline on the same slides, paired",
    }


def scores_of(table: pd.DataFrame, classes: Sequence[str], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Counts and metrics of a rung's predictions, of the sets that have slides."""
    thresholds, scored = member_thresholds(table, classes), {}
    for where, (_, table_of) in SETS.items():
        slides = table_of(table, classes, thresholds)
        if len(slides):
            found = evaluate(slides, classes, resamples, seed)
            scored[where] = {"counts": found["counts"], "metrics": {name: found["metrics"][name] for name in SHOWN}}
    return scored


def plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row of `differences` as JSON has it: names left out, what is not a number None."""
    numbers = {str(key): value for key, value in row.items() if key not in ("set", "a", "b")}
    return {key: None if pd.isna(value) else value for key, value in numbers.items()}


def verdict(rungs: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """Of which baselines the aggregator is better, worse, or neither, by the paired interval; and the best of them.

    `unknown`: there is no interval (no resamples, or a prediction is not a number).
    """
    found: dict[str, Any] = {"better_than": [], "not_better_than": [], "worse_than": [], "unknown": []}
    aucs = {}
    for rung in rungs:
        found[beside(rung[where]["difference"])].append(rung["name"])
        aucs[rung["name"]] = rung[where]["metrics"]["auc"]["value"]
    known = {name: value for name, value in aucs.items() if value is not None}
    return found | {"best": max(known, key=lambda name: known[name]) if known else None}


def beside(difference: dict[str, Any] | None) -> str:
    """What the interval of aggregator - baseline says."""
    if difference is None or difference["low"] is None or difference["high"] is None:
        return "unknown"
    if difference["low"] > 0:
        return "better_than"
    return "worse_than" if difference["high"] < 0 else "not_better_than"


# --- predictions -----------------------------------------------------------------------------------------------------


def ladder_predictions(study: Study, plan: Plan) -> dict[str, pd.DataFrame]:
    """Rung -> its rows as predictions.csv has them, of test slides only; made once for all aggregators of the study.

    A member's rows are those of its repeat and fold: seeds change nothing, and with the same keys the pairs stay pairs.
    """
    made = study.once.setdefault("ladder", {})
    key = (plan.roles_MS.tobytes(), tuple(plan.members["member"].tolist()))
    if key not in made:
        cohort, round_M = ladder_cohort(study, plan), rounds_of(plan)[1]
        roles_MS = np.array(ROLES, dtype=object)[plan.roles_MS]
        made[key] = {}
        for name, (_, probabilities) in RUNGS.items():
            logits_MSC = as_logits(probabilities(cohort))[round_M]
            table = predictions_table(plan.members, study.cohort.table, roles_MS, logits_MSC)
            made[key][name] = table[table["role"] == ROLES[TEST]].reset_index(drop=True)
    found: dict[str, pd.DataFrame] = made[key]
    return found


def ladder_cohort(study: Study, plan: Plan) -> Cohort:
    """The slides and their parts in every round: those of its first member, as seeds share them."""
    first_R, _ = rounds_of(plan)
    roles_RS = plan.roles_MS[first_R]
    labels_S, n_classes = study.cohort.labels_S, len(study.cohort.classes)
    return Cohort(study.bags, labels_S, n_classes, roles_RS == TRAIN, roles_RS == TEST, study.config.seed)


def rounds_of(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The first member of every round (R,), and every member's round (M,): members whose slides have the same roles."""
    _, first_R, round_M = np.unique(plan.roles_MS, axis=0, return_index=True, return_inverse=True)
    return first_R, round_M.reshape(-1)


def as_logits(p_RSC: np.ndarray) -> np.ndarray:
    """Log-odds of the last of two classes (R, S, 1), logarithms of several (R, S, C)."""
    safe_RSC = np.clip(p_RSC, LEAST_P, 1 - LEAST_P)
    return np.asarray(logit(safe_RSC[..., 1:]) if p_RSC.shape[-1] == 2 else np.log(safe_RSC))
