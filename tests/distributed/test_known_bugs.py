"""Each bug that implementations of 2D, 2.5D and 3D have had is found when it is put in here."""

import math

import pytest

from distributed.bug_cases import BUGS, with_and_without
from support.pool import pool

CASES = [
    ("no depth reduction of dW", "numbers", {"depth": 2, "col": 2}, "llama"),
    ("bias and norm gradients not reduced across row", "numbers", {"row": 2, "col": 2}, "gpt2"),
    ("batch cut over the grid only", "tokens", {"depth": 2, "col": 2}),
    ("gathered X and W kept", "saved", {"inner": 2, "row": 2, "col": 2}),
    ("half precision hard-coded", "numbers", {"row": 2, "col": 2}, "llama"),
    ("biases live on the first row", "numbers", {"row": 2, "col": 2}, "gpt2"),
    ("groups swapped by every layer", "numbers", {"row": 2, "col": 2}, "llama even"),
    ("seeds of each rank", "init", {"row": 2, "col": 2}),
    ("row bias added by every rank", "numbers", {"col": 2}, "gpt2"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_the_bug_is_found(case):
    bug, check, sizes, *rest = case
    answers = pool(math.prod(sizes.values())).run(with_and_without, bug, check, sizes, *rest)
    assert all(right for right, _ in answers)
    assert not all(wrong for _, wrong in answers), "the bug was put in and nobody saw it"


def test_grids_of_one_rank_run():
    assert with_and_without("a grid of one crashes", "one", "summa") == (True, False)


def test_no_bug_is_left_out():
    assert {case[0] for case in CASES} | {"a grid of one crashes"} == set(BUGS)
