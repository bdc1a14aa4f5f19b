"""One aggregator as a plain torch module: one bag in, its logits out.

Axes: M members (here 1), T tiles of the bag, D features, C outputs (1 for two classes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from extract.config import ConfigError
from mil.aggregators import aggregator_class
from mil.aggregators.batch import Batch, Prediction, pack
from mil.aggregators.contract import Aggregator
from mil.config import Model, model_options
from mil.config_problems import model_problems
from mil.training.members import n_outputs


def aggregator(name: str, in_dim: int, n_classes: int = 2, *, seed: int = 0, **options: Any) -> OneBag:
    """An aggregator of `model.name` for a training loop of your own.

    >>> import mil, torch
    >>> model = mil.aggregator("abmil", in_dim=768, n_classes=2, hidden=64)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    >>> bag_TD, label = torch.randn(500, 768), torch.tensor(1)
    >>> logits_C = model(bag_TD)  # for two classes one number: the log-odds of class 1
    >>> logits_C.shape
    torch.Size([1])
    >>> model.loss(bag_TD, label).backward()
    >>> optimizer.step()
    >>> model.eval().tile_scores(bag_TD).shape
    torch.Size([500])

    Args:
        name: as `model.name`: abmil, chowder, ... or torchmil:NAME.
        in_dim: features of a tile.
        n_classes: two give one logit, more give one each.
        seed: of the starting values, and of dropout.
        options: the aggregator's own, as `model.OPTION` (see `python -m mil.train --help`).

    Raises:
        ConfigError: no such aggregator, or everything that is wrong with its options.
    """
    problems = [f"in_dim={in_dim}: expected at least 1"] if in_dim < 1 else []
    problems += [f"n_classes={n_classes}: expected at least 2"] if n_classes < 2 else []
    problems += option_problems(name, options)
    if problems:
        raise ConfigError("problems in the aggregator", problems)
    try:
        return OneBag(build(name, in_dim, n_classes, [seed], options))
    except ValueError as error:  # what only the aggregator itself can say
        raise ConfigError("problems in the aggregator", str(error).splitlines()) from None


def option_problems(name: object, options: dict[str, Any]) -> list[str]:
    """What is wrong with an aggregator's name and options; keys of the section `model` that are none are refused."""
    if not isinstance(name, str):
        return [f"expected the name of one aggregator, got {name!r}"]
    others = [key for key in options if key in Model.model_fields]
    return [f"model.{key}: not an option of an aggregator" for key in others] + model_problems(
        {"name": name} | {key: value for key, value in options.items() if key not in others}
    )


def build(name: str, in_dim: int, n_classes: int, seeds: list[int], options: dict[str, Any]) -> Aggregator:
    """The stack of as many members as there are seeds; ValueError where the aggregator refuses its options."""
    return stack_of(name, in_dim, n_outputs(tuple(map(str, range(n_classes)))), seeds, options)


def stack_of(name: str, in_dim: int, outputs: int, seeds: list[int], options: dict[str, Any]) -> Aggregator:
    """`build`, told the outputs of a member."""
    typed = model_options(Model(name=name, **options), name)
    stack = aggregator_class(name)(in_dim, outputs, seeds, **typed)
    assert isinstance(stack, Aggregator)
    return stack


class OneBag(nn.Module):
    """Member 0 of a stack of one: the same values and gradients as a study's member has.

    Its parameters keep their first axis of length 1. Dropout draws anew in every call in training mode, from the seed
    and the number of the call, so that a loop gives the same again.
    """

    def __init__(self, stack: Aggregator):
        super().__init__()
        self.stack, self.calls = stack, 0

    def forward(self, bag_TD: Tensor) -> Tensor:
        """logits_C of one bag (T, D), float16 or float32, at least one tile; ValueError for another shape."""
        return self._predict(self._batch(bag_TD)).logits_MBC[0, 0]

    def loss(self, bag_TD: Tensor, label: Tensor | int) -> Tensor:
        """What a study minimises for this bag: the cross-entropy, and what the aggregator adds (CLAM, DSMIL, DTFD).

        label: class index.
        """
        batch = self._batch(bag_TD, int(label))
        return self.stack.losses(self._predict(batch), batch.labels)[0, 0]

    def tile_scores(self, bag_TD: Tensor) -> Tensor:
        """What the logits looked at, (T,): `stack.score_name` says what it is; attention sums to 1. No gradients."""
        training = self.stack.training
        self.stack.eval()
        try:
            with torch.no_grad():
                scores_MT: Tensor | None = self.stack(self._batch(bag_TD), with_scores=True).scores_MT
        finally:
            self.stack.train(training)
        assert scores_MT is not None
        return scores_MT[0].float()

    def _batch(self, bag_TD: Tensor, label: int = -1) -> Batch:
        if bag_TD.ndim != 2 or bag_TD.shape[1] != self.stack.in_dim or not len(bag_TD):
            wanted = f"(tiles, {self.stack.in_dim})"
            raise ValueError(f"expected one bag {wanted} of at least one tile, got {tuple(bag_TD.shape)}")
        return pack([bag_TD], 1, [label]).to(bag_TD.device)

    def _predict(self, batch: Batch) -> Prediction:
        self.stack.epoch = self.calls  # what `Chance` draws from
        self.calls += int(self.training)
        prediction: Prediction = self.stack(batch)
        return prediction
