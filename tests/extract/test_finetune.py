"""`python -m extract.finetune` from tiles to an encoder that extraction takes, and what it leaves behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from extract import tensors
from extract.config import Encoder
from extract.encoders.frozen import load_encoder
from extract.features.cache import read_features, read_header
from extract.finetune import main
from extract.finetuning import tuning
from extract.finetuning.config import FinetuneConfig
from extract.finetuning.probe import Probe
from extract.finetuning.tilesets import TileImages
from extract.finetuning.tuning import FROZEN, KNN
from extract.run import main as extract_main

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", ROOT.parent / "shared")) / "data" / "tiles"
TINY = ["encoder.name=timm:test_vit", "encoder.random_weights=true", "encoder.device=cpu"]
SIDE_PX = 160


@pytest.fixture(scope="module")
def gratings(textures: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 tiles of 16 patients, two classes that differ in wavelength only."""
    return textures.write_tiles(tmp_path_factory.mktemp("gratings"), 160, SIDE_PX, n_patients=16)


@pytest.fixture(scope="module")
def few(textures: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tiles of 6 patients."""
    return textures.write_tiles(tmp_path_factory.mktemp("few"), 24, SIDE_PX, n_patients=6)


@pytest.fixture(scope="module")
def tuned(gratings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of LoRA on the gratings."""
    out = tmp_path_factory.mktemp("runs") / "gratings"
    settings = ["train.epochs=12", "train.patience=12", "train.batch_size=16", "train.lr=1e-2", "bootstrap=300"]
    assert main([f"data.csv={gratings}", *TINY, *settings, f"out={out}"]) == 0
    return out


def metrics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def quick(few: Path, out: Path, *more: str) -> int:
    return main([f"data.csv={few}", *TINY, "train.epochs=1", "bootstrap=20", f"out={out}", *more])


# --- it learns -----------------------------------------------------------------------------------------------------


def test_lora_learns_what_the_frozen_random_encoder_cannot_show(tuned: Path):
    test = metrics_of(tuned)["test"]
    assert next(iter(test)) == FROZEN
    frozen = test[FROZEN]["scores"]["accuracy"]
    learned = test["lora fine-tuned + its head"]
    assert learned["scores"]["accuracy"]["value"] >= 0.95
    assert frozen["value"] < 0.85
    assert learned["difference"]["accuracy"]["low"] > 0, "the interval of the paired difference"
    for entry in test.values():
        assert all(score["low"] <= score["value"] <= score["high"] for score in entry["scores"].values())


def test_what_the_table_says_can_be_recomputed_from_the_files(tuned: Path):
    """From the images, the adapter and the head alone; and from predictions.csv."""
    split, predictions = pd.read_csv(tuned / "split.csv"), pd.read_csv(tuned / "predictions.csv")
    assert split.groupby("group")["role"].nunique().max() == 1
    test = split[split["role"] == "test"]
    name = "lora fine-tuned + its head"
    rows = predictions[predictions["model"] == name]
    assert rows["image"].tolist() == test["image"].tolist()
    accuracy = metrics_of(tuned)["test"][name]["scores"]["accuracy"]["value"]
    assert (rows["predicted"] == rows["label"]).mean() == pytest.approx(accuracy)
    encoder = load_encoder(Encoder(name="timm:test_vit", random_weights=True, adapter=tuned / "adapter", device="cpu"))
    features_ND = encoder.encode(np.stack([np.asarray(Image.open(path)) for path in test["image"]]))
    head = load_file(tuned / "head.safetensors")
    p_NC = (features_ND @ head["weight"].T + head["bias"]).softmax(dim=1).numpy()
    np.testing.assert_allclose(rows[["p_0", "p_1"]].to_numpy(), p_NC, atol=1e-4)
    with safe_open(tuned / "head.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["coarse", "fine"]


def test_the_kept_epoch_has_the_lowest_val_loss(tuned: Path):
    history, metrics = pd.read_csv(tuned / "history.csv"), metrics_of(tuned)
    assert history["epoch"].tolist() == list(range(13))
    trained = history[history["epoch"] > 0].reset_index(drop=True)
    assert metrics["best_epoch"] == trained["epoch"][trained["val_loss"].idxmin()]
    predictions = pd.read_csv(tuned / "predictions.csv")
    assert set(predictions["image"]) == set(pd.read_csv(tuned / "split.csv").query("role == 'test'")["image"])


def test_the_folder_tells_how_it_was_made_and_the_page_fetches_nothing(tuned: Path):
    names = {path.relative_to(tuned).as_posix() for path in tuned.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml",
        "environment.json",
        "metrics.json",
        "report.html",
        "history.csv",
        "predictions.csv",
        "split.csv",
        "head.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/base_encoder.json",
    }
    metrics = metrics_of(tuned)
    assert metrics["trainable_parameters"] == 6 * 4 * 64 * 16
    assert metrics["encoder_parameters"] == 306_240
    assert metrics["bootstrap"]["of"] == "groups"
    page = (tuned / "report.html").read_text()

    class Sources(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []
            self.tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            self.found += [str(v) for k, v in attrs if k in ("src", "href")]

    parser = Sources()
    parser.feed(page)
    assert parser.tags.count("svg") == 3
    assert all(source.startswith("#") for source in parser.found)
    assert "link" not in parser.tags
    assert re.findall(r"<script(.*?)>", page) == [""], "the page's own, within it"
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)|@import|https?:", page)
    shown = metrics["test"][FROZEN]["scores"]["accuracy"]
    assert f"{shown['value']:.3f} [{shown['low']:.3f}, {shown['high']:.3f}]" in page
    for text in ("Confusion on the test tiles", "Features of the test tiles in two dimensions", FROZEN, "best epoch"):
        assert text in page


# --- what it changes -----------------------------------------------------------------------------------------------


def test_only_adapter_and_head_change(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[tuning.Tuned] = []
    before = load_encoder(Encoder(name="timm:test_vit", random_weights=True, device="cpu")).network.state_dict()
    original = tuning.tune

    def tune(job: tuning.Job, probe: Any) -> tuning.Tuned:
        kept.append(original(job, probe))
        assert not np.allclose(kept[0].module.head.weight.detach().numpy(), probe.weight_CD)
        return kept[0]

    monkeypatch.setattr(tuning, "tune", tune)
    assert quick(few, tmp_path / "run", "lora.targets=qv", "train.checkpointing=true") == 0
    network = kept[0].module.network
    after = {name.replace(".base_layer", ""): w for name, w in network.state_dict().items() if ".lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    changed = [bool((w != 0).any()) for name, w in network.state_dict().items() if "lora_B" in name]
    assert changed == [True] * 6
    middle = [w[64:128] for name, w in network.state_dict().items() if "lora_B" in name]
    assert not any(bool(w.any()) for w in middle), "the key"
    assert metrics_of(tmp_path / "run")["trainable_parameters"] == 6 * 3 * 64 * 16


def test_the_same_seed_gives_the_same_adapter(few: Path, tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert quick(few, tmp_path / name, f"seed={seed}") == 0
    digests = [
        hashlib.sha256((tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest() for n in "abc"
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert metrics_of(tmp_path / "a")["test"] == metrics_of(tmp_path / "b")["test"]


def test_the_same_command_leaves_the_same_bytes(few: Path, tmp_path: Path):
    """But for environment.json, in which dates and durations are."""
    found = []
    for _ in range(2):
        assert quick(few, tmp_path / "run", "overwrite=true") == 0
        written = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
        found.append({path: path.read_bytes() for path in written if path.name != "environment.json"})
    assert {"report.html", "metrics.json", "head.safetensors"} <= {path.name for path in found[0]}
    assert found[0] == found[1]


def test_full_fine_tuning_leaves_weights_that_extraction_takes(few: Path, tmp_path: Path):
    assert quick(few, tmp_path / "run", "mode=full", "train.lr=1e-3", "train.class_weights=none") == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["trainable_parameters"] == metrics["encoder_parameters"] == 306_240
    frozen = load_encoder(Encoder(name="timm:test_vit", random_weights=True, device="cpu"))
    full = load_encoder(Encoder(name="timm:test_vit", weights=tmp_path / "run" / "encoder.safetensors", device="cpu"))
    tiles_NHW3 = np.random.default_rng(0).integers(0, 256, (2, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    assert not torch.equal(frozen.encode(tiles_NHW3), full.encode(tiles_NHW3))
    assert not (tmp_path / "run" / "adapter").exists()


def test_bf16_trains_float32_weights(few: Path, tmp_path: Path):
    assert quick(few, tmp_path / "run", "encoder.precision=bf16", "train.epochs=2") == 0
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(bool(w.any()) for w in weights.values()), "B has left zero"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "bfloat16"
    assert np.isfinite(pd.read_csv(tmp_path / "run" / "history.csv")["val_loss"]).all()


def test_the_probe_alone_reports_the_probe_and_the_nearest_neighbours(few: Path, tmp_path: Path):
    assert quick(few, tmp_path / "run", "mode=probe") == 0
    metrics = metrics_of(tmp_path / "run")
    assert list(metrics["test"]) == [FROZEN, KNN]
    assert metrics["trainable_parameters"] == 0
    assert load_file(tmp_path / "run" / "head.safetensors")["weight"].shape == (2, 64)
    assert "frozen" in (tmp_path / "run" / "report.html").read_text()


def test_a_convolutional_network_is_refused_for_lora(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [
        f"data.csv={few}",
        "encoder.name=timm:test_resnet",
        "encoder.random_weights=true",
        f"out={tmp_path / 'r'}",
    ]
    assert main(arguments) == 2
    assert "no attention layers `qkv` to adapt; use mode=probe or mode=full" in capsys.readouterr().err
    assert main([*arguments, "mode=full", "train.epochs=1", "bootstrap=0"]) == 0, "batch norms learn"


def test_extraction_with_the_adapter_is_another_cache(
    tuned: Path, slides: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "slides").mkdir()
    slides.painted_slide(tmp_path / "slides" / "s.tiff", 901, 703)
    common = [f"slides.folder={tmp_path / 'slides'}", *TINY, "extract.workers=0"]
    adapter = f"encoder.adapter={tuned / 'adapter'}"
    assert extract_main([*common, f"out={tmp_path / 'frozen'}"]) == 0
    assert extract_main([*common, f"out={tmp_path / 'tuned'}", adapter]) == 0
    paths = [tmp_path / name / "s.h5" for name in ("frozen", "tuned")]
    frozen, after = (read_header(path).provenance for path in paths)
    assert frozen.weights_sha256 != after.weights_sha256
    assert str(tuned / "adapter") in after.extra["encoder_source"]
    one_ND, two_ND = (read_features(path) for path in paths)
    assert one_ND.shape == two_ND.shape
    assert np.abs(one_ND.astype(float) - two_ND).max() > 0.05
    capsys.readouterr()
    assert extract_main([*common, f"out={tmp_path / 'frozen'}", adapter]) == 2, "would mix two encoders"
    assert "weights_sha256" in capsys.readouterr().err


# --- how it trains -------------------------------------------------------------------------------------------------


@pytest.fixture
def job(few: Path, tmp_path: Path) -> tuning.Job:
    settings = {"epochs": 3, "batch_size": 5, "warmup": 0.25, "head_lr": 1.0}
    encoder = {"name": "timm:test_vit", "random_weights": True, "device": "cpu"}
    tree = {"data": {"csv": few}, "encoder": encoder, "train": settings, "out": tmp_path / "run"}
    return tuning.prepare(FinetuneConfig.model_validate(tree))


@pytest.fixture
def module(job: tuning.Job) -> tuning.TileModule:
    rng = np.random.default_rng(0)
    return tuning.TileModule(job, Probe(rng.normal(size=(2, 64)), rng.normal(size=2), 1.0, 0.0, True))


def test_an_epoch_is_every_training_tile_once_in_another_order(job: tuning.Job, module: tuning.TileModule, monkeypatch):
    monkeypatch.setattr(tuning.TileModule, "current_epoch", 0)
    wanted = sorted(job.images[np.array([row])].tobytes() for row in job.tiles.rows("train"))
    orders = []
    for epoch in (0, 1, 0):
        monkeypatch.setattr(tuning.TileModule, "current_epoch", epoch)
        batches = list(module.train_dataloader())
        assert {len(labels_N) for labels_N, _ in batches} <= {4, 5}
        seen = [tile.numpy().tobytes() for _, tiles_NHW3 in batches for tile in tiles_NHW3]
        assert sorted(seen) == wanted
        for label, tile in zip(torch.cat([b[0] for b in batches]), seen, strict=True):
            row = next(r for r in job.tiles.rows("train") if job.images[np.array([r])].tobytes() == tile)
            assert job.tiles.labels_N[row] == label
        orders.append(seen)
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_the_loss_is_torchs_weighted_cross_entropy(module: tuning.TileModule):
    module.class_weights_C = torch.tensor([0.4, 1.7])
    logits_NC, labels_N = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2
    wanted = torch.nn.functional.cross_entropy(logits_NC, labels_N, weight=module.class_weights_C)
    torch.testing.assert_close(module._loss("train", logits_NC, labels_N), wanted)


def test_the_learning_rate_rises_then_falls_to_nothing(module: tuning.TileModule):
    factors = [module._lr_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 26)
    assert factors[25] == 1
    assert all(a < b for a, b in pairwise(factors[:26]))
    assert all(a > b for a, b in pairwise(factors[25:]))
    assert factors[100] == pytest.approx(0, abs=1e-12)


def test_test_tiles_are_not_read_while_it_trains(job: tuning.Job, monkeypatch: pytest.MonkeyPatch):
    read: set[int] = set()
    getitem = TileImages.__getitem__

    def spy(images: TileImages, rows: np.ndarray) -> np.ndarray:
        read.update(rows.tolist())
        return getitem(images, rows)

    monkeypatch.setattr(TileImages, "__getitem__", spy)
    tuning.tune(job, Probe(np.zeros((2, 64)), np.zeros(2), 1.0, 0.0, True))
    assert read == {*job.tiles.rows("train"), *job.tiles.rows("val")}


def test_it_is_said_when_fine_tuning_has_not_helped(few: Path, tuned: Path, tmp_path: Path, capsys):
    assert quick(few, tmp_path / "run", "train.lr=0.1") == 0
    told = capsys.readouterr().out
    for run, noted in ((tmp_path / "run", True), (tuned, False)):
        val_loss = pd.read_csv(run / "history.csv")["val_loss"]
        assert (val_loss[1:].min() > val_loss[0]) == noted
        assert ("no epoch reached the val loss" in (run / "report.html").read_text()) == noted
    assert "Note: no epoch reached the val loss" in told
    assert "Note: test holds one patient" in told


def test_training_that_diverges_says_so(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert quick(few, tmp_path / "run", "train.lr=1e30", "train.schedule=constant", "train.batch_size=4") == 2
    assert "use a lower train.lr (now 1e+30)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_interrupted_runs_leave_nothing(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def step(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.TileModule, "training_step", step)
    assert quick(few, tmp_path / "run") == 130
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.yaml", "head.safetensors", "report.html"])
def test_a_full_disk_keeps_nothing_and_says_so(few: Path, tmp_path: Path, monkeypatch, capsys, name: str):
    """Whatever had been written before goes as well: the run folder is whole or not there."""
    rename = os.replace

    def full(temporary: Path, path: Path) -> None:
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(temporary, path)

    monkeypatch.setattr(os, "replace", full)
    assert quick(few, tmp_path / "run", "mode=probe") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run' / name}: no space left (No space left on device)" in said
    assert "Nothing of this fine-tuning was kept" in said
    assert os.listdir(tmp_path) == []


def test_what_safetensors_says_of_a_full_disk_is_understood(few: Path, tmp_path: Path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    assert quick(few, tmp_path / "run", "mode=probe") == 2
    assert "head.safetensors: no space left (No space left on device)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_sigterm_is_ctrl_c(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning.TileModule, "on_train_epoch_start", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert quick(few, tmp_path / "run") == 130
    assert os.listdir(tmp_path) == []


# --- what is refused -----------------------------------------------------------------------------------------------


def test_nothing_is_written_when_something_is_wrong(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = pd.read_csv(few).assign(image=lambda t: [str(few.parent / i) for i in t["image"]])
    table.loc[3, "image"] = str(tmp_path / "gone.png")
    table.loc[4:5, ["label", "patient"]] = ["rare", "P00"]
    table.to_csv(tmp_path / "t.csv", index=False)
    assert quick(tmp_path / "t.csv", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "gone.png: no such file" in told
    assert "class 'rare' has 1 patient" in told
    assert not (tmp_path / "run").exists()


def test_a_folder_that_exists_is_kept_unless_told_otherwise(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    assert quick(few, tmp_path / "run") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert quick(few, tmp_path / "run", "overwrite=true") == 2
    assert "not a run folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert quick(few, tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "run" / "config.yaml").write_text("")
    assert quick(few, tmp_path / "run", "overwrite=true", "mode=probe") == 0
    assert not (tmp_path / "run" / "mine.txt").exists()


def test_help_and_config_errors_import_neither_torch_nor_pandas(python):
    code = (
        "import sys, extract.finetune as f\n"
        "for arguments in (['--help'], ['mode=lorra', 'data.folder=x']):\n"
        "    try: f.main(arguments)\n"
        "    except SystemExit as e: print(e.code)\n"
        "print([m for m in ('torch', 'pandas', 'numpy', 'lightning', 'peft', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-3:] == ["0", "2", "[]"] or done.stdout.splitlines()[-2:] == ["2", "[]"]
    assert "did you mean 'lora'" in done.stderr
    for key in ("lora.rank", "data.group_pattern", "augment.hed", "encoder.name"):
        assert re.search(rf"^  {re.escape(key)} ", done.stdout, re.MULTILINE)


def test_the_shipped_config_takes_the_published_folders(textures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command of the config's header, with nine classes of made tiles and a small encoder instead of Phikon."""
    rng = np.random.default_rng(0)
    classes = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
    for split, n in (("NCT-CRC-HE-100K", 4), ("CRC-VAL-HE-7K", 2)):
        for name in classes:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(n):
                tile = Image.fromarray(textures.grating("fine", SIDE_PX, rng))
                tile.save(tmp_path / "data" / split / name / f"{name}-{i}.tif")
    monkeypatch.chdir(tmp_path)
    assert (
        main(["config=nct-crc-lora.yaml", f"data.folder={tmp_path / 'data'}", *TINY, "train.epochs=1", "bootstrap=20"])
        == 0
    )
    metrics = metrics_of(tmp_path / "runs" / "nct-crc-lora")
    assert metrics["classes"] == classes
    assert {role: counts["by_class"] for role, counts in metrics["counts"].items()} == {
        "train": [3] * 9,
        "val": [1] * 9,
        "test": [2] * 9,
    }


# --- size and real tiles -------------------------------------------------------------------------------------------


def test_vit_tiny_on_200_tiles_within_two_minutes(textures: Any, tmp_path: Path):
    csv = textures.write_tiles(tmp_path / "tiles", 200, 224)
    began, cpu_began = time.perf_counter(), time.process_time()
    encoder = ["encoder.name=timm:vit_tiny_patch16_224", "encoder.random_weights=true", "encoder.device=cpu"]
    assert main([f"data.csv={csv}", *encoder, "train.epochs=1", f"out={tmp_path / 'run'}"]) == 0
    # whichever is less: several threads take more processor time, a busy machine takes more time
    assert min(time.perf_counter() - began, time.process_time() - cpu_began) < 120
    assert metrics_of(tmp_path / "run")["trainable_fraction"] < 0.03


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
def test_real_breakhis_tiles_go_through(tmp_path: Path):
    """Plumbing only: 78 tiles of 13 patients say nothing about quality."""
    csv = SHARED / "breakhis_app" / "labels.csv"
    settings = ["data.image=path", "data.label=class", "data.resize=true", "train.epochs=1", "bootstrap=50"]
    assert main([f"data.csv={csv}", *settings, *TINY, f"out={tmp_path / 'run'}"]) == 0
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    assert len(split) == 78
    assert split.groupby("group")["role"].nunique().max() == 1
    assert split.groupby("role")["label"].nunique().to_dict() == {"test": 2, "train": 2, "val": 2}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
def test_real_nct_crc_tiles_go_through(tmp_path: Path):
    """Plumbing only: the 12 tiles as they are, once as TUM against the rest, every file its own group."""
    paths = sorted((SHARED / "nct_crc").glob("*.tif"))
    assert len(paths) == 12
    rows = [(str(path), "ab"[i % 2]) for i, path in enumerate(paths)]
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "t.csv", index=False)
    settings = ["data.group=file", "data.resize=true", "train.epochs=1", "bootstrap=50"]
    assert main([f"data.csv={tmp_path / 't.csv'}", *settings, *TINY, f"out={tmp_path / 'run'}"]) == 0
    assert metrics_of(tmp_path / "run")["bootstrap"]["of"] == "tiles"
    assert "no patient is known" in (tmp_path / "run" / "report.html").read_text()
