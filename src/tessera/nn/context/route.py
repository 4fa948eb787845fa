"""What moves between the owners of one stream, and which tiles each computes, as whole numbers of the host.

Both transports bring key/value tokens in rounds, the owner's own ones first. A round is the chunks of the stream that
it has, and the tiles of the owner's queries against them. Every owner makes every other's plan from the same stream, so
no rank asks another what it needs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise

from tessera.data.batch import Stream
from tessera.layout.parallel import Parallel
from tessera.nn.context.reads import reads
from tessera.nn.context.tiles import Chunk, Tile, tiles


@dataclass(frozen=True)
class Round:
    """Key/value tokens that are there together, by their chunks of the stream, and the tiles against them."""

    keys: tuple[Chunk, ...]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class ExchangeRoute:
    """One all-to-all: `sent` are slices of this owner's tokens, rank by rank; `own` and `others` the two rounds.

    `order` are slices of what arrives, rank by rank, as they follow each other in the stream: keys that are neighbours
    there become one tile.
    """

    own: Round
    others: Round
    sent: tuple[tuple[Chunk, ...], ...]
    received: tuple[int, ...]
    order: tuple[Chunk, ...]
    moves: bool
    """Whether any owner reads what another has: if none does, nobody calls."""

    @property
    def sizes_sent(self) -> list[int]:
        return [length(part) for part in self.sent]


@dataclass(frozen=True)
class Hop:
    """One step around the ring.

    `passed` are slices of the round before that go on to the next owner; `round` what arrives meanwhile.
    In the backward `ended` are the slices of `round` that nobody further on reads: their gradients go home from here,
    those of the slices `on` go on; `home` are the slices of this owner's own tokens whose gradients come home now.
    """

    round: Round
    passed: tuple[Chunk, ...]
    ended: tuple[Chunk, ...]
    on: tuple[Chunk, ...]
    home: tuple[Chunk, ...]


@dataclass(frozen=True)
class RingRoute:
    """The owner's own round, then those that arrive hop by hop from the owner before it."""

    own: Round
    hops: tuple[Hop, ...]


Route = ExchangeRoute | RingRoute


def route_of(stream: Stream, parallel: Parallel, window: int | None) -> Route:
    """What this rank moves and computes of `stream` in a layer whose queries see `window` tokens."""
    owner = parallel.mesh.index(parallel.owners)
    made = ring_route if parallel.context.transport == "ring" else exchange_route
    return made(stream, owner, window)


def exchange_route(stream: Stream, owner: int, window: int | None) -> ExchangeRoute:
    """What owner number `owner` sends and receives at once, for a layer whose queries see `window` tokens."""
    needed = reads(stream.owned, stream.bounds, window)
    mine = stream.owned[owner]
    placed = sorted(_places(list(chain.from_iterable(needed[owner]))))
    keys = tuple(chunk for chunk, _ in placed)
    return ExchangeRoute(
        _round(mine, mine, stream, window),
        _round(mine, keys, stream, window),
        tuple(_slices(mine, reader[owner]) for reader in needed),
        tuple(map(length, needed[owner])),
        tuple(at for _, at in placed),
        any(chain.from_iterable(needed)),
    )


def ring_route(stream: Stream, owner: int, window: int | None) -> RingRoute:
    """What passes through owner number `owner`: tokens travel as far as somebody reads them, and no further."""
    needed, ranks = reads(stream.owned, stream.bounds, window), len(stream.owned)
    mine = stream.owned[owner]
    distances = (
        (reader - source) % ranks for reader, row in enumerate(needed) for source, read in enumerate(row) if read
    )
    furthest = max(distances, default=0)

    @cache
    def travelling(source: int, distance: int) -> tuple[Chunk, ...]:
        """The tokens of `source` that the owner so many places further on, or one behind it, reads."""
        readers = (needed[(source + far) % ranks][source] for far in range(distance, ranks))
        return _joined(chain.from_iterable(readers))

    hops = []
    for distance in range(1, furthest + 1):
        source, before = (owner - distance) % ranks, (owner - distance + 1) % ranks
        keys, on = travelling(source, distance), travelling(source, distance + 1)
        held = mine if distance == 1 else travelling(before, distance - 1)
        hops.append(
            Hop(
                _round(mine, keys, stream, window),
                _slices(held, travelling(before, distance)),
                _slices(keys, _without(keys, on)),
                _slices(keys, on),
                _slices(mine, _without(travelling(owner, distance), travelling(owner, distance + 1))),
            )
        )
    return RingRoute(_round(mine, mine, stream, window), tuple(hops))


def length(chunks: Iterable[Chunk]) -> int:
    """The tokens of all chunks."""
    return sum(end - first for first, end in chunks)


def _round(mine: Sequence[Chunk], keys: Sequence[Chunk], stream: Stream, window: int | None) -> Round:
    return Round(tuple(keys), tuple(tiles(mine, keys, stream.bounds, window)))


def _places(chunks: Sequence[Chunk]) -> list[tuple[Chunk, Chunk]]:
    """Each chunk, and where its tokens are when the chunks lie one behind another."""
    edges = accumulate((end - first for first, end in chunks), initial=0)
    return list(zip(chunks, pairwise(edges), strict=True))


def _slices(held: Sequence[Chunk], wanted: Iterable[Chunk]) -> tuple[Chunk, ...]:
    """Where the `wanted` chunks of the stream are in what `held` has, one chunk behind another."""
    found: list[Chunk] = []
    places = _places(held)
    for first, end in wanted:
        for (begin, limit), (at, _) in places:
            low, high = max(first, begin), min(end, limit)
            if low < high:
                start, stop = at + low - begin, at + high - begin
                if found and found[-1][1] == start:
                    start = found.pop()[0]
                found.append((start, stop))
    return tuple(found)


def _joined(chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
    """The tokens that are in any of these chunks, ascending."""
    joined: list[Chunk] = []
    for first, end in sorted(chunks):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((first, end))
    return tuple(joined)


def _without(chunks: Iterable[Chunk], taken: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """The tokens of `chunks` that are in none of `taken`; both ascend."""
    left: list[Chunk] = []
    for first, end in chunks:
        for begin, stop in taken:
            if first < min(begin, end):
                left.append((first, min(begin, end)))
            first = max(first, min(stop, end))
        if first < end:
            left.append((first, end))
    return tuple(left)
