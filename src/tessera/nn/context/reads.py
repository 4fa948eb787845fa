"""Which tokens' keys and values a rank needs of each other one: those that its attention tiles read, and no more."""

from bisect import bisect_right
from collections.abc import Sequence

from tessera.nn.context.assign import Chunk


def reads(
    owned: Sequence[Sequence[Chunk]], bounds: Sequence[int], window: int | None = None
) -> tuple[tuple[tuple[Chunk, ...], ...], ...]:
    """reads(...)[reader][owner]: the tokens that `owner` owns and that the reader's causal attention tiles read.

    `owned` has the chunks of each owner, ascending, as `assign` makes them; `bounds` the first token of each document,
    and the number of tokens at the end. A query sees the keys of its document up to itself, of these the last `window`.
    Ranges are ascending, and empty of the reader itself. E.g. one document of 8 tokens, owned (0, 2) (6, 8) and
    (2, 6): the first reads (2, 6), the second (0, 2).
    """
    pieces = sorted((first, end, owner) for owner, chunks in enumerate(owned) for first, end in chunks)
    starts = [first for first, _, _ in pieces]
    table: list[list[list[Chunk]]] = [[[] for _ in owned] for _ in owned]
    for reader, chunks in enumerate(owned):
        held = 0  # where the reader's previous chunk ends: what is read before that is in an earlier chunk's reach
        for first, end in chunks:
            begin = max(held, bounds[bisect_right(bounds, first) - 1], 0 if window is None else first - window + 1)
            held, piece = end, bisect_right(starts, begin) - 1
            while begin < first:
                _, stop, owner = pieces[piece]
                _append(table[reader][owner], begin, stop)
                begin, piece = stop, piece + 1
    return tuple(tuple(tuple(ranges) for ranges in row) for row in table)


def _append(ranges: list[Chunk], first: int, end: int) -> None:
    """Add a range after others, merged with one that ends where it begins."""
    if ranges and ranges[-1][1] == first:
        first = ranges.pop()[0]
    ranges.append((first, end))
