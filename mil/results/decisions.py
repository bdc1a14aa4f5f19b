"""What a study decides beyond its members' logits: calibration, operating points, conformal sets. decisions.json.

Fitted once, on the study's own predictions (`mil.results.crossfit` says what on what), saved with it, and applied to
slides that had no part in it: the official test split in the study's report, new slides by `mil.predict`. Out-of-fold
slides get what was fitted without them.

Axes: S slides, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from extract.whole import write_whole
from mil.config import Report
from mil.results.calibration import Calibration, Saved, calibrate, calibrate_out_of_fold, fit_calibration
from mil.results.conformal import Scores, fit_scores, p_values, p_values_out_of_fold, set_names
from mil.results.crossfit import no_thresholds, out_of_fold, probabilities_of
from mil.results.operating import Operating, Point, fit_operating, out_of_fold_thresholds
from mil.results.readback import ReadbackError, problems_of, read_json
from mil.results.tables import held_out, mean_of_logits, of_test_split

FILE = "decisions.json"
OUT_OF_FOLD, TEST = "pooled_out_of_fold", "test"
"""The sets of slides that are reported, by their names in metrics.json."""


class Decisions(Saved):
    """What decisions.json holds."""

    classes: list[str]
    calibration: Calibration
    operating: Operating
    conformal: Scores


@dataclass(frozen=True, eq=False)
class Judged:
    """Slides with everything that is said of them without their own labels.

    table: a table of slides, plain probabilities. calibrated_SC: None without a calibration. thresholds: (point, class)
    -> (S,), NaN where none was reached. p_values_SC: conformal, NaN where probabilities are not numbers.
    """

    table: pd.DataFrame
    calibrated_SC: np.ndarray | None
    thresholds: dict[tuple[str, str], np.ndarray]
    p_values_SC: np.ndarray


# --- fitting and applying --------------------------------------------------------------------------------------------


def fit_decisions(predictions: pd.DataFrame, classes: Sequence[str], report: Report, seed: int) -> Decisions:
    """For slides that are not among those fitted on."""
    return Decisions(
        classes=list(classes),
        calibration=fit_calibration(report.calibrate, predictions, classes),
        operating=fit_operating(report.operating_points, predictions, classes),
        conformal=fit_scores(predictions, classes, report.coverage, seed),
    )


def judge(decisions: Decisions, rows: pd.DataFrame) -> Judged:
    """Slides that nothing was fitted on; rows: of predictions, of all members or of some."""
    classes = decisions.classes
    table = mean_of_logits(rows, classes, no_thresholds(rows))
    p_SC = probabilities_of(table, classes)
    calibrated = decisions.calibration.fitted_on != "nothing"
    return Judged(
        table,
        probabilities_of(calibrate(rows, classes, decisions.calibration), classes) if calibrated else None,
        {
            (one.point, one.of_class): np.full(len(table), np.nan if one.threshold is None else one.threshold)
            for one in decisions.operating.thresholds
        },
        p_values(decisions.conformal.of_class, p_SC),
    )


def judge_out_of_fold(decisions: Decisions, predictions: pd.DataFrame, points: Sequence[Point], seed: int) -> Judged:
    """The out-of-fold slides, each by what was fitted without its patient."""
    classes, calibration = decisions.classes, decisions.calibration
    calibrated = calibration.fitted_on != "nothing"
    return Judged(
        out_of_fold(predictions, classes),
        probabilities_of(calibrate_out_of_fold(predictions, classes, calibration), classes) if calibrated else None,
        out_of_fold_thresholds(points, predictions, classes),
        probabilities_of(p_values_out_of_fold(predictions, classes, seed), classes),
    )


def judge_study(
    decisions: Decisions, predictions: pd.DataFrame, points: Sequence[Point], seed: int
) -> dict[str, Judged]:
    """The sets of slides that a study says something honest of: OUT_OF_FOLD, TEST, and "unused" (in no role).

    Unused slides enter no figure. One of a patient who has labelled slides too is treated as `mil.predict` would: its
    own label is not known, but those of its patient are among what everything was trained and fitted on.
    """
    unused = ~predictions["slide"].isin(predictions["slide"][predictions["role"] != "unused"])
    judged = held_out(predictions).any()
    found = {OUT_OF_FOLD: judge_out_of_fold(decisions, predictions, points, seed)} if judged else {}
    others = {TEST: predictions[of_test_split(predictions)], "unused": predictions[unused]}
    return found | {name: judge(decisions, rows) for name, rows in others.items() if len(rows)}


def slide_columns(decisions: Decisions, judged: Judged, coverage: float, names: Sequence[str]) -> pd.DataFrame:
    """One row a slide, index slide: `calibrated_NAME` for each of `names`, and `conformal_set`, where there are any."""
    columns: dict[str, object] = {}
    if judged.calibrated_SC is not None:
        columns = {f"calibrated_{name}": judged.calibrated_SC[:, c] for c, name in enumerate(names)}
    if decisions.conformal.fitted_on != "nothing":
        sets = set_names(judged.p_values_SC, coverage, decisions.classes)
        columns["conformal_set"] = pd.Series(sets, dtype=object).to_numpy()
    return pd.DataFrame(columns, index=pd.Index(judged.table["slide"], name="slide"))


def called_columns(judged: Judged, classes: Sequence[str]) -> pd.DataFrame:
    """One row a slide, index slide: `at_POINT`, the class that is called there; of several classes `{all, that, are}`.

    Empty where the point has no threshold, or where probabilities are not numbers.
    """
    points = list(dict.fromkeys(point for point, _ in judged.thresholds))
    p_SC, columns = probabilities_of(judged.table, classes), {}
    for point in points:
        called = {name: t for (of_point, name), t in judged.thresholds.items() if of_point == point}
        threshold_SK = np.stack(list(called.values()), axis=1)
        targets = [classes.index(name) for name in called]
        with np.errstate(invalid="ignore"):
            reached_SK = p_SC[:, targets] >= threshold_SK
        known_S = np.isfinite(p_SC).all(axis=1) & np.isfinite(threshold_SK).all(axis=1)
        if len(classes) == 2:
            said = [classes[int(reached)] for reached in reached_SK[:, 0]]
        else:
            listed = [[name for name, hit in zip(called, row, strict=True) if hit] for row in reached_SK]
            said = ["{" + ", ".join(names) + "}" for names in listed]
        texts = [text if known else None for text, known in zip(said, known_S, strict=True)]
        columns[f"at_{point}"] = pd.Series(texts, dtype=object).to_numpy()
    return pd.DataFrame(columns, index=pd.Index(judged.table["slide"], name="slide"))


# --- the file --------------------------------------------------------------------------------------------------------


def write_decisions(folder: Path, decisions: Decisions) -> None:
    write_whole(folder / FILE, decisions.model_dump_json(indent=1) + "\n")


def read_decisions(folder: Path, classes: Sequence[str], members: Sequence[int]) -> Decisions:
    """decisions.json, checked, also against the study's classes and members.

    Raises:
        ReadbackError: it cannot be read, or does not fit the study.
    """
    path = folder / FILE
    content = read_json(path)
    problems = problems_of(Decisions, content)
    if not problems:
        decisions = Decisions.model_validate(content)
        problems = unfit(decisions, classes, members)
        if not problems:
            return decisions
    raise ReadbackError("a run cannot be read back", [f"{path}: {problem}" for problem in problems])


def unfit(decisions: Decisions, classes: Sequence[str], members: Sequence[int]) -> list[str]:
    """What in decisions.json does not fit the study, or is no map, threshold or score."""
    if decisions.classes != list(classes):
        return [f"classes {decisions.classes}, but the study has {list(classes)}"]
    calibration, problems = decisions.calibration, []
    whose = {"val": list(members), "out-of-fold": [None], "nothing": []}[calibration.fitted_on]
    if [one.member for one in calibration.maps] != whose:
        problems.append(f"calibration: expected maps fitted on {calibration.fitted_on} of members {whose}")
    n_functions = 1 if len(classes) == 2 else len(classes)
    for knots in (one.knots for one in calibration.maps if one.knots is not None):
        rising = all(len(k.x) == len(k.y) and _rises(k.x) and _rises(k.y) and k.y[0] > 0 and k.y[-1] < 1 for k in knots)
        if len(knots) != n_functions or not rising:
            problems.append(f"calibration: expected {n_functions} rising functions with values between 0 and 1")
    if not {one.of_class for one in decisions.operating.thresholds} <= set(classes):
        problems.append("operating: a threshold of a class that the study does not have")
    if list(decisions.conformal.of_class) != list(classes):
        problems.append(f"conformal: expected scores of {', '.join(classes)}")
    if not all(_rises([0.0, *scores, 1.0]) for scores in decisions.conformal.of_class.values()):
        problems.append("conformal: expected rising scores from 0 to 1")
    return problems


def _rises(values: Sequence[float]) -> bool:
    return bool((np.diff(values) >= 0).all())
