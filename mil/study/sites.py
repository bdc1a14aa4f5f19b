"""Site-preserving folds: all slides of a hospital are on one side, so that its stain and scanner predict nothing.

Howard et al., Nature Communications 2021 ("The impact of site-specific digital histology signatures on deep learning
model accuracy and bias"): networks recognise the submitting site of TCGA slides, and outcomes differ between sites, so
folds that mix sites report too high an accuracy. Their preserved-site cross-validation keeps sites whole and minimises
the squared deviation of every class's patients from an equal share in every fold, with a solver for quadratic integer
programs. Here the same sum (each class relative to its size, so that rare classes count) is minimised by exchanging
sites until no exchange helps, from many starts.

Letters: S slides, B blocks of sites, K sides (folds, or the held-out part and the rest), C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

N_STARTS = 24
"""Random starts; in tests on small cohorts the best of them is the optimum that trying everything finds."""
ABSENT = 10.0
"""Cost of a class that is missing on one side: more than any imbalance, whose sum is below the number of classes."""


def site_names(site_S: Iterable[str]) -> list[str]:
    """The sites that occur, in alphabetical order; "" is none."""
    return sorted({str(site) for site in site_S} - {""})


def site_rows(site_S: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """int64 (S,): 1..K for the K `names`, 0 for a slide of no site or of another one."""
    row_of = {name: k for k, name in enumerate(names, 1)}
    return np.array([row_of.get(str(site), 0) for site in site_S], dtype=np.int64)


def blocks(patient_S: np.ndarray, site_S: np.ndarray) -> np.ndarray:
    """Number of each slide's block: its site, joined with other sites where a patient has slides in both."""
    patients, patient_S = np.unique(patient_S, return_inverse=True)
    sites, site_S = np.unique(site_S, return_inverse=True)
    block_of_site = np.arange(len(sites))
    first_site_of = np.full(len(patients), -1)
    for patient, site in zip(patient_S, site_S, strict=True):
        if first_site_of[patient] < 0:
            first_site_of[patient] = site
        kept, joined = sorted((block_of_site[site], block_of_site[first_site_of[patient]]))
        block_of_site[block_of_site == joined] = kept
    return np.unique(block_of_site[site_S], return_inverse=True)[1]


def deal_sites(
    patient_S: np.ndarray, site_S: np.ndarray, label_S: np.ndarray, shares_K: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The side (0..K-1) of every slide, int64; all slides of a site, and of a patient, on one side.

    Every class is on every side if any division found has it so; among those the patients of every class are as near
    as found to their share of every side.

    Args:
        patient_S, site_S: of each slide, anything that can be sorted.
        label_S: class index of each slide, 0 or more.
        shares_K: the part of all patients that each side is to get, sum 1: 1/K each for folds.
    """
    block_S = blocks(patient_S, site_S)
    counts_BC = _patients_per_block(patient_S, block_S, label_S)
    share_BC = counts_BC / np.maximum(counts_BC.sum(axis=0), 1)
    share_BC = share_BC[:, counts_BC.any(axis=0)]
    best, best_B = np.inf, np.zeros(len(share_BC), dtype=np.int64)
    for start in range(N_STARTS):
        random_B = rng.integers(0, len(shares_K), len(share_BC))
        start_B = random_B if start % 2 else _greedy(share_BC, shares_K, rng)
        side_B = _improved(start_B, share_BC, shares_K, rng)
        cost = _cost(_sums(share_BC, side_B, len(shares_K)), shares_K).sum()
        if cost < best - 1e-12:
            best, best_B = cost, side_B
    fold_S: np.ndarray = best_B[block_S]
    return fold_S


def _patients_per_block(patient_S: np.ndarray, block_S: np.ndarray, label_S: np.ndarray) -> np.ndarray:
    """`counts_BC`; a patient with slides of several labels counts for each of them."""
    _, patient_S = np.unique(patient_S, return_inverse=True)
    counts_BC = np.zeros((block_S.max() + 1, label_S.max() + 1))
    for _, block, label in np.unique(np.column_stack([patient_S, block_S, label_S]), axis=0):
        counts_BC[block, label] += 1
    return counts_BC


def _cost(sums_XC: np.ndarray, wanted_X: np.ndarray) -> np.ndarray:
    """Cost of every side: of the share of each class that it holds, given the share that it is to hold."""
    missing_XC = ABSENT * (sums_XC < 1e-9)
    cost_C: np.ndarray = ((sums_XC - np.asarray(wanted_X)[..., None]) ** 2 + missing_XC).sum(axis=-1)
    return cost_C


def _sums(share_BC: np.ndarray, side_B: np.ndarray, n_sides: int) -> np.ndarray:
    sums_KC = np.zeros((n_sides, share_BC.shape[1]))
    np.add.at(sums_KC, side_B, share_BC)
    return sums_KC


def _greedy(share_BC: np.ndarray, shares_K: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Large blocks first (with some chance), each to the side where it costs least."""
    size_B = share_BC.sum(axis=1) * rng.uniform(0.5, 1.5, len(share_BC))
    side_B = np.zeros(len(share_BC), dtype=np.int64)
    sums_KC = np.zeros((len(shares_K), share_BC.shape[1]))
    for b in np.argsort(-size_B, kind="stable"):
        gain_K = _cost(sums_KC + share_BC[b], shares_K) - _cost(sums_KC, shares_K)
        side_B[b] = rng.choice(np.flatnonzero(gain_K <= gain_K.min() + 1e-12))
        sums_KC[side_B[b]] += share_BC[b]
    return side_B


def _improved(side_B: np.ndarray, share_BC: np.ndarray, shares_K: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move a block to another side, or exchange it with one there, as long as anything gets better."""
    side_B, n_sides = side_B.copy(), len(shares_K)
    sums_KC = _sums(share_BC, side_B, n_sides)
    changed = True
    while changed:
        changed = False
        for b in rng.permutation(len(side_B)):
            here, cost_K = side_B[b], _cost(sums_KC, shares_K)
            without = _cost(sums_KC[here] - share_BC[b], shares_K[here]) - cost_K[here]
            move_K = _cost(sums_KC + share_BC[b], shares_K) - cost_K + without
            move_K[here] = np.inf
            gained_BC = share_BC[b] - share_BC  # by the other side, when b goes there and the other block comes here
            there_B = _cost(sums_KC[side_B] + gained_BC, shares_K[side_B]) - cost_K[side_B]
            swap_B = there_B + _cost(sums_KC[here] - gained_BC, shares_K[here]) - cost_K[here]
            swap_B[side_B == here] = np.inf
            to, other = int(move_K.argmin()), int(swap_B.argmin())
            if min(move_K[to], swap_B[other]) > -1e-12:
                continue
            if move_K[to] <= swap_B[other]:
                side_B[b] = to
            else:
                side_B[b], side_B[other] = side_B[other], here
            sums_KC = _sums(share_BC, side_B, n_sides)
            changed = True
    return side_B
