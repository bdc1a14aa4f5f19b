"""What is learnt from predictions, and for whom: no slide's own label, nor its patient's, enters what is said of it.

A calibration, an operating point and conformal scores are all fitted on slides with labels. Three sources:

- `val`: where every member has labelled val slides, each member's own. The slides that it holds out are not among
  them, nor are their patients (the plan refuses a patient with two roles).
- `out-of-fold`: else. A slide's out-of-fold prediction is the mean of the logits of all members that held it out (one
  a repeat and seed), so repeats and seeds are averaged before anything is fitted. What is said of the slides of one
  fold is fitted on the slides of the other folds, without any patient of this one (cross-fitting). With several repeats
  the folds are those of the first in which a slide was held out. What is said of other slides, the official test split
  among them, is fitted on all out-of-fold predictions.
- `nothing`: neither is there (one fold, no val slides).

What cross-fitting leaves: the label of a slide did enter the training of the members of the other folds, on whose
predictions its map is fitted; and the ensemble for other slides has more members than an out-of-fold prediction, so it
is milder and better than what the map was fitted on.

Axes: S slides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import pandas as pd

from mil.results.tables import held_out, label_index, logit_columns, mean_of_logits, p_columns

Source = Literal["val", "out-of-fold", "nothing"]
FittedT = TypeVar("FittedT")


def no_thresholds(predictions: pd.DataFrame) -> pd.DataFrame:
    """For tables whose thresholds nobody looks at."""
    members = sorted(predictions["member"].unique().tolist())
    return pd.DataFrame({"threshold": 0.5}, index=pd.Index(members, name="member"))


def source_of(predictions: pd.DataFrame) -> Source:
    """What there is to fit on, see above."""
    known = predictions[predictions["label"].notna()]
    with_val = set(known["member"][known["role"] == "val"])
    if with_val == set(predictions["member"]):
        return "val"
    return "out-of-fold" if held_out(known).any() else "val" if with_val else "nothing"


def val_slides(predictions: pd.DataFrame, member: int, classes: Sequence[str]) -> pd.DataFrame:
    """One member's val slides, ready to fit on: as `fit_table`."""
    own = predictions[(predictions["member"] == member) & (predictions["role"] == "val")]
    table = own[["slide", "patient", *p_columns(classes)]].assign(label=label_index(own["label"], classes))
    return fit_table(table, classes)


def out_of_fold(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Table of the slides that were held out, with column `group`: the fold whose slides share what is said of them."""
    rows = predictions[held_out(predictions)]
    table = mean_of_logits(rows, classes, no_thresholds(predictions))
    first = rows.sort_values(["repeat", "fold"], kind="stable").drop_duplicates("slide").set_index("slide")
    pairs = first.loc[table["slide"], ["repeat", "fold"]]
    return table.assign(group=pairs.groupby(["repeat", "fold"], sort=True).ngroup().to_numpy(dtype=np.int64))


def val_ensemble(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Table of the slides that are val, each by the members for which it is; for studies that hold nothing else out."""
    rows = predictions[predictions["role"] == "val"]
    return mean_of_logits(rows, classes, no_thresholds(predictions))


def scored_table(predictions: pd.DataFrame, classes: Sequence[str]) -> tuple[pd.DataFrame, Source]:
    """One honest score a slide, of slides with a label: out-of-fold ones, else val ones; and which of both."""
    known = predictions[predictions["label"].notna()]
    if held_out(known).any():
        return fit_table(out_of_fold(predictions, classes), classes), "out-of-fold"
    if (known["role"] == "val").any():
        return fit_table(val_ensemble(predictions, classes), classes), "val"
    return pd.DataFrame(), "nothing"


def fit_table(table: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """The slides with a label and with probabilities that are numbers."""
    finite_S = np.isfinite(table[p_columns(classes)].to_numpy(dtype=np.float64)).all(axis=1)
    kept: pd.DataFrame = table[finite_S & (table["label"] >= 0).to_numpy()]
    return kept


def fit_without_own(
    table: pd.DataFrame, classes: Sequence[str], fit: Callable[[pd.DataFrame], FittedT]
) -> list[tuple[np.ndarray, FittedT]]:
    """For each group of `out_of_fold`: which slides it has (bool, (S,)), and what is fitted without its patients."""
    fitted = []
    for group in np.unique(table["group"]):
        own_S = (table["group"] == group).to_numpy()
        others = table[~table["patient"].isin(table["patient"][own_S])]
        fitted.append((own_S, fit(fit_table(others, classes))))
    return fitted


def probabilities_of(table: pd.DataFrame, classes: Sequence[str]) -> np.ndarray:
    """p_SC of a table of slides, a copy."""
    p_SC: np.ndarray = table[p_columns(classes)].to_numpy(dtype=np.float64, copy=True)
    return p_SC


def with_probabilities(rows: pd.DataFrame, p_NC: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Rows of predictions with other probabilities, and their logits."""
    log_NC = np.log(np.clip(p_NC, np.finfo(np.float64).tiny, None))
    logits = log_NC[:, 1:] - log_NC[:, :1] if len(classes) == 2 else log_NC
    names = (*p_columns(classes), *logit_columns(classes))
    columns = dict(zip(names, np.concatenate([p_NC, logits], axis=1).T, strict=True))
    return rows.assign(**columns)
