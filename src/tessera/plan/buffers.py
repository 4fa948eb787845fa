"""GPU memory that NCCL takes for a rank's communicators, outside torch's allocator: by published figures.

Nothing here was measured by us. A connection between two GPUs has a buffer for each of NCCL's protocols: 4 MiB for
Simple (NCCL_BUFFSIZE), 4.7 for LL128 and 0.5 for LL (computeBuffSizes of its init.cc), which is 10 MiB in pages of 2
MiB, and a page for the sender (issue 1685 of NVIDIA/nccl). Every channel of a communicator has connections of its own
for its ring and its tree:

    collectives       channels · (1 ring + 1 tree, or 1½ of more than two ranks) · 12 MiB
    sends, receives   peers on the machine · channels of each · 14 MiB; those of other machines share one buffer

                                                   published                      here
    group of 2 A100, NVLink, after an all-reduce   544 MB (issue 964)             576 MiB
    group of 3 or 4                                688 MB (issue 964)             720 MiB
    8 H100, what the first all-to-all adds         3.28 GB, 32 channels (1685)    3,136 MiB

Where links are no faster than PCIe there are 4 channels and 2 for each peer, as logs of such machines say (issues 1706
and 1189). What NVLink SHARP takes beside is not known and not counted. RCCL, of the same design, is taken to be alike.
"""

from collections.abc import Iterable
from typing import Any

from tessera.core.arrays import larger, smaller, where
from tessera.core.mesh import Mesh
from tessera.plan.machine import Profile
from tessera.plan.traffic import Transfer
from tessera.plan.work import machines_of

CHANNELS, PEER_CHANNELS = 24, 32
"""Over NVLink."""
PCIE_CHANNELS, PCIE_PEER_CHANNELS = 4, 2
NVLINK = 1e11
"""Bytes/s of a gather above which links are no PCIe."""
CONNECTION, PEER_CONNECTION = 12 * 2**20, 14 * 2**20
"""Bytes of a channel's connection for collectives, and for sends and receives."""
PEERS = ("all_to_all", "receive", "send")
"""Kinds by which a rank meets every other of its group, not neighbours alone."""


def library_bytes(transfers: Iterable[Transfer], mesh: Mesh, profile: Profile, per_machine: int) -> Any:
    """Bytes on a rank for all groups along which a step's `transfers` go; 0 on CPUs. `mesh` may be of many layouts."""
    if not profile.asynchronous:
        return 0
    fast = profile.curve("inside", "all_gather").bytes_per_second >= NVLINK
    channels, of_peer = (CHANNELS, PEER_CHANNELS) if fast else (PCIE_CHANNELS, PCIE_PEER_CHANNELS)
    used: dict[tuple[str, ...], dict[str, Any]] = {}
    for transfer in transfers:
        way = "peers" if transfer.kind in PEERS else "neighbour" if transfer.kind == "shift" else "collectives"
        ways = used.setdefault(transfer.axes, {"collectives": False, "neighbour": False, "peers": False})
        ways[way] = ways[way] | (transfer.received > 0)  # of many layouts some move nothing here
    total: Any = 0
    for place, (axes, ways) in enumerate(used.items()):
        for other, counted in list(used.items())[:place]:  # of many layouts some lack the axis that they differ by
            same = mesh.size(set(axes) ^ set(other)) == 1
            ways = {way: where(same & counted[way], False, uses) for way, uses in ways.items()}
        ranks = mesh.size(axes)
        beside = larger(ranks // machines_of(axes, mesh, per_machine) - 1, 0)
        peers = where(ways["peers"], beside, where(ways["neighbour"], smaller(beside, 1), 0))
        halves = where(
            ways["collectives"], where(ranks > 2, 5, where(ranks > 1, 4, 0)), 0
        )  # connections of a channel, twice
        total = total + halves * channels * CONNECTION // 2 + peers * of_peer * PEER_CONNECTION
    return total
