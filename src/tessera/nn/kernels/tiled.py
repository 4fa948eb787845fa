"""Causal attention of whole rows tile by tile: windows and soft caps, within each document, without scores of S × S."""

from functools import lru_cache

import torch
from torch import Tensor

from tessera.nn.context.consume import backward_tiles, forward_tiles
from tessera.nn.context.tiles import Tile, tiles
from tessera.nn.documents import Documents
from tessera.nn.once import Once, run_once

# mypy: disable-error-code="no-untyped-def"


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        plan: list[Tile],
        scale: float | None,
        softcap: float | None,
        once: Once | None,
    ):
        block = k_THD, v_THD, plan
        out, lse = run_once(once, lambda: forward_tiles(q_THD, [block], scale=scale, softcap=softcap))
        ctx.save_for_backward(q_THD, k_THD, v_THD, out, lse)
        ctx.options = plan, scale, softcap
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, d_out_THD: Tensor | None, _: Tensor | None):
        if d_out_THD is None:
            return (None,) * 7
        (q, k, v, out, lse), (plan, scale, softcap) = ctx.saved_tensors, ctx.options
        dq = torch.zeros_like(q, dtype=lse.dtype)
        dk, dv = backward_tiles(d_out_THD, q, out, lse, dq, (k, v, plan), scale=scale, softcap=softcap)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


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
    joined = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSD, k_BHSD, v_BHSD))
    out_THD, lse_HT = _Tiled.apply(*joined, plan, scale, softcap, once)
    return out_THD.unflatten(0, (B, S)).transpose(1, 2), lse_HT.unflatten(1, (B, S)).transpose(0, 1)
