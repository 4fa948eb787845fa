"""What one rank holds during an optimizer step, in closed form, and the figures that are counted to compare with.

Parameters, gradients and AdamW's two moments are 4 copies of the rank's shards. What the forward saves for the backward
of one layer, in elements of the compute dtype, with t tokens of the residual stream R on this rank, h features, and q,
kv, f the features of queries, keys, and gate (or up) in the hidden stream H:

    saved by                        elements
    two norms                       2 t h         their inputs: the stream itself, before attention and before the MLP
    q·k·v and gate·up               2 t h         their inputs: what the norms give
    attention                       t (2q + 3kv)  q, k and v, the result; with RoPE k as it was too, beside v
    activation                      3 t f         gate, up, their product; without a gate one less

t h stands for T h / P with sequence parallelism, and t q, t kv, t f for T q / P, T kv / P, T f / P: each rank's shard.
With copies kept, a product saves what it gathered instead of the shards. Beside these: statistics of the norms and of
the softmax, one float32 a token and norm or head.
"""

from dataclasses import dataclass

import torch

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.spec import local_slice
from tessera.models.config import ModelConfig
from tessera.nn.attention import kv_heads_of
from tessera.plan.held import Parameters


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
    return 4 * Parameters(model, parallel).all().elements * parallel.dtype.itemsize


def saved_bytes(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What one micro-batch leaves for its backward on the rank of `parallel.mesh`, when the forward has ended.

    The gradients of the head, formed in the forward, are among it. Without dropout; slices that are kept hold more.
    """
    mesh, element, index = parallel.mesh, parallel.compute.itemsize, torch.int64.itemsize
    t = shape.tokens // mesh.size(parallel.residual.tokens)
    stream = t * model.hidden_size // mesh.size(parallel.residual.features) * element
    statistics = t * _statistic(parallel) * (2 if model.norm == "layer" else 1)
    layer = stream if shape.recompute else _saved_by_layer(model, shape, parallel, stream) + 2 * statistics

    # the embedding saves ids and which of them lie here; learned positions save positions
    ids = shape.tokens // mesh.size(("depth", "row")) * (index + 1) if mesh.sizes["col"] > 1 else 0
    positions = shape.sequence * model.head_dim * element if model.rope else t * index
    vocabulary = local_slice(model.vocab_size, ("col",), mesh)
    rows = vocabulary.stop - vocabulary.start
    head = rows * model.hidden_size // mesh.size(("inner", *parallel.weights_over)) + (rows if model.head_bias else 0)
    return model.num_layers * layer + 2 * stream + statistics + ids + positions + head * element


def _statistic(parallel: Parallel) -> int:
    """Bytes of a number that norms or softmax keep for a token."""
    return torch.promote_types(parallel.compute, torch.float32).itemsize


def _saved_by_layer(model: ModelConfig, shape: StepShape, parallel: Parallel, stream: int) -> int:
    """The table above, in bytes, the statistics of norms left out; `stream` are those of t h."""
    mesh, schedule, element = parallel.mesh, parallel.schedule, parallel.compute.itemsize
    inner, col, rows = mesh.sizes["inner"], mesh.sizes["col"], mesh.size(parallel.weights_over)
    together = shape.tokens // mesh.size(("depth", "row"))  # tokens of R along col, of H along inner
    tokens, heads = shape.tokens // mesh.size(parallel.attention.tokens), mesh.size(parallel.attention.features)
    q = tokens * (model.num_heads // heads) * model.head_dim * element
    kv = tokens * _kv_heads(model, parallel) * model.head_dim * element
    f = together // inner * (model.ffn_size // col) * element
    softmax = tokens * (model.num_heads // heads) * _statistic(parallel)

    features = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    features += model.ffn_size * (3 if model.gated else 2)
    matrices = features // col * (model.hidden_size // (inner * rows)) * element
    inputs, result, product = 2 * stream, q, f
    weights = matrices if parallel.dtype != parallel.compute else 0  # copies in the compute dtype
    if schedule.keep:
        inputs = 2 * together * (model.hidden_size // inner) * element
        product = f * inner
        result = q if inner == 1 else q + q * inner  # attention keeps its own
        weights = matrices * rows if rows > 1 else weights
    attention = q + (3 if model.rope else 2) * kv + result + softmax
    if model.qk_norm:  # their inputs, and a statistic for each head
        attention += q + kv + softmax * (q + kv) // q
    return 2 * stream + inputs + attention + (2 if model.gated else 1) * f + product + weights


def _kv_heads(model: ModelConfig, parallel: Parallel) -> int:
    """The key and value heads that this rank's queries read."""
    ranks, place = parallel.mesh.size(parallel.attention.features), parallel.mesh.index(parallel.attention.features)
    if model.num_kv_heads % ranks == 0:
        return model.num_kv_heads // ranks
    local = model.num_heads // ranks
    return len(kv_heads_of(range(place * local, (place + 1) * local), model.num_heads, model.num_kv_heads))
