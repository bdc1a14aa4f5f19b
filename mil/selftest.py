"""python -m mil.selftest [key=value ...]

Three algorithmic unit tests of what an aggregator takes for evidence (Raff and Holt, NeurIPS 2023, algorithms 1 to 3).
Bags are made up so that a rule which respects multiple-instance learning ("a tile can make a slide positive, none can
make it negative") solves training and test, and a shortcut that only training rewards is wrong in the test:

    one concept    positive bags hold 1 to 3 tiles of a concept; training hides an obvious poison tile in negative
                   bags, the test in positive ones
    two concepts   positive only with tiles A and C together, negative bags hold one of them; poison as above
    frequency      positive with one A and one C; negative bags hold one tile of one concept in training, 35 to 44 of it
                   in the test

All seeds of an aggregator train as members in one pass. A seed passes a test when its training and test AUC are clearly
above 0.5 (three standard errors of chance), and fails when the test AUC is clearly below although training is clearly
above. An aggregator passes when every seed passes, fails when at least one fails, and is inconclusive otherwise.
It is a diagnostic: most published aggregators fail at least one, also in the paper.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from extract.config import Section, config_from_command_line, tell
from extract.ending import ended
from extract.lock import only_command_in
from mil.aggregators import AGGREGATORS, aggregator_class
from mil.config import Train, model_problems

WIDTHS: dict[str, dict[str, Any]] = {
    "clam_sb": {"hidden": 64, "attention": 32},
    "dtfd": {"hidden": 64, "attention": 32},
    "transmil": {"hidden": 64, "heads": 4, "landmarks": 32},
    "hipt_mil": {"hidden": 48, "mlp": 48, "attention": 32},
    "transformer": {"hidden": 64, "induced": 16, "mlp": 128, "attention": 32},
}
"""Narrower than for slides: the tiles here have a few features. All else is the aggregator's default."""


class SelftestConfig(Section):
    """Everything `python -m mil.selftest` can be told."""

    aggregators: list[str] = Field(list(AGGREGATORS), min_length=1, description="which ones; also torchmil:NAME")
    seeds: int = Field(5, ge=1, description="initialisations of each aggregator, trained together")
    seed: int = Field(0, ge=0, description="of the bags and of the initialisations")
    dim: int = Field(16, ge=2, description="features of a tile")
    train_bags: int = Field(300, ge=20, description="bags to train on, half of them positive")
    test_bags: int = Field(200, ge=20, description="bags to test on, half of them positive")
    background: int = Field(10, ge=1, description="one concept: background tiles of a bag")
    epochs: int = Field(20, ge=1, description="epochs")
    lr: float = Field(5e-3, gt=0, description="learning rate")
    batch_size: int = Field(16, ge=1, description="bags in a batch")
    strict: bool = Field(False, description="exit code 1 if an aggregator fails a test")
    out: Path | None = Field(None, description="also write the table to this Markdown file")


# --- bags ------------------------------------------------------------------------------------------------------------


class Tiles:
    """Draws tiles (n, D); a new one for each set of bags."""

    def __init__(self, rng: np.random.Generator, dim: int):
        self.rng, self.dim = rng, dim

    def normal(self, n: int, mean: float, deviation: float) -> np.ndarray:
        return self.rng.normal(mean, deviation, (n, self.dim))

    def background(self, n: int) -> np.ndarray:
        return self.normal(n, 0, 1)

    def poison(self, n: int) -> np.ndarray:
        return self.normal(n, -10, 0.1)

    def a(self, n: int) -> np.ndarray:
        return self.normal(n, 2, 0.1)

    def c(self, n: int) -> np.ndarray:
        return self.normal(n, 3, 0.1)

    def one_of_two(self, n: int) -> np.ndarray:
        return self.a(n) if self.rng.random() < 0.5 else self.c(n)

    def few(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.rng.integers(low, high + 1))


def one_concept(tiles: Tiles, positive: bool, training: bool, background: int) -> list[np.ndarray]:
    """Algorithm 1: concept tiles are N(0, 3) or N(1, 1)."""
    parts = [tiles.background(background)]
    if positive:
        kinds = [(0, 3) if tiles.rng.random() < 0.5 else (1, 1) for _ in range(tiles.few(1, 3))]
        parts += [tiles.normal(1, mean, deviation) for mean, deviation in kinds]
    return [*parts, tiles.poison(int(positive != training))]


def two_concepts(tiles: Tiles, positive: bool, training: bool, background: int) -> list[np.ndarray]:
    """Algorithm 2: 1 to 3 tiles of A and as many of C, or as many of only one of them."""
    k = tiles.few(1, 3)
    concepts = [tiles.a(k), tiles.c(k)] if positive else [tiles.one_of_two(k)]
    return [tiles.background(tiles.few(1, 9)), *concepts, tiles.poison(int(positive != training))]


def frequency(tiles: Tiles, positive: bool, training: bool, background: int) -> list[np.ndarray]:
    """Algorithm 3: how many tiles there are of a concept says nothing."""
    copies = 1 if training else tiles.few(35, 44)
    concepts = [tiles.a(1), tiles.c(1)] if positive else [tiles.one_of_two(copies)]
    return [tiles.background(tiles.few(1, 9)), *concepts]


TESTS: dict[str, Callable[[Tiles, bool, bool, int], list[np.ndarray]]] = {
    "one concept": one_concept,
    "two concepts": two_concepts,
    "frequency": frequency,
}


def make_test(name: str, config: SelftestConfig) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Bags (T, D) float32, label of each (0 or 1), and whether it is for training."""
    training_S = np.arange(config.train_bags + config.test_bags) < config.train_bags
    labels_S = np.arange(len(training_S)) % 2
    rng = np.random.default_rng([config.seed, list(TESTS).index(name)])
    tiles = Tiles(rng, config.dim)
    bags = []
    for label, training in zip(labels_S, training_S, strict=True):
        bag_TD = np.concatenate(TESTS[name](tiles, bool(label), bool(training), config.background))
        bags.append(rng.permutation(bag_TD).astype(np.float32))
    return bags, labels_S.astype(np.int64), training_S


# --- training and verdict --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """AUCs of every seed (M members) of one aggregator in one test, and what they mean."""

    train_auc_M: np.ndarray
    test_auc_M: np.ndarray
    verdict: str

    def __str__(self) -> str:
        return f"{self.verdict} ({self.train_auc_M.mean():.2f} / {self.test_auc_M.mean():.2f})"


def auc_or_nan(labels_N: np.ndarray, logits_N: np.ndarray) -> float:
    """NaN: the member diverged."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels_N, logits_N)) if np.isfinite(logits_N).all() else float("nan")


def verdict(train_auc_M: np.ndarray, test_auc_M: np.ndarray, n_train: int, n_test: int) -> str:
    """passes, fails, inconclusive (see the top of this file) or diverged; n: bags behind the AUCs, half positive."""
    if np.isnan(test_auc_M).any():
        return "diverged"
    learned_M = train_auc_M > 0.5 + 3 * chance_error(n_train)
    margin = 3 * chance_error(n_test)
    if (learned_M & (test_auc_M < 0.5 - margin)).any():
        return "fails"
    return "passes" if (learned_M & (test_auc_M > 0.5 + margin)).all() else "inconclusive"


def chance_error(n_bags: int) -> float:
    """Standard deviation of the AUC of a rule that knows nothing, n / 2 bags of each class (Mann and Whitney 1947)."""
    per_class = n_bags / 2
    return math.sqrt((2 * per_class + 1) / (12 * per_class**2))


def new_aggregator(name: str, config: SelftestConfig) -> Any:
    """A member for every seed."""
    seeds = [1000 * config.seed + i for i in range(config.seeds)]
    return aggregator_class(name)(config.dim, 1, seeds, **WIDTHS.get(name, {}))


def run_test(test: str, aggregator: str, config: SelftestConfig) -> Result:
    """Train every seed of the aggregator together on one test's bags, on the CPU."""
    import torch

    from mil.training.bags import Bags
    from mil.training.module import Members, MembersModule, fit, predict_logits

    arrays, labels_S, training_S = make_test(test, config)
    tiles_TD, lengths = torch.from_numpy(np.concatenate(arrays)), [len(array) for array in arrays]
    names = tuple(f"bag_{i}" for i in range(len(arrays)))
    bags = Bags(names, np.array(lengths), config.dim, "ram", tiles_TD.split(lengths))
    model = new_aggregator(aggregator, config)
    train_MS = np.tile(training_S, (config.seeds, 1))
    per_member = (np.full(config.seeds, config.lr), np.zeros(config.seeds))
    members = Members(*per_member, train_MS, np.zeros_like(train_MS))
    settings = Train(epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, accelerator="cpu")
    module = MembersModule(model, bags, labels_S, 2, members, settings, seed=config.seed)
    fit(module, progress=False)
    logits_MS = predict_logits(module, list(range(len(bags))))[:, :, 0]
    train_auc_M, test_auc_M = (
        np.array([auc_or_nan(labels_S[part_S], logits_S[part_S]) for logits_S in logits_MS])
        for part_S in (training_S, ~training_S)
    )
    judged = verdict(train_auc_M, test_auc_M, config.train_bags, config.test_bags)
    return Result(train_auc_M, test_auc_M, judged)


# --- output ----------------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Result]]) -> str:
    """Markdown that reads well in a terminal: a row an aggregator, verdict (train AUC / test AUC) for each test."""
    rows = [["aggregator", *TESTS], *([name, *map(str, found.values())] for name, found in results.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def note(config: SelftestConfig) -> str:
    """What the numbers are, for below the table."""
    return (
        f"verdict (training AUC / test AUC), means of {config.seeds} seeds; {config.train_bags} training and "
        f"{config.test_bags} test bags, {config.dim} features, {config.epochs} epochs"
    )


def problems(tree: dict[str, Any]) -> list[str]:
    """Names that are neither in the table nor torchmil's."""
    names = tree.get("aggregators")
    if not isinstance(names, list) or not names:
        return []  # the section itself reports it
    return [problem.replace("model.name", "aggregators", 1) for problem in model_problems({"name": names})]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 something fails and strict=true, 2 the arguments are wrong, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    defaults = ["strict=false"]  # without arguments there would be help
    config = config_from_command_line(SelftestConfig, arguments or defaults, __doc__ or "", also=problems)

    def run() -> int:
        with only_command_in(config.out, "mil.selftest") if config.out else nullcontext():
            return run_tests(config, " ".join(["python -m mil.selftest", *arguments]))

    return ended(run, interrupted=lambda: "Interrupted; nothing was written.")


def run_tests(config: SelftestConfig, command: str) -> int:
    """All tests of all aggregators, printed and written; the exit code."""
    for name in config.aggregators:
        try:
            new_aggregator(name, config)
        except ValueError as error:  # such as a torchmil model that needs more than features
            tell(error)
            return 2
    results: dict[str, dict[str, Result]] = {}
    for name in config.aggregators:
        results[name] = {}
        for test in TESTS:
            results[name][test] = run_test(test, name, config)
            print(f"{name}, {test}: {results[name][test]}", file=sys.stderr, flush=True)
    text = f"{table(results)}\n\n{note(config)}"
    print(text)
    if config.out:
        from extract.features.cache import write_whole

        write_whole(config.out, f"`{command}`\n\n{text}\n")
    failed = any(result.verdict == "fails" for found in results.values() for result in found.values())
    return 1 if failed and config.strict else 0


if __name__ == "__main__":
    sys.exit(main())
