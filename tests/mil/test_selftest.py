"""The self-test's bags, its verdicts, and its command on a small scale."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mil.aggregators import AGGREGATORS
from mil.selftest import main
from mil.training.selftest import chance_error, run_bags, run_test, verdict
from mil.training.selftest_bags import POISONS, TESTS, SelftestConfig, make_test

CONFIG = SelftestConfig(train_bags=80, test_bags=60, background=6)


def has(bag_TD: np.ndarray, mean: float, tolerance: float = 0.25) -> np.ndarray:
    """Tiles whose features are all near `mean`: A is 2, C is 3, poison is -10."""
    return (np.abs(bag_TD - mean) < tolerance + 0.3).all(axis=1)


@pytest.mark.parametrize("test", TESTS)
def test_the_bags_are_what_the_paper_describes(test):
    bags, labels_S, training_S = make_test(test, CONFIG)
    assert training_S.sum() == 80
    assert labels_S[training_S].mean() == labels_S[~training_S].mean() == 0.5
    for bag_TD, label, training in zip(bags, labels_S, training_S, strict=True):
        assert bag_TD.dtype == np.float32
        n_poison, n_a, n_c = (int(has(bag_TD, mean).sum()) for mean in (-10, 2, 3))
        assert n_poison == (test != "frequency" and bool(label) != bool(training))
        if test == "two concepts":
            assert (1 <= n_a == n_c <= 3) if label else ((n_a == 0) != (n_c == 0) and n_a + n_c <= 3)
        if test == "frequency":
            expected = (1, 1) if training else (35, 44)
            assert (n_a == n_c == 1) if label else (min(n_a, n_c) == 0 and expected[0] <= max(n_a, n_c) <= expected[1])
        if test == "one concept":
            assert 7 <= len(bag_TD) - n_poison <= 9 if label else len(bag_TD) - n_poison == 6


def test_only_the_poison_depends_on_its_side():
    for test in TESTS:
        below, above = (make_test(test, CONFIG, side)[0] for side in (-10.0, 10.0))
        for bag_TD, other_TD in zip(below, above, strict=True):
            poison = has(bag_TD, -10)
            np.testing.assert_allclose(bag_TD[~poison], other_TD[~poison])
            np.testing.assert_allclose(bag_TD[poison] + 20, other_TD[poison], atol=1e-5)
    assert POISONS["one concept"] == (-10, 10)


def test_max_pooling_cannot_see_poison_below_everything_and_falls_for_it_above():
    """It passed when the poison lay below alone."""
    config = SelftestConfig(seeds=1, train_bags=120, test_bags=100, epochs=30, lr=1e-2, background=6)
    found = run_test("two concepts", "max", config)
    assert found.verdict == "fails"
    assert found.test_auc_M.mean() < 0.2
    below, _ = (run_bags(make_test("two concepts", config, side), "max", config) for side in (-10.0, 10.0))
    assert below[1].mean() > 0.5


def test_both_concepts_are_seen_alone_in_negative_bags():
    for test in ("two concepts", "frequency"):
        bags, labels_S, _ = make_test(test, CONFIG)
        alone = [has(bag_TD, 2).any() for bag_TD, label in zip(bags, labels_S, strict=True) if not label]
        assert 0.3 < np.mean(alone) < 0.7


def test_the_same_seed_makes_the_same_bags_and_another_one_others():
    first, again = (make_test("frequency", CONFIG)[0] for _ in range(2))
    other = make_test("frequency", CONFIG.model_copy(update={"seed": 1}))[0]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def aucs(test: str, score) -> tuple[float, float]:
    """Of a rule, in training and in the test."""
    bags, labels_S, training_S = make_test(test, CONFIG)
    scores_S = np.array([score(bag_TD) for bag_TD in bags])
    return tuple(float(roc_auc_score(labels_S[part], scores_S[part])) for part in (training_S, ~training_S))


def test_a_rule_that_respects_mil_solves_training_and_test():
    def both(bag_TD: np.ndarray) -> float:
        return float(has(bag_TD, 2).any() and has(bag_TD, 3).any())

    assert aucs("two concepts", both) == aucs("frequency", both) == (1.0, 1.0)

    def oddest(bag_TD: np.ndarray) -> float:  # likelihood ratio of the concepts against the background, poison ignored
        good = bag_TD[bag_TD.mean(axis=1) > -5]
        wide = (good**2 / 2 - good**2 / 18).sum(axis=1) - good.shape[1] * np.log(3)
        return float(np.maximum(wide, (good - 0.5).sum(axis=1)).max())

    assert min(aucs("one concept", oddest)) > 0.95


def test_a_shortcut_that_training_rewards_is_wrong_in_the_test():
    def no_poison(bag_TD: np.ndarray) -> float:
        return -float(has(bag_TD, -10).any())

    assert aucs("one concept", no_poison) == aucs("two concepts", no_poison) == (1.0, 0.0)

    def count(bag_TD: np.ndarray) -> float:
        return float(has(bag_TD, 2).sum() + has(bag_TD, 3).sum())

    assert aucs("frequency", count) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([1.0, 0.9], [0.9, 0.8], "passes"),
        ([1.0, 0.9], [0.9, 0.1], "fails"),
        ([1.0, 0.9], [0.9, 0.5], "inconclusive"),
        ([1.0, 0.5], [0.9, 0.9], "inconclusive"),
        ([0.5, 0.5], [0.1, 0.1], "inconclusive"),
    ],
)
def test_verdicts(train, test, expected):
    assert verdict(np.array(train), np.array(test), 300, 200) == expected


def test_chance_error_is_that_of_random_scores():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    found = [roc_auc_score(labels, rng.random(60)) for _ in range(400)]
    assert np.std(found) == pytest.approx(chance_error(60), rel=0.1)


def test_the_command_prints_a_table_and_writes_it(tmp_path, capsys):
    """Evidence passes what the mean, which can be outvoted, fails."""
    out = tmp_path / "selftest.md"
    small = ["aggregators=[evidence,mean]", "seeds=2", "train_bags=120", "test_bags=100", "epochs=25", "lr=1e-2"]
    assert main([*small, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("|")}
    assert next(iter(rows)) == "aggregator"
    assert rows["evidence"].count("passes") >= 2
    assert "fails" not in rows["evidence"]
    assert rows["mean"].count("fails") >= 2
    assert "of 2 seeds; poison at -10 and at +10" in printed
    assert "120 training and 100 test bags" in printed
    assert printed.strip() in out.read_text()


def test_strict_makes_a_failure_an_error(capsys):
    small = ["aggregators=[mean]", "seeds=1", "train_bags=60", "test_bags=60", "epochs=20", "lr=1e-2"]
    assert main([*small, "strict=true"]) == 1
    assert "fails" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["aggregators=[abml]", "aggregators=[]", "seeds=0", "sedes=3"])
def test_wrong_arguments_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([argument, "epochs=-1"])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert argument.partition("=")[0] in printed
    assert "epochs" in printed, "all problems at once"
    if "abml" in argument:
        assert "did you mean 'abmil'" in printed


def test_a_torchmil_model_is_tested_or_refused(capsys):
    pytest.importorskip("torchmil")
    assert main(["aggregators=[torchmil:SmABMIL]"]) == 2
    assert "needs adj" in capsys.readouterr().err
    assert main(["aggregators=[torchmil:ABMIL]", "seeds=1", "train_bags=20", "test_bags=20", "epochs=1"]) == 0
    assert "| torchmil:ABMIL |" in capsys.readouterr().out


def test_every_aggregator_is_tested_unless_told_otherwise():
    assert SelftestConfig().aggregators == list(AGGREGATORS)
