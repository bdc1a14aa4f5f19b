"""What covariates are worth: the study with them, without them, and they alone; the same folds, in pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mil.pipeline.data import Study
from mil.pipeline.fusion import fuse
from mil.pipeline.results import facts_of, predictions_of
from mil.pipeline.training import Trained, alone_module, train_members
from mil.pipeline.variants import Variant, variants_block
from mil.study.covariates import Covariate
from mil.training.covariates import fit_alone

WITHOUT = "without_covariates"
"""Folder, in the run folder, of what the same members leave that are told no covariates."""
METHOD = (
    "With: a linear term of the covariates, scaled on each member's training patients, is added to every output of the "
    "head; it starts where the covariates stand alone and trains along. Without: the same members from the same start, "
    "told none. Alone: the task's own loss on the covariates, with a small ridge (scikit-learn's C = 1)"
)


def covariates_block(
    study: Study, trained: Trained, predictions: pd.DataFrame, name: str, folder: Path | None
) -> dict[str, Any] | None:
    """What metrics.json holds as `covariates`; None for a study without them.

    Args:
        predictions: predictions.csv. name: of the aggregator. folder: its run folder; None: nothing is trained again.
    """
    if not study.covariates or folder is None:
        return None
    own = Variant("with", f"{name} with covariates", predictions)
    others = [Variant("alone", "covariates alone", predictions_of_members(study, alone_of(study, trained)))]
    if study.config.report.covariates:
        others.insert(
            0,
            Variant(
                "without", f"{name} without covariates", predictions_of_members(study, without(study, name, folder))
            ),
        )
    block = variants_block(study, own, others, [])
    said = [described(study, one) for one in study.covariates]
    return block | {"covariates": said, "method": METHOD}


def described(study: Study, one: Covariate) -> dict[str, Any]:
    """Name, kind, and how many patients say nothing."""
    assert study.cohort.further is not None
    empty = np.isnan(one.raw(study.cohort.further[one.name].tolist())).all(axis=1)
    patients = study.cohort.table["patient"]
    known = set(patients[~empty])
    kind = f"{len(one.categories)} categories: {', '.join(one.categories)}" if one.categories else "number"
    return {"name": one.name, "kind": kind, "patients_without": len(set(patients) - known)}


def alone_of(study: Study, trained: Trained) -> Trained:
    """The members as their covariates alone have them."""
    module = alone_module(study, np.arange(len(study.plan)))
    return replace(trained, logits_MSC=fit_alone(module))


def without(study: Study, name: str, folder: Path) -> Trained:
    """The same members from the same start, which are told no covariates; in passes of their own."""
    print(f"{name}: the same {len(study.plan)} members without covariates, for comparison")
    bags = replace(study.bags, covariates_SV=None)
    place = folder / WITHOUT
    place.mkdir(exist_ok=True)
    plain = replace(study, bags=bags, covariates=())
    trained = train_members(plain, name, place)
    return fuse(plain, trained)[0] if plain.widths else trained


def predictions_of_members(study: Study, trained: Trained) -> pd.DataFrame:
    """As predictions.csv has them, by facts of their own."""
    return predictions_of(study, trained, facts_of(study, trained))
