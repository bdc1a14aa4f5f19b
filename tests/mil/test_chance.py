"""Random numbers of training: the published generator, what they depend on, and that they look like chance."""

import itertools

import numpy as np
import pytest
import torch

from mil.aggregators import chance as chance_module
from mil.aggregators.chance import Chance, counted, mixed

LENGTHS = (1000, 500, 1500)


def splitmix64(seed: int, n: int) -> list[int]:
    """Steele, Lea and Flood 2014, figure 1, in Python's integers."""
    found, mask = [], 2**64 - 1
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_numbers_are_those_of_splitmix64():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5) == published
    seeds = [1234567, 0, -1, -(2**63), 2**63 - 1]
    found_RW = counted(torch.tensor(seeds), 5).numpy().view(np.uint64).tolist()
    assert found_RW == [splitmix64(seed, 5) for seed in seeds]
    assert len(set(mixed(torch.arange(-500, 500)).tolist())) == 1000, "one to one"


def test_dropout_keeps_the_share_and_the_mean_that_it_should():
    ones_mTH = torch.ones(2, 3000, 40)
    dropped_mTH = Chance((3, 4), 0, (7, 8, 9)).dropout(ones_mTH, LENGTHS, 0.25, "here")
    assert dropped_mTH.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped_mTH.mean().item() == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_have_the_type_asked_for_and_are_dropped_alike_in_every_type(dtype):
    chance = Chance((3,), 0, (7, 8, 9))
    factors = chance.factors(torch.empty(1, 3000, 41, dtype=dtype), LENGTHS, 0.3, "here")
    assert factors.dtype == dtype
    assert torch.equal(factors == 0, chance.factors(torch.empty(1, 3000, 41), LENGTHS, 0.3, "here") == 0)


def test_values_do_not_depend_on_how_many_are_made_at_a_time_or_who_else_is_there(monkeypatch):
    """Three members and bags together; each alone; in pieces of seven numbers. 41 values are not a multiple of four."""
    seeds, slides = (3, 4, 5), (7, 8, 9)
    together = Chance(seeds, 2, slides).factors(torch.empty(3, 3000, 41), LENGTHS, 0.3, "here")
    for m, seed in enumerate(seeds):
        for part_TH, slide in zip(together[m].split(LENGTHS), slides, strict=True):
            alone = Chance((seed,), 2, (slide,)).factors(torch.empty(1, len(part_TH), 41), [len(part_TH)], 0.3, "here")
            assert torch.equal(alone[0], part_TH)
    monkeypatch.setattr(chance_module, "IN_CACHE", 77)
    assert torch.equal(Chance(seeds, 2, slides).factors(torch.empty(3, 3000, 41), LENGTHS, 0.3, "here"), together)


def test_member_epoch_slide_and_use_each_change_everything():
    """No two streams agree more often than independent ones do: 40,000 draws of 1/2, five standard deviations."""

    def draw(seed: int, epoch: int, slide: int, what: str) -> torch.Tensor:
        return Chance((seed,), epoch, (slide,)).factors(torch.empty(1, 1000, 40), [1000], 0.5, what) > 0

    settings = list(itertools.product((0, 1, 2**40), (0, 1), (0, 1, 300), ("here", "there")))
    streams = [draw(*setting) for setting in settings]
    for a, b in itertools.combinations(range(len(streams)), 2):
        agree = (streams[a] == streams[b]).float().mean().item()
        assert agree == pytest.approx(0.5, abs=5 * 0.5 / 200), (settings[a], settings[b])


def test_neighbours_in_a_draw_are_independent():
    """The four values of one number, neighbouring numbers, neighbouring tiles."""
    x_TH = Chance((3,), 0, (7,)).factors(torch.empty(1, 4000, 64), [4000], 0.5, "here")[0] - 1
    for tiles, values in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0)):
        product = x_TH[tiles:, values:] * x_TH[: 4000 - tiles, : 64 - values]
        assert product.mean().item() == pytest.approx(0, abs=5 / product.numel() ** 0.5), (tiles, values)


def test_orders_are_permutations_and_every_place_is_as_likely():
    orders_mL = Chance(tuple(range(6000)), 0, (7,)).shuffled(5, "here", torch.device("cpu"))
    assert torch.equal(orders_mL.sort(dim=1).values, torch.arange(5).expand(6000, -1))
    counts = torch.stack([torch.bincount(orders_mL[:, i], minlength=5) for i in range(5)]).double()
    assert (((counts - 1200) ** 2).sum() / 1200).item() < 40, "chi-square with 16 degrees of freedom: p = 0.0008"


def test_torchs_own_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    Chance((3,), 0, (7,)).factors(torch.empty(1, 10, 4), [10], 0.5, "here")
    assert torch.equal(torch.get_rng_state(), before)
