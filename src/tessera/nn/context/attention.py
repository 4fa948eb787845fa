"""Causal attention of a stream that several ranks share: heads for tokens, tiles of the owner, and back.

    q, k, v   [T, heads, D]  of this rank
      → along ulysses: all tokens of the owner, a part of the heads
      → along the owners' axes: keys and values in rounds (exchange.py, ring.py), the tiles of each computed meanwhile
      → along ulysses back

The backward brings keys and values once more; what was saved are the owner's own q, k, v, result and log-sum-exp.
With `ulysses_chunks` this goes group of heads by group of heads (chunks.py).
"""

from functools import partial

import torch
from torch import Tensor

from tessera.core.mesh import Group
from tessera.layout.parallel import Parallel
from tessera.nn.context.chunks import attention_in_groups
from tessera.nn.context.exchange import Exchange
from tessera.nn.context.heads import heads_for_tokens, repeats, tokens_for_heads
from tessera.nn.context.passes import Pass, backward_pass, forward_pass
from tessera.nn.context.ring import Ring
from tessera.nn.context.route import RingRoute, Route
from tessera.nn.once import Once, run_once

# mypy: disable-error-code="no-untyped-def"


class _Shared(torch.autograd.Function):
    """Attention of the owner's queries to keys and values wherever they are.

    q [T, H, D], k and v as kv [T, 2, kv heads, D] → [T, H, D]; all of this owner.
    """

    @staticmethod
    def forward(
        ctx,
        q_THD: Tensor,
        kv_T2HD: Tensor,
        begin: Pass,
        scale: float | None,
        softcap: float | None,
        once: Once | None,
    ):
        out, lse = run_once(once, lambda: forward_pass(q_THD, kv_T2HD, begin, scale, softcap))
        ctx.save_for_backward(q_THD, kv_T2HD, out, lse)
        ctx.options = begin, scale, softcap
        return out

    @staticmethod
    def backward(ctx, d_out_THD: Tensor):
        return *backward_pass(d_out_THD, *ctx.saved_tensors, *ctx.options), None, None, None, None


def shared_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    route: Route,
    parallel: Parallel,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    once: Once | None = None,
) -> Tensor:
    """softmax(z) v over the keys of each query's document before it, z as in `attend`; [T, H, D] of this rank's tokens.

    The query heads divide by the ranks along `ulysses`, and by the kv heads. `once`: in a layer that runs again all of
    this runs in its first run alone, kernel and communication; what is kept are the result and the log-sum-exp, and
    where heads are traded q, k, v and the result as they were on their way too.
    """
    mesh = parallel.mesh
    ulysses, owners = mesh.group(("ulysses",)), mesh.group(parallel.owners)
    if parallel.context.chunks > 1 and ulysses is not None:
        begin = _beginning(route, owners)
        return attention_in_groups(q_THD, k_THD, v_THD, parallel.context.chunks, ulysses, begin, scale, softcap, once)
    again = repeats(k_THD.shape[1], mesh.sizes["ulysses"])
    kv_T2HD = torch.stack([k_THD, v_THD], 1)
    if again > 1:
        kv_T2HD = kv_T2HD.repeat_interleave(again, 2)
    q = tokens_for_heads(q_THD, ulysses, once)
    kv = tokens_for_heads(kv_T2HD.transpose(1, 2), ulysses, once).transpose(1, 2)
    out = _Shared.apply(q, kv, _beginning(route, owners), scale, softcap, once)
    return heads_for_tokens(out, ulysses, once)


def _beginning(route: Route, group: Group | None) -> Pass:
    if isinstance(route, RingRoute):
        return partial(Ring, route, group)
    return partial(Exchange, route, group)
