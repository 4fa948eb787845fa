"""What does not depend on the mesh: initial weights, dropout masks, and the course of a run."""

import math

import pytest

from distributed.independence_cases import curve, masks_agree, weights_agree
from support.pool import pool
from tessera.layout.streams import HIDDEN_BY_HEADS
from tessera.sizes.schedule import Schedule

LOOPS = {"schedule": Schedule("summa")}
OVER_DEPTH = {"weights_over": ("depth", "row")}
BY_HEADS = {"attention": HIDDEN_BY_HEADS}
GRID = {"row": 2, "col": 2}
TESSERACT, CUBE = {"depth": 2} | GRID, {"inner": 2} | GRID
LAYOUTS = [
    ({"col": 4}, {}, 4),
    ({"col": 2}, {"sequence_parallel": False}, 4),
    (GRID, {}, 4),
    (GRID, LOOPS, 4),
    ({"depth": 2, "row": 2}, OVER_DEPTH, 4),
    ({"inner": 2, "col": 2}, {}, 4),
    ({"inner": 2, "col": 2}, BY_HEADS, 3),
    (TESSERACT, {}, 8),
    (TESSERACT, LOOPS, 8),
    (CUBE, {}, 8),
    (CUBE, LOOPS, 8),
    (CUBE, BY_HEADS, 2),
]


def name(value):
    return "×".join(f"{key}{n}" for key, n in value.items()) if isinstance(value, dict) else str(value)


def ranks_of(sizes):
    return pool(math.prod(sizes.values()))


@pytest.mark.parametrize("sizes, options, batch", LAYOUTS, ids=name)
def test_initial_weights_and_dropout_masks_do_not_depend_on_the_mesh(sizes, options, batch):
    for same in ranks_of(sizes).run(weights_agree, sizes, options):
        assert all(same)
    for same in ranks_of(sizes).run(masks_agree, sizes, options, batch):
        assert all(same) and len(same) == 7  # embedding, and three in each layer


STEPS, SAME = 12, 1e-10


def test_a_run_takes_one_course_in_every_geometry():
    want = curve({}, {}, STEPS, seed=1)
    assert want[-1][0] < 0.7 * want[0][0], "it learns"
    for sizes in ({"col": 4}, GRID, TESSERACT, CUBE):
        for found in ranks_of(sizes).run(curve, sizes, {}, STEPS, 1):
            assert worst(found, want) <= SAME, sizes
    assert worst(curve({}, {}, STEPS, seed=2), want) > 1e-3, "other masks would be seen"


def worst(found, want):
    pairs = [pair for ours, theirs in zip(found, want, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)
