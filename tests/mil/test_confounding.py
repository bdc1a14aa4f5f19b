"""Sites in a report: the warning against planted studies, AUC within sites against loops, linear models, the whole way.

Letters: P patients, S slides, K sites, N rows of a table.
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import fisher_exact, norm
from sklearn.metrics import roc_auc_score

from extract.cohort import Cohort
from extract.features.folder import open_feature_folder
from mil.config import StudyConfig
from mil.look.tilescores import Verdicts, score_tiles
from mil.pipeline.confounding import confounding_of
from mil.predict import main as predict
from mil.results.confounding import (
    association,
    confounding,
    corrected_v,
    labels_told,
    one_a_patient,
    site_table,
    within_sites,
)
from mil.results.site_models import (
    Slides,
    can_be_harmonized,
    left_out_sites,
    one_against_the_rest,
    probe_rounds,
    probe_sites,
    site_alone_auc,
)
from mil.results.trained import open_run
from mil.study.roles import TEST, TRAIN, Plan
from mil.tasks.estimates import auc_interval
from mil.tasks.stratified import stratified_auc_interval
from mil.train import main as train

pytestmark = pytest.mark.usefixtures("no_figures")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    """The functions of benchmarks/confounding.py, which is these tests at full size."""
    path = ROOT / "benchmarks" / "confounding.py"
    spec = importlib.util.spec_from_file_location("benchmark_confounding", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module


# --- does the site tell the label? -----------------------------------------------------------------------------------


def test_studies_whose_label_follows_the_site_are_warned_of_and_clean_ones_are_not(benchmark):
    rng = np.random.default_rng(0)
    followed = [benchmark.warned((0.8, 0.2), rng) for _ in range(40)]
    clean = [benchmark.warned((0.4, 0.4), rng) for _ in range(40)]
    assert np.mean(followed) >= 0.95
    assert np.mean(clean) <= 0.05


@pytest.mark.parametrize("task", ["survival", "regression", "ordinal"])
def test_targets_of_other_tasks_that_follow_the_site_are_warned_of_and_clean_ones_are_not(benchmark, task):
    """A short form of benchmarks/confounding.py."""
    rng, (followed, *_, clean) = np.random.default_rng(1), benchmark.PLANTS[task]
    assert sum(benchmark.warned_of(task, followed, rng) for _ in range(30)) >= 28
    assert sum(benchmark.warned_of(task, clean, rng) for _ in range(40)) <= 3


@pytest.mark.parametrize("seed", range(3))
def test_the_permutation_test_of_two_sites_is_fishers(seed):
    rng = np.random.default_rng(seed)
    site_P, label_P = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    label_P = np.where(rng.random(40) < 0.3, site_P, label_P)
    table = [[np.sum((site_P == k) & (label_P == c)) for c in (0, 1)] for k in (0, 1)]
    found = association(site_P, label_P)
    assert found.p_value == pytest.approx(fisher_exact(table).pvalue, abs=0.05)  # orders tables otherwise
    order = np.random.default_rng(9)
    statistic = _chi2(site_P, label_P)
    shuffled = [_chi2(site_P, order.permutation(label_P)) >= statistic - 1e-9 for _ in range(2000)]
    assert found.p_value == pytest.approx(np.mean(shuffled), abs=0.03)


def _chi2(site_P: np.ndarray, label_P: np.ndarray) -> float:
    total = 0.0
    for k in np.unique(site_P):
        for c in np.unique(label_P):
            expected = np.mean(site_P == k) * np.sum(label_P == c)
            total += (np.sum((site_P == k) & (label_P == c)) - expected) ** 2 / expected
    return total


def test_a_weak_difference_in_a_large_cohort_is_no_warning_and_a_rule_is_one():
    site_P = np.repeat([0, 1], 20_000)
    label_P = np.concatenate([np.arange(20_000) % 100 < 48, np.arange(20_000) % 100 < 52]).astype(int)
    weak = association(site_P, label_P)
    assert weak.p_value < 0.001
    assert not weak.flagged
    rule = association(site_P, site_P)
    assert rule.flagged
    assert rule.cramers_v == pytest.approx(1.0, abs=1e-3)
    assert not association(np.zeros(50), np.arange(50) % 2).flagged
    chance = [corrected_v(_chi2(*np.random.default_rng(s).integers(0, 4, (2, 60))), 60, 4, 4) for s in range(40)]
    assert np.median(chance) < 0.1, "what chance adds is taken off: without that it would be about 0.2"


def slides_of(site, label, patient=None, means=None) -> Slides:
    site_S = np.asarray(site)
    patient_S = np.arange(len(site_S)).astype(str) if patient is None else np.asarray(patient).astype(str)
    means_SD = np.zeros((len(site_S), 1)) if means is None else np.asarray(means, dtype=float)
    return Slides(means_SD, site_S, np.asarray(label), patient_S, [f"h{k}" for k in range(1, site_S.max() + 1)])


def test_a_patient_counts_once_with_its_rarest_label():
    slides = slides_of([1, 1, 1, 2, 2, 0], [0, 1, 0, 0, 0, 1], ["a", "a", "b", "c", "c", "d"])
    site_P, label_P = one_a_patient(slides, np.ones(6, dtype=bool))
    assert site_P.tolist() == [1, 1, 2], "d is of no site"
    assert label_P.tolist() == [1, 0, 0]


# --- the label, where the site cannot help ---------------------------------------------------------------------------


def test_auc_within_sites_is_the_weighted_mean_of_each_sites():
    rng = np.random.default_rng(4)
    site_N, label_N = rng.integers(0, 4, 90), rng.integers(0, 2, 90)
    label_N[site_N == 3] = 1
    p_N = np.clip(rng.normal(0.2 * site_N + 0.1 * label_N, 0.1), 0, 1)
    table = pd.DataFrame({"patient": np.arange(90) // 2, "label": label_N, "p_0": 1 - p_N, "p_1": p_N})
    found = within_sites(table, site_N, 2, intervals=True)
    total, weights = 0.0, 0.0
    for k in (1, 2):
        own = site_N == k
        n1, n0 = label_N[own].sum(), (1 - label_N[own]).sum()
        total += n1 * n0 / (n1 + n0) * roc_auc_score(label_N[own], p_N[own])
        weights += n1 * n0 / (n1 + n0)
    assert (found["sites"], found["one_class"], found["slides"]) == (2, 1, int((site_N > 0).sum()))
    assert found["within"]["value"] == pytest.approx(total / weights)
    assert found["all"]["value"] == pytest.approx(roc_auc_score(label_N[site_N > 0], p_N[site_N > 0]))
    assert found["difference"]["value"] == pytest.approx(found["all"]["value"] - found["within"]["value"])
    assert found["difference"]["low"] < found["difference"]["value"] < found["difference"]["high"]


def test_the_auc_within_sites_holds_the_truth():
    """150 draws: 0.95 has a standard error of 0.018. A bootstrap held 0.89 with 60 patients of 3 sites."""
    rng, held, small = np.random.default_rng(5), [], 0
    for _ in range(150):
        site_P, label_P = rng.integers(1, 4, 60), rng.random(60) < 0.4
        patient_N = np.repeat(np.arange(60), rng.integers(2, 5, 60))
        logit_N = norm.ppf(0.95) * 2**0.5 * label_P[patient_N] + (site_P == 1)[patient_N]
        logit_N = logit_N + (rng.normal(size=60)[patient_N] + rng.normal(size=len(patient_N))) / 2**0.5
        found = stratified_auc_interval(label_P[patient_N], logit_N, site_P[patient_N], patient_N)
        held.append(found.low <= 0.95 <= found.high)
        small += found.high - found.low > 0.3
    assert 0.88 <= np.mean(held) <= 0.99
    assert not small
    one = stratified_auc_interval([1, 0, 1], [0.3, 0.2, 0.1], [1, 1, 2])
    assert (one.value, one.low) == (1.0, None), "one patient of a class says nothing of its spread"
    of_one_site = stratified_auc_interval([1, 0, 1, 0, 0], [3, 1, 2, 2, 0], np.ones(5))
    assert of_one_site.value == pytest.approx(auc_interval([1, 0, 1, 0, 0], [3, 1, 2, 2, 0]).value)


def test_what_only_the_site_tells_is_worth_nothing_within_sites():
    site_N = np.repeat([1, 2], 60)
    label_N = np.concatenate([np.arange(60) % 5 == 0, np.arange(60) % 5 > 0]).astype(int)
    p_N = site_N / 3
    table = pd.DataFrame({"patient": np.arange(120), "label": label_N, "p_0": 1 - p_N, "p_1": p_N})
    found = within_sites(table, site_N, 2, intervals=False)
    assert found["all"]["value"] == pytest.approx(0.8)
    assert found["within"]["value"] == pytest.approx(0.5)
    one_class = within_sites(table.assign(label=site_N - 1), site_N, 2, intervals=False)
    assert one_class["within"]["value"] is None
    assert one_class["one_class"] == 2
    three = table.assign(label=np.arange(120) % 3, p_2=0.1, p_0=0.9 - p_N)
    assert within_sites(three, site_N, 3, intervals=False)["within"]["value"] == pytest.approx(0.5)


def test_the_site_as_a_predictor_knows_training_slides_only():
    rare_S = np.arange(40) // 2 % 4 == 0
    site_S, label_S = np.repeat([1, 2], 40), np.concatenate([rare_S, ~rare_S]).astype(int)
    slides = slides_of(site_S, label_S)
    test_S = np.arange(80) % 2 == 0
    rounds = [(~test_S, test_S), (test_S, ~test_S)]
    expected = np.mean([roc_auc_score(label_S[side], site_S[side]) for side in (test_S, ~test_S)])
    assert site_alone_auc(slides, rounds) == pytest.approx(expected)
    unseen = (slides.site_S == 1, slides.site_S == 2)
    assert site_alone_auc(slides, [unseen]) == 0.5, "a site that was not trained on says nothing"


# --- linear models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_sites", [2, 4])
def test_harmonising_hides_a_strong_site_and_costs_the_label_nothing(benchmark, n_sites):
    (site, label, _), *harmonized = np.mean(
        [benchmark.repaired(n_sites, 200, 2.0, np.random.default_rng(s), fresh=0) for s in range(2)], axis=0
    )
    assert site > 0.99
    for site_now, label_now, _ in harmonized:
        assert site_now <= 0.6
        assert label_now >= label - 0.01


@pytest.mark.parametrize("task", ["survival", "regression", "ordinal"])
def test_harmonising_hides_a_strong_site_from_other_tasks_too(benchmark, task):
    (site, metric, _), *harmonized = np.mean(
        [benchmark.repaired(2, 200, 2.0, np.random.default_rng(s), fresh=0, task=task) for s in range(3)], axis=0
    )
    assert site > 0.99
    for site_now, metric_now, _ in harmonized:
        assert site_now <= 0.6
        assert metric_now >= metric - 0.01


def test_folds_that_keep_sites_whole_are_not_asked_for_sites():
    site_S = np.repeat([1, 2, 3, 4], 10)
    slides = slides_of(site_S, np.arange(40) % 2, np.arange(40) // 2, np.eye(4)[site_S - 1])
    sides = [(site_S > 2, site_S <= 2), (site_S <= 2, site_S > 2)]
    rounds, of_the_study = probe_rounds(slides, sides, np.arange(1, 5), seed=0)
    assert not of_the_study
    for train_S, test_S in rounds:
        assert not set(slides.patient_S[train_S]) & set(slides.patient_S[test_S])
    probe = probe_sites(slides, rounds, np.arange(1, 5), "none")
    assert probe.balanced_accuracy == 1.0
    alternating = np.arange(40) % 4 < 2
    mixed = [(alternating, ~alternating), (~alternating, alternating)]
    assert probe_rounds(slides, mixed, np.arange(1, 5), seed=0) == (mixed, True)


def test_a_site_is_left_out_after_the_other_and_many_together():
    rng = np.random.default_rng(0)
    site_S, label_S = np.repeat([1, 2, 3], 30), rng.integers(0, 2, 90)
    means_SD = rng.normal(size=(90, 4)) + 10 * np.eye(4)[site_S] + 3 * label_S[:, None] * np.eye(4)[0]
    found = left_out_sites(slides_of(site_S, label_S, means=means_SD), np.ones(90, dtype=bool))
    assert sorted(tuple(group["sites"]) for group in found["groups"]) == [("h1",), ("h2",), ("h3",)]
    assert found["auc"] > 0.9
    many = slides_of(np.arange(90) % 30 + 1, label_S, means=means_SD)
    groups = left_out_sites(many, np.ones(90, dtype=bool))["groups"]
    assert len(groups) == 10
    assert sorted(name for group in groups for name in group["sites"]) == sorted(many.sites)
    tied = left_out_sites(slides_of(label_S + 1, label_S, means=means_SD), np.ones(90, dtype=bool))
    assert tied["auc"] is None
    assert tied["defined"] == 0
    assert left_out_sites(slides_of(np.ones(90, dtype=int), label_S), np.ones(90, dtype=bool)) is None


def test_auc_of_classes_that_are_there():
    label_N, p_N3 = (
        np.array([0, 0, 1, 1]),
        np.array([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]),
    )
    both = [roc_auc_score(label_N == c, p_N3[:, c]) for c in (0, 1)]
    assert one_against_the_rest(label_N, p_N3, np.array([0, 1, 2])) == pytest.approx(np.mean(both))
    assert one_against_the_rest(np.zeros(4), p_N3[:, :2], np.array([0, 1])) is None


def test_thirty_sites_of_few_slides_and_sites_that_are_the_label():
    rng = np.random.default_rng(3)
    site_S, label_S = np.arange(90) % 30 + 1, rng.integers(0, 2, 90)
    many = slides_of(site_S, label_S, means=rng.normal(size=(90, 5)))
    test_S = rng.random(90) < 0.4
    p_N = rng.random(90)
    table = pd.DataFrame({"patient": many.patient_S, "label": label_S, "p_0": 1 - p_N, "p_1": p_N, "row": range(90)})
    rounds = [(~test_S, test_S), (test_S, ~test_S)]
    options = {"harmonize": "none", "resamples": 10, "seed": 0}
    block = confounding(many, rounds, table, ["a", "b"], **options)
    assert block["probe"]["sites"] == 0, "three patients each"
    assert block["ways"][0]["site"]["value"] is None
    assert block["left_out"]["defined"] == 10
    json.dumps(block, allow_nan=False)
    tied = slides_of(label_S + 1, label_S, means=rng.normal(size=(90, 5)))
    assert not can_be_harmonized(tied, rounds)
    block = confounding(tied, rounds, table, ["a", "b"], **options)
    assert [way["how"] for way in block["ways"]] == ["none"]
    assert "No site has slides of several classes" in block["warnings"][0]


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory, write_study):
    """Data of 36 slides of three hospitals, one slide without; the label of two follows the hospital."""
    folder = tmp_path_factory.mktemp("hospitals") / "features"
    rng = np.random.default_rng(5)
    site_S = np.array([f"h{i % 3}" for i in range(35)] + [""])
    label_S = np.array([(i // 3 % 6 > 0) if i % 3 == 0 else (i // 3 % 6 == 0) for i in range(36)]).astype(int)
    shift = {"h0": 0.0, "h1": 3.0, "h2": -3.0, "": 1.0}
    arrays = [
        (np.array([shift[s], -shift[s], 0, 2 * c]) + rng.normal(size=(rng.integers(6, 20), 4))).astype(np.float32)
        for s, c in zip(site_S, label_S, strict=True)
    ]
    arguments = write_study(folder, arrays, np.array(["no", "yes"])[label_S])
    table = pd.read_csv(folder / "cohort.csv").assign(site=site_S)
    table.to_csv(folder / "cohort.csv", index=False)
    quick = ["model.hidden=4", "model.attention=4", "model.head=[]", "train.epochs=2", "study.folds=3"]
    quick += ["train.accelerator=cpu", "report.bootstrap=20", "report.heatmaps=1", "report.baselines=false"]
    return folder, [*arguments, *quick]


@pytest.fixture(scope="module")
def runs(hospitals, tmp_path_factory):
    """`runs(how)`: a run folder of a study that is harmonised so, and standardised."""
    done: dict[str, Path] = {}

    def get(how: str) -> Path:
        if how not in done:
            done[how] = tmp_path_factory.mktemp(how) / "run"
            options = [f"train.harmonize={how}", "train.standardize=true", f"out={done[how]}"]
            assert train([*hospitals[1], *options]) == 0
        return done[how]

    return get


@pytest.mark.parametrize("how", ["combat", "project"])
def test_harmonised_members_say_the_same_in_training_prediction_and_heatmaps(hospitals, runs, tmp_path, how):
    run = runs(how)
    page = (run / "report.html").read_text()
    assert "site alone predicts the label" in page
    assert '<section id="confounding">' in page
    assert "slides without a site: 1" in page
    block = json.loads((run / "metrics.json").read_text())["confounding"]
    assert (block["sites"], block["without_site"], block["harmonize"]) == (3, 1, how)

    again = tmp_path / "again"
    arguments = [f"run={run}", *hospitals[1][:2], "known_patients=score", "report.bootstrap=0", f"out={again}"]
    assert predict([*arguments, "device=cpu"]) == 0
    trained = open_run(run, device="cpu")
    logit = next(name for name in trained.predictions if name.startswith("logit"))
    before, now = (
        table.set_index(["slide", "member"])[logit].sort_index()
        for table in (trained.predictions, pd.read_csv(again / "members.csv"))
    )
    np.testing.assert_allclose(now.to_numpy(), before.to_numpy(), rtol=1e-3, atol=1e-4)

    features = open_feature_folder(hospitals[0], "cache")
    for slide in ("slide_01", "slide_35"):  # refuses where probabilities differ from predictions.csv
        scores = score_tiles(trained, slide, features.features(slide), Verdicts(trained).on(slide), "evidence")
        assert np.isfinite(scores.scores_MN).all()


def test_new_slides_of_unknown_sites_are_scored_as_of_an_average_one_and_that_is_said(
    hospitals, runs, tmp_path, capsys
):
    folder = hospitals[0]
    table = pd.read_csv(folder / "cohort.csv").drop(columns="label").head(3)
    table.assign(site=["h0", "elsewhere", None]).to_csv(tmp_path / "new.csv", index=False)
    new = [f"run={runs('combat')}", f"cohort={tmp_path / 'new.csv'}", f"features.folder={folder}"]
    capsys.readouterr()
    assert predict([*new, f"out={tmp_path / 'new'}", "device=cpu"]) == 0
    assert "2 slides of no site that the study trained on" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_resumed_study_is_the_same_study(hospitals, runs, tmp_path):
    """Killed between two passes: maps of the members that are trained come from their checkpoint."""
    run = tmp_path / "run"
    stopped = [
        *hospitals[1],
        "train.harmonize=combat",
        "train.standardize=true",
        f"out={run}",
        "train.members_per_pass=2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mil.pipeline.study.save_members", stop)
        with pytest.raises(KeyError, match="stopped here"):
            train(stopped)
    assert train([*stopped, "resume=true"]) == 0
    one, other = (open_run(folder, device="cpu").aggregator.state_dict() for folder in (run, runs("combat")))
    for name in ("site_mean_MKD", "site_scale_MKD", "input_mean_MD", "attend_weight"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def stop(*arguments: object) -> None:
    raise KeyError("stopped here")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["columns.site=label", "train.harmonize=combat"], "groups of sites have no class in common"),
        (["columns.site=split", "train.harmonize=project"], "needs slides of two sites or more, got 1"),
        (["model.init=elsewhere", "train.harmonize=combat"], "not together with model.init"),
    ],
)
def test_what_cannot_be_harmonised_is_refused_before_training(hospitals, tmp_path, capsys, options, expected):
    out = tmp_path / "run"
    assert code_of([*hospitals[1], *options, f"out={out}"]) == 2
    assert expected in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not out.exists()


def code_of(arguments: list[str]) -> int:
    try:
        return train(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("wanted", "sites", "expected"),
    [(False, [1, 2], None), ("auto", [1, 1], None), ("auto", [0, 0], None), (True, [1, 1], "one site only")],
)
def test_without_two_sites_there_is_no_section_unless_it_is_asked_for(wanted, sites, expected):
    cohort = Cohort(pd.DataFrame({"slide": ["a", "b"], "split": "train"}), ("no", "yes"))
    config = StudyConfig.model_validate({"report": {"confounding": wanted}})
    study = SimpleNamespace(config=config, cohort=cohort, site_S=np.array(sites))
    plan = Plan(pd.DataFrame({"member": [0], "repeat": 0, "fold": 0}), np.array([[TRAIN, TEST]], dtype=np.int8))
    found = confounding_of(study, plan, pd.DataFrame())
    assert found is None if expected is None else expected in found["warnings"][0]


def test_sites_beyond_those_listed_are_added_up():
    rng, n = np.random.default_rng(0), 400
    names = [f"s{k:02d}" for k in range(45)]
    patient_S = rng.integers(0, 90, n).astype(str)
    slides = Slides(np.zeros((n, 1)), rng.integers(0, 46, n), rng.integers(-1, 3, n), patient_S, names)
    used_S = rng.random(n) < 0.8
    rows = site_table(slides, used_S, partial(labels_told, slides, "xyz"))
    frame = pd.DataFrame({"site": slides.site_S, "label": slides.label_S, "patient": patient_S})[used_S]
    frame = frame[frame["site"] > 0]
    sizes = frame["site"].value_counts()
    order = sorted(sizes.index, key=lambda k: (-sizes[k], k))
    assert [row["site"] for row in rows[:-1]] == [names[k - 1] for k in order[:30]]
    assert [row["slides"] for row in rows[:-1]] == sizes[order[:30]].tolist()
    rest = frame[frame["site"].isin(order[30:])]
    assert rows[-1] == {
        "site": f"{len(order) - 30} more sites",
        "slides": len(rest),
        "patients": int(rest.groupby("site")["patient"].nunique().sum()),
        "labels": {c: int((rest["label"] == i).sum()) for i, c in enumerate("xyz")},
    }
