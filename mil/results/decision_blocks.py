"""What decisions are worth on slides that had no part in them: three blocks for metrics.json.

Sets are those of `mil.results.decisions.judge_study`. Axes: S slides, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mil.results.conformal import coverage_block, fewest_patients
from mil.results.crossfit import probabilities_of, with_probabilities
from mil.results.decisions import OUT_OF_FOLD, TEST, Decisions, Judged
from mil.results.operating import decision_curve, point_block
from mil.results.reliability import reliability_block
from mil.tasks.metrics import against_the_rest

SETS = {OUT_OF_FOLD: "out-of-fold", TEST: "test"}
FITTED = {
    "val": "each member's own val slides; the members' results are averaged in log-odds",
    "out-of-fold": "out-of-fold predictions: for the slides of a fold those of the other folds, for all other slides "
    "all of them",
    "nothing": "nothing: the study has neither val slides nor out-of-fold predictions",
}


def reported(sets: Mapping[str, Judged]) -> dict[str, Judged]:
    """The sets that have labels, in the order of the page."""
    return {name: sets[name] for name in SETS if name in sets and (sets[name].table["label"] >= 0).any()}


def calibration_block(decisions: Decisions, sets: Mapping[str, Judged]) -> dict[str, Any] | None:
    """Reliability before and, where there is a calibration, after it; the maps in short."""
    classes, calibration, blocks = decisions.classes, decisions.calibration, {}
    for name, one in reported(sets).items():
        before = reliability_block(one.table, classes)
        if before is None:
            continue
        after = None
        if one.calibrated_SC is not None:
            after = reliability_block(with_probabilities(one.table, one.calibrated_SC, classes), classes)
        blocks[name] = {"before": before, "after": after}
    if not blocks:
        return None
    temperatures = [one.temperature for one in calibration.maps if one.temperature is not None]
    return {
        "method": calibration.method,
        "fitted_on": calibration.fitted_on,
        "fitted_in_words": FITTED[calibration.fitted_on],
        "maps": len(calibration.maps),
        "slides_per_map": [min(n), max(n)] if (n := [one.slides for one in calibration.maps]) else None,
        "temperatures": [min(temperatures), max(temperatures)] if temperatures else None,
        "not_fitted": sorted({one.why for one in calibration.maps if one.why}),
        "sets": blocks,
    }


def operating_block(
    decisions: Decisions, sets: Mapping[str, Judged], prevalences: Sequence[float]
) -> dict[str, Any] | None:
    """Every operating point on every set, and the decision curves (of calibrated probabilities where there are)."""
    classes, found = decisions.classes, reported(sets)
    if not found:
        return None
    points = []
    for one in decisions.operating.thresholds:
        of_sets = {}
        for name, judged in found.items():
            known_S = (judged.table["label"] >= 0).to_numpy()
            target = classes.index(one.of_class)
            of_sets[name] = point_block(
                (judged.table["label"] == target).to_numpy()[known_S],
                probabilities_of(judged.table, classes)[known_S, target],
                judged.thresholds[one.point, one.of_class][known_S],
                judged.table["patient"].to_numpy()[known_S],
                prevalences,
            )
        points.append(
            {
                "point": one.point,
                "title": title_of(one.point),
                "class": one.of_class,
                "threshold": one.threshold,
                "slides": one.slides,
                "sets": of_sets,
            }
        )
    fitted_on = decisions.operating.fitted_on
    return {
        "chosen_on": fitted_on,
        "chosen_in_words": FITTED[fitted_on],
        "points": points,
        "calibrated": decisions.calibration.fitted_on != "nothing",
        "decision_curves": {name: curves_of(judged, classes) for name, judged in found.items()},
    }


def title_of(point: str) -> str:
    """`sensitivity 0.95` of `sensitivity_0.95`."""
    return "Youden's index" if point == "youden" else point.replace("_", " ")


def curves_of(judged: Judged, classes: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """The decision curve of each class against the rest (of two classes the last)."""
    plain_SC = probabilities_of(judged.table, classes)
    p_SC = plain_SC if judged.calibrated_SC is None else judged.calibrated_SC
    label_S = judged.table["label"].to_numpy(dtype=np.int64)
    known_S = (label_S >= 0) & np.isfinite(p_SC).all(axis=1)
    targets = [c for c in against_the_rest(len(classes)) if 0 < (label_S[known_S] == c).sum() < known_S.sum()]
    return {classes[c]: decision_curve(label_S[known_S] == c, p_SC[known_S, c]) for c in targets}


def conformal_block(decisions: Decisions, sets: Mapping[str, Judged], coverage: float) -> dict[str, Any] | None:
    """Coverage of the sets, and how many slides are answered how well."""
    scores, classes = decisions.conformal, decisions.classes
    if scores.fitted_on == "nothing":
        return None
    blocks = {}
    for name, one in reported(sets).items():
        label_S, patient_S = one.table["label"].to_numpy(dtype=np.int64), one.table["patient"].to_numpy()
        block = coverage_block(label_S, one.p_values_SC, patient_S, classes, coverage)
        if block is not None:
            blocks[name] = block
    if not blocks:
        return None
    needed = fewest_patients(coverage)
    patients = {name: len(own) for name, own in scores.of_class.items()}
    return {
        "coverage": coverage,
        "fitted_on": scores.fitted_on,
        "patients_per_class": patients,
        "too_few": [name for name, n in patients.items() if n < needed],
        "needed": needed,
        "sets": blocks,
    }
