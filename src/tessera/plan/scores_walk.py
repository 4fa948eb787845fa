"""What is alive while attention goes step by step, nn/kernels/explicit.py, as autograd runs it: scores of each pair.

With P bytes of one tensor of all pairs of a query and a key in the compute dtype, w how much larger the softmax's dtype
is, and b those of booleans; what stays for the backward is [in brackets]:

    forward    b while heads' masks are hashed one by one; q k's product P, divided P, masked P [b of the mask]; in the
               wide dtype w P; softmax [w P], in the compute dtype P [stays unless w = 1]; the dropout's mask [P]; the
               product with it [P]
    backward   of the product with v P; of dropout P; in the wide dtype w P; of the softmax w P; in the compute dtype,
               masked and divided P each

Each goes when the next one is there; of what was saved the last comes first.
"""

from typing import Any

import torch

from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention
from tessera.plan.ledger import Ledger
from tessera.plan.sequences import query_heads_on

HASHED = 24
"""Bytes of a pair while the mask of a head is made: three tensors of int64 (nn/dropout.py)."""


def explicit_forward(ledger: Ledger, attention: Attention, shape: StepShape, parallel: Parallel) -> None:
    """All that the kernel makes on its way, what it saves included; nothing of it is held afterwards."""
    pairs, boolean, heads, wide = _sizes(attention, shape, parallel)
    widened = wide > 1
    with ledger.passing():
        if attention.dropout:
            ledger.touch(boolean * (heads - 1) // heads + boolean * HASHED // heads)
            ledger.touch(2 * boolean)  # the heads' masks, and all as one
            ledger.hold(boolean)
        ledger.hold(pairs)
        ledger.touch(pairs)
        ledger.touch(pairs * wide * (1 + widened))
        ledger.hold(pairs * wide)
        ledger.hold(pairs * widened)
        if attention.dropout:
            ledger.hold(2 * pairs)


def explicit_backward(
    ledger: Ledger, attention: Attention, sizes: tuple[Any, Any], shape: StepShape, parallel: Parallel
) -> Any:
    """What is held afterwards: the gradients of q, k and v, bytes `sizes` of q and of k·v. What was saved is there."""
    pairs, _, _, wide = _sizes(attention, shape, parallel)
    q, kv = sizes
    widened = wide > 1
    with ledger.passing():
        d = ledger.hold(pairs)
        ledger.hold(q)  # the gradient of v for each query head
        ledger.drop(pairs * (widened or attention.dropout), "activations")  # else it is the softmax's result
        if attention.dropout:
            ledger.touch(pairs)
            ledger.drop(pairs, "activations")
        if widened:
            ledger.hold(pairs * wide)
            ledger.drop(d)
        ledger.touch(pairs * wide)
        ledger.drop(pairs * wide, "activations")
        if widened:
            ledger.hold(pairs)
            ledger.drop(pairs * wide)
        ledger.touch(pairs)
        ledger.touch(2 * q)
    return ledger.hold(q + kv)


def _sizes(attention: Attention, shape: StepShape, parallel: Parallel) -> tuple[Any, Any, Any, int]:
    """Bytes of all pairs in the compute dtype, and as booleans; this rank's heads; w."""
    element, heads = parallel.compute.itemsize, query_heads_on(attention, parallel)
    count = shape.tokens_on(parallel.mesh, parallel.attention.tokens) * heads * shape.sequence
    wide = torch.promote_types(parallel.compute, torch.float32).itemsize // element
    return count * element, count, heads, wide
