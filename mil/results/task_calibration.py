"""Predicted against observed for tasks other than classification.

- regression: the target's straight line on the prediction, ordinary least squares (statsmodels) with patients as
  clusters. Slope 1 and intercept 0 are right; a slope below 1 says that predictions are too far apart. The intercept is
  that of the target less the prediction: how much too low predictions are on average.
- ordinal: of every cut, the probability of a grade above it, as `mil.results.reliability` has it for a class.
- survival in discrete time: at every horizon, patients in groups of equal size by predicted share without an event,
  and Kaplan and Meier's share of each, with its log-log interval (D'Agostino and Nam 2003). A risk of Cox's model is an
  order, not a probability, so there is nothing to compare.

Axes: N rows (slides, or patients).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.regression.linear_model import OLS

from mil.results.reliability import bins_block, quantile_bins, slope_and_intercept, squared_error
from mil.results.task_summary import ensemble_parts, fold_parts
from mil.tasks.contract import Part, Task
from mil.tasks.estimates import LEVEL
from mil.tasks.metrics import METRICS
from mil.tasks.ordinal import above_cuts
from mil.tasks.survival import Survival

GROUPS, PATIENTS_A_GROUP = 4, 10
UNKNOWN: dict[str, Any] = {"value": None, "low": None, "high": None}


def task_calibration(
    task: Task, predictions: pd.DataFrame, training: pd.DataFrame | None = None
) -> dict[str, Any] | None:
    """What metrics.json holds as `task_calibration`; None where there is nothing to compare.

    training: where `predictions` are of new slides, those that the study trained on.
    """
    blocks = {}
    for name, parts_of in (("pooled_out_of_fold", fold_parts), ("test", ensemble_parts)):
        parts = parts_of(task, predictions, training)
        block = of_parts(task, parts) if parts else None
        if block is not None:
            blocks[name] = block
    return {"kind": task.name, "sets": blocks} if blocks else None


def of_parts(task: Task, parts: Sequence[Part]) -> dict[str, Any] | None:
    """Of one set of held-out rows."""
    table = pd.concat([part.table for part in parts], ignore_index=True)
    if not np.isfinite(task.one_number(table)).all():
        return None
    if task.name == "regression":
        return of_numbers(table)
    if isinstance(task, Survival):
        return of_shares(task, table) if task.discrete else None
    return of_cuts(task, table)


# --- numbers ---------------------------------------------------------------------------------------------------------


def of_numbers(table: pd.DataFrame) -> dict[str, Any]:
    """Slope and intercept with 95 % intervals, and bins of equally many slides: mean prediction and mean target."""
    truth_N, said_N = (table[name].to_numpy(dtype=np.float64) for name in ("value", "prediction"))
    patients_N = table["patient"].to_numpy(dtype=str)
    bin_N = quantile_bins(said_N)
    bins = []
    for b in np.unique(bin_N):
        own_N = bin_N == b
        errors = mean_of_values(truth_N[own_N], patients_N[own_N])
        bins.append({"prediction": float(said_N[own_N].mean()), "slides": int(own_N.sum()), **errors})
    varies = np.ptp(said_N) > 0
    return {
        "slope": coefficient(truth_N, np.column_stack([np.ones(len(said_N)), said_N]), patients_N)
        if varies
        else UNKNOWN | {"why": "all predictions are equal"},
        "intercept": coefficient(truth_N - said_N, np.ones((len(said_N), 1)), patients_N),
        "bins": bins,
    }


def coefficient(y_N: np.ndarray, x_NP: np.ndarray, patients_N: np.ndarray) -> dict[str, Any]:
    """The last coefficient with its interval (Student's t, a degree of freedom a patient but one)."""
    patient_N = np.unique(patients_N, return_inverse=True)[1]
    if patient_N.max() < x_NP.shape[1]:
        return UNKNOWN | {"why": "too few patients"}
    fitted = OLS(y_N, x_NP).fit(cov_type="cluster", cov_kwds={"groups": patient_N}, use_t=True)
    low, high = fitted.conf_int(1 - LEVEL)[-1].tolist()
    return {"value": float(fitted.params[-1]), "low": low, "high": high, "why": ""}


def mean_of_values(values_N: np.ndarray, patients_N: np.ndarray) -> dict[str, float | None]:
    """A mean with its interval, patients as clusters; no interval of one patient."""
    if len(np.unique(patients_N)) < 2:
        return {"value": float(values_N.mean()), "low": None, "high": None}
    found = coefficient(values_N, np.ones((len(values_N), 1)), patients_N)
    return {name: found[name] for name in ("value", "low", "high")}


# --- grades ----------------------------------------------------------------------------------------------------------


def of_cuts(task: Task, table: pd.DataFrame) -> dict[str, Any]:
    """Cut -> slope, intercept, calibration error with and without what chance adds, and the bins."""
    above_NC = above_cuts(table[task.columns()].to_numpy(dtype=np.float64))
    index = {name: k for k, name in enumerate(task.classes)}
    truth_N = table["label"].astype(str).map(index).to_numpy(dtype=np.int64)
    patients_N = table["patient"].to_numpy(dtype=str)
    found = {}
    for c, name in enumerate(task.classes[1:]):
        over_N, p_N = truth_N > c, above_NC[:, c].clip(0, 1)
        plain, debiased = squared_error(over_N, p_N, patients_N)
        found[name] = {
            **slope_and_intercept(over_N, p_N, patients_N),
            "ece": METRICS["ece"](over_N, p_N),
            "rms": plain**0.5,
            "rms_debiased": max(0.0, debiased) ** 0.5,
            "bins": bins_block(over_N, p_N, patients_N),
        }
    return {"cuts": found}


# --- times -----------------------------------------------------------------------------------------------------------


def of_shares(task: Survival, table: pd.DataFrame) -> dict[str, Any]:
    """Horizon -> groups of patients: mean predicted share without an event, and the observed one."""
    found = []
    for time in task.horizons:
        said_N = shares_at(task, table, time)
        n_groups = int(np.clip(len(table) // PATIENTS_A_GROUP, 1, GROUPS))
        edges = np.unique(np.quantile(said_N, np.linspace(0, 1, n_groups + 1)[1:-1]))
        group_N = np.searchsorted(edges, said_N, side="right")
        groups: list[dict[str, Any]] = [
            {
                "predicted": float(said_N[group_N == g].mean()),
                "patients": int((group_N == g).sum()),
                **observed_share(table[group_N == g], time),
            }
            for g in np.unique(group_N)
        ]
        whole = {"predicted": float(said_N.mean()), "patients": len(table), **observed_share(table, time)}
        found.append({"time": float(time), "all": whole, "groups": groups})
    return {"horizons": found}


def shares_at(task: Survival, table: pd.DataFrame, time: float) -> np.ndarray:
    """(N,): predicted share without an event at a time, between those at the times of the grid."""
    grid, shares_NG = task.grid(), table[[f"survival_{g}" for g in range(len(task.grid()))]].to_numpy(dtype=np.float64)
    return np.array([np.interp(time, grid, row_G) for row_G in shares_NG])


def observed_share(table: pd.DataFrame, time: float) -> dict[str, float | None]:
    """Kaplan and Meier's share at a time with its 95 % interval; None where nobody was followed as long."""
    from sksurv.nonparametric import kaplan_meier_estimator

    event_N, time_N = table["event"].to_numpy() == 1, table["time"].to_numpy(dtype=np.float64)
    if time_N.max() < time:
        return {"value": None, "low": None, "high": None}
    if not (event_N & (time_N <= time)).any():
        return {"value": 1.0, "low": None, "high": None}
    times, share, (low, high) = kaplan_meier_estimator(event_N, time_N, conf_type="log-log")
    at = int(np.searchsorted(times, time, side="right")) - 1
    ends = [float(x[at]) if np.isfinite(x[at]) else None for x in (low, high)]
    return {"value": float(share[at]), "low": ends[0], "high": ends[1]}
