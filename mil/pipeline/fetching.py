"""What a study has here of object stores: everything that its config names, but of features those of its cohort alone.

Names are compared as loosely as the checks of the data do when they look for a slide that is spelt otherwise, so that
they find the same; what does not look like features, a tool's own notes for instance, is always fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from extract.config import ProblemsError, table_files
from extract.joining import read_rows
from extract.stores.sessions import bring, stores_of
from mil.config import StudyConfig

FEATURES = frozenset((".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz", ".safetensors", ".zarr", ".parquet"))


@contextmanager
def stores_of_study(config: StudyConfig, out: Path | None = None) -> Iterator[None]:
    """`stores_of`, which says what it raises, with features of the cohort's slides only."""
    with stores_of(out=out):
        slides = slides_named(config)
        if slides is not None:
            bring_features(config, slides)
        with stores_of(config):
            yield


def bring_features(config: StudyConfig, slides: Iterable[str]) -> None:
    """Have the features of these slides here, where they are in a store."""
    wanted = features_of(slides)
    for folder in config.features.folders:
        bring(folder, wanted)


def slides_named(config: StudyConfig) -> set[str] | None:
    """The slides that the cohort's table lists; None where it does not say, or cannot be read: the study says why."""
    if config.data.source != "cohort" or config.cohort is None:
        return None
    for file in table_files(config.cohort):
        bring(file)
    try:
        rows, _ = read_rows(config.cohort, config.columns)
    except ProblemsError:
        return None
    return set(rows[config.columns.slide]) if config.columns.slide in rows else None


def features_of(slides: Iterable[str]) -> Callable[[str], bool]:
    """Whether an object, by its name below a folder of features, may be of one of these slides, or of no slide."""
    spellings = {spelling(slide) for slide in slides}

    def wanted(name: str) -> bool:
        path = PurePosixPath(name)
        return path.suffix.lower() not in FEATURES or any(spelling(part) in spellings for part in path.parts)

    return wanted


def spelling(name: str) -> str:
    """Without what follows the first dot, without case, punctuation and padding."""
    plain = re.sub(r"[\W_]+", "", name.partition(".")[0].lower())
    return re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", plain)
