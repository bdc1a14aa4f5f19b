"""Encoders against transformers, Pillow and plain arithmetic; weight files in every layout; the hub faked or absent."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from extract.config import Encoder
from extract.digest import sha256_of_file
from extract.encoders.frozen import FrozenEncoder, choose_device, choose_dtype, load_encoder
from extract.encoders.keymaps import to_timm_names
from extract.encoders.table import ENCODERS, EncoderError, EncoderSpec, encoder_names, encoder_problems, encoder_spec
from extract.encoders.weights import build_network, read_state_dict, sha256_of_tensors

DIM, DEPTH, HEADS, MLP, PATCHES = 48, 3, 3, 192, 196
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
TINY_SPEC = EncoderSpec("tiny", "vit_base_patch16_224", "owner/tiny", dim=DIM, licence="none", timm_args=TINY)
BATCH_TOLERANCE = 1e-5  # the batch size changes how matrix products are blocked, hence the last bits


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> EncoderSpec:
    """A ViT of the right shape and the wrong size, under the name `tiny`."""
    monkeypatch.setitem(ENCODERS, "tiny", TINY_SPEC)
    return TINY_SPEC


@pytest.fixture(scope="module")
def tiles_NHW3() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (5, 224, 224, 3), dtype=np.uint8)


def vit_weights(seed: int = 0, *, layer_scale: bool = False) -> dict[str, torch.Tensor]:
    """Weights under the names of transformers' files (as published, not as version 5 has them in memory)."""
    generator = torch.Generator().manual_seed(seed)

    def near(mean: float, *shape: int) -> torch.Tensor:
        return mean + 0.2 * torch.randn(*shape, generator=generator)

    def pair(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": near(0, out, into), f"{name}.bias": near(0, out)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": near(1, DIM), f"{name}.bias": near(0, DIM)}

    weights = {
        "embeddings.cls_token": near(0, 1, 1, DIM),
        "embeddings.mask_token": near(0, 1, DIM) if layer_scale else near(0, 1, 1, DIM),
        "embeddings.position_embeddings": near(0, 1, 1 + PATCHES, DIM),
        "embeddings.patch_embeddings.projection.weight": near(0, DIM, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": near(0, DIM),
        **norm("layernorm"),
    }
    for layer in range(DEPTH):
        at = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            weights |= pair(f"{at}.attention.attention.{part}", DIM, DIM)
        weights |= pair(f"{at}.attention.output.dense", DIM, DIM)
        if layer_scale:
            weights |= norm(f"{at}.norm1") | norm(f"{at}.norm2")
            weights |= pair(f"{at}.mlp.fc1", MLP, DIM) | pair(f"{at}.mlp.fc2", DIM, MLP)
            weights |= {f"{at}.layer_scale{i}.lambda1": near(1, DIM) for i in (1, 2)}
        else:
            weights |= norm(f"{at}.layernorm_before") | norm(f"{at}.layernorm_after")
            weights |= pair(f"{at}.intermediate.dense", MLP, DIM) | pair(f"{at}.output.dense", DIM, MLP)
            weights |= pair("pooler.dense", DIM, DIM)
    return weights


def timm_weights_by_hand(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The renaming of ANCHORS, spelled out with `replace`: independent of the code under test."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(("pooler", "embeddings.mask_token")) or ".attention.attention." in name:
            continue
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.position_embeddings", "pos_embed").replace("embeddings.cls_token", "cls_token")
        name = name.replace("encoder.layer.", "blocks.").replace("attention.output.dense", "attn.proj")
        name = name.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        renamed[name.replace("layernorm", "norm")] = tensor
    for layer in range(DEPTH):
        for leaf in ("weight", "bias"):
            at = f"encoder.layer.{layer}.attention.attention"
            parts = [weights[f"{at}.{part}.{leaf}"] for part in ("query", "key", "value")]
            renamed[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat(parts)
    return renamed


def normalised_N3HW(tiles_NHW3: np.ndarray) -> torch.Tensor:
    """ImageNet normalisation in float64 numpy."""
    scaled = (tiles_NHW3 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32).copy())


MODEL_TYPES = {
    "ViTModel": {"model_type": "vit", "intermediate_size": MLP},
    "Dinov2Model": {"model_type": "dinov2", "mlp_ratio": 4},
}


def transformers_cls_ND(*arguments) -> torch.Tensor:
    return transformers_tokens_NTD(*arguments)[:, 0]


def transformers_tokens_NTD(
    folder: Path, weights: dict[str, torch.Tensor], kind: str, tiles_NHW3: np.ndarray
) -> torch.Tensor:
    """What transformers makes of the same weights, read from a file in the published layout."""
    import transformers

    config = MODEL_TYPES[kind] | {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "qkv_bias": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    kept = weights if kind == "Dinov2Model" else {k: v for k, v in weights.items() if "mask_token" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model, loading = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"], "the truth itself did not load its weights"
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(pixel_values=normalised_N3HW(tiles_NHW3)).last_hidden_state


# --- the table -----------------------------------------------------------------------------------------------------


def test_import_is_light(python):
    code = (
        "import sys, extract.encoders.table as e; e.encoder_names(); e.encoder_spec('phikon'); "
        "print([m for m in ('torch', 'timm', 'numpy', 'safetensors', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MILLIONS = {  # parameters as the papers and model cards state them
    "phikon": 85.798656,
    "phikon-v2": 303.4,
    "uni": 303.3,
    "uni2-h": 681.4,
    "virchow": 631.2,
    "virchow2": 631.2,
    "h-optimus-1": 1134.8,
    "midnight": 1134.8,
    "h-optimus-0": 1134.8,
    "gigapath": 1134.953984,
    "lunit-vits8": 21.7,
    "resnet50": 23.5,
    "h0-mini": 85.7,
    "hibou-b": 85.7,
    "hibou-l": 303.7,
    "kaiko-vits16": 21.7,
    "kaiko-vits8": 21.7,
    "kaiko-vitb16": 85.8,
    "kaiko-vitb8": 85.8,
    "kaiko-vitl14": 304.4,
    "ctranspath": 27.5,
    "gpfm": 303.2,
    # trunk: ViT-B/16 with 785 positions instead of 197; the query, two norms, attention 512 <- 768, the last norm
    "conch": (85_798_656 + (785 - 197) * 768 + 512 + 2 * (512 + 768) + 512 * (512 + 768 + 768 + 512 + 4) + 2 * 512)
    / 1e6,
}
EPS = {"ctranspath": {1e-5}, "conch": {1e-5, 1e-6}}


@pytest.mark.parametrize("name", encoder_names())
def test_network_has_the_published_size_and_stated_width(name: str):
    spec = encoder_spec(name)
    with torch.device("meta"):
        network = build_network(spec).eval()
        output = network(torch.empty(2, 3, spec.input_px, spec.input_px))
    n_parameters = sum(p.numel() for p in network.parameters())
    assert n_parameters / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)
    if spec.pooling == "token+mean":
        assert output.ndim == 3
        assert 2 * output.shape[2] == spec.dim
    else:
        assert output.shape == (2, spec.dim)
    found = {m.eps for m in network.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert found <= EPS.get(name, {1e-6})


def test_phikon_has_exactly_its_parameters():
    with torch.device("meta"):
        network = build_network(encoder_spec("phikon"))
    assert sum(p.numel() for p in network.parameters()) == 85_798_656


def test_unknown_names_get_the_nearest_valid_one():
    with pytest.raises(EncoderError, match="did you mean 'virchow2'"):
        encoder_spec("virchow-2")
    with pytest.raises(EncoderError, match="did you mean 'resnet18'"):
        encoder_spec("timm:resnet_18")
    with pytest.raises(EncoderError, match="did you mean 'a1_in1k'"):
        encoder_spec("timm:resnet18.a1_in1")


def test_timm_spec_comes_from_timms_own_config():
    spec = encoder_spec("timm:vit_tiny_patch16_224")
    assert (spec.name, spec.tile_px, spec.dim, spec.mean) == ("timm:vit_tiny_patch16_224", 224, 192, (0.5, 0.5, 0.5))
    assert spec.hub_repo.startswith("timm/vit_tiny_patch16_224.")
    spec = encoder_spec("timm:mobilenetv3_small_100.lamb_in1k")  # its head is wider than its last feature map
    assert spec.dim == 1024
    assert spec.drop[0] == "classifier."


def test_config_problems_are_found_together_without_torch(tmp_path: Path):
    section = Encoder(name="phikon2", weights=tmp_path / "none.pth", random_weights=True)
    problems = encoder_problems(section)
    assert len(problems) == 4
    assert "did you mean 'phikon" in problems[0]
    assert "none.pth: no such file" in problems[3]
    assert encoder_problems(Encoder(name="timm:resnet18", random_weights=True)) == []
    with pytest.raises(EncoderError, match="only for timm:NAME"):
        load_encoder(Encoder(name="phikon", random_weights=True))


# --- the truth: transformers on the same weights -------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transformers", "transformers with vit.", "timm", "ibot", "half-wrapped timm"])
def test_cls_vector_is_that_of_transformers_vit(tiny, tmp_path: Path, tiles_NHW3: np.ndarray, layout: str):
    weights = vit_weights()
    by_hand = timm_weights_by_hand(weights)
    extra = torch.ones(7, DIM)
    if layout == "transformers":
        file = tmp_path / "model.safetensors"
        save_file(weights, file)
    elif layout == "transformers with vit.":
        file = tmp_path / "pytorch_model.bin"
        torch.save({f"vit.{k}": v for k, v in weights.items()} | {"classifier.weight": extra}, file)
    elif layout == "timm":
        file = tmp_path / "vit.pt"
        torch.save(by_hand | {"head.weight": extra}, file)
    elif layout == "ibot":
        file = tmp_path / "ibot_vit_base_pancan.pth"
        teacher = {f"module.backbone.{k}": v for k, v in by_hand.items()} | {"module.head.mlp.0.weight": extra}
        student = {k: torch.zeros_like(v) for k, v in teacher.items()}
        args = argparse.Namespace(arch="vit_base", lr=5e-4)
        torch.save({"student": student, "teacher": teacher, "epoch": 3, "args": args}, file)
    else:
        file = tmp_path / "vit.pth"
        torch.save({"state_dict": {f"module.{k}": v for k, v in by_hand.items()}}, file)
    truth_ND = transformers_cls_ND(tmp_path / "truth", weights, "ViTModel", tiles_NHW3)

    encoder = load_encoder(Encoder(name="tiny", weights=file, device="cpu"))
    features_ND = encoder.encode(tiles_NHW3)

    assert features_ND.dtype == torch.float32
    torch.testing.assert_close(features_ND, truth_ND, atol=1e-5, rtol=1e-5)
    assert features_ND.std() > 0.1
    assert encoder.id == "tiny"
    assert encoder.source == str(file)
    assert encoder.weights_sha256 == sha256_of_file(file)


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_cls_vector_is_that_of_transformers_dinov2(monkeypatch, tmp_path: Path, tiles_NHW3: np.ndarray, prefix: str):
    spec = EncoderSpec(
        "tiny2", "vit_large_patch16_224", "owner/x", dim=DIM, licence="none", timm_args=TINY | {"init_values": 1.0}
    )
    monkeypatch.setitem(ENCODERS, "tiny2", spec)
    weights = vit_weights(layer_scale=True)
    file = tmp_path / "model.safetensors"
    save_file({prefix + k: v for k, v in weights.items()}, file)
    truth_ND = transformers_cls_ND(tmp_path / "truth", weights, "Dinov2Model", tiles_NHW3)

    features_ND = load_encoder(Encoder(name="tiny2", weights=file, device="cpu")).encode(tiles_NHW3)

    torch.testing.assert_close(features_ND, truth_ND, atol=1e-5, rtol=1e-5)


def test_tokens_are_those_of_transformers_dinov2_with_swiglu(monkeypatch, tmp_path: Path, tiles_NHW3: np.ndarray):
    """Midnight's layout: a gated MLP whose hidden width is rounded up to eights."""
    hidden = (int(DIM * 4 * 2 / 3) + 7) // 8 * 8
    arguments = {"img_size": 224, "patch_size": 16, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    arguments |= {"init_values": 1.0, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    arguments["mlp_ratio"] = 2 * hidden / DIM
    spec = dataclasses.replace(
        TINY_SPEC, architecture="vit_small_patch14_dinov2", timm_args=arguments, dim=2 * DIM, pooling="token+mean"
    )
    monkeypatch.setitem(ENCODERS, "tiny", spec)
    weights = {name: tensor for name, tensor in vit_weights(layer_scale=True).items() if ".mlp." not in name}
    rng = np.random.default_rng(3)
    for layer in range(DEPTH):
        at = f"encoder.layer.{layer}.mlp"
        for name, shape in (("weights_in", (2 * hidden, DIM)), ("weights_out", (DIM, hidden))):
            weights[f"{at}.{name}.weight"] = torch.from_numpy(rng.normal(0, 0.2, shape).astype(np.float32))
            weights[f"{at}.{name}.bias"] = torch.from_numpy(rng.normal(0, 0.2, shape[0]).astype(np.float32))
    monkeypatch.setitem(MODEL_TYPES, "Dinov2Model", MODEL_TYPES["Dinov2Model"] | {"use_swiglu_ffn": True})
    tokens_NTD = transformers_tokens_NTD(tmp_path / "truth", weights, "Dinov2Model", tiles_NHW3)
    save_file(weights, tmp_path / "model.safetensors")
    encoder = load_encoder(Encoder(name="tiny", weights=tmp_path / "model.safetensors", device="cpu"))
    truth_ND = torch.cat([tokens_NTD[:, 0], tokens_NTD[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(encoder.encode(tiles_NHW3), truth_ND, rtol=1e-4, atol=1e-4)


OWN = """
import torch

class Colours(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
    def forward(self, tiles_N3HW):
        return tiles_N3HW.mean((2, 3)) * self.scale

def colours(weights):
    network = Colours()
    if weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True))
    return network, {"dim": 3, "tile_px": 224, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "licence": "mine"}

def wrong_width(weights):
    return Colours(), {"dim": 4}

def no_tuple(weights):
    return Colours()

def wrong_scale(weights):
    return Colours(), {"dim": 3, "mean": (123.7, 116.3, 103.5), "std": (0, 57, 57), "mpp": 0}

def unknown_fact(weights):
    return Colours(), {"dim": 3, "tile": 224}

def raises(weights):
    raise RuntimeError("no weights")

def takes_nothing():
    return Colours(), {"dim": 3}

class Four(Colours):
    def forward(self, tiles_N3HW):
        return tiles_N3HW.reshape(11, -1)

def cannot(weights):
    return Four(), {"dim": 3}

not_a_function = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> str:
    """A module of the user's in the current folder."""
    name = f"own_network_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_ones_own_network(own, tmp_path: Path, tiles_NHW3: np.ndarray):
    encoder = load_encoder(Encoder(name=f"{own}:colours", device="cpu"))
    assert (encoder.id, encoder.spec.licence, encoder.spec.mpp) == (f"{own}:colours", "mine", 0.5)
    truth_ND = (tiles_NHW3.astype(np.float64).mean((1, 2)) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(encoder.encode(tiles_NHW3).numpy(), truth_ND, rtol=1e-4, atol=1e-5)
    torch.save({"scale": torch.full((3,), 2.0)}, tmp_path / "mine.pt")
    other = load_encoder(Encoder(name=f"{own}:colours", weights=tmp_path / "mine.pt", device="cpu"))
    torch.testing.assert_close(other.encode(tiles_NHW3), 2 * encoder.encode(tiles_NHW3))
    assert other.weights_sha256 != encoder.weights_sha256


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong_width", r"of 2 tiles \(224 px\) its network makes \(2, 3\), expected \(2, 4\)"),
        ("no_tuple", r"expected it to return \(torch\.nn\.Module, dict\), got Colours"),
        ("unknown_fact", r"expected facts with dim, and any of .*; got dim, tile"),
        ("wrong_scale", r"mean is \(123.7, .* from 0 to 1.*; std is \(0, 57, 57\), .*; mpp is 0, expected a number"),
        ("not_a_function", r"has no function 'not_a_function'"),
        ("absent", r"has no function 'absent'"),
        ("raises", r"raises\(None\) raised RuntimeError: no weights \(.*own_network_.*\.py, line \d+\)"),
        ("takes_nothing", r"takes_nothing\(None\) raised TypeError: .*1 was given$"),
        ("cannot", r"its network, of 2 tiles \(224 px\), raised RuntimeError: .*shape.*\.py, line \d+\)"),
    ],
)
def test_a_network_that_does_not_keep_to_the_contract(own, function: str, said: str):
    with pytest.raises(EncoderError, match=said):
        load_encoder(Encoder(name=f"{own}:{function}", device="cpu"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", r"raised SyntaxError: invalid syntax \(.*broken_.*\.py, line 1\)"),
        ("\nimport nothing_of_that_name", r"raised ModuleNotFoundError: .*nothing_of_that_name.*, line 2\)"),
        ("1 / 0", r"raised ZeroDivisionError: division by zero \(.*line 1\)"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch, text: str, said: str):
    """What is wrong and where, not our stack."""
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EncoderError, match=rf"encoder\.name={name}:f: importing {name} {said}"):
        load_encoder(Encoder(name=f"{name}:f", device="cpu"))


def test_a_module_that_is_not_there(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderError, match=r"no module 'nowhere_at_all', neither installed nor in"):
        load_encoder(Encoder(name="nowhere_at_all:network", device="cpu"))
    with pytest.raises(EncoderError, match=r"only the hub has revisions"):
        load_encoder(Encoder(name="nowhere_at_all:network", revision="abc"))


def test_half_precision_files_are_computed_in_float32(tiny, tmp_path: Path, tiles_NHW3: np.ndarray):
    weights = {k: v.half() for k, v in vit_weights().items()}
    file = tmp_path / "half.safetensors"
    save_file(weights, file)
    as_float32 = {k: v.float() for k, v in weights.items()}
    truth_ND = transformers_cls_ND(tmp_path / "truth", as_float32, "ViTModel", tiles_NHW3)
    encoder = load_encoder(Encoder(name="tiny", weights=file, device="cpu"))
    torch.testing.assert_close(encoder.encode(tiles_NHW3), truth_ND, atol=1e-5, rtol=1e-5)


# --- pooling and preparation ---------------------------------------------------------------------------------------


def tiny_encoder(spec: EncoderSpec, dtype: torch.dtype | None = None) -> FrozenEncoder:
    torch.manual_seed(5)
    network = build_network(spec)
    for parameter in network.parameters():  # as initialised, class and register tokens are all but zero
        parameter.data.normal_(0, 0.2)
    return FrozenEncoder(spec, network, "test", "", device=torch.device("cpu"), dtype=dtype)


def test_token_and_mean_leaves_register_tokens_out(tiles_NHW3: np.ndarray):
    spec = EncoderSpec(
        "v", "vit_huge_patch14_224", "o/x", 2 * DIM, "none", pooling="token+mean", timm_args=TINY | {"reg_tokens": 4}
    )
    encoder = tiny_encoder(spec)
    seen = []
    encoder.network.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features_ND = encoder.encode(tiles_NHW3)
    tokens = seen[0]
    assert tokens.shape == (5, 1 + 4 + 256, DIM)
    for n in range(5):
        mean = sum(tokens[n, t].double() for t in range(5, 261)) / 256
        torch.testing.assert_close(features_ND[n, :DIM], tokens[n, 0].clone())
        torch.testing.assert_close(features_ND[n, DIM:].double(), mean, atol=1e-5, rtol=1e-5)


def test_average_pooling_is_the_mean_over_positions(tiles_NHW3: np.ndarray):
    spec = EncoderSpec("r", "resnet10t", "o/x", dim=512, licence="none", pooling="avg", drop=("fc.",))
    network: Any = build_network(spec)
    encoder = FrozenEncoder(spec, network, "test", "", device=torch.device("cpu"))
    with torch.inference_mode():
        maps_NDHW = network.forward_features(normalised_N3HW(tiles_NHW3))
    torch.testing.assert_close(encoder.encode(tiles_NHW3), maps_NDHW.mean((2, 3)).clone(), atol=1e-4, rtol=1e-4)


def test_resize_is_pillows_within_a_grey_level():
    rng = np.random.default_rng(0)
    smooth = np.array(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((256, 256)))
    spec = EncoderSpec("u", "vit_base_patch16_224", "o/x", DIM, "none", tile_px=256, resize_px=224, timm_args=TINY)
    got_3HW = tiny_encoder(spec).prepare(torch.from_numpy(smooth[None]))[0]
    pillow = np.array(Image.fromarray(smooth).resize((224, 224), Image.Resampling.BILINEAR))
    got_levels = (got_3HW.permute(1, 2, 0).numpy() * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
    assert np.abs(got_levels - pillow).max() < 1.01  # Pillow rounds twice, to whole levels


def test_crop_takes_the_centre():
    tile = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    spec = EncoderSpec("g", "vit_base_patch16_224", "o/x", DIM, "none", tile_px=256, crop_px=224, timm_args=TINY)
    got_N3HW = tiny_encoder(spec).prepare(torch.from_numpy(tile))
    torch.testing.assert_close(got_N3HW, normalised_N3HW(tile[:, 16:240, 16:240]), atol=1e-6, rtol=1e-5)


# --- frozen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
def test_a_tile_has_the_same_features_in_any_batch(tiles_NHW3: np.ndarray, name: str):
    encoder = load_encoder(Encoder(name=name, random_weights=True, device="cpu"))
    tiles_NHW3 = tiles_NHW3[:, : encoder.spec.tile_px, : encoder.spec.tile_px]
    before = {k: v.clone() for k, v in encoder.network.state_dict().items()}
    alone_ND = torch.cat([encoder.encode(tile_HW3[None]) for tile_HW3 in tiles_NHW3])
    shuffled_ND = encoder.encode(tiles_NHW3[[4, 0, 3, 3, 1, 2]])
    scale = alone_ND.abs().max()
    assert (shuffled_ND[[1, 4, 5, 2, 0]] - alone_ND).abs().max() < BATCH_TOLERANCE * scale
    assert (alone_ND[0] - alone_ND[1]).abs().max() > 100 * BATCH_TOLERANCE * scale
    assert not alone_ND.requires_grad
    assert not alone_ND.is_inference()
    assert not any(m.training for m in encoder.network.modules())
    assert not any(p.requires_grad for p in encoder.network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.network.state_dict().items())


def test_tensors_arrays_and_read_only_arrays_are_the_same(tiles_NHW3: np.ndarray):
    encoder = tiny_encoder(TINY_SPEC)
    locked = tiles_NHW3.copy()
    locked.flags.writeable = False
    expected_ND = encoder.encode(torch.from_numpy(tiles_NHW3))
    assert torch.equal(encoder.encode(tiles_NHW3), expected_ND)
    assert torch.equal(encoder.encode(locked), expected_ND)
    assert encoder.encode(tiles_NHW3[:0]).shape == (0, DIM)


@pytest.mark.parametrize("bad", [np.zeros((2, 256, 256, 3), np.uint8), np.zeros((2, 224, 224, 3), np.float32)])
def test_wrong_tiles_are_refused(bad: np.ndarray):
    with pytest.raises(ValueError, match=r"expected uint8 tiles \(N, 224, 224, 3\), got"):
        tiny_encoder(TINY_SPEC).encode(bad)


def test_bf16_is_near_float32_and_comes_back_as_float32(tiles_NHW3: np.ndarray):
    exact_ND = tiny_encoder(TINY_SPEC).encode(tiles_NHW3)
    rough_ND = tiny_encoder(TINY_SPEC, torch.bfloat16).encode(tiles_NHW3)
    assert rough_ND.dtype == torch.float32
    assert not torch.equal(rough_ND, exact_ND)
    assert torch.nn.functional.cosine_similarity(rough_ND, exact_ND).min() > 0.99


def test_compile_goes_through_torch_compile(monkeypatch, tiles_NHW3: np.ndarray):
    compiled = []

    def doubled(network):
        compiled.append(network)
        return lambda x: 2 * network(x)

    monkeypatch.setattr(torch, "compile", doubled)
    section = Encoder(name="timm:test_resnet", random_weights=True, device="cpu")
    tiles_NHW3 = tiles_NHW3[:2, :160, :160]
    plain_ND = load_encoder(section).encode(tiles_NHW3)
    assert compiled == []
    encoder = load_encoder(section.model_copy(update={"compile": True}))
    assert compiled == [encoder.network]
    torch.testing.assert_close(encoder.encode(tiles_NHW3), 2 * plain_ND)


def test_devices_and_precisions():
    with pytest.raises(EncoderError, match="not on this machine"):
        choose_device("cuda:99")
    with pytest.raises(EncoderError, match="did you mean 'cuda'"):
        choose_device("cudaa")
    assert choose_device("cpu") == torch.device("cpu")
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) is None
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(EncoderError, match="use float32 or bf16"):
        choose_dtype("fp16", cpu)


# --- weights that are wrong ----------------------------------------------------------------------------------------


def test_misfits_say_what_was_expected_and_got(tiny, tmp_path: Path):
    weights = timm_weights_by_hand(vit_weights())
    del weights["blocks.1.mlp.fc1.bias"]
    weights["blocks.9.norm1.weight"] = torch.ones(DIM)
    weights["pos_embed"] = torch.zeros(1, 50, DIM)
    file = tmp_path / "w.pth"
    torch.save(weights, file)
    with pytest.raises(EncoderError) as caught:
        load_encoder(Encoder(name="tiny", weights=file))
    message = str(caught.value)
    assert message.startswith(f"{file}: weights do not fit encoder 'tiny'")
    assert "1 missing: blocks.1.mlp.fc1.bias" in message
    assert "1 unexpected: blocks.9.norm1.weight" in message
    assert f"pos_embed expected (1, 197, {DIM}), got (1, 50, {DIM})" in message


def test_weights_that_want_another_normalisation_are_refused(tiny, tmp_path: Path):
    """Kaiko's ViT-B/16 has Phikon's architecture: only the files beside the weights tell that its pixels differ."""
    file = tmp_path / "model.safetensors"
    save_file(timm_weights_by_hand(vit_weights()), file)
    section = Encoder(name="tiny", weights=file, device="cpu")
    for name, said in (
        ("config.json", {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}}),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.229, 0.224, 0.225]}),
    ):
        beside = tmp_path / name
        beside.write_text(json.dumps(said))
        wrong = r"mean \(0\.5, 0\.5, 0\.5\) instead of \(0\.485, 0\.456, 0\.406\), which is encoder 'tiny'\. Set"
        with pytest.raises(EncoderError, match=rf"{name} says that these weights want pixels normalised with {wrong}"):
            load_encoder(section)
        beside.write_text(json.dumps(said).replace("[0.5, 0.5, 0.5]", "[0.485, 0.4561, 0.406]"))
        load_encoder(section)
        beside.write_text("[1]")
        load_encoder(section)


def test_transformers_names_that_are_not_understood_are_reported(tiny):
    weights = vit_weights() | {"encoder.layer.0.mlp.weights_between.weight": torch.ones(2, 2)}
    assert "blocks.0.mlp.weights_between.weight" in to_timm_names(weights, tiny)
    del weights["encoder.layer.2.attention.attention.key.bias"]
    with pytest.raises(EncoderError, match=r"blocks\.2\.attn\.qkv\.bias needs query, key and value; no key"):
        to_timm_names(weights, tiny)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("how", ["zip", "before torch 1.6", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tiny, tmp_path: Path, how: str):
    file, crater = tmp_path / "evil.pth", tmp_path / "crater"
    content = vit_weights() | {"extra": Bomb(crater)}
    if how == "bare pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(EncoderError, match="cannot be read as weights" if how == "bare pickle" else "refused"):
        load_encoder(Encoder(name="tiny", weights=file))
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater)))  # noqa: S301  the bomb is a real one
    assert crater.exists()


def test_files_that_are_no_weights(tiny, tmp_path: Path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:6f9f986e\nsize 86735333\n"
    whole = tmp_path / "whole.pth"
    torch.save(vit_weights(), whole)
    contents = {
        "pointer.safetensors": pointer,
        "pointer.bin": pointer,
        "empty.pth": b"",
        "empty.safetensors": b"",
        "half.pth": whole.read_bytes()[: whole.stat().st_size // 2],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EncoderError, match=name):
            read_state_dict(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(EncoderError, match="expected a dictionary of weights, got a list"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "log.pt")
    with pytest.raises(EncoderError, match=r"log\.pt: .*expected name -> tensor.*got epoch, optimizer"):
        load_encoder(Encoder(name="tiny", weights=tmp_path / "log.pt"))


@pytest.mark.parametrize("as_zip", [True, False])
def test_damaged_torch_files_are_refused_or_read_and_never_raise_anything_else(tmp_path: Path, as_zip: bool):
    rng = np.random.default_rng(0)
    whole, damaged = tmp_path / "whole.pth", tmp_path / "damaged.pth"
    torch.save({"a": torch.ones(3), "b": (2, "x", None, 1.5)}, whole, _use_new_zipfile_serialization=as_zip)
    assert torch.equal(read_state_dict(whole)["a"], torch.ones(3))
    messages = []
    for _ in range(100):
        content = bytearray(whole.read_bytes())
        for position in rng.integers(0, len(content), 3):
            content[position] = rng.integers(0, 256)
        damaged.write_bytes(bytes(content))
        try:
            read_state_dict(damaged)
        except EncoderError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(str(damaged)) for message in messages)


# --- timm models and random weights --------------------------------------------------------------------------------


def test_random_weights_are_the_same_in_every_process_and_change_no_other_chance(python):
    section = Encoder(name="timm:test_vit", random_weights=True, device="cpu")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    encoder = load_encoder(section)
    assert torch.equal(torch.rand(3), expected)
    code = (
        "from extract.config import Encoder; from extract.encoders.frozen import load_encoder; "
        "print(load_encoder(Encoder(name='timm:test_vit', random_weights=True, device='cpu')).weights_sha256)"
    )
    other = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == encoder.weights_sha256
    assert encoder.id == "timm:test_vit"
    torch.manual_seed(12)
    different = build_network(encoder.spec).state_dict()
    assert sha256_of_tensors(different) != encoder.weights_sha256


def test_timm_models_take_local_weights_with_a_classifier(tmp_path: Path, tiles_NHW3: np.ndarray):
    import timm

    torch.manual_seed(1)
    whole: Any = timm.create_model("resnet10t", num_classes=1000).eval()
    file = tmp_path / "resnet10t.safetensors"
    save_file(whole.state_dict(), file)
    encoder = load_encoder(Encoder(name="timm:resnet10t", weights=file, device="cpu"))
    tiles_NHW3 = tiles_NHW3[:, :176, :176]
    assert encoder.spec.mean == (0.485, 0.456, 0.406)
    with torch.inference_mode():
        truth_ND = whole.forward_head(whole.forward_features(normalised_N3HW(tiles_NHW3)), pre_logits=True).clone()
    torch.testing.assert_close(encoder.encode(tiles_NHW3), truth_ND, atol=1e-4, rtol=1e-4)
    assert load_file(file)["fc.weight"].shape == (1000, 512)  # so that the classifier was there to drop


# --- the hub -------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = b"not really weights"


class FakeHub(BaseHTTPRequestHandler):
    """Answers like huggingface.co's resolve addresses, as far as downloads need it."""

    def do_HEAD(self) -> None:
        path = self.path
        if path.startswith("/owner/gated/"):
            self.answer(401, {"X-Error-Code": "GatedRepo"})
        elif "/resolve/nope/" in path:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/owner/open/resolve/") and path.endswith("/pytorch_model.bin"):
            self.answer(200, {"ETag": '"abc"', "X-Repo-Commit": COMMIT}, WEIGHTS)
        else:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def fake_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FETCH = """
import json, sys
from extract.encoders.hub import fetch_from_hub
from extract.encoders.table import EncoderError, EncoderSpec
for repo, revision, gated in json.loads(sys.argv[1]):
    try:
        path, commit = fetch_from_hub(EncoderSpec("x", "resnet18", repo, 1, "CC-BY-1", gated=gated), revision)
        print(json.dumps([path.name, path.read_text(), commit]))
    except EncoderError as error:
        print(json.dumps(str(error)))
"""


def fetch(endpoint: str, home: Path, *wanted: tuple[str, str | None, bool]) -> list:
    """`fetch_from_hub` in a new process, because the hub's library reads its environment when imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", FETCH, json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_download_records_the_commit_and_survives_without_network(fake_hub: str, tmp_path: Path):
    found, gated, no_revision, no_file = fetch(
        fake_hub,
        tmp_path,
        ("owner/open", None, False),
        ("owner/gated", None, True),
        ("owner/open", "nope", False),
        ("owner/empty", None, False),
    )
    expected = ["pytorch_model.bin", WEIGHTS.decode(), COMMIT]
    assert found == expected
    assert "accept its licence (CC-BY-1)" in gated
    assert "HF_TOKEN" in gated
    assert no_revision.startswith("encoder.revision=nope: owner/open has no such revision")
    assert "none of model.safetensors, pytorch_model.bin is there" in no_file

    start = time.monotonic()
    wanted = (("owner/open", None, False), ("owner/open", COMMIT, False), ("owner/no", None, False))
    found, pinned, absent = fetch("http://127.0.0.1:9", tmp_path, *wanted)
    assert time.monotonic() - start < 15  # the library's own retries take 23 s and more
    assert found == expected
    assert pinned == expected
    assert "https://huggingface.co/owner/no" in absent
    assert "encoder.weights=/path/to/model.safetensors" in absent
    assert "licence" not in absent


def test_offline_phikon_says_what_to_download_and_where_to_put_it(monkeypatch, tmp_path: Path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EncoderError) as caught:
        load_encoder(Encoder(name="phikon", device="cpu"))
    message = str(caught.value)
    assert "https://huggingface.co/owkin/phikon" in message
    assert "model.safetensors" in message
    assert "encoder.weights=" in message
    together = r"config\.json and preprocessor_config\.json and model\.safetensors from https://huggingface\.co/o/n "
    with pytest.raises(
        EncoderError, match=rf"{together}.* put them into one folder.*weights=/path/to/model\.safetensors"
    ):
        load_encoder(Encoder(name="hf:o/n", device="cpu"))
    with pytest.raises(EncoderError, match="timm/resnet18"):
        load_encoder(Encoder(name="timm:resnet18", device="cpu"))


def test_a_timm_model_without_published_weights_says_so():
    with pytest.raises(EncoderError, match=r"timm publishes no weights.*encoder\.weights=FILE"):
        load_encoder(Encoder(name="timm:vit_giant_patch14_224", device="cpu"))
