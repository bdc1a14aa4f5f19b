"""Plans: no patient on both sides, folds really stratified, chance under control, files that read back equal."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from extract.cohort import Cohort, check_cohort
from mil.study.folds import deal_folds, hold_out
from mil.study.plan import make_plan
from mil.study.roles import ROLES, Plan, PlanError, init_seed, patients_with_two_roles
from mil.study.saved import load_plan, save_plan

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


def cohort_of(rows: list[tuple], classes: tuple[str, ...] | None = None) -> Cohort:
    """Rows of (patient, label[, split]); slides are named s0, s1, ..."""
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(len(rows))], "patient": [row[0] for row in rows]})
    table["label"] = pd.Series([row[1] for row in rows], dtype=object)
    table["split"] = [row[2] if len(row) > 2 else "train" for row in rows]
    table["path"], table["mpp"] = pd.Series([None] * len(rows), dtype=object), np.nan
    return check_cohort(table, classes)


def balanced(n_patients: int = 23, slides: int = 1, test: int = 0) -> Cohort:
    """Every third patient is a tumour patient; the last `test` patients are the official test split."""
    return cohort_of(
        [
            (f"p{p:03d}", "tumor" if p % 3 == 0 else "normal", "test" if p >= n_patients else "train")
            for p in range(n_patients + test)
            for _ in range(slides)
        ]
    )


def random_cohort(rng: np.random.Generator) -> Cohort:
    """Any cohort a user may bring: tiny or not, several slides a patient, unbalanced, several labels, unlabelled."""
    n_patients, n_classes = int(rng.integers(4, 40)), int(rng.integers(2, 5))
    weights_C = rng.dirichlet(np.full(n_classes, 1.0))
    rows = []
    for p in range(n_patients):
        own = rng.choice(n_classes, p=weights_C)
        split = "test" if rng.random() < 0.15 else "train"
        for _ in range(int(rng.integers(1, 7))):
            label = rng.choice(n_classes) if rng.random() < 0.1 else own
            rows.append((f"p{p}", None if rng.random() < 0.05 else "abcd"[label], split))
    return cohort_of([rows[i] for i in rng.permutation(len(rows))])


def two_roles_by_hand(plan: Plan, cohort: Cohort) -> set[tuple[int, str]]:
    """The readable way to find a leak: look at every pair of slides."""
    patients = list(cohort.table["patient"])
    return {
        (int(plan.members["member"][m]), patients[i])
        for m in range(len(plan))
        for i in range(len(cohort))
        for j in range(i)
        if patients[i] == patients[j]
        and ROLES[plan.roles_MS[m, i]] != ROLES[plan.roles_MS[m, j]]
        and "unused" not in (ROLES[plan.roles_MS[m, i]], ROLES[plan.roles_MS[m, j]])
    }


def plan_of(cohort: Cohort, **options) -> Plan:
    return make_plan(cohort, **{"lr": 1e-3, "weight_decay": 0.0} | options)


def problems_of(cohort: Cohort, **options) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of(cohort, **options)
    return "\n".join(caught.value.problems)


# --- who is where --------------------------------------------------------------------------------------------------


def test_trap_2_no_patient_is_on_both_sides_in_any_of_many_random_cohorts():
    made = 0
    for trial in range(250):
        rng = np.random.default_rng(trial)
        cohort = random_cohort(rng)
        options: dict[str, Any] = {
            "folds": int(rng.integers(1, 6)),
            "repeats": int(rng.integers(1, 3)),
            "val_fraction": float(rng.choice([0.0, 0.2, 0.5])),
        }
        try:
            plan = plan_of(cohort, seeds=(0, 7), **options)
        except PlanError:
            assert not enough_patients(cohort, **options)
            continue
        made += 1
        assert two_roles_by_hand(plan, cohort) == set() == set(patients_with_two_roles(plan, cohort))
        assert_roles_are_complete(plan, cohort, **options)
    assert made > 80


def enough_patients(cohort: Cohort, folds: int, repeats: int, val_fraction: float) -> bool:
    """Whether every class has a patient for each fold, and two more where an inner split is asked for."""
    free = cohort.table[(cohort.table["split"] == "train") & cohort.table["label"].notna()]
    patients_C = [free["patient"][free["label"] == name].nunique() for name in cohort.classes]
    something_to_report = folds > 1 or val_fraction > 0 or "test" in set(cohort.table["split"])
    return min(patients_C) >= max(folds, 1) * (3 if val_fraction else 1) and something_to_report


def assert_roles_are_complete(plan: Plan, cohort: Cohort, folds: int, repeats: int, val_fraction: float) -> None:
    official_S, labelled_S = (cohort.table["split"] == "test").to_numpy(), cohort.labels_S >= 0
    assert len(plan) == folds * repeats * 2
    assert plan.uses("test")[:, official_S].all()
    assert plan.uses("unused")[:, ~official_S & ~labelled_S].all()
    free_S = ~official_S & labelled_S
    assert not plan.uses("unused")[:, free_S].any()
    assert plan.uses("val").any() == (val_fraction > 0)
    for _, rows in plan.members.groupby(["repeat", "seed"]):
        times_tested_S = plan.uses("test")[rows.index][:, free_S].sum(axis=0)
        assert (times_tested_S == (folds > 1)).all()
    for roles_S in plan.roles_MS:
        assert set(cohort.labels_S[roles_S == 0]) == set(cohort.labels_S[labelled_S])
        if folds > 1:
            assert len(set(cohort.labels_S[(roles_S == 2) & free_S])) > 1
        if val_fraction:
            assert set(cohort.labels_S[roles_S == 1]) == set(cohort.labels_S[free_S])


def test_trap_2_a_leak_is_found_and_refused():
    cohort = cohort_of([("a", "x"), ("a", "x"), ("b", "y"), ("b", "y"), ("c", "x")])
    members = plan_of(balanced(), folds=2).members
    plan = Plan(members, np.array([[0, 2, 1, 3, 2], [0, 0, 1, 2, 2]], dtype=np.int8))
    assert patients_with_two_roles(plan, cohort) == [(0, "a", ("train", "test")), (1, "b", ("val", "test"))]
    assert {(m, p) for m, p, _ in patients_with_two_roles(plan, cohort)} == two_roles_by_hand(plan, cohort)


def test_trap_2_a_patient_in_both_official_splits_is_named():
    cohort = cohort_of([*[(f"p{i}", "xy"[i % 2]) for i in range(10)], ("p3", "y", "test"), ("p4", "x", "test")])
    text = problems_of(cohort)
    assert "2 patients with slides in the official train and test split: 'p3', 'p4'" in text


# --- stratification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_patients", "positive"), [(23, 0.3), (40, 0.15), (269, 0.41)])
def test_trap_5_folds_are_as_stratified_as_scikit_learn_where_each_patient_has_one_slide(n_patients, positive):
    label_S = (np.arange(n_patients) < round(positive * n_patients)).astype(int)
    fold_S = deal_folds(np.arange(n_patients), label_S, 5, np.random.default_rng(0))
    ours = [np.bincount(label_S[fold_S == k], minlength=2) for k in range(5)]
    theirs = [np.bincount(label_S[test], minlength=2) for _, test in StratifiedKFold(5).split(label_S, label_S)]
    for c in range(2):
        assert sorted(n[c] for n in ours) == sorted(n[c] for n in theirs)
    assert sorted(n.sum() for n in ours) == sorted(n.sum() for n in theirs)


def test_trap_5_patients_of_each_class_differ_by_at_most_one_between_folds_whatever_their_slides():
    for trial in range(30):
        rng = np.random.default_rng(trial)
        slides_P = np.clip(rng.lognormal(0.5, 1.0, 47), 1, 30).astype(int)
        class_P = rng.choice(3, 47, p=[0.6, 0.25, 0.15])
        patient_S, label_S = np.repeat(np.arange(47), slides_P), np.repeat(class_P, slides_P)
        fold_S = deal_folds(patient_S, label_S, 4, rng)
        fold_P = np.array([np.unique(fold_S[patient_S == p]).item() for p in range(47)])  # one fold a patient
        table_KC = np.array([np.bincount(class_P[fold_P == k], minlength=3) for k in range(4)])
        assert np.ptp(table_KC, axis=0).max() <= 1
        assert np.ptp(table_KC.sum(axis=1)) <= 1


def spread_of_slides(fold_S: np.ndarray, label_S: np.ndarray, n_folds: int) -> float:
    counts_KC = np.array([np.bincount(label_S[fold_S == k], minlength=2) for k in range(n_folds)])
    return float((counts_KC.std(axis=0) / counts_KC.mean(axis=0)).mean())


def test_trap_5_slides_are_balanced_too_where_patients_have_many():
    ours, theirs, by_patient_alone = [], [], []
    for trial in range(5):
        rng = np.random.default_rng(trial)
        tumor_P = rng.binomial(5, 0.3, 100)  # like Camelyon17: five slides a patient, some of them with tumour
        patient_S = np.repeat(np.arange(100), 5)
        label_S = (np.tile(np.arange(5), 100) < np.repeat(tumor_P, 5)).astype(int)
        ours.append(spread_of_slides(deal_folds(patient_S, label_S, 5, rng), label_S, 5))
        by_patient_alone.append(spread_of_slides(rng.permutation(np.arange(100) % 5)[patient_S], label_S, 5))
        fold_S = np.empty(500, dtype=int)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=trial)
        for k, (_, test) in enumerate(splitter.split(label_S, label_S, patient_S)):
            fold_S[test] = k
        theirs.append(spread_of_slides(fold_S, label_S, 5))
    assert np.mean(ours) < 0.03 < np.mean(by_patient_alone)
    assert np.mean(ours) < np.mean(theirs)


def test_trap_5_slides_of_very_unequal_patients_are_balanced_and_patients_stay_exact():
    ranges: dict[str, list[int]] = {"ours": [], "theirs": []}
    for trial in range(6):
        rng = np.random.default_rng(trial)
        class_P = (np.arange(60) % 3 == 0).astype(int)
        patient_S = np.repeat(np.arange(60), rng.integers(1, 30, 60))
        label_S, theirs_S = class_P[patient_S], np.empty(len(patient_S), dtype=int)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=trial)
        for k, (_, test) in enumerate(splitter.split(label_S, label_S, patient_S)):
            theirs_S[test] = k
        ours_S = deal_folds(patient_S, label_S, 5, rng)
        for name, fold_S in (("ours", ours_S), ("theirs", theirs_S)):
            ranges[name].append(int(np.ptp(np.bincount(fold_S, minlength=5))))
        fold_P = np.array([np.unique(ours_S[patient_S == p]).item() for p in range(60)])
        assert [np.bincount(fold_P[class_P == c]).tolist() for c in (0, 1)] == [[8] * 5, [4] * 5]
    assert np.mean(ranges["ours"]) < 3.5
    assert np.mean(ranges["ours"]) < np.mean(ranges["theirs"])


@pytest.mark.parametrize("slides", [1, 3])
def test_folds_of_patients_with_equally_many_slides_are_the_first_draw(slides):
    """Nothing can be balanced there, so every study of one slide a patient keeps the folds that it always had."""
    label_P = (np.arange(37) % 3 == 0).astype(int)
    rng = np.random.default_rng([1, 5, 0])
    order_P = np.lexsort((rng.random(37), label_P))
    expected_P = np.empty(37, dtype=int)
    expected_P[order_P] = rng.permutation(5)[np.arange(37) % 5]
    patient_S = np.repeat(np.arange(37), slides)
    fold_S = deal_folds(patient_S, label_P[patient_S], 5, np.random.default_rng([1, 5, 0]))
    assert fold_S.tolist() == expected_P[patient_S].tolist()


def test_held_out_slides_are_their_fraction_also_where_patients_are_unequal():
    off = []
    for trial in range(8):
        rng = np.random.default_rng(trial)
        patient_S = np.repeat(np.arange(40), rng.integers(1, 30, 40))
        label_S = (np.arange(40) % 2)[patient_S]
        held_S = hold_out(patient_S, label_S, 0.25, rng)
        assert [np.unique(patient_S[held_S & (label_S == c)]).size for c in (0, 1)] == [5, 5]
        off.append(abs(held_S.mean() - 0.25))
    assert np.mean(off) < 0.01


def test_a_patient_with_several_labels_counts_as_its_rarest():
    """One tumour slide among five: by majority all patients would be alike and a fold could go without tumour."""
    rows = [(f"p{p}", "tumor" if p < 15 and i == 0 else "normal") for p in range(50) for i in range(5)]
    cohort = cohort_of(rows)
    for split_seed in range(10):
        plan = plan_of(cohort, folds=5, split_seed=split_seed)
        tumor_S = cohort.labels_S == 1
        assert plan.uses("test")[:, tumor_S].sum(axis=1).tolist() == [3] * 5


def test_hold_out_takes_the_fraction_of_each_class_by_patient():
    patient_S = np.repeat(np.arange(60), 3)
    label_S = np.repeat((np.arange(60) < 20).astype(int), 3)
    held_S = hold_out(patient_S, label_S, 0.2, np.random.default_rng(0))
    assert [np.unique(patient_S[held_S & (label_S == c)]).size for c in (0, 1)] == [8, 4]
    assert not set(patient_S[held_S]) & set(patient_S[~held_S])


def test_hold_out_leaves_one_patient_of_each_class_on_both_sides():
    patient_S, label_S = np.arange(4), np.array([0, 0, 1, 1])
    for fraction in (0.01, 0.5, 0.99):
        held_S = hold_out(patient_S, label_S, fraction, np.random.default_rng(0))
        assert sorted(label_S[held_S]) == [0, 1]


# --- chance --------------------------------------------------------------------------------------------------------


def test_trap_5_seed_0_is_a_seed():
    cohort = balanced()
    assert plan_of(cohort, split_seed=0, seeds=(0,)) == plan_of(cohort, split_seed=0, seeds=(0,))
    zero, one = plan_of(cohort, split_seed=0), plan_of(cohort, split_seed=1)
    assert not np.array_equal(zero.roles_MS, one.roles_MS)
    drawn = [plan_of(cohort, seeds=(seed,)).members["init_seed"].tolist() for seed in (0, 1)]
    assert not set(drawn[0]) & set(drawn[1])


def test_seeds_share_folds_and_repeats_do_not():
    plan = plan_of(balanced(), folds=5, repeats=3, seeds=(0, 4), val_fraction=0.2)
    assert plan.members["member"].tolist() == list(range(30))
    assert plan.members[["repeat", "fold", "seed"]].values.tolist() == [
        [r, f, s] for r in range(3) for f in range(5) for s in (0, 4)
    ]
    keys = map(tuple, plan.members[["repeat", "fold", "seed"]].values)
    of = dict(zip(keys, plan.roles_MS, strict=True))
    for repeat in range(3):
        for fold in range(5):
            np.testing.assert_array_equal(of[repeat, fold, 0], of[repeat, fold, 4])
    partitions = {frozenset(of[repeat, fold, 0].tobytes() for fold in range(5)) for repeat in range(3)}
    assert len(partitions) == 3


def test_repeats_differ_even_where_every_patient_has_another_number_of_slides():
    """A greedy deal from the largest patient on would give the same folds in every repeat."""
    cohort = cohort_of([(f"p{p}", "xy"[p % 2]) for p in range(20) for _ in range(p + 1)])
    plan = plan_of(cohort, folds=2, repeats=5)
    pairs = {frozenset(roles_S.tobytes() for roles_S in plan.uses("test")[[2 * r, 2 * r + 1]]) for r in range(5)}
    assert len(pairs) == 5


def test_init_seeds_are_distinct_and_do_not_depend_on_the_other_members():
    plan = plan_of(balanced(), repeats=4, seeds=range(10))
    assert plan.members["init_seed"].nunique() == len(plan) == 200
    assert plan.members["init_seed"].between(0, 2**63 - 1).all()
    alone = plan_of(balanced(), folds=3, repeats=2, seeds=(7,))
    chosen = alone.members.merge(plan.members, on=["repeat", "fold", "seed"])
    assert len(chosen) == 6
    assert (chosen["init_seed_x"] == chosen["init_seed_y"]).all()
    assert [init_seed(0, 0, 0), init_seed(7, 1, 2)] == [
        plan.members["init_seed"][0],
        plan.members.query("seed == 7 and repeat == 1 and fold == 2")["init_seed"].item(),
    ]


def test_folds_do_not_depend_on_the_order_of_the_rows():
    cohort = balanced(n_patients=19, slides=2)
    order = np.random.default_rng(3).permutation(len(cohort))
    shuffled = Cohort(cohort.table.iloc[order].reset_index(drop=True), cohort.classes)
    ours, theirs = (plan_of(c, val_fraction=0.25).roles_MS for c in (cohort, shuffled))
    np.testing.assert_array_equal(ours[:, order], theirs)


# --- plans ---------------------------------------------------------------------------------------------------------


def test_one_fold_trains_on_the_whole_train_split():
    cohort = balanced(n_patients=10, test=5)
    plan = plan_of(cohort, folds=1, repeats=2, seeds=(1, 2), lr=3e-4, weight_decay=0.1)
    assert len(plan) == 4
    assert (plan.uses("train") == (cohort.table["split"] == "train").to_numpy()).all()
    assert plan.uses("test").sum(axis=1).tolist() == [5] * 4
    assert plan.members["lr"].tolist() == [3e-4] * 4
    assert plan.members["weight_decay"].tolist() == [0.1] * 4


def test_unlabelled_slides_are_unused_except_in_the_test_split():
    rows = [(f"p{p}", "xy"[p % 2]) for p in range(12)]
    cohort = cohort_of([*rows, ("p0", None), ("q", None), ("t", None, "test"), ("t", "x", "test")])
    plan = plan_of(cohort, folds=3)
    assert [[ROLES[r] for r in roles_S[12:]] for roles_S in plan.roles_MS] == [["unused", "unused", "test", "test"]] * 3


def test_subset_keeps_the_members_numbers():
    plan = plan_of(balanced(), folds=5)
    part = plan.subset([3, 1])
    assert part.members["member"].tolist() == [3, 1]
    assert part.members.index.tolist() == [0, 1]
    np.testing.assert_array_equal(part.roles_MS, plan.roles_MS[[3, 1]])
    assert part != plan
    assert part == plan.subset(np.array([3, 1]))


def test_uses_refuses_what_is_no_role():
    with pytest.raises(ValueError, match="expected one of train, val, test, unused, got 'training'"):
        plan_of(balanced()).uses("training")


# --- refusals before training --------------------------------------------------------------------------------------


def test_too_few_patients_of_a_class_are_named_with_what_to_do():
    cohort = cohort_of([(f"p{p % 9}", "tumor" if p % 9 < 3 else "normal") for p in range(40)])
    text = problems_of(cohort, folds=5)
    assert "class 'tumor' has 3 patients outside the test split, but study.folds=5 needs 5" in text
    assert "study.folds=3 or fewer" in text
    assert "'normal'" not in text
    assert len(plan_of(cohort, folds=3)) == 3


@pytest.mark.parametrize(
    "rows", [[("a", "x"), ("b", "x")], [("a", None), ("b", None)], [("a", "x"), ("b", "y", "test")]]
)
def test_fewer_than_two_classes_to_train_with(rows):
    assert "at least two classes" in problems_of(cohort_of(rows), folds=2)


def test_trap_10_a_fold_with_one_class_is_refused_before_training():
    rows = [(f"p{p}", label) for p in range(6) for label in ("x" if p < 3 else "y")]
    folds = pd.DataFrame({"slide": [f"s{i}" for i in range(6)], "fold": [0, 0, 1, 1, 2, 2]})
    text = problems_of_csv(cohort_of(rows), folds)
    assert "repeat 0 fold 0: test has one class only (2 slides of 'x'), its AUC is undefined" in text
    assert "repeat 0 fold 2: test has one class only (2 slides of 'y')" in text
    assert "fold 1" not in text


def test_trap_10_a_class_that_no_training_slide_has_is_refused():
    folds = pd.DataFrame({"slide": [f"s{i}" for i in range(6)], "fold": [0, 0, 0, 1, 1, 1]})
    cohort = cohort_of([("a", "x"), ("b", "y"), ("c", "z"), ("d", "x"), ("e", "y"), ("f", "x")])
    assert "repeat 0 fold 0: no training slide of class 'z'" in problems_of_csv(cohort, folds)


def test_inner_split_needs_two_patients_of_each_class():
    cohort = balanced(n_patients=6)  # two tumour patients: one is test, one is left
    text = problems_of(cohort, folds=2, val_fraction=0.3)
    assert "repeat 0 fold 0: class 'tumor' has 1 patient to train with" in text
    assert "repeat 0 fold 1" in text
    assert len(plan_of(cohort, folds=2)) == 2


def test_one_fold_without_test_split_or_val_has_nothing_to_report():
    assert "nothing is left to report on" in problems_of(balanced(), folds=1)
    assert plan_of(balanced(), folds=1, val_fraction=0.2).uses("val").any()


def test_wrong_arguments_are_all_named():
    text = problems_of(balanced(), folds=0, repeats=0, seeds=(3, 3, -1), val_fraction=1.0)
    for part in ("study.folds=0", "study.repeats=0", "a seed occurs twice", "seed -1", "study.val_fraction=1"):
        assert part in text


def test_problems_of_cohort_come_together():
    rows = [("a", "x"), ("b", "x"), ("c", "y"), ("a", "x", "test")]
    text = problems_of(cohort_of(rows), folds=2)
    assert "'a'" in text
    assert "class 'y' has 1 patient" in text


# --- the user's own folds ------------------------------------------------------------------------------------------


def problems_of_csv(cohort: Cohort, table: pd.DataFrame, **options) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of_csv(cohort, table, **options)
    return "\n".join(caught.value.problems)


def plan_of_csv(cohort: Cohort, table: pd.DataFrame, **options) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folds.csv"
        table.to_csv(path, index=False)
        return plan_of(cohort, folds_csv=path, **options)


def eight() -> Cohort:
    """Four patients with two slides each, labels x y x y, and a test patient."""
    return cohort_of([*[(f"p{i // 2}", "xy"[i // 2 % 2]) for i in range(8)], ("t", "x", "test")])


def test_published_folds_are_used_as_they_are():
    table = pd.DataFrame(
        {
            "slide": [f"s{i}" for i in range(8)] * 2,
            "repeat": [1] * 8 + [0] * 8,
            "fold": [3, 3, 3, 3, 4, 4, 4, 4, 0, 0, 1, 1, 1, 1, 0, 0],
        }
    )
    plan = plan_of_csv(eight(), table, folds=77, seeds=(0, 1))
    assert plan.members[["repeat", "fold", "seed"]].values.tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [0, 1, 1],
        [1, 3, 0],
        [1, 3, 1],
        [1, 4, 0],
        [1, 4, 1],
    ]
    wanted = {(0, 0): "110000111", (0, 1): "001111001", (1, 3): "111100001", (1, 4): "000011111"}
    for (repeat, fold), bits in wanted.items():
        rows = plan.members.query(f"repeat == {repeat} and fold == {fold}").index
        for row in rows:
            assert "".join(str(int(b)) for b in plan.uses("test")[row]) == bits
    assert (plan.uses("test") | plan.uses("train")).all()


def test_blank_fold_is_right_for_test_slides_and_pandas_then_writes_floats():
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(9)], "fold": [0, 0, 0, 0, 1, 1, 1, 1, np.nan]})
    assert len(plan_of_csv(eight(), table)) == 2
    table.loc[0, "fold"] = np.nan
    assert "1 slide of the cohort not listed: 's0'" in problems_of_csv(eight(), table)


def test_full_roles_are_used_as_they_are():
    roles = {0: "train train train train val val test test test", 5: "val val test test train unused train train test"}
    rows = [(0, f, f"s{i}", role) for f, line in roles.items() for i, role in enumerate(line.split())]
    cohort = cohort_of([*[(f"p{i // 2}", "xy"[i % 2]) for i in range(8)], ("t", "x", "test")])
    plan = plan_of_csv(cohort, pd.DataFrame(rows, columns=["repeat", "fold", "slide", "role"]))
    assert plan.members["fold"].tolist() == [0, 5]
    assert [[ROLES[r] for r in roles_S] for roles_S in plan.roles_MS] == [line.split() for line in roles.values()]
    text = problems_of_csv(cohort, pd.DataFrame(rows, columns=["repeat", "fold", "slide", "role"]), val_fraction=0.2)
    assert "has role val already: expected study.val_fraction=0, got 0.2" in text


def test_all_that_is_wrong_with_given_folds_is_said_together():
    slides = ["s0", "s1", "s2", "s3", "s4", "s5", "s5", "nobody", "s8", "s6"]
    table = pd.DataFrame({"slide": slides, "fold": ["0", "1", "0", "0", "1", "1", "1", "1", "0", "two"]})
    text = problems_of_csv(eight(), table)
    for part in (
        "1 slide not in the cohort: 'nobody'",
        "listed more than once: 's5'",
        "2 slides of the cohort not listed: 's6', 's7'",
        "patient 'p0' is in train and test",
        "slides of the cohort's test split are test for every fold, the file cannot place them: 's8'",
        "row 11: fold 'two', expected a whole number from 0",
    ):
        assert part in text, part


def test_given_roles_that_are_wrong():
    roles = ["train", "trian", "test", "test", "train", "test", "val", "val", "train"]
    rows = [(0, f"s{i}", role) for i, role in enumerate(roles)]
    text = problems_of_csv(eight(), pd.DataFrame(rows, columns=["fold", "slide", "role"]))
    assert "row 3: role 'trian', expected one of train, val, test, unused" in text
    assert "patient 'p2' is in train and test" in text
    assert "the file cannot place them: 's8'" in text


def test_an_unlabelled_slide_cannot_be_given_a_training_role():
    cohort = cohort_of([("a", "x"), ("b", "y"), ("c", "x"), ("d", "y"), ("e", None)])
    rows = [(0, f"s{i}", role) for i, role in enumerate(["train", "train", "test", "test", "train"])]
    text = problems_of_csv(cohort, pd.DataFrame(rows, columns=["fold", "slide", "role"]))
    assert "unlabelled slides cannot be train or val: 's4'" in text


def test_slides_that_were_dropped_may_stay_in_the_file():
    table = pd.DataFrame({"slide": [*[f"s{i}" for i in range(8)], "gone"], "fold": [0, 0, 0, 0, 1, 1, 1, 1, 1]})
    assert len(plan_of_csv(eight(), table, dropped=["gone"])) == 2
    assert "'gone'" in problems_of_csv(eight(), table)


def test_columns_of_given_folds():
    table = pd.DataFrame({"slide": ["s0"], "folds": [0]})
    text = problems_of_csv(eight(), table)
    assert re.search(r"column 'folds' is not read; did you mean 'fold'\?", text)
    assert "no column 'fold'" in text
    assert "no usable fold" in problems_of_csv(eight(), pd.DataFrame({"slide": [], "fold": []}))
    with pytest.raises(PlanError, match="cannot be read"):
        plan_of(eight(), folds_csv=Path("no such file.csv"))


def test_given_folds_with_an_inner_split():
    cohort = balanced(n_patients=18)
    table = pd.DataFrame({"slide": cohort.table["slide"], "fold": np.arange(18) % 2})
    plan = plan_of_csv(cohort, table, val_fraction=0.3)
    assert (plan.uses("test")[0] == (np.arange(18) % 2 == 0)).all()
    for roles_S in plan.roles_MS:
        assert set(cohort.labels_S[roles_S == 1]) == {0, 1}


# --- files ---------------------------------------------------------------------------------------------------------


def test_saved_plan_reads_back_equal_in_any_row_order(tmp_path):
    cohort = balanced(n_patients=20, slides=2, test=3)
    plan = plan_of(cohort, repeats=2, seeds=(0, 2**32 - 1), val_fraction=0.25, lr=0.1 + 0.2, weight_decay=1 / 3)
    save_plan(plan, cohort, tmp_path)
    assert load_plan(tmp_path, cohort) == plan
    order = np.random.default_rng(0).permutation(len(cohort))
    shuffled = Cohort(cohort.table.iloc[order].reset_index(drop=True), cohort.classes)
    read = load_plan(tmp_path, shuffled)
    np.testing.assert_array_equal(read.roles_MS, plan.roles_MS[:, order])
    assert read.members.equals(plan.members)


def test_roles_csv_can_be_read_by_people(tmp_path):
    cohort = cohort_of([*[(f"p{i}", "01"[i % 2]) for i in range(6)], ("007", None), ("t", "1", "test")])
    save_plan(plan_of(cohort, folds=3).subset([1, 2]), cohort, tmp_path)
    lines = (tmp_path / "roles.csv").read_text().splitlines()
    assert lines[0] == "slide,patient,label,split,m1,m2"
    assert lines[7] == "s6,007,,train,unused,unused"
    assert lines[8] == "s7,t,1,test,test,test"
    assert load_plan(tmp_path, cohort) == plan_of(cohort, folds=3).subset([1, 2])


def test_a_saved_plan_is_refused_for_another_cohort(tmp_path):
    cohort = balanced(n_patients=12)
    save_plan(plan_of(cohort, folds=3), cohort, tmp_path)
    fewer = Cohort(cohort.table.iloc[1:].reset_index(drop=True), cohort.classes)
    with pytest.raises(PlanError, match="in the plan but not in the cohort: 's0'"):
        load_plan(tmp_path, fewer)
    for column, value in (("patient", "p001"), ("label", "normal"), ("split", "test")):
        changed = Cohort(cohort.table.assign(**{column: [value, *cohort.table[column][1:]]}), cohort.classes)
        with pytest.raises(PlanError, match=f"slide 's0': {column} was '.*' and is '{value}'"):
            load_plan(tmp_path, changed)


def test_trap_2_a_saved_plan_edited_into_a_leak_is_refused(tmp_path):
    cohort = balanced(n_patients=12, slides=2)
    save_plan(plan_of(cohort, folds=3), cohort, tmp_path)
    roles = pd.read_csv(tmp_path / "roles.csv")
    roles.loc[0, "m1"] = "val"
    roles.to_csv(tmp_path / "roles.csv", index=False)
    with pytest.raises(PlanError, match=r"member 1: patient 'p000' is in .*val"):
        load_plan(tmp_path, cohort)


def test_damaged_files_are_named(tmp_path):
    cohort = balanced(n_patients=12)
    save_plan(plan_of(cohort, folds=3), cohort, tmp_path)
    whole = (tmp_path / "plan.csv").read_text()
    for text in ("", whole.splitlines()[0] + "\n", whole.replace("0.001", "fast"), whole.replace("init_seed", "seeds")):
        (tmp_path / "plan.csv").write_text(text)
        with pytest.raises(PlanError, match=r"plan\.csv"):
            load_plan(tmp_path, cohort)
    (tmp_path / "plan.csv").write_text(whole)
    roles = (tmp_path / "roles.csv").read_text()
    (tmp_path / "roles.csv").write_text(roles.replace("unused", "train").replace(",test", ",tset"))
    with pytest.raises(PlanError, match="is 'tset', expected one of 'train', 'val', 'test', 'unused'"):
        load_plan(tmp_path, cohort)


# --- real cohorts --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data not there")
def test_lung_cohort_of_tcga_is_split_by_patient_and_subtype():
    raw = pd.read_csv(SHARED / "labels" / "lung_labels.csv", dtype=str)
    table = pd.DataFrame({"slide": raw["slide"], "patient": raw["patient"], "label": raw["subtype"]})
    cohort = check_cohort(table.assign(split="train", path=None, mpp=np.nan))
    plan = plan_of(cohort, folds=5, repeats=2, val_fraction=0.15)
    share_MC = np.array([np.bincount(cohort.labels_S[t], minlength=2) / t.sum() for t in plan.uses("test")])
    overall_C = np.bincount(cohort.labels_S) / len(cohort)
    assert np.abs(share_MC - overall_C).max() < 0.03
    assert np.abs(plan.uses("test").mean(axis=1) - 0.2).max() < 0.03
    assert patients_with_two_roles(plan, cohort) == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data not there")
def test_published_folds_of_musk1_are_given_back(tmp_path):
    data = np.load(SHARED / "mil" / "midatasets_musk1.npz")
    train_RKB, label_B = data["cv_train_mask"], data["y"]
    cohort = cohort_of([(f"bag{b}", str(label)) for b, label in enumerate(label_B)])
    fold_RB = np.argmin(train_RKB, axis=1)
    rows = [(f"s{b}", r, fold_RB[r, b]) for r in range(5) for b in range(len(label_B))]
    plan = plan_of_csv(cohort, pd.DataFrame(rows, columns=["slide", "repeat", "fold"]))
    np.testing.assert_array_equal(plan.uses("train"), train_RKB.reshape(50, -1))
    np.testing.assert_array_equal(plan.uses("test"), ~train_RKB.reshape(50, -1))
