"""Sizes far beyond any model: refused, or searched with bounded work; never a search without end."""

import time

import pytest

from tessera.core.errors import UserError
from tessera.sizes.bounds import RANKS
from tessera.sizes.geometries import mesh_sizes
from tessera.sizes.numbers import multiples_near
from tessera.sizes.remedies import check_sizes
from tessera.sizes.rules import TensorParallel

MANY_DIVISORS = 720720
DIMENSIONS = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "kv_features", "intermediate_size"), MANY_DIVISORS),
    "vocab_size": 2**24,
}
ASKED = [
    TensorParallel("2d", 10**18 + 9),
    TensorParallel("3d", 10**400),
    TensorParallel("2.5d", 8, depth=10**18),
    TensorParallel("2d", mesh={"row": 10**9, "col": 10**9}),
    TensorParallel("2d", 4, slices=10**18),
    TensorParallel("2d", 262139),  # a prime
    TensorParallel("1d", 262139),
    TensorParallel("2d", 8, slices=65537),
    TensorParallel("3d", 131071, mesh={"inner": 61, "row": 61, "col": 61}),
    TensorParallel("2.5d", 131071, 509, {"row": 509, "col": 509}, "shard", "summa", 2, True, False, True, False),
    TensorParallel("2d", 262139, 509, {"row": 509, "col": 509}, schedule="summa", slices=65537, keep_gathered=True),
]


@pytest.mark.parametrize("asked", ASKED, ids=range(len(ASKED)))
def test_a_misfit_is_told_soon_whatever_its_size(asked):
    for dimensions, batch in [(DIMENSIONS, MANY_DIVISORS), ({**DIMENSIONS, "hidden_size": 1048573}, 1)]:
        begun = time.process_time()
        with pytest.raises(UserError):
            check_sizes(asked, dimensions, batch)
        assert time.process_time() - begun < 5


@pytest.mark.parametrize("name", DIMENSIONS)
def test_sizes_of_a_model_are_bounded(name):
    with pytest.raises(UserError, match="at most"):
        check_sizes(TensorParallel("1d", 7), {**DIMENSIONS, name: 10**18}, 1)


@pytest.mark.parametrize("mode", ["1d", "2d", "2.5d", "3d"])
def test_no_mesh_has_more_ranks_than_a_run(mode):
    with pytest.raises(UserError, match=f"at most {RANKS}"):
        mesh_sizes(mode, 10**18 + 9)


def test_multiples_are_computed_not_counted():
    assert multiples_near(10**18 + 1, 10**9) == [10**18, 10**18 + 10**9]
    assert multiples_near(12, 4) == [8, 16] and multiples_near(3, 4) == [4] and multiples_near(4, 4) == [8]
