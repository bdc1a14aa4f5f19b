"""One fine-tuning from config to report, in the order things happen: tiles, probe, training, test, report.

Axes: N tiles, H and W tile_px rows and columns, 3 RGB, D feature width, C classes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from extract.config import ConfigError, ProblemsError, to_yaml
from extract.encoders.frozen import FrozenEncoder, load_encoder
from extract.encoders.lora import add_lora, attention_layers, n_trainable, save_adapter, train_dropout
from extract.encoders.weights import sha256_of_tensors
from extract.features.cache import toolkit_version
from extract.finetuning.augment import augment
from extract.finetuning.cached import cached_features
from extract.finetuning.config import FinetuneConfig
from extract.finetuning.one_device import alone, ctrl_c, on_one_device
from extract.finetuning.probe import N_NEIGHBOURS, Probe, class_weights, fit_probe, knn_logits, score_table
from extract.finetuning.report import terminal_table, write_report
from extract.finetuning.tilesets import ROLES, TileImages, Tileset, load_tiles
from extract.leftovers import is_unused, remove_aside, remove_folder, remove_partials
from extract.lock import only_command_in
from extract.owners import refuse_removing
from extract.quiet import quiet_lightning
from extract.tables import write_csv
from extract.tensors import write_tensors
from extract.whole import system_error, write_whole

DEFAULT_LR = {"lora": 5e-4, "full": 2e-5}
FROZEN = "frozen encoder + linear probe"
KNN = f"frozen encoder + {N_NEIGHBOURS} nearest neighbours"
QUIET = (".*in eval mode at the start.*",)
FOR_ORDER, FOR_AUGMENT = 1, 2  # leading word of a random stream


class TrainingError(ProblemsError):
    """Training cannot go on."""


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before training."""

    config: FinetuneConfig
    tiles: Tileset
    images: TileImages
    encoder: FrozenEncoder
    base_sha256: str
    notes: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        return len(self.tiles.classes)


@dataclass(frozen=True)
class Tuned:
    """What training leaves: weights are those of the best epoch."""

    module: TileModule
    adapter: Any
    seconds: float


def run_finetuning(config: FinetuneConfig, command: Sequence[str]) -> tuple[Path, str]:
    """Fine-tune, report, and leave an encoder in the run folder; that folder and the table for the terminal.

    Raises:
        ProblemsError, EncoderError: something is wrong with folder, tiles or encoder; nothing was written.
    """
    assert config.out is not None
    with only_command_in(config.out, "extract.finetune"):
        return _run_finetuning(config, command)


def _run_finetuning(config: FinetuneConfig, command: Sequence[str]) -> tuple[Path, str]:
    assert config.out is not None
    refuse_existing(config)
    job = prepare(config)
    began = time.perf_counter()
    before_ND = features_of(job, "frozen features")
    probe = probe_on(job, before_ND)
    tuned = None if config.mode == "probe" else tune(job, probe)
    after_ND = before_ND if tuned is None else features_of(job, "fine-tuned features")
    logits = logits_on_test(job, before_ND, probe, after_ND, tuned)
    metrics = score(job, logits, tuned)
    environment = describe_environment(job, command) | {
        "seconds": round(time.perf_counter() - began, 1),
        "training_seconds": round(tuned.seconds, 1) if tuned else None,
    }
    notes = [*job.notes, *training_notes(probe, tuned)]
    test = job.tiles.rows("test")
    with all_or_nothing(config):
        write_encoder(job, tuned, probe, config.out)
        write_tables(job, logits, tuned, config.out)
        write_report(
            config.out,
            metrics=metrics,
            before_ND=before_ND[test],
            after_ND=None if tuned is None else after_ND[test],
            labels_N=job.tiles.labels_N[test],
            history=tuned.module.history if tuned else [],
            environment=environment,
            config_yaml=resolved_yaml(config),
            notes=notes,
            seed=config.seed,
        )
    return config.out, "\n".join([terminal_table(metrics), *(f"Note: {note}" for note in notes)])


# --- before training -----------------------------------------------------------------------------------------------


def refuse_existing(config: FinetuneConfig) -> None:
    """Raise ConfigError where the run folder is in use, or could not be written when training has ended."""
    out = config.out
    assert out is not None
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # now, not after hours of training
        raise ConfigError("out", [f"{out}: cannot be written, {there} is not a folder or not writable"])
    if is_unused(out):
        return
    if not config.overwrite:
        raise ConfigError("run folder exists", [f"{out}: set out=OTHER, or overwrite=true to replace it"])
    if not (out / "config.yaml").exists():
        raise ConfigError("overwrite", [f"{out}: not a run folder (no config.yaml); it will not be deleted"])
    refuse_removing(out)


@contextmanager
def all_or_nothing(config: FinetuneConfig) -> Iterator[None]:
    """Within, the run folder is filled; if that fails, it is emptied again.

    What was there goes only now that its successor is ready to be written.
    """
    out = config.out
    assert out is not None
    remove_aside(out)
    if config.overwrite and out.exists():
        remove_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    remove_partials([out])
    try:
        write_whole(out / "config.yaml", resolved_yaml(config))
        yield
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)  # of a disk of its own only what is in it
        found = system_error(error, out, out) if isinstance(error, Exception) else None
        if found is None:
            raise
        raise found from error


def resolved_yaml(config: FinetuneConfig) -> str:
    return to_yaml(config.model_copy(update={"overwrite": False}))


def prepare(config: FinetuneConfig) -> Job:
    """Tiles, split, pixels and encoder, all checked."""
    encoder = load_encoder(config.encoder)
    refuse_network(config, encoder)
    base_sha256 = sha256_of_tensors(encoder.network.state_dict())
    tiles, images = load_tiles(config.data, encoder.spec.tile_px, config.seed)
    notes = [*tiles.notes]
    if len(np.unique(tiles.groups_N[tiles.rows("test")])) == 1:
        notes.append("test holds one patient or slide, which says nothing about the spread: no intervals")
    if not tiles.grouped:
        notes.append(
            "no patient is known: tiles of one patient may be in several roles where the split was drawn, and "
            "intervals, which resample tiles, are too narrow"
        )
    counts = tiles.table.groupby("role").agg(tiles=("image", "size"), groups=("group", "nunique"))
    told = ", ".join(f"{role}: {row['tiles']} tiles of {row['groups']} groups" for role, row in counts.iterrows())
    print(f"{len(tiles.table):,} tiles, {len(tiles.classes)} classes; {told}")
    return Job(config, tiles, images, encoder, base_sha256, tuple(notes))


def refuse_network(config: FinetuneConfig, encoder: FrozenEncoder) -> None:
    """Raise ConfigError where the network lacks what the config asks for."""
    problems = []
    if config.mode == "lora" and not attention_layers(encoder.network):
        problems.append(
            f"mode=lora: encoder {encoder.id!r} has no attention layers `qkv` to adapt; use mode=probe or mode=full"
        )
    if config.train.checkpointing and not hasattr(encoder.network, "set_grad_checkpointing"):
        problems.append(f"train.checkpointing=true: encoder {encoder.id!r} cannot recompute activations; leave it out")
    if problems:
        raise ConfigError("problems in the config", problems)


def features_of(job: Job, what: str) -> np.ndarray:
    """features_ND of all tiles as they are, with the encoder as it is now, in evaluation mode."""
    if job.config.data.features is not None:
        return cached_features(job.config.data, job.tiles, job.encoder)
    size = max(job.config.train.batch_size, 64)
    parts = [np.arange(i, min(i + size, len(job.images))) for i in range(0, len(job.images), size)]
    shown = tqdm(read_ahead(job.images, parts), total=len(parts), desc=what, unit="batch", disable=None, leave=False)
    return np.concatenate([job.encoder.encode(tiles_NHW3).numpy() for _, tiles_NHW3 in shown])


def read_ahead(images: TileImages, parts: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, tiles_NHW3) of every part; the next one is read while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(images.__getitem__, parts[0]) if parts else None
        for i, rows in enumerate(parts):
            assert coming is not None
            tiles_NHW3 = coming.result()
            coming = pool.submit(images.__getitem__, parts[i + 1]) if i + 1 < len(parts) else None
            yield rows, tiles_NHW3


def probe_on(job: Job, features_ND: np.ndarray) -> Probe:
    """The linear probe on these features of all tiles: fitted on train, its strength chosen on val."""
    labels_N, train, val = job.tiles.labels_N, job.tiles.rows("train"), job.tiles.rows("val")
    return fit_probe(
        features_ND[train],
        labels_N[train],
        features_ND[val],
        labels_N[val],
        job.n_classes,
        balanced=job.config.train.class_weights == "balanced",
    )


# --- training ------------------------------------------------------------------------------------------------------


class TileBatches:
    """Batches of (labels_N, tiles_NHW3), each tile once an epoch; order from seed and epoch, or as given if None."""

    def __init__(self, job: Job, rows: np.ndarray, batch_size: int, module: TileModule | None):
        self.job, self.rows, self.batch_size, self.module = job, rows, batch_size, module

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.rows
        if self.module is not None:
            rows = np.random.default_rng([FOR_ORDER, self.job.config.seed, self.module.current_epoch]).permutation(rows)
        parts = np.array_split(rows, len(self))  # no small last batch
        for part, tiles_NHW3 in read_ahead(self.job.images, parts):
            yield torch.from_numpy(self.job.tiles.labels_N[part]), torch.from_numpy(tiles_NHW3)


class TileModule(lightning.LightningModule):
    """Encoder and linear head on labelled tiles. Selects on val; never sees test.

    The head starts as the frozen encoder's linear probe (Kumar et al. 2022, ICLR: a random head first distorts the
    features that it is put on).

    Attributes:
        history: one row per epoch: epoch (0 = before training), train_loss, val_loss, val_accuracy.
        best_epoch: the epoch with the lowest val loss, whose weights `keep_best` puts back.
    """

    def __init__(self, job: Job, probe: Probe):
        super().__init__()
        self.job, self.settings = job, job.config.train
        self.network = job.encoder.network
        self.head = torch.nn.Linear(job.encoder.spec.dim, job.n_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(probe.weight_CD))
            self.head.bias.copy_(torch.from_numpy(probe.bias_C))
        train_labels_N = job.tiles.labels_N[job.tiles.rows("train")]
        balanced = self.settings.class_weights == "balanced"
        weights_C = class_weights(train_labels_N, job.n_classes) if balanced else np.ones(job.n_classes)
        self.class_weights_C: Tensor
        self.register_buffer("class_weights_C", torch.from_numpy(weights_C).float(), persistent=False)
        self.history: list[dict[str, Any]] = []
        self.best_epoch, self.best_loss = 0, np.inf
        self.best: dict[str, Tensor] = {}
        self._sums = {"train": np.zeros(3), "val": np.zeros(3)}  # weighted loss, weight, tiles called right

    # --- data -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TileBatches:
        return TileBatches(self.job, self.job.tiles.rows("train"), self.settings.batch_size, self)

    def val_dataloader(self) -> TileBatches:
        return TileBatches(self.job, self.job.tiles.rows("val"), self.settings.batch_size, None)

    # --- steps ------------------------------------------------------------------------------------------------------

    def forward(self, tiles_NHW3: Tensor) -> Tensor:
        """logits_NC of tiles with values in 0..255. The head is in float32 whatever the encoder's precision."""
        encoder = self.job.encoder
        features_ND = encoder.pool(self.network(encoder.prepare(tiles_NHW3)))
        with torch.autocast(self.device.type, enabled=False):
            logits_NC: Tensor = self.head(features_ND.float())
        return logits_NC

    def training_step(self, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        labels_N, tiles_NHW3 = batch
        seed = [FOR_AUGMENT, self.job.config.seed, self.current_epoch, step]
        with torch.autocast(self.device.type, enabled=False):
            changed_NHW3 = augment(tiles_NHW3, self.job.config.augment, seed)
        return self._loss("train", self(changed_NHW3).float(), labels_N)

    def validation_step(self, batch: tuple[Tensor, Tensor], step: int) -> None:
        labels_N, tiles_NHW3 = batch
        self._loss("val", self(tiles_NHW3).float(), labels_N)

    def _loss(self, role: str, logits_NC: Tensor, labels_N: Tensor) -> Tensor:
        """Weighted mean cross-entropy, and the running sums of the epoch."""
        weights_N = self.class_weights_C[labels_N]
        losses_N = cross_entropy(logits_NC, labels_N, reduction="none") * weights_N
        right = (logits_NC.argmax(dim=1) == labels_N).sum()
        sums = torch.stack([losses_N.detach().sum(), weights_N.sum(), right.float()])
        self._sums[role] += sums.double().cpu().numpy()
        return losses_N.sum() / weights_N.sum()

    # --- epochs -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Row 0 of the history: the head as the probe left it."""
        with torch.inference_mode(), torch.autocast(self.device.type, self.job.encoder.dtype, self._uses_autocast()):
            for labels_N, tiles_NHW3 in self.val_dataloader():
                logits_NC = self(tiles_NHW3.to(self.device)).float()
                self._loss("val", logits_NC, labels_N.to(self.device))
        self._record(epoch=0)

    def _uses_autocast(self) -> bool:
        return self.job.encoder.dtype is not None

    def on_train_epoch_start(self) -> None:
        """Validation restores whatever modes it found; what is frozen must never be in training mode."""
        full = self.job.config.mode == "full"
        self.network.train(full)
        if not full:
            train_dropout(self.network, on=True)

    def on_train_epoch_end(self) -> None:
        epoch = self.current_epoch + 1
        val_loss = self._record(epoch)
        if val_loss < self.best_loss or epoch == 1:
            self.best_epoch, self.best_loss = epoch, val_loss
            self.best = {name: t.detach().clone() for name, t in self._learned()}
        if epoch - self.best_epoch >= self.settings.patience:
            self.trainer.should_stop = True

    def _record(self, epoch: int) -> float:
        (train, train_weight, _), (val, val_weight, right) = self._sums["train"], self._sums["val"]
        n_val = len(self.job.tiles.rows("val"))
        val_loss = float(val / val_weight)
        if not np.isfinite([train, val_loss]).all():
            lr = self.settings.lr or DEFAULT_LR[self.job.config.mode]
            raise TrainingError(
                "training diverged",
                [f"epoch {epoch}: train loss {train:g}, val loss {val_loss:g}; use a lower train.lr (now {lr:g})"],
            )
        row = {
            "epoch": epoch,
            "train_loss": float(train / train_weight) if train_weight else None,
            "val_loss": val_loss,
            "val_accuracy": float(right / n_val),
        }
        self.history.append(row)
        self._sums = {"train": np.zeros(3), "val": np.zeros(3)}
        return val_loss

    def _learned(self) -> Iterator[tuple[str, Tensor]]:
        """Weights that learn, and for mode=full also the running statistics of norms."""
        yield from ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        if self.job.config.mode == "full":
            yield from self.network.named_buffers(prefix="network")

    def keep_best(self) -> None:
        """After training: the weights of the best epoch, and evaluation mode."""
        with torch.no_grad():
            for name, tensor in self._learned():
                tensor.copy_(self.best[name])
        self.eval()

    def configure_optimizers(self) -> Any:
        settings = self.settings
        lr = settings.lr or DEFAULT_LR[self.job.config.mode]
        encoder = [p for p in self.network.parameters() if p.requires_grad]
        groups = [{"params": encoder, "lr": lr}, {"params": list(self.head.parameters()), "lr": settings.head_lr}]
        optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        n_steps = settings.epochs * len(self.train_dataloader())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_factor(step, n_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int, n_steps: int) -> float:
        """Rises over the warm-up, then falls as half a cosine or stays."""
        warm = self.settings.warmup * n_steps
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1.0, n_steps - warm))))


def tune(job: Job, probe: Probe) -> Tuned:
    """Train on `train`, stop on `val`."""
    config, network = job.config, job.encoder.network
    adapter = None
    if config.mode == "lora":
        adapter = add_lora(network, config.lora, config.seed)
    else:
        network.requires_grad_(True)
    if config.train.checkpointing:
        network.set_grad_checkpointing(True)
    module = TileModule(job, probe)
    began = time.perf_counter()
    with torch.random.fork_rng(), quiet_lightning(QUIET), alone():
        torch.manual_seed(config.seed)  # LoRA's dropout
        fit(trainer_for(job), module)
    seconds = time.perf_counter() - began
    module.keep_best()
    if config.train.checkpointing:
        network.set_grad_checkpointing(False)
    network.to(job.encoder.device)  # Lightning takes it off the GPU
    return Tuned(module, adapter, seconds)


def fit(trainer: lightning.Trainer, module: TileModule) -> None:
    with ctrl_c(trainer):
        trainer.fit(module)


def trainer_for(job: Job) -> lightning.Trainer:
    """A Trainer on the encoder's device and in its precision that writes nothing."""
    device, dtype = job.encoder.device, job.encoder.dtype
    precision = {None: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[dtype]
    callbacks: list[Callback] = [TQDMProgressBar(refresh_rate=1)] if sys.stderr.isatty() else []
    return lightning.Trainer(
        max_epochs=job.config.train.epochs,
        **on_one_device(device),
        precision=precision,  # type: ignore[arg-type]  # Lightning's Literal, checked by the config
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=bool(callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        deterministic="warn",
    )


# --- results -------------------------------------------------------------------------------------------------------


def logits_on_test(
    job: Job, before_ND: np.ndarray, probe: Probe, after_ND: np.ndarray, tuned: Tuned | None
) -> dict[str, np.ndarray]:
    """logits_NC of the test tiles by each row of the table: the frozen encoder always, then what was trained."""
    test = job.tiles.rows("test")
    logits = {FROZEN: probe.logits(before_ND[test])}
    if tuned is not None:
        weight_CD, bias_C = head_weights(tuned)
        logits[f"{job.config.mode} fine-tuned + its head"] = after_ND[test] @ weight_CD.T + bias_C
        logits[f"{job.config.mode} fine-tuned + linear probe"] = probe_on(job, after_ND).logits(after_ND[test])
    else:
        train = job.tiles.rows("train")
        logits[KNN] = knn_logits(before_ND[train], job.tiles.labels_N[train], before_ND[test], job.n_classes)
    return logits


def head_weights(tuned: Tuned) -> tuple[np.ndarray, np.ndarray]:
    """weight_CD and bias_C of the trained head."""
    head = tuned.module.head
    return head.weight.detach().cpu().numpy(), head.bias.detach().cpu().numpy()


def training_notes(probe: Probe, tuned: Tuned | None) -> list[str]:
    """What a reader should know about how training went."""
    notes = [] if probe.converged else ["the frozen encoder's linear probe did not converge"]
    if tuned is not None and tuned.module.best_loss > (start := tuned.module.history[0]["val_loss"]):
        notes.append(
            f"no epoch reached the val loss of the frozen encoder's probe ({start:.3f}; best "
            f"{tuned.module.best_loss:.3f} in epoch {tuned.module.best_epoch}): fine-tuning has not helped here; try a "
            "lower train.lr or more epochs"
        )
    return notes


def score(job: Job, logits: dict[str, np.ndarray], tuned: Tuned | None) -> dict[str, Any]:
    """metrics.json: what was trained, on how much, and the test scores of every row of the table."""
    config, tiles = job.config, job.tiles
    test = tiles.rows("test")
    counts = {
        role: {
            "tiles": len(rows),
            "groups": len(np.unique(tiles.groups_N[rows])),
            "by_class": np.bincount(tiles.labels_N[rows], minlength=job.n_classes).tolist(),
        }
        for role in ROLES
        if len(rows := tiles.rows(role))
    }
    base = sum(p.numel() for name, p in job.encoder.network.named_parameters() if ".lora_" not in name)
    learned = n_trainable(job.encoder.network, config.lora.targets if config.mode == "lora" else "") if tuned else 0
    return {
        "mode": config.mode,
        "encoder": job.encoder.id,
        "classes": list(tiles.classes),
        "grouped": tiles.grouped,
        "counts": counts,
        "encoder_parameters": base,
        "trainable_parameters": learned,
        "trainable_fraction": learned / base,
        "head_parameters": (job.encoder.spec.dim + 1) * job.n_classes,
        "best_epoch": tuned.module.best_epoch if tuned else None,
        "epochs": tuned.module.history[-1]["epoch"] if tuned else None,
        "bootstrap": {"resamples": config.bootstrap, "of": "groups" if tiles.grouped else "tiles"},
        "baseline": FROZEN,
        "test": score_table(
            tiles.labels_N[test],
            {name: logits_NC.argmax(axis=1) for name, logits_NC in logits.items()},
            tiles.groups_N[test],
            job.n_classes,
            config.bootstrap,
            config.seed,
            FROZEN,
        ),
    }


def write_encoder(job: Job, tuned: Tuned | None, probe: Probe, folder: Path) -> None:
    """adapter/ (lora) or encoder.safetensors (full), and head.safetensors: weight, bias, class names."""
    weight_CD, bias_C = (probe.weight_CD, probe.bias_C) if tuned is None else head_weights(tuned)
    head = {"weight": torch.from_numpy(weight_CD).float().contiguous(), "bias": torch.from_numpy(bias_C).float()}
    about = {"classes": json.dumps(list(job.tiles.classes)), "encoder": job.encoder.id}
    write_tensors(folder / "head.safetensors", head, about)
    if tuned is not None and job.config.mode == "lora":
        save_adapter(tuned.adapter, folder / "adapter", job.encoder.id, job.base_sha256)
    elif tuned is not None:
        state = {name: t.detach().cpu().contiguous() for name, t in job.encoder.network.state_dict().items()}
        about = {"encoder": job.encoder.id, "fine-tuned by": "slide-mil"}
        write_tensors(folder / "encoder.safetensors", state, about)


def write_tables(job: Job, logits: dict[str, np.ndarray], tuned: Tuned | None, folder: Path) -> None:
    """split.csv (every tile and its role), predictions.csv (test tiles, every model), history.csv."""
    test = job.tiles.table.iloc[job.tiles.rows("test")]
    parts = []
    for name, logits_NC in logits.items():
        p_NC = torch.from_numpy(logits_NC).double().softmax(dim=1).numpy()
        table = test.loc[:, ["image", "label", "group"]].assign(model=name)
        table["predicted"] = np.array(job.tiles.classes, dtype=object)[p_NC.argmax(axis=1)]
        parts.append(table.assign(**{f"p_{c}": p_NC[:, c] for c in range(job.n_classes)}))
    tables = {"split.csv": job.tiles.table, "predictions.csv": pd.concat(parts)}
    if tuned is not None:
        tables["history.csv"] = pd.DataFrame(tuned.module.history)
    for file, table in tables.items():
        write_csv(table, folder / file)


def describe_environment(job: Job, command: Sequence[str]) -> dict[str, Any]:
    """Where the numbers come from."""
    packages = ("torch", "timm", "peft", "lightning", "scikit-learn", "numpy")
    device = job.encoder.device
    return {
        "slide-mil": toolkit_version(),
        "command": " ".join(command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": "float32" if job.encoder.dtype is None else str(job.encoder.dtype).removeprefix("torch."),
        "torch_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
        "encoder": {
            "name": job.encoder.id,
            "source": job.encoder.source,
            "weights_sha256": job.encoder.weights_sha256,
            "base_sha256": job.base_sha256,
            "licence": job.encoder.spec.licence,
        },
        "seed": job.config.seed,
    }
