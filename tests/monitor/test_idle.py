"""Idle time is what a rank stands in a collective before the last one has come that it needs."""

import pytest

from monitor.idle_cases import split_of, waits_of_fsdp
from support.pool import pool
from tessera.monitor.timeline import Waits

COL = ("col",)


def met(begin: float, end: float, kind: str = "all_gather", axes: tuple[str, ...] = COL, **more) -> Waits:
    return Waits(kind, axes, more.get("peer"), more.get("waited_for", True), begin, [(begin, end)])


def split(waits: list[list[Waits]], machines: list[str] | None = None, sizes: dict[str, int] | None = None):
    ranks = len(waits)
    return pool(ranks).run(split_of, sizes or {"col": ranks}, machines or ["here"] * ranks, waits)


def test_the_last_one_to_come_is_not_idle():
    """Data move from 5 to 6: rank 0 has come at 2, rank 1 at 5."""
    assert [found[:2] for found in split([[met(2.0, 6.0)], [met(5.0, 6.0)]])] == [(3.0, {COL: 1.0}), (0.0, {COL: 1.0})]


def test_each_collective_by_itself():
    """Rank 0 waits for rank 1 in the first, rank 1 for rank 0 in the second: sums over a step would show neither."""
    first, second = split([[met(0.0, 4.0), met(8.0, 9.0)], [met(3.0, 4.0), met(5.0, 9.0)]])
    assert first[:2] == (3.0, {COL: 2.0}) and second[:2] == (3.0, {COL: 2.0})


def test_a_wait_that_begins_after_all_have_come_is_communication():
    """Issued at 0 and 1, waited for from 3 on: both had come by then."""
    waits = [Waits("all_gather", COL, None, True, at, [(3.0, 5.0)]) for at in (0.0, 1.0)]
    assert [found[:2] for found in split([[w] for w in waits])] == [(0.0, {COL: 2.0})] * 2


def test_receivers_of_a_broadcast_need_the_root_alone():
    """Rank 1 comes late and nobody waits for it; rank 0 waits for the root, rank 2, until 3."""
    waits = [
        [met(0.0, 4.0, "broadcast", waited_for=False)],
        [met(6.0, 7.0, "broadcast", waited_for=False)],
        [met(3.0, 3.5, "broadcast")],
    ]
    assert [found[:2] for found in split(waits, sizes={"col": 3})] == [
        (3.0, {COL: 1.0}),
        (0, {COL: 1.0}),
        (0, {COL: 0.5}),
    ]


def test_a_message_needs_its_other_end_alone():
    """The second message from 0 to 1 is the second that 1 receives from 0, whatever others send between."""
    ring = ("ring",)

    def message(kind: str, peer: int, begin: float, end: float) -> Waits:
        return met(begin, end, kind, ring, peer=peer)

    waits = [
        [message("send", 1, 1.0, 1.0), message("send", 1, 6.0, 6.0)],
        [message("receive", 0, 0.0, 2.0), message("receive", 2, 2.0, 4.0), message("receive", 0, 4.0, 9.0)],
        [message("send", 1, 3.5, 3.5)],
    ]
    found = split(waits, sizes={"ring": 3})
    assert found[1][:2] == (1.0 + 1.5 + 2.0, {ring: 1.0 + 0.5 + 3.0})


def test_clocks_of_machines_are_compared_where_all_leave_together():
    """The second machine's clock is 100 s ahead; both leave the last collective of all together."""
    waits = [[met(2.0, 6.0), met(7.0, 8.0)], [met(105.0, 106.0), met(107.0, 108.0)]]
    assert [found[0] for found in split(waits, ["a", "b"])] == [3.0, 0.0]
    assert [found[0] for found in split(waits, ["a", "a"])] != [3.0, 0.0], "the wrong answer is far from it"


def test_ranks_that_met_in_other_collectives_are_not_compared():
    waits = [[met(0.0, 2.0)], [met(1.0, 2.0), met(3.0, 4.0)]]
    assert [found[:2] for found in split(waits)] == [(0.0, {COL: 2.0}), (0.0, {COL: 2.0})]


def test_it_costs_a_collective_for_all_and_one_for_each_set_of_axes():
    row, both = ("row",), ("row", "col")
    waits = [[met(0.0, 1.0), met(1.0, 2.0), met(0, 1, axes=row), met(0, 1, axes=both)] for _ in range(4)]
    for found in split(waits, sizes={"row": 2, "col": 2}):
        assert sorted(found[2]) == sorted([both, COL, row, both])
    assert split([[]]) == [(0.0, {}, [])]


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_rank_that_shifts_nothing_is_waited_for_by_nobody(skipped):
    nothing = Waits("shift", COL, None, True, None, [])
    waits = [[met(0.0, 3.0)], [met(2.0, 3.0)]]
    waits[skipped][0] = nothing
    found = split(waits)
    assert found[1 - skipped][0] == 0.0 and found[skipped][:2] == (0.0, {COL: 0.0})


def test_fsdp2_waits_on_streams_are_marked():
    """On a GPU they do not pass our door. Each layer and the whole wait in the forward, layers in the backward too."""
    for layers, marks, seconds in pool(2).run(waits_of_fsdp):
        assert len(marks) >= 2 * layers + 1 and set(marks) == {4}
        assert seconds >= len(marks), "a mark of this clock is a second, and a wait lies between two"
