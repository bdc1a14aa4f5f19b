"""The overview of many targets: how many slides each had, what was reached, and p values corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from mil.results.subgroups import holm_of

CHANCE = {"auc": 0.5, "c_harrell": 0.5}
"""What the main metric of a task is without any skill; 0 for correlations and kappa."""
Z_95 = NormalDist().inv_cdf(0.975)
P_VALUES = (
    "p: two-sided, whether the main metric differs from its value without skill, by a normal approximation from its "
    "95 % interval over patients; Holm's correction (1979) multiplies for the number of comparisons, so that the "
    "chance of any false finding among them stays below the level that it is compared with"
)


def targets_table(metrics: Mapping[str, Mapping[str, dict[str, Any]]]) -> pd.DataFrame:
    """One row a target and aggregator.

    Columns: target, aggregator, slides (labelled), unlabelled, patients (held out, labelled), per_class (`neg 40, pos
    12`), folds_mean, folds_sd, set (`out-of-fold`, or `test` where nothing was cross-validated), value, low, high (95
    %), p, p_holm (over all rows that have a p), test, test_low, test_high.

    Args:
        metrics: by aggregator, then by target, as metrics.json holds them.
    """
    rows = [row_of(target, name, m) for name, own in metrics.items() for target, m in own.items()]
    order = {target: i for i, target in enumerate(next(iter(metrics.values())))}
    rows.sort(key=lambda row: order[row["target"]])
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"].to_numpy(dtype=float)))


def row_of(target: str, name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """What `targets_table` says of one target and aggregator, from its metrics.json."""
    main, counts, folds = main_of(metrics), metrics["counts"]["all"], metrics["cross_validation"]
    of_folds, of_test = metrics["pooled_out_of_fold"], (metrics["test"] or {}).get("ensemble")
    block = of_folds or of_test
    number = block["metrics"][main] if block else {"value": None, "low": None, "high": None}
    tested = of_test["metrics"][main] if of_test else {"value": None, "low": None, "high": None}
    spread = folds["metrics"][main] if folds else {"mean": None, "sd": None}
    kinds = counts.get("slides_per_class") or counts.get("target") or {}
    return {
        "target": target,
        "aggregator": name,
        "slides": counts["slides"] - counts["unlabelled"],
        "unlabelled": counts["unlabelled"],
        "patients": block["counts"]["patients"] if block else 0,
        "per_class": ", ".join(f"{kind} {n:,}" for kind, n in kinds.items()),
        "folds_mean": spread["mean"],
        "folds_sd": spread["sd"],
        "set": "out-of-fold" if of_folds else "test",
        **{key: number[key] for key in ("value", "low", "high")},
        "p": p_of(number, CHANCE.get(main, 0.0)),
        "p_holm": None,
        **{f"test{end}": tested[key] for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))},
    }


def main_of(metrics: Mapping[str, Any]) -> str:
    """The metric that a study is judged by."""
    return str(metrics["task"]["main"]) if "metric_titles" in metrics else "auc"


def p_of(number: Mapping[str, Any], chance: float) -> float | None:
    """Two-sided p of `value` against `chance`, from the half of its interval that looks that way; None without one."""
    value, low, high = number["value"], number["low"], number["high"]
    if value is None or low is None or high is None:
        return None
    half = value - low if value >= chance else high - value
    if half <= 0:  # an interval without width says nothing of chance
        return None
    return float(2 * NormalDist().cdf(-abs(value - chance) * Z_95 / half))


def holm(p_N: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values, NaN where there is none; those do not count as comparisons."""
    adjusted_N = np.full(len(p_N), np.nan)
    known_N = np.isfinite(p_N)
    adjusted_N[known_N] = holm_of(p_N[known_N].tolist())
    return adjusted_N


def comparisons(p_N: Sequence[float]) -> int:
    """How many p values there are."""
    return int(np.isfinite(np.asarray(p_N, dtype=float)).sum())
