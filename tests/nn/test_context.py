"""Attention over sequences that ranks share equals dense attention, for any documents, owners, heads and windows."""

import pytest

from nn.context_cases import worst_error
from nn.shards import label, world
from support.pool import pool

TOLERANCE = 1e-12
SLOW = pytest.mark.slow
MESHES = [{}, {"ring": 2}, {"ulysses": 2}, {"ring": 4}, {"ring": 2, "ulysses": 2}]
LARGE = [{"ulysses": 4}, {"ring": 8}, {"ring": 4, "ulysses": 2}, {"ring": 2, "ulysses": 4}]


@pytest.mark.parametrize("transport", ["exchange", "ring"])
@pytest.mark.parametrize("sizes", [*MESHES, *(pytest.param(sizes, marks=SLOW) for sizes in LARGE)], ids=label)
def test_shared_attention_equals_dense_attention(sizes, transport):
    """Output, dq, dk, dv; 16 cases drawn for each mesh and transport."""
    if transport == "ring" and "ring" not in sizes:
        pytest.skip("there is no ring")
    seeds = list(range(1000 * len(str(sizes)), 1000 * len(str(sizes)) + 16))
    for error, seed in pool(world(sizes)).run(worst_error, sizes, transport, seeds):
        assert error <= TOLERANCE, f"case {seed}"


@SLOW
@pytest.mark.parametrize("transport", ["exchange", "ring"])
@pytest.mark.parametrize("first", [0, 60, 120])
@pytest.mark.parametrize("sizes", [*MESHES[1:], *LARGE], ids=label)
def test_many_drawn_cases(sizes, transport, first):
    for error, seed in pool(world(sizes)).run(worst_error, sizes, transport, list(range(first, first + 60))):
        assert error <= TOLERANCE, f"case {seed}"
