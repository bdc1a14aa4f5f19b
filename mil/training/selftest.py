"""Aggregators trained on the made-up bags of `mil.training.selftest_bags`, and what their AUCs mean.

Letters: M members (seeds), S bags, T tiles, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from mil.aggregators import aggregator_class
from mil.config import Train
from mil.training.bags import Bags
from mil.training.module import Members, MembersModule, fit, predict_logits
from mil.training.selftest_bags import POISONS, TESTS, SelftestConfig, make_test

WIDTHS: dict[str, dict[str, Any]] = {
    "clam_sb": {"hidden": 64, "attention": 32},
    "dtfd": {"hidden": 64, "attention": 32},
    "transmil": {"hidden": 64, "heads": 4, "landmarks": 32},
    "hipt_mil": {"hidden": 48, "mlp": 48, "attention": 32},
    "transformer": {"hidden": 64, "induced": 16, "mlp": 128, "attention": 32},
}
"""Narrower than for slides: the tiles here have a few features. All else is the aggregator's default."""


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
    return float(roc_auc_score(labels_N, logits_N)) if np.isfinite(logits_N).all() else float("nan")


def verdict(train_auc_M: np.ndarray, test_auc_M: np.ndarray, n_train: int, n_test: int) -> str:
    """passes, fails, inconclusive (see mil.selftest) or diverged; n: bags behind the AUCs, half of them positive."""
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
    """One test with its poison on either side; the AUCs are those of the side where the test AUC is lower."""
    found = [run_bags(make_test(test, config, poison), aggregator, config) for poison in POISONS[test]]
    train_auc_M, test_auc_M = (np.concatenate(parts) for parts in zip(*found, strict=True))
    judged = verdict(train_auc_M, test_auc_M, config.train_bags, config.test_bags)
    return Result(*min(found, key=lambda both: float(both[1].mean())), judged)


def run_bags(
    made: tuple[list[np.ndarray], np.ndarray, np.ndarray], aggregator: str, config: SelftestConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Train every seed of the aggregator together on these bags, on the CPU: training and test AUC (M,) each."""
    arrays, labels_S, training_S = made
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
    return train_auc_M, test_auc_M


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
        f"verdict (training AUC / test AUC), means of {config.seeds} seeds; poison at -10 and at +10, the AUCs of the "
        f"worse; {config.train_bags} training and {config.test_bags} test bags, {config.dim} features, "
        f"{config.epochs} epochs"
    )
