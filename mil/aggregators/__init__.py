"""The aggregators: bags of tile features in, slide logits out, M members at once.

To add one: write `mil/aggregators/NAME.py` with a subclass of `mil.aggregators.contract.Aggregator`, add its line
below.
The keyword-only arguments of its `__init__` are its config schema (`model.OPTION=...`), and their annotations say what
they may be (see `mil.aggregators.ranges`); `tests/mil/test_aggregators.py` runs one battery of tests over the table.

The table holds names, not classes, and `options` reads signatures from the source, because `--help` and config errors
must not wait for torch.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from mil.aggregators.ranges import evaluated

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

# Each with Adam and a constant rate unless it says otherwise. Where the published code and the paper differ: the paper.
PUBLISHED_LR: dict[str, float] = {
    # Filiot et al. 2023 (the Phikon paper, whose layers these have): a grid of 1e-3 and 1e-4, weight decay 0 and 1e-4;
    # its larger one, as in Owkin's Camelyon16 tutorial for Chowder. Ilse et al. 2018 (appendix): 1e-4 for histology,
    # 5e-4 for MNIST, but with a convolutional network in front that trains along.
    "abmil": 1e-3,
    "chowder": 1e-3,
    "mean": 1e-3,
    "max": 1e-3,  # not in that paper; the mean's
    # Li et al. 2021, section 4: constant 1e-4, one bag a step. The code's first versions: 2e-4, cosine, decay 5e-3.
    "dsmil": 1e-4,
    # Lu et al. 2021, Methods, and the published command: 2e-4, weight decay 1e-5. (The default of main.py is 1e-4.)
    "clam_sb": 2e-4,
    # Zhang et al. 2022, published code: 1e-4 for both tiers, a fifth from epoch 100 of 200; weight decay 1e-4.
    "dtfd": 1e-4,
    # Shao et al. 2021, section 4, and the published config: 2e-4, weight decay 1e-5, by Lookahead around RAdam.
    "transmil": 2e-4,
    # Chen et al. 2022, published code: 2e-4, weight decay 1e-5.
    "hipt_mil": 2e-4,
}
"""The learning rate that each aggregator was published with. `transformer` and `evidence` are this toolkit's own."""


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
    body = ast.parse(source.read_text(encoding="utf-8")).body
    classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == cls]
    init = next(n for n in classes[0].body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {a.arg: (ast.unparse(a.annotation), ast.literal_eval(d)) for a, d in pairs if a.annotation and d is not None}


@cache
def option_types(name: str) -> dict[str, Any]:
    """`{option: its type and range}`, such as `Annotated[int, Ge(1)]`; what `options` has as text."""
    return {option: evaluated(annotation) for option, (annotation, _) in options(name).items()}
