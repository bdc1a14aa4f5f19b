"""The block `confounding` of metrics.json, from a trained study's slides, folds and held-out predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mil.pipeline.data import Study
from mil.pipeline.task_baselines import targets_of
from mil.results.confounding import confounding
from mil.results.site_models import Round, Slides
from mil.results.tables import held_out_ensemble, member_thresholds, pooled_out_of_fold
from mil.results.task_confounding import task_confounding
from mil.results.task_summary import ensemble_parts, fold_parts
from mil.study.roles import Plan, official_test


def confounding_of(study: Study, plan: Plan, predictions: pd.DataFrame) -> dict[str, Any] | None:
    """None where there are fewer than two sites, or `report.confounding=false`.

    With `report.confounding=true` and fewer, the block says that nothing can be said.
    """
    config, cohort = study.config, study.cohort
    wanted = config.report.confounding
    rounds = rounds_of(plan, official_test(cohort))
    n_sites = len(np.unique(study.site_S[study.site_S > 0]))
    if wanted is False or not rounds or (wanted == "auto" and n_sites < 2):
        return None
    if n_sites < 2:
        return {"sites": n_sites, "warnings": [f"report.confounding=true, but the cohort has {NO_SITES[n_sites]}"]}
    table = cohort.table
    slides = Slides(study.bags.means_SD, study.site_S, cohort.labels_S, table["patient"].to_numpy(str), study.sites)
    if study.task.name != "classification":
        parts = fold_parts(study.task, predictions) or ensemble_parts(study.task, predictions)
        fixed = (study.task, slides, targets_of(study), rounds, parts)
        how, n = config.train.harmonize, config.report.bootstrap
        return task_confounding(*fixed, harmonize=how, resamples=n, seed=config.seed)
    return confounding(
        slides,
        rounds,
        held_out_of(predictions, cohort.classes, table["slide"].tolist()),
        cohort.classes,
        harmonize=config.train.harmonize,
        resamples=config.report.bootstrap,
        seed=config.seed,
    )


NO_SITES = ("no sites: name their column (columns.site, or columns.site=tcga)", "one site only")


def rounds_of(plan: Plan, official_S: np.ndarray) -> list[Round]:
    """Training and test slides of the folds of the first repeat, once each.

    Official test slides count where there are no others: one fold, trained on all of the train split.
    """
    first = plan.members[plan.members["repeat"] == plan.members["repeat"].min()].drop_duplicates("fold")
    train_MS, test_MS = plan.uses("train")[first.index], plan.uses("test")[first.index]
    if (test_MS & ~official_S).any():
        test_MS = test_MS & ~official_S
    return [(train_S, test_S) for train_S, test_S in zip(train_MS, test_MS, strict=True) if test_S.any()]


def held_out_of(predictions: pd.DataFrame, classes: tuple[str, ...], slides: list[str]) -> pd.DataFrame:
    """The pooled out-of-fold table, else that of the test ensemble; column `row`: the slide's place in the cohort."""
    thresholds = member_thresholds(predictions, classes)
    table = pooled_out_of_fold(predictions, classes, thresholds)
    if table.empty:
        table = held_out_ensemble(predictions, classes, thresholds)
    return table.assign(row=pd.Index(slides).get_indexer(pd.Index(table["slide"])))
