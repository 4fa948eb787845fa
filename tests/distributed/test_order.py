"""When weights are gathered and gradients are summed: each switch moves what it says, and no number changes."""

import pytest

from distributed.order_cases import BETWEEN, PASSES, backward_order, changes, interrupted, mixed, order
from support.pool import pool
from tessera.sizes.schedule import Schedule

FORWARD = ["qkv", "out", "gate·up", "down"]
LAYERS = 2
ONE_MICRO_BATCH = FORWARD * LAYERS + FORWARD[::-1] * LAYERS
EARLY_AND_LATE = Schedule(prefetch=True, defer=True)


def at_once(names):
    return [f"{what} {name}" for name in names for what in ("issue", "wait")]


def one_ahead(names):
    """Each is issued before the one before it is waited for."""
    following = [*names[1:], None]
    pairs = [
        [f"wait {name}"] if after is None else [f"issue {after}", f"wait {name}"]
        for name, after in zip(names, following, strict=True)
    ]
    return [f"issue {names[0]}", *(event for pair in pairs for event in pair)]


def happened(schedule, micro_batches=1, **options):
    ranks = pool(2).run(order, schedule, micro_batches, options)
    assert ranks[0] == ranks[1], "issued in another order on another rank"
    return ranks[0]["all_gather"], ranks[0]["reduce_scatter"]


def test_without_switches_each_is_waited_for_at_once():
    gathers, scatters = happened(Schedule(overlap=False))
    assert gathers == at_once(ONE_MICRO_BATCH)
    assert scatters == at_once(FORWARD[::-1] * LAYERS)


def test_prefetch_gathers_the_next_products_weights_from_the_second_micro_batch_on():
    gathers, scatters = happened(Schedule(prefetch=True), micro_batches=3)
    assert gathers == at_once(ONE_MICRO_BATCH) + 2 * one_ahead(ONE_MICRO_BATCH)
    assert scatters == 3 * at_once(FORWARD[::-1] * LAYERS)


def test_prefetch_knows_the_order_of_recomputed_layers():
    gathers, _ = happened(Schedule(prefetch=True), micro_batches=2, gradient_checkpointing=True)
    assert gathers == at_once(recomputed()) + one_ahead(recomputed())


def recomputed():
    return FORWARD * LAYERS + (FORWARD + FORWARD[::-1]) * LAYERS


def test_defer_waits_for_a_gradient_once_the_next_is_issued():
    gathers, scatters = happened(Schedule(defer=True), micro_batches=2)
    assert gathers == 2 * at_once(ONE_MICRO_BATCH)
    assert scatters == 2 * one_ahead(FORWARD[::-1] * LAYERS)


def test_both_at_once():
    gathers, scatters = happened(EARLY_AND_LATE, micro_batches=2)
    assert gathers == at_once(ONE_MICRO_BATCH) + one_ahead(ONE_MICRO_BATCH)
    assert scatters == 2 * one_ahead(FORWARD[::-1] * LAYERS)


@pytest.mark.parametrize("schedule", [Schedule(keep=True), Schedule(slices=2, keep=True)], ids=str)
def test_keep_gathers_nothing_twice(schedule):
    gathers, _ = happened(schedule)
    issued = [event for event in gathers if event.startswith("issue")]
    assert issued == [f"issue {name}" for name in FORWARD * LAYERS for _ in range(schedule.slices)]


def test_overlap_sums_the_gradient_of_x_during_the_product_of_ws():
    product_first = ["product dX", "issue reduce_scatter", "product dW", "wait reduce_scatter"]
    sum_first = ["product dX", "issue reduce_scatter", "wait reduce_scatter", "product dW"]
    assert pool(2).run(backward_order, Schedule(keep=True))[0] == product_first
    assert pool(2).run(backward_order, Schedule(keep=True, overlap=False))[0] == sum_first


@pytest.mark.parametrize(
    "switches, checkpointing",
    [
        ({"prefetch": True}, False),
        ({"defer": True}, False),
        ({"overlap": False}, False),
        ({"prefetch": True, "defer": True}, True),
    ],
    ids=str,
)
def test_switches_change_neither_numbers_nor_counts(switches, checkpointing):
    options = {"gradient_checkpointing": checkpointing}
    for same, difference in pool(2).run(changes, Schedule(), Schedule(**switches), {"row": 2}, options):
        assert same and difference == {}


def test_weights_stored_cut_over_depth_are_gathered_early_and_summed_late_too():
    sizes, options = {"depth": 2, "row": 2}, {"weights_over": ("depth", "row")}
    for same, difference in pool(4).run(changes, Schedule(), EARLY_AND_LATE, sizes, options):
        assert same and difference == {}


def test_keep_changes_counts_and_no_number():
    for same, difference in pool(4).run(changes, Schedule(), Schedule(keep=True), {"row": 2, "col": 2}, {}):
        assert same
        assert difference and all(kind == "all_gather" and n < 0 for (kind, _, _), n in difference.items())
        products = (
            2 * 2 * LAYERS * len(FORWARD)
        )  # of two steps of two micro-batches; X of column layers moves along col
        assert -sum(n for (_, axis, _), n in difference.items() if axis == "row") == products
        assert -sum(n for (_, axis, _), n in difference.items() if axis == "col") == products // 2


MIXED = ["F0", "F1", "B0", "F2", "B1", "B2"]  # of the first rank of two stages
ANNOUNCED = [*(PASSES[action[0]] for action in MIXED[1:]), None]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recompute"])
def test_mixed_passes_gather_each_weight_once_and_one_product_early(checkpointing):
    first, *known = zip(*pool(2).run(mixed, MIXED, ANNOUNCED, checkpointing), strict=True)
    assert all(same and more == 0 for same, more, _ in first), "while the orders are learnt"
    backward = FORWARD + FORWARD[::-1] if checkpointing else FORWARD[::-1]
    in_order = [name for action in MIXED for name in (FORWARD if action[0] == "F" else backward) * LAYERS]
    for ranks in known:
        for same, more, events in ranks:
            assert same and more == 0
            assert events == one_ahead(in_order)


@pytest.mark.parametrize(
    "announced, wasted",
    [([None] * 6, 0), ([PASSES["B" if action[0] == "F" else "F"] for action in MIXED], 2)],
    ids=["nothing", "as if in order"],
)
def test_what_is_announced_wrongly_costs_gathers_and_no_number(announced, wasted):
    """As if in order: F0 announces a backward, but F1 comes; B1 a forward, but B2 comes; B2 the next step's forward."""
    for *_, (same, more, events) in pool(2).run(mixed, MIXED, announced, False):
        assert same and more == wasted
        assert events != one_ahead([name.removeprefix("wait ") for name in events if name.startswith("wait")])


@pytest.mark.parametrize("between", BETWEEN)
def test_nothing_that_comes_between_spoils_a_step(between):
    for same in pool(2).run(interrupted, between, False):
        assert all(same)


@pytest.mark.parametrize("between", ["evaluation", "a backward that fails"])
def test_nor_one_of_recomputed_layers(between):
    for same in pool(2).run(interrupted, between, True):
        assert all(same)
