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

A layer that runs again in the backward keeps its input, t h; with attention run once also attention's result, t q, and
statistics, and where heads are traded in one group q, k, v and the result as they were traded, t (2q + 2kv) once more.
An MLP in tiles keeps its input alone, and its norm's: 2 t h. What is offloaded is on the device for at most two layers.
"""

from dataclasses import dataclass
from math import prod

import torch

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention, Block, Layer, anatomy_of
from tessera.models.config import ModelConfig
from tessera.nn.attention import kv_heads_of
from tessera.nn.context.heads import repeats
from tessera.nn.tiled import tile_sizes


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

    The gradients of the head, formed in the forward, are among it. Without dropout and windows, whose kernel saves
    more, as do slices that are kept.
    """
    mesh, element, index, anatomy = parallel.mesh, parallel.compute.itemsize, torch.int64.itemsize, anatomy_of(model)
    t = shape.tokens // mesh.size(parallel.residual.tokens)
    stream = t * model.hidden_size // mesh.size(parallel.residual.features) * element
    statistic = t * _statistic(parallel)
    layers = kept_by_layers(model, shape, parallel)
    if shape.savers.offload:
        layers = min(layers, 2 * max(_kept(layer, shape, parallel) for layer, _ in anatomy.kinds))

    # the embedding saves ids and which of them lie here; learned positions save positions
    ids = shape.tokens // mesh.size(parallel.streams.ids) * (index + 1) if mesh.sizes["col"] > 1 else 0
    positions = shape.sequence * model.head_dim * element if anatomy.positions is None else t * index
    head = sum(prod(parameter.spec.local_shape(mesh)) for parameter in anatomy.head.parameters(parallel))
    return layers + 2 * stream + anatomy.norm.statistics * statistic + ids + positions + head * element


def kept_by_layers(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What the layers among it keep for one micro-batch's backward, on the device or in host memory."""
    return sum(count * _kept(layer, shape, parallel) for layer, count in anatomy_of(model).kinds)


def _kept(layer: Layer, shape: StepShape, parallel: Parallel) -> int:
    """Bytes of one layer."""
    t = shape.tokens // parallel.mesh.size(parallel.residual.tokens)
    width = layer[0].column.width // parallel.mesh.size(parallel.residual.features)
    stream = t * width * parallel.compute.itemsize
    if not shape.recompute:
        statistic = t * _statistic(parallel)
        blocks = (_saved_by_block(b, shape, parallel, stream) + b.norm.statistics * statistic for b in layer)
        return sum(blocks)
    if not shape.savers.attention_once:
        return stream
    return stream + sum(_result(block.attention, shape, parallel) for block in layer if block.attention is not None)


def _result(attention: Attention, shape: StepShape, parallel: Parallel) -> int:
    """Bytes that a layer keeps which runs again while attention does not."""
    mesh, head = parallel.mesh, attention.head_dim * parallel.compute.itemsize
    queries, keys = attention.heads // mesh.size(parallel.attention.features), _kv_heads(attention, parallel)
    kept = queries * (head + _statistic(parallel))
    if mesh.sizes["ulysses"] > 1 and parallel.context.chunks == 1:
        kept += 2 * (queries + keys * repeats(keys, mesh.sizes["ulysses"])) * head
    return shape.tokens // mesh.size(parallel.attention.tokens) * kept


def _statistic(parallel: Parallel) -> int:
    """Bytes of a number that norms or softmax keep for a token."""
    return torch.promote_types(parallel.compute, torch.float32).itemsize


def _saved_by_block(block: Block, shape: StepShape, parallel: Parallel, stream: int) -> int:
    """The part of the table above that one block has, in bytes, its norm's statistics left out; `stream` is t h."""
    mesh, schedule, element = parallel.mesh, parallel.schedule, parallel.compute.itemsize
    inner, rows, hidden = mesh.sizes["inner"], mesh.size(parallel.weights_over), block.row.hidden(parallel)
    width, tokens = block.column.width // inner, shape.tokens // mesh.size(hidden.tokens)
    matrices = sum(p.features for p in block.products) // mesh.sizes["col"] * (width // rows) * element
    weights = matrices if parallel.dtype != parallel.compute else 0  # copies in the compute dtype
    if block.attention is None and len(mlp_tiles(block, shape, parallel)) > 1:
        return 2 * stream + weights
    into_column, into_row = stream, tokens * (block.row.features // mesh.size(hidden.features)) * element
    inside = len(block.column.linears) * into_row
    if block.attention is not None:
        inside = tokens * _saved_by_attention(block.attention, parallel)
    if schedule.keep:
        into_column = shape.tokens // mesh.size(parallel.streams.ids) * width * element  # brought together along col
        if block.attention is not None and inner > 1:
            inside += into_row  # attention keeps its own result beside what is brought together along inner
        into_row *= inner
        weights = matrices * rows if rows > 1 else weights
    return stream + into_column + inside + into_row + weights


def mlp_tiles(block: Block, shape: StepShape, parallel: Parallel) -> list[int]:
    """The tiles of an MLP on this rank, in tokens as they are multiplied."""
    mesh, hidden = parallel.mesh, block.column.hidden(parallel)
    gathered = mesh.sizes["col"] if parallel.residual.stored_dim("col") == 0 else 1
    scattered = mesh.sizes["inner"] if hidden.stored_dim("inner") == 0 else 1
    tokens = shape.tokens // mesh.size(parallel.streams.ids) // gathered
    sizes = tile_sizes(tokens, shape.savers.mlp_tiles, block.column.width, gathered, scattered)
    return [size * gathered for size in sizes]


def _saved_by_attention(attention: Attention, parallel: Parallel) -> int:
    """Bytes of a token: queries, keys, values, the softmax's statistics; where heads are normed what that saves."""
    head, statistic = attention.head_dim * parallel.compute.itemsize, _statistic(parallel)
    queries, keys = attention.heads // parallel.mesh.size(parallel.attention.features), _kv_heads(attention, parallel)
    saved = (queries + (3 if attention.rotary else 2) * keys) * head + queries * statistic
    return saved + ((queries + keys) * (head + statistic) if attention.norms else 0)


def _kv_heads(attention: Attention, parallel: Parallel) -> int:
    """The key and value heads that this rank's queries read."""
    local = attention.heads // parallel.mesh.size(parallel.attention.features)
    first = parallel.mesh.index(parallel.attention.features) * local
    return len(kv_heads_of(range(first, first + local), attention.heads, attention.kv_heads))
