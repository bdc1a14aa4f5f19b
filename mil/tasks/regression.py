"""A number: its target is standardised on each member's training slides, its prediction is in the target's unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from mil.config import Task as TaskConfig
from mil.study.roles import free_slides, patient_index
from mil.tasks.contract import Facts, Measure, Part, Task, joined
from mil.tasks.estimates import Estimate, auc_interval, mean_interval
from mil.tasks.metrics import auc

STRATA = 5
"""Folds are stratified by fifths of the target, by fewer parts where patients are few."""


class Regression(Task):
    """One output a member, standardised; `value` is output * sd + mean."""

    name = "regression"
    main = "pearson"
    targets = ("value",)
    metrics: Mapping[str, Measure] = MappingProxyType(
        {
            "pearson": Measure("Pearson's r", scale="fisher"),
            "spearman": Measure("Spearman's rho", scale="fisher"),
            "r2": Measure("R²", scale="rest"),
            "mae": Measure("mean absolute error", higher_is_better=False, scale="log"),
            "rmse": Measure("root mean square error", higher_is_better=False, scale="log"),
        }
    )

    def __init__(self, config: TaskConfig, classes: Sequence[str] = ()):
        super().__init__(config, classes)
        if config.cut is not None:
            self.metrics = {**self.metrics, "auc_at_cut": Measure(f"AUC for at least {config.cut:g}")}

    def n_outputs(self) -> int:
        return 1

    def strata(self, cohort: Cohort, folds: int) -> Cohort:
        """Fifths of the patients' mean target, so many that each has a patient for every fold."""
        value_S, patient_S = cohort.table["value"].to_numpy(dtype=float), patient_index(cohort)[1]
        free_S = free_slides(cohort)
        if not free_S.any():
            return cohort
        of_patient = pd.Series(value_S[free_S]).groupby(patient_S[free_S]).mean()
        n = int(np.clip(len(of_patient) // max(folds, 1), 1, STRATA))
        edges = np.unique(np.quantile(of_patient, np.arange(1, n) / n))
        mean_S = pd.Series(value_S).groupby(patient_S).transform("mean").to_numpy()
        stratum_S = np.where(np.isnan(value_S), -1, np.searchsorted(edges, mean_S, side="left"))
        kept, stratum_S = np.unique(stratum_S[free_S]), stratum_S.copy()
        stratum_S = np.where(stratum_S < 0, -1, np.clip(np.searchsorted(kept, stratum_S), 0, len(kept) - 1))
        return cohort.stratified(stratum_S, [f"target part {i + 1} of {len(kept)}" for i in range(len(kept))])

    def facts(self, cohort: Cohort, train_MS: np.ndarray) -> Facts:
        value_S = cohort.table["value"].to_numpy(dtype=float)
        means = np.array([value_S[train_S].mean() for train_S in train_MS])
        sds = np.array([value_S[train_S].std() for train_S in train_MS])
        return {"mean": means, "sd": np.where(sds > 0, sds, 1.0)}

    def predicted(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"prediction": logits_NC[:, 0].astype(float) * facts["sd"] + facts["mean"]}

    def columns(self) -> list[str]:
        return ["prediction"]

    def for_reader(self, table: pd.DataFrame) -> pd.DataFrame:
        return table[self.columns()]

    def one_number(self, table: pd.DataFrame) -> np.ndarray:
        return table["prediction"].to_numpy(dtype=float)

    def error(self, table: pd.DataFrame) -> np.ndarray:
        found: np.ndarray = (table["prediction"] - table["value"]).abs().to_numpy(dtype=float)
        return found

    def evidence(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray], target: str | None = None) -> np.ndarray:
        """The prediction less the mean of the member's training slides, in the target's unit."""
        found: np.ndarray = logits_NC[:, 0].astype(float) * facts["sd"]
        return found

    def speaks_for(self, target: str | None = None) -> str:
        return "a higher value"

    def said(self, row: Mapping[str, Any]) -> str:
        unit = f" {self.config.unit}" if self.config.unit else ""
        cut = self.config.cut
        side = "" if cut is None else f" ({'at least' if row['prediction'] >= cut else 'below'} {cut:g})"
        return f"prediction {row['prediction']:.4g}{unit}{side}"

    def truth(self, row: Mapping[str, Any]) -> str:
        return "" if pd.isna(row["value"]) else f"target {row['value']:.4g}"

    def score(
        self, parts: Sequence[Part], weights: Sequence[np.ndarray], names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Predictions of all folds are in the target's unit, so they are pooled as they are."""
        table, weights_RN = joined(parts, weights)
        truth, said = (table[name].to_numpy(dtype=float) for name in ("value", "prediction"))
        found = regression_metrics(truth, said, weights_RN, self.config.cut)
        return {name: found[name] for name in names or self.metrics}

    def estimates(self, parts: Sequence[Part]) -> dict[str, Estimate]:
        """Of the errors, and of the AUC."""
        table = pd.concat([part.table for part in parts], ignore_index=True)
        truth, said = (table[name].to_numpy(dtype=float) for name in ("value", "prediction"))
        if not np.isfinite(said).all():
            return {}
        found = error_intervals(said - truth, table["patient"].to_numpy(dtype=str))
        if self.config.cut is not None:
            found["auc_at_cut"] = auc_interval(truth >= self.config.cut, said, table["patient"].to_numpy(dtype=str))
        return found

    def about(self, cohort: Cohort) -> dict[str, Any]:
        value = cohort.table["value"].dropna()
        ends = {"min": float(value.min()), "mean": float(value.mean()), "max": float(value.max())}
        return {"unit": self.config.unit, "cut": self.config.cut, "target": ends}


def error_intervals(error_N: np.ndarray, patients_N: np.ndarray) -> dict[str, Estimate]:
    """Mean absolute and root mean square error, from means of at least 0 (`mean_interval`)."""
    square = mean_interval(error_N**2, patients_N)
    found = {"mae": mean_interval(np.abs(error_N), patients_N)}
    if square.value is not None and square.low is not None and square.high is not None:
        root = [limit**0.5 for limit in (square.value, square.low, square.high)]
        influence_N = square.influence_S / (2 * root[0])
        found["rmse"] = Estimate(root[0], root[1], root[2], "root", influence_N, square.patients)
    return found


def regression_metrics(
    truth_N: np.ndarray, said_N: np.ndarray, weights_RN: np.ndarray, cut: float | None
) -> dict[str, np.ndarray]:
    """Every metric under every weighting, (R,) each; NaN where the target or the prediction does not vary.

    R2 is against the mean of the weighted targets, as scikit-learn's; Spearman's rho is Pearson's r of the midranks
    that each weighting gives.
    """
    total_R = weights_RN.sum(axis=1)
    error_N = said_N - truth_N
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_R = weights_RN @ truth_N / total_R
        spread_R = (weights_RN * (truth_N - mean_R[:, None]) ** 2).sum(axis=1)
        squares_R = weights_RN @ error_N**2
        found = {
            "pearson": correlation(truth_N, said_N, weights_RN),
            "spearman": correlation(midranks(truth_N, weights_RN), midranks(said_N, weights_RN), weights_RN),
            "r2": np.where(spread_R > 0, 1 - squares_R / np.where(spread_R > 0, spread_R, 1), np.nan),
            "mae": weights_RN @ np.abs(error_N) / total_R,
            "rmse": np.sqrt(squares_R / total_R),
        }
    high_N = np.zeros(len(truth_N), dtype=bool) if cut is None else truth_N >= cut
    found["auc_at_cut"] = auc(high_N, said_N, high_N, weights_RN)
    return found


def correlation(x: np.ndarray, y: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Weighted Pearson correlation, (R,); x and y are (N,) or (R, N). NaN where one of them does not vary."""
    total_R1 = weights_RN.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        x_RN, y_RN = (v - (weights_RN * v).sum(axis=1, keepdims=True) / total_R1 for v in (x, y))
        xx_R, yy_R, xy_R = ((weights_RN * product).sum(axis=1) for product in (x_RN**2, y_RN**2, x_RN * y_RN))
        scale_R = np.sqrt(xx_R * yy_R)
        found: np.ndarray = np.where(scale_R > 1e-12 * total_R1[:, 0], xy_R / scale_R, np.nan)
    return found


def midranks(values_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """(R, N): the rank of every row where each counts as often as its weight, ties their middle."""
    _, group_N = np.unique(values_N, return_inverse=True)
    sums_RG = np.zeros((len(weights_RN), int(group_N.max(initial=-1)) + 1))
    np.add.at(sums_RG.T, group_N, weights_RN.T)
    below_RG = np.cumsum(sums_RG, axis=1) - sums_RG
    ranks: np.ndarray = (below_RG + (sums_RG + 1) / 2)[:, group_N]
    return ranks
