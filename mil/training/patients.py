"""Bags of patients: all slides of one are one bag, of views where the slides' features lie (study.unit=patient).

Axes: P patients, S slides, T tiles, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mil.training.bags import Bags


@dataclass(frozen=True)
class PatientBags(Bags):
    """A row is a patient, `views` are those of the slides: `slides_P` says which are whose, in their order in the bag.

    `slides` and `lengths_S` are the patients' names and tiles. Nothing is copied until `features` is asked for a whole
    patient; batches are made of `views_of`.
    """

    slides_P: tuple[tuple[int, ...], ...] = ()

    def features(self, index: int) -> Tensor:
        """(T, D) of all slides end to end: a copy where there are several."""
        views = [self.views[s] for s in self.slides_P[index]]
        return views[0] if len(views) == 1 else torch.cat(views)

    def views_of(self, index: int, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        views = tuple(self.views[s] for s in self.slides_P[index])
        if kept is None:
            return views
        ends = np.cumsum([len(view) for view in views])
        rows = kept.tensor_split(torch.searchsorted(kept, torch.from_numpy(ends[:-1])))
        starts = [0, *ends[:-1].tolist()]
        return tuple(view[own - start] for view, own, start in zip(views, rows, starts, strict=True) if len(own))


def bags_of_patients(bags: Bags, names: Sequence[str], slides_P: Sequence[Sequence[int]]) -> Bags:
    """The slides of `bags` as the patients' bags.

    Args:
        names: of the patients. slides_P: rows of `bags` that are each patient's, at least one.
    """
    lengths_P = np.array([int(bags.lengths_S[list(rows)].sum()) for rows in slides_P], dtype=np.int64)
    own = tuple(tuple(rows) for rows in slides_P)
    fixed = (tuple(names), lengths_P, bags.dim, bags.memory, bags.views)
    return PatientBags(*fixed, on_device=bags.on_device, slides_P=own)
