"""Dealing patients into folds, grouped and stratified.

Letters: S slides of the cohort, P patients, C classes, K folds.
"""

from __future__ import annotations

import numpy as np

from extract.cohort import Cohort
from mil.study.roles import patient_index, site_index
from mil.study.sites import deal_sites

N_CANDIDATES = 1000
"""Patients that one is compared with for an exchange; more are sampled, which only large cohorts need."""
N_DRAWS = 200  # random partitions looked at; more than this gains little (patients are exact in the first already)


def deal_folds(patient_S: np.ndarray, label_S: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold (0..K-1) of every slide, int64; slides of a patient are in the same fold.

    Exact in patients: the number of patients of a class differs by at most one between folds, and so does the number
    of all patients. Among such partitions the one whose folds have the most equal number of slides of each class is
    looked for: the best of `N_DRAWS` random ones, then patients of one class change places as long as that helps.
    (scikit-learn's StratifiedGroupKFold balances slides and not patients.)

    Args:
        patient_S: patient of each slide, anything that can be sorted.
        label_S: class index of each slide, 0 or more.
    """
    counts_PC, patient_S = _slides_per_patient(patient_S, label_S)
    stratum_P = _stratum(counts_PC)
    total_C = np.maximum(counts_PC.sum(axis=0), 1)
    best = (np.inf, np.inf)  # (classes missing somewhere, imbalance of slides)
    for _ in range(_n_draws(counts_PC, stratum_P)):
        order_P = np.lexsort((rng.random(len(stratum_P)), stratum_P))  # stratum by stratum, shuffled within
        fold_P = np.empty(len(order_P), dtype=np.int64)
        fold_P[order_P] = rng.permutation(n_folds)[np.arange(len(order_P)) % n_folds]
        counts_KC = np.zeros((n_folds, counts_PC.shape[1]))
        np.add.at(counts_KC, fold_P, counts_PC)
        cost = (int((counts_KC[:, counts_PC.any(axis=0)] == 0).sum()), _imbalance(counts_KC / total_C, 1 / n_folds))
        if cost < best:
            best, best_P = cost, fold_P
    fold_P = _exchanged(best_P, counts_PC, stratum_P, np.full(n_folds, 1 / n_folds), rng)
    fold_S: np.ndarray = fold_P[patient_S]
    return fold_S


def deal_slides(
    cohort: Cohort, which_S: np.ndarray, n_folds: int, rng: np.random.Generator, *, site_preserving: bool
) -> np.ndarray:
    """The fold of each of these slides: by patient (`deal_folds`), or by site (`mil.study.sites.deal_sites`)."""
    patient_S, label_S = patient_index(cohort)[1][which_S], cohort.labels_S[which_S]
    if not site_preserving:
        return deal_folds(patient_S, label_S, n_folds, rng)
    return deal_sites(patient_S, site_index(cohort)[1][which_S], label_S, np.full(n_folds, 1 / n_folds), rng)


def hold_out(patient_S: np.ndarray, label_S: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Bool (S,): the slides of about this fraction of the patients of each class, at least one and not all of them.

    Drawn like `deal_folds`. Where patients have slides of several labels it is possible that no draw has every class
    on both sides; the caller checks.
    """
    counts_PC, patient_S = _slides_per_patient(patient_S, label_S)
    stratum_P = _stratum(counts_PC)
    n_C = np.bincount(stratum_P, minlength=counts_PC.shape[1])
    held_C = np.where(n_C >= 2, np.clip(np.rint(fraction * n_C), 1, np.maximum(n_C - 1, 1)), 0)
    first_C = np.cumsum(n_C) - n_C
    total_C = np.maximum(counts_PC.sum(axis=0), 1)
    best = (np.inf, np.inf)  # (classes missing somewhere, imbalance of slides)
    for _ in range(_n_draws(counts_PC, stratum_P)):
        order_P = np.lexsort((rng.random(len(stratum_P)), stratum_P))
        rank_P = np.empty(len(order_P), dtype=np.int64)  # place of the patient within its stratum
        rank_P[order_P] = np.arange(len(order_P)) - first_C[stratum_P[order_P]]
        held_P = rank_P < held_C[stratum_P]
        sides_2C = np.stack([counts_PC[held_P].sum(axis=0), counts_PC[~held_P].sum(axis=0)])
        cost = (int((sides_2C[:, counts_PC.any(axis=0)] == 0).sum()), _imbalance(sides_2C[0] / total_C, fraction))
        if cost < best:
            best, best_P = cost, held_P
    shares_2 = np.array([1 - fraction, fraction])
    held_out_P = _exchanged(best_P.astype(np.int64), counts_PC, stratum_P, shares_2, rng) == 1
    held_out_S: np.ndarray = held_out_P[patient_S]
    return held_out_S


def stratified_order(patient_S: np.ndarray, label_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Place (0, 1, ...) of each slide's patient in a random order of which every beginning is stratified.

    The first patients are one of each class, the largest class first; from then on the next is of the class that has
    the fewest compared with its share.
    """
    counts_PC, patient_S = _slides_per_patient(patient_S, label_S)
    stratum_P = _stratum(counts_PC)
    waiting = [rng.permutation(np.flatnonzero(stratum_P == c)).tolist() for c in range(counts_PC.shape[1])]
    share_C = np.array([len(patients) for patients in waiting]) / len(stratum_P)
    taken_C, place_P = np.zeros(len(waiting)), np.empty(len(stratum_P), dtype=np.int64)
    for place in range(len(stratum_P)):
        left_C = np.array([len(patients) > 0 for patients in waiting])
        first_C = left_C & (taken_C == 0)
        behind_C = share_C * (place + 1) - taken_C
        c = int(np.where(first_C if first_C.any() else left_C, behind_C, -np.inf).argmax())
        place_P[waiting[c].pop()] = place
        taken_C[c] += 1
    order_S: np.ndarray = place_P[patient_S]
    return order_S


def _slides_per_patient(patient_S: np.ndarray, label_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`counts_PC`, slides of each class that each patient has, and the patient index of each slide."""
    patients, index_S = np.unique(patient_S, return_inverse=True)
    counts_PC = np.zeros((len(patients), int(label_S.max()) + 1), dtype=np.int64)
    np.add.at(counts_PC, (index_S, label_S), 1)
    return counts_PC, index_S


def _stratum(counts_PC: np.ndarray) -> np.ndarray:
    """The rarest class of every patient, counted in patients; of equally rare ones the last."""
    has_PC = counts_PC > 0
    rarest_first_C = np.lexsort((-np.arange(has_PC.shape[1]), has_PC.sum(axis=0)))
    stratum_P: np.ndarray = rarest_first_C[np.argmax(has_PC[:, rarest_first_C], axis=1)]
    return stratum_P


def _n_draws(counts_PC: np.ndarray, stratum_P: np.ndarray) -> int:
    """One is enough when the patients of a stratum are alike: every draw is then equally balanced."""
    kinds = np.unique(np.column_stack([stratum_P, counts_PC]), axis=0)
    return 1 if len(kinds) == len(np.unique(stratum_P)) else N_DRAWS


def _exchanged(
    side_P: np.ndarray, counts_PC: np.ndarray, stratum_P: np.ndarray, wanted_K: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The side (fold) of every patient after exchanges between sides that bring slides nearer to their wanted shares.

    Only patients of one stratum change places, so the number of patients of each on each side stays. Nothing happens
    where patients of a stratum are alike, such as with one slide a patient.
    """
    present_C = counts_PC.any(axis=0)
    share_PC = counts_PC[:, present_C] / counts_PC[:, present_C].sum(axis=0)
    excess_KC = np.zeros((len(wanted_K), share_PC.shape[1])) - wanted_K[:, None]
    np.add.at(excess_KC, side_P, share_PC)
    before_P, side_P, changed = side_P, side_P.copy(), True
    while changed:
        changed = False
        for p in rng.permutation(len(side_P)):
            others = np.flatnonzero((stratum_P == stratum_P[p]) & (side_P != side_P[p]))
            if len(others) > N_CANDIDATES:
                others = rng.choice(others, N_CANDIDATES, replace=False)
            if not len(others):
                continue
            moved_QC = share_PC[p] - share_PC[others]
            gap_QC = excess_KC[side_P[others]] - excess_KC[side_P[p]]
            change_Q = 2 * (moved_QC * (gap_QC + moved_QC)).sum(axis=1)
            q = int(change_Q.argmin())
            if change_Q[q] > -1e-9:
                continue
            here, there = side_P[p], side_P[others[q]]
            excess_KC[here] -= moved_QC[q]
            excess_KC[there] += moved_QC[q]
            side_P[p], side_P[others[q]] = there, here
            changed = True
    absent_after = (excess_KC + wanted_K[:, None] < 1e-9).sum()
    return side_P if absent_after <= _absent(before_P, share_PC, len(wanted_K)) else before_P


def _absent(side_P: np.ndarray, share_PC: np.ndarray, n_sides: int) -> int:
    """How often a class is missing on a side: possible where patients have slides of several labels."""
    sums_KC = np.zeros((n_sides, share_PC.shape[1]))
    np.add.at(sums_KC, side_P, share_PC)
    return int((sums_KC < 1e-9).sum())


def _imbalance(share: np.ndarray, wanted: float) -> float:
    return float(((share - wanted) ** 2).sum())
