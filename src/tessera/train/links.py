"""How ranks are numbered on several machines: so that the fewest bytes leave a machine.

The ranks of a machine follow one another. In the usual order (`AXES`) the innermost axes, which move most, stay
together. Where tensor axes take more ranks than a machine has, which of them is busiest depends on the sizes: many
tokens make it `col` and `inner`, large weights `row`.
"""

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from tessera.config.schema import TrainConfig
from tessera.core.axes import AXES
from tessera.core.collectives import gathered
from tessera.core.mesh import Mesh
from tessera.models.config import ModelConfig
from tessera.plan.traffic import Transfer, step_transfers
from tessera.train.settings import parallel_for, step_shape

Axes = tuple[str, ...]


def run_mesh(config: TrainConfig, model: ModelConfig, device: torch.device, compute: torch.dtype) -> Mesh:
    """The mesh of a run; on several machines that are alike its ranks are numbered for them. Every rank calls it."""
    mesh = Mesh(config.mesh_sizes, device)
    here, *others = gathered(int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world)), mesh.world)
    if here == mesh.world or any(other != here for other in others):
        return mesh
    return Mesh(config.mesh_sizes, device, numbering=best_numbering(config, model, here, compute))


def traffic(transfers: Sequence[Transfer]) -> dict[Axes, int]:
    """Bytes that a rank receives along each group of axes in a step, the busiest first."""
    received: dict[Axes, int] = {}
    for transfer in transfers:
        received[transfer.axes] = received.get(transfer.axes, 0) + transfer.times * transfer.received
    return dict(sorted(received.items(), key=lambda item: -item[1]))


def groups_that_leave(axes: Axes, mesh: Mesh, here: int) -> int:
    """Of the groups along `axes` that have ranks among the first `here`, a machine's: those that have others too."""
    places = (mesh.at(rank).coordinates for rank in range(here))
    members = Counter(tuple(place[axis] for axis in AXES if axis not in axes) for place in places)
    return sum(count < mesh.size(axes) for count in members.values())


def leaving(received: Mapping[Axes, int], mesh: Mesh, here: int) -> int:
    """Bytes that a machine of `here` ranks sends to others in a step.

    Each group is a ring in the order of its ranks, so what a rank receives leaves the machine once, however many of the
    group's ranks are on it.
    """
    return sum(count * groups_that_leave(axes, mesh, here) for axes, count in received.items())


def best_numbering(config: TrainConfig, model: ModelConfig, here: int, compute: torch.dtype) -> Axes:
    """The axes in the order in which ranks are best numbered, outermost first; the usual one unless another is better.

    By the closed form for a step of full-length rows, `auto` counted as gather. Where several axes are one group for a
    gather or a scatter, they keep their order: torch sorts the ranks of a group by number, and shards follow one
    another in the order of `AXES`.
    """
    usual = Mesh(config.mesh_sizes, "meta", rank=0)
    parallel = parallel_for(config, model, usual, compute=compute)
    transfers = step_transfers(model, step_shape(config, parallel), parallel)
    received, nested = traffic(transfers), {each.axes for each in transfers if each.kind != "all_reduce"}
    present = usual.present(AXES)
    single = tuple(axis for axis in AXES if axis not in present)

    def fits(order: Axes) -> bool:
        return all(list(axes) == sorted(axes, key=order.index) for axes in nested)

    def cost(order: Axes) -> int:
        return leaving(received, Mesh(config.mesh_sizes, "meta", rank=0, numbering=single + order), here)

    best = min(filter(fits, itertools.permutations(present)), key=cost)  # of equal ones the first: the usual
    return AXES if best == present else single + best
