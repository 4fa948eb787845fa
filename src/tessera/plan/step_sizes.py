"""What a rank holds at one place or another of its step, in bytes: states, activations, weights that FSDP2 gathers.

The walk through the step (peak.py) goes from place to place and asks here how much has been there since before.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from tessera.core.arrays import where
from tessera.data.batch import Stream
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.spec import local_slice
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.nn.context.cut import streams_of
from tessera.plan.ledger import Ledger
from tessera.plan.many import ManyMeshes
from tessera.plan.memory import gathered_units, kept_weights, layer_bytes, saved_bytes, staying_bytes
from tessera.plan.product_walk import sizes_of
from tessera.plan.update import Update, shard_elements


class StepSizes:
    """Of the step of a rank, as the arguments of `plan.peak.peak_bytes` name it.

    They are those of its last micro-batch, or of the one before, where `before_last` is set: there FSDP2 keeps the
    weights that are not resharded, however far the backward is.
    """

    def __init__(self, model: ModelConfig, shape: StepShape, parallel: Parallel, offload: bool, update: Update) -> None:
        self.model, self.shape, self.parallel, self.anatomy = model, shape, parallel, anatomy_of(model)
        self.mesh, self.ledger = parallel.mesh, Ledger()
        self.element, self.stored = parallel.compute.itemsize, parallel.dtype.itemsize
        self.wide = torch.promote_types(parallel.compute, torch.float32).itemsize
        self.offload, self.optimizer = offload, update
        self.repeats, self.before_last = where(shape.micro_batches > 1, 1, 0), False
        self.summed = parallel.fsdp is not None and shape.sync_each_batch
        self.head = sizes_of(self.anatomy.head, shape, parallel)
        vocabulary = local_slice(model.vocab_size, ("col",), self.mesh)
        self.vocabulary = vocabulary.stop - vocabulary.start
        units = self.anatomy.units(parallel)
        self.shards = [sum(prod(p.spec.stored_shape(self.mesh)) for p in unit) for unit, _ in units]
        self.layers = self.anatomy.kind_numbers
        self.units = [size for size, _ in gathered_units(model, parallel)] if parallel.fsdp else []
        self.stored_over = self.mesh.size(parallel.fsdp) if parallel.fsdp else 1

    @property
    def follows(self) -> Any:
        """Whether a micro-batch came before this one, 0 or 1."""
        return where(self.shape.micro_batches > 2, 1, 0) if self.before_last else self.repeats

    @property
    def several(self) -> Any:
        """Whether its whole gradients are there, 0 or 1: FSDP2's are not when it sums those of each micro-batch."""
        return 0 if self.summed else self.follows

    @property
    def sums_now(self) -> bool:
        """Whether FSDP2 sums gradients in this micro-batch."""
        return self.summed or not self.before_last

    def of(self, sizes: Sequence[Any], layers: Sequence[int]) -> Any:
        """The sum of a size of each of `layers`, which are numbers of kinds."""
        return sum(times * sizes[kind] for kind, times in Counter(layers).items())

    @cached_property
    def fixed(self) -> Any:
        """Bytes of parameters and moments on the device."""
        return 0 if self.offload else self.parameters + self.optimizer.moment_bytes(self.model, self.parallel)

    @cached_property
    def parameters(self) -> Any:
        """Bytes of this rank's shards."""
        return shard_elements(self.model, self.parallel) * self.stored

    def gradients(self, done: int, outside: Any = 1) -> Any:
        """Bytes of gradients when so many layers' backward is over, and that of a share of what is outside of them."""
        if self.offload:
            return 0
        formed = self.of(self.shards, self.layers[len(self.layers) - done :])
        every = self.of(self.shards, self.layers)
        if self.parallel.fsdp is not None:
            if self.summed:
                return where(self.follows > 0, every + self.shards[-1], formed * self.shape.by_layer) * self.stored
            # without layers they are summed together at the end
            return formed * self.stored if self.shape.by_layer and self.sums_now else 0
        return where(self.several > 0, every + self.shards[-1], formed + outside * self.head_shard) * self.stored

    @cached_property
    def streams(self) -> list[Stream]:
        """Of each micro-batch the stream of which this rank has a part, where ranks share sequences; none of arrays."""
        mesh, parallel = self.mesh, self.parallel
        if isinstance(mesh, ManyMeshes) or not parallel.cuts_sequences:
            return []
        cut = (
            streams_of(starts, self.shape.tokens, parallel, self.model.windows)
            for starts in dict.fromkeys(self.shape.document_starts)
        )
        place = mesh.index(parallel.attention.tokens)
        return [streams[place if len(streams) > 1 else 0] for streams in cut]

    @cached_property
    def head_shard(self) -> Any:
        """Elements of the head's weight on this rank."""
        return self.vocabulary * (self.model.hidden_size // self.mesh.sizes["inner"] // self.head.rows)

    def accumulated(self, done: int) -> Any:
        """Bytes of whole gradients that FSDP2 holds, of earlier micro-batches and of what is outside of the layers."""
        if self.parallel.fsdp is None or self.summed:
            return 0
        if self.before_last:
            formed = self.of(self.units, self.layers[len(self.layers) - done :]) * self.shape.by_layer
            every = self.of(self.units, self.layers) + self.units[-1]
            return where(self.several > 0, every, formed) * self.stored
        waiting = self.of(self.units, self.layers[: len(self.layers) - done])
        return self.several * (waiting + self.units[-1]) * self.stored

    def saved_until(self, index: int) -> Any:
        """Bytes that layers before `index` have saved, and what is saved before them."""
        layers = self.layers[max(0, index - 2) : index] if self.shape.savers.offload else self.layers[:index]
        staying = self.of(self.staying, self.layers[: index - len(layers)])
        return self.saved_in_all - self.of(self.kept_on_device, self.layers) + self.of(self.kept, layers) + staying

    @cached_property
    def staying(self) -> list[Any]:
        """Bytes of them that stay on the device where a layer of each kind is offloaded."""
        return [staying_bytes(layer, self.shape, self.parallel) for layer, _ in self.anatomy.kinds]

    @cached_property
    def kept(self) -> list[Any]:
        """Bytes that a layer of each kind saves."""
        return [layer_bytes(layer, self.shape, self.parallel) for layer, _ in self.anatomy.kinds]

    @cached_property
    def kept_on_device(self) -> list[Any]:
        """The same where nothing is offloaded."""
        return [layer_bytes(layer, _on_device(self.shape), self.parallel) for layer, _ in self.anatomy.kinds]

    @cached_property
    def saved_in_all(self) -> Any:
        """What the forward leaves, without gradients of the loss, the last norm's part, and kept weights."""
        shape = _on_device(self.shape)
        every = saved_bytes(self.model, shape, self.parallel) - kept_weights(self.model, shape, self.parallel)
        bias = self.vocabulary if self.model.head_bias else 0
        return every - 2 * self.head.s - (self.head_shard + bias) * self.element

    def gathered(self, index: int) -> Any:
        """Weights that FSDP2 has gathered when the backward of layer `index` begins, with those that come for the next.

        `index` as many as there are layers: in the loss.
        """
        if self.parallel.fsdp is None:
            return 0
        shape, outside, moves = self.shape, self.units[-1], where(self.stored_over > 1, 1, 0)
        if not shape.reshard:  # a later micro-batch finds them
            moves = moves * (1 - self.repeats)
        every = outside + self.of(self.units, self.layers)
        if self.before_last:
            return every * self.element
        if not shape.by_layer:
            return (every + every * moves * (index == len(self.layers))) * self.element
        if not shape.reshard:
            held = outside + self.of(self.units, self.layers[: index + 1])
            last = self.units[self.layers[-1]] * moves if index == len(self.layers) else 0
            return (held + last) * self.element
        if index == len(self.layers):
            return (outside + self.units[self.layers[-1]] * moves) * self.element
        ahead = self.units[self.layers[index - 1]] * moves if index else 0
        return (outside + self.units[self.layers[index]] + ahead) * self.element

    @property
    def adds_at_once(self) -> Any:
        """Whether FSDP2's gradients are added to those of an earlier micro-batch as they come, 0 or 1."""
        return self.several * (self.element == self.stored)

    @property
    def head_waits(self) -> Any:
        """Bytes of the head's gradient that is not in the parameter's yet: a tied one waits for the embedding's."""
        tied = self.anatomy.tied
        if self.parallel.fsdp is None:
            return self.several * self.head_shard * self.stored * tied
        return self.head_shard * self.element * (1 - self.adds_at_once * (not tied))

    @property
    def positions(self) -> Any:
        """Elements of the learned positions on this rank as they are used."""
        if self.anatomy.positions is None:
            return 0
        return self.anatomy.positions * (self.model.hidden_size // self.mesh.size(self.parallel.residual.features))


def _on_device(shape: StepShape) -> StepShape:
    """The shape with what layers keep on the device."""
    return replace(shape, savers=replace(shape.savers, offload=False))
