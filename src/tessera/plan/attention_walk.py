"""What is alive while attention and what lies around its kernel run backward, as nn/attend.py and nn/context choose."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from tessera.core.arrays import smaller
from tessera.data.batch import Stream
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention
from tessera.nn.context.tiles import tiles
from tessera.plan.context_walk import shared_backward, two_tiles
from tessera.plan.ledger import Ledger
from tessera.plan.many import ManyMeshes
from tessera.plan.scores_walk import explicit_backward
from tessera.plan.sequences import kv_heads_on, query_heads_on, traded_kv_heads


def attention_backward(
    ledger: Ledger, attention: Attention, inside: Any, shape: StepShape, parallel: Parallel, streams: Sequence[Stream]
) -> None:
    """Between the two products: the gradient of the result is held as working, and `inside` as activations.

    Nothing of the gradients of q, k and v, which the caller holds next, is held afterwards; `inside` goes. `streams`:
    where ranks share sequences, of each micro-batch that of this rank.
    """
    mesh, element = parallel.mesh, parallel.compute.itemsize
    wide = torch.promote_types(parallel.compute, torch.float32).itemsize // element
    tokens = shape.tokens_on(mesh, parallel.attention.tokens)
    head = tokens * attention.head_dim * element
    q, kv = head * query_heads_on(attention, parallel), 2 * head * kv_heads_on(attention, parallel)
    if parallel.cuts_sequences:
        sizes = q, kv, 2 * head * traded_kv_heads(attention, parallel)
        made = shared_backward(ledger, attention, sizes, wide, shape, parallel, streams)
    elif attention.scores:
        made = explicit_backward(ledger, attention, (q, kv), shape, parallel)
    elif attention.window is not None:
        made = _tiled_backward(ledger, q, kv, wide, attention.window, shape, parallel)
    else:
        if shape.documents:  # whole gradients, and those of a document
            longest = max(end - first for bounds in _bounds(shape, parallel) for first, end in pairwise(bounds))
            ledger.touch(q + kv + (q + kv) * longest // tokens)
        made = ledger.hold(q + kv)
    ledger.drop(inside, "activations")
    if attention.rotary:  # the halves turned: x · cos, and x rolled
        ledger.touch(2 * q)
        ledger.touch(kv)
    if attention.norms:
        copied = 1 if wide > 1 else 0
        ledger.touch(((2 + 2 * copied) * wide + copied) * q)
    ledger.touch(kv)  # the gradients of k and v are stacked
    ledger.drop(made)


def _bounds(shape: StepShape, parallel: Parallel) -> set[tuple[int, ...]]:
    """Of each micro-batch at which of this rank's tokens its documents begin, and the number of tokens at the end."""
    tokens = shape.tokens_on(parallel.mesh, parallel.attention.tokens)
    first = parallel.mesh.index(parallel.attention.tokens) * tokens
    parts = (tuple(s - first for s in starts if first <= s < first + tokens) for starts in shape.document_starts)
    return {(*part, tokens) for part in parts}


def _tiled_backward(
    ledger: Ledger, q: Any, kv: Any, wide: int, window: int, shape: StepShape, parallel: Parallel
) -> Any:
    """A window: gradients in the wide dtype, tiles' beside them, then in the compute dtype; what is held of it."""
    sums = ledger.hold((q + kv) * wide)
    if isinstance(parallel.mesh, ManyMeshes):
        rows = shape.tokens_on(parallel.mesh, parallel.attention.tokens) // shape.sequence
        # a tile beside the last one's; a band's operands and gradients are copies
        ledger.touch((6 * q + 4 * kv) * smaller(window, shape.sequence) // (rows * shape.sequence))
    else:
        for bounds in _bounds(shape, parallel):
            whole = [(0, bounds[-1])]
            ledger.touch(two_tiles(tiles(whole, whole, bounds, window), q, kv, bounds[-1]))
    if wide == 1:
        return sums
    made = ledger.hold(q + kv)
    ledger.drop(sums)
    return made
