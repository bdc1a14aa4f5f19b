"""Settings that are `auto`: the config with what the cohort's fingerprint makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from extract.cohort import Cohort
from extract.features.cache import Header
from mil.config import StudyConfig
from mil.study.fingerprint import Choice, Fingerprint, choose
from mil.study.roles import free_slides
from mil.study.units import slides_of_bags


def fingerprint_of(config: StudyConfig, cohort: Cohort, headers: Mapping[str, Header]) -> Fingerprint:
    """Of a checked cohort that has its classes or strata; training slides are those of one member, about."""
    tiles_S = np.array([sum(headers[slide].n_tiles for slide in own) for own in slides_of_bags(cohort.table)])
    labels_S, study = cohort.labels_S[free_slides(cohort)], config.study
    share = (1 - 1 / study.folds if study.folds > 1 else 1.0) * (1 - study.val_fraction)
    counts = np.bincount(labels_S[labels_S >= 0], minlength=len(cohort.classes))
    slides_C = [round(float(n) * share) for n in counts]
    there = [(n, name) for n, name in zip(slides_C, cohort.classes, strict=False) if n]
    rare = str(min(there)[1]) if there else ""
    return Fingerprint(tiles_S, slides_C, next(iter(headers.values())).dim, rare)


def with_choices(
    config: StudyConfig, cohort: Cohort, headers: Mapping[str, Header]
) -> tuple[StudyConfig, list[Choice]]:
    """The config with a value for each key that is `auto`, and why; on the terminal too."""
    if not config.auto:
        return config, []
    print_of = fingerprint_of(config, cohort, headers)
    given = {"train.batch_size": config.train.batch_size, "train.epochs": config.train.epochs}
    chosen = choose(config.auto, given, print_of)
    for choice in chosen:
        print(choice)
    return with_values(config, {choice.key: choice.value for choice in chosen}), chosen


def with_shared_choices(
    config: StudyConfig, cohorts: Mapping[str, Cohort], headers: Mapping[str, Header]
) -> tuple[StudyConfig, list[Choice]]:
    """`with_choices` of many targets, which train together: by the one that has the most slides to train on."""
    if not config.auto:
        return config, []
    prints = {target: fingerprint_of(config, cohort, headers) for target, cohort in cohorts.items()}
    largest = max(prints, key=lambda target: prints[target].n_train)
    given = {"train.batch_size": config.train.batch_size, "train.epochs": config.train.epochs}
    by = f" (for all targets, by {largest}, which has the most training slides)"
    chosen = [one._replace(why=one.why + by) for one in choose(config.auto, given, prints[largest])]
    for choice in chosen:
        print(choice)
    return with_values(config, {choice.key: choice.value for choice in chosen}), chosen


def with_values(config: StudyConfig, values: Mapping[str, Any]) -> StudyConfig:
    """The config with these values for dotted keys of its sections."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def as_chosen_before(config: StudyConfig) -> StudyConfig:
    """A config that resumes a run, with what was chosen when that began."""
    assert config.out is not None
    before = config.out / "config.yaml"
    if not (config.auto and config.resume and before.exists()):
        return config
    tree = yaml.safe_load(before.read_text(encoding="utf-8"))
    if sorted(tree.get("auto") or []) != sorted(config.auto):
        return config
    return with_values(config, {key: tree[key.partition(".")[0]][key.partition(".")[2]] for key in config.auto})
