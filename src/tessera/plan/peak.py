"""The most memory that one rank holds in an optimizer step, in closed form: a walk through its last micro-batch.

    states        parameters and the optimizer's moments of the rank's shards, and gradients as far as they are formed
    activations   what a micro-batch's forward saves for its backward, as far as that has not come to it
    gathered      what collectives bring: weights that FSDP2 or the products gather, operands, keys and values of others
    working       all else: gradients of activations and those of weights on their way, copies, sums, a chunk of logits

The walk goes through the places where most may be alive: the begin of the forward, when FSDP2 gathers; the loss, which
holds a chunk of logits, the head's gathered weight and its gradient, while all layers' activations are there; the
backward of each kind of layer, of its last layer and of its first, when all gradients are there; the gradient of the
embedding; FSDP2's sum of the gradients of what is in no layer; the update. What comes and goes there is in
layer_walk.py, product_walk.py and attention_walk.py. Sizes of the mesh and the step may be arrays of candidates that
agree in all switches and in which axes are there (plan/many.py); of these each row is one document.

Not counted: the context of the device's driver (about half a GiB), buffers of NCCL, what the allocator cannot join, and
what libraries take inside one operator.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch

from tessera.core.arrays import larger, rounded_up, smaller, where
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.spec import local_slice
from tessera.models.anatomy import Layer, anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.layer_walk import Walk, layer_backward, norm_backward
from tessera.plan.ledger import Ledger
from tessera.plan.memory import gathered_units, kept_weights, layer_bytes, saved_bytes, staying_bytes
from tessera.plan.product_walk import Early, ProductSizes, sizes_of
from tessera.plan.tiles import largest_tile, tiled
from tessera.plan.update import ADAMW, Update, shard_elements

RESERVED = 2**30
"""Bytes that are left for what is not counted."""


@dataclass(frozen=True)
class Peak:
    """Bytes on one rank, as the table above has them, and where in the step they are alive."""

    states: Any
    activations: Any
    gathered: Any
    working: Any
    moment: str = ""

    @property
    def total(self) -> Any:
        """All of them at once."""
        return self.states + self.activations + self.gathered + self.working


def peak_bytes(
    model: ModelConfig,
    shape: StepShape,
    parallel: Parallel,
    *,
    offload: bool = False,
    update: Update = ADAMW,
) -> Peak:
    """The estimate for the rank of `parallel.mesh`; `offload`: FSDP2 keeps the states on the host."""
    mlp = anatomy_of(model).layers[0][1]
    if shape.savers.mlp_tiles != 1 and tiled(mlp, shape, parallel):
        size, tokens = largest_tile(mlp, shape, parallel)
        in_tiles = _Step(model, shape, parallel, offload, update).walk(True)
        if not isinstance(size < tokens, np.ndarray) or (size < tokens).all():
            return in_tiles
        whole = replace(shape, savers=replace(shape.savers, mlp_tiles=1))
        at_once = _Step(model, whole, parallel, offload, update).walk(False)
        kinds = ("states", "activations", "gathered", "working")
        chosen = {kind: where(size < tokens, getattr(in_tiles, kind), getattr(at_once, kind)) for kind in kinds}
        return Peak(**chosen, moment=in_tiles.moment)
    return _Step(model, shape, parallel, offload, update).walk(False)


class _Step:
    """The sizes of one rank's step, and the walk through it."""

    def __init__(self, model: ModelConfig, shape: StepShape, parallel: Parallel, offload: bool, update: Update) -> None:
        self.model, self.shape, self.parallel, self.anatomy = model, shape, parallel, anatomy_of(model)
        self.mesh, self.ledger = parallel.mesh, Ledger()
        self.element, self.stored = parallel.compute.itemsize, parallel.dtype.itemsize
        self.wide = torch.promote_types(parallel.compute, torch.float32).itemsize
        self.offload, self.optimizer = offload, update
        self.several = where(shape.micro_batches > 1, 1, 0)
        self.head = sizes_of(self.anatomy.head, shape, parallel)
        vocabulary = local_slice(model.vocab_size, ("col",), self.mesh)
        self.vocabulary = vocabulary.stop - vocabulary.start
        units = self.anatomy.units(parallel)
        self.shards = [sum(prod(p.spec.stored_shape(self.mesh)) for p in unit) for unit, _ in units]
        self.layers = [self.anatomy.kinds.index(kind) for kind in self._kinds_in_order()]
        self.units = [size for size, _ in gathered_units(model, parallel)] if parallel.fsdp else []
        self.stored_over = self.mesh.size(parallel.fsdp) if parallel.fsdp else 1

    def _kinds_in_order(self) -> list[tuple[Layer, int]]:
        counts = dict(self.anatomy.kinds)
        return [(layer, counts[layer]) for layer in self.anatomy.layers]

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
            return formed * self.stored if self.shape.by_layer else 0  # else they are summed together at the end
        return where(self.several > 0, every + self.shards[-1], formed + outside * self.head_shard) * self.stored

    @cached_property
    def head_shard(self) -> Any:
        """Elements of the head's weight on this rank."""
        return self.vocabulary * (self.model.hidden_size // self.mesh.sizes["inner"] // self.head.rows)

    def accumulated(self, done: int) -> Any:
        """Bytes of whole gradients that FSDP2 holds, of earlier micro-batches and of what is outside of the layers."""
        if self.parallel.fsdp is None:
            return 0
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
        return [layer_bytes(layer, replace_offload(self.shape), self.parallel) for layer, _ in self.anatomy.kinds]

    @cached_property
    def saved_in_all(self) -> Any:
        """What the forward leaves, without gradients of the loss, the last norm's part, and kept weights."""
        shape = replace_offload(self.shape)
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
            moves = moves * (1 - self.several)
        if not shape.by_layer:
            every = outside + self.of(self.units, self.layers)
            return (every + every * moves * (index == len(self.layers))) * self.element
        if not shape.reshard:
            held = outside + self.of(self.units, self.layers[: index + 1])
            last = self.units[self.layers[-1]] * moves if index == len(self.layers) else 0
            return (held + last) * self.element
        if index == len(self.layers):
            return (outside + self.units[self.layers[-1]] * moves) * self.element
        ahead = self.units[self.layers[index - 1]] * moves if index else 0
        return (outside + self.units[self.layers[index]] + ahead) * self.element

    def walk(self, in_tiles: bool) -> Peak:
        """The whole step."""
        self.first()
        self.loss()
        last = len(self.layers) - 1
        places = {max(i for i in range(last + 1) if self.layers[i] == kind) for kind in set(self.layers)}
        places |= {min(i for i in range(last + 1) if self.layers[i] == kind) for kind in set(self.layers)}
        places |= {min(1, last), max(0, last - 1)}  # between them FSDP2 sums one layer's and gathers another's
        for index in sorted(places, reverse=True):
            self.layer(index, in_tiles)
        self.embedding()
        self.sums()
        self.update()
        most = {kind: size if isinstance(size, np.ndarray) else int(size) for kind, size in self.ledger.most.items()}
        return Peak(**most, moment=self.ledger.moment)

    def begin(self, phase: str, done: int, activations: Any, gathered: Any, outside: Any = 1, working: Any = 0) -> None:
        """Go to a place where so many layers' gradients are there."""
        states = self.fixed + self.gradients(done, outside)
        working = working + self.accumulated(done)
        self.ledger.begin(phase, states=states, activations=activations, gathered=gathered, working=working)

    def loss(self) -> None:
        """The forward of the loss, in which its gradients are formed (nn/loss.py)."""
        ledger, head, shape, parallel = self.ledger, self.head, self.shape, self.parallel
        e, w, inner = self.element, self.wide, self.mesh.sizes["inner"]
        saved = self.saved_in_all
        if shape.savers.offload:
            saved = self.saved_until(len(self.layers))
        ahead = self._first_of_backward().early.held if self._early else 0
        self.begin("loss", 0, saved + head.s, self.gathered(len(self.layers)) + ahead, outside=0)
        cast = self.head_shard * e if e != self.stored and parallel.fsdp is None else 0
        ledger.hold(head.s + cast)  # the head's input, and its weight in the compute dtype
        weight = self.vocabulary * (self.model.hidden_size // inner) * e
        shard = weight // head.rows
        ledger.hold(head.whole_r * head.r_moves + weight * head.w_moves, "gathered")
        ledger.touch(shard * head.w_moves)
        ledger.hold(head.whole_r)  # dX
        rows = shape.tokens_on(self.mesh, parallel.streams.ids)
        tokens = smaller(rows, shape.chunk_tokens * inner)
        many = rounded_up(rows, tokens) > 1
        z = tokens * self.vocabulary * e
        own, wider = z // inner, w // e
        copied = 1 if wider > 1 else 0
        partial, wide_z = where(inner > 1, z, 0), own * wider * copied
        dz = where(inner > 1, z, own * copied)  # in float32 it takes the place of the logits
        whole_dw = weight * where(many, wider, 1)
        # logits summed along inner; in the wide dtype; dz from them, brought together; dW
        first = larger(larger(partial + own, own + wide_z + own * copied + partial), own + dz + weight)
        first = larger(first, own + dz + weight + where(many, whole_dw * copied, 0))
        # of a later chunk too, when logits, dz and dW of those before are there
        later = larger(own + dz + partial + own, own + wide_z + larger(dz, own * copied + partial))
        later = whole_dw + larger(later, own + dz + weight * copied)
        ledger.touch(larger(first, where(many, later, 0)))
        # at the end dX and dW are summed; a chunk's logits and dz are there still
        ledger.hold(own + dz + whole_dw)
        ledger.hold(head.s * head.r_moves)
        narrow = where(many, weight * (wider > 1), 0)
        ledger.touch(narrow + (weight + shard) * head.w_moves)
        self.begin("backward of the last norm", 0, saved + head.s, self.gathered(len(self.layers) - 1) + ahead)
        ledger.hold(self._head_waits + head.s)
        norm_backward(ledger, self.anatomy.norm, head.s, self.wide // e)

    @property
    def _early(self) -> bool:
        return self.parallel.schedule.prefetch and not self.parallel.schedule.in_panels

    def _first_of_backward(self) -> ProductSizes:
        block = self.anatomy.layers[-1][0] if self.shape.recompute else self.anatomy.layers[-1][1]
        product = block.column if self.shape.recompute else block.row
        return sizes_of(product, self.shape, self.parallel)

    def layer(self, index: int, in_tiles: bool) -> None:
        """The backward of one layer."""
        kind, shape, parallel = self.layers[index], self.shape, self.parallel
        layer, done = self.anatomy.layers[index], len(self.layers) - 1 - index
        s = self.head.s
        saved = self.saved_until(index + 1)
        self.begin(f"backward of layer {index}", done, saved, self.gathered(index), working=s)
        ledger = self.ledger
        ledger.hold(self._head_waits)
        if parallel.fsdp is not None:
            self._fsdp_gradients(index)
        following = self._following(index).early if self._early else Early()
        layer_backward(Walk(ledger, shape, parallel, self.several, in_tiles), layer, following)
        if parallel.fsdp is not None and shape.by_layer:
            self._fsdp_sum(self.units[kind], index)

    def _following(self, index: int) -> ProductSizes:
        layer = self.anatomy.layers[max(0, index - 1)]
        product = layer[0].column if self.shape.recompute else layer[1].row
        return sizes_of(product, self.shape, self.parallel)

    @property
    def _adds_at_once(self) -> Any:
        """Whether FSDP2's gradients are added to those of an earlier micro-batch as they come, 0 or 1."""
        return self.several * (self.element == self.stored)

    @property
    def _head_waits(self) -> Any:
        """Bytes of the head's gradient that is not in the parameter's yet: a tied one waits for the embedding's."""
        tied = self.anatomy.tied
        if self.parallel.fsdp is None:
            return self.several * self.head_shard * self.stored * tied
        return self.head_shard * self.element * (1 - self._adds_at_once * (not tied))

    def _fsdp_gradients(self, index: int) -> None:
        """What waits while a layer runs: gradients that the layer after hands over to be summed, or of all layers."""
        if not self.shape.by_layer:
            done = sum(self.units[kind] for kind in self.layers[index + 1 :])
            self.ledger.hold(done * self.element * (1 - self._adds_at_once))
        elif index + 1 < len(self.layers):
            self.ledger.hold(self.units[self.layers[index + 1]] * self.stored)

    def _fsdp_sum(self, unit: Any, index: int) -> None:
        """FSDP2 sums a unit's gradients: they are copied into one piece in the parameters' dtype, whose sum is kept."""
        ledger = self.ledger
        if index + 1 < len(self.layers):
            ledger.drop(self.units[self.layers[index + 1]] * self.stored)
        ledger.drop(unit * self.element, "gathered")
        if self.element != self.stored:  # added to those of earlier micro-batches
            ledger.drop(unit * self.element * self.several)
        ledger.hold(unit * self.stored)
        ledger.drop(where(self.several > 0, unit * self.stored, unit * self.element))  # copied
        ledger.touch(unit // self.stored_over * self.stored)

    def embedding(self) -> None:
        """The gradient of the embedding: of the whole table on this rank, in the parameters' dtype."""
        ledger, head, parallel = self.ledger, self.head, self.parallel
        table, served = head.rows * self.head_shard, parallel.fsdp is not None
        every, by_layer = len(self.layers), self.shape.by_layer
        whole = self.units[-1] * self.element if served else 0
        waiting = self._head_waits + self._positions * (self.element * (1 - self._adds_at_once) if served else 0)
        if served and by_layer:
            waiting = waiting + self.units[self.layers[0]] * self.stored
        if served and not by_layer:
            layers = sum(self.units[kind] for kind in self.layers) * self.element
            whole, waiting, every = whole + layers, waiting + layers * (1 - self._adds_at_once), 0
        self.begin("backward of the embedding", every, 0, whole, working=head.s + waiting)
        if not served:
            ledger.hold(self._positions * self.stored * (1 - self.several), "states")
        came = ledger.hold(head.whole_r * head.r_moves)
        whole_gradient = ledger.hold(table * self.stored)
        ledger.drop(came + head.s)
        # summed along row: turned for it, then this rank's shard, which is turned back
        ledger.touch((table + self.head_shard) * self.stored * head.w_moves)
        ledger.touch(self.head_shard * self.stored * head.w_moves * 2)
        ledger.drop(whole_gradient * head.w_moves)
        ledger.hold(self.head_shard * self.stored * head.w_moves)
        cast = self.element if served else self.stored
        if served and self.element != self.stored:
            ledger.touch(self.head_shard * cast)
        if self.anatomy.tied:  # added to that of the head
            ledger.touch(self.head_shard * cast * (1 if cast == self.stored else 0))

    @property
    def _positions(self) -> Any:
        """Elements of the learned positions on this rank as they are used."""
        if self.anatomy.positions is None:
            return 0
        return self.anatomy.positions * (self.model.hidden_size // self.mesh.size(self.parallel.residual.features))

    def first(self) -> None:
        """The forward's begin: FSDP2 has gathered what is in no layer, and holds its buffer until the first layer's."""
        if self.parallel.fsdp is None:
            return
        moves, done = where(self.stored_over > 1, 1, 0), 0
        if not self.shape.reshard:
            moves = moves * (1 - self.several)
        outside = self.units[-1]
        if not self.shape.by_layer:
            outside = outside + sum(self.units[kind] for kind in self.layers)
        self.begin("begin of the forward", done, 0, outside * (1 + moves) * self.element, outside=0)
        table = self.head.rows * self.head_shard
        cast = self.element != self.stored
        self.ledger.touch(table * self.stored * (cast or self.head.w_moves))
        self.ledger.touch(self._positions * self.stored * cast)
        if self.shape.by_layer:
            self.ledger.touch(self.units[self.layers[0]] * (1 + moves) * self.element, "gathered")

    def sums(self) -> None:
        """FSDP2's sum of the gradients of what is in no layer, or of all."""
        if self.parallel.fsdp is None:
            return
        every, unit = len(self.layers), self.units[-1]
        if not self.shape.by_layer:
            unit = unit + sum(self.units[kind] for kind in self.layers)
            every = 0
        self.begin("sum of gradients", every, 0, 0)
        ledger = self.ledger
        formed = where(self.several > 0, unit * self.stored, unit * self.element)
        ledger.hold(formed * (1 - self.several))
        ledger.hold(unit * self.stored)
        ledger.drop(formed)  # copied
        ledger.hold(unit // self.stored_over * self.stored)

    def update(self) -> None:
        """The update by the optimizer, all gradients there."""
        states = 0 if self.offload else self.fixed + self.parameters
        copies = self.optimizer.copied_bytes(self.model, self.parallel, offload=self.offload)
        self.ledger.begin("update", states=states, working=copies)


def replace_offload(shape: StepShape) -> StepShape:
    """The shape with what layers keep on the device."""
    return replace(shape, savers=replace(shape.savers, offload=False))
