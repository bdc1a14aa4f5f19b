"""Studies and run folders from Python: train one, open one, ask it about new slides and about single ones.

Axes: M members, S slides, C classes.
"""

from __future__ import annotations

import html
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from extract.config import ConfigError, Slides, did_you_mean, merge_config
from extract.encoders.table import EncoderError
from extract.extraction.readers import ReaderError
from extract.places import with_places
from extract.stores.sessions import bring, stores_of
from extract.tables import read_texts
from extract.whole import write_whole
from mil.api.quiet import settings_of_torch_kept
from mil.config import StudyConfig, folder_of
from mil.config_problems import study_problems
from mil.config_reading import for_today
from mil.look.scenes import open_theatre, picture, refuse_wrong_wishes, tiles_table
from mil.look.tilescores import Kind, Scale
from mil.pipeline.fetching import stores_of_study
from mil.pipeline.study import run_study as train_and_report
from mil.prediction.config import PredictConfig, predict_problems
from mil.prediction.study import predict_study
from mil.report.wording import overview_text, terminal_table
from mil.results.readback import ENVIRONMENT, read_json, read_metrics
from mil.results.trained import CONFIG, RunError, TrainedStudy, read_config, refuse_unless_finished
from mil.results.trained import open_run as open_trained
from mil.training.members import FILE as MEMBERS
from mil.viewer.config import ViewConfig, refuse_without_extra, view_problems

if TYPE_CHECKING:
    from mil.viewer.notebook import Viewer

FilePath = str | PathLike[str]
TARGETS = "targets.md"
"""In a run folder of many targets: the last file that is written."""


def run_study(
    config: FilePath | Mapping[str, Any] | StudyConfig | None = None,
    *,
    out: FilePath | None = None,
    command: Sequence[str] = (),
    **sections: Any,
) -> Run:
    """Train, cross-validate and report one study; what `python -m mil.train` does.

    >>> import mil
    >>> run = mil.run_study(
    ...     "quickstart.yaml",
    ...     model={"name": "mean"},
    ...     study={"folds": 2},
    ...     train={"epochs": 2, "accelerator": "cpu"},
    ...     report={"bootstrap": 0, "heatmaps": 0},
    ...     out="runs/small",
    ... )  # doctest: +ELLIPSIS
    184 slides, 100 patients, 53,439 tiles x 64 ...
    mean: 2 members, 2 epochs
    >>> print(run.summary)  # doctest: +ELLIPSIS
    AUC of 'tumor' against 'normal'; ...
    >>> round(run.metrics["cross_validation"]["metrics"]["auc"]["mean"], 1)
    0.6

    Args:
        config: a path, the name of a config that ships with the toolkit, a dictionary, or nothing.
        out: the run folder; default: the config's `out`, else runs/NAME of the config, else runs/study.
        command: what environment.json says made the run; default: this call.
        sections: what goes before the config, by section or key: model={"name": "chowder"}, cohort="my.csv", seed=1.
            Another aggregator leaves out the file's options of the one that it replaces.

    Raises:
        ProblemsError (extract.config): everything that is wrong with config, cohort, features or run folder, in one
            text, as the command prints it; nothing was trained.
    """
    if not isinstance(config, StudyConfig) or sections:
        named = {} if out is None else {"out": out}
        said = ", ".join([*([] if config is None else [repr(config)]), *(f"{k}={v!r}" for k, v in sections.items())])
        command = command or [f"mil.run_study({said})"]
        base = config if not isinstance(config, StudyConfig) else config.model_dump(mode="json", exclude_unset=True)
        study = merge_config(StudyConfig, base, sections | named, also=study_problems, adapt=for_today)
    else:
        study = config.model_copy(update={} if out is None else {"out": Path(out)})
    if study.out is None:
        name = Path(config).stem if isinstance(config, str | PathLike) else "study"
        study = study.model_copy(update={"out": Path("runs") / name})
    with stores_of_study(study, study.out), settings_of_torch_kept():
        outcome = train_and_report(study, command=command)
    return Run(outcome.folder, outcome.table)


def open_run(folder: FilePath) -> Run:
    """A run folder that `mil.run_study` or `python -m mil.train` finished.

    >>> import mil, numpy, pathlib
    >>> run = mil.open_run("runs/small")  # that of the example of `mil.run_study`
    >>> run.slides[["slide", "label", "p_1", "predicted"]].shape
    (184, 4)
    >>> print(run.report)  # alone at the end of a notebook's cell it shows the page
    runs/small/report.html
    >>> pathlib.Path("new").mkdir()
    >>> numpy.save("new/slide_1.npy", numpy.ones((50, 64), dtype="float32"))
    >>> run.predict("new")[["slide", "members", "n_tiles"]]
         slide  members  n_tiles
    0  slide_1        2       50
    >>> run.heatmap("quick_000").save("quick_000.png")

    Raises:
        ProblemsError (extract.config): not a run folder, not finished, or damaged.
    """
    path = bring(place_in(folder))
    if targets_in(path):
        if not (path / TARGETS).exists():
            raise RunError("not finished", [f"{path}: its targets are not all trained; resume=true continues it"])
        return Run(path, (path / TARGETS).read_text(encoding="utf-8").strip())
    names = aggregators_in(path)
    parts = {name: part_of(path, name) for name in names}
    for part in parts.values():
        refuse_unless_finished(part)
    metrics = {name: read_metrics(part) for name, part in parts.items()}
    if path in parts.values():
        return Run(path, terminal_table(metrics[names[0]]))
    differences = path / "differences.csv"
    return Run(path, overview_text(metrics, run_table(differences) if differences.exists() else None))


@dataclass(frozen=True)
class Run:
    """A finished run folder. With several aggregators it holds a run for each: `run["abmil"]`; with many targets one
    for each of these: `run["TP53"]`.

    `summary` is the table that the command prints.
    """

    folder: Path
    summary: str = field(repr=False)

    @property
    def report(self) -> ReportPage:
        """report.html: a path that shows itself in a notebook."""
        return ReportPage(self.folder / "report.html")

    @cached_property
    def aggregators(self) -> tuple[str, ...]:
        """Names of the aggregators that the study compares, one for an ordinary run."""
        return aggregators_in(self.folder)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that the study trained together; none for an ordinary run."""
        return targets_in(self.folder)

    @cached_property
    def lost(self) -> dict[str, int]:
        """Aggregators (or of many targets `TARGET: AGGREGATOR`) of which every member diverged, and the epoch in which
        the first one did."""
        if self.targets:
            each = {target: self[target].lost for target in self.targets}
            return {f"{target}: {name}": epoch for target, own in each.items() for name, epoch in own.items()}
        metrics = {name: read_metrics(part_of(self.folder, name)) for name in self.aggregators}
        gone = {name: m["diverged"] for name, m in metrics.items() if len(m.get("diverged", [])) == m["members"]}
        return {name: min(row["epoch"] for row in rows) for name, rows in gone.items()}

    def __getitem__(self, aggregator: str) -> Run:
        """The run of one aggregator, or of one target.

        Raises:
            KeyError: the study has no such aggregator, or target.
        """
        if self.targets:
            if aggregator not in self.targets:
                hint = did_you_mean(aggregator, self.targets)
                raise KeyError(f"{aggregator!r}: {self.folder} has {', '.join(self.targets)}{hint}")
            return open_run(self.folder / folder_of(aggregator))
        if aggregator not in self.aggregators:
            hint = did_you_mean(aggregator, self.aggregators)
            raise KeyError(f"{aggregator!r}: {self.folder} has {', '.join(self.aggregators)}{hint}")
        part = part_of(self.folder, aggregator)
        return self if part == self.folder else open_run(part)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """metrics.json: AUC and the rest, with intervals, by what they were computed on."""
        return read_metrics(self._one)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """predictions.csv: one row a member and slide."""
        return self.trained.predictions

    @cached_property
    def slides(self) -> pd.DataFrame:
        """slides.csv: one row a slide, what the study says of it without having trained on it, most wrong first."""
        return run_table(self._one / "slides.csv")

    @cached_property
    def patients(self) -> pd.DataFrame:
        """patients.csv: one row a patient, the mean of its slides, most wrong first."""
        return run_table(self._one / "patients.csv")

    @cached_property
    def history(self) -> pd.DataFrame:
        """history.csv: loss and AUC of every member after every epoch."""
        return run_table(self._one / "history.csv")

    @cached_property
    def trained(self) -> TrainedStudy:
        """The members themselves, in evaluation mode."""
        return open_trained(self._one)

    def predict(
        self,
        features: FilePath | Sequence[FilePath] | Mapping[str, Any] | None = None,
        *,
        slide: FilePath | None = None,
        slides: FilePath | Mapping[str, Any] | None = None,
        cohort: FilePath | None = None,
        out: FilePath | None = None,
        **sections: Any,
    ) -> pd.DataFrame:
        """New slides, by every member and their ensemble; what `python -m mil.predict` does.

        Args:
            features: folder of features, made as the study's were, whatever tool wrote them; or that section of the
                command, {"folder": ..., "layout": ...}.
            slide, slides: a slide file, or a folder of them (or {"folder": ..., "mpp": ...}): extracted first, as the
                study's slides were.
            cohort: CSV that names the slides; with labels there are metrics in the table's `attrs["metrics"]`.
            out: folder for predictions.csv, members.csv and the report; without one and with nothing to extract,
                nothing is written; else predictions/NAME of the run folder.
            sections: further keys of the command, such as device="cpu", known_patients="score".

        Returns:
            One row a slide: probabilities, SD over members, threshold, predicted class, `in_study`. `attrs["notes"]`
            says what could not be compared with the study's features.

        Raises:
            ProblemsError: what is wrong with slides, features or out; nothing was predicted.

        Slides that fail are warned of, each with its reason, and are not in the table.
        """
        named = {"run": self._one, "cohort": cohort, "slide": slide, "out": out}
        tree = {key: os.fspath(value) for key, value in named.items() if value is not None}
        for section, given in (("features", features), ("slides", slides)):
            if given is not None:
                sections[section] = given if isinstance(given, Mapping) else {"folder": folder_text(given)}
        config = merge_config(PredictConfig, tree, sections, also=predict_problems)
        reads_only = config.features.folder is not None and config.slides.folder is None
        with tempfile.TemporaryDirectory() as nothing_kept:
            if config.out is None and reads_only and not Path(config.slide or "").is_file():
                config = config.model_copy(update={"out": Path(nothing_kept) / self.folder.resolve().name})
            try:
                with stores_of(config, out=config.out):
                    outcome = predict_study(config, command=[f"mil.open_run({os.fspath(self.folder)!r}).predict(...)"])
            except (EncoderError, ReaderError) as error:
                raise ConfigError("slides cannot be extracted", [str(error)]) from None
        failed = [f"{failure.slide} ({failure.stage}): {failure.reason}" for failure in outcome.failed]
        if outcome.warnings or failed:
            warnings.warn("\n".join([*outcome.warnings, *failed]), stacklevel=2)
        outcome.table.attrs.update(notes=list(outcome.notes), metrics=outcome.metrics)
        return outcome.table

    def heatmap(
        self,
        slide: str,
        *,
        score: Kind = "attention",
        scale: Scale = "percentile",
        target: str | None = None,
        member: int | None = None,
        mpp: float | None = None,
        features: FilePath | Sequence[FilePath] | None = None,
        layout: str = "auto",
        slides: FilePath | Mapping[str, Any] | None = None,
    ) -> Heatmap:
        """Where the members that held the slide out looked; what `python -m mil.heatmap` draws.

        Args:
            slide: its id.
            score: "attention", or "evidence": for which class a tile speaks (`target`; default: the predicted one).
            scale: "percentile" within the slide, or "raw".
            member: this member alone.
            mpp: microns per pixel of the picture; default: about 1,600 px wide.
            features, slides: folders (slides also {"folder": ..., "mpp": ...}); default: the study's own. Without the
                slide file a map of the tiles is drawn.
            layout: who wrote `features`.

        Raises:
            ProblemsError, CacheError, SlideError: unknown slide, member or class, no features, another slide's file.
        """
        given = slides if slides is None or isinstance(slides, Mapping) else {"folder": slides}
        theatre = open_theatre(
            self.trained,
            features=() if features is None else [place_in(one) for one in as_list(features)],
            layout=layout,
            slides=None if given is None else merge_config(Slides, None, given),
        )
        refuse_wrong_wishes(theatre, [slide], member=member, target=target, files_given=slides is not None)
        with theatre.scene(slide, kind=score, scale=scale, member=member, target=target) as scene:
            return Heatmap(slide, picture(scene, mpp=mpp).png, tiles_table(scene))

    def view(
        self,
        *,
        beside: FilePath | None = None,
        features: FilePath | None = None,
        slides: FilePath | Mapping[str, Any] | None = None,
        height: int = 760,
        **sections: Any,
    ) -> Viewer:
        """The study in the browser, beside the notebook; what `python -m mil.view` shows. Needs `slide-mil[view]`.

        Args:
            beside: another run folder, to compare with.
            features, slides: folders (slides also {"folder": ..., "mpp": ...}); default: the study's own.
            height: of the frame in a notebook, px.
            sections: further keys of the command, such as annotations="outlines/".

        Returns:
            A viewer with its `url`; it shows itself, and runs until `stop()` or the end of Python.

        Raises:
            ProblemsError: a run or a folder cannot be used, or a package is missing.
        """
        refuse_without_extra()
        from mil.viewer.notebook import view_beside

        folders = [self.folder, *([] if beside is None else [Path(beside)])]
        for section, given in (("features", features), ("slides", slides)):
            if given is not None:
                sections[section] = given if isinstance(given, Mapping) else {"folder": os.fspath(given)}
        tree = {"run": [os.fspath(folder) for folder in folders]}
        config = merge_config(ViewConfig, tree, sections, also=view_problems)
        return view_beside(config, parts_of(folders), height)

    @property
    def _one(self) -> Path:
        """The run folder of the one aggregator; RunError where there are several, or several targets."""
        if self.targets:
            listed = ", ".join(f"run[{name!r}]" for name in self.targets)
            raise RunError("which target?", [f"{self.folder}: holds several; choose one: {listed}"])
        if len(self.aggregators) > 1:
            listed = ", ".join(f"run[{name!r}]" for name in self.aggregators)
            raise RunError("which aggregator?", [f"{self.folder}: holds several; choose one: {listed}"])
        return part_of(self.folder, self.aggregators[0])


def as_list(given: FilePath | Sequence[FilePath]) -> list[FilePath]:
    """One folder, or the folders of a study that joins several."""
    return list(given) if isinstance(given, list | tuple) else [given]  # type: ignore[list-item]  # a str is one


def folder_text(given: FilePath | Sequence[FilePath]) -> str | list[str]:
    """As a config has it."""
    texts = [os.fspath(one) for one in as_list(given)]
    return texts if isinstance(given, list | tuple) else texts[0]


@dataclass(frozen=True)
class ReportPage(PathLike[str]):
    """The path of a report: one self-contained page, which a notebook shows."""

    path: Path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<p>{html.escape(str(self.path))}</p><iframe srcdoc="{page}" width="100%" height="700"></iframe>'


@dataclass(frozen=True, eq=False)
class Heatmap:
    """A slide's heatmap: shows itself in a notebook. `tiles`: one row a tile: x, y, side in level-0 px, score, ..."""

    slide: str
    png: bytes = field(repr=False)
    tiles: pd.DataFrame = field(repr=False)

    def save(self, path: FilePath) -> None:
        """Write the picture as PNG."""
        write_whole(Path(path), self.png)

    def _repr_png_(self) -> bytes:
        return self.png


TEXT = (
    "slide",
    "patient",
    "label",
    "split",
    "role",
    "kind",
    "predicted",
    "a",
    "b",
    "set",
    "method",
    "conformal_set",
    "risk_group",
    "metric",
    "title",
)
"""Columns of a run's tables that are names, also where they look like numbers or like nothing (`007`, `NA`)."""


def run_table(path: Path) -> pd.DataFrame:
    """A table of a run folder: names as text, all else numbers; labels and classes None where there is none."""
    table = read_texts(path)
    for name in table.columns:
        filled = table[name].astype(object).where(table[name] != "", None)
        if name not in TEXT:
            table[name] = pd.to_numeric(filled)
        elif name in ("label", "predicted", "conformal_set"):
            table[name] = filled
    return table


def targets_in(folder: Path) -> tuple[str, ...]:
    """The targets whose run folders are in this one; none where it is the run of one target."""
    if not (folder / CONFIG).exists() or (folder / MEMBERS).exists():
        return ()
    return tuple(read_config(folder).targets)


def place_in(folder: FilePath) -> Path:
    """The folder, or the local place of an address such as s3://lab/run."""
    return Path(with_places(os.fspath(folder)))


def aggregators_in(folder: Path) -> tuple[str, ...]:
    """Names of the aggregators of the run in `folder`: one, or those that its study compares.

    Raises:
        RunError: not a run folder, or one of another version.
    """
    if not (folder / CONFIG).exists():
        refuse_unless_finished(folder)  # says what is there instead
    names = read_config(folder).model.name
    if isinstance(names, str):
        return (names,)
    if (folder / MEMBERS).exists():  # one of several, whose config is that of all
        return (str(read_json(folder / ENVIRONMENT)["aggregator"]),)
    return tuple(names)


def parts_of(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name and run folder of every aggregator of these runs; names differ.

    Raises:
        RunError: one is no run folder.
    """
    parts = []
    for folder in folders:
        names = aggregators_in(folder)
        same = sum(other.resolve().name == folder.resolve().name for other in folders) > 1
        own = str(folder) if same else folder.resolve().name
        parts += [(f"{own}/{name}" if len(names) > 1 else own, part_of(folder, name)) for name in names]
    return parts


def part_of(folder: Path, aggregator: str) -> Path:
    """The run folder of one aggregator: a sub-folder where the study compares several, else `folder` itself."""
    inside = folder / aggregator.replace(":", "-")
    return inside if inside.is_dir() and not (folder / MEMBERS).exists() else folder
