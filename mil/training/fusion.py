"""How much each encoder counts: weights of logits, fitted on slides that were held out of the members they are of.

A member's weights minimise its task's loss over the slides that the other folds of its repeat held out, each with the
logits of the member that held it out: no slide that the member is reported on, and none that taught its logits. Without
other folds they come from its val slides, and without those all encoders count alike. Weights are not negative and sum
to 1 (a softmax), as few numbers can be fitted on few slides; stacking with such weights: Breiman, Stacked Regressions,
Machine Learning 1996.

Axes: M members, S slides, E encoders, C outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from mil.aggregators.batch import Batch, Prediction
from mil.training.module import MembersModule

STEPS, RATE = 250, 0.2
"""Of Adam on the softmax's inputs, with a rate that falls to 0 (cosine)."""
FOLDS, VAL, NOTHING = "other folds", "val", "none, so all alike"


class Held(NamedTuple):
    """What weights are fitted on: logits_MSEC of the slides that uses_MS names; origin_M: why these."""

    logits_MSEC: np.ndarray
    uses_MS: np.ndarray
    origin_M: list[str]


def held_out_logits(
    members: pd.DataFrame, logits_MSEC: np.ndarray, test_MS: np.ndarray, val_MS: np.ndarray, labelled_S: np.ndarray
) -> Held:
    """For every member the logits of the slides that may weigh its encoders.

    Args:
        members: of the plan, columns repeat, fold and seed.
        test_MS: slides of the cross-validation that each member held out; none of the official test split.
        labelled_S: slides with a target.
    """
    found_MSEC, uses_MS, origin_M = logits_MSEC.copy(), np.zeros_like(test_MS), []
    for m, (repeat, fold, seed) in enumerate(members[["repeat", "fold", "seed"]].itertuples(index=False, name=None)):
        own = (members["repeat"] == repeat) & (members["seed"] == seed) & (members["fold"] != fold)
        for other in np.flatnonzero(own):
            slides = test_MS[other] & labelled_S & ~test_MS[m]
            found_MSEC[m, slides] = logits_MSEC[other, slides]
            uses_MS[m] |= slides
        if not uses_MS[m].any():
            uses_MS[m] = val_MS[m] & labelled_S
            origin_M.append(VAL if uses_MS[m].any() else NOTHING)
        else:
            origin_M.append(FOLDS)
    return Held(found_MSEC, uses_MS, origin_M)


def fit_weights(module: MembersModule, held: Held) -> np.ndarray:
    """(M, E): weights of every member's encoders.

    Args:
        module: of the task, around an aggregator that only has a loss; its members are those of `held`.
    """
    logits_MSEC = torch.from_numpy(held.logits_MSEC).float()
    usable_MS = torch.from_numpy(held.uses_MS) & logits_MSEC.isfinite().all(dim=3).all(dim=2)
    labels_MS = module.members.labels_MS
    own = None if labels_MS is None else torch.from_numpy(labels_MS)
    labels_S = torch.from_numpy(module.labels_S).clamp_min(0)
    batch = Batch((), labels_S, torch.arange(len(labels_S)), usable_MS, own)
    logits_MSEC = logits_MSEC.nan_to_num()
    inputs_ME = torch.zeros(len(logits_MSEC), logits_MSEC.shape[2], requires_grad=True)
    optimizer = torch.optim.Adam([inputs_ME], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            fused_MSC = torch.einsum("me,msec->msc", inputs_ME.softmax(dim=1), logits_MSEC)
            loss_M = module.minimised(Prediction(fused_MSC), batch)
            loss_M.nan_to_num().sum().backward()  # a member without a slide to fit on has no loss
            optimizer.step()
            schedule.step()
    weights_ME: np.ndarray = inputs_ME.detach().softmax(dim=1).numpy()
    weights_ME[~held.uses_MS.any(axis=1)] = 1 / weights_ME.shape[1]
    return weights_ME


def fused_logits(weights_ME: np.ndarray, logits_MSEC: np.ndarray) -> np.ndarray:
    """(M, S, C) float32."""
    fused: np.ndarray = np.einsum("me,msec->msc", weights_ME, logits_MSEC).astype(np.float32)
    return fused


def table_of(members: pd.DataFrame, encoders: list[str], weights_ME: np.ndarray, origin_M: list[str]) -> pd.DataFrame:
    """The members table with the encoder as one more column: member, repeat, fold, seed, encoder, weight, fitted_on."""
    rows: list[dict[str, Any]] = []
    for m, row in enumerate(members[["member", "repeat", "fold", "seed"]].to_dict("records")):
        own = [{"encoder": name, "weight": float(w)} for name, w in zip(encoders, weights_ME[m], strict=True)]
        rows += [{str(k): v for k, v in row.items()} | one | {"fitted_on": origin_M[m]} for one in own]
    return pd.DataFrame(rows)
