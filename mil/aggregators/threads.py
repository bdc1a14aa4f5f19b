"""Members on threads: a thread a bag, forward and backward, with the same sums whichever is quicker.

Axes: M members of the study, m members selected for one group, R rows (member, bag), P pooled features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mil.aggregators.batch import Parameters, Task

MANY_MEMBERS = 16
"""From so many members on, one bag is enough work for one thread."""


class Works(Protocol):
    """What threads need of an aggregator (`mil.aggregators.contract.Aggregator`)."""

    threads: int
    members_at_a_time: int | None
    n_members: int

    def run_task(self, task: Task, selector: Any) -> Any:
        """The pooled features of one task, and its tile scores."""


class Selected(Mapping[str, Tensor]):
    """Parameters by name, each made when it is first asked for: `pool` does not pay for those of the head.

    They are part of the graph even if that is within `torch.no_grad`, because a later use may not be.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self.names, self.make, self.grad = tuple(names), make, torch.is_grad_enabled()
        self.made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.made:
            with torch.set_grad_enabled(self.grad):
                self.made[name] = self.make(name)
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class MemberSelector:
    """Parameters of some members as (m, ...) stacks, split once per forward so that backward joins gradients once."""

    def __init__(self, stacks: Mapping[str, Tensor]):
        self.stacks = stacks
        self.n_members = len(next(iter(stacks.values())))
        self.singles = Selected(stacks, lambda name: stacks[name].split(1))

    def select(self, members: tuple[int, ...]) -> Parameters:
        if len(members) == self.n_members:
            return self.stacks
        if not torch.is_grad_enabled() and len(members) > 1:
            return Selected(self.stacks, lambda name: self.stacks[name][list(members)])
        if len(members) == 1:
            return Selected(self.stacks, lambda name: self.singles[name][members[0]])
        return Selected(self.stacks, lambda name: torch.cat([self.singles[name][m] for m in members]))


class _LeafSelector:
    """As MemberSelector, but the parameters are leaves of their own, so that one task can be differentiated alone."""

    def __init__(self, stacks: Mapping[str, Tensor]):
        self.stacks = stacks
        self.leaves: dict[tuple[int, ...], Selected] = {}

    def select(self, members: tuple[int, ...]) -> Parameters:
        one = members[0]

        def leaf(name: str) -> Tensor:
            stack, in_a_row = self.stacks[name], members[-1] - one == len(members) - 1
            chosen = stack[one : one + len(members)] if in_a_row else stack[list(members)]
            return chosen.detach().requires_grad_()

        self.leaves[members] = Selected(self.stacks, leaf)
        return self.leaves[members]


class PooledInThreads(torch.autograd.Function):
    """All tasks of a batch, several at a time, each on one thread, forward and backward.

    Bags are independent until the head, so a thread a bag keeps the cores busy where products cut in two wait for each
    other, above all on a machine that is shared. Sums are made in the order of the tasks, so the result does not
    depend on which thread was quicker.
    """

    @staticmethod
    def forward(ctx: Any, aggregator: Works, tasks: list[Task], names: list[str], *stacks: Tensor) -> Tensor:
        def run(task: Task) -> tuple[_LeafSelector, Tensor]:
            selector = _LeafSelector(dict(zip(names, stacks, strict=True)))
            with torch.enable_grad():
                return selector, aggregator.run_task(task, selector)[0]

        ctx.results = list(in_order(run, tasks, aggregator.threads))
        ctx.names, ctx.stacks, ctx.threads = names, stacks, aggregator.threads
        return torch.cat([pooled_RP.detach() for _, pooled_RP in ctx.results])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        results, ctx.results = ctx.results, None
        parts = gradients[0].split([len(pooled_RP) for _, pooled_RP in results])
        stacks = dict(zip(ctx.names, ctx.stacks, strict=True))
        sums: dict[str, Tensor] = {}  # of what `pool` used; the head's parameters get their gradient elsewhere

        def run(task: tuple[tuple[_LeafSelector, Tensor], Tensor]) -> list[tuple[tuple[int, ...], str, Tensor]]:
            (selector, pooled_RP), gradient_RP = task
            if not pooled_RP.requires_grad:  # nothing to learn before the head
                return []
            keys = [(members, name) for members, leaves in selector.leaves.items() for name in leaves.made]
            inputs = [selector.leaves[members].made[name] for members, name in keys]
            found = torch.autograd.grad(pooled_RP, inputs, gradient_RP, allow_unused=True)
            return [(*key, gradient) for key, gradient in zip(keys, found, strict=True) if gradient is not None]

        for gradients_of_task in in_order(run, list(zip(results, parts, strict=True)), ctx.threads):
            for members, name, gradient in gradients_of_task:
                if name not in sums:
                    sums[name] = torch.zeros_like(stacks[name])
                if len(members) < MANY_MEMBERS:  # index_add_ is slow
                    for m, gradient_of_m in zip(members, gradient, strict=True):
                        sums[name][m] += gradient_of_m
                else:
                    sums[name].index_add_(0, torch.tensor(members, device=gradient.device), gradient)
        return None, None, None, *(sums.get(name) for name in ctx.names)


def in_order(work: Callable[[Any], Any], tasks: Sequence[Any], threads: int) -> Iterator[Any]:
    """`work` of every task on so many threads; yields in the order of the tasks, while later ones are at work."""
    if threads == 1:
        yield from map(work, tasks)
        return
    if len(tasks) == 1:  # then they all help with this one
        with torch_threads(threads):
            result = work(tasks[0])
        yield result
        return
    grad, autocast, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def one(task: Any) -> Any:
        # both settings belong to a thread, and a new one starts with torch's own
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=autocast):
            return work(task)

    # A new thread has OpenMP's default number of threads until it first asks torch, and oneDNN asks OpenMP: cut in two
    # or not, a product differs in its last bits, and which product is a thread's first is chance.
    with ThreadPoolExecutor(threads, initializer=torch.get_num_threads) as pool:
        yield from pool.map(one, tasks)


@contextmanager
def a_thread_a_bag(aggregator: Works) -> Iterator[None]:
    """On a CPU, while inside: torch's threads work on different bags instead of on one product together.

    Only where arithmetic outweighs the interpreter (`members_at_a_time`, many members); otherwise nothing changes.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not (aggregator.members_at_a_time or aggregator.n_members >= MANY_MEMBERS):
        yield
        return
    aggregator.threads = threads
    try:
        with torch_threads(1):
            yield
    finally:
        aggregator.threads = 1


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """While inside, torch cuts every product into so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
