"""Predictions of a task other than classification -> its tables, and the dictionary that its metrics.json holds.

As for classes, what is reported comes from `role == "test"` alone: slides that a member neither trained on nor was
selected with. Of several members that saw one slide the mean of what they say is taken.

Axes: M members, S slides, C outputs, R resamples, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mil.results.intervals import SCALES, Interval, resampled, scaled_interval
from mil.results.summary import about_diverged, diverged_members, edge_notes, number_mean_sd
from mil.results.tables import (
    NEVER_HELD_OUT,
    OUT_OF_FOLD,
    TEST_ENSEMBLE,
    UNUSED_ENSEMBLE,
    held_out,
    of_test_split,
)
from mil.study.units import COLUMN
from mil.tasks.contract import FEW, Facts, Part, Task
from mil.tasks.estimates import LEVEL, METHODS
from mil.tasks.metrics import none_if_nan

OF_SLIDE = ["slide", "patient", "label", "split"]


def task_predictions(
    task: Task, members: pd.DataFrame, slides: pd.DataFrame, roles_MS: np.ndarray, logits_MSC: np.ndarray, facts: Facts
) -> pd.DataFrame:
    """One row a member and slide: who, the target, what role, outputs, and what they mean (`Task.predicted`)."""
    columns = [*OF_SLIDE, *(name for name in (COLUMN, *task.targets) if name in slides and name not in OF_SLIDE)]
    table = members.loc[:, ["member", "repeat", "fold", "seed"]].merge(slides[columns], how="cross")
    table["role"] = roles_MS.astype(object).reshape(-1)
    for c in range(logits_MSC.shape[2]):
        table[f"output_{c}"] = logits_MSC[:, :, c].reshape(-1)
    said = [
        task.predicted(logits_SC, {name: values[m] for name, values in facts.items()})
        for m, logits_SC in enumerate(logits_MSC)
    ]
    return table.assign(**{name: np.concatenate([one[name] for one in said]) for name in task.columns()})


# --- sets of predictions -------------------------------------------------------------------------------------------


def ensemble(task: Task, rows: pd.DataFrame) -> pd.DataFrame:
    """One row a slide: the mean of what the members in `rows` say, NaN where one of them is not a number."""
    groups, columns = rows.groupby("slide", sort=True), task.columns()
    complete = groups[columns].count().eq(groups.size(), axis=0)
    targets = [name for name in task.targets if name not in OF_SLIDE]
    table = rows.drop_duplicates("slide").set_index("slide").sort_index()[[*OF_SLIDE[1:], *targets]]
    table[columns], table["members"] = groups[columns].mean().where(complete), groups.size()
    return table.reset_index()


def part_of(task: Task, rows: pd.DataFrame, predictions: pd.DataFrame, training: pd.DataFrame | None = None) -> Part:
    """The labelled slides of `rows`, members averaged, as the task counts them; and what these members trained on.

    training: where `predictions` are of new slides, those that the study trained on.
    """
    if training is not None:
        return Part(task.units(task.labelled(ensemble(task, rows))), training)
    own = predictions[predictions["member"].isin(rows["member"].unique()) & (predictions["role"] == "train")]
    return Part(task.units(task.labelled(ensemble(task, rows))), own.drop_duplicates("slide"))


def fold_parts(task: Task, predictions: pd.DataFrame, training: pd.DataFrame | None = None) -> list[Part]:
    """A part each fold of each repeat, its seeds averaged: the slides that it held out."""
    rows = predictions[held_out(predictions)]
    parts = [part_of(task, own, predictions, training) for _, own in rows.groupby(["repeat", "fold"], sort=True)]
    return [part for part in parts if len(part.table)]


def ensemble_parts(task: Task, predictions: pd.DataFrame, training: pd.DataFrame | None = None) -> list[Part]:
    """The official test split, all members averaged."""
    rows = predictions[of_test_split(predictions)]
    parts = [part_of(task, rows, predictions, training)] if len(rows) else []
    return [part for part in parts if len(part.table)]


def plain_metrics(task: Task, parts: Sequence[Part], names: Sequence[str] | None = None) -> dict[str, float | None]:
    """Every metric (or those of `names`) of the parts as they are."""
    wanted = [name for name in task.metrics if names is None or name in names]
    if not parts:
        return dict.fromkeys(wanted)
    values = task.score(parts, [np.ones((1, len(part.table))) for part in parts], names)
    return {name: none_if_nan(values[name][0]) for name in wanted}


def with_interval(value: float | None, interval: Interval, method: str | None) -> dict[str, Any]:
    """A number, its interval and the interval's method; an undefined number has none."""
    known = value is not None and interval.low is not None
    return {
        "value": value,
        "low": interval.low if known else None,
        "high": interval.high if known else None,
        "method": method if known else None,
        "resamples": interval.resamples,
        "undefined": interval.undefined,
    }


def metrics_with_intervals(
    task: Task,
    parts: Sequence[Part],
    resamples: int,
    seed: int,
    few: int = FEW,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Every metric (or those of `names`) with its interval: the task's own, or on the metric's scale from patients that
    are drawn with replacement, all their rows in all parts together; of slow metrics at most `few` such resamples."""
    values = plain_metrics(task, parts, names)
    patients = [str(patient) for part in parts for patient in part.table["patient"]]
    ends = np.cumsum([len(part.table) for part in parts])[:-1]
    own = task.estimates(parts) if resamples else {}
    found = {
        name: with_interval(values[name], Interval(one.low, one.high, 0, 0), one.method)
        for name, one in own.items()
        if name in values
    }
    left = [name for name in values if name not in own]
    quick = [name for name in left if name not in task.slow]
    for some, n in ((quick, resamples), ([name for name in left if name in task.slow], min(resamples, few))):

        def metrics_of(weights_RN: np.ndarray, some: list[str] = some) -> dict[str, np.ndarray]:
            return task.score(parts, np.split(weights_RN, ends, axis=1), some)

        drawn = resampled(metrics_of, patients, n, seed) if some else None
        for name in some:
            scale = SCALES[task.metrics[name].scale]
            none = Interval(None, None, 0, 0)
            limits = none if drawn is None else scaled_interval(values[name], drawn[name], scale, len(set(patients)))
            found[name] = with_interval(values[name], limits, scale.method)
    return {name: found[name] for name in values}


# --- metrics.json --------------------------------------------------------------------------------------------------


def summarise_task(
    task: Task,
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    about: dict[str, Any],
    *,
    resamples: int,
    seed: int,
    choices: pd.DataFrame | None = None,
    training: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """What `metrics.json` holds: plain numbers, lists and dictionaries; None where a number is undefined.

    Args:
        predictions: as `task_predictions` gives it. plan: as for `mil.results.summary.summarise`.
        about: what `Task.about` says.
        resamples: for the 95 % intervals, drawn patient by patient; 0 for none.
        choices: of nested cross-validation.
        training: where `predictions` are of new slides, those that the study trained on.
    """
    slides = predictions.drop_duplicates("slide")
    sets = {"all": slides, "cross_validated": slides[slides["split"] != "test"]}
    sets |= {"test": slides[slides["split"] == "test"]}
    folds = [one_member(task, row, predictions, "train", training) for _, row in plan.iterrows()]
    folds = [fold for fold in folds if fold["counts"]["slides"]]
    of_folds, of_test = (parts(task, predictions, training) for parts in (fold_parts, ensemble_parts))
    test = test_block(task, plan, predictions, of_test, resamples, seed, training) if of_test else None
    return {
        "task": {
            **{"name": task.name, "main": task.main, "noun": task.noun, **about},
            **{"options": task.config.model_dump(mode="json"), "classes": list(task.classes)},
        },
        "metric_titles": {name: measure.title for name, measure in task.metrics.items()},
        "lower_is_better": [name for name, measure in task.metrics.items() if not measure.higher_is_better],
        "bootstrap": {"resamples": resamples, "seed": seed, "unit": "patient", "level": LEVEL},
        **({"intervals": {"level": LEVEL, "unit": "patient", "methods": METHODS}} if resamples else {}),
        "warnings": about_diverged(plan),
        "diverged": diverged_members(plan),
        "counts": {name: counts(task, table) for name, table in sets.items()},
        "members": len(plan),
        "folds": folds,
        **({} if choices is None else {"nested": nested_block(task, choices, folds)}),
        "cross_validation": over_folds(task, folds) if folds else None,
        "pooled_out_of_fold": set_block(task, of_folds, resamples, seed),
        "test": test,
    }


def counts(task: Task, table: pd.DataFrame) -> dict[str, Any]:
    known = task.labelled(table)
    size = {"slides": len(table), "patients": int(table["patient"].nunique()), "unlabelled": len(table) - len(known)}
    return size | {"target": task.counts(known)}


def one_member(
    task: Task, member: pd.Series, predictions: pd.DataFrame, split: str, training: pd.DataFrame | None = None
) -> dict[str, Any]:
    """A member's metrics on the slides of `split` that it held out."""
    rows = predictions[predictions["member"] == member["member"]]
    of_split = rows["split"] == "test" if split == "test" else rows["split"] != "test"
    held = rows[of_split & (rows["role"] == "test")]
    part = part_of(task, held, predictions, training)
    return {
        **{name: int(member[name]) for name in ("member", "repeat", "fold", "seed", "epochs", "best_epoch")},
        **{name: float(member[name]) for name in ("lr", "weight_decay")},
        **{name: int(member[name]) for name in ("n_train", "n_val", "n_test")},
        "counts": counts(task, held.drop_duplicates("slide")),
        "metrics": plain_metrics(task, [part] if len(part.table) else []),
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    return number_mean_sd(values) | {"undefined": sum(value is None for value in values)}


def over_folds(task: Task, folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and SD (n - 1) over the folds; a fold's value is the mean of its seeds."""
    rounds: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for fold in folds:
        rounds.setdefault((fold["repeat"], fold["fold"]), []).append(fold)
    return {
        "metrics": {
            name: spread([number_mean_sd([one["metrics"][name] for one in own])["mean"] for own in rounds.values()])
            for name in task.metrics
        },
        "folds": len(rounds),
        "seeds": len({fold["seed"] for fold in folds}),
        "method": "mean and standard deviation (n - 1) over the folds of what members reach on the slides that they "
        "held out; a fold's value is the mean of its seeds",
    }


def set_block(task: Task, parts: Sequence[Part], resamples: int, seed: int) -> dict[str, Any] | None:
    """One set of held-out slides: counts, metrics with intervals, and the task's own curves and tables."""
    if not parts:
        return None
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return {
        "counts": {"rows": len(table), "patients": int(table["patient"].nunique())},
        "metrics": metrics_with_intervals(task, parts, resamples, seed),
        **task.extra(parts),
    }


def test_block(
    task: Task,
    plan: pd.DataFrame,
    predictions: pd.DataFrame,
    parts: Sequence[Part],
    resamples: int,
    seed: int,
    training: pd.DataFrame | None,
) -> dict[str, Any]:
    """The official test split: each member, their mean and SD, and the ensemble."""
    members = [one_member(task, row, predictions, "test", training) for _, row in plan.iterrows()]
    members = [member for member in members if member["counts"]["slides"]]
    return {
        "members": members,
        "over_members": {name: spread([m["metrics"][name] for m in members]) for name in task.metrics},
        "ensemble": set_block(task, parts, resamples, seed),
        "method": f"mean of what all {len(members)} members say",
    }


def nested_block(task: Task, choices: pd.DataFrame, folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the inner folds chose for each outer member, and the task's metric inside and outside."""
    outer = {fold["member"]: fold["metrics"][task.main] for fold in folds}
    chosen = []
    for row in choices[choices["chosen"]].sort_values("member").to_dict("records"):
        of_test, inner = outer.get(row["member"]), float(row["inner_auc"])
        chosen.append(
            {
                **{name: int(row[name]) for name in ("member", "repeat", "fold", "seed", "cell", "epochs")},
                **{name: float(row[name]) for name in ("lr", "weight_decay")},
                "inner": inner,
                "outer": of_test,
                "optimism": None if of_test is None else inner - of_test,
            }
        )
    return {
        "metric": task.main,
        "choices": chosen,
        "notes": edge_notes(choices),
        "inner": number_mean_sd([c["inner"] for c in chosen]),
        "optimism": number_mean_sd([c["optimism"] for c in chosen]),
        "method": f"setting and epochs by the highest mean inner {task.metrics[task.main].title}; refitted on the "
        "whole outer training part; optimism = inner - outer",
    }


# --- slides.csv, patients.csv --------------------------------------------------------------------------------------


def task_slides(task: Task, predictions: pd.DataFrame) -> pd.DataFrame:
    """One row a slide: what members say that did not train on it; kinds as in `mil.results.tables.slides_table`."""
    slide, role = predictions["slide"], predictions["role"]
    unused = ~slide.isin(slide[role != "unused"])
    honest = predictions[(role == "test") | unused]
    table = ensemble(task, honest)
    kinds = np.where(table["split"] == "test", TEST_ENSEMBLE, OUT_OF_FOLD)
    kinds = np.where(table["slide"].isin(slide[unused]), UNUSED_ENSEMBLE, kinds)
    table = table.assign(kind=kinds)
    rest = predictions[~slide.isin(honest["slide"])].drop_duplicates("slide")
    targets = [name for name in task.targets if name not in OF_SLIDE]
    missing = rest[[*OF_SLIDE, *targets]].assign(kind=NEVER_HELD_OUT, members=0)
    return pd.concat([table, missing], ignore_index=True) if len(missing) else table


def task_patients(task: Task, slides: pd.DataFrame) -> pd.DataFrame:
    """One row a patient: the mean of the slides that were held out."""
    held = slides[slides["kind"] != NEVER_HELD_OUT]
    groups, columns = held.groupby("patient", sort=True), task.columns()
    targets = [name for name in task.targets if name != "label"]
    table = groups[columns].mean()
    table[["label", "split", "kind"]] = groups[["label", "split", "kind"]].first()
    if targets:
        table[targets] = groups[targets].mean()
        table = table.drop(columns="label")
    table["slides"] = groups.size()
    return table.reset_index()
