"""The list of slides as columns of numbers and names: what the page sorts, filters and shows without asking again.

Axes: S slides, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mil.look.drawing import DIVERGING, SEQUENTIAL, Colours
from mil.results.tables import p_columns
from mil.viewer.shown import Exhibit, Shown


def catalogue(shown: Shown) -> bytes:
    """JSON: slides (columns), studies (what each says of them), colours, what may be written."""
    features = shown.features.slides if shown.features is not None else {}
    tiled = [slide in shown.files or slide in features for slide in shown.slides]
    table = shown.table
    slides: dict[str, Any] = {name: encoded(table[name]) for name in ("patient", "label", "split", "site")}
    slides |= {"name": shown.slides, "file": [int(slide in shown.files) for slide in shown.slides]}
    slides |= {"outlines": [int(slide in shown.outlines) for slide in shown.slides]}
    content = {
        "slides": slides | {"tiled": [int(each) for each in tiled]},
        "studies": [study_columns(exhibit, shown.slides) for exhibit in shown.exhibits],
        "colours": {name: colour_table(name) for name in (SEQUENTIAL, DIVERGING)},
        "reviews": shown.reviews is not None,
        "exclude": shown.regions is not None,
        "regions": "" if shown.regions is None else str(shown.regions),
        "grid": {"tile_px": shown.tile_px, "mpp": shown.tile_mpp},
    }
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def encoded(column: pd.Series) -> dict[str, Any]:
    """A column of few different texts: the texts, and the place of each row's."""
    codes, names = pd.factorize(column)
    return {"names": [str(name) for name in names], "codes": codes.tolist()}


def study_columns(exhibit: Exhibit, slides: list[str]) -> dict[str, Any]:
    """What a run says of every slide, null where it says nothing; `of_classes` and `of_task` say what."""
    trained = exhibit.trained
    table = exhibit.verdicts.slides.reindex(slides)
    own = of_classes(exhibit, table) if trained.of_classes else of_task(exhibit, table)
    return own | {
        "name": exhibit.name,
        "aggregator": trained.description.aggregator,
        "task": trained.task.name,
        "noun": "probability" if trained.of_classes else trained.task.noun,
        "judged": exhibit.judged,
        "classes": list(trained.classes) if trained.of_classes else [],
        "targets": list(exhibit.targets),
        "members": trained.n_members,
        "features": exhibit.why_no_features,
        "role": encoded(roles_of(exhibit, table)),
    }


def of_classes(exhibit: Exhibit, table: pd.DataFrame) -> dict[str, Any]:
    """p: of the positive class of two, of the predicted one of several. error: 1 - probability of the label. doubt: how
    near the decision was, 0 = on the threshold (of several classes: between the two most likely).
    """
    trained = exhibit.trained
    p_SC = table[p_columns(trained.classes)].to_numpy(dtype=np.float64)
    two = len(trained.classes) == 2
    ranked_SC = np.sort(p_SC, axis=1)
    doubt_S = np.abs(p_SC[:, 1] - table["threshold"].to_numpy()) if two else ranked_SC[:, -1] - ranked_SC[:, -2]
    return {
        "p": numbers(p_SC[:, 1] if two else ranked_SC[:, -1]),
        "threshold": numbers(table["threshold"].to_numpy()),
        "error": numbers(table["error"].to_numpy()),
        "doubt": numbers(doubt_S),
        "predicted": encoded(table["predicted"].fillna("").astype(str)),
    }


def of_task(exhibit: Exhibit, table: pd.DataFrame) -> dict[str, Any]:
    """Risk, value or grade. p: the task's one number (`Task.one_number`). error: its distance from the target, null
    where a slide alone cannot say. doubt: minus the standard deviation over the members that held it out. predicted:
    grade or risk group. truth: the target in words. group: see `groups_of`.
    """
    task, known = exhibit.trained.task, table[table["number"].notna()]
    read = task.for_reader(known)
    names = next((read[name] for name in ("predicted", "risk_group") if name in read), pd.Series("", index=read.index))
    rows = exhibit.trained.predictions
    rows = rows[rows["role"] == "test"]
    spread = pd.Series(task.one_number(rows), index=rows.index).groupby(rows["slide"]).std()
    there = table[table["slide"].notna()]
    rows_of = there.to_dict("records")
    truth = {str(row["slide"]): task.truth({str(key): value for key, value in row.items()}) for row in rows_of}
    return {
        "p": numbers(table["number"].to_numpy(dtype=np.float64)),
        "threshold": [None] * len(table),
        "error": numbers(table["error"].to_numpy(dtype=np.float64)),
        "doubt": numbers(-spread.reindex(table.index.map(bag_of(exhibit))).to_numpy(dtype=np.float64)),
        "predicted": encoded(names.reindex(table.index).fillna("").astype(str)),
        "truth": encoded(pd.Series([truth.get(str(slide), "") for slide in table.index])),
        "group": encoded(groups_of(exhibit, table)),
    }


QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")


def groups_of(exhibit: Exhibit, table: pd.DataFrame) -> pd.Series:
    """What takes the place of classes in a filter: whether there was an event, else the quarter of the study's slides
    that a prediction is in. "" where nobody knows; all of them where the label is a class already.
    """
    if exhibit.judged:
        return pd.Series("", index=table.index)
    if "event" in table:
        return table["event"].map({0: "no event", 1: "event"}).fillna("")
    quarter = table["number"].rank(pct=True, method="first") * len(QUARTERS)
    names = [f"prediction: {QUARTERS[math.ceil(q) - 1]}" if np.isfinite(q) else "" for q in quarter]
    return pd.Series(names, index=table.index)


def roles_of(exhibit: Exhibit, table: pd.DataFrame) -> pd.Series:
    """In words which part of the study a slide was in: test, fold 2, never held out, ..."""
    predictions = exhibit.trained.predictions
    tested = predictions[(predictions["role"] == "test") & (predictions["split"] != "test")]
    fold = tested.drop_duplicates("slide").set_index("slide")["fold"].reindex(table.index.map(bag_of(exhibit)))
    kind = table["kind"].fillna("not in this run").astype(str).replace({"test ensemble": "test"})
    folds = ["" if np.isnan(number) else f"fold {number:.0f}" for number in fold.to_numpy(dtype=np.float64)]
    return pd.Series([own or other for own, other in zip(folds, kind, strict=True)])


def bag_of(exhibit: Exhibit) -> Callable[[str], str]:
    """What a slide is called in the study's tables: its patient where that is a bag."""
    known = exhibit.trained.bag_of
    return lambda slide: known.get(slide, slide)


def numbers(values_S: np.ndarray) -> list[float | None]:
    """Five digits are more than a screen shows; null for NaN."""
    rounded = np.round(values_S.astype(np.float64), 5)
    return [
        value if known else None for value, known in zip(rounded.tolist(), np.isfinite(rounded).tolist(), strict=True)
    ]


def colour_table(name: str) -> list[int]:
    """256 colours as r, g, b, r, g, b, ..."""
    colours: list[int] = Colours(name, 0.0, 255.0, "").of(np.arange(256)).reshape(-1).tolist()
    return colours
