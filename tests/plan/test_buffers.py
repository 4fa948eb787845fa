"""What the communication library takes for the groups of a step, beside the figures that people have published."""

from dataclasses import replace

import pytest

from tessera.core.mesh import Mesh
from tessera.models.shapes import shape_of
from tessera.plan.buffers import CHANNELS, CONNECTION, library_bytes
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.fit import fits, most_that_fits
from tessera.plan.machine import shipped_profiles
from tessera.plan.recommend import judge
from tessera.plan.traffic import Transfer

A100, RTX4090, CPU = (shipped_profiles()[name] for name in ("A100-80", "RTX4090", "CPU"))


def of_group(kind, ranks, profile=A100, per_machine=8):
    transfer = Transfer("layers", "forward", "X", kind, ("col",), 1, 2**20)
    return library_bytes([transfer, transfer], Mesh({"col": ranks}, rank=0), profile, per_machine)


@pytest.mark.parametrize(
    ("kind", "ranks", "published"),
    [("all_reduce", 2, 544 * 2**20), ("all_reduce", 4, 688 * 2**20), ("all_to_all", 8, 3.28e9)],
)
def test_published_measurements_are_met_within_a_tenth(kind, ranks, published):
    assert 0.98 * published < of_group(kind, ranks) < 1.1 * published


def test_a_group_counts_once_however_often_it_moves():
    both = [Transfer("layers", "forward", "X", kind, ("col",), 1, 1) for kind in ("all_reduce", "all_gather")]
    mesh = Mesh({"shard": 2, "col": 2}, rank=0)
    assert library_bytes(both, mesh, A100, 8) == of_group("all_reduce", 2) == 2 * CHANNELS * CONNECTION
    other = Transfer("layers", "forward", "W", "all_gather", ("shard",), 1, 1)
    assert library_bytes([*both, other], mesh, A100, 8) == 4 * CHANNELS * CONNECTION


def test_peers_of_other_machines_share_a_buffer():
    assert of_group("all_to_all", 16) == of_group("all_to_all", 8)
    assert of_group("all_to_all", 8, per_machine=1) == 0
    assert of_group("shift", 8) == of_group("all_to_all", 2), "one neighbour"


def test_cpus_and_single_ranks_have_none_and_pcie_has_few_channels():
    assert of_group("all_reduce", 8, CPU) == of_group("all_reduce", 1) == of_group("all_to_all", 1) == 0
    assert of_group("all_reduce", 8, RTX4090) == of_group("all_reduce", 8) // 6


def test_a_layout_fits_with_its_buffers_or_not():
    model, training, cluster = shape_of("8B"), Training(2048, 64), cluster_of("8xA100-80")
    judged = judge(model, Layout({"shard": 4, "col": 2}, 1, 16), cluster, training)
    assert judged.buffers == of_group("all_reduce", 2) + 2 * of_group("all_reduce", 4), "col, shard, and all of them"

    def verdict(memory):
        made = replace(cluster, profile=replace(cluster.profile, memory_bytes=memory))
        return judge(model, Layout({"shard": 4, "col": 2}, 1, 16), made, training).verdict

    least = next(m for m in range(2**30, 2**38, 2**26) if most_that_fits(m, judged.buffers) >= judged.peak.total)
    assert (verdict(least), verdict(least - 2**27)) == ("fits", "may fit")
    assert fits(int(judged.peak.total), least - 2**27) == "fits", "without the library it would"
