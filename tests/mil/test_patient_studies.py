"""Studies whose bags are patients: as studies of slides that were put together by hand, in every command.

Twenty patients of one to three slides (35 in all, those of a patient not side by side in the table).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mil
from mil.api.study import parts_of
from mil.compare import main as compare
from mil.heatmap import main as heatmap
from mil.look.scenes import open_theatre
from mil.predict import main as predict
from mil.results.readback import read_metrics
from mil.results.trained import open_run
from mil.train import main as train
from mil.viewer.config import ViewConfig
from mil.viewer.pages import Pages
from mil.viewer.serving import what_to_show

PATIENTS = [f"p{i % 20:02d}" for i in range(35)]
PATIENTS[33:] = ["p00", "p01"]
NEW = ["q0", "q1", "q0", "q2", "q1"]
QUICK = ["study.folds=2", "train.epochs=3", "train.lr=0.02", "train.batch_size=7", "train.accelerator=cpu"]
QUICK += ["report.bootstrap=0", "report.heatmaps=1", "report.baselines=false", "model.name=abmil", "model.hidden=5"]
MORE = ["columns.covariates=[age]", "report.covariates=false", "report.subgroups=[scanner]", "data.max_tiles=19"]
SURVIVAL = ["task=survival", "task.horizons=[20]", "data.memory=mmap"]


@dataclass(frozen=True)
class Both:
    """A cohort of slides, the same patients as one slide each, and runs of both by name."""

    folder: Path
    slides: list[str]
    by_hand: list[str]

    def run(self, name: str, *arguments: str) -> tuple[Path, Path]:
        found = []
        for unit, data in (("patient", self.slides), ("slide", self.by_hand)):
            found.append(self.folder / f"{name}_{unit}")
            if not found[-1].exists():
                assert train([*data, *QUICK, *arguments, f"study.unit={unit}", f"out={found[-1]}"]) == 0
        return found[0], found[1]


@pytest.fixture(scope="module")
def both(tmp_path_factory, write_study, no_figures) -> Both:
    folder, rng = tmp_path_factory.mktemp("patients"), np.random.default_rng(5)
    patients = [*PATIENTS, *NEW]
    hidden = pd.Series(rng.normal(size=len(patients))).groupby(patients).transform("first").to_numpy()
    arrays = [rng.normal(size=(rng.integers(4, 12), 5)).astype(np.float32) + h for h in hidden]
    slides, by_hand = folder / "slides", folder / "by_hand"
    arguments = write_study(slides, arrays, np.where(hidden > 0, "pos", "neg"), patients=patients)
    table = pd.read_csv(slides / "cohort.csv", dtype=str)
    table["age"] = 50 + pd.factorize(table["patient"])[0]
    table["scanner"] = np.where(pd.factorize(table["patient"])[0] % 2 == 0, "A", "B")
    table["time"], table["event"] = (
        (30 * np.exp(-hidden)).round(1),
        (pd.factorize(table["patient"])[0] % 4 > 0).astype(int),
    )
    table.loc[2, ["label"]] = None  # one of the three slides of p02
    firsts = table["patient"].drop_duplicates()
    whole = [np.concatenate([arrays[s] for s in np.flatnonzero(table["patient"] == p)]) for p in firsts]
    hand_arguments = write_study(by_hand, whole, firsts, patients=firsts.tolist())
    of_patients = table.drop(columns="slide").groupby("patient", sort=False).first().reset_index()
    of_patients.insert(0, "slide", [f"slide_{i:02d}" for i in range(len(firsts))])
    for there, own, n in ((slides, table, len(PATIENTS)), (by_hand, of_patients, 20)):
        own[:n].to_csv(there / "cohort.csv", index=False)
        own[n:].drop(columns="split").to_csv(there / "new.csv", index=False)
    return Both(folder, arguments, hand_arguments)


def outputs(path: Path) -> np.ndarray:
    table = pd.read_csv(path)
    return table[[name for name in table if name.startswith(("logit_", "output_", "p_", "risk", "standing"))]].to_numpy(
        float
    )


@pytest.mark.parametrize("arguments", [MORE, SURVIVAL], ids=["classes", "survival"])
def test_a_study_of_patients_is_that_of_their_slides_put_together(arguments, both):
    runs = both.run(arguments[0].partition("=")[0], *arguments)
    assert np.allclose(*(outputs(run / "predictions.csv") for run in runs), atol=1e-6)
    assert (runs[0] / "plan.csv").read_bytes() == (runs[1] / "plan.csv").read_bytes()
    metrics = [read_metrics(run) for run in runs]
    assert metrics[0]["cross_validation"] == metrics[1]["cross_validation"]
    predictions = pd.read_csv(runs[0] / "predictions.csv").drop_duplicates("slide").set_index("slide")
    assert predictions.index.tolist() == sorted(set(PATIENTS))
    assert predictions.loc["p00", "slides"] == "slide_00 / slide_20 / slide_33"
    slides = pd.read_csv(runs[0] / "slides.csv")
    assert sorted(slides["slide"]) == [f"slide_{i:02d}" for i in range(35)]
    assert dict(zip(slides["slide"], slides["patient"], strict=True)) == {
        f"slide_{i:02d}": p for i, p in enumerate(PATIENTS)
    }
    assert "all slides of a patient are one bag (20 patients, 35 slides)" in (runs[0] / "report.html").read_text()
    assert "one bag (" not in (runs[1] / "report.html").read_text()
    if arguments is MORE:
        assert metrics[0]["flow"]["table"] == {"slides": 35, "patients": 20}
        assert metrics[0]["subgroups"] == metrics[1]["subgroups"]


def test_survival_takes_patients_unless_told_otherwise(both):
    run, _ = both.run("task", *SURVIVAL)
    out = both.folder / "default"
    assert train([*both.slides, *QUICK, *SURVIVAL, f"out={out}"]) == 0
    assert (out / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    assert (
        train([*both.slides, *QUICK, *SURVIVAL, "study.unit=slide", f"out={both.folder / 'slides_of_survival'}"]) == 0
    )
    assert len(pd.read_csv(both.folder / "slides_of_survival" / "roles.csv")) == 35


def test_tile_scores_are_of_the_right_slide(both, tmp_path):
    theatres = [open_theatre(open_run(run, device="cpu")) for run in both.run(MORE[0].partition("=")[0], *MORE)]
    starts: dict[str, int] = {}
    for i, patient in enumerate(PATIENTS):
        own = f"slide_{i:02d}"
        whole = theatres[1].scene(f"slide_{int(patient[1:]):02d}", scale="raw")
        scene = theatres[0].scene(own, scale="raw")
        start = starts.get(patient, 0)
        starts[patient] = start + len(scene.scores_N)
        assert np.allclose(scene.scores_N, whole.scores_N[start : starts[patient]], atol=1e-6)
        assert len(scene.places.coords_N2) == len(scene.scores_N) == theatres[0].features.header(own).n_tiles
        assert (scene.scores.slide, scene.scores.verdict.label) == (own, whole.scores.verdict.label)
        assert starts[patient] <= len(whole.scores_N)
    run = both.folder / f"{MORE[0].partition('=')[0]}_patient"
    assert heatmap([f"run={run}", "slide=slide_33", f"out={tmp_path}", "device=cpu", "scale=raw"]) == 0
    assert (
        len(pd.read_csv(tmp_path / "slide_33_attention_tiles.csv")) == theatres[0].features.header("slide_33").n_tiles
    )
    config = ViewConfig(run=[run], device="cpu")
    pages = Pages(what_to_show(config, parts_of(config.run)))
    content, (first, last) = json.loads(pages.catalogue), map(pages.shown.slides.index, ("slide_00", "slide_33"))
    assert len(content["slides"]["name"]) == 35
    assert content["studies"][0]["p"][first] == content["studies"][0]["p"][last]
    assert pages.details(0, first)["members"] == pages.details(0, last)["members"]
    n_tiles = theatres[0].features.header("slide_33").n_tiles
    assert json.loads(pages.scores(0, last, "attention", None)[4:].partition(b"}")[0] + b"}")["n"] == n_tiles


@pytest.mark.parametrize("arguments", [MORE, SURVIVAL], ids=["classes", "survival"])
def test_new_patients_are_bags_too(arguments, both, tmp_path):
    found = []
    for run, data in zip(both.run(arguments[0].partition("=")[0], *arguments), ("slides", "by_hand"), strict=True):
        there, out = both.folder / data, tmp_path / data
        new = [f"cohort={there / 'new.csv'}", f"features.folder={there}", "report.bootstrap=0", "device=cpu"]
        assert predict([f"run={run}", *new, f"out={out}"]) == 0
        found.append(out)
    assert np.allclose(*(outputs(out / "members.csv") for out in found), atol=1e-6)
    table = pd.read_csv(found[0] / "predictions.csv").set_index("slide")
    assert table["slides"].to_dict() == {"q0": "slide_35 / slide_37", "q1": "slide_36 / slide_39", "q2": "slide_38"}
    assert sorted(pd.read_csv(found[0] / "slides.csv")["slide"]) == [f"slide_{i}" for i in range(35, 40)]


def test_known_patients_are_found_by_their_slides(both):
    with pytest.warns(UserWarning, match="trained on"):
        table = mil.open_run(both.run(MORE[0].partition("=")[0], *MORE)[0]).predict(
            both.folder / "slides", cohort=both.folder / "slides" / "cohort.csv"
        )
    assert set(table["in_study"]) == {"train"}


def test_folds_of_ones_own_name_slides_and_runs_go_on(both, tmp_path, refused, capsys):
    folds = pd.DataFrame({"slide": [f"slide_{i:02d}" for i in range(35)], "fold": [int(p[1:]) % 2 for p in PATIENTS]})
    folds.to_csv(tmp_path / "folds.csv", index=False)
    study = [
        *both.slides,
        *QUICK,
        "study.unit=patient",
        f"study.folds_csv={tmp_path / 'folds.csv'}",
        f"out={tmp_path / 'r'}",
    ]
    assert train(study) == 0
    roles = pd.read_csv(tmp_path / "r" / "roles.csv")
    assert [role == "test" for role in roles["m1"]] == [int(p[1:]) % 2 == 1 for p in roles["patient"]]
    assert train([*study, "resume=true"]) == 0
    assert "already finished" in capsys.readouterr().out
    folds.loc[20, "fold"] = 1
    folds.to_csv(tmp_path / "folds.csv", index=False)
    assert "1 patient whose slides are in different folds: 'p00'" in refused(
        train, *study[:-1], f"out={tmp_path / 'q'}"
    )
    others = both.run(MORE[0].partition("=")[0], *MORE)
    assert "its bags are patients, those of" in refused(compare, str(tmp_path / "r"), str(others[1]))


def test_patients_that_disagree_are_refused_all_together(both, tmp_path, refused):
    table = pd.read_csv(both.folder / "slides" / "cohort.csv")
    table.loc[20, "label"] = {"pos": "neg", "neg": "pos"}[table.loc[0, "label"]]
    table.loc[21, "split"] = "test"
    table.loc[34, "slide"] = "absent"
    table.to_csv(tmp_path / "c.csv", index=False)
    study = [*both.slides, *QUICK, f"cohort={tmp_path / 'c.csv'}", f"out={tmp_path / 'r'}"]
    said = refused(train, *study, "study.unit=patient")
    for part in ("1 patient whose slides have different labels: 'p00'", "train and in the test split: 'p01'", "absent"):
        assert part in said
    table["value"], table.loc[3, "time"] = np.arange(35.0), 7.77
    table.loc[34, "slide"], table.loc[21, "split"] = "slide_34", "train"
    table.to_csv(tmp_path / "c.csv", index=False)
    said = refused(train, *study, "study.unit=patient", "task=regression", "columns.label=value")
    assert "13 patients whose slides have different values" in said
    assert "whose slides have different times or events: 'p03'" in refused(train, *study, "task=survival")


def test_targets_nested_and_curves_take_patients(both, tmp_path):
    small = [*both.slides, *QUICK, "study.unit=patient", "train.epochs=1", "report.heatmaps=0"]
    assert train([*small, "columns.label=[label,scanner]", f"out={tmp_path / 't'}"]) == 0
    assert len(pd.read_csv(tmp_path / "t" / "scanner" / "roles.csv")) == 20
    nested = ["study.nested=2", "study.grid.lr=[0.01,0.1]", *SURVIVAL]
    assert train([*small, *nested, f"out={tmp_path / 'n'}"]) == 0
    assert len(pd.read_csv(tmp_path / "n" / "inner" / "roles.csv")) == 20
    assert train([*small, "study.train_sizes=[6]", f"out={tmp_path / 'c'}"]) == 0
    assert train([*small, "plan=true"]) == 0


def test_what_is_wrong_with_a_target_is_said_at_once(both, tmp_path, refused):
    table = pd.read_csv(both.folder / "by_hand" / "cohort.csv")
    table["event"], table["same"], table["flat"] = [1, 1, 1] + [0] * 17, 5.0, "x"
    table["time"] = table["time"].astype(object)
    table.loc[4, "time"], table.loc[5, "time"] = -3, None
    table.to_csv(tmp_path / "c.csv", index=False)
    study = [*both.by_hand, *QUICK, f"cohort={tmp_path / 'c.csv'}", f"out={tmp_path / 'r'}", "study.folds=5"]
    said = refused(train, *study, "task=survival", "columns.covariates=[age,flat,stage]")
    for part in (
        "time: expected 0 or more",
        "1 slide with event but no time: 'slide_05'",
        "no column 'stage' (columns.covariates)",
        "column 'flat' is 'x' for every slide",
        "3 patients with an event outside the test split, but study.folds=5 needs 5",
    ):
        assert part in said
    table.loc[6, "slide"] = "absent"
    table.to_csv(tmp_path / "c.csv", index=False)
    said = refused(train, *study, "task=regression", "columns.label=same", "columns.covariates=[flat]")
    for part in ("the target is 5 for every slide", "'absent'", "column 'flat' is 'x' for every slide"):
        assert part in said
