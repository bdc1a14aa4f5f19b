"""Trained members on disk: one safetensors file, every parameter a stack of M, and what it takes to rebuild them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from extract.features.cache import replace_on_success
from mil.aggregators import aggregator_class
from mil.aggregators.contract import Aggregator

FILE = "members.safetensors"


@dataclass(frozen=True)
class Description:
    """How to rebuild the aggregator: its name in the table, its options, its sizes, and whose features it reads.

    features: encoder, weights_sha256, tile_px, mpp, overlap_px of the features it was trained on.
    """

    aggregator: str
    options: dict[str, Any]
    in_dim: int
    classes: list[str]
    seeds: list[int]
    standardized: bool
    features: dict[str, Any]


def n_outputs(classes: list[str] | tuple[str, ...]) -> int:
    """One logit for two classes, else one per class."""
    return 1 if len(classes) == 2 else len(classes)


def save_members(folder: Path, description: Description, state: dict[str, torch.Tensor]) -> None:
    """Write `folder`/members.safetensors; `state` is the aggregator's state_dict, every tensor (M, ...)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {key: json.dumps(value) for key, value in asdict(description).items()}
    with replace_on_success(folder / FILE) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_members(folder: Path) -> tuple[Aggregator, Description]:
    """The trained aggregator with all its members, in evaluation mode."""
    with safe_open(folder / FILE, framework="pt") as file:
        description = Description(**{key: json.loads(value) for key, value in file.metadata().items()})
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    sizes = (description.in_dim, n_outputs(description.classes), description.seeds)
    aggregator = aggregator_class(description.aggregator)(*sizes, **description.options)
    aggregator.load_state_dict(state)
    aggregator.standardized = description.standardized
    return aggregator.eval(), description
