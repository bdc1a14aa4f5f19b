"""Grades in an order: one score and ordered cuts (CORAL, Cao, Mirjalili, Raschka 2020, section 3.3).

Logit k is score - cut_k: the log-odds that the grade is above grade k. Cuts rise, so the probabilities never cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from extract.cohort import Cohort
from mil.tasks.contract import Facts, Measure, Part, Task, joined
from mil.tasks.estimates import Estimate, auc_interval, mean_interval, mean_of, proportion_interval
from mil.tasks.metrics import auc


class Ordinal(Task):
    """One output a member and K - 1 cuts; columns: a probability a grade, and the grade that is predicted."""

    name = "ordinal"
    main = "kappa"
    noun = "grade"
    targets = ("label",)
    metrics: Mapping[str, Measure] = MappingProxyType(
        {
            "kappa": Measure("quadratic weighted kappa", scale="fisher"),
            "accuracy": Measure("accuracy"),
            "within_one": Measure("within one grade"),
            "auc_of_cuts": Measure("macro AUC of the cuts"),
            "mae": Measure("mean distance in grades", higher_is_better=False, scale="log"),
        }
    )

    def n_outputs(self) -> int:
        return 1

    def facts(self, cohort: Cohort, train_MS: np.ndarray) -> Facts:
        """`cuts`, where training begins: the log-odds of how many training slides are above each grade, negated."""
        labels_S, n = cohort.labels_S, len(self.classes)
        above = [[(np.sum(labels_S[t] > k) + 0.5) / (t.sum() + 1) for k in range(n - 1)] for t in train_MS]
        return {"cuts": -logit(np.array(above))}

    def predicted(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.of_logits(logits_NC.astype(float))

    def of_logits(self, logits_NC: np.ndarray) -> dict[str, np.ndarray]:
        """logits (N, K - 1), as the members give them, and what they mean."""
        above_NC = expit(logits_NC)
        edges = np.concatenate([np.ones((len(above_NC), 1)), above_NC, np.zeros((len(above_NC), 1))], axis=1)
        p_NK = edges[:, :-1] - edges[:, 1:]
        return {f"p_{k}": p_NK[:, k] for k in range(p_NK.shape[1])}

    def columns(self) -> list[str]:
        return [f"p_{k}" for k in range(len(self.classes))]

    def for_reader(self, table: pd.DataFrame) -> pd.DataFrame:
        """Columns p_NAME of every grade, and predicted, the name of one."""
        p_NK = table[self.columns()].to_numpy(dtype=float)
        named = [
            self.classes[k] if np.isfinite(p_K).all() else None for k, p_K in zip(self.grade(p_NK), p_NK, strict=True)
        ]
        shown = {f"p_{name}": p_NK[:, k] for k, name in enumerate(self.classes)}
        return pd.DataFrame({**shown, "predicted": pd.Series(named, dtype=object)}).set_axis(table.index)

    def one_number(self, table: pd.DataFrame) -> np.ndarray:
        """The mean grade, the lowest being 0."""
        found: np.ndarray = table[self.columns()].to_numpy(dtype=float) @ np.arange(len(self.classes))
        return found

    def error(self, table: pd.DataFrame) -> np.ndarray:
        """Between the mean grade and the true one, in grades."""
        index = {name: float(k) for k, name in enumerate(self.classes)}
        truth_N = table["label"].map(index).to_numpy(dtype=float)
        found: np.ndarray = np.abs(self.one_number(table) - truth_N)
        return found

    def evidence(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray], target: str | None = None) -> np.ndarray:
        """Log-odds of at least the grade `target`; without one, the mean over all cuts."""
        cuts = slice(None) if target is None else [self.classes.index(target) - 1]
        found: np.ndarray = logits_NC[:, cuts].astype(float).mean(axis=1)
        return found

    def speaks_for(self, target: str | None = None) -> str:
        return "a higher grade" if target is None else f"at least {target}"

    def thresholds(self) -> tuple[str, ...]:
        return self.classes[1:]

    def said(self, row: Mapping[str, Any]) -> str:
        if row["predicted"] is None:
            return "no grade: not a number"
        return f"predicted {row['predicted']} (probability {row['p_' + row['predicted']]:.3f})"

    def truth(self, row: Mapping[str, Any]) -> str:
        return "" if pd.isna(row["label"]) else f"label {row['label']}"

    def units(self, table: pd.DataFrame) -> pd.DataFrame:
        p_NK = table[self.columns()].to_numpy(dtype=float)
        return table.assign(prediction=np.where(np.isfinite(p_NK).all(axis=1), self.grade(p_NK), np.nan))

    def grade(self, p_NK: np.ndarray) -> np.ndarray:
        """The number of cuts that are passed with a probability above one half (Cao et al., equation 4)."""
        passed: np.ndarray = (above_cuts(p_NK) > 0.5).sum(axis=1)
        return passed

    def score(
        self, parts: Sequence[Part], weights: Sequence[np.ndarray], names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        table, weights_RN = joined(parts, weights)
        index = {name: k for k, name in enumerate(self.classes)}
        truth_N = table["label"].astype(str).map(index).to_numpy(dtype=np.int64)
        found = ordinal_metrics(truth_N, table[self.columns()].to_numpy(dtype=float), weights_RN)
        return {name: found[name] for name in names or self.metrics}

    def estimates(self, parts: Sequence[Part]) -> dict[str, Estimate]:
        """Of all but kappa."""
        table = pd.concat([part.table for part in parts], ignore_index=True)
        p_NK, patients_N = table[self.columns()].to_numpy(dtype=float), table["patient"].to_numpy(dtype=str)
        index = {name: k for k, name in enumerate(self.classes)}
        truth_N = table["label"].astype(str).map(index).to_numpy(dtype=np.int64)
        if not np.isfinite(p_NK).all():
            return {}
        above_NC, most = above_cuts(p_NK), len(self.classes) - 1
        distance_N = np.abs(truth_N - (above_NC > 0.5).sum(axis=1)).astype(float)
        cuts = [auc_interval(truth_N > c, above_NC[:, c], patients_N) for c in range(most)]
        return {
            "accuracy": proportion_interval(distance_N == 0, patients_N),
            "within_one": proportion_interval(distance_N <= 1, patients_N),
            "auc_of_cuts": mean_of(cuts, patients_N),
            "mae": mean_interval(distance_N, patients_N, most=float(most)),
        }

    def extra(self, parts: Sequence[Part]) -> dict[str, Any]:
        table = pd.concat([part.table for part in parts], ignore_index=True)
        counts = pd.crosstab(table["label"].astype(str), table["prediction"])
        counts = counts.reindex(index=list(self.classes), columns=range(len(self.classes)), fill_value=0)
        return {"confusion": {"rows": "true grade", "columns": "predicted grade", "matrix": counts.to_numpy().tolist()}}

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        return {name: int((table["label"] == name).sum()) for name in self.classes}

    def about(self, cohort: Cohort) -> dict[str, Any]:
        return {"grades": list(self.classes)}


def above_cuts(p_NK: np.ndarray) -> np.ndarray:
    """(N, K - 1): the probability of a grade above each."""
    found: np.ndarray = np.cumsum(p_NK[:, ::-1], axis=1)[:, ::-1][:, 1:]
    return found


def ordinal_metrics(truth_N: np.ndarray, p_NK: np.ndarray, weights_RN: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric under every weighting, (R,) each.

    Kappa is undefined where truth and prediction are one and the same grade throughout, the macro AUC where a cut has
    no slide on one of its sides.
    """
    n = p_NK.shape[1]
    above_NC = above_cuts(p_NK)
    said_N = (above_NC > 0.5).sum(axis=1)
    total_R = weights_RN.sum(axis=1)
    k = np.arange(n)
    of_truth_RK, of_said_RK = (weights_RN @ (grade_N[:, None] == k) for grade_N in (truth_N, said_N))
    distance_N = np.abs(truth_N - said_N).astype(float)
    far_KK = (k[:, None] - k[None, :]) ** 2.0
    with np.errstate(invalid="ignore", divide="ignore"):
        expected_R = np.einsum("rk,kl,rl->r", of_truth_RK, far_KK, of_said_RK) / total_R
        observed_R = weights_RN @ distance_N**2
        kappa_R = np.where(expected_R > 0, 1 - observed_R / np.where(expected_R > 0, expected_R, 1), np.nan)
        each = [cut_auc(truth_N > c, above_NC[:, c], weights_RN) for c in range(n - 1)]
        return {
            "kappa": kappa_R,
            "accuracy": weights_RN @ (distance_N == 0) / total_R,
            "within_one": weights_RN @ (distance_N <= 1) / total_R,
            "auc_of_cuts": np.mean(each, axis=0),
            "mae": weights_RN @ distance_N / total_R,
        }


def cut_auc(above_N: np.ndarray, p_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """AUC of one cut, (R,); NaN where all or none are above it."""
    return auc(above_N, p_N, above_N, weights_RN)
