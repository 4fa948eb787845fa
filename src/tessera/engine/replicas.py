"""Copies of a weight on several ranks are the same, bit for bit: a cheap hash of each tells when they are not.

What makes copies differ is a fault: a rank that missed an update, memory that lost a bit, a sum that one rank did not
get. Nothing else would show it, as every rank goes on with its own.
"""

from collections import Counter

import torch
from torch import Tensor, nn

from tessera.core.axes import AXES
from tessera.core.collectives import all_gather
from tessera.core.mesh import Mesh
from tessera.nn.parameter import named_specs, to_local

_AS_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@torch.no_grad()
def drifted(model: nn.Module, mesh: Mesh) -> list[str]:
    """A line for each parameter of which some ranks hold another copy than others, naming them; the same on each rank.

    Costs one pass over the weights and one all-gather of 8 bytes for each parameter.
    """
    parameters = list(named_specs(model))
    own = torch.stack([_hash(to_local(parameter)) for _, parameter, _ in parameters]).to(mesh.device)
    within = [axis for axis in AXES if axis != "pp"]  # other stages hold other layers
    hashes = all_gather(own.unsqueeze(0), 0, mesh.group(within)).tolist()
    everyone = {rank: mesh.at(rank).coordinates for rank in range(mesh.world)}
    places = {rank: place for rank, place in everyone.items() if place["pp"] == mesh.coordinates["pp"]}
    by_rank = dict(zip(places, hashes, strict=True))
    lines = []
    for index, (name, _, spec) in enumerate(parameters):
        cut = [axis for axis in AXES if axis in spec.cut_axes]
        copies: dict[tuple[int, ...], list[int]] = {}
        for rank, place in places.items():
            copies.setdefault(tuple(place[axis] for axis in cut), []).append(rank)
        for ranks in copies.values():
            found = Counter(by_rank[rank][index] for rank in ranks)
            (usual, count), *others = found.most_common()
            odd = [str(rank) for rank in ranks if by_rank[rank][index] != usual]
            same = [str(rank) for rank in ranks if by_rank[rank][index] == usual]
            if others and count == others[0][1]:
                lines.append(f"{name}: ranks {', '.join(map(str, ranks))} hold different copies of the same part")
            elif others:
                lines.append(f"{name}: rank {', '.join(odd)} holds another copy than rank {', '.join(same)}")
    return lines


def _hash(shard: Tensor) -> Tensor:
    """The sum of the bits as integers: any one difference changes it. No copy is made."""
    return shard.contiguous().view(_AS_INTEGERS[shard.element_size()]).sum(dtype=torch.int64)
