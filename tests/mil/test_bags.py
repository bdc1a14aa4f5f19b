"""Bags: the same values from memory, from a memory map and from the files; batches that starve and repeat nobody.

Axes: M members, S slides, T tiles, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import mil.training.bags
from extract.features.cache import read_features, read_header
from extract.features.folder import open_feature_folder
from mil.aggregators.batch import Batch
from mil.training.bags import Bags, EvaluationSteps, TrainingSteps, load_bags, make_batch, training_moments

LENGTHS = (4, 11, 1, 7, 30, 2, 5, 9, 3, 6, 8, 13, 10)
DIM = 5


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, DIM)).astype(np.float32) for n in LENGTHS]


@pytest.fixture
def bags(arrays, bags_of) -> Bags:
    return bags_of(arrays)


def roles(n_members: int, n_slides: int = len(LENGTHS), seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((n_members, n_slides)) < 0.7


def steps(
    bags: Bags,
    train_MS: np.ndarray,
    *,
    batch_size: int = 4,
    seed: int = 0,
    epoch: int = 0,
    active: Sequence[bool] | None = None,
    max_tiles: int | None = None,
    one_group: bool = False,
) -> TrainingSteps:
    active_M = np.ones(len(train_MS), dtype=bool) if active is None else np.array(active)
    return TrainingSteps(
        bags,
        np.arange(len(bags)) % 2,
        train_MS,
        batch_size,
        seed,
        epoch=lambda: epoch,
        active_M=lambda: active_M,
        max_tiles=max_tiles,
        one_group=one_group,
    )


def batches_of(member: int, epoch: TrainingSteps) -> list[list[int]]:
    """The slides that the member trains on in every step that it takes part in, in order."""
    found = [batch.slides_B[batch.uses_MB[member]].tolist() for batch in epoch]
    return [slides for slides in found if slides]


def tiles_by_slide(batch: Batch) -> dict[int, torch.Tensor]:
    found = {}
    for group in batch.groups:
        for b, tiles_TD in zip(group.bags_b, group.tiles_TD.split(list(group.lengths_b)), strict=True):
            found[int(batch.slides_B[b])] = tiles_TD
    return found


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_and_memory_map_equal_the_files(tmp_path, arrays, write_study, dtype):
    write_study(tmp_path, arrays, np.arange(len(arrays)) % 2, dtype=dtype)
    folder = open_feature_folder(tmp_path, "cache")
    slides = [f"slide_{i:02d}" for i in (3, 0, 4, 2)]
    headers = [read_header(tmp_path / f"{slide}.h5") for slide in slides]
    lengths, dtypes = [h.n_tiles for h in headers], [h.dtype for h in headers]
    progress: list[int] = []
    in_ram = load_bags(folder, slides, lengths, dtypes, DIM, "ram", progress=progress.append)
    mapped = load_bags(folder, slides, lengths, dtypes, DIM, "mmap")
    assert (in_ram.memory, mapped.memory, progress) == ("ram", "mmap", [1, 2, 3, 4])
    assert in_ram.lengths_S.tolist() == lengths == [7, 4, 30, 1]
    for i, slide in enumerate(slides):
        stored_TD = read_features(tmp_path / f"{slide}.h5")
        assert stored_TD.dtype == dtype
        for bags in (in_ram, mapped):
            assert bags.features(i).dtype == getattr(torch, dtype)
            assert np.array_equal(bags.features(i).numpy(), stored_TD)
    assert in_ram.nbytes == mapped.nbytes == sum(lengths) * DIM * np.dtype(dtype).itemsize


def test_auto_holds_features_in_memory_only_where_they_fit(tmp_path, arrays, write_study, monkeypatch):
    write_study(tmp_path, arrays[:2], [0, 1])
    folder = open_feature_folder(tmp_path, "cache")
    arguments = (folder, ["slide_00", "slide_01"], LENGTHS[:2], ["float32"] * 2, DIM)
    assert load_bags(*arguments).memory == "ram"
    monkeypatch.setattr(mil.training.bags, "FEATURES_SHARE", 0)
    assert load_bags(*arguments).memory == "mmap"


def test_in_memory_all_slides_lie_in_one_block(tmp_path, arrays, write_study):
    write_study(tmp_path, arrays, np.arange(len(arrays)) % 2)
    folder = open_feature_folder(tmp_path, "cache")
    slides = [f"slide_{i:02d}" for i in range(len(arrays))]
    bags = load_bags(folder, slides, LENGTHS, ["float32"] * len(arrays), DIM, "ram")
    assert len({bags.features(i).untyped_storage().data_ptr() for i in range(len(bags))}) == 1


# --- packing --------------------------------------------------------------------------------------------------------


def test_large_bags_are_views_of_the_stored_features_and_small_ones_are_copied(bags, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 9)
    batch = make_batch(bags, [1, 0, 4, 3], np.zeros(len(bags), dtype=np.int64), np.ones((2, 4), dtype=bool))
    by_bags = {group.bags_b: group for group in batch.groups}
    assert set(by_bags) == {(0,), (2,), (1, 3)}
    for b, slide in ((0, 1), (2, 4)):
        assert by_bags[(b,)].tiles_TD.data_ptr() == bags.features(slide).data_ptr()
    assert by_bags[(1, 3)].lengths_b == (4, 7)
    assert torch.equal(by_bags[(1, 3)].tiles_TD, torch.cat([bags.features(0), bags.features(3)]))


def test_groups_name_the_members_that_use_their_bags(bags, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", 9)
    uses_MB = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]], dtype=bool)
    batch = make_batch(bags, [1, 0, 4, 3], np.zeros(len(bags), dtype=np.int64), uses_MB)
    assert {group.bags_b: group.members for group in batch.groups} == {(0,): None, (2,): (1, 2), (1, 3): (0,)}


def test_one_group_holds_all_bags_end_to_end(bags):
    batch = make_batch(bags, [4, 2], np.arange(len(bags)), np.ones((1, 2), dtype=bool), one_group=True)
    assert len(batch.groups) == 1
    assert batch.groups[0].lengths_b == (30, 1)
    assert batch.labels_B.tolist() == batch.slides_B.tolist() == [4, 2]
    assert torch.equal(batch.groups[0].tiles_TD, torch.cat([bags.features(4), bags.features(2)]))


@pytest.mark.parametrize("one_group", [False, True])
@pytest.mark.parametrize("view_tiles", [1, 8, 1000])
def test_trap_6_nothing_is_padded(bags, view_tiles, one_group, monkeypatch):
    """As many rows of tiles as tiles, all of them the slides' own."""
    monkeypatch.setattr(mil.training.bags, "VIEW_TILES", view_tiles)
    for batch in steps(bags, roles(3), one_group=one_group):
        n_rows = sum(len(group.tiles_TD) for group in batch.groups)
        assert n_rows == sum(LENGTHS[slide] for slide in batch.slides_B.tolist())
        assert n_rows == sum(sum(group.lengths_b) for group in batch.groups)
        for slide, tiles_TD in tiles_by_slide(batch).items():
            assert torch.equal(tiles_TD, bags.features(slide))


# --- training steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_trap_8_every_member_sees_all_its_slides_once_an_epoch_and_nothing_is_dropped(bags, batch_size):
    train_MS = roles(5)
    train_MS[3] = False
    train_MS[3, :2] = True  # fewer slides than a batch
    for epoch in range(3):
        one_epoch = steps(bags, train_MS, batch_size=batch_size, epoch=epoch)
        for m, train_S in enumerate(train_MS):
            batches = batches_of(m, one_epoch)
            assert sorted(sum(batches, [])) == np.flatnonzero(train_S).tolist()
            assert all(len(batch) == batch_size for batch in batches[:-1])
            assert 1 <= len(batches[-1]) <= batch_size
        assert len(list(one_epoch)) == len(one_epoch) == -(-train_MS.sum(axis=1).max() // batch_size)


def test_labels_and_slides_belong_together(bags):
    for batch in steps(bags, roles(2)):
        assert batch.labels_B.tolist() == [slide % 2 for slide in batch.slides_B.tolist()]


def test_a_step_holds_only_what_some_member_needs(bags):
    for batch in steps(bags, roles(4)):
        assert batch.uses_MB.any(dim=0).all()


def test_a_members_batches_are_the_same_alone_as_among_others(bags):
    train_MS = roles(4)
    for epoch in range(3):
        together = steps(bags, train_MS, epoch=epoch)
        for m in range(len(train_MS)):
            assert batches_of(0, steps(bags, train_MS[[m]], epoch=epoch)) == batches_of(m, together)


def test_a_member_that_stopped_trains_on_nothing_and_the_others_go_on_as_before(bags):
    train_MS = roles(3)
    before = steps(bags, train_MS)
    after = steps(bags, train_MS, active=[True, False, True])
    assert batches_of(1, after) == []
    for m in (0, 2):
        assert batches_of(m, after) == batches_of(m, before)


def test_every_epoch_has_its_own_order(bags):
    orders = [tuple(steps(bags, roles(2)).order(epoch).tolist()) for epoch in range(10)]
    assert len(set(orders)) == 10
    assert len({frozenset(order) for order in orders}) == 1


def test_trap_5_the_same_seed_gives_the_same_order_and_0_is_a_seed(bags):
    def batches(seed: int) -> list[list[int]]:
        return batches_of(0, steps(bags, roles(2), seed=seed))

    assert batches(0) == batches(0)
    assert batches(7) == batches(7)
    assert len({str(batches(seed)) for seed in range(8)}) == 8


# --- subsets of tiles -----------------------------------------------------------------------------------------------


def subsets(bags: Bags, *, seed: int = 0, epoch: int = 0, max_tiles: int = 6) -> dict[int, list[list[float]]]:
    """Tiles by slide in one epoch; every tile's values are unique, so they name it."""
    all_slides = np.ones((1, len(bags)), dtype=bool)
    batches = steps(bags, all_slides, seed=seed, epoch=epoch, max_tiles=max_tiles)
    return {slide: tiles.tolist() for batch in batches for slide, tiles in tiles_by_slide(batch).items()}


def test_trap_9_a_fresh_subset_of_tiles_every_epoch(bags):
    large = [slide for slide, n in enumerate(LENGTHS) if n > 6]
    epochs = [subsets(bags, epoch=epoch) for epoch in range(30)]
    for slide in range(len(bags)):
        own = bags.features(slide).tolist()
        for chosen in epochs:
            assert len(chosen[slide]) == min(6, LENGTHS[slide])
            assert [row for row in own if row in chosen[slide]] == chosen[slide], "distinct tiles in stored order"
    for slide in large:
        assert len({str(chosen[slide]) for chosen in epochs[:3]}) > 1
        seen = {str(row) for chosen in epochs for row in chosen[slide]}
        assert len(seen) == LENGTHS[slide], "in the end every tile has been used"


def test_a_subset_is_decided_by_seed_epoch_and_slide(bags):
    assert subsets(bags, seed=0, epoch=3) == subsets(bags, seed=0, epoch=3)
    assert subsets(bags, seed=0, epoch=3) != subsets(bags, seed=1, epoch=3)
    alone = steps(bags, np.eye(len(bags), dtype=bool)[[4]], epoch=3, max_tiles=6)
    (batch,) = alone
    assert tiles_by_slide(batch)[4].tolist() == subsets(bags, epoch=3)[4], "not by who else is in the study"


def test_subsets_of_slides_of_equal_length_differ(bags_of):
    tiles_TD = np.arange(40, dtype=np.float32).reshape(40, 1)
    chosen = subsets(bags_of([tiles_TD, tiles_TD, tiles_TD]), max_tiles=10)
    assert chosen[0] != chosen[1] != chosen[2] != chosen[0]


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles_a_batch", [1, 12, 40, 10_000])
def test_evaluation_covers_all_slides_once_in_order_with_all_their_tiles(bags, tiles_a_batch, monkeypatch):
    monkeypatch.setattr(mil.training.bags, "EVALUATION_TILES", tiles_a_batch)
    order = [7, 2, 12, 0, 4, 5]
    evaluation = EvaluationSteps(bags, np.arange(len(bags)), order, n_members=3)
    batches = list(evaluation)
    assert sum([batch.slides_B.tolist() for batch in batches], []) == order
    assert sum([batch.labels_B.tolist() for batch in batches], []) == order
    assert len(evaluation) == len(batches)
    for batch in batches:
        assert batch.uses_MB.shape == (3, len(batch.slides_B))
        assert batch.uses_MB.all()
        assert len(batch.slides_B) == 1 or sum(LENGTHS[s] for s in batch.slides_B.tolist()) <= tiles_a_batch
        for slide, tiles_TD in tiles_by_slide(batch).items():
            assert torch.equal(tiles_TD, bags.features(slide))


def test_evaluation_of_no_slides_has_no_batches(bags):
    empty = EvaluationSteps(bags, np.zeros(len(bags), dtype=np.int64), [], n_members=1)
    assert (len(empty), list(empty)) == (0, [])


# --- moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_training_moments_equal_numpys_over_each_members_training_tiles(arrays, bags_of, dtype):
    bags, train_MS = bags_of([10 * array + 50 for array in arrays], dtype), roles(3)
    mean_MD, std_MD = training_moments(bags, train_MS)
    for m, train_S in enumerate(train_MS):
        tiles_TD = np.concatenate([bags.features(i).numpy().astype(np.float64) for i in np.flatnonzero(train_S)])
        np.testing.assert_allclose(mean_MD[m].numpy(), tiles_TD.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(std_MD[m].numpy(), tiles_TD.std(axis=0), rtol=1e-5)
