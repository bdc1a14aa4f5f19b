"""`python -m mil.compare`: what cannot be compared is refused, differences are paired, DeLong is a slow loop."""

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from mil.compare import main
from mil.report.comparison import compare_runs, differences, load_runs, unique_names
from mil.results.intervals import delong
from mil.results.summary import summarise
from mil.results.trainings import Trainings, difference_with_training, trainings_of
from mil.tasks.paired import auc_difference_interval, quantile_of

CLASSES = ["normal", "tumor"]
N_SLIDES, TEST_FROM, FOLDS = 60, 44, 2


def make_run(
    folder: Path, *, strength=1.5, seed=0, classes=CLASSES, change=lambda table: table, folds=FOLDS, seeds=(0,)
) -> Path:
    """A run folder as `mil.train` leaves it, as far as a comparison reads it: 2 slides a patient, chance."""
    rng = np.random.default_rng(seed)
    label_S = np.arange(N_SLIDES) // 4 % len(classes)  # both folds have all classes
    rows = []
    members = [(fold, training_seed) for fold in range(folds) for training_seed in seeds]
    for member, (fold, training_seed) in enumerate(members):
        for s in range(N_SLIDES):
            logits = rng.normal(size=len(classes))
            logits[label_S[s]] += strength
            role = "test" if s >= TEST_FROM or s // 2 % folds == fold else "train"
            split = "test" if s >= TEST_FROM else "train"
            p = np.exp(logits) / np.exp(logits).sum()
            row = {
                "member": member,
                "repeat": 0,
                "fold": fold,
                "seed": training_seed,
                "slide": f"s{s:02d}",
                "patient": f"p{s // 2}",
                "label": classes[label_S[s]],
                "split": split,
                "role": role,
            }
            row |= (
                {"logit_0": logits[1] - logits[0]}
                if len(classes) == 2
                else {f"logit_{c}": v for c, v in enumerate(logits)}
            )
            rows.append(row | {f"p_{c}": v for c, v in enumerate(p)})
    predictions = change(pd.DataFrame(rows))
    plan = pd.DataFrame(
        {
            "member": range(len(members)),
            "repeat": 0,
            "fold": [fold for fold, _ in members],
            "seed": [training_seed for _, training_seed in members],
            "lr": 1.0,
            "weight_decay": 0.0,
            "epochs": 1,
            "best_epoch": 1,
            "n_train": 1,
            "n_val": 0,
            "n_test": 1,
        }
    )
    folder.mkdir(parents=True)
    predictions.to_csv(folder / "predictions.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(summarise(predictions, plan, list(classes), bootstrap=0)))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "abmil", strength=1.5, seed=1), make_run(folder / "mean", strength=0.4, seed=2)


# --- DeLong --------------------------------------------------------------------------------------------------------


def slow_delong(labels, p_a, p_b):
    """Equations 3 to 5 of DeLong et al. 1988, pair by pair."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)

    def psi(x, y):
        return 1.0 if x > y else 0.5 if x == y else 0.0

    v10, v01, auc = [], [], []
    for p in (p_a, p_b):
        v10.append([sum(psi(p[i], p[j]) for j in negative) / len(negative) for i in positive])
        v01.append([sum(psi(p[i], p[j]) for i in positive) / len(positive) for j in negative])
        auc.append(sum(v10[-1]) / len(positive))
    s = np.cov(v10) / len(positive) + np.cov(v01) / len(negative)
    se = np.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    z = (auc[0] - auc[1]) / se
    return auc, se, z, 2 * norm.sf(abs(z))


@pytest.mark.parametrize("decimals", [6, 1])
def test_delong_equals_the_slow_loop_also_with_ties(decimals):
    rng = np.random.default_rng(0)
    labels = (rng.random(57) < 0.4).astype(int)
    p_a = np.round(np.clip(0.5 + 0.15 * labels + 0.2 * rng.normal(size=57), 0, 1), decimals)
    p_b = np.round(np.clip(0.3 * p_a + 0.35 + 0.2 * rng.normal(size=57), 0, 1), decimals)
    auc, se, z, p = slow_delong(labels, p_a, p_b)
    found = delong(labels, p_a, p_b)
    assert found is not None
    assert (found.auc_a, found.auc_b) == pytest.approx(auc)
    assert (found.auc_a, found.auc_b) == pytest.approx((roc_auc_score(labels, p_a), roc_auc_score(labels, p_b)))
    assert (found.standard_error, found.z, found.p_value) == pytest.approx((se, z, p))
    turned = delong(labels, p_b, p_a)
    assert turned is not None
    assert (turned.z, turned.p_value) == pytest.approx((-z, p))


def test_delong_where_nothing_varies():
    same = delong([0, 0, 1, 1], [0.1, 0.6, 0.5, 0.9], [0.1, 0.6, 0.5, 0.9])
    assert same is not None
    assert (same.z, same.p_value) == (None, None)
    assert delong([0, 1, 1], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) is None


def test_delong_under_the_null_rejects_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    labels = np.arange(80) % 2
    rejected = []
    for _ in range(400):
        shared = labels + rng.normal(size=80)
        p_a, p_b = (1 / (1 + np.exp(-shared - rng.normal(size=80))) for _ in "ab")
        rejected.append(delong(labels, p_a, p_b).p_value < 0.05)
    assert 0.02 < np.mean(rejected) < 0.09


def slow_clustered(labels, p_a, p_b, patients):
    """Obuchowski 1997: S10, S01 and S11 of each pair of classifiers, patient by patient and slide by slide."""
    names = sorted(set(patients))
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)

    def psi(x, y):
        return 1.0 if x > y else 0.5 if x == y else 0.0

    auc, x_sum, y_sum = [], [], []  # x_sum[r][i]: of classifier r, over the positives of patient i, less m_i times AUC
    for p in (p_a, p_b):
        v10 = {i: sum(psi(p[i], p[j]) for j in negative) / len(negative) for i in positive}
        v01 = {j: sum(psi(p[i], p[j]) for i in positive) / len(positive) for j in negative}
        auc.append(sum(v10.values()) / len(positive))
        own = [[s for s in range(len(labels)) if patients[s] == name] for name in names]
        x_sum.append([sum(v10[s] - auc[-1] for s in slides if labels[s] == 1) for slides in own])
        y_sum.append([sum(v01[s] - auc[-1] for s in slides if labels[s] == 0) for slides in own])
    n10 = len({patients[s] for s in positive})
    n01 = len({patients[s] for s in negative})
    n, big_m, big_n = len(names), len(positive), len(negative)

    def covariance(r, t):
        s10 = n10 / ((n10 - 1) * big_m) * sum(x_sum[r][i] * x_sum[t][i] for i in range(n))
        s01 = n01 / ((n01 - 1) * big_n) * sum(y_sum[r][i] * y_sum[t][i] for i in range(n))
        s11 = n / (n - 1) * sum(x_sum[r][i] * y_sum[t][i] for i in range(n))
        s11_turned = n / (n - 1) * sum(y_sum[r][i] * x_sum[t][i] for i in range(n))
        return s10 / big_m + s01 / big_n + (s11 + s11_turned) / (big_m * big_n)

    return auc, np.sqrt(covariance(0, 0) + covariance(1, 1) - 2 * covariance(0, 1))


@pytest.mark.parametrize("mixed", [False, True], ids=["one label a patient", "patients of both labels"])
def test_delong_of_several_slides_a_patient_equals_the_direct_formula(mixed):
    rng = np.random.default_rng(5)
    patients = np.repeat([f"p{i}" for i in range(19)], rng.integers(1, 5, 19))
    effect = {name: rng.normal(size=2) for name in set(patients)}
    labels = rng.integers(0, 2, len(patients)) if mixed else np.array([int(name[1:]) % 2 for name in patients])
    raw = labels[:, None] + np.stack([effect[name] for name in patients]) + 0.5 * rng.normal(size=(len(patients), 2))
    p_a, p_b = (np.round(1 / (1 + np.exp(-column)), 2) for column in raw.T)
    auc, se = slow_clustered(labels, p_a, p_b, patients.tolist())
    found = delong(labels, p_a, p_b, patients.tolist())
    assert found is not None
    assert found.standard_error == pytest.approx(se)
    assert found.z == pytest.approx((auc[0] - auc[1]) / se)
    order = rng.permutation(len(patients))
    turned = delong(labels[order], p_a[order], p_b[order], patients[order].tolist())
    assert turned is not None
    assert turned.p_value == pytest.approx(found.p_value), "the order of the slides does not matter"


def test_delong_of_one_slide_a_patient_is_delongs_own():
    rng = np.random.default_rng(6)
    labels = (rng.random(41) < 0.4).astype(int)
    p_a, p_b = np.round(rng.random(41), 1), rng.random(41)
    _, se, _, p = slow_delong(labels, p_a, p_b)
    found = delong(labels, p_a, p_b, [f"p{i:02d}" for i in rng.permutation(41)])
    assert found is not None
    assert (found.standard_error, found.p_value) == pytest.approx((se, p))


def test_delong_needs_two_patients_of_either_class():
    labels, p_a, p_b = [1, 1, 0, 0], [0.9, 0.4, 0.2, 0.6], [0.1, 0.8, 0.3, 0.7]
    assert delong(labels, p_a, p_b, ["a", "a", "b", "c"]) is None
    assert delong(labels, p_a, p_b, ["a", "b", "b", "c"]) is not None
    with pytest.raises(ValueError, match="expected one patient a slide"):
        delong(labels, p_a, p_b, ["a"])


def test_delong_under_the_null_with_several_slides_a_patient():
    """A short form of benchmarks/delong.py: slides taken as independent would be rejected in a quarter of cases."""
    rng = np.random.default_rng(8)
    rejected, naive = [], []
    for _ in range(300):
        patients = np.repeat(np.arange(130), rng.integers(1, 6, 130))
        labels = patients % 2
        scores = labels + np.sqrt(0.7) * rng.normal(size=(2, 130))[:, patients]
        scores += np.sqrt(0.3) * rng.normal(size=scores.shape)
        p_a, p_b = 1 / (1 + np.exp(-scores))
        rejected.append(delong(labels, p_a, p_b, patients.astype(str).tolist()).p_value < 0.05)
        naive.append(delong(labels, p_a, p_b).p_value < 0.05)
    assert 0.02 < np.mean(rejected) < 0.09
    assert np.mean(naive) > 0.15


# --- differences ---------------------------------------------------------------------------------------------------


def test_the_difference_is_paired_by_patient(two):
    table = differences(load_runs(two))
    assert table["set"].tolist() == ["out-of-fold", "test ensemble"]
    a, b = (pd.read_csv(folder / "predictions.csv") for folder in two)
    held = (a["role"] == "test") & (a["split"] == "train")
    a, b = (t[held].sort_values("slide") for t in (a, b))
    truth = (a["label"] == "tumor").to_numpy()
    expected = roc_auc_score(truth, a["logit_0"]) - roc_auc_score(truth, b["logit_0"])
    assert table.loc[0, "difference"] == pytest.approx(expected)
    numbers = (truth.astype(int), a["p_1"].to_numpy(), b["p_1"].to_numpy(), a["patient"].tolist())
    assert table.loc[0, "delong_p"] == pytest.approx(2 * norm.sf(abs(expected) / slow_clustered(*numbers)[1]))
    assert (table.loc[0, "slides"], table.loc[0, "patients"]) == (TEST_FROM, TEST_FROM // 2)
    patients, rng, values = a["patient"].unique(), np.random.default_rng(9), []
    rows_of = {p: np.flatnonzero(a["patient"] == p) for p in patients}
    scores = [table["logit_0"].to_numpy() for table in (a, b)]
    right = [(s[:, None] > s) + (s[:, None] == s) / 2 for s in scores]  # of every pair of slides
    assert right[0][np.ix_(truth, ~truth)].mean() == pytest.approx(roc_auc_score(truth, scores[0]))
    for _ in range(1000):  # a slow bootstrap: its spread is that of the interval, but for what it does not see near 1
        rows = np.concatenate([rows_of[p] for p in rng.choice(patients, len(patients))])
        if truth[rows].all() or not truth[rows].any():
            continue
        pairs = np.ix_(rows[truth[rows]], rows[~truth[rows]])
        values.append(right[0][pairs].mean() - right[1][pairs].mean())
    low, high = table.loc[0, ["low", "high"]].astype(float)
    assert (low + high) / 2 == pytest.approx(expected, abs=0.02), "limits of a score interval are not quite even"
    assert 0.9 < (high - low) / (2 * 1.96 * np.std(values)) < 1.4
    assert table.loc[0, "method"] == "paired"
    assert differences(load_runs(two), intervals=False)["low"].isna().all()


def test_a_run_against_its_copy_differs_by_nothing(two, tmp_path):
    copy = make_run(tmp_path / "copy", strength=1.5, seed=1)
    row = differences(load_runs([two[0], copy])).iloc[0]
    assert row["difference"] == 0
    assert -0.07 < row["low"] < 0 < row["high"] < 0.07, "a small width: elsewhere two that rank alike may differ"
    assert pd.isna(row["delong_p"])


def test_predictions_that_are_not_numbers_have_no_difference(two, tmp_path):
    def spoil(table):
        table.loc[0, ["logit_0", "p_0", "p_1"]] = np.nan
        return table

    spoilt = make_run(tmp_path / "nan", change=spoil)
    text = compare_runs([two[0], spoilt], tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "differences.csv")["difference"].isna().tolist() == [True, False]
    assert "undefined" in text


def test_three_classes_have_a_macro_difference_and_no_delong(tmp_path):
    names = ["a", "b", "c"]
    runs = [make_run(tmp_path / n, classes=names, strength=s) for n, s in (("x", 2.0), ("y", 0.5))]
    row = differences(load_runs(runs)).iloc[0]
    metrics = [
        json.loads((run / "metrics.json").read_text())["pooled_out_of_fold"]["metrics"]["auc"]["value"] for run in runs
    ]
    assert row["difference"] == pytest.approx(metrics[0] - metrics[1])
    assert pd.isna(row["delong_p"])


# --- the chance in training ----------------------------------------------------------------------------------------


def test_the_variance_between_trainings_is_added_to_the_patients(tmp_path):
    seeds = {"a": (0, 1, 2), "b": (5, 6, 7, 8)}
    runs = [
        make_run(tmp_path / n, strength=s, seed=i, seeds=seeds[n]) for i, (n, s) in enumerate((("a", 1.6), ("b", 0.9)))
    ]
    row = differences(load_runs(runs)).iloc[0]
    assert row["trainings"] == 3
    tables = []
    for run in runs:
        table = pd.read_csv(run / "predictions.csv")
        table = table[(table["role"] == "test") & (table["split"] == "train")]
        tables.append(table.pivot_table(index=["patient", "slide", "label"], columns="seed", values="logit_0"))
    truth = (tables[0].index.get_level_values("label") == "tumor").astype(int)
    expected = np.subtract(*(roc_auc_score(truth, t.mean(axis=1)) for t in tables))
    assert row["difference"] == pytest.approx(expected)
    variances = []
    for table in tables:  # the jackknife by hand, run by run as the seeds differ
        logits = table.to_numpy()
        n = logits.shape[1]
        aucs = [roc_auc_score(truth, np.delete(logits, u, axis=1).mean(axis=1)) for u in range(n)]
        variances.append(((n - 1) * np.var(aucs), n - 1))
    means = [t.mean(axis=1) for t in tables]
    patients = auc_difference_interval(truth, *means, tables[0].index.get_level_values("patient"))
    own = ((patients.high - patients.low) / 2 / 1.959964) ** 2
    total = own + sum(v for v, _ in variances)
    degrees = total**2 / sum(v**2 / d for v, d in variances)
    cochran = (1.959964 * own + sum(v * student.ppf(0.975, d) for v, d in variances)) / total
    more = (student.ppf(0.975, degrees) + cochran) / 2 * (total / own) ** 0.5 / 1.959964
    limits = [expected + more * (limit - expected) for limit in (patients.low, patients.high)]
    np.testing.assert_allclose(row[["low", "high"]].astype(float), limits, rtol=1e-4)


def test_what_the_same_seeds_do_to_both_runs_cancels(tmp_path):
    runs = [make_run(tmp_path / n, seed=4, seeds=(0, 1, 2)) for n in "ab"]
    row = differences(load_runs(runs)).iloc[0]
    assert (row["trainings"], row["difference"]) == (3, 0)
    patients = (TEST_FROM // 4, np.repeat(np.arange(TEST_FROM // 2), 2))  # of a class; of every slide out of fold
    reach = 0.1 * quantile_of(*patients) / norm.ppf(0.975)
    assert -reach < row["low"] < 0 < row["high"] < reach


def test_an_aggregator_does_not_differ_from_itself_when_only_seeds_differ():
    """Trainings differ in how much they learned. Patients alone say that a run differs from itself half of the time."""
    rng, slides = np.random.default_rng(1), [f"s{i}" for i in range(100)]
    labels, one = np.arange(100) % 2, np.ones((5, 100))
    excluded = {"trainings": 0, "patients": 0}
    for _ in range(40):
        shared = rng.normal(size=100)
        runs = []
        for first in (0, 5):
            learned = 1.2 + 0.5 * rng.normal(size=(5, 1))
            logits_US = learned * labels + shared + 0.3 * rng.normal(size=(5, 100))
            runs.append(Trainings(tuple((0, first + u) for u in range(5)), logits_US[:, :, None], one))
        single = [run.sums_USC[0, :, 0] for run in runs]
        for name, found in (
            ("trainings", difference_with_training(labels, *runs, slides)),
            ("patients", auc_difference_interval(labels, *single, slides)),
        ):
            excluded[name] += found.low > 0 or found.high < 0
    assert excluded["patients"] > 13
    assert excluded["trainings"] < 6


def test_the_ensemble_of_drawn_trainings_is_their_mean(tmp_path):
    run = load_runs([make_run(tmp_path / n, seed=i, seeds=(3, 1)) for i, n in enumerate("ab")])[0]
    rows = run.predictions[run.predictions["role"] == "test"]
    slides = rows["slide"].unique()[::-1].tolist()
    trained = trainings_of(rows, slides, CLASSES)
    assert trained.keys == ((0, 1), (0, 3))
    for weights, own in ((np.array([1.0, 0]), rows[rows["seed"] == 1]), (np.ones(2), rows)):
        logits = own.groupby("slide")["logit_0"].mean().loc[slides].to_numpy()
        np.testing.assert_allclose(trained.probabilities(weights)[:, 1], 1 / (1 + np.exp(-logits)))


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ((0,), "leave out the chance in training"),
        ((0, 1, 2), "variance between 3 trainings a run"),
        ((0, 1, 2, 3, 4), "variance between 5 trainings a run"),
    ],
)
def test_terminal_page_and_markdown_say_what_the_intervals_hold(tmp_path, seeds, said):
    runs = [make_run(tmp_path / n, seed=i, seeds=seeds) for i, n in enumerate("ab")]
    text = compare_runs(runs, tmp_path / "out")
    for shown in (text, *((tmp_path / "out" / name).read_text() for name in ("report.html", "comparison.md"))):
        assert said in " ".join(shown.split())
        assert ("study.seeds=[0,1,2,3,4]" in shown) == (len(seeds) < 5)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_tables_page_and_figure(two, tmp_path, capsys):
    out = tmp_path / "comparison"
    assert main([*map(str, two), f"out={out}", "bootstrap=50", "seed=1"]) == 0
    said = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "comparison.csv",
        "comparison.md",
        "differences.csv",
        "report.html",
        "figures",
    }
    row = pd.read_csv(out / "differences.csv").iloc[0]
    written = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    page, markdown = (out / "report.html").read_text(), (out / "comparison.md").read_text()
    for text in (said, page, markdown):
        assert written in text
        assert "abmil - mean" in text
    assert 'href="../' in page, "links lead to the runs' own pages"
    assert "http" not in page.replace("<meta http-equiv=", ""), "self-contained"
    metrics = json.loads((two[0] / "metrics.json").read_text())["cross_validation"]["metrics"]["auc"]
    assert f"| abmil | {metrics['mean']:.3f} ± {metrics['sd']:.3f} |" in markdown
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1


def test_a_folder_of_several_aggregators_stands_for_all(two, tmp_path, capsys):
    assert main([str(two[0].parent), f"out={tmp_path / 'out'}", "bootstrap=0"]) == 0
    assert "abmil - mean" in capsys.readouterr().out


def test_names_are_as_long_as_it_takes():
    assert unique_names([Path("/r/a/abmil"), Path("/r/b/abmil")]) == ["a/abmil", "b/abmil"]
    assert unique_names([Path("/r/a/x"), Path("/r/b/y")]) == ["x", "y"]


def relabel(table):
    return table.assign(label=table["label"].mask(table["slide"] == "s03", "tumor"))


def other_patient(table):
    return table.assign(patient=table["patient"].mask(table["slide"] == "s05", "p99"))


def other_fold(table):
    swapped = table["slide"].isin(["s00", "s02"])
    return table.assign(role=table["role"].mask(swapped, table["role"].map({"test": "train", "train": "test"})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[t["slide"] != "s07"], "1 slide only in abmil, not in other: 's07'"),
        (relabel, "other: 1 slide with another label than in abmil, such as 's03': 'normal' there, 'tumor' here"),
        (other_patient, "another patient than in abmil, such as 's05': 'p2' there, 'p99' here"),
        (
            other_fold,
            "other: repeat 0 fold 0: 2 slides in another part than in abmil, such as 's00': test there, training here",
        ),
        (lambda t: t[t["fold"] == 0], "only in abmil, not in other: 'repeat 0 fold 1'"),
    ],
)
def test_runs_that_differ_are_refused(two, tmp_path, refused, change, message):
    other = make_run(tmp_path / "other", change=change)
    assert message in refused(main, two[0], other, f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_train_and_val_are_one_part(two, tmp_path):
    other = make_run(
        tmp_path / "val",
        change=lambda t: t.assign(role=t["role"].mask((t["role"] == "train") & (t["slide"] < "s10"), "val")),
    )
    assert main([str(two[0]), str(other), f"out={tmp_path / 'out'}", "bootstrap=0"]) == 0


def test_all_that_is_wrong_with_the_command_is_said_at_once(two, tmp_path, refused):
    said = refused(main, two[0], tmp_path / "none", "bootstrp=3", "seed=x", f"out={two[1]}")
    assert "none: no such folder" in said
    assert "did you mean 'bootstrap'" in said
    assert "seed: expected a whole number" in said
    assert "its report would be lost" in said
    assert "expected at least two runs, got 1 run" in refused(main, two[0])
    assert "found no metrics.json" in refused(main, two[0], tmp_path)
    assert "named twice" in refused(main, two[0], two[0])


def test_help_is_quick(python):
    began = time.perf_counter()
    done = subprocess.run([*python, "-m", "mil.compare", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("python -m mil.compare RUN RUN")
    assert time.perf_counter() - began < 10, "no torch, no matplotlib"
    names = subprocess.run(
        [*python, "-c", "import mil.compare, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "matplotlib", "sklearn"} & set(names.stdout.split())
