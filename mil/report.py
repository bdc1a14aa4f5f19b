"""Predictions -> metrics.json, slides.csv, patients.csv, figures/*.png, report.html, and the table for the terminal.

What is reported comes from `role == "test"` alone: out-of-fold predictions of the slides that were cross-validated, and
predictions of the official test split. A threshold is chosen on the member's own `role == "val"` slides or is 0.5.
Several members that saw one slide are one ensemble: the mean of their logits. Numbers reach the page only out of the
dictionary that `metrics.json` holds.

Axes: S slides, C classes, R resamples. A "table of slides" has the columns slide, patient, split, label (class index,
-1 = unlabelled), members (how many predicted it), threshold, p_0..p_{C-1} and sd (over members).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from scipy.special import expit, logit, softmax
from sklearn.metrics import precision_recall_curve, roc_curve

from extract.cache import replace_on_success
from mil.metrics import (
    ECE_BINS,
    LEVEL,
    METRICS,
    Interval,
    bootstrap,
    by_patient,
    calibration_bin,
    choose_threshold,
    class_metrics,
    confusion,
    decide,
    none_if_nan,
    weighted_metrics,
)

TEMPLATE = Path(__file__).with_name("report.html")
MOST_WRONG = 20
LINE_FROM = 5
"""Slides in a bin from which its dot in the calibration figure is large and joined to others: few make a zigzag."""
UNDEFINED = "undefined"
OUT_OF_FOLD, TEST_ENSEMBLE = "out-of-fold", "test ensemble"
UNUSED_ENSEMBLE, NEVER_HELD_OUT = "unused ensemble", "never held out"

# Okabe and Ito's palette: safe for colour-blind readers, distinct in grey.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INK, MUTED, LINE = "#1b2733", "#5f6f7e", "#dde3e8"
CLASS_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
SET_COLOURS = {OUT_OF_FOLD: BLUE, TEST_ENSEMBLE: VERMILLION}
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#bcd9ec", BLUE])


# --- numbers --------------------------------------------------------------------------------------------------------


def summarise(
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    classes: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    choices: pd.DataFrame | None = None,
    thresholds: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """What `metrics.json` holds: plain numbers, lists and dictionaries; None where a number is undefined.

    Args:
        predictions: one row a member and slide: member, repeat, fold, slide, patient, label (class name, or missing),
            split (train/test), role (train/val/test/unused), logit_* (one column for two classes: the log-odds of the
            last class; else one a class) and p_0..p_{C-1}.
        plan: one row a member: member, repeat, fold, seed, lr, weight_decay, epochs (trained), best_epoch (that was
            kept, counted from 1), n_train, n_val, n_test (slides).
        classes: class names in the order of the probability columns; of two, the last is the positive one.
        bootstrap: resamples for the 95 % intervals, drawn patient by patient; 0 for none.
        seed: of the bootstrap.
        choices: of nested cross-validation, as `mil.nested.choose` gives it.
        thresholds: of a study trained earlier, as `member_thresholds` gives them; default: chosen on its val slides.

    Raises:
        ValueError: columns are missing, a member predicts a slide twice, or a label is not among `classes`.
    """
    check_tables(predictions, plan, classes)
    thresholds = member_thresholds(predictions, classes) if thresholds is None else thresholds
    pooled = pooled_out_of_fold(predictions, classes, thresholds)
    tested = held_out_ensemble(predictions, classes, thresholds)
    slides = predictions.drop_duplicates("slide").assign(label=lambda t: label_index(t["label"], classes))
    cross_validated, official = slides[slides["split"] != "test"], slides[slides["split"] == "test"]
    folds = [one_member(row, predictions, classes, thresholds, "train") for _, row in plan.iterrows()]
    folds = [fold for fold in folds if fold["counts"]["slides"]]
    return {
        "classes": list(classes),
        "positive_class": classes[-1] if len(classes) == 2 else None,
        "averaging": "positive class" if len(classes) == 2 else "macro, one class against the rest",
        "bootstrap": {"resamples": bootstrap, "seed": seed, "unit": "patient", "level": LEVEL},
        "warnings": warnings_about(predictions, plan, nested=choices is not None),
        "counts": {
            "all": counts(slides, classes),
            "cross_validated": counts(cross_validated, classes),
            "test": counts(official, classes),
        },
        "members": len(plan),
        "thresholds": thresholds_as_list(thresholds),
        "folds": folds,
        **({} if choices is None else {"nested": nested_block(choices, folds)}),
        "cross_validation": cross_validation(folds) if folds else None,
        "pooled_out_of_fold": evaluate(pooled, classes, bootstrap, seed) if len(pooled) else None,
        "test": test_block(predictions, plan, classes, thresholds, tested, bootstrap, seed) if len(tested) else None,
    }


def check_tables(predictions: pd.DataFrame, plan: pd.DataFrame, classes: Sequence[str]) -> None:
    """Refuse tables that cannot be scored; the message lists all that is wrong."""
    needed = ["member", "repeat", "fold", "slide", "patient", "label", "split", "role"]
    needed += p_columns(classes) + logit_columns(classes)
    of_plan = [
        "member",
        "repeat",
        "fold",
        "seed",
        "lr",
        "weight_decay",
        "epochs",
        "best_epoch",
        "n_train",
        "n_val",
        "n_test",
    ]
    problems = [f"predictions: no column {name!r}" for name in needed if name not in predictions.columns]
    problems += [f"plan: no column {name!r}" for name in of_plan if name not in plan.columns]
    if len(classes) < 2:
        problems.append(f"expected at least two classes, got {list(classes)}")
    if not problems:
        twice = predictions[predictions.duplicated(["member", "slide"])]
        if len(twice):
            first = twice.iloc[0]
            problems.append(f"predictions: member {first['member']} has slide {first['slide']!r} more than once")
        found = {str(label) for label in predictions["label"].dropna().unique()}
        unknown = sorted(found - {str(name) for name in classes})
        if unknown:
            problems.append(f"predictions: labels {unknown} are not among the classes {list(classes)}")
        absent = sorted(set(predictions["member"]) - set(plan["member"]))
        if absent:
            problems.append(f"predictions: members {absent} are not in the plan")
    if problems:
        raise ValueError("cannot report:\n" + "\n".join(f"  - {p}" for p in problems))


def nested_block(choices: pd.DataFrame, folds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the inner folds chose, how often each cell won, and how much better the inner score was than the outer one.

    `choices`: what was chosen for each outer member, with its inner AUC, outer test AUC and their difference.
    `cells`: every cell with the number of outer members that chose it and its mean inner AUC over them.
    """
    outer_auc = {fold["member"]: fold["metrics"]["auc"] for fold in folds}
    chosen: list[dict[str, Any]] = []
    for row in choices[choices["chosen"]].sort_values("member").to_dict("records"):
        outer, inner = outer_auc.get(row["member"]), float(row["inner_auc"])
        chosen.append(
            {
                **{name: int(row[name]) for name in ("member", "repeat", "fold", "seed", "cell", "epochs")},
                **{name: float(row[name]) for name in ("lr", "weight_decay")},
                "inner_auc": inner,
                "inner_auc_sd": none_if_nan(row["inner_auc_sd"]),
                "outer_auc": outer,
                "optimism": None if outer is None else inner - outer,
            }
        )
    cells: list[dict[str, Any]] = [
        {
            "cell": int(own["cell"].iloc[0]),
            **{name: float(own[name].iloc[0]) for name in ("lr", "weight_decay")},
            "chosen": int(own["chosen"].sum()),
            "inner_auc": none_if_nan(own["inner_auc"].mean()),
        }
        for _, own in choices.groupby("cell", sort=True)
    ]
    epochs, most = [c["epochs"] for c in chosen], max(cells, key=lambda c: c["chosen"])
    return {
        "choices": chosen,
        "cells": cells,
        "stability": {
            "most_chosen": most["cell"],
            "share": most["chosen"] / len(chosen),
            "different_cells": sum(c["chosen"] > 0 for c in cells),
            "epochs": {"min": min(epochs), "median": float(np.median(epochs)), "max": max(epochs)},
        },
        "inner_auc": number_mean_sd([c["inner_auc"] for c in chosen]),
        "optimism": number_mean_sd([c["optimism"] for c in chosen]),
        "method": "cell and epochs by the highest mean inner AUC (ties: fewer epochs, then the first cell); refitted "
        "on the whole outer training part; optimism = inner AUC of the choice - AUC on the outer test fold",
    }


def number_mean_sd(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, SD (n - 1) and n of the numbers that are defined."""
    known = [v for v in values if v is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
    }


def warnings_about(predictions: pd.DataFrame, plan: pd.DataFrame, *, nested: bool = False) -> list[str]:
    """What a reader must know before trusting the averages."""
    found = []
    p = predictions[[c for c in predictions.columns if c.startswith("p_")]]
    bad = predictions[~np.isfinite(p.to_numpy(dtype=np.float64)).all(axis=1)]
    for member, count in bad.groupby("member").size().items():
        found.append(
            f"member {member}: {count} predictions are not numbers (training diverged?); every figure that needs them "
            "is undefined"
        )
    for name in ("lr", "weight_decay"):
        if len(plan[name].unique()) > 1 and not nested:  # nested: chosen for each fold, as it should be
            values = ", ".join(f"{value:g}" for value in sorted(plan[name].unique()))
            found.append(f"members differ in {name} ({values}); means and ensembles mix them")
    return found


def member_thresholds(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Index member, columns threshold and origin: chosen on the member's val slides, else 0.5; NaN for many classes."""
    rows = {}
    for member, own in predictions.groupby("member", sort=True):
        if len(classes) > 2:
            rows[member] = (np.nan, "none: the class with the highest probability")
            continue
        val = own[(own["role"] == "val") & own["label"].notna()]
        p = val["p_1"].to_numpy(dtype=np.float64)
        labels = label_index(val["label"], classes)
        if not len(val):
            rows[member] = (0.5, "default 0.5 (no val slides)")
        elif len(np.unique(labels)) < 2:
            rows[member] = (0.5, "default 0.5 (val slides of one class)")
        elif not np.isfinite(p).all():
            rows[member] = (0.5, "default 0.5 (val predictions are not numbers)")
        else:
            chosen = choose_threshold(labels, p)
            rows[member] = (
                (0.5, "default 0.5 (none beats chance on val)") if chosen is None else (chosen, "Youden on val")
            )
    return pd.DataFrame.from_dict(rows, orient="index", columns=["threshold", "origin"]).rename_axis("member")


def mean_of_logits(rows: pd.DataFrame, classes: Sequence[str], thresholds: pd.DataFrame) -> pd.DataFrame:
    """A table of slides: the mean of the logits of all members in `rows`, as probabilities.

    The threshold of a slide is the mean of its members' thresholds, taken in log-odds as well.
    """
    own_threshold = thresholds["threshold"].loc[rows["member"]].to_numpy(dtype=np.float64)
    safe = np.clip(own_threshold, 1e-12, 1 - 1e-12)
    rows = rows.assign(_threshold=logit(safe))
    groups = rows.groupby("slide", sort=True)
    names = p_columns(classes)
    columns = logit_columns(classes)
    complete = groups[columns].count().eq(groups.size(), axis=0)  # pandas' mean would leave out what is not a number
    logits = groups[columns].mean().where(complete).to_numpy(dtype=np.float64)
    with np.errstate(invalid="ignore"):
        p_SC = to_probabilities(logits)
        sd_SC = groups[names].std(ddof=1).to_numpy(dtype=np.float64)
    first = rows.drop_duplicates("slide").set_index("slide").sort_index()
    table = pd.DataFrame(
        {
            "slide": first.index.to_numpy(),
            "patient": first["patient"].astype(str).to_numpy(),
            "split": first["split"].to_numpy(),
            "label": label_index(first["label"], classes),
            "members": groups.size().to_numpy(),
            "threshold": expit(groups["_threshold"].mean().to_numpy()),
        }
    )
    table[names] = p_SC
    shown = decide(p_SC) if len(classes) > 2 else np.ones(len(table), dtype=np.int64)
    table["sd"] = sd_SC[np.arange(len(table)), shown]
    return table


def pooled_out_of_fold(predictions: pd.DataFrame, classes: Sequence[str], thresholds: pd.DataFrame) -> pd.DataFrame:
    """Table of the cross-validated slides, each predicted only by members that held it out (one a repeat and seed)."""
    rows = predictions[(predictions["role"] == "test") & (predictions["split"] != "test")]
    return mean_of_logits(rows, classes, thresholds)


def held_out_ensemble(predictions: pd.DataFrame, classes: Sequence[str], thresholds: pd.DataFrame) -> pd.DataFrame:
    """Table of the official test slides, each predicted by the ensemble of all members."""
    rows = predictions[(predictions["role"] == "test") & (predictions["split"] == "test")]
    return mean_of_logits(rows, classes, thresholds)


def one_member(
    member: pd.Series, predictions: pd.DataFrame, classes: Sequence[str], thresholds: pd.DataFrame, split: str
) -> dict[str, Any]:
    """A member's metrics on the slides of `split` that it held out."""
    rows = predictions[predictions["member"] == member["member"]]
    of_split = rows["split"] == "test" if split == "test" else rows["split"] != "test"
    table = mean_of_logits(rows[of_split & (rows["role"] == "test")], classes, thresholds)
    known = thresholds.loc[member["member"]] if member["member"] in thresholds.index else None
    return {
        **{name: int(member[name]) for name in ("member", "repeat", "fold", "seed", "epochs", "best_epoch")},
        **{name: float(member[name]) for name in ("lr", "weight_decay")},
        **{name: int(member[name]) for name in ("n_train", "n_val", "n_test")},
        "threshold": None if known is None else none_if_nan(known["threshold"]),
        "threshold_origin": None if known is None else str(known["origin"]),
        **evaluate(table, classes, 0, 0, with_intervals=False),
    }


def cross_validation(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and SD over the folds, of all repeats and seeds together and of each repeat."""
    repeats = sorted({fold["repeat"] for fold in folds})
    return {
        "metrics": mean_and_sd(folds),
        "repeats": [{"repeat": r, "metrics": mean_and_sd([f for f in folds if f["repeat"] == r])} for r in repeats],
        "method": "mean and standard deviation (n - 1) of the members' metrics on the slides that each held out",
    }


def test_block(
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    classes: Sequence[str],
    thresholds: pd.DataFrame,
    tested: pd.DataFrame,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The official test split: each member, their mean and SD, and the ensemble."""
    members = [one_member(row, predictions, classes, thresholds, "test") for _, row in plan.iterrows()]
    members = [member for member in members if member["counts"]["slides"]]
    return {
        "members": members,
        "over_members": mean_and_sd(members),
        "ensemble": evaluate(tested, classes, resamples, seed),
        "method": f"mean of the logits of all {len(members)} members; its threshold is the mean of theirs, in log-odds",
    }


def evaluate(
    table: pd.DataFrame, classes: Sequence[str], resamples: int, seed: int, *, with_intervals: bool = True
) -> dict[str, Any]:
    """A table of slides: counts, metrics, per class (several classes), confusion, and by patient where that differs.

    Unlabelled slides are counted and not scored. Probabilities that are not numbers make every metric undefined.
    """
    labelled = table[table["label"] >= 0]
    block = {"counts": counts(table, classes), **score(labelled, classes, resamples, seed, with_intervals)}
    if with_intervals and labelled["patient"].duplicated().any():
        patients, mixed = by_patient(labelled[["patient", "label", "threshold", *p_columns(classes)]])
        block["patient_level"] = {
            "patients": len(patients),
            "patients_per_class": per_class_count(patients["label"], classes),
            "left_out": mixed,
            **score(patients, classes, resamples, seed, True),
            "method": "mean of the slides' probabilities; patients whose slides have different labels are left out",
        }
    return block


def score(
    table: pd.DataFrame, classes: Sequence[str], resamples: int, seed: int, with_intervals: bool
) -> dict[str, Any]:
    """Metrics (with patient-level intervals), per class and confusion of labelled rows."""
    labels_S = table["label"].to_numpy(dtype=np.int64)
    p_SC = table[p_columns(classes)].to_numpy(dtype=np.float64)
    finite = bool(np.isfinite(p_SC).all())
    predicted_S = decide(p_SC, table["threshold"].to_numpy())
    one = np.ones((1, len(table)))

    def scored(metrics_of: Callable[[np.ndarray], dict[str, np.ndarray]]) -> dict[str, Any]:
        values = {name: none_if_nan(v[0]) for name, v in metrics_of(one).items()} if finite else dict.fromkeys(METRICS)
        if not with_intervals:
            return values
        intervals = bootstrap(metrics_of, table["patient"].tolist(), resamples if finite else 0, seed)
        return {name: with_interval(values[name], intervals[name]) for name in METRICS}

    block: dict[str, Any] = {"metrics": scored(lambda w_RS: weighted_metrics(labels_S, p_SC, predicted_S, w_RS))}
    if len(classes) > 2:
        block["per_class"] = {
            name: scored(lambda w_RS, c=c: class_metrics(c, labels_S, p_SC, predicted_S, w_RS))  # type: ignore[misc]
            for c, name in enumerate(classes)
        }
    block["confusion"] = {
        "rows": "true class",
        "columns": "predicted class",
        "matrix": confusion(labels_S, predicted_S, len(classes)).tolist() if finite else None,
    }
    return block


def with_interval(value: float | None, interval: Interval) -> dict[str, Any]:
    """A number and its interval; an undefined number has none."""
    known = value is not None
    return {
        "value": value,
        "low": interval.low if known else None,
        "high": interval.high if known else None,
        "resamples": interval.resamples,
        "undefined": interval.undefined,
    }


def mean_and_sd(members: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per metric: mean, SD (n - 1), how many members it is defined for and how many not."""
    summary = {}
    for name in METRICS:
        values = [m["metrics"][name] for m in members if m["metrics"][name] is not None]
        summary[name] = {
            "mean": float(np.mean(values)) if values else None,
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "n": len(values),
            "undefined": len(members) - len(values),
        }
    return summary


def counts(table: pd.DataFrame, classes: Sequence[str]) -> dict[str, Any]:
    """How many slides and patients, in all, without label and per class; `label` holds class indices."""
    label = table["label"].to_numpy(dtype=np.int64)
    patients = [table["patient"][label == c].nunique() for c in range(len(classes))]
    return {
        "slides": len(table),
        "patients": int(table["patient"].nunique()),
        "unlabelled": int((label < 0).sum()),
        "slides_per_class": per_class_count(table["label"], classes),
        "patients_per_class": dict(zip(classes, patients, strict=True)),
    }


def per_class_count(label: pd.Series, classes: Sequence[str]) -> dict[str, int]:
    return {name: int((label == c).sum()) for c, name in enumerate(classes)}


def thresholds_as_list(thresholds: pd.DataFrame) -> list[dict[str, Any]]:
    columns = (thresholds.index.tolist(), thresholds["threshold"].tolist(), thresholds["origin"].tolist())
    rows = zip(*columns, strict=True)
    return [{"member": int(m), "threshold": none_if_nan(value), "origin": origin} for m, value, origin in rows]


def label_index(labels: pd.Series, classes: Sequence[str]) -> np.ndarray:
    """Class index of every label, -1 where it is missing."""
    index = {str(name): i for i, name in enumerate(classes)}
    return np.array([-1 if pd.isna(label) else index[str(label)] for label in labels], dtype=np.int64)


def to_probabilities(logits: np.ndarray) -> np.ndarray:
    """(S, 1) log-odds of the last of two classes, or (S, C) logits -> (S, C) probabilities."""
    if logits.shape[1] == 1:
        return np.concatenate([expit(-logits), expit(logits)], axis=1)
    return softmax(logits, axis=1) if len(logits) else logits


def p_columns(classes: Sequence[str]) -> list[str]:
    return [f"p_{c}" for c in range(len(classes))]


def logit_columns(classes: Sequence[str]) -> list[str]:
    return [f"logit_{c}" for c in range(1 if len(classes) == 2 else len(classes))]


def predictions_table(
    members: pd.DataFrame, slides: pd.DataFrame, roles_MS: np.ndarray, logits_MSC: np.ndarray
) -> pd.DataFrame:
    """One row a member and slide: who, what role, logits and probabilities.

    Args:
        members: columns member, repeat, fold, seed. slides: columns slide, patient, label, split.
        roles_MS: names of the roles. logits_MSC: as the members give them, one for two classes.
    """
    n_members, n_slides, n_logits = logits_MSC.shape
    columns = members.loc[:, ["member", "repeat", "fold", "seed"]]
    table = columns.merge(slides.loc[:, ["slide", "patient", "label", "split"]], how="cross")
    table["role"] = roles_MS.astype(object).reshape(-1)
    p_NC = to_probabilities(logits_MSC.astype(float).reshape(n_members * n_slides, n_logits))
    for c in range(n_logits):
        table[f"logit_{c}"] = logits_MSC[:, :, c].reshape(n_members * n_slides)
    for c in range(p_NC.shape[1]):
        table[f"p_{c}"] = p_NC[:, c]
    return table


# --- slides.csv -----------------------------------------------------------------------------------------------------


def slides_table(
    predictions: pd.DataFrame, classes: Sequence[str], threshold: float | pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row a slide, the most wrong first: what the study says about it without having trained on it.

    Columns: slide, patient, label, split, kind, members, p_0.., threshold, predicted, sd (over members, of the positive
    class's probability, with several classes of the predicted one's), error (1 - probability of the label; empty
    without a label). Kinds: "out-of-fold", "test ensemble", "unused ensemble" (no member trained on it, selected with
    it or held it out: unlabelled slides), "never held out" (no honest prediction: empty).

    Args:
        threshold: one for all, or a table as `member_thresholds` gives it (default).
    """
    thresholds = member_thresholds(predictions, classes)
    if isinstance(threshold, pd.DataFrame):
        thresholds = threshold
    elif threshold is not None:
        thresholds = thresholds.assign(threshold=threshold if len(classes) == 2 else np.nan)
    slide, role = predictions["slide"], predictions["role"]
    held_out = slide.isin(slide[role == "test"])
    unused = ~slide.isin(slide[role != "unused"])
    honest = predictions[(role == "test") | unused]
    table = mean_of_logits(honest, classes, thresholds)
    names = p_columns(classes)
    p_SC = table[names].to_numpy(dtype=np.float64)
    label_S = table["label"].to_numpy()
    kinds = np.where(table["split"] == "test", TEST_ENSEMBLE, OUT_OF_FOLD)
    kinds = np.where(table["slide"].isin(slide[unused]), UNUSED_ENSEMBLE, kinds)
    p_label_S = p_SC[np.arange(len(table)), np.maximum(label_S, 0)]
    table = table.assign(
        kind=kinds,
        predicted=[classes[c] for c in decide(p_SC, table["threshold"].to_numpy())],
        error=np.where(label_S >= 0, 1 - p_label_S, np.nan),
    )
    rest = predictions[~held_out & ~unused].drop_duplicates("slide")
    missing = pd.DataFrame({"slide": rest["slide"], "patient": rest["patient"].astype(str), "split": rest["split"]})
    missing = missing.assign(kind=NEVER_HELD_OUT, members=0, label=label_index(rest["label"], classes))
    if len(missing):
        table = pd.concat([table, missing], ignore_index=True)
    table["label"] = pd.Series([classes[c] if c >= 0 else None for c in table["label"]], dtype=object)
    order = ["slide", "patient", "label", "split", "kind", "members", *names, "threshold", "predicted", "sd", "error"]
    return table.sort_values(["error", "slide"], ascending=[False, True], ignore_index=True)[order]


def patients_table(slides: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """One row a patient, the most wrong first: the mean of the slides' probabilities in `slides_table`.

    Columns: patient, label, split, kind, slides (how many are averaged), members (the fewest behind a slide), p_0..,
    threshold, predicted, error. A patient's labelled slides count; of a patient without any, all. Slides that were
    never held out have no honest prediction and are not averaged; a patient with such slides only has no probability.
    The label is empty for patients whose slides have different ones, which patient-level metrics leave out.
    """
    names = p_columns(classes)
    held_out = slides["kind"] != NEVER_HELD_OUT
    has_label = slides["label"].notna() & held_out
    counted = has_label | (held_out & ~slides["patient"].isin(slides["patient"][has_label]))
    counted |= ~slides["patient"].isin(slides["patient"][held_out])
    rows = slides[counted]
    groups = rows.groupby("patient", sort=True)
    table = groups[["label", "split", "kind"]].first()
    one_label = groups["label"].nunique().eq(1)
    table["label"] = table["label"].where(one_label, None)
    table["slides"], table["members"] = groups.size(), groups["members"].min()
    complete = groups[names].count().eq(groups.size(), axis=0)
    table[[*names, "threshold"]] = groups[[*names, "threshold"]].mean()
    table[names] = table[names].where(complete)
    p_PC = table[names].to_numpy(dtype=np.float64)
    known_P = np.isfinite(p_PC).all(axis=1)
    called_P = decide(np.nan_to_num(p_PC), table["threshold"].to_numpy())
    predicted = [classes[c] if known else None for c, known in zip(called_P, known_P, strict=True)]
    table["predicted"] = pd.Series(predicted, index=table.index, dtype=object)
    label_P = label_index(table["label"], classes)
    p_label_P = p_PC[np.arange(len(table)), np.maximum(label_P, 0)]
    table["error"] = np.where(label_P >= 0, 1 - p_label_P, np.nan)
    order = ["patient", "label", "split", "kind", "slides", "members", *names, "threshold", "predicted", "error"]
    return table.reset_index().sort_values(["error", "patient"], ascending=[False, True], ignore_index=True)[order]


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """What the figures draw, tables of labelled slides: `folds` one a member, `held_out` by name if there are any."""

    classes: Sequence[str]
    folds: list[pd.DataFrame]
    held_out: dict[str, pd.DataFrame]
    metrics: dict[str, Any]
    plan: pd.DataFrame
    history: pd.DataFrame

    def block(self, name: str) -> dict[str, Any]:
        """The metrics of one of `held_out`."""
        return self.metrics["pooled_out_of_fold"] if name == OUT_OF_FOLD else self.metrics["test"]["ensemble"]


def make_sets(
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    history: pd.DataFrame,
    classes: Sequence[str],
    metrics: dict[str, Any],
    thresholds: pd.DataFrame,
) -> Sets:
    """Tables for the figures, without unlabelled slides and without predictions that are not numbers."""

    def drawable(table: pd.DataFrame) -> pd.DataFrame:
        finite = np.isfinite(table[p_columns(classes)].to_numpy(dtype=np.float64)).all(axis=1)
        return table[finite & (table["label"] >= 0).to_numpy()]

    rows = predictions[(predictions["role"] == "test") & (predictions["split"] != "test")]
    folds = [drawable(mean_of_logits(own, classes, thresholds)) for _, own in rows.groupby("member", sort=True)]
    both = {
        OUT_OF_FOLD: drawable(pooled_out_of_fold(predictions, classes, thresholds)),
        TEST_ENSEMBLE: drawable(held_out_ensemble(predictions, classes, thresholds)),
    }
    return Sets(classes, folds, {name: table for name, table in both.items() if len(table)}, metrics, plan, history)


def roc_figure(sets: Sets) -> Figure | None:
    """ROC: two classes with every fold, their mean and spread; several classes one against the rest."""
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    if len(sets.classes) > 2:
        drawn = draw_per_class(axes, sets, roc_points, "auc", "AUC")
    else:
        drawn = draw_fold_rocs(axes, sets)
        for name, table in two_class_sets(sets):
            fpr, tpr = roc_points(table["label"] == 1, table["p_1"])
            text = f"{name}, AUC {value_interval(sets.block(name)['metrics']['auc'])}"
            style = "--" if name == OUT_OF_FOLD and len(sets.folds) > 1 else "-"
            axes.plot(fpr, tpr, color=INK if style == "--" else SET_COLOURS[name], lw=1.6, ls=style, label=text)
            drawn = True
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return with_legend(figure, axes, "lower right") if drawn else None


def draw_fold_rocs(axes: Axes, sets: Sets) -> bool:
    """Every fold's curve thin, their vertical mean thick, one SD as a band."""
    curves = [roc_points(t["label"] == 1, t["p_1"]) for t in sets.folds if t["label"].nunique() == 2]
    if len(curves) < 2:
        return False
    for fpr, tpr in curves:
        axes.plot(fpr, tpr, color=SKY, lw=0.7, alpha=max(0.25, 0.8 - 0.02 * len(curves)))
    grid = np.linspace(0, 1, 201)
    sampled = np.array([np.interp(grid, fpr, tpr) for fpr, tpr in curves])
    sampled[:, 0] = 0
    mean, sd = sampled.mean(axis=0), sampled.std(axis=0, ddof=1)
    axes.fill_between(grid, np.clip(mean - sd, 0, 1), np.clip(mean + sd, 0, 1), color=BLUE, alpha=0.13, lw=0)
    summary = sets.metrics["cross_validation"]["metrics"]["auc"]
    text = f"mean of {len(curves)} folds, AUC {shown(summary['mean'])} ± {shown(summary['sd'])}"
    axes.plot(grid, mean, color=BLUE, lw=2.2, label=text)
    return True


def precision_recall_figure(sets: Sets) -> Figure | None:
    """Precision against recall, with each set's prevalence: what a coin would reach."""
    figure, axes = new_figure()
    drawn = False
    if len(sets.classes) > 2:
        drawn = draw_per_class(axes, sets, precision_recall_points, "average_precision", "AP", where="post")
    else:
        curves = [precision_recall_points(t["label"] == 1, t["p_1"]) for t in sets.folds if t["label"].nunique() == 2]
        for x, y in curves if len(curves) > 1 else []:
            axes.plot(x, y, color=SKY, lw=0.7, alpha=max(0.25, 0.8 - 0.02 * len(curves)), drawstyle="steps-post")
        for name, table in two_class_sets(sets):
            colour = SET_COLOURS[name]
            x, y = precision_recall_points(table["label"] == 1, table["p_1"])
            text = f"{name}, AP {shown(sets.block(name)['metrics']['average_precision']['value'])}"
            axes.plot(x, y, color=colour, lw=2, drawstyle="steps-post", label=text)
            prevalence = float((table["label"] == 1).mean())
            axes.axhline(prevalence, color=colour, lw=0.9, ls=":", label=f"prevalence {prevalence:.2f}")
            drawn = True
    axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return with_legend(figure, axes, "lower left") if drawn else None


def draw_per_class(
    axes: Axes,
    sets: Sets,
    points: Callable[[pd.Series, pd.Series], tuple[np.ndarray, np.ndarray]],
    metric: str,
    short: str,
    where: str | None = None,
) -> bool:
    """One curve a class and set, each class against the rest: out-of-fold solid, test dashed."""
    drawn = False
    for name, table in sets.held_out.items():
        dashed = name == TEST_ENSEMBLE and OUT_OF_FOLD in sets.held_out
        for c, label in enumerate(sets.classes):
            truth = table["label"] == c
            if not truth.any() or truth.all():
                continue
            x, y = points(truth, table[f"p_{c}"])
            value = sets.block(name)["per_class"][label][metric]["value"]
            colour = CLASS_COLOURS[c % len(CLASS_COLOURS)]
            text = f"{as_label(label)}, {'test' if name == TEST_ENSEMBLE else name}, {short} {shown(value)}"
            steps = f"steps-{where}" if where else "default"
            axes.plot(x, y, color=colour, lw=1.6, ls="--" if dashed else "-", label=text, drawstyle=steps)
            if where:
                axes.axhline(float(truth.mean()), color=colour, lw=0.7, ls=":")
            drawn = True
    return drawn


def calibration_figure(sets: Sets) -> Figure | None:
    """Reliability diagram in the bins of the ECE, with Wilson 95 % intervals, and how many slides are in each bin."""
    curves: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    if len(sets.classes) == 2:
        for name, table in sets.held_out.items():
            truth = (table["label"] == 1).to_numpy()
            curves.append((name, SET_COLOURS[name], truth, table["p_1"].to_numpy()))
    elif sets.held_out:
        name, table = next(iter(sets.held_out.items()))
        for c, label in enumerate(sets.classes):
            truth = (table["label"] == c).to_numpy()
            curves.append(
                (f"{as_label(label)}, {name}", CLASS_COLOURS[c % len(CLASS_COLOURS)], truth, table[f"p_{c}"].to_numpy())
            )
    if not curves:
        return None
    figure = Figure(figsize=(5.2, 4.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    style(upper)
    style(lower)
    upper.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    width = 0.8 / len(curves) / ECE_BINS
    for i, (text, colour, truth, p) in enumerate(curves):
        bins = calibration_bin(p)
        n = np.bincount(bins, minlength=ECE_BINS)
        filled = n > 0
        mean_p = np.bincount(bins, weights=p, minlength=ECE_BINS)[filled] / n[filled]
        hits = np.bincount(bins, weights=truth, minlength=ECE_BINS)[filled]
        rate = hits / n[filled]
        low, high = wilson(hits, n[filled])
        bars = np.clip([rate - low, high - rate], 0, None)
        many = n[filled] >= LINE_FROM
        upper.plot(mean_p[many], rate[many], color=colour, lw=1.4)
        upper.errorbar(mean_p, rate, yerr=bars, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2)
        upper.scatter(mean_p, rate, s=np.where(many, 26, 10), color=colour, zorder=3, label=text)
        centres = (np.arange(ECE_BINS) + 0.1) / ECE_BINS + width * (i + 0.5)
        lower.bar(centres, n, width=width, color=colour)
    lower.set(xlabel="predicted probability", ylabel="slides", xlim=(-0.02, 1.02))
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    upper.set(ylabel="observed fraction", ylim=(-0.02, 1.02))
    return with_legend(figure, upper, "upper left")


def confusion_figure(sets: Sets) -> Figure | None:
    """Confusion matrices: counts, and the share of the true class as shade; slides, below them patients."""
    blocks = {f"{name}, slides": sets.block(name) for name in sets.held_out}
    by_patient = [(f"{name}, patients", sets.block(name).get("patient_level")) for name in sets.held_out]
    blocks |= {title: block for title, block in by_patient if block}
    matrices = {title: np.array(b["confusion"]["matrix"]) for title, b in blocks.items() if b["confusion"]["matrix"]}
    if not matrices:
        return None
    n_columns = min(len(matrices), 2)
    n_rows = -(-len(matrices) // n_columns)
    figure = Figure(figsize=(5.2, 4.9 if n_columns == 1 else 0.4 + 3.0 * n_rows), layout="constrained")
    many = len(sets.classes) > 4
    names = [as_label(shortened(name, 14 if n_columns == 1 else 9)) for name in sets.classes]
    grid = np.ravel(figure.subplots(n_rows, n_columns, squeeze=False))
    for axes in grid[len(matrices) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid, matrices.items(), strict=False):
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        edges = np.arange(len(names) + 1) - 0.5
        axes.pcolormesh(edges, edges, share, cmap=BLUES, vmin=0, vmax=1, edgecolors="white", linewidth=1)
        axes.set(aspect="equal", ylim=(len(names) - 0.5, -0.5))
        for row, column in np.ndindex(matrix.shape):
            text = f"{matrix[row, column]}" if many else f"{matrix[row, column]}\n{share[row, column]:.0%}"
            colour = "white" if share[row, column] > 0.65 else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7 if many else 10)
        ticks = range(len(names))
        axes.set_xticks(ticks, names, fontsize=8, rotation=40 if many else 0, ha="right" if many else "center")
        axes.set_yticks(ticks, names, fontsize=8, rotation=0 if many else 90, va="center")
        axes.set_xlabel("predicted", color=MUTED, fontsize=9)
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
    figure.axes[0].set_ylabel("true", color=MUTED, fontsize=9)
    return figure


def loss_figure(sets: Sets) -> Figure | None:
    return training_figure(sets, "loss", "loss")


def auc_figure(sets: Sets) -> Figure | None:
    return training_figure(sets, "auc", "AUC")


def training_figure(sets: Sets, quantity: str, label: str) -> Figure | None:
    """Train and val curves: members thin, the mean of those still training thick, the kept epoch marked if selected."""
    history = sets.history
    parts = [("train", BLUE), ("val", VERMILLION)]
    parts = [
        (part, c)
        for part, c in parts
        if f"{part}_{quantity}" in history and history[f"{part}_{quantity}"].notna().any()
    ]
    if not parts:
        return None
    figure, axes = new_figure(height=3.9)
    kept = sets.plan.set_index("member")["best_epoch"]
    selected = bool((sets.plan["best_epoch"] < sets.plan["epochs"]).any())
    for part, colour in parts:
        wide = history.pivot_table(index="epoch", columns="member", values=f"{part}_{quantity}")
        axes.plot(wide.index, wide, color=colour, lw=0.7, alpha=max(0.15, 0.5 - 0.01 * wide.shape[1]))
        if wide.shape[1] > 1:
            running = wide.dropna()  # a mean over changing members would jump
            axes.plot(
                running.index, running.mean(axis=1), color=colour, lw=2.2, label=f"{part}, mean of {wide.shape[1]}"
            )
        else:
            axes.lines[-1].set(lw=2, alpha=1, label=part)
        if selected and part == parts[-1][0]:
            points = [(kept[m], wide[m].get(kept[m], np.nan)) for m in wide.columns if m in kept.index]
            axes.plot(
                *zip(*points, strict=True), ls="", marker="o", ms=4.5, mfc="white", mec=INK, label="epoch that was kept"
            )
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if quantity == "auc":
        axes.set_ylim(top=1.005)
    return with_legend(figure, axes, "lower right" if quantity == "auc" else "upper right")


def learning_curve_figure(sets: Sets) -> Figure | None:
    """AUC against the number of training patients: every member a dot, mean and one SD over them."""
    curve = sets.metrics.get("learning_curve")
    if not curve:
        return None
    figure, axes = new_figure(height=3.9)
    points = curve["points"]
    parts = (("cross_validation", "held-out folds", BLUE), ("test", "test split", VERMILLION))
    for k, (name, text, colour) in enumerate(parts):
        found = [(p["patients"] * (1 + 0.03 * k), p[name]) for p in points if p[name]]
        known = [(x, block) for x, block in found if block["metrics"]["auc"]["mean"] is not None]
        if not known:
            continue
        for x, block in known:
            dots = [auc for auc in block["auc"] if auc is not None]
            beside = [x * (0.97 + 0.06 * k)] * len(dots)
            axes.plot(beside, dots, ls="", marker="o", ms=3, color=colour, alpha=0.45, mec="none")
        x = [x for x, _ in known]
        mean = [block["metrics"]["auc"]["mean"] for _, block in known]
        sd = np.array([block["metrics"]["auc"]["sd"] or 0 for _, block in known])
        bars = [sd, np.minimum(sd, 1 - np.array(mean))]  # an AUC ends at 1
        look: dict[str, Any] = {"color": colour, "lw": 2, "elinewidth": 1.4, "capsize": 3, "marker": "o", "ms": 5}
        axes.errorbar(x, mean, bars, label=f"{text}, mean ± SD", **look)
    axes.set_xscale("log")
    ticks = [p["patients"] for p in points]
    axes.set_xticks(ticks, [f"{p['patients']:.0f}\n{p['slides']:.0f}" for p in points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="patients (below: slides) trained on, logarithmic", ylabel=auc_label(sets.classes))
    axes.set_ylim(top=1.01)
    return with_legend(figure, axes, "lower right")


def auc_label(classes: Sequence[str]) -> str:
    return "AUC" if len(classes) == 2 else "macro AUC"


FIGURES: dict[str, tuple[str, Callable[[Sets], Figure | None]]] = {
    "roc": ("ROC", roc_figure),
    "precision_recall": ("Precision and recall", precision_recall_figure),
    "calibration": ("Calibration", calibration_figure),
    "confusion": ("Confusion", confusion_figure),
    "loss": ("Loss", loss_figure),
    "auc": ("AUC while training", auc_figure),
    "learning_curve": ("AUC against training patients", learning_curve_figure),
}

CAPTIONS = {
    "roc": "Thin: each fold on the slides it held out. Band: mean ± one SD of the folds. Dotted: chance.",
    "precision_recall": "Thin: each fold. Dotted: prevalence, the precision of calling slides at random.",
    "calibration": "On the dotted line, probabilities mean what they say. Bars: 95 % Wilson interval of the fraction. "
    f"Large dots, joined: bins of at least {LINE_FROM} slides.",
    "confusion": "Shade and percentage: share of the true class.",
    "loss": "Thin: one member. Thick: mean over members.",
    "auc": "Thin: one member. Thick: mean over members. Training AUC says nothing about new slides.",
    "learning_curve": "Dots: one member each. A curve that still rises at its right end: more patients would help.",
}
CAPTIONS_MANY = {
    "roc": "Each class against the rest. Dotted: chance.",
    "precision_recall": "Each class against the rest. Dotted: its prevalence.",
    "calibration": "Each class against the rest. On the dotted line, probabilities mean what they say.",
}


def comparison_figure(studies: Mapping[str, dict[str, Any]]) -> Figure:
    """AUC of every aggregator: folds' mean ± SD, pooled and test ensemble with their intervals."""
    kinds = (
        ("folds, mean ± SD", GREEN, "s"),
        ("out-of-fold, pooled", BLUE, "o"),
        ("test ensemble", VERMILLION, "D"),
    )
    figure = Figure(figsize=(5.6, 1.0 + 0.6 * len(studies)), layout="constrained")
    axes = figure.subplots()
    style(axes)
    for k, (text, colour, marker) in enumerate(kinds):
        found = np.array([headline(metrics)[k] for metrics in studies.values()], dtype=np.float64)
        y = np.arange(len(studies)) + 0.22 * (k - 1)
        if np.isfinite(found[:, 0]).any():
            axes.hlines(y, found[:, 1], np.minimum(found[:, 2], 1), color=colour, lw=1.6)
            axes.plot(found[:, 0], y, ls="", marker=marker, ms=6, color=colour, label=text)
    left = min(axes.get_xlim()[0], 0.95)
    axes.set(xlim=(max(left, -0.01), 1.005), xlabel=as_label(auc_name(next(iter(studies.values())))))
    axes.set_yticks(range(len(studies)), [as_label(name) for name in studies], fontsize=9.5)
    axes.set_ylim(len(studies) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK, handletextpad=0.3)
    return figure


def new_figure(height: float = 4.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5)
    axes.xaxis.label.set(color=INK, size=9.5)
    axes.yaxis.label.set(color=INK, size=9.5)
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)


def with_legend(
    figure: Figure, axes: Axes, place: Literal["lower right", "lower left", "upper left", "upper right"]
) -> Figure:
    """The figure with a legend that does not hide the curves: below the axes where it is long."""
    handles, labels = axes.get_legend_handles_labels()
    size = 8.5 if len(labels) <= 6 else 7
    if len(labels) > 10:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=size, labelcolor=INK)
    elif handles:
        axes.legend(loc=place, frameon=True, framealpha=0.85, edgecolor="none", fontsize=size, labelcolor=INK)
    return figure


def two_class_sets(sets: Sets) -> Iterable[tuple[str, pd.DataFrame]]:
    return [(name, table) for name, table in sets.held_out.items() if table["label"].nunique() == 2]


def roc_points(truth: pd.Series, p: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    fpr, tpr, _ = roc_curve(truth, p)
    return fpr, tpr


def precision_recall_points(truth: pd.Series, p: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    precision, recall, _ = precision_recall_curve(truth, p)
    return recall, precision


def wilson(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a proportion (Wilson 1927)."""
    z = 1.959964
    rate = hits / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def to_svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an inline SVG element: no outside reference, ids that differ from those of other figures."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would apply to the whole page; the page has it too
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    if box is None:
        raise RuntimeError(f"figure {name}: expected matplotlib's SVG to have a viewBox, got {head!r}")
    new = {old: f"{name}-{i}" for i, old in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', rest)))}
    rest = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{new[m[1]]}"', rest)
    rest = re.sub(r'(url\(#|href="#)([^")]+)', lambda m: m[1] + new[m[2]], rest)
    alt = Markup.escape(title)
    return Markup(f'<svg {box[0]} role="img" aria-label="{alt}">') + Markup(rest)


# --- the page -------------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    *,
    title: str,
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    history: pd.DataFrame,
    classes: Sequence[str],
    config_yaml: str,
    environment: dict[str, Any],
    notes: Sequence[str] = (),
    heatmaps: Sequence[Mapping[str, Any]] = (),
    bootstrap: int = 1000,
    seed: int = 0,
    choices: pd.DataFrame | None = None,
    also: Mapping[str, Any] | None = None,
    thresholds: pd.DataFrame | None = None,
    members_file: str = "predictions.csv",
    never_trained_on: bool = True,
) -> dict[str, Any]:
    """Write metrics.json, slides.csv, patients.csv, figures/*.png, report.html into `folder`; give the metrics.

    Args:
        title: heading of the page.
        predictions, plan, classes, bootstrap, seed, choices, thresholds: as for `summarise`.
        history: one row a member and epoch (from 1): member, epoch, train_loss, train_auc, val_loss, val_auc.
        config_yaml: the resolved config, shown as it is.
        environment: versions, hardware and the like, shown as a table.
        notes: what the reader must know, for instance slides that were dropped.
        also: further numbers for metrics.json, such as `learning_curve`.
        members_file: the file beside the page that holds `predictions`.
        heatmaps: single slides with their tile scores, as `mil.scenes.for_report` gives them.
        never_trained_on: False where the test slides may be of patients that members trained on.
    """
    thresholds = member_thresholds(predictions, classes) if thresholds is None else thresholds
    metrics = summarise(
        predictions, plan, classes, bootstrap=bootstrap, seed=seed, choices=choices, thresholds=thresholds
    ) | dict(also or {})
    slides = slides_table(predictions, classes, thresholds)
    sets = make_sets(predictions, plan, history, classes, metrics, thresholds)
    captions = CAPTIONS | CAPTIONS_MANY if len(classes) > 2 else CAPTIONS
    shown_figures = []
    for name, (heading, draw) in FIGURES.items():
        figure = draw(sets)
        if figure is None:
            continue
        save_png(folder / "figures" / f"{name}.png", figure)
        shown_figures.append(
            {"name": name, "title": heading, "svg": to_svg(figure, name, heading), "caption": captions[name]}
        )
    page = render(
        "study",
        metrics,
        title=title,
        figures=shown_figures,
        slides=slides[slides["error"].notna()].head(MOST_WRONG).to_dict("records"),
        notes=list(notes),
        heatmaps=list(heatmaps),
        config_yaml=config_yaml,
        environment={str(key): plain_text(value) for key, value in environment.items()},
        members_file=members_file,
        never_trained_on=never_trained_on,
    )
    for file, table in (("slides.csv", slides), ("patients.csv", patients_table(slides, classes))):
        with replace_on_success(folder / file) as temporary:
            table.to_csv(temporary, index=False)
    with replace_on_success(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with replace_on_success(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return metrics


def write_overview(
    folder: Path,
    studies: Mapping[str, dict[str, Any]],
    *,
    differences: pd.DataFrame | None = None,
    links: Mapping[str, str] | None = None,
    title: str = "Comparison of aggregators",
) -> str:
    """Compare studies on one plan: report.html, comparison.csv, comparison.md, differences.csv, figures/comparison.png.

    Args:
        folder: where they are written.
        studies: name -> what `write_report` gave.
        differences: as `mil.comparison.differences` gives it; None = left out.
        links: name -> the study's own page as seen from `folder`; default NAME/report.html.

    Returns:
        The table for the terminal.
    """
    if not studies:
        raise ValueError("expected at least one study to compare, got none")
    figure = comparison_figure(studies)
    save_png(folder / "figures" / "comparison.png", figure)
    page = render(
        "comparison",
        dict(studies),
        title=title,
        svg=to_svg(figure, "comparison", "AUC of every aggregator"),
        rows=[
            {"name": name, "href": quote((links or {}).get(name, f"{name}/report.html")), "metrics": m}
            for name, m in studies.items()
        ],
        differences=difference_rows(differences),
        first=next(iter(studies.values())),
    )
    with replace_on_success(folder / "comparison.csv") as temporary:
        comparison_table(studies).to_csv(temporary, index=False)
    if differences is not None:
        with replace_on_success(folder / "differences.csv") as temporary:
            differences.to_csv(temporary, index=False)
    with replace_on_success(folder / "comparison.md") as temporary:
        temporary.write_text(overview_markdown(studies, differences), encoding="utf-8")
    with replace_on_success(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return overview_text(studies, differences)


def render(kind: str, metrics: dict[str, Any], **values: Any) -> str:
    """The page from its template. `num(*keys)` writes the number at that place in `metrics` and its JSON pointer."""

    def num(*keys: Any) -> Markup:
        keys = tuple(k for key in keys for k in (key if isinstance(key, list) else [key]))
        value: Any = metrics
        for key in keys:
            value = value[key]
        pointer = "/" + "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        text = shown(value) if isinstance(value, float) or value is None else str(value)
        css = "undefined" if value is None else "n"
        return Markup('<span class="{}" data-key="{}">{}</span>').format(css, pointer, text)

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shown"] = shown
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(kind=kind, m=metrics, num=num, titles={k: v.title for k, v in METRICS.items()}, **values)


def save_png(path: Path, figure: Figure) -> None:
    with replace_on_success(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    figure.set_layout_engine("none")  # laid out once; the SVG takes it as it is


# --- the terminal ---------------------------------------------------------------------------------------------------


def terminal_table(metrics: dict[str, Any]) -> str:
    """A few aligned lines: AUC of the folds, pooled, of the test members and of the test ensemble."""
    folds = metrics["folds"]
    test = metrics["test"]
    lines = []
    if metrics["cross_validation"]:
        summary = metrics["cross_validation"]["metrics"]["auc"]
        repeats = sorted({fold["repeat"] for fold in folds})
        listed = [[shown(f["metrics"]["auc"]) for f in folds if f["repeat"] == r] for r in repeats]
        text = " ".join(listed[0]) if len(repeats) == 1 and len(listed[0]) <= 10 else ""
        lines.append(
            ("cross-validation, mean ± SD", f"{mean_sd(summary)}", f"{len(folds)} folds{': ' + text if text else ''}")
        )
        if not text:
            for r, values in list(zip(repeats, listed, strict=True))[:5]:
                more = f" and {len(values) - 10} more" if len(values) > 10 else ""
                lines.append((f"  repeat {r}", "", " ".join(values[:10]) + more))
            if len(repeats) > 5:
                lines.append(("", "", f"{len(repeats) - 5} more repeats in metrics.json"))
    if "nested" in metrics:
        lines += nested_lines(metrics["nested"])
    if metrics["pooled_out_of_fold"]:
        lines.append(ensemble_line("out-of-fold, pooled", metrics["pooled_out_of_fold"]))
    if test:
        values = [shown(member["metrics"]["auc"]) for member in test["members"]]
        text = f"{len(values)} members" + (": " + " ".join(values) if len(values) <= 10 else "")
        lines.append(("test, mean ± SD of members", mean_sd(test["over_members"]["auc"]), text))
        lines.append(ensemble_line("test, ensemble of members", test["ensemble"]))
    for point in (metrics.get("learning_curve") or {"points": []})["points"]:
        block = point["cross_validation"] or point["test"]
        size = "all patients" if point["train_size"] is None else f"{point['train_size']} patients"
        lines.append((f"trained on {size}", mean_sd(block["metrics"]["auc"]), f"{point['slides']:.0f} slides"))
    widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
    head = f"{auc_name(metrics)}; 95 % intervals from {metrics['bootstrap']['resamples']} resamples of patients"
    rows = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines]
    return "\n".join([head, *(rows or ["  nothing was held out: no metric"])])


def nested_lines(nested: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What nested cross-validation chose and how far the inner score can be trusted."""
    stability, cells = nested["stability"], nested["cells"]
    most = cells[stability["most_chosen"]]
    epochs, n = stability["epochs"], len(nested["choices"])
    choice = f"lr {most['lr']:g}, weight decay {most['weight_decay']:g} in {most['chosen']} of {n}"
    span = f"epochs {epochs['min']} to {epochs['max']}, median {epochs['median']:g}"
    inner = plain_mean_sd(nested["inner_auc"])
    return [
        ("  inner folds, of the choice", inner, f"{choice}; {span}"),
        ("  optimism, inner - outer", plain_mean_sd(nested["optimism"], sign="+"), ""),
    ]


def plain_mean_sd(summary: dict[str, Any], sign: str = "") -> str:
    """`0.931 ± 0.020`, with a sign if asked for; SD left out when there is one value."""
    if summary["mean"] is None:
        return UNDEFINED
    return f"{summary['mean']:{sign}.3f}" + ("" if summary["sd"] is None else f" ± {summary['sd']:.3f}")


def ensemble_line(text: str, block: dict[str, Any]) -> tuple[str, str, str]:
    n = block["counts"]
    return text, value_interval(block["metrics"]["auc"]), f"{n['slides']} slides, {n['patients']} patients"


OVERVIEW = ("", "cross-validation", "out-of-fold, pooled", "test ensemble")
DIFFERENCES = ("difference in AUC", "set", "a - b", "DeLong's p")


def overview_text(studies: Mapping[str, dict[str, Any]], differences: pd.DataFrame | None = None) -> str:
    """One line a study, then one a difference, aligned."""
    rows = overview_rows(studies)
    head = f"{auc_name(next(iter(studies.values())))}: mean ± SD of folds; [95 % interval over patients]"
    lines = [head, *aligned([OVERVIEW, *rows])]
    pairs = difference_rows(differences)
    return "\n".join([*lines, "", *aligned([DIFFERENCES, *pairs])] if pairs else lines)


def overview_markdown(studies: Mapping[str, dict[str, Any]], differences: pd.DataFrame | None = None) -> str:
    """The same tables for a paper or a page."""
    lines = [f"{auc_name(next(iter(studies.values())))}: mean ± SD of folds, [95 % interval over patients].", ""]
    lines += markdown_table(OVERVIEW, overview_rows(studies))
    pairs = difference_rows(differences)
    if pairs:
        lines += ["", "Paired, [95 % interval, patients resampled]; DeLong's test takes slides as independent.", ""]
        lines += [*markdown_table(DIFFERENCES, pairs)]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def overview_rows(studies: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Name, folds, pooled out-of-fold and test ensemble of every study, as text."""
    rows: list[tuple[str, ...]] = []
    for name, metrics in studies.items():
        cells = ["-", "-", "-"]
        if metrics["cross_validation"]:
            cells[0] = mean_sd(metrics["cross_validation"]["metrics"]["auc"])
        if metrics["pooled_out_of_fold"]:
            cells[1] = value_interval(metrics["pooled_out_of_fold"]["metrics"]["auc"])
        if metrics["test"]:
            cells[2] = value_interval(metrics["test"]["ensemble"]["metrics"]["auc"])
        rows.append((name, *cells))
    return rows


def difference_rows(differences: pd.DataFrame | None) -> list[tuple[str, ...]]:
    """Pair, set, difference with interval, p, as text."""
    rows: list[tuple[str, ...]] = []
    for row in [] if differences is None else differences.astype(object).to_dict("records"):
        numbers = (row[key] for key in ("difference", "low", "high", "delong_p"))
        value, low, high, p = (None if pd.isna(number) else float(number) for number in numbers)
        text = UNDEFINED if value is None else f"{value:+.3f}"
        if value is not None and low is not None:
            text += f" [{low:+.3f}, {high:+.3f}]"
        shown_p = "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
        rows.append((f"{row['a']} - {row['b']}", str(row["set"]), text, shown_p))
    return rows


def comparison_table(studies: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a study: cv_auc_mean, cv_auc_sd, cv_folds, then value, low and high of out-of-fold and test ensemble."""
    rows = []
    for name, metrics in studies.items():
        _, pooled, test = headline(metrics)
        cv = metrics["cross_validation"]["metrics"]["auc"] if metrics["cross_validation"] else {}
        row = {
            "name": name,
            "cv_auc_mean": cv.get("mean"),
            "cv_auc_sd": cv.get("sd"),
            "cv_folds": len(metrics["folds"]),
        }
        row |= {"oof_auc": pooled.value, "oof_auc_low": pooled.low, "oof_auc_high": pooled.high}
        row |= {"test_auc": test.value, "test_auc_low": test.low, "test_auc_high": test.high}
        rows.append(row)
    return pd.DataFrame(rows)


class Headline(NamedTuple):
    """An AUC with the ends of its line in a figure; None where undefined or absent."""

    value: float | None
    low: float | None
    high: float | None


def headline(metrics: dict[str, Any]) -> tuple[Headline, Headline, Headline]:
    """AUC over folds (low and high: mean -+ SD), pooled out-of-fold and of the test ensemble (95 % interval)."""
    folds = ensemble = pooled = Headline(None, None, None)
    if metrics["cross_validation"]:
        cv = metrics["cross_validation"]["metrics"]["auc"]
        ends = (None, None) if cv["sd"] is None else (cv["mean"] - cv["sd"], cv["mean"] + cv["sd"])
        folds = Headline(cv["mean"], *ends)
    if metrics["pooled_out_of_fold"]:
        number = metrics["pooled_out_of_fold"]["metrics"]["auc"]
        pooled = Headline(number["value"], number["low"], number["high"])
    if metrics["test"]:
        number = metrics["test"]["ensemble"]["metrics"]["auc"]
        ensemble = Headline(number["value"], number["low"], number["high"])
    return folds, pooled, ensemble


def auc_name(metrics: dict[str, Any]) -> str:
    if metrics["positive_class"] is None:
        return f"macro AUC of {len(metrics['classes'])} classes, one against the rest"
    return f"AUC of {metrics['positive_class']!r} against {metrics['classes'][0]!r}"


def value_interval(number: dict[str, Any]) -> str:
    """`0.931 [0.890, 0.962]`, `0.931` without an interval, `undefined`."""
    if number["low"] is None:
        return shown(number["value"])
    return f"{shown(number['value'])} [{shown(number['low'])}, {shown(number['high'])}]"


def mean_sd(summary: dict[str, Any]) -> str:
    """`0.931 ± 0.020`; SD left out when there is one value; how many were undefined."""
    text = shown(summary["mean"]) + ("" if summary["sd"] is None else f" ± {shown(summary['sd'])}")
    return text + (f" ({summary['undefined']} undefined)" if summary["undefined"] and summary["n"] else "")


def shown(number: float | None) -> str:
    """Three decimals, or `undefined`."""
    return UNDEFINED if number is None or np.isnan(number) else f"{number:.3f}"


def shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def as_label(name: str) -> str:
    """A name as matplotlib shows it unchanged: a dollar would start a formula, a leading underscore hides a label."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def plain_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain_text(inner) for inner in value)
    return str(value)
