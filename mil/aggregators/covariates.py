"""Covariates of the patient beside the pooled vector: a linear term on every output of every member (late fusion).

Concatenating covariates z to the pooled vector h in front of a linear head gives W [h; z] + b = (W_h h + b) + W_z z:
the head as it is, and a linear term of z. Written so, it serves every aggregator, whatever its head is: the term is
added to what `head` gives, before the cuts of ordered grades. An aggregator with several streams has it on each
(`Prediction.with_covariates`). Scores of tiles and `tile_logits` are of the slide alone, as of an average patient.

Axes: M members, B bags of the batch, V columns of covariates, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mil.aggregators.places import without_autocast


class CovariateTerm(nn.Module):
    """Parameter `weight` (M, V, C), and how each member scales the columns: buffers mean_MV, scale_MV.

    Weights start at 0, so that a member starts from the same function as without covariates; whoever trains may put
    them where covariates alone lead (`mil.training.covariates`).

    Args:
        categories: of each covariate in turn, how many categories it has, each a column; 0 = a number, one column.
    """

    mean_MV: Tensor
    scale_MV: Tensor
    text_V: Tensor
    same_VV: Tensor

    def __init__(self, n_members: int, categories: Sequence[int], n_outputs: int):
        super().__init__()
        widths = torch.tensor([max(1, n) for n in categories])
        owner_V = torch.arange(len(widths)).repeat_interleave(widths)
        shape = (n_members, len(owner_V))
        self.weight = nn.Parameter(torch.zeros(*shape, n_outputs))
        self.register_buffer("mean_MV", torch.zeros(shape))
        self.register_buffer("scale_MV", torch.ones(shape))
        self.register_buffer("text_V", torch.tensor(categories)[owner_V] > 0, persistent=False)
        same_VV = (owner_V[:, None] == owner_V[None, :]).float()
        self.register_buffer("same_VV", same_VV, persistent=False)

    def scale_by(self, mean_MV: Tensor, scale_MV: Tensor) -> None:
        """Each member's own moments (`mil.study.covariates.moments`)."""
        self.mean_MV.copy_(mean_MV)
        self.scale_MV.copy_(scale_MV)

    def scaled(self, raw_BV: Tensor) -> Tensor:
        """As each member sees them, (M, B, V): 0 where the table says nothing, or a category new to the member."""
        raw_BV = raw_BV.to(self.weight.dtype)
        unseen_MV = self.text_V & (self.mean_MV == 0)
        alien_MBV = (raw_BV == 1).unsqueeze(0) & unseen_MV.unsqueeze(1)
        alien_MBV = (alien_MBV.to(raw_BV.dtype) @ self.same_VV.to(raw_BV.dtype)) > 0
        known_MBV = ~(raw_BV.isnan().unsqueeze(0) | alien_MBV)
        x_MBV = (raw_BV.nan_to_num().unsqueeze(0) - self.mean_MV.unsqueeze(1)) * self.scale_MV.unsqueeze(1)
        return torch.where(known_MBV, x_MBV, torch.zeros_like(x_MBV))

    def forward(self, raw_BV: Tensor) -> Tensor:
        """What is added to the outputs, (M, B, C)."""
        with without_autocast(raw_BV.device):
            return torch.bmm(self.scaled(raw_BV), self.weight)
