"""Sensitivity for lesions against false positives a slide (FROC), as Camelyon16's evaluation counts them.

Ehteshami Bejnordi et al., JAMA 2017. Axes: S slides, L lesions, F false positives, A allowed numbers of false positives
a slide, R resamples (weightings of the slides), K tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extract.shares import Ends, share_interval
from mil.results.intervals import resampled


@dataclass(frozen=True)
class Finds:
    """What the scores of all slides find.

    lesions_L: highest score of the tiles that touch each lesion that counts, -inf for none. false_F: scores of the
    false positives. lesion_slide_L, false_slide_F: the slide of each. counting_S: bool, where false positives are
    known.
    """

    lesions_L: np.ndarray
    lesion_slide_L: np.ndarray
    false_F: np.ndarray
    false_slide_F: np.ndarray
    counting_S: np.ndarray


def collected(slides: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> Finds:
    """The finds of slides one after the other: scores of its lesions, and of its false positives (None: unknown)."""
    lesions, false = [own for own, _ in slides], [np.empty(0) if own is None else own for _, own in slides]
    return Finds(
        np.concatenate([*lesions, np.empty(0)]),
        np.repeat(np.arange(len(slides)), [len(own) for own in lesions]),
        np.concatenate([*false, np.empty(0)]),
        np.repeat(np.arange(len(slides)), [len(own) for own in false]),
        np.array([own is not None for _, own in slides], dtype=bool),
    )


def froc(
    finds: Finds, allowed: Sequence[float], patients_S: Sequence[str], *, resamples: int, seed: int
) -> tuple[list[dict[str, Any]], Ends]:
    """Sensitivity at each allowed number of false positives a slide, with its interval; and that of their mean.

    Camelyon16's own intervals are percentiles over drawn slides, which near 1 hold the truth far too seldom
    (`benchmarks/coverage.py`). Here patients are drawn with all their slides, and their variance gives Wilson's
    interval.
    """
    one = np.ones((1, len(finds.counting_S)))
    found_A, value_A = found_lesions(finds, allowed, one)[0], sensitivities(finds, allowed, one)[0]
    drawn = resampled(lambda weights_RS: {"": sensitivities(finds, allowed, weights_RS)}, patients_S, resamples, seed)
    drawn_RA = np.empty((0, len(allowed))) if drawn is None else drawn[""]
    with_lesions = len(np.unique(np.asarray(patients_S, dtype=str)[finds.lesion_slide_L]))
    rows = []
    for number, found, value, drawn_R in zip(allowed, found_A, value_A.tolist(), drawn_RA.T, strict=True):
        low, high = share_interval(value, drawn_R, with_lesions)
        said = {"false_positives_per_slide": number, "found": int(found)}
        rows.append({**said, "sensitivity": None if np.isnan(value) else value, "low": low, "high": high})
    return rows, share_interval(float(value_A.mean()), drawn_RA.mean(axis=1), with_lesions)


def sensitivities(finds: Finds, allowed: Sequence[float], weights_RS: np.ndarray) -> np.ndarray:
    """Share of the lesions that is found, (R, A); NaN without lesions, or without slides that count false positives."""
    lesions_R = weights_RS[:, finds.lesion_slide_L].sum(axis=1, keepdims=True)
    defined_R = (lesions_R > 0) & (weights_RS[:, finds.counting_S].sum(axis=1, keepdims=True) > 0)
    found_RA = found_lesions(finds, allowed, weights_RS)
    share_RA: np.ndarray = np.divide(found_RA, lesions_R, out=np.full(found_RA.shape, np.nan), where=defined_R)
    return share_RA


def found_lesions(finds: Finds, allowed: Sequence[float], weights_RS: np.ndarray) -> np.ndarray:
    """Lesions found at the lowest threshold with at most so many false positives a slide, on average, (R, A).

    A lesion counts as found when a tile that touches it scores above the first false positive that is too many.
    """
    order_F = np.argsort(-finds.false_F, kind="stable")
    score_F, slide_F = np.append(finds.false_F[order_F], -np.inf), finds.false_slide_F[order_F]
    found_RA = np.empty((len(weights_RS), len(allowed)))
    for r, weight_S in enumerate(weights_RS):
        before_F = np.cumsum(weight_S[slide_F])
        allowed_A = np.floor(np.asarray(allowed) * weight_S[finds.counting_S].sum() + 1e-9)
        beyond_A = score_F[np.searchsorted(before_F, allowed_A, side="right")]
        found_RA[r] = (finds.lesions_L > beyond_A[:, None]) @ weight_S[finds.lesion_slide_L]
    return found_RA


def apart(centres_K2: np.ndarray, scores_K: np.ndarray, distance: float) -> np.ndarray:
    """Rows that remain when, from the highest score down, a row hides all lower ones nearer than `distance`."""
    order, hidden, kept = np.argsort(-scores_K, kind="stable"), np.zeros(len(scores_K), dtype=bool), []
    for row in order.tolist():
        if hidden[row]:
            continue
        kept.append(row)
        hidden |= ((centres_K2 - centres_K2[row]) ** 2).sum(axis=1) < distance**2
    return np.array(kept, dtype=np.int64)
