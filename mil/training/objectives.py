"""Tasks other than classification as members train on them: `MembersModule` with another loss and another metric.

Axes: M members, B bags of a batch, S slides, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.cohort import Cohort
from mil.aggregators.batch import Batch, Prediction
from mil.aggregators.contract import Aggregator
from mil.config import Train
from mil.tasks.contract import Facts, Part, Task
from mil.training import losses
from mil.training.bags import Bags, TrainingSteps, steps_joined
from mil.training.module import Members, MembersModule


@dataclass(frozen=True)
class Asked:
    """What `n` members of a pass, one behind the other, are asked: a cohort with their target, and its task."""

    cohort: Cohort
    task: Task
    n: int


class TaskModule(MembersModule):
    """Members of a task. A subclass says what a bag costs; where bags cost only together, what a batch does.

    An aggregator with several streams, such as DSMIL, has the task's loss on each (`Aggregator.readings`).
    """

    def __init__(
        self,
        aggregator: Aggregator,
        bags: Bags,
        cohort: Cohort,
        task: Task,
        members: Members,
        settings: Train,
        facts: Facts,
        *,
        seed: int = 0,
        max_tiles: int | None = None,
        asked: Sequence[Asked] = (),
    ):
        self.task, self.cohort, self.metric_name = task, cohort, task.main
        self.asked = list(asked) or [Asked(cohort, task, len(members))]
        self.targets = self._targets(facts)
        self.targets_there: dict[str, Tensor] = {}
        n_classes = max(1, len(cohort.classes))
        labels_S = np.maximum(cohort.labels_S, 0)  # torchmil's models ask for labels; nothing here does
        super().__init__(
            aggregator, bags, labels_S, n_classes, members, settings, seed=seed, max_tiles=max_tiles
        )  # fmt: skip
        self.facts = facts
        self.logits_MSC = torch.zeros(len(members), len(bags), aggregator.n_logits)

    def _targets(self, facts: Facts) -> dict[str, Tensor]:
        """What the loss looks at: (S,), or (M, S) where members have targets of their own."""
        if len(self.asked) == 1:
            found = self.targets_of(self.asked[0].cohort, facts)
            return {name: torch.from_numpy(values) for name, values in found.items()}
        stacks: dict[str, list[np.ndarray]] = {}
        first = 0
        for own in self.asked:
            part = {name: values[first : first + own.n] for name, values in facts.items()}
            for name, values in self.targets_of(own.cohort, part).items():
                stacks.setdefault(name, []).append(np.broadcast_to(values, (own.n, len(own.cohort))))
            first += own.n
        return {name: torch.from_numpy(np.concatenate(values)) for name, values in stacks.items()}

    def asked_of(self, member: int) -> Asked:
        ends = np.cumsum([own.n for own in self.asked])
        return self.asked[int(np.searchsorted(ends, member, side="right"))]

    def target_of(self, name: str, member: int) -> Tensor:
        """One member's target, (S,)."""
        values = self.targets[name]
        return values if values.ndim == 1 else values[member]

    def targets_of(self, cohort: Cohort, facts: Facts) -> dict[str, np.ndarray]:
        """Arrays (S,) or (M, S) that the loss looks at."""
        raise NotImplementedError  # every subclass has it

    def of_batch(self, name: str, batch: Batch) -> Tensor:
        """A target of the batch's slides, (B,) or (M, B)."""
        if batch.places is None:
            return self.targets[name][..., batch.slides_B]
        if name not in self.targets_there:
            self.targets_there[name] = on_device(self.targets[name], batch.slides_B.device)
        return self.targets_there[name][..., batch.slides_B]

    def bag_losses(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        """(M, B)"""
        raise NotImplementedError  # a subclass has this, or batch_losses and recorded

    def batch_losses(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        """What a member minimises of one stream, (M,): the mean over its bags."""
        losses_MB = self.bag_losses(logits_MBC.float(), batch) * batch.uses_MB
        mean_M: Tensor = losses_MB.sum(dim=1) / batch.uses_MB.sum(dim=1).clamp_min(1)
        return mean_M

    # --- what differs from classification

    def _refuse_blind_selection(self) -> None:
        """That val slides have what the task's metric needs is checked with the folds (`mil.study.targets`)."""
        without = np.flatnonzero(~self.members.val_MS.any(axis=1))
        if self.settings.select == "best" and len(without):
            raise ValueError(f"member {without[0]}: select=best needs val slides; set study.val_fraction")

    def _class_weights(self) -> np.ndarray:
        return np.ones((len(self.members), self.n_classes))

    def minimised(self, prediction: Prediction, batch: Batch) -> Tensor:
        readings = self.aggregator.readings(prediction)
        return torch.stack([weight * self.batch_losses(logits_MBC, batch) for weight, logits_MBC in readings]).sum(
            dim=0
        )

    def recorded(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        return self.bag_losses(logits_MBC, batch)

    def _auc(self, which_MS: np.ndarray) -> np.ndarray:
        """The task's own metric of every member over its slides; NaN where it is undefined."""
        found = np.full(len(self.members), np.nan)
        logits_MSC = self.logits_MSC.numpy()
        for m in np.flatnonzero(self.active_M & which_MS.any(axis=1)):
            if np.isfinite(logits_MSC[m, which_MS[m]]).all():
                found[m] = self.metric_of(logits_MSC[m, which_MS[m]], int(m), which_MS[m])
        return found

    def metric_of(self, logits_NC: np.ndarray, member: int, which_S: np.ndarray) -> float:
        """`Task.main` of one member's slides."""
        own = self.asked_of(member)
        table = own.cohort.table[which_S].assign(members=1)
        facts = self.scale(logits_NC) | {name: values[member] for name, values in self.facts.items()}
        said = own.task.predicted(logits_NC, facts)
        units = own.task.units(table.assign(**said))
        part = Part(units, table)
        return float(own.task.score([part], [np.ones((1, len(units)))], [own.task.main])[own.task.main][0])

    def scale(self, logits_NC: np.ndarray) -> dict[str, Any]:
        """Facts that are known only after training and do not change a rank."""
        return {}


class RegressionModule(TaskModule):
    """Targets standardised on each member's training slides."""

    def targets_of(self, cohort: Cohort, facts: Facts) -> dict[str, np.ndarray]:
        value_S = np.nan_to_num(cohort.table["value"].to_numpy(dtype=float))
        value_MS = (value_S - facts["mean"][:, None]) / facts["sd"][:, None]
        return {"value": value_MS.astype(np.float32)}

    def bag_losses(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        return losses.regression(logits_MBC, self.of_batch("value", batch), self.task.config.loss or "mse")


class OrdinalModule(TaskModule):
    """CORAL. The members' cuts begin at the log-odds of their training slides' grades, or where a start puts them."""

    def __init__(self, aggregator: Aggregator, *arguments: Any, **options: Any):
        super().__init__(aggregator, *arguments, **options)
        if not aggregator.cuts_given:
            aggregator.place_cuts(torch.from_numpy(self.facts["cuts"]).float())

    def targets_of(self, cohort: Cohort, facts: Facts) -> dict[str, np.ndarray]:
        return {"grade": cohort.labels_S}

    def bag_losses(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        return losses.coral(logits_MBC, self.of_batch("grade", batch))


class SurvivalModule(TaskModule):
    """Of risks only the order counts while a member trains."""

    def scale(self, logits_NC: np.ndarray) -> dict[str, Any]:
        return {"risk_median": 0.0, "risk_sd": 1.0}


class DiscreteModule(SurvivalModule):
    """Survival in each member's own time intervals."""

    def targets_of(self, cohort: Cohort, facts: Facts) -> dict[str, np.ndarray]:
        time_S = np.nan_to_num(cohort.table["time"].to_numpy(dtype=float))
        event_S = np.nan_to_num(cohort.table["event"].to_numpy(dtype=float))
        interval_MS = np.stack([np.searchsorted(edges, time_S, side="left") for edges in facts["edges"]])
        return {"interval": interval_MS, "event": event_S.astype(np.float32)}

    def bag_losses(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        return losses.discrete_time(logits_MBC, self.of_batch("interval", batch), self.of_batch("event", batch))


class CoxModule(SurvivalModule):
    """Cox's partial likelihood over a member's batch; a batch without an event is joined to the next."""

    def targets_of(self, cohort: Cohort, facts: Facts) -> dict[str, np.ndarray]:
        return {
            "time": np.nan_to_num(cohort.table["time"].to_numpy(dtype=np.float64)),
            "event": np.nan_to_num(cohort.table["event"].to_numpy(dtype=np.float32)),
        }

    def train_dataloader(self) -> TrainingSteps:
        return steps_joined(super().train_dataloader(), self.targets["event"].numpy() > 0)

    def batch_losses(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        targets = (self.of_batch("time", batch), self.of_batch("event", batch))
        return losses.cox_efron(logits_MBC.float().squeeze(2), *targets, batch.uses_MB.to(logits_MBC.device))

    def recorded(self, logits_MBC: Tensor, batch: Batch) -> Tensor:
        """The loss is of all slides together, see `_mean_losses`; here whether risks are numbers."""
        return logits_MBC.squeeze(2)

    def _mean_losses(self, which_MS: np.ndarray) -> np.ndarray:
        """The partial likelihood of all slides at once, which does not depend on how they were put into batches."""
        found = np.full(len(self.members), np.nan)
        for m in np.flatnonzero(which_MS.any(axis=1)):
            own_S = torch.from_numpy(which_MS[m])
            time_N, event_N = (self.target_of(name, int(m))[own_S] for name in ("time", "event"))
            everything = torch.ones(1, int(own_S.sum()), dtype=torch.bool)
            found[m] = losses.cox_efron(self.logits_MSC[m, own_S].T, time_N, event_N, everything).item()
        return found


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Targets on a device. Apple's knows no float64: there times are ranks, as only their order is asked for."""
    if device.type == "mps" and values.dtype == torch.float64:
        ranks: Tensor = values.unique(return_inverse=True)[1]
        return ranks.float().to(device)
    return values.to(device)


def module_of(task: Task) -> Callable[..., TaskModule]:
    """The module that trains a task."""
    if task.name == "survival":
        return DiscreteModule if task.config.loss == "discrete" else CoxModule
    return {"regression": RegressionModule, "ordinal": OrdinalModule}[task.name]


def notes_on_batches(cohort: Cohort, train_MS: np.ndarray, batch_size: int, seed: int, epochs: int) -> list[str]:
    """How many batches have no event and are joined to the next, in words; nothing where none has."""
    event_S = cohort.table["event"].to_numpy(dtype=float) == 1
    n_batches = n_joined = 0
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(event_S))
        order = order[np.asarray(train_MS.any(axis=0))[order]]
        for train_S in train_MS:
            own = event_S[order[train_S[order]]]
            batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
            n_batches += len(batches)
            n_joined += sum(not batch.any() for batch in batches)
    if not n_joined:
        return []
    return [
        f"{n_joined} of {n_batches} batches of train.batch_size={batch_size} slides have no event, from which Cox's "
        "loss learns nothing: each is joined to the next one of its epoch (the last to the one before). Larger batches "
        "have it less often"
    ]
