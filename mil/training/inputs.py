"""features.csv: which feature file of every slide a run is made of, so that a run is never continued on others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from extract.features.cache import Header
from extract.tables import Column, read_table, write_csv

FILE = "features.csv"
COLUMNS = {"slide": Column("text"), "tiles": Column("whole", least=1), "identity": Column("text")}


def save_inputs(folder: Path, headers: Mapping[str, Header]) -> None:
    """Write features.csv: slide, tiles, and what tells its features from others, see FeatureFolder.identity."""
    rows = [(slide, header.n_tiles, header.identity) for slide, header in headers.items()]
    write_csv(pd.DataFrame(rows, columns=list(COLUMNS)), folder / FILE)


def changed_inputs(folder: Path, identities: Iterable[tuple[str, str]], only: str = "") -> list[str]:
    """Slides whose features are not those that the run is made of; [] where it is of a version that did not say.

    Args:
        identities: slide and identity of features that are there now; slides that the run does not know are left out.
        only: those that the run knows by an identity that begins so are compared.

    Raises:
        TableError: features.csv is damaged.
    """
    if not (folder / FILE).exists():
        return []
    table = read_table(folder / FILE, COLUMNS)
    before = dict(zip(table["slide"], table["identity"], strict=True))
    return [
        f"slide {slide!r}: its features are others now: were {before[slide]}, are {now}"
        for slide, now in identities
        if before.get(slide, now) != now and before[slide].startswith(only)
    ]
