"""One tile of attention in plain torch, block by block: for soft caps, and for what no fused kernel takes.

Any device and dtype; it computes in float32 or wider, and holds the scores of one block.

    z = c · tanh(scale · q kᵀ / c)     without a soft cap c: scale · q kᵀ
    p = exp(z - lse)                   lse: of the tile in the forward, of all keys in the backward
    d_z = p · (d_out vᵀ - Σ d_out · out);   dv = pᵀ d_out;   dq, dk from d_z · (1 - tanh²) · scale

Shape suffixes: K kv heads, G query heads of each, m queries and n keys of a block.
"""

import math

import torch
from torch import Tensor

from tessera.nn.context.tiles import Tile, blocks
from tessera.nn.kernels.merge import merge, nothing_yet


def block_size(device: torch.device) -> tuple[int, int]:
    """Queries and keys of a block: on CPUs what a core's cache holds, elsewhere enough to be worth a launch."""
    return (256, 512) if device.type == "cpu" else (1024, 1024)


def _by_kv_head(x_THD: Tensor, kv_heads: int) -> Tensor:
    """[T, K · G, D] as [K, G · T, D], in float32 or wider."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    return x_THD.to(wide).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """And back."""
    return x.unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1, 2)


def _hidden(block: Tile, device: torch.device) -> Tensor:
    """True where a query of the block does not see a key: [m, n]."""
    queries, keys = (torch.arange(n, device=device) for n in (block.q1 - block.q0, block.k1 - block.k0))
    behind = block.behind + queries.unsqueeze(1) - keys
    hidden = behind < 0
    return hidden if block.window is None else hidden.logical_or_(behind >= block.window)


def _scores(q: Tensor, k: Tensor, block: Tile, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """z [K, G · m, n], -inf where the block hides it, and with a soft cap the tanh."""
    z, tanh = q @ k.transpose(1, 2) * scale, None
    if softcap is not None:
        tanh = z.div_(softcap).tanh_()
        z = tanh * softcap
    if block.causal or block.window is not None:
        z.unflatten(1, (-1, block.q1 - block.q0)).masked_fill_(_hidden(block, z.device), -torch.inf)
    return z, tanh


def _scale(q_THD: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q_THD.shape[2]) if scale is None else scale


def forward(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, tile: Tile, scale: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The tile's softmax(z) v and log-sum-exp [H, T], both in float32 or wider."""
    scale, heads = _scale(q_THD, scale), k_THD.shape[1]
    out_THD, lse_HT = nothing_yet(q_THD)
    for block in blocks(tile, *block_size(q_THD.device)):
        rows, columns = slice(block.q0, block.q1), slice(block.k0, block.k1)
        q, k, v = (_by_kv_head(x, heads) for x in (q_THD[rows], k_THD[columns], v_THD[columns]))
        z, _ = _scores(q, k, block, scale, softcap)
        lse = z.logsumexp(-1, keepdim=True)
        out = z.sub_(lse).exp_() @ v
        m = block.q1 - block.q0
        merge(out_THD[rows], lse_HT[:, rows], _by_token(out, m), lse.view(-1, m))
    return out_THD, lse_HT


def backward(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    tile: Tile,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the tile adds to the gradients of q, k and v, in float32 or wider."""
    scale, heads = _scale(q_THD, scale), k_THD.shape[1]
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    dq_THD, dk_THD, dv_THD = (torch.zeros_like(x, dtype=wide) for x in (q_THD, k_THD, v_THD))
    for block in blocks(tile, *block_size(q_THD.device)):
        rows, columns = slice(block.q0, block.q1), slice(block.k0, block.k1)
        q, k, v = (_by_kv_head(x, heads) for x in (q_THD[rows], k_THD[columns], v_THD[columns]))
        d_out, out = (_by_kv_head(x[rows], heads) for x in (d_out_THD, out_THD))
        z, tanh = _scores(q, k, block, scale, softcap)
        p = z.sub_(lse_HT[:, rows].reshape(heads, -1, 1)).exp_()
        dv_THD[columns] += _by_token(p.transpose(1, 2) @ d_out, block.k1 - block.k0)
        d_z = (d_out @ v.transpose(1, 2)).sub_((d_out * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        if tanh is not None:
            d_z.mul_(1 - tanh.square())
        dq_THD[rows] += _by_token(d_z @ k, block.q1 - block.q0)
        dk_THD[columns] += _by_token(d_z.transpose(1, 2) @ q, block.k1 - block.k0)
    return dq_THD, dk_THD, dv_THD
