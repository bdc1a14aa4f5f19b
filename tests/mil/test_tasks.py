"""Tasks other than classification: losses and metrics against slow loops and other libraries, traps, whole studies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score
from sksurv.metrics import concordance_index_censored

from extract.cohort import CohortError, read_cohort
from extract.config import ConfigError, load_config
from mil.aggregators import AGGREGATORS, aggregator_class
from mil.aggregators.batch import pack
from mil.config import StudyConfig, Train
from mil.config import Task as TaskConfig
from mil.config_problems import LOSSES, study_problems
from mil.study.plan import make_plan
from mil.study.roles import PlanError
from mil.tasks.contract import Part
from mil.tasks.ordinal import ordinal_metrics
from mil.tasks.regression import regression_metrics
from mil.tasks.survival import harrell_of, harrell_within
from mil.tasks.table import TASKS, task_of
from mil.train import main
from mil.training import losses
from mil.training.bags import joined_steps, make_batch
from mil.training.checks import _target_problems
from mil.training.module import Members, fit
from mil.training.objectives import module_of, notes_on_batches

# --- losses --------------------------------------------------------------------------------------------------------


def efron_loop(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """Efron (1977), one tie at a time, in plain exponentials."""
    total = 0.0
    for t in np.unique(time[event == 1]):
        died, at_risk = (time == t) & (event == 1), time >= t
        total -= risk[died].sum()
        for k in range(died.sum()):
            total += np.log(np.exp(risk[at_risk]).sum() - k / died.sum() * np.exp(risk[died]).sum())
    return total / event.sum()


def test_cox_is_efrons_partial_likelihood_of_each_members_own_bags():
    rng = np.random.default_rng(0)
    time, event = rng.integers(1, 6, 23).astype(float), (rng.random(23) < 0.6).astype(float)  # many ties
    risk_MB, uses_MB = rng.normal(size=(3, 23)), rng.random((3, 23)) < 0.7
    found_M = losses.cox_efron(*(torch.from_numpy(x) for x in (risk_MB, time, event, uses_MB)))
    slow = [efron_loop(r[u], time[u], event[u]) for r, u in zip(risk_MB, uses_MB, strict=True)]
    assert np.allclose(found_M, slow, rtol=1e-12)


def test_trap_cox_overflows_in_plain_exponentials():
    risk_MB = torch.tensor([[1000.0, -1000.0, 999.0]], requires_grad=True)
    arguments = (torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.ones(1, 3, dtype=torch.bool))
    loss_M = losses.cox_efron(risk_MB, *arguments)
    loss_M.sum().backward()
    # 1000 against all; -1000 against 999; 999 against itself
    assert loss_M.item() == pytest.approx((np.log1p(np.exp(-1)) + 1999) / 3, rel=1e-6)
    assert torch.isfinite(risk_MB.grad).all()


def test_trap_a_batch_without_an_event_teaches_nothing_and_breaks_nothing():
    risk_MB = torch.tensor([[0.3, -1.0], [2.0, 1.0]], requires_grad=True)
    uses_MB = torch.tensor([[True, True], [False, False]])
    loss_M = losses.cox_efron(risk_MB, torch.tensor([1.0, 2.0]), torch.zeros(2), uses_MB)
    loss_M.sum().backward()
    assert loss_M.tolist() == [0, 0]
    assert risk_MB.grad.abs().sum() == 0


def test_batches_without_an_event_are_joined_to_the_next():
    step_O = np.array([0, 0, -1, 1, 1, 2, 2, 3, 3])
    has_O = np.array([1, 0, 1, 0, 0, 0, 1, 0, 0], dtype=bool)  # not used: row 2; without: batches 1 and 3
    assert joined_steps(step_O, has_O).tolist() == [0, 0, -1, 1, 1, 1, 1, 1, 1]
    assert joined_steps(np.array([-1, -1]), np.array([True, True])).tolist() == [-1, -1]


def test_discrete_time_is_the_likelihood_of_surviving_and_not():
    rng = np.random.default_rng(1)
    logits, interval, event = rng.normal(size=(2, 7, 4)), rng.integers(0, 4, (2, 7)), rng.integers(0, 2, 7)
    found = losses.discrete_time(torch.from_numpy(logits), torch.from_numpy(interval), torch.from_numpy(event))
    hazard = 1 / (1 + np.exp(-logits))
    for m, b in np.ndindex(2, 7):
        k = interval[m, b]
        p = np.prod(1 - hazard[m, b, :k]) * (hazard[m, b, k] if event[b] else 1)
        assert found[m, b].item() == pytest.approx(-np.log(p))


def test_coral_and_regression_losses():
    logits, grade = torch.tensor([[[2.0, -1.0]]]), torch.tensor([1])
    assert losses.coral(logits, grade).item() == pytest.approx(np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)))
    said, target = torch.tensor([[[0.0], [3.0]]]), torch.tensor([[0.5, 0.0]])
    assert losses.regression(said, target, "mse").tolist() == [[0.25, 9.0]]
    assert losses.regression(said, target, "l1").tolist() == [[0.5, 3.0]]
    assert losses.regression(said, target, "huber").tolist() == [[0.125, 2.5]]


# --- metrics -------------------------------------------------------------------------------------------------------


def weightings(n: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """All once, and two resamples; and the rows that they repeat."""
    weights_RN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=3).astype(float)
    weights_RN[0] = 1
    return weights_RN, [np.repeat(np.arange(n), w.astype(int)) for w in weights_RN]


def test_regression_metrics_are_those_of_scipy_and_scikit_learn_also_resampled():
    rng = np.random.default_rng(2)
    truth, said = rng.normal(size=31).round(1), rng.normal(size=31).round(1)  # with ties
    weights_RN, rows = weightings(31, 3)
    found = regression_metrics(truth, said, weights_RN, cut=0.2)
    for r, row in enumerate(rows):
        x, y = truth[row], said[row]
        wanted = {
            "pearson": np.corrcoef(x, y)[0, 1],
            "spearman": spearmanr(x, y)[0],
            "r2": r2_score(x, y),
            "mae": np.abs(x - y).mean(),
            "rmse": np.sqrt(((x - y) ** 2).mean()),
            "auc_at_cut": roc_auc_score(x >= 0.2, y),
        }
        assert {name: values[r] for name, values in found.items()} == pytest.approx(wanted)


def test_regression_metrics_are_undefined_where_nothing_varies():
    found = regression_metrics(np.ones(4), np.arange(4.0), np.ones((1, 4)), None)
    assert all(np.isnan(found[name][0]) for name in ("pearson", "spearman", "r2", "auc_at_cut"))
    assert found["mae"][0] == 1.0


def test_ordinal_metrics_are_those_of_scikit_learn_also_resampled():
    rng = np.random.default_rng(4)
    truth, p_NK = rng.integers(0, 4, 40), rng.dirichlet(np.ones(4), 40)
    weights_RN, rows = weightings(40, 5)
    found = ordinal_metrics(truth, p_NK, weights_RN)
    above = 1 - np.cumsum(p_NK, axis=1)[:, :-1]
    said = (above > 0.5).sum(axis=1)
    for r, row in enumerate(rows):
        x, y = truth[row], said[row]
        aucs = [roc_auc_score(x > c, above[row, c]) for c in range(3)]
        wanted = [cohen_kappa_score(x, y, weights="quadratic"), (x == y).mean(), (abs(x - y) <= 1).mean()]
        names = ("kappa", "accuracy", "within_one", "auc_of_cuts", "mae")
        wanted += [np.mean(aucs), abs(x - y).mean()]
        assert [found[name][r] for name in names] == pytest.approx(wanted)


def survivors(time: list[float], event: list[int], standing: list[float], patient: list[str] | None = None):
    names = [f"p{i}" for i in range(len(time))] if patient is None else patient
    return pd.DataFrame({"patient": names, "time": time, "event": event, "standing": standing, "risk": standing})


def test_harrells_c_compares_within_a_fold_and_is_never_half_by_default():
    good = survivors([1.0, 2.0, 3.0], [1, 1, 1], [3.0, 2.0, 1.0])
    shifted = good.assign(standing=good["standing"] + 100)  # another fold, another scale
    assert harrell_within([good, shifted]) == 1.0
    assert harrell_within([good.assign(standing=-good["standing"])]) == 0.0, "not turned round to look better"
    assert np.isnan(harrell_within([survivors([1.0, 2.0], [0, 1], [1.0, 2.0])])), "nothing is comparable"
    assert np.isnan(harrell_within([survivors([1.0, 2.0], [0, 0], [1.0, 2.0])]))


def test_harrells_c_of_weighted_rows_is_scikit_survivals_of_repeated_ones():
    """Times and risks with ties, rows counted 0 to 3 times: pairs of a row with itself are none."""
    rng = np.random.default_rng(2)
    tables = [
        survivors(rng.integers(1, 9, 30).astype(float), rng.integers(0, 2, 30), rng.integers(0, 6, 30) / 3.0)
        for _ in range(2)
    ]
    weights = [rng.integers(0, 4, (5, 30)).astype(float) for _ in tables]
    for r, found in enumerate(harrell_of(tables, weights)):
        counted = np.zeros(3)
        for table, weights_RN in zip(tables, weights, strict=True):
            rows = table.iloc[np.repeat(np.arange(30), weights_RN[r].astype(int))]
            counted += concordance_index_censored(rows["event"] == 1, rows["time"], rows["standing"])[1:4]
        assert found == pytest.approx((counted[0] + counted[2] / 2) / counted.sum(), abs=1e-12)


def test_trap_slides_of_one_patient_are_one_patient():
    task = task_of(TaskConfig(name="survival", horizons=[2.0]))
    rows = survivors([1.0, 1.0, 3.0, 4.0], [1, 1, 0, 1], [4.0, -2.0, 0.5, 2.0], ["a", "a", "b", "c"])
    units = task.units(rows.assign(split="train", members=1))
    assert units["patient"].tolist() == ["a", "b", "c"]
    assert units["standing"].tolist() == [1.0, 0.5, 2.0]
    assert units["slides"].tolist() == [2, 1, 1]


def test_trap_risk_groups_split_at_the_training_median():
    """Every evaluated patient is above it: one group is empty, which a split at their own median would hide."""
    task = task_of(TaskConfig(name="survival", horizons=[2.0]))
    table = survivors([1.0, 2.0, 3.0], [1, 0, 1], [0.2, 0.5, 1.0])
    found = task.extra([Part(table, table)])["kaplan_meier"]
    assert found["groups"]["high risk"]["patients"] == 3
    assert found["groups"]["low risk"]["patients"] == 0
    assert found["log_rank_p"] is None
    assert found["groups"]["high risk"]["survival"] == pytest.approx([2 / 3, 2 / 3, 0])
    facts = task.facts_after(cohort_of(6), np.array([[True] * 5 + [False]]), np.arange(6.0).reshape(1, 6, 1) ** 2, {})
    assert facts["risk_median"].tolist() == [4.0], "of 0, 1, 4, 9, 16; not of 25 as well"


# --- cohorts -------------------------------------------------------------------------------------------------------


def cohort_of(n: int, target: str = "survival", folder=None, **columns):
    from extract.cohort import Cohort

    rng = np.random.default_rng(7)
    table = pd.DataFrame({"slide": [f"s{i}" for i in range(n)], "patient": [f"p{i:02d}" for i in range(n)]})
    table = table.assign(label="x", split="train", path=None, mpp=np.nan, value=rng.normal(size=n))
    table = table.assign(time=rng.integers(1, 30, n).astype(float), event=(np.arange(n) % 2).astype(float))
    return Cohort(table.assign(**columns), ("censored", "event") if target == "survival" else ("all",), target=target)


def written(folder, **columns):
    table = pd.DataFrame({"slide": ["a", "b", "c"], "patient": ["x", "y", "z"], **columns})
    table.to_csv(folder / "c.csv", index=False)
    return folder / "c.csv"


def test_times_and_events_are_read_as_tables_write_them(tmp_path):
    cohort = read_cohort(
        written(tmp_path, time=["0", "12.5", ""], event=["1:DECEASED", "0:LIVING", ""]), target="survival"
    )
    assert cohort.table["time"].tolist()[:2] == [0.0, 12.5], "an event at time 0 stays one: it has no sign to lose"
    assert cohort.table["label"].tolist() == ["event", "censored", None]
    assert cohort.labels_S.tolist() == [1, 0, -1]


def test_what_is_wrong_with_times_is_said_together(tmp_path):
    path = written(tmp_path, time=["-3", "", "1,5"], event=["1", "yes", "maybe"])
    with pytest.raises(CohortError) as refused:
        read_cohort(path, target="survival")
    said = "\n".join(refused.value.problems)
    assert len(refused.value.problems) == 4
    for words in ("'-3' in row 2", "event but no time: 'b'", "decimal point", "'maybe' in row 4"):
        assert words in said


def test_values_are_numbers(tmp_path):
    cohort = read_cohort(written(tmp_path, label=["1", "2.5", "NA"]), target="value")
    assert cohort.table["value"].tolist()[:2] == [1, 2.5]
    assert cohort.labels_S.tolist() == [0, 0, -1]
    with pytest.raises(CohortError, match="decimal point"):
        read_cohort(written(tmp_path, label=["1,5", "2", "3"]), target="value")


def test_targets_that_cannot_be_learned_are_refused():
    [constant] = _target_problems(cohort_of(5, "value", value=2.0), 0)
    assert "the target is 2 for every slide" in constant
    [no_event] = _target_problems(cohort_of(5, event=0.0), 0)
    assert "no patient of the train split has an event" in no_event
    [mixed] = _target_problems(cohort_of(4, patient="one"), 0)
    assert "1 patient whose slides have different times or events: 'one'" in mixed


def test_folds_without_events_are_refused():
    with pytest.raises(PlanError, match=r"2 patients with an event outside the test split, but study.folds=3 needs 3"):
        make_plan(cohort_of(5), folds=3, lr=0.1, weight_decay=0)


def test_folds_are_stratified_by_event_and_by_quantiles():
    plan = make_plan(cohort_of(24), folds=4, lr=0.1, weight_decay=0)
    events = cohort_of(24).table["event"].to_numpy()
    assert {int(events[test_S].sum()) for test_S in plan.uses("test")} == {3}
    values = cohort_of(25, "value")
    stratified = TASKS["regression"](TaskConfig(name="regression")).strata(values, 5)
    assert np.bincount(stratified.labels_S).tolist() == [5] * 5
    order = values.table["value"].to_numpy().argsort()
    assert (np.diff(stratified.labels_S[order]) >= 0).all()
    for test_S in make_plan(stratified, folds=5, lr=0.1, weight_decay=0).uses("test"):
        assert sorted(stratified.labels_S[test_S]) == [0, 1, 2, 3, 4]


# --- config --------------------------------------------------------------------------------------------------------


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_config(StudyConfig, ["cohort=c.csv", *arguments], also=study_problems)
    return refused.value.problems


def test_a_word_stands_for_the_task_and_options_stand_beside_it(tmp_path):
    (tmp_path / "c.yaml").write_text("task: survival\ncohort: c.csv\n")
    config = load_config(StudyConfig, [f"config={tmp_path / 'c.yaml'}", "task.unit=months"], also=study_problems)
    assert (config.task.name, config.task.unit) == ("survival", "months")
    assert load_config(StudyConfig, ["cohort=c.csv", "task=regression", "task.cut=3"]).task.cut == 3


def test_what_does_not_belong_to_a_task_is_refused():
    assert "task.loss=huber" in problems_of("task=survival", "task.loss=huber")[0]
    assert "task.cut" in problems_of("task=survival", "task.cut=1")[0]
    assert "set classes=" in problems_of("task=ordinal")[0]
    assert len(problems_of("task=regression", "train.class_weights=balanced", "classes=[a,b]")) == 2


# --- members -------------------------------------------------------------------------------------------------------

KINDS = {
    "cox": TaskConfig(name="survival", horizons=[5.0]),
    "discrete": TaskConfig(name="survival", loss="discrete", intervals=3, horizons=[5.0, 9.0]),
    "regression": TaskConfig(name="regression"),
    "huber": TaskConfig(name="regression", loss="huber"),
    "l1": TaskConfig(name="regression", loss="l1"),
    "ordinal": TaskConfig(name="ordinal"),
}
"""Every task with every loss that it has."""


def module(kind: str, name: str, options, bags, train_MS: np.ndarray, seeds: list[int], **settings):
    cohort = cohort_of(len(bags), "value" if KINDS[kind].name == "regression" else "survival")
    if kind == "ordinal":
        grades = np.array(["a", "b", "c"])[np.arange(len(bags)) % 3]
        cohort = cohort.__class__(cohort.table.assign(label=grades), ("a", "b", "c"))
    task = task_of(KINDS[kind], cohort.classes)
    aggregator = aggregator_class(name)(bags.dim, task.n_outputs(), seeds, **options)
    if kind == "ordinal":
        aggregator.add_cuts(2)
    n = len(train_MS)
    members = Members(np.full(n, 0.01), np.zeros(n), train_MS, np.zeros_like(train_MS))
    chosen = Train(**({"epochs": 2, "batch_size": 3, "accelerator": "cpu"} | settings))
    return module_of(task)(aggregator, bags, cohort, task, members, chosen, task.facts(cohort, train_MS))


@pytest.fixture(scope="module")
def bags(bags_of, witness_arrays):
    return bags_of(witness_arrays(12, seed=3, lengths=(3, 9))[0])


def test_the_battery_has_every_task_and_loss():
    there = {(config.name, config.loss or LOSSES[config.name][0]) for config in KINDS.values() if config.name in LOSSES}
    assert there == {(name, loss) for name, losses_of in LOSSES.items() for loss in losses_of}
    assert {config.name for config in KINDS.values()} == set(TASKS) - {"classification"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_learns_every_task_and_a_member_as_if_alone(name, kind, bags, small_options):
    """The gradients of one batch: finite, not all zero, and those of the member alone."""
    train_MS = np.arange(12) % 3 != np.arange(2)[:, None]
    grads = []
    for members, seeds in ((train_MS, [4, 5]), (train_MS[1:], [5])):
        one = module(kind, name, small_options[name], bags, members, seeds)
        batch = make_batch(bags, list(range(12)), np.zeros(12, dtype=np.int64), members)
        prediction = one.aggregator.train()(batch)
        assert prediction.logits_MBC.shape == (len(seeds), 12, {"discrete": 3, "ordinal": 2}.get(kind, 1))
        loss_M = sum(w * one.batch_losses(logits, batch) for w, logits in one.aggregator.readings(prediction))
        loss_M.sum().backward()
        grads.append({k: p.grad for k, p in one.aggregator.named_parameters() if p.grad is not None})
    together, alone = grads
    assert {k for k in alone if k.startswith("cut_")} == ({"cut_first", "cut_steps"} if kind == "ordinal" else set())
    assert max(grad.abs().max() for grad in alone.values()) > 1e-4
    for key, grad in alone.items():
        assert torch.isfinite(grad).all()
        assert torch.allclose(together[key][1], grad[0], atol=1e-5), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_member_is_as_if_trained_alone(kind, bags, small_options):
    train_MS = np.arange(12) % 3 != np.arange(2)[:, None]
    together = module(kind, "mean", {}, bags, train_MS, [4, 5])
    alone = module(kind, "mean", {}, bags, train_MS[1:], [5])
    said = []
    for one in (together, alone):
        fit(one, progress=False)
        assert not one.diverged_M.any()
        assert {"train_loss", f"train_{one.task.main}"} <= set(one.history[0])
        with torch.no_grad():
            said.append(one.aggregator.eval()(pack(list(bags.views), len(one.members))).logits_MBC[-1])
    if kind == "cox":  # which does not see what is added to all
        said = [logits - logits.mean() for logits in said]
    assert torch.allclose(*said, atol=1e-5)
    if kind == "ordinal":
        cuts_MK = -alone.aggregator.with_cuts(torch.zeros(1, 1, 1))[:, 0]
        assert (cuts_MK.diff(dim=1) > 0).all()


def test_targets_are_standardised_on_training_slides_only(bags):
    task, cohort = task_of(KINDS["regression"]), cohort_of(12, "value")
    train_MS = np.arange(12) < np.array([[6], [9]])
    facts, value_S = task.facts(cohort, train_MS), cohort.table["value"].to_numpy()
    assert facts["mean"] == pytest.approx([value_S[:6].mean(), value_S[:9].mean()])
    assert task.predicted(np.zeros((2, 1)), {"mean": 3.0, "sd": 2.0})["prediction"].tolist() == [3, 3]
    far = cohort_of(12, "value", value=np.r_[value_S[:9], [1e6] * 3])
    assert task.facts(far, train_MS)["sd"] == pytest.approx(facts["sd"])


def test_time_intervals_are_quantiles_of_each_members_training_events():
    task, cohort = task_of(KINDS["discrete"]), cohort_of(12)
    train_MS = np.arange(12) < np.array([[8], [12]])
    facts = task.facts(cohort, train_MS)
    for edges, end, train_S in zip(facts["edges"], facts["end"], train_MS, strict=True):
        table = cohort.table[train_S]
        assert edges == pytest.approx(np.quantile(table["time"][table["event"] == 1], [1 / 3, 2 / 3]))
        assert end == table["time"].max()
    said = task.predicted(np.zeros((1, 3)), {"edges": [4.0, 8.0], "end": 12.0, "risk_median": 0, "risk_sd": 1})
    assert said["survival_0"][0] == pytest.approx(0.5 - 0.25 / 4), "halved at 4, again at 8: at 5 a quarter of the way"


def test_joined_batches_are_said():
    train_MS = np.ones((1, 12), dtype=bool)
    [note] = notes_on_batches(cohort_of(12), train_MS, batch_size=2, seed=0, epochs=3)
    assert "of 18 batches of train.batch_size=2 slides have no event" in note
    assert not notes_on_batches(cohort_of(12), train_MS, batch_size=12, seed=0, epochs=3)


# --- whole studies -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory, write_study):
    """48 slides of 40 patients in which one tile carries a hidden number; times, values and grades follow it."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(11)
    patients = [f"p{i % 40:02d}" for i in range(48)]
    hidden = pd.Series(rng.normal(size=48)).groupby(patients).transform("first").to_numpy()
    arrays = []
    for number in hidden:
        bag_TD = rng.normal(size=(rng.integers(4, 12), 5)).astype(np.float32)
        bag_TD[rng.integers(len(bag_TD)), 0] = 6 + 2 * number
        arrays.append(bag_TD)
    arguments = write_study(folder, arrays, hidden.round(3), patients=patients)
    table = pd.read_csv(folder / "cohort.csv")
    table["time"], table["event"] = (30 * np.exp(-hidden)).round(1), (np.arange(48) % 4 > 0).astype(int)
    table["event"] = table.groupby("patient")["event"].transform("first")
    table["grade"] = np.array(["low", "mid", "high"])[np.digitize(hidden, [-0.5, 0.5])]
    table.to_csv(folder / "cohort.csv", index=False)
    return folder, arguments


STUDIES = {
    "regression": ["task=regression", "task.cut=0"],
    "survival": ["task=survival", "task.unit=months", "study.val_fraction=0.3", "train.select=best"],
    "discrete": ["task=survival", "task.loss=discrete", "study.unit=slide"],
    "ordinal": ["task=ordinal", "columns.label=grade", "classes=[low,mid,high]"],
}
QUICK = ["study.folds=3", "train.epochs=40", "train.lr=0.05", "train.batch_size=8", "train.accelerator=cpu"]
QUICK += ["model.name=max", "report.bootstrap=5", "report.heatmaps=0", "train.standardize=true"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_planted_signal_is_found_on_held_out_folds_and_not_when_shuffled(
    name, planted, draw_only, tmp_path, capsys, monkeypatch
):
    import json

    folder, arguments = planted
    run = [*arguments, *QUICK, *STUDIES[name], f"out={tmp_path / 'run'}"]
    assert main(run) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    key = metrics["task"]["main"]
    found = metrics["pooled_out_of_fold"]["metrics"][key]
    assert found["value"] > {"regression": 0.85, "ordinal": 0.6}.get(name, 0.75)
    assert found["low"] <= found["high"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert metrics["metric_titles"][key] in page
    if name in ("survival", "discrete"):
        assert "not on one scale" in page
        assert "patients at risk" in page
        assert metrics["pooled_out_of_fold"]["kaplan_meier"]["log_rank_p"] < 0.05
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert set(TASKS[metrics["task"]["name"]].targets) <= set(predictions)
    # a finished run is read back
    assert main([*run, "resume=true"]) == 0
    assert "already finished" in capsys.readouterr().out

    table = pd.read_csv(folder / "cohort.csv")
    order = pd.Series(range(40)).sample(frac=1, random_state=0).tolist()  # patients take another's target
    first = table.drop_duplicates("patient").set_index("patient")
    other = dict(zip(first.index, first.index[order], strict=True))
    for column in ("label", "time", "event", "grade"):
        table[column] = table["patient"].map(other).map(first[column])
    table.to_csv(tmp_path / "shuffled.csv", index=False)
    shuffled = [f"cohort={tmp_path / 'shuffled.csv'}", *run[1:-1], "report.bootstrap=0", f"out={tmp_path / 'chance'}"]
    draw_only(monkeypatch)
    assert main(shuffled) == 0
    by_chance = json.loads((tmp_path / "chance" / "metrics.json").read_text())["pooled_out_of_fold"]["metrics"][key]
    nothing = 0.5 if key == "c_harrell" else 0.0
    assert abs(by_chance["value"] - nothing) < 0.4 * (1 - nothing)
    assert by_chance["value"] < found["value"] - 0.15


def test_nested_cross_validation_chooses_by_the_tasks_metric(planted, draw_only, tmp_path, monkeypatch):
    import json

    draw_only(monkeypatch)
    _, arguments = planted
    nested = ["study.nested=2", "study.folds=2", "study.grid.lr=[1e-6,3e-2]", "train.epochs=6"]
    assert main([*arguments, *QUICK, *STUDIES["regression"], *nested, f"out={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["nested"]["metric"] == "pearson"
    history = pd.read_csv(tmp_path / "run" / "inner" / "history.csv")
    assert "val_pearson" in history
    assert "val_auc" not in history
