"""`python -m mil.train` with slides configured: what has no features yet is extracted first, then trained on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

import extract.extraction.work
from extract.features.cache import read_header
from mil.train import main

pytestmark = pytest.mark.usefixtures("no_figures")

ENCODER = ["encoder.name=timm:test_vit3", "encoder.random_weights=true", "encoder.device=cpu", "extract.workers=0"]
STUDY = ["study.folds=2", "train.epochs=1", "train.accelerator=cpu", "model.name=mean", "report.bootstrap=0"]
N_SLIDES = 6


@pytest.fixture(scope="module")
def slides() -> ModuleType:
    path = Path(__file__).parents[1] / "extract" / "slides.py"
    spec = importlib.util.spec_from_file_location("slides_for_training", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cohort(slides, tmp_path_factory) -> Path:
    """Six small slides, a patient each, in a folder with subfolders; cohort.csv without and paths.csv with paths."""
    folder = tmp_path_factory.mktemp("cohort")
    rows = []
    for i in range(N_SLIDES):
        path = folder / "slides" / f"ward{i % 2}" / f"s{i}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        slides.painted_slide(path, 701 + 40 * i, 603, seed=i)
        rows.append({"slide": f"s{i}", "patient": f"p{i}", "label": "ab"[i % 2], "path": str(path)})
    pd.DataFrame(rows).to_csv(folder / "paths.csv", index=False)
    pd.DataFrame(rows).drop(columns="path").to_csv(folder / "cohort.csv", index=False)
    return folder


def test_slides_in_auc_out_and_a_second_run_extracts_nothing(cohort, tmp_path, capsys, monkeypatch):
    arguments = [
        f"cohort={cohort / 'cohort.csv'}",
        f"slides.folder={cohort / 'slides'}",
        f"features.folder={tmp_path / 'features'}",
        *ENCODER,
        *STUDY,
    ]
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "6 of 6 slides have no features" in said
    assert "6 done, 0 already there, 0 empty, 0 failed" in said
    assert (tmp_path / "run" / "report.html").exists()
    headers = [read_header(tmp_path / "features" / f"s{i}.h5") for i in range(N_SLIDES)]
    assert all(header.n_tiles for header in headers)
    assert len({header.provenance.weights_sha256 for header in headers}) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("*.h5")}

    monkeypatch.setattr(extract.extraction.work, "load_encoder", lambda section: pytest.fail("nothing is missing"))
    assert main([*arguments, f"out={tmp_path / 'again'}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("*.h5")} == before
    first, again = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("run", "again"))
    pd.testing.assert_frame_equal(first, again)


def test_paths_in_the_csv_are_slides_too_and_only_missing_ones_are_extracted(cohort, tmp_path, capsys):
    features = tmp_path / "features"
    arguments = [f"cohort={cohort / 'paths.csv'}", f"features.folder={features}", *ENCODER, *STUDY]
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 0
    (features / "s3.h5").unlink()
    capsys.readouterr()
    assert main([*arguments, f"out={tmp_path / 'again'}"]) == 0
    assert "1 done, 5 already there" in capsys.readouterr().out


def test_a_slide_that_fails_stops_the_study_before_training_unless_it_may_be_dropped(cohort, tmp_path, capsys):
    table = pd.read_csv(cohort / "paths.csv")
    broken = tmp_path / "broken.tiff"
    broken.write_bytes(b"II*\0not a slide")
    table.loc[len(table)] = {"slide": "s9", "patient": "p9", "label": "a", "path": str(broken)}
    table.to_csv(tmp_path / "cohort.csv", index=False)
    arguments = [f"cohort={tmp_path / 'cohort.csv'}", f"features.folder={tmp_path / 'features'}", *ENCODER, *STUDY]
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr()
    assert "6 done, 0 already there, 0 empty, 1 failed" in said.out
    assert "'s9'" in said.err
    assert "checks.missing=drop" in said.err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "checks.missing=drop", f"out={tmp_path / 'run'}"]) == 0
    assert "s9" in (tmp_path / "run" / "report.html").read_text()


def test_wrong_settings_are_told_together_before_anything_is_done(cohort, tmp_path, capsys):
    arguments = [f"slides.folder={cohort / 'slides'}", "data.source=quickstart", "features.layout=clam"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, f"out={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    for part in ("data.source=quickstart", "features.folder: not set", "features.layout=clam"):
        assert part in said
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_had_are_an_error_not_a_traceback(cohort, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    arguments = [f"cohort={cohort / 'paths.csv'}", f"features.folder={tmp_path / 'features'}", *STUDY]
    assert main([*arguments, f"encoder.weights={weights}", f"out={tmp_path / 'run'}"]) == 2
    assert "features cannot be extracted" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
