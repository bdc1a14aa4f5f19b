"""Passes of members on a cluster: each is a task of Ray, and leaves in the run folder what it leaves on one machine.

Features are put into Ray's object store once, which hands them to a node once and lets its tasks share that memory;
where they are memory-mapped, tasks map the files themselves. A task whose node dies runs again elsewhere, from the last
epoch that it had finished; so run folder and features (memory-mapped) must be seen by all nodes.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from extract.config import ProblemsError
from extract.extraction.cluster import Pool, connected, nodes, refuse_unlike, stand_in, usable_pool
from extract.places import CACHE, root
from extract.stores.sessions import bring_one, send, share_of, take_over
from extract.wording import count
from mil.config import StudyConfig
from mil.pipeline.data import Study
from mil.pipeline.fetching import bring_features
from mil.pipeline.folder import Place, identity
from mil.pipeline.passes import Hands
from mil.training.bags import Bags, MappedViews, as_tensor

CONFIG, CHECKPOINTS, LOGS = "config.yaml", "checkpoints", "logs"
RETRIES = 20
"""So often may the nodes of one task die."""

TrainPass = Callable[..., dict[str, Any]]
"""`mil.pipeline.training.train_pass`, which asks for its passes here."""


@contextmanager
def where_it_runs(config: StudyConfig) -> Iterator[None]:
    """The cluster that `config.run` names, checked, for as long as the study needs it; nothing for run.on=local.

    Raises:
        ClusterError: there is none, or its nodes do not see the run folder, or have other versions.
    """
    if config.run.on == "local":
        yield
        return
    assert config.out is not None
    with connected(config.run) as every:
        read = config.features.folders if config.data.memory == "mmap" else []
        alike = refuse_unlike(every, config.out, [folder for folder in read if folder.exists()])
        print(f"ray: {count(len(alike), 'node')}, {pool_for(config)}")
        yield


def pool_for(config: StudyConfig) -> Pool:
    """The tasks that can run at a time, of the cluster that is connected."""
    return usable_pool(nodes(), config.run.cpus, gpu=config.train.accelerator != "cpu")


def passes_on_ray(
    study: Study, name: str, folder: Path, parts: Sequence[np.ndarray], train_pass: TrainPass, *, inner: bool
) -> list[dict[str, Any]]:
    """What `train_pass` gives of each part of the members, in this order.

    Raises:
        What `train_pass` raises.
    """
    import ray

    pool = pool_for(study.config)
    tell_of_idle(study, name, len(parts), pool)
    study_ref, features_ref = ray.put(without_features(study)), shared_features(study)
    always: dict[str, Any] = {"max_retries": RETRIES, **pool.resources}
    task = ray.remote(one_pass).options(**always)
    fixed = (name, folder, train_pass, inner, (os.getcwd(), str(root().parent)), torch.get_num_threads())
    waiting = {task.remote(study_ref, features_ref, i, part, *fixed): i for i, part in enumerate(parts)}
    found: dict[int, dict[str, Any]] = {}
    try:
        with tqdm(total=len(parts), desc=name, unit="pass", disable=None) as bar:
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                found[waiting.pop(ready[0])], said = result_of(ready[0])
                if said:
                    bar.write(said, file=sys.stderr, end="")
                bar.update(1)
    finally:
        for left in waiting:  # Ctrl-C, or another one failed: their last epochs are kept
            ray.cancel(left, force=True)
    for part in (CHECKPOINTS, LOGS):  # of a run folder in a store: what tasks left there is this command's to remove
        take_over(folder / part)
    return [found[i] for i in range(len(parts))]


def result_of(ref: Any) -> tuple[dict[str, Any], str]:
    """A task's result; its error as it was raised there."""
    import ray

    try:
        result: tuple[dict[str, Any], str] = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, ProblemsError | OSError) else error from None
    return result


def tell_of_idle(study: Study, name: str, n_tasks: int, pool: Pool) -> None:
    """Where workers would have nothing to do: how they would, and what that changes."""
    n = len(study.plan)
    if n_tasks < min(pool.workers, n):
        print(
            f"note: {name}: {n_tasks} of {pool.workers} workers have a pass of members; run.members_per_task="
            f"{-(-n // pool.workers)} gives each one (other passes: the same numbers but for their last digits)"
        )


# --- what travels ----------------------------------------------------------------------------------------------------


def shared_features(study: Study) -> Any:
    """The study's features in the object store, put there once for all its aggregators and passes."""
    import ray

    features = study.once.get("ray features")
    if features is None or features[0] is not study.bags.views:
        features = (study.bags.views, ray.put(packed(study.bags)))
        study.once["ray features"] = features
    return features[1]


def packed(bags: Bags) -> Any:
    """What tasks make the features of: arrays, which they share where they lie, or how to map the files."""
    views = bags.views
    if isinstance(views, MappedViews):
        return MappedViews(views.source, views.slides, views.announced, views.nbytes, views.budget_bytes)
    return [view.numpy() for view in views]


def unpacked(features: Any) -> Any:
    """The views of `Bags`. Arrays of the object store cannot be written to, and nothing here does."""
    return features if isinstance(features, MappedViews) else [as_tensor(array_TD) for array_TD in features]


def without_features(study: Study) -> Study:
    """What a task needs beside them. Which run folder it is, the task looks up itself: nodes number disks otherwise."""
    bags = replace(study.bags, views=())
    targets = tuple(replace(one, bags=bags, once={}, place=None) for one in study.targets)
    return replace(study, bags=bags, targets=targets, once={})


def with_features(study: Study, features: Any) -> Study:
    """The inverse, in the task."""
    bags = replace(study.bags, views=unpacked(features))
    targets = tuple(replace(one, bags=bags) for one in study.targets)
    place = None if study.place is None else Place({out: identity(out) for out in study.place.identities})
    return replace(study, bags=bags, targets=targets, place=place)


def one_pass(
    study: Study,
    features: Any,
    index: int,
    members: np.ndarray,
    name: str,
    folder: Path,
    train_pass: TrainPass,
    inner: bool,
    places: tuple[str, str],
    threads: int,
) -> tuple[dict[str, Any], str]:
    """The task: a pass of members, and what it said on its terminal. Run again, it goes on from its last epoch.

    places: the folder in which the command was started, and where it has what is in stores.
    threads: of the command itself, because sums that are cut otherwise differ in their last digits.
    """
    stand_in(places[0])
    os.environ[CACHE] = places[1]  # so that the study's paths mean the same
    torch.set_num_threads(threads)
    if isinstance(features, MappedViews):
        bring_features(study.config, study.bags.slides)
    with share_of_run(study, folder, index), contextlib.redirect_stderr(io.StringIO()) as said:
        study = with_features(study, features)
        study = replace(
            study, config=study.config.model_copy(update={"resume": True})
        )  # of earlier runs nothing is left
        result = train_pass(study, name, folder, index, members, inner, Hands())
    return result, said.getvalue()


@contextmanager
def share_of_run(study: Study, folder: Path, index: int) -> Iterator[None]:
    """Where the run folder is in a store: what a pass goes on from is brought here, what it leaves is put there."""
    assert study.config.out is not None
    with share_of(study.config.out):
        for own in study.place.identities if study.place else ():
            bring_one(own / CONFIG)
        bring_one(folder / CHECKPOINTS / f"pass{index}.pt")
        take_over(folder / CHECKPOINTS / f"pass{index}")
        yield
        send(folder / LOGS / f"pass{index}")


# --- how long it will take --------------------------------------------------------------------------------------------


def seconds_on_ray(config: StudyConfig, stages: Sequence[Sequence[float]]) -> tuple[float, Pool]:
    """How long tasks of so many seconds take on the cluster, stage after stage, and on which workers."""
    with connected(config.run):
        pool = pool_for(config)
    return sum(makespan(stage, pool.workers) for stage in stages), pool


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Until the last task has ended, each given to the worker that is free first, in this order."""
    free = [0.0] * max(1, workers)
    for one in seconds:
        free[free.index(min(free))] += one
    return max(free)
