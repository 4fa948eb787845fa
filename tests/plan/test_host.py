"""What travels to host memory in a step, and how long the device waits for it."""

from dataclasses import replace

import pytest
from benchmarks.published import gpt

from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.host import travelling
from tessera.plan.recommend import judge
from tessera.plan.traffic import LAYERS, OUTSIDE
from tessera.plan.update import shard_elements
from tessera.plan.work import step_work

SMALL, CLUSTER, TRAINING = gpt(512, 8, 2, 1024, 4096), cluster_of("4xA100-80"), Training(2048, 16)
ON_HOST = Layout({"shard": 4}, micro_batch=1, micro_batches=4, offload_params=True)
SUMMED = replace(ON_HOST, sync_each_batch=True)
FOUR_BYTES = 4


def work_of(layout):
    parallel = layout.parallel(SMALL, TRAINING)
    shape = layout.shape(TRAINING, parallel)
    return step_work(SMALL, shape, parallel, CLUSTER.per_machine, offload=layout.offload_params), shape, parallel


def test_gradients_leave_whenever_they_are_reduced_and_are_waited_for_where_they_are_added():
    _, shape, parallel = work_of(SUMMED)
    shards = FOUR_BYTES * shard_elements(SMALL, parallel)
    summed = travelling(SMALL, shape, parallel, offload=True)
    assert summed.waited == 3 * shards
    once = travelling(SMALL, replace(shape, sync_each_batch=False), parallel, offload=True)
    assert once == replace(summed, waited=0)
    kept = travelling(SMALL, replace(shape, reshard=False), parallel, offload=True)
    assert (kept.forward, kept.backward, kept.waited) == (shards, shards, 3 * shards)
    assert travelling(SMALL, shape, parallel, offload=False).waited == 0


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("reshard", [True, False])
def test_shards_come_for_each_gather_of_fsdp2_and_gradients_leave_once(reshard, by_layer):
    """What ranks receive of weights, in bfloat16, is three times their own shards, in float32 twice as large."""
    beside = replace(ON_HOST.beside, by_layer=by_layer)
    work, _, parallel = work_of(replace(ON_HOST, reshard=reshard, beside=beside))
    gathered = {"forward": 0, "backward": 0}
    for each in (moved.transfer for moved in work.moved):
        if each.site in (LAYERS, OUTSIDE) and each.what == "W":
            gathered[each.phase] += each.received * each.times
    shards = FOUR_BYTES * shard_elements(SMALL, parallel)
    assert work.host.forward == pytest.approx(gathered["forward"] / 3 * 2)
    assert work.host.backward - shards == pytest.approx(gathered["backward"] / 3 * 2)
    assert (gathered["backward"] > 0) == (reshard and by_layer)


def test_nothing_hides_a_reduction_that_is_waited_for():
    def hidden(layout):
        calls = {"compute": 0, "": 0}
        for each in work_of(layout)[0].moved:
            if each.transfer.site in (LAYERS, OUTSIDE) and each.transfer.what == "dW":
                calls[each.hidden] += each.transfer.calls * each.transfer.times
        return calls

    units = SMALL.num_layers + 1
    assert hidden(SUMMED) == {"compute": units, "": 3 * units}
    assert hidden(replace(SUMMED, offload_params=False)) == {"compute": 4 * units, "": 0}
    assert hidden(ON_HOST) == {"compute": units, "": 0}


def test_the_device_waits_for_copies_and_sums_of_all_micro_batches_but_the_first():
    once, summed = (judge(SMALL, layout, CLUSTER, TRAINING).time for layout in (ON_HOST, SUMMED))
    waited, profile = work_of(SUMMED)[0].host.waited, CLUSTER.profile
    rate = min(profile.host_bandwidth, profile.host_memory_bandwidth)
    assert summed.host - once.host == pytest.approx(waited / rate + 3 * waited / profile.host_memory_bandwidth)
    assert summed.communication > once.communication
