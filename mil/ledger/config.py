"""Everything `python -m mil.reproduce` can be told. No torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from extract.config import Section


class LedgerData(Section):
    """Where the data sets lie."""

    root: Path | None = Field(
        None, description="folder with the .npz files and, for Camelyon16, Phikon's Parquet files"
    )


class LedgerFeatures(Section):
    """Camelyon16's features as mil.train imported them."""

    folder: Path = Field(
        Path("cache/camelyon16-phikon"), description="Camelyon16: where config=camelyon16-paper.yaml imports it to"
    )


class ReproduceConfig(Section):
    """Everything `python -m mil.reproduce` can be told."""

    data: LedgerData = LedgerData()
    features: LedgerFeatures = LedgerFeatures()
    entries: list[str] = Field([], description="which entries, by name; default: all")
    quick: bool = Field(False, description="one data set made by code instead, in seconds: does it run here?")
    strict: bool = Field(False, description="exit code 1 if something that was run differs from its reference")
    out: Path = Field(
        Path("runs/reproduce"), description="folder for ledger.csv, ledger.md, ledger.json and the studies"
    )
