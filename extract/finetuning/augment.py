"""Stain-robust augmentation of a batch of tiles, on whatever device they are: flips, quarter turns, jitter in HED.

The jitter is that of Tellez et al. 2018 (IEEE TMI 37(9)): light is absorbed by haematoxylin, eosin and DAB (Beer and
Lambert), colour is unmixed into their amounts with the matrix of Ruifrok and Johnston 2001, each amount is scaled and
shifted at random, and the colour is mixed again. The formula is Tellez's, the strength is not: with the same number,
colours change by 3.8 levels on average here and by 18.6 in the published code, before its rescaling. `augment.hed` can
be larger.

Axes: N tiles, H and W rows and columns, 3 RGB or HED.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from extract.finetuning.config import Augment

HED_33 = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Rows: optical density of one unit of haematoxylin, eosin, DAB in red, green, blue (Ruifrok and Johnston 2001)."""
UNMIX_33 = torch.linalg.inv(HED_33)
DARKEST = 1e-6


def augment(tiles_NHW3: torch.Tensor, settings: Augment, seed: Sequence[int]) -> torch.Tensor:
    """Every tile changed in its own way; float32 in 0..255, same shape. The same `seed` makes the same changes."""
    rng = np.random.default_rng(list(seed))
    n = len(tiles_NHW3)
    flip_N = rng.random(n) < 0.5 if settings.flips else np.zeros(n, dtype=bool)
    turns_N = rng.integers(0, 4, n) if settings.turns else np.zeros(n, dtype=np.int64)
    tiles_NHW3 = flip_and_turn(tiles_NHW3, flip_N, turns_N).float()
    if settings.hed == 0:
        return tiles_NHW3
    scale_N3 = torch.from_numpy(rng.uniform(1 - settings.hed, 1 + settings.hed, (n, 3))).float()
    shift_N3 = torch.from_numpy(rng.uniform(-settings.hed, settings.hed, (n, 3))).float()
    return jitter_hed(tiles_NHW3, scale_N3, shift_N3)


def flip_and_turn(tiles_NHW3: torch.Tensor, flip_N: np.ndarray, turns_N: np.ndarray) -> torch.Tensor:
    """Mirror left to right where `flip_N`, then turn counter-clockwise by `turns_N` x 90 degrees. Tiles are square."""
    changed_NHW3 = torch.empty_like(tiles_NHW3)
    for flip in (False, True):
        for turns in range(4):
            rows = torch.from_numpy(np.flatnonzero((flip_N == flip) & (turns_N == turns))).to(tiles_NHW3.device)
            if len(rows):
                part_NHW3 = tiles_NHW3[rows]
                part_NHW3 = part_NHW3.flip(2) if flip else part_NHW3
                changed_NHW3[rows] = part_NHW3.rot90(turns, (1, 2))
    return changed_NHW3


def jitter_hed(tiles_NHW3: torch.Tensor, scale_N3: torch.Tensor, shift_N3: torch.Tensor) -> torch.Tensor:
    """Amounts of H, E and D times `scale_N3` plus `shift_N3`; colours in 0..255, cut off at both ends."""
    device = tiles_NHW3.device
    density_NHW3 = -torch.log((tiles_NHW3 / 255).clamp_min(DARKEST))
    # (od @ U) * scale @ H + shift @ H: one 3 x 3 matrix a tile instead of three passes over the pixels
    mix_N33 = UNMIX_33 @ (scale_N3[:, :, None] * HED_33)
    offset_N3 = shift_N3 @ HED_33
    n, height, width, _ = density_NHW3.shape
    density_NP3 = torch.baddbmm(
        offset_N3[:, None, :].to(device), density_NHW3.reshape(n, height * width, 3), mix_N33.to(device)
    )
    return torch.exp(-density_NP3).clamp_(0, 1).mul_(255).reshape(n, height, width, 3)
