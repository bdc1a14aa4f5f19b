"""Whether pixels are normalised as the weights want it: nothing else would notice, features would only be worse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extract.encoders.table import EncoderError, EncoderSpec

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
SLACK = 0.005
"""Files round the same normalisation differently: 0.7068 and 0.707223 are two, 0.485 and 0.48499 are one."""


def is_rgb(value: Any) -> bool:
    """Three numbers."""
    return isinstance(value, Sequence) and len(value) == 3 and all(isinstance(v, int | float) for v in value)


def scale_problems(mean: Any, std: Any, *, names: tuple[str, str] = ("mean", "std")) -> list[str]:
    """What cannot be mean and SD of pixels that go from 0 to 1."""
    problems = [
        f"{name} is {value}, expected three numbers: the normalisation must be known"
        for name, value in zip(names, (mean, std), strict=True)
        if not is_rgb(value)
    ]
    if problems:
        return problems
    if any(not -1 <= v <= 1 for v in mean):
        problems.append(f"{names[0]} is {mean}, expected numbers from 0 to 1: pixels are divided by 255 before it")
    if any(not 0 < v <= 1 for v in std):
        problems.append(f"{names[1]} is {std}, expected numbers above 0 and up to 1: pixels are divided by 255 before")
    return problems


def refuse_others_normalisation(spec: EncoderSpec, weights: Path) -> None:
    """What lies beside a local weights file, as the hub has it, must say the mean and SD that the encoder has here.

    Raises:
        EncoderError: it says others: the weights are of another encoder of the same architecture, or were trained
            otherwise.
    """
    for path, mean, std in _said_beside(weights):
        wrong = [
            f"{name} {tuple(said)} instead of {own}"
            for name, said, own in (("mean", mean, spec.mean), ("std", std, spec.std))
            if is_rgb(said) and any(abs(a - b) > SLACK for a, b in zip(said, own, strict=True))
        ]
        if wrong:
            raise EncoderError(
                f"encoder.weights={weights}: {path} says that these weights want pixels normalised with "
                f"{' and '.join(wrong)}, which is encoder {spec.name!r}. Set encoder.name to the encoder that they are "
                f"of (hf:OWNER/NAME takes what these files say); if {path.name} is of other weights, give this file a "
                "folder of its own"
            )


def _said_beside(weights: Path) -> list[tuple[Path, Any, Any]]:
    """(file, mean, std) of transformers' preprocessor_config.json and timm's config.json, as far as they are there."""
    found = []
    pixels = _read(weights.parent / PREPROCESSOR)
    if pixels.get("do_normalize", True):
        found.append((weights.parent / PREPROCESSOR, pixels.get("image_mean"), pixels.get("image_std")))
    trained = _read(weights.parent / CONFIG).get("pretrained_cfg")
    if isinstance(trained, Mapping):
        found.append((weights.parent / CONFIG, trained.get("mean"), trained.get("std")))
    return found


def _read(path: Path) -> Mapping[str, Any]:
    """Keys and values; none where the file is not there or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, Mapping) else {}
