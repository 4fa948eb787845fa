"""What lies in host memory, and what travels there and back, where memory savers keep things on the host."""

from dataclasses import dataclass
from math import prod
from typing import Any

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.machine import Profile
from tessera.plan.memory import offloaded_by_layers
from tessera.plan.update import ADAMW, Update, shard_elements

USED = 0.8
"""The share of the host's memory that may be taken: the system, the data and saves need the rest."""


def room_on_host(profile: Profile) -> int:
    """Bytes of a device's part of host memory that may be taken."""
    return int(USED * profile.host_memory_bytes)


def host_bytes(
    model: ModelConfig, shape: StepShape, parallel: Parallel, *, offload: bool = False, update: Update = ADAMW
) -> Any:
    """Bytes of host memory that the rank of `parallel.mesh` fills: what its layers keep, and with `offload` its states.

    Sizes of the mesh and the step may be arrays of candidates.
    """
    kept = offloaded_by_layers(model, shape, parallel) if shape.savers.offload else 0
    if not offload:
        return kept
    return kept + 2 * shard_elements(model, parallel) * parallel.dtype.itemsize + update.moment_bytes(model, parallel)


@dataclass(frozen=True)
class HostTraffic:
    """Bytes between the device and host memory in a step.

    `layers`: what layers keep, which leaves in the forward and comes back in the backward. `forward` and `backward`:
    shards of parameters before FSDP2 gathers them, and of gradients once they are reduced, beside which the device may
    compute. `waited`: gradients for which it waits.
    """

    layers: Any = 0
    forward: Any = 0
    backward: Any = 0
    waited: Any = 0


def travelling(model: ModelConfig, shape: StepShape, parallel: Parallel, offload: bool) -> HostTraffic:
    """What travels in a step of the rank of `parallel.mesh`; `offload`: its states lie in host memory.

    Shards come for each gather: for every forward, and for a layer's backward unless its weights are kept, which holds
    for all micro-batches. Gradients leave when they are reduced. From the second time on the host adds them to those
    that it has, for which FSDP2 waits (foreach_reduce); they go to pageable memory then, which no profile has a rate
    of: the link's is an upper bound.
    """
    kept = offloaded_by_layers(model, shape, parallel) * shape.micro_batches if shape.savers.offload else 0
    if not offload:
        return HostTraffic(kept)
    units = anatomy_of(model).units(parallel)
    sizes = [times * sum(prod(p.spec.stored_shape(parallel.mesh)) for p in unit) for unit, times in units]
    of_layers, shards = (elements * parallel.dtype.itemsize for elements in (sum(sizes[:-1]), sum(sizes)))
    gathers = shape.micro_batches if shape.reshard else 1
    again = gathers * of_layers if shape.reshard and shape.by_layer else 0
    waited = (shape.micro_batches - 1) * shards if shape.sync_each_batch else 0
    return HostTraffic(kept, gathers * shards, again + shards, waited)
