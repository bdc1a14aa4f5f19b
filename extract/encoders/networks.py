"""Networks, or layers of them, that timm does not have.

Axes: N tiles, H and W rows and columns, C channels, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn


def layer_norm(eps: float) -> Callable[[int], nn.Module]:
    """LayerNorm with this epsilon, by its width."""
    return partial(nn.LayerNorm, eps=eps)


class ConvStem(nn.Module):
    """CTransPath's first layer in place of Swin's patches: two convolutions of stride 2, then a projection.

    (Wang et al. 2022, Transformer-based unsupervised contrastive learning for histopathological image classification.)
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, norm_layer: Any, **_: Any
    ):
        super().__init__()
        rows_px, columns_px = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = (rows_px // patch_size, columns_px // patch_size)
        widths = (in_chans, embed_dim // 8, embed_dim // 4)
        halving: list[nn.Module] = []
        for before, after in pairwise(widths):
            halving += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.proj = nn.Sequential(*halving, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, tiles_NCHW: torch.Tensor) -> torch.Tensor:
        """patches_NHWC, a quarter as many rows and columns."""
        patches_NHWC: torch.Tensor = self.norm(self.proj(tiles_NCHW).permute(0, 2, 3, 1))
        return patches_NHWC


class OneQueryPooling(nn.Module):
    """A learned query that attends to all tokens (CoCa's attentional pooling, Yu et al. 2022, section 3.2)."""

    def __init__(self, dim: int, token_dim: int, n_heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.attn = nn.MultiheadAttention(dim, n_heads, kdim=token_dim, vdim=token_dim, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(token_dim)

    def forward(self, tokens_NTC: torch.Tensor) -> torch.Tensor:
        """pooled_ND."""
        keys_NTC = self.ln_k(tokens_NTC)
        query_N1D = self.ln_q(self.query).expand(len(tokens_NTC), 1, -1)
        pooled_N1D: torch.Tensor = self.attn(query_N1D, keys_NTC, keys_NTC, need_weights=False)[0]
        return pooled_N1D[:, 0]


class ConchVisionTower(nn.Module):
    """CONCH's tiles -> features before the projection to the space of captions (Lu et al. 2024): ViT, one query, norm.

    The ViT's norms have timm's epsilon of 1e-6, the others torch's 1e-5.
    """

    def __init__(self, *, dim: int = 512, n_heads: int = 8, img_size: int = 448, **trunk: Any):
        super().__init__()
        import timm

        vit: Any = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="", img_size=img_size, **trunk)
        self.trunk = vit
        self.attn_pool_contrast = OneQueryPooling(dim, vit.num_features, n_heads)
        self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, tiles_NCHW: torch.Tensor) -> torch.Tensor:
        """features_ND."""
        features_ND: torch.Tensor = self.ln_contrast(self.attn_pool_contrast(self.trunk(tiles_NCHW)))
        return features_ND


NETWORKS: Mapping[str, Callable[..., nn.Module]] = {"conch_vision_tower": ConchVisionTower}
LAYERS: Mapping[str, type[nn.Module]] = {"ConvStem": ConvStem}
