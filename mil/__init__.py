"""Multiple-instance learning on slides, from Python: each name is imported when it is first used, and torch with it.

run_study         a study from config to report, as `python -m mil.train`
open_run          a finished run folder: metrics, tables, report, predictions for new slides, heatmaps
read_features     the tile features of a folder, whatever tool wrote it
SlideClassifier   an estimator of scikit-learn on bags of tile features
SlideRegressor, SlideGrader, SlideSurvival   the same for numbers, ordered grades and survival times
aggregator        one aggregator as a plain torch module, for a training loop of your own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extract.lazy import lazily

if TYPE_CHECKING:
    from mil.api.aggregator import aggregator
    from mil.api.classifier import SlideClassifier
    from mil.api.estimators import SlideGrader, SlideRegressor, SlideSurvival
    from mil.api.features import read_features
    from mil.api.study import open_run, run_study

__all__ = [
    "SlideClassifier",
    "SlideGrader",
    "SlideRegressor",
    "SlideSurvival",
    "aggregator",
    "open_run",
    "read_features",
    "run_study",
]

HOMES = {
    "run_study": "mil.api.study",
    "open_run": "mil.api.study",
    "read_features": "mil.api.features",
    "SlideClassifier": "mil.api.classifier",
    "SlideRegressor": "mil.api.estimators",
    "SlideGrader": "mil.api.estimators",
    "SlideSurvival": "mil.api.estimators",
    "aggregator": "mil.api.aggregator",
}
"""Where each name lives. None is the name of a module: `import mil.train` would put that in the place of a function."""

__getattr__, __dir__ = lazily(__name__, HOMES)
