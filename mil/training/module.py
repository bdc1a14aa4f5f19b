"""The LightningModule that trains every member of a plan in one `Trainer.fit`. The only door to Lightning.

Axes: M members, B bags of a batch, S slides, C outputs (1 for two classes).
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torchmetrics.functional.classification import multiclass_auroc

from extract.digest import sealed, unsealed
from extract.finetuning.one_device import alone, ctrl_c, device_of, on_one_device
from extract.quiet import quiet_lightning
from extract.whole import write_whole
from mil.aggregators.batch import Batch, Prediction
from mil.aggregators.contract import Aggregator
from mil.aggregators.layers import cross_entropy, labels_of_members
from mil.aggregators.places import without_autocast
from mil.aggregators.threads import a_thread_a_bag
from mil.config import Train
from mil.tasks.metrics import auc
from mil.training.bags import Bags, EvaluationSteps, TrainingSteps
from mil.training.device import DeviceFeatures, Gathered, device_features
from mil.training.events import rewrite_events
from mil.training.optim import MemberAdam
from mil.training.precision import precision_on, tf32

CHECKPOINT = "last.ckpt"
Rows = dict[int, dict[str, float]]
"""Curves: by epoch, then by curve and member."""
QUIET = (
    ".*Checkpoint directory .* exists.*",
    ".*exists and is not empty.*",
    ".*dirpath has changed from .*",  # the run folder was moved; the file to go on from is named, not remembered
    ".*Total length of .* is zero.*",  # resumed after all members had stopped
)


@dataclass(frozen=True)
class Members:
    """The members of one pass: hyper-parameters (M,) and the slides each trains on and selects on (M, S).

    epochs_M: after how many epochs each stops, at most those of the settings; None = all of them.
    labels_MS: each member's own labels (class index, -1 where it uses no such slide); None = the same labels for all.
    site_S: 1..K, 0 where unknown; what train.harmonize takes out, None without it.
    logged_M: whose curves are logged; None = everyone's.
    """

    lr_M: np.ndarray
    weight_decay_M: np.ndarray
    train_MS: np.ndarray
    val_MS: np.ndarray
    epochs_M: np.ndarray | None = None
    labels_MS: np.ndarray | None = None
    site_S: np.ndarray | None = None
    logged_M: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lr_M)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there. Lightning's go through a temporary folder, which may be another disk."""

    def __init__(self, before_writing: Callable[[], None], write: Callable[[Path, bytes], object]):
        self.before_writing, self.write = before_writing, write

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.before_writing()
        self.write(Path(path), saved(checkpoint))


def saved(content: Any) -> bytes:
    """What `torch.save` writes, with its digest behind it; in memory, as its own errors of writing say nothing."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return sealed(buffer.getbuffer())


def read_back(path: Path) -> Any:
    """What `saved` was given. None, which is said, where that is not what is in the file: it is to be made again."""
    content = unsealed(path.read_bytes())
    if content is None:
        what = f"{path}: damaged, or of an older version (its checksum is not that of its content)"
        print(f"warning: {what}. It is not used: this part is trained again, from its first epoch", file=sys.stderr)
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class Pass(lightning.LightningModule):
    """What one `Trainer.fit` trains: members of one kind, or of several side by side (`mil.training.panel`)."""

    @property
    def parts(self) -> list[MembersModule]:
        """Members of one kind each."""
        raise NotImplementedError  # a subclass has it


class MembersModule(Pass):
    """M members that train side by side and never touch each other.

    Their losses are summed: member i's parameters appear in member i's loss alone, so each gets its own gradient.
    Reported slides (role test) are not in here at all: training sees `train`, selection sees `val`.

    Attributes:
        history: one row per member and epoch: member, epoch (1-based), train_loss, train_auc, val_loss, val_auc.
        diverged_M: the epoch in which a member's loss or weights stopped being finite numbers, 0 for members that are
            sound. Such a member trains no further; the others go on.
        metric_name: what `train_auc` and `val_auc` are called for a task with another metric.
        best_epoch_M: epochs of training behind the kept weights (select=best), or trained so far (select=last).
        first_member: the number that history and curves call the first one by.
    """

    metric_name, first_member = "auc", 0
    adam: MemberAdam

    def __init__(
        self,
        aggregator: Aggregator,
        bags: Bags,
        labels_S: np.ndarray,
        n_classes: int,
        members: Members,
        settings: Train,
        *,
        seed: int = 0,
        max_tiles: int | None = None,
    ):
        super().__init__()
        self.aggregator, self.bags, self.labels_S, self.n_classes = aggregator, bags, labels_S, n_classes
        self.members, self.settings, self.seed, self.max_tiles = members, settings, seed, max_tiles
        n_members, n_outputs = len(members), aggregator.n_outputs
        self.labels_MS = np.broadcast_to(labels_S, (n_members, len(bags)))
        if members.labels_MS is not None:
            self.labels_MS = members.labels_MS
            self._refuse_unlabelled()
        self._refuse_blind_selection()
        self.history: list[dict[str, Any]] = []
        self.active_M = np.ones(n_members, dtype=bool)
        self.diverged_M = np.zeros(n_members, dtype=np.int64)
        self.best_epoch_M = np.zeros(n_members, dtype=np.int64)
        self.best_value_M = np.full(n_members, -np.inf)
        self.best: dict[str, Tensor] = {}
        self.class_weights_MC = torch.from_numpy(self._class_weights()).float()
        self.logits_MSC = torch.zeros(n_members, len(bags), n_outputs)
        self.losses_MS = torch.full((n_members, len(bags)), torch.nan)
        self.gathered: Gathered | None = None

    @property
    def parts(self) -> list[MembersModule]:
        return [self]

    def _refuse_unlabelled(self) -> None:
        """Members with labels of their own must have one for each slide that they train or select on."""
        if self.labels_MS.shape != self.members.train_MS.shape:
            raise ValueError(f"expected labels of {self.members.train_MS.shape}, got {self.labels_MS.shape}")
        missing_MS = (self.members.train_MS | self.members.val_MS) & (self.labels_MS < 0)
        if missing_MS.any():
            m, slide = np.argwhere(missing_MS)[0]
            raise ValueError(f"member {m}: expected a label of each train and val slide, got none for row {slide}")

    def _refuse_blind_selection(self) -> None:
        """select=best needs val slides of every member, of all classes for the AUC; else it would keep epoch 1."""
        if self.settings.select == "last":
            return
        needed = self.n_classes if self.settings.metric == "auc" else 1
        for m, val_S in enumerate(self.members.val_MS):
            found = len(np.unique(self.labels_MS[m, val_S]))
            if found < needed:
                raise ValueError(
                    f"member {m}: select=best with metric={self.settings.metric} needs val slides of {needed} "
                    f"class(es), got {found}; set study.val_fraction, or train.select=last"
                )

    # --- data -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainingSteps:
        return TrainingSteps(
            self.bags,
            self.labels_S,
            self.members.train_MS,
            self.settings.batch_size,
            self.seed,
            epoch=lambda: self.current_epoch,
            active_M=lambda: self.active_M,
            max_tiles=self.max_tiles,
            labels_MS=self.members.labels_MS,
            there=self.there(),
        )

    def val_dataloader(self) -> EvaluationSteps:
        uses_MS = self.members.val_MS & self.active_M[:, None]  # nobody pays for another's val slides
        return self.evaluation_steps(np.flatnonzero(uses_MS.any(axis=0)).tolist(), uses_MS)

    def evaluation_steps(self, slides: list[int], uses_MS: np.ndarray | None = None) -> EvaluationSteps:
        return EvaluationSteps(
            self.bags,
            self.labels_S,
            slides,
            len(self.members),
            uses_MS=uses_MS,
            labels_MS=self.members.labels_MS,
            there=self.there(),
        )

    def there(self) -> DeviceFeatures | None:
        """The features on the device that trains; None on a CPU, unless data.memory=device."""
        return device_features(self.bags, self.trainer.strategy.root_device)

    # --- steps ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, step: int) -> Tensor:
        prediction = self.predicted(batch)
        loss_M = self.minimised(prediction, batch)
        logits_MBC = prediction.logits_MBC.detach().float()
        # what is recorded is comparable with the val loss, whatever else an aggregator minimises
        self._record(batch, logits_MBC, self.recorded(logits_MBC, batch))
        if batch.places:
            self.adam.step_only(batch.places.active_M, batch.uses_MB.any(dim=1))
        else:
            self.adam.active_M = batch.uses_MB.any(dim=1).cpu()
        return loss_M.sum()

    def predicted(self, batch: Batch) -> Prediction:
        """What the members say, when the batch has arrived where they are."""
        if batch.places:
            batch.places.arrive()
        said: Prediction = self.aggregator(batch)
        return said

    def minimised(self, prediction: Prediction, batch: Batch) -> Tensor:
        """The loss of every member on the bags that it uses, weighted by class, (M,)."""
        losses_MB = self.aggregator.losses(prediction, batch.labels)
        labels_MB = labels_of_members(batch.labels, losses_MB)
        weights_MB = self.class_weights_MC.to(self.device).gather(1, labels_MB) * batch.uses_MB
        loss_M: Tensor = (losses_MB * weights_MB).sum(dim=1) / weights_MB.sum(dim=1).clamp_min(1e-12)
        return loss_M

    def recorded(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        """What history's loss is the mean of, (M, B)."""
        return self.losses(logits_MBC, batch.labels)

    def validation_step(self, batch: Batch, step: int) -> None:
        with without_autocast(self.device):  # bfloat16 would tie slides that differ
            logits_MBC = self.predicted(batch).logits_MBC.float()
        self._record(batch, logits_MBC, self.recorded(logits_MBC, batch))

    def predict_step(self, batch: Batch, step: int) -> Tensor:
        return self.predicted(batch).logits_MBC.float().cpu()

    def losses(self, logits_MBC: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every member on every bag, (M, B); one logit = binary cross-entropy."""
        return cross_entropy(logits_MBC, labels)

    def _record(self, batch: Batch, logits_MBC: Tensor, losses_MB: Tensor) -> None:
        """Remember what the members said; a slide's entry is only overwritten by members that use it."""
        if batch.places:
            if self.gathered is None:
                self.gathered = Gathered(self.logits_MSC, self.losses_MS, logits_MBC.device)
            self.gathered.put(batch, logits_MBC, losses_MB)
            return
        uses_MB, slides_B = batch.uses_MB.cpu(), batch.slides_B.cpu()
        kept_MBC = torch.where(uses_MB.unsqueeze(2), logits_MBC.cpu(), self.logits_MSC[:, slides_B])
        self.logits_MSC[:, slides_B] = kept_MBC
        self.losses_MS[:, slides_B] = torch.where(uses_MB, losses_MB.cpu(), self.losses_MS[:, slides_B])

    # --- epochs -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.class_weights_MC = self.class_weights_MC.to(self.device)
        if self.settings.compile:
            optimizer: Any = self.trainer.optimizers[0]  # MemberAdam, whose shapes are the same in every step
            optimizer.where = torch.compile(optimizer.where)

    def on_train_start(self) -> None:
        if self.members.site_S is not None and self.aggregator.harmonized != "none":
            self._harmonize(self.members.site_S)
        elif self.settings.standardize and not self.aggregator.standardized:  # a warm start brings its own moments
            self._standardize()

    def _harmonize(self, site_S: np.ndarray) -> None:
        from mil.training.harmonize import harmonize_members

        members, standardize = self.members, self.settings.standardize
        harmonize_members(self.aggregator, self.bags, members.train_MS, self.labels_MS, site_S, standardize=standardize)

    def _standardize(self) -> None:
        from mil.training.bags import training_moments

        mean_MD, std_MD = training_moments(self.bags, self.members.train_MS)
        self.aggregator.standardize(mean_MD.to(self.device), std_MD.to(self.device))

    def on_train_epoch_start(self) -> None:
        self.aggregator.epoch = self.current_epoch
        self.losses_MS.fill_(torch.nan)
        if self.gathered:
            self.gathered.forget()

    def _read(self) -> None:
        """What was gathered on the device, once an epoch."""
        if self.gathered:
            self.logits_MSC, self.losses_MS = self.gathered.read()

    def on_validation_epoch_start(self) -> None:
        """Validation writes over nothing: a member's val slides are not its training slides."""
        self._read()
        self._train_losses = self._mean_losses(self.members.train_MS)
        self._train_auc = self._auc(self.members.train_MS)

    def on_train_epoch_end(self) -> None:
        self._read()
        train, val = self.members.train_MS, self.members.val_MS
        has_val = bool(val.any()) and not self.trainer.sanity_checking
        train_loss_M, train_auc_M = (
            (self._train_losses, self._train_auc) if has_val else (self._mean_losses(train), self._auc(train))
        )
        nothing = np.full(len(self.members), np.nan)
        val_loss_M, val_auc_M = (self._mean_losses(val), self._auc(val)) if has_val else (nothing, nothing)
        metric = self.metric_name
        values = {"train_loss": train_loss_M, f"train_{metric}": train_auc_M}
        values |= {"val_loss": val_loss_M, f"val_{metric}": val_auc_M}
        for m in np.flatnonzero(self.active_M):
            row = {name: float(value_M[m]) for name, value_M in values.items()}
            self.history.append({"member": int(m) + self.first_member, "epoch": self.current_epoch + 1, **row})
        newly_M = self.active_M & ~self._sound()
        self.diverged_M[newly_M] = self.current_epoch + 1
        self._select(val_auc_M if self.settings.metric == "auc" else -val_loss_M)
        self._log(values, has_val)
        if newly_M.any():
            self._stop(newly_M)

    def _sound(self) -> np.ndarray:
        """(M,) whether all losses of this epoch and all weights of a member are finite numbers."""
        used_MS = torch.from_numpy(self.members.train_MS | self.members.val_MS)
        sound_M = (torch.isfinite(self.losses_MS) | ~used_MS).all(dim=1)
        each = [torch.isfinite(stack.detach()).flatten(1).all(dim=1) for stack in self.aggregator.parameters()]
        sound_M &= torch.stack(each).all(dim=0).cpu()
        return sound_M.numpy()

    def _select(self, value_M: np.ndarray) -> None:
        """Keep the weights of members that got better on their val slides; stop those that ran out of patience."""
        epoch = self.current_epoch + 1
        if self.settings.select == "last":
            self.best_epoch_M[self.active_M] = epoch
            if self.members.epochs_M is not None:
                self._stop(epoch >= self.members.epochs_M)
            return
        better_M = self.active_M & (np.nan_to_num(value_M, nan=-np.inf) > self.best_value_M) & (self.diverged_M == 0)
        if epoch == 1:
            better_M |= self.active_M  # something must be kept, even where the metric is undefined
        rows = torch.from_numpy(np.flatnonzero(better_M))
        for name, stack in self.aggregator.named_parameters():
            kept = self.best.setdefault(name, stack.detach().clone())
            kept[rows] = stack.detach()[rows]
        self.best_epoch_M[better_M] = epoch
        self.best_value_M = np.where(better_M, value_M, self.best_value_M)
        if self.settings.patience:
            self._stop(epoch - self.best_epoch_M >= self.settings.patience)

    def _stop(self, done_M: np.ndarray) -> None:
        """These members train no further; training ends with the last one."""
        self.active_M &= ~done_M
        if not self.active_M.any():
            self.trainer.should_stop = True

    def _log(self, values: dict[str, np.ndarray], has_val: bool) -> None:
        logged_M = self.active_M if self.members.logged_M is None else self.active_M & self.members.logged_M
        of_train, of_val = f"train_{self.metric_name}", f"val_{self.metric_name}"
        names = ["train_loss", of_train, *(["val_loss", of_val] if has_val else [])]
        first = self.first_member
        each = {f"{name}/member{m + first}": float(values[name][m]) for name in names for m in np.flatnonzero(logged_M)}
        for logger in self.loggers:
            logger.log_metrics(each, step=self.current_epoch + 1)
        shown = values[of_val] if has_val else values[of_train]
        defined = shown[np.isfinite(shown)]
        if len(defined):
            self.show(of_val if has_val else of_train, float(defined.mean()))

    def show(self, name: str, value: float) -> None:
        """On the bar of the pass."""
        self.log(name, value, prog_bar=True, logger=False)

    def _mean_losses(self, which_MS: np.ndarray) -> np.ndarray:
        chosen = torch.where(torch.from_numpy(which_MS), self.losses_MS, torch.nan)
        return chosen.nanmean(dim=1).numpy()

    def _auc(self, which_MS: np.ndarray) -> np.ndarray:
        """AUC of every member over its slides (macro over classes), NaN where a class is missing. For curves."""
        found = np.full(len(self.members), np.nan)
        for m in np.flatnonzero(self.active_M):
            chosen_S = torch.from_numpy(which_MS[m])
            logits_NC, labels_N = self.logits_MSC[m, chosen_S], torch.from_numpy(self.labels_MS[m, which_MS[m]])
            if len(torch.unique(labels_N)) < self.n_classes:
                continue
            if self.n_classes == 2:
                found[m] = auc_of_logits(labels_N.numpy() == 1, logits_NC.squeeze(1).double().numpy())
            else:
                auc = multiclass_auroc(logits_NC.softmax(dim=1), labels_N, self.n_classes, validate_args=False)
                found[m] = auc.item()
        return found

    def _class_weights(self) -> np.ndarray:
        """(M, C): ones, or for each member n / (C * n_c) over its training slides."""
        if self.settings.class_weights == "none":
            return np.ones((len(self.members), self.n_classes))
        counts_MC = np.stack(
            [(self.members.train_MS & (self.labels_MS == c)).sum(axis=1) for c in range(self.n_classes)], axis=1
        )
        weight_MC: np.ndarray = counts_MC.sum(axis=1, keepdims=True) / (self.n_classes * np.maximum(counts_MC, 1))
        return weight_MC

    # --- optimiser, checkpoints -------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        lr_M, decay_M = torch.tensor(self.members.lr_M), torch.tensor(self.members.weight_decay_M)
        decoupled = self.settings.optimizer == "adamw"
        self.adam = MemberAdam(self.aggregator.parameters(), lr_M.float(), decay_M.float(), decoupled=decoupled)
        return scheduled(self.adam, self.settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["members"] = {
            "history": self.history,
            "active": self.active_M.tolist(),
            "diverged": self.diverged_M.tolist(),
            "best_epoch": self.best_epoch_M.tolist(),
            "best_value": self.best_value_M.tolist(),
            "best": self.best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["members"]
        self.history, self.best = state["history"], state["best"]
        self.aggregator.standardized = self.settings.standardize  # on_train_start does not run if training had ended
        self.active_M = np.array(state["active"], dtype=bool)
        self.diverged_M = np.array(state.get("diverged", [0] * len(self.members)), dtype=np.int64)
        self.best_epoch_M = np.array(state["best_epoch"], dtype=np.int64)
        self.best_value_M = np.array(state["best_value"], dtype=float)

    def keep_best(self) -> None:
        """After training with select=best: put the selected weights in place."""
        with torch.no_grad():
            for name, stack in self.aggregator.named_parameters():
                if name in self.best:
                    stack.copy_(self.best[name].to(stack.device))


def scheduled(optimizer: torch.optim.Optimizer, settings: Train) -> Any:
    """The optimiser with what `train.schedule` says, as Lightning takes them."""
    if settings.schedule == "constant":
        return optimizer
    return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)]


def auc_of_logits(truth_N: np.ndarray, logits_N: np.ndarray) -> float:
    """AUC of one member by `mil.tasks.metrics`, exact to float64 so that equal ones compare equal; NaN: diverged."""
    if not np.isfinite(logits_N).all():
        return float("nan")
    return float(auc(truth_N, logits_N, truth_N, np.ones((1, len(truth_N))))[0])


# --- the trainer ---------------------------------------------------------------------------------------------------


def make_trainer(
    settings: Train,
    checkpoints: Path | None,
    logs: Path | None,
    *,
    validate: bool,
    progress: bool = True,
    before_writing: Callable[[], None] = lambda: None,
    write: Callable[[Path, bytes], object] = write_whole,
) -> lightning.Trainer:
    """A Trainer that checkpoints every epoch to one folder and logs to another; None = nothing is written."""
    callbacks: list[Callback] = []
    device = on_one_device(device_of(settings.accelerator))
    device["plugins"].append(WholeCheckpoints(before_writing, write))
    loggers: list[Logger] = []
    if checkpoints:
        name = Path(CHECKPOINT).stem
        callbacks.append(ModelCheckpoint(checkpoints, name, enable_version_counter=False, save_on_train_epoch_end=True))
    if logs and find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(logs, name="", version=""))
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    return lightning.Trainer(
        max_epochs=settings.epochs,
        **device,
        precision=precision_on(settings.precision, device_of(settings.accelerator)),
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=bool(checkpoints),
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=None if validate else 0,
        log_every_n_steps=1,
        reload_dataloaders_every_n_epochs=1,
        deterministic="warn",
    )


def fit(
    module: Pass,
    checkpoints: Path | None = None,
    logs: Path | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    before_writing: Callable[[], None] = lambda: None,
    write: Callable[[Path, bytes], object] = write_whole,
    curves: Callable[[Path | None, Rows, Callable[[], None]], object] | None = None,
) -> None:
    """Train all members of `module`; with `resume`, from the last finished epoch in `checkpoints` if there is one.

    `before_writing` may raise where what is to be written has no place any more. `write` and `curves`: who writes
    checkpoints, and who the curves, which are then not logged while it trains.
    """
    keep = write_rows if curves is None else curves
    checkpoint = checkpoints / CHECKPOINT if checkpoints and resume else None
    with quiet_lightning(QUIET), fresh_memory_as_it_is(), alone():
        validate, settings = any(one.members.val_MS.any() for one in module.parts), module.parts[0].settings
        trainer = make_trainer(
            settings,
            checkpoints,
            logs if curves is None else None,
            validate=validate,
            progress=progress,
            before_writing=before_writing,
            write=write,
        )
        found = str(checkpoint) if checkpoint and checkpoint.exists() and read_back(checkpoint) is not None else None
        try:
            with ctrl_c(trainer), ExitStack() as threads, tf32(settings.precision == "tf32"):
                for one in module.parts:
                    threads.enter_context(threads_on(trainer, one))
                trainer.fit(module, ckpt_path=found, weights_only=True)
        except KeyboardInterrupt:
            keep(logs, rows_of(module), before_writing)
            raise
        keep(logs, rows_of(module), before_writing)
    if settings.select == "best":
        for one in module.parts:
            one.keep_best()


def rows_of(module: Pass) -> Rows:
    """A row an epoch (step), a column a curve and member; of a resumed run from its first epoch on."""
    rows: Rows = {}
    for one, said in [(part, row) for part in module.parts for row in part.history]:
        logged_M = one.members.logged_M
        if logged_M is not None and not logged_M[said["member"] - one.first_member]:
            continue
        row = rows.setdefault(said["epoch"], {"step": said["epoch"]})
        parts = ("train", "val") if one.members.val_MS.any() else ("train",)
        curves = (f"{part}_{what}" for part in parts for what in ("loss", one.metric_name))
        row |= {f"{name}/member{said['member']}": said[name] for name in curves}
    return rows


def write_rows(logs: Path | None, rows: Rows, before_writing: Callable[[], None]) -> None:
    """metrics.csv, and the same for TensorBoard."""
    if logs is None or not rows:
        return
    table = io.StringIO()
    writer = csv.DictWriter(table, sorted({key for row in rows.values() for key in row}), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    before_writing()
    write_whole(logs / "metrics.csv", table.getvalue())
    rewrite_events(logs, rows)


def predict_logits(module: MembersModule, slides: list[int], uses_MS: np.ndarray | None = None) -> np.ndarray:
    """Logits (M, N, C) of every member for the given slides, in evaluation mode, on all tiles, in float32.

    uses_MS: which member is to say something of which slide; the other logits are meaningless. None = all.
    """
    with quiet_lightning(QUIET), alone():
        trainer = lightning.Trainer(
            **on_one_device(device_of(module.settings.accelerator)),
            precision="32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module.trainer = trainer
        with ctrl_c(trainer), threads_on(trainer, module), tf32(False):
            found = trainer.predict(module, module.evaluation_steps(slides, uses_MS))
    return torch.cat(found, dim=1).numpy()  # type: ignore[arg-type]  # one loader: a flat list


def threads_on(trainer: lightning.Trainer, module: MembersModule) -> AbstractContextManager[None]:
    """A thread a bag where a CPU reads the features where they lie; a device takes a group at a time."""
    if device_features(module.bags, trainer.strategy.root_device):
        return nullcontext()
    return a_thread_a_bag(module.aggregator)


@contextmanager
def fresh_memory_as_it_is() -> Iterator[None]:
    """Deterministic algorithms let torch fill all new memory with NaN first, which is a second pass over every bag.

    It only helps to find code that reads what was never written.
    """
    setting: Any = torch.utils.deterministic  # a module that answers for its attribute itself
    before = setting.fill_uninitialized_memory
    setting.fill_uninitialized_memory = False
    try:
        yield
    finally:
        setting.fill_uninitialized_memory = before
