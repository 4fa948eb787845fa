"""Links: every pair is measured by ranks that exchange messages, slow ones are named, and a mesh is laid on them."""

import itertools
from dataclasses import replace

import pytest

from distributed.model_cases import LLAMA
from doctor.drivers import driver
from support.pool import pool
from tessera.config.load import make_config
from tessera.core.axes import AXES
from tessera.core.driver import Link, links
from tessera.core.mesh import Mesh
from tessera.doctor.layout import Placed, along_axes, axis_findings, axis_table, gpu_order, rank_table, ring
from tessera.doctor.links import link_findings, pair_table, topology_findings, way
from tessera.doctor.pairs import End, Measured, Pair, measure_pairs
from tessera.train.settings import parallel_for

A100, RTX, BRIDGED = (links(driver(name)) for name in ("a100", "4090", "bridged"))


def pairs_of_ranks(size: int) -> Measured:
    import torch.distributed as dist

    return measure_pairs(Mesh({"shard": dist.get_world_size()}), size)


def test_every_pair_is_measured_and_every_rank_knows():
    found = pool(3, gloo=True).run(pairs_of_ranks, 2**16)
    assert found[0] == found[1] == found[2]
    assert [(pair.first, pair.second) for pair in found[0].pairs] == [(0, 1), (0, 2), (1, 2)]
    assert all(pair.rate > 0 and pair.latency > 0 for pair in found[0].pairs)
    assert len({end.machine for end in found[0].ends}) == 1 and found[0].ends[0].gpu is None


def machine(ranks: int, rate: float, gpus: bool = True, **slow: float) -> Measured:
    """Ranks of one machine that all have this rate, but for pairs such as r0_2=1e9."""
    pairs = [Pair(a, b, slow.get(f"r{a}_{b}", rate), 1e-5) for a, b in itertools.combinations(range(ranks), 2)]
    return Measured([End("node1", rank if gpus else None) for rank in range(ranks)], pairs)


def slow(found) -> dict[str, str]:
    assert all(finding.mend for finding in found if finding.state == "slow")
    return {finding.subject: finding.text for finding in found if finding.state == "slow"}


def test_a_slow_pair_is_named_and_no_other():
    assert slow(link_findings(machine(8, 220e9), A100)) == {}
    found = slow(link_findings(machine(8, 220e9, r2_5=20e9), A100))
    assert found == {"ranks 2 and 5": "20 GB/s, where pairs of its kind have 2.2e+02"}
    assert slow(link_findings(machine(4, 1e9, gpus=False, r0_3=0.2e9), {})).keys() == {"ranks 0 and 3"}


def test_links_that_are_all_slow_are_seen_by_what_they_should_carry():
    assert len(slow(link_findings(machine(8, 20e9), A100))) == 28  # NVLink × 12 at the rate of PCIe
    assert slow(link_findings(machine(4, 20e9), RTX)) == {}
    assert len(slow(link_findings(machine(4, 1e9), RTX))) == 6
    assert slow(link_findings(machine(4, 0.01e9, gpus=False), {})) == {}  # of loopback nothing is expected


def test_kinds_are_compared_among_themselves():
    mixed = machine(4, 20e9, r0_2=90e9, r1_3=90e9)
    found = link_findings(mixed, BRIDGED)
    assert slow(found) == {}
    assert sorted(finding.subject for finding in found) == [
        "NVLink × 4",
        "PCIe through the CPU's host bridge (PHB)",
        "PCIe through the link between CPU sockets (SYS)",
    ]


def test_two_machines_are_joined_by_the_network():
    ends = [End("node1", 0), End("node1", 1), End("node2", 0), End("node2", 1)]
    measured = replace(machine(4, 200e9), ends=ends)
    kinds = [way(pair, measured, A100).kind for pair in measured.pairs]
    assert kinds == ["NVLink", "network", "network", "network", "network", "NVLink"]
    assert way(measured.pairs[0], measured, {}).kind == "GPUs of one machine"


def test_the_table_of_pairs_has_sixteen_ranks():
    table = pair_table(machine(20, 2e9))
    assert len(table.rows) == 17 and "4 ranks more" in table.title
    assert table.rows[2] == ["rank 1", "2", "–", *["2"] * 14]


def test_what_the_driver_says_of_the_links():
    (nvlink,) = topology_findings(A100)
    assert str(nvlink).split(None, 1) == ["ok", "NVLink × 12: 28 pairs of GPUs"]
    assert topology_findings(RTX)[-1].mend.startswith("few bytes between them")
    assert topology_findings({}) == []


# ---- a mesh on the links


def placed(here: int, numbering=AXES, **keys) -> Placed:
    config, _ = make_config({"base_model": "x", "datasets": [{"path": "y"}], "micro_batch_size": 8} | keys)
    mesh = Mesh(config.mesh_sizes, rank=0, numbering=numbering)
    return Placed(config, LLAMA, parallel_for(config, LLAMA, mesh), here)


def test_neighbours_are_those_of_the_mesh():
    for numbering in (AXES, (*(axis for axis in AXES if axis not in ("col", "row")), "col", "row")):
        mesh = Mesh({"shard": 2, "row": 3, "col": 2}, rank=0, numbering=numbering)
        places = [mesh.at(rank).coordinates for rank in range(mesh.world)]
        for axes in (("shard",), ("row",), ("col",), ("shard", "row"), ("row", "col")):
            for rank in range(mesh.world):
                others = [axis for axis in AXES if axis not in axes]
                alike = [r for r in range(12) if all(places[r][axis] == places[rank][axis] for axis in others)]
                alike.sort(key=lambda r: [places[r][axis] for axis in axes])
                before, members, after = ring(mesh, rank, axes)
                assert members == alike
                at = alike.index(rank)
                assert (before, after) == (alike[at - 1], alike[(at + 1) % len(alike)])


def test_which_axis_lies_on_which_link():
    run = placed(4, tensor_parallel_size=2, dp_shard_size=2)
    found = {one.axes: one for one in along_axes(run, BRIDGED, machine(4, 20e9, r0_2=90e9, r1_3=80e9))}
    assert found["col",].links == {"PCIe through the CPU's host bridge (PHB)": 4}
    assert (found["col",].slowest, found["shard",].slowest) == (20e9, 80e9)
    assert found["shard",].links == {"NVLink × 4": 4}
    assert found["col",].received > 0 and along_axes(run, {}, None)[0].slowest is None
    rows = axis_table(list(found.values())).rows
    assert ["shard", "2", "NVLink × 4", "80"] in [row[:4] for row in rows]


def test_an_axis_between_machines():
    run = placed(2, tensor_parallel_size=4)
    (col,) = along_axes(run, {}, None)
    assert col.links == {"in a machine": 1, "between machines": 1}
    ends = [End("node1", 0), End("node2", 0)]
    (col,) = along_axes(run, {}, Measured(ends, [Pair(0, 1, 1e9, 1e-4)]))
    assert col.slowest == 1e9
    told = axis_findings([col], run, {})
    assert told[0].text == "col 4, 2 ranks on each of 2 machines"
    assert slow(told).keys() == {"along col"} and "at most the 2 of a machine" in told[1].mend
    assert slow(axis_findings(along_axes(placed(4, tensor_parallel_size=4), {}, None), run, {})) == {}
    data = placed(2, dp_shard_size=4)  # there is no other way for data axes alone
    assert slow(axis_findings(along_axes(data, {}, None), data, {})) == {}


def test_gpus_in_an_order_that_nvlink_joins():
    assert gpu_order(BRIDGED, 4, 2) == [0, 2, 1, 3]
    assert gpu_order(A100, 8, 4) is None, "they are in order already"
    assert gpu_order(RTX, 4, 2) is None and gpu_order(BRIDGED, 4, 4) is None
    assert gpu_order({(0, 1): Link("NV4"), (2, 3): Link("NV4")}, 4, 2) is None
    run = placed(4, tensor_parallel_size=2, dp_shard_size=2)
    mends = [finding.mend for finding in axis_findings(along_axes(run, BRIDGED, None), run, BRIDGED)]
    assert "CUDA_VISIBLE_DEVICES=0,2,1,3" in mends
    fine = placed(8, tensor_parallel_size=8)
    assert slow(axis_findings(along_axes(fine, A100, None), fine, A100)) == {}


@pytest.mark.parametrize("world", [8, 32])
def test_the_table_of_ranks_is_bounded(world):
    table = rank_table(placed(8, tensor_parallel_size=4, dp_shard_size=world // 4))
    assert len(table.rows) == 1 + min(world, 16)
    assert ("16 ranks more" in table.title) == (world == 32)
    assert table.rows[1][:3] == ["0", "0", "cpu"] and table.rows[6][4] == "4,5,6,7 (4 → 6)"
