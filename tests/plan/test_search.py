"""What the search leaves out is never the best; what it finds can be built."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.published import gpt

from tessera.layout.resolve import check_layout
from tessera.plan.candidates import NEVER
from tessera.plan.choice import Training
from tessera.plan.cluster import cluster_of
from tessera.plan.fit import most_that_fits
from tessera.plan.peak import RESERVED
from tessera.plan.recommend import judge
from tessera.plan.search import search

SMALL = gpt(512, 8, 2, 1024, 4096)


def tight(name: str, share: float):
    """A cluster whose devices have the memory of so many bytes."""
    cluster = cluster_of(name)
    return replace(cluster, profile=replace(cluster.profile, memory_bytes=RESERVED + int(share * 2**20)))


ROOMY, TIGHT = [("4xA100-80", 4, 1e5)], [("4xA100-80", 4, 200), ("2x2xH100", 8, 150)]
SAVED = [("3xA100-80", 24, 140), ("2xA100-80", 4, 100), ("2xA100-80", 4, 150)]
"""Where the best has savers; that of the first sums gradients after every micro-batch."""
SLOW = [pytest.param(*case, True, marks=pytest.mark.slow) for case in (*ROOMY, *TIGHT, *SAVED[1:])]


def saves(layout):
    return layout.offload or layout.tiles != 1 or layout.offload_params or layout.sync_each_batch


@pytest.mark.parametrize(
    ("name", "rows", "mebibytes", "savers"),
    [*((*case, False) for case in (*ROOMY, *TIGHT)), (*SAVED[0], True), *SLOW],
)
@pytest.mark.usefixtures("small_buffers")
def test_what_is_left_out_is_never_the_best(name, rows, mebibytes, savers, monkeypatch):
    monkeypatch.setattr("tessera.plan.search.KEPT", 5)
    cluster, training = tight(name, mebibytes), Training(512, rows)
    pruned, whole = (search(SMALL, cluster, training, savers=savers, exhaustive=every) for every in (False, True))
    fitting = whole.peak <= most_that_fits(cluster.profile.memory_bytes, whole.buffers)
    assert fitting.any() and (whole.buffers > 0).all()
    best = whole.seconds[fitting].min()
    assert np.isclose(pruned.seconds.min(), best, rtol=1e-12)
    assert np.isfinite(pruned.seconds).sum() < len(whole)
    if (name, rows, mebibytes) in SAVED:
        chosen = pruned.layout(int(np.argmin(pruned.seconds)))
        assert saves(chosen) and chosen.sync_each_batch == ((name, rows, mebibytes) == SAVED[0])


@pytest.mark.parametrize(("name", "savers"), [("2x4xA100-80", False), ("2xA100-80", True)])
def test_arrays_of_candidates_give_what_each_gives_by_itself(name, savers):
    cluster, training = cluster_of(name), Training(512, 8)
    found = search(SMALL, cluster, training, savers=savers, exhaustive=True)
    rng, places = np.random.default_rng(0), np.flatnonzero(found.peak < NEVER)
    for place in rng.choice(places, 25, replace=False):
        layout = found.layout(int(place))
        judged = judge(SMALL, layout, cluster, training)
        assert judged.peak.total == pytest.approx(found.peak[place], rel=2e-3), layout
        assert judged.buffers == found.buffers[place] > 0, layout
        assert judged.seconds == pytest.approx(found.seconds[place], rel=0.02), layout


@pytest.mark.usefixtures("small_buffers")
def test_a_host_without_room_takes_nothing():
    cluster, training = tight("2xA100-80", 100), Training(512, 4)
    full = replace(cluster, profile=replace(cluster.profile, host_memory_bytes=2**20))
    offloads = [
        any(switches.offload_params for switches in (found.layout(int(place)) for place in np.flatnonzero(timed)))
        for found in (search(SMALL, each, training) for each in (cluster, full))
        for timed in [np.isfinite(found.seconds)]
    ]
    assert offloads == [True, False]


def test_every_layout_that_is_found_can_be_built():
    found = search(SMALL, cluster_of("4xA100-80"), Training(512, 8), savers=False, exhaustive=True)
    assert {found.layout(place).mode for place in range(len(found))} == {"1d", "2d", "2.5d", "3d"}
    for place in range(0, len(found), 7):
        layout = found.layout(place)
        data = {axis: layout.size(axis) for axis in ("replicate", "shard", "ring", "ulysses")}
        check_layout(layout.tensor, data, SMALL.dimensions, layout.micro_batch)
        assert layout.devices == 4
        assert layout.micro_batch * layout.micro_batches * layout.size("replicate", "shard") == 8
