"""Whole samples packed into rows of a fixed length, and rows dealt to ranks, so that all are equally full.

Best fit decreasing (Johnson 1974) says how many rows the samples need. Then each sample, the longest first, goes into
the emptiest of so many rows (LPT, Graham 1969): as many rows, now equally full. Where they do not fit so, because
almost no room is left, the rows of best fit stay, and small samples move from full ones into the last, which are not;
or, if that does not fill them, half a per cent more rows give the room. Whole numbers and
nothing else decide.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

SPARE = 200
"""Samples of which some rows would stay far from full get one row more for so many."""


def pack(lengths: Ints, capacity: int) -> Ints:
    """The row of each sample, from 0 on: none has more than `capacity` tokens, none is empty.

    The number of rows follows from the lengths alone, in whatever order. ValueError: a sample is longer than a row.
    """
    if not len(lengths) or lengths.max() > capacity:
        raise ValueError(f"samples of {lengths.max(initial=0)} tokens do not go into rows of {capacity}")
    order = np.argsort(-lengths, kind="stable")
    falling: list[int] = lengths[order].tolist()
    tight = _best_fit(falling, capacity)
    found = np.empty(len(lengths), np.int64)
    found[order] = _balanced(falling, tight, capacity)
    return found


def _balanced(falling: Sequence[int], tight: Sequence[int], capacity: int) -> Sequence[int]:
    """The row of each sample, the longest first, in as many rows as `tight` has, or a few more."""
    count = max(tight) + 1
    if (spread := _emptiest(falling, count, capacity)) is not None:
        return spread
    evened, tokens = _evened(falling, tight, count, capacity)
    if min(tokens) >= sum(tokens) // count - 2 * capacity // 100:
        return evened
    return _emptiest(falling, count + count // SPARE, capacity) or evened


def _best_fit(falling: Sequence[int], capacity: int) -> list[int]:
    """The row of each sample, the longest first: the fullest that takes it, else a new one.

    Rows are found by the room that is left in them, and equal samples go into a row together: that is where the next
    one would go too.
    """
    rooms: list[int] = []  # in which rows of `held` lie, ascending
    held: dict[int, list[int]] = {}
    rows: list[int] = []
    opened, at, smallest = 0, 0, falling[-1]
    sizes, counts = np.unique(np.array(falling), return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect_left(rooms, size)
            if at == len(rooms):
                room, row = capacity, opened
                opened += 1
            else:
                room = rooms[at]
                row = held[room].pop()
                if not held[room]:
                    del rooms[at]
            placed = min(count, room // size)
            rows += [row] * placed
            count -= placed
            room -= placed * size
            if room >= smallest:
                there = held.setdefault(room, [])
                if not there:
                    insort(rooms, room)
                there.append(row)
    return rows


def _emptiest(falling: Sequence[int], count: int, capacity: int) -> list[int] | None:
    """The row of each sample, the longest first: the emptiest of `count`; None where that has no room for one."""
    rows = list(range(count))
    heap = [size * count + row for row, size in enumerate(falling[:count])]  # a row's tokens, and which it is
    heapify(heap)
    for size in falling[count:]:
        tokens, row = divmod(heap[0], count)
        if tokens + size > capacity:
            return None
        rows.append(row)
        heapreplace(heap, heap[0] + size * count)
    return rows


def _evened(falling: Sequence[int], rows: Sequence[int], count: int, capacity: int) -> tuple[list[int], list[int]]:
    """The same rows, where those far less full than most have got the smallest sample of others; and their tokens.

    A row gives one sample, the smallest of all rows first, as long as it stays nearly as full as the mean.
    """
    moved, tokens, smallest = list(rows), [0] * count, [0] * count
    for sample, row in enumerate(rows):
        tokens[row] += falling[sample]
        smallest[row] = sample
    mean = sum(tokens) // count
    givers = iter(sorted(range(count), key=lambda row: falling[smallest[row]]))
    for row in sorted(range(count), key=lambda row: tokens[row]):
        if tokens[row] >= mean - capacity // 100:
            break
        for giver in givers:
            size = falling[smallest[giver]]
            if tokens[row] + size > mean:
                break
            if tokens[giver] - size >= mean - capacity // 50:
                moved[smallest[giver]] = row
                tokens[row], tokens[giver] = tokens[row] + size, tokens[giver] - size
    return moved, tokens


def in_rows(rows: Ints) -> list[Ints]:
    """The samples of each row, ascending, where `rows` has each sample's row."""
    order, counts = np.argsort(rows, kind="stable"), np.bincount(rows)
    return np.split(order, np.cumsum(counts)[:-1])


def dealt(tokens: Ints, ranks: int) -> Ints:
    """Rows with so many tokens dealt to `ranks`, which divide their number: [ranks, rows of each], by their places.

    The fullest go first, to one rank after another and then back again, so that ranks come to be equally full.
    """
    hands = np.argsort(-tokens, kind="stable").reshape(-1, ranks)
    hands[1::2] = hands[1::2, ::-1]
    return hands.T
