"""The most memory that one rank holds in a step, in closed form: an estimate for people who plan.

    states        parameters, gradients and AdamW's two moments of the rank's shards; on the host with offload
    activations   what a micro-batch's forward saves
    gathered      weights of FSDP2: embedding, head and last norm, which stay, and of the layers two and the gradient of
                  one; of all of them where they are not cut again after the forward
    working       the larger one of what a layer's backward holds and of what the loss does. A layer: what a product
                  brings together (plan/scratch.py), half of what the layer saves, as gradients, and with gradient
                  checkpointing all of that, computed again. The loss: its input along col and the gradient of that, W
                  and dW, a chunk of logits, that in float32, and its gradient

Not counted: the CUDA context (about half a GiB), NCCL's buffers, what the allocator cannot join, and keys and values
that ranks which share sequences receive.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.memory import saved_bytes, state_bytes
from tessera.plan.scratch import scratch_bytes

RESERVED = 2**30
"""Bytes that are left for what is not counted."""


@dataclass(frozen=True)
class Peak:
    """Bytes on one rank, as the table above has them."""

    states: int
    activations: int
    gathered: int
    working: int

    @property
    def total(self) -> int:
        """All of them at once."""
        return self.states + self.activations + self.gathered + self.working


def peak_bytes(model: ModelConfig, shape: StepShape, parallel: Parallel, *, offload: bool = False) -> Peak:
    """The estimate for the rank of `parallel.mesh`; `offload`: FSDP2 keeps the states on the host."""
    one, kept = replace(model, num_layers=1), replace(shape, savers=replace(shape.savers, offload=False))
    whole = saved_bytes(one, replace(kept, recompute=False), parallel)
    bare = saved_bytes(one, replace(kept, recompute=True), parallel)
    of_layer = max(0, whole - bare)
    # gradients, and what is computed again
    beside = of_layer // 2 + (of_layer if shape.recompute else 0)
    running = scratch_bytes(model, shape.tokens, parallel, recompute=True) + beside
    on_host, saved = offload and parallel.fsdp is not None, saved_bytes(model, shape, parallel)
    states = 0 if on_host else state_bytes(model, parallel)
    return Peak(states, saved, _gathered(model, shape, parallel), max(running, _loss(model, shape, parallel)))


def _gathered(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What FSDP2 has gathered at once."""
    if parallel.fsdp is None:
        return 0
    ranks, anatomy = parallel.mesh.size(parallel.fsdp), anatomy_of(model)
    units = [
        (sum(prod(p.spec.stored_shape(parallel.mesh)) for p in unit) * ranks, times)
        for unit, times in anatomy.units(parallel)
    ]
    *layers, (outside, _) = units
    largest, every = max(size for size, _ in layers), sum(size * times for size, times in layers)
    kept = min(every, 2 * largest) if shape.reshard and shape.by_layer else every
    gradient = largest if shape.by_layer else every
    return (outside + kept) * parallel.compute.itemsize + (outside + gradient) * parallel.dtype.itemsize


def _loss(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What the fused head and loss hold."""
    mesh, element, inner = parallel.mesh, parallel.compute.itemsize, parallel.mesh.sizes["inner"]
    wide = torch.promote_types(parallel.compute, torch.float32).itemsize
    rows = shape.tokens_on(mesh, parallel.streams.ids)
    stream = 2 * rows * (model.hidden_size // inner) * element
    vocabulary = -(-model.vocab_size // mesh.sizes["col"])
    weights = 2 * vocabulary * (model.hidden_size // inner) * element
    chunk = min(rows, shape.chunk_tokens * inner) * vocabulary
    logits = chunk * element + chunk // inner * (wide if element == wide else 2 * wide)
    return stream + weights + logits
