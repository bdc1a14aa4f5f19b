"""LoRA through peft: put it on an encoder's attention, save it as peft's adapter folder, merge it for extraction.

timm computes query, key and value with one layer `qkv`, rows in this order. With rank r, one pair A (r, D) and
B (3D, r) changes all three: they share A, each has its own rows of B. This is as many weights as separate pairs for
query and value have (4 D r). `targets="qv"` keeps the rows of B that belong to the key at zero, where B starts, by
zeroing their gradient: the adapter remains an ordinary one that peft can load, and the key weights never change.

Letters: D feature width of the network, r rank.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from extract.config import Section
from extract.whole import folder_on_success

if TYPE_CHECKING:
    import torch


CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_encoder.json"
"""peft's two files, and ours: which encoder, with which weights, the adapter was made on."""
TARGET = "qkv"


class Lora(Section):
    """The low-rank change of the attention's weights (Hu et al. 2021)."""

    rank: int = Field(16, ge=1, description="rank of the change")
    alpha: int = Field(16, ge=1, description="the change is scaled by alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the change's input, while training")
    targets: Literal["qkv", "qv"] = Field("qkv", description="query, key and value, or query and value only")


class AdapterError(Exception):
    """An adapter is missing, damaged or made for another encoder. The message says what to do."""


# --- training ------------------------------------------------------------------------------------------------------


def add_lora(network: torch.nn.Module, lora: Lora, seed: int) -> Any:
    """Put LoRA on every `qkv` layer of `network`, in place; everything else is frozen.

    B starts at zero, so the network computes exactly what it did before. A is drawn from `seed`; torch's random state
    is untouched.

    Returns:
        peft's model, for `save_adapter`. `network` itself is what to run.

    Raises:
        ValueError: the network has no `qkv` layers.
    """
    import peft
    import torch

    if not attention_layers(network):
        raise ValueError(f"{type(network).__name__} has no layer {TARGET!r}")
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=[TARGET], bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(network, config)
    network.eval()
    if lora.targets == "qv":
        for layer in lora_layers(network):
            up = layer.lora_B["default"].weight
            up.register_hook(_without_key(up.shape[0] // 3))
    return model


def attention_layers(network: torch.nn.Module) -> list[str]:
    """Names of timm's `qkv` layers: none in a convolutional network."""
    return [name for name, _ in network.named_modules() if name.rpartition(".")[2] == TARGET]


def lora_layers(network: torch.nn.Module) -> list[Any]:
    """peft's wrapped `qkv` layers."""
    return [module for module in network.modules() if hasattr(module, "lora_A")]


def _without_key(width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook for B (3D, r) that zeroes the middle D rows."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[width : 2 * width] = 0
        return gradient

    return hook


def train_dropout(network: torch.nn.Module, on: bool) -> None:
    """Switch LoRA's dropout and nothing else: the frozen network stays in evaluation mode."""
    for layer in lora_layers(network):
        layer.lora_dropout.train(on)


def n_trainable(network: torch.nn.Module, targets: str) -> int:
    """How many weights learn. Rows of B that are held at zero (targets="qv") do not count."""
    n = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if targets == "qv":
        n -= sum(layer.lora_B["default"].weight.numel() // 3 for layer in lora_layers(network))
    return n


def save_adapter(model: Any, folder: Path, encoder: str, base_sha256: str) -> None:
    """Write peft's adapter folder and `base_encoder.json` into it; the folder is there when it is whole.

    Args:
        model: what `add_lora` returned.
        encoder: name of the encoder, as in encoder.name.
        base_sha256: `sha256_of_tensors` of the network before LoRA, which is the same for every file layout.
    """
    model.peft_config["default"].base_model_name_or_path = encoder
    base = {"encoder": encoder, "base_sha256": base_sha256}
    with folder_on_success(folder) as temporary:
        # not "auto": peft would ask the hub whether a vocabulary has changed
        model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # a template of peft's with nothing filled in
        (temporary / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


# --- extraction ----------------------------------------------------------------------------------------------------


def adapter_problems(folder: Path, encoder: str) -> list[str]:
    """What is wrong with encoder.adapter=`folder` for encoder.name=`encoder`, without importing torch."""
    where = f"encoder.adapter={folder}"
    folder = folder.expanduser()
    absent = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if absent:
        inside = folder / "adapter"
        hint = f"; did you mean {inside}?" if (inside / CONFIG).is_file() else ""
        return [f"{where}: expected a folder with {CONFIG} and {WEIGHTS}, it has no {' and no '.join(absent)}{hint}"]
    try:
        made_for = read_base(folder)["encoder"]
    except AdapterError as error:
        return [f"{where}: {error}"]
    if made_for == encoder:
        return []
    return [
        f"{where}: made for encoder {made_for!r}, got encoder.name={encoder}. "
        f"Set encoder.name={made_for}, or give an adapter for {encoder}"
    ]


def read_base(folder: Path) -> dict[str, str]:
    """`encoder` and `base_sha256` of the encoder that the adapter was made on.

    Raises:
        AdapterError: the file is absent or damaged.
    """
    path = folder / BASE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(content[key]) for key in ("encoder", "base_sha256")}
    except FileNotFoundError:
        raise AdapterError(
            f"no {BASE} in it, so its base encoder is unknown; expected an adapter of extract.finetune"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None


def merge_adapter(network: torch.nn.Module, folder: Path, base_sha256: str) -> torch.nn.Module:
    """`network` with the adapter added to its weights: W + alpha / r * B A. As fast as before.

    Args:
        base_sha256: `sha256_of_tensors` of `network`.

    Raises:
        AdapterError: other base weights, or files that are damaged or do not fit.
    """
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = folder.expanduser()
    made_on = read_base(folder)
    if made_on["base_sha256"] != base_sha256:
        raise AdapterError(
            f"made on other weights of {made_on['encoder']!r} (sha256 {made_on['base_sha256'][:12]}..., these are "
            f"{base_sha256[:12]}...). Give the encoder.weights or encoder.revision that fine-tuning started from"
        )
    try:
        saved = load_file(folder / WEIGHTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights, which are looked for below
            model = peft.PeftModel.from_pretrained(network, folder, torch_device="cpu")
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]})") from None
    expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    _refuse_misfit(sorted(expected - set(saved)), sorted(set(saved) - expected))
    merged: torch.nn.Module = model.merge_and_unload().eval()
    return merged


def _refuse_misfit(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    kinds = {"missing": missing, "unknown": unexpected}
    faults = [f"{len(names)} weights {kind}" for kind, names in kinds.items() if names]
    if faults:
        raise AdapterError(f"{WEIGHTS}: {', '.join(faults)}, such as {[*missing, *unexpected][0]}")


def merged_sha256(base_sha256: str, folder: Path) -> str:
    """Names the merged weights in a cache. Of the files, not of the sums, whose last bits differ between machines."""
    digest = hashlib.sha256(base_sha256.encode())
    for name in (CONFIG, WEIGHTS):
        digest.update((folder.expanduser() / name).read_bytes())
    return digest.hexdigest()
