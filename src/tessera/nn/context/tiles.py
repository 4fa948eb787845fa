"""Tiles: attention's mask as triangles, rectangles and bands, computed on the host from the documents' bounds.

Of a stream of documents, the side of the queries and that of the keys hold chunks. Between a run of queries and the
keys before it lies a rectangle that needs no mask, for both are of one document; a run of queries meets its own keys in
a triangle. With a window, queries come in blocks of its length: a block sees a triangle of its own keys and, of those
before it, a band, which is a triangle upside down. So no kernel makes a mask of whole rows, and each query of a tile
sees a key of it.

    keys     0 1 2 3 4 5    a document of 6, a window of 3
    query 0  t              t: two triangles, queries 0-2 and 3-5, each with its own keys
    query 1  t t
    query 2  t t t
    query 3    b b t        b: the band of the second block, queries 3-4 with keys 1-2
    query 4      b t t
    query 5        t t t
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

Chunk = tuple[int, int]
"""The tokens `first` … `end` - 1 of a stream."""


class Tile(NamedTuple):
    """Queries `q0` … `q1` - 1 that meet keys `k0` … `k1` - 1, counted in what each side holds.

    `causal`: a query does not see the keys after itself. `behind`: by how many tokens of the stream key `k0` is behind
    query `q0`. `window`: keys that many tokens behind a query, or more, are hidden; None: the window hides none here.
    `tiles` makes three forms. A rectangle hides nothing. A triangle is causal: queries with their own keys, `behind` 0.
    A band has a window and as many queries as keys: its first query sees all keys, each next one a key less.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    behind: int
    window: int | None


class _Run(NamedTuple):
    """A chunk, and where it lies in what a side holds."""

    first: int
    end: int
    at: int


def _runs(chunks: Iterable[Chunk]) -> list[_Run]:
    """The chunks in the order in which they are held; neighbours of the stream that lie side by side are one."""
    found: list[_Run] = []
    at = 0
    for first, end in chunks:
        if found and found[-1].end == first:
            found[-1] = found[-1]._replace(end=end)
        elif first < end:
            found.append(_Run(first, end, at))
        at += end - first
    return found


def _pieces(run: _Run, bounds: Sequence[int], window: int | None) -> Iterator[tuple[int, int, int]]:
    """The run cut at documents and into blocks of the window's length: start of the document, first token, end."""
    first = run.first
    while first < run.end:
        document = bisect_right(bounds, first)
        end = min(run.end, bounds[document])
        for a in range(first, end, window or end - first):
            yield bounds[document - 1], a, end if window is None else min(end, a + window)
        first = end


def _rectangle(q0: int, q1: int, k0: int, k1: int) -> Iterator[Tile]:
    if q0 < q1 and k0 < k1:
        yield Tile(q0, q1, k0, k1, False, q0 - k0, None)


def _pairs(a: int, b: int, c: int, d: int, window: int | None) -> Iterator[Tile]:
    """The tiles of queries `a` … `b` - 1, a block of one document, and keys `c` … `d` - 1, each seen by some of them.

    All are counted in the stream.
    """
    own = max(a, c)
    if own < d:
        yield Tile(own, d, own, d, True, 0, None)
        yield from _rectangle(d, b, own, d)
    end = min(d, a)  # of the keys before the block
    near = c if window is None else min(max(c, b - window), end)  # the first key that the last query sees
    yield from _rectangle(a, b, near, end)
    if window is not None and c < near:
        last = near - 1 + window  # the first query that sees none of the others; the one before it sees one
        whole = last - (near - c) if near - c > 1 else last  # the first query that does not see all of them
        yield from _rectangle(a, whole, c, near)
        if whole < last:
            yield Tile(whole, last, c, near, False, whole - c, window)


def tiles(
    queries: Sequence[Chunk], keys: Sequence[Chunk], bounds: Sequence[int], window: int | None = None
) -> list[Tile]:
    """The tiles in which `queries` see `keys`: every visible pair of the two sides lies in one of them, no other pair.

    `queries` and `keys` are the chunks that each side holds, one after another, in any order; no token twice. `bounds`
    has the first token of each document, and the stream's length at the end. A query sees the keys of its document up
    to itself, with a `window` those fewer than so many tokens behind it. Triangles come first. Raises ValueError for a
    window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a query sees at least itself, so that the window is at least 1")
    held = sorted(_runs(keys))
    ends = [run.end for run in held]
    found = []
    for run in _runs(queries):
        for start, a, b in _pieces(run, bounds, window):
            low = start if window is None else max(start, a - window + 1)
            for key_run in held[bisect_right(ends, low) :]:
                if key_run.first >= b:
                    break
                q, k = run.at - run.first, key_run.at - key_run.first  # from the stream to what the sides hold
                for tile in _pairs(a, b, max(key_run.first, low), min(key_run.end, b), window):
                    found.append(tile._replace(q0=tile.q0 + q, q1=tile.q1 + q, k0=tile.k0 + k, k1=tile.k1 + k))
    triangles = [tile for tile in found if tile.causal]
    bands = [tile for tile in found if tile.window is not None]
    return triangles + _joined([tile for tile in found if not tile.causal and tile.window is None]) + bands


def _joined(dense: list[Tile]) -> list[Tile]:
    """Rectangles that lie side by side as one: first those of the same queries, then those of the same keys."""
    tall: list[Tile] = []
    for tile in sorted(dense, key=lambda tile: (tile.q0, tile.q1, tile.k0)):
        if tall and (tall[-1].q0, tall[-1].q1, tall[-1].k1) == (tile.q0, tile.q1, tile.k0):
            tall[-1] = tall[-1]._replace(k1=tile.k1)
        else:
            tall.append(tile)
    wide: list[Tile] = []
    for tile in sorted(tall, key=lambda tile: (tile.k0, tile.k1, tile.q0)):
        if wide and (wide[-1].k0, wide[-1].k1, wide[-1].q1) == (tile.k0, tile.k1, tile.q0):
            wide[-1] = wide[-1]._replace(q1=tile.q1)
        else:
            wide.append(tile)
    return wide


def _ramp(first: int, count: int) -> int:
    """max(0, first) + max(0, first + 1) + …, `count` of them."""
    low, last = max(first, 1), first + count - 1
    return (low + last) * (last - low + 1) // 2 if last >= low else 0


def area(tile: Tile) -> int:
    """The pairs of a query and a key that it sees."""
    queries, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    later = _ramp(keys - tile.behind - queries, queries) if tile.causal else 0
    return queries * keys - later - (0 if tile.window is None else _ramp(tile.behind - tile.window + 1, queries))


def visible(bounds: Sequence[int], window: int | None = None) -> int:
    """The pairs of all tiles of a stream: l(l + 1)/2 for each document of l tokens, and what a window leaves of it."""
    found = 0
    for start, end in pairwise(bounds):
        far = 0 if window is None else max(0, end - start - window)  # queries with a key out of the window
        found += (end - start) * (end - start + 1) // 2 - far * (far + 1) // 2
    return found


def blocks(tile: Tile, queries: int, keys: int) -> Iterator[Tile]:
    """The tile in blocks of at most `queries` x `keys`, counted from its own first query and key.

    No query of a block sees nothing there. A causal block may have `behind` above 0, and a window too.
    """
    m, n = tile.q1 - tile.q0, tile.k1 - tile.k0
    for k0 in range(0, n, keys):
        k1 = min(k0 + keys, n)
        for q0 in range(0, m, queries):
            q1, behind = min(q0 + queries, m), tile.behind + q0 - k0
            if tile.causal and behind < 0:  # the first queries are before all keys
                q0, behind = q0 - behind, 0
            if tile.window is not None:  # the last ones are too far behind all keys
                q1 = min(q1, q0 + tile.window + k1 - k0 - 1 - behind)
            if q0 < q1:
                hides = tile.window is not None and behind + q1 - q0 > tile.window
                causal = tile.causal and k1 - k0 - 1 > behind
                yield Tile(q0, q1, k0, k1, causal, behind, tile.window if hides else None)
