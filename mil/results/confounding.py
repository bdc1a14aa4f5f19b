"""Is the site in the way? What it tells of the label by itself, what features tell of it, and how much is left inside.

A study whose classes come from different hospitals can be right for a wrong reason: stain and scanner tell the
hospital, and the hospital tells the class. Neither half alone is a fault. So this says both, and shows the label's AUC
where the site cannot help: within sites, and on sites that were not trained on.

The warning. Site alone is said to predict the label where, patient by patient, a permutation test of independence gives
p < ALPHA and the association is at least SMALLEST_V (Cramer's V, corrected for its bias: Bergsma, Journal of the Korean
Statistical Society 2013). The test is exact for any number of sites and patients, up to the number of its draws; the
second condition keeps a cohort of thousands from being warned of a difference that no model could use. That features
tell the site is not a condition, as a network may find what a linear model of few slides does not; it is said beside.
`benchmarks/confounding.py` counts how often the warning comes where it should, and where it should not.

Letters: P patients, K sites, C classes, N slides of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import random_table

from extract.wording import count, p_value
from mil.results.site_models import (
    FEWEST_PATIENTS,
    Round,
    Slides,
    can_be_harmonized,
    drawn_rounds,
    label_auc,
    left_out_sites,
    probe_rounds,
    probe_sites,
    site_alone_auc,
)
from mil.tasks.estimates import auc_interval, mean_of
from mil.tasks.metrics import against_the_rest
from mil.tasks.stratified import nested_difference, stratified_auc_interval

ALPHA = 0.02
SMALLEST_V = 0.1
DRAWS = 9_999
"""Tables drawn for the permutation test; p is a multiple of 1 / 10,000."""
MOST_ROWS = 30
"""Sites that the block lists one by one, those with most slides."""
HOW = ("none", "combat", "project")


# --- does the site tell the label? -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Association:
    """Of site and label over patients. flagged: p < ALPHA and cramers_v >= SMALLEST_V."""

    p_value: float
    cramers_v: float
    patients: int
    flagged: bool


def association(site_P: np.ndarray, label_P: np.ndarray, seed: int = 0) -> Association:
    """Permutation test of independence by Pearson's chi-square, and the bias-corrected Cramer's V.

    All tables with the margins that were found are drawn as often as shuffling the labels would give them.

    Args:
        site_P, label_P: of every patient, anything that can be sorted.
    """
    sites, site_P = np.unique(site_P, return_inverse=True)
    labels, label_P = np.unique(label_P, return_inverse=True)
    n = len(site_P)
    if min(len(sites), len(labels)) < 2:
        return Association(1.0, 0.0, n, False)
    table_KC = np.zeros((len(sites), len(labels)))
    np.add.at(table_KC, (site_P, label_P), 1)
    expected_KC = table_KC.sum(axis=1, keepdims=True) * table_KC.sum(axis=0) / n
    drawn_RKC = random_table(table_KC.sum(axis=1).astype(int), table_KC.sum(axis=0).astype(int)).rvs(
        DRAWS, random_state=np.random.default_rng(seed)
    )
    chi2 = float(((table_KC - expected_KC) ** 2 / expected_KC).sum())
    chi2_R = ((drawn_RKC - expected_KC) ** 2 / expected_KC).sum(axis=(1, 2))
    p = (1 + int((chi2_R >= chi2 * (1 - 1e-9)).sum())) / (DRAWS + 1)
    v = corrected_v(chi2, n, *table_KC.shape)
    return Association(p, v, n, p < ALPHA and v >= SMALLEST_V)


def corrected_v(chi2: float, n: int, rows: int, columns: int) -> float:
    """Cramer's V without what chance alone adds to it (Bergsma 2013, equation 4); 0: no association, 1: a rule."""
    if n < 2:
        return 0.0
    phi2 = max(0.0, chi2 / n - (rows - 1) * (columns - 1) / (n - 1))
    rows_left, columns_left = rows - (rows - 1) ** 2 / (n - 1), columns - (columns - 1) ** 2 / (n - 1)
    smallest = min(rows_left, columns_left) - 1
    return float(min(1.0, np.sqrt(phi2 / smallest))) if smallest > 0 else 0.0


def one_a_patient(slides: Slides, used_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Site and label of each patient: its first site, and of several labels the one that fewest slides have."""
    rows = pd.DataFrame({"patient": slides.patient_S, "site": slides.site_S, "label": slides.label_S})
    rows = rows[used_S & (slides.site_S > 0) & (slides.label_S >= 0)]
    rare = rows["label"].map(rows["label"].value_counts())
    ordered = rows.assign(rare=rare).sort_values(["patient", "rare", "label", "site"])
    first = ordered.groupby("patient").first()
    return first["site"].to_numpy(), first["label"].to_numpy()


# --- the label, where the site cannot help ---------------------------------------------------------------------------


def within_sites(table: pd.DataFrame, site_N: np.ndarray, n_classes: int, *, intervals: bool) -> dict[str, Any]:
    """AUC of held-out predictions over all slides, and the weighted mean of those within sites.

    A site's weight is n+ n- / (n+ + n-), which makes the mean as certain as it can be (van Elteren 1960); a site of one
    class has none. Of several classes: one against the rest, each by itself, then their mean. Score intervals: in
    simulations that within sites holds the truth in 0.94 to 0.97, that of the difference in 0.985 and more, as the
    report says.

    Args:
        table: slides with their held-out probabilities: patient, label (class index), p_0, p_1, ...
        site_N: 0 where unknown, which counts in neither.
    """
    usable_N = (site_N > 0) & (table["label"] >= 0).to_numpy()
    p_columns_ = [f"p_{c}" for c in range(n_classes)]
    usable_N &= np.isfinite(table[p_columns_].to_numpy(dtype=np.float64)).all(axis=1)
    rows, site_N = table[usable_N], site_N[usable_N]
    label_N, p_NC = rows["label"].to_numpy(), rows[p_columns_].to_numpy(dtype=np.float64)
    if not len(rows):
        return {"slides": 0, "sites": 0, "one_class": 0, "all": None, "within": None, "difference": None}
    patients, classes = rows["patient"].to_numpy(), against_the_rest(n_classes)
    all_ = mean_of([auc_interval(label_N == c, p_NC[:, c], patients) for c in classes], patients)
    within = mean_of([stratified_auc_interval(label_N == c, p_NC[:, c], site_N, patients) for c in classes], patients)
    sites = np.unique(site_N)
    n_mixed = sum(len(np.unique(label_N[site_N == k])) > 1 for k in sites)
    summary: dict[str, Any] = {"slides": len(rows), "sites": n_mixed, "one_class": len(sites) - n_mixed}
    difference = nested_difference(all_, within, patients)
    for name, found in (("all", all_), ("within", within), ("difference", difference)):
        ends = (found.low, found.high) if intervals else (None, None)
        summary[name] = {"value": found.value, "low": ends[0], "high": ends[1]}
    return summary


# --- the block -------------------------------------------------------------------------------------------------------


def confounding(
    slides: Slides,
    rounds: Sequence[Round],
    held_out: pd.DataFrame,
    classes: Sequence[str],
    *,
    harmonize: str,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Everything of this file, for metrics.json.

    Args:
        slides: all of the cohort, in its order.
        rounds: training and test slides of the folds.
        held_out: the study's own held-out predictions: slides with column `row`, their place in the cohort.
        harmonize: what the study's members did (`train.harmonize`).
    """
    used_S = np.any([train_S | test_S for train_S, test_S in rounds], axis=0)
    probed = slides.large_sites(used_S)
    own_rounds, of_the_study = probe_rounds(slides, rounds, probed, seed) if len(probed) > 1 else ([], True)
    possible = can_be_harmonized(slides, [*rounds, *own_rounds])
    block = about_sites(slides, used_S, rounds, held_out, classes, resamples=resamples, seed=seed) | {
        "left_out": left_out_sites(slides, used_S),
        "harmonize": harmonize,
        "ways": [
            way(slides, rounds, own_rounds, probed, how, intervals=resamples > 0)
            for how in HOW
            if how == "none" or possible
        ],
        "can_be_harmonized": possible,
    }
    block["probe"]["folds_of_the_study"] = of_the_study
    return block | {"warnings": warnings_of(block)}


def confounding_of_new(
    slides: Slides, held_out: pd.DataFrame, classes: Sequence[str], *, harmonize: str, resamples: int, seed: int
) -> dict[str, Any]:
    """The same of slides that a trained study predicts.

    A linear model for their label, and sites left out, say nothing here: it would be fitted on slides that the study
    has not seen. The site is told from folds of these patients.

    Args:
        slides: all that are predicted, in their order. held_out: those that metrics count, as for `confounding`.
    """
    used_S = np.isin(np.arange(len(slides.site_S)), held_out["row"])
    probed = slides.large_sites(used_S)
    rounds = drawn_rounds(slides, used_S, probed, seed) if len(probed) > 1 else []
    own = way(slides, [], rounds, probed, "none", intervals=resamples > 0)
    block = about_sites(slides, used_S, rounds, held_out, classes, resamples=resamples, seed=seed) | {
        "new": True,
        "left_out": None,
        "harmonize": harmonize,
        "ways": [own],
        "can_be_harmonized": True,
    }
    return block | {"warnings": warnings_of(block)}


def about_sites(
    slides: Slides,
    used_S: np.ndarray,
    rounds: Sequence[Round],
    held_out: pd.DataFrame,
    classes: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """What is said of sites whether these slides train members or not; `rounds` are for the site alone."""
    tied, probed = association(*one_a_patient(slides, used_S), seed=seed), slides.large_sites(used_S)
    return {
        **counts_of(slides, used_S),
        "label_by_site": {
            **asdict(tied),
            "auc": site_alone_auc(slides, rounds),
            "alpha": ALPHA,
            "smallest": SMALLEST_V,
        },
        "table": site_table(slides, used_S, partial(labels_told, slides, classes)),
        "probe": about_probe(probed, of_the_study=False),
        "within": within_sites(held_out, slides.site_S[held_out["row"]], len(classes), intervals=resamples > 0),
    }


def way(
    slides: Slides,
    rounds: Sequence[Round],
    own_rounds: Sequence[Round],
    probed: np.ndarray,
    how: str,
    *,
    intervals: bool,
) -> dict[str, Any]:
    """Site probe and label AUC of linear models on features that are harmonised so."""
    probe = site_by_features(slides, own_rounds, probed, how, intervals=intervals)
    return probe | {"label_auc": label_auc(slides, rounds, how)}


def site_by_features(
    slides: Slides, rounds: Sequence[Round], probed: np.ndarray, how: str, *, intervals: bool
) -> dict[str, Any]:
    """How well a linear model on features that are harmonised so tells the site."""
    probe = probe_sites(slides, rounds, probed, how, intervals=intervals)
    site = {"value": probe.balanced_accuracy, "low": probe.interval.low, "high": probe.interval.high}
    return {"how": how, "site": site, "site_auc": probe.auc}


def counts_of(slides: Slides, used_S: np.ndarray) -> dict[str, int]:
    """Sites and slides that are used, and how many of these have no site."""
    return {
        "sites": len(np.unique(slides.site_S[used_S & (slides.site_S > 0)])),
        "slides": int(used_S.sum()),
        "without_site": int((used_S & (slides.site_S == 0)).sum()),
    }


def about_probe(probed: np.ndarray, of_the_study: bool) -> dict[str, Any]:
    """What the site probe was asked, and by whose folds."""
    return {
        "sites": len(probed),
        "chance": 1 / len(probed) if len(probed) else None,
        "fewest_patients": FEWEST_PATIENTS,
        "folds_of_the_study": of_the_study,
    }


def site_table(
    slides: Slides, used_S: np.ndarray, told: Callable[[np.ndarray], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Slides and patients of every site, and what is told of it, most slides first; those after MOST_ROWS together.

    told: of slides, by their rows in the cohort.
    """
    own_of = {name: np.flatnonzero(used_S & (slides.site_S == k)) for k, name in enumerate(slides.sites, 1)}
    sites = sorted((name for name, own in own_of.items() if len(own)), key=lambda name: (-len(own_of[name]), name))
    listed, rest = {name: [own_of[name]] for name in sites[:MOST_ROWS]}, sites[MOST_ROWS:]
    if rest:
        listed[f"{len(rest)} more sites"] = [own_of[name] for name in rest]
    rows = []
    for name, parts in listed.items():
        patients = sum(len(np.unique(slides.patient_S[own])) for own in parts)
        every = np.concatenate(parts)
        rows.append({"site": name, "slides": len(every), "patients": patients, **told(every)})
    return rows


def labels_told(slides: Slides, classes: Sequence[str], own: np.ndarray) -> dict[str, dict[str, int]]:
    """Slides of each class."""
    return {"labels": {c: int((slides.label_S[own] == i).sum()) for i, c in enumerate(classes)}}


def warnings_of(block: Mapping[str, Any]) -> list[str]:
    """What must be known before reading, in a sentence."""
    tied, way_none = block["label_by_site"], block["ways"][0]
    folds = "folds of these slides" if block.get("new") else "the same folds"
    if not tied["flagged"]:
        return []
    text = (
        f"site alone predicts the label: AUC {_number(tied['auc'])} on {folds} without looking at a slide "
        f"(permutation test over {count(tied['patients'], 'patient')}, p {p_value(tied['p_value'], said=True)}, "
        f"Cramer's V {tied['cramers_v']:.2f})"
    )
    site = way_none["site"]["value"]
    if site is not None:
        told = f"balanced accuracy {site:.3f} where chance is {block['probe']['chance']:.3f}"
        text += f", and a linear model tells the site from the features with {told}"
        after = next((way["site"]["value"] for way in block["ways"][1:] if way["how"] == block["harmonize"]), None)
        text += f" (harmonised as the members see them: {after:.3f})" if after is not None else ""
    within = block["within"]["within"]
    if within is None or within["value"] is None:
        text += ". No site has slides of several classes, so what was learned of the label cannot be told from the site"
    else:
        all_ = block["within"]["all"]["value"]
        text += f". Part of the AUC may be the site's: within sites it is {within['value']:.3f}, over all {all_:.3f}"
    return [text]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
