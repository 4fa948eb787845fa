"""Causal attention of whole rows tile by tile: windows and soft caps, within each document, without scores of S × S."""

from functools import lru_cache

import torch
from torch import Tensor

from tessera.nn.context.consume import backward_tiles, forward_tiles
from tessera.nn.context.tiles import Tile, tiles
from tessera.nn.documents import Documents
from tessera.nn.kernels.function import attention
from tessera.nn.once import Once


@lru_cache(maxsize=16)
def _plan(bounds: tuple[int, ...], window: int | None) -> list[Tile]:
    """The tiles of a whole stream: those of one layer are those of the next."""
    whole = [(0, bounds[-1])]
    return tiles(whole, whole, bounds, window)


def tiled(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    documents: Documents | None,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    once: Once | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document (None: each row is one) and the log-sum-exp [B, H, S] without gradient.

    The rows of a micro-batch are joined into one stream of T = B · S tokens.
    """
    B, _, S, _ = q_BHSD.shape
    bounds = tuple(range(0, B * S + 1, S)) if documents is None else documents.bounds
    plan = _plan(bounds, window)

    def forward(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> tuple[Tensor, Tensor]:
        return forward_tiles(q_THD, [(k_THD, v_THD, plan)], scale=scale, softcap=softcap)

    def backward(
        d_out_THD: Tensor, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, out_THD: Tensor, lse_HT: Tensor
    ) -> tuple[Tensor, ...]:
        dq, block = torch.zeros_like(q_THD, dtype=lse_HT.dtype), (k_THD, v_THD, plan)
        dk, dv = backward_tiles(d_out_THD, q_THD, out_THD, lse_HT, dq, block, scale=scale, softcap=softcap)
        return dq.to(q_THD.dtype), dk.to(k_THD.dtype), dv.to(v_THD.dtype)

    joined = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSD, k_BHSD, v_BHSD))
    out_THD, lse_HT = attention(forward, backward, *joined, once=once)
    return out_THD.unflatten(0, (B, S)).transpose(1, 2), lse_HT.unflatten(1, (B, S)).transpose(0, 1)
