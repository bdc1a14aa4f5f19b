"""Bags of tile features as scikit-learn sees them: an estimator that trains as a study does.

Axes: S bags, T tiles of one bag, D features, M members, C classes, O outputs (1 for two classes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor

from extract.cohort import Cohort
from extract.config import ConfigError, merge_config
from extract.finetuning.one_device import device_of
from extract.wording import at_most, count
from mil.api.aggregator import build, option_problems
from mil.api.quiet import settings_of_torch_kept
from mil.config import Train
from mil.results.tables import to_probabilities
from mil.results.trained import bags_of, member_logits, score_bag
from mil.study.plan import make_plan
from mil.study.roles import TRAIN, Plan, Round, plan_of_rounds
from mil.training.bags import Bags
from mil.training.module import Members, MembersModule, fit

TRAIN_KEYS = (
    *("epochs", "batch_size", "optimizer", "schedule", "class_weights", "standardize", "select", "metric"),
    *("patience", "lr", "weight_decay", "accelerator", "precision"),
)
"""Parameters that are those of `train`, under the same names."""

BagLike = Any
"""(T, D): a NumPy array, a torch tensor, or what NumPy makes an array of."""


class SlideEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn is not annotated
    """What all estimators on bags have: parameters, members, what they looked at. `SlideClassifier` describes them."""

    def __init__(
        self,
        aggregator: str = "abmil",
        *,
        options: dict[str, Any] | None = None,
        epochs: int = 50,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer: str = "adam",
        schedule: str = "constant",
        batch_size: int = 16,
        class_weights: str = "none",
        standardize: bool = False,
        max_tiles: int | None = None,
        n_members: int = 1,
        val_fraction: float = 0.0,
        select: str = "last",
        metric: str = "auc",
        patience: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
        accelerator: str = "auto",
        precision: str = "32-true",
    ):
        self.aggregator = aggregator
        self.options = options
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.schedule = schedule
        self.batch_size = batch_size
        self.class_weights = class_weights
        self.standardize = standardize
        self.max_tiles = max_tiles
        self.n_members = n_members
        self.val_fraction = val_fraction
        self.select = select
        self.metric = metric
        self.patience = patience
        self.random_state = random_state
        self.accelerator = accelerator
        self.precision = precision

    def _settings(self) -> Train:
        """The section `train`; ConfigError with everything that is wrong with the parameters."""
        said = {key: getattr(self, key) for key in TRAIN_KEYS}
        options = self.options if self.options is not None else {}
        problems = option_problems(self.aggregator, options) if isinstance(options, dict) else []
        if not isinstance(options, dict):
            problems.append(f"options: expected a dictionary, got {options!r}")
        if not is_count(self.n_members):
            problems.append(f"n_members: expected a whole number of at least 1, got {self.n_members!r}")
        if self.max_tiles is not None and not is_count(self.max_tiles):
            problems.append(f"max_tiles: expected a whole number of at least 1, or None, got {self.max_tiles!r}")
        if not isinstance(self.val_fraction, int | float) or not 0 <= self.val_fraction < 1:
            problems.append(f"val_fraction: expected a number from 0 to below 1, got {self.val_fraction!r}")
        if self.select == "best" and not self.val_fraction:
            problems.append("select='best': needs validation bags; set val_fraction, such as 0.2")
        try:
            settings = merge_config(Train, None, said)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError("problems in the parameters", problems)
        return settings

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _members(self, plan: Plan) -> Members:
        lr_M, decay_M = (plan.members[key].to_numpy(dtype=float) for key in ("lr", "weight_decay"))
        return Members(lr_M, decay_M, plan.uses("train"), plan.uses("val"))

    # --- saying

    def tile_scores(self, bag: BagLike) -> np.ndarray:
        """What the members looked at in ONE bag, (T,), their mean. Attention aggregators: weights, which sum to 1;
        Chowder: its tile score (of several classes the highest of each tile); max: how often a tile is the highest."""
        bag_TD = self._checked([bag])[0]
        with on_device(self.aggregator_, self.accelerator) as device:
            scores_MT = score_bag(self.aggregator_, bag_TD, device, with_scores=True).scores_MT
        assert scores_MT is not None
        mean_T: np.ndarray = scores_MT.double().mean(dim=0).numpy()
        return mean_T

    def _logits(self, bags: Sequence[BagLike]) -> np.ndarray:
        """logits_SO: the mean over members."""
        tensors = self._checked(bags)
        with on_device(self.aggregator_, self.accelerator) as device:
            logits_MSO = member_logits(self.aggregator_, as_bags(tensors), device)
        logits_SO: np.ndarray = logits_MSO.astype(np.float64).mean(axis=0)
        return logits_SO

    def _checked(self, bags: Sequence[BagLike]) -> list[Tensor]:
        check_is_fitted(self, "aggregator_")
        tensors = checked_bags(bags)
        if tensors[0].shape[1] != self.n_features_in_:
            name, dim = type(self).__name__, tensors[0].shape[1]
            raise ValueError(f"X has {dim} features, but {name} is expecting {self.n_features_in_} features as input")
        return tensors

    # --- parameters

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All parameters; with `deep` the aggregator's options as well, as `options__OPTION`."""
        found: dict[str, Any] = super().get_params(deep=False)
        inside = found["options"] if deep and isinstance(found["options"], dict) else {}
        return found | {f"options__{key}": value for key, value in inside.items()}

    def set_params(self, **parameters: Any) -> Self:
        """`options__OPTION` sets one of the aggregator's options and leaves the others."""
        inside = {key: value for key, value in parameters.items() if key.startswith("options__")}
        super().set_params(**{key: value for key, value in parameters.items() if key not in inside})
        if inside:
            own = {key.removeprefix("options__"): value for key, value in inside.items()}
            self.options = {**(self.options or {}), **own}
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.non_deterministic = self.random_state is None
        return tags


class SlideClassifier(ClassifierMixin, SlideEstimator):  # type: ignore[misc]  # scikit-learn is not annotated
    """A multiple-instance classifier for scikit-learn: a sample is a bag of tile features, one label each.

    >>> import mil, numpy
    >>> from sklearn.model_selection import cross_val_score
    >>> rng = numpy.random.default_rng(0)
    >>> labels = numpy.array(["normal", "tumor"] * 10)
    >>> bags = [rng.normal(size=(rng.integers(20, 40), 8)).astype("float32") for _ in labels]
    >>> for bag in bags[1::2]:
    ...     bag[:3] += 3  # a few tumour tiles
    >>> classifier = mil.SlideClassifier("abmil", epochs=20, lr=0.01, options={"hidden": 16, "attention": 8})
    >>> cross_val_score(classifier, bags, labels, cv=2, scoring="roc_auc").shape
    (2,)
    >>> classifier.fit(bags, labels).predict_proba(bags[:3]).shape
    (3, 2)
    >>> classifier.tile_scores(bags[1]).argmax() in (0, 1, 2)
    True

    It trains through the module that trains studies: with the same settings and the same data it has the weights of a
    study's member (`study.folds=1`, the seed as `random_state`). Bags are a list of arrays or tensors (T, D), each with
    one tile or more; float16 and float32 stay as they are, all else becomes float32.

    Args:
        aggregator: as `model.name`: abmil, chowder, ... or torchmil:NAME.
        options: of the aggregator, as `model.OPTION`; GridSearchCV reaches them as `options__OPTION`.
        n_members: initialisations that are trained side by side; what they say is the mean of their logits.
        val_fraction: part of the bags held out to select the epoch (select="best"); bags of one group stay together.
        max_tiles: train on this many random tiles a bag, fresh every epoch.
        random_state: of initialisation, order and held-out part; 0 is a seed. None: another one every time.
        epochs, lr, ...: as `train.epochs`, `train.lr`, ...

    Attributes:
        classes_: the labels, sorted; of two the last is the positive one. n_features_in_: D.
        aggregator_: the trained stack of members, in evaluation mode. history_: loss and AUC after every epoch.

    Raises:
        ConfigError (extract.config): `fit` found something wrong with the parameters. ValueError: with bags or labels.
    """

    def fit(self, bags: Sequence[BagLike], labels: Any, groups: Any = None) -> Self:
        """Train on labelled bags.

        Args:
            bags: S arrays or tensors (T, D). labels: S of them, of any type that can be sorted.
            groups: S patients, for `val_fraction`; default: every bag is its own.
        """
        settings = self._settings()
        tensors = checked_bags(bags)
        index_S, classes = checked_labels(labels, len(tensors))
        seed = self._seed()
        plan = self._plan(index_S, classes, checked_groups(groups, len(tensors)), seed)
        dim, seeds = tensors[0].shape[1], plan.members["init_seed"].tolist()
        try:
            stack = build(self.aggregator, dim, len(classes), seeds, self.options or {})
        except ValueError as error:  # what only the aggregator itself can say
            raise ConfigError("problems in the parameters", str(error).splitlines()) from None
        module = MembersModule(
            stack,
            as_bags(tensors),
            index_S,
            len(classes),
            self._members(plan),
            settings,
            seed=seed,
            max_tiles=self.max_tiles,
        )
        with settings_of_torch_kept():
            fit(module, progress=False)
        self.classes_, self.n_features_in_ = classes, dim
        self.aggregator_ = module.aggregator.to("cpu").eval()
        self.history_ = pd.DataFrame(module.history)
        return self

    def _plan(self, index_S: np.ndarray, classes: np.ndarray, groups_S: list[str], seed: int) -> Plan:
        """Members that train on every bag, or on all but the held-out part: as a study without folds."""
        seeds = [seed + i for i in range(self.n_members)]
        if not self.val_fraction:
            everything = Round(0, 0, np.full(len(index_S), TRAIN, dtype=np.int8))
            return plan_of_rounds([everything], seeds, self.lr, self.weight_decay)
        names = tuple(str(i) for i in range(len(classes)))
        bags = [f"bag {i}" for i in range(len(index_S))]
        table = pd.DataFrame({"slide": bags, "patient": groups_S, "split": "train"})
        table["label"] = pd.Series([names[i] for i in index_S], dtype=object)
        return make_plan(
            Cohort(table, names),
            folds=1,
            seeds=seeds,
            val_fraction=self.val_fraction,
            lr=self.lr,
            weight_decay=self.weight_decay,
            split_seed=seed,
        )

    # --- saying

    def decision_function(self, bags: Sequence[BagLike]) -> np.ndarray:
        """Mean of the members' logits: (S,) log-odds of `classes_[1]` for two classes, else (S, C)."""
        logits_SO = self._logits(bags)
        return logits_SO[:, 0] if len(self.classes_) == 2 else logits_SO

    def predict_proba(self, bags: Sequence[BagLike]) -> np.ndarray:
        """Probabilities (S, C), columns in the order of `classes_`."""
        return to_probabilities(self._logits(bags))

    def predict(self, bags: Sequence[BagLike]) -> np.ndarray:
        """The most probable class of every bag, (S,)."""
        index_S = self.predict_proba(bags).argmax(axis=1)
        found: np.ndarray = self.classes_[index_S]
        return found


# --- bags and labels -------------------------------------------------------------------------------------------------


def checked_bags(bags: Any) -> list[Tensor]:
    """features_TD of every bag, float16 or float32, all of one width, finite; ValueError with everything wrong."""
    if isinstance(bags, np.ndarray | Tensor) and bags.ndim == 2 and bags.dtype != object:
        raise ValueError(
            f"expected a list of bags, each (tiles, features), got one array {tuple(bags.shape)}; for one bag: [bag]"
        )
    if issparse(bags):
        raise TypeError("sparse data are not supported: expected a list of bags, each (tiles, features)")
    if isinstance(bags, str | bytes) or not hasattr(bags, "__len__") or not hasattr(bags, "__iter__"):
        raise ValueError(f"expected a list of bags, each (tiles, features), got {type(bags).__name__}")
    found = [as_bag(bag) for bag in bags]
    problems = [f"bag {i}: {bag}" for i, bag in enumerate(found) if isinstance(bag, str)]
    tensors = [bag for bag in found if isinstance(bag, Tensor)]
    widths = sorted({bag.shape[1] for bag in tensors})
    if len(widths) > 1:
        problems.append(f"bags of different widths: {widths} features")
    if not found:
        problems.append("expected at least 1 bag, got 0 sample(s)")
    if problems:
        raise ValueError("\n".join(["the bags cannot be used:", *(f"  - {p}" for p in at_most(problems))]))
    return tensors


def as_bag(bag: Any) -> Tensor | str:
    """features_TD, or what is wrong with it."""
    if not isinstance(bag, Tensor):
        try:
            array = np.asarray(bag)
            array = array.astype(np.float32) if array.dtype == object else array
        except (TypeError, ValueError) as error:
            return f"expected numbers (tiles, features): {error}"
        if array.dtype.kind == "c":
            return "Complex data not supported"
        if array.dtype.kind not in "fiub":
            return f"expected real numbers, got {array.dtype}"
        with np.errstate(over="ignore"):  # what does not fit is infinite and refused below
            array = array if array.dtype in (np.float16, np.float32) else array.astype(np.float32)
        bag = torch.from_numpy(array if array.flags.writeable else array.copy())
    bag = bag.detach().cpu()
    bag = bag if bag.dtype in (torch.float16, torch.float32) else bag.float()
    if bag.ndim == 2 and len(bag) and not bag.shape[1]:
        return f"0 feature(s) (shape={tuple(bag.shape)}) while a minimum of 1 is required."
    if bag.ndim != 2 or not len(bag):
        return f"expected (tiles, features) of at least one tile, got shape {tuple(bag.shape)}"
    return bag if bool(torch.isfinite(bag).all()) else "contains NaN or infinity"


@contextmanager
def on_device(stack: torch.nn.Module, accelerator: str) -> Iterator[torch.device]:
    """The device of `accelerator`; `stack` is there while inside."""
    device = device_of(accelerator)
    stack.to(device)
    try:
        yield device
    finally:
        stack.to("cpu")


def as_bags(tensors: Sequence[Tensor]) -> Bags:
    return bags_of([f"bag {i}" for i in range(len(tensors))], tensors)


def checked_labels(labels: Any, n_bags: int) -> tuple[np.ndarray, np.ndarray]:
    """Class index of every bag, int64, and the classes; ValueError where they cannot be learned."""
    if labels is None:
        raise ValueError("requires y to be passed, but the target y is None: labels, one a bag")
    labels_S = column_or_1d(np.asarray(labels), warn=True)
    assert_all_finite(labels_S, input_name="y")
    check_classification_targets(labels_S)
    if len(labels_S) != n_bags:
        raise ValueError(f"expected a label for each of {count(n_bags, 'bag')}, got {len(labels_S)}")
    classes, index_S = np.unique(labels_S, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"expected labels of at least two classes, got one class: {classes.tolist()}")
    return index_S.astype(np.int64), classes


def checked_groups(groups: Any, n_bags: int) -> list[str]:
    """The group of every bag as text."""
    if groups is None:
        return [f"{i:09d}" for i in range(n_bags)]
    names = [str(name) for name in np.asarray(groups).tolist()]
    if len(names) != n_bags:
        raise ValueError(f"expected a group for each of {count(n_bags, 'bag')}, got {len(names)}")
    return names


def is_count(value: object) -> bool:
    """A whole number of at least 1."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
