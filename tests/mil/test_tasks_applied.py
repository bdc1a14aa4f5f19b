"""Trained studies of every task on new slides, beside each other, drawn and opened from Python."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

import mil
import mil.report.task_page
from mil.api.study import parts_of
from mil.compare import main as compare
from mil.config import Task as TaskConfig
from mil.heatmap import main as heatmap
from mil.lesions import main as lesions
from mil.look.scenes import open_theatre, verdict_line
from mil.look.tilescores import HeatmapError, score_tiles
from mil.predict import main as predict
from mil.report.task_figures import drawn_figures
from mil.results.intervals import SCALES, difference_interval
from mil.results.task_differences import task_differences, unlike_tasks
from mil.results.task_summary import fold_parts
from mil.results.trained import open_run, score_slide
from mil.tasks.contract import Part
from mil.tasks.table import task_of
from mil.train import main as train
from mil.viewer.config import ViewConfig
from mil.viewer.pages import AbsentError, Pages
from mil.viewer.serving import what_to_show

pytestmark = pytest.mark.usefixtures("no_figures")

TASKS = {
    "cox": ["task=survival", "task.unit=months", "task.horizons=[20,40]", "study.unit=slide"],
    "discrete": [
        "task=survival",
        "study.unit=slide",
        "task.loss=discrete",
        "task.horizons=[20,40]",
        "task.intervals=3",
    ],
    "regression": ["task=regression", "task.cut=0", "columns.label=value"],
    "ordinal": ["task=ordinal", "columns.label=grade", "classes=[low,mid,high]"],
}
QUICK = ["study.folds=2", "train.epochs=8", "train.lr=0.05", "train.batch_size=8", "train.accelerator=cpu"]
QUICK += ["report.bootstrap=4", "report.heatmaps=1", "train.standardize=true", "study.seeds=[0,1]"]
N_OLD, N_NEW = 26, 12


@dataclass(frozen=True)
class Trained:
    """Runs on 26 slides of 20 patients, trained once each; 12 slides of 10 other patients are new."""

    folder: Path
    arguments: list[str]

    @property
    def new(self) -> list[str]:
        return [f"cohort={self.folder / 'new.csv'}", f"features.folder={self.folder}", "report.bootstrap=4"]

    def run(self, name: str, aggregator: str = "max") -> Path:
        out = self.folder / f"{name}_{aggregator}"
        if not out.exists():
            assert train([*self.arguments, *QUICK, *TASKS[name], f"model.name={aggregator}", f"out={out}"]) == 0
        return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_study) -> Trained:
    folder, rng = tmp_path_factory.mktemp("applied"), np.random.default_rng(3)
    patients = [f"p{i % 20:02d}" for i in range(N_OLD)] + [f"q{i % 10:02d}" for i in range(N_NEW)]
    hidden = pd.Series(rng.normal(size=N_OLD + N_NEW)).groupby(patients).transform("first").to_numpy()
    arrays = []
    for number in hidden:
        bag_TD = rng.normal(size=(rng.integers(4, 12), 5)).astype(np.float32)
        bag_TD[rng.integers(len(bag_TD)), 0] = 6 + 2 * number
        arrays.append(bag_TD)
    arguments = write_study(folder, arrays, ["x"] * len(arrays), patients=patients)
    table = pd.read_csv(folder / "cohort.csv").drop(columns="label").assign(value=(10 + 4 * hidden).round(3))
    table["time"] = (30 * np.exp(-hidden)).round(1)
    table["event"] = (pd.Series(patients).str[1:].astype(int) % 4 > 0).astype(int)
    table["grade"] = np.array(["low", "mid", "high"])[np.digitize(hidden, [-0.4, 0.4])]
    table[:N_OLD].to_csv(folder / "cohort.csv", index=False)
    table[N_OLD:].drop(columns="split").to_csv(folder / "new.csv", index=False)
    return Trained(folder, arguments)


# --- predicting ----------------------------------------------------------------------------------------------------


def by_hand(run: Path, name: str, logits_MC: np.ndarray, cohort: pd.DataFrame) -> dict[str, np.ndarray]:
    """What members say of one slide, (M,) each, from tables alone: nothing of the members' file but its outputs."""
    roles, said = pd.read_csv(run / "roles.csv").set_index("slide"), pd.read_csv(run / "predictions.csv")
    cohort = cohort.set_index("slide")
    found: dict[str, list[float]] = {}
    for m, logits_C in enumerate(logits_MC):
        own = cohort.loc[roles.index[roles[f"m{m}"] == "train"]]
        if name == "regression":
            found.setdefault("prediction", []).append(own["value"].mean() + own["value"].std(ddof=0) * logits_C[0])
            continue
        if name == "ordinal":
            above = [1.0, *expit(logits_C), 0.0]
            for k in range(3):
                found.setdefault(f"p_{k}", []).append(above[k] - above[k + 1])
            continue
        risk = logits_C[0] if name == "cox" else -np.cumprod(1 - expit(logits_C)).sum()
        rows = said[(said["member"] == m) & said["slide"].isin(own.index)]
        risks = rows.groupby("patient")["risk"].mean()
        found.setdefault("risk", []).append(risk)
        found.setdefault("standing", []).append((risk - risks.median()) / risks.std(ddof=0))
        if name == "discrete":
            patients = own.drop_duplicates("patient")
            edges = np.quantile(patients["time"][patients["event"] == 1], [1 / 3, 2 / 3])
            left = np.interp(20.0, [0, *edges, patients["time"].max()], [1, *np.cumprod(1 - expit(logits_C))])
            found.setdefault("survival_0", []).append(left)
    return {column: np.array(values) for column, values in found.items()}


@pytest.mark.parametrize("name", TASKS)
def test_new_slides_get_what_each_member_means_by_its_outputs(name, trained, tmp_path, capsys):
    run = trained.run(name)
    assert predict([f"run={run}", *trained.new, f"out={tmp_path / 'p'}"]) == 0
    table, members = (pd.read_csv(tmp_path / "p" / file) for file in ("predictions.csv", "members.csv"))
    study, cohort = open_run(run, device="cpu"), pd.read_csv(trained.folder / "cohort.csv")
    features = mil.read_features(trained.folder)
    shown = {"p_0": "p_low", "p_1": "p_mid", "p_2": "p_high", "survival_0": "survival_at_20"}
    for row in table.to_dict("records"):
        logits_MC = score_slide(study, features[row["slide"]].features).logits_MBC[:, 0].numpy()
        own = members[members["slide"] == row["slide"]]
        assert own["output_0"].to_numpy() == pytest.approx(logits_MC[:, 0], abs=1e-5)
        wanted = by_hand(run, name, logits_MC.astype(float), cohort)
        for column, values_M in wanted.items():
            assert own[column].to_numpy() == pytest.approx(values_M, abs=1e-4), column
            assert row[shown.get(column, column)] == pytest.approx(values_M.mean(), abs=1e-4), column
        if name == "ordinal":
            assert row["sd"] == pytest.approx((wanted["p_1"] + 2 * wanted["p_2"]).std(ddof=1), abs=1e-4)
            assert row["predicted"] in ("low", "mid", "high")
        else:
            of = "prediction" if name == "regression" else "standing"
            assert row["sd"] == pytest.approx(wanted[of].std(ddof=1), abs=1e-4)
    assert set(table["members"]) == {4}
    assert table["in_study"].isna().all()
    if name in ("cox", "discrete"):
        of_patient = table.groupby("patient")["standing"].transform("mean")
        assert (table["risk_group"] == np.where(of_patient > 0, "high risk", "low risk")).all()
    metrics = json.loads((tmp_path / "p" / "metrics.json").read_text())
    found = metrics["test"]["ensemble"]
    assert found["counts"]["patients"] == 10
    assert found["counts"]["rows"] == (10 if name in ("cox", "discrete") else 12), "patients, or slides"
    assert found["metrics"][metrics["task"]["main"]]["value"] is not None
    page = (tmp_path / "p" / "report.html").read_text()
    assert "10</span> patients never trained on" in page
    assert "members.csv" in page
    assert metrics["metric_titles"][metrics["task"]["main"]] in capsys.readouterr().out


@pytest.mark.parametrize("name", TASKS)
def test_its_own_slides_again_are_what_training_wrote(name, trained, tmp_path, capsys):
    run = trained.run(name)
    own = [f"cohort={trained.folder / 'cohort.csv'}", f"features.folder={trained.folder}", f"out={tmp_path / 'p'}"]
    assert predict([f"run={run}", *own, "report.bootstrap=0"]) == 0
    assert "no metric counts them" in capsys.readouterr().out
    assert not json.loads((tmp_path / "p" / "metrics.json").read_text())["test"]
    again, before = (pd.read_csv(f / g) for f, g in ((tmp_path / "p", "members.csv"), (run, "predictions.csv")))
    numbers = [column for column in before.columns if column not in ("slide", "patient", "label", "split", "role")]
    before = before.sort_values(["member", "slide"], ignore_index=True)
    again = again.sort_values(["member", "slide"], ignore_index=True)
    assert np.allclose(again[numbers], before[numbers], atol=1e-4)
    assert set(pd.read_csv(tmp_path / "p" / "predictions.csv")["in_study"]) == {"train"}


def test_what_is_known_of_new_slides_may_be_nothing_or_half(trained, tmp_path, refused):
    table = pd.read_csv(trained.folder / "new.csv")
    arguments = [f"features.folder={trained.folder}", "report.bootstrap=0"]
    table.drop(columns=["time", "event"]).to_csv(tmp_path / "unknown.csv", index=False)
    run = f"run={trained.run('cox')}"
    assert predict([run, f"cohort={tmp_path / 'unknown.csv'}", *arguments, f"out={tmp_path / 'a'}"]) == 0
    assert not (tmp_path / "a" / "metrics.json").exists()
    assert pd.read_csv(tmp_path / "a" / "predictions.csv")["risk"].notna().all()
    table.drop(columns="event").to_csv(tmp_path / "half.csv", index=False)
    said = refused(predict, run, f"cohort={tmp_path / 'half.csv'}", *arguments, f"out={tmp_path / 'b'}")
    assert "no column for columns.event=event, but one for the other" in said
    table.loc[:3, ["time", "event"]] = np.nan
    table.to_csv(tmp_path / "some.csv", index=False)
    assert predict([run, f"cohort={tmp_path / 'some.csv'}", *arguments, f"out={tmp_path / 'c'}"]) == 0
    counts = json.loads((tmp_path / "c" / "metrics.json").read_text())["counts"]["test"]
    assert counts["slides"] == N_NEW
    assert counts["unlabelled"] == 4


def test_a_run_whose_files_say_different_things_is_refused(trained, tmp_path, refused):
    shutil.copytree(trained.run("regression"), tmp_path / "run")
    (tmp_path / "run" / "hashes.json").unlink(missing_ok=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    metrics["task"]["name"] = "ordinal"
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    said = refused(predict, f"run={tmp_path / 'run'}", *trained.new, f"out={tmp_path / 'p'}")
    assert "metrics.json: task ordinal, but members.safetensors has regression" in said


def test_python_opens_runs_of_every_task(trained):
    for name in TASKS:
        run = mil.open_run(trained.run(name))
        assert len(run.slides) == N_OLD
        with pytest.warns(UserWarning, match="26 slides of 26 patients that the study trained on"):
            found = run.predict(trained.folder)
        assert len(found) == N_OLD + N_NEW
        assert found[{"regression": "prediction", "ordinal": "p_high"}.get(name, "risk")].notna().all()
        assert isinstance(run.predictions["output_0"].iloc[0], float)


# --- beside each other ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cox", "regression", "ordinal"])
def test_runs_of_a_task_are_compared_on_the_same_draws(name, trained, tmp_path, capsys):
    a, b = trained.run(name), trained.run(name, "mean")
    assert compare([str(a), str(b), f"out={tmp_path / 'c'}", "bootstrap=20"]) == 0
    table = pd.read_csv(tmp_path / "c" / "differences.csv")
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (a, b)]
    main = metrics[0]["task"]["main"]
    assert table["metric"].iloc[0] == main
    for row in table.to_dict("records"):
        value_a, value_b = (m["pooled_out_of_fold"]["metrics"][row["metric"]]["value"] for m in metrics)
        assert row["difference"] == pytest.approx(value_a - value_b)
        assert row["low"] <= row["high"]
    # every draw of patients once more, in a loop that repeats rows
    first = table.iloc[0]
    parts = [fold_parts(run.task, run.predictions) for run in (open_run(a, device="cpu"), open_run(b, device="cpu"))]
    names = np.concatenate([part.table["patient"] for part in parts[0]]).astype(str)
    patients, pairs = np.unique(names), []
    task = open_run(a, device="cpu").task
    for drawn in np.random.default_rng(0).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), 20):
        times = dict(zip(patients, drawn, strict=True))
        pair = []
        for own in parts:
            repeated = [
                Part(part.table.loc[np.repeat(part.table.index, part.table["patient"].map(times))], part.training)
                for part in own
            ]
            pair.append(task.score(repeated, [np.ones((1, len(part.table))) for part in repeated], [main])[main][0])
        pairs.append(pair)
    scale = SCALES[task.metrics[main].scale]
    wanted = difference_interval(first[["value_a", "value_b"]].tolist(), np.array(pairs), scale, len(patients))
    assert [first["low"], first["high"]] == pytest.approx([wanted.low, wanted.high])
    page = html.unescape((tmp_path / "c" / "report.html").read_text())
    assert page.count(metrics[0]["metric_titles"][main]) > 3
    assert "mean" in (tmp_path / "c" / "comparison.md").read_text()
    assert f"cv_{main}_mean" in pd.read_csv(tmp_path / "c" / "comparison.csv")
    assert "leave out the chance in training" in capsys.readouterr().out


def test_a_run_beside_itself_does_not_differ(trained, tmp_path):
    run = trained.run("discrete")
    shutil.copytree(run, tmp_path / "same")
    assert compare([str(run), str(tmp_path / "same"), f"out={tmp_path / 'c'}", "bootstrap=5"]) == 0
    table = pd.read_csv(tmp_path / "c" / "differences.csv")
    assert set(table["metric"]) == {"c_harrell", "c_uno", "auc_0", "auc_1", "brier"}
    known = table["difference"].notna()
    assert known.any()
    assert (table.loc[known, ["difference", "low", "high"]].to_numpy() == 0).all()


def test_cox_is_compared_with_discrete_time_in_what_both_have(trained, tmp_path):
    assert compare([str(trained.run("cox")), str(trained.run("discrete")), f"out={tmp_path}", "bootstrap=3"]) == 2
    a, b = (open_run(trained.run(name), device="cpu") for name in ("cox", "discrete"))
    rows = task_differences([("a", a.task, a.predictions), ("b", b.task, b.predictions)], 3, 0)
    assert "brier" not in set(rows["metric"])
    assert rows["metric"].iloc[0] == "c_harrell"


def test_other_tasks_units_and_horizons_are_refused_by_name(trained, tmp_path, refused):
    cox, regression = trained.run("cox"), trained.run("regression")
    assert "task=regression, but" in refused(compare, cox, regression, f"out={tmp_path / 'a'}")
    said = refused(compare, cox, trained.run("discrete"), f"out={tmp_path / 'a'}")
    assert "task.unit=None, but" in said
    one, other = (
        task_of(TaskConfig(name="survival", horizons=[h], unit=u)) for h, u in ((5.0, "days"), (6.0, "years"))
    )
    assert unlike_tasks("a", one, "b", other) == [
        "b: task.unit=years, but a has days",
        "b: task.horizons=[6.0], but a has [5.0]",
    ]
    one, other = (task_of(TaskConfig(name="ordinal"), grades) for grades in (("a", "b"), ("b", "a")))
    assert unlike_tasks("a", one, "b", other) == ["b: grades b, a, but a has a, b"]
    one, other = (task_of(TaskConfig(name="regression", cut=cut)) for cut in (1.0, 2.0))
    assert unlike_tasks("a", one, "b", other) == ["b: task.cut=2.0, but a has 1.0"]


def test_several_aggregators_in_one_command(trained, tmp_path, capsys):
    several = ["model.name=[abmil,chowder,mean]", "model.abmil.hidden=4", "model.chowder.n_top=2", "report.heatmaps=0"]
    quick = ["train.epochs=2", "report.bootstrap=3", "study.seeds=[0]", "model.chowder.n_bottom=2"]
    assert train([*trained.arguments, *QUICK, *TASKS["regression"], *several, *quick, f"out={tmp_path / 'run'}"]) == 0
    assert "abmil - chowder" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "run" / "differences.csv")
    assert set(zip(table["a"], table["b"], strict=True)) == {
        ("abmil", "chowder"),
        ("abmil", "mean"),
        ("chowder", "mean"),
    }
    run = mil.open_run(tmp_path / "run")
    assert run.aggregators == ("abmil", "chowder", "mean")
    assert "Pearson" in run.summary
    assert len(run["mean"].slides) == N_OLD
    assert "abmil" in (tmp_path / "run" / "mean" / "report.html").read_text(), "the config of all"


# --- looked at -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_evidence_adds_up_to_what_is_said_of_the_slide(name, trained):
    """Of mean pooling with a linear head, what tiles say is on average what the slide says; not so of hazards."""
    theatre = open_theatre(open_run(trained.run(name, "mean"), device="cpu"))
    study, slide = theatre.trained, "slide_03"
    with theatre.scene(slide, kind="evidence", scale="raw") as scene:
        rows = study.predictions[(study.predictions["slide"] == slide) & (study.predictions["role"] == "test")]
        assert scene.scores.verdict.members == tuple(rows["member"])
        members = list(scene.scores.verdict.members)
        if name == "cox":
            wanted = rows["standing"].to_numpy()
        elif name == "regression":
            wanted = rows["prediction"].to_numpy() - study.facts["mean"][members]
        elif name == "ordinal":
            wanted = rows[["output_0", "output_1"]].to_numpy().mean(axis=1)
        if name != "discrete":
            np.testing.assert_allclose(scene.scores.scores_MN.mean(axis=1), wanted, rtol=1e-3, atol=1e-4)
        assert scene.scores.signed
        assert scene.colours.low == -scene.colours.high
        assert {"regression": "value", "ordinal": "grade"}.get(name, "risk") in scene.colours.label
    if name == "ordinal":
        with theatre.scene(slide, kind="evidence", scale="raw", target="high") as scene:
            mean_M = scene.scores.scores_MN.mean(axis=1)
        np.testing.assert_allclose(mean_M, rows["output_1"].to_numpy(), rtol=1e-3, atol=1e-4)
        assert scene.scores.name == "evidence for at least high (log-odds of the tile alone)"


@pytest.mark.parametrize("name", TASKS)
def test_heatmaps_say_what_the_task_says(name, trained, tmp_path, refused):
    run, words = trained.run(name), {"regression": "a higher value", "ordinal": "a higher grade"}
    wanted = [f"run={run}", "slide=slide_05", f"out={tmp_path}", "device=cpu"]
    assert heatmap([*wanted, "score=evidence", "scale=raw", "threshold=0"]) == 0
    found = {path.name: path for path in tmp_path.iterdir()}
    ends = [".png", "_tiles.csv", ".geojson", "_regions.geojson"]
    assert {f"slide_05_evidence{end}" for end in ends} <= set(found)
    tiles, shapes = pd.read_csv(found["slide_05_evidence_tiles.csv"]), found["slide_05_evidence.geojson"].read_text()
    assert f"evidence for {words.get(name, 'a higher risk')}" in shapes
    assert len(json.loads(shapes)["features"]) == len(tiles)
    said = refused(heatmap, *wanted, "score=evidence", "target=tumour")
    assert ("expected one of mid, high" if name == "ordinal" else "leave it out") in said
    theatre = open_theatre(open_run(run, device="cpu"))
    with theatre.scene("slide_05") as scene:
        line = verdict_line(scene)
    row = pd.read_csv(trained.folder / "cohort.csv").set_index("slide").loc["slide_05"]
    truth = {"regression": f"target {row['value']:.4g}", "ordinal": f"label {row['grade']}"}
    event = f"{'event at' if row['event'] else 'no event until'} {row['time']:g}"
    assert truth.get(name, event) in line
    assert "out-of-fold of 2 members" in line
    page = (run / "report.html").read_text()
    assert page.count('<figure id="heatmap-') >= 2
    assert f"highest {theatre.trained.task.noun}" in page


def test_new_slides_are_drawn_by_all_members(trained):
    drawn = mil.open_run(trained.run("cox")).heatmap("slide_30", score="evidence", features=trained.folder)
    assert drawn.png.startswith(b"\x89PNG")
    theatre = open_theatre(open_run(trained.run("cox"), device="cpu"), features=trained.folder)
    with theatre.scene("slide_30") as scene:
        assert scene.scores.verdict.said.startswith("risk ")
        assert "not a slide of the study" in verdict_line(scene)


def test_features_that_say_something_else_are_refused(trained, tmp_path):
    theatre = open_theatre(open_run(trained.run("regression"), device="cpu"))
    verdict = theatre.verdicts.on("slide_03")
    other_ND = theatre.features.features("slide_04")
    with pytest.raises(HeatmapError, match=r"not the features that the run was trained"):
        score_tiles(theatre.trained, "slide_03", other_ND, verdict)


def test_lesions_are_looked_for_with_a_tasks_evidence(trained, tmp_path, refused):
    square = [[0, 0], [448, 0], [448, 448], [0, 448], [0, 0]]
    shape = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [square]}}
    (tmp_path / "outlines").mkdir()
    outlines = json.dumps({"type": "FeatureCollection", "features": [shape]})
    (tmp_path / "outlines" / "slide_03.geojson").write_text(outlines)
    arguments = [f"annotations={tmp_path / 'outlines'}", "bootstrap=0", "device=cpu", f"out={tmp_path / 'l'}"]
    run = f"run={trained.run('ordinal')}"
    assert lesions([run, *arguments, "target=high", "negative=[low]"]) == 0
    table = pd.read_csv(tmp_path / "l" / "lesions.csv").set_index("slide")
    grades = pd.read_csv(trained.folder / "cohort.csv").set_index("slide")["grade"]
    assert set(table.index) == {"slide_03", *grades.index[grades == "low"]}
    assert table.loc["slide_03", "lesions"] == 1
    assert "expected one of low, mid, high" in refused(lesions, run, *arguments, "negative=[none]")
    said = refused(lesions, f"run={trained.run('cox')}", *arguments, "target=high", "negative=[event]")
    assert said.count("has no classes; leave it out") == 2


# --- more training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cox", "ordinal"])
def test_learning_curves_are_by_the_tasks_metric(name, trained, tmp_path, refused, capsys, monkeypatch):
    monkeypatch.setattr(mil.report.task_page, "drawn_figures", drawn_figures)  # the curve's heading is looked for
    small = [*trained.arguments, *QUICK, *TASKS[name], "model.name=max", "train.epochs=1", "report.heatmaps=0"]
    small += ["study.seeds=[0]", "report.bootstrap=0", f"out={tmp_path / 'run'}"]
    assert train([*small, "study.train_sizes=[6]"]) == 0
    assert "trained on 6 patients" in capsys.readouterr().out
    metrics, run = json.loads((tmp_path / "run" / "metrics.json").read_text()), tmp_path / "run"
    main = metrics["task"]["main"]
    smaller, full = metrics["learning_curve"]["points"]
    assert full["cross_validation"]["metrics"] == metrics["cross_validation"]["metrics"]
    roles = pd.read_csv(run / "learning_curve" / "predictions.csv")
    assert smaller["patients"] == 6
    for m, value in enumerate(smaller["cross_validation"][main]):
        own = roles[roles["member"] == 2 + m]
        assert own[own["role"] == "train"]["patient"].nunique() == 6
        assert value is None or abs(value) <= 1
    assert "against training patients" in (run / "report.html").read_text()
    if name == "cox":
        table = pd.read_csv(trained.folder / "cohort.csv")
        table.assign(event=(table["patient"].str[1:].astype(int) % 4 == 0).astype(int)).to_csv(tmp_path / "rare.csv")
        rare = [f"cohort={tmp_path / 'rare.csv'}", *small[1:-1], f"out={tmp_path / 'b'}"]
        said = refused(train, *rare, "study.train_sizes=[1]")
        assert "a member would train on no event" in said


@pytest.mark.parametrize("name", ["regression", "ordinal"])
def test_members_start_from_another_study_of_the_task(name, trained, tmp_path):
    first = trained.run(name)
    again = [*trained.arguments, *QUICK, *TASKS[name], "model.name=max", f"model.init={first}", "report.bootstrap=0"]
    assert train([*again, "train.epochs=1", "train.lr=1e-12", "report.heatmaps=0", f"out={tmp_path / 'run'}"]) == 0
    before, after = (open_run(run, device="cpu").aggregator.state_dict() for run in (first, tmp_path / "run"))
    assert set(before) == set(after)
    for key, stack in after.items():
        np.testing.assert_allclose(stack, before[key], atol=1e-6, err_msg=key)
    assert "members start from" in (tmp_path / "run" / "report.html").read_text()


def test_a_start_of_another_task_or_of_other_grades_is_refused_by_name(trained, tmp_path, refused):
    start = ["model.name=max", *trained.arguments, *QUICK, f"out={tmp_path / 'run'}"]
    said = refused(train, *start, *TASKS["cox"], f"model.init={trained.run('regression')}")
    assert "was trained with task=regression, this study has task=survival" in said
    said = refused(train, *start, *TASKS["discrete"], f"model.init={trained.run('cox')}")
    assert "task.loss=None and task.intervals=4, whose outputs mean something else" in said
    turned = [TASKS["ordinal"][0], TASKS["ordinal"][1], "classes=[high,mid,low]"]
    said = refused(train, *start, *turned, f"model.init={trained.run('ordinal')}")
    assert "has the grades low, mid, high, this study high, mid, low" in said


def test_own_folds_repeats_and_nested_choices(trained, tmp_path):
    slides = pd.read_csv(trained.folder / "cohort.csv")
    number = slides["patient"].str[1:].astype(int)
    folds = pd.DataFrame({"slide": slides["slide"], "fold": number % 2})
    folds.to_csv(tmp_path / "folds.csv", index=False)
    small = [*trained.arguments, *QUICK, "model.name=max", "train.epochs=2", "report.heatmaps=0", "report.bootstrap=0"]
    assert (
        train([*small, *TASKS["discrete"], f"study.folds_csv={tmp_path / 'folds.csv'}", f"out={tmp_path / 'a'}"]) == 0
    )
    said = pd.read_csv(tmp_path / "a" / "predictions.csv")
    held = said[said["role"] == "test"]
    assert (held["fold"] == held["patient"].str[1:].astype(int) % 2).all()
    nested = ["study.repeats=2", "study.nested=2", "study.grid.lr=[1e-6,5e-2]", f"out={tmp_path / 'b'}"]
    assert train([*small, *TASKS["cox"], *nested]) == 0
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["nested"]["metric"] == "c_harrell"
    assert {(fold["repeat"], fold["seed"]) for fold in metrics["folds"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}


# --- the viewer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_viewer_says_of_slides_what_slides_csv_says(trained, name):
    run = trained.run(name)
    config = ViewConfig(run=[run], device="cpu")
    pages = Pages(what_to_show(config, parts_of(config.run)))
    content, table = json.loads(pages.catalogue), pd.read_csv(run / "slides.csv").set_index("slide")
    (study,), names = content["studies"], content["slides"]["name"]
    assert set(names) == set(table.index)
    table = table.loc[names]
    said = [study["predicted"]["names"][code] for code in study["predicted"]["codes"]]
    if name == "regression":
        expected_S, named = table["prediction"], [""] * len(names)
    elif name == "ordinal":
        expected_S = table["p_1"] + 2 * table["p_2"]
        passed_S = (table["p_1"] + table["p_2"] > 0.5).astype(int) + (table["p_2"] > 0.5)
        named = np.array(["low", "mid", "high"])[passed_S].tolist()
    else:
        expected_S, of_patient = table["standing"], table.groupby("patient")["standing"].transform("mean")
        named = np.where(of_patient > 0, "high risk", "low risk").tolist()
    assert study["p"] == pytest.approx(expected_S.tolist(), abs=2e-5)
    assert said == named
    assert (study["error"] == [None] * len(names)) == (name in ("cox", "discrete"))
    group = [study["group"]["names"][code] for code in study["group"]["codes"]]
    if name in ("cox", "discrete"):
        assert group == ["event" if event else "no event" for event in table["event"]]
    elif name == "ordinal":
        assert set(group) == {""}, "the grade is a class of the list"
    else:
        quarter = np.ceil(4 * table["prediction"].rank().to_numpy() / len(table)).astype(int)
        order = ["lowest", "second", "third", "highest"]
        assert group == [f"prediction: {order[each - 1]} quarter" for each in quarter]
    details = pages.details(0, 3)
    held = trained_rows(run, names[3])
    assert [m["p"][0] for m in details["members"] if m["member"] in details["honest"]] == pytest.approx(
        open_run(run, device="cpu").task.one_number(held).tolist()
    )
    assert details["p"][0] == pytest.approx(study["p"][3], abs=1e-5)
    assert details["said"]
    target = 1 if name == "ordinal" else None
    bag = pages.scores(0, 3, "evidence", target)
    assert (b"at least high" in bag) == (name == "ordinal")
    with pytest.raises(AbsentError, match="target 7"):
        pages.scores(0, 3, "evidence", 7)


def trained_rows(run: Path, slide: str) -> pd.DataFrame:
    """Of the members that held the slide out."""
    rows = open_run(run, device="cpu").predictions
    return rows[(rows["slide"] == slide) & (rows["role"] == "test")].sort_values("member")
