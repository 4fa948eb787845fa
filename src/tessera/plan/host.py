"""What lies in host memory, and what travels there and back, where memory savers keep things on the host."""

from typing import Any

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
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


def travelling(model: ModelConfig, shape: StepShape, parallel: Parallel, offload: bool) -> tuple[Any, Any]:
    """Bytes between the device and host memory in the forward and in the backward of a step.

    What layers keep leaves and comes back. With `offload` shards come for each gather of FSDP2: for every forward, and
    for a layer's backward unless its weights are kept, which holds for all micro-batches; gradients leave once a step.
    """
    kept = offloaded_by_layers(model, shape, parallel) * shape.micro_batches if shape.savers.offload else 0
    shards = shard_elements(model, parallel) * parallel.dtype.itemsize if offload else 0
    gathers = shape.micro_batches if shape.reshard else 1
    return kept + gathers * shards, kept + (gathers if shape.reshard else 0) * shards + shards
