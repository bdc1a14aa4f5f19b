"""Shared by the tests of training: synthetic bags, cohorts on disk, and a trainer without a progress bar.

Tests are not a package, so the helpers come as fixtures that return functions or small classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mil.report.page
import mil.report.task_page
from extract.features.cache import Provenance, write_features
from mil.aggregators import aggregator_class
from mil.config import Train
from mil.report.figures import FIGURES
from mil.report.sections import SECTIONS
from mil.train import main
from mil.training.bags import Bags
from mil.training.module import Members, MembersModule, fit

SMALL: dict[str, dict[str, Any]] = {
    "abmil": {"hidden": 6, "attention": 5, "head": (4,)},
    "chowder": {"n_top": 3, "n_bottom": 2, "tile_hidden": (), "head": (5,)},
    "dsmil": {"attention": 6},
    "clam_sb": {"hidden": 8, "attention": 5, "n_instances": 2},
    "dtfd": {"hidden": 8, "attention": 5, "pseudo_bags": 2},
    "transmil": {"hidden": 8, "heads": 2, "landmarks": 4, "conv": 3},
    "hipt_mil": {"hidden": 8, "heads": 2, "mlp": 8, "attention": 5},
    "transformer": {"hidden": 8, "heads": 2, "layers": 1, "induced": 3, "mlp": 8, "attention": 5},
    "evidence": {"concepts": 4, "tile_hidden": (6,)},
    "mean": {},
    "max": {},
}
"""Options that keep the tests quick. `small_module` uses them unless told otherwise."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests of the GPU's path run: the CPU, or what SLIDE_MIL_DEVICE says (benchmarks/gpu.sh: cuda)."""
    return torch.device(os.environ.get("SLIDE_MIL_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def small_options() -> dict[str, dict[str, Any]]:
    """Options that keep the tests quick, by aggregator."""
    return SMALL


@pytest.fixture(scope="session")
def bags_of() -> Callable[..., Bags]:
    """`bags_of(arrays, dtype)`: bags in one block of memory, as `load_bags` makes them."""

    def make(arrays: Sequence[np.ndarray], dtype: torch.dtype = torch.float32) -> Bags:
        lengths = [len(array) for array in arrays]
        block_TD = torch.from_numpy(np.concatenate(arrays)).to(dtype)
        names = tuple(f"s{i}" for i in range(len(arrays)))
        return Bags(names, np.array(lengths, dtype=np.int64), block_TD.shape[1], "ram", block_TD.split(lengths))

    return make


@pytest.fixture(scope="session")
def witness_arrays() -> Callable[..., tuple[list[np.ndarray], np.ndarray]]:
    """`witness_arrays(n_slides, seed, ...)`: float32 bags and their classes; class c hides tiles shifted along axis c.

    `strength=0` takes the witnesses away and leaves all else as it is.
    """

    def make(
        n_slides: int,
        seed: int,
        *,
        dim: int = 6,
        n_classes: int = 2,
        lengths: tuple[int, int] = (3, 21),
        strength: float = 4.0,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        rng = np.random.default_rng(seed)
        labels_S = rng.permutation(np.arange(n_slides) % n_classes)
        arrays = []
        for label in labels_S:
            bag_TD = rng.normal(size=(rng.integers(*lengths), dim))
            n_witnesses = max(1, len(bag_TD) // 10)
            if label:
                bag_TD[rng.choice(len(bag_TD), n_witnesses, replace=False), label] += strength
            arrays.append(bag_TD.astype(np.float32))
        return arrays, labels_S.astype(np.int64)

    return make


@pytest.fixture(scope="session")
def small_module() -> Callable[..., MembersModule]:
    """`small_module(bags, labels, train_MS, ...)`: an untrained MembersModule.

    `train` holds the settings that differ from 4 epochs of batch 5 on the CPU; `module_class` a subclass instead.
    """

    def make(
        bags: Bags,
        labels_S: np.ndarray,
        train_MS: np.ndarray,
        val_MS: np.ndarray | None = None,
        *,
        name: str = "abmil",
        options: dict[str, Any] | None = None,
        init_seeds: Sequence[int] | None = None,
        lr: Sequence[float] | float = 0.02,
        weight_decay: Sequence[float] | float = 0.0,
        n_classes: int = 2,
        seed: int = 0,
        max_tiles: int | None = None,
        labels_MS: np.ndarray | None = None,
        module_class: type[MembersModule] = MembersModule,
        **train: Any,
    ) -> MembersModule:
        n_members = len(train_MS)
        settings = Train(**({"epochs": 4, "batch_size": 5, "accelerator": "cpu"} | train))
        members = Members(
            np.broadcast_to(np.asarray(lr, dtype=float), n_members).copy(),
            np.broadcast_to(np.asarray(weight_decay, dtype=float), n_members).copy(),
            train_MS,
            np.zeros_like(train_MS) if val_MS is None else val_MS,
            labels_MS=labels_MS,
        )
        aggregator = aggregator_class(name)(
            bags.dim,
            1 if n_classes == 2 else n_classes,
            list(range(n_members)) if init_seeds is None else init_seeds,
            **(SMALL[name] if options is None else options),
        )
        return module_class(aggregator, bags, labels_S, n_classes, members, settings, seed=seed, max_tiles=max_tiles)

    return make


@pytest.fixture(scope="session")
def trained(small_module: Callable[..., MembersModule]) -> Callable[..., MembersModule]:
    """`small_module`, then `fit`."""

    def make(*arguments: Any, **options: Any) -> MembersModule:
        module = small_module(*arguments, **options)
        fit(module, progress=False)
        return module

    return make


@pytest.fixture(scope="session")
def write_study() -> Callable[..., list[str]]:
    """`write_study(folder, arrays, labels, ...)`: feature files and cohort.csv; returns the arguments that name them.

    Slides are called slide_00, slide_01, ...; each is a patient unless `patients` says otherwise. Coordinates lie on a
    grid, or wherever `coords` puts them.
    """

    def make(
        folder: Path,
        arrays: Sequence[np.ndarray],
        labels: Sequence[Any],
        *,
        dtype: str = "float32",
        split: Sequence[str] | None = None,
        patients: Sequence[str] | None = None,
        coords: Callable[[int], np.ndarray] = lambda n: np.stack([np.arange(n) % 7, np.arange(n) // 7], axis=1) * 448,
    ) -> list[str]:
        slides = [f"slide_{i:02d}" for i in range(len(arrays))]
        for slide, bag_TD in zip(slides, arrays, strict=True):
            provenance = Provenance("synthetic", "none", 224, 0.5, tile_level0_px=448, slide=slide)
            write_features(folder / f"{slide}.h5", bag_TD, coords(len(bag_TD)), provenance, dtype=dtype)
        table = pd.DataFrame({"slide": slides, "label": list(labels)})
        table["patient"] = [f"p{i:02d}" for i in range(len(arrays))] if patients is None else list(patients)
        table["split"] = "train" if split is None else list(split)
        table.to_csv(folder / "cohort.csv", index=False)
        return [f"cohort={folder / 'cohort.csv'}", f"features.folder={folder}"]

    return make


@dataclass(frozen=True)
class FinishedStudy:
    """A run folder that `python -m mil.train` filled, and what it was trained on (float16, as the cache stores it)."""

    folder: Path
    arguments: list[str]
    slides: list[str]
    split: list[str]
    labels_S: np.ndarray
    tiles: list[torch.Tensor]


@pytest.fixture(scope="session")
def run_study(draw_only: Callable[..., None]) -> Callable[..., None]:
    """`run_study(arguments)`: `python -m mil.train` in this process, on the CPU, without intervals and baselines.

    Without figures either, unless `figures`.
    """

    def run(arguments: Sequence[str], *, figures: bool = False) -> None:
        quick = ["train.accelerator=cpu", "report.bootstrap=0", "report.baselines=false"]
        with pytest.MonkeyPatch.context() as patch:
            if not figures:
                draw_only(patch)
            assert main([*arguments, *quick]) == 0

    return run


@pytest.fixture(scope="session")
def studies(
    tmp_path_factory: pytest.TempPathFactory,
    write_study: Callable[..., list[str]],
    witness_arrays: Callable[..., tuple[list[np.ndarray], np.ndarray]],
    run_study: Callable[..., None],
) -> Callable[[str], FinishedStudy]:
    """`studies(name)`: a small study, trained once: 30 slides, 3 folds x 2 seeds, val, a test split."""
    folder = tmp_path_factory.mktemp("study")
    arrays, labels_S = witness_arrays(30, seed=8, strength=5.0)
    halves = [array.astype(np.float16) for array in arrays]
    split = ["test" if i >= 24 else "train" for i in range(30)]
    data = write_study(
        folder / "features", halves, np.array(["normal", "tumor"])[labels_S], dtype="float16", split=split
    )
    done: dict[str, FinishedStudy] = {}

    def get(name: str) -> FinishedStudy:
        if name not in done:
            options = [
                f"model.{key}={list(value)}" if isinstance(value, tuple) else f"model.{key}={value}"
                for key, value in SMALL[name].items()
            ]
            study = ["study.folds=3", "study.seeds=[0,1]", "study.val_fraction=0.3"]
            train = [
                "train.epochs=4",
                "train.batch_size=5",
                "train.standardize=true",
                "train.select=best",
                "train.lr=0.02",
            ]
            arguments = [*data, *study, *train, f"model.name={name}", *options]
            run_study([*arguments, f"out={folder / name}"])
            slides = [f"slide_{i:02d}" for i in range(30)]
            tiles = [torch.from_numpy(half) for half in halves]
            done[name] = FinishedStudy(folder / name, arguments, slides, split, labels_S, tiles)
        return done[name]

    return get


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(command, *arguments)`: what a command that must end with exit code 2 says on stderr."""

    def run(command: Callable[[list[str]], int], *arguments: object) -> str:
        code: object
        try:
            code = command([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr().err
        assert code == 2, said
        return said

    return run


@pytest.fixture(scope="session")
def viewed_study(
    tmp_path_factory: pytest.TempPathFactory, run_study: Callable[..., None], script: Callable[..., Any]
) -> Any:
    """The painted study of test_heatmap with overlapping tiles, for the viewer: tests leave it as it was."""
    heatmap = script(Path(__file__).with_name("test_heatmap.py"))
    return heatmap.make_study(tmp_path_factory.mktemp("view"), run_study, 32, "abmil", *heatmap.ABMIL)


@pytest.fixture(scope="session")
def draw_only() -> Callable[..., None]:
    """`draw_only(patch, *names)`: of a report's own figures only these, and none of its sections and of other tasks.

    Drawing takes a third of the time of a small study.
    """

    def patched(patch: pytest.MonkeyPatch, *names: str) -> None:
        page, task_page = mil.report.page, mil.report.task_page
        patch.setattr(page, "FIGURES", {name: FIGURES[name] for name in names})
        patch.setattr(page, "SECTIONS", {name: replace(section, figures=()) for name, section in SECTIONS.items()})
        patch.setattr(task_page, "drawn_figures", lambda *_: {})

    return patched


@pytest.fixture(scope="module")
def no_figures(draw_only: Callable[..., None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch)
        yield
