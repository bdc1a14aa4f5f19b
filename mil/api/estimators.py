"""Numbers, grades and survival times as scikit-learn sees them: estimators that train as studies of those tasks do.

Axes: S bags, M members, N rows, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from sklearn.base import RegressorMixin
from sklearn.metrics import cohen_kappa_score
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from extract.cohort import CENSORED, EVENT, Cohort
from extract.config import ConfigError, merge_config
from extract.wording import count
from mil.api.aggregator import stack_of
from mil.api.classifier import BagLike, SlideEstimator, as_bags, checked_bags, checked_groups, on_device
from mil.api.quiet import settings_of_torch_kept
from mil.config import Task as TaskConfig
from mil.config_problems import task_problems
from mil.results.trained import member_logits
from mil.study.plan import make_plan
from mil.study.roles import TRAIN, Plan, Round, plan_of_rounds
from mil.tasks.contract import Task
from mil.tasks.survival import harrell_within
from mil.tasks.table import task_of
from mil.training.module import fit
from mil.training.objectives import module_of


class TaskEstimator(SlideEstimator):
    """An estimator of a task other than classification. A subclass says what a target is, and what is predicted.

    Attributes after `fit`: `aggregator_`, `history_`, `n_features_in_`, as `SlideClassifier` has them; `task_`, and
    `facts_`: what the members' training bags say, by which their outputs are read.
    """

    task_name: ClassVar[str]

    def _table(self, target: Any, n_bags: int) -> tuple[pd.DataFrame, tuple[str, ...]]:
        """The columns of a cohort that say what is to be predicted, and its classes."""
        raise NotImplementedError  # a subclass has it

    def _options(self) -> dict[str, Any]:
        """Of the section `task`."""
        loss = getattr(self, "loss", None)
        return {} if loss is None else {"loss": loss}

    def fit(self, bags: Sequence[BagLike], y: Any, groups: Any = None) -> Self:
        """Train on bags whose targets are known.

        Args:
            bags: S arrays or tensors (T, D). y: S targets, as the class describes them.
            groups: S patients, for `val_fraction`; default: every bag is its own.
        """
        settings, tensors = self._settings(), checked_bags(bags)
        config = self._task_config(settings.class_weights)
        columns, classes = self._table(y, len(tensors))
        names = [f"bag {i}" for i in range(len(tensors))]
        table = pd.DataFrame({"slide": names, "patient": checked_groups(groups, len(tensors)), "split": "train"})
        cohort = Cohort(pd.concat([table, columns], axis=1), classes, target=config.target)
        task, seed = task_of(config, classes).for_cohort(cohort), self._seed()
        plan = self._plan(task.strata(cohort, 2), seed)
        try:
            seeds = plan.members["init_seed"].tolist()
            stack = stack_of(self.aggregator, tensors[0].shape[1], task.n_outputs(), seeds, self.options or {})
        except ValueError as error:  # what only the aggregator itself can say
            raise ConfigError("problems in the parameters", str(error).splitlines()) from None
        if task.name == "ordinal":
            stack.add_cuts(len(classes) - 1)
        facts = task.facts(cohort, plan.uses("train"))
        fixed = (stack, as_bags(tensors), cohort, task, self._members(plan), settings, facts)
        module = module_of(task)(*fixed, seed=seed, max_tiles=self.max_tiles)
        with settings_of_torch_kept():
            fit(module, progress=False)
        self.aggregator_, self.history_ = module.aggregator.to("cpu").eval(), pd.DataFrame(module.history)
        self.n_features_in_, self.task_ = tensors[0].shape[1], task
        self.facts_ = task.facts_after(cohort, plan.uses("train"), self._member_logits(tensors), facts)
        return self

    def _task_config(self, class_weights: str) -> TaskConfig:
        said = {"name": self.task_name} | self._options()
        tree = {"task": said, "train": {"class_weights": class_weights}, "classes": self.task_name == "ordinal"}
        problems = task_problems(tree)
        if problems:
            raise ConfigError("problems in the parameters", problems)
        return merge_config(TaskConfig, None, said)

    def _plan(self, cohort: Cohort, seed: int) -> Plan:
        seeds = [seed + i for i in range(self.n_members)]
        if not self.val_fraction:
            everything = Round(0, 0, np.full(len(cohort), TRAIN, dtype=np.int8))
            return plan_of_rounds([everything], seeds, self.lr, self.weight_decay)
        how: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "split_seed": seed}
        return make_plan(cohort, folds=1, seeds=seeds, val_fraction=self.val_fraction, **how)

    def _member_logits(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """logits_MSC"""
        with on_device(self.aggregator_, self.accelerator) as device:
            logits_MSC: np.ndarray = member_logits(self.aggregator_, as_bags(tensors), device)
        return logits_MSC

    def _said(self, bags: Sequence[BagLike]) -> pd.DataFrame:
        """The columns of the task's predictions, members averaged, one row a bag."""
        tensors = self._checked(bags)
        task: Task = self.task_
        each = [
            task.predicted(logits_SC, {name: values[m] for name, values in self.facts_.items()})
            for m, logits_SC in enumerate(self._member_logits(tensors).astype(np.float64))
        ]
        return pd.DataFrame({name: np.mean([one[name] for one in each], axis=0) for name in task.columns()})


def numbers(target: Any, n_bags: int) -> np.ndarray:
    """(S,) finite float64; ValueError for anything else."""
    if target is None:
        raise ValueError("requires y to be passed, but the target y is None: a target, one a bag")
    value_S: np.ndarray = column_or_1d(np.asarray(target), warn=True).astype(np.float64)
    assert_all_finite(value_S, input_name="y")
    if len(value_S) != n_bags:
        raise ValueError(f"expected a target for each of {count(n_bags, 'bag')}, got {len(value_S)}")
    return value_S


class SlideRegressor(RegressorMixin, TaskEstimator):  # type: ignore[misc]  # scikit-learn is not annotated
    """A number for every bag; `score` is R2. Parameters: those of `SlideClassifier`, and loss: mse, huber or l1.

    >>> import mil, numpy
    >>> rng = numpy.random.default_rng(0)
    >>> bags = [rng.normal(i % 4, 1, size=(rng.integers(20, 40), 8)).astype("float32") for i in range(20)]
    >>> values = [0.5 + i % 4 for i in range(20)]
    >>> model = mil.SlideRegressor("mean", epochs=60, lr=0.05, batch_size=4).fit(bags, values)
    >>> model.predict(bags[:3]).shape, bool(model.score(bags, values) > 0.9)
    ((3,), True)
    """

    task_name = "regression"

    def __init__(self, aggregator: str = "abmil", *, loss: str = "mse", options: dict[str, Any] | None = None,
                 epochs: int = 50, lr: float = 1e-3, weight_decay: float = 0.0, optimizer: str = "adam",
                 schedule: str = "constant", batch_size: int = 16, class_weights: str = "none",
                 standardize: bool = False, max_tiles: int | None = None, n_members: int = 1,
                 val_fraction: float = 0.0, select: str = "last", metric: str = "auc", patience: int | None = None,
                 random_state: int | np.random.RandomState | None = 0, accelerator: str = "auto",
                 precision: str = "32-true"):  # fmt: skip
        given = {key: value for key, value in locals().items() if key not in ("self", "loss", "__class__")}
        super().__init__(**given)
        self.loss = loss

    def _table(self, target: Any, n_bags: int) -> tuple[pd.DataFrame, tuple[str, ...]]:
        value_S = numbers(target, n_bags)
        if len(np.unique(value_S)) < 2:
            raise ValueError(f"expected targets that differ, got {value_S[0]:g} for every bag")
        return pd.DataFrame({"value": value_S, "label": [f"{value:g}" for value in value_S]}), ("all",)

    def predict(self, bags: Sequence[BagLike]) -> np.ndarray:
        """(S,) in the unit of the targets."""
        found: np.ndarray = self._said(bags)["prediction"].to_numpy()
        return found


class SlideSurvival(TaskEstimator):
    """A risk for every bag; `score` is Harrell's C-index. Needs scikit-survival (`slide-mil[survival]`).

    Targets are a structured array of event and time, as `sksurv.util.Surv` makes it, or (S, 2) with both in this order.
    Parameters: those of `SlideClassifier`, and loss: cox or discrete.

    >>> import mil, numpy
    >>> rng = numpy.random.default_rng(0)
    >>> bags = [rng.normal(i % 4, 1, size=(rng.integers(20, 40), 8)).astype("float32") for i in range(20)]
    >>> event_time = [(i % 3 > 0, 40 - 9 * (i % 4) + i / 10) for i in range(20)]
    >>> model = mil.SlideSurvival("mean", epochs=60, lr=0.05, batch_size=10).fit(bags, event_time)
    >>> model.predict(bags[:3]).shape, bool(model.score(bags, event_time) > 0.8)
    ((3,), True)
    """

    task_name = "survival"

    def __init__(self, aggregator: str = "abmil", *, loss: str = "cox", options: dict[str, Any] | None = None,
                 epochs: int = 50, lr: float = 1e-3, weight_decay: float = 0.0, optimizer: str = "adam",
                 schedule: str = "constant", batch_size: int = 16, class_weights: str = "none",
                 standardize: bool = False, max_tiles: int | None = None, n_members: int = 1,
                 val_fraction: float = 0.0, select: str = "last", metric: str = "auc", patience: int | None = None,
                 random_state: int | np.random.RandomState | None = 0, accelerator: str = "auto",
                 precision: str = "32-true"):  # fmt: skip
        given = {key: value for key, value in locals().items() if key not in ("self", "loss", "__class__")}
        super().__init__(**given)
        self.loss = loss

    def _table(self, target: Any, n_bags: int) -> tuple[pd.DataFrame, tuple[str, ...]]:
        event_S, time_S = events_and_times(target, n_bags)
        if not event_S.any():
            raise ValueError("expected at least one event, got none: there is nothing to learn")
        label = pd.Series(np.where(event_S, EVENT, CENSORED), dtype=object)
        return pd.DataFrame({"time": time_S, "event": event_S.astype(float), "label": label}), (CENSORED, EVENT)

    def predict(self, bags: Sequence[BagLike]) -> np.ndarray:
        """(S,): the higher, the earlier an event is expected; 0 is the median risk of the training bags, in their
        standard deviations, and the mean over members."""
        found: np.ndarray = self._said(bags)["standing"].to_numpy()
        return found

    def score(self, bags: Sequence[BagLike], y: Any) -> float:
        """Harrell's C-index; NaN where no pair can be compared."""
        risk_S = self.predict(bags)
        event_S, time_S = events_and_times(y, len(risk_S))
        return harrell_within([pd.DataFrame({"standing": risk_S, "event": event_S.astype(int), "time": time_S})])


def events_and_times(target: Any, n_bags: int) -> tuple[np.ndarray, np.ndarray]:
    """Bool and float64, (S,) each; ValueError with what is wrong."""
    array = np.asarray(target)
    if array.dtype.names is not None and len(array.dtype.names) == 2:
        event_S, time_S = (array[name] for name in array.dtype.names)
    elif array.ndim == 2 and array.shape[1] == 2:
        event_S, time_S = array[:, 0], array[:, 1]
    else:
        raise ValueError(f"expected y of events and times: two fields, or (S, 2), got {array.dtype} {array.shape}")
    event_S, time_S = numbers(event_S.astype(float), n_bags), numbers(time_S.astype(float), n_bags)
    problems = ["events that are neither 0 nor 1"] if not np.isin(event_S, (0, 1)).all() else []
    problems += ["negative times"] if (time_S < 0).any() else []
    if problems:
        raise ValueError(f"y holds {' and '.join(problems)}")
    return event_S == 1, time_S


class SlideGrader(TaskEstimator):
    """An ordered grade for every bag (CORAL); `score` is the quadratic weighted kappa.

    grades: from the lowest to the highest; default: those of y, sorted. Parameters: those of `SlideClassifier`.
    `classes_` are the grades in their order.

    >>> import mil, numpy
    >>> rng = numpy.random.default_rng(0)
    >>> bags = [rng.normal(i % 4, 1, size=(rng.integers(20, 40), 8)).astype("float32") for i in range(20)]
    >>> grades = [("low", "mid", "high", "highest")[i % 4] for i in range(20)]
    >>> model = mil.SlideGrader("mean", grades=["low", "mid", "high", "highest"], epochs=80, lr=0.05, batch_size=4)
    >>> bool(model.fit(bags, grades).score(bags, grades) > 0.8)
    True
    """

    task_name = "ordinal"

    def __init__(self, aggregator: str = "abmil", *, grades: Sequence[Any] | None = None,
                 options: dict[str, Any] | None = None, epochs: int = 50, lr: float = 1e-3, weight_decay: float = 0.0,
                 optimizer: str = "adam", schedule: str = "constant", batch_size: int = 16, class_weights: str = "none",
                 standardize: bool = False, max_tiles: int | None = None, n_members: int = 1,
                 val_fraction: float = 0.0, select: str = "last", metric: str = "auc", patience: int | None = None,
                 random_state: int | np.random.RandomState | None = 0, accelerator: str = "auto",
                 precision: str = "32-true"):  # fmt: skip
        given = {key: value for key, value in locals().items() if key not in ("self", "grades", "__class__")}
        super().__init__(**given)
        self.grades = grades

    def _table(self, target: Any, n_bags: int) -> tuple[pd.DataFrame, tuple[str, ...]]:
        label_S = column_or_1d(np.asarray(target), warn=True)
        self.classes_ = np.unique(label_S) if self.grades is None else np.asarray(self.grades)
        index = {grade: str(k) for k, grade in enumerate(self.classes_.tolist())}
        unknown = sorted({str(label) for label in label_S.tolist() if label not in index})
        if len(label_S) != n_bags or unknown or len(np.unique(label_S)) < 2:
            got = f"grades that are not among {self.classes_.tolist()}: {unknown}" if unknown else f"{len(label_S)}"
            raise ValueError(f"expected grades, of two kinds or more, for each of {count(n_bags, 'bag')}, got {got}")
        label = pd.Series([index[grade] for grade in label_S.tolist()], dtype=object)
        return pd.DataFrame({"label": label}), tuple(index.values())

    def predict_proba(self, bags: Sequence[BagLike]) -> np.ndarray:
        """(S, grades), columns in the order of `classes_`."""
        found: np.ndarray = self._said(bags).to_numpy()
        return found

    def predict(self, bags: Sequence[BagLike]) -> np.ndarray:
        """The grade of every bag: the number of cuts passed with a probability above one half, (S,)."""
        above_SK = 1 - self.predict_proba(bags).cumsum(axis=1)[:, :-1]
        found: np.ndarray = self.classes_[(above_SK > 0.5).sum(axis=1)]
        return found

    def score(self, bags: Sequence[BagLike], y: Any) -> float:
        """Quadratic weighted kappa."""
        grades = self.classes_.tolist()
        truth, said = ([grades.index(one) for one in np.asarray(part).tolist()] for part in (y, self.predict(bags)))
        return float(cohen_kappa_score(truth, said, weights="quadratic", labels=list(range(len(grades)))))
