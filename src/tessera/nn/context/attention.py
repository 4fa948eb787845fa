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
from tessera.nn.kernels.function import attention
from tessera.nn.once import Once


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
    options = _beginning(route, owners), scale, softcap
    out, _ = attention(
        lambda q, kv: forward_pass(q, kv, *options),
        lambda d_out, q, kv, out, lse: backward_pass(d_out, q, kv, out, lse, *options),
        q,
        kv,
        once=once,
    )
    return heads_for_tokens(out, ulysses, once)


def _beginning(route: Route, group: Group | None) -> Pass:
    if isinstance(route, RingRoute):
        return partial(Ring, route, group)
    return partial(Exchange, route, group)
