"""Learning curves: nested, stratified parts of the training patients, and a study that they leave untouched."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from extract.cohort import Cohort, check_cohort, read_cohort
from extract.config import Columns, load_config
from mil.config import StudyConfig
from mil.study.folds import stratified_order
from mil.study.learning_curve import curve_plan, joined
from mil.study.plan import make_plan
from mil.study.roles import PlanError, patients_with_two_roles, sites_with_two_roles
from mil.study.saved import load_plan
from mil.train import main
from mil.training.members import load_members
from mil.training.module import MembersModule
from mil.training.warmstart import open_start

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


def cohort_of(n_patients: int, seed: int = 0, classes: str = "abc", test: int = 0) -> Cohort:
    """One to three slides a patient, classes of unequal size; the last `test` patients are the official test split."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(n_patients + test):
        label = classes[p] if p < len(classes) else rng.choice(list(classes), p=[0.6, 0.3, 0.1][: len(classes)])
        rows += [(f"p{p:03d}", label, "test" if p >= n_patients else "train")] * int(rng.integers(1, 4))
    table = pd.DataFrame(rows, columns=["patient", "label", "split"])
    table.insert(0, "slide", [f"s{i:03d}" for i in range(len(rows))])
    return check_cohort(table.assign(path=None, mpp=np.nan))


def plan_of(cohort: Cohort, **options):
    return make_plan(cohort, **{"folds": 2, "lr": 1e-3, "weight_decay": 0.0} | options)


# --- who is trained on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_every_beginning_of_the_order_is_stratified(seed):
    rng = np.random.default_rng(seed)
    n, n_classes = int(rng.integers(6, 80)), int(rng.integers(2, 7))
    label_P = rng.choice(n_classes, n, p=rng.dirichlet(np.ones(n_classes)))
    place_P = stratified_order(np.arange(n), label_P, rng)
    assert sorted(place_P) == list(range(n))
    ordered = label_P[np.argsort(place_P)]
    present = np.unique(label_P)
    assert sorted(ordered[: len(present)]) == present.tolist(), "one of each class first"
    for size in range(len(present), n + 1):
        exact_C = np.array([(label_P == c).sum() for c in present]) * size / n
        found_C = np.array([(ordered[:size] == c).sum() for c in present])
        made_up = (
            (1 - exact_C).clip(0).sum()
        )  # patients of rare classes that are there although their share is below one
        assert np.abs(found_C - exact_C).max() < 1.5 + made_up


def test_the_small_sizes_are_among_the_large_ones_and_all_else_is_as_it_was():
    cohort = cohort_of(60, test=6)
    plan = plan_of(cohort, repeats=2, seeds=(0, 4), val_fraction=0.2)
    curve = curve_plan(plan, cohort, [12, 5, 20], split_seed=0)
    assert len(curve) == len(plan) * 3
    assert curve.members["member"].tolist() == list(range(len(plan), 4 * len(plan)))
    everyone = joined(plan, curve)
    assert everyone.members["member"].tolist() == list(range(4 * len(plan)))
    assert patients_with_two_roles(everyone, cohort) == []
    patients = cohort.table["patient"].to_numpy()
    for m, member in plan.members.iterrows():
        same = ["repeat", "fold", "seed", "init_seed", "lr", "weight_decay"]
        own = curve.members[(curve.members[same] == member[same]).all(axis=1)]
        assert own["train_size"].tolist() == [5, 12, 20]
        full_S = plan.roles_MS[m]
        smaller = set()
        for row, size in zip(own.index, own["train_size"], strict=True):
            roles_S = curve.roles_MS[row]
            trained = set(patients[roles_S == 0])
            assert len(trained) == size
            assert smaller < trained < set(patients[full_S == 0]), "nested"
            assert {patients[s] for s in np.flatnonzero(full_S == 0) if patients[s] in trained} == trained
            assert (roles_S[np.isin(patients, list(trained)) & (full_S == 0)] == 0).all(), "patients are whole"
            left_out_S = (full_S == 0) & (roles_S != 0)
            assert (roles_S[left_out_S] == 3).all()
            np.testing.assert_array_equal(roles_S[full_S != 0], full_S[full_S != 0])
            assert set(cohort.labels_S[roles_S == 0]) == {0, 1, 2}
            smaller = trained


def test_seeds_share_the_patients_and_folds_and_repeats_do_not():
    cohort = cohort_of(60)
    plan = plan_of(cohort, repeats=2, seeds=(0, 4))
    curve = curve_plan(plan, cohort, [8], split_seed=0)
    by_seed = curve.roles_MS.reshape(4, 2, -1)
    np.testing.assert_array_equal(by_seed[:, 0], by_seed[:, 1])
    assert len({roles_S.tobytes() for roles_S in by_seed[:, 0]}) == 4
    other = curve_plan(plan, cohort, [8], split_seed=1)
    assert not np.array_equal(other.roles_MS, curve.roles_MS)


def test_sizes_do_not_depend_on_each_other():
    cohort = cohort_of(60)
    plan = plan_of(cohort)
    alone, among = curve_plan(plan, cohort, [9], 0), curve_plan(plan, cohort, [4, 9, 20], 0)
    np.testing.assert_array_equal(alone.roles_MS, among.roles_MS[among.members["train_size"] == 9])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([5, 5], "a size occurs twice"),
        (
            [0],
            "expected 1 to 29 patients, fewer than the 30 that a fold trains on (the full size is always there), got 0",
        ),
        ([10, 30], "got 30"),
        ([2], "2 patients are too few to hold every class; without: 'c'"),
    ],
)
def test_sizes_that_cannot_be_trained(sizes, said):
    cohort = cohort_of(60)
    with pytest.raises(PlanError) as caught:
        curve_plan(plan_of(cohort), cohort, sizes, 0)
    assert said in "\n".join(caught.value.problems)
    assert curve_plan(plan_of(cohort), cohort, [], 0) is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data not there")
def test_tcga_lung():
    """Parts of site-preserving folds preserve sites, hold as many patients as asked for, half of each subtype."""
    cohort = read_cohort(SHARED / "labels" / "lung_labels.csv", Columns(label="subtype", patient="tcga"))
    plan = plan_of(cohort, folds=5, site_preserving=True)
    curve = curve_plan(plan, cohort, [25, 50, 100, 200], 0)
    assert sites_with_two_roles(curve, cohort) == []
    for roles_S, size in zip(curve.roles_MS, curve.members["train_size"], strict=True):
        assert cohort.table["patient"][roles_S == 0].nunique() == size
        assert abs((cohort.labels_S[roles_S == 0] == 0).sum() - size * 467 / 941) < 2


# --- end to end ----------------------------------------------------------------------------------------------------

SETTINGS = [
    "study.folds=2",
    "study.seeds=[0,1]",
    "train.epochs=2",
    "train.batch_size=5",
    "train.lr=0.02",
    "train.accelerator=cpu",
    "model.hidden=6",
    "model.attention=5",
    "model.head=[4]",
    "report.baselines=false",
    "report.bootstrap=0",
]


@pytest.fixture(scope="module")
def runs(write_study, witness_arrays, draw_only, tmp_path_factory) -> dict[str, Path]:
    """The same study with and without a learning curve; three classes, two slides a patient, a test split."""
    folder = tmp_path_factory.mktemp("curve")
    arrays, _ = witness_arrays(48, seed=2, n_classes=3)
    labels = [("KIRC", "KIRP", "KICH")[i // 2 % 3] for i in range(48)]
    for array, label in zip(arrays, labels, strict=True):
        array[0, ("KIRC", "KIRP", "KICH").index(label)] += 5
    split = ["test" if i >= 36 else "train" for i in range(48)]
    patients = [f"p{i // 2:02d}" for i in range(48)]
    data = write_study(folder / "data", arrays, labels, split=split, patients=patients)
    with pytest.MonkeyPatch.context() as patch:
        draw_only(patch, "learning_curve")
        for name, more in (("with", ["study.train_sizes=[3,6]", "train.members_per_pass=5"]), ("without", [])):
            assert main([*data, *SETTINGS, *more, f"out={folder / name}"]) == 0
    return {name: folder / name for name in ("with", "without")}


def test_the_studys_own_results_are_the_same_with_and_without(runs):
    for name in ("predictions.csv", "roles.csv", "plan.csv", "history.csv", "slides.csv"):
        assert (runs["with"] / name).read_bytes() == (runs["without"] / name).read_bytes(), name
    (one, _), (other, _) = load_members(runs["with"]), load_members(runs["without"])
    assert one.n_members == other.n_members == 4
    first, second = (json.loads((runs[n] / "metrics.json").read_text()) for n in ("with", "without"))
    assert first.pop("learning_curve")
    assert first == second
    assert not (runs["without"] / "learning_curve").exists()


def test_the_curves_numbers_are_those_of_its_predictions(runs):
    """Recomputed with scikit-learn from the two tables of predictions."""
    curve = json.loads((runs["with"] / "metrics.json").read_text())["learning_curve"]
    plan = pd.read_csv(runs["with"] / "learning_curve" / "plan.csv").set_index("member")
    added = pd.read_csv(runs["with"] / "learning_curve" / "predictions.csv")
    own = pd.read_csv(runs["with"] / "predictions.csv")
    added["size"] = added["member"].map(plan["train_size"])
    table = pd.concat([added, own.assign(size=0)])
    assert [p["train_size"] for p in curve["points"]] == [3, 6, None]
    for point in curve["points"]:
        mine = table[table["size"] == (point["train_size"] or 0)]
        for name, split in (("cross_validation", "train"), ("test", "test")):
            aucs = []
            for _, rows in mine[(mine["role"] == "test") & (mine["split"] == split)].groupby("member"):
                p_SC = rows[["p_0", "p_1", "p_2"]].to_numpy()
                aucs.append(
                    np.mean(
                        [roc_auc_score(rows["label"] == c, p_SC[:, i]) for i, c in enumerate(["KICH", "KIRC", "KIRP"])]
                    )
                )
            assert len(aucs) == 4
            assert point[name]["auc"] == pytest.approx(aucs)
            assert point[name]["metrics"]["auc"]["mean"] == pytest.approx(np.mean(aucs))
            of_folds = np.reshape(aucs, (2, 2)).mean(axis=1)  # 2 folds x 2 seeds
            assert point[name]["metrics"]["auc"]["sd"] == pytest.approx(np.std(of_folds, ddof=1))
        trained = mine[mine["role"] == "train"].groupby("member")["patient"].nunique()
        assert point["patients"] == trained.mean() == (point["train_size"] or 9)
        assert point["slides"] == 2 * point["patients"]
    roles = pd.read_csv(runs["with"] / "learning_curve" / "roles.csv")
    assert [c for c in roles.columns if c.startswith("m")] == [f"m{m}" for m in range(4, 12)]
    for member in plan.index:
        assert (
            plan.loc[member, "n_train"] == (roles[f"m{member}"] == "train").sum() == 2 * plan.loc[member, "train_size"]
        )


def test_all_sizes_take_as_many_steps(runs):
    """Steps counted from the tables: an epoch is the training slides in batches, the last one short."""
    config = load_config(StudyConfig, [f"config={runs['with'] / 'config.yaml'}"])
    full, curve = pd.read_csv(runs["with"] / "plan.csv"), pd.read_csv(runs["with"] / "learning_curve" / "plan.csv")
    steps = [table["epochs"] * np.ceil(table["n_train"] / config.train.batch_size) for table in (full, curve)]
    assert set(full["epochs"]) == {config.train.epochs}
    per_epoch = np.ceil(curve["n_train"] / config.train.batch_size)
    assert (abs(steps[1] - steps[0].iloc[0]) <= per_epoch / 2).all()
    assert curve["epochs"].min() > config.train.epochs
    points = json.loads((runs["with"] / "metrics.json").read_text())["learning_curve"]
    assert [p["epochs"] for p in points["points"]][:2] == curve.groupby("train_size")["epochs"].mean().tolist()
    history = pd.read_csv(runs["with"] / "learning_curve" / "history.csv")
    assert history.groupby("member")["epoch"].max().tolist() == curve["epochs"].tolist()


def test_equal_epochs_are_an_option(runs, draw_only, tmp_path, monkeypatch):
    draw_only(monkeypatch)
    settings = [f"config={runs['with'] / 'config.yaml'}", "study.train_sizes_equal=epochs", f"out={tmp_path / 'run'}"]
    assert main(settings) == 0
    plan = pd.read_csv(tmp_path / "run" / "learning_curve" / "plan.csv")
    assert set(plan["epochs"]) == set(pd.read_csv(tmp_path / "run" / "plan.csv")["epochs"])
    assert (tmp_path / "run" / "plan.csv").read_bytes() == (runs["with"] / "plan.csv").read_bytes()
    assert "part of the rise may be that" in (tmp_path / "run" / "report.html").read_text()


def test_the_figure_and_the_table_are_in_the_report(runs):
    assert (runs["with"] / "figures" / "learning_curve.png").stat().st_size > 10_000
    page = (runs["with"] / "report.html").read_text()
    assert "AUC against training patients" in page
    assert 'data-key="/learning_curve/points/0/cross_validation/metrics/auc/mean"' in page
    assert "learning_curve" not in (runs["without"] / "report.html").read_text().replace("train_sizes", "")
    assert not (runs["without"] / "figures" / "learning_curve.png").exists()


def test_an_interrupted_learning_curve_resumes_to_the_same(runs, draw_only, tmp_path, monkeypatch, capsys):
    draw_only(monkeypatch)
    arguments = [f"config={runs['with'] / 'config.yaml'}", f"out={tmp_path / 'run'}"]
    begin, fits = MembersModule.on_train_epoch_start, []

    def stop(module):
        fits.append(module) if module not in fits else None
        if len(fits) == 2:
            raise KeyboardInterrupt
        begin(module)

    with monkeypatch.context() as patch:
        patch.setattr(MembersModule, "on_train_epoch_start", stop)
        assert main(arguments) == 130
    assert (tmp_path / "run" / "learning_curve" / "roles.csv").exists(), "who is trained on can be looked up at once"
    assert main([*arguments, "resume=true"]) == 0
    for name in ("predictions.csv", "learning_curve/predictions.csv", "learning_curve/plan.csv", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (runs["with"] / name).read_bytes(), name
    assert "trained on 6 patients" in capsys.readouterr().out


def test_members_on_fewer_patients_start_where_the_full_member_does(runs):
    config = load_config(StudyConfig, [f"config={runs['with'] / 'config.yaml'}", f"model.init={runs['without']}"])
    cohort = read_cohort(config.cohort)
    plan = load_plan(runs["without"], cohort)
    everyone = joined(plan, curve_plan(plan, cohort, [3, 6], config.seed))
    features = {"encoder": "synthetic"}
    start = open_start(config, cohort, everyone, 6, features)
    assert start.source_of_M.tolist() == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3]


def test_sizes_are_refused_before_anything_is_written(runs, tmp_path, capsys):
    config = f"config={runs['without'] / 'config.yaml'}"
    assert main([config, "study.train_sizes=[3,12]", f"out={tmp_path / 'run'}"]) == 2
    assert "expected 1 to 8 patients" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
