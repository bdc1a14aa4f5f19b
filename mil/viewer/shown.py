"""What the viewer shows: finished runs with their features, or slides alone; and what it knows of every slide."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from extract.cohort import read_cohort
from extract.config import ConfigError, ProblemsError, Tiles, Tissue
from extract.encoders.frozen import spec_of
from extract.encoders.table import EncoderError
from extract.features.folder import FeatureFolder, open_feature_folder
from extract.outlines.shapes import SUFFIXES
from extract.places import url_of, with_places
from extract.slides.files import find_slides
from extract.stores.looking import is_file
from mil.look.scenes import slide_files
from mil.look.tilescores import Verdicts, features_of
from mil.results.tables import p_columns
from mil.results.trained import TrainedStudy, open_run
from mil.study.reviews import FILE as REVIEWS
from mil.viewer.config import ViewConfig

REGIONS = Path("regions")
"""Where regions are written that are to be left out, unless tissue.regions says it."""


@dataclass(frozen=True)
class Exhibit:
    """One aggregator of a run. features: None where they are not there any more, `why_no_features` says why."""

    name: str
    trained: TrainedStudy
    features: FeatureFolder | None
    why_no_features: str = ""

    @cached_property
    def verdicts(self) -> Verdicts:
        return Verdicts(self.trained)

    @cached_property
    def rows_of(self) -> dict[str, np.ndarray]:
        """Slide, or patient where that is a bag -> its rows of predictions.csv."""
        found = self.trained.predictions.groupby("slide").indices
        return {str(slide): np.asarray(rows) for slide, rows in found.items()}

    @property
    def judged(self) -> bool:
        """Whether a slide's label is one of what may be predicted of it."""
        return self.trained.of_classes or ("label" in self.trained.task.targets and bool(self.trained.task.classes))

    @property
    def targets(self) -> tuple[str, ...]:
        """What evidence can be asked for by name."""
        return self.trained.classes if self.trained.of_classes else self.trained.task.thresholds()

    def members_of(self, slide: str) -> list[dict[str, Any]]:
        """What every member says of a slide: member, role, fold, p (a probability a class; of another task its one
        number), threshold (None for several classes and other tasks)."""
        trained = self.trained
        own = trained.predictions.iloc[self.rows_of[trained.bag_of[slide]]].sort_values("member")
        if trained.of_classes:
            thresholds = trained.thresholds["threshold"].loc[own["member"]].to_numpy(dtype=np.float64)
            p_MC = own[p_columns(trained.classes)].to_numpy(dtype=np.float64)
        else:
            thresholds, p_MC = np.full(len(own), np.nan), trained.task.one_number(own)[:, None]
        return [
            {
                "member": int(member),
                "role": str(role),
                "fold": int(fold),
                "p": [number_or_none(p) for p in p_C],
                "threshold": number_or_none(threshold),
            }
            for member, role, fold, p_C, threshold in zip(
                own["member"], own["role"], own["fold"], p_MC.tolist(), thresholds.tolist(), strict=True
            )
        ]


def number_or_none(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class Shown:
    """Everything that the pages are made from.

    table: one row a slide: slide, patient, label, split, site, all text. files: slide -> path and the cohort's mpp.
    outlines: slide -> file of a pathologist's. features: of the slides without a run. tile_px, tile_mpp: of the grid
    that would be laid without a run. reviews, regions: what may be written; None = not offered.
    """

    exhibits: tuple[Exhibit, ...]
    table: pd.DataFrame
    files: dict[str, tuple[Path, float | None]]
    tissue: Tissue
    tiles: Tiles
    tile_px: int
    tile_mpp: float
    default_mpp: float | None
    reviews: Path | None
    regions: Path | None
    outlines: dict[str, Path] = field(default_factory=dict)
    features: FeatureFolder | None = None

    @cached_property
    def slides(self) -> list[str]:
        """Slide ids in the order of the numbers that the pages call them by."""
        return [str(slide) for slide in self.table["slide"]]


# --- with runs -------------------------------------------------------------------------------------------------------


def shown_runs(parts: Sequence[tuple[str, Path]], config: ViewConfig) -> Shown:
    """Runs side by side. Slides of the first stand first.

    Args:
        parts: name and run folder of every aggregator.

    Raises:
        ProblemsError: a run cannot be read, or a folder that is given is not there.
    """
    exhibits = tuple(exhibit(name, folder, config) for name, folder in parts)
    first = exhibits[0].trained
    files: dict[str, tuple[Path, float | None]] = {}
    for one in reversed(exhibits):
        files |= slide_files(one.trained, config.slides)
    study = first.config
    given = "tissue" in config.model_fields_set
    features = first.environment["features"]
    return Shown(
        exhibits,
        table_of(exhibits),
        files,
        tissue=config.tissue if given else study.tissue,
        tiles=study.tiles,
        tile_px=int(features.get("tile_px") or 224),
        tile_mpp=float(features.get("mpp") or 0.5),
        default_mpp=config.slides.mpp or study.slides.mpp,
        reviews=config.reviews or config.run[0] / REVIEWS,
        regions=config.tissue.regions,
        outlines=outline_files(config.annotations),
    )


def exhibit(name: str, folder: Path, config: ViewConfig) -> Exhibit:
    """A run with its features; that they have gone is no reason not to show the rest."""
    trained = open_run(folder, device=config.device)
    try:
        return Exhibit(name, trained, features_of(trained, config.features.folders, config.features.layout))
    except ProblemsError as error:
        if config.features.folder is not None:
            raise
        return Exhibit(name, trained, None, "; ".join(error.problems))


def table_of(exhibits: Sequence[Exhibit]) -> pd.DataFrame:
    """slide, patient, label, split, site of all slides of all runs, as text; the first run that has one says it."""
    parts = []
    for one in exhibits:
        table = one.verdicts.slides.reset_index(drop=True)
        roles = one.trained.roles
        if not one.judged:  # a time or a value is no class; the study says it in words
            table = table.assign(label="")
        site = dict(zip(roles["slide"], roles["site"], strict=True)) if "site" in roles else {}
        table = table.assign(site=[site.get(one.trained.bag_of[slide], "") for slide in table["slide"]])
        parts.append(table[["slide", "patient", "label", "split", "site"]])
    return pd.concat(parts).drop_duplicates("slide", ignore_index=True).fillna("").astype(str)


# --- without ---------------------------------------------------------------------------------------------------------


def shown_slides(config: ViewConfig) -> Shown:
    """Slides before any training: those of the cohort, of the folder, or of which there are features.

    Raises:
        ProblemsError: folders or the cohort cannot be read.
    """
    files: dict[str, tuple[Path, float | None]] = {}
    if config.slides.folder is not None:
        found = find_slides(config.slides.folder, leave_out=config.features.folder)
        files = {slide: (path, None) for slide, path in found.items()}
    features = None
    if config.features.folder is not None and config.features.folder.is_dir():
        features = open_feature_folder(config.features.folder, config.features.layout)
    table = pd.DataFrame({"slide": list(files or (features.slides if features else {}))})
    if config.cohort is not None:
        table = read_cohort(config.cohort, config.columns, labelled=False).table
        files |= files_of(table, config)
    for column in ("patient", "label", "split", "site"):
        table[column] = table.get(column, "")
    table = table[["slide", "patient", "label", "split", "site"]].fillna("").astype(str)
    try:
        spec = spec_of(config.encoder)
    except EncoderError as error:
        raise ConfigError("problems in the config", [str(error)]) from None
    mpp = config.tiles.mpp[0] if isinstance(config.tiles.mpp, list) else config.tiles.mpp
    return Shown(
        (),
        table,
        files,
        tissue=config.tissue,
        tiles=config.tiles,
        tile_px=spec.tile_px,
        tile_mpp=mpp or spec.mpp,
        default_mpp=config.slides.mpp,
        reviews=config.reviews,
        regions=config.tissue.regions or REGIONS,
        outlines=outline_files(config.annotations),
        features=features,
    )


def files_of(table: pd.DataFrame, config: ViewConfig) -> dict[str, tuple[Path, float | None]]:
    """The slide files that the cohort names and that are there."""
    assert config.cohort is not None
    bases = [str(base) for base in (config.slides.folder, config.cohort.parent, Path()) if base is not None]
    found: dict[str, tuple[Path, float | None]] = {}
    for slide, path, mpp in table[["slide", "path", "mpp"]].itertuples(index=False, name=None):
        path = with_places(path)
        places = (os.path.join(base, path) for base in bases if path)  # pathlib takes seconds for 20,000 slides
        there = next((one for one in places if os.path.isfile(one) or (url_of(one) and is_file(Path(one)))), None)
        if there is not None:
            found[slide] = (Path(there), None if np.isnan(mpp) else float(mpp))
    return found


def outline_files(folder: Path | None) -> dict[str, Path]:
    """SLIDE.xml or SLIDE.geojson of a folder, by slide.

    Raises:
        ConfigError: no such folder.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError("no outlines", [f"annotations={folder}: no such folder"])
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
