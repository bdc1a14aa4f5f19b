"""The whole study's config: extraction's sections, data, study, model, train, checks and report. Light: no torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from extract.config import ExtractConfig, Section, did_you_mean, explain
from mil.aggregators import AGGREGATORS, PUBLISHED_LR, TORCHMIL, option_types, options, ranges

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
    memory: Literal["auto", "ram", "mmap"] = Field(
        "auto", description="in memory, or memory-mapped; auto: in memory if it fits"
    )
    max_tiles: int | None = Field(None, ge=1, description="train on this many random tiles a slide, fresh every epoch")


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


class Study(Section):
    """Who trains on what."""

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


def _one_device(value: Any) -> int:
    if isinstance(value, bool) or value not in (1, "1"):
        raise ValueError(
            f"expected 1, got {value!r}; all members train on one device (several devices would share out members, "
            "which is not possible yet). CUDA_VISIBLE_DEVICES says which one"
        )
    return 1


class Recipe(Section):
    """What `train` sets for all, and `train.chowder` for one aggregator of a list."""

    epochs: int = Field(50, ge=1, description="epochs")
    lr: float | None = Field(None, gt=0, description="learning rate; default: the aggregator's published one, as below")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    optimizer: Literal["adam", "adamw"] = Field("adam", description="adam (L2) or adamw (decoupled)")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate over the epochs")
    batch_size: int = Field(16, ge=1, description="slides in a member's batch")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: by inverse frequency")
    standardize: bool = Field(False, description="subtract each member's training mean, divide by its deviation")


class OwnRecipe(Block, Recipe):
    """train.AGGREGATOR"""


class Train(Recipe, Shared):
    """How every member trains. Learning rate and weight decay are per member."""

    blocks: ClassVar[type[Section] | None] = OwnRecipe
    __pydantic_extra__: dict[str, OwnRecipe]
    select: Literal["last", "best"] = Field("last", description="weights of the last epoch, or of the best on val")
    metric: Literal["auc", "loss"] = Field("auc", description="what select=best looks at")
    patience: int | None = Field(
        None, ge=1, description="select=best: epochs without a better one until a member stops"
    )
    freeze: Literal["none", "tile_layers"] = Field(
        "none", description="model.init: tile_layers trains only what comes after pooling"
    )
    members_per_pass: int | Literal["auto"] = Field("auto", description="trained together; auto: as memory allows")
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(
        "auto", description="what trains; auto: a GPU if there is one"
    )
    devices: Annotated[int, BeforeValidator(_one_device)] = Field(1, description="one; more are refused")
    precision: Literal["32-true", "bf16-mixed"] = Field(
        "32-true", description="of training steps; what is evaluated and written is float32 in either"
    )


class Checks(Section):
    """What is looked at before training."""

    missing: Literal["error", "drop"] = Field("error", description="slides without features: stop, or drop and list")
    verify: bool = Field(True, description="compare feature files with their checksums when they are read")
    init_overlap: Literal["error", "note"] = Field(
        "error", description="model.init: test patients that it was trained on: stop, or note it in the report"
    )


class Report(Section):
    """What comes out."""

    bootstrap: int = Field(1000, ge=0, description="patient-level resamples for the 95 % intervals")
    heatmaps: int = Field(2, ge=0, description="slides of each kind (most wrong, right of a class) shown; 0 = none")
    paths: bool = Field(
        False, description="paths in full in report.html and environment.json, not as seen from the run"
    )


class StudyConfig(ExtractConfig):
    """Everything `python -m mil.train` can be told."""

    classes: list[str] | None = Field(None, description="label names, the positive class last; default: sorted")
    data: Data = Data()
    study: Study = Study()
    model: Model = Model()
    train: Train = Train()
    checks: Checks = Checks()
    report: Report = Report()
    out: Path | None = Field(None, description="run folder; default: runs/NAME of the config")
    seed: int = Field(0, ge=0, description="of folds, initialisations, order and bootstrap")
    resume: bool = Field(False, description="continue the run in the run folder")
    overwrite: bool = Field(False, description="replace the run folder if it exists")

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


def published_lr(name: str) -> float:
    """The learning rate of an aggregator where the config gives none."""
    return PUBLISHED_LR.get(name, DEFAULT_LR)


def of_earlier_versions(tree: dict[str, Any]) -> dict[str, Any]:
    """A saved config with today's values for those of `train` that are no longer offered.

    devices=auto has always been one on a machine with one. How a finished study was trained changes nothing of what
    becomes of it, except that probabilities that were written in 16 bits are coarse: that it was mixed stays known.
    """
    train = tree.get("train")
    if not isinstance(train, dict):
        return tree
    said = dict(train)
    if said.get("devices") == "auto":
        said["devices"] = 1
    if said.get("precision") in ("16-mixed", "16", "bf16", 16):
        said["precision"] = "bf16-mixed"
    if said.get("precision") in ("32", 32):
        said["precision"] = "32-true"
    return tree | {"train": said}


def study_problems(tree: dict[str, Any]) -> list[str]:
    """What the sections cannot see by themselves: aggregator names and options, settings that contradict each other."""
    train, study = tree.get("train") or {}, tree.get("study") or {}
    data = tree.get("data") or {}
    problems = model_problems(tree.get("model") or {}) + block_problems(tree)
    if isinstance(train, dict) and isinstance(study, dict):
        val = study.get("val_fraction") or study.get("folds_csv")
        if train.get("select") == "best" and not val:
            problems.append("train.select=best: needs validation slides; set study.val_fraction, such as 0.2")
        if train.get("patience") and train.get("select") != "best":
            problems.append("train.patience: only with train.select=best")
        problems += nested_problems(study, train)
    tiles, slides, features = (tree.get(key) or {} for key in ("tiles", "slides", "features"))
    if isinstance(tiles, dict) and tiles.get("folder"):
        problems.append(
            "tiles.folder: tile images are extracted first, python -m extract.run tiles.folder=FOLDER out=FEATURES; "
            "then train with features.folder=FEATURES"
        )
    if isinstance(slides, dict) and slides.get("folder") and isinstance(features, dict):
        problems += extraction_problems(features, data.get("source", "cohort") if isinstance(data, dict) else "cohort")
    said = tuple(problems)  # wrong for the first of several aggregators
    problems += [p for p in range_problems(tree.get("model") or {}) if not p.startswith(said)]
    problems += warm_start_problems(tree.get("model") or {}, train)
    if isinstance(study, dict) and study.get("nested"):  # each would need inner folds, and checks of them, of its own
        given = {"study.train_sizes": study, "model.init": tree.get("model")}
        problems += [
            f"{key}: not together with study.nested"
            for key, section in given.items()
            if isinstance(section, dict) and section.get(key.partition(".")[2])
        ]
    if isinstance(data, dict) and data.get("source", "cohort") == "cohort" and not tree.get("cohort"):
        problems.append("cohort: no CSV given; set cohort=FILE.csv (columns slide, patient, label)")
    return problems


def extraction_problems(features: dict[str, Any], source: str) -> list[str]:
    """slides.folder asks for extraction, which needs a cohort CSV and a folder of this toolkit's own layout."""
    problems = []
    if source != "cohort":
        problems.append(f"slides.folder: only with data.source=cohort, got data.source={source}")
    if not features.get("folder"):
        problems.append("features.folder: not set; with slides.folder it says where the extracted features are kept")
    if features.get("layout", "auto") not in ("auto", "cache"):
        problems.append(
            f"slides.folder: extraction writes this toolkit's own layout, not features.layout={features['layout']}; "
            "leave slides.folder out to train on that folder as it is"
        )
    return problems


def nested_problems(study: dict[str, Any], train: dict[str, Any]) -> list[str]:
    """What contradicts `study.nested`, and a grid or ranges that cannot be searched."""
    nested, problems = study.get("nested") or 0, []
    parts = {name: study.get(name) or {} for name in ("grid", "ranges")}
    given = {f"study.{name}.{k}": v for name, part in parts.items() if isinstance(part, dict) for k, v in part.items()}
    for key, block in [(key, block) for key, block in given.items() if isinstance(block, dict)]:
        del given[key]
        given |= {f"{key}.{k}": v for k, v in block.items()}
    given = {key: values for key, values in given.items() if values != []}  # [] is the default, which runs write out
    if not nested:
        problems += [f"{key}: needs nested cross-validation; set study.nested=5, or train.lr=..." for key in given]
        if study.get("search") == "random":
            problems.append("study.search=random: needs nested cross-validation; set study.nested=5")
        return problems
    if nested == 1:
        problems.append("study.nested=1: expected 0 (off) or at least 2 inner folds")
    if study.get("val_fraction"):
        problems.append("study.val_fraction: study.nested has its own inner folds; set one of them to 0")
    if train.get("select") == "best":
        problems.append("train.select=best: study.nested chooses the number of epochs itself; use train.select=last")
    random = study.get("search") == "random"
    wrong = "study.grid." if random else "study.ranges."
    hint = "study.search=random draws from study.ranges" if random else "set study.search=random"
    problems += [f"{key}: not used, {hint}" for key in given if key.startswith(wrong)]
    for key, values in given.items():
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            continue  # the section itself reports the type
        positive = key.endswith(".lr") or key.startswith("study.ranges.")
        bad = [v for v in values if v < 0 or (positive and v == 0)]
        if bad:
            problems.append(f"{key}: expected numbers {'above' if positive else 'of at least'} 0, got {bad}")
        if key.startswith("study.grid.") and len(set(values)) < len(values):
            problems.append(f"{key}: a value occurs twice, its members would be copies: {values}")
        if key.startswith("study.ranges.") and (len(values) != 2 or values[0] >= values[1]):
            problems.append(f"{key}: expected [lowest, highest], got {values}")
    if random and not any(key.startswith("study.ranges.") for key in given):
        problems.append("study.search=random: no range; set study.ranges.lr=[1e-5,1e-2] or study.ranges.weight_decay")
    return problems


def warm_start_problems(model: Any, train: Any) -> list[str]:
    """Keys of a warm start that say nothing without the others."""
    if not isinstance(model, dict) or not isinstance(train, dict):
        return []
    problems, name = [], model.get("name", "abmil")
    if model.get("init") and not isinstance(name, str):
        problems.append(f"model.init: a study's members are of one aggregator; expected one model.name, got {name}")
    if not model.get("init"):
        if model.get("init_from", "member") != "member":
            problems.append("model.init_from: only with model.init=RUN_FOLDER")
        if train.get("freeze", "none") != "none":
            problems.append("train.freeze: would freeze random parameters; only with model.init=RUN_FOLDER")
    return problems


def model_problems(model: Any) -> list[str]:
    """Unknown aggregators, unknown or wrong options. An option must exist in at least one of the named aggregators."""
    if not isinstance(model, dict):
        return []  # the section itself reports the type
    name = model.get("name", "abmil")
    names = name if isinstance(name, list) else [name]
    if not all(isinstance(n, str) for n in names):
        return []  # the same
    problems = [
        f"model.name: no aggregator {n!r}; there are {', '.join(AGGREGATORS)}{did_you_mean(str(n), list(AGGREGATORS))}"
        for n in names
        if n not in AGGREGATORS and not str(n).startswith(TORCHMIL)
    ]
    if len(set(map(str, names))) < len(names) or not names:
        problems.append(f"model.name: expected different aggregators, got {names}")
    torchmil = [n for n in names if str(n).startswith(TORCHMIL)]
    if torchmil and find_spec("torchmil") is None:
        problems.append(f"model.name: {', '.join(torchmil)}: torchmil is not installed; pip install torchmil")
    known = names_of(model)
    valid = [f"model.{key}" for key in [*Model.model_fields, *(o for n in known for o in options(n)), *known]]
    for key, value in model.items():
        owners = [n for n in known if key in options(n)]
        if key in Model.model_fields or is_aggregator(key) or (not known and problems):
            continue
        if not owners and not torchmil:  # a torchmil model says itself, when it is built, what it does not know
            hint = did_you_mean(f"model.{key}", valid)
            problems.append(f"model.{key}: unknown option of {', '.join(map(str, names))}{hint}")
        for owner in owners[:1]:
            problems += option_problems(owner, key, value)
    return problems


def block_problems(tree: dict[str, Any]) -> list[str]:
    """Blocks for aggregators that `model.name` does not have, and options in them that theirs lacks."""
    model = tree.get("model") or {}
    if not isinstance(model, dict):
        return []
    name, problems = model.get("name", "abmil"), []
    names = [str(n) for n in (name if isinstance(name, list) else [name])]
    for section, key, block in blocks_of(tree):
        where = f"{section}.{key}"
        if key not in names:
            hint = did_you_mean(where, [f"{section}.{n}" for n in names])
            problems.append(f"{where}: a block for one of model.name, which is {', '.join(names)}{hint}")
        elif block is not None and not isinstance(block, dict):
            problems.append(f"{where}: expected a block, such as {where}.KEY=VALUE, got {block!r}")
        elif section == "model" and key in AGGREGATORS:
            problems += [p for k, value in (block or {}).items() for p in own_option_problems(key, k, value)]
    return problems


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


def own_option_problems(name: str, key: str, value: Any) -> list[str]:
    """What is wrong with `model.NAME.KEY=VALUE`."""
    if key in options(name):
        return option_problems(name, key, value, f"model.{name}")
    hint = did_you_mean(f"model.{name}.{key}", [f"model.{name}.{option}" for option in options(name)])
    return [f"model.{name}.{key}: unknown option of {name}{hint}"]


def foreign_options(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> list[str]:
    """What the config file has for aggregators which `model.name` on the command line replaced: options and blocks.

    Another aggregator may have an option of the same name, such as `head`; the file did not mean that one.

    Args:
        merged: the whole config. file: what the file says of it. given: keys of the command line.
    """
    if "model.name" not in given or not (isinstance(file.get("model"), dict) and isinstance(merged.get("model"), dict)):
        return []
    name = merged["model"].get("name")
    of_file, wanted = names_of(file["model"]), names_of(merged["model"])
    options_of_others = [
        f"model.{key}"
        for key in file["model"]
        if any(key in options(n) for n in of_file) and not any(key in options(n) for n in of_file if n in wanted)
    ]
    blocks = [f"{section}.{key}" for section, key, _ in blocks_of(file) if is_aggregator(key)]
    named = [str(n) for n in (name if isinstance(name, list) else [name])]
    blocks_of_others = [key for key in blocks if key.rpartition(".")[2] not in named]
    return [
        key
        for key in options_of_others + blocks_of_others
        if not any(g == key or g.startswith(f"{key}.") for g in given)
    ]


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The tree without the dotted `key`."""
    first, _, rest = key.partition(".")
    return {k: without(v, rest) if rest and k == first else v for k, v in tree.items() if rest or k != first}


def outranked(tree: dict[str, Any], given: set[str]) -> list[str]:
    """Keys of the command line that do not reach every aggregator, because one has its own, as sentences."""
    return [
        f"{section}.{key}: not for {name}, which has its own: {section}.{name}.{key}={block[key]}"
        for section, name, block in blocks_of(tree)
        if isinstance(block, dict)
        for key in block
        if f"{section}.{key}" in given and f"{section}.{name}.{key}" not in given
    ]


def for_today(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """What the file says for the aggregators that are named now; devices=auto of an earlier version's file is one."""
    train = file.get("train")
    if isinstance(train, dict) and train.get("devices") == "auto" and "train.devices" not in given:
        merged = merged | {"train": merged["train"] | {"devices": 1}}
    return for_named_aggregators(merged, file, given)


def for_named_aggregators(merged: dict[str, Any], file: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The config without what the file has for other aggregators than those now named.

    Says which that is, and which keys of the command line an aggregator's own settings outrank.
    """
    foreign = foreign_options(merged, file, given)
    if foreign:
        print(f"Left out, as the config file has them for another aggregator: {', '.join(foreign)}", file=sys.stderr)
    for key in foreign:
        merged = without(merged, key)
    for line in outranked(merged, given):
        print(line, file=sys.stderr)
    return merged


def names_of(model: dict[str, Any]) -> list[str]:
    """The aggregators of the table that a config's `model` names."""
    name = model.get("name", "abmil")
    return [n for n in (name if isinstance(name, list) else [name]) if isinstance(n, str) and n in AGGREGATORS]


def option_problems(name: str, key: str, value: Any, section: str = "model") -> list[str]:
    """What is wrong with this value of an option of aggregator `name`, which the config has in `section`."""
    schema = options_schema(name)
    try:
        schema.model_validate({key: value})
    except ValidationError as error:
        return [f"{section}.{explain(e, schema)}" for e in error.errors()]
    return []


def options_schema(name: str) -> type[Section]:
    """The aggregator's options as a pydantic class, from its signature."""
    types, defaults = option_types(name), options(name)
    fields: dict[str, Any] = {option: (types[option], Field(default)) for option, (_, default) in defaults.items()}
    return create_model(f"{name}_options", __base__=Section, **fields)


def range_problems(model: Any) -> list[str]:
    """Options that are wrong for one aggregator of several, or beside another option, such as a width and heads."""
    problems: list[str] = []
    known = names_of(model) if isinstance(model, dict) else []
    for name in known:
        own, of = model.get(name), f" ({name})" if len(known) > 1 else ""
        own = own if isinstance(own, dict) else {}  # what this aggregator alone is told
        given = {k: v for k, v in (model | own).items() if k in options(name)}
        try:
            chosen = options_schema(name).model_validate(given).model_dump()
        except ValidationError as error:
            schema = options_schema(name)
            problems += ["model." + explain(e, schema) + of for e in error.errors() if e["loc"][0] not in own]
            continue
        problems += [problem + of for problem in ranges.problems(option_types(name), chosen)]
    return problems


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


def options_help() -> str:
    """The aggregators' options with their defaults, for `--help`."""
    lines = ["model.OPTION by aggregator (default in brackets):"]
    for name in AGGREGATORS:
        types = option_types(name)
        shown = [f"{k} [{_plain(default)}] {ranges.shown(types[k])}" for k, (_, default) in options(name).items()]
        lines.append(f"  {name:<11} {'; '.join(part.strip() for part in shown)}")
    lines.append("  torchmil:NAME, such as torchmil:ABMIL: the arguments of its class; feat_ext=WIDTH embeds first")
    keys, rates = ", ".join(Recipe.model_fields), ", ".join(f"{name} {lr:g}" for name, lr in PUBLISHED_LR.items())
    lines += [
        f"train.lr where it is not set: {rates}, others {DEFAULT_LR:g}",
        "For one aggregator of a list: model.NAME.OPTION, study.grid.NAME.lr, train.NAME.KEY with KEY one of",
        f"  {keys};",
        "  such as model.name=[abmil,chowder] model.chowder.n_top=5 train.chowder.lr=1e-2; plain keys are for the rest",
    ]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value).lower()
