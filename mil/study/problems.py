"""What can be wrong with a study's folds, and what a reader should know about its sites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from extract.cohort import Cohort
from extract.wording import count, name_some
from mil.study import targets
from mil.study.roles import (
    ROLES,
    TEST,
    TRAIN,
    VAL,
    Round,
    free_slides,
    official_test,
    patient_index,
    patients_in_both_splits,
)
from mil.study.sites import blocks
from mil.study.subgroups import is_missing


def argument_problems(
    folds: int, repeats: int, seeds: Sequence[int], val_fraction: float, split_seed: int
) -> list[str]:
    """Arguments of `make_plan` that are out of range."""
    problems = []
    if folds < 1:
        problems.append(f"study.folds={folds}: expected 1 (no cross-validation) or more")
    if repeats < 1:
        problems.append(f"study.repeats={repeats}: expected 1 or more")
    if not seeds:
        problems.append("study.seeds is empty: expected at least one seed, for example [0]")
    if len(set(seeds)) < len(seeds):
        problems.append(f"study.seeds={list(seeds)}: a seed occurs twice, its members would be copies")
    problems += [f"seed {s}: expected 0 to {2**32 - 1}" for s in [*seeds, split_seed] if not 0 <= s < 2**32]
    if not 0 <= val_fraction < 1:
        problems.append(f"study.val_fraction={val_fraction:g}: expected 0 or more and less than 1")
    return problems


def split_problems(cohort: Cohort) -> list[str]:
    """Patients on both sides of the official split."""
    both = patients_in_both_splits(cohort)
    if not both:
        return []
    return [
        f"{count(len(both), 'patient')} with slides in the official train and test split: {name_some(both)}. "
        "Correct the cohort's split column"
    ]


def size_problems(cohort: Cohort, folds: int, val_fraction: float) -> list[str]:
    """Too few classes, patients of a class, or nothing to report on."""
    if cohort.target != "class":
        return targets.size_problems(cohort, folds, val_fraction)
    free_S, labels_S, patient_S = free_slides(cohort), cohort.labels_S, patient_index(cohort)[1]
    present = np.unique(labels_S[free_S])
    if len(present) < 2:
        got = f"only {cohort.classes[present[0]]!r}" if len(present) else "no labelled slide"
        return [f"training needs slides of at least two classes outside the test split, got {got}"]
    problems = []
    for c in present:
        n = len(np.unique(patient_S[free_S & (labels_S == c)]))
        if n < folds:
            what_to_do = f"use study.folds={n} or fewer" if n > 1 else "add patients"
            problems.append(
                f"class {cohort.classes[c]!r} has {count(n, 'patient')} outside the test split, but "
                f"study.folds={folds} needs {folds}, one in every fold: {what_to_do}, or leave the class out"
            )
    if folds == 1 and not official_test(cohort).any() and val_fraction == 0:
        problems.append(
            "study.folds=1 trains on every slide and the cohort has no test split, so nothing is left to report on: "
            "use study.folds=5, mark test slides in the split column, or set study.val_fraction"
        )
    return problems


def class_problems(part: Round, cohort: Cohort, folds_csv: Path | None) -> list[str]:
    """Why this round could not be trained or scored: a class that is not trained, a one-class test or val."""
    labels_S, problems = cohort.labels_S, []
    official_S = official_test(cohort)
    what_to_do = f"change {folds_csv}" if folds_csv else "use fewer study.folds or another seed"
    if cohort.target != "class":
        return targets.round_problems(part, cohort, what_to_do)
    untrained = np.setdiff1d(labels_S[labels_S >= 0], labels_S[part.roles_S == TRAIN])
    if len(untrained):
        names = [cohort.classes[c] for c in untrained]
        problems.append(f"{part.name}: no training slide of class {name_some(names)}: {what_to_do}, or leave it out")
    for role in (VAL, TEST):
        here_S = (part.roles_S == role) & (labels_S >= 0) & ~official_S
        if here_S.any() and len(np.unique(labels_S[here_S])) == 1:
            n, only = count(int(here_S.sum()), "slide"), cohort.classes[labels_S[here_S][0]]
            problems.append(
                f"{part.name}: {ROLES[role]} has one class only ({n} of {only!r}), its AUC is undefined: {what_to_do}"
            )
    if not np.isin(part.roles_S, [VAL, TEST]).any():
        problems.append(f"{part.name}: no slide is val or test, so nothing is left to report on: {what_to_do}")
    return problems


def notes_on_sites(cohort: Cohort, site_preserving: bool) -> list[str]:
    """What a reader of the report should know about the cohort's sites, if it says any."""
    if "site" not in cohort.table:
        return []
    table = cohort.table[free_slides(cohort)]
    table = table[[not is_missing(site) for site in table["site"]]]
    notes = []
    n_sites = table["site"].nunique()
    if site_preserving:
        notes.append(f"site-preserving folds: each of the {count(n_sites, 'site')} is on one side of every member")
    elif n_sites > 1:
        notes.append(
            f"slides come from {n_sites} sites, and folds mix them: what a network learns about a site's stain or "
            "scanner counts as success. study.site_preserving=true keeps sites apart"
        )
    if n_sites > 1 and cohort.target == "class" and table.groupby("site")["label"].nunique().max() == 1:
        notes.append(
            "every site has slides of one class only, so site and class cannot be told apart. Tissue source site codes "
            "of TCGA are given anew in every project: one hospital has one code for its LUAD and another for its LUSC "
            "slides. To keep hospitals whole, put their names into a column (columns.site)"
        )
    return notes


def site_problems(cohort: Cohort, folds: int) -> list[str]:
    """Why folds that preserve sites are impossible."""
    if "site" not in cohort.table:
        return [
            "study.site_preserving=true needs the site of every slide, and the cohort has none: name the CSV's column "
            "with columns.site, or take it from TCGA barcodes with columns.site=tcga"
        ]
    free_S, site_S = free_slides(cohort), cohort.table["site"].to_numpy(dtype=str)
    relevant_S = free_S | official_test(cohort)
    blank = cohort.table["slide"][relevant_S & (site_S == "")]
    if len(blank):
        return [f"study.site_preserving=true: {count(len(blank), 'slide')} without a site: {name_some(blank)}"]
    problems = []
    both = np.intersect1d(site_S[free_S], site_S[official_test(cohort)])
    if len(both):
        problems.append(
            f"study.site_preserving=true is impossible: {count(len(both), 'site')} with slides in the official train "
            f"and test split: {name_some(both)}. Change the cohort's split column, or set study.site_preserving=false"
        )
    block_S = blocks(patient_index(cohort)[1][free_S], site_S[free_S]) if free_S.any() else np.array([], dtype=np.int64)
    labels_S, n_sites = cohort.labels_S[free_S], len(np.unique(site_S[free_S]))
    for c in np.unique(labels_S):
        n = len(np.unique(block_S[labels_S == c]))
        if n < folds:
            joined = " (sites that share a patient count as one)" if n_sites > block_S.max() + 1 else ""
            what_to_do = f"use study.folds={n} or fewer" if n > 1 else "no folds are possible with this class"
            problems.append(
                f"study.site_preserving=true is impossible: class {cohort.classes[c]!r} comes from {count(n, 'site')}"
                f"{joined}, but study.folds={folds} needs {folds}, one in every fold: {what_to_do}, or set "
                "study.site_preserving=false"
            )
    return problems


def folds_without_a_class(rounds: Sequence[Round], cohort: Cohort) -> list[str]:
    """Where whole sites cannot give every fold all classes."""
    labels_S = cohort.labels_S
    everyone = np.unique(labels_S[free_slides(cohort)])
    problems = []
    for part in rounds:
        absent = np.setdiff1d(everyone, labels_S[(part.roles_S == TEST) & free_slides(cohort)])
        if len(absent):
            problems.append(
                f"{part.name}: no slide of class {name_some(cohort.classes[c] for c in absent)}: no division of the "
                "sites was found that has every class in every fold: use fewer study.folds, or "
                "study.site_preserving=false"
            )
    return problems
