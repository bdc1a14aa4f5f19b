"""Many targets trained together: each as a study of it alone, the overview, what is refused, resuming."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

import mil
from extract.config import load_config
from mil.config import StudyConfig, folder_of
from mil.config_problems import study_problems
from mil.pipeline import kinds as of_kinds
from mil.pipeline import targets as of_pipeline
from mil.pipeline import training as of_training
from mil.results.targets import holm, p_of, targets_table
from mil.results.trained import RunError
from mil.train import main

pytestmark = pytest.mark.usefixtures("no_figures")

QUICK = ["study.folds=2", "train.epochs=3", "train.lr=0.02", "train.batch_size=7", "train.accelerator=cpu"]
SMALL = ["model.name=abmil", "model.hidden=5"]
QUICK += ["report.bootstrap=0", "report.heatmaps=0", "report.baselines=false"]

KINDS = {
    "classification": ["columns.label=[ER, grade, PR]", *SMALL],
    "regression": ["task=regression", "columns.label=[age, size]", "train.standardize=true", *SMALL],
    "survival": ["task=survival", "columns.time=[OS, PFS]", "columns.event=[OS_event, PFS_event]", "model.name=mean"],
    "discrete": [
        "task=survival",
        "task.loss=discrete",
        "task.intervals=3",
        "columns.time=[OS, PFS]",
        "columns.event=dead",
    ],
    "ordinal": [
        "task=ordinal",
        "columns.label=[grade, four]",
        "classes={grade: [low,mid,high], four: [a,b,c,d]}",
        *SMALL,
    ],
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, write_study):
    """41 slides of 36 patients; every target lacks other slides."""
    folder, rng = tmp_path_factory.mktemp("targets"), np.random.default_rng(4)
    patients = np.array([f"p{i % 36:02d}" for i in range(41)])
    hidden = pd.Series(rng.normal(size=41)).groupby(patients).transform("first").to_numpy()
    arrays = [rng.normal(size=(rng.integers(4, 11), 6)).astype(np.float32) + h for h in hidden]
    arguments = write_study(folder, arrays, hidden.round(3), patients=patients)
    table, of_patient = pd.read_csv(folder / "cohort.csv"), pd.factorize(patients)[0]
    table["ER"] = np.where(hidden + rng.normal(size=41) * 0 > 0, "pos", "neg")
    table["PR"] = np.where(of_patient % 3 == 0, "pos", "neg")
    table["grade"] = np.array(["low", "mid", "high"])[np.digitize(hidden, [-0.5, 0.5])]
    table["four"] = np.array(list("abcd"))[of_patient % 4]
    table["size"] = table["label"].where(of_patient % 11 > 0)
    table["age"] = 50 + 3 * of_patient % 17
    for i, name in enumerate(("OS", "PFS")):
        table[name] = (1 + (of_patient * (7 + i)) % 23).astype(float)
        table[f"{name}_event"] = ((of_patient + i) % 3 > 0).astype(int)
    table["dead"] = table["OS_event"]
    for i, names in enumerate((["ER"], ["PR"], ["grade"], ["age"], ["OS", "OS_event"], ["four"])):
        table[names] = table[names].astype(object)
        table.loc[table["patient"].isin([f"p{i:02d}", f"p{i + 7:02d}"]), names] = None
    table.loc[table["OS"].isna(), "dead"] = None
    table.loc[table["dead"].isna(), "PFS"] = None
    table.loc[table["dead"].isna(), "PFS_event"] = None
    table.to_csv(folder / "cohort.csv", index=False)
    return folder, [*arguments, *QUICK]


def single(kind: str, config: StudyConfig, target: str) -> list[str]:
    """The arguments of a study of one target."""
    own = config.for_target(target)
    names = ("time", "event") if kind in ("survival", "discrete") else ("label",)
    given = [a for a in KINDS[kind] if not a.startswith(("columns.", "classes="))]
    order = [f"classes=[{','.join(own.classes)}]"] if isinstance(own.classes, list) else []
    return [*given, *order, *(f"columns.{name}={getattr(own.columns, name)}" for name in names)]


@pytest.fixture
def trained(monkeypatch):
    """`trained(arguments)`: what every run folder's members came to, by its name, without reports."""
    found = {}

    def report(study, name, folder, part, *more, **told):
        found[folder.name] = (study, part)
        spread = {"mean": None, "sd": None, "undefined": 0, "n": 0}
        number = {"value": None, "low": None, "high": None}
        metrics = {"auc": number, study.task.main: number}
        counts = {"slides": 1, "patients": 1, "unlabelled": 0}
        block = {"metrics": metrics, "counts": counts}
        folds = {"metrics": dict.fromkeys(metrics, spread), "folds": 2}
        said = {"counts": {"all": counts}, "cross_validation": folds, "pooled_out_of_fold": block, "test": None}
        titled = {
            "metric_titles": {study.task.main: "main"},
            "task": {"name": study.task.name, "main": study.task.main},
        }
        return said | titled | {"bootstrap": {"resamples": 0}, "members": 2}

    monkeypatch.setattr("mil.pipeline.study.report_trained", report)
    monkeypatch.setattr("mil.train.print_outcome", lambda run: None)

    def run(arguments):
        assert main(arguments) in (0, 2)
        return dict(found)

    return run


def assert_alike(a, b):
    """Two studies with what their members came to; but for what no loss sees, whose gradient is rounding that Adam
    scales up: the offset of scores before a softmax, and with Cox's loss that of the risks. (torch 2.4 also rounds a
    product by how many are multiplied together: single weights, one of a thousand, differ by 1.4e-5 there.)"""
    (study_a, part_a), (study_b, part_b) = a, b
    assert study_a.plan == study_b.plan
    assert part_a.plan == part_b.plan
    cox = study_a.task.name == "survival" and not study_a.task.discrete
    logits = [p.logits_MSC - cox * p.logits_MSC.mean(axis=1, keepdims=True) for p in (part_a, part_b)]
    assert np.allclose(*logits, atol=1e-6, rtol=1e-6)
    assert set(part_a.state) == set(part_b.state)
    for name in set(part_a.state) - {"score_bias", *(["head0_bias"] if cox else [])}:
        assert np.allclose(part_a.state[name], part_b.state[name], atol=3e-5), name
    told = ["member", "epoch"] if cox else list(part_a.history)  # recorded at several steps, between which offsets move
    pd.testing.assert_frame_equal(part_a.history[told], part_b.history[told], atol=1e-5)
    assert (part_a.epochs, part_a.diverged) == (part_b.epochs, part_b.diverged)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_among_others_is_the_study_of_it_alone(kind, cohort, tmp_path, trained, monkeypatch):
    _, arguments = cohort
    passes, one_pass = [], of_kinds.panel_pass
    monkeypatch.setattr(of_kinds, "panel_pass", lambda *a, **b: passes.append(len(a[0])) or one_pass(*a, **b))
    config = load_config(StudyConfig, [*arguments, *KINDS[kind], f"out={tmp_path / 'all'}"], also=study_problems)
    together = trained([*arguments, *KINDS[kind], f"out={tmp_path / 'all'}"])
    assert sorted(together) == sorted(config.targets)
    assert len(config.targets) >= 2
    for target in config.targets:
        alone = trained([*arguments, *single(kind, config, target), f"out={tmp_path / target}"])
        assert_alike(together[target], alone[target])
        roles = (tmp_path / target / "roles.csv").read_bytes()
        assert (tmp_path / "all" / target / "roles.csv").read_bytes() == roles
        study = together[target][0]
        unlabelled_S = study.cohort.labels_S < 0
        assert unlabelled_S.any()
        assert (study.plan.uses("unused")[:, unlabelled_S]).all()
    assert not list((tmp_path / "all").glob("**/checkpoints"))
    assert passes == ([2] if kind in ("classification", "ordinal") else [])  # two kinds of outputs are one pass


def test_thirty_others_change_nothing(cohort, tmp_path, monkeypatch, trained):
    folder, arguments = cohort
    table, rng = pd.read_csv(folder / "cohort.csv"), np.random.default_rng(0)
    names = [f"GENE{i}" for i in range(30)]
    patients = pd.factorize(table["patient"])[0]
    for name in names:
        table[name] = rng.permutation(36)[patients] % 2
    table.to_csv(tmp_path / "panel.csv", index=False)
    begun = []
    train = of_kinds.train_members
    monkeypatch.setattr(of_kinds, "train_members", lambda *a: begun.append(len(a[0].plan)) or train(*a))
    panel = [*arguments, *SMALL, f"cohort={tmp_path / 'panel.csv'}", "train.epochs=2"]
    alone = trained([*panel, "columns.label=ER", f"out={tmp_path / 'alone'}"])["alone"]
    among = f"columns.label=[{','.join([*names[:11], 'ER', *names[11:]])}]"
    assert_alike(trained([*panel, among, f"out={tmp_path / 'all'}"])["ER"], alone)
    assert begun == [62]  # 31 targets, 2 folds: one pass


def test_what_is_wrong_with_targets_is_said_together(cohort, tmp_path, refused):
    folder, arguments = cohort
    table = pd.read_csv(folder / "cohort.csv")
    table["RARE"], table["ONE"] = ["yes"] + ["no"] * 40, "same"
    table.to_csv(tmp_path / "c.csv", index=False)
    asked = [*arguments, f"cohort={tmp_path / 'c.csv'}", "columns.label=[ER, RARE, ONE, HER2]", f"out={tmp_path / 'r'}"]
    said = refused(main, *asked)
    assert "target 'RARE': class 'yes' has 1 patient" in said
    assert "target 'ONE': expected slides of at least two classes" in said
    assert "target 'HER2': " in said
    assert "no column 'HER2'" in said
    assert "target 'ER'" not in said
    assert not (tmp_path / "r" / "config.yaml").exists()
    # what is wrong with all alike is said once
    table.loc[3, "slide"] = table.loc[2, "slide"]
    table.to_csv(tmp_path / "c.csv", index=False)
    said = refused(main, *asked[:-2], "columns.label=[ER, PR]", f"out={tmp_path / 'r'}")
    assert said.count("is listed 2 times") == 1
    assert "target 'ER'" not in said


def test_lists_that_do_not_fit_are_refused(cohort, tmp_path, refused):
    _, arguments = cohort
    out = f"out={tmp_path / 'r'}"
    said = refused(main, *arguments, "columns.label=[ER,ER,a/b,a:b,Figures]", "report.permutations=3", out)
    for part in ("'ER' occurs twice", "'a/b' and 'a:b' would share", "'Figures' is the name", "report.permutations"):
        assert part in said
    said = refused(main, *arguments, "task=survival", "columns.time=[OS,PFS]", "columns.event=[dead]", out)
    assert "expected a time and an event for each target, got 2 in columns.time, 1 in columns.event" in said
    assert "task=survival reads" in refused(main, *arguments, "task=survival", "columns.label=[ER,PR]", out)
    assert "classes.EB: not a target" in refused(main, *arguments, "columns.label=[ER]", "classes={EB: [a,b]}", out)
    assert folder_of("a/b: c?") == "a-b- c-"


def test_nested_cross_validation_chooses_for_each_target(cohort, tmp_path, trained):
    _, arguments = cohort
    nested = [*arguments, *SMALL, "study.nested=2", "train.epochs=2", "study.grid.lr=[0.001,0.03]"]
    together = trained([*nested, "columns.label=[ER,PR]", f"out={tmp_path / 'all'}"])
    alone = trained([*nested, "columns.label=PR", f"out={tmp_path / 'PR'}"])
    assert_alike(together["PR"], alone["PR"])
    tables = [pd.read_csv(tmp_path / folder / "choices.csv") for folder in ("all/PR", "PR")]
    pd.testing.assert_frame_equal(*tables, atol=1e-5)


def test_a_stopped_run_goes_on_and_a_targets_folder_is_a_run_folder(cohort, tmp_path, capsys, monkeypatch):
    folder, arguments = cohort
    run, out = [*arguments, "model.name=[mean,max]", "columns.label=[ER,PR]", "report.bootstrap=5"], tmp_path / "run"
    monkeypatch.setattr("mil.report.page.shown_figures", lambda *a, **b: [])
    calls, whole = [], of_pipeline.train_targets

    def stopped(studies, name, *more):
        calls.append(name)
        if calls == ["mean", "max"]:
            raise KeyboardInterrupt
        return whole(studies, name, *more)

    monkeypatch.setattr(of_pipeline, "train_targets", stopped)
    assert main([*run, f"out={out}"]) == 130
    before = {path: path.read_bytes() for path in out.glob("*/mean/predictions.csv")}
    assert len(before) == 2
    assert main([*run, f"out={out}", "resume=true"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert not list(out.glob("**/checkpoints"))
    capsys.readouterr()
    assert main([*run, f"out={out}", "resume=true"]) == 0
    assert "already finished" in capsys.readouterr().out
    table = pd.read_csv(out / "targets.csv")
    assert table[["target", "aggregator"]].to_numpy().tolist() == [
        [t, a] for t in ("ER", "PR") for a in ("mean", "max")
    ]
    assert table["p_holm"].notna().all()
    assert "Holm's correction for 4 comparisons" in (out / "targets.md").read_text()
    page = (out / "report.html").read_text()
    assert 'href="ER/mean/report.html"' in page
    opened = mil.open_run(out)
    assert opened.targets == ("ER", "PR")
    assert opened.lost == {}
    with pytest.raises(KeyError, match="did you mean"):
        opened["ERR"]
    with pytest.raises(RunError, match="which target"):
        _ = opened.metrics
    one = opened["ER"]["mean"]
    assert one.folder == out / "ER" / "mean"
    with pytest.warns(UserWarning, match="trained on"):
        assert len(one.predict(folder, known_patients="score")) == 41
    assert one.heatmap("slide_03").tiles["score"].notna().all()
    overwritten_with_its_targets_and_nothing_else(run, out, capsys)


def overwritten_with_its_targets_and_nothing_else(run, out, capsys):
    """All targets' folders are the study's own, and what another command put among them is not."""
    (out / "mine").mkdir()
    (out / "mine" / "config.yaml").write_bytes(
        (out / "PR" / "config.yaml").read_bytes().replace(b"seed: 0", b"seed: 5")
    )
    (out / "mine" / "plan.csv").write_bytes((out / "PR" / "mean" / "plan.csv").read_bytes())
    assert main([*run, f"out={out}", "overwrite=true"]) == 2
    said = capsys.readouterr().err
    assert f"{out / 'mine'}: made by mil.train" in said
    assert str(out / "ER") not in said
    assert main([*run, f"out={out / 'PR'}", "overwrite=true"]) == 2
    assert "is one aggregator's or target's part of a study" in capsys.readouterr().err
    shutil.rmtree(out / "mine")
    (out / "ER" / "mean" / "metrics.json").unlink()
    assert main([*run, f"out={out}", "overwrite=true"]) == 0
    assert (out / "ER" / "mean" / "metrics.json").exists()


def test_holm_is_the_step_down_rule_and_p_comes_from_the_interval():
    rng = np.random.default_rng(2)
    p = rng.random(9) ** 3
    p[[2, 6]] = np.nan
    found, known = holm(p), np.flatnonzero(np.isfinite(p))
    for alpha in np.linspace(0.001, 0.999, 400):  # Holm's own words: reject in order until the first that is not small
        rejected = set()
        for step, i in enumerate(known[np.argsort(p[known])]):
            if p[i] > alpha / (len(known) - step):
                break
            rejected.add(int(i))
        assert rejected == {int(i) for i in known if found[i] <= alpha}
    assert np.isnan(found[[2, 6]]).all()
    se = 0.05
    number = {"value": 0.62, "low": 0.62 - norm.ppf(0.975) * se, "high": 0.9}
    assert p_of(number, 0.5) == pytest.approx(2 * norm.sf(0.12 / se))
    assert p_of({"value": 0.62, "low": None, "high": None}, 0.5) is None
    assert p_of({"value": 1.0, "low": 1.0, "high": 1.0}, 0.5) is None


def test_the_overview_counts_slides_and_comparisons():
    def metrics(value, low, high, unlabelled):
        block = {"metrics": {"auc": {"value": value, "low": low, "high": high}}, "counts": {"patients": 9}}
        counts = {"slides": 12, "unlabelled": unlabelled, "slides_per_class": {"neg": 4, "pos": 5}}
        folds = {"metrics": {"auc": {"mean": 0.6, "sd": 0.1}}}
        return {"counts": {"all": counts}, "cross_validation": folds, "pooled_out_of_fold": block, "test": None}

    own = {"A": metrics(0.9, 0.8, 0.95, 3), "B": metrics(0.6, 0.45, 0.7, 0), "C": metrics(None, None, None, 1)}
    table = targets_table({"abmil": own})
    assert table["slides"].tolist() == [9, 12, 11]
    assert table["per_class"].tolist() == ["neg 4, pos 5"] * 3
    assert table["p_holm"][0] == pytest.approx(2 * table["p"][0])
    assert table["p_holm"][1] == pytest.approx(table["p"][1])
    assert np.isnan(table["p_holm"][2])


def test_a_panel_is_planned_and_what_is_auto_is_chosen_for_all(cohort, tmp_path, capsys, trained):
    _, arguments = cohort
    given = [a for a in arguments if not a.startswith("train.batch_size")]
    given += [*SMALL, "columns.label=[ER,grade,four]", "train.batch_size=auto"]
    assert main([*given, "plan=true", f"out={tmp_path / 'all'}"]) == 0
    said = capsys.readouterr().out
    assert "6 members of 3 targets, of 3 kinds of outputs" in said
    assert "target grade: 2 members; slides in each fold:" in said
    assert not (tmp_path / "all").exists()
    chosen = dict(line.partition(" ")[0].split("=") for line in said.splitlines() if " (auto): " in line)
    together = trained([*given, f"out={tmp_path / 'all'}"])
    assert {str(study.config.train.batch_size) for study, _ in together.values()} == {chosen["train.batch_size"]}
    assert "for all targets, by ER" in " ".join(together["ER"][0].notes)
    assert "which has the most training slides" in said


def test_cox_with_attention_differs_by_rounding_alone(cohort, tmp_path, trained, monkeypatch):
    """In float32 risks of a target among others may be 0.01 off: Adam divides a gradient by its own size, and one that
    is nothing but rounding (Cox's loss does not see a shift of all risks) still makes steps. In float64 they agree."""
    _, arguments = cohort
    made = of_training.module_around

    def in_float64(*given):
        module = made(*given)
        module.aggregator.double()
        module.logits_MSC, module.losses_MS = module.logits_MSC.double(), module.losses_MS.double()
        return module

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(of_training, "module_around", in_float64)
    cox = [*arguments, *SMALL, "task=survival"]
    both = ["columns.time=[OS,PFS]", "columns.event=[OS_event,PFS_event]", f"out={tmp_path / 'all'}"]
    alone = ["columns.time=PFS", "columns.event=PFS_event", f"out={tmp_path / 'PFS'}"]
    together, single = trained([*cox, *both])["PFS"][1], trained([*cox, *alone])["PFS"][1]
    logits = [part.logits_MSC - part.logits_MSC.mean(axis=1, keepdims=True) for part in (together, single)]
    assert logits[0].dtype == np.float64
    assert np.abs(logits[0]).max() > 0.01
    assert np.abs(logits[0] - logits[1]).max() < 1e-9
