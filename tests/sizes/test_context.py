"""How sequence axes are chosen, and said with their reason; what is refused, with what fits instead."""

import itertools

import pytest

from tessera.core.errors import UserError
from tessera.sizes.context import ContextParallel, fitted, in_words


@pytest.mark.parametrize(
    "size, heads, inside, ulysses",
    [
        (1, 7, None, 1),
        (8, 6, None, 2),
        (8, 8, None, 8),
        (8, 32, 4, 4),
        (6, 9, None, 3),
        (4, 7, None, 1),
        (16, 32, 1, 1),
    ],
)
def test_auto_takes_the_largest_degree_that_heads_and_machine_allow(size, heads, inside, ulysses):
    chosen = fitted(ContextParallel(size), heads, inside)
    assert chosen.sizes == {"ring": size // ulysses, "ulysses": ulysses} and chosen.transport == "exchange"


def test_what_is_given_is_kept():
    assert fitted(ContextParallel(4, "ring"), 8).sizes == {"ring": 4, "ulysses": 1}
    assert fitted(ContextParallel(4, "ring"), 8).transport == "ring"
    assert fitted(ContextParallel(4, "ulysses"), 8).sizes == {"ring": 1, "ulysses": 4}
    assert fitted(ContextParallel(4, "exchange", 2), 8).sizes == {"ring": 2, "ulysses": 2}
    assert fitted(ContextParallel(4, "auto", 2), 8).sizes == {"ring": 2, "ulysses": 2}


REFUSED = {
    "heads": (ContextParallel(4, "ulysses"), 6, "context_parallel_mode", "6 query heads", "ulysses_size: 1 or 2"),
    "heads of a product": (ContextParallel(8, "ring", 4), 6, "ulysses_size", "6 query heads", "ulysses_size: 1 or 2"),
    "no divisor": (ContextParallel(4, "ring", 3), 6, "ulysses_size", "context_parallel_size 4", "1 or 2 or 4"),
    "ulysses alone": (ContextParallel(4, "ulysses", 2), 8, "ulysses_size", "all 4 ranks", "ulysses_size: 4"),
    "chunks of nothing": (ContextParallel(4, "ring", chunks=2), 8, "ulysses_chunks", "trades none", "above 1"),
    "chunks": (ContextParallel(2, "ulysses", chunks=3), 8, "ulysses_chunks", "4 query heads", "1 or 2 or 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_message_with_what_does(case):
    asked, heads, key, reason, hint = REFUSED[case]
    with pytest.raises(UserError) as error:
        fitted(asked, heads)
    assert error.value.key == key and reason in error.value.reason and hint in error.value.hint


def test_every_degree_proposed_fits():
    for size, heads, ulysses in itertools.product(range(1, 13), range(1, 13), (None, *range(1, 13))):
        asked = ContextParallel(size, "exchange", ulysses)
        try:
            fitted(asked, heads)
        except UserError as error:
            numbers = error.hint.partition(",")[0].removeprefix("ulysses_size: ").split(" or ")
            near = [ContextParallel(size, "exchange", int(number)) for number in numbers]
            assert near and (size % (ulysses or 1) or all(fitted(one, heads) for one in near))


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
