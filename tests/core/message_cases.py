"""Runs on every rank of a pool: all-to-alls of uneven sizes, and batches of messages between single ranks."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from support.mesh import shared_mesh
from tessera.core.collectives import (
    Recorder,
    all_reduce,
    all_to_all,
    start_all_reduce,
    start_all_to_all,
    start_exchange,
)

DTYPES = [torch.float64, torch.bfloat16, torch.int64]


def rows_of(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What `rank` holds: [count, 3], whole numbers that bf16 has, other ones on each rank."""
    return (torch.arange(3 * count).reshape(count, 3) % 32 + 32 * rank).to(dtype)


def sent_to(sizes: list[list[int]], rank: int) -> list[int]:
    """What each rank sends `rank`, of a table of what each sends each."""
    return [row[rank] for row in sizes]


def every_all_to_all(sizes: list[list[int]], axes: dict[str, int]) -> dict[str, Any]:
    """Whether rank by rank arrives what `sizes` says, for each dtype; records of it; and the way back."""
    mesh = shared_mesh(axes)
    group = mesh.group(axes)
    mine, theirs = sizes[mesh.rank], sent_to(sizes, mesh.rank)
    right, moved = {}, []
    for dtype in DTYPES:
        everyone = [rows_of(rank, sum(row), dtype) for rank, row in enumerate(sizes)]
        parts = [x.split(row)[mesh.rank] for x, row in zip(everyone, sizes, strict=True)]
        x = everyone[mesh.rank].requires_grad_(dtype.is_floating_point)
        with Recorder() as recorder:
            found = all_to_all(x, mine, theirs, group)
            back = all_to_all(found, theirs, mine, group)
        right[f"{dtype}"] = torch.equal(found, torch.cat(parts)) and found.dtype == dtype
        right[f"{dtype} and back"] = torch.equal(back, x)
        right[f"{dtype} without gradient"] = not found.requires_grad
        moved.append([(r.kind, r.axis, r.ranks, r.bytes, r.received) for r in recorder.records])
    wide = torch.arange(2.0 * 3 * sum(mine)).reshape(2, 3, sum(mine)).movedim(2, 0)  # not contiguous, three dims
    right["a view"] = all_to_all(wide, mine, theirs, group).shape == (sum(theirs), 2, 3)
    return {"right": right, "moved": moved}


def refused(sent: list[int], received: list[int]) -> tuple[str, int]:
    group = shared_mesh({"col": 2}).group(("col",))
    with Recorder() as recorder:
        try:
            all_to_all(torch.ones(4, 2), sent, received, group)
        except ValueError as error:
            return str(error), len(recorder.records)
    return "no error", len(recorder.records)


def all_to_all_left_out(sizes: list[list[int]]) -> list[torch.Tensor]:
    """What arrives when the second of two is left out; twice."""
    mesh = shared_mesh({"row": len(sizes)})
    group, mine, theirs = mesh.group(("row",)), sizes[mesh.rank], sent_to(sizes, mesh.rank)
    x, found = rows_of(mesh.rank, sum(mine), torch.float64), []
    for _ in range(2):
        with Recorder(leave_out=1):
            assert torch.equal(all_to_all(x, mine, theirs, group), all_to_all_whole(sizes, mesh.rank))
            found.append(all_to_all(x, mine, theirs, group))
    return found


def all_to_all_whole(sizes: list[list[int]], rank: int) -> torch.Tensor:
    everyone = [rows_of(r, sum(row), torch.float64).split(row)[rank] for r, row in enumerate(sizes)]
    return torch.cat(everyone)


# ------------------------------------------------------------------------------------------- messages

Message = tuple[int, int, int]  # from, to, rows


def exchanged(messages: list[Message], dtype: torch.dtype, leave_out: int | None = None) -> dict[str, Any]:
    """All `messages` of a world of 4 as one batch: what arrived and should have, and what was recorded."""
    mesh = shared_mesh({"pp": 4})
    group, me = mesh.group(("pp",)), mesh.rank
    all_reduce(torch.zeros(1), group)
    tensors = [rows_of(source, rows, dtype) + number for number, (source, _, rows) in enumerate(messages)]
    sends = [(x.T, to) for x, (source, to, _) in zip(tensors, messages, strict=True) if source == me]
    wanted = [x.T for x, (_, to, _) in zip(tensors, messages, strict=True) if to == me]
    sources = [source for source, to, _ in messages if to == me]
    with Recorder(leave_out=leave_out) as recorder:
        memory = [(torch.empty(x.shape, dtype=dtype), source) for x, source in zip(wanted, sources, strict=True)]
        leaving, arriving = start_exchange(sends, memory, group)
        found = [pending.wait() for pending in reversed(arriving)][::-1]
        for pending in leaving:
            pending.wait()
    return {
        "same": [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)],
        "zero": [not a.any().item() for a in found],
        "ours": all(a is m for a, (m, _) in zip(found, memory, strict=True)),
        "moved": [(r.kind, r.axis, r.ranks, r.bytes, r.received) for r in recorder.records],
        "events": [f"{what} {record.kind}" for what, record in recorder.events],
    }


def along_one_axis_of_two() -> list[bool]:
    """Neighbours along pp of a 2 × 2 mesh pass x on, and what they get back; two batches are under way at once."""
    mesh = shared_mesh({"pp": 2, "col": 2})
    group, stage = mesh.group(("pp",)), mesh.coordinates["pp"]
    x = torch.full((3,), float(mesh.rank))
    memory = [torch.empty(3), torch.empty(3)]
    started = [start_exchange([(x + 10 * turn, 1 - stage)], [(memory[turn], 1 - stage)], group) for turn in range(2)]
    other = mesh.rank + (2 if stage == 0 else -2)
    right = [torch.equal(started[turn][1][0].wait(), torch.full((3,), other + 10.0 * turn)) for turn in (1, 0)]
    for leaving, _ in started:
        leaving[0].wait()
    return right


def slowed() -> tuple[list[str], bool]:
    """The kinds by which a recorder's delay is asked; the numbers stay."""
    mesh = shared_mesh({"col": 2})
    group, asked = mesh.group(("col",)), []
    with Recorder(delay=lambda record: asked.append(record.kind) or 0.0):
        x = torch.full((2, 1), float(mesh.rank))
        found = all_to_all(x, [1, 1], [1, 1], group)
        (leaving,), (arriving,) = start_exchange([(x, 1 - mesh.rank)], [(torch.empty(2, 1), 1 - mesh.rank)], group)
        other = arriving.wait()
        leaving.wait()
    return asked, torch.equal(found, torch.tensor([[0.0], [1.0]])) and torch.equal(other, 1 - x)


def profiled() -> tuple[list[tuple[str, int]], list[str]]:
    """Kind and bytes as recorded; the names of the operators that c10d was called with."""
    group = shared_mesh({"col": 2}).group(("col",))
    other = 1 - group.rank
    with profile(activities=[ProfilerActivity.CPU]) as seen, Recorder() as recorder:
        going = start_all_to_all(torch.ones(3, 2), [2 - other, 1 + other], [1 + group.rank, 2 - group.rank], group)
        start_all_reduce(torch.ones(1), group).wait()
        going.wait()
        leaving, arriving = start_exchange([(torch.ones(5), other)], [(torch.empty(5), other)], group)
        [pending.wait() for pending in (*arriving, *leaving)]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    calls = sorted((e for e in events if e["name"].startswith("c10d::")), key=lambda e: e["ts"])
    return [(r.kind, r.bytes) for r in recorder.records], [e["name"].removeprefix("c10d::") for e in calls]
