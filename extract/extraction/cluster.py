"""A cluster of Ray: connecting to it, its nodes, and what must be the same on all of them before work starts."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import socket
import statistics
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from extract.config import ProblemsError, Run
from extract.places import is_url, shown, url_of
from extract.stores import client
from extract.whole import write_whole
from extract.wording import at_most, count

PACKAGES = ("slide-mil", "torch", "numpy", "timm", "ray")
"""What has a say in results; of other versions they may differ in their last digits, or be refused by each other."""
ANSWER_S = 120.0
"""So long may a node take to answer at the start: its first process imports Ray and this package."""


class ClusterError(ProblemsError):
    """The cluster cannot be used as it is. Nothing was done."""


@dataclass(frozen=True)
class Node:
    """A node that is alive: Ray's id, its host's name, and what it offers."""

    id: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Pool:
    """So many workers of so many CPUs and GPUs each."""

    workers: int
    cpus: int
    gpus: int

    @property
    def resources(self) -> dict[str, Any]:
        """As Ray's decorators call them."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def __str__(self) -> str:
        each = f"{count(self.cpus, 'CPU')}" + (f", {count(self.gpus, 'GPU')}" if self.gpus else "")
        return f"{count(self.workers, 'worker')} ({each} each)"


def refuse_without_ray() -> None:
    """Raise ClusterError where Ray is not installed."""
    missing = [name for name in ("ray", "grpc") if importlib.util.find_spec(name) is None]
    if missing:
        raise ClusterError(
            "run.on=ray: Ray is not installed",
            ["pip install 'slide-mil[ray]' here and on all nodes, or run.on=local for this machine alone"],
        )


@contextmanager
def connected(run: Run) -> Iterator[list[Node]]:
    """The nodes of the cluster that `run` names; without an address one is started on this machine, and ended after.

    Within a program that has connected already its connection is used, and left as it is.

    Raises:
        ClusterError: no Ray, no cluster there, or one of another version.
    """
    refuse_without_ray()
    import ray

    if ray.is_initialized():
        yield nodes()
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of Ray's own processes; what matters is raised
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which Ray would send to its makers
    try:
        with quiet_ray():
            if run.address and run.address.startswith("ray://"):
                ray.init(run.address)  # options would be its server's, which takes none of these
            else:
                here: dict[str, Any] = {} if run.address else {"include_dashboard": False}
                ray.init(run.address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except Exception as error:  # noqa: BLE001 - Ray raises RuntimeError, ConnectionError, and plain Exception
        if "ersion" in str(error) and "mismatch" in str(error).lower():
            raise ClusterError("run.on=ray: other versions", [versions_differ(str(error))]) from None
        raise ClusterError("run.on=ray: no cluster", [f"{no_cluster(run)} ({_first(error)})"]) from None
    try:
        yield nodes()
    finally:
        ray.shutdown()


def no_cluster(run: Run) -> str:
    """What to do where nothing answers."""
    if run.address == "auto":
        return "run.address=auto: no cluster runs on this node; start one (ray start --head), or leave run.address out"
    if run.address is None:
        return "Ray cannot be started on this machine"
    said = f"run.address={run.address}: no connection; expected a Ray head node (ray start --head), and its port"
    if run.address.startswith("ray://") and os.environ.get("RAY_AUTH_MODE") != "token":  # Ray says nothing of it
        said += ". Where the cluster asks for a token: RAY_AUTH_MODE=token, and the same ~/.ray/auth_token here"
    return said


def versions_differ(said: str) -> str:
    """Ray's own message about versions on one line, and what to do."""
    return f"{' '.join(said.split())} Install the same Python and the same packages here and on all nodes"


def _first(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ... ".join(dict.fromkeys(line.strip()[:200] for line in (lines[0], lines[-1])))


@contextmanager
def quiet_ray() -> Iterator[None]:
    """Ray's own warnings of things that nobody can do anything about here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\..*")
        warnings.filterwarnings("ignore", category=ResourceWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO.*")
        yield


def nodes() -> list[Node]:
    """All nodes that are alive and offer CPUs."""
    import ray

    found = [(node["NodeID"], node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    every = [Node(name, host, has.get("CPU", 0.0), has.get("GPU", 0.0)) for name, host, has in found]
    return sorted((node for node in every if node.cpus), key=lambda node: (node.host, node.id))


def pool_of(every: Sequence[Node], cpus: int | None, *, gpu: bool) -> Pool:
    """As many workers as fit: one a GPU where `gpu` and any node has some, else one a node.

    cpus: of a worker; None: what the median node has for each.
    """
    usable = [node for node in every if node.gpus >= 1] if gpu else []
    if usable:
        each = cpus or max(1, int(statistics.median(node.cpus // node.gpus for node in usable)))
        return Pool(sum(int(min(node.gpus, node.cpus // each)) for node in usable), each, 1)
    each = cpus or max(1, int(statistics.median(node.cpus for node in every)))
    return Pool(sum(int(node.cpus // each) for node in every), each, 0)


def usable_pool(every: Sequence[Node], cpus: int | None, *, gpu: bool) -> Pool:
    """`pool_of`; ClusterError where not one worker fits."""
    pool = pool_of(every, cpus, gpu=gpu) if every else Pool(0, cpus or 1, 0)
    if not pool.workers:
        have = ", ".join(f"{node.host}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in every) or "no node"
        wanted = f"run.cpus={cpus}" if cpus else "a worker needs a CPU"
        raise ClusterError("run.on=ray: no worker fits", [f"{wanted}; the cluster has {have}. Set run.cpus lower"])
    return pool


# --- the same on all nodes -------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of Python and of what results depend on; "" for what is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def look_around(place: str, probe: str, token: str, paths: Sequence[str]) -> dict[str, Any]:
    """On a node: its versions, and what it sees: whether the probe is that of the driver, a file can be written beside
    it, and these paths exist."""
    stand_in(place)
    if is_url(probe):  # every node has a mirror of its own; that it reaches the store is what counts
        return {"versions": versions(), "sees": probe_of(probe) == token, "writes": True, "missing": []}
    folder, seen, writes = Path(probe).parent, False, True
    try:
        seen = Path(probe).read_text() == token
    except OSError:
        return {"versions": versions(), "sees": False, "writes": True, "missing": []}
    own = folder / f".{token}.{uuid.uuid4().hex}.probe"
    try:
        write_whole(own, token)
        own.unlink()
    except OSError:
        writes = False
    return {
        "versions": versions(),
        "sees": seen,
        "writes": writes,
        "missing": [path for path in paths if not Path(path).exists()],
    }


def leave_probe(probe: Path, token: str) -> None:
    """A file that the nodes should see; in a store an object."""
    probe.parent.mkdir(parents=True, exist_ok=True)
    write_whole(probe, token)
    if url := url_of(probe):
        client.put(probe, url)


def remove_probe(probe: Path) -> None:
    probe.unlink(missing_ok=True)
    if url := url_of(probe):
        client.delete(url)


def probe_of(url: str) -> str:
    """What the object says to this node; "" where it cannot be read."""
    try:
        return client.head(url, 4096).decode()
    except client.StoreError:
        return ""


def stand_in(place: str) -> None:
    """Work in the folder in which the command was started, so that relative paths mean the same; where there is one."""
    if os.path.isdir(place) and os.getcwd() != place:
        os.chdir(place)


def refuse_unlike(every: Sequence[Node], folder: Path, paths: Iterable[Path] = ()) -> list[Node]:
    """The nodes that answered: one that has died since it was listed is no node any more.

    Args:
        folder: what is written to; a probe file is written into it, and removed.
        paths: files and folders that are read.

    Raises:
        ClusterError: not all see `folder` as it is here, or have the same versions; it names them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = uuid.uuid4().hex
    probe = folder / f".{token}.probe"
    made = not folder.exists()
    leave_probe(probe, token)
    given = (os.getcwd(), shown(probe), token, [str(path) for path in paths if url_of(path) is None])
    try:
        answers = {}
        for node in every:
            where = NodeAffinitySchedulingStrategy(node.id, soft=False)
            task = ray.remote(look_around).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
            answers[node] = task.remote(*given)
        told = {node: answer for node, ref in answers.items() if (answer := answer_of(node, ref)) is not None}
    finally:
        remove_probe(probe)
        if made:
            folder.rmdir()
    problems = unlike(versions(), told, folder)
    if problems:
        raise ClusterError("run.on=ray: the nodes cannot do this", problems)
    return list(told)


def answer_of(node: Node, ref: Any) -> dict[str, Any] | None:
    """What `look_around` found on a node; None where the node is no more."""
    import ray

    try:
        answer: dict[str, Any] = ray.get(ref, timeout=ANSWER_S)
    except ray.exceptions.RayError as error:
        if node.id not in {one.id for one in nodes()}:
            return None
        said = f"{name_of(node)}: {_first(error)}"
        problem = f"{said}. The packages of this command must be installed on all nodes, as they are here"
        raise ClusterError("run.on=ray: a node does not answer", [problem]) from None
    return answer


def unlike(own: Mapping[str, str], told: Mapping[Node, Mapping[str, Any]], folder: Path) -> list[str]:
    """A sentence for each way in which nodes differ from this machine."""
    blind = [name_of(node) for node, answer in told.items() if not answer["sees"]]
    mute = [name_of(node) for node, answer in told.items() if answer["sees"] and not answer["writes"]]
    problems = []
    if blind:
        problems.append(
            f"{shown(folder)}: {', '.join(at_most(blind, 5))} does not see what {socket.gethostname()} writes there; "
            "use a folder that is shared by all nodes, by its full path; of a store, are its credentials there?"
        )
    if mute:
        problems.append(f"{folder}: {', '.join(at_most(mute, 5))} cannot write there; use a shared folder")
    for node, answer in told.items():
        if answer["missing"]:
            gone = ", ".join(at_most(list(answer["missing"]), 3))
            problems.append(f"{name_of(node)} does not see {gone}; use paths that all nodes have")
        other = [f"{k} {answer['versions'].get(k) or 'none'}, here {v or 'none'}" for k, v in own.items()]
        other = [text for text, (k, v) in zip(other, own.items(), strict=True) if answer["versions"].get(k) != v]
        if other:
            problems.append(f"{name_of(node)} has other versions: {'; '.join(other)}. Install the same everywhere")
    return problems


def name_of(node: Node) -> str:
    """Its host, and enough of Ray's id to tell apart nodes on one host."""
    return f"node {node.host} ({node.id[:6]})"
