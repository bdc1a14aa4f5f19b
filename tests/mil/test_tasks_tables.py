"""Survival on tables that everybody has: one tile of a slide carries a covariate; its own Cox model is the measure."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from extract.cohort import Cohort
from mil.aggregators import aggregator_class
from mil.config import Task as TaskConfig
from mil.config import Train
from mil.study.plan import make_plan
from mil.study.roles import Plan
from mil.tasks.contract import Task
from mil.tasks.survival import harrell_within
from mil.tasks.table import task_of
from mil.training.bags import Bags
from mil.training.module import Members, fit, predict_logits
from mil.training.objectives import module_of

LABELS = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data" / "labels"


def table_of(name: str) -> pd.DataFrame:
    """time, event, and one covariate with its direction left as it is."""
    datasets = pytest.importorskip("sksurv.datasets")
    load, covariate, event, time = {
        "gbsg2": (datasets.load_gbsg2, "pnodes", "cens", "time"),
        "veterans": (datasets.load_veterans_lung_cancer, "Karnofsky_score", "Status", "Survival_in_days"),
        "whas500": (datasets.load_whas500, "age", "fstat", "lenfol"),
    }[name]
    covariates, truth = load()
    number = covariates[covariate].to_numpy(dtype=float)
    number = np.log(number) if name == "gbsg2" else number
    z = (number - number.mean()) / number.std()
    return pd.DataFrame({"time": truth[time], "event": truth[event].astype(float), "z": z})


def cohort_of(table: pd.DataFrame) -> Cohort:
    names = [f"s{i:03d}" for i in range(len(table))]
    label = np.where(table["event"] == 1, "event", "censored")
    rest = {"slide": names, "patient": names, "label": label, "split": "train", "path": None, "mpp": np.nan}
    return Cohort(table[["time", "event"]].assign(**rest), ("censored", "event"), target="survival")


def trained_out_of_fold(task: Task, cohort: Cohort, bags: Bags, epochs: int) -> tuple[np.ndarray, Plan]:
    """logits_MSC of three folds' members."""
    plan = make_plan(task.strata(cohort, 3), folds=3, lr=0.1, weight_decay=0)
    train_MS = plan.uses("train")
    aggregator = aggregator_class("max")(3, task.n_outputs(), [0, 1, 2])
    if task.name == "ordinal":
        aggregator.add_cuts(len(cohort.classes) - 1)
    members = Members(np.full(3, 0.1), np.zeros(3), train_MS, np.zeros_like(train_MS))
    settings = Train(epochs=epochs, batch_size=32, standardize=True, accelerator="cpu")
    module = module_of(task)(aggregator, bags, cohort, task, members, settings, task.facts(cohort, train_MS))
    fit(module, progress=False)
    return predict_logits(module, list(range(len(bags)))), plan


@pytest.mark.parametrize(
    ("name", "loss"), [("gbsg2", "cox"), ("veterans", "cox"), ("whas500", "cox"), ("veterans", "discrete")]
)
def test_held_out_c_index_is_near_that_of_the_covariates_own_cox_model(name, loss, bags_of):
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv

    table, rng = table_of(name), np.random.default_rng(5)
    arrays = []
    for z in table["z"]:
        bag_TD = rng.normal(size=(rng.integers(2, 6), 3)).astype(np.float32)
        bag_TD[rng.integers(len(bag_TD)), 1] = 14 + 2 * z
        arrays.append(bag_TD)
    cohort, bags = cohort_of(table), bags_of(arrays)
    task = task_of(TaskConfig(name="survival", loss=loss)).for_cohort(cohort)
    logits_MSC, plan = trained_out_of_fold(task, cohort, bags, epochs=5 if len(table) > 200 else 20)
    train_MS, test_MS = plan.uses("train"), plan.uses("test")
    ours, theirs = [], []
    truth = Surv.from_arrays(table["event"] == 1, table["time"])
    for logits_SC, train_S, test_S in zip(logits_MSC, train_MS, test_MS, strict=True):
        own = table[test_S]
        ours.append(own.assign(standing=task.risk(logits_SC[test_S])))
        model = CoxPHSurvivalAnalysis().fit(table.loc[train_S, ["z"]].to_numpy(), truth[train_S])
        theirs.append(own.assign(standing=model.predict(own[["z"]].to_numpy())))
    near, wanted = harrell_within(ours), harrell_within(theirs)
    assert wanted > 0.6, "the covariate tells something"
    assert near == pytest.approx(wanted, abs=0.03)


@pytest.mark.skipif(not LABELS.is_dir(), reason="no shared data here")
def test_size_of_metastases_in_camelyon16_is_graded(bags_of):
    """Camelyon16's test slides: none, micro, macro (ITC count as micro); the tile tells the grade within some noise."""
    names = ["slide", "kind", "type", "size"]
    raw = pd.read_csv(LABELS / "camelyon16_reference.csv", names=names, keep_default_na=False)
    size_S = raw["size"].str.lower().map({"none": 0, "itc": 1, "micro": 1, "macro": 2}).to_numpy()
    rng, arrays = np.random.default_rng(0), []
    for size in size_S:
        bag_TD = rng.normal(size=(rng.integers(2, 6), 3)).astype(np.float32)
        bag_TD[rng.integers(len(bag_TD)), 2] = 8 + 4 * size + rng.normal()
        arrays.append(bag_TD)
    grades = ("none", "micro", "macro")
    rest = {"patient": raw["slide"], "split": "train", "path": None, "mpp": np.nan}
    cohort = Cohort(raw[["slide"]].assign(label=[grades[size] for size in size_S], **rest), grades)
    task = task_of(TaskConfig(name="ordinal"), grades)
    logits_MSC, plan = trained_out_of_fold(task, cohort, bags_of(arrays), epochs=40)
    grade_S = np.zeros(len(raw), dtype=int)
    for logits_SC, test_S in zip(logits_MSC, plan.uses("test"), strict=True):
        grade_S[test_S] = (logits_SC[test_S] > 0).sum(axis=1)
    nearest_S = np.clip(np.rint((np.array([bag_TD[:, 2].max() for bag_TD in arrays]) - 8) / 4), 0, 2)
    ours, best = (cohen_kappa_score(size_S, said, weights="quadratic") for said in (grade_S, nearest_S))
    assert ours > best - 0.05
