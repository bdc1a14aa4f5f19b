"""`python -m mil.init`: what it says of a folder and tables, and a config that mil.train takes as it is."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from extract.config import Tables, load_config
from extract.features.folder import open_feature_folder
from mil.beginning.findings import classes_of, most_alike
from mil.config import StudyConfig
from mil.config_problems import study_problems
from mil.config_reading import for_today
from mil.init import main
from mil.train import main as train

N = 16


@pytest.fixture
def features(tmp_path, write_study) -> Path:
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(4 + i % 5, 6)).astype(np.float32) for i in range(N)]
    write_study(tmp_path / "features", arrays, ["a", "b"] * (N // 2))
    (tmp_path / "features" / "cohort.csv").unlink()
    return tmp_path / "features"


@pytest.fixture
def begun(tmp_path, features, capsys, monkeypatch):
    """`begun(columns, ...)`: what mil.init says of these columns, and the config that it writes."""
    monkeypatch.chdir(tmp_path)

    def run(columns: dict[str, list], *more: str, sep: str = ",") -> tuple[str, StudyConfig]:
        pd.DataFrame(columns).to_csv(tmp_path / "table.csv", index=False, sep=sep)
        (tmp_path / "study.yaml").unlink(missing_ok=True)
        assert main([f"features.folder={features}", "cohort=table.csv", *more]) == 0
        return capsys.readouterr().out, read()

    return run


def read() -> StudyConfig:
    return load_config(StudyConfig, ["config=study.yaml"], also=study_problems, adapt=for_today)


def slides(ending: str = "") -> list[str]:
    return [f"slide_{i:02d}{ending}" for i in range(N)]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_tiny_study_runs_from_what_it_writes(begun, tmp_path, capsys):
    table = {
        "PATIENT": [f"p{i // 2}" for i in range(N)],
        "FILENAME": slides(".svs"),
        "MSI": ["MSS"] * 8 + ["mss", "MSI"] * 4,
    }
    said, config = begun(table, sep=";")
    assert "16 slides in" in said
    assert "written by cache" in said
    assert "encoder synthetic; width 6; 4 to 8 tiles a slide, median 6" in said
    assert "16 slides of 8 patients" in said
    assert "16 with features, 0 without" in said
    assert "labels: MSS: 8, mss: 4, MSI: 4" in said
    assert "columns.slide=FILENAME, columns.patient=PATIENT, columns.label=MSI" in said
    assert config.classes == ["MSI", "MSS"], "one spelling of each"
    assert config.auto == ["train.batch_size", "train.epochs", "data.max_tiles"]
    quick = ["train.epochs=1", "model.name=mean", "study.folds=2", "report.bootstrap=0", "report.heatmaps=0"]
    assert train(["config=study.yaml", *quick, "train.accelerator=cpu", "report.baselines=false"]) == 0
    said = capsys.readouterr().out
    assert "note: 4 labels that differ from the classes only in case or spaces" in said
    assert "note: file endings (.svs) of 16 slide names in the table were left out" in said
    assert (tmp_path / "runs" / "study" / "report.html").exists()


def test_it_never_overwrites_a_file(begun, tmp_path, features, refused):
    begun({"slide": slides(), "patient": slides(), "label": ["a", "b"] * 8})
    (tmp_path / "study.yaml").write_text("mine")
    assert "is not overwritten" in refused(main, f"features.folder={features}", "cohort=table.csv")
    assert (tmp_path / "study.yaml").read_text() == "mine"
    assert main([f"features.folder={features}", "cohort=table.csv", "out=other.yaml"]) == 0


@pytest.mark.parametrize(
    ("columns", "task", "classes"),
    [
        ({"OS_MONTHS": range(N), "OS_STATUS": ["0:LIVING", "1:DECEASED"] * 8}, "survival", None),
        ({"label": [i / 7 for i in range(N)]}, "regression", None),
        ({"isup_grade": [i % 6 for i in range(N)]}, "ordinal", ["0", "1", "2", "3", "4", "5"]),
        ({"label": ["x", "y"] * 8}, "classification", ["x", "y"]),
    ],
)
def test_the_task_follows_from_the_columns(begun, columns, task, classes):
    said, config = begun({"slide": slides(), "case_id": slides(), **{k: list(v) for k, v in columns.items()}})
    assert f"suggested task: {task}" in said
    assert (config.task.name, config.classes) == (task, classes)
    assert config.columns.patient == "case_id"


def test_whoever_names_the_time_wants_survival_though_there_is_a_label(begun):
    table = {"slide": slides(), "label": ["x", "y"] * 8, "months": range(N), "status": [0, 1] * 8}
    said, config = begun({k: list(v) for k, v in table.items()}, "columns.time=months", "columns.event=status")
    assert "suggested task: survival" in said
    assert (config.task.name, config.columns.time, config.columns.event) == ("survival", "months", "status")
    said, config = begun({k: list(v) for k, v in table.items()}, "columns.time=months", "columns.label=label")
    assert config.task.name == "classification"


def test_slides_without_features_features_without_slides_and_sites(begun):
    names = [*slides()[:12], "s_new"]
    said, config = begun({"slide": names, "label": ["x", "y"] * 6 + ["x"], "hospital": ["H1", "H2", "H2"] * 4 + ["H3"]})
    assert "12 with features, 1 without: 's_new'" in said
    assert "features of 4 slides that the table does not list: 'slide_12'" in said
    assert "3 sites: 'H1', 'H2', 'H3'" in said
    assert "no column names the patient" in said
    assert (config.checks.missing, config.columns.patient, config.columns.site) == ("drop", "slide", "hospital")


def test_a_label_is_not_guessed_among_several(begun):
    said, config = begun({"slide": slides(), "patient": slides(), "ER": ["x", "y"] * 8, "PR": ["u", "v"] * 8})
    assert "no label: set columns.label to one of ER, PR" in said
    assert config.columns.label == "label"
    said, config = begun(
        {"slide": slides(), "patient": slides(), "ER": ["x", "y"] * 8, "PR": ["u", "v"] * 8}, "columns.label=PR"
    )
    assert config.classes == ["u", "v"]


def test_two_tables(features, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"PATIENT": [f"p{i}" for i in range(9)], "label": list("xyxyxyxyx")}).to_csv("clini.csv", index=False)
    pd.DataFrame({"FILENAME": slides(), "case_id": [f"p{i // 2}" for i in range(N)]}).to_csv("slides.csv", index=False)
    assert main([f"features.folder={features}", "cohort.clinical=clini.csv", "cohort.slides=slides.csv"]) == 0
    assert "1 patient in clini.csv without a slide in slides.csv: 'p8'" in capsys.readouterr().out
    wanted = Tables(clinical=Path("clini.csv"), slides=Path("slides.csv"), slides_patient="case_id")
    assert read().cohort == wanted


def test_what_is_wrong_is_said(features, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(main, "out=x.yaml")
    assert "cohort: not set" in said
    assert "features.folder: not set" in said
    pd.DataFrame({"a": ["u"], "b": ["v"]}).to_csv("t.csv", index=False)
    assert "set columns.slide=NAME" in refused(main, f"features.folder={features}", "cohort=t.csv")
    assert not (tmp_path / "study.yaml").exists()


def test_the_column_of_slides_is_told_from_the_features(features):
    table = pd.DataFrame({"who": ["slide_01", "x"], "file": ["slide_02.svs", "slide_03.svs"]})
    assert most_alike(table, open_feature_folder(features).slides) == "file"
    assert most_alike(table[["who"]], {"y"}) is None
    assert classes_of({"10": 3, "9": 2}) == ["9", "10"]


def test_a_list_of_labels_becomes_a_panel(begun, tmp_path):
    table = {
        "slide": slides(),
        "patient": [f"p{i}" for i in range(N)],
        "ER": ["neg", "pos"] * 8,
        "HER2": ["0", "1", "2", "3"] * 4,
        "age": [f"{40 + i / 7:.2f}" for i in range(N)],
    }
    said, config = begun(table, "columns.label=[ER,HER2,age,PR]")
    assert "labels of ER: neg: 8, pos: 8" in said
    assert "age looks like task=regression, ER like task=classification" in said
    assert "no column 'PR' (columns.label)" in said
    assert config.targets == ["ER", "HER2"]
    assert config.classes == {"ER": ["neg", "pos"], "HER2": ["0", "1", "2", "3"]}
    assert config.study.folds == 4
    assert train([f"config={tmp_path / 'study.yaml'}", "plan=true"]) == 0
