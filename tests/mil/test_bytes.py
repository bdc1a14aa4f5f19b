"""The same command again: every file has the same bytes, but for the dates and durations in environment.json."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

import mil.report.page
from extract.quickstart import make_quickstart, quickstart_table
from extract.tensors import write_tensors
from mil.heatmap import main as heatmap
from mil.predict import main as predict
from mil.report.figures import FIGURES
from mil.train import main
from mil.training.events import NAME, rewrite_events
from mil.training.hashes import TIMES, without_times

TINY = [
    "study.folds=2",
    "train.epochs=2",
    "train.batch_size=5",
    "train.accelerator=cpu",
    "report.bootstrap=20",
    "report.heatmaps=0",
    "report.baselines=false",
]
ABMIL = ["model.hidden=6", "model.attention=5", "model.head=[4]"]
STUDIES = {
    "two aggregators, val, two seeds": [
        "model.name=[abmil,chowder]",
        *ABMIL,
        "model.chowder.tile_hidden=[]",
        "study.val_fraction=0.3",
        "study.seeds=[0,1]",
    ],
    "nested, a member a site": [
        "model.name=abmil",
        *ABMIL,
        "study.nested=2",
        "study.grid.lr=[0.02,0.002]",
        "study.leave_one_site_out=true",
    ],
    "groups, calibration, permutations": [
        "model.name=mean",
        "report.subgroups=[site,age>=50]",
        "report.calibrate=temperature",
        "report.permutations=2",
        *("report.baselines=true", "report.heatmaps=1"),
    ],
    "learning curve": ["model.name=mean", "study.train_sizes=[5]"],
    "grades": ["model.name=mean", "task=ordinal", "classes=[0,1]", "report.heatmaps=1"],
    "survival": [
        *("model.name=mean", "task=survival", "columns.time=time", "columns.event=event", "report.baselines=true"),
    ],
}


@pytest.fixture(autouse=True)
def few_figures(monkeypatch):
    """Drawing takes most of the time of a small study; all go the same way to PNG and page."""
    few = {name: FIGURES[name] for name in ("roc", "loss")}
    monkeypatch.setattr(mil.report.page, "FIGURES", few)


def timeless(path: Path) -> bytes:
    """The file's bytes; of environment.json what is in it, without the names that may differ."""
    if path.name != "environment.json":
        return path.read_bytes()
    return json.dumps(without_times(json.loads(path.read_text()))).encode()


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(timeless(path)).hexdigest() for path in paths}


@pytest.fixture
def data(write_study, witness_arrays, tmp_path) -> list[str]:
    arrays, labels_S = witness_arrays(18, seed=3, strength=5.0)
    split = ["test" if i >= 14 else "train" for i in range(18)]
    arguments = write_study(tmp_path / "features", arrays, labels_S, split=split)
    csv = next(text.removeprefix("cohort=") for text in arguments if text.startswith("cohort="))
    rows = np.arange(18)
    more = {
        "site": [f"site {i % 2}" for i in rows],
        "age": rows + 40,
        "time": rows % 7 + 1,
        "event": (rows % 3 > 0) * 1,
    }
    pd.read_csv(csv, dtype=str).assign(**more).to_csv(csv, index=False)
    return arguments


def twice(command: Callable[[list[str]], int], arguments: list[str], out: Path) -> dict[str, str]:
    """Digests of what the command leaves in `out`, the same both times."""
    found = []
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        assert command([*arguments, f"out={out}"]) == 0
        found.append(digests(out))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("kind", STUDIES)
def test_a_study_leaves_the_same_bytes(kind, data, tmp_path):
    files = twice(main, [*data, *TINY, *STUDIES[kind]], tmp_path / "run")
    kinds = {Path(name).suffix for name in files}
    assert {".csv", ".json", ".yaml", ".html", ".png", ".safetensors"} <= kinds
    if kind.startswith("nested"):
        assert {"inner/roles.csv", "figures/left_out_sites.png"} <= set(files)
    if kind.startswith("groups"):
        wanted = {
            "decisions.json",
            "features.csv",
            "subgroups.csv",
            "baselines.safetensors",
            "figures/permutations.png",
            "figures/flow.png",
        }
        assert wanted <= set(files)


def test_predictions_and_heatmaps_are_the_same_bytes(studies, tmp_path):
    run = studies("mean").folder
    cohort, features = studies("mean").arguments[:2]
    files = twice(predict, [f"run={run}", cohort, features, "known_patients=score", "device=cpu"], tmp_path / "p")
    assert {"predictions.csv", "report.html", "metrics.json", "environment.json"} <= set(files)
    arguments = [f"run={run}", "slide=slide_02", features, "device=cpu", "threshold=90"]
    files = twice(heatmap, arguments, tmp_path / "h")
    assert {Path(name).suffix for name in files} == {".png", ".csv", ".geojson"}


def test_a_cache_is_the_same_bytes(tmp_path, monkeypatch):
    few = quickstart_table().head(3)
    monkeypatch.setattr("extract.quickstart.quickstart_table", lambda: few)
    for name in "ab":
        make_quickstart(tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_dates_and_durations_are_in_the_environment_alone(data, tmp_path):
    assert main([*data, *TINY, "model.name=mean", f"out={tmp_path / 'run'}"]) == 0
    said = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"started", "training_seconds"} <= set(said) & TIMES
    page = (tmp_path / "run" / "report.html").read_text()
    assert said["started"] not in page
    assert "training_seconds" not in page
    assert str(said["python"]) in page, "what does not change is shown"


def test_metadata_of_tensors_are_in_order_and_the_library_reads_them(tmp_path):
    """Truth: what safetensors reads back. 40 names: in its own order they would differ from one call to the next."""
    rng = np.random.default_rng(0)
    metadata = {f"name {i}": json.dumps({"ä": f'"{i}\\\n\x07', "b": [i]}) for i in rng.permutation(40).tolist()}
    tensors = {f"t{i}": torch.from_numpy(rng.normal(size=(i + 1, 3))) for i in range(4)}
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", tensors, dict(sorted(metadata.items(), reverse=True)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == metadata
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_tensorboard_shows_the_curves_of_a_file_without_dates(tmp_path):
    """Truth: what TensorBoard itself reads."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    rows = {step: {"step": step, "train_loss/member0": 1 / step, "val_auc/member1": 0.5} for step in (1, 2, 3)}
    contents = []
    for name in "ab":
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("train_loss/member0", 1.0, 1)
        rewrite_events(tmp_path / name, rows)
        assert [path.name for path in (tmp_path / name).iterdir()] == [NAME]
        contents.append((tmp_path / name / NAME).read_bytes())
    assert contents[0] == contents[1]
    read = accumulator.EventAccumulator(str(tmp_path / "a")).Reload()
    assert read.Tags()["scalars"] == ["train_loss/member0", "val_auc/member1"]
    found = [(event.step, event.value) for event in read.Scalars("train_loss/member0")]
    assert found == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_without_tensorboard_there_is_nothing_to_rewrite(tmp_path):
    rewrite_events(tmp_path, {1: {"step": 1, "train_loss/member0": 1.0}})
    assert list(tmp_path.iterdir()) == []
