"""One battery over every aggregator of the table, and each one's values against a readable reference.

Axes: M members, B bags, T tiles, D features, C outputs (1 for two classes).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mil.training.bags
from extract.config import load_config
from mil.aggregators import AGGREGATORS, PUBLISHED_LR, aggregator_class, contract, layers, options, transformer
from mil.aggregators.batch import Batch, Group, pack
from mil.aggregators.contract import Aggregator
from mil.aggregators.threads import a_thread_a_bag, torch_threads
from mil.config import StudyConfig, model_options
from mil.config_problems import study_problems
from mil.training.bags import Bags, make_batch

DIM = 7
LENGTHS = (1, 9, 4, 13, 2, 6)
SEEDS = (3, 0, 2**62 + 5)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "abmil": ("abmil", {"hidden": 6, "attention": 5, "head": (4,)}),
    "abmil-ungated": ("abmil", {"hidden": 6, "attention": 5, "gated": False, "head": ()}),
    "abmil-embed-relu": ("abmil", {"hidden": 12, "attention": 5, "embed_relu": True, "head": (8, 6)}),
    "abmil-no-embedding": ("abmil", {"hidden": 0, "attention": 5}),
    "chowder-linear": ("chowder", {"n_top": 3, "n_bottom": 2, "tile_hidden": (), "head": (5,)}),
    "chowder-mlp": ("chowder", {"n_top": 2, "n_bottom": 4, "tile_hidden": (6, 4), "head": (5, 3)}),
    "chowder-top-only": ("chowder", {"n_top": 4, "n_bottom": 0, "tile_hidden": (6,), "head": ()}),
    "chowder-bottom-only": ("chowder", {"n_top": 0, "n_bottom": 3, "tile_hidden": (), "head": (4,)}),
    "dsmil": ("dsmil", {"attention": 6}),
    "dsmil-linear-query": ("dsmil", {"attention": 5, "nonlinear": False}),
    "dsmil-values": ("dsmil", {"attention": 8, "values": True}),
    "dsmil-paper": (
        "dsmil",
        {
            **{"attention": 4, "tile_hidden": (6, 5), "query_hidden": (7, 5), "head": (6, 4)},
            **{"scaled": False, "one_loss": True, "idle_values": 3},
        },
    ),
    "clam": ("clam_sb", {"hidden": 12, "attention": 5, "n_instances": 2}),
    "clam-subtyping": (
        "clam_sb",
        {"hidden": 16, "attention": 6, "dropout": 0.5, "n_instances": 3, "instance_weight": 0.5, "subtyping": True},
    ),
    "dtfd": ("dtfd", {"hidden": 12, "attention": 5, "pseudo_bags": 3}),
    "dtfd-maxs": (
        "dtfd",
        {"hidden": 14, "attention": 6, "gated": False, "pseudo_bags": 2, "distill": "maxs", "end_to_end": True},
    ),
    "dtfd-maxmins": ("dtfd", {"hidden": 14, "attention": 6, "pseudo_bags": 4, "distill": "maxmins"}),
    "transmil": ("transmil", {"hidden": 12, "heads": 3, "landmarks": 4, "conv": 3}),
    "transmil-no-conv": (
        "transmil",
        {"hidden": 8, "heads": 2, "landmarks": 20, "pinv_steps": 4, "conv": 0, "dropout": 0.3},
    ),
    "transmil-paper": (
        "transmil",
        {"hidden": 0, "heads": 7, "landmarks": 0, "conv": 0, "dropout": 0.2, "dense": True, "start": "normal"},
    ),
    "hipt-mil": ("hipt_mil", {"hidden": 9, "heads": 3, "mlp": 7, "attention": 5}),
    "hipt-mil-three-layers": (
        "hipt_mil",
        {"hidden": 8, "heads": 2, "layers": 3, "mlp": 10, "attention": 6, "dropout": 0.4},
    ),
    "transformer": ("transformer", {"hidden": 8, "heads": 2, "layers": 2, "induced": 3, "mlp": 10, "attention": 6}),
    "transformer-full": (
        "transformer",
        {"hidden": 9, "heads": 3, "layers": 1, "induced": 0, "mlp": 12, "attention": 5, "dropout": 0.4},
    ),
    "evidence": ("evidence", {"concepts": 5, "tile_hidden": (12,)}),
    "evidence-linear": ("evidence", {"concepts": 4, "tile_hidden": ()}),
    "mean": ("mean", {}),
    "mean-head": ("mean", {"head": (16, 12)}),
    "max": ("max", {}),
    "max-head": ("max", {"head": (16, 12)}),
}


@dataclass(frozen=True)
class Case:
    """One aggregator with its options, one or three logits, with or without standardised features."""

    variant: str
    n_outputs: int
    standardized: bool

    def build(self, seeds: Sequence[int] = SEEDS) -> Aggregator:
        """Members that share a seed share their standardisation, whoever else is there."""
        name, chosen = VARIANTS[self.variant]
        aggregator: Aggregator = aggregator_class(name)(DIM, self.n_outputs, seeds, **chosen)
        if self.standardized:
            rngs = [np.random.default_rng([5, seed % 2**32]) for seed in seeds]
            mean_MD = np.stack([rng.normal(0, 0.5, DIM) for rng in rngs])
            std_MD = np.stack([rng.uniform(0.5, 2, DIM) for rng in rngs])
            std_MD[:, 0] = 0  # a constant feature is only centred
            aggregator.standardize(torch.from_numpy(mean_MD).float(), torch.from_numpy(std_MD).float())
        return aggregator.eval()

    def __str__(self) -> str:
        return f"{self.variant}-C{self.n_outputs}{'-standardized' if self.standardized else ''}"


CASES = [Case(variant, c, s) for variant in VARIANTS for c in (1, 3) for s in (False, True)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def every_case_with(name: str, values: Sequence[int]) -> pytest.MarkDecorator:
    """Every case with one of at most three values, and every variant with all of them, in place of each with each."""
    order = (0, 1, 3, 2)  # so that neither of two values goes with standardised features, or with three logits, alone
    pairs = [(case, values[(i // 4 + order[i % 4]) % len(values)]) for i, case in enumerate(CASES)]
    assert {(case.variant, value) for case, value in pairs} == {(v, value) for v in VARIANTS for value in values}
    return pytest.mark.parametrize(("case", name), pairs, ids=str)


SETS = [case for case in CASES if not aggregator_class(VARIANTS[case.variant][0]).order_matters]


def bags(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(0.3, 1, (n, DIM)).astype(np.float32)) for n in lengths]


def stored(chosen: Sequence[Tensor]) -> Bags:
    lengths = np.array([len(bag) for bag in chosen])
    return Bags(tuple(f"s{i}" for i in range(len(chosen))), lengths, DIM, "ram", tuple(chosen))


def weighted_loss(logits_MBC: Tensor, uses_MB: Tensor | None = None, bags_B: Sequence[int] | None = None) -> Tensor:
    """A loss that every logit of every used bag enters with its own factor, the same for a bag wherever it stands."""
    n_bags, n_outputs = logits_MBC.shape[1:]
    which = range(n_bags) if bags_B is None else bags_B
    factors_BC = torch.tensor([[1.0 + 0.7 * b - 0.9 * c for c in range(n_outputs)] for b in which])
    losses_MB = (torch.sigmoid(logits_MBC) * factors_BC).sum(dim=2)
    return (losses_MB if uses_MB is None else losses_MB * uses_MB).sum()


def training_loss(
    aggregator: Aggregator, batch: Batch, uses_MB: Tensor | None = None, bags_B: Sequence[int] | None = None
) -> Tensor:
    """`weighted_loss` of the logits and the aggregator's own losses with a label and a factor for every bag."""
    prediction = aggregator(batch)
    which = range(len(batch.labels_B)) if bags_B is None else bags_B
    labels_B = torch.tensor([b % max(aggregator.n_outputs, 2) for b in which])
    losses_MB = aggregator.losses(prediction, labels_B) * torch.tensor([0.5 + 0.3 * b for b in which])
    own = (losses_MB if uses_MB is None else losses_MB * uses_MB).sum()
    return weighted_loss(prediction.logits_MBC, uses_MB, bags_B) + own


def gradients(aggregator: Aggregator) -> dict[str, Tensor]:
    found = {}
    for name, parameter in aggregator.named_parameters():
        assert (parameter.grad is None) == name.startswith("idle_"), f"{name}: has no gradient, or should have none"
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the battery ----------------------------------------------------------------------------------------------------


def test_the_battery_covers_the_whole_table_and_every_option():
    assert {name for name, _ in VARIANTS.values()} == set(AGGREGATORS)
    for name in AGGREGATORS:
        varied = {option for variant, chosen in VARIANTS.values() if variant == name for option in chosen}
        assert varied == set(options(name))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_options_read_from_the_source_are_those_of_the_signature(name):
    parameters = inspect.signature(aggregator_class(name)).parameters.values()
    expected = {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert options(name) == expected


def test_published_learning_rates_are_of_aggregators_of_the_table():
    assert set(AGGREGATORS) - set(PUBLISHED_LR) == {"transformer", "evidence"}, "our own; nobody published them"
    assert set(PUBLISHED_LR) <= set(AGGREGATORS)
    assert all(1e-5 < rate < 1e-2 for rate in PUBLISHED_LR.values())


@every_case
def test_shapes(case):
    chosen = bags()
    prediction = case.build()(pack(chosen, len(SEEDS)), with_scores=True)
    assert prediction.logits_MBC.shape == (len(SEEDS), len(LENGTHS), case.n_outputs)
    assert prediction.scores_MT is not None
    assert prediction.scores_MT.shape == (len(SEEDS), sum(LENGTHS))
    assert case.build()(pack(chosen, len(SEEDS))).scores_MT is None


@pytest.mark.parametrize("case", SETS, ids=str)
def test_the_order_of_tiles_changes_nothing(case):
    aggregator, chosen = case.build(), bags()
    order = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    order_T = torch.cat([start + rows for start, rows in zip(starts.tolist(), order, strict=True)])
    before = aggregator(pack(chosen, len(SEEDS)), with_scores=True)
    after = aggregator(pack([bag[rows] for bag, rows in zip(chosen, order, strict=True)], len(SEEDS)), with_scores=True)
    close(after.logits_MBC, before.logits_MBC)
    close(after.scores_MT, before.scores_MT[:, order_T])


@every_case
def test_a_batch_of_one_equals_a_batch_of_many(case):
    aggregator, chosen = case.build(), bags()
    together = aggregator(pack(chosen, len(SEEDS)), with_scores=True)
    alone = [aggregator(pack([bag], len(SEEDS)), with_scores=True) for bag in chosen]
    close(together.logits_MBC, torch.cat([p.logits_MBC for p in alone], dim=1))
    close(together.scores_MT, torch.cat([p.scores_MT for p in alone], dim=1))


@every_case_with("view_tiles", [1, 5])
def test_views_of_bags_equal_small_bags_packed_together(case, view_tiles, monkeypatch):
    aggregator, source = case.build(), stored(bags())
    labels_S, uses_MB = np.zeros(len(LENGTHS), dtype=np.int64), np.ones((len(SEEDS), len(LENGTHS)), dtype=bool)
    slides = [3, 0, 5, 1, 4, 2]
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 10**6)
    packed = make_batch(source, slides, labels_S, uses_MB)
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", view_tiles)
    mixed = make_batch(source, slides, labels_S, uses_MB)
    assert len(packed.groups) == 1
    assert len(mixed.groups) > 1
    logits, gradient = [], []
    for batch in (packed, mixed):
        aggregator.zero_grad()
        training_loss(aggregator, batch).backward()
        logits.append(aggregator(batch).logits_MBC.detach())
        gradient.append({name: g.clone() for name, g in gradients(aggregator).items()})
    close(logits[1], logits[0])
    for name, expected in gradient[0].items():
        close(gradient[1][name], expected)


@every_case
def test_a_bag_of_one_tile_equals_the_same_tile_twice(case):
    """TransMIL puts two tiles on a square of four and one on a square of one."""
    aggregator, (tile_1D,) = case.build(), bags([1])
    if VARIANTS[case.variant][0] == "transmil":
        assert torch.isfinite(aggregator(pack([tile_1D], len(SEEDS))).logits_MBC).all()
        return
    logits_MBC = aggregator(pack([tile_1D, tile_1D.repeat(2, 1)], len(SEEDS))).logits_MBC
    assert torch.isfinite(logits_MBC).all()
    close(logits_MBC[:, 0], logits_MBC[:, 1])


@every_case
def test_the_logits_of_a_tile_are_those_of_a_slide_that_is_nothing_but_this_tile(case):
    model = case.build().eval()
    tiles_TD = torch.randn(9, DIM, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        alone_MTC = torch.cat([model(pack([tile_1D], len(SEEDS))).logits_MBC for tile_1D in tiles_TD.split(1)], dim=1)
        torch.testing.assert_close(model.tile_logits(tiles_TD), alone_MTC, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(Aggregator.tile_logits(model, tiles_TD), alone_MTC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["abmil", "mean", "clam"])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_with_a_linear_head_attention_splits_the_logit_of_the_slide_among_its_tiles(variant, n_outputs):
    name, chosen = VARIANTS[variant]
    options = chosen if name == "clam_sb" else chosen | {"head": ()}
    model = aggregator_class(name)(DIM, n_outputs, SEEDS, **options).eval()
    tiles_TD = torch.randn(9, DIM, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = model(pack([tiles_TD], len(SEEDS)), with_scores=True)
        parts_MTC = found.scores_MT.unsqueeze(2) * model.tile_logits(tiles_TD)
    torch.testing.assert_close(parts_MTC.sum(dim=1, keepdim=True), found.logits_MBC, rtol=1e-4, atol=1e-5)


@every_case
def test_every_parameter_of_every_member_has_a_finite_gradient_that_is_not_zero(case):
    aggregator = case.build()
    training_loss(aggregator, pack(bags(), len(SEEDS))).backward()
    for name, gradient in gradients(aggregator).items():
        assert torch.isfinite(gradient).all(), name
        largest_M = gradient.abs().flatten(1).amax(dim=1)
        if name.endswith("score_bias"):
            assert (largest_M < 1e-6).all(), "a softmax cannot see what is added to all of its scores"
        else:
            assert (largest_M > 1e-6).all(), f"{name}: {largest_M}"


@every_case
def test_a_member_in_a_stack_equals_the_member_alone_logits_and_gradients(case):
    """Every bag is a group of its own with its own users; member 1 uses fewer bags than the others."""
    together, chosen = case.build(), bags()
    uses_MB = torch.tensor([[1, 1, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    groups = [
        Group(bag, (len(bag),), (b,), tuple(torch.nonzero(uses_MB[:, b]).flatten().tolist()))
        for b, bag in enumerate(chosen)
    ]
    batch = Batch(tuple(groups), torch.zeros(6, dtype=torch.int64), torch.arange(6), uses_MB)
    training_loss(together, batch, uses_MB).backward()
    logits_MBC = together(batch).logits_MBC
    for m, seed in enumerate(SEEDS):
        own = torch.nonzero(uses_MB[m]).flatten().tolist()
        alone = case.build([seed])
        own_batch = pack([chosen[b] for b in own], 1)
        training_loss(alone, own_batch, bags_B=own).backward()
        close(logits_MBC[m, own], alone(own_batch).logits_MBC[0])
        for name, gradient in gradients(alone).items():
            close(gradients(together)[name][m], gradient[0])


@every_case
def test_groups_of_several_bags_for_some_of_the_members(case):
    """Two packed groups: one for members 0 and 2, one for all. Equals one bag at a time."""
    aggregator, chosen = case.build(), bags()
    uses_MB = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    first = Group(torch.cat(chosen[:3]), LENGTHS[:3], (0, 1, 2), (0, 2))
    second = Group(torch.cat(chosen[3:]), LENGTHS[3:], (3, 4, 5))
    batch = Batch((first, second), torch.zeros(6, dtype=torch.int64), torch.arange(6), uses_MB)
    logits_MBC = aggregator(batch).logits_MBC
    for b, bag in enumerate(chosen):
        used_M = uses_MB[:, b]
        close(logits_MBC[used_M, b], aggregator(pack([bag], len(SEEDS))).logits_MBC[used_M, 0])


def uneven_batch(chosen: Sequence[Tensor]) -> Batch:
    """A packed group for members 0 and 2, and groups of one bag for all, for member 1 and for members 1 and 2."""
    uses_MB = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    first = Group(torch.cat(chosen[:3]), LENGTHS[:3], (0, 1, 2), (0, 2))
    others = [Group(chosen[b], (LENGTHS[b],), (b,), members) for b, members in ((3, None), (4, (1,)), (5, (1, 2)))]
    return Batch((first, *others), torch.zeros(6, dtype=torch.int64), torch.arange(6), uses_MB)


@every_case_with("threads", [2, 3, 9])
def test_threads_change_nothing(case, threads):
    """Groups, or members of a group where there are more threads than groups, run on threads of their own."""
    for batch in (uneven_batch(bags()), pack(bags(), len(SEEDS))):
        logits, scores, gradient = [], [], []
        for n_threads in (1, threads, threads):
            aggregator = case.build()
            aggregator.threads = n_threads
            training_loss(aggregator, batch, batch.uses_MB).backward()
            logits.append(aggregator(batch).logits_MBC.detach())
            gradient.append(gradients(aggregator))
            with torch.no_grad():
                prediction = aggregator(batch, with_scores=True)
            close(prediction.logits_MBC, logits[0])
            scores.append(prediction.scores_MT)
        for i in (1, 2):
            close(logits[i], logits[0])
            torch.testing.assert_close(scores[i], scores[0], equal_nan=True)
            for name, expected in gradient[0].items():
                close(gradient[i][name], expected)
        for name, again in gradient[2].items():
            assert torch.equal(gradient[1][name], again), f"{name}: which thread was quicker must not matter"


@every_case_with("threads", [1, 2])
def test_members_of_small_bags_together_or_some_at_a_time_give_the_same(case, threads, monkeypatch):
    for batch in (uneven_batch(bags()), pack(bags(), len(SEEDS))):
        found = []
        for few_tiles in (0, 10**6):
            monkeypatch.setattr(contract, "FEW_TILES", few_tiles)
            aggregator = case.build()
            aggregator.threads = threads
            training_loss(aggregator, batch, batch.uses_MB).backward()
            found.append((aggregator(batch).logits_MBC.detach(), gradients(aggregator)))
        (apart, apart_gradients), (together, together_gradients) = found
        close(together, apart)
        for name, expected in apart_gradients.items():
            close(together_gradients[name], expected)


@pytest.mark.parametrize("variant", ["abmil", "transformer"])
def test_threads_keep_the_precision_of_autocast(variant):
    """Autocast belongs to a thread; one that is started inside must be told."""
    found = {}
    for threads, dtype in ((1, None), (1, torch.bfloat16), (2, torch.bfloat16)):
        aggregator = Case(variant, 1, False).build()
        aggregator.threads = threads
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits_MBC = aggregator(uneven_batch(bags())).logits_MBC.float()
        weighted_loss(logits_MBC).backward()
        found[threads, dtype] = (logits_MBC, aggregator.get_parameter("head0_weight").grad)
    for exact, rough, in_threads in zip(*found.values(), strict=True):
        assert (rough - exact).abs().max() > 1e-4, "bfloat16 must show"
        close(in_threads, rough)


@pytest.mark.parametrize(("n_members", "expected"), [(1, {2}), (2, {1})])
def test_a_bag_that_is_alone_gets_all_of_torchs_threads(n_members, expected, monkeypatch):
    """One task: torch's threads share its products; several: one thread each. As before afterwards."""
    aggregator = aggregator_class("transformer")(DIM, 1, SEEDS[:n_members], hidden=8, heads=2, induced=3)
    tiles_TD, found = torch.randn(contract.FEW_TILES + 1, DIM, generator=torch.Generator().manual_seed(0)), []
    linear = layers.shared_linear

    def watched(x_TD: Tensor, *layer: Tensor) -> Tensor:
        y_mTH = linear(x_TD, *layer)
        y_mTH.register_hook(lambda gradient: found.append(("backward", torch.get_num_threads())))
        found.append(("forward", torch.get_num_threads()))
        return y_mTH

    monkeypatch.setattr(transformer, "shared_linear", watched)
    with torch_threads(2):
        with a_thread_a_bag(aggregator):
            aggregator(pack([tiles_TD], n_members)).logits_MBC.sum().backward()
        assert torch.get_num_threads() == 2
    assert {direction for direction, _ in found} == {"forward", "backward"}
    assert {threads for _, threads in found} == expected


@every_case
def test_scores_of_bags_that_a_member_does_not_use_are_nan(case):
    aggregator, chosen = case.build(), bags()
    batch = uneven_batch(chosen)
    scores_MT = aggregator(batch, with_scores=True).scores_MT
    used_MT = batch.uses_MB.repeat_interleave(torch.tensor(LENGTHS), dim=1)
    assert torch.equal(scores_MT.isnan(), ~used_MT)
    everything_MT = aggregator(pack(chosen, len(SEEDS)), with_scores=True).scores_MT
    close(scores_MT[used_MT], everything_MT[used_MT])


@every_case
def test_members_start_different_and_as_each_would_start_alone(case):
    together = case.build()
    alone = [case.build([seed]) for seed in SEEDS]
    for name, stack in together.named_parameters():
        for m, member in enumerate(alone):
            assert torch.equal(stack[m], member.get_parameter(name)[0]), name
    for name in [name for name, _ in together.named_parameters() if name.endswith("_weight")]:
        first, second, third = together.get_parameter(name)
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
        assert not torch.equal(first, third)


# --- chance ---------------------------------------------------------------------------------------------------------

DRAWING = [variant for variant, (name, _) in VARIANTS.items() if aggregator_class(name).draws]


@pytest.mark.parametrize("variant", DRAWING)
def test_a_member_draws_the_same_alone_among_others_in_any_batch_and_on_any_thread(variant):
    """Chance depends on member, epoch and slide alone: not on torch's generator, and not on who else is there."""
    case, chosen = Case(variant, 1, False), bags()
    together = case.build().train()
    batch = uneven_batch(chosen)
    for epoch, threads in ((0, 1), (3, 3)):
        together.epoch, together.threads = epoch, threads
        torch.manual_seed(epoch)
        together.zero_grad()
        training_loss(together, batch, batch.uses_MB).backward()
        logits_MBC = together(batch).logits_MBC
        for m, seed in enumerate(SEEDS):
            own = torch.nonzero(batch.uses_MB[m]).flatten().tolist()
            alone = case.build([seed]).train()
            alone.epoch = epoch
            packed = replace(pack([chosen[b] for b in own], 1), slides_B=torch.tensor(own))
            training_loss(alone, packed, bags_B=own).backward()
            close(logits_MBC[m, own], alone(packed).logits_MBC[0])
            for name, gradient in gradients(alone).items():
                close(gradients(together)[name][m], gradient[0])


@pytest.mark.parametrize("variant", DRAWING)
def test_chance_differs_by_epoch_slide_and_member_and_is_off_in_evaluation(variant):
    bag = bags([40])[0]
    aggregator = Case(variant, 1, False).build([3, 3, 5])
    with torch.no_grad():
        for stack in aggregator.parameters():
            stack[2] = stack[0]  # members 0 and 2 differ by their chance alone
        evaluated_MBC = aggregator(pack([bag, bag], 3)).logits_MBC
        close(evaluated_MBC[:, 1], evaluated_MBC[:, 0])
        close(evaluated_MBC[2], evaluated_MBC[0])
        aggregator.train()
        first_MBC = aggregator(pack([bag, bag], 3)).logits_MBC
        assert torch.equal(aggregator(pack([bag, bag], 3)).logits_MBC, first_MBC)
        aggregator.epoch = 1
        second_MBC = aggregator(pack([bag, bag], 3)).logits_MBC
    assert torch.equal(first_MBC[0], first_MBC[1])
    for one, other in (
        (first_MBC[0, 0], first_MBC[0, 1]),
        (first_MBC[0], first_MBC[2]),
        (first_MBC[0], second_MBC[0]),
        (first_MBC[0], evaluated_MBC[0]),
    ):
        assert (one - other).abs().max() > 1e-5


# --- stored features ------------------------------------------------------------------------------------------------


@every_case
def test_float16_tiles_give_what_the_same_values_give_as_float32(case):
    aggregator = case.build()
    halves = [bag.half() for bag in bags()]
    batches = [pack(halves, len(SEEDS)), pack([bag.float() for bag in halves], len(SEEDS))]
    logits = [aggregator(batch).logits_MBC for batch in batches]
    assert logits[0].dtype == torch.float32
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("case", [case for case in CASES if case.standardized], ids=str)
def test_standardising_equals_standardised_features(case):
    plain = Case(case.variant, case.n_outputs, False)
    for m, seed in enumerate(SEEDS):
        aggregator = case.build()
        mean_D, scale_D = aggregator.input_mean_MD[m], aggregator.input_scale_MD[m]
        assert scale_D[0] == 1
        expected = plain.build([seed])(pack([(bag - mean_D) * scale_D for bag in bags()], 1)).logits_MBC[0]
        close(aggregator(pack(bags(), len(SEEDS))).logits_MBC[m], expected)


# --- starting values ------------------------------------------------------------------------------------------------


def test_layers_start_as_torch_linear_does():
    torch.manual_seed(0)
    linear = nn.Linear(64, 400)
    aggregator = aggregator_class("abmil")(64, 1, [0], hidden=400)
    for ours, theirs in ((aggregator.embed_weight, linear.weight), (aggregator.embed_bias, linear.bias)):
        assert ours.abs().max() <= 1 / 8
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
        assert ours.mean().item() == pytest.approx(0, abs=0.02)


def test_chowder_starts_with_xavier_weights_and_zero_biases():
    aggregator = aggregator_class("chowder")(64, 1, [0, 1], n_top=5, n_bottom=5, tile_hidden=(200,), head=(200, 100))
    torch.manual_seed(0)
    for name, parameter in aggregator.named_parameters():
        if name.endswith("_bias"):
            assert not parameter.any(), name
            continue
        reference = nn.init.xavier_uniform_(torch.empty(parameter.shape[2], parameter.shape[1]))
        assert parameter.abs().max() <= (6 / sum(parameter.shape[1:])) ** 0.5
        if parameter[0].numel() > 1000:
            assert parameter[1].std().item() == pytest.approx(reference.std().item(), rel=0.1), name


def n_parameters(aggregator: Aggregator) -> int:
    return sum(p.numel() for p in aggregator.parameters())


def test_parameter_counts_of_the_published_settings():
    """Chowder: Owkin's Camelyon16 tutorial prints 23,170. The others are counted by hand, per member."""
    tutorial = {"n_top": 5, "n_bottom": 5, "tile_hidden": (), "head": (200, 100)}
    assert n_parameters(aggregator_class("chowder")(768, 1, [0], **tutorial)) == 23_170
    paper_head = 20 * 128 + 128 + 128 * 64 + 64 + 64 + 1
    assert n_parameters(aggregator_class("chowder")(768, 1, [0])) == 768 * 128 + 128 + 128 + 1 + paper_head
    paper_head = 128 * 128 + 128 + 128 * 64 + 64 + 64 + 1
    assert (
        n_parameters(aggregator_class("abmil")(768, 1, [0]))
        == 768 * 128 + 128 + 2 * (128 * 128 + 128) + 129 + paper_head
    )
    assert n_parameters(aggregator_class("mean")(768, 1, [0, 1])) == 2 * 769
    assert n_parameters(aggregator_class("max")(768, 3, [0])) == 3 * 769


PAPER = {
    "abmil": 156_418,
    "chowder": 109_570,
    "dsmil": 549_742,
    "transmil": 53_683_969,
    "hipt_mil": 705_410,
    "mean": 769,
}
"""The Phikon paper's aggregators for 768 features and one logit, counted in its published code."""


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_config_has_aggregators_of_the_papers_size(name):
    config = load_config(StudyConfig, ["config=camelyon16-paper.yaml"], also=study_problems)
    assert config.model.names == list(PAPER)
    built = aggregator_class(name)(768, 1, [0], **model_options(config.model, name))
    assert n_parameters(built) == PAPER[name]


def described(name: str) -> dict[str, int]:
    """The numbers of parameters in a docstring's table, by column."""
    doc = inspect.getdoc(aggregator_class(name)) or ""
    (line,) = [line for line in doc.splitlines() if line.startswith("| parameters")]
    (head,) = [line for line in doc.splitlines() if line.startswith("| |")]
    titles, cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in (head, line))
    return {t: int(c.replace(",", "")) for t, c in zip(titles, cells, strict=True) if re.fullmatch(r"[\d,]+", c)}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_docstring_says_how_many_parameters_there_are(name):
    said = described(name)
    assert said["ours"] == n_parameters(aggregator_class(name)(768, 1, [0]))
    if name in PAPER:
        assert said.get("as the Phikon paper", said["ours"]) == PAPER[name]
    assert re.search(r"^\| \| .*published.* \| ours \|.* why \|$", inspect.getdoc(aggregator_class(name)), re.M)


# --- ABMIL against a loop over bags ---------------------------------------------------------------------------------


def linear_layer(aggregator: Aggregator, name: str, member: int) -> nn.Linear:
    weight_IO = getattr(aggregator, f"{name}_weight")[member].detach()
    layer = nn.Linear(*weight_IO.shape)
    layer.weight.data.copy_(weight_IO.T)
    layer.bias.data.copy_(getattr(aggregator, f"{name}_bias")[member].detach())
    return layer


def network(aggregator: Aggregator, prefix: str, n_layers: int, member: int, activation: nn.Module) -> nn.Sequential:
    """Layers PREFIX0, PREFIX1, ... with an activation between them."""
    layers: list[nn.Module] = []
    for i in range(n_layers):
        layers += [activation] * (i > 0) + [linear_layer(aggregator, f"{prefix}{i}", member)]
    return nn.Sequential(*layers)


def abmil_of_one_bag(aggregator: Any, member: int, bag_TD: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """Ilse et al. 2018, equations 8 and 9, for one bag of one member."""
    score_A1 = aggregator.score_weight[member].detach()
    h_TH = linear_layer(aggregator, "embed", member)(bag_TD)
    if aggregator.embed_relu:
        h_TH = torch.relu(h_TH)
    a_TA = torch.tanh(linear_layer(aggregator, "attend", member)(h_TH))
    if aggregator.gated:
        a_TA = a_TA * torch.sigmoid(linear_layer(aggregator, "gate", member)(h_TH))
    weights_T1 = torch.softmax(a_TA @ score_A1, dim=0)
    pooled_H = (weights_T1 * h_TH).sum(dim=0)
    return network(aggregator, "head", n_head, member, nn.ReLU())(pooled_H), weights_T1.squeeze(1)


@pytest.mark.parametrize("variant", ["abmil", "abmil-ungated", "abmil-embed-relu"])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_abmil_equals_a_loop_over_bags_with_torch_layers(variant, n_outputs):
    aggregator, chosen = Case(variant, n_outputs, False).build(), bags()
    prediction = aggregator(pack(chosen, len(SEEDS)), with_scores=True)
    n_head = len(VARIANTS[variant][1]["head"]) + 1
    for m in range(len(SEEDS)):
        expected = [abmil_of_one_bag(aggregator, m, bag, n_head) for bag in chosen]
        close(prediction.logits_MBC[m], torch.stack([logits_C for logits_C, _ in expected]))
        close(prediction.scores_MT[m], torch.cat([weights_T for _, weights_T in expected]))


def test_attention_weights_sum_to_one_in_every_bag_even_for_huge_scores():
    aggregator = Case("abmil", 1, False).build()
    with torch.no_grad():
        aggregator.get_parameter("score_weight").mul_(1e4)
    prediction = aggregator(pack(bags(), len(SEEDS)), with_scores=True)
    assert torch.isfinite(prediction.logits_MBC).all()
    for weights_MT in prediction.scores_MT.split(LENGTHS, dim=1):
        close(weights_MT.sum(dim=1), torch.ones(len(SEEDS)))


# --- Chowder against sorting ----------------------------------------------------------------------------------------


def chowder_of_one_bag(aggregator: Any, member: int, bag_TD: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """All tiles scored, each class's scores sorted with numpy, a short list filled up with its last entry."""
    scores_TC = network(aggregator, "tile", len(aggregator.tile_layers), member, nn.Sigmoid())(bag_TD)
    head = network(aggregator, "head", n_head, member, nn.Sigmoid())
    logits = []
    for scores_T in scores_TC.T:
        ascending = np.argsort(scores_T.detach().numpy(), kind="stable")
        top, bottom = list(ascending[::-1][: aggregator.n_top]), list(ascending[: aggregator.n_bottom])
        rows = (
            top + top[-1:] * (aggregator.n_top - len(top)) + bottom + bottom[-1:] * (aggregator.n_bottom - len(bottom))
        )
        logits.append(head(scores_T[rows]))
    return torch.cat(logits), scores_TC.amax(dim=1)


CHOWDERS = [variant for variant, (name, _) in VARIANTS.items() if name == "chowder"]


@pytest.mark.parametrize("variant", CHOWDERS)
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_chowder_equals_sorting_all_scores(variant, n_outputs):
    aggregator, chosen = Case(variant, n_outputs, False).build(), bags()
    prediction = aggregator(pack(chosen, len(SEEDS)), with_scores=True)
    n_head = len(VARIANTS[variant][1]["head"]) + 1
    for m in range(len(SEEDS)):
        expected = [chowder_of_one_bag(aggregator, m, bag, n_head) for bag in chosen]
        close(prediction.logits_MBC[m], torch.stack([logits_C for logits_C, _ in expected]))
        close(prediction.scores_MT[m], torch.cat([scores_T for _, scores_T in expected]))


@pytest.mark.parametrize("variant", CHOWDERS)
@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("standardized", [False, True])
def test_chowder_has_the_gradient_of_scoring_all_tiles_with_gradient(variant, n_outputs, standardized):
    aggregator: Any = Case(variant, n_outputs, standardized).build()
    chosen = bags()
    weighted_loss(aggregator(pack(chosen, len(SEEDS))).logits_MBC).backward()
    for m in range(len(SEEDS)):
        weights = {name: p[m].detach().clone().requires_grad_() for name, p in aggregator.named_parameters()}
        mean_D, scale_D = aggregator.input_mean_MD[m], aggregator.input_scale_MD[m]
        logits = [naive_chowder(aggregator, weights, (bag - mean_D) * scale_D) for bag in chosen]
        weighted_loss(torch.stack(logits).unsqueeze(0)).backward()
        for name, weight in weights.items():
            close(gradients(aggregator)[name][m], weight.grad)


def naive_chowder(aggregator: Any, weights: dict[str, Tensor], bag_TD: Tensor) -> Tensor:
    x_TH = bag_TD
    for i in range(len(aggregator.tile_layers)):
        x_TH = (torch.sigmoid(x_TH) if i else x_TH) @ weights[f"tile{i}_weight"] + weights[f"tile{i}_bias"]
    sides = []
    for n, descending in ((aggregator.n_top, True), (aggregator.n_bottom, False)):
        sorted_TC = x_TH.sort(dim=0, descending=descending).values
        sides.append(sorted_TC[torch.arange(n).clamp(max=len(bag_TD) - 1)])
    x_CK = torch.cat(sides).T
    for i in range(aggregator.n_head_layers):
        x_CK = (torch.sigmoid(x_CK) if i else x_CK) @ weights[f"head{i}_weight"] + weights[f"head{i}_bias"]
    return x_CK.squeeze(1)


@pytest.mark.parametrize("n_tiles", range(1, 8))
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_trap_7_chowder_takes_bags_smaller_than_its_extremes(n_tiles, n_outputs):
    case = Case("chowder-linear", n_outputs, False)  # 3 + 2 extremes
    aggregator, (bag_TD,) = case.build(), bags([n_tiles], seed=n_tiles)
    logits_MBC = aggregator(pack([bag_TD], len(SEEDS))).logits_MBC
    for m in range(len(SEEDS)):
        close(logits_MBC[m, 0], chowder_of_one_bag(aggregator, m, bag_TD, n_head=2)[0])
    logits_MBC.sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(aggregator).values())


def test_chowder_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match=r"model.n_bottom: expected at least 1, because model.n_top is 0, got 0"):
        aggregator_class("chowder")(DIM, 1, [0], n_top=0, n_bottom=0)


# --- mean and max against numpy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "max"])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_mean_and_max_equal_numpy(name, n_outputs):
    aggregator, chosen = Case(name, n_outputs, False).build(), bags()
    prediction = aggregator(pack(chosen, len(SEEDS)), with_scores=True)
    arrays = [bag.numpy() for bag in chosen]
    pooled_BD = np.stack([getattr(np, name)(array, axis=0) for array in arrays])
    weight_MDC = aggregator.get_parameter("head0_weight").detach().numpy()
    bias_MC = aggregator.get_parameter("head0_bias").detach().numpy()
    expected = pooled_BD @ weight_MDC + bias_MC[:, None]
    np.testing.assert_allclose(prediction.logits_MBC.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    if name == "mean":
        scores_T = np.concatenate([np.full(len(array), 1 / len(array)) for array in arrays])
    else:
        winners = [np.bincount(array.argmax(axis=0), minlength=len(array)) for array in arrays]
        scores_T = np.concatenate(winners) / DIM
    np.testing.assert_allclose(prediction.scores_MT.numpy(), np.tile(scores_T, (len(SEEDS), 1)), rtol=1e-6)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_the_memory_that_members_per_pass_counts_on_covers_what_autograd_keeps(variant, n_outputs):
    """`floats_per_tile` and `floats_per_bag` bound what a forward pass saves for backward, parameters apart."""
    aggregator = Case(variant, n_outputs, False).build().train()
    lengths = (300, 500, 280)
    batch = pack(bags(lengths), len(SEEDS))
    outside = {p.untyped_storage().data_ptr() for p in aggregator.parameters()}
    outside.add(batch.groups[0].tiles_TD.untyped_storage().data_ptr())
    kept: dict[int, int] = {}
    alive = []

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        aggregator(batch)
    expected = sum(lengths) * aggregator.floats_per_tile + len(lengths) * aggregator.floats_per_bag
    weights = sum(p.numel() for p in aggregator.parameters())  # transposed or standardised copies of them
    assert sum(kept.values()) / 4 <= 1.25 * (expected * len(SEEDS) + weights)
