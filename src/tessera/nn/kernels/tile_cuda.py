"""One tile of attention on GPUs: flash attention (Dao 2023) over one sequence of queries and one of keys.

Triangles and bands are as long as they are wide, so that query i meets key i whichever ends the kernel aligns: a
triangle shows it the keys up to that one, and a band those from that one on.
"""

import torch
from torch import Tensor

from tessera.nn.context.tiles import Tile


def _bounds(*tensors_THD: Tensor) -> tuple[Tensor | int, ...]:
    """Where the one sequence of each tensor begins and ends, then their lengths."""
    lengths = [x.shape[0] for x in tensors_THD]
    ends = [torch.arange(0, T + 1, T, dtype=torch.int32, device=tensors_THD[0].device) for T in lengths]
    return (*ends, *lengths)


def _window(tile: Tile) -> int | None:
    return None if tile.window is None else 0


def forward(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, tile: Tile, scale: float | None) -> tuple[Tensor, Tensor]:
    """The tile's softmax(scale · q kᵀ) v and log-sum-exp [H, T]."""
    bounds = _bounds(q_THD, k_THD)
    out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
        q_THD, k_THD, v_THD, *bounds, 0.0, tile.causal, False, scale=scale, window_size_left=_window(tile)
    )
    return out, lse


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
    unused = torch.empty(2, dtype=torch.uint64, device=q_THD.device)  # the random state: nothing is dropped
    dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
        d_out_THD.contiguous(),
        q_THD,
        k_THD,
        v_THD,
        out_THD,
        lse_HT.contiguous(),
        *_bounds(q_THD, k_THD),
        0.0,
        tile.causal,
        unused,
        unused,
        scale=scale,
        window_size_left=_window(tile),
    )
    return dq, dk, dv
