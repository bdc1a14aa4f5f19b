"""Lightning without its adverts and its advice about loaders."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
ALWAYS = (".*does not have many workers.*", ".*treespec, LeafSpec.*")
"""Batches come from memory; Lightning itself uses a deprecated torch class."""


@contextmanager
def quiet_lightning(also: Sequence[str] = ()) -> Iterator[None]:
    """Hide them while inside, and warnings that match one of `also`. Errors are still shown."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (*ALWAYS, *also):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
