"""The first chapter: cohort, features, checks and plan; everything that is fixed before training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from extract.cohort import Cohort, read_cohort
from extract.config import ConfigError, ProblemsError
from extract.features.cache import SUFFIX, Header
from extract.features.folder import FeatureFolder, open_feature_folder
from extract.features.joined import JoinedFolder, open_features
from extract.features.parquet import import_parquet
from extract.quickstart import make_quickstart
from extract.room import refuse_without_room
from mil.aggregators import aggregator_class
from mil.config import StudyConfig, model_options
from mil.config import Task as TaskConfig
from mil.pipeline.chosen import with_choices
from mil.pipeline.folder import Place, run_folder, write_run_folder
from mil.pipeline.inputs import refuse_other_features
from mil.pipeline.provenance import describe_environment
from mil.pipeline.reviewed import with_reviewed, without_reviewed
from mil.study.covariates import KEY as COVARIATES
from mil.study.covariates import Covariate, found_in, raw_columns
from mil.study.covariates import notes_on as notes_on_covariates
from mil.study.covariates import problems_of as covariate_problems
from mil.study.fingerprint import Choice
from mil.study.learning_curve import FOLDER, curve_plan, epochs_of_equal_steps, joined
from mil.study.left_out_sites import LeftOut, joined_all, left_out_plan
from mil.study.nested import Cell, grid_cells, inner_plan, random_cells
from mil.study.permutations import Permuted, Told, permute, with_targets_of
from mil.study.plan import make_plan
from mil.study.problems import notes_on_sites, size_problems
from mil.study.roles import Plan, PlanError
from mil.study.saved import load_plan, save_plan
from mil.study.sites import site_names, site_rows
from mil.study.subgroups import group_problems, wanted_columns
from mil.study.units import COLUMN, Unit, as_patients, slides_of_bags, unit_of
from mil.tasks.contract import Task
from mil.tasks.table import task_of
from mil.training.bags import Bags, load_bags
from mil.training.checks import Checked, CheckError, check_features, check_finite, target_problems
from mil.training.harmonize import harmonize_problems, notes_on_harmonizing
from mil.training.patients import bags_of_patients
from mil.training.warmstart import Start, open_start


@dataclass(frozen=True)
class Study:
    """Everything that is fixed before training: who, what, and which features.

    epochs_M: after how many epochs each member stops; None = all after train.epochs.
    length_M: instead of train.epochs, how long each member's training is as a whole, schedule and all; None = so long.
    `curve`: the members on fewer patients, which follow the study's own in `plan`; `sites_out`: those that leave a
    site out, which follow them. `place`: the run folder, to see whether
    it is still there. `once`: what is made for the first aggregator and serves all others. `permuted`: members on
    permuted labels, not in `plan` unless `labels_MS` says so, which is what each member of `plan` is told; None = the
    cohort's labels. `dropped`: slide, patient and reason of slides left out. `covariates`: of the patients, their
    values are `bags.covariates_SV`. `targets`: the studies of one target each whose members `plan` holds one behind the
    other (`mil.pipeline.targets`); () = all are of this study's.
    """

    config: StudyConfig
    cohort: Cohort
    headers: dict[str, Header]
    bags: Bags
    plan: Plan
    notes: tuple[str, ...]
    environment: dict[str, Any]
    epochs_M: np.ndarray | None = None
    length_M: np.ndarray | None = None
    start: Start | None = None
    curve: Plan | None = None
    place: Place | None = None
    once: dict[str, Any] = field(default_factory=dict)
    permuted: Permuted | None = None
    dropped: pd.DataFrame | None = None
    sites_out: LeftOut | None = None
    labels_MS: np.ndarray | None = None
    targets: tuple[Study, ...] = ()
    task: Task = field(default_factory=lambda: task_of(TaskConfig()))
    covariates: tuple[Covariate, ...] = ()

    def __post_init__(self) -> None:
        if not self.task.classes:  # not given
            object.__setattr__(self, "task", task_of(self.config.task, self.cohort.classes))

    @property
    def sites(self) -> list[str]:
        """The sites of the cohort, in alphabetical order; none where it does not say any."""
        return site_names(self.cohort.table["site"]) if "site" in self.cohort.table else []

    @property
    def widths(self) -> list[int]:
        """Columns of every encoder where each has members of its own (features.fuse=logits); none otherwise."""
        if self.config.features.fuse != "logits":
            return []
        return [part["dim"] for part in self.environment["features"]["parts"]]

    @property
    def site_S(self) -> np.ndarray:
        """The site of every slide, 1..K in the order of `sites`; 0: unknown."""
        return sites_of(self.cohort)

    def check_place(self) -> None:
        """Raise RunFolderError if the run folder was removed or replaced meanwhile."""
        if self.place:
            self.place.check()

    def of(self, name: str) -> Study:
        """The study as one aggregator of the list trains it: with its own settings, on the same folds."""
        config = self.config.for_aggregator(name)
        curve = None if self.curve is None else own_plan(self.curve, config)
        length_M, permuted = curve_length(config, self.plan, curve, len(self.sites_out or ())), self.permuted
        if permuted:
            permuted = replace(permuted, plan=own_plan(permuted.plan, config))
        own: dict[str, Any] = {
            "config": config,
            "plan": own_plan(self.plan, config),
            "curve": curve,
            "length_M": length_M,
        }
        return replace(self, **own, permuted=permuted)

    def with_permuted(self) -> Study:
        """The study with the members on permuted labels behind its own, to be trained together."""
        if self.permuted is None:
            return self
        plan, more, start = self.plan, self.permuted.plan, self.start
        own_MS = np.tile(self.cohort.labels_S, (len(plan), 1))
        length_M = self.length_M
        if length_M is not None:
            length_M = np.concatenate([length_M, np.full(len(more), self.config.train.epochs)])
        if start and start.source_of_M is not None:  # as the study's own members, in the same order
            own = len(more) // self.permuted.n
            tiled = np.tile(start.source_of_M[:own], self.permuted.n)
            start = replace(start, source_of_M=np.concatenate([start.source_of_M, tiled]))
        labels_MS = np.concatenate([own_MS, self.permuted.labels_MS])
        targets = self.asked_with_permuted(plan, [more.subset(self.permuted.rows(k)) for k in range(self.permuted.n)])
        told: dict[str, Any] = {"labels_MS": labels_MS, "length_M": length_M, "start": start, "targets": targets}
        return replace(self, plan=joined(plan, more), **told)

    def asked_with_permuted(self, plan: Plan, plans: Sequence[Plan]) -> tuple[Study, ...]:
        """Whose targets members train on: this study's, then those of each permutation; () where labels say it all.

        plan, plans: the members of each.
        """
        if self.permuted is None or self.task.name == "classification":
            return ()
        own = replace(self, plan=plan, permuted=None)
        more = [replace(own, plan=p, cohort=self.permuted.cohort(self.cohort, k)) for k, p in enumerate(plans)]
        return (own, *more)

    def asked_of(self, members: np.ndarray) -> list[tuple[Study, int]]:
        """Whose target these members (rows of the plan, ascending) train on, and how many each has."""
        parts = self.targets or (self,)
        ends = np.cumsum([len(part.plan) for part in parts]) if self.targets else np.array([len(self.plan)])
        counts = np.bincount(np.searchsorted(ends, members, side="right"), minlength=len(parts)).tolist()
        return [(part, n) for part, n in zip(parts, counts, strict=True) if n]

    @property
    def n_own(self) -> int:
        """Members of `plan` that train on the cohort's own labels: the first ones."""
        return len(self.plan) - (len(self.permuted.plan) if self.permuted and self.labels_MS is not None else 0)


@dataclass(frozen=True)
class Planned:
    """A study that can be trained, before anything of it was written. `cohort`: with slides that have no features."""

    config: StudyConfig
    started: str
    cohort: Cohort
    features: FeatureFolder
    checked: Checked
    task: Task
    plan: Plan
    curve: Plan | None
    permuted: Permuted | None
    start: Start | None
    left_out: list[str]
    sites_out: LeftOut | None = None
    covariates: tuple[Covariate, ...] = ()
    chosen: tuple[Choice, ...] = ()

    @property
    def everyone(self) -> Plan:
        plan = joined(self.plan, self.curve)
        return joined_all([plan, self.sites_out.plan]) if self.sites_out else plan


def prepare(config: StudyConfig, command: Sequence[str]) -> Study:
    """Cohort, features, checks and plan; then, and only then, the run folder and the features in memory."""
    planned = planned_study(config, *open_data(config))
    begin(planned)
    return ready(planned, command, load_usable(config, planned.checked, planned.features))


def planned_study(config: StudyConfig, cohort: Cohort, features: FeatureFolder) -> Planned:
    """Checks and plan; nothing is written."""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    unit, usable = unit_of(config.study.unit, config.task.name), without_reviewed(cohort, config.reviews)
    try:
        checked = check_features(usable, features, missing=config.checks.missing, unit=unit)
    except CheckError as error:
        more = problems_to_come(config, usable)
        raise CheckError(error.title, list(dict.fromkeys([*error.problems, *more]))) from None
    checked = in_units(with_reviewed(checked, cohort, config.reviews), unit)
    if config.resume and not config.overwrite:
        refuse_other_features(config, [(slide, header.identity) for slide, header in checked.headers.items()])
    task = task_of(config.task, checked.cohort.classes).for_cohort(checked.cohort)
    told = told_by(config, task, checked.cohort.classes)
    checked = replace(checked, cohort=task.strata(checked.cohort, max(config.study.folds, config.study.nested)))
    covariates = usable_covariates(config, checked.cohort)
    config, chosen = with_choices(config, checked.cohort, checked.headers)
    plan = plan_of(config, checked)
    first = next(iter(checked.headers.values()))
    left_out = refuse_unbuildable(config, first.dim, task)
    refuse_what_does_not_fit(config, checked)
    own = {name: config.for_aggregator(name) for name in config.model.names}
    one = next(iter(own.values()))
    # refused now, not after the features were read
    curve = curve_plan(plan, checked.cohort, config.study.train_sizes, config.seed)
    everyone = joined(plan, curve)
    if sites_out := left_out_of(config, checked.cohort, plan, len(everyone)):
        everyone = joined_all([everyone, sites_out.plan])
    inner = [inner_plan_of(one, everyone, checked.cohort)] if config.study.nested else []
    refuse_unharmonizable(config, checked.cohort, [everyone, *inner])
    permuted = permuted_of(config, checked, plan, len(everyone), told)
    if permuted and config.study.nested:
        inner_of_permuted(one, permuted, checked.cohort, len(everyone))
    start = open_start(one, checked.cohort, everyone, first.dim, first.provenance.same_kind())
    found = (config, started, cohort, features, checked, task, plan, curve, permuted, start, left_out)
    return Planned(*found, sites_out=sites_out, covariates=covariates, chosen=tuple(chosen))


def problems_of_target(config: StudyConfig, cohort: Cohort) -> list[str]:
    """What is wrong with numbers or times, for the folds, and with covariates: to be told with what else is wrong.

    Of classes nothing: folds are about those that a table without mistakes has.
    """
    return (target_problems(cohort) if cohort.target != "class" else []) + problems_to_come(config, cohort)


def problems_to_come(config: StudyConfig, cohort: Cohort) -> list[str]:
    """Of folds of numbers or times, and of covariates."""
    problems, study = list[str](), config.study
    if cohort.target != "class" and not study.folds_csv:
        problems += size_problems(cohort, study.folds, study.val_fraction)
    names = [name for name in config.columns.covariates if cohort.further is not None and name in cohort.further]
    if names and cohort.further is not None:
        problems += covariate_problems(found_in(cohort.further, names), cohort.table, cohort.further)
    return problems


def in_units(checked: Checked, unit: Unit) -> Checked:
    """With a row a bag."""
    if unit == "slide":
        return checked
    cohort, notes = as_patients(checked.cohort)
    return replace(checked, cohort=cohort, notes=[*notes, *checked.notes])


def refuse_what_does_not_fit(config: StudyConfig, checked: Checked) -> None:
    """Raise ConfigError where a limit (ulimit -v, a control group's) leaves less than the features that must be in
    memory, which are those of a step at least; how many members train together is chosen by what is free.
    """
    headers = checked.headers.values()
    sizes = sorted(h.n_tiles * h.dim * np.dtype(h.dtype).itemsize for h in headers)
    whole = config.data.memory == "ram"
    needed = sum(sizes) if whole else sum(sizes[-config.train.batch_size :])
    advice = "raise the limit, or set data.memory=mmap" if whole else "raise the limit, or lower train.batch_size"
    refuse_without_room(needed, "training", advice)


def begin(planned: Planned) -> None:
    """The run folder."""
    config, cohort = planned.config, planned.checked.cohort
    plans = {name: own_plan(planned.plan, config.for_aggregator(name)) for name in config.model.names}
    write_run_folder(config, plans, cohort, planned.checked.headers)


def ready(planned: Planned, command: Sequence[str], bags: Bags) -> Study:
    """The study with its features, and what is told of it."""
    config, checked, everyone = planned.config, planned.checked, planned.everyone
    start, curve, task = planned.start, planned.curve, planned.task
    if config.train.harmonize == "combat":
        bags = replace(bags, site_S=sites_of(checked.cohort))
    if planned.covariates and checked.cohort.further is not None:
        bags = replace(bags, covariates_SV=raw_columns(planned.covariates, checked.cohort.further))
    environment = describe_environment(config, command, planned.features, checked) | {"started": planned.started}
    if planned.chosen:
        environment["chosen"] = {c.key: {"value": c.value, "why": c.why} for c in planned.chosen}
    notes = [
        *map(str, planned.chosen),
        *planned.cohort.notes,
        *checked.notes,
        *notes_on_sites(checked.cohort, config.study.site_preserving),
        *planned.left_out,
    ]
    if checked.cohort.further is not None:
        notes += notes_on_covariates(planned.covariates, checked.cohort.table, checked.cohort.further)
    if isinstance(planned.features, JoinedFolder):
        notes += planned.features.notes(list(checked.headers))
    if config.train.harmonize != "none":
        site_S = sites_of(checked.cohort)
        notes += notes_on_harmonizing(everyone.uses("train"), everyone.uses("test"), site_S, config.train.harmonize)
    if start:
        start.save(run_folder(config, config.model.names[0]))
        notes, environment = [*start.notes, *notes], environment | {"init": start.origin}
    if curve:
        for name in config.model.names:
            own = own_plan(curve, config.for_aggregator(name))
            save_plan(own, checked.cohort, run_folder(config, name) / FOLDER)
    fixed = (config, checked.cohort, checked.headers, bags, everyone, tuple(notes), environment)
    dropped = checked.dropped.merge(planned.cohort.table[["slide", "patient"]], on="slide", how="left")
    more: dict[str, Any] = {"place": Place.of(config), "dropped": dropped, "permuted": planned.permuted, "task": task}
    more |= {"sites_out": planned.sites_out, "covariates": planned.covariates}
    return Study(*fixed, start=start, curve=curve, **more)


def usable_covariates(config: StudyConfig, cohort: Cohort) -> tuple[Covariate, ...]:
    """What `columns.covariates` names; refused where a column says nothing, or names the patient."""
    if not config.columns.covariates or cohort.further is None:
        return ()
    found = found_in(cohort.further, config.columns.covariates)
    problems = covariate_problems(found, cohort.table, cohort.further)
    if problems:
        raise ConfigError("covariates cannot be used", problems)
    return tuple(found)


def sites_of(cohort: Cohort) -> np.ndarray:
    """The site of every slide, 1..K in alphabetical order; 0: unknown."""
    site_S = cohort.table.get("site", [""] * len(cohort))
    return site_rows(site_S, site_names(site_S))


def refuse_unharmonizable(config: StudyConfig, cohort: Cohort, plans: Sequence[Plan]) -> None:
    """Where `train.harmonize` cannot be fitted to the training slides of every member."""
    if config.train.harmonize != "none":
        train_MS = np.concatenate([plan.uses("train") for plan in plans])
        problems = harmonize_problems(train_MS, sites_of(cohort), cohort.labels_S, config.train.harmonize)
        if problems:
            raise ConfigError("train.harmonize is impossible", problems)


def curve_length(config: StudyConfig, everyone: Plan, curve: Plan | None, after: int = 0) -> np.ndarray | None:
    """Epochs of every member where those of `curve` train longer, to take as many steps; `after`: members behind."""
    if curve is None or config.study.train_sizes_equal == "epochs":
        return None
    full = everyone.subset(np.arange(len(everyone) - after - len(curve)))
    length_M = epochs_of_equal_steps(full, curve, config.train.epochs, config.train.batch_size)
    return np.concatenate([length_M, np.full(after, config.train.epochs)])


def left_out_of(config: StudyConfig, cohort: Cohort, plan: Plan, first: int) -> LeftOut | None:
    """The members that `study.leave_one_site_out` adds."""
    study = config.study
    if not study.leave_one_site_out:
        return None
    how: dict[str, Any] = {"val_fraction": study.val_fraction, "split_seed": config.seed}
    return left_out_plan(plan, cohort, first=first, site_preserving=study.site_preserving, **how)


def open_data(config: StudyConfig) -> tuple[Cohort, FeatureFolder]:
    """The cohort and its features, imported or made first where the config asks for it."""
    data = config.data
    if data.source == "cohort":
        cohort = cohort_of(config)
        features = features_of(config, cohort)
        return told(cohort.named_as(features.slides)), features
    folder = config.features.folder or Path("cache") / data.source
    if data.source == "quickstart":
        csv = make_quickstart(folder)
    else:
        csv = import_parquet(
            folder,
            root=data.root,
            hub=data.hub,
            revision=data.revision,
            files={"train": data.train_files, "test": data.test_files},
            label_names=data.label_names or None,
            dtype=config.features.dtype,
        )
    cohort = read_cohort(csv, classes=config.class_names or data.label_names or None, **wanted_of(config))
    return cohort, open_feature_folder(folder, "cache", verify=config.checks.verify)


def told(cohort: Cohort) -> Cohort:
    """The cohort, after what was done to its table was said on the terminal."""
    for note in cohort.notes:
        print(f"note: {note}")
    return cohort


def cohort_of(config: StudyConfig) -> Cohort:
    """The cohort of a table."""
    assert config.cohort is not None
    further = wanted_of(config)
    early = partial(problems_of_target, config)
    fixed = (config.cohort, config.columns, config.class_names)
    cohort = read_cohort(*fixed, target=config.task.target, also=early, **further)
    if config.slides.folder is None or config.features.folder is None:
        return cohort
    from extract.extraction.todo import named_as_files  # with OpenSlide

    return named_as_files(config, cohort)


def features_of(config: StudyConfig, cohort: Cohort | None = None) -> FeatureFolder:
    """The features of a cohort, extracted first where slides are configured."""
    if config.features.folder is None:
        raise ConfigError("no features", ["features.folder: set it to the folder of feature files"])
    extract_missing(config, without_reviewed(cohort or cohort_of(config), config.reviews))
    return open_features(config.features, verify=config.checks.verify)


def wanted_of(config: StudyConfig) -> dict[str, Any]:
    """The further columns of the cohort that the config asks for, and their check."""
    given, covariates = config.report.subgroups, dict.fromkeys(config.columns.covariates, COVARIATES)
    return {"further": wanted_columns(given) | covariates, "check": partial(group_problems, given)}


def extract_missing(config: StudyConfig, cohort: Cohort) -> None:
    """Where slides are configured (slides.folder, or paths in the CSV): extract those that have no features yet.

    Slides that fail are listed in failed.csv and on the terminal; `check_features` then says what that means for the
    study. When nothing is missing no encoder is loaded and no slide is opened.
    """
    folder = config.features.folder
    assert folder is not None
    if not extracts_here(config, cohort):
        return
    missing = [slide for slide in cohort.table["slide"] if not (folder / f"{slide}{SUFFIX}").exists()]
    if not missing:
        return
    from extract.encoders.table import EncoderError  # OpenSlide, timm: only where there is something to extract
    from extract.extraction.anywhere import extract_anywhere
    from extract.extraction.readers import ReaderError
    from extract.extraction.todo import cohort_slides
    from extract.run import summary_text

    print(f"{len(missing)} of {len(cohort)} slides have no features in {folder}: {config.encoder.name} makes them")
    try:
        summary = extract_anywhere(config, cohort_slides(config, cohort), wait_for_others=True)
    except (EncoderError, ReaderError) as error:
        raise ConfigError("features cannot be extracted", [str(error)]) from None
    print(summary_text(summary, folder))


def extracts_here(config: StudyConfig, cohort: Cohort) -> bool:
    """Whether slides are configured, and the features folder is this toolkit's own (or still empty).

    Several folders are read as they are: each has an encoder of its own.
    """
    folder = config.features.folder
    if config.features.more:
        return False
    if config.slides.folder is not None:
        return True
    if not cohort.table["path"].fillna("").ne("").any() or config.features.layout not in ("auto", "cache"):
        return False
    if folder is None or not folder.exists() or not any(folder.glob("[!.]*")):
        return True
    return open_feature_folder(folder, config.features.layout).layout == "cache"


def plan_of(config: StudyConfig, checked: Checked) -> Plan:
    """The plan of a run that is resumed, else a new one."""
    first = run_folder(config, config.model.names[0])
    if config.resume and (first / "plan.csv").exists():
        return load_plan(first, checked.cohort)
    return new_plan(config, checked, checked.cohort)


def told_by(config: StudyConfig, task: Task, classes: tuple[str, ...]) -> Told:
    """What makes the cohort of a permutation: the targets handed on, and the strata that follow from them.

    classes: of the cohort before it was stratified.
    """
    if task.name == "classification":
        return with_targets_of
    columns = tuple(dict.fromkeys([*task.targets, "label"]))

    def told(cohort: Cohort, source_S: np.ndarray) -> Cohort:
        moved = with_targets_of(cohort, source_S, columns)
        plain = replace(moved, table=moved.table.drop(columns="stratum", errors="ignore"), classes=classes)
        return task.strata(plain, max(config.study.folds, config.study.nested))

    return told


def permuted_of(config: StudyConfig, checked: Checked, plan: Plan, first: int, told: Told) -> Permuted | None:
    """The members on permuted labels that `report.permutations` asks for, with a line about what they cost."""
    n = config.report.permutations
    if not n:
        return None
    also = ", each with its inner members," if config.study.nested else ""
    print(f"permutation test: {n:,} x {len(plan)} members on permuted labels{also} as costly as {n:,} such studies")
    fixed = plan if config.study.folds_csv else None
    return permute(
        checked.cohort, partial(new_plan, config, checked), n, config.seed, first=first, fixed=fixed, told=told
    )


def new_plan(config: StudyConfig, checked: Checked, cohort: Cohort) -> Plan:
    """The plan that the config makes of this cohort."""
    study, one = config.study, config.for_aggregator(config.model.names[0])
    return make_plan(
        cohort,
        folds=study.folds,
        repeats=study.repeats,
        seeds=study.seeds,
        val_fraction=study.val_fraction,
        folds_csv=study.folds_csv,
        lr=learning_rate(one),
        weight_decay=one.train.weight_decay,
        split_seed=config.seed,
        dropped=checked.dropped["slide"].tolist(),
        site_preserving=study.site_preserving,
    )


def own_plan(plan: Plan, config: StudyConfig) -> Plan:
    """The plan with learning rate and weight decay of one aggregator's config."""
    return plan.trained_with(learning_rate(config), config.train.weight_decay)


def learning_rate(config: StudyConfig) -> float:
    """Of a config for one aggregator (`StudyConfig.for_aggregator`), which always says it."""
    assert config.train.lr is not None
    return config.train.lr


def refuse_unbuildable(config: StudyConfig, in_dim: int, task: Task) -> list[str]:
    """What only the aggregators themselves can say about their options, before anything is written.

    Returns what a task other than classification leaves out of them, as notes.
    """
    problems: list[str] = []
    notes: list[str] = []
    for name in config.model.names:
        try:
            built = aggregator_class(name)(in_dim, task.n_outputs(), [0], **model_options(config.model, name))
            if task.name != "classification" and built.left_out():
                notes.append(f"{name}: {built.left_out()}; it is left out, and the task's loss is on the logits alone")
        except ValueError as error:
            problems += [f"{name}: {problem}" for problem in str(error).splitlines()]
    if problems:
        raise ConfigError("problems in the config", problems)
    return notes


def inner_plan_of(config: StudyConfig, plan: Plan, cohort: Cohort) -> Plan:
    """The inner members of nested cross-validation: the same whenever the study is resumed."""
    study = config.study
    return inner_plan(plan, cohort, study.nested, cells_of(config), config.seed, site_preserving=study.site_preserving)


def inner_of_permuted(config: StudyConfig, permuted: Permuted, cohort: Cohort, first: int) -> tuple[Plan, np.ndarray]:
    """The inner members of every permutation, dealt by its own labels, and what each is told of the slides (M, S).

    first: the row of the first permuted member among all outer members.
    """
    parts, labels, size = [], [], len(permuted.plan) // permuted.n
    for k in range(permuted.n):
        rows = np.arange(k * size, (k + 1) * size)
        try:
            inner = inner_plan_of(config, permuted.plan.subset(rows), permuted.cohort(cohort, k))
        except PlanError as error:
            raise PlanError(f"permutation {k + 1} of {permuted.n}: {error.title}", error.problems) from None
        outer = inner.members["outer_member"] + first + k * size
        parts.append(Plan(inner.members.assign(outer_member=outer), inner.roles_MS))
        labels.append(np.tile(permuted.labels_MS[k * size], (len(inner), 1)))
    return joined_all(parts), np.concatenate(labels)


def cells_of(config: StudyConfig) -> list[Cell]:
    """What nested cross-validation of one aggregator chooses from: the grid, or the draws; else what `train` says."""
    study, rate, fixed = config.study, learning_rate(config), config.train.weight_decay
    if study.search == "grid":
        return grid_cells(study.grid.lr or [rate], study.grid.weight_decay or [fixed])
    lr, decay = study.ranges.lr or [rate] * 2, study.ranges.weight_decay or [fixed] * 2
    return random_cells((lr[0], lr[1]), (decay[0], decay[1]), study.budget, config.seed)


def load_usable(config: StudyConfig, checked: Checked, features: FeatureFolder) -> Bags:
    """`load`, each slide whole and finite, as bags of patients where those are the rows of the cohort; otherwise the
    new run folder goes again and all problems are named."""
    try:
        bags = load(config, checked, features)
        problems = check_finite(bags.slides, bags)
        if problems:
            raise ConfigError("features cannot be used", problems)
    except ProblemsError:
        shutil.rmtree(config.out) if config.out and not config.resume else None
        raise
    table = checked.cohort.table
    if COLUMN not in table:
        return bags
    ends = [0, *accumulate(len(slides) for slides in slides_of_bags(table))]
    return bags_of_patients(bags, table["slide"].tolist(), [range(*two) for two in pairwise(ends)])


def load(config: StudyConfig, checked: Checked, features: FeatureFolder) -> Bags:
    """The features of the checked slides (of patients one behind the other), in memory or memory-mapped, with a line
    about their size."""
    slides = [slide for own in slides_of_bags(checked.cohort.table) for slide in own]
    headers = [checked.headers[slide] for slide in slides]
    lengths, dtypes = [h.n_tiles for h in headers], [h.dtype for h in headers]
    with tqdm(total=len(slides), desc="features", unit="slide", disable=None, leave=False) as bar:
        bags = load_bags(
            features,
            slides,
            lengths,
            dtypes,
            headers[0].dim,
            config.data.memory,
            progress=lambda done: bar.update(1),
            identities=[header.identity for header in headers],
        )
    print(
        f"{len(slides)} slides, {len(set(checked.cohort.table['patient']))} patients, {sum(lengths):,} tiles x "
        f"{bags.dim} ({bags.nbytes / 1e9:.2f} GB, {'in memory' if bags.memory == 'ram' else 'memory-mapped'})"
    )
    return bags
