"""Linear models on the mean tile of every slide: what features tell of the site, and of the label on other sites.

A logistic regression (scikit-learn), L2 with C = 0.01 on features of mean 0 and deviation 1, classes weighted alike.
Everything is fitted to the training slides of a fold and asked about its test slides.

Letters: S slides, N slides of a table, K sites (1..K; 0 is unknown), C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mil.results.intervals import Interval
from mil.tasks.estimates import jeffreys, proportion_interval
from mil.tasks.estimates import mean_of as combined
from mil.training.harmonize import apart, fit_map

FEWEST_PATIENTS = 5
"""Of a site that is told from others, or scored by itself; smaller ones are left out, and said."""
OWN_FOLDS = 5
MOST_GROUPS = 10
"""Leave-one-site-out trains at most so many models: with more sites, several are left out together."""

Round = tuple[np.ndarray, np.ndarray]
"""Bool (S,) each: the training and the test slides of a fold."""


@dataclass(frozen=True)
class Slides:
    """What these models see. site_S: 1..K, 0 unknown, `sites` their names. label_S: class index, -1 without."""

    means_SD: np.ndarray
    site_S: np.ndarray
    label_S: np.ndarray
    patient_S: np.ndarray
    sites: list[str]

    def large_sites(self, used_S: np.ndarray) -> np.ndarray:
        """The sites (1..K) with at least FEWEST_PATIENTS patients among the slides used."""
        patients = [len(np.unique(self.patient_S[used_S & (self.site_S == k)])) for k in range(1, len(self.sites) + 1)]
        return 1 + np.flatnonzero(np.array(patients, dtype=np.int64) >= FEWEST_PATIENTS)


def linear_model() -> Pipeline:
    """The model of this file, not fitted."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=5000))


def harmonized(slides: Slides, train_S: np.ndarray, how: str) -> np.ndarray:
    """The means with the site taken out as a member that trains on these slides has it (`mil.training.harmonize`)."""
    if how == "none":
        return slides.means_SD
    known_S = train_S & (slides.site_S > 0)
    n_sites = len(slides.sites) if how == "combat" else None
    found = fit_map(slides.means_SD[known_S], slides.site_S[known_S], slides.label_S[known_S], n_sites)
    return found(slides.means_SD, slides.site_S)


def can_be_harmonized(slides: Slides, rounds: Sequence[Round]) -> bool:
    """Whether what sites add can be told from what labels do, in every fold's training slides."""
    known = [train_S & (slides.site_S > 0) for train_S, _ in rounds]
    return all(apart(slides.site_S[known_S], slides.label_S[known_S]) for known_S in known)


# --- the site --------------------------------------------------------------------------------------------------------


def probe_rounds(slides: Slides, rounds: Sequence[Round], probed: np.ndarray, seed: int) -> tuple[list[Round], bool]:
    """The folds on which sites are told apart, and whether they are the study's.

    Where a site is never on both sides of one of the study's folds, as in site-preserving ones, folds of patients are
    drawn anew, stratified by site.
    """
    testable = [
        np.unique(slides.site_S[test_S & np.isin(slides.site_S, slides.site_S[tr_S])]) for tr_S, test_S in rounds
    ]
    if np.isin(probed, np.concatenate(testable)).all():
        return list(rounds), True
    used_S = np.any([train_S | test_S for train_S, test_S in rounds], axis=0)
    return drawn_rounds(slides, used_S, probed, seed), False


def drawn_rounds(slides: Slides, used_S: np.ndarray, probed: np.ndarray, seed: int) -> list[Round]:
    """Folds of the patients of the `probed` sites, stratified by site."""
    index = np.flatnonzero(used_S & np.isin(slides.site_S, probed))
    splitter = StratifiedGroupKFold(OWN_FOLDS, shuffle=True, random_state=seed)
    drawn = []
    for train, test in splitter.split(index, slides.site_S[index], slides.patient_S[index]):
        sides = np.zeros((2, len(used_S)), dtype=bool)
        sides[0, index[train]], sides[1, index[test]] = True, True
        drawn.append((sides[0], sides[1]))
    return drawn


@dataclass(frozen=True)
class Probe:
    """Balanced accuracy (chance: 1 / sites) with its interval, and AUC (chance: 0.5), of held-out slides."""

    balanced_accuracy: float | None
    interval: Interval
    auc: float | None


def probe_sites(
    slides: Slides, rounds: Sequence[Round], probed: np.ndarray, how: str, *, intervals: bool = True
) -> Probe:
    """How well the means tell the site. Slides of a site that a fold does not train on are not asked about.

    Balanced accuracy: with the limits of every site's recall combined (MOVER), patients as clusters.
    AUC: of several sites the mean of one against the rest; the mean of the folds in which it is defined.
    """
    right, sites, patients, aucs = [], [], [], []
    for train_S, test_S in rounds:
        x_SD = harmonized(slides, train_S, how)
        train_S = train_S & np.isin(slides.site_S, probed)
        test_S = test_S & np.isin(slides.site_S, np.unique(slides.site_S[train_S]))
        if len(np.unique(slides.site_S[train_S])) < 2 or not test_S.any():
            continue
        model = linear_model().fit(x_SD[train_S], slides.site_S[train_S])
        p_NK = model.predict_proba(x_SD[test_S])
        right.append(model.classes_[p_NK.argmax(axis=1)] == slides.site_S[test_S])
        sites.append(slides.site_S[test_S])
        patients.append(slides.patient_S[test_S])
        aucs.append(one_against_the_rest(slides.site_S[test_S], p_NK, model.classes_))
    if not right:
        return Probe(None, Interval(None, None, 0, 0), None)
    right_N, site_N = np.concatenate(right), np.concatenate(sites)
    parts = [
        proportion_interval(right_N, np.concatenate(patients), among=site_N == site, limits=jeffreys)
        for site in np.unique(site_N)
    ]
    found = combined(parts, np.concatenate(patients))
    low, high = (found.low, found.high) if intervals else (None, None)
    return Probe(found.value, Interval(low, high, 0, 0), mean_of(aucs))


# --- the label -------------------------------------------------------------------------------------------------------


def label_auc(slides: Slides, rounds: Sequence[Round], how: str) -> float | None:
    """AUC of the linear model for the label, mean of the folds; of several classes the mean of one against the rest."""
    aucs = []
    for train_S, test_S in rounds:
        x_SD = harmonized(slides, train_S, how)
        train_S, test_S = train_S & (slides.label_S >= 0), test_S & (slides.label_S >= 0)
        if len(np.unique(slides.label_S[train_S])) < 2 or not test_S.any():
            continue
        model = linear_model().fit(x_SD[train_S], slides.label_S[train_S])
        p_NC = model.predict_proba(x_SD[test_S])
        aucs.append(one_against_the_rest(slides.label_S[test_S], p_NC, model.classes_))
    return mean_of(aucs)


def site_alone_auc(slides: Slides, rounds: Sequence[Round]) -> float | None:
    """AUC for the label of nothing but the site: the share of each class among a site's training slides (+1 each)."""
    aucs = []
    for train_S, test_S in rounds:
        train_S, test_S = (side_S & (slides.label_S >= 0) & (slides.site_S > 0) for side_S in (train_S, test_S))
        classes = np.unique(slides.label_S[train_S])
        if len(classes) < 2 or not test_S.any():
            continue
        overall_C = np.mean(slides.label_S[train_S][:, None] == classes, axis=0)
        counts_KC = np.zeros((len(slides.sites) + 1, len(classes)))
        np.add.at(counts_KC, (slides.site_S[train_S], np.searchsorted(classes, slides.label_S[train_S])), 1)
        share_KC = (counts_KC + overall_C) / (counts_KC.sum(axis=1, keepdims=True) + 1)
        aucs.append(one_against_the_rest(slides.label_S[test_S], share_KC[slides.site_S[test_S]], classes))
    return mean_of(aucs)


def left_out_sites(slides: Slides, used_S: np.ndarray) -> dict[str, object] | None:
    """The linear model for the label, trained without a site and asked about it: one site after the other.

    With more than MOST_GROUPS sites, or small ones, several sites are left out together. None where training slides
    would have one class only, whichever is left out.
    """
    known_S = used_S & (slides.site_S > 0) & (slides.label_S >= 0)
    n_sites = len(np.unique(slides.site_S[known_S]))
    if n_sites < 2:
        return None
    index = np.flatnonzero(known_S)
    together = min(n_sites, MOST_GROUPS)
    groups, aucs = [], []
    for train, test in GroupKFold(together).split(index, groups=slides.site_S[index]):
        train, test = index[train], index[test]
        names = [slides.sites[k - 1] for k in np.unique(slides.site_S[test])]
        auc = None
        if len(np.unique(slides.label_S[train])) > 1:
            model = linear_model().fit(slides.means_SD[train], slides.label_S[train])
            p_NC = model.predict_proba(slides.means_SD[test])
            auc = one_against_the_rest(slides.label_S[test], p_NC, model.classes_)
        groups.append({"sites": names, "slides": len(test), "auc": auc})
        aucs.append(auc)
    defined = [auc for auc in aucs if auc is not None]
    return {"groups": groups, "auc": mean_of(aucs), "defined": len(defined)}


def one_against_the_rest(label_N: np.ndarray, p_NC: np.ndarray, classes: np.ndarray) -> float | None:
    """Mean AUC of the classes that are there, and not alone; with two, that of the last. None: one class only."""
    wanted = classes[-1:] if len(classes) == 2 else classes
    found = [
        float(roc_auc_score(label_N == c, p_NC[:, list(classes).index(c)]))
        for c in wanted
        if 0 < np.mean(label_N == c) < 1
    ]
    return mean_of(found)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of those that are defined; None where none is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
