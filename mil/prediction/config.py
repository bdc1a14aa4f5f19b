"""Everything `python -m mil.predict` can be told, and what of it contradicts itself. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from extract.config import CohortTables, Columns, Device, Extract, Folders, LayoutName, Section, Slides
from mil.config import Report


class Features(Folders):
    """Where the new slides' features are, or go to."""

    folder: Path | None = Field(
        None,
        description="feature files; slides are extracted into it; [A, B] as the study has them; default: OUT/features",
    )
    layout: LayoutName = Field("auto", description="who wrote them, as for training; auto detects it")


class Encoder(Section):
    """The study's encoder: what it runs on, and where its weights lie."""

    weights: Path | None = Field(None, description="local weights file, where the study's was a local one")
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field("auto", description="as for extract.run")
    compile: bool = Field(False, description="torch.compile the encoder")


class PredictReport(Report):
    """What comes out; what the study fitted on its own predictions is applied and cannot be set."""

    calibrate: Literal["study"] = Field("study", description="the study's, if it has one")  # type: ignore[assignment]  # narrower
    operating_points: Literal["study"] = Field("study", description="the study's")  # type: ignore[assignment]  # narrower
    coverage: float | None = Field(  # type: ignore[assignment]  # None: the study's
        None, gt=0, lt=1, description="of the conformal sets; default: the study's"
    )
    subgroups: list[str] | None = Field(  # type: ignore[assignment]  # None: the study's
        None, description="as for training; default: the study's, where the CSV has their columns"
    )
    permutations: Literal[0] = Field(0, description="nothing is trained here")


class Select(Section):
    """fast=true: how many tiles are encoded, and what that may cost."""

    keep: float = Field(0.1, gt=0, le=1, description="share of the tiles that a coarse look chooses to encode")
    random: float = Field(0.2, ge=0, lt=1, description="share of those that is drawn by chance")
    loss: float = Field(0.003, ge=0, lt=1, description="share of the AUC that it may cost on the study's own slides")
    slides: Path | None = Field(None, description="folder of the study's slides, where its config's are not at hand")


class PredictConfig(Section):
    """Everything `python -m mil.predict` can be told."""

    run: Path | None = Field(None, description="finished run folder of one aggregator")
    slide: str | None = Field(None, description="one slide file; with features.folder also a slide id")
    cohort: CohortTables | None = Field(
        None, description="table (CSV, TSV, .xlsx) with slide, optional patient, label, path, mpp"
    )
    columns: Columns = Field(Columns(), description="default: the study's, where the CSV has them")
    slides: Slides = Slides()
    features: Features = Features()
    encoder: Encoder = Encoder()
    extract: Extract = Extract()
    fast: bool = Field(False, description="encode only tiles that a coarse look finds worth it, and say what it costs")
    select: Select = Select()
    known_patients: Literal["leave_out", "score"] = Field(
        "leave_out", description="patients that the study trained on: left out of the metrics, or scored"
    )
    report: PredictReport = PredictReport()
    device: Device = Field("auto", description="of encoder and members: auto, cpu, cuda, cuda:1, mps")
    out: Path | None = Field(None, description="default: predictions/NAME of the run folder")
    overwrite: bool = Field(False, description="replace predictions in OUT; features extracted there are kept")


def predict_problems(tree: dict[str, Any]) -> list[str]:
    """What the sections cannot see by themselves: which run, which slides, and what only the study can say."""

    def value(section: str, key: str) -> Any:
        found = tree.get(section)
        return found.get(key) if isinstance(found, dict) else None

    problems = []
    if not tree.get("run"):
        problems.append("run: not set; expected run=RUN_FOLDER, which python -m mil.train made")
    slide, cohort = tree.get("slide"), tree.get("cohort")
    if not (slide or cohort or value("slides", "folder") or value("features", "folder")):
        problems.append("no slides: give slides.folder=FOLDER, slide=FILE, cohort=FILE.csv or features.folder=FOLDER")
    if slide and (cohort or value("slides", "folder")):
        problems.append("slide: one slide, so cohort and slides.folder cannot be given as well")
    if tree.get("fast") in (True, "true") and not (slide or cohort or value("slides", "folder")):
        problems.append("fast=true: chooses tiles of slides to encode; features.folder holds features already")
    groups = value("report", "subgroups")
    if isinstance(groups, list) and groups:
        from mil.study.subgroups import spelling_problems  # with pandas, so only where it is needed

        problems += spelling_problems(groups)
    if value("extract", "shard"):
        problems.append("extract.shard: a prediction is of all slides; extract with python -m extract.run before")
    if value("columns", "covariates"):
        problems.append("columns.covariates: the study's, which cannot be set; the CSV needs columns of their names")
    own: list[str] = [key for key in ("tissue", "tiles") if key in tree]
    own += [f"encoder.{k}" for k in ("name", "revision", "random_weights") if value("encoder", k) is not None]
    own += ["features.dtype"] if value("features", "dtype") else []
    if own:
        problems.append(f"{', '.join(own)}: new slides are extracted exactly as the study's were; this cannot be set")
    return problems
