"""Predictions -> the dictionary that `metrics.json` holds: every number of a study that is reported anywhere.

"Tables of slides" are those of `mil.results.tables`. Axes: S slides, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from extract.wording import at_most
from mil.results.calibration_interval import calibration_error
from mil.results.intervals import by_patient
from mil.results.metric_intervals import Measured, of_all, of_class
from mil.results.tables import (
    check_tables,
    held_out,
    held_out_ensemble,
    label_index,
    mean_of_logits,
    member_thresholds,
    of_test_split,
    p_columns,
    pooled_out_of_fold,
)
from mil.results.trainings import auc_with_training, trainings_of
from mil.tasks.estimates import LEVEL, METHODS, Estimate
from mil.tasks.metrics import METRICS, against_the_rest, class_metrics, confusion, decide, none_if_nan, weighted_metrics


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
        bootstrap: samples for the interval of the calibration error (at most 400 are drawn); 0 for no
            interval at all, of any metric.
        seed: of the bootstrap.
        choices: of nested cross-validation, as `mil.study.nested.choose` gives it.
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
        **({"intervals": about_intervals()} if bootstrap else {}),
        "warnings": warnings_about(predictions, plan, nested=choices is not None),
        "diverged": diverged_members(plan),
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
        "pooled_out_of_fold": pooled_block(predictions, classes, thresholds, pooled, bootstrap, seed),
        "test": test_block(predictions, plan, classes, thresholds, tested, bootstrap, seed) if len(tested) else None,
    }


def about_intervals() -> dict[str, Any]:
    """What the intervals hold, and what the methods named beside every number are."""
    return {
        "level": LEVEL,
        "unit": "patient",
        "cover": "other patients, scored by these trained members; `with_training`: also trained again with other "
        "seeds and folds, on the same training patients",
        "methods": METHODS,
    }


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
        "notes": edge_notes(choices),
        "inner_auc": number_mean_sd([c["inner_auc"] for c in chosen]),
        "optimism": number_mean_sd([c["optimism"] for c in chosen]),
        "method": "cell and epochs by the highest mean inner AUC (ties: fewer epochs, then the first cell); refitted "
        "on the whole outer training part; optimism = inner AUC of the choice - AUC on the outer test fold. Inner "
        "members train on fewer slides than the refitted one, which lowers their AUC and with it this difference",
    }


def edge_notes(choices: pd.DataFrame) -> list[str]:
    """Choices at an end of what was tried, beyond which something better may lie."""
    chosen, notes = choices[choices["chosen"]], []
    for name, title in (("lr", "learning rate"), ("weight_decay", "weight decay")):
        tried = sorted(choices[name].unique().tolist())
        if len(tried) < 2:
            continue
        ends = [(tried[0], "smaller")] if tried[0] > 0 else []  # no weight decay is below none
        for value, direction in [*ends, (tried[-1], "larger")]:
            n = int((chosen[name] == value).sum())
            if n:
                notes.append(
                    f"{n} of {len(chosen)} chose the {title} {value:g}, an end of what was tried: {direction} ones "
                    "may be better"
                )
    if "epochs_tried" in choices:
        n = int((chosen["epochs"] == chosen["epochs_tried"]).sum())
        if n:
            notes.append(
                f"{n} of {len(chosen)} chose the last of {int(chosen['epochs_tried'].max())} epochs: more "
                "(train.epochs) may be better"
            )
    return notes


def number_mean_sd(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, SD (n - 1) and n of the numbers that are defined."""
    known = [v for v in values if v is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
    }


def diverged_members(plan: pd.DataFrame) -> list[dict[str, int]]:
    """Members whose loss or weights stopped being finite numbers, and the epoch in which they did."""
    if "diverged" not in plan:  # of an earlier version
        return []
    rows = plan[plan["diverged"].notna()]
    return [{"member": int(m), "epoch": int(e)} for m, e in zip(rows["member"], rows["diverged"], strict=True)]


def about_diverged(plan: pd.DataFrame) -> list[str]:
    """A sentence for each member that diverged, and one about what to do."""
    lr, kept = plan.set_index("member")["lr"], plan.set_index("member")["best_epoch"]
    found = []
    for row in diverged_members(plan):
        m, epoch = row["member"], row["epoch"]
        since = "its predictions are not numbers" if kept[m] >= epoch else f"its weights after epoch {kept[m]} are kept"
        found.append(
            f"member {m} diverged in epoch {epoch} (lr {lr[m]:g}): its loss or weights were no longer finite numbers, "
            f"it trained no further, {since}"
        )
    if found:
        found = at_most(found, 10)
        found.append("where members diverge: train.lr smaller, a tenth for instance, or train.standardize=true")
    return found


def warnings_about(predictions: pd.DataFrame, plan: pd.DataFrame, *, nested: bool = False) -> list[str]:
    """What a reader must know before trusting the averages."""
    found = about_diverged(plan)
    p = predictions[[c for c in predictions.columns if c.startswith("p_")]]
    bad = predictions[~np.isfinite(p.to_numpy(dtype=np.float64)).all(axis=1)]
    told = {row["member"] for row in diverged_members(plan)}
    for member, count in bad[~bad["member"].isin(told)].groupby("member").size().items():
        found.append(
            f"member {member}: {count} predictions are not numbers (training diverged?); every figure that needs them "
            "is undefined"
        )
    for name in ("lr", "weight_decay"):
        if len(plan[name].unique()) > 1 and not nested:  # nested: chosen for each fold, as it should be
            values = ", ".join(f"{value:g}" for value in sorted(plan[name].unique()))
            found.append(f"members differ in {name} ({values}); means and ensembles mix them")
    return found


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
    """Mean and SD over the folds, of all repeats together and of each; a fold's value is the mean of its seeds."""
    repeats = sorted({fold["repeat"] for fold in folds})
    return {
        "metrics": over_folds(folds),
        "folds": len({(fold["repeat"], fold["fold"]) for fold in folds}),
        "seeds": len({fold["seed"] for fold in folds}),
        "repeats": [{"repeat": r, "metrics": over_folds([f for f in folds if f["repeat"] == r])} for r in repeats],
        "method": "mean and standard deviation (n - 1) over the folds of what members reach on the slides that they "
        "held out; a fold's value is the mean of its seeds. sd_seeds: standard deviation of the seeds within a fold, "
        "the root mean square over folds",
    }


def over_folds(members: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per metric, over folds: mean, sd (n - 1), n, undefined, as `mean_and_sd`; and sd_seeds, within folds."""
    rounds: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for member in members:
        rounds.setdefault((member["repeat"], member["fold"]), []).append(member)
    each = [mean_and_sd(own) for own in rounds.values()]
    summary = mean_and_sd([{"metrics": {name: one[name]["mean"] for name in METRICS}} for one in each])
    for name in METRICS:
        within = [one[name]["sd"] for one in each if one[name]["sd"] is not None]
        summary[name]["sd_seeds"] = float(np.sqrt(np.mean(np.square(within)))) if within else None
    return summary


def pooled_block(
    predictions: pd.DataFrame,
    classes: Sequence[str],
    thresholds: pd.DataFrame,
    pooled: pd.DataFrame,
    resamples: int,
    seed: int,
) -> dict[str, Any] | None:
    """The cross-validated slides together: the ensemble of their trainings, and each training alone."""
    if pooled.empty:
        return None
    rows = predictions[held_out(predictions)]
    return {
        **evaluate(pooled, classes, resamples, seed),
        **models_a_slide(pooled),
        "single_training": single_training(rows, classes, thresholds),
        "with_training": with_training(pooled, rows, classes) if resamples else None,
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
    """The official test split: each member, their mean and SD, the ensemble, and that of each training alone."""
    members = [one_member(row, predictions, classes, thresholds, "test") for _, row in plan.iterrows()]
    members = [member for member in members if member["counts"]["slides"]]
    rows = predictions[of_test_split(predictions)]
    return {
        "members": members,
        "over_members": mean_and_sd(members),
        "ensemble": evaluate(tested, classes, resamples, seed) | models_a_slide(tested),
        "single_training": single_training(rows, classes, thresholds),
        "with_training": with_training(tested, rows, classes) if resamples else None,
        "method": f"mean of the logits of all {len(members)} members; its threshold is the mean of theirs, in log-odds",
    }


def models_a_slide(table: pd.DataFrame) -> dict[str, list[int]]:
    """The fewest and the most members behind a slide of the table."""
    return {"models_per_slide": [int(table["members"].min()), int(table["members"].max())]}


def single_training(rows: pd.DataFrame, classes: Sequence[str], thresholds: pd.DataFrame) -> dict[str, Any] | None:
    """What one training (a repeat with a seed) reaches by itself, mean and SD; None where there is only one."""
    tables = [mean_of_logits(own, classes, thresholds) for _, own in rows.groupby(["repeat", "seed"], sort=True)]
    if len(tables) < 2:
        return None
    each = [evaluate(table, classes, 0, 0, with_intervals=False) for table in tables]
    return {"trainings": len(each), **models_a_slide(pd.concat(tables)), "metrics": mean_and_sd(each)}


def with_training(table: pd.DataFrame, rows: pd.DataFrame, classes: Sequence[str]) -> dict[str, Any] | None:
    """The AUC of an ensemble of several trainings with an interval that holds training again (of three
    or more, see `mil.results.trainings.FEWEST`); None of one training."""
    labelled = table[table["label"] >= 0]
    trained = trainings_of(rows, labelled["slide"].tolist(), classes)
    if len(trained) < 2:
        return None
    labels_S, patients_S = labelled["label"].to_numpy(dtype=np.int64), labelled["patient"].to_numpy(dtype=str)
    return {"trainings": len(trained), "auc": as_number(auc_with_training(labels_S, trained, patients_S))}


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

    patients_S = table["patient"].to_numpy(dtype=str)

    def scored(
        metrics_of: Measured, estimated: Callable[..., dict[str, Estimate]], measured_on: Sequence[int]
    ) -> dict[str, Any]:
        values = {name: none_if_nan(v[0]) for name, v in metrics_of(one).items()} if finite else dict.fromkeys(METRICS)
        if not with_intervals:
            return values
        if not (finite and resamples and len(table)):
            return {name: without_interval(value) for name, value in values.items()}
        estimates = estimated(labels_S, p_SC, predicted_S, patients_S)
        numbers = {name: as_number(estimate, values[name]) for name, estimate in estimates.items() if name != "ece"}
        ece = {
            "value": values["ece"],
            **calibration_error(measured_on, labels_S, p_SC, patients_S, resamples, seed),
        }
        return {name: (numbers | {"ece": ece})[name] for name in METRICS}

    positives = against_the_rest(len(classes))
    block: dict[str, Any] = {
        "metrics": scored(partial(weighted_metrics, labels_S, p_SC, predicted_S), of_all, positives)
    }
    if len(classes) > 2:
        block["per_class"] = {
            name: scored(partial(class_metrics, c, labels_S, p_SC, predicted_S), partial(of_class, c), [c])
            for c, name in enumerate(classes)
        }
    block["confusion"] = {
        "rows": "true class",
        "columns": "predicted class",
        "matrix": confusion(labels_S, predicted_S, len(classes)).tolist() if finite else None,
    }
    return block


def as_number(estimate: Estimate, value: float | None = None) -> dict[str, Any]:
    """A number of metrics.json with its interval and the interval's method; an undefined number has none.

    value: where it is known from elsewhere, in the form in which it has always been written.
    """
    number = estimate.value if value is None else value
    if number is None or estimate.value is None or estimate.low is None:
        return without_interval(number)
    limits = {"low": estimate.low, "high": estimate.high, "method": estimate.method}
    return {"value": number, **limits, "resamples": 0, "undefined": 0}


def without_interval(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "method": None, "resamples": 0, "undefined": 0}


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
