"""LoRA: exactly nothing at first, the same merged, readable by peft, refused elsewhere. Probe and intervals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from statsmodels.stats.proportion import proportion_confint

from extract.config import Encoder, ExtractConfig, load_config
from extract.encoders.frozen import FrozenEncoder, load_encoder
from extract.encoders.lora import BASE, WEIGHTS, add_lora, lora_layers, n_trainable, save_adapter, train_dropout
from extract.encoders.table import ENCODERS, EncoderError, encoder_problems
from extract.encoders.weights import build_network, sha256_of_tensors
from extract.finetuning.config import Lora
from extract.finetuning.probe import GRID, class_weights, fit_probe, score_table, scores_of
from extract.run import extraction_problems

TINY = Encoder(name="timm:test_vit", random_weights=True, device="cpu")
WIDTH = 64


@pytest.fixture
def tiles_NHW3() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 160, 160, 3), dtype=np.uint8)


def disturbed(lora: Lora, folder: Path, seed: int = 1) -> FrozenEncoder:
    """The tiny encoder with an adapter that does something, unmerged; the adapter is saved in `folder`."""
    encoder = load_encoder(TINY)
    base = sha256_of_tensors(encoder.network.state_dict())
    model = add_lora(encoder.network, lora, seed=0)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(encoder.network):
        up = layer.lora_B["default"].weight
        with torch.no_grad():
            up.copy_(torch.randn(up.shape, generator=generator) * 0.1)
            if lora.targets == "qv":
                up[WIDTH : 2 * WIDTH] = 0
    save_adapter(model, folder, encoder.id, base)
    return encoder


# --- training side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["qkv", "qv"])
def test_step_0_is_the_frozen_encoder_bit_for_bit(tiles_NHW3: np.ndarray, targets: str):
    encoder = load_encoder(TINY)
    before_ND, state = encoder.encode(tiles_NHW3), torch.get_rng_state()
    add_lora(encoder.network, Lora(targets=targets), seed=5)
    assert torch.equal(encoder.encode(tiles_NHW3), before_ND)
    assert torch.equal(torch.get_rng_state(), state), "torch's chance is left alone"


def test_only_lora_learns_and_its_size_is_4_d_r_a_block():
    network = load_encoder(TINY).network
    n_blocks = len(network.blocks)
    add_lora(network, Lora(rank=3), seed=0)
    assert {name.split(".")[-3] for name, p in network.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert n_trainable(network, "qkv") == n_blocks * 4 * WIDTH * 3
    assert n_trainable(network, "qv") == n_blocks * 3 * WIDTH * 3


def test_phikon_trains_less_than_a_hundredth():
    with torch.device("meta"):
        network = build_network(ENCODERS["phikon"])
        total = sum(p.numel() for p in network.parameters())
        add_lora(network, Lora(), seed=0)
    assert total == 85_798_656
    assert n_trainable(network, "qkv") == 12 * 4 * 768 * 16 == 589_824
    assert n_trainable(network, "qkv") / total < 0.01


def test_dropout_is_all_that_trains_in_training_mode():
    network = load_encoder(TINY).network
    add_lora(network, Lora(dropout=0.2), seed=0)
    train_dropout(network, on=True)
    on = {type(module).__name__ for module in network.modules() if module.training}
    assert on == {"Dropout", "ModuleDict"}
    train_dropout(network, on=False)
    assert not any(module.training for module in network.modules())


def test_qv_never_touches_the_key(tiles_NHW3: np.ndarray):
    """Three steps of a large learning rate; the merged layer's middle rows are those of the frozen one."""
    encoder = load_encoder(TINY)
    frozen = {name: w.clone() for name, w in encoder.network.state_dict().items() if "qkv.weight" in name}
    model = add_lora(encoder.network, Lora(targets="qv", dropout=0), seed=0)
    learned = [p for p in encoder.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        encoder.network(encoder.prepare(torch.from_numpy(tiles_NHW3))).square().sum().backward()
        optimizer.step()
    merged = model.merge_and_unload().state_dict()
    for name, was in frozen.items():
        changed_D = (merged[name] != was).any(dim=1)
        assert changed_D[:WIDTH].any(), name
        assert not changed_D[WIDTH : 2 * WIDTH].any(), name
        assert changed_D[2 * WIDTH :].any(), name


def test_recomputed_activations_give_the_same_gradients(tiles_NHW3: np.ndarray):
    gradients = []
    for recompute in (False, True):
        encoder = load_encoder(TINY)
        add_lora(encoder.network, Lora(dropout=0), seed=0)
        with torch.no_grad():
            for layer in lora_layers(encoder.network):
                layer.lora_B["default"].weight.fill_(0.01)
        encoder.network.set_grad_checkpointing(recompute)
        encoder.network(encoder.prepare(torch.from_numpy(tiles_NHW3))).square().sum().backward()
        gradients.append([p.grad for p in encoder.network.parameters() if p.requires_grad])
    assert len(gradients[0]) == 2 * 6
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


# --- extraction side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["qkv", "qv"])
def test_merged_equals_unmerged_and_is_another_encoder_than_without(
    tmp_path: Path, tiles_NHW3: np.ndarray, targets: str
):
    unmerged = disturbed(Lora(targets=targets, rank=4, alpha=12), tmp_path)
    frozen, merged = load_encoder(TINY), load_encoder(TINY.model_copy(update={"adapter": tmp_path}))
    torch.testing.assert_close(merged.encode(tiles_NHW3), unmerged.encode(tiles_NHW3), atol=1e-5, rtol=1e-5)
    assert (merged.encode(tiles_NHW3) - frozen.encode(tiles_NHW3)).abs().max() > 1e-3
    assert merged.weights_sha256 != frozen.weights_sha256
    assert not any("lora" in name for name in merged.network.state_dict())
    assert str(tmp_path) in merged.source


def test_peft_loads_the_adapter_by_itself(tmp_path: Path, tiles_NHW3: np.ndarray):
    ours = disturbed(Lora(rank=5), tmp_path)
    other = load_encoder(TINY)
    model = peft.PeftModel.from_pretrained(other.network, tmp_path)
    assert torch.equal(other.encode(tiles_NHW3), ours.encode(tiles_NHW3))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (5, 16, {"qkv"})
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", WEIGHTS, BASE}


def test_two_adapters_have_two_hashes_and_one_adapter_one(tmp_path: Path):
    hashes = []
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        disturbed(Lora(rank=2), tmp_path / name, seed)
        hashes.append(load_encoder(TINY.model_copy(update={"adapter": tmp_path / name})).weights_sha256)
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]


def test_an_adapter_of_another_encoder_is_refused_by_name(tmp_path: Path):
    disturbed(Lora(rank=2), tmp_path / "adapter")
    wanted = f"encoder.adapter={tmp_path / 'adapter'}: made for encoder 'timm:test_vit', got encoder.name=phikon"
    section = Encoder(name="phikon", adapter=tmp_path / "adapter")
    assert encoder_problems(section)[0].startswith(wanted)
    with pytest.raises(EncoderError, match=r"Set encoder\.name=timm:test_vit"):
        load_encoder(section)
    arguments = ["slides.folder=x", "out=y", f"encoder.adapter={tmp_path}", "encoder.name=uni"]
    with pytest.raises(Exception, match=r"no adapter_config\.json and no .*; did you mean .*adapter\?"):
        load_config(ExtractConfig, arguments, also=extraction_problems)


def test_an_adapter_of_other_weights_is_refused(tmp_path: Path):
    disturbed(Lora(rank=2), tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        torch.save(build_network(load_encoder(TINY).spec).state_dict(), tmp_path / "other.pth")
    section = Encoder(name="timm:test_vit", weights=tmp_path / "other.pth", adapter=tmp_path)
    with pytest.raises(EncoderError, match=r"made on other weights of 'timm:test_vit'"):
        load_encoder(section)


def test_the_same_weights_in_another_file_are_the_same_base(tmp_path: Path, tiles_NHW3: np.ndarray):
    unmerged = disturbed(Lora(rank=2), tmp_path)
    torch.save(load_encoder(TINY).network.state_dict(), tmp_path / "same.pth")
    section = Encoder(name="timm:test_vit", weights=tmp_path / "same.pth", adapter=tmp_path, device="cpu")
    torch.testing.assert_close(
        load_encoder(section).encode(tiles_NHW3), unmerged.encode(tiles_NHW3), atol=1e-5, rtol=1e-5
    )


def test_damaged_adapters_say_so(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    section = TINY.model_copy(update={"adapter": tmp_path})
    disturbed(Lora(rank=2), tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    first = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != first}, tmp_path / WEIGHTS)
    with pytest.raises(EncoderError, match="1 weights missing"):
        load_encoder(section)
    save_file(weights | {first: torch.zeros(7, 7)}, tmp_path / WEIGHTS)
    with pytest.raises(EncoderError, match="cannot be read"):
        load_encoder(section)
    (tmp_path / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(EncoderError, match="cannot be read"):
        load_encoder(section)
    (tmp_path / BASE).write_text(json.dumps({"encoder": "timm:test_vit"}))
    assert "base_encoder.json cannot be read" in encoder_problems(section)[0]
    (tmp_path / BASE).unlink()
    assert "its base encoder is unknown" in encoder_problems(section)[0]


# --- probe and scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
def test_probe_is_scikit_learns_regression_written_for_raw_features(n_classes: int):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels_N = np.arange(90) % n_classes
    features_ND = rng.normal(size=(90, 5)) * [1, 10, 0.1, 1, 0] + labels_N[:, None] * [0.5, 5, 0.05, 0, 0] + 3
    train, val = np.arange(60), np.arange(60, 90)
    probe = fit_probe(features_ND[train], labels_N[train], features_ND[val], labels_N[val], n_classes, balanced=True)
    scaled_ND = (features_ND - features_ND[train].mean(0)) / np.where(
        features_ND[train].std(0) > 1e-9, features_ND[train].std(0), 1
    )
    losses = {}
    for strength in GRID:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000).fit(
            scaled_ND[train], labels_N[train]
        )
        p_NC = model.predict_proba(scaled_ND)
        losses[strength] = -np.log(p_NC[val, labels_N[val]]).mean()
        if strength == probe.strength:
            ours_NC = torch.from_numpy(probe.logits(features_ND)).softmax(dim=1).numpy()
            np.testing.assert_allclose(ours_NC, p_NC, atol=1e-6)
    assert min(losses, key=losses.__getitem__) == probe.strength
    assert probe.converged
    assert probe.weight_CD.shape == (n_classes, 5)


def test_class_weights_make_classes_equal():
    np.testing.assert_allclose(class_weights(np.array([0, 0, 0, 1]), 2), [4 / 6, 4 / 2])


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels_N, predicted_N = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    table = score_table(labels_N, {"x": predicted_N}, np.arange(50), 3, 0, 0, "x")["x"]
    assert table["scores"]["accuracy"] == {"value": accuracy_score(labels_N, predicted_N), "low": None, "high": None}
    assert table["scores"]["balanced_accuracy"]["value"] == pytest.approx(
        balanced_accuracy_score(labels_N, predicted_N)
    )
    assert table["scores"]["macro_f1"]["value"] == pytest.approx(f1_score(labels_N, predicted_N, average="macro"))
    assert np.array(table["confusion"]).sum() == 50
    assert np.isnan(scores_of(np.array([[[3, 1], [0, 0]]]))["accuracy"][0]), "a class is absent"


def test_intervals_are_a_slow_bootstrap_of_whole_groups_and_differences_are_paired():
    rng = np.random.default_rng(2)
    groups_N = rng.integers(0, 9, 60)
    labels_N = rng.integers(0, 2, 60)
    right = {"base": rng.random(60) < 0.6, "better": rng.random(60) < 0.9}
    predicted = {name: np.where(r, labels_N, 1 - labels_N) for name, r in right.items()}
    table = score_table(labels_N, predicted, groups_N, 2, 250, 7, "base")
    again, values = np.random.default_rng(7), {"base": [], "better": []}
    names = np.unique(groups_N)
    draws = np.concatenate([again.multinomial(9, np.full(9, 1 / 9), size=n) for n in (100, 100, 50)])
    for drawn_G in draws:
        rows = np.concatenate([np.tile(np.flatnonzero(groups_N == g), n) for g, n in zip(names, drawn_G, strict=True)])
        for name in values:
            values[name].append(accuracy_score(labels_N[rows], predicted[name][rows]))
    found, rate = table["better"]["scores"]["accuracy"], right["better"].mean()
    worth = rate * (1 - rate) / ((9 * np.var(values["better"]) * 9 / 8 + rate * (1 - rate) / 9) / 10)
    assert (found["low"], found["high"]) == pytest.approx(proportion_confint(rate * worth, worth, method="wilson"))
    found, gap = table["better"]["difference"]["accuracy"], rate - right["base"].mean()
    error = np.subtract(values["better"], values["base"]).std() * (9 / 8) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx(student.interval(0.95, 8, loc=gap, scale=error))
    assert found["value"] == pytest.approx(gap)
    assert "difference" not in table["base"]


def test_a_perfect_score_has_a_lower_limit_below_one_and_no_difference_has_a_width():
    """Twelve slides, of which three have tiles of the rarer class: what all say right could be wrong in some slides."""
    labels_N, groups_N = np.repeat([1, 0], [30, 90]), np.repeat(np.arange(12), 10)
    table = score_table(labels_N, {"x": labels_N, "y": labels_N}, groups_N, 2, 100, 0, "x")
    for score, worth in (("accuracy", 12), ("balanced_accuracy", 6), ("macro_f1", 6)):
        found = table["x"]["scores"][score]
        assert (found["low"], found["high"]) == pytest.approx(proportion_confint(worth, worth, method="wilson"))
        gap, away = table["y"]["difference"][score], proportion_confint(0, worth, method="wilson")[1]
        assert (gap["low"], gap["value"], gap["high"]) == pytest.approx((-away, 0, away))


@pytest.mark.parametrize(("right", "within"), [(0.9, 0.5), (0.99, 0.3)])
def test_intervals_of_tiles_hold_the_truth(right, within):
    """600 sets of 40 slides of 25 tiles that are right or wrong together; percentiles hold 0.91 and 0.90."""
    rng, held = np.random.default_rng(3), []
    labels_N, groups_N = np.tile([0, 1], 500), np.repeat(np.arange(40), 25)
    for _ in range(600):
        z_N = within**0.5 * rng.normal(size=40)[groups_N] + (1 - within) ** 0.5 * rng.normal(size=1000)
        said_N = np.where(z_N < norm.ppf(right), labels_N, 1 - labels_N)
        found = score_table(labels_N, {"x": said_N}, groups_N, 2, 100, 0, "x")["x"]["scores"]["accuracy"]
        held.append(found["low"] <= right <= found["high"])
    assert 0.92 < np.mean(held) < 0.98


def test_the_adapter_can_be_read_by_whom_the_umask_lets(tmp_path: Path):
    before = os.umask(0o002)
    try:
        disturbed(Lora(rank=2), tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()} == {0o664}
