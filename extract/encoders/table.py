"""The frozen networks that turn tiles into features: one table, one way to load weights, one `encode`.

Importing this module is light (no torch, no timm): config errors consult `encoder_names`. To add an encoder, add one
entry to `ENCODERS`. Weights are read from safetensors or with `weights_only=True`; nothing is ever unpickled freely.

Axes: N tiles, H and W tile_px rows and columns, 3 RGB, D feature width, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

from extract.config import Encoder, did_you_mean
from extract.encoders.lora import adapter_problems

TIMM = "timm:"
HUGGING_FACE = "hf:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""How one's own network is named: module:function, see extract.encoders.own."""

RANDOM_SEED = 0

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
H_OPTIMUS_MEAN, H_OPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU_MEAN, HIBOU_STD = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)

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

    `pretrained_on` is what its authors say that its weights have seen; `saw_tcga` whether slides of TCGA are in it,
    None where they do not say.

    `drop` lists beginnings of weight names that a file may hold and features do not need (a classifier, say). `part` is
    the beginning of the names of the part that makes features, where a file holds more (text, say).

    `positions`: how position embeddings of another grid than the network's are resampled; "": they must fit.

    `elsewhere`: where people get the weights, if not from the hub.
    """

    name: str
    architecture: str
    hub_repo: str
    dim: int
    licence: str
    pretrained_on: str = "not stated by its authors"
    saw_tcga: bool | None = None
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
    part: str = ""
    positions: Literal["", "bicubic", "bicubic, antialiased"] = ""
    elsewhere: str = ""

    @property
    def input_px(self) -> int:
        """Side of the square that the network sees, in pixels."""
        return self.crop_px or self.resize_px or self.tile_px


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}


def _kaiko(size: str, architecture: str, dim: int, **more: Any) -> EncoderSpec:
    """Facts: kaiko-ai/towards_large_pathology_fms (hubconf, README, LICENSE), eva, TRIDENT."""
    return EncoderSpec(
        f"kaiko-{size}",
        architecture,
        f"1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms",
        dim=dim,
        licence="Kaiko non-commercial",
        pretrained_on="29,000 TCGA slides, at several magnifications (kaiko.ai et al. 2024)",
        saw_tcga=True,
        mean=HALF,
        std=HALF,
        **more,
    )


# Arguments, normalisation and pooling are those of the model cards on the hub (huggingface.co/<hub_repo>) and their
# config.json; LayerNorm eps is 1e-6 where nothing else is said, which is timm's default. Tests count the parameters.
# Facts of encoders with names beside them are those on which at least two public users of the weights agree: these.
_SPECS = (
    EncoderSpec(
        "phikon",
        "vit_base_patch16_224",
        "owkin/phikon",
        dim=768,
        licence="Owkin non-commercial",
        pretrained_on="40 million tiles of 6,093 TCGA slides of 16 cancers (Filiot et al. 2023)",
        saw_tcga=True,
    ),
    EncoderSpec(  # TRIDENT, AtlasPatch, mussel
        "phikon-v2",
        "vit_large_patch16_224",
        "owkin/phikon-v2",
        dim=1024,
        licence="Owkin non-commercial",
        pretrained_on="PANCAN-XL: 29,502 TCGA slides, CPTAC, GTEx and other public cohorts (its model card)",
        saw_tcga=True,
        timm_args={"init_values": 1.0},
    ),
    EncoderSpec(
        "uni",
        "vit_large_patch16_224",
        "MahmoodLab/UNI",
        dim=1024,
        licence="CC-BY-NC-ND-4.0",
        pretrained_on="Mass-100K: slides of Massachusetts General and Brigham hospitals, and GTEx (Chen et al. 2024)",
        saw_tcga=False,
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
        pretrained_on="over 350,000 slides, H&E and IHC, of Mass General Brigham (its model card)",
        saw_tcga=False,
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
        pretrained_on="3.1 million slides, H&E and IHC, of Memorial Sloan Kettering (Zimmermann et al. 2024)",
        saw_tcga=False,
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
    EncoderSpec(  # TRIDENT, AtlasPatch, mussel: no register tokens, the mean is over all 256 patches
        "virchow",
        "vit_huge_patch14_224",
        "paige-ai/Virchow",
        dim=2560,
        licence="Apache-2.0",
        pretrained_on="1.5 million H&E slides of Memorial Sloan Kettering (Vorontsov et al. 2024)",
        saw_tcga=False,
        pooling="token+mean",
        gated=True,
        timm_args={"mlp_ratio": 5.3375, "mlp_layer": "SwiGLUPacked", "act_layer": "silu", "init_values": 1e-5},
    ),
    EncoderSpec(
        "h-optimus-0",
        "vit_giant_patch14_reg4_dinov2",
        "bioptimus/H-optimus-0",
        dim=1536,
        licence="Apache-2.0",
        pretrained_on="over 500,000 slides of a proprietary collection; which is not stated by its authors",
        saw_tcga=None,
        mean=H_OPTIMUS_MEAN,
        std=H_OPTIMUS_STD,
        gated=True,
        timm_args={"img_size": 224, "init_values": 1e-5},
    ),
    EncoderSpec(  # TRIDENT, AtlasPatch, slide2vec
        "h-optimus-1",
        "vit_giant_patch14_reg4_dinov2",
        "bioptimus/H-optimus-1",
        dim=1536,
        licence="CC-BY-NC-ND-4.0",
        pretrained_on="over a million slides of a proprietary collection; which is not stated by its authors",
        saw_tcga=None,
        mean=H_OPTIMUS_MEAN,
        std=H_OPTIMUS_STD,
        gated=True,
        timm_args={"img_size": 224, "init_values": 1e-5},
    ),
    EncoderSpec(  # TRIDENT, AtlasPatch, slide2vec
        "midnight",
        "vit_giant_patch14_dinov2",
        "kaiko-ai/midnight",
        dim=3072,
        licence="MIT",
        pretrained_on="12,000 TCGA slides (Karasikov et al. 2025)",
        saw_tcga=True,
        mean=HALF,
        std=HALF,
        pooling="token+mean",
        timm_args={"img_size": 224, "init_values": 1e-5},
    ),
    EncoderSpec(  # slide2vec, TRIDENT, lazyslide-models, eva
        "h0-mini",
        "vit_base_patch14_reg4_dinov2",
        "bioptimus/H0-mini",
        dim=1536,
        licence="CC-BY-NC-ND-4.0",
        pretrained_on="distilled from H-optimus-0 on 40 million TCGA tiles (Filiot et al. 2025)",
        saw_tcga=True,
        mean=H_OPTIMUS_MEAN,
        std=H_OPTIMUS_STD,
        pooling="token+mean",
        gated=True,
        timm_args={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, **_SWIGLU},
    ),
    EncoderSpec(  # slide2vec, lazyslide-models, eva
        "hibou-b",
        "vit_base_patch14_reg4_dinov2",
        "histai/hibou-b",
        dim=768,
        licence="Apache-2.0",
        pretrained_on="1.1 million proprietary slides, people and animals, not only H&E (Nechaev et al. 2024)",
        saw_tcga=None,
        mean=HIBOU_MEAN,
        std=HIBOU_STD,
        gated=True,
        timm_args={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, **_SWIGLU},
    ),
    EncoderSpec(  # slide2vec, lazyslide-models, eva, TRIDENT
        "hibou-l",
        "vit_large_patch14_reg4_dinov2",
        "histai/hibou-L",
        dim=1024,
        licence="Apache-2.0",
        pretrained_on="1.1 million proprietary slides, people and animals, not only H&E (Nechaev et al. 2024)",
        saw_tcga=None,
        mean=HIBOU_MEAN,
        std=HIBOU_STD,
        gated=True,
        timm_args={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.34375, **_SWIGLU},
    ),
    _kaiko("vits16", "vit_small_patch16_224", 384),
    _kaiko("vits8", "vit_small_patch8_224", 384),
    _kaiko("vitb16", "vit_base_patch16_224", 768),
    _kaiko("vitb8", "vit_base_patch8_224", 768),
    # built for 518 px and shown 224: timm resamples the position embeddings as it runs
    _kaiko("vitl14", "vit_large_patch14_reg4_dinov2", 1024, timm_args={"dynamic_img_size": True}),
    EncoderSpec(  # TRIDENT, STAMP: tiles 256 microns wide, shrunk to 224 px
        "ctranspath",
        "swin_tiny_patch4_window7_224",
        "",
        dim=768,
        licence="GPL-3.0",
        pretrained_on="15 million tiles of TCGA and PAIP slides (Wang et al. 2022)",
        saw_tcga=True,
        tile_px=256,
        mpp=1.0,
        resize_px=224,
        pooling="avg",
        timm_args={"embed_layer": "ConvStem"},
        drop=("head.",),
        elsewhere="ctranspath.pth of https://github.com/Xiyue-Wang/TransPath",
    ),
    EncoderSpec(  # TRIDENT, STAMP, slide2vec: the vision tower before its projection to the space of captions
        "conch",
        "conch_vision_tower",
        "MahmoodLab/CONCH",
        dim=512,
        licence="CC-BY-NC-ND-4.0",
        pretrained_on="1.17 million images with captions, none of TCGA, PAIP or GTEx (Lu et al. 2024)",
        saw_tcga=False,
        tile_px=512,
        resize_px=448,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        pooling="model",
        gated=True,
        hub_files=("pytorch_model.bin",),
        drop=("proj_contrast", "attn_pool_caption.", "ln_caption."),
        part="visual.",
    ),
    EncoderSpec(  # slide2vec, TRIDENT, lazyslide-models, eva; tiles of 128 microns as its authors prefer
        "gpfm",
        "vit_large_patch14_dinov2",
        "majiabo/GPFM",
        dim=1024,
        licence="CC-BY-NC-ND-4.0",
        pretrained_on="190 million tiles of 72,000 slides: TCGA, CPTAC, GTEx, other public cohorts (Ma et al. 2025)",
        saw_tcga=True,
        tile_px=256,
        resize_px=224,
        timm_args={"img_size": 224, "init_values": 1e-5},
        hub_files=("GPFM.pth",),
    ),
    EncoderSpec(
        "gigapath",
        "vit_giant_patch14_dinov2",
        "prov-gigapath/prov-gigapath",
        dim=1536,
        licence="Apache-2.0, research use",
        pretrained_on="171,189 slides of Providence, a network of US hospitals (Xu et al. 2024)",
        saw_tcga=False,
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
        pretrained_on="slides of TCGA, and of Lunit's own TULIP (Kang et al. 2023)",
        saw_tcga=True,
        mean=(0.70322989, 0.53606487, 0.66096631),
        std=(0.21716536, 0.26081574, 0.20723464),
    ),
    EncoderSpec(
        "resnet50",
        "resnet50",
        "timm/resnet50.tv_in1k",
        dim=2048,
        licence="BSD-3-Clause",
        pretrained_on="ImageNet-1k, no histology",
        saw_tcga=False,
        pooling="avg",
        drop=("fc.",),
    ),
)

ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in _SPECS}


def encoder_names() -> list[str]:
    """Names of the table; `timm:NAME` and `hf:OWNER/NAME` are valid besides."""
    return list(ENCODERS)


def seen_by(encoder: str) -> tuple[str | None, bool | None]:
    """What an encoder was pre-trained on and whether TCGA was in it; None: not known, as of encoders not in the table.

    encoder: as feature files name it; what follows a plus sign, such as an adapter, does not change what it has seen
    before.
    """
    spec = ENCODERS.get(encoder.partition("+")[0])
    return (spec.pretrained_on, spec.saw_tcga) if spec else (None, None)


def encoder_problems(section: Encoder) -> list[str]:
    """What is wrong with the config section, as far as can be seen without importing torch or timm."""
    problems = []
    is_timm = section.name.startswith(TIMM)
    is_own = is_own_network(section.name)
    if is_hugging_face(section.name):
        if not HUB_NAME.fullmatch(section.name.removeprefix(HUGGING_FACE)):
            problems.append(f"encoder.name={section.name}: expected hf:OWNER/NAME, as in huggingface.co/OWNER/NAME")
    elif not (is_timm or is_own) and section.name not in ENCODERS:
        problems.append(_unknown_name(section.name))
    if is_own and section.revision is not None:
        problems.append(f"encoder.revision: {section.name} brings its own weights; only the hub has revisions")
    if section.random_weights and not is_timm:
        problems.append(f"encoder.random_weights=true: only for timm:NAME, got encoder.name={section.name}")
    if section.random_weights and section.weights is not None:
        problems.append("encoder.random_weights=true and encoder.weights are both set; give one of them")
    if section.weights is not None and not section.weights.expanduser().is_file():
        problems.append(f"encoder.weights={section.weights}: no such file")
    if section.adapter is not None:
        problems += adapter_problems(section.adapter, section.name)
    return problems


def is_own_network(name: str) -> bool:
    """Whether the name is module:function."""
    return not name.startswith((TIMM, HUGGING_FACE)) and OWN.fullmatch(name) is not None


def is_hugging_face(name: str) -> bool:
    """Whether the name is hf:OWNER/NAME, see extract.encoders.transformers_checkpoint."""
    return name.startswith(HUGGING_FACE)


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
        f"encoder.name={name}: expected one of {', '.join(ENCODERS)}, {TIMM}NAME, "
        f"{HUGGING_FACE}OWNER/NAME, or module:function of one's own{did_you_mean(name, list(ENCODERS))}"
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
