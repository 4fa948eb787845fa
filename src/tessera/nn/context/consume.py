"""Attention as a loop over tiles, whatever brings the keys: one loop for the forward, one step of the backward's.

Keys and values come in blocks: all at once on one rank, or one after another as a transport delivers them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tessera.nn.context.tiles import Tile
from tessera.nn.kernels.merge import merge, nothing_yet
from tessera.nn.kernels.tile import tile_backward, tile_forward

Block = tuple[Tensor, Tensor, Sequence[Tile]]
"""Keys and values [T, kv heads, D], and the tiles in which the queries see them."""


def forward_tiles(
    q_THD: Tensor, blocks: Iterable[Block], *, scale: float | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [T, H, D] in q's dtype, and its log-sum-exp [H, T] in promote_types(dtype, float32).

    Each block is used when it comes and not kept. A query that sees no key of any block has zeros and -inf.
    """
    out_THD, lse_HT = nothing_yet(q_THD)
    for k_THD, v_THD, tiles in blocks:
        for tile in tiles:
            rows, columns = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            found = tile_forward(q_THD[rows], k_THD[columns], v_THD[columns], tile, scale=scale, softcap=softcap)
            merge(out_THD[rows], lse_HT[:, rows], *found)
    return out_THD.to(q_THD.dtype), lse_HT


def backward_tiles(
    d_out_THD: Tensor,
    q_THD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    dq_THD: Tensor,
    block: Block,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of one block's keys and values; what the block adds to that of q is added to `dq_THD`.

    `out` and `lse` are what `forward_tiles` gave over all blocks. `dq_THD` starts with zeros and should be, as the
    gradients that are returned, in promote_types(dtype, float32).
    """
    k_THD, v_THD, tiles = block
    dk_THD, dv_THD = (torch.zeros_like(x, dtype=dq_THD.dtype) for x in (k_THD, v_THD))
    for tile in tiles:
        rows, columns = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        queries = d_out_THD[rows], q_THD[rows]
        results = out_THD[rows], lse_HT[:, rows]
        keys = k_THD[columns], v_THD[columns]
        dq, dk, dv = tile_backward(*queries, *keys, *results, tile, scale=scale, softcap=softcap)
        dq_THD[rows] += dq
        dk_THD[columns] += dk
        dv_THD[columns] += dv
    return dk_THD, dv_THD
