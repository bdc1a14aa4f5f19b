"""The frozen networks that turn tiles into features: one table, one way to load weights, one `encode`.

Importing this module is light (no torch, no timm): config errors consult `encoder_names`. To add an encoder, add one
entry to `ENCODERS`. Weights are read from safetensors or with `weights_only=True`; nothing is ever unpickled freely.

Axes: N tiles, H and W tile_px rows and columns, 3 RGB, D feature width, T tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from extract.config import Encoder, did_you_mean
from extract.lora import AdapterError, adapter_problems, merge_adapter, merged_sha256

if TYPE_CHECKING:
    import numpy as np
    import torch

TIMM = "timm:"
RANDOM_SEED = 0
HUB_TIMEOUT_S = 10.0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT_EXTRAS = ("head.", "mask_token", "masked_embed")

Pooling = Literal["token", "avg", "token+mean", "model"]
Rgb = tuple[float, float, float]


class EncoderError(Exception):
    """An encoder is unknown, or its weights cannot be had or do not fit. The message says what to do."""


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder: the network, what it wants to see, and where its weights come from.

    A tile is `tile_px` square at `mpp` microns per pixel; it is resized to `resize_px`, then its centre `crop_px` is
    taken (0: not done), scaled to 0..1 and normalised by `mean` and `std`.

    `pooling`: "token" is the CLS token after the last norm; "avg" the mean over positions; "token+mean" the CLS token
    beside the mean of the patch tokens, register tokens left out; "model" whatever the timm model does by itself.

    `drop` lists beginnings of weight names that a file may hold and features do not need (a classifier, say).
    """

    name: str
    architecture: str
    hub_repo: str
    dim: int
    licence: str
    tile_px: int = 224
    mpp: float = 0.5
    resize_px: int = 0
    crop_px: int = 0
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD
    pooling: Pooling = "token"
    gated: bool = False
    timm_args: Mapping[str, Any] = field(default_factory=dict)
    hub_files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    drop: tuple[str, ...] = VIT_EXTRAS

    @property
    def input_px(self) -> int:
        """Side of the square that the network sees, in pixels."""
        return self.crop_px or self.resize_px or self.tile_px


# Arguments, normalisation and pooling are those of the model cards on the hub (huggingface.co/<hub_repo>) and their
# config.json; LayerNorm eps is 1e-6 in all of them, which is timm's default. Tests count the parameters.
_SPECS = (
    EncoderSpec(
        "phikon",
        "vit_base_patch16_224",
        "owkin/phikon",
        dim=768,
        licence="Owkin non-commercial",
    ),
    EncoderSpec(
        "phikon-v2",
        "vit_large_patch16_224",
        "owkin/phikon-v2",
        dim=1024,
        licence="Owkin non-commercial",
        timm_args={"init_values": 1.0},
    ),
    EncoderSpec(
        "uni",
        "vit_large_patch16_224",
        "MahmoodLab/UNI",
        dim=1024,
        licence="CC-BY-NC-ND-4.0",
        tile_px=256,
        resize_px=224,
        gated=True,
        timm_args={"init_values": 1e-5},
    ),
    EncoderSpec(
        "uni2-h",
        "vit_giant_patch14_224",
        "MahmoodLab/UNI2-h",
        dim=1536,
        licence="CC-BY-NC-ND-4.0",
        tile_px=256,
        resize_px=224,
        gated=True,
        timm_args={
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "silu",
            "init_values": 1e-5,
            "reg_tokens": 8,
            "no_embed_class": True,
        },
    ),
    EncoderSpec(
        "virchow2",
        "vit_huge_patch14_224",
        "paige-ai/Virchow2",
        dim=2560,
        licence="CC-BY-NC-ND-4.0",
        pooling="token+mean",
        gated=True,
        timm_args={
            "mlp_ratio": 5.3375,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "silu",
            "init_values": 1e-5,
            "reg_tokens": 4,
        },
    ),
    EncoderSpec(
        "h-optimus-0",
        "vit_giant_patch14_reg4_dinov2",
        "bioptimus/H-optimus-0",
        dim=1536,
        licence="Apache-2.0",
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
        gated=True,
        timm_args={"img_size": 224, "init_values": 1e-5},
    ),
    EncoderSpec(
        "gigapath",
        "vit_giant_patch14_dinov2",
        "prov-gigapath/prov-gigapath",
        dim=1536,
        licence="Apache-2.0, research use",
        tile_px=256,
        crop_px=224,
        gated=True,
        timm_args={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334, "init_values": 1e-5},
    ),
    EncoderSpec(
        "lunit-vits8",
        "vit_small_patch8_224",
        "1aurent/vit_small_patch8_224.lunit_dino",
        dim=384,
        licence="Lunit non-commercial",
        mean=(0.70322989, 0.53606487, 0.66096631),
        std=(0.21716536, 0.26081574, 0.20723464),
    ),
    EncoderSpec(
        "resnet50",
        "resnet50",
        "timm/resnet50.tv_in1k",
        dim=2048,
        licence="BSD-3-Clause",
        pooling="avg",
        drop=("fc.",),
    ),
)
ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in _SPECS}


# --- looking up ----------------------------------------------------------------------------------------------------


def encoder_names() -> list[str]:
    """Names of the table; `timm:NAME` is valid besides."""
    return list(ENCODERS)


def encoder_problems(section: Encoder) -> list[str]:
    """What is wrong with the config section, as far as can be seen without importing torch or timm."""
    problems = []
    is_timm = section.name.startswith(TIMM)
    if not is_timm and section.name not in ENCODERS:
        problems.append(_unknown_name(section.name))
    if section.random_weights and not is_timm:
        problems.append(f"encoder.random_weights=true: only for timm:NAME, got encoder.name={section.name}")
    if section.random_weights and section.weights is not None:
        problems.append("encoder.random_weights=true and encoder.weights are both set; give one of them")
    if section.weights is not None and not section.weights.expanduser().is_file():
        problems.append(f"encoder.weights={section.weights}: no such file")
    if section.adapter is not None:
        problems += adapter_problems(section.adapter, section.name)
    return problems


def encoder_spec(name: str) -> EncoderSpec:
    """The spec of `name`: an entry of `ENCODERS`, or made from timm's own config for `timm:NAME`.

    Raises:
        EncoderError: no such encoder; the message has the nearest valid name.
    """
    if name.startswith(TIMM):
        return _timm_spec(name.removeprefix(TIMM))
    if name not in ENCODERS:
        raise EncoderError(_unknown_name(name))
    return ENCODERS[name]


def _unknown_name(name: str) -> str:
    return (
        f"encoder.name={name}: expected one of {', '.join(ENCODERS)}, or {TIMM}NAME{did_you_mean(name, list(ENCODERS))}"
    )


@cache
def _timm_spec(timm_name: str) -> EncoderSpec:
    """Tile size, mean and std are timm's; mpp is 0.5 as ImageNet models have none; the width comes from a dry run."""
    import timm
    import torch

    _check_timm_name(timm_name)
    config = timm.get_pretrained_cfg(timm_name)
    if config is None:
        raise EncoderError(f"{TIMM}{timm_name}: timm says neither tile size nor normalisation; use another model")
    channels, height_px, width_px = config.input_size
    if channels != 3 or height_px != width_px:
        raise EncoderError(
            f"{TIMM}{timm_name}: expected a model for square RGB tiles, its input is {config.input_size}"
        )
    with torch.device("meta"):
        network = timm.create_model(timm_name, pretrained=False, num_classes=0).eval()
        features_ND = network(torch.empty(1, 3, height_px, width_px))
    if features_ND.ndim != 2:
        raise EncoderError(
            f"{TIMM}{timm_name}: expected one feature vector a tile, its output is {tuple(features_ND.shape)}"
        )
    classifiers = [config.classifier] if isinstance(config.classifier, str) else list(config.classifier or ())
    return EncoderSpec(
        name=TIMM + timm_name,
        architecture=timm_name,
        hub_repo=config.hf_hub_id or "",
        dim=features_ND.shape[1],
        licence=config.license or "unknown",
        tile_px=height_px,
        mean=cast(Rgb, tuple(config.mean)),
        std=cast(Rgb, tuple(config.std)),
        pooling="model",
        hub_files=(config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin"),
        drop=(*(f"{name}." for name in classifiers), "mask_token", "masked_embed"),
    )


def _check_timm_name(timm_name: str) -> None:
    import timm

    architecture, _, tag = timm_name.partition(".")
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models())
        raise EncoderError(f"encoder.name={TIMM}{timm_name}: timm {timm.__version__} has no such model{near}")
    if tag and timm_name not in timm.list_pretrained():
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        raise EncoderError(
            f"encoder.name={TIMM}{timm_name}: timm {timm.__version__} has weights {', '.join(tags) or 'none'} "
            f"for {architecture}, not {tag!r}{did_you_mean(tag, tags)}"
        )


# --- loading -------------------------------------------------------------------------------------------------------


def load_encoder(section: Encoder) -> FrozenEncoder:
    """The encoder that the config asks for, with its weights, on its device, frozen.

    Raises:
        EncoderError: unknown name, no such device, weights that cannot be had, are unsafe or do not fit.
    """
    problems = encoder_problems(section)
    if problems:
        raise EncoderError("; ".join(problems))
    spec = encoder_spec(section.name)
    device = choose_device(section.device)
    dtype = choose_dtype(section.precision, device)
    revision = ""
    if section.random_weights:
        network = random_network(spec)
        source = f"random weights, seed {RANDOM_SEED}"
        weights_sha256 = sha256_of_tensors(network.state_dict())
    else:
        if section.weights is not None:
            path = section.weights.expanduser()
            source = str(path)
        else:
            path, revision = fetch_from_hub(spec, section.revision)
            source = f"{spec.hub_repo}@{revision}/{path.name}"
        network = network_with_weights(spec, read_state_dict(path), source)
        weights_sha256 = sha256_of_file(path)
    if section.adapter is not None:
        try:
            network = merge_adapter(network, section.adapter, sha256_of_tensors(network.state_dict()))
        except AdapterError as error:
            raise EncoderError(f"encoder.adapter={section.adapter}: {error}") from None
        source += f" + adapter {section.adapter}"
        weights_sha256 = merged_sha256(weights_sha256, section.adapter)
    return FrozenEncoder(
        spec, network, source, weights_sha256, revision, device=device, dtype=dtype, compiled=section.compile
    )


def build_network(spec: EncoderSpec) -> torch.nn.Module:
    """The network of `spec` without its classifier, with random weights from torch's current random state."""
    import timm

    arguments = dict(spec.timm_args)
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    if spec.pooling != "model":
        arguments["global_pool"] = "" if spec.pooling == "token+mean" else spec.pooling
    return timm.create_model(spec.architecture, pretrained=False, num_classes=0, **arguments)


def random_network(spec: EncoderSpec) -> torch.nn.Module:
    """`build_network` from a fixed seed: the same weights in every process, torch's random state untouched."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return build_network(spec)


def network_with_weights(spec: EncoderSpec, state_dict: Mapping[str, Any], source: str) -> torch.nn.Module:
    """The network of `spec` with the weights of `state_dict`, in whatever layout `to_timm_names` knows.

    Raises:
        EncoderError: weights are missing, left over or of another shape.
    """
    try:
        tensors = to_timm_names(state_dict, spec)
    except EncoderError as error:
        raise EncoderError(f"{source}: {error}") from None
    network = _network_to_fill(spec)
    check_weights(network.state_dict(), tensors, spec, source)
    # assign: the network may be on the meta device; float: files may hold half precision
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, assign=True)
    return network


def _network_to_fill(spec: EncoderSpec) -> torch.nn.Module:
    """A network on the meta device: a billion weights need not be drawn at random (and held) to be replaced."""
    import torch

    with torch.device("meta"):
        network = build_network(spec)
    in_files = network.state_dict().keys()
    if all(name in in_files for name, _ in network.named_buffers()):
        return network
    return build_network(spec)  # its non-persistent buffers hold values that no file brings


def check_weights(
    expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor], spec: EncoderSpec, source: str
) -> None:
    """Raise EncoderError unless names and shapes agree."""
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    wrong = [
        f"{name} expected {tuple(expected[name].shape)}, got {tuple(got[name].shape)}"
        for name in expected
        if name in got and expected[name].shape != got[name].shape
    ]
    faults = [
        f"{len(names)} {kind}: {_first_few(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        if names
    ]
    if faults:
        raise EncoderError(
            f"{source}: weights do not fit encoder {spec.name!r} ({spec.architecture}, {len(expected)} weights): "
            f"{'; '.join(faults)}. Set encoder.name to the encoder that this file was made for, or give another file"
        )


def _first_few(names: Sequence[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


# --- weight files --------------------------------------------------------------------------------------------------


# How files of torch.save begin: as a zip, or (before torch 1.6) with a pickled magic number
TORCH_FILE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")

# What reading a damaged file raises; Python's documentation of UnpicklingError says that it may be much else
DAMAGED = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError, struct.error),
)


def read_state_dict(path: Path) -> Mapping[str, Any]:
    """The content of a weights file: `.safetensors`, else a torch file (.bin, .pth, .pt) read with weights_only.

    Raises:
        EncoderError: damaged, or a pickle that would have to run code.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with open(path, "rb") as file:
            if not file.read(32).startswith(TORCH_FILE_STARTS):
                raise RuntimeError("it does not begin like a file of torch.save")
        # iBOT and DINO checkpoints keep their command line as a Namespace, which holds attributes and runs nothing
        torch.serialization.add_safe_globals([argparse.Namespace])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # read all the same, or refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path}: refused. It holds more than plain weights, and reading it could run code that it brings. "
            f"Convert it to safetensors where you trust it ({_first_sentence(error)})"
        ) from None
    except (SafetensorError, *DAMAGED) as error:
        raise EncoderError(
            f"{path}: cannot be read as weights, perhaps an interrupted download, a git-lfs pointer or another format; "
            f"expected safetensors or a torch file, fetch it again ({_first_sentence(error)})"
        ) from None
    if not isinstance(content, Mapping):
        raise EncoderError(f"{path}: expected a dictionary of weights, got a {type(content).__name__}")
    return content


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def to_timm_names(state_dict: Mapping[str, Any], spec: EncoderSpec) -> dict[str, torch.Tensor]:
    """Weights under timm's names, from a file in any of these layouts, which are told apart by their names:

    - timm's own;
    - Hugging Face transformers, ViT or DINOv2, with or without the `vit.` or `dinov2.` prefix;
    - iBOT, DINO or DINOv2 training checkpoints: the teacher's backbone.

    Unneeded weights (`spec.drop`, pooler, projection heads, mask token) are left out. Names that are not understood
    are kept, so that `check_weights` reports them.

    Raises:
        EncoderError: not name -> tensor, or a transformers layer without all of query, key and value.
    """
    tensors = _without_wrapping(state_dict, spec)
    if any(name.startswith("embeddings.patch_embeddings.") for name in tensors):
        tensors = _from_transformers(tensors, spec)
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
            f"'model', got {_first_few(not_tensors) or 'nothing'}"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if any(name.startswith("backbone.") for name in tensors):
        heads = ("head.", "dino_head.", "ibot_head.")
        tensors = {k.removeprefix("backbone."): v for k, v in tensors.items() if not k.startswith(heads)}
    return {name.removeprefix("vit.").removeprefix("dinov2."): tensor for name, tensor in tensors.items()}


_TRANSFORMERS_EXTRAS = ("pooler.", "classifier.", "embeddings.mask_token")
_TRANSFORMERS_STEM = {
    "embeddings.cls_token": "cls_token",
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


def _rename_in_block(name: str) -> str:
    if name in _TRANSFORMERS_BLOCK:
        return _TRANSFORMERS_BLOCK[name]
    module, _, leaf = name.rpartition(".")
    return f"{_TRANSFORMERS_BLOCK.get(module, module)}.{leaf}"


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and values, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the hub -------------------------------------------------------------------------------------------------------


def fetch_from_hub(spec: EncoderSpec, revision: str | None = None) -> tuple[Path, str]:
    """The weights file of `spec` from the Hugging Face hub or its local cache, and the commit it is of.

    A short probe goes first, because `hf_hub_download` retries for minutes when there is no network.

    Raises:
        EncoderError: what to download, where to put it and which option to set.
    """
    from huggingface_hub.utils import HfHubHTTPError

    if not spec.hub_repo:
        raise EncoderError(
            f"{spec.name}: timm publishes no weights for it. Set encoder.weights=FILE, choose a tagged name "
            "(timm:NAME.TAG), or encoder.random_weights=true for a test"
        )
    try:
        return _from_hub(spec, revision)
    # HfHubHTTPError's bases hold the root of the hub's HTTP library, whichever its version uses: requests or httpx
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        cached = _from_hub_cache(spec, revision)
        if cached is None:
            raise EncoderError(_how_to_get(spec, revision, error)) from None
        return cached


def _from_hub(spec: EncoderSpec, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import EntryNotFoundError

    for file_name in spec.hub_files:
        try:
            get_hf_file_metadata(hf_hub_url(spec.hub_repo, file_name, revision=revision), timeout=HUB_TIMEOUT_S)
        except EntryNotFoundError:
            continue
        path = Path(hf_hub_download(spec.hub_repo, file_name, revision=revision))
        return path, path.parent.name  # .../snapshots/<commit>/<file>
    raise FileNotFoundError(f"none of {', '.join(spec.hub_files)} is there")


def _from_hub_cache(spec: EncoderSpec, revision: str | None) -> tuple[Path, str] | None:
    from huggingface_hub import try_to_load_from_cache

    for file_name in spec.hub_files:
        found = try_to_load_from_cache(spec.hub_repo, file_name, revision=revision)
        if isinstance(found, str):
            return Path(found), Path(found).parent.name
    return None


def _how_to_get(spec: EncoderSpec, revision: str | None, error: BaseException) -> str:
    from huggingface_hub.utils import RevisionNotFoundError

    page = f"https://huggingface.co/{spec.hub_repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"encoder.revision={revision}: {spec.hub_repo} has no such revision; see {page}/commits/main"
    at = f" at revision {revision}" if revision else ""
    gate = (
        f"It is gated: accept its licence ({spec.licence}) on that page with your account, then set HF_TOKEN or run "
        "`hf auth login`. "
        if spec.gated
        else ""
    )
    return (
        f"encoder {spec.name!r}: no weights in the local hub cache, and {spec.hub_repo} could not be reached or read. "
        f"{gate}Either connect and run again, or download {' or '.join(spec.hub_files)} from {page}{at} on another "
        f"machine, put it anywhere here and set encoder.weights=/path/to/{spec.hub_files[0]} "
        f"({type(error).__name__}: {_first_sentence(error)})"
    )


# --- encoding ------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA GPU, else Apple's, else the CPU.

    Raises:
        EncoderError: not a device, or not on this machine.
    """
    import torch

    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
    if name == "auto":
        return torch.device(gpu or "cpu")
    known = ["auto", "cpu", "cuda", "mps"]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EncoderError(
            f"encoder.device={name}: expected {', '.join(known)} or cuda:NUMBER{did_you_mean(name, known)}"
        ) from None
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {"cpu": True, "cuda": (device.index or 0) < n_cuda, "mps": torch.backends.mps.is_available()}
    if not here.get(device.type, False):
        raise EncoderError(f"encoder.device={name}: not on this machine ({n_cuda} CUDA GPUs); use auto or cpu")
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, None for float32. `auto`: bf16 on a CUDA GPU that has it, fp16 on older ones, else float32.

    Raises:
        EncoderError: fp16 on a CPU, which is slower than float32 there.
    """
    import torch

    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise EncoderError("encoder.precision=fp16: expected a GPU, the device is the CPU; use float32 or bf16")
    return {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class FrozenEncoder:
    """A network that never changes: eval mode, no gradients, the same features for a tile in whatever batch.

    `id` goes into the cache's provenance beside `weights_sha256` (of the weights file's bytes, or of the tensors when
    they are random). `source` is for people: a file, or repository@commit/file. `revision` is the hub commit or "".
    """

    def __init__(
        self,
        spec: EncoderSpec,
        network: torch.nn.Module,
        source: str,
        weights_sha256: str,
        revision: str = "",
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ):
        import torch

        self.spec, self.source, self.weights_sha256, self.revision = spec, source, weights_sha256, revision
        self.device, self.dtype = device, dtype
        network = network.eval().requires_grad_(False)
        self.network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._n_prefix_tokens = getattr(network, "num_prefix_tokens", 0)
        self._forward = torch.compile(self.network) if compiled else self.network
        # one row of pixels long: with three values torch's inner loop is three steps, and the whole twice as slow
        self._mean_row = torch.tensor(spec.mean, device=device).mul_(255).repeat(spec.input_px)
        self._std_row = torch.tensor(spec.std, device=device).mul_(255).repeat(spec.input_px)
        self._floats_NHW3 = torch.empty(0)

    @property
    def id(self) -> str:
        return self.spec.name

    def encode(self, tiles_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Features of a batch of tiles. Not from several threads at once: memory is kept from batch to batch.

        Args:
            tiles_NHW3: uint8 RGB, `spec.tile_px` square at `spec.mpp` microns per pixel. It travels to the device as it
                is and is normalised there.

        Returns:
            features_ND: float32 on the CPU.

        Raises:
            ValueError: another shape or type.
        """
        import torch

        side_px = self.spec.tile_px
        if tuple(tiles_NHW3.shape[1:]) != (side_px, side_px, 3) or str(tiles_NHW3.dtype).split(".")[-1] != "uint8":
            raise ValueError(
                f"encoder {self.id!r}: expected uint8 tiles (N, {side_px}, {side_px}, 3), "
                f"got {tiles_NHW3.dtype} {tuple(tiles_NHW3.shape)}"
            )
        if not isinstance(tiles_NHW3, torch.Tensor):
            # torch warns about arrays that it must not write to
            tiles_NHW3 = torch.from_numpy(tiles_NHW3 if tiles_NHW3.flags.writeable else tiles_NHW3.copy())
        if len(tiles_NHW3) == 0:
            return torch.empty(0, self.spec.dim)
        autocast = nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
        with torch.inference_mode():
            tiles_NHW3 = tiles_NHW3.to(self.device, non_blocking=True)
            inputs_N3HW = self.prepare(tiles_NHW3, self._room(len(tiles_NHW3)))
            with autocast:
                features_ND = self.pool(self._forward(inputs_N3HW))
            features_ND = features_ND.float().cpu()
        if features_ND.shape != (len(tiles_NHW3), self.spec.dim):
            raise ValueError(
                f"encoder {self.id!r}: expected features ({len(tiles_NHW3)}, {self.spec.dim}), "
                f"the network made {tuple(features_ND.shape)}"
            )
        return features_ND.clone()  # outside inference_mode: an ordinary tensor

    def _room(self, n_tiles: int) -> torch.Tensor | None:
        """float32 memory for a batch on a CPU, where the first touch of fresh pages costs more than the arithmetic."""
        import torch

        if self.device.type != "cpu":
            return None
        if len(self._floats_NHW3) < n_tiles:
            self._floats_NHW3 = torch.empty(n_tiles, self.spec.tile_px, self.spec.tile_px, 3)
        return self._floats_NHW3[:n_tiles]

    def prepare(self, tiles_NHW3: torch.Tensor, into_NHW3: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 tiles on the device -> float32 input (N, 3, input_px, input_px), resized, cropped and normalised.

        With `into_NHW3` (float32, shape of the tiles) the result may lie in that memory.
        """
        from torch.nn.functional import interpolate

        spec = self.spec
        floats_NHW3 = tiles_NHW3.float() if into_NHW3 is None else into_NHW3.copy_(tiles_NHW3)
        inputs_N3HW = floats_NHW3.permute(0, 3, 1, 2)  # stays channels_last in memory
        if spec.resize_px and spec.resize_px != spec.tile_px:
            size = (spec.resize_px, spec.resize_px)
            inputs_N3HW = interpolate(inputs_N3HW, size, mode="bilinear", antialias=True, align_corners=False)
        if spec.crop_px:
            start = (inputs_N3HW.shape[-1] - spec.crop_px) // 2
            inputs_N3HW = inputs_N3HW[..., start : start + spec.crop_px, start : start + spec.crop_px]
        inputs_NHW3 = inputs_N3HW.permute(0, 2, 3, 1).contiguous()
        inputs_NHW3.flatten(2).sub_(self._mean_row).div_(self._std_row)
        return inputs_NHW3.permute(0, 3, 1, 2)

    def pool(self, output: torch.Tensor) -> torch.Tensor:
        """The network's output -> features_ND; for "token+mean" the output is tokens_NTD, CLS first, registers next."""
        import torch

        if self.spec.pooling != "token+mean":
            return output
        tokens_NTD = output.float()  # 16 bits are too few to sum hundreds of tokens
        return torch.cat([tokens_NTD[:, 0], tokens_NTD[:, self._n_prefix_tokens :].mean(1)], dim=1)
