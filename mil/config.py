"""The whole study's config: extraction's sections, data, study, model, train, checks and report. Light: no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from extract.config import ExtractConfig, Section
from mil.aggregators import AGGREGATORS, PUBLISHED_LR, TORCHMIL, option_types, options

DEFAULT_LR = 1e-3
"""Of aggregators that nobody published with one: this toolkit's own, and models of torchmil."""


class Data(Section):
    """Where the study's slides and features come from, and how features are held."""

    source: Literal["cohort", "parquet", "quickstart"] = Field(
        "cohort", description="cohort: a CSV; parquet: a hub dataset; quickstart: made on the spot"
    )
    hub: str = Field("owkin/camelyon16-features", description="source=parquet: dataset on the Hugging Face hub")
    revision: str | None = Field(None, description="source=parquet: hub revision to pin")
    root: Path | None = Field(None, description="source=parquet: folder with the Parquet files, no hub")
    train_files: str = Field("data/Phikon_train-*.parquet", description="source=parquet: files of the training split")
    test_files: str = Field("data/Phikon_test-*.parquet", description="source=parquet: files of the test split")
    label_names: list[str] = Field([], description="source=parquet: names of label 0, 1, ...; default: the numbers")
    memory: Literal["auto", "ram", "mmap", "device"] = Field(
        "auto",
        description="in memory, or memory-mapped; auto: in memory if it fits, and on the GPU that trains if it fits; "
        "device: there",
    )
    max_tiles: int | None = Field(
        None, ge=1, description="train on this many random tiles a slide, fresh every epoch; auto: see auto"
    )


class Block(Section):
    """What `train.chowder` holds: values for one aggregator of a list. Written out as given, without defaults."""

    @model_validator(mode="before")
    @classmethod
    def _no_block(cls, given: Any) -> Any:
        """`train.lrr=1`: a key that the section does not have is an unknown key, not a block of the wrong type."""
        if not isinstance(given, dict | Block | None):
            raise PydanticKnownError("extra_forbidden")
        return {} if given is None else given

    @model_serializer(mode="wrap")
    def _as_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class Shared(Section):
    """A section for all aggregators of a list, of which each may have values of its own in a block with its name."""

    model_config = ConfigDict(extra="allow")

    def of(self, name: str) -> Self:
        """The section as aggregator `name` has it, without blocks."""
        plain, own = self.model_dump(include=set(type(self).model_fields)), (self.model_extra or {}).get(name)
        return type(self).model_validate(plain if own is None else plain | own.model_dump())


class Cells(Section):
    """What `study.grid` sets for all, and `study.grid.chowder` for one."""

    lr: list[float] = Field([], description="learning rates; default: train.lr alone")
    weight_decay: list[float] = Field([], description="weight decays; default: train.weight_decay alone")


class OwnCells(Block, Cells):
    """study.grid.AGGREGATOR"""


class Grid(Cells, Shared):
    """Values that nested cross-validation chooses from; every combination is a cell."""

    blocks: ClassVar[type[Section] | None] = OwnCells
    __pydantic_extra__: dict[str, OwnCells]


class Ends(Section):
    """What `study.ranges` sets for all, and `study.ranges.chowder` for one."""

    lr: list[float] = Field([], description="study.search=random: lowest, highest learning rate; default: train.lr")
    weight_decay: list[float] = Field([], description="the same for weight decay; default: train.weight_decay")


class OwnEnds(Block, Ends):
    """study.ranges.AGGREGATOR"""


class Ranges(Ends, Shared):
    """study.search=random: the two ends between which values are drawn log-uniformly."""

    blocks: ClassVar[type[Section] | None] = OwnEnds
    __pydantic_extra__: dict[str, OwnEnds]


class Task(Section):
    """What is predicted. `task: survival` is short for `task: {name: survival}`."""

    word: ClassVar[str | None] = "name"
    name: Literal["classification", "regression", "survival", "ordinal"] = Field(
        "classification", description="classes; a number; time to an event; grades, whose order `classes` gives"
    )
    unit: str | None = Field(None, description="of the time, or of the number, such as months; for the report")
    loss: Literal["cox", "discrete", "mse", "huber", "l1"] | None = Field(
        None, description="survival: cox (default) or discrete; regression: mse (default), huber or l1"
    )
    intervals: int = Field(4, ge=2, description="task.loss=discrete: time intervals, by quantiles of training events")
    horizons: list[float] = Field([], description="survival: times of the time-dependent AUC; default: quartiles")
    cut: float | None = Field(None, description="regression: AUC of the prediction for values of at least this")

    @property
    def target(self) -> Literal["class", "value", "survival"]:
        """What the cohort must say of a slide (`extract.cohort.Cohort.target`)."""
        if self.name == "survival":
            return "survival"
        return "value" if self.name == "regression" else "class"


class Study(Section):
    """Who trains on what."""

    unit: Literal["auto", "slide", "patient"] = Field(
        "auto", description="what one bag is; patient: all slides of one together; auto: patient for survival"
    )
    folds: int = Field(5, ge=1, description="patient-grouped, label-stratified folds; 1 = no cross-validation")
    repeats: int = Field(1, ge=1, description="repeat the cross-validation with other folds")
    seeds: list[int] = Field(
        [0], min_length=1, description="initialisations trained on every fold; they share order and tile draws"
    )
    val_fraction: float = Field(0.0, ge=0, lt=1, description="part of each training fold held out to select the epoch")
    folds_csv: Path | None = Field(None, description="own folds: columns slide, fold[, repeat][, role]")
    nested: int = Field(0, ge=0, description="inner folds that choose lr, weight decay and epochs by AUC; 0 = off")
    search: Literal["grid", "random"] = Field("grid", description="what nested chooses from: study.grid, or draws")
    grid: Grid = Grid()
    ranges: Ranges = Ranges()
    budget: int = Field(8, ge=1, description="study.search=random: settings that are drawn")
    site_preserving: bool = Field(False, description="keep each site (columns.site) on one side of every fold")
    leave_one_site_out: bool = Field(
        False, description="beside the folds: one more member a site (columns.site), trained on all others"
    )
    train_sizes: list[int] = Field([], description="learning curve: also train on so many of the training patients")
    train_sizes_equal: Literal["steps", "epochs"] = Field(
        "steps", description="all sizes take as many optimiser steps, or as many epochs, which trains small ones less"
    )


class Model(Section):
    """The aggregator and its own options (see the list below); a block with an aggregator's name is for that alone."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str | list[str] = Field("abmil", description="|".join(AGGREGATORS) + "|torchmil:NAME, or a list to compare")
    init: Path | None = Field(None, description="warm start: run folder of a study whose members these start from")
    init_from: Literal["member", "average"] = Field(
        "member", description="model.init: each from one member, or all from the mean of their parameters"
    )

    @property
    def names(self) -> list[str]:
        return [self.name] if isinstance(self.name, str) else self.name

    def of(self, name: str) -> Model:
        """Aggregator `name` alone, with the options that are for it."""
        plain = self.model_dump(include=set(Model.model_fields))
        return Model.model_validate(plain | {"name": name} | given_options(self, name))


def _one_at_least(value: int | Literal["auto"]) -> int | Literal["auto"]:
    if value != "auto" and value < 1:
        raise ValueError("expected auto, or a whole number from 1")
    return value


def _devices(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    if isinstance(value, str) and value.isdecimal() and int(value):
        return int(value)
    raise ValueError(f"expected auto, or a whole number from 1, got {value!r}; CUDA_VISIBLE_DEVICES says which GPUs")


class Recipe(Section):
    """What `train` sets for all, and `train.chowder` for one aggregator of a list."""

    epochs: int = Field(50, ge=1, description="epochs; auto: see auto")
    lr: float | None = Field(None, gt=0, description="learning rate; default: the aggregator's published one, as below")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    optimizer: Literal["adam", "adamw"] = Field("adam", description="adam (L2) or adamw (decoupled)")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate over the epochs")
    batch_size: int = Field(16, ge=1, description="slides in a member's batch; auto: see auto")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: by inverse frequency")
    standardize: bool = Field(False, description="subtract each member's training mean, divide by its deviation")


class OwnRecipe(Block, Recipe):
    """train.AGGREGATOR"""


class Train(Recipe, Shared):
    """How every member trains. Learning rate and weight decay are per member."""

    blocks: ClassVar[type[Section] | None] = OwnRecipe
    __pydantic_extra__: dict[str, OwnRecipe]
    select: Literal["last", "best"] = Field("last", description="weights of the last epoch, or of the best on val")
    metric: Literal["auc", "loss"] = Field(
        "auc", description="what select=best looks at; auc is the task's own: C-index, Pearson's r, kappa"
    )
    patience: int | None = Field(
        None, ge=1, description="select=best: epochs without a better one until a member stops"
    )
    freeze: Literal["none", "tile_layers"] = Field(
        "none", description="model.init: tile_layers trains only what comes after pooling"
    )
    harmonize: Literal["none", "combat", "project"] = Field(
        "none", description="take the site out of the features, by each member's training slides (columns.site)"
    )
    members_per_pass: Annotated[int | Literal["auto"], AfterValidator(_one_at_least)] = Field(
        "auto", description="trained together; auto: as memory allows"
    )
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(
        "auto", description="what trains; auto: a GPU if there is one"
    )
    devices: Annotated[int | Literal["auto"], BeforeValidator(_devices)] = Field(
        1, description="passes of members are shared out over so many GPUs of this machine; auto: over all"
    )
    compile: bool = Field(
        False, description="torch.compile Adam's step, whose shapes repeat, where features are on a GPU"
    )
    precision: Literal["auto", "32-true", "tf32", "bf16-mixed"] = Field(
        "32-true",
        description="of training steps; auto: bf16-mixed on GPUs that have it, else 32-true; tf32: float32 with TF32 "
        "products on GPUs; what is evaluated and written is float32 in all",
    )


class Checks(Section):
    """What is looked at before training."""

    missing: Literal["error", "drop"] = Field("error", description="slides without features: stop, or drop and list")
    verify: bool = Field(True, description="compare feature files with their checksums when they are read")
    init_overlap: Literal["error", "note"] = Field(
        "error", description="model.init: test patients that it was trained on: stop, or note it in the report"
    )


def _operating_points(given: Any) -> Any:
    """Also as texts, which a command line takes without quotes: `[sensitivity:0.95,youden]`."""
    return [_operating_point(point) for point in given] if isinstance(given, list) else given


def _operating_point(point: Any) -> Any:
    if point == "youden":
        return point
    kind, value = point, None
    if isinstance(point, dict) and len(point) == 1:
        kind, value = next(iter(point.items()))
    if isinstance(kind, str) and value is None:  # a text; YAML makes {"sensitivity:0.95": None} of {sensitivity:0.95}
        kind, _, value = kind.replace("=", ":").partition(":")
    try:
        number = float(value or 0.0)
    except (TypeError, ValueError):
        number = 0.0
    if kind not in ("sensitivity", "specificity") or not 0 < number <= 1:
        wanted = "expected {sensitivity: 0.95}, {specificity: 0.9} (above 0, at most 1) or youden"
        raise ValueError(f"{wanted}, got {point!r}")
    return {kind: number}


def _different(points: list[Any]) -> list[Any]:
    twice = [point for i, point in enumerate(points) if point in points[:i]]
    if twice:
        raise ValueError(f"expected different ones, got {twice[0]} twice")
    return points


def _shares(values: list[float]) -> list[float]:
    outside = [value for value in values if not 0 < value < 1]
    if outside:
        raise ValueError(f"expected shares above 0 and below 1, got {outside}")
    return _different(values)


class Report(Section):
    """What comes out."""

    baselines: bool = Field(
        True, description="mil.train: what logistic regression and nearest neighbours reach on the same folds"
    )
    bootstrap: int = Field(
        1000,
        ge=0,
        description="patient-level resamples for 95 % intervals that need them (calibration error; correlations, R2, "
        "kappa; Uno's C, AUC at times and integrated Brier score, at most 200); 0 = no intervals of any metric",
    )
    heatmaps: int = Field(2, ge=0, description="slides of each kind (most wrong, right of a class) shown; 0 = none")
    encoders: bool = Field(True, description="features.fuse=logits: also train on all columns together, to compare")
    covariates: bool = Field(True, description="columns.covariates: also train all members without them, to compare")
    confounding: bool | Literal["auto"] = Field(
        "auto", description="what the site tells of label and features; auto: with two sites or more"
    )
    subgroups: list[str] = Field(
        [], description="metrics by group: columns of the CSV (site, scanner), or expressions such as age>=65"
    )
    permutations: int = Field(
        0, ge=0, description="trainings on permuted labels, each as costly as the study: a test of the whole; 0 = none"
    )
    paths: bool = Field(
        False, description="paths in full in report.html and environment.json, not as seen from the run"
    )
    calibrate: Literal["none", "temperature", "isotonic"] = Field(
        "none", description="calibrated probabilities beside the plain ones, fitted on val, else on other folds"
    )
    operating_points: Annotated[
        list[str | dict[str, float]], BeforeValidator(_operating_points), AfterValidator(_different)
    ] = Field(
        [{"sensitivity": 0.95}, {"specificity": 0.9}, "youden"],
        description="thresholds chosen on val, else on other folds; reported on held-out slides",
    )
    prevalences: Annotated[list[float], AfterValidator(_shares)] = Field(
        [], description="PPV and NPV also at these shares of the positive class"
    )
    coverage: float = Field(0.9, gt=0, lt=1, description="of the conformal prediction sets, in each class")


AUTOMATIC = ("train.batch_size", "train.epochs", "data.max_tiles")
"""Keys that may be `auto` (mil/study/fingerprint.py)."""


class Reviews(Section):
    """What was said of slides in `mil.view`. `reviews: FILE` is short for `reviews: {file: FILE}`."""

    word: ClassVar[str | None] = "file"
    file: Path | None = Field(None, description="reviews.csv of mil.view: slides marked there are left out")
    leave_out: list[Literal["wrong label", "bad quality", "look again"]] = Field(
        ["wrong label", "bad quality"], description="for which marks"
    )


class StudyConfig(ExtractConfig):
    """Everything `python -m mil.train` can be told."""

    task: Task = Task()
    classes: list[str] | dict[str, list[str]] | None = Field(
        None, description="label names, the positive class last; default: sorted; of many targets also by target"
    )
    data: Data = Data()
    reviews: Reviews = Reviews()
    study: Study = Study()
    model: Model = Model()
    train: Train = Train()
    checks: Checks = Checks()
    report: Report = Report()
    out: Path | None = Field(None, description="run folder; default: runs/NAME of the config")
    seed: int = Field(0, ge=0, description="of folds, initialisations, order and bootstrap")
    auto: list[Literal["train.batch_size", "train.epochs", "data.max_tiles"]] = Field(
        [], description="keys chosen from tiles a slide, slides a class and width; written here by KEY=auto"
    )
    plan: bool = Field(False, description="print what would be trained, and what it would take; train nothing")
    resume: bool = Field(False, description="continue the run in the run folder")
    overwrite: bool = Field(False, description="replace the run folder if it exists")

    @model_validator(mode="before")
    @classmethod
    def _automatic(cls, tree: Any) -> Any:
        """`train.epochs: auto` becomes an entry of `auto`; the value is chosen when the cohort is known."""
        if not isinstance(tree, dict):
            return tree
        listed = tree.get("auto") or []
        for key in AUTOMATIC:
            section, _, name = key.partition(".")
            part = tree.get(section)
            if isinstance(part, dict) and part.get(name) == "auto":
                tree = tree | {section: {k: v for k, v in part.items() if k != name}}
                listed = [*listed, key] if isinstance(listed, list) and key not in listed else listed
        return tree | {"auto": listed} if listed else tree

    @property
    def class_names(self) -> list[str] | None:
        """The names of `classes` for a study of one target."""
        return self.classes if isinstance(self.classes, list) else None

    @property
    def targets(self) -> list[str]:
        """The columns of many targets, of survival those of their times or events; [] where there is one target."""
        named = [self.columns.time, self.columns.event] if self.task.name == "survival" else [self.columns.label]
        return next((given for given in named if isinstance(given, list)), [])

    def for_target(self, name: str) -> StudyConfig:
        """The config of a study of this target alone, in a folder of its name within `out`."""
        assert self.out is not None
        i = self.targets.index(name)
        given = {role: getattr(self.columns, role) for role in ("label", "time", "event")}
        own = {role: column if isinstance(column, str) else column[i] for role, column in given.items()}
        classes = self.classes.get(name) if isinstance(self.classes, dict) else self.classes
        columns, out = self.columns.model_copy(update=own), self.out / folder_of(name)
        return self.model_copy(update={"columns": columns, "classes": classes, "out": out})

    def for_aggregator(self, name: str) -> StudyConfig:
        """The config with which aggregator `name` of the list trains: that of the same aggregator alone."""
        study = self.study.model_copy(update={k: getattr(self.study, k).of(name) for k in ("grid", "ranges")})
        train = self.train.of(name)
        train = train.model_copy(update={"lr": train.lr or published_lr(name)})
        return self.model_copy(update={"model": self.model.of(name), "train": train, "study": study})

    def with_learning_rates(self) -> StudyConfig:
        """The same study with the learning rates written down that it leaves to the aggregators."""
        train = self.train.model_dump()
        for name in (n for n in self.model.names if self.train.of(n).lr is None):
            alone = isinstance(self.model.name, str) and name not in train
            own = {"lr": published_lr(name)}
            train |= own if alone else {name: train.get(name, {}) | own}
        return self.model_copy(update={"train": Train.model_validate(train)})


def folder_of(target: str) -> str:
    """A target's name as a folder."""
    return re.sub(r'[\\/:*?"<>|]', "-", target).strip(" .") or "-"


def published_lr(name: str) -> float:
    """The learning rate of an aggregator where the config gives none."""
    return PUBLISHED_LR.get(name, DEFAULT_LR)


def blocks_of(tree: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(section, aggregator, block) of all that the config says of single aggregators."""
    study = tree.get("study") or {}
    sections = {"model": tree.get("model"), "train": tree.get("train")}
    sections |= {f"study.{k}": study.get(k) if isinstance(study, dict) else None for k in ("grid", "ranges")}
    return [
        (section, key, value)
        for section, part in sections.items()
        for key, value in (part.items() if isinstance(part, dict) else ())
        if is_aggregator(key) or (section != "model" and isinstance(value, dict))
    ]


def is_aggregator(key: Any) -> bool:
    return key in AGGREGATORS or str(key).startswith(TORCHMIL)


def names_of(model: dict[str, Any]) -> list[str]:
    """The aggregators of the table that a config's `model` names."""
    name = model.get("name", "abmil")
    return [n for n in (name if isinstance(name, list) else [name]) if isinstance(n, str) and n in AGGREGATORS]


def options_schema(name: str) -> type[Section]:
    """The aggregator's options as a pydantic class, from its signature."""
    types, defaults = option_types(name), options(name)
    fields: dict[str, Any] = {option: (types[option], Field(default)) for option, (_, default) in defaults.items()}
    return create_model(f"{name}_options", __base__=Section, **fields)


def model_options(model: Model, name: str) -> dict[str, Any]:
    """The typed options for aggregator `name`, defaults filled in."""
    given = given_options(model, name)
    return given if name.startswith(TORCHMIL) else options_schema(name).model_validate(given).model_dump()


def given_options(model: Model, name: str) -> dict[str, Any]:
    """What the config says of aggregator `name`: the options of all that it has, over them those of its own block."""
    extra = model.model_extra or {}
    own, shared = extra.get(name) or {}, {k: v for k, v in extra.items() if not is_aggregator(k)}
    if name.startswith(TORCHMIL):  # whatever no other aggregator of the study owns
        return {k: v for k, v in shared.items() if not any(k in options(n) for n in model.names)} | own
    return {k: v for k, v in shared.items() if k in options(name)} | own
