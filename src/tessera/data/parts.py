"""The part of a data set that is read: `split: train[10%:50%]`, and one of `shards`."""

import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

from tessera.core.errors import UserError
from tessera.data.formats.entry import Entry

T = TypeVar("T")


class Part(NamedTuple):
    """Rows first, …, below last (None: to its end) of a file; by default all."""

    first: int = 0
    last: int | None = None

    def of(self, rows: Iterator[T]) -> Iterator[T]:
        """Those of `rows` that belong to the part; what lies behind it is not read."""
        return islice(rows, self.first, self.last)

    def rows(self, count: int) -> int:
        """How many it has of a file of `count` rows."""
        return max(0, (count if self.last is None else min(count, self.last)) - self.first)


class Slice(NamedTuple):
    """The rows [start, stop) of a split, each a number of rows or, with `percent`, of hundredths; None: to the end."""

    start: tuple[int, bool] | None = None
    stop: tuple[int, bool] | None = None

    @property
    def needs_total(self) -> bool:
        """Whether its rows depend on how many there are."""
        return any(bound is not None and (bound[1] or bound[0] < 0) for bound in self)

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


def shard_of(first: int, last: int, shards: int, index: int) -> tuple[int, int]:
    """Part `index` of the rows [first, last), cut into `shards` that follow one another, the larger ones first.

    As `Dataset.shard` of the `datasets` library does.
    """
    size, larger = divmod(last - first, shards)
    start = first + size * index + min(index, larger)
    return start, start + size + (index < larger)


def parts_of(entry: Entry, files: int, count: Callable[[int, int | None], int]) -> list[Part | None]:
    """The part of each of so many files that `split` and `shards` leave; None: no row of it.

    `count` is given a file's number and a limit, and returns the rows that it has, at most so many: no more is read
    than is needed. E.g. train[:100] reads no file behind row 100, train[:10%] counts the rows of all.
    """
    chosen, counts = slice_of(entry) or Slice(), None
    if chosen.needs_total or entry.shards:
        counts = [count(file, None) for file in range(files)]
        first, last = chosen.bounds(sum(counts))
        if entry.shards:
            first, last = shard_of(first, last, entry.shards, entry.shards_idx)
    else:
        first, last = chosen.bounds(sys.maxsize)
    parts, before = list[Part | None](), 0
    for file in range(files):
        start, end = max(0, first - before), last - before
        # of the last file it is enough to know that the part has a row there
        decides = counts is not None or file < files - 1
        rows = counts[file] if counts is not None else count(file, max(0, end if decides else min(end, start + 1)))
        found = start < min(end, rows)
        parts.append(Part(start, min(end, rows) if decides else end) if found else None)
        before += rows
    return parts
