"""How sequence axes are chosen, and said with their reason; what is refused, with what fits instead."""

import itertools

import pytest

from tessera.core.errors import UserError
from tessera.sizes.context import ContextParallel, Surroundings, degrees, fitted, in_words


def around(heads, kv_heads=None, inside=None, rows=1, joined=1):
    return Surroundings(heads, kv_heads or heads, 64, inside, rows, joined)


@pytest.mark.parametrize(
    "size, meets, ulysses",
    [
        pytest.param(1, around(7), 1, id="one rank"),
        pytest.param(8, around(6), 2, id="heads allow 2"),
        pytest.param(8, around(8), 8, id="as many heads as ranks"),
        pytest.param(6, around(9), 3, id="heads allow 3"),
        pytest.param(4, around(7), 1, id="heads allow none"),
        pytest.param(8, around(32, inside=4), 4, id="a machine of 4"),
        pytest.param(6, around(12, inside=4), 2, id="a machine of 4 splits threes"),
        pytest.param(16, around(32, inside=1), 1, id="machines of one"),
        pytest.param(2, around(8, 2), 1, id="two ranks and few kv heads: exchange moves less"),
        pytest.param(4, around(16, 4), 4, id="four ranks and few kv heads: as much either way"),
        pytest.param(8, around(32, 8, inside=4), 4, id="grouped queries, two machines"),
        pytest.param(8, around(32, 1, inside=4), 1, id="one kv head, which ulysses would repeat"),
        pytest.param(4, around(8, rows=4), 1, id="a row for each rank: exchange moves nothing"),
        pytest.param(4, around(8, rows=4, joined=4), 4, id="a row for each rank, but tensor ranks share them"),
    ],
)
def test_auto_takes_the_degree_with_the_fewest_elements(size, meets, ulysses):
    chosen = fitted(ContextParallel(size), meets)
    assert chosen.sizes == {"ring": size // ulysses, "ulysses": ulysses} and chosen.transport == "exchange"


def test_between_machines_comes_first():
    """Two machines of 2: along ulysses 2 a rank receives more in all, but less between machines."""
    found = degrees(ContextParallel(4), around(12, 2, inside=2))
    assert list(found) == [1, 2]
    assert found == {1: (10, 20), 2: (28, 10)}
    assert fitted(ContextParallel(4), around(12, 2, inside=2)).ulysses == 2
    assert fitted(ContextParallel(4), around(12, 2)).ulysses == 1, "in one machine the sum alone counts"


def test_chunks_are_asked_for_of_ulysses():
    assert fitted(ContextParallel(2, chunks=2), around(8, 2)).ulysses == 2, "though exchange would receive less"
    assert fitted(ContextParallel(4, chunks=4), around(8)).ulysses == 2, "4 would leave 2 heads for 4 groups"


def test_what_is_given_is_kept():
    assert fitted(ContextParallel(4, "ring"), around(8)).sizes == {"ring": 4, "ulysses": 1}
    assert fitted(ContextParallel(4, "ring"), around(8)).transport == "ring"
    assert fitted(ContextParallel(4, "ulysses"), around(8)).sizes == {"ring": 1, "ulysses": 4}
    assert fitted(ContextParallel(4, "exchange", 2), around(8)).sizes == {"ring": 2, "ulysses": 2}
    assert fitted(ContextParallel(4, "auto", 2), around(8)).sizes == {"ring": 2, "ulysses": 2}


def test_elements_are_those_of_the_tables():
    """8 ranks, 8 heads: 4 (8 + 8) 7/8 along ulysses; 5 times 8 heads from 7 others by exchange."""
    found = degrees(ContextParallel(8), around(8))
    assert found[8] == (56, 0) and found[1] == (280, 0) and found[2] == (32 + 120, 0)
    assert degrees(ContextParallel(8), around(8, inside=2))[1] == (40, 240)
    assert degrees(ContextParallel(8, chunks=2), around(8))[2] == (48 + 120, 0)
    assert degrees(ContextParallel(2), around(8, rows=3, joined=2))[1] == (5 * 8 * 3, 0)


REFUSED = {
    "heads": (ContextParallel(4, "ulysses"), 6, "context_parallel_mode", "6 query heads", "ulysses_size: 1 or 2"),
    "heads of a product": (ContextParallel(8, "ring", 4), 6, "ulysses_size", "6 query heads", "ulysses_size: 1 or 2"),
    "no divisor": (
        ContextParallel(4, "ring", 3),
        6,
        "ulysses_size",
        "context_parallel_size 4",
        "ulysses_size: 1 or 2 or 4",
    ),
    "ulysses alone": (ContextParallel(4, "ulysses", 2), 8, "ulysses_size", "all 4 ranks", "ulysses_size: 4"),
    "chunks of nothing": (
        ContextParallel(4, "ring", chunks=2),
        8,
        "ulysses_chunks",
        "trades none",
        "ulysses_chunks: 1, or a ulysses_size above 1",
    ),
    "chunks": (ContextParallel(2, "ulysses", chunks=3), 8, "ulysses_chunks", "4 query heads", "ulysses_chunks: 1 or 2"),
    "chunks of auto": (ContextParallel(2, chunks=3), 8, "ulysses_chunks", "4 query heads", "ulysses_chunks: 1 or 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_message_with_what_does(case):
    asked, heads, key, reason, hint = REFUSED[case]
    with pytest.raises(UserError) as error:
        fitted(asked, around(heads))
    assert error.value.key == key and reason in error.value.reason and error.value.hint.startswith(hint)


def test_every_degree_proposed_fits():
    for size, heads, ulysses in itertools.product(range(1, 13), range(1, 13), (None, *range(1, 13))):
        asked = ContextParallel(size, "exchange", ulysses)
        try:
            fitted(asked, around(heads))
        except UserError as error:
            numbers = error.hint.partition(",")[0].removeprefix("ulysses_size: ").split(" or ")
            near = [ContextParallel(size, "exchange", int(number)) for number in numbers]
            assert near and (size % (ulysses or 1) or all(fitted(one, around(heads)) for one in near))


@pytest.mark.parametrize(
    "asked, meets, said",
    [
        (
            ContextParallel(8),
            around(6),
            "8 ranks = ulysses 2 × exchange 4: the 6 query heads of a rank allow ulysses 1 or 2, with 13,440 or 7,296 "
            "elements to receive a token and layer (rows of one document)",
        ),
        (ContextParallel(4), around(3), "4 ranks = exchange 4: the 3 query heads of a rank allow no ulysses"),
        (
            ContextParallel(8),
            around(32, 8, inside=4),
            "8 ranks = ulysses 4 × exchange 2: the 32 query heads of a rank and its machine allow ulysses 1 or 2 or 4, "
            "with 7,680 + 10,240 or 7,680 + 5,120 or 7,680 + 2,560 elements to receive a token and layer, inside + "
            "between machines, where fewest count first (rows of one document)",
        ),
        (
            ContextParallel(2),
            around(4, inside=1),
            "2 ranks = exchange 2: the 4 query heads of a rank and its machine allow no ulysses",
        ),
        (ContextParallel(8, ulysses=2), around(8), "8 ranks = ulysses 2 × exchange 4, as ulysses_size says"),
        (ContextParallel(8, "ring", 2), around(8), "8 ranks = ulysses 2 × ring 4"),
        (ContextParallel(2, "ulysses"), around(8), "2 ranks = ulysses 2"),
    ],
)
def test_how_ranks_share_a_sequence_is_said_with_its_reason(asked, meets, said):
    assert in_words(fitted(asked, meets), meets) == said
