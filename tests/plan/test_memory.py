"""Memory of one rank: matrices are divided exactly, saved activations as the table of plan/memory.py says."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from distributed.model_cases import GPT2, LLAMA
from plan import context_cases
from plan.count_cases import Case, held_elements, memory_on_ranks
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.shape import StepShape
from tessera.layout.streams import HIDDEN_BY_HEADS
from tessera.models.config import LayerKind
from tessera.plan.count import counted_step
from tessera.plan.memory import saved_bytes, state_bytes
from tessera.plan.peak import peak_bytes
from tessera.sizes.schedule import Schedule

STEADY = replace(GPT2, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
SHAPE = StepShape(batch=8, sequence=32)
SMALL_CHANGE = 64  # bytes: the loss, and which heads a rank takes

MESHES = [
    {},
    {"col": 4},
    {"row": 4},
    {"inner": 2, "col": 2},
    {"row": 2, "col": 4},
    {"inner": 2, "row": 2, "col": 2},
    {"depth": 2, "row": 2, "col": 2},
]


def counted(model, case, rank=0):
    return counted_step(model, case.shape, case.parallel(Mesh(case.sizes, rank=rank))).memory


def closed_form(model, case, rank=0):
    parallel = case.parallel(Mesh(case.sizes, rank=rank))
    return state_bytes(model, parallel), saved_bytes(model, case.shape, parallel)


def cases(sizes):
    yield Case(sizes, shape=SHAPE)
    yield Case(sizes, shape=SHAPE, sequence_parallel=False)
    yield Case(sizes, Schedule(keep=True), shape=SHAPE)
    yield Case(sizes, shape=replace(SHAPE, recompute=True))
    yield Case(sizes, shape=SHAPE, compute=torch.bfloat16)


def check(model, case):
    memory = counted(model, case)
    states, saved = closed_form(model, case)
    assert 0 <= memory.activations - saved <= SMALL_CHANGE, str(case)
    steps = memory.optimizer - 2 * memory.parameters  # one count of steps for each parameter
    assert memory.states - steps == states and steps <= 4 * 40, str(case)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_saved_activations_and_states_equal_the_closed_form(sizes):
    for case in cases(sizes):
        check(LLAMA, case)
    check(STEADY, Case(sizes, shape=SHAPE))


def test_saved_activations_do_not_grow_with_windows():
    check(replace(LLAMA, layer_kinds=(LayerKind(8), LayerKind())), Case({}, shape=SHAPE))


def test_saved_activations_of_every_schedule_and_of_heads_over_inner():
    sizes = {"inner": 2, "row": 2, "col": 2}
    for schedule in (Schedule(slices=2), Schedule("summa"), Schedule("cannon")):
        check(LLAMA, Case(sizes, schedule, shape=SHAPE))
        check(STEADY, Case(sizes, schedule, shape=SHAPE))
    check(replace(LLAMA, num_kv_heads=8), Case(sizes, attention=HIDDEN_BY_HEADS, shape=SHAPE))


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_matrices_are_one_part_in_inner_row_col(sizes):
    """Parameters, gradients and moments; with a vocabulary that divides, every rank holds the same."""
    model = replace(LLAMA, vocab_size=512)
    whole = held_elements(model, Case({}).parallel(Mesh(rank=0)))["matrices"]
    parts = math.prod(sizes.get(axis, 1) for axis in ("inner", "row", "col"))
    for rank in range(math.prod(sizes.values())):
        held = held_elements(model, Case(sizes).parallel(Mesh(sizes, rank=rank)))
        assert held["matrices"] * parts == whole
    memory = counted(model, Case(sizes, shape=SHAPE))
    assert memory.gradients == memory.parameters
    assert memory.parameters == 4 * sum(held.values())


def test_weights_cut_over_depth_are_divided_by_depth_too():
    model, sizes = replace(LLAMA, vocab_size=512), {"depth": 2, "row": 2, "col": 2}
    replicated = counted(model, Case(sizes, shape=SHAPE))
    cut = counted(model, Case(sizes, weights_over=("depth", "row"), shape=SHAPE))
    vectors = 4 * held_elements(model, Case(sizes).parallel(Mesh(sizes, rank=0)))["residual"]
    assert (replicated.parameters - vectors) == 2 * (cut.parameters - vectors)


# activations dominate: many layers, more tokens than features, few words
DEEP = replace(LLAMA, num_layers=32, vocab_size=64, num_kv_heads=8)
LONG = StepShape(batch=8, sequence=64)


@cache
def alone():
    return counted(DEEP, Case({}, shape=LONG))


@pytest.mark.parametrize(
    "sizes", [{"col": 8}, {"row": 8}, {"row": 2, "col": 2}, {"depth": 2, "row": 2, "col": 2}], ids=str
)
def test_activations_are_divided_by_all_ranks(sizes):
    """Residual stream, hidden stream and what else is saved: 1/P of one process's, whatever the geometry."""
    ranks = math.prod(sizes.values())
    saved = closed_form(DEEP, Case(sizes, shape=LONG))[1]
    assert saved == pytest.approx(alone().activations / ranks, rel=0.05)
    whole = closed_form(DEEP, Case(sizes, shape=LONG, sequence_parallel=False))[1]
    if "col" in sizes:  # a whole residual stream on every rank of col is far outside
        assert whole > 1.2 * saved


PEAKS = [
    {"col": 4},
    {"col": 8},
    {"row": 2, "col": 2},
    {"row": 2, "col": 4},
    {"depth": 2, "row": 2, "col": 2},
    {"inner": 2, "row": 2, "col": 2},
]


def peaks(*by_default):
    """All of them, which take ten seconds each and more; but for a few, `make test-all` has them."""
    return [pytest.param(sizes, marks=[] if sizes in by_default else pytest.mark.slow) for sizes in PEAKS]


def peak_by_table(states, ranks):
    """One part of one process's activations, with three of the four copies of the parameters."""
    return alone().activations / ranks + 0.75 * states


@pytest.mark.parametrize("sizes", peaks({"col": 8}, {"row": 2, "col": 4}, {"depth": 2, "row": 2, "col": 2}), ids=str)
def test_the_counted_peak_is_one_part(sizes):
    """The peak is in the head, where gradients of layers are still to come. What it has beside the table does not grow
    with the layers: the head's input gathered along col, that input's gradient before it is summed, a chunk of logits
    with its gradient, W and dW. Along 8 ranks of col it is 6% of the peak of 20 layers, of these 32 less than 4%.
    """
    memory = counted(DEEP, Case(sizes, shape=LONG))
    table = peak_by_table(memory.states, math.prod(sizes.values()))
    assert table < memory.peak < 1.05 * table
    assert memory.peak > 1.05 * (table - 0.25 * memory.states)  # two copies of the parameters are not enough


@pytest.mark.parametrize("sizes", peaks({"row": 2, "col": 2}), ids=str)
def test_the_tracked_peak_of_real_ranks_is_the_counted_one(sizes):
    case, ranks = Case(sizes, shape=LONG), math.prod(sizes.values())
    fake = counted(DEEP, case)
    for saved, peak in pool(ranks, gloo=True).run(memory_on_ranks, DEEP, case):
        # not equal: what a collective has sent is freed when gloo's thread gets to it
        assert saved == pytest.approx(fake.activations, rel=0.01)
        assert peak == pytest.approx(fake.peak, rel=0.01)
        assert saved == pytest.approx(alone().activations / ranks, rel=0.05)
        assert peak == pytest.approx(peak_by_table(fake.states, ranks), rel=0.05)


# ---- The estimate for people


@pytest.mark.slow  # test_peak.py draws layouts at random
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_estimated_peak_is_near_the_counted_one(sizes):
    model, long = replace(LLAMA, num_layers=6), StepShape(batch=8, sequence=256, micro_batches=2)
    for shape, compute in ((long, torch.bfloat16), (replace(long, recompute=True), torch.float32)):
        case = Case(sizes, shape=shape, compute=compute)
        peak = peak_bytes(model, shape, case.parallel(Mesh(sizes, rank=0)))
        assert peak.total == pytest.approx(counted(model, case).peak, rel=0.03), str(case)


@pytest.mark.slow
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("sizes", [{"shard": 4}, {"shard": 2, "col": 2}, {"ring": 2, "ulysses": 2}], ids=str)
def test_the_estimated_peak_counts_what_fsdp_gathers_once(sizes, reshard):
    """Also of ranks that share sequences, which FSDP2 serves as it does data ranks."""
    model = replace(LLAMA, num_layers=6)
    long = StepShape(batch=8, sequence=256, micro_batches=2, reshard=reshard)
    for shape, compute in ((long, torch.bfloat16), (replace(long, recompute=True), torch.float32)):
        parallel = context_cases.parallel_of(context_cases.Case("llama", sizes, compute=compute), Mesh(sizes, rank=0))
        peak = peak_bytes(model, shape, parallel)
        traced = counted_step(model, shape, parallel).memory.peak
        assert peak.total == pytest.approx(traced, rel=0.03), str(shape)
