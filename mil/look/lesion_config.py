"""Everything `python -m mil.lesions` can be told. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from extract.config import Device, Features, Section, Slides


class LesionConfig(Section):
    """Everything `python -m mil.lesions` can be told."""

    run: Path | None = Field(None, description="run folder of mil.train")
    annotations: Path | None = Field(None, description="folder with one file of outlines a slide, or one such file")
    out: Path = Field(Path("lesions"), description="folder for lesions.csv and lesions.json")
    which: Literal["held-out", "test", "cross-validated"] = Field(
        "held-out", description="slides to look at; held-out: the test split if there is one, else cross-validated"
    )
    score: Literal["attention", "evidence"] = Field("evidence", description="see mil.heatmap; raw, not percentiles")
    target: str | None = Field(
        None, description="class that the lesions are of; default: the positive class; of grades: at least it"
    )
    member: int | None = Field(None, ge=0, description="this member alone; default: all that held the slide out")
    negative: list[str] | None = Field(
        None, description="classes (grades) without lesions; default: all but the target; of other tasks none"
    )
    exclusion_groups: list[str] = Field(["Exclusion", "_2"], description="outlines that are cut out of the lesions")
    not_exhaustive: list[str] = Field(
        [], description="slides with lesions that nobody outlined: only sensitivity is counted there"
    )
    inside: float = Field(0.5, gt=0, le=1, description="least share of a tile that is lesion, to be inside")
    itc_um: float | None = Field(
        None,
        ge=0,
        description="lesions shorter than this, grown by 37.5 microns all around, are isolated tumour cells, left out "
        "of sensitivity; default: 275 for Camelyon16's outlines, as in its evaluation, else 0",
    )
    merge_um: float = Field(75.0, ge=0, description="outlines nearer than this are one lesion (75 in Camelyon16)")
    apart_um: float = Field(200.0, ge=0, description="false positives nearer than this to a higher one count once")
    false_positives: list[float] = Field(
        [0.25, 0.5, 1, 2, 4, 8], min_length=1, description="mean number a slide at which sensitivity is stated"
    )
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals of sensitivity; 0 = none")
    seed: int = Field(0, ge=0, description="of the bootstrap")
    features: Features = Features()
    slides: Slides = Slides()
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, mps")


def lesion_problems(tree: dict[str, Any]) -> list[str]:
    """What is needed and not given."""
    problems = [] if tree.get("run") else ["run: no run folder given; set run=runs/NAME"]
    if not tree.get("annotations"):
        problems.append("annotations: none given; set annotations=FOLDER with SLIDE.xml or SLIDE.geojson")
    return problems
