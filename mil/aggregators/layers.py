"""What every aggregator is made of: the contract, packed batches, layers that hold M members, segment operations.

Axes: M members of the study, m members selected for one group, T tiles laid end to end, B bags of the batch,
b bags of one group, D input features, H hidden, P pooled features, C outputs (1 for two classes), K extreme tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mil.aggregators.chance import Chance

Parameters = Mapping[str, Tensor]

MANY_MEMBERS = 16
"""From so many members on, one bag is enough work for one thread."""
FEW_TILES = 1024
"""A group of at most so many tiles (small bags, packed) goes through all its members at once: the interpreter, not the
arithmetic, takes the time."""


@dataclass(frozen=True)
class Group:
    """Part of a batch that is computed in one go: whole bags, end to end, for the same members.

    tiles_TD: as stored (float16 or float32); converted when used. lengths_b: tiles of each bag, all >= 1.
    bags_b: the bags' positions in the batch. members: who uses these bags, ascending; None = all members.
    """

    tiles_TD: Tensor
    lengths_b: tuple[int, ...]
    bags_b: tuple[int, ...]
    members: tuple[int, ...] | None = None

    def to(self, device: torch.device | str, **options) -> Group:
        return replace(self, tiles_TD=self.tiles_TD.to(device, **options))


@dataclass(frozen=True)
class Batch:
    """B packed bags. No padding anywhere: a bag is `lengths_b` rows of its group's tiles.

    labels_B: class index, int64, -1 unlabelled. slides_B: row of each bag in the cohort. uses_MB: which member trains
    on which bag; logits of the others are meaningless.
    """

    groups: tuple[Group, ...]
    labels_B: Tensor
    slides_B: Tensor
    uses_MB: Tensor

    def to(self, device: torch.device | str, **options) -> Batch:
        moved = {name: getattr(self, name).to(device, **options) for name in ("labels_B", "slides_B", "uses_MB")}
        return Batch(tuple(group.to(device, **options) for group in self.groups), **moved)


def pack(bags: Sequence[Tensor], n_members: int, labels: Sequence[int] | None = None) -> Batch:
    """A batch of one group with every bag used by every member. bags: (T_i, D) each."""
    lengths_b = tuple(len(bag) for bag in bags)
    group = Group(torch.cat(list(bags)), lengths_b, tuple(range(len(bags))))
    labels_B = torch.full((len(bags),), -1) if labels is None else torch.as_tensor(labels)
    uses_MB = torch.ones(n_members, len(bags), dtype=torch.bool)
    return Batch((group,), labels_B, torch.arange(len(bags)), uses_MB)


@dataclass(frozen=True)
class Prediction:
    """logits_MBC: C = 1 (log-odds of the positive class) for two classes, else one per class.

    scores_MT: what the members looked at, tiles in the order of the groups; None unless asked for.
    pooled_MBP: what `pool` made of every bag, for `Aggregator.losses`.
    """

    logits_MBC: Tensor
    scores_MT: Tensor | None = None
    pooled_MBP: Tensor | None = None


Task = tuple[Group, tuple[int, ...]]
"""A group and the members that run on it."""


class Aggregator(nn.Module):
    """M aggregators of one kind, held as stacked parameters of shape (M, ...).

    A subclass adds its layers in `__init__` with `add_linear` and defines `pool` and `head`. Member i, built from seed
    s_i, starts with the same values whoever else is in the stack, and never sees another member's parameters.
    """

    members_at_a_time: int | None = None
    """How many members a thread computes together on a CPU; None: all of the group, in operations over all bags.

    A number where arithmetic outweighs the interpreter: no member pays for another's bags. Above 1 where `pool` itself
    goes member by member, so that they share what is made of the tiles once.
    """

    score_name = "attention"
    """What `scores_MT` are. "attention" promises weights that sum to 1 over a bag."""

    draws = False
    """True where training needs random numbers: `pool` then gets a `Chance` while training, None otherwise."""

    dropout = 0.0
    """Of `drop`, for aggregators that draw."""

    order_matters = False
    """True where the place of a tile in its bag changes the result."""

    input_mean_MD: Tensor
    input_scale_MD: Tensor

    def __init__(self, in_dim: int, n_outputs: int, seeds: Sequence[int]):
        super().__init__()
        self.in_dim, self.n_outputs, self.n_members = in_dim, n_outputs, len(seeds)
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.register_buffer("input_mean_MD", torch.zeros(len(seeds), in_dim))
        self.register_buffer("input_scale_MD", torch.ones(len(seeds), in_dim))
        self.standardized = False
        self.threads = 1
        self.seeds = tuple(int(seed) for seed in seeds)
        self.epoch = 0  # of the random numbers; whoever trains sets it
        self._slides_B: list[int] = []
        self.floats_per_tile, self.floats_per_bag = 0, in_dim  # kept for backward, per member; subclasses say theirs

    def add_linear(self, name: str, n_in: int, n_out: int, *, init: str = "torch", bias: bool = True) -> None:
        """Parameters NAME_weight (M, n_in, n_out) and, unless told otherwise, NAME_bias (M, n_out).

        init: "torch" = torch.nn.Linear's default (uniform, 1/sqrt(n_in)); "xavier" = Xavier uniform, bias zero.
        """
        weight_MIO, bias_MO = torch.empty(self.n_members, n_in, n_out), torch.zeros(self.n_members, n_out)
        for m, generator in enumerate(self._generators):
            bound = math.sqrt(6 / (n_in + n_out)) if init == "xavier" else 1 / math.sqrt(n_in)
            weight_MIO[m].uniform_(-bound, bound, generator=generator)
            if init == "torch" and bias:
                bias_MO[m].uniform_(-bound, bound, generator=generator)
        self.register_parameter(f"{name}_weight", nn.Parameter(weight_MIO))
        if bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(bias_MO))

    def add_stack(self, name: str, shape: Sequence[int], fill: Callable[[Tensor, torch.Generator], object]) -> None:
        """Parameter NAME (M, *shape); `fill(tensor, generator)` writes one member's starting values."""
        stack = torch.empty(self.n_members, *shape)
        for member, generator in zip(stack, self._generators, strict=True):
            fill(member, generator)
        self.register_parameter(name, nn.Parameter(stack))

    def add_norm(self, name: str, width: int) -> None:
        """Parameters NAME_scale (M, width), ones, and NAME_shift (M, width), zeros, of a LayerNorm."""
        self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(self.n_members, width)))
        self.register_parameter(f"{name}_shift", nn.Parameter(torch.zeros(self.n_members, width)))

    def add_head(self, n_in: int, hidden: Sequence[int], *, n_outputs: int | None = None, init: str = "torch") -> None:
        """Layers head0, head1, ...: n_in -> hidden -> outputs (default: the aggregator's)."""
        widths = [n_in, *hidden, self.n_outputs if n_outputs is None else n_outputs]
        self.n_head_layers = len(widths) - 1
        for i in range(self.n_head_layers):
            self.add_linear(f"head{i}", widths[i], widths[i + 1], init=init)

    def run_head(self, x_MBI: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The head's layers with `activation` between them: (M, B, I) -> (M, B, O)."""
        for i in range(self.n_head_layers):
            x_MBI = self.linear(f"head{i}", activation(x_MBI) if i else x_MBI)
        return x_MBI

    def standardize(self, mean_MD: Tensor, std_MD: Tensor) -> None:
        """Subtract each member's own feature mean and divide by its deviation; constant features are only centred."""
        self.input_mean_MD.copy_(mean_MD)
        self.input_scale_MD.copy_(torch.where(std_MD > 1e-6, 1 / std_MD, torch.ones_like(std_MD)))
        self.standardized = True

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor | None]:
        """One group through the selected members. tiles are float; `p` holds parameters (m, ...) by name.

        An aggregator that `draws` takes one more argument, `chance: Chance | None`.
        Returns pooled_mbP and scores_mT (None where they cost extra: see `tile_scores`).
        """
        raise NotImplementedError

    def drop(self, x_mTH: Tensor, lengths_b: Sequence[int], chance: Chance | None, what: str) -> Tensor:
        """`Chance.dropout` with the aggregator's probability, in training only."""
        return chance.dropout(x_mTH, lengths_b, self.dropout, what) if chance else x_mTH

    def losses(self, prediction: Prediction, labels_B: Tensor) -> Tensor:
        """What training minimises for every member and bag, (M, B): here the cross-entropy of the logits.

        An aggregator with losses of its own, such as CLAM's on instances, adds them here with their weight; what they
        need of the tiles it puts into columns of `pooled_MBP`.
        """
        return cross_entropy(prediction.logits_MBC.float(), labels_B)

    def tile_scores(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> Tensor:
        """scores_mT of a group, for aggregators whose `pool` does not have them at hand."""
        raise NotImplementedError

    def head(self, pooled_MBP: Tensor) -> Tensor:
        """pooled_MBP -> logits_MBC, all members at once."""
        raise NotImplementedError

    def tile_logits(self, tiles_TD: Tensor) -> Tensor:
        """What every member would say of a slide that is nothing but this tile: (T, D) float -> logits (M, T, C).

        With attention and a linear head the slide's logit is exactly the attention-weighted mean of these. Subclasses
        give the same quicker.
        """
        return self(pack(tiles_TD.split(1), self.n_members)).logits_MBC

    def forward(self, batch: Batch, with_scores: bool = False) -> Prediction:
        if self.draws and self.training:
            self._slides_B = batch.slides_B.tolist()
        stacks = self.stacks()
        tasks = self._tasks(batch)
        if with_scores or not torch.is_grad_enabled():
            selector = MemberSelector(stacks)
            results = list(in_order(lambda task: self.run_task(task, selector, with_scores), tasks, self.threads))
            pooled_RP = torch.cat([pooled for pooled, _ in results])
            scores = [scores_mT for _, scores_mT in results]
        elif self.threads > 1:
            pooled_RP = _PooledInThreads.apply(self, tasks, list(stacks), *stacks.values())
        else:
            selector = MemberSelector(stacks)
            pooled_RP = torch.cat([self.run_task(task, selector)[0] for task in tasks])
        pooled_MBP = self._place(pooled_RP, tasks, len(batch.labels_B))
        scores_MT = self._join_scores(scores, tasks, batch.groups) if with_scores else None
        return Prediction(self._head_where_used(pooled_MBP, batch.uses_MB), scores_MT, pooled_MBP)

    def _head_where_used(self, pooled_MBP: Tensor, uses_MB: Tensor) -> Tensor:
        """`head` of every member on its own bags alone, where they are few of the batch's; zeros for most others."""
        n_used, n_bags = int(uses_MB.sum(dim=1).max()), uses_MB.shape[1]
        if n_used == 0 or 4 * n_used > 3 * n_bags:
            return self.head(pooled_MBP)
        bags_MU = (~uses_MB).to(torch.uint8).argsort(dim=1, stable=True)[:, :n_used].to(pooled_MBP.device)
        members_M1 = torch.arange(self.n_members, device=pooled_MBP.device).unsqueeze(1)
        logits_MUC = self.head(pooled_MBP[members_M1, bags_MU])
        logits_MBC = logits_MUC.new_zeros(self.n_members, n_bags, logits_MUC.shape[2])
        return logits_MBC.index_put((members_M1, bags_MU), logits_MUC)

    def stacks(self) -> dict[str, Tensor]:
        """Parameters by name, and the standardisation where there is one: everything that `pool` may read."""
        found: dict[str, Tensor] = dict(self.named_parameters())
        if self.standardized:
            found |= {name: getattr(self, name) for name in ("input_mean_MD", "input_scale_MD")}
        return found

    def _tasks(self, batch: Batch) -> list[Task]:
        """Groups with their members, the largest first: threads that take one after the other end at about one time.

        For the same reason the groups left over, when every thread has got as many, are cut by members.
        """
        everyone = tuple(range(self.n_members))
        tasks = [(group, everyone if group.members is None else group.members) for group in batch.groups]
        if self.threads == 1 or self.members_at_a_time is None:
            return tasks
        tasks.sort(key=lambda task: len(task[0].tiles_TD) * len(task[1]), reverse=True)
        whole = len(tasks) - len(tasks) % self.threads
        cut = [(group, part) for group, members in tasks[whole:] for part in self._parts(group, members)]
        return tasks[:whole] + cut

    def _parts(self, group: Group, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Members of one group for several threads: alike parts where tiles are few, else one by one."""
        n_parts = min(self.threads, len(members)) if len(group.tiles_TD) <= FEW_TILES else len(members)
        return [members[len(members) * i // n_parts : len(members) * (i + 1) // n_parts] for i in range(n_parts)]

    def run_task(self, task: Task, selector: MemberSelector, with_scores: bool = False) -> tuple[Tensor, Tensor]:
        """pooled_RP, a row for each member and bag, members first; scores_mT (empty unless asked for)."""
        group, members = task
        tiles_TD = self.prepare(group.tiles_TD)
        together = tiles_TD.is_cuda or len(tiles_TD) <= FEW_TILES
        n = len(members) if together or self.members_at_a_time is None else self.members_at_a_time
        rows, scores = [], [tiles_TD.new_empty(0)]
        for some in [members[i : i + n] for i in range(0, len(members), n)]:
            p = selector.select(some)
            pooled_mbP, scores_mT = self.pool(tiles_TD, group.lengths_b, p, *self._chance(group, some))
            rows.append(pooled_mbP.flatten(0, 1))
            if with_scores:
                scores.append(self.tile_scores(tiles_TD, group.lengths_b, p) if scores_mT is None else scores_mT)
        return torch.cat(rows), torch.cat(scores[1:] or scores)

    def prepare(self, tiles_TD: Tensor) -> Tensor:
        """A group's tiles as stored (float16 or float32) -> as `pool` takes them."""
        return tiles_TD.float()

    def _chance(self, group: Group, members: Sequence[int]) -> tuple[()] | tuple[Chance | None]:
        """The last argument of `pool` for an aggregator that draws; nothing for the others."""
        if not self.draws:
            return ()
        if not self.training:
            return (None,)
        slides_b = tuple(self._slides_B[b] for b in group.bags_b)
        return (Chance(tuple(self.seeds[m] for m in members), self.epoch, slides_b),)

    def _place(self, pooled_RP: Tensor, tasks: Sequence[Task], n_bags: int) -> Tensor:
        """Rows to their member and bag; zeros where a member does not use a bag."""
        member_R = [m for group, members in tasks for m in members for _ in group.bags_b]
        bag_R = [b for group, members in tasks for _ in members for b in group.bags_b]
        pooled_MBP = pooled_RP.new_zeros(self.n_members, n_bags, pooled_RP.shape[1])
        return pooled_MBP.index_put((torch.tensor(member_R), torch.tensor(bag_R)), pooled_RP)

    def _join_scores(self, scores: Sequence[Tensor], tasks: Sequence[Task], groups: Sequence[Group]) -> Tensor:
        """scores_MT in the order of the groups; NaN where a member does not use a bag."""
        columns = {id(g): scores[0].new_full((self.n_members, len(g.tiles_TD)), torch.nan) for g in groups}
        for (group, members), scores_mT in zip(tasks, scores, strict=True):
            columns[id(group)][list(members)] = scores_mT
        return torch.cat(list(columns.values()), dim=1)

    def first_layer(self, name: str, p: Parameters) -> tuple[Tensor, Tensor]:
        """weight_mDH and bias_mH of layer `name` with the members' standardisation folded in."""
        weight_mDH, bias_mH = p[f"{name}_weight"], p[f"{name}_bias"]
        if self.standardized:
            weight_mDH = weight_mDH * p["input_scale_MD"].unsqueeze(2)
            bias_mH = bias_mH - torch.einsum("md,mdh->mh", p["input_mean_MD"], weight_mDH)
        return weight_mDH, bias_mH

    def linear(self, name: str, x_MBI: Tensor) -> Tensor:
        """Layer `name` of all members on their own inputs: (M, B, I) -> (M, B, O)."""
        return torch.baddbmm(getattr(self, f"{name}_bias").unsqueeze(1), x_MBI, getattr(self, f"{name}_weight"))


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


class _PooledInThreads(torch.autograd.Function):
    """All tasks of a batch, several at a time, each on one thread, forward and backward.

    Bags are independent until the head, so a thread a bag keeps the cores busy where products cut in two wait for each
    other, above all on a machine that is shared. Sums are made in the order of the tasks, so the result does not
    depend on which thread was quicker.
    """

    @staticmethod
    def forward(ctx: Any, aggregator: Aggregator, tasks: list[Task], names: list[str], *stacks: Tensor) -> Tensor:
        def run(task: Task) -> tuple[_LeafSelector, Tensor]:
            selector = _LeafSelector(dict(zip(names, stacks, strict=True)))
            with torch.enable_grad():
                return selector, aggregator.run_task(task, selector)[0]  # type: ignore[arg-type]

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
def a_thread_a_bag(aggregator: Aggregator) -> Iterator[None]:
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


def cross_entropy(logits_MBC: Tensor, labels_B: Tensor) -> Tensor:
    """Of every member on every bag, (M, B); one logit = binary cross-entropy."""
    labels_MB = labels_B.expand(logits_MBC.shape[:2])
    if logits_MBC.shape[2] == 1:
        targets_MB = labels_MB.to(logits_MBC)
        return functional.binary_cross_entropy_with_logits(logits_MBC.squeeze(2), targets_MB, reduction="none")
    return functional.cross_entropy(logits_MBC.movedim(2, 1), labels_MB, reduction="none")


def cross_entropy_by_label(logits_C: Tensor) -> Tensor:
    """Cross-entropy for each label that a bag could have: (..., C) -> (..., labels); two labels for one logit."""
    if logits_C.shape[-1] == 1:
        return functional.softplus(torch.cat([logits_C, -logits_C], dim=-1))
    return -torch.log_softmax(logits_C, dim=-1)


def of_label(values_MBL: Tensor, labels_B: Tensor) -> Tensor:
    """The column of each bag's label: (M, B, labels) -> (M, B)."""
    labels_MB1 = labels_B.expand(values_MBL.shape[:2]).unsqueeze(2)
    return values_MBL.gather(2, labels_MB1).squeeze(2)


def shared_linear(x_TD: Tensor, weight_mDH: Tensor, bias_mH: Tensor) -> Tensor:
    """The same tiles through m members' layers as ONE matrix product: (T, D) -> (m, T, H), a view where m > 1."""
    m, d, h = weight_mDH.shape
    weight_DX = weight_mDH.squeeze(0) if m == 1 else weight_mDH.permute(1, 0, 2).reshape(d, m * h)
    return torch.addmm(bias_mH.reshape(-1), x_TD, weight_DX).view(len(x_TD), m, h).transpose(0, 1)


def cpu_linear(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor, activation: str = "none") -> Tensor:
    """(T, I), (I, O) -> (T, O) without autograd, by oneDNN: a tenth quicker than torch's default product on a CPU.

    activation: "none", "relu", "sigmoid" or "tanh" of the result, applied while it is in the cache.
    """
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_IO.t(), bias_O, activation, [], "")
    y_TO = torch.addmm(bias_O, x_TI, weight_IO)
    return y_TO if activation == "none" else getattr(y_TO, f"{activation}_")()


def member_linear(x_mTI: Tensor, weight_mIO: Tensor, bias_mO: Tensor) -> Tensor:
    """Each member's layer on its own input: (m, T, I) -> (m, T, O)."""
    if len(x_mTI) == 1:  # addmm is quicker than a batched product of one
        return torch.addmm(bias_mO.squeeze(0), x_mTI.squeeze(0), weight_mIO.squeeze(0)).unsqueeze(0)
    return torch.baddbmm(bias_mO.unsqueeze(1), x_mTI, weight_mIO)


def member_norm(x_mTH: Tensor, scale_mH: Tensor, shift_mH: Tensor) -> Tensor:
    """LayerNorm with each member's own scale and shift: (m, T, H) -> (m, T, H)."""
    if len(x_mTH) == 1:
        return functional.layer_norm(x_mTH, x_mTH.shape[2:], scale_mH[0], shift_mH[0])
    return torch.addcmul(shift_mH.unsqueeze(1), functional.layer_norm(x_mTH, x_mTH.shape[2:]), scale_mH.unsqueeze(1))


def attention_scores(name: str, x_mTH: Tensor, p: Parameters, gated: bool) -> Tensor:
    """Ilse et al. 2018, equations 8 and 9, before the softmax: layers NAME_attend, NAME_gate, NAME_score -> (m, T)."""
    a_mTA = tanh(member_linear(x_mTH, p[f"{name}_attend_weight"], p[f"{name}_attend_bias"]))
    if gated:
        a_mTA = a_mTA * torch.sigmoid(member_linear(x_mTH, p[f"{name}_gate_weight"], p[f"{name}_gate_bias"]))
    return member_linear(a_mTA, p[f"{name}_score_weight"], p[f"{name}_score_bias"]).squeeze(2)


def split_heads(x_mTH: Tensor, heads: int) -> Tensor:
    """(m, T, H) -> (m, heads, T, H / heads), a view."""
    return x_mTH.unflatten(2, (heads, -1)).transpose(1, 2)


def heads_of_bags(
    qkv_mTX: Tensor, heads: int, lengths_b: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each bag, (m, heads, L, E): three equal blocks of columns X."""
    parts = [split_heads(part_mTH, heads).split(list(lengths_b), dim=2) for part_mTH in qkv_mTX.chunk(3, dim=2)]
    return zip(*parts, strict=True)


def join_heads(x_maTE: Tensor) -> Tensor:
    """(m, heads, T, H / heads) -> (m, T, H)."""
    return x_maTE.transpose(1, 2).flatten(2)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent by way of the sigmoid, which is several times quicker on a CPU; equal to about 1e-7."""
    return torch.tanh(x) if x.is_cuda else 2 * torch.sigmoid(2 * x) - 1


def segment_softmax(scores_mT: Tensor, lengths_b: Sequence[int]) -> Tensor:
    """Softmax over the tiles of each bag: (m, T) -> (m, T), every bag's weights sum to 1."""
    if len(lengths_b) == 1:
        return torch.softmax(scores_mT, dim=1)
    bag_of_T = bag_of_tile(lengths_b, scores_mT.device)
    top_mT = segment_reduce(scores_mT.detach().unsqueeze(2), lengths_b, "max").squeeze(2)[:, bag_of_T]
    weights_mT = torch.exp(scores_mT - top_mT)
    sums_mb = segment_reduce(weights_mT.unsqueeze(2), lengths_b, "sum").squeeze(2)
    return weights_mT / sums_mb[:, bag_of_T]


def segment_sum(weights_mT: Tensor, x_mTH: Tensor, lengths_b: Sequence[int]) -> Tensor:
    """Weighted sum of each bag's tiles: (m, T), (m, T, H) -> (m, b, H)."""
    if len(lengths_b) == 1:
        return torch.bmm(weights_mT.unsqueeze(1), x_mTH)
    return segment_reduce(weights_mT.unsqueeze(2) * x_mTH, lengths_b, "sum")


def segment_reduce(x_mTH: Tensor, lengths_b: Sequence[int], how: str) -> Tensor:
    """sum, mean or max over the tiles of each bag: (m, T, H) -> (m, b, H)."""
    lengths = torch.tensor(lengths_b, device=x_mTH.device)
    x_TmH = x_mTH.transpose(0, 1).contiguous()
    return torch.segment_reduce(x_TmH, how, lengths=lengths, axis=0).transpose(0, 1)


def bag_of_tile(lengths_b: Sequence[int], device: torch.device | str) -> Tensor:
    """Which bag of the group each tile belongs to, (T,)."""
    return torch.repeat_interleave(torch.arange(len(lengths_b)), torch.tensor(lengths_b)).to(device)


def segment_extremes(scores_XT: Tensor, lengths_b: Sequence[int], n_top: int, n_bottom: int) -> Tensor:
    """Rows of the n_top highest (highest first) and n_bottom lowest (lowest first) tiles of each bag.

    (X, T) -> (X, b, n_top + n_bottom) indices into T. A bag with fewer tiles than asked repeats its last one: with 3
    tiles and n_top = 5 the top list is 1st, 2nd, 3rd, 3rd, 3rd. So no bag is too small, and no value is made up.
    """
    starts = torch.tensor([0, *lengths_b[:-1]]).cumsum(0)
    found = []
    for start, scores_XL in zip(starts.tolist(), scores_XT.split(list(lengths_b), dim=1), strict=True):
        length = scores_XL.shape[1]
        sides = [(n, largest) for n, largest in ((n_top, True), (n_bottom, False)) if n]
        for n, largest in sides:
            rows_XN = scores_XL.topk(min(n, length), dim=1, largest=largest).indices
            if length < n:
                rows_XN = torch.cat([rows_XN, rows_XN[:, -1:].expand(-1, n - length)], dim=1)
            found.append(rows_XN + start)
    return torch.cat(found, dim=1).unflatten(1, (len(lengths_b), n_top + n_bottom))
