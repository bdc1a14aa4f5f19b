"""Covariates alone: what each member's loss makes of them without any slide, and where training with slides begins.

Whatever the task, its own loss on the training slides of a member is minimised over a linear function of its scaled
covariates, all slides in one batch, with a ridge on the weights: of two classes this is scikit-learn's
LogisticRegression(C=1), of survival Cox's regression. Every member goes its own way: nothing couples them.

Axes: M members, S slides, B bags of the batch, V columns of covariates, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mil.aggregators.batch import Batch, Prediction
from mil.aggregators.contract import Aggregator
from mil.training.module import MembersModule

STEPS, RATE = 250, 0.2
"""Of Adam, with a rate that falls to 0 (cosine): on scaled columns it ends within 1e-3 of the optimum."""
RIDGE = 1.0
"""Of a member: RIDGE / (2 n) times the squared weights, n its training slides; scikit-learn's C = 1 / RIDGE."""


class CovariatesAlone(Aggregator):
    """A member that sees no tile: logits = bias + the covariates' linear term."""

    def __init__(self, in_dim: int, n_outputs: int, seeds: Sequence[int]):
        super().__init__(in_dim, n_outputs, seeds)
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.n_members, n_outputs)))

    def forward(self, batch: Batch, with_scores: bool = False) -> Prediction:
        """`batch` has no tiles at all."""
        assert self.covariates is not None
        assert batch.covariates_BV is not None
        added_MBC = self.covariates(batch.covariates_BV)
        logits_MBC = self.get_parameter("bias").unsqueeze(1) + added_MBC
        return Prediction(self.with_cuts(logits_MBC), None, None, added_MBC)


def everything(module: MembersModule) -> Batch:
    """All slides in one batch without tiles; each member uses those that it trains on."""
    raw_SV, labels_MS = module.bags.covariates_SV, module.members.labels_MS
    assert raw_SV is not None
    own = None if labels_MS is None else torch.from_numpy(labels_MS)
    uses_MS = torch.from_numpy(np.ascontiguousarray(module.members.train_MS))
    labels_S = torch.from_numpy(module.labels_S)
    return Batch((), labels_S, torch.arange(len(labels_S)), uses_MS, own, torch.from_numpy(raw_SV))


def fit_alone(module: MembersModule) -> np.ndarray:
    """Fit the members of `module`, whose aggregator is `CovariatesAlone`; their outputs for all slides, (M, S, C).

    Outputs of members that do not use a slide in training are there as well: they are predictions.
    """
    aggregator, batch = module.aggregator, everything(module)
    assert aggregator.covariates is not None
    n_M = batch.uses_MB.sum(dim=1).clamp_min(1)
    parameters = list(aggregator.parameters())
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            ridge_M = aggregator.covariates.weight.square().sum(dim=(1, 2)) * RIDGE / (2 * n_M)
            (module.minimised(aggregator(batch), batch) + ridge_M).sum().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        found: np.ndarray = aggregator(batch).logits_MBC.numpy()
    return found


def start_from(alone: Aggregator, aggregator: Aggregator) -> None:
    """The covariates' weights where they stand without slides, from which training with slides goes on.

    From 0 they would move by the aggregator's learning rate, which for many is too small to get anywhere.
    """
    assert alone.covariates is not None
    assert aggregator.covariates is not None
    with torch.no_grad():
        aggregator.covariates.weight.copy_(alone.covariates.weight)
