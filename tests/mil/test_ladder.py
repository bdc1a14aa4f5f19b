"""The ladder of baselines against slow readable loops with scikit-learn, and what the report makes of it."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

import mil.pipeline.baselines
import mil.report.page
from mil.pipeline.baselines import rounds_of
from mil.report.ladder import as_logits, beside, verdict
from mil.report.page import ladders_of
from mil.report.wording import about_baselines
from mil.results.readback import METRICS
from mil.study.roles import Plan
from mil.train import main
from mil.training import ladder
from mil.training.bags import Announced, Bags, MappedViews
from mil.training.ladder import RUNGS, Cohort, mean_knn, mean_logistic, tile_logistic

SHARED = Path(os.environ.get("SLIDE_MIL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
UCSB = SHARED / "data" / "mil" / "ucsb_breast.npz"


@pytest.fixture
def cohort(bags_of, witness_arrays):
    """`cohort(n_classes)`: 31 slides, 3 rounds; 3 slides of each are neither train nor test, two have no label."""

    def make(n_classes: int = 2, **options) -> tuple[list[np.ndarray], Cohort]:
        arrays, labels_S = witness_arrays(31, seed=5, n_classes=n_classes, strength=3.0, **options)
        arrays = [np.insert(array, 2, 1e3, axis=1) for array in arrays]  # constant: a trap for standardising
        labels_S[[3, 7]] = -1
        test_RS = np.arange(31) % 3 == np.arange(3)[:, None]
        train_RS = ~test_RS & (np.arange(31) < 28)
        return arrays, Cohort(bags_of(arrays), labels_S, n_classes, train_RS, test_RS)

    return make


def standardised(x_ND: np.ndarray, by_ND: np.ndarray) -> np.ndarray:
    scale_D = by_ND.std(axis=0)
    return (x_ND - by_ND.mean(axis=0)) / np.where(scale_D > 1e-9, scale_D, 1.0)


def rows_of(cohort: Cohort):
    for r in range(len(cohort.train_RS)):
        train = [s for s in range(31) if cohort.train_RS[r, s] and cohort.labels_S[s] >= 0]
        yield r, train, [s for s in range(31) if cohort.test_RS[r, s]]


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_mean_with_logistic_regression(cohort, n_classes):
    arrays, given = cohort(n_classes)
    found_RSC = mean_logistic(given)
    means_SD = np.array([array.astype(float).mean(axis=0) for array in arrays])
    for r, train, test in rows_of(given):
        x_ND = standardised(means_SD, means_SD[train])
        model = LogisticRegression(C=0.01, max_iter=1000).fit(x_ND[train], given.labels_S[train])
        np.testing.assert_allclose(found_RSC[r, test], model.predict_proba(x_ND[test]), atol=1e-6)
    assert np.array_equal(np.isfinite(found_RSC).all(axis=2), given.test_RS), "nothing else is scored"


@pytest.mark.parametrize("n_classes", [2, 3])
def test_nearest_neighbours_of_the_mean(cohort, n_classes):
    arrays, given = cohort(n_classes)
    found_RSC = mean_knn(given)
    means_SD = np.array([array.astype(float).mean(axis=0) for array in arrays])
    for r, train, test in rows_of(given):
        x_SD = standardised(means_SD, means_SD[train])
        for s in test:
            distance_N = np.array([np.linalg.norm(x_SD[s] - x_SD[t]) for t in train])
            near = np.argsort(distance_N)[:15]
            votes_C = np.zeros(n_classes)
            for n in near:
                votes_C[given.labels_S[train[n]]] += 1 / distance_N[n]
            np.testing.assert_allclose(found_RSC[r, s], votes_C / votes_C.sum(), atol=1e-9)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_logistic_regression_on_tiles_takes_the_top_ten(cohort, n_classes):
    """Bags of 3 to 20 tiles: none is drawn from, some have fewer than ten."""
    arrays, given = cohort(n_classes)
    found_RSC = tile_logistic(given)
    for r, train, test in rows_of(given):
        tiles_ND = np.concatenate([arrays[s] for s in train]).astype(float)
        label_N = np.concatenate([[given.labels_S[s]] * len(arrays[s]) for s in train])
        model = LogisticRegression(C=0.01, max_iter=1000, tol=1e-8).fit(standardised(tiles_ND, tiles_ND), label_N)
        for s in test:
            p_TC = model.predict_proba(standardised(arrays[s].astype(float), tiles_ND))
            top_C = np.array([sorted(p_TC[:, c])[::-1][:10] for c in range(n_classes)]).mean(axis=1)
            expected_C = [1 - top_C[1], top_C[1]] if n_classes == 2 else top_C / top_C.sum()
            np.testing.assert_allclose(found_RSC[r, s], expected_C, atol=2e-4)  # float32 features, lbfgs's tolerance


def test_val_and_unlabelled_slides_change_nothing(cohort, bags_of):
    """What is neither train nor test may be anything."""
    arrays, given = cohort()
    spoilt = [array * 50 if s >= 28 or given.labels_S[s] < 0 else array for s, array in enumerate(arrays)]
    other = Cohort(bags_of(spoilt), given.labels_S, 2, given.train_RS, given.test_RS)
    same = (np.arange(31) < 28) & (given.labels_S >= 0)
    for name, (_, probabilities) in RUNGS.items():
        np.testing.assert_array_equal(probabilities(given)[:, same], probabilities(other)[:, same], err_msg=name)


def test_a_round_that_lacks_a_class_gives_it_no_probability(cohort):
    _, given = cohort(3)
    labels_S = given.labels_S.copy()
    labels_S[given.train_RS[0] & (labels_S == 2)] = 1
    for labels, missing in ((labels_S, [2]), (np.where(given.train_RS[0], 0, labels_S), [1, 2])):
        for name, (_, probabilities) in RUNGS.items():
            p_SC = probabilities(Cohort(given.bags, labels, 3, given.train_RS[:1], given.test_RS[:1]))[0]
            p_SC = p_SC[given.test_RS[0]]
            assert (p_SC[:, missing] == 0).all(), name
            np.testing.assert_allclose(p_SC.sum(axis=1), 1)


def test_huge_slides_are_drawn_from_by_the_seed(bags_of, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 3)).astype(np.float32) for n in (500, 40, 64, 65, 90)]
    halves = np.array([[True, True, True, True, False]])

    def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
        return ladder.drawn_tiles(Cohort(bags_of(arrays), np.array([0, 1, 0, 1, 0]), 2, halves, ~halves, seed))

    tiles_ND, slide_N = drawn(0)
    assert np.bincount(slide_N).tolist() == [64, 40, 64, 64]
    for s in range(4):
        own = {row.tobytes() for row in tiles_ND[slide_N == s]}
        assert len(own) == (slide_N == s).sum(), "no tile twice"
        assert own <= {row.tobytes() for row in arrays[s]}
    np.testing.assert_array_equal(drawn(0)[0], tiles_ND)
    assert not np.array_equal(drawn(1)[0], tiles_ND)
    monkeypatch.setattr(ladder, "TILES_IN_ALL", 100)
    assert np.bincount(drawn(0)[1]).tolist() == [20, 20, 20, 20], "of five slides"


def test_mapped_features_are_read_slide_by_slide(cohort):
    arrays, given = cohort()

    class Source:
        def features(self, slide: str) -> np.ndarray:
            return arrays[int(slide)]

        mapped = features

    names = [str(s) for s in range(31)]
    views = MappedViews(Source(), names, [Announced(a.shape, "") for a in arrays], 0, budget=0)  # at most one is kept
    bags = Bags(tuple(names), given.bags.lengths_S, given.bags.dim, "mmap", views)
    mapped = Cohort(bags, given.labels_S, 2, given.train_RS, given.test_RS)
    for name, (_, probabilities) in RUNGS.items():
        np.testing.assert_array_equal(probabilities(mapped), probabilities(given), err_msg=name)
    assert len(views.kept) == 1


@pytest.mark.skipif(not UCSB.exists(), reason="no shared data here")
def test_the_breast_set_reaches_what_is_known_of_it():
    """UCSB breast: mean + standardised logistic regression, C 0.01, 5 folds: AUC 0.856 to 0.862 over three seeds."""
    with np.load(UCSB) as file:
        x_ND, bag_N, labels_S = file["X"].astype(np.float32), file["bag_id"], file["y"].astype(np.int64)
    arrays = [torch.from_numpy(x_ND[bag_N == bag]) for bag in dict.fromkeys(bag_N.tolist())]
    lengths_S = np.array([len(array) for array in arrays])
    bags = Bags(tuple(map(str, range(58))), lengths_S, 708, "ram", arrays)
    aucs = []
    for seed in range(3):
        test_RS = np.zeros((5, 58), dtype=bool)
        for r, (_, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=seed).split(labels_S, labels_S)):
            test_RS[r, test] = True
        p_RSC = mean_logistic(Cohort(bags, labels_S, 2, ~test_RS, test_RS))
        aucs.append(roc_auc_score(labels_S, p_RSC[test_RS][np.argsort(np.nonzero(test_RS)[1]), 1]))
    assert np.mean(aucs) == pytest.approx(0.857, abs=0.006)


# --- beside a study's members ----------------------------------------------------------------------------------------


def test_rounds_are_members_with_the_same_roles():
    members = pd.DataFrame({"member": range(4), "seed": [0, 1, 0, 1]})
    roles_MS = np.array([[0, 2, 0], [0, 2, 0], [2, 0, 1], [2, 0, 1]], dtype=np.int8)
    first_R, round_M = rounds_of(Plan(members, roles_MS))
    assert len(first_R) == 2
    np.testing.assert_array_equal(roles_MS[first_R][round_M], roles_MS)


def test_certain_probabilities_have_logits():
    p_RSC = np.array([[[1.0, 0.0], [0.25, 0.75], [np.nan, np.nan]]])
    logits_S = as_logits(p_RSC)[0, :, 0]
    np.testing.assert_allclose(logits_S[:2], [-np.log(1e6), np.log(3)], rtol=1e-5)
    assert np.isnan(logits_S[2])
    assert as_logits(np.full((1, 2, 3), 1 / 3)).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.2, "better_than"),
        (-0.2, -0.01, "worse_than"),
        (-0.1, 0.2, "not_better_than"),
        (0.0, 0.2, "not_better_than"),
        (None, None, "unknown"),
    ],
)
def test_what_an_interval_says(low, high, expected):
    difference = {"low": low, "high": high}
    assert beside(difference) == expected
    rung = {"name": "x", "title": "the mean", "test": {"metrics": {"auc": {"value": 0.8}}, "difference": difference}}
    said = verdict([rung], "test")
    assert (said[expected], said["best"]) == (["x"], "x")
    lines = about_baselines({"aggregator": "abmil", "rungs": [rung], "verdict": {"test": said}})
    words = {"worse_than": "worse than", "not_better_than": "not shown to be better than"}
    assert lines == ([f"on the official test slides abmil is {words[expected]} the mean"] if expected in words else [])


def test_without_a_difference_nothing_is_known():
    assert beside(None) == "unknown"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, write_study, witness_arrays) -> tuple[Path, dict[str, int]]:
    """Two aggregators with a test split, and how often each rung was fitted."""
    folder, calls = tmp_path_factory.mktemp("ladder"), dict.fromkeys(RUNGS, 0)
    arrays, labels_S = witness_arrays(24, seed=4, strength=5.0)
    split = ["test" if s >= 18 else "train" for s in range(24)]
    data = write_study(folder / "features", arrays, np.array(["normal", "tumor"])[labels_S], split=split)

    def counted(name, title, probabilities):
        def call(cohort):
            calls[name] += 1
            return probabilities(cohort)

        return title, call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mil.report.page, "FIGURES", {})
        patch.setattr(mil.pipeline.baselines, "RUNGS", {n: counted(n, *rung) for n, rung in RUNGS.items()})
        settings = ["study.folds=3", "study.seeds=[0,1]", "train.epochs=1", "train.batch_size=5", "report.heatmaps=0"]
        arguments = [*data, *settings, "model.name=[mean,max]", "train.accelerator=cpu", "report.bootstrap=50"]
        assert main([*arguments, f"out={folder / 'run'}"]) == 0
    return folder / "run", calls


def test_the_ladder_is_fitted_once_for_all_aggregators(ran):
    folder, calls = ran
    assert set(calls.values()) == {1}
    mean, maximum = (json.loads((folder / name / METRICS).read_text())["baselines"] for name in ("mean", "max"))
    for a, b in zip(mean["rungs"], maximum["rungs"], strict=True):
        assert a["out_of_fold"]["metrics"] == b["out_of_fold"]["metrics"]
        assert a["out_of_fold"]["difference"] != b["out_of_fold"]["difference"]


def test_the_block_holds_paired_differences(ran):
    """Truth: scikit-learn's AUC of the aggregator's own out-of-fold and ensemble probabilities."""
    folder, _ = ran
    block = json.loads((folder / "max" / METRICS).read_text())["baselines"]
    slides = pd.read_csv(folder / "max" / "slides.csv")
    for where, kind, n in (("out_of_fold", "out-of-fold", 18), ("test", "test ensemble", 6)):
        own = slides[slides["kind"] == kind]
        auc = roc_auc_score(own["label"] == "tumor", own["p_1"])
        for rung in block["rungs"]:
            found = rung[where]
            assert found["counts"]["slides"] == n
            assert found["difference"]["auc_a"] == pytest.approx(auc)
            assert found["difference"]["difference"] == pytest.approx(auc - found["metrics"]["auc"]["value"])
            assert found["difference"]["trainings"] == 2, "both seeds, as the aggregator's"


def test_pages_say_where_the_aggregator_is_not_better(ran):
    folder, _ = ran
    page = (folder / "max" / "report.html").read_text()
    assert 'id="baselines"' in page
    verdicts = json.loads((folder / "max" / METRICS).read_text())["baselines"]["verdict"]
    not_better = any(v["not_better_than"] or v["worse_than"] for v in verdicts.values())
    assert ("max is not better than" in page) == not_better
    overview = (folder / "report.html").read_text()
    assert overview.count("mean of the tiles + logistic regression") == 1
    assert "max is</th>" in overview


def test_ladders_on_other_features_are_shown_apart():
    def study(auc: float, difference: float) -> dict:
        own = {"metrics": {"auc": {"value": auc}}, "difference": {"difference": difference}}
        return {"baselines": {"rungs": [{"name": "x", "title": "x", "test": own}]}}

    studies = {"a": study(0.7, 0.1), "b": study(0.7, 0.2), "c": study(0.6, 0.1), "d": {}}
    assert ladders_of(studies) == [("a", ["a", "b"]), ("c", ["c"])]


def test_baselines_can_be_left_out(studies):
    folder = studies("mean").folder
    assert "baselines" not in json.loads((folder / METRICS).read_text())
    assert 'id="baselines"' not in (folder / "report.html").read_text()


def test_a_run_from_before_there_were_baselines_is_continued(ran, capsys):
    """Its config.yaml does not have the key."""
    folder, _ = ran
    path = folder / "config.yaml"
    text = path.read_text()
    assert "  baselines: true\n" in text
    path.write_text(text.replace("  baselines: true\n", ""))
    assert main([f"config={path}", "resume=true"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main([f"config={path}", "resume=true", "report.baselines=false"]) == 2
    assert "report.baselines: was True, now False" in capsys.readouterr().err
