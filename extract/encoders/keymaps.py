"""Names of weights: from Transformers', iBOT's and other wrappings to timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extract.encoders.table import EncoderError, EncoderSpec

if TYPE_CHECKING:
    import torch


def to_timm_names(state_dict: Mapping[str, Any], spec: EncoderSpec) -> dict[str, torch.Tensor]:
    """Weights under timm's names, from a file in any of these layouts, which are told apart by their names:

    - timm's own;
    - Hugging Face transformers, ViT or DINOv2, with or without the `vit.` or `dinov2.` prefix;
    - iBOT, DINO or DINOv2 training checkpoints: the teacher's backbone;
    - Swin as timm had it before 0.9.

    Unneeded weights (`spec.drop`, pooler, projection heads, mask token) are left out. Names that are not understood
    are kept, so that `check_weights` reports them.

    Raises:
        EncoderError: not name -> tensor, or a transformers layer without all of query, key and value.
    """
    tensors = _without_wrapping(state_dict, spec)
    if any(name.startswith("embeddings.patch_embeddings.") for name in tensors):
        tensors = _from_transformers(tensors, spec)
    tensors = _from_old_swin(_from_dinov2(tensors))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(spec.drop)}


def _without_wrapping(state_dict: Mapping[str, Any], spec: EncoderSpec) -> dict[str, torch.Tensor]:
    """Weights by plain name: the teacher of a training checkpoint, without prefixes and projection heads."""
    import torch

    for key in ("teacher", "state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            return _without_wrapping(state_dict[key], spec)
    not_tensors = [str(name) for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if not_tensors or not state_dict:
        raise EncoderError(
            f"weights for encoder {spec.name!r}: expected name -> tensor, perhaps under 'teacher', 'state_dict' or "
            f"'model', got {first_few(not_tensors) or 'nothing'}"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if spec.part and any(name.startswith(spec.part) for name in tensors):
        tensors = {k.removeprefix(spec.part): v for k, v in tensors.items() if k.startswith(spec.part)}
    if any(name.startswith("backbone.") for name in tensors):
        heads = ("head.", "dino_head.", "ibot_head.")
        tensors = {k.removeprefix("backbone."): v for k, v in tensors.items() if not k.startswith(heads)}
    return {name.removeprefix("vit.").removeprefix("dinov2."): tensor for name, tensor in tensors.items()}


_TRANSFORMERS_EXTRAS = ("pooler.", "classifier.", "embeddings.mask_token")

_TRANSFORMERS_STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}

_TRANSFORMERS_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",  # ViT
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "norm1": "norm1",  # DINOv2
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",  # DINOv2 with SwiGLU: gate and value in one matrix, in timm's order
    "mlp.weights_out": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}

_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)")

_QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")


def _from_transformers(tensors: Mapping[str, torch.Tensor], spec: EncoderSpec) -> dict[str, torch.Tensor]:
    """transformers' names as they are in files (version 5 renames modules in memory only) -> timm's."""
    import torch

    renamed: dict[str, torch.Tensor] = {}
    qkv: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        if block and (part := _QKV.fullmatch(block[2])):
            qkv.setdefault(f"blocks.{block[1]}.attn.qkv.{part[2]}", {})[part[1]] = tensor
        elif block:
            renamed[f"blocks.{block[1]}.{_rename_in_block(block[2])}"] = tensor
        elif not name.startswith(_TRANSFORMERS_EXTRAS):
            renamed[_TRANSFORMERS_STEM.get(name, name)] = tensor
    for name, parts in qkv.items():
        absent = [part for part in ("query", "key", "value") if part not in parts]
        if absent:
            raise EncoderError(f"weights for encoder {spec.name!r}: {name} needs query, key and value; no {absent[0]}")
        renamed[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed


_CHUNK = re.compile(r"blocks\.\d+\.(\d+)\.")


def _from_dinov2(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DINOv2's own names, where they are not timm's: blocks in chunks, the gated MLP, registers.

    With registers DINOv2 adds a position to the CLS token, timm does not: it is added here once for all.
    """
    renamed = {
        _CHUNK.sub(r"blocks.\1.", name).replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
        for name, tensor in tensors.items()
    }
    if "register_tokens" in renamed and {"cls_token", "pos_embed"} <= renamed.keys():
        positions_1PD = renamed["pos_embed"]
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + positions_1PD[:, :1]
        renamed["pos_embed"] = positions_1PD[:, 1:]
    return renamed


_SWIN_BUFFERS = ("relative_position_index", "attn_mask")
_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.downsample\.")


def _from_old_swin(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm before 0.9 halved the grid at the end of a stage, and kept in the file what it can compute."""
    if "layers.0.downsample.reduction.weight" not in tensors:
        return dict(tensors)
    return {
        _DOWNSAMPLE.sub(lambda found: f"layers.{int(found[1]) + 1}.downsample.", name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(_SWIN_BUFFERS)
    }


def _rename_in_block(name: str) -> str:
    if name in _TRANSFORMERS_BLOCK:
        return _TRANSFORMERS_BLOCK[name]
    module, _, leaf = name.rpartition(".")
    return f"{_TRANSFORMERS_BLOCK.get(module, module)}.{leaf}"


def first_few(names: Sequence[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
