"""Is the site in the way? `mil.results.confounding` for survival, regression and ordinal studies.

Every patient gets a score of its target: the number, the grade's index, or the martingale residual of the time (the
event less the hazard that Nelson and Aalen's estimate has summed up until then, so that the test is a log-rank test of
the sites). Site alone is said to predict the target where a permutation test of the scores' means by site (F test,
Good 2005) gives p < ALPHA and the share of the scores' variance between sites, without what chance adds (epsilon
squared, Kelley 1935), is at least SMALLEST: the square of the correlation that `mil.results.confounding` asks for.

Within sites, the main metric is that of survival over pairs of patients of one site (and fold), else the mean of the
sites' own, weighted by patients, of sites with FEWEST_PATIENTS and more where it is defined.

Letters: P patients, K sites (0: unknown), N rows of held-out predictions, S slides, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold

from extract.wording import count, p_value
from mil.results.confounding import ALPHA, DRAWS, HOW, about_probe, counts_of, site_by_features, site_table
from mil.results.intervals import SCALES, difference_interval, resampled, scaled_interval
from mil.results.site_models import (
    FEWEST_PATIENTS,
    MOST_GROUPS,
    Round,
    Slides,
    can_be_harmonized,
    drawn_rounds,
    harmonized,
    mean_of,
    probe_rounds,
)
from mil.results.task_subgroups import parts_in
from mil.tasks.contract import Part, Task
from mil.tasks.metrics import none_if_nan
from mil.training.task_ladder import ON_MEANS, Said, Targets

SMALLEST = 0.01
"""Of the variance of the scores, between sites."""
NUMBERS_AT_ONCE = 2_000_000


# --- does the site tell the target? ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Association:
    """Of site and target over patients. flagged: p < ALPHA and epsilon_squared >= SMALLEST."""

    p_value: float
    epsilon_squared: float
    patients: int
    flagged: bool


def association(site_P: np.ndarray, score_P: np.ndarray, seed: int = 0) -> Association:
    """Permutation test of equal means of the scores by site, and the share of their variance that sites explain."""
    sites, site_P = np.unique(site_P, return_inverse=True)
    n, centred_P = len(site_P), score_P - score_P.mean() if len(score_P) else score_P
    total = float((centred_P**2).sum())
    if len(sites) < 2 or n <= len(sites) or total <= 1e-12:
        return Association(1.0, 0.0, n, False)
    of_site_PK = np.eye(len(sites))[site_P] / np.sqrt(np.bincount(site_P))
    rng, seen = np.random.default_rng(seed), float(((centred_P @ of_site_PK) ** 2).sum())
    larger, at_once = 0, max(1, NUMBERS_AT_ONCE // n)
    for start in range(0, DRAWS, at_once):
        drawn_RP = rng.permuted(np.tile(centred_P, (min(at_once, DRAWS - start), 1)), axis=1)
        larger += int((((drawn_RP @ of_site_PK) ** 2).sum(axis=1) >= seen * (1 - 1e-9)).sum())
    p = (1 + larger) / (DRAWS + 1)
    epsilon = max(0.0, 1 - (1 - seen / total) * (n - 1) / (n - len(sites)))
    return Association(p, epsilon, n, p < ALPHA and epsilon >= SMALLEST)


def scores_of(task: str, targets: Targets) -> np.ndarray:
    """A number a row that a higher value, a higher grade or an earlier event makes larger."""
    if task != "survival":
        return np.asarray(targets["value" if task == "regression" else "label"], dtype=np.float64)
    time_N, event_N = (np.asarray(targets[name], dtype=np.float64) for name in ("time", "event"))
    times = np.unique(time_N[event_N == 1])
    if not len(times):
        return np.zeros(len(time_N))
    hazard_G = np.array([(event_N[time_N == t]).sum() / (time_N >= t).sum() for t in times])
    summed_N = np.r_[0.0, np.cumsum(hazard_G)][np.searchsorted(times, time_N, side="right")]
    residual_N: np.ndarray = event_N - summed_N
    return residual_N


def one_a_patient(slides: Slides, used_S: np.ndarray, task: str, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Site and score of each patient: its first site, and the mean of its slides' scores (survival: its own)."""
    rows_S = used_S & (slides.site_S > 0) & (slides.label_S >= 0)
    first = ~pd.Series(slides.patient_S[rows_S]).duplicated().to_numpy()
    own = {name: np.asarray(values)[rows_S] for name, values in targets.items()}
    if task == "survival":
        return slides.site_S[rows_S][first], scores_of(task, {name: values[first] for name, values in own.items()})
    score_P = pd.Series(scores_of(task, own)).groupby(slides.patient_S[rows_S], sort=False).mean().to_numpy()
    return slides.site_S[rows_S][first], score_P


# --- models without attention ----------------------------------------------------------------------------------------


def metric_of(task: Task, slides: Slides, targets: Targets, rows: np.ndarray, said: Said) -> float | None:
    """The main metric of what a model says of these slides (rows of the cohort)."""
    table = pd.DataFrame({"patient": slides.patient_S[rows], "split": "train", "members": 1, **said})
    for name, values in targets.items():
        table[name] = np.asarray(values)[rows]
    if task.name == "ordinal":
        table["label"] = np.asarray(task.classes)[np.asarray(targets["label"])[rows]]
    missing = [name for name in task.columns() if name not in table]
    units = task.units(table.assign(**dict.fromkeys(missing, np.nan)))
    return none_if_nan(task.score([Part(units, units)], [np.ones((1, len(units)))], [task.main])[task.main][0])


def linear_metric(task: Task, slides: Slides, targets: Targets, rounds: Sequence[Round], how: str) -> float | None:
    """Of the linear model on mean tiles (`mil.training.task_ladder`), mean of the rounds."""
    fit, found = ON_MEANS[task.name]["mean_linear"][1], []
    for train_S, test_S in rounds:
        x_SD, (train, test) = harmonized(slides, train_S, how), known_rows(slides, train_S, test_S)
        if len(train) > 1 and len(test) and learnable(task, targets, train):
            predict = fit(x_SD[train], {k: np.asarray(v)[train] for k, v in targets.items()}, len(task.classes))
            found.append(metric_of(task, slides, targets, test, predict(x_SD[test])))
    return mean_of(found)


def known_rows(slides: Slides, *sides: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(side_S & (slides.label_S >= 0)) for side_S in sides]


def learnable(task: Task, targets: Targets, train: np.ndarray) -> bool:
    """Whether these slides have an event, or two values."""
    if task.name == "survival":
        return bool((np.asarray(targets["event"])[train] == 1).any())
    return len(np.unique(scores_of(task.name, targets)[train])) > 1


def site_alone(task: Task, slides: Slides, targets: Targets, rounds: Sequence[Round]) -> float | None:
    """The main metric of nothing but the site: the mean of the target among its training slides (one more counted)."""
    found = []
    for train_S, test_S in rounds:
        train, test = known_rows(slides, train_S & (slides.site_S > 0), test_S & (slides.site_S > 0))
        if len(train) and len(test) and learnable(task, targets, train):
            own = {name: np.asarray(values)[train] for name, values in targets.items()}
            said = said_by_site(task, slides.site_S[train], own, slides.site_S[test])
            found.append(metric_of(task, slides, targets, test, said))
    return mean_of(found)


def said_by_site(task: Task, site_N: np.ndarray, targets: Targets, asked_N: np.ndarray) -> Said:
    """What each site's training slides say of slides that are of it."""
    if task.name == "ordinal":
        value_NC = np.eye(len(task.classes))[np.asarray(targets["label"])]
    else:
        value_NC = scores_of(task.name, targets)[:, None]
    sums_KC = np.zeros((max(site_N.max(), asked_N.max()) + 1, value_NC.shape[1]))
    np.add.at(sums_KC, site_N, value_NC)
    n_K1 = np.bincount(site_N, minlength=len(sums_KC))[:, None]
    mean_NC = ((sums_KC + value_NC.mean(axis=0)) / (n_K1 + 1))[asked_N]
    if task.name == "ordinal":
        return {f"p_{k}": mean_NC[:, k] for k in range(mean_NC.shape[1])}
    names = ("prediction",) if task.name == "regression" else ("risk", "standing")
    return dict.fromkeys(names, mean_NC[:, 0])


def left_out(task: Task, slides: Slides, targets: Targets, used_S: np.ndarray) -> dict[str, Any] | None:
    """The linear model, trained without a site and asked about it; with many sites, several are left out together."""
    index = np.flatnonzero(used_S & (slides.site_S > 0) & (slides.label_S >= 0))
    n_sites = len(np.unique(slides.site_S[index]))
    if n_sites < 2:
        return None
    groups: list[dict[str, Any]] = []
    for train, test in GroupKFold(min(n_sites, MOST_GROUPS)).split(index, groups=slides.site_S[index]):
        sides = np.zeros((2, len(used_S)), dtype=bool)
        sides[0, index[train]], sides[1, index[test]] = True, True
        names = [slides.sites[k - 1] for k in np.unique(slides.site_S[index[test]])]
        reached = linear_metric(task, slides, targets, [(sides[0], sides[1])], "none")
        groups.append({"sites": names, "slides": len(test), "metric": reached})
    values = [group["metric"] for group in groups]
    return {"groups": groups, "metric": mean_of(values), "defined": sum(value is not None for value in values)}


# --- the target, where the site cannot help --------------------------------------------------------------------------


def within_sites(task: Task, parts: Sequence[Part], site_N: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """The main metric of held-out predictions over all rows with a site, that within sites, and their difference.

    Intervals: t, on the metric's scale, and of the difference from both there; from resampled patients.

    Args:
        site_N: of the rows of all parts; 0 where unknown, which counts in neither.
    """
    parts, site_N = parts_in(parts, site_N > 0), site_N[site_N > 0]
    nothing: dict[str, Any] = {"rows": 0, "sites": 0, "all": None, "within": None, "difference": None}
    if not parts or not np.isfinite(task.one_number(pd.concat([part.table for part in parts]))).all():
        return nothing
    patients_N = np.concatenate([part.table["patient"].to_numpy(dtype=str) for part in parts])
    large = [k for k in np.unique(site_N) if len(np.unique(patients_N[site_N == k])) >= FEWEST_PATIENTS]

    def metrics_of(weights_RN: np.ndarray) -> dict[str, np.ndarray]:
        all_R = scored(task, parts, weights_RN)
        within_R = within_of(task, parts, site_N, large, weights_RN)
        return {"all": all_R, "within": within_R}

    values = {name: none_if_nan(v[0]) for name, v in metrics_of(np.ones((1, len(site_N)))).items()}
    names = patients_N.tolist()
    drawn = resampled(metrics_of, names, resamples, seed)
    found: dict[str, Any] = {"rows": len(site_N), "sites": len(large)}
    scale, n_patients = SCALES[task.metrics[task.main].scale], len(set(names))
    for name in ("all", "within"):
        if drawn is None:
            found[name] = {"value": values[name], "low": None, "high": None}
        else:
            ends = scaled_interval(values[name], drawn[name], scale, n_patients)
            found[name] = {"value": values[name], "low": ends.low, "high": ends.high}
    both = (values["all"], values["within"])
    apart = None if both[0] is None or both[1] is None else both[0] - both[1]
    drawn_R2 = None if drawn is None else np.stack([drawn["all"], drawn["within"]], axis=1)
    ends = difference_interval(both, drawn_R2, scale, n_patients)
    return found | {"difference": {"value": apart, "low": ends.low, "high": ends.high}}


def scored(task: Task, parts: Sequence[Part], weights_RN: np.ndarray) -> np.ndarray:
    ends = np.cumsum([len(part.table) for part in parts])[:-1]
    return task.score(parts, np.split(weights_RN, ends, axis=1), [task.main])[task.main]


def within_of(
    task: Task, parts: Sequence[Part], site_N: np.ndarray, large: Sequence[int], weights_RN: np.ndarray
) -> np.ndarray:
    """(R,); NaN where no site has it."""
    if not large:
        return np.full(len(weights_RN), np.nan)
    if task.name == "survival":
        split = [(parts_in(parts, site_N == k), weights_RN[:, site_N == k]) for k in large]
        each = [part for own, _ in split for part in own]
        return scored(task, each, np.concatenate([weights for _, weights in split], axis=1))
    value_KR, weight_KR = [], []
    for k in large:
        own_N = site_N == k
        value_KR.append(scored(task, parts_in(parts, own_N), weights_RN[:, own_N]))
        weight_KR.append(weights_RN[:, own_N].sum(axis=1))
    values, weights = np.array(value_KR), np.array(weight_KR) * np.isfinite(value_KR)
    total_R = weights.sum(axis=0)
    mean_R: np.ndarray = np.where(
        total_R > 0, (np.nan_to_num(values) * weights).sum(axis=0) / np.where(total_R > 0, total_R, 1), np.nan
    )
    return mean_R


# --- the block -------------------------------------------------------------------------------------------------------


def task_confounding(
    task: Task,
    slides: Slides,
    targets: Targets,
    rounds: Sequence[Round],
    parts: Sequence[Part],
    *,
    harmonize: str,
    resamples: int,
    seed: int,
    new: bool = False,
) -> dict[str, Any]:
    """Everything of this file, for metrics.json.

    Args:
        slides: all of the cohort; labels are the strata of the target. targets: of these slides.
        rounds: training and test slides of the folds. parts: the study's held-out predictions.
        new: whether a trained study predicts these slides, so that no model of the target is fitted to them; `rounds`
            then have the slides that count as test.
    """
    used_S = np.any([train_S | test_S for train_S, test_S in rounds], axis=0)
    probed = slides.large_sites(used_S)
    if new:
        own_rounds, of_the_study = (drawn_rounds(slides, used_S, probed, seed) if len(probed) > 1 else []), False
    else:
        own_rounds, of_the_study = probe_rounds(slides, rounds, probed, seed) if len(probed) > 1 else ([], True)
    possible = new or can_be_harmonized(slides, [*rounds, *own_rounds])
    tied = association(*one_a_patient(slides, used_S, task.name, targets), seed=seed)
    hows = [how for how in HOW if how == "none" or (possible and not new)]
    block: dict[str, Any] = {
        **counts_of(slides, used_S),
        "target_by_site": {
            **asdict(tied),
            "metric": None if new else site_alone(task, slides, targets, rounds),
            "alpha": ALPHA,
            "smallest": SMALLEST,
        },
        "table": site_table(slides, used_S, partial(targets_told, task, slides, targets)),
        "probe": about_probe(probed, of_the_study),
        "within": within_sites(task, parts, sites_of_rows(slides, parts), resamples, seed),
        "left_out": None if new else left_out(task, slides, targets, used_S),
        "harmonize": harmonize,
        "ways": [
            way(task, slides, targets, [] if new else rounds, own_rounds, probed, how, intervals=resamples > 0)
            for how in hows
        ],
        "can_be_harmonized": possible,
        **({"new": True} if new else {}),
    }
    return block | {"warnings": warnings_of(task, block)}


def sites_of_rows(slides: Slides, parts: Sequence[Part]) -> np.ndarray:
    """The site of every row of all parts: of its patient's first slide."""
    first = pd.Series(slides.site_S, index=slides.patient_S)
    first = first[~first.index.duplicated()]
    if not parts:
        return np.zeros(0, dtype=np.int64)
    patients = np.concatenate([part.table["patient"].to_numpy(dtype=str) for part in parts])
    return first.reindex(patients).fillna(0).to_numpy(dtype=np.int64)


def way(
    task: Task,
    slides: Slides,
    targets: Targets,
    rounds: Sequence[Round],
    own_rounds: Sequence[Round],
    probed: np.ndarray,
    how: str,
    *,
    intervals: bool,
) -> dict[str, Any]:
    """Site probe, and the linear model's metric, on features that are harmonised so."""
    probe = site_by_features(slides, own_rounds, probed, how, intervals=intervals)
    return probe | {"metric": linear_metric(task, slides, targets, rounds, how)}


def targets_told(task: Task, slides: Slides, targets: Targets, own: np.ndarray) -> dict[str, Any]:
    """`told_target` of slides, by their rows in the cohort, as far as it is known."""
    known = own[slides.label_S[own] >= 0]
    told = {name: np.asarray(values)[known] for name, values in targets.items()}
    return {"target": told_target(task, told, slides.patient_S[known])}


def told_target(task: Task, targets: Targets, patients_N: np.ndarray) -> dict[str, float | int | None]:
    """What a site has of the target: the mean, patients with an event, or slides of each grade."""
    if task.name == "regression":
        return {"mean": float(np.mean(targets["value"])) if len(patients_N) else None}
    if task.name == "ordinal":
        return {name: int((np.asarray(targets["label"]) == k).sum()) for k, name in enumerate(task.classes)}
    return {"events": len(np.unique(patients_N[np.asarray(targets["event"]) == 1]))}


def warnings_of(task: Task, block: Mapping[str, Any]) -> list[str]:
    """What must be known before reading, in a sentence."""
    tied, title = block["target_by_site"], task.metrics[task.main].title
    if not tied["flagged"]:
        return []
    alone = "" if tied["metric"] is None else f": {title} {tied['metric']:.3f} on the same folds without a slide"
    text = (
        f"site alone predicts the target{alone} (permutation test over {count(tied['patients'], 'patient')}, p "
        f"{p_value(tied['p_value'], said=True)}, {100 * tied['epsilon_squared']:.0f} % of the variance between sites)"
    )
    site = block["ways"][0]["site"]["value"]
    if site is not None:
        chance = block["probe"]["chance"]
        text += f", and a linear model tells the site from the features with balanced accuracy {site:.3f} where chance "
        text += f"is {chance:.3f}"
    within = block["within"]["within"]
    if within is None or within["value"] is None:
        return [f"{text}. Within sites nothing can be scored, so what was learned cannot be told from the site"]
    part = f"within sites it is {within['value']:.3f}, over all {block['within']['all']['value']:.3f}"
    return [f"{text}. Part of the {title} may be the site's: {part}"]
