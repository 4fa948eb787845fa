"""One pass over keys and values wherever they are: the owner's queries forward, and their gradients backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.nn.context.consume import backward_tiles, forward_tiles
from tessera.nn.context.exchange import Exchange
from tessera.nn.context.ring import Ring

Pass = Callable[[Tensor], Exchange | Ring]
"""Starts one pass over the key/value tokens, given this owner's own."""


def forward_pass(
    q_THD: Tensor, kv_T2HD: Tensor, begin: Pass, scale: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of the owner's queries [T, H, D], and its log-sum-exp [H, T]; `kv_T2HD` are the owner's own."""
    rounds = ((kv[:, 0], kv[:, 1], tiles) for kv, tiles in begin(kv_T2HD))
    return forward_tiles(q_THD, rounds, scale=scale, softcap=softcap)


def backward_pass(
    d_out_THD: Tensor,
    q_THD: Tensor,
    kv_T2HD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    begin: Pass,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the owner's queries, and of its own keys and values, from all owners together."""
    dq_THD = torch.zeros_like(q_THD, dtype=lse_HT.dtype)
    moving = begin(kv_T2HD)
    for kv, tiles in moving:
        block = kv[:, 0], kv[:, 1], tiles
        gradients = backward_tiles(d_out_THD, q_THD, out_THD, lse_HT, dq_THD, block, scale=scale, softcap=softcap)
        moving.add(torch.stack(gradients, 1))
    return dq_THD.to(q_THD.dtype), moving.home().to(kv_T2HD.dtype)
