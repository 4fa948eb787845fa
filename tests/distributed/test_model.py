"""Whole models in every geometry and schedule against one process in float64."""

import itertools
import math
from dataclasses import replace

import pytest

from distributed.model_cases import GPT2, LLAMA, MODELS, model_errors
from support.pool import Pool, pool
from tessera.layout.streams import HIDDEN_BY_HEADS
from tessera.sizes.schedule import Schedule

TOLERANCE = 1e-12
AXES = ("inner", "depth", "row", "col")
# heads, features and a batch that divide by 2 × 3
LLAMA6 = replace(LLAMA, hidden_size=96, num_heads=6, num_kv_heads=3, head_dim=16, ffn_size=192)
GPT6 = replace(GPT2, hidden_size=96, num_heads=6, num_kv_heads=6, head_dim=16, ffn_size=192)

GRID = {"row": 2, "col": 2}
TESSERACT = {"depth": 2, "row": 2, "col": 2}
CUBE = {"inner": 2, "row": 2, "col": 2}
SLICES2, SLICES4 = Schedule(slices=2), Schedule(slices=4)
SUMMA, CANNON = Schedule("summa"), Schedule("cannon")
EARLY_AND_LATE = Schedule(prefetch=True, defer=True)
# of the twenty: every triple of axes, and each axis at 4; more groups of several axes would leave their threads to the
# session, so the others have ranks of their own
MESHES_OF_8 = [
    {"row": 8},
    {"col": 8},
    TESSERACT,
    CUBE,
    {"inner": 2, "depth": 2, "col": 2},
    {"inner": 2, "depth": 2, "row": 2},
    {"inner": 4, "col": 2},
    {"depth": 4, "row": 2},
    {"inner": 2, "row": 4},
    {"row": 2, "col": 4},
]


def meshes(world):
    """Every way to lay `world` ranks along the four axes, those of size 1 left out."""
    for sizes in itertools.product(range(1, world + 1), repeat=len(AXES)):
        if math.prod(sizes) == world:
            yield {axis: n for axis, n in zip(AXES, sizes, strict=True) if n > 1}


def name(value):
    if isinstance(value, dict):
        return "×".join(f"{axis}{n}" for axis, n in value.items())
    return str(value)


def check(sizes, model, sequence_parallel=True, steps=1, smoothing=0.1, size=8, length=4, ranks=None, **options):
    """`model` on a mesh of `sizes`, `size` sequences of `length` tokens in a micro-batch, against one process."""
    ranks = ranks or pool(math.prod(sizes.values()))
    arguments = (model, sizes, sequence_parallel, steps, smoothing, None, options, size, length)
    for relative, parameter, _ in ranks.run(model_errors, *arguments):
        assert relative["loss"] <= TOLERANCE and relative["norm"] <= TOLERANCE
        assert relative["gradients"] <= TOLERANCE, parameter
        assert relative["weights"] <= TOLERANCE


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_1d_equals_one_process(model, size, sequence_parallel):
    check({"col": size}, model, sequence_parallel, steps=2, size=4, length=12)


@pytest.mark.parametrize(
    "sizes", [mesh for world in (2, 4) for mesh in meshes(world) if mesh.keys() != {"col"}], ids=name
)
@pytest.mark.parametrize("model", ["llama tied", "gpt2"])
def test_every_mesh_equals_one_process(model, sizes):
    check(sizes, model)


@pytest.mark.parametrize("sizes", MESHES_OF_8, ids=name)
def test_meshes_of_8_equal_one_process(sizes):
    check(sizes, "llama kv4" if "row" in sizes else "gpt2", schedule=EARLY_AND_LATE)


@pytest.fixture(scope="module")
def eight():
    """Ranks that no other module needs."""
    ranks = Pool(8)
    yield ranks
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [mesh for mesh in meshes(8) if mesh not in MESHES_OF_8], ids=name)
def test_the_other_meshes_of_8_equal_one_process(eight, sizes):
    check(sizes, "llama kv4" if "row" in sizes else "gpt2", ranks=eight, schedule=EARLY_AND_LATE)


@pytest.mark.parametrize("model", [LLAMA6, GPT6], ids=["llama", "gpt2"])
@pytest.mark.parametrize("schedule", [Schedule(), SLICES2, SLICES4], ids=str)
def test_a_grid_of_2_by_3_equals_one_process(model, schedule):
    check({"row": 2, "col": 3}, model, size=6, schedule=schedule)


# ---------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule", [SUMMA, CANNON, SLICES2, SLICES4], ids=str)
@pytest.mark.parametrize("model", ["llama", "llama tied", "gpt2"])
def test_schedules_on_a_grid_equal_one_process(model, schedule):
    check(GRID, model, schedule=schedule)


@pytest.mark.parametrize("model, schedule", [("gpt2 tied", SUMMA), ("llama", CANNON), ("gpt2 tied", SLICES2)], ids=str)
@pytest.mark.parametrize("sizes", [TESSERACT, CUBE], ids=name)
def test_schedules_in_three_dimensions_equal_one_process(sizes, model, schedule):
    check(sizes, model, schedule=schedule)


@pytest.mark.parametrize("schedule", [SLICES2, SLICES4], ids=str)
@pytest.mark.parametrize(
    "sizes", [{"row": 4}, {"col": 4}, {"inner": 4}, {"inner": 2, "row": 2}, {"inner": 2, "col": 2}], ids=name
)
def test_slices_on_grids_that_are_not_square_equal_one_process(sizes, schedule):
    check(sizes, "llama tied" if "row" in sizes else "gpt2", schedule=schedule)


@pytest.mark.parametrize("schedule", [SUMMA, CANNON], ids=str)
@pytest.mark.parametrize("sizes", [{"inner": 2}, {"depth": 2}], ids=name)
def test_a_grid_of_one_rank_has_nothing_to_move(sizes, schedule):
    check(sizes, "llama", schedule=schedule)


# ---------------------------------------------------------------------------------------------- policies

WHOLE_ALONG_COL = {"sequence_parallel": False}
KEEP = {"schedule": Schedule(keep=True)}
OVER_DEPTH = {"weights_over": ("depth", "row")}
BY_HEADS = {"attention": HIDDEN_BY_HEADS, "size": 2, "length": 8}


@pytest.mark.parametrize(
    "model, sizes, policy",
    [
        ("llama", {"col": 2}, KEEP),
        ("gpt2", {"col": 2}, KEEP),
        ("llama", {"col": 2}, {"gradient_checkpointing": True}),
        ("gpt2", {"col": 2}, {"gradient_checkpointing": True}),
        ("gpt2", GRID, KEEP),
        ("llama", GRID, WHOLE_ALONG_COL),
        ("gpt2", GRID, WHOLE_ALONG_COL | {"schedule": SLICES2}),
        ("llama", GRID, {"schedule": Schedule(slices=2, keep=True)}),
        ("gpt2", GRID, {"schedule": EARLY_AND_LATE, "gradient_checkpointing": True}),
        ("llama", GRID, {"schedule": CANNON, "gradient_checkpointing": True}),
        ("llama", {"depth": 2, "col": 2}, OVER_DEPTH),
        ("gpt2", {"depth": 2, "row": 2}, OVER_DEPTH | {"schedule": EARLY_AND_LATE}),
        ("llama", {"depth": 2, "row": 2}, OVER_DEPTH | {"schedule": SLICES2}),
        ("llama", {"inner": 2, "col": 2}, BY_HEADS),
        ("gpt2", {"inner": 2, "col": 2}, BY_HEADS | KEEP),
        ("llama", {"inner": 2, "row": 2}, BY_HEADS | {"schedule": SLICES4}),
    ],
    ids=name,
)
def test_policies_do_not_change_numbers(model, sizes, policy):
    check(sizes, model, **policy)


@pytest.mark.parametrize("schedule", [Schedule(), SLICES2], ids=str)
def test_weights_stored_cut_over_depth_equal_one_process(schedule):
    check(TESSERACT, "gpt2 tied", schedule=schedule, **OVER_DEPTH)


@pytest.mark.parametrize("model, schedule", [("llama", EARLY_AND_LATE), ("gpt2", SUMMA), ("llama", SLICES2)], ids=str)
def test_attention_by_heads_in_a_cube_equals_one_process(model, schedule):
    check(CUBE, model, schedule=schedule, **BY_HEADS)
