"""The second chapter: members in as many passes as memory asks for, and the choices of inner folds."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from extract.finetuning.one_device import device_of
from extract.room import free_bytes
from extract.tables import write_csv
from extract.whole import write_whole
from extract.wording import at_most, count
from mil.aggregators import aggregator_class
from mil.aggregators.contract import Aggregator
from mil.aggregators.fused import Fused
from mil.config import Train, model_options
from mil.pipeline.cluster import passes_on_ray
from mil.pipeline.data import Study, cells_of, inner_of_permuted, inner_plan_of
from mil.pipeline.passes import Hands, Most, free_memory, n_devices, run_passes, train_in_halves
from mil.study.covariates import moments
from mil.study.learning_curve import joined
from mil.study.nested import choose, refit_plan
from mil.study.roles import Plan
from mil.study.saved import save_plan
from mil.training.covariates import CovariatesAlone, fit_alone, start_from
from mil.training.device import DeviceFeatures, device_features
from mil.training.measuring import Meter, cuda_meter, peak_of_a_step
from mil.training.module import CHECKPOINT, Members, MembersModule, fit, predict_logits, read_back, saved
from mil.training.objectives import Asked, module_of

PASSES = "passes.pt"
"""In the folder of checkpoints: the members of each pass, as rows of the plan."""
ACTIVATION_SHARE = 0.25
"""`members_per_pass=auto`: activations of one step take at most this share of the free memory."""
MEASURED_SHARE = 0.85
"""The same where they were measured; batches differ a little."""
MOST = "members that a pass may have"
"""In `Study.once`."""


@dataclass(frozen=True)
class Trained:
    """What training leaves, members in the plan's order. `epochs`: behind the kept weights of each.

    `diverged`: the epoch in which each stopped being finite numbers, 0 = it did not.
    """

    plan: Plan
    state: dict[str, torch.Tensor]
    logits_MSC: np.ndarray
    history: pd.DataFrame
    epochs: list[int]
    diverged: list[int]

    def part(self, rows: slice) -> Trained:
        """The members in these rows of the plan."""
        plan = self.plan.subset(np.arange(len(self.plan))[rows])
        own = self.history["member"].isin(plan.members["member"])
        state = {key: stack[rows] for key, stack in self.state.items()}
        kept = (self.logits_MSC[rows], self.history[own], self.epochs[rows], self.diverged[rows])
        return Trained(plan, state, *kept)

    def plan_table(self) -> pd.DataFrame:
        """The members with how long they trained, which epoch was kept, in which they diverged (empty: they did not),
        and how many slides they had in each role."""
        counts = {f"n_{role}": self.plan.uses(role).sum(axis=1) for role in ("train", "val", "test")}
        trained = self.history.groupby("member")["epoch"].max().reindex(self.plan.members["member"]).to_numpy()
        diverged = pd.array([epoch or None for epoch in self.diverged], dtype="Int64")
        return self.plan.members.assign(epochs=trained, best_epoch=self.epochs, diverged=diverged, **counts)


def train_members(study: Study, name: str, folder: Path) -> Trained:
    """All members of the plan, in as many passes as memory asks for."""
    parts = begun_passes(study, name, folder)
    return as_trained(study, parts, train_passes(study, name, folder, parts))


def as_trained(study: Study, parts: list[np.ndarray], passes: list[dict[str, Any]]) -> Trained:
    """What the members of these passes came to, in the plan's order."""
    order = np.argsort(np.concatenate(parts))  # the plan's
    own = np.argsort(np.concatenate([part[part < study.n_own] for part in parts]))  # weights are kept of these alone
    best_epochs = [epoch for p in passes for epoch in p["best_epoch"]]
    none = [[0] * len(part) for part in parts]  # what passes of an earlier version say
    diverged = [epoch for p, never in zip(passes, none, strict=True) for epoch in p.get("diverged", never)]
    return Trained(
        study.plan,
        {key: torch.cat([p["state"][key] for p in passes])[torch.from_numpy(own)] for key in passes[0]["state"]},
        np.concatenate([p["logits"].numpy() for p in passes])[order],
        pd.DataFrame([row for p in passes for row in p["history"]]),
        [best_epochs[i] for i in order],
        [diverged[i] for i in order],
    )


def train_passes(
    study: Study, name: str, folder: Path, parts: list[np.ndarray], *, inner: bool = False
) -> list[dict[str, Any]]:
    """What `train_pass` gives of each part of the members: here, on several devices, or on a cluster."""
    if study.config.run.on == "ray":
        return passes_on_ray(study, name, folder, parts, train_pass, inner=inner)
    return run_passes(train_pass, study, name, folder, parts, inner=inner)


def choose_on_inner_folds(study: Study, name: str, folder: Path) -> pd.DataFrame:
    """Train the inner members and choose; leaves choices.csv and inner/ (plan, roles, history) in the run folder.

    With a permutation test the inner members of permuted labels train with them and choose too: their choices follow in
    the table that comes back, member by member, and are in no file.
    """
    config, inner = study.config, inner_plan_of(study.config, study.plan, study.cohort)
    n_cells = len(cells_of(config))
    print(
        f"{name}: {len(inner)} inner members ({len(study.plan)} outer x {config.study.nested} inner folds x "
        f"{n_cells} {'cell' if n_cells == 1 else 'cells'}), {config.train.epochs} epochs"
    )
    inner_study, inner_folder = with_permuted_inner(study, inner), folder / "inner"
    inner_folder.mkdir(exist_ok=True)
    history = inner_history(inner_study, name, inner_folder)
    return choose_and_keep(study, inner, history, folder, everyone=inner_study.plan)


def inner_history(study: Study, name: str, folder: Path) -> pd.DataFrame:
    """The curves of inner members, which are the study's plan here."""
    parts = begun_passes(study, name, folder)
    passes = train_passes(study, name, folder, parts, inner=True)
    return pd.DataFrame([row for p in passes for row in p["history"]])


def choose_and_keep(
    study: Study, inner: Plan, history: pd.DataFrame, folder: Path, everyone: Plan | None = None
) -> pd.DataFrame:
    """The choice, and the files that say how it was made. everyone: `inner` and those behind them, if there are any."""
    choices = choose(inner if everyone is None else everyone, history, study.task.main)
    inner_folder = folder / "inner"
    study.check_place()
    inner_folder.mkdir(exist_ok=True)
    save_plan(inner, study.cohort, inner_folder)
    tables = ((inner_folder / "history.csv", history, len(inner)), (folder / "choices.csv", choices, len(study.plan)))
    for path, table, own in tables:
        write_csv(table[table["member"] < own], path)
    return choices


def with_permuted_inner(study: Study, inner: Plan) -> Study:
    """The study of its inner members, behind them those of its permutations: all are ordinary members here."""
    if study.permuted is None:
        return replace(study, plan=inner)
    more, labels_MS = inner_of_permuted(study.config, study.permuted, study.cohort, len(study.plan))
    own_MS = np.tile(study.cohort.labels_S, (len(inner), 1))
    both = joined(inner, more)
    plan = replace(both, members=both.members.assign(member=np.arange(len(both))))
    parts = np.array_split(np.arange(len(more)), study.permuted.n)  # each permutation has as many inner members
    targets = study.asked_with_permuted(inner, [more.subset(rows) for rows in parts])
    return replace(study, plan=plan, labels_MS=np.concatenate([own_MS, labels_MS]), permuted=None, targets=targets)


def as_chosen(study: Study, choices: pd.DataFrame) -> Study:
    """The study with every member's chosen settings, those on permuted labels too."""
    n = len(study.plan)
    plan, epochs_M = refit_plan(study.plan, choices[choices["member"] < n])
    if study.permuted is None:
        return replace(study, plan=plan, epochs_M=epochs_M)
    permuted, more_M = refit_plan(study.permuted.plan, choices[choices["member"] >= n])
    return replace(
        study,
        plan=plan,
        permuted=replace(study.permuted, plan=permuted),
        epochs_M=np.concatenate([epochs_M, more_M]),
    )


def begun_passes(study: Study, name: str, folder: Path) -> list[np.ndarray]:
    """`passes_of`, or the same as before where the run is resumed: there may be other memory now, and what was saved of
    a pass is of its members."""
    path = folder / "checkpoints" / PASSES
    if study.config.resume and path.exists() and (before := read_back(path)) is not None:
        return [np.asarray(part, dtype=np.int64) for part in before]
    parts = passes_of(study, name)
    study.check_place()
    shutil.rmtree(path.parent, ignore_errors=True)  # of whom would it be?
    write_whole(path, saved([part.tolist() for part in parts]))
    return parts


def passes_of(study: Study, name: str) -> list[np.ndarray]:
    """Members by pass: of those that train equally long, as many together as memory allows."""
    n, wanted, run = len(study.plan), study.config.train.members_per_pass, study.config.run
    if run.on == "ray" and run.members_per_task:
        wanted = run.members_per_task
    size = members_for_each(study, name) if wanted == "auto" else min(wanted, n)
    length_M = np.zeros(n) if study.length_M is None else study.length_M
    alike = [np.flatnonzero(length_M == length) for length in dict.fromkeys(length_M.tolist())]
    return [part for own in alike for part in np.array_split(own, -(-len(own) // size))]


def settings_of(study: Study, members: np.ndarray) -> Train:
    """How these members train, who are equally long about it; patience is as long in steps as the others'."""
    train = study.config.train
    if study.length_M is None:
        return train
    epochs = int(study.length_M[members[0]])
    patience = train.patience and max(1, round(train.patience * epochs / train.epochs))
    return train.model_copy(update={"epochs": epochs, "patience": patience})


def members_for_each(study: Study, name: str) -> int:
    """As many as memory holds, but on several devices no more than leave a pass for each."""
    return min(members_that_fit(study, name), -(-len(study.plan) // n_devices(study.config.train)))


def members_that_fit(study: Study, name: str) -> int:
    """How many members' activations of one training step fit into a share of the free memory, at least one.

    On a CUDA GPU two steps are made and measured, where there are steps to be made; elsewhere the layers are added up.
    """
    device = device_of(study.config.train.accelerator)
    if device.type != "cuda":
        return int(np.clip(memory_for_activations() // bytes_of_a_member(study, name), 1, len(study.plan)))
    return measured_members(study, name, device, cuda_meter(device))


def measured_members(study: Study, name: str, device: torch.device, meter: Meter) -> int:
    """How many members a device holds, from the most memory that a step of the longest slides took of one and two.

    Features that live on the device are put there first. A step that does not fit leaves one member to a pass.
    """
    there = device_features(study.bags, device) or DeviceFeatures(study.bags, device, None)
    longest = np.argsort(study.bags.lengths_S)[-study.config.train.batch_size :].tolist()
    peaks = []
    for members in (np.arange(min(n, len(study.plan))) for n in (1, 2)):
        try:
            peaks.append(peak_of_a_step(new_module(study, name, members), there, longest, meter))
        except torch.OutOfMemoryError:
            return 1
        free_memory()
    first, second = peaks
    one = max(second - first, 1)
    return int(np.clip(1 + (MEASURED_SHARE * meter.free() - first) // one, 1, len(study.plan)))


def memory_for_activations() -> float:
    """Bytes that one training step may take on a CPU."""
    return ACTIVATION_SHARE * free_bytes()


def pass_bytes(study: Study, name: str) -> int:
    """Of a training step of all members together."""
    return len(study.plan) * bytes_of_a_member(study, name)


def bytes_of_a_member(study: Study, name: str) -> int:
    """Of one member's activations in a training step of the longest slides, and its parameters with their moments."""
    one = new_aggregator(study, name, np.array([0]))
    longest = np.sort(study.bags.lengths_S)[-study.config.train.batch_size :]
    if study.config.data.max_tiles:
        longest = longest.clip(max=study.config.data.max_tiles)
    parameters = sum(p.numel() for p in one.parameters())
    floats = longest.sum() * one.floats_per_tile + len(longest) * one.floats_per_bag + 4 * parameters
    return int(4 * floats)


def new_aggregator(study: Study, name: str, members: np.ndarray) -> Any:
    """These members' aggregator as it is before training."""
    seeds = study.plan.members["init_seed"].to_numpy()[members].tolist()
    made, options = aggregator_class(name), model_options(study.config.model, name)

    def make(width: int) -> Aggregator:
        one: Aggregator = made(width, study.task.n_outputs(), seeds, **options)
        return one

    aggregator = Fused(make, study.widths) if study.widths else make(study.bags.dim)
    aggregator.add_site_maps(study.config.train.harmonize, len(study.sites))
    if study.task.name == "ordinal":
        aggregator.add_cuts(len(study.cohort.classes) - 1)
    add_covariates(study, aggregator, members)
    if study.start:
        study.start.put_into(aggregator, members)
    return aggregator


def add_covariates(study: Study, aggregator: Aggregator, members: np.ndarray) -> None:
    """The covariates' term, scaled on the training patients of these members; nothing without covariates."""
    raw_SV = study.bags.covariates_SV
    if raw_SV is None or not study.covariates:
        return
    aggregator.add_covariates([len(one.categories) for one in study.covariates])
    train_MS, patients = study.plan.uses("train")[members], study.cohort.table["patient"].tolist()
    scales = moments(study.covariates, raw_SV, train_MS, patients)
    for one in aggregator.each():
        assert one.covariates is not None
        one.covariates.scale_by(*map(torch.from_numpy, scales))


def alone_module(study: Study, members: np.ndarray) -> MembersModule:
    """These members of the plan on their covariates alone, untrained."""
    seeds = study.plan.members["init_seed"].to_numpy()[members].tolist()
    aggregator = CovariatesAlone(study.bags.dim, study.task.n_outputs(), seeds)
    if study.task.name == "ordinal":
        aggregator.add_cuts(len(study.cohort.classes) - 1)
    add_covariates(study, aggregator, members)
    return module_around(study, aggregator, members)


def tell_diverged(plan: Plan, diverged_M: np.ndarray) -> None:
    """On the terminal, a few of them: a study may have thousands of members."""
    rows = np.flatnonzero(diverged_M)
    if len(rows):
        members = plan.members.iloc[rows]
        told = [
            f"{m} (epoch {epoch}, lr {lr:g})"
            for m, epoch, lr in zip(members["member"], diverged_M[rows], members["lr"], strict=True)
        ]
        print(f"warning: {count(len(rows), 'member')} diverged: {'; '.join(at_most(told, 5))}", file=sys.stderr)


def new_module(study: Study, name: str, members: np.ndarray) -> MembersModule:
    """These members of the plan, untrained, as their task trains them."""
    module = module_around(study, new_aggregator(study, name, members), members)
    if study.covariates:
        alone = alone_module(study, members)
        fit_alone(alone)
        for one in module.aggregator.each():
            start_from(alone.aggregator, one)
    return module


def module_around(study: Study, aggregator: Aggregator, members: np.ndarray) -> MembersModule:
    """What trains these members of the plan, whose aggregator is given."""
    config, part, task = study.config, study.plan.subset(members), study.task
    settings = settings_of(study, members)
    own = Members(
        part.members["lr"].to_numpy(dtype=float),
        part.members["weight_decay"].to_numpy(dtype=float),
        part.uses("train"),
        part.uses("val"),
        None if study.epochs_M is None else study.epochs_M[members],
        labels_MS=None if study.labels_MS is None else study.labels_MS[members],
        site_S=study.site_S if config.train.harmonize != "none" else None,
        logged_M=members < study.n_own,
    )
    if task.name == "classification":
        fixed = (aggregator, study.bags, study.cohort.labels_S, len(study.cohort.classes), own, settings)
        return MembersModule(*fixed, seed=config.seed, max_tiles=config.data.max_tiles)
    asked = [Asked(one.cohort, one.task, n) for one, n in study.asked_of(members)]
    rows = np.split(own.train_MS, np.cumsum([one.n for one in asked])[:-1])
    each = [one.task.facts(one.cohort, train_MS) for one, train_MS in zip(asked, rows, strict=True)]
    facts = {name: np.concatenate([own[name] for own in each]) for name in each[0]}
    of_task = (aggregator, study.bags, asked[0].cohort, asked[0].task, own, settings, facts)
    return module_of(task)(*of_task, seed=config.seed, max_tiles=config.data.max_tiles, asked=asked)


def train_pass(
    study: Study,
    name: str,
    folder: Path,
    index: int,
    members: np.ndarray,
    inner: bool,
    hands: Hands,
) -> dict[str, Any]:
    """Train some members of the plan together; a pass that a resumed run had finished is read back.

    Of `inner` members only the history is wanted: no logs, no weights, no predictions. Where a GPU's memory does not
    hold all of them, they train in halves.
    """
    done = folder / "checkpoints" / f"pass{index}.pt"
    if study.config.resume and done.exists():
        outcome: dict[str, Any] | None = read_back(done)
        if outcome is not None:
            return outcome
    most: Most = study.once.setdefault(MOST, Most())
    train = partial(train_together, study, name, folder, index, inner, hands)
    result = train_in_halves(train, members, most)
    study.check_place()
    hands.write(done, saved(result))
    hands.remove(folder / "checkpoints" / f"pass{index}" / CHECKPOINT)
    return result


def train_together(
    study: Study, name: str, folder: Path, index: int, inner: bool, hands: Hands, members: np.ndarray, half: str
) -> dict[str, Any]:
    """Members of pass `index` in one training. half: which part of the pass they are, "" = all of it."""
    part = study.plan.subset(members)
    module = new_module(study, name, members)
    checkpoints = folder / "checkpoints" / f"pass{index}" / half
    logs = None if inner else folder / "logs" / f"pass{index}{half}"
    fit(
        module,
        checkpoints,
        logs,
        resume=study.config.resume,
        progress=hands.live and sys.stderr.isatty(),
        before_writing=study.check_place,
        write=hands.write,
        curves=None if hands.live else hands.curves,
    )
    own_M = members < study.n_own
    tell_diverged(part, module.diverged_M * own_M)
    return outcome_of(study, module, members, inner=inner)


def outcome_of(study: Study, module: MembersModule, members: np.ndarray, *, inner: bool) -> dict[str, Any]:
    """What these members (rows of the plan) came to, as a pass is saved."""
    part, own_M, first = study.plan.subset(members), members < study.n_own, module.first_member
    history = [row | {"member": row["member"] - first} for row in module.history]
    history = [row | {"member": int(members[row["member"]])} for row in history if own_M[row["member"]]]
    result: dict[str, Any] = {"history": history}
    if not inner:
        # of the others what is scored, and of risks what they are scaled by
        asked_MS = part.uses("test") | (part.uses("train") & (study.task.name == "survival"))
        uses_MS = None if own_M.all() else asked_MS | own_M[:, None]
        weights = module.aggregator.state_dict()
        if isinstance(module.aggregator, Fused):
            module.aggregator.apart = True  # the logits of every encoder, to be weighted when all members are there
        result |= {
            "state": {
                k: (v if own_M.all() else v[torch.from_numpy(own_M).to(v.device)]).cpu() for k, v in weights.items()
            },
            "logits": torch.from_numpy(predict_logits(module, list(range(len(study.bags))), uses_MS)),
            "best_epoch": module.best_epoch_M.tolist(),
            "diverged": module.diverged_M.tolist(),
        }
    return result
