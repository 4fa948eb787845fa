"""Heads traded in groups: the same numbers, the traffic and the memory that nn/context/chunks.py states."""

import pytest

from nn.chunk_cases import chunks_error, figures
from nn.shards import label, world
from support.pool import pool

CASES = [  # mesh, transport, groups, query and kv heads
    ({"ulysses": 2}, "exchange", 2, (8, 4)),
    ({"ulysses": 2}, "exchange", 4, (8, 2)),
    ({"ulysses": 2}, "exchange", 3, (12, 4)),  # groups of four heads, three of which read one kv head
    ({"ulysses": 2}, "exchange", 3, (6, 1)),
    ({"ulysses": 2, "ring": 2}, "ring", 2, (8, 8)),
    ({"ulysses": 2, "ring": 2}, "exchange", 2, (8, 4)),
]


@pytest.mark.parametrize(("sizes", "transport", "chunks", "heads"), CASES, ids=str)
def test_groups_change_nothing(sizes, transport, chunks, heads):
    assert max(pool(world(sizes)).run(chunks_error, sizes, transport, chunks, heads)) <= 1e-12, label(sizes)


def test_groups_move_and_hold_what_is_stated():
    """Two ranks, 8 heads of 16 features, 4 kv heads: N groups of 8 / N and 4 / N, all of which divide by the ranks."""
    T, H, K, D, element, U = 256, 8, 4, 16, 8, 2
    one, two = pool(U).run(figures, {"ulysses": U}, [1, 2], (H, K), T)[0]
    part = T * D * element // U * (U - 1)
    assert one["received"] == [part * (2 * H + 2 * K), part * (2 * H + 2 * K)] and one["calls"] == [3, 3]
    assert two["received"] == [part * (2 * H + 2 * K), part * (4 * H + 4 * K)] and two["calls"] == [6, 10]
    # groups keep for the backward this rank's own result and statistics alone, beside q, k and v, which were there
    statistics = T * H * element
    assert abs(two["kept"] - (T * H * D * element + statistics)) <= 1024
    assert one["kept"] >= two["kept"] + T * (2 * H + 2 * K) * D * element - statistics


def test_what_is_gathered_falls_with_the_number_of_groups():
    """The peak is a part that stays, and one that each doubling of the groups halves; that one is most of it."""
    T, H, D, element = 256, 16, 16, 8
    found = pool(2).run(figures, {"ulysses": 2}, [1, 2, 4, 8], (H, H), T)[0]
    for direction in (0, 1):
        first, *peaks = (one["peaks"][direction] for one in found[1:])
        falls = [before - after for before, after in zip([first, *peaks], peaks, strict=False)]
        assert falls[0] == pytest.approx(2 * falls[1], rel=0.25), found
        assert falls[0] >= (2 * H + 2 * H) * T * D * element / 4, found
