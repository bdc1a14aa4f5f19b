"""Traps that other tools fell into, those of ANCHORS.md that touch training. Where each one's tests are:

 1  Selection on the reported fold                           test_module, and here end to end
 2  A patient on both sides of a split                       test_study, test_checks, test_train
 3  Slides without features dropped in silence               test_checks, test_train
 4  Evaluation in train mode                                 test_module
 5  Best epoch one short, `stratified` ignored, no seed 0    test_module, test_study, test_bags
 6  Zero padding attended to                                 test_bags, and here for every aggregator
 7  Top-k crashes on bags smaller than k                     test_aggregators
 8  `drop_last` starves small cohorts                        test_bags, and here end to end
 9  The same tiles sampled every epoch                       test_bags
10  A one-class fold scored as AUC 1                         test_metrics, test_report, test_study
11  Only metrics saved                                       here
16  YAML reads 1e-3 as text                                  extract/test_config, and here end to end
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators.batch import pack
from mil.training.members import load_members

TESTS = Path(__file__).resolve().parents[1]


def named_tests() -> dict[int, set[str]]:
    """Trap number -> the test files that have a test named after it."""
    found: dict[int, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            number = re.match(r"test_trap_(\d+)_", node.name) if isinstance(node, ast.FunctionDef) else None
            if number:
                found.setdefault(int(number[1]), set()).add(path.stem)
    return found


def test_every_trap_is_tested_where_the_table_above_says():
    said = {}
    for line in (__doc__ or "").splitlines():
        if entry := re.match(r" ?(\d+)  .*?  (\S.*)$", line):
            names = set(re.findall(r"test_\w+", entry[2]))
            said[int(entry[1])] = names | ({"test_traps"} if "here" in entry[2] else set())
    assert sorted(said) == [*range(1, 12), 16]
    found = named_tests()
    assert said == {number: found.get(number, set()) for number in said}


# --- one study, its reported slides relabelled ----------------------------------------------------------------------


def test_trap_1_relabelling_the_reported_slides_changes_no_prediction(studies, run_study, write_study, tmp_path):
    """The official test slides get the other label: members, best epochs and probabilities stay, the AUC turns."""
    study = studies("chowder")
    turned_S = np.where(np.array(study.split) == "test", 1 - study.labels_S, study.labels_S)
    labels = np.array(["normal", "tumor"])[turned_S]
    arrays = [tiles_TD.numpy() for tiles_TD in study.tiles]
    data = write_study(tmp_path / "features", arrays, labels, dtype="float16", split=study.split)
    run_study([*data, *study.arguments[2:], f"out={tmp_path / 'run'}"])
    for name in ("plan.csv", "history.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (study.folder / name).read_bytes()
    before, after = (pd.read_csv(folder / "predictions.csv") for folder in (study.folder, tmp_path / "run"))
    assert before.drop(columns="label").equals(after.drop(columns="label"))
    aucs = []
    for folder in (study.folder, tmp_path / "run"):
        metrics = json.loads((folder / "metrics.json").read_text())
        aucs.append(metrics["test"]["ensemble"]["metrics"]["auc"]["value"])
    assert aucs[0] == pytest.approx(1 - aucs[1])


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATORS)
def test_trap_6_a_bag_is_not_changed_by_the_length_of_its_neighbours(name):
    """With padding, a short bag beside a long one would hold hundreds of zero tiles. All features are far from 0."""
    rng = np.random.default_rng(0)
    short, long = (torch.from_numpy(rng.normal(20, 1, (n, 6)).astype(np.float32)) for n in (3, 400))
    aggregator = aggregator_class(name)(6, 1, [0, 1])
    beside = aggregator(pack([short, long], 2)).logits_MBC[:, 0]
    alone = aggregator(pack([short], 2)).logits_MBC[:, 0]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


# --- small cohorts --------------------------------------------------------------------------------------------------


def test_trap_8_a_cohort_smaller_than_a_batch_is_trained(studies, run_study, tmp_path):
    study = studies("mean")
    run_study([*study.arguments, "train.batch_size=1000", "train.select=last", f"out={tmp_path / 'run'}"])
    history = pd.read_csv(tmp_path / "run" / "history.csv").pivot_table(
        index="epoch", columns="member", values="train_loss"
    )
    assert (history.diff().dropna() < 0).all(axis=None), "one full batch an epoch: the loss falls every time"


# --- what is left behind --------------------------------------------------------------------------------------------


def test_trap_11_predictions_and_members_are_saved_not_only_metrics(studies):
    """Everything in metrics.json can be computed again from the run folder, and every logit from its members."""
    study = studies("abmil")
    table = pd.read_csv(study.folder / "predictions.csv")
    plan = pd.read_csv(study.folder / "plan.csv")
    assert len(table) == len(plan) * len(study.slides) == 6 * 30
    assert set(table["role"]) == {"train", "val", "test"}
    aggregator, description = load_members(study.folder)
    assert len(description.seeds) == aggregator.n_members == 6
    saved = json.loads((study.folder / "metrics.json").read_text())["test"]["ensemble"]["metrics"]["auc"]["value"]
    official = table[table["split"] == "test"]
    ensemble = official.groupby("slide").agg(logit=("logit_0", "mean"), label=("label", "first"))
    assert saved == pytest.approx(roc_auc_score(ensemble["label"] == "tumor", ensemble["logit"]))


# --- numbers --------------------------------------------------------------------------------------------------------


def test_trap_16_an_exponent_without_a_point_reaches_the_optimiser_as_a_number(studies, run_study, tmp_path):
    study = studies("mean")
    (tmp_path / "own.yaml").write_text("train:\n  lr: 1e-3\n  weight_decay: 2E-5\n")
    own = [argument for argument in study.arguments if not argument.startswith("train.lr=")]
    run_study([f"config={tmp_path / 'own.yaml'}", *own, f"out={tmp_path / 'file'}"])
    run_study([*own, "train.lr=1e-3", "train.weight_decay=2E-5", f"out={tmp_path / 'line'}"])
    for name in ("file", "line"):
        plan = pd.read_csv(tmp_path / name / "plan.csv")
        assert set(plan["lr"]) == {0.001}
        assert set(plan["weight_decay"]) == {2e-5}
    logits = [pd.read_csv(tmp_path / name / "predictions.csv")["logit_0"] for name in ("file", "line")]
    assert logits[0].equals(logits[1])
