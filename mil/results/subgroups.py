"""Every metric by sub-group, and whether a group differs from all other slides.

The slides of a group and those of the rest are different slides, so DeLong's paired test does not apply: what is tested
is the difference of two AUCs (or of another metric) of two sets of slides, in which patients are clusters, and a
patient may have slides in both. The test permutes who is in the group:

* a patient whose slides are all on one side changes sides as a whole, with patients of the same label (so that the
  class mix, on which average precision depends, stays as it is);
* of a patient with slides on both sides the slides of one label change places.

If predictions do not depend on the group, given label and patient, every such arrangement was as likely as the one
that was seen, and the p value holds exactly, however few slides there are (Good, "Permutation, Parametric and Bootstrap
Tests of Hypotheses", 2005, chapter 3). For the AUC the difference is divided by its clustered standard error in every
arrangement (Obuchowski, Biometrics 1997; a patient with slides on both sides is one cluster): such a studentised test
holds asymptotically too where only the AUCs are equal and the groups' scores differ otherwise (Janssen, Statistics and
Probability Letters 1997; Chung and Romano, Annals of Statistics 2013). Wald's test with the same standard error is left
out because it rejects up to twice too often (`benchmarks/subgroups.py`). Holm's correction (1979) goes over
all groups of all columns, for each metric by itself.

Axes: S slides, C classes, R arrangements (the first is the one that was seen), U units that change sides together,
P patients, G groups of slides with equal probability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from extract.wording import count
from mil.results.summary import counts, score
from mil.results.tables import p_columns
from mil.tasks.metrics import METRICS, against_the_rest, decide, none_if_nan, weighted_metrics

LEAST_PATIENTS = 10
"""Patients of each class that a group needs, or its figures say more about chance than about the group."""
PERMUTATIONS = 1000
NUMBERS_AT_ONCE = 200_000
"""Slides times arrangements that are worked on at a time."""
METHOD = (
    f"groups with fewer than {LEAST_PATIENTS} patients of a class are too small: counted, not scored. p: permutation "
    f"test ({PERMUTATIONS:,} arrangements) of the group's slides against all others, patients as clusters, within "
    "labels; of the AUC studentised with its clustered standard error. Holm: over all groups, for each metric"
)


def subgroups_block(
    groups: Mapping[str, Mapping[str, str]],
    tables: Mapping[str, pd.DataFrame],
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """What metrics.json holds as `subgroups`: the groups of every set of slides that has some.

    Args:
        groups, resamples: as for `subgroups_of`; without resamples there are no tests either.
        tables: name of the set -> its table of slides.
    """
    tests = PERMUTATIONS if resamples else 0
    return {
        "least_patients": LEAST_PATIENTS,
        "permutations": tests,
        "sets": {
            name: subgroups_of(table, groups, classes, resamples, seed, permutations=tests)
            for name, table in tables.items()
            if len(table)
        },
        "method": METHOD,
    }


COLUMNS = (
    "set", "subgroup", "group", "slides", "unlabelled", "patients", "metric", "value", "low", "high", "method",
    "difference", "p_value", "p_holm", "note",
)  # fmt: skip


def subgroups_table(block: Mapping[str, Any], metrics: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """What `subgroups_block` gives, one row a set, group and metric (`COLUMNS`).

    metrics: the task's own names.

    unlabelled: of the slides, which are not scored. low, high: the 95 % interval, and its method. difference: group
    less rest, with its p value and Holm's. note: why there is no number, or no test. Empty: undefined.
    """
    rows = [
        (
            which, grouping["name"], group["name"],
            *(group["counts"][key] for key in ("slides", "unlabelled", "patients")),
            name, *of_metric(group, name), group["no_test"],
        )
        for which, groupings in block["sets"].items()
        for grouping in groupings
        for group in grouping["groups"]
        for name in metrics
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def of_metric(group: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """A group's value, low, high, method, difference, p value and Holm's of one metric; None where there is none."""
    scored, test = ((group[part] or {}).get(name, {}) for part in ("metrics", "against_rest"))
    return (
        *(scored.get(key) for key in ("value", "low", "high", "method")),
        *(test.get(key) for key in ("difference", "p_value", "p_holm")),
    )


def subgroups_of(
    table: pd.DataFrame,
    groups: Mapping[str, Mapping[str, str]],
    classes: Sequence[str],
    resamples: int,
    seed: int,
    *,
    permutations: int = PERMUTATIONS,
) -> list[dict[str, Any]]:
    """Every grouping's groups with their counts, metrics and tests, as `metrics.json` holds them.

    Args:
        table: a table of slides (`mil.results.tables`); unlabelled slides are counted and not scored.
        groups: grouping -> slide -> name of its group.
        resamples: of the intervals. permutations: of the tests; 0 = none.
    """
    found: list[dict[str, Any]] = []
    tests: dict[tuple[int, int], np.ndarray] = {}
    for place, (said, group_of) in enumerate(groups.items()):
        name_S = table["slide"].map(group_of).to_numpy(dtype=object)
        own: list[dict[str, Any]] = []
        for name in sorted(set(name_S)):
            inside_S = np.asarray(name_S == name)
            own.append(one_group(str(name), table, inside_S, classes, resamples, seed))
            if own[-1]["no_test"] is None and permutations:
                tests[place, len(own) - 1] = inside_S
        found.append({"name": said, "groups": own})
    for (place, row), against_rest in tested(table, tests, classes, permutations, seed).items():
        found[place]["groups"][row]["against_rest"] = against_rest
    return found


def one_group(
    name: str, table: pd.DataFrame, inside_S: np.ndarray, classes: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """Counts of a group; its metrics if it is large enough; why it is not compared with the rest, or None."""
    own, rest = table[inside_S], table[~inside_S]
    small, rest_small = too_small(own, classes), too_small(rest, classes)
    scored = None if small else score(own[own["label"] >= 0], classes, resamples, seed, True)["metrics"]
    finite = bool(np.isfinite(table[p_columns(classes)].to_numpy(dtype=np.float64)).all())
    why = small and f"too small: {small}"
    why = why or (rest_small and f"the rest is too small: {rest_small}")
    return {
        "name": name,
        "counts": counts(own, classes),
        "too_small": small,
        "metrics": scored,
        "no_test": why or (None if finite else "predictions are not numbers"),
        "against_rest": None,
    }


def too_small(table: pd.DataFrame, classes: Sequence[str]) -> str | None:
    """Of which class there are too few patients, in words; None: enough of all."""
    patients = counts(table, classes)["patients_per_class"]
    few = [f"{count(n, 'patient')} of {name}" for name, n in patients.items() if n < LEAST_PATIENTS]
    return ", ".join(few) or None


def tested(
    table: pd.DataFrame,
    tests: Mapping[tuple[int, int], np.ndarray],
    classes: Sequence[str],
    permutations: int,
    seed: int,
) -> dict[tuple[int, int], dict[str, Any]]:
    """Difference, p value and Holm's for every metric of every test."""
    labelled_S = (table["label"] >= 0).to_numpy()
    labelled, ask = table[labelled_S], {key: inside_S[labelled_S] for key, inside_S in tests.items()}
    return tested_by(ask, tuple(METRICS), lambda inside_S: p_values(labelled, inside_S, classes, permutations, seed))


def tested_by(
    ask: Mapping[tuple[int, int], np.ndarray],
    names: Sequence[str],
    test: Callable[[np.ndarray], dict[str, tuple[float, float]]],
) -> dict[tuple[int, int], dict[str, Any]]:
    """Difference, p value and Holm's of the metrics `names` for every group; two halves of a cohort are one test.

    Args:
        ask: who is in the group, bool. test: gives each metric's difference and p value.
    """
    same = {key: (inside_S ^ inside_S[0]).tobytes() for key, inside_S in ask.items()}  # as its other half
    one_of = {text: key for key, text in same.items()}
    each = {text: test(ask[key]) for text, key in one_of.items()}
    holm: dict[str, dict[bytes, float]] = {}
    for name in names if each else ():
        p = [found[name][1] for found in each.values()]
        holm[name] = dict(zip(each, holm_of(p), strict=True))
    return {
        key: {
            name: {
                "difference": none_if_nan(difference if ask[key][0] == ask[one_of[text]][0] else -difference),
                "p_value": p,
                "p_holm": holm[name][text],
            }
            for name, (difference, p) in each[text].items()
        }
        for key, text in same.items()
    }


def holm_of(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979): (n - rank) times the p value, never below that of a smaller one, at most 1.

    As statsmodels' `multipletests`, which collects the garbage of the whole process at every call: seconds with torch.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    found: list[float] = adjusted.clip(max=1).tolist()
    return found


def p_values(
    table: pd.DataFrame, inside_S: np.ndarray, classes: Sequence[str], permutations: int, seed: int
) -> dict[str, tuple[float, float]]:
    """For every metric: group minus rest, and the two-sided p value; of labelled slides with finite probabilities."""
    label_S, p_SC = table["label"].to_numpy(dtype=np.int64), table[p_columns(classes)].to_numpy(dtype=np.float64)
    predicted_S = decide(p_SC, table["threshold"].to_numpy())
    patient_S = np.unique(table["patient"].to_numpy(dtype=str), return_inverse=True)[1]
    inside_RS = arrangements(inside_S, label_S, patient_S, permutations, np.random.default_rng([seed, len(table)]))
    metrics_of = partial(weighted_metrics, label_S, p_SC, predicted_S)
    parts, students = [], []
    for rows in np.array_split(np.arange(len(inside_RS)), -(-inside_RS.size // NUMBERS_AT_ONCE)):
        inside, outside = (metrics_of(side_RS.astype(np.float64)) for side_RS in (inside_RS[rows], ~inside_RS[rows]))
        parts.append({name: inside[name] - outside[name] for name in METRICS})
        students.append(studentised(label_S, p_SC, patient_S, inside_RS[rows]))
    found = {}
    for name in METRICS:
        difference_R = np.concatenate([part[name] for part in parts])
        statistic_R = np.concatenate(students) if name == "auc" else difference_R - difference_R.mean()
        found[name] = (float(difference_R[0]), share_as_far(statistic_R))
    return found


def share_as_far(statistic_R: np.ndarray) -> float:
    """p = (1 + #{as far from 0 as the first}) / (1 + n); ties that rounding tells apart count."""
    far_R = np.abs(statistic_R)
    return float(np.mean(~(far_R < far_R[0] - 1e-9 * max(1.0, far_R[0] if np.isfinite(far_R[0]) else 1.0))))


def arrangements(
    inside_S: np.ndarray, label_S: np.ndarray, patient_S: np.ndarray, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """Who could as well have been in the group, bool (1 + permutations, S); the first row is `inside_S`."""
    slides = pd.DataFrame({"inside": inside_S, "label": label_S, "patient": patient_S})
    of_patient = slides.groupby("patient")
    split_S = (of_patient["inside"].transform("nunique") > 1).to_numpy()
    labels_P = of_patient["label"].agg(lambda labels: str(sorted(set(labels))))
    # a unit is a patient, or one slide of a patient that has slides on both sides
    unit_S = np.unique(np.where(split_S, len(slides) + np.arange(len(slides)), patient_S), return_inverse=True)[1]
    stratum_S = np.where(split_S, [f"{p} {c}" for p, c in zip(patient_S, label_S, strict=True)], labels_P[patient_S])
    first_U = np.unique(unit_S, return_index=True)[1]
    inside_RU = np.tile(inside_S[first_U], (permutations + 1, 1))
    for stratum in np.unique(stratum_S[first_U]):
        columns = np.flatnonzero(stratum_S[first_U] == stratum)
        inside_RU[1:, columns] = rng.permuted(inside_RU[1:, columns], axis=1)
    arranged_RS: np.ndarray = inside_RU[:, unit_S]
    return arranged_RS


def studentised(label_S: np.ndarray, p_SC: np.ndarray, patient_S: np.ndarray, inside_RS: np.ndarray) -> np.ndarray:
    """AUC of the group minus AUC of the rest over the clustered standard error of the difference, (R,).

    With several classes the mean over classes, each against the rest. 0 where both AUCs are equal and without variance.
    """
    difference_R, deviation_RS = np.zeros(len(inside_RS)), np.zeros(inside_RS.shape)
    ranked = against_the_rest(p_SC.shape[1])
    for c in ranked:
        for sign, side_RS in ((1, inside_RS), (-1, ~inside_RS)):
            auc_R, of_slides_RS = auc_and_deviations(label_S == c, p_SC[:, c], side_RS)
            difference_R += sign * auc_R / len(ranked)
            deviation_RS += sign * of_slides_RS / len(ranked)
    order_S = np.argsort(patient_S, kind="stable")
    starts_P = np.flatnonzero(np.diff(patient_S[order_S], prepend=-1))
    of_patients_RP = np.add.reduceat(deviation_RS[:, order_S], starts_P, axis=1)
    error_R = np.sqrt((of_patients_RP**2).sum(axis=1))
    large_R = np.sign(difference_R) * np.where(np.abs(difference_R) > 1e-12, np.inf, 0.0)
    statistic_R: np.ndarray = np.divide(difference_R, error_R, out=large_R, where=error_R > 1e-12)
    return statistic_R


def auc_and_deviations(truth_S: np.ndarray, p_S: np.ndarray, side_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC of the slides of a side, (R,), and how far each slide moves it, (R, S): 0 for those that are not of it.

    The structural components of DeLong et al. (1988) less the AUC, over the number of slides of the slide's class; the
    square of their sum over a patient, added up, is the AUC's clustered variance (Obuchowski 1997).
    """
    _, group_S = np.unique(p_S, return_inverse=True)
    order_S = np.argsort(group_S, kind="stable")
    starts_G = np.flatnonzero(np.diff(group_S[order_S], prepend=-1))
    positive_RS, negative_RS = (side_RS * chosen_S for chosen_S in (truth_S.astype(float), (~truth_S).astype(float)))
    positive_RG, negative_RG = (np.add.reduceat(x[:, order_S], starts_G, axis=1) for x in (positive_RS, negative_RS))
    n_positive_R1, n_negative_R1 = (x.sum(axis=1, keepdims=True) for x in (positive_RG, negative_RG))
    below_RS = (np.cumsum(negative_RG, axis=1) - negative_RG / 2)[:, group_S] / n_negative_R1
    above_RS = 1 - (np.cumsum(positive_RG, axis=1) - positive_RG / 2)[:, group_S] / n_positive_R1
    auc_R1 = (positive_RS * below_RS).sum(axis=1, keepdims=True) / n_positive_R1
    of_positives_RS = positive_RS * (below_RS - auc_R1) / n_positive_R1
    deviations_RS: np.ndarray = of_positives_RS + negative_RS * (above_RS - auc_R1) / n_negative_R1
    return auc_R1[:, 0], deviations_RS
