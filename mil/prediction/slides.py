"""Which slides are predicted, which of their patients the study knows, and their extraction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from extract.cohort import Cohort, CohortError, check_cohort, read_cohort
from extract.config import Columns, ConfigError, ExtractConfig, Features, ProblemsError, Tables, did_you_mean
from extract.extraction.todo import cohort_slides, named_as_files
from extract.extraction.work import extract_cohort
from extract.joining import BARCODE, TCGA, header_of, read_rows
from extract.stores.looking import is_dir, is_file
from extract.tables import TableError
from extract.wording import count
from mil.prediction.fast import selector_for
from mil.prediction.job import Failure, Job
from mil.prediction.likeness import extraction_config
from mil.results.trained import TrainedStudy
from mil.study.covariates import KEY as COVARIATES
from mil.study.covariates import cell_problems, notes_on_new
from mil.study.subgroups import group_problems, parse, wanted_columns
from mil.study.units import as_patients, disagreements, slides_of_bags

TRAINED_ON, HELD_OUT, UNUSED = "train", "test", "unused"
"""What the study did with a slide's patient: trained or selected on it, held it out, had it and left it aside."""


def slides_to_predict(job: Job) -> Cohort:
    """The table of new slides; its split is "test" for all.

    Raises:
        ProblemsError: the CSV or a folder is wrong.
    """
    config = job.config
    refuse_without_covariates(job)
    if config.cohort is not None:
        return read_new_cohort(job, config.cohort)
    if config.slide is not None:
        return _table(job, [one_slide(job, config.slide)])
    if config.slides.folder is not None:
        found = cohort_slides(ExtractConfig(slides=config.slides, features=Features(folder=job.features_folder)))
        return _table(job, [(file.slide, str(file.path)) for file in found])
    there = job.open_features(config.features.layout).slides
    return _table(job, [(slide, None) for slide in there])


def one_slide(job: Job, name: str) -> tuple[str, str | None]:
    """Slide id and file; no file where `name` is the id of a slide whose features are there."""
    path = Path(name).expanduser()
    if is_file(path):
        return path.stem, str(path)
    if is_dir(path):
        raise ConfigError("no such slide", [f"slide={name}: is a folder; use slides.folder={name}"])
    if job.config.features.folder is None:
        raise ConfigError("no such slide", [f"slide={name}: no such file"])
    features = job.open_features(job.config.features.layout)
    if name not in features.slides:
        hint = did_you_mean(name, list(features.slides))
        raise ConfigError(
            "no such slide", [f"slide={name}: no such file, and no features of it in {features.folder}{hint}"]
        )
    return name, None


def _table(job: Job, rows: Iterable[tuple[str, str | None]]) -> Cohort:
    table = pd.DataFrame(rows, columns=["slide", "path"])
    table = table.assign(patient="", label=None, split="test", mpp=np.nan)
    table = table.assign(**{name: np.nan for name in job.trained.task.targets if name != "label"})
    table = with_patients(job, table, "no table of slides")
    return check_cohort(table, job.trained.classes, target=job.trained.config.task.target)


def with_patients(job: Job, table: pd.DataFrame, why: str) -> pd.DataFrame:
    """The table with a patient in every row: where it says none, that of the slide's TCGA barcode, else the slide."""
    patients, n_unknown = [], 0
    for patient, slide in zip(table["patient"], table["slide"], strict=True):
        patients.append(patient or barcode(slide) or slide)
        n_unknown += not (patient or barcode(slide))
    if n_unknown:
        job.notes.append(
            f"{count(n_unknown, 'slide')} without a patient ({why}): each counts as its own, so intervals may be too "
            "narrow and what the study knows is only found by slide name"
        )
    return table.assign(patient=pd.Series(patients, index=table.index, dtype=object))


def barcode(slide: str) -> str:
    """The patient in the slide's TCGA barcode, "" if its name is none."""
    found = BARCODE.match(slide)
    return found[0].upper() if found else ""


def read_new_cohort(job: Job, path: Path | Tables) -> Cohort:
    """The CSV's slides. Patient and label may be missing; its splits are of no concern: all are predicted."""
    columns = columns_of(job.config.columns, job.trained.config.columns, path)
    job.groupings.extend(groupings_of(job, columns, path))
    covariates, check = wanted_covariates(job.trained, path)
    cohort = read_cohort(
        path,
        columns.model_copy(update={"split": ""}),
        job.trained.classes,
        labelled=False,
        further=covariates | wanted_columns(job.groupings),
        check=lambda further: [*check(further), *group_problems(job.groupings, further)],
        target=job.trained.config.task.target,
    )
    if not len(cohort):
        raise CohortError("problems in the cohort", [f"{path}: no rows"])
    if job.config.features.folder is not None and job.config.slides.folder is None:
        cohort = cohort.named_as(job.open_features(job.config.features.layout).slides)
    else:
        settings = ExtractConfig(slides=job.config.slides, features=Features(folder=job.features_folder))
        cohort = named_as_files(settings, cohort)
    job.notes.extend(cohort.notes)
    if cohort.further is not None:
        job.notes.extend(notes_on_new(job.trained.covariates, cohort.further))
    table = with_patients(job, cohort.table.assign(split="test"), f"columns.patient={columns.patient}")
    return replace(cohort, table=table)


def groupings_of(job: Job, columns: Columns, path: Path | Tables) -> list[str]:
    """`report.subgroups`; not given, the study's that this table can be divided by, with a note on the others."""
    if job.config.report.subgroups is not None:
        return job.config.report.subgroups
    kept, (found, _) = [], read_rows(path, columns)
    for said in job.trained.config.report.subgroups:
        column = parse(said).column
        column = columns.site if column == "site" else column
        cells = found[[column]].rename(columns={column: parse(said).column}) if column in found else None
        if cells is not None and not group_problems([said], cells):
            kept.append(said)
        else:
            why = f"{path} has no such column" if cells is None else "its cells in this table cannot be used"
            job.notes.append(f"the study's sub-groups by {said} are left out: {why}")
    return kept


def wanted_covariates(
    trained: TrainedStudy, path: Path | Tables
) -> tuple[dict[str, str], Callable[[pd.DataFrame], list[str]]]:
    """The columns that the study's covariates need, and what checks their cells."""
    wanted = dict.fromkeys((one.name for one in trained.covariates), f"{COVARIATES} of the study")

    def check(further: pd.DataFrame) -> list[str]:
        there = [one for one in trained.covariates if one.name in further]
        return cell_problems(there, further, str(path))

    return wanted, check


def refuse_without_covariates(job: Job) -> None:
    """Raise ConfigError where the study needs to know more of a patient than its slides, and there is no table."""
    names = [one.name for one in job.trained.covariates]
    if names and job.config.cohort is None:
        listed = ", ".join(names)
        problem = f"the study was trained with covariates; give cohort=FILE.csv with columns slide, {listed}"
        raise ConfigError("no covariates", [problem])


def columns_of(given: Columns, study: Columns, path: Path | Tables) -> Columns:
    """Names of the CSV's columns: as given, else the study's where the CSV has them, else the standard ones.

    Raises:
        CohortError: a column that was asked for is not there.
    """
    try:
        header = header_of(path)
    except TableError as error:
        raise CohortError("cohort cannot be read", error.problems) from None
    own = {role: name for role, name in given if name != getattr(Columns(), role) and role != "covariates"}
    absent = [
        f"{path}: no column {name!r} (columns.{role}){did_you_mean(name, header)}. It has: {', '.join(header)}"
        for role, name in own.items()
        if name not in header and not (name == TCGA and role in ("patient", "site"))
    ]
    if absent:
        raise CohortError("problems in the cohort", absent)
    of_study = {role: name for role, name in study if role != "covariates" and name in header and role not in own}
    return given.model_copy(update=of_study)


def bags_to_predict(job: Job, cohort: Cohort, usable: Collection[str]) -> Cohort:
    """The cohort as the study's members take it: with a row a patient (of slides with usable features) where that is a
    bag (study.unit).

    Raises:
        ProblemsError: slides of a patient that is one bag have different labels.
    """
    if job.trained.unit == "slide":
        return cohort
    problems = disagreements(cohort)
    if problems:
        raise ProblemsError("the study's bags are patients", problems)
    bags, notes = as_patients(cohort.subset(cohort.table["slide"].isin(list(usable)).to_numpy()))
    job.notes.extend(notes)
    return bags


def patients_in_study(trained: TrainedStudy, cohort: Cohort) -> list[str]:
    """For every slide what the study did with its patient, or with a slide of that name; "" = knows neither."""
    roles = trained.roles[[f"m{member}" for member in trained.plan["member"]]]
    used = roles.isin(["train", "val"]).any(axis=1)
    held_out = (roles == "test").any(axis=1)
    role_S = np.where(used, TRAINED_ON, np.where(held_out, HELD_OUT, UNUSED))
    rank = ("", UNUSED, HELD_OUT, TRAINED_ON).index
    known: dict[tuple[str, str], str] = {}
    for patient, slides, role in zip(trained.roles["patient"], slides_of_bags(trained.roles), role_S, strict=True):
        for of in [("patient", patient), *(("slide", slide) for slide in slides)]:
            known[of] = max(known.get(of, ""), role, key=rank)
    found = []
    for patient, slides in zip(cohort.table["patient"], slides_of_bags(cohort.table), strict=True):
        names = [("patient", patient)]
        names += [name for slide in slides for name in (("patient", barcode(slide)), ("slide", slide))]
        found.append(max((known.get(name, "") for name in names), key=rank))
    return found


def files_are_given(job: Job, cohort: Cohort) -> bool:
    """Whether there are slide files to extract: a single one, a folder, or paths in a CSV without features.folder."""
    config = job.config
    if config.slide is not None:
        return bool(cohort.table["path"].notna().all())
    if config.slides.folder is None and config.features.folder is None and cohort.table["path"].isna().all():
        raise ConfigError(
            "no features",
            [
                f"{config.cohort}: names no slide files (columns.path); set features.folder=FOLDER of features, "
                "or slides.folder=FOLDER of slides"
            ],
        )
    return config.slides.folder is not None or config.features.folder is None


def extract(job: Job, cohort: Cohort) -> None:
    """Extract what is not there yet, the way the study's features were, with all its encoders; slides that fail go to
    `job.failed`.

    Raises:
        ProblemsError: the study does not say how, its weights are not at hand, or other features are in the way.
        EncoderError, ReaderError: the encoder cannot be had, readers cannot be started.
    """
    parts = enumerate(job.feature_folders)
    every = [extraction_config(job.config, job.trained.of_part(i), folder, job.notes) for i, folder in parts]
    job.notes[:] = list(dict.fromkeys(job.notes))  # what is true of several encoders is said once
    if job.config.fast:
        every = [with_choice(job, settings) for settings in every]
    for settings in every:
        extract_one(job, cohort, settings)


def with_choice(job: Job, settings: ExtractConfig) -> ExtractConfig:
    """Only the tiles that a coarse look chooses; job.notes says what that costs.

    Raises:
        ConfigError: it costs more than allowed, or that cannot be measured.
    """
    path, trial = selector_for(job.config, job.trained)
    job.notes.append(trial.said)
    chosen = {"select": path, "select_keep": job.config.select.keep, "select_random": job.config.select.random}
    return settings.model_copy(update={"tiles": settings.tiles.model_copy(update=chosen)})


def extract_one(job: Job, cohort: Cohort, settings: ExtractConfig) -> None:
    """With one encoder."""
    files = cohort_slides(settings, cohort)
    print(f"extracting {count(len(files), 'slide')} with {settings.encoder.name} into {settings.features.folder}")
    try:
        summary = extract_cohort(settings, files, wait_for_others=True)
    except ProblemsError as error:
        what, made_otherwise, _ = error.title.partition(" that were made otherwise")
        if not made_otherwise:
            raise
        advice = "; set features.folder=OTHER, or extract.overwrite=true to make them anew"  # overwrite= means OUT here
        raise ProblemsError(what + made_otherwise + advice, error.problems) from None
    known = {failure.slide for failure in job.failed}
    new = [failed for failed in summary.failed if failed.slide not in known]
    job.failed.extend(Failure(failed.slide, failed.stage, failed.reason) for failed in new)
