"""python -m mil.predict run=RUN_FOLDER WHAT [key=value ...]

Applies a trained study to new slides: every member and their ensemble. WHAT is one of

    slides.folder=FOLDER                         slide files: features are extracted first, as the study's were
    slide=FILE                                   a single slide, from image to probability
    cohort=FILE.csv features.folder=FOLDER       extracted already; evaluated where the CSV has labels
    cohort=FILE.csv [slides.folder=FOLDER]       files of a CSV (column path, or found by slide id)
    features.folder=FOLDER                       every slide in it

Encoder, weights, tile size, microns per pixel, overlap and tissue rules are the study's and cannot be set.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from extract.config import config_from_command_line
from extract.ending import ended
from extract.lock import only_command_in
from extract.places import in_words
from extract.run import extraction_errors
from extract.stores.sessions import stores_of
from mil.prediction.config import PredictConfig, predict_problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 some slides failed, 2 config, run or data are wrong (nothing predicted), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(PredictConfig, arguments, __doc__ or "", also=predict_problems)

    def predict() -> int:
        locked = only_command_in(config.out, "mil.predict") if config.out else nullcontext()
        with locked, stores_of(config, out=config.out):
            from mil.prediction.results import outcome_text  # imports torch: only now that the config is valid
            from mil.prediction.study import predict_study

            outcome = predict_study(config, command=["python", "-m", "mil.predict", *arguments])
        print(in_words(outcome_text(outcome)))
        return 1 if outcome.failed else 0

    kept = "Finished features are kept; the same command continues."
    return ended(predict, interrupted=lambda: f"Interrupted. {kept}", after=lambda: kept, known=extraction_errors)


if __name__ == "__main__":
    sys.exit(main())
