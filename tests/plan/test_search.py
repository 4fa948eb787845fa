"""What the search leaves out is never the best; what it finds can be built."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from benchmarks.published import gpt

from tessera.layout.resolve import check_layout
from tessera.models.shapes import shape_of
from tessera.plan.candidates import NEVER
from tessera.plan.choice import RECOMPUTES, Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.fit import checked_peak, most_that_fits
from tessera.plan.peak import RESERVED
from tessera.plan.recommend import judge
from tessera.plan.search import search

SMALL = gpt(512, 8, 2, 1024, 4096)


def tight(name: str, share: float):
    """A cluster whose devices have the memory of so many bytes."""
    cluster = cluster_of(name)
    return replace(cluster, profile=replace(cluster.profile, memory_bytes=RESERVED + int(share * 2**20)))


def rows(count: int, length: int = 512, optimizer: str = "adamw_torch_fused") -> Training:
    return Training(length, count, optimizer=optimizer)


ROOMY, TIGHT = [("4xA100-80", rows(4), 1e5)], [("4xA100-80", rows(4), 200), ("2x2xH100", rows(8), 150)]
SUMMED = ("3xA100-80", rows(8), 140)
SAVED = [
    SUMMED,
    ("2x1xA100-80", rows(24, 2048, "adamw_torch"), 86.656),
    ("2xA100-80", rows(4), 100),
    ("2xA100-80", rows(8), 60),
    ("4x4090", rows(8, 2048), 80),
]
"""Where the best has savers; that of the first sums gradients after every micro-batch."""
SLOW = [pytest.param(*case, True, marks=pytest.mark.slow) for case in (*ROOMY, *TIGHT, *SAVED[1:])]
SLOW_PREMISES = [pytest.param(name, marks=pytest.mark.slow) for name in ("4xA100-80", "2x1xRTX4090", "2xMI300X")]


def saves(layout):
    return layout.offload or layout.tiles != 1 or layout.offload_params or layout.sync_each_batch


@pytest.mark.parametrize(
    ("name", "training", "mebibytes", "savers"),
    [*((*case, False) for case in (*ROOMY, *TIGHT)), (*SUMMED, True), *SLOW],
)
@pytest.mark.usefixtures("small_buffers")
def test_what_is_left_out_is_never_the_best(name, training, mebibytes, savers, monkeypatch):
    monkeypatch.setattr("tessera.plan.search.KEPT", 5)
    cluster = tight(name, mebibytes)
    pruned, whole = (search(SMALL, cluster, training, savers=savers, exhaustive=every) for every in (False, True))
    fitting = whole.peak <= most_that_fits(cluster.profile.memory_bytes, whole.buffers)
    assert fitting.any() and (whole.buffers > 0).all()
    best = whole.seconds[fitting].min()
    assert np.isclose(pruned.seconds.min(), best, rtol=1e-12)
    assert np.isfinite(pruned.seconds).sum() < len(whole)
    case, chosen = (name, training, mebibytes), pruned.layout(int(np.argmin(pruned.seconds)))
    assert saves(chosen) or case not in SAVED
    assert chosen.sync_each_batch or case != SUMMED


@pytest.mark.usefixtures("small_buffers")
def test_a_schedule_is_tried_where_only_it_fits():
    """Slices hold less of what is gathered."""
    training, alone = Training(256, 8, stored="bfloat16"), Layout({"row": 2}, micro_batch=8, micro_batches=1)
    sliced = replace(alone, slices=2)
    peaks = {layout: checked_peak(SMALL, layout, training) for layout in (sliced, alone)}
    assert peaks[sliced] < peaks[alone]
    cluster = cluster_of("2xA100-80")
    between = RESERVED + int((peaks[sliced] + peaks[alone]) / 2 * 1.03 / 0.85)
    cluster = replace(cluster, profile=replace(cluster.profile, memory_bytes=between))
    pruned, whole = (search(SMALL, cluster, training, exhaustive=every) for every in (False, True))
    fitting = whole.fitting(cluster)
    assert np.isclose(pruned.seconds.min(), whole.seconds[fitting].min(), rtol=1e-12)
    assert pruned.layout(int(np.argmin(pruned.seconds))) == sliced


def surely_no_slower(layout):
    """The same layout with one saver less; of those without savers what keeps weights, or computes less again."""
    off: dict[str, Any] = {"sync_each_batch": False, "offload": False, "offload_params": False}
    off |= {"tiles": 1} if layout.recompute == "false" and not layout.offload else {}
    savers = [name for name, value in off.items() if getattr(layout, name) != value]
    yield from (replace(layout, **{name: off[name]}) for name in savers)
    if savers or layout.offload:
        return
    yield replace(layout, reshard=False)
    for recompute in RECOMPUTES[: RECOMPUTES.index(layout.recompute)]:
        yield replace(layout, recompute=recompute, tiles=1 if recompute == "false" else layout.tiles)


def test_tiles_in_layers_that_run_again_bring_their_weights_once_less():
    """They compute no more then, so they are no saver that takes time."""
    layout, model = Layout({"row": 2, "col": 4}, micro_batch=8, micro_batches=8, recompute="selective"), shape_of("13B")
    again, tiled = (
        judge(model, replace(layout, tiles=tiles), cluster_of("2x4xL40S"), rows(64, 2048)) for tiles in (1, None)
    )
    assert tiled.time.exposed["row"] < again.time.exposed["row"] and tiled.seconds < again.seconds


@pytest.mark.parametrize("name", ["2xA100-80", *SLOW_PREMISES])
def test_a_saver_gives_no_time_back(name):
    """Nor does what is computed again, or gathered again: what the search leaves out rests on that."""
    found = search(SMALL, cluster_of(name), Training(2048, 8), exhaustive=True)
    layouts = [found.layout(place) for place in range(len(found))]
    seconds = {(str(dict(each.sizes)), each): s for each, s in zip(layouts, found.seconds, strict=True)}
    compared = 0
    for (sizes, layout), taken in seconds.items():
        for other in surely_no_slower(layout):
            less = seconds.get((sizes, other), np.inf)
            if np.isfinite(less):
                assert less <= taken * (1 + 1e-12), (layout, other)
                compared += 1
    assert compared > 1000


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
