"""One tile of attention: which kernel computes it, forward and backward."""

from types import ModuleType

from torch import Tensor

from tessera.nn.context.tiles import Tile
from tessera.nn.kernels import blockwise, tile_cpu, tile_cuda
from tessera.nn.kernels.varlen import takes_varlen


def tile_forward(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, tile: Tile, *, scale: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(z) v [T, H, D] over the keys that `tile` shows, where z = scale · q kᵀ, and z's log-sum-exp [H, T].

    The tensors are the tile's queries and keys alone; k and v may have fewer heads, each read by an equal run of query
    heads. `scale` is 1/√D unless given; `softcap` c makes z = c · tanh(z / c). The result is in q's dtype or wider, the
    log-sum-exp in promote_types(dtype, float32), finite everywhere. `tile` has a form that `tiles` makes.
    """
    tensors = q_THD, k_THD, v_THD
    if softcap is not None or (fused := _fused(q_THD)) is None:
        return blockwise.forward(*tensors, tile, scale, softcap)
    return fused.forward(*tensors, tile, scale)


def tile_backward(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    tile: Tile,
    *,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the tile adds to the gradients of q, k and v [T, H, D], in q's dtype or wider.

    `out` (in q's dtype) and `lse` are those of the queries over all their keys, in this tile or not.
    """
    tensors = d_out_THD, q_THD, k_THD, v_THD, out_THD, lse_HT
    if softcap is not None or (fused := _fused(q_THD)) is None:
        return blockwise.backward(*tensors, tile, scale, softcap)
    return fused.backward(*tensors, tile, scale)


def _fused(q_THD: Tensor) -> ModuleType | None:
    """The kernel with flash attention for queries such as these."""
    return tile_cpu if q_THD.is_cpu else tile_cuda if takes_varlen(q_THD) else None
