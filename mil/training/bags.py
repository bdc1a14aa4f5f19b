"""Cached features in memory or memory-mapped, and the packed batches that members train on.

Axes: S slides, T tiles of one slide or batch, D features, M members, B bags of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from extract.config import ProblemsError
from extract.features.errors import CacheError
from extract.features.folder import refuse_replaced
from extract.features.mapping import MappedArray
from extract.room import free_bytes
from mil.aggregators.batch import Batch, Group

VIEW_TILES = 256
"""Bags of at least this many tiles are used where they lie; smaller ones are copied together: quicker for them."""
EVALUATION_TILES = 16_384
"""Tiles in one evaluation batch, about; one bag may be larger."""
MOST_MAPS = 32_768
"""Maps kept at a time: half of what Linux allows a process by default (vm.max_map_count = 65,530)."""
FEATURES_SHARE = 0.6
"""`memory=auto` holds features in memory when they need at most this share of what is free."""


Shape = tuple[int, int]


class Announced(NamedTuple):
    """What the check found in a slide's file. identity: "" = not compared."""

    shape: Shape
    identity: str = ""


class FeatureSource(Protocol):
    """What `Bags` needs of extract.features.folder.FeatureFolder."""

    def features(self, slide: str) -> np.ndarray: ...
    def mapped(self, slide: str) -> np.ndarray: ...
    def identity(self, slide: str) -> str: ...


class BagsError(ProblemsError):
    """Feature files that were all right when their headers were read, and are not now."""


class MappedViews(Sequence[Tensor]):
    """Features that are mapped, or read where a file cannot be mapped, when a slide is first used.

    Up to MOST_MAPS are kept; a map costs no open file. What had to be read is kept as far as `budget_bytes` go. What
    is given up lives on while somebody holds its tensor.
    """

    def __init__(
        self, source: FeatureSource, slides: Sequence[str], announced: Sequence[Announced], nbytes: int, budget: float
    ):
        self.source, self.slides, self.announced = source, slides, announced
        self.nbytes, self.budget_bytes = nbytes, budget
        self.kept: dict[int, Tensor] = {}  # the longest unused first
        self.read: dict[int, int] = {}  # bytes of those that are no maps
        self.read_bytes = 0

    def __len__(self) -> int:
        return len(self.slides)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        view = self.kept.pop(index, None)
        view = self._open(index) if view is None else view
        self.kept[index] = view
        while len(self.kept) > MOST_MAPS or (self.read_bytes > self.budget_bytes and len(self.kept) > 1):
            oldest = next(iter(self.kept))
            del self.kept[oldest]
            self.read_bytes -= self.read.pop(oldest, 0)
        return view

    def _open(self, index: int) -> Tensor:
        array_TD = _as_announced(self.source, self.slides[index], self.announced[index])
        if not isinstance(array_TD, MappedArray):
            self.read[index] = array_TD.nbytes
            self.read_bytes += array_TD.nbytes
        return as_tensor(array_TD)


@dataclass(frozen=True)
class Bags:
    """The features of S slides as stored. `features(i)` is a view: nothing is copied or converted.

    slides: names, in the cohort's order. lengths_S: tiles of each. `features` raises CacheError where memory="mmap"
    and a file is not what its header said. site_S: the row of `Aggregator.site_mean_MKD` that each slide is mapped
    with, where sites have rows of their own; None: they have not. covariates_SV: what the table says of the patients
    (`mil.study.covariates`); None: nothing is asked. on_device: whether a GPU holds them while it trains
    (`mil.training.device`); auto: if they fit. elsewhere: where they are besides, by device.
    """

    slides: tuple[str, ...]
    lengths_S: np.ndarray
    dim: int
    memory: str
    views: Sequence[Tensor]
    site_S: np.ndarray | None = None
    covariates_SV: np.ndarray | None = None
    on_device: Literal["auto", "yes", "no"] = "auto"

    def __len__(self) -> int:
        return len(self.slides)

    def features(self, index: int) -> Tensor:
        """(T, D) of slide `index`, float16 or float32 as stored."""
        return self.views[index]

    def views_of(self, index: int, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        """The bag's tiles where they lie: one view; of a patient (`mil.training.patients`) one a slide.

        kept: these rows alone (sorted), which are copied.
        """
        return (self.features(index) if kept is None else self.features(index)[kept],)

    @cached_property
    def means_SD(self) -> np.ndarray:
        """The mean of all tiles of every slide, (S, D) float64: what linear probes, baselines and sites look at.

        Read once, slide by slide, so features that are memory-mapped are streamed; `features` says what it raises.
        """
        means_SD = np.empty((len(self), self.dim))  # by NumPy, an eighth of torch's time for float16
        for s in range(len(self)):
            means_SD[s] = self.features(s).numpy().mean(axis=0, dtype=np.float64)
        return means_SD

    @cached_property
    def elsewhere(self) -> dict[str, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "elsewhere"}

    @property
    def nbytes(self) -> int:
        """Of all features as stored; maps are not opened for it."""
        return self.views.nbytes if isinstance(self.views, MappedViews) else sum(view.nbytes for view in self.views)


def load_bags(
    source: FeatureSource,
    slides: Sequence[str],
    lengths: Sequence[int],
    dtypes: Sequence[str],
    dim: int,
    memory: str = "auto",
    progress: Callable[[int], object] = lambda done: None,
    identities: Sequence[str] = (),
) -> Bags:
    """Read the slides' features.

    Args:
        lengths, dtypes, dim: from the files' headers.
        memory: "ram" = one block in memory, in the widest stored type; "mmap" = read from disk when used;
            "auto" = ram when the features need at most 60 % of the free memory; "device" = like auto, and a copy of
            all of them on the device that trains. With "ram" and "mmap" none is kept there.
        progress: called with the number of slides read so far.
        identities: of the files, from the headers; what is read, and mapped whenever that is, must have the same.

    Raises:
        BagsError: memory="ram" and files cannot be read or have changed since; all of them. With "mmap" it is noticed
            when a slide is first used, see `check_finite`.
    """
    dtype = torch.float32 if "float32" in dtypes else torch.float16
    free = FEATURES_SHARE * free_bytes()
    on_device: Literal["auto", "yes", "no"] = "auto" if memory == "auto" else "yes" if memory == "device" else "no"
    if memory in ("auto", "device"):
        memory = "ram" if sum(lengths) * dim * dtype.itemsize <= free else "mmap"
    fixed = (tuple(slides), np.asarray(lengths, dtype=np.int64), dim, memory)
    names = identities or [""] * len(slides)
    announced = [Announced((length, dim), name) for length, name in zip(lengths, names, strict=True)]
    if memory == "mmap":
        nbytes = sum(n * dim * np.dtype(stored).itemsize for n, stored in zip(lengths, dtypes, strict=True))
        return Bags(*fixed, MappedViews(source, slides, announced, nbytes, free), on_device=on_device)
    views = torch.split(torch.empty(sum(lengths), dim, dtype=dtype), list(lengths))
    problems = []
    for done, (slide, expected, view) in enumerate(zip(slides, announced, views, strict=True)):
        try:
            view.copy_(as_tensor(_as_announced(source, slide, expected)))
        except CacheError as error:
            problems.append(f"slide {slide!r}: {error}")
        progress(done + 1)
    if problems:
        raise BagsError("features cannot be read", problems)
    return Bags(*fixed, views, on_device=on_device)


def _as_announced(source: FeatureSource, slide: str, expected: Announced) -> np.ndarray:
    """The slide's features; CacheError if they are not those whose header was checked."""
    array_TD = source.mapped(slide)
    if array_TD.shape != expected.shape:
        raise CacheError(
            f"expected features of shape {expected.shape}, as it was checked, got {array_TD.shape}; it was replaced"
        )
    refuse_replaced(source, slide, expected.identity)
    return array_TD


def as_tensor(array: np.ndarray) -> Tensor:
    """Without a copy. A read-only map stays read-only: nothing in this toolkit writes to features."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def make_batch(
    bags: Bags,
    slides: Sequence[int],
    labels_S: np.ndarray,
    uses_MB: np.ndarray,
    *,
    one_group: bool = False,
    rows: Callable[[int], Tensor | None] = lambda slide: None,
    labels_MS: np.ndarray | None = None,
) -> Batch:
    """Pack the given slides.

    Args:
        slides: rows of the cohort.
        uses_MB: which member uses which of them.
        one_group: copy all bags end to end (for an accelerator) instead of using large ones as views.
        rows: tiles of a slide to keep (sorted indices), None = all.
        labels_MS: each member's own labels, where members differ in them.
    """
    groups = []
    small: dict[int | None, list[tuple[int, tuple[Tensor, ...]]]] = {}  # bags copied together are of one site
    n_members = len(uses_MB)
    for b, slide in enumerate(slides):
        site = None if bags.site_S is None else int(bags.site_S[slide])
        views = bags.views_of(slide, rows(slide))
        length = sum(len(view) for view in views)
        if one_group or length < VIEW_TILES:
            small.setdefault(site, []).append((b, views))
        else:
            members = members_of(uses_MB[:, b], n_members)
            groups.append(Group(views[0], (length,), (b,), members, site, views[1:]))
    for site, bags_of_site in small.items():
        bags_b = tuple(b for b, _ in bags_of_site)
        used_M = uses_MB[:, list(bags_b)].any(axis=1)
        tiles_TD = torch.cat([view for _, views in bags_of_site for view in views])
        lengths_b = tuple(sum(len(view) for view in views) for _, views in bags_of_site)
        groups.append(Group(tiles_TD, lengths_b, bags_b, members_of(np.asarray(used_M), n_members), site))
    slides_B = np.asarray(slides, dtype=np.int64)
    return Batch(
        tuple(groups),
        torch.from_numpy(labels_S[slides_B]),
        torch.from_numpy(slides_B),
        torch.from_numpy(uses_MB),
        None if labels_MS is None else torch.from_numpy(labels_MS[:, slides_B]),
        None if bags.covariates_SV is None else torch.from_numpy(bags.covariates_SV[slides_B]),
    )


class OnDevice(Protocol):
    """What steps need of `mil.training.device.DeviceFeatures`."""

    def batch(
        self,
        slides: Sequence[int],
        labels_S: np.ndarray,
        uses_MB: np.ndarray,
        rows: Callable[[int], Tensor | None] = ...,
        labels_MS: np.ndarray | None = None,
    ) -> Batch:
        """As `make_batch`, on the device."""

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, made before they are asked for."""


def members_of(used_M: np.ndarray, n_members: int) -> tuple[int, ...] | None:
    members = tuple(np.flatnonzero(used_M).tolist())
    return None if len(members) == n_members else members


@dataclass(frozen=True)
class TrainingSteps:
    """One epoch of packed batches for all members; iterate it again for the next epoch.

    All members walk the same shuffled order of slides (`order`), each over its own training slides, `batch_size` at a
    time, the last batch short but never dropped. A step holds what the members need at that moment, and a member's
    batches do not depend on who else is in the study. Members that train on other slides reach a slide at other steps,
    so an epoch reads a slide's features once for all seeds and settings of a fold, about 1.4 times for 5 folds of
    Camelyon16's size, and two to three times where inner folds or smaller training sets train in the same pass.

    Seeds share the order and the tiles that are drawn: they differ in their starting parameters (and dropout) only, so
    that their spread is that of the initialisation, not of all chance in training.

    Attributes:
        train_MS: which slides each member trains on.
        seed: of the order and of the tile subsets; 0 is a seed.
        epoch: returns the current epoch.
        active_M: returns which members still train.
        max_tiles: a fresh random subset of a larger bag's tiles in every epoch; None = all tiles.
        labels_MS: each member's own labels; None = labels_S for all.
        there: the features on the device that trains, of which its batches are made; None = `bags` where they lie.
        needed_MS: slides of which every batch of a member must have one: a batch without is joined to the member's next
            one, the last to the one before; None = no such slides.
    """

    bags: Bags
    labels_S: np.ndarray
    train_MS: np.ndarray
    batch_size: int
    seed: int
    epoch: Callable[[], int]
    active_M: Callable[[], np.ndarray]
    max_tiles: int | None = None
    one_group: bool = False
    labels_MS: np.ndarray | None = None
    needed_MS: np.ndarray | None = None
    there: OnDevice | None = None

    def __len__(self) -> int:
        if self.needed_MS is not None:
            return int(self.steps(self.order(self.epoch())).max(initial=-1)) + 1
        slides_of_members = self.train_MS[self.active_M()].sum(axis=1)
        return int(-(-slides_of_members.max(initial=0) // self.batch_size))

    def order(self, epoch: int) -> np.ndarray:
        """Slides that anybody trains on, shuffled by (seed, epoch); who else trains does not change anyone's order."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.bags))
        return order[np.asarray(self.train_MS.any(axis=0))[order]]

    def __iter__(self) -> Iterator[Batch]:
        return self.there.ahead(self._batches()) if self.there else self._batches()

    def _batches(self) -> Iterator[Batch]:
        epoch = self.epoch()
        order = self.order(epoch)
        step_MO = self.steps(order)
        for step in range(len(self)):
            needed = np.flatnonzero((step_MO == step).any(axis=0))
            slides, uses_MB = order[needed].tolist(), step_MO[:, needed] == step
            rows = partial(self.subset, epoch=epoch)
            if self.there:
                yield self.there.batch(slides, self.labels_S, uses_MB, rows, self.labels_MS)
                continue
            yield make_batch(
                self.bags,
                slides,
                self.labels_S,
                uses_MB,
                one_group=self.one_group,
                rows=rows,
                labels_MS=self.labels_MS,
            )

    def steps(self, order: np.ndarray) -> np.ndarray:
        """In which step each member trains on each slide of `order`, (M, O); -1 = in none."""
        train_MO = self.train_MS[:, order]
        step_MO = np.asarray(np.where(train_MO, (train_MO.cumsum(axis=1) - 1) // self.batch_size, -1))
        step_MO[~self.active_M()] = -1
        if self.needed_MS is None:
            return step_MO
        pairs = zip(step_MO, self.needed_MS[:, order], strict=True)
        return np.stack([joined_steps(step_O, needed_O) for step_O, needed_O in pairs])

    def subset(self, slide: int, epoch: int) -> Tensor | None:
        """Sorted tile rows for this epoch, None where all are used."""
        length = int(self.bags.lengths_S[slide])
        if self.max_tiles is None or length <= self.max_tiles:
            return None
        chosen = np.random.default_rng([self.seed, epoch, slide]).choice(length, self.max_tiles, replace=False)
        return torch.from_numpy(np.sort(chosen))


def joined_steps(step_O: np.ndarray, needed_O: np.ndarray) -> np.ndarray:
    """One member's steps where a batch without a needed slide goes with the next, the last with the one before."""
    n_steps = int(step_O.max(initial=-1)) + 1
    if not n_steps:
        return step_O
    has = np.bincount(step_O[(step_O >= 0) & needed_O], minlength=n_steps) > 0
    new: np.ndarray = np.cumsum(has) - has  # steps that are complete before this one
    joined: np.ndarray = np.where(step_O < 0, -1, np.minimum(new, max(has.sum() - 1, 0))[step_O])
    return joined


def steps_joined(steps: TrainingSteps, needed: np.ndarray) -> TrainingSteps:
    """The same steps, each batch of a member with a slide of `needed`: (M, S), or (S,) for all members."""
    return replace(steps, needed_MS=np.broadcast_to(needed, steps.train_MS.shape))


@dataclass(frozen=True)
class EvaluationSteps:
    """Packed batches of all tiles of `slides`, in order, for every member or only for those that `uses_MS` names."""

    bags: Bags
    labels_S: np.ndarray
    slides: Sequence[int]
    n_members: int
    uses_MS: np.ndarray | None = None
    labels_MS: np.ndarray | None = None
    there: OnDevice | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self.there.ahead(self._batches()) if self.there else self._batches()

    def _batches(self) -> Iterator[Batch]:
        for chunk in self._chunks():
            everyone_MB = np.ones((self.n_members, len(chunk)), dtype=bool)
            uses_MB = everyone_MB if self.uses_MS is None else self.uses_MS[:, chunk]
            if self.there:
                yield self.there.batch(chunk, self.labels_S, uses_MB, labels_MS=self.labels_MS)
                continue
            yield make_batch(self.bags, chunk, self.labels_S, uses_MB, labels_MS=self.labels_MS)

    def __len__(self) -> int:
        return sum(1 for _ in self._chunks())

    def _chunks(self) -> Iterator[list[int]]:
        chunk: list[int] = []
        tiles = 0
        for slide in self.slides:
            length = int(self.bags.lengths_S[slide])
            if chunk and tiles + length > EVALUATION_TILES:
                yield chunk
                chunk, tiles = [], 0
            chunk.append(slide)
            tiles += length
        if chunk:
            yield chunk


@dataclass(frozen=True)
class SlideSums:
    """Of the slides that anybody trains on (U rows, `slides_U` says which): tiles, sums and sums of squares."""

    slides_U: np.ndarray
    counts_U: Tensor
    sums_UD: Tensor
    squares_UD: Tensor


def slide_sums(bags: Bags, train_MS: np.ndarray) -> SlideSums:
    """Float64, one slide at a time."""
    used = np.flatnonzero(train_MS.any(axis=0))
    tiles = (bags.features(int(i)).double() for i in used)
    sums_UD, squares_UD = zip(*((x.sum(dim=0), x.square().sum(dim=0)) for x in tiles), strict=True)
    return SlideSums(
        used, torch.from_numpy(bags.lengths_S[used]).double(), torch.stack(sums_UD), torch.stack(squares_UD)
    )


def training_moments(bags: Bags, train_MS: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature over each member's training tiles: (M, D) and (M, D), float32."""
    sums = slide_sums(bags, train_MS)
    weights_MU = torch.from_numpy(train_MS[:, sums.slides_U]).double()
    counts_M1 = (weights_MU @ sums.counts_U).unsqueeze(1)
    mean_MD = weights_MU @ sums.sums_UD / counts_M1
    variance_MD = weights_MU @ sums.squares_UD / counts_M1 - mean_MD.square()
    return mean_MD.float(), variance_MD.clamp_min(0).sqrt().float()
