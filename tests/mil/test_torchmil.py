"""Our aggregators against torchmil's with the same weights, and torchmil's models behind our contract.

Where the two differ on purpose, the test says so. Skips without torchmil.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil.aggregators import aggregator_class
from mil.aggregators.batch import Batch, Group, pack
from mil.aggregators.contract import Aggregator
from mil.training.members import Description, load_members, save_members

torchmil_models = pytest.importorskip("torchmil.models")

DIM = 7
LENGTHS = (1, 9, 4, 13, 2, 6)
SEEDS = (3, 0)


def bags(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(0.3, 1, (n, DIM)).astype(np.float32)) for n in lengths]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Carried:
    """Weights of one member of ours in a torchmil model; remembers which is which, to compare gradients."""

    def __init__(self, ours: Aggregator, theirs: nn.Module, member: int):
        self.ours, self.theirs, self.member = ours, theirs, member
        self.pairs: list[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]] = []

    def copy(self, name: str, parameter: nn.Parameter, shape: Callable[[Tensor], Tensor] = lambda x: x) -> Carried:
        with torch.no_grad():
            parameter.copy_(shape(self.ours.get_parameter(name)[self.member]))
        self.pairs.append((name, parameter, shape))
        return self

    def linear(self, name: str, layer: nn.Module) -> Carried:
        layer = getattr(layer, "module", layer)  # torchmil's LazyLinear
        self.copy(f"{name}_weight", layer.weight, lambda x: x.T)
        return self.copy(f"{name}_bias", layer.bias) if layer.bias is not None else self

    def norm(self, name: str, layer: nn.LayerNorm) -> Carried:
        return self.copy(f"{name}_scale", layer.weight).copy(f"{name}_shift", layer.bias)

    def gradients_agree(self) -> None:
        for name, parameter, shape in self.pairs:
            assert parameter.grad is not None, name
            close(shape(self.ours.get_parameter(name).grad[self.member]), parameter.grad)


def set_to(aggregator: Aggregator, name: str, value: float | Tensor) -> None:
    """Fix what torchmil does not have, such as the bias of an attention score."""
    with torch.no_grad():
        aggregator.get_parameter(name)[:] = value


def embedding(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, width), nn.ReLU())


def compare(
    ours: Aggregator,
    carry: Callable[[int], Carried],
    theirs: Callable[[nn.Module, Tensor], Tensor],
    chosen: Sequence[Tensor],
) -> None:
    """Logits and gradients of a loss that every bag enters with its own factor."""
    logits_MB = ours(pack(chosen, len(SEEDS))).logits_MBC.squeeze(2)
    factors_B = torch.arange(1.0, len(chosen) + 1)
    carried = [carry(m) for m in range(len(SEEDS))]
    (torch.sigmoid(logits_MB) * factors_B).sum().backward()
    for m, one in enumerate(carried):
        expected_B = torch.cat([theirs(one.theirs, bag.unsqueeze(0)).reshape(1) for bag in chosen])
        close(logits_MB[m], expected_B)
        (torch.sigmoid(expected_B) * factors_B).sum().backward()
        one.gradients_agree()


# --- ours against theirs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hidden", [0, 6])
def test_abmil(gated, hidden):
    ours = aggregator_class("abmil")(DIM, 1, SEEDS, hidden=hidden, attention=5, gated=gated, embed_relu=True, head=())
    set_to(ours, "score_bias", 0)

    def carry(m: int) -> Carried:
        extra = {"feat_ext": embedding(hidden)} if hidden else {}
        model = torchmil_models.ABMIL((DIM,), att_dim=5, gated=gated, **extra).eval()
        carried = Carried(ours, model, m).linear("attend", model.pool.fc1).linear("head0", model.classifier)
        if hidden:
            carried.linear("embed", model.feat_ext[0])
        if gated:
            carried.linear("gate", model.pool.fc_gated)
        return carried.copy("score_weight", model.pool.fc2.weight, lambda x: x.T)

    compare(ours, carry, lambda model, bag: model(bag), bags())


@pytest.mark.parametrize("nonlinear", [True, False])
@pytest.mark.parametrize("values", [True, False])
def test_dsmil(nonlinear, values):
    """Logits; the loss too, but that torchmil adds the two streams' cross-entropies where the paper's code halves."""
    ours = aggregator_class("dsmil")(DIM, 1, SEEDS, attention=6, nonlinear=nonlinear, values=values)

    def carry(m: int) -> Carried:
        model = torchmil_models.DSMIL((DIM,), att_dim=6, nonlinear_q=nonlinear, nonlinear_v=values).eval()
        carried = Carried(ours, model, m)
        carried.linear("instance", model.inst_classifier).linear("bag", model.bag_classifier)
        carried.linear("query0", model.q_nn[0] if nonlinear else model.q_nn)
        if nonlinear:
            carried.linear("query1", model.q_nn[2])
        if values:
            carried.linear("value", model.v_nn[1])
        return carried

    compare(ours, carry, lambda model, bag: model.predict(bag), bags())
    chosen, labels_B = bags(), torch.tensor([0, 1, 1, 0, 1, 0])
    prediction = ours(pack(chosen, len(SEEDS)), with_scores=True)
    losses_MB = ours.losses(prediction, labels_B)
    for m in range(len(SEEDS)):
        model = carry(m).theirs
        sums = [model.compute_loss(y.view(1), bag.unsqueeze(0))[1] for y, bag in zip(labels_B, chosen, strict=True)]
        close(losses_MB[m], torch.stack([sum(s.values()) / 2 for s in sums]))
        weights = [model(bag.unsqueeze(0), return_att=True)[1].reshape(-1) for bag in chosen]
        close(prediction.scores_MT[m], torch.cat(weights))


def test_clam():
    """Logits and attention. Instance losses differ: torchmil hands its smooth SVM loss targets of the wrong shape.

    (It gets (n, 1) where it documents (n,), and sums over all pairs of tiles; and bags of fewer than 2 k tiles tell the
    same tile both.) Ours is held against the paper's formula in test_aggregators.py.
    """
    ours = aggregator_class("clam_sb")(DIM, 1, SEEDS, hidden=8, attention=5, n_instances=2).eval()
    set_to(ours, "score_bias", 0)

    def carry(m: int) -> Carried:
        model = torchmil_models.CLAM_SB((DIM,), att_dim=5, gated=True, k_sample=2, feat_ext=embedding(8)).eval()
        carried = Carried(ours, model, m).linear("embed", model.feat_ext[0]).linear("attend", model.pool.fc1)
        carried.linear("gate", model.pool.fc_gated).copy("score_weight", model.pool.fc2.weight, lambda x: x.T)
        return carried.linear("head0", model.classifier)

    compare(ours, carry, lambda model, bag: model(bag), bags())
    scores_MT = ours(pack(bags(), len(SEEDS)), with_scores=True).scores_MT
    model = carry(1).theirs
    expected = [torch.softmax(model(bag.unsqueeze(0), return_att=True)[1].reshape(-1), dim=0) for bag in bags()]
    close(scores_MT[1], torch.cat(expected))


def test_dtfd(monkeypatch):
    """Attended means, logits and the loss of both tiers, when torchmil's shuffle deals as our evaluation does.

    torchmil trains both tiers as one network.
    """
    options = {"hidden": 8, "attention": 5, "gated": False, "pseudo_bags": 3, "end_to_end": True}
    ours = aggregator_class("dtfd")(DIM, 1, SEEDS, **options).eval()
    for tier in ("tier1", "tier2"):
        set_to(ours, f"{tier}_score_bias", 0)

    def deal_in_turn(rows: np.ndarray) -> None:
        n = min(3, len(rows))
        rows[:] = np.concatenate([np.arange(first, len(rows), n) for first in range(n)])

    monkeypatch.setattr(np.random, "shuffle", deal_in_turn)

    def carry(m: int) -> Carried:
        model = torchmil_models.DTFDMIL((DIM,), att_dim=5, n_groups=3, distill_mode="afs", feat_ext=embedding(8)).eval()
        carried = Carried(ours, model, m).linear("embed", model.feat_ext[0])
        carried.linear("tier1_head", model.classifier).linear("head0", model.u_classifier)
        for tier, pool in (("tier1", model.attention_pool), ("tier2", model.u_attention_pool)):
            carried.linear(f"{tier}_attend", pool.fc1).copy(f"{tier}_score_weight", pool.fc2.weight, lambda x: x.T)
        return carried

    chosen, labels_B = bags(), torch.tensor([0, 1, 1, 0, 1, 0])
    prediction = ours(pack(chosen, len(SEEDS)))
    losses_MB = ours.losses(prediction, labels_B)
    (losses_MB * torch.arange(1.0, 7)).sum().backward()
    for m in range(len(SEEDS)):
        carried = carry(m)
        outputs = [
            carried.theirs.compute_loss(y.view(1), bag.unsqueeze(0)) for y, bag in zip(labels_B, chosen, strict=True)
        ]
        close(prediction.logits_MBC[m, :, 0], torch.cat([logit.reshape(1) for logit, _ in outputs]))
        expected_B = torch.stack([sum(losses.values()) for _, losses in outputs])
        close(losses_MB[m], expected_B)
        (expected_B * torch.arange(1.0, 7)).sum().backward()
        carried.gradients_agree()


DIVIDE = {5: (4, 9, 49, 40, 7), 2: (1, 7, 9, 25), 50: (45, 49)}
"""Landmarks and bag sizes whose tokens, side * side + 1, they divide; torchmil pads others with zeros it attends to."""


@pytest.mark.parametrize("landmarks", DIVIDE)
def test_transmil(landmarks):
    """torchmil leaves out the published code's convolution of the values and output layer: 0 and the identity here."""
    chosen = bags(DIVIDE[landmarks])
    ours = aggregator_class("transmil")(DIM, 1, SEEDS, hidden=12, heads=3, landmarks=landmarks, conv=0).eval()
    for layer in ("layer0", "layer1"):
        set_to(ours, f"{layer}_out_weight", torch.eye(12))
        set_to(ours, f"{layer}_out_bias", 0)

    def carry(m: int) -> Carried:
        model = torchmil_models.TransMIL(
            (DIM,), att_dim=12, n_heads=3, n_landmarks=landmarks, feat_ext=embedding(12)
        ).eval()
        carried = Carried(ours, model, m).linear("embed", model.feat_ext[0])
        carried.copy("class_token", model.cls_token, lambda x: x.view(1, 1, -1))
        for i, layer in enumerate(model.layers):
            carried.norm(f"layer{i}_norm", layer.norm1)
            carried.copy(f"layer{i}_qkv_weight", layer.att_module.qkv_nn.weight, lambda x: x.T)
        for kernel, conv in ((7, model.pos_layer.proj), (5, model.pos_layer.proj1), (3, model.pos_layer.proj2)):
            carried.copy(f"place{kernel}_weight", conv.weight, lambda x: x.unsqueeze(1))
            carried.copy(f"place{kernel}_bias", conv.bias)
        return carried.norm("norm", model.norm).linear("head0", model.classifier)

    compare(ours, carry, lambda model, bag: model(bag), chosen)
    scores = ours(pack(chosen, len(SEEDS)), with_scores=True).scores_MT.split(list(map(len, chosen)), dim=1)
    model = carry(0).theirs
    for bag, scores_ML in zip(chosen, scores, strict=True):
        n, twice = len(bag), (int((len(bag) - 1) ** 0.5) + 1) ** 2 - len(bag)
        expected_L = model(bag.unsqueeze(0), return_att=True)[1].reshape(-1)
        close(scores_ML[0, twice:], expected_L[twice:n])  # torchmil drops what the second copies of tiles got


def test_transformer():
    """Full attention; torchmil has no output layer (the identity here) and adds the input again unless told not to."""
    options = {"hidden": 8, "heads": 2, "layers": 2, "induced": 0, "mlp": 32, "attention": 5, "dropout": 0.0}
    ours = aggregator_class("transformer")(DIM, 1, SEEDS, **options)
    set_to(ours, "pool_score_bias", 0)
    for i in range(2):
        set_to(ours, f"layer{i}_out_weight", torch.eye(8))
        set_to(ours, f"layer{i}_out_bias", 0)

    def carry(m: int) -> Carried:
        model = torchmil_models.TransformerABMIL(
            (DIM,),
            pool_att_dim=5,
            feat_ext=nn.Linear(DIM, 8),
            transf_att_dim=8,
            transf_n_layers=2,
            transf_n_heads=2,
            transf_add_self=False,
        ).eval()
        carried = Carried(ours, model, m).linear("embed", model.feat_ext)
        for i, layer in enumerate(model.transformer_encoder.layers):
            carried.norm(f"layer{i}_norm", layer.norm1).norm(f"layer{i}_mlp_norm", layer.norm2)
            carried.copy(f"layer{i}_qkv_weight", layer.att_module.qkv_nn.weight, lambda x: x.T)
            carried.linear(f"layer{i}_mlp0", layer.mlp_module[0]).linear(f"layer{i}_mlp1", layer.mlp_module[3])
        carried.norm("norm", model.transformer_encoder.norm).linear("pool_attend", model.pool.fc1)
        carried.copy("pool_score_weight", model.pool.fc2.weight, lambda x: x.T)
        return carried.linear("head0", model.last_layer)

    compare(ours, carry, lambda model, bag: model(bag), bags())


# --- the adapter ----------------------------------------------------------------------------------------------------

ADAPTED: dict[str, dict[str, Any]] = {
    "ABMIL": {"att_dim": 5, "gated": True, "feat_ext": 6},
    "CLAM_SB": {"att_dim": 5, "k_sample": 2},
    "DSMIL": {"att_dim": 6, "nonlinear_q": True, "nonlinear_v": True, "dropout": 0.3},
    "DTFDMIL": {"att_dim": 4, "n_groups": 3, "distill_mode": "maxmin"},
    "TransMIL": {"att_dim": 8, "n_heads": 2, "n_landmarks": 4},
    "TransformerABMIL": {"pool_att_dim": 4, "transf_att_dim": 8, "transf_n_heads": 2, "transf_dropout": 0.2},
}
every_model = pytest.mark.parametrize("name", ADAPTED)


def adapted(name: str, seeds: Sequence[int] = SEEDS, **more: Any) -> Aggregator:
    return aggregator_class(f"torchmil:{name}")(DIM, 1, seeds, **(ADAPTED[name] | more)).eval()


def original(aggregator: Any, member: int) -> nn.Module:
    """torchmil's own model with one member's weights."""
    options = dict(ADAPTED[aggregator.model_name])
    if "feat_ext" in options:
        options["feat_ext"] = embedding(options["feat_ext"])
    model = getattr(torchmil_models, aggregator.model_name)(in_shape=(DIM,), **options)
    weights = {theirs: aggregator.get_parameter(ours)[member].detach() for ours, theirs in aggregator.names.items()}
    model.load_state_dict(weights)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # torchmil 1.0.2: its self-attention drops in evaluation too
    return model.eval()


def mask_of(name: str, bag: Tensor) -> dict[str, Tensor]:
    return {"mask": torch.ones(1, len(bag))} if name == "DTFDMIL" else {}


@every_model
def test_an_adapted_model_predicts_as_the_original_does(name, monkeypatch):
    monkeypatch.setattr(np.random, "shuffle", lambda rows: None)
    aggregator, chosen = adapted(name), bags()
    prediction = aggregator(pack(chosen, len(SEEDS)), with_scores=True)
    for m in range(len(SEEDS)):
        model = original(aggregator, m)
        pairs = [model.predict(bag.unsqueeze(0), return_inst_pred=True, **mask_of(name, bag)) for bag in chosen]
        close(prediction.logits_MBC[m, :, 0], torch.cat([logit.reshape(1) for logit, _ in pairs]))
        close(prediction.scores_MT[m], torch.cat([scores.reshape(-1) for _, scores in pairs]))


@pytest.mark.parametrize("name", [name for name in ADAPTED if name not in ("DSMIL", "TransformerABMIL")])
def test_training_minimises_the_models_own_losses(name, monkeypatch):
    """Those without dropout, so that training and evaluation differ in the loss alone."""
    monkeypatch.setattr(np.random, "shuffle", lambda rows: None)
    aggregator, chosen, labels = adapted(name).train(), bags(), [0, 1, 1, 0, 1, 0]
    batch = pack(chosen, len(SEEDS), labels)
    losses_MB = aggregator.losses(aggregator(batch), batch.labels_B)
    losses_MB.sum().backward()
    for m in range(len(SEEDS)):
        model = original(aggregator, m)
        expected = []
        for bag, label in zip(chosen, labels, strict=True):
            _, losses = model.compute_loss(torch.tensor([label]), bag.unsqueeze(0), **mask_of(name, bag))
            expected.append(sum(losses.values()).reshape(1))
        close(losses_MB[m], torch.cat(expected))
        torch.cat(expected).sum().backward()
        for ours, theirs in aggregator.names.items():
            gradient = model.get_parameter(theirs).grad
            if gradient is not None:
                close(aggregator.get_parameter(ours).grad[m], gradient, 1e-4)


@every_model
@pytest.mark.parametrize("standardized", [False, True])
def test_a_member_equals_the_member_alone_on_any_thread(name, standardized):
    """Logits and gradients in training, with dropout and shuffles, whoever else is there."""

    def build(seeds: Sequence[int]) -> Aggregator:
        aggregator = adapted(name, seeds).train()
        if standardized:
            rows = [np.random.default_rng(seed) for seed in seeds]
            mean_MD = torch.stack([torch.from_numpy(rng.normal(0, 0.5, DIM)).float() for rng in rows])
            std_MD = torch.stack([torch.from_numpy(rng.uniform(0.5, 2, DIM)).float() for rng in rows])
            aggregator.standardize(mean_MD, std_MD)
        return aggregator

    together, chosen = build(SEEDS), bags()
    together.threads = 3
    uses_MB = torch.tensor([[1, 1, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    users = [tuple(torch.nonzero(uses_MB[:, b]).flatten().tolist()) for b in range(6)]
    groups = [Group(bag, (len(bag),), (b,), users[b]) for b, bag in enumerate(chosen)]
    labels_B = torch.tensor([0, 1, 1, 0, 1, 0])
    batch = Batch(tuple(groups), labels_B, torch.arange(6), uses_MB)
    state = torch.get_rng_state()
    prediction = together(batch)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    (together.losses(prediction, labels_B) * uses_MB).sum().backward()
    for m, seed in enumerate(SEEDS):
        own = torch.nonzero(uses_MB[m]).flatten().tolist()
        alone = build([seed])
        packed = replace(pack([chosen[b] for b in own], 1, labels_B[own].tolist()), slides_B=torch.tensor(own))
        found = alone(packed)
        alone.losses(found, packed.labels_B).sum().backward()
        close(prediction.logits_MBC[m, own], found.logits_MBC[0])
        for key, parameter in alone.named_parameters():
            if parameter.grad is not None:
                close(together.get_parameter(key).grad[m], parameter.grad[0], 1e-4)


@every_model
def test_the_memory_that_an_adapted_model_is_counted_with_is_what_it_keeps(name):
    """Without dropout, which makes torch's attention on a CPU keep a matrix of tiles by tiles."""
    aggregator = adapted(name, **({"transf_dropout": 0.0} if name == "TransformerABMIL" else {}))
    for n_tiles in (500, 1500):
        expected = n_tiles * aggregator.floats_per_tile + aggregator.floats_per_bag
        assert aggregator.kept_floats(n_tiles) <= 1.25 * expected + 1000


def test_an_adapted_model_is_saved_and_read_back(tmp_path):
    aggregator = adapted("ABMIL")
    made = {"encoder": "phikon", "weights_sha256": "f" * 64, "tile_px": 224, "mpp": 0.5, "overlap_px": 0}
    description = Description("torchmil:ABMIL", ADAPTED["ABMIL"], DIM, ["a", "b"], list(SEEDS), False, made)
    save_members(tmp_path, description, aggregator.state_dict())
    again, _ = load_members(tmp_path)
    batch = pack(bags(), len(SEEDS))
    assert torch.equal(again(batch).logits_MBC, aggregator(batch).logits_MBC)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Nonsense", {}, "torchmil has no such model; there are ABMIL"),
        ("SmABMIL", {}, "needs adj for every bag"),
        ("VAEABMIL", {}, "needs feat_ext, which a config cannot name"),
        ("ABMIL", {"att_dim": 5, "nonsense": 1}, "model.nonsense: unknown option of torchmil:ABMIL; there are att_dim"),
        ("ABMIL", {"att_dim": "wide"}, "model.att_dim: expected int for torchmil:ABMIL, got 'wide'"),
        ("ABMIL", {"gated": 1}, "model.gated: expected bool"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, expected):
    with pytest.raises(ValueError, match=expected):
        aggregator_class(f"torchmil:{name}")(DIM, 1, [0], **options)


def test_all_problems_of_an_adapted_model_at_once():
    with pytest.raises(ValueError) as error:
        aggregator_class("torchmil:ABMIL")(DIM, 3, [0], att_dim="wide", nonsense=1)
    assert len(str(error.value).splitlines()) == 3


def test_exact_attention_is_what_nystrom_becomes_with_a_landmark_a_token():
    """No torchmil here: with enough iterations and a landmark for every token the approximation is exact."""
    from mil.aggregators.transmil import nystrom_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    exact = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(nystrom_attention(q, k, v, 20, 60, 11), exact, rtol=1e-6, atol=1e-6)
