"""Networks that timm does not have, and checkpoints of transformers: against transformers and plain arithmetic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extract.config import Encoder
from extract.encoders.frozen import load_encoder, spec_of
from extract.encoders.hub import fetch_from_hub
from extract.encoders.keymaps import to_timm_names
from extract.encoders.table import ENCODERS, EncoderError, encoder_problems, seen_by
from extract.encoders.weights import build_network, network_with_weights

MEAN, STD = [0.6, 0.5, 0.4], [0.21, 0.22, 0.23]
COMMON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "layer_norm_eps": 1e-4}
# the grid for which it was made, the images that it is shown
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("ViT", {"intermediate_size": 100, "image_size": 64, "patch_size": 16}, 64),
    "dinov2": ("Dinov2", {"mlp_ratio": 3, "image_size": 70, "patch_size": 14}, 42),
    "dinov2, gated": ("Dinov2", {"use_swiglu_ffn": True, "image_size": 42, "patch_size": 14}, 42),
    "dinov2 with registers": (
        "Dinov2WithRegisters",
        {"image_size": 70, "patch_size": 14, "num_register_tokens": 3},
        42,
    ),
}


def make_checkpoint(folder: Path, kind: str) -> Any:
    """A tiny random checkpoint, written by transformers, and its model."""
    import transformers

    name, options, input_px = KINDS[kind]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**COMMON, **options)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    size = {"shortest_edge": 80} if "dinov2" in kind else {"height": input_px, "width": input_px}
    pixels = {
        "image_mean": MEAN,
        "image_std": STD,
        "do_resize": True,
        "size": size,
        "rescale_factor": 0.00392156862745098,
    }
    if "dinov2" in kind:
        pixels |= {"do_center_crop": True, "crop_size": {"height": input_px, "width": input_px}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return model


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | keys).items() if v != "absent"}))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_checkpoint_of_transformers_makes_what_transformers_makes(tmp_path: Path, kind: str):
    model = make_checkpoint(tmp_path, kind)
    side = KINDS[kind][2]
    tiles_NHW3 = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    pixels_N3HW = torch.from_numpy(((tiles_NHW3 / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        truth_ND = model(pixel_values=pixels_N3HW).last_hidden_state[:, 0]

    encoder = load_encoder(Encoder(name="hf:owner/tiny", weights=tmp_path / "model.safetensors", device="cpu"))

    torch.testing.assert_close(encoder.encode(tiles_NHW3), truth_ND, rtol=1e-4, atol=1e-4)
    assert (encoder.id, encoder.spec.tile_px, encoder.spec.dim, encoder.spec.mpp) == ("hf:owner/tiny", side, 48, 0.5)
    assert seen_by(encoder.id) == (None, None)


def test_a_checkpoint_that_does_not_say_what_is_needed(tmp_path: Path):
    make_checkpoint(tmp_path, "vit")
    section = Encoder(name="hf:owner/tiny", weights=tmp_path / "model.safetensors", device="cpu")
    config, pixels = tmp_path / "config.json", tmp_path / "preprocessor_config.json"
    whole = pixels.read_text()
    change(pixels, image_std="absent", rescale_factor=1.0)
    with pytest.raises(EncoderError, match=r"multiplied by 1\.0, expected 1/255; .*image_std is None, expected three"):
        spec_of(section)
    change(pixels, image_mean=[123.7, 116.3, 103.5], image_std=[0.2, 0.2, 0.2], rescale_factor=1 / 255)
    with pytest.raises(EncoderError, match=r"image_mean is \[123\.7, .*expected numbers from 0 to 1"):
        spec_of(section)
    change(pixels, do_normalize=False, rescale_factor=1 / 255)
    assert spec_of(section).std == (1, 1, 1)
    pixels.unlink()
    with pytest.raises(
        EncoderError, match=r"preprocessor_config\.json says how pixels are normalised, and cannot be read"
    ):
        spec_of(section)
    pixels.write_text(whole)
    change(config, hidden_size=60)
    with pytest.raises(EncoderError, match=r"weights do not fit encoder 'hf:owner/tiny'.* of the wrong shape"):
        load_encoder(section)
    change(config, image_size=96, hidden_act="gelu_new")
    with pytest.raises(
        EncoderError, match=r"hidden_act 'gelu_new', expected.*makes images of 64 px, the network is for 96"
    ):
        spec_of(section)
    change(config, model_type="swin")
    with pytest.raises(EncoderError, match=r"model_type 'swin', expected vit, dinov2.*module:function"):
        spec_of(section)
    assert encoder_problems(Encoder(name="hf:no_owner"))[0].startswith(
        "encoder.name=hf:no_owner: expected hf:OWNER/NAME"
    )
    assert encoder_problems(Encoder(name="hf:owner/tiny")) == []


def test_registers_of_dinov2s_own_checkpoints(tmp_path: Path):
    """Hibou's layout by DINOv2's own names, in chunks of blocks, gives the network of transformers' names."""
    model = make_checkpoint(tmp_path, "dinov2 with registers")
    section = Encoder(name="hf:owner/tiny", weights=tmp_path / "model.safetensors", device="cpu")
    spec = spec_of(section)
    from_file = load_file(tmp_path / "model.safetensors")
    theirs = to_timm_names(from_file, spec)
    own = {k: v for k, v in theirs.items() if k not in ("reg_token", "cls_token", "pos_embed")}
    own = {k.replace("blocks.", "blocks.0.", 1): v for k, v in own.items()}
    embeddings = model.embeddings
    own |= {"register_tokens": embeddings.register_tokens, "cls_token": embeddings.cls_token}
    own |= {"pos_embed": embeddings.position_embeddings, "mask_token": embeddings.mask_token}
    again = to_timm_names({"teacher": {k: v.detach() for k, v in own.items()}}, spec)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


# --- CTransPath ----------------------------------------------------------------------------------------------------


def old_swin_names(name: str) -> str:
    """transformers' Swin -> timm 0.5.4, as CTransPath's file has it."""
    for theirs, ours in (
        ("encoder.layers.", "layers."),
        ("attention.self.relative_position_bias_table", "attn.relative_position_bias_table"),
        ("attention.output.dense", "attn.proj"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("embeddings.norm", "patch_embed.norm"),
        ("layernorm.", "norm."),
    ):
        name = name.replace(theirs, ours)
    return name


class Stem(torch.nn.Module):
    """CTransPath's stem in transformers' Swin: (patches_NTC, rows and columns)."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.weights = weights

    def forward(self, pixels: torch.Tensor, **_: Any) -> tuple[torch.Tensor, tuple[int, int]]:
        for at in (0, 3):
            pixels = torch.nn.functional.conv2d(pixels, self.weights[f"{at}.weight"], stride=2, padding=1)
            norm = [self.weights[f"{at + 1}.{part}"][:, None, None] for part in ("running_mean", "running_var")]
            pixels = (pixels - norm[0]) / torch.sqrt(norm[1] + 1e-5)
            scale, shift = (self.weights[f"{at + 1}.{part}"][:, None, None] for part in ("weight", "bias"))
            pixels = (pixels * scale + shift).clamp(min=0)
        pixels = torch.nn.functional.conv2d(pixels, self.weights["6.weight"], self.weights["6.bias"])
        return pixels.flatten(2).transpose(1, 2), tuple(pixels.shape[2:])


def test_ctranspath_is_transformers_swin_behind_its_stem(tmp_path: Path):
    import transformers

    torch.manual_seed(2)
    dim = 16
    shape = {"embed_dim": dim, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7}
    config = transformers.SwinConfig(image_size=112, patch_size=4, layer_norm_eps=1e-5, **shape)
    model = transformers.SwinModel(config).eval()
    stem = {f"{at}.weight": torch.randn(o, i, 3, 3) for at, i, o in ((0, 3, 2), (3, 2, 4))}
    for at, width in ((1, 2), (4, 4)):
        stem |= {f"{at}.{part}": torch.rand(width) + 0.5 for part in ("weight", "bias", "running_mean", "running_var")}
        stem[f"{at}.num_batches_tracked"] = torch.tensor(7)
    stem |= {"6.weight": torch.randn(dim, 4, 1, 1), "6.bias": torch.randn(dim)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    weights = {old_swin_names(k): v for k, v in swin_weights(tmp_path).items()}
    weights |= {f"patch_embed.proj.{name}": tensor for name, tensor in stem.items()}
    weights |= {"head.weight": torch.ones(9, 2 * dim), "layers.0.blocks.1.attn_mask": torch.ones(16, 49, 49)}
    model.embeddings.patch_embeddings = Stem(stem)
    pixels_N3HW = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        truth_ND = model(pixels_N3HW).pooler_output

    arguments = dict(ENCODERS["ctranspath"].timm_args) | {"img_size": 112}
    arguments |= {"embed_dim": dim, "depths": (2, 2), "num_heads": (2, 4)}
    spec = dataclasses.replace(ENCODERS["ctranspath"], timm_args=arguments, dim=2 * dim)
    network = network_with_weights(spec, {"model": weights}, "made").eval()
    with torch.no_grad():
        torch.testing.assert_close(network(pixels_N3HW), truth_ND, rtol=1e-4, atol=1e-4)


def swin_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights by the names of published files; query, key and value in one."""
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if "patch_embeddings" not in k and "position_index" not in k}
    for name in [name for name in weights if ".self.query." in name]:
        at, leaf = name.split("attention.self.query.")
        parts = [weights.pop(f"{at}attention.self.{part}.{leaf}") for part in ("query", "key", "value")]
        weights[f"{at}attn.qkv.{leaf}"] = torch.cat(parts)
    return weights


def test_ctranspaths_weights_are_not_on_the_hub():
    with pytest.raises(
        EncoderError, match=r"not on the hub\. Get ctranspath\.pth of https.* GPL-3\.0.*encoder\.weights="
    ):
        fetch_from_hub(ENCODERS["ctranspath"])


# --- CONCH ---------------------------------------------------------------------------------------------------------


def test_conch_is_a_vit_and_one_query_that_attends_to_all_its_tokens():
    import timm

    torch.manual_seed(3)
    dim, heads, trunk = 8, 2, {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 3}
    spec = dataclasses.replace(ENCODERS["conch"], timm_args={"dim": dim, "n_heads": heads, **trunk}, dim=dim)
    filled = {k: torch.randn_like(v) for k, v in build_network(spec).state_dict().items()}
    vision = {f"visual.{k}": v for k, v in filled.items()}
    others = {"text.positional_embedding": torch.ones(3), "visual.proj_contrast": torch.ones(dim, dim)}
    others |= {"visual.attn_pool_caption.query": torch.ones(4, 12), "visual.ln_caption.weight": torch.ones(12)}
    network = network_with_weights(spec, vision | others | {"logit_scale": torch.tensor(1.0)}, "made").eval()
    pixels_N3HW = torch.randn(2, 3, 32, 32)
    vit: Any = timm.create_model("vit_base_patch16_224", num_classes=0, **trunk).eval()
    vit.load_state_dict({k.removeprefix("trunk."): v for k, v in filled.items() if k.startswith("trunk.")})

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        spread = torch.sqrt(values.var(-1, correction=0, keepdim=True) + 1e-5)
        return (values - values.mean(-1, keepdim=True)) / spread * filled[f"{name}.weight"] + filled[f"{name}.bias"]

    with torch.no_grad():
        features_ND = network(pixels_N3HW)
        for tokens_TC, feature_D in zip(vit.forward_features(pixels_N3HW), features_ND, strict=True):
            at = "attn_pool_contrast"
            keys_TC, query_D = norm(tokens_TC, f"{at}.ln_k"), norm(filled[f"{at}.query"], f"{at}.ln_q")[0]
            bias = filled[f"{at}.attn.in_proj_bias"].reshape(3, dim)
            q = filled[f"{at}.attn.q_proj_weight"] @ query_D + bias[0]
            k = keys_TC @ filled[f"{at}.attn.k_proj_weight"].T + bias[1]
            v = keys_TC @ filled[f"{at}.attn.v_proj_weight"].T + bias[2]
            pooled = []
            for head in range(heads):
                part = slice(head * dim // heads, (head + 1) * dim // heads)
                attention_T = torch.softmax(k[:, part] @ q[part] / (dim / heads) ** 0.5, dim=0)
                pooled.append(attention_T @ v[:, part])
            out = filled[f"{at}.attn.out_proj.weight"] @ torch.cat(pooled) + filled[f"{at}.attn.out_proj.bias"]
            torch.testing.assert_close(feature_D, norm(out, "ln_contrast"), rtol=1e-4, atol=1e-4)
