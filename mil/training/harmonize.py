"""What a site adds to its slides' features, and how it is taken away before a member sees them (`train.harmonize`).

Both ways are fitted on the mean tiles of one member's training slides and are affine maps of a tile, so that the mean
of a mapped slide is the map of its mean:

    combat   x -> (x - shift_k) * scale_k, one shift and scale a site k and feature (Johnson, Li & Rabinovic,
             Biostatistics 2007, section 3.2: location and scale of every batch, shrunk towards what the batch has in
             common over all features by parametric empirical Bayes).
    project  x -> x - (x - centre) B B', the same for every site: what lies in the space between the sites' means is
             removed. No linear classifier of equal means does better than chance (Belrose et al., NeurIPS 2023, theorem
             3.1). Theirs moves the features least, by whitening them with a covariance, which fewer slides than
             features cannot give; here the projection is orthogonal, as in Haghighatkhah et al., BlackboxNLP 2022.

**The label is a covariate.** Where sites differ in how often they have each class, the plain difference of their means
holds part of what tells the classes apart, and removing that would remove the signal. So both regress the features on
site and label together, and only what the site adds beside the label is removed. The labels used are those of the
member's training slides; the map itself knows sites only, so a held-out slide is changed without its label. That is
what ComBat with covariates usually does not offer: Nygaard, Rodland & Hovig (Biostatistics 2016) show that testing a
label on data adjusted with that same label exaggerates its effect; what is reported here was adjusted without it.
Where sites and classes cannot be told apart (every site has one class) neither map exists, and the study is refused.

What is removed is what N slides show. A linear model of these slides finds no site any more, but every estimate is
off by chance, and one who has many more slides that were mapped alike can find that (`benchmarks/confounding.py`).

A site that the training slides do not have has no estimate: combat leaves its slides as they are, which is the map of
an average site; project needs no site. A site with one or two training slides gets a shift, and no scale.

Letters: N slides, K sites (rows of a map: 0 is a site without an estimate, 1..K the sites), D features, R directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mil.aggregators.contract import Aggregator
from mil.training.bags import Bags, SlideSums, slide_sums, training_moments

FEWEST_FOR_SCALE = 3
"""Training slides of a site from which a spread of its own is estimated."""
SMALLEST_VARIANCE = 1e-12
"""Features that vary less within site and class are constant: nothing is estimated of them, and nothing changed."""
TOLERANCE, MOST_STEPS = 1e-6, 1000


@dataclass(frozen=True)
class SiteEffects:
    """Least squares of every feature on site and label.

    present: the sites (1..K) with training slides. site_PD: their coefficients. label_ND: what the label adds to each
    slide, with mean 0. variance_D: of the residuals, divided by N. counts_P: slides of each site.
    """

    present: np.ndarray
    counts_P: np.ndarray
    site_PD: np.ndarray
    label_ND: np.ndarray
    variance_D: np.ndarray

    @property
    def mean_D(self) -> np.ndarray:
        """Of all slides."""
        mean_D: np.ndarray = self.counts_P @ self.site_PD / self.counts_P.sum()
        return mean_D


@dataclass(frozen=True)
class Projection:
    """x -> x - (x - centre_D) basis_DR basis_DR'; the columns of the basis are orthonormal."""

    centre_D: np.ndarray
    basis_DR: np.ndarray

    def __call__(self, x_ND: np.ndarray, site_N: np.ndarray) -> np.ndarray:
        """The features without their part between the sites; which site a row has does not matter."""
        mapped_ND: np.ndarray = x_ND - (x_ND - self.centre_D) @ self.basis_DR @ self.basis_DR.T
        return mapped_ND


@dataclass(frozen=True)
class ShiftAndScale:
    """x -> (x - shift_KD[site]) * scale_KD[site]; row 0 is for sites without an estimate and changes nothing."""

    shift_KD: np.ndarray
    scale_KD: np.ndarray

    def __call__(self, x_ND: np.ndarray, site_N: np.ndarray) -> np.ndarray:
        """The features as an average site would have them. site_N: 0 for a site without an estimate."""
        mapped_ND: np.ndarray = (x_ND - self.shift_KD[site_N]) * self.scale_KD[site_N]
        return mapped_ND


def apart(site_N: np.ndarray, label_N: np.ndarray) -> bool:
    """Whether site and label can be told apart: no group of sites shares no class with the others.

    One class alone is no obstacle: there is nothing to protect.
    """
    sites, site_N = np.unique(site_N, return_inverse=True)
    labels, label_N = np.unique(label_N, return_inverse=True)
    if len(labels) < 2:
        return True
    design = np.hstack([np.eye(len(sites))[site_N], np.eye(len(labels))[label_N][:, 1:]])
    return bool(np.linalg.matrix_rank(design) == design.shape[1])


def site_effects(x_ND: np.ndarray, site_N: np.ndarray, label_N: np.ndarray) -> SiteEffects:
    """The regression that both maps start from.

    Args:
        x_ND: mean tiles, float64.
        site_N: 1..K. label_N: class index.

    Raises:
        ValueError: site and label cannot be told apart, see `apart`.
    """
    if not apart(site_N, label_N):
        raise ValueError("expected sites that share classes, got groups of sites that do not: site and label are one")
    present, row_N, counts_P = np.unique(site_N, return_inverse=True, return_counts=True)
    of_label_NC = np.eye(label_N.max() + 1)[label_N][:, np.unique(label_N)[1:]]
    of_label_NC = of_label_NC - of_label_NC.mean(axis=0)
    of_site_NP = np.eye(len(present))[row_N]
    coefficients_XD = np.linalg.lstsq(np.hstack([of_site_NP, of_label_NC]), x_ND, rcond=None)[0]
    site_PD, label_ND = coefficients_XD[: len(present)], of_label_NC @ coefficients_XD[len(present) :]
    residual_ND = x_ND - site_PD[row_N] - label_ND
    return SiteEffects(present, counts_P, site_PD, label_ND, residual_ND.var(axis=0))


def fit_projection(x_ND: np.ndarray, site_N: np.ndarray, label_N: np.ndarray) -> Projection:
    """The map of `project`: as many directions as there are sites with training slides, less one.

    Arguments and errors as for `site_effects`.
    """
    effects = site_effects(x_ND, site_N, label_N)
    between_PD = effects.site_PD - effects.mean_D
    _, size_R, basis_RD = np.linalg.svd(between_PD, full_matrices=False)
    kept_R = size_R > 1e-9 * max(size_R.max(initial=0), np.abs(x_ND).max(initial=0), 1e-300)
    return Projection(effects.mean_D, basis_RD[kept_R].T)


def fit_combat(x_ND: np.ndarray, site_N: np.ndarray, label_N: np.ndarray, n_sites: int) -> ShiftAndScale:
    """The map of `combat`.

    ComBat standardises, z = (x - mean - label) / sd, estimates gamma_k and delta_k of every site, and gives back
    sd * (z - gamma) / delta + mean + label. Without a label at hand the middle of that is the mean: where delta is 1
    the two are the same, elsewhere what the label adds is scaled by 1 / delta with the rest.

    Arguments and errors as for `site_effects`; n_sites: K.
    """
    effects = site_effects(x_ND, site_N, label_N)
    varies_D = effects.variance_D > SMALLEST_VARIANCE
    sd_D = np.sqrt(np.where(varies_D, effects.variance_D, 1.0))
    z_ND = (x_ND - effects.mean_D - effects.label_ND)[:, varies_D] / sd_D[varies_D]
    shift_KD, scale_KD = np.zeros((n_sites + 1, x_ND.shape[1])), np.ones((n_sites + 1, x_ND.shape[1]))
    if not varies_D.any():
        return ShiftAndScale(shift_KD, scale_KD)
    for k in effects.present:
        gamma, variance = shrunk(z_ND[site_N == k])
        delta_D, gamma_D = np.ones(len(sd_D)), np.zeros(len(sd_D))
        delta_D[varies_D], gamma_D[varies_D] = np.sqrt(variance), gamma
        # (x - mean - sd gamma) / delta + mean, written as (x - shift) * scale
        scale_KD[k] = 1 / delta_D
        shift_KD[k] = effects.mean_D * (1 - delta_D) + sd_D * gamma_D
    return ShiftAndScale(shift_KD, scale_KD)


def shrunk(z_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Location gamma (D,) and scale delta squared (D,) of one site's standardised features, by empirical Bayes.

    Priors, from all features of the site by the method of moments: gamma is normal, delta squared inverse gamma
    (Johnson et al. 2007, equations 3.1 and 3.2); the two conditional posteriors are solved in turn.
    """
    n, mean_D = len(z_ND), z_ND.mean(axis=0)
    middle, tau2 = mean_D.mean(), _variance(mean_D)
    if n < FEWEST_FOR_SCALE:
        return _posterior_mean(mean_D, middle, n, np.ones_like(mean_D), tau2), np.ones_like(mean_D)
    spread_D = np.maximum(z_ND.var(axis=0, ddof=1), SMALLEST_VARIANCE)
    m, s2 = spread_D.mean(), _variance(spread_D)
    if s2 <= SMALLEST_VARIANCE * m**2:  # one feature, or all alike: the prior is a point
        return _posterior_mean(mean_D, middle, n, np.full_like(mean_D, m), tau2), np.full_like(mean_D, m)
    shape, rate = (2 * s2 + m**2) / s2, (m * s2 + m**3) / s2
    gamma_D, delta2_D = mean_D, spread_D
    within_D = ((z_ND - mean_D) ** 2).sum(axis=0)
    for _ in range(MOST_STEPS):
        new_D = _posterior_mean(mean_D, middle, n, delta2_D, tau2)
        squares_D = within_D + n * (mean_D - new_D) ** 2
        new2_D = (0.5 * squares_D + rate) / (n / 2 + shape - 1)
        moved = max(np.abs(new_D - gamma_D).max(), np.abs(new2_D / delta2_D - 1).max())
        gamma_D, delta2_D = new_D, new2_D
        if moved < TOLERANCE:
            break
    return gamma_D, delta2_D


def _posterior_mean(mean_D: np.ndarray, middle: float, n: int, delta2_D: np.ndarray, tau2: float) -> np.ndarray:
    posterior_D: np.ndarray = (n * tau2 * mean_D + delta2_D * middle) / (n * tau2 + delta2_D)
    return posterior_D


def _variance(values_D: np.ndarray) -> float:
    """Over the features; 0 for one feature."""
    return float(values_D.var(ddof=1)) if len(values_D) > 1 else 0.0


# --- members ---------------------------------------------------------------------------------------------------------


def harmonize_members(
    aggregator: Aggregator,
    bags: Bags,
    train_MS: np.ndarray,
    labels_MS: np.ndarray,
    site_S: np.ndarray,
    *,
    standardize: bool,
) -> None:
    """Fill the maps that `Aggregator.add_site_maps` made room for, each member's from its own training slides.

    With `standardize`, members see harmonised tiles with the mean and deviation 1 of their training tiles; after
    `project` the deviation is that of the tiles as stored, which what was removed had a small part in.

    Args:
        labels_MS: what each member is trained to say. Labels that were shuffled for a permutation test may leave site
            and label as one, which the study's own do not (`harmonize_problems`): such a map is fitted without them.
        site_S: 1..K, 0 for a slide of no known site, which takes no part.
    """
    sums = slide_sums(bags, train_MS)
    means_UD = (sums.sums_UD / sums.counts_U.unsqueeze(1)).numpy()
    moments = training_moments(bags, train_MS) if standardize and aggregator.harmonized == "project" else None
    fitted: dict[bytes, Projection | ShiftAndScale] = {}
    for m, train_S in enumerate(train_MS):
        key = train_S.tobytes() + labels_MS[m].tobytes()  # seeds and settings of a fold share both
        known_U = train_S[sums.slides_U] & (site_S[sums.slides_U] > 0)
        if key not in fitted:
            n_sites = None if aggregator.harmonized == "project" else aggregator.site_mean_MKD.shape[1] - 1
            rows = sums.slides_U[known_U]
            label_N = labels_MS[m, rows] if apart(site_S[rows], labels_MS[m, rows]) else np.zeros(len(rows), np.int64)
            fitted[key] = fit_map(means_UD[known_U], site_S[rows], label_N, n_sites)
        found = fitted[key]
        if isinstance(found, Projection):
            _put_projection(aggregator, m, found, moments)
        else:
            _put_scales(aggregator, m, found, sums, train_S, site_S, standardize)
    if aggregator.harmonized == "combat":
        aggregator.input_mean_MD.copy_(aggregator.site_mean_MKD[:, 0])
        aggregator.input_scale_MD.copy_(aggregator.site_scale_MKD[:, 0])
    aggregator.standardized = standardize


def fit_map(
    x_ND: np.ndarray, site_N: np.ndarray, label_N: np.ndarray, n_sites: int | None
) -> Projection | ShiftAndScale:
    """`fit_combat` where n_sites says how many rows its maps have, else `fit_projection`."""
    return fit_projection(x_ND, site_N, label_N) if n_sites is None else fit_combat(x_ND, site_N, label_N, n_sites)


def _put_projection(aggregator: Aggregator, m: int, found: Projection, moments: tuple[Tensor, Tensor] | None) -> None:
    basis_DR, centre_D = torch.from_numpy(found.basis_DR), torch.from_numpy(found.centre_D)
    aggregator.site_centre_MD[m].copy_(centre_D)
    aggregator.site_basis_MDR[m].zero_()[:, : basis_DR.shape[1]].copy_(basis_DR)
    if moments is not None:
        mean_D = moments[0][m].double()
        aggregator.input_mean_MD[m].copy_(mean_D - (mean_D - centre_D) @ basis_DR @ basis_DR.T)
        aggregator.input_scale_MD[m].copy_(_inverse(moments[1][m]))


def _put_scales(
    aggregator: Aggregator,
    m: int,
    found: ShiftAndScale,
    sums: SlideSums,
    train_S: np.ndarray,
    site_S: np.ndarray,
    standardize: bool,
) -> None:
    """Both maps are shifts and scales, so they are one: ((x - b) a - mu) / sd = (x - (b + mu / a)) a / sd."""
    shift_KD, scale_KD = torch.from_numpy(found.shift_KD), torch.from_numpy(found.scale_KD)
    if standardize:
        used_U = torch.from_numpy(train_S[sums.slides_U])
        site_U = torch.from_numpy(site_S[sums.slides_U])[used_U]
        n_U1, a_UD, b_UD = sums.counts_U[used_U].unsqueeze(1), scale_KD[site_U], shift_KD[site_U]
        sums_UD, squares_UD = sums.sums_UD[used_U], sums.squares_UD[used_U]
        mean_D = ((sums_UD - n_U1 * b_UD) * a_UD).sum(dim=0) / n_U1.sum()
        square_D = ((squares_UD - 2 * b_UD * sums_UD + n_U1 * b_UD**2) * a_UD**2).sum(dim=0) / n_U1.sum()
        shift_KD = shift_KD + mean_D / scale_KD
        scale_KD = scale_KD * _inverse((square_D - mean_D**2).clamp_min(0).sqrt())
    aggregator.site_mean_MKD[m].copy_(shift_KD)
    aggregator.site_scale_MKD[m].copy_(scale_KD)


def _inverse(std_D: Tensor) -> Tensor:
    """As `Aggregator.standardize`: constant features are only centred."""
    return torch.where(std_D > 1e-6, 1 / std_D, torch.ones_like(std_D))


# --- what a user should know -----------------------------------------------------------------------------------------


def harmonize_problems(train_MS: np.ndarray, site_S: np.ndarray, labels_S: np.ndarray, how: str) -> list[str]:
    """Why `train.harmonize` is not possible: sites unknown, or sites and classes that cannot be told apart."""
    if len(np.unique(site_S[site_S > 0])) < 2:
        return [
            f"train.harmonize={how}: needs slides of two sites or more, got {len(np.unique(site_S[site_S > 0]))}: name "
            "the cohort's column of sites (columns.site, or columns.site=tcga), or set train.harmonize=none"
        ]
    known_MS = np.unique(train_MS, axis=0) & (site_S > 0)
    one = [known_S for known_S in known_MS if not apart(site_S[known_S], labels_S[known_S])]
    if not one:
        return []
    return [
        f"train.harmonize={how}: in the training slides of {len(one)} of {len(known_MS)} folds, groups of sites have "
        "no class in common, so what a site adds to the features cannot be told from what the label does, and removing "
        "one removes the other: set train.harmonize=none, or use slides of several classes from a site"
    ]


def notes_on_harmonizing(train_MS: np.ndarray, test_MS: np.ndarray, site_S: np.ndarray, how: str) -> list[str]:
    """What was taken out of the features, and which slides it could not be taken out of."""
    notes = [
        f"train.harmonize={how}: what a site adds to the features beside the label was removed, as each member's own "
        "training slides show it; labels of held-out slides were not used"
    ]
    unknown = int((site_S == 0).sum())
    if unknown:
        notes.append(f"slides without a site: {unknown}; {OF_NO_SITE[how]}")
    unseen = [_unseen(train_S, test_S, site_S) for train_S, test_S in zip(train_MS, test_MS, strict=True)]
    n_members = sum(n > 0 for n in unseen)
    if how == "combat" and n_members:
        notes.append(
            f"{n_members} of {len(train_MS)} members test slides of sites that they did not train on (up to "
            f"{max(unseen)} slides): ComBat has no estimate for these, so they are left as they are"
        )
    return notes


OF_NO_SITE = {
    "combat": "no map was fitted with them, and they are left as they are",
    "project": "the projection was fitted without them and applied to them as to all",
}


def _unseen(train_S: np.ndarray, test_S: np.ndarray, site_S: np.ndarray) -> int:
    """Slides to be tested that are of a known site without a training slide."""
    return int((test_S & (site_S > 0) & ~np.isin(site_S, site_S[train_S])).sum())
