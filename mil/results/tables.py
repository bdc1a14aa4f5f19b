"""What members say of slides, as tables: predictions.csv, slides.csv, patients.csv, and the ensembles behind them.

What is reported comes from `role == "test"` alone: out-of-fold predictions of the slides that were cross-validated, and
predictions of the official test split. A threshold is chosen on the member's own `role == "val"` slides or is 0.5.
Several members that saw one slide are one ensemble: the mean of their logits.

Axes: S slides, C classes. A "table of slides" has the columns slide, patient, split, label (class index,
-1 = unlabelled), members (how many predicted it), threshold, p_0..p_{C-1} and sd (over members).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit, softmax

from mil.study.units import COLUMN
from mil.tasks.metrics import choose_threshold, decide

OUT_OF_FOLD, TEST_ENSEMBLE = "out-of-fold", "test ensemble"
UNUSED_ENSEMBLE, NEVER_HELD_OUT = "unused ensemble", "never held out"


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
    slide_R, slides = pd.factorize(rows["slide"], sort=True)
    names, columns = p_columns(classes), logit_columns(classes)
    logits_RC, p_RC = (np.column_stack([rows[name].to_numpy() for name in some]) for some in (columns, names))
    logits_SC = pd.DataFrame(logits_RC).groupby(slide_R).mean().to_numpy(dtype=np.float64, copy=True)
    missing_R, missing_C = np.nonzero(np.isnan(logits_RC))
    logits_SC[slide_R[missing_R], missing_C] = np.nan  # pandas' mean leaves out what is not a number
    with np.errstate(invalid="ignore"):
        p_SC = to_probabilities(logits_SC)
        sd_SC = pd.DataFrame(p_RC).groupby(slide_R).std(ddof=1).to_numpy(dtype=np.float64)
    first_S = np.unique(slide_R, return_index=True)[1]
    slide_S, patient_S, split_S, label_S = (rows[name].iloc[first_S] for name in ("slide", "patient", "split", "label"))
    shown = decide(p_SC) if len(classes) > 2 else np.ones(len(first_S), dtype=np.int64)
    return pd.DataFrame(
        {
            "slide": slide_S.to_numpy(),
            "patient": patient_S.astype(str).to_numpy(),
            "split": split_S.to_numpy(),
            "label": label_index(label_S, classes),
            "members": np.bincount(slide_R, minlength=len(slides)),
            "threshold": expit(pd.Series(logit(safe)).groupby(slide_R).mean().to_numpy()),
            **dict(zip(names, p_SC.T, strict=True)),
            "sd": sd_SC[np.arange(len(first_S)), shown],
        }
    )


def held_out(predictions: pd.DataFrame) -> pd.Series:
    """Bool, a row each: an out-of-fold prediction."""
    return (predictions["role"] == "test") & (predictions["split"] != "test")


def of_test_split(predictions: pd.DataFrame) -> pd.Series:
    """Bool, a row each: a prediction of the official test split."""
    return (predictions["role"] == "test") & (predictions["split"] == "test")


def pooled_out_of_fold(predictions: pd.DataFrame, classes: Sequence[str], thresholds: pd.DataFrame) -> pd.DataFrame:
    """Table of the cross-validated slides, each predicted only by members that held it out (one a repeat and seed)."""
    return mean_of_logits(predictions[held_out(predictions)], classes, thresholds)


def held_out_ensemble(predictions: pd.DataFrame, classes: Sequence[str], thresholds: pd.DataFrame) -> pd.DataFrame:
    """Table of the official test slides, each predicted by the ensemble of all members."""
    return mean_of_logits(predictions[of_test_split(predictions)], classes, thresholds)


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
    of_slide = ["slide", "patient", "label", "split", *([COLUMN] if COLUMN in slides else [])]
    table = columns.merge(slides.loc[:, of_slide], how="cross")
    table["role"] = roles_MS.astype(object).reshape(-1)
    p_NC = to_probabilities(logits_MSC.astype(float).reshape(n_members * n_slides, n_logits))
    for c in range(n_logits):
        table[f"logit_{c}"] = logits_MSC[:, :, c].reshape(n_members * n_slides)
    for c in range(p_NC.shape[1]):
        table[f"p_{c}"] = p_NC[:, c]
    return table


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
