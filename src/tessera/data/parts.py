"""The part of a data set that is read: `split: train[10%:50%]`, and one of `shards`."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from tessera.core.errors import UserError
from tessera.data.formats.entry import Entry

T = TypeVar("T")


class Part(NamedTuple):
    """Rows first, first + step, … of a file, below last (None: to its end); by default all."""

    first: int = 0
    last: int | None = None
    step: int = 1

    def of(self, rows: Iterator[T]) -> Iterator[T]:
        """Those of `rows` that belong to the part; what lies behind it is not read."""
        for number, row in enumerate(rows):
            if self.last is not None and number >= self.last:
                return
            if number >= self.first and (number - self.first) % self.step == 0:
                yield row


class Slice(NamedTuple):
    """The rows [start, stop) of a split, each a number of rows or, with `percent`, of hundredths; None: to the end."""

    start: tuple[int, bool] | None
    stop: tuple[int, bool] | None

    def bounds(self, total: int) -> tuple[int, int]:
        """The first row and the one behind the last, of `total`; percentages are rounded to the nearest row."""
        first, last = (
            default if bound is None else round(bound[0] * total / 100) if bound[1] else bound[0]
            for bound, default in ((self.start, 0), (self.stop, total))
        )
        first, last = (total + place if place < 0 else place for place in (first, last))
        return min(max(first, 0), total), min(max(last, 0), total)


_SPLIT = re.compile(r"[\w.-]+(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


def slice_of(entry: Entry) -> Slice | None:
    """The slice in `split`; None where it has none. UserError: it cannot be read, or `shards` do not fit."""
    found = _SPLIT.fullmatch(entry.split or "train")
    if found is None:
        raise UserError("datasets.split", entry.split, "cannot be read", "a name, or a slice such as train[:10%]")
    if entry.shards is not None and not 0 <= entry.shards_idx < entry.shards:
        raise UserError("datasets.shards_idx", entry.shards_idx, f"there are {entry.shards} shards", "0, 1, …")
    if entry.shards is None and entry.shards_idx:
        raise UserError("datasets.shards_idx", entry.shards_idx, "says which of `shards`, which is not given")
    if "[" not in (entry.split or ""):
        return None
    start, start_percent, stop, stop_percent = found.groups()
    return Slice(
        None if start is None else (int(start), bool(start_percent)),
        None if stop is None else (int(stop), bool(stop_percent)),
    )


def parts_of(entry: Entry, counts: Sequence[int]) -> list[Part | None]:
    """The part of each file, of which `counts` has the rows, that `split` and `shards` leave; None: no row of it."""
    chosen, total = slice_of(entry), sum(counts)
    first, last = chosen.bounds(total) if chosen else (0, total)
    step, parts, before = entry.shards or 1, [], 0
    for count in counts:
        start = max(first + entry.shards_idx, before)
        start += -(start - first - entry.shards_idx) % step  # the first of the shard's rows from there on
        stop = min(last, before + count)
        parts.append(Part(start - before, stop - before, step) if start < stop else None)
        before += count
    return parts
