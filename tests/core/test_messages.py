"""All-to-alls of uneven sizes, and sends and receives in one batch, against what one process computes."""

import pytest
import torch

from core.message_cases import (
    DTYPES,
    all_to_all_left_out,
    all_to_all_whole,
    along_one_axis_of_two,
    every_all_to_all,
    exchanged,
    profiled,
    refused,
    sent_to,
    slowed,
)
from support.pool import pool
from tessera.core.collectives import Recorder, all_to_all, start_exchange
from tessera.plan.count import fake_tensors, fake_world

SIZES = {  # what each rank sends each
    "even": [[2, 2], [2, 2]],
    "uneven": [[1, 3], [2, 0]],
    "one sends nothing": [[0, 0], [4, 1]],
    "nothing at all": [[0, 0], [0, 0]],
    "four, uneven": [[(3 * r + 2 * s) % 4 for s in range(4)] for r in range(4)],
    "four, one gets nothing": [[0 if s == 2 else r + s for s in range(4)] for r in range(4)],
    "four, one each": [[int(s == (r + 1) % 4) for s in range(4)] for r in range(4)],
}


@pytest.mark.parametrize("name", SIZES)
def test_all_to_all(name):
    sizes = SIZES[name]
    axes = {"col": 2} if len(sizes) == 2 else {"ring": 2, "ulysses": 2}
    for rank, found in enumerate(pool(len(sizes), gloo=True).run(every_all_to_all, sizes, axes)):
        assert all(found["right"].values()), found["right"]
        out = sum(sizes[rank])
        back = sum(sent_to(sizes, rank))
        for dtype, moved in zip(DTYPES, found["moved"], strict=True):
            row, own, axis = 3 * dtype.itemsize, sizes[rank][rank], "·".join(axes)
            assert moved == [
                ("all_to_all", axis, len(sizes), row * out, row * (back - own)),
                ("all_to_all", axis, len(sizes), row * back, row * (out - own)),
            ]


@pytest.mark.parametrize(
    "sent, received, why",
    [
        ([1, 2], [1, 2], "do not cut (4, 2) for the 2 ranks along ('col',)"),
        ([1, 1, 2], [1, 1, 2], "do not cut (4, 2)"),
        ([2, 2], [2, 2, 0], "do not cut (4, 2)"),
        ([2, 2], [1, 1], "sizes [2, 2] sent and [1, 1] received"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sent, received, why):
    for message, records in pool(2, gloo=True).run(refused, sent, received):
        assert why in message
        assert records == 0


def test_an_all_to_all_left_out_keeps_the_own_part():
    sizes = SIZES["four, uneven"]
    for rank, (found, again) in enumerate(pool(4, gloo=True).run(all_to_all_left_out, sizes)):
        parts = list(torch.zeros_like(all_to_all_whole(sizes, rank)).split(sent_to(sizes, rank)))
        parts[rank] = all_to_all_whole(sizes, rank).split(sent_to(sizes, rank))[rank]
        assert torch.equal(found, torch.cat(parts)) and torch.equal(again, found)
        assert not torch.equal(found, all_to_all_whole(sizes, rank))


# ------------------------------------------------------------------------------------------- messages

MESSAGES = [(0, 1, 4), (1, 0, 2), (0, 1, 2), (1, 2, 5), (0, 2, 0)]  # from, to, rows; rank 3 has none


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages_of_one_batch(dtype):
    """Several to one rank, two of them from the same, both ways between two, an empty one; views are sent."""
    for rank, found in enumerate(pool(4, gloo=True).run(exchanged, MESSAGES, dtype)):
        sent = [rows for source, _, rows in MESSAGES if source == rank]
        received = [rows for _, to, rows in MESSAGES if to == rank]
        assert found["same"] == [True] * len(received) and found["ours"]
        row = 3 * dtype.itemsize
        assert found["moved"] == [
            *(("send", "pp", 4, row * n, 0) for n in sent),
            *(("receive", "pp", 4, row * n, row * n) for n in received),
        ]
        issued = ["issue send"] * len(sent) + ["issue receive"] * len(received)
        assert found["events"] == issued + ["wait receive"] * len(received) + ["wait send"] * len(sent)


def test_a_message_left_out_is_zero_and_nobody_waits_for_ever():
    """The rank that leaves it out sends zeros, or gets them; the fifth message is empty, so all of it is zero."""
    everything = [[False], [False, False], [False, True], []]
    for number, what, zero in [
        (1, "sends: the third and fourth message; a receive: the fifth", [[False], [False, True], [True, True], []]),
        (3, "receives: the second and third message", [[True], [False, True], [False, True], []]),
        (9, "none", everything),
    ]:
        found = pool(4, gloo=True).run(exchanged, MESSAGES, torch.float64, number)
        assert [rank["zero"] for rank in found] == zero, what
        again = pool(4, gloo=True).run(exchanged, MESSAGES, torch.float64, number)
        assert [rank["same"] for rank in again] == [rank["same"] for rank in found]


def test_messages_along_one_axis_of_two():
    for right in pool(4, gloo=True).run(along_one_axis_of_two):
        assert right == [True, True]


def test_delays_are_asked_for_messages_too():
    for asked, same in pool(2, gloo=True).run(slowed):
        assert asked == ["all_to_all", "send", "receive"] and same


def test_the_recorder_counts_messages_as_the_profiler_sees_them():
    for recorded, calls in pool(2, gloo=True).run(profiled):
        assert calls == ["alltoall_base_", "allreduce_", "send", "recv_"]
        assert recorded == [("all_to_all", 24), ("all_reduce", 4), ("send", 20), ("receive", 20)]


def test_no_group_costs_nothing():
    x = torch.ones(3, 4, requires_grad=True)
    with Recorder() as recorder:
        assert all_to_all(x, [3], [3], None) is x
        assert start_exchange([], [], None) == ([], [])
    assert recorder.records == [] and recorder.events == []


def test_messages_in_a_fake_world():
    with fake_world({"pp": 4, "ulysses": 2}, rank=3) as mesh:
        groups = mesh.group(("ulysses",)), mesh.group(("pp",))
        with fake_tensors(), Recorder() as recorder:
            assert all_to_all(torch.empty(5, 2), [4, 1], [3, 1], groups[0]).shape == (4, 2)
            leaving, arriving = start_exchange([(torch.empty(7), 2)], [(torch.empty(3), 0)], groups[1])
            assert [pending.wait().shape for pending in (*leaving, *arriving)] == [(7,), (3,)]
    assert [(r.kind, r.axis, r.bytes, r.received) for r in recorder.records] == [
        ("all_to_all", "ulysses", 40, 24),
        ("send", "pp", 28, 0),
        ("receive", "pp", 12, 12),
    ]
