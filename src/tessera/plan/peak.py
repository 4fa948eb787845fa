"""The most memory that one rank holds in a step, in closed form: an estimate for people who plan.

    states        parameters, gradients and AdamW's two moments of the rank's shards; on the host with offload
    activations   what a micro-batch's forward saves
    gathered      weights that FSDP2 keeps after the forward (embedding, head and last norm, and layers that are not cut
                  again), and the gradient of the former
    working       the larger one of what a layer's backward holds and of what the loss does. A layer: of FSDP2 the
                  weights of two, unless they are all kept, and the gradient of one; what a product brings together
                  (plan/scratch.py); half of what the layer saves, as gradients, and with gradient checkpointing all of
                  that, computed again. The loss: its input along col and the gradient of that, W and dW, a chunk of
                  logits, that in float32, and its gradient

Not counted: the CUDA context (about half a GiB), NCCL's buffers, what the allocator cannot join, and keys and values
that ranks which share sequences receive.
"""

from dataclasses import dataclass, replace

import torch

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.plan.memory import gathered_units, kept_weights, saved_bytes, state_bytes
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
    one, on_device = replace(model, num_layers=1), replace(shape, savers=replace(shape.savers, offload=False))
    whole, bare = (saved_bytes(one, replace(on_device, recompute=again), parallel) for again in (False, True))
    of_layer = max(0, whole - bare)
    # gradients, and what is computed again
    beside = of_layer // 2 + (of_layer if shape.recompute else 0)
    running = scratch_bytes(model, shape.tokens, parallel, recompute=True) + beside
    states, kept, gradient = state_bytes(model, parallel), kept_weights(model, shape, parallel), 0
    if parallel.fsdp is not None:
        states = 0 if offload else states
        *layers, (outside, _) = gathered_units(model, parallel)
        largest, every = max(size for size, _ in layers), sum(size * times for size, times in layers)
        resharded = shape.reshard and shape.by_layer
        running += min(every, 2 * largest) * parallel.compute.itemsize if resharded else 0
        running += (largest if shape.by_layer else every) * parallel.dtype.itemsize
        gradient = outside * parallel.dtype.itemsize
    saved = saved_bytes(model, shape, parallel) - kept
    return Peak(states, saved, kept + gradient, max(running, _loss(model, shape, parallel)))


def _loss(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What the fused head and loss hold."""
    mesh, element, inner = parallel.mesh, parallel.compute.itemsize, parallel.mesh.sizes["inner"]
    wide = torch.promote_types(parallel.compute, torch.float32).itemsize
    rows = shape.tokens_on(mesh, parallel.streams.ids)
    stream = 2 * rows * (model.hidden_size // inner) * element
    vocabulary = -(-model.vocab_size // mesh.sizes["col"])
    # under FSDP2 W and dW are among what it has gathered
    weights = 0 if parallel.fsdp is not None else 2 * vocabulary * (model.hidden_size // inner) * element
    chunk = min(rows, shape.chunk_tokens * inner) * vocabulary
    logits = chunk * element + chunk // inner * (wide if element == wide else 2 * wide)
    return stream + weights + logits
