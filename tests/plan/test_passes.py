"""Attention's passes over keys and values: the next travel while tiles are computed, and no rank holds them all."""

from dataclasses import replace

import pytest

from plan.context_cases import Case
from plan.pass_cases import held, order
from support.pool import pool

ONE_DOCUMENT = Case("one layer", {"ring": 4}, rows=1, seed=None)
PACKED = Case("one layer", {"ring": 4}, rows=4)
AHEAD = {
    "ring": 3 * ["next", "tiles", "there"] + ["tiles"],
    "exchange": ["next", "tiles", "there", "tiles"],
}


@pytest.mark.parametrize("transport", AHEAD)
def test_the_next_keys_are_on_their_way_before_tiles_are_computed(transport):
    case = replace(ONE_DOCUMENT, transport=transport)
    for passes in pool(4).run(order, case):
        assert passes == 2 * [AHEAD[transport]], "of the forward, and of the backward"


def test_waiting_for_the_next_keys_at_once_is_another_order():
    for passes in pool(4).run(order, replace(ONE_DOCUMENT, transport="ring"), True):
        assert passes == 6 * [["next", "there", "tiles"]]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_no_rank_holds_all_keys_and_values_of_random_documents(seed):
    """Those that are sent are copies, which count; in the backward their gradients count too."""
    for transport in ("exchange", "ring"):
        case = replace(PACKED, transport=transport, seed=seed)
        for forward, backward in pool(4).run(held, case):
            assert 0.25 <= forward < 1, transport  # a rank whose documents lie with it reads nothing of others
            assert forward < backward < 2, transport


@pytest.mark.slow
def test_a_ring_holds_few_parts_of_one_long_document_and_an_exchange_all_of_it():
    """Who owns the end of a document reads all of it: in an exchange at once, around the ring part by part."""
    case = replace(ONE_DOCUMENT, sizes={"ring": 8})
    most = {t: max(part for part, _ in pool(8).run(held, replace(case, transport=t))) for t in ("exchange", "ring")}
    assert most["exchange"] >= 1
    assert most["ring"] <= 4 / 8, "its own, two rounds and the next"
