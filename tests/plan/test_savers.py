"""What memory savers keep and move, in closed form, equals what is counted."""

from dataclasses import replace

import pytest

from distributed.model_cases import GPT2, LLAMA
from plan.context_cases import Case as Shared
from plan.context_cases import parallel_of, shape_of
from plan.count_cases import Case
from plan.test_memory import SHAPE, SMALL_CHANGE, STEADY, check
from tessera.core.mesh import Mesh
from tessera.layout.shape import Savers
from tessera.plan.count import counted_step
from tessera.plan.memory import kept_by_layers, saved_bytes
from tessera.plan.traffic import step_transfers, totals
from tessera.sizes.schedule import Schedule

SELECTIVE = replace(SHAPE, recompute=True, savers=Savers(attention_once=True))
TILES = replace(SHAPE, savers=Savers(mlp_tiles=3))
CHOSEN = replace(SHAPE, savers=Savers(mlp_tiles=None))
OFFLOADED = replace(SHAPE, savers=Savers(offload=True))
AGAIN, TWICE = replace(TILES, recompute=True), replace(TILES, micro_batches=2)
COL, SQUARE, CUBE = {"col": 2}, {"row": 2, "col": 2}, {"inner": 2, "row": 2, "col": 2}

KEPT = [(LLAMA, {}, SELECTIVE), (STEADY, CUBE, TILES), (LLAMA, COL, CHOSEN)]
ALL_KEPT = [
    (model, sizes, shape) for model in (LLAMA, STEADY) for sizes in ({}, COL, CUBE) for shape in (SELECTIVE, TILES)
]
MOVED = [
    (LLAMA, COL, Case(COL, shape=AGAIN)),
    (GPT2, CUBE, Case(CUBE, Schedule("summa"), shape=AGAIN)),
    (LLAMA, SQUARE, Case(SQUARE, Schedule(keep=True), shape=TILES)),
    (LLAMA, CUBE, Case(CUBE, sequence_parallel=False, shape=TWICE)),
    (LLAMA, SQUARE, Case(SQUARE, Schedule(slices=2), shape=TILES)),
]
ALL_MOVED = [
    (model, sizes, Case(sizes, schedule, shape=shape, sequence_parallel=schedule.name != "gather" or parallel))
    for model in (LLAMA, GPT2)
    for sizes in (COL, SQUARE, CUBE, {"inner": 2, "col": 4})
    for shape in (TILES, AGAIN, TWICE, SELECTIVE)
    for schedule in (Schedule(), Schedule(keep=True), Schedule(slices=2), Schedule("summa"))
    for parallel in (True, False)
    if schedule.name == "gather" or sizes.get("row") == sizes["col"]
]


@pytest.mark.parametrize(("model", "sizes", "shape"), KEPT)
def test_what_layers_keep(model, sizes, shape):
    check(model, Case(sizes, shape=shape))


@pytest.mark.parametrize("shape", [OFFLOADED, replace(OFFLOADED, recompute=True)], ids=["whole", "recompute"])
def test_of_offloaded_layers_two_are_on_the_device(shape):
    """Of four layers; what stays are small tensors, and what is no layer's."""
    model, parallel = replace(LLAMA, num_layers=4), Case({}, shape=shape).parallel(Mesh(rank=0))
    held = counted_step(model, shape, parallel).memory.activations
    assert saved_bytes(model, shape, parallel) == pytest.approx(held, rel=0.02)
    assert kept_by_layers(model, shape, parallel) == 2 * kept_by_layers(replace(model, num_layers=2), shape, parallel)


@pytest.mark.parametrize(
    "case",
    [
        Shared("llama", {"ulysses": 2}, chunks=2),
        Shared("llama", {"ulysses": 2}, recompute=True, savers=Savers(attention_once=True)),
        Shared("llama", {"ulysses": 2}, chunks=2, recompute=True, savers=Savers(attention_once=True)),
    ],
    ids=str,
)
def test_what_layers_keep_of_shared_rows(case):
    parallel = parallel_of(case, Mesh(case.sizes, rank=0))
    held = counted_step(LLAMA, shape_of(case), parallel).memory.activations
    assert 0 <= held - saved_bytes(LLAMA, shape_of(case), parallel) <= SMALL_CHANGE


@pytest.mark.slow
@pytest.mark.parametrize(("model", "sizes", "shape"), ALL_KEPT)
def test_what_layers_keep_everywhere(model, sizes, shape):
    check(model, Case(sizes, shape=shape))


def moved_as_counted(model, sizes, case):
    parallel = case.parallel(Mesh(sizes, rank=0))
    assert counted_step(model, case.shape, parallel).totals == totals(step_transfers(model, case.shape, parallel))


@pytest.mark.parametrize(("model", "sizes", "case"), MOVED)
def test_what_tiles_move(model, sizes, case):
    """Exactly, calls and bytes: activations once more in the backward, weights once in each pass for all tiles."""
    moved_as_counted(model, sizes, case)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "sizes", "case"), ALL_MOVED)
def test_what_tiles_move_everywhere(model, sizes, case):
    moved_as_counted(model, sizes, case)


def test_tiles_move_weights_as_before_and_activations_again():
    parallel = Case(SQUARE, shape=TILES).parallel(Mesh(SQUARE, rank=0))

    def moved(shape, axis):
        transfers = step_transfers(LLAMA, shape, parallel)
        return sum(t.times * t.received for t in transfers if t.axis == axis and t.site in ("gate·up", "down"))

    assert moved(TILES, "row") == moved(SHAPE, "row") > 0
    # each tile again in the backward: X in and Y out, beside the two of the forward and X, dX and dY of the backward
    assert moved(TILES, "col") * 5 == moved(SHAPE, "col") * 7 > 0
