"""`features.fuse=logits`: how much each encoder counts, and the study beside each of them and all columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from extract.tables import write_csv
from mil.aggregators.contract import Aggregator
from mil.pipeline.data import Study
from mil.pipeline.results import facts_of, predictions_of
from mil.pipeline.training import Trained, module_around, train_members
from mil.pipeline.variants import Variant, variants_block
from mil.training.fusion import fit_weights, fused_logits, held_out_logits, table_of

TABLE, COLUMNS = "encoders.csv", "concatenated"
"""In the run folder: the members with the encoder as one more column; what members on all columns leave."""
METHOD = (
    "Each encoder has members of its own, trained as if it were alone, on the tiles that all have. Weights are "
    "not negative and sum to 1; they are fitted, for every member, on the logits of the slides that the other folds of "
    "its repeat held out (without other folds on its val slides, else they are alike), so no slide weighs the member "
    "that is reported on it. Concatenated: the same members on all columns side by side"
)


@dataclass(frozen=True)
class Fusion:
    """What every encoder's members say, and their weights; `table` as encoders.csv has it."""

    encoders: list[str]
    logits_MSEC: np.ndarray
    weights_ME: np.ndarray
    table: pd.DataFrame


def encoders_of(study: Study) -> list[str]:
    """How the encoders are called; with the folder's name where one occurs twice, or says nothing."""
    parts = study.environment["features"]["parts"]
    names = [str(part["encoder"] or Path(part["folder"]).name) for part in parts]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({Path(part['folder']).name})" for name, part in zip(names, parts, strict=True)]


def fuse(study: Study, trained: Trained) -> tuple[Trained, Fusion]:
    """The members with their encoders' logits weighted; `trained` has them side by side.

    Args:
        study: its plan is that of `trained`.
    """
    n_members, n_slides, _ = trained.logits_MSC.shape
    logits_MSEC = trained.logits_MSC.reshape(n_members, n_slides, len(study.widths), -1)
    plan, in_folds_S = trained.plan, (study.cohort.table["split"] == "train").to_numpy()
    held = held_out_logits(
        plan.members, logits_MSEC, plan.uses("test") & in_folds_S, plan.uses("val"), study.cohort.labels_S >= 0
    )
    weights_ME = fit_weights(module_around(study, only_a_loss(study), np.arange(n_members)), held)
    encoders = encoders_of(study)
    state = trained.state | {"fusion_ME": torch.from_numpy(weights_ME)}
    table = table_of(plan.members, encoders, weights_ME, held.origin_M)
    fused = replace(trained, state=state, logits_MSC=fused_logits(weights_ME, logits_MSEC))
    return fused, Fusion(encoders, logits_MSEC, weights_ME, table)


def only_a_loss(study: Study) -> Aggregator:
    """What a task's module needs to say what logits cost."""
    seeds = study.plan.members["init_seed"].tolist()
    aggregator = Aggregator(study.bags.dim, study.task.n_outputs(), seeds)
    if study.task.name == "ordinal":
        aggregator.add_cuts(len(study.cohort.classes) - 1)
    return aggregator


def save_fusion(folder: Path, fusion: Fusion) -> None:
    write_csv(fusion.table, folder / TABLE)


def fusion_block(
    study: Study, trained: Trained, predictions: pd.DataFrame, name: str, folder: Path, fusion: Fusion
) -> dict[str, Any]:
    """What metrics.json holds as `fusion`: each encoder alone, all columns, and fused; and the weights."""
    own = Variant("fused", f"{name}, logits fused", predictions)
    others = [
        Variant(f"alone_{e}", f"{encoder} alone", as_predictions(study, trained, fusion.logits_MSEC[:, :, e]))
        for e, encoder in enumerate(fusion.encoders)
    ]
    if study.config.report.encoders:
        columns = concatenated(study, name, folder)
        others.append(Variant(COLUMNS, "columns concatenated", as_predictions(study, columns, columns.logits_MSC)))
    return variants_block(study, own, others, []) | {"weights": weights_of(fusion), "method": METHOD}


def weights_of(fusion: Fusion) -> list[dict[str, Any]]:
    """Of every encoder: mean, lowest and highest weight over the members."""
    return [
        {"encoder": name, "mean": float(w_M.mean()), "lowest": float(w_M.min()), "highest": float(w_M.max())}
        for name, w_M in zip(fusion.encoders, fusion.weights_ME.T, strict=True)
    ]


def as_predictions(study: Study, trained: Trained, logits_MSC: np.ndarray) -> pd.DataFrame:
    """As predictions.csv has them, by facts of their own."""
    one = replace(trained, logits_MSC=np.ascontiguousarray(logits_MSC))
    return predictions_of(study, one, facts_of(study, one))


def concatenated(study: Study, name: str, folder: Path) -> Trained:
    """The same members on all columns side by side; in passes of their own."""
    print(f"{name}: the same {len(study.plan)} members on all columns, for comparison")
    features = study.config.features.model_copy(update={"fuse": "columns"})
    place = folder / COLUMNS
    place.mkdir(exist_ok=True)
    return train_members(replace(study, config=study.config.model_copy(update={"features": features})), name, place)
