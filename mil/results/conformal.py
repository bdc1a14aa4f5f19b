"""Conformal prediction sets: the classes that cannot be ruled out at a stated coverage (Vovk et al. 2005).

Split-conformal and class-conditional (Mondrian): of the slides of each class, `coverage` of the sets hold it. The
nonconformity of a class is 1 - its plain probability; the p-value of a class is the share of that class's calibration
scores, the slide's own counted in, that are at least as strange; the set holds all classes whose p-value is above 1 -
coverage. One class: answered. Several: "I do not know". None: like no class that was seen.

Exchangeability: the guarantee is for a new patient who is like those calibrated on, and for one slide of theirs. The
slides of one patient are alike, so each patient gives one score a class: of a slide drawn at random (subsampling once,
Dunn, Wasserman and Ramdas, JASA 2023). Scores are out-of-fold ones, so those of several members: what is said of the
slides of a fold comes from the scores of the others (cross-conformal, Vovk 2015), and other slides are scored by the
ensemble of all members; there, as after a change of scanner or of hospital, the coverage is near what is stated, not
guaranteed. Another share of the classes changes nothing.

Axes: S slides, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from crepes import ConformalClassifier
from pydantic import Field

from mil.results.calibration import Saved
from mil.results.crossfit import Source, fit_without_own, out_of_fold, probabilities_of, scored_table
from mil.results.rates import rate_block

FOR_ONE_SLIDE = 5  # leading word of a random stream, as in mil.study
LEVELS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
"""Coverages at which the report says how many slides are answered, and how well."""


class Scores(Saved):
    """Nonconformity scores of each class, rising: what new slides are compared with."""

    coverage: float = Field(gt=0, lt=1)
    fitted_on: Source
    of_class: dict[str, list[float]]


def fewest_patients(coverage: float) -> int:
    """Patients of a class with scores from which on its p-value can rule it out at this coverage."""
    return int(np.ceil(1 / (1 - coverage) - 1e-9)) - 1


def one_a_patient(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Of each patient one slide of every label that the patient has, drawn at random."""
    ordered = table.sort_values("slide", kind="stable")
    drawn = np.random.default_rng([FOR_ONE_SLIDE, seed]).permutation(len(ordered))
    kept: pd.DataFrame = ordered.iloc[drawn].drop_duplicates(["patient", "label"])
    return kept


def scores_of(table: pd.DataFrame, classes: Sequence[str], seed: int) -> dict[str, list[float]]:
    """Of a table of labelled slides: each class's nonconformity scores, one a patient."""
    kept = one_a_patient(table, seed) if len(table) else table
    found: dict[str, list[float]] = {}
    for c, name in enumerate(classes):
        p_S = kept[f"p_{c}"][kept["label"] == c].to_numpy(dtype=np.float64) if len(kept) else np.zeros(0)
        found[name] = sorted((1 - p_S).tolist())
    return found


def fit_scores(predictions: pd.DataFrame, classes: Sequence[str], coverage: float, seed: int) -> Scores:
    """For slides that are not among those calibrated on: the test split, and new slides."""
    table, source = scored_table(predictions, classes)
    return Scores(coverage=coverage, fitted_on=source, of_class=scores_of(table, classes, seed))


def p_values(of_class: Mapping[str, Sequence[float]], p_SC: np.ndarray) -> np.ndarray:
    """(S, C): of each class; 1 for a class without scores, NaN for slides whose probabilities are not numbers."""
    values_SC = np.full(p_SC.shape, np.nan)
    finite_S = np.isfinite(p_SC).all(axis=1)
    for c, scores in enumerate(of_class.values()):
        classifier = ConformalClassifier().fit(np.asarray(scores, dtype=np.float64))
        values_SC[finite_S, c] = classifier.predict_p(1 - p_SC[finite_S, c], smoothing=False)
    return values_SC


def p_values_out_of_fold(predictions: pd.DataFrame, classes: Sequence[str], seed: int) -> pd.DataFrame:
    """Table of the out-of-fold slides, `p_0`, ... being p-values from the scores of other folds' patients."""
    table = out_of_fold(predictions, classes)
    p_SC = probabilities_of(table, classes)
    values_SC = np.full(p_SC.shape, np.nan)
    for own_S, of_class in fit_without_own(table, classes, lambda others: scores_of(others, classes, seed)):
        values_SC[own_S] = p_values(of_class, p_SC[own_S])
    return table.assign(**{f"p_{c}": values_SC[:, c] for c in range(len(classes))})


def sets_of(values_SC: np.ndarray, coverage: float) -> np.ndarray:
    """Bool (S, C): the classes in each slide's set."""
    with np.errstate(invalid="ignore"):
        inside_SC: np.ndarray = values_SC > 1 - coverage + 1e-12  # 1 - 0.9 is a little below 0.1
    return inside_SC


def set_names(values_SC: np.ndarray, coverage: float, classes: Sequence[str]) -> list[str | None]:
    """`{normal}`, `{normal, tumor}`, `{}`; None where probabilities are not numbers."""
    known_S = np.isfinite(values_SC).all(axis=1)
    inside_SC = sets_of(values_SC, coverage)
    return [
        "{" + ", ".join(name for name, inside in zip(classes, row, strict=True) if inside) + "}" if known else None
        for row, known in zip(inside_SC, known_S, strict=True)
    ]


# --- what is reported ------------------------------------------------------------------------------------------------


def coverage_block(
    labels_S: np.ndarray, values_SC: np.ndarray, patients_S: np.ndarray, classes: Sequence[str], coverage: float
) -> dict[str, Any] | None:
    """Of labelled slides: how often the sets hold the label, how many slides are answered, and how well."""
    known_S = (labels_S >= 0) & np.isfinite(values_SC).all(axis=1)
    if not known_S.any():
        return None
    labels_S, values_SC, patients_S = labels_S[known_S], values_SC[known_S], patients_S[known_S]
    inside_SC = sets_of(values_SC, coverage)
    covered_S, size_S = inside_SC[np.arange(len(labels_S)), labels_S], inside_SC.sum(axis=1)
    return {
        "covered": rate_block(covered_S, patients_S),
        "per_class": {
            name: rate_block(covered_S[labels_S == c], patients_S[labels_S == c]) for c, name in enumerate(classes)
        },
        "sizes": {str(size): int((size_S == size).sum()) for size in range(len(classes) + 1)},
        "mean_size": float(size_S.mean()),
        "answered": answered_block(labels_S, inside_SC, patients_S),
        "curve": [
            {"coverage": level} | answered_block(labels_S, sets_of(values_SC, level), patients_S) for level in LEVELS
        ],
    }


def answered_block(labels_S: np.ndarray, inside_SC: np.ndarray, patients_S: np.ndarray) -> dict[str, Any]:
    """Slides whose set has one class: their share, and how many of them are right."""
    single_S = inside_SC.sum(axis=1) == 1
    right_S = inside_SC[np.arange(len(labels_S)), labels_S]
    return {
        "share": rate_block(single_S, patients_S),
        "accuracy": rate_block(right_S[single_S], patients_S[single_S]),
    }
