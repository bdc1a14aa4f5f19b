"""Everything `python -m mil.view` can be told. Nothing slow is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from extract.config import Columns, ConfigError, Device, Encoder, Features, Section, Slides, Tiles, Tissue

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_TOKEN = 16


class ViewConfig(Section):
    """Everything `python -m mil.view` can be told."""

    run: list[Path] = Field([], description="run folder of mil.train; run=a run=b compares two")
    slides: Slides = Slides()
    features: Features = Features()
    cohort: Path | None = Field(None, description="without a run: CSV with slide, optional patient, label, path, mpp")
    columns: Columns = Columns()
    annotations: Path | None = Field(
        None, description="folder with SLIDE.xml (ASAP) or SLIDE.geojson to lay over slides"
    )
    encoder: Encoder = Encoder()
    tissue: Tissue = Tissue()
    tiles: Tiles = Tiles()
    reviews: Path | None = Field(None, description="table of reviews; default: reviews.csv in the (first) run folder")
    host: str = Field("127.0.0.1", description="address to listen on; others than this machine need allow_remote=true")
    port: int = Field(0, ge=0, le=65_535, description="0: any that is free")
    allow_remote: bool = Field(False, description="let other machines connect: anyone with the URL sees the slides")
    token: str | None = Field(
        None, description="of the URL; default: a random one each time. Keep links valid with one of your own"
    )
    browser: bool = Field(True, description="open the page where there is a screen")
    memory_mb: int = Field(512, ge=64, description="for tiles and scores that are kept")
    device: Device = Field("auto", description="of the members: auto, cpu, cuda, cuda:1, mps")


def view_problems(tree: dict[str, Any]) -> list[str]:
    """What the fields cannot see by themselves."""

    def folder(section: str) -> Any:
        found = tree.get(section)
        return found.get("folder") if isinstance(found, dict) else None

    problems = []
    if not (tree.get("run") or folder("slides") or folder("features") or tree.get("cohort")):
        problems.append("nothing to show: set run=runs/NAME, or slides.folder=FOLDER to look at slides before training")
    host = tree.get("host", "127.0.0.1")
    if host not in LOOPBACK and tree.get("allow_remote") is not True:
        problems.append(
            f"host={host}: other machines could connect, and anyone with the URL would see the slides and could write "
            "reviews; the connection is not encrypted. Keep 127.0.0.1 and use `ssh -L`, or add allow_remote=true"
        )
    token = tree.get("token")
    if token is not None and (
        len(str(token)) < SHORTEST_TOKEN or not str(token).replace("-", "").replace("_", "").isalnum()
    ):
        problems.append(f"token: expected at least {SHORTEST_TOKEN} letters and digits, - or _, got {len(str(token))}")
    return problems


def refuse_without_extra() -> None:
    """Raise ConfigError where the packages of the extra `view` are not installed."""
    absent = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if absent:
        raise ConfigError("not installed", [f"{', '.join(absent)}: the viewer needs it; pip install 'slide-mil[view]'"])


def runs_as_list(arguments: Sequence[str]) -> list[str]:
    """`run=a run=b` as `run=[a,b]`: elsewhere the last of two equal keys holds."""
    runs = [argument.partition("=")[2] for argument in arguments if argument.startswith("run=")]
    if len(runs) == 1 and runs[0].startswith("["):
        return list(arguments)
    rest = [argument for argument in arguments if not argument.startswith("run=")]
    quoted = ",".join("'" + run.replace("'", "''") + "'" for run in runs)
    return [*rest, *([f"run=[{quoted}]"] if runs else [])]
