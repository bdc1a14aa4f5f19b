"""What the page tells of a curve's points when one points at it: threshold, sensitivity, specificity, precision.

Axes: S slides, T thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from sklearn.metrics import roc_curve

from mil.report.figures import Sets, two_class_sets
from mil.results.tables import TEST_ENSEMBLE

KINDS = {"roc": "roc", "precision_recall": "precision-recall"}
"""Figures with such points, and what the page's script calls them."""
MOST_POINTS = 400
"""Points of one curve on the page; of more, so many evenly spread ones."""
DECIMALS = 4


def curve_points(truth: ArrayLike, p: ArrayLike) -> list[list[float]]:
    """Thresholds (falling; at least that is called positive), sensitivities, specificities, precisions: T each.

    The corners of the ROC curve, whose points at one threshold are the same in both figures; without the first one,
    at which nothing is called positive.

    Args:
        truth: (S,) bool, both values there. p: (S,) probabilities.
    """
    truth_S = np.asarray(truth, dtype=bool)
    fpr_T, tpr_T, threshold_T = (column[1:] for column in roc_curve(truth_S, p))
    hits_T, false_T = tpr_T * truth_S.sum(), fpr_T * (~truth_S).sum()
    columns = (threshold_T, tpr_T, 1 - fpr_T, hits_T / (hits_T + false_T))
    kept = np.unique(np.linspace(0, len(threshold_T) - 1, min(len(threshold_T), MOST_POINTS)).round().astype(int))
    thresholds = [float(f"{value:.6g}") for value in threshold_T[kept]]
    return [thresholds, *(column[kept].round(DECIMALS).tolist() for column in columns[1:])]


def told_curves(sets: Sets) -> list[tuple[str, list[list[float]]]]:
    """Name and points of the curves that the figures draw of whole sets; not of the thin ones, one a member."""
    return [(name, curve_points(truth, p)) for name, truth, p in _drawn(sets)]


def _drawn(sets: Sets) -> Iterator[tuple[str, Any, Any]]:
    if len(sets.classes) == 2:
        for name, table in two_class_sets(sets):
            yield name, table["label"] == 1, table["p_1"]
        return
    for name, table in sets.held_out.items():
        for c, label in enumerate(sets.classes):
            truth = table["label"] == c
            if truth.any() and not truth.all():
                yield f"{label}, {'test' if name == TEST_ENSEMBLE else name}", truth, table[f"p_{c}"]


def box_in_svg(figure: Figure) -> str:
    """Where (0, 0) and (1, 1) of the first axes lie in the figure's SVG, in its units: `left bottom right top`.

    To be asked after the figure was saved, as that is when its layout is made.
    """
    (left, bottom), (right, top) = figure.axes[0].transData.transform([(0, 0), (1, 1)]) * 72 / figure.dpi
    height = figure.get_figheight() * 72
    return " ".join(f"{number:.2f}" for number in (left, height - bottom, right, height - top))
