"""One product cut over T, N, K and every pair and triple of them, against the dense product in float64."""

import itertools

import pytest

from product.product_cases import backward_order, product_errors, public_matmul
from support.pool import pool

CUTS = [
    {"row": 2},
    {"col": 2},
    {"inner": 2},
    {"row": 2, "col": 2},
    {"row": 2, "inner": 2},
    {"col": 2, "inner": 2},
    {"row": 2, "col": 2, "inner": 2},
]
STORED = [(0, 1, 0), (0, 0, 0), (1, 1, 0), (0, 1, 1), (None, 1, None)]


def world(sizes):
    return 2 ** len(sizes)


def name(value):
    return "×".join(f"{a}{n}" for a, n in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("sizes", CUTS, ids=name)
@pytest.mark.parametrize("stored", STORED, ids=lambda s: "x{} w{} y{}".format(*s))
def test_product_equals_dense_and_words_equal_formula(sizes, stored):
    for keep, biased, count in [(False, False, 1), (True, True, 1), (False, True, 3)]:
        for worst, counted, closed, *_ in pool(world(sizes)).run(
            product_errors, sizes, *stored, keep, biased, count, None
        ):
            assert worst <= 1e-12, (keep, biased, count)
            assert counted == closed, (keep, biased, count)


@pytest.mark.parametrize("sizes", CUTS, ids=name)
def test_leaving_out_any_collective_is_seen(sizes):
    group = pool(world(sizes))
    _, _, _, forward, backward = group.run(product_errors, sizes, 0, 1, 0, False, False, 1, None)[0]
    assert len(forward) == len(sizes) and len(backward) >= len(sizes)
    for index in range(len(forward + backward)):
        worst = max(r[0] for r in group.run(product_errors, sizes, 0, 1, 0, False, False, 1, index))
        assert worst > 1e-2, f"leaving out collective {index} ({(forward + backward)[index]}) went unseen"


def test_an_axis_of_size_one_costs_nothing():
    worst, counted, _, forward, backward = product_errors({}, 0, 1, 0, False, True, 2, None)
    assert worst <= 1e-15 and not forward and not backward and not any(counted.values())


def test_several_weights_move_together():
    sizes = {"row": 2, "col": 2, "inner": 2}
    for count in (1, 3):
        *_, forward, backward = pool(8).run(product_errors, sizes, 0, 1, 0, False, False, count, None)[0]
        assert sorted(forward) == ["all_gather", "all_gather", "reduce_scatter"]
        assert sorted(backward) == ["all_gather"] * 3 + ["reduce_scatter"] * 2


def test_backward_hides_what_it_can():
    assert pool(2).run(backward_order, False)[0] == [
        "issue all_gather",
        "product dX",
        "issue reduce_scatter",
        "wait all_gather",
        "product dW",
        "wait reduce_scatter",
    ]
    assert pool(2).run(backward_order, True)[0] == [
        "product dX",
        "issue reduce_scatter",
        "product dW",
        "wait reduce_scatter",
    ]


def test_public_matmul():
    assert max(pool(4).run(public_matmul)) <= 1e-12


def test_matmul_refuses_an_axis_with_two_roles_and_shapes_that_do_not_fit():
    import torch

    import tessera
    from tessera.core.mesh import Mesh

    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="one role"):
        tessera.matmul(x, w, Mesh(), tokens="col", outputs="col")
    with pytest.raises(ValueError, match="do not multiply: 3 inputs against 5"):
        tessera.matmul(x, torch.zeros(4, 5), Mesh())


def test_every_pair_and_triple_is_covered():
    roles = [frozenset(s) for s in CUTS]
    wanted = [frozenset(c) for n in (1, 2, 3) for c in itertools.combinations(["row", "col", "inner"], n)]
    assert sorted(map(sorted, roles)) == sorted(map(sorted, wanted))
