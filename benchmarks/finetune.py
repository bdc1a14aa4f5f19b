"""One step of fine-tuning: trained fraction, time and peak memory of LoRA, LoRA with recomputing, and all weights.

    python benchmarks/finetune.py [encoder=timm:vit_base_patch16_224] [batch=16] [steps=5] [device=auto]

The encoder has random weights; a vit_base_patch16_224 is Phikon's network. Tiles are made: noise, two classes. Every
variant runs in a process of its own, so that its peak memory is its own; on a GPU also in bf16. A step is
augmentation, forward, backward and AdamW on one batch, as `extract.finetune` does it. Prints Markdown.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import machine
from PIL import Image

from extract.encoders.frozen import choose_device
from extract.encoders.lora import add_lora, n_trainable
from extract.encoders.table import encoder_spec
from extract.finetuning.config import FinetuneConfig
from extract.finetuning.probe import Probe
from extract.finetuning.tuning import Job, TileModule, prepare

SETTINGS = {"encoder": "timm:vit_base_patch16_224", "batch": "16", "steps": "5", "device": "auto"}
N_PATIENTS = 8
VARIANTS = {
    "frozen, forward only": {"mode": "probe"},
    "LoRA, rank 16, q, k and v": {"mode": "lora"},
    "LoRA, rank 16, q and v": {"mode": "lora", "lora": {"targets": "qv"}},
    "LoRA, recomputing activations": {"mode": "lora", "train": {"checkpointing": True}},
    "all weights": {"mode": "full"},
    "all weights, recomputing activations": {"mode": "full", "train": {"checkpointing": True}},
}


def main() -> None:
    settings = SETTINGS | dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    unknown = set(settings) - set(SETTINGS) - {"child"}
    if unknown:
        sys.exit(f"expected {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}")
    if "child" in settings:
        print(json.dumps(measure(settings, **json.loads(settings["child"]))))
        return
    device = choose_device(settings["device"])
    print(f"Command: `python benchmarks/finetune.py {' '.join(sys.argv[1:])}`\n")
    print(machine("torch", "timm", "peft", device=device) + "\n")
    print(f"{settings['encoder']}, batch {settings['batch']}, {settings['steps']} steps after one to warm up.\n")
    print("| variant | precision | trained | of the encoder | s a step (median; all) | tiles/s | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for precision in ["float32", *(["bf16"] if device.type == "cuda" else [])]:
        for name in VARIANTS:
            print(row(name, precision, child(settings, name, precision), int(settings["batch"])), flush=True)


def child(settings: dict[str, str], name: str, precision: str) -> dict[str, Any]:
    told = json.dumps({"name": name, "precision": precision})
    command = [sys.executable, __file__, *(f"{k}={v}" for k, v in settings.items()), f"child={told}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, precision: str, found: dict[str, Any], batch: int) -> str:
    middle = median(found["seconds"])
    all_of_them = " ".join(f"{s:.3f}" for s in found["seconds"])
    share = f"{100 * found['trained'] / found['total']:.3f} %"
    return (
        f"| {name} | {precision} | {found['trained']:,} | {share} | {middle:.3f} ({all_of_them}) | "
        f"{batch / middle:.1f} | {found['memory'] / 1e9:.2f} GB |"
    )


# --- in the child ----------------------------------------------------------------------------------------------------


def measure(settings: dict[str, str], name: str, precision: str) -> dict[str, Any]:
    """Seconds of every step, trained and all parameters of the encoder, peak memory in bytes."""
    batch, steps = int(settings["batch"]), int(settings["steps"])
    with tempfile.TemporaryDirectory() as folder:
        encoder = {
            "name": settings["encoder"],
            "random_weights": True,
            "device": settings["device"],
            "precision": precision,
        }
        write_tiles(Path(folder), encoder_spec(settings["encoder"]).tile_px, batch)
        data = {"folder": folder, "group_pattern": r"^(p\d+)"}
        job = prepare(FinetuneConfig.model_validate({"data": data, "encoder": encoder} | VARIANTS[name]))
    total = sum(p.numel() for p in job.encoder.network.parameters())
    labels_N = torch.from_numpy(job.tiles.labels_N[:batch]).to(job.encoder.device)
    tiles_NHW3 = torch.from_numpy(job.images[np.arange(batch)])
    step, trained = (
        frozen_step(job, tiles_NHW3) if job.config.mode == "probe" else training_step(job, labels_N, tiles_NHW3)
    )
    step()
    if job.encoder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step, job.encoder.device) for _ in range(steps)]
    on_gpu = job.encoder.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "trained": trained, "total": total, "memory": memory}


def write_tiles(folder: Path, side_px: int, batch: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(max(batch, 2 * N_PATIENTS)):
        where = folder / "ab"[i % 2]
        where.mkdir(exist_ok=True)
        noise = rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        Image.fromarray(noise).save(where / f"p{i // 2 % N_PATIENTS}_{i}.png")


def frozen_step(job: Job, tiles_NHW3: torch.Tensor) -> tuple[Any, int]:
    return (lambda: job.encoder.encode(tiles_NHW3)), 0


def training_step(job: Job, labels_N: torch.Tensor, tiles_NHW3: torch.Tensor) -> tuple[Any, int]:
    """What Lightning does with one batch, without Lightning."""
    config, network, device = job.config, job.encoder.network, job.encoder.device
    if config.mode == "lora":
        add_lora(network, config.lora, 0)
    else:
        network.requires_grad_(True)
    network.set_grad_checkpointing(config.train.checkpointing)
    width = job.encoder.spec.dim
    module = TileModule(job, Probe(np.zeros((2, width)), np.zeros(2), 1.0, 0.0, True)).to(device)
    module.on_train_epoch_start()
    optimizer = module.configure_optimizers()["optimizer"]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, job.encoder.dtype, enabled=job.encoder.dtype is not None):
            loss = module.training_step((labels_N, tiles_NHW3.to(device)), 0)
        loss.backward()
        optimizer.step()

    return step, n_trainable(network, config.lora.targets if config.mode == "lora" else "")


def timed(step: Any, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
