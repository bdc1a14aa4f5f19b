"""One study from config to report, in the order things happen: data, checks, plan, training, predictions, report."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import yaml
from tqdm import tqdm

from extract.cache import SUFFIX, Header, replace_on_success, toolkit_version
from extract.cohort import Cohort, read_cohort
from extract.config import ConfigError, to_yaml
from extract.layouts import FeatureFolder, open_feature_folder
from extract.parquet import import_parquet
from extract.quickstart import make_quickstart
from mil.aggregators import aggregator_class
from mil.bags import Bags, load_bags
from mil.checks import Checked, check_features, check_finite
from mil.comparison import compare_runs
from mil.config import StudyConfig, model_options
from mil.learning_curve import ALL, FOLDER, curve_plan, joined, summarise_curve, write_curve
from mil.members import Description, load_members, n_outputs, save_members
from mil.module import CHECKPOINT, Members, MembersModule, fit, predict_logits
from mil.nested import Cell, choose, grid_cells, inner_plan, random_cells, refit_plan
from mil.report import write_overview, write_report
from mil.scenes import for_report
from mil.study import ROLES, Plan, load_plan, make_plan, notes_on_sites, save_plan
from mil.tables import member_thresholds, predictions_table
from mil.trained import TrainedStudy
from mil.warmstart import Start, open_start
from mil.wording import terminal_table

ACTIVATION_SHARE = 0.25
"""`members_per_pass=auto`: activations of one step take at most this share of the free memory."""

HOW_EXTRACTED = ("tissue.", "tiles.", "encoder_")
"""Beginnings of the attributes with which a cache file says how it was made."""


@dataclass(frozen=True)
class Outcome:
    """What a study leaves: its run folder, its metrics by aggregator, and the table for the terminal."""

    folder: Path
    metrics: dict[str, dict[str, Any]]
    table: str


@dataclass(frozen=True)
class Study:
    """Everything that is fixed before training: who, what, and which features.

    epochs_M: after how many epochs each member stops; None = all after train.epochs.
    `curve`: the members on fewer patients, which are the last ones of `plan`.
    """

    config: StudyConfig
    cohort: Cohort
    headers: dict[str, Header]
    bags: Bags
    plan: Plan
    notes: tuple[str, ...]
    environment: dict[str, Any]
    epochs_M: np.ndarray | None = None
    start: Start | None = None
    curve: Plan | None = None


@dataclass(frozen=True)
class Trained:
    """What training leaves, members in the plan's order. `epochs`: behind the kept weights of each."""

    plan: Plan
    state: dict[str, torch.Tensor]
    logits_MSC: np.ndarray
    history: pd.DataFrame
    epochs: list[int]

    def part(self, rows: slice) -> Trained:
        """The members in these rows of the plan."""
        plan = self.plan.subset(np.arange(len(self.plan))[rows])
        own = self.history["member"].isin(plan.members["member"])
        state = {key: stack[rows] for key, stack in self.state.items()}
        return Trained(plan, state, self.logits_MSC[rows], self.history[own], self.epochs[rows])

    def plan_table(self) -> pd.DataFrame:
        """The members with how long they trained, which epoch was kept, and how many slides they had in each role."""
        counts = {f"n_{role}": self.plan.uses(role).sum(axis=1) for role in ("train", "val", "test")}
        trained = self.history.groupby("member")["epoch"].max().reindex(self.plan.members["member"]).to_numpy()
        return self.plan.members.assign(epochs=trained, best_epoch=self.epochs, **counts)


def run_study(config: StudyConfig, command: Sequence[str] = ()) -> Outcome:
    """Train every aggregator that the config names on one plan, and report.

    Raises:
        ProblemsError: what is wrong with config, cohort, features or plan; nothing was trained.
    """
    assert config.out is not None
    finished = refuse_or_reuse(config)
    if finished:
        return finished
    study = prepare(config, command)
    metrics = {}
    for name in config.model.names:
        folder = run_folder(config, name)
        metrics[name] = finished_metrics(config, name) or train_and_report(study, name, folder)
    return finish(config, metrics)


def run_folder(config: StudyConfig, name: str) -> Path:
    """The run folder itself for one aggregator, a sub-folder each for several."""
    assert config.out is not None
    return config.out if isinstance(config.model.name, str) else config.out / name.replace(":", "-")


def finished_metrics(config: StudyConfig, name: str) -> dict[str, Any] | None:
    """What an aggregator of a resumed run had already reported; it is not trained again."""
    path = run_folder(config, name) / "metrics.json"
    return json.loads(path.read_text()) if config.resume and path.exists() else None


def finish(config: StudyConfig, metrics: dict[str, dict[str, Any]]) -> Outcome:
    """The tables for the terminal; of several aggregators also their comparison, written into the run folder."""
    assert config.out is not None
    if isinstance(config.model.name, str):
        return Outcome(config.out, metrics, terminal_table(metrics[config.model.name]))
    folders = [run_folder(config, name) for name in config.model.names]
    if len(folders) == 1:
        return Outcome(config.out, metrics, write_overview(config.out, metrics))
    text = compare_runs(folders, config.out, resamples=config.report.bootstrap, seed=config.seed)
    return Outcome(config.out, metrics, text)


# --- run folder ------------------------------------------------------------------------------------------------------


def refuse_or_reuse(config: StudyConfig) -> Outcome | None:
    """A run folder that exists is continued, replaced or refused, as the config says. Gives a finished study back."""
    assert config.out is not None
    init = config.model.init
    if init and init.resolve().is_relative_to(config.out.resolve()):
        raise ConfigError("model.init cannot be used", [f"{init} is in this study's own run folder; set another out"])
    if not config.out.exists() or not any(config.out.iterdir()):
        return None
    if config.overwrite:
        if not (config.out / "config.yaml").exists():
            raise ConfigError("overwrite", [f"{config.out}: not a run folder (no config.yaml); it will not be deleted"])
        shutil.rmtree(config.out)
        return None
    if not config.resume:
        raise ConfigError(
            "run folder exists",
            [f"{config.out}: set out=OTHER, or resume=true to continue it, or overwrite=true to replace it"],
        )
    refuse_other_config(config)
    found = {name: run_folder(config, name) / "metrics.json" for name in config.model.names}
    if all(path.exists() for path in found.values()):
        print(f"{config.out}: already finished, nothing to do")
        return finish(config, {name: json.loads(path.read_text()) for name, path in found.items()})
    return None


def refuse_other_config(config: StudyConfig) -> None:
    """Resuming with other settings would mix two studies."""
    assert config.out is not None
    before = config.out / "config.yaml"
    if not before.exists():
        raise ConfigError("resume", [f"{config.out}: not a run folder (no config.yaml)"])
    old, new = flat(before.read_text()), flat(resolved_yaml(config))
    keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    different = [f"{key}: was {old.get(key, '-')}, now {new.get(key, '-')}" for key in keys]
    if different:
        raise ConfigError("resume with another config", different)


def resolved_yaml(config: StudyConfig) -> str:
    """The config that makes this study again."""
    return to_yaml(config.model_copy(update={"resume": False, "overwrite": False}))


def flat(text: str) -> dict[str, Any]:
    """YAML as {"a.b": value}."""
    return {str(key): value for key, value in pd.json_normalize(yaml.safe_load(text)).iloc[0].items()}


# --- data ------------------------------------------------------------------------------------------------------------


def prepare(config: StudyConfig, command: Sequence[str]) -> Study:
    """Cohort, features, checks and plan; then, and only then, the run folder and the features in memory."""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    cohort, features = open_data(config)
    checked = check_features(cohort, features, missing=config.checks.missing)
    plan = plan_of(config, checked)
    first = next(iter(checked.headers.values()))
    refuse_unbuildable(config, first.dim, n_outputs(checked.cohort.classes))
    if config.study.nested:
        inner_plan_of(config, plan, checked.cohort)  # refused now, not after the features were read
    curve = curve_plan(plan, checked.cohort, config.study.train_sizes, config.seed)
    everyone = joined(plan, curve)
    start = open_start(config, checked.cohort, everyone, first.dim, first.provenance.same_kind())
    write_run_folder(config, plan, checked.cohort)
    bags = load(config, checked, features)
    problems = check_finite(bags.slides, bags)
    if problems:
        shutil.rmtree(config.out) if config.out and not config.resume else None
        raise ConfigError("features cannot be used", problems)
    environment = describe_environment(config, command, features, checked) | {"started": started}
    notes = [*checked.notes, *notes_on_sites(checked.cohort, config.study.site_preserving)]
    if start:
        start.save(run_folder(config, config.model.names[0]))
        notes, environment = [*start.notes, *notes], environment | {"init": start.origin}
    if curve:
        for name in config.model.names:
            save_plan(curve, checked.cohort, run_folder(config, name) / FOLDER)
    fixed = (config, checked.cohort, checked.headers, bags, everyone, tuple(notes), environment)
    return Study(*fixed, start=start, curve=curve)


def open_data(config: StudyConfig) -> tuple[Cohort, FeatureFolder]:
    """The cohort and its features, imported or made first where the config asks for it."""
    data = config.data
    if data.source == "cohort":
        assert config.cohort is not None
        cohort = read_cohort(config.cohort, config.columns, config.classes)
        if config.features.folder is None:
            raise ConfigError("no features", ["features.folder: set it to the folder of feature files"])
        extract_missing(config, cohort)
        return cohort, open_feature_folder(config.features.folder, config.features.layout)
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
    return read_cohort(csv, classes=config.classes or data.label_names or None), open_feature_folder(folder, "cache")


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
    from extract.encoders import EncoderError  # OpenSlide, timm: only where there is something to extract
    from extract.extraction import cohort_slides, extract_cohort
    from extract.readers import ReaderError
    from extract.run import summary_text

    print(f"{len(missing)} of {len(cohort)} slides have no features in {folder}: {config.encoder.name} makes them")
    try:
        summary = extract_cohort(config, cohort_slides(config, cohort), wait_for_others=True)
    except (EncoderError, ReaderError) as error:
        raise ConfigError("features cannot be extracted", [str(error)]) from None
    print(summary_text(summary, folder))


def extracts_here(config: StudyConfig, cohort: Cohort) -> bool:
    """Whether slides are configured, and the features folder is this toolkit's own (or still empty)."""
    folder = config.features.folder
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
    study, train = config.study, config.train
    return make_plan(
        checked.cohort,
        folds=study.folds,
        repeats=study.repeats,
        seeds=study.seeds,
        val_fraction=study.val_fraction,
        folds_csv=study.folds_csv,
        lr=train.lr,
        weight_decay=train.weight_decay,
        split_seed=config.seed,
        dropped=checked.dropped["slide"].tolist(),
        site_preserving=study.site_preserving,
    )


def refuse_unbuildable(config: StudyConfig, in_dim: int, outputs: int) -> None:
    """What only the aggregators themselves can say about their options, before anything is written."""
    problems: list[str] = []
    for name in config.model.names:
        try:
            aggregator_class(name)(in_dim, outputs, [0], **model_options(config.model, name))
        except ValueError as error:
            problems += [f"{name}: {problem}" for problem in str(error).splitlines()]
    if problems:
        raise ConfigError("problems in the config", problems)


def inner_plan_of(config: StudyConfig, plan: Plan, cohort: Cohort) -> Plan:
    """The inner members of nested cross-validation: the same whenever the study is resumed."""
    study = config.study
    return inner_plan(
        plan, cohort, study.nested, cells_of(config), config.seed, site_preserving=study.site_preserving
    )


def cells_of(config: StudyConfig) -> list[Cell]:
    """What nested cross-validation chooses from: the grid, or the draws; what neither names is as in `train`."""
    study, train = config.study, config.train
    if study.search == "grid":
        return grid_cells(study.grid.lr or [train.lr], study.grid.weight_decay or [train.weight_decay])
    lr, decay = study.ranges.lr or [train.lr] * 2, study.ranges.weight_decay or [train.weight_decay] * 2
    return random_cells((lr[0], lr[1]), (decay[0], decay[1]), study.budget, config.seed)


def write_run_folder(config: StudyConfig, plan: Plan, cohort: Cohort) -> None:
    assert config.out is not None
    for folder in {config.out, *(run_folder(config, name) for name in config.model.names)}:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(resolved_yaml(config))
    for name in config.model.names:
        if finished_metrics(config, name) is None:
            save_plan(plan, cohort, run_folder(config, name))


def load(config: StudyConfig, checked: Checked, features: FeatureFolder) -> Bags:
    """The features of the checked slides, in memory or memory-mapped, with a line about their size."""
    slides = checked.cohort.table["slide"].tolist()
    headers = [checked.headers[slide] for slide in slides]
    lengths, dtypes = [h.n_tiles for h in headers], [h.dtype for h in headers]
    with tqdm(total=len(slides), desc="features", unit="slide", disable=None, leave=False) as bar:
        bags = load_bags(
            features, slides, lengths, dtypes, headers[0].dim, config.data.memory, progress=lambda done: bar.update(1)
        )
    print(
        f"{len(slides)} slides, {len(set(checked.cohort.table['patient']))} patients, {sum(lengths):,} tiles x "
        f"{bags.dim} ({bags.nbytes / 1e9:.2f} GB, {'in memory' if bags.memory == 'ram' else 'memory-mapped'})"
    )
    return bags


def describe_environment(
    config: StudyConfig, command: Sequence[str], features: FeatureFolder, checked: Checked
) -> dict[str, Any]:
    """Where the numbers come from: versions, machine, command, features."""
    packages = ("torch", "lightning", "torchmetrics", "numpy", "pandas", "scikit-learn", "h5py", "timm")
    first = next(iter(checked.headers.values()))
    source = features.folder / "source.json"
    return {
        "slide-mil": toolkit_version(),
        "command": " ".join(command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {name: installed(name) for name in packages},
        "seed": config.seed,
        "features": {
            "folder": str(features.folder),
            "layout": features.layout,
            "dim": first.dim,
            "dtype": first.dtype,
            **first.provenance.same_kind(),
            **how_extracted(list(checked.headers.values())),
            **({"source": json.loads(source.read_text())} if source.exists() else {}),
        },
    }


def how_extracted(headers: Sequence[Header]) -> dict[str, Any]:
    """What all files say alike of their making, for new slides to be made like them; {} where they say nothing."""
    first, *others = [header.provenance.extra for header in headers]
    said = {key: value for key, value in first.items() if key.startswith(HOW_EXTRACTED)}
    alike = {key: value for key, value in said.items() if all(other.get(key) == value for other in others)}
    return {"extraction": alike} if alike else {}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# --- training --------------------------------------------------------------------------------------------------------


def train_and_report(study: Study, name: str, folder: Path) -> dict[str, Any]:
    """One aggregator on the whole plan, and everything it leaves in its run folder."""
    config, began, choices = study.config, time.perf_counter(), None
    if config.study.nested:
        choices = choose_on_inner_folds(study, name, folder)
        plan, epochs_M = refit_plan(study.plan, choices)
        study = replace(study, plan=plan, epochs_M=epochs_M)
    print(f"{name}: {len(study.plan)} members, {config.train.epochs if choices is None else 'chosen'} epochs")
    everyone = train_members(study, name, folder)
    n_full = len(study.plan) - (len(study.curve) if study.curve else 0)
    trained = everyone.part(slice(n_full))
    also: dict[str, Any] = {}
    if study.curve:
        also["learning_curve"] = report_curve(study, trained, everyone.part(slice(n_full, None)), folder)
    study = replace(study, plan=trained.plan)

    save_members(folder, describe(study, name), trained.state)
    plan_table, predictions = trained.plan_table(), predictions_of(study, trained)
    for file, table in (("plan.csv", plan_table), ("history.csv", trained.history), ("predictions.csv", predictions)):
        with replace_on_success(folder / file) as temporary:
            table.to_csv(temporary, index=False)
    environment = study.environment | {"aggregator": name, "training_seconds": round(time.perf_counter() - began, 1)}
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    heatmaps, about_heatmaps = heatmaps_of(study, folder, plan_table, predictions, environment)
    metrics = write_report(
        folder,
        title=f"{config.out.name if config.out else 'study'}: {name}",
        predictions=predictions,
        plan=plan_table,
        history=trained.history,
        classes=study.cohort.classes,
        config_yaml=resolved_yaml(config),
        environment=environment,
        choices=choices,
        notes=[*study.notes, *about_heatmaps],
        heatmaps=heatmaps,
        bootstrap=config.report.bootstrap,
        seed=config.seed,
        also=also,
    )
    for part in (folder, folder / "inner"):
        shutil.rmtree(part / "checkpoints", ignore_errors=True)  # only needed to resume
    return metrics


def train_members(study: Study, name: str, folder: Path) -> Trained:
    """All members of the plan, in as many passes as memory asks for."""
    passes = [train_pass(study, name, folder, i, part) for i, part in enumerate(passes_of(study, name))]
    return Trained(
        study.plan,
        {key: torch.cat([p["state"][key] for p in passes]) for key in passes[0]["state"]},
        np.concatenate([p["logits"].numpy() for p in passes]),
        pd.DataFrame([row for p in passes for row in p["history"]]),
        [epoch for p in passes for epoch in p["best_epoch"]],
    )


def report_curve(study: Study, full: Trained, smaller: Trained, folder: Path) -> dict[str, Any]:
    """Write what the members on fewer patients leave; their block for metrics.json, beside the full members."""
    assert study.curve is not None
    smaller = replace(smaller, plan=study.curve)  # which knows the sizes
    plans, parts = [full.plan_table().assign(train_size=ALL), smaller.plan_table()], (full, smaller)
    predicted = [predictions_of(study, part) for part in parts]
    write_curve(folder, plans[1], predicted[1], smaller.history)
    both = pd.concat(plans, ignore_index=True)
    return summarise_curve(both, pd.concat(predicted, ignore_index=True), study.cohort.classes)


def choose_on_inner_folds(study: Study, name: str, folder: Path) -> pd.DataFrame:
    """Train the inner members and choose; leaves choices.csv and inner/ (plan, roles, history) in the run folder."""
    config, inner = study.config, inner_plan_of(study.config, study.plan, study.cohort)
    n_cells = len(cells_of(config))
    print(
        f"{name}: {len(inner)} inner members ({len(study.plan)} outer x {config.study.nested} inner folds x "
        f"{n_cells} {'cell' if n_cells == 1 else 'cells'}), {config.train.epochs} epochs"
    )
    inner_study, inner_folder = replace(study, plan=inner), folder / "inner"
    inner_folder.mkdir(exist_ok=True)
    parts = passes_of(inner_study, name)
    passes = [train_pass(inner_study, name, inner_folder, i, part, inner=True) for i, part in enumerate(parts)]
    history = pd.DataFrame([row for p in passes for row in p["history"]])
    choices = choose(inner, history)
    save_plan(inner, study.cohort, inner_folder)
    for path, table in ((inner_folder / "history.csv", history), (folder / "choices.csv", choices)):
        with replace_on_success(path) as temporary:
            table.to_csv(temporary, index=False)
    return choices


def passes_of(study: Study, name: str) -> list[np.ndarray]:
    """Members by pass: as many together as memory allows."""
    n, wanted = len(study.plan), study.config.train.members_per_pass
    size = members_that_fit(study, name) if wanted == "auto" else min(wanted, n)
    return np.array_split(np.arange(n), -(-n // size))


def members_that_fit(study: Study, name: str) -> int:
    """How many members' activations of one training step fit into a share of the free memory, at least one."""
    one = new_aggregator(study, name, np.array([0]))
    longest = np.sort(study.bags.lengths_S)[-study.config.train.batch_size :]
    if study.config.data.max_tiles:
        longest = longest.clip(max=study.config.data.max_tiles)
    parameters = sum(p.numel() for p in one.parameters())
    floats = longest.sum() * one.floats_per_tile + len(longest) * one.floats_per_bag + 4 * parameters
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return int(np.clip(ACTIVATION_SHARE * free // (4 * floats), 1, len(study.plan)))


def new_aggregator(study: Study, name: str, members: np.ndarray) -> Any:
    seeds = study.plan.members["init_seed"].to_numpy()[members].tolist()
    sizes = (study.bags.dim, n_outputs(study.cohort.classes), seeds)
    aggregator = aggregator_class(name)(*sizes, **model_options(study.config.model, name))
    if study.start:
        study.start.put_into(aggregator, members)
    return aggregator


def train_pass(
    study: Study, name: str, folder: Path, index: int, members: np.ndarray, *, inner: bool = False
) -> dict[str, Any]:
    """Train some members of the plan together; a pass that a resumed run had finished is read back.

    Of `inner` members only the history is wanted: no logs, no weights, no predictions.
    """
    config, part = study.config, study.plan.subset(members)
    done = folder / "checkpoints" / f"pass{index}.pt"
    if config.resume and done.exists():
        return torch.load(done, weights_only=True)
    module = MembersModule(
        new_aggregator(study, name, members),
        study.bags,
        study.cohort.labels_S,
        len(study.cohort.classes),
        Members(
            part.members["lr"].to_numpy(dtype=float),
            part.members["weight_decay"].to_numpy(dtype=float),
            part.uses("train"),
            part.uses("val"),
            None if study.epochs_M is None else study.epochs_M[members],
        ),
        config.train,
        seed=config.seed,
        max_tiles=config.data.max_tiles,
    )
    checkpoints = folder / "checkpoints" / f"pass{index}"
    logs = None if inner else folder / "logs" / f"pass{index}"
    fit(module, checkpoints, logs, resume=config.resume, progress=sys.stderr.isatty())
    result: dict[str, Any] = {"history": [row | {"member": int(members[row["member"]])} for row in module.history]}
    if not inner:
        result |= {
            "state": module.aggregator.state_dict(),
            "logits": torch.from_numpy(predict_logits(module, list(range(len(study.bags))))),
            "best_epoch": module.best_epoch_M.tolist(),
        }
    with replace_on_success(done) as temporary:
        torch.save(result, temporary)
    (checkpoints / CHECKPOINT).unlink(missing_ok=True)
    return result


# --- results ---------------------------------------------------------------------------------------------------------


def describe(study: Study, name: str) -> Description:
    """What `members.safetensors` needs to rebuild the aggregator."""
    first = next(iter(study.headers.values()))
    return Description(
        aggregator=name,
        options=model_options(study.config.model, name),
        in_dim=study.bags.dim,
        classes=list(study.cohort.classes),
        seeds=study.plan.members["init_seed"].tolist(),
        standardized=study.config.train.standardize,
        features=first.provenance.same_kind(),
    )


def predictions_of(study: Study, trained: Trained) -> pd.DataFrame:
    """One row a member and slide."""
    roles_MS = np.array(ROLES, dtype=object)[trained.plan.roles_MS]
    return predictions_table(trained.plan.members, study.cohort.table, roles_MS, trained.logits_MSC)


def heatmaps_of(
    study: Study, folder: Path, plan: pd.DataFrame, predictions: pd.DataFrame, environment: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The report's slides with their tile scores, by the members just saved, and notes on what could not be shown."""
    aggregator, description = load_members(folder)
    thresholds = member_thresholds(predictions, description.classes)
    roles = study.cohort.table.loc[:, ["slide", "patient"]]  # the report's heatmaps ask for no roles
    cpu = torch.device("cpu")
    trained = TrainedStudy(
        folder, study.config, aggregator, description, plan, roles, thresholds, {}, environment, cpu
    )
    return for_report(trained, study.config.report.heatmaps)
