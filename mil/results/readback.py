"""What a finished run folder holds, read back in one place: every file checked by itself and against the others.

Predicting, comparing, drawing and resuming all read through here and through `mil.study.saved` (plan.csv, roles.csv).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import expit, softmax

from extract.config import ProblemsError, first_line
from extract.tables import Column, TableError, read_table
from extract.wording import name_some
from mil.results.published import FILE as PATHS
from mil.results.published import restored
from mil.results.tables import logit_columns, p_columns
from mil.study.roles import ROLES
from mil.study.saved import COUNT, OF_SLIDE
from mil.tasks.contract import Facts, Task

PREDICTIONS, METRICS, ENVIRONMENT = "predictions.csv", "metrics.json", "environment.json"
LARGEST_JSON = 2**28
"""Bytes. A study of 100,000 slides and 1,000 members writes a hundredth of that."""
P_TOLERANCE = 1e-4
"""Between a probability and its logit, which is written with the digits of float32."""


class ReadbackError(ProblemsError):
    """A file of a run folder is damaged, or does not fit the others."""


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Loose(BaseModel):
    """What must be there and of which kind; what else is there is kept."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Number(_Loose):
    value: float | None
    low: float | None
    high: float | None


class _Spread(_Loose):
    mean: float | None
    sd: float | None
    n: int = Field(ge=0)


class _SpreadOfFolds(_Spread):
    undefined: int = Field(ge=0)


class _Counts(_Loose):
    slides: int = Field(ge=0)
    patients: int = Field(ge=0)


class _Counted(_Loose):
    all: _Counts
    cross_validated: _Counts
    test: _Counts


class _AucOfSet(_Loose):
    auc: _Number


class _AucOfFolds(_Loose):
    auc: _SpreadOfFolds


class _AucOfMember(_Loose):
    auc: float | None


class _Single(_Loose):
    trainings: int = Field(ge=2)
    metrics: _AucOfFolds
    models_per_slide: list[int] = Field([1, 1], min_length=2, max_length=2)


class _Set(_Loose):
    counts: _Counts
    metrics: _AucOfSet
    models_per_slide: list[int] = Field([1, 1], min_length=2, max_length=2)
    single_training: _Single | None = None


class _Folds(_Loose):
    metrics: _AucOfFolds


class _Member(_Loose):
    member: int = Field(ge=0)
    repeat: int = Field(ge=0)
    metrics: _AucOfMember


class _Test(_Loose):
    members: list[_Member]
    over_members: _AucOfFolds
    ensemble: _Set
    single_training: _Single | None = None


class _Threshold(_Loose):
    member: int = Field(ge=0)
    threshold: float | None = Field(ge=0, le=1)
    origin: str


class _Resamples(_Loose):
    resamples: int = Field(ge=0)


class _Cell(_Loose):
    lr: float
    weight_decay: float
    chosen: int = Field(ge=0)


class _Epochs(_Loose):
    min: int
    median: float
    max: int


class _Stability(_Loose):
    most_chosen: int = Field(ge=0)
    epochs: _Epochs


class _Nested(_Loose):
    choices: list[dict[str, Any]]
    cells: list[_Cell]
    stability: _Stability
    inner_auc: _Spread
    optimism: _Spread


class _Point(_Loose):
    train_size: int | None
    slides: float
    cross_validation: _Folds | None
    test: _Folds | None


class _Curve(_Loose):
    points: list[_Point]


class _Metrics(_Loose):
    """What terminal, comparison and predictions take from metrics.json."""

    classes: list[str] = Field(min_length=2)
    positive_class: str | None
    bootstrap: _Resamples
    counts: _Counted
    thresholds: list[_Threshold]
    folds: list[_Member]
    cross_validation: _Folds | None
    pooled_out_of_fold: _Set | None
    test: _Test | None
    nested: _Nested | None = None
    learning_curve: _Curve | None = None


class _TaskName(_Loose):
    name: str
    main: str


class _TaskMetrics(_Loose):
    """What the terminal takes from metrics.json of a task other than classification."""

    task: _TaskName
    metric_titles: dict[str, str]
    bootstrap: _Resamples
    counts: _Counted
    members: int
    folds: list[dict[str, Any]]
    cross_validation: dict[str, Any] | None
    pooled_out_of_fold: dict[str, Any] | None
    test: dict[str, Any] | None


class _Features(_Loose):
    folder: str
    layout: str
    dim: int = Field(ge=1)
    dtype: str
    encoder: str
    weights_sha256: str
    tile_px: int = Field(ge=0)
    mpp: float = Field(ge=0)
    overlap_px: int = Field(ge=0)
    extraction: dict[str, str | float | int | bool | None] = {}


class _Environment(_Loose):
    """What predictions and heatmaps take from environment.json."""

    features: _Features


ModelT = TypeVar("ModelT", bound=BaseModel)


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json, checked.

    Raises:
        ReadbackError: it cannot be read, or lacks what is reported from it.
    """
    if (read_json(folder / METRICS).get("task") or {}).get("name", "classification") != "classification":
        return _checked_json(folder / METRICS, _TaskMetrics)
    metrics = _checked_json(folder / METRICS, _Metrics)
    problems = [] if len(set(metrics["classes"])) == len(metrics["classes"]) else ["a class is listed twice"]
    two = len(metrics["classes"]) == 2
    if metrics["positive_class"] != (metrics["classes"][-1] if two else None):
        problems.append(f"positive_class {metrics['positive_class']!r} is not the last of two classes")
    nested = metrics.get("nested")
    if nested and nested["stability"]["most_chosen"] >= len(nested["cells"]):
        problems.append("nested: the cell that was chosen most is not listed")
    for point in (metrics.get("learning_curve") or {"points": []})["points"]:
        if not (point["cross_validation"] or point["test"]):
            problems.append(f"learning_curve: nothing was held out of {point['train_size']} patients")
    if problems:
        raise ReadbackError("a run cannot be read back", [f"{folder / METRICS}: {problem}" for problem in problems])
    return metrics


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json, checked, with the full paths of paths.json where that is there.

    Raises:
        ReadbackError: it cannot be read, or does not say which features the study has.
    """
    environment = _checked_json(folder / ENVIRONMENT, _Environment)
    if (folder / PATHS).exists():
        problems = restored(environment, read_json(folder / PATHS))
        if problems:
            where = [f"{folder / PATHS}: {problem}" for problem in problems]
            raise ReadbackError("a run cannot be read back", where)
    return environment


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ReadbackError: no such file, none of JSON, or something else than an object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ReadbackError("a run cannot be read back", [f"{path}: cannot be read ({first_line(error)})"]) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ReadbackError("a run cannot be read back", [f"{path}: expected a dictionary, got a {kind}"])
    return content


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _checked_json(path: Path, model: type[ModelT]) -> dict[str, Any]:
    content = read_json(path)
    wrong = problems_of(model, content)
    if wrong:
        raise ReadbackError("a run cannot be read back", [f"{path}: {problem}" for problem in wrong])
    return content


def problems_of(model: type[ModelT], content: dict[str, Any]) -> list[str]:
    """Where the content is not as the model says, one sentence each."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        return [
            f"{'.'.join(str(part) for part in e['loc'])}: {e['msg'][0].lower()}{e['msg'][1:]}, got {e['input']!r:.60}"
            for e in error.errors()
        ]
    return []


# --- predictions.csv -------------------------------------------------------------------------------------------------


def read_predictions(
    folder: Path, classes: Sequence[str], members: pd.DataFrame | None = None, roles: pd.DataFrame | None = None
) -> pd.DataFrame:
    """predictions.csv: one row a member and slide; labels None where missing, names stay text, also `NA` and `007`.

    Args:
        classes: of the study; every label must be one of them.
        members, roles: what `read_members` and `read_roles` gave; the table must say the same as they do.

    Raises:
        ReadbackError: it is missing or damaged, or does not fit classes, members and roles.
    """
    path = folder / PREDICTIONS
    number = Column("number", blank=True, infinite=True)
    columns = dict.fromkeys(("member", "repeat", "fold", "seed"), COUNT) | OF_SLIDE
    columns |= {"label": Column("text", blank=True, among=tuple(classes)), "role": Column("text", among=ROLES)}
    columns |= dict.fromkeys(logit_columns(classes), number)
    columns |= dict.fromkeys(p_columns(classes), Column("number", least=0, most=1, blank=True))
    try:
        table = read_table(path, columns)
    except TableError as error:
        raise ReadbackError("a run cannot be read back", error.problems) from None
    problems = unlike_rows(table) or _unlike_logits(table, classes)
    if not problems and members is not None and roles is not None:
        problems = _unlike_the_plan(table, members, roles)
    if problems:
        raise ReadbackError("a run cannot be read back", [f"{path}: {problem}" for problem in problems])
    labels = [label or None for label in table["label"]]
    return table.assign(label=pd.Series(labels, index=table.index, dtype=object))


def read_task_predictions(
    folder: Path,
    task: Task,
    facts: Facts | None = None,
    members: pd.DataFrame | None = None,
    roles: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """`read_predictions` of a task other than classification: targets, outputs, and what they mean (`Task.columns`).

    Args:
        facts: of the members; what is said of a slide must then be what its outputs mean.
    """
    path, among = folder / PREDICTIONS, tuple(task.classes) if task.name == "ordinal" else ()
    number = Column("number", blank=True, infinite=True)
    columns = dict.fromkeys(("member", "repeat", "fold", "seed"), COUNT) | OF_SLIDE
    columns |= {"label": Column("text", blank=True, among=among), "role": Column("text", among=ROLES)}
    targets = [name for name in task.targets if name != "label"]
    columns |= dict.fromkeys([*targets, "output_0", *task.columns()], number)
    try:
        table = read_table(path, columns)
        outputs = [f"output_{c}" for c in range(sum(name.startswith("output_") for name in table.columns))]
        table = read_table(path, columns | dict.fromkeys(outputs, number))
    except TableError as error:
        raise ReadbackError("a run cannot be read back", error.problems) from None
    problems = unlike_rows(table, targets)
    if not problems and facts is not None:
        problems = _unlike_outputs(table, task, facts, outputs)
    if not problems and members is not None and roles is not None:
        problems = _unlike_the_plan(table, members, roles)
    if problems:
        raise ReadbackError("a run cannot be read back", [f"{path}: {problem}" for problem in problems])
    labels = [label or None for label in table["label"]]
    return table.assign(label=pd.Series(labels, index=table.index, dtype=object))


def _unlike_outputs(table: pd.DataFrame, task: Task, facts: Facts, outputs: Sequence[str]) -> list[str]:
    """Where what is said of a slide is not what the member's outputs mean."""
    problems = []
    for member in table["member"].unique().tolist():
        own = table[table["member"] == member]
        said = task.predicted(own[list(outputs)].to_numpy(), {name: values[member] for name, values in facts.items()})
        for name in task.columns():
            wanted_N, got_N = said[name], own[name].to_numpy(dtype=float)
            close_N = np.isclose(wanted_N, got_N, rtol=P_TOLERANCE, atol=P_TOLERANCE * (1 + np.abs(wanted_N)))
            off_N = np.isfinite(wanted_N) & ~close_N
            if off_N.any():
                row = int(own.index[off_N.argmax()]) + 2
                problems.append(f"row {row}: {name} is not what the outputs of member {member} mean")
    return problems[:1]


def unlike_rows(table: pd.DataFrame, targets: Sequence[str] = ()) -> list[str]:
    """Members with other slides than the first, or with other facts of a slide."""
    twice = table[table.duplicated(["member", "slide"])]
    if len(twice):
        return [f"member {twice['member'].iloc[0]} has slide {twice['slide'].iloc[0]!r} more than once"]
    problems = []
    n_M = table.groupby("member")["slide"].size()
    if len(table) != len(n_M) * table["slide"].nunique():
        problems.append(f"expected every member to have all {table['slide'].nunique()} slides; rows are missing")
    for column in ("patient", "label", "split", *targets):
        n_S = table.groupby("slide")[column].nunique()
        if (n_S > 1).any():
            problems.append(f"{column} of a slide differs between members: {name_some(n_S.index[n_S > 1])}")
    return problems


def _unlike_logits(table: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """Probabilities that are not those of the logits."""
    problems = []
    logits = table[logit_columns(classes)].to_numpy(dtype=np.float64)
    p = table[p_columns(classes)].to_numpy(dtype=np.float64)
    finite_N = np.isfinite(logits).all(axis=1)
    wanted = np.stack([expit(-logits[:, 0]), expit(logits[:, 0])], 1) if len(classes) == 2 else softmax(logits, axis=1)
    off_N = finite_N & ~(np.abs(wanted - p) < P_TOLERANCE).all(axis=1)
    if off_N.any():
        problems.append(f"row {int(off_N.argmax()) + 2}: the probabilities are not those of the logits")
    return problems


def _unlike_the_plan(table: pd.DataFrame, members: pd.DataFrame, roles: pd.DataFrame) -> list[str]:
    """What predictions.csv says otherwise than plan.csv and roles.csv."""
    numbers = ["member", "repeat", "fold", "seed"]
    said, planned = table[numbers].drop_duplicates().sort_values("member"), members[numbers].sort_values("member")
    if said.to_numpy().tolist() != planned.to_numpy().tolist():
        return ["member, repeat, fold or seed are not those of plan.csv"]
    by_slide = roles.set_index("slide")
    if set(table["slide"]) != set(by_slide.index):
        other = sorted(set(table["slide"]) ^ set(by_slide.index))
        return [f"its slides are not those of roles.csv: {name_some(other)}"]
    problems = []
    first = table.drop_duplicates("slide").set_index("slide")
    for column in ("patient", "label", "split"):
        wrong = first.index[first[column] != by_slide.loc[first.index, column]]
        if len(wrong):
            problems.append(f"{column} of {name_some(wrong)} is not as in roles.csv")
    for member, own in table.groupby("member"):
        wrong = own["slide"][own["role"].to_numpy() != by_slide.loc[own["slide"], f"m{member}"].to_numpy()]
        if len(wrong):
            problems.append(f"member {member}: role of {name_some(wrong)} is not as in roles.csv")
    return problems
