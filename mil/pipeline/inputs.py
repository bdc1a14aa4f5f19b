"""Whether what a run is continued with is what it was made of: rows of the cohort, and features."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from extract.cohort import Cohort, read_cohort
from extract.config import ConfigError, Tables, main_table, table_files
from extract.features.errors import CacheError
from extract.features.folder import FeatureFolder
from extract.features.joined import open_features
from extract.features.layouts.layout import LayoutError
from extract.features.parquet import COHORT_FILE
from extract.wording import count
from mil.config import StudyConfig
from mil.pipeline.folder import run_folder
from mil.pipeline.reviewed import reasons_of
from mil.study.saved import mismatches, read_members, read_roles
from mil.study.units import COLUMN, as_patients, bag_of_slides, disagreements
from mil.training.checks import read_headers
from mil.training.inputs import changed_inputs

WHAT_TO_DO = "Restore what it was made of; or set out=OTHER for a study of what is there now, or overwrite=true"


def refuse_other_features(config: StudyConfig, identities: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError if a run that is resumed was begun with other features of the same slides."""
    _refuse(config, changed_inputs(run_folder(config, config.model.names[0]), identities))


def refuse_other_inputs(config: StudyConfig) -> None:
    """The same for a finished run, and its cohort: slides, patients, labels, splits. What is gone cannot be compared.

    Raises:
        ConfigError: all that has changed.
        ProblemsError: the cohort cannot be read any more, or a table of the run is damaged.
    """
    csv, folder = cohort_file(config), run_folder(config, config.model.names[0])
    if not all(path.exists() for path in table_files(csv)):
        _say(f"{csv} is gone: what the run was made of could not be compared with it")
        return
    cohort = _read(config, csv)
    features = _features(config)
    roles = read_roles(folder, read_members(folder))
    known = bag_of_slides(roles)
    cohort = cohort.named_as(known if features is None else {*known, *features.slides})
    cohort = _used(config, cohort, set(known), features)
    problems = disagreements(cohort) if COLUMN in roles else []
    problems += [] if problems else mismatches(roles, as_patients(cohort)[0] if COLUMN in roles else cohort)
    there = [slide for slide in known if features is not None and slide in features.slides]
    if len(there) < len(known):
        _say(f"features of {count(len(known) - len(there), 'slide')} of the run are not there any more: not compared")
    _refuse(config, problems + changed_inputs(folder, _identities(features, there)))


def cohort_file(config: StudyConfig) -> Path | Tables:
    """The CSV that the study reads; of imports and the quickstart the one that they wrote."""
    if config.data.source == "cohort":
        assert config.cohort is not None
        return config.cohort
    return (config.features.folder or Path("cache") / config.data.source) / COHORT_FILE


def _read(config: StudyConfig, csv: Path | Tables) -> Cohort:
    if config.data.source == "cohort":
        return read_cohort(csv, config.columns, config.class_names, target=config.task.target)
    return read_cohort(csv, classes=config.class_names or config.data.label_names or None)


def _features(config: StudyConfig) -> FeatureFolder | None:
    folder = config.features.folder or main_table(cohort_file(config)).parent
    try:
        layout = config.features.layout if config.data.source == "cohort" else "cache"
        return open_features(config.features, layout, folder=folder)
    except LayoutError:
        return None


def _used(config: StudyConfig, cohort: Cohort, known: set[str], features: FeatureFolder | None) -> Cohort:
    """The slides that a study of this cohort would use: with checks.missing=drop, not those without features."""
    left_out = reasons_of(config.reviews)
    new = [slide for slide in cohort.table["slide"] if slide not in known and slide not in left_out]
    if config.checks.missing == "drop":
        new = [] if features is None else list(read_headers(new, features)[0])
    return cohort.subset(cohort.table["slide"].isin(known | set(new)).to_numpy())


def _identities(features: FeatureFolder | None, slides: Iterable[str]) -> Iterator[tuple[str, str]]:
    for slide in slides:
        assert features is not None
        try:
            yield slide, features.identity(slide)
        except CacheError as error:
            _say(f"slide {slide!r}: {error}: not compared")


def _refuse(config: StudyConfig, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"resume: {config.out} was made of other data. {WHAT_TO_DO}", problems)


def _say(what: str) -> None:
    print(f"note: {what}", file=sys.stderr)
