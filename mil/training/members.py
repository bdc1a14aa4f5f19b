"""Trained members on disk: one safetensors file, every parameter a stack of M, and what it takes to rebuild them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import safe_open

from extract.tensors import write_tensors
from mil.aggregators import aggregator_class
from mil.aggregators.contract import Aggregator, Harmonized
from mil.aggregators.fused import Fused
from mil.config import Task as TaskConfig
from mil.study.covariates import Covariate, covariates_of
from mil.tasks.contract import Task
from mil.tasks.table import task_of

FILE = "members.safetensors"
LARGEST_OPTION = 10_000
"""Options such as n_top are numbers that are no size of a tensor."""


@dataclass(frozen=True)
class Description:
    """How to rebuild the aggregator: its name in the table, its options, its sizes, and whose features it reads.

    features: encoder, weights_sha256, tile_px, mpp, overlap_px of the features it was trained on. harmonized: how the
    site was taken out of them, and sites: those of the study, in the order of the rows 1..K of `site_mean_MKD`. task:
    the section `task` of the config. facts: of a task other than classification, what its members' training slides
    say, a list of M each (`mil.tasks.contract`). covariates: what `Covariate.describe` says of each, in the
    order of the columns; how each member scales them is in `covariates.mean_MV` and `covariates.scale_MV`. fused: the
    width of every encoder, where each has a member of its own; [] where there is one aggregator for all columns.
    """

    aggregator: str
    options: dict[str, Any]
    in_dim: int
    classes: list[str]
    seeds: list[int]
    standardized: bool
    features: dict[str, Any]
    harmonized: Harmonized = "none"
    sites: list[str] = field(default_factory=list)
    task: dict[str, Any] = field(default_factory=lambda: {"name": "classification"})
    facts: dict[str, list[Any]] = field(default_factory=dict)
    covariates: list[dict[str, Any]] = field(default_factory=list)
    fused: list[int] = field(default_factory=list)

    def what(self) -> Task:
        """The task as it was trained."""
        return task_of(TaskConfig.model_validate(self.task), self.classes)


class SameKind(BaseModel):
    """What `Description.features` must say; "" and 0 where it is unknown."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    encoder: str
    weights_sha256: str
    tile_px: int = Field(ge=0)
    mpp: float = Field(ge=0)
    overlap_px: int = Field(ge=0)


def n_outputs(classes: list[str] | tuple[str, ...]) -> int:
    """One logit for two classes, else one per class."""
    return 1 if len(classes) == 2 else len(classes)


def save_members(folder: Path, description: Description, state: dict[str, torch.Tensor]) -> None:
    """Write `folder`/members.safetensors; `state` is the aggregator's state_dict, every tensor (M, ...)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {key: json.dumps(value) for key, value in asdict(description).items()}
    write_tensors(folder / FILE, tensors, metadata)


def load_members(folder: Path) -> tuple[Aggregator, Description]:
    """The trained aggregator with all its members, in evaluation mode.

    Raises:
        KeyError: no such aggregator. ValueError: what describes the members is damaged, or is not of these tensors.
        SafetensorError, OSError, RuntimeError: the file is damaged, or its tensors are not this aggregator's.
    """
    with safe_open(folder / FILE, framework="pt") as file:
        description = described(file.metadata())
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    refuse_other_sizes(description, state)
    n_outputs, made = description.what().n_outputs(), aggregator_class(description.aggregator)

    def make(width: int) -> Aggregator:
        one: Aggregator = made(width, n_outputs, description.seeds, **description.options)
        return one

    aggregator = Fused(make, description.fused) if description.fused else make(description.in_dim)
    aggregator.add_site_maps(description.harmonized, len(description.sites))
    if description.task["name"] == "ordinal":
        aggregator.add_cuts(len(description.classes) - 1)
    aggregator.add_covariates(categories_of(description))
    aggregator.load_state_dict(state)
    aggregator.standardized = description.standardized
    return aggregator.eval(), description


def categories_of(description: Description) -> list[int]:
    """How many categories each covariate has; 0: it is a number."""
    return [len(one.categories) for one in covariates_of(description.covariates)]


def described(metadata: dict[str, str] | None) -> Description:
    """The description that `save_members` wrote; ValueError where it is none."""
    said = {key: json.loads(value) for key, value in (metadata or {}).items()}
    try:
        found = TypeAdapter(Description).validate_json(json.dumps(said), strict=True)
        TypeAdapter(dict[str, str | int | float | bool | None]).validate_python(found.features)
        TypeAdapter(SameKind).validate_python(found.features)
        TypeAdapter(TaskConfig).validate_python(found.task)
        TypeAdapter(list[Covariate]).validate_python(found.covariates)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r:.60}") from None
    return found


def refuse_other_sizes(description: Description, state: dict[str, torch.Tensor]) -> None:
    """Raise ValueError before anything as large as a damaged description says is built."""
    n_members, classes = len(description.seeds), description.classes
    fewest = 2 if description.task["name"] in ("classification", "ordinal") else 1
    if len(set(classes)) < max(fewest, len(classes)) or not n_members:
        raise ValueError(f"expected two or more classes and a member, got {classes} and {n_members} members")
    if not all(0 <= seed < 2**63 for seed in description.seeds):
        raise ValueError(f"expected seeds of 63 bits, got {description.seeds[:5]}")
    wrong = [name for name, tensor in state.items() if not tensor.ndim or len(tensor) != n_members]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected {n_members} members, got shape {tuple(state[wrong[0]].shape)}")
    sizes = {side for tensor in state.values() for side in tensor.shape}
    if len(description.sites) > max(sizes):
        raise ValueError(f"{len(description.sites)} sites: no tensor has this size")
    if description.in_dim not in sizes:
        raise ValueError(f"in_dim {description.in_dim}: no tensor has this size")
    if description.fused and (min(description.fused) < 1 or sum(description.fused) != description.in_dim):
        raise ValueError(f"encoders of {description.fused} columns: expected {description.in_dim} in all")
    if description.covariates and sum(max(1, n) for n in categories_of(description)) not in sizes:
        raise ValueError(f"{len(description.covariates)} covariates: no tensor has their columns")
    largest = max([LARGEST_OPTION, *sizes])
    for name, value in description.options.items():
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float)]
        if any(not abs(number) <= largest for number in numbers):
            raise ValueError(f"option {name}={value}: larger than any size of the file's tensors")
