"""Losses of tasks other than classification, on packed logits of M members.

Axes: M members, B bags of a batch, K time intervals or cuts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def cox_efron(risk_MB: Tensor, time_MB: Tensor, event_MB: Tensor, uses_MB: Tensor) -> Tensor:
    """Negative log partial likelihood of every member over the bags it uses, per event, (M,); ties as Efron (1977) has.

    A member without an event among its bags has 0, and no gradient. Sums of hazards are taken by logsumexp, so risks of
    any size are safe.

    Args:
        risk_MB: log hazards. time_MB: of the event, or of censoring; (B,) where all members have the same. event_MB: 1
            where it happened, likewise. uses_MB: bool.
    """
    happened_MB = uses_MB & (event_MB > 0)
    time_nB = time_MB if time_MB.ndim == 2 else time_MB.unsqueeze(0)  # n is M, or 1 for all
    tied_MBB = (time_nB.unsqueeze(2) == time_nB.unsqueeze(1)) & happened_MB.unsqueeze(1) & happened_MB.unsqueeze(2)
    n_tied_MB = tied_MBB.sum(dim=2).clamp_min(1)
    place_MB = tied_MBB.tril(-1).sum(dim=2)  # 0, 1, ... among the events at this time
    left_MB1 = torch.log1p(-(place_MB / n_tied_MB).to(risk_MB)).unsqueeze(2)
    at_risk_MBB = (time_nB.unsqueeze(1) >= time_nB.unsqueeze(2)) & uses_MB.unsqueeze(1)
    log_weight_MBB = torch.where(tied_MBB, left_MB1, torch.zeros_like(left_MB1))
    log_weight_MBB = log_weight_MBB.masked_fill(~at_risk_MBB, -torch.inf)
    # rows without an event look at themselves, so that no row is empty: its gradient would be NaN
    itself_1BB = torch.eye(risk_MB.shape[1], dtype=torch.bool, device=risk_MB.device).unsqueeze(0)
    log_weight_MBB = torch.where(~happened_MB.unsqueeze(2) & itself_1BB, 0.0, log_weight_MBB)
    log_hazards_MB = torch.logsumexp(risk_MB.unsqueeze(1) + log_weight_MBB, dim=2)
    each_MB = torch.where(happened_MB, log_hazards_MB - risk_MB, 0.0)
    return each_MB.sum(dim=1) / happened_MB.sum(dim=1).clamp_min(1)


def discrete_time(logits_MBK: Tensor, interval_MB: Tensor, event_MB: Tensor) -> Tensor:
    """Negative log-likelihood in discrete time (Kvamme and Borgan 2021, section 2.2), (M, B).

    Logit k is the log-odds of the hazard of interval k. A slide with an event survives the intervals before its own and
    has it there; a censored one survives those before the interval in which it was seen last.
    """
    k = torch.arange(logits_MBK.shape[2], device=logits_MBK.device)
    survived_MBK = k < interval_MB.unsqueeze(2)
    losses_MB = (functional.softplus(logits_MBK) * survived_MBK).sum(dim=2)
    own_MB = logits_MBK.gather(2, interval_MB.unsqueeze(2)).squeeze(2)
    return losses_MB + functional.softplus(-own_MB) * event_MB


def coral(logits_MBK: Tensor, labels_MB: Tensor) -> Tensor:
    """Sum over the cuts of the binary cross-entropies (Cao et al. 2020, equation 5), (M, B); labels may be (B,)."""
    above = (labels_MB.unsqueeze(-1) > torch.arange(logits_MBK.shape[2], device=logits_MBK.device)).to(logits_MBK)
    targets_MBK = above.expand_as(logits_MBK)
    return functional.binary_cross_entropy_with_logits(logits_MBK, targets_MBK, reduction="none").sum(dim=2)


def regression(logits_MB1: Tensor, targets_MB: Tensor, kind: str) -> Tensor:
    """mse, huber (which is linear beyond one standard deviation) or l1 of standardised targets, (M, B)."""
    values_MB = logits_MB1.squeeze(2)
    if kind == "huber":
        return functional.huber_loss(values_MB, targets_MB, reduction="none")
    gap_MB = values_MB - targets_MB
    return gap_MB.abs() if kind == "l1" else gap_MB.square()
