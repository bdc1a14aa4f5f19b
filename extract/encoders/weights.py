"""Weights into a network: build it, read a file safely, check that everything fits, hashes.

Weights are read from safetensors or with `weights_only=True`; nothing is ever unpickled freely.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.encoders.keymaps import first_few, to_timm_names
from extract.encoders.table import RANDOM_SEED, EncoderError, EncoderSpec
from extract.features.errors import DAMAGED

if TYPE_CHECKING:
    import torch


def build_network(spec: EncoderSpec) -> torch.nn.Module:
    """The network of `spec` without its classifier, with random weights from torch's current random state."""
    import timm

    from extract.encoders.networks import LAYERS, NETWORKS, layer_norm

    if spec.architecture in NETWORKS:
        return NETWORKS[spec.architecture](**spec.timm_args)
    arguments = dict(spec.timm_args)
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    if "embed_layer" in arguments:
        arguments["embed_layer"] = LAYERS[arguments["embed_layer"]]
    if "norm_eps" in arguments:
        arguments["norm_layer"] = layer_norm(arguments.pop("norm_eps"))
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
    if spec.positions and "pos_embed" in tensors:
        n_prefix = 0 if "reg_token" in tensors else 1
        tensors["pos_embed"] = resampled_positions(
            tensors["pos_embed"], network.get_parameter("pos_embed").shape[1], n_prefix, spec.positions
        )
    check_weights(network.state_dict(), tensors, spec, source)
    # assign: the network may be on the meta device; float: files may hold half precision
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, assign=True)
    return network


def resampled_positions(positions_1PD: torch.Tensor, n_wanted: int, n_prefix: int, how: str) -> torch.Tensor:
    """Position embeddings of a square grid, and of `n_prefix` tokens before it, for a grid of another size.

    Bicubic as transformers does it where a model runs at another size than it was built for: not antialiased in ViT
    and DINOv2, antialiased in DINOv2 with registers.
    """
    import torch
    from torch.nn.functional import interpolate

    prefix_1KD, grid_1PD = positions_1PD[:, :n_prefix], positions_1PD[:, n_prefix:]
    old, new = math.isqrt(grid_1PD.shape[1]), math.isqrt(n_wanted - n_prefix)
    if old == new or old**2 != grid_1PD.shape[1] or new**2 != n_wanted - n_prefix:
        return positions_1PD  # fits, or is for check_weights to report
    grid_1DHW = grid_1PD.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    antialias = how == "bicubic, antialiased"
    grid_1DHW = interpolate(grid_1DHW, (new, new), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([prefix_1KD.float(), grid_1DHW.flatten(2).transpose(1, 2)], dim=1)


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
        f"{len(names)} {kind}: {first_few(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        if names
    ]
    if faults:
        raise EncoderError(
            f"{source}: weights do not fit encoder {spec.name!r} ({spec.architecture}, {len(expected)} weights): "
            f"{'; '.join(faults)}. Set encoder.name to the encoder that this file was made for, or give another file"
        )


# How files of torch.save begin: as a zip, or (before torch 1.6) with a pickled magic number
TORCH_FILE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")


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
            f"Convert it to safetensors where you trust it ({first_sentence(error)})"
        ) from None
    except (SafetensorError, *DAMAGED) as error:
        raise EncoderError(
            f"{path}: cannot be read as weights, perhaps an interrupted download, a git-lfs pointer or another format; "
            f"expected safetensors or a torch file, fetch it again ({first_sentence(error)})"
        ) from None
    if not isinstance(content, Mapping):
        raise EncoderError(f"{path}: expected a dictionary of weights, got a {type(content).__name__}")
    return content


def first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def sha256_of_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and values, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
