"""One's own network as an encoder: encoder.name=module:function.

`function(weights)` is called with `encoder.weights` (a Path, or None) and returns `(network, facts)`:

    network   torch.nn.Module: float32 (N, 3, H, W), normalised -> float (N, D). It is put into eval mode and frozen.
    facts     dict: dim (D), and what of tile_px (224), mpp (0.5), mean and std (ImageNet's), resize_px, crop_px and
              licence is otherwise; keys are those of extract.encoders.table.EncoderSpec.

The module is found as Python finds it, in the current folder too. Features carry `module:function` as encoder, and the
hash of the network's weights: changed code with the same weights is not noticed, so give it another name.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.encoders.normalisation import scale_problems
from extract.encoders.table import EncoderError, EncoderSpec

if TYPE_CHECKING:
    import torch

FACTS = ("dim", "tile_px", "mpp", "mean", "std", "resize_px", "crop_px", "licence")


def own_network(name: str, weights: Path | None) -> tuple[torch.nn.Module, EncoderSpec]:
    """What `module:function` makes.

    Raises:
        EncoderError: no such module or function, it does not keep to the contract, or its network does not make (N, D).
    """
    import torch

    function = _function(name)
    made = _asked(name, f"{name.partition(':')[2]}({weights})", lambda: function(weights))
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise EncoderError(
            f"encoder.name={name}: expected it to return (torch.nn.Module, dict), got {type(made).__name__}. "
            "The contract stands in extract/encoders/own.py"
        )
    network, facts = made
    spec = _spec(name, facts)
    tiles_N3HW = torch.zeros(2, 3, spec.input_px, spec.input_px)
    with torch.inference_mode():
        features = _asked(name, f"its network, of 2 tiles ({spec.input_px} px),", lambda: network.eval()(tiles_N3HW))
    shape = tuple(getattr(features, "shape", ()))
    if shape != (2, spec.dim):
        got = shape or type(features).__name__
        raise EncoderError(
            f"encoder.name={name}: of 2 tiles ({spec.input_px} px) its network makes {got}, "
            f"expected (2, {spec.dim}): the dim that it states"
        )
    return network, spec


def _asked(name: str, what: str, of_theirs: Callable[[], Any]) -> Any:
    """What code of the user's gives; EncoderError that says what it raised and on which line, in place of our stack.

    Raises:
        ModuleNotFoundError: the module itself is not there.
    """
    try:
        return of_theirs()
    except ModuleNotFoundError as error:
        if error.name is not None and name.partition(":")[0].startswith(error.name):
            raise
        raise _raised(name, what, error) from error
    except Exception as error:
        raise _raised(name, what, error) from error


def _raised(name: str, what: str, error: Exception) -> EncoderError:
    said = (str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines() or [""])[0][:200]
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames if frame.filename != __file__]
    places = [place for place in places if "site-packages" not in place[0] and not place[0].startswith("<")]
    places += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) and error.filename else []
    at = " ({}, line {})".format(*places[-1]) if places else ""
    return EncoderError(f"encoder.name={name}: {what} raised {type(error).__name__}: {said}{at}")


def _function(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = _asked(name, f"importing {module_name}", lambda: importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        raise EncoderError(
            f"encoder.name={name}: there is no module {error.name!r}, neither installed nor in {Path.cwd()}"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise EncoderError(f"encoder.name={name}: {module.__file__} has no function {function_name!r}")
    return function


def _spec(name: str, facts: Any) -> EncoderSpec:
    if not isinstance(facts, dict) or "dim" not in facts or set(facts) - set(FACTS):
        got = ", ".join(map(str, facts)) if isinstance(facts, dict) else type(facts).__name__
        raise EncoderError(f"encoder.name={name}: expected facts with dim, and any of {', '.join(FACTS)}; got {got}")
    known: dict[str, Any] = {"licence": "not stated"} | facts
    spec = EncoderSpec(name=name, architecture=name, hub_repo="", pooling="model", **known)
    problems = scale_problems(spec.mean, spec.std)
    problems += [
        f"{key} is {value!r}, expected a number above 0"
        for key in ("dim", "tile_px", "mpp")
        if not isinstance(value := getattr(spec, key), int | float) or value <= 0
    ]
    if problems:
        raise EncoderError(f"encoder.name={name}: its facts cannot be: {'; '.join(problems)}")
    return spec
