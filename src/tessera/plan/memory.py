"""What one rank holds during an optimizer step, in closed form, and the figures that are counted to compare with.

Parameters, gradients and AdamW's two moments are 4 copies of the rank's shards. What the forward saves for the backward
of one layer, in elements of the compute dtype, with t tokens of the residual stream R on this rank, h features, and q,
kv, f the features of queries, keys, and gate (or up) in the hidden stream H:

    saved by                        elements
    two norms                       2 t h         their inputs: the stream itself, before attention and before the MLP
    two column-parallel products    2 t h         their inputs: what the norms give
    attention                       t (2q + 3kv)  q, k and v, the result; with RoPE k as it was too, beside v
    activation                      3 t f         gate, up, their product; without a gate one less

t h stands for T h / P with sequence parallelism, and t q, t kv, t f for T q / P, T kv / P, T f / P: each rank's shard.
With copies kept, a product saves what it gathered instead of the shards. Beside these: statistics of the norms and of
the softmax, one float32 a token and norm or head.

Where ranks share sequences, T are the tokens of this rank, and attention saves t (2q + 2kv): its own q, k, v and the
result, nothing of what comes from others. Along ulysses kv counts repeated heads, and the result is saved once more, as
it comes back; in groups of heads neither. The rank's part of the ids, targets, positions and documents is kept beside.

A layer that runs again in the backward keeps its input, t h; with attention run once also attention's result, t q, and
statistics, and along ulysses what is traded, t (2q + 2kv). An MLP in tiles keeps its input and its norm's, 2 t h. What
is offloaded is on the device for at most two layers; weights that are copies in the compute dtype stay there.
"""

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import torch

from tessera.core.arrays import larger, smaller, where
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention, Block, Layer, Norm, anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.sequences import kv_heads_on, query_heads_on, traded_kv_heads
from tessera.plan.tiles import tiled
from tessera.plan.traffic import padded_shard


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank. `activations` is what lives from the forward to the backward of one micro-batch; `peak` the
    most that lives at once, all of these and every temporary tensor included."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    @property
    def states(self) -> int:
        """Parameters, gradients and the optimizer's moments."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(model: ModelConfig, parallel: Parallel) -> int:
    """Parameters, gradients and AdamW's two moments of this rank's shards."""
    units = anatomy_of(model).units(parallel)
    elements = sum(times * prod(p.spec.stored_shape(parallel.mesh)) for unit, times in units for p in unit)
    return 4 * elements * parallel.dtype.itemsize


def saved_bytes(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What one micro-batch leaves for its backward on the rank of `parallel.mesh`, when the forward has ended.

    The gradients of the head, formed in the forward, are among it. Without dropout, which saves more, as do slices that
    are kept.
    """
    mesh, element, index, anatomy = parallel.mesh, parallel.compute.itemsize, torch.int64.itemsize, anatomy_of(model)
    t = shape.tokens_on(mesh, parallel.residual.tokens)
    stream = t * model.hidden_size // mesh.size(parallel.residual.features) * element
    statistic = t * _statistic(parallel)
    layers = kept_by_layers(model, shape, parallel)
    if shape.savers.offload:
        moving = (
            layer_bytes(each, shape, parallel) - staying_bytes(each, shape, parallel) for each, _ in anatomy.kinds
        )
        travels = offloaded_by_layers(model, shape, parallel)
        layers = layers - travels + smaller(travels, 2 * reduce(larger, moving))

    # the embedding saves ids and which of them lie here; learned positions save positions
    ids = shape.tokens_on(mesh, parallel.streams.ids) * (index + 1) * (mesh.sizes["col"] > 1)
    shared, tables = parallel.cuts_sequences, anatomy.positions is None
    ids += 4 * shape.tokens_on(mesh, ()) * index if shared else 0
    row = shape.tokens_on(mesh, parallel.attention.tokens) if shared else shape.sequence
    positions = row * model.head_dim * element if tables else t * index
    head = sum(prod(parameter.spec.local_shape(mesh)) for parameter in anatomy.head.parameters(parallel))
    last = anatomy.norm.statistics * statistic + _widened_gains(anatomy.norm, None, parallel)
    dropped = stream if model.embedding_dropout > 0 else 0
    return (
        layers + 2 * stream + dropped + last + ids + positions + head * element + kept_weights(model, shape, parallel)
    )


def kept_weights(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """Bytes of what FSDP2 has gathered and keeps after the forward: of no layer; of layers too, unless resharded."""
    if parallel.fsdp is None:
        return 0
    *layers, (outside, _) = gathered_units(model, parallel)
    kept = outside + (0 if shape.reshard and shape.by_layer else sum(size * times for size, times in layers))
    return kept * parallel.compute.itemsize


def gathered_units(model: ModelConfig, parallel: Parallel) -> list[tuple[int, int]]:
    """The elements of each unit as FSDP2 gathers it, and how many such units there are: of each kind of layer, then of
    what is in no layer."""
    return [
        (sum(padded_shard(each, parallel.mesh) * parallel.mesh.size(each.spec.stored_over) for each in unit), times)
        for unit, times in anatomy_of(model).units(parallel)
    ]


def _widened_gains(norm: Norm, attention: Attention | None, parallel: Parallel) -> int:
    """What norms save of their gains where FSDP2 gathers these in another dtype than theirs: a copy in theirs."""
    if parallel.fsdp is None or parallel.dtype == parallel.compute:
        return 0
    of_heads = len(attention.norms) * attention.head_dim if attention else 0
    return (norm.width // parallel.mesh.size(parallel.residual.features) + of_heads) * parallel.dtype.itemsize


def kept_by_layers(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What the layers among it keep for one micro-batch's backward, on the device or in host memory."""
    return sum(count * layer_bytes(layer, shape, parallel) for layer, count in anatomy_of(model).kinds)


def offloaded_by_layers(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """The part of it that offloading takes to host memory."""
    staying = sum(count * staying_bytes(layer, shape, parallel) for layer, count in anatomy_of(model).kinds)
    return kept_by_layers(model, shape, parallel) - staying


def staying_bytes(layer: Layer, shape: StepShape, parallel: Parallel) -> Any:
    """Bytes of what one layer keeps on the device even so: its weights in the compute dtype, where they are copies."""
    rows = parallel.mesh.size(parallel.weights_over)
    if shape.recompute or parallel.dtype == parallel.compute or parallel.fsdp is not None:
        return 0
    blocks = [saved_by_block(block, shape, parallel, tiled=tiled(block, shape, parallel)) for block in layer]
    copies = sum(block.column_weights + block.row_weights for block in blocks)
    return where(rows > 1, 0, copies) if parallel.schedule.keep else copies  # kept as gathered they go too


def layer_bytes(layer: Layer, shape: StepShape, parallel: Parallel) -> int:
    """Bytes of one layer."""
    t = shape.tokens_on(parallel.mesh, parallel.residual.tokens)
    width = layer[0].column.width // parallel.mesh.size(parallel.residual.features)
    stream = t * width * parallel.compute.itemsize
    if not shape.recompute:
        saved = (saved_by_block(block, shape, parallel, tiled=tiled(block, shape, parallel)) for block in layer)
        return sum(sum(block) for block in saved)
    if not shape.savers.attention_once:
        return stream
    return stream + sum(
        result_bytes(block.attention, shape, parallel) for block in layer if block.attention is not None
    )


def result_bytes(attention: Attention, shape: StepShape, parallel: Parallel) -> Any:
    """Bytes that a layer keeps which runs again while attention does not; step by step it does run again."""
    if attention.scores:
        return 0
    mesh, head = parallel.mesh, attention.head_dim * parallel.compute.itemsize
    queries = query_heads_on(attention, parallel)
    kept = queries * (head + _statistic(parallel))
    if parallel.context.chunks == 1:
        kept = kept + 2 * (queries + traded_kv_heads(attention, parallel)) * head * (mesh.sizes["ulysses"] > 1)
    return shape.tokens_on(mesh, parallel.attention.tokens) * kept


def _statistic(parallel: Parallel) -> int:
    """Bytes of a number that norms or softmax keep for a token."""
    return torch.promote_types(parallel.compute, torch.float32).itemsize


class BlockSaved(NamedTuple):
    """Bytes of what one block saves: the table above, in the order of the forward; weights where they are copies."""

    stream: Any
    statistics: Any
    column_input: Any
    column_weights: Any
    inside: Any
    row_input: Any
    row_weights: Any


def saved_by_block(block: Block, shape: StepShape, parallel: Parallel, *, tiled: bool) -> BlockSaved:
    """The part of the table above that one block has, in bytes; `tiled`: an MLP in tiles."""
    mesh, schedule, element = parallel.mesh, parallel.schedule, parallel.compute.itemsize
    inner, rows, hidden = mesh.sizes["inner"], mesh.size(parallel.weights_over), block.row.hidden(parallel)
    width, tokens = block.column.width // inner, shape.tokens_on(mesh, hidden.tokens)
    t = shape.tokens_on(mesh, parallel.residual.tokens)
    stream = t * (block.column.width // mesh.size(parallel.residual.features)) * element
    statistics = block.norm.statistics * t * _statistic(parallel) + _widened_gains(
        block.norm, block.attention, parallel
    )
    statistics = statistics + (stream if block.dropout else 0)  # dropout saves its mask, scaled
    shards = [p.features // mesh.sizes["col"] * (width // rows) * element for p in block.products]
    copies = parallel.dtype != parallel.compute and parallel.fsdp is None  # which gathers them in the compute dtype
    weights = shards if copies else [0, 0]
    if block.attention is None and tiled:
        return BlockSaved(stream, statistics, stream, weights[0], 0, 0, weights[1])
    into_column, into_row = stream, tokens * (block.row.features // mesh.size(hidden.features)) * element
    inside = len(block.column.linears) * into_row
    if block.attention is not None:
        inside = tokens * _saved_by_attention(block.attention, parallel)
        if parallel.cuts_sequences:
            inside = tokens * _saved_by_shared_attention(block.attention, parallel)
            if parallel.context.chunks == 1:
                inside = inside + into_row * (mesh.sizes["ulysses"] > 1)
            else:
                whole = tokens * _saved_by_attention(block.attention, parallel)
                inside = where(mesh.sizes["ulysses"] > 1, whole, inside)
    if block.attention is not None and block.attention.scores:
        inside = inside + saved_scores(block.attention, shape, parallel)
    if schedule.keep:
        into_column = shape.tokens_on(mesh, parallel.streams.ids) * width * element  # brought together along col
        if block.attention is not None:
            inside = inside + into_row * (inner > 1)  # attention's own result beside what comes along inner
        into_row = into_row * inner
        weights = [where(rows > 1, shard * rows, w) for shard, w in zip(shards, weights, strict=True)]
    return BlockSaved(stream, statistics, into_column, weights[0], inside, into_row, weights[1])


def saved_scores(attention: Attention, shape: StepShape, parallel: Parallel) -> Any:
    """What the step-by-step kernel saves of each pair of a query and a key: the softmax's result in the wide dtype, and
    what multiplies v; with dropout the mask too, scaled. Of all heads together which keys are hidden, a byte each."""
    element, wide = parallel.compute.itemsize, _statistic(parallel)
    kept = wide + (2 * element if attention.dropout else element if wide > element else 0)
    tokens = shape.tokens_on(parallel.mesh, parallel.attention.tokens)
    hidden = tokens if shape.documents else shape.sequence
    return (tokens * query_heads_on(attention, parallel) * kept + hidden) * shape.sequence


def _saved_by_attention(attention: Attention, parallel: Parallel) -> int:
    """Bytes of a token: queries, keys, values, the softmax's statistics; where heads are normed what that saves.

    The step-by-step kernel saves a key and a value for each query, and its softmax has no statistics.
    """
    head, statistic = attention.head_dim * parallel.compute.itemsize, _statistic(parallel)
    queries, keys = query_heads_on(attention, parallel), kv_heads_on(attention, parallel)
    if attention.scores:
        normed = (queries + 2 * keys) * head + (queries + keys) * statistic
        return 3 * queries * head + (normed if attention.norms else 0)
    saved = (queries + (3 if attention.rotary else 2) * keys) * head + queries * statistic
    if not attention.norms:
        return saved
    # their inputs: of rotated keys what they were is there already
    return saved + queries * head + (queries + keys) * statistic + (0 if attention.rotary else keys * head)


def _saved_by_shared_attention(attention: Attention, parallel: Parallel) -> int:
    """The same where ranks share sequences: queries, keys and values as traded for tokens, softmax's statistics."""
    head, statistic = attention.head_dim * parallel.compute.itemsize, _statistic(parallel)
    queries, keys = query_heads_on(attention, parallel), kv_heads_on(attention, parallel)
    saved = (queries + 2 * traded_kv_heads(attention, parallel)) * head + queries * statistic
    return saved + ((queries + 2 * keys) * head + (queries + keys) * statistic if attention.norms else 0)
