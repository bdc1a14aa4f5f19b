"""The contract of every aggregator.

Axes: M members of the study, m members selected for one group, T tiles laid end to end, B bags of the batch,
b bags of one group, D input features, H hidden, P pooled features, C outputs (1 for two classes), K sites and a row in
front for those without an estimate, R directions between sites.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, Self, cast, get_type_hints

import torch
from torch import Tensor, nn

from mil.aggregators import ranges
from mil.aggregators.batch import Batch, Group, Parameters, Prediction, Task, pack
from mil.aggregators.chance import Chance
from mil.aggregators.covariates import CovariateTerm
from mil.aggregators.layers import cross_entropy, numbered
from mil.aggregators.places import PlacedSelector, Places, Segments
from mil.aggregators.threads import MemberSelector, PooledInThreads, in_order

FEW_TILES = 1024
"""A group of at most so many tiles (small bags, packed) goes through all its members at once: the interpreter, not the
arithmetic, takes the time."""


SITE_SCALES, SITE_SPACE = ("site_mean_MKD", "site_scale_MKD"), ("site_centre_MD", "site_basis_MDR")
Harmonized = Literal["none", "combat", "project"]


class Aggregator(nn.Module):
    """M aggregators of one kind, held as stacked parameters of shape (M, ...).

    A subclass adds its layers in `__init__` with `add_linear` and defines `pool` and `head`. Member i, built from seed
    s_i, starts with the same values whoever else is in the stack, and never sees another member's parameters.

    What an option may be stands in its annotation and nowhere else:

        def __init__(self, in_dim: int, n_outputs: int, seeds: Sequence[int], *,
                     hidden: Annotated[int, Ge(1), MultipleOf("heads")] = 512,
                     heads: Annotated[int, Ge(1)] = 8,
                     head: tuple[Annotated[int, Ge(1)], ...] = (),
                     distill: Literal["afs", "maxs"] = "afs"): ...

    The class refuses anything else when it is built, the config before torch is imported, with the same words, and
    `--help` shows it. `mil.aggregators.ranges` has what annotated_types has not, such as `MultipleOf` another option.
    Only what depends on the features (`in_dim`) is left for `__init__` to check.
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

    n_cuts = 0
    """Of ordered grades, see `add_cuts`."""

    input_mean_MD: Tensor
    input_scale_MD: Tensor
    site_mean_MKD: Tensor
    site_scale_MKD: Tensor
    site_centre_MD: Tensor
    site_basis_MDR: Tensor

    def __new__(cls, *sizes: Any, **options: Any) -> Self:
        """Refuses options that are out of the ranges in the signature, before `__init__` makes anything of them.

        Raises:
            ValueError: all of them, a line each.
        """
        defaults = getattr(cls.__init__, "__kwdefaults__", None) or {}
        chosen = defaults | {name: value for name, value in options.items() if name in defaults}
        if found := ranges.problems(get_type_hints(cls.__init__, include_extras=True), chosen):
            raise ValueError("\n".join(found))
        return super().__new__(cls)

    def __init__(self, in_dim: int, n_outputs: int, seeds: Sequence[int]):
        super().__init__()
        self.in_dim, self.n_outputs, self.n_members = in_dim, n_outputs, len(seeds)
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.register_buffer("input_mean_MD", torch.zeros(len(seeds), in_dim))
        self.register_buffer("input_scale_MD", torch.ones(len(seeds), in_dim))
        self.standardized = False
        self.covariates: CovariateTerm | None = None
        self.cuts_given = False  # by another study
        self.harmonized: Harmonized = "none"
        self.threads = 1
        self.seeds = tuple(int(seed) for seed in seeds)
        self.epoch = 0  # of the random numbers; whoever trains sets it
        self._slides_B: list[int] = []
        self.floats_per_tile, self.floats_per_bag = 0, in_dim  # kept for backward, per member; subclasses say theirs

    def add_linear(self, name: str, n_in: int, n_out: int, *, init: str = "torch", bias: bool = True) -> None:
        """Parameters NAME_weight (M, n_in, n_out) and, unless told otherwise, NAME_bias (M, n_out).

        init: "torch" = torch.nn.Linear's default (uniform, 1/sqrt(n_in)); "xavier" = Xavier uniform, bias zero;
        "normal" = deviation 0.02, bias zero.
        """
        weight_MIO, bias_MO = torch.empty(self.n_members, n_in, n_out), torch.zeros(self.n_members, n_out)
        for m, generator in enumerate(self._generators):
            bound = math.sqrt(6 / (n_in + n_out)) if init == "xavier" else 1 / math.sqrt(n_in)
            if init == "normal":
                weight_MIO[m].normal_(0, 0.02, generator=generator)
            else:
                weight_MIO[m].uniform_(-bound, bound, generator=generator)
            if init == "torch" and bias:
                bias_MO[m].uniform_(-bound, bound, generator=generator)
        self.register_parameter(f"{name}_weight", nn.Parameter(weight_MIO))
        if bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(bias_MO))

    @property
    def n_logits(self) -> int:
        """Columns of what `forward` gives."""
        return self.n_cuts or self.n_outputs

    def add_cuts(self, n_cuts: int) -> None:
        """Rising cuts of one score: `forward` then gives score - cut, a logit each (Cao et al. 2020, CORAL).

        Parameters cut_first (M, 1) and cut_steps (M, n_cuts - 1), from which cuts are made that cannot cross.
        """
        self.n_cuts = n_cuts
        self.register_parameter("cut_first", nn.Parameter(torch.zeros(self.n_members, 1)))
        if n_cuts > 1:
            self.register_parameter("cut_steps", nn.Parameter(torch.zeros(self.n_members, n_cuts - 1)))

    def place_cuts(self, cuts_MK: Tensor) -> None:
        """Where training begins; rising."""
        with torch.no_grad():
            self.get_parameter("cut_first").copy_(cuts_MK[:, :1])
            if self.n_cuts > 1:
                gaps_MK = cuts_MK.diff(dim=1).clamp_min(1e-2)
                self.get_parameter("cut_steps").copy_(torch.log(torch.expm1(gaps_MK)))

    def with_cuts(self, scores_MB1: Tensor) -> Tensor:
        """A score -> a logit for each cut; logits as they are where there are no cuts."""
        if not self.n_cuts:
            return scores_MB1
        cuts_MK: Tensor = self.get_parameter("cut_first")
        if self.n_cuts > 1:
            rises_MK = torch.nn.functional.softplus(self.get_parameter("cut_steps")).cumsum(dim=1)
            cuts_MK = torch.cat([cuts_MK, cuts_MK + rises_MK], dim=1)
        return scores_MB1 - cuts_MK.unsqueeze(1)

    def each(self) -> list[Aggregator]:
        """What trains by itself: this, or of several encoders that are fused one each."""
        return [self]

    def add_covariates(self, categories: Sequence[int]) -> None:
        """Room for a linear term of covariates on every output (`CovariateTerm`); to be filled by who trains."""
        if categories:
            self.covariates = CovariateTerm(self.n_members, categories, self.n_outputs)

    def add_layers(self, names: Sequence[str], widths: Sequence[int], *, init: str = "torch") -> None:
        """Linear layers NAMES one after the other, from widths[0] inputs to widths[-1] outputs."""
        for name, (n_in, n_out) in zip(names, pairwise(widths), strict=True):
            self.add_linear(name, n_in, n_out, init=init)

    def add_attention(self, prefix: str, n_in: int, width: int, gated: bool = True) -> None:
        """PREFIXattend, PREFIXgate (if gated) and PREFIXscore: what `mil.aggregators.layers.attention_scores` uses."""
        self.add_linear(f"{prefix}attend", n_in, width)
        if gated:
            self.add_linear(f"{prefix}gate", n_in, width)
        self.add_linear(f"{prefix}score", width, 1)

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
        self.n_head_layers = len(hidden) + 1
        widths = [n_in, *hidden, self.n_outputs if n_outputs is None else n_outputs]
        self.add_layers(numbered("head", self.n_head_layers), widths, init=init)

    def run_head(self, x_MBI: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The head's layers with `activation` between them: (M, B, I) -> (M, B, O)."""
        return self.run_layers(numbered("head", self.n_head_layers), x_MBI, activation)

    def run_layers(self, names: Sequence[str], x_MBI: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Layers NAMES of all members with `activation` between them: (M, B, I) -> (M, B, O)."""
        for i, name in enumerate(names):
            x_MBI = self.linear(name, activation(x_MBI) if i else x_MBI)
        return x_MBI

    def standardize(self, mean_MD: Tensor, std_MD: Tensor) -> None:
        """Subtract each member's own feature mean and divide by its deviation; constant features are only centred."""
        self.input_mean_MD.copy_(mean_MD)
        self.input_scale_MD.copy_(torch.where(std_MD > 1e-6, 1 / std_MD, torch.ones_like(std_MD)))
        self.standardized = True

    def add_site_maps(self, how: Harmonized, n_sites: int) -> None:
        """Room for what each member takes away from its tiles because of their site; until it is filled, nothing.

        combat: a mean and scale for every site, which then stand in the place of `input_mean_MD` and `input_scale_MD`.
        project: a centre, and an orthonormal basis of what is removed (columns of zeros remove nothing).
        """
        self.harmonized, shape = how, (self.n_members, n_sites + 1, self.in_dim)
        if how == "combat":
            self.register_buffer("site_mean_MKD", torch.zeros(shape))
            self.register_buffer("site_scale_MKD", torch.ones(shape))
        elif how == "project":
            self.register_buffer("site_centre_MD", torch.zeros(self.n_members, self.in_dim))
            self.register_buffer("site_basis_MDR", torch.zeros(self.n_members, self.in_dim, max(n_sites - 1, 1)))

    @contextmanager
    def of_site(self, site: int) -> Iterator[None]:
        """While inside, tiles that come without a site are of this one (a row of `site_mean_MKD`)."""
        if self.harmonized != "combat":
            yield
            return
        kept = self.input_mean_MD, self.input_scale_MD
        self.input_mean_MD, self.input_scale_MD = self.site_mean_MKD[:, site], self.site_scale_MKD[:, site]
        try:
            yield
        finally:
            self.input_mean_MD, self.input_scale_MD = kept

    def pool(self, tiles_TD: Tensor, lengths_b: Sequence[int], p: Parameters) -> tuple[Tensor, Tensor | None]:
        """One group through the selected members. tiles are float; `p` holds parameters (m, ...) by name.

        An aggregator that `draws` takes one more argument, `chance: Chance | None`.
        Returns pooled_mbP and scores_mT (None where they cost extra: see `tile_scores`).
        """
        raise NotImplementedError

    def drop(self, x_mTH: Tensor, lengths_b: Sequence[int], chance: Chance | None, what: str) -> Tensor:
        """`Chance.dropout` with the aggregator's probability, in training only."""
        return chance.dropout(x_mTH, lengths_b, self.dropout, what) if chance else x_mTH

    def dropping(self, lengths_b: Sequence[int], chance: Chance | None) -> Callable[[Tensor, str], Tensor]:
        """`drop` of one group, told values and what they are."""
        return lambda x_mTH, what: self.drop(x_mTH, lengths_b, chance, what)

    def losses(self, prediction: Prediction, labels: Tensor) -> Tensor:
        """What training minimises for every member and bag, (M, B): here the cross-entropy of the logits.

        labels: class indices (B,), or (M, B) where members have labels of their own (`Batch.labels`). An aggregator
        with losses of its own, such as CLAM's on instances, adds them here with their weight; what they need of the
        tiles it puts into columns of `pooled_MBP`.
        """
        return cross_entropy(prediction.logits_MBC.float(), labels)

    def readings(self, prediction: Prediction) -> list[tuple[float, Tensor]]:
        """Logits (M, B, C) that a task other than classification has its loss on, each with its weight.

        An aggregator with several streams or tiers gives them all. What needs classes, such as CLAM's instance loss, is
        left out, see `left_out`.
        """
        return [(1.0, prediction.logits_MBC)]

    def left_out(self) -> str:
        """What of its published loss needs classes and is not there in other tasks; "" where nothing is."""
        return ""

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
        logits_MTC: Tensor = self(pack(tiles_TD.split(1), self.n_members)).logits_MBC
        return logits_MTC

    def forward(self, batch: Batch, with_scores: bool = False) -> Prediction:
        places: Places | None = batch.places
        if self.draws and self.training:
            self._slides_B = list(places.slides) if places else batch.slides_B.tolist()
        stacks = self.stacks()
        tasks = self._tasks(batch)
        if with_scores or not torch.is_grad_enabled():
            selector = selector_of(stacks, places)
            results = list(in_order(lambda task: self.run_task(task, selector, with_scores), tasks, self.threads))
            pooled_RP = joined([pooled for pooled, _ in results])
            scores = [scores_mT for _, scores_mT in results]
        elif self.threads > 1:
            pooled_RP = PooledInThreads.apply(self, tasks, list(stacks), *stacks.values())
        else:
            selector = selector_of(stacks, places)
            pooled_RP = joined([self.run_task(task, selector)[0] for task in tasks])
        pooled_MBP = self._place(pooled_RP, tasks, len(batch.labels_B), places)
        scores_MT = self._join_scores(scores, tasks, batch.groups) if with_scores else None
        if places:
            logits_MBC = self._head_of(pooled_MBP, places.bags_MU)
        else:
            logits_MBC = self._head_where_used(pooled_MBP, batch.uses_MB)
        added_MBC = None
        if self.covariates is not None and batch.covariates_BV is not None:
            added_MBC = self.covariates(batch.covariates_BV)
            logits_MBC = logits_MBC + added_MBC
        return Prediction(self.with_cuts(logits_MBC), scores_MT, pooled_MBP, added_MBC)

    def _head_where_used(self, pooled_MBP: Tensor, uses_MB: Tensor) -> Tensor:
        """`head` of every member on its own bags alone, where they are few of the batch's; zeros for most others."""
        n_used, n_bags = int(uses_MB.sum(dim=1).max()), uses_MB.shape[1]
        if n_used == 0 or 4 * n_used > 3 * n_bags:
            return self.head(pooled_MBP)
        bags_MU = (~uses_MB).to(torch.uint8).argsort(dim=1, stable=True)[:, :n_used].to(pooled_MBP.device)
        return self._head_of(pooled_MBP, bags_MU)

    def _head_of(self, pooled_MBP: Tensor, bags_MU: Tensor | None) -> Tensor:
        """`head` of every member on these of its bags, zeros for the others; None = on all."""
        if bags_MU is None:
            return self.head(pooled_MBP)
        members_M1 = torch.arange(self.n_members, device=pooled_MBP.device).unsqueeze(1)
        logits_MUC = self.head(pooled_MBP[members_M1, bags_MU])
        logits_MBC = logits_MUC.new_zeros(self.n_members, pooled_MBP.shape[1], logits_MUC.shape[2])
        return logits_MBC.index_put((members_M1, bags_MU), logits_MUC)

    def stacks(self) -> dict[str, Tensor]:
        """Parameters by name, and the maps of the features where there are any: everything that `pool` may read."""
        found: dict[str, Tensor] = dict(self.named_parameters())
        names = ["input_mean_MD", "input_scale_MD"] if self.shifted else []
        names += {"combat": SITE_SCALES, "project": SITE_SPACE}.get(self.harmonized, ())
        return found | {name: getattr(self, name) for name in names}

    @property
    def shifted(self) -> bool:
        """Whether members see tiles shifted and scaled, all alike or each site by its own numbers."""
        return self.standardized or self.harmonized == "combat"

    @property
    def mapped(self) -> bool:
        """Whether members see tiles otherwise than they are stored."""
        return self.standardized or self.harmonized != "none"

    def _tasks(self, batch: Batch) -> list[Task]:
        """Groups with their members, the largest first: threads that take one after the other end at about one time.

        For the same reason the groups left over, when every thread has got as many, are cut by members.
        """
        everyone = tuple(range(self.n_members))
        tasks = [(group, everyone if group.members is None else group.members) for group in batch.groups]
        if self.threads == 1 or self.members_at_a_time is None:
            return tasks
        tasks.sort(key=lambda task: task[0].n_tiles * len(task[1]), reverse=True)
        whole = len(tasks) - len(tasks) % self.threads
        cut = [(group, part) for group, members in tasks[whole:] for part in self._parts(group, members)]
        return tasks[:whole] + cut

    def _parts(self, group: Group, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Members of one group for several threads: alike parts where tiles are few, else one by one."""
        n_parts = min(self.threads, len(members)) if group.n_tiles <= FEW_TILES else len(members)
        return [members[len(members) * i // n_parts : len(members) * (i + 1) // n_parts] for i in range(n_parts)]

    def run_task(
        self, task: Task, selector: MemberSelector | PlacedSelector, with_scores: bool = False
    ) -> tuple[Tensor, Tensor]:
        """pooled_RP, a row for each member and bag, members first; scores_mT (empty unless asked for)."""
        group, members = task
        tiles_TD = self.prepare(group.together())
        together = isinstance(group.lengths_b, Segments) or tiles_TD.is_cuda or len(tiles_TD) <= FEW_TILES
        n = len(members) if together or self.members_at_a_time is None else self.members_at_a_time
        rows, scores = [], [tiles_TD.new_empty(0)]
        for some in [members[i : i + n] for i in range(0, len(members), n)]:
            p = self.at_site(selector.select(some), group.site)
            pooled_mbP, scores_mT = self.pool(tiles_TD, group.lengths_b, p, *self._chance(group, some))
            rows.append(pooled_mbP.flatten(0, 1))
            if with_scores:
                scores.append(self.tile_scores(tiles_TD, group.lengths_b, p) if scores_mT is None else scores_mT)
        return joined(rows), joined(scores[1:] or scores)

    def at_site(self, p: Parameters, site: int | None) -> Parameters:
        """The parameters with mean and scale of a site, where sites have their own."""
        if self.harmonized != "combat" or site is None:
            return p
        mean_mD, scale_mD = (p[name].detach()[:, site] for name in SITE_SCALES)
        own = {"input_mean_MD": mean_mD, "input_scale_MD": scale_mD}
        return ChainMap(own, cast(dict[str, Tensor], p))  # which only reads

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
        return (Chance(tuple(self.seeds[m] for m in members), self.epoch, slides_b, tuple(members)),)

    def _place(self, pooled_RP: Tensor, tasks: Sequence[Task], n_bags: int, places: Places | None) -> Tensor:
        """Rows to their member and bag; zeros where a member does not use a bag."""
        if places:
            if places.rows_R is not None:
                empty_RP = pooled_RP.new_zeros(self.n_members * n_bags, pooled_RP.shape[1])
                pooled_RP = empty_RP.index_copy(0, places.rows_R, pooled_RP)
            return pooled_RP.view(self.n_members, n_bags, -1)
        member_R = [m for group, members in tasks for m in members for _ in group.bags_b]
        bag_R = [b for group, members in tasks for _ in members for b in group.bags_b]
        pooled_MBP = pooled_RP.new_zeros(self.n_members, n_bags, pooled_RP.shape[1])
        return pooled_MBP.index_put((torch.tensor(member_R), torch.tensor(bag_R)), pooled_RP)

    def _join_scores(self, scores: Sequence[Tensor], tasks: Sequence[Task], groups: Sequence[Group]) -> Tensor:
        """scores_MT in the order of the groups; NaN where a member does not use a bag."""
        columns = {id(g): scores[0].new_full((self.n_members, g.n_tiles), torch.nan) for g in groups}
        for (group, members), scores_mT in zip(tasks, scores, strict=True):
            columns[id(group)][list(members)] = scores_mT
        return torch.cat(list(columns.values()), dim=1)

    def first_layer(self, name: str, p: Parameters) -> tuple[Tensor, Tensor]:
        """weight_mDH and bias_mH of layer `name` with what each member does to its tiles folded in (`seen`)."""
        weight_mDH, bias_mH = p[f"{name}_weight"], p[f"{name}_bias"]
        if self.shifted:
            weight_mDH = weight_mDH * p["input_scale_MD"].unsqueeze(2)
            bias_mH = bias_mH - torch.einsum("md,mdh->mh", p["input_mean_MD"], weight_mDH)
        if self.harmonized == "project":
            basis_mDR = p["site_basis_MDR"]
            removed_mDH = basis_mDR @ (basis_mDR.transpose(1, 2) @ weight_mDH)
            bias_mH = bias_mH + torch.einsum("md,mdh->mh", p["site_centre_MD"], removed_mDH)
            weight_mDH = weight_mDH - removed_mDH
        return weight_mDH, bias_mH

    def features(self, tiles_TD: Tensor, p: Parameters) -> Tensor:
        """The tiles as each member sees them: (T, D) -> (m, T, D), or (1, T, D) where it sees them as stored."""
        return self.seen(tiles_TD.unsqueeze(0), p)

    def seen(self, x_mXD: Tensor, p: Parameters) -> Tensor:
        """Features as each member sees them, or means of them: without what lies between sites, shifted and scaled.

        x_mXD: (m, X, D), or (1, X, D) where they are the same for all members.
        """
        if self.harmonized == "project":
            basis_mDR, centre_mD = p["site_basis_MDR"].detach(), p["site_centre_MD"].detach()
            x_mXD = x_mXD - (x_mXD - centre_mD.unsqueeze(1)) @ basis_mDR @ basis_mDR.transpose(1, 2)
        if self.shifted:
            x_mXD = (x_mXD - p["input_mean_MD"].detach().unsqueeze(1)) * p["input_scale_MD"].detach().unsqueeze(1)
        return x_mXD

    def linear(self, name: str, x_MBI: Tensor) -> Tensor:
        """Layer `name` of all members on their own inputs: (M, B, I) -> (M, B, O)."""
        return torch.baddbmm(getattr(self, f"{name}_bias").unsqueeze(1), x_MBI, getattr(self, f"{name}_weight"))


def selector_of(stacks: dict[str, Tensor], places: Places | None) -> MemberSelector | PlacedSelector:
    """What gives some members' parameters."""
    return PlacedSelector(stacks, places) if places else MemberSelector(stacks)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """End to end; one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
