"""The frozen network: from a config section to `encode(tiles) -> features`.

Axes: N tiles, H and W tile_px rows and columns, 3 RGB, D feature width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from extract.config import Encoder, did_you_mean
from extract.digest import sha256_of_file
from extract.encoders.hub import fetch_from_hub
from extract.encoders.lora import AdapterError, merge_adapter, merged_sha256
from extract.encoders.normalisation import refuse_others_normalisation
from extract.encoders.own import own_network
from extract.encoders.table import (
    RANDOM_SEED,
    EncoderError,
    EncoderSpec,
    encoder_problems,
    encoder_spec,
    is_hugging_face,
    is_own_network,
)
from extract.encoders.transformers_checkpoint import checkpoint_spec
from extract.encoders.weights import (
    network_with_weights,
    random_network,
    read_state_dict,
    sha256_of_tensors,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


def load_encoder(section: Encoder) -> FrozenEncoder:
    """The encoder that the config asks for, with its weights, on its device, frozen.

    Raises:
        EncoderError: unknown name, no such device, weights that cannot be had, are unsafe or do not fit.
    """
    problems = encoder_problems(section)
    if problems:
        raise EncoderError("; ".join(problems))
    own = own_network(section.name, section.weights) if is_own_network(section.name) else None
    spec = own[1] if own else spec_of(section)
    device = choose_device(section.device)
    dtype = choose_dtype(section.precision, device)
    revision = ""
    if own:
        network, source = own[0], section.name + (f" with {section.weights}" if section.weights else "")
        weights_sha256 = sha256_of_tensors(network.state_dict())
    elif section.random_weights:
        network = random_network(spec)
        source = f"random weights, seed {RANDOM_SEED}"
        weights_sha256 = sha256_of_tensors(network.state_dict())
    else:
        if section.weights is not None:
            path = section.weights.expanduser()
            refuse_others_normalisation(spec, path)
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


def spec_of(section: Encoder) -> EncoderSpec:
    """What the encoder is and wants to see, wherever that stands.

    Raises:
        EncoderError: no such encoder, or its facts cannot be had.
    """
    if is_own_network(section.name):
        return own_network(section.name, section.weights)[1]
    if is_hugging_face(section.name):
        return checkpoint_spec(section)
    return encoder_spec(section.name)


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
        self.network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self._n_prefix_tokens = getattr(network, "num_prefix_tokens", 0)
        self._forward = torch.compile(self.network) if compiled else self.network
        # one row of pixels long: with three values torch's inner loop is three steps, and the whole twice as slow
        self._mean_row = torch.tensor(spec.mean, device=device).mul_(255).repeat(spec.input_px)
        self._std_row = torch.tensor(spec.std, device=device).mul_(255).repeat(spec.input_px)
        self._floats_NHW3 = torch.empty(0)
        self._copies: torch.cuda.Stream | None = None

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
        return self.begin(tiles_NHW3)()

    def begin(self, tiles_NHW3: torch.Tensor | np.ndarray, *, compiled: bool = True) -> Callable[[], torch.Tensor]:
        """`encode` in two parts: what is returned waits for the features and gives them.

        On a CUDA GPU the tiles (in pinned memory) travel on a stream of their own and nothing waits here, so that the
        next batch can be begun while this one is computed; elsewhere all is done when this returns.
        compiled=False: the network as it is, also where it was compiled.
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
            nothing_0D = torch.empty(0, self.spec.dim)
            return lambda: nothing_0D
        forward = self._forward if compiled else self.network
        autocast = nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
        with torch.inference_mode():
            tiles_NHW3 = self._there(tiles_NHW3)
            inputs_N3HW = self.prepare(tiles_NHW3, self._room(len(tiles_NHW3)))
            with autocast:
                features_ND = self.pool(forward(inputs_N3HW))
            features_ND = features_ND.float()
        if features_ND.shape != (len(tiles_NHW3), self.spec.dim):
            raise ValueError(
                f"encoder {self.id!r}: expected features ({len(tiles_NHW3)}, {self.spec.dim}), "
                f"the network made {tuple(features_ND.shape)}"
            )
        if self.device.type != "cuda":
            here_ND = features_ND.cpu().clone()  # outside inference_mode: an ordinary tensor
            return lambda: here_ND
        pinned_ND = torch.empty(features_ND.shape, pin_memory=True)
        with torch.inference_mode():
            pinned_ND.copy_(features_ND, non_blocking=True)
        done = torch.cuda.current_stream(self.device).record_event()

        def wait() -> torch.Tensor:
            done.synchronize()
            return pinned_ND.clone()

        return wait

    def _there(self, tiles_NHW3: torch.Tensor) -> torch.Tensor:
        """The tiles on the device, uint8; on a GPU copied while it computes."""
        import torch

        if self.device.type != "cuda":
            return tiles_NHW3.to(self.device)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._copies):
            there_NHW3 = tiles_NHW3.to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        there_NHW3.record_stream(now)
        return there_NHW3

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
