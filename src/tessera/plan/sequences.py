"""What attention moves where several ranks share a sequence, in closed form: one layer, one micro-batch, one rank.

With t tokens and the local heads q and kv (those that its queries read) of D features on this rank, U ranks along
`ulysses`, kv' = kv U / gcd(U, kv) heads after repeating, and b bytes an element, in the compute dtype unless said:

    transport   forward                               backward
    ulysses     q · result   t q D b (U−1)/U each     the reverse, the same bytes
                k·v         2 t kv' D b (U−1)/U
    exchange    k·v         reads · 2 (kv'/U) D b     the same once more; dk·dv: what others read of this owner's
    ring        k·v         a message a hop           the same once more; dk·dv in float32 or wider: sums that
                                                      go on with the ring, and those that come home

In N groups of heads (nn/context/chunks.py) kv' = N c, with c those of a group after repeating; each call of ulysses is
N calls, and its backward brings q, k·v and the result once more, the result together with its gradient; each call of
exchange and ring is N calls too.

`reads` are the tokens of other owners that this owner's tiles read, each once. Along the ring come the tokens that this
owner or one further on reads. The numbers are those of nn/context/route.py, by which the run moves.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tessera.core.arrays import common_divisor, common_multiple, rounded_up, where
from tessera.data.batch import Stream
from tessera.layout.parallel import Parallel
from tessera.models.anatomy import Attention
from tessera.nn.context.heads import kv_heads_of, repeats
from tessera.nn.context.route import ExchangeRoute, RingRoute, length, route_of
from tessera.plan.many import ManyMeshes


class AttentionMove(NamedTuple):
    """Collectives of one kind in one pass of a layer: `calls` of them, in which this rank receives so many bytes."""

    phase: str
    what: str
    kind: str
    axes: tuple[str, ...]
    calls: Any
    received: Any


def attention_moves(attention: Attention, stream: Stream, tokens: int, parallel: Parallel) -> Iterator[AttentionMove]:
    """All that attention over `stream` moves on a rank that has `tokens` of it."""
    yield from _traded(attention, tokens, parallel)
    mesh, element = parallel.mesh, parallel.compute.itemsize
    ranks, heads = mesh.sizes["ulysses"], traded_kv_heads(attention, parallel)
    groups = parallel.context.chunks if ranks > 1 else 1
    owners = mesh.present(parallel.owners)
    if not owners:
        return
    route = route_of(stream, parallel, attention.window)
    moves = _along_ring(route) if isinstance(route, RingRoute) else _exchanged(route)
    features = 2 * (heads // ranks) * attention.head_dim
    wide = torch.promote_types(parallel.compute, torch.float32).itemsize
    for phase, what, kind, calls, received in moves:
        itemsize = wide if what == "dk·dv" and isinstance(route, RingRoute) else element
        if calls:
            yield AttentionMove(phase, what, kind, owners, calls * groups, received * features * itemsize)


def _traded(attention: Attention, tokens: Any, parallel: Parallel) -> Iterator[AttentionMove]:
    """Heads against tokens along ulysses."""
    mesh, groups = parallel.mesh, parallel.context.chunks
    if not mesh.present(("ulysses",)):
        return
    ranks, head = mesh.sizes["ulysses"], tokens * attention.head_dim * parallel.compute.itemsize
    queries, heads = query_heads_on(attention, parallel), traded_kv_heads(attention, parallel)
    traded = {"forward": {"q": queries, "k·v": 2 * heads, "result": queries}}
    traded["backward"] = {"·".join(f"d{x}" for x in what.split("·")): n for what, n in traded["forward"].items()}
    if groups > 1:
        traded["backward"] |= {"q": queries, "k·v": 2 * heads, "dresult": 2 * queries}
    for phase, parts in traded.items():
        for what, count in parts.items():
            received = head * count * (ranks - 1) // ranks
            yield AttentionMove(phase, what, "all_to_all", ("ulysses",), where(ranks > 1, groups, 0), received)


def whole_row_moves(attention: Attention, rows: Any, tokens: Any, parallel: Parallel) -> Iterator[AttentionMove]:
    """The same where each row is one document, in closed form: of candidates' arrays, on the first rank.

    Owners of a row have its blocks in zigzag: the first reads all that the n − 1 others own, and half as much of its
    own is read by each of them.
    """
    yield from _traded(attention, tokens, parallel)
    mesh, element, groups = parallel.mesh, parallel.compute.itemsize, parallel.context.chunks
    ranks, heads = mesh.sizes["ulysses"], traded_kv_heads(attention, parallel)
    owners = mesh.present(parallel.owners)
    if not owners:
        return
    count = mesh.size(owners)
    others = count // common_divisor(count, rows) - 1  # ranks that own parts of a row beside this one
    features, ring = 2 * (heads // ranks) * attention.head_dim, parallel.context.transport == "ring"
    wide = torch.promote_types(parallel.compute, torch.float32).itemsize if ring else element
    calls, received = where(others > 0, others if ring else 1, 0) * groups, others * tokens * features * element
    for phase in ("forward", "backward"):
        yield AttentionMove(phase, "k·v", "receive" if ring else "all_to_all", owners, calls, received)
    gradients = received // element * wide // (1 if ring else 2)
    yield AttentionMove("backward", "dk·dv", "receive" if ring else "all_to_all", owners, calls, gradients)


_Tokens = tuple[str, str, str, int, int]  # phase, what, kind, calls, key/value tokens received


def _exchanged(route: ExchangeRoute) -> Iterator[_Tokens]:
    calls = int(route.moves)
    for phase in ("forward", "backward"):
        yield phase, "k·v", "all_to_all", calls, sum(route.received)
    yield "backward", "dk·dv", "all_to_all", calls, sum(route.sizes_sent)


def _along_ring(route: RingRoute) -> Iterator[_Tokens]:
    coming = [length(hop.round.keys) for hop in route.hops if hop.round.keys]
    for phase in ("forward", "backward"):
        yield phase, "k·v", "send", sum(bool(hop.passed) for hop in route.hops), 0
        yield phase, "k·v", "receive", len(coming), sum(coming)
    # of the first round on the way there are no sums yet
    sums = [length(hop.round.keys) for hop in route.hops[1:] if hop.round.keys]
    sums += [length(hop.home) for hop in route.hops if hop.home]
    yield "backward", "dk·dv", "send", sum(bool(hop.on) + bool(hop.ended) for hop in route.hops), 0
    yield "backward", "dk·dv", "receive", len(sums), sum(sums)


def query_heads_on(attention: Attention, parallel: Parallel) -> Any:
    """The query heads of a rank, before any are traded for tokens."""
    return attention.heads // parallel.mesh.size(parallel.attention.features)


def kv_heads_on(attention: Attention, parallel: Parallel) -> Any:
    """The key and value heads that this rank's queries read."""
    local = query_heads_on(attention, parallel)
    if isinstance(parallel.mesh, ManyMeshes):  # the first rank's
        return rounded_up(local, attention.heads // attention.kv_heads)
    first = parallel.mesh.index(parallel.attention.features) * local
    return len(kv_heads_of(range(first, first + local), attention.heads, attention.kv_heads))


def traded_kv_heads(attention: Attention, parallel: Parallel) -> Any:
    """The same as they are traded for tokens: each repeated, so that the ranks along ulysses get equally many; in
    groups those of all groups together."""
    ranks, heads = parallel.mesh.sizes["ulysses"], kv_heads_on(attention, parallel)
    queries = query_heads_on(attention, parallel)
    if isinstance(parallel.mesh, ManyMeshes):
        chunks = parallel.context.chunks
        return chunks * common_multiple(rounded_up(queries // chunks, queries // heads), ranks)
    each = queries // (parallel.context.chunks if ranks > 1 else 1)
    read = [len(kv_heads_of(range(first, first + each), queries, heads)) for first in range(0, queries, each)]
    return sum(count * repeats(count, ranks) for count in read)
