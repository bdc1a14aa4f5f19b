"""BLOCKS: what a study says of itself beside its metrics, a block in metrics.json each and a section of the report.

To add one: a function of what is `Done`, a line in BLOCKS, and the section (`mil.report.sections`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mil.pipeline.confounding import confounding_of
from mil.pipeline.data import Study
from mil.pipeline.training import Trained


@dataclass(frozen=True)
class Done:
    """A trained study: what blocks may look at. `plan` and `predictions` are plan.csv and predictions.csv."""

    study: Study
    trained: Trained
    plan: pd.DataFrame
    predictions: pd.DataFrame


BLOCKS: dict[str, Callable[[Done], dict[str, Any] | None]] = {
    "confounding": lambda done: confounding_of(done.study, done.trained.plan, done.predictions),
}
"""Name of the block in metrics.json -> what makes it; None where there is nothing to say."""


def blocks_of(done: Done) -> dict[str, dict[str, Any]]:
    """The blocks that have something to say."""
    made = {name: make(done) for name, make in BLOCKS.items()}
    return {name: block for name, block in made.items() if block is not None}


def warnings_in(blocks: dict[str, Any]) -> list[str]:
    """What blocks want to be known before reading: the sentences in their key `warnings`."""
    return [text for block in blocks.values() for text in block.get("warnings", [])]
