"""A cluster of three nodes on this machine, for tests and benchmarks: one CPU each, and a way to kill one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""A node that does not answer is given up after two seconds, not half a minute."""


@dataclass
class Nodes:
    """The cluster and the nodes of it that may die: the head is where the command is."""

    cluster: Any
    workers: list[Any]

    def kill(self, number: int = 0) -> None:
        """kill -9 of all processes of a node, its actors and tasks too; a new node takes its place at once."""
        node = self.workers.pop(number)
        kill_all(node)
        self.cluster.worker_nodes.discard(node)

    def refill(self) -> None:
        """Three nodes again."""
        while len(self.workers) < 2:
            self.workers.append(self.cluster.add_node(**SMALL))

    @contextmanager
    def environment(self, variables: dict[str, str]) -> Iterator[None]:
        """Work of this process finds these variables in its environment on all nodes."""
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        ray.shutdown()
        ray.init(self.cluster.address, runtime_env={"env_vars": variables}, **options)
        try:
            yield
        finally:
            ray.shutdown()
            ray.init(self.cluster.address, **options)

    def busy(self, number: int, doing: str) -> bool:
        """Whether a process of the node calls itself so."""
        return any(doing in " ".join(command(process)) for process in processes(self.workers[number]))


def processes(node: Any) -> list[psutil.Process]:
    """Those that the node was started with, and what they have started, readers too."""
    roots = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    return roots + [child for root in roots for child in root.children(recursive=True)]


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_all(node: Any) -> None:
    for process in processes(node):
        with suppress(psutil.Error):
            process.kill()
    for infos in node.all_processes.values():
        for info in infos:
            info.process.wait()


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    """A cluster, and this process connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(
        initialize_head=True, head_node_args={**SMALL, "include_dashboard": False, "_system_config": SOON}
    )
    try:
        nodes = Nodes(cluster, [])
        nodes.refill()
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
    finally:
        ray.shutdown()
        for node in list(cluster.worker_nodes):
            kill_all(node)
            cluster.worker_nodes.discard(node)
        cluster.shutdown()
