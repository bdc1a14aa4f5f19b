"""Where the numbers come from: versions, machine, command, features."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from extract.features.cache import Header, toolkit_version
from extract.features.folder import FeatureFolder
from extract.features.joined import JoinedFolder
from extract.finetuning.one_device import device_of
from mil.config import StudyConfig
from mil.training.checks import Checked
from mil.training.precision import precision_on

HOW_EXTRACTED = ("tissue.", "tiles.", "encoder_")
"""Beginnings of the attributes with which a cache file says how it was made."""


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
        "trained_in": trained_in(config),
        "evaluated_in": "float32",  # also with train.precision=bf16-mixed
        "seed": config.seed,
        "features": {
            "folder": str(features.folder),
            "layout": features.layout,
            "dim": first.dim,
            "dtype": first.dtype,
            **first.provenance.same_kind(),
            **how_extracted(list(checked.headers.values())),
            **limited(list(checked.headers.values())),
            **({"source": json.loads(source.read_text(encoding="utf-8"))} if source.exists() else {}),
            **joined(features, list(checked.headers)),
        },
    }


def trained_in(config: StudyConfig) -> str:
    """The numbers of training steps, with what a GPU's products are."""
    device = device_of(config.train.accelerator)
    if precision_on(config.train.precision, device) == "bf16-mixed":
        return "bf16-mixed"
    if device.type != "cuda":
        return "float32"
    return "float32 with TF32 products" if config.train.precision == "tf32" else "float32 without TF32"


def joined(features: FeatureFolder, slides: Sequence[str]) -> dict[str, Any]:
    """How several folders were joined, and what each of them is, in the order of their columns; {} for one folder."""
    if not isinstance(features, JoinedFolder):
        return {}
    parts, left_out = [], features.left_out(slides)
    for p, (part, tiles) in enumerate(zip(features.parts, left_out, strict=True)):
        headers = [features.headers_of(slide)[p] for slide in slides]
        made = {"folder": str(part.folder), "layout": part.layout, "dim": headers[0].dim, "dtype": headers[0].dtype}
        made |= headers[0].provenance.same_kind() | how_extracted(headers) | limited(headers)
        parts.append(made | {"tiles_left_out": tiles})
    return {"join": features.join, "parts": parts}


def how_extracted(headers: Sequence[Header]) -> dict[str, Any]:
    """What all files say alike of their making, for new slides to be made like them; {} where they say nothing."""
    first, *others = [header.provenance.extra for header in headers]
    said = {key: value for key, value in first.items() if key.startswith(HOW_EXTRACTED)}
    alike = {key: value for key, value in said.items() if all(other.get(key) == value for other in others)}
    return {"extraction": alike} if alike else {}


def limited(headers: Sequence[Header]) -> dict[str, int]:
    """Of how many slides the tiles lie within regions that somebody drew, or where a file of coordinates says; {} for
    none."""
    marks = {"limited_by_drawn_regions": "regions_sha256", "at_given_coordinates": "coords_sha256"}
    found = {name: sum(bool(header.provenance.extra.get(key)) for header in headers) for name, key in marks.items()}
    return {name: number for name, number in found.items() if number}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
