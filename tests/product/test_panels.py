"""Layers in panels on a grid of 3 × 3, where shifts the wrong way differ from shifts the right way."""

import pytest

from product.panels_cases import errors_shifting_backwards, layer_cases
from support.pool import Pool
from tessera.sizes.schedule import Schedule

GRID = {"row": 3, "col": 3}
SCHEDULES = {s: Schedule(s) for s in ("summa", "cannon")} | {"slices": Schedule(slices=3)}


@pytest.fixture(scope="module")
def nine():
    """Ranks that no other module needs."""
    ranks = Pool(9)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def found(nine):
    """What every rank of the grid has to say of every schedule."""
    return {name: nine.run(layer_cases, GRID, schedule) for name, schedule in SCHEDULES.items()}


@pytest.mark.parametrize("layer", ["column", "row"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_layer_equals_the_dense_one(found, schedule, layer):
    assert max(rank[layer][0] for rank in found[schedule]) <= 1e-12


def test_shifts_the_wrong_way_give_something_else(nine):
    assert max(nine.run(errors_shifting_backwards, GRID)) > 0.1


@pytest.mark.parametrize("layer", ["column", "row"])
@pytest.mark.parametrize("schedule", ["summa", "cannon"])
def test_words_equal_the_closed_form_on_every_rank(found, schedule, layer):
    for rank in found[schedule]:
        assert rank[layer][1] == rank["words"][layer], rank["at"]


def test_words_of_cannon_depend_on_the_place_and_those_of_summa_do_not(found):
    assert len({tuple(rank["column"][1].items()) for rank in found["summa"]}) == 1
    assert len({tuple(rank["column"][1].items()) for rank in found["cannon"]}) > 1


COMES_IN = ["issue", "issue", "wait", "product", "issue", "wait", "product", "wait", "product"]
GOES_OUT = ["product", "issue", "product", "issue", "wait", "product", "issue", "wait", "wait"]
SHIFTED_IN = ["issue", "product", "wait", "issue", "product", "wait", "product"]
SHIFTED_OUT = ["product", "issue", "product", "wait", "issue", "product", "wait"]
SKEW, HOME = ["issue", "wait"], ["issue", "wait"]


@pytest.mark.parametrize("schedule", ["summa", "slices"])
def test_a_panel_is_on_its_way_while_the_last_one_multiplies(found, schedule):
    for rank in found[schedule]:
        assert rank["column"][2] == {"row": COMES_IN, "col": COMES_IN}
        assert rank["row"][2] == {"row": COMES_IN, "col": GOES_OUT}


def test_cannon_shifts_while_it_multiplies(found):
    """The skew of rows that have one comes first; the last sum goes home, where it is not there already."""
    for rank in found["cannon"]:
        row, col = rank["at"]["row"], rank["at"]["col"]
        assert rank["column"][2] == {
            "row": (SKEW if col else []) + SHIFTED_IN,
            "col": (SKEW if row else []) + SHIFTED_IN,
        }
        assert rank["row"][2] == {
            "row": (SKEW if col else []) + SHIFTED_IN,
            "col": SHIFTED_OUT + (HOME if (1 - row) % 3 else []),
        }
