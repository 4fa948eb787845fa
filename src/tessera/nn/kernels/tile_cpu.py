"""One tile of attention on CPUs: torch's flash operator, which reads grouped kv heads and slices as they are.

A band is a triangle upside down: with queries and keys in reversed order its last query, which sees one key, is the
first, and each query sees one key more than the one before it. So a band costs no more than what it shows.
"""

import torch
from torch import Tensor

from tessera.nn.context.tiles import Tile


def _turned(tile: Tile, *tensors_THD: Tensor) -> list[Tensor]:
    """As the operator reads them, [1, H, T, D]; those of a band in reversed order."""
    found = tensors_THD if tile.window is None else (x.flip(0) for x in tensors_THD)
    return [x.transpose(0, 1).unsqueeze(0) for x in found]


def _back(tile: Tile, x_BHTD: Tensor) -> Tensor:
    x_THD = x_BHTD[0].transpose(0, 1)
    return x_THD if tile.window is None else x_THD.flip(0)


def forward(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, tile: Tile, scale: float | None) -> tuple[Tensor, Tensor]:
    """The tile's softmax(scale · q kᵀ) v and log-sum-exp [H, T]."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    causal = tile.causal or tile.window is not None
    out, lse = operator(*_turned(tile, q_THD, k_THD, v_THD), 0.0, causal, scale=scale)
    return _back(tile, out), lse[0] if tile.window is None else lse[0].flip(1)


def backward(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    tile: Tile,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the tile adds to the gradients of q, k and v."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    causal = tile.causal or tile.window is not None
    d_out, q, k, v, out = _turned(tile, d_out_THD, q_THD, k_THD, v_THD, out_THD)
    lse = (lse_HT if tile.window is None else lse_HT.flip(1)).unsqueeze(0)
    dq, dk, dv = operator(d_out, q, k, v, out, lse, 0.0, causal, scale=scale)
    return _back(tile, dq), _back(tile, dk), _back(tile, dv)
