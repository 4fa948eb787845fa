"""The collectives of one optimizer step in 1D tensor parallelism, in closed form.

T tokens a micro-batch, h hidden, n ranks of `col`. Each layer has two column-parallel products (q·k·v, gate·up), whose
X moves, and two row-parallel ones (attention out, down), whose Y moves; the embedding is another row-parallel product
and the head another column-parallel one, whose dX is formed in the forward.

    moves T·h elements      sequence parallel                     not
    column, forward         all-gather                            -
    column, backward        all-gather (unless kept), r.-scatter  all-reduce
    row, forward            reduce-scatter                        all-reduce
    row, backward           all-gather                            -
"""

from collections import Counter
from dataclasses import dataclass

from tessera.models.config import ModelConfig


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step runs: micro-batches of `tokens` (B · S, padded), elements of `itemsize` bytes."""

    tokens: int
    micro_batches: int = 1
    sequence_parallel: bool = True
    keep_gathered: bool = False
    recompute: bool = False
    label_smoothing: bool = False
    itemsize: int = 4
    chunk_tokens: int = 1024


# kind → [calls, bytes handed over: the whole tensor, see `collectives.Record`]
Counts = dict[str, tuple[int, int]]


def step_collectives(model: ModelConfig, ranks: int, shape: StepShape) -> Counts:
    """Calls and bytes of every kind of collective over `col` in one step, the gradient norm included."""
    if ranks == 1:
        return {}
    calls: Counter[str] = Counter()
    handed: Counter[str] = Counter()

    def add(kind: str, times: int, size: int) -> None:
        if times:
            calls[kind] += times
            handed[kind] += times * size

    residual = shape.tokens * model.hidden_size * shape.itemsize
    forwards = shape.micro_batches * (2 if shape.recompute else 1)
    backwards = shape.micro_batches
    products = 2 * model.num_layers
    if shape.sequence_parallel:
        # column products and the head gather X; row products and the embedding scatter Y
        add("all_gather", forwards * products + backwards, residual)
        add("reduce_scatter", forwards * products + backwards, residual)
        # backward: dY of row products and the embedding, X again, dX of column products and the head
        add("all_gather", backwards * (products + 1), residual)
        add("all_gather", 0 if shape.keep_gathered else backwards * products, residual)
        add("reduce_scatter", backwards * (products + 1), residual)
        add("all_reduce", 1, replicated_elements(model) * shape.itemsize)
    else:
        add("all_reduce", forwards * products + backwards, residual)
        add("all_reduce", backwards * (products + 1), residual)
    if model.num_kv_heads % ranks:
        keys_and_values = 2 * shape.tokens * model.num_kv_heads * model.head_dim * shape.itemsize
        add("all_gather", forwards * model.num_layers, keys_and_values)
        add("reduce_scatter", backwards * model.num_layers, keys_and_values)
    # the loss: log-sum-exp, target logit and, with smoothing, the sum of logits of every token, from every rank
    chunks = -(-shape.tokens // shape.chunk_tokens)
    numbers = 3 if shape.label_smoothing else 2
    calls["all_gather"] += backwards * chunks
    handed["all_gather"] += backwards * ranks * numbers * shape.tokens * max(4, shape.itemsize)
    add("all_reduce", 1, 3 * 8)  # squared norm, loss, request to stop: float64
    return {kind: (calls[kind], handed[kind]) for kind in sorted(calls)}


def replicated_elements(model: ModelConfig) -> int:
    """Elements of the parameters that every rank holds whole: norms, biases of row-parallel layers, positions."""
    norms = (2 * model.num_layers + 1) * (2 if model.norm == "layer" else 1)
    biases = model.num_layers * (int(model.attention_out_bias) + int(model.mlp_bias))
    positions = 0 if model.rope else model.max_positions
    return (norms + biases + positions) * model.hidden_size
