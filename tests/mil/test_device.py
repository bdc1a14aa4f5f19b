"""The path of a GPU on whatever device is here: features on the device, batches that are lists of bags, no waiting.

The device is the CPU, or that of the environment's SLIDE_MIL_DEVICE (`benchmarks/gpu.sh` runs these tests on a GPU);
what never waits is shown on torch's meta device, where whoever asks for a value gets an error.

Axes: M members, S slides, T tiles, D features.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from extract.config import ConfigError
from mil.aggregators import AGGREGATORS, aggregator_class, hipt_mil
from mil.aggregators.chance import Chance
from mil.aggregators.places import segments
from mil.aggregators.repeatable import strict_in_backward
from mil.aggregators.segments import bag_of_tile, segment_extremes, segment_reduce, segment_softmax, segment_sum
from mil.config import Train
from mil.results.trained import member_logits
from mil.training.bags import Bags, TrainingSteps, make_batch
from mil.training.counting import NOT_DETERMINISTIC, Counted, step_counted
from mil.training.device import DeviceFeatures, bags_by_members, block_of, device_features, features_for_scoring
from mil.training.module import Members, MembersModule, fit, predict_logits
from mil.training.optim import MemberAdam

LENGTHS = (3, 9, 5, 9, 1, 9, 9, 4, 12, 9, 6, 9)
EQUAL = (6,) * 12
DIM, MEMBERS = 5, 4
LABELS_S = np.arange(12) % 2
OF_ONE_LENGTH = ("abmil", "chowder", "max", "transmil", "hipt_mil", "transformer")


def bags_of(lengths: tuple[int, ...], **options: Any) -> Bags:
    block_TD = torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(1)).half()
    return Bags(
        tuple(f"s{i}" for i in range(len(lengths))), np.array(lengths), DIM, "ram", block_TD.split(lengths), **options
    )


def members() -> Members:
    """Two members of one fold, and two others; the last trains on few slides and has weight decay."""
    train_MS = np.stack([np.arange(12) % 3 != f for f in (0, 0, 1, 2)])
    train_MS[3, 6:] = False
    val_MS = np.stack([np.arange(12) % 3 == f for f in (0, 0, 1, 2)])
    return Members(np.array([1e-2, 1e-3, 1e-2, 1e-2]), np.array([0, 0, 0, 1e-2]), train_MS, val_MS)


def module(name: str, bags: Bags, options: dict[str, Any], accelerator: str = "cpu", **settings: Any) -> MembersModule:
    aggregator = aggregator_class(name)(DIM, 1, [0, 1, 2, 3], **options)
    train = Train(epochs=3, batch_size=4, accelerator=accelerator, **settings)
    return MembersModule(aggregator, bags, LABELS_S, 2, members(), train, max_tiles=8)


def outcome(trained: MembersModule) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all slides and the curves, behind three epochs with checks on val."""
    fit(trained, progress=False)
    curves = np.array([[row[k] for k in ("train_loss", "val_loss")] for row in trained.history])
    return predict_logits(trained, list(range(12))), curves


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        *((name, LENGTHS) for name in AGGREGATORS),
        *((name, EQUAL) for name in OF_ONE_LENGTH),
    ],
    ids=lambda value: "equal" if value is EQUAL else "ragged" if value is LENGTHS else value,
)
def test_the_path_of_a_device_trains_what_the_path_of_a_cpu_trains(name, lengths, small_options, device):
    settings = {"optimizer": "adamw", "select": "best"}
    expected = outcome(module(name, bags_of(lengths), small_options[name], **settings))
    there = bags_of(lengths, on_device="yes")
    found = outcome(module(name, there, small_options[name], device.type, **settings))
    assert there.elsewhere, "the path of the CPU was taken"
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)
    if lengths is LENGTHS:
        again = outcome(module(name, there, small_options[name], device.type, **settings))
        assert all(map(np.array_equal, found, again)), "the same seed, not the same bits"


def uses_of_members() -> np.ndarray:
    """Two bags that everybody uses, two of two members each, one of one member, and one that nobody uses."""
    return np.array([[1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 0, 0]], dtype=bool)


@pytest.mark.parametrize("resident", [True, False], ids=["on the device", "copied ahead"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_batch_on_the_device_has_the_gradients_of_a_batch_of_the_cpu(name, resident, small_options, device):
    bags, slides, uses_MB = bags_of(LENGTHS), [1, 3, 0, 8, 5, 2], uses_of_members()
    rows = lambda slide: torch.arange(2) if slide == 8 else None  # noqa: E731
    there = DeviceFeatures(bags, device, block_of(bags, device) if resident else None)
    found = []
    for batch in (make_batch(bags, slides, LABELS_S, uses_MB, rows=rows), there.batch(slides, LABELS_S, uses_MB, rows)):
        torch.manual_seed(0)
        aggregator = aggregator_class(name)(DIM, 1, [0, 1, 2, 3], **small_options[name])
        aggregator = aggregator.to(batch.labels_B.device)
        prediction = aggregator(batch, with_scores=False)
        losses_MB = aggregator.losses(prediction, batch.labels)
        (losses_MB * batch.uses_MB).sum().backward()
        gradients = {n: p.grad.cpu() for n, p in aggregator.named_parameters() if p.grad is not None}
        found.append((losses_MB.detach().cpu()[torch.from_numpy(uses_MB)], gradients))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for key, gradient in found[1][1].items():
        torch.testing.assert_close(gradient, found[0][1][key], atol=1e-5, rtol=1e-5, msg=key)


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("dsmil", {"values": True, "one_loss": True}),
    ("dsmil", {}),
    ("clam_sb", {"subtyping": True, "n_instances": 3}),
    ("dtfd", {"distill": "maxs", "end_to_end": True}),
    ("dtfd", {"distill": "maxmins", "pseudo_bags": 3}),
    ("transformer", {"induced": 0}),
    ("transformer", {}),
    ("hipt_mil", {}),
    ("hipt_mil", {"layers": 1, "dropout": 0.0}),
    ("transmil", {}),
    ("transmil", {"dense": True, "conv": 0, "landmarks": 7}),
    ("transmil", {"hidden": 0, "landmarks": 0, "heads": 1, "conv": 0, "dense": True, "dropout": 0.0}),  # Phikon paper's
    ("transmil", {"landmarks": 0}),
    ("transmil", {"landmarks": 1, "conv": 5}),
]


@pytest.mark.parametrize("lengths", [(3, 1, 7, 12, 9, 10, 2, 26, 31), (4, 4, 4)], ids=["ragged", "equal"])
@pytest.mark.parametrize(("name", "form"), FORMS, ids=str)
def test_every_form_pools_all_bags_at_once_as_it_pools_them_one_by_one(
    name, form, lengths, small_options, device, monkeypatch
):
    """In training, whose draws are the same, and in evaluation."""
    monkeypatch.setattr(hipt_mil, "QUERIES", 4)  # so that matrices of attention have several parts
    tiles_TD = torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(2)).to(device)
    aggregator = aggregator_class(name)(DIM, 3, [0, 1], **{**small_options[name], **form}).to(device)
    chance = Chance((5, 6), 1, tuple(range(8, 8 + len(lengths))))
    for draws in ((chance,), (None,)) if aggregator.draws else ((),):
        found = []
        for own in (lengths, segments(lengths, device)):
            pooled_mbP, scores_mT = aggregator.pool(tiles_TD, own, aggregator.stacks(), *draws)
            if scores_mT is None:
                scores_mT = aggregator.tile_scores(tiles_TD, own, aggregator.stacks())
            aggregator.zero_grad()
            pooled_mbP.square().sum().backward()
            gradients = [p.grad for p in aggregator.parameters() if p.grad is not None]
            found.append((pooled_mbP.detach(), scores_mT.detach(), *gradients))
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def one_step(trained: MembersModule, there: DeviceFeatures, uses_MB: np.ndarray, slides: list[int]) -> Any:
    """A whole training step on a device without a trainer: batch, loss, gradients, Adam, what is gathered."""
    optimizer = trained.configure_optimizers()
    trained._trainer = SimpleNamespace(optimizers=[optimizer])  # all that a step asks of Lightning
    trained.on_fit_start()

    def step() -> None:
        batch = there.batch(slides, LABELS_S, uses_MB)
        optimizer.zero_grad()
        trained.training_step(batch, 0).backward()
        optimizer.step()

    return step


LAUNCHES = {
    **{"abmil": 510, "chowder": 247, "dsmil": 503, "clam_sb": 1284, "dtfd": 1193, "transmil": 3391, "hipt_mil": 4138},
    **{"transformer": 1553, "evidence": 343, "mean": 94, "max": 94},
}
"""Operations of a step with four groups of six bags, as counted in November 2026; a tenth more is allowed."""
COPIES = {"clam_sb": 5, "dtfd": 5, "transmil": 5, "hipt_mil": 5, "transformer": 5}
"""Small copies to the device in such a step, where it is not one: those that draw send their seeds, once a group."""


@pytest.mark.parametrize("name", AGGREGATORS)
def test_nothing_in_a_step_waits_for_the_device(name, small_options):
    """On the meta device there are no values, so whoever asks for one fails here."""
    meta = torch.device("meta")
    bags = bags_of(LENGTHS)
    there = DeviceFeatures(bags, meta, block_of(bags, meta))
    trained = module(name, bags, small_options[name]).to(meta)
    counted = step_counted(one_step(trained, there, uses_of_members(), [1, 3, 0, 8, 5, 2]), meta)
    assert not counted.waits
    assert counted.launches <= 1.1 * LAUNCHES[name]
    assert counted.sent <= COPIES.get(name, 1)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_more_bags_are_not_more_operations_of_a_step(name, small_options):
    """4 against 16 bags, whose lengths differ and are of one kind of padding; nor are they more copies."""
    meta, bags, found = torch.device("meta"), bags_of((9, 11, 16, 10) * 3), []
    there = DeviceFeatures(bags, meta, block_of(bags, meta))
    for slides in ([0, 1, 2, 3], [*range(12), 0, 1, 2, 3]):
        trained = module(name, bags, small_options[name]).to(meta)
        counted = step_counted(one_step(trained, there, np.ones((MEMBERS, len(slides)), dtype=bool), slides), meta)
        found.append((counted.launches, counted.sent))
    assert found[0] == found[1]


class Named(TorchDispatchMode):
    """Operations inside, by name, and whether torch was then told only to warn where one is not deterministic.

    Left out are those that are not deterministic in other forms only: a scatter by products, a mean of losses, sums of
    other than whole numbers (before torch 2.6).
    """

    def __init__(self) -> None:
        super().__init__()
        self.lenient: dict[str, set[bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        harmless = (
            (name.startswith("scatter_reduce") and "prod" not in args)
            or (name.startswith("nll_loss") and args[-2 if "backward" not in name else -3] == 0)
            or (name == "cumsum" and not args[0].is_floating_point())
        )
        if not harmless:
            self.lenient.setdefault(name, set()).add(torch.is_deterministic_algorithms_warn_only_enabled())
        return func(*args, **(kwargs or {}))


def without_deterministic_form() -> list[str]:
    """Beginnings of names, from what the installed torch says of itself."""
    said = (torch.use_deterministic_algorithms.__doc__ or "").partition("In addition")[0].rpartition("will throw a")[2]
    names = [name.rpartition(".")[2].lower() for name in re.findall(r"\* :(?:class|func):`~?([\w.]+)`", said)]
    return [{"interpolate": "upsample"}.get(name, name).replace("_", "") for name in names]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_operations_without_a_deterministic_form_are_listed(name, small_options):
    """Of a whole step of two classes, and of forward and backward of three."""
    bags, cpu = bags_of(LENGTHS), torch.device("cpu")
    there = DeviceFeatures(bags, cpu, block_of(bags, cpu))
    step = one_step(module(name, bags, small_options[name]), there, uses_of_members(), [1, 3, 0, 8, 5, 2])
    three = aggregator_class(name)(DIM, 3, [0, 1, 2, 3], **small_options[name])
    batch = there.batch([1, 3, 0, 8, 5, 2], np.arange(12) % 3, uses_of_members())
    with Named() as named:
        step()
        three.losses(three(batch), batch.labels).sum().backward()
    never = tuple(without_deterministic_form())
    assert {"median", "avgpool3d", "upsample"} <= set(never)
    found = tuple(sorted(op for op in named.lenient if op.replace("_", "").startswith(never)))
    assert found == NOT_DETERMINISTIC.get(name, ())
    assert set(NOT_DETERMINISTIC) <= set(AGGREGATORS)


def test_an_operation_without_a_deterministic_form_is_found():
    with Named() as named:
        torch.arange(3.0).median(dim=0)
        torch.zeros(2).scatter_reduce(0, torch.tensor([0, 0]), torch.ones(2), "amax")
    found = [op for op in named.lenient if op.replace("_", "").startswith(tuple(without_deterministic_form()))]
    assert found == ["median"]


def test_only_attention_is_strict_and_only_where_training_wishes_it():
    """Told only to warn, torch's attention of a GPU would add up in any order."""
    x = [torch.randn(1, 2, 5, 4).requires_grad_() for _ in range(3)]
    for wished in (True, False):
        torch.use_deterministic_algorithms(wished, warn_only=wished)
        try:
            with Named() as named:
                made = functional.scaled_dot_product_attention(*(2 * part for part in x)).transpose(1, 2)
                strict_in_backward(made).sum().backward()
            assert torch.is_deterministic_algorithms_warn_only_enabled() == wished
        finally:
            torch.use_deterministic_algorithms(False)
        [backward] = [op for op in named.lenient if op.startswith("_scaled_dot_product") and op.endswith("backward")]
        assert named.lenient.pop(backward) == {False}
        assert named.lenient["mul"] == {wished}, "of the operations before it, forward and backward"


@pytest.mark.parametrize("name", AGGREGATORS)
def test_predictions_on_a_device_score_bags_together_and_say_the_same(name, small_options, device):
    bags, aggregator = bags_of(LENGTHS), aggregator_class(name)(DIM, 3, [0, 1], **small_options[name]).eval()
    expected = member_logits(aggregator, bags, torch.device("cpu"))
    scored: list[int] = []
    there = replace(bags, on_device="yes")
    found = member_logits(aggregator.to(device), there, device, scored.append)
    assert scored == [len(LENGTHS)]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)
    assert features_for_scoring(there, device) is not None
    assert features_for_scoring(bags, torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["transmil", "transformer", "hipt_mil"])
def test_what_evaluation_made_of_lengths_serves_training_too(name, small_options, device):
    lengths, tiles_TD = (4, 7, 9, 13), torch.randn(33, DIM, device=device)
    aggregator = aggregator_class(name)(DIM, 1, [0, 1], **small_options[name]).to(device)
    with torch.inference_mode():
        aggregator.pool(tiles_TD, segments(lengths, device), aggregator.stacks())
    aggregator.pool(tiles_TD, segments(lengths, device), aggregator.stacks())[0].sum().backward()


def test_asking_the_device_is_counted():
    x = torch.ones(3, device="meta")
    with Counted("meta") as counted:
        (x + x.view(3)).relu_()
        x.to("meta")
        torch.ones(3).to("meta")
        x[torch.tensor([0, 1])]
    assert (counted.launches, counted.sent) == (3, 1)
    assert set(counted.waits) == {"index with a tensor of the host"}


@pytest.mark.parametrize("lengths", [(3, 1, 7, 2), (4, 4, 4), (5,)])
def test_operations_on_all_bags_at_once_equal_those_bag_by_bag(lengths, device):
    scores_mT, x_mTH = torch.randn(2, sum(lengths)), torch.randn(2, sum(lengths), 3)
    there, scores, x = segments(lengths, device), scores_mT.to(device), x_mTH.to(device)
    close = lambda found, expected: torch.testing.assert_close(found.cpu(), expected)  # noqa: E731
    weights_mT = torch.cat([part.softmax(dim=1) for part in scores_mT.split(lengths, dim=1)], dim=1)
    close(segment_softmax(scores, there), weights_mT)
    bags = list(zip(weights_mT.split(lengths, dim=1), x_mTH.split(lengths, dim=1), strict=True))
    close(
        segment_sum(segment_softmax(scores, there), x, there),
        torch.stack([(w.unsqueeze(1) @ h).squeeze(1) for w, h in bags], 1),
    )
    for how in ("sum", "mean", "max"):
        expected = torch.stack([h.amax(1) if how == "max" else getattr(h, how)(1) for _, h in bags], dim=1)
        close(segment_reduce(x, there, how), expected)
    close(segment_extremes(scores, there, 3, 2), segment_extremes(scores_mT, lengths, 3, 2))
    assert there.bag_of_T.tolist() == bag_of_tile(lengths, "cpu").tolist()
    assert there.place_T.tolist() == [place for length in lengths for place in range(length)]


def test_scores_of_one_bag_far_below_anothers_are_weights_all_the_same(device):
    scores = torch.tensor([[500.0, 499.0, -500.0, -501.0, -502.0]], device=device)
    weights = segment_softmax(scores, segments([2, 3], device)).cpu()
    torch.testing.assert_close(weights[0, :2].sum(), torch.tensor(1.0))
    torch.testing.assert_close(weights[0, 2:], torch.tensor([0.0, -1, -2]).softmax(0))


def test_bags_that_the_same_members_use_are_one_group():
    assert bags_by_members(uses_of_members()) == [[0, 1], [2], [3], [4]]
    assert bags_by_members(uses_of_members(), np.array([1, 2, 1, 1, 1, 1])) == [[0], [1], [2], [3], [4]]


def test_members_outside_a_step_stay_as_they_are_even_with_gradients_that_are_no_numbers():
    for decoupled in (False, True):
        stack = torch.nn.Parameter(torch.randn(3, 2))
        lr_M, decay_M = torch.full((3,), 0.1), torch.tensor([0.0, 0.1, 0.1])
        optimizer = MemberAdam([stack], lr_M, decay_M, decoupled=decoupled)
        plain = torch.nn.Parameter(stack.detach().clone())
        reference = MemberAdam([plain], lr_M, decay_M, decoupled=decoupled)
        for active in ([True, False, True], [True, False, False], [True, True, True]):
            active_M = torch.tensor(active)
            plain.grad = stack.grad = torch.where(active_M.unsqueeze(1), torch.randn(3, 2), torch.nan)
            reference.active_M = active_M
            optimizer.step_only(active_M, active_M)
            optimizer.step(), reference.step()
            torch.testing.assert_close(stack, plain)


def test_batches_made_in_the_background_are_the_same_and_errors_arrive(small_options):
    bags = bags_of(LENGTHS)
    there = DeviceFeatures(bags, torch.device("cpu"), None)
    fixed = (bags, LABELS_S, members().train_MS, 4, 0, lambda: 1, lambda: np.ones(MEMBERS, dtype=bool))
    plain, ahead = TrainingSteps(*fixed), TrainingSteps(*fixed, there=there)
    for expected, found in zip(plain, ahead, strict=True):
        assert found.places.slides == tuple(expected.slides_B.tolist())
        assert torch.equal(found.uses_MB, expected.uses_MB)
    broken = DeviceFeatures(replace(bags, views=bags.views[:3]), torch.device("cpu"), None)
    with pytest.raises(IndexError):
        list(TrainingSteps(*fixed, there=broken))


def test_features_that_do_not_fit_are_copied_ahead_or_refused_where_they_were_asked_for(monkeypatch):
    monkeypatch.setattr("mil.training.device.free_bytes", lambda device: 100)
    with pytest.raises(ConfigError, match="features do not fit"):
        device_features(bags_of(LENGTHS, on_device="yes"), torch.device("cpu"))
    auto, host = bags_of(LENGTHS), bags_of(LENGTHS, on_device="no")
    meta = torch.device("meta")
    assert not device_features(auto, meta).resident
    monkeypatch.setattr("mil.training.device.free_bytes", lambda device: 10**9)
    assert not device_features(host, meta).resident
    assert device_features(bags_of(LENGTHS), meta).resident
    assert device_features(auto, meta) is device_features(auto, meta)
    assert device_features(host, torch.device("cpu")) is None


def test_adams_step_as_torch_captures_it_is_adams_step():
    """Captured whole (fullgraph) and once for all steps of a parameter; run as it was captured."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    stacks = [torch.nn.Parameter(torch.full((3, 2), 0.5)) for _ in range(2)]
    both = [MemberAdam([x], torch.full((3,), 0.1), torch.tensor([0.0, 0.1, 0.1])) for x in stacks]
    both[1].where = torch.compile(both[1].where, backend=backend, fullgraph=True)
    for active in ([True, False, True], [True, True, False], [False, True, True]):
        gradient, mask_M = torch.randn(3, 2), torch.tensor(active)
        for stack, optimizer in zip(stacks, both, strict=True):
            stack.grad = gradient.clone()
            optimizer.step_only(mask_M, mask_M)
            optimizer.step()
    assert len(graphs) == 1
    torch.testing.assert_close(stacks[1], stacks[0])
