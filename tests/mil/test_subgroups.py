"""Sub-groups: who is in which, figures of each, and tests against the rest that hold.

Axes: S slides, C classes, R arrangements, P patients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests

from extract.cohort import CohortError, read_cohort
from extract.config import Columns
from mil.results.subgroups import (
    LEAST_PATIENTS,
    arrangements,
    auc_and_deviations,
    holm_of,
    p_values,
    share_as_far,
    studentised,
    subgroups_of,
)
from mil.results.summary import score
from mil.study.subgroups import MOST_GROUPS, group_problems, groups_of, parse, spelling_problems, wanted_columns
from mil.tasks.metrics import METRICS
from mil.train import main

CLASSES = ("normal", "tumor")


@pytest.fixture
def slides() -> Callable[..., pd.DataFrame]:
    """`slides(patients, seed)`: a table of 1 to 3 slides a patient with a patient's effect; no group has a say."""

    def make(patients: int, seed: int) -> pd.DataFrame:
        rng = np.random.default_rng([5, seed])
        patient_S = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
        label_S = patient_S % 2
        score_S = 1.5 * label_S + rng.normal(size=patients)[patient_S] + rng.normal(size=len(patient_S))
        p_S = expit(score_S.round(1) - 1)  # with ties
        names = {"slide": [f"s{i}" for i in range(len(p_S))], "patient": [f"p{i}" for i in patient_S]}
        return pd.DataFrame(names).assign(label=label_S, threshold=0.5, p_0=1 - p_S, p_1=p_S)

    return make


# --- who is in which group -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("age>=65", ["age >= 65", "age < 65", "unknown", "unknown", "age < 65"]),
        ("age <= 65", ["age <= 65", "age <= 65", "unknown", "unknown", "age <= 65"]),
        ("age>64.5", ["age > 64.5", "age <= 64.5", "unknown", "unknown", "age <= 64.5"]),
        ("age<65", ["age >= 65", "age < 65", "unknown", "unknown", "age < 65"]),
        ("age==65", ["age == 65", "age != 65", "unknown", "unknown", "age != 65"]),
        ("age != 65", ["age == 65", "age != 65", "unknown", "unknown", "age != 65"]),
        ("age", ["65", "64.5", "unknown", "unknown", "-3e1"]),
    ],
)
def test_values_and_expressions_make_groups_and_empty_cells_are_unknown(said, expected):
    assert groups_of(parse(said), ["65", "64.5", "", "NA", "-3e1"]) == expected


def test_a_list_that_cannot_be_read_is_told_at_once():
    assert spelling_problems(["site", "age>=65"]) == []
    said = "\n".join(spelling_problems(["site", "age>=old", ">=3", "site"]))
    assert "'age>=old': expected a column of the cohort, or column>=number" in said
    assert "'>=3'" in said
    assert "'site' occurs twice" in said


def test_unknown_columns_expressions_on_text_and_too_many_values_are_told_together(tmp_path):
    n = 100
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(n)], "label": "a", "patient": [f"p{i}" for i in range(n)]})
    table["age"], table["scanner"] = ["old", *map(str, range(n - 1))], "=x"
    table.loc[3, "label"], table.loc[5, "scanner"] = "b\nb", "x\u202ey"
    table.to_csv(tmp_path / "c.csv", index=False)
    given = ["age", "age>=65", "scaner", "scanner", "site"]
    with pytest.raises(CohortError) as caught:
        read_cohort(
            tmp_path / "c.csv", further=wanted_columns(given), check=lambda further: group_problems(given, further)
        )
    said = "\n".join(caught.value.problems)
    for part in (
        f"column 'age' has 100 values ('0', '1', '10' and 97 more), expected at most {MOST_GROUPS}",
        "age>=65: row 2: 'old', expected a number or nothing",
        "no column 'scaner' (report.subgroups)",
        "no column 'site' (report.subgroups)",
        "did you mean 'scanner'?",
        "row 7: scanner 'x\\u202ey' has a control character",
        "row 5: label 'b\\nb' has a control character",
    ):
        assert part in said, (part, said)


def test_named_columns_are_kept_as_text_through_a_subset(tmp_path):
    table = pd.DataFrame({"slide": ["a", "b", "c"], "label": [0, 1, 0], "patient": ["x", "y", "z"]})
    table["scanner"], table["hospital"], table["site"] = ["'=1+1", " <b> ", ""], ["N", "S", "N"], "wrong"
    table.to_csv(tmp_path / "c.csv", index=False)
    wanted = wanted_columns(["scanner", "site"])
    cohort = read_cohort(tmp_path / "c.csv", Columns(site="hospital"), further=wanted)
    assert cohort.further is not None
    assert cohort.further["scanner"].tolist() == ["=1+1", "<b>", ""]
    assert cohort.further["site"].tolist() == ["N", "S", "N"], "site is columns.site"
    kept = cohort.subset(np.array([False, True, True])).further
    assert kept is not None
    assert kept["site"].tolist() == ["S", "N"]
    assert read_cohort(tmp_path / "c.csv").further is None


# --- the test --------------------------------------------------------------------------------------------------------


def by_hand(label_S: np.ndarray, p_S: np.ndarray, patient_S: np.ndarray, inside_S: np.ndarray) -> tuple[float, float]:
    """Difference of the AUCs and its clustered variance, pair by pair (Obuchowski 1997)."""
    deviation_P, difference = dict.fromkeys(patient_S.tolist(), 0.0), 0.0
    for sign, side_S in ((1, inside_S), (-1, ~inside_S)):
        rows = np.flatnonzero(side_S)
        positives, negatives = [i for i in rows if label_S[i]], [i for i in rows if not label_S[i]]
        won = {(i, j): (p_S[i] > p_S[j]) + 0.5 * (p_S[i] == p_S[j]) for i in positives for j in negatives}
        auc = roc_auc_score(label_S[side_S], p_S[side_S])
        difference += sign * auc
        for own, place in ((positives, 0), (negatives, 1)):
            for i in own:
                share = np.mean([value for pair, value in won.items() if pair[place] == i])
                deviation_P[patient_S[i]] += sign * (share - auc) / len(own)
    return difference, sum(value**2 for value in deviation_P.values())


def test_the_statistic_equals_pairs_counted_one_by_one_with_patients_in_both_groups(slides):
    table, rng = slides(30, 0), np.random.default_rng(1)
    label_S, patient_S = table["label"].to_numpy(), table["patient"].to_numpy()
    inside_RS = rng.random((4, len(table))) < 0.4
    p_SC = table[["p_0", "p_1"]].to_numpy()
    found_R = studentised(label_S, p_SC, np.unique(patient_S, return_inverse=True)[1], inside_RS)
    for inside_S, found in zip(inside_RS, found_R, strict=True):
        difference, variance = by_hand(label_S, p_SC[:, 1], patient_S, inside_S)
        assert found == pytest.approx(difference / variance**0.5, rel=1e-9)
    auc_R, deviations_RS = auc_and_deviations(label_S == 1, p_SC[:, 1], inside_RS)
    assert auc_R[0] == pytest.approx(roc_auc_score(label_S[inside_RS[0]], p_SC[inside_RS[0], 1]))
    assert not deviations_RS[~inside_RS].any()


def test_several_classes_are_the_mean_of_one_against_the_rest(slides):
    table, rng = slides(40, 3), np.random.default_rng(0)
    label_S, patient_S = np.arange(len(table)) % 3, np.arange(len(table))
    p_SC = rng.dirichlet(np.ones(3), len(table))
    inside_S = rng.random(len(table)) < 0.5
    sides = (inside_S, ~inside_S)
    a, b = (roc_auc_score(label_S[s], p_SC[s], multi_class="ovr", average="macro") for s in sides)
    deviations_CS = [
        auc_and_deviations(label_S == c, p_SC[:, c], inside_S[None])[1][0]
        - auc_and_deviations(label_S == c, p_SC[:, c], ~inside_S[None])[1][0]
        for c in range(3)
    ]
    deviations_S = np.mean(deviations_CS, axis=0)
    found = studentised(label_S, p_SC, patient_S, inside_S[None])
    assert found[0] == pytest.approx((a - b) / np.sqrt((deviations_S**2).sum()))


def test_arrangements_keep_labels_and_patients_together():
    patient_S = np.repeat(np.arange(10), 2)
    label_S = patient_S % 2
    inside_S = patient_S < 4
    inside_S[18] = True  # the last patient has a slide on either side
    rows = arrangements(inside_S, label_S, patient_S, 400, np.random.default_rng(0))
    assert rows[0].tolist() == inside_S.tolist()
    pairs = rows.reshape(401, 10, 2)
    assert (pairs[:, :9, 0] == pairs[:, :9, 1]).all(), "a patient on one side changes sides as a whole"
    assert (pairs[:, 9].sum(axis=1) == 1).all(), "and one on both sides keeps a slide on each"
    assert pairs[1:, 9, 0].mean() == pytest.approx(0.5, abs=0.1)
    for c in (0, 1):
        assert len(set(rows[:, label_S == c].sum(axis=1))) == 1, "the class mix stays"
    assert rows[1:, 0].mean() == pytest.approx(2 / 5, abs=0.1)


def test_the_share_of_arrangements_as_far_counts_the_first_and_ties():
    assert share_as_far(np.array([0.5, -0.5, 0.2, 0.6])) == pytest.approx(3 / 4)
    assert share_as_far(np.array([0.0, 0.1, -0.1])) == 1
    assert share_as_far(np.array([np.inf, 1.0, np.inf, -2.0])) == pytest.approx(2 / 4)


def test_p_values_are_uniform_where_groups_have_no_say(slides):
    """A short form of benchmarks/subgroups.py. All metrics; every other cohort has patients on both sides."""
    found: dict[str, list[float]] = {"auc": [], "brier": [], "average_precision": []}
    rng = np.random.default_rng(2)
    for seed in range(80):
        table = slides(40, seed)
        of_patient = {p: rng.random() < 0.4 for p in table["patient"]}
        inside_S = rng.random(len(table)) < 0.4 if seed % 2 else table["patient"].map(of_patient).to_numpy(dtype=bool)
        tested = p_values(table, inside_S, CLASSES, 59, seed)
        for name, values in found.items():
            values.append(tested[name][1])
    for name, values in found.items():
        assert kstest(np.array(values) - rng.random(80) / 60, "uniform").pvalue > 0.005, (name, values)


def test_a_group_in_which_the_model_fails_is_found(slides):
    table = slides(120, 7)
    group_S = np.where(table["patient"].str[1:].astype(int) % 8 < 2, "bad", "good")
    shuffled = np.random.default_rng(0).permutation(table["p_1"].to_numpy()[group_S == "bad"])
    table.loc[group_S == "bad", "p_1"] = shuffled
    table["p_0"] = 1 - table["p_1"]
    groups = {"scanner": dict(zip(table["slide"], group_S, strict=True))}
    bad = subgroups_of(table, groups, CLASSES, 50, 0, permutations=199)[0]["groups"][0]
    assert bad["against_rest"]["auc"]["p_value"] < 0.03
    own = table[group_S == "bad"]
    assert bad["metrics"] == score(own, CLASSES, 50, 0, True)["metrics"]
    rest = table[group_S == "good"]
    expected = roc_auc_score(own["label"], own["p_1"]) - roc_auc_score(rest["label"], rest["p_1"])
    assert bad["against_rest"]["auc"]["difference"] == pytest.approx(expected)


def test_holm_goes_over_all_groups_and_two_halves_are_one_test(slides):
    table, rng = slides(200, 1), np.random.default_rng(3)
    groups = {
        name: dict(zip(table["slide"], rng.integers(0, k, len(table)).astype(str), strict=True))
        for name, k in (("half", 2), ("third", 3))
    }
    halves, thirds = (g["groups"] for g in subgroups_of(table, groups, CLASSES, 0, 0, permutations=99))
    for name in ("auc", "sensitivity"):
        two = [g["against_rest"][name]["p_value"] for g in halves]
        p = [two[0], *(g["against_rest"][name]["p_value"] for g in thirds)]
        holm = holm_of(p)
        assert [g["against_rest"][name]["p_holm"] for g in halves] == pytest.approx([holm[0], holm[0]])
        assert [g["against_rest"][name]["p_holm"] for g in thirds] == pytest.approx(list(holm[1:]))


def test_holms_correction_is_that_of_statsmodels():
    for seed in range(3):
        p = np.random.default_rng(seed).beta(0.4, 1, 5 + seed).round(2)
        np.testing.assert_allclose(holm_of(p.tolist()), multipletests(p, method="holm")[1])


def test_small_groups_are_counted_and_not_scored(slides):
    table = slides(60, 2)
    patient = table["patient"].str[1:].astype(int)
    edge = 2 * LEAST_PATIENTS
    groups = {
        name: dict(zip(table["slide"], np.where(patient < n, "in", "out"), strict=True))
        for name, n in (("few", 9), ("enough", edge))
    }
    small, large = (g["groups"] for g in subgroups_of(table, groups, CLASSES, 0, 0, permutations=9))
    assert small[0]["too_small"] == "5 patients of normal, 4 patients of tumor"
    assert small[0]["metrics"] is None
    assert small[0]["counts"]["patients"] == 9
    assert small[1]["metrics"] is not None
    assert small[1]["no_test"].startswith("the rest is too small")
    assert large[0]["too_small"] is None
    assert large[0]["against_rest"] is not None


def test_predictions_that_are_no_numbers_are_not_tested(slides):
    table = slides(60, 2)
    table.loc[3, ["p_0", "p_1"]] = np.nan
    halves = {s: str(i % 2) for i, s in enumerate(table["slide"])}
    for group in subgroups_of(table, {"x": halves}, CLASSES, 10, 0, permutations=9)[0]["groups"]:
        assert group["no_test"] == "predictions are not numbers"
        assert group["against_rest"] is None


# --- from the CSV to the page ----------------------------------------------------------------------------------------


def test_hostile_groups_from_the_csv_to_the_page(write_study, witness_arrays, tmp_path, monkeypatch):
    monkeypatch.setattr("mil.results.subgroups.PERMUTATIONS", 19)
    monkeypatch.setattr("mil.results.subgroups.LEAST_PATIENTS", 4)
    arrays, labels_S = witness_arrays(40, seed=8, lengths=(3, 6))
    data = write_study(tmp_path / "f", arrays, labels_S, split=["test" if i > 23 else "train" for i in range(40)])
    path = tmp_path / "f" / "cohort.csv"
    table = pd.read_csv(path)
    long = "<script>alert(1)</script> $x_" + "long " * 200
    table["=scanner"] = np.where(np.arange(40) % 4 == 0, "", np.where(np.arange(40) % 2, "=1+1", long))
    table["age"] = np.arange(40)
    table.to_csv(path, index=False)
    out = tmp_path / "run"
    arguments = ["report.subgroups=[=scanner,age>=20]", "report.bootstrap=20", "report.heatmaps=0", f"out={out}"]
    assert main([*data, "model.name=mean", "study.folds=2", "train.epochs=1", "train.accelerator=cpu", *arguments]) == 0
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    block = json.loads((out / "metrics.json").read_text())["subgroups"]
    scanner, age = block["sets"]["cross_validated"]
    assert sorted(g["name"] for g in scanner["groups"]) == sorted(["=1+1", long.strip(), "unknown"])
    assert [g["name"] for g in age["groups"]] == ["age < 20", "age >= 20"]
    assert sum(g["counts"]["slides"] for g in scanner["groups"]) == 24
    assert (out / "figures" / "subgroups_test.png").exists()
    said = pd.read_csv(out / "subgroups.csv")
    assert "subgroups.csv" in json.loads((out / "hashes.json").read_text())["files"]
    assert len(said) == len(METRICS) * sum(len(g["groups"]) for groupings in block["sets"].values() for g in groupings)
    own = said[(said["set"] == "cross_validated") & (said["group"] == "age < 20") & (said["metric"] == "auc")].iloc[0]
    group = age["groups"][0]
    wanted = [group["metrics"]["auc"][key] for key in ("value", "low", "high")]
    np.testing.assert_allclose(own[["value", "low", "high"]].to_numpy(dtype=float), wanted)
    assert own["slides"] == group["counts"]["slides"]
    tested = said[said["p_value"].notna()]
    assert (tested["p_holm"] >= tested["p_value"]).all()
    assert said.loc[said["p_value"].isna(), "note"].notna().all(), "no test without a reason"


def test_what_is_wrong_stops_the_study_before_training(write_study, witness_arrays, tmp_path, refused):
    arrays, labels_S = witness_arrays(12, seed=8, lengths=(3, 6))
    data = write_study(tmp_path / "f", arrays, labels_S)
    run = partial(refused, main, *data, "model.name=mean", f"out={tmp_path / 'run'}")
    assert "no column 'scanner' (report.subgroups)" in run("report.subgroups=[scanner]")
    assert "'age>=old': expected a column" in run("report.subgroups=[age>=old]")
    assert not Path(tmp_path / "run").exists()
