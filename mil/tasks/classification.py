"""Classes: one logit for two, one each for more; its tables and metrics are `mil.results` and `mil.tasks.metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mil.tasks.contract import Measure, Task
from mil.tasks.metrics import METRICS


class Classification(Task):
    """Several classes that exclude each other; of two, the last is the positive one."""

    name = "classification"
    main = "auc"
    metrics: Mapping[str, Measure] = MappingProxyType(
        {name: Measure(metric.title, metric.higher_is_better) for name, metric in METRICS.items()}
    )

    def n_outputs(self) -> int:
        return 1 if len(self.classes) == 2 else len(self.classes)
