"""A ViT or DINOv2 checkpoint of transformers as an encoder: encoder.name=hf:OWNER/NAME.

Its config.json says what the network is, its preprocessor_config.json how pixels are normalised; transformers itself
is not needed. With encoder.weights=FILE both lie beside the file. Features are the CLS token after the last norm. The
files say nothing of microns: tiles are cut at 0.5 microns per pixel, or as tiles.mpp says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from extract.config import Encoder
from extract.encoders.hub import fetch_from_hub
from extract.encoders.normalisation import CONFIG, PREPROCESSOR, scale_problems
from extract.encoders.table import HUGGING_FACE, EncoderError, EncoderSpec, Rgb

ARCHITECTURE = "vit_base_patch16_224"
"""Of timm; everything that differs is an argument."""

# what transformers takes where a config.json leaves a key out
_COMMON: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_COMMON |= {"qkv_bias": True, "hidden_act": "gelu", "num_channels": 3}
_DINOV2 = _COMMON | {"patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "vit": _COMMON | {"patch_size": 16, "layer_norm_eps": 1e-12, "intermediate_size": 3072},
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2 | {"num_register_tokens": 4},
}
_ACTIVATIONS = ("gelu", "relu", "silu")


def checkpoint_spec(section: Encoder) -> EncoderSpec:
    """What the checkpoint's two files say.

    Raises:
        EncoderError: they cannot be had, or say something that is not understood (all of it is told).
    """
    name = section.name
    model, pixels = (_read(name, file, section) for file in (CONFIG, PREPROCESSOR))
    kind = str(model.get("model_type"))
    if kind not in _DEFAULTS:
        raise EncoderError(
            f"encoder.name={name}: {CONFIG} says model_type {kind!r}, expected {', '.join(_DEFAULTS)}. "
            "encoder.name=module:function takes any network (extract/encoders/own.py)"
        )
    model = {**_DEFAULTS[kind], **model}
    input_px = _input_px(pixels) or int(model["image_size"])
    problems = [*_model_problems(kind, model, input_px), *_pixel_problems(pixels)]
    if problems:
        raise EncoderError(f"encoder.name={name}: {'; '.join(problems)}")
    normalised = pixels.get("do_normalize", True)
    return EncoderSpec(
        name=name,
        architecture=ARCHITECTURE,
        hub_repo=name.removeprefix(HUGGING_FACE),
        dim=int(model["hidden_size"]),
        licence="see its model card",
        tile_px=input_px,
        mean=_rgb(pixels["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=_rgb(pixels["image_std"]) if normalised else (1.0, 1.0, 1.0),
        timm_args=_timm_arguments(kind, model, input_px),
        positions="bicubic, antialiased" if kind == "dinov2_with_registers" else "bicubic",
    )


def _read(name: str, file_name: str, section: Encoder) -> dict[str, Any]:
    if section.weights is not None:
        path = section.weights.expanduser().parent / file_name
    else:
        asked = EncoderSpec(name, "", name.removeprefix(HUGGING_FACE), 0, "see its model card", hub_files=(file_name,))
        path = fetch_from_hub(asked, section.revision, together=(CONFIG, PREPROCESSOR, "model.safetensors"))[0]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        says = "what the network is" if file_name == CONFIG else "how pixels are normalised"
        raise EncoderError(
            f"encoder.name={name}: {path} says {says}, and cannot be read ({error}). Put the checkpoint's own there"
        ) from None
    if not isinstance(content, dict):
        raise EncoderError(f"encoder.name={name}: {path}: expected keys and values, got {type(content).__name__}")
    return content


def _model_problems(kind: str, model: Mapping[str, Any], input_px: int) -> list[str]:
    problems = []
    if model["num_channels"] != 3:
        problems.append(f"{CONFIG}: num_channels {model['num_channels']}, expected 3 (RGB)")
    if model["hidden_act"] not in _ACTIVATIONS:
        problems.append(f"{CONFIG}: hidden_act {model['hidden_act']!r}, expected {', '.join(_ACTIVATIONS)}")
    if input_px % model["patch_size"]:
        problems.append(f"images of {input_px} px are no whole number of patches of {model['patch_size']} px")
    if kind == "vit" and input_px != model["image_size"]:
        problems.append(
            f"{PREPROCESSOR} makes images of {input_px} px, the network is for {model['image_size']} ({CONFIG})"
        )
    return problems


def _pixel_problems(pixels: Mapping[str, Any]) -> list[str]:
    problems = []
    factor = pixels.get("rescale_factor", 1 / 255) if pixels.get("do_rescale", True) else 1.0
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        problems.append(f"{PREPROCESSOR}: pixels are multiplied by {factor}, expected 1/255")
    if pixels.get("do_normalize", True):
        names = ("image_mean", "image_std")
        problems += [f"{PREPROCESSOR}: {said}" for said in scale_problems(*map(pixels.get, names), names=names)]
    return problems


def _rgb(value: Any) -> Rgb:
    return cast(Rgb, tuple(float(v) for v in value))


def _input_px(pixels: Mapping[str, Any]) -> int | None:
    """Side of the square that the preprocessor makes; None where it leaves images as they are."""
    cropped = pixels.get("do_center_crop", "crop_size" in pixels)
    size = pixels.get("crop_size") if cropped else pixels.get("size") if pixels.get("do_resize", True) else None
    if isinstance(size, Mapping):
        sides = {value for key, value in size.items() if key in ("height", "width", "shortest_edge")}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) else None


def _timm_arguments(kind: str, model: Mapping[str, Any], input_px: int) -> dict[str, Any]:
    dim = int(model["hidden_size"])
    arguments: dict[str, Any] = {
        "img_size": input_px,
        "patch_size": int(model["patch_size"]),
        "embed_dim": dim,
        "depth": int(model["num_hidden_layers"]),
        "num_heads": int(model["num_attention_heads"]),
        "qkv_bias": bool(model["qkv_bias"]),
        "norm_eps": float(model["layer_norm_eps"]),
        "act_layer": model["hidden_act"],
    }
    if kind == "vit":
        return arguments | {"mlp_ratio": _ratio(int(model["intermediate_size"]), dim)}
    hidden = int(dim * model["mlp_ratio"])
    arguments["init_values"] = 1.0  # the file brings the scales; this only says that there are some
    if model["use_swiglu_ffn"]:
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)  # gate and value, rounded up to eights as DINOv2 does
        arguments |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    if kind == "dinov2_with_registers":
        arguments |= {"reg_tokens": int(model["num_register_tokens"]), "no_embed_class": True}
    return arguments | {"mlp_ratio": _ratio(hidden, dim)}


def _ratio(hidden: int, dim: int) -> float:
    """A ratio of which timm, who multiplies and cuts off, makes exactly `hidden`."""
    return (hidden + 0.5) / dim
