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

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tessera.core.arrays import larger, rounded_up, smaller, where
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.layer_walk import Walk, layer_backward, layer_forward, norm_backward
from tessera.plan.product_walk import Early, ProductSizes, sizes_of
from tessera.plan.step_sizes import StepSizes
from tessera.plan.tiles import largest_tile, tiled
from tessera.plan.update import ADAMW, Update

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


class _Step(StepSizes):
    """The walk through one rank's step."""

    def walk(self, in_tiles: bool) -> Peak:
        """The whole step."""
        last = len(self.layers) - 1
        latest = {kind: index for index, kind in enumerate(self.layers)}.values()
        places = {*latest, *(self.layers.index(kind) for kind in self.layers)}
        places |= {min(1, last), max(0, last - 1)}  # between them FSDP2 sums one layer's and gathers another's
        self.first()
        for index in latest:
            self.forward(index, in_tiles)
        self.loss()
        self.backward(places, in_tiles)
        if self.parallel.fsdp is not None and not self.shape.reshard and np.any(self.repeats):
            self.before_last = True
            self.backward(places, in_tiles)
            self.before_last = False
        self.update()
        most = {kind: size if isinstance(size, np.ndarray) else int(size) for kind, size in self.ledger.most.items()}
        return Peak(**most, moment=self.ledger.moment)

    def backward(self, places: Collection[int], in_tiles: bool) -> None:
        """The backward of one micro-batch, of its layers those at `places`."""
        for index in sorted(places, reverse=True):
            self.layer(index, in_tiles)
        self.embedding()
        self.sums()

    def begin(self, phase: str, done: int, activations: Any, gathered: Any, outside: Any = 1, working: Any = 0) -> None:
        """Go to a place where so many layers' gradients are there."""
        held = {
            "states": self.fixed + self.gradients(done, outside),
            "activations": activations,
            "gathered": gathered,
            "working": working + self.accumulated(done),
        }
        there = self.repeats if self.before_last else 1  # of candidates some have no micro-batch before the last
        self.ledger.begin(phase, **{kind: size * there for kind, size in held.items()})

    def forward(self, index: int, in_tiles: bool) -> None:
        """The forward of one layer, where it does not run again: beside what is saved all that goes at its end."""
        if self.shape.recompute:
            return
        parallel, shape, gathered = self.parallel, self.shape, 0
        if parallel.fsdp is not None:  # of a layer that has just come its buffer too
            there = self.layers[index if shape.reshard else 0 : index + 1] if shape.by_layer else self.layers
            came = where(self.stored_over > 1, 1, 0) * (1 if shape.reshard else 1 - self.repeats) * shape.by_layer
            gathered = self.units[-1] + self.of(self.units, there) + self.units[self.layers[index]] * came
        self.begin(f"forward of layer {index}", 0, self.saved_until(index), gathered * self.element, outside=0)
        layer_forward(Walk(self.ledger, shape, parallel, self.several, in_tiles), self.anatomy.layers[index])

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
        ledger.hold(self.head_waits + head.s)
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
        ledger.hold(self.head_waits)
        if parallel.fsdp is not None:
            self._fsdp_gradients(index)
        following = self._following(index).early if self._early else Early()
        layer_backward(Walk(ledger, shape, parallel, self.several, in_tiles, self.streams), layer, following)
        if parallel.fsdp is not None and shape.by_layer and self.sums_now:
            self._fsdp_sum(self.units[kind], index)

    def _following(self, index: int) -> ProductSizes:
        layer = self.anatomy.layers[max(0, index - 1)]
        product = layer[0].column if self.shape.recompute else layer[1].row
        return sizes_of(product, self.shape, self.parallel)

    def _fsdp_gradients(self, index: int) -> None:
        """What waits while a layer runs: gradients that the layer after hands over to be summed, or of all layers."""
        if not self.shape.by_layer:
            done = sum(self.units[kind] for kind in self.layers[index + 1 :])
            self.ledger.hold(done * self.element * (1 - self.adds_at_once))
        elif index + 1 < len(self.layers) and self.sums_now:
            self.ledger.hold(self.units[self.layers[index + 1]] * self.stored)

    def _fsdp_sum(self, unit: Any, index: int) -> None:
        """FSDP2 sums a unit's gradients: they are copied into one piece in the parameters' dtype, whose sum is kept."""
        ledger = self.ledger
        if index + 1 < len(self.layers):
            ledger.drop(self.units[self.layers[index + 1]] * self.stored)
        ledger.drop(unit * self.element * (not self.before_last), "gathered")
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
        waiting = self.head_waits
        if served and by_layer and self.sums_now:
            waiting = waiting + self.units[self.layers[0]] * self.stored
        if served and not by_layer:
            layers = sum(self.units[kind] for kind in self.layers) * self.element
            whole, waiting, every = whole + layers, waiting + layers * (1 - self.adds_at_once), 0
        if served and self.before_last:
            whole = self.gathered(0)
        self.begin("backward of the embedding", every, 0, whole, working=head.s + waiting)
        # of learned positions first, summed in their own dtype; of FSDP2 handed over in that of compute
        positions = ledger.hold(self.positions * self.stored)
        if served:
            ledger.touch(self.positions * self.element * (self.element != self.stored))
            ledger.drop(positions)
            ledger.hold(self.positions * self.element * (1 - self.adds_at_once))
        else:
            ledger.drop(positions * self.several)
        came = head.s + ledger.hold(head.whole_r * head.r_moves)
        if self.mesh.present(("col",)):  # of tokens whose words lie elsewhere it is 0
            ledger.hold(head.whole_r)
            ledger.drop(came)
            came = head.whole_r
        if self.element != self.stored:
            wide = ledger.hold(head.whole_r // self.element * self.stored)
            ledger.drop(came)
            came = wide
        whole_gradient = ledger.hold(table * self.stored)
        ledger.drop(came)
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

    def first(self) -> None:
        """The forward's begin: FSDP2 has gathered what is in no layer, and holds its buffer until the first layer's."""
        if self.parallel.fsdp is None:
            return
        moves, done = where(self.stored_over > 1, 1, 0), 0
        if not self.shape.reshard:
            moves = moves * (1 - self.repeats)
        outside = self.units[-1]
        if not self.shape.by_layer:
            outside = outside + sum(self.units[kind] for kind in self.layers)
        self.begin("begin of the forward", done, 0, outside * (1 + moves) * self.element, outside=0)
        table = self.head.rows * self.head_shard
        cast = self.element != self.stored
        self.ledger.touch(table * self.stored * (cast or self.head.w_moves))
        self.ledger.touch(self.positions * self.stored * cast)
        if self.shape.by_layer:
            self.ledger.touch(self.units[self.layers[0]] * (1 + moves) * self.element, "gathered")

    def sums(self) -> None:
        """FSDP2's sum of the gradients of what is in no layer, or of all."""
        if self.parallel.fsdp is None or not self.sums_now:
            return
        every, unit = len(self.layers), self.units[-1]
        if not self.shape.by_layer:
            unit = unit + sum(self.units[kind] for kind in self.layers)
            every = 0
        kept = self.gathered(0) - self.units[-1] * self.element if self.before_last and self.shape.by_layer else 0
        self.begin("sum of gradients", every, 0, kept)
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
