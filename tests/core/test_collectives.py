"""The collectives, and a recorder that counts what torch.distributed was handed: the profiler's own account agrees."""

from collections import Counter

import pytest
import torch

from core.core_cases import (
    c10d_calls,
    each_collective,
    indivisible,
    pending,
    recorded_and_profiled,
    rooted_and_shifted,
    step_of,
)
from support.mesh import shared_mesh
from support.pool import pool
from tessera.core.collectives import (
    Record,
    Recorder,
    all_gather,
    all_reduce,
    largest,
    reduce_scatter,
    start_all_gather,
    start_broadcast,
    start_reduce_to,
    start_shift,
)
from tessera.sizes.schedule import Schedule


def test_collectives_along_every_dim():
    for right in pool(2, gloo=True).run(each_collective):
        assert all(right.values()), right


def test_collectives_travel_together_and_are_awaited_in_any_order():
    for order, values in pool(2, gloo=True).run(pending):
        assert values
        assert order == [
            "issue all_gather",
            "issue reduce_scatter",
            "issue all_reduce",
            "wait all_reduce",
            "wait all_gather",
            "wait reduce_scatter",
        ]


def test_lengths_that_do_not_divide_are_refused():
    for message, records in pool(2, gloo=True).run(indivisible):
        assert "dim 1 of (3, 5) does not divide by the 2 ranks along ('col',)" in message
        assert records == 0


def test_no_group_costs_nothing():
    x = torch.ones(3, 4, requires_grad=True)
    with Recorder() as recorder:
        for result in (all_gather(x, 1, None), reduce_scatter(x, 0, None), all_reduce(x, None), largest(x, None)):
            assert result is x
        assert start_all_gather(x, 0, None).wait() is x
    assert recorder.records == [] and recorder.events == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_in_one_process_records_nothing(name):
    step = step_of(name, {})
    with Recorder() as recorder:
        assert step(0).finite
    assert recorder.records == [] and recorder.events == []


@pytest.mark.parametrize("name", ["summa", "cannon"])
def test_the_recorder_counts_the_loops_as_the_profiler_sees_them(name):
    for recorded, profiled in pool(4, gloo=True).run(
        recorded_and_profiled, "llama", True, {"row": 2, "col": 2}, Schedule(name)
    ):
        assert recorded == profiled
        kinds = {kind for kind, _ in recorded}
        assert kinds - {"all_gather", "reduce_scatter", "all_reduce"} == (
            {"broadcast", "reduce"} if name == "summa" else {"shift"}
        )


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_recorder_counts_what_the_profiler_sees(name, sequence_parallel):
    """Kind, number and bytes of every collective of one optimizer step."""
    for recorded, profiled in pool(2, gloo=True).run(recorded_and_profiled, name, sequence_parallel):
        assert Counter(recorded) == Counter(profiled)
        assert recorded == profiled, "in another order"
        kinds = {"all_gather", "reduce_scatter", "all_reduce"} if sequence_parallel else {"all_gather", "all_reduce"}
        assert {kind for kind, _ in recorded} == kinds
        assert len(recorded) >= 10 and ("all_reduce", 8 * 3) in recorded, "the norm, the loss and a request to stop"


def test_reading_the_profiler():
    """Of a gather the output is the whole tensor, of a reduce-scatter the input; dtypes count."""

    def event(name, ts, dims, types):
        return {"name": name, "ts": ts, "args": {"Input Dims": dims, "Input type": types}}

    events = [
        event("c10d::allreduce_", 3, [[[7]], []], ["TensorList", ""]),
        event("c10d::_reduce_scatter_base_", 2, [[2, 5], [4, 5]], ["float", "float"]),
        event("c10d::_allgather_base_", 1, [[10, 3], [5, 3]], ["float", "float"]),
        event("gloo:all_reduce", 4, [[7]], ["double"]),
    ]
    assert c10d_calls(events) == [("all_gather", 120), ("reduce_scatter", 80), ("all_reduce", 56)]


# ------------------------------------------------------------------------------------------------- the recorder


def test_received_bytes():
    """Of 40 bytes along four ranks: rings pass shards on; chains to and from rank 1 begin at ranks 2 and 1."""
    for rank, received in enumerate(pool(4, gloo=True).run(received_by_kind)):
        assert received == {
            "all_gather": 3 * 40,
            "reduce_scatter": 30,
            "all_reduce": 60,
            "broadcast": 0 if rank == 1 else 40,
            "reduce": 0 if rank == 2 else 40,
            "shift": 40,
        }
    assert Record("all_reduce", ("row", "col"), 4, 4000, 6000).axis == "row·col"


def received_by_kind():
    group, x = shared_mesh({"row": 4}).group(("row",)), torch.ones(4, 10, dtype=torch.int8)
    with Recorder() as recorder:
        all_gather(x, 0, group), reduce_scatter(x, 0, group), all_reduce(x.clone(), group)
        start_broadcast(x, 1, group).wait(), start_reduce_to(x.clone(), 1, group).wait()
        start_shift(x, 1, group).wait()
    return {record.kind: record.received for record in recorder.records}


def test_collectives_with_a_root_and_shifts():
    for right in pool(4, gloo=True).run(rooted_and_shifted):
        assert all(right.values()), right


def test_a_shift_by_a_whole_turn_is_none():
    for same, records in pool(4, gloo=True).run(whole_turn):
        assert same and records == 0


def whole_turn():
    group, x = shared_mesh({"row": 4}).group(("row",)), torch.ones(3)
    with Recorder() as recorder:
        return start_shift(x, 8, group).wait() is x, len(recorder.records)


def test_tables():
    recorder = Recorder()
    recorder.records += [
        Record("all_gather", ("col",), 2, 100, 50),
        Record("all_gather", ("col",), 2, 20, 10),
        Record("all_reduce", ("col",), 2, 8, 8),
        Record("all_gather", ("row",), 2, 7, 3),
    ]
    assert recorder.bytes_by_axis() == {"col": 128, "row": 7}
    assert recorder.table() == [
        {"axis": "col", "kind": "all_gather", "calls": 2, "bytes": 120},
        {"axis": "col", "kind": "all_reduce", "calls": 1, "bytes": 8},
        {"axis": "row", "kind": "all_gather", "calls": 1, "bytes": 7},
    ]


def test_recorders_nest():
    """The inner one ends by itself, though both have counted the same so far; outside, nothing is counted."""
    for outer, inner, after in pool(2, gloo=True).run(nested):
        assert (outer, inner, after) == (2, 1, 2)


def nested():
    group = shared_mesh({"col": 2}).group(("col",))
    with Recorder() as outer:
        with Recorder() as inner:
            all_gather(torch.ones(2), 0, group)
        all_gather(torch.ones(2), 0, group)
    counted = len(outer.records)
    all_gather(torch.ones(2), 0, group)
    return counted, len(inner.records), len(outer.records)
