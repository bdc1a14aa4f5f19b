"""Where the slides of a study went, from the table to the figures; and which of them its encoder may have seen before.

Axes: M members, S slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.encoders.table import seen_by
from extract.joining import BARCODE
from mil.study.reviews import MARKS, REASON
from mil.study.roles import Plan, free_slides, official_test
from mil.study.units import by_slide, of_bags

REASONS = (
    ("no features", "no feature file"),
    (": no tiles (", "no tiles found"),
    *((REASON.format(mark=mark), f"review: {mark}") for mark in MARKS),
)
"""How a reason for dropping a slide begins or what it holds -> the kind of reason."""
UNREADABLE = "features cannot be read"


def flow_of(cohort: Cohort, dropped: pd.DataFrame | None, plan: Plan, lengths_S: np.ndarray) -> dict[str, Any]:
    """Slides and patients at every step: table, left out and why, bags, unlabelled, cross-validated, test, roles.

    Args:
        cohort: the slides (or patients) that have features. dropped: slide, patient, reason of the others.
        lengths_S: tiles of each slide's bag.
    """
    table = by_slide(cohort.table)
    row_S = of_bags(table["slide"].tolist(), cohort.table)
    labels_S, plan = cohort.labels_S[row_S], Plan(plan.members, plan.roles_MS[:, row_S])
    gone = pd.DataFrame(columns=["slide", "patient", "reason"]) if dropped is None else dropped
    everyone = pd.concat([table[["slide", "patient"]], gone[["slide", "patient"]]])
    kinds = gone["reason"].map(kind_of_reason)
    free_S, test_S = free_slides(cohort)[row_S], official_test(cohort)[row_S]
    used_S = np.asarray((plan.uses("train") | plan.uses("val") | plan.uses("test")).any(axis=0))
    return {
        "table": sizes(everyone),
        "left_out": [{"why": str(why), **sizes(own)} for why, own in gone.groupby(kinds)],
        "bags": sizes(table) | {"tiles": int(lengths_S.sum()), "median_tiles": float(np.median(lengths_S))},
        "unlabelled": sizes(table[labels_S < 0]),
        "unused": sizes(table[free_S & ~used_S]),
        "cross_validated": sizes(table[free_S & used_S]),
        "test": sizes(table[test_S]),
        "members": len(plan),
        "roles": {role: of_members(plan.uses(role) & ~test_S) for role in ("train", "val", "test")},
    }


def flow_of_new(
    cohort: Cohort, gone: pd.DataFrame, counted_S: np.ndarray, lengths: Sequence[int], members: int
) -> dict[str, Any]:
    """The same for slides that a trained study predicts, none of which trains or selects.

    Args:
        cohort: the table. gone: slide, patient, reason of those without a prediction.
        counted_S: which of the others metrics may count: not of patients that the study trained on.
        lengths: tiles of the others.
    """
    predicted_S = ~cohort.table["slide"].isin(gone["slide"]).to_numpy()
    table, labelled_S = cohort.table[predicted_S], cohort.labels_S[predicted_S] >= 0
    none = sizes(table[:0])
    return {
        "table": sizes(cohort.table),
        "left_out": [{"why": str(why), **sizes(own)} for why, own in gone.groupby(gone["reason"].map(kind_of_reason))],
        "bags": sizes(table) | {"tiles": int(sum(lengths)), "median_tiles": float(np.median(lengths or [0]))},
        "unlabelled": sizes(table[~labelled_S]),
        "known": sizes(table[labelled_S & ~counted_S]),
        "unused": none,
        "cross_validated": none,
        "test": none,
        "new": sizes(table[labelled_S & counted_S]),
        "members": members,
        "roles": {},
    }


def kind_of_reason(reason: str) -> str:
    return next((kind for part, kind in REASONS if part in str(reason)), UNREADABLE)


def sizes(table: pd.DataFrame) -> dict[str, int]:
    return {"slides": len(table), "patients": int(table["patient"].nunique())}


def of_members(uses_MS: np.ndarray) -> dict[str, int]:
    """The fewest and the most slides that a member has."""
    n_M = uses_MS.sum(axis=1)
    return {"fewest": int(n_M.min(initial=n_M.max(initial=0))), "most": int(n_M.max(initial=0))}


def seen_before(table: pd.DataFrame, encoder: str) -> dict[str, Any]:
    """What `encoder` was pre-trained on, and how many slides have TCGA's barcodes (in their name or their patient's).

    `saw_tcga`: True, False, or None where its authors or its features do not say.
    """
    known, saw_tcga = seen_by(encoder)
    names = zip(table["slide"].astype(str), table["patient"].astype(str), strict=True)
    tcga_S = np.array([bool(BARCODE.match(slide) or BARCODE.match(patient)) for slide, patient in names], dtype=bool)
    test_S = (table["split"] == "test").to_numpy()
    return {
        "encoder": encoder or None,
        "pretrained_on": known,
        "saw_tcga": saw_tcga,
        "tcga": sizes(table[tcga_S]),
        "tcga_test": sizes(table[tcga_S & test_S]),
    }
