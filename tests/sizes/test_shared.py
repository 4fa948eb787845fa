"""How a run says in words how ranks share a sequence, and why."""

import pytest

from tessera.sizes.context import ContextParallel, fitted, in_words


@pytest.mark.parametrize(
    "asked, heads, inside, said",
    [
        (
            ContextParallel(8),
            6,
            None,
            "8 ranks = ulysses 2 × exchange 4: 2 is the most that the 6 query heads of a rank allow",
        ),
        (ContextParallel(4), 8, 4, "4 ranks = ulysses 4: 4 is the most that the 8 query heads of a rank allow"),
        (ContextParallel(4), 3, 4, "4 ranks = exchange 4: 1 is the most that the 3 query heads of a rank allow"),
        (
            ContextParallel(8),
            8,
            4,
            "8 ranks = ulysses 4 × exchange 2: 4 is the most that a machine has room for beside the tensor axes",
        ),
        (ContextParallel(8, ulysses=2), 8, 8, "8 ranks = ulysses 2 × exchange 4, as ulysses_size says"),
        (ContextParallel(8, "ring", 2), 8, 8, "8 ranks = ulysses 2 × ring 4"),
        (ContextParallel(2, "ulysses"), 8, 8, "2 ranks = ulysses 2"),
    ],
)
def test_how_ranks_share_a_sequence_is_said_with_its_reason(asked, heads, inside, said):
    assert in_words(fitted(asked, heads, inside), heads, inside) == said
