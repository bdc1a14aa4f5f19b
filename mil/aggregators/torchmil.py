"""`torchmil:NAME`: any model of the torchmil package that reads features alone, behind the contract of this toolkit.

torchmil (Castro-Macias et al., 2025) is optional: pip install torchmil. Nothing of it is imported before a model is
built. Its models do not stack, so members run one after the other on one copy of the model, each with its own weights.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mil.aggregators.batch import Batch, Parameters, Prediction
from mil.aggregators.chance import Chance, seed_of
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import cross_entropy

OURS = ("in_shape", "criterion")
"""Arguments of torchmil's classes that are not options: the first comes from the features, the second is ours."""
NEEDS_MASK = ("DTFDMIL",)
"""Models whose mask has a default that they do not work with (torchmil 1.0.2)."""
PROBE_TILES = (256, 768)
"""Bags that are looked at when a model is built, to learn what it keeps in memory for each tile.

Too low for larger bags where memory grows with the square of the tiles, as in self-attention with dropout on a CPU.
"""
_alone = Lock()  # torchmil draws from global generators, and a model holds one member's weights at a time


class TorchMIL(Aggregator):
    """M copies of one torchmil model; `model_class(NAME)` makes the subclass for a model.

    Options are the arguments of torchmil's class; `feat_ext` is a number here, the width of a linear layer with a ReLU
    in front of the model. Training minimises the model's own losses (`compute_loss`), with instance losses where it has
    them; the logit is what its `predict` says, in evaluation mode (torchmil's own Trainer evaluates in training mode).
    Random numbers depend on member, epoch and slide alone. Models that need more than features, such as a graph of the
    tiles, are refused, and so are more than two classes: torchmil's models have one logit.
    """

    draws = True
    order_matters = True
    model_name = ""

    def __init__(self, in_dim: int, n_outputs: int, seeds: Sequence[int], **options: Any):
        super().__init__(in_dim, n_outputs, seeds)
        found = model_problems(self.model_name, options)
        if n_outputs > 1:
            where = f"model.name=torchmil:{self.model_name}"
            found.append(f"{where}: torchmil's models have one logit, for two classes; got {n_outputs} classes")
        if found:
            raise ValueError("\n".join(found))
        copies = [build(self.model_name, in_dim, options, seed) for seed in self.seeds]
        self._model = (copies[0],)  # in a tuple, so that its weights are not parameters beside the stacks
        self._dropouts = [(m, m.dropout) for m in copies[0].modules() if isinstance(getattr(m, "dropout", None), float)]
        self.names = {name.replace(".", "__"): name for name, _ in copies[0].named_parameters()}
        for ours, theirs in self.names.items():
            stack = torch.stack([copy.get_parameter(theirs).detach() for copy in copies])
            self.register_parameter(ours, nn.Parameter(stack))
        self._labels: dict[int, list[int]] = {}  # slide -> its label for each member
        small, large = (self.kept_floats(n) for n in PROBE_TILES)
        self.floats_per_tile = max(0, -(-(large - small) // (PROBE_TILES[1] - PROBE_TILES[0])))
        self.floats_per_bag = max(0, small - PROBE_TILES[0] * self.floats_per_tile) + 2

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def _apply(self, fn: Any, recurse: bool = True) -> TorchMIL:
        self.model._apply(fn)
        moved: TorchMIL = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return moved

    def forward(self, batch: Batch, with_scores: bool = False) -> Prediction:
        if self.training:
            labels_BM = batch.labels.expand(self.n_members, -1).t().tolist()
            self._labels = dict(zip(batch.slides_B.tolist(), labels_BM, strict=True))
        return super().forward(batch, with_scores)

    def pool(
        self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters, chance: Chance | None = None
    ) -> tuple[Tensor, None]:
        """Columns: the logit, then the model's own loss for the bag's label (NaN: not training, or no label)."""
        rows = []
        for i, tiles_TD_of_member in enumerate(self.tiles_of_members(tiles_TD, p)):
            for b, bag_LD in enumerate(tiles_TD_of_member.split(list(lengths_b))):
                slide = chance.slides_b[b] if chance else 0
                seed = seed_of(chance.seeds_m[i], chance.epoch, slide, "torchmil") if chance else 0
                label = self._labels[slide][chance.members_m[i]] if chance else -1
                rows.append(self.one_bag(bag_LD, {name: p[name][i] for name in self.names}, seed, label))
        return torch.stack(rows).unflatten(0, (-1, len(lengths_b))), None

    def one_bag(self, bag_LD: Tensor, weights: Mapping[str, Tensor], seed: int, label: int) -> Tensor:
        """Logit and loss, (2,)."""
        arguments: dict[str, Any] = {"X": bag_LD.unsqueeze(0)}
        if label < 0:
            logit_1 = self.call("predict", weights, seed, arguments | {"return_inst_pred": False})
            return torch.cat([logit_1.reshape(1), logit_1.new_full((1,), torch.nan)])
        arguments["Y"] = torch.tensor([label], device=bag_LD.device)
        logit_1, losses = self.call("compute_loss", weights, seed, arguments)
        loss = sum(losses.values()) if losses else torch.full_like(logit_1, torch.nan)
        return torch.cat([logit_1.reshape(1), torch.as_tensor(loss).reshape(1)])

    def tile_scores(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """scores_mT: what the model's `predict` says of the tiles: attention before the softmax, or tile logits."""
        found = []
        for i, tiles_TD_of_member in enumerate(self.tiles_of_members(tiles_TD, p)):
            weights = {name: p[name][i] for name in self.names}
            for bag_LD in tiles_TD_of_member.split(list(lengths_b)):
                arguments = {"X": bag_LD.unsqueeze(0), "return_inst_pred": True}
                found.append(self.call("predict", weights, 0, arguments)[1].detach().reshape(-1))
        return torch.cat(found).view(-1, len(tiles_TD))

    def tiles_of_members(self, tiles_TD: Tensor, p: Parameters) -> Iterator[Tensor]:
        """The tiles as each member sees them, one member after the other."""
        used = self.stacks().keys() - set(self.names)
        for i in range(len(next(iter(p.values())))):
            yield self.features(tiles_TD, {name: p[name][i : i + 1] for name in used})[0] if self.mapped else tiles_TD

    def call(self, method: str, weights: Mapping[str, Tensor], seed: int, arguments: dict[str, Any]) -> Any:
        """A method of the model with one member's weights."""
        if self.model_name in NEEDS_MASK:
            arguments = arguments | {"mask": torch.ones(arguments["X"].shape[:2], device=arguments["X"].device)}
        theirs = {f"inner.{self.names[name]}": weight for name, weight in weights.items()}
        with random_numbers_from(seed, arguments["X"].device):
            self.model.train(self.training)
            module: Any
            for module, dropout in self._dropouts:  # torchmil 1.0.2: self-attention drops in evaluation too
                module.dropout = dropout if self.training else 0.0
            return functional_call(_Method(self.model, method), theirs, kwargs=arguments)

    def head(self, pooled_MBP: Tensor) -> Tensor:
        return pooled_MBP[..., :1]

    def losses(self, prediction: Prediction, labels: Tensor) -> Tensor:
        assert prediction.pooled_MBP is not None
        own_MB = prediction.pooled_MBP[..., 1].float()
        logit_MB = cross_entropy(prediction.logits_MBC.float(), labels)
        if prediction.covariates_MBC is not None:  # the model's own loss is of its own logit, without the covariates
            own_MB = own_MB - cross_entropy(self.head(prediction.pooled_MBP).float(), labels) + logit_MB
        return torch.where(own_MB.isnan(), logit_MB, own_MB)

    def left_out(self) -> str:
        return f"losses of {self.model_name}'s own are for two classes"

    def kept_floats(self, n_tiles: int) -> int:
        """Floats that a bag of so many tiles leaves for backward, weights apart."""
        weights = {name: self.get_parameter(name)[0] for name in self.names}
        outside = {stack.untyped_storage().data_ptr() for stack in self.parameters()}
        kept: dict[int, Tensor] = {}

        def remember(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in outside:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            self.one_bag(torch.zeros(n_tiles, self.in_dim), weights, 0, 1)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 4


class _Method(nn.Module):
    """A method of a module as the forward of another, because `functional_call` calls forward."""

    def __init__(self, inner: nn.Module, method: str):
        super().__init__()
        self.inner, self.method = inner, method

    def forward(self, **arguments: Any) -> Any:
        return getattr(self.inner, self.method)(**arguments)


@contextmanager
def random_numbers_from(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators start from `seed` inside, one thread at a time, and are as before afterwards."""
    with _alone, torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = np.random.get_state()  # noqa: NPY002 - DTFDMIL shuffles with it
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  # the generator that torchmil draws from
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002  # as it was for everyone else


def model_class(name: str) -> type[TorchMIL]:
    """The aggregator for torchmil's model NAME."""
    return type(f"TorchMIL_{name}", (TorchMIL,), {"model_name": name, "__doc__": TorchMIL.__doc__})


def models() -> dict[str, Any]:
    """torchmil's models by name."""
    module = importlib.import_module("torchmil.models")
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value) and issubclass(value, module.MILModel) and not name.startswith("MILModel")
    }


def model_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    """Everything that keeps the model from being built: not installed, unknown, needs more, wrong options."""
    where = f"model.name=torchmil:{name}"
    if find_spec("torchmil") is None:
        return [f"{where}: the torchmil package is not installed; pip install torchmil"]
    if name not in models():
        return [f"{where}: torchmil has no such model; there are {', '.join(models())}"]
    cls = models()[name]
    needs = [k for k in {**required(cls.predict), **required(cls.compute_loss)} if k not in ("self", "X", "Y")]
    if needs:
        return [f"{where}: needs {' and '.join(needs)} for every bag, and bags here are features alone"]
    needs = [k for k in required(cls) if k != "in_shape"]
    if needs:
        return [f"{where}: needs {' and '.join(needs)}, which a config cannot name"]
    defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items() if k not in OURS}
    found = []
    for k, value in options.items():
        if k not in defaults:
            found.append(f"model.{k}: unknown option of torchmil:{name}; there are {', '.join(defaults)}")
        elif not fits(value, 0 if k == "feat_ext" else defaults[k]):
            kind = "int" if k == "feat_ext" else type(defaults[k]).__name__
            found.append(f"model.{k}: expected {kind} for torchmil:{name}, got {value!r}")
    return found


def fits(value: Any, default: Any) -> bool:
    """Whether an option has the type of its default; a default that is None or a container says nothing."""
    if not isinstance(default, bool | int | float | str):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))


def required(function: Any) -> dict[str, None]:
    """Names of the arguments without a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: None for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}


def build(name: str, in_dim: int, options: Mapping[str, Any], seed: int) -> nn.Module:
    """A torchmil model with starting weights that depend on the seed alone."""
    chosen = dict(options)
    with random_numbers_from(seed, torch.device("cpu")):
        if chosen.get("feat_ext"):
            chosen["feat_ext"] = nn.Sequential(nn.Linear(in_dim, chosen["feat_ext"]), nn.ReLU())
        else:
            chosen.pop("feat_ext", None)
        model: nn.Module = models()[name](in_shape=(in_dim,), **chosen)
        return model
