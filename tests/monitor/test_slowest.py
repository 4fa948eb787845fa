"""The slowest rank and the slow machine, named with what they take more than the others."""

from tessera.monitor.slowest import Slowest, slowest_of


def test_the_slowest_of_four_is_named_with_its_excess_over_the_median_of_the_others():
    assert slowest_of([1.0, 1.25, 4.0, 1.5], ["a"] * 4) == Slowest(2, "a", 2.75)


def test_one_rank_is_not_compared():
    assert slowest_of([1.0], ["a"]) is None


def test_a_machine_is_named_when_all_of_its_ranks_are_slower_than_all_others():
    found = slowest_of([1.0, 1.0, 2.0, 3.0], ["a", "a", "b", "b"])
    assert found == Slowest(3, "b", 1.5, whole_machine=True)


def test_one_slow_rank_does_not_make_its_machine_slow():
    assert slowest_of([1.0, 1.0, 1.0, 3.0], ["a", "a", "b", "b"]) == Slowest(3, "b", 2.0)
    assert slowest_of([1.0, 1.0, 1.05, 1.06], ["a", "a", "b", "b"]).whole_machine is False
