"""What is alive while ranks that share sequences run attention backward, as nn/context/ goes on.

q, kv and k are bytes in the compute dtype: of this rank's queries, of its keys with its values, and of those of one
round; w says how much larger sums are, in float32 or wider. Held at once, beside the gradients of q as they grow, w q:

    a round       k there; its gradients w k, and those of the round before until these are done; those of two tiles
    ring          the next k on its way; the round's sums w k, those that came w k, the next ones w k, those sent w k
    exchange      all k of others, twice where they are put in the stream's order; sums of the own tokens w kv and of
                  others' w k; at the end others' as they go home k, and what comes home
    in groups     the group's q, k·v, its result and the gradient of that, and gradients of the group before

What others have, and when, are the numbers of nn/context/route.py, by which the run moves. Candidates' arrays have rows
of one document each, for which the numbers are those of the first rank in closed form.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tessera.core.arrays import common_divisor, larger, smaller, where
from tessera.data.batch import Stream
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.anatomy import Attention
from tessera.nn.context.route import Hop, RingRoute, length, route_of
from tessera.nn.context.tiles import Chunk, Tile
from tessera.plan.ledger import Ledger


class Round(NamedTuple):
    """Bytes of one round of keys and values that came from others, in the compute dtype.

    `keys`: they themselves; `tiles`: the most that the gradients of two tiles one after another take; `joined`: copies
    of what is sent so that they come; `ordered`: their copy in the order of the stream; `leaving`: copies of slices of
    their gradients; `home`: the gradients of own tokens that come home meanwhile.
    """

    keys: Any = 0
    tiles: Any = 0
    joined: Any = 0
    ordered: Any = 0
    leaving: Any = 0
    home: Any = 0


Rounds = tuple[Any, list[Round]]
"""The bytes of two tiles of the own keys, and the rounds that come."""


def shared_backward(
    ledger: Ledger,
    attention: Attention,
    sizes: tuple[Any, Any, Any],
    wide: int,
    shape: StepShape,
    parallel: Parallel,
    streams: Sequence[Stream],
) -> Any:
    """Heads are traded, keys and values come and their gradients go; what is held of it then, dq and dkv.

    `sizes` are the bytes of q, of k·v, and of k·v as traded. `streams`: of each micro-batch that of this rank; none for
    candidates' arrays.
    """
    groups = parallel.context.chunks if parallel.mesh.present(("ulysses",)) else 1
    q, kv, kv_traded = sizes
    q_part, kv_part = q // groups, kv_traded // groups
    found = [_rounds(attention, stream, q_part, kv_part, parallel) for stream in streams]
    for rounds in found or [_whole_rows(q_part, kv_part, shape, parallel)]:
        with ledger.passing():
            if groups > 1:
                _in_groups(ledger, q, kv, q_part, kv_part, wide, rounds, parallel)
            else:
                # the gradient of the result is copied and traded; what came takes its place
                ledger.touch(2 * q * where(parallel.mesh.sizes["ulysses"] > 1, 1, 0))
                _pass(ledger, q, kv_traded, wide, rounds, parallel)
    made = ledger.hold(q + kv_traded)
    ledger.touch(2 * kv_traded * where(parallel.mesh.sizes["ulysses"] > 1, 1, 0))
    return made


def _in_groups(
    ledger: Ledger, q: Any, kv: Any, q_part: Any, kv_part: Any, wide: int, rounds: Rounds, parallel: Parallel
) -> None:
    """The second group of heads, while what the first one has found is still there."""
    ledger.touch(q + kv)
    ledger.hold(q + kv * wide)  # the gradients of all groups
    ledger.hold(q_part + kv_part)  # the group before's, beside its keys and values and its result's until these come
    results = ledger.hold(2 * q_part)
    before = ledger.hold(2 * q_part + kv_part)
    ledger.touch(4 * q_part)  # stacked, copied and traded
    ledger.drop(results)
    ledger.touch(2 * kv_part)
    ledger.hold(kv_part)
    ledger.drop(before - results)
    ledger.touch(q_part)
    ledger.hold(q_part)
    _pass(ledger, q_part, kv_part, wide, rounds, parallel)
    ledger.touch(2 * kv_part)


def _pass(ledger: Ledger, q: Any, kv: Any, wide: int, rounds: Rounds, parallel: Parallel) -> None:
    """One pass over all rounds, backward; dq and dkv are held afterwards."""
    with ledger.passing():
        ledger.hold(q * wide)
        (_ring if parallel.context.transport == "ring" else _exchange)(ledger, q, kv, wide, rounds)
        ledger.touch(kv * (wide > 1))  # in the compute dtype
    ledger.hold(q + kv)


def _ring(ledger: Ledger, q: Any, kv: Any, wide: int, rounds: Rounds) -> None:
    """nn/context/ring.py: of the sums that came, those that go on are held until the next have been added up."""
    tiles, coming = rounds
    ends = [*coming, Round()]
    ledger.hold(ends[0].joined)
    ledger.hold(ends[0].keys, "gathered")
    before = ledger.hold(kv * wide)  # gradients of a round; stacked they are its sums
    ledger.touch(tiles)
    ledger.hold(kv * wide)
    for place, (here, following) in enumerate(pairwise(ends)):
        last = ends[place - 1] if place else Round()
        ledger.drop(here.joined)
        ledger.hold(following.joined)
        ledger.hold(following.keys, "gathered")
        ledger.drop(last.keys, "gathered")
        made = ledger.hold(here.keys * wide)
        ledger.touch(here.tiles)
        # after the last round of an array's candidate nothing replaces what it has made
        replaced = where(here.keys > 0, before, 0)
        ledger.drop(replaced)
        before = made + before - replaced
        ledger.hold(here.keys * wide)
        ledger.drop((last.keys + last.leaving) * wide)  # sent
        ledger.hold((following.keys + here.home + here.leaving) * wide)
        ledger.drop(here.keys * wide * (place > 0))  # which came, and are added
    ledger.hold(q * (wide > 1))


def _exchange(ledger: Ledger, q: Any, kv: Any, wide: int, rounds: Rounds) -> None:
    """nn/context/exchange.py: one round has all that comes from others."""
    tiles, coming = rounds
    others = coming[0] if coming else Round()
    joined = ledger.hold(others.joined)
    ledger.hold(others.keys, "gathered")
    ledger.drop(joined)
    own = ledger.hold(kv * wide)
    ledger.touch(tiles)
    ledger.hold(kv * wide)
    if coming:
        ledger.hold(others.ordered, "gathered")
        ledger.hold(others.keys * wide)
        ledger.touch(others.tiles)
        ledger.drop(own * where(others.keys > 0, 1, 0))
        ledger.hold(others.keys * wide)
        ledger.drop(others.ordered, "gathered")
    ledger.hold(q * (wide > 1))
    ledger.touch(others.keys + others.home)


def _rounds(attention: Attention, stream: Stream, q: Any, kv: Any, parallel: Parallel) -> Rounds:
    """The rounds of a stream as this rank runs them."""
    route = route_of(stream, parallel, attention.window)
    tokens = length(route.own.keys)

    def size(chunks: Sequence[Chunk]) -> int:
        return int(kv * length(chunks) // tokens)

    def copied(*parts: Sequence[Chunk]) -> int:
        return sum(size(chunks) for chunks in parts if len(chunks) > 1)

    def of_hop(hop: Hop) -> Round:
        keys, tiles = size(hop.round.keys), two_tiles(hop.round.tiles, q, kv, tokens)
        return Round(keys, tiles, copied(hop.passed), 0, copied(hop.on, hop.ended), size(hop.home))

    own = two_tiles(route.own.tiles, q, kv, tokens)
    if isinstance(route, RingRoute):
        return own, [of_hop(hop) for hop in route.hops]
    sent = [part for reader in route.sent for part in reader]
    keys, tiles = size(route.others.keys), two_tiles(route.others.tiles, q, kv, tokens)
    others = Round(keys, tiles, copied(sent), copied(route.order), 0, size(sent))
    return own, [others] if route.moves else []


def two_tiles(tiles: Sequence[Tile], q: Any, kv: Any, tokens: int) -> int:
    """The most that gradients of two tiles one after another take: the last one's are held until the next are made.

    q and kv are the bytes of `tokens`. A band's operands and gradients are turned, each into a copy.
    """
    most = before = 0
    for tile in tiles:
        of_q, of_kv = q * (tile.q1 - tile.q0) // tokens, kv * (tile.k1 - tile.k0) // tokens
        turned = 0 if tile.window is None else 4 * of_q + 2 * of_kv
        most, before = max(most, before + of_q + of_kv + turned), of_q + of_kv
    return most


def _whole_rows(q: Any, kv: Any, shape: StepShape, parallel: Parallel) -> Rounds:
    """The rounds where each row is one document, cut in zigzag: the first owner reads all that others have of it."""
    mesh, owners = parallel.mesh, parallel.mesh.size(parallel.owners)
    rows = shape.batch // (1 if parallel.context.joined else mesh.size(parallel.attention.tokens))
    others = owners // common_divisor(owners, rows) - 1  # that own parts of a row
    each = larger(1, rows // owners)
    own = (q + kv) * smaller(2, each) // each
    if parallel.context.transport != "ring":
        keys = others * kv
        several = where(others > 1, keys, 0)
        return own, [Round(keys, where(others > 0, q // 2 + keys, 0), several // 2, several, 0, keys // 2)]
    # the third stands for all later ones; gradients come home in the last
    hops = []
    for place in (1, 2, 3):
        there = where(others >= place, 1, 0)
        last = there if place == 3 else where(others == place, 1, 0)
        hops.append(Round(kv * there, (q // 2 + kv) * there, home=kv // 2 * last))
    return own, hops
