"""Time to an event: a risk, from Cox's partial likelihood or from discrete time; metrics by scikit-survival.

A patient is what is counted: the risk of its slides is averaged first. Risks of different members are not on one scale.
Each is therefore also written as `standing`: the risk less the median risk of the member's own training patients, in
their standard deviations. Above 0 is the high-risk group: the split is the training patients', never that of the
evaluated ones. C-indices of several folds compare patients within a fold only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.special import expit

from extract.cohort import Cohort
from extract.config import ConfigError
from mil.config import Task as TaskConfig
from mil.study.roles import free_slides, patient_index
from mil.tasks.contract import Facts, Measure, Part, Task
from mil.tasks.estimates import Estimate, c_index_interval

GRID = 12
"""Times at which the Brier score is taken, between the first and the last horizon."""


LOW, HIGH = "low risk", "high risk"


class Survival(Task):
    """Cox: one output, the log hazard ratio. Discrete: one output a time interval, the log-odds of its hazard."""

    name = "survival"
    main = "c_harrell"
    noun = "risk"
    targets = ("time", "event")

    def __init__(self, config: TaskConfig, classes: Sequence[str] = ()):
        super().__init__(config, classes)
        self.discrete = config.loss == "discrete"
        self.horizons = list(config.horizons)
        unit = f" {config.unit}" if config.unit else ""
        self.metrics = {"c_harrell": Measure("Harrell's C"), "c_uno": Measure("Uno's C")}
        self.metrics |= {f"auc_{i}": Measure(f"AUC at {time:g}{unit}") for i, time in enumerate(self.horizons)}
        if self.discrete:
            self.metrics["brier"] = Measure("integrated Brier score", higher_is_better=False, scale="log")
        self.slow = tuple(name for name in self.metrics if name != "c_harrell")

    def for_cohort(self, cohort: Cohort) -> Self:
        """Horizons that the config leaves open: quartiles of the event times outside the test split."""
        if find_spec("sksurv") is None:
            raise ConfigError(
                "a package is missing",
                ["task=survival needs scikit-survival, which is not installed; pip install 'slide-mil[survival]'"],
            )
        table = cohort.table[free_slides(cohort)]
        times = table["time"][table["event"] == 1]
        horizons = self.config.horizons or np.unique(np.quantile(times, [0.25, 0.5, 0.75])).tolist()
        return type(self)(self.config.model_copy(update={"horizons": horizons}), cohort.classes)

    def n_outputs(self) -> int:
        return self.config.intervals if self.discrete else 1

    def strata(self, cohort: Cohort, folds: int) -> Cohort:
        """Events and censored; all as one where fewer patients than folds are censored."""
        patient_S, labels_S, free_S = patient_index(cohort)[1], cohort.labels_S, free_slides(cohort)
        n_censored = len(np.unique(patient_S[free_S & (labels_S == 0)]))
        if n_censored >= folds:
            return cohort
        return cohort.stratified(np.where(labels_S < 0, -1, 0), ["all"])

    def facts(self, cohort: Cohort, train_MS: np.ndarray) -> Facts:
        """Of discrete time: `edges` (M, K - 1), quantiles of the training patients' event times, and `end` (M,)."""
        if not self.discrete:
            return {}
        table, shares = cohort.table, np.arange(1, self.config.intervals) / self.config.intervals
        edges, ends = [], []
        for train_S in train_MS:
            patients = table[train_S].drop_duplicates("patient")
            edges.append(np.quantile(patients["time"][patients["event"] == 1], shares))
            ends.append(float(patients["time"].max()))
        return {"edges": np.array(edges), "end": np.array(ends)}

    def facts_after(self, cohort: Cohort, train_MS: np.ndarray, logits_MSC: np.ndarray, facts: Facts) -> Facts:
        """`risk_median` and `risk_sd` of each member's training patients."""
        patient_S = patient_index(cohort)[1]
        found = []
        for train_S, logits_SC in zip(train_MS, logits_MSC, strict=True):
            risk_P = pd.Series(self.risk(logits_SC[train_S])).groupby(patient_S[train_S]).mean()
            spread = float(risk_P.std(ddof=0))
            found.append((float(risk_P.median()), spread if spread > 0 else 1.0))
        return facts | {"risk_median": np.array(found)[:, 0], "risk_sd": np.array(found)[:, 1]}

    def risk(self, logits_NC: np.ndarray) -> np.ndarray:
        """(N,): the log hazard ratio; of discrete time minus the sum of the survival at the intervals' ends."""
        if not self.discrete:
            return logits_NC[:, 0].astype(float)
        risk_N: np.ndarray = -self.survival_at_ends(logits_NC).sum(axis=1)
        return risk_N

    def survival_at_ends(self, logits_NC: np.ndarray) -> np.ndarray:
        survival: np.ndarray = np.cumprod(expit(-logits_NC.astype(float)), axis=1)
        return survival

    def predicted(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        risk_N = self.risk(logits_NC)
        found = {"risk": risk_N, "standing": (risk_N - facts["risk_median"]) / facts["risk_sd"]}
        if self.discrete:
            ends_K = np.maximum.accumulate([0.0, *facts["edges"], facts["end"]])
            whole_NK = np.concatenate([np.ones((len(risk_N), 1)), self.survival_at_ends(logits_NC)], axis=1)
            found |= {
                f"survival_{g}": np.array([np.interp(time, ends_K, row) for row in whole_NK])
                for g, time in enumerate(self.grid())
            }
        return found

    def grid(self) -> np.ndarray:
        """Between the first and the last horizon; of a single one from 0 on."""
        first = min(self.horizons) if len(set(self.horizons)) > 1 else 0.0
        return np.linspace(first, max(self.horizons), GRID)

    def columns(self) -> list[str]:
        return ["risk", "standing", *([f"survival_{g}" for g in range(GRID)] if self.discrete else [])]

    def for_reader(self, table: pd.DataFrame) -> pd.DataFrame:
        """Columns risk, standing, risk_group and, of discrete time, survival_at_TIME.

        The group is the patient's, whose standing is the mean of its slides'; above 0 is above the median risk of the
        members' own training patients.
        """
        of_patient = table.groupby("patient")["standing"].transform(lambda standing: standing.mean(skipna=False))
        group = of_patient.map(lambda standing: None if np.isnan(standing) else HIGH if standing > 0 else LOW)
        found = table[["risk", "standing"]].assign(risk_group=group.astype(object))
        curve = enumerate(self.grid().tolist() if self.discrete else [])
        return found.assign(**{f"survival_at_{time:.4g}": table[f"survival_{g}"] for g, time in curve})

    def one_number(self, table: pd.DataFrame) -> np.ndarray:
        """Standing: risks of different members are not on one scale."""
        return table["standing"].to_numpy(dtype=float)

    def evidence(self, logits_NC: np.ndarray, facts: Mapping[str, np.ndarray], target: str | None = None) -> np.ndarray:
        """Standing: above 0 is above the median risk of the member's training patients."""
        return self.predicted(logits_NC, facts)["standing"]

    def speaks_for(self, target: str | None = None) -> str:
        return "a higher risk"

    def said(self, row: Mapping[str, Any]) -> str:
        if row["risk_group"] is None:
            return "no risk: not a number"
        return f"risk {row['risk']:.3f}, {row['standing']:+.2f} SD from the training median: {row['risk_group']}"

    def truth(self, row: Mapping[str, Any]) -> str:
        if pd.isna(row["time"]) or pd.isna(row["event"]):
            return ""
        unit = f" {self.config.unit}" if self.config.unit else ""
        return f"{'event at' if row['event'] == 1 else 'no event until'} {row['time']:g}{unit}"

    def units(self, table: pd.DataFrame) -> pd.DataFrame:
        """Patients: several slides of one are one patient in every metric."""
        groups = table.groupby("patient", sort=True)
        merged = groups[self.columns()].mean()
        merged[["time", "event", "split"]] = groups[["time", "event", "split"]].first()
        merged["slides"], merged["members"] = groups.size(), groups["members"].min()
        return merged.reset_index()

    def score(
        self, parts: Sequence[Part], weights: Sequence[np.ndarray], names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Harrell's C: pairs within a part, added up. The others: means over the parts where they are defined, each
        counting as its patients do."""
        wanted = [name for name in self.metrics if names is None or name in names]
        n_weightings = len(weights[0])
        found = {name: np.full(n_weightings, np.nan) for name in wanted}
        rest = [name for name in wanted if name != "c_harrell"]
        if "c_harrell" in wanted:
            found["c_harrell"] = harrell_of([part.table for part in parts], weights)
        for r in range(n_weightings if rest else 0):
            drawn = [repeated(part, weights_RN[r]) for part, weights_RN in zip(parts, weights, strict=True)]
            drawn = [part for part in drawn if len(part.table)]
            if drawn:
                each = pd.DataFrame([self.ipcw_metrics(part, rest) for part in drawn])
                sizes = np.array([len(part.table) for part in drawn], dtype=float)
                for name in rest:
                    known = each[name].notna().to_numpy()
                    if known.any():
                        found[name][r] = np.average(each[name][known], weights=sizes[known])
        return found

    def estimates(self, parts: Sequence[Part]) -> dict[str, Estimate]:
        """Of Harrell's C."""
        table = pd.concat([part.table.assign(part=i) for i, part in enumerate(parts)], ignore_index=True)
        risk_N, time_N = (table[name].to_numpy(dtype=float) for name in ("standing", "time"))
        if not np.isfinite(risk_N).all():
            return {}
        event_N, patients_N = table["event"].to_numpy() == 1, table["patient"].to_numpy(dtype=str)
        return {"c_harrell": c_index_interval(risk_N, time_N, event_N, patients_N, strata=table["part"])}

    def ipcw_metrics(self, part: Part, names: Sequence[str]) -> dict[str, float]:
        """What weights by the censoring of the training patients: Uno's C up to the last horizon, AUCs, Brier score."""
        from sksurv.metrics import concordance_index_ipcw, integrated_brier_score

        table, training = part.table, surv(patients_of(part.training))
        truth, risk_N = surv(table), table["standing"].to_numpy(dtype=float)
        found = dict.fromkeys(names, np.nan)
        if not table["event"].any() or not np.isfinite(risk_N).all():
            return found
        if "c_uno" in names:
            found["c_uno"] = or_nan(lambda: concordance_index_ipcw(training, truth, risk_N, tau=max(self.horizons))[0])
        low, high = table["time"].min(), table["time"].max()
        for i, time in enumerate(self.horizons):
            name = f"auc_{i}"
            before, after = (table["event"] == 1) & (table["time"] <= time), table["time"] > time
            if name in names and low <= time < high and before.any() and after.any():
                found[name] = or_nan(partial(auc_at, training, truth, risk_N, time))
        inside_G = (self.grid() >= low) & (self.grid() < high)
        if "brier" in names and inside_G.sum() > 1:
            survival_NG = table[[f"survival_{g}" for g in range(GRID)]].to_numpy(dtype=float)[:, inside_G]
            times = self.grid()[inside_G]
            found["brier"] = or_nan(lambda: integrated_brier_score(training, truth, survival_NG, times))
        return found

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        patients = patients_of(table)
        return {"events": int((patients["event"] == 1).sum()), "censored": int((patients["event"] == 0).sum())}

    def extra(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Kaplan-Meier curves of the two risk groups, their log-rank test and numbers at risk."""
        table = pd.concat([part.table for part in parts], ignore_index=True)
        groups = table.groupby("patient", sort=True)
        patients = groups[["standing"]].mean().join(groups[["time", "event"]].first())
        if not np.isfinite(patients["standing"]).all():
            return {"kaplan_meier": None}
        return {"kaplan_meier": kaplan_meier(patients)}

    def about(self, cohort: Cohort) -> dict[str, Any]:
        return {
            "loss": self.config.loss or "cox",
            "unit": self.config.unit,
            "horizons": self.horizons,
            "intervals": self.config.intervals if self.discrete else None,
            "pooling": "risks of different folds are not on one scale: Harrell's C counts pairs of patients within a "
            "fold, the other figures are means over folds, weighted by patients. A patient's risk is that of its bag "
            "(study.unit=patient), of slides as bags their mean. "
            "Risk groups: above or below the median risk of each member's own training patients",
        }


def surv(table: pd.DataFrame) -> np.ndarray:
    """Event and time as scikit-survival takes them."""
    from sksurv.util import Surv

    made: np.ndarray = Surv.from_arrays(table["event"].to_numpy() == 1, table["time"].to_numpy(dtype=float))
    return made


def patients_of(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["time"].notna() & table["event"].notna()].drop_duplicates("patient")


def repeated(part: Part, weights_N: np.ndarray) -> Part:
    """Rows as often as they were drawn."""
    if (weights_N == 1).all():
        return part
    rows = np.repeat(np.arange(len(part.table)), weights_N.astype(int))
    return Part(part.table.iloc[rows], part.training)


TIED = 1e-8
"""Risks as near as this are tied, as scikit-survival has it."""
PAIRS_AT_ONCE = 4_000_000


def harrell_within(tables: Sequence[pd.DataFrame]) -> float:
    """`harrell_of` these tables as they are."""
    return float(harrell_of(tables, [np.ones((1, len(table))) for table in tables])[0])


def harrell_of(tables: Sequence[pd.DataFrame], weights: Sequence[np.ndarray]) -> np.ndarray:
    """Harrell's C over the comparable pairs of each table, added up, (R,); NaN where no pair is comparable, never 0.5.

    A pair is comparable where the earlier time has the event; of equal times the event comes before a censored one. A
    higher risk is to come with an earlier event; which way round is not chosen by what looks better.

    Args:
        weights: (R, N) of each table: how often each row counts, so that a pair counts as their product.
    """
    right_R, pairs_R = (np.zeros(len(weights[0])) for _ in range(2))
    for table, weights_RN in zip(tables, weights, strict=True):
        risk_N, time_N = (table[name].to_numpy(dtype=float) for name in ("standing", "time"))
        event_N = table["event"].to_numpy() == 1
        unknown_R = weights_RN @ ~np.isfinite(risk_N) > 0
        right_R[unknown_R] = np.nan
        first = np.flatnonzero(event_N & np.isfinite(risk_N))
        for own in np.array_split(first, -(-len(first) * len(table) // PAIRS_AT_ONCE) or 1):
            later = (time_N > time_N[own, None]) | ((time_N == time_N[own, None]) & ~event_N)
            with np.errstate(invalid="ignore"):
                ahead = risk_N[own, None] - risk_N
            won = later * ((ahead > TIED) + 0.5 * (np.abs(ahead) <= TIED))
            right_R += np.einsum("re,re->r", weights_RN[:, own], weights_RN @ won.T)
            pairs_R += np.einsum("re,re->r", weights_RN[:, own], weights_RN @ later.T.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(pairs_R > 0, right_R / pairs_R, np.nan)
    return found


def auc_at(training: np.ndarray, truth: np.ndarray, risk_N: np.ndarray, time: float) -> float:
    """Cumulative/dynamic AUC at one time."""
    from sksurv.metrics import cumulative_dynamic_auc

    return float(cumulative_dynamic_auc(training, truth, risk_N, [time])[0][0])


def or_nan(compute: Callable[[], float]) -> float:
    """scikit-survival raises ValueError where the censoring of the training patients says nothing about these times."""
    try:
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(compute())
    except ValueError:
        return float("nan")


def kaplan_meier(patients: pd.DataFrame) -> dict[str, Any]:
    """Curves with log-log 95 % intervals, log-rank test (None with one group), and numbers at risk at a few times."""
    from sksurv.nonparametric import kaplan_meier_estimator

    high_N = (patients["standing"] > 0).to_numpy()
    times = nice_times(float(patients["time"].max()))
    groups = {}
    for name, own_N in ((LOW, ~high_N), (HIGH, high_N)):
        own = patients[own_N]
        curve: dict[str, Any] = {"patients": len(own), "events": int((own["event"] == 1).sum())}
        if curve["events"]:
            time, survival, (low, high) = kaplan_meier_estimator(
                own["event"].to_numpy() == 1, own["time"].to_numpy(dtype=float), conf_type="log-log"
            )
            curve |= {"time": time.tolist(), "survival": survival.tolist()}
            curve |= {"low": none_for_nan(low), "high": none_for_nan(high)}
        elif len(own):
            curve |= {"time": [float(own["time"].max())], "survival": [1.0], "low": [None], "high": [None]}
        curve["at_risk"] = [int((own["time"] >= t).sum()) for t in times]
        groups[name] = curve
    return {"groups": groups, "times": times, "log_rank_p": log_rank(patients, high_N)}


def log_rank(patients: pd.DataFrame, high_N: np.ndarray) -> float | None:
    """p of the two groups; None where there is one group, no event, or none while both are at risk."""
    from sksurv.compare import compare_survival

    if high_N.all() or not high_N.any() or not (patients["event"] == 1).any():
        return None
    try:
        p = float(compare_survival(surv(patients), high_N)[1])
    except np.linalg.LinAlgError:  # a variance of 0
        return None
    return p if np.isfinite(p) else None


def none_for_nan(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def nice_times(last: float) -> list[float]:
    """0 and at most six round steps up to the last time."""
    step = 10.0 ** np.floor(np.log10(max(last, 1e-9) / 6))
    step *= next(k for k in (1, 2, 5, 10, 20) if last / (k * step) <= 6)
    return [float(step * i) for i in range(int(last / step) + 1)]
