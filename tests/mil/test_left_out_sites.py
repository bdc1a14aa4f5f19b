"""Leave-one-site-out members: who trains, against a loop; and the same AUC as a study whose folds are the sites."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import mil.report.page
from extract.cohort import check_cohort
from mil.study.left_out_sites import left_out_plan
from mil.study.plan import make_plan
from mil.study.roles import ROLES, PlanError
from mil.train import main

N = 36
SITES = ("east", "north", "west")


def table_of(site_S, labels_S, patient_S=None, split=None) -> pd.DataFrame:
    slides = [f"slide_{i:02d}" for i in range(len(site_S))]
    patient_S = [f"p{i:02d}" for i in range(len(site_S))] if patient_S is None else patient_S
    names = pd.Series([["normal", "tumor"][c] if c >= 0 else None for c in labels_S], dtype=object)
    fixed = {"slide": slides, "patient": patient_S, "label": names, "split": split or ["train"] * len(slides)}
    return pd.DataFrame(fixed | {"path": None, "mpp": np.nan, "site": site_S})


def test_a_member_trains_on_all_other_sites_and_patients_keep_one_role():
    rng = np.random.default_rng(1)
    site_S = [["east", "north", "west", "", "tiny"][i % 5] for i in range(60)]
    site_S[4::5] = ["tiny"] * 2 + [""] * 10  # a site of two patients
    labels_S = rng.integers(0, 2, 60)
    labels_S[7] = -1
    patient_S = [f"p{i:02d}" for i in range(60)]
    patient_S[1] = patient_S[0]  # north, with slides in the east
    split = ["test" if i >= 50 else "train" for i in range(60)]
    cohort = check_cohort(table_of(site_S, labels_S, patient_S, split))
    plan = make_plan(cohort, folds=2, repeats=2, seeds=(0, 4), lr=0.1, weight_decay=0.0)
    found = left_out_plan(plan, cohort, first=len(plan), val_fraction=0.0, split_seed=0, site_preserving=False)
    assert found.site_M == ("east", "east", "north", "north", "west", "west")
    assert list(found.not_left_out) == ["tiny"]
    assert found.plan.members["member"].tolist() == list(range(8, 14))
    assert set(found.plan.members["repeat"]) == {2}
    assert not set(found.plan.members["init_seed"]) & set(plan.members["init_seed"])
    for site, roles_S in zip(found.site_M, found.plan.roles_MS, strict=True):
        inside = {p for p, s, part in zip(patient_S, site_S, split, strict=True) if s == site and part == "train"}
        for i, role in enumerate(np.array(ROLES)[roles_S]):
            usable = labels_S[i] >= 0 and split[i] == "train"
            at_home = "test" if site_S[i] == site else "unused" if patient_S[i] in inside else "train"
            assert role == (at_home if usable else "unused"), (site, i)


@pytest.mark.parametrize(("sites", "said"), [([""] * 40, "names no sites"), (["a"] * 39 + ["b"], "fewer than 5")])
def test_where_it_is_impossible_it_says_why(sites, said):
    cohort = check_cohort(table_of(sites, np.arange(40) % 2))
    plan = make_plan(cohort, folds=2, lr=0.1, weight_decay=0.0)
    with pytest.raises(PlanError, match=said):
        left_out_plan(plan, cohort, first=2, val_fraction=0.0, split_seed=0, site_preserving=False)


def test_the_report_says_what_a_study_on_those_folds_says(
    write_study, witness_arrays, draw_only, tmp_path, monkeypatch
):
    monkeypatch.setattr(mil.report.page, "FIGURES", {})
    arrays, labels_S = witness_arrays(N, seed=3, strength=2.5)
    data = write_study(tmp_path / "f", arrays, np.array(["normal", "tumor"])[labels_S])
    csv = next(argument.removeprefix("cohort=") for argument in data if argument.startswith("cohort="))
    site_S = np.array([SITES[i % 3] for i in range(N)])
    pd.read_csv(csv, dtype=str).assign(site=site_S).to_csv(csv, index=False)
    common = [*data, "model.name=mean", "train.epochs=2", "train.lr=0.05", "report.heatmaps=0", "report.bootstrap=20"]
    common += ["report.baselines=false", "train.accelerator=cpu"]
    assert main([*common, "study.folds=2", "study.leave_one_site_out=true", f"out={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    block = metrics["left_out_sites"]
    assert metrics["members"] == 2
    assert block["members"] == 3
    assert [one["site"] for one in block["sites"]] == list(SITES)
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<section id="left_out_sites">' in page
    # the same members as a study of its own: that repeat, these folds
    slides = pd.read_csv(csv, dtype=str)["slide"]
    rows = [(slide, 1, SITES.index(site)) for slide, site in zip(slides, site_S, strict=True)]
    pd.DataFrame(rows, columns=["slide", "repeat", "fold"]).to_csv(tmp_path / "folds.csv", index=False)
    draw_only(monkeypatch)
    assert main([*common, f"study.folds_csv={tmp_path / 'folds.csv'}", f"out={tmp_path / 'alone'}"]) == 0
    alone = pd.read_csv(tmp_path / "alone" / "predictions.csv").query("role == 'test'").set_index("slide")
    own = pd.read_csv(tmp_path / "run" / "predictions.csv").query("role == 'test'").set_index("slide")
    for one, site in zip(block["sites"], SITES, strict=True):
        here = slides[site_S == site]
        for key, table in (("left_out", alone), ("chosen_folds", own)):
            truth = roc_auc_score(table.loc[here, "label"] == "tumor", table.loc[here, "p_1"])
            assert one[key]["value"] == pytest.approx(truth), (site, key)
            assert one[key]["low"] < truth < one[key]["high"] or truth in (0, 1)
    assert block["difference"]["difference"] == pytest.approx(
        block["all"]["left_out"]["value"] - block["all"]["chosen_folds"]["value"]
    )
