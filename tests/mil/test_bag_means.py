"""The mean tile of every slide. Axes: S slides, T tiles, D features."""

import numpy as np
import pytest
import torch

from mil.training.bags import Announced, Bags, MappedViews


def test_means_are_those_of_every_tile_in_double_precision(bags_of):
    rng = np.random.default_rng(0)
    arrays = [(1000 + rng.normal(size=(n, 5))).astype(np.float32) for n in (1, 7, 300)]
    expected_SD = [np.sum(a.astype(np.float64), axis=0) / len(a) for a in arrays]
    np.testing.assert_allclose(bags_of(arrays).means_SD, expected_SD, rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_slides_on_disk_have_the_same_means_and_are_not_kept(dtype):
    arrays = {f"s{n}": np.random.default_rng(n).normal(size=(n, 3)).astype(dtype) for n in (2, 9, 40)}

    class Source:
        features = mapped = staticmethod(arrays.__getitem__)

    shapes = [Announced(a.shape, "") for a in arrays.values()]
    views = MappedViews(Source(), list(arrays), shapes, 0, budget=0)
    lengths_S = np.array([len(a) for a in arrays.values()])
    in_memory = Bags(tuple(arrays), lengths_S, 3, "ram", tuple(torch.from_numpy(a) for a in arrays.values()))
    mapped = Bags(tuple(arrays), lengths_S, 3, "mmap", views).means_SD
    assert mapped.dtype == np.float64
    np.testing.assert_array_equal(mapped, in_memory.means_SD)
    assert len(views.kept) == 1, "only the last slide is still held"
