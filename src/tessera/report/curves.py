"""Curves of any number of steps in bounded memory: neighbouring steps share a bucket, which keeps what a picture needs.

Of each bucket and curve are kept the least and the greatest value with their steps, so that a spike of one step stays
to be seen, and the mean. As long as there are at most MOST steps, each has a bucket of its own and nothing is lost.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MOST = 1024
"""Buckets of one picture."""


@dataclass(frozen=True)
class Buckets:
    """Per bucket its first `step`; per curve (down) and bucket (across) the least and greatest value and their steps,
    the sum and the number of values. Without a value the least is +inf and the greatest -inf."""

    step: np.ndarray
    least: np.ndarray
    least_at: np.ndarray
    greatest: np.ndarray
    greatest_at: np.ndarray
    total: np.ndarray
    count: np.ndarray

    @classmethod
    def of_points(cls, steps: np.ndarray, values: np.ndarray) -> "Buckets":
        """One bucket for each of n steps; `values` are [curves, n], NaN where a curve has none."""
        there = ~np.isnan(values)
        at = np.broadcast_to(steps, values.shape)
        least, greatest = np.where(there, values, np.inf), np.where(there, values, -np.inf)
        return cls(steps, least, at, greatest, at, np.where(there, values, 0.0), there.astype(np.int64))

    def beside(self, later: "Buckets") -> "Buckets":
        """These buckets, then those of `later`."""
        pairs = ((getattr(self, name), getattr(later, name)) for name in self.__dataclass_fields__)
        return Buckets(*(np.concatenate(pair, axis=-1) for pair in pairs))

    def first(self, count: int) -> "Buckets":
        """The first `count` buckets."""
        return Buckets(*(getattr(self, name)[..., :count] for name in self.__dataclass_fields__))

    def with_curves(self, count: int) -> "Buckets":
        """With so many curves; those that are new have no values."""
        more = count - len(self.total)
        empty = Buckets.of_points(self.step, np.full((more, len(self.step)), np.nan))
        names = [name for name in self.__dataclass_fields__ if name != "step"]
        return Buckets(self.step, *(np.concatenate((getattr(self, n), getattr(empty, n))) for n in names))

    def joined(self, width: int) -> "Buckets":
        """With neighbours together that lie in the same `width` steps."""
        if not len(self.step):
            return self
        keys = self.step // width
        starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        sizes = np.diff(np.append(starts, len(keys)))
        least, least_at = _extremes(np.minimum, self.least, self.least_at, starts, sizes)
        greatest, greatest_at = _extremes(np.maximum, self.greatest, self.greatest_at, starts, sizes)
        total, count = (np.add.reduceat(of, starts, axis=1) for of in (self.total, self.count))
        return Buckets(self.step[starts], least, least_at, greatest, greatest_at, total, count)


def _extremes(
    which: np.ufunc, values: np.ndarray, at: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The least or greatest value of each group of buckets, and the first step that has it."""
    best = which.reduceat(values, starts, axis=1)
    places = np.where(values == np.repeat(best, sizes, axis=1), np.arange(values.shape[1]), values.shape[1])
    return best, np.take_along_axis(at, np.minimum.reduceat(places, starts, axis=1), axis=1)


class Curves:
    """Curves over common steps, which come in ascending order."""

    def __init__(self, names: Iterable[str] = (), most: int = MOST) -> None:
        self.most, self.width = most, 1
        self.names: dict[str, int] = {name: row for row, name in enumerate(names)}
        self._last: dict[str, tuple[int, float]] = {}
        self._buckets = Buckets.of_points(np.empty(0, np.int64), np.empty((len(self.names), 0)))

    def row(self, name: str) -> int:
        """The row of a curve in what `add` takes; a new one where it is not known."""
        return self.names.setdefault(name, len(self.names))

    def add(self, steps: Sequence[int], values: np.ndarray) -> None:
        """Add n steps, greater than those before; `values` are [curves, n], NaN where a curve has no value."""
        if not steps:
            return
        for name, row in self.names.items():
            there = np.flatnonzero(~np.isnan(values[row]))
            if len(there):
                self._last[name] = (steps[there[-1]], float(values[row, there[-1]]))
        before = self._buckets.with_curves(len(self.names))
        self._buckets = before.beside(Buckets.of_points(np.asarray(steps, np.int64), values)).joined(self.width)
        while len(self._buckets.step) > self.most:
            self.width *= 2
            self._buckets = self._buckets.joined(self.width)

    def go_back_to(self, step: int) -> None:
        """Forget the buckets that begin at `step` or later: those steps are done again."""
        self._buckets = self._buckets.first(int(np.searchsorted(self._buckets.step, step)))
        self._last = {name: last for name, last in self._last.items() if last[0] < step}

    def __contains__(self, name: str) -> bool:
        """Whether a curve has any value."""
        return name in self.names and bool(self._buckets.count[self.names[name]].any())

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """The steps and values to draw a curve by: all of them, or of each bucket the least and the greatest.

        The last value is always among them.
        """
        if name not in self:
            return [], []
        row, b = self.names[name], self._buckets
        there = b.count[row] > 0
        pairs = [
            sorted({(int(low_at), float(low)), (int(high_at), float(high))})
            for low_at, low, high_at, high in zip(
                b.least_at[row][there],
                b.least[row][there],
                b.greatest_at[row][there],
                b.greatest[row][there],
                strict=True,
            )
        ]
        found = [point for pair in pairs for point in pair]
        last = self._last.get(name)
        if last is not None and last not in found[-2:]:
            found.append(last)
        return [step for step, _ in found], [value for _, value in found]

    def steps(self) -> list[int]:
        """The first step of each bucket."""
        return [int(step) for step in self._buckets.step]

    def means(self, name: str) -> list[float | None]:
        """The mean of each bucket, None where it has no value."""
        if name not in self.names:
            return [None] * len(self._buckets.step)
        total, count = self._buckets.total[self.names[name]], self._buckets.count[self.names[name]]
        return [float(t) / int(c) if c else None for t, c in zip(total, count, strict=True)]

    def mean(self, name: str) -> float | None:
        """The mean of all values of a curve."""
        if name not in self:
            return None
        row = self.names[name]
        return float(self._buckets.total[row].sum() / self._buckets.count[row].sum())

    def greatest(self, name: str) -> float | None:
        """The greatest value of a curve."""
        return float(self._buckets.greatest[self.names[name]].max()) if name in self else None

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        return self._last[name][1] if name in self._last else None
