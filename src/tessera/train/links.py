"""Which axes of the mesh lie inside a machine: ranks are numbered so that the fewest bytes pass between machines.

The ranks of a machine follow one another. In the usual order (`mesh.AXES`) the innermost axes, which move most, stay
together. Where tensor axes take more ranks than a machine has, which of them is busiest depends on the sizes: many
tokens make it `col`, large weights `row`.
"""

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tessera.mesh import AXES, Mesh
from tessera.models.config import ModelConfig
from tessera.nn.parameter import Parallel
from tessera.plan.words import step_rows, totals
from tessera.train.preflight import parallel_for, step_shape

if TYPE_CHECKING:
    from tessera.config.schema import TrainConfig


def traffic(config: "TrainConfig", model: ModelConfig, parallel: Parallel) -> dict[str, int]:
    """Bytes that a rank receives along each group of axes (its name) in a step of full-length rows, by formula."""
    received: dict[str, int] = {}
    for (axes, _), (_, count) in totals(step_rows(model, step_shape(config, parallel), parallel)).items():
        received[axes] = received.get(axes, 0) + count
    return received


def in_a_machine(axes: str, mesh: Mesh, here: int) -> bool:
    """Whether the ranks along these axes (their name) are always on one machine, of which each has `here` ranks."""
    outermost = min(mesh.order.index(axis) for axis in axes.split("·"))
    return here % math.prod(mesh.sizes[axis] for axis in mesh.order[outermost:]) == 0


def between_machines(received: Mapping[str, int], mesh: Mesh, here: int) -> int:
    """The bytes of `traffic` that travel along axes which lie on several machines."""
    return sum(count for axes, count in received.items() if not in_a_machine(axes, mesh, here))


def axis_order(config: "TrainConfig", model: ModelConfig, here: int) -> tuple[str, ...]:
    """The axes as ranks are best numbered, outermost first; the usual order where no other is better.

    Where several axes are one group for a gather or a scatter, they keep their order: torch sorts the ranks of a group
    by number, and shards follow one another in mesh order.
    """
    usual = Mesh(config.mesh_sizes, "meta", rank=0)
    parallel = parallel_for(config, usual)
    received, present = traffic(config, model, parallel), usual.present(AXES)
    rows = step_rows(model, step_shape(config, parallel), parallel)
    nested = {row.axes for row in rows if row.kind != "all_reduce"}

    def fits(order: tuple[str, ...]) -> bool:
        return all(list(axes) == sorted(axes, key=order.index) for axes in nested)

    def passing(order: tuple[str, ...]) -> int:
        return between_machines(received, Mesh(config.mesh_sizes, "meta", rank=0, order=order), here)

    rest = tuple(axis for axis in AXES if axis not in present)
    return min(((*rest, *order) for order in itertools.permutations(present) if fits(order)), key=passing)
