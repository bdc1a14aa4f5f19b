"""The bar of extraction: shares of slides add up to slides, and never to more than there are."""

import io
import re
import warnings
from fractions import Fraction
from functools import reduce
from operator import add

import numpy as np
import pytest
from tqdm import TqdmWarning, tqdm

from extract.extraction.summary import Progress

FORMAT = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} slides, {elapsed}<{remaining}{postfix}"


def make_bar(total: int, initial: int = 0) -> tqdm:
    return tqdm(
        total=total, initial=initial, file=io.StringIO(), mininterval=0, miniters=0, ascii=True, bar_format=FORMAT
    )


@pytest.mark.parametrize("seed", range(20))
def test_tiles_in_any_order_give_the_exact_number_of_slides(seed):
    """Beside exact fractions; slides fail, are empty, or are finished by others in between."""
    rng = np.random.default_rng(seed)
    planned = {f"s{i}": int(n) for i, n in enumerate(rng.integers(1, 50, size=7))}
    with warnings.catch_warnings(), make_bar(total=len(planned) + 3, initial=3) as bar:
        warnings.simplefilter("error")
        progress, done, gone = Progress(bar), dict.fromkeys(planned, 0), set()
        while len(gone) < len(planned):
            slide = str(rng.choice([s for s in planned if s not in gone]))
            n = int(rng.integers(1, planned[slide] - done[slide] + 1))
            if rng.random() < 0.05:
                progress.add_slide(slide)
                done[slide] = planned[slide]
            else:
                done[slide] += n
                progress.add_tiles(slide, n, planned[slide])
            gone |= {slide} if done[slide] == planned[slide] else set()
            if slide in gone and rng.random() < 0.2:
                progress.add_slide(slide)  # all its tiles are there, and then it fails
            exact = 3 + sum(Fraction(done[s], planned[s]) for s in planned)
            assert bar.n == pytest.approx(float(exact), abs=1e-9)
            assert bar.n <= bar.total
        assert bar.n == bar.total
        assert re.search(r"100%.* 10\.0/10 slides", str(bar))


def update_by_shares(n_tiles: int) -> None:
    with make_bar(total=2) as bar:
        for _ in range(2 * n_tiles):
            bar.update(1 / n_tiles)


def test_adding_shares_one_by_one_is_what_went_past_the_end():
    """The reason for whole numbers: some shares add up to more than the slides that they are of."""
    sums = {n: reduce(add, [1 / n] * (2 * n)) for n in range(2, 60)}  # from Python 3.12 `sum` loses nothing
    beyond = next(n for n, total in sums.items() if total > 2)
    with pytest.warns(TqdmWarning, match="clamping frac"):
        update_by_shares(beyond)


def test_a_bar_that_is_not_shown_counts_nothing():
    with tqdm(total=4, disable=True) as bar:
        progress = Progress(bar)
        progress.add_tiles("a", 3, 3)
        progress.add_slide("b")
        assert bar.n == 0
