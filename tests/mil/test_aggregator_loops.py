"""DTFD, DSMIL, TransMIL, the transformer, HIPT-MIL and Evidence against loops over one bag of one member."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.config import ConfigError, load_config
from mil.aggregators import AGGREGATORS, aggregator_class, hipt_mil, option_types, options, ranges
from mil.aggregators.batch import pack
from mil.aggregators.chance import Chance
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import cross_entropy
from mil.aggregators.transmil import segment_means
from mil.config import Model, StudyConfig, model_options, options_schema
from mil.config_problems import model_problems, option_problems, range_problems, study_problems
from mil.config_reading import options_help
from mil.train import main

DIM = 7
LENGTHS = (1, 9, 4, 13, 2, 6)
SEEDS = (3, 0)


def bags(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(0.3, 1, (n, DIM)).astype(np.float32)) for n in lengths]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Member:
    """One member's weights by name, and its layers as plain matrix products."""

    def __init__(self, aggregator: Aggregator, m: int):
        self.weights = {name: stack[m].detach() for name, stack in aggregator.named_parameters()}

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self[f"{name}_weight"] + self.weights.get(f"{name}_bias", torch.zeros(()))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self[f"{name}_scale"], self[f"{name}_shift"])

    def attention(self, name: str, x_TH: Tensor, gated: bool) -> Tensor:
        a_TA = torch.tanh(self.linear(f"{name}_attend", x_TH))
        a_TA = a_TA * torch.sigmoid(self.linear(f"{name}_gate", x_TH)) if gated else a_TA
        return self.linear(f"{name}_score", a_TA).squeeze(1)


def equals_loop(aggregator: Aggregator, of_one_bag: Any, lengths: Sequence[int] = LENGTHS) -> None:
    """`of_one_bag(member, bag)` -> logits and tile scores."""
    chosen = bags(lengths)
    prediction = aggregator.eval()(pack(chosen, len(SEEDS)), with_scores=True)
    for m in range(len(SEEDS)):
        expected = [of_one_bag(Member(aggregator, m), bag) for bag in chosen]
        close(prediction.logits_MBC[m], torch.stack([logits_C for logits_C, _ in expected]))
        close(prediction.scores_MT[m], torch.cat([scores_T for _, scores_T in expected]))


# --- DTFD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distill", ["afs", "maxs", "maxmins"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_dtfd_equals_a_loop_over_pseudo_bags(distill, gated, n_outputs):
    options = {"hidden": 9, "attention": 5, "pseudo_bags": 3, "gated": gated, "distill": distill}
    aggregator = aggregator_class("dtfd")(DIM, n_outputs, SEEDS, **options)

    def of_one_bag(member: Member, bag_TD: Tensor) -> tuple[Tensor, Tensor]:
        h_TH, scores_T = torch.relu(member.linear("embed", bag_TD)), torch.zeros(len(bag_TD))
        handed_on, shares = [], []
        n = min(3, len(bag_TD))
        for first in range(n):
            part_LH = h_TH[first::n]
            weights_L = torch.softmax(member.attention("tier1", part_LH, gated), dim=0)
            activation_LC = (weights_L.unsqueeze(1) * part_LH) @ member["tier1_head_weight"]
            if n_outputs > 1:
                activation_LC = torch.softmax(activation_LC, dim=1)
            rows = {
                "afs": [],
                "maxs": [activation_LC.argmax(0)],
                "maxmins": [activation_LC.argmax(0), activation_LC.argmin(0)],
            }
            found = [part_LH[row] for row in rows[distill]] if rows[distill] else [(weights_L @ part_LH).unsqueeze(0)]
            handed_on.append(torch.cat(found))
            scores_T[first::n] = weights_L
        all_KH = torch.cat(handed_on)
        shares_K = torch.softmax(member.attention("tier2", all_KH, gated), dim=0)
        for first, share in enumerate(shares_K.split([len(x) for x in handed_on])):
            shares.append(share.sum())
            scores_T[first::n] *= share.sum()
        return member.linear("head0", shares_K @ all_KH), scores_T

    equals_loop(aggregator, of_one_bag)


def test_dtfd_deals_every_tile_into_one_of_the_pseudo_bags_and_all_have_about_the_same_size():
    aggregator: Any = aggregator_class("dtfd")(DIM, 1, SEEDS, hidden=9, attention=5, pseudo_bags=4)
    dealt = [
        aggregator.deal(torch.zeros(2, 30), Chance((3, 4), epoch, (slide,)))
        for epoch, slide in ((0, 0), (0, 1), (1, 0))
    ]
    for dealt_mL in dealt:
        for dealt_L in dealt_mL:
            assert sorted(torch.bincount(dealt_L, minlength=4).tolist()) == [7, 7, 8, 8]
    different = [(dealt[0][0], dealt[0][1]), (dealt[0][0], dealt[1][0]), (dealt[0][0], dealt[2][0])]
    assert not any(torch.equal(a, b) for a, b in different), "by member, slide and epoch"
    assert torch.equal(aggregator.deal(torch.zeros(2, 30), Chance((3, 4), 0, (0,))), dealt[0])
    assert aggregator.deal(torch.zeros(1, 3), None).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("distill", ["afs", "maxs", "maxmins"])
def test_each_tier_of_dtfd_learns_from_its_own_loss_alone_unless_end_to_end(distill):
    """The gradients of the published two optimisers: the first tier's of its loss, the second's of the bag's."""
    options = {"hidden": 9, "attention": 5, "pseudo_bags": 3, "distill": distill}
    chosen, labels_B = bags(), torch.tensor([0, 1, 1, 0, 1, 0])
    found = {}
    for end_to_end in (False, True):
        aggregator: Any = aggregator_class("dtfd")(DIM, 1, SEEDS, **options, end_to_end=end_to_end)
        prediction = aggregator(pack(chosen, len(SEEDS)))
        bag = cross_entropy(prediction.logits_MBC, labels_B).sum()
        both = aggregator.losses(prediction, labels_B).sum()
        names, stacks = zip(*aggregator.named_parameters(), strict=True)
        for what, loss in (("bag", bag), ("pseudo-bags", both - bag), ("both", both)):
            gradients = torch.autograd.grad(loss, stacks, retain_graph=True, allow_unused=True)
            found[end_to_end, what] = dict(zip(names, gradients, strict=True))
    second = {name for name in names if name.startswith(("tier2", "head0"))}
    for name in names:
        own = "bag" if name in second else "pseudo-bags"
        close(found[False, "both"][name], found[False, own][name])
        close(found[False, own][name], found[True, own][name])
    reached = [{n for n, g in found[e, "bag"].items() if g is not None and g.abs().max() > 1e-6} for e in (False, True)]
    assert reached[0] <= second
    assert {"embed_weight", "embed_bias"} <= reached[1] - second
    assert {
        n for n, g in found[True, "pseudo-bags"].items() if g is not None and g.abs().max() > 1e-6
    } & second == set()


# --- DSMIL ----------------------------------------------------------------------------------------------------------


def sequential(member: Member, names: Sequence[str]) -> nn.Sequential:
    """torch's layers with the member's weights, sigmoids between them."""
    layers: list[nn.Module] = []
    for name in names:
        linear = nn.Linear(*member[f"{name}_weight"].shape)
        linear.load_state_dict({"weight": member[f"{name}_weight"].T, "bias": member[f"{name}_bias"]})
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_dsmil_of_perceptrons_equals_a_loop_with_torch_layers(scaled, n_outputs):
    options = {"attention": 4, "tile_hidden": (8, 6), "query_hidden": (9, 5), "head": (7, 6), "scaled": scaled}
    aggregator = aggregator_class("dsmil")(DIM, n_outputs, SEEDS, **options, one_loss=True, idle_values=3)

    def of_one_bag(member: Member, bag_TD: Tensor) -> tuple[Tensor, Tensor]:
        scores_TC = sequential(member, ["instance_hidden0", "instance_hidden1", "instance"])(bag_TD)
        queries_TA = sequential(member, ["query0", "query1", "query2"])(bag_TD)
        weights = []
        for c in range(n_outputs):
            likeness_T = queries_TA @ queries_TA[scores_TC[:, c].argmax()]
            weights.append(torch.softmax(likeness_T / (2 if scaled else 1), dim=0))
        means_X = torch.cat([weights_T @ bag_TD for weights_T in weights])
        logits_C = sequential(member, ["bag_hidden0", "bag_hidden1", "bag"])(means_X)
        return (logits_C + scores_TC.amax(0)) / 2, torch.stack(weights).mean(0)

    equals_loop(aggregator, of_one_bag)
    prediction, labels_B = aggregator(pack(bags(), len(SEEDS))), torch.tensor([0, 1, 1, 0, 1, 0])
    close(aggregator.losses(prediction, labels_B), cross_entropy(prediction.logits_MBC, labels_B))


# --- TransMIL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("landmarks", [4, 50])
@pytest.mark.parametrize("conv", [0, 5])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_transmil_equals_a_loop_with_matrices_written_out(landmarks, conv, n_outputs):
    """Token by token and head by head, three separate convolutions, squares of 1, 2, 3, 4 and 7 a side."""
    heads, width = 2, 4
    options = {"hidden": heads * width, "heads": heads, "landmarks": landmarks, "conv": conv, "pinv_steps": 5}
    aggregator = aggregator_class("transmil")(DIM, n_outputs, SEEDS, **options)

    def attend(member: Member, layer: str, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        q_NH, k_NH, v_NH = member.linear(f"{layer}_qkv", member.norm(f"{layer}_norm", x_NH)).chunk(3, dim=1)
        n = min(landmarks, len(x_NH))
        outs, class_rows = [], []
        all_a = []
        for a in range(heads):
            q, k = q_NH[:, a * width : (a + 1) * width] / math.sqrt(width), k_NH[:, a * width : (a + 1) * width]
            ql, kl = (torch.stack([part.mean(0) for part in x.tensor_split(n)]) for x in (q, k))
            all_a.append([torch.softmax(x @ y.T, dim=1) for x, y in ((q, kl), (ql, kl), (ql, k))])
        largest = max(float(middle.sum(0).max()) for _, middle, _ in all_a)
        for a, (left, middle, right) in enumerate(all_a):
            z, eye = middle.T / largest, torch.eye(n)
            for _ in range(5):
                mz = middle @ z
                z = 0.25 * z @ (13 * eye - mz @ (15 * eye - mz @ (7 * eye - mz)))
            v = v_NH[:, a * width : (a + 1) * width]
            out = left @ z @ right @ v
            if conv:
                padded = torch.cat([torch.zeros(conv // 2, width), v, torch.zeros(conv // 2, width)])
                kernel = member[f"{layer}_conv_weight"][a]
                out = out + torch.stack([(kernel.unsqueeze(1) * padded[i : i + conv]).sum(0) for i in range(len(v))])
            outs.append(out)
            class_rows.append((left @ z @ right)[0])
        return x_NH + member.linear(f"{layer}_out", torch.cat(outs, dim=1)), torch.stack(class_rows).mean(0)

    def of_one_bag(member: Member, bag_TD: Tensor) -> tuple[Tensor, Tensor]:
        h_TH = torch.relu(member.linear("embed", bag_TD))
        side = math.ceil(math.sqrt(len(h_TH)))
        again = side * side - len(h_TH)
        x_NH = torch.cat([member["class_token"].unsqueeze(0), h_TH, h_TH[:again]])
        x_NH, _ = attend(member, "layer0", x_NH)
        grid_1HSS = x_NH[1:].T.reshape(1, -1, side, side)
        placed = grid_1HSS
        for kernel in (7, 5, 3):
            weight = member[f"place{kernel}_weight"].unsqueeze(1)
            bias, groups = member[f"place{kernel}_bias"], grid_1HSS.shape[1]
            placed = placed + functional.conv2d(grid_1HSS, weight, bias, padding=kernel // 2, groups=groups)
        x_NH = torch.cat([x_NH[:1], placed.flatten(2)[0].T])
        x_NH, row_N = attend(member, "layer1", x_NH)
        scores_T = row_N[1 : 1 + len(h_TH)].clone()
        scores_T[:again] += row_N[1 + len(h_TH) :]
        return member.linear("head0", member.norm("norm", x_NH[0])), scores_T

    equals_loop(aggregator, of_one_bag, (1, 9, 4, 13, 2, 6, 40))


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_transmil_of_the_phikon_paper_equals_a_loop_with_torch_layers(n_outputs):
    """Features as tokens, torch's own attention and convolutions that mix channels."""
    heads, dim = 2, 6
    options = {"hidden": 0, "heads": heads, "landmarks": 0, "conv": 0, "dropout": 0.0, "dense": True}
    aggregator = aggregator_class("transmil")(dim, n_outputs, SEEDS, **options)

    def attend(member: Member, name: str, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        attention = nn.MultiheadAttention(dim, heads)
        theirs = {
            "in_proj_weight": member[f"{name}_qkv_weight"].T,
            "in_proj_bias": torch.zeros(3 * dim),
            "out_proj.weight": member[f"{name}_out_weight"].T,
            "out_proj.bias": member[f"{name}_out_bias"],
        }
        attention.load_state_dict(theirs, strict=True)
        normed_NH = member.norm(f"{name}_norm", x_NH)
        added_NH, weights_NN = attention(normed_NH, normed_NH, normed_NH)
        return x_NH + added_NH, weights_NN[0]

    def of_one_bag(member: Member, bag_TD: Tensor) -> tuple[Tensor, Tensor]:
        side = math.ceil(math.sqrt(len(bag_TD)))
        again = side * side - len(bag_TD)
        x_NH, _ = attend(member, "layer0", torch.cat([member["class_token"].unsqueeze(0), bag_TD, bag_TD[:again]]))
        grid_1HSS = x_NH[1:].T.reshape(1, dim, side, side)
        placed_1HSS = grid_1HSS
        for kernel in (3, 5, 7):
            convolution = nn.Conv2d(dim, dim, kernel, padding=kernel // 2)
            ours = {name: member[f"place{kernel}_{name}"] for name in ("weight", "bias")}
            convolution.load_state_dict(ours, strict=True)
            placed_1HSS = placed_1HSS + convolution(grid_1HSS)
        x_NH, row_N = attend(member, "layer1", torch.cat([x_NH[:1], placed_1HSS.flatten(2)[0].T]))
        scores_T = row_N[1 : 1 + len(bag_TD)].clone()
        scores_T[:again] += row_N[1 + len(bag_TD) :]
        return member.linear("head0", member.norm("norm", x_NH[0])), scores_T

    chosen = [torch.cat([bag, bag[:, :1] * 0.5], dim=1)[:, :dim] for bag in bags((1, 9, 4, 13, 40))]
    prediction = aggregator.eval()(pack(chosen, len(SEEDS)), with_scores=True)
    for m in range(len(SEEDS)):
        expected = [of_one_bag(Member(aggregator, m), bag) for bag in chosen]
        close(prediction.logits_MBC[m], torch.stack([logits_C for logits_C, _ in expected]))
        close(prediction.scores_MT[m], torch.cat([scores_T for _, scores_T in expected]))


def test_transmil_of_the_phikon_paper_starts_small():
    options = {"hidden": 0, "heads": 4, "landmarks": 0, "conv": 0, "dense": True}
    small, usual = (aggregator_class("transmil")(64, 1, [0, 1], **options, start=s) for s in ("normal", "torch"))
    weights_MX = torch.cat(
        [p.flatten(1) for n, p in small.named_parameters() if n.endswith(("qkv_weight", "out_weight"))], 1
    )
    assert weights_MX.std(dim=1).tolist() == pytest.approx([0.02, 0.02], rel=0.03)
    assert not small.get_parameter("class_token").any()
    assert not small.get_parameter("layer0_out_bias").any()
    assert usual.get_parameter("class_token").std().item() == pytest.approx(1, rel=0.3)
    dense = nn.Conv2d(64, 64, 5).weight
    for aggregator in (small, usual):
        assert aggregator.get_parameter("place5_weight").std().item() == pytest.approx(dense.std().item(), rel=0.05)


def test_heads_that_do_not_divide_the_features_stop_the_run_before_anything_is_written(
    tmp_path, write_study, witness_arrays, capsys
):
    arrays, labels_S = witness_arrays(12, seed=1)
    data = write_study(tmp_path / "features", arrays, labels_S)
    wrong = ["model.name=[abmil,transmil]", "model.transmil.hidden=0", "model.heads=4"]
    assert main([*data, *wrong, f"out={tmp_path / 'run'}"]) == 2
    assert "transmil: model.heads: expected a divisor of 6, the features' width" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("n_tokens", "n_segments"), [(12, 4), (13, 4), (15, 4), (5, 5), (7, 1)])
def test_segments_are_those_of_numpy(n_tokens, n_segments):
    x_11NE = torch.arange(2.0 * n_tokens).view(1, 1, n_tokens, 2)
    expected = [part.mean(axis=0) for part in np.array_split(x_11NE[0, 0].numpy(), n_segments)]
    np.testing.assert_allclose(segment_means(x_11NE, n_segments)[0, 0].numpy(), np.stack(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("transmil", {"hidden": 16, "heads": 2, "landmarks": 64}),
        ("transformer", {"hidden": 16}),
        ("hipt_mil", {"hidden": 16, "heads": 2}),
    ],
)
def test_what_is_kept_for_backward_grows_with_the_tiles_and_not_with_their_square(name, widths):
    aggregator = aggregator_class(name)(DIM, 1, [0], **widths).train()
    kept = []
    for n in (2000, 8000):
        found: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, found=found: found.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
        ):
            aggregator(pack(bags([n]), 1))
        kept.append(sum(x.untyped_storage().nbytes() for x in found.values()))
    assert kept[1] < 4.2 * kept[0]


# --- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("induced", [0, 3])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_the_transformer_equals_a_loop_with_matrices_written_out(induced, n_outputs):
    heads, width = 2, 4
    sizes = {"hidden": heads * width, "heads": heads, "layers": 2, "induced": induced, "mlp": 10, "attention": 5}
    aggregator = aggregator_class("transformer")(DIM, n_outputs, SEEDS, **sizes)

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [slice(a * width, (a + 1) * width) for a in range(heads)]
        return torch.cat([torch.softmax(q[:, s] @ k[:, s].T / math.sqrt(width), dim=1) @ v[:, s] for s in parts], dim=1)

    def of_one_bag(member: Member, bag_TD: Tensor) -> tuple[Tensor, Tensor]:
        x_TH = member.linear("embed", bag_TD)
        for layer in ("layer0", "layer1"):
            q, k, v = member.linear(f"{layer}_qkv", member.norm(f"{layer}_norm", x_TH)).chunk(3, dim=1)
            if induced:
                k, v = member.linear(f"{layer}_summary", look(member[f"{layer}_points"], k, v)).chunk(2, dim=1)
            x_TH = x_TH + member.linear(f"{layer}_out", look(q, k, v))
            wide = functional.gelu(member.linear(f"{layer}_mlp0", member.norm(f"{layer}_mlp_norm", x_TH)))
            x_TH = x_TH + member.linear(f"{layer}_mlp1", wide)
        x_TH = member.norm("norm", x_TH)
        weights_T = torch.softmax(member.attention("pool", x_TH, gated=False), dim=0)
        return member.linear("head0", weights_T @ x_TH), weights_T

    equals_loop(aggregator, of_one_bag)


# --- HIPT-MIL -------------------------------------------------------------------------------------------------------


def encoder_layer(member: Member, name: str, heads: int) -> nn.TransformerEncoderLayer:
    """torch's own, with the member's weights."""
    (hidden, mlp) = member[f"{name}_mlp0_weight"].shape
    layer = nn.TransformerEncoderLayer(hidden, heads, mlp, dropout=0.25, activation="relu")
    ours = {
        "self_attn.in_proj_weight": member[f"{name}_qkv_weight"].T,
        "self_attn.in_proj_bias": member[f"{name}_qkv_bias"],
        "self_attn.out_proj.weight": member[f"{name}_out_weight"].T,
        "self_attn.out_proj.bias": member[f"{name}_out_bias"],
        "norm1.weight": member[f"{name}_norm_scale"],
        "norm1.bias": member[f"{name}_norm_shift"],
        "linear1.weight": member[f"{name}_mlp0_weight"].T,
        "linear1.bias": member[f"{name}_mlp0_bias"],
        "linear2.weight": member[f"{name}_mlp1_weight"].T,
        "linear2.bias": member[f"{name}_mlp1_bias"],
        "norm2.weight": member[f"{name}_mlp_norm_scale"],
        "norm2.bias": member[f"{name}_mlp_norm_shift"],
    }
    layer.load_state_dict(ours, strict=True)
    return layer.eval()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_hipt_mil_equals_a_loop_over_the_encoder_layers_of_torch(layers, n_outputs):
    sizes = {"hidden": 12, "heads": 3, "layers": layers, "mlp": 10, "attention": 5}
    aggregator = aggregator_class("hipt_mil")(DIM, n_outputs, SEEDS, **sizes)
    with torch.no_grad():  # scale, shift and zero biases would hide a mistake as they start
        for name, stack in aggregator.named_parameters():
            if name.endswith(("_norm_scale", "_norm_shift", "_qkv_bias", "_out_bias")):
                stack.add_(torch.randn(stack.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)

    def of_one_bag(member: Member, bag_TD: Tensor) -> tuple[Tensor, Tensor]:
        x_TH = torch.relu(member.linear("embed", bag_TD))
        for i in range(layers):
            x_TH = encoder_layer(member, f"layer{i}", heads=3)(x_TH)
        weights_T = torch.softmax(member.attention("pool", x_TH, gated=True), dim=0)
        return member.linear("head0", torch.relu(member.linear("rho", weights_T @ x_TH))), weights_T

    equals_loop(aggregator, of_one_bag)


def test_hipt_mil_starts_as_the_layers_of_torch_do():
    aggregator = aggregator_class("hipt_mil")(64, 1, [0], hidden=48, mlp=80)
    torch.manual_seed(0)
    reference = nn.TransformerEncoderLayer(48, 3, 80)
    for name, theirs in (
        ("qkv_weight", reference.self_attn.in_proj_weight),
        ("out_weight", reference.self_attn.out_proj.weight),
        ("mlp0_weight", reference.linear1.weight),
        ("mlp1_weight", reference.linear2.weight),
        ("mlp1_bias", reference.linear2.bias),
    ):
        ours = aggregator.get_parameter(f"layer1_{name}")
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1), name
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.1), name
    for name in ("qkv_bias", "out_bias"):
        assert not aggregator.get_parameter(f"layer0_{name}").any()


def test_attention_with_dropout_in_parts_equals_the_whole_matrix_values_and_gradients(monkeypatch):
    """The matrix of one bag written out, its dropped weights put together from what each part of the rows drew."""
    monkeypatch.setattr(hipt_mil, "QUERIES", 4)
    m, heads, n, width = 2, 3, 10, 5
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(m, heads, n, width, generator=generator).requires_grad_() for _ in range(4)]
    *qkv_maLE, up_maLE = inputs
    chance = Chance(SEEDS, 3, (8,))
    ours = hipt_mil.attention(*qkv_maLE, partial(hipt_mil.draw_alone, chance, 0.3, "layer0"))
    ours_grads = torch.autograd.grad((ours * up_maLE).sum(), qkv_maLE)

    kept = [
        chance.dropout(torch.ones(m, heads * rows, n), [heads * rows], 0.3, f"layer0_weights{part}").view(
            m, heads, rows, n
        )
        for part, rows in enumerate((4, 4, 2))
    ]
    q, k, v = qkv_maLE
    weights = torch.softmax(torch.einsum("maie,maje->maij", q, k) / math.sqrt(width), dim=3) * torch.cat(kept, dim=2)
    assert 0.2 < (weights == 0).float().mean() < 0.4
    expected = torch.einsum("maij,maje->maie", weights, v)
    close(ours, expected)
    for found, wanted in zip(ours_grads, torch.autograd.grad((expected * up_maLE).sum(), qkv_maLE), strict=True):
        close(found, wanted)


# --- Evidence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_hidden", [(), (12,), (9, 5)])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_evidence_equals_a_loop(tile_hidden, n_outputs):
    aggregator = aggregator_class("evidence")(DIM, n_outputs, SEEDS, concepts=6, tile_hidden=tile_hidden)

    def of_one_bag(member: Member, bag_TD: Tensor) -> tuple[Tensor, Tensor]:
        x = bag_TD
        for i in range(len(tile_hidden) + 1):
            x = member.linear(f"tile{i}", torch.tanh(x) if i else x)
        evidence_TK, weight_KC = torch.sigmoid(x), member["head0_weight"].abs()
        return evidence_TK.amax(0) @ weight_KC + member["head0_bias"], evidence_TK @ weight_KC.mean(1)

    equals_loop(aggregator, of_one_bag)


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_no_tile_lowers_a_logit_of_evidence_and_a_repeated_one_changes_nothing(n_outputs):
    """Also with weights of any sign, as training may leave them."""
    aggregator = aggregator_class("evidence")(DIM, n_outputs, SEEDS, concepts=6, tile_hidden=(12,))
    rng = np.random.default_rng(4)
    with torch.no_grad():
        for parameter in aggregator.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 2, parameter.shape)).float())
        bag, more = bags([8])[0], bags([40], seed=1)[0] * 5
        before = aggregator(pack([bag], len(SEEDS))).logits_MBC
        for tile_D in more:
            after = aggregator(pack([torch.cat([bag, tile_D.unsqueeze(0)])], len(SEEDS))).logits_MBC
            assert (after >= before - 1e-5).all()
        close(aggregator(pack([bag.repeat(3, 1)], len(SEEDS))).logits_MBC, before)


# --- options and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("transmil", {"hidden": 10, "heads": 4}),
        ("transmil", {"conv": 4}),
        ("transmil", {"dropout": 1.0}),
        ("chowder", {"n_bottom": 0, "n_top": 0}),
        ("clam_sb", {"instance_weight": 1.5}),
        ("transformer", {"hidden": 10, "heads": 4}),
        ("transformer", {"layers": 0}),
        ("hipt_mil", {"hidden": 10, "heads": 4}),
        ("hipt_mil", {"dropout": -0.1}),
        ("dtfd", {"pseudo_bags": 0}),
        ("evidence", {"concepts": 0}),
        ("evidence", {"tile_hidden": (0,)}),
    ],
)
def test_options_that_make_no_sense_are_refused(name, wrong):
    with pytest.raises(ValueError, match=rf"^model.{next(iter(wrong))}(\.0)?: ") as refused:
        aggregator_class(name)(DIM, 1, [0], **wrong)
    (problem,) = model_problems({"name": name, **wrong}) or range_problems({"name": name, **wrong})
    assert problem == str(refused.value), "the config says the same, before torch is imported"


def test_all_options_out_of_range_are_named_by_a_constructor_and_by_the_config():
    wrong = {"hidden": -1, "attention": 0, "head": (8, 0)}
    expected = [
        "model.hidden: input should be greater than or equal to 0, got -1",
        "model.attention: input should be greater than or equal to 1, got 0",
        "model.head.1: input should be greater than or equal to 1, got 0",
    ]
    with pytest.raises(ValueError) as refused:
        aggregator_class("abmil")(DIM, 1, [0], **wrong)
    assert str(refused.value).splitlines() == expected
    tree = {"cohort": "x.csv", "model": {"name": "abmil", **wrong}, "train": {"select": "best"}}
    found = study_problems(tree)
    assert found[:3] == expected
    assert found[3].startswith("train.select=best"), "beside the other problems"


def test_a_range_of_one_aggregator_of_a_list_is_said_with_its_name():
    model = {"name": ["abmil", "dtfd", "hipt_mil"], "hidden": 0, "dropout": 1.0}
    assert study_problems({"cohort": "x.csv", "model": model}) == [
        "model.dropout: input should be less than 1, got 1.0",
        "model.hidden: input should be greater than or equal to 1, got 0 (dtfd)",
        "model.hidden: input should be greater than or equal to 1, got 0 (hipt_mil)",
    ]
    model = {"name": ["mean", "transmil", "hipt_mil"], "hidden": 16, "heads": 8, "hipt_mil": {"heads": 3}}
    assert range_problems(model) == ["model.hidden: expected a multiple of model.heads=3, got 16 (hipt_mil)"]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_schema_and_help_know_the_ranges(name):
    schema = options_schema(name).model_json_schema()["properties"]
    [line] = [line for line in options_help().splitlines() if line.split()[0] == name]
    for option in options(name):
        if option in ("hidden", "attention", "heads", "layers", "mlp", "concepts", "pseudo_bags", "dropout"):
            assert "minimum" in schema[option], option
            assert f" >= {schema[option]['minimum']:g}" in re.search(rf"{option} (\[.*?\][^;]*)", line)[1]
    assert ("a multiple of heads" in line) == ("heads" in schema)


def test_a_constructor_says_of_every_limit_what_pydantic_says():
    for name in AGGREGATORS:
        schema, types = options_schema(name), option_types(name)
        for option, field in schema.model_json_schema()["properties"].items():
            ends = [field[key] for key in ("minimum", "exclusiveMaximum") if key in field]
            for value in [end + step for end in ends for step in (-1, 0, 1)]:
                ours = list(ranges.beyond_limits(f"model.{option}", types[option], value))
                assert ours == option_problems(name, option, value)


def test_a_choice_among_words_is_checked():
    assert options("dtfd")["distill"] == ("Literal['afs', 'maxs', 'maxmins']", "afs")
    assert model_options(Model(name="dtfd", distill="maxs"), "dtfd")["distill"] == "maxs"
    (problem,) = model_problems({"name": "dtfd", "distill": "maxx"})
    assert problem.startswith("model.distill: input should be 'afs', 'maxs' or 'maxmins', got 'maxx'")


def test_options_of_a_torchmil_model_are_those_that_no_other_aggregator_owns():
    model = Model(name=["abmil", "torchmil:DSMIL"], attention=7, att_dim=5)
    assert model_options(model, "torchmil:DSMIL") == {"att_dim": 5}
    assert model_options(model, "abmil")["attention"] == 7
    assert "torchmil:NAME" in options_help()


def test_a_torchmil_model_without_torchmil_is_a_config_error(monkeypatch):
    monkeypatch.setattr("mil.config_problems.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchmil is not installed; pip install torchmil"):
        load_config(StudyConfig, ["cohort=x.csv", "model.name=torchmil:ABMIL"], also=study_problems)


def test_options_out_of_range_stop_the_run_before_anything_is_written(tmp_path, write_study, witness_arrays, capsys):
    arrays, labels_S = witness_arrays(12, seed=1)
    data = write_study(tmp_path / "features", arrays, labels_S)
    wrong = ["model.name=[abmil,transmil]", "model.hidden=10", "model.heads=4", "model.attention=0"]
    with pytest.raises(SystemExit):
        main([*data, *wrong, f"out={tmp_path / 'run'}"])
    printed = capsys.readouterr().err
    assert "model.attention: input should be greater than or equal to 1, got 0" in printed
    assert "model.hidden: expected a multiple of model.heads=4, got 10 (transmil)" in printed
    assert not (tmp_path / "run").exists()


def test_a_study_with_a_torchmil_model(tmp_path, write_study, witness_arrays, run_study, capsys):
    pytest.importorskip("torchmil")
    arrays, labels_S = witness_arrays(14, seed=1)
    data = write_study(tmp_path / "features", arrays, labels_S)
    settings = ["study.folds=2", "train.epochs=2", "model.name=[mean,torchmil:ABMIL]", "model.att_dim=5"]
    run_study([*data, *settings, f"out={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "torchmil-ABMIL" / "members.safetensors").exists()
    wrong = ["model.name=torchmil:ABMIL", "model.att_dimm=5"]
    assert main([*data, *wrong, f"out={tmp_path / 'other'}"]) == 2
    assert "model.att_dimm: unknown option of torchmil:ABMIL; there are att_dim" in capsys.readouterr().err
