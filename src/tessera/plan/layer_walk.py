"""What is alive while a layer runs backward, and before that forward once more where it is computed again.

What a layer saved goes as its backward comes to it, in the reverse order of the forward; what it makes meanwhile are
the gradients of its activations and of its weights, and what products, attention and norms hold while they run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tessera.core.arrays import where
from tessera.data.batch import Stream
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention, Block, Layer, Norm
from tessera.plan.attention_walk import attention_backward
from tessera.plan.ledger import Ledger
from tessera.plan.memory import BlockSaved, result_bytes, saved_by_block
from tessera.plan.product_walk import Early, ProductSizes, backward, forward, sizes_of
from tessera.plan.scores_walk import explicit_forward
from tessera.plan.tiles import largest_tile


@dataclass(frozen=True)
class Walk:
    """One layer's walk: what the step needs to say of it beside the sizes that follow from the layout.

    `accumulates`: gradients of an earlier micro-batch are there, 0 or 1; `tiled`: whether its MLP goes in tiles;
    `streams`: where ranks share sequences, of each micro-batch the stream of which this rank has a part.
    """

    ledger: Ledger
    shape: StepShape
    parallel: Parallel
    accumulates: Any
    tiled: bool
    streams: Sequence[Stream] = ()

    @property
    def wide(self) -> int:
        """Bytes of an element that norms, softmax and sums compute in."""
        return torch.promote_types(self.parallel.compute, torch.float32).itemsize

    @property
    def widening(self) -> float:
        """How much larger a tensor is in that dtype."""
        return self.wide // self.parallel.compute.itemsize

    @property
    def holding(self) -> int:
        """How much larger a weight's gradient is in the parameters' dtype than in the compute dtype."""
        return self.parallel.dtype.itemsize // self.parallel.compute.itemsize

    @property
    def early(self) -> bool:
        """Whether weights come a product early."""
        schedule = self.parallel.schedule
        return schedule.prefetch and not schedule.in_panels

    @property
    def late(self) -> bool:
        """Whether the sum of a weight's gradient is waited for a product late."""
        schedule = self.parallel.schedule
        return schedule.defer and not schedule.in_panels


def layer_backward(walk: Walk, layer: Layer, following: Early) -> None:
    """The layer's own walk. The gradient of its result is held as working, as is then that of its input.

    What it saved is held as activations: where it runs again its input, and attention's result if that is kept, else
    all. `following`: bytes of the weights that the product after its last one gathers early.
    """
    ledger, shape, parallel = walk.ledger, walk.shape, walk.parallel
    saved = [saved_by_block(block, shape, parallel, tiled=walk.tiled) for block in layer]
    products = [[sizes_of(product, shape, parallel) for product in block.products] for block in layer]
    in_order = [p for block in products for p in block]
    if shape.recompute:
        _forward(walk, layer, saved, products)
    s = in_order[0].s
    before = [p.early if walk.early else Early() for p in in_order]
    for number in reversed(range(len(layer))):
        block, held, (column, row) = layer[number], saved[number], products[number]
        if block.attention is None and walk.tiled:
            _tiles_backward(walk, block, held, column, row)
        else:
            _block_backward(walk, block, held, (column, row), number, before, following)
        ledger.drop(held.column_input + held.column_weights, "activations")
        norm_backward(ledger, block.norm, s, walk.widening)
        ledger.drop(held.stream + held.statistics, "activations")
        ledger.drop(s)  # added to what has gone past it


def _block_backward(
    walk: Walk,
    block: Block,
    held: BlockSaved,
    products: tuple[ProductSizes, ProductSizes],
    number: int,
    before: list[Early],
    following: Early,
) -> None:
    ledger, parallel, (column, row) = walk.ledger, walk.parallel, products
    place = 2 * number  # of the column-parallel product among the layer's
    late = [column.late * walk.late if place + 2 < len(before) else 0, row.late * walk.late]
    backward(ledger, row, parallel, before[place], late[0])
    gradients(walk, row)
    into_row = row.hidden
    result = held.row_input * (0 if block.attention is None else _is_kept(block.attention, parallel))
    ledger.drop(held.row_input - result + held.row_weights, "activations")
    # meanwhile the weights of the next product are there, and gradients of the last one's are on their way
    early, waiting = before[place].held, row.whole_w * row.w_moves * walk.late
    ledger.hold(waiting)
    ledger.hold(early, "gathered")
    if block.attention is not None:
        attention_backward(ledger, block.attention, held.inside + result, walk.shape, parallel, walk.streams)
        ledger.drop(into_row)
        ledger.hold(column.hidden)
    elif len(column.h) > 1:  # with a gate: silu(gate), dy · up, and the gradient of gate
        ledger.hold(2 * into_row)
        ledger.touch(into_row)
        ledger.drop(into_row)
        ledger.drop(held.inside, "activations")
    else:
        ledger.touch(into_row)
        ledger.drop(held.inside, "activations")
    ledger.drop(waiting)
    ledger.drop(early, "gathered")
    backward(ledger, column, parallel, before[place - 1] if place else following, late[1])
    gradients(walk, column)
    ledger.drop(column.hidden)


def _is_kept(attention: Attention, parallel: Parallel) -> Any:
    """Whether what the row-parallel product saved is what attention saved as its result too, 0 or 1: not a copy of it
    that came along inner or ulysses, and not where nobody needs the result again."""
    if attention.scores or (parallel.schedule.keep and parallel.mesh.present(("inner",))):
        return 0
    return where(parallel.mesh.sizes["ulysses"] > 1, parallel.context.chunks > 1, 1)


def gradients(walk: Walk, p: ProductSizes) -> None:
    """The gradients of a product's weights, which are held in the compute dtype, become those of the parameters."""
    ledger, parallel = walk.ledger, walk.parallel
    whole = p.shards
    if parallel.fsdp is not None:  # which takes them as they are, layer by layer; those of before are added to
        return ledger.drop(whole * walk.accumulates * (walk.holding == 1))
    held = [w * walk.holding for w in p.w]
    if walk.holding > 1:
        ledger.touch(where(walk.accumulates, held[0], sum(held) - whole + p.w[-1]))
    turned = p.column * p.w_moves  # summed over shards that lie across: copied so that it lies as the parameter does
    ledger.touch(where(walk.accumulates, 0, held[-1] * turned))
    ledger.drop(whole)
    ledger.hold(where(walk.accumulates, 0, sum(held)), "states")


def norm_backward(ledger: Ledger, norm: Norm, s: Any, widening: Any) -> None:
    """A norm's backward: the gradient of its result, of `s` bytes, is held and becomes that of its input.

    In the wide dtype RMSNorm has x, dy, their product and dx; LayerNorm x̂, dy, dx, and a product of two of them. In
    that of x no copy is made of x and dy.
    """
    copied = 1 if widening > 1 else 0
    tensors = 3 + copied if norm.centred else 2 + 2 * copied
    ledger.touch((tensors * widening + (copied if not norm.centred else 0)) * s)


def layer_forward(walk: Walk, layer: Layer) -> None:
    """The walk of a layer's first forward; what it saves is held as activations from then on."""
    saved = [saved_by_block(block, walk.shape, walk.parallel, tiled=walk.tiled) for block in layer]
    products = [[sizes_of(product, walk.shape, walk.parallel) for product in block.products] for block in layer]
    walk.ledger.hold(saved[0].stream, "activations")
    _forward(walk, layer, saved, products)


def _forward(walk: Walk, layer: Layer, saved: list[BlockSaved], products: list[list[ProductSizes]]) -> None:
    """What the layer saves comes, but for what is there: its input, and the result of attention that is kept.

    With copies kept a product's input is this rank's shard until it has run, and then what it has gathered.
    """
    ledger, parallel, attended = walk.ledger, walk.parallel, 0
    for number, (block, held, (column, row)) in enumerate(zip(layer, saved, products, strict=True)):
        if number:  # the layer's forward holds what attention gave until it ends
            attended = ledger.hold(column.s)
            ledger.hold(held.stream, "activations")
        ledger.touch(column.s * (2 * walk.widening))
        ledger.hold(held.statistics, "activations")
        if block.attention is None and walk.tiled:
            ledger.hold(held.column_input + held.column_weights, "activations")
            return ledger.drop(attended)
        _product(walk, column, column.s, held.column_input, held.column_weights, row)
        kept = result_bytes(block.attention, walk.shape, parallel) if block.attention is not None else 0
        kept = kept if walk.shape.savers.attention_once else 0
        if block.attention is not None and block.attention.scores:
            explicit_forward(ledger, block.attention, walk.shape, parallel)
        ledger.hold(held.inside - kept, "activations")
        if block.attention is not None:
            ledger.touch(column.hidden + row.hidden)
        following = products[number + 1][0] if number + 1 < len(layer) else row
        _product(walk, row, row.hidden, held.row_input, held.row_weights, following)
    ledger.drop(attended)


def _product(walk: Walk, p: ProductSizes, own: Any, inputs: Any, weights: Any, following: ProductSizes) -> None:
    """A product's forward, `own` being the bytes of its input on this rank; it saves `inputs` and `weights`."""
    ledger, keep = walk.ledger, walk.parallel.schedule.keep
    cast = where(p.w_moves > 0, p.shards * p.cast, weights) if keep else weights
    before = own + cast if keep else inputs + cast
    ledger.hold(before, "activations")
    forward(ledger, p, walk.parallel, following.early if walk.early else Early())
    ledger.drop(before, "activations")
    ledger.hold(inputs + weights, "activations")


def _tiles_backward(walk: Walk, block: Block, held: BlockSaved, column: ProductSizes, row: ProductSizes) -> None:
    """Tile by tile: forward, then backward; weights are gathered once, their gradients summed in float32 or wider."""
    ledger, parallel, wide = walk.ledger, walk.parallel, walk.widening
    panels = parallel.schedule.in_panels
    size, tokens = largest_tile(block, walk.shape, parallel)
    part = _Tile(size, tokens)
    small_column, small_row = part.of(column, panels), part.of(row, panels)
    moves = 0 if panels else 1
    whole = column.whole_w if moves else column.shards
    whole_row = row.whole_w if moves else row.shards
    w = ledger.hold((whole * column.w_moves + whole_row * row.w_moves) * moves, "gathered")
    dx = ledger.hold(column.s)
    sums = ledger.hold((whole + whole_row) * wide)
    found = ledger.hold(whole + whole_row + part.of(column, panels).s)  # what the tile before has found is dropped late
    kept = small_column.whole_r * small_column.r_moves * parallel.schedule.keep
    ledger.hold(kept + small_column.hidden + small_row.hidden, "activations")
    tile = small_row.s
    ledger.hold(tile)
    backward(ledger, small_row, parallel, Early(), 0)
    ledger.drop(small_row.hidden, "activations")
    gates = len(column.h) > 1
    ledger.touch((2 if gates else 0) * small_row.hidden + small_row.hidden)
    ledger.drop(small_row.hidden)
    ledger.drop(small_column.hidden, "activations")
    ledger.hold(small_column.hidden)
    backward(ledger, small_column, parallel, Early(), 0)
    ledger.drop(kept, "activations")
    ledger.drop(found)
    ledger.drop(small_column.hidden + small_column.s + tile)
    ledger.drop(small_column.shards + small_row.shards)
    # in the compute dtype, and reduced
    narrow = ledger.hold((whole + whole_row) if wide > 1 else 0)
    ledger.drop(sums)
    ledger.drop(w, "gathered")
    ledger.drop(narrow)
    ledger.hold(column.shards + row.shards)
    gradients(walk, row)
    gradients(walk, column)
    ledger.drop(dx)
    ledger.hold(column.s)


@dataclass(frozen=True)
class _Tile:
    """The largest tile of so many tokens: `size` of `tokens`."""

    size: Any
    tokens: Any

    def of(self, p: ProductSizes, panels: bool) -> ProductSizes:
        """The sizes of a product of this tile's tokens, whose weights are there unless they come panel by panel."""
        whole = p.w if panels else tuple(w * p.rows for w in p.w)
        return ProductSizes(
            p.column,
            self._part(p.whole_r),
            self._part(p.s),
            whole,
            tuple(self._part(h) for h in p.h),
            p.r_moves,
            p.w_moves if panels else 0,
            p.h_moves,
            p.col,
            p.rows if panels else 1,
            p.inner,
            p.by_features,
            p.cast,
        )

    def _part(self, size: Any) -> Any:
        return size * self.size // self.tokens
