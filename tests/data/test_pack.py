"""Packing against first fit decreasing over the whole set; nothing is lost, and rows are equally full."""

from functools import cache
from unittest.mock import patch

import numpy as np
import pytest

from tessera.data.epochs import Packed
from tessera.data.order import Permutation
from tessera.data.pack import dealt, in_rows, pack
from tessera.data.samples import EPOCH_ORDER

LENGTH = 2048
LENGTHS = {
    "log-normal": lambda draw, n: np.exp(draw.normal(5.5, 1.0, n)),
    "uniform": lambda draw, n: draw.uniform(1, LENGTH + 1, n),
    "exponential": lambda draw, n: draw.exponential(600, n) + 1,
    "two humps": lambda draw, n: np.where(draw.random(n) < 0.5, draw.normal(300, 60, n), draw.normal(1300, 200, n)),
}
CASES = [(name, 6000) for name in LENGTHS] + [("uniform", 40_000), ("exponential", 40_000)]


class Lengths:
    """As much of Samples as packing reads."""

    def __init__(self, lengths):
        self.all = np.asarray(lengths, np.int64)

    def __len__(self):
        return len(self.all)

    def lengths(self, indices):
        return self.all[indices]


@cache
def drawn(name, count):
    return Lengths(np.clip(LENGTHS[name](np.random.default_rng(5), count), 1, LENGTH).astype(np.int64))


@cache
def two_epochs(name, count, seed=3):
    """The samples of each row of two epochs, and how many rows the first has."""
    epochs = Packed(drawn(name, count), LENGTH, seed, shuffle=True)
    return [epochs.samples(row) for row in range(epochs.rows_before(2))], epochs.rows_in(0)


def first_fit_decreasing(lengths, capacity):
    """The number of rows, each sample into the first row that takes it: a row's room lies in a tree of maxima."""
    leaves = 1 << (len(lengths) - 1).bit_length()
    room, most = [capacity] * (2 * leaves), 0
    for length in sorted(lengths.tolist(), reverse=True):
        at = 1
        while at < leaves:
            at = 2 * at + (room[2 * at] < length)
        most = max(most, at - leaves + 1)
        room[at] -= length
        while at := at // 2:
            room[at] = max(room[2 * at], room[2 * at + 1])
    return most


def best_fit_decreasing(lengths, capacity):
    """The number of rows, each sample into the fullest row that takes it."""
    rooms = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
        rooms.append((min(fits) if fits else capacity) - length)
    return len(rooms)


@pytest.mark.parametrize("name, count", CASES)
def test_rows_are_nearly_as_full_as_those_of_first_fit_over_all_samples(name, count):
    lengths, (_, rows) = drawn(name, count).all, two_epochs(name, count)
    ours, theirs = (lengths.sum() / LENGTH / n for n in (rows, first_fit_decreasing(lengths, LENGTH)))
    assert ours >= theirs - 0.01


@pytest.mark.parametrize("name, count", CASES)
def test_no_sample_is_lost_or_repeated_and_no_row_is_too_long(name, count):
    rows, first = two_epochs(name, count)
    for epoch in (rows[:first], rows[first:]):
        assert sorted(sample for row in epoch for sample in row) == list(range(count))
        assert all(row and drawn(name, count).all[row].sum() <= LENGTH for row in epoch)
    assert rows[:first] != rows[first:]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name, count", CASES)
def test_the_fullest_data_rank_of_a_step_is_near_the_mean(name, count, ranks, micro):
    rows, _ = two_epochs(name, count)
    tokens = np.array([drawn(name, count).all[row].sum() for row in rows])
    whole = tokens[: len(tokens) // (ranks * micro) * ranks * micro].reshape(-1, ranks * micro)
    shares = np.array([step[dealt(step, ranks)].sum(1) for step in whole])
    assert (shares.max(1) <= 1.02 * shares.mean(1)).all()


def test_rows_in_random_order_would_not_be_balanced():
    lengths = drawn("two humps", 6000)
    tokens = np.array([lengths.all[row].sum() for row in in_rows(pack(lengths.all, LENGTH))])
    steps = np.random.default_rng(1).permutation(tokens)[: len(tokens) // 8 * 8].reshape(-1, 8)
    assert (steps.max(1) > 1.02 * steps.mean(1)).mean() > 0.5


@pytest.mark.parametrize("name", LENGTHS)
def test_the_number_of_rows_is_that_of_best_fit_or_half_a_per_cent_more(name):
    lengths = drawn(name, 1000).all
    rows, needed = pack(lengths, LENGTH).max() + 1, best_fit_decreasing(lengths, LENGTH)
    assert needed <= rows <= needed + needed // 200
    assert pack(lengths[::-1], LENGTH).max() + 1 == rows, "whatever the order"


def test_rows_follow_from_data_seed_and_epoch_alone():
    lengths = drawn("exponential", 6000)
    rows, first = two_epochs("exponential", 6000)
    fresh = Packed(lengths, LENGTH, 3, shuffle=True)
    assert fresh.samples(first + 7) == rows[first + 7], "found without those before"
    assert fresh.place(first + 7) == (1, 7) and fresh.place(first - 1) == (0, first - 1)
    other = Packed(lengths, LENGTH, 4, shuffle=True)
    assert [other.samples(row) for row in range(20)] != rows[:20]


def test_windows_of_a_large_set_are_packed_by_themselves():
    lengths = drawn("uniform", 6000)
    epochs, order = Packed(lengths, LENGTH, 3, True, window=1000), np.arange(6000)
    assert epochs.rows_before(2) == epochs.rows_in(0) + epochs.rows_in(1)
    for epoch in (0, 1):
        rows = [epochs.samples(epochs.rows_before(epoch) + row) for row in range(epochs.rows_in(epoch))]
        seen = [sample for row in rows for sample in row]
        drawn_now = Permutation(6000, EPOCH_ORDER, 3, epoch).at(order)
        for first in range(0, 6000, 1000):
            assert set(seen[first : first + 1000]) == set(drawn_now[first : first + 1000].tolist())
    rest = Packed(drawn("uniform", 1700), LENGTH, 3, True, window=1000)
    alone = Packed(drawn("uniform", 1700), LENGTH, 3, True)
    assert rest.rows_in(0) == alone.rows_in(0), "what is left belongs to the last window"


@pytest.mark.parametrize("shares", [1, 2, 5, 9])
def test_windows_are_counted_in_shares(shares):
    """More shares than windows too; who takes the counts packs nothing to know where an epoch ends."""
    lengths = drawn("uniform", 6000)
    alone, taking, others = (Packed(lengths, LENGTH, 3, True, window=1000) for _ in range(3))
    for epoch in (0, 1):
        assert taking.counted == epoch and not taking.counts_epoch(epoch) and not taking.counts_row(10**4 * epoch)
        counts = [others.count_windows(epoch, share, shares) for share in range(shares)]
        assert max(map(len, counts)) == -(-6 // shares)
        taking.take_counts(counts)
    with patch("tessera.data.epochs.pack", side_effect=AssertionError):
        found = [taking.rows_before(epoch) for epoch in (0, 1, 2)]
        assert taking.counts_row(found[2] - 1) and not taking.counts_row(found[2])
    assert found == [alone.rows_before(epoch) for epoch in (0, 1, 2)]
    assert [taking.samples(row) for row in range(found[2])] == [alone.samples(row) for row in range(found[2])]


def test_without_shuffle_rows_come_in_the_order_of_their_first_samples():
    epochs = Packed(Lengths([4, 7, 2, 8, 1, 3, 5]), 10, 3, shuffle=False)
    rows = [epochs.samples(row) for row in range(epochs.rows_in(0))]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows) and rows[0][0] == 0
    assert [epochs.samples(epochs.rows_in(0) + row) for row in range(len(rows))] == rows


@pytest.mark.parametrize(
    "lengths, rows",
    [([10], 1), ([10, 10], 2), ([1] * 10, 1), ([6, 5, 5, 4], 2), ([9, 9, 1, 1], 2), ([1] * 25, 3)],
    ids=str,
)
def test_small_sets(lengths, rows):
    found = pack(np.array(lengths), 10)
    assert found.max() + 1 == rows
    assert np.bincount(found, weights=lengths).max() <= 10


def test_any_small_set_is_packed_whole():
    """Every sample in a row, none too full, none empty: of many sets in which rows give samples to one another."""
    draw = np.random.default_rng(2)
    for _ in range(500):
        lengths = draw.integers(1, 101, draw.integers(1, 60)) // draw.choice([1, 5, 20]) + 1
        found = pack(lengths, 101)
        tokens = np.bincount(found, weights=lengths)
        assert len(found) == len(lengths) and tokens.min() > 0 and tokens.max() <= 101
        assert len(tokens) == best_fit_decreasing(lengths, 101)


def test_samples_longer_than_a_row_are_refused():
    with pytest.raises(ValueError, match="samples of 11 tokens do not go into rows of 10"):
        pack(np.array([3, 11]), 10)


def test_rows_are_dealt_there_and_back():
    tokens = np.array([5, 9, 7, 1, 8, 6])
    assert tokens[dealt(tokens, 2)].tolist() == [[9, 6, 5], [8, 7, 1]]
