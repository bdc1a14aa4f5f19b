"""The permutation test of a study: what changes places, that p holds on noise and is small where something is.

Axes: M members, S slides, N permutations.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kstest

from extract.cohort import check_cohort
from mil.pipeline.results import permutation_test
from mil.results.permutations import one_set
from mil.study.permutations import LEAST_STRATUM, permute, permuted_labels
from mil.study.plan import make_plan
from mil.train import main


def cohort_of(patients, labels, split="train"):
    n = len(patients)
    table = pd.DataFrame({"slide": [f"s{i:03d}" for i in range(n)], "patient": patients, "split": split})
    return check_cohort(table.assign(label=labels, path=None, mpp=np.nan), ["a", "b"])


@pytest.fixture(scope="module")
def varied():
    """Patients of 1, 2 (many) and 3 slides (few), two with slides of both labels, two without any, two splits."""
    sizes = [1] * 24 + [2] * 24 + [3] * 4
    patients = np.repeat([f"p{i:02d}" for i in range(52)], sizes)
    number = np.array([int(p[1:]) for p in patients])
    labels = np.where(number % 3 == 0, "b", "a").astype(object)
    for p in (30, 40):
        labels[np.flatnonzero(number == p)] = ["a", "b"]
    labels[(number == 5) | (number == 31)] = None
    return cohort_of(patients, labels, np.where(number % 4 == 3, "test", "train"))


def test_labels_change_places_as_patients_within_split_and_number_of_slides(varied):
    table, labels_S = varied.table, varied.labels_S
    slides_S = table.groupby("patient")["slide"].transform("size").to_numpy()
    changed = np.zeros(len(varied), dtype=int)
    for seed in range(40):
        permuted_S = permuted_labels(varied, np.random.default_rng(seed))
        changed += permuted_S != labels_S
        assert ((permuted_S < 0) == (labels_S < 0)).all(), "what has no label gets none"
        of_patient = pd.Series(permuted_S).groupby(table["patient"]).agg(lambda labels: tuple(sorted(labels)))
        assert set(of_patient[["p30", "p40"]]) == {(0, 1)}, "slides of both labels stay with such patients"
        assert of_patient.drop(["p30", "p40"]).map(lambda labels: len(set(labels))).eq(1).all()
        for split in ("train", "test"):
            for size in (1, 2):
                inside = (table["split"] == split) & (slides_S == size)
                n_patients = table[inside & (labels_S >= 0)]["patient"].nunique()
                if n_patients >= LEAST_STRATUM + 2:
                    assert Counter(permuted_S[inside]) == Counter(labels_S[inside]), (split, size)
    assert (changed[labels_S >= 0] > 0).all(), "every labelled slide has its turn"


def test_every_arrangement_is_as_likely():
    cohort = cohort_of(["p", "q", "r", "s"], ["a", "a", "b", "b"])
    seen = Counter(tuple(permuted_labels(cohort, np.random.default_rng(seed))) for seed in range(360))
    assert len(seen) == 6
    assert min(seen.values()) > 36


def test_permutations_have_stratified_folds_of_their_own_and_numbers_behind_the_study(varied):
    plan_of = partial(make_plan, folds=3, seeds=(0, 1), lr=0.1, weight_decay=0.0)
    found = permute(varied, plan_of, 5, 0, first=20)
    assert len(found.plan) == 30
    assert found.plan.members["member"].tolist() == list(range(20, 50))
    assert found.plan.members["init_seed"].tolist() == plan_of(varied).members["init_seed"].tolist() * 5
    again = permute(varied, plan_of, 2, 0, first=20)
    np.testing.assert_array_equal(
        again.labels_MS, found.labels_MS[:12], "more permutations leave the first as they are"
    )
    train_S = (varied.table["split"] == "train").to_numpy()
    for k in range(5):
        labels_S, test_MS = found.labels_MS[6 * k], found.plan.uses("test")[6 * k : 6 * k + 6]
        positive = [varied.table["patient"][test_S & train_S & (labels_S == 1)].nunique() for test_S in test_MS]
        assert max(positive) - min(positive) <= 2, positive
    fixed = plan_of(varied)
    kept = permute(varied, lambda cohort: fixed, 4, 0, first=6, fixed=fixed)
    for labels_S in kept.labels_MS:
        for test_S in fixed.uses("test"):
            of_patients = varied.table[test_S].assign(c=labels_S[test_S]).groupby("patient")["c"].max()
            before = varied.table[test_S].assign(c=varied.labels_S[test_S]).groupby("patient")["c"].max()
            assert Counter(of_patients) == Counter(before), "a fold of the user's own keeps its class mix"


def test_p_counts_those_at_least_as_good_and_the_undefined():
    found = one_set(0.7, [0.5, 0.7, 0.71, float("nan")])
    assert found["p_value"] == pytest.approx(4 / 5)
    assert found["undefined"] == 1
    assert found["null"] == [0.5, 0.7, 0.71, None]
    assert one_set(0.9, [0.5] * 19)["p_value"] == pytest.approx(1 / 20)
    assert one_set(float("nan"), [0.5])["p_value"] is None


def test_p_is_uniform_on_noise_and_small_where_something_is_planted(script):
    """A short form of benchmarks/permutations.py."""
    benchmark = script(Path(__file__).resolve().parents[2] / "benchmarks" / "permutations.py")
    found = [benchmark.one_study(seed, planted=0.0, permutations=9, epochs=1) for seed in range(12)]
    steps = np.random.default_rng(0).random(len(found)) / 10  # p values come in tenths
    assert kstest(np.array(found) - steps, "uniform").pvalue > 0.01, found
    assert benchmark.one_study(0, planted=3.0, permutations=19, epochs=1) == pytest.approx(1 / 20)


def test_a_study_with_permutations_is_the_study_and_resumes(
    write_study, witness_arrays, draw_only, tmp_path, capsys, monkeypatch
):
    arrays, labels_S = witness_arrays(36, seed=8, lengths=(3, 9), strength=5.0)
    data = write_study(tmp_path / "f", arrays, labels_S, split=["test" if i > 25 else "train" for i in range(36)])
    common = ["model.name=mean", "study.folds=2", "study.seeds=[0,1]", "study.val_fraction=0.3", "train.epochs=3"]
    common += ["train.select=best", "train.metric=loss", "train.accelerator=cpu", "report.bootstrap=0"]
    common += ["report.heatmaps=0", "report.baselines=false", "train.lr=0.1"]

    def run(out, *more):
        assert main([*data, *common, f"out={tmp_path / out}", *more]) == 0
        return json.loads((tmp_path / out / "metrics.json").read_text())

    with monkeypatch.context() as patched:
        draw_only(patched)
        plain = run("plain")
    tested = run("tested", "report.permutations=9")
    assert "permutation test: 9 x 4 members on permuted labels" in capsys.readouterr().out
    block = tested.pop("permutations")
    assert [fold["metrics"]["auc"] for fold in tested["folds"]] == [fold["metrics"]["auc"] for fold in plain["folds"]]
    assert block["members"] == 36
    for name, place in (("cross_validated", plain["pooled_out_of_fold"]), ("test", plain["test"]["ensemble"])):
        assert block["sets"][name]["observed"] == pytest.approx(place["metrics"]["auc"]["value"])
        assert len(block["sets"][name]["null"]) == 9
    for file in ("plan.csv", "history.csv", "predictions.csv"):
        pd.testing.assert_frame_equal(
            pd.read_csv(tmp_path / "tested" / file), pd.read_csv(tmp_path / "plain" / file), rtol=1e-5
        )
    ours, theirs = (load_file(tmp_path / out / "members.safetensors") for out in ("tested", "plain"))
    for key, stack in theirs.items():
        torch.testing.assert_close(ours[key], stack)
    assert (tmp_path / "tested" / "figures" / "permutations.png").exists()

    draw_only(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("mil.pipeline.study.permutation_test", stopped)
        again = ["report.permutations=9", "train.members_per_pass=7", f"out={tmp_path / 'again'}"]
        assert main([*data, *common, *again]) == 130
    monkeypatch.setattr("mil.pipeline.training.fit", stopped)
    resumed = run("again", *again, "resume=true")["permutations"]
    assert resumed["sets"]["test"]["null"] == pytest.approx(block["sets"]["test"]["null"])


def stopped(*arguments, **options):
    raise KeyboardInterrupt


def test_every_permutation_of_a_nested_study_chooses_anew(write_study, witness_arrays, tmp_path, capsys, monkeypatch):
    """Truth: with one permutation, what a nested study of the permuted cohort itself chooses and reaches."""
    arrays, labels_S = witness_arrays(24, seed=8, lengths=(3, 6), strength=5.0)
    data = write_study(tmp_path / "f", arrays, labels_S, split=["test" if i > 17 else "train" for i in range(24)])
    common = ["model.name=mean", "study.folds=2", "study.nested=2", "study.grid.lr=[0.1,0.01]", "train.epochs=3"]
    common += ["train.accelerator=cpu", "report.bootstrap=0", "report.heatmaps=0", "report.baselines=false"]
    seen = {}

    def run(out, arguments):
        assert main([*arguments, *common, f"out={tmp_path / out}"]) == 0
        return json.loads((tmp_path / out / "metrics.json").read_text())

    def told(study, trained, logits_MSC):
        seen.update(cohort=study.permuted.cohort(study.cohort, 1), plan=study.permuted.plan)
        return permutation_test(study, trained, logits_MSC)

    plain = run("plain", data)
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("mil.pipeline.study.permutation_test", told)
        tested = run("tested", [*data, "report.permutations=2"])
    assert "8 inner members" in capsys.readouterr().out
    block = tested.pop("permutations")
    assert block["members"] == 2 * 2 * (1 + 2 * 2)
    assert [fold["metrics"]["auc"] for fold in tested["folds"]] == [fold["metrics"]["auc"] for fold in plain["folds"]]
    for file in ("choices.csv", "inner/history.csv", "inner/plan.csv", "plan.csv", "predictions.csv"):
        pd.testing.assert_frame_equal(
            pd.read_csv(tmp_path / "tested" / file), pd.read_csv(tmp_path / "plain" / file), rtol=1e-5, atol=1e-5
        )
    path = tmp_path / "f" / "cohort.csv"
    label_of = dict(zip(seen["cohort"].table["slide"], seen["cohort"].table["label"], strict=True))
    permuted = pd.read_csv(path, dtype=str)
    permuted.assign(label=permuted["slide"].map(label_of)).to_csv(path, index=False)
    alone = run("alone", data)
    wanted = pd.read_csv(tmp_path / "alone" / "choices.csv").query("chosen")
    np.testing.assert_allclose(seen["plan"].members["lr"].to_numpy()[2:], wanted["lr"])
    for name, place in (("cross_validated", alone["pooled_out_of_fold"]), ("test", alone["test"]["ensemble"])):
        assert block["sets"][name]["null"][1] == pytest.approx(place["metrics"]["auc"]["value"])
