"""The ladder of baselines beside a study's members: the same folds, the same slides held out, paired differences.

Axes: M members, S slides, R rounds (a repeat's fold), C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mil.pipeline.data import Study
from mil.report.ladder import as_logits, ladder_block
from mil.results.tables import predictions_table
from mil.study.roles import ROLES, TEST, TRAIN, Plan
from mil.training.ladder import RUNGS, Cohort
from mil.training.ladder_saved import save_ladder


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
    return ladder_block(
        name,
        study.cohort.classes,
        predictions,
        ladder_predictions(study, plan),
        resamples=resamples,
        seed=study.config.seed,
        tiles_per_slide=ladder_cohort(study, plan).tiles_per_slide,
    )


def save_baselines(study: Study, plan: Plan, folder: Path) -> None:
    """What the ladder fitted, for `mil.predict`; nothing where the config has it off."""
    if study.config.report.baselines:
        save_ladder(folder, ladder_cohort(study, plan), rounds_of(plan)[1])


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
    """The slides and their parts in every round: those of its first member, as seeds share them; made once a plan."""
    made, key = study.once.setdefault("ladder_cohort", {}), plan.roles_MS.tobytes()
    if key not in made:
        roles_RS, labels_S = plan.roles_MS[rounds_of(plan)[0]], study.cohort.labels_S
        fixed = (study.bags, labels_S, len(study.cohort.classes))
        made[key] = Cohort(*fixed, roles_RS == TRAIN, roles_RS == TEST, study.config.seed)
    found: Cohort = made[key]
    return found


def rounds_of(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The first member of every round (R,), and every member's round (M,): members whose slides have the same roles."""
    _, first_R, round_M = np.unique(plan.roles_MS, axis=0, return_index=True, return_inverse=True)
    return first_R, round_M.reshape(-1)
