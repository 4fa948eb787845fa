"""A random order without an array of its size."""

import numpy as np
import pytest

from tessera.data.order import Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 65536, 65537])
def test_every_number_comes_once(count):
    order = Permutation(count, 7, 1).at(np.arange(count))
    assert np.array_equal(np.sort(order), np.arange(count))


def test_a_place_is_found_alone_and_does_not_depend_on_what_is_asked_beside_it():
    order = Permutation(1000, 7, 1)
    assert [order[place] for place in (0, 999, 5)] == order.at(np.array([0, 999, 5])).tolist()


def test_another_seed_and_another_epoch_give_another_order():
    orders = [Permutation(1000, *seed).at(np.arange(1000)) for seed in ((7, 0), (7, 1), (8, 0), (70,))]
    for i, one in enumerate(orders):
        assert all((one == other).mean() < 0.02 for other in orders[:i])


def test_the_order_is_that_of_every_version():
    assert Permutation(10, 42, 0).at(np.arange(10)).tolist() == FIRST


def test_places_are_spread_evenly():
    """The mean distance of neighbours in a random order of n is n / 3; the chi-square of 16 × 16 cells is about 225."""
    n = 1 << 16
    order = Permutation(n, 3).at(np.arange(n))
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.01
    cells = np.histogram2d(np.arange(n), order, bins=16)[0]
    assert 150 < ((cells - n / 256) ** 2 / (n / 256)).sum() < 320


FIRST = [0, 8, 4, 5, 7, 2, 1, 9, 6, 3]
