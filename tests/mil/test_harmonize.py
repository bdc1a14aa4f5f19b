"""What a site adds to features, and its removal: the estimates against neuroCombat, the maps inside members.

Axes: M members, S and N slides, K sites (row 0: unknown), T tiles, D features.
"""

from __future__ import annotations

import contextlib
import io
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mil.aggregators import aggregator_class
from mil.aggregators.batch import Batch
from mil.training.bags import Bags, make_batch
from mil.training.harmonize import (
    Projection,
    ShiftAndScale,
    apart,
    fit_combat,
    fit_map,
    fit_projection,
    harmonize_members,
    harmonize_problems,
    notes_on_harmonizing,
    site_effects,
)

DIM = 5


def planted(n: int, seed: int, *, dim: int = 30, n_sites: int = 3, site: float = 2.0, label: float = 2.0):
    """Means (N, D), site 1..K and label of slides whose sites shift and stretch all features, and differ in labels."""
    rng = np.random.default_rng(seed)
    site_N = rng.integers(1, n_sites + 1, n)
    label_N = (rng.random(n) < np.linspace(0.3, 0.7, n_sites)[site_N - 1]).astype(np.int64)
    shift_KD = rng.normal(size=(n_sites + 1, dim)) * site
    stretch_K = rng.uniform(0.6, 1.6, n_sites + 1)
    x_ND = rng.normal(size=(n, dim)) * stretch_K[site_N][:, None] + shift_KD[site_N] + 7
    x_ND[:, 0] += label * label_N
    return x_ND, site_N, label_N


# --- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("neuroCombat") is None, reason="neuroCombat is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protected", [True, False])
def test_combat_is_that_of_neurocombat(protected):
    from neuroCombat import neuroCombat

    x_ND, site_N, label_N = planted(90, seed=1)
    label_N = label_N if protected else np.zeros_like(label_N)
    covars = pd.DataFrame({"site": site_N, "label": label_N})
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = neuroCombat(x_ND.T, covars, "site", categorical_cols=["label"] if protected else None)
    ours, estimates, effects = fit_combat(x_ND, site_N, label_N, 3), theirs["estimates"], None
    sd_D = np.sqrt(estimates["var.pooled"][:, 0])
    mean_D = estimates["stand.mean"][:, 0]
    effects = site_effects(x_ND, site_N, label_N)
    np.testing.assert_allclose(np.sqrt(effects.variance_D), sd_D, rtol=1e-9)
    np.testing.assert_allclose(1 / ours.scale_KD[1:] ** 2, estimates["delta.star"], rtol=1e-3)
    # neuroCombat's mean is that of the first class; ours that of all, as labels of other slides are not known
    if not protected:
        np.testing.assert_allclose(ours(x_ND, site_N).T, theirs["data"], rtol=1e-4, atol=1e-4)
    gamma_KD = (ours.shift_KD[1:] - effects.mean_D * (1 - 1 / ours.scale_KD[1:])) / sd_D
    np.testing.assert_allclose(gamma_KD, estimates["gamma.star"], rtol=1e-3, atol=1e-4)
    assert (np.abs(effects.mean_D - mean_D) < 1e-9).all() == (not protected)


def test_what_a_site_adds_is_found_where_sites_differ_in_their_labels():
    x_ND, site_N, label_N = planted(4000, seed=2, label=5.0)
    adjusted_ND = fit_combat(x_ND, site_N, label_N, 3)(x_ND, site_N)
    by_class = [[adjusted_ND[(site_N == k) & (label_N == c)].mean(axis=0) for k in (1, 2, 3)] for c in (0, 1)]
    share = label_N.mean()
    middle_KD = (1 - share) * np.array(by_class[0]) + share * np.array(by_class[1])
    assert np.ptp(middle_KD, axis=0).max() < 0.2, "sites agree, at the same share of each class"
    blind_ND = fit_combat(x_ND, site_N, np.zeros_like(label_N), 3)(x_ND, site_N)
    kept, lost = (roc_auc_score(label_N, z_ND[:, 0]) for z_ND in (adjusted_ND, blind_ND))
    assert 1 - kept < (1 - lost) / 4, "without the label as a covariate, part of it goes with the site"


@pytest.mark.parametrize("how", ["combat", "project"])
def test_constant_features_and_small_sites_are_no_obstacle(how):
    x_ND, site_N, label_N = planted(40, seed=3)
    x_ND[:, 4] = 3.25
    site_N[:2], label_N[:2] = (4, 5), (0, 1)  # a slide each
    found = fit_map(x_ND, site_N, label_N, 6 if how == "combat" else None)
    mapped_ND = found(x_ND, site_N)
    assert np.isfinite(mapped_ND).all()
    np.testing.assert_allclose(mapped_ND[:, 4], 3.25, atol=1e-9)
    if isinstance(found, ShiftAndScale):
        assert (found.scale_KD[4:6] == 1).all(), "no spread of one slide"
        assert (found.shift_KD[4] != 0).any()
        assert (found.shift_KD[[0, 6]] == 0).all(), "no estimate: as they are"
        assert (found.scale_KD[[0, 6]] == 1).all()


def test_after_the_projection_no_linear_classifier_tells_the_sites_of_the_slides_it_was_fitted_to():
    x_ND, site_N, _ = planted(80, seed=4, dim=200)
    found = fit_projection(x_ND, site_N, np.zeros_like(site_N))
    assert found.basis_DR.shape == (200, 2)
    np.testing.assert_allclose(found.basis_DR.T @ found.basis_DR, np.eye(2), atol=1e-12)
    mapped_ND = found(x_ND, site_N)
    np.testing.assert_allclose(mapped_ND.mean(axis=0), x_ND.mean(axis=0), atol=1e-9)
    before, after = (LogisticRegression(tol=1e-9, max_iter=5000).fit(z_ND, site_N == 1) for z_ND in (x_ND, mapped_ND))
    assert before.score(x_ND, site_N == 1) == 1
    means = [mapped_ND[site_N == k].mean(axis=0) for k in (1, 2, 3)]
    np.testing.assert_allclose(means[0], means[1], atol=1e-9)
    np.testing.assert_allclose(means[0], means[2], atol=1e-9)
    assert np.abs(after.coef_).max() < 1e-3, "equal means: the best linear classifier is none"


def test_sites_and_classes_that_are_one_are_refused():
    site_N, label_N = np.array([1, 1, 2, 2, 3, 3]), np.array([0, 0, 1, 1, 0, 1])
    assert apart(site_N, label_N), "site 3 joins the others"
    assert not apart(site_N[:4], label_N[:4])
    with pytest.raises(ValueError, match="site and label are one"):
        fit_projection(np.eye(6)[:4], site_N[:4], label_N[:4])
    train_MS = np.array([[True] * 6, [True] * 4 + [False] * 2])
    assert harmonize_problems(train_MS[:1], site_N, label_N, "combat") == []
    assert "1 of 2 folds" in harmonize_problems(train_MS, site_N, label_N, "combat")[0]
    assert "got 1" in harmonize_problems(train_MS, np.array([1, 0, 0, 1, 1, 0]), label_N, "project")[0]


def test_a_reader_is_told_of_slides_without_a_map():
    train_MS = np.array([[True, True, False, False], [True, False, True, False]])
    site_S = np.array([1, 1, 2, 0])
    told = notes_on_harmonizing(train_MS, ~train_MS, site_S, "combat")
    assert "slides without a site: 1" in told[1]
    assert "1 of 2 members" in told[2]
    assert "up to 1 slides" in told[2]
    assert len(notes_on_harmonizing(train_MS, ~train_MS, site_S, "project")) == 2


# --- inside members --------------------------------------------------------------------------------------------------

LENGTHS = (4, 11, 1, 7, 30, 2, 5, 9, 3, 6, 8, 13)
SITE_S = np.array([1, 2, 1, 2, 1, 2, 1, 2, 0, 1, 2, 3])
LABELS_S = np.array([0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0])


def study(how: str) -> tuple[Bags, np.ndarray]:
    """Bags of twelve slides of three sites and none, and the training slides of three members; nobody has site 3."""
    rng = np.random.default_rng(8)
    shifted = [rng.normal(size=(n, DIM)) + k for n, k in zip(LENGTHS, SITE_S, strict=True)]
    arrays = [torch.from_numpy(x_TD.astype(np.float32)) for x_TD in shifted]
    site_S = SITE_S if how == "combat" else None
    bags = Bags(tuple(map(str, SITE_S)), np.array(LENGTHS), DIM, "ram", tuple(arrays), site_S)
    train_MS = rng.random((2, 12)) < 0.8
    train_MS[:, :4], train_MS[:, 11] = True, False
    return bags, np.stack([train_MS[0], train_MS[1], train_MS[0]])


def whole(bags: Bags, n_members: int, one_group: bool) -> Batch:
    return make_batch(bags, range(12), LABELS_S, np.ones((n_members, 12), dtype=bool), one_group=one_group)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("how", ["combat", "project"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("abmil", {"hidden": 6, "attention": 5, "head": (4,)}),
        ("abmil", {"hidden": 0, "attention": 5, "head": ()}),
        ("chowder", {"n_top": 3, "n_bottom": 2, "tile_hidden": (), "head": (5,)}),
        ("dsmil", {"attention": 6}),
        ("dsmil", {"attention": 6, "values": True}),
        ("clam_sb", {"hidden": 8, "attention": 5, "n_instances": 2}),
        ("transmil", {"hidden": 8, "heads": 2, "landmarks": 4, "conv": 3}),
        ("evidence", {"concepts": 4, "tile_hidden": (6,)}),
        ("mean", {}),
        ("max", {}),
    ],
)
def test_members_see_harmonised_tiles_as_if_these_had_been_stored(name, options, how, standardize):
    """Against one member at a time, without maps, on tiles that were mapped slide by slide in numpy."""
    bags, train_MS = study(how)
    model = aggregator_class(name)(DIM, 1, [3, 4, 5], **options).eval()
    model.add_site_maps(how, 3)
    harmonize_members(model, bags, train_MS, np.tile(LABELS_S, (3, 1)), SITE_S, standardize=standardize)
    found = model(whole(bags, 3, one_group=False), with_scores=True)
    together = model(whole(bags, 3, one_group=True))
    torch.testing.assert_close(together.logits_MBC, found.logits_MBC, rtol=1e-4, atol=1e-5)
    for m in range(3):
        mapped = mapped_beforehand(bags, train_MS[m], how, standardize)
        plain = aggregator_class(name)(DIM, 1, [3 + m], **options).eval()
        expected = plain(whole(mapped, 1, one_group=False), with_scores=True)
        torch.testing.assert_close(found.logits_MBC[m], expected.logits_MBC[0], rtol=2e-3, atol=2e-4)
        with model.of_site(1):
            tile_TC = model.tile_logits(bags.features(4))[m]
        torch.testing.assert_close(tile_TC, plain.tile_logits(mapped.features(4))[0], rtol=2e-3, atol=2e-4)


def mapped_beforehand(bags: Bags, train_S: np.ndarray, how: str, standardize: bool) -> Bags:
    """The bags with every tile mapped, and, if asked for, standardised by what the training tiles are then."""
    known_S = train_S & (SITE_S > 0)
    found = fit_map(bags.means_SD[known_S], SITE_S[known_S], LABELS_S[known_S], 3 if how == "combat" else None)
    tiles = [found(bags.features(s).double().numpy(), np.full(n, SITE_S[s])) for s, n in enumerate(LENGTHS)]
    if standardize:
        trained_TD = np.concatenate([tiles[s] for s in np.flatnonzero(train_S)])
        stored_TD = np.concatenate([bags.features(int(s)).numpy() for s in np.flatnonzero(train_S)])
        std_D = (stored_TD if isinstance(found, Projection) else trained_TD).std(axis=0)
        tiles = [(x_TD - trained_TD.mean(axis=0)) / std_D for x_TD in tiles]
    views = tuple(torch.from_numpy(x_TD.astype(np.float32)) for x_TD in tiles)
    return Bags(bags.slides, bags.lengths_S, DIM, "ram", views)


def test_members_with_labels_of_their_own_have_maps_of_their_own():
    """As in a permutation test; labels that leave site and label as one are left out of the fit."""
    bags, train_MS = study("combat")
    train_MS[:] = True
    labels_MS = np.stack([LABELS_S, LABELS_S[::-1], (SITE_S == 1).astype(np.int64)])
    model = aggregator_class("mean")(DIM, 1, [3, 4, 5])
    model.add_site_maps("combat", 3)
    harmonize_members(model, bags, train_MS, labels_MS, SITE_S, standardize=False)
    known_S, means_SD = SITE_S > 0, bags.means_SD
    for m, label_S in enumerate([*labels_MS[:2], np.zeros_like(LABELS_S)]):
        expected = fit_combat(means_SD[known_S], SITE_S[known_S], label_S[known_S], 3)
        np.testing.assert_allclose(model.site_mean_MKD[m].numpy(), expected.shift_KD, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.site_scale_MKD[m].numpy(), expected.scale_KD, rtol=1e-4)
