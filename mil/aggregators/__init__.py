"""The aggregators: bags of tile features in, slide logits out, M members at once.

To add one: write `mil/aggregators/NAME.py` with a subclass of `mil.aggregators.contract.Aggregator`, add its line
below.
The keyword-only arguments of its `__init__` are its config schema (`model.OPTION=...`); `tests/mil/test_aggregators.py`
runs one battery of tests over the whole table.

The table holds names, not classes, and `options` reads signatures from the source, because `--help` and config errors
must not wait for torch.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

AGGREGATORS = {
    "abmil": "mil.aggregators.abmil:ABMIL",
    "chowder": "mil.aggregators.chowder:Chowder",
    "dsmil": "mil.aggregators.dsmil:DSMIL",
    "clam_sb": "mil.aggregators.clam:CLAMSB",
    "dtfd": "mil.aggregators.dtfd:DTFD",
    "transmil": "mil.aggregators.transmil:TransMIL",
    "hipt_mil": "mil.aggregators.hipt_mil:HIPTMIL",
    "transformer": "mil.aggregators.transformer:Transformer",
    "evidence": "mil.aggregators.evidence:Evidence",
    "mean": "mil.aggregators.pooling:MeanPool",
    "max": "mil.aggregators.pooling:MaxPool",
}


TORCHMIL = "torchmil:"
"""In front of the name of a model of the torchmil package: `torchmil:ABMIL` (see mil/aggregators/torchmil.py)."""


def aggregator_class(name: str) -> type:
    """The class called `name` in the table, or of a torchmil model (imports torch)."""
    if name.startswith(TORCHMIL):
        wrapped: type = importlib.import_module("mil.aggregators.torchmil").model_class(name.removeprefix(TORCHMIL))
        return wrapped
    module, _, cls = AGGREGATORS[name].partition(":")
    own: type = getattr(importlib.import_module(module), cls)
    return own


@cache
def options(name: str) -> dict[str, tuple[str, Any]]:
    """`{option: (annotation, default)}` of an aggregator: the keyword-only arguments of its `__init__`.

    Empty for a torchmil model: its options are not known before torchmil is imported.
    """
    if name.startswith(TORCHMIL):
        return {}
    module, _, cls = AGGREGATORS[name].partition(":")
    source = Path(__file__).parent / f"{module.rpartition('.')[2]}.py"
    classes = [n for n in ast.parse(source.read_text()).body if isinstance(n, ast.ClassDef) and n.name == cls]
    init = next(n for n in classes[0].body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {a.arg: (ast.unparse(a.annotation), ast.literal_eval(d)) for a, d in pairs if a.annotation and d is not None}
