"""A real, small H&E network (lavlab-shell, MIT) as one's own encoder, on real tiles: from images to features.

Needs lavlab-shell's files, onnx and onnxruntime (pip install -e '.[realnet]'; lavlab-shell itself without its
dependencies: pip install --no-deps lavlab-shell), and the tiles beside this repository; skipped without.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract.features.cache import read_features, read_header, read_names
from extract.run import main

ROOT = Path(__file__).resolve().parents[2]
TILES = Path(os.environ.get("SLIDE_MIL_SHARED", ROOT.parent / "shared")) / "data" / "tiles" / "nct_crc"
QUADRANTS = [(x, y, x + 112, y + 112) for y in (0, 112) for x in (0, 112)]

MODULE = '''
import numpy as np
import onnx
import onnxruntime
import torch
from onnx.utils import Extractor

# Eosin and haematoxylin of Ruifrok and Johnston (2001), and what is left
STAINS = np.linalg.inv(np.array([[0.07, 0.99, 0.11], [0.65, 0.70, 0.29], [0.27, 0.57, 0.78]]))
LOW, HIGH = np.array([-0.015, 0.008, 0.019]), np.array([0.355, 0.563, 0.567])  # 1st and 99th percentile of these tiles
DEEPEST = "conv2d_21"  # 128 channels, an eighth of the rows and columns: the last before the decoder


class Shell(torch.nn.Module):
    """128 numbers a tile: the mean over positions of the network cut at its deepest layer."""

    def __init__(self, path):
        super().__init__()
        whole = onnx.load(str(path))
        part = Extractor(whole).extract_model(["input"], [DEEPEST])
        self.session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])

    def forward(self, tiles_N3HW):
        density_N3HW = -torch.log10((tiles_N3HW * 255).clamp(min=1) / 255).double().numpy()
        stains = np.einsum("nchw,cs->nshw", density_N3HW, STAINS)
        seen_NHW3 = np.stack([stains[:, 0], stains[:, 1], density_N3HW.mean(axis=1)], axis=-1)
        seen_N3HW = ((seen_NHW3 - LOW) / (HIGH - LOW)).clip(0, 1).transpose(0, 3, 1, 2)
        (deep_NCHW,) = self.session.run(None, {"input": seen_N3HW.astype(np.float32)})
        return torch.from_numpy(deep_NCHW.mean(axis=(2, 3)))


def load(weights):
    return Shell(weights).eval(), {"dim": 128, "mean": (0, 0, 0), "std": (1, 1, 1), "licence": "MIT"}
'''


def test_features_of_tumour_and_of_fat_differ_more_between_than_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    shell = find_spec("shell")
    found = [Path(place) / "weights" / "model_v1.onnx" for place in (shell and shell.submodule_search_locations) or []]
    weights = next((path for path in found if path.is_file()), None)
    if weights is None:
        pytest.skip("lavlab-shell is not installed")
    if not TILES.is_dir():
        pytest.skip("no real tiles at hand")
    for tissue, pattern in (("tumour", "TUM-*"), ("fat", "ADI-*"), ("muscle", "MUS-*")):
        (tmp_path / "tiles" / tissue).mkdir(parents=True)
        image = Image.open(next(TILES.glob(pattern))).convert("RGB")
        for number, box in enumerate(QUADRANTS):
            image.crop(box).resize((224, 224)).save(tmp_path / "tiles" / tissue / f"{number}.png")
    (tmp_path / "shell_encoder.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [f"tiles.folder={tmp_path / 'tiles'}", "tiles.files=one", "features.dtype=float32"]
    arguments += ["encoder.name=shell_encoder:load", f"encoder.weights={weights}", f"out={tmp_path / 'out'}"]
    assert main(arguments) == 0

    (file,) = (tmp_path / "out").glob("*.h5")
    assert read_header(file).provenance.encoder == "shell_encoder:load"
    features_ND, names = read_features(file), read_names(file)
    assert names is not None
    assert features_ND.shape == (12, 128)
    tissue_N = np.array([name.split("/")[0] for name in names])
    features_ND = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    far_NN = np.linalg.norm(features_ND[:, None] - features_ND[None], axis=2)
    tumour, fat = tissue_N == "tumour", tissue_N == "fat"
    between = far_NN[np.ix_(tumour, fat)].mean()
    within = [far_NN[np.ix_(of, of)][~np.eye(4, dtype=bool)].mean() for of in (tumour, fat)]
    assert between > max(within)
    assert between > 1.25 * np.mean(within)
