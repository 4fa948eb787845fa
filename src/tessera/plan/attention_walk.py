"""What is alive while attention and what lies around its kernel run backward, as nn/attend.py and nn/context choose."""

from typing import Any

import torch

from tessera.core.arrays import common_divisor, larger, smaller, where
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention
from tessera.plan.ledger import Ledger
from tessera.plan.many import ManyMeshes
from tessera.plan.sequences import kv_heads_on, query_heads_on, traded_kv_heads


def attention_backward(ledger: Ledger, attention: Attention, inside: Any, shape: StepShape, parallel: Parallel) -> None:
    """Between the two products: the gradient of the result is held as working, and `inside` as activations.

    Nothing of the gradients of q, k and v, which the caller holds next, is held afterwards; `inside` goes.
    """
    mesh, element = parallel.mesh, parallel.compute.itemsize
    wide = torch.promote_types(parallel.compute, torch.float32).itemsize // element
    tokens = shape.tokens_on(mesh, parallel.attention.tokens)
    head = tokens * attention.head_dim * element
    q, kv = head * query_heads_on(attention, parallel), 2 * head * kv_heads_on(attention, parallel)
    if parallel.cuts_sequences:
        kv_traded = 2 * head * traded_kv_heads(attention, parallel)
        made = _shared_backward(ledger, q, kv_traded, wide, shape, parallel)
    elif attention.scores:
        pairs = tokens * query_heads_on(attention, parallel) * shape.sequence * element
        ledger.touch(pairs * (1 + wide))  # gradients of the scores, beside what goes as they are formed
        made = ledger.hold(q + kv)
    elif attention.window is not None:
        made = _tiled_backward(ledger, q, kv, wide, attention.window, shape)
    else:
        if shape.documents:  # whole gradients, and those of a document
            longest = _longest_document(shape)
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


def _longest_document(shape: StepShape) -> int:
    longest = 1
    for starts in shape.document_starts:
        ends = (*starts[1:], shape.tokens)
        longest = max(longest, *(end - first for first, end in zip(starts, ends, strict=True)))
    return longest


def _tiled_backward(ledger: Ledger, q: Any, kv: Any, wide: int, window: int, shape: StepShape) -> Any:
    """A window: gradients in the wide dtype, a tile's beside them, then in the compute dtype; what is held of it."""
    sums = ledger.hold((q + kv) * wide)
    ledger.touch((q + kv) * larger(1, 1) * smaller(window, shape.sequence) // shape.sequence)
    made = ledger.hold((q + kv) if wide > 1 else 0)
    if wide == 1:
        return sums
    ledger.drop(sums)
    return made


def _shared_backward(ledger: Ledger, q: Any, kv: Any, wide: int, shape: StepShape, parallel: Parallel) -> Any:
    """Sequences shared: heads are traded, keys and values come and their gradients go; what is held of it then."""
    mesh = parallel.mesh
    groups = parallel.context.chunks if mesh.present(("ulysses",)) else 1
    traded = where(mesh.sizes["ulysses"] > 1, 1, 0)
    others = _others(shape, parallel)
    own = ledger.hold(q + kv * wide if groups > 1 else 0)
    q_part, kv_part = q // groups, kv // groups
    d_out = ledger.hold(q_part * traded * (2 if groups > 1 else 1))
    # q and kv as traded once more; the gradients of the group before are dropped late
    again = ledger.hold((q_part + kv_part) * (1 + wide) if groups > 1 else 0)
    dq = ledger.hold(q_part * wide)
    if parallel.context.transport == "ring":
        # of a round: keys there and on their way, gradients of the round and of the one before, sums carried and sent
        round_kv = where(others > 0, kv_part, 0)
        coming = ledger.hold(2 * round_kv, "gathered")
        sums = ledger.hold(kv_part * wide + round_kv * wide * 3)
    else:
        # the sums of the own tokens, and those of others' as the tiles add to them; these joined, in the dtype in
        # which they go home, and what comes home
        coming = ledger.hold(others * kv_part, "gathered")
        sums = ledger.hold(kv_part * wide + where(others > 0, others, 1) * kv_part * wide)
    ledger.touch(q_part + kv_part)
    if parallel.context.transport != "ring":
        ledger.touch(others * kv_part * (wide + 2) + (q_part if wide > 1 else 0))
    ledger.drop(coming, "gathered")
    ledger.drop(sums)
    ledger.hold(kv_part)
    ledger.touch(q_part if wide > 1 else 0)
    ledger.drop(dq)
    ledger.drop(d_out)
    ledger.drop(again)
    ledger.drop(kv_part)
    ledger.drop(own)
    return ledger.hold(q + kv)


def _others(shape: StepShape, parallel: Parallel) -> Any:
    """How many times its own tokens an owner reads of others: of rows of one document, all that others have of them."""
    mesh, owners = parallel.mesh, parallel.mesh.size(parallel.owners)
    streams = 1 if parallel.context.joined else mesh.size(parallel.attention.tokens)
    others = owners // common_divisor(owners, shape.batch // streams) - 1  # that own parts of a row
    if isinstance(mesh, ManyMeshes) or not shape.documents:
        return others
    own = shape.tokens // streams // owners
    return min(int(others), -(-_longest_document(shape) // own))
