"""Runs on every rank of a pool: groups, the collectives, and what the profiler saw of them."""

import gc
import json
import math
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from distributed.model_cases import MODELS, batches, build
from support.mesh import shared_mesh
from tessera.core.collectives import (
    Recorder,
    all_gather,
    all_reduce,
    largest,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_broadcast,
    start_reduce_scatter,
    start_reduce_to,
    start_shift,
)
from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.sizes.schedule import GATHER, Schedule


def members(sizes: dict[str, int], axes: tuple[str, ...]) -> dict[str, Any]:
    """The ranks of this rank's group along `axes`, in the order in which it gathers them."""
    mesh = shared_mesh(sizes)
    group = mesh.group(axes)
    assert group is mesh.group(tuple(reversed(axes))) is mesh.group(mesh.present(axes)), "made once"
    gathered = all_gather(torch.tensor([mesh.rank]), 0, group).tolist()
    backend_rank = dist.get_rank(group.process_group)
    return {"gathered": gathered, "axes": group.axes, "place": group.rank, "backend": backend_rank, "size": group.size}


def wrong_world() -> str:
    try:
        Mesh({"col": 4})
    except ValueError as error:
        return str(error)
    return "no error"


def each_collective() -> dict[str, bool]:
    """Every collective along every dim of a tensor against what it should give, computed by hand."""
    mesh = shared_mesh({"col": 2})
    group = mesh.group(("col",))
    everyone = [torch.arange(48.0).reshape(4, 6, 2) * (rank + 1) for rank in range(2)]
    mine, total = everyone[mesh.rank], everyone[0] + everyone[1]
    right = {}
    for dim in (0, 1, 2):
        right[f"all_gather {dim}"] = torch.equal(all_gather(mine, dim, group), torch.cat(everyone, dim))
        right[f"reduce_scatter {dim}"] = torch.equal(reduce_scatter(mine, dim, group), total.chunk(2, dim)[mesh.rank])
    transposed = mine.transpose(0, 1)  # not contiguous
    right["all_gather of a view"] = torch.equal(
        all_gather(transposed, 1, group), torch.cat(everyone, 0).transpose(0, 1)
    )
    right["all_reduce of a view"] = torch.equal(all_reduce(transposed, group), total.transpose(0, 1))
    right["the view's tensor is left"] = torch.equal(mine, everyone[mesh.rank])
    handed_over = mine.clone()
    right["all_reduce"] = torch.equal(all_reduce(handed_over, group), total)
    right["in place"] = torch.equal(handed_over, total)
    right["largest"] = torch.equal(largest(torch.tensor([mesh.rank, -mesh.rank]), group), torch.tensor([1, 0]))
    return right


def rooted_and_shifted() -> dict[str, bool]:
    """broadcast, reduce and shift along a ring of four, of views that are not contiguous."""
    mesh = shared_mesh({"row": 4})
    group, right = mesh.group(("row",)), {}
    everyone = [(torch.arange(12.0).reshape(3, 4) + 100 * rank).T for rank in range(4)]
    mine, total = everyone[mesh.rank], torch.stack(everyone).sum(0)
    for root in range(4):
        right[f"broadcast {root}"] = torch.equal(start_broadcast(mine, root, group).wait(), everyone[root])
        reduced = start_reduce_to(mine.clone(), root, group).wait()
        right[f"reduce {root}"] = mesh.rank != root or torch.equal(reduced, total)
    for by in (0, 1, 2, 3, -1):
        shifted = start_shift(mine, by, group).wait()
        right[f"shift {by}"] = torch.equal(shifted, everyone[(mesh.rank + by) % 4])
    both = [start_shift(mine, 1, group), start_shift(2 * mine, 1, group)]  # two under way keep their order
    right["two shifts"] = torch.equal(both[1].wait(), 2 * both[0].wait())
    return right


def pending() -> tuple[list[str], bool]:
    """Three collectives under way at once, awaited in another order and one of them twice."""
    mesh = shared_mesh({"col": 2})
    group, ones = mesh.group(("col",)), torch.ones(4, 2)
    with Recorder() as recorder:
        gathering = start_all_gather(ones, 0, group)
        scattering = start_reduce_scatter(ones, 0, group)
        reducing = start_all_reduce(ones.clone(), group)
        reduced, gathered, scattered = reducing.wait(), gathering.wait(), scattering.wait()
        again = gathering.wait()
    order = [f"{what} {record.kind}" for what, record in recorder.events]
    values = gathered is again and torch.equal(gathered, torch.ones(8, 2))
    return order, values and torch.equal(scattered, torch.full((2, 2), 2.0)) and torch.equal(reduced, 2 * ones)


def indivisible() -> tuple[str, int]:
    group = shared_mesh({"col": 2}).group(("col",))
    with Recorder() as recorder:
        try:
            reduce_scatter(torch.ones(3, 5), 1, group)
        except ValueError as error:
            return str(error), len(recorder.records)
    return "no error", len(recorder.records)


# ------------------------------------------------------------------------------------------- a whole step

KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "shift",
}
SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "long int": 8}


def step_of(name: str, sizes: dict[str, int], sequence_parallel: bool = True, schedule: Schedule = GATHER) -> Any:
    """A training step of float32, whose norm and loss are float64."""
    mesh = shared_mesh(sizes) if sizes else Mesh(rank=0)
    model = build(MODELS[name], mesh, sequence_parallel, dtype=torch.float32, schedule=schedule)
    step = Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0), max_grad_norm=1.0)
    return lambda index: step(batches(model.config, 1), index, 1e-3)


def recorded_and_profiled(
    name: str, sequence_parallel: bool, sizes: dict[str, int] | None = None, schedule: Schedule = GATHER
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Kind and bytes of every collective of one step: as the recorder counted, and as c10d was called."""
    step = step_of(name, sizes or {"col": 2}, sequence_parallel, schedule)
    step(0)  # groups and optimizer state are made
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled, Recorder() as recorder:
        step(1)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [(r.kind, r.bytes) for r in recorder.records], c10d_calls(events)


def c10d_calls(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """The collectives among profiler events, in order, with the bytes of their whole tensor."""
    # an all-reduce takes a list of tensors, whose dtype only the backend's own event tells
    backend = {str(e["args"]["Input Dims"][0]): e["args"]["Input type"][0] for e in events if "gloo:" in e["name"]}
    calls = []
    for event in sorted((e for e in events if e["name"].startswith("c10d::")), key=lambda e: e["ts"]):
        name, dims, types = (
            event["name"].removeprefix("c10d::"),
            event["args"]["Input Dims"],
            event["args"]["Input type"],
        )
        kind = KINDS.get(name, name)
        if kind == "recv_":  # the other half of a shift
            continue
        if kind in ("all_reduce", "broadcast", "reduce", "shift"):
            (whole,) = dims[0]
            element = backend[str(whole)]
        else:
            whole = dims[0] if kind == "all_gather" else dims[1]
            element = types[0]
        calls.append((kind, math.prod(whole) * SIZES[element]))
    return calls


def step_peak(sizes: dict[str, int]) -> tuple[int, int]:
    """Peak bytes of building a model and training it for two steps; bytes left when all of it is gone."""
    if sizes:
        assert shared_mesh(sizes).device_mesh  # made before, and kept: it is not the step's
    with PeakMemory() as memory:
        step = step_of("gpt2", sizes)
        step(0)
        step(1)
        del step
        gc.collect()  # where a collection that is under way has not come to it
    return memory.peak, memory.current


def hang_in_a_group(seconds: float) -> tuple[list[float], str, float]:
    """Rank 0 does not come to a collective along col: the groups' timeouts, what the others are told, and when."""
    everyone = dist.distributed_c10d._get_default_group()
    before = everyone._get_backend(torch.device("cpu")).options._timeout
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), everyone)
    try:
        mesh = Mesh({"row": 2, "col": 2})  # not the shared one: its groups are not used again
        groups = [mesh.group(axes) for axes in (("col",), ("row",), ("row", "col"))]
    finally:
        dist.distributed_c10d._set_pg_timeout(before, everyone)
    cpu = torch.device("cpu")
    timeouts = [group.process_group._get_backend(cpu).options._timeout.total_seconds() for group in groups]
    began, told = time.monotonic(), ""
    if mesh.rank == 0:
        time.sleep(2 * seconds)
    else:
        try:
            all_reduce(torch.ones(4), groups[0])
        except RuntimeError as error:
            told = str(error)
    return timeouts, told, time.monotonic() - began
