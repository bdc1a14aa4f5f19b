"""Site-preserving folds against brute force: nobody on two sides, balance no worse than the best that exists."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from extract.cohort import Cohort, check_cohort, read_cohort
from extract.config import Columns
from mil.study.nested import grid_cells, inner_plan
from mil.study.plan import make_plan
from mil.study.problems import notes_on_sites
from mil.study.roles import ROLES, Plan, PlanError, patients_with_two_roles, sites_with_two_roles
from mil.study.saved import load_plan, save_plan
from mil.study.sites import blocks, deal_sites

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


def cohort_of(rows: list[tuple], classes: tuple[str, ...] | None = None) -> Cohort:
    """Rows of (patient, site, label[, split]); slides are named s0, s1, ..."""
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(len(rows))], "patient": [row[0] for row in rows]})
    table["label"] = pd.Series([row[2] for row in rows], dtype=object)
    table["split"] = [row[3] if len(row) > 3 else "train" for row in rows]
    table["path"], table["mpp"] = pd.Series([None] * len(rows), dtype=object), np.nan
    table["site"] = [row[1] for row in rows]
    return check_cohort(table, classes)


def plan_of(cohort: Cohort, **options) -> Plan:
    return make_plan(cohort, **{"lr": 1e-3, "weight_decay": 0.0, "site_preserving": True} | options)


def problems_of(cohort: Cohort, **options) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of(cohort, **options)
    return "\n".join(caught.value.problems)


def names_on_two_sides(plan: Plan, cohort: Cohort, column: str) -> set[tuple[int, str]]:
    """The readable way: for every member, the names of each pair of different roles that occur in both."""
    found = set()
    for m, roles_S in enumerate(plan.roles_MS):
        of_role = {role: set() for role in ("train", "val", "test")}
        for name, role in zip(cohort.table[column], roles_S, strict=True):
            if ROLES[role] != "unused":
                of_role[ROLES[role]].add(name)
        for one, other in itertools.combinations(of_role.values(), 2):
            found |= {(m, name) for name in one & other}
    return found


def cost_by_hand(patient_S, site_S, label_S, side_S, shares_K) -> tuple[int, float]:
    """(classes missing on a side, sum of squared deviations of every class's patients from their share)."""
    missing, total = 0, 0.0
    for c in sorted(set(label_S)):
        n_all = len(set(patient_S[label_S == c]))
        for k, wanted in enumerate(shares_K):
            n = len(set(patient_S[(label_S == c) & (side_S == k)]))
            missing += n == 0
            total += (n / n_all - wanted) ** 2
    return missing, total


@pytest.mark.parametrize("seed", range(40))
def test_no_division_of_the_sites_is_better(seed):
    """Every assignment of a few sites to the sides is tried."""
    rng = np.random.default_rng(seed)
    n_sites, n_classes, n_slides = int(rng.integers(2, 8)), int(rng.integers(2, 4)), int(rng.integers(8, 50))
    patient_S, label_S = np.arange(n_slides), rng.integers(0, n_classes, n_slides)
    site_S = rng.integers(0, n_sites, n_slides)
    shares_K = np.full(3, 1 / 3) if seed % 2 else np.array([0.25, 0.75])
    side_S = deal_sites(patient_S, site_S, label_S, shares_K, rng)
    assert all(len(set(side_S[site_S == site])) == 1 for site in set(site_S))
    sites = sorted(set(site_S))
    best = min(
        cost_by_hand(patient_S, site_S, label_S, np.array([sides[sites.index(s)] for s in site_S]), shares_K)
        for sides in itertools.product(range(len(shares_K)), repeat=len(sites))
    )
    missing, imbalance = cost_by_hand(patient_S, site_S, label_S, side_S, shares_K)
    assert missing == best[0]
    assert imbalance == pytest.approx(best[1], abs=1e-9)


def test_a_patient_with_slides_of_two_sites_joins_them():
    patient_S = np.array(["a", "a", "b", "b", "c", "d"])
    site_S = np.array(["X", "Y", "Y", "Z", "W", "V"])
    assert blocks(patient_S, site_S).tolist() == [2, 2, 2, 2, 1, 0]
    assert blocks(patient_S[::-1], site_S[::-1]).tolist() == [0, 1, 2, 2, 2, 2], "whatever the order"


def random_cohort(rng: np.random.Generator) -> Cohort:
    """Sites of very different size, several slides a patient, some patients at two sites, an official test split."""
    n_sites = int(rng.integers(3, 15))
    weights = rng.dirichlet(np.full(n_sites, 0.8))
    official = set(rng.choice(n_sites, 1)) if rng.random() < 0.3 else set()
    rows = []
    for p in range(int(rng.integers(12, 60))):
        site, label = rng.choice(n_sites, p=weights), rng.integers(0, 3)
        other = rng.choice(n_sites) if rng.random() < 0.03 and not official else site
        for i in range(int(rng.integers(1, 4))):
            text = None if rng.random() < 0.05 else "abc"[label]
            rows.append((f"p{p}", f"site{other if i else site}", text, "test" if site in official else "train"))
    return cohort_of([rows[i] for i in rng.permutation(len(rows))])


def test_no_site_and_no_patient_is_on_two_sides_in_any_of_many_random_cohorts():
    made = 0
    for trial in range(50):
        rng = np.random.default_rng(trial)
        cohort = random_cohort(rng)
        options = {"folds": int(rng.integers(2, 4)), "repeats": 2, "val_fraction": float(rng.choice([0.0, 0.3]))}
        try:
            plan = plan_of(cohort, **options)
        except PlanError:
            continue
        made += 1
        assert names_on_two_sides(plan, cohort, "site") == set() == set(sites_with_two_roles(plan, cohort))
        assert names_on_two_sides(plan, cohort, "patient") == set() == set(patients_with_two_roles(plan, cohort))
        free_S = (cohort.labels_S >= 0) & (cohort.table["split"] == "train").to_numpy()
        for _, rows in plan.members.groupby("repeat"):
            assert (plan.uses("test")[rows.index][:, free_S].sum(axis=0) == 1).all(), "every slide is tested once"
        for roles_S in plan.roles_MS:
            assert set(cohort.labels_S[(roles_S == 2) & free_S]) == set(cohort.labels_S[free_S])
            if options["val_fraction"]:
                assert set(cohort.labels_S[roles_S == 1]) == set(cohort.labels_S[free_S])
    assert made > 15


def test_folds_without_the_option_do_mix_sites():
    """The check above would find something."""
    cohort = random_cohort(np.random.default_rng(1))
    plan = make_plan(cohort, folds=2, lr=1e-3, weight_decay=0.0)
    by_hand = names_on_two_sides(plan, cohort, "site")
    assert by_hand
    assert by_hand == {(member, site) for member, site, _ in sites_with_two_roles(plan, cohort)}


def test_folds_do_not_depend_on_the_order_of_the_rows():
    cohort = random_cohort(np.random.default_rng(5))
    plan = plan_of(cohort, folds=2, val_fraction=0.3)
    order = np.random.default_rng(0).permutation(len(cohort))
    shuffled = Cohort(cohort.table.iloc[order].reset_index(drop=True), cohort.classes)
    np.testing.assert_array_equal(plan_of(shuffled, folds=2, val_fraction=0.3).roles_MS, plan.roles_MS[:, order])


# --- when it is impossible ------------------------------------------------------------------------------------------


def test_a_class_from_too_few_sites_is_named_with_what_to_do():
    rows = [(f"a{i}", f"A{i % 4}", "x") for i in range(20)] + [(f"b{i}", f"B{i % 2}", "y") for i in range(20)]
    text = problems_of(cohort_of(rows), folds=4)
    assert "study.site_preserving=true is impossible: class 'y' comes from 2 sites" in text
    assert "use study.folds=2 or fewer" in text
    assert plan_of(cohort_of(rows), folds=2)


def test_a_division_that_no_count_forbids_and_that_still_does_not_exist():
    """Three sites with two of three classes each: whichever way they are halved, one side lacks a class."""
    pairs = {"X": "ab", "Y": "bc", "Z": "ac"}
    rows = [(f"{site}{i}", site, classes[i % 2]) for site, classes in pairs.items() for i in range(6)]
    text = problems_of(cohort_of(rows), folds=2)
    assert "no division of the sites was found" in text
    assert re.search(r"repeat 0 fold [01]: no slide of class '[abc]'", text)


def test_sites_that_share_a_patient_count_as_one():
    rows = [(f"p{i}", f"S{i % 3}", "xy"[i // 3 % 2]) for i in range(18)] + [("p0", "S1", "x"), ("p1", "S2", "y")]
    assert "(sites that share a patient count as one)" in problems_of(cohort_of(rows), folds=2)


def test_a_cohort_without_sites_and_slides_without_one():
    cohort = cohort_of([(f"p{i}", "", "xy"[i % 2]) for i in range(12)])
    assert "12 slides without a site: 's0'" in problems_of(cohort, folds=2)
    bare = Cohort(cohort.table.drop(columns="site"), cohort.classes)
    text = problems_of(bare, folds=2)
    assert "columns.site" in text
    assert "columns.site=tcga" in text


def test_a_site_in_both_official_splits():
    rows = [(f"p{i}", f"S{i % 5}", "xy"[i % 2], "test" if i > 20 else "train") for i in range(30)]
    assert "5 sites with slides in the official train and test split: 'S0'" in problems_of(cohort_of(rows), folds=2)


def test_too_few_sites_for_an_inner_split():
    rows = [(f"p{i}", f"S{i % 2}", "xy"[i // 2 % 2]) for i in range(24)]
    assert "has 1 site to train with, too few for both sides" in problems_of(cohort_of(rows), folds=2, val_fraction=0.2)


def test_own_folds_must_preserve_sites_too(tmp_path):
    cohort = cohort_of([(f"p{i}", f"S{i // 6}", "xy"[i % 2]) for i in range(24)])
    good = pd.DataFrame({"slide": cohort.table["slide"], "fold": np.arange(24) // 12})
    good.to_csv(tmp_path / "good.csv", index=False)
    assert names_on_two_sides(plan_of(cohort, folds_csv=tmp_path / "good.csv"), cohort, "site") == set()
    good.assign(fold=np.arange(24) // 3 % 2).to_csv(tmp_path / "bad.csv", index=False)
    assert "member 0: site 'S0' is in train and test" in problems_of(cohort, folds_csv=tmp_path / "bad.csv")


# --- what is told and kept ------------------------------------------------------------------------------------------


def test_notes_on_sites():
    mixed = cohort_of([(f"p{i}", f"S{i % 3}", "xy"[i // 3 % 2]) for i in range(12)])
    (note,) = notes_on_sites(mixed, site_preserving=False)
    assert "3 sites, and folds mix them" in note
    (note,) = notes_on_sites(mixed, site_preserving=True)
    assert "each of the 3 sites is on one side" in note
    confounded = cohort_of([(f"p{i}", f"S{i % 4}", "xy"[i % 2]) for i in range(12)])
    assert "every site has slides of one class only" in notes_on_sites(confounded, site_preserving=True)[1]
    unsaid = Cohort(mixed.table.assign(site=["S0", "", "NA"] * 4), mixed.classes)
    assert notes_on_sites(unsaid, site_preserving=False) == [], "a site that is not said is none"
    bare = Cohort(mixed.table.drop(columns="site"), mixed.classes)
    assert notes_on_sites(bare, site_preserving=False) == []


def test_roles_csv_shows_the_sites(tmp_path):
    cohort = random_cohort(np.random.default_rng(5))
    plan = plan_of(cohort, folds=2)
    save_plan(plan, cohort, tmp_path)
    roles = pd.read_csv(tmp_path / "roles.csv", dtype=str)
    assert roles["site"].tolist() == cohort.table["site"].tolist()
    assert load_plan(tmp_path, cohort) == plan


# --- TCGA lung ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lung() -> Path:
    path = SHARED / "labels" / "lung_labels.csv"
    return path if path.exists() else pytest.skip("real data not there")


def assert_patients_and_sites_are_apart(plan: Plan, cohort: Cohort) -> None:
    assert names_on_two_sides(plan, cohort, "site") == set()
    assert names_on_two_sides(plan, cohort, "patient") == set()
    share_MC = np.array([np.bincount(cohort.labels_S[test_S], minlength=2) for test_S in plan.uses("test")])
    assert np.abs(share_MC / np.bincount(cohort.labels_S) - 0.2).max() < 0.01, "whole hospitals, and still balanced"
    for fold, roles_S in enumerate(plan.roles_MS):
        assert 0.1 < (roles_S == 1).sum() / np.isin(roles_S, [0, 1]).sum() < 0.2, fold


def test_tcga_lung_by_hospital(lung):
    """The table's own `site`: TCGA's codes put together by hospital."""
    cohort = read_cohort(lung, Columns(label="subtype"))
    assert (len(cohort), cohort.table["site"].nunique()) == (941, 39)
    assert_patients_and_sites_are_apart(plan_of(cohort, folds=5, repeats=2, val_fraction=0.15), cohort)


def test_tcga_lung_by_barcode(lung):
    """Patient and site from the slide's name: the same patients, and codes that are finer than hospitals."""
    cohort = read_cohort(lung, Columns(label="subtype", patient="tcga", site="tcga"))
    raw = pd.read_csv(lung, dtype=str)
    assert cohort.table["patient"].tolist() == raw["patient"].tolist()
    assert cohort.table["site"].tolist() == [slide.split("-")[1] for slide in raw["slide"]]
    assert_patients_and_sites_are_apart(plan_of(cohort, folds=5, val_fraction=0.15), cohort)
    assert raw.groupby(cohort.table["site"])["site"].nunique().max() == 1
    assert "one hospital has one code for its LUAD" in notes_on_sites(cohort, site_preserving=True)[1]
    hospitals = names_on_two_sides(
        plan_of(cohort, folds=5), Cohort(cohort.table.assign(site=raw["site"]), cohort.classes), "site"
    )
    assert hospitals, "what the note warns of"


def test_a_lung_cohort_of_20_slides_cannot_have_as_many_folds_as_one_likes(lung):
    cohort = read_cohort(lung.with_name("lung_labels_mini.csv"), Columns(label="subtype"))
    plan = plan_of(cohort, folds=3)
    assert names_on_two_sides(plan, cohort, "site") == set()
    assert "is impossible: class" in problems_of(cohort, folds=11)


def test_inner_folds_preserve_sites_too():
    """Nested cross-validation of eight hospitals of unequal size: none is on two sides of an inner member."""
    rng = np.random.default_rng(5)
    rows = [(f"p{p}", f"h{p % 8}", "ab"[rng.integers(2)]) for p in range(72) for _ in range(rng.integers(1, 3))]
    cohort = cohort_of(rows)
    outer = plan_of(cohort, folds=4)
    cells = grid_cells([1e-3, 1e-4], [0.0])
    inner = inner_plan(outer, cohort, 2, cells, 0, site_preserving=True)
    assert len(inner) == 4 * 2 * 2
    assert not names_on_two_sides(inner, cohort, "site")
    assert not names_on_two_sides(inner, cohort, "patient")
    by_patient = inner_plan(outer, cohort, 2, cells, 0)
    assert names_on_two_sides(by_patient, cohort, "site"), "what the option is there to prevent"
