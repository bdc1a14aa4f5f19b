"""A trained study applied to new slides, in the order things happen: run, slides, features, scores, tables, report.

Axes: S slides, T tiles of one slide, D features, M members, C outputs (1 for two classes).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from extract.config import ConfigError, read_yaml
from extract.lock import only_command_in
from extract.room import refuse_without_room
from mil.prediction.config import PredictConfig
from mil.prediction.folder import refuse_existing
from mil.prediction.job import Job, Outcome
from mil.prediction.results import write
from mil.prediction.scores import find_features, score
from mil.prediction.slides import bags_to_predict, extract, files_are_given, slides_to_predict
from mil.results.trained import CONFIG, open_run


def predict_study(config: PredictConfig, command: Sequence[str] = ()) -> Outcome:
    """Predict what the config names, write OUT and say what became of it.

    Raises:
        ProblemsError: run folder, slides, features or OUT are not what they must be; nothing was predicted.
        EncoderError, ReaderError: slides cannot be extracted.
    """
    assert config.run is not None
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    out = config.out or default_out(config.run)
    with only_command_in(out, "mil.predict"):
        refuse_without_room(0, "predicting", "raise the limit")
        return _predict(Job(config, open_run(config.run, device=config.device), out, command, began))


def default_out(run: Path) -> Path:
    """predictions/NAME, NAME as `TrainedStudy.name` has it; known before the run is opened, so that the lock is held
    before any work is done.
    """
    folder = run.resolve()
    try:
        model = read_yaml(folder / CONFIG).get("model")
    except (ConfigError, OSError):  # opening the run says so
        model = None
    several = isinstance(model, dict) and isinstance(model.get("name"), list)
    return Path("predictions") / (f"{folder.parent.name}/{folder.name}" if several else folder.name)


def _predict(job: Job) -> Outcome:
    config = job.config
    refuse_existing(job.out, config.overwrite)
    cohort = slides_to_predict(job)
    if files_are_given(job, cohort):
        extract(job, cohort)
        features, headers = find_features(job, cohort, "cache")
    else:
        features, headers = find_features(job, cohort, config.features.layout)
    bags = bags_to_predict(job, cohort, headers)
    scored = score(job, features, headers, bags)
    return write(job, bags, scored, cohort)
