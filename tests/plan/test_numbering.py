"""Ranks take the devices of a machine in the order in which the busiest axes lie on the fastest links."""

import itertools
from dataclasses import replace
from math import prod

import numpy as np
import pytest

from tessera.core.axes import AXES
from tessera.core.mesh import Mesh
from tessera.models.shapes import shape_of
from tessera.plan.choice import Layout, Training
from tessera.plan.machine import Cluster, read_profile, shipped_profiles, written_profile
from tessera.plan.numbering import Links, busiest_first, device_order, link_rates, sizes_inside, slowest_link
from tessera.plan.recommend import judge
from tessera.plan.search import search
from tessera.plan.time import step_time
from tessera.plan.work import step_work


def pairs(devices, rate):
    """Every pair of devices with the bytes/s that `rate` gives it, a little apart as measured ones are."""
    every = itertools.combinations(range(devices), 2)
    return tuple((a, b, 1e9 * rate(a, b) * (1 + 0.01 * ((3 * a + b) % 5))) for a, b in every)


def bridged(a, b):
    return 50.0 if (a, b) in ((0, 2), (1, 3)) else 12.0


def sockets(a, b):
    """Devices take turns on two sockets."""
    return 25.0 if a % 2 == b % 2 else 10.0


def both(a, b):
    """Eight on two sockets, with bridges between 0–4, 2–6, 1–5 and 3–7."""
    return 50.0 if b == a + 4 else sockets(a, b)


def order_of(table, inside, busiest=None):
    """Inner axes move more, unless said otherwise."""
    return device_order(table, inside, busiest or tuple(reversed(range(len(inside)))))


BRIDGES, TWO_SOCKETS, BOTH = pairs(4, bridged), pairs(8, sockets), pairs(8, both)


def test_pairs_with_a_bridge_are_neighbours():
    assert order_of(BRIDGES, (2, 2)) == (0, 2, 1, 3)
    assert slowest_link(BRIDGES, (0, 1, 2, 3), (2, 2), 1) < 13e9 < 49e9 < slowest_link(BRIDGES, (0, 2, 1, 3), (2, 2), 1)
    assert order_of(BRIDGES, (4,)) == (0, 1, 2, 3), "a ring of four crosses slow links however it goes"


def test_the_busiest_axis_has_the_bridges():
    assert order_of(BRIDGES, (2, 2), (1, 0)) == (0, 2, 1, 3) and order_of(BRIDGES, (2, 2), (0, 1)) == (0, 1, 2, 3)
    inside = {"shard": 2, "row": 1, "col": 2}
    assert list(busiest_first(inside, {"shard": 5, "row": 9, "col": 5})) == [2, 0, 1], "the inner one of equals"
    assert list(busiest_first(inside, {"shard": 6, "row": 9, "col": 5})) == [0, 2, 1]


def test_each_socket_has_a_group_of_its_own():
    order = order_of(TWO_SOCKETS, (2, 4))
    assert [{device % 2 for device in group} for group in (order[:4], order[4:])] == [{0}, {1}]
    for size in (2, 4):
        assert slowest_link(TWO_SOCKETS, order_of(TWO_SOCKETS, (8 // size, size)), (8 // size, size), 1) > 24e9


def test_the_busiest_axis_has_the_first_choice_and_the_next_one_the_second():
    order = order_of(BOTH, (2, 2, 2))
    for first in range(0, 8, 2):
        assert abs(order[first] - order[first + 1]) == 4, "a bridge along the innermost axis"
    assert slowest_link(BOTH, order, (2, 2, 2), 1) > 24e9, "a socket along the next"
    assert slowest_link(BOTH, order, (2, 2, 2), 0) < 13e9


@pytest.mark.parametrize("inside", [(8,), (2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("table", [TWO_SOCKETS, BOTH], ids=["sockets", "bridges"])
def test_no_order_is_better_axis_by_axis(table, inside):
    def score(order):
        return [slowest_link(table, order, inside, place) for place in reversed(range(len(inside)))]

    best = score(order_of(table, inside))
    rng = np.random.default_rng(0)
    assert all(score(tuple(map(int, rng.permutation(8)))) <= best for _ in range(50))


def test_alike_links_keep_the_usual_order():
    for table in (pairs(8, lambda a, b: 100.0), pairs(8, lambda a, b: 100.0 + 30 * (a == 0)), (), BRIDGES[1:]):
        assert link_rates(table, 4) is None and order_of(table, (2, 2)) == (0, 1, 2, 3)


def test_many_devices_are_grouped_by_their_fastest_links():
    sixteen = pairs(16, lambda a, b: 50.0 if b == a + 8 else sockets(a, b))
    order = order_of(sixteen, (2, 4, 2))
    assert sorted(order) == list(range(16))
    assert all(abs(order[first] - order[first + 1]) == 8 for first in range(0, 16, 2))
    assert slowest_link(sixteen, order, (2, 4, 2), 1) > 24e9
    across = order_of(sixteen, (2, 4, 2), (0, 1, 2))
    assert all(abs(across[rank] - across[rank + 8]) == 8 for rank in range(8)), "where the outer axis is the busiest"
    alike = pairs(16, lambda a, b: 50.0 if b - a == 1 and a % 2 == 0 else 10.0)
    assert order_of(alike, (8, 2)) == tuple(range(16)), "as good as the usual order, which stays"


def test_sizes_inside_are_those_of_ranks_that_share_a_machine():
    for sizes, here in (({"shard": 4, "row": 2, "col": 4}, 8), ({"shard": 8, "col": 2}, 8), ({"col": 16}, 8)):
        inside = sizes_inside(sizes, here)
        meshes = [Mesh(sizes, rank=rank) for rank in range(here)]
        assert inside == {axis: len({mesh.coordinates[axis] for mesh in meshes}) for axis in AXES}
        assert prod(inside.values()) == here


# ---- What the planner makes of it


def wired(table, **changes):
    profile = replace(shipped_profiles()["H100"], devices=tuple("abcdefgh"), pairs=table, **changes)
    return replace(profile, devices_per_machine=max(b for _, b, _ in table) + 1)


def shares(table, inside, *axes, **received):
    return Links(table, dict.fromkeys(AXES, 1) | inside, dict.fromkeys(AXES, 0) | received).share(axes)


def test_a_collective_runs_at_the_slowest_link_of_its_ring():
    """Beside neighbours in the usual order, along which collectives were measured: those have no bridge."""
    grid = {"shard": 2, "col": 2}
    assert shares(BRIDGES, grid, "col") == pytest.approx(50 / 12, rel=0.03)
    assert shares(BRIDGES, grid, "shard") == 1 and shares(BRIDGES, grid, "shard", "col") == 1
    assert shares(BRIDGES, grid, "col", shard=1) == 1
    assert shares(BRIDGES, grid, "shard", shard=1) == pytest.approx(50 / 12, rel=0.03)
    assert shares(TWO_SOCKETS, {"shard": 2, "col": 4}, "col") == pytest.approx(2.5, rel=0.05)
    assert shares(pairs(4, lambda a, b: 10.0), grid, "col") == 1


def test_arrays_of_candidates_have_the_shares_of_each():
    sizes = [{"shard": 2, "col": 2}, {"col": 4}, {"shard": 4}, {"row": 2, "col": 2}, {"shard": 2, "col": 2}]
    many = {axis: np.array([each.get(axis, 1) for each in sizes]) for axis in AXES} | {"pp": 1}
    received = dict.fromkeys(AXES, 1) | {"shard": np.array([0, 0, 0, 0, 2])}
    for axes in (("col",), ("shard",), ("row", "col")):
        found = Links(BRIDGES, many, received).share(axes)
        alone = [
            shares(BRIDGES, each, *axes, shard=busy, col=1) for each, busy in zip(sizes, (0, 0, 0, 0, 2), strict=True)
        ]
        assert list(found) == alone


MODEL, TRAINING = shape_of("8B"), Training(2048, 4)


def test_a_step_over_bridges_is_faster_and_the_search_says_the_same():
    layout = Layout({"shard": 2, "col": 2}, 1, 2, recompute="true")
    plain, over_bridges = (Cluster(1, 4, wired(table)) for table in (pairs(4, lambda a, b: 12.0), BRIDGES))
    long = Training(16384, 4)  # many tokens: col is the busiest
    before, now = (judge(MODEL, layout, cluster, long).time for cluster in (plain, over_bridges))
    assert now.collectives["col"] < 0.8 * before.collectives["col"]
    assert now.collectives["shard"] == before.collectives["shard"]
    found = search(MODEL, over_bridges, TRAINING)
    context = found.sizes["ring"] * found.sizes["ulysses"] > 1
    timed = np.flatnonzero(np.isfinite(found.seconds) & ~context)
    for place in timed[:: max(1, len(timed) // 8)]:
        own = judge(MODEL, found.layout(int(place)), over_bridges, TRAINING).seconds
        assert found.seconds[place] == pytest.approx(own, rel=1e-9)


def test_links_that_a_cpu_is_said_to_have_change_nothing():
    parallel = (layout := Layout({"col": 2, "shard": 2}, 1, 2)).parallel(MODEL, TRAINING)
    work = step_work(MODEL, layout.shape(TRAINING, parallel), parallel, 4)
    without = replace(wired(BRIDGES), devices=())
    assert step_time(work, without).total == step_time(work, replace(without, pairs=())).total
    assert step_time(work, without).total > step_time(work, wired(BRIDGES)).total


def test_a_profile_keeps_who_its_devices_are(tmp_path):
    path = tmp_path / "made.json"
    path.write_text(written_profile(wired(BRIDGES)))
    assert read_profile(path) == wired(BRIDGES)
