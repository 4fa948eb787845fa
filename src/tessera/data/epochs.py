"""The rows of endless epochs: one sample each, or whole samples packed into rows of a fixed length.

Which samples a row holds is a pure function of the data, the seed and the row's number; any row is found without those
before it. Packing works in windows: WINDOW consecutive samples of the epoch's order are packed by themselves (the last
window has what is left too), so that a row costs a window, whatever the size of the data. How many rows the windows of
an epoch make is counted from their lengths, once; to count costs what packing does, 20 ms a window, so that ranks of a
run share it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from tessera.data.order import Permutation
from tessera.data.pack import Ints, in_rows, pack
from tessera.data.samples import EPOCH_ORDER, Samples, shuffled

Unit = Literal["sample", "row"]

ORDER = 2
"""The version of the order that new runs use. 1: a sorted draw of the corpus' size. 2: `Permutation`, and packing."""

WINDOW = 2**14
FULLNESS = 100
"""Rows of a window are ordered by how full they are, in hundredths of a row, and otherwise at random."""


class Epochs(Protocol):
    """Rows, counted from 0 over all epochs. `unit` is what is counted: samples, or rows of packed samples."""

    unit: Unit
    version: int

    def rows_in(self, epoch: int) -> int:
        """The rows of an epoch."""

    def rows_before(self, epoch: int) -> int:
        """The rows of all epochs before this one."""

    def place(self, row: int) -> tuple[int, int]:
        """The epoch of a row, and its place in there."""

    def samples(self, row: int) -> list[int]:
        """The samples that a row holds, by their number in the data."""


class Singles:
    """Every sample is a row, in an order drawn from (`seed`, epoch) or, without `shuffle`, that of the data."""

    unit: Unit = "sample"

    def __init__(self, count: int, seed: int, shuffle: bool, version: int = ORDER) -> None:
        if version not in (1, 2):
            raise ValueError(f"order {version} is none of 1 and 2")
        self.version = version
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._drawn = lru_cache(maxsize=2)(self._draw)  # a step touches at most a few epochs

    def rows_in(self, epoch: int) -> int:
        return self._count

    def rows_before(self, epoch: int) -> int:
        return epoch * self._count

    def place(self, row: int) -> tuple[int, int]:
        return divmod(row, self._count)

    def samples(self, row: int) -> list[int]:
        epoch, place = self.place(row)
        return [int(self._drawn(epoch)[place]) if self._shuffle else place]

    def _draw(self, epoch: int) -> Permutation | Ints:
        seed = EPOCH_ORDER, self._seed, epoch
        return shuffled(self._count, *seed) if self.version == 1 else Permutation(self._count, *seed)


class Packed:
    """Whole samples in rows of at most `length` tokens, in an order as that of `Singles`.

    Neighbouring rows are about equally full: those of even windows come the emptiest first, of odd ones the fullest.
    Without `shuffle` the rows of a window come in the order of their first samples.
    """

    unit: Unit = "row"
    version = ORDER

    def __init__(self, samples: Samples, length: int, seed: int, shuffle: bool, window: int = WINDOW) -> None:
        self._samples, self.length = samples, length
        self._seed, self._shuffle, self._window = seed, shuffle, window
        self._windows = max(1, len(samples) // window)
        self._before = [0]  # the rows of so many epochs
        self._starts: list[Ints] = []  # for each of these epochs, the row with which each window begins
        self._rows = lru_cache(maxsize=4)(self._pack)

    def rows_in(self, epoch: int) -> int:
        return self.rows_before(epoch + 1) - self.rows_before(epoch)

    def rows_before(self, epoch: int) -> int:
        if self._windows == 1:  # the same lengths in every epoch
            return epoch * int(self._count(0)[-1])
        for one in range(len(self._before) - 1, epoch):
            self._before.append(self._before[-1] + int(self._count(one)[-1]))
        return self._before[epoch]

    def place(self, row: int) -> tuple[int, int]:
        if self._windows == 1:
            return divmod(row, self.rows_before(1))
        while self._before[-1] <= row:
            self.rows_before(len(self._before))
        epoch = bisect_right(self._before, row) - 1
        return epoch, row - self._before[epoch]

    def samples(self, row: int) -> list[int]:
        epoch, place = self.place(row)
        starts = self._count(0 if self._windows == 1 else epoch)
        window = int(np.searchsorted(starts, place, "right")) - 1
        return self._rows(epoch, window)[place - int(starts[window])].tolist()

    @property
    def counted(self) -> int:
        """How many epochs are counted; all have as many rows where there is one window."""
        return len(self._starts)

    def counts_epoch(self, epoch: int) -> bool:
        """Whether the rows of `epoch` are counted."""
        return self.counted > (0 if self._windows == 1 else epoch)

    def counts_row(self, row: int) -> bool:
        """Whether the epoch of `row` is counted."""
        return self.counted > 0 and (self._windows == 1 or self.rows_before(self.counted) > row)

    def count_windows(self, epoch: int, share: int = 0, shares: int = 1) -> list[int]:
        """The rows of each window of an epoch or, of `shares` who take turns, of the windows of one."""
        windows = range(share, self._windows, shares)
        return [int(self._row_of(self._window_of(epoch, window)).max()) + 1 for window in windows]

    def take_counts(self, counts: Sequence[Sequence[int]]) -> None:
        """The rows of the first epoch that is not counted, by what `count_windows` gave to every share."""
        rows = np.empty(self._windows, np.int64)
        for share, own in enumerate(counts):
            rows[share :: len(counts)] = own
        self._starts.append(np.cumsum([0, *rows]))

    def _count(self, epoch: int) -> Ints:
        """The place in the epoch at which each window's rows begin, and the number of them all."""
        for one in range(self.counted, epoch + 1):
            self.take_counts([self.count_windows(one)])
        return self._starts[epoch]

    def _window_of(self, epoch: int, window: int) -> Ints:
        """The samples of a window, in the epoch's order."""
        first, count = window * self._window, len(self._samples)
        places = np.arange(first, count if window == self._windows - 1 else first + self._window)
        return Permutation(count, EPOCH_ORDER, self._seed, epoch).at(places) if self._shuffle else places

    def _row_of(self, samples: Ints) -> Ints:
        return pack(self._samples.lengths(samples), self.length)

    def _pack(self, epoch: int, window: int) -> list[Ints]:
        """The rows of a window, in order."""
        samples = self._window_of(epoch, window)
        row_of = self._row_of(samples)
        rows = in_rows(row_of)
        if not self._shuffle:
            order = np.argsort([row[0] for row in rows])
        else:
            tokens = np.bincount(row_of, weights=self._samples.lengths(samples)).astype(np.int64)
            below = (tokens.max() - tokens) * FULLNESS // self.length
            chance = Permutation(len(rows), EPOCH_ORDER, self._seed, epoch, window).at(np.arange(len(rows)))
            order = np.lexsort((chance, -below))
            if (epoch * self._windows + window) % 2:
                order = order[::-1]
        return [samples[rows[row]] for row in order]
