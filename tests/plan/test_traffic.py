"""Counted traffic equals the closed form exactly: every geometry, schedule and policy, real ranks and fake worlds."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from distributed.model_cases import LLAMA
from plan.count_cases import (
    BULKY,
    EVERYTHING,
    MODELS,
    SHAPE,
    Case,
    counted_in_fake_world,
    counted_on_ranks,
    held_elements,
)
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.streams import HIDDEN_BY_HEADS, residual_layout
from tessera.plan.count import counted_step
from tessera.plan.traffic import received_bytes, step_transfers, totals
from tessera.sizes.schedule import Schedule

EARLY = Schedule(prefetch=True, defer=True)
LOOPS = (Schedule("summa"), Schedule("cannon"))
POLICIES = (Schedule(keep=True), Schedule(slices=2), EARLY)
OVER_DEPTH = ("depth", "row")


def formula(model, case, rank):
    return totals(step_transfers(model, case.shape, case.parallel(Mesh(case.sizes, rank=rank))))


def policies(sizes, schedules=POLICIES):
    """A mesh with every policy of the gathered product, and everything at once that repeats or adds collectives."""
    yield Case(sizes)
    yield Case(sizes, sequence_parallel=False, shape=EVERYTHING)
    for schedule in schedules:
        yield Case(sizes, schedule, shape=replace(EVERYTHING, recompute=schedule.prefetch))


REAL = {
    4: [
        *policies({"col": 4}, POLICIES[:1]),
        *policies({"row": 2, "col": 2}),
        *(Case({"row": 2, "col": 2}, loop, shape=EVERYTHING) for loop in LOOPS),
        Case({"row": 4}, EARLY),
        Case({"inner": 2, "col": 2}, attention=HIDDEN_BY_HEADS, shape=EVERYTHING),
    ],
    8: [
        Case({"inner": 2, "row": 2, "col": 2}, sequence_parallel=False, shape=EVERYTHING),
        Case({"inner": 2, "row": 2, "col": 2}, Schedule(keep=True)),
        *(Case({"inner": 2, "row": 2, "col": 2}, loop) for loop in LOOPS),
        *(Case({"depth": 2, "row": 2, "col": 2}, loop) for loop in (Schedule(), *LOOPS)),
        Case({"depth": 2, "row": 2, "col": 2}, EARLY, weights_over=OVER_DEPTH),
        Case({"row": 2, "col": 4}, Schedule(slices=4, keep=True)),
        Case({"inner": 2, "row": 1, "col": 4}, attention=HIDDEN_BY_HEADS),
    ],
}


@pytest.mark.parametrize(("world", "model"), [(4, "llama"), (8, "gpt2")])
def test_counts_of_real_ranks_equal_the_formula(world, model):
    for rank, counted in enumerate(pool(world).run(counted_on_ranks, MODELS[model], REAL[world])):
        for case, got in zip(REAL[world], counted, strict=True):
            assert got == formula(MODELS[model], case, rank), f"{case}, rank {rank}"


MESHES = [
    {"col": 8},
    {"row": 8},
    {"inner": 4, "col": 2},
    {"row": 4, "col": 2},
    {"inner": 2, "row": 2, "col": 2},
    {"depth": 2, "row": 2, "col": 2},
    {"depth": 4, "col": 2},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_counts_of_every_mesh_and_policy(model, sizes):
    """In a fake world, whose counts the test above holds against real ranks; rank 5 is nowhere the first."""
    cases = [Case(sizes), Case(sizes, compute=torch.bfloat16, shape=EVERYTHING), *policies(sizes)]
    if sizes.get("row") == sizes.get("col"):
        cases += [Case(sizes, loop, shape=EVERYTHING) for loop in LOOPS]
    if "inner" in sizes:
        cases += [
            Case(sizes, schedule, attention=HIDDEN_BY_HEADS)
            for schedule in (Schedule(), Schedule(keep=True), Schedule(slices=2))
            if LLAMA.num_heads % math.prod(sizes.get(axis, 1) for axis in ("inner", "col")) == 0
        ]
    if "depth" in sizes:
        cases += [Case(sizes, weights_over=OVER_DEPTH, shape=EVERYTHING)]
    for case in cases:
        assert counted_in_fake_world(MODELS[model], case, 5) == formula(MODELS[model], case, 5), str(case)


@pytest.mark.parametrize(
    ("sizes", "kinds"), [({"row": 4, "col": 4}, 9), ({"inner": 2, "row": 2, "col": 2}, 4)], ids=str
)
def test_cannon_counts_differ_by_coordinate(sizes, kinds):
    """The skew moves what does not lie on the first row or column, the way home what does not lie on the second."""
    case, seen = Case(sizes, Schedule("cannon")), set()
    for rank in range(math.prod(sizes.values())):
        counted = counted_in_fake_world(MODELS["llama"], case, rank)
        assert counted == formula(MODELS["llama"], case, rank), rank
        seen.add(tuple(counted[axis, "shift"] for axis in ("row", "col")))
    assert len(seen) == kinds


def test_counts_of_an_uneven_vocabulary_differ_by_rank():
    case = Case({"row": 2, "col": 4})
    of_ranks = [counted_in_fake_world(LLAMA, case, rank) for rank in range(4)]
    assert of_ranks == [formula(LLAMA, case, rank) for rank in range(4)]
    assert of_ranks[0]["row", "all_gather"] == of_ranks[2]["row", "all_gather"] != of_ranks[3]["row", "all_gather"]


def test_large_gradients_are_counted_one_by_one():
    """Along depth up, down and, on the first rank of col, both tables of words go alone; positions along depth·col."""
    case = Case({"depth": 2, "col": 2})
    of_ranks = pool(4).run(counted_on_ranks, BULKY, [case])
    for rank, (counted,) in enumerate(of_ranks):
        assert counted == formula(BULKY, case, rank), rank
        assert counted["depth", "all_reduce"][0] == (5, 3)[rank % 2]
        transfers = step_transfers(BULKY, SHAPE, case.parallel(Mesh(case.sizes, rank=rank)))
        replicas = [transfer for transfer in transfers if transfer.what == "replicas"]
        assert [transfer.calls for transfer in replicas] == [(5, 3)[rank % 2], 2]


@pytest.mark.parametrize(
    "sizes", [{"depth": 2, "row": 2, "col": 2}, {"depth": 4, "col": 2}, {"depth": 2, "inner": 2}, {"col": 8}], ids=str
)
def test_large_gradients_of_every_mesh(sizes):
    model, last = replace(BULKY, num_layers=2, ffn_size=6144), math.prod(sizes.values()) - 1
    cases = [Case(sizes), Case(sizes, compute=torch.bfloat16, sequence_parallel=False)]
    cases += [Case(sizes, weights_over=OVER_DEPTH)] if "depth" in sizes else []
    for case, rank in product(cases, (0, last)):
        counted = counted_step(model, case.shape, case.parallel(Mesh(sizes, rank=rank)))
        assert counted.totals == formula(model, case, rank), f"{case}, rank {rank}"


def test_several_chunks_of_the_loss_exchange_once_each():
    shape = StepShape(batch=48, sequence=48)  # 2304 tokens: three chunks of 1024, two where inner holds half of each
    for sizes, chunks in (({"col": 2}, 3), ({"inner": 2, "col": 2}, 2)):
        case = Case(sizes, shape=shape)
        transfers = step_transfers(LLAMA, shape, case.parallel(Mesh(sizes, rank=0)))
        assert sum(transfer.times for transfer in transfers if transfer.site == "loss") == chunks
        assert counted_in_fake_world(LLAMA, case, 0) == formula(LLAMA, case, 0)


BIG = {
    16: [{"col": 16}, {"row": 16}, {"row": 4, "col": 4}, {"depth": 4, "row": 2, "col": 2}, {"inner": 2, "row": 8}],
    64: [
        {"col": 64},
        {"row": 64},
        {"row": 8, "col": 8},
        {"depth": 4, "row": 4, "col": 4},
        {"inner": 4, "row": 4, "col": 4},
    ],
    512: [{"row": 16, "col": 32}, {"depth": 2, "row": 16, "col": 16}, {"inner": 8, "row": 8, "col": 8}, {"row": 512}],
}


# layers of the sizes of Llama 3 70B
LARGE = replace(
    LLAMA,
    vocab_size=128256,
    hidden_size=8192,
    num_layers=1,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=28672,
)
LARGE_BATCH = StepShape(batch=512, sequence=64)


@pytest.mark.parametrize(("world", "sizes"), [(w, s) for w, meshes in BIG.items() for s in meshes], ids=str)
def test_counts_at_scale(world, sizes):
    """Tensors without data; every schedule that the mesh allows."""
    square = sizes.get("row") == sizes.get("col", 1)
    schedules = [Schedule(), Schedule(keep=True), Schedule(slices=2), *(LOOPS if square else ())]
    cases = [Case(sizes, schedule, shape=LARGE_BATCH) for schedule in schedules]
    if "depth" in sizes:
        cases.append(Case(sizes, shape=LARGE_BATCH, weights_over=OVER_DEPTH))
    if set(sizes) == {"col"}:
        cases.append(Case(sizes, shape=LARGE_BATCH, sequence_parallel=False))
    for case in cases:
        check_at_scale(case, world // 2 + 1)


def check_at_scale(case, rank):
    """What the rank counts, which is the formula's."""
    counted = counted_step(LARGE, case.shape, case.parallel(Mesh(case.sizes, rank=rank))).totals
    assert counted == formula(LARGE, case, rank), f"{case}, rank {rank}"
    return counted


@pytest.mark.parametrize("sizes", [sizes for sizes in BIG[64] if sizes.get("row") == sizes.get("col")], ids=str)
def test_cannon_at_64_ranks_counts_by_coordinate(sizes):
    """On the last grid of the mesh, at places that differ in both: all others move as the third along an axis."""
    case, seen = Case(sizes, Schedule("cannon"), shape=LARGE_BATCH), {"row": set(), "col": set()}
    last = 64 - sizes["row"] * sizes["col"]
    for row, col in ((0, 1), (1, 2), (2, 0)):
        rank = last + row * sizes["col"] + col
        assert [Mesh(sizes, rank=rank).coordinates[axis] for axis in seen] == [row, col]
        counted = check_at_scale(case, rank)
        for axis, counts in seen.items():
            counts.add(counted[axis, "shift"])
    assert [len(counts) for counts in seen.values()] == [3, 3]


def test_prefetch_and_defer_change_no_count():
    for sizes, recompute in product(({"row": 4}, {"row": 2, "col": 2}), (False, True)):
        shape = replace(SHAPE, recompute=recompute, micro_batches=2)
        late, early = (
            step_transfers(LLAMA, shape, Case(sizes, schedule).parallel(Mesh(sizes, rank=1)))
            for schedule in (Schedule(), EARLY)
        )
        assert late == early


def test_the_benchmark_shape_needs_at_most_twenty_collectives_without_sequence_parallelism():
    benchmark = replace(
        LLAMA, vocab_size=8192, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1408
    )
    for sequence_parallel, calls in ((True, 47), (False, 20)):
        case = Case({"col": 2}, sequence_parallel=sequence_parallel, shape=StepShape(4, 256))
        counted = counted_in_fake_world(benchmark, case, 0)
        assert counted == formula(benchmark, case, 0)
        assert sum(n for n, _ in counted.values()) == calls


def test_one_process_hands_over_nothing():
    assert step_transfers(LLAMA, SHAPE, Case({}).parallel(Mesh(rank=0))) == []


def test_a_formula_without_the_gathers_of_the_backward_would_be_far_off():
    case = Case({"row": 2, "col": 2})
    transfers = step_transfers(LLAMA, SHAPE, case.parallel(Mesh(case.sizes, rank=0)))
    without = [each for each in transfers if (each.phase, each.kind) != ("backward", "all_gather")]
    assert received_bytes(without) < 0.8 * received_bytes(transfers)


def test_held_elements_are_those_of_the_memory_experiment():
    from tessera.demos.memory import experiment_model

    model = experiment_model(False)
    alone = held_elements(model, Parallel(Mesh(rank=0), residual_layout(True)))
    assert sum(alone.values()) == 18_397_184
    assert alone["residual"] == 549_888
    half = held_elements(model, Parallel(Mesh({"col": 2}, rank=0), residual_layout(True)))
    assert half == {name: n if name == "residual" else n // 2 for name, n in alone.items()}
    assert all(n % 2 == 0 for n in alone.values())
